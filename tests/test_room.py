"""Memory that runs out anywhere: the work goes on in halves, or once more, with the same result

`Short` is an accountant that refuses the n-th allocation: it sees every operation of PyTorch, forward and backward, and raises
what a GPU raises instead of one that would need memory. Twice in a row, and the micro-batch has to be halved.
"""
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils._python_dispatch import TorchDispatchMode

from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.errors import TrainError, W2SWarning
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.class_heads import add_class_adapter
from w2s.models.heads import add_reward_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.places import SWITCH
from w2s.models.tiny import tiny_model
from w2s.train.class_head import class_logits, encode_texts
from w2s.train.generate import respond
from w2s.train.labels import label_objective
from w2s.train.logprobs import check_model, score
from w2s.train.loop import computes_twice, preference_objective, sft_objective, train
from w2s.train.probe import last_hidden
from w2s.train.rewards import response_rewards, reward_objective
from w2s.train.room import Room, fitting
from w2s.train.settings import GenerateSettings, TrainSettings
from w2s.train.short_attention import bunches
from w2s.train.tokens import encode_rows

VIEWS = {
    'view',
    'transpose',
    't',
    'expand',
    'detach',
    'alias',
    'slice',
    'select',
    'unsqueeze',
    'squeeze',
    'permute',
    'as_strided',
    'split',
    'unbind',
    '_unsafe_view',
    'diagonal',
}


class Short(TorchDispatchMode):
    "Counts allocations, and refuses some of them"
    def __init__(self, at=0, times=1, error=torch.OutOfMemoryError, limit=None):
        super().__init__()
        bunches.cache_clear() # what is kept of an earlier run needs no allocation
        self.seen, self.bad, self.error, self.limit, self.failed = 0, range(at, at + times if at else at), error, limit, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition('::')[2]
        if not func._schema.is_mutable and name not in VIEWS:
            self.seen += 1
            large = self.limit and any(isinstance(a, torch.Tensor) and a.dim() == 3 and a.shape[0]*a.shape[1] > self.limit for a in args)
            if self.seen in self.bad or large:
                self.failed.append(name)
                raise self.error(
                    "CUDA out of memory. Tried to allocate 2.00 GiB"
                    if self.error is torch.OutOfMemoryError
                    else "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                         "99 bytes. Error code 12 (Cannot allocate memory)"
                )
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def no_search(monkeypatch):
    "To look for cycles in all of PyTorch takes half a second, each time"
    monkeypatch.setattr('w2s.models.devices.gc.collect', lambda: 0)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
    texts = [r['prompt'] + r[k] for r in sample_preferences(60, seed=3) for k in ('chosen', 'rejected')]
    base = load_base(
        tiny_model(tmp_path_factory.mktemp('room') / 'tiny', texts, hidden=32, layers=1, context=256),
        LoadSettings('none', 'float32'),
        device='cpu',
    )
    check_model(base) # as every base is when it is opened: allocations are then the same each time
    return base


@pytest.fixture(scope='module')
def rows(base):
    return encode_rows(base.tokenizer, make_rows(sample_preferences(6, seed=0), 'preferences'), ('chosen', 'rejected'), 128).rows


@pytest.fixture(scope='module')
def texts(base):
    return encode_texts(
        base.tokenizer,
        Dataset.from_dict(
            {
                'id': [str(i) for i in range(5)],
                'prompt': ['The fox lives by the river.', 'Where?', 'A fox', 'The river is where the fox lives', 'By the'],
            }
        ),
        64,
    ).rows


LORA = LoraSettings(rank=2)
STEP = TrainSettings(batch_size=6, epochs=2, learning_rate=3e-3, warmup=0)
TRAININGS = {
    'dpo': (lambda base: add_adapter(base, LORA), lambda rows, texts: preference_objective(rows, np.zeros((len(rows), 2)))),
    'sft': (lambda base: add_adapter(base, LORA), lambda rows, texts: sft_objective(rows)),
    'reward model': (lambda base: add_reward_adapter(base, LORA), lambda rows, texts: reward_objective(rows)),
    'class head': (
        lambda base: add_class_adapter(base, LORA),
        lambda rows, texts: label_objective(texts, [[0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0, 1]], forward=class_logits),
    ),
    'confidence loss': (
        lambda base: add_class_adapter(base, LORA),
        lambda rows, texts: label_objective(
            texts, [[0.2, 0.8], [0.6, 0.4], [0.5, 0.5], [0.9, 0.1], [0, 1]], loss='confidence', forward=class_logits
        ),
    ),
}


