"""The results of every command, small, as they were when they were last recorded: a change of structure must not change a bit.

`python tests/test_frozen.py` records them again, in tests/frozen.json. Roles, methods, metrics and the names of stages are the same on
every machine. Numbers are not (processors add in different orders), so they are kept for each instruction set and version of PyTorch, and
compared where there is a record.
"""
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import pytest
import torch

RECORD = Path(__file__).with_name('frozen.json')
LADDER = '--weak pico --strong nano --seeds 1'
COMMANDS = {
    'weak-teacher': f'run preferences {LADDER} --n-labelled 20 --n-unlabelled 20 --n-test 20 --samples 1 --epochs 1',
    'safety': f'run safety {LADDER} --n-labelled 4 --n-unlabelled 36 --n-test 20 --epochs 1 --snapshots 2',
    'legal': f'run legal {LADDER} --n-labelled 13 --n-unlabelled 27 --n-test 20 --readout probe',
    'persona': 'run persona --weak pico --strong scholar --seeds 1 --n-labelled 16 --n-unlabelled 16 --n-test 8 --epochs 1 --method '
               'naive,in-context',
    'maths': 'run maths --weak pico --strong scholar --seeds 1 --n-labelled 16 --n-unlabelled 16 --n-test 8 --epochs 1 --method '
             'naive,ask-to-improve',
    'toxicity': f'run toxicity {LADDER} --n-labelled 24 --n-unlabelled 24 --n-test 6 --samples 2 --sft-epochs 1'}


def machine() -> str:
    "What the bits of a result depend on, beside the code"
    return f'{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__.split("+")[0]}'


def digest(value) -> str: return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def start(command: str, out: Path) -> None:
    "A command, in a process of its own: what other tests have left in this one is not in its bits"
    env = {**os.environ, 'PYTHONPATH': str(RECORD.parents[1]), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    words = [sys.executable, '-m', 'w2s', *COMMANDS[command].split(), '--out', str(out)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f'{done.stdout[-1500:]} {done.stderr[-1500:]}'


def outcome(out: Path) -> dict:
    "What a run has left: parts that are the same on every machine, and parts that are not"
    stages = sorted(p.name for p in (out/'stages').iterdir() if not p.name.startswith('.'))
    items = pd.read_parquet(out/'items.parquet')
    keys = [c for c in items.columns if c not in ('value', 'seconds')]
    rows = items[keys].astype(str).sort_values(keys).to_numpy().tolist()
    values = items.assign(**{k: items[k].astype(str) for k in keys}).sort_values(keys).value
    return {'everywhere': {'stages': sorted(s.rpartition('-')[0] for s in stages), 'items': len(items), 'keys': digest(rows)},
            'here': {'stages': digest(stages), 'values': digest([float(v).hex() for v in values])}}


@pytest.mark.cases(2)
@pytest.mark.parametrize('command', COMMANDS)
def test_results_are_those_on_record(command, tmp_path, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    torch.set_num_threads(1)
    start(command, tmp_path/'run')
    now, then = outcome(tmp_path/'run'), json.loads(RECORD.read_text(encoding='utf-8'))
    assert now['everywhere'] == then['everywhere'][command]
    if here := then.get(machine()): assert now['here'] == here[command]


def record() -> None:
    "Run all commands, and write down what came out"
    torch.set_num_threads(1)
    kept = json.loads(RECORD.read_text(encoding='utf-8')) if RECORD.exists() else {}
    found = {}
    with tempfile.TemporaryDirectory() as home:
        for command in COMMANDS:
            start(command, Path(home)/command)
            found[command] = outcome(Path(home)/command)
    kept['everywhere'] = {c: f['everywhere'] for c, f in found.items()}
    kept[machine()] = {c: f['here'] for c, f in found.items()}
    RECORD.write_text(json.dumps(kept, indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__': sys.exit(record())
