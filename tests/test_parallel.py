"""A study that several processes do, on one machine, under Ray or as jobs of Slurm, ends in the same bits as one process; also where one of
them is killed"""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli import plan as plan_page
from w2s.cli.app import app
from w2s.compare import on_ray, workers
from w2s.compare.comparison import run_experiment
from w2s.compare.config import read_toml
from w2s.compare.demonstration_settings import fill_transfer
from w2s.compare.label_settings import fill_classify
from w2s.compare.learn import Study
from w2s.compare.machines import Machines
from w2s.compare.preference_settings import fill_settings
from w2s.compare.stages import Run, claim, hold_stage, run_stage
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.compare.workers import Share, walk_once, work_along
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import ConfigError
from w2s.experiments.demonstrations import open_demonstrations
from w2s.experiments.labels import open_labels
from w2s.experiments.preferences import open_preferences
from w2s.experiments.toxicity import open_toxicity
from w2s.io.manifests import read_manifest
from w2s.models.tiny import tiny_model

ROOT = Path(__file__).parents[1]
TOML = '''
data = "{home}/data"
weak = "{home}/weak"
strong = "{home}/strong"
seeds = 2
n_labelled = 16
n_unlabelled = 16
n_test = 6
imports = ["{home}/mine.py"]
loss = "own_dpo"
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2, dropout = 0.1}}
sft = {{batch_size = 4, epochs = 1, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
dpo = {{batch_size = 4, epochs = 2, learning_rate = 1e-3, checkpoint_every = 2, token_budget = 300}}
'''
MINE = '''
import time
import torch.nn.functional as F
from w2s.compare.extensions import loss

@loss('own_dpo')
def own_dpo(gap, beta):
    time.sleep(.05) # so that a training can be shot at while it goes on
    return -F.logsigmoid(beta*gap)
'''
needs_ray = pytest.mark.skipif(find_spec('ray') is None, reason='Ray is not installed')
needs_proc = pytest.mark.skipif(not Path('/proc/locks').exists(), reason='finds the process that works on a stage in /proc')


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Rows, a weak and a strong model, a loss in a file, and the settings"
    home = tmp_path_factory.mktemp('parallel')
    write_samples(home/'data', 80, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(80, seed=4)]
    tiny_model(home/'weak', texts, layers=1, seed=1)
    tiny_model(home/'strong', texts, layers=3, seed=2)
    (home/'mine.py').write_text(MINE)
    (home/'run.toml').write_text(TOML.format(home=home), encoding='utf-8')
    return home


ENV = {
    **os.environ,
    'PYTHONPATH': str(ROOT),
    'OMP_NUM_THREADS': '1',
    'HF_HUB_OFFLINE': '1',
    'RAY_USAGE_STATS_ENABLED': '0',
    'RAY_worker_niceness': '0',
}


def start(home, out, *flags):
    "The command, as a process of its own"
    command = [sys.executable, '-m', 'w2s', 'run', 'preferences', '--config', str(home/'run.toml'), '--out', str(out), *flags]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.DEVNULL, stderr=open(out.with_suffix('.log'), 'wb'))


def bits(out):
    "Every file of every stage, every kept log-prob, adapter and table, by name, as a hash; of a manifest without time and process"
    found = {}
    for p in sorted(out.rglob('*')):
        name = str(p.relative_to(out))
        if (
            p.is_dir()
            or p.name in ('.lock', '.manifest.json')
            or not name.startswith(('stages', 'store', 'adapters'))
            and p.suffix != '.parquet'
        ):
            continue
        found[name] = hashlib.sha256(
            json.dumps(read_manifest(p)['files']).encode() if p.name == 'manifest.json' else p.read_bytes()
        ).hexdigest()
    return found


@pytest.fixture(scope='module')
def straight(home):
    "What one process makes of it"
    assert start(home, home/'straight').wait() == 0, (home/'straight.log').read_text()[-2000:]
    return bits(home/'straight')


def same(out, straight):
    "Same stages, same bits, nothing left over"
    assert bits(out) == straight
    assert not list((out/'.locks').iterdir()) and not list((out/'stages').glob('.*'))


