"""Seconds for each sampled token against the size of the batch: `python benchmarks/generation.py`

Models of the ladder, in 32 bits and in NF4, answer questions of the embedded world in batches of 1, 4, 16 and 64 rows. Every batch size
writes the same texts, so what differs is time alone. Then 25 samples of a prompt, three ways: the prompt read once and copied, the prompt
read once for each sample in one large batch, and 25 runs over the prompts one after another, which is what published code does. Repeats go
round all conditions, so that a busy minute of the machine falls on all of them. Last, rows that are replaced when they end and beginnings
that are read once, each against the same call without, and the whole against `generate` of transformers: a random Llama, medians of five
pairs in turns (`--pairs` measures these alone). Writes generation.md beside this file.
"""
import argparse
import os
import string
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory_vocabulary import machine
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

from w2s.models.load import LoadSettings, load_base, load_tokenizer
from w2s.models.places import SWITCH
from w2s.models.zoo import model_folder
from w2s.train.generate import GenerateSettings, prompt_ids, respond, width, write
from w2s.train.sampling import draws
from w2s.world.facts import make_world
from w2s.world.personas import questions as world_questions

TOKENS = 16                                     # of a response
QUESTIONS = {1: 6, 4: 16, 16: 32, 64: 64}       # rows for each batch size: fewer where each takes longer
SAMPLES, ASKED = 25, 2                          # samples of a prompt, and prompts
PAIRS, BATCH = 5, 16                            # of timings in turns; rows at once
MARK = '\n## Rows that are replaced, beginnings that are read once\n'
CONTEXT = 6                                     # questions with answers before the question, for a longer prompt


def load(name: str, quantize: str) -> Any:
    "A model of the ladder with 32-bit arithmetic"
    return load_base(str(model_folder(name)), LoadSettings(quantize, 'float32'), device='cpu')


def questions(base: Any, n: int) -> list[str]:
    "Prompts of the world whose padded width is the same, so that they fill batches"
    rows = [q['prompt'] for q in world_questions(make_world(), 4*n, 0)]
    widths = [width(len(ids)) for ids in prompt_ids(base.tokenizer, rows)]
    usual = max(set(widths), key=widths.count)
    return [p for p, w in zip(rows, widths, strict=True) if w == usual][:n]


def per_token(
    base: Any,
    prompts: list[str],
    batch: int,          # rows
    seed: int,
) -> float:              # seconds
    "Time of `respond`, with all that belongs to it, for each sampled token"
    room = width(len(prompt_ids(base.tokenizer, prompts[:1])[0])) + TOKENS
    how = GenerateSettings(max_tokens=TOKENS, temperature=1., token_budget=batch*room)
    start = time.process_time()
    made = respond(base.model, base.tokenizer, prompts[:QUESTIONS[batch]], how, seed, quiet=True)
    return (time.process_time() - start) / sum(r.tokens for row in made for r in row)


def three_ways(
    base: Any,
    prompts: list[str],
    seed: int,
) -> dict[str, float]:   # way: seconds for each token
    "25 samples of each prompt; all ways give the same texts, which is checked"
    ids, how = prompt_ids(base.tokenizer, prompts), GenerateSettings(max_tokens=TOKENS, temperature=1., samples=SAMPLES)
    u, one = torch.from_numpy(np.stack([draws(seed, p, k, TOKENS) for p in prompts for k in range(SAMPLES)])), replace(how, samples=1)
    ways = {
        'prompt read once, 50 rows at once': lambda: write(base.model, base.tokenizer, ids, u, how),
        'prompt read 25 times, 50 rows at once': lambda: write(
            base.model, base.tokenizer, [p for p in ids for _ in range(SAMPLES)], u, one
        ),
        'prompt read 25 times, 25 runs of 2 rows': lambda: [
            r for k in range(SAMPLES) for r in write(base.model, base.tokenizer, ids, u[k::SAMPLES], one)
        ],
    }
    out, texts = {}, []
    for name, work in ways.items():
        start = time.process_time()
        with torch.no_grad(): made = work()
        out[name] = (time.process_time() - start) / sum(r.tokens for r in made)
        texts.append(sorted(r.text for r in made))
    assert texts[0] == texts[1] == texts[2], 'the three ways gave different texts'
    return out


