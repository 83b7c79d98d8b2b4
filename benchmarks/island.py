"""Which stream and steps make the island's models know the famous and not the forgotten? `python benchmarks/island.py PART`

speed: tokens a processor second of every shape, with the arithmetic as it is and as PyTorch's Muon and autocast have it. trial NAME SIZE
MILLIONS [key=value …]: one model, measured as it learns; keys are `people`, `plants`, `namesakes`, `first` (people,plants), `seed` and the
fields of `Recipe`. ladder: `xs, s, m, l`, with --seeds seeds of the smallest and the largest, their knowledge, the check of
`w2s.organism.island`, and the binary tasks with and without a linear classifier. table: writes island.md beside this file from all that was
measured before; what OUT knows nothing about stays as it was. Rows are added to OUT/<part>.jsonl, models stay in OUT, and a killed part
goes on where it stopped."""
import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from w2s.island.people import BANDS, make_island
from w2s.models import muon, pretrain
from w2s.models.load import Base, LoadSettings, load_base
from w2s.models.pretrain import (
    Recipe,
    Size,
    Training,
    block_batches,
    learn,
    make_optimizers,
    marks,
    new_model,
    pretrain_model,
    token_weights,
    tune_memory,
)
from w2s.organism import island as ladder
from w2s.world.facts import World

WORLD = dict(people=int, plants=int, namesakes=float)
NOTE = '''Seconds are of one processor core without bfloat16. "Before": PyTorch's Muon and autocast, both in bfloat16. Behind a share
stands the number of questions. Trials are of one seed; the learning rate of all falls after three fifths of 0.75 M tokens (A: of 0.5 M).
Trials A, B, P1600 and N7 were measured with an earlier form of this script, with at most 150 questions a probe. With 0.75 M tokens l was
not above m, so it reads 1.5 M; the check takes of each size and seed the model that has read most. What each model answered is in
island_ladder.jsonl, a digit for each question.'''
NAMES = (*(f'facts, {b}' for b in BANDS), ladder.CONTROL, 'kinds of plants')
WHOLE = LoadSettings(quantize='none', dtype='float32')


def write(out: Path, part: str, row: dict) -> None:
    "Add a row to the file of a part"
    out.mkdir(parents=True, exist_ok=True)
    with (out/f'{part}.jsonl').open('a', encoding='utf-8') as f: f.write(json.dumps(row) + '\n')


def rows(out: Path, part: str) -> list[dict]:
    "All rows of a part"
    file = out/f'{part}.jsonl'
    return [json.loads(line) for line in file.read_text(encoding='utf-8').splitlines()] if file.is_file() else []


def bits(right: dict[str, np.ndarray]) -> dict[str, str]:
    "A digit for each question: 1 where the answer is right"
    return {k: ''.join(str(int(x)) for x in v) for k, v in right.items()}


def unpacked(row: dict) -> dict:
    "A row of the ladder with arrays of 0 and 1"
    return row | {part: {k: np.array(list(v), float) for k, v in row[part].items()} for part in ('right', 'linear')}


def timed(size: Size, stream: pretrain.Stream, recipe: Recipe, steps: int) -> float:
    "Tokens a processor second, over steps after the first one"
    model = new_model(size, len(stream.tokenizer), 256, 0)
    training = Training(model, make_optimizers(model, recipe), [], 0)
    for i, ids in enumerate(block_batches(stream, replace(recipe, block=steps + 1), .9, 0, 0)[:steps + 1]):
        if i == 1: begin, read = time.process_time(), training.tokens
        learn(training, ids, np.ones(ids.shape, np.float32), recipe)
    return (training.tokens - read)/(time.process_time() - begin)


def speed(out: Path, steps: int) -> None:
    "Tokens a processor second of every shape, before and after"
    recipe, own = ladder.ISLAND_RECIPE, (muon.Muon, pretrain.has_bfloat16)
    stream = ladder.island_stream(make_island(), recipe)
    for name, size in ladder.ISLAND_SIZES.items():
        row = dict(size=name, shape=list(asdict(size).values()), parameters=new_model(size, len(stream.tokenizer), 256, 0).num_parameters())
        for way in ('before', 'after'):
            pretrain.Muon, pretrain.has_bfloat16 = own
            if way == 'before': pretrain.Muon, pretrain.has_bfloat16 = partial(torch.optim.Muon, weight_decay=0.), lambda device: True
            row[way] = round(timed(size, stream, recipe, steps))
        write(out, 'speed', row)
        print(row, flush=True)


