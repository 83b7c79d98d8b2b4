"Plots: what is drawn is what the tables say, and it can be read"
import ast
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb

from w2s.errors import DataError
from w2s.evaluate.intervals import difference_table, interval_table
from w2s.evaluate.metrics import ROLES, metric_rows, preference_scores, summarise
from w2s.plots.base import COLORS, WIDEST, legend_above, named_role, share_legend
from w2s.plots.costs import CHOICE_COLORS, plot_costs
from w2s.plots.demonstrations import METHOD_LOOKS, SPARE
from w2s.plots.labels import plot_pgr, set_size_axis
from w2s.plots.methods import MEASURES, plot_curves, plot_methods
from w2s.plots.metrics import metric_label, metric_of
from w2s.plots.responses import MARKS, OUTCOMES, plot_outcomes, plot_similarity
from w2s.plots.results import (
    ROLE_COLORS,
    caption,
    group_names,
    model_colors,
    model_name,
    model_size,
    plot_differences,
    plot_roles,
    plot_seeds,
    plot_training,
    save_figure,
)
from w2s.plots.scores import plot_scores
from w2s.plots.studies import plot_varied
from w2s.plots.weak_labels import plot_coverage, plot_margins, plot_reliability

MODELS = {('baseline', 'untuned'): -.1, ('baseline', 'sft weak'): -.02, ('baseline', 'sft human'): 0., ('floor', 'dpo human'): .1,
          ('student', 'dpo weak'): .2, ('human', 'dpo human'): .25, ('ceiling', 'dpo human both halves'): .4}


def experiment(strong='m/opt-1.3b', weak='m/opt-125m', seeds=2, rows=60, seed=0, floor_strong=None, task='hh'):
    r = np.random.default_rng(seed)
    out = []
    for (role, method), lead in MODELS.items():
        for s in range(seeds):
            margin, logp = lead + r.normal(size=rows), r.normal(-120, 9, size=rows)
            scores = preference_scores(logp, logp - margin, None if method == 'untuned' else margin)
            name = floor_strong if role == 'floor' and floor_strong is not None else strong
            out.append(metric_rows([f'q{i}' for i in range(rows)], scores, role, method, weak, name, s, task))
    return pd.concat(out, ignore_index=True)


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close('all')


def segments(ax, axis=1):
    "Ends of the interval lines of an Axes, sorted"
    lines = [seg for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection) for seg in c.get_segments()]
    return np.array(sorted((seg[:, axis].min(), seg[:, axis].max()) for seg in lines))


def ends(table): return np.array(sorted(zip(table['low'], table['high'], strict=True)))


def texts(ax): return [t.get_text() for t in ax.texts]


@pytest.mark.parametrize('metric', ['accuracy', 'likelihood_accuracy', 'margin', 'logp_chosen', 'logp_rejected'])
@pytest.mark.parametrize('seeds', [1, 3])
def test_roles_draws_the_intervals_of_the_table(metric, seeds):
    t = interval_table(experiment(seeds=seeds))
    mine = t[t['metric'] == metric]
    ax = plot_roles(t, metric)
    assert isinstance(ax, Axes)
    assert np.allclose(segments(ax), ends(mine))
    start = metric_of(metric).start
    assert np.allclose(sorted(b.get_y() + b.get_height() for b in ax.patches), sorted(mine['value']))
    assert all(b.get_y() == start for b in ax.patches)
    assert metric_label(metric) == ax.get_ylabel() and ax.get_xlabel() == 'strong student opt-1.3b, weak supervisor opt-125m'
    assert len(ax.get_xticklabels()) == len(ax.patches) == len(mine) == (6 if metric in ('accuracy', 'margin') else 7)
    assert ('chance' in texts(ax)) == ('accuracy' in metric)


