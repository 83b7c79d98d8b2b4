"""Class heads and probes: read at the right token, trained, saved, found again by another process, and looked at in between (pitfalls 5, 7,
14, 16, 17)"""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from w2s.data.rows import make_rows
from w2s.errors import ConfigError, DataError, ModelError, TrainError
from w2s.models.adapters import CLASS_HEAD_FILE, HEAD_FILE, LoraSettings, adapter_hash, add_adapter, load_adapter, save_adapter
from w2s.models.class_heads import add_class_adapter, add_class_head, class_count, class_head_of, load_class_adapter, word_ids
from w2s.models.heads import add_reward_adapter, load_reward_adapter
from w2s.models.load import Base, LoadSettings, load_base, set_mode
from w2s.train.batches import block
from w2s.train.checkpoints import checkpoints, trainable
from w2s.train.class_head import class_logits, encode_texts, head_probs, last_states, last_tokens
from w2s.train.labels import label_objective
from w2s.train.loop import Objective, TrainSettings, make_optimizer, step_gradient, train
from w2s.train.probe import Probe, fit_probe, last_hidden, load_probe, probe_probs, save_probe
from w2s.train.tokens import TOO_LONG, Encoded, EncodedRow

ROOT = Path(__file__).parents[1]
FULL, RANK = LoadSettings('none', 'float32'), LoraSettings(rank=2)
SHAPE = dict(vocab_size=120, pad_token_id=2, bos_token_id=1, eos_token_id=2) # padding and end are one token
FAMILIES = {
    'llama': lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ),
    'gpt2': lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    'opt': lambda: OPTForCausalLM(
        OPTConfig(
            **SHAPE,
            hidden_size=64,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
            max_position_embeddings=64,
        )
    ), # as OPT-350M
}
# id 0 inside and at the end, the padding id inside, at the end, twice at the end, and nothing else
ODD = [Encoded(ids, len(ids)) for ids in ((5, 0, 7, 0, 9), (5, 2, 7, 8), (5, 6, 8, 2), (5, 6, 8, 2, 2), (5, 9, 0, 7, 6, 11, 0), (2,))]
NUMBERS = 'one two three four five six seven eight nine ten'.split()


def random_base(family):
    "A random model of a family, as `load_base` would give it"
    torch.manual_seed(0)
    return Base(family, FAMILIES[family]().eval().requires_grad_(False), None, family, FULL, 64)


def shake(model, seed=0):
    "Move every trainable weight"
    draw = torch.Generator().manual_seed(seed)
    for _, p in sorted(trainable(model).items()): p.data += .05*torch.randn(p.shape, generator=draw)
    return model


def weights_of(model): return {n: p.detach().clone() for n, p in trainable(model).items()}


def texts(n=30, classes=10, names='Anna Ben Cleo'):
    return make_rows(
        [
            {
                'id': str(i),
                'prompt': f'{names.split()[i % len(names.split())]} has {NUMBERS[i % classes]} lamps{" and a rope" * (i % 4)}.',
                'label': i % classes,
            }
            for i in range(n)
        ],
        'labels',
    )


@pytest.fixture(scope='module')
def base(folder): return load_base(folder, FULL, device='cpu')


@pytest.fixture(scope='module')
def four(folder): return load_base(folder, LoadSettings('nf4', 'float32'), device='cpu')


@pytest.fixture(scope='module')
def rows(base): return encode_texts(base.tokenizer, texts(), 128).rows


TARGETS = np.eye(10)[[i % 10 for i in range(30)]]


def goal(rows, weights=None): return label_objective(rows, TARGETS[:len(rows)], weights, forward=class_logits)


# --- 7: the token that is read

def test_pitfall_07_the_last_token_is_the_last_attended_one():
    for side in ('right', 'left'):
        batch = block(ODD, side)
        want = [len(s.ids) - 1 if side == 'right' else 6 for s in ODD]
        assert last_tokens(batch).tolist() == want
        assert batch.input_ids.gather(1, last_tokens(batch)[:, None])[:, 0].tolist() == [s.ids[-1] for s in ODD]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', FAMILIES)
