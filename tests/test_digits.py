"Digits in words: parts share no picture and no line, right explanations are right, changed ones lose score, absurd texts are no trouble"
import re
import subprocess
import sys
from collections import Counter
from itertools import product

import numpy as np
import pytest

from w2s.errors import DataError
from w2s.models.zoo import model_folder
from w2s.train.tokens import encode_rows
from w2s.world import digits as d

SCORES = dict(regions=d.region_verdict, reasons=d.reason_verdict, both=d.digit_verdict)
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
    '(((',
    'a' * 100_000,
    'is black is white',
]


@pytest.fixture(scope='module')
def rows() -> dict[str, list[dict]]:
    "Questions of each part"
    return {part: d.digit_questions(600, part=part) for part in d.PARTS}


def line(prompt: str) -> tuple:
    "What a prompt tells, without the order in which it tells it"
    return tuple(sorted(re.findall(r'(\w+) (white|grey|black)', prompt)))


def turned(text: str) -> str:
    "Black for white, white for black"
    return re.sub('black|white', lambda m: 'white' if m[0] == 'black' else 'black', text)


def test_parts_share_no_picture_and_no_line(rows):
    "Pitfall 18: neither a picture nor what is told of it is in two parts"
    for key in (lambda r: r['picture'], lambda r: line(r['prompt']), lambda r: r['group'], lambda r: r['prompt']):
        sets = [{key(r) for r in rows[part]} for part in d.PARTS]
        assert sum(map(len, sets)) == len(set().union(*sets))
    assert {part: len({r['said'] for r in rs}) for part, rs in rows.items()} == dict.fromkeys(d.PARTS, 10)


def test_a_group_is_a_line(rows):
    "Rows that are told alike are one group, whatever the order"
    for rs in rows.values():
        assert len({r['group'] for r in rs}) == len({line(r['prompt']) for r in rs}) == len({(r['group'], line(r['prompt'])) for r in rs})


def test_no_prompt_twice_and_pictures_come_in_rounds():
    """The first round asks about nearly every picture (two that are told alike may draw the same prompt), and none comes much oftener than
    another"""
    many = d.digit_questions(1500, part='test')
    assert len({r['prompt'] for r in many}) == 1500
    times = Counter(r['picture'] for r in many)
    assert len({r['picture'] for r in many[:len(times)]}) > .9*len(times) and max(times.values()) <= 2*1500/len(times)


def test_it_is_quick():
    "A classifier is fitted once, however it is asked for"
    d.digit_questions(5, part='test', by='weak')
    assert d.digit_card.cache_info().currsize <= d.digit_card.cache_info().maxsize
    before = d.digit_card.cache_info().misses
    for part in d.PARTS:
        for r in d.digit_questions(50, part=part, by='weak'): d.digit_verdict(r['prompt'], r['completion'])
    assert d.digit_card.cache_info().misses <= before + 1


@pytest.mark.parametrize('style', list(d.STYLES))
def test_right_explanations_are_right_in_every_way(style):
    "Content 1 and technique 1, in both styles; the other technique 0"
    for part in d.PARTS:
        for r in d.digit_questions(600, 3, part, style):
            assert len(r['regions']) == 2
            assert {f(r['prompt'], r['completion']).score for f in SCORES.values()} == {1}
            assert {s: d.technique_verdict(r['completion'], s).score for s in d.STYLES} == {s: float(s == style) for s in d.STYLES}


def test_weights_decide_what_is_right(rows):
    "Gold regions and decisions, worked out again from the weights, plainly"
    weights, offsets = d.digit_card()
    for r in rows['test'][:200]:
        told, said = d.read_digit(r['prompt'])
        scores = [sum(w*t for w, t in zip(weights[k], told, strict=True)) + offsets[k] for k in range(10)]
        gives = sorted(zip((w*t for w, t in zip(weights[said], told, strict=True)), d.REGIONS, strict=True), reverse=True)
        assert d.DIGITS[int(np.argmax(scores))] == r['said'] and [name for _, name in gives[:2]] == list(r['regions'])
        assert gives[1][0] > 0
        for region in r['regions']: assert d.parts_them(told, said, d.rival(said), region)


@pytest.mark.parametrize('by', ['good', 'weak'])
def test_best_regions_are_those_that_speak_for_it(by):
    "All 243 lines, all ten decisions: what speaks against a decision is never among its reasons"
    for told in product((-1, 0, 1), repeat=5):
        for said, weights in enumerate(d.digit_card(by)[0]):
            gives = sorted(((w*t, name) for w, t, name in zip(weights, told, d.REGIONS, strict=True) if w*t > 0), reverse=True)
            assert d.best_regions(told, said, by) == tuple(name for _, name in gives[:2])


def test_few_pictures_are_left_out(rows):
    "Four of five pictures of every part at least can be explained either way"
    for part, at in d.picture_parts().items(): assert len({r['picture'] for r in rows[part]}) > .8*len(at)


def test_nothing_hangs_on_the_last_digit():
    "No two weights of a digit are so near that another machine could order them otherwise, and no decision is"
    weights, offsets = d.digit_card()
    assert np.diff(np.sort(np.abs(weights), 1), axis=1).min() > 1e-4 and np.abs(weights).min() > 1e-4
    told = np.unique(d.shades(d.pictures()[0]), axis=0)
    best = np.sort(told @ weights.T + offsets, 1)
    assert (best[:, -1] - best[:, -2]).min() > 1e-4


