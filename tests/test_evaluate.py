"Metrics and intervals: what is too long or too edgy for their pages"
import numpy as np
import pandas as pd
import pytest

from w2s.errors import DataError
from w2s.evaluate.bootstrap import crossed_bootstrap
from w2s.evaluate.clusters import by_group, clustered
from w2s.evaluate.intervals import (
    Estimate,
    difference,
    difference_table,
    estimate,
    interval,
    interval_limits,
    interval_table,
    mean_squares,
    p_value,
    score_matrix,
    t_factor,
    two_errors,
)
from w2s.evaluate.metrics import (
    ITEM_COLUMNS,
    ROLES,
    TIDY_COLUMNS,
    agreement,
    by_role,
    check_items,
    finite,
    item_rows,
    metric_rows,
    preference_correct,
    preference_scores,
    summarise,
)

STUDENT, FLOOR = ('student', 'dpo weak'), ('floor', 'dpo human')


def study(models=2, seeds=1, rows=300, seed_sd=.2, seed=0, lead=0.):
    "Right or wrong for each model, seed and row; all models are equally good but the first, which leads"
    r = np.random.default_rng(seed)
    hard, luck = r.normal(size=rows), r.normal(scale=seed_sd, size=(models, seeds, 1))
    own = .5*r.normal(size=(models, 1, rows)) + .5*r.normal(size=(models, seeds, rows))
    bonus = np.where(np.arange(models) == 0, lead, 0)[:, None, None]
    return (.3 + bonus + luck + hard + own > 0).astype(float)


def table(x, who=(STUDENT, FLOOR), ids=None, metric='accuracy', strong='opt-1.3b', task='hh'):
    "Items from scores of shape (models, seeds, rows)"
    ids = [f'q{i:04}' for i in range(x.shape[2])] if ids is None else ids
    return pd.concat([item_rows(ids, v, metric, *w, 'opt-125m', strong, s, task)
                      for w, m in zip(who, x, strict=True) for s, v in enumerate(m)], ignore_index=True)


# ---- metrics

def test_ties_earn_half():
    assert preference_correct([3., 0., -0., -2.]).tolist() == [1, .5, .5, 0]
    assert preference_correct(np.zeros(7)).mean() == .5
    assert preference_scores(np.full(4, -9.), np.full(4, -9.), np.zeros(4))['accuracy'].mean() == .5
    assert preference_scores(np.full(4, -9.), np.full(4, -9.))['likelihood_accuracy'].mean() == .5
    assert agreement([.5, .5, .9], [.9, .5, .5]).tolist() == [.5, .5, .5]


def test_tiny_margins_are_no_ties():
    assert preference_correct([5e-324, -5e-324]).tolist() == [1, 0]
    assert preference_correct(np.float32([1e-30, -1e-30])).tolist() == [1, 0]


def test_accuracy_and_its_mirror_add_up_to_one():
    m = np.round(np.random.default_rng(0).normal(size=999), 1)
    assert (m == 0).any()
    assert preference_correct(m).mean() + preference_correct(-m).mean() == pytest.approx(1, abs=1e-12)


def test_agreement_does_not_depend_on_which_response_is_a():
    p, q = np.random.default_rng(0).random((2, 200)).round(1)
    assert (agreement(p, q) == agreement(1 - p, 1 - q)).all()
    assert (agreement(p, q) == agreement(q, p)).all()


@pytest.mark.parametrize('bad', [[np.nan], [np.inf, 1], [], [[1., 2.]], 3.])
def test_values_that_are_no_scores_are_refused(bad):
    with pytest.raises(DataError): finite(bad, 'margin')
    with pytest.raises(DataError): preference_correct(bad)


def test_no_reference_no_rows():
    names = set(preference_scores([-1.], [-2.]))
    assert 'accuracy' not in names and 'margin' not in names


def test_scores_of_other_lengths_are_refused():
    with pytest.raises(DataError, match='2 log-probs of chosen against 1'): preference_scores([-1., -2.], [-1.])
    with pytest.raises(DataError, match='1 margins against 2'): preference_scores([-1., -2.], [-1., -3.], [.1])
    with pytest.raises(DataError, match='3 scores for 2 rows'): item_rows(['a', 'b'], [1., 0., 1.], 'accuracy', *STUDENT, 'w', 's', 0, 't')


