"Five times `kill -9` at a run of the whole experiment: the same bits at the end, and no finished stage done again"
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

from w2s.cli.app import weak_teacher_config
from w2s.compare.stages import Run, run_stage
from w2s.data.samples import sample_preferences, write_samples
from w2s.experiments.preferences import run
from w2s.io.manifests import read_manifest
from w2s.models.adapters import LoraSettings, add_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.report.write import write
from w2s.train import loop
from w2s.train.checkpoints import trainable
from w2s.train.loop import TrainSettings, sft_objective, train
from w2s.train.tokens import encode_rows

ROOT = Path(__file__).parents[1]
TOML = '''
data = "{home}/data"
weak = "{home}/weak"
strong = "{home}/strong"
n_labelled = 32
n_unlabelled = 32
n_test = 16
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2, dropout = 0.1}}
sft = {{batch_size = 4, epochs = 1, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
dpo = {{batch_size = 4, epochs = 1, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
'''


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Rows, a weak and a strong model, and the settings"
    home = tmp_path_factory.mktemp('kill')
    write_samples(home/'data', 90, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(90, seed=4)]
    tiny_model(home/'weak', texts, layers=1, seed=1)
    tiny_model(home/'strong', texts, layers=3, seed=2)
    (home/'run.toml').write_text(TOML.format(home=home), encoding='utf-8')
    return home


def start(home, out):
    "The command, as a process of its own"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    command = [
        sys.executable,
        '-c',
        'from w2s.cli.app import main; main()',
        'run',
        'preferences',
        '--config',
        str(home / 'run.toml'),
        '--out',
        str(out),
    ]
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=open(out.with_suffix('.log'), 'ab'))


REPORTS = ('report.md', 'report.html')
OF_THE_RUN = re.compile(rb'(?:Command|Date|Time): [^\n<]*|<footer>[^<]*')


def content(path):
    """What a file says; of a report without command, date and time, of a manifest without time, process, seconds and the hashes of reports:
    all these are those of its run"""
    if path.name == 'manifest.json':
        return json.dumps({k: v for k, v in read_manifest(path)['files'].items() if k not in REPORTS}).encode()
    if path.name not in REPORTS: return path.read_bytes()
    plain, found = OF_THE_RUN.subn(b'', path.read_bytes())
    assert found == (4 if path.suffix == '.html' else 3), f'{path}: {found} lines of its run'
    return plain


def contents(out):
    "Every file that a finished run leaves, by name, as a hash"
    # the last one: a second copy of manifest.json, with times
    files = (p for p in sorted(out.rglob('*')) if p.is_file() and p.name not in ('.lock', '.holder.json', '.manifest.json'))
    return {str(p.relative_to(out)): hashlib.sha256(content(p)).hexdigest() for p in files}


def finished(out):
    "Every file of every finished stage, with what changes if it is written again"
    folders = [f for f in (out/'stages').glob('*') if not f.name.startswith('.')]
    return {str(p.relative_to(out)): (p.stat().st_ino, p.stat().st_mtime_ns) for f in folders for p in (f, *f.rglob('*'))}


def unfinished(out, name='*'): return list((out/'stages').glob(f'.unfinished-{name}'))


rng = random.Random(7)
AIMS = { # when to pull the trigger, and how long after that
    'in the weak SFT, some time after its start': (lambda out: unfinished(out, 'weak-seed0-sft-*'), lambda: rng.uniform(0.05, 0.4)),
    'in labelling': (lambda out: unfinished(out, 'weak-seed0-labels-*'), lambda: 0.0),
    'while a checkpoint is written': (
        lambda out: [w for u in unfinished(out, 'student-*') for w in (u / 'checkpoints').glob('.writing-*')],
        lambda: 0.0,
    ),
    'in a DPO, between two checkpoints': (
        lambda out: [w for u in unfinished(out, 'human-seed0-dpo-*') for w in (u / 'checkpoints').glob('step-000004')],
        lambda: rng.uniform(0.01, 0.06),
    ),
    'between the last file of a stage and its new name': (
        lambda out: [w for u in unfinished(out, 'ceiling-*') for w in u.glob('inputs.json')],
        lambda: 0.0,
    ),
}


def shoot(home, out, sign, delay):
    "Start the run, wait for the sign, kill it; where it was when it died, or None if it was too fast"
    process = start(home, out)
    while process.poll() is None and not sign(out): time.sleep(.0005)
    time.sleep(delay)
    if process.poll() is not None: return None
    process.send_signal(signal.SIGKILL)
    process.wait()
    return [u.name.removeprefix('.unfinished-').rsplit('-', 1)[0] for u in unfinished(out)] or ['between two stages']


@pytest.fixture(scope='module')
def straight(home):
    "A run that nobody disturbs"
    assert start(home, home/'straight').wait() == 0, (home/'straight.log').read_text()[-2000:]
    return home/'straight'


