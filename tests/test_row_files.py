"""Files and folders as people have them: packed, in parts, with other names, other separators and stray neighbours; and a seeded choice of
a large one"""
import bz2
import gzip
import json
import lzma
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from typer.testing import CliRunner

import w2s.data.tables as tables
from w2s.cli.app import app
from w2s.data.label_readers import read_labels
from w2s.data.readers import read_preferences
from w2s.data.sources import one_table
from w2s.errors import ConfigError, DataError

DATA = Path(__file__).parents[2] / 'shared' / 'data'


def pairs(n, start=0, name='q'):
    return [dict(prompt=f'{name} {i}?', chosen=f'Yes {i}.', rejected=f'No {i}.') for i in range(start, start + n)]
def text_of(rows): return ''.join(json.dumps(r) + '\n' for r in rows)
def jsonl(path, rows): path.parent.mkdir(parents=True, exist_ok=True); path.write_text(text_of(rows), encoding='utf-8'); return path
def parquet(path, rows): path.parent.mkdir(parents=True, exist_ok=True); pd.DataFrame(rows).to_parquet(path); return path
def prompts(read): return {s: d['prompt'][:] for s, d in read.splits.items()}
def asked(rows): return [r['prompt'] for r in rows]


def w2s(*words):
    done = CliRunner().invoke(app, [str(w) for w in words])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.output


PACKERS = {'gz': gzip.compress, 'bz2': bz2.compress, 'xz': lzma.compress, 'zst': lambda b: pa.compress(b, 'zstd', asbytes=True)}


@pytest.mark.parametrize('end', [e for p in PACKERS for e in (p, p.upper())])
@pytest.mark.parametrize('form', ['jsonl', 'ndjson', 'JSONL', 'json', 'csv', 'tsv'])
def test_packed_files(tmp_path, form, end):
    rows, frame = pairs(5), pd.DataFrame(pairs(5))
    text = {
        'json': lambda: json.dumps(rows),
        'csv': lambda: frame.to_csv(index=False),
        'tsv': lambda: frame.to_csv(index=False, sep='\t'),
    }.get(form.lower(), lambda: text_of(rows))()
    (tmp_path/f'x.{form}.{end}').write_bytes(PACKERS[end.lower()](text.encode()))
    assert prompts(read_preferences(tmp_path/f'x.{form}.{end}')) == dict(all=asked(rows))
    assert prompts(read_preferences(tmp_path)) == dict(all=asked(rows))


@pytest.mark.parametrize('end', PACKERS)
def test_a_packed_file_that_is_damaged_is_one_sentence(tmp_path, end):
    (tmp_path/f'x.jsonl.{end}').write_bytes(PACKERS[end](text_of(pairs(500)).encode())[:-20])
    with pytest.raises(DataError, match='cannot be unzipped'): read_preferences(tmp_path/f'x.jsonl.{end}')


FOLDERS = { # files -> what is read as what, what is named as not read
    'parts of one table': (
        {'train-00001-of-00002.parquet': pairs(2, 2), 'train-00000-of-00002.parquet': pairs(2), 'test-00000-of-00001.parquet': pairs(1, 9)},
        dict(train=[0, 1, 2, 3], test=[9]),
        '',
    ),
    'parts of JSONL': ({'part-00.jsonl': pairs(2), 'part-01.jsonl': pairs(2, 2)}, dict(all=[0, 1, 2, 3]), ''),
    'twelve parts': ({f'train_{i:03d}.jsonl': pairs(1, i) for i in range(12)}, dict(train=list(range(12))), ''),
    'a lone file': ({'preferences.jsonl': pairs(3)}, dict(all=[0, 1, 2]), ''),
    'dev': ({'train.jsonl': pairs(3), 'dev.jsonl': pairs(1, 9)}, dict(train=[0, 1, 2], val=[9]), ''),
    'eval and test': (
        {'train.jsonl': pairs(3), 'eval.jsonl': pairs(1, 9), 'test.jsonl': pairs(1, 8)},
        dict(train=[0, 1, 2], val=[9], test=[8]),
        '',
    ),
    'validation': ({'train.csv': pairs(3), 'validation.csv': pairs(1, 9)}, dict(train=[0, 1, 2], val=[9]), ''),
    'UltraFeedback binarized': (
        {
            f'data/{s}_{k}-00000-of-00001.parquet': pairs(2, 10 * j)
            for j, (s, k) in enumerate(
                [('train', 'prefs'), ('test', 'prefs'), ('train', 'sft'), ('test', 'sft'), ('train', 'gen'), ('test', 'gen')]
            )
        },
        dict(train=[0, 1], test=[10, 11]),
        'train_sft test_gen',
    ),
    'stray files': (
        {
            'train.jsonl': pairs(3),
            'test.jsonl': pairs(1, 9),
            'dataset_infos.json': None,
            'README.md': None,
            '.gitattributes': None,
            'dataset_info.json': None,
            'LICENSE': None,
        },
        dict(train=[0, 1, 2], test=[9]),
        '',
    ),
}