def test_columns_are_those_of_the_design():
    items = metric_rows(['a', 'b'], preference_scores([-1., -2.], [-2., -1.], [.1, -.1]), *STUDENT, 'w', 's', 0, 't')
    assert list(items.columns) == ITEM_COLUMNS == ['task', 'role', 'method', 'weak', 'strong', 'seed', 'id', 'metric', 'value']
    assert list(summarise(items).columns) == TIDY_COLUMNS == ['task', 'role', 'method', 'weak', 'strong', 'seed', 'metric', 'value', 'n']
    assert summarise(items).set_index('metric').loc['accuracy', ['value', 'n']].tolist() == [.5, 2]


@pytest.mark.parametrize('column', [c for c in ITEM_COLUMNS if c != 'value'])
def test_a_hole_is_refused_in_every_column(column):
    items = table(study(rows=5))
    holed = items.astype({column: object})
    holed.loc[3, column] = None
    with pytest.raises(DataError, match=f'empty cells in column {column}'): check_items(holed)
    with pytest.raises(DataError, match=f'no column {column}'): check_items(items.drop(columns=column))


def test_a_missing_score_and_a_row_scored_twice_are_refused():
    items = table(study(rows=5))
    with pytest.raises(DataError, match='1 of 10 values are not finite'):
        summarise(items.assign(value=items['value'].mask(items.index == 4)))
    with pytest.raises(DataError, match='1 rows are scored twice, the first is id q0002 of student'):
        interval_table(pd.concat([items, items.iloc[2:3]]))
    with pytest.raises(DataError, match='did you mean "floor"'): summarise(items.replace({'role': {'floor': 'flor'}}))


def test_models_without_a_name_stay_in_the_table():
    items = table(study(rows=5), strong='')
    assert len(summarise(items)) == len(interval_table(items)) == 2


def test_summarise_is_the_same_to_the_bit_in_any_order():
    r = np.random.default_rng(0)
    items = table(r.normal(size=(2, 3, 501)) * 10.**r.integers(-8, 8, size=(2, 3, 501)), metric='margin')
    first = summarise(items)
    for i in range(5):
        again = summarise(items.sample(frac=1, random_state=i))
        pd.testing.assert_frame_equal(first, again, check_exact=True)


def test_order_of_roles_and_methods():
    who = [('ceiling', 'dpo gold'), ('human', 'dpo human'), ('baseline', 'untuned'),
           ('student', 'dpo weak'), ('baseline', 'sft human'), ('floor', 'dpo human'),
           ('mixed', 'dpo weak, 10% human, random')]
    t = by_role(pd.DataFrame(who, columns=['role', 'method']))
    assert list(dict.fromkeys(t['role'])) == list(ROLES)
    assert list(t['method'])[:2] == ['untuned', 'sft human']


# ---- bootstrap

def test_bootstrap_is_seeded_and_does_not_depend_on_blocks_of_memory():
    x = study(seeds=3)
    assert (crossed_bootstrap(x, n=50, seed=1) == crossed_bootstrap(x, n=50, seed=1)).all()
    assert (crossed_bootstrap(x, n=50, seed=1) != crossed_bootstrap(x, n=50, seed=2)).any()
    assert crossed_bootstrap(x, n=7, block=3).shape == (7, 2)


def test_bootstrap_is_paired_over_rows_and_over_seeds():
    "Two models with the same scores have the same mean in every draw"
    x = study(models=1, seeds=4)
    m = crossed_bootstrap(np.concatenate([x, x]), n=300)
    assert np.allclose(m[:, 0], m[:, 1], atol=1e-12)
    assert m[:, 0].std() > .01


def test_bootstrap_spread_is_that_of_theory():
    "Rows only: s/sqrt(R). Seeds only (rows equal): s/sqrt(S)."
    r = np.random.default_rng(0)
    rows = r.normal(size=(1, 1, 400))
    assert crossed_bootstrap(rows, n=4000).std() == pytest.approx(rows.std() / 20, rel=.05)
    seeds = np.repeat(r.normal(size=(1, 12, 1)), 30, axis=2)
    assert crossed_bootstrap(seeds, n=4000).std() == pytest.approx(seeds.std() / 12**.5, rel=.05)


