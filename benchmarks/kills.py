"""Kills of every command that writes: the same bits at the end, and no finished stage lost. `python benchmarks/kills.py --kills 100 >
benchmarks/kills.md`

Each command runs once without a disturbance. Then it is started again and again in a folder of its own and killed at a random change of the
disk (a file opened for writing, a rename, a removal), by SIGKILL, SIGTERM or SIGINT in turn. Half of the SIGKILLs are power cuts: what was
not forced to disk by then is emptied, cut or filled with zeros, and renames whose folder was not forced to disk come undone. At the end
every file of the folder is compared with the undisturbed run, manifests without what differs from run to run (time, process, seconds).
"""
import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOML = '''
data = "{home}/data"
weak = "{home}/weak"
strong = "{home}/strong"
n_labelled = 16
n_unlabelled = 16
n_test = 8
load = {{quantize = "none", dtype = "float32"}}
lora = {{rank = 2, dropout = 0.1}}
sft = {{batch_size = 4, checkpoint_every = 2, learning_rate = 1e-3}}
dpo = {{batch_size = 4, checkpoint_every = 2, learning_rate = 1e-3}}
'''
LABELS = '''
[load]
quantize = "none"
dtype = "float32"
[supervisor]
batch_size = 4
checkpoint_every = 2
[student]
batch_size = 4
checkpoint_every = 2
'''
COMMANDS = { # name -> words behind w2s; {out} is the folder, or the file in it
    'run preferences': '--config {home}/run.toml --out {out}',
    'run classify': '--data {home}/texts.csv --text text --label label --weak {home}/weak --strong {home}/strong --snapshots 2 '
                    '--n-labelled 20 --n-unlabelled 20 --n-test 12 --seeds 1 --epochs 1 --config {home}/labels.toml --out {out}',
    'run persona': '--weak pico --strong scholar --seeds 1 --n-labelled 16 --n-unlabelled 24 --n-test 8 --method '
                   'naive,in-context --out {out}',
    'run toxicity': '--weak pico --strong nano --seeds 1 --n-labelled 24 --n-unlabelled 24 --n-test 6 --samples 3 --out {out}',
    'label': '--model {home}/weak --train {home}/data/train_gt.jsonl --rows {home}/data/test.jsonl --config {home}/label.toml --out '
             '{out}/labels.parquet',
    'refine': '--questions {home}/questions.jsonl --strong {home}/strong --method ask-to-improve --max-tokens 12 --quantize none --dtype '
              'float32 --out {out}/refined.jsonl'}
CHILD = '''
import os, signal, sys
out, at, number, log = os.path.realpath(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), open(sys.argv[4], 'a', buffering=1)
count, fsync = 0, os.fsync
def inside(path):
    try: return os.path.realpath(os.fsdecode(path)).startswith(out)
    except (TypeError, ValueError): return False
def hook(event, args):
    global count
    changes = (event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')) or \
event in ('os.rename', 'os.remove', 'os.rmdir', 'os.mkdir', 'os.truncate')
    if not changes or not inside(args[0]): return
    count += 1
    if event == 'os.rename': log.write(f'rename\\t{os.path.realpath(args[0])}\\t{os.path.realpath(args[1])}\\n')
    if count == at: log.write(f'killed\\n'); os.kill(os.getpid(), number)
def synced(handle):
    fsync(handle)
    s, path = os.fstat(handle), os.readlink(f'/proc/self/fd/{handle}')
    log.write(f'folder\\t{path}\\n' if os.path.isdir(path) else f'file\\t{s.st_ino}\\t{s.st_size}\\t{s.st_mtime_ns}\\n')
os.fsync = synced
sys.argv = ['w2s', *sys.argv[5:]]
from w2s.cli.app import main
sys.addaudithook(hook)
try: main()
finally: log.write(f'changes\\t{count}\\n')
'''


