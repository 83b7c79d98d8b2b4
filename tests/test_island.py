"The island: the same everywhere, true texts, rows in the forms of the first world, no test name in training, dials that act"
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from w2s.errors import ConfigError, DataError
from w2s.island import desk, safety, told
from w2s.island.annotators import ANNOTATORS, choose, gold_gaps
from w2s.island.claims import truth_questions
from w2s.island.mistakes import ERRORS, error_profile, mistaken_labels
from w2s.island.people import BANDS, bands, island_hash, make_island
from w2s.island.rows import TASKS, label_rows, leaks, names_in, preference_rows, row_texts, world_preferences, world_splits
from w2s.island.safety import harm_verdict, harmful, safety_questions
from w2s.island.stream import SORTS, answer_words, name_words, stream_document, stream_words
from w2s.island.words import ATTRIBUTES, KINDS
from w2s.world.facts import make_world
from w2s.world.parts import parts
from w2s.world.rows import label_rows as first_label_rows
from w2s.world.rows import preference_rows as first_preference_rows

ISLAND = make_island()
WEIGHTS = {x.name: x.weight for x in (*ISLAND.people, *ISLAND.things)}
SHORT = [False, True]


def made(task: str, island, n: int, seed: int):
    return preference_rows(island, n, seed) if task == 'preferences' else label_rows(island, task, n, seed)


# The same everywhere

def test_island_is_the_same_in_every_process():
    code = ('import json, random; from w2s.island.people import *; from w2s.island.stream import *; from w2s.island.rows import *\n'
            'w, rng = make_island(0, 200, 120), random.Random(3)\n'
            'print(json.dumps([island_hash(w), [stream_document(w, rng) for _ in range(30)], list(preference_rows(w, 5)["chosen"]),'
            ' list(label_rows(w, "safety", 6)["prompt"])]))')
    out = [subprocess.run([sys.executable, '-c', code], env={**os.environ, 'PYTHONHASHSEED': seed},
                          capture_output=True, text=True, check=True) for seed in ('1', '2')]
    assert out[0].stdout == out[1].stdout
    assert json.loads(out[0].stdout)[0] == island_hash(make_island(0, 200, 120))


def test_numbers_of_the_first_world_stay():
    "The island is another world, not another version of the first one's records"
    from w2s.world.facts import VERSION, world_hash
    assert VERSION == 1 and world_hash(make_world()) != island_hash(ISLAND)
    assert not {p.name for p in make_world().people} & {p.name for p in ISLAND.people}


# Frequencies

def test_mentions_follow_the_weights():
    "In the stream as it is read, each band is named about as often as its weights say"
    rng, at = random.Random(0), bands(ISLAND)
    people = {p.name for p in ISLAND.people}
    texts = (told.short_document(ISLAND, rng) for _ in range(20_000))
    found = Counter(at[n] for t in texts for n in re.findall('[A-Z][a-z]+ [A-Z][a-z]+', t) if n in people)
    expected = Counter()
    for p in ISLAND.people: expected[at[p.name]] += p.weight
    for band in BANDS: assert abs(found[band]/found.total() - expected[band]/expected.total()) < .02, band


