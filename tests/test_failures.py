"Every failure of a command is one sentence: what, where, what to do; no traceback, no litter, and the same command goes on"
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from w2s.cli import guard as cli_guard
from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup, end_of
from w2s.errors import ConfigError
from w2s.io.disk import CAUSES, failure_text, find_litter
from w2s.io.manifests import INCOMPLETE

ROOT = Path(__file__).parents[1]
SMALL = (
    'run',
    'preferences',
    '--weak',
    'pico',
    '--strong',
    'pico',
    '--n-labelled',
    '8',
    '--n-unlabelled',
    '8',
    '--n-test',
    '6',
    '--seeds',
    '1',
    '--samples',
    '1',
    '--response-tokens',
    '32',
)


@pytest.fixture(autouse=True)
def guarded(monkeypatch): monkeypatch.setattr(app.info, 'cls', GuardedGroup)


def w2s(*words):
    "A command in this process: its exit status, and what it said"
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def sentence(said):
    "The one line that begins with error"
    lines = [line for line in said.splitlines() if line.startswith('error: ')]
    assert len(lines) == 1 and 'Traceback' not in said and 'Aborted' not in said, said
    return lines[0]


# The disk

WRITERS = { # how a library says that the disk is full
    'python': OSError(errno.ENOSPC, 'No space left on device'),
    'safetensors': RuntimeError('Error while serializing: I/O error: No space left on device (os error 28)'),
    'torch, closing': RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 48000 vs 47888'),
    'torch': RuntimeError('PytorchStreamWriter failed writing file data/0: file write failed'),
    'quota': OSError(errno.EDQUOT, 'Disk quota exceeded'),
    'read-only': OSError(errno.EROFS, 'Read-only file system'),
    'broken disk': OSError(errno.EIO, 'Input/output error'),
}


PLACES = (
    'w2s.train.checkpoints.save_file',
    'w2s.train.checkpoints.torch.save',
    'w2s.models.adapters.save_head',
    'w2s.train.reference.write_atomic',
    'w2s.report.folder.write_parquet',
)


@pytest.mark.cases(1)
@pytest.mark.parametrize('writer, place', [*((w, PLACES[0]) for w in WRITERS), *(('torch', p) for p in PLACES[1:])])
def test_a_disk_that_refuses_is_named_and_the_same_command_goes_on(tmp_path, monkeypatch, writer, place):
    out = tmp_path/'run'
    with monkeypatch.context() as m:
        def full(*a, **k): raise WRITERS[writer]
        m.setattr(place, full)
        status, said = w2s(*SMALL, '--out', out)
    line = sentence(said)
    assert status == 1 and any(cause in line for cause in CAUSES.values()) and str(out) in line
    assert (out/INCOMPLETE).exists()
    if (place, writer) not in (('w2s.train.checkpoints.save_file', 'python'), ('w2s.report.folder.write_parquet', 'torch')): return
    assert w2s(*SMALL, '--out', out)[0] == 0 and not (out/INCOMPLETE).exists()
    assert find_litter(out) == []


@pytest.mark.parametrize('what', ['a file', 'below a file', 'a name too long', 'a folder for a file'])
def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch, what):
    "Before any model is known or row is read"
    (tmp_path/'file').write_text('mine')
    (tmp_path/'folder.parquet').mkdir()
    for name in ('rows.jsonl', 't.jsonl'): (tmp_path/name).write_text('')
    for user in ('files.label', 'compare.preference_arms'): # a module that is loaded meanwhile would keep what is put in its place
        monkeypatch.setattr(f'w2s.{user}.know_model', None)
    place = {'a file': 'file', 'below a file': 'file/run', 'a name too long': 'x'*300, 'a folder for a file': 'folder.parquet'}[what]
    words = (
        ('label', '--model', 'pico', '--rows', tmp_path / 'rows.jsonl', '--train', tmp_path / 't.jsonl')
        if what == 'a folder for a file'
        else SMALL
    )
    status, said = w2s(*words, '--out', tmp_path/place)
    assert status == 1 and place.split('/')[0][:50] in sentence(said)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ['file', 'folder.parquet', 'rows.jsonl', 't.jsonl']
        and (tmp_path / 'file').read_text() == 'mine'
    )


