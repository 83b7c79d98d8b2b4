"Safety and policies: the oracles agree with the generator on every row, mutated texts change the verdict, absurd ones are handled"
import hashlib
import json
import random
import re
import subprocess
import sys

import pytest

from w2s.errors import DataError
from w2s.world.facts import KINDS_OF_THINGS, make_world, split_people
from w2s.world.policies import (
    GOODS,
    OTHERS,
    SHARES,
    SHELF_OF,
    SHELVES,
    SILENT,
    STORED,
    TOPICS,
    clause_of_sort,
    legal_questions,
    make_clause,
    make_policy,
    make_question,
    policy_prompt,
    policy_verdict,
    relevance_prompt,
    relevance_verdict,
    storage_questions,
    topic_of,
)
from w2s.world.policies import document as policy_document
from w2s.world.policies import short_document as short_policy
from w2s.world.safety import (
    DEEDS,
    advice,
    advice_verdict,
    asked,
    distinct_rows,
    harm_verdict,
    harmful,
    request,
    safety_questions,
    things_named,
    unasked_things,
)
from w2s.world.safety import document as safety_document
from w2s.world.safety import short_document as short_safety
from w2s.world.verdict import words

WORLDS = [make_world(0), make_world(7, people=60, things=120)]
ABSURD = ['', ' ', '\n\n', '?', 'Q:', 'yes', 'any any any', 'ünïcode ☃ 你好', '\x00\x01', 'A'*10_000,
          'fruit '*2000, "'s", 'Refund ' * 500, 'None', '{thing}', '1 2 3']


@pytest.fixture(params=WORLDS, ids=['800 people', '60 people'])
def world(request):
    return request.param


# The oracles agree with the generators

@pytest.mark.parametrize('form', [None, *range(-1, len(DEEDS))])
def test_every_safety_row(world, form):
    rows = safety_questions(world, 600, seed=3, form=form)
    for row in rows:
        verdict, thing = harm_verdict(world, row['prompt']), world.thing(row['thing'])
        assert row['label'] == 1 - verdict.score == int(not harmful(thing)), row
        assert row['response'] == (' no', ' yes')[row['label']] and row['group'] == thing.name and row['kind'] == thing.kind
        assert row['prompt'].endswith('\nSafe:') and thing.name in verdict.why[0] and thing.kind in verdict.why[0]
    assert sum(row['label'] for row in rows) == 300 and len({row['prompt'] for row in rows}) == 600


@pytest.mark.parametrize('form', [None, 0, 1, 2, -1])
def test_every_legal_row(world, form):
    rows = legal_questions(world, 600, seed=3, form=form)
    for row in rows:
        assert row['label'] == relevance_verdict(world, row['clause'], row['question']).score == (row['sort'] == 'relevant'), row
        same_topic, same_goods = topic_of(row['clause']) == row['topic'], SHELF_OF[row['kind']] in words(row['clause'])
        assert (
            row['sort'] == {(True, True): 'relevant', (True, False): 'wrong goods', (False, True): 'wrong topic'}[same_topic, same_goods]
        ), row
        assert row['prompt'] == relevance_prompt(row['clause'], row['question']) and row['group'] == row['thing']
    assert {sort: sum(row['sort'] == sort for row in rows)/600 for sort in SHARES} == pytest.approx(SHARES)
    assert len({row['prompt'] for row in rows}) == 600


def test_every_storage_row(world):
    for kinds, n in ((STORED, 100), (('trap', 'lamp', 'cloth'), 60), (('toy',), 12)):
        rows = storage_questions(world, n, seed=1, kinds=kinds)
        for row in rows:
            assert row['label'] == relevance_verdict(world, row['clause'], row['question']).score == (row['kind'] in kinds), row
        assert sum(row['label'] for row in rows) == n//2 and len({row['prompt'] for row in rows}) == n


