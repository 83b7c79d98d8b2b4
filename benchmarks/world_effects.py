"""Effects of the papers on the embedded world, over several seeds: python benchmarks/world_effects.py voice safety storage scenes --seeds 0 1 2 3 4 --out runs/effects

Each effect has its own folder under --out, so several processes may work side by side on different effects; a killed one goes on where it stopped.
Writes OUT/<effect>.csv (items) and OUT/<effect>.md (tables), and prints the tables."""
import argparse
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from w2s.evaluate.intervals import difference_table, interval_table
from w2s.evaluate.pgr import pgr_table
from w2s.compare.effects import EFFECTS, run_effect
from w2s.compare.lab import DEFAULTS
from w2s.compare.stages import lock

VOICE = dict(floor=('floor', 'sft gold answers'), naive=('student', 'sft weak answers'), refined=('student', 'sft refined answers'), ceiling=('ceiling', 'sft gold answers'))
LABELS = dict(floor=('floor', 'sft gold labels'), soft=('student', 'sft weak labels'), confidence=('student', 'sft weak labels, confidence loss'), ceiling=('ceiling', 'sft gold labels'))
SCENES = dict(before=('baseline', 'untuned'), sft=('student', 'sft weak lines'), dpo=('student', 'dpo weak labels'), human=('human', 'dpo human labels'), ceiling=('ceiling', 'sft kind lines'),
              weak_sft=('floor', 'sft kind lines'), weak_dpo=('floor', 'dpo human labels'))


def tables(effect: str, items: pd.DataFrame) -> dict[str, pd.DataFrame]:
    "Means with intervals, differences on the same rows, and PGR or why there is none"
    out = dict(means=interval_table(items))
    if effect == 'scenes':
        m = SCENES
        pairs = [(m['before'], m['sft']), (m['sft'], m['dpo']), (m['dpo'], m['human']), (m['sft'], m['ceiling']), (m['weak_sft'], m['sft']), (m['weak_dpo'], m['dpo'])]
        return out | dict(differences=pd.concat([difference_table(items, metric, pairs) for metric in ('toxicity', 'worst')], ignore_index=True))
    m = VOICE if effect == 'voice' else LABELS
    students = [m[k] for k in m if k not in ('floor', 'ceiling')]
    pairs = [(s, m['floor']) for s in students] + [(students[1], students[0])] + [(m['ceiling'], s) for s in students]
    return out | dict(differences=difference_table(items, 'accuracy', pairs), pgr=pgr_table(items, [(m['floor'], s, m['ceiling']) for s in students]))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('effects', nargs='+', choices=EFFECTS)
    p.add_argument('--weak', default='pico')
    p.add_argument('--strong', default='base')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2, 3, 4])
    p.add_argument('--out', type=Path, default=Path('runs/effects'))
    p.add_argument('--trial', action='store_true', help='test on people and things that the real test never has: for choosing settings')
    args = p.parse_args()
    torch.set_num_threads(1)
    for effect in args.effects:
        start, cpu = time.time(), time.process_time()
        with lock(args.out/effect):
            items = pd.concat([run_effect(effect, args.weak, args.strong, seed, args.out/effect, replace(DEFAULTS, trial=args.trial),
                                          lambda line, effect=effect, seed=seed: print(f'  {effect}, seed {seed}, {line}', flush=True)) for seed in args.seeds], ignore_index=True)
        items.to_csv(args.out/f'{effect}.csv', index=False)
        text = '\n\n'.join(f'## {effect}: {name}\n\n{t.round(3).to_string(index=False)}' for name, t in tables(effect, items).items())
        (args.out/f'{effect}.md').write_text(text + '\n', encoding='utf-8')
        print(f'{text}\n\n{effect}: {time.time() - start:.0f} s, of them {time.process_time() - cpu:.0f} s of processor', flush=True)


if __name__ == '__main__': main()
