"Label words, losses on soft labels, and what the confidence loss must not depend on (pitfalls 2, 3, 4, 5, 7, 12, 16, 18)"
import itertools
import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from transformers import PreTrainedTokenizerFast

from w2s.data.rows import make_rows
from w2s.errors import ConfigError, DataError
from w2s.feedback.cleaning import PROBES, clean_by_probe, row_folds
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import pretrain, tiny_model
from w2s.train import label_losses, label_variants, loop
from w2s.train.batches import block
from w2s.train.checkpoints import trainable
from w2s.train.label_losses import class_counts, confidence, confidence_weight, harden, soft_xent
from w2s.train.label_variants import (
    balanced,
    class_prices,
    focal,
    forward_kl,
    margins,
    product,
    product_target,
    reverse_kl,
    sharpened,
    warm_up,
    window_target,
)
from w2s.train.labels import (
    LABEL_LOSSES,
    batch_opinion,
    class_logps,
    class_probs,
    encode_labels,
    encode_words,
    label_objective,
    label_targets,
    weak_labels,
)
from w2s.train.logprobs import response_logps, score, sum_sequences
from w2s.train.loop import TrainSettings, for_step, step_gradient, train
from w2s.train.tokens import EncodedRow

WORDS = (' no', ' yes')
THINGS = [a + b for a in ('zo', 'mi', 'ka', 'ple', 'dro', 'fa') for b in ('rk', 'nda', 'lop', 'st', 'mbi', 'ff', 'rn')]


def question(thing): return f'Q: May I put a {thing} in the stew?\nA:' if len(thing) % 2 else f'Q: Is a {thing} food, or is it not?\nA:'


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    "A tiny model that has read a little, so that its rows differ"
    texts = [question(t) + (' yes' if t < 'm' else ' no') for t in THINGS]
    folder = tiny_model(tmp_path_factory.mktemp('tiny')/'model', texts)
    pretrain(folder, texts, steps=30)
    return load_base(folder, LoadSettings('none', 'float32'), device='cpu')


@pytest.fixture(scope='module')
def data(): return make_rows([{'prompt': question(t), 'label': int(t < 'm'), 'group': t} for t in THINGS], 'labels')


@pytest.fixture(scope='module')
def rows(base, data): return encode_labels(base.tokenizer, data, WORDS, 128).rows


def shaken(base, dropout=0., seed=4, size=.1):
    "An adapter whose every weight is moved"
    model = add_adapter(base, LoraSettings(rank=2, dropout=dropout), seed=0)
    draw = torch.Generator().manual_seed(seed)
    for p in trainable(model).values(): p.data += size*torch.randn(p.shape, generator=draw)
    return model


def step(base, goal, batch, budget=10**6, done=.5, dropout=0.):
    "Loss and gradient of one step"
    model = shaken(base, dropout)
    try:
        note = step_gradient(model, for_step(goal, model, batch, done, budget), batch, budget)
        return note['loss'], torch.cat([p.grad.flatten() for p in trainable(model).values()])
    finally: model.unload()


def targets(n, classes=2, seed=0): return np.random.default_rng(seed).dirichlet(np.linspace(.6, 1.4, classes), n)


# ---- the equation

def direct(p, weak, alpha):
    "Burns et al., Eq. 1, for class probabilities of two classes, in plain numpy: share of the weak labels, sorted list, threshold"
    f, w = p[:, 1], weak[:, 1]
    positive = int(np.ceil(w.sum() - .5))
    t = np.sort(f)[::-1][positive - 1] if positive else np.inf
    out = []
    for fi, wi in zip(f, w, strict=True):
        hard = 1. if fi >= t else 0.
        weak_part = -wi*np.log(fi) - (1 - wi)*np.log(1 - fi)
        own_part = -hard*np.log(fi) - (1 - hard)*np.log(1 - fi)
        out.append((1 - alpha)*weak_part + alpha*own_part)
    return np.array(out)


@pytest.mark.parametrize('seed', range(30))
def test_confidence_is_the_equation_on_random_batches(seed):
    r = np.random.default_rng(seed)
    n, alpha = r.integers(1, 80), r.uniform()
    p, weak = r.dirichlet(r.uniform(.3, 3, 2), n).clip(1e-5, 1), r.dirichlet(r.uniform(.3, 3, 2), n)
    p /= p.sum(1, keepdims=True)
    ours = confidence(torch.tensor(p).log(), torch.tensor(weak), harden(torch.tensor(p).log(), class_counts(torch.tensor(weak))), alpha)
    assert np.allclose(ours, direct(p, weak, alpha), atol=1e-5)


@pytest.mark.parametrize('budget', [1, 300, 10**6])
@pytest.mark.parametrize('done, alpha', [(0., 0.), (.1, .375), (.5, .75)])
def test_a_step_has_the_loss_of_the_equation(base, rows, budget, done, alpha):
    "From prompts to the number that training sees"
    weak, batch = targets(len(rows)), list(range(3, 30))
    model = shaken(base)
    p = class_probs(model, rows, quiet=True)
    model.unload()
    found, _ = step(base, label_objective(rows, weak, loss='confidence'), batch, budget, done)
    assert found == pytest.approx(direct(p[batch], weak[batch], alpha).mean(), abs=1e-5)


