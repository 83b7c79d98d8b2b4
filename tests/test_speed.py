"Every way to be faster, against the plain one: log-probs, gradients, what is trained; and that the switch by its name turns it off"
import gzip
import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from families import FAMILIES, make_model
from peft import LoraConfig, get_peft_model

from w2s.errors import ConfigError
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base, load_tokenizer, set_mode
from w2s.models.merged import Merged, merged
from w2s.train.batches import block, epoch_batches, length_parts
from w2s.train.checkpoints import trainable
from w2s.train.logprobs import cut_for, response_logps, run_sequences, score, token_logps
from w2s.train.loop import TrainSettings, preference_objective, sft_objective, step_gradient, train
from w2s.train.packed_models import packs, why_not_packed
from w2s.train.packing import cut_packed, pack, prompt_key
from w2s.train.tokens import Encoded, EncodedRow, encode_rows

FULL, PLAIN = LoadSettings('none', 'float32'), dict(packing='off', merging='off')
DATA = Path(__file__).parents[2]/'shared'/'data'/'hh_helpful'/'helpful_train_gt.jsonl.gz'


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    home, made = tmp_path_factory.mktemp('speed'), {}
    def folder(name):
        if name not in made: made[name] = make_model(name, home/name.replace(' ', '-'))
        return made[name]
    return folder


def shaken(model, size=.05):
    draw = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if 'lora_B' in n: p.data = size*torch.randn(p.shape, generator=draw).to(p.dtype)
    return model


def sequence(draw, n, start, prompt=()):
    return Encoded((*prompt, *torch.randint(3, 90, (n - len(prompt),), generator=draw).tolist()), start)


def mixed(top=60):
    "Prompts in common of two and of three, across rows too; short prompts, one token, an empty response, two equal texts"
    draw = torch.Generator().manual_seed(3)
    a, b = (tuple(torch.randint(3, 90, (n,), generator=draw).tolist()) for n in (20, 9))
    rows = [
        [sequence(draw, 20 + k, 20, a) for k in (1, 14)],
        [sequence(draw, 9 + k, 9, b) for k in (5, 30)],
        [sequence(draw, 28, 20, a), sequence(draw, 12, 4)],
        [sequence(draw, top, top - 3), sequence(draw, 2, 1)],
        [Encoded((7, 8), 1), sequence(draw, 9, 9, b)],
    ]
    rows.append([rows[0][0], rows[0][0]])
    return [tuple(r) for r in rows]


def gap(a, b): return ((a - b).norm()/b.norm().clamp(min=1e-6)).item()


# --- packing

# full attention in every layer, or a sliding window: must be packed
WHOLE = [
    'llama', 'gpt2', 'opt', 'pythia', 'mixtral', 'qwen3_moe', 'granite', 'cohere', 'olmoe', 'deepseek_v3', 'phi3', 'stablelm', 'mistral',
    'gemma3 nested', 'cohere2',
]


@pytest.mark.parametrize('name', FAMILIES)
def test_packed_or_padded_the_numbers_are_the_same(folders, name):
    "Log-probs of every family, with sequences longer than any window; what cannot be packed is padded, never wrong"
    base = load_base(folders(name), FULL, device='cpu')
    flat = [s for r in mixed() for s in r]
    with warnings.catch_warnings(action='ignore'), torch.no_grad():
        ours = run_sequences(base.model, flat, response_logps)
        alone = torch.cat([response_logps(base.model, block([s])) for s in flat])
    assert (ours - alone).abs().max() < 2e-5*max(1, alone.abs().max()), why_not_packed(base.model)
    if name in WHOLE: assert packs(base.model), why_not_packed(base.model)


@pytest.mark.parametrize(
    'name',
    [
        'gemma2',
        'gpt_oss',
        'llama4',
        'bloom',
        'mpt',
        'mamba',
        'rwkv',
        'recurrent_gemma',
        'jamba',
        'qwen3_next',
        'gpt_neo',
    ],
)
def test_other_attention_is_never_packed(folders, name):
    "Chunks, sinks, caps, biases by distance, recurrence"
    with warnings.catch_warnings(action='ignore'): assert not packs(load_base(folders(name), FULL, device='cpu').model)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'opt', 'pythia', 'mixtral', 'mistral', 'gemma3 nested'])
