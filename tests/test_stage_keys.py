"""The key of every stage knows everything that its result depends on.

Each function that runs a stage is called once plainly and once for each of its inputs with that one thing changed. Nothing is trained.
The inputs that change must be all there are: an input that is forgotten, and one that nobody has thought of here, both fail."""
import ast
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import w2s.compare
from w2s.compare import answer as answer_stages
from w2s.compare import demonstration_files as transfer_files
from w2s.compare import demonstration_mixes as transfer_mixes
from w2s.compare import demonstration_stages as transfer_stages
from w2s.compare import gold, learn, models, preference_stages, score, supervisors, toxicity_arms, toxicity_scores
from w2s.compare import label_stages as class_stages
from w2s.compare import preference_arms as arms
from w2s.compare.arms import Arm
from w2s.compare.label_settings import parse_method
from w2s.compare.learn import Study
from w2s.compare.models import know_model
from w2s.compare.preference_settings import fill_settings
from w2s.compare.stages import Run, run_stage, stage_folder
from w2s.data.rows import make_rows, to_pairs
from w2s.feedback.demonstrators import demonstrated
from w2s.feedback.forms import WORLD
from w2s.train.generate import GenerateSettings
from w2s.train.loop import TrainSettings
from w2s.train.sandbox import frozen_date

MODULES = [
    answer_stages,
    learn,
    models,
    score,
    arms,
    class_stages,
    gold,
    preference_stages,
    supervisors,
    toxicity_scores,
    toxicity_arms,
    transfer_files,
    transfer_mixes,
    transfer_stages,
]


class Asked(Exception):
    "Thrown instead of doing the work of a stage"


@pytest.fixture
def inputs_of(monkeypatch):
    "What a call asks `run_stage` for"
    seen = []
    def stand_in(run, name, inputs, work, sketch):
        seen.append({k: v() if callable(v) else v for k, v in inputs.items()})
        raise Asked
    for module in MODULES:
        if hasattr(module, 'run_stage'): monkeypatch.setattr(module, 'run_stage', stand_in)
        if hasattr(module, 'adapter_hash'): monkeypatch.setattr(module, 'adapter_hash', str)
    def ask(call, given):
        with pytest.raises(Asked): call(SimpleNamespace(**given))
        return seen.pop()
    return ask


def preferences(n=6, end='.', weight=1.):
    rows = make_rows(
        [dict(prompt=f'Customer: What is {i}?\nDesk:', chosen=f' Our book says {i}{end}', rejected=f' No {i}.') for i in range(n)],
        'preferences',
    )
    return rows.remove_columns('weight').add_column('weight', [weight]*n)


def doubtful(rows): return rows.remove_columns('prob').add_column('prob', [.75]*len(rows))


def labelled(n=6, end='?'):
    return make_rows([dict(prompt=f'Is {i} even{end}', label=i % 2, probs=[float(i % 2 == c) for c in (0, 1)]) for i in range(n)], 'labels')


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    "Arguments of every call; a change replaces some of them"
    config = fill_settings(dict(weak='pico', strong='pico'))
    classify = dict(lora=config.lora, student=config.dpo, supervisor=config.dpo, readout='words', penalty=1.)
    targets = np.array([[.3, .7]]*6)
    return dict(
        config=config,
        classify=classify,
        root=tmp_path_factory.mktemp('keys'),
        model=know_model('strong', 'pico', config),
        rows=preferences(),
        labels=labelled(),
        targets=targets,
        weights=np.ones(6),
        method=None,
        words=(' no', ' yes'),
        seed=0,
        start=Path('start'),
        adapter=Path('adapter'),
        reference=Path('reference'),
        kind='dpo',
        soft=False,
        loss='dpo',
        smoothing=None,
        settings=TrainSettings(),
        how=GenerateSettings(),
        prompts=['one', 'two'],
        said=[['a'], ['b']],
        name='x',
        snapshots=0,
        objective='dpo',
        key='oracle',
        task='persona',
        concept='a rude pirate',
        repeats=2,
        form=supervisors.ECHO,
        source='world',
        words_start=(' no', ' yes'),
    )


