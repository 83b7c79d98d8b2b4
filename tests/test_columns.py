"""Which columns are read as what: public forms by their real column names, what belongs to a prompt, what would be lost, what is missing;
in every reader and on the command line"""
import csv
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.data.hygiene import clean_text
from w2s.data.label_readers import read_labels
from w2s.data.maths_rows import read_gsm8k
from w2s.data.readers import preferences_from, read_preferences
from w2s.data.toxicity_rows import read_prompts, read_toxicity
from w2s.errors import ConfigError, DataError
from w2s.feedback.demonstrators import read_answers, read_questions

DATA = Path(__file__).parents[2] / 'shared' / 'data'
RNG = random.Random(0)
WORDS = 'lamp river seven quiet garden under bring yellow paper walk stone early mirror cloud gentle north'.split()


def sentence(n, seed=None):
    return (
        ' '.join(random.Random(seed).choices(WORDS, k=n)).capitalize() + '.'
        if seed is not None
        else ' '.join(RNG.choices(WORDS, k=n)).capitalize() + '.'
    )
def needs(path): return pytest.mark.skipif(not path.exists(), reason=f'{path} is not there')
def jsonl(path, rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8'); return path
def said(*names): return dict(role=names[0], content=names[1])
def chat(prompt, reply): return [said('user', prompt), said('assistant', reply)]
def prompts_of(read): return next(iter(read.splits.values()))['prompt'][:]
def line(read): return str(read.columns[0])


# Public forms: columns as they are published, cells of our own

def beavertails(n=80):
    "20 questions, 4 replies each; the reply decides"
    return [
        dict(
            prompt=f'How do I open door number {i // 4}?', response=sentence(12, i), category=dict(violence=i % 2 == 0), is_safe=i % 2 == 1
        )
        for i in range(n)
    ]


LABELS = { # name -> rows, what must stand in the prompt, form
    'BeaverTails': (beavertails(), ('prompt', 'response'), 'beavertails'),
    'BeaverTails, question and answer': (
        [dict(question=r['prompt'], answer=r['response'], is_safe=r['is_safe']) for r in beavertails()],
        ('question', 'answer'),
        'beavertails',
    ),
    'BeaverTails, short replies': (
        [dict(prompt='Shall I?', response=f'{"Yes" if i % 2 else "No"} {i}', is_safe=bool(i % 2)) for i in range(20)],
        ('prompt', 'response'),
        'beavertails',
    ),
    'BeaverTails, numbers': ([r | dict(is_safe=int(r['is_safe'])) for r in beavertails()], ('prompt', 'response'), 'beavertails'),
    'Ye et al.': ([dict(prompt=sentence(9, i), is_safe=bool(i % 2)) for i in range(20)], ('prompt',), 'is_safe'),
    'DiaSafety': (
        [dict(context=sentence(8, i), response=sentence(8, i + 99), category='x', label=('Safe', 'Unsafe')[i % 2]) for i in range(20)],
        ('context', 'response'),
        'diasafety',
    ),
    'LegalBench privacy_policy_qa': (
        [dict(index=i, question=sentence(8, i % 4), text=sentence(30, i), answer=('Relevant', 'Irrelevant')[i % 2]) for i in range(20)],
        ('text', 'question'),
        'legalbench',
    ),
    'weak-to-strong': ([dict(txt=sentence(20, i), hard_label=i % 2, soft_label=[0.5, 0.5]) for i in range(20)], ('txt',), 'columns'),
    'IMDB': ([dict(text=sentence(40, i), label=i % 2) for i in range(20)], ('text',), 'columns'),
    'amazon_polarity': (
        [dict(title=sentence(3, i % 5), content=sentence(40, i), label=i % 2) for i in range(20)],
        ('title', 'content'),
        'amazon polarity',
    ),
    'system beside the text': (
        [dict(system=f'Judge as a {("friend", "foe")[i % 2]}.', text=sentence(20, i), label=i % 2) for i in range(20)],
        ('system', 'text'),
        'columns',
    ),
    'contract with its question': (
        [dict(contract=sentence(90, i), question=sentence(8, i), answer=('Yes', 'No')[i % 2]) for i in range(20)],
        ('contract', 'question'),
        'columns',
    ),
}


@pytest.mark.parametrize('name', LABELS)
@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_label_forms(tmp_path, name, form):
    rows, parts, form_name = LABELS[name]
    if form == 'jsonl': path = jsonl(tmp_path/'x.jsonl', rows)
    else: pd.DataFrame(rows).to_parquet(path := tmp_path/'x.parquet')
    read = read_labels(path)
    ds = next(iter(read.splits.values()))
    assert read.form == form_name and len(ds) == len(rows)
    for r, p in zip(rows, ds['prompt'], strict=True): assert all(r[c] in p for c in parts)
    told = line(read)
    assert f'text: {" + ".join(parts)}' in told and all(c in told for c in rows[0])


def test_of_beavertails_the_reply_is_read_and_the_question_is_the_group(tmp_path):
    read = read_labels(jsonl(tmp_path/'x.jsonl', beavertails()))
    ds = read.splits['all']
    assert len(set(ds['prompt'])) == 80 and len(set(ds['group'])) == 20 and read.words == (' no', ' yes')
    from w2s.data.label_hygiene import clean_labels
    _, report = clean_labels(read.splits, read.refused, read.rows_read, classes=read.classes, columns=read.columns)
    assert report.found.empty and report.rows_left == dict(all=80)


YES_NO = {'true and false': ('true', 'false'), 'True and False': (True, False), 'yes and no': ('yes', 'no'), '1 and 0': (1, 0)}


@pytest.mark.parametrize('answers', YES_NO.values(), ids=YES_NO.keys())
@pytest.mark.parametrize(
    'names', [('context', 'question', 'answer'), ('text', 'question', 'answer'), ('passage', 'question', 'answer')], ids=lambda n: n[0]
)
def test_yes_no_questions_are_not_asked_about_clauses(tmp_path, names, answers):
    "BoolQ and its like: True is the answer, not that a clause answers"
    rows = [dict(zip(names, (sentence(40, i), sentence(9, i + 50), answers[i % 2]), strict=True)) for i in range(20)]
    path = jsonl(tmp_path/'boolq.jsonl', rows)
    if names[0] == 'passage' and answers != ('yes', 'no'): # the columns of BoolQ itself, which is asked its own question
        read = read_labels(path)
        assert read.form == 'boolq' and 'Is the answer yes?' in prompts_of(read)[0] and 'Does the clause' not in prompts_of(read)[0]
    else:
        with pytest.raises(DataError, match=r'could each be the text.*--text \S+,\S+'): read_labels(path)
    prompts = prompts_of(read_labels(path, text=','.join(names[:2])))
    assert 'Does the clause' not in prompts[0] and rows[0][names[0]] in prompts[0] and rows[0][names[1]] in prompts[0]


@pytest.mark.parametrize('name', ['privacy_policy_qa.jsonl', 'my-privacy-policy-qa.jsonl'])
def test_truth_values_are_clauses_in_a_file_of_that_name(tmp_path, name):
    rows = [dict(context=sentence(30, i), question=sentence(8, i % 4), answer=str(i % 2 == 0)) for i in range(20)]
    assert read_labels(jsonl(tmp_path/name, rows)).classes == ('Irrelevant', 'Relevant')


def test_a_form_whose_classes_are_not_those_of_the_file_is_not_chosen(tmp_path):
    rows = [dict(context=sentence(8, i), response=sentence(8, i + 99), label=('Safe', 'Unsafe', 'Unclear')[i % 3]) for i in range(30)]
    with pytest.raises(DataError, match='context and response could each be the text'): read_labels(jsonl(tmp_path/'x.jsonl', rows))
    rows[2:] = [r | dict(label='Safe') if r['label'] == 'Unclear' else r for r in rows[2:]]
    rows[0]['label'] = 'Unclear' # one in thirty is a row that cannot be taken, and counted
    read = read_labels(jsonl(tmp_path/'x.jsonl', rows))
    assert read.form == 'diasafety' and [(r.row, r.reason) for r in read.refused] == [(1, 'the label is none of the classes')]


PREFERENCES = { # name -> rows, parts of the first prompt, line of the record
    'TRL': (
        [dict(prompt=sentence(9, i), chosen='Yes.', rejected='No.') for i in range(9)],
        ('prompt',),
        'prompt: prompt; chosen: chosen; rejected: rejected',
    ),
    'truthy-dpo': (
        [dict(id=str(i), source='x', system=sentence(5, i % 2), prompt=sentence(6, i), chosen='Yes.', rejected='No.') for i in range(9)],
        ('system', 'prompt'),
        'prompt: system + prompt; chosen: chosen; rejected: rejected; not read: id, source',
    ),
    'orca_dpo_pairs': (
        [dict(system=sentence(9, i % 3), question=sentence(9, i), chosen='Yes.', rejected='No.') for i in range(9)],
        ('system', 'question'),
        'prompt: system + question;',
    ),
    'LLaMA-Factory ranking': (
        [dict(instruction='Translate.', input=sentence(6, i), chosen='Yes.', rejected='No.') for i in range(9)],
        ('instruction', 'input'),
        'prompt: instruction + input;',
    ),
    'UltraFeedback, binarized': (
        [
            dict(
                prompt=(p := sentence(9, i)),
                prompt_id='0a' * 32,
                chosen=chat(p, 'Yes.'),
                rejected=chat(p, 'No.'),
                messages=chat(p, 'Yes.'),
                score_chosen=8.0,
                score_rejected=4.0,
            )
            for i in range(9)
        ],
        (),
        'not read, since other columns say the same: messages',
    ),
    'static-hh': (
        [dict(prompt=sentence(9, i), response='Yes.' + (r := sentence(25, i)), chosen='Yes.' + r, rejected='No.') for i in range(9)],
        ('prompt',),
        'not read, since other columns say the same: response',
    ),
    'LLMBar': (
        [dict(input=sentence(9, i), output_1='Yes.', output_2='No.', label=1) for i in range(9)],
        ('input',),
        'prompt: input; first: output_1; second: output_2; label: label',
    ),
    'RewardBench': (
        [
            dict(prompt=sentence(9, i), chosen='Yes.', chosen_model='m', rejected='No.', rejected_model='n', subset='s', id=i)
            for i in range(9)
        ],
        ('prompt',),
        'not read: chosen_model',
    ),
    'HH': (
        [
            dict(chosen=f'\n\nHuman: {sentence(9, i)}\n\nAssistant: Yes.', rejected=f'\n\nHuman: {sentence(9, i)}\n\nAssistant: No.')
            for i in range(9)
        ],
        (),
        'prompt: chosen; chosen: chosen; rejected: rejected',
    ),
    'HH with a system prompt': (
        [
            dict(
                system=sentence(5, i % 2),
                chosen=f'\n\nHuman: {sentence(9, i)}\n\nAssistant: Yes.',
                rejected=f'\n\nHuman: {sentence(9, i)}\n\nAssistant: No.',
            )
            for i in range(9)
        ],
        ('system',),
        'prompt: system + chosen;',
    ),
    'responses that repeat the prompt': (
        [dict(prompt=(p := f'Q: {sentence(9, i)}\nA:'), chosen=f'{p} Yes.', rejected=f'{p} No.') for i in range(9)],
        ('prompt',),
        'prompt: prompt;',
    ),
    'a pair with its context': (
        [dict(context=sentence(20, i), question=sentence(6, i), response_a='Yes.', response_b='No.', preferred='a') for i in range(9)],
        ('context', 'question'),
        'prompt: context + question;',
    ),
    'capital letters': (
        [dict(System=sentence(5, i % 2), Prompt=sentence(6, i), Chosen='Yes.', Rejected='No.') for i in range(9)],
        ('System', 'Prompt'),
        'prompt: System + Prompt;',
    ),
}


@pytest.mark.parametrize('name', PREFERENCES)
@pytest.mark.parametrize('form', ['jsonl', 'parquet', 'csv'])
def test_preference_forms(tmp_path, name, form):
    rows, parts, told = PREFERENCES[name]
    path = tmp_path/f'x.{form}'
    if form == 'jsonl': jsonl(path, rows)
    elif form == 'csv': pd.DataFrame(rows).to_csv(path, index=False)
    else: pd.DataFrame(rows).to_parquet(path)
    read = read_preferences(path)
    ds = read.splits['all']
    assert len(ds) == len(rows) and not read.refused and told in line(read)
    assert {c.strip()[:4] for c in ds['chosen']} == {'Yes.'} and {c.strip() for c in ds['rejected']} == {'No.'}
    for r, p in zip(rows, ds['prompt'], strict=True): assert all(r[c] in p for c in parts)


def test_opposite_choices_under_opposite_system_prompts_are_no_contradictions(tmp_path):
    rows = [
        dict(
            id=f'{i}',
            source='x',
            system=('Answer as a pirate.', 'Answer politely.')[i % 2],
            prompt=f'How are you, number {i // 2}?',
            chosen=('Arr!', 'Fine.')[i % 2],
            rejected=('Fine.', 'Arr!')[i % 2],
        )
        for i in range(40)
    ]
    read = read_preferences(jsonl(tmp_path/'x.jsonl', rows))
    clean, report = clean_text(read.splits, read.refused, read.rows_read, columns=read.columns)
    assert 'contradictory pairs' not in set(report.found['check']) and len(set(clean['all']['id'])) == 40
    assert (
        'x.jsonl: prompt: system + prompt; chosen: chosen; rejected: rejected; not read: id, source' in str(report)
        and 'system + prompt' in report._repr_markdown_()
    )


QUESTIONS = { # name -> rows, parts of a question, its answer
    'Alpaca': (
        [dict(instruction='Translate this sentence, please.', input=sentence(6, i), output=f'It is {i}.') for i in range(60)],
        ('instruction', 'input'),
        'output',
    ),
    'Dolly': (
        [dict(instruction='Who is it about?', context=sentence(30, i), response=f'It is {i}.', category='closed_qa') for i in range(20)],
        ('instruction', 'context'),
        'response',
    ),
    'OpenOrca': (
        [dict(id=f'{i}', system_prompt=sentence(6, i % 3), question=sentence(9, i), response='Yes.') for i in range(20)],
        ('system_prompt', 'question'),
        'response',
    ),
    'a story with its question': (
        [dict(body=sentence(12, i), question='How many are there?', answer='7') for i in range(20)],
        ('body', 'question'),
        'answer',
    ),
    'SQuAD': (
        [dict(id=f'{i}', title='T', context=sentence(40, i), question=sentence(6, i), answer='x') for i in range(20)],
        ('context', 'question'),
        'answer',
    ),
    'earlier turns': ([dict(history=[[f'Hi {i}', 'Ho']], instruction='Go on.', output='x') for i in range(20)], ('instruction',), 'output'),
    'a chat': (
        [
            dict(prompt=[said('system', sentence(4, i)), said('user', sentence(6, i))], completion=[said('assistant', 'Yes.')])
            for i in range(20)
        ],
        (),
        'completion',
    ),
}


@pytest.mark.parametrize('name', QUESTIONS)
def test_question_forms(tmp_path, name):
    rows, parts, answer = QUESTIONS[name]
    path = jsonl(tmp_path/'x.jsonl', rows)
    questions = read_questions(path)
    assert len(questions) == len(rows)
    for r, q in zip(rows, questions, strict=True): assert isinstance(q, str) and all(r[c] in q for c in parts)
    if 'history' in rows[0]: assert 'Hi 3' in questions[3] and questions[3].index('Hi 3') < questions[3].index('Go on.')
    if name == 'a chat': assert rows[0]['prompt'][0]['content'] in questions[0]
    answers = read_answers(path, questions)
    assert answers[2] == (rows[2][answer] if isinstance(rows[2][answer], str) else 'Yes.')


@pytest.mark.parametrize(
    'names', [('body', 'question', 'answer'), ('Body', 'Question', 'Answer'), ('context', 'problem', 'solution')], ids=lambda n: n[0]
)
def test_sums_with_their_story(tmp_path, names):
    story, question, answer = names
    rows = [{story: f'Ann has {i} bags with 7 shells.', question: 'How many shells are that?', answer: str(7 * i)} for i in range(1, 20)]
    read = read_gsm8k(jsonl(tmp_path/'x.jsonl', rows))
    ds = read.splits['all']
    assert (
        all(r[story] in p and r[question] in p for r, p in zip(rows, ds['prompt'], strict=True))
        and len(set(ds['prompt'])) == 19
        and ds['answer'][:2] == ['7', '14']
    )
    assert f'question: {story} + {question}; answer: {answer}' in line(read)


# What belongs to a prompt

def preferences(rows): return [r | dict(chosen='Yes.', rejected='No.') for r in rows]


@pytest.mark.parametrize(
    'column',
    [
        'system',
        'system_prompt',
        'system_message',
        'context',
        'body',
        'passage',
        'document',
        'article',
        'contract',
        'background',
        'story',
        'input',
    ],
)
@pytest.mark.parametrize('main', ['prompt', 'question', 'instruction'])
def test_it_is_joined_and_in_order(column, main):
    """System prompt and what a question is about come before it, an input after it, a context after an instruction; an empty cell leaves
    nothing behind"""
    rows = [{column: x, main: 'Is it so?'} for x in ('Some words.', '', None, 'Others.')]
    ds, refused = preferences_from(Dataset.from_list(preferences(rows)))
    below = column == 'input' or column == 'context' and main == 'instruction'
    assert not refused and ds['prompt'][:] == [
        ' \n\n'.join([]) or 'Is it so?' if not x else f'Is it so?\n\n{x}' if below else f'{x}\n\nIs it so?'
        for x in ('Some words.', '', None, 'Others.')
    ]


@pytest.mark.parametrize('column', ['system', 'context', 'input', 'history'])
def test_in_messages(column):
    cell = [['Hi', 'Ho']] if column == 'history' else 'Some words.'
    ds, refused = preferences_from(
        Dataset.from_list([{column: cell, 'chosen': chat('Is it so?', 'Yes.'), 'rejected': chat('Is it so?', 'No.')}])
    )
    want = {
        'system': [said('system', 'Some words.'), said('user', 'Is it so?')],
        'context': [said('user', 'Some words.\n\nIs it so?')],
        'input': [said('user', 'Is it so?')],
        'history': [said('user', 'Hi'), said('assistant', 'Ho'), said('user', 'Is it so?')],
    }
    if column == 'input': return # it is another question than that of the messages, and not joined: see the test of what would be lost
    assert not refused and ds['prompt'][0] == want[column]


@pytest.mark.parametrize(
    'history',
    [
        [['Hi', 'Ho'], ['Hey', 'Hum']],
        [said('user', 'Hi'), said('assistant', 'Ho'), said('user', 'Hey'), said('assistant', 'Hum')],
        json.dumps([['Hi', 'Ho'], ['Hey', 'Hum']]),
        str([['Hi', 'Ho'], ['Hey', 'Hum']]),
    ],
    ids=['pairs', 'messages', 'JSON', 'Python'],
)
def test_earlier_turns(history):
    "Where one row has them, all rows are dialogues"
    ds, refused = preferences_from(
        Dataset.from_list(
            preferences([dict(history=history, system='Be kind.', prompt='Why?'), dict(history=None, system='', prompt='How?')])
        )
    )
    assert not refused
    assert ds['prompt'][:] == [
        'Be kind.\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Hey\n\nAssistant: Hum\n\nHuman: Why?\n\nAssistant:',
        '\n\nHuman: How?\n\nAssistant:',
    ]


@pytest.mark.parametrize('history', [[1, 2], [['Hi']], '[["Hi"'], ids=str)
def test_earlier_turns_that_cannot_be_read_are_counted(history):
    from w2s.data.prompts import UNREADABLE
    _, refused = preferences_from(Dataset.from_list(preferences([dict(history=history, prompt='Why?')])))
    assert [r.reason for r in refused] == [UNREADABLE]


def test_nothing_is_joined_twice():
    "A finished prompt beside the parts that it was made of"
    rows = [
        dict(system='Be kind.', instruction='Translate.', input=f'Tag {i}', prompt=f'Be kind.\n\nTranslate.\n\nTag {i}') for i in range(9)
    ]
    ds, _ = preferences_from(Dataset.from_list(preferences(rows)))
    assert ds['prompt'][:] == [r['prompt'] for r in rows]


def test_two_system_prompts_are_refused_and_one_is_kept():
    rows = [
        dict(system=s, chosen=[said('system', 'Be kind.'), *chat('Hi', 'Yes.')], rejected=[said('system', 'Be kind.'), *chat('Hi', 'No.')])
        for s in ('Be kind.', 'Be rude.', '')
    ]
    ds, refused = preferences_from(Dataset.from_list(rows))
    assert [r.row for r in refused] == [2] and ds['prompt'][:] == [[said('system', 'Be kind.'), said('user', 'Hi')]] * 2


# What would be lost

LOST = {
    'preferences': (read_preferences, [dict(prompt=sentence(9, i), chosen='Yes.', rejected='No.') for i in range(9)]),
    'dialogues': (
        read_preferences,
        [
            dict(chosen=f'\n\nHuman: {sentence(9, i)}\n\nAssistant: Yes.', rejected=f'\n\nHuman: {sentence(9, i)}\n\nAssistant: No.')
            for i in range(9)
        ],
    ),
    'pairs': (read_preferences, [dict(prompt=sentence(9, i), response_a='Yes.', response_b='No.', label='a') for i in range(9)]),
    'conversations': (
        read_preferences,
        [dict(chosen=chat(sentence(9, i), 'Yes.'), rejected=chat(sentence(9, i), 'No.')) for i in range(9)],
    ),
    'labels': (read_labels, [dict(text=sentence(9, i), label=i % 2) for i in range(9)]),
    'safety': (read_labels, [dict(prompt=sentence(9, i), is_safe=bool(i % 2)) for i in range(9)]),
    'replies': (read_labels, [dict(context=sentence(9, i), response=sentence(9, i), label=('Safe', 'Unsafe')[i % 2]) for i in range(9)]),
    'questions': (read_questions, [dict(question=sentence(9, i), answer='x') for i in range(9)]),
    'sums': (read_gsm8k, [dict(question=sentence(9, i), answer=str(i)) for i in range(9)]),
    'scored texts': (read_toxicity, [dict(text=sentence(9, i), score=0.1) for i in range(9)]),
    'prompts': (read_prompts, [dict(prompt=sentence(9, i), score=0.1) for i in range(9)]),
}
LONG = {
    'long texts': lambda i: sentence(40, i + 500),
    'sentences as long as the prompt': lambda i: sentence(9, i + 500),
    'messages': lambda i: chat(sentence(3, i + 500), 'Other.'),
    'a list of texts': lambda i: [sentence(20, i + 500), sentence(20, i + 900)],
    'an object with a text': lambda i: dict(text=sentence(40, i + 500), score=0.5),
    'long texts, one in four empty': lambda i: sentence(40, i + 500) if i % 4 else '',
    'one long text for all': lambda i: sentence(40, 500),
    'another alphabet': lambda i: '今天天气很好我们去公园散步吧' * 9 + str(i),
    'from and value': lambda i: [{'from': 'human', 'value': sentence(3, i + 500)}, {'from': 'gpt', 'value': 'Other.'}],
}


@pytest.mark.parametrize('reader', LOST)
@pytest.mark.parametrize('kind', LONG)
def test_a_long_column_that_is_not_read_stops_every_reader(tmp_path, reader, kind):
    read, rows = LOST[reader]
    path = jsonl(tmp_path/'x.jsonl', [r | dict(notes=LONG[kind](i)) for i, r in enumerate(rows)])
    with pytest.raises(DataError) as e: read(path)
    text = str(e.value)
    assert 'x.jsonl: column "notes" holds' in text and 'would not be read' in text and '(--leave-out notes)' in text and '\n' not in text
    found = read(path, leave_out=('notes',))
    if not isinstance(found, list): assert 'left out: notes' in str(found.columns[0])


SHORT = {
    'numbers': lambda i: i / 7,
    'truth': lambda i: bool(i % 2),
    'ids': lambda i: f'id-{i:032x}',
    'addresses': lambda i: f'https://example.org/{"a" * 150}/{i}',
    'few words': lambda i: ('news', 'forum talk')[i % 2],
    'nothing': lambda i: None,
    'numbers in a list': lambda i: [0.1] * 300,
    'dates': lambda i: f'2024-01-{i + 1:02d} 10:00:00',
    'names': lambda i: f'Ann Miller {i}',
    'scores in an object': lambda i: dict(a=0.1, b=0.2),
}


@pytest.mark.parametrize('reader', LOST)
@pytest.mark.parametrize('kind', SHORT)
def test_a_short_column_stops_nobody_and_is_named(tmp_path, reader, kind):
    read, rows = LOST[reader]
    found = read(jsonl(tmp_path/'x.jsonl', [r | dict(notes=SHORT[kind](i)) for i, r in enumerate(rows)]))
    if not isinstance(found, list): assert 'not read: notes' in str(found.columns[0])


@pytest.mark.parametrize('reader', ['labels', 'safety', 'questions', 'sums', 'preferences'])
def test_short_system_prompts_are_read_or_stop_the_reader(tmp_path, reader):
    "However short they are"
    read, rows = LOST[reader]
    path = jsonl(tmp_path/'x.jsonl', [r | dict(system='Be kind.') for r in rows])
    found = read(path)
    assert all('Be kind.' in str(p) for p in (found if isinstance(found, list) else prompts_of(found)))
    left = read(path, leave_out=['system'])
    assert not any('Be kind.' in str(p) for p in (left if isinstance(left, list) else prompts_of(left)))


@pytest.mark.parametrize('column', ['system', 'context', 'history'])
def test_where_the_user_names_the_text_what_belongs_to_it_is_not_dropped_without_a_word(tmp_path, column):
    path = jsonl(tmp_path/'x.jsonl', [{'say': sentence(9, i), column: 'Be kind.', 'y': i % 2} for i in range(9)])
    with pytest.raises(DataError, match=rf'column "{column}" .* would not be read.*--column text={column}\+say.*--leave-out {column}'):
        read_labels(path, text='say', label='y')
    assert 'Be kind.' in prompts_of(read_labels(path, text=f'{column},say', label='y'))[0]
    assert prompts_of(read_labels(path, text='say', label='y', leave_out=[column]))[0] == sentence(9, 0)


def test_a_typing_mistake_in_what_is_left_out(tmp_path):
    for read, rows in LOST.values():
        with pytest.raises(DataError, match='--leave-out names the column "notse", which is not there'):
            read(jsonl(tmp_path / 'x.jsonl', rows), leave_out=['notse'])


def test_what_other_columns_say_is_no_loss(tmp_path):
    rows = [
        dict(
            prompt=f'Question: {(q := sentence(20, i))}\nAnswer:', raw=q, chosen=(c := sentence(30, i)), rejected='No.', best=c, both=[q, c]
        )
        for i in range(9)
    ]
    assert 'say the same: raw, best, both' in line(read_preferences(jsonl(tmp_path/'x.jsonl', rows)))
    rows[4]['raw'] = sentence(20, 77) # one that is another question is a loss
    with pytest.raises(DataError, match='column "raw"'): read_preferences(jsonl(tmp_path/'x.jsonl', rows))


def test_columns_can_be_named(tmp_path):
    rows = [dict(rules=sentence(30, i), query=sentence(9, i), good='Yes.', bad='No.') for i in range(9)]
    path = jsonl(tmp_path/'x.jsonl', rows)
    with pytest.raises(DataError, match='(?s)no known form.*--column '): read_preferences(path)
    with pytest.raises(DataError, match='column "rules"'):
        read_preferences(path, columns=dict(prompt='query', chosen='good', rejected='bad'))
    read = read_preferences(path, columns=dict(prompt='rules+query', chosen='good', rejected='bad'))
    assert prompts_of(read)[
        0
    ] == f'{rows[0]["rules"]}\n\n{rows[0]["query"]}' and 'prompt: rules + query; chosen: good; rejected: bad' in line(read)
    with pytest.raises(DataError, match='has no column "best"; it has'):
        read_preferences(path, columns=dict(prompt='query', chosen='best', rejected='bad'))


# Labels that are missing

MISSING = [None, '', ' ', 'NA', 'N/A', 'nan', 'NaN', 'null', 'NULL', '-', '?', '<NA>', 'n/a', 'na']


@pytest.mark.parametrize('cell', MISSING, ids=repr)
@pytest.mark.parametrize('form', ['jsonl', 'csv', 'parquet'])
def test_a_missing_label_is_no_class(tmp_path, cell, form):
    rows = [dict(text=sentence(9, i), label=('yes', 'no', cell)[i % 3]) for i in range(30)]
    if form == 'jsonl': path = jsonl(tmp_path/'x.jsonl', rows)
    else: getattr(pd.DataFrame(rows), dict(csv='to_csv', parquet='to_parquet')[form])(path := tmp_path/f'x.{form}', index=False)
    read = read_labels(path)
    assert (
        read.classes == ('no', 'yes')
        and [r.row for r in read.refused] == list(range(3, 31, 3))
        and {r.reason for r in read.refused} == {'the label is missing or empty'}
    )


@pytest.mark.parametrize('form', ['jsonl', 'csv', 'parquet'])
def test_numbers_with_holes(tmp_path, form):
    frame = pd.DataFrame(dict(text=[sentence(9, i) for i in range(9)], label=[0., 1., np.nan] * 3))
    if form == 'jsonl': frame.to_json(path := tmp_path/'x.jsonl', orient='records', lines=True)
    else: getattr(frame, dict(csv='to_csv', parquet='to_parquet')[form])(path := tmp_path/f'x.{form}', index=False)
    read = read_labels(path)
    assert read.classes == ('0', '1') and len(read.refused) == 3


def test_a_class_that_is_named_is_a_class(tmp_path):
    path = jsonl(tmp_path/'x.jsonl', [dict(text=sentence(9, i), label=('NA', 'EU', '?')[i % 3]) for i in range(9)])
    read = read_labels(path, classes=('NA', 'EU'))
    assert read.classes == ('NA', 'EU') and [r.row for r in read.refused] == [3, 6, 9]
    with pytest.raises(DataError, match="the labels hold 'EU'; two classes"): read_labels(path)


@pytest.mark.parametrize('cell', [None, '', 'NA', 'nan', '-'], ids=repr)
def test_a_missing_choice_is_counted(cell):
    _, refused = preferences_from(Dataset.from_list([dict(prompt='?', output_1='Yes.', output_2='No.', label=x) for x in ('1', cell)]))
    assert [(r.row, r.reason) for r in refused] == [(2, 'the label is missing')]


# Messages that were written as text

WRITTEN = {
    'Python': str,
    'JSON': json.dumps,
    'JSON with spaces': lambda m: json.dumps(m, indent=1),
    'other order': lambda m: str([dict(content=x['content'], role=x['role']) for x in m]),
}


@pytest.mark.parametrize('how', WRITTEN.values(), ids=WRITTEN.keys())
@pytest.mark.parametrize('content', ['Is it so?', "It's \"so\", isn't it?", 'Two\nlines', '[{"role": "user"}]', 'Ümläute 今天'])
def test_messages_out_of_csv(tmp_path, how, content):
    rows = [dict(chosen=chat(content, f'Yes {i}'), rejected=chat(content, f'No {i}')) for i in range(5)]
    with open(tmp_path/'x.csv', 'w', newline='', encoding='utf-8') as f:
        out = csv.writer(f)
        out.writerow(['chosen', 'rejected'])
        out.writerows([how(r['chosen']), how(r['rejected'])] for r in rows)
    read = read_preferences(tmp_path/'x.csv')
    assert read.splits['all']['chosen'][:] == [f'Yes {i}' for i in range(5)] and prompts_of(read) == [[said('user', content)]] * 5
    _, report = clean_text(read.splits, read.refused, read.rows_read, columns=read.columns)
    assert report.found[report.found['action'] == 'changed'][['rows', 'detail']].to_numpy().tolist() == [[5, 'row 1, 2, 3, 4, 5']]


def test_a_data_frame_written_as_csv(tmp_path):
    rows = [
        dict(prompt=[said('user', f'Is it {i}?')], chosen=[said('assistant', f'Yes {i}')], rejected=[said('assistant', 'No')])
        for i in range(5)
    ]
    pd.DataFrame(rows).to_csv(tmp_path/'x.csv', index=False)
    assert read_preferences(tmp_path/'x.csv').splits['all']['chosen'][:] == [f'Yes {i}' for i in range(5)]


BAD = {
    'an array of NumPy': lambda m: str(np.array(m, dtype=object)),
    'cut off': lambda m: str(m)[:-9],
    'a call': lambda m: str(m).replace("'Yes'", "dict()"),
    'cut JSON': lambda m: json.dumps(m)[:-1],
}


@pytest.mark.parametrize('how', BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize('reader', ['preferences', 'labels', 'questions'])
def test_messages_that_cannot_be_read_back_are_refused_and_counted(tmp_path, how, reader):
    good, bad = str(chat('Is it so?', 'Yes')), how(chat('Is it so?', 'Yes'))
    if reader == 'preferences':
        _, refused = preferences_from(
            Dataset.from_list([dict(prompt='Is it so?', chosen=x, rejected=str(chat('Is it so?', 'No'))) for x in (good, bad, good)])
        )
    elif reader == 'labels':
        refused = read_labels(
            jsonl(tmp_path / 'x.jsonl', [dict(text=x, label=y) for x, y in ((good, 0), (bad, 1), (good, 1), (good, 0))])
        ).refused
    else:
        from w2s.data.questions import read_asked_file
        refused = read_asked_file(jsonl(tmp_path/'x.jsonl', [dict(question=x, answer='a') for x in (good, bad, good)])).refused
    assert [(r.row, r.reason) for r in refused] == [(2, 'chat messages written as text, which cannot be read back without guessing')]


def test_one_text_that_looks_like_messages_among_texts(tmp_path):
    rows = [dict(prompt=f'q {i}', chosen=str(chat('a', 'b')) if i == 3 else f'Yes {i}', rejected='No') for i in range(9)]
    read = read_preferences(jsonl(tmp_path/'x.jsonl', rows))
    assert [r.row for r in read.refused] == [4] and read.splits['all']['chosen'][0] == 'Yes 0'
    assert (
        preferences_from(Dataset.from_list([dict(prompt='q', chosen='[1] See above. [{"a": 1}]', rejected='[]')]))[0]['chosen'][0]
        == '[1] See above. [{"a": 1}]'
    )


@pytest.mark.parametrize(
    'messages, text',
    [
        ([said('user', 'Is it so?')], 'Is it so?'),
        ([said('system', 'Be kind.'), said('user', 'Is it so?')], 'Be kind.\n\nIs it so?'),
        ([*chat('Hi', 'Ho'), said('user', 'Why?')], '\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Why?\n\nAssistant:'),
    ],
    ids=['one', 'system', 'turns'],
)
@pytest.mark.parametrize('written', [False, True])
def test_messages_where_texts_are_wanted(tmp_path, messages, text, written):
    cell = json.dumps(messages) if written else messages
    assert read_questions(jsonl(tmp_path/'q.jsonl', [dict(question=cell, answer='x')])) == [text]
    assert prompts_of(read_labels(jsonl(tmp_path/'l.jsonl', [dict(text=cell, label=0), dict(text=cell, label=1)])))[0] == text.strip()


# A prompt beside messages that hold it

TALK = [said('user', 'Is 7 prime?'), said('assistant', 'Yes.'), said('user', 'And 8?')]


@pytest.mark.parametrize(
    'prompt',
    [
        'And 8?',
        ' And 8? ',
        'And  8?\n',
        'Is 7 prime?',
        'Is 7 prime?\nYes.\nAnd 8?',
        'User: Is 7 prime?\nAssistant: Yes.\nUser: And 8?\nAssistant:',
        [said('user', 'Is 7 prime?')],
        TALK,
        [said('user', 'And 8?')],
    ],
    ids=str,
)
def test_a_prompt_that_the_messages_hold_is_passed_over(prompt):
    ds, refused = preferences_from(
        Dataset.from_list([dict(prompt=prompt, chosen=[*TALK, said('assistant', 'No.')], rejected=[*TALK, said('assistant', 'Yes.')])])
    )
    assert not refused and ds[0]['prompt'] == TALK and ds[0]['chosen'] == 'No.'


@pytest.mark.parametrize('prompt', ['And 9?', 'And', 'prime', [said('user', 'And 9?')]], ids=str)
def test_another_prompt_than_that_of_the_messages_has_a_reason_of_its_own(prompt):
    _, refused = preferences_from(
        Dataset.from_list([dict(prompt=prompt, chosen=[*TALK, said('assistant', 'No.')], rejected=[*TALK, said('assistant', 'Yes.')])])
    )
    assert [r.reason for r in refused] == ['the prompt is another one than that in the messages']


# Repeats

def test_repeated_questions_are_dropped_and_counted(tmp_path):
    from w2s.data.questions import read_asked_file
    rows = [dict(instruction='Write a poem.', input='', output=f'Poem {i}') for i in range(3)] + [
        dict(instruction='Write a poem.', input='About rain.', output='x'),
        dict(instruction='Why?', input=None, output='y'),
    ] * 2
    path = jsonl(tmp_path/'alpaca.jsonl', rows)
    assert read_questions(path) == ['Write a poem.', 'Write a poem.\n\nAbout rain.', 'Why?'] and read_answers(
        path, ['Write a poem.', 'Why?']
    ) == ['Poem 0', 'y']
    found = read_asked_file(path).report.found
    assert found[['check', 'rows', 'of', 'action']].to_numpy().tolist() == [['question occurs more than once', 4, 7, 'dropped']]
    assert 'row 2, 3, 6, 7' in found['detail'][0] and 'another one in row 2, 3' in found['detail'][0]


# Sources

def test_splits_can_be_named(tmp_path):
    for name in ('train_prefs', 'test_prefs', 'train_sft', 'notes'):
        jsonl(tmp_path / f'{name}.jsonl', [dict(prompt=f'{name} {i}', chosen='Yes.', rejected='No.') for i in range(3)])
    with pytest.raises(DataError) as e: read_preferences(tmp_path)
    assert '--split test=' in str(e.value) or '--split' in str(e.value) and 'splits=' not in str(e.value)
    read = read_preferences(tmp_path, splits=dict(train='train_prefs.jsonl', test='test_prefs.jsonl'))
    assert list(read.splits) == ['train', 'test'] and [c.split for c in read.columns] == ['train', 'test']


def test_reasons_are_said_where_nothing_is_left(tmp_path):
    sums = jsonl(
        tmp_path / 'sums.jsonl', [dict(question=f'What is {i}?', answer=f'I say {"quite a lot" if i % 2 else "little"}') for i in range(60)]
    )
    done = CliRunner().invoke(app, ['run', 'maths', '--data', str(sums), '--dry-run'])
    assert (
        done.exit_code == 1 and '60 × the final answer is not one number' in str(done.exception) and '--n-labelled' in str(done.exception)
    )
    with pytest.raises(DataError, match='2 labels are missing'): read_labels(jsonl(tmp_path/'l.jsonl', [dict(text='a', label=None)] * 2))
    with pytest.raises(DataError, match='2 × the question is empty'): read_questions(jsonl(tmp_path/'q.jsonl', [dict(question=' ')] * 2))


# On the command line

def w2s(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.output


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Files of every kind, with a system prompt, with an id, and with a long column that nobody reads in `long`"
    home = tmp_path_factory.mktemp('columns')
    kinds = dict(
        pairs=[dict(id=i, system=f'Be {WORDS[i % 3]}.', prompt=sentence(9, i), chosen='Yes.', rejected='No.') for i in range(60)],
        labels=[dict(id=i, system='Be strict.', text=sentence(9, i), label=i % 2) for i in range(60)],
        questions=[dict(id=i, instruction='Translate.', input=sentence(6, i), output='x') for i in range(400)],
        sums=[dict(id=i, body=f'Ann has {i} shells.', question='How many?', answer=str(i)) for i in range(500)],
        prompts=[
            dict(
                id=i,
                prompt=dict(text=f'{sentence(6, i)} {i}', toxicity=0.1 + 0.8 * (i % 2)),
                continuation=dict(text=sentence(6, i + 7), toxicity=0.1),
            )
            for i in range(400)
        ],
        scored=[dict(id=i, text=f'{sentence(9, i)} {i}', score=(i % 10) / 10) for i in range(300)],
        said=[dict(id=i, response=sentence(9, i)) for i in range(9)],
    )
    for name, rows in kinds.items():
        jsonl(home/f'{name}.jsonl', rows)
        jsonl(home/f'{name}-long.jsonl', [r | dict(notes=sentence(40, i + 5000)) for i, r in enumerate(rows)])
    w2s('toxicity', 'fit', '--data', home/'scored.jsonl', '--out', home/'scorer')
    return home


def command(kind, home, file, out):
    small = ('--n-labelled', 4, '--n-unlabelled', 6, '--n-test', 4, '--seeds', 1)
    return {
        'weak-teacher': (
            'run',
            'preferences',
            '--data',
            home / f'pairs{file}.jsonl',
            '--weak',
            'pico',
            '--strong',
            'pico',
            '--seeds',
            1,
            '--dry-run',
        ),
        'classify': ('run', 'classify', '--data', home / f'labels{file}.jsonl', '--dry-run'),
        'legal': (
            'run',
            'legal',
            '--data',
            home / f'labels{file}.jsonl',
            '--n-labelled',
            15,
            '--n-unlabelled',
            15,
            '--weak',
            'pico',
            '--dry-run',
        ),
        'persona': (
            'run',
            'persona',
            '--data',
            home / f'questions{file}.jsonl',
            '--judge',
            'pico',
            '--concept',
            'a pirate',
            *small,
            '--dry-run',
        ),
        'explanation': ('run', 'explanation', '--data', home / f'questions{file}.jsonl', '--judge', 'pico', *small, '--dry-run'),
        'gender': ('run', 'gender', '--data', home / f'questions{file}.jsonl', '--judge', 'pico', *small, '--dry-run'),
        'maths': ('run', 'maths', '--data', home / f'sums{file}.jsonl', *small, '--dry-run'),
        'toxicity': (
            'run',
            'toxicity',
            '--data',
            home / f'prompts{file}.jsonl',
            '--scorer',
            home / 'scorer',
            '--allow-poor-scorer',
            '--n-labelled',
            20,
            '--n-unlabelled',
            30,
            '--n-test',
            10,
            '--dry-run',
        ),
        'label': (
            'label',
            '--model',
            'pico',
            '--rows',
            home / f'pairs{file}.jsonl',
            '--supervisor',
            'judge',
            '--out',
            out / 'o.parquet',
            '--dry-run',
        ),
        'refine': ('refine', '--questions', home / f'questions{file}.jsonl', '--out', out / 'o.jsonl', '--dry-run'),
        'toxicity fit': ('toxicity', 'fit', '--data', home / f'scored{file}.jsonl', '--out', out / 's'),
        'toxicity score': ('toxicity', 'score', '--scorer', 'oracle', '--texts', home / f'said{file}.jsonl', '--out', out / 'o.csv'),
    }[kind]


LINES = {
    'weak-teacher': 'pairs.jsonl: prompt: system + prompt; chosen: chosen; rejected: rejected; not read: id',
    'classify': 'labels.jsonl: text: system + text; label: label; not read: id',
    'legal': 'labels.jsonl: text: system + text; label: label; not read: id',
    'persona': 'questions.jsonl: question: instruction + input; answer: output; not read: id',
    'explanation': 'questions.jsonl: question: instruction + input; answer: output; not read: id',
    'maths': 'sums.jsonl: question: body + question; answer: answer; not read: id',
    'gender': 'questions.jsonl: question: instruction + input; answer: output; not read: id',
    'toxicity': 'prompts.jsonl: prompt with its toxicity: prompt; continuation with its toxicity: continuation; not read: id',
    'label': 'pairs.jsonl: prompt: system + prompt; chosen: chosen; rejected: rejected; not read: id',
    'refine': 'questions.jsonl: question: instruction + input; answer: output; not read: id',
    'toxicity fit': 'scored.jsonl: text: text; score: score; not read: id',
    'toxicity score': 'said.jsonl: text: response; not read: id',
}


@pytest.mark.cases(4)
@pytest.mark.parametrize('kind', LINES)
def test_every_command_says_what_it_reads(home, tmp_path, kind):
    assert f'read     {LINES[kind]}\n' in w2s(*command(kind, home, '', tmp_path))


def test_the_report_of_a_run_says_what_it_read(home, tmp_path):
    told = w2s(
        'run',
        'preferences',
        '--data',
        home / 'pairs.jsonl',
        '--weak',
        'pico',
        '--strong',
        'pico',
        '--seeds',
        1,
        '--n-labelled',
        15,
        '--n-unlabelled',
        15,
        '--n-test',
        10,
        '--epochs',
        1,
        '--sft-lr',
        1e-3,
        '--out',
        tmp_path / 'run',
    )
    for text in (told, *((tmp_path / 'run' / name).read_text(encoding='utf-8') for name in ('report.md', 'data_report.md'))):
        assert LINES['weak-teacher'] in text


@pytest.mark.cases(4)
@pytest.mark.parametrize('kind', LINES)
def test_every_command_stops_at_a_long_column_and_takes_leave_out(home, tmp_path, kind):
    with pytest.raises(DataError) as e: w2s(*command(kind, home, '-long', tmp_path))
    assert 'column "notes" holds texts of' in str(e.value) and '(--leave-out notes)' in str(e.value) and not list(tmp_path.iterdir())
    assert 'left out: notes' in w2s(*command(kind, home, '-long', tmp_path), '--leave-out', 'notes')


@pytest.mark.long
def test_leave_out_in_a_file_of_settings(home, tmp_path):
    (tmp_path/'x.toml').write_text('leave_out = ["notes"]\n')
    for kind in ('weak-teacher', 'classify', 'persona', 'maths', 'toxicity'):
        assert 'left out: notes' in w2s(*command(kind, home, '-long', tmp_path), '--config', tmp_path / 'x.toml')
    for kind in ('weak-teacher', 'safety', 'persona', 'toxicity'):
        with pytest.raises(ConfigError, match='leave_out'): w2s('run', kind, '--leave-out', 'notes', '--dry-run')


@pytest.mark.parametrize(
    'words',
    [
        ('classify', '--data', 'odd.csv'),
        ('classify', '--data', 'odd.csv', '--text', 'b'),
        ('weak-teacher', '--data', 'folder'),
        ('classify', '--data', 'twice.csv', '--contradictions', 'refuse'),
    ],
    ids=lambda w: ' '.join(w),
)
def test_messages_speak_the_command_line(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'odd.csv').write_text('a,b\nx,y\nz,w\n')
    (tmp_path/'twice.csv').write_text('text,label\nx,1\nx,0\ny,1\n')
    (tmp_path/'folder').mkdir()
    for name in ('train_one', 'train_two', 'test_one'):
        jsonl(tmp_path / 'folder' / f'{name}.jsonl', [dict(prompt='a', chosen='b', rejected='c')])
    with pytest.raises(DataError) as e: w2s('run', *words)
    assert '--' in str(e.value) and '="' not in str(e.value) and '={' not in str(e.value) and 'mend' not in str(e.value).lower()


# Before any work

def rows_of(path, n, unsafe):
    path.write_text('text,label\n' + ''.join(f'Text number {i} {sentence(5, i)},{"unsafe" if i < unsafe else "safe"}\n' for i in range(n)))
    return path


REFUSED = {
    'too many rows': (80, 40, ('--n-labelled', 2500, '--n-unlabelled', 2500), '--n-labelled is 2500, but'),
    'one row': (80, 40, ('--rows', 1), 'rows is 1; it must be at least 2'),
    'two rows': (80, 40, ('--n-labelled', 1, '--n-unlabelled', 1), 'two classes are needed'),
    'two of a class': (80, 2, (), 'two classes are needed'),
    'one of a class': (80, 1, (), 'two classes are needed'),
    'one class': (80, 0, (), 'two classes are needed'),
    'a share that is too small': (30, 15, ('--n-labelled', 0.01), 'too few'),
    'nothing to choose by': (12, 6, ('--validate', 0.01, '--snapshots', 2), 'too few'),
    'too few to clean': (8, 4, ('--method', 'filter'), 'folds'),
}


@pytest.mark.parametrize('case', REFUSED)
@pytest.mark.parametrize('dry', [True, False])
def test_classify_refuses_before_the_first_training(tmp_path, case, dry):
    n, unsafe, flags, told = REFUSED[case]
    path = rows_of(tmp_path/'x.csv', n, unsafe)
    with pytest.raises((DataError, ConfigError)) as e:
        w2s(
            'run',
            'classify',
            '--data',
            path,
            '--weak',
            'pico',
            '--strong',
            'pico',
            '--out',
            tmp_path / 'out',
            *flags,
            *(['--dry-run'] if dry else []),
        )
    assert told in str(e.value) and '\n' not in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.parametrize('unsafe', [3, 4, 8])
@pytest.mark.parametrize('seeds', [1, 5])
def test_rare_classes_are_in_every_part(tmp_path, unsafe, seeds):
    from w2s.compare.label_arms import part_rows
    from w2s.compare.label_data import load_labels
    from w2s.compare.label_settings import fill_labels
    from w2s.compare.models import know_model
    config = fill_labels(dict(data=str(rows_of(tmp_path/'x.csv', 80, unsafe)), seeds=seeds, weak='pico', strong='pico'))
    data = load_labels(config, [know_model('pico', 'pico', config).reader])
    for seed in range(seeds):
        part = part_rows(config, data, seed)
        for rows in (part.labelled, part.unlabelled, part.test): assert set(rows['label']) == {0, 1}
        assert not set(part.labelled['group']) & set(part.unlabelled['group']) | set(part.unlabelled['group']) & set(part.test['group'])
        assert abs(len(part.labelled) - len(part.unlabelled)) <= 2


@pytest.mark.parametrize(
    'words, told',
    [
        (('weak-teacher', '--data', 'pairs.jsonl', '--n-unlabelled', 5000), '--n-unlabelled is 5000, but'),
        (('persona', '--data', 'questions.jsonl', '--judge', 'pico', '--concept', 'x', '--n-unlabelled', 5000), 'too few'),
        (('maths', '--data', 'sums.jsonl', '--n-unlabelled', 5000), 'too few'),
        (
            ('toxicity', '--data', 'prompts.jsonl', '--scorer', 'scorer', '--allow-poor-scorer', '--n-unlabelled', 5000),
            '--n-unlabelled 5,000',
        ),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else '',
)
@pytest.mark.parametrize('dry', [True, False])
def test_other_commands_refuse_before_any_work(home, tmp_path, words, told, dry, monkeypatch):
    monkeypatch.chdir(home)
    with pytest.raises((DataError, ConfigError)) as e: w2s('run', *words, '--out', tmp_path/'out', *(['--dry-run'] if dry else []))
    assert told in str(e.value) and not (tmp_path/'out').exists()


def test_a_file_of_weak_answers_is_looked_at_before_any_work(home, tmp_path):
    jsonl(tmp_path/'weak.jsonl', [dict(instruction='Translate.', input=sentence(6, i), output='x') for i in range(5)])
    with pytest.raises(DataError, match='has no answer to'):
        w2s(
            'run',
            'persona',
            '--data',
            home / 'questions.jsonl',
            '--answers',
            tmp_path / 'weak.jsonl',
            '--judge',
            'pico',
            '--concept',
            'x',
            '--n-unlabelled',
            6,
            '--n-test',
            4,
            '--seeds',
            1,
            '--out',
            tmp_path / 'out',
        )
    assert not (tmp_path/'out').exists()


# What is written

@pytest.mark.parametrize(
    'place',
    [
        'the input',
        'the input by another name',
        'a link to the input',
        'a file of somebody else',
        'a table of somebody else',
        'a link to a file',
        'own scores that were changed',
        'a folder',
    ],
)
@pytest.mark.parametrize('form', ['jsonl', 'csv', 'parquet'])
def test_scores_are_written_over_nothing_but_own_scores(home, tmp_path, place, form):
    texts, out = tmp_path/f'x.{form}', tmp_path/f'y.{form}'
    frame = pd.DataFrame([dict(response=sentence(9, i)) for i in range(4)])
    {
        'jsonl': lambda: frame.to_json(texts, orient='records', lines=True),
        'csv': lambda: frame.to_csv(texts, index=False),
        'parquet': lambda: frame.to_parquet(texts),
    }[form]()
    other = tmp_path/f'z.{form}'
    if place == 'the input': out = texts
    elif place == 'the input by another name': (tmp_path/'d').mkdir(); out = tmp_path/'d'/'..'/texts.name
    elif place == 'a link to the input': out.symlink_to(texts)
    elif place == 'a file of somebody else': out.write_text('mine')
    elif place == 'a table of somebody else': out.write_bytes(texts.read_bytes())
    elif place == 'a link to a file': other.write_text('mine'); out.symlink_to(other)
    elif place == 'a folder': out.mkdir()
    else:
        w2s('toxicity', 'score', '--scorer', 'oracle', '--texts', texts, '--out', out)
        out.write_bytes(out.read_bytes() + b'\n')
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ConfigError, match='--out'): w2s('toxicity', 'score', '--scorer', 'oracle', '--texts', texts, '--out', out)
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


@pytest.mark.parametrize('form', ['jsonl', 'csv', 'parquet'])
def test_the_same_command_replaces_its_own_scores(home, tmp_path, form):
    words = ('toxicity', 'score', '--scorer', 'oracle', '--texts', home/'said.jsonl', '--out', tmp_path/f'y.{form}')
    w2s(*words)
    before = (tmp_path/f'y.{form}').read_bytes()
    w2s(*words)
    assert (tmp_path / f'y.{form}').read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == [
        f'y.{form}',
        f'y.{form}.about.json',
    ]


def test_a_failure_leaves_no_half_file(home, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(pd.DataFrame, 'to_json', full)
    with pytest.raises(OSError): w2s('toxicity', 'score', '--scorer', 'oracle', '--texts', home/'said.jsonl', '--out', tmp_path/'y.jsonl')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('start', ['=', '+', '-', '@', '\t', '\r'], ids=repr)
def test_cells_that_a_spreadsheet_runs_are_said(tmp_path, start):
    jsonl(tmp_path/'x.jsonl', [dict(text='So it goes.', note='a'), dict(text=f'{start}HYPERLINK("http://x")', note='b')])
    told = w2s('toxicity', 'score', '--scorer', 'oracle', '--texts', tmp_path/'x.jsonl', '--out', tmp_path/'y.csv')
    assert '1 cell begins with =, +, - or @ (the first in row 2, column "text")' in told
    assert 'begins with' not in w2s('toxicity', 'score', '--scorer', 'oracle', '--texts', tmp_path/'x.jsonl', '--out', tmp_path/'y.jsonl')


@pytest.mark.parametrize(
    'words',
    [
        ('refine', '--questions', 'x.json', '--out', 'x.jsonl'),
        ('refine', '--questions', 'x.jsonl', '--out', 'x.jsonl'),
        ('label', '--model', 'pico', '--supervisor', 'judge', '--rows', 'x.json', '--out', 'x.parquet'),
    ],
    ids=lambda w: ' '.join(w[:1]),
)
def test_reports_are_not_written_over_the_rows(tmp_path, words, monkeypatch):
    "A report beside x.jsonl is x.json"
    monkeypatch.chdir(tmp_path)
    rows = [dict(prompt=f'q {i}', chosen='a', rejected='b', completion='c') for i in range(3)]
    (tmp_path/'x.json').write_text(json.dumps(rows))
    jsonl(tmp_path/'x.jsonl', rows)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match='give --out another name'): w2s(*words)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


POOR = {
    'r below zero': dict(r=-0.017, auc=0.6),
    'r is zero': dict(r=0.0, auc=0.6),
    'AUC of a coin': dict(r=0.1, auc=0.5),
    'AUC below': dict(r=0.1, auc=0.4),
    'nothing known': dict(r=None, auc=None),
}


@pytest.mark.parametrize('case', POOR)
def test_a_scorer_that_orders_nothing_is_refused_unless_it_is_allowed(home, tmp_path, case):
    import shutil

    from w2s.compare.toxicity_arms import judge_of
    from w2s.compare.toxicity_settings import fill_toxicity
    folder = Path(shutil.copytree(home/'scorer', tmp_path/'scorer'))
    card = json.loads((folder/'card.json').read_text())
    card['held_out']['all'] |= POOR[case]
    (folder/'card.json').write_text(json.dumps(card))
    (folder/'manifest.json').unlink() # whose checksum is of the card as it was
    given = dict(data=str(home/'prompts.jsonl'), scorer=str(folder))
    with pytest.raises(ConfigError, match='--allow-poor-scorer'): judge_of(fill_toxicity(given))
    judge_of(fill_toxicity(given | dict(allow_poor_scorer=True)))
    card['held_out']['all'] |= dict(r=.3, auc=None)
    (folder/'card.json').write_text(json.dumps(card))
    judge_of(fill_toxicity(given))


# Settings that are no numbers

@pytest.mark.parametrize('value', ['nan', 'inf', '-inf'])
@pytest.mark.parametrize(
    'words',
    [
        ('weak-teacher', '--beta'),
        ('weak-teacher', '--sft-lr'),
        ('weak-teacher', '--temperature'),
        ('classify', '--lr'),
        ('safety', '--validate'),
        ('persona', '--lr'),
        ('toxicity', '--beta'),
        ('toxicity', '--threshold'),
    ],
    ids=' '.join,
)
def test_settings_that_are_no_numbers(words, value, home):
    data = ('--data', home/'labels.jsonl') if words[0] == 'classify' else ()
    with pytest.raises(ConfigError) as e: w2s('run', words[0], *data, words[1], value, '--dry-run')
    assert value in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize(
    'data',
    ['beta = "Ä"'.encode('latin-1'), 'beta = 1'.encode('utf-16'), b'\xff\xfe', b'beta = ' + b'9' * 5000, b'a = ' + b'[' * 5000],
    ids=['latin-1', 'utf-16', 'bytes', 'digits', 'deep'],
)
def test_settings_files_that_cannot_be_read(tmp_path, data):
    (tmp_path/'x.toml').write_bytes(data)
    with pytest.raises(ConfigError) as e: w2s('run', 'preferences', '--config', tmp_path/'x.toml', '--dry-run')
    assert 'x.toml' in str(e.value) or 'beta' in str(e.value)


# Real rows

@needs(DATA/'privacy_policy_qa')
def test_real_clauses():
    read = read_labels(DATA/'privacy_policy_qa'/'privacy_policy_qa.test.jsonl.gz')
    assert read.form == 'legalbench' and 'text: context + question; label: answer' in line(read)


@needs(DATA/'strategyqa')
def test_real_questions_with_facts_stop(tmp_path):
    with pytest.raises(DataError, match='would not be read'): read_labels(DATA/'strategyqa'/'dev.json.gz')
    read = read_labels(
        DATA / 'strategyqa' / 'dev.json.gz',
        text='facts,question' if False else 'question',
        label='answer',
        leave_out=['facts', 'decomposition', 'evidence', 'term', 'description'],
    )
    assert read.classes == ('False', 'True') and len(read.splits['all']) == 229


@needs(DATA/'diasafety')
def test_real_replies():
    read = read_labels(DATA/'diasafety')
    assert read.form == 'diasafety' and all('text: context + response; label: label; not read: category' in str(c) for c in read.columns)


@needs(DATA/'rtp_perspective')
def test_real_prompts():
    assert 'prompt with its toxicity: prompt' in str(read_prompts(DATA/'rtp_perspective'/'rtp_quark_val.jsonl.gz').columns[0])


@needs(DATA/'gsm8k')
def test_real_sums():
    assert 'question: question; answer: answer' in line(read_gsm8k(DATA/'gsm8k'))
