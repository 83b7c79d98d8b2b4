"Score files of other tools, written by those tools, and the textbook: what is compared, what is left out, what is refused"
import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.data.score_files import Item, gather_items, read_scores
from w2s.errors import ConfigError, DataError
from w2s.evaluate.paired import compare_results

TASK = '''task: more
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
'''


def w2s(*words, monkeypatch):
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    monkeypatch.setenv('COLUMNS', '2000')
    return CliRunner().invoke(app, ['compare', *map(str, words)])


def textbook(d, groups):
    "Mean, ends of the 95 % interval and p-value of a mean of clusters, from first principles (one loop, no library of ours)"
    d, groups = np.asarray(d, float), np.asarray(groups)
    sums = [sum(x - d.mean() for x, g in zip(d, groups, strict=True) if g == k) for k in dict.fromkeys(groups)]
    k = len(sums)
    error = math.sqrt(k/(k - 1)*sum(s*s for s in sums))/len(d)
    return (
        d.mean(),
        d.mean() - stats.t.ppf(0.975, k - 1) * error,
        d.mean() + stats.t.ppf(0.975, k - 1) * error,
        2 * stats.t.sf(abs(d.mean() / error), k - 1),
    )


@pytest.fixture(scope='module')
def lm_eval_runs(tmp_path_factory, folder):
    "Samples of two models, by lm-eval itself"
    lm_eval = pytest.importorskip('lm_eval')
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    from w2s.models.zoo import model_folder
    home = tmp_path_factory.mktemp('lm')
    rows = [
        dict(question=f'Is {a} more than {b}?', choices=['yes', 'no'], answer=int(a <= b), topic=f't{a % 4}')
        for a in range(1, 9)
        for b in range(1, 6)
        if a != b
    ]
    (home/'q.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (home/'more.yaml').write_text(TASK.format(rows=home/'q.jsonl'))
    for name, path in (('tiny', folder), ('nano', model_folder('nano'))):
        found = lm_eval.simple_evaluate(
            'hf',
            model_args=dict(pretrained=str(path)),
            tasks=['more'],
            device='cpu',
            batch_size=8,
            log_samples=True,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(home), include_defaults=False),
        )
        tracker = EvaluationTracker(output_path=str(home/name))
        samples = found.pop('samples')
        tracker.save_results_aggregated(results=found, samples=samples)
        tracker.save_results_samples(task_name='more', samples=samples['more'])
    return home


def test_samples_of_lm_eval(lm_eval_runs, monkeypatch):
    "The folder as lm-eval leaves it; difference and interval are those of the textbook"
    found = compare_results(f'a={lm_eval_runs/"tiny"}', f'b={lm_eval_runs/"nano"}', cluster='topic')
    assert set(found.table.metric) == {'acc', 'acc_norm'} and not found.notes and found.unit == 'clusters (topic)'
    read = {n: [json.loads(line) for line in next((lm_eval_runs/n).rglob('samples_*')).read_text().splitlines()] for n in ('tiny', 'nano')}
    for _, row in found.table.iterrows():
        d = [x[row.metric] - y[row.metric] for x, y in zip(read['tiny'], read['nano'], strict=True)]
        assert row.mean_a == pytest.approx(np.mean([x[row.metric] for x in read['tiny']]), abs=1e-12)
        if np.ptp(d):
            assert (row.value, row.low, row.high, row.p) == pytest.approx(textbook(d, [x['doc']['topic'] for x in read['tiny']]), abs=1e-9)
    done = w2s(lm_eval_runs/'tiny', lm_eval_runs/'nano', '--metric', 'acc', monkeypatch=monkeypatch)
    assert done.exit_code == 0 and 'acc: tiny' in done.output and 'acc_norm' not in done.output


