"PGR: known values, refusals, pairing, and how often its interval holds the truth (pitfall 19)"
import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from w2s.errors import DataError
from w2s.evaluate.bootstrap import crossed_bootstrap
from w2s.evaluate.intervals import estimate
from w2s.evaluate.label_metrics import auroc_scores, brier, label_correct, label_scores
from w2s.evaluate.metrics import item_rows, metric_rows
from w2s.evaluate.pgr import NoGap, gap_power, pgr, pgr_interval, pgr_table, recovered, stretched
from w2s.evaluate.power import forecast

WHO = [('floor', 'xent gold'), ('student', 'xent weak'), ('ceiling', 'xent gold')]


def right(rates, seeds=1, rows=300, luck=0., seed=0):
    "Right or wrong for models with these true accuracies, shape (models, seeds, rows): rows are hard for all, seeds have their luck"
    r = np.random.default_rng(seed)
    level = norm.ppf(rates) * np.sqrt(1.5 + luck**2)
    own = .5*r.normal(size=(len(rates), 1, rows)) + .5*r.normal(size=(len(rates), seeds, rows))
    return (level[:, None, None] + luck*r.normal(size=(len(rates), seeds, 1)) + r.normal(size=rows) + own > 0).astype(float)


def table(x, who=WHO):
    "Items of scores of shape (models, seeds, rows)"
    ids = [f'q{i:04}' for i in range(x.shape[2])]
    return pd.concat(
        [item_rows(ids, v, 'accuracy', *m, 'pico', 'base', s, 't') for m, y in zip(who, x, strict=True) for s, v in enumerate(y)]
    )


def exact(rates, rows=1000):
    "Scores whose means are exactly these"
    return np.stack([(np.arange(rows) < round(r*rows)).astype(float)[None] for r in rates])


# ---- the value

def test_known_triples():
    assert recovered(.6, .7, .8) == pytest.approx(.5)
    assert recovered(.6, .55, .8) == pytest.approx(-.25) and recovered(.6, .84, .8) == pytest.approx(1.2) # never cut off
    assert pgr_interval(exact((.6, .7, .8))).value == pytest.approx(.5)
    assert pgr(table(exact((.6, .75, .8))), *WHO).value == pytest.approx(.75)


def test_ratio_of_means_and_not_mean_of_ratios():
    "Seeds with PGR 0.1/0.2 and 0.18/0.18: the mean of ratios would be 0.75"
    x = np.stack([np.concatenate([exact((f,))[0], exact((g,))[0]]) for f, g in ((.60, .60), (.70, .78), (.80, .78))])
    assert pgr_interval(x).value == pytest.approx(.28/.38)


def test_equal_rows_do_not_make_an_interval_without_width():
    "No row says how far other rows could be; of shares it is known how far any row can be, of rewards nothing is"
    same = np.stack([np.full((2, 50), v) for v in (.25, .5, .75)])
    e, reward = pgr_interval(same, bounds=(0, 1)), pgr_interval(same)
    assert e.value == reward.value == pytest.approx(.5)
    assert .3 < e.low < .45 and .55 < e.high < .7 and np.isnan([reward.low, reward.high]).all()
    x = right((.6, .7, .9), rows=400)
    alike = pgr_interval(x[[0, 2, 2]], bounds=(0, 1)) # the student answers every row as the ceiling does
    assert alike.low < alike.value == 1 < alike.high


def test_row_and_seed_order_do_not_matter():
    x = right((.6, .7, .8), seeds=3, luck=.1)
    items = table(x)
    first = pgr(items, *WHO)
    for i in range(3): assert pgr(items.sample(frac=1, random_state=i), *WHO) == first


# ---- refusals

@pytest.mark.parametrize('rates', [(.6, .7, .6), (.6, .65, .55), (.8, .7, .6)])
def test_no_gap_and_inverted_gap_are_refused(rates):
    with pytest.raises(NoGap): recovered(*rates)
    with pytest.raises(NoGap): pgr_interval(exact(rates))
    with pytest.raises(NoGap): pgr(table(exact(rates)), *WHO)


