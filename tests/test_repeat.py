"""A finished command given again prints the same in a moment, loads nothing and touches nothing; whatever its answer rests on is looked at,
and a change of any of it starts the run"""
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

from w2s.cli import repeat
from w2s.cli.app import app
from w2s.cli.repeat import answer_file
from w2s.compare import stages
from w2s.data.samples import sample_preferences, write_samples
from w2s.io.manifests import INCOMPLETE
from w2s.models.tiny import tiny_model

ROOT = Path(__file__).parents[1]
HEAVY = [
    'torch',
    'transformers',
    'datasets',
    'peft',
    'accelerate',
    'bitsandbytes',
    'pandas',
    'pyarrow',
    'matplotlib',
    'seaborn',
    'sklearn',
    'scipy',
]
TOML = '''
data = "{home}/data"
strong = "{home}/strong"
imports = ["{home}/mine.py"]
supervisor = "mine"
n_labelled = 24
n_unlabelled = 24
n_test = 12
others = []
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2}}
sft = {{batch_size = 8, epochs = 1, token_budget = 300}}
dpo = {{batch_size = 8, epochs = 1, token_budget = 300}}
'''
MINE = '''
from helper import slope
from w2s.compare.extensions import labeller, metric

@labeller('mine')
def mine(response_a, response_b):
    return [[slope*len(a), slope*len(b)] for a, b in zip(response_a, response_b)]
'''


class Ran(Exception):
    "Thrown instead of a run"


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Rows, two models, a labeller of the user with a helper beside it, settings, and a finished run"
    home = tmp_path_factory.mktemp('repeat')
    write_samples(home/'data', 70, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(70, seed=4)]
    tiny_model(home/'weak', texts, layers=1, seed=1)
    tiny_model(home/'strong', texts, layers=2, seed=2)
    (home/'mine.py').write_text(MINE)
    (home/'helper.py').write_text('slope = 1.\n')
    (home/'run.toml').write_text(TOML.format(home=home), encoding='utf-8')
    with pytest.MonkeyPatch.context() as m:
        m.setenv('XDG_CACHE_HOME', str(home/'cache'))
        yield home
    sys.modules.pop('helper', None)


@pytest.fixture(scope='module')
def first(home):
    "What the run printed"
    done = w2s(home)
    assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)
    assert answer_file(home/'run').is_file()
    return done.output


def words(home, *more): return ['run', 'preferences', '--config', str(home/'run.toml'), '--out', str(home/'run'), *more]
def w2s(home, *more): return CliRunner().invoke(app, words(home, *more), env={'COLUMNS': '2000'})


def runs(home, *more):
    "Is the long way taken?"
    def run(*a, **k): raise Ran
    with pytest.MonkeyPatch.context() as m:
        m.setattr('w2s.experiments.preferences.run', run)
        done = w2s(home, *more)
    assert isinstance(done.exception, Ran) or done.exit_code == 0, repr(done.exception)
    return isinstance(done.exception, Ran)


