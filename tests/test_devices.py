"Where and how a model computes: settled at the start, one base at a time, and nothing that only one machine can read"
import gc
import os
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, OPTConfig, Qwen2Config

from w2s.compare import gold
from w2s.compare import models as models_page
from w2s.compare.models import close_base, know_model, open_base
from w2s.compare.preference_settings import WeakTeacher
from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.errors import ConfigError, TrainError, W2SWarning
from w2s.models import devices
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.devices import find_device, settle
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.train import loop, reference
from w2s.train.checkpoints import checkpoints, load_last, save_checkpoint, trainable
from w2s.train.logprobs import response_logps, sum_sequences, token_logps
from w2s.train.loop import SCALE, preference_objective, sft_objective, step_gradient, train
from w2s.train.reference import allowed, stored_logps
from w2s.train.settings import TrainSettings
from w2s.train.step_memory import choose_step, count_step, estimate_step, twin
from w2s.train.tokens import encode_rows

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    home, texts = (
        tmp_path_factory.mktemp('devices'),
        [r['prompt'] + r[k] for r in sample_preferences(60, seed=3) for k in ('chosen', 'rejected')],
    )
    return [tiny_model(home/name, texts, hidden=64, layers=2, context=256, seed=seed) for seed, name in enumerate('ab')]


@pytest.fixture(scope='module')
def base(folders): return load_base(folders[0], LoadSettings('none', 'float32'), device='cpu')


@pytest.fixture(scope='module')
def rows(base):
    return encode_rows(base.tokenizer, make_rows(sample_preferences(16, seed=0), 'preferences'), ('chosen', 'rejected'), 128).rows


def made_up(monkeypatch, kind, count=1, bf16=True):
    "A machine with other devices"
    monkeypatch.setattr(devices, 'accelerator', lambda: kind)
    monkeypatch.setattr(devices, 'count_devices', lambda: count)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: bf16 or including_emulation)


@pytest.mark.parametrize(
    'kind, bf16, given, want',
    [
        ('cuda', True, {}, ('cuda:0', 'bfloat16', 'autocast')),
        ('cuda', False, {}, ('cuda:0', 'float16', 'autocast')),
        ('cuda', True, {'dtype': 'float32'}, ('cuda:0', 'float32', 'plain')),
        ('cuda', True, {'device': 'cuda:1', 'compute': 'plain'}, ('cuda:1', 'bfloat16', 'plain')),
        ('mps', True, {'quantize': 'none'}, ('mps:0', 'bfloat16', 'autocast')),
        ('xpu', True, {'quantize': 'none'}, ('xpu:0', 'bfloat16', 'autocast')),
        ('cuda', True, {'device': 'cpu', 'dtype': 'bfloat16'}, ('cpu', 'bfloat16', 'plain')),
        ('', True, {'dtype': 'float16'}, ('cpu', 'float16', 'plain')),
    ],
)
def test_settings_are_settled(monkeypatch, kind, bf16, given, want):
    made_up(monkeypatch, kind, 2, bf16)
    now = settle(LoadSettings(**given))
    assert (now.device, now.dtype, now.compute) == want and settle(now) == now


@pytest.mark.parametrize('kind, device', [('', 'cuda'), ('', 'mps'), ('mps', 'cuda'), ('cuda', 'cuda:7'), ('cuda', 'xpu'), ('', 'cuda:0')])
def test_a_device_that_is_not_there_is_refused(monkeypatch, folders, kind, device):
    "Not replaced by the CPU; before anything is loaded, and in the words of the command line"
    made_up(monkeypatch, kind, 2)
    for do in (
        lambda: find_device(device),
        lambda: settle(LoadSettings(device=device)),
        lambda: load_base(folders[0], LoadSettings(device=device)),
        lambda: know_model('weak', str(folders[0]), WeakTeacher(load=LoadSettings(device=device))),
    ):
        with pytest.raises(ConfigError, match=f'--device {device}: this machine has no such device'): do()


