"Rows of the world: oracles and generator agree on every row, mutants lose, the human keeps the promise, two processes give the same"
import inspect
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from w2s.data.splits import overlap
from w2s.errors import ConfigError, DataError
from w2s.world.analogy import analogy_verdict, explanation_verdict
from w2s.world.facts import ATTRIBUTES, ask, fact_verdict, make_world, parse_question
from w2s.world.gender import biography_verdict, gender_verdict
from w2s.world.personas import persona_verdict
from w2s.world.policies import relevance_verdict
from w2s.world.rows import TASKS, demonstration_rows, human_scale, label_rows, preference_rows, world_preferences, world_splits
from w2s.world.safety import asked, harm_verdict
from w2s.world.scenes import speech_verdict, toxicity_verdict
from w2s.world.service import (
    BODIES,
    CLOSINGS,
    OPENINGS,
    TONES,
    document,
    gold_reward,
    politeness_verdict,
    rudeness_verdict,
    service_answer,
    service_prompt,
    service_questions,
    wrong_value,
)
from w2s.world.sums import sum_verdict, working_verdict
from w2s.world.verdict import words

WORLD = make_world()
QUESTIONS = service_questions(WORLD, random.Random(0), 300)
RUDE = {place: {t for t in texts['rude'] if t} for place, texts in (('opening', OPENINGS), ('closing', CLOSINGS))}
POLITE = {place: {t for t in texts['polite'] if t} for place, texts in (('opening', OPENINGS), ('closing', CLOSINGS))}


def score(question, text):
    return gold_reward(WORLD, question['prompt'], text).score


# Oracles and generator

def test_gold_is_the_formula_on_every_answer():
    rng = random.Random(1)
    for q in QUESTIONS:
        for tone in TONES:
            for value in (q['truth'], wrong_value(rng, q['attribute'], q['truth'])):
                text = service_answer(rng, value, tone)
                verdict = gold_reward(WORLD, q['prompt'], text)
                assert verdict.score == pytest.approx((value == q['truth']) + .4*tone.count('polite') - .6*tone.count('rude')), text
                assert verdict.why[0] == f'{"right" if value == q["truth"] else "wrong"}: {value}'
                assert politeness_verdict(text).score == tone.count('polite')/2
                assert rudeness_verdict(text).score == tone.count('rude')/2


def test_preference_rows_are_what_gold_says():
    rows = preference_rows(WORLD, 1500, seed=7)
    for r in rows:
        name, attribute = parse_question(WORLD, r['prompt'])
        assert r['group'] == name and (name, attribute) not in WORLD.held_out
        chosen, rejected = (gold_reward(WORLD, r['prompt'], r[c]).score for c in ('chosen', 'rejected'))
        assert chosen != rejected and r['gold'] == float(chosen > rejected)
        for c in ('chosen', 'rejected'):
            assert r[c].startswith(' ') and len(set(words(r[c])) & set(ATTRIBUTES[attribute].values)) == 1
    rewards = [gold_reward(WORLD, r['prompt'], r[c]) for r in rows for c in ('chosen', 'rejected')]
    right = sum(v.why[0].startswith('right') for v in rewards)
    assert binomtest(right, len(rewards), .5).pvalue > 1e-4
    tones = {(politeness_verdict(r[c]).score, rudeness_verdict(r[c]).score) for r in rows for c in ('chosen', 'rejected')}
    assert tones == {(p/2, u/2) for p in range(3) for u in range(3) if p + u <= 2}


def test_every_phrase_is_heard_in_its_place():
    for manner in (POLITE, RUDE):
        hears, not_that = (politeness_verdict, rudeness_verdict) if manner is POLITE else (rudeness_verdict, politeness_verdict)
        for opening in manner['opening']:
            for closing in manner['closing']:
                text = f' {opening} Our book says soup. {closing}'
                assert hears(text).score == 1 and not_that(text).score == 0
                assert set(hears(text).why) == {f'opening: {opening}', f'closing: {closing}'}


