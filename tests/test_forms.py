"""Public forms of rows, by their real columns with cells of our own: what stands in prompt, chosen, rejected, label and completion, and
what was not read; and readers under any rows at all"""
import json

import pandas as pd
import pytest

from w2s.data.readers import read_preferences
from w2s.errors import DataError

WORDS = 'lamp river seven quiet garden under bring yellow paper walk stone early mirror cloud gentle north'.split()
N = range(4)


def words(n, i): return ' '.join(WORDS[(7 * i + 3 * k + n) % 16] for k in range(n)).capitalize() + '.'
def q(i): return f'Is {i} a prime number?'
def yes(i): return f'Yes, {i} is.'
def no(i): return f'No, {i} is not.'
def long(i): return words(40, i)
def user(t): return dict(role='user', content=t)
def bot(t): return dict(role='assistant', content=t)
def human(t): return {'from': 'human', 'value': t}
def gpt(t): return {'from': 'gpt', 'value': t}
def parts(t): return [dict(type='text', text=t)]
def jsonl(path, rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8'); return path
def chat(i): return [user(q(i))]
def either(i, a, b): return (a, b) if i % 2 else (b, a)


def pair(first, second, label, values, ask='prompt', **more):
    "Rows of two responses: the better one is the first in odd rows"
    rows = []
    for i in N:
        a, b = either(i, yes(i), no(i))
        rows.append({ask: q(i), first: a, second: b, label: values[0] if i % 2 else values[1], **{k: f(i) for k, f in more.items()}})
    return rows


def rows(f): return [f(i) for i in N]


ARENA = dict(
    question_id=lambda i: f'{i:032x}',
    model_a=lambda i: 'm',
    model_b=lambda i: 'n',
    judge=lambda i: 'arena_user_1',
    turn=lambda i: 1,
    language=lambda i: 'English',
)

# name -> rows, prompt of a row, columns that must be named as not read
PREFERENCES = {
    'orca_dpo_pairs': (
        rows(lambda i: dict(system=words(9, i), question=q(i), chosen=yes(i), rejected=no(i))),
        lambda i: f'{words(9, i)}\n\n{q(i)}',
        '',
    ),
    'distilabel-intel-orca-dpo-pairs': (
        rows(
            lambda i: dict(
                system=words(9, i),
                input=q(i),
                chosen=yes(i),
                rejected=no(i),
                generations=[yes(i), no(i)],
                order=['chosen', 'rejected'],
                labelling_model='m',
                labelling_prompt=[dict(role='system', content=long(i)), user(long(i))],
                raw_labelling_response=long(i),
                rating=[9.0, 3.0],
                rationale=long(i + 1),
                status='unchanged',
                original_chosen=yes(i),
                original_rejected=no(i),
                chosen_score=9.0,
                in_gsm8k_train=False,
            )
        ),
        lambda i: f'{words(9, i)}\n\n{q(i)}',
        'labelling_prompt rationale status',
    ),
    'LLaMA-Factory ranking': (
        rows(lambda i: dict(instruction=q(i), input=words(5, i) if i else '', chosen=yes(i), rejected=no(i))),
        lambda i: f'{q(i)}\n\n{words(5, i)}' if i else q(i),
        '',
    ),
    'LLaMA-Factory ranking, old': (rows(lambda i: dict(instruction=q(i), input='', output=[yes(i), no(i)])), q, ''),
    'LLaMA-Factory ShareGPT': (rows(lambda i: dict(conversations=[human(q(i))], chosen=gpt(yes(i)), rejected=gpt(no(i)))), chat, ''),
    'LLaMA-Factory ShareGPT, turns': (
        rows(
            lambda i: dict(
                conversations=[{'from': 'system', 'value': 'Be brief.'}, human('Hi'), gpt('Ho'), human(q(i))],
                chosen=gpt(yes(i)),
                rejected=gpt(no(i)),
            )
        ),
        lambda i: [dict(role='system', content='Be brief.'), user('Hi'), bot('Ho'), user(q(i))],
        '',
    ),
    'LLaMA-Factory v1': (
        rows(
            lambda i: dict(
                chosen_messages=[
                    dict(role='user', content=[dict(type='text', value=q(i))], loss_weight=0.0),
                    dict(role='assistant', content=[dict(type='text', value=yes(i))], loss_weight=1.0),
                ],
                rejected_messages=[
                    dict(role='user', content=[dict(type='text', value=q(i))], loss_weight=0.0),
                    dict(role='assistant', content=[dict(type='text', value=no(i))], loss_weight=1.0),
                ],
            )
        ),
        chat,
        '',
    ),
    'axolotl chat_template': (
        rows(lambda i: dict(messages=[dict(role='system', content='Be brief.'), user(q(i))], chosen=bot(yes(i)), rejected=bot(no(i)))),
        lambda i: [dict(role='system', content='Be brief.'), user(q(i))],
        '',
    ),
    'axolotl chatml.argilla': (
        rows(lambda i: dict(system='Be brief.', instruction=q(i), chosen_response=yes(i), rejected_response=no(i))),
        lambda i: f'Be brief.\n\n{q(i)}',
        '',
    ),
    'axolotl chatml.icr': (
        rows(lambda i: dict(system='Be brief.', input=q(i), chosen=yes(i), rejected=no(i))),
        lambda i: f'Be brief.\n\n{q(i)}',
        '',
    ),
    'ShareGPT on both sides': (rows(lambda i: dict(chosen=[human(q(i)), gpt(yes(i))], rejected=[human(q(i)), gpt(no(i))])), chat, ''),
    'ShareGPT beside a prompt': (rows(lambda i: dict(prompt=[human(q(i))], chosen=[gpt(yes(i))], rejected=[gpt(no(i))])), chat, ''),
    'content in parts': (
        rows(
            lambda i: dict(
                prompt=[dict(role='user', content=parts(q(i)))],
                chosen=[dict(role='assistant', content=parts(yes(i)))],
                rejected=[dict(role='assistant', content=parts(no(i)))],
            )
        ),
        chat,
        '',
    ),
    'messages as JSON': (
        rows(lambda i: dict(chosen=json.dumps([user(q(i)), bot(yes(i))]), rejected=json.dumps([user(q(i)), bot(no(i))]))),
        chat,
        '',
    ),
    'a message as JSON': (
        rows(lambda i: dict(messages=json.dumps(chat(i)), chosen=json.dumps(bot(yes(i))), rejected=json.dumps(bot(no(i))))),
        chat,
        '',
    ),
    'SHP': (
        pair(
            'human_ref_A',
            'human_ref_B',
            'labels',
            (1, 0),
            'history',
            post_id=lambda i: f'p{i}',
            domain=lambda i: 'x_train',
            upvote_ratio=lambda i: 0.9,
            score_A=lambda i: 9,
            score_B=lambda i: 3,
            seconds_difference=lambda i: 1.0,
            score_ratio=lambda i: 3.0,
        ),
        q,
        'post_id domain score_ratio',
    ),
    'Nectar': (
        rows(
            lambda i: dict(
                prompt=f'\n\nHuman: {q(i)}\n\nAssistant: ',
                answers=[
                    dict(answer=words(9, i), model='m', rank=2.0),
                    dict(answer=no(i), model='n', rank=7.0),
                    dict(answer=yes(i), model='o', rank=1.0),
                ],
                turns=1,
                num_responses=3,
                source=['x'],
                good_natured=True,
            )
        ),
        lambda i: f'\n\nHuman: {q(i)}\n\nAssistant: ',
        'turns num_responses',
    ),
    'PKU-SafeRLHF': (
        pair(
            'response_0',
            'response_1',
            'better_response_id',
            (0, 1),
            is_response_0_safe=lambda i: True,
            is_response_1_safe=lambda i: False,
            safer_response_id=lambda i: 0,
        ),
        q,
        'safer_response_id is_response_0_safe',
    ),
    'PKU-SafeRLHF, safer': (
        pair('response_0', 'response_1', 'safer_response_id', (0, 1), response_0_sha256=lambda i: f'{i:064x}'),
        q,
        'response_0_sha256',
    ),
    'HelpSteer2 preference': (
        pair(
            'response_1',
            'response_2',
            'preference_strength',
            (-2, 3),
            split=lambda i: 'train',
            preference_statement=long,
            preference_elaboration=lambda i: long(i + 5),
            three_most_similar_preferences=lambda i: [dict(statement=long(i), strength=1)],
            all_preferences_unprocessed=lambda i: [dict(strength=1, justification=long(i))],
        ),
        q,
        'preference_statement all_preferences_unprocessed',
    ),
    'HelpSteer2 scores': (
        [
            dict(prompt=q(i), response=a, helpfulness=h, correctness=h, coherence=4, complexity=1, verbosity=2)
            for i in N
            for a, h in either(i, (yes(i), 4), (no(i), 1))
        ],
        q,
        'correctness verbosity',
    ),
    'HelpSteer3': (
        [
            dict(
                domain='general',
                language='english',
                context=chat(i),
                response1=r[0],
                response2=r[1],
                overall_preference=-3 if i % 2 else 1,
                individual_preference=[dict(score=1, reasoning=long(i), feedback=long(i + 3))],
            )
            for i in N
            for r in [either(i, yes(i), no(i))]
        ],
        chat,
        'individual_preference',
    ),
    'UltraFeedback': (
        rows(
            lambda i: dict(
                source='x',
                instruction=q(i),
                models=['m', 'n', 'o'],
                completions=[
                    {
                        'annotations': dict(honesty=dict(Rating='3', Rationale=long(i))),
                        'model': m,
                        'response': r,
                        'critique': long(i),
                        'fine-grained_score': s,
                        'overall_score': s,
                        'principle': 'p',
                        'custom_system_prompt': long(i),
                    }
                    for m, r, s in (('m', no(i), 2.0), ('n', yes(i), 9.0), ('o', words(6, i), 5.0))
                ],
                correct_answers=['None'],
                incorrect_answers=['None'],
            )
        ),
        q,
        'models correct_answers',
    ),
    'stack-exchange-paired': (
        rows(
            lambda i: dict(
                qid=i,
                question=q(i),
                date='2020',
                metadata=['https://example.org/q', 'https://example.org/u'],
                response_j=yes(i),
                response_k=no(i),
            )
        ),
        q,
        'qid metadata',
    ),
    'stack-exchange-preferences': (
        rows(
            lambda i: dict(
                qid=i,
                question=q(i),
                answers=[
                    dict(answer_id=1, author='a', pm_score=1, selected=False, text=no(i)),
                    dict(answer_id=2, author='b', pm_score=5, selected=True, text=yes(i)),
                ],
                date='2020',
                metadata=['x'],
            )
        ),
        q,
        'metadata',
    ),
    'Chatbot Arena': (
        rows(
            lambda i: dict(
                conversation_a=[user(q(i)), bot(either(i, yes(i), no(i))[0])],
                conversation_b=[user(q(i)), bot(either(i, yes(i), no(i))[1])],
                winner='model_a' if i % 2 else 'model_b',
                **{k: f(i) for k, f in ARENA.items()},
                openai_moderation=dict(categories=dict(hate=False), flagged=False),
                toxic_chat_tag=dict(m=dict(flagged=False)),
            )
        ),
        chat,
        'openai_moderation judge',
    ),
    'MT-Bench': (
        rows(
            lambda i: dict(
                conversation_a=[user(q(i)), bot(either(i, yes(i), no(i))[0]), user('And 8?'), bot('A')],
                conversation_b=[user(q(i)), bot(either(i, yes(i), no(i))[1]), user('And 8?'), bot('B')],
                winner='model_a' if i % 2 else 'model_b',
                **{k: f(i) for k, f in ARENA.items()},
            )
        ),
        chat,
        'judge',
    ),
    'LMSYS on Kaggle': (
        [
            dict(
                id=i,
                model_a='m',
                model_b='n',
                prompt=json.dumps([q(i)]),
                response_a=json.dumps([a]),
                response_b=json.dumps([b]),
                winner_model_a=i % 2,
                winner_model_b=1 - i % 2,
                winner_tie=0,
            )
            for i in N
            for a, b in [either(i, yes(i), no(i))]
        ],
        q,
        'model_a model_b',
    ),
    'WSDM Cup on Kaggle': (
        pair(
            'response_a',
            'response_b',
            'winner',
            ('model_a', 'model_b'),
            id=lambda i: f'{i:064x}',
            model_a=lambda i: 'm',
            model_b=lambda i: 'n',
            language=lambda i: 'English',
        ),
        q,
        'model_a language',
    ),
    'AlpacaEval': (
        pair(
            'output_1',
            'output_2',
            'preference',
            (1.02, 1.98),
            'instruction',
            generator_1=lambda i: 'm',
            generator_2=lambda i: 'n',
            annotator=lambda i: 'gpt',
            dataset=lambda i: 'koala',
        ),
        q,
        'generator_1 annotator',
    ),
    'AlpacaFarm': (pair('output_1', 'output_2', 'preference', (1, 2), 'instruction', input=lambda i: ''), q, ''),
    'WebGPT comparisons': (
        [
            dict(
                question=dict(dataset='eli5', id=str(i), full_text=q(i)),
                quotes_0=dict(title=['t'], extract=[long(i)]),
                answer_0=a,
                tokens_0=dict(prefix=[1, 2]),
                score_0=0.5 if i % 2 else -1.0,
                quotes_1=dict(title=['t'], extract=[long(i + 1)]),
                answer_1=b,
                tokens_1=dict(prefix=[1]),
                score_1=-0.5 if i % 2 else 1.0,
            )
            for i in N
            for a, b in [either(i, yes(i), no(i))]
        ],
        q,
        'quotes_0 quotes_1',
    ),
    'summarize_from_feedback': (
        [
            dict(
                info=dict(id=f't{i}', post=long(i), title=q(i), subreddit='x', site=None, article=None),
                summaries=[dict(text=' ' + a, policy='sup1', note=None), dict(text=' ' + b, policy='ref', note=None)],
                choice=0 if i % 2 else 1,
                worker='w',
                batch='b',
                split='train',
                extra=dict(confidence=7),
            )
            for i in N
            for a, b in [either(i, yes(i), no(i))]
        ],
        lambda i: f'SUBREDDIT: r/x\nTITLE: {q(i)}\nPOST: {long(i)}\nTL;DR:',
        'worker extra',
    ),
    'OpenAI fine-tuning': (
        rows(
            lambda i: dict(
                input=dict(messages=chat(i), tools=[], parallel_tool_calls=True),
                preferred_output=[bot(yes(i))],
                non_preferred_output=[bot(no(i))],
            )
        ),
        chat,
        '',
    ),
    'KTO in TRL': (
        [dict(prompt=q(i), completion=t, label=good) for i in N for t, good in either(i, (yes(i), True), (no(i), False))],
        q,
        '',
    ),
    'KTO in TRL, chats': (
        [dict(prompt=chat(i), completion=[bot(t)], label=good) for i in N for t, good in either(i, (yes(i), True), (no(i), False))],
        chat,
        '',
    ),
    'KTO in LLaMA-Factory': (
        [dict(messages=[user(q(i)), bot(t)], label=good) for i in N for t, good in either(i, (yes(i), True), (no(i), False))],
        chat,
        '',
    ),
    'KTO, Alpaca': (
        [dict(instruction=q(i), input='', output=t, kto_tag=good) for i in N for t, good in either(i, (yes(i), 1), (no(i), 0))],
        q,
        '',
    ),
    'UltraInteract': (
        rows(
            lambda i: dict(
                task='Coding',
                dataset='x',
                trajectory=[human('Hi'), gpt('Ho'), human(q(i))],
                chosen=yes(i),
                rejected=no(i),
                id=f'a{i}',
                parent_id='b',
            )
        ),
        lambda i: [user('Hi'), bot('Ho'), user(q(i))],
        'task parent_id',
    ),
    'Capybara, distilabel': (
        rows(
            lambda i: dict(
                source='x',
                conversation=[dict(input=q(i), output=yes(i))],
                original_response=long(i),
                generation_prompt=[long(i)],
                raw_generation_responses=[long(i)],
                prompt=q(i),
                chosen=[user(q(i)), bot(yes(i))],
                rejected=[user(q(i)), bot(no(i))],
                rating=[5.0, 3.0],
            )
        ),
        chat,
        'original_response',
    ),
    'JudgeBench': (
        pair(
            'response_A',
            'response_B',
            'label',
            ('A>B', 'B>A'),
            'question',
            pair_id=lambda i: f'{i:032x}',
            source=lambda i: 'x',
            response_model=lambda i: 'm',
        ),
        q,
        'pair_id',
    ),
    'a reward model over samples': (
        rows(lambda i: dict(prompt=q(i), responses=[no(i), yes(i), words(4, i)], scores=[-1.0, 2.0, 0.5])),
        q,
        '',
    ),
}


def written(path, rows):
    if path.suffix == '.jsonl': return jsonl(path, rows)
    pd.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize('name', PREFERENCES)
@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_preferences_of_public_forms(tmp_path, name, form):
    given, prompt, unread = PREFERENCES[name]
    read = read_preferences(written(tmp_path/f'x.{form}', given))
    ds = read.splits['all']
    got = sorted((json.dumps(p), c.strip(), r.strip()) for p, c, r in zip(ds['prompt'], ds['chosen'], ds['rejected'], strict=True))
    assert got == sorted((json.dumps(prompt(i)), yes(i), no(i)) for i in N)
    assert {r.reason for r in read.refused} <= {'read as the other response of a pair'} and len(ds) + len(read.refused) == len(given)
    line = str(read.columns[0])
    assert all(c in line for c in given[0]) and all(c in line.split('not read')[1] for c in unread.split())


@pytest.mark.parametrize(
    'name',
    [
        n
        for n, (given, *_) in PREFERENCES.items()
        if any(
            k in given[0]
            for k in (
                'winner',
                'preference',
                'label',
                'better_response_id',
                'preference_strength',
                'overall_preference',
                'score_0',
                'winner_tie',
            )
        )
        and len(given) == len(N)
    ],
)
def test_ties_are_counted(tmp_path, name):
    given, *_ = PREFERENCES[name]
    last = given[-1]
    tie = (
        dict(score_0=1.0, score_1=1.0)
        if 'score_0' in last
        else dict(winner_model_a=0, winner_model_b=0, winner_tie=1)
        if 'winner_tie' in last
        else {k: 0 for k in ('preference_strength', 'overall_preference') if k in last}
        or ({k: 1.5 for k in ('preference',) if k in last} or {k: 'tie' for k in ('winner', 'label', 'better_response_id') if k in last})
    )
    read = read_preferences(
        jsonl(tmp_path / 'x.jsonl', [*given[:-1], last | tie])
        if 'better_response_id' not in tie and 'label' not in tie or isinstance(last.get('label'), str)
        else jsonl(tmp_path / 'x.jsonl', [{k: str(v) for k, v in r.items()} for r in [*given[:-1], last | tie]])
    )
    assert [(r.row, r.reason) for r in read.refused] == [(4, 'the label names neither response')] and len(read.splits['all']) == 3


def test_responses_without_a_twin_are_counted(tmp_path):
    given = [
        *PREFERENCES['KTO in TRL'][0],
        dict(prompt='Why?', completion='So.', label=True),
        dict(prompt=q(1), completion='No!', label=False),
    ]
    read = read_preferences(jsonl(tmp_path/'x.jsonl', given))
    assert len(read.splits['all']) == 4 and [
        r.row for r in read.refused if r.reason == 'no response of the other kind to the same prompt'
    ] == [9, 10]
    from w2s.data.hygiene import clean_text
    found = clean_text(read.splits, read.refused, read.rows_read)[1].found
    assert found[['check', 'rows', 'action']].to_numpy().tolist()[:2] == [
        ['read as the other response of a pair', 4, 'joined'],
        ['no response of the other kind to the same prompt', 2, 'refused'],
    ]
    with pytest.raises(DataError, match='no prompt has a good and a bad one'):
        read_preferences(jsonl(tmp_path / 'y.jsonl', given[::2][:1] + given[-2:-1]))


# Demonstrations

def asks(f, answer='output', **more): return rows(lambda i: {**f(i), answer: yes(i), **{k: g(i) for k, g in more.items()}})


DEMONSTRATIONS = { # name -> rows, question of a row
    'messages': (rows(lambda i: dict(messages=[user(q(i)), bot(yes(i))])), q),
    'messages, system': (
        rows(lambda i: dict(messages=[dict(role='system', content='Be brief.'), user(q(i)), bot(yes(i))])),
        lambda i: f'Be brief.\n\n{q(i)}',
    ),
    'UltraChat': (
        rows(lambda i: dict(prompt='Hi', prompt_id=f'{i:064x}', messages=[user('Hi'), bot('Ho'), user(q(i)), bot(yes(i))])),
        lambda i: f'\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: {q(i)}\n\nAssistant:',
    ),
    'ShareGPT': (rows(lambda i: dict(id=f'{i}_0', conversations=[human(q(i)), gpt(yes(i))])), q),
    'OpenHermes': (
        rows(
            lambda i: dict(source='x', category=None, conversations=[human(q(i)), gpt(yes(i))], system_prompt=None, custom_instruction=None)
        ),
        q,
    ),
    'Slim Orca': (
        rows(
            lambda i: dict(
                conversations=[
                    {'from': 'system', 'value': 'Be brief.', 'weight': None},
                    {'from': 'human', 'value': q(i), 'weight': 0.0},
                    {'from': 'gpt', 'value': yes(i), 'weight': 1.0},
                ]
            )
        ),
        lambda i: f'Be brief.\n\n{q(i)}',
    ),
    'LIMA': (rows(lambda i: dict(conversations=[q(i), yes(i)], source='x')), q),
    'Alpaca': (asks(lambda i: dict(instruction=q(i), input=words(5, i))), lambda i: f'{q(i)}\n\n{words(5, i)}'),
    'Dolly': (asks(lambda i: dict(instruction=q(i), context=long(i), category='closed_qa'), 'response'), lambda i: f'{q(i)}\n\n{long(i)}'),
    'OASST trees': (
        rows(
            lambda i: dict(
                message_tree_id=f'{i}',
                prompt=dict(
                    message_id=f'{i}',
                    text=q(i),
                    role='prompter',
                    replies=[
                        dict(text=no(i), role='assistant', rank=1, replies=[]),
                        dict(text=yes(i), role='assistant', rank=0, replies=[]),
                    ],
                ),
            )
        ),
        q,
    ),
    'OASST messages': (
        [
            r
            for i in N
            for r in (
                dict(message_id=f'a{i}', parent_id=None, text=q(i), role='prompter', lang='en'),
                dict(message_id=f'b{i}', parent_id=f'a{i}', text=yes(i), role='assistant', lang='en'),
            )
        ],
        q,
    ),
    'guanaco': (rows(lambda i: dict(text=f'### Human: {q(i)}### Assistant: {yes(i)}')), q),
    'HH as demonstrations': (rows(lambda i: dict(text=f'\n\nHuman: {q(i)}\n\nAssistant: {yes(i)}')), q),
    'TRL': (asks(lambda i: dict(prompt=q(i)), 'completion'), q),
    'TRL, chats': (rows(lambda i: dict(prompt=chat(i), completion=[bot(yes(i))])), q),
    'input and output': (asks(lambda i: dict(input=q(i))), q),
    'query and response': (asks(lambda i: dict(query=q(i)), 'response'), q),
    'Question and Answer': (asks(lambda i: dict(Question=q(i)), 'Answer'), q),
    'xP3': (asks(lambda i: dict(inputs=q(i)), 'targets'), q),
    'NuminaMath': (rows(lambda i: dict(source='x', problem=q(i), solution=yes(i), messages=[user(q(i)), bot(yes(i))])), q),
    'content in parts': (
        rows(lambda i: dict(messages=[dict(role='user', content=parts(q(i))), dict(role='assistant', content=parts(yes(i)))])),
        q,
    ),
    'messages as JSON': (rows(lambda i: dict(messages=json.dumps([user(q(i)), bot(yes(i))]))), q),
}


@pytest.mark.parametrize('name', DEMONSTRATIONS)
@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_demonstrations_of_public_forms(tmp_path, name, form):
    from w2s.data.questions import read_asked_file
    given, question = DEMONSTRATIONS[name]
    read = read_asked_file(written(tmp_path/f'x.{form}', given), answers='needed')
    assert read.questions == [question(i) for i in N] and read.answers == [yes(i) for i in N]
    assert len(read.questions) + len(read.refused) == len(given) and all(c in str(read.columns) for c in given[0])


def test_rows_without_an_answer_are_counted(tmp_path):
    from w2s.data.questions import read_asked_file
    read = read_asked_file(
        jsonl(
            tmp_path / 'x.jsonl',
            [*DEMONSTRATIONS['OASST messages'][0], dict(message_id='z', parent_id='gone', text='So.', role='assistant', lang='en')],
        ),
        answers='needed',
    )
    assert len(read.refused) == 5 and {r.reason for r in read.refused} == {'a text is missing (null)'}
    read = read_asked_file(
        jsonl(
            tmp_path / 'y.jsonl',
            [
                dict(messages=[user('Hi'), bot('Ho')]),
                dict(messages=[user('Why?')]),
                dict(messages=[user('So?'), dict(role='assistant', content=None)]),
            ],
        ),
        answers='needed',
    )
    assert read.questions == ['Hi'] and [r.row for r in read.refused] == [2, 3]


SUMS = { # name -> rows, question, working (a part of it), final answer
    'GSM8K': (rows(lambda i: dict(question=q(i), answer=f'So {i}.\n#### {i}')), q, 'So {i}.', '{i}'),
    'MetaMathQA': (
        rows(
            lambda i: dict(type='GSM_Rephrased', query=q(i), original_question=long(i), response=f'So {i}.\n#### {i}\nThe answer is: {i}')
        ),
        q,
        'So {i}.',
        '{i}',
    ),
    'SVAMP': (
        rows(
            lambda i: dict(
                ID=f'chal-{i}',
                Body=f'Ann has {i} shells.',
                Question='How many?',
                Equation=f'( {i} + 0 )',
                Answer=float(i),
                Type='Addition',
                question_concat=f'Ann has {i} shells. How many?',
            )
        ),
        lambda i: f'Ann has {i} shells.\n\nHow many?',
        '{i}',
        '{i}',
    ),
    'OpenMathInstruct': (
        rows(
            lambda i: dict(
                question=q(i),
                expected_answer=str(i),
                predicted_answer=str(i),
                error_message='',
                is_correct=True,
                generation_type='x',
                dataset='gsm8k',
                generated_solution=f'So \\boxed{{{i}}}.',
            )
        ),
        q,
        'So \\boxed',
        '{i}',
    ),
    'OpenMathInstruct-2': (
        rows(lambda i: dict(problem=q(i), generated_solution=f'So \\boxed{{{i}}}.', expected_answer=str(i), problem_source='x')),
        q,
        'So \\boxed',
        '{i}',
    ),
    'AIME': (
        rows(
            lambda i: {
                'ID': f'2024-I-{i}',
                'Year': 2024,
                'Problem Number': i,
                'Problem': q(i),
                'Solution': f'We see that it is {words(6, i)}',
                'Answer': 100 + i,
            }
        ),
        q,
        'We see',
        '10{i}',
    ),
    'AIME, answers alone': (
        rows(lambda i: {'ID': f'2024-I-{i}', 'Year': 2024, 'Question': q(i), 'Answer': 100 + i, 'Part': 'I'}),
        q,
        '10{i}',
        '10{i}',
    ),
    'AQuA': (
        rows(lambda i: dict(question=q(i), options=[f'A){i + 7}', f'B){i}', 'C)99'], rationale=f'So {words(5, i)}', correct='B')),
        lambda i: f'{q(i)}\n(A) {i + 7}\n(B) {i}\n(C) 99',
        'So',
        '{i}',
    ),
    'MathQA': (
        rows(
            lambda i: dict(
                Problem=q(i),
                Rationale=f'So {words(5, i)}',
                options=f'a ) {i + 7} , b ) {i} , c ) 99',
                correct='b',
                annotated_formula='add(1,2)',
                category='general',
            )
        ),
        lambda i: f'{q(i)}\n(A) {i + 7}\n(B) {i}\n(C) 99',
        'So',
        '{i}',
    ),
    'ASDiv': (
        rows(
            lambda i: dict(
                body=f'Ann has {i} shells.', question='How many?', solution_type='Addition', answer=f'{i} (shells)', formula=f'{i}+0={i}'
            )
        ),
        lambda i: f'Ann has {i} shells.\n\nHow many?',
        '{i}',
        '{i}',
    ),
    'MATH': (rows(lambda i: dict(problem=q(i), level='Level 1', type='Algebra', solution=f'So $\\boxed{{{i}}}$.')), q, 'So', '{i}'),
    'MATH-500': (
        rows(
            lambda i: dict(
                problem=q(i), solution=f'So $\\boxed{{{i}}}$.', answer=str(i), subject='Algebra', level=1, unique_id=f'test/{i}.json'
            )
        ),
        q,
        'So',
        '{i}',
    ),
    'NuminaMath': (
        rows(
            lambda i: dict(source='x', problem=q(i), solution=f'So $\\boxed{{{i}}}$.', messages=[user(q(i)), bot(f'So $\\boxed{{{i}}}$.')])
        ),
        q,
        'So',
        '{i}',
    ),
}


@pytest.mark.parametrize('name', SUMS)
@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_sums_of_public_forms(tmp_path, name, form):
    from w2s.data.maths_rows import read_gsm8k
    given, question, working, final = SUMS[name]
    read = read_gsm8k(written(tmp_path/f'x.{form}', given))
    ds = read.splits['all']
    assert not read.refused and ds['prompt'][:] == [f'Q: {question(i)}\nA:' for i in N]
    assert ds['answer'][:] == [final.replace('{i}', str(i)) for i in N] and all(
        working.replace('{i}', str(i)) in c for i, c in zip(N, ds['completion'], strict=True)
    )
    assert all(c in str(read.columns[0]) for c in given[0])


# Labels

def marked(text, label, values, **more):
    return rows(lambda i: {text: words(9, i), label: values[i % len(values)], **{k: f(i) for k, f in more.items()}})


SCORES = dict(severe_toxicity=lambda i: .1, obscene=lambda i: .0, identity_attack=lambda i: .2)
LABELS = { # name -> rows, texts that stand in the prompt, classes, label of each row (class number), columns not read
    'BeaverTails': (
        marked('prompt', 'is_safe', (False, True), response=lambda i: words(12, i), category=lambda i: dict(violence=False)),
        ('prompt', 'response'),
        ('False', 'True'),
        [0, 1, 0, 1],
        'category',
    ),
    'BoolQ': (
        marked('passage', 'answer', (False, True), question=lambda i: q(i)),
        ('passage', 'question'),
        ('False', 'True'),
        [0, 1, 0, 1],
        '',
    ),
    'BoolQ in SuperGLUE': (
        marked('passage', 'label', (0, 1), question=lambda i: q(i), idx=lambda i: i),
        ('passage', 'question'),
        ('False', 'True'),
        [0, 1, 0, 1],
        'idx',
    ),
    'ToxicChat': (
        marked(
            'user_input',
            'toxicity',
            (0, 1),
            conv_id=lambda i: f'{i}',
            model_output=long,
            human_annotation=lambda i: True,
            jailbreaking=lambda i: 0,
            openai_moderation=lambda i: '[["x", 0.1]]',
        ),
        ('user_input',),
        ('0', '1'),
        [0, 1, 0, 1],
        'model_output openai_moderation',
    ),
    'Jigsaw': (
        marked(
            'comment_text',
            'toxic',
            (0, 1),
            id=lambda i: f'{i:016x}',
            severe_toxic=lambda i: 0,
            obscene=lambda i: 0,
            threat=lambda i: 0,
            insult=lambda i: 0,
            identity_hate=lambda i: 0,
        ),
        ('comment_text',),
        ('0', '1'),
        [0, 1, 0, 1],
        'severe_toxic insult',
    ),
    'Jigsaw, unintended bias': (
        marked('comment_text', 'target', (0.0, 0.7, 0.49, 0.5), id=lambda i: i, **SCORES),
        ('comment_text',),
        ('0', '1'),
        [0, 1, 0, 1],
        'severe_toxicity',
    ),
    'CivilComments': (marked('text', 'toxicity', (0.0, 0.7, 0.49, 0.5), **SCORES), ('text',), ('0', '1'), [0, 1, 0, 1], 'obscene'),
    'WildGuard': (
        marked(
            'prompt',
            'prompt_harm_label',
            ('unharmful', 'harmful'),
            adversarial=lambda i: False,
            response=long,
            response_harm_label=lambda i: 'unharmful',
            response_refusal_label=lambda i: 'refusal',
            subcategory=lambda i: 'x',
        ),
        ('prompt',),
        ('harmful', 'unharmful'),
        [1, 0, 1, 0],
        'response response_harm_label',
    ),
    'Aegis 2': (
        marked(
            'prompt',
            'prompt_label',
            ('safe', 'unsafe'),
            id=lambda i: f'{i:032x}',
            response=long,
            response_label=lambda i: 'safe',
            violated_categories=lambda i: 'Violence',
        ),
        ('prompt',),
        ('safe', 'unsafe'),
        [0, 1, 0, 1],
        'response',
    ),
    'Aegis 1': (
        marked(
            'text',
            'labels_0',
            ('Safe', 'Violence', 'Safe', 'Needs Caution'),
            num_annotations=lambda i: 3,
            id=lambda i: f'{i}',
            text_type=lambda i: 'user_message',
            labels_1=lambda i: 'Safe',
            labels_2=lambda i: 'Safe',
        ),
        ('text',),
        ('Safe', 'Unsafe'),
        [0, 1, 0, 1],
        'labels_1',
    ),
    'Amazon polarity': (
        marked('content', 'label', (0, 1), title=lambda i: words(3, i)),
        ('title', 'content'),
        ('0', '1'),
        [0, 1, 0, 1],
        '',
    ),
    'openai/weak-to-strong': (
        marked('txt', 'hard_label', (0, 1), soft_label=lambda i: [0.4, 0.6], gt_label=lambda i: 1, acc=lambda i: True),
        ('txt',),
        ('0', '1'),
        [0, 1, 0, 1],
        'soft_label gt_label',
    ),
    'ANLI': (
        marked('premise', 'label', (0, 1, 2), uid=lambda i: f'{i}', hypothesis=lambda i: words(7, i), reason=long),
        ('premise', 'hypothesis'),
        ('0', '1', '2'),
        [0, 1, 2, 0],
        'reason',
    ),
    'SNLI without a label': (
        marked('premise', 'label', (0, 1, 2, -1), hypothesis=lambda i: words(7, i)),
        ('premise', 'hypothesis'),
        ('0', '1', '2'),
        [0, 1, 2],
        '',
    ),
    'QQP': (
        marked('question1', 'label', (0, 1), question2=lambda i: words(7, i), idx=lambda i: i),
        ('question1', 'question2'),
        ('0', '1'),
        [0, 1, 0, 1],
        'idx',
    ),
    'IMDB': (marked('text', 'label', (0, 1)), ('text',), ('0', '1'), [0, 1, 0, 1], ''),
    'LegalBench, text': (
        marked('text', 'answer', ('No', 'Yes'), index=lambda i: i, document_name=lambda i: f'D{i}.pdf'),
        ('text',),
        ('No', 'Yes'),
        [0, 1, 0, 1],
        'document_name',
    ),
    'LegalBench, consumer_contracts_qa': (
        marked('contract', 'answer', ('No', 'Yes'), index=lambda i: i, question=lambda i: q(i)),
        ('contract', 'question'),
        ('No', 'Yes'),
        [0, 1, 0, 1],
        'index',
    ),
    'LegalBench, citation_prediction_classification': (
        marked('text', 'answer', ('No', 'Yes'), index=lambda i: i, citation=lambda i: f'{i} U.S. {i}'),
        ('text', 'citation'),
        ('No', 'Yes'),
        [0, 1, 0, 1],
        'index',
    ),
    'LegalBench, function_of_decision_section': (
        marked('Paragraph', 'answer', ('Facts', 'Rule'), index=lambda i: i, Citation=lambda i: f'{i} U.S. {i}'),
        ('Paragraph', 'Citation'),
        ('Facts', 'Rule'),
        [0, 1, 0, 1],
        'index',
    ),
    'LegalBench, insurance_policy_interpretation': (
        marked('policy', 'answer', ('No', 'Yes', 'It is ambiguous'), index=lambda i: i, claim=lambda i: words(12, i)),
        ('policy', 'claim'),
        ('It is ambiguous', 'No', 'Yes'),
        [1, 2, 0, 1],
        'index',
    ),
    'LegalBench, privacy_policy_entailment': (
        marked('text', 'answer', ('Incorrect', 'Correct'), index=lambda i: i, description=lambda i: words(9, i + 3)),
        ('text', 'description'),
        ('Correct', 'Incorrect'),
        [1, 0, 1, 0],
        'index',
    ),
    'LegalBench, sara_entailment': (
        rows(
            lambda i: {
                'index': i,
                'statute': words(20, i),
                'description': words(9, i),
                'question': words(7, i),
                'text': words(8, i + 1),
                'case id': f's{i}',
                'answer': ('Contradiction', 'Entailment')[i % 2],
            }
        ),
        ('statute', 'description', 'question', 'text'),
        ('Contradiction', 'Entailment'),
        [0, 1, 0, 1],
        'index',
    ),
    'LegalBench, scalr': (
        rows(lambda i: {'index': i, 'question': words(9, i), **{f'choice_{k}': words(6, i + k) for k in range(5)}, 'answer': i % 3}),
        ('question', 'choice_0', 'choice_4'),
        ('0', '1', '2'),
        [0, 1, 2, 0],
        'index',
    ),
    'LegalBench, diversity': (
        marked('text', 'answer', ('No', 'Yes'), index=lambda i: i, aic_is_met=lambda i: 'No', parties_are_diverse=lambda i: 'Yes'),
        ('text',),
        ('No', 'Yes'),
        [0, 1, 0, 1],
        'aic_is_met parties_are_diverse',
    ),
    'LegalBench, successor_liability': (
        marked('text', 'answer', ('de facto merger', 'express agreement'), index=lambda i: i, issue=lambda i: words(5, i)),
        ('text', 'issue'),
        ('de facto merger', 'express agreement'),
        [0, 1, 0, 1],
        'index',
    ),
}


@pytest.mark.parametrize('name', LABELS)
@pytest.mark.parametrize('form', ['jsonl', 'parquet', 'tsv'])
def test_labels_of_public_forms(tmp_path, name, form):
    from w2s.data.label_readers import read_labels
    given, texts, classes, labels, unread = LABELS[name]
    path = tmp_path/f'x.{form}'
    if form == 'tsv': pd.DataFrame(given).to_csv(path, sep='\t', index=False)
    else: written(path, given)
    read = read_labels(path)
    ds = read.splits['all']
    assert read.classes == classes and ds['label'][:] == labels and len(ds) + len(read.refused) == len(given)
    for r, p in zip(given, ds['prompt'], strict=False): assert all(r[t] in p for t in texts)
    line = str(read.columns[0])
    assert all(c in line for c in given[0]) and all(c in line.split('not read')[1] for c in unread.split())


CHOICES = { # name -> rows; the right answer is yes(i)
    'SciQ': rows(
        lambda i: dict(
            question=q(i), distractor3='Never.', distractor1=no(i), distractor2='Perhaps.', correct_answer=yes(i), support=long(i)
        )
    ),
    'CosmosQA': rows(
        lambda i: dict(
            id=f'{i}', context=words(30, i), question=q(i), answer0=no(i), answer1=yes(i), answer2='Never.', answer3='Perhaps.', label=1
        )
    ),
    'RACE': rows(
        lambda i: dict(example_id=f'{i}', article=words(30, i), question=q(i), options=[no(i), yes(i), 'Never.', 'Perhaps.'], answer='B')
    ),
    'MMLU': rows(lambda i: dict(question=q(i), subject='x', choices=[no(i), yes(i), 'Never.', 'Perhaps.'], answer=1)),
    'ARC': rows(
        lambda i: dict(id=f'{i}', question=q(i), choices=dict(text=[no(i), yes(i), 'Never.'], label=['A', 'B', 'C']), answerKey='B')
    ),
    'OpenBookQA': rows(
        lambda i: dict(id=f'{i}', question_stem=q(i), choices=dict(text=[no(i), yes(i), 'Never.'], label=['A', 'B', 'C']), answerKey='B')
    ),
    'PIQA': rows(lambda i: dict(goal=q(i), sol1=no(i), sol2=yes(i), label=1)),
    'HellaSwag': rows(lambda i: dict(ind=i, ctx=q(i), endings=[no(i), yes(i), 'Never.'], label='1')),
}


@pytest.mark.parametrize('name', CHOICES)
@pytest.mark.parametrize('form', ['jsonl', 'parquet'])
def test_questions_with_right_and_wrong_answers(tmp_path, name, form):
    from w2s.data.label_readers import read_labels
    given = [
        r
        for k in range(5)
        for r in [
            {c: v.replace('?', '?' * (k + 1)) if c in ('question', 'question_stem', 'goal', 'ctx') else v for c, v in r.items()}
            for r in CHOICES[name]
        ]
    ]
    read = read_labels(written(tmp_path/f'x.{form}', given))
    ds = read.splits['all']
    assert read.classes == ('right', 'wrong') and len(ds) == len(given) and set(ds['label']) == {0, 1}
    for i, (p, y) in enumerate(zip(ds['prompt'], ds['label'], strict=True)):
        assert q(i % 4) in p and (yes(i % 4) in p) == (y == 0) and p.endswith('Is the answer right?')
        assert 'context' not in given[0] or given[i]['context'] in p
    half = read_labels(written(tmp_path/f'y.{form}', given[10:])).splits['all']
    assert half['prompt'][:] == ds['prompt'][10:] and half['label'][:] == ds['label'][10:]


@pytest.mark.parametrize('cell', [-1, None, 'None', 'nan', 'NA', 'null'], ids=repr)
def test_a_label_that_says_nothing_is_counted(tmp_path, cell):
    from w2s.data.label_readers import read_labels
    read = read_labels(
        jsonl(
            tmp_path / 'x.jsonl',
            [dict(text=words(5, i), label=str(i % 2) if isinstance(cell, str) else i % 2) for i in range(6)]
            + [dict(text='Why?', label=cell)],
        )
    )
    assert read.classes == ('0', '1') and [r.row for r in read.refused] == [7] and ('-1' in read.refused[0].reason) == (cell == -1)
    if cell is not None: assert str(cell) in read_labels(tmp_path/'x.jsonl', classes=('0', '1', str(cell))).classes


def test_minus_one_is_a_class_beside_one(tmp_path):
    from w2s.data.label_readers import read_labels
    assert read_labels(jsonl(tmp_path/'x.jsonl', [dict(text=words(5, i), label=1 - 2 * (i % 2)) for i in range(6)])).classes == ('-1', '1')


def test_a_threshold_makes_classes_of_scores(tmp_path):
    from w2s.data.label_readers import read_labels
    path = jsonl(tmp_path/'x.jsonl', marked('text', 'score', (.1, .2, .3, .4)))
    read = read_labels(path, label='score', threshold=.3)
    assert read.splits['all']['label'][:] == [0, 0, 1, 1] and 'score (1 from 0.3 on)' in str(read.columns[0])
    civil = jsonl(tmp_path/'y.jsonl', LABELS['CivilComments'][0])
    assert 'toxicity (1 from 0.5 on)' in str(read_labels(civil).columns[0]) and read_labels(civil, threshold=0.6).splits['all']['label'][
        :
    ] == [0, 1, 0, 0]


def test_a_file_with_one_class_has_a_clear_word(tmp_path):
    from w2s.data.label_readers import read_labels
    with pytest.raises(DataError, match=r"the labels hold 'A'; two classes are needed"):
        read_labels(jsonl(tmp_path / 'train.jsonl', marked('text', 'answer', ('A',), index=lambda i: i)))


# Pairs to be labelled: the order says nothing, whatever a human said

CHOSEN_BY = (
    'labels',
    'better_response_id',
    'safer_response_id',
    'preference_strength',
    'overall_preference',
    'winner',
    'preference',
    'score_0',
    'score_1',
    'winner_model_a',
    'winner_model_b',
    'winner_tie',
    'choice',
    'label',
)


@pytest.mark.parametrize('name', PREFERENCES)
def test_pairs_of_public_forms_are_labelled_blind(tmp_path, name):
    from w2s.files.label_rows import pairs_to_label
    given, prompt, _ = PREFERENCES[name]
    read = pairs_to_label(str(jsonl(tmp_path/'x.jsonl', given)))
    assert sorted(
        (json.dumps(p), *sorted((a.strip(), b.strip())))
        for p, a, b in zip(read.rows['prompt'], read.rows['chosen'], read.rows['rejected'], strict=True)
    ) == sorted((json.dumps(prompt(i)), *sorted((yes(i), no(i)))) for i in N)
    assert all(g == float(c.strip().startswith('Yes')) for g, c in zip(read.rows['gold'], read.rows['chosen'], strict=True)) and set(
        read.rows['prob']
    ) == {1.0}
    line = str(read.columns)
    assert all(c in line for c in given[0])
    if {
        'labels',
        'winner',
        'preference',
        'better_response_id',
        'preference_strength',
        'overall_preference',
        'score_0',
        'winner_tie',
        'choice',
    } & set(given[0]) or name == 'JudgeBench':
        assert 'said by people, only compared with' in line
        bare = [{k: v for k, v in r.items() if k not in CHOSEN_BY} for r in given]
        without = pairs_to_label(str(jsonl(tmp_path/'y.jsonl', bare)))
        assert without.rows['chosen'][:] == read.rows['chosen'][:] and all(g != g for g in without.rows['gold'])
