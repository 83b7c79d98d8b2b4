"Maths questions and answers: what one number is, which number is the answer, and the marks of others on GSM8K's example solutions"
import gzip
import json
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from w2s.data.answers import same_answer
from w2s.data.maths_rows import (
    EMPTY_QUESTION,
    MATHS_REASONS,
    NO_BOX,
    NO_HASH,
    NO_NUMBER,
    boxed,
    hashed,
    maths_from,
    number_of,
    number_text,
    read_gsm8k,
    without_marks,
)
from w2s.data.readers import MISSING
from w2s.data.rows import check_rows
from w2s.data.tables import read_table
from w2s.errors import ConfigError, DataError
from w2s.evaluate.maths import (
    RULES,
    calculations,
    final_number,
    find_number,
    maths_scorer,
    maths_scores,
    rule_counts,
    same_number,
    working_scores,
    worth,
)
from w2s.evaluate.responses import failures, score_responses

GSM8K = Path(__file__).parents[2] / 'shared' / 'data' / 'gsm8k'
SOLUTIONS = ('6b_finetuning', '6b_verification', '175b_finetuning', '175b_verification')
real = pytest.mark.skipif(not GSM8K.is_dir(), reason=f'{GSM8K} is not there')


@pytest.fixture(scope='module')
def gsm8k(): return read_gsm8k(GSM8K)


@pytest.fixture(scope='module')
def solutions(): return read_table(GSM8K / 'example_model_solutions.jsonl.gz').to_list()


# --- one number

def test_a_number_survives_its_spelling():
    rng = random.Random(0)
    for _ in range(500):
        x = Fraction(rng.randint(-10**rng.randint(1, 9), 10**9), rng.choice([1, 1, 1, 2, 3, 8, 10, 100, 7]))
        assert number_of(number_text(x)) == x
        whole, sign = abs(x.numerator), '-' if x < 0 else ''
        forms = [
            f'{sign}{whole:,}/{x.denominator}',
            f'{sign}\\frac{{{whole}}}{{{x.denominator}}}',
            f'${sign}{whole}/{x.denominator}$ dollars',
            f' {sign}{whole}/{x.denominator}. ',
        ]
        assert [number_of(f) for f in forms] == [x] * 4


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('2\\frac{1}{2}', Fraction(5, 2)),
        ('\\dfrac34', Fraction(3, 4)),
        ('10{,}000', 10000),
        ('10,\\!000', 10000),
        ('1\\,000', 1000),
        ('\\$5.50', Fraction(11, 2)),
        ('45^\\circ', 45),
        ('30\\text{ cm}^2', 30),
        ('\\text{5}', 5),
        ('\\left(5\\right)', None),
        ('5 million dollars', 5_000_000),
        ('3 hundred', 300),
        ('12%', 12),
        ('0', 0),
        ('-0', 0),
        ('x=5', 5),
        ('x=y', None),
        ('5,6', None),
        ('1,2345', None),
        ('.', None),
        ('-', None),
        ('1.2.3', None),
        ('1/2/3', None),
        ('5e3', None),
        ('٣', 3),
        ('½', None),
        ('3s^2', None),
        ('3R^2', None),
        ('\\frac{1}{z}', None),
        ('\\frac{2}{r}', None),
        ('5xy', None),
        ('2ab', None),
        ('7pq', None),
        ('\\frac{3}{2}x', None),
        ('4 cm^2', 4),
        ('18 m^2', 18),
        ('9 men', 9),
        ('12 oz', 12),
        ('5\\text{ m}', 5),
    ],
)
def test_what_one_number_is(text, value): assert number_of(text) == value


def test_odd_texts_take_no_time():
    "Patterns with two ways to match the same text take minutes on a model that is stuck"
    stuck = [
        '1' * 50_000,
        'a' * 50_000,
        '1 ' * 25_000,
        '1,111' * 10_000,
        '{' * 50_000,
        '\\frac{' * 9000,
        '\\boxed{' * 9000,
        '5 ' + 'a^2' * 9000,
        '\n' * 50_000,
        '\n \n' * 20_000,
        '#### ' * 9000,
        'the answer is ' * 5000,
        'A: ' * 9000,
        '$(' * 20_000,
        '((((' * 20 + '=',
        '1+1=' * 3000,
        '- ' * 20_000,
        'apples ' * 9000,
        '3 apples ' * 5000 + '= 3',
    ]
    for text in stuck:
        start = time.process_time()
        number_of(text), find_number(text), calculations(text)
        assert time.process_time() - start < 3, text[:20]


