"Files that are cut, flipped, nested, packed or misnamed: read, or said in one sentence with the file; never another exception"
import gzip
import itertools
import json
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.data.label_readers import read_labels
from w2s.data.maths_rows import read_gsm8k
from w2s.data.readers import read_preferences
from w2s.data.tables import read_table
from w2s.data.toxicity_rows import read_prompts, read_toxicity
from w2s.errors import ConfigError, DataError
from w2s.feedback.demonstrators import read_questions

ROOT = Path(__file__).parents[1]
GOOD = [dict(prompt=f'What is number {i}?', chosen=f'It is {i}.', rejected='I do not know.') for i in range(6)]
READERS = dict(
    table=read_table,
    preferences=read_preferences,
    labels=read_labels,
    questions=read_questions,
    maths=read_gsm8k,
    toxicity=read_toxicity,
    prompts=read_prompts,
)


def said(read, path, *parts):
    "A reader refuses a file in one sentence that names it and holds these words"
    with pytest.raises(DataError) as e: read(path)
    text = str(e.value)
    assert Path(path).name in text and '\n' not in text and 'Traceback' not in text and all(p in text for p in parts), text
    return text


def write(path, data):
    data = data.encode('utf-8', 'surrogatepass') if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix == '.gz' else data)
    return path


def lines(*rows): return ''.join(json.dumps(r) + '\n' for r in rows)


# Half characters

HALVES = {
    'high alone': '\\ud83d',
    'low alone': '\\ude00',
    'the wrong way round': '\\ude00\\ud83d',
    'at the start': '\\udc00 text',
    'two': '\\ud83d and \\ud83d',
    'upper case': '\\uD83D',
}


@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'x.jsonl.gz'])
@pytest.mark.parametrize('half', HALVES.values(), ids=HALVES.keys())
def test_half_a_character_becomes_one_and_is_counted(tmp_path, name, half):
    rows = [json.dumps(r) for r in GOOD]
    rows[2] = '{"prompt": "What is it?", "chosen": "Fine %s", "rejected": "Not."}' % half
    text = '[' + ',\n'.join(rows) + ']' if name == 'x.json' else '\n'.join(rows)
    read = read_preferences(write(tmp_path/name, text))
    chosen = read.splits['all']['chosen'][:]
    assert '\ufffd' in chosen[2] and chosen[2].startswith('Fine') and chosen[1] == 'It is 1.'
    from w2s.data.hygiene import clean_text
    _, report = clean_text(read.splits, read.refused, read.rows_read, columns=read.columns)
    line = report.found[report.found['check'].str.contains('half a character')]
    assert line[['rows', 'of', 'action', 'detail']].to_numpy().tolist() == [[1, 6, 'changed', 'row 3']]


@pytest.mark.parametrize('where', ['in a message', 'in a column that is not read', 'in the name of a column', 'in the name of a key'])
def test_half_a_character_anywhere(tmp_path, where):
    user, yes, no = ({'role': r, 'content': c} for r, c in (('user', 'Is it so?'), ('assistant', 'Yes \ud83d'), ('assistant', 'No')))
    row = (
        dict(chosen=[user, yes], rejected=[user, no])
        if where == 'in a message'
        else dict(GOOD[0])
        | (
            dict(note='\ud83d')
            if where == 'in a column that is not read'
            else {'a\ud83d': 1}
            if where == 'in the name of a column'
            else dict(meta={'k\ud83d': 1})
        )
    )
    read = read_preferences(write(tmp_path/'x.jsonl', lines(row, row)))
    assert len(read.splits['all']) == 2
    assert bool(read.columns[0].changed) == (where == 'in a message') # what nobody reads was not changed for anybody


# Large numbers

NUMBERS = {
    'over 64 bits': 2**64,
    'just over': 2**63,
    'unsigned': 2**64 - 1,
    'negative': -(2**63) - 1,
    '25 digits': 10**24,
    '5,000 digits': None,
}


def digits(n): return '9' * 5000 if n is None else str(n)


@pytest.mark.parametrize('number', NUMBERS.values(), ids=NUMBERS.keys())
@pytest.mark.parametrize('place', ['every row', 'one row', 'in an object'])
def test_large_numbers_nobody_asks_for(tmp_path, number, place):
    def cell(i): return digits(number) if place != 'one row' or i == 3 else str(i)
    rows = [json.dumps(r)[:-1] + (', "id": %s}' if place != 'in an object' else ', "id": {"n": %s}}') % cell(i) for i, r in enumerate(GOOD)]
    assert len(read_preferences(write(tmp_path/'x.jsonl', '\n'.join(rows))).splits['all']) == 6


