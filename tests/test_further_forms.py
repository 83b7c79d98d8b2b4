"""Public sets that needed a flag, or could not be read: trees of messages, scored conversations, Prometheus, TruthfulQA, TREC, and
multiple-choice questions as questions. The rows are in our own words"""
import json

import pytest

from w2s.data.label_readers import read_labels
from w2s.data.preference_forms import NO_REPLIES
from w2s.data.questions import read_asked_file
from w2s.data.readers import read_preferences
from w2s.errors import DataError

N = range(24)


def jsonl(path, rows):
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    return path


def ask(i): return f'Which of the lamps on the table is lit number {i}?'
def yes(i): return f'Lamp {i} it is, as anybody can see'
def no(i): return f'Not lamp {i}, whatever they say'


def message(i, name, above, role, text, rank=None):
    return dict(message_id=f'{name}{i}', parent_id=above and f'{above}{i}', user_id='u', created_date='2023-02-05', text=text, role=role,
                lang='en', review_count=3, review_result=True, deleted=False, rank=rank, synthetic=False, model_name=None,
                message_tree_id=f'q{i}', tree_state='ready', detoxify=None, emojis=dict(name=['+1'], count=[1]),
                labels=dict(name=['quality'], value=[.5], count=[1]))


def tree(i):
    return [
        message(i, 'q', '', 'prompter', ask(i)),
        message(i, 'a', 'q', 'assistant', no(i), 2),
        message(i, 'b', 'q', 'assistant', yes(i), 0),
        message(i, 'c', 'q', 'assistant', 'So?', 1),
        message(i, 'd', 'b', 'prompter', f'And then, {i}?'),
        message(i, 'e', 'd', 'assistant', f'Nothing more, {i}.', None),
    ]


def test_trees_of_messages_are_preferences(tmp_path):
    "The best and the worst of the replies to one message; every other row is counted"
    read = read_preferences(jsonl(tmp_path/'x.jsonl', [r for i in N for r in tree(i)]))
    ds = read.splits['all']
    assert [(c, r) for c, r in zip(ds['chosen'], ds['rejected'], strict=True)] == [(yes(i), no(i)) for i in N]
    assert all(ask(i) in str(p) for i, p in enumerate(ds['prompt']))
    assert {r.reason for r in read.refused} == {NO_REPLIES} and len(read.refused) == 5 * len(N)


def test_later_turns_of_a_tree_have_what_was_said_before(tmp_path):
    def deeper(i): return [*tree(i)[:5], message(i, 'e', 'd', 'assistant', yes(i), 0), message(i, 'f', 'd', 'assistant', no(i), 1)]
    ds = read_preferences(jsonl(tmp_path/'x.jsonl', [r for i in N for r in deeper(i)])).splits['all']
    later = [str(p) for p in ds['prompt'] if 'And then' in str(p)]
    assert len(later) == len(N) and all(ask(i) in p and yes(i) in p and no(i) not in p for i, p in enumerate(later))


def test_trees_of_messages_are_demonstrations_of_the_best_reply(tmp_path):
    "The first reply in the file was taken, whatever its rank"
    read = read_asked_file(jsonl(tmp_path/'x.jsonl', [r for i in N for r in tree(i)]), answers='needed')
    said = dict(zip(read.questions, read.answers, strict=True))
    assert [said[q] for q in said if q.strip().endswith(f'{ask(3)}') or q == ask(3)] == [yes(3)] and len(said) == 2 * len(N)
    assert not any(no(i) in q or a in (no(i), 'So?') for i, (q, a) in enumerate(said.items()))


def prism(i):
    def said(text, score, chosen=False, turn=0):
        return dict(content=text, role='model', score=score, if_chosen=chosen, turn=turn, within_turn_id=0, model_name='m')
    def asked(text, turn=0):
        return dict(content=text, role='user', score=None, if_chosen=None, turn=turn, within_turn_id=None, model_name=None)
    return dict(conversation_id=f'c{i}', user_id='u', conversation_type='unguided', opening_prompt=ask(i), conversation_turns=2,
                conversation_history=[asked(ask(i)), said('So?', 50), said(yes(i), 88, True), said(no(i), 7), said('', None),
                                      asked('And now?', 1), said('No.', 3, True, 1), said('Yes.', 70, False, 1)],
                performance_attributes=dict(values=10, fluency=90), choice_attributes=dict(values=3), timing_duration_s=3.5,
                open_feedback=f'{ask(i)} {ask(i)}', included_in_balanced_subset=True, generated_datetime='2023-11-01')


