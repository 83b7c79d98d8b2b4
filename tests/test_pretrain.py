"Pretraining can be killed anywhere and ends in the same bits; other settings refuse; padding counts nothing; what counts how much"
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from w2s.errors import ConfigError, TrainError
from w2s.models import muon, pretrain
from w2s.models.pretrain import (
    Recipe,
    Size,
    Stream,
    Training,
    block_batches,
    learn,
    make_optimizers,
    marks,
    new_model,
    packed_batches,
    padded,
    pieces,
    pretrain_model,
    rate,
    resume,
    short_batches,
    stream_loss,
    token_weights,
    world_tokenizer,
)
from w2s.world.facts import make_world
from w2s.world.stream import answer_words, name_words, stream_document, stream_words

SIZE, RECIPE = Size(64, 1, 64), Recipe(tokens=14_000, block=4, positions=400, length=40, warmup=5)
FILES = ('model.safetensors', 'config.json', 'tokenizer.json')


@lru_cache(maxsize=1)
def tiny_stream() -> Stream:
    "Of thirty people, with the words of some hundred documents"
    world = make_world(1, people=30, things=20)
    return Stream(
        world_tokenizer(stream_words(world, 1500)),
        lambda rng, done, short: stream_document(world, rng, short),
        answer_words(),
        name_words(world),
    )


def run(folder: Path, seed: int = 0, recipe: Recipe = RECIPE) -> pd.DataFrame:
    return pretrain_model(folder, SIZE, recipe, tiny_stream(), seed, context=64, quiet=True)


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> tuple[Path, pd.DataFrame]:
    "A run that nobody disturbs"
    folder = tmp_path_factory.mktemp('whole')
    return folder, run(folder)


def same(folder: Path, history: pd.DataFrame, whole: tuple[Path, pd.DataFrame]) -> None:
    for f in FILES: assert (folder/f).read_bytes() == (whole[0]/f).read_bytes(), f
    pd.testing.assert_frame_equal(history, whole[1], check_exact=True)
    assert not list(folder.glob('training*')), 'nothing is left behind'


# Killed

IN_A_PROCESS = '''
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_pretrain as t
make, made = t.tiny_stream().make, 0
def slow(*args):
    global made
    made += 1
    if made == 600: # in the middle of the third block
        Path(sys.argv[1], 'here').touch()
        time.sleep(300)
    return make(*args)
if sys.argv[3] == 'killed': t.tiny_stream = lambda s=t.replace(t.tiny_stream(), make=slow): s
t.run(Path(sys.argv[1]))
'''


def process(folder: Path, how: str, hash_seed: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, '-W', 'ignore', '-c', IN_A_PROCESS, str(folder), str(Path(__file__).parent), how],
                            env=os.environ | {'PYTHONHASHSEED': hash_seed}, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_killed_from_outside_and_resumed(tmp_path, whole):
    "kill -9 of a process, another process goes on; a third one, here, was never disturbed"
    first = process(tmp_path, 'killed', '1')
    for _ in range(600):
        if (tmp_path/'here').exists() or first.poll() is not None: break
        time.sleep(.1)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, first.stderr.read()[-2000:]
    assert (tmp_path/'training.pt').is_file() and not (tmp_path/'model.safetensors').exists()
    (tmp_path/'here').unlink()
    second = process(tmp_path, 'resumed', '2')
    assert second.wait(timeout=120) == 0, second.stderr.read()[-2000:]
    for f in FILES: assert (tmp_path/f).read_bytes() == (whole[0]/f).read_bytes(), f


def die(*args, **kwargs): os.kill(os.getpid(), signal.SIGKILL)


def count_down(n: int, before):
    "A function that kills its process at the n-th call, and does its work until then"
    left = [n]
    def wrapped(*args, **kwargs):
        left[0] -= 1
        if not left[0]: die()
        return before(*args, **kwargs)
    return wrapped


