"Confidence, audit, calibration and power of weak labels: identities and promises over many drawn cases"
import numpy as np
import pandas as pd
import pytest
from scipy.special import expit

from w2s.data.rows import make_rows
from w2s.errors import DataError
from w2s.evaluate.calibration import calibration_report, coverage, expected_calibration_error, honest_error, reliability, wilson
from w2s.evaluate.intervals import estimate
from w2s.evaluate.power import detectable, detectable_by
from w2s.feedback.audit import SUBSETS, coin_consistency, consistency, matches, mix_check, random_labels, subset, subset_table
from w2s.feedback.confidence import WEIGHTS, calibrated, confidence, fit_temperature, top_share, weighted
from w2s.feedback.preferences import given_labels, label_pairs

def invented(n=300, seed=0, steps=None):
    "Pairs with known qualities, human labels and weak labels; with `steps`, qualities are whole steps, so that ties are common"
    rng = np.random.default_rng(seed)
    quality = rng.normal(0, 1, (n, 2))
    if steps: quality = np.round(quality * steps) / steps
    human_a = rng.random(n) < expit(1.5 * (quality[:, 0] - quality[:, 1]))
    pairs = make_rows(
        [dict(prompt=f'{i}?', response_a=f'a{i}', response_b=f'b{i}', prob_a=float(h)) for i, h in enumerate(human_a)], 'pairs'
    )
    return pairs, given_labels(pairs), label_pairs(pairs, quality + rng.normal(0, 1, (n, 2)), 'weak'), quality


# Audit

@pytest.mark.parametrize('seed', range(6))
def test_mixes_add_up(seed):
    "The identity behind Table 2 holds for any data, with ties in the gold reward as well"
    pairs, human, weak, quality = invented(seed=seed, steps=2 if seed % 2 else None)
    noise = random_labels(pairs, human, float((~matches(weak, human)).mean()), seed)
    table = subset_table(weak, human, *quality.T, random=noise)
    for name in ('weak', 'random'): assert mix_check(table, name=name).difference.abs().max() < 1e-12
    at = table.set_index('set')
    assert np.allclose(at.delta, at.chosen - at.rejected)
    share = at.n['weak match'] / at.n['weak']
    assert np.isclose(at.better['weak'], share*at.better['weak match'] + (1 - share)*at.better['weak mismatch'])
    assert np.isclose(at.better['human'], share*at.better['weak match'] + (1 - share)*(1 - at.better['weak mismatch']))


def test_mix_check_finds_a_wrong_table():
    "Columns of one set exchanged, or the share of another supervisor: the sums fail"
    _, human, weak, quality = invented()
    table = subset_table(weak, human, *quality.T)
    wrong = table.copy()
    line = wrong.set == 'weak mismatch'
    wrong.loc[line, ['chosen', 'rejected']] = wrong.loc[line, ['rejected', 'chosen']].to_numpy()
    assert mix_check(wrong).difference.abs().max() > .01
    assert mix_check(table, share=.9).difference.abs().max() > .01


def test_subsets_part_the_labels():
    _, human, weak, _ = invented()
    whole, match, mismatch = (subset(weak, human, which) for which in SUBSETS)
    assert sorted([*match['id'], *mismatch['id']]) == sorted(whole['id'])
    own = dict(zip(human.rows['id'], human.rows['chosen'], strict=True))
    assert all(own[i] == c for i, c in zip(match['id'], match['chosen'], strict=True))
    assert all(own[i] == r for i, r in zip(mismatch['id'], mismatch['rejected'], strict=True))
    assert whole[:] == weak.rows[:]


@pytest.mark.parametrize('rate', [0, .001, .125, .394, .5, 1])
def test_random_labels_flip_an_exact_number(rate):
    pairs, human, _, _ = invented()
    flipped = [~matches(random_labels(pairs, human, rate, seed), human) for seed in range(20)]
    assert {f.sum() for f in flipped} == {round(rate * 300)}
    if rate == .394: assert np.abs(np.mean(flipped, axis=0) - rate).max() < .55 and len({tuple(f) for f in flipped}) == 20


def test_random_labels_leave_ties_alone():
    rows = [dict(prompt=f'{i}?', response_a='x', response_b='y', prob_a=p) for i, p in enumerate([.5, 1., .5, 0.])]
    pairs = make_rows(rows, 'pairs')
    assert list(random_labels(pairs, given_labels(pairs), .5, 0).prob_a) == [.5, 0., .5, 1.]
    with pytest.raises(DataError, match='only 2 of 4 are not ties'): random_labels(pairs, given_labels(pairs), .75, 0)


def test_consistency_never_counts_a_failed_call():
    "Pitfall 20: a judge that fails is neither consistent nor inconsistent"
    votes = np.random.default_rng(0).integers(0, 2, (500, 10)).astype(float)
    whole = consistency(votes)
    padded = np.concatenate([votes, np.full((500, 4), np.nan)], axis=1)
    assert np.array_equal(consistency(padded), whole) and np.array_equal(consistency(1 - votes), whole)
    assert whole.min() >= .5 and abs(whole.mean() - coin_consistency(10)) < .02