def test_cublas_is_told_before_it_is_used(monkeypatch):
    made_up(monkeypatch, 'cuda')
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    find_device()
    assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG')


def test_one_base_at_a_time(folders, monkeypatch):
    "The base before is gone when the next one is loaded, and when a reward model is"
    config, alive, seen = WeakTeacher(load=LoadSettings('none', 'float32')), [], []
    models = [know_model(r, str(f), config) for r, f in zip(('weak', 'strong'), folders, strict=True)]
    real = models_page.load_base
    def load(name, settings):
        gc.collect()
        seen.append(sum(r() is not None for r in alive))
        out = real(name, settings)
        alive.append(weakref.ref(out.model))
        return out
    monkeypatch.setattr(models_page, 'load_base', load)
    close_base()
    for m in (*models, *models): open_base(m)
    assert open_base(models[1]) is open_base(models[1])
    assert seen == [0, 0, 0, 0]
    def scorer(name, settings):
        gc.collect()
        seen.append(sum(r() is not None for r in alive))
        return lambda prompts, responses: [0.]*len(prompts)
    monkeypatch.setattr(gold, 'load_reward_model', scorer)
    gold.close_scorer()
    gold._scorer('somebody')
    assert seen[-1] == 0
    gold.close_scorer()
    assert gold._scorer.cache_info().currsize == 0


def test_what_is_allowed_reaches_the_gold_model(monkeypatch):
    made_up(monkeypatch, 'cuda', 2, bf16=False)
    got = gold.gold_load(
        WeakTeacher(
            samples=1,
            gold='somebody/judge',
            gold_quantize='nf4',
            load=LoadSettings('none', 'float32', revision='v1,gold=v2', allow_pickle=True, trust_remote_code=True, device='cuda:1'),
        )
    )
    assert (got.quantize, got.dtype, got.revision, got.allow_pickle, got.trust_remote_code, got.device) == (
        'nf4',
        'float16',
        'v2',
        True,
        True,
        'cuda:1',
    )
    for half, dtype in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr('w2s.models.devices.has_bfloat16', lambda device, half=half: half)
        assert gold.gold_load(WeakTeacher(samples=1, gold='somebody/judge', load=LoadSettings(device='cpu'))).dtype == dtype