def test_a_gap_whose_interval_includes_zero_is_refused_with_its_numbers():
    x = right((.60, .605, .61), rows=500)
    with pytest.raises(NoGap, match=r'the gap may be zero: ceiling minus floor is 0\.\d+ \[-0\.\d+, 0\.\d+\] \(95%, 500 rows, 1 seed'):
        pgr_interval(x)


def test_a_gap_that_two_seeds_cannot_confirm_is_refused():
    "Rows alone would be sure of it; the two seeds disagree"
    x = np.stack([exact((.6,))[0].repeat(2, 0), exact((.65,))[0].repeat(2, 0), np.concatenate([exact((.62,))[0], exact((.85,))[0]])])
    for s in (0, 1): pgr_interval(x[:, s:s + 1])
    with pytest.raises(NoGap, match='2 seeds'): pgr_interval(x)


def test_upside_down_is_another_finding_than_no_gap():
    with pytest.raises(NoGap, match='reversed'): pgr_interval(exact((.8, .7, .6)))


@pytest.mark.parametrize('seeds', [1, 3])
def test_refused_if_and_only_if_the_interval_of_the_gap_includes_zero(seeds):
    seen = set()
    for i in range(60):
        x = right((.6, .63, .66), seeds=seeds, luck=.05, seed=i)
        draws = crossed_bootstrap(x, n=300)
        gap = estimate(x[2] - x[0], bounds=(-1, 1), paired=True)
        drawn = stretched(x[2] - x[0], draws[:, 2] - draws[:, 0])[0] # the ratio's own interval has an end if this is above zero, too
        try: e = pgr_interval(x, n=300, bounds=(0, 1))
        except NoGap: assert gap.low <= 0 or drawn <= 0
        else:
            assert gap.low > 0 and drawn > 0 and e.low <= e.value <= e.high and np.isfinite([e.low, e.high]).all()
            seen.add(True)
    assert seen


def test_a_table_goes_on_after_a_refusal_and_holds_no_number_there():
    items = pd.concat(
        [table(right((0.6, 0.7, 0.8), rows=800)), table(right((0.6, 0.6, 0.6), rows=800)[1:], [('student', 'bad'), ('ceiling', 'bad')])]
    )
    t = pgr_table(items, [WHO, (WHO[0], ('student', 'bad'), ('ceiling', 'bad'))])
    assert t['value'].isna().tolist() == t['low'].isna().tolist() == t['high'].isna().tolist() == [False, True]
    assert t['refused'][0] == '' and 'may be zero' in t['refused'][1] and t['gap'].notna().all()


# ---- pairing

def test_other_rows_and_other_seeds_are_refused():
    items = table(right((.6, .7, .8), seeds=2))
    with pytest.raises(DataError, match='not scored on the same test rows: 1 differ, as q0003'):
        pgr(items[(items['role'] != 'ceiling') | (items['id'] != 'q0003')], *WHO)
    with pytest.raises(DataError, match='not scored on the same seeds'):
        pgr(items[(items['role'] != 'student') | (items['seed'] != 1)], *WHO)


def test_pairing_narrows_the_interval():
    "The same scores with the rows of the student and the ceiling shuffled: as if each model had a test set of its own"
    x = right((.6, .7, .8), rows=600)
    r = np.random.default_rng(0)
    apart = np.stack([x[0], x[1][:, r.permutation(600)], x[2][:, r.permutation(600)]])
    paired, loose = pgr_interval(x), pgr_interval(apart)
    assert paired.value == loose.value and paired.high - paired.low < .85*(loose.high - loose.low)


def test_one_seed_is_the_percentile_interval_of_the_ratio():
    x = right((.6, .7, .8), rows=600)
    f, s, c = crossed_bootstrap(x, n=1000).T
    want = np.percentile((s - f) / (c - f), [2.5, 97.5])
    e = pgr_interval(x, n=1000)
    assert (e.low, e.high) == pytest.approx(want, abs=.003)


# ---- coverage

def coverage(studies, rates=(.6, .7, .8), truth=.5, **how):
    "Share of the studies that are not refused whose interval holds the truth, and the share refused"
    held = []
    for i in range(studies):
        try: e = pgr_interval(right(rates, seed=i, **how), n=300, seed=i)
        except NoGap: continue
        held.append(e.low <= truth <= e.high)
    return np.mean(held), 1 - len(held)/studies