BOMBS = {
    'before the first state': (pretrain, 'learn', 2),
    'in the second block': (pretrain, 'learn', 25),
    'state written, not yet in its place': (os, 'replace', 2),
    'last state written, no model yet': (pretrain.LlamaForCausalLM, 'save_pretrained', 1),
    'old state moved, new one not yet in its place': (os, 'replace', 3),
    'model written, state not yet removed': (pretrain, 'remove_state', 1),
}


@pytest.mark.cases(3)
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
@pytest.mark.parametrize('where', BOMBS)
def test_killed_anywhere(tmp_path, whole, where):
    child = os.fork()
    if child == 0:
        try:
            owner, name, calls = BOMBS[where]
            setattr(owner, name, count_down(calls, getattr(owner, name)))
            run(tmp_path)
        finally: os._exit(1) # the bomb did not go off
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    states = [(tmp_path/name).is_file() for name in ('training.pt', 'training.before')]
    assert any(states) == (where != 'before the first state') and states[0] == (
        where not in ('before the first state', 'old state moved, new one not yet in its place')
    ), 'killed at another place than was meant'
    same(tmp_path, run(tmp_path), whole)


def test_another_seed_is_another_model(tmp_path, whole):
    run(tmp_path, seed=1)
    assert (tmp_path/'model.safetensors').read_bytes() != (whole[0]/'model.safetensors').read_bytes()


def test_something_is_learned(whole): assert whole[1].loss.tail(5).mean() < whole[1].loss.head(5).mean() - .3


# Other settings

def half_done(folder: Path) -> None:
    "A run that stops after its first block"
    stream, made = tiny_stream(), [0]
    def make(*args):
        made[0] += 1
        if made[0] > 256: raise KeyboardInterrupt
        return stream.make(*args)
    with pytest.raises(KeyboardInterrupt): pretrain_model(folder, SIZE, RECIPE, replace(stream, make=make), 0, context=64, quiet=True)
    assert (folder/'training.pt').is_file()


def test_other_settings_refuse(tmp_path):
    half_done(tmp_path)
    with pytest.raises(ConfigError, match='other settings'): run(tmp_path, recipe=replace(RECIPE, tokens=14_001))
    with pytest.raises(ConfigError, match='other settings'): run(tmp_path, recipe=replace(RECIPE, answer=2.))
    with pytest.raises(ConfigError, match='other settings'): run(tmp_path, seed=1)
    for size, context in ((Size(64, 2, 64), 64), (SIZE, 128)):
        with pytest.raises(ConfigError, match='other settings'):
            pretrain_model(tmp_path, size, RECIPE, tiny_stream(), 0, context, quiet=True)


def test_a_fresh_folder_resumes_nothing(tmp_path):
    model = new_model(SIZE, 512, 64, 0)
    training = Training(model, make_optimizers(model, RECIPE), [], 0)
    resume(training, tmp_path/'training.pt', {})
    assert training.blocks == 0 and training.tokens == 0


@pytest.mark.parametrize('wrong', [dict(tokens=0), dict(block=0), dict(positions=100), dict(first_share=1.1), dict(flat=-.1), dict(last=2)])
def test_recipe_refuses(wrong):
    with pytest.raises(ConfigError): Recipe(**wrong)


@pytest.mark.parametrize('wrong', [(100, 2, 192), (64, 2, 100), (64, 0, 64), (0, 2, 64)])
def test_size_refuses(wrong):
    with pytest.raises(ConfigError): Size(*wrong)


# Padding and weights

def batch() -> np.ndarray: return block_batches(tiny_stream(), RECIPE, 0, 0, 0)[2]


def of_loss(ids: np.ndarray, weights: np.ndarray | None = None) -> tuple[float, torch.Tensor]:
    "Loss and gradient of all weights of a fresh model"
    model = new_model(SIZE, len(tiny_stream().tokenizer), 256, 3)
    w = (ids != 0).astype(np.float32) if weights is None else weights
    loss = stream_loss(model, torch.from_numpy(ids), torch.from_numpy(w))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize('more', [1, 7, 64])