# ---- 2: losses at the ends of the scale

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('alpha', [0., .75])
def test_pitfall_02_label_losses_have_a_gradient_wherever_they_are_wrong(dtype, alpha):
    for z, label, hard in itertools.product((-60., -20., -8., 8., 20., 60.), (0., .3, 1.), (0., 1.)):
        x = torch.tensor([[0., z]], dtype=dtype, requires_grad=True)
        loss = confidence(x, torch.tensor([[1 - label, label]]), torch.tensor([[1 - hard, hard]]), alpha)
        loss.sum().backward()
        want = 1/(1 + math.exp(-z)) - (1 - alpha)*label - alpha*hard
        assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()
        assert abs(x.grad[0, 1].item() - want) < (1e-6 if dtype == torch.float32 else 5e-3)
        if abs(want) > .01: assert x.grad[0, 1].item() * want > 0


def test_pitfall_02_the_loss_of_16_bit_logits_is_computed_in_32():
    x = (3*torch.randn(200, 4, generator=torch.Generator().manual_seed(0))).bfloat16()
    y = torch.tensor(targets(200, 4))
    exact = -(y * x.double().log_softmax(1)).sum(1)
    assert soft_xent(x, y).dtype == torch.float32 and (soft_xent(x, y) - exact).abs().max() < 1e-5


PLAIN = {  # of two classes: the loss and what it is for z, the log-odds of class 1, and w, its weak probability
    'xent': soft_xent, 'kl': forward_kl, 'reverse_kl': reverse_kl, 'entropy': sharpened, 'product': product,
    'confidence': lambda x, y: confidence(x, y, harden(x, class_counts(y)), .75),
    'window': lambda x, y: soft_xent(x, window_target(x, y, harden(x, class_counts(y)), 2.)),
    'focal': focal, 'balanced': lambda x, y: balanced(x, y, y),
}


def slope(loss, z, w):
    "Exact gradient of the log-odds, in as many digits as it takes"
    z, w, least = Decimal(z), Decimal(str(w)), Decimal('1e-4')
    f = 1/(1 + (-z).exp())
    own = Decimal(int(w > Decimal('.5')))  # of a batch of one row: the class that the weak label prefers
    if loss in ('xent', 'kl'): return f - w
    if loss == 'entropy': return f - w - Decimal('.3')*z*f*(1 - f)
    if loss == 'reverse_kl': return f*(1 - f)*(z - (max(w, least)/max(1 - w, least)).ln())
    if loss == 'product': return f - (f*w)/(f*w + (1 - f)*(1 - w))
    if loss == 'confidence': return f - Decimal('.25')*w - Decimal('.75')*own
    if loss == 'focal': return w*(2*f*(1 - f)**2*f.ln() - (1 - f)**3) + (1 - w)*(f**3 - 2*f**2*(1 - f)*(1 - f).ln())
    if loss == 'balanced': return f - Decimal('.5') # of one row: nothing is left of its label
    return f - w  # window: one row lies at its own threshold


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('loss', LABEL_LOSSES)
def test_pitfall_02_every_loss_is_finite_and_pushes_the_right_way(loss, dtype):
    for z, w in itertools.product((-60, -20, -8, 8, 20, 60), (0., .3, 1.)):
        x = torch.tensor([[0., z]], dtype=dtype, requires_grad=True)
        out = PLAIN[loss](x, torch.tensor([[1 - w, w]]))
        out.sum().backward()
        got, want = x.grad[0, 1].item(), float(slope(loss, z, w))
        assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
        assert abs(got - want) < (1e-6 if dtype == torch.float32 else 5e-3)
        if abs(want) > .01 or loss == 'reverse_kl': assert got*want > 0
        if (z > 0, w) in ((True, 0.), (False, 1.)) and loss != 'balanced':  # sure, and wrong about a hard label
            assert got*z > 0 and (loss == 'reverse_kl' or abs(got) > .9)
            assert loss != 'reverse_kl' or got == pytest.approx(want, rel=1e-2)


def test_pitfall_02_logits_of_both_signs_with_a_hard_label():
    "Log-odds of 120, where a product of probabilities has no digits left"
    for loss, of in PLAIN.items():
        for z, w in itertools.product((-60., 60.), (0., 1.)):
            x = torch.tensor([[-z, z]], requires_grad=True)
            out = of(x, torch.tensor([[1 - w, w]]))
            out.sum().backward()
            assert torch.isfinite(out).all() and torch.isfinite(x.grad).all()
            if (z > 0) == (w == 0) and loss not in ('reverse_kl', 'balanced'): assert abs(x.grad[0, 1].item()) > .9


@pytest.mark.parametrize('classes', [2, 5])
def test_divergences_are_those_of_scipy(classes):
    r = np.random.default_rng(0)
    p, w = r.dirichlet(np.ones(classes), 40), r.dirichlet(np.ones(classes), 40).clip(1e-3)
    w /= w.sum(1, keepdims=True)
    x, y = torch.tensor(p).log(), torch.tensor(w)
    assert np.allclose(forward_kl(x, y), rel_entr(w, p).sum(1), atol=1e-5)
    assert np.allclose(reverse_kl(x, y), rel_entr(p, w).sum(1), atol=1e-5)