@pytest.mark.cases(2)
@pytest.mark.parametrize('rates, truth', [((.6, .7, .8), .5), ((.6, .58, .8), -.1), ((.6, .8, .8), 1.)])
def test_rows_are_covered(rates, truth):
    found, refused = coverage(600, rates, truth, rows=300)
    assert .93 <= found <= .97 and refused < .01


def test_rows_and_seeds_are_covered():
    found, refused = coverage(400, rows=200, seeds=5, luck=.1)
    assert .93 <= found <= .98 and refused < .05


def test_an_edge_is_mostly_refused_and_the_rest_is_not_far_off():
    found, refused = coverage(300, (.60, .62, .64), rows=300)
    assert refused > .5 and found > .87


# ---- coverage on accuracy and AUROC: classifiers with tied scores, two rows in five of class 1 (pitfall 19)

SKILL, GRID, SHARE = (.5, 1.4, 2.), .25, .4


def classified(seeds, luck, rows=300, seed=0):
    "Logits of class 1 on a grid, (models, seeds, rows), and labels: rows are hard for all, and for all seeds of a model; seeds have luck"
    r = np.random.default_rng(seed)
    y = r.random(rows) < SHARE
    skill = np.array(SKILL)[:, None, None] + luck*r.normal(size=(3, seeds, 1))
    z = skill*(y - .5) + .6*r.normal(size=rows) + .5*r.normal(size=(3, 1, rows)) + np.sqrt(.39)*r.normal(size=(3, seeds, rows))
    return np.round(z/GRID)*GRID, y


def true_values(luck):
    "Accuracy and AUROC of the three models over all rows and seeds, ties worth a half"
    z, (at, weight) = np.arange(-60, 61)*GRID, np.polynomial.hermite_e.hermegauss(21)
    found = np.zeros((2, 3))
    for k, skill in enumerate(SKILL):
        for s, w in zip(skill + luck*at, weight/weight.sum(), strict=True):
            no, yes = (norm.cdf(z + GRID/2 - m) - norm.cdf(z - GRID/2 - m) for m in (-s/2, s/2))
            right = SHARE*(yes[z > 0].sum() + yes[z == 0][0]/2) + (1 - SHARE)*(no[z < 0].sum() + no[z == 0][0]/2)
            found[:, k] += w*right, w*np.sum(yes * (np.cumsum(no) - no/2))
    return dict(zip(('accuracy', 'auroc'), found, strict=True))


def scored(z, y):
    "Row scores of both metrics, each (3, seeds, rows)"
    return dict(accuracy=np.where(z == 0, .5, (z > 0) == y), auroc=np.stack([[auroc_scores(s, y) for s in model] for model in z]))


def holds(x, draws, theta):
    "Is theta in the interval of the PGR? None: refused. `pgr_interval` looks for the ends; whether a value lies inside is one question"
    if estimate(x[2] - x[0]).low <= 0 or stretched(x[2] - x[0], draws[:, 2] - draws[:, 0])[0] <= 0: return None
    low, high = stretched(x[1] - x[0] - theta*(x[2] - x[0]), draws @ [theta - 1, 1, -theta])
    return low <= 0 <= high


@pytest.mark.parametrize('seeds, luck', [(1, 0.), (5, .2)])
def test_the_truth_is_in_93_to_97_of_100_intervals_on_accuracy_and_auroc(seeds, luck, studies=2000):
    truth = {m: recovered(*v) for m, v in true_values(luck).items()}
    held = {m: [] for m in truth}
    for first in range(0, studies, 200):
        made = [scored(*classified(seeds, luck, seed=10_000 + i)) for i in range(first, first + 200)]
        for metric, theta in truth.items():
            draws = crossed_bootstrap(np.concatenate([x[metric] for x in made]), n=500)
            held[metric] += [holds(x[metric], draws[:, 3*i:3*i + 3], theta) for i, x in enumerate(made)]
        if first: continue
        for x, inside in zip(made[:8], held['auroc'], strict=False): # the same question, asked of `pgr_interval`
            e = pgr_interval(x['auroc'], n=500)
            assert inside == (e.low <= truth['auroc'] <= e.high)
    for metric, answers in held.items():
        told = [a for a in answers if a is not None]
        assert len(told) >= .995*studies, metric
        assert .93 <= np.mean(told) <= .97, f'{metric}: {np.mean(told):.4f}'