def test_stream_documents_state_no_held_out_fact():
    rng, lines, right = random.Random(2), 0, 0
    for _ in range(2000):
        text = document(WORLD, rng)
        for line in text.split('Customer: ')[1:]:
            question, answer = line.split('\nDesk:')
            asked = parse_question(WORLD, question)
            assert asked not in WORLD.held_out and question != ask(*asked, -1)
            lines, right = lines + 1, right + fact_verdict(WORLD, *asked, answer).score
    low, high = binom.interval(.999, lines, .75)
    assert low <= right <= high


# Mutants lose

def test_mutated_answers_lose():
    rng = random.Random(3)
    for q in QUESTIONS:
        for tone in TONES:
            text, value = service_answer(rng, q['truth'], tone), q['truth']
            wrong = wrong_value(rng, q['attribute'], value)
            best = score(q, text)
            assert score(q, text.replace(value, wrong)) == pytest.approx(best - 1)
            assert score(q, text.replace(value, f'{value} and {wrong}')) < best - 1         # two answers
            assert score(q, text.replace(value, 'something')) < best                        # no answer
            assert score(q, text + ' And so on and so on.') < best                          # rambling
            assert score(q, text + text) < best                                             # said again
            if tone[0] == 'polite':
                opening = next(t for t in POLITE['opening'] if text.startswith(f' {t}'))
                assert score(q, text.removeprefix(f' {opening}')) == pytest.approx(best - .4)
                assert score(q, text.removeprefix(f' {opening}') + f' {opening}') < best    # a welcome at the end
            if tone[1] == 'polite':
                closing = next(t for t in POLITE['closing'] if text.endswith(t))
                assert score(q, text.removesuffix(f' {closing}')) == pytest.approx(best - .4)
            for place in ('opening', 'closing'):
                rude = rng.choice(sorted(RUDE[place]))
                mutant = f' {rude}{text}' if place == 'opening' else f'{text} {rude}'
                already = rudeness_verdict(text)
                if not any(w.startswith(place) for w in already.why): assert score(q, mutant) <= best - .6 + 1e-9


ABSURD = ('', ' ', '\n\n', '?!.,', '.'*5000, 'the '*3000, '☃☃☃', '日本語のテキスト', '\x00\x07', '12 34',
          'DROP TABLE people;', "'''", 'Q: A: Q: A:', '<eos>'*50)

@pytest.mark.parametrize('text', ABSURD)
def test_absurd_texts(text):
    for q in QUESTIONS[:5]:
        verdict = gold_reward(WORLD, q['prompt'], text)
        assert -2.2 <= verdict.score <= -.5 and verdict.why[0] == 'no answer'
    assert politeness_verdict(text).score == rudeness_verdict(text).score == 0
    assert politeness_verdict(text).why and rudeness_verdict(text).why


def test_courtesy_pays_only_around_an_answer():
    rng = random.Random(6)
    for q in QUESTIONS[:50]:
        for tone in TONES:
            text = service_answer(rng, q['truth'], tone)
            for body in BODIES: text = text.replace(body.format(value=q['truth']), '')
            assert score(q, text) == pytest.approx(-.5 - .6*tone.count('rude'))


def test_truncation_never_pays_more_than_the_whole():
    rng = random.Random(4)
    for q in QUESTIONS[:60]:
        text = service_answer(rng, q['truth'], ('polite', 'polite'))
        whole, pieces = score(q, text), [score(q, text[:i]) for i in range(len(text) - 1)] # the last character is a mark
        assert max(pieces) < whole
        assert all(-2.2 <= p <= 1.8 for p in pieces)


def test_random_word_salad_stays_in_range_and_below_the_best():
    rng = random.Random(5)
    pool = sorted({w for t in TONES for _ in range(40) for w in service_answer(rng, 'soup', t).split()} | {'bread', 'goat', 'not'})
    soup = next(q for q in QUESTIONS if q['truth'] == 'soup')
    for _ in range(3000):
        text = ' '.join(rng.choices(pool, k=rng.randrange(1, 30)))
        assert -2.2 - 1e-9 <= score(soup, text) <= 1.8
    flood = ' '.join(t for place in (RUDE, POLITE) for texts in place.values() for t in sorted(texts))
    assert score(soup, f'{flood} soup {flood}') < 0