def study(n, config=None): return Study(config or n.config, Run(n.root, lambda line: None), True)
def settings(n, **more): return SimpleNamespace(**(n.classify | more))
def context_of(n, judge=None):
    return transfer_stages.Context(study(n), SimpleNamespace(seed=n.seed), n.model, WORLD, n.how, weak=n.model, judge=judge)
def adapters(n): return {'sft': n.reference, 'dpo': n.adapter}


def change(**by):
    "Other arguments: a function of the old one"
    return lambda g: g | {k: f(g[k]) for k, f in by.items()}


def of_config(**by): return change(config=lambda c: replace(c, **{k: f(getattr(c, k)) for k, f in by.items()}))
def of_load(**by): return change(model=lambda m: replace(m, load=replace(m.load, **by)))


def other_rate(t): return replace(t, learning_rate=t.learning_rate/3)


MODEL = dict(
    base=change(model=lambda m: replace(m, fingerprint='another')), quantize=of_load(quantize='none'), dtype=of_load(dtype='bfloat16')
)
TRAINED = MODEL | dict(lora=of_config(lora=lambda x: replace(x, rank=3)), seed=change(seed=lambda s: s + 1))
ROWS, LABELS = dict(rows=change(rows=lambda r: preferences(end='!'))), dict(rows=change(labels=lambda r: labelled(end='!')))
WEIGHTS = dict(weights=change(rows=lambda r: preferences(weight=.5)))
POLICY = dict(policy=change(adapter=lambda p: Path('other')), reference=change(reference=lambda p: Path('other')))
BETA = dict(beta=of_config(beta=lambda b: b/2))
TARGET = dict(target=change(targets=lambda t: t[:, ::-1]), weights=change(weights=lambda w: w/2))
CLASSIFIER = (
    TRAINED
    | LABELS
    | TARGET
    | dict(
        train=change(classify=lambda c: c | dict(student=other_rate(c['student']))),
        lora=change(classify=lambda c: c | dict(lora=replace(c['lora'], rank=3))),
        objective=change(method=lambda m: parse_method('confidence')),
        options=change(method=lambda m: replace(parse_method('xent'), options=(('warmup', 0.1),))),
    )
)
SAID = dict(texts=change(said=lambda s: [['a'], ['c']]))


def demos(n): return demonstrated(WORLD, [r for r in n.rows['prompt']], [r for r in n.rows['chosen']], 'gold').rows


def classifier(n, readout):
    return class_stages.learn_stage(
        study(n, settings(n, readout=readout)),
        n.model,
        n.words_start,
        'x',
        n.labels,
        n.targets,
        n.seed,
        n.classify['student'],
        n.weights,
        n.method,
        n.snapshots,
    )


def judged(n):
    c = SimpleNamespace(task=n.task, concept=n.concept, instruction='', repeats=n.repeats)
    return transfer_files.score_by_judge(study(n, c), n.model, n.prompts)(n.said[0]*2)


def doubt(n):
    "How sure a weak model was of its answers"
    rows = SimpleNamespace(seed=n.seed, unlabelled=SimpleNamespace(questions=n.prompts), labelled=SimpleNamespace(questions=[], gold=[]))
    context = transfer_stages.Context(study(n, SimpleNamespace(demonstrator='tuned', demonstrate=n.how)), rows, n.model, WORLD, n.how)
    said = [answer for (answer,) in n.said]
    return transfer_mixes.answer_doubt(context, SimpleNamespace(weak='pico', model=n.model, adapter=n.adapter, extra={'given': said}))


