"Two processes that hold a base together: what one process makes, whoever has more to do, where memory runs out, and where one dies"
import os
import pickle
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from launched import ended, started
from test_distributed import FEEDBACK, FULL, SMALL, STEP, Work, learn, read
from torch.distributed.fsdp import FSDPModule

from w2s.compare.comparison import check_elsewhere, run_experiment
from w2s.compare.label_settings import fill_classify
from w2s.compare.machines import Machines
from w2s.data.samples import sample_preferences
from w2s.errors import ConfigError, ModelError
from w2s.experiments.labels import open_labels
from w2s.io.signals import Stopped
from w2s.models import meeting
from w2s.models.load import LoadSettings, load_base
from w2s.models.meeting import LayerLost
from w2s.models.sharding import check_shard, is_split, own_weights, repeated_layers
from w2s.models.tiny import tiny_model
from w2s.train import processes
from w2s.train.loop import train
from w2s.train.processes import all_processes, is_main, process_number, together

if not hasattr(FSDPModule, 'reset_iter_state'): pytest.skip('an older PyTorch', allow_module_level=True)
PLAIN = replace(FULL, merging='off') # as a split base computes
KINDS, BITS, SECONDS = ('dpo', 'sft', 'class_head'), ('none', 'nf4'), 30
GIVEN = SMALL | FEEDBACK['labels'][2]
TWICE = replace(STEP, gradient_checkpointing=True)


def taught(work, folder):
    "Trainings of every kind, and in other ways of computing"
    found = {kind: learn(work, folder, kind) for kind in KINDS}
    found['twice'] = learn(work, folder, 'dpo', 'twice', step=TWICE)
    return found


def padded(home, folder, load): return learn(Work(home, replace(load, packing='off')), folder, 'sft', 'padded')


def stop_at(step, wanted=3):
    if step == wanted: os.kill(os.getpid(), signal.SIGTERM)


def stop_half(work, folder):
    try: learn(work, folder, 'sft', 'half', stop_at)
    except Stopped: return


def looks(work, seen):
    "What the first process computes after a step, while the others wait"
    ids = torch.tensor([work.texts[0].sequences[0].ids])
    def after(step):
        with torch.no_grad(): seen.append(float(work.base.model(ids).logits.std()))
    return after


# What the processes run

def job_everything(home):
    found = {}
    with all_processes():
        for bits in BITS:
            work, folder = Work(home, LoadSettings(bits, 'float32', shard='on')), home/'two'/bits
            found[bits] = {'size': together(lambda: layer_weights(work.base), 'sizes'), 'split': is_split(work.base.model)} # noqa: B023
            if bits == 'none':
                found[bits] |= taught(work, folder) | others(work, home)
                found[bits]['padded'] = padded(home, folder, LoadSettings(bits, 'float32', shard='on'))
            else: found[bits]['dpo'] = learn(work, folder, 'dpo')
            found[bits]['read'] = read(work, folder)
    if os.environ['RANK'] == '0': (home/'two.pkl').write_bytes(pickle.dumps(found))


def others(work, home):
    "Stopped, resumed, looked at by one of them, and short of memory in one of them"
    seen = []
    stop_half(work, home/'half-two')
    out = {'resumed': learn(work, home/'half-one', 'sft', 'half'), 'looked': learn(work, home/'two', 'sft', 'looked', looks(work, seen))}
    return out | {'seen': seen, 'short': short(work, home), 'short inside': short(work, home, True)}


def short(work, home, inside=False):
    "Memory runs out twice, in one of the processes, so that a block is halved: in the loss, or in the middle of a layer"
    model, goal = work.dpo(home/'two')
    left = [2*process_number()]
    def fail():
        left[0] -= 1
        if left[0] >= 0: raise torch.OutOfMemoryError('out of memory')
    def loss(logps, i):
        if not inside: fail()
        return goal.loss(logps, i)
    hook = repeated_layers(work.base.model)[1].self_attn.register_forward_hook(lambda *_: fail() if inside else None)
    try:
        curve = train(model, replace(goal, loss=loss), STEP, home/'two'/f'short-{inside}', seed=3, quiet=True)
        return curve, together(lambda: 'token_budget' in curve, 'budgets')
    finally:
        hook.remove()
        model.unload()


def layer_weights(base):
    "Numbers that this process keeps of layers, and of the rest"
    layers = sum(own_weights(m) for m in repeated_layers(base.model))
    return layers, own_weights(base.model) - layers


