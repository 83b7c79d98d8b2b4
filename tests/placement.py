"""Nothing meets across two devices: the whole of training, scoring, sampling, heads, store and resume on an emulated one

See `other_device`: a tensor there refuses to meet one of the CPU, as on a GPU. The results are those of the CPU, in every bit,
because the same kernels compute them.
"""
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

pytest.importorskip('torch.utils.backend_registration')
if not hasattr(torch.utils.backend_registration, '_setup_privateuseone_for_python_backend'):
    pytest.skip('PyTorch before 2.9 has no devices that are written in Python', allow_module_level=True)

from other_device import Elsewhere, Other, TwoDevices

from w2s.data.rows import make_rows
from w2s.data.samples import sample_preferences
from w2s.models.adapters import LoraSettings, add_adapter, load_adapter, save_adapter
from w2s.models.class_heads import add_class_adapter, load_class_adapter
from w2s.models.heads import add_reward_adapter, load_reward_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.train import writing as generate_page
from w2s.train.checkpoints import checkpoints
from w2s.train.class_head import class_logits, encode_texts, head_probs
from w2s.train.generate import respond
from w2s.train.labels import class_probs, encode_labels, label_objective
from w2s.train.logprobs import check_model, score
from w2s.train.loop import preference_objective, sft_objective, train
from w2s.train.probe import last_hidden
from w2s.train.reference import stored_logps
from w2s.train.rewards import response_rewards, reward_objective
from w2s.train.settings import GenerateSettings, TrainSettings
from w2s.train.tokens import encode_rows

pytestmark = pytest.mark.filterwarnings('ignore::FutureWarning')
PLAIN = LoadSettings('none', 'float32', packing='off', merging='off') # the fast ways are of a CPU, with other last bits
LORA = LoraSettings(rank=2)
STEP = TrainSettings(batch_size=4, epochs=2, learning_rate=3e-3, warmup=0, checkpoint_every=2, token_budget=300)
PROBS = [[.2, .8], [.6, .4], [.5, .5], [.9, .1], [0, 1]]
TEXTS = ['The fox lives by the river.', 'Where?', 'A fox', 'The river is where the fox lives', 'By the']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    texts = [r['prompt'] + r[k] for r in sample_preferences(60, seed=3) for k in ('chosen', 'rejected')]
    return tiny_model(tmp_path_factory.mktemp('placement')/'tiny', texts, hidden=32, layers=1, context=256)


@pytest.fixture(scope='module')
def here(folder): return written_out(load_base(folder, PLAIN, device='cpu'))


def written_out(base):
    "With attention of plain operations: each kind of device has a kernel of its own for it, with other last bits"
    base.model.set_attn_implementation('eager')
    return base


@pytest.fixture(scope='module')
def there(folder):
    base = written_out(load_base(folder, PLAIN, device='cpu'))
    with Elsewhere(): base.model.to('other:0')
    assert all(isinstance(p, Other) for p in base.model.parameters())
    return base


@pytest.fixture(scope='module')
def rows(here):
    return encode_rows(here.tokenizer, make_rows(sample_preferences(6, seed=0), 'preferences'), ('chosen', 'rejected'), 128).rows


@pytest.fixture(scope='module')
def texts(here): return encode_texts(here.tokenizer, Dataset.from_dict({'id': list('abcde'), 'prompt': TEXTS}), 64).rows


@pytest.fixture(scope='module')
def words(here):
    return encode_labels(here.tokenizer, Dataset.from_dict({'id': list('abcde'), 'prompt': TEXTS}), (' fox', ' river'), 64).rows


def preference(rows, loss='dpo', **more):
    return preference_objective(rows, np.linspace(-30, -20, 2 * len(rows)).reshape(-1, 2), loss=loss, **more)


