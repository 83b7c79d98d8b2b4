"Every preference loss, with soft targets and weights, acts in real 4-bit training, begins where it must, and is TRL's where TRL has it"
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.errors import ConfigError, DataError
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.train import losses
from w2s.train.checkpoints import trainable
from w2s.train.logprobs import score
from w2s.train.loop import TrainSettings, preference_objective, step_gradient, train
from w2s.train.rewards import reward_objective
from w2s.train.tokens import encode_rows

LOSSES = ['cdpo', 'dpo', 'ipo', 'rdpo'] # of the gap of log-ratios alone; the others are at the end
BETA, RANK = .1, LoraSettings(rank=2)


@pytest.fixture(scope='module', params=['float32', 'bfloat16'])
def nf4(request, folder):
    "The same model in four bits, with two types of arithmetic"
    return load_base(folder, LoadSettings('nf4', request.param), device='cpu')


@pytest.fixture(scope='module')
def four(folder): return load_base(folder, LoadSettings('nf4', 'float32'), device='cpu')


@pytest.fixture(scope='module')
def rows(four):
    return encode_rows(four.tokenizer, make_rows(sample_preferences(12, seed=5), 'preferences'), ('chosen', 'rejected'), 256).rows[:4]


@pytest.fixture(scope='module')
def reference(four, rows): return score(four.model, rows, quiet=True) + np.array([[.5, -.5]])*np.arange(len(rows))[:, None]


def shaken(base, model=None):
    "A fresh adapter with all weights moved, so that no gradient is zero"
    model, draw = model or add_adapter(base, RANK, seed=0), torch.Generator().manual_seed(4)
    for _, p in sorted(trainable(model).items()): p.data += .05*torch.randn(p.shape, generator=draw)
    return model


def gradient(base, rows, reference, loss, index=(0, 1, 2, 3), budget=4096, **given):
    "Loss and gradient of a step, times its number of rows"
    goal = preference_objective(rows, reference, beta=BETA, loss=loss, **given)
    model = shaken(base)
    note = step_gradient(model, goal, index, budget)
    out = torch.cat([p.grad.flatten() for p in trainable(model).values()])*len(index)
    model.unload()
    return note['loss']*len(index), out


def far(a, b): return ((a - b).norm()/a.norm()).item()


# --- pitfall 5: weights and targets

@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
def test_pitfall_05_weights_act_in_four_bits(four, rows, reference, loss, soft):
    "No gradient of weight 0; twice the weight is the row twice; one block is four of one; any other weights give another gradient"
    target = [.9, .35, .6, .75] if soft else None
    def one(w=None, index=(0, 1, 2, 3), budget=4096): return gradient(four, rows, reference, loss, index, budget, target=target, weights=w)
    plain, random = one(), [.3, 2.5, 0., 1.7]
    with pytest.raises(DataError, match='every weight is 0'): one([0]*4)
    model = shaken(four)
    step_gradient(model, preference_objective(rows, reference, target, [0, 0, 0, 1], BETA, loss), [0, 1, 2], 4096)
    assert all(p.grad.abs().max() == 0 for p in trainable(model).values())
    model.unload()
    assert far(one([0, 1, 0, 1])[1], one(None, (1, 3))[1]) < 1e-4
    doubled, twice = one([1, 2, 1, 1]), one(None, (0, 1, 1, 2, 3))
    assert abs(doubled[0]/twice[0] - 1) < 1e-4 and far(doubled[1], twice[1]) < 1e-4 and far(doubled[1], plain[1]) > .01
    whole, alone = one(random), one(random, budget=1)
    assert abs(whole[0]/alone[0] - 1) < 1e-4 and far(whole[1], alone[1]) < 1e-4 and far(whole[1], plain[1]) > .05


@pytest.mark.parametrize('loss', LOSSES)
def test_pitfall_05_targets_act_in_four_bits(four, rows, reference, loss):
    "The gradient of a soft target is the mix of the two hard ones, row by row"
    def one(target): return gradient(four, rows, reference, loss, target=target)
    hard, turned, soft = one([1.]*4), one([0.]*4), one([.8]*4)
    assert abs(soft[0] - .8*hard[0] - .2*turned[0]) < 1e-3*abs(hard[0])
    assert far(soft[1], .8*hard[1] + .2*turned[1]) < 1e-4 and far(soft[1], hard[1]) > .05
    assert far(one([1., .2, 1., 1.])[1], hard[1]) > .01