CASES = { # stage: (call, input -> what is changed, inputs that are always the same in this stage)
    'sft': (
        lambda n: preference_stages.sft_stage(study(n), n.model, 'x', n.rows, n.seed),
        TRAINED | ROWS | WEIGHTS | dict(train=of_config(sft=other_rate)),
        {'objective', 'start'},
    ),
    'dpo': (
        lambda n: preference_stages.dpo_stage(study(n), n.model, 'x', n.rows, n.start, n.seed, n.loss, n.smoothing, n.soft),
        TRAINED
        | ROWS
        | WEIGHTS
        | BETA
        | dict(
            train=of_config(dpo=other_rate),
            start=change(start=lambda s: None),
            objective=change(loss=lambda s: 'ipo'),
            target=change(soft=lambda s: True, rows=doubtful),
            smoothing=change(smoothing=lambda s: 0.3),
        ),
        set(),
    ),
    'a loss without a reference': (
        lambda n: preference_stages.dpo_stage(
            study(n), n.model, 'x', n.rows, n.start, n.seed, {'dpo': 'simpo'}.get(n.loss, n.loss), n.smoothing, n.soft
        ),
        TRAINED
        | ROWS
        | WEIGHTS
        | BETA
        | dict(
            train=of_config(dpo=other_rate),
            start=change(start=lambda s: None),
            objective=change(loss=lambda s: 'orpo'),
            options=change(loss=lambda s: 'simpo(gamma=3)'),
            alone=change(loss=lambda s: 'ipo'),
            mean=change(loss=lambda s: 'ipo'),
            target=change(soft=lambda s: True, rows=doubtful),
        ),
        {'smoothing'},
    ),
    'reward': (
        lambda n: supervisors.reward_stage(study(n), n.model, 'x', n.rows, n.seed),
        TRAINED | ROWS | WEIGHTS | dict(train=of_config(dpo=other_rate)),
        {'objective', 'start'},
    ),
    'snapshots': (
        lambda n: learn.train_stage(
            study(n), n.model, 'x', n.settings, n.start, {'a': n.said}, None, n.seed, [], snapshots=n.snapshots + 1
        ),
        TRAINED
        | dict(
            train=change(settings=other_rate),
            start=change(start=lambda s: None),
            snapshots=change(snapshots=lambda s: 2),
            a=change(said=lambda s: 'more'),
        ),
        set(),
    ),
    'asked': (
        lambda n: supervisors.ask(study(n), supervisors.supervisor_arm(n.model, n.kind, n.seed, adapters(n)), to_pairs(n.rows), 'labels'),
        MODEL | ROWS | POLICY | BETA,
        set(),
    ),
    'asked otherwise': (
        lambda n: supervisors.ask(
            study(n, replace(n.config, data=n.source)),
            supervisors.supervisor_arm(n.model, 'judge' if n.kind == 'dpo' else n.kind, n.seed, adapters(n)),
            to_pairs(n.rows),
            'labels',
        ),
        MODEL
        | ROWS
        | POLICY
        | BETA
        | dict(
            kind=change(kind=lambda k: 'reward'),
            form=change(source=lambda s: './rows', config=lambda c: replace(c, samples=0, temperature=None, response_tokens=None)),
        ),
        set(),
    ),
    'asked of a labeller': (
        lambda n: supervisors.ask(
            study(n), supervisors.supervisor_arm(None, n.kind.replace('dpo', 'length'), n.seed), to_pairs(n.rows), 'labels'
        ),
        dict(
            kind=change(kind=lambda k: 'length(scale=3)'),
            options=change(kind=lambda k: 'length(scale=3)'),
            seed=change(seed=lambda s: 1),
            pairs=change(rows=lambda r: preferences(end='!')),
        ),
        set(),
    ),
    'test without a reference': (
        lambda n: arms.evaluate_arm(
            study(n, replace(n.config, loss=n.loss.replace('dpo', 'simpo'))),
            Arm('student', 'simpo', seed=n.seed, trained=adapters(n), model=n.model),
            n.rows,
        ),
        MODEL | ROWS | BETA | dict(policy=POLICY['policy'], alone=change(loss=lambda s: 'ipo')),
        set(),
    ),
    'test': (
        lambda n: arms.evaluate_arm(study(n), Arm('student', 'dpo', seed=n.seed, trained=adapters(n), model=n.model), n.rows),
        MODEL | ROWS | POLICY | BETA,
        set(),
    ),
    'responses': (
        lambda n: gold.sample_stage(study(n), n.model, n.adapter, n.name, n.rows, n.seed),
        MODEL
        | dict(
            policy=POLICY['policy'],
            rows=change(rows=lambda r: preferences(5)),
            arm=change(name=lambda x: 'y'),
            seed=change(seed=lambda s: 1),
            how=of_config(temperature=lambda t: 0.3),
        ),
        set(),
    ),
    'answers': (
        lambda n: answer_stages.answer_texts(study(n), n.model, n.name, n.adapter, n.prompts, n.how, n.seed),
        MODEL
        | dict(
            adapter=POLICY['policy'],
            prompts=change(prompts=lambda p: ['one', 'three']),
            generate=change(how=lambda h: replace(h, max_tokens=9)),
            seed=change(seed=lambda s: 1),
        ),
        set(),
    ),
    'states': (lambda n: class_stages.hidden_stage(study(n, settings(n)), n.model, 'x', n.labels), MODEL | LABELS, set()),
    'classifier by words': (lambda n: classifier(n, 'words'), CLASSIFIER, {'start', 'readout'}),
    'classifier by a head': (
        lambda n: classifier(n, 'head'),
        CLASSIFIER | dict(start=change(words_start=lambda w: (' yes', ' no'))),
        {'readout'},
    ),
    'classifier asked': (
        lambda n: class_stages.ask_stage(
            study(n, settings(n, readout=n.kind.replace('dpo', 'head'))), n.model, n.adapter, (), 'x', n.labels
        ),
        MODEL | LABELS | dict(adapter=POLICY['policy'], readout=change(kind=lambda k: 'words')),
        set(),
    ),
    'demonstrations': (
        lambda n: transfer_stages.train_sft(context_of(n), n.model, 'x', demos(n), n.settings, n.start),
        TRAINED | ROWS | dict(train=change(settings=other_rate), start=change(start=lambda s: None)),
        {'objective'},
    ),
    'toxicity: tune': (
        lambda n: toxicity_arms.train_on_lines(context_of(n), n.model, 'x', demos(n)),
        TRAINED | ROWS | dict(train=of_config(sft=other_rate)),
        {'objective', 'start'},
    ),
    'toxicity: prefer': (
        lambda n: toxicity_arms.train_on_pairs(context_of(n), n.model, 'x', n.rows),
        TRAINED | ROWS | BETA | dict(train=of_config(dpo=other_rate)),
        {'objective', 'start'},
    ),
    'toxicity: judge': (
        lambda n: toxicity_arms.judge_pairs(context_of(n), n.adapter, n.rows),
        MODEL | ROWS | BETA | dict(policy=POLICY['policy']),
        set(),
    ),
    'perplexity': (lambda n: toxicity_scores.perplexity_stage(context_of(n), 'x', n.prompts, n.said), MODEL | SAID, set()),
    'scores': (
        lambda n: toxicity_arms.toxicity_stage(context_of(n, (None, n.key)), 'x', n.prompts, n.said),
        SAID | dict(scorer=change(key=lambda k: 'another')),
        set(),
    ),
    'doubt': (
        doubt,
        MODEL | dict(policy=POLICY['policy'], rows=change(said=lambda s: [['a'], ['c']])),
        {'what'},
    ),
    'ratings': (
        judged,
        MODEL
        | dict(
            repeats=change(repeats=lambda r: 5),
            concept=change(concept=lambda c: 'a poet'),
            rubrics=change(task=lambda t: 'gender'),
            questions=change(prompts=lambda p: ['one', 'three']),
            answers=change(said=lambda s: [['c'], ['b']]),
        ),
        {'chat'},
    ),
}
# A probe is a stage behind another one. At 1 its penalty is no input: such stages are from before there was a choice
PENALTY = dict(penalty=change(classify=lambda c: c | dict(penalty=.1)))
PROBE = MODEL | LABELS | TARGET | PENALTY