def prometheus(i):
    return dict(
        orig_criteria='Is the answer of use to somebody who stands before the table?', orig_feedback_A=ask(i) * 3, orig_score_A='2',
        orig_feedback_B=ask(i) * 3, orig_score_B='4', orig_feedback=ask(i) * 4, orig_instruction=ask(i),
        orig_response_A=(no, yes)[i % 2](i), orig_response_B=(yes, no)[i % 2](i),
        orig_reference_answer=f'Lamp {i}', orig_preference='BA'[i % 2],
        instruction=f'###Task: judge these two. {ask(i)} {yes(i)} {no(i)}', output=f'Feedback: {ask(i)} [RESULT] A', input='',
    )


def truthful(i):
    return dict(type='Odd', category='Lamps', question=ask(i), best_answer=yes(i), correct_answers=[yes(i), 'It'],
                incorrect_answers=[no(i), f'No lamp at all is lit, {i}'], source='https://example.org/lamps')


@pytest.mark.parametrize('make', [prism, prometheus], ids=lambda f: f.__name__)
def test_pairs(tmp_path, make):
    read = read_preferences(jsonl(tmp_path/'x.jsonl', map(make, N)))
    ds = read.splits['all']
    assert [(p, c, r) for p, c, r in zip(ds['prompt'], ds['chosen'], ds['rejected'], strict=True)] == [(ask(i), yes(i), no(i)) for i in N]
    assert not read.refused


def test_truthful_qa_as_pairs_labels_and_questions(tmp_path):
    path = jsonl(tmp_path/'x.jsonl', map(truthful, N))
    ds = read_preferences(path).splits['all']
    assert len(ds) == 2 * len(N) and set(ds['chosen']) == {yes(i) for i in N} and no(4) in ds['rejected'][:]
    read = read_labels(path)
    rows = read.splits['all']
    assert read.classes == ('right', 'wrong') and len(rows) == len(N) and set(rows['label']) == {0, 1}
    for i, (p, label) in enumerate(zip(rows['prompt'], rows['label'], strict=True)): assert ask(i) in p and (yes(i) in p) == (label == 0)
    asked = read_asked_file(path, answers='needed')
    assert asked.questions == [ask(i) for i in N] and asked.answers == [yes(i) for i in N]


def test_truthful_qa_as_it_was_published_first(tmp_path):
    import csv
    with open(tmp_path/'x.csv', 'w', encoding='utf-8', newline='') as f:
        w = csv.writer(f)
        w.writerow(['Type', 'Category', 'Question', 'Best Answer', 'Correct Answers', 'Incorrect Answers', 'Source'])
        w.writerows([['A', 'Lamps', ask(i), yes(i), f'{yes(i)}; The lamp', f'{no(i)}; No lamp, {i}', 'https://example.org'] for i in N])
    ds = read_preferences(tmp_path/'x.csv').splits['all']
    assert len(ds) == 2 * len(N) and ds['rejected'][:2] == [no(0), 'No lamp, 0']
    assert read_asked_file(tmp_path/'x.csv', answers='needed').answers == [yes(i) for i in N]


@pytest.mark.parametrize('names', [('coarse_label', 'fine_label'), ('label-coarse', 'label-fine')])
def test_several_labels_are_named(tmp_path, names):
    path = jsonl(tmp_path/'x.jsonl', [{'text': ask(i), names[0]: i % 2, names[1]: i % 3} for i in N])
    with pytest.raises(DataError, match=f'{names[0]} and {names[1]} could each be the label.*--label {names[0]}'): read_labels(path)
    assert len(read_labels(path, label=names[1]).classes) == 3


def test_one_likely_label_is_named(tmp_path):
    path = jsonl(tmp_path/'x.jsonl', [dict(text=ask(i), coarse_label=i % 2) for i in N])
    with pytest.raises(DataError, match='no column is known as a label.*--label coarse_label'): read_labels(path)


def options(i): return ['red lamp', 'blue lamp', 'green lamp'][i % 3:] + ['no lamp']


LISTED = { # name -> row; the right answer is the last but one of the options
    'MMLU': lambda i: dict(question=ask(i), choices=options(i), answer=len(options(i)) - 2, subject='lamps'),
    'AQuA': lambda i: dict(question=ask(i), options=options(i), rationale=ask(i) * 2, correct='ABCD'[len(options(i)) - 2]),
    'ARC': lambda i: dict(
        question=ask(i), choices=dict(text=options(i), label=list('ABCD')[:len(options(i))]), answerKey='ABCD'[len(options(i)) - 2]
    ),
    'MMLU-Pro': lambda i: dict(
        question=ask(i), options=options(i), answer='ABCD'[len(options(i)) - 2], answer_index=len(options(i)) - 2, cot_content=''
    ),
    'HellaSwag': lambda i: dict(ctx=ask(i), endings=options(i), label=str(len(options(i)) - 2), activity_label='lamps'),
    'COPA': lambda i: dict(premise=ask(i), question='cause', choice1='red lamp', choice2='no lamp', label=0, idx=i),
}


