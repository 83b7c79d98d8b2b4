"""Human labels for some of the examples: which ones, what that costs, the cheapest mix; and the flags from the plan to the report"""
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.compare import mixes, stages
from w2s.compare.config import read_toml, settings_hash, to_toml
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.label_arms import part_rows
from w2s.compare.label_data import load_labels
from w2s.compare.label_mixes import label_needs
from w2s.compare.label_settings import fill_labels
from w2s.compare.learn import Study
from w2s.compare.mix_settings import MixSettings
from w2s.compare.mixes import cost_table, plan_mixes
from w2s.compare.plan import run_for_plan
from w2s.compare.preference_mixes import pair_needs
from w2s.compare.preference_settings import fill_settings
from w2s.compare.stages import walk_stages
from w2s.compare.tables import Kind
from w2s.errors import ConfigError
from w2s.evaluate.cost import cheapest_mix, cheapest_words, count_weak, judge_mixes, label_cost
from w2s.evaluate.metrics import metric_rows
from w2s.experiments.demonstrations import open_demonstrations
from w2s.experiments.labels import open_labels
from w2s.experiments.preferences import open_preferences
from w2s.feedback.mixing import answer_disagreement, count_human, disagreement, doubt, rank_examples
from w2s.feedback.preferences import WeakLabels

# Choice

@pytest.mark.parametrize('need, first', [
    (doubt(np.array([[.9, .1], [.6, .4], [.2, .8], [.5, .5]])), [3, 1, 2, 0]),             # two classes: nearest to one half
    (doubt(np.array([[.4, .3, .3], [.5, .5, 0], [1, 0, 0], [.34, .33, .33]])), [3, 0, 1, 2]), # three: the likeliest is the least likely
    (disagreement(np.array([[[1, 0], [.5, .5], [.6, .4]], [[1, 0], [.5, .5], [.4, .6]]])), [2, None, None]), # doubt that all share is none
    (answer_disagreement([['a b', 'c d', 'e f'], ['a b', 'c x', 'y z']]), [2, 1, 0]),
])
def test_the_highest_need_comes_first(need, first):
    order = list(rank_examples(len(need), 0, need))
    assert [x for x, y in zip(order, first, strict=True) if y is not None] == [y for y in first if y is not None]


@pytest.mark.parametrize('need', [None, np.arange(40.), np.zeros(40)])
@pytest.mark.parametrize('seed', [0, 1])
def test_a_smaller_share_is_part_of_a_larger_one_and_everything_is_ranked_once(need, seed):
    order = rank_examples(40, seed, need)
    assert sorted(order) == list(range(40))
    c = MixSettings(human_share=(.5, .1, .25), human_choice=('random', 'uncertain'))
    found = plan_mixes(c, 40, seed, {'random': None, 'uncertain': np.arange(40.) if need is None else need})
    for choice in c.human_choice:
        small, middle, large = (set(m.human) for m in found if m.choice == choice)
        assert small < middle < large and (len(small), len(middle), len(large)) == (4, 10, 20)


def test_ties_are_broken_by_the_seed_and_not_by_the_order_of_the_file():
    assert len({tuple(rank_examples(6, s, np.zeros(6))) for s in range(10)}) > 5


@pytest.mark.parametrize('choice', ['random', 'uncertain', 'disagree'])
def test_no_choice_looks_at_the_truth(choice):
    "The same supervisor on rows whose human labels are turned round gets the same examples labelled"
    rng = np.random.default_rng(0)
    p, c = rng.uniform(size=(3, 60)), MixSettings(human_share=(.3,), human_choice=(choice,))
    rows = part_rows(config := fill_labels(dict(n_unlabelled=60, human_share=(.3,))), load_labels(config, []), 0).unlabelled
    weak = [WeakLabels(r, p[0], 0) for r in (rows, rows.map(lambda r: dict(label=1 - r['label'], probs=r['probs'][::-1])))]
    assert weak[0].rows['label'][:] != weak[1].rows['label'][:]
    pairs = [plan_mixes(c, 60, 0, pair_needs(w, p))[0].human for w in weak]
    two = np.stack([p, 1 - p], -1)
    assert list(pairs[0]) == list(pairs[1]) == list(plan_mixes(c, 60, 0, label_needs(two[0], two))[0].human)


@pytest.mark.parametrize('share, n, said', [(.01, 20, 'none'), (.001, 200, 'none'), (.99, 20, 'all'), (.5, 1, 'none')])
def test_a_share_of_none_or_all_is_refused(share, n, said):
    with pytest.raises(ConfigError, match=rf'--human-share {share:g} of {n} examples is {said}'): count_human(share, n)


# Cost