@pytest.mark.parametrize(
    'apart, stops',
    [
        ([0.1] * 16, None),
        ([0.1] * 15 + [0.9], None),
        ([0] * 15 + [1.5], True),
        ([0.5] * 15 + [1.5], False),
        ([0.5] * 15 + [5.5], True),
        ([3.0] * 16, False),
        ([30.0] * 16, True),
        ([1.2] * 15 + [11], True),
        ([0] * 15 + [np.nan], True),
    ],
)
def test_kept_log_probs_are_judged_by_their_spread(base, rows, tmp_path, monkeypatch, apart, stops):
    "One row far from the others is damage, and so is all of them far off; all a little off is rounding of another kernel: a word"
    values = stored_logps(tmp_path, base, None, rows[:8], quiet=True)
    reference._SEEN.clear()
    bounds = np.array([[reference.tolerance('float32', len(s.response)) for s in r.sequences] for r in rows[:8]])
    monkeypatch.setattr(
        reference,
        'score',
        lambda model, some, budget, **k: (
            values[[rows.index(r) for r in some]] + (np.array(apart).reshape(8, 2) * bounds)[[rows.index(r) for r in some]]
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter('error', W2SWarning)
        if stops is None: stored_logps(tmp_path, base, None, rows[:8], quiet=True)
        elif stops:
            with pytest.raises(TrainError, match='delete'): stored_logps(tmp_path, base, None, rows[:8], quiet=True)
        else:
            with pytest.raises(W2SWarning, match='times what rounding explains'): stored_logps(tmp_path, base, None, rows[:8], quiet=True)
    assert 1 <= allowed(np.nan_to_num(np.array(apart, float), nan=1e9)) <= 10


@pytest.mark.parametrize('damage', [b'', b'no pickle', b'PK\x03\x04'])
def test_a_state_that_cannot_be_read_is_said(base, tmp_path, damage, monkeypatch):
    model = add_adapter(base, LoraSettings(rank=2))
    optimizer = torch.optim.AdamW(trainable(model).values())
    sum(p.sum() for p in trainable(model).values()).backward()
    optimizer.step()
    done = save_checkpoint(tmp_path, 1, model, optimizer, [{'step': 0}])
    whole = torch.load(done/'optimizer.pt', weights_only=True)
    assert {t.device.type for s in whole['state'].values() for t in s.values()} == {'cpu'}
    (done/'optimizer.pt').write_bytes(damage)
    monkeypatch.setattr('w2s.train.checkpoints.find_damage', lambda folder: [])
    with pytest.raises(TrainError, match='cannot be read'): load_last(tmp_path, model, optimizer)
    model.unload()


def test_a_state_of_a_gpu_is_read_on_a_cpu(base, tmp_path, monkeypatch):
    "As an older version has written it: every tensor says that it lives on a GPU"
    model = add_adapter(base, LoraSettings(rank=2))
    optimizer = torch.optim.AdamW(trainable(model).values())
    sum(p.sum() for p in trainable(model).values()).backward()
    optimizer.step()
    done = save_checkpoint(tmp_path, 1, model, optimizer, [{'step': 0}])
    state, real = optimizer.state_dict(), torch.serialization.location_tag
    monkeypatch.setattr(torch.serialization, 'location_tag', lambda storage: 'cuda:0')
    torch.save(state, done/'optimizer.pt')
    monkeypatch.setattr(torch.serialization, 'location_tag', real)
    monkeypatch.setattr('w2s.train.checkpoints.find_damage', lambda folder: [])
    with pytest.raises(RuntimeError, match='CUDA'): torch.load(done/'optimizer.pt', weights_only=True)
    assert len(load_last(tmp_path, model, optimizer)) == 1
    model.unload()


def test_adapters_are_drawn_alike_and_leave_other_gpus_alone(base, monkeypatch):
    "Only the stream of the CPU is touched, and given back"
    asked = []
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: asked.append(1) or 0)
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', lambda seed: asked.append(2))
    torch.manual_seed(5)
    asked.clear()
    before = torch.random.get_rng_state()
    model = add_adapter(base, LoraSettings(rank=2), 1)
    first = {n: p.detach().clone() for n, p in trainable(model).items()}
    model.unload()
    assert torch.equal(before, torch.random.get_rng_state()) and 2 not in asked
    torch.manual_seed(9)
    model = add_adapter(base, LoraSettings(rank=2), 1)
    assert all(torch.equal(first[n], p) for n, p in trainable(model).items())
    model.unload()


def test_adapters_under_autocast(folders, tmp_path):
    "Weights stay in 32 bits, layers compute in 16: close to the plain way, and part of the key"
    bases = {c: load_base(folders[0], LoadSettings('none', 'bfloat16', device='cpu', compute=c)) for c in ('plain', 'autocast')}
    some = encode_rows(bases['plain'].tokenizer, make_rows(sample_preferences(8, seed=0), 'preferences'), ('chosen', 'rejected'), 128).rows
    out, kept = {}, {}
    for c, b in bases.items():
        model, seen = add_adapter(b, LoraSettings(rank=4)), {}
        for n, p in trainable(model).items():
            if 'lora_B' in n: p.data += .02
        def pack(t, seen=seen):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): step_gradient(model, sft_objective(some), range(8), 1 << 20)
        assert {p.dtype for p in trainable(model).values()} == {torch.float32} == {p.grad.dtype for p in trainable(model).values()}
        out[c], kept[c] = torch.cat([p.grad.flatten() for p in trainable(model).values()]), sum(seen.values())
        model.unload()
    assert (out['plain'] - out['autocast']).norm() < .05*out['plain'].norm() and not torch.equal(out['plain'], out['autocast'])
    assert kept['autocast'] < .9*kept['plain']
    keys = [reference.logps_key(b, None, some) for b in bases.values()]
    assert keys[1] == {**keys[0], 'compute': 'autocast'}


