"""What goes out of a run is the model that was trained: of every kind of feedback, on families of models, with tied and untied heads;
a wrong merge is refused, and a damaged adapter makes nothing"""
import json
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, make_model
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from typer.testing import CliRunner

import w2s.export.export as exports
from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.label_settings import fill_labels
from w2s.compare.models import know_model
from w2s.compare.preference_settings import fill_settings
from w2s.errors import ConfigError, ModelError
from w2s.experiments import demonstrations, labels, preferences
from w2s.export.arms import find_trained, read_settings
from w2s.export.export import Exported, ExportJob, export_run, push_export, trained_says
from w2s.export.fidelity import Said, Tolerance, measure_fidelity
from w2s.export.forms import check_gguf, headed_model, write_merged
from w2s.export.held_out import HeldOut
from w2s.export.merge import four_bit_weights, merge_adapter, plain_base
from w2s.export.plain import read_back, score_rows, token_logps
from w2s.io.manifests import MANIFEST
from w2s.models.adapters import CLASS_HEAD, HEAD, LoraSettings, add_adapter, save_adapter
from w2s.models.class_heads import add_class_adapter
from w2s.models.four_bits import METHOD
from w2s.models.heads import add_reward_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.report.write import write

PAIR = dict(weak='pico', strong='pico', seeds=1)
RUNS = { # kind of feedback: what makes a run of it
    'preferences': lambda: (preferences.run, fill_settings(
        PAIR | dict(n_labelled=24, n_unlabelled=32, n_test=24, samples=0, others=(), sft=dict(epochs=1), dpo=dict(epochs=1)))),
    'reward': lambda: (preferences.run, fill_settings(
        PAIR | dict(n_labelled=16, n_unlabelled=16, n_test=16, samples=0, others=(), loss='simpo', start='base', dpo=dict(epochs=1)))),
    'head': lambda: (labels.run, fill_labels(
        PAIR | dict(n_labelled=16, n_unlabelled=48, n_test=24, methods='xent', readout='head', student=dict(epochs=2)))),
    'words': lambda: (labels.run, fill_labels(
        PAIR | dict(n_labelled=16, n_unlabelled=32, n_test=24, methods='xent', readout='words', student=dict(epochs=1)))),
    'demonstrations': lambda: (demonstrations.run, fill_demonstrations(
        PAIR | dict(n_labelled=8, n_unlabelled=16, n_test=6, methods='naive', max_tokens=12, student=dict(epochs=1),
                    demonstrate=dict(epochs=1)))),
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A finished run of each kind, made when it is asked for"
    home, made = tmp_path_factory.mktemp('runs'), {}
    def of(kind):
        if kind not in made:
            run, config = RUNS[kind]()
            made[kind] = write(run(config, home/kind, quiet=True))
        return made[kind]
    return of


@pytest.fixture(autouse=True)
def read_once(monkeypatch, known={}): # noqa: B006
    "The test examples of a run are read once, and the model of a run is asked once, for all tests"
    def once(function):
        def ask(trained, *more):
            key = function.__name__, str(trained.adapter), more[-1] if isinstance(more[-1], int) else len(more[-1].rows)
            if key not in known: known[key] = function(trained, *more)
            return known[key]
        return ask
    says = once(lambda trained, model, held: trained_says(model, trained, held))
    monkeypatch.setattr(exports, 'held_out', once(exports.held_out))
    monkeypatch.setattr(exports, 'trained_says', lambda model, trained, held: says(trained, model, held))


# The round trip

@pytest.mark.cases(1)
@pytest.mark.parametrize('kind', RUNS)
def test_what_goes_out_is_what_was_trained(runs, kind, tmp_path):
    done = export_run(ExportJob(runs(kind), out=tmp_path/'out', rows=24))
    first, other = done.found
    assert first.holds and first.share < .1, done
    assert not other.holds and other.gap > 3*first.gap, done # the merge into the original base is another model
    assert done.metric == 'accuracy' and first.change.value == 0
    header = ModelCard.load(tmp_path/'out'/'README.md').data
    assert header.base_model == 'pico' and header.license == 'apache-2.0' and header.language == 'en' and header.datasets is None
    assert {r.metric_type for r in header.eval_results} >= {'accuracy'} and 'CI' in header.eval_results[0].metric_name
    text = (tmp_path/'out'/'README.md').read_text(encoding='utf-8')
    assert '## Limits' in text and 'n_unlabelled = ' in text and first.form in text and str(tmp_path) not in text
    assert not list(tmp_path.glob('.*')) # nothing is left beside it
    loaded = (AutoModelForSequenceClassification if kind == 'head' else AutoModelForCausalLM).from_pretrained(tmp_path/'out')
    assert loaded.dtype == torch.float16 and AutoTokenizer.from_pretrained(tmp_path/'out')


@pytest.mark.long
@pytest.mark.parametrize('to', ['adapter', 'gguf-ready'])
def test_other_forms(runs, to, tmp_path):
    done = export_run(ExportJob(runs('preferences'), to=to, out=tmp_path/'out', rows=12))
    assert done.found[0].holds
    names = {p.name for p in (tmp_path/'out').iterdir()}
    assert {'README.md', 'tokenizer.json'} | ({'adapter_config.json', 'adapter_model.safetensors'} if to == 'adapter' else
                                              {'config.json', 'model.safetensors'}) <= names
    if to == 'adapter':
        config = json.loads((tmp_path/'out'/'adapter_config.json').read_text(encoding='utf-8'))
        assert config['base_model_name_or_path'] == 'pico' and 'PeftModel' in (tmp_path/'out'/'README.md').read_text(encoding='utf-8')
        assert done.found[0].gap < 1e-4
    else: check_gguf(tmp_path/'out')


@pytest.mark.cases(1)
@pytest.mark.parametrize(('kind', 'to', 'said'), [
    ('head', 'gguf-ready', 'a GGUF file holds a language model'), ('head', 'adapter', 'which PEFT does not know')])
def test_a_head_has_its_forms(runs, kind, to, said, tmp_path):
    with pytest.raises(ModelError, match=said): export_run(ExportJob(runs(kind), to=to, out=tmp_path/'out', rows=4))
    assert not list(tmp_path.iterdir())


# Families, tied and untied

def trained_on(name, place, four='nf4', **change):
    "A model of a family with an adapter that moves it, and what it says"
    config = FAMILIES[name]()
    for k, v in change.items(): setattr(config, k, v)
    load = LoadSettings(four, 'float32')
    base = load_base(make_model(name, place/'base', config=config), load)
    adapted, draw = add_adapter(base, LoraSettings(rank=4, alpha=16), 0), torch.Generator().manual_seed(0)
    for n, p in adapted.named_parameters():
        if 'lora_B' in n: p.data = .05*torch.randn(p.shape, generator=draw)
    save_adapter(adapted, base, place/'adapter')
    rows = [[(tuple(range(3, 3 + n)), 2)] for n in (9, 14, 30)]
    mine = score_rows(adapted.eval(), rows)
    with adapted.disable_adapter(): untuned = score_rows(adapted, rows)
    adapted.unload()
    model = SimpleNamespace(name=str(place/'base'), load=load)
    return model, HeldOut(['1', '2', '3'], ['1', '2', '3'], rows, []), Said(mine, None), untuned


def merged_says(model, held, base, place, dtype=torch.bfloat16):
    write_merged(merge_adapter(plain_base(model, base), place/'adapter'), model, place/base, dtype)
    return Said(score_rows(read_back(place/base, torch.float32, 'cpu'), held.rows), None)


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'gemma2', 'falcon', 'mixtral', 'opt', 'qwen3_5'])
def test_families(name, tied, tmp_path):
    model, held, mine, untuned = trained_on(name, tmp_path, tie_word_embeddings=tied)
    right, wrong = (
        measure_fidelity(b, held, merged_says(model, held, b, tmp_path), mine, untuned) for b in ('dequantized', 'original')
    )
    assert right.holds and right.share < .08, right
    assert not wrong.holds and wrong.gap > 3*right.gap, wrong
    config = json.loads((tmp_path/'dequantized'/'config.json').read_text(encoding='utf-8'))
    assert config['tie_word_embeddings'] is tied and 'quantization_config' not in config


