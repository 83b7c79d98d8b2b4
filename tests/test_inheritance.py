"What becomes of a supervisor's errors: counts worked out by hand, intervals of textbooks, and a twin with as many errors at other places"

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from w2s.compare import demonstration_arms
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.inheritance import NEITHER, judge_items, judge_predictions, why_no_inheritance
from w2s.data.rows import make_rows, to_pairs
from w2s.errors import ConfigError, DataError
from w2s.evaluate.inheritance import (
    confidence_bins,
    inheritance_table,
    is_twin,
    linear_share,
    outcomes,
    phi_estimate,
    phi_table,
    share_estimate,
)
from w2s.evaluate.intervals import two_errors
from w2s.feedback.preferences import given_labels, label_pairs
from w2s.feedback.twins import deal_answers, deal_choices, deal_within

def arm(role, method, wrong, said=None, seed=0, n=8, weak='w', strong='s', confidence=None, group=2):
    right = np.array([float(i not in wrong) for i in range(n)])
    return pd.DataFrame(
        dict(
            role=role,
            method=method,
            weak='' if role == 'ceiling' else weak,
            strong='' if role == 'floor' else strong,
            seed=seed,
            id=[f'e{i}' for i in range(n)],
            group=[f'g{i // group}' for i in range(n)],
            right=right,
            said=said or [str(int(r)) for r in right],
            confidence=np.nan if confidence is None else confidence,
        )
    )


def whole(table, method):
    return table[(table['confidence'] == 'all') & (table['method'] == method)].set_index('outcome')


def test_counts_are_those_of_a_hand():
    judged = pd.concat(
        [
            arm('floor', 'truth', {0, 1, 2, 3}),
            arm('student', 'xent', {0, 1, 6}),
            arm('baseline', 'twin, xent', {3, 5}),
            arm('ceiling', 'truth', {7}),
        ],
        ignore_index=True,
    )
    t = inheritance_table(judged)
    assert whole(t, 'xent')[['count', 'of']].to_dict('index') == {
        'copied': dict(count=2, of=4),
        'corrected': dict(count=2, of=4),
        'newly wrong': dict(count=1, of=4),
    }
    assert whole(t, 'xent')['value'].tolist() == pytest.approx([0.5, 0.5, 0.25])
    assert whole(t, 'xent')['twin'].tolist() == pytest.approx([0.25, 0.75, 0.25])
    assert whole(t, 'xent')['more'].tolist() == pytest.approx([0.25, -0.25, 0])
    assert whole(t, 'twin, xent')['more'].isna().all()


def test_another_wrong_class_is_not_copied():
    judged = pd.concat(
        [arm('floor', 'm', {0, 1}, list('bc') + ['a'] * 6), arm('student', 'm', {0, 1}, list('bb') + ['a'] * 6)], ignore_index=True
    )
    assert whole(inheritance_table(judged[judged['role'] != 'x']).query('role == "student"'), 'm')['count'].to_dict() == {
        'copied': 1,
        'other error': 1,
        'corrected': 0,
        'newly wrong': 0,
    }


def test_ties_are_neither():
    floor, student = arm('floor', 'm', {0, 1}), arm('student', 'm', {0})
    floor.loc[0, 'right'] = 0.5
    assert whole(inheritance_table(pd.concat([floor, student])).query('role == "student"'), 'm').loc[
        'copied', ['count', 'of']
    ].tolist() == [0, 1]


def test_the_interval_of_a_share_is_the_textbook_one():
    "Ratio estimator: se² = n/(n − 1) Σ(h − r w)² / (Σ w)² (Cochran 1977, 6.13)"
    rng = np.random.default_rng(3)
    w = rng.integers(1, 5, 30).astype(float)
    h = rng.binomial(w.astype(int), 0.4).astype(float)
    r, n = h.sum() / w.sum(), len(w)
    error = np.sqrt(n / (n - 1) * ((h - r * w) ** 2).sum()) / w.sum()
    z = linear_share(h[None], w[None])
    assert z.mean() == pytest.approx(r) and two_errors(z)[1] == pytest.approx(error, rel=1e-9)
    e = share_estimate(h[None], w[None])
    assert e.low < r < e.high and 0 <= e.low and e.high <= 1 and e.n == 30


