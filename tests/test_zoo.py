"The models that come with the package: whole, small, of one tokenizer, as their cards say, and carried by an installation"
import hashlib
import json
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import pytest
from safetensors import safe_open
from transformers import AutoTokenizer

from w2s.errors import ModelError
from w2s.evaluate.knowledge import PROBES
from w2s.models import zoo
from w2s.models.load import LoadSettings, load_base
from w2s.models.zoo import FOLDER, LADDER, SHIPPED, card, check_folder, model_folder, zoo_folder, zoo_table
from w2s.organism.ladder import RECIPE, SIZES, card_text, world_stream
from w2s.world.facts import VERSION, make_world, world_hash
from w2s.world.stream import stream_document

ROOT = Path(__file__).parents[1]
PLAIN = LoadSettings(quantize='none', dtype='float32')


@pytest.fixture(scope='module')
def world(): return make_world()


def weights(name: str) -> dict[str, tuple[tuple[int, ...], str]]:
    "Shape and type of each tensor of a model"
    with safe_open(FOLDER/name/'model.safetensors', 'pt') as f:
        return {k: (tuple(f.get_slice(k).get_shape()), f.get_slice(k).get_dtype()) for k in f.keys()} # noqa: SIM118


# Whole

@pytest.mark.parametrize('name', SHIPPED)
def test_every_file_is_listed_and_matches(name):
    listed = dict(reversed(line.split()) for line in (FOLDER/name/'SHA256SUMS').read_text().splitlines())
    there = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (FOLDER/name).iterdir() if f.name != 'SHA256SUMS'}
    assert listed == there
    assert {'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json', 'card.json', 'README.md', 'history.csv'} <= set(
        listed
    )


def test_at_most_20_megabytes():
    "The ladder and its scholar; 15 would be enough for the ladder alone"
    assert {f.name for f in FOLDER.iterdir()} == set(SHIPPED), 'a folder without a name, or a name without a folder'
    assert sum(f.stat().st_size for f in FOLDER.rglob('*') if f.is_file()) <= 20_000_000