def test_roles_are_in_order_and_have_their_colour():
    ax = plot_roles(interval_table(experiment()), 'likelihood_accuracy')
    labels = [t.get_text() for t in ax.get_xticklabels()]
    assert list(dict.fromkeys(text.split('\n')[0] for text in labels)) == [r for r in ROLES if r != 'mixed'] # the example has none
    assert [text.split('\n')[1] for text in labels[:3]] == ['untuned', 'sft human', 'sft weak']
    found = {t.split('\n')[0]: to_hex(b.get_facecolor()) for t, b in zip(labels, sorted(ax.patches, key=lambda b: b.get_x()), strict=True)}
    assert found == {role: color.lower() for role, color in ROLE_COLORS.items() if role != 'mixed'}


@pytest.mark.parametrize('floor_strong', [None, ''])
def test_roles_with_several_students(floor_strong):
    items = pd.concat([experiment(s, seed=i, floor_strong=floor_strong) for i, s in enumerate(['m/opt-13b', 'm/opt-350m', 'm/opt-1.3b'])])
    items = items.drop_duplicates(['role', 'method', 'strong', 'seed', 'id', 'metric'])
    t = interval_table(items)
    ax = plot_roles(t)
    alone = [] if floor_strong is None else ['opt-125m']
    assert [x.get_text() for x in ax.get_xticklabels()] == alone + ['opt-350m', 'opt-1.3b', 'opt-13b']
    assert np.allclose(segments(ax), ends(t[t['metric'] == 'accuracy']))
    assert [x.get_text() for x in ax.get_legend().get_texts()] == [
        'baseline: sft human',
        'baseline: sft weak',
        'floor: dpo human',
        'student: dpo weak',
        'human: dpo human',
        'ceiling: dpo human both halves',
    ]
    boxes = sorted((b.get_x(), b.get_x() + b.get_width()) for b in ax.patches)
    assert all(right <= left + 1e-9 for (_, right), (left, _) in zip(boxes[:-1], boxes[1:], strict=True))


def test_roles_with_several_supervisors():
    t = interval_table(pd.concat([experiment(weak=w, seed=i) for i, w in enumerate(['w/pythia-160m', 'w/opt-125m'])]))
    ax = plot_roles(t)
    assert [x.get_text() for x in ax.get_xticklabels()] == ['opt-125m', 'pythia-160m']
    assert ax.get_xlabel() == 'strong student opt-1.3b, weak supervisor'


def test_caption_of_a_figure_names_examples_and_seeds():
    t = interval_table(experiment(seeds=1))
    assert any('n = 60 test examples, 1 seed' in ' '.join(x.split()) for x in texts(plot_roles(t)))


def test_all_interval_ends_of_shares_can_be_seen_or_lie_outside_what_a_share_can_be():
    t = interval_table(experiment(rows=12))
    low, high = plot_roles(t).get_ylim()
    mine = t[t['metric'] == 'accuracy']
    assert (mine['low'].clip(lower=0) >= low).all() and (mine['high'].clip(upper=1) <= high).all()
    assert low <= .5 <= high


def test_draws_where_it_is_told():
    fig, (left, right) = plt.subplots(1, 2)
    t = interval_table(experiment())
    assert plot_roles(t, ax=left) is left and plot_seeds(summarise(experiment()), t, ax=right) is right
    assert plt.get_fignums() == [fig.number]


def test_two_tasks_or_no_intervals_are_refused():
    items = pd.concat([experiment(), experiment(task='tldr')])
    with pytest.raises(DataError, match=r'2 tasks \(hh, tldr\)'): plot_roles(interval_table(items))
    with pytest.raises(DataError, match='needs the column low, high'): plot_roles(summarise(experiment()))
    with pytest.raises(DataError, match='did you mean "margin"'): plot_roles(interval_table(experiment()), 'margins')
    with pytest.raises(DataError, match='did you mean "accuracy"'): plot_seeds(summarise(experiment()), metric='acuracy')


