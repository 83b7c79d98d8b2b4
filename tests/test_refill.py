"Rows that have ended are replaced, common beginnings are read once: the texts are those of the plain way. Mutations are named"
import os
from dataclasses import replace

import numpy as np
import pytest
from families import FAMILIES, IMAGES, make_model

from w2s.errors import ConfigError, W2SWarning
from w2s.models.load import LoadSettings, load_base
from w2s.models.places import SWITCH
from w2s.train import writing
from w2s.train.beginnings import shared_beginnings
from w2s.train.generate import GenerateSettings, plan_pools, respond
from w2s.train.writing import joins

FULL = LoadSettings('none', 'float32')
OFF = dict(packing='off', refill='off')
REFUSED = ('mamba', 'mamba2', 'falcon_mamba', 'rwkv', 'recurrent_gemma', 'minimax', 'xlstm') # write nothing at all
WRITERS = [f for f in FAMILIES if f not in (*REFUSED, *IMAGES)]
JOIN, NOT = ('llama', 'gpt2', 'opt', 'bloom', 'mpt', 'falcon', 'mixtral', 'deepseek_v3'), ('mistral', 'qwen3_5', 'lfm2')
TRIED = WRITERS if os.environ.get('W2S_FAMILIES') == 'all' else (*JOIN, *NOT)
GREEDY = GenerateSettings(max_tokens=20, temperature=0, stop=('q', 'z'), token_budget=300)
SAMPLED = GenerateSettings(max_tokens=20, temperature=1.2, stop=('q', 'z'), token_budget=300)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    made = {}
    def get(name, load=FULL):
        if (name, load) not in made:
            made[name, load] = load_base(make_model(name, tmp_path_factory.mktemp('model')/'m'), load, device='cpu')
        return made[name, load]
    return get


def letters_of(n, seed):
    rng = np.random.default_rng(seed)
    return ''.join(rng.choice(list('abcdefghijklmnop '), n))


BEGUN = [letters_of(45, 1) + letters_of(n, 100 + n) for n in (3, 9, 1, 17, 4, 12)]
MIXED = [*(letters_of(n, n) for n in (3, 17, 30, 1, 22)), *BEGUN, *(letters_of(60, 2) + x for x in 'ab'), letters_of(20, 1), BEGUN[0]]


def passes(base, prompts, settings, **switches):
    "Texts, and what went through the model: (sequences, tokens) of each pass"
    seen, before = [], {k: getattr(base.model, SWITCH[k], 'auto') for k in switches}
    hook = base.model.get_decoder().register_forward_pre_hook(lambda m, a, k: seen.append(tuple(k['input_ids'].shape)), with_kwargs=True)
    for k, v in switches.items(): setattr(base.model, SWITCH[k], v)
    try: return respond(base.model, base.tokenizer, prompts, settings, 3, quiet=True, ids=[f'{i}' for i in range(len(prompts))]), seen
    finally:
        hook.remove()
        for k, v in before.items(): setattr(base.model, SWITCH[k], v)


def read(seen): return [(rows, tokens) for rows, tokens in seen if tokens > 1]


@pytest.mark.cases(4)
@pytest.mark.parametrize('name', TRIED)
def test_texts_of_every_family_are_those_of_the_plain_way(bases, name):
    """Rows padded on the left that end at any time; families that keep a window or a state go the plain way. Mutations: the random number
    of the step in place of the row's; a beginning that is not moved to its place; positions from 0 behind a beginning"""
    base, lengths = bases(name), set()
    passes(base, MIXED[:1], GREEDY) # what is tried once per model
    for settings in (GREEDY, replace(SAMPLED, samples=2, top_k=9, no_repeat_ngram=3)):
        plain, slow = passes(base, MIXED, settings, **OFF)
        fast, seen = passes(base, MIXED, settings)
        assert fast == plain and (seen == slow) is not joins(base.model)
        lengths |= {r.tokens for row in plain for r in row}
    assert len(lengths) > 4


def test_families_of_both_kinds_were_tried(bases):
    "Mutation: `joins` says no to all"
    assert all(joins(bases(name).model) for name in JOIN) and not any(joins(bases(name).model) for name in NOT)


@pytest.mark.parametrize('load', [FULL, LoadSettings('nf4', 'float32'), LoadSettings('nf4', 'bfloat16'), LoadSettings('none', 'bfloat16')],
                         ids=['fp32', 'nf4 fp32', 'nf4 bf16', 'bf16'])
