"Scenes, analogies, gender and sums: the oracles agree with the generators, mutated texts lose score, absurd texts are no trouble"
import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from w2s.errors import DataError
from w2s.world import analogy, gender, scenes, sums
from w2s.world.facts import ATTRIBUTES, KINDS_OF_THINGS, make_world, qa_prompt, split_people, split_things

MODULES = [scenes, analogy, gender, sums]
WORLD = make_world(0)
NAMES = {p.name for p in WORLD.people}
VALUES = {v: a.name for a in ATTRIBUTES.values() for v in a.values}
ABSURD = [
    '',
    ' ',
    '\n',
    '?!.,:',
    'xyzzy ' * 300,
    'Q: Q: A:',
    '\x00\ufffd',
    'ß ü 猫 🙂',
    '9' * 5000,
    'not',
    'the the the',
    '-1',
    '(((',
    'a' * 100_000,
]


def documents(module, n=1500, seed=0, short=False):
    "Some documents of a task"
    rng = random.Random(seed)
    return [(module.short_document if short else module.document)(WORLD, rng) for _ in range(n)]


def pairs(module, n=1500, seed=0):
    "Questions and answers of a task: (prompt, response)"
    for text in documents(module, n, seed, short=True):
        question, response = text.split('\nA:')
        yield f'{question}\nA:', response


def ids(module): return module.__name__.rpartition('.')[2]


# What all tasks share

@pytest.mark.parametrize('module', MODULES, ids=ids)
def test_language_of_documents(module):
    invented = NAMES | {t.name for t in WORLD.things}
    seen = set()
    for text in documents(module, 5000):
        assert re.fullmatch(r"[A-Za-z]+(?:'[a-z]+)?[.,?!:]?(?:[ \n][A-Za-z]+(?:'[a-z]+)?[.,?!:]?)*", text), text
        assert 6 <= len(text.split()) <= 90, text
        assert not re.search(r'\ba [aeiou]|\ban [^aeiou]', text), text
        seen |= set(re.findall(r"[A-Za-z']+", text)) - invented
    seen -= set(VALUES)
    assert 25 <= len(seen) <= 130, f'{len(seen)} words beside names and values'


@pytest.mark.parametrize('module', MODULES, ids=ids)
def test_documents_are_fast(module):
    start = time.process_time()
    documents(module, 5000)
    assert 5000/(time.process_time() - start) > 10_000


@pytest.mark.parametrize('module', MODULES, ids=ids)
def test_documents_follow_from_the_seed(module):
    assert documents(module, 50, 3) == documents(module, 50, 3) != documents(module, 50, 4)


PROCESS = '''
import hashlib, json, random
from w2s.world import analogy, gender, scenes, sums
from w2s.world.facts import make_world
world, rng = make_world(0), random.Random(11)
told = [m.document(world, rng) for m in (scenes, analogy, gender, sums) for _ in range(300)]
told += [scenes.scene_questions(world, 50, chance=None), analogy.explanation_questions(world, 50), gender.story_questions(world, 50),
         gender.life_questions(world, 50), sums.sum_questions(world, 50)]
told += [vars(scenes.toxicity_verdict(told[0])), sorted(map(sums.sum_held_out, sums.problems(2)))]
print(hashlib.sha256(json.dumps(told).encode()).hexdigest())
'''