def did_alone(out):
    "Process -> how many stages it made"
    made = [read_manifest(p/'manifest.json')['made']['process'] for p in (out/'stages').iterdir() if not p.name.startswith('.')]
    return {p: made.count(p) for p in made}


@pytest.mark.parametrize('flags', [['--devices', 'cpu,cpu']], ids=' '.join)
def test_several_processes_end_in_the_same_bits(home, straight, flags):
    out = home/f'several-{flags[0].strip("-")}'
    assert start(home, out, *flags).wait() == 0, out.with_suffix('.log').read_text()[-3000:]
    same(out, straight)
    assert len(did_alone(out)) == 2 and min(did_alone(out).values()) >= 5, did_alone(out)


def holders(out):
    "Stage -> the process that works on it, as the system sees it"
    # numbers from the folder itself: a lock may be gone by the time that one would look at it
    nodes = {entry.inode(): entry.name for entry in os.scandir(out/'.locks')} if (out/'.locks').is_dir() else {}
    held = [line.split() for line in Path('/proc/locks').read_text().splitlines() if 'FLOCK' in line and '->' not in line]
    return {nodes[int(w[5].rpartition(':')[2])]: int(w[4]) for w in held if int(w[5].rpartition(':')[2]) in nodes}


def kill_one(process, out, stage='-dpo'):
    "Kill the process that works on a training of a preference loss that has a checkpoint; which process that was"
    while process.poll() is None:
        for name, pid in holders(out).items():
            if 'own' in name and list((out/'stages'/f'.unfinished-{name}').glob('checkpoints/step-*')):
                os.kill(pid, signal.SIGKILL)
                return pid
        time.sleep(.001)
    return None