@pytest.mark.parametrize('name', FOLDERS)
def test_folders(tmp_path, name):
    files, splits, beside = FOLDERS[name]
    for f, rows in files.items():
        if rows is None: (tmp_path/f).write_text('{"default": {"splits": {}}}')
        elif f.endswith('csv'): pd.DataFrame(rows).to_csv(tmp_path/f, index=False)
        else: (parquet if f.endswith('parquet') else jsonl)(tmp_path/f, rows)
    read = read_preferences(tmp_path)
    assert prompts(read) == {s: [f'q {i}?' for i in numbers] for s, numbers in splits.items()}
    told = ' '.join(map(str, read.columns))
    assert all(b in told for b in beside.split()) and ('next to it, not read' in told) == bool(beside)


def test_parts_that_do_not_fit_each_other_are_named(tmp_path):
    (
        parquet(tmp_path / 'train-00000-of-00002.parquet', pairs(2)),
        parquet(tmp_path / 'train-00001-of-00002.parquet', [r | dict(prompt=[1]) for r in pairs(2)]),
    )
    with pytest.raises(DataError, match=r'train \(2 files\): its parts do not fit each other'): read_preferences(tmp_path)


def test_two_tables_of_one_split_stop_and_can_be_chosen(tmp_path):
    for f, start in (('train_one', 0), ('train_two', 5), ('test', 9)): jsonl(tmp_path/f'{f}.jsonl', pairs(2, start))
    with pytest.raises(DataError, match='both .* are train; say which to read, as in --split test=test,train=train_one'):
        read_preferences(tmp_path)
    read = read_preferences(tmp_path, splits=dict(train='train_two', test='test.jsonl'))
    assert prompts(read) == dict(train=['q 5?', 'q 6?'], test=['q 9?', 'q 10?']) and 'train_one' in str(read.columns[0])


def test_the_one_table_of_a_source(tmp_path):
    for f, start in (('train', 0), ('test', 5)): jsonl(tmp_path/f'{f}.jsonl', pairs(2, start))
    where, raw = one_table(str(tmp_path))
    assert raw.data['prompt'][0] == 'q 0?' and raw.beside == ('test',)
    assert one_table(str(tmp_path), dict(train='test'))[1].data['prompt'][0] == 'q 5?'
    (tmp_path/'train.jsonl').unlink()
    jsonl(tmp_path/'val.jsonl', pairs(2))
    with pytest.raises(DataError, match='holds test, val; say which of them to read, as in --split'): one_table(str(tmp_path))


# Tables of text

QUOTES = {
    'GLUE': ('text\tlabel\n"Yes" said Ann\t1\nNo\t0\nHe said "no"\t0\n', ['"Yes" said Ann', 'No', 'He said "no"'], 2),
    'open quotation mark': ('text\tlabel\n"Yes, said Ann\t1\nNo\t0\n', ['"Yes, said Ann', 'No'], 1),
    'backslashes': ('text\tlabel\n"a \\"big\\" dog"\t1\nNo\t0\n', ['a "big" dog', 'No'], 1),
    'real quotes': ('text\tlabel\n"a ""big"" dog"\t1\nNo\t0\n', ['a "big" dog', 'No'], 0),
    'two lines': ('text\tlabel\n"a\nb"\t1\nNo\t0\n', ['a\nb', 'No'], 0),
}


