"""Memory and time of `--n-labelled 500 --n-unlabelled 500` on a JSONL file of 1 GB, and of the same file read whole.

python benchmarks/large_file.py [--megabytes 1024] [--whole]
"""
import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = 'lamp river seven quiet garden under bring yellow paper walk stone early mirror cloud gentle north'.split()
READ = ('import sys; from w2s.data.readers import read_preferences; from w2s.data.choice import rows_wanted; '
        'print(read_preferences(sys.argv[1], most=rows_wanted(1000, 500) if sys.argv[2] == "some" else 0).columns[0])')


def write_pairs(path: Path, size: int) -> int:
    "Pairs of about a thousand characters, most of which nobody reads, until the file has some bytes; says how many"
    draw, n = random.Random(0), 0
    with path.open('w', encoding='utf-8') as f:
        while f.tell() < size:
            for _ in range(1000):
                said = draw.choices(WORDS, k=20)
                f.write(
                    json.dumps(
                        dict(
                            prompt=f'What is number {n}?',
                            chosen=' '.join(said[:10]),
                            rejected=' '.join(said[10:]),
                            trace=f'{draw.getrandbits(3200):0800x}',
                        )
                    )
                    + '\n'
                )
                n += 1
    return n


def measure(*command: str) -> tuple[float, float, float, str]:
    "Seconds of wall and processor, peak memory in MB, and what was printed last"
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode: raise SystemExit(err[-2000:])
    return (
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss / 1024,
        out.strip().splitlines()[-1] if out.strip() else '',
    )


def in_fork(*command: str) -> str:
    "Measured in a process of its own, since the peak of a child is that of all children so far"
    reader, writer = os.pipe()
    if not os.fork():
        wall, cpu, peak, said = measure(*command)
        os.write(writer, f'{wall:.1f} s, {cpu:.1f} s of processor, {peak:,.0f} MB at most\n  {said[:300]}'.encode())
        os._exit(0)
    os.wait()
    os.close(writer)
    with os.fdopen(reader) as f: return f.read()


def main() -> None:
    "Write the file, measure, and delete it"
    parser = argparse.ArgumentParser()
    parser.add_argument('--megabytes', type=int, default=1024)
    parser.add_argument('--whole', action='store_true', help='also read the file whole')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'pairs.jsonl'
        n = write_pairs(path, args.megabytes * 2**20)
        print(f'{n:,} pairs, {path.stat().st_size / 2**20:,.0f} MB')
        print('nothing but the imports:', in_fork(sys.executable, '-c', 'import w2s.data.readers'))
        print('a choice for --n-labelled 500 --n-unlabelled 500:', in_fork(sys.executable, '-c', READ, str(path), 'some'))
        small = Path(folder) / 'small.jsonl'
        write_pairs(small, 6 * 2**20)
        def command(file: Path) -> tuple[str, ...]:
            return (
                sys.executable,
                '-m',
                'w2s',
                'run',
                'preferences',
                '--data',
                str(file),
                '--n-labelled',
                '500',
                '--n-unlabelled',
                '500',
                '--weak',
                'pico',
                '--strong',
                'pico',
                '--seeds',
                '1',
                '--dry-run',
            )
        print('w2s run preferences --n-labelled 500 --n-unlabelled 500 --dry-run:', in_fork(*command(path)))
        print('the same command on a file of 6 MB:', in_fork(*command(small)))
        if args.whole: print('all rows:', in_fork(sys.executable, '-c', READ, str(path), 'all'))


if __name__ == '__main__': main()