def test_a_base_without_four_bits_is_merged_as_it_is(tmp_path):
    model, held, mine, untuned = trained_on('llama', tmp_path, 'none')
    found = measure_fidelity('', held, merged_says(model, held, 'dequantized', tmp_path, torch.float32), mine, untuned)
    assert found.holds and found.gap < 1e-5


def test_dropout_of_the_base_is_kept_in_its_config(tmp_path):
    model, held, mine, untuned = trained_on('gpt2', tmp_path, resid_pdrop=.25)
    merged_says(model, held, 'dequantized', tmp_path)
    assert json.loads((tmp_path/'dequantized'/'config.json').read_text(encoding='utf-8'))['resid_pdrop'] == .25


def test_a_page_that_defines_the_quantizer_again_changes_nothing(tmp_path, monkeypatch):
    "Pages are tests and run in this process: what they leave in the tables of transformers is not what a later load uses"
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, Bnb4BitHfQuantizer)
    base = load_base(make_model('mixtral', tmp_path/'base'), LoadSettings('nf4', 'float32'))
    assert sum(w.numel() for w in four_bit_weights(base.model).values()) == base.bits.four > 0


@pytest.mark.parametrize('name', ['llama', 'mixtral', 'gpt2'])
def test_what_four_bits_stand_for(name, tmp_path):
    load = LoadSettings('nf4', 'float32')
    base = load_base(make_model(name, tmp_path/'base'), load)
    found = four_bit_weights(base.model)
    assert sum(w.numel() for w in found.values()) == base.bits.four > 0
    plain = plain_base(SimpleNamespace(name=str(tmp_path/'base'), load=load), 'dequantized')
    ids = list(range(3, 40))
    np.testing.assert_allclose(token_logps(plain.model, ids, 1), token_logps(base.model, ids, 1), atol=1e-4)


