"""Five minutes on a GPU that w2s has not seen: `python benchmarks/first_gpu.py [--device cuda] [--out first_gpu.md]`

A Llama with random weights, of a size that the device can take in a moment (a billion weights on a GPU, a million on a CPU), is
loaded in the ways that people will use, and of each it is measured: does it load, are log-probs those of its logits, memory of a step
against the estimate, tokens a second in training, scoring and sampling, is a training the same twice and after a stop, and what
happens when memory runs out. A row that fails says why; the others go on. What it prints should be kept with the report of a fault.
"""
import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import w2s
import w2s.train.loop as loop
from w2s.errors import W2SWarning
from w2s.io.provenance import package_versions
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.devices import device_line, find_device, free_memory, release_memory, settle, wait_for
from w2s.models.load import Base, LoadSettings, load_base, load_tokenizer
from w2s.models.tiny import tiny_config, tiny_model
from w2s.train.checkpoints import trainable
from w2s.train.generate import respond
from w2s.train.logprobs import check_model, score
from w2s.train.loop import preference_objective, step_gradient, train
from w2s.train.settings import GenerateSettings, TrainSettings
from w2s.train.step_memory import compute_twice, estimate_step
from w2s.train.tokens import Encoded, EncodedRow

WAYS = {'nf4': LoadSettings('nf4'), 'nf4, adapters in 32 bits': LoadSettings('nf4', compute='plain'), '16 bits': LoadSettings('none'),
        'float16': LoadSettings('none', 'float16'), 'float32': LoadSettings('none', 'float32')}


def make_model(
    folder: Path,      # made
    device: torch.device, # that it is for
) -> Path:
    "A Llama with random weights and a small tokenizer"
    small = device.type == 'cpu'
    tiny_model(folder, ['The fox lives by the river.', 'Where does the owl sleep?'], hidden=64)
    tokens = len(load_tokenizer(folder))
    with torch.device('cpu' if small else device):
        config = tiny_config(tokens, 128 if small else 2048, layers=4 if small else 20, context=1024)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    del model
    release_memory()
    return folder