def test_kl_has_the_gradient_of_cross_entropy(base, rows):
    weak, batch = targets(len(rows)), list(range(24))
    a, b = (step(base, label_objective(rows, weak, loss=loss), batch)[1] for loss in ('xent', 'kl'))
    assert (a - b).abs().max() < 1e-7


def test_the_product_target_is_the_product():
    r = np.random.default_rng(0)
    p, w = r.dirichlet(np.ones(3), 20), r.dirichlet(np.ones(3), 20)
    want = p**.6 * w**.8
    got = product_target(torch.tensor(p).log(), torch.tensor(w), .8, .6)
    assert np.allclose(got, want/want.sum(1, keepdims=True), atol=1e-6) and not got.requires_grad


# ---- window

def test_the_window_of_two_classes_is_a_distance_from_the_threshold():
    "In plain numpy: the threshold lies midway between the last row of class 1 and the first of class 0"
    r = np.random.default_rng(1)
    for _ in range(30):
        n = r.integers(2, 60)
        z, w = r.normal(0, 2, n), r.dirichlet([1, 1], n)
        positive = int(np.ceil(w[:, 1].sum() - .5))
        order = np.sort(z)[::-1]
        t = order[0] if positive == 0 else order[-1] if positive == n else (order[positive - 1] + order[positive])/2
        x, y = torch.tensor(np.stack([-z/2, z/2], 1)), torch.tensor(w)
        hard = harden(x, class_counts(y))
        distance = abs(z - t)
        assert np.allclose(margins(x, hard), distance, atol=5e-4)
        clear = abs(distance - 1.) > 1e-3
        want = np.where((distance <= 1.)[:, None], w, hard)
        assert np.allclose(window_target(x, y, hard, 1.)[clear], want[clear])


@pytest.mark.parametrize('classes', [3, 5, 10])
def test_margins_of_more_classes_belong_to_the_assigned_class(classes):
    """After prices the assigned class is the best of its row; a price is zero-sum noise to nobody: shifting all logits of a class moves it
    along"""
    r = np.random.default_rng(classes)
    for _ in range(20):
        z = torch.tensor(r.normal(0, 2, (24, classes)))
        counts = r.multinomial(24, r.dirichlet(np.ones(classes)))
        hard = harden(z, counts.tolist())
        best = z.log_softmax(1).numpy() - class_prices(z.log_softmax(1).numpy(), hard.numpy())
        assert (best.max(1) - (best*hard.numpy()).sum(1) < 2e-3).all()
        moved = z + torch.tensor(r.normal(size=classes))
        assert torch.allclose(margins(moved, harden(moved, counts.tolist())), margins(z, hard), atol=2e-3)


# ---- 3: the threshold is that of the optimizer batch

def test_pitfall_03_micro_batches_do_not_matter(base, rows):
    weak, batch = targets(len(rows)), list(range(32))
    goal, four = label_objective(rows, weak, loss='confidence'), 4*max(sum(len(s.ids) for s in r.sequences) for r in rows)
    model = shaken(base)
    opinions = [batch_opinion(model, [rows[i] for i in batch], torch.tensor(weak[batch]), b) for b in (10**6, four, 1)]
    model.unload()
    for o in opinions[1:]: assert torch.equal(o, opinions[0])
    assert 0 < opinions[0][:, 1].sum() < 32
    (loss, whole), *others = [step(base, goal, batch, b) for b in (10**6, four, 1)]
    for other, gradient in others: assert abs(other - loss) < 1e-6 and (gradient - whole).abs().max() < 1e-6
    plain = step(base, label_objective(rows, weak), batch)[1]
    assert (plain - whole).abs().max() > 1e-3


@pytest.mark.parametrize('loss', LABEL_LOSSES)
def test_pitfall_03_micro_batches_and_order_do_not_matter_to_any_loss(base, rows, loss):
    weak, batch = targets(len(rows)), list(range(32))
    goal = label_objective(rows, weak, loss=loss, options={'radius': .3} if loss == 'window' else None)
    four = 4*max(sum(len(s.ids) for s in r.sequences) for r in rows)
    first, whole = step(base, goal, batch)
    others = [step(base, goal, batch, b) for b in (four, 1)] + [
        step(base, goal, np.random.default_rng(s).permutation(batch).tolist(), four) for s in (0, 1)
    ]
    for other, gradient in others: assert abs(other - first) < 1e-6 and (gradient - whole).abs().max() < 5e-6 # of 32-bit sums
    if loss not in ('xent', 'kl'): assert (step(base, label_objective(rows, weak), batch)[1] - whole).abs().max() > 1e-3


@pytest.mark.parametrize('loss', ['confidence', 'window'])
def test_pitfall_03_an_evaluation_between_the_steps_changes_no_bit(base, rows, tmp_path, loss):
    def learned(name, looks):
        model = add_adapter(base, LoraSettings(rank=2), seed=0)
        after = (lambda _: class_probs(model, rows[24:], quiet=True)) if looks else None
        train(model, label_objective(rows[:24], targets(24), loss=loss, options={'warmup': 0.} if loss == 'confidence' else {'radius': .4}),
              TrainSettings(batch_size=8, learning_rate=1e-2), tmp_path/name, quiet=True, after=after)
        out = torch.cat([p.detach().flatten().clone() for p in trainable(model).values()])
        model.unload()
        return out
    assert torch.equal(learned('a', False), learned('b', True))


