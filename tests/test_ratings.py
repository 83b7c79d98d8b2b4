"Ratings by a judge: strict reading, failures that stay missing, and a local model that is asked as any other"
import random

import numpy as np
import pytest

from w2s.errors import ConfigError, DataError
from w2s.evaluate.ratings import (
    HOLES,
    MATHS,
    PERSONA,
    RUBRICS,
    Rubric,
    as_scores,
    ask_model,
    ask_often,
    parse_ratings,
    rate,
    rate_by,
    rating_question,
    rating_report,
    rating_scorer,
    read_replies,
)
from w2s.evaluate.responses import failures, score_responses, scored_by_all
from w2s.models.load import load_base
from w2s.train.generate import GenerateSettings, prompt_ids

TWO = Rubric('{prompt} {response}', ('content', 'style'))
SETTINGS = GenerateSettings(max_tokens=12, temperature=.8, samples=4)


@pytest.fixture(scope='module')
def judge(tmp_path_factory):
    "A tiny model that has read ratings"
    from w2s.models.tiny import pretrain, tiny_model
    texts = [
        f'Say {w}{e} => [[{n}]] [[{m}]]' for w in ('tea', 'milk', 'soup', 'salt') for e, n, m in ((', please.', 9, 7), (' now!', 2, 4))
    ] * 6
    folder = tiny_model(tmp_path_factory.mktemp('judge')/'model', texts, vocab_size=300)
    pretrain(folder, texts, steps=80)
    return load_base(str(folder))


# --- reading

def test_only_whole_ratings_in_range_are_read():
    rng = random.Random(0)
    for _ in range(2000):
        n, low, high = rng.randint(1, 3), rng.randint(0, 1), rng.randint(2, 12)
        given = [rng.randint(0, 14) for _ in range(rng.randint(0, 4))]
        text = (
            rng.choice(['', 'I say: '])
            + rng.choice([' ', ', ', '\n']).join(f'[[{x}]]' for x in given)
            + rng.choice(['', '.', ' [3]', ' 7'])
        )
        read, good = parse_ratings(text, n, low, high), len(given) == n and all(low <= x <= high for x in given)
        assert (read is not None) == good and (not good or read.tolist() == given)


@pytest.mark.parametrize(
    'text',
    [
        '[[7.5]] [[8]] [[9]]',
        '[[-1]] [[8]] [[9]]',
        '[[x]] [[8]] [[9]]',
        '[[]] [[8]] [[9]]',
        '[[7]\n] [[8]]',
        '[[7]] [[8]] [[',
        '[[1e1]] [[8]]',
    ],
)
def test_brackets_that_hold_no_whole_number_are_not_passed_over(text):
    "A pattern for digits alone would find the wanted two in the first ones and shift them"
    assert parse_ratings(text, 2, 1, 10) is None


def test_means_are_over_readable_replies_alone():
    x = read_replies([['[[8]] [[6]]', '[[8]]', '', None, '[[10]] [[2]]', '[[0]] [[0]]']], TWO)
    assert x.values.tolist() == [[9, 4]] and (x.read[0], x.asked[0]) == (2, 6)
    assert x.spread[0] == pytest.approx([2**.5, 8**.5])


# --- failures (pitfall 20)

def test_a_judge_that_fails_on_a_tenth_is_incomplete_and_not_bad():
    prompts, answers = ['Say'] * 100, [str(i) for i in range(100)]
    def moody(question):
        if question.endswith('0'): raise TimeoutError
        return '[[8]] [[6]]'
    x = rate_by(ask_often(moody, 2, (TimeoutError,)), TWO, prompts, answers)
    assert x.failed.sum() == 10 and np.isnan(x.values[x.failed]).all()
    report = rating_report(x)['content']
    assert (report['mean'], report['failed'], report['rows']) == (8, 10, 100)
    assert report['lowest'] == pytest.approx(.9*8 + .1*1) and report['highest'] == pytest.approx(.9*8 + .1*10)
    scores = score_responses(rating_scorer(ask_often(moody, 2, (TimeoutError,)), TWO, 'content'), prompts, [[a] for a in answers])
    assert np.isnan(scores).sum() == 10 and 'failed on 10 of 100' in failures(scores, 'judge')
    assert scored_by_all(dict(a=scores, b=np.ones((100, 1)))).sum() == 90


