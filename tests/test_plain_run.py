"What a plain `pytest` runs: fewer cases of long tests, and no test lost altogether that is not marked so"
from types import SimpleNamespace

import pytest
from conftest import kept, spread

@pytest.mark.parametrize('n,most,which', [
    (1, 1, {0}), (5, 9, {0, 1, 2, 3, 4}), (9, 2, {0, 8}), (9, 3, {0, 4, 8}), (9, 1, {0}), (4, 3, {0, 2, 3}),
])
def test_cases_are_spread(n, most, which): assert spread(n, most) == which


def made(name: str, case: int, **marks):
    "A test as pytest collects it"
    find = lambda kind: SimpleNamespace(args=(marks[kind],)) if kind in marks else None  # noqa: E731
    return SimpleNamespace(path='a.py', cls=None, originalname=name, nodeid=f'a.py::{name}[{case}]', get_closest_marker=find)


def test_what_stays():
    items = [made('short', i) for i in range(3)] + [made('wide', i, cases=2) for i in range(5)] + [made('slow', 0, long=None)]
    assert [item.nodeid for item in kept(items)] == [*(f'a.py::short[{i}]' for i in range(3)), 'a.py::wide[0]', 'a.py::wide[4]']


def test_a_plain_run_and_a_named_one(pytestconfig):
    "This test is named, or all are wanted, or it is part of a plain run: then nothing is named"
    named = pytestconfig.args_source is pytestconfig.ArgsSource.ARGS or bool(pytestconfig.option.keyword)
    assert pytestconfig.option.all or not named