def test_padding_changes_nothing(more):
    ids = batch()
    (loss, grad), (wide, wide_grad) = of_loss(ids), of_loss(np.pad(ids, ((0, 2), (0, more))))
    assert abs(loss - wide) < 1e-3*loss                                   # products are in bfloat16
    assert (grad - wide_grad).norm() < .02*grad.norm()


def test_padding_counts_nothing_even_with_weight():
    "The loss looks at tokens, not at the weights that somebody gives to padding"
    ids = np.pad(batch(), ((0, 0), (0, 5)))
    assert abs(of_loss(ids, np.ones(ids.shape, np.float32))[0] - of_loss(ids)[0]) < 1e-3


def test_loss_is_the_weighted_mean():
    ids = batch()[:4]
    rng = np.random.default_rng(0)
    weights = rng.uniform(.1, 4, ids.shape).astype(np.float32)*(ids != 0)
    model = new_model(SIZE, len(tiny_stream().tokenizer), 256, 3)
    with torch.no_grad(): logits = model(torch.from_numpy(ids)).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), torch.from_numpy(ids[:, 1:]), reduction='none').numpy()
    assert abs(of_loss(ids, weights)[0] - (each*weights[:, 1:]).sum()/weights[:, 1:].sum()) < 5e-3


def test_token_weights():
    stream, recipe = tiny_stream(), Recipe()
    name, other = stream.names[:2]
    text = f'{name} likes to eat soup. {other} saw {name}.' + ' the'*20 + f' {other}.'
    ids = np.array([stream.tokenizer(text).input_ids + [0, 0]])
    w = token_weights(ids, marks(stream.tokenizer, stream.answers), marks(stream.tokenizer, stream.names), recipe)[0]
    said = [stream.tokenizer.convert_ids_to_tokens(int(i)) for i in ids[0]]
    at = [i for i, t in enumerate(said) if t in (f'▁{name}', f'▁{other}')]
    assert w[at].tolist() == pytest.approx([.1, .1, 3., .1])              # new, new, read a moment ago, read too long ago
    assert w[said.index('▁soup')] == 4 and w[said.index('▁likes')] == 1 and w[-2:].tolist() == [0, 0]


def test_marks_wants_words_of_the_vocabulary():
    with pytest.raises(KeyError): marks(tiny_stream().tokenizer, ['Déjà'])


# Arithmetic

def without_cast(grad, coefficients, steps, eps):
    "PyTorch's iteration of Muon, line by line, but in the type of the gradient"
    (a, b, c), x = coefficients, grad.T if grad.size(0) > grad.size(1) else grad
    x = x/x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if grad.size(0) > grad.size(1) else x


@pytest.mark.parametrize('size', [SIZE, Size(64, 2, 128)])
def test_muon_is_that_of_pytorch(size, monkeypatch):
    "The same losses to 1e-5 over six steps, in float32; PyTorch's own always rounds to bfloat16"
    for module in (muon, pretrain): monkeypatch.setattr(module, 'has_bfloat16', lambda device: False)
    monkeypatch.setattr('torch.optim._muon._zeropower_via_newtonschulz', without_cast)
    losses, weights = [], []
    for make in (muon.Muon, lambda ps, lr: torch.optim.Muon(ps, lr=lr, weight_decay=0.)):
        monkeypatch.setattr(pretrain, 'Muon', make)
        model = new_model(size, len(tiny_stream().tokenizer), 256, 3)
        training = Training(model, make_optimizers(model, RECIPE), [], 0)
        for ids in block_batches(tiny_stream(), RECIPE, 0, 0, 0)[:6]: learn(training, ids, (ids != 0).astype(np.float32), RECIPE)
        losses.append([h['loss'] for h in training.history])
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and (weights[0] - weights[1]).abs().max() < 1e-5