def test_all_missing_is_not_a_number():
    x = rate_by(lambda questions: [None for _ in questions], TWO, ['a', 'b'], ['c', 'd'])
    report = rating_report(x)['style']
    assert x.failed.all() and np.isnan(report['mean']) and (report['lowest'], report['highest']) == (1, 10)
    assert 'nan' in repr(x) and np.isnan(as_scores(x)['style']).all()


def test_other_exceptions_stop_the_run():
    def broken(question): raise KeyError(question)
    with pytest.raises(KeyError): rate_by(ask_often(broken, 1, (TimeoutError,)), TWO, ['a'], ['b'])


def test_nothing_to_rate():
    x = rate_by(lambda questions: 1/0, TWO, [], [])
    assert x.values.shape == (0, 2) and 'nan' in repr(x) and rating_report(x)['content']['rows'] == 0


# --- rubrics

@pytest.mark.parametrize('name', RUBRICS)
def test_rubrics_fill_all_their_holes(name):
    form = RUBRICS[name]
    text = rating_question(form, 'PROMPT', 'RESPONSE {prompt} {gold}', 'GOLD', 'CONCEPT')
    assert 'RESPONSE {prompt} {gold}' in text and not any(h in text.replace('RESPONSE {prompt} {gold}', '') for h in HOLES)
    assert ('GOLD' in text, 'CONCEPT' in text) == ('{gold}' in form.text, '{concept}' in form.text)


def test_what_a_rubric_needs_must_be_given():
    with pytest.raises(ConfigError, match='hole {gold}'): rate_by(lambda q: [[]], MATHS, ['a'], ['b'])
    with pytest.raises(ConfigError, match='hole {concept}'): rate_by(lambda q: [[]], PERSONA, ['a'], ['b'])
    with pytest.raises(DataError, match='2 right answers'): rate_by(lambda q: [[]], MATHS, ['a'], ['b'], gold=['1', '2'])
    with pytest.raises(ConfigError, match='different names'): Rubric('{prompt}{response}', ('a', 'a'))


# --- a local model

def test_a_local_model_rates(judge):
    form = Rubric('{prompt}{response} =>', ('kind', 'long'))
    prompts, answers = ['Say tea', 'Say milk', 'Say soup', 'Say salt'], [', please.', ' now!'] * 2
    x = rate(judge, form, prompts, answers, settings=SETTINGS, seed=3, quiet=True)
    assert x.asked.tolist() == [4] * 4 and not x.failed.any()
    assert (x.values >= 1).all() and (x.values <= 10).all()
    again = rate(judge, form, prompts[::-1], answers[::-1], settings=SETTINGS, seed=3, quiet=True)
    alone = [rate(judge, form, [p], [a], settings=SETTINGS, seed=3, quiet=True).values[0] for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_array_equal(x.values, again.values[::-1])
    np.testing.assert_array_equal(x.values, alone)


def test_questions_without_room_fail_and_are_not_cut(judge):
    form = Rubric('{prompt}{response} =>', ('kind', 'long'))
    x = rate(judge, form, ['Say tea', 'Say ' + 'tea '*300], [', please.'] * 2, settings=SETTINGS, quiet=True)
    assert x.failed.tolist() == [False, True] and x.asked.tolist() == [4, 4]
    assert ask_model(judge, SETTINGS, quiet=True)(['tea '*300]) == [[None] * 4]


def test_chat_rubrics_without_a_template_are_plain_paragraphs(judge):
    "What a judge without a chat template reads is the same as the paragraphs written by hand"
    messages = [dict(role='user', content='a b')]
    assert prompt_ids(judge.tokenizer, [messages]) == prompt_ids(judge.tokenizer, ['Human: a b\n\nAssistant:'])
    replies = rate(judge, Rubric('{prompt} {response}', ('x',), chat=True), ['a'], ['b'], settings=SETTINGS, quiet=True)
    assert replies.asked.tolist() == [SETTINGS.samples]