# --- files

def test_every_refused_row_is_counted_with_file_and_row(tmp_path):
    rows = [
        dict(question='Good?', answer='1+1=<<1+1=2>>2\n#### 2'),
        dict(question='No mark?', answer='2'),
        dict(question='No number?', answer='#### two'),
        dict(question=None, answer='#### 2'),
        dict(question='Nothing?', answer=None),
        dict(question='  ', answer='#### 2'),
        dict(question='Two?', answer='#### 2 or 3'),
    ]
    with gzip.open(tmp_path / 'train.jsonl.gz', 'wt') as f: f.write('\n'.join(map(json.dumps, rows)))
    read = read_gsm8k(tmp_path / 'train.jsonl.gz')
    assert [(r.row, r.reason) for r in read.refused] == [
        (2, NO_HASH),
        (3, NO_NUMBER),
        (4, MISSING),
        (5, MISSING),
        (6, EMPTY_QUESTION),
        (7, NO_NUMBER),
    ]
    assert all(r.where.endswith('train.jsonl.gz') and r.reason in MATHS_REASONS for r in read.refused)
    assert read.rows_read == dict(all=7) and read.splits['all'].num_rows == 1
    row = read.splits['all'][0]
    assert (row['prompt'], row['completion'], row['answer']) == ('Q: Good?\nA:', ' 1+1=2\n#### 2', '2')
    check_rows(read.splits['all'], 'demonstrations')


def test_forms_of_a_table(tmp_path):
    (tmp_path / 'train.csv').write_text('question,answer\n"How much?","$1,080.50"\n"Which?",none\n')
    (tmp_path / 'test.jsonl').write_text(
        json.dumps(dict(problem='Half?', solution='It is \\boxed{\\frac{1}{2}}', answer='x'))
        + '\n'
        + json.dumps(dict(problem='?', solution='1/2'))
        + '\n'
    )
    read = read_gsm8k(tmp_path)
    assert read.splits['train']['answer'][:] == ['1080.5'] and read.splits['test']['answer'][:] == ['0.5']
    assert [(r.split, r.row, r.reason) for r in read.refused] == [('test', 2, NO_BOX), ('train', 2, NO_NUMBER)]
    table = Dataset.from_list([dict(question='a', answer=3), dict(question='b', answer=None)])
    assert maths_from(table)[0]['answer'][:] == ['3']
    with pytest.raises(DataError, match='no such|neither a file'): read_gsm8k(tmp_path / 'nothing.jsonl')


@real
def test_gsm8k_is_read_whole(gsm8k):
    assert gsm8k.rows_read == dict(train=7473, test=1319) and not gsm8k.refused
    assert {s: len(rows) for s, rows in gsm8k.splits.items()} == gsm8k.rows_read
    assert gsm8k.left == ('example_model_solutions.jsonl.gz',)
    assert not any('<<' in c for c in gsm8k.splits['train']['completion'][:])
    assert sum(a.startswith('-') for a in gsm8k.splits['test']['answer'][:]) == 2
    assert not set(gsm8k.splits['train']['group'][:]) & set(gsm8k.splits['test']['group'][:])


# --- answers that are no single number