def test_every_advice_and_policy(world):
    for seed in range(1500):
        rng = random.Random(seed)
        thing, topic, answered = rng.choice(world.things), rng.choice([*GOODS, *OTHERS]), rng.random() < .5
        question = request('Mira', 'Tovan', thing.name, rng.randrange(len(DEEDS)))
        assert advice_verdict(world, question, advice(thing, rng)).score == 1
        clauses, answer = make_policy(rng, topic, SHELF_OF[thing.kind] if topic in GOODS else None, answered, n=rng.randint(1, 5))
        policy, question = ' '.join(c.text for c in clauses), make_question(rng, topic, thing.name, rng.choice((None, -1)))
        assert policy_verdict(world, policy, question, answer).score == 1, (policy, question, answer)
        assert relevance_verdict(world, policy, question).score == answered == (answer != SILENT), (policy, question)
        assert policy_verdict(world, policy, question, SILENT).score == (not answered)


def answers(text):
    "The lines of a document that say yes or no, or tell how a tale ends"
    return [line for line in re.split(r'\n(?!A:|Safe:|Clause:|Relevant:|Q:)', text) if '. It is a ' not in line]


@pytest.mark.parametrize('make', [safety_document, short_safety, policy_document, short_policy])
def test_documents_are_true(world, make):
    rng = random.Random(5)
    for _ in range(3000):
        text = make(world, rng)
        for prompt, said in re.findall(r'Request: (.*)\nSafe: (\w+)', text):
            assert harm_verdict(world, prompt).score == (said == 'no'), text
        for question, said in re.findall(r'Q: ((?:May|Should|Can) [A-Z][a-z]+ .*)\nA: (.*)', text):
            assert advice_verdict(world, question, said).score, text
        question = ''.join(re.findall(r'Question: (.*)', text))
        for clause, said in re.findall(r'Clause: (.*)\nRelevant: (\w+)', text):
            assert relevance_verdict(world, clause, question).score == (said == 'yes'), text
        for kind, goods in re.findall(r'Any (\w+) counts as (\w+) goods', text): assert SHELF_OF[kind] == goods, text
        for policy, question, said in re.findall(r'Policy: (.*)\nQ: (.*)\nA: (.*)', text):
            assert policy_verdict(world, policy, question, said).score, text
        for thing, kind in re.findall(r'has a (\w+)\. It is a (\w+)', text): assert world.thing(thing).kind == kind, text


# What is held out

@pytest.mark.parametrize('make', [safety_document, short_safety, policy_document, short_policy])
def test_held_out_things_and_questions_never_occur(world, make):
    rng = random.Random(9)
    last = [DEEDS[-1].request, DEEDS[-1].told, *(t.questions[-1] for t in TOPICS.values())]
    held_out = [re.compile(re.sub(r'\\{\w+\\}', r'\\w+', re.escape(form))) for form in last]
    kinds_told = set()
    for _ in range(4000):
        text = make(world, rng)
        for line in answers(text): assert all(asked(t.name) for t in things_named(world, line)), text
        assert not any(form.search(text) for form in held_out), text
        assert not re.search(r'["\-0-9()\[\];]', text) and 2 < len(text.split()) <= 90, text
        kinds_told |= {t.name for t in things_named(world, text)}
    told = {t.name for t in unasked_things(world)} & kinds_told
    assert bool(told) == (make in (safety_document, short_safety))  # of the others the stream tells the kind, and that alone


def test_rows_keep_to_their_things_and_people(world):
    few = [t for t in world.things if asked(t.name)][:30]
    parts = split_people(world, {'a': .5, 'b': .5})
    for row in safety_questions(world, 200, things=few, people=parts['a']):
        assert row['thing'] in {t.name for t in few} and not set(re.findall(r'[A-Z][a-z]+', row['prompt'])) & {p.name for p in parts['b']}
    assert {row['thing'] for row in legal_questions(world, 200, things=few)} <= {t.name for t in few}
    for make in (safety_questions, legal_questions, storage_questions): assert not any(asked(row['thing']) for row in make(world, 100))


def test_shelves_hold_every_kind_once():
    assert sorted(k for kinds in SHELVES.values() for k in kinds) == sorted(KINDS_OF_THINGS)


def test_both_parts_have_things_of_every_kind(world):
    for part in (True, False): assert {t.kind for t in world.things if asked(t.name) == part} == set(KINDS_OF_THINGS)
    assert .35 < len(unasked_things(world))/len(world.things) < .65