@pytest.mark.parametrize('name', QUOTES)
def test_quotation_marks_in_tsv(tmp_path, name):
    text, cells, counted = QUOTES[name]
    (tmp_path/'x.tsv').write_text(text)
    read = read_labels(tmp_path/'x.tsv')
    assert read.splits['all']['prompt'][:] == cells
    assert sum(len(rows) for what, rows in read.columns[0].changed.items() if 'quotation' in what) == counted


def test_csv_of_a_spreadsheet(tmp_path):
    (tmp_path/'x.csv').write_text('text;label\n"One; two, three";1\nNo, no;0\n', encoding='utf-8-sig')
    assert read_labels(tmp_path/'x.csv').splits['all']['prompt'][:] == ['One; two, three', 'No, no']


JUNK = {
    'types': lambda i: [1, 'x', None, [1]][i % 4],
    'huge': lambda i: 10**30 if i % 2 else -(10**25),
    'nested': lambda i: dict(a=[dict(b=i)] * (i % 3)),
    'half a character': lambda i: '\ud83d',
    'deep': lambda i: json.loads('[' * 60 + ']' * 60),
    'objects of other keys': lambda i: {f'k{i}': i},
}


@pytest.mark.parametrize('kind', JUNK)
@pytest.mark.parametrize('reader', ['preferences', 'labels', 'questions'])
def test_a_column_that_nobody_uses_breaks_nothing(tmp_path, kind, reader):
    rows = [r | dict(text=r['prompt'], label=i % 2, meta=JUNK[kind](i)) for i, r in enumerate(pairs(9))]
    path = tmp_path/'x.jsonl'
    path.write_text(
        ''.join(
            json.dumps(
                {
                    k: r[k]
                    for k in {
                        'preferences': ('prompt', 'chosen', 'rejected', 'meta'),
                        'labels': ('text', 'label', 'meta'),
                        'questions': ('prompt', 'chosen', 'meta'),
                    }[reader]
                }
            )
            + '\n'
            for r in rows
        )
    )
    if reader == 'questions':
        from w2s.data.questions import read_asked_file
        found = read_asked_file(path, answer='chosen')
        assert found.questions == asked(rows) and 'meta' in str(found.columns)
    else:
        read = read_preferences(path) if reader == 'preferences' else read_labels(path)
        assert prompts(read) == dict(all=asked(rows)) and 'not read: meta' in str(read.columns[0])


# A choice of a large file

@pytest.mark.parametrize('form', ['jsonl', 'json', 'csv', 'parquet', 'jsonl.gz'])
def test_a_large_file_is_read_in_part(tmp_path, form, monkeypatch):
    rows, path = pairs(3000), tmp_path/f'x.{form}'
    if form == 'parquet': parquet(path, rows)
    elif form == 'csv': pd.DataFrame(rows).to_csv(path, index=False)
    elif form == 'json': path.write_text(json.dumps(rows))
    else: path.write_bytes(gzip.compress(text_of(rows).encode()) if form.endswith('gz') else text_of(rows).encode())
    assert len(read_preferences(path, most=100).splits['all']) == 3000 # it is not large
    monkeypatch.setattr(tables, 'LARGE', 1000)
    read, again = (read_preferences(path, most=100) for _ in range(2))
    numbers = [int(p.split()[1][:-1]) for p in read.splits['all']['prompt']]
    assert len(numbers) == 100 and numbers == sorted(numbers) and prompts(read) == prompts(again)
    assert numbers[0] < 300 and numbers[-1] > 2700 and 1200 < sum(numbers) / 100 < 1800
    assert '100 of 3,000 rows chosen at random (seed 0' in str(read.columns[0]) and read.rows_read == dict(all=100)
    assert len(read_preferences(path, most=5000).splits['all']) == 3000 and 'chosen at random' not in str(
        read_preferences(path, most=5000).columns[0]
    )


def test_the_report_of_a_run_says_that_rows_were_chosen(tmp_path, monkeypatch):
    path = jsonl(tmp_path/'x.jsonl', pairs(3000))
    words = ('run', 'preferences', '--data', path, '--weak', 'pico', '--strong', 'pico', '--seeds', 1, '--dry-run')
    assert 'chosen at random' not in w2s(*words, '--n-labelled', 10, '--n-unlabelled', 10, '--n-test', 10)
    monkeypatch.setattr(tables, 'LARGE', 1000)
    assert '120 of 3,000 rows chosen at random (seed 0' in w2s(*words, '--n-labelled', 10, '--n-unlabelled', 10, '--n-test', 10)
    texts = jsonl(tmp_path/'y.jsonl', [dict(text=f'This is {i}.', label=i % 2) for i in range(3000)])
    assert '200 of 3,000 rows chosen' in w2s(
        'run',
        'classify',
        '--data',
        texts,
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
        20,
        '--dry-run',
    )