def test_seeds_draws_each_seed_and_the_intervals():
    items = experiment(seeds=4)
    tidy, t = summarise(items), interval_table(items)
    ax = plot_seeds(tidy, t)
    assert np.allclose(segments(ax), ends(t[t['metric'] == 'accuracy']))
    dots = [line for line in ax.lines if line.get_color() == '0.55']
    assert len(dots) == 4
    want = tidy[tidy['metric'] == 'accuracy']['value']
    assert np.allclose(sorted(np.concatenate([d.get_ydata() for d in dots])), sorted(want))
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ['one seed', 'mean and CI']
    assert len(ax.get_xticks()) == 6 and ax.get_xlabel() and ax.get_ylabel()
    assert [x.get_text() for x in plot_seeds(tidy).get_legend().get_texts()] == ['one seed']


def test_differences_are_filled_where_they_are_clear():
    items = experiment(rows=300, seeds=1)
    who = {r: (r, m) for r, m in MODELS}
    d = difference_table(items, 'accuracy', [(who['ceiling'], who['baseline']), (who['student'], who['student'])])
    ax = plot_differences(d)
    assert np.allclose(segments(ax, axis=0), ends(d))
    filled = [to_hex(line.get_markerfacecolor()) != '#ffffff' for line in ax.lines if line.get_marker() == 'o']
    assert filled == d['significant'].tolist() == [True, False]
    assert ax.get_xlabel() == 'difference in accuracy'
    assert [t.get_text() for t in ax.get_yticklabels()][1] == 'student (dpo weak)\n− student (dpo weak)'


@pytest.mark.parametrize('weak, strong, name', [
    (['pico', 'nano'], ['base']*2, 'student xent\n− floor ground truth (nano)'),
    (['pico', 'pico'], ['base', 'micro'], 'student xent\n− floor ground truth (micro)'),
    (['pico', 'nano'], ['micro', 'base'], 'student xent\n− floor ground truth (nano → base)'),
    (['pico', 'pico'], ['base', 'base'], 'student xent\n− floor ground truth'),
])
def test_differences_name_the_models_that_differ(weak, strong, name):
    d = pd.DataFrame(dict(a='student xent', b=['floor ground truth', 'floor ground truth'], metric='accuracy', value=.1, low=0., high=.2,
                          n=100, seeds=3, level=.95, significant=True, weak=weak, strong=strong))
    with_models = [t.get_text() for t in plot_differences(d.assign(b=['human xent', 'floor ground truth'])).get_yticklabels()]
    assert with_models[1] == name
    assert [t.get_text() for t in plot_differences(d).get_yticklabels()][1] == name.replace('\n− floor ground truth', '')


def test_a_model_without_a_model_has_a_name_on_the_axis():
    "A bag of words belongs to no supervisor and to no student"
    t = interval_table(pd.concat([experiment(strong=s) for s in ('m/opt-350m', 'm/opt-1.3b')]).drop_duplicates(
        ['role', 'method', 'weak', 'strong', 'seed', 'id', 'metric']))
    bag = t[t.role == 'floor'].head(1).assign(role='baseline', method='bag of words', weak='', strong='', metric='accuracy')
    labels = [x.get_text() for x in plot_roles(pd.concat([t, bag], ignore_index=True)).get_xticklabels()]
    assert all(labels) and 'no model' in labels


def test_training_has_a_line_a_seed_and_a_name_a_stage():
    h = pd.concat([pd.DataFrame({'step': range(30), 'loss': np.linspace(1, .5, 30) + s/10, 'stage': stage, 'seed': s})
                   for stage in ('floor: dpo human', 'student: dpo weak', 'other') for s in (0, 1)])
    ax = plot_training(h, start=np.log(2))
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ['floor: dpo human', 'student: dpo weak', 'other', 'start: 0.693']
    colors = {x.get_text(): line.get_color() for x, line in zip(ax.get_legend().get_texts(), ax.get_legend().get_lines(), strict=True)}
    assert colors['floor: dpo human'] == ROLE_COLORS['floor'] and colors['student: dpo weak'] == ROLE_COLORS['student']
    assert len(ax.lines) == 3*2*2 + 1 and ax.get_xlabel() == 'optimizer step' and ax.get_ylabel() == 'loss (nats)'
    plain = plot_training(h[['step', 'loss']].iloc[:30], smooth=1)
    assert np.allclose(plain.lines[0].get_ydata(), h['loss'].iloc[:30]) and len(plain.lines) == 1
    with pytest.raises(DataError, match='column margin'): plot_training(h, 'margin')
    with pytest.raises(DataError, match='at least one row'): plot_training(h.iloc[:0])


