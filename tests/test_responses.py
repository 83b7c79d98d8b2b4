"""Scores of sampled responses: pitfall 20, a scorer that turns failure into success. Each test was seen to fail on the mutation that its
comment names"""
import numpy as np
import pandas as pd
import pytest

from w2s.errors import DataError
from w2s.evaluate.intervals import difference_table, interval_table
from w2s.evaluate.metrics import metric_rows
from w2s.evaluate.responses import each, failures, lengths, longer_wins, outcomes, reward_scores, score_responses, scored_by_all, win_rate

PROMPTS = [f'Q{i}' for i in range(50)]
TEXTS = [[f' answer {i} {k}' for k in range(4)] for i in range(50)]


def drawn(seed, mean=0., rows=50, samples=4): return np.random.default_rng(seed).normal(mean, size=(rows, samples))


def test_pitfall_20_a_scorer_that_fails_on_a_tenth():
    "Missing, never 0; counted; the range if all had been worst or best. Mutation: 0 for None"
    calls = []
    def flaky(prompt, text):
        calls.append(text)
        if len(calls) % 10 == 0: raise TimeoutError('busy')
        return .75
    scores = score_responses(each(flaky, (TimeoutError, ConnectionError)), PROMPTS, TEXTS)
    assert np.isnan(scores).sum() == 20 and np.nanmean(scores) == .75
    assert failures(scores, 'student', 0, 1) == (
        'student: incomplete, the scorer failed on 20 of 200 responses; the mean of the others is 0.750, '
        'with the missing ones it would lie between 0.675 and 0.775'
    )
    assert failures(np.array([[.2, np.nan, .4]]), 'x').endswith('between 0.267 and 0.333')
    whole = scored_by_all({'a': scores, 'b': np.ones((50, 4))})
    assert whole.sum() == 50 - len(np.unique(np.where(np.isnan(scores))[0]))
    for wrong in (
        lambda: win_rate(scores, np.ones((50, 4))),
        lambda: metric_rows(PROMPTS, reward_scores(scores, TEXTS), 'student', 'dpo', '', '', 0, 'x'),
    ):
        with pytest.raises(DataError): wrong()
    assert not np.isnan(scores[whole]).any()


def test_pitfall_20_only_named_exceptions_are_failures():
    def broken(prompt, text): raise KeyError('a bug')
    with pytest.raises(KeyError): score_responses(each(broken, (TimeoutError,)), PROMPTS, TEXTS)
    with pytest.raises(KeyError): score_responses(each(broken), PROMPTS, TEXTS)


@pytest.mark.parametrize('lost', [1, 199, -1])
def test_pitfall_20_scores_that_are_lost_or_added_stop(lost):
    "Mutation: zip without strict, which scores the rows that it has"
    with pytest.raises(DataError, match=f'student: the scorer gave {200 - lost} scores for 200 responses'):
        score_responses(lambda p, r: [1.]*(200 - lost), PROMPTS, TEXTS, 'student')


def test_pitfall_20_nothing_in_common_is_no_nan():
    with pytest.raises(DataError, match='a: incomplete, the scorer failed on all 200'):
        scored_by_all({'a': np.full((50, 4), np.nan), 'b': np.ones((50, 4))})
    one, two = np.ones((2, 1)), np.ones((2, 1))
    one[0], two[1] = np.nan, np.nan
    with pytest.raises(DataError, match='no row has all its scores'): scored_by_all({'a': one, 'b': two})
    with pytest.raises(DataError, match='different numbers of rows'): scored_by_all({'a': one, 'b': np.ones((3, 1))})
    with pytest.raises(DataError, match='50 against 49 rows'): win_rate(np.ones((50, 4)), np.ones((49, 4)))


def test_prompts_and_samples_reach_the_scorer_in_pairs():
    seen = []
    def scorer(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return list(range(len(responses)))
    scores = score_responses(scorer, PROMPTS, TEXTS)
    assert seen == [(p, t) for p, row in zip(PROMPTS, TEXTS, strict=True) for t in row]
    assert (scores == np.arange(200).reshape(50, 4)).all()
    chat = [[dict(role='user', content=p)] for p in PROMPTS]
    assert score_responses(each(lambda p, r: float(len(p[0]['content']))), chat, TEXTS)[10, 0] == 3
    for bad in ([row[:3] if i == 7 else row for i, row in enumerate(TEXTS)], [[] for _ in TEXTS]):
        with pytest.raises(DataError, match='samples; each must have the same number'): score_responses(scorer, PROMPTS, bad)
    with pytest.raises(DataError, match='infinite'): score_responses(lambda p, r: [1.]*199 + [float('-inf')], PROMPTS, TEXTS)


def test_win_tie_lose_is_the_obvious_loop():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 4, (30, 5)) / 10, rng.integers(0, 4, (30, 3)) / 10
    slow = np.array([[np.mean([np.sign(x - y) == s for x in p for y in q]) for s in (1, 0, -1)] for p, q in zip(a, b, strict=True)])
    assert np.allclose(outcomes(a, b), slow) and (slow[:, 1] > 0).any()
    assert np.allclose(outcomes(a, b)[:, ::-1], outcomes(b, a)) and np.allclose(outcomes(a, b).sum(1), 1)
    assert np.allclose(win_rate(a, b) + win_rate(b, a), 1)
    assert np.allclose(win_rate(a[:, ::-1], b), win_rate(a, b)) # the order of samples says nothing
    noise = 1e-8*rng.normal(size=a.shape)
    assert (outcomes(a + noise, b) == outcomes(a, b)).all()     # Mutation: tie = 0