def test_shapes_that_are_no_grid_are_refused():
    for shape in ((3, 4), (0, 1, 2), (1, 2, 0)):
        with pytest.raises(DataError): crossed_bootstrap(np.zeros(shape))


# ---- coverage; the whole table is in benchmarks/coverage.md

def coverage(studies, level=.95, **kw):
    "Share of studies whose interval of the difference (truth: 0) holds it"
    low, high = interval_limits(np.stack([np.subtract(*study(seed=i, **kw)) for i in range(studies)]), level, (-1, 1), paired=True)
    return np.mean((low <= 0) & (0 <= high))


@pytest.mark.parametrize('rows', [60, 200])
def test_rows_alone_are_covered(rows):
    assert .93 <= coverage(1000, rows=rows, seed_sd=0.) <= .97


@pytest.mark.parametrize('seeds', [3, 5, 10])
@pytest.mark.parametrize('seed_sd', [0., .1, .3])
def test_seeds_are_covered(seeds, seed_sd):
    assert .93 <= coverage(1500, seeds=seeds, rows=150, seed_sd=seed_sd) <= .975


@pytest.mark.parametrize('seed_sd, least', [(0., .93), (.1, .92), (.3, .86)])
def test_two_seeds_are_covered_as_far_as_two_seeds_can_be(seed_sd, least):
    "One pair of seeds in four agrees by chance; the estimate says so in words"
    assert coverage(1000, seeds=2, rows=150, seed_sd=seed_sd) >= least
    assert 'too few to know' in str(estimate(study(seeds=2)[0]))


def test_the_plain_bootstrap_would_not_cover_two_seeds():
    "Why means do without it: the same studies are covered far less often"
    def plain(d): return np.percentile(crossed_bootstrap(d[None], n=400), [2.5, 97.5])
    ends = [plain(np.subtract(*study(seeds=2, rows=150, seed_sd=.3, seed=i))) for i in range(400)]
    assert np.mean([low <= 0 <= high for low, high in ends]) < .8


def test_mean_of_one_model_is_covered():
    "Not only differences: the truth of a single model is Phi(.3 / sd)"
    from scipy.stats import norm
    truth = norm.cdf(.3 / np.sqrt(1 + .25 + .25))
    found = [estimate(study(models=1, seed_sd=0., rows=150, seed=i)[0], bounds=(0, 1)) for i in range(1000)]
    assert .93 <= np.mean([e.low <= truth <= e.high for e in found]) <= .97


@pytest.mark.parametrize('rows, seeds', [(200, 1), (200, 3), (500, 1), (500, 5)])
@pytest.mark.parametrize('share', [.02, .98])
def test_means_near_the_ends_are_covered(rows, seeds, share):
    from scipy.stats import norm
    r = np.random.default_rng(rows + seeds)
    hard, own = r.normal(size=(1500, 1, rows)), r.normal(size=(1500, seeds, rows))
    low, high = interval_limits((norm.ppf(share)*2**.5 + hard + own > 0).astype(float), bounds=(0, 1))
    assert .93 <= np.mean((low <= share) & (share <= high)) <= .975
    assert low.min() >= 0 and high.max() <= 1 and (high > low).all()


def test_level_is_kept():
    assert .77 <= coverage(1000, .8, seed_sd=0., rows=150) <= .83
    with pytest.raises(DataError, match='level is 95'): estimate(study()[0], level=95)


# ---- errors over seeds and rows

def test_two_errors_are_those_of_the_textbook():
    "Mean squares of the two-way table, computed cell by cell"
    x = np.random.default_rng(0).normal(size=(4, 50)) + np.arange(4)[:, None]
    m, s, r = x.mean(), x.mean(1), x.mean(0)
    of_seeds, of_rows = 50*((s - m)**2).sum()/3, 4*((r - m)**2).sum()/49
    rest = sum((x[i, j] - s[i] - r[j] + m)**2 for i in range(4) for j in range(50))/(3*49)
    assert mean_squares(x) == pytest.approx((of_seeds, of_rows, rest))
    assert two_errors(x) == pytest.approx((((of_seeds - rest)/200)**.5, (max(of_rows, rest)/200)**.5))
    assert two_errors(x[:1])[0] == 0 and two_errors(x[:1])[1] == pytest.approx(x[0].std(ddof=1)/50**.5)


