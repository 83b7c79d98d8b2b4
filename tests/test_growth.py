"Ten times the rows take ten times the time, and not a hundred: what is done per row does not look at all the others"
import time

import numpy as np
import pandas as pd
import pytest

from w2s.check.rows import duplicate_check
from w2s.data.hygiene import clean_text
from w2s.data.rows import make_rows, to_pairs
from w2s.data.splits import group_split
from w2s.evaluate.clusters import by_group
from w2s.feedback.preferences import label_pairs
from w2s.models.reading_order import short_batches
from w2s.train.batches import epoch_batches, micro_batches
from w2s.train.packing import cut_packed
from w2s.train.reference import tokens_hash
from w2s.train.tokens import Encoded, EncodedRow

SLACK = 3 # times the time per row: noise, caches; a quadratic part has 10


def sequences(n): return [Encoded((1, 2, 3, i % 500 + 4, i // 500 + 4), 2) for i in range(n)]
def encoded(n): return [EncodedRow(str(i), (s, s), 0) for i, s in enumerate(sequences(n))]
def preferences(n):
    return make_rows([dict(prompt=f'Question {i//2}?', chosen=f'yes {i}', rejected=f'no {i}') for i in range(n)], 'preferences')
def items(n):
    who = dict(role='student', method='dpo', weak='pico', strong='base', task='', seed=0, metric='accuracy')
    return pd.DataFrame(dict(id=[f'row{i}' for i in range(n)], value=1.) | who), {f'row{i}': f'group{i//2}' for i in range(n)}


PARTS = { # what is timed -> rows of the smaller size, what it works on, the work
    'blocks of a pass, packed, one row each': (5000, lambda n: [(s,) for s in sequences(n)],
                                               lambda rows: cut_packed(range(len(rows)), rows, 5)),
    'blocks of a pass, padded, one row each': (5000, lambda n: [5]*n, lambda lengths: micro_batches(range(len(lengths)), lengths, 5)),
    'steps of pretraining, one document each': (2000, lambda n: [[1]*9]*n, lambda docs: short_batches(docs, 9, np.random.default_rng(0))),
    'steps of an epoch': (5000, lambda n: [n % 97 for n in range(n)], lambda lengths: epoch_batches(lengths, 2, 0, 0)),
    'hash of tokens': (2000, encoded, tokens_hash),
    'repeated examples': (2000, encoded, duplicate_check),
    'checks of rows': (500, preferences, lambda rows: clean_text({'train': rows})),
    'parting of rows': (500, preferences, lambda rows: group_split(rows, {'a': .5, 'b': .5})),
    'order of pairs': (500, preferences, to_pairs),
    'weak labels': (500, lambda n: to_pairs(preferences(n)), lambda rows: label_pairs(rows, np.ones((len(rows), 2)), 'weak')),
    'scores by group': (2000, items, lambda given: by_group(*given)),
}


def seconds(work, given):
    "The shorter of two times, of the processor"
    def once():
        start = time.process_time()
        work(given)
        return time.process_time() - start
    return min(once(), once())


@pytest.mark.cases(7)
@pytest.mark.parametrize('part', PARTS)
def test_time_per_row_does_not_grow(part):
    n, make, work = PARTS[part]
    few, many = seconds(work, make(n)), seconds(work, make(10*n))
    assert many <= 10*SLACK*max(few, 5e-3), f'{part}: {1e6*few/n:.1f} µs per row of {n:,}, {1e5*many/n:.1f} of {10*n:,}'
