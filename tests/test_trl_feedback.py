"""TRL's trainers with the columns of weak feedback: loss and every gradient are ours, in 32 bits and on NF4 weights; what our commands
write goes in as it is"""
import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from typer.testing import CliRunner

pytest.importorskip('trl', reason='TRL is a peer for tests; it is installed for Python 3.11 and later')

import trl
from test_trl import BETA, NO_NOISE, own_gradients, same, shake

from w2s.cli.app import app
from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.errors import ConfigError, DataError
from w2s.models.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import pretrain, tiny_model
from w2s.train.checkpoints import trainable
from w2s.train.loop import preference_objective, sft_objective, step_gradient
from w2s.train.reference import stored_logps
from w2s.train.tokens import encode_rows
from w2s.trl import FEEDBACK, GAP_LOSSES, DPOTrainer, SFTTrainer, feedback_loss

rng = np.random.default_rng(0)
PROB, WEIGHT = rng.uniform(.5, 1, 60).round(3).tolist(), rng.choice([0., .3, 1., 2.], 60).tolist()
INDEX = list(range(9))


@pytest.fixture(scope='module', params=['none', 'nf4'])
def both(request, tmp_path_factory):
    "Our model and TRL's, with the same policy and the same frozen SFT adapter; in 32 bits, and with NF4 weights"
    home, load = tmp_path_factory.mktemp(request.param), LoadSettings(quantize=request.param, dtype='float32')
    data = make_rows(sample_preferences(60, seed=3), 'preferences')
    texts = [p + c for p, c in zip(data['prompt'], data['chosen'], strict=True)]
    folder = tiny_model(home/'model', texts)
    pretrain(folder, texts, steps=60)
    ours, peer = load_base(folder, load, device='cpu'), load_base(folder, load, device='cpu')
    start = shake(add_adapter(ours, LoraSettings(rank=4), seed=1), 1)
    sft = save_adapter(start, ours, home/'sft')
    start.unload()
    rows = encode_rows(ours.tokenizer, data, ('chosen', 'rejected'), ours.context).rows
    reference = stored_logps(home/'store', ours, sft, rows, quiet=True)
    policy, other = shake(load_adapter(ours, sft, trainable=True), 2), load_adapter(peer, sft, trainable=True)
    pairs = Dataset.from_dict({c: list(data[c]) for c in ('prompt', 'chosen', 'rejected')} | dict(prob=PROB, weight=WEIGHT))
    at_start = {n: p.data.clone() for n, p in trainable(other).items()}
    return dict(
        policy=policy,
        at_start=at_start,
        rows=rows,
        reference=reference,
        other=other,
        pairs=pairs,
        data=data,
        home=home,
        tokenizer=peer.tokenizer,
    )


def at_start(both):
    "TRL's model as it was loaded: a trainer copies the adapter, which becomes its reference"
    if 'ref' in both['other'].peft_config: both['other'].delete_adapter('ref')
    for n, p in trainable(both['other']).items(): p.data = both['at_start'][n].clone()
    return both['other']


def take_policy(both):
    "The weights of our policy; TRL has cast adapters of 4-bit models to bfloat16, the copy that is its reference, too"
    for n, p in both['other'].named_parameters():
        if 'lora_' in n: p.data = both['at_start'][n.replace('.ref.', '.default.')].clone() if '.ref.' in n else p.data
    for (_, p), (_, q) in zip(sorted(trainable(both['policy']).items()), sorted(trainable(both['other']).items()), strict=True):
        q.data = p.data.clone()


def dpo_trainer(both, columns, **more):
    "A trainer on these columns, its policy that of ours"
    settings = trl.DPOConfig(str(both['home']/'dpo'), beta=BETA, **NO_NOISE, **more)
    data = both['pairs'].remove_columns([c for c in FEEDBACK if c not in columns])
    trainer = DPOTrainer(model=at_start(both), args=settings, train_dataset=data, processing_class=both['tokenizer'])
    trainer.aux_loss_enabled = False # of routers, which are not what is compared
    take_policy(both)
    return trainer


def their_step(both, trainer, index):
    "Loss and gradients of TRL's trainer on its own collated batch"
    batch = trainer.data_collator([trainer.train_dataset[i] for i in index])
    both['other'].train()
    loss = trainer.compute_loss(both['other'], batch)
    loss.backward()
    return loss.item(), own_gradients(both['other'])