def test_names_groups_and_sizes():
    assert model_name('/a/b/opt-125m/') == 'opt-125m'
    assert model_size('Qwen2.5-0.5B-Instruct') == 5e8 and model_size('stories260K') == 2.6e5 and model_size('babyllama105') == float('inf')
    t = pd.DataFrame({'weak': ['a/w', 'a/v'], 'strong': ['s', 't']})
    assert list(group_names(t)) == ['w → s', 'v → t']
    assert len(set(model_colors(interval_table(experiment())).values())) == 7


@pytest.mark.parametrize('ending', ['png', 'pdf', 'svg'])
def test_files_are_written_and_figures_closed(tmp_path, ending):
    path = save_figure(plot_roles(interval_table(experiment())), tmp_path / 'new' / f'roles.{ending}')
    assert path.stat().st_size > 5000 and not plt.get_fignums()


# What a reviewer of a figure looks at


def labels_table(n=8, metrics=('accuracy', 'balanced_accuracy', 'auroc'), value=.8):
    "A wide comparison: floor, n students, ceiling"
    students = [('student', f'method {i}', 'pico', 'base') for i in range(n)]
    arms = [('floor', 'ground truth', 'pico', ''), *students, ('ceiling', 'ground truth', '', 'base')]
    same = dict(task='t', value=value, low=value - .1, high=value + .1, n=90, seeds=5, level=.95)
    return pd.DataFrame([same | dict(role=r, method=m, weak=w, strong=s, metric=metric) for r, m, w, s in arms for metric in metrics])


def sweep(values): return pd.concat([labels_table(1, ('accuracy',)).assign(setting='loss', at=v) for v in values])


def boxes(texts):
    texts = [t for t in texts if t.get_visible() and t.get_text()]
    if texts: texts[0].get_figure(root=True).draw_without_rendering()
    return [t.get_window_extent().padded(-.5) for t in texts]


def overlap(texts):
    found = boxes(texts)
    return any(a.overlaps(b) for i, a in enumerate(found) for b in found[:i])


def names_overlap(labels):
    "Like overlap; slanted names are as far apart as their lines are"
    labels = [t for t in labels if t.get_text()]
    if not labels or labels[0].get_rotation() in (0, 90): return overlap(labels)
    found = boxes(labels)
    apart = np.diff([b.x1 for b in found]) * np.sin(np.radians(labels[0].get_rotation()))
    return apart.min() < labels[0].get_fontsize()/72*labels[0].get_figure(root=True).dpi


def distance(a, b): return np.linalg.norm(np.array(to_rgb(a)) - to_rgb(b))


WIDE = {
    'methods': lambda: plot_methods(labels_table(), ('accuracy', 'balanced_accuracy', 'auroc')),
    'many methods': lambda: plot_methods(labels_table(14), ('accuracy', 'auroc')),
    'roles': lambda: plot_roles(labels_table(12)),
    'a sweep': lambda: plot_varied(sweep([f'loss {i}' for i in range(10)]), 'accuracy'),
}


@pytest.mark.parametrize('what', WIDE)
def test_values_and_names_of_many_bars_do_not_overlap(what):
    ax = WIDE[what]()
    values = [t for t in ax.texts if t.get_text() == '0.800']
    assert len(values) >= 10 and not overlap(values) and not names_overlap(ax.get_xticklabels())
    inside = ax.get_window_extent()
    assert all(b.y0 >= inside.y0 for b in boxes(values))
    assert ax.get_figure().get_size_inches()[0] <= WIDEST # on a page of 690 px its letters stay readable


