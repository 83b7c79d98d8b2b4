"""Time per row of everything that is done per row beside the model: `python benchmarks/rows.py`

The parts of a study, on random preference pairs and on random items of five models, at 1,000, 10,000 and 100,000 rows. Where a model is
asked, its forward pass is replaced by the number of its tokens, so that only work per row of this package is measured: batches, blocks,
packing, gathering. Processor microseconds per row; a part whose time per row grows by more than a factor of 1.5 between the first size at
which it takes a tenth of a second and the last is marked. Writes rows.md.
"""
import argparse
import json
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from w2s.bench.machine import machine_line
from w2s.check.rows import contamination_check, duplicate_check
from w2s.compare.preference_data import RESPONSES, Reader, halves, readable, set_test_aside
from w2s.compare.preference_settings import WeakTeacher
from w2s.compare.preference_tables import preference_kind
from w2s.compare.tables import compare_models, recover_gaps
from w2s.data.hygiene import clean_text
from w2s.data.readers import read_preferences
from w2s.data.rows import to_pairs
from w2s.evaluate.calibration import calibration_line, cross_fitted
from w2s.evaluate.clusters import by_group
from w2s.evaluate.intervals import interval_table
from w2s.evaluate.paired import compare_results
from w2s.feedback.confidence import weighted
from w2s.feedback.preferences import label_pairs
from w2s.files.label_rows import word_margins
from w2s.io.disk import write_parquet
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.report.disagreements import disagreements
from w2s.train.logprobs import score
from w2s.train.loop import TrainSettings, plan_steps, preference_objective, train
from w2s.train.reference import tokens_hash
from w2s.train.tokens import encode_rows

WORDS = 'the fox runs over a river and sleeps under an old tree while birds sing about spring or winter days of rain'.split()
SLACK, ENOUGH = 1.5, .1 # growth of the time per row that is noise; seconds from which a time is one


def write_pairs(file: Path, rows: int) -> None:
    "Preference pairs, two to a prompt"
    rng = random.Random(0)
    def text(words: int) -> str: return ' '.join(rng.choices(WORDS, k=words))
    with file.open('w') as f:
        for i in range(rows):
            if not i % 2: prompt = f'Human: {text(6)} {i}? Assistant:'
            f.write(json.dumps(dict(prompt=prompt, chosen=' ' + text(8), rejected=' ' + text(rng.randint(4, 9)))) + '\n')


def stub(model: Any, sequences: Any, forward: Any) -> torch.Tensor:
    "In place of a forward pass: a number per sequence, with a gradient where something is trained"
    own = [p for p in model.parameters() if p.requires_grad][:1]
    out = -torch.tensor([float(len(s.ids)) + s.ids[-2] % 7 for s in sequences])
    return out + own[0].pow(2).sum()*out if own else out


def items_of(rows: int) -> pd.DataFrame:
    "Scores of five models and two seeds; half of the rows share a group with another"
    rng = np.random.default_rng(0)
    who = [('floor', 'pico', 'pico', ''), ('student', 'dpo', 'pico', 'base'), ('human', 'dpo', '', 'base'), ('ceiling', 'dpo', '', 'base'),
           ('baseline', 'untuned', '', 'base')]
    parts = [
        pd.DataFrame(dict(id=[f'id{i}' for i in range(rows)], seed=seed, role=r, method=m, weak=w, strong=s, task='', metric='accuracy',
                          value=rng.random(rows) < .6 + .05*n))
        for seed in range(2)
        for n, (r, m, w, s) in enumerate(who)
    ]
    return pd.concat(parts, ignore_index=True).astype({'value': float})


