"""What only a GPU can show; left out where there is none

`python benchmarks/first_gpu.py` measures the same on a model of a useful size, and prints a table.
"""
import os
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from launched import ended, started
from transformers import MistralConfig, MistralForCausalLM

from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.errors import W2SWarning
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.devices import find_device, free_memory, has_bfloat16, settle
from w2s.models.load import LoadSettings, load_base
from w2s.models.places import SWITCH
from w2s.models.sharding import SHOWN, own_weights, repeated_layers
from w2s.models.tiny import pretrain, tiny_model
from w2s.train.checkpoints import trainable
from w2s.train.generate import respond
from w2s.train.logprobs import check_model, score, token_logps
from w2s.train.loop import loss_scale, preference_objective, step_gradient, train
from w2s.train.packed_models import packed_alone, packed_states, packs, why_not_packed
from w2s.train.packing import pack
from w2s.train.processes import all_processes, together
from w2s.train.reference import stored_logps
from w2s.train.sampling import next_logits
from w2s.train.settings import GenerateSettings, TrainSettings
from w2s.train.step_memory import estimate_step, model_bytes
from w2s.train.tokens import Encoded, EncodedRow, encode_rows
from w2s.train.vllm_engine import load_vllm, stop_vllm

pytestmark = [pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA GPU'), pytest.mark.filterwarnings('ignore::FutureWarning')]
STEP = TrainSettings(batch_size=8, epochs=2, learning_rate=1e-3, warmup=0, checkpoint_every=2, token_budget=600)
KINDS = {
    'float32': LoadSettings('none', 'float32'),
    'bfloat16': LoadSettings('none', 'bfloat16'),
    'bfloat16, plain': LoadSettings('none', 'bfloat16', compute='plain'),
    'nf4': LoadSettings('nf4', 'bfloat16'),
    'float16': LoadSettings('none', 'float16'),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    texts = [r['prompt'] + r[k] for r in sample_preferences(60, seed=3) for k in ('chosen', 'rejected')]
    return tiny_model(tmp_path_factory.mktemp('gpu')/'tiny', texts, hidden=128, layers=4, context=256)


def opened(folder, kind): return load_base(folder, replace(KINDS[kind], device='cuda'))


@pytest.fixture(params=KINDS)
def base(request, folder): return opened(folder, request.param)


def rows_of(base):
    return encode_rows(base.tokenizer, make_rows(sample_preferences(16, seed=0), 'preferences'), ('chosen', 'rejected'), 128).rows


def goal_of(rows): return preference_objective(rows, np.zeros((len(rows), 2)))


def learned(base, folder, settings=STEP, after=None):
    model = add_adapter(base, LoraSettings(rank=4))
    try:
        curve = train(model, goal_of(rows_of(base)), settings, folder, quiet=True, after=after)
        return torch.cat([p.detach().cpu().flatten() for p in trainable(model).values()]), curve
    finally: model.unload()


def test_everything_is_there(base):
    "Weights on the GPU, log-probs those of the model's own logits"
    assert all(p.device == find_device('cuda') for p in base.model.parameters())
    check_model(base)


def test_the_first_gpu_is_found():
    now = settle(LoadSettings())
    assert (
        now.device == 'cuda:0'
        and now.dtype == ('bfloat16' if has_bfloat16(torch.device('cuda:0')) else 'float16')
        and now.compute == 'autocast'
    )
    assert 0 < free_memory(torch.device('cuda:0')) <= torch.cuda.get_device_properties(0).total_memory


def test_a_resumed_training_ends_in_the_same_bits(base, tmp_path):
    "In deterministic mode; and the same training twice"
    straight, curve = learned(base, tmp_path/'a')
    again, _ = learned(base, tmp_path/'b')
    assert torch.equal(straight, again)
    def stop(taken):
        if taken == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learned(base, tmp_path/'c', after=stop)
    resumed, other = learned(base, tmp_path/'c')
    assert torch.equal(straight, resumed) and other.equals(curve)


def test_eight_at_once_are_one_by_one(base):
    "The gradient of a step, whatever its blocks"
    model, goal = add_adapter(base, LoraSettings(rank=4)), goal_of(rows_of(base))
    def gradient(budget):
        for p in trainable(model).values(): p.grad = None
        step_gradient(model, goal, range(8), budget)
        return torch.cat([p.grad.flatten() for p in trainable(model).values()])
    one, all_ = gradient(1), gradient(1 << 20)
    model.unload()
    assert (one - all_).norm() <= (1e-5 if base.settings.dtype == 'float32' else .03)*all_.norm()


def test_scoring_and_the_store(base, tmp_path):
    "The same twice, nearly the same one by one, and kept numbers are not taken for damaged"
    rows = rows_of(base)
    first = score(base.model, rows, quiet=True)
    assert np.array_equal(first, score(base.model, rows, quiet=True))
    tokens = np.array([[len(s.response) for s in r.sequences] for r in rows])
    assert (np.abs(first - score(base.model, rows, 1, quiet=True))/tokens**.5).max() < (1e-3 if base.settings.dtype == 'float32' else .05)
    stored_logps(tmp_path, base, None, rows, 8192, quiet=True)
    from w2s.train import reference
    reference._SEEN.clear()
    stored_logps(tmp_path, base, None, rows, 64, quiet=True)


def test_gpu_and_cpu_agree(folder):
    "In 32 bits"
    on, off = opened(folder, 'float32'), load_base(folder, LoadSettings('none', 'float32'), device='cpu')
    rows = rows_of(off)
    assert np.allclose(score(on.model, rows, quiet=True), score(off.model, rows, quiet=True), atol=1e-2)
    how = GenerateSettings(max_tokens=12, temperature=0)
    assert [len(r) for r in respond(on.model, on.tokenizer, ['The fox', 'Where'], how, quiet=True)] == [1, 1]


def long_rows(n, time=224):
    "Pairs of different responses to the same prompt"
    def ids(i, k): return 3 + (7*i + k*(1 if k < 100 else 5)) % 90
    def other(i, k): return ids(i, k) if k < 100 else 3 + (11*i + 3*k) % 90
    return [EncodedRow(f'r{i}', tuple(Encoded(tuple(of(i, k) for k in range(time)), 100) for of in (ids, other)), 0) for i in range(n)]


@pytest.mark.parametrize('twice', [False, True])
def test_the_estimate_is_what_is_allocated(base, twice, monkeypatch):
    "Within 15 percent, beyond what was there before; of padded sequences, which is what it counts"
    monkeypatch.setattr(base.model, SWITCH['packing'], 'off')
    model, rows = add_adapter(base, LoraSettings(rank=8)), long_rows(64)
    from w2s.train.step_memory import compute_twice
    compute_twice(model, twice)
    try:
        step_gradient(model, goal_of(rows), range(64), 1 << 20) # gradients are there, kernels are loaded
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step_gradient(model, goal_of(rows), range(64), 1 << 20)
        torch.cuda.synchronize()
        real = torch.cuda.max_memory_allocated() - before
        found = estimate_step(model, 224, twice, 128*224).at(128*224)
        assert abs(found/real - 1) < .15, (found, real)
        assert model_bytes(model) <= 1.15*torch.cuda.memory_allocated()
    finally:
        compute_twice(model, False)
        model.unload()


@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'nf4'])
def test_memory_that_runs_out_halves_the_block(folder, tmp_path, kind):
    "With a bound on the process that lets half of a step through: the same adapter, and a word"
    base, settings = (
        opened(folder, kind),
        TrainSettings(batch_size=64, learning_rate=1e-3, warmup=0, gradient_checkpointing=False, token_budget=1 << 20),
    )
    def go(name):
        model = add_adapter(base, LoraSettings(rank=4))
        try:
            train(model, goal_of(long_rows(64)), settings, tmp_path/name, quiet=True)
            return torch.cat([p.detach().cpu().flatten() for p in trainable(model).values()])
        finally: model.unload()
    straight = go('straight')
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    go('peak')
    torch.cuda.synchronize()
    total, peak, now = torch.cuda.get_device_properties(0).total_memory, torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((now + .7*(peak - now))/total)
    try:
        with pytest.MonkeyPatch.context() as m, pytest.warns(W2SWarning, match='going on with'):
            m.setattr('w2s.train.loop.free_memory', lambda device: None) # nobody knows: it has to be found out
            found = go('short')
    finally: torch.cuda.set_per_process_memory_fraction(1.)
    assert (found - straight).abs().max() < (1e-5 if kind == 'float32' else 2e-3)