def test_pitfall_07_the_same_logits_whatever_the_padding(family):
    "Alone, right- and left-padded, padding = end token, ids 0 and 2 inside and at the end: 1e-5, and from the state of the last token"
    base = random_base(family)
    model = shake(add_class_adapter(base, RANK, classes=3))
    set_mode(model, False)
    with torch.no_grad():
        alone = torch.cat([class_logits(model, block([s])) for s in ODD])
        for side in ('right', 'left'): assert (class_logits(model, block(ODD, side)) - alone).abs().max() < 1e-5
        for s, ours in zip(ODD, alone, strict=True):
            hidden = model.get_decoder()(torch.tensor([s.ids])).last_hidden_state[0, -1]
            assert torch.allclose(class_head_of(model)(hidden), ours, atol=1e-5)
    assert alone.shape == (6, 3) and (alone[2] - alone[3]).abs().max() > 1e-4 # one end token and two: the last one is read


@pytest.mark.filterwarnings('ignore')
def test_the_logits_are_those_of_transformers_where_it_reads_the_right_token(folder, base):
    peer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4).eval()
    model = shake(add_class_adapter(base, RANK, classes=4))
    for n, p in trainable(model).items():
        if 'lora_B' in n: p.data.zero_() # an adapter without effect
    peer.score.weight.data.copy_(class_head_of(model).weight)
    batch = block([Encoded((1, 40, 50, 60, 2), 5), Encoded((1, 70, 2), 3)])
    set_mode(model, False)
    with torch.no_grad():
        assert torch.allclose(class_logits(model, batch), peer(batch.input_ids, attention_mask=batch.attention_mask).logits, atol=1e-5)
    model.unload()


def test_texts_as_rows(base):
    "One sequence, no end token, cut from the left and counted, too long refused, empty an error"
    tok, long = base.tokenizer, texts(4)
    whole, cut = encode_texts(tok, long, 128), encode_texts(tok, long, 10)
    assert [len(r.sequences) for r in whole.rows] == [1]*4 and all(r.sequences[0].ids[-1] != tok.eos_token_id for r in whole.rows)
    for a, b in zip(whole.rows, cut.rows, strict=True):
        assert len(b.sequences[0].ids) == 10 and b.cut == len(a.sequences[0].ids) - 10 > 0
        assert a.sequences[0].ids[-9:] == b.sequences[0].ids[-9:]
    assert set(encode_texts(tok, long, 4).refused.values()) == {TOO_LONG} and not encode_texts(tok, long, 4).rows
    with pytest.raises(DataError, match='nothing to classify'): encode_texts(tok, make_rows([{'prompt': '', 'label': 0}], 'labels'), 128)


def test_batches_do_not_matter(base, rows):
    "Any token budget, any order of rows"
    model = shake(add_class_adapter(base, RANK, classes=10))
    whole = head_probs(model, rows, quiet=True)
    for budget in (1, 90): assert np.abs(head_probs(model, rows, budget, quiet=True) - whole).max() < 1e-5
    assert np.abs(head_probs(model, rows[::-1], quiet=True)[::-1] - whole).max() < 1e-5
    assert whole.shape == (30, 10) and np.allclose(whole.sum(1), 1) and head_probs(model, [], quiet=True).shape == (0, 0)
    model.unload()


# --- 14: the head is trained, saved and loaded

def test_pitfall_14_the_head_is_trained(four, rows):
    "In the optimizer, with a gradient, and another one after a step; the base under it is not touched"
    model = add_class_adapter(four, RANK, seed=1, classes=10)
    head, frozen = class_head_of(model).weight, [p.clone() for p in four.model.parameters() if not p.requires_grad]
    optimizer, before = make_optimizer(model, TrainSettings(learning_rate=1e-2)), head.detach().clone()
    assert any(p is head for g in optimizer.param_groups for p in g['params'])
    step_gradient(model, goal(rows), range(30), 4096)
    optimizer.step()
    assert (head != before).all() and head.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(frozen, (p for p in four.model.parameters() if not p.requires_grad), strict=True))
    model.unload()


