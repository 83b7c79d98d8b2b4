"Labels from files, their hygiene and the bag-of-words baseline: edge cases, and the real rows of ../shared where they are"
import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold

from w2s.data.hygiene import IN_ANOTHER, REPEATED
from w2s.data.label_hygiene import CONTRADICTED, EMPTY, TWICE, TWO_SPLITS, class_balance, clean_labels, contradicted
from w2s.data.label_readers import EMPTY_TEXT, NO_GROUP, NO_LABEL, OTHER_LABEL, label_name, read_labels
from w2s.data.readers import MISSING, Refused
from w2s.data.rows import group_key, make_rows
from w2s.data.splits import group_split, overlap
from w2s.errors import ConfigError, DataError
from w2s.evaluate.bag_of_words import bag_of_words, duplicated, soft_targets

DATA = Path(__file__).parents[2] / 'shared' / 'data'
DIASAFETY, PRIVACY = DATA / 'diasafety', DATA / 'privacy_policy_qa'
CLAUSES = PRIVACY / 'privacy_policy_qa.test.jsonl.gz'


def needs(path): return pytest.mark.skipif(not path.exists(), reason=f'{path} is not there')
def jsonl(path, *rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8'); return path
def refuses(message, error=DataError): return pytest.raises(error, match=message)
def labelled(*rows): return make_rows([dict(prompt=p, label=y) | (dict(group=g[0]) if g else {}) for p, y, *g in rows], 'labels')
def found(report): return {(r['check'], r['split'], r['action']): r['rows'] for r in report.found.to_dict('records')}
def why(read): return [(r.row, r.reason) for r in read.refused]


# --- reading

@pytest.mark.parametrize('cell, name', [(True, 'True'), ('FALSE ', 'False'), (1, '1'), (1.0, '1'), ('-1.0', '-1'), (0, '0'), ('', None),
                                        (None, None), (float('nan'), None), ('1.5', '1.5'), ('Not safe', 'Not safe'), (np.float64(2), '2')])
def test_one_spelling_for_a_label(cell, name): assert label_name(cell) == name


@pytest.mark.parametrize('form', ['csv', 'jsonl', 'parquet', 'csv.gz'])
def test_the_same_rows_out_of_each_kind_of_file(tmp_path, form):
    rows = pd.DataFrame(dict(prompt=['Bake bread?', 'Pick a lock?', 'Boil\n"eggs"?'], is_safe=[True, False, True]))
    path = tmp_path / f'safety.{form}'
    if form == 'jsonl': jsonl(path, *rows.to_dict('records'))
    elif form == 'parquet': rows.to_parquet(path)
    else: rows.to_csv(path, index=False)
    read = read_labels(path)
    assert (read.form, read.classes, read.words, read.rows_read) == ('is_safe', ('False', 'True'), (' no', ' yes'), dict(all=3))
    assert read.splits['all']['label'][:] == [1, 0, 1] and read.splits['all']['prompt'][2] == 'Boil\n"eggs"?\nIs this safe?'


def test_each_reason_is_counted_with_its_row(tmp_path):
    good = dict(text='a', y='no', house='h')
    path = jsonl(tmp_path / 'x.jsonl', good, good | dict(text=None), good | dict(text=' '), good | dict(y=None), good | dict(y=''),
                 good | dict(y='maybe'), good | dict(house=''), good | dict(text='b', y='yes'))
    read = read_labels(path, label='y', group='house', classes=('no', 'yes'))
    assert why(read) == [(2, MISSING), (3, EMPTY_TEXT), (4, NO_LABEL), (5, NO_LABEL), (6, OTHER_LABEL), (7, NO_GROUP)]
    assert [len(read.splits['all']), read.rows_read['all'], read.refused[0].where] == [2, 8, str(path)]


def test_a_group_that_is_the_number_zero_is_a_group(tmp_path):
    read = read_labels(jsonl(tmp_path / 'x.jsonl', *(dict(text=f't{i}', label=i % 2, site=i // 2) for i in range(4))), group='site')
    assert not read.refused and read.splits['all']['group'][:] == [group_key('0')] * 2 + [group_key('1')] * 2


def test_classes_are_those_of_all_files(tmp_path):
    jsonl(tmp_path / 'train.jsonl', *(dict(sentence=f's{i}', label=i) for i in (10, 2, 0)))
    jsonl(tmp_path / 'test.jsonl', dict(sentence='t', label=2), dict(sentence='u', label=0))
    read = read_labels(tmp_path)
    assert read.classes == ('0', '2', '10') and read.splits['test']['probs'][:] == [[0, 1, 0], [1, 0, 0]]


def test_words_name_numbers_and_an_order_is_kept(tmp_path):
    path = jsonl(tmp_path / 'x.jsonl', *(dict(txt=f't{i}', hard_label=i % 2, soft_label=[.5, .5]) for i in range(4)))
    assert read_labels(path, classes=('bad', 'good')).classes == ('bad', 'good')
    assert read_labels(path, classes=(1, 0)).splits['all']['label'][:] == [1, 0, 1, 0]
    with refuses('no row has the class "2"; the labels are 0, 1'): read_labels(path, classes=(0, 2))


def test_class_names_of_a_data_set_are_used(tmp_path):
    kinds = Features(dict(text=Value('string'), label=ClassLabel(names=['world', 'sports'])))
    DatasetDict(test=Dataset.from_dict(dict(text=['a', 'b', 'c'], label=[0, 1, -1]), features=kinds)).save_to_disk(tmp_path / 'hub')
    read = read_labels(tmp_path / 'hub')
    assert read.classes == ('sports', 'world') and read.splits['test']['label'][:] == [1, 0] and why(read) == [(3, NO_LABEL)]


@pytest.mark.parametrize('rows, wish, message', [
    ([dict(text='a', label=1)] * 2, {}, "the labels hold '1'; two classes are needed"),
    ([dict(text='a', label=None)], {}, 'the labels hold nothing; two classes'),
    ([dict(text=str(i), label=f'kind {i}') for i in range(120)], {}, 'different labels'),
    ([dict(text=str(i), label=i / 7) for i in range(120)], {}, r'column "label" holds scores \(0\.142857'),
    ([dict(text='a', label='Safe'), dict(text='b', label='safe')], {}, '"Safe" and "safe" differ in case only'),
    ([dict(text='a', sentence='b', label=1)], {}, 'text and sentence could each be the text'),
    ([dict(text='a', label=1, answer=2)], {}, 'label and answer could each be the label'),
    ([dict(words='a', label=1)], {}, 'no column is known as a text. Columns found: words, label'),
    ([dict(text='a', label=1)], dict(text='txet'), 'has no column "txet"; it has text, label'),
    ([dict(text=3, label=1), dict(text=4, label=0)], {}, 'row 1: the text is a int; name the column'),
    ([dict(text='a', label=1), dict(text='b', label=0)], dict(classes=('0',)), 'two classes are needed'),
    ([dict(text='a', label=1), dict(text='b', label=0)], dict(classes=('0', 0)), 'one is named twice')])
def test_what_cannot_be_read_is_said(tmp_path, rows, wish, message):
    with refuses(message): read_labels(jsonl(tmp_path / 'x.jsonl', *rows), **wish)


def test_a_known_form_needs_its_classes(tmp_path):
    "Questions with free answers are not clauses, although the columns are the same"
    path = jsonl(tmp_path / 'x.jsonl', dict(question='Who?', context='Ann came.', answer='Ann'),
                 dict(question='When?', context='In May.', answer='May'))
    with refuses('question and context could each be the text'): read_labels(path)
    assert read_labels(path, text='context,question').splits['all']['prompt'][0] == 'Context: Ann came.\nQuestion: Who?'


def test_groups_fold_what_is_typed_twice(tmp_path):
    lines = [('Sold?', 'We sell.', 'Relevant'), (' SOLD? ', 'We bake.', 'Irrelevant'), ('Kept?', 'We sell.', 'Relevant')]
    rows = [dict(question=q, text=t, answer=a) for q, t, a in lines]
    groups = read_labels(jsonl(tmp_path / 'x.jsonl', *rows)).splits['all']['group'][:]
    assert groups[0] == groups[1] != groups[2]


# --- hygiene

FIXED = labelled(('A?', 0), ('a?', 1), ('B?', 1), ('B?', 1), ('b? ', 1), ('', 0), ('C?', 0), ('D?', 1), ('D?', 0), ('E?', 0))

def test_contradictions_are_counted_on_fixed_rows():
    assert contradicted(dict(all=FIXED))['all'] == [True, True, False, False, False, False, False, True, True, False]
    kept, report = clean_labels(dict(all=FIXED))
    assert found(report) == {(EMPTY, 'all', 'refused'): 1, (CONTRADICTED, 'all', 'kept'): 4,
                             (REPEATED, 'all', 'dropped'): 1, (TWICE, 'all', 'kept'): 1}
    assert kept['all']['prompt'][:] == ['A?', 'a?', 'B?', 'b? ', 'C?', 'D?', 'D?', 'E?'] and len(set(kept['all']['id'])) == 8
    dropped, report = clean_labels(dict(all=FIXED), contradictions='drop')
    assert dropped['all']['prompt'][:] == ['B?', 'b? ', 'C?', 'E?'] and found(report)[CONTRADICTED, 'all', 'dropped'] == 4
    assert report.rows_left == dict(all=4)


def test_refusal_names_the_rows_of_the_file():
    gone = [Refused('x.csv', 1, NO_LABEL), Refused('x.csv', 9, NO_LABEL), Refused('y.csv', 2, NO_LABEL, 'test')]
    with refuses(r'2 texts have different labels:\n  all row 2 \(class 0\), all row 3 \(class 1\)\n'
                 r'  all row 10 \(class 1\), all row 11 \(class 0\)'):
        clean_labels(dict(all=FIXED), gone, contradictions='refuse')
    clean_labels(dict(all=FIXED.select([0, 2, 6])), contradictions='refuse')


def test_a_contradiction_across_splits_is_one():
    train, test = labelled(('a', 0), ('b', 1), ('c', 0)), labelled(('A', 1), ('d', 0), ('e', 1))
    clean, report = clean_labels(dict(train=train, test=test), contradictions='drop')
    assert found(report) == {(CONTRADICTED, 'train', 'dropped'): 1, (CONTRADICTED, 'test', 'dropped'): 1}
    clean, report = clean_labels(dict(train=labelled(('a', 0), ('b', 1), ('c', 0)), test=test))
    assert found(report)[IN_ANOTHER, 'train', 'dropped'] == 1 and clean['test']['prompt'][:] == ['A', 'd', 'e']


def test_no_text_and_no_group_stays_in_two_splits():
    "Pitfall 18: all pairs of splits, by folded text and by group"
    splits = dict(train=labelled(('a', 0, 'g1'), ('b', 1, 'g2'), ('c', 0, 'g3'), ('d', 1, 'g4'), ('e', 0, 'g5')),
                  val=labelled(('B', 0, 'g6'), ('f', 1, 'g3'), ('i', 1, 'g9'), ('k', 0, 'g10')),
                  test=labelled((' A', 1, 'g7'), ('h', 0, 'g3'), ('j', 1, 'g8'), ('l', 0, 'g11')))
    clean, report = clean_labels(splits)
    assert overlap(clean).empty
    assert overlap({s: Dataset.from_dict(dict(group=[group_key(p) for p in ds['prompt']])) for s, ds in clean.items()}).empty
    lines = found(report)
    assert (lines[IN_ANOTHER, 'train', 'dropped'], lines[TWO_SPLITS, 'train', 'dropped'], lines[TWO_SPLITS, 'val', 'dropped']) == (2, 1, 1)
    assert report.rows_left == {s: len(ds) for s, ds in clean.items()} == dict(train=2, val=3, test=4)
    assert {s: len(ds) for s, ds in clean_labels(splits, keep_order=('train',))[0].items()} == dict(train=5, val=2, test=2)


def test_one_class_no_rows_and_odd_widths_are_errors():
    good = labelled(('a', 0), ('b', 1))
    with refuses('split "test" has rows of class 1 only'): clean_labels(dict(train=good, test=labelled(('c', 1), ('d', 1))))
    with refuses('split "test" has rows of class Unsafe only'): clean_labels(dict(test=labelled(('c', 1))), classes=('Safe', 'Unsafe'))
    with refuses('split "train" has no rows left of 2 that were read .2 dropped: .*another split.*or leave this split out'):
        clean_labels(dict(train=good, test=good))
    with refuses('2 probabilities, and split "train" 3 classes'): clean_labels(dict(train=labelled(('a', 0), ('b', 2)), test=good))
    with refuses('unknown way', ConfigError): clean_labels(dict(train=good), contradictions='mend')


def test_weak_labels_without_gold_are_clean_rows():
    "A repeat needs the same soft label; rows without a label contradict nothing"
    lines = [('a', [.4, .6]), ('a', [.4, .6]), ('a', [.5, .5]), ('b', [1., 0.])]
    weak = make_rows([dict(prompt=p, label=None, probs=q) for p, q in lines], 'labels')
    clean, report = clean_labels(dict(all=weak))
    assert len(clean['all']) == 3 and found(report)[REPEATED, 'all', 'dropped'] == 1
    assert class_balance(clean)['rows'].tolist() == [0, 0]


def test_the_balance_is_no_finding():
    _, report = clean_labels(dict(train=labelled(('a', 0), ('b', 1), ('c', 1))), classes=('no', 'yes'))
    report.refuse_if_strict()
    assert report.table['detail'].tolist()[-1] == 'no 1 (33.3%); yes 2 (66.7%)'


# --- the bag of words

def test_soft_targets_are_the_cross_entropy():
    "Weighted copies have the gradient of the cross-entropy against soft labels: a logistic fit's residuals vanish in its intercept"
    rng = np.random.default_rng(0)
    x, q = rng.normal(size=(80, 3)), rng.dirichlet([1, 1, 1], 80)
    rows, classes, weights = duplicated(q)
    model = LogisticRegression(C=1e6, tol=1e-10, max_iter=5000).fit(x[rows], classes, sample_weight=weights)
    residual = model.predict_proba(x) - q
    assert np.abs(np.c_[np.ones(80), x].T @ residual).max() < 2e-3
    assert np.allclose(soft_targets([0, 1, 2]), np.eye(3)) and len(duplicated(np.eye(3))[0]) == 3


def test_a_class_without_rows_keeps_its_place():
    probs = bag_of_words(['good film', 'bad film', 'good book', 'bad book'], np.eye(4)[[1, 3, 1, 3]], ['good', 'bad', 'unseen'])
    assert probs.shape == (3, 4) and probs[:, [0, 2]].max() == 0 and np.allclose(probs.sum(1), 1) and probs.argmax(1)[:2].tolist() == [1, 3]


@pytest.mark.parametrize('targets', [[.2, .8], [[.7, .7], [1, 0]], [-1, 0], [], [[1.], [1.]]])
def test_odd_targets_are_refused(targets):
    with refuses('want class numbers from 0'): soft_targets(targets)


# --- the public files

def score(train, test, of=lambda p: p):
    "Accuracy and AUROC of the bag of words"
    probs = bag_of_words([of(p) for p in train['prompt'][:]], train['label'][:], [of(p) for p in test['prompt'][:]])
    y = np.array(test['label'][:])
    return (probs.argmax(1) == y).mean(), roc_auc_score(y, probs[:, 1])


@needs(DIASAFETY)
def test_diasafety_is_read_and_cleaned():
    read = read_labels(DIASAFETY)
    assert (read.form, read.classes, read.words) == ('diasafety', ('Safe', 'Unsafe'), (' yes', ' no'))
    sizes = {s: (len(ds), read.rows_read[s]) for s, ds in read.splits.items()}
    assert sizes == dict(train=(9015, 9017), val=(1097, 1097), test=(1094, 1095))
    assert {r.reason for r in read.refused} == {EMPTY_TEXT}
    assert [(r.split, r.row) for r in read.refused] == [('test', 379), ('train', 3929), ('train', 7398)]
    clean, report = clean_labels(read.splits, read.refused, read.rows_read, classes=read.classes)
    lines = found(report)
    assert [lines[CONTRADICTED, 'train', 'kept'], lines[IN_ANOTHER, 'train', 'dropped'], len(clean['test'])] == [2, 4, 1094]
    assert overlap(clean).empty and report.rows_left == {s: len(ds) for s, ds in clean.items()}
    assert lines[TWO_SPLITS, 'train', 'dropped'] > 1700
    with refuses(r'1 texts have different labels:\n  train row 3872'):
        clean_labels(read.splits, read.refused, read.rows_read, contradictions='refuse')


@needs(DIASAFETY)
def test_bag_of_words_on_diasafety():
    "The data's README says 0.737 and 0.826, which is for the reply alone; with its context it is more"
    splits = read_labels(DIASAFETY).splits
    acc, auc = score(splits['train'], splits['test'], lambda p: p.split('\nReply: ')[-1])
    assert acc == pytest.approx(.737, abs=.01) and auc == pytest.approx(.826, abs=.01)
    acc, auc = score(splits['train'], splits['test'])
    assert acc == pytest.approx(.768, abs=.01) and auc == pytest.approx(.849, abs=.01)


@needs(CLAUSES)
def test_clauses_are_read_in_groups_of_questions():
    "Pitfall 18: halves and test share no question, folded"
    read = read_labels(CLAUSES)
    rows = read.splits['all']
    assert (read.form, read.classes, read.words) == ('legalbench', ('Irrelevant', 'Relevant'), (' no', ' yes'))
    assert (len(rows), len(set(rows['group'][:]))) == (10923, 389)
    asked = {group_key(json.loads(line)['question']) for line in gzip.open(CLAUSES, 'rt', encoding='utf-8')}
    assert set(rows['group'][:]) == asked and sum(rows['label'][:]) == 5449
    parts = group_split(rows, dict(train_gt=.4, train_w2s=.4, test=.2))
    questions = {s: {p.split('\nQuestion: ')[1].casefold() for p in ds['prompt'][:]} for s, ds in parts.items()}
    for a, b in itertools.combinations(questions, 2): assert not questions[a] & questions[b], (a, b)
    clean, report = clean_labels(parts)
    assert not len(report.found) and sum(map(len, clean.values())) == 10923


@needs(PRIVACY)
def test_the_folder_of_clauses_has_eight_examples_beside():
    read = read_labels(PRIVACY)
    assert {s: len(ds) for s, ds in read.splits.items()} == dict(train=8, test=10923) and read.classes == ('Irrelevant', 'Relevant')


@needs(CLAUSES)
def test_bag_of_words_on_clauses_by_question():
    "0.744 by the data's README"
    rows = read_labels(CLAUSES).splits['all']
    done = [score(rows.select(a), rows.select(b)) for a, b in GroupKFold(5).split(np.zeros(len(rows)), groups=rows['group'][:])]
    assert np.mean([a for a, _ in done]) == pytest.approx(.744, abs=.01) and np.mean([b for _, b in done]) == pytest.approx(.811, abs=.01)


@needs(DATA / 'context_toxicity')
def test_a_table_with_a_text_and_a_label():
    read = read_labels(DATA / 'context_toxicity' / 'gn.csv.gz')
    assert (read.form, read.classes, read.words, len(read.splits['all'])) == ('columns', ('0', '1'), (), 10000)