def test_float16_has_a_scale(folder, tmp_path):
    "Gradients are those of 32 bits, nearly, and an infinite one is refused"
    half, full = opened(folder, 'float16'), opened(folder, 'float32')
    def gradient(base):
        model = add_adapter(base, LoraSettings(rank=4))
        step_gradient(model, goal_of(rows_of(base)), range(8), 1 << 20)
        out, scale = torch.cat([p.grad.flatten() for p in trainable(model).values()]), loss_scale(model)
        model.unload()
        return out, scale
    (a, scale), (b, none) = gradient(half), gradient(full)
    assert (scale, none) == (2.**14, 1.)
    assert (a - b).norm() < .02*b.norm()
    learned(half, tmp_path)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_the_logits_of_the_next_token_are_those_of_64_bits(dtype):
    "The head of a model in 16 bits is used as it is: its copy in 32 bits would be read at every token"
    draw = torch.Generator('cuda').manual_seed(0)
    weight = torch.randn(20_000, 64, generator=draw, device='cuda').bfloat16()
    hidden = torch.randn(16, 64, generator=draw, device='cuda').to(dtype)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ours = next_logits(hidden, weight, scale=.5, cap=30.)
    assert torch.cuda.max_memory_allocated() - before < 4*weight.numel() # bytes: less than the copy alone
    want = 30*torch.tanh(.5*hidden.double() @ weight.double().T/30)
    assert ours.dtype == torch.float32 and (ours - want).abs().max() < 1e-5*want.abs().max()


