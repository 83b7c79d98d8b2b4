"""`w2s run preferences` on the embedded world and its ladder: without arguments, without a network, killed while it samples, and with wrong
names"""
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from w2s.cli.app import weak_teacher_config
from w2s.compare.config import read_toml, to_table, to_toml
from w2s.compare.gold import sample_stage
from w2s.compare.learn import Study
from w2s.compare.models import know_model
from w2s.compare.plan import plan
from w2s.compare.preference_data import ladder_world, load_preferences
from w2s.compare.preference_settings import WeakTeacher, fill_settings
from w2s.compare.stages import Run
from w2s.errors import ConfigError
from w2s.experiments.preferences import open_preferences
from w2s.models.zoo import LADDER, card
from w2s.train import generate as generate_module
from w2s.world.facts import world_hash
from w2s.world.service import gold_reward

ROOT = Path(__file__).parents[1]
NO_NETWORK = '''
import socket, sys
def refuse(*a, **k): raise RuntimeError('somebody asked for the network')
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from w2s.cli.app import main
main()
'''


def w2s(*words, at):
    "The command in a process of its own, in a folder, without a network, and without having been told so"
    env = {k: v for k, v in os.environ.items() if not k.startswith(('HF_', 'TRANSFORMERS_'))} | {
        'PYTHONPATH': str(ROOT),
        'OMP_NUM_THREADS': '1',
    }
    return subprocess.run([sys.executable, '-c', NO_NETWORK, *map(str, words)], cwd=at, env=env, capture_output=True, text=True)


# Settings

def test_without_arguments():
    "Data of the world, two models of the ladder, in NF4, over three seeds, with responses"
    c = weak_teacher_config({}, None)
    assert c.data == 'world' and c.weak in LADDER and c.strong == 'base' and LADDER.index(c.weak) < LADDER.index(c.strong)
    assert c.load.quantize == 'nf4' and c.seeds == 3 and c.samples == 2


def test_what_is_given_holds(tmp_path):
    "A flag wins over a file, a file over the defaults of ladder and world, and these over the paper's; nothing beside is touched"
    (tmp_path/'a.toml').write_text('beta = 0.3\nseeds = 2\n[dpo]\nepochs = 5\n')
    c, plain = weak_teacher_config({'beta': .2, 'load': {'dtype': 'bfloat16'}}, tmp_path/'a.toml'), weak_teacher_config({}, None)
    assert (c.beta, c.seeds, c.dpo.epochs, c.load.dtype) == (.2, 2, 5, 'bfloat16')
    assert dataclasses.replace(c, beta=plain.beta, seeds=plain.seeds, dpo=plain.dpo, load=plain.load) == plain
    assert dataclasses.replace(c.dpo, epochs=plain.dpo.epochs) == plain.dpo


@pytest.mark.parametrize(
    'given', [{}, {'weak': 'pico'}, {'data': 'world:7'}, {'samples': 0}, {'strong': './mine'}, {'data': './mine'}, {'seeds': 1, 'rows': 40}]
)
def test_written_settings_are_the_run(given, tmp_path):
    "config.toml of a run, given back, is the same run: every value is in it"
    c = fill_settings(given)
    (tmp_path/'config.toml').write_text(to_toml(c), encoding='utf-8')
    assert weak_teacher_config({}, tmp_path/'config.toml') == c
    written = read_toml(tmp_path/'config.toml')
    assert written.keys() >= {f.name for f in dataclasses.fields(c) if getattr(c, f.name) is not None} and written == to_table(c)


@pytest.mark.parametrize('given', [{'weak': 'facebook/opt-125m'}, {'strong': './mine'}])
def test_other_models_have_the_papers_settings(given):
    "One model of the ladder is not enough for its learning rates"
    c, paper = fill_settings(given), WeakTeacher('pairs.jsonl', 'weak', 'strong')
    assert (c.beta, c.sft, c.dpo, c.load, c.lora, c.seeds) == (paper.beta, paper.sft, paper.dpo, paper.load, paper.lora, paper.seeds)


def test_samples_need_a_judge():
    for bad in ({'data': './pairs', 'samples': 2}, {'samples': 0, 'temperature': .7}, {'samples': 2, 'temperature': 0.}):
        with pytest.raises(ConfigError): fill_settings(bad)


def test_ladder_has_read_of_this_world():
    "Facts of the rows are facts that the models were taught"
    for name in LADDER: assert card(name)['world']['hash'] == world_hash(ladder_world())


# Wrong names

@pytest.mark.parametrize('words, said', [
    (['run', 'preferences', '--weak', 'picoo'], ['did you mean "pico"', 'pico, nano, micro, base']),
    (['run', 'preferences', '--strong', 'bas'], ['did you mean "base"']),
    (['run', 'preferences', '--data', 'world:one'], ['a number, as in world:3']),
    (['run', 'preferences', '--data', 'nowhere.jsonl', '--samples', '2'], ['only data "world" has a gold reward']),
    (['zoo', 'build', '--size', 'bas', '--out', 'x'], ['did you mean "base"']),
])
def test_wrong_names(words, said, tmp_path):
    "One line that names what there is, at once, without a network, and nothing left behind"
    done = w2s(*words, at=tmp_path)
    assert done.returncode == 1 and 'Traceback' not in done.stderr
    assert all(s in done.stderr for s in said), done.stderr
    assert not list(tmp_path.iterdir())


# A run