@pytest.mark.cases(6)
@pytest.mark.parametrize('columns', [('prob',), ('weight',), FEEDBACK], ids='+'.join)
@pytest.mark.parametrize('kind, ours', [('sigmoid', dict(loss='dpo')), ('robust', dict(loss='rdpo', smoothing=.1))])
def test_dpo_with_feedback_is_ours(both, columns, kind, ours):
    trainer = dpo_trainer(both, columns, loss_type=kind, label_smoothing=.1 if kind == 'robust' else 0.)
    given = dict(target=PROB if 'prob' in columns else None, weights=WEIGHT if 'weight' in columns else None)
    goal = preference_objective(both['rows'], both['reference'], beta=BETA, **ours, **given)
    same((step_gradient(both['policy'], goal, INDEX, budget=700)['loss'], own_gradients(both['policy'])), their_step(both, trainer, INDEX))


def test_the_columns_change_the_loss(both):
    "What TRL itself does with them: nothing"
    plain = trl.DPOTrainer(
        model=at_start(both),
        args=trl.DPOConfig(str(both['home'] / 'plain'), beta=BETA, **NO_NOISE),
        train_dataset=both['pairs'],
        processing_class=both['tokenizer'],
    )
    plain.aux_loss_enabled = False
    take_policy(both)
    ignored, without = their_step(both, plain, INDEX), their_step(both, dpo_trainer(both, ()), INDEX)
    same(without, ignored)
    with_them = their_step(both, dpo_trainer(both, FEEDBACK), INDEX)
    assert abs(with_them[0] - without[0]) > 1e-3


@pytest.mark.parametrize('kind', GAP_LOSSES)
def test_a_certain_label_is_the_loss_of_trl(both, kind):
    "Every loss, at probability 1 and weight 1, as TRL computes it"
    settings = dict(loss_type=kind, label_smoothing=.1 if kind == 'robust' else 0.)
    with_columns = dpo_trainer(both, FEEDBACK, **settings)
    with_columns.train_dataset = (
        with_columns.train_dataset.remove_columns(list(FEEDBACK)).add_column('prob', [1.0] * 60).add_column('weight', [1.0] * 60)
    )
    same(their_step(both, with_columns, INDEX), their_step(both, dpo_trainer(both, (), **settings), INDEX))


def test_a_kept_reference_gives_the_same(both):
    one, two = (their_step(both, dpo_trainer(both, FEEDBACK, precompute_ref_log_probs=kept), INDEX) for kept in (False, True))
    same(one, two)


def test_accumulation_gives_the_gradient_of_the_batch(both):
    "Three micro-batches of three pairs, as the trainer adds them up"
    trainer = dpo_trainer(both, FEEDBACK)
    whole = their_step(both, trainer, INDEX)
    parts = [their_step(both, trainer, INDEX[i:i + 3]) for i in (0, 3, 6)]
    same((sum(p[0] for p in parts)/3, {k: sum(p[1][k] for p in parts)/3 for k in whole[1]}), whole)


def test_sft_with_weights_is_ours(both):
    rows = Dataset.from_dict(dict(prompt=list(both['data']['prompt']), completion=list(both['data']['chosen']), weight=WEIGHT))
    trainer = SFTTrainer(
        model=at_start(both),
        args=trl.SFTConfig(str(both['home'] / 'sft-trl'), completion_only_loss=True, shuffle_dataset=False, **NO_NOISE),
        train_dataset=rows,
        processing_class=both['tokenizer'],
    )
    trainer.aux_loss_enabled = False # of routers, which are not what is compared
    take_policy(both)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in INDEX])
    tokens = (batch['labels'] != -100).sum()
    both['other'].train()
    loss = trainer.compute_loss(both['other'], batch, num_items_in_batch=tokens)
    loss.backward()
    theirs = loss.item(), own_gradients(both['other'])
    same(
        (
            step_gradient(both['policy'], sft_objective(both['rows'], weights=WEIGHT), INDEX, budget=700)['loss'],
            own_gradients(both['policy']),
        ),
        theirs,
    )


