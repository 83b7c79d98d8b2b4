"""Before a long run: no check that cannot fail. Every line is seen to turn yellow or red for what it is there to find"""
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from families import make_model
from typer.testing import CliRunner

import w2s.check.check as checks
import w2s.check.models as models
from w2s.check.check import check_study
from w2s.check.lights import LIGHTS
from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.label_settings import fill_labels
from w2s.compare.preference_settings import fill_settings
from w2s.experiments.demonstrations import open_demonstrations
from w2s.experiments.labels import open_labels
from w2s.experiments.preferences import open_preferences
from w2s.models.bits import Bits

SMALL = dict(weak='pico', strong='pico', n_labelled=24, n_unlabelled=24, n_test=60, seeds=3, samples=0, others=())
WORDS = ['lamp', 'key', 'glass', 'rope', 'torch', 'blade', 'cord', 'stone', 'cup', 'wire']


def pairs(n, end='', seed=0):
    "Rows of preferences that share no long run of words"
    draw = random.Random(seed)
    def some(k): return ' '.join(f'{draw.choice(WORDS)}{draw.randrange(10**6)}' for _ in range(k))
    return [
        dict(prompt=f'Where is the {some(3)}?', chosen=f' It is near the {some(2)}.{end}', rejected=f' {some(2)}.{end}') for _ in range(n)
    ]


def write_splits(place, train, test):
    place.mkdir()
    for name, part in (('train', train), ('test', test)):
        (place/f'{name}.jsonl').write_text('\n'.join(map(json.dumps, part)), encoding='utf-8')
    return str(place)


@pytest.fixture
def untimed(monkeypatch):
    "Time and memory are not measured"
    monkeypatch.setattr(checks, '_cost', lambda opened: [])


def checked(data, **more):
    return check_study(open_preferences, fill_settings(SMALL | dict(data=data) | more))


def lights(found):
    "The worst light of each check"
    out = {}
    for line in found.lines: out[line.check] = max(out.get(line.check, 'ok'), line.light, key=LIGHTS.index)
    return out


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    return write_splits(tmp_path_factory.mktemp('rows')/'clean', pairs(60), pairs(60, seed=1))


def test_a_study_without_faults(clean):
    found = checked(clean)
    assert {k for k, v in lights(found).items() if v != 'ok'} == {'what it can find'}, found # 60 test examples
    assert found.light == 'look' and len(found.examples) == 3 and all(' ‖ ' in e for e in found.examples)
    assert {'4 bits', 'template and boundary', 'end tokens', 'cut examples', 'log-probs', 'gradients', 'loss falls', 'test in train',
            'duplicates', 'left out', 'seeds', 'memory', 'time'} < lights(found).keys()


def shifted(model, data, whole=models.logprobs.response_logps):
    "Log-probs that are off, of the rows of a study alone"
    return whole(model, data) + 5*(data.count == 10)


def frozen(base, lora, *more, make=models.add_adapter):
    "An adapter of which a layer is not trained"
    adapted = make(base, lora, *more)
    for n, p in adapted.named_parameters():
        if 'layers.0' in n: p.requires_grad_(False)
    return adapted


FAULTS = { # check: its light, and what is wrong
    'one seed': ('seeds', 'look', dict(seeds=1), None),
    'few test examples': ('what it can find', 'stop', dict(n_test=5), None),
    'a high learning rate': ('loss falls', 'stop', dict(dpo=dict(learning_rate=90.)), None),
    'a learning rate of nearly nothing': ('loss falls', 'look', dict(sft=dict(learning_rate=1e-9), dpo=dict(learning_rate=1e-9)), None),
    'a short limit': ('cut examples', 'stop', dict(max_length=64), None),
    'log-probs of another head': ('log-probs', 'stop', {}, lambda m: m.setattr(models.logprobs, 'response_logps', shifted)),
    'an adapter that is frozen': ('gradients', 'stop', {}, lambda m: m.setattr(models, 'add_adapter', frozen)),
    'a model that is half in 4 bits': ('4 bits', 'look', {}, lambda m: m.setattr(
        checks, 'open_base', lambda model, make=checks.open_base: replace(make(model), bits=Bits(60, 100, {'experts': 40})))),
    'a model without 4 bits': ('4 bits', 'stop', {}, lambda m: m.setattr(
        checks, 'open_base', lambda model, make=checks.open_base: replace(make(model), bits=Bits(0, 100, {'experts': 100})))),
    'an end that is none': ('end tokens', 'look', {}, lambda m: m.setattr(checks, 'end_ids', lambda *a: {0})),
}


@pytest.mark.cases(4)
@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_seen(clean, untimed, fault, monkeypatch):
    check, light, more, patch = FAULTS[fault]
    if patch: patch(monkeypatch)
    found = checked(clean, **more)
    assert lights(found)[check] == light, found
    others = {k: v for k, v in lights(found).items() if v == 'stop' and k != check}
    assert not others, found