def make_home(home: Path) -> Path:
    "Rows, tiny models and settings"
    from w2s.data.samples import sample_preferences, write_samples
    from w2s.models.tiny import tiny_model
    write_samples(home/'data', 60, seed=4)
    rows = sample_preferences(60, seed=4)
    texts = [r['prompt'] + r['chosen'] for r in rows]
    tiny_model(home/'weak', texts, layers=1, seed=1)
    tiny_model(home/'strong', texts, layers=2, seed=2)
    (home/'run.toml').write_text(TOML.format(home=home))
    (home/'labels.toml').write_text(LABELS)
    (home / 'label.toml').write_text(
        '\n'.join(line for line in TOML.splitlines() if line.startswith(('load', 'lora', 'sft', 'dpo')))
        .replace('{{', '{')
        .replace('}}', '}')
    )
    (home / 'texts.csv').write_text(
        'text,label\n' + ''.join(f'"{t.strip()} {i}",{i % 2}\n'.replace('\n', ' ').strip() + '\n' for i, t in enumerate(texts))
    )
    (home / 'questions.jsonl').write_text(
        ''.join(
            json.dumps(dict(question=r['prompt'].strip(), answer=r['rejected'].strip())) + '\n'
            for r in {r['prompt']: r for r in rows}.values()
        )
    )
    return home


def start(home: Path, out: Path, command: str, at: int = 0, number: int = 0) -> tuple[int, str, list[list[str]]]:
    "Run a command, killed at its so-many-th change of the disk: exit status, what it said, and the log of its changes"
    log = out.with_suffix('.log')
    log.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    words = [*command.split(), *COMMANDS[command].format(home=home, out=out).split()]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', CHILD, str(out), str(at), str(number), str(log), *words],
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'},
    )
    return done.returncode, done.stdout + done.stderr, [line.split('\t') for line in log.read_text().splitlines()]


