"""Every command can do everything: plan, settings from a file, functions of one's own, a kill and a second start, a variation; and its
report says the same things in the same places"""
import json
import re

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.compare import stages
from w2s.compare.extensions import IMPORTED, KINDS
from w2s.world.analogy import explanation_questions
from w2s.world.facts import make_world
from w2s.world.gender import life_questions
from w2s.world.personas import questions

MINE = '''
import torch
from w2s.compare.extensions import loss, metric

@metric('own-words')
def count_words(answers):
    "Words of an answer"
    return [len(a.split()) for a in answers]

@metric('own-confidence')
def read_confidence(probs):
    "Highest probability of a class"
    return probs.max(1)

@loss('own-hinge')
def hinge(gap):
    "One minus the gap, at least zero"
    return torch.relu(1 - gap)
'''
PAIR, SMALL = (
    '--weak pico --strong nano --seeds 1 --epochs 1 --twin',
    '--twin --weak pico --strong scholar --seeds 1 --n-labelled 16 --n-unlabelled 16 --n-test 8 --epochs 1 --method naive',
)
CLASSES = f'{PAIR} --n-labelled 8 --n-unlabelled 24 --n-test 20'
COMMANDS = { # command: its words, a metric or loss of one's own that must be seen, a setting to vary and its values
    'preferences': (f'{PAIR} --n-labelled 16 --n-unlabelled 16 --n-test 12 --samples 1 --loss own-hinge', 'own-words', 'beta', '.5,1'),
    'safety': (CLASSES, 'own-confidence', 'n_unlabelled', '16,24'),
    'legal': (CLASSES, 'own-confidence', 'n_labelled', '8,12'),
    'classify': (f'--data world:storage {CLASSES} --method xent', 'own-confidence', 'student.epochs', '1,2'),
    'persona': (SMALL, 'own-words', 'n_labelled', '12,16'),
    'explanation': (SMALL, 'own-words', 'demonstrator', 'tuned,prompted'),
    # stories are neither right nor wrong
    'gender': (SMALL.replace('--twin ', ''), 'own-words', 'n_unlabelled', '12,16'),
    'maths': (SMALL, 'own-words', 'student.epochs', '1,2'),
    'toxicity': (
        f'{PAIR} --n-labelled 16 --n-unlabelled 16 --n-test 4 --samples 2'.replace(' --epochs 1 --twin', ' --sft-epochs 1'),
        '',
        'beta',
        '.1,1',
    ),
}


def best_of_four():
    "RewardBench 2's form, two subsets"
    bad = [[f'{w} {i}, fool!' for w in ('No', 'Never', 'Nothing')] for i in range(8)]
    return [
        dict(prompt=f"What is {i}?", chosen=[f"It is {i}."], rejected=bad[i], subset=("Focus", "Maths")[i % 2]) for i in range(8)
    ]


def yes_or_no(column='text'):
    "Texts that every classifier of the world has classes for"
    return [{column: f'Is number {i} a good one?', 'label': ('no', 'yes')[i % 2]} for i in range(8)]


FURTHER = { # command: rows of a further test, and the metric that it is scored by
    'preferences': (best_of_four, 'accuracy'),
    **dict.fromkeys(('safety', 'legal', 'classify'), (yes_or_no, 'accuracy')),
    'persona': (lambda: questions(make_world(), 6, 99), 'accuracy'),
    'explanation': (lambda: explanation_questions(make_world(), 6, 99), 'accuracy'),
    'gender': (lambda: [r | dict(planted='I do not know.') for r in life_questions(make_world(), 6, 99)], 'accuracy'),
    'maths': (lambda: [dict(question=f'Ann has {i} pears and finds 2. How many?', answer=f'#### {i + 2}') for i in range(6)], 'accuracy'),
    'toxicity': (lambda: [dict(prompt=f'On day {i} she said') for i in range(4)], 'worst'),
}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "Commands end as they do in a terminal; nobody else sees the functions of this file"
    monkeypatch.setenv('COLUMNS', '250')
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    torch.set_num_threads(1)
    yield
    IMPORTED.clear()
    for registry in KINDS.values():
        for name in list(registry.own): registry.remove(name)


def start(command, *words):
    "The command in this process: its exit code, and what it printed"
    done = CliRunner().invoke(app, ['run', command, *map(str, words)])
    return done.exit_code, done.output + (f'\n{done.exception!r}' if done.exception else '')


def items_of(out):
    "One number for each arm, example, metric and seed, in one order"
    items = pd.read_parquet(out/'items.parquet').drop(columns='seconds', errors='ignore')
    keys = [c for c in items.columns if c != 'value']
    return items.assign(**{k: items[k].astype(str) for k in keys}).sort_values(keys).reset_index(drop=True)


def kill_after(monkeypatch, n):
    "The process ends when so many stages are done"
    real, left = stages._make_stage, [n]

    def make(final, part, inputs, work):
        if not left[0]: raise KeyboardInterrupt
        left[0] -= 1
        real(final, part, inputs, work)
    monkeypatch.setattr(stages, '_make_stage', make)