def test_large_numbers_that_somebody_asks_for(tmp_path):
    "As a label every one of them is a class of its own; among smaller ones they are said with their row"
    rows = ['{"text": "number %d", "label": %d}' % (i, 10**25 + i % 2) for i in range(6)]
    assert read_labels(write(tmp_path/'x.jsonl', '\n'.join(rows))).classes == (str(10**25), str(10**25 + 1))
    mixed = ['{"text": "a", "label": 1}', '{"text": "b", "label": %s}' % digits(None)]
    said(read_labels, write(tmp_path/'y.jsonl', '\n'.join(mixed)), 'row 2', '"label"', 'number of 5000 digits')
    said(
        read_preferences,
        write(tmp_path / 'z.jsonl', lines(GOOD[0] | dict(weight=1.0)) + json.dumps(GOOD[1])[:-1] + ', "weight": %s}\n' % digits(None)),
        '"weight"',
    )


# Depth

@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'x.json.gz'])
@pytest.mark.parametrize('opening, closing', [('[', ']'), ('{"a":', '}'), ('[{"a":', '}]')], ids=['lists', 'objects', 'both'])
@pytest.mark.parametrize('depth', [100_000, 2000])
def test_too_deep(tmp_path, name, opening, closing, depth):
    cell = opening * depth + '1' + closing * depth
    text = '{"prompt": "a", "chosen": "b", "rejected": "c", "meta": %s}' % cell
    said(read_preferences, write(tmp_path/name, f'[{text}]' if '.json' in name and 'l' not in name.split('.')[1][-1] else text), 'too deep')


@pytest.mark.parametrize('depth', [40, 150, 300])
def test_depth_that_json_allows_in_a_column_that_nobody_reads(tmp_path, depth):
    deep = json.loads('[' * depth + ']' * depth)
    assert len(read_preferences(write(tmp_path/'x.jsonl', lines(*(r | dict(meta=deep) for r in GOOD)))).splits['all']) == 6


# Keys that are there twice

@pytest.mark.parametrize(
    'line',
    [
        '{"prompt": "a", "chosen": "b", "chosen": "c", "rejected": "d"}',
        '{"prompt": "a", "prompt": "a", "chosen": "b", "rejected": "d"}',
        '{"chosen": [{"role": "user", "role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]}',
        '{"prompt": "a", "chosen": "b", "rejected": "d", "meta": {"k": 1, "k": 2}}',
    ],
    ids=['a response', 'the same value', 'in a message', 'in an object'],
)
@pytest.mark.parametrize('name', ['x.jsonl', 'x.json'])
def test_a_key_twice(tmp_path, line, name):
    text = lines(GOOD[0]) + line if name == 'x.jsonl' else f'[{json.dumps(GOOD[0])},\n{line}]'
    said(read_preferences, write(tmp_path/name, text), 'line 2', 'twice')


# Columns of several types

MIXED = {
    'text and number': ['a', 1],
    'number and text': [1, 'a'],
    'list and text': [['a'], 'a'],
    'object and text': [{'k': 1}, 'a'],
    'truth and number': [True, 1],
    'number and truth': [1, True],
    'truth and text': [True, 'yes'],
    'lists of several types': [[1], ['a']],
    'objects of several types': [{'k': 1}, {'k': 'a'}],
    'list and object': [[1], {'k': 1}],
    'null first': [None, 'a', 1],
    'one list of several types': [[1, 'a'], [2]],
    'large and fraction': [2**60, 0.5],
}


@pytest.mark.parametrize('cells', MIXED.values(), ids=MIXED.keys())
@pytest.mark.parametrize('name', ['x.jsonl', 'x.json'])
def test_a_column_of_several_types_stops_nobody_who_does_not_read_it(tmp_path, cells, name):
    rows = [GOOD[i] | dict(meta=c) for i, c in enumerate(cells)]
    read = read_preferences(write(tmp_path/name, lines(*rows) if name == 'x.jsonl' else json.dumps(rows)))
    assert read.splits['all']['chosen'][:] == [r['chosen'] for r in rows] and 'meta' in str(read.columns[0])