def test_the_residual_is_counted_once():
    "Noise of one seed on one row alone: the error of the mean is sigma/sqrt(SR), neither more nor less"
    x = np.random.default_rng(0).normal(size=(2000, 4, 50))
    of_seeds, of_rows = two_errors(x)
    assert np.mean(of_rows**2) == pytest.approx(1/200, rel=.15) and np.median(of_seeds) < .5*200**-.5
    assert np.mean(of_seeds**2 + of_rows**2) < 1.6/200


def test_t_factor_runs_from_the_rows_to_one_degree_of_freedom():
    from scipy.stats import t
    same = np.tile(np.arange(40.), (2, 1))
    assert t_factor(same) == pytest.approx(t.ppf(.975, 39))
    apart = np.array([[0.]*40, [1.]*40])
    assert t_factor(apart) == pytest.approx(12.7062, abs=1e-3)
    assert 2.1 < t_factor(same + apart*3) < 12.7


def test_half_widths_add_as_squares():
    "MOVER: (t of seeds × their error)² + (t of rows × theirs)²"
    from scipy.stats import t
    for i in range(10):
        d = np.random.default_rng(i).normal(size=(3, 40)) + np.random.default_rng(100 + i).normal(size=(3, 1))
        a, b = two_errors(d)
        e = estimate(d)
        assert (e.high - e.low)/2 == pytest.approx(np.hypot(t.ppf(.975, 2)*a, t.ppf(.975, 39)*b))
        assert e.value - e.low == pytest.approx(e.high - e.value)


def test_seeds_that_agree_change_nothing():
    x = study(models=1)[0]
    one, five = estimate(x, bounds=(0, 1)), estimate(np.repeat(x, 5, axis=0), bounds=(0, 1))
    assert (five.value, five.seeds, one.seeds) == (pytest.approx(one.value), 5, 1)
    assert five.low == pytest.approx(one.low, abs=.003) and five.high == pytest.approx(one.high, abs=.003)


def test_one_seed_is_said_and_display_is_markdown():
    assert '1 seed: noise of the test rows only' in str(estimate(study()[0]))
    assert 'only' not in str(estimate(study(seeds=2)[0]))
    assert Estimate(.5, .4, .6, 1200, 3)._repr_markdown_() == '**0.500** [0.400, 0.600] (95%, 1,200 rows, 3 seeds)'
    assert Estimate(.5, .4, .6, 1200, 2)._repr_markdown_().endswith('2 seeds: too few to know how much seeds differ)')


# ---- the ends of the scale

@pytest.mark.parametrize('right, n', [(0, 20), (1, 50), (25, 50), (49, 50), (200, 200)])
def test_one_seed_of_right_and_wrong_is_wilson_and_all_alike_clopper_and_pearson(right, n):
    from scipy.stats import binomtest
    e = estimate((np.arange(n) < right).astype(float)[None], bounds=(0, 1))
    want = binomtest(right, n).proportion_ci(method='wilson' if 0 < right < n else 'exact')
    assert (e.low, e.high) == pytest.approx((want.low, want.high), abs=1e-9)


def test_one_seed_of_wins_and_losses_is_tango():
    "His score statistic, as it is printed, searched for the ends"
    from scipy.optimize import brentq
    def score(d, z, up, down, n):
        a, b, c = 2*n, -up - down + (2*n - up + down)*d, -down*d*(1 - d)
        behind = (np.sqrt(b*b - 4*a*c) - b)/(2*a)
        return (up - down - n*d)/np.sqrt(n*(2*behind + d - d*d)) - z
    for up, down, n in ((9, 2, 44), (1, 0, 43), (10, 10, 60), (30, 1, 32)):
        x = np.repeat([1., -1., 0.], [up, down, n - up - down])[None]
        e = estimate(x, bounds=(-1, 1), paired=True)
        d = (up - down)/n
        assert e.low == pytest.approx(brentq(score, -1 + 1e-9, d - 1e-6, (1.959964, up, down, n)), abs=1e-5)
        assert e.high == pytest.approx(brentq(score, d + 1e-6, 1 - 1e-9, (-1.959964, up, down, n)), abs=1e-5)


