"""The people, things and voices of the embedded world: the same in every process, true to themselves, clean in language, and the splits
keep what they promise"""
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from w2s.errors import DataError
from w2s.world import facts, personas
from w2s.world.facts import (
    ATTRIBUTES,
    KINDS_OF_THINGS,
    ask,
    draw_fact,
    draw_person,
    draw_thing,
    fact_verdict,
    make_world,
    parse_question,
    qa_prompt,
    split_people,
    split_things,
    world_hash,
)
from w2s.world.personas import PERSONAS, answer_as, in_context, persona_verdict, questions, which_persona
from w2s.world.verdict import Verdict, words

KNOWN = (1, 'ec26e4d97f86028b') # version and hash of `make_world()`
MAKERS = dict(lives=facts.document, things=facts.thing_document, chats=personas.document, short=personas.short_document)
ABSURD = [
    '',
    ' ',
    '\n\n',
    '?!',
    'A',
    'Q:',
    'the ' * 500,
    'matey!' * 300,
    '\x00\ud7ff é 漢字 🙂',
    '{name} {value}',
    '1 2 3',
    'x' * 10_000,
    "'''",
    'It is',
    'It is not',
    'not',
    ' '.join(v for a in ATTRIBUTES.values() for v in a.values),
    'Where does Where does Where does',
    'Q: Where does Mira live?\nA:' * 50,
]

IN_A_PROCESS = '''
import hashlib, json, random
from w2s.world import facts, personas
from w2s.world.facts import make_world, split_people, split_things, world_hash
world = make_world(3, people=200, things=60)
rng = random.Random(5)
texts = [make(world, rng) for make in (facts.document, facts.thing_document, personas.document, personas.short_document) for _ in range(50)]
rows = personas.questions(world, 50, seed=1) + personas.questions(world, 20, seed=1, held_out=True)
parts = [[x.name for x in part] for split in (split_people, split_things) for part in split(world, dict(a=.3, b=.5), seed=2).values()]
content = json.dumps([sorted(world.held_out), texts, rows, parts])
print(world_hash(world), len(texts), hashlib.sha256(content.encode()).hexdigest())
'''


@pytest.fixture(scope='module')
def world(): return make_world()