@pytest.mark.parametrize('stage, name', [(s, i) for s, (_, changes, _) in CASES.items() for i in changes])
def test_a_changed_input_is_another_stage(inputs_of, given, stage, name):
    call, changes, _ = CASES[stage]
    plain, other = inputs_of(call, given), inputs_of(call, changes[name](given))
    assert name in plain or name == 'snapshots', f'{stage} does not know its {name}'
    assert plain.get(name) != other.get(name)
    run = Run(Path('runs'), print)
    assert stage_folder(run, 'x', plain) != stage_folder(run, 'x', other)


@pytest.mark.parametrize('stage', CASES)
def test_every_input_was_changed_once(inputs_of, given, stage):
    "What a stage names beyond these would be in no test"
    call, changes, fixed = CASES[stage]
    assert set(inputs_of(call, given)) - {'device', 'source'} == changes.keys() | fixed


@pytest.mark.parametrize('stage', CASES)
def test_the_same_again_is_the_same_stage(inputs_of, given, stage):
    assert inputs_of(CASES[stage][0], given) == inputs_of(CASES[stage][0], given)


@pytest.mark.parametrize('name', PROBE)
def test_a_probe_knows_its_states_and_targets(monkeypatch, given, name):
    seen = []
    def stand_in(run, name, inputs, work, sketch):
        if name.endswith('-probe'): seen.append({k: v() if callable(v) else v for k, v in inputs.items()})
        return Path('x')
    for module in (class_stages, score): monkeypatch.setattr(module, 'run_stage', stand_in)
    monkeypatch.setattr(score, 'read_scores', lambda path: None)
    for g in (given, PROBE[name](given)): classifier(SimpleNamespace(**g), 'probe')
    assert seen[0].get(name) != seen[1][name] and set(seen[0]) - {'device'} == PROBE.keys() - PENALTY.keys()