@pytest.mark.parametrize('choice, human, prices, cost', [
    ('random', 25, (1, 0), 25),         # 25 human labels
    ('random', 25, (2, .1), 57.5),      # 25 × 2, and 75 × 0.1
    ('uncertain', 25, (2, .1), 60),     # 25 × 2, and all 100 × 0.1 to choose by
    ('disagree', 25, (2, .1), 90),      # 25 × 2, and 4 × 100 × 0.1
    ('', 0, (2, .1), 10),               # weak labels alone
    ('', 100, (2, .1), 200),            # human labels alone
])
def test_the_cost_of_a_mix(choice, human, prices, cost):
    assert label_cost(human, count_weak(choice, 100, human, 4), *prices) == pytest.approx(cost)


def table(*rows):
    "Choice, share, cost, margin and p of each mix"
    return judge_mixes(pd.DataFrame([
        dict(choice=c, share=s, human_labels=100*s, cost=k, margin=m, p=p, value=.5 + m, pgr=.8 + m, pgr_low=.7, pgr_high=.9)
        for c, s, k, m, p in rows
    ]))


ENDS = (('', 0., 0., -.2, .001), ('', 1., 100., .1, .001))

@pytest.mark.parametrize('rows, cheapest, said', [
    ([*ENDS, ('random', .5, 50., .05, .01), ('random', .2, 20., .05, .01)], 20., 'cost 20'),   # Holm: 2 × .01 is below .05
    ([*ENDS, ('random', .5, 50., .05, .01), ('random', .2, 20., .05, .06)], 50., 'not ruled out: 20% human labels'),
    ([*ENDS, ('random', .5, 50., .05, .03), ('random', .2, 20., .05, .03)], 100., 'not ruled out'), # 2 × .03 is above .05
    ([*ENDS, ('random', .2, 20., -.05, .001)], 100., 'human labels alone, cost 100'),          # clearly below
    ([('', 0., 0., .01, .001), ENDS[1]], 0., 'the weak labels alone, cost 0'),
    ([ENDS[0], ('random', .2, 20., .05, .6)], None, 'none does with 95 % confidence'),
    ([ENDS[0], ('random', .2, 20., -.05, .001)], None, 'all 2 mixes are below it; the best is 20% human labels'),
    ([('random', .2, 20., .05, .01), ('uncertain', .2, 20., .05, .001)], 20., 'least confident'), # of equals the clearer one
])
def test_the_cheapest_mix_worked_out_by_hand(rows, cheapest, said):
    judged = table(*rows)
    best = cheapest_mix(judged)
    assert (None if best is None else best['cost']) == cheapest
    assert said in cheapest_words(judged, ('pgr', .8), 'accuracy')


def items(rates, seeds=3, rows=400):
    "Items of models that are right at these rates, exactly: the first so many of the examples"
    return pd.concat([
        metric_rows([f't{i}' for i in range(rows)], {'accuracy': (np.roll(np.arange(rows), s) < rate*rows)*1.}, *who, s, 'made up')
        for who, rate in rates.items() for s in range(seeds)
    ], ignore_index=True)


MIXES = pd.DataFrame([dict(role=r, method=m, weak=w, strong='big', seed=s, choice=c, share=x, human_labels=100*x, weak_labels=100*(1 - x))
                      for r, m, w, c, x in (('student', 'xent', 'small', '', 0.),
                                            ('mixed', 'xent, 50% human, random', 'small', 'random', .5),
                                            ('ceiling', 'ground truth', '', '', 1.)) for s in range(3)])
RATES = {('floor', 'ground truth', 'small', ''): .5, ('student', 'xent', 'small', 'big'): .6, ('ceiling', 'ground truth', '', 'big'): .9,
         ('mixed', 'xent, 50% human, random', 'small', 'big'): .85}
KIND = Kind('labels', ('accuracy',), ('accuracy',), lambda models: [])

@pytest.mark.parametrize('target, margins, verdicts', [
    ('pgr=0.8', [-.22, .03, .08], ['missed', 'reached', 'reached']),    # .5 + .8 × .4 is .82
    ('.9', [-.26, -.01, .04], ['missed', 'open', 'reached']),           # .86
    ('ceiling=0.5', [.15, .40, .45], ['reached', 'reached', 'reached']),# .45
])
def test_scores_against_a_target(target, margins, verdicts):
    c = MixSettings(human_share=(.5,), target=target, price_human=3.)
    t = cost_table(c, items(RATES), MIXES, KIND)
    assert list(t.margin) == pytest.approx(margins) and list(t.verdict) == verdicts
    assert list(t.pgr) == pytest.approx([.25, .875, 1.]) and list(t.cost) == [0, 150, 300]