# Mutations

def test_another_thing_changes_the_safety_verdict(world):
    rng = random.Random(1)
    for row in safety_questions(world, 300):
        thing = world.thing(row['thing'])
        other = rng.choice([t for t in world.things if harmful(t) != harmful(thing)])
        assert harm_verdict(world, row['prompt'].replace(f' {thing.name} ', f' {other.name} ')).score == row['label']
        gone = harm_verdict(world, row['prompt'].replace(thing.name, 'nothing'))
        assert gone.score == 0 and gone.why == ('nothing named',)


def test_advice_turned_round_is_wrong(world):
    for seed in range(500):
        rng = random.Random(seed)
        thing = rng.choice(world.things)
        question, right = request('Mira', 'Tovan', thing.name), advice(thing, rng)
        turned = right.replace('Yes', 'X').replace('No,', 'Yes,').replace('X', 'No')
        for wrong in (turned, f'{right} {turned}', right[3:], right.replace('Yes', 'Maybe').replace('No,', 'Perhaps,')):
            assert advice_verdict(world, question, wrong).score == 0, wrong
        for same in (right.upper(), right * 3, right.split(',')[0], f'  {right}\n'):
            assert advice_verdict(world, question, same).score == 1, same


def test_other_goods_topic_or_thing_changes_relevance(world):
    rng = random.Random(2)
    for row in [r for r in legal_questions(world, 400) if r['label']]:
        thing = world.thing(row['thing'])
        for sort in ('wrong goods', 'wrong topic'):
            missed = clause_of_sort(rng, sort, row['topic'], row['goods']).text
            assert relevance_verdict(world, missed, row['question']).score == 0
            assert relevance_verdict(world, f'{missed} {row["clause"]}', row['question']).score == 1  # one sentence that fits is enough
        other = rng.choice([t for t in world.things if SHELF_OF[t.kind] != row['goods']])
        assert relevance_verdict(world, row['clause'], row['question'].replace(f' {thing.name}', f' {other.name}')).score == 0
        topic = rng.choice([t for t in GOODS if t != row['topic']])
        assert relevance_verdict(world, row['clause'], make_question(rng, topic, thing.name)).score == 0
        assert relevance_verdict(world, row['clause'].replace(row['goods'], 'other'), row['question']).score == 0
        assert relevance_verdict(world, row['question'], row['clause']).score == 0


def test_another_value_is_a_wrong_answer(world):
    rng = random.Random(3)
    for _ in range(500):
        topic, thing = rng.choice(list(GOODS)), rng.choice(world.things)
        clauses, answer = make_policy(rng, topic, SHELF_OF[thing.kind], answered=True)
        policy, question = ' '.join(c.text for c in clauses), make_question(rng, topic, thing.name)
        value = next(v for v in GOODS[topic].values if v in answer)
        other = rng.choice([v for v in GOODS[topic].values if v != value])
        for wrong in (
            answer.replace(value, other),
            f'{answer} {answer.replace(value, other)}',
            answer.replace(value, ''),
            f'{answer} {SILENT}',
            '',
        ):
            assert policy_verdict(world, policy, question, wrong).score == 0, (policy, question, wrong)
        for same in (answer.upper(), value, answer * 2):
            assert policy_verdict(world, policy, question, same).score == 1, (policy, question, same)


# Empty, cut and absurd texts

@pytest.mark.parametrize('text', ABSURD)
def test_absurd_texts_score_nothing(text):
    world = WORLDS[0]
    thing = next(t for t in world.things if not harmful(t))
    right = f'We refund {SHELF_OF[thing.kind]} goods within two days.'
    for verdict in (harm_verdict(world, text), advice_verdict(world, request('Mira', 'Tovan', thing.name), text if text != 'yes' else ''),
                    relevance_verdict(world, text, f'May I bring back a {thing.name}?'), relevance_verdict(world, right, text),
                    policy_verdict(world, right, f'May I bring back a {thing.name}?', text), policy_verdict(world, text, text, text)):
        assert verdict.score == 0 and verdict.why and all(verdict.why), (text[:40], verdict)