@pytest.mark.parametrize('kind', ['dpo', 'sft'])
def test_packed_or_padded_the_gradients_are_the_same(folders, name, kind):
    "Of every LoRA matrix, in one block and in several"
    rows, found = [EncodedRow(str(i), r, 0) for i, r in enumerate(mixed())], []
    rows = [r for r in rows if all(s.response for s in r.sequences)]
    for way, budget in (({}, 1 << 20), ({}, 40), ({}, 1), (PLAIN, 1 << 20)):
        base = load_base(folders(name), replace(FULL, **way), device='cpu')
        model = shaken(add_adapter(base, LoraSettings(rank=2)))
        goal = (
            preference_objective(rows, np.full((len(rows), 2), -50.0), weights=np.linspace(0.5, 2, len(rows)))
            if kind == 'dpo'
            else sft_objective(rows)
        )
        note = step_gradient(model, goal, range(len(rows)), budget)
        found.append((note['loss'], {n: p.grad for n, p in trainable(model).items()}))
        assert packs(model) == (not way)
    for loss, grads in found[:-1]:
        assert abs(loss - found[-1][0]) < 1e-5*max(1, abs(loss))
        assert max(gap(grads[n], g) for n, g in found[-1][1].items()) < 1e-5


def test_a_shared_prompt_stands_once():
    "Tokens in the row are counted: each prompt once, short ones with each response"
    rows = mixed()
    flat = [s for r in rows for s in r]
    data = pack(flat)
    whole = sum(len(s.ids) for s in flat)
    again = {}
    for s in flat: again.setdefault(prompt_key(s), []).append(s.start)
    saved = sum(v[0]*(len(v) - 1) for k, v in again.items() if k is not None)
    assert data.input_ids.numel() == whole - saved < .8*whole and data.count == len(flat)
    assert [data.input_ids[0, i].item() for i in data.last] == [s.ids[-1] for s in flat]
    for n, s in enumerate(flat): assert data.target[data.sequence == n].tolist() == list(s.ids[max(s.start, 1):])
    parts = cut_packed(range(len(rows)), rows, 50)
    assert sorted(i for p in parts for i in p) == list(range(len(rows))) and len(parts) > 2
    for p in parts: assert len(p) == 1 or pack([s for i in p for s in rows[i]]).input_ids.numel() <= 50


@pytest.mark.parametrize('way', ['packing', 'merging'])
def test_the_switch_turns_it_off(folders, way):
    seen = []
    def forward(model, data):
        seen.append((type(data).__name__, sum('forward' in vars(m) for m in model.modules()) > 0))
        return response_logps(model, data)
    rows = [EncodedRow('0', mixed()[0], 0)]
    for settings in (FULL, replace(FULL, **{way: 'off'})):
        model = shaken(add_adapter(load_base(folders('llama'), settings, device='cpu'), LoraSettings(rank=2)))
        score(model, rows, forward=forward, quiet=True)
    assert seen[0] == ('Packed', True)
    assert seen[1] == (('Block', True) if way == 'packing' else ('Packed', False))
    with pytest.raises(ConfigError, match=f'value of {way}'): LoadSettings(**{way: 'on'})


