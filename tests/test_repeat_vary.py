"""A finished variation given again prints the same in a moment, loads nothing and touches nothing; a change of anything that any of its
values rests on starts it"""
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_repeat import HEAVY, ROOT, Ran, add, change_text, flip, looks, remove
from typer.testing import CliRunner

from w2s.cli import repeat
from w2s.cli.app import app
from w2s.cli.repeat import answer_file
from w2s.compare.label_settings import Classify
from w2s.compare.variations import result_prefix
from w2s.data.samples import sample_preferences, write_samples
from w2s.io.manifests import INCOMPLETE
from w2s.models.tiny import tiny_model
from w2s.report.varied import file_name

TOML = '''
data = "{home}/data"
strong = "{home}/strong"
imports = ["{home}/own.py"]
supervisor = "own"
n_labelled = 16
n_unlabelled = 16
n_test = 12
seeds = 1
others = []
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2}}
sft = {{batch_size = 8, epochs = 1, token_budget = 300}}
dpo = {{batch_size = 8, epochs = 1, token_budget = 300}}
'''
OWN = '''
from w2s.compare.extensions import labeller

@labeller('own')
def own(response_a, response_b):
    return [[len(a), len(b)] for a, b in zip(response_a, response_b)]
'''
VARIED = ['--vary', 'beta', '--values', '.5,2']


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Rows, two students, a labeller of the user, and settings"
    home = tmp_path_factory.mktemp('repeat_vary')
    write_samples(home/'data', 60, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(60, seed=4)]
    for name, seed in (('strong', 2), ('other', 3)): tiny_model(home/name, texts, layers=1, seed=seed)
    (home/'own.py').write_text(OWN)
    (home/'run.toml').write_text(TOML.format(home=home), encoding='utf-8')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(home/'cache'))
        yield home


def words(home, *more): return ['run', 'preferences', '--config', str(home/'run.toml'), '--out', str(home/'run'), *more]
def w2s(home, *more): return CliRunner().invoke(app, words(home, *more), env={'COLUMNS': '2000'})


@pytest.fixture(scope='module')
def first(home):
    "What the variation printed"
    done = w2s(home, *VARIED)
    assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)
    assert answer_file(home/'run').is_file()
    return done.output


def runs(home, *more):
    "Is the long way taken?"
    def run(*a, **k): raise Ran
    with pytest.MonkeyPatch.context() as m:
        m.setattr('w2s.experiments.vary.run_varied', run)
        m.setattr('w2s.experiments.preferences.run', run)
        done = w2s(home, *more)
    assert isinstance(done.exception, Ran) or done.exit_code == 0, repr(done.exception)
    return isinstance(done.exception, Ran)


def test_the_answer_comes_without_libraries_and_nothing_is_touched(home, first):
    before, cache = looks(home/'run'), looks(home/'cache')
    code = f'''import sys
from w2s.cli.app import main
try: main()
finally: print(*(m for m in {HEAVY!r} + ["w2s.compare.stages", "w2s.experiments"] if m in sys.modules), file=sys.stderr)'''
    done = subprocess.run(
        [sys.executable, '-c', code, *words(home, *VARIED)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '2000'},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == first.replace(': starting', ': found') and done.stdout.count(': found') > 4 and 'written to' in done.stdout
    assert done.stderr.split() == []
    assert looks(home/'run') == before and looks(home/'cache') == cache


CHANGES = { # what -> how
    'a row': lambda home: change_text(sorted((home / 'data').glob('*'))[0].relative_to(home), 'e', 'a')(home),
    'another file of rows': add('data/more/val.jsonl'),
    'weights of a model': lambda home: shutil.copy(home / 'other' / 'model.safetensors', home / 'strong' / 'model.safetensors'),
    'a setting in the file': change_text('run.toml', 'rank = 2', 'rank = 3'),
    'the body of a function': change_text('own.py', 'len(b)]', 'len(b) + 1]'),
    'a bit of an adapter': flip('stages/*/adapter/adapter_model.safetensors'),
    'a bit of scores': flip('stages/*-test-*/scores.parquet'),
    'a bit of a table': flip('beta-items.parquet'),
    'the manifest': flip('beta-manifest.json'),
    'the manifest of a stage': flip('stages/*/manifest.json'),
    'the list of stages': flip('.run.json'),
    'kept log-probs': flip('store/*/key.json'),
    'the page': change_text('run/beta.md', '#', '##'),
    'a stage of one value': lambda home: shutil.rmtree(sorted((home / 'run' / 'stages').glob('student-seed0-dpo-*'))[-1]),
    'a figure': remove('beta.png'),
    'everything': lambda home: shutil.rmtree(home / 'run'),
    'a run at work': add(f'run/{INCOMPLETE}'),
    'the kept answer': lambda home: answer_file(home / 'run').write_bytes(
        answer_file(home / 'run').read_bytes().replace(b'labels agree', b'labels argue')
    ),
}


@pytest.mark.cases(15)
@pytest.mark.parametrize('what', CHANGES)
def test_a_change_starts_the_variation(home, first, tmp_path, what):
    shutil.copytree(home, tmp_path/'as it was', symlinks=True)
    assert not runs(home, *VARIED)
    try:
        CHANGES[what](home)
        assert runs(home, *VARIED), f'a change of {what} was not noticed'
    finally:
        for path in home.iterdir(): shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(tmp_path/'as it was', home, dirs_exist_ok=True)
    assert not runs(home, *VARIED)


@pytest.mark.parametrize('more', [
    ('--vary', 'beta', '--values', '2,.5'), # the same results, in another order
    ('--vary', 'beta', '--values', '.5,2,1'),
    ('--vary', 'beta', '--values', '.5,2.5'),
    ('--vary', 'dpo.epochs', '--values', '1,2'),
    (*VARIED, '--seeds', '2'),
    (*VARIED, '--keep-stages'),
    (),
])
def test_other_words_start_the_variation(home, first, more):
    assert runs(home, *more) and not runs(home, *VARIED)


def test_other_surroundings_start_the_variation(home, first, monkeypatch):
    monkeypatch.setattr(repeat, 'code_hash', lambda: 'another')
    assert runs(home, *VARIED)


def test_a_dry_run_is_a_dry_run(home, first):
    done = w2s(home, *VARIED, '--dry-run')
    assert done.exit_code == 0 and ' min on this machine' in done.output and ': found' not in done.output
    assert not runs(home, *VARIED)


def test_a_value_is_looked_at_like_a_setting(home, tmp_path):
    "A student that only a value names"
    place = tmp_path/'run'
    varied = ['--vary', 'student', '--values', f'{home}/strong,{home}/other', '--out', str(place)]
    assert w2s(home, *varied).exit_code == 0
    assert not runs(home, *varied)
    weights = home/'other'/'model.safetensors'
    kept = weights.read_bytes()
    try:
        weights.write_bytes((home/'strong'/'model.safetensors').read_bytes())
        assert runs(home, *varied)
    finally: weights.write_bytes(kept)
    assert not runs(home, *varied)


@pytest.mark.parametrize('setting', ['n_labelled', 'student.batch_size', '--lr'])
def test_the_manifest_is_looked_for_where_it_is_written(setting):
    "Of kinds of feedback other than preferences, whose manifest the tests above find"
    assert result_prefix(setting, Classify) == f'{file_name(SimpleNamespace(setting=setting))}-'