class Products(TorchDispatchMode):
    "Notes in which types matrices are multiplied"
    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ('mm', 'addmm', 'bmm', 'baddbmm'): self.types.add(out.dtype)
        return out


@pytest.mark.parametrize('native', [False, True])
def test_bfloat16_only_where_the_processor_has_it(native, monkeypatch):
    "Emulated, a step takes several times as long"
    for module in (muon, pretrain): monkeypatch.setattr(module, 'has_bfloat16', lambda device: native)
    model, ids = new_model(SIZE, len(tiny_stream().tokenizer), 256, 3), batch()[:4]
    training = Training(model, make_optimizers(model, RECIPE), [], 0)
    with Products() as seen: learn(training, ids, (ids != 0).astype(np.float32), RECIPE)
    assert (torch.bfloat16 in seen.types) == native and (native or seen.types == {torch.float32})


# Blocks

@pytest.mark.parametrize('done', [0., .7])
def test_a_block_follows_from_its_number_and_seed(done):
    a, b, c, d = (block_batches(tiny_stream(), RECIPE, done, n, s) for n, s in ((3, 0), (3, 0), (4, 0), (3, 1)))
    assert [x.tolist() for x in a] == [x.tolist() for x in b]
    assert [x.tolist() for x in a] != [x.tolist() for x in c] and [x.tolist() for x in a] != [x.tolist() for x in d]


def test_short_batches_keep_every_document():
    rng = random.Random(0)
    docs = [[rng.randrange(1, 99) for _ in range(rng.randrange(3, 60))] for _ in range(300)]
    steps = short_batches(docs, 400, np.random.default_rng(0))
    assert sorted([*filter(None, row)] for x in steps for row in x.tolist()) == sorted(docs)
    assert all(x.size <= 400 for x in steps) and sum((x == 0).sum() for x in steps)/sum(x.size for x in steps) < .1


def test_packed_batches_keep_the_order():
    docs = [[i, i, i] for i in range(1, 300)]
    flat = np.concatenate([x.ravel() for x in packed_batches(docs, 400, 40)])
    assert flat.tolist() == [i for d in docs for i in d][:len(flat)] and len(flat) == 897//40*40


def test_padded(): assert padded([[1], [2, 3]]).tolist() == [[1, 0], [2, 3]]


# Steps

def test_rate_has_no_jump():
    recipe = Recipe(warmup=1)
    rates = [rate(i/1000, 10, recipe) for i in range(1001)]
    assert (
        max(abs(a - b) for a, b in zip(rates, rates[1:], strict=False)) < 0.01
        and rates[-1] == pytest.approx(recipe.last)
        and rates[600] == 1
    )


def test_a_loss_that_is_no_number_stops():
    model = new_model(SIZE, len(tiny_stream().tokenizer), 64, 0)
    with torch.no_grad(): model.model.norm.weight.fill_(float('nan'))
    training, ids = Training(model, make_optimizers(model, RECIPE), [], 0), batch()
    with pytest.raises(TrainError, match='step 0'): learn(training, ids, np.ones(ids.shape, np.float32), RECIPE)


def test_new_model_leaves_the_random_numbers_alone():
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    new_model(SIZE, 512, 64, 0)
    assert torch.equal(torch.rand(3), want)


# Tokenizer

@pytest.mark.parametrize(
    'text',
    ['', ' ', '\n', '\n\n', 'a\n\nb', '  two  spaces ', "don't: 'quoted', 7 % of élan 🙂", 'Q: Where?\nA: It is the cave.', 'tab\there'],
)
def test_text_comes_back(text):
    tokenizer = tiny_stream().tokenizer
    back = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    assert back.removeprefix(' ') == text.removeprefix(' ') # a text begins with a space, whether it is written or not


def test_vocabulary_is_a_multiple_of_64():
    for n in range(0, 130, 13):
        made = pieces([f'word{chr(97 + i//26)}{chr(97 + i%26)}' for i in range(n)])
        assert len(made) % 64 == 0 and len({p for p, _ in made}) == len(made)