def trained(base, make, goal, folder, mode=None, settings=STEP):
    "Weights after a training in which memory is short"
    model = make(base)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', W2SWarning)
            with mode or Short(): history = train(model, goal, settings, folder, quiet=True)
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]), history
    finally: model.unload()


def sites(count, most):
    "Some places spread over all; with W2S_ALL_SITES in the environment every one, which takes an hour"
    return (
        range(1, count + 1) if count <= most or 'W2S_ALL_SITES' in os.environ else sorted({round(x) for x in np.linspace(1, count, most)})
    )


@pytest.mark.parametrize('kind', TRAININGS)
def test_one_refused_allocation_changes_no_bit_of_a_training(base, rows, texts, tmp_path, kind):
    "Wherever it is: forward, backward, sums of gradients, their norm, the optimizer"
    make, goal = TRAININGS[kind]
    counter = Short()
    straight, curve = trained(base, make, goal(rows, texts), tmp_path/'straight', counter)
    met = set()
    for n in sites(counter.seen, 16):
        short = Short(n)
        weights, history = trained(base, make, goal(rows, texts), tmp_path/str(n), short)
        met |= set(short.failed)
        assert short.failed and torch.equal(weights, straight), (n, short.failed)
        assert history.equals(curve), (n, short.failed)
    assert len(met) > 4


@pytest.mark.parametrize('kind', TRAININGS)
def test_two_refusals_halve_the_micro_batch_and_change_the_last_bits_only(base, rows, texts, tmp_path, kind, monkeypatch):
    "The same block is refused again: then the sum is made of smaller blocks, in another order"
    for at in SWITCH.values(): monkeypatch.setattr(base.model, at, 'off', raising=False) # plain sums
    make, goal = TRAININGS[kind]
    counter = Short()
    straight, _ = trained(base, make, goal(rows, texts), tmp_path/'straight', counter)
    halved = 0
    for n in sites(counter.seen, 8):
        weights, history = trained(base, make, goal(rows, texts), tmp_path/str(n), Short(n, 2))
        halved += 'token_budget' in history
        assert (weights - straight).abs().max() < 1e-6, n
    assert halved > 2 # the others were met outside of the blocks


def test_any_step_may_be_the_one(base, rows, tmp_path):
    "The error of a CPU, every 97th allocation of a training of six steps"
    make, goal = TRAININGS['dpo']
    settings, counter = replace(STEP, batch_size=2, epochs=2), Short()
    straight, _ = trained(base, make, goal(rows, None), tmp_path/'straight', counter, settings)
    for n in range(50, counter.seen, 697):
        weights, _ = trained(base, make, goal(rows, None), tmp_path/str(n), Short(n, error=RuntimeError), settings)
        assert torch.equal(weights, straight)


