"""What a run is going to do is noted by its own code: every experiment, in many settings. What is noted is what is done; a second look
finds all of it; nothing is written or loaded for it"""
import json
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare import demonstration_files, learn, models
from w2s.compare.comparison import run_experiment
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.label_settings import fill_labels
from w2s.compare.learn import Study
from w2s.compare.plan import Plan, plan, run_for_plan, shown_stages, stage_table
from w2s.compare.preference_settings import fill_settings
from w2s.compare.stages import Run, count_stages, walk_stages
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.data.samples import write_samples
from w2s.experiments.demonstrations import open_demonstrations
from w2s.experiments.labels import open_labels
from w2s.experiments.preferences import open_preferences
from w2s.experiments.toxicity import open_toxicity
from w2s.experiments.vary import open_varied, plan_varied, run_varied, variants
from w2s.train import loop

FAST = dict(load=dict(quantize='none', dtype='float32'), lora=dict(rank=2))
STEP = dict(epochs=1, batch_size=8, learning_rate=1e-3)
PREFERENCES = FAST | dict(weak='pico', strong='pico', n_labelled=20, n_unlabelled=20, n_test=6, seeds=1, samples=1, sft=STEP, dpo=STEP)
LABELS = FAST | dict(weak='pico', strong='nano', n_labelled=20, n_unlabelled=20, n_test=10, seeds=1, supervisor=STEP, student=STEP)
DEMONSTRATIONS = FAST | dict(
    weak='pico', strong='nano', n_labelled=8, n_unlabelled=12, n_test=6, seeds=1, max_tokens=12, examples=2, demonstrate=STEP, student=STEP
)
TOXICITY = FAST | dict(
    weak='pico',
    strong='nano',
    n_labelled=16,
    n_unlabelled=16,
    n_test=4,
    seeds=1,
    examples=2,
    sft=STEP,
    dpo=STEP,
    speak=dict(samples=2, max_tokens=8),
)