@pytest.mark.parametrize('cells', [['b', 1], ['b', ['c']], [['b'], 'c'], ['b', {'k': 1}], ['b', True]], ids=str)
def test_a_column_of_several_types_is_said_where_it_is_read(tmp_path, cells):
    rows = [GOOD[i] | dict(chosen=c) for i, c in enumerate(cells)]
    said(read_preferences, write(tmp_path/'x.jsonl', lines(*rows)), 'row 2', '"chosen"')
    said(read_table, tmp_path/'x.jsonl', 'row 2', '"chosen"')
    words = [dict(text=f't{i}', label=c) for i, c in enumerate(cells)]
    said(read_labels, write(tmp_path/'y.jsonl', lines(*words)), 'row 2', '"label"')


def test_types_that_change_late_in_a_long_file(tmp_path):
    "Columns grow by pieces of some thousand rows"
    rows = [
        dict(prompt=f'q {i}', chosen='a', rejected='b', n=i, meta='x' if i == 4500 else None, tags=[] if i < 4000 else ['t'])
        for i in range(5000)
    ]
    rows[4700]['n'], rows[4800]['late'] = .5, 1
    read = read_preferences(write(tmp_path/'x.jsonl', lines(*rows)))
    assert len(read.splits['all']) == 5000
    table = read_table(tmp_path/'x.jsonl')
    assert (
        table['n'][4700] == 0.5
        and table['late'][4800] == 1
        and table['late'][0] is None
        and table['tags'][4500] == ['t']
        and table['meta'][4500] == 'x'
    )
    rows[4900]['chosen'] = 3
    said(read_preferences, write(tmp_path/'y.jsonl', lines(*rows)), 'row 4901', '"chosen"')


# One object, not rows

FRAMES = {
    'columns': {'prompt': {'0': 'a', '1': 'b'}, 'chosen': {'0': 'c', '1': 'd'}, 'rejected': {'0': 'e', '1': 'f'}},
    'split': {'columns': ['prompt', 'chosen', 'rejected'], 'index': [0, 1], 'data': [['a', 'c', 'e'], ['b', 'd', 'f']]},
    'index': {'0': {'prompt': 'a', 'chosen': 'c', 'rejected': 'e'}, '1': {'prompt': 'b', 'chosen': 'd', 'rejected': 'f'}},
    'lists': {'prompt': ['a', 'b'], 'chosen': ['c', 'd'], 'rejected': ['e', 'f']},
}


@pytest.mark.parametrize('frame', FRAMES)
@pytest.mark.parametrize('indent', [None, 1])
def test_a_data_frame_as_one_object_is_read(tmp_path, frame, indent):
    ds = read_preferences(write(tmp_path/'x.json', json.dumps(FRAMES[frame], indent=indent))).splits['all']
    assert [ds[c][:] for c in ('prompt', 'chosen', 'rejected')] == [['a', 'b'], ['c', 'd'], ['e', 'f']]


@pytest.mark.parametrize(
    'whole',
    [
        {'prompt': {'0': 'a'}, 'chosen': {'1': 'b'}},
        {'columns': ['prompt'], 'index': [0], 'data': [['a', 'b']]},
        {'prompt': ['a', 'b'], 'chosen': ['c', 'd', 'e']},
        {'train': [{'prompt': 'a'}], 'test': [{'prompt': 'b'}]},
        {},
        {'version': 1},
    ],
    ids=['columns', 'split', 'lists', 'two tables', 'empty', 'no list'],
)
@pytest.mark.parametrize('name, indent', [('x.json', 1), ('x.jsonl', 1)])
def test_an_object_is_said_with_its_keys(tmp_path, whole, name, indent):
    text = json.dumps(whole, indent=indent)
    if not whole: text = '{\n}'
    said(read_preferences, write(tmp_path/name, text), 'one object, not a list of rows', *list(whole)[:1])


@pytest.mark.parametrize('indent', [None, 1])
@pytest.mark.parametrize('name', ['x.json', 'x.json.gz', 'x.jsonl'])
def test_rows_inside_an_object_are_read_and_said(tmp_path, indent, name):
    read = read_preferences(write(tmp_path/name, json.dumps(dict(version='1.1', rows=GOOD, note=['a']), indent=indent)))
    assert len(read.splits['all']) == 6 and 'rows of "rows"' in str(read.columns[0])


def test_one_row_is_no_object_around_rows(tmp_path):
    user, yes, no = ({'role': r, 'content': c} for r, c in (('user', 'Is it so?'), ('assistant', 'Yes'), ('assistant', 'No')))
    for row in (GOOD[0], dict(chosen=[user, yes], rejected=[user, no]), dict(prompt='Is it so?', chosen='Yes', rejected=[no])):
        try: assert len(read_preferences(write(tmp_path/'x.jsonl', lines(row))).splits['all']) <= 1
        except DataError as e: assert 'one object' not in str(e)