# On the command line

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Folders with train_one, train_two and test, and columns with names that nobody knows"
    home = tmp_path_factory.mktemp('home')
    for i, part in enumerate(('train_one', 'train_two', 'test_one')):
        jsonl(home/'pairs'/f'{part}.jsonl', [dict(ask=f'{part} {k}?', good=f'Yes {k}.', bad=f'No {k}.') for k in range(60)])
        jsonl(home/'texts'/f'{part}.jsonl', [dict(body=f'{part} {k}.', stars=k % 2) for k in range(60)])
        jsonl(home/'asked'/f'{part}.jsonl', [dict(ask=f'{part} {k}?', reply=f'Yes {k}.') for k in range(200)])
        jsonl(home/'sums'/f'{part}.jsonl', [dict(ask=f'What is {1000 * i + k}?', reply=str(k)) for k in range(200)])
        jsonl(home/'scored'/f'{part}.jsonl', [dict(body=f'{part} goes {k} ways.', much=(k % 10) / 10) for k in range(200)])
        jsonl(home/'said'/f'{part}.jsonl', [dict(body=f'{part} {k}.') for k in range(5)])
    return home


MODELS = ('--weak', 'pico', '--strong', 'pico', '--seeds', 1, '--dry-run')
SMALL = ('--n-labelled', 4, '--n-unlabelled', 6, '--n-test', 4, '--seeds', 1, '--dry-run')
SPLIT = ('--split', 'train=train_two,test=test_one')
COMMANDS = { # words, what the record must say
    'weak-teacher': (
        ('run', 'preferences', '--data', 'pairs', '--column', 'prompt=ask,chosen=good,rejected=bad', *SPLIT, *MODELS),
        'prompt: ask; chosen: good; rejected: bad',
    ),
    'label': (
        (
            'label',
            '--model',
            'pico',
            '--rows',
            'pairs',
            '--supervisor',
            'judge',
            '--out',
            'OUT/o.parquet',
            '--column',
            'prompt=ask,chosen=good,rejected=bad',
            '--split',
            'rows=train_two',
            '--dry-run',
        ),
        'prompt: ask; chosen: good; rejected: bad',
    ),
    'classify': (('run', 'classify', '--data', 'texts', '--column', 'text=body,label=stars', *SPLIT, *MODELS), 'text: body; label: stars'),
    'safety': (('run', 'safety', '--data', 'texts', '--column', 'text=body,label=stars', *SPLIT, *MODELS), 'text: body; label: stars'),
    'legal': (('run', 'legal', '--data', 'texts', '--column', 'text=body,label=stars', *SPLIT, *MODELS), 'text: body; label: stars'),
    'persona': (
        (
            'run',
            'persona',
            '--data',
            'asked',
            '--column',
            'question=ask,answer=reply',
            *SPLIT,
            '--judge',
            'pico',
            '--concept',
            'a pirate',
            *SMALL,
        ),
        'question: ask; answer: reply',
    ),
    'explanation': (
        ('run', 'explanation', '--data', 'asked', '--column', 'prompt=ask,completion=reply', *SPLIT, '--judge', 'pico', *SMALL),
        'question: ask; answer: reply',
    ),
    'maths': (('run', 'maths', '--data', 'sums', '--column', 'question=ask,answer=reply', *SPLIT, *SMALL), 'question: ask; answer: reply'),
    'refine': (
        (
            'refine',
            '--questions',
            'asked',
            '--column',
            'question=ask,answer=reply',
            '--split',
            'train=train_two',
            '--out',
            'OUT/o.jsonl',
            '--dry-run',
        ),
        'question: ask; answer: reply',
    ),
    'toxicity fit': (
        ('toxicity', 'fit', '--data', 'scored', '--column', 'text=body,score=much', '--split', 'train=train_two', '--out', 'OUT/s'),
        'text: body; score: much',
    ),
    'toxicity score': (
        (
            'toxicity',
            'score',
            '--scorer',
            'oracle',
            '--texts',
            'said',
            '--column',
            'text=body',
            '--split',
            'train=train_two',
            '--out',
            'OUT/o.csv',
        ),
        'text: body',
    ),
}


