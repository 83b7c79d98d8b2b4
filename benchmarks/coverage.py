"""How often do 95 % intervals hold the truth? `python benchmarks/coverage.py`

Studies are drawn whose truth is known: 1 to 10 seeds, whose luck is none, mild or strong; 20 to 500 test rows, alone or 3 or 10 to a
prompt; scores that are right (1) or wrong (0), in 2, 50 or 98 of 100 cases. Of each study three numbers are looked at: the mean of a model,
the difference to a model that is equally good, and the difference to one that is not. Each has the interval of `w2s.evaluate.intervals`
and, for comparison, the one that the package had before: a bootstrap over rows and seeds, stretched for few seeds. Rows of a prompt are
grouped first (`clustered`); what comes of leaving them ungrouped is in a table of its own. Writes coverage.md beside this file. Takes about
ten minutes on one core; `--studies 100 --draws 200` takes one.
"""
import argparse
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from w2s.evaluate.intervals import interval_limits

SEEDS, ROWS, GROUPS, MEANS = (1, 2, 3, 5, 10), (20, 50, 200, 500), (1, 3, 10), (.02, .5, .98)
# standard deviation of a seed on the latent scale: 0, 3 and 10 points of accuracy at one half
LUCK = {'none': 0., 'mild': .075, 'strong': .25}
OTHER = {.02: .08, .5: .6, .98: .92}               # how good the model is that is not equally good
WITHIN = .6                                        # latent correlation of the rows of a prompt: 0.41 between scores at one half
# share of the latent variance that belongs to one seed on one row; of the rest, what all models share
RESIDUAL, SHARED = .35, .6
Ends = tuple[np.ndarray, np.ndarray]