def job_shot(home):
    "The second process dies in the middle of a step"
    with all_processes():
        work = Work(home, LoadSettings('none', 'float32', shard='on'))
        model, goal = work.sft(home)
        def loss(logps, i):
            if not is_main() and list((home/'shot').glob('step-*')): os.kill(os.getpid(), signal.SIGKILL)
            return goal.loss(logps, i)
        try: train(model, replace(goal, loss=loss), STEP, home/'shot', seed=3, quiet=True)
        except processes.ProcessLost as e:
            print(f'said: {e}')
            raise SystemExit(1) from e


def job_broken(home):
    "The second process cannot load the model"
    with all_processes():
        name = home/'strong' if is_main() else home/'broken'
        try: load_base(name, LoadSettings('none', 'float32', shard='on'), device='cpu')
        except ModelError as e: print(f'said: {e}')


# The tests

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp('sharding')
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(80, seed=4)]
    tiny_model(home/'strong', texts, layers=3, seed=2)
    (home/'broken').mkdir()
    torch.set_num_threads(1)
    stop_half(Work(home, PLAIN), home/'half-one')
    return home


@pytest.fixture(scope='module')
def two(home):
    "What two processes have made"
    codes = ended(started(job_everything, [home], home/'everything'))
    assert codes == [0, 0], [(home/f'everything-{n}').read_text()[-2500:] for n in range(2)]
    return pickle.loads((home/'two.pkl').read_bytes())


@pytest.fixture(scope='module')
def one(home):
    "What one process makes"
    work, four, seen = Work(home, PLAIN), Work(home, replace(PLAIN, quantize='nf4')), []
    found = {'none': taught(work, home/'one') | {'read': read(work, home/'one'), 'size': layer_weights(work.base)}}
    found['none'] |= {'looked': learn(work, home/'one', 'sft', 'looked', looks(work, seen)), 'seen': seen}
    found['none']['padded'] = padded(home, home/'one', PLAIN)
    dpo = learn(four, home/'one4', 'dpo')
    return found | {'nf4': {'dpo': dpo, 'read': read(four, home/'one4'), 'size': layer_weights(four.base)}}


def near(ours, plain):
    assert ours.keys() == plain.keys() and max(np.abs(plain[n]).max() for n in plain) > .01
    assert max(np.abs(ours[n] - plain[n]).max() for n in plain) < 1e-6


def same_curve(ours, plain):
    for c in ('loss', 'value', 'grad_norm', 'learning_rate'): np.testing.assert_allclose(ours[c], plain[c], rtol=2e-5, atol=1e-6)


@pytest.mark.cases(3)
@pytest.mark.parametrize('kind', [*KINDS, 'twice', 'padded', 'looked', 'nf4'])
def test_adapters_are_those_of_one_process(one, two, kind):
    where = ('nf4', 'dpo') if kind == 'nf4' else ('none', kind)
    (ours, curve), (plain, steps) = two[where[0]][where[1]], one[where[0]][where[1]]
    near(ours, plain)
    same_curve(curve, steps)


@pytest.mark.parametrize('bits', BITS)
def test_each_process_keeps_half_of_the_layers(one, two, bits):
    whole, rest = one[bits]['size']
    assert two[bits]['split'] and len(two[bits]['size']) == 2
    for layers, other in two[bits]['size']: assert .5*whole <= layers < .52*whole and other == rest


@pytest.mark.cases(1)
@pytest.mark.parametrize('bits', BITS)
def test_scores_and_texts_are_those_of_one_process(one, two, bits):
    ours, plain = two[bits]['read'], one[bits]['read']
    assert ours['texts'] == plain['texts']
    for name in ('probs', 'states', 'head', 'rewards', 'stored'): np.testing.assert_array_equal(ours[name], plain[name], err_msg=name)


def test_the_first_process_looks_alone(one, two):
    assert len(two['none']['seen']) == 6
    np.testing.assert_allclose(two['none']['seen'], one['none']['seen'], rtol=1e-5)


@pytest.mark.parametrize('where', ['short', 'short inside'])
def test_memory_may_run_out_in_one_process(one, two, where):
    curve, halved = two['none'][where]
    same_curve(curve, one['none']['dpo'][1])
    assert halved == [False, True]


def test_a_training_of_one_process_goes_on_in_two(one, two): near(two['none']['resumed'][0], one['none']['sft'][0])


