"Held against a peer: loss and every LoRA gradient of SFT and DPO are those of TRL, on the same rows, in 32 bits"
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

pytest.importorskip('trl', reason='TRL is a peer for tests; it is installed for Python 3.11 and later')

from families import make_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.models.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import pretrain, tiny_model
from w2s.train import losses
from w2s.train.batches import block
from w2s.train.checkpoints import trainable
from w2s.train.logprobs import response_logps
from w2s.train.loop import preference_objective, sft_objective, step_gradient
from w2s.train.reference import stored_logps
from w2s.train.tokens import encode_rows

FULL = LoadSettings(quantize='none', dtype='float32')
BETA, TIGHT = .1, 1e-5
REAL = Path(__file__).parents[2]/'shared'/'weights'/'english-1m'
MODELS = ['tiny', pytest.param('english-1m', marks=pytest.mark.skipif(not REAL.is_dir(), reason='needs ../shared/weights'))]
NO_NOISE = dict(report_to='none', use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, disable_tqdm=True)


def shake(model, seed, size=.05):
    "Move every adapter weight, B included, so that no gradient is zero and no two adapters are alike"
    draw = torch.Generator().manual_seed(seed)
    for p in trainable(model).values(): p.data += size * torch.randn(p.shape, generator=draw)
    return model


def own_gradients(model):
    "The gradients, by a name that does not depend on who wraps the model; they are taken away"
    out = {n.split('base_model.model.')[-1]: p.grad.clone() for n, p in trainable(model).items()}
    for p in trainable(model).values(): p.grad = None
    return out


def make_both(folder, data, home):
    "Our model and TRL's, with the same policy and the same frozen SFT adapter, which is another"
    ours, peer = load_base(folder, FULL, device='cpu'), load_base(folder, FULL, device='cpu')
    start = shake(add_adapter(ours, LoraSettings(rank=4), seed=1), 1)
    sft = save_adapter(start, ours, home/'sft')
    start.unload()
    rows = encode_rows(ours.tokenizer, data, ('chosen', 'rejected'), ours.context).rows
    reference = stored_logps(home/'store', ours, sft, rows, quiet=True)
    policy, other = shake(load_adapter(ours, sft, trainable=True), 2), load_adapter(peer, sft, trainable=True)
    pairs = Dataset.from_dict({c: list(data[c]) for c in ('prompt', 'chosen', 'rejected')})
    dpo = DPOTrainer(
        model=other, args=DPOConfig(str(home / 'dpo'), beta=BETA, **NO_NOISE), train_dataset=pairs, processing_class=peer.tokenizer
    )
    dpo.aux_loss_enabled = False # of routers, which are not what is compared
    for (_, p), (_, q) in zip(sorted(trainable(policy).items()), sorted(trainable(other).items()), strict=True): q.data.copy_(p.data)
    return dict(policy=policy, rows=rows, reference=reference, peer=other, dpo=dpo, data=data, home=home, tokenizer=peer.tokenizer)


@pytest.fixture(scope='module', params=MODELS)
def both(request, tmp_path_factory):
    "One small model that has read a little, and one that nobody in this project made"
    home = tmp_path_factory.mktemp(request.param)
    data = make_rows(sample_preferences(60, seed=3), 'preferences')
    texts = [p + c for p, c in zip(data['prompt'], data['chosen'], strict=True)]
    folder = REAL if request.param != 'tiny' else tiny_model(home/'model', texts)
    if request.param == 'tiny': pretrain(folder, texts, steps=60) # a random model looks at nothing: the gradients of q and k would be 0
    return make_both(folder, data, home)


def peer_dpo(both, index, side='right'):
    "TRL's loss and gradients on its own collated batch; for the left side its rows are rolled and counted from their first token"
    batch = both['dpo'].data_collator([both['dpo'].train_dataset[i] for i in index])
    if side == 'left':
        for n, length in enumerate(batch['attention_mask'].sum(1).tolist()):
            for c in batch: batch[c][n] = batch[c][n].roll(batch[c].shape[1] - length)
        batch['position_ids'] = (batch['attention_mask'].cumsum(1) - 1).clamp(min=0)
    both['peer'].train()
    loss = both['dpo'].compute_loss(both['peer'], batch)
    loss.backward()
    return loss.item(), own_gradients(both['peer']), batch


