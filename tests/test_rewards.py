"Reward models: the score is read from the right token in every family, the head is trained, saved, resumed and known by its content"
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
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from w2s.data.rows import make_rows, to_pairs
from w2s.data.samples import sample_preferences
from w2s.errors import ModelError
from w2s.feedback.preferences import label_pairs
from w2s.models.adapters import HEAD_FILE, LoraSettings, adapter_hash, add_adapter, load_adapter, save_adapter
from w2s.models.heads import add_head, add_reward_adapter, head_width, load_reward_adapter
from w2s.models.load import Base, LoadSettings, load_base, set_mode
from w2s.train.batches import block
from w2s.train.checkpoints import trainable
from w2s.train.loop import TrainSettings, make_optimizer, step_gradient, train
from w2s.train.rewards import response_rewards, reward_objective, sequence_rewards
from w2s.train.tokens import Encoded, encode_rows

ROOT = Path(__file__).parents[1]
FULL, RANK = LoadSettings('none', 'float32'), LoraSettings(rank=2)
SHAPE = dict(vocab_size=120, pad_token_id=2, bos_token_id=1, eos_token_id=2) # padding and end are one token
FAMILIES = {
    'llama': lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ),
    'gpt2': lambda: GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
    'neox': lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**SHAPE, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ),
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
# the padding id inside, at the end, twice at the end; id 0 inside and at the end
ODD = [Encoded(ids, 2) for ids in ((5, 2, 7, 0, 9), (5, 6, 8, 2), (5, 6, 8, 2, 2), (5, 9, 0, 7, 6, 11, 0))]


def random_base(family):
    "A random model of a family, as `load_base` would give it"
    torch.manual_seed(0)
    model = FAMILIES[family]().eval().requires_grad_(False)
    return Base(family, model, None, family, FULL, 64)


def shake(model, seed=0):
    "Move every trainable weight"
    draw = torch.Generator().manual_seed(seed)
    for _, p in sorted(trainable(model).items()): p.data += .05*torch.randn(p.shape, generator=draw)
    return model


@pytest.fixture(scope='module')
def base(folder): return load_base(folder, FULL, device='cpu')


@pytest.fixture(scope='module')
def four(folder): return load_base(folder, LoadSettings('nf4', 'float32'), device='cpu')


@pytest.fixture(scope='module')
def data(): return make_rows(sample_preferences(24, seed=5), 'preferences')


@pytest.fixture(scope='module')
def rows(base, data): return encode_rows(base.tokenizer, data, ('chosen', 'rejected'), 256).rows


# --- 7: the token that is read

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('family', FAMILIES)
def test_pitfall_07_one_score_whatever_the_padding(family):
    "Alone, right- and left-padded, padding = end token, ids 0 and 2 inside: 1e-5; and the state is that of the last token"
    base = random_base(family)
    model = shake(add_reward_adapter(base, RANK))
    set_mode(model, False)
    with torch.no_grad():
        alone = torch.cat([sequence_rewards(model, block([s])) for s in ODD])
        for side in ('right', 'left'): assert (sequence_rewards(model, block(ODD, side)) - alone).abs().max() < 1e-5
        for s, ours in zip(ODD, alone, strict=True):
            hidden = model.get_decoder()(torch.tensor([s.ids])).last_hidden_state
            assert torch.allclose(model.get_submodule('reward_head')(hidden)[0, -1, 0], ours, atol=1e-5)
    assert abs(alone[1] - alone[2]) > 1e-4 # one end token and two: the last one is read
    assert len(model.get_submodule('reward_head').weight[0]) == head_width(base) == 32


