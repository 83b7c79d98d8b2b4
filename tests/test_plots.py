"Plots: what is drawn is what the tables say"
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from w2s.errors import DataError
from w2s.evaluate.intervals import difference_table, interval_table
from w2s.evaluate.metrics import ROLES, metric_rows, preference_scores, summarise
from w2s.plots.metrics import metric_label, metric_of
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


def test_caption_tells_rows_and_seeds():
    t = interval_table(experiment(seeds=1))
    assert any('over 60 test rows; one seed, so the luck of training is not in them' in x for x in texts(plot_roles(t)))
    assert caption(interval_table(experiment(seeds=5))) == 'Lines: 95% intervals over 60 test rows and 5 seeds.'
    assert '2 seeds (few: the less they agree, the wider)' in caption(interval_table(experiment(seeds=2)))
    assert '60 to 80 test rows and 2 to 3 seeds' in caption(pd.DataFrame({'n': [60, 80], 'seeds': [2, 3], 'level': [.9, .9]}))


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
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ['one seed', 'mean, interval']
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


def test_training_has_a_line_a_seed_and_a_name_a_stage():
    h = pd.concat([pd.DataFrame({'step': range(30), 'loss': np.linspace(1, .5, 30) + s/10, 'stage': stage, 'seed': s})
                   for stage in ('floor: dpo human', 'student: dpo weak', 'other') for s in (0, 1)])
    ax = plot_training(h, start=np.log(2))
    assert [x.get_text() for x in ax.get_legend().get_texts()] == ['floor: dpo human', 'student: dpo weak', 'other', 'start: 0.693']
    colors = {x.get_text(): line.get_color() for x, line in zip(ax.get_legend().get_texts(), ax.get_legend().get_lines(), strict=True)}
    assert colors['floor: dpo human'] == ROLE_COLORS['floor'] and colors['student: dpo weak'] == ROLE_COLORS['student']
    assert len(ax.lines) == 3*2*2 + 1 and ax.get_xlabel() == 'optimiser step' and ax.get_ylabel() == 'loss (nats)'
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