@pytest.mark.parametrize('name', COMMANDS)
def test_columns_and_splits_on_every_command(home, tmp_path, monkeypatch, name):
    monkeypatch.chdir(home)
    words, told = COMMANDS[name]
    said = w2s(*(w.replace('OUT', str(tmp_path)) if isinstance(w, str) else w for w in words))
    assert told in said and 'train_two' in said and 'train_one' in said.split('next to it, not read')[1]


@pytest.mark.parametrize('name', COMMANDS)
def test_a_part_that_is_not_known_is_named(home, tmp_path, monkeypatch, name):
    monkeypatch.chdir(home)
    words = [w.replace('OUT', str(tmp_path)) if isinstance(w, str) else w for w in COMMANDS[name][0]]
    words[words.index('--column') + 1] = 'promt=x'
    with pytest.raises(ConfigError, match='--column'): w2s(*words)


@pytest.mark.parametrize(
    'words',
    [
        ('label', '--model', 'pico', '--rows', 'x'),
        ('run', 'preferences'),
        ('run', 'classify'),
        ('run', 'persona'),
        ('run', 'toxicity'),
        ('refine', '--questions', 'x'),
        ('toxicity', 'fit', '--data', 'x'),
        ('toxicity', 'score', '--scorer', 'oracle', '--texts', 'x'),
        ('zoo', 'build', '--size', 'pico'),
    ],
    ids=' '.join,
)
@pytest.mark.parametrize('out', ['', ' '], ids=repr)
def test_an_empty_out_is_refused(tmp_path, monkeypatch, words, out):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [*words, '--out', out])
    assert done.exit_code == 2 and 'it is empty' in done.output and not list(tmp_path.iterdir())


def test_what_is_too_small_is_named_as_it_was_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (
        jsonl(tmp_path / 'x.jsonl', pairs(9)),
        jsonl(tmp_path / 'y.jsonl', pairs(9, 50)),
        jsonl(tmp_path / 'q.jsonl', [dict(question=f'q {i}?', answer='a') for i in range(3)]),
    )
    with pytest.raises(ConfigError, match='--train-rows is 1'):
        w2s('label', '--model', 'pico', '--rows', 'x.jsonl', '--train', 'y.jsonl', '--train-rows', 1, '--out', 'o.parquet')
    with pytest.raises(DataError, match='q.jsonl: --examples is 5, but'):
        w2s('refine', '--questions', 'q.jsonl', '--examples', 5, '--dry-run')
    assert '3' in w2s('refine', '--questions', 'q.jsonl', '--examples', 2, '--dry-run')


# Real files

def needs(path): return pytest.mark.skipif(not path.exists(), reason=f'{path} is not there')


@needs(DATA/'hh_helpful')
def test_real_dialogues():
    read = read_preferences(DATA/'hh_helpful')
    assert {s: len(d) for s, d in read.splits.items()} == dict(train_gt=4000, train_w2s=4000, test=4000) or sum(
        map(len, read.splits.values())
    ) + len(read.refused) == 12000


@needs(DATA/'llmbar')
def test_real_pairs():
    read = read_preferences(DATA/'llmbar')
    rows, ds = json.loads((DATA/'llmbar'/'Natural.json').read_text()), read.splits['all']
    assert len(ds) == 100 and all(c == r[f'output_{r["label"]}'] for c, r in zip(ds['chosen'], rows, strict=True))


@needs(DATA/'privacy_policy_qa')
def test_a_real_task_of_legalbench():
    read = read_labels(DATA/'privacy_policy_qa'/'train.tsv')
    assert read.classes == ('Irrelevant', 'Relevant') and len(read.splits['all']) + len(read.refused) == 8


@needs(DATA/'winogenerated')
def test_a_real_folder_of_two_tables_says_how_to_choose():
    with pytest.raises(DataError, match='--split train='): read_preferences(DATA/'winogenerated')
