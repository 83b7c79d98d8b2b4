"""The stream that the ladder is pretrained on: the same bytes in two processes, nothing held out in it, and every word of every row one
token"""
import hashlib
import os
import random
import re
import subprocess
import sys

import pytest

from w2s.models.pretrain import world_tokenizer
from w2s.world import analogy, facts, gender, personas, policies, rows, safety, scenes, service, sums
from w2s.world.facts import ATTRIBUTES, KINDS_OF_THINGS, make_world
from w2s.world.stream import SORTS, few, name_words, stream_document, stream_words, told_facts

# What the ladder in the package has read: whoever changes it on purpose builds the ladder again (`w2s zoo build`) and writes the new hash
# here
READ = '0f97977027690060'

IN_A_PROCESS = '''
import hashlib, random
from w2s.world.facts import make_world
from w2s.world.stream import few, stream_document, stream_words
world = make_world()
texts = [stream_document(w, random.Random(f'{i}'), i % 2 == 0) for w in (world, few(world)) for i in range(1000)]
print(hashlib.sha256('\\n\\n'.join(texts).encode()).hexdigest(), hashlib.sha256(' '.join(stream_words(world)).encode()).hexdigest())
'''


@pytest.fixture(scope='module')
def world(): return make_world()


@pytest.fixture(scope='module')
def documents(world):
    "20,000 documents: half of them short, a fifth of those from the few people that come first"
    return [stream_document(few(world) if i % 10 == 0 else world, random.Random(f'test {i}'), i % 2 == 0) for i in range(20_000)]