@pytest.mark.parametrize('name', LISTED)
def test_questions_are_asked_with_their_answers(tmp_path, name):
    read = read_asked_file(jsonl(tmp_path/'x.jsonl', map(LISTED[name], N)), answers='if there')
    have = [['red lamp', 'no lamp'] if name == 'COPA' else options(i) for i in N]
    for i, (q, a) in enumerate(zip(read.questions, read.answers, strict=True)):
        at = len(have[i]) - 2
        assert ask(i) in q and all(f'({"ABCD"[k]}) {o}' in q for k, o in enumerate(have[i])) and a == f'({"ABCD"[at]}) {have[i][at]}'


def test_answers_without_an_order_do_not_show_the_right_one(tmp_path):
    wrong = dict(distractor1='argon', distractor2='zinc', distractor3='neon')
    rows = [dict(question=ask(i), correct_answer='mercury', support='', **wrong) for i in N]
    read = read_asked_file(jsonl(tmp_path/'x.jsonl', rows))
    assert '(A) argon\n(B) mercury\n(C) neon\n(D) zinc' in read.questions[0] and read.answers[0] == '(B) mercury'


def test_refine_takes_them_without_a_flag(tmp_path):
    from typer.testing import CliRunner

    from w2s.cli.app import app
    path = jsonl(tmp_path/'q.jsonl', map(LISTED['AQuA'], N))
    done = CliRunner().invoke(app, ['refine', '--questions', str(path), '--strong', 'pico', '--out', str(tmp_path/'r.jsonl'), '--dry-run'])
    assert not done.exception, done.exception


NAMES = (('a', 'b'), ('resp_0', 'resp_1'), ('resp_1', 'resp_2'), ('response1', 'response2'), ('response_1', 'response_2'),
         ('human_ref_A', 'other'))


def named_pairs(tmp_path, names, label, labels, tell):
    rows = [{'q': f'What is {i}?', names[0]: f'{i}, the first', names[1]: f'{i}, the second', label: labels[i%2]} for i in N]
    found = read_preferences(jsonl(tmp_path/'x.jsonl', rows), columns=tell).splits
    return {r['prompt']: r['chosen'].split()[-1] for rows in found.values() for r in rows}


@pytest.mark.parametrize('names', NAMES)
@pytest.mark.parametrize('all_told', [True, False])
def test_columns_that_are_named_have_no_convention_of_a_data_set(tmp_path, names, all_told):
    "A label names a response; that 1 is the first one, or a number below zero, holds for the columns of SHP and HelpSteer"
    tell = dict(prompt='q', label='w') | (dict(first=names[0], second=names[1]) if all_told else {})
    if not all_told and names[0] in ('a', 'resp_0', 'resp_1', 'human_ref_A'): tell |= dict(zip(('first', 'second'), names, strict=True))
    got = named_pairs(tmp_path, names, 'w', names, tell)
    assert got == {f'What is {i}?': ('first', 'second')[i%2] for i in N}
    ends = [n[-1] for n in names]
    if ends[0] == '1': assert named_pairs(tmp_path, names, 'w', ends, tell) == got
    if ends != ['0', '1']:
        with pytest.raises(DataError, match='label 0 names neither'): named_pairs(tmp_path, names, 'w', (0, 1), tell)


def test_a_label_column_of_a_data_set_keeps_its_convention(tmp_path):
    "Also where responses are called otherwise"
    tell = dict(prompt='q', first='a', second='b', label='preference_strength')
    got = named_pairs(tmp_path, ('a', 'b'), 'preference_strength', (-2, 3), tell)
    assert got == {f'What is {i}?': ('first', 'second')[i%2] for i in N}
    with pytest.raises(DataError, match='names neither'):
        named_pairs(tmp_path, ('a', 'b'), 'labels', (1, 0), dict(prompt='q', first='a', second='b', label='labels'))
    tell = dict(prompt='q', first='human_ref_A', second='human_ref_B', label='labels')
    got = named_pairs(tmp_path, ('human_ref_A', 'human_ref_B'), 'labels', (1, 0), tell)
    assert got == {f'What is {i}?': ('first', 'second')[i%2] for i in N}


def test_columns_that_are_named_are_a_plain_pair(tmp_path):
    "And not the answers of TruthfulQA, which are lists"
    rows = [dict(question=f'What is {i}?', good=f'A number; {i}.', bad=f'A letter; perhaps {i}; or none.') for i in N]
    found = read_preferences(jsonl(tmp_path/'x.jsonl', rows), columns=dict(chosen='good', rejected='bad')).splits
    pairs = {(r['prompt'], r['chosen'], r['rejected']) for rows in found.values() for r in rows}
    assert pairs == {(r['question'], r['good'], r['bad']) for r in rows}