TRAININGS = {
    'sft': (add_adapter, lambda r, t, w: sft_objective(r, np.linspace(0.5, 1, len(r)))),
    **{
        loss: (
            add_adapter,
            lambda r, t, w, loss=loss: preference(r, loss, target=np.linspace(0.6, 1, len(r)), weights=np.linspace(0.5, 1, len(r))),
        )
        for loss in ('dpo', 'cdpo', 'rdpo', 'ipo')
    },
    'reward model': (add_reward_adapter, lambda r, t, w: reward_objective(r, np.linspace(0.6, 1, len(r)))),
    **{
        f'head, {loss}': (add_class_adapter, lambda r, t, w, loss=loss: label_objective(t, PROBS, loss=loss, forward=class_logits))
        for loss in ('xent', 'confidence', 'product', 'entropy', 'window', 'kl', 'reverse_kl')
    },
    'words, xent': (add_adapter, lambda r, t, w: label_objective(w, PROBS)),
    'words, confidence': (add_adapter, lambda r, t, w: label_objective(w, PROBS, loss='confidence')),
    'checkpointing': (add_adapter, lambda r, t, w: preference(r)),
    'dropout': (add_adapter, lambda r, t, w: preference(r)),
}


def learned(base, kind, rows, texts, words, folder, after=None):
    "The trained numbers of a model, its curve, and what was saved"
    make, goal = TRAININGS[kind]
    model = make(base, replace(LORA, dropout=.2*(kind == 'dropout')), 1)
    try:
        curve = train(
            model,
            goal(rows, texts, words),
            replace(STEP, gradient_checkpointing=kind == 'checkpointing'),
            folder / 'ckpt',
            3,
            quiet=True,
            after=after,
        )
        save_adapter(model, base, folder/'adapter')
        return {n: p.detach().cpu() for n, p in model.named_parameters() if p.requires_grad}, curve
    finally: model.unload()


@pytest.fixture(autouse=True)
def same_optimizer(monkeypatch):
    "AdamW in the form that both devices have: the fused one of a CPU has other last bits"
    plain = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, 'AdamW', lambda *args, fused, **other: plain(*args, fused=False, **other))


def same(a, b):
    assert a.keys() == b.keys()
    for n in a: assert torch.equal(a[n], b[n]), n


@pytest.mark.parametrize('kind', TRAININGS)
def test_training(here, there, rows, texts, words, tmp_path, kind):
    "The same adapter in every bit, and few waits: loss, value, finite loss, and the norm"
    want, curve = learned(here, kind, rows, texts, words, tmp_path/'here')
    with Elsewhere() as device: found, other = learned(there, kind, rows, texts, words, tmp_path/'there')
    same(found, want)
    assert other.equals(curve)
    assert (tmp_path / 'here' / 'adapter' / 'adapter_model.safetensors').read_bytes() == (
        tmp_path / 'there' / 'adapter' / 'adapter_model.safetensors'
    ).read_bytes()
    blocks = len(curve)*(4 if kind == 'head, xent' else 8)
    assert not device.counts['nonzero'] and device.counts['item'] <= 4*blocks


@pytest.mark.parametrize('kind', ['dpo', 'reward model', 'head, confidence', 'dropout'])
def test_resume(here, there, rows, texts, words, tmp_path, kind):
    "Stopped on the one device and gone on with on either: the same bits"
    want, curve = learned(here, kind, rows, texts, words, tmp_path/'straight')
    def stop(taken):
        if taken == 3: raise KeyboardInterrupt
    for name, first, second in (('on', there, there), ('off', there, here), ('to', here, there)):
        def go(base, after=None, name=name):
            if base is here: return learned(base, kind, rows, texts, words, tmp_path/name, after)
            with Elsewhere(): return learned(base, kind, rows, texts, words, tmp_path/name, after)
        with pytest.raises(KeyboardInterrupt): go(first, stop)
        assert [p.name for p in checkpoints(tmp_path/name/'ckpt')] == ['step-000002']
        found, other = go(second)
        same(found, want)
        assert other.equals(curve)


def test_scoring_and_store(here, there, rows, texts, words, tmp_path):
    def numbers(base, store):
        check_model(base)
        model = add_adapter(base, LORA, 1)
        for n, p in model.named_parameters():
            if 'lora_B' in n: p.data += .1
        save_adapter(model, base, store/'adapter')
        model.unload()
        out = [score(base.model, rows, 200, quiet=True), stored_logps(store, base, store/'adapter', rows, quiet=True)]
        from w2s.train import reference
        reference._SEEN.clear() # as another process would: kept numbers are tried
        out.append(stored_logps(store, base, store/'adapter', rows, quiet=True))
        return [*out, last_hidden(base.model, texts, quiet=True), class_probs(base.model, words, quiet=True)]
    want = numbers(here, tmp_path/'here')
    with Elsewhere(): found = numbers(there, tmp_path/'there')
    for a, b in zip(want, found, strict=True): assert np.array_equal(a, b)