@pytest.mark.parametrize('change, why', [
    ({('ceiling', 'ground truth', '', 'big'): .5}, 'the gap may be zero'),
    ({('ceiling', 'ground truth', '', 'big'): .3}, 'reversed'),
    ({('ceiling', 'ground truth', '', 'big'): None}, 'there is no ceiling'),
])
def test_no_mix_is_named_without_a_gap(change, why):
    rates = {k: v for k, v in (RATES | change).items() if v is not None}
    t = cost_table(MixSettings(human_share=(.5,)), items(rates), MIXES, KIND)
    assert set(t.verdict) == {'unknown'} and cheapest_mix(t) is None
    said = cheapest_words(t, ('pgr', .8), 'accuracy', t.refused.iloc[0])
    assert said.startswith('No cheapest mix can be named') and why in said


# Settings

@pytest.mark.parametrize('fill', [fill_settings, fill_labels, fill_demonstrations])
@pytest.mark.parametrize('given, why', [
    (dict(human_share=(.1, 1.5)), 'human_share is 1.5'), (dict(human_share=(-.1,)), 'from 0 to 1'),
    (dict(human_share=(.1, .1)), 'given twice'),
    (dict(human_choice=('uncertain',)), 'human_choice does nothing without'), (dict(price_weak=.1), 'price_weak does nothing without'),
    (dict(target='ceiling=.9'), 'target does nothing without'), (dict(human_share=(.1,), human_choice=('unsure',)), 'unsure'),
    (dict(human_share=(.1,), price_human=-1.), 'at least 0'), (dict(human_share=(.1,), price_human=0.), 'both 0'),
    (dict(human_share=(.1,), target='pgr=2'), 'above 0'), (dict(human_share=(.1,), ensemble=4), 'belongs to --human-choice disagree'),
])
def test_bad_settings_are_a_sentence(fill, given, why):
    with pytest.raises(ConfigError, match=re.escape(why)): fill(given)


@pytest.mark.parametrize('fill, given, why', [
    (fill_settings, dict(labels=dict(keep=.5)), 'labels.keep'), (fill_settings, dict(labels=dict(subset='match')), 'labels.subset'),
    (fill_settings, dict(others=('ceiling',)), 'leave human among others'),
    (fill_settings, dict(supervisor='judge', human_choice=('disagree',)), 'is not trained'),
    (fill_settings, dict(supervisor='length', human_choice=('disagree',)), 'is not trained'),
    (fill_labels, dict(readout='probe', human_choice=('disagree',)), 'a probe has no seed'),
    (fill_demonstrations, dict(methods=('own answers', 'naive')), 'name another method first'),
    (fill_demonstrations, dict(methods=('auxiliary',)), 'name another method first'),
    (fill_demonstrations, dict(task='gender', human_choice=('uncertain',)), 'log-probs'),
    (fill_demonstrations, dict(task='digits', human_choice=('disagree',)), 'none is trained'),
    (fill_demonstrations, dict(instruction='Be kind.', human_choice=('disagree',)), 'random or uncertain'),
])
def test_what_a_kind_of_feedback_cannot_mix_is_a_sentence(fill, given, why):
    with pytest.raises(ConfigError, match=re.escape(why)): fill(dict(human_share=(.25,)) | given)


# The ends of the curve, and commands

FAST = dict(load=dict(quantize='none', dtype='float32'), lora=dict(rank=2), seeds=1, human_share=(.5,), human_choice=('random',))
OPENED = {
    'preferences': (open_preferences, fill_settings, dict(strong='nano', n_labelled=16, n_unlabelled=16, n_test=6, samples=0), 'human'),
    'labels': (open_labels, fill_labels, dict(strong='nano', methods='xent', n_labelled=16, n_unlabelled=16, n_test=10), 'ceiling'),
    'demonstrations': (open_demonstrations, fill_demonstrations,
                       dict(strong='nano', methods='naive', n_labelled=8, n_unlabelled=12, n_test=4, examples=2), 'ceiling'),
}

@pytest.mark.parametrize('kind', OPENED)
def test_no_human_labels_are_the_student_and_all_of_them_the_upper_end(kind, tmp_path, monkeypatch):
    "What a mix of share 0 or 1 would be trained on is what the arms at the ends are trained on, so these stand for it"
    opener, fill, given, upper = OPENED[kind]
    found: dict[str, list[str]] = {}

    def note(run, name, inputs):
        known = {k: v for k, v in inputs.items() if k != 'start'} # the name of the SFT stage before it
        if 'rows' in inputs and 'lora' in inputs: found.setdefault(name.partition('-')[0], []).append(settings_hash(known))
        return folder(run, name, inputs)
    folder = stages.stage_folder
    monkeypatch.setattr(stages, 'stage_folder', note)
    monkeypatch.setattr(mixes, 'inner_shares', lambda c: [0., 1.])
    opened = opener(Study(fill(FAST | given), run_for_plan(tmp_path/'run'), True))
    walk_stages(opened.study.run, opened.make)
    ends = {*found['student'], *found[upper]}
    assert len(ends) == len(found['mixed']) == (4 if kind == 'preferences' else 2) and set(found['mixed']) == ends