# Archives

PACKED = {
    'x.jsonl.gz': lines(*GOOD).encode(),
    'x.json.gz': json.dumps(GOOD).encode(),
    'x.csv.gz': pd.DataFrame(GOOD).to_csv(index=False).encode(),
}


@pytest.mark.parametrize('name', PACKED)
def test_flipped_and_cut_archives(tmp_path, name):
    "Every byte flipped, and every length: the same rows (a byte of the header that says nothing), or one sentence"
    whole = gzip.compress(PACKED[name], mtime=0)
    bad = 0
    for i, mask in itertools.product(range(len(whole)), (1, 255)):
        (tmp_path/name).write_bytes(whole[:i] + bytes([whole[i] ^ mask]) + whole[i + 1:])
        try: assert read_table(tmp_path/name).to_list() == GOOD
        except DataError as e:
            bad += 1
            assert name in str(e) and '\n' not in str(e)
    assert bad > 1.5 * (len(whole) - 18)
    for n in range(1, len(whole)):
        (tmp_path/name).write_bytes(whole[:n])
        said(read_table, tmp_path/name)


@pytest.mark.parametrize('name', [*PACKED, 'x.parquet.gz'])
@pytest.mark.parametrize(
    'data', [b'', b'plain', b'\x1f\x8b', b'PK\x03\x04' * 9, zlib.compress(b'{"a": 1}')], ids=['empty', 'plain', 'two bytes', 'zip', 'zlib']
)
def test_what_is_no_archive(tmp_path, name, data):
    (tmp_path/name).write_bytes(data)
    said(read_table, tmp_path/name)


PEAK = '''
import resource
def peak(): # in MB; ru_maxrss would count the process that started this one
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1]) / 1024
'''
BOMB = PEAK + '''
from w2s.data.tables import read_table
from w2s.errors import DataError
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
before = peak()
try: read_table({path!r})
except DataError as e: print(e)
print(peak() - before)
'''


NEEDS_PROC = pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='needs /proc')