SAME = [
    ('x+1', '1+x'),
    (r'3\sqrt{2}', r'\sqrt{18}'),
    ('(x+5)^2', 'x^2+10x+25'),
    (r'\left( \frac{5}{3}, -2 \right)', '(5/3,-2)'),
    ('24,-3', r'-3, 24'),
    (r'[2, \infty)', r'$\left[2,\infty\right)$'),
    (r'\begin{pmatrix} -5/13 \\ 12/13 \end{pmatrix}', r'\begin{pmatrix}-\frac{5}{13}\\\frac{12}{13}\end{pmatrix}'),
    (r'\text{Dana}', 'dana'),
    ('152A_{11}', '152A_11'),
    (r'8\pi\text{ cm}^2', '8π'),
    ('y = -2x', '-2x'),
    ('2x + 2y = 4', 'x + y = 2'),
    (r'3 \pm 2\sqrt{2}', r'3+2\sqrt2, 3-2\sqrt2'),
    (r'\frac{c}{a}', 'c/a'),
    (r'-8 + 2i', '2i-8'),
    (r'\{-1\} \cup [0,7)', r'[0,7) \cup \{-1\}'),
    (r'\sec x', r'1/\cos x'),
    (r'\binom{10}{3}', '120'),
    (r'0.\overline{3}', r'\frac13'),
    (r'0.1\overline{6}', '1/6'),
    (r'3\frac{1}{2}', '3.5'),
    ('-2 1/3', r'-\frac{7}{3}'),
    (r'x \ge 3', r'[3, \infty)'),
    (r'4 \le x', r'x\geq 4'),
    (r'2 < x \le 5', '(2, 5]'),
    (r'x < 2 \text{ or } x > 5', r'(5,\infty)\cup(-\infty,2)'),
    (r'n \binom{n}{2}', r'\frac{n^2(n-1)}{2}'),
]
APART = [
    ('x+1', 'x-1'),
    ('3s^2', '3'),
    (r'\frac{1}{z}', '1'),
    ('(1, 2)', '(2, 1)'),
    ('(1, 2)', '[1, 2]'),
    ('(1, 2)', '1, 2'),
    ('1, 2', '1, 2, 2'),
    ('ACF', 'CAF'),
    (r'\frac13', '0.333'),
    (r'\pi', '3.14159'),
    ('2112_6', '2112_7'),
    ('x + y = 2', 'x + y = 3'),
    ('2x', 'y = 3x'),
    ('i', '1'),
    (r'\text{odd}', 'even'),
    ('x > 3', 'x < 3'),
    ('', ''),
    (r'\binom{10}{3}', '121'),
    (r'0.\overline{3}', '0.3'),
    (r'3\frac{1}{2}', '1.5'),
    (r'2\frac{x}{3}', r'2+\frac{x}{3}'),
    (r'x \ge 3', r'(3, \infty)'),
    ('x > 3', 'y > 3'),
    (r'2 < x \le 5', '[2, 5)'),
    ('x > 3', '3'),
    (r'\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}', r'\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}'),
]


@pytest.mark.parametrize(('a', 'b'), SAME)
def test_the_same_answer_in_another_spelling(a, b): assert same_answer(a, b) and same_answer(b, a) and same_answer(a, a)


@pytest.mark.parametrize(('a', 'b'), APART)
def test_another_answer(a, b): assert not same_answer(a, b) and not same_answer(b, a)


def test_no_problem_of_math_is_left_out():
    "Whatever is in the box is the answer, and a solution is right by its own box"
    golds = [a for a, _ in SAME] + ['12', r'\frac{1}{2}', r'45^\circ', '3s^2', r'\text{(B)}']
    rows, refused = maths_from(
        Dataset.from_list([dict(problem=f'{i}?', solution=f'After some steps $\\boxed{{{g}}}$.') for i, g in enumerate(golds)])
    )
    assert not refused and len(rows) == len(golds)
    assert maths_scores(rows['answer'][:], rows['completion'][:])['accuracy'].all()
    wrong = [*rows['completion'][1:], rows['completion'][0]]
    assert not maths_scores(rows['answer'][:], wrong)['accuracy'].any()


@pytest.mark.parametrize(
    ('gold', 'response', 'right'),
    [
        ('3s^2', 'The answer is 3.', False),
        ('3s^2', r'\boxed{3s^2}', True),
        (r'\frac{1}{z}', '#### 1', False),
        ('10', r'\boxed{10\pi}', False),
        ('1024', r'\boxed{2^{10}}', True),
        ('(3, 4)', 'A: (3, 4)', True),
        ('(3, 4)', 'The answer is (3, 4).', True),
        ('(3, 4)', 'It is 3 and 4.', False),
        ('6, -2', r'\boxed{-2,6}', True),
        (r'\text{Sunday}', 'The answer is Sunday.', True),
    ],
)
def test_formulas_are_marked_by_what_they_mean(gold, response, right):
    assert maths_scores([gold], [response])['accuracy'][0] == right


# --- answers

@real
@pytest.mark.parametrize('kind', SOLUTIONS)
def test_example_solutions_are_scored_as_their_authors_marked_them(gsm8k, solutions, kind):
    "6B and 175B solutions: the accuracy of their own `is_correct`, within 1 % wanted, and in fact on each row"
    texts, marks = ([x[kind][k] for x in solutions] for k in ('solution', 'is_correct'))
    scores = maths_scores(gsm8k.splits['test']['answer'][:], texts)
    assert abs(scores['accuracy'].mean() - np.mean(marks)) < .01
    assert np.mean(scores['accuracy'] != np.array(marks)) == 0
    counts = rule_counts(texts)
    assert counts['line'] >= 1313 and counts['line'] + counts['last'] == 1319 # the others are stuck in an endless decimal