def with_interval(seconds: list[float]) -> str:
    "Mean of the repeats in milliseconds, with its 95 % interval (Student's t)"
    x = 1000*np.array(seconds)
    half = stats.t.ppf(.975, len(x) - 1) * x.std(ddof=1) / len(x)**.5
    return f'{x.mean():.2f} ± {half:.2f}'


def random_llama() -> tuple[Any, Any]:
    "A model that picks nearly any token, with the tokenizer of the ladder"
    tokenizer = load_tokenizer(model_folder('base'))
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=1024)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).eval().requires_grad_(False), tokenizer


def rare_letter(tokenizer: Any) -> str:
    "A letter in one token of 32: as a stop string it makes lengths geometric"
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    return min(string.ascii_letters, key=lambda c: abs(sum(c in p for p in pieces)/len(pieces) - 1/32))


def timed(work: Callable[[], int]) -> float: # seconds of the processor for each token
    start = time.process_time()
    tokens = work()
    return (time.process_time() - start)/tokens


def pairs() -> list[list[str]]:
    "Cells of each line: what, tokens of a response, milliseconds a token with and without, ratio with its least and largest"
    model, tokenizer = random_llama()
    asked = [q['prompt'] for q in world_questions(make_world(), 96, 0)]
    begun = [''.join(q + ' It is honey.\n' for q in asked[:18]) + q for q in asked[20:52]]
    room = max(width(len(i)) for i in prompt_ids(tokenizer, asked))
    def ours(prompts: list[str], how: GenerateSettings, **off: str) -> int:
        for name, at in SWITCH.items(): setattr(model, at, off.get(name, 'auto'))
        return sum(r.tokens for row in respond(model, tokenizer, prompts, how, 1, quiet=True) for r in row)
    def theirs(prompts: list[str], tokens: int) -> int:
        tokenizer.padding_side = 'left'
        for at in range(0, len(prompts), BATCH):
            x = tokenizer(prompts[at:at + BATCH], return_tensors='pt', padding=True, return_token_type_ids=False)
            with torch.no_grad():
                model.generate(**x, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0, pad_token_id=0)
        return len(prompts)*tokens
    ends = GenerateSettings(64, 1., stop=(rare_letter(tokenizer),), token_budget=BATCH*(room + 64))
    short, full = GenerateSettings(8, 1.), GenerateSettings(32, 1., token_budget=BATCH*(room + 32))
    start = len(os.path.commonprefix(prompt_ids(tokenizer, begun)))
    cases = {
        f'48 prompts, {BATCH} rows at once, geometric lengths: rows replaced, or batch after batch': (
            lambda: ours(asked[:48], ends), lambda: ours(asked[:48], ends, refill='off')),
        f'32 prompts with {start} tokens in common: read once, or 32 times': (
            lambda: ours(begun, short), lambda: ours(begun, short, packing='off')),
        f'16 prompts, {BATCH} rows at once, 32 tokens each: w2s, or generate of transformers': (
            lambda: ours(asked[:16], full), lambda: theirs(asked[:16], 32)),
    }
    took: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for turn in range(PAIRS + 1):
        for name, (one, other) in cases.items():
            took[name].append((timed(one), timed(other)) if turn % 2 else (timed(other), timed(one))[::-1])
    return [pair_line(name, np.array(found[1:])) for name, found in took.items()]


def pair_line(name: str, found: np.ndarray) -> list[str]:
    "Medians of one case"
    ratio = found[:, 1]/found[:, 0]
    return [name, *(f'{1000*x:.2f}' for x in np.median(found, 0)), f'{np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f})']


def pairs_text() -> str:
    "The section about them"
    lines = ''.join(f'| {" | ".join(cells)} |\n' for cells in pairs())
    return (
        f'{MARK}\nA random Llama (hidden size 256, 4 layers, vocabulary of the ladder) in 32 bits, whose tokens are nearly uniform. '
        f'Milliseconds of the processor for each sampled token, one thread; medians of {PAIRS} pairs in turns, and the ratio with its '
        'least and largest pair.\n\n| work: first way, or second | first | second | second over first |\n|---|---:|---:|---:|\n'
        f'{lines}\nMeasured on {machine("cpu")}, instructions {torch.backends.cpu.get_cpu_capability()}, load average '
        f'{os.getloadavg()[1]:.1f}; made by `python benchmarks/generation.py --pairs`.\n'
    )