# Wrong merges

def tampered(change):
    "A merge of an adapter whose tensors or settings were changed"
    def merge(plain, adapter):
        place = adapter.parent/f'wrong-{adapter.name}'
        if not place.exists():
            place.mkdir()
            for f in adapter.iterdir():
                if f.name != MANIFEST: (place/f.name).write_bytes(f.read_bytes())
            tensors, config = load_file(adapter/'adapter_model.safetensors'), json.loads((place/'adapter_config.json').read_text())
            change(tensors, config)
            save_file({k: v.contiguous() for k, v in tensors.items()}, place/'adapter_model.safetensors')
            (place/'adapter_config.json').write_text(json.dumps(config))
        return merge_adapter(plain, place)
    return merge


def transpose(tensors, config):
    "The delta of square layers the other way round"
    for k in [k for k in tensors if 'lora_A' in k]:
        b = k.replace('lora_A', 'lora_B')
        if tensors[k].shape == tensors[b].T.shape: tensors[k], tensors[b] = tensors[b].T, tensors[k].T


def negate(tensors, config):
    for k in [k for k in tensors if 'lora_B' in k]: tensors[k] = -tensors[k]


def forget(tensors, config):
    for k in [k for k in tensors if 'lora_B' in k]: tensors[k] = 0*tensors[k]


WRONG = {
    'transposed': transpose,
    'scaling forgotten': lambda tensors, config: config.update(lora_alpha=config['r']),
    'scaled twice': lambda tensors, config: config.update(lora_alpha=config['r']*(config['lora_alpha']/config['r'])**2),
    'subtracted': negate,
    'adapter forgotten': forget,
}


