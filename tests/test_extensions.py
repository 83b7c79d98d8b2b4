"""A method is one cell: every kind of extension goes through a whole comparison, from Python and from a file, and a wrong one is refused in words.

The comparisons are those of the embedded world with the smallest models and a few rows: what is tested is that the function acts, not how well."""
import json
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.extensions import KINDS, IMPORTED, import_extensions, imported_inputs, judge, label_loss, labeller, loss, method, metric, run_hash, task, used_extensions
from w2s.compare.label_settings import fill_classify
from w2s.compare.demonstration_settings import fill_transfer
from w2s.compare.preference_settings import fill_settings
from w2s.compare.sources import source_hash
from w2s.data.rows import make_rows
from w2s.errors import ConfigError, DataError
from w2s.experiments import demonstrations, labels, preferences
from w2s.train.losses import PREFERENCE_LOSSES
from w2s.train.settings import LABEL_LOSSES

PREFERENCES = dict(weak='pico', strong='pico', rows=24, test_rows=8, seeds=1, samples=1, others=[], sft=dict(epochs=1), dpo=dict(epochs=1))
LABELS = dict(weak='pico', strong='pico', rows=44, test_rows=12, seeds=1, baseline=False, supervisor=dict(epochs=1), student=dict(epochs=1))
DEMONSTRATIONS = dict(task='persona', weak='pico', strong='nano', gold_rows=8, rows=8, test_rows=6, seeds=1, demonstrate=dict(epochs=1), student=dict(epochs=1), max_tokens=16)


@pytest.fixture(autouse=True)
def clean():
    "No test sees the functions of another one"
    yield
    IMPORTED.clear()
    for registry in KINDS.values():
        for name in list(registry.own): registry.remove(name)


MINE = '''
import torch
from w2s.compare.extensions import judge, label_loss, labeller, loss, method, metric, task

@loss('hinge')
def hinge(gap, target, beta, margin=1.):
    "No pull beyond a margin"
    return target*torch.relu(margin - beta*gap) + (1 - target)*torch.relu(margin + beta*gap)

@label_loss('squared')
def squared(logits, target, power=2.): return (logits.softmax(-1) - target).abs().pow(power).sum(-1)

@labeller('vowels')
def vowels(response_a, response_b): return [[sum(c in 'aeiou' for c in t) for t in pair] for pair in zip(response_a, response_b)]

@method('shout')
def shout(questions, answers, speak, ask): return [f'{w.strip()} {a.strip()}!' for w, a in zip(answers, speak([ask(q) for q in questions]))]

@metric('letters')
def letters(answers): return [len(a) for a in answers]

@metric('sure')
def sure(probs): return probs.max(1)

@judge('brief')
def brief(responses, most=20): return [-max(0, len(r) - most) for r in responses]

@task('evens')
def evens(): return [dict(text=f'Is {i} an even number?', label='odd' if i % 2 else 'even') for i in range(120)]

@task('polite')
def polite(): return [dict(prompt=f'Customer: Where is shop {i}?\\nDesk:', chosen=f' Thank you for asking, it is in street {i}.', rejected=f' Street {i}.') for i in range(60)]
'''


def from_python(tmp_path): exec(compile(MINE, '<cell>', 'exec'), {'__name__': '__main__'})


def from_file(tmp_path):
    (tmp_path/'mine.py').write_text(MINE)
    return {'imports': [str(tmp_path/'mine.py')]}


def w2s(*words):
    "A command in this process: its exit status, and what it said"
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


WAYS = {'python': from_python, 'file': from_file}


@pytest.mark.parametrize('way', WAYS)
def test_a_preference_comparison_with_loss_labeller_judge_and_metric(tmp_path, way):
    given = WAYS[way](tmp_path) or {}
    config = fill_settings({**{k: v for k, v in PREFERENCES.items() if k != 'weak'}, 'loss': 'hinge(margin=2)', 'supervisor': 'vowels', 'gold': 'brief(most=10)', **given})
    result = preferences.run(config, tmp_path/'run', quiet=True)
    arms = result.items.groupby(['role', 'method', 'weak']).size().index
    assert ('student', 'hinge(margin=2) weak', 'vowels') in arms and ('floor', 'vowels untrained', 'vowels') in arms
    scored = result.items[result.items.metric.isin(['letters', 'gold_reward'])].pivot_table(index=['role', 'method', 'id'], columns='metric', values='value').dropna()
    assert len(scored) >= 24 and np.allclose(scored.gold_reward, -(scored.letters - 10).clip(lower=0))
    assert 'letters' in preferences.summary_table(result, preferences.SHOWN) and 'sure' not in set(result.items.metric)
    vowels = lambda t: sum(c in 'aeiou' for c in t)
    assert all(vowels(r.chosen) >= vowels(r.rejected) for r in result.weak_labels.itertuples())


