"""Cases that were kept aside: multiple-choice questions, labels that are none, public sets by other columns, odd files of scores, odd
settings; each is right or one sentence that says what, where and what to do"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.data.columns import unread_columns
from w2s.data.label_readers import UNKNOWN, read_labels
from w2s.data.messages import conversation
from w2s.data.questions import read_asked_file
from w2s.data.readers import read_preferences
from w2s.data.tables import RawTable
from w2s.errors import ConfigError, DataError

N = range(24)


def jsonl(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in rows), encoding='utf-8')
    return path


def ask(i): return f'Which of the lamps on the table is lit number {i}?'
def yes(i): return f'Lamp {i} it is'
def no(i): return f'Not lamp {i}'


# Multiple-choice questions: the label is a number or a letter of an answer, and says nothing without the answers

def options(i): return [no(i), yes(i), 'Never that', 'Perhaps so', 'So it was'][i % 2:][:4] # the right answer is at place 1 - i % 2
def place(i): return 1 - i % 2
def columns(i, *names): return dict(zip(names, options(i), strict=False))


CHOICES = { # name -> row; the right answer is yes(i)
    'WinoGrande': lambda i: dict(sentence=ask(i), **columns(i, 'option1', 'option2'), answer=str(place(i) + 1)),
    'Social IQA': lambda i: dict(context=ask(i), question='Why?', **columns(i, 'answerA', 'answerB', 'answerC'), label=str(place(i) + 1)),
    'BBQ': lambda i: dict(context=ask(i), question='Who?', **columns(i, 'ans0', 'ans1', 'ans2'), label=place(i), category='Age'),
    'COPA': lambda i: dict(premise=ask(i), question='cause', **columns(i, 'choice1', 'choice2'), label=place(i), idx=i),
    'SWAG': lambda i: dict(
        startphrase=ask(i), sent1=ask(i), sent2='He', **columns(i, 'ending0', 'ending1', 'ending2', 'ending3'), label=place(i)
    ),
    'MedMCQA': lambda i: dict(question=ask(i), **columns(i, 'opa', 'opb', 'opc', 'opd'), cop=place(i), choice_type='single'),
    'MedQA': lambda i: dict(question=ask(i), options=columns(i, 'A', 'B', 'C'), answer=yes(i), answer_idx='AB'[place(i)]),
    'MMLU-Pro': lambda i: dict(question=ask(i), options=options(i), answer='AB'[place(i)], answer_index=place(i), cot_content=''),
    'AQuA': lambda i: dict(question=ask(i), options=options(i), rationale='So it is.', correct='AB'[place(i)]),
    'QuALITY': lambda i: dict(article=f'{ask(i)} {ask(i)}', question=ask(i), options=options(i), gold_label=place(i) + 1),
    'LogiQA': lambda i: dict(context=ask(i), query='Which?', options=options(i), correct_option=place(i)),
    'QuAIL': lambda i: dict(context=ask(i), question='Which?', answers=options(i), correct_answer_id=str(place(i))),
    'MMLU, numbered from 1': lambda i: dict(question=ask(i), choices=options(i)[:2], answer=place(i) + 1),
}


@pytest.mark.parametrize('name', CHOICES)
def test_answers_to_choose_from_are_read(tmp_path, name):
    read = read_labels(jsonl(tmp_path/'x.jsonl', map(CHOICES[name], N)))
    ds = read.splits['all']
    assert read.classes == ('right', 'wrong') and len(ds) == len(N) and set(ds['label']) == {0, 1}
    for i, (prompt, label) in enumerate(zip(ds['prompt'], ds['label'], strict=True)):
        assert ask(i) in prompt and (yes(i) in prompt) == (label == 0) and sum(o in prompt for o in options(i)) == 1
        assert all(str(v) in prompt for k, v in CHOICES[name](i).items() if k in ('context', 'premise', 'question', 'query', 'article'))


@pytest.mark.parametrize('name', CHOICES)
def test_answers_to_choose_from_are_not_left_out_without_a_word(tmp_path, name):
    "Where the user names the text, too"
    rows = list(map(CHOICES[name], N))
    text = next(c for c in ('question', 'query', 'sentence', 'startphrase') if c in rows[0])
    keys = {'MedMCQA': 'cop', 'MMLU-Pro': 'answer', 'COPA': 'label', 'BBQ': 'label'}
    label = keys.get(name, list(rows[0])[-1])
    named = ','.join(c for c in ('context', 'premise', 'article', text) if c in rows[0])
    with pytest.raises(DataError, match='would not be read.*--leave-out'):
        read_labels(jsonl(tmp_path / 'x.jsonl', rows), text=named, label=label)


@pytest.mark.parametrize('column', ['options', 'choices', 'option1', 'Option_A', 'answer b', 'ending0', 'opc', 'distractors'])
def test_other_names_of_answers_stop_every_reader(column):
    from datasets import Dataset
    raw = RawTable(Dataset.from_list([{'question': ask(i), column: 'red', 'y': i % 2} for i in N]))
    assert column in unread_columns(raw, dict(text=('question',), label=('y',)), ['text'])[0]
    numbers = RawTable(Dataset.from_list([{'question': 'a', column: i, 'y': 1} for i in N]))
    assert not unread_columns(numbers, dict(text=('question',)), ['text'])[0]


@pytest.mark.parametrize('name', ['MMLU-Pro', 'WinoGrande', 'SWAG'])
def test_a_test_file_without_answers_is_said(tmp_path, name):
    key = dict(zip(('MMLU-Pro', 'WinoGrande', 'SWAG'), ('answer', 'answer', 'label'), strict=True))[name]
    with pytest.raises(DataError, match=f'x.jsonl: no row says which of .* is the right answer .column "{key}".*training or validation'):
        read_labels(jsonl(tmp_path/'x.jsonl', [CHOICES[name](i) | {key: ''} for i in N]))


# Labels that are none

def texts(label): return [dict(sentence=f'The river is {i} feet deep today.', label=label(i)) for i in N]


@pytest.mark.parametrize('label, none', [((0, 1), -1), (('neg', 'pos'), '-1'), ((0, 1, 2), -1), ((0, 1), None), (('a', 'b'), 'N.A.')])
def test_a_test_file_without_labels_is_said(tmp_path, label, none):
    "As GLUE has it: -1 is no third class"
    jsonl(tmp_path/'d'/'train.jsonl', texts(lambda i: label[i % len(label)]))
    jsonl(tmp_path/'d'/'test.jsonl', texts(lambda i: none))
    with pytest.raises(DataError, match='test.jsonl: no row has a label .column "label".*--split train=train,test=validation'):
        read_labels(tmp_path/'d')


@pytest.mark.parametrize('some', ['-1', 'missing', 'undefined', '—', '[]', 'unlabeled', 'N.A.'])
def test_a_cell_that_says_nothing_is_no_class(tmp_path, some):
    read = read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i: ('no', 'yes', some)[i % 3])))
    assert read.classes == ('no', 'yes') and len(read.refused) == 8
    assert str(some) in read_labels(tmp_path/'x.jsonl', classes=('no', 'yes', str(some))).classes


def test_two_classes_of_which_one_is_minus_one_stay(tmp_path):
    for pair in ((-1, 1), (-1, 0)):
        assert read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i, p=pair: p[i % 2]))).classes == tuple(map(str, pair))


@pytest.mark.parametrize('labels, told', [
    ([[0], [1]], 'column "label" holds .0.; a label is one class'),
    ([[0, 2], [1]], 'a label is one class'),
    ([dict(a=0), dict(a=1)], 'a label is one class'),
    ([.2, .7, 1.4], r'column "label" holds scores .0.2, 0.7, 1.4., not classes.*--threshold'),
    (['1.5', '0'], 'holds scores'),
    (['x' * 200, 'y'], 'at most 100 characters'),
    (['a\nb', 'c'], 'one line'),
    (['1', '１'], 'differ in the way that characters are written'),
    (['Yes', 'yes'], 'differ in case'),
], ids=lambda x: str(x)[:20])
def test_labels_that_are_no_classes_are_said(tmp_path, labels, told):
    with pytest.raises(DataError, match=told) as e: read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i: labels[i % len(labels)])))
    assert len(str(e.value)) < 500 and '\n' not in str(e.value)


def test_odd_digits_are_classes(tmp_path):
    assert read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i: ('²', '10', '3')[i % 3]))).classes == ('3', '10', '²')
    assert read_labels(jsonl(tmp_path/'y.jsonl', texts(lambda i: ('1.5', 'draft')[i % 2]))).classes == ('1.5', 'draft')


@pytest.mark.parametrize('row, parts', [
    (dict(title='Some river', content='It is long and wide.', label=3), ('Some river', 'It is long')),
    (dict(word='bank', sentence1='By the bank.', sentence2='In the bank.', label=1), ('bank', 'By the', 'In the')),
])
def test_all_texts_of_a_set_are_read(tmp_path, row, parts):
    read = read_labels(jsonl(tmp_path/'x.jsonl', [row | dict(label=i % 2 if 'word' in row else i % 5) for i in N]))
    assert all(p in read.splits['all']['prompt'][0] for p in parts)


# Public preferences and demonstrations by other columns

def user(t): return dict(role='user', content=t)
def bot(t): return dict(role='assistant', content=t)


PAIRS = {
    'HelpSteer3 edits': lambda i: dict(
        domain='general', context=[user(ask(i))], original_response=no(i), edited_response=yes(i), change_summary=ask(i), feedback=[ask(i)]
    ),
    'HelpSteer3 edit quality': lambda i: dict(
        context=[user(ask(i))], original_response='So?', good_edited_response=yes(i), bad_edited_response=no(i), feedback=[ask(i)]
    ),
    'CodeUltraFeedback': lambda i: dict(
        instruction=ask(i),
        responses=[dict(model='m', response=no(i)), dict(model='n', response=yes(i)), dict(model='o', response='So?')],
        annotations=[dict(model=m, rating=r, rationale=ask(i)) for m, r in (('n', '5'), ('m', '1'), ('o', '3'))],
        preference='readability',
    ),
    'Arena 140k': lambda i: dict(
        winner='model_a',
        conversation_a=[user(ask(i)), bot(yes(i))],
        conversation_b=[user(ask(i)), bot(no(i))],
        full_conversation=[dict(user=user(ask(i)), model_side_a=bot(yes(i)), model_side_b=bot(no(i)))],
    ),
    'Magpie': lambda i: dict(
        instruction=ask(i),
        gen_input_configs=dict(temperature=1.),
        responses=[yes(i), no(i), ask(i) * 5],
        chosen=[user(ask(i)), bot(yes(i))],
        rejected=[user(ask(i)), bot(no(i))],
    ),
    'PairRM': lambda i: dict(
        prompt=ask(i), chosen=[user(ask(i)), bot(yes(i))], rejected=[user(ask(i)), bot(no(i))], all_generated_responses=[yes(i), ask(i) * 5]
    ),
    'selected': lambda i: dict(prompt=ask(i), selected=yes(i), rejected=no(i)),
    'a name with a space': lambda i: dict(prompt=ask(i), response_a=yes(i), response_b=no(i), winner='Response A'),
    'an assistant': lambda i: dict(prompt=ask(i), response_a=no(i), response_b=yes(i), winner='assistant-b'),
}


@pytest.mark.parametrize('name', PAIRS)
def test_pairs_by_other_columns(tmp_path, name):
    ds = read_preferences(jsonl(tmp_path/'x.jsonl', map(PAIRS[name], N))).splits['all']
    assert [(c, r) for c, r in zip(ds['chosen'], ds['rejected'], strict=True)] == [(yes(i), no(i)) for i in N]
    assert all(ask(i) in str(p) for i, p in enumerate(ds['prompt']))


@pytest.mark.parametrize('tie', ['tie (inconsistent)', 'Tie', 'tie_both', 'both bad'])
def test_ties_are_counted_however_they_are_written(tmp_path, tie):
    rows = [dict(prompt=ask(i), response_a=yes(i), response_b=no(i), winner=tie if i == 3 else 'a') for i in N]
    assert [r.row for r in read_preferences(jsonl(tmp_path/'x.jsonl', rows)).refused] == [4]


@pytest.mark.parametrize('row, hint', [
    (dict(system='', question='q', chosen='a', rejected='b'), r'\(--column prompt=notes\+system\+question\)'),
    (dict(instruction='q', chosen='a', rejected='b'), r'\(--column prompt=notes\+instruction\)'),
    (dict(chosen='\n\nHuman: q\n\nAssistant: a', rejected='\n\nHuman: q\n\nAssistant: b'), r'read\. Say that it is not to be read'),
])
def test_the_hint_names_columns_that_are_there_and_works(tmp_path, row, hint):
    "It said prompt=notes+prompt to a file without a column prompt"
    rows = [{k: v.replace('q', ask(i)) for k, v in row.items()} | dict(notes=f'{ask(i)} {ask(i + 1)} {ask(i + 2)}') for i in N]
    path = jsonl(tmp_path/'x.jsonl', rows)
    with pytest.raises(DataError, match=hint): read_preferences(path)
    if '--column' in hint:
        named = dict(prompt=hint.split('prompt=')[1].replace('\\', '').rstrip(')'), chosen='chosen', rejected='rejected')
        assert ask(7) in read_preferences(path, columns=named).splits['all']['prompt'][5]


WILD = dict(country='', hashed_ip='f0', header={'accept-language': 'en'}, language='English', state='x', timestamp='2024', toxic=False)
TALKS = {
    'WildChat': lambda i: dict(conversation=[user(ask(i)) | WILD, bot(yes(i)) | WILD], turn=1, model='m'),
    'Capybara': lambda i: dict(source='x', conversation=[dict(input=ask(i), output=yes(i))]),
    'UltraChat, first form': lambda i: dict(id=str(i), data=[ask(i), yes(i)]),
}


@pytest.mark.parametrize('name', TALKS)
def test_conversations_by_other_columns(tmp_path, name):
    read = read_asked_file(jsonl(tmp_path/'x.jsonl', map(TALKS[name], N)), answers='needed')
    assert read.questions == [ask(i) for i in N] and read.answers == [yes(i) for i in N]


def test_what_is_said_with_a_message_is_not_dropped():
    assert conversation([user('a') | dict(images=['x'])]) is None and conversation([bot('a') | dict(tool_calls=[dict(f=1)])]) is None


def test_questions_say_which_column_to_name(tmp_path):
    path = jsonl(tmp_path/'x.jsonl', [dict(document=ask(i), summary=yes(i)) for i in N])
    with pytest.raises(DataError, match='--column question=COLUMN'): read_asked_file(path)
    path = jsonl(tmp_path/'y.jsonl', [dict(question=ask(i), answer=[yes(i)]) for i in N])
    with pytest.raises(DataError, match='24 × the answer is a list or an object, not one text'): read_asked_file(path)


# Files of scores

SCORES = [dict(id=f'a{i}', score=float(i % 2)) for i in N]
LM = [dict(doc_id=i, doc={}, target='x', metrics=['acc'], acc=float(i % 2), filter='none') for i in N]
NOTE = [dict(instruction=f'q{i}', output_1='a', output_2='b', generator_1='ref', generator_2='m', annotator='x', preference=1.5) for i in N]
LOG = dict(status='success', eval=dict(task='t'), samples=[dict(id=i, epoch=1, scores=dict(match=dict(value='C'))) for i in N])


def compared(*words):
    done = CliRunner().invoke(app, ['compare', *map(str, words)])
    if done.exception and not isinstance(done.exception, SystemExit): raise done.exception
    return done.output


@pytest.mark.parametrize('second, told', [
    ([r | dict(score=1e308) for r in SCORES], 'b.jsonl, row 1: the score "score" is 1e.308, beyond 1e.100'),
    ([r | dict(score=10**120) for r in SCORES], 'beyond 1e.100'),
    ([r | dict(score=float('inf')) for r in SCORES], 'not a finite number'),
])
def test_scores_too_large_to_be_averaged(tmp_path, second, told):
    with pytest.raises(DataError, match=told): compared(jsonl(tmp_path/'a.jsonl', SCORES), jsonl(tmp_path/'b.jsonl', second))


@pytest.mark.parametrize('form, rows', [('.jsonl', SCORES), ('.json', NOTE)])
@pytest.mark.parametrize('flag, name', [('--filter', 'x'), ('--id', 'x')])
def test_an_option_without_effect_is_refused(tmp_path, form, rows, flag, name):
    if flag == '--id' and form == '.jsonl': return # a table has ids
    path = tmp_path/f'a{form}'
    jsonl(path, rows) if form == '.jsonl' else path.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=f'{flag} x: none of the files is of the kind'): compared(path, path, flag, name)


def test_a_metric_that_a_row_lacks_is_said(tmp_path):
    "It said: unknown metric acc; did you mean acc?"
    bare = [{k: v for k, v in r.items() if k != 'acc'} if i == 2 else r for i, r in enumerate(LM)]
    with pytest.raises(DataError, match='row 3: "metrics" names acc, and the row has no such score'):
        compared(jsonl(tmp_path/'samples_a.jsonl', LM), jsonl(tmp_path/'samples_b.jsonl', bare))


@pytest.mark.parametrize('change, told', [
    (dict(generator_1='other'), 'against ref, judged by x; against other, judged by x; as for 24 of 24'),
    (dict(annotator='y'), 'judged by x; against ref, judged by y'),
])
def test_annotations_against_another_reference_or_by_another_judge(tmp_path, change, told):
    (tmp_path/'a.json').write_text(json.dumps(NOTE))
    (tmp_path/'b.json').write_text(json.dumps([r | change for r in NOTE]))
    with pytest.raises(DataError, match=told): compared(tmp_path/'a.json', tmp_path/'b.json')


@pytest.mark.parametrize('key', ['generator_1', 'generator_2'])
def test_annotations_of_two_models_are_not_averaged(tmp_path, key):
    (tmp_path/'a.json').write_text(json.dumps([r | ({key: 'other'} if i == 4 else {}) for i, r in enumerate(NOTE)]))
    with pytest.raises(DataError, match='row 5: it is .*one file of annotations is of one model and one reference'):
        compared(tmp_path/'a.json', tmp_path/'a.json')


def test_a_log_without_a_version_is_said(tmp_path):
    (tmp_path/'a.json').write_text(json.dumps(LOG))
    with pytest.raises(DataError, match='an Inspect log of version None; version 2 is known'):
        compared(tmp_path/'a.json', tmp_path/'a.json')


def test_scales_that_differ_are_said_and_one_cluster_has_no_interval(tmp_path):
    a, b = jsonl(tmp_path/'a.jsonl', SCORES), jsonl(tmp_path/'b.jsonl', [r | dict(score=100 * r['score']) for r in SCORES])
    assert 'may be on different scales (a from 0 to 1, b from 0 to 100)' in compared(a, b) and 'different scales' not in compared(a, a)
    one = jsonl(tmp_path/'c.jsonl', [r | dict(doc='d', score=float(i % 3 == 0)) for i, r in enumerate(SCORES)])
    assert 'not known: there is one row or cluster' in compared(a, one, '--cluster', 'doc')


@pytest.mark.parametrize('words', [('x=', 'a.jsonl'), ('', 'a.jsonl')])
def test_a_source_without_a_name(tmp_path, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path/'a.jsonl', SCORES)
    with pytest.raises(ConfigError, match='names no file'): compared(*words)


# Names and settings

@pytest.mark.parametrize('words', [('verify',), ('clean', '--yes'), ('report',), ('export',), ('notebooks',)], ids=lambda w: w[0])
def test_an_empty_name_is_not_the_folder_of_the_command(tmp_path, words, monkeypatch):
    "w2s clean $DIR, where DIR is not set, would clean here"
    monkeypatch.chdir(tmp_path)
    (tmp_path/'stages'/'.unfinished-1').mkdir(parents=True)
    done = CliRunner().invoke(app, [*words, ''])
    assert done.exit_code == 2 and 'it is empty' in done.output and (tmp_path/'stages'/'.unfinished-1').is_dir()


@pytest.mark.parametrize('kind, words', [
    ('preferences', ('--weak', '')),
    ('preferences', ('--strong', ' ')),
    ('preferences', ('--weak', 'pico+')),
    ('toxicity', ('--strong', '')),
    ('persona', ('--strong', '')),
], ids=str)
def test_a_model_without_a_name(kind, words):
    "It was an AxisError, after minutes"
    done = CliRunner().invoke(app, ['run', kind, *words, '--dry-run'])
    assert isinstance(done.exception, ConfigError) and f'{words[0][2:]} is empty' in str(done.exception), done.exception


@pytest.mark.parametrize('seeds', ['1001', '9' * 400])
@pytest.mark.parametrize('kind', ['preferences', 'safety', 'persona', 'toxicity'])
def test_more_seeds_than_anybody_has_time_for(kind, seeds):
    done = CliRunner().invoke(app, ['run', kind, '--seeds', seeds, '--dry-run'])
    assert isinstance(done.exception, ConfigError) and 'it must be at most 1,000' in str(done.exception) and len(str(done.exception)) < 100


ROOT = Path(__file__).parents[1]
AT_ONCE = { # words -> what is said, before PyTorch is loaded
    'refine --questions q.jsonl --strong picoo --out r.jsonl --dry-run': 'did you mean "pico"?',
    'refine --questions q.jsonl --strong q --out r.jsonl --dry-run': 'no config.json',
    'label --model pico --rows q.jsonl --train t.jsonl --out o.parquet --calibrate 2': '--calibrate is 2.0',
    'label --model pico --rows q.jsonl --train t.jsonl --out o.parquet --beta nan': 'nan',
    'label --model pico --rows q.jsonl --train t.jsonl --out o.parquet --train-rows 1': 'at least 4 labelled pairs',
    'plan': 'name an experiment',
}


@pytest.mark.parametrize('words', AT_ONCE)
def test_what_is_said_at_once(tmp_path, words):
    for name in ('q', 't'): jsonl(tmp_path/f'{name}.jsonl', [dict(question=ask(i), prompt=ask(i), chosen='a', rejected='b') for i in N])
    (tmp_path/'q').mkdir()
    code = f"import atexit, sys\natexit.register(lambda: print('torch' in sys.modules))\nsys.argv = ['w2s', *{words.split()!r}]\n" \
           "from w2s.cli.app import main\nmain()"
    env = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode and AT_ONCE[words] in done.stderr and done.stdout.split()[-1] == 'False', done.stdout + done.stderr


@pytest.mark.parametrize('out, told', [('d.jsonl', 'folder'), ('r.txt', 'as a .jsonl file'), ('q.jsonl', 'give --out another name')])
def test_the_plan_of_a_refinement_looks_at_out(tmp_path, out, told, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'d.jsonl').mkdir()
    jsonl(tmp_path/'q.jsonl', [dict(question=ask(i), answer=yes(i)) for i in N])
    done = CliRunner().invoke(app, ['refine', '--questions', 'q.jsonl', '--strong', 'pico', '--out', out, '--dry-run'])
    assert isinstance(done.exception, ConfigError) and told in str(done.exception), done.exception


# Labels that are not known, and numbers that are written in two ways

@pytest.mark.parametrize('some', ['unknown', 'Unknown', 'UNK', 'not available', 'unspecified', 'not annotated', 'No label'])
def test_a_label_that_is_not_known_is_no_class(tmp_path, some):
    path = jsonl(tmp_path/'x.jsonl', texts(lambda i: ('no', 'yes', some)[i % 3]))
    read = read_labels(path)
    assert read.classes == ('no', 'yes') and {r.reason for r in read.refused} == {UNKNOWN} and len(read.refused) == 8
    named = read_labels(path, classes=('no', 'yes', some))
    assert named.classes == ('no', 'yes', some) and not named.refused


def test_unknown_stays_where_it_is_a_class(tmp_path):
    assert read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i: ('known', 'unknown')[i % 2]))).classes == ('known', 'unknown')


def test_the_declared_classes_of_a_data_set_are_classes(tmp_path):
    "A class none was dropped as missing, as of stance detection"
    from datasets import ClassLabel, Dataset
    names = ['none', 'against', 'favor', 'unknown']
    ds = Dataset.from_list(texts(lambda i: i % 4)).cast_column('label', ClassLabel(names=names))
    ds.to_parquet(tmp_path/'x.parquet')
    read = read_labels(tmp_path/'x.parquet')
    assert sorted(read.classes) == sorted(names) and not read.refused


@pytest.mark.parametrize('pair', [('01', '1'), ('1', '+1'), ('1.50', '1.5'), ('007', '7')])
def test_a_number_that_is_written_in_two_ways(tmp_path, pair):
    with pytest.raises(DataError, match='differ in the way that a number is written only; write them in one way'):
        read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i: (*pair, 'other')[i % 3])))
    assert read_labels(jsonl(tmp_path/'x.jsonl', texts(lambda i: ('01', '02', '10')[i % 3]))).classes == ('01', '02', '10')