def test_heads_are_loaded_where_their_base_is(here, there, rows, texts, words, tmp_path):
    learned(here, 'reward model', rows, texts, words, tmp_path/'reward')
    learned(here, 'head, xent', rows, texts, words, tmp_path/'class')
    def numbers(base):
        out = []
        for load, name, work in (
            (load_reward_adapter, 'reward', lambda m: response_rewards(m, rows, quiet=True)),
            (load_class_adapter, 'class', lambda m: head_probs(m, texts, quiet=True)),
        ):
            for trainable in (False, True):
                model = load(base, tmp_path/name/'adapter', trainable)
                out.append(work(model))
                model.unload()
        return out
    want = numbers(here)
    with Elsewhere(): found = numbers(there)
    for a, b in zip(want, found, strict=True): assert np.array_equal(a, b)


@pytest.mark.parametrize(
    'how',
    [dict(temperature=0), dict(samples=2, temperature=1.0, top_p=0.9, top_k=20, no_repeat_ngram=2), dict(temperature=1.0, stop=('e',))],
    ids=['greedy', 'sampled', 'stopped'],
)
def test_sampling(here, there, how, monkeypatch, tmp_path):
    "Rows of other widths together, as on a GPU"
    monkeypatch.setattr(generate_page, 'WIDE', generate_page.PAD) # the same padding: then the same bits
    prompts, settings = ['The fox', 'Where does', 'The fox lives by the', 'A'], GenerateSettings(max_tokens=8, **how)
    want = respond(here.model, here.tokenizer, prompts, settings, 3, quiet=True)
    with Elsewhere() as device: found = respond(there.model, there.tokenizer, prompts, settings, 3, quiet=True, journal=tmp_path/'j')
    assert found == want
    assert device.counts['item'] == 0


def test_adapters_of_one_device_act_on_the_other(here, there, rows, texts, words, tmp_path):
    learned(here, 'dpo', rows, texts, words, tmp_path)
    model = load_adapter(here, tmp_path/'adapter')
    want = score(model, rows, quiet=True)
    model.unload()
    with Elsewhere():
        model = load_adapter(there, tmp_path/'adapter')
        assert np.array_equal(score(model, rows, quiet=True), want)
        model.unload()


@pytest.mark.parametrize('where, what', [
    ('batches', lambda m: m.setattr('w2s.train.batches.Block.to', lambda self, device: self)),
    ('targets of the loss', lambda m: m.setattr('w2s.train.losses.weighted_sum', lambda losses, weights: (losses*weights).sum())),
    ('random numbers', lambda m: m.setattr('w2s.train.writing.pick', lambda logits, uniform, *a: logits.argmax(1) + (uniform.cpu() < 0))),
])
def test_a_missing_move_is_seen(there, rows, monkeypatch, tmp_path, where, what):
    "The emulation refuses what a GPU would refuse"
    what(monkeypatch)
    with Elsewhere(), pytest.raises((TwoDevices, RuntimeError)) as error:
        if where == 'random numbers': respond(there.model, there.tokenizer, ['The fox', 'A'], GenerateSettings(max_tokens=4), quiet=True)
        else:
            model = add_adapter(there, LORA)
            try: train(model, preference(rows), STEP, tmp_path, quiet=True)
            finally: model.unload()
    assert 'other' in str(error.value)


def test_numpy_is_refused_there():
    with Elsewhere():
        x = torch.ones(3, device='other:0')
        with pytest.raises(RuntimeError, match='numpy'): x.numpy()
        with pytest.raises(TwoDevices): x + torch.ones(3)
        assert (x + 1).device.type == 'other' and (x*torch.tensor(2.)).cpu().tolist() == [2, 2, 2]