@pytest.mark.parametrize('value', [.02, .3, .5, .98])
def test_values_stay_clear_of_the_names_below_and_a_bar_at_chance_shows(value):
    ax = plot_roles(labels_table(2, ('accuracy',), value))
    values = [t for t in ax.texts if t.get_text() == f'{value:.3f}']
    assert len(values) == 4 and not overlap([*values, *ax.get_xticklabels()])
    assert all(b.y0 >= ax.get_window_extent().y0 for b in boxes(values))
    dots = [line for line in ax.lines if line.get_marker() == 'o']
    assert {to_hex(d.get_markerfacecolor()) for d in dots} == {to_hex(p.get_facecolor()) for p in ax.patches} # seen without a bar, too


def test_no_colour_but_that_of_a_role_means_a_role():
    others = {*COLORS, *(c for c, _ in SPARE), *(c for c, _ in OUTCOMES.values()), *(c for _, c in MARKS), *CHOICE_COLORS.values(),
              *(c for m, (c, _) in MEASURES.items() if m != 'accuracy'), *(c for m, (c, _) in METHOD_LOOKS.items() if m != 'in-context')}
    near = [(a, b) for a in others for b in ROLE_COLORS.values() if distance(a, b) < .15]
    assert not near


BINS = pd.DataFrame(dict(prob=[.6, .9], accuracy=[.6, .8], low=[.5, .7], high=[.7, .9], n=[40, 50], coverage=[.5, 1.]))
NAMED = {'supervisor': 'floor', 'naive student': 'student', 'ceiling': 'ceiling', 'human labels': 'human'}


@pytest.mark.parametrize('plot', [plot_reliability, plot_coverage])
def test_series_that_name_a_role_have_its_colour(plot):
    ax = plot(pd.concat([BINS.assign(name=n) for n in NAMED]))
    drawn = {c.get_label(): c[0] for c in ax.containers} | {line.get_label(): line for line in ax.lines}
    assert {n: drawn[n].get_color() for n in NAMED} == {n: ROLE_COLORS[r].lower() for n, r in NAMED.items()}


@pytest.mark.parametrize(('name', 'role'), [
    ('student: dpo weak', 'student'), ('Weak supervisor', 'floor'), ('untuned', 'baseline'), ('by human labels', 'human'), ('pico', ''),
    ('students and ceiling', 'ceiling'), ('student minus ceiling', ''), ('floor: student', 'floor'),
])
def test_role_of_a_name(name, role): assert named_role(name) == role


def test_shares_of_win_tie_and_lose_are_not_hidden_by_the_rates():
    wins = pd.DataFrame(dict(name=list('abcd'), win=[41, 50, 40, 55], tie=[16, 16, 19, 15], lose=[43, 34, 41, 30], low=[.4, .5, .4, .5],
                             high=[.6, .7, .6, .7], equal=[.5, .57, .5, .62], longer=[.42, .42, .45, .45]))
    ax = plot_outcomes(wins, {'equal': 'at equal length', 'longer': 'longer'})
    numbers = boxes([t for t in ax.texts if t.get_text().isdigit()])
    at = [ax.transData.transform(xy) for line in ax.lines if line.get_linestyle() in ('None', '') for xy in line.get_xydata()]
    assert len(numbers) == 12 and len(at) >= 12
    assert not any(b.padded(4).contains(*xy) for b in numbers for xy in at)
    assert 'Error bars: 95 % CI' in texts(ax)[-1]
    more = plot_outcomes(wins.assign(n=200, seeds=5, level=.9), {'equal': 'at equal length'})
    assert 'Error bars: 90 % CI, n = 200 prompts, 5 seeds.' in texts(more)


