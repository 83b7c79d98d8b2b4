"Rows, tables, readers, splits and hygiene: edge cases, and the real rows of ../shared where they are"
import gzip
import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from w2s.data.hygiene import COLUMNS, DataReport, clean_text, merge_reports
from w2s.data.readers import (
    DIFFER,
    ELSEWHERE,
    MESSAGES,
    MISSING,
    NOT_DIALOGUE,
    REASONS,
    TIE,
    TURN,
    preferences_from,
    read_preferences,
    split_of,
)
from w2s.data.rows import KINDS, check_rows, content_id, group_key, make_rows, prompt_text, to_pairs, to_preferences
from w2s.data.samples import sample_preferences, write_samples
from w2s.data.splits import drop_overlap, group_split, overlap, sample_rows, split_record
from w2s.data.tables import read_table
from w2s.errors import ConfigError, DataError
from w2s.train.tokens import Encoded, EncodedRow, Tokens, report_tokens

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / 'shared' / 'data'
HELPFUL, LLMBAR = DATA / 'hh_helpful', DATA / 'llmbar' / 'Natural.json'
OFFICIAL = DATA / 'hh_rlhf_helpful_base' / 'helpful-base.test.jsonl.gz'
GOOD = dict(prompt='What is X?', chosen='A letter.', rejected='A word.')
USER, YES, NO = dict(role='user', content='Is 7 prime?'), dict(role='assistant', content='Yes.'), dict(role='assistant', content='No.')


def needs(path): return pytest.mark.skipif(not path.exists(), reason=f'{path} is not there')
def jsonl(path, *rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8'); return path
def refuses(message, error=DataError): return pytest.raises(error, match=message)
def in_new_process(code, hash_seed='5'):
    env = dict(PYTHONHASHSEED=hash_seed, PYTHONPATH=str(ROOT), PATH='/usr/bin', HF_HUB_OFFLINE='1')
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, check=True).stdout.strip()


# --- rows