@pytest.mark.parametrize(
    'bounds, paired', [((0, 1), False), ((-1, 1), True), ((0, 10), False), ((0, np.inf), False), ((-np.inf, 0), False)]
)
@pytest.mark.parametrize('seeds', [1, 2, 4])
def test_no_interval_leaves_the_range_and_none_is_without_width(bounds, paired, seeds):
    r = np.random.default_rng(seeds)
    low, high = (np.clip(b, -20, 20) for b in bounds)
    for i in range(60):
        share = r.choice([0., .02, .5, .98, 1.])
        x = (
            low + (high - low) * (r.random((seeds, 30)) < share)
            if i % 2
            else r.uniform(low, high, (seeds, 30)) * (share or 0.01)
            if low >= 0
            else r.choice([low, 0.0, high], (seeds, 30), p=[0.02, 0.96, 0.02])
        )
        e = estimate(x, bounds=bounds, paired=paired)
        if np.isnan(e.low): assert not np.ptp(x) and not np.isfinite(bounds).all() # all rows alike, and no scale: unknown
        else: assert bounds[0] <= e.low <= e.value <= e.high <= bounds[1] and e.low < e.high


def test_rows_that_are_all_alike_are_known_as_far_as_the_scale_is():
    assert estimate(np.ones((3, 50)), bounds=(0, 1)).low == pytest.approx(.025**(1/50))
    for x, bounds in ((np.full((3, 50), 1.6), (-np.inf, np.inf)), (np.full((2, 9), 3.), (0, np.inf)), (np.array([[.7]]), (0, 1))):
        assert np.isnan([estimate(x, bounds=bounds).low, estimate(x, bounds=bounds).high]).all() and 'no interval' in str(
            estimate(x, bounds=bounds)
        )


def test_a_mean_outside_of_its_range_is_refused():
    with pytest.raises(DataError, match='a mean of 7 lies outside of its range, 0 to 1'): estimate(np.full((1, 20), 7.), bounds=(0, 1))
    ratings = table(study()*9 + 1)
    with pytest.raises(DataError, match='outside of its range'): interval(ratings, *STUDENT, 'accuracy')
    assert interval(ratings, *STUDENT, 'accuracy', ranges={'accuracy': (0, 10)}).high < 10


def test_a_model_minus_itself_is_zero_and_twins_are_not():
    items = table(study(rows=100))
    twin = pd.concat([items, items[items['role'] == 'floor'].assign(role='human')])
    assert difference(items, FLOOR, FLOOR, 'accuracy') == Estimate(0., 0., 0., 100, 1)
    e = difference(twin, ('human', FLOOR[1]), FLOOR, 'accuracy')
    assert e.value == 0 and e.low < 0 < e.high == pytest.approx(1 - .025**.01)


# ---- groups

@pytest.mark.parametrize('sizes', [(1, 2), (3, 4), (1, 16)])
def test_groups_are_covered_whatever_their_sizes(sizes):
    "Rows of a group share their luck; groups of different sizes keep the mean of rows"
    r, held, by_row = np.random.default_rng(sizes[1]), [], []
    for _ in range(800):
        n = r.integers(*sizes, 50)
        p, groups = r.beta(1.4, .6, 50), np.repeat(np.arange(50), n).astype(str)
        x = (r.random(n.sum()) < np.repeat(p, n)).astype(float)
        e, flat = (estimate(y[None], bounds=(0, 1)) for y in (clustered({'a': x}, groups)[1]['a'], x))
        assert e.value == pytest.approx(x.mean()) and e.n == 50
        held.append(e.low <= .7 <= e.high); by_row.append(flat.low <= .7 <= flat.high)
    assert .92 <= np.mean(held) <= .975 and np.mean(held) >= np.mean(by_row) - .02


def test_items_by_group_keep_their_means_and_say_which_row_has_no_group():
    items = pd.concat([table(study(rows=60, seeds=2)), table(study(rows=60, seeds=2, seed=3), metric='margin')])
    groups = {i: f'g{int(i[1:])//4}' for i in items['id'].unique()}
    grouped = by_group(items, groups)
    assert grouped.groupby(['role', 'seed', 'metric'])['id'].nunique().eq(15).all()
    pd.testing.assert_series_equal(summarise(grouped)['value'], summarise(items)['value'])
    assert by_group(items, {i: f'one {i}' for i in groups}) is items
    with pytest.raises(DataError, match='3 test rows are in no group, the first is'):
        by_group(items, {k: v for k, v in list(groups.items())[3:]})