def test_checkpointing_is_padded(folders):
    "Layers are run again when nobody knows the spans any more"
    model = shaken(add_adapter(load_base(folders('llama'), FULL, device='cpu'), LoraSettings(rank=2)))
    assert packs(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    assert not packs(model)
    model.gradient_checkpointing_disable()
    assert packs(model)


# --- padding, counted

@pytest.fixture(scope='module')
def dialogues():
    if not DATA.exists(): pytest.skip('no dialogues here')
    tok, rows = load_tokenizer('base'), []
    for line in gzip.open(DATA, 'rt', encoding='utf-8').readlines()[:400]:
        r = json.loads(line)
        k = r['chosen'].rfind('\n\nAssistant:') + len('\n\nAssistant:')
        if r['rejected'].startswith(r['chosen'][:k]):
            rows.append(dict(id=str(len(rows)), prompt=r['chosen'][:k], chosen=r['chosen'][k:], rejected=r['rejected'][k:]))
    return [r.sequences for r in encode_rows(tok, Dataset.from_list(rows), ('chosen', 'rejected'), 512).rows]


def steps_of(rows): return epoch_batches([max(len(s.ids) for s in r) for r in rows], 8, 0, 0)


def test_positions_per_token_of_a_step(dialogues):
    "Blocks of whole pairs, as before; parts of like length; packed, with prompts once"
    steps, real = steps_of(dialogues), sum(len(s.ids) for r in dialogues for s in r)
    flat = [[len(s.ids) for i in b for s in dialogues[i]] for b in steps]
    pairs = sum(len(f)*max(f) for f in flat)/real
    parts = sum(len(p)*f[p[0]] for f in flat for p in length_parts(f))/real
    packed = sum(pack([s for i in p for s in dialogues[i]]).input_ids.numel() for b in steps for p in cut_packed(b, dialogues, 2048))/real
    assert pairs > 1.25 and parts < 1.1 and packed < .95, (pairs, parts, packed)


def test_positions_per_token_of_a_pass(folders, dialogues):
    "Scoring of few rows and of many"
    for n in (16, 100, len(dialogues)):
        flat = [(s,) for r in dialogues[:n] for s in r]
        real, base = sum(len(s.ids) for (s,) in flat), load_base(folders('llama'), replace(FULL, packing='off'), device='cpu')
        padded = sum(
            len(q) * len(flat[p[q[0]]][0].ids)
            for p in cut_for(base.model, flat)(range(len(flat)), 8192)
            for q in length_parts([len(flat[i][0].ids) for i in p])
        )
        assert padded < 1.1*real
        assert sum(pack([flat[i][0] for i in p]).input_ids.numel() for p in cut_packed(range(len(flat)), flat, 8192)) < real


class Watched(list):
    "Counts how often something is looked up, and refuses to be walked over"
    looked = 0
    def __getitem__(self, i):
        self.looked += 1
        return super().__getitem__(i)
    def __iter__(self): raise AssertionError('a step walks over all rows')


@pytest.mark.parametrize('way', [{}, PLAIN])
def test_a_step_looks_at_its_own_rows_only(folders, way):
    "What a step costs does not grow with the data set"
    model = shaken(add_adapter(load_base(folders('llama'), replace(FULL, **way), device='cpu'), LoraSettings(rank=2)))
    rows = [EncodedRow(str(i), r, 0) for i, r in enumerate(mixed()[:3])]*50
    goal = replace(
        sft_objective(rows),
        sequences=Watched(r.sequences[:1] for r in rows),
        sizes=Watched([5] * len(rows)),
        ids=Watched(str(i) for i in range(len(rows))),
    )
    step_gradient(model, goal, [3, 77, 149], 60)
    assert 0 < goal.sequences.looked < 60


# --- merged weights

def trained(folder, settings, home, lora, seed=0):
    base = load_base(folder, settings, device='cpu')
    rows = [EncodedRow(str(i), r, 0) for i, r in enumerate(mixed()) if all(s.response for s in r)]
    model = add_adapter(base, lora)
    history = train(
        model,
        preference_objective(rows, score(base.model, rows, quiet=True)),
        TrainSettings(batch_size=3, epochs=3, learning_rate=1e-3, warmup=0, optimizer='adamw'),
        home,
        seed,
        quiet=True,
    )
    weights = torch.cat([p.detach().flatten() for p in trainable(model).values()])
    # experts in 4 bits have one of their own
    assert not any('forward' in vars(m) for m in model.modules() if not hasattr(m, 'parametrizations'))
    model.unload()
    return weights, history


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'opt', 'mixtral'])
@pytest.mark.parametrize('quantize', ['none', 'nf4'])
def test_what_is_trained_is_the_same(folders, tmp_path, name, quantize):
    lora, settings = LoraSettings(rank=4), LoadSettings(quantize, 'float32', nf4_share=0)
    ours, history = trained(folders(name), settings, tmp_path/'fast', lora)
    plain, before = trained(folders(name), replace(settings, **PLAIN), tmp_path/'plain', lora)
    assert gap(ours, plain) < 1e-4 and np.allclose(history.loss, before.loss, atol=1e-5)
    again, _ = trained(folders(name), settings, tmp_path/'again', lora)
    assert torch.equal(again, ours)


def gradients(model, ids):
    out = model.get_base_model()(input_ids=ids).logits
    return [out.detach(), *torch.autograd.grad((out**2).sum(), list(trainable(model).values()), allow_unused=True)]