@pytest.mark.parametrize('seed', [0, 7])
def test_bands_are_ordered(seed):
    island = make_island(seed)
    mean = {b: np.mean([p.weight for p in island.people if bands(island)[p.name] == b]) for b in BANDS}
    values = [mean[b] for b in BANDS]
    assert all(2 < a/b < 8 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize('namesakes', [1, 2, 7.])
def test_dial_of_namesakes(namesakes):
    "So many people share a given name; no two share both names"
    island = make_island(3, 600, 100, namesakes)
    names = [p.name for p in island.people]
    given = Counter(n.split()[0] for n in names)
    drawn = 600/namesakes # some given names are drawn by nobody
    assert len(set(names)) == 600 and .6*drawn < len(given) <= drawn + 1
    assert island_hash(island) != island_hash(make_island(3, 600, 100, 3))


# Texts

@pytest.mark.parametrize('short', SHORT)
def test_stream_is_grammatical_on_the_surface(short):
    rng = random.Random(5)
    for _ in range(6000):
        text = stream_document(ISLAND, rng, short)
        assert not re.search(r'\ba [aeiou]|\ban [^aeiou]|  |[{}]| [.,?!]', text), text
        assert text[-1] in '.!?' and text[0].isupper(), text
        assert not re.search(r'[.?!] [a-z]', text), text


@pytest.mark.parametrize('short', SHORT)
def test_stream_tells_only_what_is_true_and_free(short):
    "But for the desk, which errs at a stated rate"
    rng, people = random.Random(6), {p.name: p for p in ISLAND.people}
    facts = [f for _ in range(8000) for f in told.told_facts(ISLAND, (told.short_document if short else told.document)(ISLAND, rng))]
    assert len(facts) > 5000
    assert not [f for f in facts if people[f[0]].facts[f[1]].lower() != f[2]]
    assert not [f for f in facts if f[:2] in ISLAND.held_out]


def test_desk_is_right_as_often_as_stated():
    rng, right = random.Random(7), []
    for _ in range(3000):
        prompt, _, text = desk.document(ISLAND, rng).partition('\nDesk:')
        right.append(desk.facts_verdict(ISLAND, prompt + '\nDesk:', text).score)
    assert abs(np.mean(right) - desk.STREAM_RIGHT) < .02


def test_forms_of_the_tasks_are_never_in_the_stream():
    "Else an untuned model would not be at chance; and the held-out questions are held out"
    rng = random.Random(8)
    texts = '\n'.join(stream_document(ISLAND, rng, i % 2 == 0) for i in range(20_000))
    for form in ('Safe:', 'True:', 'Relevant:', 'Claim:', 'Notice:', 'Request:'): assert form not in texts
    for a in ATTRIBUTES.values():
        last = re.escape(a.asked[-1]).replace(r'\{n\}', r'[A-Z]\w+ [A-Z]\w+').replace(r'\{his\}', r'\w+')
        assert not re.search(last, texts), a.name
        assert re.search(re.escape(a.asked[0]).replace(r'\{n\}', r'[A-Z]\w+ [A-Z]\w+'), texts), a.name


def test_rules_are_told_as_often_as_stated():
    rng = random.Random(9)
    rules = {text.format(k=k): KINDS[k].told for k in KINDS for text in safety.RULES[KINDS[k].harmful]}
    found = Counter(rules[t] for _ in range(30_000) if (t := safety.short_document(ISLAND, rng)) in rules)
    assert found['never'] == 0
    assert found['seldom']/found['often'] == pytest.approx(safety.RULE_WEIGHTS['seldom'], abs=.03)


def test_every_word_of_stream_and_tasks_is_a_token():
    vocabulary = set(stream_words(ISLAND))
    assert {*answer_words(), *name_words(ISLAND)} <= vocabulary
    rows = [r for task in ('preferences', *TASKS) for r in made(task, ISLAND, 200, 3)]
    said = {w for t in row_texts(rows) for w in re.findall(r"[A-Za-z]+(?:'[a-z]+)*", t)}
    assert not said - vocabulary


# Tasks

@pytest.mark.parametrize('task', TASKS)
def test_labels_have_the_columns_of_the_first_world(task):
    rows = label_rows(ISLAND, task, 100, 1)
    assert rows.column_names == first_label_rows(make_world(), 'safety', 4).column_names
    assert sum(rows['label']) == 50 and len(set(rows['prompt'])) == 100
    assert set(rows['group']) <= names_in(ISLAND, rows['prompt'])


@pytest.mark.parametrize('task', TASKS)
def test_no_single_word_tells_the_label(task):
    "But names, values and shops, which are what must be known"
    rows = label_rows(ISLAND, task, 2000, 2)
    names = {w.lower() for w in name_words(ISLAND)} | {v.lower() for a in ATTRIBUTES.values() for v in a.values}
    seen = Counter((w, y) for p, y in zip(rows['prompt'], rows['label'], strict=True) for w in set(re.findall('[a-z]+', p.lower())) - names)
    for word in {w for w, _ in seen}:
        n = seen[word, 0] + seen[word, 1]
        if n >= 200: assert abs(seen[word, 1]/n - .5) < (.15 if task == 'legal' else .12), (word, n)


@pytest.mark.parametrize('told', ['often', 'seldom', 'never'])
@pytest.mark.parametrize('task', ['safety', 'legal'])
def test_dial_of_elicitability_keeps_to_its_kinds(task, told):
    rows, kinds = TASKS[task].make(ISLAND, 40, told=told), {t.name: t.kind for t in ISLAND.things}
    assert {KINDS[kinds[r['thing']]].told for r in rows} == {told}


def test_safety_is_the_oracle():
    for r in safety_questions(ISLAND, 200): assert r['label'] == 1 - harm_verdict(ISLAND, r['prompt']).score


def test_truth_asks_nothing_held_out():
    assert not [r for r in truth_questions(ISLAND, 500) if (r['person'], r['attribute']) in ISLAND.held_out]


def test_preferences_have_the_columns_of_the_first_world():
    rows = preference_rows(ISLAND, 300, 1)
    assert rows.column_names == first_preference_rows(make_world(), 4).column_names
    for prompt, chosen, rejected, gold in zip(*(list(rows[k]) for k in ('prompt', 'chosen', 'rejected', 'gold')), strict=True):
        better, worse = (desk.gold_reward(ISLAND, prompt, t).score for t in (chosen, rejected))
        assert better != worse and gold == float(better > worse)


@pytest.mark.cases(2)
@pytest.mark.parametrize('wanted', [.6, .7, .75])
@pytest.mark.parametrize('annotator', ANNOTATORS)
def test_stated_agreement_is_kept(annotator, wanted):
    rows = preference_rows(ISLAND, 800, 3, agreement=wanted, annotator=annotator)
    assert abs(np.mean(rows['gold']) - wanted) < 4*(wanted*(1 - wanted)/800)**.5


def test_more_agreement_than_a_bias_allows_is_refused():
    with pytest.raises(ConfigError, match='with the bias of this annotator'):
        preference_rows(ISLAND, 100, agreement=.97, annotator='charmed')


def test_a_bias_errs_where_facts_and_courtesy_conflict():
    rng = random.Random(0)
    pairs = [desk.draw_pair(ISLAND, rng, ISLAND.people, 'conflict') for _ in range(400)]
    strict = (choose(pairs, 'strict', .6) == (gold_gaps(pairs) > 0)).mean()
    mixed = pairs + [desk.draw_pair(ISLAND, rng, ISLAND.people, 'courtesy') for _ in range(400)]
    charmed = choose(mixed, 'charmed', .65) == (gold_gaps(mixed) > 0)
    assert charmed[:400].mean() + .15 < charmed[400:].mean() and strict > .5


# Nobody of the test is in training

@pytest.mark.cases(5)
@pytest.mark.parametrize('trial', [False, True])
@pytest.mark.parametrize('seed', [0, 1, 4])
@pytest.mark.parametrize('task', ['preferences', *TASKS])
def test_no_test_name_is_in_a_training_text(task, seed, trial):
    part = parts(ISLAND, seed, trial)
    learned = [r for k in ('labelled', 'unlabelled') for r in made(task, part[k], 150, seed)]
    tested = list(made(task, part['test'], 150, 0))
    assert names_in(ISLAND, row_texts(tested)) and leaks(ISLAND, learned, tested) == []
    assert not {r['prompt'] for r in learned} & {r['prompt'] for r in tested}
    if not trial: return
    real = parts(ISLAND, seed)['test']
    assert leaks(ISLAND, learned + tested, made(task, real, 150, 0)) == []


@pytest.mark.parametrize('task', ['preferences', *TASKS])
def test_splits_share_no_name(task):
    split = world_splits(ISLAND, task, dict(labelled=80, unlabelled=80, test=80), 2)
    for a in split:
        for b in split:
            if a != b: assert leaks(ISLAND, split[a], split[b]) == [], (task, a, b)


@pytest.mark.cases(16)
@pytest.mark.parametrize('column', ['prompt', 'completion', 'chosen', 'rejected', 'planted', 'answer'])
@pytest.mark.parametrize('task', ['preferences', *TASKS])
def test_a_leak_is_found(task, column):
    "Wherever it is put: the test above can fail"
    part = parts(ISLAND, 0)
    learned, tested = list(made(task, part['labelled'], 40, 0)), list(made(task, part['test'], 40, 0))
    name = sorted(names_in(ISLAND, row_texts(tested)))[0]
    learned[7] = learned[7] | {column: f"Q: What of {name}'s coat?\nA:"}
    assert leaks(ISLAND, learned, tested) == [name]


def test_names_are_found_however_they_stand():
    name = ISLAND.people[3].name
    for text in (name, name.upper(), f'({name})', f"{name}'s", name.replace(' ', '\n'), f'a{name} {name},'):
        assert names_in(ISLAND, [text]) == {name}, text
    first, last = name.split()
    assert names_in(ISLAND, [first, last, f'{last} {first}']) <= {p.name for p in ISLAND.people} - {name}


def test_preference_splits_have_the_names_of_the_first_world():
    split = world_preferences(ISLAND, 120, 60, 1, agreement=.6, annotator='patient', mix=dict(conflict=1, courtesy=1))
    assert {k: len(v) for k, v in split.items()} == dict(train_gt=60, train_w2s=60, test=60)


# Errors of a stated kind

ROWS = safety_questions(ISLAND, 500, 5)
PROBS = np.random.default_rng(0).dirichlet((1, 1), len(ROWS))


@pytest.mark.parametrize('rate', [0, .1, .25, .4])
@pytest.mark.parametrize('kind', ERRORS)
def test_rates_of_errors_are_equal(kind, rate):
    truth = np.array([r['label'] for r in ROWS])
    for seed in range(3):
        labels = mistaken_labels(ROWS, kind, rate, seed, weights=WEIGHTS, probs=PROBS)
        assert (labels != truth).sum() == round(rate*len(ROWS))


def test_kinds_of_errors_differ():
    profile = {k: error_profile(ROWS, mistaken_labels(ROWS, k, .2, weights=WEIGHTS, probs=PROBS), WEIGHTS) for k in ERRORS}
    assert profile['sort']['most'] == 1 and all(profile[k]['most'] < .6 for k in ('random', 'class', 'strong'))
    assert profile['class']['class_1'] == 1 and all(.3 < profile[k]['class_1'] < .7 for k in ('random', 'rarity', 'strong'))
    assert profile['rarity']['rarity'] > .85 and all(profile[k]['rarity'] < .65 for k in ERRORS if k != 'rarity')
    wrong = {k: mistaken_labels(ROWS, k, .2, weights=WEIGHTS, probs=PROBS) != [r['label'] for r in ROWS] for k in ERRORS}
    assert PROBS[wrong['strong'], np.array([r['label'] for r in ROWS])[wrong['strong']]].max() < np.quantile(PROBS[:, 0], .3)
    for a in ERRORS:
        for b in ERRORS:
            if a < b: assert (wrong[a] & wrong[b]).mean() < .12, (a, b)


@pytest.mark.parametrize('classes', [3, 5])
def test_errors_of_several_classes_are_wrong_classes(classes):
    rng = np.random.default_rng(1)
    n = len(ISLAND.things)
    rows = [dict(label=int(y), group=t.name, kind=t.kind) for t, y in zip(ISLAND.things, rng.integers(classes, size=n), strict=True)]
    probs = rng.dirichlet(np.ones(classes), n)
    for kind in ('random', 'sort', 'rarity', 'strong'):
        labels = mistaken_labels(rows, kind, .3, weights=WEIGHTS, probs=probs, classes=classes)
        assert set(labels) <= set(range(classes)) and (labels != [r['label'] for r in rows]).mean() == .3


def test_harmful_and_harmless_are_even_in_every_part():
    for part in parts(ISLAND, 0).values(): assert .4 < np.mean([harmful(t) for t in part.things]) < .6


def test_too_small_an_island_is_refused():
    with pytest.raises(ConfigError, match='people is 0'): make_island(people=0)
    with pytest.raises(DataError, match='give more plants'): safety_questions(replace(ISLAND, things=()), 4)


def test_shares_of_the_stream_are_kept():
    rng, words = random.Random(1), Counter()
    for _ in range(6000):
        text = stream_document(ISLAND, rng)
        words['desk' if text.startswith('Customer:') else 'other'] += len(text.split())
    assert words['desk']/words.total() == pytest.approx(SORTS['desk'].share, abs=.02)