@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A whole run, small, with the smallest models"
    home = tmp_path_factory.mktemp('world')
    start = time.time()
    done = w2s(
        'run',
        'preferences',
        '--weak',
        'pico',
        '--strong',
        'pico',
        '--n-labelled',
        20,
        '--n-unlabelled',
        20,
        '--n-test',
        20,
        '--seeds',
        1,
        at=home,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return home/'runs'/'preferences', done.stdout, time.time() - start


def test_small_run(small):
    "From the command to figure and responses, in less than a minute"
    folder, printed, seconds = small
    assert seconds < 60 or os.getloadavg()[0] > os.cpu_count(), f'{seconds:.0f} s'
    assert 'Rows made from the embedded world' in printed and '[22/22]' in printed and 'gold_reward' in printed and 'win_rate' in printed
    assert {
        'report.md',
        'figure.png',
        'figure.svg',
        'results.parquet',
        'responses.parquet',
        'config.toml',
        'versions.json',
        'adapters',
    } <= {p.name for p in folder.iterdir()}
    report = (folder/'report.md').read_text(encoding='utf-8')
    for words in ('## Responses', '## Differences', 'Win rate:', 'Rows made from the embedded world', 'quantize = "nf4"'):
        assert words in report
    assert read_toml(folder/'config.toml')['seeds'] == 1


def test_small_run_adds_up(small):
    "The table is what the responses are worth, by the world's own reward"
    table, said = pd.read_parquet(small[0]/'results.parquet'), pd.read_parquet(small[0]/'responses.parquet')
    assert len(said) == 6 * 20 * 2 and set(zip(said.role, said.method, strict=True)) == {
        ('floor', 'dpo human'),
        ('baseline', 'sft human'),
        ('baseline', 'sft weak'),
        ('student', 'dpo weak'),
        ('human', 'dpo human'),
        ('ceiling', 'dpo gold'),
    }
    for r in said.itertuples(): assert r.gold_reward == gold_reward(ladder_world(), r.prompt, r.response).score and r.why
    means = said.groupby(['role', 'method']).gold_reward.mean()
    of = table[table.metric == 'gold_reward'].set_index(['role', 'method']).value
    assert np.allclose(of.sort_index(), means.sort_index())
    wins = table[table.metric == 'win_rate'].set_index(['role', 'method']).value
    assert wins['baseline', 'sft human'] == .5 and wins.between(0, 1).all()
    differences = pd.read_parquet(small[0]/'differences.parquet')
    assert set(differences.metric) == {'accuracy', 'gold_reward'}


def test_second_start_finds_all(small):
    "The same command again finds every stage done"
    again = w2s('run', 'preferences', '--config', small[0]/'config.toml', '--out', small[0], at=small[0])
    assert again.returncode == 0 and again.stdout.count(': found') == 22, again.stderr[-2000:]


# Sampling as a stage

@pytest.fixture
def writers(tmp_path):
    "A study of two sizes, a model, and test rows"
    config = fill_settings(dict(weak='pico', strong='pico', n_test=20, n_labelled=4, n_unlabelled=4))
    model = know_model('strong', config.strong, config)
    test = load_preferences(config.data, [model.reader], config.n_test).test
    return lambda where, **more: (
        Study(dataclasses.replace(config, **more), Run(tmp_path / where, lambda line: None), True),
        model,
        None,
        'base',
        test,
        0,
    )


def test_killed_while_sampling(writers, monkeypatch, tmp_path):
    "A kill between two batches loses one batch, and the responses are the same"
    straight, calls, real = sample_stage(*writers('a')), [], generate_module.write
    def killed(*a, **k):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(generate_module, 'plan_batches', lambda lengths, *_: [list(range(len(lengths)))[i::3] for i in range(3)])
        m.setattr(generate_module, 'POOL', 1) # batches do not refill each other: one call for each
        m.setattr(generate_module, 'write', killed)
        with pytest.raises(KeyboardInterrupt): sample_stage(*writers('b'))
        assert sample_stage(*writers('b')) == straight
    assert len(calls) == 4 # three batches, one of them begun twice
    assert not [p for p in (tmp_path/'b').rglob('*') if 'writing' in p.name or 'unfinished' in p.name]


def test_settings_of_responses_act(writers, tmp_path):
    "samples, temperature and response_tokens change the stage's key; nothing else of the configuration does"
    sample_stage(*writers('c'))
    for n, more in enumerate((dict(samples=1), dict(temperature=.5), dict(response_tokens=5)), 2):
        sample_stage(*writers('c', **more))
        assert len(list((tmp_path/'c'/'stages').iterdir())) == n
    for same in (dict(beta=.2), dict(seeds=1), dict(n_labelled=9)): sample_stage(*writers('c', **same))
    assert len(list((tmp_path/'c'/'stages').iterdir())) == 4


def test_samples_do_not_depend_on_batches(writers, monkeypatch):
    "Other batches, the same responses"
    whole = sample_stage(*writers('d'))
    monkeypatch.setattr(generate_module, 'plan_batches', lambda lengths, *_: [list(range(len(lengths)))[i::4] for i in range(4)])
    assert sample_stage(*writers('e')) == whole


def test_plan_counts_responses():
    "--dry-run knows of the responses"
    p = plan(
        open_preferences, fill_settings(dict(weak='pico', strong='pico', n_labelled=4, n_unlabelled=4, n_test=4, seeds=1)), 'runs/none'
    )
    assert 'write' in set(p.stages.kind) and p.minutes > 0
    assert json.dumps(p.report)