def test_a_wall_is_met_once_and_remembered(base, rows, tmp_path):
    "No block of more than so many tokens fits: one warning, one lower budget in the history, and a resumed run begins with it"
    make, goal = TRAININGS['dpo']
    most = 4*max(len(s.ids) for r in rows for s in r.sequences) # two pairs
    straight, _ = trained(base, make, goal(rows, None), tmp_path/'straight')
    model = make(base)
    with pytest.warns(W2SWarning, match='going on with') as said, Short(limit=most):
        history = train(model, goal(rows, None), STEP, tmp_path / 'wall', quiet=True)
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    model.unload()
    assert len([w for w in said if 'going on with' in str(w.message)]) == 1
    assert (weights - straight).abs().max() < 1e-6
    assert (history.token_budget <= 8192//2).all() and history.token_budget.nunique() == 1


def test_a_row_that_fits_nowhere_gets_checkpointing_and_then_a_word(base, rows, tmp_path):
    make, goal = TRAININGS['dpo']
    model = make(base)
    with (
        pytest.warns(W2SWarning, match='gradient checkpointing is switched on'),
        Short(limit=4),
        pytest.raises(TrainError, match='single row of .* at step 0; lower max_length'),
    ):
        train(model, goal(rows, None), STEP, tmp_path/'a', quiet=True)
    assert not computes_twice(model) # the base is used again
    with warnings.catch_warnings(action='ignore'), Short(limit=4), pytest.raises(TrainError, match='or set gradient_checkpointing'):
        train(model, goal(rows, None), replace(STEP, gradient_checkpointing=False), tmp_path/'b', quiet=True)
    model.unload()


def test_other_errors_are_not_taken_for_it(base, rows, tmp_path):
    make, goal = TRAININGS['dpo']
    class Broken(Short):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if 'mm' in func._schema.name: raise RuntimeError('CUDA error: an illegal memory access was encountered')
            return func(*args, **(kwargs or {}))
    model = make(base)
    with Broken(), pytest.raises(RuntimeError, match='illegal'): train(model, goal(rows, None), STEP, tmp_path/'a', quiet=True)
    model.unload()


def test_dropout_masks_are_drawn_again_in_a_second_try(base, rows, tmp_path):
    "The same block, the same masks; of smaller blocks it is said that the masks are others"
    goal, counter = sft_objective(rows), Short()
    def make(base): return add_adapter(base, LoraSettings(rank=2, dropout=.3))
    straight, _ = trained(base, make, goal, tmp_path/'straight', counter)
    for n in sites(counter.seen, 6): assert torch.equal(trained(base, make, goal, tmp_path/str(n), Short(n))[0], straight)
    model = make(base)
    with pytest.warns(W2SWarning, match='with other dropout masks'), Short(20, 2): train(model, goal, STEP, tmp_path/'two', quiet=True)
    model.unload()


SCORES = {
    'log-probs': lambda base, rows, texts: score(base.model, rows, quiet=True),
    'rewards': lambda base, rows, texts: headed(base, add_reward_adapter, lambda m: response_rewards(m, rows, quiet=True)),
    'class head': lambda base, rows, texts: headed(base, add_class_adapter, lambda m: score(m, texts, quiet=True, forward=class_logits)),
    'probe': lambda base, rows, texts: last_hidden(base.model, texts, quiet=True),
}


def headed(base, make, work):
    with torch.utils._python_dispatch._disable_current_modes(): model = make(base, LORA) # not yet scoring
    try: return work(model)
    finally: model.unload()


@pytest.mark.parametrize('times', [1, 2])
@pytest.mark.parametrize('kind', SCORES)
def test_scores_are_the_same(base, rows, texts, kind, times):
    with Short() as counter: straight = SCORES[kind](base, rows, texts)
    for n in sites(counter.seen, 16):
        with warnings.catch_warnings(action='ignore'), Short(n, times) as short:
            found = SCORES[kind](base, rows, texts)
        assert short.failed
        if times == 1: assert np.array_equal(found, straight)
        else: assert np.abs(found - straight).max() < 2e-5


@pytest.mark.parametrize('times', [1, 2])
def test_responses_are_the_same(base, times, tmp_path):
    "With a journal: each is written down once"
    prompts, how = (
        ['The fox', 'Where does', 'The fox lives by the', 'A river where the'],
        GenerateSettings(max_tokens=6, temperature=1.0, samples=2),
    )
    def go(name): return respond(base.model, base.tokenizer, prompts, how, 3, quiet=True, journal=tmp_path/name)
    with Short() as counter: straight = go('straight')
    for n in sites(counter.seen, 12):
        with warnings.catch_warnings(action='ignore'), Short(n, times) as short: assert go(f'{n}') == straight
        assert short.failed
    with warnings.catch_warnings(action='ignore'): assert go('straight') == straight


def test_no_tensor_of_the_failed_try_stays(base):
    "What was made before memory ran out is free before the second try"
    import gc
    import weakref
    kept, alive = [], []
    def work(part):
        alive.append(sum(r() is not None for r in kept))
        big = torch.zeros(1000)
        kept.append(weakref.ref(big))
        if len(part) > 1: raise torch.OutOfMemoryError('no room')
        return len(big)
    gc.disable()
    try:
        with warnings.catch_warnings(action='ignore'): assert len(list(fitting(range(4), [5]*4, Room(100), work))) == 4
    finally: gc.enable()
    assert max(alive) == 0