@pytest.mark.filterwarnings('ignore')
def test_the_score_is_that_of_transformers_where_it_reads_the_right_token(folder, base):
    "Same head on its classifier, padding that is no token of the text"
    peer = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model = shake(add_reward_adapter(base, RANK))
    for n, p in trainable(model).items():
        if 'lora_B' in n: p.data.zero_() # an adapter without effect
    peer.score.weight.data.copy_(model.get_submodule('reward_head').weight)
    some = [Encoded((1, 40, 50, 60, 2), 2), Encoded((1, 70, 2), 1)]
    batch = block(some)
    set_mode(model, False)
    with torch.no_grad():
        theirs = peer(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        assert torch.allclose(sequence_rewards(model, batch), theirs, atol=1e-5)
    model.unload()


def test_batches_do_not_matter(base, rows):
    "Any token budget, any order of rows"
    model = shake(add_reward_adapter(base, RANK))
    whole = response_rewards(model, rows, quiet=True)
    for budget in (1, 90): assert np.abs(response_rewards(model, rows, budget, quiet=True) - whole).max() < 1e-5
    assert np.abs(response_rewards(model, rows[::-1], quiet=True)[::-1] - whole).max() < 1e-5
    assert whole.dtype == np.float64 and response_rewards(model, [], quiet=True).shape == (0, 0)
    model.unload()


# --- 14: the head is trained, saved and loaded

def test_pitfall_14_the_head_is_trained(four, rows):
    "In the optimizer, with a gradient, and another one after a step; the base under it is not touched"
    model = add_reward_adapter(four, RANK, seed=1)
    head, frozen = model.get_submodule('reward_head').weight, [p.clone() for p in four.model.parameters() if not p.requires_grad]
    optimizer, before = make_optimizer(model, TrainSettings(learning_rate=1e-2)), head.detach().clone()
    assert any(p is head for g in optimizer.param_groups for p in g['params'])
    step_gradient(model, reward_objective(rows), range(8), 4096)
    optimizer.step()
    assert (head != before).all() and head.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(frozen, (p for p in four.model.parameters() if not p.requires_grad), strict=True))
    model.unload()


RELOAD = '''
import sys, numpy as np, torch
torch.manual_seed(12345)
from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.models.adapters import adapter_hash
from w2s.models.heads import load_reward_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.train.rewards import response_rewards
from w2s.train.tokens import encode_rows
base = load_base(sys.argv[1], LoadSettings('nf4', 'float32'), device='cpu')
rows = encode_rows(base.tokenizer, make_rows(sample_preferences(24, seed=5), 'preferences'), ('chosen', 'rejected'), 256).rows
np.save(sys.argv[3], response_rewards(load_reward_adapter(base, sys.argv[2]), rows, quiet=True))
print(adapter_hash(sys.argv[2]))
'''


def test_pitfall_14_another_process_gives_the_same_scores(folder, four, rows, tmp_path):
    "Trained on a 4-bit base, saved, and loaded by a new Python over a base that was quantized anew: to 1e-6, under the same name"
    model = add_reward_adapter(four, RANK, seed=1)
    train(model, reward_objective(rows), TrainSettings(batch_size=8, learning_rate=1e-2), tmp_path/'run', quiet=True)
    want, saved = response_rewards(model, rows, quiet=True), save_adapter(model, four, tmp_path/'saved')
    model.unload()
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': '7'}
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', RELOAD, folder, saved, tmp_path / 'out.npy'], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert np.abs(np.load(tmp_path/'out.npy') - want).max() < 1e-6 and np.ptp(want) > .1
    assert done.stdout.split()[-1] == adapter_hash(saved)


def test_pitfall_14_half_a_reward_model_is_refused(base, tmp_path):
    "A policy is no reward model, a reward model no policy, and an old head does not stay in a folder that a policy is saved to"
    model = add_reward_adapter(base, RANK)
    saved = save_adapter(model, base, tmp_path/'both')
    model.unload()
    with pytest.raises(ModelError, match='load_reward_adapter'): load_adapter(base, saved)
    policy = add_adapter(base, RANK)
    with pytest.raises(ModelError, match='no scalar head'): sequence_rewards(policy, block(ODD[:1]))
    save_adapter(policy, base, saved)
    policy.unload()
    assert not (saved/HEAD_FILE).exists()
    with pytest.raises(ModelError, match='without a head'): load_reward_adapter(base, saved)


