"""Five seeds at three betas in one folder, against fifteen separate runs: `python benchmarks/sweep.py`

The sweep is `w2s run preferences --seeds 5 --vary beta --values .5,1,2`. The separate runs are the same study a seed and a beta at a time,
each in a new folder: `--seeds 1 --beta B`, on rows made with another seed (`--data world:SEED`), since a run cannot begin at its second
seed; each does the work of one seed at one value. Processor seconds of all processes, start of Python included. Writes sweep.md.
"""
import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from w2s.bench.machine import machine_line

BETAS = ('.5', '1', '2')
TINY = ['--weak', 'pico', '--strong', 'nano', '--n-labelled', '48', '--n-unlabelled', '48', '--n-test', '40', '--samples', '1']


def seconds(words: list[str]) -> float:
    "Processor seconds of a command; raises `CalledProcessError`"
    def spent() -> float:
        u = resource.getrusage(resource.RUSAGE_CHILDREN)
        return u.ru_utime + u.ru_stime
    before = spent()
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    subprocess.run([sys.executable, '-m', 'w2s', 'run', 'preferences', *TINY, *words], check=True, capture_output=True, env=environment)
    return spent() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seeds', type=int, default=5)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        together = seconds(['--seeds', str(a.seeds), '--vary', 'beta', '--values', ','.join(BETAS), '--out', f'{home}/sweep'])
        print(f'sweep: {together:.0f} s', flush=True)
        alone = []
        for seed in range(a.seeds):
            for beta in BETAS:
                alone.append(seconds(['--seeds', '1', '--data', f'world:{seed}', '--beta', beta, '--out', f'{home}/{seed}-{beta}']))
                print(f'seed {seed}, beta {beta}: {alone[-1]:.0f} s', flush=True)
    Path(__file__).with_suffix('.md').write_text(
        f'# A sweep against separate runs\n\n{a.seeds} seeds at {len(BETAS)} betas: **{together:,.0f} s** of processor time together, '
        f'{sum(alone):,.0f} s in {len(alone)} separate runs ({min(alone):.0f} to {max(alone):.0f} s each): '
        f'**{together / sum(alone):.0%}**.\n\n'
        f'Settings: `{" ".join(TINY)}`. {machine_line()}; one thread; other work ran on the machine. '
        'Made by `python benchmarks/sweep.py`.\n',
        encoding='utf-8',
    )


if __name__ == '__main__': main()