@pytest.mark.parametrize('way', WAYS)
def test_a_label_comparison_with_loss_task_and_metric(tmp_path, way):
    given = WAYS[way](tmp_path) or {}
    config = fill_classify({**LABELS, 'data': 'evens', 'methods': ['xent', 'squared(power=1)', 'focal', 'balanced'], **given})
    result = labels.run(config, tmp_path/'run', quiet=True)
    students = result.items[result.items.role == 'student']
    assert set(students.method) == {'xent', 'squared(power=1)', 'focal', 'balanced'} and set(result.classes) == {'even', 'odd'}
    p = result.predictions[(result.predictions.role == 'student') & (result.predictions.method == 'focal')]
    assert np.isclose(students[(students.method == 'focal') & (students.metric == 'sure')].value.mean(), p[['p0', 'p1']].max(axis=1).mean())
    assert 'sure' in labels.shown_table(result) and 'letters' not in set(result.items.metric)


@pytest.mark.parametrize('way', WAYS)
def test_a_comparison_by_demonstrations_with_method_and_metric(tmp_path, way):
    given = WAYS[way](tmp_path) or {}
    result = demonstrations.run(fill_transfer({**DEMONSTRATIONS, 'methods': ['naive', 'shout'], **given}), tmp_path/'run', quiet=True)
    lessons = result.lessons[result.lessons.method == 'shout']
    assert len(lessons) == 8 and all(a.startswith(w.strip()) and a.endswith('!') for a, w in zip(lessons.answer, lessons.weak_answer, strict=True))
    said = result.answers[(result.answers.role == 'student') & (result.answers.method == 'shout')].answer.str.len()
    assert np.isclose(result.intervals[(result.intervals.metric == 'letters') & (result.intervals.method == 'shout')].value.iloc[0], said.mean(), rtol=.3)


COMMANDS = {
    'preferences': 'run weak-teacher --strong pico --rows 24 --test-rows 8 --seeds 1 --samples 1 --epochs 1 --data polite --loss hinge(margin=2) --supervisor vowels --gold brief',
    'labels': 'run classify --weak pico --strong pico --rows 44 --test-rows 12 --seeds 1 --epochs 1 --no-baseline --data evens --method squared',
    'demonstrations': 'run persona --weak pico --strong nano --gold-rows 8 --rows 8 --test-rows 6 --seeds 1 --epochs 1 --method shout',
    'toxicity': 'run toxicity --weak pico --strong pico --gold-rows 12 --rows 12 --test-rows 6 --seeds 1 --samples 1 --epochs 1 --method naive --scorer unkind'}


@pytest.mark.parametrize('kind', COMMANDS)
def test_the_same_from_the_command_line(tmp_path, kind):
    (tmp_path/'mine.py').write_text(MINE + "\n@judge('unkind')\ndef unkind(responses): return [min(1., r.count('a')/10) for r in responses]\n")
    status, said = w2s(*COMMANDS[kind].split(), '--import', tmp_path/'mine.py', '--out', tmp_path/'run')
    assert status == 0, said[-1500:]
    metrics = set(pd.read_parquet(tmp_path/'run'/'items.parquet').metric)
    assert ('sure' if kind == 'labels' else 'letters') in metrics
    kept = {p.name for p in (tmp_path/'run'/'extensions').iterdir()}
    wanted = {'preferences': {'preference-loss-hinge.txt', 'labeller-vowels.txt', 'judge-brief.txt', 'task-polite.txt'}, 'labels': {'loss-on-labels-squared.txt', 'task-evens.txt'},
              'demonstrations': {'method-shout.txt'}, 'toxicity': {'judge-unkind.txt'}}[kind]
    assert kept == wanted | {'mine.py', 'extensions.json', 'metric-letters.txt', 'metric-sure.txt'}
    assert (tmp_path/'run'/'extensions'/'mine.py').read_text() == (tmp_path/'mine.py').read_text()
    assert 'mine.py' in json.loads((tmp_path/'run'/'extensions'/'extensions.json').read_text())
    assert str(tmp_path/'mine.py') in (tmp_path/'run'/'config.toml').read_text()


def test_imports_in_a_configuration_file(tmp_path):
    (tmp_path/'mine.py').write_text(MINE)
    (tmp_path/'run.toml').write_text(f"imports = ['{tmp_path/'mine.py'}']\nloss = 'hinge'\nsupervisor = 'vowels'\n")
    status, said = w2s('run', 'weak-teacher', '--config', tmp_path/'run.toml', '--strong', 'pico', '--rows', 24, '--test-rows', 8, '--dry-run')
    assert status == 0 and 'hinge' in said, said[-800:]