# Confidence

def test_each_weight_acts_on_each_row_alone():
    "A row's new weight depends on its own prob and old weight, not on its neighbours: nothing is divided by a sum"
    _, _, weak, _ = invented()
    for how in WEIGHTS:
        whole = np.array(weighted(weak.rows, how)['weight'])
        assert (
            np.allclose(whole[:3], weighted(weak.rows.select(range(3)), how)['weight'])
            and whole[0] == weighted(weak.rows.select([0]), how)['weight'][0]
        )
    assert np.allclose(weighted(weak.rows)['weight'], confidence(weak.prob_a))


def test_temperature_moves_weights_and_no_label():
    _, human, weak, _ = invented(1000)
    margin = np.log(weak.prob_a / (1 - weak.prob_a))
    t = fit_temperature(margin, human.prob_a)
    cool = calibrated(weak, t)
    assert list(cool.rows['chosen']) == list(weak.rows['chosen']) and np.allclose(cool.prob_a, expit(margin / t))
    nll = [np.mean(np.where(human.prob_a == 1, np.logaddexp(0, -margin/x), np.logaddexp(0, margin/x))) for x in (t, .9*t, 1.1*t)]
    assert nll[0] == min(nll)


def test_top_share_does_not_know_the_order():
    _, human, weak, _ = invented()
    turned = np.random.default_rng(1).permutation(300)
    for labels in (weak, human):  # human labels are all equally sure: ids decide
        for share in (0.01, 0.3, 0.999):
            assert set(top_share(labels.rows, share)['id']) == set(top_share(labels.rows.select(turned), share)['id'])


# Calibration

def test_honest_claims_pass_and_others_do_not():
    "Of honest supervisors one of twenty exceeds the bound; a too sure one always does"
    rng, over, caught = np.random.default_rng(0), [], []
    for i in range(60):
        margins = rng.normal(0, 1.5, 400)
        correct = rng.random(400) < expit(np.abs(margins))
        bounds = [honest_error(expit(k * np.abs(margins)), draws=100, seed=i)[1] for k in (1, 4)]
        over.append(expected_calibration_error(expit(np.abs(margins)), correct) > bounds[0])
        caught.append(expected_calibration_error(expit(4*np.abs(margins)), correct) > bounds[1])
    assert np.mean(over) < .17 and np.mean(caught) == 1


def test_calibration_does_not_know_the_order():
    "Rows permuted, and responses a and b exchanged: all tables stay"
    rng = np.random.default_rng(0)
    prob = np.round(rng.uniform(.5, 1, 500), 2)  # many ties
    correct = (rng.random(500) < prob).astype(float)
    turned = rng.permutation(500)
    for f in (reliability, coverage): pd.testing.assert_frame_equal(f(prob, correct), f(prob[turned], correct[turned]))
    margins, human = rng.normal(0, 1, 300), rng.integers(0, 2, 300).astype(float)
    pd.testing.assert_frame_equal(calibration_report(margins, human), calibration_report(-margins, 1 - human))


def test_fitting_and_judging_on_the_same_rows_would_flatter():
    "With few rows and no knowledge, the crosswise report does not call the supervisor better than a coin"
    reports = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        reports.append(calibration_report(rng.normal(0, 1, 40), rng.integers(0, 2, 40), seed=seed).brier[1])
    assert np.mean(reports) > .25


def test_wilson_covers():
    rng = np.random.default_rng(0)
    for n, p in ((10, .9), (30, .6), (200, .98)):
        low, high = wilson(rng.binomial(n, p, 4000), n)
        assert .92 < np.mean((low <= p) & (p <= high)) < .99, (n, p)


# Power

def differences(lead, seeds, rows, seed, seed_sd, row_sd=.4):
    rng = np.random.default_rng(seed)
    return lead + rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, row_sd, (1, rows)) + rng.normal(0, .1, (seeds, rows))


@pytest.mark.parametrize(
    'shape', [dict(seeds=1, rows=150, seed_sd=0.0), dict(seeds=5, rows=200, seed_sd=0.03), dict(seeds=5, rows=800, seed_sd=0.05)]
)
@pytest.mark.parametrize('power', [.5, .8])
def test_stated_power(shape, power):
    "An effect of the stated size is found about as often as stated"
    effect = np.mean([detectable(differences(0., seed=1000 + i, **shape), power) for i in range(40)])
    found = np.mean([estimate(differences(effect, seed=i, **shape)).low > 0 for i in range(150)])
    assert abs(found - power) < .13, (effect, found)


def test_more_seeds_and_rows_see_more():
    plan = detectable_by(differences(0., 5, 300, 0, .05), seeds=(3, 5, 20), rows=(100, 1000))
    assert (plan.diff().iloc[1:] < 0).all(axis=None) and (plan[1000] < plan[100]).all()