class Parts:
    "Times each part, with what the parts before it have made"
    def __init__(self, rows: int, folder: Path, base: Any):
        self.rows, self.folder, self.base, self.seconds = rows, folder, base, dict[str, float]()

    def time(self, name: str, work: Callable[[], Any]) -> Any:
        start = time.process_time()
        out = work()
        self.seconds[name] = time.process_time() - start
        return out

    def data(self) -> Any:
        "Text to splits"
        write_pairs(self.folder/'pairs.jsonl', self.rows)
        read = self.time('read a JSONL file', lambda: read_preferences(str(self.folder/'pairs.jsonl')))
        splits, report = self.time('check rows', lambda: clean_text(read.splits, read.refused, read.rows_read))
        whole = next(iter(splits.values()))
        tokens = self.time('tokenize', lambda: encode_rows(self.base.tokenizer, whole, RESPONSES, self.base.context))
        reader = Reader('pico', self.base.tokenizer, self.base.context)
        self.time('report on tokens', lambda: readable(splits, [reader], report, lambda r, d: tokens))
        train_rows, _ = self.time('part test rows', lambda: set_test_aside(splits))
        self.time('part halves', lambda: halves(train_rows, None, None, 0))
        self.time('check duplicates', lambda: duplicate_check(tokens.rows))
        texts = [p + c for p, c in zip(whole['prompt'][:], whole['chosen'][:], strict=True)]
        self.time('check test in train', lambda: contamination_check(texts[::2], texts[1::2]))
        return whole, tokens.rows

    def model(self, whole: Any, rows: Any) -> None:
        "Tokens to labels"
        self.time('hash tokens', lambda: tokens_hash(rows))
        goal = preference_objective(rows, np.zeros((len(rows), 2)))
        self.time('plan steps', lambda: plan_steps(goal, TrainSettings(batch_size=8), 0))
        with patch('w2s.train.loop.run_sequences', stub), patch('w2s.train.logprobs.run_sequences', stub):
            adapted, how = add_adapter(self.base, LoraSettings(rank=1)), TrainSettings(batch_size=64, checkpoint_every=10**6)
            self.time('train, batches of 64', lambda: train(adapted, goal, how, self.folder/'steps', quiet=True))
            adapted.unload()
            rewards = self.time('score', lambda: score(self.base.model, rows, quiet=True))
        pairs = self.time('order pairs', lambda: to_pairs(whole, 0))
        rewards = rewards + np.random.default_rng(0).normal(size=rewards.shape)
        labels = self.time('label pairs', lambda: label_pairs(pairs, rewards, 'weak:pico'))
        self.time('weigh labels', lambda: weighted(labels.rows))
        margins, human = rewards[:, 0] - rewards[:, 1], np.array(pairs['prob_a'][:])
        mended = self.time('calibrate', lambda: cross_fitted(margins, human, pairs['group'][:]))
        self.time('measure labels', lambda: calibration_line('', mended, human, groups=pairs['group'][:]))
        half = len(pairs)//2
        self.time('bag of words', lambda: word_margins(pairs.select(range(half)), pairs.select(range(half, len(pairs)))))

    def tables(self, whole: Any) -> None:
        "Scores to tables"
        items, kind = items_of(self.rows), preference_kind(WeakTeacher())
        groups = {f'id{i}': f'group{i//2}' for i in range(self.rows)}
        units = self.time('scores by group', lambda: by_group(items, groups))
        self.time('intervals', lambda: interval_table(units))
        self.time('differences', lambda: compare_models(units, kind))
        self.time('PGR', lambda: recover_gaps(units, kind))
        self.time('write items', lambda: write_parquet(items, self.folder/'items.parquet'))
        test = whole.remove_columns('id').add_column('id', [f'id{i}' for i in range(len(whole))])
        self.time('disagreements', lambda: disagreements(SimpleNamespace(items=items, kind=kind, extra={'test': test})))
        for name in ('a', 'b'):
            scores = pd.DataFrame(dict(id=range(self.rows), accuracy=np.random.default_rng(len(name)).random(self.rows)))
            scores.to_csv(self.folder/f'{name}.csv', index=False)
        self.time('compare two files', lambda: compare_results(str(self.folder/'a.csv'), str(self.folder/'b.csv')))


def measure(rows: int, base: Any) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        parts = Parts(rows, Path(folder), base)
        whole, encoded = parts.data()
        parts.model(whole, encoded)
        parts.tables(whole)
    return parts.seconds


def growth(seconds: dict[int, float]) -> float:
    "Time per row at the last size, as a multiple of that at the first size that takes long enough to be measured"
    known = [n for n, s in seconds.items() if s >= ENOUGH]
    return seconds[known[-1]]/known[-1]/(seconds[known[0]]/known[0]) if len(known) > 1 else float('nan')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--rows', nargs='+', type=int, default=[1_000, 10_000, 100_000])
    a = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    base = load_base('pico', LoadSettings('none', 'float32', device='cpu'))
    measure(100, base) # imports and caches
    found = {n: measure(n, base) for n in a.rows}
    lines = [f'| part | {" | ".join(f"{n:,} rows" for n in a.rows)} | growth |', f'|---|{"--:|"*len(a.rows)}--:|']
    for part in found[a.rows[0]]:
        seconds = {n: f[part] for n, f in found.items()}
        factor, cells = growth(seconds), ' | '.join(f'{1e6*s/n:,.0f}' for n, s in seconds.items())
        lines.append(f'| {part} | {cells} | {"–" if np.isnan(factor) else f"{factor:.2f}"}{" **more than linear**"*(factor > SLACK)} |')
    total = ' | '.join(f'{1e6*sum(f.values())/n:,.0f}' for n, f in found.items())
    lines.append(f'| all | {total} | {growth({n: sum(f.values()) for n, f in found.items()}):.2f} |')
    text = ['# Time per row', '', re.sub(r'\n(?!\n)', ' ', (__doc__ or '').split('\n\n')[1]).rsplit(' Writes', 1)[0], '',
            'Microseconds of processor time per row, one run. "–": not long enough to be measured at two sizes.', '', *lines, '',
            f'{machine_line()}; other work ran on the machine.']
    Path(__file__).with_suffix('.md').write_text('\n'.join(text) + '\n', encoding='utf-8')
    print('\n'.join(lines))


if __name__ == '__main__': main()