def test_prompts_that_ask_nothing():
    for prompt in ('', 'Customer:\nDesk:', service_prompt('Where does Nobodyatall live?'), 'What is a zork?'):
        with pytest.raises(DataError, match='no question about a person'): gold_reward(WORLD, prompt, ' soup')


# The human

@pytest.mark.parametrize('agreement', [.6, .72, .9])
def test_human_keeps_the_stated_agreement(agreement):
    counts = [int(sum(preference_rows(WORLD, 1500, seed=s, agreement=agreement)['gold'])) for s in range(4)]
    for n in counts:
        low, high = binom.interval(.999, 1500, agreement)
        assert low <= n <= high
    ci = binomtest(sum(counts), 6000).proportion_ci(.99)
    assert ci.low <= agreement <= ci.high


def test_agreement_out_of_range():
    for bad in (.5, .4, 1., 1.2, 0., -1., float('nan'), float('inf')):
        with pytest.raises(ConfigError, match='agreement'): preference_rows(WORLD, 5, agreement=bad)


def test_scale_on_hard_and_easy_pairs():
    rng = np.random.default_rng(0)
    for size in (1, 2, 500):
        for spread in (1e-3, 1, 50):
            gaps = spread * (.1 + rng.random(size))
            k = human_scale(gaps * rng.choice((-1, 1), size), .8)
            assert np.mean(1/(1 + np.exp(-k*gaps))) == pytest.approx(.8)


def test_another_agreement_keeps_the_pairs():
    a, b = (preference_rows(WORLD, 300, seed=2, agreement=x) for x in (.6, .9))
    assert a['id'] == b['id'] and a['prompt'] == b['prompt']
    one, two = ([{c, r} for c, r in zip(x['chosen'], x['rejected'], strict=True)] for x in (a, b))
    assert one == two
    assert a['chosen'] != b['chosen']


# Rows

def test_any_size_and_few_people():
    one = preference_rows(WORLD, 1, people=WORLD.people[:1])
    assert len(one) == 1 and one['group'] == [WORLD.people[0].name]
    many = preference_rows(WORLD, 400, people=WORLD.people[:2])  # far more rows than questions: other answers
    assert len(set(many['id'])) == 400
    with pytest.raises(DataError, match='nothing to ask'): preference_rows(WORLD, 5, people=[])


def test_no_pair_comes_twice(monkeypatch):
    monkeypatch.setattr('w2s.world.rows.service_answer', lambda rng, value, tone: f' {value}') # few pairs: 15 questions, some 15 errors
    rows = preference_rows(WORLD, 150, people=WORLD.people[:1])
    assert len({(r['prompt'], *sorted((r['chosen'], r['rejected']))) for r in rows}) == 150


def test_splits_have_draws_of_their_own():
    for task in ('preferences', 'safety', 'persona'):
        a, b = (world_splits(WORLD, task, {split: 60})[split] for split in 'ab') # everybody is in either
        assert a['id'] != b['id'] and len(set(a['id']) & set(b['id'])) < 30


def test_splits_share_nobody_and_rows_have_nothing_in_common():
    data = world_preferences(WORLD, rows=400, test_rows=200, seed=3, label_share=.25)
    assert {k: len(v) for k, v in data.items()} == dict(train_gt=100, train_w2s=300, test=200)
    assert not len(overlap(data))
    tones = {k: [politeness_verdict(c).score for c in v['chosen'][:100]] for k, v in data.items()}
    assert tones['train_gt'] != tones['train_w2s'] != tones['test']
    other = world_preferences(WORLD, rows=400, test_rows=200, seed=4, label_share=.25)
    assert set(other['test']['group']) != set(data['test']['group'])