def test_pitfall_03_the_order_of_rows_does_not_matter(base, rows):
    weak, batch = targets(len(rows)), list(range(32))
    goal = label_objective(rows, weak, loss='confidence')
    loss, whole = step(base, goal, batch)
    for seed in range(3):
        other, gradient = step(base, goal, np.random.default_rng(seed).permutation(batch).tolist(), 400)
        assert abs(other - loss) < 1e-6 and (gradient - whole).abs().max() < 1e-6


@pytest.mark.parametrize('share', [0., .1, .5, .8, 1.])
def test_pitfall_03_the_class_share_is_that_of_the_weak_labels(share):
    "Also when the student says the same of all rows, where a quantile makes everything class 0 or everything class 1"
    weak = torch.tensor([[1 - share, share]]*40)
    for own in (torch.zeros(40, 2), torch.randn(40, 2), torch.tensor([[5., -5.]]*40), torch.randn(40, 2).round()):
        hard = harden(own, class_counts(weak))
        assert torch.allclose(hard.sum(1), torch.ones(40)) and hard[:, 1].mean().item() == pytest.approx(share, abs=1e-6)


def test_pitfall_03_rows_that_are_alike_are_treated_alike():
    "Five kinds of rows, eight of each: none of a kind is favoured for its place, and noise of another padding makes no difference"
    r = np.random.default_rng(0)
    which = r.permutation(np.repeat(np.arange(5), 8))
    own = torch.tensor(r.normal(size=(5, 2)))[which]
    weak = torch.tensor([[.55, .45]]*40)
    hard, noisy = harden(own, class_counts(weak)), harden(own + 1e-6*torch.tensor(r.normal(size=(40, 2))), class_counts(weak))
    for k in range(5): assert (hard[which == k] == hard[which == k][0]).all()
    assert hard[:, 1].sum() == 18 and torch.equal(hard, noisy)


def test_pitfall_03_nothing_is_remembered_of_evaluation_rows(base, rows):
    goal, model, batch = label_objective(rows, targets(len(rows)), loss='confidence'), shaken(base), list(range(16))
    def gradient():
        for p in trainable(model).values(): p.grad = None
        step_gradient(model, for_step(goal, model, batch, .5, 500), batch, 500)
        return torch.cat([p.grad.flatten() for p in trainable(model).values()])
    before = gradient()
    class_probs(model, rows[16:], quiet=True)                    # an evaluation
    for_step(goal, model, list(range(16, 40)), .9, 500)          # another step's preparation
    assert torch.equal(gradient(), before)
    model.unload()


def test_opinions_of_more_classes_are_the_best_assignment():
    r = np.random.default_rng(0)
    for _ in range(20):
        own, counts = torch.tensor(r.normal(size=(6, 3))), [1, 2, 3]
        hard = harden(own, counts)
        assert hard.sum(0).tolist() == counts
        logps = own.log_softmax(1).numpy()
        best = max(sum(logps[i, c] for i, c in enumerate(cs)) for cs in set(itertools.permutations([0, 1, 1, 2, 2, 2])))
        assert (hard.numpy()*logps).sum() == pytest.approx(best, abs=1e-3)


# ---- 4: the warm-up

@pytest.mark.parametrize('warmup', [0., .1, .2, 1.])
def test_pitfall_04_the_warm_up_is_a_straight_line(warmup):
    x = np.linspace(0, 1, 1001)
    a = np.array([confidence_weight(t, warmup, .5) for t in x])
    assert a.max() == .5 and (np.diff(a) >= 0).all()
    if warmup:
        assert a[0] == 0 and np.diff(a).max() < .5/(1000*warmup) + 1e-9 # continuous
        assert confidence_weight(warmup, warmup, .5) == .5 and confidence_weight(warmup/2, warmup, .5) == pytest.approx(.25)
    else: assert (a == .5).all()


def test_pitfall_04_training_follows_the_line(base, rows, tmp_path, monkeypatch):
    "Twenty steps, warm-up over a fifth: 0, 1/4, 2/4, 3/4 of the highest weight, then all of it"
    seen, real = {}, label_losses.confidence
    def watched(logps, target, hard, alpha): seen[step_number[0]] = alpha; return real(logps, target, hard, alpha)
    step_number, take = [0], loop.take_step
    def take_step(*a):
        out = take(*a)
        step_number[0] += 1
        return out
    monkeypatch.setattr(label_losses, 'confidence', watched)
    monkeypatch.setattr(loop, 'take_step', take_step)
    model = add_adapter(base, LoraSettings(rank=2))
    train(
        model,
        label_objective(rows[:20], targets(20), loss='confidence', options={'highest': 0.6}),
        TrainSettings(epochs=5, batch_size=5),
        tmp_path,
        quiet=True,
    )
    model.unload()
    assert [seen.get(i, 0.) for i in range(20)] == pytest.approx([0., .15, .3, .45] + [.6]*16)