RELOAD = '''
import sys, numpy as np, torch
torch.manual_seed(12345)
sys.path.insert(0, sys.argv[4])
from test_class_head import texts
from w2s.models.adapters import adapter_hash
from w2s.models.class_heads import add_class_adapter, class_count, load_class_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.train.class_head import class_logits, encode_texts
from w2s.train.logprobs import score
base = load_base(sys.argv[1], LoadSettings('nf4', 'float32'), device='cpu')
add_class_adapter(base, seed=99, classes=7).unload() # another head was there before
rows = encode_texts(base.tokenizer, texts(), 128).rows
model = load_class_adapter(base, sys.argv[2])
np.save(sys.argv[3], score(model, rows, quiet=True, forward=class_logits))
print(class_count(model), adapter_hash(sys.argv[2]))
'''


def test_pitfall_14_another_process_gives_the_same_logits(folder, four, rows, tmp_path):
    """Trained on a 4-bit base, saved, and loaded by a new Python over a base quantized anew that had another head: to 1e-6, under the same
    name"""
    from w2s.train.logprobs import score
    model = add_class_adapter(four, RANK, seed=1, classes=10)
    train(model, goal(rows), TrainSettings(batch_size=8, learning_rate=1e-2), tmp_path/'run', quiet=True)
    want, saved = score(model, rows, quiet=True, forward=class_logits), save_adapter(model, four, tmp_path/'saved')
    model.unload()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '7'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', RELOAD, folder, saved, tmp_path/'out.npy', Path(__file__).parent],
                          capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path/'out.npy') - want).max() < 1e-6 and np.ptp(want) > .1
    assert done.stdout.split()[-2:] == ['10', adapter_hash(saved)]


def test_pitfall_14_each_kind_of_adapter_has_its_loader(base, tmp_path):
    "Policy, reward model, classifier: the other loaders refuse and name the right one; saving over a folder leaves no head of before"
    loaders, makers = (load_adapter, load_reward_adapter, load_class_adapter), (add_adapter, add_reward_adapter, add_class_adapter)
    for maker, own in zip(makers, loaders, strict=True):
        model = maker(base, RANK)
        saved = save_adapter(model, base, tmp_path/'same') # one folder for all three, one after the other
        model.unload()
        assert {f for f in (HEAD_FILE, CLASS_HEAD_FILE) if (saved / f).exists()} == {
            load_reward_adapter: {HEAD_FILE},
            load_class_adapter: {CLASS_HEAD_FILE},
        }.get(own, set())
        for load in loaders:
            if load is own: load(base, saved).unload()
            else:
                with pytest.raises(ModelError, match=f'load it with {own.__name__}'): load(base, saved)


def test_pitfall_17_an_adapter_is_known_by_its_class_head(base, tmp_path):
    model = add_class_adapter(base, RANK)
    saved = save_adapter(model, base, tmp_path/'a')
    name = adapter_hash(saved)
    class_head_of(model).weight.data[0, 0] += 1e-3
    assert adapter_hash(save_adapter(model, base, tmp_path/'b')) != name
    model.unload()
    (saved/CLASS_HEAD_FILE).unlink()
    assert adapter_hash(saved) != name


def test_a_head_of_another_width_is_refused(base, tmp_path):
    from safetensors.torch import save_file
    model = add_class_adapter(base, RANK)
    saved = save_adapter(model, base, tmp_path/'a')
    model.unload()
    save_file({'weight': torch.zeros(2, 7)}, saved/CLASS_HEAD_FILE)
    (saved/'manifest.json').unlink() # else its checksum is wrong, too
    with pytest.raises(ModelError, match='is of width 7'): load_class_adapter(base, saved)


def test_words_begin_a_head(base):
    "The rows are those of the output head, to the bit; an adapter of an SFT takes a head, too"
    ids = word_ids(base.tokenizer, ('a', 'b', 'c'))
    model = add_class_head(add_adapter(base, RANK), base, classes=3, words=ids)
    assert (
        torch.equal(class_head_of(model).weight.detach(), base.model.get_output_embeddings().weight[list(ids)].float())
        and class_count(model) == 3
    )
    with torch.no_grad(): class_head_of(model).weight.add_(1.)
    assert not torch.equal(class_head_of(model).weight.detach(), base.model.get_output_embeddings().weight[list(ids)]) # a copy
    model.unload()
    with pytest.raises(ConfigError, match='2 classes, but 3 words'): add_class_adapter(base, RANK, words=ids)


