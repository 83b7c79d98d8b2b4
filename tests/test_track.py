"`--track`: curves and results in a tracker that is installed; it changes no result, and its failure stops nothing"
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.machines import Machines
from w2s.errors import ConfigError, W2SWarning
from w2s.io import track as page
from w2s.io.track import TRACKERS, need_tracker, track

SMALL = ('run safety --weak pico --strong nano --seeds 1 --epochs 1 --n-labelled 8 --n-unlabelled 8 --n-test 8 --no-baseline '
         '--method xent').split()


@pytest.fixture(autouse=True)
def afresh():
    page.FAILED.clear()
    yield
    page.FAILED.clear()


def fake(monkeypatch, name, at=None):
    "A tracker that remembers; its call number `at` fails"
    seen, package, left = [], ModuleType(name), [at]
    def heard(kind):
        def call(*given, **more):
            if left[0] is not None:
                left[0] -= 1
                if left[0] < 0: raise ConnectionError('no network')
            seen.append((kind, *given, more))
            print('something that a tracker prints')
        return call
    package.__spec__ = ModuleSpec(name, None)
    package.init, package.log, package.finish = heard('init'), heard('log'), heard('finish')
    monkeypatch.setitem(sys.modules, name, package)
    return seen


def start(*words):
    done = CliRunner().invoke(app, [*SMALL, *map(str, words)])
    return done.exit_code, done.output + (f'\n{done.exception!r}' if done.exception else '')


@pytest.fixture(scope='module')
def tracked(tmp_path_factory):
    "A run with a tracker: its folder, what the tracker got, what was printed"
    out = tmp_path_factory.mktemp('track')/'run'
    with pytest.MonkeyPatch.context() as m:
        seen = fake(m, 'trackio')
        code, said = start('--track', 'trackio', '--out', out)
    assert code == 0, said
    return out, seen, said


def test_a_tracker_gets_every_curve_and_the_results(tracked):
    out, seen, said = tracked
    begun, got = [s[1]['name'] for s in seen if s[0] == 'init'], {}
    name = None
    for kind, *given, more in seen:
        if kind == 'init': name = more['name']
        if kind == 'log': got.setdefault(name, []).append((more['step'], given[0]))
    curves = {p.parent.name: pd.read_csv(p) for p in (out/'stages').glob('*/history.csv')}
    assert len(curves) == 3 and len(begun) == len(set(begun)) == 4 and [s[0] for s in seen].count('finish') == 4
    for stage, curve in curves.items():
        rows = got[next(n for n in begun if stage.startswith(n))]
        assert [s for s, _ in rows] == curve.step.tolist()
        np.testing.assert_allclose([r['loss'] for _, r in rows], curve.loss)
    (_, results), = got['results']
    table = pd.read_parquet(out/'intervals.parquet')
    assert sorted(results.values()) == pytest.approx(sorted(table.value[np.isfinite(table.value)]))
    assert 'something that a tracker prints' not in said


def test_it_is_no_part_of_a_result(tracked):
    "The same stages, found by a run without it, and by one with another"
    out, _, _ = tracked
    for words in ((), ('--track', 'none')):
        code, said = start(*words, '--out', out, '--keep-stages')
        assert code == 0 and ': found' in said and 'starting' not in said, said
        assert 'holds the results of another run' not in said


@pytest.mark.parametrize('at', [0, 1, 3])
def test_a_tracker_that_fails_is_named_once(at, tmp_path, monkeypatch):
    "At its start, at the first number, in the middle"
    seen = fake(monkeypatch, 'wandb', at)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        for n in range(3): track('wandb', tmp_path, f'stage{n}', [{'step': i, 'loss': .5} for i in range(3)])
    told = [str(w.message) for w in said if w.category is W2SWarning]
    assert len(told) == 1 and '--track wandb failed (ConnectionError: no network)' in told[0] and len(seen) == at


def test_a_run_ends_without_its_tracker(tmp_path, monkeypatch):
    fake(monkeypatch, 'wandb', 2)
    with pytest.warns(W2SWarning, match='the run continues without it'): code, said = start('--track', 'wandb', '--out', tmp_path/'run')
    assert code == 0 and (tmp_path/'run'/'report.html').exists(), said


@pytest.mark.parametrize('name', TRACKERS)
def test_one_that_is_not_installed_is_refused_before_anything_is_done(name, tmp_path, monkeypatch):
    monkeypatch.setattr(page, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=f'^--track {name}: {name} is not installed; pip install {name}, or leave out --track$'):
        need_tracker(name)
    code, said = start('--track', name, '--out', tmp_path/'run')
    assert code == 1 and f'pip install {name}' in said and not (tmp_path/'run').exists()


@pytest.mark.parametrize('name', ['mlflow', 'Wandb', 'tensor board'])
def test_one_that_is_not_known_is_refused(name):
    with pytest.raises(ConfigError, match='--track'): Machines(track=name)


def test_numbers_that_are_none_are_left_out(tmp_path, monkeypatch):
    seen = fake(monkeypatch, 'trackio')
    track('trackio', tmp_path, 'stage', [{'step': 4, 'loss': float('nan'), 'value': float('inf'), 'tokens': 3}])
    assert [(s[1], s[-1]) for s in seen if s[0] == 'log'] == [({'tokens': 3.}, {'step': 4})]


@pytest.mark.skipif(importlib.util.find_spec('tensorboard') is None, reason='needs tensorboard')
def test_tensorboard_reads_what_is_written(tmp_path):
    track('tensorboard', tmp_path, 'student-seed0', [{'step': i, 'loss': 1/(i + 1)} for i in range(5)])
    assert not page.FAILED
    reader = importlib.import_module('tensorboard.backend.event_processing.event_accumulator')
    events = reader.EventAccumulator(str(tmp_path/'tensorboard'/'student-seed0'))
    events.Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars('loss')] == [(i, round(1/(i + 1), 6)) for i in range(5)]


@pytest.mark.long
def test_workers_hand_over_their_own_trainings(tmp_path):
    "Each process of --devices cpu,cpu has the tracker; a tracker of the user's Python path that writes a line for each call"
    (tmp_path/'wandb.py').write_text(f'''
import json
def _note(*what):
    with open({str(tmp_path/"calls")!r}, "a") as f: f.write(json.dumps(what) + "\\n")
def init(**about): _note("init", about["name"])
def log(numbers, step): _note("log", step)
def finish(): _note("finish")
''')
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, '-m', 'w2s', *SMALL, '--track', 'wandb', '--devices', 'cpu,cpu', '--out', str(tmp_path/'run')]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    begun = [json.loads(line)[1] for line in (tmp_path/'calls').read_text().splitlines() if json.loads(line)[0] == 'init']
    assert len(begun) == len(set(begun)) == 4 and 'results' in begun