@pytest.mark.cases(2)
@NEEDS_PROC
@pytest.mark.parametrize(
    'name, unit',
    [('x.jsonl.gz', b'\x00'), ('x.jsonl.gz', b' ' * 999 + b'\n'), ('x.json.gz', b'[' + b' ' * 99), ('x.csv.gz', b'a' * 999 + b',b\n')],
    ids=['zeros', 'lines', 'list', 'csv'],
)
def test_an_archive_that_unpacks_to_too_much(tmp_path, name, unit):
    "Half a megabyte on disk, half a gigabyte unpacked: stopped at the bound, in less memory than that"
    with gzip.open(tmp_path/name, 'wb', compresslevel=6) as f:
        for _ in range(512): f.write((unit * (2**20 // len(unit) + 1))[:2**20])
    assert (tmp_path/name).stat().st_size < 2 * 2**20
    code = BOMB.format(path=str(tmp_path/name))
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    *told, used = done.stdout.splitlines() or ['', '0']
    assert done.returncode == 0 and 'unpacks to more than' in told[0] and float(used) < 300, (done.stdout, done.stderr[-500:])


@NEEDS_PROC
def test_a_table_that_unpacks_to_too_much(tmp_path):
    "A dictionary of one long text, a million times: kilobytes in Parquet"
    text = pa.array(['x' * 2_000_000])
    pq.write_table(
        pa.table({'prompt': pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), text)}),
        tmp_path / 'x.parquet',
        store_schema=False,
        compression='zstd',
    )
    assert (tmp_path/'x.parquet').stat().st_size < 2**20
    code = BOMB.format(path=str(tmp_path/'x.parquet'))
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and ('unpacks to more than' in done.stdout or 'does not fit into memory' in done.stdout), (
        done.stdout,
        done.stderr[-500:],
    )


def test_ordinary_rows_are_far_from_the_bound(tmp_path):
    rows = [dict(GOOD[0], prompt='The same long instruction, again and again. ' * 50, chosen=f'{i}') for i in range(3000)]
    assert len(read_table(write(tmp_path/'x.jsonl.gz', lines(*rows)))) == 3000


# Parquet

def test_flipped_and_cut_parquet(tmp_path):
    "A byte flipped anywhere: read, or one sentence; cells can always be looked at"
    rows = [r | dict(n=i, tags=['a', f'{i}'], label=i % 2) for i, r in enumerate(GOOD)]
    pd.DataFrame(rows).to_parquet(tmp_path/'a.parquet')
    whole = (tmp_path/'a.parquet').read_bytes()
    for i in range(0, len(whole), 5):
        (tmp_path/'x.parquet').write_bytes(whole[:i] + bytes([whole[i] ^ 128]) + whole[i + 1:])
        try: read_preferences(tmp_path/'x.parquet').splits['all'][:]
        except DataError as e: assert 'x.parquet' in str(e)
    for n in range(0, len(whole), 97):
        (tmp_path/'x.parquet').write_bytes(whole[:n])
        said(read_table, tmp_path/'x.parquet')


def odd_columns():
    text = pa.array([b'ok', b'caf\xe9', b'ok', b'ok', b'ok', b'ok']).view(pa.binary())
    return {
        'categories': pd.Categorical(['a', 'b'] * 3),
        'not UTF-8': pa.StringArray.from_buffers(6, *text.buffers()[1:]),
        'durations': pa.array([1] * 6, pa.duration('s')),
        'halves': pa.array([0.5] * 6, pa.float32()).cast(pa.float16()),
        'decimals': pa.array(['1.5'] * 6).cast(pa.decimal128(4, 2)),
        'times': pa.array([0] * 6, pa.timestamp('us')),
        'bytes': pa.array([b'\xff'] * 6),
        'large text': pa.array(['a'] * 6, pa.large_string()),
        'a map': pa.array([[('k', 1)]] * 6, pa.map_(pa.string(), pa.int64())),
    }


@pytest.mark.parametrize('kind', odd_columns())
def test_odd_columns_of_parquet_stop_nobody(tmp_path, kind):
    column = odd_columns()[kind]
    table = (
        pa.Table.from_pandas(pd.DataFrame(GOOD).assign(odd=column))
        if kind == 'categories'
        else pa.table({**{c: [r[c] for r in GOOD] for c in GOOD[0]}, 'odd': column})
    )
    pq.write_table(table, tmp_path/'x.parquet')
    assert read_preferences(tmp_path/'x.parquet').splits['all']['chosen'][:] == [r['chosen'] for r in GOOD]


def test_categories_are_what_they_say(tmp_path):
    pd.DataFrame(dict(text=[f't {i}' for i in range(6)], label=pd.Categorical(['no', 'yes'] * 3))).to_parquet(tmp_path/'x.parquet')
    assert read_labels(tmp_path/'x.parquet').classes == ('no', 'yes')


def test_broken_columns_of_parquet_are_said_where_they_are_read(tmp_path):
    bad = odd_columns()['not UTF-8']
    pq.write_table(pa.table({'prompt': [r['prompt'] for r in GOOD], 'chosen': bad, 'rejected': ['b'] * 6}), tmp_path/'x.parquet')
    said(read_preferences, tmp_path/'x.parquet', '"chosen"')
    pq.write_table(pa.Table.from_arrays([pa.array(['a'])] * 2, names=['prompt', 'prompt']), tmp_path/'y.parquet')
    said(read_table, tmp_path/'y.parquet', 'two columns have one name')


@pytest.mark.parametrize(
    'cells',
    [[b'a'] * 6, [pd.Timestamp(0)] * 6, [1.5] * 6, [[1]] * 6, [{'k': 1}] * 6],
    ids=['bytes', 'times', 'numbers', 'lists', 'objects'],
)
@pytest.mark.parametrize('column', ['prompt', 'chosen'])
def test_columns_of_another_type_than_text_are_said(tmp_path, cells, column):
    pd.DataFrame(GOOD).assign(**{column: cells}).to_parquet(tmp_path/'x.parquet')
    try: assert len(read_preferences(tmp_path/'x.parquet').splits['all']) == 0 # each row was refused with its reason
    except DataError as e: assert column in str(e) and 'row 1' in str(e)


# Names

NOWHERE = {
    'empty': '',
    'a space': ' ',
    'too long': 'x' * 5000,
    'with a zero': 'a\x00b.jsonl',
    'a folder that is not there': 'no/such/folder/x.jsonl',
    'a device': '/dev/null',
}


@pytest.mark.parametrize('reader', READERS)
@pytest.mark.parametrize('name', NOWHERE.values(), ids=NOWHERE.keys())
def test_names_that_are_no_files(reader, name, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    with pytest.raises(DataError) as e: READERS[reader](name)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('reader', READERS)
def test_a_folder_without_rows(tmp_path, reader, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'LICENSE').write_text('free')
    with pytest.raises(DataError): READERS[reader](tmp_path/'folder')
    with pytest.raises(DataError): READERS[reader](str(tmp_path/'folder'))


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    write(tmp_path/'x.jsonl', lines(*GOOD))
    real = Path.open
    def denied(self, *a, **k):
        if self.name == 'x.jsonl': raise PermissionError(13, 'Permission denied')
        return real(self, *a, **k)
    monkeypatch.setattr(Path, 'open', denied)
    said(read_table, tmp_path/'x.jsonl', 'Permission denied')


COMMANDS = [
    ('run', 'preferences', '--data', ''),
    ('run', 'classify', '--data', ''),
    ('run', 'maths', '--data', ''),
    ('run', 'persona', '--data', '', '--judge', 'pico', '--concept', 'a pirate'),
    ('refine', '--questions', '', '--out', 'o.jsonl'),
    ('label', '--model', 'pico', '--rows', '', '--supervisor', 'judge', '--out', 'o.parquet'),
    ('label', '--model', 'pico', '--rows', 'x.jsonl', '--train', ' ', '--out', 'o.parquet'),
    ('toxicity', 'score', '--scorer', 'oracle', '--texts', '', '--out', 'o.jsonl'),
    ('toxicity', 'fit', '--data', '', '--out', 'o'),
]


@pytest.mark.parametrize('words', COMMANDS, ids=lambda w: ' '.join(w[:3]))
def test_commands_say_that_a_name_is_empty(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path/'x.jsonl', lines(*GOOD))
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code != 0 and isinstance(done.exception, (DataError, ConfigError, SystemExit)), (done.output, done.exception)
    assert '\n' not in str(done.exception) and sorted(p.name for p in tmp_path.iterdir()) == ['x.jsonl']


# Anything

@pytest.mark.parametrize('name', ['x.jsonl', 'x.json', 'x.csv', 'x.tsv'])
def test_random_damage(tmp_path, name):
    "Three hundred files with bytes changed, cut out or put in: rows, or one sentence"
    rng = random.Random(0)
    frame = pd.DataFrame(GOOD)
    whole = dict(
        jsonl=lines(*GOOD).encode(),
        json=json.dumps(GOOD, indent=1).encode(),
        csv=frame.to_csv(index=False).encode(),
        tsv=frame.to_csv(index=False, sep='\t').encode(),
    )[name[2:]]
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0: data[at] = rng.randrange(256)
            elif kind == 1: del data[at:at + rng.randrange(1, 30)]
            elif kind == 2:
                data[at:at] = rng.choice(
                    [b'"', b'[', b'{', b'\\u d800'.replace(b' ', b''), b'9' * 30, b'\x00', b'\xff', b'\r', b'null', b'[' * 3000]
                )
            else: data[at:] = data[at:] + data[:at]
        (tmp_path/name).write_bytes(bytes(data))
        try: read_preferences(tmp_path/name)
        except DataError as e: assert name in str(e)


@NEEDS_PROC
def test_memory_of_reading(tmp_path):
    "Rows are not held several times as Python objects: reading and cleaning 20 MB takes less than five times as much"
    words = random.Random(0).choices([f'word{i}' for i in range(2000)], k=400_000)
    with open(tmp_path/'x.jsonl', 'w') as f:
        for i in range(0, 390_000, 25):
            start = f'\n\nHuman: {" ".join(words[i:i + 60])} {i}\n\nAssistant:'
            f.write(
                json.dumps(
                    dict(chosen=f'{start} {" ".join(words[i + 60 : i + 110])}', rejected=f'{start} {" ".join(words[i + 110 : i + 160])}')
                )
                + '\n'
            )
    size = (tmp_path/'x.jsonl').stat().st_size / 2**20
    code = (PEAK + 'from w2s.data.readers import read_preferences\nfrom w2s.data.hygiene import clean_text\n'
            f'open({str(tmp_path/"y.jsonl")!r}, "w").write(chr(10).join(open({str(tmp_path/"x.jsonl")!r}).read(9000).split(chr(10))[:3]))\n'
            f'read = read_preferences({str(tmp_path/"y.jsonl")!r}); clean_text(read.splits, read.refused, read.rows_read)\n'
            'before = peak()\n'
            f'read = read_preferences({str(tmp_path/"x.jsonl")!r}); clean_text(read.splits, read.refused, read.rows_read)\n'
            'print(peak() - before)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert float(done.stdout) < 5 * size, (done.stdout, size)