# ---- tables

def test_pairing_beats_two_separate_intervals():
    items = table(study(seed_sd=0., lead=.2))
    a, b = (interval(items, *m, 'accuracy') for m in (STUDENT, FLOOR))
    d = difference(items, STUDENT, FLOOR, 'accuracy')
    assert d.value == pytest.approx(a.value - b.value)
    assert d.high - d.low < .8 * np.hypot(a.high - a.low, b.high - b.low)


def test_difference_pairs_by_id_and_not_by_place():
    x = study(seed_sd=0., lead=.2, seeds=2)
    items = table(x)
    straight = difference(items, STUDENT, FLOOR, 'accuracy')
    floor = items['role'] == 'floor'
    turned = pd.concat([items[~floor], items[floor].iloc[::-1]])
    assert difference(turned, STUDENT, FLOOR, 'accuracy') == straight
    assert difference(items.sample(frac=1, random_state=0), STUDENT, FLOOR, 'accuracy') == straight
    assert two_errors(x[0] - x[1])[1] < two_errors(x[0] - x[1][:, ::-1])[1] # what pairing by place would have given


def test_interval_table_does_not_depend_on_the_order_of_rows():
    items = pd.concat([table(study(seeds=2, rows=80)), table(study(seeds=2, rows=80, seed=5), metric='margin')])
    pd.testing.assert_frame_equal(interval_table(items), interval_table(items.sample(frac=1, random_state=3)), check_exact=True)


def test_interval_table_is_interval_for_each():
    items = pd.concat([table(study(seeds=2, rows=80)), table(study(seeds=2, rows=50, seed=5), metric='label_agreement')])
    t = interval_table(items)
    assert len(t) == 4
    for _, r in t.iterrows():
        e = interval(items, r['role'], r['method'], r['metric'])
        assert (r['value'], r['low'], r['high'], r['n'], r['seeds']) == pytest.approx((e.value, e.low, e.high, e.n, e.seeds), abs=1e-12)


def test_other_ids_are_refused_and_named():
    x = study(rows=20)
    other = table(x[1:], who=[FLOOR], ids=[f'q{i:04}' for i in range(1, 21)])
    with pytest.raises(DataError, match=r'same test rows: 2 differ, as q0000 \(only student \(dpo weak\)\), q0020 \(only floor'):
        difference(pd.concat([table(x[:1], who=[STUDENT]), other]), STUDENT, FLOOR, 'accuracy')


def test_label_agreement_cannot_be_compared_with_test_rows():
    "It is measured on the rows that the student was trained on, under the same metric name or not"
    x = study(rows=20)
    items = pd.concat([table(x), table(x[1:], who=[FLOOR], metric='label_agreement', ids=[f'u{i}' for i in range(20)])])
    with pytest.raises(DataError, match='student, dpo weak has no metric label_agreement; it has: accuracy'):
        difference(items, STUDENT, FLOOR, 'label_agreement')
    renamed = pd.concat([table(x[:1], who=[STUDENT]), items[items['metric'] == 'label_agreement'].assign(metric='accuracy')])
    with pytest.raises(DataError, match='not scored on the same test rows: 40 differ'):
        difference(renamed, STUDENT, FLOOR, 'accuracy')


def test_other_seeds_are_refused_and_named():
    items = table(study(seeds=3, rows=20))
    with pytest.raises(DataError, match=r'not scored on the same seeds: 1 differ, as 1 \(only student'):
        difference(items[(items['role'] != 'floor') | (items['seed'] != 1)], STUDENT, FLOOR, 'accuracy')


def test_a_seed_on_other_rows_is_refused():
    items = table(study(seeds=2, rows=20))
    with pytest.raises(DataError, match='seed 1 lacks 1 of 20 test rows, as q0003'):
        interval_table(items[(items['id'] != 'q0003') | (items['seed'] != 1)])