def test_small_models_get_a_process_for_each_core(tmp_path):
    "Where nothing was asked for; who sets the number of threads has chosen"
    from w2s.compare.cores import core_count
    sizes = '--weak pico --strong nano --seeds 2 --n-labelled 8 --n-unlabelled 8 --n-test 4 --samples 0 --others human'.split()
    def run(name, **env):
        command = [sys.executable, '-m', 'w2s', 'run', 'preferences', *sizes, '--out', str(tmp_path/name)]
        plain = {k: v for k, v in ENV.items() if k != 'OMP_NUM_THREADS'}
        done = subprocess.run(command, env=plain | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        made = [read_manifest(p)['made']['process'] for p in (tmp_path/name/'stages').glob('*/manifest.json')]
        assert not read_toml(tmp_path/name/'config.toml').get('machines', {}).get('processes') # another machine has other cores
        return '--processes 1: one for all' in done.stdout, len(set(made))
    assert run('alone', OMP_NUM_THREADS='1') == (False, 1)
    if core_count() > 1: assert run('cores') == (True, 2)


@pytest.mark.cases(1)
@needs_proc
@pytest.mark.parametrize(
    'flags', [['--devices', 'cpu,cpu'], pytest.param(['--on', 'ray', '--processes', '2'], marks=needs_ray)], ids=' '.join
)
def test_a_worker_that_is_killed_is_made_up_for(home, straight, flags):
    out = home/f'shot-{flags[0].strip("-")}'
    process = start(home, out, *flags)
    shot = kill_one(process, out)
    assert shot and shot != process.pid, 'the run was too fast to be shot at'
    assert process.wait() == 0, out.with_suffix('.log').read_text()[-3000:]
    same(out, straight)
    if flags[0] == '--devices': assert 'was killed (exit code -9); the others do its stages' in out.with_suffix('.log').read_text()


@pytest.mark.long
def test_all_workers_killed_is_said_and_gone_on_with(home, straight):
    out = home/'all-shot'
    process = start(home, out, '--devices', 'cpu')
    if kill_one(process, out):
        assert process.wait() == 1
        assert 'was killed (exit code -9). What was finished is kept' in out.with_suffix('.log').read_text()
    assert start(home, out).wait() == 0
    same(out, straight)


@pytest.mark.long
@needs_proc
def test_a_stopped_command_stops_its_workers(home, straight):
    out = home/'stopped'
    process = start(home, out, '--devices', 'cpu,cpu')
    while len(holders(out)) < 2 and process.poll() is None: time.sleep(.01)
    working = set(holders(out).values())
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert working and not any(Path(f'/proc/{pid}').exists() for pid in working)
    assert start(home, out, '--devices', 'cpu,cpu').wait() == 0
    same(out, straight)


@pytest.mark.long
def test_an_error_of_the_work_comes_back_as_it_is(home):
    out = home/'wrong'
    process = start(home, out, '--devices', 'cpu,cpu', '--sft-lr', '1e30')
    assert process.wait() == 1
    said = out.with_suffix('.log').read_text()
    assert 'error: stopped at step' in said and 'Traceback' not in said


@pytest.mark.long
def test_slurm_script(home, straight, tmp_path):
    "Its body, with what Slurm sets: it submits itself; two workers at the same time; then the job that writes the results"
    out, script = home/'slurm', tmp_path/'sweep it.sh'
    done = CliRunner().invoke(
        app,
        [
            'plan',
            'preferences',
            '--config',
            str(home / 'run.toml'),
            '--out',
            str(out),
            '--slurm',
            str(script),
            '--workers',
            '2',
            '--sbatch',
            '--gres=gpu:1 --time=01:00:00',
        ],
    )
    assert done.exit_code == 0, done.output
    assert 'stages' in done.output and not out.exists()
    assert subprocess.run(['bash', '-n', str(script)]).returncode == 0
    (tmp_path/'sbatch').write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" >> {tmp_path}/calls\necho "17;cluster"\n')
    (tmp_path/'sbatch').chmod(0o755)
    outside = {k: v for k, v in ENV.items() if not k.startswith('SLURM')} | {'PATH': f'{tmp_path}:{ENV["PATH"]}'}
    submitted = subprocess.run(['bash', str(script)], env=outside, capture_output=True, text=True)
    assert submitted.stdout == 'submitted: workers 17 (0-1), results 17\n', submitted.stderr
    calls = (tmp_path/'calls').read_text().splitlines()
    assert calls.count('--gres=gpu:1') == calls.count(str(script)) == 2 and '--array=0-1' in calls and '--dependency=afterany:17' in calls
    jobs = [
        subprocess.Popen(
            ['bash', str(script)],
            env=outside | {'SLURM_JOB_ID': str(20 + i), 'SLURM_ARRAY_TASK_ID': str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    said = [j.communicate()[0] for j in jobs]
    assert [j.returncode for j in jobs] == [0, 0], said
    assert len(did_alone(out)) == 2 and not (out/'items.parquet').exists()
    last = subprocess.run(['bash', str(script)], env=outside | {'SLURM_JOB_ID': '30'}, capture_output=True, text=True)
    assert last.returncode == 0, last.stdout + last.stderr
    same(out, straight)


# Every kind of feedback, in one process: two workers that take turns, of which each may do every second stage

FAST = dict(load=dict(quantize='none', dtype='float32'), lora=dict(rank=2))
STEP = dict(epochs=1, batch_size=8, learning_rate=1e-3)
KINDS = {
    'preferences': (
        fill_settings,
        open_preferences,
        dict(weak='pico', strong='pico', n_labelled=20, n_unlabelled=20, n_test=6, seeds=2, samples=1, sft=STEP, dpo=STEP),
    ),
    'preferences, an ensemble and its calibrated labels': (
        fill_settings,
        open_preferences,
        dict(
            weak='pico+nano',
            strong='pico',
            n_labelled=40,
            n_unlabelled=20,
            n_test=6,
            seeds=1,
            samples=0,
            sft=STEP,
            dpo=STEP,
            labels=dict(targets='soft', calibrate=0.5),
        ),
    ),
    'labels, snapshots and rounds': (
        fill_classify,
        open_labels,
        dict(
            weak='pico',
            strong='nano',
            n_labelled=20,
            n_unlabelled=20,
            n_test=10,
            seeds=2,
            supervisor=STEP,
            student=STEP,
            snapshots=2,
            rounds=2,
        ),
    ),
    'labels, probe': (
        fill_classify,
        open_labels,
        dict(weak='pico', strong='nano', n_labelled=20, n_unlabelled=20, n_test=10, seeds=1, readout='probe'),
    ),
    'demonstrations': (
        fill_transfer,
        open_demonstrations,
        dict(
            weak='pico',
            strong='nano',
            n_labelled=8,
            n_unlabelled=12,
            n_test=6,
            seeds=2,
            max_tokens=12,
            examples=2,
            demonstrate=STEP,
            student=STEP,
            methods=('naive', 'in-context', 'ask-to-improve'),
        ),
    ),
    'toxicity': (
        fill_toxicity,
        open_toxicity,
        dict(
            weak='pico',
            strong='nano',
            n_labelled=16,
            n_unlabelled=16,
            n_test=4,
            seeds=1,
            examples=2,
            sft=STEP,
            dpo=STEP,
            speak=dict(samples=2, max_tokens=8),
        ),
    ),
}


class Half(Share):
    "A walk that may do every second stage that is ready, as if another worker were always there first at the others"
    def takes(self, final):
        ready = super().takes(final)
        self.asked = getattr(self, 'asked', 0) + ready
        return ready and self.asked % 2 == 1


@pytest.mark.long
@pytest.mark.parametrize('kind', KINDS)
def test_walks_with_made_up_results_do_no_other_stage(kind, tmp_path):
    fill, open_comparison, given = KINDS[kind]
    config = fill(FAST | given)
    plain = run_experiment(open_comparison, config, tmp_path/'plain', quiet=True)
    with claim(tmp_path/'shared', {}, lambda line: None, quiet=True) as run:
        opened = open_comparison(Study(config, run, True))
        did, seen, whole = [], set(), set()
        for turn in range(1, 100):
            (tmp_path/f'scratch-{turn}').mkdir()
            share = Half(tmp_path/f'scratch-{turn}', salt=turn, seen=seen, whole=whole)
            walk_once(run, opened.make, share)
            did.append(share.did)
            if not share.guesses: break
        result = opened.result(opened.make())
    def stages(out): return {p.name for p in (out/'stages').iterdir()}
    assert stages(tmp_path/'shared') == stages(tmp_path/'plain')
    assert min(did[:-1]) > 0 and len(did) > 2, f'all was done in one walk, and nothing was made up: {did}'
    pd.testing.assert_frame_equal(result.items, plain.items, check_exact=True)


def slow(log, folder):
    "Work that takes a while"
    with open(log, 'a') as f: f.write('once\n')
    time.sleep(.5)
    (folder/'answer').write_text('42')


def do_it(root, log): run_stage(Run(root, lambda line: None), 'student', {'seed': 0}, partial(slow, log))


def test_a_stage_is_done_once_by_whoever_comes_first(tmp_path):
    context = get_context('spawn')
    several = [context.Process(target=do_it, args=(tmp_path/'run', tmp_path/'log')) for _ in range(3)]
    for p in several: p.start()
    for p in several: p.join()
    assert [p.exitcode for p in several] == [0, 0, 0]
    assert (tmp_path/'log').read_text() == 'once\n'


def test_a_worker_that_is_alone_walks_once(tmp_path):
    "Nothing is made up, so nothing has to be seen twice"
    config, walks = fill_settings(FAST | KINDS['preferences'][2] | dict(seeds=1, samples=0)), []
    with claim(tmp_path/'run', {}, lambda line: None, quiet=True) as run:
        opened = open_preferences(Study(config, run, True))
        def make(): walks.append(1); return opened.make()
        assert work_along(run, make) > 5 and len(walks) == 1
        assert work_along(run, make) == 0


REFUSED = {
    '--devices gpu0': '"gpu0" is no device',
    '--devices cpu,0': 'one kind',
    '--devices -1': 'is no device',
    '--devices cuda:x': 'is no device',
    '--devices 0,1': 'this machine has no GPU 0',
    '--devices cpu,cpu --on ray': 'leave one of them out',
    '--devices cpu,cpu --processes 2': 'leave out --processes',
    '--processes 0': '1 or more',
    '--gpu-share .5': 'under --on ray only',
    '--on rai': 'did you mean "ray"',
    '--on ray:/host': '--on ray:/host',
    '--on ray --gpu-share 0': 'above 0',
    '--on ray --gpu-share 2': 'at most 1',
    '--devices cpu,cpu --device cuda': 'two kinds',
    '--worker --processes 2': 'leave out --devices, --processes and --on',
    '--worker --dry-run': 'leave out one of them',
}


@pytest.mark.parametrize('flags', REFUSED)
def test_what_cannot_be_is_refused_in_words(flags, tmp_path, monkeypatch):
    monkeypatch.setattr('w2s.compare.comparison.gpu_count', lambda: 0)
    done = CliRunner().invoke(
        app, ['run', 'preferences', '--weak', 'pico', '--strong', 'nano', '--out', str(tmp_path / 'run'), *flags.split()]
    )
    assert done.exit_code != 0 and isinstance(done.exception, (ConfigError, SystemExit)), done.output
    assert REFUSED[flags] in f'{done.output}{done.exception}' and not (tmp_path/'run').exists()


def test_ray_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(on_ray, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'w2s\[ray\]'"):
        run_experiment(open_preferences, fill_settings(dict(machines=dict(on='ray'))), tmp_path / 'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize(
    'arguments, words',
    [(['--devices', 'cpu,cpu'], 'leave out --devices'), (['--on=ray'], 'leave out --on'), (['--worker'], 'leave out --worker')],
)
def test_a_script_starts_its_own_workers(arguments, words):
    with pytest.raises(ConfigError, match=words): plan_page.check_planned(['safety', *arguments])


def test_functions_that_cannot_be_sent_are_named(tmp_path):
    "A comparison that is opened by a function inside a function"
    config = fill_settings(FAST | KINDS['preferences'][2] | dict(machines=Machines(('cpu', 'cpu'))))
    with pytest.raises(ConfigError, match='cannot be sent to other processes'):
        run_experiment(lambda study: open_preferences(study), config, tmp_path / 'run', quiet=True)


def test_workers_of_another_kind_are_refused(tmp_path):
    with claim(tmp_path/'run', {}, lambda line: None, quiet=True) as run:
        config = fill_settings(FAST | KINDS['preferences'][2])
        mine = workers.known_by([open_preferences(Study(config, run, True))])
        with pytest.raises(ConfigError, match='worker 3: torch is'): workers.check_same(mine, mine | {'torch': '2.0'}, 'worker 3')
        key = next(k for k in mine if k.startswith('device and arithmetic'))
        with pytest.raises(ConfigError, match='cpu, float32, and where the results are written cuda, bfloat16'):
            workers.check_same(mine, mine | {key: 'cuda, bfloat16'}, 'worker 3')


def test_where_a_run_is_done_is_no_part_of_what_it_is():
    from w2s.compare.config import to_table
    from w2s.compare.extensions import run_hash
    plain, several = (to_table(fill_settings(dict(load=dict(device='cpu'), machines=m))) for m in ({}, dict(devices='cpu,cpu')))
    assert run_hash(plain) == run_hash(several) and run_hash({'1': plain, '2': plain}) == run_hash({'1': several, '2': several})
    assert run_hash(plain) != run_hash(to_table(fill_settings(dict(load=dict(device='cpu'), beta=.3))))


def test_nothing_is_cleaned_away_under_a_worker(tmp_path):
    (tmp_path/'run/stages/old-1').mkdir(parents=True)
    (tmp_path/'run/stages/.removed-old').mkdir()
    with hold_stage(tmp_path/'run', tmp_path/'run/stages/student-2'):
        done = CliRunner().invoke(app, ['clean', str(tmp_path/'run'), '-y'])
        assert (
            isinstance(done.exception, ConfigError)
            and 'student-2' in str(done.exception)
            and (tmp_path / 'run/stages/.removed-old').exists()
        )
    assert (
        CliRunner().invoke(app, ['clean', str(tmp_path / 'run'), '-y']).exit_code == 0
        and not (tmp_path / 'run/stages/.removed-old').exists()
    )


def test_processes_of_torchrun_start_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    config = fill_settings(dict(machines=dict(devices='cpu,cpu')))
    with pytest.raises(ConfigError, match='leave out one of the two'): run_experiment(open_preferences, config, tmp_path/'run')
    assert not (tmp_path/'run').exists()