@pytest.mark.parametrize(('share', 'light'), [(.5, 'look'), (1, 'stop')])
def test_test_examples_in_the_training_rows(tmp_path, untimed, share, light):
    "With another end, so that no reader takes them for the same"
    train = pairs(60, ' one two three four five six seven eight nine ten eleven')
    near = [dict(r, prompt=f'Tell me: {r["prompt"]}') for r in train[:int(40*share)]]
    found = checked(write_splits(tmp_path/'rows', [dict(r, chosen=r['chosen'] + f' {i}') for i, r in enumerate(train)],
                                 [*near, *pairs(40 - len(near), seed=3)]), n_labelled=30, n_unlabelled=30)
    assert lights(found)['test in train'] == light, found


def test_rows_that_are_left_out(tmp_path, untimed):
    equal = [dict(r, rejected=r['chosen']) for r in pairs(10, seed=5)]
    found = checked(write_splits(tmp_path/'rows', [*pairs(60), *equal], pairs(40, seed=1)))
    line = next(x for x in found.lines if x.check == 'left out')
    assert line.light == 'look' and '10 of 110 rows' in line.says


@pytest.mark.parametrize(('kind', 'patch', 'light'), [
    ('memory', lambda m: m.setattr(checks, 'room_of', lambda device: 1), 'stop'),
    ('time', lambda m: m.setattr(checks, 'plan_opened', slow), 'stop'),
])
def test_time_and_memory(clean, monkeypatch, kind, patch, light):
    monkeypatch.setattr(checks, 'check_weights', lambda reading, config: [])
    patch(monkeypatch)
    assert lights(checked(clean))[kind] == light


def slow(opened, plan=checks.plan_opened):
    "A run of a month"
    found = plan(opened)
    return replace(found, stages=found.stages.assign(minutes=60*24*30.))


@pytest.mark.parametrize(('change', 'said'), [
    (dict(data='/nowhere/rows.jsonl'), 'nowhere'),
    (dict(strong='/nowhere/model'), 'nowhere'),
    (dict(n_labelled=10**6), '1000000'),
])
def test_what_cannot_be_opened_is_a_line(clean, change, said):
    found = checked(**(dict(data=clean) | change))
    assert (found.light, [x.check for x in found.lines]) == ('stop', ['opens']) and said in found.lines[0].says


def test_a_damaged_model_is_a_line(clean, tmp_path, untimed):
    place = make_model('llama', tmp_path/'base')
    from safetensors.torch import load_file, save_file
    tensors = load_file(place/'model.safetensors')
    tensors[sorted(tensors)[0]][0] = float('nan')
    save_file(tensors, place/'model.safetensors', metadata={'format': 'pt'})
    found = checked(clean, strong=str(place))
    assert [x.check for x in found.lines if x.light == 'stop' and x.model == 'base'] == ['loads'], found


FEW = dict(weak='pico', strong='pico', n_labelled=16, n_unlabelled=24, n_test=60, seeds=1)

@pytest.mark.parametrize(('opens', 'config'), [
    (open_labels, lambda: fill_labels(FEW | dict(readout='head'))),
    (open_labels, lambda: fill_labels(FEW | dict(readout='words'))),
    (open_demonstrations, lambda: fill_demonstrations(FEW | dict(methods='naive'))),
])
def test_every_kind_of_feedback(untimed, opens, config):
    found = check_study(opens, config())
    assert found.light != 'stop', found
    assert {'4 bits', 'log-probs', 'gradients', 'loss falls', 'test in train', 'what it can find'} <= lights(found).keys()
    readout = getattr(config(), 'readout', '')
    assert ('end tokens' in lights(found)) is not bool(readout) and ('template and boundary' in lights(found)) is (readout != 'head')


def test_nothing_is_written(clean, untimed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checked(clean)
    assert not list(Path(tmp_path).iterdir())


@pytest.mark.parametrize(('more', 'code'), [([], 0), (['--dpo-lr', '90'], 1)])
def test_the_command(clean, untimed, more, code, tmp_path, monkeypatch):
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    words = ['check', '--weak', 'pico', '--strong', 'pico', '--data', clean, '--seeds', '3', '--n-labelled', '24', '--n-unlabelled', '24']
    done = CliRunner().invoke(app, [*words, *more, '--json', str(tmp_path/'found.json')])
    found = json.loads((tmp_path/'found.json').read_text(encoding='utf-8'))
    assert done.exit_code == code, done.output
    assert (found['light'] == 'stop') is bool(code) and done.output.splitlines()[-1].startswith(f'{found["light"]}: ')
    assert {'check', 'light', 'says', 'model'} == set(found['lines'][0]) and len(found['examples']) == 3


@pytest.mark.parametrize(('words', 'said'), [
    (['--kind', 'labeller'], 'unknown kind'), (['--kind', 'labels'], 'needs rows'), (['--no-such-flag'], 'No such option'),
    (['--weak', 'picoo'], 'picoo')])
def test_what_is_typed_wrongly(words, said, monkeypatch):
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    done = CliRunner().invoke(app, ['check', *words])
    assert done.exit_code != 0 and said in done.output, done.output
