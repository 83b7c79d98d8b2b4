"Further test sets: their files, their items and their rule, what is left out of them, and one implementation behind all kinds of feedback"

import json

import numpy as np
import pandas as pd
import pytest

from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.demonstration_tasks import world_rows
from w2s.compare.demonstration_tests import world_questions
from w2s.compare.further_tests import SEEN
from w2s.compare.label_data import world_labels
from w2s.compare.label_settings import fill_labels
from w2s.compare.label_tests import read_label_test
from w2s.compare.preference_data import LoadedData
from w2s.compare.preference_settings import WeakTeacher
from w2s.compare.preference_tests import INCOMPLETE, pairs_to_items, read_pair_test, whole_items
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.data.names import named_sources
from w2s.data.readers import read_preferences
from w2s.data.report import DataReport
from w2s.data.rows import make_rows
from w2s.errors import ConfigError, DataError
from w2s.evaluate.best_of_several import item_correct, pair_words, subset_metrics
from w2s.world.facts import make_world
from w2s.world.personas import questions

ROWS = make_rows([dict(prompt='Nothing alike?', chosen='Yes.', rejected='No.')], 'preferences')
NOTHING = LoadedData({}, ROWS, DataReport(), '')


def wrote(folder, rows, name='t.jsonl'):
    file = folder / name
    file.write_text(json.dumps(rows) if name.endswith('.json') else '\n'.join(json.dumps(r) for r in rows), encoding='utf-8')
    return str(file)


def pair_test(folder, rows, data=NOTHING, **options):
    return read_pair_test(WeakTeacher(), [], data, 'x', wrote(folder, rows, **options))


def best(i, **more):
    return (
        dict(
            id=str(i),
            prompt=f'Question {i}?',
            chosen=[f'good {i}'],
            rejected=[f'bad {i} {k}' for k in range(3)],
            num_correct=1,
            num_rejected=3,
            total_completions=4,
            models=['a', 'b', 'c', 'd'],
            subset=('Focus', 'Maths')[i % 2],
            additional_metadata=None,
        )
        | more
    )


def judged(i, **more):
    return (
        dict(
            pair_id=f'{i:032x}',
            original_id=str(i),
            source=('mmlu-pro-law', 'livebench-math')[i % 2],
            question=f'What is {i} + 1?',
            response_model='m',
            response_A=f'It is {i + 1}.',
            response_B=f'It is {i}.',
            label='A>B',
        )
        | more
    )


def followed(i, **more):
    return dict(input=f'Say {i}.', output_1=f'{i}', output_2='No.', label=1) | more


@pytest.mark.parametrize(
    ('rows', 'pairs', 'items', 'subsets'),
    [
        ([best(i) for i in range(4)], 12, 4, {'Focus', 'Maths'}),
        ([best(i, chosen=f'good {i}') for i in range(4)], 12, 4, {'Focus', 'Maths'}),  # a text beside a list
        ([best(i, chosen=[f'good {i}', f'fine {i}']) for i in range(4)], 24, 4, {'Focus', 'Maths'}),  # the subset of ties
        ([best(i, rejected=[f'bad {i}'] * 2) for i in range(4)], 4, 4, {'Focus', 'Maths'}),  # the same bad response twice
        ([judged(i) for i in range(4)], 4, 4, {'livebench-math', 'mmlu-pro-law'}),
        ([judged(0), judged(0, response_A='It is 0.', response_B='It is 1.', label='B>A'), judged(1)], 2, 2, set()),  # both orders
        ([followed(i) for i in range(4)], 4, 4, set()),
        ([followed(i, label=2, subset=('a', 'b')[i % 2]) for i in range(4)], 4, 4, {'a', 'b'}),
    ],
    ids=['rewardbench2', 'text-and-list', 'ties', 'twice', 'judgebench', 'both-orders', 'llmbar', 'llmbar-subsets'],
)
def test_published_forms_are_items(tmp_path, rows, pairs, items, subsets):
    test = pair_test(tmp_path, rows)
    assert (len(test.rows), len(set(test.extra['items'])), set(test.subsets.values())) == (pairs, items, subsets)
    assert set(test.groups) == set(test.extra['items'])
    if 'input' in rows[0]:
        assert {c == 'No.' for c in test.rows['chosen']} == {rows[0]['label'] == 2}
    if 'question' in rows[0]:
        assert all(int(c.split()[2][:-1]) == int(p.split()[2]) + 1 for p, c in zip(test.rows['prompt'], test.rows['chosen'], strict=True))