def probe(base: Base, world: World, n: int) -> dict[str, tuple[float, int]]:
    "Share of right answers and number of questions of each probe that must rise, and of the control"
    return {k: (round(float(v.mean()), 3), len(v)) for k, v in ladder.island_knowledge(base, world, n, labels=False).items()}


def trial(out: Path, name: str, size: str, millions: float, given: dict[str, str], n: int, every: float) -> None:
    "Pretrain one model and measure it as it learns"
    of_world = {k: make(given.pop(k)) for k, make in WORLD.items() if k in given}
    first, seed = tuple(map(int, given.pop('first', ','.join(map(str, ladder.FIRST))).split(','))), int(given.pop('seed', 0))
    kinds = {f.name: type(f.default) for f in fields(Recipe)}
    recipe = replace(ladder.ISLAND_RECIPE, tokens=round(millions*1e6), **{k: kinds[k](float(v)) for k, v in given.items()})
    world, ladder.FIRST = make_island(**of_world), first
    stream, shape = ladder.island_stream(world, recipe), ladder.ISLAND_SIZES.get(size) or Size(*map(int, size.split(',')))
    answer, names = marks(stream.tokenizer, stream.answers), marks(stream.tokenizer, stream.names)
    model = new_model(shape, len(stream.tokenizer), 256, seed)
    training, spent, following = Training(model, make_optimizers(model, recipe), [], 0), 0., every*1e6
    tune_memory()
    while training.tokens < recipe.tokens:
        for ids in block_batches(stream, recipe, training.tokens/recipe.tokens, training.blocks, seed):
            begin = time.process_time()
            learn(training, ids, token_weights(ids, answer, names, recipe), recipe)
            spent += time.process_time() - begin
            if training.tokens < min(following, recipe.tokens): continue
            following += every*1e6
            base = Base(name, model.eval(), stream.tokenizer, '', WHOLE, 256)
            write(out, 'trial', dict(name=name, size=size, settings=of_world | dict(first=first) | asdict(recipe), seed=seed,
                                     tokens=training.tokens, seconds=round(spent), loss=training.history[-1]['loss'],
                                     probes=probe(base, world, n)))
            model.train()
            if training.tokens >= recipe.tokens: break
        training.blocks += 1


def build(out: Path, names: list[str], seeds: int, all_tokens: int, n: int) -> None:
    "Pretrain and measure the ladder; what is there already stays"
    world, sizes = make_island(), ladder.ISLAND_SIZES
    stream, there = ladder.island_stream(world, ladder.ISLAND_RECIPE), [(r['size'], r['seed'], r['tokens']) for r in rows(out, 'ladder')]
    for seed, name in product(range(seeds), names):
        tokens = all_tokens or ladder.ISLAND_TOKENS[name]
        recipe = replace(ladder.ISLAND_RECIPE, tokens=tokens)
        known_already = any((size, number) == (name, seed) and read >= tokens for size, number, read in there)
        if known_already or (seed and name not in (next(iter(sizes)), list(sizes)[-1])): continue
        begin = time.process_time()
        history = pretrain_model(out/f'{name}-{seed}-{tokens}', sizes[name], recipe, stream, seed, quiet=True)
        seconds, base = time.process_time() - begin, load_base(out/f'{name}-{seed}-{tokens}', WHOLE)
        known = ladder.island_knowledge(base, world, n)
        linear = {k: ladder.linear_right(base, world, k) for k in ladder.LABEL_PROBES}
        write(out, 'ladder', dict(size=name, seed=seed, tokens=int(history.tokens.iloc[-1]), seconds=round(seconds),
                                  loss=round(float(history.loss.tail(50).mean()), 3), right=bits(known), linear=bits(linear)))
        print(name, seed, round(seconds), {k: round(float(v.mean()), 3) for k, v in (known | linear).items()}, flush=True)


def markdown(table: pd.DataFrame) -> str:
    "A table as Markdown"
    lines = [list(table.columns), ['---']*len(table.columns), *table.astype(str).to_numpy().tolist()]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)