def test_another_test_set_of_the_same_length_is_refused(lm_eval_runs, tmp_path):
    "lm-eval numbers documents from 0: document 3 of another test set has the same id, and another hash"
    real = next((lm_eval_runs/'nano').rglob('samples_*'))
    rows = [json.loads(line) for line in real.read_text().splitlines()]
    for i, r in enumerate(rows): r['doc_hash'] = f'{i}'
    (tmp_path/'samples_more_x.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    with pytest.raises(DataError, match='is not the same item in both'): compare_results(str(real), str(tmp_path/'samples_more_x.jsonl'))


def inspect_log(folder, wrong, form, epochs=2):
    "A log by Inspect itself: answers with mistakes, two scorers"
    pytest.importorskip('inspect_ai')
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import exact, match
    from inspect_ai.solver import solver

    @solver
    def answer():
        async def solve(state, generate):
            i = int(str(state.sample_id)[1:])
            state.output = ModelOutput.from_content('mockllm/model', str(99 if i in wrong and (state.epoch == 1 or i > 6) else i + 1))
            return state
        return solve
    data = [Sample(id=f's{i}', input=f'{i} + 1?', target=str(i + 1), metadata=dict(topic=f't{i % 5}')) for i in range(12)]
    logs = eval(
        Task(dataset=data, solver=answer(), scorer=[match(), exact()]),
        model='mockllm/model',
        log_dir=str(folder),
        log_format=form,
        epochs=epochs,
        display='none',
    )
    assert logs[0].status == 'success'
    return next(p for p in folder.iterdir() if p.suffix == f'.{form}')


def test_logs_of_inspect(tmp_path):
    "An archive against a JSON log; epochs are averaged; the interval is that of the textbook"
    wrong = {'a': {2, 8}, 'b': {1, 2, 4, 7, 8, 9}}
    logs = [inspect_log(tmp_path/k, w, form) for (k, w), form in zip(wrong.items(), ('eval', 'json'), strict=True)]
    found = compare_results(*logs, metrics=['exact'], cluster='topic')
    score = {k: [1 - (.5 if i <= 6 else 1)*(i in w) for i in range(12)] for k, w in wrong.items()}
    row = found.table.iloc[0]
    assert (row.mean_a, row.mean_b) == pytest.approx([np.mean(score[k]) for k in 'ab'])
    assert (row.value, row.low, row.high, row.p) == pytest.approx(
        textbook(np.subtract(score['a'], score['b']), [i % 5 for i in range(12)]), abs=1e-9
    )
    assert any('2 epochs of each sample averaged' in n for n in found.notes)


def test_archives_without_zstandard_are_read_too(tmp_path):
    import zipfile
    log = json.loads(inspect_log(tmp_path/'json', {1}, 'json', epochs=1).read_text())
    with zipfile.ZipFile(tmp_path/'old.eval', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('header.json', json.dumps({k: v for k, v in log.items() if k != 'samples'}))
        for s in log['samples']: z.writestr(f'samples/{s["id"]}_epoch_1.json', json.dumps(s))
    assert read_scores(tmp_path/'old.eval').table.value.sum() == 22


def unfinished(log): log.update(status='error')
def later(log): log.update(version=3)
def unscored(log): log['samples'][3]['scores'] = {}
def unknown_grade(log): log['samples'][3]['scores']['match']['value'] = 'maybe'
def half_epochs(log): log['samples'].pop()
def twice(log): log['samples'].append(log['samples'][0])
def nameless(log): log['samples'][3]['id'] = None


@pytest.mark.parametrize(
    'damage, said',
    [
        (unfinished, 'status "error"'),
        (later, 'version 3; version 2 is known'),
        (unscored, 'it has no score'),
        (unknown_grade, "is 'maybe', not a finite number"),
        (half_epochs, 'was scored 1 times and others 2 times'),
        (twice, 'was there already'),
        (nameless, 'it has no id'),
    ],
)
def test_a_damaged_log_is_refused_with_its_place(tmp_path, damage, said):
    path = inspect_log(tmp_path/'log', {1}, 'json')
    log = json.loads(path.read_text())
    damage(log)
    path.write_text(json.dumps(log))
    with pytest.raises((DataError, ConfigError), match=said) as e: read_scores(path, ['match'])
    assert '\n' not in str(e.value) and path.name in str(e.value)


FILES = { # what is wrong, in a file beside a good one -> the file, its text, what is said
    'no id': ('b.csv', 'name,acc\nx,1\ny,0\n', 'name it with --id'),
    'no score': ('b.csv', 'id,points\nx,1\ny,0\n', 'name it with --metric'),
    'an id twice': ('b.csv', 'id,acc\nx,1\nx,0\n', 'row 2: the id "x" was there already, in row 1'),
    'an empty id': ('b.csv', 'id,acc\nx,1\n ,0\n', 'row 2: the id in column "id" is empty'),
    'NaN': ('b.csv', 'id,acc\nx,1\ny,nan\n', 'row 2: the score "acc" is \'nan\''),
    'an empty score': ('b.jsonl', '{"id": "x", "acc": 1}\n{"id": "y", "acc": null}\n', 'row 2: the score "acc" is missing'),
    'infinity': ('b.csv', 'id,acc\nx,1\ny,inf\n', 'row 2: the score "acc" is \'inf\''),
    'a list': ('b.jsonl', '{"id": "x", "acc": [1]}\n{"id": "y", "acc": [2]}\n', 'row 1: the score "acc" is [1]'),
    'other items': ('b.csv', 'id,acc\nu,1\nv,0\n', 'share 0 items by id'),
    'one item': ('b.csv', 'id,acc\nx,1\nv,0\n', 'share 1 items by id'),
    'another metric': ('b.csv', 'id,reward\nx,1\ny,0\n', 'score by different metrics'),
    'a cut line': ('b.jsonl', '{"doc_id": 0, "metrics": ["acc"], "acc": 1}\n{"doc_id"', 'row 2: not JSON'),
    'an old version of lm-eval': ('b.jsonl', '{"doc_id": 0, "acc": 1}\n', 'no "metrics" in it'),
    'two filters': (
        'b.jsonl',
        ''.join(f'{{"doc_id": {i}, "metrics": ["acc"], "acc": 1, "filter": "{f}"}}\n' for i in (0, 1) for f in ('strict', 'flexible')),
        'choose one with --filter',
    ),
    'a preference out of range': ('b.json', '[{"instruction": "x", "generator_2": "m", "preference": 3}]', 'a preference of 3'),
    'an archive that is none': ('b.eval', 'no archive', 'cannot be read as a log of Inspect'),
    'an empty file': ('b.csv', '', 'b.csv'),
    'only a head': ('b.csv', 'id,acc\n', 'b.csv'),
}


@pytest.mark.parametrize('case', FILES)
def test_a_bad_file_is_refused_in_one_sentence(case, tmp_path, monkeypatch):
    name, text, said = FILES[case]
    (tmp_path/'a.csv').write_text('id,acc\nx,1\ny,0\nz,1\n')
    (tmp_path/name).write_text(text)
    done = w2s(tmp_path/'a.csv', tmp_path/name, '--out', tmp_path/'out', monkeypatch=monkeypatch)
    assert done.exit_code == 1 and said in done.output and name in done.output and not (tmp_path/'out').exists()
    assert done.output.startswith('error: ') and 'fault of w2s' not in done.output and len(done.output.strip().splitlines()) == 1


def test_two_filters_and_one_of_them(tmp_path):
    rows = [dict(doc_id=i, metrics=['acc'], acc=int(f == 'flexible' or i > 0), filter=f) for i in range(3) for f in ('strict', 'flexible')]
    (tmp_path/'s.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    strict, loose = (read_scores(tmp_path/'s.jsonl', filter_name=f).table.value.tolist() for f in ('strict', 'flexible'))
    assert (strict, loose) == ([0, 1, 1], [1, 1, 1])
    with pytest.raises(ConfigError, match='did you mean "strict"'): read_scores(tmp_path/'s.jsonl', filter_name='stric')


def test_what_is_not_joined_is_counted(tmp_path):
    (tmp_path/'a.csv').write_text('id,acc\n' + ''.join(f'{i},{i % 2}\n' for i in range(10)))
    (tmp_path/'b.csv').write_text('id,acc\n' + ''.join(f'{i},{i % 3 == 0}\n' for i in range(4, 18)))
    found = compare_results(tmp_path/'a.csv', tmp_path/'b.csv')
    assert found.table.n.tolist() == [6]
    assert found.notes == (
        'a: 4 of 10 items are not in every file and were left out',
        'b: 8 of 14 items are not in every file and were left out',
    )


def test_numbers_and_texts_are_the_same_ids(tmp_path):
    (tmp_path/'a.jsonl').write_text(''.join(json.dumps(dict(id=i, acc=i % 2)) + '\n' for i in range(5)))
    (tmp_path/'b.csv').write_text('id,acc\n' + ''.join(f'{i},{i % 2}\n' for i in range(5)))
    assert compare_results(tmp_path/'a.jsonl', tmp_path/'b.csv').table.n.tolist() == [5]


def test_order_of_rows_and_of_files(tmp_path):
    "Rows in another order change nothing; files in another order change the sign"
    rng, rows = np.random.default_rng(3), [(f'e{i}', i % 2, i % 3 == 0) for i in range(40)]
    for name, k in (('a', 1), ('b', 2)):
        (tmp_path / f'{name}.csv').write_text(
            'id,acc\n' + ''.join(f'{r[0]},{int(r[k])}\n' for r in rng.permutation(np.array(rows, object)))
        )
    one, two = (
        compare_results(tmp_path / 'a.csv', tmp_path / 'b.csv').table.iloc[0],
        compare_results(tmp_path / 'b.csv', tmp_path / 'a.csv').table.iloc[0],
    )
    assert (one.value, one.low, one.high) == pytest.approx((-two.value, -two.high, -two.low)) and one.p == pytest.approx(two.p)


@pytest.mark.parametrize('seed', range(5))
def test_the_interval_of_clusters_is_that_of_the_textbook(seed):
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, 15, 90)
    scores = {k: rng.normal(size=15)[groups] + rng.normal(size=90) for k in 'ab'}
    read = [
        gather_items([Item('', f'{i:02}', {'m': v}, {'g': int(g)}) for i, (v, g) in enumerate(zip(x, groups, strict=True))], k, k, 'table')
        for k, x in scores.items()
    ]
    for cluster, by in (('g', groups), ('', range(90))):
        row = compare_results(*read, cluster=cluster).table.iloc[0]
        assert (row.value, row.low, row.high, row.p) == pytest.approx(textbook(scores['a'] - scores['b'], by), abs=1e-9)


def test_two_models_of_runs_by_seed_and_item(tmp_path):
    "Same seeds: paired by seed and item, as in the report of the run. Other seeds: their means, which is said"
    rng = np.random.default_rng(0)

    def run(name, seeds, shift):
        rows = [
            dict(
                task='t',
                role='student',
                method=m,
                weak='w',
                strong='s',
                seed=s,
                id=f'e{i}',
                metric='accuracy',
                value=float(rng.random() < 0.5 + shift * (m == 'new')),
            )
            for m in ('old', 'new')
            for s in seeds
            for i in range(50)
        ]
        (tmp_path/name).mkdir()
        pd.DataFrame(rows).to_parquet(tmp_path/name/'items.parquet')
        return tmp_path/name
    one, two = run('one', (0, 1, 2), .3), run('two', (0,), .3)
    same = compare_results(f'{one}@student/new', f'{one}@student/old')
    assert same.table.seeds.tolist() == [3] and same.table.n.tolist() == [50] and not same.notes
    other = compare_results(f'{one}@student/new', f'{two}@student/old')
    assert other.table.seeds.tolist() == [1] and 'different seeds' in other.notes[0]
    with pytest.raises(ConfigError, match='holds 2 models'): compare_results(one, two)


def test_holm_over_all_pairs():
    rng = np.random.default_rng(0)
    read = [
        gather_items([Item('', f'{i}', {'m': v}) for i, v in enumerate(rng.normal(k / 8, 1, 200))], f'm{k}', '', 'table') for k in range(4)
    ]
    table = compare_results(*read).table
    assert len(table) == 6 and (table.family == 6).all() and (table.p_holm >= table.p).all() and table.p_holm.max() > table.p.max()
    order = np.argsort(table.p.to_numpy())
    by_hand, most = np.empty(6), 0.
    for k, i in enumerate(order): by_hand[i] = most = min(1., max(most, (6 - k)*table.p.iloc[i]))
    assert table.p_holm.to_numpy() == pytest.approx(by_hand)