def looks(folder):
    return {str(p.relative_to(folder)): (s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for p in sorted(folder.rglob('*')) for s in [p.lstat()]}


def test_the_answer_comes_without_libraries_and_nothing_is_touched(home, first):
    before, cache = looks(home/'run'), looks(home/'cache')
    code = f'''import sys
from w2s.cli.app import main
try: main()
finally: print(*(m for m in {HEAVY!r} + ["w2s.compare.stages", "w2s.experiments"] if m in sys.modules), file=sys.stderr)'''
    done = subprocess.run(
        [sys.executable, '-c', code, *words(home)],
        capture_output=True,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '2000'},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == first.replace(': starting', ': found') and done.stdout.count(': found') > 5
    assert done.stderr.split() == []
    assert looks(home/'run') == before and looks(home/'cache') == cache


def change_text(name, old, new):
    def change(home): (home/name).write_text((home/name).read_text().replace(old, new, 1))
    return change


def flip(pattern):
    "One bit of one file, of the same size and with its old times"
    def change(home):
        file = sorted((home/'run').glob(pattern))[0]
        data, s = file.read_bytes(), file.stat()
        file.write_bytes(data[:len(data)//2] + bytes([data[len(data)//2] ^ 1]) + data[len(data)//2 + 1:])
        os.utime(file, ns=(s.st_atime_ns, s.st_mtime_ns))
    return change


def remove(pattern):
    def change(home):
        found = sorted((home/'run').glob(pattern))[0]
        shutil.rmtree(found) if found.is_dir() else found.unlink()
    return change


def add(name): return lambda home: (home/name).parent.mkdir(exist_ok=True) or (home/name).write_text('{}\n')


CHANGES = { # what -> how
    'a row': lambda home: change_text(sorted((home / 'data').glob('*'))[0].relative_to(home), 'e', 'a')(home),
    'another file of rows': add('data/more/val.jsonl'),
    'one file of rows less': lambda home: sorted((home / 'data').glob('*'))[0].unlink(),
    'weights of a model': lambda home: (home / 'strong' / 'model.safetensors').write_bytes(
        (home / 'weak' / 'model.safetensors').read_bytes()
    ),
    'configuration of a model': change_text('strong/config.json', '}', ' }'),
    'a chat template that is new': add('strong/chat_template.jinja'),
    'a setting in the file': change_text('run.toml', 'rank = 2', 'rank = 3'),
    'the body of a function': change_text('mine.py', 'slope*len(b)', 'slope*len(b) + 1'),
    'what is beside it in its file': change_text('mine.py', 'labeller, metric', 'metric, labeller'),
    'a bit of an adapter': flip('stages/*/adapter/adapter_model.safetensors'),
    'a bit of scores': flip('stages/*-test-*/scores.parquet'),
    'a bit of a table': flip('items.parquet'),
    'a bit of the exported adapter': flip('adapters/*/adapter_model.safetensors'),
    'the manifest': flip('manifest.json'),
    'the manifest of a stage': flip('stages/*/manifest.json'),
    'the list of stages': flip('.run.json'),
    'kept log-probs': flip('store/*/key.json'),
    'the date of templates': change_text('run/.day', '2', '1'),
    'the report': change_text('run/report.md', '#', '##'),
    'a stage': remove('stages/*-sft-*'),
    'a figure': remove('figure.png'),
    'everything': lambda home: shutil.rmtree(home / 'run'),
    'a run at work': add(f'run/{INCOMPLETE}'),
    'what a kill has left in a stage': lambda home: add(
        f'run/stages/{sorted((home / "run" / "stages").glob("*-dpo-*"))[0].name}/checkpoints/x'
    )(home),
    'the kept answer': lambda home: answer_file(home / 'run').write_bytes(
        answer_file(home / 'run').read_bytes().replace(b'test rows', b'rest rows')
    ),
}


@pytest.mark.cases(11)
@pytest.mark.parametrize('what', CHANGES)
def test_a_change_starts_the_run(home, first, tmp_path, what):
    shutil.copytree(home, tmp_path/'as it was', symlinks=True)
    assert not runs(home)
    try:
        CHANGES[what](home)
        assert runs(home), f'a change of {what} was not noticed'
    finally:
        for path in home.iterdir(): shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(tmp_path/'as it was', home, dirs_exist_ok=True)
    assert not runs(home) # every file is another one now, with the same content


SURROUNDINGS = {
    'code of w2s': ('code_hash', lambda: 'another'),
    'a library': ('_version', lambda package: '0'),
    'the machine': ('platform.node', lambda: 'another'),
    'Python': ('sys.version', '3.99'),
}


@pytest.mark.parametrize('what', SURROUNDINGS)
def test_other_surroundings_start_the_run(home, first, monkeypatch, what):
    assert not runs(home)
    name, value = SURROUNDINGS[what]
    monkeypatch.setattr(f'w2s.cli.repeat.{name}', value)
    assert runs(home)


@pytest.mark.parametrize('more', [('--beta', '0.3'), ('--seeds', '2'), ('--keep-stages',), ('--n-test', '11'), ('--strict',)])
def test_other_words_start_the_run(home, first, more):
    assert runs(home, *more) and not runs(home)


@pytest.mark.parametrize('name, value', [('HF_HUB_OFFLINE', '0'), ('CUDA_VISIBLE_DEVICES', '1')])
def test_variables_that_libraries_heed_start_the_run(home, first, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert runs(home)


def test_a_damaged_stage_is_made_anew_and_the_answer_is_kept_again(home, first):
    flip('stages/weak-seed0-labels-*/rewards.npy')(home)
    done = w2s(home)
    assert done.exit_code == 0 and 'weak-seed0-labels: DAMAGED' in done.output
    assert not runs(home) and w2s(home).output == first.replace(': starting', ': found')


def test_a_dry_run_is_a_dry_run(home, first):
    done = w2s(home, '--dry-run')
    assert done.exit_code == 0 and ' minutes' in done.output and done.output != first.replace(': starting', ': found')
    assert not runs(home)


@pytest.mark.parametrize('source', ['somebody/rows', 'imdb', 'a-task'])
def test_what_cannot_be_looked_at_is_always_asked_anew(tmp_path, source):
    assert repeat.input_places({'data': source}, [], [source]) is None


def test_too_many_files_are_too_many(tmp_path, monkeypatch):
    for i in range(4): (tmp_path/str(i)).touch()
    assert len(repeat.list_states([tmp_path])) == 4
    monkeypatch.setattr(repeat, 'MOST', 3)
    assert repeat.list_states([tmp_path]) is None


def test_names_are_those_of_the_stages():
    "They are written down twice, because the other place needs PyTorch"
    assert {stages.DAY, stages.RUN, stages.MODELS} <= set(repeat.BESIDE)
    line = []
    stages.say_numbered(line.append, 22)('weak-seed0-sft: was made by torch 1 (now 2), made anew')
    assert repeat.lines_again(line) == ['[ 1/22] weak-seed0-sft: found']


def test_a_cache_that_cannot_be_written_is_no_fault(home, first, monkeypatch):
    monkeypatch.setattr(repeat, 'write_manifest', lambda *a: (_ for _ in ()).throw(PermissionError(13, 'denied')))
    question = repeat.ask_question('x', SettingsOf(), home/'run', [], ['world'])
    assert repeat.keep_answer(question, {}, repeat.question_key(question), 'text') is False


@dataclass
class SettingsOf:
    data: str = 'world'


def test_answers_of_runs_that_are_gone_are_forgotten(home, first, tmp_path):
    folder = answer_file(home/'run').parent
    old = json.loads(answer_file(home/'run').read_text())
    repeat.write_manifest(folder/'gone.json', old['files'], {**old['made'], 'out': str(tmp_path/'gone')})
    (folder/'torn.json').write_text('{')
    repeat._forget(folder)
    assert [p.name for p in folder.iterdir()] == [answer_file(home/'run').name]


# --- jobs that write a file

JOBS = {
    'label': 'label --rows pairs.jsonl --train train.jsonl --model weak --quantize none --dtype float32 --out out/labels.parquet',
    'refine': 'refine --questions questions.csv --weak-answers answers.csv --strong strong --method ask-to-improve '
              '--quantize none --dtype float32 --max-tokens 8 --out out/refined.jsonl',
}


@pytest.fixture(scope='module', params=JOBS)
def job(home, request, tmp_path_factory):
    "A folder with rows and models, the words of a job, and what it printed"
    folder = tmp_path_factory.mktemp('job')
    pairs = [json.dumps({k: r[k] for k in ('prompt', 'chosen', 'rejected')}) for r in sample_preferences(40, seed=8)]
    (folder/'pairs.jsonl').write_text('\n'.join(pairs[:8]) + '\n')
    (folder/'train.jsonl').write_text('\n'.join(pairs[8:]) + '\n')
    (folder/'questions.csv').write_text('id,question\na,Where is the fox?\nb,What does the owl do?\n')
    (folder/'answers.csv').write_text('id,question,answer\na,Where is the fox?,By the river.\nb,What does the owl do?,It sleeps.\n')
    for name in ('weak', 'strong'): shutil.copytree(home/name, folder/name)
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        done = CliRunner().invoke(app, JOBS[request.param].split())
        assert done.exit_code == 0, done.output + repr(done.exception)
        yield folder, request.param, done.output


def job_runs(name):
    "Is the long way taken?"
    def run(*a, **k): raise Ran
    with pytest.MonkeyPatch.context() as m:
        m.setattr('w2s.files.label.label', run)
        m.setattr('w2s.files.refine.refine_file', run)
        done = CliRunner().invoke(app, JOBS[name].split())
    assert isinstance(done.exception, Ran) or done.exit_code == 0, repr(done.exception)
    return isinstance(done.exception, Ran)


def test_a_finished_job_answers_without_libraries(job):
    folder, name, said = job
    before = looks(folder)
    code = f'''import sys
from w2s.cli.app import main
try: main()
finally: print(*(m for m in {HEAVY!r} if m in sys.modules), file=sys.stderr)'''
    done = subprocess.run([sys.executable, '-c', code, *JOBS[name].split()], capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'PYTHONPATH': str(ROOT), 'COLUMNS': '2000'})
    # which methods there are is known only when they are loaded
    assert done.returncode == 0 and (name == 'refine' or done.stderr.split() == []), done.stderr
    assert done.stdout.splitlines()[-1] == said.splitlines()[-1] and 'written: ' in done.stdout
    assert looks(folder) == before


@pytest.mark.parametrize('what', ['input', 'result', 'report', 'stage', 'model', 'gone'])
def test_a_change_starts_the_job(job, what):
    folder, name, _ = job
    out = next((folder/'out').glob('*.parquet' if name == 'label' else '*.jsonl'))
    file = {
        'input': folder/('pairs.jsonl' if name == 'label' else 'answers.csv'),
        'result': out,
        'report': out.with_suffix('.md'),
        'stage': next(p for p in (folder/'out').glob('*.work/stages/*/*') if p.name != 'manifest.json'),
        'model': folder/('weak' if name == 'label' else 'strong')/'generation_config.json',
        'gone': out.with_suffix('.json'),
    }[what]
    assert not job_runs(name)
    kept, times = file.read_bytes(), file.stat()
    try:
        file.unlink()
        if what == 'model': file.write_bytes(kept + b'\n') # other bytes that are read without a fault
        elif what != 'gone': file.write_bytes(bytes([kept[0] ^ 1]) + kept[1:])
        assert job_runs(name)
    finally:
        file.write_bytes(kept)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not job_runs(name)