@pytest.mark.parametrize('samples', [1, 2, 8])
def test_equal_arms_win_half_and_a_better_one_what_theory_says(samples):
    "P(a > b) = Φ(d/√2) for two normal scores a distance d apart"
    rows = 40_000 // samples
    assert abs(win_rate(drawn(1, rows=rows, samples=samples), drawn(2, rows=rows, samples=samples)).mean() - .5) < .01
    assert abs(win_rate(drawn(1, 1., rows, samples), drawn(2, rows=rows, samples=samples)).mean() - .7602) < .01


def test_all_pairs_of_samples_use_what_is_there():
    "Four samples against four leave less noise than sample against sample"
    pairs = [win_rate(drawn(i), drawn(1000 + i)).mean() for i in range(200)]
    diagonal = [np.mean(drawn(i) > drawn(1000 + i)) for i in range(200)]
    assert np.std(pairs) < .95*np.std(diagonal)


def test_pitfall_20_a_judge_of_length_is_seen():
    """Same quality, other lengths: the win rate is that of counting words; on equal lengths it is one half. Mutation: letters of the whole
    row counted"""
    rng = np.random.default_rng(0)
    short = [[' word'*int(n) for n in rng.integers(1, 10, 4)] for _ in range(200)]
    long = [[' word'*int(n) for n in rng.integers(5, 20, 4)] for _ in range(200)]
    prompts = ['Q']*200
    by_words, fair = each(lambda p, t: len(t.split())/7), each(lambda p, t: 1.)
    a, b = (reward_scores(score_responses(s, prompts, long), long, score_responses(s, prompts, short), short) for s in (by_words, fair))
    assert np.allclose(a['win_rate'], a['longer_rate']) and a['win_rate'].mean() > .8
    assert (b['win_rate'] == .5).all() and np.allclose(b['longer_rate'], a['longer_rate'])
    x, y = lengths(long), lengths(short)
    assert longer_wins(x, y, x, y)[0] == 1 and longer_wins(-x, -y, x, y)[0] == 0
    share, n = longer_wins(np.ones_like(x), np.ones_like(y), x, y)
    assert np.isnan(share) and n == 0
    random = longer_wins(drawn(1, rows=200), drawn(2, rows=200), x, y)
    assert abs(random[0] - .5) < .05 and random[1] == (x[:, :, None] != y[:, None]).sum()


def test_pitfall_20_intervals_know_the_seeds_and_the_rows():
    "From scores to intervals and paired differences; the noise of seeds is in them"
    ids, who = [f'r{i}' for i in range(50)], dict(weak='', strong='base', task='x')
    frames = []
    for seed in range(3):
        start = drawn(seed)
        for role, method, shift in (('baseline', 'sft', 0.), ('student', 'dpo weak', .5 + .2*seed)):
            x = start if role == 'baseline' else drawn(100 + seed, shift)
            frames.append(metric_rows(ids, reward_scores(x, TEXTS, start, TEXTS), role, method, seed=seed, **who))
    items = pd.concat(frames)
    table = interval_table(items).set_index(['role', 'metric'])
    assert set(items['metric']) == {'gold_reward', 'words', 'win_rate', 'win', 'tie', 'lose', 'longer_rate'}
    assert table.loc[('baseline', 'win_rate'), 'value'] == .5
    student = table.loc[('student', 'win_rate')]
    assert student['low'] < student['value'] < student['high'] and student['seeds'] == 3 and student['n'] == 50
    row = difference_table(items, 'gold_reward', [(('student', 'dpo weak'), ('baseline', 'sft'))]).iloc[0]
    assert row['low'] < .7 < row['high']
    assert set(reward_scores(drawn(0), TEXTS)) == {'gold_reward', 'words'}
