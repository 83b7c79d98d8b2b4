"""Effects of the papers on the embedded world, over several seeds: python benchmarks/world_effects.py persona safety storage toxicity
--seeds 5 --out runs/effects

Each is a comparison of `w2s run` with one weak and one strong model, in its own folder under --out, so several processes may work side by
side; a killed one goes on where it stopped. Writes OUT/<effect>.csv (items) and OUT/<effect>.md (tables), and prints the tables."""
import argparse
import time
from pathlib import Path

import torch

from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.label_settings import fill_labels
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.experiments import demonstrations, labels, toxicity

EFFECTS = { # name: how it is run, its settings, what is set beside models and seeds
    'persona': (demonstrations.run, fill_demonstrations, dict(task='persona', n_labelled=120, n_unlabelled=600, n_test=400, examples=5)),
    'safety': (labels.run, fill_labels, dict(data='world:safety', n_labelled=60, n_unlabelled=600, n_test=400, methods='xent,confidence')),
    'storage': (
        labels.run,
        fill_labels,
        dict(data='world:storage', n_labelled=300, n_unlabelled=600, n_test=400, methods='xent,confidence'),
    ),
    'legal': (labels.run, fill_labels, dict(data='world:legal', n_labelled=300, n_unlabelled=600, n_test=400, methods='xent,confidence')),
    'toxicity': (toxicity.run, fill_toxicity, dict(n_labelled=200, n_unlabelled=500, n_test=60, methods='naive,dpo')),
}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('effects', nargs='+', choices=EFFECTS)
    p.add_argument('--weak', default='pico')
    p.add_argument('--strong', default='base')
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--out', type=Path, default=Path('runs/effects'))
    p.add_argument('--trial', action='store_true', help='test on people and things that the real test never has: for choosing settings')
    args = p.parse_args()
    torch.set_num_threads(1)
    for effect in args.effects:
        start, cpu = time.time(), time.process_time()
        run, fill, given = EFFECTS[effect]
        result = run(fill(given | dict(weak=args.weak, strong=args.strong, seeds=args.seeds, trial=args.trial)), args.out/effect)
        result.items.to_csv(args.out/f'{effect}.csv', index=False)
        tables = dict(means=result.intervals, differences=result.differences, pgr=result.pgr)
        text = '\n\n'.join(f'## {effect}: {name}\n\n{t.round(3).to_string(index=False)}' for name, t in tables.items())
        (args.out/f'{effect}.md').write_text(text + '\n', encoding='utf-8')
        print(f'{text}\n\n{effect}: {time.time() - start:.0f} s, of them {time.process_time() - cpu:.0f} s of processor', flush=True)


if __name__ == '__main__': main()