def main() -> None:
    "Measure, print and write"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=['micro', 'base'])
    parser.add_argument('--repeats', type=int, default=4)
    parser.add_argument('--pairs', action='store_true', help='measure only these and keep the rest of generation.md')
    a = parser.parse_args()
    torch.set_num_threads(1)
    page = Path(__file__).with_suffix('.md')
    if a.pairs: return write_text(page.read_text(encoding='utf-8').split(MARK)[0] + pairs_text())
    bases = {(name, bits): load(name, how) for name in a.models for bits, how in (('32 bits', 'none'), ('NF4', 'nf4'))}
    prompts = {key: questions(base, 64) for key, base in bases.items()}
    long = {key: [''.join(q + ' It is honey.\n' for q in p[8:8 + CONTEXT]) + q for q in p[:ASKED]] for key, p in prompts.items()}
    took: dict[Any, list[float]] = defaultdict(list)
    for seed in range(a.repeats + 1): # the first one warms up
        for key, base in bases.items():
            for batch in QUESTIONS: took[key, batch].append(per_token(base, prompts[key], batch, seed))
            for kind, asked in (('short', prompts[key][:ASKED]), ('long', long[key])):
                for way, seconds in three_ways(base, asked, seed).items(): took[key, kind, way].append(seconds)
        print('round', seed, f'{time.process_time():.0f} s', file=sys.stderr, flush=True)
    write_page(a.repeats, bases, prompts, long, {k: v[1:] for k, v in took.items()})


def write_page(repeats: int, bases: dict, prompts: dict, long: dict, took: dict) -> None:
    "All numbers as Markdown"
    lines = [
        f'| model | weights | {" | ".join(f"batch of {b}" for b in QUESTIONS)} | 1 over 64 |',
        '|---|---|' + '---:|' * (len(QUESTIONS) + 1),
    ]
    for name, bits in bases:
        means = [np.mean(took[(name, bits), b]) for b in QUESTIONS]
        lines.append(
            f'| {name} | {bits} | {" | ".join(with_interval(took[(name, bits), b]) for b in QUESTIONS)} | {means[0] / means[-1]:.1f} |'
        )
    ways = list(dict.fromkeys(k[2] for k in took if len(k) == 3))
    more = [f'| model | weights | tokens of a prompt | {" | ".join(ways)} |', '|---|---|---:|' + '---:|'*len(ways)]
    for name, bits in bases:
        for kind, asked in (('short', prompts), ('long', long)):
            n = np.mean([len(i) for i in prompt_ids(bases[name, bits].tokenizer, asked[name, bits][:ASKED])])
            more.append(f'| {name} | {bits} | {n:.0f} | {" | ".join(with_interval(took[(name, bits), kind, way]) for way in ways)} |')
    text = (
        f'# Time of a sampled token, in milliseconds\n\nMean of {repeats} repeats (seeds 1 to {repeats}, after one that warms up) with its '
        '95 % interval. '
        f'Temperature 1, at most {TOKENS} tokens a response, 32-bit arithmetic; time of the processor, one thread, so that neighbours on '
        'the machine do not count.\n\n## By the size of the batch\n\n'
        f'Questions of the embedded world; the whole call of `respond`, over all sampled tokens.\n\n'
        + '\n'.join(lines)
        + f'\n\n## {SAMPLES} samples of {ASKED} prompts\n\nThe same texts three ways.\n\n'
        + '\n'.join(more)
        + f'\n\nMeasured on {machine("cpu")}, load average {os.getloadavg()[1]:.1f}; made by `python benchmarks/generation.py`.\n'
    )
    write_text(text + pairs_text())


def write_text(text: str) -> None:
    "Print and keep"
    print(text)
    Path(__file__).with_suffix('.md').write_text(text, encoding='utf-8')


if __name__ == '__main__': main()
