"""Peak memory of one DPO step against the size of the vocabulary: `python benchmarks/memory_vocabulary.py`

A tiny Llama of one width, a DPO step of so many tokens, with a vocabulary from 2k to 128k. Counted is what the step has in memory at
its height over what was there before it (the model, its head and its adapter): on a CPU by every allocation that torch's profiler
reports, on a GPU by `torch.cuda.max_memory_allocated`. Beside it the same step with a table of logits, which is what others do.
Writes memory_vocabulary.md beside this file.
"""
import argparse
import gc
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import Base, LoadSettings
from w2s.models.places import SWITCH
from w2s.models.tiny import tiny_config
from w2s.train.batches import Block
from w2s.train.loop import Objective, preference_objective, step_gradient
from w2s.train.tokens import Encoded, EncodedRow

PROMPT, LENGTH = 8, 128 # tokens of a prompt, and of a prompt with its response


def naive_logps(
    model: Any,   # with an adapter
    data: Block,  # sequences
) -> Tensor:      # (sequences,)
    "What `response_logps` does not do: logits of every position, then log-softmax"
    data = data.to(model.device)
    logits = model(input_ids=data.input_ids, attention_mask=data.attention_mask, position_ids=data.position_ids, use_cache=False).logits
    logp = logits[:, :-1].float().log_softmax(-1).gather(2, data.input_ids[:, 1:, None])[..., 0]
    return (logp * (torch.arange(1, data.input_ids.shape[1], device=logp.device) >= PROMPT)).sum(1)


def a_step(
    vocabulary: int, # words
    tokens: int,     # of all sequences together, prompts among them
    hidden: int,     # width
    device: str,     # 'cpu' or 'cuda'
) -> tuple[Any, Objective]:
    "A model with an adapter, and DPO rows of that many tokens"
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(tiny_config(vocabulary, hidden, layers=1, context=LENGTH)).to(device).requires_grad_(False)
    adapted = add_adapter(Base('tiny', model, None, 'tiny', LoadSettings('none', 'float32'), LENGTH), LoraSettings(rank=4))
    rng = np.random.default_rng(0)
    def one() -> Encoded: return Encoded(tuple(rng.integers(3, vocabulary, LENGTH).tolist()), PROMPT)
    rows = [EncodedRow(f'row{i}', (one(), one()), 0) for i in range(tokens // (2*LENGTH))]
    return adapted, preference_objective(rows, np.zeros((len(rows), 2)))


def peak_bytes(
    work: Callable[[], Any], # what is measured
    device: str,
) -> int:
    "The most that is allocated at one moment, over what was there before"
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile: work()
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    return int(np.cumsum([n for _, n in sorted(changes, key=lambda c: c[0])]).max())


def measure(
    vocabulary: int,
    tokens: int,
    hidden: int = 64,
    naive: bool = False,   # with the table of logits
    device: str = 'cpu',
) -> int:                  # bytes
    "Peak of one DPO step, forward and backward, after one that warms up"
    model, goal = a_step(vocabulary, tokens, hidden, device)
    if naive:
        goal = replace(goal, forward=naive_logps)
        setattr(model.get_base_model(), SWITCH['packing'], 'off') # it reads a block of equally long rows
    def step() -> None:
        step_gradient(model, goal, range(len(goal.ids)), 1 << 30)
        for p in model.parameters(): p.grad = None
    if device == 'cuda': step()
    return peak_bytes(step, device)


def machine(device: str) -> str:
    "What it was measured on"
    name = (
        torch.cuda.get_device_name()
        if device == 'cuda'
        else next(
            (line.split(':')[1].strip() for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')),
            platform.processor(),
        )
    )
    return (f'{name}, {os.cpu_count()} cores; torch {torch.__version__}, transformers {transformers.__version__}, Python '
            f'{platform.python_version()}')


def table(
    vocabularies: list[int],
    sizes: list[int], # tokens
    hidden: int,
    device: str,
    most: float,      # bytes: naive steps that need more are not tried
) -> str:             # Markdown
    "All combinations, in MiB"
    lines = ['| tokens | way | ' + ' | '.join(f'V = {v:,}' for v in vocabularies) + ' |', '|---:|---|' + '---:|'*len(vocabularies)]
    for tokens in sizes:
        for naive in (False, True):
            cells = []
            for v in vocabularies:
                too_much = naive and 4*4*v*tokens > most
                cells.append('–' if too_much else f'{measure(v, tokens, hidden, naive, device)/2**20:,.1f}')
                print(tokens, 'logits' if naive else 'w2s', v, cells[-1], file=sys.stderr)
            lines.append(f'| {tokens:,} | {"table of logits" if naive else "w2s"} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def main() -> None:
    "Measure, print and write"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--vocabulary', type=int, nargs='+', default=[2048, 8192, 32768, 131072])
    parser.add_argument('--tokens', type=int, nargs='+', default=[256, 1024, 4096])
    parser.add_argument('--hidden', type=int, default=64)
    parser.add_argument('--most', type=float, default=3., help='GiB that a step with a table of logits may need')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    a = parser.parse_args()
    text = (
        f'# Peak memory of a DPO step, in MiB\n\nOver the model, its head ({a.hidden} × V) and its adapter, which are there '
        'before the step. '
        f'Width {a.hidden}, one layer, 32 bits, sequences of {LENGTH} tokens.\n\n'
        f'{table(a.vocabulary, a.tokens, a.hidden, a.device, a.most * 2**30)}\n\n'
        f'"–": over {a.most:g} GiB, not tried. Measured on {machine(a.device)}; made by `python benchmarks/memory_vocabulary.py`.\n'
    )
    print(text)
    Path(__file__).with_suffix('.md').write_text(text, encoding='utf-8')


if __name__ == '__main__': main()