@pytest.mark.parametrize('words', [96, 20_000])
@pytest.mark.parametrize('scale, cap', [(1., None), (.25, 30.)])
def test_the_head_in_16_bits_is_that_in_64(words, scale, cap):
    "Products of bfloat16 numbers lose nothing when they are summed in 32 bits; gradients are given in 16"
    draw = torch.Generator('cuda').manual_seed(0)
    weight = torch.randn(words, 64, generator=draw, device='cuda').bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        hidden = torch.randn(300, 64, generator=draw, device='cuda').to(dtype).requires_grad_()
        target = torch.randint(words, (300,), generator=draw, device='cuda')
        ours = token_logps(hidden, target, weight, None, scale, cap)
        z = scale*hidden.double() @ weight.double().T
        want = (z if cap is None else cap*torch.tanh(z/cap)).log_softmax(1).gather(1, target[:, None])[:, 0]
        assert (ours - want).abs().max() < 1e-5*want.abs().max()
        (mine,), (true,) = (torch.autograd.grad(x.sum(), hidden) for x in (ours, want))
        assert (mine - true).norm() < (1e-4 if dtype == torch.float32 else 3e-3)*true.norm()


def test_packed_or_padded_the_numbers_are_the_same(base, monkeypatch):
    "Log-probs and gradients of prompts in common and alone; memory in the proportion of the tokens"
    rows = long_rows(6) + [EncodedRow('short', (Encoded(tuple(range(3, 40)), 5), Encoded(tuple(range(3, 12)), 5)), 0)]
    goal = preference_objective(rows, np.zeros((len(rows), 2)))
    def found():
        model = shaken(add_adapter(base, LoraSettings(rank=4)))
        step_gradient(model, goal, range(len(rows)), 1 << 20)
        out = torch.cat([p.grad.flatten() for p in trainable(model).values()])
        logps = score(model, rows, quiet=True)
        model.unload()
        return logps, out
    assert packs(base.model), why_not_packed(base.model)
    logps, gradient = found()
    monkeypatch.setattr(base.model, SWITCH['packing'], 'off')
    assert not packs(base.model)
    plain, other = found()
    exact = base.settings.dtype == 'float32'
    assert np.abs(logps - plain).max() < (1e-3 if exact else .02*np.abs(plain).max())
    assert (gradient - other).norm() < (1e-4 if exact else .05)*other.norm()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_a_sliding_window_is_packed(dtype, device='cuda'):
    "The states of packed sequences, longer than the window, are those of each alone"
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=16,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config).to(device, dtype).eval()
    rows = [Encoded(tuple(range(3, 3 + n)), 30) for n in (50, 38)] + [Encoded(tuple(range(60, 124)), 20)]
    assert not why_not_packed(model)
    with torch.no_grad():
        ours = packed_states(model, pack(rows).to(torch.device(device))).float()
        alone = [packed_alone(model, r) for r in rows]
    for at, own in zip(([*range(50)], [*range(30), *range(50, 58)], [*range(58, 122)]), alone, strict=True):
        assert (ours[at] - own).norm() < (1e-5 if dtype == torch.float32 else .02)*own.norm()


def shaken(model):
    draw = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if 'lora_B' in n: p.data = (.05*torch.randn(p.shape, generator=draw)).to(p.device, p.dtype)
    return model


def test_no_warning_about_determinism(base, tmp_path):
    "No operation of Llama lacks a deterministic form"
    with warnings.catch_warnings():
        warnings.simplefilter('error', W2SWarning)
        learned(base, tmp_path)