# --- the loop: several numbers a sequence, and looking in between

def test_several_outputs_of_several_sequences(base):
    "A row's numbers come sequence by sequence, each with its outputs, in `step_gradient` and in `score`"
    from w2s.train.logprobs import score
    pairs = [EncodedRow(str(i), (Encoded((5, 6 + i), 1), Encoded((5, 6, 7 + i, 8), 1)), 0) for i in range(6)]
    def both(model, data): # all tokens but the first are of the response
        second, length = data.target[torch.searchsorted(data.sequence, torch.arange(data.count))], torch.bincount(data.sequence) + 1
        return torch.stack([second.float(), length.float()], 1) + 0*last_states(model, data).sum(1, keepdim=True)

    want = [[6 + i, 2, 6, 4] for i in range(6)]
    for budget in (1, 9, 999): assert score(base.model, pairs, budget, quiet=True, forward=both).tolist() == want
    model, seen = add_adapter(base, RANK), {}
    def keep(numbers, i):
        seen.update({int(n): row for n, row in zip(i, numbers.tolist(), strict=True)})
        return numbers.sum(1)
    objective = Objective([p.id for p in pairs], [p.sequences for p in pairs], keep, keep, torch.ones(6), [1]*6, forward=both)
    step_gradient(model, objective, range(6), 9)
    model.unload()
    assert [seen[i] for i in range(6)] == want


@pytest.mark.parametrize('budget', [1, 70, 10**6])
def test_pitfall_16_micro_batches_with_a_class_head(base, rows, budget):
    "One block of all or one a row: the same gradient, with weights (pitfall 5: weight 2 is the row twice, weight 0 no row)"
    def one(weights, batch, budget):
        model = shake(add_class_adapter(base, RANK, classes=10))
        step_gradient(model, goal(rows, weights), batch, budget)
        out = torch.cat([p.grad.flatten() for p in trainable(model).values()])*len(batch)
        model.unload()
        return out
    weights = np.linspace(.2, 2, 30)
    whole = one(weights, range(8), 10**6)
    assert (one(weights, range(8), budget) - whole).norm() < 1e-5*whole.norm()
    weights[:4] = (2, 0, 1, 1)
    assert (one(weights, range(4), budget) - one(None, (0, 0, 2, 3), 10**6)).norm() < 1e-5*whole.norm()


def test_pitfall_16_killed_and_started_again_with_a_class_head_and_a_look(base, rows, tmp_path):
    "Head and adapter end in the same bits, with or without `after`; what `after` saw is the same, and every step is seen"
    settings, objective = TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, checkpoint_every=3), goal(rows, np.linspace(.2, 2, 30))
    def finish(name, objective, seed, notes=None, die=0):
        model = add_class_adapter(base, LoraSettings(rank=2, dropout=.2), seed, classes=10)
        def look(taken):
            notes[taken] = head_probs(model, rows[:5], quiet=True).tolist()
            torch.manual_seed(taken) # no care with random numbers
            if taken == die: raise KeyboardInterrupt
        try:
            train(model, objective, settings, tmp_path/name, seed=0, quiet=True, after=None if notes is None else look)
            assert model.training
            return weights_of(model)
        finally: model.unload()
    straight, seen, notes = finish('straight', objective, 0), {}, {}
    looked = finish('looked', objective, 0, seen)
    with pytest.raises(KeyboardInterrupt): finish('killed', objective, 0, notes, die=6)
    assert [p.name for p in checkpoints(tmp_path/'killed')] == ['step-000003'] # step 6 was looked at before its checkpoint was written
    again = finish('killed', objective, 9, notes)
    for got in (looked, again): assert 'class_head.weight' in got and all(torch.equal(got[n], p) for n, p in straight.items())
    assert notes == seen and list(seen) == list(range(1, 17))


def test_what_stops_a_training_names_step_and_rows(base, rows, tmp_path):
    objective = goal(rows)
    broken = replace(objective, loss=lambda z, i: objective.loss(z, i)*torch.where(i == 7, torch.nan, 1.))
    model, calls = add_class_adapter(base, RANK, classes=10), []
    with pytest.raises(TrainError, match=r'stopped at step \d+: the loss is nan in rows'):
        train(model, broken, TrainSettings(batch_size=8), tmp_path/'run', quiet=True, after=calls.append)
    model.unload()
    assert calls == list(range(1, len(calls) + 1)) # no look after a step that was not taken