@pytest.mark.parametrize('quantize', ['none', 'nf4'])
@pytest.mark.parametrize('name', ['llama', 'opt', 'qwen2_moe', 'pythia'])
def test_gradients_of_merged_layers(folders, name, quantize):
    base = load_base(folders(name), LoadSettings(quantize, 'float32', nf4_share=0), device='cpu')
    model = shaken(add_adapter(base, LoraSettings(rank=4)))
    ids = torch.randint(3, 90, (3, 11), generator=torch.Generator().manual_seed(1))
    plain = gradients(model, ids)
    with merged(model) as layers: ours = gradients(model, ids)
    assert len(layers.adapted) > 3
    for a, b in zip(ours, plain, strict=True): assert (a is None) == (b is None) and (a is None or gap(a, b) < 1e-5)
    with merged(model) as layers:
        shaken(model, .5)
        layers.refresh()
        with model.disable_adapter(), torch.no_grad(): without = model(input_ids=ids).logits
        moved = gradients(model, ids)
    assert gap(moved[0], gradients(model, ids)[0]) < 1e-5 < gap(moved[0], plain[0])
    model.unload()
    with torch.no_grad(): assert gap(without, base.model(input_ids=ids).logits) < 1e-5


ODD = {'DoRA': dict(use_dora=True), 'dropout': dict(lora_dropout=.5), 'a bias': dict(lora_bias=True)}


@pytest.mark.parametrize('odd', ODD)
def test_other_adapters_are_left_alone(folders, odd):
    base = load_base(folders('llama'), FULL, device='cpu')
    model = get_peft_model(base.model, LoraConfig(r=2, task_type='CAUSAL_LM', target_modules=['q_proj', 'down_proj'], **ODD[odd]))
    set_mode(model, True)
    with merged(model) as layers: assert not layers.adapted
    set_mode(model, False)
    with merged(model) as layers: assert bool(layers.adapted) == (odd == 'dropout') # which does not act now
    model.unload()


def test_kept_weights_change_no_bit(folders):
    "Of a base in 4 bits, and of an adapter on a base that computes in 16 bits"
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    for dtype in ('float32', 'bfloat16'):
        base = load_base(folders('llama'), LoadSettings('nf4', dtype), device='cpu')
        with torch.no_grad(): plain = base.model(input_ids=ids).logits
        with merged(base.model) as layers, torch.no_grad():
            assert torch.equal(base.model(input_ids=ids).logits, plain) and len(layers.packed) == 14
    model = shaken(add_adapter(base, LoraSettings(rank=2)))
    plain = gradients(model, ids)
    with merged(model) as layers: ours = gradients(model, ids)
    assert not layers.adapted and len(layers.packed) == 14 and all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    model.unload()


def test_without_memory_nothing_is_copied(folders, monkeypatch):
    monkeypatch.setattr('w2s.models.merged.machine_memory', lambda device: 1000)
    base = load_base(folders('llama'), LoadSettings('nf4', 'float32'), device='cpu')
    assert not Merged(base.model).packed and not Merged(add_adapter(base, LoraSettings(rank=2))).adapted


# --- the output head

@pytest.mark.parametrize('cap', [None, 5.])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('tokens', [1, 700])
def test_the_gradient_of_a_head_of_one_piece(monkeypatch, cap, bias, tokens):
    "Made in the forward pass for a vocabulary of one piece, as for one of several, and as autograd has it"
    draw = torch.Generator().manual_seed(0)
    hidden, weight, target = (
        torch.randn(tokens, 16, generator=draw, requires_grad=True),
        torch.randn(50, 16, generator=draw),
        torch.randint(0, 50, (tokens,), generator=draw),
    )
    b, g = torch.randn(50, generator=draw) if bias else None, torch.randn(tokens, generator=draw)
    def of(logps): return logps.detach(), torch.autograd.grad((logps*g).sum(), hidden)[0]
    z = 2*(hidden @ weight.T + (0 if b is None else b))
    wanted = of((z if cap is None else cap*torch.tanh(z/cap)).log_softmax(1)[torch.arange(tokens), target])
    one = of(token_logps(hidden, target, weight, b, 2., cap))
    monkeypatch.setattr('w2s.train.logprobs.PIECE', 16)
    for ours in (one, of(token_logps(hidden, target, weight, b, 2.0, cap))):
        assert gap(ours[0], wanted[0]) < 1e-5 and gap(ours[1], wanted[1]) < 1e-5