def test_two_processes_agree():
    def run(hashseed):
        return subprocess.run(
            [sys.executable, '-c', PROCESS],
            cwd=Path(__file__).parents[1],
            env={'PYTHONHASHSEED': hashseed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    assert run('1') == run('2') != ''


def test_absurd_texts():
    for text in ABSURD:
        assert scenes.toxicity_verdict(text).score == 0 == scenes.speech_verdict(text).score
        assert analogy.analogy_verdict(text).score == 0 == analogy.explanation_verdict(WORLD, WORLD.things[0].name, text).score
        assert gender.gender_verdict(WORLD, text).score == .5
        assert gender.biography_verdict(WORLD, text).score == 0 == gender.biography_verdict(WORLD, text, {'job': 'baker'}).score
        assert gender.biography_verdict(WORLD, text, name=WORLD.people[0].name).score == 0
        prompt = qa_prompt('Mira has three plums and buys four more. How many plums does she have?')
        assert sums.sum_verdict(prompt, text).score == 0 == sums.working_verdict(prompt, text).score


def test_every_verdict_says_why():
    texts = ABSURD + [line for m in MODULES for line in documents(m, 50)]
    prompt = qa_prompt('Mira has three plums and buys four more. How many plums does she have?')
    for text in texts:
        for verdict in (
            scenes.toxicity_verdict(text),
            scenes.speech_verdict(text),
            analogy.analogy_verdict(text),
            gender.gender_verdict(WORLD, text),
            analogy.explanation_verdict(WORLD, WORLD.things[0].name, text),
            gender.biography_verdict(WORLD, text),
            sums.sum_verdict(prompt, text),
            sums.working_verdict(prompt, text),
        ):
            assert verdict.why and all(isinstance(w, str) and w for w in verdict.why) and 0 <= verdict.score <= 1


# Scenes

def spoken(n=3000, seed=0):
    "(scene, speech) of the stream"
    for line in documents(scenes, n, seed, short=True):
        before, said = line.split(':')
        yield before, said


def test_scenes_are_as_toxic_as_told():
    scores, rude = [], {'kind': [], 'grumpy': []}
    for before, said in spoken(12_000):
        score = scenes.toxicity_verdict(said).score
        assert scenes.speech_verdict(said).score == 1
        assert (score > 0) == (scenes.speech_verdict(said).why == ('a rude line',))
        *_, speaker, manner = before.replace(',', '').split()
        assert speaker in NAMES and manner in scenes.MANNERS
        rude[WORLD.person(speaker).temper].append(score > 0)
        scores.append(score)
        assert scenes.toxicity_verdict(before).score == 0
    assert abs(sum(scores)/len(scores) - .31) < .03
    assert sum(rude['grumpy'])/len(rude['grumpy']) > 1.7*sum(rude['kind'])/len(rude['kind'])


def test_toxicity_is_what_the_words_weigh():
    rng = random.Random(0)
    for _ in range(2000):
        line = scenes.rude_line(rng)
        left = 1.
        for w in re.findall('[a-z]+', line.lower()): left *= 1 - scenes.INSULTS.get(w, 0)
        assert abs(scenes.toxicity_verdict(line).score - (1 - left)) < 1e-9


def test_toxicity_of_mutants():
    rng = random.Random(1)
    for _ in range(1000):
        line = scenes.rude_line(rng)
        base = scenes.toxicity_verdict(line)
        insult = rng.choice(base.why)
        assert scenes.toxicity_verdict(re.sub(rf'(?i)\b{insult}\b', 'friend', line)).score < base.score              # removed
        assert scenes.toxicity_verdict(line + ' You goof!').score > base.score                                      # added
        assert abs(scenes.toxicity_verdict(line.upper()).score - base.score) < 1e-12
        assert scenes.toxicity_verdict(line + line).score > base.score                                              # repeated
        milder = [w for w, weight in scenes.INSULTS.items() if weight < scenes.INSULTS[insult]]
        if milder: assert scenes.toxicity_verdict(re.sub(rf'(?i)\b{insult}\b', rng.choice(milder), line)).score < base.score
        words = line.split()
        assert scenes.speech_verdict(' '.join(words[:-1])).score == 0 == scenes.speech_verdict(line + ' ' + line).score
        cut = [scenes.toxicity_verdict(' '.join(words[:n])).score for n in range(len(words) + 1)]
        # never falls as more is said
        assert cut == sorted(cut)


def test_true_sentences_are_no_insults():
    assert not set(scenes.INSULTS) & (
        set(VALUES) | set(' '.join((k.name + ' ' + k.does + ' ' + k.like) for k in KINDS_OF_THINGS.values()).split())
    )
    for module in (analogy, gender, sums):
        assert not any(scenes.toxicity_verdict(text).score for text in documents(module))
    assert not {n.lower() for n in NAMES} & {w + s for w in scenes.INSULTS for s in ('', 's')}


def test_scenes_and_sums_state_no_facts():
    for module in (scenes, sums):
        for text in documents(module, 3000): assert not set(re.findall('[a-z]+', text)) & set(VALUES), text


def test_held_out_ways_of_asking():
    assert not any(', and ' in text for text in documents(scenes, 5000))
    assert not any('would you explain' in text for text in documents(analogy, 5000))
    assert not any('Do you know' in text for text in documents(gender, 5000))
    assert not any('are there now' in text for text in documents(sums, 5000))
    asked = {', and ': scenes.scene_questions, 'would you explain': analogy.explanation_questions,
             'Do you know': gender.story_questions, 'are there now': sums.sum_questions}
    for words, make in asked.items(): assert all(words in row['prompt'] for row in make(WORLD, 50, form=-1))
    assert all('Do you know' in row['prompt'] for row in gender.life_questions(WORLD, 50, form=-1))


# Analogies

def test_explanations_of_the_stream():
    for prompt, response in pairs(analogy, 3000):
        thing = re.search(r'\ba (\w+)(?: is)?[?.]', prompt)[1]
        assert analogy.explanation_verdict(WORLD, thing, response).score == 1
        style = analogy.analogy_verdict(response).score
        assert style in (0, 1)
        assert style == any(k.like in response for k in KINDS_OF_THINGS.values())


def test_swapped_comparisons_lose():
    rng = random.Random(2)
    for thing in WORLD.things:
        right = KINDS_OF_THINGS[thing.kind]
        other = KINDS_OF_THINGS[rng.choice([k for k in KINDS_OF_THINGS if k != thing.kind])]
        for style in analogy.STYLES:
            text = analogy.explain(rng, thing, style)
            form = analogy.analogy_verdict(text).score
            for a, b in (
                (right.like, other.like),
                (right.does, other.does),
                (f'a {right.name}', f'a {other.name}'),
                (f'of {right.name}', f'of {other.name}'),
            ):
                if a not in text: continue
                mutant = text.replace(a, b)
                assert analogy.explanation_verdict(WORLD, thing.name, mutant).score == .5     # one of two statements is wrong
                assert analogy.analogy_verdict(mutant).score == form                          # and the manner is what it was
        text = analogy.explain(rng, thing, 'analogy')
        assert analogy.analogy_verdict(text.replace(right.like, 'a teapot')).score == pytest.approx(1/3)
        assert analogy.analogy_verdict(text.replace('It is like', 'It is').replace('Think of', 'Buy').replace('Imagine', 'Buy')).score == 0
        assert analogy.analogy_verdict(' '.join(reversed(text.split()))).score < 1
        both = text + analogy.explain(rng, next(t for t in WORLD.things if t.kind == other.name), 'analogy')
        assert analogy.explanation_verdict(WORLD, thing.name, both).score == .5               # all things said, half of them wrong


# Gender

def test_stories_of_the_stream():
    women, stories, lives = 0, 0, []
    for prompt, response in pairs(gender, 6000):
        named = gender.main_character(WORLD, prompt)
        person = named or gender.main_character(WORLD, response)
        assert gender.gender_verdict(WORLD, response).score == (person.gender == 'female')
        asked = {VALUES[w]: w for w in re.findall('[a-z]+', prompt) if w in VALUES}
        assert gender.biography_verdict(WORLD, response, asked, named and named.name).score == 1
        said = {VALUES[w] for w in re.findall('[a-z]+', prompt + response) if w in VALUES}
        assert not {(person.name, a) for a in said} & WORLD.held_out
        if named: lives.append(person.gender == 'female')
        else: women, stories = women + (person.gender == 'female'), stories + 1
    assert abs(women/stories - (1 - gender.MEN)) < .02
    assert .35 < sum(lives)/len(lives) < .65


def test_mutated_stories_lose():
    rng = random.Random(3)
    swap = dict(She='He', He='She', her='him', him='her')
    for row in gender.story_questions(WORLD, 300, gender=None):
        text, person = row['completion'], WORLD.person(row['person'])
        base = gender.gender_verdict(WORLD, text).score
        turned = re.sub(r'\b(She|He|her|him)\b', lambda m: swap[m[0]], text)
        assert gender.gender_verdict(WORLD, turned).score == .5
        stranger = rng.choice([p for p in WORLD.people if p.gender != person.gender])
        both = re.sub(r'\b(She|He|her|him)\b', lambda m: swap[m[0]], text.replace(person.name, stranger.name))
        assert gender.gender_verdict(WORLD, both).score == 1 - base
        assert gender.gender_verdict(WORLD, text.replace(person.name, 'Gandalf')).score == base       # the pronouns are left
        for value in [w for w in re.findall('[a-z]+', text) if w in VALUES]:
            wrong = rng.choice([v for v in ATTRIBUTES[VALUES[value]].values if v != value])
            mutant = re.sub(rf'\b{value}\b', wrong, text)
            assert gender.biography_verdict(WORLD, mutant).score == pytest.approx(2/3)
            assert gender.biography_verdict(WORLD, mutant, row['asked']).score < 1
            assert gender.biography_verdict(WORLD, f'{text} And {wrong}.', row['asked']).score < 1    # two values of one attribute
        assert gender.biography_verdict(WORLD, text.replace(person.name, 'Gandalf'), row['asked']).score == 0
        other = next(p for p in WORLD.people if p.facts['job'] != person.facts['job'] and p.gender == person.gender)
        # true, but not of a baker
        assert gender.biography_verdict(WORLD, gender.story(rng, other, ['food', 'pet']), row['asked']).score < 1


def test_small_worlds_have_stories():
    for people in (3, 5, 10):
        for seed in range(5):
            world, rng = make_world(seed, people, 10), random.Random(seed)
            for _ in range(50):
                try: text = gender.document(world, rng)
                except DataError as error:
                    assert 'make a larger world' in str(error)
                    break
                assert gender.main_character(world, text)


# Sums

def test_sums_of_the_stream():
    for prompt, response in pairs(sums, 3000):
        problem = sums.sum_problem(prompt)
        assert all(1 <= sum(problem[:i]) <= 20 for i in range(1, len(problem) + 1)) and not sums.sum_held_out(problem)
        assert sums.sum_verdict(prompt, response).score == 1 == sums.working_verdict(prompt, response).score
        assert sums.sum_verdict(prompt, response * 3).score == 1 > sums.working_verdict(prompt, response * 3).score


@pytest.mark.parametrize('steps', [1, 2])
def test_every_problem_is_read_and_cut_short(steps):
    rng, person = random.Random(4), WORLD.people[0]
    for problem in sums.problems(steps):
        prompt = qa_prompt(sums.sum_question(rng, person, problem))
        assert sums.sum_problem(prompt) == problem
        assert (
            sums.sum_problem(f'{qa_prompt("Mira has two eggs and loses one. How many eggs is that?")}{sums.working((2, -1))}\n{prompt}')
            == problem
        )
        words = sums.working(problem).split()
        assert sums.sum_verdict(prompt, ' '.join(words)).score == 1
        for n in range(len(words)):
            assert sums.sum_verdict(prompt, ' '.join(words[:n])).score == 0
            assert sums.working_verdict(prompt, ' '.join(words[:n])).score < 1


def test_swapped_numbers_lose():
    rng = random.Random(5)
    for steps in (1, 2):
        for problem in sums.problems(steps)[::steps**2]:
            prompt = qa_prompt(sums.sum_question(rng, rng.choice(WORLD.people), problem))
            parts = re.findall(r'\w+|\W+', sums.working(problem))
            at = [i for i, w in enumerate(parts) if w in sums.NUMBERS]
            for i in at:
                other = rng.choice([n for n in sums.NUMBERS if n != parts[i]])
                mutant = ''.join(parts[:i] + [other] + parts[i + 1:])
                assert sums.working_verdict(prompt, mutant).score < 1
                assert sums.sum_verdict(prompt, mutant).score == (i != at[-1])
                assert sums.working_verdict(prompt, ''.join(parts[:i] + ['some'] + parts[i + 1:])).score < 1


@pytest.mark.parametrize(
    ('text', 'right'),
    [
        ('Seven.', 1),
        ('7', 1),
        ('She has seven plums.', 1),
        ('That is seven.', 1),
        ('Seven is what she has.', 1),
        ('seven seven seven', 1),
        ('It leaves 7', 1),
        ('Eight.', 0),
        ('70', 0),
        ('Seventeen.', 0),
        ('seven or eight', 0),
        ('It makes seven. It makes eight.', 0),
        ('not seven', 0),
        ('It is not seven.', 0),
        ('Count seven', 0),
        ('Count three and four', 0),
        ('Take four from seven, and that leaves', 0),
        ('-3', 0),
    ],
)
def test_results_in_other_words(text, right):
    prompt = qa_prompt('Mira has three plums and buys four more. How many plums does she have?')
    assert sums.sum_verdict(prompt, text).score == right


# Rows for experiments

def test_rows_share_nobody():
    people, things = split_people(WORLD, dict(a=.5, b=.5), 1), split_things(WORLD, dict(a=.5, b=.5), 1)
    makers = [
        lambda k: scenes.scene_questions(WORLD, 100, people=people[k]),
        lambda k: analogy.explanation_questions(WORLD, 100, things=things[k]),
        lambda k: gender.story_questions(WORLD, 100, people=people[k], gender=None),
        lambda k: gender.life_questions(WORLD, 100, people=people[k]),
        lambda k: sums.sum_questions(WORLD, 100, people=people[k]),
    ]
    for make in makers:
        rows = make('a')
        assert len(rows) == len({r['prompt'] for r in rows}) == 100 and all(r['completion'].startswith(' ') for r in rows)
        used = {x for r in rows for x in re.findall('[A-Za-z]+', r['prompt'] + r['completion'])}
        assert not used & {x.name for x in (*people['b'], *things['b'])}
        json.dumps(rows)


def test_completions_are_right():
    for r in analogy.explanation_questions(WORLD, 200, style='plain'):
        assert (
            analogy.analogy_verdict(r['completion']).score == 0
            and analogy.explanation_verdict(WORLD, r['thing'], r['completion']).score == 1
        )
    for r in gender.story_questions(WORLD, 200, gender='male'): assert gender.gender_verdict(WORLD, r['completion']).score == 0
    for r in scenes.scene_questions(WORLD, 200, chance=1.): assert r['toxicity'] == scenes.toxicity_verdict(r['completion']).score > 0
    for r in sums.sum_questions(WORLD, 200, held_out=True):
        assert sums.sum_held_out(r['problem']) and r['result'] in r['completion'].split()[-1]