@pytest.mark.parametrize('loss', [*LOSSES, 'bradley_terry'])
def test_pitfall_05_trained_adapters_differ(nf4, rows, reference, loss, tmp_path):
    "Weights and targets reach the adapter that a whole training leaves behind; without any, two runs end in the same bits"
    def adapter(name, target=None, weights=None):
        if loss == 'bradley_terry':
            from w2s.models.heads import add_reward_adapter
            model, goal = add_reward_adapter(nf4, RANK, seed=0), reward_objective(rows, target, weights)
        else: model, goal = add_adapter(nf4, RANK, seed=0), preference_objective(rows, reference, target, weights, BETA, loss)
        train(model, goal, TrainSettings(epochs=3, batch_size=2, learning_rate=1e-2), tmp_path/name, quiet=True)
        out = torch.cat([p.detach().flatten() for p in trainable(model).values()])
        model.unload()
        return out
    plain = adapter('plain')
    assert torch.equal(plain, adapter('again'))
    for name, other in dict(weights=dict(weights=[.2, 2., 1., .1]), targets=dict(target=[.9, .4, .6, .7])).items():
        assert far(plain, adapter(name, **other)) > .01, name


@pytest.mark.parametrize('loss', ['cdpo', 'rdpo'])
def test_smoothing_acts_in_four_bits(four, rows, reference, loss):
    "ε changes the gradient, 0 is DPO, and None is the 0.1 of CW-PO"
    plain = gradient(four, rows, reference, 'dpo')
    assert far(plain[1], gradient(four, rows, reference, loss, smoothing=0.)[1]) < 1e-6
    assert far(plain[1], gradient(four, rows, reference, loss, smoothing=.3)[1]) > .01
    assert gradient(four, rows, reference, loss)[0] == gradient(four, rows, reference, loss, smoothing=.1)[0]


@pytest.mark.parametrize('loss', ['dpo', 'ipo'])
def test_smoothing_is_refused_where_it_cannot_act(rows, reference, loss):
    with pytest.raises(ConfigError, match='this loss has none'): preference_objective(rows, reference, loss=loss, smoothing=.1)


# --- pitfall 10: where a training begins

@pytest.mark.parametrize('target', [None, [.9, .35, .6, .75]])
@pytest.mark.parametrize('loss', LOSSES)
def test_pitfall_10_the_first_loss_is_known(four, rows, loss, target):
    "Policy = reference, with an adapter that is not zero: ln 2 for DPO and its relatives, 1/(4β²) for IPO, whatever the targets"
    model = shaken(four)
    goal = preference_objective(rows, score(model, rows, quiet=True), target, beta=.5, loss=loss)
    note = step_gradient(model, goal, range(4), 4096)
    model.unload()
    want = 1. if loss == 'ipo' else math.log(2)
    assert abs(note['loss'] - want) < (1e-3 if loss == 'ipo' else 1e-5) and abs(note['value']) < 1e-4


@pytest.mark.parametrize('loss', LOSSES)
def test_the_first_step_lowers_the_loss(four, rows, loss, tmp_path):
    "The sign is right: training on one batch raises the margin, and the loss falls (CW-PO's printed IPO would do the opposite)"
    model = add_adapter(four, RANK, seed=0)
    goal = preference_objective(rows, score(four.model, rows, quiet=True), beta=BETA, loss=loss)
    history = train(model, goal, TrainSettings(epochs=8, batch_size=4, learning_rate=3e-3, warmup=0.), tmp_path/'run', quiet=True)
    model.unload()
    assert history.loss.iloc[-1] < history.loss.iloc[0] and history.value.iloc[-1] > .01


# --- pitfall 2: gradients at the ends

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('loss', LOSSES)
def test_pitfall_02_every_loss_has_its_gradient_everywhere(loss, dtype):
    "By hand: β(σ(βg) - t) with the loss's own target t; 2(g - (2p - 1)/2β) for IPO"
    for m in (-60., -20., -8., 8., 20., 60.):
        for p in (0., .3, 1.):
            x, eps = torch.tensor([m], dtype=dtype, requires_grad=True), losses.PREFERENCE_LOSSES[loss].flags['smoothing']
            value = losses.PREFERENCE_LOSSES[loss](x, torch.tensor([p]), 1., eps)
            value.sum().backward()
            t = {'dpo': p, 'cdpo': p + eps*(1 - 2*p), 'rdpo': (p - eps)/(1 - 2*eps), 'ipo': None}[loss]
            want = 2*(m - (p - .5)) if t is None else 1/(1 + math.exp(-m)) - t
            assert torch.isfinite(value).all() and abs(x.grad.item() - want) < (1e-5 if dtype == torch.float32 else 1e-2*max(1, abs(want)))


def test_rdpo_is_unbiased():
    "The mean over labels that are turned round with rate ε is the DPO loss of the true labels, soft ones too; cDPO's is not"
    g, p, eps = torch.linspace(-30, 30, 61), torch.linspace(0, 1, 61), .2
    def mean(loss): return (1 - eps)*loss(g, p, BETA, eps) + eps*loss(g, 1 - p, BETA, eps)
    assert torch.allclose(mean(losses.rdpo), losses.dpo(g, p, BETA), atol=1e-5)
    assert (mean(losses.cdpo) - losses.dpo(g, p, BETA)).abs().max() > .1