def scores(measured: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    "Of each size: probe -> (seeds, questions), the weakest first"
    sizes = [s for s in ladder.ISLAND_SIZES if any(r['size'] == s for r in measured)]
    return {s: {p: np.array([r['right'][p] for r in measured if r['size'] == s]) for p in measured[0]['right']} for s in sizes}


def told(row: dict) -> dict:
    "Which model a row of the ladder is about"
    return dict(model=row['size'], seed=row['seed'], tokens=f'{row["tokens"]/1e6:.2f} M', seconds=row['seconds'], loss=row['loss'])


def longest(measured: list[dict]) -> list[dict]:
    "Of each size and seed, the model that has read most"
    return list({(r['size'], r['seed']): r for r in sorted(measured, key=lambda r: r['tokens'])}.values())


def changed(settings: dict) -> str:
    "Settings of a trial that are not those of the ladder"
    usual = asdict(ladder.ISLAND_RECIPE) | dict(first=list(ladder.FIRST), people=1000, plants=300, namesakes=2.)
    other = {k: f'{v:g}' if isinstance(v, float) else v for k, v in settings.items() if k != 'tokens' and v != usual[k]}
    return ', '.join(f'{k} {v}' for k, v in other.items()) or '–'


def tables(out: Path) -> Iterator[str]:
    "Everything that was measured"
    if found := rows(out, 'speed'): yield '## Tokens a processor second\n\n' + markdown(pd.DataFrame(found))
    if found := rows(out, 'trial'):
        yield '## Trials\n\n' + markdown(pd.DataFrame([
            dict(trial=r['name'], size=r['size'], changed=changed(r['settings']), tokens=f'{r["tokens"]/1e6:.2f} M', seconds=r['seconds'])
            | {p: '{:.2f} ({})'.format(*r['probes'][p]) for p in NAMES} for r in found]))
    sizes = [*ladder.ISLAND_SIZES]
    found = sorted(map(unpacked, rows(out, 'ladder')), key=lambda r: (sizes.index(r['size']), r['tokens'], r['seed']))
    if not found: return
    table = pd.concat([ladder.probe_table({k: r['right'][k] for k in NAMES}).assign(row=i) for i, r in enumerate(found)])
    table['told'] = [f'{t.value:.3f} [{t.low:.3f}, {t.high:.3f}]' for t in table.itertuples()]
    wide = table.pivot(index='row', columns='probe', values='told')[list(NAMES)]
    yield '## What each model knows\n\n' + markdown(pd.concat([pd.DataFrame([told(r) for r in found]), wide], axis=1))
    linear = pd.DataFrame([told(r) | {k: f'{np.mean(r["right"][f"{k}, untuned"]):.2f}, {np.mean(v):.2f}' for k, v in r['linear'].items()}
                           for r in found])
    yield '## Binary tasks: untuned, and by a linear classifier\n\n' + markdown(linear)
    known = scores(longest(found))
    if len(known) > 1:
        yield '## Steps\n\n' + markdown(ladder.ladder_steps(known).round(3))
        yield '## The check\n\n' + ('\n'.join(f'- {f}' for f in ladder.ladder_faults(known)) or 'Passed.')


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('part', choices=('speed', 'trial', 'ladder', 'table'))
    p.add_argument('more', nargs='*', help='of a trial: name, size, million tokens, settings')
    p.add_argument('--out', type=Path, default=Path('runs/island'))
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--sizes', default=','.join(ladder.ISLAND_SIZES))
    p.add_argument('--tokens', type=float, default=0., help='million tokens of each model of the ladder; 0: ISLAND_TOKENS')
    p.add_argument('--questions', type=int, default=400)
    p.add_argument('--every', type=float, default=.25, help='million tokens between two measurements of a trial')
    args = p.parse_args()
    torch.set_num_threads(1)
    if args.part == 'speed': speed(args.out, 3)
    if args.part == 'trial':
        name, size, millions, *settings = args.more
        trial(args.out, name, size, float(millions), dict(s.split('=') for s in settings), args.questions, args.every)
    if args.part == 'ladder': build(args.out, args.sizes.split(','), args.seeds, round(args.tokens*1e6), args.questions)
    if args.part == 'table':
        file = Path(__file__).with_suffix('.md')
        before = file.read_text(encoding='utf-8').strip().split('\n\n## ')[1:] if file.is_file() else []
        sections = {part.partition('\n')[0]: part for part in (*before, *(t.removeprefix('## ') for t in tables(args.out)))}
        text = '\n\n'.join(('# Ladder of the island', NOTE, *(f'## {part}' for part in sections.values())))
        file.write_text(text + '\n', encoding='utf-8')


if __name__ == '__main__': main()
