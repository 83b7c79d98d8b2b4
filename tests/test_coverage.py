"A small part of benchmarks/coverage.py: how often 95 % intervals hold the truth, on studies whose truth is known"
import importlib.util
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).parents[1]/'benchmarks'/'coverage.py'
NOISE = 2.6*(.05*.95/400)**.5 # of a share of 400 studies


@pytest.fixture(scope='module')
def bench():
    spec = importlib.util.spec_from_file_location('coverage_benchmark', FILE) # not `coverage`, which is a package
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='module')
def table(bench):
    return bench.coverage_table(
        400, 300, quiet=True, seeds=(1, 3, 5), luck=('none', 'strong'), group=(1, 3), mean=(0.02, 0.5), rows=(50, 200)
    )


def part(table, **by): return table[np.logical_and.reduce([table[k].isin(v) for k, v in by.items()])]


def test_half_of_right_answers(table):
    "93 to 97 % where theory says so: no luck, or three seeds and more"
    for of in (dict(luck=['none']), dict(seeds=[3, 5])):
        found = part(table, mean=[.5], **of)
        assert found.now.between(.93 - NOISE, .975 + NOISE).all(), found[~found.now.between(.93 - NOISE, .975 + NOISE)]


def test_rare_answers(table):
    "2 of 100 are right: seldom too narrow where some 10 right ones are expected, and never without width"
    found = part(table, mean=[.02], rows=[200], seeds=[3, 5], group=[1])
    assert (found.now > .93 - NOISE).all() and found.now.mean() > .945
    assert part(table, mean=[.02]).flat.max() == 0 == table.flat.max() and table.outside.max() == 0


def test_one_seed_cannot_know_the_luck_of_seeds(table):
    "No method could; so it is said beside the interval"
    found = part(table, seeds=[1], luck=['strong'], quantity=['mean'], mean=[.5], rows=[200])
    assert (found.now < .8).all()


def test_it_is_better_than_what_was_there_before(table):
    "In the mean over kinds and in the worst kind"
    found = table[(table.luck == 'none') | (table.seeds > 1)]
    assert found.now.min() > found.before.min() + .05 and (found.now - .95).abs().mean() < (found.before - .95).abs().mean() - .01


def test_rows_of_a_prompt_are_not_rows_of_their_own(table):
    found = part(table, group=[3], luck=['none'], mean=[.5], quantity=['mean'], seeds=[3, 5])
    assert (found.ungrouped < .9).all() and (found.now > .93 - NOISE).all()


def test_the_written_table_is_of_the_whole(bench):
    "coverage.md was made by the kinds that stand in the file"
    text = FILE.with_suffix('.md').read_text(encoding='utf-8')
    kinds = len(bench.SEEDS)*len(bench.LUCK)*len(bench.GROUPS)*len(bench.MEANS)*len(bench.ROWS)
    assert f'{kinds} kinds' in text