def test_groups_without_errors_say_nothing_about_them():
    h, w = np.array([[1.0, 0, 0, 1]]), np.array([[2.0, 0, 0, 2]])
    assert share_estimate(h, w).n == 2


def test_clusters_widen_the_interval():
    "Ten copies of the same example are one example"
    wrong = {i for i in range(0, 200) if (i // 10) % 2}
    copied = {i for i in wrong if (i // 10) % 4 == 1}

    def width(group):
        judged = pd.concat([arm('floor', 'm', wrong, n=200, group=group), arm('student', 's', copied, n=200, group=group)])
        row = whole(inheritance_table(judged), 's').loc['copied']
        return row['high'] - row['low']

    assert width(10) > 2 * width(1)


def test_bins_are_of_the_supervisors_confidence():
    conf = np.array([0.5, 0.5, 0.6, 0.6, 0.8, 0.8, 0.9, 0.9])
    judged = pd.concat([arm('floor', 'm', {0, 2, 4, 6}, confidence=conf), arm('student', 's', {0, 2})], ignore_index=True)
    t = inheritance_table(judged, 2).query('role == "student" and outcome == "copied"').set_index('confidence')
    assert t[['count', 'of']].to_numpy().tolist() == [[2, 4], [2, 2], [0, 2]] and list(t.index) == ['all', '0.50 to 0.70', '0.70 to 0.90']
    assert confidence_bins(pd.Series([0.5, np.nan])).tolist() == ['', '']


@pytest.mark.parametrize('seed', range(3))
def test_phi_is_the_correlation_of_errors(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 2, (2, 200))
    e = phi_estimate(x, y, [str(i) for i in range(200)], [0] * 200)
    assert e.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    r = e.value  # standard error of a correlation, by its influence function
    a, b = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
    error = np.std(a * b - r * (a * a + b * b) / 2, ddof=1) / np.sqrt(200)
    assert e.high - e.low == pytest.approx(2 * 1.97 * error, rel=0.05)


def test_phi_along_a_chain_names_each_step():
    judged = pd.concat(
        [arm('floor', 'm', {0, 1}), arm('student', 'xent', {0, 2}), arm('student', 'xent, round 2', {0, 2})], ignore_index=True
    )
    t = phi_table(judged)
    assert list(zip(t['a'], t['b'], strict=True)) == [
        ('floor m', 'student xent'),
        ('floor m', 'student xent, round 2'),
        ('student xent', 'student xent, round 2'),
    ]
    assert t['value'].tolist() == pytest.approx([1 / 3, 1 / 3, 1])


def test_arms_of_other_models_are_not_set_beside():
    judged = pd.concat(
        [arm('floor', 'm', {0}, weak='w'), arm('floor', 'm', {1}, weak='v'), arm('student', 'm', {0}, weak='v')], ignore_index=True
    )
    assert set(inheritance_table(judged)['supervisor']) == {'v'} and len(phi_table(judged)) == 1


@pytest.mark.parametrize('classes', [2, 4])
@pytest.mark.parametrize('seed', [0, 1])
def test_a_twin_has_the_same_confusion_and_other_places(classes, seed):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, 400)
    given = (
        rng.dirichlet(np.ones(classes), 400) * 0.5
        + 0.5 * np.eye(classes)[np.where(rng.random(400) < 0.25, rng.integers(0, classes, 400), truth)]
    )
    dealt = deal_within(given, truth, seed)
    for k in range(classes):  # the same labels within each class, down to the last digit
        assert sorted(map(tuple, dealt[truth == k])) == sorted(map(tuple, given[truth == k]))
    wrong, other = given.argmax(1) != truth, dealt.argmax(1) != truth
    assert wrong.sum() == other.sum() and (wrong & other).sum() < 0.6 * wrong.sum()
    assert (deal_within(given, truth, seed) == dealt).all() and not (deal_within(given, truth, seed + 1) == dealt).all()


def test_a_twin_of_choices_agrees_with_people_as_often():
    rng = np.random.default_rng(5)
    pairs = to_pairs(make_rows([dict(prompt=f'p{i}', chosen=f'y{i}', rejected=f'n{i}') for i in range(100)], 'preferences'), 0)
    human = given_labels(pairs)
    weak = label_pairs(pairs, np.stack([rng.normal(2 * human.prob_a - 1, 1.5), np.zeros(100)], 1), 'weak:pico')
    twin = deal_choices(weak, human, pairs, 0)

    def sure(x):
        return np.sort(np.where(human.prob_a > 0.5, x.prob_a, 1 - x.prob_a))

    assert sure(twin) == pytest.approx(sure(weak)) and not np.allclose(twin.prob_a, weak.prob_a)
    assert twin.rows['source'][0] == 'twin:pico'


def test_a_twin_of_answers_is_wrong_as_often():
    gold = [f'a{i % 7}' for i in range(50)]
    assert sum(x != y for x, y in zip(deal_answers(gold, 12, 0), gold, strict=True)) == 12


def test_predictions_and_items_say_who_was_right():
    p = pd.DataFrame(dict(role='floor', method='m', weak='w', strong='', seed=0, id=list('ab'), label=[1, 1], p0=[0.3, 0.8], p1=[0.7, 0.2]))
    assert judge_predictions(p, dict(a='g', b='g'))[['right', 'said', 'confidence']].to_numpy().tolist() == [[1, '1', 0.7], [0, '0', 0.8]]
    line = dict(role='student', method='m', weak='w', strong='s', seed=0, id='a')
    items = pd.DataFrame([line | dict(metric='accuracy', value=1.0), line | dict(metric='margin', value=2.0)])
    assert judge_items(items, 'accuracy', {}).iloc[0][['right', 'group']].tolist() == [1, 'a']


def test_where_nothing_is_right_or_wrong_that_is_said():
    judged = pd.concat([arm('floor', 'm', {0}), arm('student', 's', {1})], ignore_index=True)
    assert why_no_inheritance(None) == why_no_inheritance(judged.assign(right=3.5)) == NEITHER
    assert why_no_inheritance(judged) == '' and why_no_inheritance(judged.query('role != "floor"')) == 'no supervisor was tested'


@pytest.mark.parametrize('settings, said', [
    (dict(task='gender'), 'stories of gender are neither right nor wrong'),
    (dict(data='mine.jsonl', judge='scholar', concept='that of a pirate'), 'a rating is neither right nor wrong'),
])
def test_a_twin_needs_answers_that_are_right_or_wrong(settings, said):
    with pytest.raises(ConfigError, match=said): fill_demonstrations(dict(settings, twin=True))
    assert fill_demonstrations(dict(task='math', twin=True)).twin


def test_a_twin_refuses_scores_that_say_neither_right_nor_wrong(monkeypatch):
    "A count of words would make a twin without a single error"
    context = SimpleNamespace(
        config=SimpleNamespace(judge='count'),
        rows=SimpleNamespace(unlabelled=SimpleNamespace(score=lambda said: {'count': np.array([1., 4.])}, gold=['a', 'b'])),
        seed=0,
    )
    monkeypatch.setattr(demonstration_arms, 'scores_by_function', lambda judge: True)
    monkeypatch.setattr(demonstration_arms, 'task_measures', lambda config: ('count', 'count'))
    with pytest.raises(DataError, match='count gives numbers other than 1 and 0'):
        demonstration_arms.twin_arm(context, SimpleNamespace(weak='pico', extra={'given': ['x', 'y']}))


def test_names_of_twins():
    assert [is_twin(m) for m in ('twin', 'dpo twin', 'twin, xent', 'twins', 'dpo weak')] == [True, True, True, False, False]


def test_outcomes_cover_everything():
    rng = np.random.default_rng(0)
    a, b, same = rng.integers(0, 2, 50), rng.integers(0, 2, 50), rng.integers(0, 2, 50).astype(bool)
    assert set(outcomes(a, b, same)) == {'copied', 'other error', 'corrected', 'newly wrong', 'kept'}