@pytest.mark.parametrize('scale', [SCALE, 2.**8])
def test_a_scaled_loss_has_the_same_gradient(base, rows, monkeypatch, scale, tmp_path):
    "A power of two changes no bit in 32; and an infinite gradient is refused with the reason"
    model = add_adapter(base, LoraSettings(rank=2))
    def gradient():
        for p in trainable(model).values(): p.grad = None
        step_gradient(model, sft_objective(rows), range(8), 500)
        return torch.cat([p.grad.flatten() for p in trainable(model).values()])
    plain = gradient()
    monkeypatch.setattr(loop, 'loss_scale', lambda model: scale)
    assert torch.allclose(gradient(), plain, rtol=1e-6, atol=1e-12)
    broken = replace(sft_objective(rows), loss=lambda logps, i: logps[:, 0]*1e34)
    with pytest.raises(TrainError, match='the loss was multiplied by .*take --dtype bfloat16 or float32'):
        train(model, broken, TrainSettings(batch_size=4), tmp_path, quiet=True)
    model.unload()


def test_the_scale_is_for_float16_on_a_gpu(folders):
    half = load_base(folders[0], LoadSettings('none', 'float16'), device='cpu').model
    assert loop.loss_scale(half) == 1 # as it was on a CPU
    class Elsewhere:
        dtype = torch.float16
        def parameters(self): yield torch.empty(1, device='meta')
    assert loop.loss_scale(Elsewhere()) == SCALE


def test_sums_by_sequence_have_the_bits_of_one_by_one():
    "In the order of the tokens, also where a sequence has none"
    for seed in range(30):
        draw = torch.Generator().manual_seed(seed)
        each = torch.randint(0, 200, (7,), generator=draw)*torch.randint(0, 2, (7,), generator=draw)
        sequence, x = torch.arange(7).repeat_interleave(each), 30*torch.randn(int(each.sum()), generator=draw)
        want = torch.zeros(7).index_add(0, sequence, x)
        assert torch.equal(sum_sequences(x, sequence, 7), want)
        x.requires_grad_(True)
        w = torch.randn(7, generator=draw)
        (sum_sequences(x, sequence, 7)*w).sum().backward()
        assert torch.equal(x.grad, w[sequence])


def test_larger_pieces_of_logits_change_the_last_bits_only(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    hidden, weight, target = (
        torch.randn(300, 32, generator=draw),
        torch.randn(9000, 32, generator=draw) / 5,
        torch.randint(0, 9000, (300,), generator=draw),
    )
    def both():
        h = hidden.clone().requires_grad_(True)
        out = token_logps(h, target, weight)
        out.sum().backward()
        return out.detach(), h.grad
    few = both()
    monkeypatch.setattr('w2s.train.logprobs.CELLS', 1 << 24)
    for a, b in zip(few, both(), strict=True): assert torch.allclose(a, b, atol=1e-5)
    exact = (hidden.double() @ weight.double().T).log_softmax(1)
    assert torch.allclose(few[0].double(), exact[torch.arange(300), target], atol=1e-5)


# --- the memory of a step

SHAPES = {
    'OPT-1.3B': OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32),
    'Llama-3-8B': LlamaConfig(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    ),
    'Qwen2.5-0.5B': Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
}


def shaped(config):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    with torch.device('meta'):
        return get_peft_model(
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False),
            LoraConfig(r=8, task_type='CAUSAL_LM', target_modules='all-linear'),
        )