def make_rows(
    n: int,    # pairs
    time: int, # tokens of each sequence
) -> list[EncodedRow]:
    "Pairs of random tokens"
    rng = np.random.default_rng(0)
    def one() -> Encoded: return Encoded(tuple(rng.integers(3, 60, time).tolist()), time//2)
    return [EncodedRow(f'row{i}', (one(), one()), 0) for i in range(n)]


def seconds(
    work: Callable[[], Any], # timed once, after one that is not
    device: torch.device,
) -> float:
    "Wall time with the queue of the device empty before and after"
    work()
    wait_for(device)
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


@contextmanager
def adapted(base: Base):
    "A fresh adapter, taken off at the end"
    model = add_adapter(base, LoraSettings())
    try: yield model
    finally: model.unload()


def learned(base: Base, rows: list[EncodedRow], folder: Path, stop: int = 0, **more: Any) -> torch.Tensor:
    "The trained numbers; stopped and begun again where asked for"
    settings = TrainSettings(**{'batch_size': 4, 'learning_rate': 1e-3, 'warmup': 0., 'checkpoint_every': 1} | more)
    goal = preference_objective(rows, np.zeros((len(rows), 2)))
    def halt(taken: int) -> None:
        if taken == stop: raise KeyboardInterrupt
    with adapted(base) as model:
        with suppress(KeyboardInterrupt): train(model, goal, settings, folder, quiet=True, after=halt if stop else None)
        return torch.cat([p.detach().cpu().flatten() for p in trainable(model).values()])


def memory_line(base: Base, rows: list[EncodedRow], time: int, twice: bool) -> str:
    "Estimate against what the device says"
    with adapted(base) as model:
        compute_twice(model, twice)
        try:
            tokens = 2*len(rows)*time
            found = estimate_step(model, time, twice, tokens).at(tokens)
            if base.model.device.type != 'cuda': return f'{found/2**30:.2f} GiB estimated'
            goal = preference_objective(rows, np.zeros((len(rows), 2)))
            step_gradient(model, goal, range(len(rows)), 1 << 30)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step_gradient(model, goal, range(len(rows)), 1 << 30)
            torch.cuda.synchronize()
            real = torch.cuda.max_memory_allocated() - before
            return f'{found/2**30:.2f} GiB estimated, {real/2**30:.2f} allocated ({found/real - 1:+.0%})'
        finally: compute_twice(model, False)


def short_line(base: Base, rows: list[EncodedRow], folder: Path) -> str:
    "Half of the memory of a step"
    if base.model.device.type != 'cuda': return 'no bound can be set here'
    big = {'batch_size': len(rows), 'token_budget': 1 << 30, 'gradient_checkpointing': False}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    want = learned(base, rows, folder/'whole', **big)
    total, peak, now = (
        torch.cuda.get_device_properties(base.model.device).total_memory,
        torch.cuda.max_memory_reserved(),
        torch.cuda.memory_allocated(),
    )
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((now + .6*(peak - now))/total)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', W2SWarning)
            known, loop.free_memory = loop.free_memory, lambda device: None
            try: found = learned(base, rows, folder/'short', **big)
            finally: loop.free_memory = known
        said = [str(w.message)[:80] for w in caught if isinstance(w.message, W2SWarning)]
        return f'largest difference {(found - want).abs().max():.1e}; {said[0] if said else "it was not short"}'
    finally: torch.cuda.set_per_process_memory_fraction(1.)


def measure(
    folder: Path,           # of the model
    settings: LoadSettings, # one of `WAYS`
    work: Path,             # for checkpoints
) -> dict[str, str]:
    "All numbers of one way; what fails is said"
    out: dict[str, str] = {}
    def note(name: str, make: Callable[[], str]) -> None:
        try: out[name] = make()
        except Exception as e: out[name] = f'FAILED: {type(e).__name__}: {" ".join(str(e).split())[:160]}'
    base = load_base(folder, settings)
    device, small = base.model.device, base.model.device.type == 'cpu'
    n, time_ = (4, 64) if small else (8, 512)
    rows = make_rows(n, time_)
    out['where'] = device_line(base.settings)
    note('log-probs', lambda: check_model(base) or 'those of its logits')
    note('memory, plain', lambda: memory_line(base, rows, time_, False))
    note('memory, with checkpointing', lambda: memory_line(base, rows, time_, True))
    note(
        'training',
        lambda: (
            f'{2 * 2 * n * time_ / seconds(lambda: learned(base, rows, Path(tempfile.mkdtemp(dir=work)), epochs=2), device):,.0f} '
            'tokens a second'
        ),
    )
    note('scoring', lambda: f'{2*n*time_/seconds(lambda: score(base.model, rows, quiet=True), device):,.0f} tokens a second')
    how = GenerateSettings(max_tokens=8 if small else 64, temperature=1.)
    def answered() -> object: return respond(base.model, base.tokenizer, [f'The fox {i}' for i in range(n)], how, quiet=True)
    note(
        'sampling',
        lambda: (
            f'{n * how.max_tokens / seconds(answered, device):,.0f} tokens a second at most'
        ),
    )
    note('the same twice', lambda: str(torch.equal(learned(base, rows, work/'a'), learned(base, rows, work/'b'))))
    def resumed() -> str:
        learned(base, rows, work/'c', stop=1)
        return str(torch.equal(learned(base, rows, work/'c'), learned(base, rows, work/'a')))
    note('the same after a stop', resumed)
    note('when memory runs out', lambda: short_line(base, rows, work))
    return out


def main() -> None:
    "Measure every way and print a table"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='auto', help='cpu, cuda, cuda:1, mps or xpu')
    parser.add_argument('--out', type=Path, default=None, help='file for the table, besides the screen')
    args = parser.parse_args()
    device, lines = find_device(args.device), []
    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
    free = free_memory(device)
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type
    say(f'# First run on {name}\n\nw2s {w2s.__version__}, {", ".join(f"{k} {v}" for k, v in package_versions().items())}; '
        f'{platform.platform()}; {"free memory unknown" if free is None else f"{free/2**30:.1f} GiB free"}.')
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        folder = make_model(Path(tmp)/'model', device)
        for way, settings in WAYS.items():
            start = time.perf_counter()
            say(f'\n## {way}\n\n| | |\n|---|---|')
            try: found = measure(folder, settle(replace(settings, device=str(device))), Path(tempfile.mkdtemp(dir=tmp)))
            except Exception as e: found = {'loading': f'FAILED: {type(e).__name__}: {" ".join(str(e).split())[:200]}'}
            for k, v in found.items(): say(f'| {k} | {v} |')
            say(f'| took | {time.perf_counter() - start:.0f} s |')
            release_memory()
    if args.out: args.out.write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