@pytest.mark.parametrize('bad, why, todo', [
    (dict(prompt='p', chosen='same', rejected='same'), 'chosen equals rejected', 'correct these rows, or give others'),
    (dict(prompt='q0', chosen='a', rejected='b'), 'prompt occurs in another split', 'leave this split out'),
])
def test_a_file_without_rows_says_which_and_why(tmp_path, bad, why, todo):
    "A folder of files in which one of them ends up empty"
    good = [dict(prompt=f'q{i}', chosen='a', rejected='b') for i in range(4)]
    for name, rows in dict(train=[bad]*3, test=good).items():
        (tmp_path/f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    read = read_preferences(tmp_path)
    with pytest.raises(DataError) as e: clean_text(read.splits, read.refused, read.rows_read, columns=read.columns)
    said = str(e.value).split('\n')[0]
    assert said.startswith('split "train" (train.jsonl) has no rows left of 3 that were read (') and why in said and said.endswith(todo)


def test_group_key_takes_typed_twice_as_one():
    same = ['What  is X?', 'what is x?', ' WHAT\tis\nX? ', 'What\u00a0is Ｘ?']
    assert len({group_key(p) for p in same}) == 1
    assert group_key('Strasse') == group_key('Straße') and group_key('a b') != group_key('ab')
    assert group_key([USER]) == group_key([dict(role='user', content='is 7  PRIME?')]) != group_key('Is 7 prime?')


def test_ids_and_orders_are_equal_across_processes():
    code = ('from w2s.data.rows import *; from w2s.data.samples import sample_preferences; from w2s.data.splits import *\n'
            'd = make_rows(sample_preferences(60), "preferences"); parts = group_split(d, dict(a=.5, b=.5), seed=3)\n'
            'print(content_id(d["id"][:], d["group"][:], to_pairs(d, seed=2)["response_a"][:],'
            '      parts["a"]["id"][:], sample_rows(d, 9, 1)["id"][:]))')
    assert len({in_new_process(code, seed) for seed in ('1', '77')}) == 1


def test_id_of_a_prompt_with_odd_characters():
    assert content_id('\ud800', 'é\u2028', '𝄞') == content_id('\ud800', 'é\u2028', '𝄞')
    ds = make_rows([GOOD | dict(prompt='é\u2028𝄞\x00 end')], 'preferences')
    assert ds[0]['prompt'] == 'é\u2028𝄞\x00 end'


@pytest.mark.parametrize('bad, message', [
    (dict(chosen=None), 'odd.jsonl, row 2: column "chosen" is missing'), (dict(rejected=3), 'row 2: column "rejected" is int 3'),
    (dict(prob=float('nan')), 'row 2: column "prob" is NaN'), (dict(prob=1.01), 'row 2: column "prob" is 1.01; want 0 to 1'),
    (dict(weight=-1), 'row 2: column "weight" is -1; want a finite number, at least 0'),
    (dict(weight=float('inf')), 'row 2: column "weight" is inf'),
    (dict(weight=True), 'row 2: column "weight" is bool True'), (dict(prompt=[]), 'row 2: column "prompt" is an empty list'),
    (dict(prompt=[dict(role='user')]), 'row 2: column "prompt" has dict'),
    (dict(prompt=[USER]), 'row 2: column "prompt" is a list of messages'),
    (dict(wieght=1), 'row 2: unknown column "wieght"; did you mean "weight"')])
def test_a_bad_cell_is_named(bad, message):
    with refuses(message): make_rows([GOOD, GOOD | bad], 'preferences', where='odd.jsonl')


def test_gold_may_be_unknown_but_not_absent():
    assert np.isnan(make_rows([GOOD | dict(gold=float('nan'))], 'preferences')['gold'][0])
    with refuses('row 2: column "gold" is missing, and other rows have it'): make_rows([GOOD | dict(gold=1), GOOD], 'preferences')


def test_check_rows_names_what_is_missing_and_lets_more_columns_be():
    ds = make_rows([GOOD], 'preferences')
    assert check_rows(ds.add_column('length', [3]), 'preferences')['length'][0] == 3
    for c in KINDS['preferences']:
        with refuses(f'my.parquet: column "{c}" is missing'): check_rows(ds.remove_columns(c), 'preferences', 'my.parquet')
    with refuses('did you mean "pairs"'): check_rows(ds, 'pair')


def test_no_rows_are_rows_too():
    for kind in KINDS: assert check_rows(make_rows([], kind), kind).num_rows == 0
    assert len(to_pairs(make_rows([], 'preferences'))) == 0


def test_labels_get_one_hot_probs():
    ds = make_rows([dict(prompt='a', label=2), dict(prompt='b', label=None, probs=[.2, .3, .5])], 'labels')
    assert ds['probs'][:] == [[0, 0, 1], [.2, .3, .5]] and ds['label'][:] == [2, None]
    with refuses('row 1: column "probs" is NoneType'): make_rows([dict(prompt='a')], 'labels')
    with refuses('row 1: column "label" is'): make_rows([dict(prompt='a', label='unsafe', probs=[.5, .5])], 'labels')


@pytest.mark.parametrize('chat', [False, True])
def test_pairs_and_back(chat):
    rows = [r | dict(prompt=[dict(role='user', content=r['prompt'])]) if chat else r for r in sample_preferences(50)]
    ds = make_rows([r | dict(prob=.75) for r in rows], 'preferences')
    pairs = check_rows(to_pairs(ds, seed=4), 'pairs')
    back = check_rows(to_preferences(pairs, pairs['prob_a'][:], 'human'), 'preferences')
    for c in ds.column_names: assert back[c][:] == ds[c][:]
    assert 10 < sum(p > .5 for p in pairs['prob_a']) < 40
    flipped = to_preferences(pairs, 1 - np.array(pairs['prob_a'][:]), 'weak')
    assert flipped['chosen'][:] == ds['rejected'][:] and flipped['id'][:] == ds['id'][:] and set(flipped['source']) == {'weak'}
    assert np.allclose(flipped['gold'][:], 1 - np.array(ds['gold'][:]))


def test_order_of_a_pair_depends_on_seed_and_row_alone():
    ds = make_rows(sample_preferences(80), 'preferences')
    whole = dict(zip(ds['id'], to_pairs(ds, 1)['response_a'], strict=True))
    part = ds.shuffle(seed=9).select(range(30))
    assert all(whole[i] == a for i, a in zip(part['id'], to_pairs(part, 1)['response_a'], strict=True))


# --- tables

def test_every_form_zipped_or_not(tmp_path):
    rows = [GOOD, dict(prompt='Why, "so"?', chosen='Because\nof that.', rejected='NA')]
    df = pd.DataFrame(rows)
    jsonl(tmp_path / 'x.jsonl', *rows); (tmp_path / 'x.json').write_text(json.dumps(rows, indent=1))
    df.to_csv(tmp_path / 'x.csv', index=False); df.to_csv(tmp_path / 'x.tsv', index=False, sep='\t'); df.to_parquet(tmp_path / 'x.parquet')
    for path in list(tmp_path.iterdir()):
        zipped = path.with_name(path.name + '.gz')
        zipped.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        for p in (path, zipped): assert read_table(p).to_list() == rows, p


def test_a_byte_order_mark_and_windows_lines(tmp_path):
    (tmp_path / 'x.csv').write_bytes('\ufeffprompt,chosen\r\nWhy?,So.\r\n'.encode())
    (tmp_path / 'x.jsonl').write_bytes('\ufeff{"a": 1}\r\n{"a": 2}\r\n'.encode())
    assert read_table(tmp_path / 'x.csv').to_list() == [dict(prompt='Why?', chosen='So.')]
    assert read_table(tmp_path / 'x.jsonl')['a'][:] == [1, 2]


@pytest.mark.parametrize(
    'name, content, message',
    [
        ('x.jsonl', b'{"a": 1}\n{"a": 1', 'x.jsonl, line 2: not JSON'),
        ('x.jsonl', b'{"a": 1}\n\n3\n', 'x.jsonl, line 3: a int'),
        ('x.jsonl', b'', 'x.jsonl: holds no rows'),
        ('x.jsonl', b'{"a": "caf\xe9"}', 'x.jsonl, line 1: not UTF-8'),
        ('x.json', b'[{"a": 1},\n3]', 'x.json, row 2: a int'),
        ('x.json', b'[{"a": 1},', 'x.json, line 1: not JSON'),
        ('x.csv', b'a,b\n1,2\n1\n', 'x.csv, line 3: 1 cells under 2 columns'),
        ('x.csv', b'a,a\n1,2\n', 'x.csv, line 1: two columns have one name'),
        ('x.csv', b'a,b\n1,"2\n', 'x.csv, line 2: .*quotation mark'),
        ('x.csv', b'a,b\n', 'x.csv: holds no rows'),
        ('x.parquet', b'PAR', 'x.parquet: not a Parquet file'),
        ('x.jsonl.gz', b'plain', 'x.jsonl.gz: cannot be unzipped'),
        ('x.jsonl.gz', gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], 'x.jsonl.gz: cannot be unzipped'),
        ('x.xlsx', b'', '".xlsx" are not read'),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with refuses(message): read_table(tmp_path / name)


def test_a_column_that_changes_its_type(tmp_path):
    with refuses('row 3: column "prompt" is a list, and a str before it'):
        read_table(jsonl(tmp_path / 'x.jsonl', dict(prompt='a'), dict(prompt=None), dict(prompt=[USER])))
    assert read_table(jsonl(tmp_path / 'y.jsonl', dict(a=1), dict(b=2.5)))[:] == dict(a=[1, None], b=[None, 2.5])


def test_a_very_long_csv_cell(tmp_path):
    (tmp_path / 'x.csv').write_text('prompt,chosen\n"' + 'word ' * 60_000 + '",x\n')
    assert len(read_table(tmp_path / 'x.csv')['prompt'][0]) == 300_000


# --- readers

HI, HO = '\n\nHuman: Hi\n\nAssistant:', '\n\nHuman: Ho\n\nAssistant:'

def hh(start, chosen, rejected): return dict(chosen=start + chosen, rejected=start + rejected)


def test_dialogues_keep_every_letter():
    start = '\n\nHuman: Hi\n\nAssistant: Hello \n\nHuman:  Why?\n\nAssistant:'
    ds, refused = preferences_from(Dataset.from_list([hh(start, ' So. ', 'Thus.\n')]))
    row = ds[0]
    assert not refused and row['prompt'] == start and row['chosen'] == ' So. ' and row['rejected'] == 'Thus.\n'


def test_dialogues_that_cannot_be_cut_are_counted_by_reason():
    rows = [hh(HI, ' a', ' b'), dict(chosen=HI + ' a', rejected=HO + ' b'),
            dict(chosen='\n\nHuman: Hi\n\nAssistant: a', rejected='b'), dict(chosen='\n\nHuman: Hi\n\nAssistant: a', rejected=None)]
    ds, refused = preferences_from(Dataset.from_list(rows), 'hh.jsonl', split='test')
    assert len(ds) == 1 and [(r.where, r.row, r.reason, r.split) for r in refused] == [
        ('hh.jsonl', 2, DIFFER, 'test'), ('hh.jsonl', 3, NOT_DIALOGUE, 'test'), ('hh.jsonl', 4, MISSING, 'test')]


def test_empty_and_equal_responses_are_left_to_hygiene():
    ds, refused = preferences_from(Dataset.from_list([hh(HI, '', ' b'), hh(HO, ' b', ' b')]))
    assert len(ds) == 2 and not refused


@pytest.mark.parametrize('row', [
    dict(prompt=[USER], chosen=[YES], rejected=[NO]), dict(chosen=[USER, YES], rejected=[USER, NO]),
    dict(prompt=[USER], chosen='Yes.', rejected='No.'), dict(prompt='Is 7 prime?', chosen=[USER, YES], rejected=[USER, NO]),
    dict(prompt=[USER], chosen=[USER, YES], rejected=[USER, NO]), dict(prompt=[USER], response_a='No.', response_b='Yes.', label='B')])
def test_chat_forms_through_parquet(tmp_path, row):
    Dataset.from_list([row, row]).to_parquet(tmp_path / 'x.parquet')
    ds = read_preferences(tmp_path / 'x.parquet').splits['all']
    assert ds[1]['prompt'] == [USER] and ds[1]['chosen'] == 'Yes.' and ds[1]['rejected'] == 'No.'
    assert ds[0]['id'] == make_rows([dict(prompt=[USER], chosen='Yes.', rejected='No.')], 'preferences')[0]['id']


@pytest.mark.parametrize('row, reason', [
    (dict(chosen=[YES], rejected=[NO]), MESSAGES), (dict(chosen=[USER, USER], rejected=[USER, NO]), MESSAGES),
    (dict(chosen=[], rejected=[USER, NO]), MESSAGES),
    (dict(chosen=[USER, YES], rejected=[dict(USER, content='Is 8 prime?'), NO]), DIFFER),
    (dict(prompt='Another?', chosen=[USER, YES], rejected=[USER, NO]), ELSEWHERE),
    (dict(prompt=[USER], chosen=[dict(YES, content=None)], rejected=[NO]), MESSAGES),
    (dict(prompt=[], chosen='Yes.', rejected='No.'), MESSAGES),
    (dict(prompt=None, chosen='Yes.', rejected='No.'), MISSING), (dict(prompt='?', output_1='Yes.', output_2='No.', label='tie'), TIE),
    (dict(prompt='?', output_1=None, output_2='No.', label=1), MISSING)])
def test_rows_that_are_refused_with_a_reason(row, reason):
    ok = {k: v for k, v in dict(chosen=[USER, YES], rejected=[USER, NO]).items()} if isinstance(row.get('chosen'), list) else None
    rows = [row] if ok is None else [row, ok | ({'prompt': row['prompt']} if 'prompt' in row else {})]
    _, refused = preferences_from(Dataset.from_list(rows))
    assert refused[0].reason == reason and refused[0].reason in REASONS and refused[0].row == 1


@pytest.mark.parametrize('columns, label, better', [
    (('output_1', 'output_2'), 1, 0), (('output_1', 'output_2'), '2', 1), (('response_0', 'response_1'), 1, 1),
    (('response_0', 'response_1'), 0.0, 0), (('response_1', 'response_2'), 1, 0), (('response_a', 'response_b'), 'A', 0),
    (('response_a', 'response_b'), 'response_b', 1)])
def test_a_label_names_a_response(columns, label, better):
    ds, _ = preferences_from(Dataset.from_list([{'prompt': '?', columns[0]: 'first', columns[1]: 'second', 'label': label}]))
    assert ds[0]['chosen'] == ('first', 'second')[better]


@pytest.mark.parametrize('columns, label', [
    (('output_1', 'output_2'), 0), (('response_0', 'response_1'), 2), (('response_a', 'response_b'), 1),
    (('response_a', 'response_b'), True)])
def test_a_label_that_names_nothing_stops(columns, label):
    with refuses('x.csv, row 1: label .* names neither'):
        preferences_from(Dataset.from_list([{'prompt': '?', columns[0]: 'f', columns[1]: 's', 'label': label}]), 'x.csv')


def test_numbers_out_of_csv(tmp_path):
    (tmp_path / 'x.csv').write_text('prompt,chosen,rejected,prob,weight,gold\nWhy?,,None,0.75,2,1\n')
    row = read_preferences(tmp_path / 'x.csv').splits['all'][0]
    assert (row['chosen'], row['rejected'], row['prob'], row['weight'], row['gold']) == ('', 'None', .75, 2., 1.)
    (tmp_path / 'y.csv').write_text('prompt,chosen,rejected,prob\nWhy?,a,b,.5\nWhy?,a,b,\n')
    with refuses('y.csv, row 2: column "prob" is empty'): read_preferences(tmp_path / 'y.csv')


def test_row_numbers_of_the_file_survive_refused_rows():
    rows = [dict(GOOD, prob=1.), dict(GOOD, chosen=None, prob=1.), dict(GOOD, prob=7.)]
    with refuses('x.jsonl, row 3: column "prob" is 7'): preferences_from(Dataset.from_list(rows), 'x.jsonl')


def test_an_unknown_form_lists_columns_and_forms():
    with refuses('Columns found: question, best, worst.*Forms understood:\n  prompt, chosen, rejected'):
        preferences_from(Dataset.from_list([dict(question='?', best='a', worst='b')]), 'x.csv')
    with refuses('no known form'): preferences_from(Dataset.from_list([dict(chosen='no dialogue', rejected='none')]))


@pytest.mark.parametrize('name, split', [
    ('helpful_train_gt.jsonl.gz', 'train_gt'), ('TRAIN_W2S.csv', 'train_w2s'), ('helpful-base.test.jsonl', 'test'), ('x-val.csv', 'val'),
    ('validation', 'val'), ('train_prefs', 'train'), ('contest.csv', None), ('trained.csv', None), ('values.csv', None)])
def test_split_names(name, split): assert split_of(name) == split


def test_a_folder(tmp_path):
    folder = write_samples(tmp_path / 's', n=50)
    (folder / 'README.md').write_text('x'); (folder / '.hidden.jsonl').write_text('x')
    got = read_preferences(str(folder))
    assert set(got.splits) == {'train_gt', 'train_w2s', 'test'} and got.rows_read == dict(train_gt=20, train_w2s=20, test=10)
    assert not got.refused
    jsonl(folder / 'more_test.jsonl', GOOD | dict(gold=1))
    with refuses('both "more_test.jsonl" and "test.jsonl" are test'): read_preferences(folder)
    assert len(read_preferences(folder, splits=dict(test='more_test.jsonl')).splits['test']) == 1
    (folder / 'more_test.jsonl').rename(folder / 'extra.jsonl')
    with refuses('"extra.jsonl" names none of'): read_preferences(folder)
    with refuses('has no "nothing.jsonl"'): read_preferences(folder, splits=dict(test='nothing.jsonl'))


@pytest.mark.parametrize('column', ['prob', 'weight', 'gold'])
def test_number_columns_in_all_files_or_in_none(tmp_path, column):
    jsonl(tmp_path / 'train.jsonl', GOOD | {column: 1}); jsonl(tmp_path / 'test.jsonl', GOOD)
    with refuses(f'test.jsonl: column "{column}" is missing, and .*train.jsonl has it'): read_preferences(tmp_path)


def test_folders_of_the_datasets_library(tmp_path, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_DATASETS_CACHE', str(tmp_path / 'cache'))
    ds = Dataset.from_list([GOOD])
    DatasetDict(train=ds, test=ds).save_to_disk(tmp_path / 'saved')
    assert set(read_preferences(tmp_path / 'saved').splits) == {'train', 'test'}
    (tmp_path / 'repo' / 'data').mkdir(parents=True)
    for split in ('train', 'test'): ds.to_parquet(tmp_path / 'repo' / 'data' / f'{split}-00000-of-00001.parquet')
    assert set(read_preferences(tmp_path / 'repo').splits) == {'train', 'test'}


@pytest.mark.parametrize('name', ['nobody/nothing', 'nobody/nothing:config', '../not/there', 'a b c'])
def test_a_name_that_is_nowhere(name, monkeypatch):
    monkeypatch.setattr('datasets.config.HF_HUB_OFFLINE', True)
    with refuses('neither a file, nor a folder with rows'): read_preferences(name)


def test_an_empty_folder(tmp_path):
    with refuses('neither a file, nor a folder with rows'): read_preferences(tmp_path)


# --- splits

def typed_twice(n=400, share=8):
    "Rows of which some prompts occur again, in other white space or case"
    rows = sample_preferences(n)
    return make_rows(rows + [dict(r, prompt=r['prompt'].upper().replace(' ', '  '), chosen=r['chosen'] + ' Yes.') for r in rows[::share]],
                     'preferences')


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('shares', [dict(train_gt=.4, train_w2s=.4, test=.2), dict(train=.9, test=.1), dict(a=.25, b=.25, c=.25, d=.25)])
def test_pitfall_18_no_normalised_prompt_is_in_two_splits(shares, seed):
    ds = typed_twice()
    parts = group_split(ds, shares, seed)
    assert sum(map(len, parts.values())) == len(ds) and set(itertools.chain(*(p['id'] for p in parts.values()))) == set(ds['id'])
    seen = {k: {' '.join(p.casefold().split()) for p in v['prompt']} for k, v in parts.items()}
    for a, b in itertools.combinations(parts, 2): assert not seen[a] & seen[b], (a, b)
    for k, v in parts.items(): assert abs(len(v) - shares[k] * len(ds)) <= 2


def test_pitfall_18_splits_that_come_with_a_leak_are_mended():
    ds = typed_twice()
    halves = ds.train_test_split(test_size=.5, seed=0)
    leaky = dict(train_gt=halves['train'], test=halves['test'])
    assert len(overlap(leaky)) > 5
    clean, report = clean_text(leaky)
    seen = {k: {' '.join(p.casefold().split()) for p in v['prompt']} for k, v in clean.items()}
    assert not seen['train_gt'] & seen['test'] and len(clean['test']) == len(leaky['test'])
    line = report.found.query('check == "prompt occurs in another split"')
    assert line['rows'].tolist() == [len(leaky['train_gt']) - len(clean['train_gt'])] and line['action'].tolist() == ['dropped']
    with refuses('prompt occurs in another split'): report.refuse_if_strict()


def test_splits_do_not_depend_on_the_order_of_rows():
    ds = typed_twice()
    for order in (1, 2):
        mixed = ds.shuffle(seed=order)
        here, there = (group_split(d, dict(x=.3, y=.7), 5) for d in (ds, mixed))
        for k in here: assert here[k]['id'][:] == there[k]['id'][:]
        assert sample_rows(ds, 37, 5)['id'][:] == sample_rows(mixed, 37, 5)['id'][:]
        assert sample_rows(ds, None, 5)['id'][:] == sample_rows(mixed, None, 5)['id'][:]
        assert split_record(dict(a=ds), 0) == split_record(dict(a=mixed), 0)


def test_seeds_differ_and_repeat():
    ds = typed_twice()
    tests = [tuple(group_split(ds, dict(train=.5, test=.5), s)['test']['id']) for s in (0, 1, 0)]
    assert tests[0] == tests[2] != tests[1] and len(set(tests[0]) & set(tests[1])) < .7 * len(tests[0])


def test_shares_are_met_within_the_largest_group():
    rng = np.random.default_rng(0)
    sizes = np.minimum(40, 1 + rng.geometric(.15, size=60))
    rows = [dict(prompt=f'question {g}', chosen=f'{g} {i}', rejected='no') for g, n in enumerate(sizes) for i in range(n)]
    ds, shares = make_rows(rows, 'preferences'), dict(a=.6, b=.3, c=.1)
    for seed in range(5):
        for k, v in group_split(ds, shares, seed).items(): assert abs(len(v) - shares[k] * len(ds)) <= sizes.max()


@pytest.mark.parametrize('shares', [dict(), dict(a=.5, b=.6), dict(a=1.5, b=-.5), dict(a=float('nan'), b=.5)])
def test_shares_that_are_none(shares):
    with refuses('share', ConfigError): group_split(typed_twice(), shares, 0)


def test_sample_larger_than_the_rows_keeps_all():
    ds = typed_twice(40)
    assert len(sample_rows(ds, 10_000)) == len(sample_rows(ds, None)) == len(ds)


def test_drop_overlap_among_three():
    prompts = dict(train_gt='abc', train_w2s='bcd', test='ce', other='aef')
    parts = {k: make_rows([dict(prompt=p, chosen='a', rejected='b') for p in ps], 'preferences') for k, ps in prompts.items()}
    clean, lost = drop_overlap(parts)
    assert {k: ''.join(v['prompt']) for k, v in clean.items()} == dict(train_gt='a', train_w2s='bd', test='ce', other='f')
    assert lost == dict(train_gt=2, train_w2s=1, test=0, other=2) and len(overlap(clean)) == 0
    assert len(overlap(parts)) == 6  # b, c (three pairs of splits), a, e


# --- hygiene

def test_pitfall_8_data_side_each_fault_is_counted_once_and_strict_stops():
    base = sample_preferences(40)
    rows = base + [dict(GOOD, prompt='p1', rejected=' A letter. '), dict(GOOD, prompt='p2', chosen='\n'), dict(GOOD, prompt=' \n'), base[0]]
    clean, report = clean_text(dict(train_gt=make_rows([{k: r[k] for k in GOOD} for r in rows], 'preferences')))
    got = report.found.set_index('check')['rows'].to_dict()
    assert got == {'chosen equals rejected': 1, 'empty response': 1, 'empty prompt': 1, 'row occurs more than once': 1}
    assert report.rows_left == dict(train_gt=40) == {k: len(v) for k, v in clean.items()}
    left = clean['train_gt']
    assert all(c.strip() and r.strip() and c.strip() != r.strip() for c, r in zip(left['chosen'], left['rejected'], strict=True))
    with pytest.raises(DataError) as e: report.refuse_if_strict()
    assert all(name in str(e.value) for name in got)


def test_an_empty_message_prompt_and_empty_chat_responses():
    rows = [dict(prompt=[dict(role='user', content=text)], chosen='Yes.', rejected='No.') for text in ('Is 7 prime?', ' ')]
    clean, report = clean_text(dict(all=make_rows(rows, 'preferences')))
    assert len(clean['all']) == 1 and report.found['check'].tolist() == ['empty prompt']


def test_contradictory_pairs_are_kept_and_counted():
    rows = [GOOD, dict(prompt='what is  x?', chosen='A word.', rejected='A letter.'), dict(GOOD, rejected='A sign.')]
    clean, report = clean_text(dict(all=make_rows(rows, 'preferences')))
    found = report.found.set_index('check')
    assert len(clean['all']) == 3 and found.loc['contradictory pairs', 'rows'] == 2 and set(found['action']) == {'kept'}
    with refuses('contradictory pairs'): report.refuse_if_strict()


def test_checks_without_a_finding_are_in_the_saved_table(tmp_path):
    _, report = clean_text(dict(train=make_rows(sample_preferences(20), 'preferences')))
    report.refuse_if_strict()
    saved = pd.read_csv(report.save(tmp_path / 'a' / 'b') / 'data_report.csv')
    assert list(saved.columns) == list(COLUMNS) and len(saved) == len(REASONS) + 4 + 1 + 2 and saved['rows'].sum() == 0
    assert 'contradictory pairs' in (tmp_path / 'a' / 'b' / 'data_report.md').read_text()
    assert str(report) == f'{len(saved)} checks found nothing; rows left of rows read: train 20 of 20'


@pytest.mark.parametrize('report, last', [
    (DataReport(), 'no rows were read from a file'),
    (DataReport().add('prompt cut', 'train', 2, 8, 'cut'), '2 of 8 rows (train): prompt cut'), # findings, and nobody counted what was read
    (DataReport().add('a', 'train', 0, 8, 'cut'), '1 check found nothing'),
    (DataReport().add('a', 'train', 0, 8, 'cut').add('b', 'train', 0, 8, 'cut'), '2 checks found nothing'),
    (DataReport().add('a', 'train', 0, 8, 'cut').add('b', 'train', 1, 8, 'cut'), '1 of 8 rows (train): b'),
    (DataReport(rows_in=dict(test=3)), 'rows left of rows read: test 3 of 3'),
    (DataReport(rows_in=dict(test=0)), 'rows left of rows read: test 0 of 0'),
    (DataReport(rows_in=dict(test=3)).add('a', 'test', 0, 3, 'cut'), '1 check found nothing; rows left of rows read: test 3 of 3'),
    (merge_reports(DataReport(), DataReport().add('b', 'train', 1, 8, 'cut')), '1 of 8 rows (train): b')])
def test_a_report_ends_with_what_it_knows(report, last):
    "No sentence without its end, on a terminal and in Markdown"
    for text in (str(report), report._repr_markdown_()):
        end = text.splitlines()[-1]
        assert not end.rstrip().endswith((':', ';', ',')) and '0 checks' not in text and end.strip()
    assert str(report).splitlines()[-1].endswith(last)


def test_added_lines_count_only_what_is_gone():
    report = DataReport(rows_in=dict(train=10)).add('response too long', 'train', 2, 10, 'dropped', model='weak')
    report = report.add('prompt cut', 'train', 5, 8, 'cut', model='weak')
    assert report.rows_left == dict(train=8) and 'train, weak' in str(report)
    with refuses('9 rows of 8'): report.add('x', 'train', 9, 8, 'cut')


def test_report_says_by_how_much_prompts_were_cut():
    "Not how long they were, or are: 10 of 30 and 2 of 22 tokens are gone"
    rows = [EncodedRow(str(n), (Encoded((1, 2, 3), 2),), cut=n) for n in (10, 2, 0)]
    found = report_tokens(DataReport(), 'train', 'm', Tokens(rows, {}, 20), [], []).found
    assert found[['check', 'rows', 'of']].values.tolist() == [['prompt cut', 2, 3]]
    assert found['detail'][0] == 'to fit 20 tokens, by 6 on average and 10 at most'


def test_rows_read_and_left_agree_with_what_the_reader_refused(tmp_path):
    rows = [hh(HI, ' a', ' b'), dict(chosen=HI + ' a', rejected=HO + ' b'), hh(HO, ' a', ' a')]
    got = read_preferences(jsonl(tmp_path / 'x.jsonl', *rows))
    for args in ((got.splits, got.refused, got.rows_read), (got.splits, got.refused)):
        clean, report = clean_text(*args)
        assert report.rows_in == dict(all=3) and report.rows_left == dict(all=1)
        assert report.found['check'].tolist() == [DIFFER, 'chosen equals rejected']


def test_hygiene_wants_preferences():
    with refuses('train: column "chosen" is missing'): clean_text(dict(train=to_pairs(make_rows([GOOD], 'preferences'))))


# --- samples

def test_samples_share_no_prompt_and_are_their_seeds(tmp_path):
    folder = write_samples(tmp_path, n=200, seed=3)
    parts = read_preferences(folder).splits
    assert len(overlap(parts)) == 0 and clean_text(parts)[1].found.empty
    code = 'from w2s.data.samples import *; from w2s.data.rows import content_id; print(content_id(sample_preferences(30, 3)))'
    assert in_new_process(code) == content_id(sample_preferences(30, 3))
    assert .7 < np.mean([r['gold'] for r in sample_preferences(2000, 5)]) < .8


# --- real rows

@needs(HELPFUL)
def test_real_helpful_rows_are_read_and_cleaned_in_seconds():
    start = time.perf_counter()
    got = read_preferences(HELPFUL)
    clean, report = clean_text(got.splits, got.refused, got.rows_read)
    assert time.perf_counter() - start < 10
    assert got.rows_read == dict(train_gt=4000, train_w2s=4000, test=4000) and {r.reason for r in got.refused} == {DIFFER}
    assert {k: len(v) for k, v in clean.items()} == report.rows_left
    for a, b in itertools.combinations(clean.values(), 2): assert not set(a['group']) & set(b['group'])
    assert all(p.endswith(TURN) for v in clean.values() for p in v['prompt'])
    assert all(c.strip() != r.strip() for v in clean.values() for c, r in zip(v['chosen'], v['rejected'], strict=True))


@needs(OFFICIAL)
def test_real_official_file():
    raw = [json.loads(line) for line in gzip.decompress(OFFICIAL.read_bytes()).decode().splitlines()]
    got = read_preferences(OFFICIAL)
    ds, gone = got.splits['all'], {r.row for r in got.refused}
    assert len(ds) + len(gone) == len(raw) == 2354 and 0 < len(gone) < .005 * 2354
    assert Counter(r.reason for r in got.refused) == {DIFFER: len(gone)}
    kept = [r for i, r in enumerate(raw, 1) if i not in gone]
    for r, p, c, x in zip(kept, ds['prompt'], ds['chosen'], ds['rejected'], strict=True):
        assert p + c == r['chosen'] and p + x == r['rejected'] and p.endswith(TURN)
    _, report = clean_text(got.splits, got.refused, got.rows_read)
    found = report.found.set_index('check')['rows']
    assert found['chosen equals rejected'] == 2 and found[DIFFER] == len(gone)


@needs(LLMBAR)
def test_real_pairs_with_a_label():
    raw = json.loads(LLMBAR.read_text())
    ds = read_preferences(LLMBAR).splits['all']
    assert [r[f'output_{r["label"]}'] for r in raw] == ds['chosen'][:]
    assert [r['input'] for r in raw] == [prompt_text(p) for p in ds['prompt']]


@needs(HELPFUL)
def test_real_rows_split_by_group():
    ds = read_preferences(HELPFUL / 'helpful_train_gt.jsonl.gz').splits['all']
    parts = group_split(ds, dict(train_gt=.5, train_w2s=.5), 0)
    assert len(overlap(parts)) == 0 and abs(len(parts['train_gt']) - len(parts['train_w2s'])) <= 2