def test_students_without_a_pgr_are_marked_clear_of_error_bars():
    row = dict(strong='sim-4m', method='xent', metric='accuracy', n=90, seeds=5, level=.95)
    table = pd.DataFrame([row | dict(weak='sim-1m', value=.4, low=-3., high=1.2, refused=''),
                          row | dict(weak='sim-2m', value=np.nan, low=np.nan, high=np.nan, refused='no gap'),
                          row | dict(weak='sim-1m', strong='sim-16m', value=.5, low=.2, high=.8, refused='')])
    ax = plot_pgr(table)
    word, = (t for t in ax.texts if t.get_text() == 'no PGR')
    box, = boxes([word])
    cover = max(ax.patches, key=lambda p: p.get_zorder())
    drawn = [c for c in ax.collections if isinstance(c, matplotlib.collections.LineCollection)]
    assert cover.get_window_extent().y1 > box.y1 and all(c.get_zorder() < cover.get_zorder() < word.get_zorder() for c in drawn)
    assert 'continue beyond it' in texts(ax)[-1] and ax.get_ylabel() == 'PGR (accuracy)'


@pytest.mark.parametrize('sizes', [
    {'pico': 275e3, 'nano': 320e3, 'micro': 705e3, 'base': 3.97e6},
    {'a-long-name-of-350m': 350e6, 'another-long-name': 400e6, 'third': 13e9},
    {'one': 1e6}, {'x': 1e6, 'y': 1.05e6, 'z': 1.1e6},
])
def test_names_of_models_of_nearly_one_size_do_not_overlap(sizes):
    ax = plt.subplots(figsize=(6.2, 4), layout='constrained')[1]
    set_size_axis(ax, {v: k for k, v in sizes.items()}, 'parameters')
    assert not overlap(ax.get_xticklabels())


LEGENDS = {
    'training': lambda: plot_training(pd.DataFrame(dict(step=range(20), loss=np.linspace(1, 0, 20)))),
    'seeds': lambda: plot_seeds(summarise(experiment(seeds=2)), interval_table(experiment(seeds=2))),
    'reliability': lambda: plot_reliability(BINS),
    'coverage': lambda: plot_coverage(BINS),
    'margins': lambda: plot_margins([.1, .5, 2.], [True, False, True]),
    'similarity': lambda: plot_similarity([0., 1., 2., 3.], [0., 1., 1., 2.]),
    'outcomes': lambda: plot_outcomes(pd.DataFrame(dict(name=['a'], win=[1], tie=[1], lose=[1]))),
}


@pytest.mark.parametrize('what', LEGENDS)
def test_no_legend_lies_on_the_data(what):
    ax = LEGENDS[what]()
    ax.get_figure().draw_without_rendering()
    assert not ax.get_legend().get_window_extent().padded(-2).overlaps(ax.get_window_extent())


def test_models_with_equal_scores_stand_apart():
    t = labels_table(8, ('accuracy', 'persona'), 1.).assign(low=.9, high=1.)
    axes = plot_scores(t, ('accuracy', 'persona'))
    axes[0].get_figure().draw_without_rendering()
    for ax in axes:
        at = np.array([ax.transData.transform(c[0].get_xydata()[0]) for c in ax.containers])
        gaps = np.linalg.norm(at[:, None] - at, axis=2)[np.triu_indices(len(at), 1)]
        assert len(at) == 10 and gaps.min() > 8
    assert not overlap(axes[0].get_yticklabels())


def test_one_legend_for_several_panels():
    fig, axes = plt.subplots(1, 2, layout='constrained')
    row = dict(method='xent', metric='accuracy', value=.5, low=.4, high=.6, refused='', n=9, seeds=2, level=.95)
    pgr = pd.DataFrame([row | dict(weak=w, strong=s) for w in ('sim-1m', 'sim-2m') for s in ('sim-4m', 'sim-8m')])
    for ax in axes: plot_pgr(pgr, ax=ax)
    share_legend(axes)
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ['supervisor sim-1m', 'supervisor sim-2m', 'xent']
    assert all(ax.get_legend() is None for ax in axes)


def test_captions_of_neighbouring_panels_do_not_meet():
    axes = plt.subplots(1, 3, figsize=(9, 3), layout='constrained')[1]
    for ax in axes: plot_varied(sweep('ab'), 'accuracy', ax=ax)
    assert not overlap([t for ax in axes for t in ax.texts if t.get_text().startswith('Error')])