@pytest.mark.parametrize('stage', [s for s, (_, changes, _) in CASES.items() if 'quantize' in changes])
def test_a_stage_knows_where_its_model_computes(inputs_of, given, stage, monkeypatch):
    "Another kind of device rounds otherwise, another one of its kind does not; adapters that compute in 16 bits round otherwise, too"
    plain = inputs_of(CASES[stage][0], given)
    monkeypatch.setattr('w2s.models.devices.accelerator', lambda: 'cuda')
    monkeypatch.setattr('w2s.models.devices.count_devices', lambda: 2)
    first, second, half = (
        inputs_of(CASES[stage][0], of_load(**by)(given))
        for by in (dict(device='cuda:0'), dict(device='cuda:1'), dict(device='cuda', dtype='bfloat16', compute='auto'))
    )
    assert (plain['device'], first['device']) == ('cpu', 'cuda') and second == first
    assert half['compute'] == 'autocast' and 'compute' not in plain and 'compute' not in first
    assert inputs_of(CASES[stage][0], of_load(dtype='bfloat16', compute='auto', device='cpu')(given)).keys() == plain.keys()


UNTUNED = {'answers': dict(adapter=None), 'responses': dict(adapter=None), 'ratings': {}} # what vLLM can write


@pytest.mark.parametrize('stage', [s for s, (_, changes, _) in CASES.items() if 'quantize' in changes])
def test_a_stage_knows_what_vllm_writes(inputs_of, given, stage, monkeypatch):
    "And its version; with an adapter, in training and in scoring w2s computes all the same, and the key is that without the setting"
    monkeypatch.setattr(models, 'vllm_version', lambda: '0.32.0')
    call, of_none = CASES[stage][0], given | UNTUNED.get(stage, {})
    def asked(g, engine='w2s'): return inputs_of(call, of_load(quantize='none', engine=engine)(g))
    plain, fast = asked(of_none), asked(of_none, 'vllm')
    assert 'engine' not in plain and fast == plain | ({'engine': 'vllm 0.32.0'} if stage in UNTUNED else {})
    assert asked(given) | ({} if stage != 'ratings' else {'engine': 'vllm 0.32.0'}) == asked(given, 'vllm')
    monkeypatch.setattr(models, 'vllm_version', lambda: '0.31.0')
    assert (asked(of_none, 'vllm') != fast) is (stage in UNTUNED)