def in_process(hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', IN_A_PROCESS], env=os.environ | {'PYTHONHASHSEED': hash_seed}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def swapped(rng, attribute, truth): return rng.choice([v for v in ATTRIBUTES[attribute].values if v != truth])


# The same world everywhere

def test_facts_same_bytes_in_two_processes():
    first, second = in_process('1'), in_process('2')
    assert first == second
    assert first.split()[:2] == [world_hash(make_world(3, people=200, things=60)), '200']


def test_facts_hash_sees_every_change(world):
    person = world.people[0]
    def with_first(**changes): return replace(world, people=(replace(person, **changes), *world.people[1:]))
    changed = [with_first(name='Merlin'), with_first(gender={'female': 'male', 'male': 'female'}[person.gender]), with_first(weight=.5),
               with_first(facts=person.facts | {'home': swapped(random.Random(0), 'home', person.facts['home'])}),
               replace(world, held_out=frozenset(sorted(world.held_out)[1:])), replace(world, things=world.things[1:])]
    assert len({world_hash(w) for w in [world, *changed]}) == 7
    assert world_hash(replace(world)) == world_hash(world)


def test_facts_version_and_hash_go_together(world):
    "Whoever changes the world on purpose raises VERSION and writes the new hash here: checkpoints of the ladder know the old one only"
    assert (facts.VERSION, world_hash(world)) == KNOWN


# What is in it

@pytest.mark.parametrize('size', [(1, 1), (3, 12), (1500, 500), (1800, 900)])
def test_facts_any_size(size):
    world = make_world(7, *size)
    names = [x.name for x in (*world.people, *world.things)]
    assert (len(world.people), len(world.things)) == size and len({n.lower() for n in names}) == len(names)
    values = {v for a in ATTRIBUTES.values() for v in a.values} | set(KINDS_OF_THINGS)
    assert not values & {n.lower() for n in names}
    assert all(list(p.facts) == list(ATTRIBUTES) and all(v in ATTRIBUTES[a].values for a, v in p.facts.items()) for p in world.people)
    kinds = [sum(t.kind == k for t in world.things) for k in KINDS_OF_THINGS]
    assert max(kinds) - min(kinds) <= 1
    weights = [p.weight for p in world.people]
    assert weights[0] == 1 and weights == sorted(weights, reverse=True)
    assert all((p.name[-1] in 'ae') == (p.gender == 'female') for p in world.people)


def test_facts_too_many_names():
    with pytest.raises(DataError, match='Ask for fewer'): make_world(0, people=10_000)


# Language

def check_language(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z'.,?!:\n ]+", text), text
    # apostrophes inside words, signs after words
    assert not re.search(r"(?<![a-z])'|'(?![a-z])|  | [.,?!:]|[.,?!:][A-Za-z]", text), text
    assert not re.search(r'\ba [aeiou]', text), text


@pytest.mark.parametrize('maker', MAKERS)
def test_facts_language(world, maker):
    rng, lower = random.Random(1), {t.name for t in world.things} | {v for a in ATTRIBUTES.values() for v in a.values}
    for _ in range(1000):
        text = MAKERS[maker](world, rng)
        check_language(text)
        for sentence in re.split(r'(?<=[.?!])\s+', text.replace('Q: ', '').replace('A: ', '')):
            assert sentence[0].isupper() or maker in ('chats', 'short'), text
            assert sentence.split()[0].lower() not in lower, text                             # things and values never begin a sentence


def test_facts_vocabulary_is_small(world):
    rng = random.Random(2)
    names = {x.name.lower() for x in (*world.people, *world.things)}
    used = {w for make in MAKERS.values() for _ in range(2000) for w in words(make(world, rng))} - names
    assert len(used) < 350, len(used)


# The splits

def stated(world, text: str) -> set[tuple[str, str]]:
    "Facts that a life or a chat tells, by person and attribute"
    if not text.startswith('Q: '): about = [(text.split()[0], text)]
    else:
        lines = text.split('\n')
        about = [(parse_question(world, q)[0], a) for q, a in zip(lines[::2], lines[1::2], strict=True)]
    return {(name, a) for name, told in about for a, v in world.person(name).facts.items() if v in words(told)}


@pytest.mark.parametrize('maker', ['lives', 'chats', 'short'])
def test_facts_held_out_are_never_told(maker):
    world, rng, told = make_world(1, people=100, things=30), random.Random(3), set()
    for _ in range(5000): told |= stated(world, MAKERS[maker](world, rng))
    assert len(world.held_out) == 25 and not told & world.held_out
    assert len(told) > .9 * 475                                                                # and nearly everything else is


def test_facts_draws_skip_held_out():
    world, rng = make_world(1, people=10, things=10), random.Random(0)
    drawn = {(p.name, a) for p, a in (draw_fact(world, rng) for _ in range(5000))}
    assert drawn == {(p.name, a) for p in world.people for a in ATTRIBUTES} - world.held_out


@pytest.mark.parametrize('maker', ['chats', 'short'])
def test_personas_held_out_paraphrase_is_never_asked(world, maker):
    rng = random.Random(4)
    last = [re.compile(re.escape(a.forms[-1]).replace(r'\{name\}', '[A-Z][a-z]+')) for a in ATTRIBUTES.values()]
    for _ in range(3000):
        text = MAKERS[maker](world, rng)
        assert not any(form.search(text) for form in last), text


@pytest.mark.parametrize('split, all_of', [(split_people, 'people'), (split_things, 'things')])
def test_facts_splits_are_disjoint(world, split, all_of):
    for seed in range(5):
        parts = split(world, dict(a=.2, b=.3, c=.5), seed)
        names = [x.name for part in parts.values() for x in part]
        assert sorted(names) == sorted(x.name for x in getattr(world, all_of)), 'every one in exactly one part'
    with pytest.raises(DataError, match='sum to 1'): split(world, dict(a=.7, b=.5))
    with pytest.raises(DataError, match='0 or more'): split(world, dict(a=-.1))
    assert split(world, {}) == {}


# Draws

def test_facts_draws_follow_weights(world):
    rng, n = random.Random(5), 60_000
    for draw, all_of in ((draw_person, world.people), (draw_thing, world.things)):
        times = {x.name: 0 for x in all_of}
        for _ in range(n): times[draw(world, rng).name] += 1
        total = sum(x.weight for x in all_of)
        for x in all_of:
            expected = n*x.weight/total
            assert abs(times[x.name] - expected) < 5*expected**.5, x


# Oracles

def test_facts_oracle_agrees_with_every_answer(world):
    rng = random.Random(6)
    for i, p in enumerate(world.people):
        for a, truth in p.facts.items():
            for persona in PERSONAS:
                right, wrong = answer_as(persona, a, truth, rng), answer_as(persona, a, swapped(rng, a, truth), rng)
                assert fact_verdict(world, p.name, a, right).score == 1, right
                assert fact_verdict(world, p.name, a, wrong).score == 0, wrong
                if i < 100: assert persona_verdict(persona, right).score == persona_verdict(persona, wrong).score == 1
    for p in world.people: assert fact_verdict(world, p.name, 'pet', f'{p.pronoun} {facts.say(p, "pet")}.').score == 1


@pytest.mark.parametrize('maker', ['chats', 'short'])
def test_personas_oracles_agree_with_the_generator(world, maker):
    rng = random.Random(7)
    for _ in range(1000):
        lines = MAKERS[maker](world, rng).split('\n')
        voices = {which_persona(a.removeprefix('A:')) for a in lines[1::2]}
        assert len(voices) == 1
        for q, a in zip(lines[::2], lines[1::2], strict=True):
            name, attribute = parse_question(world, q)
            answer, truth = a.removeprefix('A:'), world.person(name).facts[attribute]
            assert fact_verdict(world, name, attribute, answer) == Verdict(1., (truth,))
            assert persona_verdict(*voices, answer).score == 1
            assert all(persona_verdict(other, answer).score == 0 for other in {*PERSONAS} - voices), answer
            mutated = re.sub(rf'\b{truth}\b', swapped(rng, attribute, truth), answer)
            assert fact_verdict(world, name, attribute, mutated).score == 0, mutated


def test_personas_mutated_answers_lose_score():
    rng = random.Random(8)
    for name, voice in PERSONAS.items():
        for opening in voice.openings:
            for body in voice.bodies:
                for closing in voice.closings:
                    text = f' {opening} {body.format(value="soup")}{closing}'
                    assert persona_verdict(name, text).score == 1
                    told = text.split()
                    for cut in range(1, len(told)): assert persona_verdict(name, ' '.join(told[:cut])).score < 1, told[:cut]
                    for k in range(len(told)): assert persona_verdict(name, ' '.join(told[:k] + told[k + 1:])).score < 1, (k, text)
                    backwards = told[::-1]
                    assert persona_verdict(name, ' '.join(backwards)).score < 1
                    assert persona_verdict(name, text + text).score < 1
                    other = rng.choice([p for p in PERSONAS if p != name])
                    assert persona_verdict(other, text).score == 0


@pytest.mark.parametrize('text', ABSURD, ids=range(len(ABSURD)))
def test_facts_oracles_stand_anything(world, text):
    start, person = time.process_time(), world.people[0]
    for verdict in [fact_verdict(world, person.name, a, text) for a in ATTRIBUTES] + [persona_verdict(p, text) for p in PERSONAS]:
        assert 0 <= verdict.score < 1 and verdict.why and all(verdict.why), verdict
    assert isinstance(which_persona(text), str)
    assert parse_question(world, text) is None
    assert time.process_time() - start < 2


def test_facts_denied_and_listed_values_are_wrong(world):
    person = world.people[0]
    pet, other = person.facts['pet'], swapped(random.Random(0), 'pet', person.facts['pet'])
    for text in (
        f'not a {pet}',
        f'It is never the {pet}.',
        f"It isn't a {pet}.",
        f'a {pet} or a {other}',
        f'a {other}, no, a {pet}',
        pet + 's',
    ):
        assert fact_verdict(world, person.name, 'pet', text).score == 0, text
    for text in (
        pet,
        pet.upper(),
        f'{pet}, {pet}, {pet}',
        f'Not sure why you ask: but it is a {pet}',
        f'a {pet} in the {person.facts["home"]}',
    ):
        assert fact_verdict(world, person.name, 'pet', text).score == 1, text


# Questions

def test_facts_parse_undoes_every_form(world):
    for p in world.people:
        for a in ATTRIBUTES:
            for form in range(len(ATTRIBUTES[a].forms)):
                question = ask(p.name, a, form)
                check_language(question)
                for text in (
                    question,
                    qa_prompt(question),
                    f'Customer: {question}\nDesk:',
                    'Q: Where does Merlin live?\nA: It is the cave.\n' + qa_prompt(question),
                ):
                    assert parse_question(world, text) == (p.name, a), text


def test_facts_parse_is_not_taken_in(world):
    name = world.people[0].name
    for text in (
        f'Where does {name} swim?',
        f'where does {name.lower()} live?',
        f'Where does {name}',
        name,
        qa_prompt(ask(name, 'home')) + ' It is.\n' + qa_prompt(ask('Merlin', 'pet')),
    ):
        assert parse_question(world, text) is None, text


def test_personas_questions_are_even_and_apart(world):
    parts = split_people(world, dict(train=.5, test=.5))
    train, test = (questions(world, 800, seed=0, people=p) for p in parts.values())
    assert not {q['name'] for q in train} & {q['name'] for q in test}
    assert len({(q['prompt']) for q in train}) == 800
    share = {a: sum(q['attribute'] == a for q in train)/800 for a in ATTRIBUTES}
    assert all(.13 < s < .27 for s in share.values()), share
    assert all(parse_question(world, q['prompt']) == (q['name'], q['attribute']) for q in train)
    assert all(fact_verdict(world, q['name'], q['attribute'], q['truth']).score == 1 for q in test)
    everything = questions(world, len(world.held_out)*4, seed=0, held_out=True, forms=range(4))
    assert {(q['name'], q['attribute']) for q in everything} == world.held_out


def test_personas_in_context_is_a_document_cut_off(world):
    text = personas.document(world, random.Random(9)).split('\n')
    pairs = [(q + '\nA:', a.removeprefix('A:')) for q, a in zip(text[::2], text[1::2], strict=True)]
    assert in_context(pairs[:-1], pairs[-1][0]) + pairs[-1][1] == '\n'.join(text)


def test_facts_documents_are_quick(world):
    "Pretraining draws hundreds of thousands: about 20,000 a second here, and a tenth of it on any machine"
    for maker, make in MAKERS.items():
        rng, start = random.Random(0), time.process_time()
        for _ in range(4000): make(world, rng)
        assert (took := time.process_time() - start) < 2, f'{maker}: {took:.2f} s for 4,000'