def test_each_switch_alone_changes_no_text(bases, load):
    base, settings = bases('llama', load), replace(SAMPLED, samples=2)
    whole = passes(base, MIXED, settings)[0]
    for off in (OFF, dict(packing='off'), dict(refill='off')): assert passes(base, MIXED, settings, **off)[0] == whole


def test_rows_that_have_ended_are_replaced_within_the_budget(bases):
    "Mutations: most is not acted on; a batch after the other"
    base, settings = bases('llama'), replace(SAMPLED, max_tokens=40, token_budget=64*6)
    many = [letters_of(n % 20 + 4, n) for n in range(40)]
    slow, plain = passes(base, many, settings, **OFF)
    fast, seen = passes(base, many, settings)
    assert fast == slow and len(seen) < .8*len(plain)
    assert max(rows for rows, _ in seen) == 8 # of 8 + 40 tokens
    one, alone = passes(base, many[:6], replace(settings, token_budget=1))
    assert one == fast[:6] and max(rows for rows, _ in alone) == 2 # a row by itself is computed twice


def test_a_beginning_is_read_once(bases):
    "12 prompts, one of 160 tokens; and pairs of prompts that have more in common. Mutations: the least saving not asked; one group for all"
    base, start = bases('qwen3'), letters_of(160, 5)
    many = [start + letters_of(n + 1, n) for n in range(12)]
    wide = replace(SAMPLED, token_budget=8192)
    passes(base, many, wide)
    slow, plain = passes(base, many, wide, packing='off')
    fast, seen = passes(base, many, wide)
    assert fast == slow and read(seen)[0] == (1, 160)
    assert sum(n*t for n, t in read(seen)) <= 160 + 12*24 < .3*sum(n*t for n, t in read(plain))
    twins = [letters_of(40, 6) + letters_of(100, n//2) + x + letters_of(9, n) for n, x in enumerate('abababab')]
    fast, seen = passes(base, twins, wide)
    assert fast == passes(base, twins, wide, packing='off')[0] and [s for s in read(seen) if s[0] == 1] == [(1, 136)]*4


def test_groups_save_the_most():
    "Against all ways to cut the sorted prompts into groups. Mutation: parts that save less than the whole are taken"
    rng = np.random.default_rng(0)
    def saved(prompts): # by the most that any cut saves
        order, best = sorted(prompts), 0
        for cuts in range(2**(len(order) - 1)):
            parts, part = [], [order[0]]
            for at, p in enumerate(order[1:]):
                if cuts >> at & 1: parts, part = [*parts, part], [p]
                else: part = [*part, p]
            best = max(best, sum((len(x) - 1)*(len(os.path.commonprefix([*x, x[0][:-1]]))//8*8) for x in [*parts, part]))
        return best
    for _ in range(40):
        prompts = [[int(x) for x in np.repeat(rng.integers(0, 2, 5), 16)] + [9, i] for i in range(6)]
        found = shared_beginnings(prompts, 1)
        assert all(tuple(p[:len(b)]) == b for p, b in zip(prompts, found, strict=True))
        assert sum(map(len, found)) - sum(map(len, {b for b in found if b})) == saved(prompts)


def test_a_model_that_cannot_read_on_is_said_and_read_whole(bases, monkeypatch):
    "Mutation: the trial always passes"
    base, behind = bases('llama'), writing._behind
    def wrong(model, before, lengths, to): # beginnings of other prompts
        cache, start = behind(model, before, lengths, to)
        for layer in cache.layers: layer.values = -layer.values
        return cache, start
    expected = passes(base, BEGUN*2, SAMPLED)[0]
    monkeypatch.setattr(writing, '_behind', wrong)
    writing._BEHIND.clear()
    with pytest.warns(W2SWarning, match='common beginning are read whole'): assert passes(base, BEGUN*2, SAMPLED)[0] == expected
    writing._BEHIND.clear()


def test_pools_and_switches():
    assert plan_pools([[0, 1], [2], [3]], 1) == [[0, 1, 2, 3]] and plan_pools([[0, 1], [2], [3]], 2) == [[0, 1], [2], [3]]
    assert [len(p) for p in plan_pools([[i] for i in range(19)])] == [8, 8, 3] and plan_pools([]) == []
    with pytest.raises(ConfigError, match='value of refill'): LoadSettings(refill='on')