def draw_studies(
    rng: np.random.Generator,
    studies: int,
    seeds: int,
    rows: int,
    group: int,        # rows to a prompt
    luck: float,       # of `LUCK`
    shares: tuple[float, ...], # of right answers, one a model
) -> np.ndarray:       # (studies, models, seeds, rows): right (1) or wrong (0)
    "Studies by a latent normal score with parts of prompt, row, seed, and seed on row"
    models, prompts = len(shares), -(-rows // group)
    of_prompt = WITHIN if group > 1 else 0.
    def part(*axes: int) -> np.ndarray: return rng.normal(size=(studies, *axes)).astype(np.float32)
    # a part for all models, and one for each of them
    def hard(n: int) -> np.ndarray: return SHARED**.5*part(1, 1, n) + (1 - SHARED)**.5*part(models, 1, n)
    latent = of_prompt**.5*hard(prompts).repeat(group, axis=-1)[..., :rows] + (1 - RESIDUAL - of_prompt)**.5*hard(rows)
    level = stats.norm.ppf(shares)*np.sqrt(1 + luck**2)
    return (latent + luck*part(models, seeds, 1) + RESIDUAL**.5*part(models, seeds, rows) + level[:, None, None] > 0).astype(float)


def by_prompt(
    x: np.ndarray,  # (…, rows)
    group: int,     # rows to a prompt
) -> np.ndarray:    # (…, prompts)
    "`clustered`, for many studies at once"
    if group == 1: return x
    mean, starts = x.mean(-1, keepdims=True), np.arange(0, x.shape[-1], group)
    return mean + np.add.reduceat(x - mean, starts, axis=-1)*len(starts)/x.shape[-1]


def stretched_bootstrap(
    x: np.ndarray,      # (studies, seeds, rows)
    draws: int = 1000,  # of the bootstrap; the package drew 2,000
) -> Ends:
    """The interval that the package had before: percentiles over rows and seeds, made as wide as a t interval whose two errors both count
    the residual"""
    _, seeds, rows = x.shape
    rng = np.random.default_rng(0)
    of_rows, of_seeds = (rng.multinomial(n, np.full(n, 1/n), size=draws) for n in (rows, seeds))
    means = np.einsum('ds,bsd->bd', of_seeds, x @ of_rows.T.astype(float))/(seeds*rows)
    value, spread = x.mean((1, 2)), means.std(1)
    low, high = np.percentile(means, [2.5, 97.5], axis=1)
    stretch = np.ones(len(x))
    if seeds > 1:
        a, b = x.mean(2).std(1, ddof=1)/seeds**.5, x.mean(1).std(1, ddof=1)/rows**.5
        freedom = (a**2 + b**2)**2/np.maximum(a**4/(seeds - 1) + b**4/(rows - 1), 1e-300)
        t = np.where(a > 0, stats.t.ppf(.975, np.maximum(freedom, 1)), 1.96)
        stretch = np.where(spread > 1e-12, np.maximum(1, t*np.hypot(a, b)/np.where(spread > 1e-12, 1.96*spread, 1)), 1)
    return value + stretch*(low - value), value + stretch*(high - value)


def share_held(ends: Ends, truth: float) -> float:
    "How often is the truth in the interval?"
    return float(np.mean((ends[0] <= truth + 1e-12) & (truth - 1e-12 <= ends[1])))


def width(ends: Ends) -> float:
    "Median width"
    return float(np.median(ends[1] - ends[0]))


def one_kind(
    studies: int,
    draws: int,
    seeds: int,
    luck: str,      # a key of `LUCK`
    group: int,
    mean: float,
    rows: int,
) -> list[dict]:    # a line a quantity: coverage and width before and now
    "All that is measured on one kind of study"
    rng = np.random.default_rng([seeds, rows, group, round(100*mean), round(1000*LUCK[luck])])
    raw = draw_studies(rng, studies, seeds, rows, group, LUCK[luck], (mean, mean, OTHER[mean]))
    x = by_prompt(raw, group)
    tasks = {
        'mean': (x[:, 0], raw[:, 0], mean, (0.0, 1.0), False),
        'equal models': (x[:, 0] - x[:, 1], raw[:, 0] - raw[:, 1], 0.0, (-1.0, 1.0), True),
        'unequal models': (x[:, 0] - x[:, 2], raw[:, 0] - raw[:, 2], mean - OTHER[mean], (-1.0, 1.0), True),
    }
    out = []
    for name, (grouped, single, truth, bounds, paired) in tasks.items():
        before, now = stretched_bootstrap(grouped, draws), interval_limits(grouped, bounds=bounds, paired=paired)
        lone = share_held(stretched_bootstrap(single, draws), truth) if group > 1 else np.nan
        out.append(
            dict(
                quantity=name,
                seeds=seeds,
                luck=luck,
                group=group,
                mean=mean,
                rows=rows,
                before=share_held(before, truth),
                now=share_held(now, truth),
                ungrouped=lone,
                wide_before=width(before),
                wide_now=width(now),
                outside=float(np.mean((now[0] < bounds[0]) | (now[1] > bounds[1]))),
                flat=float(np.mean(now[1] <= now[0])),
            )
        )
    return out


def reason(row: pd.Series) -> str:
    "Why the share of a kind of study is not 93 to 97 %"
    units, mean = row['rows']/row['group'], row['mean']
    if .93 <= row['now'] <= .97: return ''
    if row['seeds'] == 1 and row['luck'] != 'none': return 'one seed, with seed variance'
    if row['seeds'] == 2 and row['luck'] != 'none' and row['now'] < .93: return 'two seeds, with seed variance'
    if units < 10: return 'fewer than ten prompts'
    if mean != .5 and units*min(mean, 1 - mean) <= 5: return 'few prompts with a rare answer (five at most, in expectation)'
    return 'chance or other'


def compact(table: pd.DataFrame, quantity: str, column: str = 'before') -> str:
    "A Markdown table of coverage, before → now, with a column for each number of rows"
    t = table[table['quantity'] == quantity]
    def cell(r: pd.Series) -> str:
        new = f'{r["now"]:.3f}'.lstrip('0')
        return f'{r[column]:.3f} → '.lstrip('0') + (new if .93 <= r['now'] <= .97 else f'**{new}**')
    lines = [
        '| seeds | luck | rows a prompt | mean | ' + ' | '.join(f'{n} rows' for n in ROWS) + ' |',
        '|---|---|---|---|' + '---|' * len(ROWS),
    ]
    for key, part in t.groupby(['seeds', 'luck', 'group', 'mean'], sort=False):
        by_rows = part.set_index('rows')
        lines.append(
            '| ' + ' | '.join(map(str, key)) + ' | ' + ' | '.join(cell(by_rows.loc[n]) if n in by_rows.index else '–' for n in ROWS) + ' |'
        )
    return '\n'.join(lines)


def summary(table: pd.DataFrame, by: list[str], kind: Callable[[pd.DataFrame], pd.DataFrame] = lambda t: t) -> str:
    "Share of the kinds of studies whose coverage is 93 to 97 %, before and now, and their least coverage"
    lines = [
        '| '
        + ' | '.join(by)
        + ' | kinds | below 93 %, before | now | in 93–97 %, before | now | least, before | now | median width, now to before |',
        '|' + '---|' * (len(by) + 8),
    ]
    for key, part in kind(table).groupby(by, sort=False):
        below, inside = ([keep(part[c]).mean() for c in ('before', 'now')] for keep in (lambda x: x < .93, lambda x: x.between(.93, .97)))
        ratio = (part['wide_now']/part['wide_before'].where(part['wide_before'] > 0)).median()
        lines.append(
            '| ' + ' | '.join(map(str, key)) + f' | {len(part)} | {below[0]:.0%} | {below[1]:.0%} | {inside[0]:.0%} | {inside[1]:.0%} | '
            f'{part["before"].min():.2f} | {part["now"].min():.2f} | {ratio:.2f} |'
        )
    return '\n'.join(lines)


def report(table: pd.DataFrame, studies: int, draws: int, seconds: float) -> str:
    "coverage.md"
    why = table.assign(why=table.apply(reason, axis=1))
    missed = why[why['why'] != '']
    lines = ['| why | kinds below 93 % | least | kinds above 97 % | most |', '|---|---|---|---|---|']
    lines += [
        f'| {k} | {(p["now"] < 0.93).sum()} | {p["now"].min():.3f} | {(p["now"] > 0.97).sum()} | {p["now"].max():.3f} |'
        for k, p in missed.groupby('why')
    ]
    grouped = table[(table['group'] > 1) & (table['quantity'] == 'mean') & (table['luck'] == 'none')]
    left = grouped.groupby(['group', 'rows'])[['ungrouped', 'before', 'now']].mean().round(3).reset_index()
    loose = ['| rows a prompt | rows | rows not grouped, before | grouped, before | grouped, now |', '|---|---|---|---|---|'] + [
        '| ' + ' | '.join(map(str, [int(r[0]), int(r[1]), *r[2:]])) + ' |' for r in left.itertuples(index=False)
    ]
    chance = 1.96*(.95*.05/studies)**.5
    return (
        '\n\n'.join(
            [
                '# Coverage of 95 % intervals',
                f'{studies:,} simulated studies of each of {len(table) // 3} kinds, seeded; chance moves a share by {chance:.3f} (95 %). '
                f'Before: bootstrap over rows and seeds, stretched ({draws:,} draws). Now: `interval_limits`. Made by '
                f'`benchmarks/coverage.py` in {seconds / 60:.0f} minutes.',
                f'Intervals that leave the range of the metric: {table["outside"].max():.0%}. Intervals without width: '
                f'{table["flat"].max():.0%}.',
                '## By seeds and seed variance',
                'Kinds with 50 rows at least and ten prompts.',
                summary(table, ['seeds', 'luck'], lambda t: t[(t['rows'] >= 50) & (t['rows'] >= 10 * t['group'])]),
                '## By mean and rows',
                'Kinds without seed variance, or with three seeds and more.',
                summary(table, ['mean', 'rows'], lambda t: t[(t['luck'] == 'none') | (t['seeds'] > 2)]),
                '## Where it is not 93 to 97 %',
                'Bold in the tables below. A share above 97 % is wide, not wrong: counts of rare answers jump, and no rule for them '
                'can be at 95 %.',
                '\n'.join(lines),
                '## Rows of a prompt that are not grouped',
                'Mean coverage of the mean of one model, no seed variance, over all means and seeds.',
                '\n'.join(loose),
                *(
                    x
                    for q, told in (
                        ('mean', 'The mean of a model'),
                        ('equal models', 'The difference of two models that are equally good'),
                        ('unequal models', 'The difference of two models that are not equally good'),
                    )
                    for x in (f'## {told}', 'Coverage, before → now.', compact(table, q))
                ),
            ]
        )
        + '\n'
    )


def coverage_table(studies: int, draws: int, quiet: bool = False, **kinds: tuple) -> pd.DataFrame:
    "All kinds of studies, or those given by name"
    axes = dict(seeds=SEEDS, luck=tuple(LUCK), group=GROUPS, mean=MEANS, rows=ROWS) | kinds
    out = []
    for key in product(*axes.values()):
        out += one_kind(studies, draws, **dict(zip(axes, key, strict=True)))
        if not quiet and key[-1] == axes['rows'][-1]: print(*key, flush=True)
    return pd.DataFrame(out)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--studies', type=int, default=1000, help='of each kind')
    parser.add_argument('--draws', type=int, default=1000, help='of the bootstrap')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_suffix('.md'))
    args = parser.parse_args()
    start = time.process_time()
    table = coverage_table(args.studies, args.draws)
    args.out.write_text(report(table, args.studies, args.draws, time.process_time() - start), encoding='utf-8')