def test_differences_from_one_model_name_it_once_and_show_what_could_not_be_found():
    same = dict(b='xent', metric='accuracy', n=90, seeds=5, level=.95)
    rows = [same | dict(a=a, value=v, low=v - .05, high=v + .05, significant=v > .05, detectable=d)
            for a, v, d in (('hard', .01, .06), ('product', .1, .08), ('filter', .0, np.nan))]
    ax = plot_differences(pd.DataFrame(rows))
    assert [t.get_text() for t in ax.get_yticklabels()] == ['hard', 'product', 'filter']
    assert ax.get_xlabel() == 'accuracy, minus that of xent'
    assert sorted(p.get_width() for p in ax.patches) == pytest.approx([.12, .16])
    assert 'minimum detectable effect' in ' '.join(texts(ax)[-1].split())
    assert 'minimum' not in texts(plot_differences(pd.DataFrame(rows).drop(columns='detectable')))[-1]


# Words

ODD = ('upright', '95% interval', '% intervals over', 'as good as its word', 'surest', 'middle half', 'fullest', 'un-tuned', ' less naive',
       'told apart', 'luck of', 'share of labels that are right', 'words were counted', 'kept back')
ROOT = Path(__file__).parents[1]


def constants(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]


@pytest.mark.parametrize('folder', ['plots', 'report'])
def test_strings_are_in_the_words_of_the_field(folder):
    found = [f'{p.name}: {word} in "{text[:60]}"' for p in sorted((ROOT/'w2s'/folder).glob('*.py')) for text in constants(p) for word in ODD
             if word in text.lower()]
    assert not found


def cells(page): return [''.join(c['source']) for c in json.loads(page.read_text())['cells'] if c['cell_type'] == 'code']


def test_captions_of_pages_name_error_bars_in_one_way():
    pages = [p for folder in ('plots', 'report') for p in sorted((ROOT/'nbs'/'api'/folder).glob('*.ipynb'))]
    lines = [(p.name, line) for p in pages for text in cells(p) for line in text.splitlines() if line.startswith('#| fig-cap')]
    assert not [(name, line) for name, line in lines if re.search(r'95 ?% (normal )?intervals?', line)]