# --- held against TRL

@pytest.fixture(scope='module')
def peer(folder, tmp_path_factory):
    "TRL's own loss, as a function of a name, on its own batch: (loss, log-ratio gap, tokens of each response)"
    trl = pytest.importorskip('trl', reason='TRL is a peer for tests; it is installed for Python 3.11 and later')
    from datasets import Dataset
    home, base = tmp_path_factory.mktemp('peer'), load_base(folder, LoadSettings('none', 'float32'), device='cpu')
    data = make_rows(sample_preferences(12, seed=5), 'preferences')
    pairs = Dataset.from_dict({c: list(data[c]) for c in ('prompt', 'chosen', 'rejected')})
    rows = encode_rows(base.tokenizer, data, ('chosen', 'rejected'), base.context).rows
    before = score(base.model, rows, quiet=True)
    model = shaken(base)
    after = score(model, rows, quiet=True)
    model.unload()
    def run(loss, index, eps=0.):
        policy = add_adapter(base, RANK, seed=0) # TRL's reference is a copy of the adapter as it is now: that of the base
        args = trl.DPOConfig(str(home/loss), beta=BETA, loss_type=loss, label_smoothing=eps, report_to='none', use_cpu=True, bf16=False,
                             gradient_checkpointing=False, max_length=None, disable_tqdm=True)
        trainer = trl.DPOTrainer(model=policy, args=args, train_dataset=pairs, processing_class=base.tokenizer)
        shaken(base, policy).train()
        with torch.no_grad(): value = trainer.compute_loss(policy, trainer.data_collator([trainer.train_dataset[i] for i in index])).item()
        policy.unload()
        return value
    ratios = torch.tensor(after - before, dtype=torch.float32)
    return run, ratios, torch.tensor([[len(s.response) for s in r.sequences] for r in rows])


@pytest.mark.filterwarnings('ignore')
def test_losses_are_those_of_trl(peer):
    "sigmoid = dpo, robust = rdpo, aot of one row = cdpo, ipo of mean log-ratios = ipo"
    run, ratios, lengths = peer
    index, ones = [0, 3, 5, 8], torch.ones(4)
    gap = losses.log_ratio_gap(ratios[index], torch.zeros(4, 2))
    assert gap.abs().max() > .1
    assert abs(run('sigmoid', index) - losses.dpo(gap, ones, BETA).mean().item()) < 1e-4
    assert abs(run('robust', index, .2) - losses.rdpo(gap, ones, BETA, .2).mean().item()) < 1e-4
    assert abs(run('aot', [3], .2) - losses.cdpo(gap[1:2], ones[:1], BETA, .2).item()) < 1e-4
    mean_gap = losses.log_ratio_gap(ratios[index]/lengths[index], torch.zeros(4, 2))
    assert abs(run('ipo', index) - losses.ipo(mean_gap, ones, BETA).mean().item()) < 1e-3
    assert abs(losses.ipo(mean_gap, ones, BETA).mean() - losses.ipo(gap, ones, BETA).mean()) > .01 # ours is the printed sum over tokens


def test_bradley_terry_is_trls():
    "-log σ(chosen - rejected), and its soft target is the mix of both orders"
    rewards = torch.tensor([[2., .5], [-1., 3.], [40., -40.]])
    want = -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
    assert torch.allclose(losses.bradley_terry(rewards, torch.ones(3)), want)
    p = torch.tensor([.3, .8, .5])
    assert torch.allclose(
        losses.bradley_terry(rewards, p), p * want + (1 - p) * losses.bradley_terry(rewards.flip(1), torch.ones(3)), atol=1e-5
    )


# --- without a reference

@pytest.fixture(scope='module')
def logps(four, rows):
    return torch.tensor(score(four.model, rows, quiet=True), dtype=torch.float32), torch.tensor(
        [[len(s.response) for s in r.sequences] for r in rows], dtype=torch.float32
    )


def simpo_by_hand(chosen, rejected, n, m, p, beta, gamma):
    "Eq. 6 of 2405.14734 in 64 bits, a row at a time; a soft target mixes the pair with its reverse"
    def one(a, b): return math.log1p(math.exp(-(beta*a - beta*b - gamma)))
    return [w*one(a/x, b/y) + (1 - w)*one(b/y, a/x) for a, b, x, y, w in zip(chosen, rejected, n, m, p, strict=True)]