@pytest.mark.parametrize(
    'stage', ['sft', 'dpo', 'reward', 'classifier by words', 'classifier by a head', 'demonstrations', 'toxicity: tune', 'toxicity: prefer']
)
def test_a_stage_knows_the_source_of_its_loss(inputs_of, given, stage, monkeypatch):
    "A loss whose body was changed is another loss"
    plain = inputs_of(CASES[stage][0], given)
    for module in MODULES:
        if hasattr(module, 'source_hash'): monkeypatch.setattr(module, 'source_hash', lambda *losses: 'another body')
    assert plain['source'] != inputs_of(CASES[stage][0], given)['source'] == 'another body'


@pytest.mark.parametrize('stage', [s for s, (_, changes, _) in CASES.items() if 'quantize' in changes])
def test_a_stage_knows_the_date_that_its_template_asks_for(inputs_of, given, stage, monkeypatch):
    "And only then"
    assert 'date' not in inputs_of(CASES[stage][0], given)
    monkeypatch.setattr(models, 'template_uses_date', lambda tokenizer: True)
    assert inputs_of(CASES[stage][0], given)['date'] == frozen_date().isoformat()


def test_every_stage_is_looked_at_here():
    "A new call of `run_stage` or `train_stage` fails here until it has a line in the table"
    found = set()
    for path in sorted(Path(w2s.compare.__path__[0]).parent.glob('*/*.py')):
        for f in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(f, ast.FunctionDef) and any(isinstance(c, ast.Call) and getattr(c.func, 'id', '') in STAGES for c in ast.walk(f)):
                found.add(f'{path.stem}.{f.name}')
    assert found - {'demonstration_files.score'} == {
        'learn.train_stage',
        'learn.sft_rows',
        'answer.answer_stage',
        'answer.answer_texts',
        'score.score_stage', # the one way to train, to answer, to score
        'preference_stages.sft_stage',
        'preference_stages.dpo_stage',
        'supervisors.reward_stage',
        'supervisors.ask',
        'preference_arms.evaluate_arm',
        'gold.sample_stage',
        'label_stages.hidden_stage',
        'label_stages.learn_stage',
        'label_stages._probe_stage',
        'label_stages.ask_stage',
        'demonstration_stages.train_sft',
        'demonstration_mixes.answer_doubt',
        'toxicity_arms.train_on_lines',
        'toxicity_arms.train_on_pairs',
        'toxicity_arms.judge_pairs',
        'toxicity_scores.perplexity_stage',
        'toxicity_arms.toxicity_stage',
        'demonstration_files.score_by_judge',
    }


STAGES = ('run_stage', 'train_stage', 'sft_rows', 'answer_stage', 'score_stage')


def test_every_stage_says_what_it_costs():
    "A stage without a sketch would be a stage without time in every plan"
    for path in sorted(Path(w2s.compare.__path__[0]).parent.glob('*/*.py')):
        for c in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(c, ast.Call) and getattr(c.func, 'id', '') == 'run_stage':
                assert len(c.args) == 5, f'{path.name}, line {c.lineno}'


@pytest.mark.parametrize('changed', ['name', 'inputs'])
def test_a_stage_is_found_again_by_name_and_inputs_alone(tmp_path, changed):
    done = []
    def work(folder): done.append(folder)
    run = Run(tmp_path, lambda line: None)
    first = run_stage(run, 'x', {'a': 1, 'b': [1, 2]}, work)
    assert run_stage(run, 'x', {'b': [1, 2], 'a': 1}, work) == first and len(done) == 1
    other = run_stage(run, *(('y', {'a': 1, 'b': [1, 2]}) if changed == 'name' else ('x', {'a': 1, 'b': [2, 1]})), work)
    assert other != first and len(done) == 2