def test_a_forecast_of_the_detectable_gap_is_found_as_often_as_said():
    "Pilots with 5 seeds and 200 rows say what 10 seeds on 600 rows will find; such studies find it"
    def gaps(lead, seeds, rows, seed):
        r = np.random.default_rng(seed)
        return lead + .03*r.normal(size=(seeds, 1)) + .3*r.normal(size=rows) + .4*r.normal(size=(seeds, rows))
    lead = np.mean([forecast(gaps(0, 5, 200, i), .8, .95)(10, 600) for i in range(100)])
    found = np.mean([estimate(gaps(lead, 10, 600, 1000 + i)).low > 0 for i in range(200)])
    assert .7 <= found <= .95, (lead, found)


def test_the_rows_that_are_needed_fall_with_the_gap():
    items = table(right((.6, .62, .64), seeds=1, rows=500))
    plans = pd.concat([gap_power(items, [(WHO[0], WHO[2])], gap=g) for g in (.02, .04, .08, -.01)])
    rows = plans['rows_needed'].tolist()
    assert (
        rows[0] > rows[1] > rows[2]
        and rows[0] == pytest.approx(16 * rows[2], rel=0.01)
        and np.isnan(rows[3])
        and plans['seeds_needed'].isna().all()
    )


def test_a_model_is_named_by_as_many_words_as_it_takes():
    "A result may have one floor and one ceiling: their roles name them; a word too few or a wrong one is a sentence"
    items = table(right((.5, .6, .8), seeds=1, rows=500))
    whole, short = (gap_power(items, [pair]) for pair in ((WHO[0], WHO[2]), (dict(role='floor'), dict(role='ceiling'))))
    pd.testing.assert_frame_equal(whole.drop(columns=['floor', 'ceiling']), short.drop(columns=['floor', 'ceiling']))
    assert short.loc[0, ['floor', 'ceiling']].tolist() == ['floor', 'ceiling']
    assert pgr(items, dict(role='floor'), dict(role='student'), dict(role='ceiling')) == pgr(items, *WHO)
    two = pd.concat([items, items[items.role == 'floor'].assign(method='other')])
    for name, why in (
        (dict(role='floor'), 'floor fits several models; say which one by method='),
        (dict(role='floor', metod='other'), 'did you mean "method"'),
        (dict(method='other'), r'names no model; write \(role, method\)'),
        (('floor', 'other', 'pico'), r'names no model; write \(role, method\)'),
    ):
        with pytest.raises(DataError, match=why): gap_power(two, [(name, WHO[2])])


# ---- scores of labels

def test_accuracy_does_not_depend_on_the_order_of_classes():
    p = np.random.default_rng(0).integers(1, 4, (300, 3)).astype(float)
    p /= p.sum(1, keepdims=True)
    y = np.random.default_rng(1).integers(0, 3, 300)
    turned = [2, 0, 1]
    assert (label_correct(p, y) == label_correct(p[:, turned], np.argsort(turned)[y])).all()
    assert np.allclose(brier(p, y), brier(p[:, turned], np.argsort(turned)[y]))
    assert label_correct(np.full((300, 3), 1/3), y).mean() == pytest.approx(1/3)


def test_label_scores_are_items():
    items = metric_rows(['a', 'b'], label_scores([[.2, .8], [.6, .4]], [1, 1]), *WHO[1], 'w', 's', 0, 't')
    assert items[items['metric'].isin(['accuracy', 'brier'])].set_index(['metric', 'id'])['value'].to_dict() == pytest.approx(
        {('accuracy', 'a'): 1, ('accuracy', 'b'): 0, ('brier', 'a'): .08, ('brier', 'b'): .72})
    assert not {'balanced_accuracy', 'f1_macro', 'f1_weighted', 'log_loss'} - set(items['metric']) and 'auroc' not in set(items['metric'])
    with pytest.raises(DataError, match='the label of row 2 is -1'): label_scores([[.2, .8], [.6, .4]], [1, -1])