def cut_power(out: Path, log: list[list[str]], rng: random.Random) -> int:
    "Lose what was not forced to disk; how many files and names were lost"
    known, lost = {(int(x[1]), int(x[2]), int(x[3])) for x in log if x[0] == 'file'}, 0
    for file in sorted(p for p in out.rglob('*') if p.is_file() and not p.is_symlink()):
        s = file.stat()
        if not s.st_size or (s.st_ino, s.st_size, s.st_mtime_ns) in known: continue
        data = file.read_bytes()
        file.write_bytes(rng.choice([b'', data[:len(data)//2], bytes(len(data))]))
        lost += 1
    for i, line in reversed(list(enumerate(log))):
        if line[0] != 'rename': continue
        source, target = Path(line[1]), Path(line[2])
        if any(x[0] == 'folder' and x[1] == str(target.parent) for x in log[i:]): break
        if target.exists() and not source.exists() and source.parent.is_dir():
            os.rename(target, source)
            lost += 1
    return lost


def on_disk(out: Path) -> list[list[str]]:
    "The log of a folder after a power cut: all that is still there was read from the disk"
    stats = [p.stat() for p in out.rglob('*') if p.is_file() and not p.is_symlink()]
    return [['file', str(s.st_ino), str(s.st_size), str(s.st_mtime_ns)] for s in stats]


def contents(out: Path) -> dict[str, str]:
    "Every file by name, as a hash"
    def content(path: Path) -> bytes:
        return json.dumps(json.loads(path.read_bytes())['files']).encode() if path.name.endswith('manifest.json') else path.read_bytes()
    return {
        re.sub(r'[0-9a-f]{12}\.manifest', 'manifest', str(p.relative_to(out))): hashlib.sha256(content(p)).hexdigest()
        for p in sorted(out.rglob('*'))
        if p.is_file() and p.name not in ('.lock', '.holder.json')
    }


def finished(out: Path) -> dict[str, int]:
    "Every file of every finished stage, with its inode"
    return {
        str(p.relative_to(out)): p.stat().st_ino
        for f in out.rglob('stages/*')
        if f.is_dir() and not f.name.startswith('.')
        for p in f.rglob('*')
        if p.is_file() and 'checkpoints' not in p.parts
    }


def one_chain(home: Path, command: str, straight: dict[str, str], changes: int, kills: int, rng: random.Random, note: Counter) -> list[str]:
    "Kill a command so many times in one folder, let it end, and compare; what went wrong"
    out, wrong, kept, past = home/f'chain {rng.random():.9f}'.replace(' ', '-'), [], {}, [] # past: the log since the last power cut
    for k in range(kills):
        number = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGINT][k % 4]
        before = time.time()
        status, said, log = start(home, out, command, rng.randint(1, max(2, changes//(2 + k//2))), number)
        power = number == signal.SIGKILL and k % 8 < 4
        if not any(x == ['killed'] for x in log): note['ended before the kill'] += 1
        else: note[f'{signal.Signals(number).name}{", power cut" if power else ""}'] += 1
        if 'Traceback' in said: wrong.append(f'{command}: a traceback after {signal.Signals(number).name}: {said[-300:]}')
        if number != signal.SIGKILL and status not in (0, 128 + number):
            wrong.append(f'{command}: status {status} after {signal.Signals(number).name}: {said[-200:]}')
        if status in (0,): note['ended in spite of the signal'] += number != signal.SIGKILL and any(x == ['killed'] for x in log)
        past += log
        if power:
            note['files or names lost in power cuts'] += cut_power(out, past, rng)
            past = on_disk(out)
        now = finished(out)
        if gone := [f for f, i in kept.items() if now.get(f) != i]: wrong.append(f'{command}: finished, and made again: {gone[:3]}')
        kept = now
        print(f'  {command}: kill {k + 1} of {kills}, {time.time() - before:.0f} s', file=sys.stderr, flush=True)
    status, said, _ = start(home, out, command)
    if status: wrong.append(f'{command}: ended with {status}: {said[-500:]}')
    else:
        ours = contents(out)
        if other := sorted(f for f in ours.keys() | straight.keys() if ours.get(f) != straight.get(f)):
            wrong.append(f'{command}: {len(other)} files differ: {other[:5]}')
        note['files compared'] += len(ours)
    if not wrong: shutil.rmtree(out)
    return wrong


def main() -> None:
    "All chains, and a page"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=100)
    parser.add_argument('--chain', type=int, default=9, help='kills in one folder')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--command', choices=COMMANDS, action='append')
    args = parser.parse_args()
    home, wrong, rows = make_home(Path(tempfile.mkdtemp())), [], []
    names = args.command or list(COMMANDS)
    for name in names:
        status, said, log = start(home, home/'straight'/name.replace(' ', '-'), name)
        if status: sys.exit(f'{name}: {said}')
        straight, changes, note = (
            contents(home / 'straight' / name.replace(' ', '-')),
            next(int(x[1]) for x in log if x[0] == 'changes'),
            Counter(),
        )
        todo, rng = args.kills//len(names) + (names.index(name) < args.kills % len(names)), random.Random(f'{args.seed} {name}')
        while todo > 0:
            wrong += one_chain(home, name, straight, changes, min(todo, args.chain), rng, note)
            todo -= args.chain
        rows.append((name, changes, note))
    kinds = [
        'SIGKILL',
        'SIGKILL, power cut',
        'SIGTERM',
        'SIGINT',
        'ended before the kill',
        'files or names lost in power cuts',
        'files compared',
    ]
    print('# Kills\n')
    print(' '.join(line.strip() for line in (__doc__ or '').split('\n\n')[1].splitlines()) + '\n')
    print('| command | changes of the disk | ' + ' | '.join(kinds) + ' |\n|' + ' --- |'*(len(kinds) + 2))
    for name, changes, note in rows: print(f'| w2s {name} | {changes} | ' + ' | '.join(str(note[k]) for k in kinds) + ' |')
    print(
        f'\n{sum(n[k] for _, _, n in rows for k in kinds[:4])} kills (seed {args.seed}). Files that differ at the end, finished stages '
        f'made again, tracebacks, wrong exit statuses: {len(wrong)}.'
    )
    for line in wrong: print(f'- {line}')


if __name__ == '__main__': main()