def test_a_choice_is_never_averaged_over():
    items = pd.concat([table(study(rows=20), strong=s) for s in ('1b', '7b')])
    with pytest.raises(DataError, match='by strong=, one of: 1b, 7b'): interval(items, *STUDENT, 'accuracy')
    assert interval(items, *STUDENT, 'accuracy', strong='7b').n == 20
    a, b = (dict(role=r, method=m, strong='7b') for r, m in (STUDENT, FLOOR))
    assert difference_table(items, 'accuracy', [(a, b)])['a'].tolist() == ['student (dpo weak, 7b)']
    with pytest.raises(DataError, match='models in the table: floor, dpo human; student, dpo weak'):
        score_matrix(items, 'ceiling', 'dpo gold', 'accuracy')
    tasks = pd.concat([table(study(rows=20), task=t) for t in ('hh', 'tldr')])
    with pytest.raises(DataError, match='by task=, one of: hh, tldr'): interval(tasks, *STUDENT, 'accuracy')


def test_clear_says_whether_zero_is_left_out():
    t = difference_table(table(study(rows=400, seed_sd=0., lead=1.)), 'accuracy', [(STUDENT, FLOOR), (FLOOR, STUDENT), (FLOOR, FLOOR)])
    assert t['significant'].tolist() == [True, True, False]
    assert t['value'][0] == -t['value'][1]


def test_clear_is_another_question_than_different():
    "Equal models hardly ever have equal means; one such difference in twenty is called clear"
    found = pd.concat(
        [difference_table(table(study(rows=150, seed_sd=0.0, seeds=3, seed=i)), 'accuracy', [(STUDENT, FLOOR)]) for i in range(120)]
    )
    assert (found['value'] != 0).mean() > .9 and found['significant'].mean() < .1
    alone = (found['low'] > 0) | (found['high'] < 0)
    # one comparison: the interval, and nothing else
    assert (found['significant'] == alone).all() and (found['significant'] == (found['p'] <= .05)).all()


@pytest.mark.parametrize('seeds', [1, 2, 3, 5])
def test_p_is_the_level_at_which_the_interval_reaches_zero(seeds):
    for i in range(12):
        d = np.subtract(*study(seeds=seeds, rows=80, seed=i, lead=.4, seed_sd=.1))
        p = p_value(d, (-1, 1))
        if not 1e-6 < p < .999: continue
        for shift, outside in ((.9, False), (1.1, True)): # a little more or less sure
            low, high = interval_limits(d, 1 - min(p*shift, .999), (-1, 1), paired=True)
            assert (low > 0 or high < 0) == outside


def several(leads, seed, rows=300):
    "Items of methods with these leads over one floor"
    x = study(models=len(leads) + 1, rows=rows, seed_sd=0., seed=seed)
    r = np.random.default_rng(1000 + seed)
    for i, lead in enumerate(leads): x[i] = np.where(r.random(x[i].shape) < lead, 1., x[i])
    who = [('student', f'm{i}') for i in range(len(leads))] + [FLOOR]
    return table(x, who=who), [(w, FLOOR) for w in who[:-1]]


def test_verdicts_allow_for_the_number_of_methods():
    "Six methods as good as the floor: about one study in twenty calls one of them clear, not one in four"
    raw, holm = [], []
    for i in range(100):
        items, pairs = several([0.]*6, i)
        t = difference_table(items, 'accuracy', pairs)
        raw.append(((t['low'] > 0) | (t['high'] < 0)).any()); holm.append(t['significant'].any())
        assert t['family'].eq(6).all() and (t['p_holm'] >= t['p']).all()
    assert np.mean(raw) > .1 and np.mean(holm) < .1


def test_one_method_that_is_far_ahead_stays_clear_among_others():
    items, pairs = several([0., 0., .5, 0.], 1)
    t = difference_table(items, 'accuracy', pairs)
    assert t['significant'].tolist() == [False, False, True, False]
    assert difference_table(items, 'accuracy', pairs[2:3])['p_holm'][0] == pytest.approx(t['p'][2])


def test_memory_stays_small_on_many_rows():
    "Draws are made in blocks: 11,000 rows and 2,000 draws would be 176 MB of counts at once"
    import tracemalloc
    x = study(models=1, rows=11_000)
    tracemalloc.start()
    crossed_bootstrap(x, n=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
