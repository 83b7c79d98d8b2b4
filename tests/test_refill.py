"Rows that have ended are replaced, common beginnings are read once: the texts are those of the plain way. Mutations are named"
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import FAMILIES, IMAGES, make_model

from w2s.errors import ConfigError
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.places import SWITCH
from w2s.train import generate as page
from w2s.train.beginnings import UNIT, common, shared_beginnings
from w2s.train.generate import GenerateSettings, plan_pools, respond
from w2s.train.writing import PAD, joins

FULL = LoadSettings('none', 'float32')
OFF = dict(packing='off', refill='off')
REFUSED = ('mamba', 'mamba2', 'falcon_mamba', 'rwkv', 'recurrent_gemma', 'minimax', 'xlstm') # write nothing at all
WRITERS = [f for f in FAMILIES if f not in (*REFUSED, *IMAGES)]
GREEDY = GenerateSettings(max_tokens=28, temperature=0, stop=('q', 'z'), token_budget=200)
SAMPLED = GenerateSettings(max_tokens=28, temperature=1.2, stop=('q', 'z'), token_budget=200)


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


ALONE = [letters_of(n, n) for n in (3, 17, 9, 30, 1, 12, 5, 22, 41, 8, 16, 2, 25)]
BEGUN = [letters_of(45, 1) + letters_of(n, 100 + n) for n in (3, 9, 1, 17, 4, 30, 12)]
MIXED = [*ALONE[:4], *BEGUN, *(letters_of(60, 2) + x for x in 'ab'), letters_of(20, 1), BEGUN[0]]


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


@pytest.mark.parametrize('name', WRITERS)
def test_texts_of_every_family_are_those_of_the_plain_way(bases, name):
    """Greedy and sampled, rows padded on the left, that end at any time. Mutations: new rows join at any step with the positions of the
    batch; the random number of the step in place of the row's; the mask of a beginning not moved"""
    base = bases(name)
    for settings in (GREEDY, SAMPLED, replace(SAMPLED, samples=3, top_k=8, no_repeat_ngram=2)):
        plain, slow = passes(base, MIXED, settings, **OFF)
        fast, seen = passes(base, MIXED, settings)
        assert fast == plain
        if not joins(base.model): assert seen == slow
        elif settings.samples == 1: assert sum(rows*tokens for rows, tokens in read(seen)) < .8*sum(rows*tokens for rows, tokens in read(slow))
    if joins(base.model): assert len({r.tokens for row in plain for r in row}) > 4 and len(seen) < len(slow)


def test_families_of_both_kinds_were_tried(bases):
    "Mutation: `joins` says no to all"
    can = {name for name in WRITERS if joins(bases(name).model)}
    assert {'llama', 'gpt2', 'opt', 'bloom', 'falcon', 'qwen3', 'gptj'} <= can and not can & {'mistral', 'qwen3_5', 'lfm2', 'jamba', 'gpt_neo'}


@pytest.mark.parametrize('load', [FULL, LoadSettings('nf4', 'float32'), LoadSettings('nf4', 'bfloat16'), LoadSettings('none', 'bfloat16')],
                         ids=['fp32', 'nf4 fp32', 'nf4 bf16', 'bf16'])
@pytest.mark.parametrize('switch', ['packing', 'refill'])
def test_each_switch_alone_changes_no_text(bases, load, switch):
    base = bases('llama', load)
    for settings in (SAMPLED, replace(SAMPLED, samples=2), GREEDY):
        assert passes(base, MIXED, settings)[0] == passes(base, MIXED, settings, **{switch: 'off'})[0]