@pytest.mark.parametrize(
    ('rows', 'told'),
    [
        ([judged(0), judged(1, label='C>D')], 'row 2: label'),
        ([followed(0), followed(1), followed(2, label=3)], 'row 3: label'),
        ([dict(question='What?', answer='That.')], 'no known form'),
        ([best(0, chosen=[]), best(1, rejected=[])], 'rows left'),
    ],
    ids=['judgebench', 'llmbar', 'no-form', 'no-responses'],
)
def test_a_bad_file_is_one_sentence(tmp_path, rows, told):
    with pytest.raises(DataError, match=told) as e:
        pair_test(tmp_path, rows)
    assert 't.jsonl' in str(e.value) or 'x' in str(e.value)


def test_a_row_without_responses_is_counted_with_its_number(tmp_path):
    test = pair_test(tmp_path, [best(0), best(1, rejected=[]), best(2, rejected=[None, 'bad']), best(3)])
    found = test.report.found.set_index('check')['detail'].to_dict()
    assert len(test.groups) == 2 and found['fewer than two responses, or none with a score'] == 'row 2'
    assert found['a text is missing (null)'] == 'row 3'


def test_lists_of_responses_are_training_rows_too(tmp_path):
    read = read_preferences(wrote(tmp_path, [best(i) for i in range(3)]))
    assert read.numbers == {'all': (1, 1, 1, 2, 2, 2, 3, 3, 3)} and len(set(read.splits['all']['group'])) == 3


def test_plain_pairs_read_as_before(tmp_path):
    read = read_preferences(wrote(tmp_path, [dict(prompt=f'p {i}', chosen='yes', rejected='no') for i in range(3)]))
    assert read.numbers == {'all': (1, 2, 3)} and read.splits['all']['chosen'][:] == ['yes'] * 3


def test_the_chosen_must_win_over_all():
    ids, right = item_correct([1, 2, 3, 1, -1, 5, 0, 2, 2, 0, 0, 1, 0], [*'aaabbbcccddde'][:13])
    assert dict(zip(ids, right, strict=True)) == dict(a=1, b=0, c=1 / 2, d=1 / 3, e=1 / 2)


def test_the_mean_of_subsets_counts_each_once():
    subsets = dict(a='law', b='law', c='law', d='maths')
    whole, *parts = subset_metrics(list('abcd'), np.array([1.0, 1, 0, 0]), subsets)
    assert whole[1]['accuracy, mean of subsets'].mean() == pytest.approx((2 / 3 + 0) / 2)
    assert {k: v.mean() for _, m in parts for k, v in m.items()} == pytest.approx({'accuracy, law': 2 / 3, 'accuracy, maths': 0})


def test_scores_of_pairs_become_scores_of_items(tmp_path):
    test = pair_test(tmp_path, [best(i) for i in range(2)])
    found = pairs_to_items({'margin': np.array([3.0, 1, 2, 3, -1, 2])}, test)
    assert found[0][1]['accuracy'].tolist() == [1, 0] and found[-1][1]['margin'].tolist() == [1, -1]


def test_an_item_goes_with_any_of_its_pairs(tmp_path):
    read = read_preferences(wrote(tmp_path, [best(i) for i in range(2)]))
    rows, numbers, report = whole_items(
        read.splits['all'].select([0, 2, 3, 4, 5]), read.splits['all'], read.numbers['all'], 'x', DataReport()
    )
    assert numbers == [2, 2, 2] and len(rows) == 3
    assert report.found[['check', 'rows', 'detail']].to_numpy().tolist() == [[INCOMPLETE, 2, 'row 1']]


@pytest.mark.parametrize('train', [[0], [0, 3]])
def test_what_was_trained_on_is_left_out_and_counted(tmp_path, train):
    test = pair_test(tmp_path, [best(i) for i in range(5)])
    known = LoadedData(
        {'train': make_rows([dict(prompt=f'question {i}?', chosen='a', rejected='b') for i in train], 'preferences')},
        ROWS,
        DataReport(),
        '',
    )
    again = pair_test(tmp_path, [best(i) for i in range(5)], known)
    assert len(again.groups) == len(test.groups) - len(train)
    line = again.report.found.set_index('check').loc[SEEN]
    assert (line['rows'], line['detail'].split(' …')[0]) == (3 * len(train), 'row ' + ', '.join(str(i + 1) for i in train))


def test_a_test_that_was_trained_on_whole_is_refused(tmp_path):
    known = LoadedData(
        {'train': make_rows([dict(prompt=f'Question {i}?', chosen='a', rejected='b') for i in range(2)], 'preferences')},
        ROWS,
        DataReport(),
        '',
    )
    with pytest.raises(DataError, match='it tests nothing'):
        pair_test(tmp_path, [best(i) for i in range(2)], known)