def test_ten_classes_are_learned(tmp_path):
    "The smallest model of the ladder, in four bits, tried on people that it has not seen"
    base = load_base('pico', device='cpu')
    known, new = (
        encode_texts(base.tokenizer, texts(n, names=names), base.context).rows for n, names in ((300, 'Anna Ben Cleo'), (60, 'Dora Emil'))
    )
    gold = np.arange(300) % 10
    model = add_class_adapter(base, LoraSettings(rank=8), classes=10)
    train(
        model,
        label_objective(known, np.eye(10)[gold], forward=class_logits),
        TrainSettings(epochs=4, batch_size=10, learning_rate=1e-2),
        tmp_path / 'run',
        quiet=True,
    )
    probs = head_probs(model, new, quiet=True)
    model.unload()
    assert (probs.argmax(1) == gold[:60]).mean() >= .7 # by chance .1; .80 to .87 on machines that round otherwise


# --- probes

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', FAMILIES)
def test_pitfall_07_hidden_states_whatever_the_padding(family):
    base = random_base(family)
    some = [EncodedRow(str(i), (s,), 0) for i, s in enumerate(ODD)]
    whole = last_hidden(base.model, some, quiet=True)
    with torch.no_grad(): alone = np.stack([base.model.get_decoder()(torch.tensor([s.ids])).last_hidden_state[0, -1].numpy() for s in ODD])
    assert whole.dtype == np.float32 and np.abs(whole - alone).max() < 1e-5
    assert np.abs(last_hidden(base.model, some, budget=1, quiet=True) - whole).max() < 1e-5


@pytest.mark.parametrize('classes', [2, 3, 10])
def test_a_probe_is_at_the_minimum(classes):
    "The slope of the weighted soft cross-entropy with its penalty is zero; rows in another order give the same probe"
    draw = np.random.default_rng(classes)
    x, w = draw.normal(size=(200, 12))*draw.uniform(.1, 9, 12) + 5, draw.uniform(.1, 3, 200)
    y = draw.dirichlet(np.ones(classes), 200)
    y[:20] = np.eye(classes)[draw.integers(classes, size=20)] # some hard
    probe = fit_probe(x, y, w, strength=2.)
    own = probe.coef*(2 if classes == 2 else 1)
    slope = ((probe_probs(probe, x) - y)*w[:, None]).T @ ((x - probe.mean)/probe.scale) + 2*own
    assert np.abs(slope).max() < 1e-4*w.sum()
    assert np.abs(((probe_probs(probe, x) - y)*w[:, None]).sum(0)).max() < 1e-4*w.sum() # the intercept is free
    order = draw.permutation(200)
    assert np.abs(probe_probs(fit_probe(x[order], y[order], w[order], 2.), x) - probe_probs(probe, x)).max() < 1e-3


def test_any_class_balance():
    "Three rows of 300 in one class: it is found; a class without rows gets probability 0"
    draw = np.random.default_rng(0)
    labels = np.r_[np.zeros(297, int), np.ones(3, int)]
    x = draw.normal(size=(300, 6)) + 6*labels[:, None]
    probs = probe_probs(fit_probe(x, np.eye(4)[labels]), x)
    assert (probs.argmax(1) == labels).all() and probs[:, 2:].max() == 0 and np.allclose(probs.sum(1), 1)


def test_a_probe_is_kept(tmp_path):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 5)).astype(np.float32), np.eye(3)[draw.integers(3, size=40)]
    probe = fit_probe(x, y)
    again = load_probe(save_probe(probe, tmp_path/'new'/'probe'))
    assert all(np.array_equal(getattr(again, n), getattr(probe, n)) for n in Probe.__dataclass_fields__)
    with pytest.raises(DataError, match='no probe'): load_probe(tmp_path)
    with pytest.raises(DataError, match='one class'): fit_probe(x, np.tile([1., 0., 0.], (40, 1)))
    with pytest.raises(DataError, match='this probe reads'): probe_probs(probe, x[:, :3])
