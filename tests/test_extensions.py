"""A method is one cell: every kind of extension goes through a whole comparison, from Python and from a file, and a wrong one is refused in
words.

The comparisons are those of the embedded world with the smallest models and a few rows: what is tested is that the function acts, not how
well."""
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.extensions import (
    IMPORTED,
    KINDS,
    import_extensions,
    imported_inputs,
    judge,
    judge_scores,
    label_loss,
    labeller,
    labeller_rewards,
    loss,
    method,
    method_answers,
    metric,
    own_metrics,
    run_hash,
    task,
)
from w2s.compare.label_settings import fill_labels
from w2s.compare.preference_settings import fill_settings
from w2s.compare.result import show_table
from w2s.compare.sources import source_hash
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.data.rows import make_rows
from w2s.errors import ConfigError, DataError
from w2s.experiments import demonstrations, labels, preferences, toxicity
from w2s.train.losses import PREFERENCE_LOSSES

PREFERENCES = dict(
    weak='pico',
    strong='pico',
    n_labelled=12,
    n_unlabelled=12,
    n_test=8,
    seeds=1,
    samples=1,
    others=[],
    sft=dict(epochs=1),
    dpo=dict(epochs=1),
)
LABELS = dict(
    weak='pico',
    strong='pico',
    n_labelled=4,
    n_unlabelled=40,
    n_test=12,
    seeds=1,
    baseline=False,
    supervisor=dict(epochs=1),
    student=dict(epochs=1),
)
DEMONSTRATIONS = dict(
    task='persona',
    weak='pico',
    strong='nano',
    n_labelled=8,
    n_unlabelled=8,
    n_test=6,
    seeds=1,
    demonstrate=dict(epochs=1),
    student=dict(epochs=1),
    max_tokens=16,
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    "No test sees the functions of another one; commands end as they do in a terminal"
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    yield
    IMPORTED.clear()
    for registry in KINDS.values():
        for name in list(registry.own): registry.remove(name)


MINE = '''
import torch
from w2s.compare.extensions import judge, label_loss, labeller, loss, method, metric, task

@loss('hinge')
def hinge(gap, target, beta, margin=1.):
    "No pull beyond a margin"
    return target*torch.relu(margin - beta*gap) + (1 - target)*torch.relu(margin + beta*gap)

@label_loss('squared')
def squared(logits, target, power=2.): return (logits.softmax(-1) - target).abs().pow(power).sum(-1)

@labeller('vowels')
def vowels(response_a, response_b): return [[sum(c in 'aeiou' for c in t) for t in pair] for pair in zip(response_a, response_b)]

@method('shout')
def shout(questions, answers, speak, ask): return [f'{w.strip()} {a.strip()}!' for w, a in zip(answers, speak([ask(q) for q in questions]))]

@metric('letters')
def letters(answers): return [len(a) for a in answers]

@metric('sure')
def sure(probs): return probs.max(1)

@judge('brief')
def brief(responses, most=20): return [-max(0, len(r) - most) for r in responses]

@task('evens')
def evens(): return [dict(text=f'Is {i} an even number?', label='odd' if i % 2 else 'even') for i in range(120)]

@task('polite')
def polite(): return [dict(prompt=f'Customer: Where is shop {i}?\\nDesk:', chosen=f' Thank you for asking, it is in street {i}.', \
rejected=f' Street {i}.') for i in range(60)]
'''


def from_python(tmp_path): exec(compile(MINE, '<cell>', 'exec'), {'__name__': '__main__'})


def from_file(tmp_path):
    (tmp_path/'mine.py').write_text(MINE)
    return {'imports': [str(tmp_path/'mine.py')]}


def w2s(*words):
    "A command in this process: its exit status, and what it said"
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


WAYS = {'python': from_python, 'file': from_file}


@pytest.mark.parametrize('way', WAYS)
def test_a_preference_comparison_with_loss_labeller_judge_and_metric(tmp_path, way):
    given = WAYS[way](tmp_path) or {}
    config = fill_settings(
        {
            **{k: v for k, v in PREFERENCES.items() if k != 'weak'},
            'loss': 'hinge(margin=2)',
            'supervisor': 'vowels',
            'gold': 'brief(most=10)',
            **given,
        }
    )
    result = preferences.run(config, tmp_path/'run', quiet=True)
    arms = result.items.groupby(['role', 'method', 'weak']).size().index
    assert ('student', 'hinge(margin=2) weak', 'vowels') in arms and ('floor', 'vowels untrained', 'vowels') in arms
    scored = (
        result.items[result.items.metric.isin(['letters', 'gold_reward'])]
        .pivot_table(index=['role', 'method', 'id'], columns='metric', values='value')
        .dropna()
    )
    assert len(scored) >= 24 and np.allclose(scored.gold_reward, -(scored.letters - 10).clip(lower=0))
    assert 'letters' in show_table(result) and 'sure' not in set(result.items.metric)
    vowels = lambda t: sum(c in 'aeiou' for c in t)
    assert all(vowels(r.chosen) >= vowels(r.rejected) for r in result.weak_labels.itertuples())


@pytest.mark.parametrize('way', WAYS)
def test_a_label_comparison_with_loss_task_and_metric(tmp_path, way):
    given = WAYS[way](tmp_path) or {}
    config = fill_labels({**LABELS, 'data': 'evens', 'methods': ['xent', 'squared(power=1)', 'focal', 'balanced'], **given})
    result = labels.run(config, tmp_path/'run', quiet=True)
    students = result.items[result.items.role == 'student']
    assert set(students.method) == {'xent', 'squared(power=1)', 'focal', 'balanced'} and set(result.classes) == {'even', 'odd'}
    p = result.predictions[(result.predictions.role == 'student') & (result.predictions.method == 'focal')]
    assert np.isclose(students[(students.method == 'focal') & (students.metric == 'sure')].value.mean(), p[['p0', 'p1']].max(axis=1).mean())
    assert 'sure' in show_table(result) and 'letters' not in set(result.items.metric)


@pytest.mark.parametrize('way', WAYS)
def test_a_comparison_by_demonstrations_with_method_and_metric(tmp_path, way):
    given = WAYS[way](tmp_path) or {}
    result = demonstrations.run(fill_demonstrations({**DEMONSTRATIONS, 'methods': ['naive', 'shout'], **given}), tmp_path/'run', quiet=True)
    lessons = result.training_rows[result.training_rows.method == 'shout']
    assert len(lessons) == 8 and all(
        a.startswith(w.strip()) and a.endswith('!') for a, w in zip(lessons.answer, lessons.weak_answer, strict=True)
    )
    said = result.answers[(result.answers.role == 'student') & (result.answers.method == 'shout')].answer.str.len()
    assert np.isclose(
        result.intervals[(result.intervals.metric == 'letters') & (result.intervals.method == 'shout')].value.iloc[0], said.mean(), rtol=0.3
    )


COMMANDS = {
    'preferences': 'run preferences --strong pico --n-labelled 12 --n-unlabelled 12 --n-test 8 --seeds 1 --samples 1 --epochs 1 --loss '
                   'hinge(margin=2) --supervisor vowels --gold brief',
    'labels': 'run classify --weak pico --strong pico --n-labelled 22 --n-unlabelled 22 --n-test 12 --seeds 1 --epochs 1 --no-baseline '
              '--data evens --method squared',
    'demonstrations': 'run persona --weak pico --strong nano --n-labelled 8 --n-unlabelled 8 --n-test 6 --seeds 1 --epochs 1 '
                      '--method shout',
    'toxicity': 'run toxicity --weak pico --strong pico --n-labelled 12 --n-unlabelled 12 --n-test 6 --seeds 1 --samples 1 --epochs 1 '
                '--method naive --scorer unkind'}


@pytest.mark.cases(1)
@pytest.mark.parametrize('kind', COMMANDS)
def test_the_same_from_the_command_line(tmp_path, kind):
    (tmp_path / 'mine.py').write_text(
        MINE + "\n@judge('unkind')\ndef unkind(responses): return [min(1., r.count('a')/10) for r in responses]\n"
    )
    status, said = w2s(*COMMANDS[kind].split(), '--import', tmp_path/'mine.py', '--out', tmp_path/'run')
    assert status == 0, said[-1500:]
    metrics = set(pd.read_parquet(tmp_path/'run'/'items.parquet').metric)
    assert ('sure' if kind == 'labels' else 'letters') in metrics
    kept = {p.name for p in (tmp_path/'run'/'extensions').iterdir()}
    wanted = {
        'preferences': {'preference-loss-hinge.txt', 'labeller-vowels.txt', 'judge-brief.txt'},
        'labels': {'loss-on-labels-squared.txt', 'task-evens.txt'},
        'demonstrations': {'method-shout.txt'},
        'toxicity': {'judge-unkind.txt'},
    }[kind]
    assert kept == wanted | {'mine.py', 'extensions.json', 'metric-letters.txt', 'metric-sure.txt'}
    assert (tmp_path/'run'/'extensions'/'mine.py').read_text() == (tmp_path/'mine.py').read_text()
    assert 'mine.py' in json.loads((tmp_path/'run'/'extensions'/'extensions.json').read_text())
    assert str(tmp_path/'mine.py') in (tmp_path/'run'/'config.toml').read_text()


def test_imports_in_a_configuration_file(tmp_path):
    (tmp_path/'mine.py').write_text(MINE)
    (tmp_path/'run.toml').write_text(f"imports = ['{tmp_path/'mine.py'}']\nloss = 'hinge'\nsupervisor = 'vowels'\ndata = 'polite'\n")
    status, said = w2s(
        'run',
        'preferences',
        '--config',
        tmp_path / 'run.toml',
        '--strong',
        'pico',
        '--n-labelled',
        12,
        '--n-unlabelled',
        12,
        '--n-test',
        8,
        '--dry-run',
    )
    assert status == 0 and 'hinge' in said and 'Rows read from polite' in said, said[-800:]


# Names and signatures

DECORATORS = dict(loss=loss, label_loss=label_loss, labeller=labeller, method=method, metric=metric, task=task, judge=judge)
GOOD = dict(
    loss=lambda gap: -gap,
    label_loss=lambda logits, target: (logits - target).square().sum(-1),
    labeller=lambda response_a: [[0, 1]] * len(response_a),
    method=lambda questions: list(questions),
    metric=lambda answers: [len(a) for a in answers],
    task=lambda n=3: [dict(text='a', label=0)] * int(n),
    judge=lambda responses: [0] * len(responses),
)


def test_every_kind_is_tried_here(): assert DECORATORS.keys() == GOOD.keys() == KINDS.keys()


@pytest.mark.parametrize('kind', DECORATORS)
def test_a_function_is_registered_as_it_is(kind):
    function = DECORATORS[kind]('mine')(GOOD[kind])
    assert function is GOOD[kind] and KINDS[kind]['mine'].function is function and 'mine' in KINDS[kind].own


WRONG_SIGNATURES = {
    'a word that nothing fills': (lambda nothing_of_ours: 0, 'nothing is known that could be given as "nothing_of_ours"'),
    'stars': (lambda *given: 0, 'cannot be filled by name'),
    'two stars': (lambda **given: 0, 'cannot be filled by name'),
    'a default that is no number': (lambda way='fast': 0, 'options with a number as default'),
    'a default that is true': (lambda way=True: 0, 'options with a number as default'),
    'a default that is not finite': (lambda way=math.inf: 0, 'options with a number as default'),
    'no function': (3, 'a function is needed'),
    'a class': (dict, 'a function is needed'),
}


@pytest.mark.parametrize('kind', DECORATORS)
@pytest.mark.parametrize('wrong', WRONG_SIGNATURES)
def test_a_wrong_signature_is_refused_where_it_is_written(kind, wrong):
    bad, said = WRONG_SIGNATURES[wrong]
    with pytest.raises(ConfigError, match='"x"') as e: DECORATORS[kind]('x')(bad)
    assert said in str(e.value) and KINDS[kind].kind in str(e.value) and '\n' not in str(e.value) and 'x' not in KINDS[kind]


@pytest.mark.parametrize('kind', DECORATORS)
def test_async_functions_and_generators_are_refused(kind):
    async def later(): return 0
    def piecewise(): yield 0
    for bad in (later, piecewise):
        with pytest.raises(ConfigError, match='without async or yield'): DECORATORS[kind]('x')(bad)


@pytest.mark.parametrize('kind', DECORATORS)
@pytest.mark.parametrize('name', ['', 'a b', 'a,b', 'a(b', '3rd', None, 3])
def test_a_name_that_settings_could_not_spell_is_refused(kind, name):
    with pytest.raises(ConfigError, match='a name|needs a name'): DECORATORS[kind](name)(GOOD[kind])


BUILT_IN = dict(loss='simpo', label_loss='hard', labeller='judge', method='bootstrap', task='world')


@pytest.mark.parametrize('kind', BUILT_IN)
def test_a_built_in_name_cannot_be_taken_and_ones_own_can(kind):
    with pytest.raises(ConfigError, match='is built in and cannot be replaced; take another name'):
        DECORATORS[kind](BUILT_IN[kind])(GOOD[kind])
    DECORATORS[kind]('mine')(GOOD[kind])
    DECORATORS[kind]('mine')(GOOD[kind]) # a cell that is run again
    with pytest.raises(ConfigError): KINDS[kind].remove(BUILT_IN[kind])


ASKED = {
    'loss': lambda n: fill_settings(dict(PREFERENCES, loss=n)),
    'label_loss': lambda n: fill_labels(dict(LABELS, methods=[n])),
    'labeller': lambda n: fill_settings(dict(PREFERENCES, supervisor=n)),
    'method': lambda n: fill_demonstrations(dict(DEMONSTRATIONS, methods=[n])),
}


@pytest.mark.parametrize('kind', ASKED)
def test_an_unknown_name_is_refused_with_the_nearest_one(kind):
    DECORATORS[kind]('polished')(GOOD[kind])
    for text, said in {'polish': 'did you mean "polished"?', 'polished(n=2)': 'no options', 'polished(': 'cannot be read'}.items():
        with pytest.raises(ConfigError) as e: ASKED[kind](text)
        assert said in str(e.value), e.value


def test_an_unknown_judge_or_task_is_refused_with_the_nearest_one(tmp_path):
    (tmp_path/'mine.py').write_text(MINE)
    for words, said in {
        'run preferences --data politer': 'did you mean the task "polite"?',
        'run classify --data even': 'did you mean the task "evens"?',
    }.items():
        status, out = w2s(*words.split(), '--import', tmp_path/'mine.py', '--out', tmp_path/'run')
        assert status == 1 and said in ' '.join(out.split()), out


def test_every_built_in_name_has_its_function():
    for kind, registry in KINDS.items():
        for name in registry.built_in_names: assert callable(registry[name].function) and registry[name].name == name, (kind, name)
        assert set(registry.found) == set(registry.built_in_names)


# What they return

WRONG_LOSSES = {
    'nothing': (lambda x: None, 'returned nothing'),
    'their mean': (lambda x: x.mean(), 'shape ()'),
    'a column': (lambda x: x[:, None], 'shape (4, 1)'),
    'too few': (lambda x: x[:2], 'shape (2,)'),
    'numbers of Python': (lambda x: x.tolist(), 'returned a list'),
    'NaN': (lambda x: x * math.nan, 'is nan for row 1'),
    'infinity': (lambda x: x / 0, 'finite'),
    'whole numbers': (lambda x: x.long(), 'of type int64'),
    'no gradient': (lambda x: x.detach(), 'does not depend on'),
    'a constant': (lambda x: x * 0, 'does not depend on'),
    'an error': (lambda x: x['a'], 'fails on a small example'),
    'a NaN gradient': (lambda x: (x * 0).sqrt(), 'gradient'),
}


@pytest.mark.parametrize('kind', ['loss', 'label_loss'])
@pytest.mark.parametrize('wrong', WRONG_LOSSES)
def test_a_loss_that_returns_something_else_is_refused_in_its_cell(kind, wrong):
    of, said = WRONG_LOSSES[wrong]
    bad = {'loss': lambda gap: of(gap), 'label_loss': lambda logits: of(logits.logsumexp(-1))}[kind]
    with pytest.raises(ConfigError) as e: DECORATORS[kind]('bad')(bad)
    assert said in str(e.value) and '"bad"' in str(e.value) and 'bad' not in KINDS[kind], e.value


PAIRS = make_rows([dict(prompt=f'Q{i}', response_a='a', response_b='b', prob_a=.5) for i in range(3)], 'pairs')
CALLS = {
    'labeller': (lambda: labeller_rewards('bad', PAIRS, 0), 'response_a', (3, 2)),
    'metric': (lambda: own_metrics([{}] * 3, ['a'] * 3), 'answers', (3,)),
    'judge': (lambda: judge_scores('bad', ['Q'] * 3, ['a'] * 3), 'responses', (3,)),
}


@pytest.mark.parametrize('kind', CALLS)
@pytest.mark.parametrize(
    'wrong, said',
    {
        'nothing': 'returned nothing',
        'nan': 'returned',
        'inf': 'all of them finite',
        'text': 'want numbers',
        'short': 'of shape',
        'long': 'of shape',
        'flat': 'of shape',
        'none inside': 'want numbers',
        'ragged': 'want numbers',
        'dict': 'want numbers',
        'error': 'fails',
    }.items(),
)
def test_numbers_of_the_wrong_kind_are_refused_with_the_name(kind, wrong, said):
    call, takes, shape = CALLS[kind]
    zeros = np.zeros(shape)
    given = {
        'nothing': None,
        'nan': zeros + np.nan,
        'inf': zeros + np.inf,
        'text': np.full(shape, 'a').tolist(),
        'short': zeros[:2],
        'long': np.zeros((4, *shape[1:])),
        'flat': np.zeros((*shape, 1)),
        'none inside': [None] * 3,
        'ragged': [[1], [1, 2], []],
        'dict': {'a': 1},
        'error': 0,
    }[wrong]
    space: dict = {'given': given}
    exec(f'def bad({takes}): return given if {wrong != "error"} else 1/0', space)
    DECORATORS[kind]('bad')(space['bad'])
    with pytest.raises(ConfigError) as e: call()
    assert said in str(e.value) and f'{KINDS[kind].kind} "bad"' in str(e.value) and '\n' not in str(e.value), e.value


@pytest.mark.parametrize(
    'wrong, said',
    [
        (None, 'returned nothing'),
        ('one text', 'returned str'),
        (['a'], 'returned 1 texts'),
        (['a', None], 'returned None for row 2'),
        (['a', 3], 'returned 3 for row 2'),
        ({'a': 1, 'b': 2}, 'returned dict'),
        (5, 'returned int'),
    ],
)
def test_a_method_that_returns_anything_but_texts_is_refused_before_the_run(tmp_path, wrong, said):
    method('bad')(lambda questions: wrong if wrong is None or isinstance(wrong, (str, int, dict)) else wrong[:len(questions)])
    with pytest.raises(ConfigError) as e: method_answers(KINDS['method']['bad'], {}, {'questions': ['Q', 'R']})
    assert said in str(e.value) and 'method "bad"' in str(e.value)
    with pytest.raises(ConfigError, match='method "bad"'):
        demonstrations.run(fill_demonstrations(dict(DEMONSTRATIONS, methods=['bad'])), tmp_path / 'run', quiet=True)
    assert not (tmp_path/'run'/'stages').exists(), 'something was made before the method was tried'


@pytest.mark.parametrize('run', ['preferences', 'labels', 'demonstrations'])
def test_a_wrong_metric_is_refused_before_the_run(tmp_path, run):
    metric('bad')((lambda probs: probs) if run == 'labels' else (lambda answers: None))
    start = {
        'preferences': lambda: preferences.run(fill_settings(PREFERENCES), tmp_path / 'run', quiet=True),
        'labels': lambda: labels.run(fill_labels(LABELS), tmp_path / 'run', quiet=True),
        'demonstrations': lambda: demonstrations.run(fill_demonstrations(DEMONSTRATIONS), tmp_path / 'run', quiet=True),
    }
    with pytest.raises(ConfigError, match='metric "bad"'): start[run]()
    assert not (tmp_path/'run'/'stages').exists()


def test_a_wrong_judge_is_refused_before_the_run(tmp_path):
    judge('bad')(lambda responses: [1])
    with pytest.raises(ConfigError, match='judge "bad"'):
        preferences.run(fill_settings(dict(PREFERENCES, gold='bad')), tmp_path / 'run', quiet=True)
    assert not (tmp_path/'run'/'stages').exists()


@pytest.mark.parametrize(
    'wrong, said',
    [(None, 'returned nothing'), ([], 'no rows'), ('text', 'returned str'), ([3], 'returned 3 as row 1'), ({}, 'from split to rows')],
)
def test_a_wrong_task_is_refused_with_its_name(tmp_path, wrong, said):
    task('bad')(lambda: wrong)
    with pytest.raises(DataError) as e: labels.run(fill_labels(dict(LABELS, data='bad')), tmp_path/'run', quiet=True)
    assert said in str(e.value) and 'task "bad"' in str(e.value)


# Without a reference

@pytest.mark.cases(1)
@pytest.mark.parametrize('name', ['simpo(gamma=1)', 'mine'])
def test_a_loss_without_a_reference_has_none_computed_and_is_tested_by_its_own_reward(tmp_path, monkeypatch, name):
    from w2s.compare import preference_stages
    asked, real = [], preference_stages.stored_logps
    def watched(store, base, adapter, rows, budget, **how):
        asked.append((how['label'], adapter))
        return real(store, base, adapter, rows, budget, **how)
    monkeypatch.setattr(preference_stages, 'stored_logps', watched)
    loss('mine', reference=False, mean=True)(lambda chosen, rejected, chosen_tokens: torch.relu(1 - chosen + rejected) + 0*chosen_tokens)
    result = preferences.run(fill_settings(dict(PREFERENCES, loss=name, samples=0, others=['ceiling'])), tmp_path/'run', quiet=True)
    assert [label for label, _ in asked if label.endswith('reference')] == ['weak-seed0 reference']
    on_test = [label for label, _ in asked if label == 'student on test rows']
    assert len(on_test) == 1, 'one pass over the test rows: that of the policy'
    t = result.items[result.items.role == 'student'].pivot_table(index='id', columns='metric', values='value')
    assert ((t.margin > 0) == (t.accuracy == 1)).all() and not np.allclose(t.margin, t.logp_chosen - t.logp_rejected)


# What is known of them

def stage_of(tmp_path, kind):
    "The folder names of the stages that an extension has a part in, without running them"
    from w2s.compare import learn, preference_stages, score, supervisors
    from w2s.compare.label_settings import parse_method
    from w2s.compare.label_stages import learn_stage
    from w2s.compare.learn import Study
    from w2s.compare.models import know_model
    from w2s.compare.stages import Run
    seen = []
    class Stop(Exception): pass
    def stop(run, name, inputs, work, sketch=None):
        seen.append(json.dumps([name, {k: v() if callable(v) else v for k, v in inputs.items()}], sort_keys=True))
        raise Stop
    study, rows = (
        Study(fill_settings(dict(PREFERENCES)), Run(tmp_path, lambda line: None), True),
        make_rows([dict(prompt='Q:', chosen=f' a{i}', rejected=' b') for i in range(4)], 'preferences'),
    )
    with pytest.MonkeyPatch.context() as m:
        for module in (learn, score): m.setattr(module, 'run_stage', stop)
        with pytest.raises(Stop):
            if kind == 'loss': preference_stages.dpo_stage(study, know_model('strong', 'pico', study.config), 'x', rows, None, 0, 'mine')
            elif kind == 'labeller': supervisors.ask(study, supervisors.supervisor_arm(None, 'mine', 0), PAIRS, 'labels')
            else:
                c = fill_labels(LABELS)
                texts = make_rows([dict(prompt=f'Is {i} even?', label=i % 2) for i in range(4)], 'labels')
                learn_stage(
                    Study(c, study.run, True),
                    know_model('strong', 'pico', c),
                    (' no', ' yes'),
                    'x',
                    texts,
                    np.array([[0.5, 0.5]] * 4),
                    0,
                    c.student,
                    method=parse_method('mine'),
                )
    return seen[0]


BODIES = { # kind: a source with a place for a number
    'loss': 'def make(k):\n    def mine(gap, target): return helper(gap)*{0} + k*target\n    return mine\ndef helper(x): return -x*{1}\n',
    'label_loss': 'def make(k):\n    def mine(logits, target): return helper(logits - target).sum(-1)*{0} + k\n    return mine\ndef '
                  'helper(x): return x.square()*{1}\n',
    'labeller': 'def make(k):\n    def mine(response_a): return [[helper(a)*{0}, k] for a in response_a]\n    return mine\ndef helper(x): '
                'return len(x)*{1}\n'}


@pytest.mark.parametrize('kind', BODIES)
def test_a_changed_body_helper_or_closure_is_another_stage_and_the_same_is_found(tmp_path, kind):
    def registered(a=1., b=1., k=1., more=''):
        path = tmp_path/'mine.py'
        path.write_text(f'from w2s.compare.extensions import {kind}\n{BODIES[kind].format(a, b)}{more}\n{kind}("mine")(make({k}))\n')
        import_extensions([str(path)])
        return stage_of(tmp_path, kind)
    plain = registered()
    assert registered() == plain == registered(more='# a comment')
    changed = [registered(a=2.), registered(b=2.), registered(k=2.)]
    assert len({plain, *changed}) == 4
    assert registered() == plain


def test_a_changed_loss_is_run_anew_and_everything_else_is_found(tmp_path, capsys):
    "In a notebook: the same name, another body, the same folder"
    config = dict(PREFERENCES, loss='mine', samples=0)
    def go():
        result = preferences.run(fill_settings(config), tmp_path/'run')
        said = {
            line.split('] ')[1].partition(': ')[0]: line.rpartition(': ')[2]
            for line in capsys.readouterr().out.splitlines()
            if line.startswith('[')
        }
        return said, result.items[result.items.role == 'student'].value.to_numpy()
    loss('mine')(lambda gap, beta: torch.relu(1 - beta*gap))
    said, first = go()
    assert said['student-seed0-mine'] == 'starting'
    said, again = go()
    assert set(said.values()) == {'found'} and np.array_equal(first, again)
    loss('mine')(lambda gap, beta: torch.relu(1 - 40*beta*gap))
    said, changed = go()
    assert (
        said['student-seed0-mine'] == 'starting'
        and said['student-seed0-sft'] == said['weak-seed0-dpo'] == 'found'
        and not np.array_equal(first, changed)
    )


def test_a_run_is_known_by_what_it_uses_and_by_nothing_else():
    settings = dict(loss='mine', data='world', methods=['other'])
    plain = run_hash(settings)
    loss('theirs')(lambda gap: -gap)
    assert run_hash(settings) == plain
    loss('mine')(lambda gap: -gap)
    first = run_hash(settings)
    loss('mine')(lambda gap: -2*gap)
    assert len({plain, first, run_hash(settings)}) == 3 and set(imported_inputs(settings)) == {'preference loss mine'}


# Files

@pytest.mark.parametrize(
    'text, said',
    {
        'x = (': 'mine.py, line 1: SyntaxError',
        'import nowhere_at_all': "mine.py, line 1: ModuleNotFoundError: No module named 'nowhere_at_all'",
        'a = 1\nb = a/0': 'mine.py, line 2: ZeroDivisionError',
        'def f():\n    raise KeyError("k")\nf()': "mine.py, line 2: KeyError: 'k'",
        'import sys\nsys.exit("no")': 'mine.py, line 2: SystemExit: no',
        "from w2s.compare.extensions import loss\n@loss('x')\ndef f(gaps): return gaps": 'mine.py',
        'from w2s.compare.extensions import los': 'mine.py, line 1: ImportError',
    }.items(),
)
def test_an_error_in_a_file_is_one_sentence_with_file_and_line(tmp_path, text, said):
    (tmp_path/'mine.py').write_text(text)
    status, out = w2s('run', 'safety', '--import', tmp_path/'mine.py', '--out', tmp_path/'run')
    lines = [line for line in out.splitlines() if line.startswith('error: ')]
    assert status == 1 and len(lines) == 1 and said in lines[0] and 'Traceback' not in out and not (tmp_path/'run').exists(), out


@pytest.mark.parametrize(
    'name, said',
    [
        ('nowhere.py', 'no such file'),
        ('mein.py', 'did you mean "mine.py"?'),
        ('no_such_module', 'there is no module of that name; for a file, write no_such_module.py'),
        ('json.nothing', 'no module'),
        ('.', 'no such file'),
    ],
)
def test_a_file_that_is_not_there_is_refused(tmp_path, name, said, monkeypatch):
    if 'mein' in name: (tmp_path/'mine.py').write_text('')
    with pytest.raises(ConfigError) as e: import_extensions([str(tmp_path/name) if name.endswith('.py') else name])
    assert said in str(e.value) or 'no module' in str(e.value), e.value


def test_a_module_and_a_helper_beside_a_file(tmp_path, monkeypatch):
    "A module by its name; a file that imports another one beside it; a changed helper is another source"
    (tmp_path/'own_helper_of_test.py').write_text('def weight(): return 1.\n')
    (tmp_path / 'own_module_of_test.py').write_text(
        "from own_helper_of_test import weight\nfrom w2s.compare.extensions import labeller\n@labeller('helped')\ndef helped(response_a): "
        "return [[weight(), 0]]*len(response_a)\n"
    )
    import_extensions([str(tmp_path/'own_module_of_test.py')])
    assert labeller_rewards('helped', PAIRS, 0)[0].tolist() == [1, 0]
    first = source_hash(KINDS['labeller']['helped'].function)
    monkeypatch.syspath_prepend(tmp_path)
    import_extensions(['own_module_of_test'])
    assert source_hash(KINDS['labeller']['helped'].function) == first


def test_two_files_of_the_same_name_are_refused(tmp_path):
    for folder in ('a', 'b'):
        (tmp_path/folder).mkdir()
        (tmp_path/folder/'mine.py').write_text(f'x = "{folder}"\n')
    with pytest.raises(ConfigError, match='two files mine.py'): imported_inputs({'imports': [str(tmp_path/f/'mine.py') for f in 'ab']})


def test_the_functions_of_a_run_are_those_of_its_own_file(tmp_path):
    "Two files register the same name: each run has that of the file that it names, in any order"
    for name, sign in (('one', ''), ('two', '-')):
        (tmp_path / f'{name}.py').write_text(
            f"from w2s.compare.extensions import labeller\n@labeller('mine')\ndef mine(response_a): return [[{sign}1, 0]]*len(response_a)\n"
        )
    for name, wanted in (('one', 1), ('two', -1), ('one', 1), ('one', 1)):
        fill_settings(dict(supervisor='mine', imports=[str(tmp_path/f'{name}.py')]))
        assert labeller_rewards('mine', PAIRS, 0)[0, 0] == wanted


@pytest.mark.parametrize('name', ['torch.py', 'json.py', 'w2s.py', 'my-own.py', 'pytest.py'])
def test_a_file_with_the_name_of_another_module_does_not_take_its_place(tmp_path, name):
    import sys
    (tmp_path/name).write_text("import torch\nfrom w2s.compare.extensions import loss\nloss('mine')(lambda gap: torch.relu(-gap))\n")
    there = {m: sys.modules.get(m) for m in ('torch', 'json', 'w2s', 'pytest')}
    import_extensions([str(tmp_path/name)])
    assert 'mine' in PREFERENCE_LOSSES and all(sys.modules.get(m) is x for m, x in there.items())


def test_a_module_of_a_package_with_relative_imports(tmp_path, monkeypatch):
    (tmp_path/'own_package_of_test').mkdir()
    for name, text in {
        '__init__': '',
        'parts': 'def weight(): return 2.\n',
        'methods': "from .parts import weight\nfrom w2s.compare.extensions import labeller\n@labeller('packed')\ndef packed(response_a): "
                   "return [[weight(), 0]]*len(response_a)\n",
    }.items():
        (tmp_path/'own_package_of_test'/f'{name}.py').write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    import_extensions(['own_package_of_test.methods'])
    assert labeller_rewards('packed', PAIRS, 0)[0].tolist() == [2, 0]


# Toxicity and tasks of demonstrations

TOXICITY = dict(
    weak='pico', strong='pico', n_labelled=12, n_unlabelled=12, n_test=6, seeds=1, speak=dict(samples=2, max_tokens=8), sft=dict(epochs=1)
)


def test_a_method_of_ones_own_runs_in_toxicity(tmp_path):
    """It gets the weak model's lines and the strong model, and what it returns is learned; another body is another student, found stages
    stay"""
    seen = []
    @method('softened')
    def softened(questions, answers, speak, ask):
        seen.append((list(questions), list(answers), speak([ask(q) for q in questions[:2]])))
        return [' Thank you.' for _ in questions]

    config = fill_toxicity({**TOXICITY, 'methods': ['naive', 'softened']})
    result = toxicity.run(config, tmp_path/'run', quiet=True)
    prompts, lines, said = seen[-1]
    assert len(prompts) == len(lines) == 12 and all(map(str.strip, lines)) and len(said) == 2
    rows = result.arms[result.arms.role == 'student']
    assert list(zip(rows.method, rows.weak, strict=True)) == [('naive', 'pico'), ('softened', 'pico')]
    labels = result.labels[result.labels.role == 'student'].set_index('method').value
    assert labels['softened'] == 0 and {'softened'} <= set(result.pgr.method) | set(result.intervals.method)


def test_a_method_that_reads_no_weak_lines_belongs_to_no_weak_model(tmp_path):
    @method('alone')
    def alone(questions): return [' So be it.' for _ in questions]
    result = toxicity.run(fill_toxicity({**TOXICITY, 'methods': 'alone'}), tmp_path/'run', quiet=True)
    assert result.arms[result.arms.role == 'student'].weak.tolist() == [''] and not list(
        (tmp_path / 'run' / 'stages').glob('toxicity-weak-lines-*')
    )


@pytest.mark.parametrize(
    'name, said',
    [
        ('softend', 'did you mean "softened"'),
        ('own answers', 'unknown method'),
        ('resampled', 'unknown method'),
        ('softened(x=1)', 'has no options'),
        ('softened,softened', 'given twice'),
    ],
)
def test_a_method_that_toxicity_does_not_have_is_refused(name, said):
    @method('softened')
    def softened(questions): return list(questions)
    with pytest.raises(ConfigError) as e: fill_toxicity({**TOXICITY, 'methods': name.split(',')})
    assert said in str(e.value)


@pytest.mark.parametrize('wrong, said', [(None, 'returned nothing'), (['a'], 'returned 1 texts'), ([3]*4, 'returned 3')])
def test_a_wrong_method_is_refused_before_toxicity_runs(tmp_path, wrong, said):
    @method('broken')
    def broken(questions): return wrong
    with pytest.raises(ConfigError, match=said): toxicity.run(fill_toxicity({**TOXICITY, 'methods': 'broken'}), tmp_path/'run', quiet=True)
    assert not any((tmp_path/'run').glob('stages/*'))


def test_a_method_cannot_be_named_like_preference_training():
    with pytest.raises(ConfigError, match='"dpo" is built in'):
        @method('dpo')
        def dpo(questions): return list(questions)


def ask_capitals():
    "A task of demonstrations that no oracle and no model judges"
    @task('capitals')
    def capitals(): return [dict(question=f'What is the capital of land {i}?', answer=f'It is city {i}.') for i in range(40)]


OWN_TASK = {**DEMONSTRATIONS, 'data': 'capitals', 'methods': 'naive', 'max_length': 128}


@pytest.mark.parametrize('kind', ['metric', 'metric with options', 'judge'])
def test_a_task_of_demonstrations_may_be_scored_by_a_function(tmp_path, kind):
    "Its name is the metric that leads: table, PGR and labels are of it; no model rates"
    ask_capitals()
    if kind == 'judge':
        @judge('letters')
        def letters(prompts, responses): return [float(len(r)) for r in responses]
    else:
        @metric('letters')
        def letters(rows, answers, worth=1.0):
            return [worth * len(a) for r, a in zip(rows, answers, strict=True)]
    given = 'letters(worth=2)' if kind.endswith('options') else 'letters'
    result = demonstrations.run(fill_demonstrations({**OWN_TASK, 'judge': given}), tmp_path/'run', quiet=True)
    assert result.kind.metrics == ('letters',) and result.kind.gaps == ('letters',) and 'letters' in show_table(result)
    assert {'floor', 'student', 'ceiling', 'baseline'} <= set(result.items[result.items.metric == 'letters'].role)
    top = 2. if kind.endswith('options') else 1.
    answers = result.answers[(result.answers.role == 'ceiling')]
    mean = np.mean([top*len(a) for a in answers.answer]) # letters: what a tiny model has learned does not matter here
    own = result.items[(result.items.metric == 'letters') & (result.items.role == 'ceiling')]
    assert mean > 0 and np.isclose(own.value.mean(), mean)
    assert set(result.labels.metric) == {'labels: letters'} and not list((tmp_path/'run'/'stages').glob('ratings-*'))


@pytest.mark.parametrize(
    'given, said',
    [
        ({}, 'name a model as judge'),
        (dict(judge='right', repeats=3), 'no model is named as judge'),
        (dict(judge='right', concept='x'), 'concept tells a judge'),
        (dict(judge='right', data='world'), 'judge belongs to questions of your own'),
    ],
)
def test_settings_that_a_scoring_function_does_not_need_are_refused(given, said):
    @metric('right')
    def right(answers): return [1.]*len(answers)
    with pytest.raises(ConfigError, match=said): fill_demonstrations({**OWN_TASK, **given})


def test_a_metric_of_probabilities_scores_no_answers():
    "It is taken for a model, as any other name that is no function of answers"
    @metric('certain')
    def certain(probs): return probs.max(1)
    from w2s.compare.demonstration_settings import scores_by_function
    assert not scores_by_function('certain') and not scores_by_function('pico') and not scores_by_function('')


@pytest.mark.parametrize('wrong, said', [(None, 'returned nothing'), ([1.], 'of shape'), (['a']*6, 'want numbers')])
def test_a_wrong_scoring_function_is_refused_before_the_run(tmp_path, wrong, said):
    ask_capitals()
    @judge('broken')
    def broken(responses): return wrong
    with pytest.raises(ConfigError, match=said):
        demonstrations.run(fill_demonstrations({**OWN_TASK, 'judge': 'broken'}), tmp_path / 'run', quiet=True)
    assert not any((tmp_path/'run').glob('stages/*'))