@pytest.mark.parametrize(('n', 'seeds', 'text'), [
    ([60], [1], 'n = 60 test examples, 1 seed (variation between seeds not included).'),
    ([1200], [2], 'n = 1,200 test examples, 2 seeds (too few to estimate the variation between seeds).'),
    ([60, 80], [3, 5], 'n = 60 to 80 test examples, 3 to 5 seeds.'),
])
def test_caption_names_level_n_unit_and_seeds(n, seeds, text):
    table = pd.DataFrame(dict(n=n, seeds=seeds*(len(n)//len(seeds)), level=.95))
    assert caption(table) == f'Error bars: 95 % CI, {text}'
    assert caption(table.assign(level=.9), 'prompts').startswith('Error bars: 90 % CI') and 'prompts' in caption(table, 'prompts')


# The gallery

def public_plots():
    "Module and name of every public plotting function"
    out = set()
    for path in sorted((ROOT/'w2s'/'plots').glob('*.py')):
        listed = next((n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Assign) and n.targets[0].id == '__all__'), None)
        out |= {(path.stem, name) for name in (ast.literal_eval(listed.value) if listed else ()) if name.startswith('plot_')}
    return out


def shown_plots(page):
    "Module and name of every plotting function that a page imports, and then calls in a cell with a picture"
    out, modules = set(), {} # modules: name on the page -> module and name in the package, as imported last
    for cell in json.loads(page.read_text())['cells']:
        if cell['cell_type'] != 'code': continue
        nodes = list(ast.walk(ast.parse(''.join(cell['source']))))
        modules |= {(a.asname or a.name): (n.module.rpartition('.')[2], a.name)
                    for n in nodes if isinstance(n, ast.ImportFrom) and n.module.startswith('w2s.plots.') for a in n.names}
        if not any('image/png' in o.get('data', {}) for o in cell['outputs']): continue
        called = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        out |= {modules[name] for name in called & modules.keys()}
    return out


def test_every_public_plot_is_in_the_gallery():
    pages = sorted((ROOT/'nbs'/'explanations').glob('7*_figures*.ipynb'))
    shown = set().union(*map(shown_plots, pages))
    assert len(pages) == 2 and len(public_plots()) > 25 and not public_plots() - shown


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize(('width', 'letters'), [(6., 14), (6., 24), (5.2, 20), (4.6, 16), (4.6, 40)])
def test_a_legend_of_several_columns_does_not_squeeze_the_axes(width, letters):
    figure, ax = plt.subplots(figsize=(width, 3), layout='constrained')
    ax.set_yticks([0, 1], ['a name of a tick', 'another'])
    for i in range(3): ax.plot([0, 1], [i, i], label=f'{i} ' + 'x'*letters)
    figure.draw_without_rendering()
    before = ax.get_window_extent().width
    legend_above(ax)
    figure.draw_without_rendering()
    assert ax.get_window_extent().width > .93*before or ax.get_legend()._ncols == 1


@pytest.mark.parametrize('low', [.2, .41, .5, .7])
def test_counts_of_bins_lie_below_all_error_bars(low):
    ax = plot_reliability(BINS.assign(low=low, accuracy=.75, high=.9))
    counts = boxes([t for t in ax.texts if t.get_text() in ('40', '50')])
    assert len(counts) == 2 and all(b.y1 < ax.transData.transform((0, low))[1] for b in counts)


def test_one_caption_below_several_panels_is_in_the_middle_of_the_figure():
    axes = plot_scores(labels_table(3, ('accuracy', 'persona')), ('accuracy', 'persona'))
    figure = axes[0].get_figure()
    assert figure.get_supxlabel().startswith('Error bars: 95 % CI') and not any('Error' in t for ax in axes for t in texts(ax))
    figure.draw_without_rendering()
    box = figure._supxlabel.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and abs((box.x0 + box.x1)/2 - figure.bbox.width/2) < 2
    given = plot_scores(labels_table(3, ('accuracy', 'persona')), ('accuracy', 'persona'), axes=plt.subplots(1, 2)[1])
    assert any('Error bars' in t for t in texts(given[0]))


def test_curves_say_what_is_thin_and_how_many_seeds():
    h = pd.concat([pd.DataFrame(dict(step=range(30), loss=np.linspace(1, .5, 30), seed=s)) for s in (0, 1)])
    assert texts(plot_training(h))[-1] == 'Thin: each step; thick: running mean of 10 steps. 2 seeds.'
    assert texts(plot_training(h[h.seed == 0], smooth=1))[-1] == '1 seed.'


def test_names_of_levels_that_are_near_each_other_do_not_meet():
    row = dict(weak='pico', strong='base', metric='accuracy', seeds=5, level=.95, n=200)
    costs = pd.DataFrame([row | dict(choice='', share=s, cost=10 + 100*s, value=.7 + .1*s, low=.65, high=.85) for s in (0., 1.)])
    ax = plot_costs(costs, 'accuracy', dict(floor=.640, ceiling=.645), 'pgr=80%')
    names = [t for t in ax.texts if t.get_text() in ('floor', 'ceiling') or '80' in t.get_text()]
    assert len(names) == 3 and not overlap(names)


def test_legends_of_curves_side_by_side_do_not_meet():
    row = dict(weak='pico', strong='base', method='xent', seed=0)
    curves = pd.DataFrame([row | dict(step=i, share=i/4, measure=m, value=.5 + .1*i) for i in range(5)
                           for m in ('accuracy', 'agreement_right', 'agreement_wrong')])
    axes = plt.subplots(1, 2, figsize=(8.5, 3.4), layout='constrained')[1]
    for ax in axes: plot_curves(curves, floor=.6, ax=ax)
    axes[0].get_figure().draw_without_rendering()
    left, right = (ax.get_legend().get_window_extent() for ax in axes)
    assert left.x1 <= right.x0