@pytest.mark.cases(3)
@pytest.mark.parametrize('how', WRONG)
@pytest.mark.parametrize('kind', ['preferences', 'head'])
def test_a_wrong_merge_is_refused(runs, kind, how, tmp_path, monkeypatch):
    monkeypatch.setattr(exports, 'merge_adapter', tampered(WRONG[how]))
    job = ExportJob(runs(kind), out=tmp_path/'out', rows=24)
    for old in job.run.glob('adapters/wrong-*'): exports.remove_tree(old)
    with pytest.raises(ModelError, match='is not exported: merged into the dequantized 4-bit base, its log-probs are') as e:
        export_run(job)
    assert 'marked as refused' in str(e.value)
    assert [p.name for p in tmp_path.iterdir()] == ['out.refused']
    assert (tmp_path/'out.refused'/'REFUSED').exists()
    assert '> **REFUSED.**' in (tmp_path/'out.refused'/'README.md').read_text(encoding='utf-8')
    for old in job.run.glob('adapters/wrong-*'): exports.remove_tree(old)


def test_the_original_base_is_refused_and_allowed(runs, tmp_path, monkeypatch):
    "The command ends with 1; a tolerance that allows it lets it through"
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    words = ['export', str(runs('preferences')), '--base', 'original', '--rows', '12', '--out', str(tmp_path/'out')]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and 'marked as refused' in done.output and 'take the other --base' in done.output
    assert not (tmp_path/'out').exists()
    done = CliRunner().invoke(app, [*words, '--rounding', '.99'])
    assert done.exit_code == 0 or 'its accuracy differs' in done.output, done.output


def test_the_metric_refuses_alone():
    "Log-probs that hardly move, and decisions that all do"
    held = HeldOut([str(i) for i in range(40)], [str(i) for i in range(40)], [], [], 'accuracy', lambda s, a: np.array([]))
    scores = [[np.array([-1.])]]*40
    right, wrong = Said(scores, np.ones(40)), Said(scores, np.zeros(40))
    untuned = [[np.array([-2.])]]*40
    assert measure_fidelity('', held, right, right, untuned).holds
    assert 'its accuracy differs by -1.000' in measure_fidelity('', held, wrong, right, untuned).why


@pytest.mark.parametrize(('gap', 'effect', 'holds'), [(.009, 0., True), (.011, .05, False), (.011, .2, True), (np.nan, 1., False)])
def test_the_limit(gap, effect, holds):
    held = HeldOut(['1'], ['1'], [], [])
    def said(x): return Said([[np.array([-1. + x])]], None)
    assert measure_fidelity('', held, said(gap), said(0.), [[np.array([-1. - effect])]], Tolerance(.1, .01)).holds is holds


# Damage

def cut(folder): (folder/'adapter_model.safetensors').write_bytes((folder/'adapter_model.safetensors').read_bytes()[:-64])
def flip(folder):
    data = bytearray((folder/'adapter_model.safetensors').read_bytes())
    data[-9] ^= 255
    (folder/'adapter_model.safetensors').write_bytes(bytes(data))
def no_config(folder): (folder/'adapter_config.json').unlink()
def no_weights(folder): (folder/'adapter_model.safetensors').unlink()
def pointer(folder): (folder/'adapter_model.safetensors').write_text('version https://git-lfs.github.com/spec/v1\n')
def not_a_number(folder):
    tensors = load_file(folder/'adapter_model.safetensors')
    tensors[sorted(tensors)[0]][0] = float('nan')
    save_file(tensors, folder/'adapter_model.safetensors')
    (folder/MANIFEST).unlink()


@pytest.mark.cases(1)
@pytest.mark.parametrize('damage', [cut, flip, no_config, no_weights, pointer, not_a_number])
def test_a_damaged_adapter_makes_nothing(runs, damage, tmp_path):
    run = tmp_path/'run'
    exports.shutil.copytree(runs('words'), run)
    damage(find_trained(run, 'student', 0).adapter)
    with pytest.raises(ModelError, match=r'damaged|holds no adapter|no adapter_model|pointer'):
        export_run(ExportJob(run, out=tmp_path/'out'))
    assert [p.name for p in tmp_path.iterdir()] == ['run']