@pytest.mark.parametrize('file', ['model.safetensors', 'config.json', 'tokenizer.json', 'card.json'])
def test_every_file_counts(tmp_path, file, monkeypatch):
    "One wrong byte in any of them, and the name is refused"
    shutil.copytree(FOLDER/'pico', tmp_path/'pico')
    monkeypatch.setattr(zoo, 'FOLDER', tmp_path)
    content = bytearray((tmp_path/'pico'/file).read_bytes())
    content[len(content)//2] ^= 1
    (tmp_path/'pico'/file).write_bytes(content)
    with pytest.raises(ModelError, match='not the file that was shipped'): zoo_folder('pico')
    with pytest.raises(ModelError, match='not the file that was shipped'): load_base('pico', PLAIN)


def test_sums_that_list_no_weights(tmp_path):
    shutil.copytree(FOLDER/'pico', tmp_path/'pico')
    (tmp_path/'pico'/'SHA256SUMS').write_text('')
    with pytest.raises(ModelError, match='does not list'): check_folder(tmp_path/'pico')


def test_names():
    with pytest.raises(ModelError, match='there are pico, nano, micro, base'): zoo_folder('giant')
    assert [model_folder(n) for n in LADDER] == [FOLDER/n for n in LADDER]
    assert [model_folder(n) for n in ('./pico', 'gpt2', Path('pico'))] == ['./pico', 'gpt2', Path('pico')]


def test_a_folder_of_the_same_name_does_not_win(tmp_path, monkeypatch):
    (tmp_path/'pico').mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_folder('pico') == FOLDER/'pico'


# One family

@pytest.mark.parametrize('name', LADDER)
def test_shape(name):
    config = json.loads((FOLDER/name/'config.json').read_text())
    assert config['model_type'] == 'llama'
    for size in (config['hidden_size'], config['intermediate_size'], config['vocab_size']):
        assert size % 64 == 0, 'NF4 works in blocks of 64'
    assert (
        asdict(SIZES[name])
        == dict(hidden=config['hidden_size'], layers=config['num_hidden_layers'], inner=config['intermediate_size'])
        == card(name)['size']
    )
    assert {kind for _, kind in weights(name).values()} == {'F16'}


@pytest.mark.parametrize('file', ['tokenizer.json', 'tokenizer_config.json'])
def test_one_tokenizer(file):
    assert len({(FOLDER/name/file).read_bytes() for name in SHIPPED}) == 1


def test_tokenizer_is_that_of_the_stream(world):
    "The recipe of the package makes the tokenizer of the package"
    made, shipped = world_stream(world, RECIPE).tokenizer, AutoTokenizer.from_pretrained(FOLDER/'base')
    assert made.get_vocab() == shipped.get_vocab()
    texts = [stream_document(world, random.Random(i)) for i in range(200)] + ['Something from outside: 7 % of "it".\n\n']
    assert [made(t).input_ids for t in texts] == [shipped(t).input_ids for t in texts]


# Cards

@pytest.mark.parametrize('name', LADDER)
def test_card_agrees_with_the_files(name, world):
    c, history = card(name), pd.read_csv(FOLDER/name/'history.csv')
    assert c['name'] == name
    assert c['parameters'] == sum(shape[0]*(shape[1] if len(shape) > 1 else 1) for shape, _ in weights(name).values())
    assert c['world'] == dict(version=VERSION, seed=0, people=len(world.people), things=len(world.things), hash=world_hash(world))
    assert c['recipe'] == asdict(RECIPE), 'the recipe of the package is not that of its models'
    assert (
        c['tokens'] >= RECIPE.tokens
        and 0 <= c['tokens'] - history.tokens.iloc[-1] < 10 * RECIPE.positions
        and history.step.iloc[-1] < c['steps'] <= history.step.iloc[-1] + 10
    )
    assert abs(history.loss.tail(5).mean() - c['loss']) < .1 < history.loss.iloc[0] - c['loss']
    assert set(c['knowledge']) == set(PROBES) and all(k['low'] <= k['value'] <= k['high'] for k in c['knowledge'].values())
    assert (FOLDER/name/'README.md').read_text() == card_text(c)


def test_models_read_the_same():
    "One stream, one recipe, one seed: what tells the models apart is their size"
    made = [{k: card(name)[k] for k in ('tokens', 'steps', 'seed', 'recipe', 'world')} for name in LADDER]
    assert all(m == made[0] for m in made)


def test_the_weakest_is_weak_and_the_strongest_strong():
    table = zoo_table()
    assert list(table.name) == list(LADDER) and table.parameters.is_monotonic_increasing
    assert table.facts.iloc[0] < .5 and table.facts.iloc[-1] > .95 and table.facts.is_monotonic_increasing
    assert (table['facts, held out'] < .15).all(), 'nobody can know what is not in the stream'


@pytest.mark.parametrize('probe', PROBES)
def test_card_of_pico_can_be_measured_again(probe, world, pico):
    "Other questions than those of the card: inside an interval three times as wide as its own, and a bit"
    known, again = card('pico')['knowledge'][probe], PROBES[probe](pico, world, 300, 7).mean()
    assert abs(again - known['value']) <= 1.5*(known['high'] - known['low']) + .01, (again, known)


@pytest.mark.parametrize('probe', ['facts', 'kinds', 'safe or not'])
def test_card_of_pico_is_reproduced(probe, world, pico):
    "The very questions of the card"
    known = card('pico')['knowledge'][probe]
    again = PROBES[probe](pico, world, 400, 0)
    assert len(again) == known['n'] and known['low'] <= again.mean() <= known['high']
    assert abs(again.mean() - known['value']) <= 2.5/len(again), 'but for a question or two, as other machines round otherwise'


@pytest.fixture(scope='module')
def pico(): return load_base('pico', PLAIN, device='cpu')


# Installation

def test_an_installation_carries_them(tmp_path):
    pytest.importorskip('setuptools')
    (tmp_path/'w2s').mkdir()
    for part in ('setup.py', 'settings.ini', 'MANIFEST.in', 'README.md'): shutil.copy(ROOT/part, tmp_path)
    for name in ('__init__.py', 'py.typed'): shutil.copy(ROOT/'w2s'/name, tmp_path/'w2s')
    shutil.copytree(ROOT/'w2s'/'models', tmp_path/'w2s'/'models', ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    for name in SHIPPED: (tmp_path/'w2s'/'models'/'ladder'/name/'model.safetensors').write_text('') # only names count here
    done = subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build_py', '--build-lib', 'out'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = {f.relative_to(tmp_path/'out'/'w2s'/'models'/'ladder').as_posix() for f in (tmp_path/'out').rglob('ladder/*/*')}
    assert there == {f.relative_to(FOLDER).as_posix() for f in FOLDER.rglob('*') if f.is_file()}