def test_the_name_of_an_adapter_without_a_head_is_the_old_one(base, tmp_path):
    "Stages and stores of earlier versions are still found"
    import hashlib
    import json

    from w2s.models.adapters import NAMES
    from w2s.models.load import files_hash
    model = add_adapter(base, RANK)
    saved = save_adapter(model, base, tmp_path/'policy')
    model.unload()
    config = json.loads((saved/'adapter_config.json').read_text())
    acts = json.dumps({k: v for k, v in config.items() if k not in NAMES}, sort_keys=True)
    assert adapter_hash(saved) == hashlib.sha256(f'{files_hash([saved/"adapter_model.safetensors"])} {acts}'.encode()).hexdigest()[:16]


# --- 16, 17: steps, kills, seeds

def test_pitfall_16_killed_and_started_again_with_a_head(base, rows, tmp_path):
    "Head and adapter end in the same bits"
    settings, goal = (
        TrainSettings(epochs=2, batch_size=4, learning_rate=1e-2, checkpoint_every=3),
        reward_objective(rows, weights=np.linspace(0.2, 2, len(rows))),
    )
    def finish(name, objective, seed):
        model = add_reward_adapter(base, RANK, seed)
        try:
            train(model, objective, settings, tmp_path/name, quiet=True)
            return {n: p.detach().clone() for n, p in trainable(model).items()}
        finally: model.unload()
    straight, calls = finish('straight', goal, 0), []
    def dies(rewards, i):
        calls.append(1)
        if len(calls) == 8: raise KeyboardInterrupt
        return goal.loss(rewards, i)
    with pytest.raises(KeyboardInterrupt): finish('killed', replace(goal, loss=dies), 0)
    again = finish('killed', goal, 9)
    assert 'reward_head.weight' in again and all(torch.equal(again[n], p) for n, p in straight.items())


def test_pitfall_16_micro_batches_with_a_head(base, rows):
    "One block of eight or eight of one: the same gradient"
    def one(budget):
        model = shake(add_reward_adapter(base, RANK))
        step_gradient(model, reward_objective(rows, weights=np.linspace(.2, 2, len(rows))), range(8), budget)
        out = torch.cat([p.grad.flatten() for p in trainable(model).values()])
        model.unload()
        return out
    assert (one(1) - one(10**6)).norm() < 1e-5*one(10**6).norm()


def test_a_reward_model_can_start_from_an_sft_adapter(base, rows, tmp_path):
    "The head goes onto any adapter that is on the base, whose values are kept"
    sft = shake(add_adapter(base, RANK))
    want = {n: p.detach().clone() for n, p in trainable(sft).items()}
    saved = save_adapter(sft, base, tmp_path/'sft')
    sft.unload()
    model = add_head(load_adapter(base, saved, trainable=True), base, seed=3)
    assert trainable(model).keys() == want.keys() | {'reward_head.weight'}
    assert all(torch.equal(trainable(model)[n], p) for n, p in want.items())
    model.unload()


def test_it_learns_and_labels(four, data, rows, tmp_path):
    "Twenty-four pairs by heart, in four bits: the labels are the human's"
    model = add_reward_adapter(four, LoraSettings(rank=8), seed=0)
    train(model, reward_objective(rows), TrainSettings(epochs=30, batch_size=8, learning_rate=1e-2), tmp_path/'run', quiet=True)
    pairs = to_pairs(data, seed=0)
    rewards = response_rewards(model, encode_rows(four.tokenizer, pairs, ('response_a', 'response_b'), 256).rows, quiet=True)
    model.unload()
    labels = label_pairs(pairs, rewards, 'reward model')
    assert np.mean([a == b for a, b in zip(labels.rows['chosen'], data['chosen'], strict=True)]) > .9