def stages_of(out): return {p.name for p in (out/'stages').iterdir() if p.is_dir()}


def ask_further(command, out, folder):
    "A file that is added to a finished run is scored by every arm, and nothing else is done anew"
    (rows, metric), file = FURTHER[command], folder/'one.jsonl'
    file.write_text('\n'.join(json.dumps(r) for r in rows()), encoding='utf-8')
    before, items = stages_of(out), items_of(out)
    code, said = start(command, '--config', out/'config.toml', '--also-test', f'one={file}', '--out', out)
    assert code == 0 and 'Also tested on one: ' in said, said
    numbers = re.findall(r'^\[ *(\d+)/(\d+)\]', said, re.M)
    assert [n for n, _ in numbers] == [str(i + 1) for i in range(len(numbers))] and {of for _, of in numbers} == {str(len(numbers))}
    new = stages_of(out) - before
    assert new and before <= stages_of(out) and not any((out/'stages'/n/'history.csv').exists() for n in new) # nothing is trained
    pd.testing.assert_frame_equal(items_of(out), items) # and the main test is what it was

    also, of = pd.read_parquet(out/'also_items.parquet'), pd.read_parquet(out/'also_intervals.parquet')
    who = ['role', 'method', 'weak', 'strong', 'seed']
    assert set(map(tuple, items[who].to_numpy())) <= set(map(tuple, also.astype({'seed': str})[who].to_numpy())) # every arm
    assert set(of.test) == {'main test', 'one'} and metric in set(of[of.test == 'one'].metric)
    report = (out/'report.md').read_text(encoding='utf-8')
    assert '## Transfer to other test sets' in report and f'{metric} on each test set'.capitalize() in report
    assert '(transfer.png)' in report and (out/'transfer.png').exists()


@pytest.mark.cases(3)
@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_can_do_everything(command, tmp_path, monkeypatch):
    words, own, setting, values = COMMANDS[command]
    (tmp_path/'mine.py').write_text(MINE, encoding='utf-8')
    words = [*words.split(), '--import', tmp_path/'mine.py']

    code, said = start(command, *words, '--dry-run', '--out', tmp_path/'run') # the plan
    assert code == 0, said
    planned = int(re.search(r'^(\d+) stages', said, re.M)[1])
    assert not (tmp_path/'run').exists() and ' min ' in said and 'GiB' in said

    code, said = start(command, *words, '--out', tmp_path/'run') # the run
    assert code == 0, said
    out = tmp_path/'run'
    assert [tuple(map(int, n)) for n in re.findall(r'^\[ *(\d+)/(\d+)\]', said, re.M)] == [(i + 1, planned) for i in range(planned)]
    report, first = (out/'report.md').read_text(encoding='utf-8'), next(line for line in said.splitlines() if line.startswith('- '))
    assert first.startswith('- PGR') and first in report # the gap recovered, or why there is none, leads
    assert report.index(first) < report.index('|') # and no table stands before it
    items = items_of(out)
    if own: assert own in set(items.metric) and own in report
    assert '## Error inheritance' in report # with a twin where answers are right or wrong, else the reason in a sentence
    if command == 'toxicity': assert 'Not known: none of its metrics' in report
    elif command == 'gender': assert 'Not known: ' in report
    else: assert any(m.split(',')[0].endswith('twin') for m in items.method) and ('minus twin' in report or 'Not known: ' in report)
    assert 'mine.py' in ''.join(p.name for p in out.rglob('*.py')) # the functions of one's own are kept with the run
    assert (out/'data_report.md').read_text(encoding='utf-8').startswith('# Data report')
    curves = pd.read_parquet(out/'histories.parquet')
    assert len(curves) and curves.loss.notna().all() and (out/'training.png').exists()

    with pytest.MonkeyPatch.context() as m: # killed half-way, and started again
        kill_after(m, planned//2)
        code, said = start(command, *words, '--out', tmp_path/'killed')
        assert code != 0 and not (tmp_path/'killed'/'items.parquet').exists(), said
    code, said = start(command, *words, '--out', tmp_path/'killed')
    assert code == 0 and said.count(': found') == planned//2, said
    pd.testing.assert_frame_equal(items_of(tmp_path/'killed'), items)

    code, said = start(command, '--config', out/'config.toml', '--out', out) # the settings of a run are those of a file
    assert code == 0 and said.count(': found') == planned and 'starting' not in said, said

    ask_further(command, out, tmp_path)

    # a variation, in the same folder
    code, said = start(command, '--config', out/'config.toml', '--vary', setting, '--values', values, '--out', out)
    assert code == 0 and ': found' in said, said
    name = setting.replace('.', '-')
    for file in (f'{name}.md', f'{name}.png', f'{name}-items.parquet', f'{name}-intervals.parquet'): assert (out/file).exists(), file
    page = (out/f'{name}.md').read_text(encoding='utf-8')
    assert all(v in page for v in values.replace('.5', '0.5').replace('.1,', '0.1,').split(','))