PAIR = '--weak pico --strong nano --seeds 1 --epochs 1 --quantize none --dtype float32'
MIX = '--human-share 0,.25,1 --human-choice random,uncertain,disagree --ensemble 2 --price-human 2 --price-weak .1 --target pgr=.9'
COMMANDS = {
    'preferences': f'{PAIR} --n-labelled 16 --n-unlabelled 16 --n-test 8 --samples 0',
    'safety': f'{PAIR} --method xent --n-labelled 16 --n-unlabelled 16 --n-test 16',
    'persona': f'{PAIR} --method naive --n-labelled 12 --n-unlabelled 16 --n-test 6 --max-tokens 12',
}

def start(command, *words):
    "The command in this process: its exit code, and what it printed"
    done = CliRunner().invoke(app, ['run', command, *map(str, words)])
    return done.exit_code, done.output + (f'\n{done.exception!r}' if done.exception else '')


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "Commands end as they do in a terminal"
    monkeypatch.setenv('COLUMNS', '250')
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)


@pytest.mark.cases(1)
@pytest.mark.parametrize('command', COMMANDS)
def test_the_flags_from_the_plan_to_the_report(command, tmp_path, monkeypatch):
    plain, words, out = COMMANDS[command].split(), [*COMMANDS[command].split(), *MIX.split()], tmp_path/'run'
    code, said = start(command, *words, '--dry-run', '--out', out)
    assert code == 0 and not out.exists(), said
    planned = int(re.search(r'^(\d+) stages', said, re.M)[1])

    with monkeypatch.context() as m: # killed half-way
        real, left = stages._make_stage, [planned//2]
        def make(*args):
            if not left[0]: raise KeyboardInterrupt
            left[0] -= 1
            real(*args)
        m.setattr(stages, '_make_stage', make)
        code, said = start(command, *words, '--out', out)
        assert code != 0 and not (out/'costs.parquet').exists(), said
    code, said = start(command, *words, '--out', out) # resumed
    assert code == 0, said
    assert [int(n) for n in re.findall(rf'^\[ *(\d+)/{planned}\]', said, re.M)] == list(range(1, planned + 1))

    costs = pd.read_parquet(out/'costs.parquet').drop_duplicates('method').sort_values('cost')
    assert dict(zip(costs.choice + costs.share.astype(str), costs.cost.round(6), strict=True)) == {
        '0.0': 1.6, 'random0.25': 9.2, 'uncertain0.25': 9.6, 'disagree0.25': 11.2, '1.0': 32.} # of 16 examples, 4 with a human label
    report = (out/'report.md').read_text(encoding='utf-8')
    line = next(x for x in said.splitlines() if '90% of the gap' in x)
    assert line in report and '## Human labels and cost' in report and 'costs.png' in report and (out/'costs.png').exists()
    assert 'costs' in {p.stem for p in out.glob('*.svg')} and len(pd.read_parquet(out/'choices.parquet').query('share == .25')) >= 3
    arms = pd.read_parquet(out/'arms.parquet')
    assert sorted(arms.query('role == "mixed"').method.str.rpartition(', ')[2]) == ['disagree', 'random', 'uncertain']
    assert read_toml(out/'config.toml')['human_share'] == [0., .25, 1.]

    code, said = start(command, *plain, '--out', out) # all arms of a plain run are there, so the ends were trained once
    assert code == 0 and 'starting' not in said, said
    assert 'Human labels and cost' not in (out/'report.md').read_text(encoding='utf-8')


@pytest.mark.cases(4)
@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('flags, why', [
    ('--human-share .01', '--human-share 0.01 of 16 examples is none of them'),
    ('--human-share 2', 'human_share is 2'),
    ('--human-choice uncertain', 'give --human-share, too'),
    ('--human-share .5 --target 80', 'the share must lie above 0'),
    ('--human-share .5 --price-human 0', 'price_human and price_weak are both 0'),
])
def test_bad_flags_are_one_sentence_before_any_work(command, flags, why, tmp_path):
    code, said = start(command, *COMMANDS[command].split(), *flags.split(), '--out', tmp_path/'run')
    assert code == 1 and why in ' '.join(said.split()) and 'Traceback' not in said and 'starting' not in said, said


@pytest.mark.parametrize('fill', [fill_settings, fill_labels, fill_demonstrations])
def test_settings_go_through_a_file(fill, tmp_path):
    c = fill(dict(human_share=(0, .05, .25), human_choice='random,uncertain', price_human=2., target='ceiling=.95'))
    (tmp_path/'c.toml').write_text(to_toml(c), encoding='utf-8')
    assert c.human_share == (0., .05, .25) and fill(read_toml(tmp_path/'c.toml')) == c == replace(c)