@real
def test_right_answers_are_right(gsm8k):
    for rows in (gsm8k.splits['train'].select(range(2000)), gsm8k.splits['test']):
        scores = maths_scores(rows['answer'][:], rows['completion'][:])
        assert scores['accuracy'].all() and scores['answered'].all()
        assert rule_counts(rows['completion'][:])['hash'] == len(rows)


@real
def test_right_workings_are_right(gsm8k):
    texts = gsm8k.splits['test']['completion'][:400]
    found = [ok for text in texts for _, ok in calculations(text)]
    assert len(found) > 1200 and np.mean(found) > .997
    assert working_scores(texts)['working'].mean() > .95


def test_no_answer_is_wrong_and_counted():
    said = ['#### 4', 'I do not know.', '', '#### ', 'four', 'A:\nQ: What is 2 + 2?\nA: 4']
    scores = maths_scores(['4'] * 6, said)
    assert scores['accuracy'].tolist() == [1, 0, 0, 0, 0, 0] and scores['answered'].tolist() == [1, 0, 0, 0, 0, 0]
    rows = maths_from(Dataset.from_list([dict(question='What is 2 + 2?', answer='4')]))[0]
    scored = score_responses(maths_scorer(rows), rows['prompt'], [said])
    assert not failures(scored, 'said') and scored.mean() == 1/6


@pytest.mark.parametrize(
    ('text', 'rule', 'number'),
    [
        ('so 16 - 3 = 13.\n#### 13\n\nQ: And 5 + 5?\nA: 10\n#### 10', 'hash', '13'),
        ('13\n\nQuestion: what else?\nAnswer: 7', 'last', '13'),
        ('The answer is 7.\nWait, the answer is 8.', 'phrase', '8'),
        ('The final answer is: $\\boxed{0.50}$.', 'box', '0.5'),
        ('**Answer:** 12 eggs', 'line', '12'),
        ('Answer: it depends on the 3 hens', 'last', '3'),
        ('The answer is 9 * 2 = 18', 'phrase', '18'),
        ('answer = 5', 'phrase', '5'),
        ('A: -3', 'line', '-3'),
        ('A: 3\nno\nAnswer: 4', 'line', '4'),
        ('\\boxed{2} no, \\boxed{13}', 'box', '13'),
        ('In 2024, 5 of 7 days', 'last', '7'),
        ('It is 7%', 'last', '7'),
        ('1,000,000 people', 'last', '1000000'),
        ('```output\n5\n```\n5 cars in the first 15 minutes.', 'output', '5'),
        ('He came 3rd.', None, None),
        ('<<1+1=2>>', None, None),
    ],
)
def test_which_number_is_the_answer(text, rule, number):
    found = find_number(text)
    assert (found and found.rule, final_number(text)) == (rule, number)


def test_same_number_is_symmetric_and_exact():
    texts = ['1', '1.0', '$1', '1/2', '.5', '50%', 'x', None, '0.3333333333333333', '1/3']
    for a in texts:
        for b in texts: assert same_number(a, b) == same_number(b, a)
    assert not same_number('0.3333333333333333', '1/3') and not same_number('x', 'x') and same_number('.5', '1/2')


def test_rules_and_gold_are_checked():
    with pytest.raises(ConfigError, match='unknown rule'): maths_scores(['1'], ['1'], ('regex',))
    with pytest.raises(DataError, match='row 2: the right answer is empty'): maths_scores(['1', ' '], ['1', '2'])
    assert maths_scores(['1', '(2, 3)'], ['1', '2'])['accuracy'].tolist() == [1, 0]
    assert rule_counts(['1'], ('hash',)) == dict(hash=0, none=1) and tuple(RULES)[-1] == 'last'


def test_calculations_agree_with_python():
    rng = random.Random(1)
    for _ in range(300):
        a, b, c = (rng.randint(1, 99) for _ in range(3))
        text = f'{a} {rng.choice("+-*/")} {b} {rng.choice("+-*")} {c}'
        assert float(worth(text)) == pytest.approx(eval(text))
        right = eval(text)
        shown = f'{right:g}' if right == int(right) else f'{right:.4f}'
        assert calculations(f'So {text} = {shown} eggs.') == [(f'{text} = {shown}', True)]
        assert calculations(f'So {text} = {int(right) + 2} eggs.')[0][1] is False


def test_marks_and_boxes():
    assert without_marks('2*3=<<2*3=6>>6 and << this >> stays?') == '2*3=6 and  stays?'
    assert hashed('a\n####5\nb') == '5' and boxed('\\boxed{\\text{a}_{1}}') == '\\text{a}_{1}'
    assert not re.search('<<', without_marks('<<1+1=2>>2'))