def our_dpo(both, index, side):
    "Our loss and gradients of the same rows, padded on this side"
    rows, policy = [both['rows'][i] for i in index], both['policy']
    if side == 'right': # the way of the training loop
        goal = preference_objective(both['rows'], both['reference'], beta=BETA)
        return step_gradient(policy, goal, index, budget=700)['loss'], own_gradients(policy)
    flat = [s for r in rows for s in r.sequences]
    logps = response_logps(policy, block(flat, 'left')) if side == 'left' else torch.cat([response_logps(policy, block([s])) for s in flat])
    reference = torch.tensor(both['reference'][index], dtype=torch.float32)
    loss = losses.dpo(losses.log_ratio_gap(logps.view(-1, 2), reference), torch.ones(len(index)), BETA).mean()
    loss.backward()
    return loss.item(), own_gradients(policy)


def same(ours, theirs):
    "Loss and gradients equal to 1e-5, and worth comparing"
    assert abs(ours[0] - theirs[0]) < TIGHT
    assert len(ours[1]) == len(theirs[1]) > 20 and all('.lora_A.' in n or '.lora_B.' in n for n in ours[1])
    for name, grad in theirs[1].items():
        assert grad.abs().max() > 1e-6, f'{name} has no gradient to compare'
        assert (ours[1][name] - grad).abs().max() < TIGHT, name
        assert (ours[1][name] - grad).norm() < 2e-4*grad.norm(), name # 1e-5 alone would pass a gradient that is small and wrong


def test_dpo_trains_on_the_same_tokens(both):
    "Prompt, boundary, response and the end token: id by id"
    for row, peer in zip(both['rows'], both['dpo'].train_dataset, strict=True):
        for s, response in zip(row.sequences, (peer['chosen_ids'], peer['rejected_ids']), strict=True):
            assert list(s.ids) == peer['prompt_ids'] + response and s.start == len(peer['prompt_ids'])
            assert list(s.response) == response and response[-1] == both['tokenizer'].eos_token_id


MERGING = [dict(prompt=f'{name} says the answ', chosen='er is cold.', rejected='arm.') for name in ('Ann', 'Ben', 'Ida')]


def test_dpo_boundary_where_tokens_merge(both):
    "The prompt ends inside a word: both responses start where the first of them leaves the prompt, as in TRL"
    data, dpo = make_rows(MERGING, 'preferences'), both['dpo']
    pairs = Dataset.from_dict({c: list(data[c]) for c in ('prompt', 'chosen', 'rejected')})
    peers = dpo._prepare_dataset(pairs, both['tokenizer'], dpo.args, 'merging')
    # tokens do merge
    assert any(len(p['prompt_ids']) < len(both['tokenizer'](r['prompt'])['input_ids']) for p, r in zip(peers, MERGING, strict=True))
    for row, peer in zip(encode_rows(both['tokenizer'], data, ('chosen', 'rejected'), 256).rows, peers, strict=True):
        assert [s.start for s in row.sequences] == [len(peer['prompt_ids'])]*2


def test_dpo_starts_from_something_else_than_the_reference(both):
    "Otherwise every comparison below would be ln 2 = ln 2"
    loss, _, _ = peer_dpo(both, [0])
    assert abs(loss - math.log(2)) > 1e-3


@pytest.mark.parametrize('side', ['right', 'left'])
def test_dpo_padded(both, side):
    index = [0, 5, 9, 17, 23, 30, 41]
    theirs = peer_dpo(both, index, side)
    mask = theirs[2]['attention_mask']
    assert (mask[:, -1 if side == 'right' else 0] == 0).any() and len(set(mask.sum(1).tolist())) > 3 # there is padding, on this side
    same(our_dpo(both, index, side), theirs)


def test_dpo_without_padding(both):
    "One row a batch, of those whose responses are equally long: not one padded token on either side"
    even = [i for i, r in enumerate(both['rows']) if len(r.sequences[0].ids) == len(r.sequences[1].ids)][:3]
    assert len(even) == 3
    for i in even:
        theirs = peer_dpo(both, [i])
        assert theirs[2]['attention_mask'].all()
        same(our_dpo(both, [i], 'none'), theirs)