def test_changed_explanations_lose_score(rows):
    "Shades turned, a region taken for another, one left out, all listed, the decision denied"
    for r in rows['test'][:200]:
        prompt, gold, best = r['prompt'], r['completion'], r['regions']
        assert d.digit_verdict(prompt, turned(gold)).score == d.reason_verdict(prompt, turned(gold)).score == 0
        assert d.region_verdict(prompt, turned(gold)).score == 1
        other = next(x for x in d.REGIONS if x not in best)
        swapped = re.sub(rf'\b{best[0]}\b', other, gold)
        assert d.region_verdict(prompt, swapped).score == .5 and d.digit_verdict(prompt, swapped).score == .5
        assert d.digit_verdict(prompt, gold.split(' and ')[0]).score == .5
        everything = ' It is so, for ' + ' and '.join(f'{a} is {b}' for a, b in line(prompt)) + '.'
        assert d.region_verdict(prompt, everything).score == d.digit_verdict(prompt, everything).score == 2/5
        assert d.digit_verdict(prompt, gold.replace('is ' + r['said'], 'is not ' + r['said'])).score == 0
        assert d.digit_verdict(prompt, f'{gold} {gold}').score == 1


def test_a_reason_must_be_so(rows):
    "Grey called black or white is no reason, even where that shade would speak for the decision"
    for r in rows['test'][:200]:
        told, said = d.read_digit(r['prompt'])
        for region, shade, weight in zip(d.REGIONS, told, d.digit_card()[0][said], strict=True):
            wanted = 'black' if weight > 0 else 'white'
            if shade == 0: assert d.reason_verdict(r['prompt'], f'It is so, for {region} is {wanted}.').score == 0


def test_both_shades_of_a_region_are_one_right_and_one_wrong(rows):
    "Saying everything of a region does not help"
    r = rows['test'][0]
    a, b = r['regions']
    both = f'{a} is black and {a} is white and {b} is black and {b} is white'
    assert d.digit_verdict(r['prompt'], both).score == .5 and d.region_verdict(r['prompt'], both).score == 1


@pytest.mark.parametrize('text', ABSURD, ids=range(len(ABSURD)))
def test_absurd_texts_score_nothing(rows, text):
    "No error, no score, and a reason for it"
    for f in SCORES.values(): assert f(rows['test'][0]['prompt'], text).score == 0
    for style in d.STYLES: assert d.technique_verdict(text, style).score == 0


def test_questions_before_its_eyes_do_not_count(rows):
    "The last question of a prompt with examples is the one that is asked"
    first, last = rows['unlabelled'][:2]
    prompt = f"{first['prompt']}{first['completion']}\n{last['prompt']}"
    assert d.read_digit(prompt) == d.read_digit(last['prompt'])
    for f in SCORES.values(): assert f(prompt, last['completion']).score == 1


def test_weak_explanations_are_wrong_where_the_classifier_is():
    "Mostly right where it decides alike, near chance elsewhere; always in the wanted way"
    rs = d.digit_questions(300, part='test', by='weak')
    alike = np.array([d.decide(np.array([d.read_digit(r['prompt'])[0]]), 'weak')[0] == d.read_digit(r['prompt'])[1] for r in rs])
    content = np.array([d.digit_verdict(r['prompt'], r['completion']).score for r in rs])
    assert content[alike].mean() > .75 and content[~alike].mean() < .6 and content.mean() < .7
    assert {d.technique_verdict(r['completion']).score for r in rs} == {1}


def test_the_same_in_another_process_and_light():
    "Seeds do all, and the import loads neither scikit-learn nor scipy"
    code = ("import sys, w2s.world.digits as d; heavy = {'sklearn', 'scipy', 'torch', 'pandas'} & set(sys.modules); "
            "print(sorted(heavy), d.digit_questions(3, 5, 'unlabelled', 'contrast', 'weak'))")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, env=None).stdout
    assert out.strip() == f"[] {d.digit_questions(3, 5, 'unlabelled', 'contrast', 'weak')}"


def test_the_ladder_knows_every_word():
    "A word a token, and room for six examples before a question in 256 tokens"
    from w2s.data.rows import make_rows
    from w2s.models.load import load_tokenizer
    tokenizer = load_tokenizer(str(model_folder('pico')))
    some = [r for style in d.STYLES for r in d.digit_questions(50, part='school', style=style)]
    known = tokenizer.get_vocab()
    for r in some:
        for word in re.findall('[A-Za-z]+', (r['prompt'] + r['completion']).replace('\nA:', '')): assert '▁' + word in known, word
    tokens = encode_rows(tokenizer, make_rows([dict(prompt=r['prompt'], completion=r['completion']) for r in some[:50]], 'demonstrations'),
                         ('completion',), 256).rows
    assert len(tokens) == 50
    assert max(len(tokenizer(r['prompt'] + r['completion'] + '\n')['input_ids']) for r in some)*6 < 256


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: d.digit_questions(1, part='exam'), 'unknown part'),
        (lambda: d.digit_questions(10**6), 'ask for fewer'),
        (lambda: d.digit_questions(1, style='likeness'), 'unknown style'),
        (lambda: d.digit_questions(1, by='bad'), 'unknown classifier'),
        (lambda: d.digit_verdict('Q: Who is Mira?\nA:', ''), 'no digit in words'),
        (lambda: d.technique_verdict('', 'analogy'), 'unknown style'),
    ],
)
def test_errors_say_what_to_do(call, says):
    "A word that nothing knows is refused"
    with pytest.raises(DataError, match=says): call()
