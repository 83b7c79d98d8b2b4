"""A real pretrained model on real rows, with time and memory: `W2S_REAL_MODELS=… W2S_REAL_DATA=… python benchmarks/real_models.py`

W2S_REAL_MODELS is a folder with the models english-1m, english-5m and gemma-3-270m, W2S_REAL_DATA one with the rows of DiaSafety in
diasafety. Each study is a comparison of `w2s run` in a process of its own, in OUT/<study>; a killed one goes on where it stopped. Processor
time, time on the clock and peak memory of every process are added to OUT/costs.jsonl. The page about the results is
nbs/papers/50_real_models.ipynb, which reads the finished stages.
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

WEAK, STRONG = 'english-1m,english-5m', 'gemma-3-270m'
PROBE = dict(readout='probe', weak=WEAK, max_length=96, seeds=2, n_labelled=500, n_unlabelled=500, n_test=500)
STUDIES = {'diasafety-probe': ('diasafety', PROBE)} # name: rows, settings of `w2s run classify`


def folder(variable: str) -> Path:
    "A folder that the environment names; raises `ConfigError` where it does not"
    from w2s.errors import ConfigError
    if not os.environ.get(variable): raise ConfigError(f'{variable} is not set; the head of benchmarks/real_models.py says what it names')
    return Path(os.environ[variable]).expanduser()


def settings(name: str) -> dict:
    "Settings of a study on this machine"
    models, data = map(folder, ('W2S_REAL_MODELS', 'W2S_REAL_DATA'))
    rows, given = STUDIES[name]
    weak = ','.join(str(models/w) for w in given['weak'].split(','))
    return given | dict(data=str(data/rows), weak=weak, strong=str(models/STRONG))


def study(name: str, out: Path, quiet: bool = True):
    "The result of a study; finished stages are used again"
    import torch

    from w2s.compare.label_settings import fill_labels
    from w2s.experiments import labels
    torch.set_num_threads(1)
    return labels.run(fill_labels(settings(name)), out/name, quiet)


def measured(name: str, out: Path) -> dict:
    "Run a study in a process of its own"
    start = time.monotonic()
    child = subprocess.Popen([sys.executable, __file__, '--one', name, '--out', str(out)])
    _, status, used = os.wait4(child.pid, 0)
    if status: sys.exit(f'{name} failed')
    return dict(study=name, processor=round(used.ru_utime + used.ru_stime), clock=round(time.monotonic() - start),
                gigabytes=round(used.ru_maxrss*1024/1e9, 2))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('studies', nargs='*', metavar='study', help=f'some of {", ".join(STUDIES)}; none: all')
    p.add_argument('--out', type=Path, default=Path('runs/real'))
    p.add_argument('--one', choices=STUDIES, help='run this study in this process')
    args = p.parse_args()
    if args.one:
        print(study(args.one, args.out, quiet=False))
        return
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.studies or STUDIES:
        line = json.dumps(measured(name, args.out))
        with (args.out/'costs.jsonl').open('a', encoding='utf-8') as f: print(line, file=f)
        print(line, flush=True)


if __name__ == '__main__': main()
