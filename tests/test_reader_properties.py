"What comes into a reader comes out, or is counted: any texts, in any order, in any file"
import json
import tempfile
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from w2s.data.label_readers import read_labels
from w2s.data.questions import read_asked_file
from w2s.data.readers import read_preferences
from w2s.errors import DataError

FEW = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
TEXT = st.text(st.characters(exclude_categories=('Cs',), exclude_characters='\x00\r'), max_size=30)
WORDS = st.text('abc xyz.,;"\t\n\\\'#:é漢🙂', min_size=1, max_size=30)
SAID = st.one_of(TEXT, WORDS)
FORMS = st.sampled_from(['jsonl', 'json', 'csv', 'tsv', 'parquet'])
JUNK = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), TEXT),
    lambda x: st.one_of(st.lists(x, max_size=2), st.dictionaries(st.text('ab', min_size=1, max_size=2), x, max_size=2)),
    max_leaves=4,
)


def write(folder, form, rows):
    "The same rows in any of the files that are read"
    path = Path(folder)/f'x.{form}'
    if form == 'jsonl': path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    elif form == 'json': path.write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
    elif form == 'parquet': pq.write_table(pa.Table.from_pylist(rows), path)
    else: pd.DataFrame(rows).to_csv(path, index=False, sep='\t' if form == 'tsv' else ',', lineterminator='\n')
    return path


def messages(*texts): return [dict(role=('user', 'assistant')[i % 2], content=t) for i, t in enumerate(texts)]


def counted(read, n, split='all'):
    "Every row is there or refused, once"
    refused = [r.row for r in read.refused]
    assert len(set(refused)) == len(refused) and all(1 <= r <= n for r in refused) and len(read.splits[split]) + len(refused) == n
    return [i for i in range(n) if i + 1 not in refused]


@FEW
@given(st.lists(st.tuples(SAID, SAID, SAID), min_size=1, max_size=6), FORMS)
def test_texts_of_preferences(rows, form):
    rows = [(f'Q{i} {p}', f'A {a}', f'B {b}') for i, (p, a, b) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        read = read_preferences(write(folder, form, [dict(prompt=p, chosen=a, rejected=b) for p, a, b in rows]))
    kept, ds = counted(read, len(rows)), read.splits['all']
    assert list(zip(ds['prompt'], ds['chosen'], ds['rejected'], strict=True)) == [rows[i] for i in kept] and kept == list(range(len(rows)))


@FEW
@given(
    st.lists(st.tuples(SAID, SAID, SAID, st.sampled_from(['a', 'b', 'tie', None])), min_size=1, max_size=6),
    st.sampled_from(['jsonl', 'json', 'parquet']),
)
def test_pairs_with_a_label(rows, form):
    rows = [(f'Q{i} {p}', f'A {a}', f'B {b}', w) for i, (p, a, b, w) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, form, [dict(prompt=p, response_a=a, response_b=b, winner=w) for p, a, b, w in rows])
        if not any(w for *_, w in rows) and form != 'parquet': return
        read = read_preferences(path)
    kept, ds = counted(read, len(rows)), read.splits['all']
    assert kept == [i for i, (*_, w) in enumerate(rows) if w in ('a', 'b')]
    for i, p, c, r in zip(kept, ds['prompt'], ds['chosen'], ds['rejected'], strict=True):
        q, a, b, w = rows[i]
        assert (p, c, r) == ((q, a, b) if w == 'a' else (q, b, a))


@FEW
@given(
    st.lists(st.tuples(SAID, SAID, SAID), min_size=1, max_size=5),
    st.sampled_from(['role', 'from', 'parts', 'json', 'object']),
    st.booleans(),
)
def test_messages_in_every_spelling(rows, spelling, beside):
    rows = [(f'Q{i} {p}', f'A {a}', f'B {b}') for i, (p, a, b) in enumerate(rows)]
    spell = {
        'role': lambda m: m,
        'from': lambda m: [{'from': dict(user='human', assistant='gpt')[x['role']], 'value': x['content']} for x in m],
        'json': json.dumps,
        'parts': lambda m: [x | dict(content=[dict(type='text', text=x['content'])]) for x in m],
        'object': lambda m: dict(messages=m),
    }[spelling]
    def row(p, a, b):
        return (
            dict(
                prompt=spell(messages(p)),
                chosen=spell([dict(role='assistant', content=a)]),
                rejected=spell([dict(role='assistant', content=b)]),
            )
            if beside
            else dict(chosen=spell(messages(p, a)), rejected=spell(messages(p, b)))
        )
    with tempfile.TemporaryDirectory() as folder: read = read_preferences(write(folder, 'jsonl', [row(*r) for r in rows]))
    kept, ds = counted(read, len(rows)), read.splits['all']
    assert kept == list(range(len(rows))) and list(zip(ds['prompt'], ds['chosen'], ds['rejected'], strict=True)) == [
        (messages(p), a, b) for p, a, b in rows
    ]


@FEW
@given(st.lists(st.tuples(st.integers(0, 3), SAID, st.booleans()), min_size=1, max_size=12))
def test_single_responses_make_pairs_or_are_counted(rows):
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, 'jsonl', [dict(prompt=f'Q{q}', completion=f'{i} {t}', label=good) for i, (q, t, good) in enumerate(rows)])
        groups = {q: [sum(g for p, _, g in rows if p == q), sum(not g for p, _, g in rows if p == q)] for q in range(4)}
        wanted = sum(min(n) for n in groups.values())
        if not wanted:
            with pytest.raises(DataError, match='no prompt has a good and a bad one'): read_preferences(path)
            return
        read = read_preferences(path)
    counted(read, len(rows))
    ds = read.splits['all']
    assert len(ds) == wanted
    for p, c, r in zip(ds['prompt'], ds['chosen'], ds['rejected'], strict=True):
        good, bad = (rows[int(t.split()[0])] for t in (c, r))
        assert (
            good[2]
            and not bad[2]
            and p == f'Q{good[0]}' == f'Q{bad[0]}'
            and (c, r) == (f'{c.split()[0]} {good[1]}', f'{r.split()[0]} {bad[1]}')
        )