def test_dpo_reference_is_the_frozen_sft_adapter(both):
    "What TRL gets by switching to its copy of the adapter is what our store holds"
    batch = both['dpo'].data_collator([both['dpo'].train_dataset[i] for i in range(8)])
    theirs = torch.stack(both['dpo'].compute_ref_log_probs(both['peer'], batch), 1)
    assert (theirs - torch.tensor(both['reference'][:8])).abs().max() < 1e-4


FAMILY = ['opt', 'gemma2', 'mixtral', 'cohere', 'falcon', 'granite', 'gpt2', 'lfm2']


@pytest.mark.parametrize('name', FAMILY)
def test_dpo_of_a_family(name, tmp_path):
    """Learned positions, a soft cap, experts, scaled logits, shared keys, convolutions: the same loss and gradients as through the model's
    own logits"""
    texts = [
        dict(prompt=f'how far is it to the mill of {who}?', chosen=f' {"far, " * i}an hour on foot.', rejected=' go away.')
        for i, who in enumerate(('ann', 'ben', 'a miller', 'ida', 'nobody'))
    ]
    both = make_both(make_model(name, tmp_path/'model'), make_rows(texts, 'preferences'), tmp_path)
    index = [0, 1, 3, 4]
    theirs, ours = peer_dpo(both, index), our_dpo(both, index, 'right')
    assert abs(ours[0] - theirs[0]) < 1e-4*max(1, theirs[0]) and ours[1].keys() == theirs[1].keys() and abs(theirs[0] - math.log(2)) > 1e-3
    most = max(g.norm() for g in theirs[1].values())
    assert most > 1e-3 and all((ours[1][n] - g).norm() < 1e-3*g.norm() + 1e-5*most for n, g in theirs[1].items())


def peer_sft(both, side):
    "TRL's completion-only loss"
    rows = Dataset.from_dict({'prompt': list(both['data']['prompt'])[:7], 'completion': list(both['data']['chosen'])[:7]})
    args = SFTConfig(str(both['home']/'sft-peer'), **NO_NOISE)
    trainer = SFTTrainer(model=both['peer'], args=args, train_dataset=rows, processing_class=both['tokenizer'])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    if side == 'left':
        lengths = batch['attention_mask'].sum(1).tolist()
        for n, length in enumerate(lengths):
            for c in ('input_ids', 'attention_mask', 'labels'): batch[c][n] = batch[c][n].roll(batch[c].shape[1] - length)
        batch['position_ids'] = (batch['attention_mask'].cumsum(1) - 1).clamp(min=0)
    return trainer, batch


@pytest.mark.parametrize('side', ['right', 'left', 'none'])
def test_sft(both, side):
    "Nats a response token over the whole batch; the prompt is not learned"
    trainer, batch = peer_sft(both, side)
    rows, index = both['rows'][:7], list(range(7))
    for r, ids, mask, labels in zip(rows, batch['input_ids'], batch['attention_mask'], batch['labels'], strict=True):
        assert ids[mask.bool()].tolist() == list(r.sequences[0].ids)
        assert ids[labels != -100].tolist() == list(r.sequences[0].response)
    both['peer'].train()
    parts = (
        [{c: t[n : n + 1, : mask.sum()] for c, t in batch.items()} for n, mask in enumerate(batch['attention_mask'])]
        if side == 'none'
        else [batch]
    )
    total, theirs = (batch['labels'] != -100).sum(), 0.
    for part in parts:
        loss = trainer.compute_loss(both['peer'], part, num_items_in_batch=total)
        loss.backward()
        theirs += loss.item()
    theirs = theirs, own_gradients(both['peer'])
    if side == 'left':
        logps = response_logps(both['policy'], block([r.sequences[0] for r in rows], 'left'))
        loss = losses.sft(logps).sum() / total
        loss.backward()
        same((loss.item(), own_gradients(both['policy'])), theirs)
    else: # the way of the training loop; 'none': a budget of one token sends each row alone
        loss = step_gradient(both['policy'], sft_objective(both['rows']), index, budget=1 if side == 'none' else 8192)['loss']
        same((loss, own_gradients(both['policy'])), theirs)