def test_an_adapter_of_another_base(runs, tmp_path):
    run = tmp_path/'run'
    exports.shutil.copytree(runs('words'), run)
    text = (run/'config.toml').read_text(encoding='utf-8')
    (run/'config.toml').write_text(text.replace('"pico"', '"nano"'), encoding='utf-8')
    arms = exports.find_trained(run, 'student', 0)
    with pytest.raises(ModelError, match='was trained on pico'):
        merge_adapter(plain_base(know_model('strong', 'nano', read_settings(run)), 'original'), arms.adapter)


@pytest.mark.cases(1)
@pytest.mark.parametrize(('file', 'said'), [('config.toml', 'holds no config.toml'), ('arms.parquet', 'holds no arms.parquet')])
def test_a_folder_that_is_no_run(runs, file, said, tmp_path):
    run = tmp_path/'run'
    exports.shutil.copytree(runs('words'), run)
    (run/file).unlink()
    with pytest.raises(ConfigError, match=said): export_run(ExportJob(run, out=tmp_path/'out'))


def test_nothing_of_the_user_is_replaced(runs, tmp_path):
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'mine.txt').write_text('mine')
    with pytest.raises(ConfigError, match='is there already'): export_run(ExportJob(runs('words'), out=tmp_path/'out'))
    assert (tmp_path/'out'/'mine.txt').read_text() == 'mine'


# Heads

@pytest.mark.parametrize('tokenizer', ['adds both', 'pad is end'])
def test_a_reward_model_reads_its_last_token(tokenizer, tmp_path):
    "Also where padding is the end token, which ends every response"
    load = LoadSettings('none', 'float32')
    base = load_base(make_model('llama', tmp_path/'base', tokenizer), load)
    adapted = add_reward_adapter(base, LoraSettings(rank=2), 0)
    adapted.get_submodule(HEAD).weight.data.normal_()
    save_adapter(adapted, base, tmp_path/'adapter')
    held = HeldOut(['1'], ['1'], [[((1, 9, 10, 11, 2), 0), ((1, 12, 13, 2), 0)]], [], head=HEAD)
    ours = exports._headed_scores(adapted.eval(), held)
    adapted.unload()
    model = SimpleNamespace(name=str(tmp_path/'base'), load=load)
    made = headed_model(merge_adapter(plain_base(model, 'original'), tmp_path/'adapter'), model, tmp_path/'adapter', HEAD, ())
    write_merged(made, model, tmp_path/'out', torch.float32)
    back = read_back(tmp_path/'out', torch.float32, 'cpu', True)
    np.testing.assert_allclose(np.ravel(score_rows(back, held.rows, True)[0]), np.ravel(ours[0]), atol=1e-5)
    pad, own = back.config.pad_token_id, AutoTokenizer.from_pretrained(tmp_path/'out')
    assert pad == own.pad_token_id != own.eos_token_id
    both = torch.tensor([[1, 9, 10, 11, 2], [1, 12, 13, 2, pad]])
    with torch.no_grad(): padded = back(input_ids=both, attention_mask=(both != pad).long()).logits[:, 0]
    np.testing.assert_allclose(padded.numpy(), np.ravel(ours[0]), atol=1e-5)


def test_a_family_without_classification_is_refused(tmp_path):
    load = LoadSettings('none', 'float32')
    base = load_base(make_model('cohere', tmp_path/'base'), load)
    adapted = add_class_adapter(base, LoraSettings(rank=2), 0, 3)
    save_adapter(adapted, base, tmp_path/'adapter')
    adapted.unload()
    model = SimpleNamespace(name=str(tmp_path/'base'), load=load)
    with pytest.raises(ModelError, match='no sequence classification for cohere'):
        headed_model(merge_adapter(plain_base(model, 'original'), tmp_path/'adapter'), model, tmp_path/'adapter', CLASS_HEAD, ('a', 'b'))


def test_a_classifier_names_its_classes(runs, tmp_path):
    export_run(ExportJob(runs('head'), out=tmp_path/'out', rows=8))
    assert json.loads((tmp_path/'out'/'config.json').read_text(encoding='utf-8'))['id2label'] == {'0': 'no', '1': 'yes'}