def test_a_training_of_two_processes_goes_on_in_one(one, two, home):
    assert [p.name for p in sorted((home/'half-two'/'half').glob('step-*'))][-1].endswith('3')
    ours, curve = learn(Work(home, PLAIN), home/'half-two', 'sft', 'half')
    near(ours, one['none']['sft'][0])
    pd.testing.assert_frame_equal(curve[:3], one['none']['sft'][1][:3], rtol=2e-5)


def test_a_process_that_dies_ends_the_other(home):
    start = time.time()
    codes = ended(started(job_shot, [home], home/'shot-log'), SECONDS)
    said = (home/'shot-log-0').read_text()
    assert codes == [1, -signal.SIGKILL] and time.time() - start < SECONDS, said
    assert 'said: another process of this command is gone' in said and list((home/'shot').glob('step-*'))


def test_a_model_is_loaded_by_all_or_by_none(home):
    assert ended(started(job_broken, [home], home/'broken-log'), SECONDS) == [0, 0]
    first, second = [(home/f'broken-log-{n}').read_text() for n in range(2)]
    assert 'said: another process could not load' in first and 'said:' in second and 'another process' not in second


# A whole comparison, with a weak and a strong model

def labels(folder, **load):
    given = GIVEN | {'load': SMALL['load'] | load}
    return run_experiment(open_labels, fill_classify(given), folder, quiet=True).items


def job_labels(home):
    items = labels(home/'split', shard='on')
    if os.environ['RANK'] == '0': items.to_parquet(home/'split.parquet')


def test_a_whole_comparison(home):
    assert ended(started(job_labels, [home], home/'labels-log')) == [0, 0], (home/'labels-log-0').read_text()[-1500:]
    plain, items = labels(home/'plain', merging='off'), pd.read_parquet(home/'split.parquet')
    keys = [c for c in plain.columns if c not in ('value', 'seconds')]
    pd.testing.assert_frame_equal(items[keys], plain[keys], check_dtype=False)
    np.testing.assert_allclose(items['value'], plain['value'], rtol=1e-5, atol=1e-5)
    split, whole = ({p.name for p in (home/name/'stages').iterdir()} for name in ('split', 'plain'))
    assert {n.rpartition('-')[0] for n in split} == {n.rpartition('-')[0] for n in whole} and len(split) > 3
    assert any(n.startswith('ceiling') for n in split & whole) # later keys hold the bits of what was learned before


# What is refused

def test_one_process_is_refused(home):
    split = replace(FULL, shard='on')
    for ask in (lambda: load_base(home/'strong', split), lambda: check_elsewhere(Machines(), split)):
        with pytest.raises(ConfigError, match='torchrun'): ask()


@pytest.mark.parametrize(('bits', 'kind'), [('nf4', 'cuda'), ('nf4', 'mps'), ('none', 'mps'), ('none', 'xpu')])
def test_devices_on_which_it_was_not_shown_are_refused(bits, kind):
    with pytest.raises(ConfigError, match=f'--quantize {bits} is not supported on {kind}'): check_shard('on', bits, kind)


def test_other_values_are_refused():
    with pytest.raises(ConfigError, match='shard'): LoadSettings(shard='auto')


def test_memory_that_runs_out_while_a_layer_is_gathered(monkeypatch):
    "A sentence, and not that another process is gone"
    class Layer:
        w2s_sample = SimpleNamespace(_parameters={'weight': torch.ones(2)}), 'weight'
        def reshard(self): pass
        def unshard(self): raise torch.OutOfMemoryError('out of memory')
    layer = Layer()
    monkeypatch.setattr(processes, '_JOINED', [processes.Joined(0, 1, None, SimpleNamespace(check=lambda keys: False))])
    monkeypatch.setattr(meeting, 'MEETING', [meeting.Meeting(1, processes.found_out, lambda: True, layers=[lambda: layer])])
    with pytest.raises(LayerLost, match='lower --token-budget'): meeting._gather([0], 0)
    with pytest.raises(LayerLost, match='has not loaded'): meeting._gather([1], -1)


def test_a_lost_layer_is_not_asked_for_again(monkeypatch):
    "The others are in the middle of it, and would wait for an answer"
    asked = []
    monkeypatch.setattr(processes, '_JOINED', [processes.Joined(0, 2, None, None)])
    monkeypatch.setattr(processes, 'gather', asked.append)
    def lose(): raise LayerLost('gone')
    with pytest.raises(LayerLost): together(lose, 'work')
    assert not asked