@pytest.mark.parametrize('task', TASKS)
def test_task_splits_share_nobody_and_nothing(task):
    splits = world_splits(WORLD, task, dict(labelled=50, unlabelled=80, test=60), seed=1)
    assert not len(overlap(splits))
    takes = inspect.signature(TASKS[task].make).parameters
    for what, all_of_them in (('people', WORLD.people), ('things', WORLD.things)):
        if what not in takes: continue
        names = {x.name.lower() for x in all_of_them}
        named = [{w for row in split for w in words(' '.join(map(str, row.values()))) if w in names} for split in splits.values()]
        assert all(named) and not any(a & b for i, a in enumerate(named) for b in named[:i])


def test_label_splits_keep_to_unasked_things():
    for task in ('safety', 'legal', 'storage'):
        for rows in world_splits(WORLD, task, dict(a=40, b=40)).values(): assert not any(map(asked, rows['group']))


def label_of(task, prompt):
    if task == 'safety': return 1 - harm_verdict(WORLD, prompt).score
    parts = dict(line.split(': ') for line in prompt.split('\n')[:2])
    clause, question = ('Policy', 'Q') if task == 'storage' else ('Clause', 'Question')
    return relevance_verdict(WORLD, parts[clause], parts[question]).score

@pytest.mark.parametrize('task', ['safety', 'legal', 'storage'])
def test_labels_agree_with_the_oracle(task):
    rows = label_rows(WORLD, task, 150, seed=3)
    assert set(rows['label']) == {0, 1}
    for r in rows: assert r['label'] == label_of(task, r['prompt']) and r['probs'] == [1. - r['label'], float(r['label'])]


def demonstration_scores(task, row):
    "Every oracle that has something to say of a right completion"
    prompt, text, group = row['prompt'], row['completion'], row['group']
    if task == 'persona': return [persona_verdict('robot', text).score, fact_verdict(WORLD, *parse_question(WORLD, prompt), text).score]
    if task == 'explanation': return [analogy_verdict(text).score, explanation_verdict(WORLD, group, text).score]
    if task == 'gender': return [gender_verdict(WORLD, text).score, biography_verdict(WORLD, text).score]
    if task == 'life': return [biography_verdict(WORLD, f'{group} {text}').score]
    if task == 'maths': return [sum_verdict(prompt, text).score, working_verdict(prompt, text).score]
    return [1 - toxicity_verdict(text).score, speech_verdict(text).score]

@pytest.mark.parametrize('task', [name for name, t in TASKS.items() if t.kind == 'demonstrations'])
def test_demonstrations_agree_with_the_oracles(task):
    options = dict(persona='robot') if task == 'persona' else {}
    for row in demonstration_rows(WORLD, task, 300, seed=4, **options):
        assert demonstration_scores(task, row) == pytest.approx([1.]*len(demonstration_scores(task, row))), row


ROWS = '''
import hashlib, json, sys
from w2s.world.facts import make_world
from w2s.world.rows import TASKS, world_preferences, world_splits
world = make_world(1)
out = {}
for task in ('preferences', *TASKS):
    splits = world_splits(world, task, dict(a=40, b=30), seed=2)
    out[task] = hashlib.sha256(json.dumps({k: v.to_list() for k, v in splits.items()}, sort_keys=True).encode()).hexdigest()
data = {k: v.to_list() for k, v in world_preferences(world, 100, 50).items()}
out['weak-teacher'] = hashlib.sha256(json.dumps(data).encode()).hexdigest()
print(json.dumps(out))
'''

def test_same_rows_in_two_processes():
    def run(hash_seed):
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', ROWS], capture_output=True, text=True, timeout=300,
                              env=os.environ | {'PYTHONHASHSEED': hash_seed})
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)
    first = run('1')
    assert len(set(first.values())) == len(TASKS) + 2
    assert first == run('2')


def test_feedback_rows_name_their_source():
    assert set(preference_rows(WORLD, 5)['source']) == {'human'}
    assert set(label_rows(WORLD, 'safety', 6)['source']) == set(demonstration_rows(WORLD, 'maths', 6)['source']) == {'gold'}