# To the hub

class Hub:
    "Stands in for the client of the hub"
    calls: list = []
    error: Exception | None = None
    def create_repo(self, name, **more): self.calls.append(('create', name, more))
    def upload_folder(self, **more):
        if self.error: raise self.error
        self.calls.append(('upload', more['repo_id'], sorted(os.listdir(more['folder_path']))))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(exports, 'HfApi', Hub)
    monkeypatch.setattr(Hub, 'calls', [])
    monkeypatch.setattr(Hub, 'error', None)
    monkeypatch.delenv('HF_HUB_OFFLINE', raising=False)
    return Hub


def test_push_only_when_asked(runs, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    words = ['export', str(runs('words')), '--rows', '8', '--out', str(tmp_path/'out')]
    assert CliRunner().invoke(app, words).exit_code == 0 and hub.calls == []
    exports.remove_tree(tmp_path/'out')
    done = CliRunner().invoke(app, [*words, '--push', 'me/student'])
    assert done.exit_code == 0 and 'https://huggingface.co/me/student' in done.output
    (_, name, more), (_, repo, files) = hub.calls
    assert (name, repo, more['private']) == ('me/student', 'me/student', True) and {'README.md', 'model.safetensors'} <= set(files)


def test_a_refused_export_is_not_pushed(runs, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(app.info, 'cls', GuardedGroup)
    words = ['export', str(runs('preferences')), '--base', 'original', '--rows', '12', '--out', str(tmp_path/'out'), '--push', 'me/student']
    assert CliRunner().invoke(app, words).exit_code == 1 and hub.calls == []


def test_push_fails_in_words(hub, monkeypatch, tmp_path):
    done = Exported(tmp_path, SimpleNamespace(name='student'), (), '', 0)
    monkeypatch.setattr(Hub, 'error', OSError('401 Client Error\nInvalid token'))
    with pytest.raises(ConfigError, match='was not uploaded: 401 Client Error Invalid token'): push_export(done, 'me/student')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ConfigError, match='HF_HUB_OFFLINE is set'): push_export(done, 'me/student')
    for bad in ('student', 'a/b/c', '/x'):
        with pytest.raises(ConfigError, match='as USER/MODEL'): push_export(done, bad)


# GGUF

def extra_token(folder):
    read = json.loads((folder/'tokenizer.json').read_text(encoding='utf-8'))
    read['added_tokens'].append(dict(read['added_tokens'][0], id=10**6, content='<new>'))
    (folder/'tokenizer.json').write_text(json.dumps(read), encoding='utf-8')
def edit(folder, **change):
    read = json.loads((folder/'config.json').read_text(encoding='utf-8')) | change
    (folder/'config.json').write_text(json.dumps(read), encoding='utf-8')


def in_64_bits(folder):
    file = folder/'model.safetensors'
    save_file({k: v.to(torch.float64) for k, v in load_file(file).items()}, file)


@pytest.mark.parametrize(('fault', 'said'), [
    (extra_token, 'has a token 1000000'),
    (lambda f: edit(f, architectures=[]), 'of no named architecture'),
    (lambda f: edit(f, quantization_config={}), 'still quantized'),
    (lambda f: (f/'tokenizer.json').unlink(), 'neither tokenizer.json nor tokenizer.model'),
    (lambda f: (f/'model.safetensors').rename(f/'weights.safetensors'), 'no model*.safetensors'),
    (in_64_bits, 'is of type F64'),
])
def test_what_the_converter_would_stumble_over(fault, said, tmp_path):
    model = SimpleNamespace(name='pico', load=LoadSettings('none', 'float32'))
    write_merged(plain_base(model, 'original').model, model, tmp_path/'out', torch.float16)
    check_gguf(tmp_path/'out')
    fault(tmp_path/'out')
    with pytest.raises(ModelError, match=re.escape(said)): check_gguf(tmp_path/'out')
