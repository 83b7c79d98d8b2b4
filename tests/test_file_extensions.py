"`w2s label` and `w2s refine` with labellers, judges and methods of one's own; their settings are fields, and every field has its flag"
import json
import re
from dataclasses import fields
from itertools import takewhile

import pytest
from datasets import load_dataset
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.demonstration_tasks import world_rows
from w2s.compare.extensions import JUDGES, LABELLERS, METHODS
from w2s.compare.options import options_of
from w2s.compare.preference_data import ladder_world
from w2s.errors import ConfigError
from w2s.files.jobs import LabelJob, RefineJob, fill_refine, label_settings
from w2s.world.rows import world_preferences

GOOD = '''
import numpy as np
from w2s.compare.extensions import judge, labeller, method

@labeller('shorter')
def shorter(response_a, response_b, scale=50): return np.array([[-len(t)/scale for t in p] for p in zip(response_a, response_b)])

@judge('brief')
def brief(prompts, responses, scale=50): return [-len(r)/scale for r in responses]

@method('shout')
def shout(questions, answers): return [a.upper() for a in answers]

@method('alone')
def alone(questions, speak, ask): return speak([ask(q) for q in questions])
'''
BAD = '''
import numpy as np
from w2s.compare.extensions import judge, labeller, method

@labeller('flat')
def flat(response_a): return np.zeros(len(response_a))
@labeller('hole')
def hole(response_a): return np.full((len(response_a), 2), np.nan)
@labeller('mute')
def mute(response_a): return None
@judge('flat-judge')
def flat_judge(responses): return [0.]
@judge('hole-judge')
def hole_judge(responses): return [float('inf')]*len(responses)
@method('fewer')
def fewer(answers): return answers[1:]
@method('numbers')
def numbers(answers): return [1.5]*len(answers)
@method('nothing')
def nothing(answers): return None
@method('fails')
def fails(answers): return answers['x']
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Pairs, labelled pairs, questions with answers, and two files of extensions"
    home = tmp_path_factory.mktemp('own')
    for name, rows in world_preferences(ladder_world(), rows=60, test_rows=4, label_share=.5).items():
        rows.to_pandas()[['prompt', 'chosen', 'rejected']].to_json(home/f'{name}.jsonl', orient='records', lines=True)
    asked = world_rows('persona', 0, (5, 8, 4)).unlabelled
    (home / 'weak.jsonl').write_text(
        ''.join(json.dumps(dict(question=q, answer=a.strip())) + '\n' for q, a in zip(asked.questions, asked.gold, strict=True))
    )
    (home/'good.py').write_text(GOOD)
    (home/'bad.py').write_text(BAD)
    return home


@pytest.fixture(autouse=True)
def forget():
    "Registries as they were"
    yield
    for registry in (LABELLERS, JUDGES, METHODS):
        for name in list(registry.own): registry.remove(name)


def w2s(*words): return CliRunner().invoke(app, list(map(str, words)))


def label(home, out, *words):
    return w2s('label', '--rows', home / 'train_w2s.jsonl', '--import', home / words[0], '--supervisor', *words[1:], '--out', out)


def refine(home, out, *words):
    return w2s(
        'refine',
        '--questions',
        home / 'weak.jsonl',
        '--strong',
        'nano',
        '--max-tokens',
        8,
        '--import',
        home / words[0],
        '--method',
        *words[1:],
        '--out',
        out,
    )


def said(done):
    assert isinstance(done.exception, ConfigError), done.exception
    return str(done.exception)


def ran(done):
    assert done.exit_code == 0, done.exception
    return done.output


def probs(path):
    return load_dataset('parquet', data_files=str(path), split='train', cache_dir=str(path.parent / 'cache')).to_pandas().set_index('id')


# What works

@pytest.mark.parametrize('name, kind', [('shorter', 'labeller'), ('brief', 'judge')])
@pytest.mark.parametrize('train', [True, False])
def test_own_labels(home, tmp_path, name, kind, train):
    "A labeller or a judge without a model labels a file; labelled pairs serve to measure it"
    out = tmp_path/'o.parquet'
    printed = ran(
        label(home, out, 'good.py', f'{name}(scale=10)', *(('--train', home / 'train_gt.jsonl', '--calibrate', '.9') if train else ()))
    )
    rows, known = probs(out), json.loads(out.with_suffix('.json').read_text())
    assert len(rows) == 30 and all(len(r.chosen) <= len(r.rejected) for r in rows.itertuples())
    assert (
        known['supervisor'] == f'{name}(scale=10)' and known['trained_on'] == 0 and known['models'] == [] and f'written: {out}' in printed
    )
    assert (known['held_out'] > 0) == train
    kept = {p.name for p in (tmp_path/'o.work'/'extensions').iterdir()}
    assert 'good.py' in kept and f'{kind}-{name}.txt' in kept | {f'labeller-{name}.txt'} and 'extensions.json' in kept


def test_judge_and_labeller_agree(home, tmp_path):
    "The same rule, once as a labeller and once as a judge: the same labels"
    for name in ('shorter', 'brief'): ran(label(home, tmp_path/f'{name}.parquet', 'good.py', name))
    assert probs(tmp_path/'shorter.parquet').equals(probs(tmp_path/'brief.parquet'))


def test_changed_body_labels_anew(home, tmp_path):
    "What a function does is part of the stage, not its name"
    (tmp_path/'mine.py').write_text(GOOD)
    ran(
        w2s(
            'label',
            '--rows',
            home / 'train_w2s.jsonl',
            '--import',
            tmp_path / 'mine.py',
            '--supervisor',
            'shorter',
            '--out',
            tmp_path / 'a.parquet',
            '--work',
            tmp_path / 'work',
        )
    )
    before = probs(tmp_path/'a.parquet')
    (tmp_path/'mine.py').write_text(GOOD.replace('-len(t)/scale for t in p', 'len(t)/scale for t in p'))
    ran(
        w2s(
            'label',
            '--rows',
            home / 'train_w2s.jsonl',
            '--import',
            tmp_path / 'mine.py',
            '--supervisor',
            'shorter',
            '--out',
            tmp_path / 'b.parquet',
            '--work',
            tmp_path / 'work',
        )
    )
    assert (probs(tmp_path/'b.parquet').chosen == before.rejected).mean() > .8


def test_built_in_labeller_without_a_model(home, tmp_path):
    "length needs no file"
    ran(w2s('label', '--rows', home/'train_w2s.jsonl', '--supervisor', 'length', '--out', tmp_path/'o.parquet'))
    assert all(len(r.chosen) >= len(r.rejected) for r in probs(tmp_path/'o.parquet').itertuples())


@pytest.mark.parametrize('name', ['shout', 'alone'])
def test_own_refining(home, tmp_path, name):
    "A method that changes the weak answers, and one that only asks the strong model"
    out = tmp_path/'r.jsonl'
    ran(refine(home, out, 'good.py', name))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {r['source'] for r in rows} == {f'{name}:nano'} and ('weak_answer' in rows[0]) == (name == 'shout')
    if name == 'shout': assert all(r['completion'].strip() == r['weak_answer'].upper() for r in rows) and len(rows) == 8
    assert (tmp_path/'r.work'/'extensions'/f'method-{name}.txt').exists()


# What is refused

@pytest.mark.parametrize(
    'words, part',
    [
        (('good.py', 'shortr'), 'did you mean "shorter"'),
        (('good.py', 'breif'), 'did you mean "brief"'),
        (('good.py', 'shorter(scal=3)'), 'no use for option "scal"'),
        (('good.py', 'shorter', '--model', 'pico'), 'leave out --model'),
        (('good.py', 'dpo'), 'give --model'),
        (('goood.py', 'shorter'), 'did you mean "good.py"'),
        (('bad.py', 'flat'), 'labeller "flat"'),
        (('bad.py', 'hole'), 'returned [nan nan] for row 1'),
        (('bad.py', 'mute'), 'returned nothing'),
        (('bad.py', 'flat-judge'), 'judge "flat-judge"'),
        (('bad.py', 'hole-judge'), 'returned inf for row 1'),
    ],
)
def test_labels_that_cannot_be(home, tmp_path, words, part):
    assert part in said(label(home, tmp_path/'o.parquet', *words))
    assert not (tmp_path/'o.parquet').exists()


@pytest.mark.parametrize(
    'words, part',
    [
        (('good.py', 'shuot'), 'did you mean "shout"'),
        (('good.py', 'shout(x=1)'), 'no use for option "x"'),
        (('good.py', 'shout', '--examples', 2), 'examples does nothing'),
        (('good.py', 'naive'), 'unknown method'),
        (('bad.py', 'fewer'), 'returned 7 texts'),
        (('bad.py', 'numbers'), 'for row 1'),
        (('bad.py', 'nothing'), 'returned nothing'),
        (('bad.py', 'fails'), 'fails in line'),
    ],
)
def test_answers_that_cannot_be(home, tmp_path, words, part):
    assert part in said(refine(home, tmp_path/'r.jsonl', *words))
    assert not (tmp_path/'r.jsonl').exists()


# Settings and flags

@pytest.mark.parametrize('command, cls', [('label', LabelJob), ('refine', RefineJob)])
def test_every_field_has_its_flag(command, cls):
    "With its comment as help and its default behind it"
    shown = ' '.join(CliRunner().invoke(app, [command, '--help'], env={'COLUMNS': '300'}).output.split())
    assert {p.partition('.')[0] for o in options_of(cls) for p in o.paths} == {f.name for f in fields(cls)}
    for o in options_of(cls): assert f'--{o.flag} ' in shown, o.flag
    assert '--import ' in shown and '--config ' in shown


def test_python_equals_the_command(home, tmp_path):
    "No default lives in a command alone"
    assert RefineJob('q.csv', strong='scholar') == fill_refine(dict(questions='q.csv'))
    assert RefineJob('q.csv').max_tokens == 48 and RefineJob('q.csv', strong='./mine').max_tokens == 256
    dry = ran(
        w2s(
            'label',
            '--model',
            'pico',
            '--rows',
            home / 'train_w2s.jsonl',
            '--train',
            home / 'train_gt.jsonl',
            '--batch-size',
            4,
            '--out',
            tmp_path / 'o.parquet',
            '--dry-run',
        )
    )
    assert 'batch_size = 4' in dry and f'beta = {label_settings("pico").beta}' in dry


def test_settings_of_a_report_are_a_configuration(home, tmp_path):
    "What a dry run prints can be given again"
    words = ('refine', '--questions', home/'weak.jsonl', '--strong', 'nano', '--examples', 2, '--dry-run')
    first = ran(w2s(*words))
    settings = takewhile(lambda line: re.fullmatch(r'|\[\w+\]|\w+ = .*', line), first.splitlines())
    (tmp_path/'again.toml').write_text('\n'.join(settings))
    assert ran(w2s('refine', '--config', tmp_path/'again.toml', '--dry-run')) == first