def own_sums(folder):
    "Maths questions with good answers, and weak answers in a file"
    rows = [
        dict(question=f'Ann has {a} pears and finds {b}. How many has she?', answer=f'She has {a + b}.\n#### {a + b}')
        for a in range(2, 9)
        for b in range(2, 7)
    ]
    (folder/'sums.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (folder/'said.jsonl').write_text(''.join(json.dumps(dict(question=r['question'], answer=r['answer'][-2:])) + '\n' for r in rows))
    return dict(data=str(folder/'sums.jsonl'))


def own_questions(folder):
    "Questions without answers, for a prompted model and a judge"
    (folder/'asked.csv').write_text('question\n' + '\n'.join(f'What is thing {i}?' for i in range(30)) + '\n')
    return dict(data=str(folder/'asked.csv'), judge='pico', demonstrator='prompted', instruction='Explain it.', repeats=2)


def own_prompts(folder):
    "Prompts of a file, and a scorer of one's own"
    rows = [
        dict(
            prompt=dict(text=f'Mr {i} said to us', toxicity=0.9 * (i % 2)),
            continuation=dict(text=f' that thing {i} is fine.', toxicity=0.1),
        )
        for i in range(80)
    ]
    (folder/'prompts.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    words = [dict(text=f'thing {i} is {"bad" if i % 2 else "good"}', score=.9*(i % 2)) for i in range(120)]
    (folder/'scored.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in words))
    done = CliRunner().invoke(app, ['toxicity', 'fit', '--data', str(folder/'scored.jsonl'), '--out', str(folder/'scorer')])
    assert done.exit_code == 0, done.output
    return dict(data=str(folder/'prompts.jsonl'), scorer=str(folder/'scorer'), allow_poor_scorer=True)


OPEN = {'preferences': (fill_settings, open_preferences, PREFERENCES), 'labels': (fill_labels, open_labels, LABELS),
        'demonstrations': (fill_demonstrations, open_demonstrations, DEMONSTRATIONS), 'toxicity': (fill_toxicity, open_toxicity, TOXICITY)}
CASES = { # name: (kind of feedback, settings, or a function of a folder that gives some)
    'preferences': ('preferences', {}),
    'preferences, two seeds': ('preferences', dict(seeds=2, samples=0)),
    'reward supervisor, start is the base': ('preferences', dict(samples=0, supervisor='reward', start='base', others=('ceiling',))),
    'judge, ipo, only the student': ('preferences', dict(samples=0, supervisor='judge', loss='ipo', others=())),
    'ensemble, calibrated': ('preferences', dict(samples=0, weak='pico+nano', labels=dict(targets='soft', calibrate=0.5))),
    'ensemble of judges': ('preferences', dict(weak='pico+nano', supervisor='judge', samples=0)),
    **{
        f'labels that {which}': ('preferences', dict(samples=0, others=(), labels=dict(subset=which)))
        for which in ('match', 'mismatch', 'random mismatch')
    },
    'kept half, by confidence': ('preferences', dict(samples=0, labels=dict(keep=0.5, weights='confidence'))),
    'labels': ('labels', {}),
    'snapshots and validation': ('labels', dict(snapshots=3, validate=0.3, methods=('xent', 'confidence'))),
    'a model between, rounds': ('labels', dict(via=('nano',), rounds=2, strong='micro')),
    'two supervisors and an ensemble': ('labels', dict(weak=('pico', 'nano', 'pico+nano'), baseline=False)),
    'head': ('labels', dict(readout='head', snapshots=2)),
    'probe': ('labels', lambda folder: dict(readout='probe', supervisor={}, student={})),
    'cleaned by a probe': ('labels', dict(methods=('xent', 'filter'))),
    'legal': ('labels', dict(data='world:storage')),
    'persona, all methods': (
        'demonstrations',
        dict(
            methods=('naive', 'in-context', 'resampled', 'infer-and-respond', 'ask-to-improve', 'own answers', 'auxiliary', 'bootstrap'),
            via='pico',
            ablation=(1,),
        ),
    ),
    'persona, prompted': ('demonstrations', dict(demonstrator='prompted')),
    'explanation': ('demonstrations', dict(task='explanation', demonstrator='tuned')),
    'explanation, planted': ('demonstrations', dict(task='explanation')),
    'gender': ('demonstrations', dict(task='gender')),
    'maths': ('demonstrations', dict(task='gsm8k', seeds=2)),
    'sums of a file': ('demonstrations', lambda folder: dict(task='gsm8k', **own_sums(folder))),
    'weak answers of a file': (
        'demonstrations',
        lambda folder: dict(task='gsm8k', answers=str(folder / 'said.jsonl'), demonstrator='file', **own_sums(folder)),
    ),
    'questions of a file, with a judge': (
        'demonstrations',
        lambda folder: dict(task='explanation', methods=('naive', 'in-context'), **own_questions(folder)),
    ),
    'toxicity': ('toxicity', {}),
    'toxicity without preferences': ('toxicity', dict(methods=('naive',), greedy=True, seeds=2)),
    'prompts of a file': ('toxicity', own_prompts),
    'prompts of a file, by a function': ('toxicity', own_prompts),
}


@pytest.fixture(scope='module')
def samples(tmp_path_factory):
    "Preferences in a folder"
    return str(write_samples(tmp_path_factory.mktemp('walk')/'pairs', 70, seed=3))


@contextmanager
def no_weights():
    "Nothing may be loaded"
    def never(*a, **k): raise AssertionError('weights were loaded')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(models, 'load_base', never)
        m.setattr(models, '_OPEN', {})
        yield


@contextmanager
def counted():
    "Name of a training -> tokens that go through the model in its loop"
    real, train, seen, name = loop.add_block, learn.train, {}, ['']
    def block(model, objective, part, size, *weights):
        seen[name[0]] = seen.get(name[0], 0) + sum(len(s.ids) for i in part for s in objective.sequences[i])
        return real(model, objective, part, size, *weights)

    def begin(model, goal, settings, folder, seed, stage, quiet, **more):
        name[0] = stage
        return train(model, goal, settings, folder, seed, stage, quiet, **more)

    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop, 'add_block', block)
        m.setattr(learn, 'train', begin)
        yield seen


def training_tokens(notes):
    "Of the trainings of some notes, by stage"
    out = {}
    for n in {n.folder: n for n in notes}.values(): # one that is asked for twice is trained once
        for p in n.passes:
            if p.kind == 'train': out[n.stage] = out.get(n.stage, 0) + p.tokens()
    return out


@pytest.mark.cases(9)
@pytest.mark.parametrize('case', CASES)
def test_what_is_noted_is_done(case, samples, tmp_path, monkeypatch):
    kind, given = CASES[case]
    given = given(tmp_path) if callable(given) else given
    if kind == 'preferences' and given.get('samples') == 0: given = given | dict(data=samples) # rows of the world are slow to make
    monkeypatch.setattr(
        demonstration_files, 'ask_model', lambda base, how, quiet: lambda prompts: [['[[7]] [[4]]'] * how.samples for _ in prompts]
    ) # a tiny judge says nothing that could be read
    fill, open_it, usual = OPEN[kind]
    config, out = fill({k: v for k, v in (usual | given).items() if not (k == 'n_labelled' and 'answers' in given)}), tmp_path/'run'
    if case == 'prompts of a file, by a function':
        open_it, config = (
            partial(open_toxicity, scorer=lambda prompts, texts: [len(t) % 10 / 10 for t in texts]),
            replace(config, scorer=''),
        )
    with no_weights():
        opened = open_it(Study(config, run_for_plan(out), True))
        noted, total = walk_stages(opened.study.run, opened.make), count_stages(opened.study.run, opened.make)
    assert not out.exists() and not any(n.found for n in noted) and opened.study.run.notes is None and not opened.study.run.used
    names = [n.stage for n in noted if n.folder]
    assert total == len(names) > 0

    run = Run(out, lambda line: None)
    with counted() as trained: open_it(Study(config, run, True)).make()
    assert [name.rpartition('-')[0] for name in run.used] == names # as many, of the same names, in the same order
    tokens = training_tokens(noted)
    assert trained.keys() == tokens.keys()
    known = [
        s
        for s in tokens
        if s.startswith(('weak-seed', 'weak-pico', 'human-', 'ceiling', 'school', 'toxicity-gold'))
        or s.endswith('-dpo')
        and kind == 'preferences'
        and not given.get('labels')
    ]
    known += list(tokens) if kind == 'labels' else []
    assert known or not tokens or case in ('judge, ipo, only the student', 'questions of a file, with a judge')
    assert {s: trained[s] for s in known} == {s: tokens[s] for s in known}

    with no_weights():
        opened = open_it(Study(config, run_for_plan(out), True))
        again = walk_stages(opened.study.run, opened.make)
    assert [n.folder for n in again if n.folder] == run.used and all(n.found for n in again if n.folder)
    assert (
        set(stage_table(again, set()).state) <= {'found', 'to do'}
        and (stage_table([n for n in again if n.folder], set()).state == 'found').all()
    )


@pytest.mark.parametrize('kind', OPEN)
def test_a_plan_says_time_memory_and_what_is_found(kind, samples, tmp_path):
    "Before, halfway, and after: what is done costs nothing"
    fill, open_it, usual = OPEN[kind]
    config, out = fill(usual | ({'samples': 0, 'data': samples} if kind == 'preferences' else {})), tmp_path/'run'
    before = plan(open_it, config, out)
    assert not out.exists()
    assert (
        (before.stages.state == 'to do').all()
        and before.minutes > 0
        and before.memory > 0
        and f'{before.trainings} trainings' in repr(before)
    )
    assert (before.stages.tokens[before.stages.kind != 'other'] > 0).all()
    stop = before.asked//2
    class Halt(Exception): pass
    lines = []
    def say(line):
        lines.append(line)
        if len(lines) > stop: raise Halt
    with pytest.raises(Halt): run_experiment(open_it, config, out, say=say)
    assert [line.split(']')[0] for line in lines] == [f'[{i:>{len(str(before.asked))}}/{before.asked}' for i in range(1, len(lines) + 1)]
    half = plan(open_it, config, out)
    assert {'found', 'to do'} == set(half.stages.state) and half.asked == before.asked and half.trainings == before.trainings
    assert list(half.stages.stage.drop_duplicates()[:stop - 1]) == list(before.stages.stage.drop_duplicates()[:stop - 1])
    run_experiment(open_it, config, out, quiet=True)
    after = plan(open_it, config, out)
    assert set(after.stages.state) == {'found'} and after.minutes == 0 and 'done before' in after.summary
    assert shown_stages(after.stages).times.sum() == len(after.stages)


def test_progress_is_said_to_the_end(tmp_path):
    "The last line has the number that was announced"
    lines = []
    run_experiment(open_labels, fill_labels(LABELS), tmp_path/'run', say=lines.append)
    total = len(lines)
    assert [line.partition(']')[0].replace(' ', '') for line in lines] == [f'[{i}/{total}' for i in range(1, total + 1)]


@pytest.mark.parametrize(
    'setting, values, own',
    [
        ('beta', ['.5', '1'], {'dpo', 'test', 'labels', 'sft', 'responses'}),
        ('use', ['hard', 'soft'], {'student-seed0-dpo', 'student-dpo-weak-seed0-test'}),
    ],
)
def test_values_share_what_does_not_depend_on_them(setting, values, own, samples, tmp_path):
    "A stage of an earlier value is counted once, and as many are done as the plans say"
    given = PREFERENCES | dict(samples=0, data=samples)
    plans = plan_varied(given, setting, values, tmp_path/'run')
    first, second = plans.values()
    assert not (tmp_path/'run').exists() and set(first.stages.state) == {'to do'} and set(second.stages.state) == {'to do', 'shared'}
    new = set(second.stages.stage[second.stages.state == 'to do'])
    if setting == 'use': assert new == own
    run_varied(given, setting, values, tmp_path/'run', quiet=True)
    done = [p.name for p in (tmp_path/'run'/'stages').iterdir() if not p.name.startswith('.')]
    planned = sum(p.stages[p.stages.state == 'to do'].stage.nunique() for p in plans.values())
    # two supervisors may choose alike, and then a student is shared, too
    assert len(done) == planned if setting == 'use' else planned - 2 <= len(done) <= planned
    again = plan_varied(given, setting, values, tmp_path/'run')
    assert all(set(p.stages.state) == {'found'} for p in again.values())


def test_a_variation_numbers_its_lines_through(samples, tmp_path, capsys):
    run_varied(dict(PREFERENCES, samples=0, data=samples), 'use', ['hard', 'soft'], tmp_path/'run')
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith('[')]
    run = run_for_plan(tmp_path/'none')
    each = open_varied(variants(dict(PREFERENCES, samples=0, data=samples), 'use', ['hard', 'soft']), run, True)
    assert lines[-1].startswith(f'[{len(lines)}/{len(lines)}]') and len(lines) == sum(count_stages(run, o.make) for o in each.values())


@pytest.mark.parametrize('passing, words', [
    ('', '0.7 GiB of weights, without activations'),
    ('8,192 padded tokens at once, without gradient checkpointing', '0.7 GiB at the height (8,192 padded tokens at once, without'),
])
def test_a_plan_does_not_call_weights_the_height_of_memory(passing, words):
    "Where models are only read, activations and the program itself were not counted"
    stages = pd.DataFrame([('x-states', 'x', 'score', 5, 50, 'to do', 1.)], columns=[*'stage model kind rows tokens state minutes'.split()])
    assert words in Plan(stages, 1, .7*2**30, passing, '').summary