@pytest.mark.long
def test_five_kills_end_in_the_same_bits(home, straight, record_property):
    out, done, fell = home/'killed', {}, {}
    for aim, (sign, delay) in AIMS.items():
        fell[aim] = shoot(home, out, sign, delay())
        now = finished(out)
        assert {k: now.get(k) for k in done} == done, f'killed {aim}: a finished stage was touched'
        done = now
    assert start(home, out).wait() == 0, (home/'killed.log').read_text()[-2000:]
    now = finished(out)
    assert {k: now.get(k) for k in done} == done, 'a finished stage was touched'
    record_property('kills', json.dumps(fell))
    print(json.dumps(fell, indent=1))
    assert None not in fell.values(), f'the run was too fast for an aim: {fell}'
    ours, theirs = contents(out), contents(straight)
    assert ours.keys() == theirs.keys() # no litter, nothing missing, every stage and every kept log-prob under the same name
    assert [k for k in ours if ours[k] != theirs[k]] == []
    for name in ('results', 'items', 'intervals'):
        pd.testing.assert_frame_equal(pd.read_parquet(out/f'{name}.parquet'), pd.read_parquet(straight/f'{name}.parquet'), check_exact=True)
    assert len([k for k in ours if k.startswith('adapters/') and k.endswith('.safetensors')]) >= 4


def test_a_second_start_does_nothing(home, straight):
    "A finished run, started again: no stage is touched, the results are the same"
    before, files = finished(straight), contents(straight)
    write(run(weak_teacher_config({}, home/'run.toml'), straight, quiet=True))
    assert finished(straight) == before and contents(straight) == files


def stage(home, root, log):
    "One small training as a stage"
    def work(folder):
        base = load_base(home/'weak', LoadSettings(quantize='none', dtype='float32'), device='cpu')
        rows = sample_rows_of(base)
        model = add_adapter(base, LoraSettings(rank=2), seed=0)
        log.append(
            len(
                train(
                    model,
                    sft_objective(rows),
                    TrainSettings(batch_size=4, checkpoint_every=2, learning_rate=1e-3),
                    folder / 'checkpoints',
                    quiet=True,
                )
            )
        )
        save_adapter(model, base, folder/'adapter')
        log.append({n: p.detach().clone() for n, p in trainable(model).items()})
    return run_stage(Run(root, lambda line: None), 'one', {'x': 1}, work)


def sample_rows_of(base):
    from w2s.data.rows import make_rows
    return encode_rows(base.tokenizer, make_rows(sample_preferences(16, seed=4), 'preferences'), ('chosen', 'rejected'), 256).rows


@pytest.mark.parametrize('after', [0, 1, 2, 3, 5, 8])
def test_killed_while_checkpoints_are_removed(home, tmp_path, after, monkeypatch):
    """The stage is finished, so many files of its checkpoints are gone, then the kill: the finished training is kept, and the rest is
    cleared away"""
    straight, killed = [], []
    stage(home, tmp_path/'a', straight)
    def rmtree(path, *a, **k):
        files = sorted(p for p in Path(path).rglob('*') if p.is_file())
        if not files or 'checkpoints' not in Path(path).name: return real(path, *a, **k)
        for f in files[:after]: f.unlink()
        raise KeyboardInterrupt
    real = shutil.rmtree
    with monkeypatch.context() as m:
        m.setattr(shutil, 'rmtree', rmtree)
        with pytest.raises(KeyboardInterrupt): stage(home, tmp_path/'b', killed)
    trained, kept = len(killed), finished(tmp_path/'b')
    folder = stage(home, tmp_path/'b', killed)
    assert len(killed) == trained, 'a finished training was thrown away'
    assert {p.name for p in folder.iterdir()} == {'adapter', 'inputs.json', 'manifest.json'}
    assert {k: v for k, v in finished(tmp_path/'b').items() if 'adapter/' in k} == {k: v for k, v in kept.items() if 'adapter/' in k}
    assert all(torch.equal(killed[-1][n], straight[-1][n]) for n in straight[-1])


@pytest.mark.parametrize('files', [0, 1, 2])
def test_killed_while_an_old_checkpoint_is_removed(home, tmp_path, files, monkeypatch):
    "The third checkpoint is whole, the first is half gone: the training goes on from the third"
    straight, killed = [], []
    stage(home, tmp_path/'a', straight)
    def rmtree(path, *a, **k):
        if 'step-000002' not in Path(path).name or not Path(path).exists(): return real(path, *a, **k)
        for f in sorted(Path(path).iterdir())[:files]: f.unlink()
        raise KeyboardInterrupt
    real, steps = shutil.rmtree, []
    with monkeypatch.context() as m:
        m.setattr(shutil, 'rmtree', rmtree)
        m.setattr(loop, 'plan_steps', lambda *a: [[0, 1]]*8)
        with pytest.raises(KeyboardInterrupt): stage(home, tmp_path/'b', killed)
    take = loop.take_step
    with monkeypatch.context() as m:
        m.setattr(loop, 'plan_steps', lambda *a: [[0, 1]]*8)
        m.setattr(loop, 'take_step', lambda *a: steps.append(1) or take(*a))
        stage(home, tmp_path/'b', killed)
        assert len(steps) == 2
        stage(home, tmp_path/'c', straight)
    assert all(torch.equal(killed[-1][n], straight[-1][n]) for n in straight[-1])