@pytest.mark.parametrize('kind', ['bfloat16', 'float16'])
def test_vllm_begins_as_w2s_does(tmp_path, kind):
    """The real engine, with ends and stop strings: greedy texts begin alike, and most are the same to the end. In 16 bits two tokens can be
    nearly equal, and the engines round otherwise"""
    pytest.importorskip('vllm')
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(300, seed=1)]
    out = tiny_model(tmp_path/'tiny', texts, hidden=256, layers=2) # eight heads of 32
    pretrain(out, texts, steps=150)
    prompts = list(dict.fromkeys(r['prompt'] for r in sample_preferences(60, seed=2)))[:32]
    for how in (GenerateSettings(20, 0), GenerateSettings(20, 0, stop=('.',))):
        base, fast = opened(out, kind), load_vllm(out, KINDS[kind])
        try: theirs = respond(fast.model, fast.tokenizer, prompts, how, quiet=True)
        finally: stop_vllm(fast)
        ours = respond(base.model, base.tokenizer, prompts, how, quiet=True)
        assert np.mean([a.text[:6] == b.text[:6] for (a,), (b,) in zip(ours, theirs, strict=True)]) > .9
        assert np.mean([a == b for a, b in zip(ours, theirs, strict=True)]) > .7
        assert all(r.ended or r.tokens == how.max_tokens for r, in theirs)


def test_the_samples_of_vllm_are_those_of_their_row(folder):
    "Seeds act: nearly the same twice (what is in its cache is rounded otherwise), others for another seed, and one for each sample"
    pytest.importorskip('vllm')
    fast, how = load_vllm(folder, KINDS['bfloat16']), GenerateSettings(12, 1., samples=3)
    prompts = [r['prompt'] for r in sample_preferences(8, seed=5)]
    def made(seed): return [[r.text for r in row] for row in respond(fast.model, fast.tokenizer, prompts, how, seed, quiet=True)]
    try: first, again, other = made(0), made(0), made(1)
    finally: stop_vllm(fast)
    def same(a, b): return np.mean([x == y for x, y in zip(sum(a, []), sum(b, []), strict=True)])
    assert same(first, again) > .7 and same(first, other) < .3 and all(len(set(row)) > 1 for row in first)


# A base that two GPUs hold together

def split_work(base, folder):
    "A training, scores and texts, with the numbers that this process keeps of the layers"
    adapter, curve = learned(base, folder)
    how = GenerateSettings(max_tokens=8, samples=2, token_budget=200)
    texts = [[r.text for r in row] for row in respond(base.model, base.tokenizer, [r['prompt'] for r in sample_preferences(8)], how, 5)]
    kept = sum(own_weights(m) for m in repeated_layers(base.model))
    return adapter, curve, score(base.model, rows_of(base), quiet=True), texts, kept


def job_split(folder, out, kind, device):
    "What each of two processes does; 4 bits are let in here, and refused to users until this test has passed"
    SHOWN['nf4'] = ('cpu', 'cuda')
    with all_processes():
        base = load_base(folder, replace(KINDS[kind], device=device, shard='on'))
        check_model(base)
        where = {p.device.type for p in base.model.parameters()}
        found = together(lambda: (*split_work(base, out/'two'), where), 'all')
    if os.environ['RANK'] == '0': (out/'found.pkl').write_bytes(pickle.dumps(found))


def compare_split(folder, out, kind, device):
    "The work of two processes beside that of one"
    codes = ended(started(job_split, [folder, out, kind, device], out/'log', 'spawn'))
    assert codes == [0, 0], (out/'log-0').read_text()[-2000:]
    base, found = load_base(folder, replace(KINDS[kind], device=device, merging='off')), pickle.loads((out/'found.pkl').read_bytes())
    adapter, curve, scores, texts, whole = split_work(base, out/'one')
    far = 1e-5 if base.settings.dtype == 'float32' else .05*float(adapter.abs().max())
    for ours, steps, known, said, kept, where in found:
        assert where == {device.partition(':')[0]} and .5*whole <= kept < .52*whole
        assert (ours - adapter).abs().max() < far and np.abs(steps['loss'] - curve['loss']).max() < max(far, 1e-5)
        np.testing.assert_allclose(known, scores, rtol=1e-5 if base.settings.dtype == 'float32' else .02)
        assert base.settings.dtype != 'float32' or said == texts


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='fewer than two GPUs')
@pytest.mark.parametrize('kind', ['float32', 'bfloat16', 'nf4'])
def test_two_gpus_hold_a_base_together(folder, tmp_path, kind): compare_split(folder, tmp_path, kind, 'cuda')