@FEW
@given(st.lists(st.tuples(SAID, st.sampled_from(['no', 'yes', None, 'nan'])), min_size=2, max_size=8), FORMS, JUNK)
def test_labels_and_a_column_that_nobody_reads(rows, form, junk):
    rows = [('T first', 'no'), ('T second', 'yes'), *((f'T{i} {t}', y) for i, (t, y) in enumerate(rows))]
    given_rows = [
        dict(text=t, label=y) | (dict(meta=junk if i % 2 else i) if form.startswith('json') else {}) for i, (t, y) in enumerate(rows)
    ]
    with tempfile.TemporaryDirectory() as folder:
        read = read_labels(write(folder, form, given_rows), leave_out=['meta'] if form.startswith('json') else [])
    kept, ds = counted(read, len(rows)), read.splits['all']
    assert kept == [i for i, (_, y) in enumerate(rows) if y in ('no', 'yes')]
    assert [(p, read.classes[y]) for p, y in zip(ds['prompt'], ds['label'], strict=True)] == [
        (rows[i][0].strip(), rows[i][1]) for i in kept
    ]


@FEW
@given(st.lists(st.tuples(st.integers(0, 4), SAID, st.one_of(SAID, st.none())), min_size=1, max_size=8), st.booleans())
def test_questions_come_once_or_are_counted(rows, chats):
    rows = [('Q9', 'A9', 'A9'), *((f'Q{q} {p}', p, a) for q, p, a in rows)]
    with tempfile.TemporaryDirectory() as folder:
        read = read_asked_file(
            write(
                folder,
                'jsonl',
                [
                    dict(messages=messages(q, a))
                    if chats and a is not None
                    else dict(messages=messages(q))
                    if chats
                    else dict(question=q, answer=a)
                    for q, _, a in rows
                ],
            ),
            answers='needed',
        )
    assert len(read.questions) + len(read.refused) + len(read.repeated) == len(rows)
    good = [(q.strip() if chats else q, a) for q, _, a in rows if a is not None and a.strip()]
    assert dict(zip(read.questions, read.answers, strict=True)) == {q: a for q, a in reversed(good)} and len(set(read.questions)) == len(
        read.questions
    )