def test_pitfall_04_the_product_follows_the_line(base, rows, tmp_path, monkeypatch):
    "Its power of the own opinion rises from 0 as the weight of the confidence loss does"
    seen, real = [], label_variants.product
    def watched(logits, target, alpha, beta): seen.append((alpha, beta)); return real(logits, target, alpha, beta)
    monkeypatch.setattr(label_variants, 'product', watched)
    model = add_adapter(base, LoraSettings(rank=2))
    goal = label_objective(rows[:20], targets(20), loss='product', options={'alpha': .7, 'beta': .6})
    train(model, goal, TrainSettings(epochs=5, batch_size=5), tmp_path, quiet=True)
    model.unload()
    assert [b for _, b in seen] == pytest.approx([0., .15, .3, .45] + [.6]*16) and {a for a, _ in seen} == {.7}


@pytest.mark.parametrize('warmup', [0., .1, .2, 1.])
def test_pitfall_04_every_warm_up_is_a_straight_line(warmup):
    a = np.array([warm_up(t, warmup) for t in np.linspace(0, 1, 1001)])
    assert a[-1] == 1 and (np.diff(a) >= 0).all()
    if warmup: assert a[0] == 0 and np.diff(a).max() < 1/(1000*warmup) + 1e-9 and warm_up(warmup/2, warmup) == pytest.approx(.5)
    else: assert (a == 1).all()


@pytest.mark.parametrize(
    'loss, bad',
    [
        ('confidence', dict(warmup=-0.1)),
        ('confidence', dict(warmup=1.1)),
        ('confidence', dict(highest=2.0)),
        ('confidence', dict(highest=math.nan)),
        ('product', dict(alpha=0.0)),
        ('product', dict(beta=-1.0)),
        ('product', dict(warmup='half')),
        ('entropy', dict(strength=-0.1)),
        ('entropy', dict(strength=True)),
        ('window', dict(radius=-1.0)),
        ('window', dict(radius=None)),
    ],
)
def test_options_out_of_range_are_refused(rows, loss, bad):
    with pytest.raises(ConfigError, match='must lie in'): label_objective(rows, targets(len(rows)), loss=loss, options=bad)


@pytest.mark.parametrize('loss', LABEL_LOSSES)
def test_options_of_another_loss_are_refused_and_the_own_ones_are_named(rows, loss):
    own = LABEL_LOSSES[loss].options
    for name in {n for e in LABEL_LOSSES.values() for n in e.options}:
        if name in own: label_objective(rows, targets(len(rows)), loss=loss, options={name: .5})
        else:
            with pytest.raises(ConfigError, match='its options are ' + ', '.join(own) if own else 'it has no options'):
                label_objective(rows, targets(len(rows)), loss=loss, options={name: .5})
    with pytest.raises(ConfigError, match='known'): label_objective(rows, targets(len(rows)), loss='zzz')


@pytest.mark.parametrize(
    'loss, options',
    [
        (k, {n: v})
        for k, n, v in (
            ('confidence', 'warmup', 1.0),
            ('confidence', 'highest', 0.3),
            ('product', 'alpha', 0.5),
            ('product', 'beta', 0.2),
            ('product', 'warmup', 1.0),
            ('entropy', 'strength', 1.0),
            ('window', 'radius', 0.1),
            ('focal', 'gamma', 0.0),
        )
    ],
)
def test_every_option_acts(base, rows, loss, options):
    weak, batch = targets(len(rows)), list(range(24))
    a, b = (step(base, label_objective(rows, weak, loss=loss, options=o), batch)[1] for o in (None, options))
    assert (a - b).abs().max() > 1e-3


# ---- 5: weights

def test_pitfall_05_weights_act(base, rows):
    weak, batch = targets(len(rows)), [0, 1, 2, 3]
    def gradient(w, batch=batch, loss='xent'):
        w = [1.]*len(rows) if w is None else w + [1.]*(len(rows) - 4)
        out = step(base, label_objective(rows, weak, w, loss), batch)[1]
        return out * len(batch)
    doubled = gradient([1., 2., 1., 1.])
    assert (doubled - gradient(None)).abs().max() > 1e-3
    assert (doubled - gradient(None, [0, 1, 1, 2, 3])).abs().max() < 1e-5
    assert (gradient([3., 1., 1., 1.], [0])/3 - gradient(None, [0])).abs().max() < 1e-5