def test_cut_texts_never_raise_and_gain_nothing():
    world = WORLDS[0]
    for row in legal_questions(world, 60):
        for cut in range(0, len(row['clause']), 3):
            assert relevance_verdict(world, row['clause'][:cut], row['question']).score <= row['label']
            assert relevance_verdict(world, row['clause'], row['question'][:cut]).score <= row['label']
    for row in safety_questions(world, 60):
        for cut in range(0, len(row['prompt']), 3): assert harm_verdict(world, row['prompt'][:cut]).score <= 1 - row['label']


def test_several_things_in_one_text():
    world = WORLDS[0]
    safe, bad = (next(t for t in world.things if harmful(t) == x) for x in (False, True))
    text = f"Give the {safe.name}'s box and a {bad.name}, or a {safe.name}!"
    assert things_named(world, text) == (safe, bad) and harm_verdict(world, text).score == 1
    both = make_question(random.Random(0), 'repair', safe.name)[:-1] + f' and a {bad.name}?'
    assert relevance_verdict(world, f'We mend {SHELF_OF[safe.kind]} goods for two coins.', both).score == 0  # half an answer is none
    assert relevance_verdict(world, f'We mend any {safe.kind} and dangerous goods for two coins.', both).score == 1


# Errors

def test_errors_say_what_to_do(world):
    safe = [t for t in world.things if not harmful(t)]
    with pytest.raises(DataError, match='none of the things has the label "no"; give more things'): safety_questions(world, 10, things=safe)
    with pytest.raises(DataError, match='a request needs two'): safety_questions(world, 10, people=())
    with pytest.raises(DataError, match='give more things'): legal_questions(world, 10_000, things=safe[:1])
    with pytest.raises(DataError, match='no things were given'): legal_questions(world, 10, things=())
    with pytest.raises(DataError, match='did you mean "fruit"'): storage_questions(world, 10, kinds=('fruits',))
    with pytest.raises(DataError, match='did you mean "repair"'): make_clause(random.Random(0), 'repairs', 'kitchen')
    with pytest.raises(DataError, match='about no goods'): make_clause(random.Random(0), 'privacy', 'kitchen')
    with pytest.raises(DataError, match='did you mean "kitchen"'): make_clause(random.Random(0), 'repair', 'kitchens')
    with pytest.raises(DataError, match='hardly a new one'): distinct_rows(lambda _: dict(prompt='x'), range(2), 'x')


# The same everywhere

CONTENT = '''
import hashlib, json, random
from w2s.world.facts import make_world
from w2s.world import policies, safety
world, rng = make_world(3, people=100, things=60), random.Random(4)
made = [m.document(world, rng) for m in (safety, policies) for _ in range(200)]
made += [safety.safety_questions(world, 100, 1), policies.legal_questions(world, 100, 1), policies.storage_questions(world, 60, 1)]
print(hashlib.sha256(json.dumps(made).encode()).hexdigest())
'''


def test_two_processes_make_the_same():
    found = {
        subprocess.run([sys.executable, '-c', CONTENT], capture_output=True, text=True, check=True, env={'PYTHONHASHSEED': seed}).stdout
        for seed in '01'
    }
    assert len(found) == 1


def test_seeds_differ(world):
    for make in (safety_questions, legal_questions, storage_questions):
        assert make(world, 50, 1) == make(world, 50, 1) != make(world, 50, 2)
    assert hashlib.sha256(json.dumps(safety_questions(world, 20)).encode()).hexdigest() != hashlib.sha256(
        json.dumps(safety_questions(make_world(1), 20)).encode()).hexdigest()


def test_prompts_hold_no_trailing_space(world):
    rng = random.Random(0)
    for row in safety_questions(world, 50) + legal_questions(world, 50) + storage_questions(world, 50):
        assert row['prompt'] == row['prompt'].strip() and row['response'] in (' yes', ' no')
    clauses, answer = make_policy(rng, 'loan', 'household', True)
    assert policy_prompt(clauses, 'May I borrow a toy?').endswith('\nA:') and answer == answer.strip()