def orpo_by_hand(chosen, rejected, n, m, p, lam):
    "Eqs. 6 and 7 of 2403.07691 in 64 bits, from probabilities"
    def odds(logp): return math.exp(logp)/(1 - math.exp(logp))
    def one(a, b): return -a - lam*math.log(1/(1 + odds(b)/odds(a)))
    return [w*one(a/x, b/y) + (1 - w)*one(b/y, a/x) for a, b, x, y, w in zip(chosen, rejected, n, m, p, strict=True)]


@pytest.mark.parametrize(
    'loss, by_hand',
    [('simpo', lambda *x: simpo_by_hand(*x, 0.5)), ('simpo(gamma=1.5)', lambda *x: simpo_by_hand(*x, 1.5)), ('orpo', orpo_by_hand)],
)
@pytest.mark.parametrize('beta', [.1, 2.])
def test_a_loss_without_a_reference_is_its_equation(rows, logps, loss, by_hand, beta):
    "By way of the training objective, which is given no reference at all"
    (policy, tokens), p = logps, [1., .8, .5, 0.]
    goal = preference_objective(rows, None, p, beta=beta, loss=loss)
    found = goal.loss(policy, torch.arange(4))
    want = by_hand(*policy.double().T.tolist(), *tokens.T.tolist(), p, beta)
    assert found.tolist() == pytest.approx(want, rel=1e-5)
    mean = policy/tokens
    assert goal.value(policy, torch.arange(4)).tolist() == pytest.approx((beta*(mean[:, 0] - mean[:, 1])).tolist(), rel=1e-5)


def test_simpo_and_orpo_are_those_of_trl(logps):
    "TRL's own functions, on the same log-probs per token"
    pytest.importorskip('trl', reason='TRL is a peer for tests; it is installed for Python 3.11 and later')
    from types import SimpleNamespace

    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    (policy, tokens), on = logps, SimpleNamespace(accelerator=SimpleNamespace(device='cpu'))
    chosen, rejected = (policy/tokens).unbind(1)
    peer = SimpleNamespace(loss_type='simpo', beta=2., simpo_gamma=.7, label_smoothing=0., alpha=0., **vars(on))
    assert torch.allclose(losses.simpo(chosen - rejected, torch.ones(4), 2., .7), CPOTrainer.cpo_loss(peer, chosen, rejected)[0], atol=1e-6)
    ratio = ORPOTrainer.odds_ratio_loss(SimpleNamespace(beta=.2, **vars(on)), chosen, rejected)[0]
    assert torch.allclose(losses.orpo(chosen, rejected, torch.ones(4), .2), -chosen - ratio, atol=1e-6)


@pytest.mark.parametrize('loss', ['simpo', 'orpo'])
def test_a_pair_that_is_turned_round_has_the_same_loss(loss):
    "Swap the responses and the target"
    a, b, p = torch.tensor([-.3, -2.]), torch.tensor([-.9, -.1]), torch.tensor([.8, .1])
    given = [dict(gap=x - y, chosen=x, rejected=y, target=t, beta=.7) for x, y, t in ((a, b, p), (b, a, 1 - p))]
    first, second = (losses.PREFERENCE_LOSSES[loss].fill(g) for g in given)
    assert torch.allclose(first, second)


@pytest.mark.parametrize('loss', ['simpo', 'orpo'])
def test_every_loss_without_a_reference_has_its_gradient_everywhere(loss):
    "Also where a response is nearly certain, or nearly impossible"
    for at in (-60., -1., -1e-3, -1e-8, 0.):
        for p in (0., .3, 1.):
            x = torch.tensor([[at, -2.]], requires_grad=True)
            given = losses.loss_inputs({'mean': True}, x, None, torch.ones(1, 2))
            value = losses.PREFERENCE_LOSSES[loss].fill({**given, 'target': torch.tensor([p]), 'beta': 1.})
            value.sum().backward()
            assert torch.isfinite(value).all() and torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


@pytest.mark.parametrize('loss', ['simpo', 'orpo'])
def test_a_loss_without_a_reference_learns(four, rows, loss, tmp_path):
    model = add_adapter(four, RANK, seed=0)
    history = train(
        model,
        preference_objective(rows, None, beta=1.0, loss=loss),
        TrainSettings(epochs=8, batch_size=4, learning_rate=3e-3, warmup=0.0),
        tmp_path / 'run',
        quiet=True,
    )
    model.unload()
    assert history.loss.iloc[-1] < history.loss.iloc[0]
    if loss == 'simpo': assert history.value.iloc[-1] > history.value.iloc[0]


def test_micro_batches_do_not_change_a_loss_per_token(four, rows):
    found = [gradient(four, rows, None, 'simpo', budget=b) for b in (4096, 60)]
    assert abs(found[0][0] - found[1][0]) < 1e-4 and far(found[0][1], found[1][1]) < 1e-4