@pytest.mark.skipif(os.name == 'nt' or os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_permission_is_refused_at_once(tmp_path):
    tmp_path.chmod(0o500)
    try: status, said = w2s(*SMALL, '--out', tmp_path/'run')
    finally: tmp_path.chmod(0o700)
    assert status == 1 and 'permissions' in sentence(said)


@pytest.mark.parametrize('name', ['labels.parquet', 'labels.md', 'labels.json'])
def test_files_beside_the_labels_are_not_written_over(tmp_path, name):
    (tmp_path/name).write_text('mine')
    for rows in ('rows.jsonl', 't.jsonl'): (tmp_path/rows).write_text('')
    status, said = w2s(
        'label', '--model', 'pico', '--rows', tmp_path / 'rows.jsonl', '--train', tmp_path / 't.jsonl', '--out', tmp_path / 'labels.parquet'
    )
    assert status == 1 and f'{name} is there' in sentence(said) and (tmp_path/name).read_text() == 'mine'


# Exceptions of all kinds

@pytest.mark.parametrize(
    'error',
    [
        MemoryError(),
        EOFError(),
        RecursionError('maximum recursion depth exceeded'),
        KeyError('hinge'),
        UnicodeEncodeError('ascii', 'ü', 0, 1, 'no'),
        OSError(errno.EMFILE, 'Too many open files'),
        FileNotFoundError(errno.ENOENT, 'No such file or directory', 'x.json'),
        AssertionError(),
        OverflowError('too large'),
    ],
    ids=repr,
)
def test_no_exception_is_a_traceback(monkeypatch, error):
    def breaks(*a, **k): raise error
    monkeypatch.setattr('w2s.cli.flags.make_settings', breaks)
    status, said = w2s(*SMALL)
    line = sentence(said)
    assert status in (1, 70) and len(line) < 500
    assert (status == 70) == ('This is a fault of w2s' in line) == (failure_text(error) == '')


def test_the_place_of_a_fault_is_named_and_the_traceback_can_be_had(monkeypatch):
    def breaks(*a, **k): raise KeyError('hinge')
    monkeypatch.setattr('w2s.compare.settings.check_shared', breaks)
    status, said = w2s(*SMALL)
    assert status == 70 and 'w2s/compare/settings.py, line ' in sentence(said)
    monkeypatch.setenv('W2S_TRACEBACK', '1')
    assert 'Traceback' in w2s(*SMALL)[1]


def test_what_the_user_types_wrong_is_no_fault():
    assert w2s('run', 'weak-teachr')[0] == 2 and w2s('run', 'preferences', '--bta', '1')[0] == 2
    assert w2s(*SMALL, '--seeds', '0') == (1, 'error: seeds is 0; it must be at least 1\n')


# Numbers that are none

NOT_NUMBERS = [
    ('run', 'preferences', '--beta', 'nan'),
    ('run', 'preferences', '--beta', 'inf'),
    ('run', 'preferences', '--sft-lr', 'nan'),
    ('run', 'preferences', '--dpo-lr', 'inf'),
    ('run', 'preferences', '--temperature', 'nan'),
    ('run', 'preferences', '--label-share', 'nan'),
    ('run', 'preferences', '--smoothing', 'nan', '--loss', 'cdpo'),
    ('run', 'safety', '--lr', 'nan'),
    ('run', 'safety', '--lr', 'inf'),
    ('run', 'safety', '--validate', 'nan'),
    ('run', 'safety', '--label-share', 'nan'),
    ('run', 'persona', '--lr', 'nan'),
    ('run', 'toxicity', '--lr', 'nan'),
    ('run', 'toxicity', '--beta', 'inf'),
    ('label', '--model', 'pico', '--rows', 'r.jsonl', '--train', 't.jsonl', '--out', 'o.parquet', '--beta', 'nan'),
    ('label', '--model', 'pico', '--rows', 'r.jsonl', '--train', 't.jsonl', '--out', 'o.parquet', '--calibrate', 'nan'),
    ('refine', '--questions', 'q.jsonl', '--out', 'o.jsonl', '--method', 'resampled', '--temperature', 'nan'),
]


@pytest.mark.parametrize('words', NOT_NUMBERS, ids=' '.join)
def test_a_setting_that_is_no_number_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = ['q.jsonl', 'r.jsonl', 't.jsonl']
    for name in files: (tmp_path/name).write_text('')
    status, said = w2s(*words)
    assert status == 1 and any(word in sentence(said) for word in ('nan', 'inf'))
    assert sorted(p.name for p in tmp_path.iterdir()) == files


# Files of settings

BROKEN = {
    'latin-1': 'data = "größe"'.encode('latin-1'),
    'not TOML': b'data = pairs',
    'deep': b'a = ' + b'[' * 100_000,
    'zeros': bytes(100),
    'a table for a number': b'[seeds]\nx = 1',
    'nan': b'beta = nan',
    'unknown': b'bta = 1',
    'list': b'seeds = [1]',
}


@pytest.mark.parametrize('kind', BROKEN)
@pytest.mark.parametrize('command', ['weak-teacher', 'safety', 'persona', 'toxicity'])
def test_a_broken_file_of_settings_is_one_sentence(tmp_path, kind, command):
    (tmp_path/'run.toml').write_bytes(BROKEN[kind])
    status, said = w2s('run', command, '--config', tmp_path/'run.toml', '--out', tmp_path/'run')
    assert status == 1 and len(sentence(said)) < 600 and not (tmp_path/'run').exists()


@pytest.mark.parametrize('place', ['nowhere.toml', '.'])
def test_a_missing_file_of_settings_is_one_sentence(tmp_path, place):
    assert 'no configuration file' in sentence(w2s('run', 'preferences', '--config', tmp_path/place, '--out', tmp_path/'run')[1])


# Streams and signals

PROGRAM = 'from w2s.cli.app import main; main()'


def start(*words, **env):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1', **env}
    return subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', PROGRAM, *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.cases(1)
@pytest.mark.parametrize('env', [dict(PYTHONIOENCODING='ascii'), dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')], ids=str)
def test_a_terminal_that_cannot_write_a_character_ends_nothing(tmp_path, env):
    out = tmp_path/'größe'
    process = start(*SMALL, '--out', os.fsencode(out).decode('utf-8'), **env)
    said, told = process.communicate()
    assert process.returncode == 0, told.decode()[-2000:]
    assert (out/'report.md').read_text(encoding='utf-8').startswith('# pico teaches pico') and (out/'items.parquet').is_file()


@pytest.mark.cases(1)
@pytest.mark.parametrize('name, status', [('SIGTERM', 143), ('SIGINT', 130)])
def test_a_signal_is_answered_with_how_to_go_on(tmp_path, name, status):
    import signal
    import time
    process = start(*SMALL, '--n-labelled', '100', '--n-unlabelled', '100', '--out', tmp_path/'run')
    while process.poll() is None and not list((tmp_path/'run'/'stages').glob('.unfinished-*-sft-*')): time.sleep(.01)
    process.send_signal(getattr(signal, name))
    said, told = process.communicate()
    assert process.returncode == status and cli_guard.GOES_ON in told.decode() and 'Traceback' not in told.decode()
    assert '\r' not in told.decode() # no progress bar in a file
    assert 'not finished' in (tmp_path/'run'/INCOMPLETE).read_text()


def test_every_cause_is_a_sentence():
    for number, text in CAUSES.items(): assert end_of(OSError(number, 'x', 'place')) == (f'error: place: {text}', 1)


# Before PyTorch is there

LIGHT = { # words of a command -> what is said
    'run safety --seeds 0': 'seeds is 0',
    'run preferences --loss dpoo': 'did you mean "dpo"?',
    'run preferences --sft-lr nan': 'finite',
    'run preferences --weak picoo': 'did you mean "pico"?',
    'run preferences --data nowhere.jsonl': 'no such file',
    'run preferences --out file/run': 'file',
    'run classify': 'needs rows',
    'run safety --method confident': 'did you mean',
    'run classify --data ./nowhere': 'no such file',
    'run persona --n-unlabelled 0': 'n_unlabelled is 0',
    'run maths --data my/own/sums': 'no such file',
    'run toxicity --seeds 0': 'seeds is 0',
    'refine --questions nowhere.csv --out x.jsonl': 'no such file',
    'label --model pico --rows nowhere.csv --train t.csv --out x.parquet': 'no such file',
    'run preferences --config nowhere.toml': 'nowhere.toml',
}


@pytest.mark.cases(11)
@pytest.mark.parametrize('words', LIGHT)
def test_what_needs_no_model_is_said_before_pytorch_is_loaded(tmp_path, words):
    (tmp_path/'file').write_text('mine')
    code = (f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\nsys.argv = ['w2s', *{words.split()!r}]\nfrom "
            "w2s.cli.app import main\nmain()")
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=os.environ | {'PYTHONPATH': str(ROOT)}
    )
    assert done.returncode and LIGHT[words] in sentence(done.stderr) and done.stdout.split()[-1] == 'False', done.stdout + done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ['file']


KEEPS = { # where a command's work is done -> its words
    'w2s.experiments.preferences.run': 'run preferences',
    'w2s.experiments.vary.run_varied': 'run preferences --vary beta',
    'w2s.experiments.labels.run': 'run safety',
    'w2s.experiments.demonstrations.run': 'run persona',
    'w2s.experiments.toxicity.run': 'run toxicity',
    'w2s.files.refine.refine_file': 'refine --questions rows.csv --out x.jsonl',
    'w2s.files.label.label': 'label --model pico --rows rows.csv --train more.csv --out x.parquet',
}


@pytest.mark.parametrize('place', KEEPS)
@pytest.mark.parametrize('flag', ['', '--keep-stages'])
def test_every_command_keeps_stages_of_other_versions_if_one_says_so(tmp_path, monkeypatch, place, flag):
    for name in ('rows.csv', 'more.csv'): (tmp_path/name).write_text('question,answer\na,b\n')
    monkeypatch.chdir(tmp_path)
    kept = []
    def stand_in(*a, keep, **k):
        kept.append(keep)
        raise ConfigError('far enough')
    monkeypatch.setattr(place, stand_in)
    status, said = w2s(*KEEPS[place].split(), *flag.split())
    assert status == 1 and 'far enough' in said and kept == [bool(flag)]