@pytest.mark.parametrize('loss', LABEL_LOSSES)
def test_pitfall_05_rows_of_weight_0_teach_nothing_and_have_no_say_in_the_threshold(base, rows, loss):
    weak, batch = targets(len(rows)), list(range(30))
    weak[1::2] = [0., 1.] # those that are left out would ask for another share of classes
    goals = [label_objective(rows, weak, w, loss) for w in ([1., 0.]*(len(rows)//2), None)]
    (_, left_out), (_, absent), (_, plain) = step(base, goals[0], batch), step(base, goals[1], batch[::2]), step(base, goals[1], batch)
    assert (left_out*30 - absent*15).abs().max() < 1e-5 < (left_out - plain).abs().max()


# ---- 7: end tokens, pads, templates

def test_pitfall_07_the_end_token_has_no_part_in_a_label(base, data, rows):
    end = base.tokenizer.eos_token_id
    assert all(end not in s.ids and s.response for r in rows for s in r.sequences)
    assert [base.tokenizer.decode(s.response) for s in rows[0].sequences] == list(WORDS)
    own = PreTrainedTokenizerFast(tokenizer_object=base.tokenizer._tokenizer, eos_token='</s>', pad_token='</s>', bos_token='<s>')
    assert [r.sequences for r in encode_labels(own, data, WORDS, 128).rows] == [r.sequences for r in rows] # the pad is the end token


def test_class_log_probs_are_those_of_the_words(base):
    "Several tokens a word: the sum of its own tokens' log-probs, by the model's own logits"
    words = (' no', ' certainly not', ' perhaps yes')
    seqs = encode_words(base.tokenizer, question('zork'), words)
    assert len({len(s.response) for s in seqs}) > 1
    with torch.no_grad():
        ours = class_logps(response_logps(base.model, block(seqs))[None])[0]
        total = []
        for s in seqs:
            logp = base.model(torch.tensor([s.ids])).logits[0].log_softmax(-1)
            total.append(sum(logp[t - 1, s.ids[t]].item() for t in range(s.start, len(s.ids))))
    assert torch.allclose(ours, torch.tensor(total).log_softmax(0), atol=1e-4)


def test_nothing_that_a_template_writes_after_the_word_is_counted(base):
    tok = PreTrainedTokenizerFast(tokenizer_object=base.tokenizer._tokenizer, eos_token='</s>', pad_token='<pad>', bos_token='<s>')
    tok.chat_template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    seqs = encode_words(tok, [{'role': 'user', 'content': 'May I?'}], ('no', 'yes'))
    assert [tok.decode(s.ids) for s in seqs] == ['[user] May I?</s>[assistant] no', '[user] May I?</s>[assistant] yes']


@pytest.mark.parametrize('words', [(' no', ' no'), (' no', ''), (' no', ' no way'), (' not a bit', ' not')])
def test_words_that_cannot_win_are_refused(base, data, words):
    with pytest.raises(DataError, match='could never win'): encode_labels(base.tokenizer, data, words, 128)


def test_a_long_prompt_is_cut_from_the_left_for_all_words_alike(base):
    data = make_rows([{'prompt': 'Q: ' + 'very '*80 + 'good?\nA:', 'label': 1}, {'prompt': 'Q: good?\nA:', 'label': 1}], 'labels')
    tokens = encode_labels(base.tokenizer, data, WORDS, 40)
    long, short = tokens.rows
    assert long.cut > 0 and short.cut == 0 and max(len(s.ids) for s in long.sequences) == 40
    assert long.sequences[0].ids[:long.sequences[0].start] == long.sequences[1].ids[:long.sequences[1].start]
    assert base.tokenizer.decode(long.sequences[1].ids).endswith('good?\nA: yes')


# ---- 12: the opinion in evaluation mode, the training in training mode

def test_pitfall_12_dropout_has_no_part_in_the_opinion(base, rows):
    weak, batch = targets(len(rows)), list(range(32))
    model = shaken(base, dropout=.5)
    goal = label_objective(rows, weak, loss='confidence')
    a, b = (batch_opinion(model, [rows[i] for i in batch], torch.tensor(weak[batch]), 500) for _ in range(2))
    assert torch.equal(a, b)
    for_step(goal, model, batch, .5, 500)
    assert model.training and next(m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p == .5).training
    model.unload()


# ---- 16: killed and started again

def test_pitfall_16_resume_ends_in_the_same_bits(base, rows, tmp_path, monkeypatch):
    goal = label_objective(rows, targets(len(rows)), loss='confidence')
    settings = TrainSettings(epochs=2, batch_size=8, learning_rate=5e-3, checkpoint_every=3)
    def weights(folder):
        model = add_adapter(base, LoraSettings(rank=2, dropout=.1), seed=0)
        try:
            train(model, goal, settings, folder, quiet=True)
            return {n: p.detach().clone() for n, p in trainable(model).items()}
        finally: model.unload()
    straight, take, left = weights(tmp_path/'a'), loop.take_step, [7]
    def dies(*a):
        if not left[0]: raise KeyboardInterrupt
        left[0] -= 1
        return take(*a)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(loop, 'take_step', dies)
        weights(tmp_path/'b')
    again = weights(tmp_path/'b')
    assert all(torch.equal(again[n], straight[n]) for n in straight)


def test_an_objective_that_was_not_prepared_takes_no_step(base, rows):
    goal, model = label_objective(rows, targets(len(rows)), loss='confidence'), shaken(base)
    with pytest.raises(ConfigError, match='for_step'): step_gradient(model, goal, [0, 1], 500)
    model.unload()


# ---- 18: leakage

def test_pitfall_18_a_supervisor_may_not_label_what_it_was_trained_on(data):
    probs = targets(len(data))
    with pytest.raises(DataError, match='was trained on 1 of the groups'):
        weak_labels(data, probs, 'pico', seen=[data['group'][5], 'other'])
    assert weak_labels(data, probs, 'pico', seen=['other'])['source'] == ['pico']*len(data)


def test_pitfall_18_gold_labels_of_weak_rows_are_not_read(base, data, rows, tmp_path):
    "Training with the gold labels taken away, or all turned round, ends in the same bits"
    labelled, out = weak_labels(data, targets(len(data)), 'pico', seen=[]), []
    for n, gold in enumerate((labelled['label'], [None]*len(data), [1 - x for x in labelled['label']])):
        d = labelled.remove_columns('label').add_column('label', gold)
        model = add_adapter(base, LoraSettings(rank=2), seed=0)
        train(
            model,
            label_objective(rows, label_targets(d, rows), loss='confidence'),
            TrainSettings(learning_rate=5e-3),
            tmp_path / str(n),
            quiet=True,
        )
        out.append(torch.cat([p.detach().flatten().clone() for p in trainable(model).values()]))
        model.unload()
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


def test_targets_follow_the_ids_and_not_the_places(data, rows):
    shuffled = data.select(np.random.default_rng(0).permutation(len(data)).tolist())
    assert (label_targets(shuffled, rows) == label_targets(data, rows)).all()


# ---- other numbers than words

def test_a_forward_of_its_own_is_used_for_the_opinion_too(base, rows):
    "Rows with one sequence and three numbers each: what a head gives. The hard opinions come from these, not from words"
    single = [EncodedRow(r.id, r.sequences[:1], 0) for r in rows]
    def three(model, data):
        word = response_logps(model, data)
        return torch.stack([word, -word, sum_sequences(data.target.float(), data.sequence, data.count)/500], 1)
    weak, batch, calls = targets(len(rows), 3), list(range(20)), []
    def forward(model, data):
        calls.append(torch.is_grad_enabled())
        return three(model, data)
    for loss in LABEL_LOSSES:
        calls.clear()
        found, gradient = step(base, label_objective(single, weak, loss=loss, forward=forward), batch, 300)
        assert math.isfinite(found) and gradient.abs().max() > 0
        assert (False in calls) == (loss in ('confidence', 'window'))
    model = shaken(base)
    own = torch.tensor(score(model, [single[i] for i in batch], forward=three, quiet=True))
    opinion = batch_opinion(model, [single[i] for i in batch], torch.tensor(weak[batch]), 300, three)
    model.unload()
    assert own.shape == (20, 3) and torch.equal(opinion, harden(own, class_counts(torch.tensor(weak[batch]))))


def test_numbers_of_another_shape_than_the_targets_are_refused(base, rows):
    single = [EncodedRow(r.id, r.sequences[:1], 0) for r in rows]
    for loss in LABEL_LOSSES:
        with pytest.raises(DataError): step(base, label_objective(single, targets(len(rows)), loss=loss), [0, 1])


# ---- learning

def test_soft_labels_are_learned(base, rows, tmp_path):
    "The lowest cross-entropy is where the student says what the labels say"
    weak = np.array([[.2, .8], [.7, .3]])[[len(r.sequences[0].ids) % 2 for r in rows]]
    model = add_adapter(base, LoraSettings(rank=4), seed=0)
    before = class_probs(model, rows, quiet=True)
    train(model, label_objective(rows, weak), TrainSettings(epochs=20, batch_size=16, learning_rate=1e-2), tmp_path, quiet=True)
    after = class_probs(model, rows, quiet=True)
    model.unload()
    assert abs(after - weak).mean() < .5*abs(before - weak).mean()
    assert (
        soft_xent(torch.tensor(after).log(), torch.tensor(weak)).mean() < soft_xent(torch.tensor(before).log(), torch.tensor(weak)).mean()
    )


# ---- cleaning

@pytest.fixture(scope='module')
def noisy():
    "A made-up space of two clouds, things of four rows, and one label in five turned round by chance"
    r = np.random.default_rng(0)
    things = np.repeat(np.arange(100), 4)
    true = r.integers(0, 2, 100)[things]
    hidden = r.normal(size=(2, 12))[true]*1.5 + r.normal(size=(400, 12))
    wrong = r.random(400) < .2
    weak = np.eye(2)[np.where(wrong, 1 - true, true)]*.8 + .1
    return hidden, weak, wrong, [str(t) for t in things], true


@pytest.mark.parametrize('probe', PROBES)
def test_removed_labels_are_wrong_far_above_the_base_rate(noisy, probe):
    hidden, weak, wrong, things, true = noisy
    out = clean_by_probe(hidden, weak, 'filter', probe, groups=things)
    gone = out.weights == 0
    assert gone.sum() == 40 and wrong[gone].mean() > .8 > .25 > wrong.mean() and (out.targets == weak).all()
    assert [gone[weak.argmax(1) == c].sum() for c in (0, 1)] == [round(.1*(weak.argmax(1) == c).sum()) for c in (0, 1)]
    again = clean_by_probe(hidden, weak, 'relabel', probe, groups=things)
    assert (again.targets.argmax(1) != true).mean() < .5*wrong.mean() and (again.weights == 1).all()


@pytest.mark.parametrize('probe', PROBES)
def test_pitfall_18_a_row_is_judged_by_a_probe_of_other_groups(noisy, probe):
    "Turning round the labels of one thing changes nothing that is said of its rows"
    hidden, weak, _, things, _ = noisy
    own = np.array(things) == '7'
    turned = np.where(own[:, None], 1 - weak, weak)
    a, b = (clean_by_probe(hidden, w, 'relabel', probe, groups=things).targets for w in (weak, turned))
    assert np.array_equal(a[own], b[own]) and not np.array_equal(a[~own], b[~own])


def test_folds_are_seeded_even_and_whole(noisy):
    *_, things, _ = noisy
    fold = row_folds(things, 5, seed=3)
    assert (fold == row_folds(things, 5, seed=3)).all() and (fold != row_folds(things, 5, seed=4)).any()
    assert np.bincount(fold).tolist() == [80]*5 and all(len(set(fold[np.array(things) == t])) == 1 for t in things)
    uneven = ['a']*50 + ['b']*30 + [f'c{i}' for i in range(40)]
    assert sorted(np.bincount(row_folds(uneven, 3))) == [35, 35, 50]


def test_gold_is_no_part_of_cleaning(noisy):
    "Only hidden states, weak labels and groups go in; with the same of these the result is the same"
    hidden, weak, _, things, _ = noisy
    a, b = (clean_by_probe(hidden.copy(), weak.tolist(), groups=things) for _ in range(2))
    assert np.array_equal(a.weights, b.weights) and np.array_equal(a.probs, b.probs)


def test_cleaned_labels_train(base, rows, noisy):
    hidden, weak, *_ = noisy
    out = clean_by_probe(hidden[:len(rows)], weak[:len(rows)], share=.3)
    dropped = np.flatnonzero(out.weights == 0)
    assert len(dropped) and step(base, label_objective(rows, out.targets, out.weights), dropped.tolist())[1].abs().max() == 0


# ---- focal loss and balanced weak labels

def focal_by_hand(z, weak, gamma):
    "Eq. 5 of 1708.02002 in 64 bits, for a distribution instead of one class"
    out = []
    for row, w in zip(z, weak, strict=True):
        f = np.exp(row - row.max())/np.exp(row - row.max()).sum()
        out.append(-sum(t*(1 - x)**gamma*math.log(x) for t, x in zip(w, f, strict=True)))
    return out


@pytest.mark.parametrize('gamma', [0., 1., 2., 3.5])
@pytest.mark.parametrize('classes', [2, 4])
def test_focal_loss_is_its_equation(gamma, classes):
    z, weak = np.random.default_rng(0).normal(0, 2, (40, classes)), np.random.default_rng(1).dirichlet(np.ones(classes), 40)
    found = LABEL_LOSSES['focal'].fill({'logits': torch.tensor(z), 'target': torch.tensor(weak)}, {'gamma': gamma})
    assert np.allclose(found, focal_by_hand(z, weak, gamma), rtol=1e-4)


@pytest.mark.parametrize('logit', [-60., -20., 0., 20., 60.])
@pytest.mark.parametrize('label', [0., .3, 1.])
def test_focal_loss_is_finite_at_the_ends(logit, label):
    x = torch.tensor([[0., logit]], requires_grad=True)
    value = LABEL_LOSSES['focal'].fill({'logits': x, 'target': torch.tensor([[1 - label, label]])}, {})
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize('shift', [-3., 0., 2.])
def test_balanced_labels_are_log_odds_without_their_mean(shift):
    "For two classes: the sigmoid of the log-odds minus their mean over the batch; a shift of all of them changes nothing"
    signal = np.random.default_rng(0).normal(0, 1.5, 32)
    def weak(z): return torch.tensor(np.stack([1/(1 + np.exp(z)), 1/(1 + np.exp(-z))], 1))
    z = torch.tensor(np.random.default_rng(1).normal(0, 1, (32, 2)))
    def loss(target): return LABEL_LOSSES['balanced'].fill({'logits': z[:5], 'target': target[:5], 'batch_target': target})
    p = 1/(1 + np.exp(-(signal - signal.mean())))
    logps = torch.log_softmax(z[:5], -1).numpy()
    want = -((1 - p[:5])*logps[:, 0] + p[:5]*logps[:, 1])
    assert np.allclose(loss(weak(signal + shift)), want, rtol=1e-4)


def test_hard_labels_can_be_balanced():
    "A batch in which all weak labels are one hard class says nothing any more, and is finite"
    target = torch.tensor([[0., 1.]]*6)
    value = LABEL_LOSSES['balanced'].fill({'logits': torch.zeros(6, 2), 'target': target, 'batch_target': target})
    assert torch.allclose(value, torch.full((6,), math.log(2)))


@pytest.mark.parametrize('loss', ['balanced', 'confidence', 'window'])
def test_the_whole_batch_is_that_of_the_step(base, rows, loss):
    "What a loss sees of the batch does not depend on the micro-batch"
    weak, batch = targets(len(rows)), list(range(24))
    found = [step(base, label_objective(rows, weak, loss=loss), batch, budget)[1] for budget in (10**6, 200)]
    assert (found[0] - found[1]).abs().max() < 1e-5