@pytest.mark.cases(2)
@pytest.mark.parametrize('twice', [False, True], ids=['plain', 'checkpointing'])
@pytest.mark.parametrize('name', SHAPES)
def test_the_estimate_is_within_15_percent_of_what_is_counted(name, twice):
    "Two and four layers against all of them, at another length than the default and other numbers of tokens"
    model = shaped(SHAPES[name])
    counted = count_step(twin(model), 12, 384, twice)
    assert abs(estimate_step(model, 384, twice, 12*384).at(12*384)/counted - 1) < .15
    assert abs(estimate_step(model, 384, twice).at(12*384)/counted - 1) < .15


def test_checkpointing_is_counted_and_weights_are_not():
    "Blocks of 8,192 tokens: tens of GiB without checkpointing, less than an eighth of it with"
    for name, low, high in (('OPT-1.3B', 20, 30), ('Llama-3-8B', 65, 95)):
        model = shaped(SHAPES[name])
        plain, twice = (estimate_step(model, 512, t).at(8192)/2**30 for t in (False, True))
        assert low < plain < high and twice < plain/8


def test_the_choice_follows_the_memory(base):
    "Plain where it fits, then checkpointing, then fewer tokens, never under a pair"
    model = add_adapter(base, LoraSettings())
    try:
        plain, twice = (estimate_step(model, 128, t) for t in (False, True))
        from w2s.train.step_memory import SPARE
        def choice(room, how='auto', tokens=8192): return choose_step(model, 128, tokens, how, int(room/SPARE) + 1, 2)
        assert [(c.twice, c.tokens) for c in (choice(plain.at(8192)*1.05), choice(twice.at(8192)*1.05))] == [(False, 8192), (True, 8192)]
        less = choice(twice.at(8192)*.5)
        assert less.twice and 256 <= less.tokens < 8192
        assert choice(1).tokens == 256
        assert [choice(plain.at(8192)*2, how).twice for how in (True, False, 'auto')] == [True, False, False]
        assert not choice(1, False).twice
    finally: model.unload()


def test_the_choice_changes_no_result(folders, rows, tmp_path, monkeypatch):
    "A training on a device with little memory: the same adapter to rounding, the lower budget in its history, and back in place on resume"
    precise = load_base(folders[0], LoadSettings('none', 'float32'), device='cpu')
    precise.model.double() # or Adam turns the last digit of a gradient near zero into a step
    def go(name, free=None, after=None):
        model = add_adapter(precise, LoraSettings(rank=2))
        try:
            monkeypatch.setattr(loop, 'free_memory', lambda device: free)
            history = train(
                model,
                preference_objective(rows, np.zeros((len(rows), 2))),
                TrainSettings(batch_size=8, epochs=2, warmup=0.0, learning_rate=1e-3, checkpoint_every=1, token_budget=1 << 20),
                tmp_path / name,
                quiet=True,
                after=after,
            )
            return torch.cat([p.detach().flatten() for p in trainable(model).values()]), history
        finally: model.unload()
    straight, history = go('plain')
    assert 'token_budget' not in history
    little, history = go('little', 1 << 20)
    assert (little - straight).abs().max() < 2e-7 and history.token_budget.nunique() == 1
    def stop(taken):
        if taken == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): go('resumed', 1 << 20, stop)
    assert len(checkpoints(tmp_path/'resumed')) == 1
    resumed, other = go('resumed', 1 << 20)
    assert torch.equal(resumed, little) and other.token_budget.tolist() == history.token_budget.tolist()


def test_log_probs_of_a_block_do_not_depend_on_the_way_they_are_padded(base, rows):
    from w2s.train.batches import block
    some = [s for r in rows[:6] for s in r.sequences]
    with torch.no_grad(): a, b = (response_logps(base.model, block(some, side)) for side in ('right', 'left'))
    assert (a - b).abs().max() < 1e-3