@pytest.mark.parametrize(
    'columns, said',
    [
        (dict(prob=[1.5] + PROB[1:]), 'row 1: 1.5 is no probability'),
        (dict(weight=[-1.0] + WEIGHT[1:]), 'weight of row 1 is -1'),
        (dict(weight=[0.0] * 60), 'every weight is 0'),
        (dict(prob=PROB[:3] + [None] + PROB[4:]), 'row 4: no value'),
    ],
)
def test_a_bad_column_is_refused_before_training(both, columns, said):
    data = both['pairs'].remove_columns(list(FEEDBACK))
    for name, values in columns.items(): data = data.add_column(name, values)
    with pytest.raises(DataError, match=said):
        DPOTrainer(
            model=at_start(both),
            args=trl.DPOConfig(str(both['home'] / 'bad'), **NO_NOISE),
            train_dataset=data,
            processing_class=both['tokenizer'],
        )


@pytest.mark.parametrize(
    'more, said',
    [
        (dict(loss_type='exo_pair', label_smoothing=0.1), 'loss_type "exo_pair" has no form'),
        (dict(loss_type=['sigmoid', 'sft'], loss_weights=[1.0, 0.1]), '"sft" has no form'),
        (dict(use_weighting=True), 'use_weighting=True'),
        (dict(ld_alpha=0.5), 'ld_alpha=0.5'),
        (dict(f_divergence_type='js_divergence'), "f_divergence_type='js_divergence'"),
    ],
)
def test_settings_under_which_the_columns_could_not_act(both, more, said):
    with pytest.raises(ConfigError, match=said): dpo_trainer(both, FEEDBACK, **more)
    dpo_trainer(both, (), **more) # without the columns all of TRL is there


def test_packing_with_weights_is_refused(both):
    rows = Dataset.from_dict(dict(prompt=list(both['data']['prompt']), completion=list(both['data']['chosen']), weight=WEIGHT))
    settings = trl.SFTConfig(str(both['home']/'pack'), packing=True, **{**NO_NOISE, 'max_length': 64})
    with pytest.raises(ConfigError, match='packing'):
        SFTTrainer(model=at_start(both), args=settings, train_dataset=rows, processing_class=both['tokenizer'])


def test_a_soft_target_of_one_half_wants_no_gap():
    gap = torch.zeros(1, 2, requires_grad=True)
    for kind in GAP_LOSSES:
        if kind == 'hinge': continue
        feedback_loss(kind, gap, torch.ones(1, 2), torch.tensor([.5]), .5, .1).sum().backward()
        assert gap.grad.abs().max() < 1e-7, kind
        gap.grad = None


def test_labels_of_our_command_go_in_as_they_are(tmp_path):
    "w2s label writes a file; TRL trains on it, by its own loader and the two columns"
    for name, n, seed in (('labelled', 60, 4), ('pairs', 40, 5)):
        Dataset.from_list([{k: r[k] for k in ('prompt', 'chosen', 'rejected')} for r in sample_preferences(n, seed=seed)]).to_json(
            tmp_path / f'{name}.jsonl'
        )
    done = CliRunner().invoke(
        app,
        [
            'label',
            '--model',
            'pico',
            '--train',
            str(tmp_path / 'labelled.jsonl'),
            '--rows',
            str(tmp_path / 'pairs.jsonl'),
            '--out',
            str(tmp_path / 'weak.parquet'),
        ],
    )
    assert done.exit_code == 0, f'{done.output[-800:]} {done.exception!r}'
    data = load_dataset('parquet', data_files=str(tmp_path/'weak.parquet'), split='train', cache_dir=str(tmp_path/'cache'))
    assert set(FEEDBACK) <= set(data.column_names) and len(set(data['prob'][:])) > 5
    base = load_base(
        tiny_model(tmp_path / 'model', data['prompt'][:] + data['chosen'][:]), LoadSettings(quantize='none', dtype='float32'), device='cpu'
    )
    settings = trl.DPOConfig(
        str(tmp_path / 'dpo'), max_steps=2, logging_steps=1, per_device_train_batch_size=4, save_strategy='no', **NO_NOISE
    )
    trainer = DPOTrainer(model=add_adapter(base, LoraSettings(rank=2)), args=settings, train_dataset=data, processing_class=base.tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2 and 'rewards/margins' in trainer.state.log_history[0]
