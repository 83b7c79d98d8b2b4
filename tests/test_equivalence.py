"Two one-sided tests: against those of scipy, on both sides of the margin, and from the command line"
import json

import numpy as np
import pandas as pd
import pytest
from scipy.stats import ttest_1samp
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.errors import ConfigError
from w2s.evaluate.equivalence import equivalence, judge_equivalence

RNG = np.random.default_rng(0)


@pytest.mark.parametrize('mean', [-.3, -.1, 0., .05, .2])
@pytest.mark.parametrize('margin', [.1, .25, .5])
@pytest.mark.parametrize('level', [.9, .95, .99])
def test_one_seed_is_two_t_tests(mean, margin, level):
    "Of 400 differences without bounds; the interval is that of a normal distribution, so that a p on the edge is left out"
    d = RNG.normal(mean, 1, 400)
    p = max(ttest_1samp(d, -margin, alternative='greater').pvalue, ttest_1samp(d, margin, alternative='less').pvalue)
    found = judge_equivalence(d[None], margin, level)
    if abs(p - (1 - level)) > .003: assert found['equivalent'] == (p < 1 - level)
    assert found['margin_low'] < d.mean() < found['margin_high']


def test_seeds_that_differ_widen_the_interval():
    d = RNG.normal(0, .1, (3, 400))
    alike, apart = judge_equivalence(d, .1), judge_equivalence(d + np.array([[-.2], [0.], [.2]]), .1)
    assert alike['equivalent'] and not apart['equivalent']


def test_the_sign_of_the_difference_does_not_matter():
    d = RNG.normal(.05, .5, (1, 300))
    one, other = judge_equivalence(d, .1), judge_equivalence(-d, .1)
    assert one['equivalent'] == other['equivalent'] and np.isclose(one['margin_low'], -other['margin_high'])


@pytest.mark.parametrize('margin', [0, -1, np.inf, np.nan])
def test_a_margin_that_is_none(margin):
    with pytest.raises(ConfigError, match='allows no claim'): judge_equivalence(np.zeros((1, 9)), margin)


def test_models_of_a_run():
    "Identical answers are equivalent within what so many rows can tell"
    rows = [dict(task='t', role=r, method='dpo', weak='a', strong='b', seed=0, id=str(i), metric='accuracy', value=float(i % 3 > 0))
            for r in ('student', 'human') for i in range(300)]
    found = equivalence(pd.DataFrame(rows), ('student', 'dpo'), ('human', 'dpo'), 'accuracy', .05)
    assert found.value == 0 and found.equivalent and found.margin_low < 0 < found.margin_high
    few = equivalence(pd.DataFrame([r for r in rows if int(r['id']) < 20]), ('student', 'dpo'), ('human', 'dpo'), 'accuracy', .05)
    assert not few.equivalent


def test_from_the_command_line(tmp_path):
    for name, k in (('a', 3), ('b', 4)):
        (tmp_path/f'{name}.csv').write_text('id,acc\n' + ''.join(f'q{i},{int(i % k > 0)}\n' for i in range(240)))
    words = ['compare', str(tmp_path/'a.csv'), str(tmp_path/'b.csv'), '--out', str(tmp_path/'out')]
    done = CliRunner().invoke(app, [*words, '--margin', '.2'])
    assert done.exit_code == 0 and 'equivalent within ±0.2 (90% CI' in done.output
    assert json.loads((tmp_path/'out/comparison.json').read_text())['table'][0]['equivalent'] is True
    assert 'equivalence within ±0.05 is not shown' in CliRunner().invoke(app, [*words, '--margin', '.05']).output
    assert 'equivalen' not in CliRunner().invoke(app, words).output
    done = CliRunner().invoke(app, [*words, '--margin', '0'])
    assert done.exit_code == 1 and '--margin 0 allows no claim' in str(done.output) + str(done.exception)