@pytest.mark.parametrize(
    ('given', 'told'),
    [
        (('a=x', 'a=y'), 'names a twice'),
        (('=x',), 'no name for a test set'),
        (('a b=x',), 'no name for a test set'),
        (('a=',), 'name=path'),
        (('p/a.csv', 'q/a.csv'), 'names a twice'),
    ],
)
def test_names_are_checked_with_the_settings(given, told):
    with pytest.raises(ConfigError, match=told):
        named_sources(given, '--also-test')
    for fill in (fill_labels, fill_demonstrations, fill_toxicity):
        with pytest.raises(ConfigError, match=told):
            fill(dict(also_test=list(given)))


def test_label_tests_have_the_classes_of_the_run(tmp_path):
    config = fill_labels(dict(data='world:safety', seeds=1, n_labelled=20, n_unlabelled=20, n_test=20))
    data = world_labels(config)
    rows = [dict(text=f'Is number {i} kind?', label=('no', 'yes')[i % 2]) for i in range(6)]
    assert len(read_label_test(config, [], data, 'x', wrote(tmp_path, rows)).rows) == 6
    other = [r | dict(label={'no': 'low', 'yes': 'high'}[r['label']]) for r in rows]
    with pytest.raises(DataError, match='no row has the class "no"'):
        read_label_test(config, [], data, 'x', wrote(tmp_path, other))


@pytest.mark.parametrize(
    ('change', 'told'),
    [
        (dict(attribute=None), 'row 2: column "attribute" is empty'),
        (dict(name='Nobody Known'), 'row 2: '),
        (dict(prompt='Who?'), 'row 2: '),
        (dict(attribute='colour of the shoe'), 'row 2: '),
    ],
)
def test_rows_that_an_oracle_cannot_read_are_named(change, told):
    rows = questions(make_world(), 3, 7)
    rows[1] |= change
    with pytest.raises(DataError, match=told):
        world_questions(world_rows('persona', 0, (4, 4, 4)).test, rows, 'more.jsonl', 'more')


def test_a_bag_of_words_knows_the_training_pairs_alone():
    good, bad = [f'thank you {i}' for i in range(4)], [f'you fool {i}' for i in range(4)]
    margins = pair_words(good, bad, ['thank you', 'unknown words'], ['fool', 'others there'])
    assert margins[0] > 0 and margins[1] == 0


def test_toxicity_has_no_twin():
    with pytest.raises(ConfigError, match='twin'):
        fill_toxicity(dict(twin=True))


def test_the_tables_of_one_test_are_those_of_many():
    from w2s.compare.tables import Kind, pair_up, recover_gaps
    from w2s.compare.transfer import MAIN, transfer_tables
    from w2s.evaluate.metrics import metric_rows

    def arm(role, share):
        right = (np.arange(40) < share * 40).astype(float)
        return metric_rows(
            [f'e{i}' for i in range(40)],
            {'accuracy': right},
            role,
            'm',
            '' if role == 'ceiling' else 'w',
            '' if role == 'floor' else 's',
            0,
            't',
        )

    units = pd.concat([arm(r, s) for r, s in (('floor', 0.4), ('student', 0.6), ('ceiling', 0.9))], ignore_index=True)
    kind = Kind('labels', ('accuracy',), ('accuracy',), lambda m: pair_up(m, ('student', ''), ('floor', '')))
    tables = transfer_tables({MAIN: units, 'same': units}, kind)
    alone = recover_gaps(units, kind)
    for name in (MAIN, 'same'):
        mine = tables['also_pgr'][tables['also_pgr']['test'] == name].drop(columns='test').reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone)
    assert tables['also_pgr']['value'].tolist() == pytest.approx([0.4, 0.4])  # (.6 − .4)/(.9 − .4)


def test_a_finished_command_looks_at_the_files_of_further_tests(tmp_path, monkeypatch):
    "A file that has changed must not be answered from what was said before"
    from w2s.cli.repeat import input_places

    monkeypatch.chdir(tmp_path)
    wrote(tmp_path, [best(0)], name='rb2.jsonl')
    for given in ('x=rb2.jsonl', 'rb2.jsonl', f'x={tmp_path}/rb2.jsonl'):
        assert [p.name for p in input_places({'also_test': [given]}, [], ['world'])] == ['rb2.jsonl']
    for given in ('x=gone.jsonl', 'x=somebody/set', 'x=imdb'): # only the hub knows what it is now
        assert input_places({'also_test': [given]}, [], ['world']) is None