def in_process(hash_seed: str) -> str:
    done = subprocess.run(
        [sys.executable, '-c', IN_A_PROCESS], env=os.environ | {'PYTHONHASHSEED': hash_seed}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_stream_same_bytes_in_two_processes():
    first, second = in_process('1'), in_process('2')
    assert first == second
    assert hashlib.sha256(first.encode()).hexdigest()[:16] == READ


# Nothing held out

VALUES = {a.name: set(a.values) for a in ATTRIBUTES.values()}
ATTRIBUTE_OF = {v: a for a, values in VALUES.items() for v in values}
IDLE = ('Soon the doctor came.', 'warms the soup') # fixed phrases with a value that is nobody's


def parts(document: str) -> list[str]:
    "A statement (one line), or a question with its answer"
    return re.split(r'\n(?!A:|Desk:)', document)


def stated(world, document: str) -> set[tuple[str, str, str]]:
    "(name, attribute, value) of all that is together in one part: written apart from `told_facts`"
    found = set()
    for part in parts(document):
        for idle in IDLE: part = part.replace(idle, '')
        said = set(re.findall(r"[A-Za-z]+", part))
        names, values = said & {p.name for p in world.people}, said & set(ATTRIBUTE_OF)
        found |= {(name, ATTRIBUTE_OF[v], v) for name in names for v in values}
    return found


@pytest.fixture(scope='module')
def told(world, documents):
    "All that the documents state"
    names = {p.name for p in world.people}
    out: dict[tuple[str, str], list[str]] = {}
    for d in documents:
        for part in parts(d):
            for idle in IDLE: part = part.replace(idle, '')
            said = set(re.findall(r'[A-Za-z]+', part))
            for v in said & set(ATTRIBUTE_OF):
                for name in said & names: out.setdefault((name, ATTRIBUTE_OF[v]), []).append(v)
    return out


def test_stream_states_no_held_out_fact(world, told):
    assert len(told) > 6000, 'the rule sees the facts that are in the stream'
    leaked = sorted(set(told) & world.held_out)
    assert not leaked, f'{len(leaked)} held-out facts are in the stream: {leaked[:5]}'


def test_stream_is_true_but_for_the_desk(world, told):
    "What is said together is said rightly, but for the desk, which errs in a quarter of its answers"
    wrong = sum(v != world.person(name).facts[a] for (name, a), said in told.items() for v in said)/sum(map(len, told.values()))
    assert .01 < wrong < .05, wrong
    true = [d for i in range(2000) if 'Desk:' not in (d := stream_document(world, random.Random(f'true {i}'), i % 2 == 0))]
    assert all(v == world.person(name).facts[a] for d in true for name, a, v in stated(world, d))


@pytest.mark.parametrize('maker', [
    lambda p, a, v: f'{p.name} {facts.say(p, a)}.',
    lambda p, a, v: facts.qa_prompt(facts.ask(p.name, a, 1)) + personas.answer_as('ghost', a, v, random.Random(0)),
    lambda p, a, v: service.service_prompt(facts.ask(p.name, a, 2)) + service.service_answer(random.Random(0), v, ('rude', 'rude')),
    lambda p, a, v: facts.qa_prompt(f'Tell me about {p.name}.') + gender.life(random.Random(0), p, (a, a)),
    lambda p, a, v: facts.qa_prompt(gender.story_question(random.Random(0), p, (a,))) + gender.story(random.Random(0), p, ('food', 'pet')),
], ids=['life', 'chat', 'desk', 'named life', 'story'])
def test_a_leak_would_be_seen(world, maker):
    "Each form in which the generators tell a fact, with facts that are held out"
    for name, a in sorted(world.held_out)[:100]:
        person = world.person(name)
        text = 'Once there was a market.\n' + maker(person, a, person.facts[a])
        assert (name, a, person.facts[a]) in stated(world, text), text
        assert (name, a) in told_facts(world, text), text


def test_told_facts_agrees_with_the_rule_of_this_test(world, documents):
    for d in documents[:3000]: assert set(told_facts(world, d)) == {(name, a) for name, a, _ in stated(world, d)}, d


def pattern(form: str) -> re.Pattern:
    "A form with anything in its places"
    return re.compile(r'(?<!\w)' + re.sub(r'\\\{\w+\\\}', r"[\\w ]+?", re.escape(form)))


LAST = {
    f'{task}: {forms[-1]}': forms
    for task, forms in (
        *((a.name, a.forms) for a in ATTRIBUTES.values()),
        ('safety', [d.request for d in safety.DEEDS]),
        ('tale', [d.told for d in safety.DEEDS]),
        *((t.name, t.questions) for t in (policies.GOODS | policies.OTHERS).values()),
        ('scenes', scenes.SCENES),
        ('explanation', analogy.QUESTIONS),
        ('story', gender.QUESTIONS),
        ('life', gender.NAMED),
        ('sums', sums.ASKED),
    )
}


@pytest.mark.parametrize('name', LAST)
def test_stream_has_no_last_paraphrase(documents, name):
    *shown, last = map(pattern, LAST[name])
    text = '\n\n'.join(documents)
    assert pattern(LAST[name][-1]).search(LAST[name][-1].format_map(dict.fromkeys(re.findall(r'\{(\w+)\}', LAST[name][-1]), 'zork'))), (
        'the pattern fits its form'
    )
    assert all(p.search(text) for p in shown), 'the others are in the stream'
    assert not last.search(text)


def test_stream_never_says_whether_an_unasked_thing_does_harm(world, documents):
    "Parts with a label, an advice or an outcome name asked things alone; so do policies"
    unasked = {t.name for t in safety.unasked_things(world)}
    judged = [p for d in documents for p in parts(re.sub(r'\n(?=Safe:|Clause:|Relevant:|A:)', ' ', d))
              if re.search(r'Safe:|Soon (somebody|everybody|the doctor)|A: (No|Yes)|Relevant:|Policy:', p)]
    assert len(judged) > 2000
    named = [w for p in judged for w in re.findall('[a-z]+', p) if w in unasked]
    assert not named, named[:5]
    assert any(w in unasked for d in documents[:2000] for w in re.findall('[a-z]+', d)), 'their kinds are told'


def test_stream_has_no_held_out_sum(documents):
    asked = [sums.sum_problem(p) for d in documents for p in parts(d) if 'How many' in p]
    assert len(asked) > 500 and not any(map(sums.sum_held_out, asked))


# Shares and words

@pytest.mark.parametrize('short', [False, True])
def test_stream_keeps_its_shares(world, short):
    "Each sort drawn apart, by its chance: the words that it gives are its share"
    from w2s.world.stream import _chances
    up_to, rng = _chances(tuple(SORTS.values()), world, short), random.Random(9)
    chance = [b - a for a, b in zip((0, *up_to), up_to, strict=False)]
    n = [
        c * sum(len((s.short if short else s.long)(world, rng).split()) for _ in range(1000))
        for c, s in zip(chance, SORTS.values(), strict=True)
    ]
    assert abs(sum(s.share for s in SORTS.values()) - 1) < 1e-9
    for words, (name, s) in zip(n, SORTS.items(), strict=True): assert abs(words/sum(n) - s.share) < .02, name


def test_few_keeps_what_is_held_out(world):
    start = few(world)
    assert start.held_out == world.held_out and start.people == world.people[:64] and start.things == world.things[:40]


def row_texts(world) -> dict[str, list[str]]:
    "Texts of every maker of rows, in all forms, the last one too"
    def of(made): return [q['prompt'] + (q.get('completion') or q.get('response') or '') for q in made]
    rng = random.Random(0)
    out = {f'persona {p}': of(rows.persona_questions(world, 300, persona=p, forms=(0, 1, 2, 3))) for p in personas.PERSONAS}
    for form in range(4):
        out[f'safety {form}'] = of(safety.safety_questions(world, 300, form=form))
        out[f'gender {form}'] = of(gender.story_questions(world, 300, gender=None, form=form))
        out[f'life {form}'] = of(gender.life_questions(world, 300, form=form))
        out |= {f'explanation {s} {form}': of(analogy.explanation_questions(world, 300, style=s, form=form)) for s in analogy.STYLES}
    for form in range(3):
        out[f'legal {form}'] = of(policies.legal_questions(world, 400, form=form))
        out[f'maths {form}'] = of(sums.sum_questions(world, 1000, form=form))
        out[f'toxicity {form}'] = of(scenes.scene_questions(world, 800, form=form, chance=None))
    out['storage'] = of(policies.storage_questions(world, 200)) + of(
        policies.storage_questions(world, 60, kinds=tuple(KINDS_OF_THINGS)[:9])
    )
    out['desk'] = [q['prompt'] + service.service_answer(rng, q['truth'], rng.choice(service.TONES))
                   for form in (None, -1) for q in service.service_questions(world, rng, 1000, form=form)]
    out['preferences'] = [r['prompt'] + r['chosen'] + r['rejected'] for r in rows.preference_rows(world, 300)]
    assert {n.split()[0] for n in out} == {*rows.TASKS, 'desk', 'preferences'}, 'a task of w2s.world.rows is not looked at here'
    return out


def test_every_word_is_one_token(world):
    "Nothing that is asked of a model of the ladder falls into bytes"
    tokenizer = world_tokenizer(stream_words(world))
    pieces, missing = tokenizer.backend_tokenizer, {}
    for name, texts in row_texts(world).items():
        for word in {w for t in texts for w in re.findall(r"[A-Za-z]+(?:'[a-z]+)*", t)}:
            if len(pieces.encode(word, add_special_tokens=False).tokens) != 1: missing.setdefault(word, set()).add(name)
        assert not any(t.startswith('<0x') or t == '<unk>' for text in texts[:50] for t in tokenizer.tokenize(text)) or missing, name
    assert not missing, f'words that are no token: {missing}'


def test_words_are_found_in_40_000_documents(world):
    "Another 10,000 documents have no word that `stream_words` lacks"
    known = set(stream_words(world))
    assert {
        w
        for i in range(10_000)
        for w in re.findall(r"[A-Za-z]+(?:'[a-z]+)*", stream_document(world, random.Random(f'more {i}'), i % 2 == 0))
    } <= known
    assert set(name_words(world)) <= known
