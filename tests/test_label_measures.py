"Measures of labels: scikit-learn's values from row scores, ties, absent classes, errors of the row scores, LegalBench's rules (pitfall 19)"
import string
import warnings

import numpy as np
import pandas as pd
import pytest
import sklearn.metrics as sk

from w2s.errors import DataError
from w2s.evaluate.bootstrap import crossed_bootstrap
from w2s.evaluate.calibration import wilson
from w2s.evaluate.class_answers import answer_scores, normalised
from w2s.evaluate.class_calibration import class_calibration, class_reliability, class_shares
from w2s.evaluate.intervals import difference, estimate
from w2s.evaluate.label_metrics import (
    agreement_scores,
    auroc,
    auroc_scores,
    balanced_correct,
    f1,
    hits,
    label_correct,
    label_scores,
    ratio_scores,
)
from w2s.evaluate.metrics import metric_rows
from w2s.evaluate.pgr import pgr, recovered

def drawn(rows, classes, seed, grid=12):
    "Probabilities with many equal values (none tied at the top of its row), and labels of unequal classes, each with a row"
    r = np.random.default_rng(seed)
    share = np.arange(classes, 0, -1.)**2
    y = r.permutation(np.r_[np.arange(classes), r.choice(classes, rows - classes, p=share/share.sum())])
    counts = r.integers(1, grid//2, (rows, classes)).astype(float)
    counts[np.arange(rows), np.where(r.random(rows) < .5, y, r.integers(0, classes, rows))] += grid/2
    return counts / counts.sum(1, keepdims=True), y


def official(p, y):
    "scikit-learn's values"
    guess, one_hot = p.argmax(1), np.eye(p.shape[1])[y]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return dict(accuracy=sk.accuracy_score(y, guess), balanced_accuracy=sk.balanced_accuracy_score(y, guess),
                    f1_macro=sk.f1_score(y, guess, average='macro'), f1_weighted=sk.f1_score(y, guess, average='weighted'),
                    auroc=sk.roc_auc_score(y, p[:, 1] if p.shape[1] == 2 else p, multi_class='ovr'),
                    log_loss=sk.log_loss(y, p, labels=range(p.shape[1])), brier=((p - one_hot)**2).sum(1).mean())


def means(scores): return {name: float(v.mean()) for name, v in scores.items()}


# ---- values

@pytest.mark.parametrize('classes', [2, 3, 5, 10])
def test_means_of_row_scores_are_scikit_learns_values(classes):
    for seed in range(40):
        p, y = drawn(30 + 7*seed, classes, seed)
        assert means(label_scores(p, y)) == pytest.approx(official(p, y), abs=1e-12)


def test_auroc_is_mann_whitney_with_half_credit_in_any_order_of_rows():
    r = np.random.default_rng(0)
    for _ in range(50):
        s, y = r.integers(0, 6, 40)/5, np.r_[True, False, r.random(38) < .3]
        above, same = (s[y][:, None] > s[~y]).mean(), (s[y][:, None] == s[~y]).mean()
        assert same > 0 and auroc_scores(s, y).mean() == pytest.approx(above + same/2, abs=1e-12)
        assert auroc_scores(s, y).mean() == pytest.approx(sk.roc_auc_score(y, s), abs=1e-12)
        order = r.permutation(40)
        assert auroc_scores(s[order], y[order]) == pytest.approx(auroc_scores(s, y)[order], abs=1e-12)


@pytest.mark.parametrize('classes', [2, 3])
def test_constant_scores_have_an_auroc_of_one_half_whatever_stands_first(classes):
    y = np.sort(np.arange(60) % classes)
    flat = np.full((60, classes), 1/classes)
    for order in (y, y[::-1], np.random.default_rng(0).permutation(y)):
        assert auroc(flat, order) == pytest.approx(np.full(60, .5)) # each row, so that the interval has no width
        assert label_correct(flat, order).mean() == pytest.approx(1/classes)
        assert balanced_correct(flat, order).mean() == pytest.approx(1/classes)


def test_auroc_does_not_change_with_a_monotone_change_of_the_scores():
    s, y = np.random.default_rng(0).normal(size=80).round(1), np.arange(80) % 3 == 0
    assert (auroc_scores(s, y) == auroc_scores(np.exp(3*s), y)).all()
    assert auroc_scores(-s, y).mean() == pytest.approx(1 - auroc_scores(s, y).mean())


def test_absent_classes():
    p, y = drawn(80, 4, 0)
    y = np.where(y == 3, 0, y)                                       # no gold row of class 3; some rows are given to it
    assert (hits(p)[:, 3] > 0).any()
    found = means(label_scores(p, y))
    assert found['balanced_accuracy'] == pytest.approx(np.mean([(p.argmax(1)[y == k] == k).mean() for k in range(3)]))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert found['f1_macro'] == pytest.approx(sk.f1_score(y, p.argmax(1), average='macro'))
    assert found['auroc'] == pytest.approx(np.mean([sk.roc_auc_score(y == k, p[:, k]) for k in range(3)]))
    alone = label_scores(p, np.zeros(80, int))
    assert 'auroc' not in alone and alone['balanced_accuracy'] == pytest.approx(alone['accuracy'])
    with pytest.raises(DataError, match='all 80 rows are of one class'): auroc(p, np.zeros(80, int))


def test_tied_rows_are_shared_as_random_guesses_would_share_them():
    p, y = np.array([[.5, .5], [.5, .5], [.9, .1], [.2, .8]]), np.array([0, 1, 0, 1])
    both = [[np.eye(2)[[a, b, 0, 1]] for b in (0, 1)] for a in (0, 1)]
    for name in ('accuracy', 'balanced_accuracy'):
        assert means(label_scores(p, y))[name] == pytest.approx(np.mean([[means(label_scores(q, y))[name] for q in row] for row in both]))
    assert f1(p, y).mean() == pytest.approx(.75) # of the expected counts


# ---- errors

def test_row_scores_carry_the_error_that_test_sets_show():
    def one(seed):
        r = np.random.default_rng(seed)
        y = (r.random(400) < .25).astype(int) + (r.random(400) < .15)
        q = np.exp(1.2*np.eye(3)[y] + np.array([.8, .3, 0]) + r.normal(size=(400, 3)))
        return label_scores(q / q.sum(1, keepdims=True), y)
    sets = [one(i) for i in range(400)]
    for name in sets[0]:
        moved, said = np.std([s[name].mean() for s in sets]), np.mean([s[name].std()/20 for s in sets])
        assert said == pytest.approx(moved, rel=.1), name


@pytest.mark.parametrize('name, direct', [
    ('auroc', sk.roc_auc_score), ('f1_macro', lambda y, p: sk.f1_score(y, p > .5, average='macro')),
    ('balanced_accuracy', lambda y, p: sk.balanced_accuracy_score(y, p > .5))])
def test_paired_intervals_are_those_of_a_bootstrap_that_computes_the_statistic_anew(name, direct):
    r = np.random.default_rng(4)
    y, hard = (r.random(600) < .3).astype(int), r.normal(size=600)
    a, b = (1/(1 + np.exp(-(k*(y - .3) + hard + .7*r.normal(size=600)))) for k in (1., 2.))
    two = [label_scores(np.stack([1 - p, p], 1), y)[name] for p in (a, b)]
    rows = [r.integers(0, 600, 600) for _ in range(400)]
    anew = np.percentile([direct(y[i], b[i]) - direct(y[i], a[i]) for i in rows], [2.5, 97.5])
    e = estimate((two[1] - two[0])[None])
    assert e.value == pytest.approx(direct(y, b) - direct(y, a))
    width = anew[1] - anew[0]
    assert (e.low, e.high) == pytest.approx(anew, abs=.1*width)
    items = [metric_rows([f'q{i}' for i in range(600)], {name: s}, 'student', m, 'w', 's', 0, 't') for s, m in zip(two, 'ab', strict=True)]
    assert difference(pd.concat(items), ('student', 'b'), ('student', 'a'), name).value == pytest.approx(e.value)


def test_a_ratio_is_that_of_the_means_under_every_resampling_to_first_order():
    r = np.random.default_rng(7) # not the stream of the bootstrap, whose first draw would follow these rows
    b = (r.random(500) < .4).astype(float)
    a = b*(r.random(500) < .7)
    draws = crossed_bootstrap(np.stack([a, b, ratio_scores(a, b)])[:, None], n=500)
    assert np.abs(draws[:, 0]/draws[:, 1] - draws[:, 2]).max() < .6*draws[:, 2].std()
    assert np.corrcoef(draws[:, 0]/draws[:, 1], draws[:, 2])[0, 1] > .99


def test_pgr_on_auroc_and_balanced_accuracy_is_that_of_the_seeds_means():
    r, who = np.random.default_rng(1), [('floor', 'gold labels'), ('student', 'xent'), ('ceiling', 'gold labels')]
    y = (r.random(500) < .3).astype(int)
    one = [[np.round(1/(1 + np.exp(-(k*(y - .5) + r.normal(size=500)))), 1) for _ in range(2)] for k in (.5, 1.5, 2.5)]
    items = pd.concat([metric_rows([f'q{i}' for i in range(500)], label_scores(np.stack([1 - p, p], 1), y), *m, 'w', 's', s, 't')
                       for m, of in zip(who, one, strict=True) for s, p in enumerate(of)])
    for name, direct in (('auroc', lambda p: sk.roc_auc_score(y, p)),
                         ('balanced_accuracy', lambda p: balanced_correct(np.stack([1 - p, p], 1), y).mean())):
        assert pgr(items, *who, name, n=200).value == pytest.approx(recovered(*[np.mean([direct(p) for p in of]) for of in one]))


# ---- agreement

def test_agreement_where_the_supervisor_is_right_and_wrong_adds_up():
    for seed in range(20):
        r = np.random.default_rng(seed)
        p, w = (q / q.sum(1, keepdims=True) for q in r.integers(1, 4, (2, 100, 3)).astype(float))
        y = r.integers(0, 3, 100)
        m, share = means(agreement_scores(p, w, y)), label_correct(w, y).mean()
        assert m['agreement'] == pytest.approx(share*m['agreement_right'] + (1 - share)*m['agreement_wrong'], abs=1e-12)
        accuracy = label_correct(p, y).mean()                        # right where it is right; and where it is wrong by not following
        assert share*m['agreement_right'] <= accuracy + 1e-12


def test_agreement_without_ties_is_a_share_of_rows():
    r = np.random.default_rng(0)
    p, w = (np.eye(3)[r.integers(0, 3, 200)] for _ in range(2))
    y, same = r.integers(0, 3, 200), (p == w).all(1)
    ok = w[np.arange(200), y] == 1
    want = dict(agreement=same.mean(), agreement_right=same[ok].mean(), agreement_wrong=same[~ok].mean())
    assert means(agreement_scores(p, w, y)) == pytest.approx(want)
    assert set(agreement_scores(p, np.eye(3)[y], y)) == {'agreement', 'agreement_right'}
    assert set(agreement_scores(p, np.eye(3)[(y + 1) % 3], y)) == {'agreement', 'agreement_wrong'}


# ---- calibration of classes

def test_honest_and_boastful_classifiers_are_told_apart():
    r, above = np.random.default_rng(0), []
    for _ in range(60):
        x = r.normal(size=(400, 5)) * 1.5
        p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
        y = (r.random((400, 1)) > p.cumsum(1)[:, :4]).sum(1)
        line, loud = class_calibration(p, y), class_calibration(p**3 / (p**3).sum(1, keepdims=True), y)
        above.append(line['ece'] > line['worst_honest_ece'])
        assert loud['ece'] > loud['worst_honest_ece'] and loud['accuracy'] == line['accuracy']
        shares = class_shares(p, y)
        assert abs(shares['excess'].sum()) < 1e-12 and shares['n'].sum() == 400
    assert np.mean(above) <= .15


def test_bins_hold_every_row_and_their_intervals_hold_their_mean():
    p, y = drawn(300, 3, 0)
    t = class_reliability(p, y)
    assert t['n'].sum() == 300 and (t['low'] <= t['accuracy']).all() and (t['accuracy'] <= t['high']).all()
    sure = class_reliability(np.eye(2)[[0, 1, 1]], [0, 1, 1])        # always right: no error bar below nothing
    assert sure['high'].item() == 1 and (sure['accuracy'] - sure['low']).item() > 0
    assert wilson(3, 3)[1] <= 1
    equal = np.full((4, 3), 1/3)
    assert class_calibration(equal, [0, 1, 2, 0])['ece'] == pytest.approx(0)


# ---- LegalBench's rules

def legalbench(text): return text.translate(str.maketrans('', '', string.punctuation)).strip().lower()


def test_balanced_accuracy_of_answers_is_the_official_one():
    r = np.random.default_rng(0)
    for _ in range(100):
        gold = list(r.choice(['Relevant', 'Irrelevant', 'Non-Relevant'], 50))
        said = list(r.choice([' Relevant.', '"irrelevant"', 'Non-relevant', 'nonrelevant!', 'It depends'], 50))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            want = sk.balanced_accuracy_score([legalbench(g) for g in gold], [legalbench(a) for a in said])
        assert answer_scores(said, gold)['balanced_accuracy'].mean() == pytest.approx(want, abs=1e-12)


def test_numbers_keep_their_points():
    "LegalBench issue 56: `$1.00` was the same answer as `$100`"
    assert legalbench('$1.00') == legalbench('$100') and normalised('$1.00') != normalised('$100')
    assert normalised('1.5') != normalised('15') and normalised('100.') == normalised('$100') == '100'


@pytest.mark.parametrize('missing', [None, float('nan'), '', '  ', '.'])
def test_a_missing_answer_is_an_error_and_no_wrong_answer(missing):
    with pytest.raises(DataError, match='row 2 is .*no answer'): answer_scores(['yes', missing], ['yes', 'no'])
    with pytest.raises(DataError, match='the gold answer of row 2'): answer_scores(['yes', 'no'], ['yes', missing])
    with pytest.raises(DataError, match='1 answers for 2 rows'): answer_scores(['yes'], ['yes', 'no'])
