"""Models and tokenizers that nobody would make on purpose: each is right, or one sentence that says what, where and what to do"""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from w2s.compare.models import know_model
from w2s.errors import DataError, ModelError
from w2s.models.load import LoadSettings, load_base, load_tokenizer
from w2s.models.places import check_model_folder, located
from w2s.models.reading import check_numbers
from w2s.models.tiny import tiny_model
from w2s.train.boundary import token_ids
from w2s.train.tokens import encode

FULL = LoadSettings('none', 'float32')
TEXTS = ['Where does the fox live?', 'The fox lives by the river.']


@pytest.fixture(scope='module')
def good(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp('good')/'tiny', TEXTS)


@pytest.fixture
def mine(good, tmp_path): return Path(shutil.copytree(good, tmp_path/'model'))


def known(name):
    "What a command looks at before it reads weights"
    check_model_folder(located(name))
    return know_model('weak', str(name), SimpleNamespace(load=FULL, max_length=64, lora=None), writes=True)


def logits(folder):
    base = load_base(folder, FULL, device='cpu')
    with torch.no_grad(): return base.model(torch.tensor([base.tokenizer(TEXTS[1]).input_ids])).logits


def put(name, content): return lambda f: (f/name).write_text(content)


def settings(**new):
    def change(f):
        config = json.loads((f/'config.json').read_text()) | new
        (f/'config.json').write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return change


def in_shards(change):
    def apply(f):
        AutoModelForCausalLM.from_pretrained(f).save_pretrained(f, max_shard_size='100KB')
        (f/'model.safetensors').unlink()
        index = f/'model.safetensors.index.json'
        table = json.loads(index.read_text())
        change(f, table)
        index.write_text(json.dumps(table))
    return apply


def moved(to):
    def change(f, table):
        first = sorted(set(table['weight_map'].values()))[0]
        (f/to).mkdir(exist_ok=True)
        shutil.move(f/first, f/to/first)
        table['weight_map'] = {k: f'{to}/{v}' if v == first else v for k, v in table['weight_map'].items()}
    return change


def twice(f, table): save_file({'a': torch.zeros(2)}, f/'model.safetensors', metadata={'format': 'pt'})


def a_folder(name):
    def change(f):
        (f/name).unlink()
        (f/name).mkdir()
    return change


ODD = {
    'weights twice': (in_shards(twice), 'holds its weights twice, as model.safetensors and as the files of .*; move the other one away'),
    'a shard elsewhere': (in_shards(moved('..')), 'names ../model-.*, which is not in the same folder'),
    'a shard below': (in_shards(moved('w')), 'names w/model-.*, which is not in the same folder'),
    'an index without metadata': (in_shards(lambda f, t: t.pop('metadata')), 'is damaged: it has no "metadata"'),
    'half generation settings': (put('generation_config.json', '{"eos_token_id":'), 'generation_config.json is damaged: it is no JSON'),
    'listed generation settings': (put('generation_config.json', '[]'), 'generation_config.json is damaged: it holds no settings by name'),
    'listed tokenizer settings': (put('tokenizer_config.json', '[]'), 'tokenizer_config.json is damaged: it holds no settings'),
    'empty tokenizer settings': (put('tokenizer_config.json', ''), 'tokenizer_config.json is damaged: it is no JSON'),
    'listed special tokens': (put('special_tokens_map.json', '[3]'), 'special_tokens_map.json is damaged'),
    'listed added tokens': (put('added_tokens.json', '[]'), 'added_tokens.json is damaged'),
    'tokenizer settings that are a folder': (a_folder('tokenizer_config.json'), 'tokenizer_config.json is a folder'),
    'an empty tokenizer': (put('tokenizer.json', '{}'), "has no tokenizer that can be read.*'added_tokens' is missing in them"),
    'no kind': (settings(model_type=...), 'config.json describes no model: it has no "model_type"'),
    'a listed kind': (settings(model_type=['llama']), 'config.json describes no model: it has no "model_type"'),
    'a listed quantization': (settings(quantization_config=['nf4']), r'its "quantization_config" is \["nf4"\], not settings by name'),
    'an empty quantization': (settings(quantization_config={}), r'its "quantization_config" is \{\}, not settings by name'),
    'less than no layers': (settings(num_hidden_layers=-1), 'its "num_hidden_layers" is -1; download the model anew'),
    'no heads': (settings(num_attention_heads=0), 'its "num_attention_heads" is 0'),
    'a tokenizer that is a folder': (a_folder('tokenizer.json'), 'tokenizer.json is a folder, and a file is needed there'),
    'no room': (settings(max_position_embeddings=1), r'reads 1 tokens at most, as its config.json says \(max_position_embeddings\)'),
    'less than no room': (settings(max_position_embeddings=-5), 'reads -5 tokens at most'),
    'an activation of its own': (settings(hidden_act='nonsense'), "'nonsense' is missing from its files, or named in them and not known"),
    'positions of its own': (settings(rope_scaling=dict(rope_type='nonsense', factor=2.)), "'nonsense' is missing from its files"),
}


@pytest.mark.parametrize('kind', ODD)
def test_what_is_wrong_is_said_before_weights_are_read(mine, kind, monkeypatch):
    change, told = ODD[kind]
    change(mine)
    monkeypatch.setattr('w2s.compare.models.identity', lambda *a: pytest.fail('weights were read'))
    with pytest.raises(ModelError) as e: known(mine)
    said = str(e.value)
    assert re.search(told, said) and str(mine) in said and '\n' not in said and len(said) < 500, said


RIGHT = {
    'shards': in_shards(lambda f, t: None),
    'a tensor that no shard holds': in_shards(lambda f, t: t['weight_map'].update(none=max(t['weight_map'].values()))),
    'a tensor that the index lacks': in_shards(lambda f, t: t['weight_map'].pop('model.norm.weight')),
    'outputs without names': settings(return_dict=False),
    'no keys kept': settings(use_cache=False),
    'states put out': settings(output_hidden_states=True, output_attentions=False),
    'dropout': settings(attention_dropout=.5),
    'another type of weights': settings(torch_dtype='float64', dtype='float64'),
    'attention that is not here': settings(_attn_implementation='flash_attention_2'),
    'attention of no kind': settings(attn_implementation=3),
    'a classifier by name': settings(architectures=['LlamaForSequenceClassification']),
}


@pytest.mark.parametrize('kind', RIGHT)
def test_what_changes_nothing_changes_nothing(mine, good, kind):
    RIGHT[kind](mine)
    known(mine)
    assert torch.equal(logits(mine), logits(good))


def test_weights_of_the_good_model_are_read(good): assert load_file(good/'model.safetensors')


@pytest.mark.parametrize('kind', [torch.int8, torch.uint8, torch.int32, torch.bool], ids=str)
def test_weights_that_are_whole_numbers(mine, kind):
    "They were read as they are: another model, without a word"
    kept = load_file(mine/'model.safetensors')
    save_file({k: v.to(kind) for k, v in kept.items()}, mine/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ModelError, match='holds .*weight as whole numbers, and config.json does not say how they were quantized'):
        check_model_folder(mine)


@pytest.mark.parametrize('quantize', ['none', 'nf4'])
def test_a_model_of_zeros(mine, quantize):
    "It would label every pair as a tie"
    def check(): check_numbers('mine', load_base(mine, LoadSettings(quantize, 'float32'), device='cpu').model)
    check()
    save_file({k: torch.zeros_like(v) for k, v in load_file(mine/'model.safetensors').items()}, mine/'model.safetensors', {'format': 'pt'})
    with pytest.raises(ModelError, match='mine is damaged: all of its weights are zero'): check()


def test_masks_in_old_files_are_no_weights(mine):
    kept = load_file(mine/'model.safetensors')
    save_file(kept | {'model.layers.0.attn.bias': torch.ones(1, 1, 4, 4, dtype=torch.uint8)}, mine/'model.safetensors')
    check_model_folder(mine)


# Places

def test_a_user_who_is_not_there():
    with pytest.raises(ModelError, match='no user has the name nobodyhere; write the whole path'): located('~nobodyhere/model')


@pytest.mark.parametrize('name', ['PICO', 'Pico', 'Base ', 'SCHOLAR'])
def test_names_of_the_ladder_in_capitals(name):
    with pytest.raises(ModelError, match=f'did you mean "{name.strip().lower()}"'): located(name)


def test_a_file_without_a_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('mymodel').write_text('x')
    with pytest.raises(ModelError, match='mymodel is a file here, not a folder, and not in the cache of the hub'): known('mymodel')


@pytest.mark.parametrize('odd, told', [
    (lambda p: p.mkdir(), 'model.safetensors is a folder, and a file is needed there'),
    (lambda p: p.symlink_to('../blobs/none'), 'model.safetensors is a link to a file that is not there'),
], ids=['folder', 'link'])
def test_weights_that_are_no_file(mine, odd, told):
    (mine/'model.safetensors').unlink()
    odd(mine/'model.safetensors')
    with pytest.raises(ModelError, match=told): check_model_folder(mine)


# Tokenizers

def tokenizer_of(folder, change):
    path = folder/'tokenizer.json'
    table = json.loads(path.read_text())
    change(table)
    path.write_text(json.dumps(table))


def test_a_tokenizer_that_writes_its_own_signs_is_no_answerer(mine):
    "Every answer would be Ġthe Ġfox, and be scored as such"
    tokenizer_of(mine, lambda t: t.update(decoder=None))
    with pytest.raises(ModelError, match='the sign Ġ would stand in every answer; tokenizer.json has no decoder'): known(mine)


def test_a_word_that_no_token_means(mine):
    "The library raises a plain exception"
    words = dict(type='WordLevel', vocab={'<pad>': 0, '<s>': 1, '</s>': 2, 'fox': 3}, unk_token='<unk>')
    tokenizer_of(mine, lambda t: t.update(model=words, pre_tokenizer=dict(type='Whitespace'), decoder=None))
    tokenizer = load_tokenizer(mine, FULL)
    assert token_ids(tokenizer, ['fox fox'], False) == [[3, 3]]
    with pytest.raises(ModelError, match='the tokenizer cannot read all texts .*Missing .UNK. token'): token_ids(tokenizer, TEXTS, False)


@pytest.mark.parametrize('change', [
    dict(truncation=dict(direction='Right', max_length=4, strategy='LongestFirst', stride=0)),
    dict(padding=dict(strategy=dict(Fixed=40), direction='Left', pad_to_multiple_of=None, pad_id=0, pad_type_id=0, pad_token='<pad>')),
], ids=lambda c: next(iter(c)))
def test_what_a_tokenizer_would_cut_or_pad_is_not(mine, good, change):
    tokenizer_of(mine, lambda t: t.update(change))
    found = [token_ids(load_tokenizer(f, FULL), TEXTS, True) for f in (mine, good)]
    assert found[0] == found[1]


# Templates

TURNS = '{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}'
REPLY = '{% if add_generation_prompt %}<|assistant|>{% endif %}'


@pytest.mark.parametrize('begins', ['', '{{ bos_token }}', '{{ bos_token }}{{ bos_token }}', '{{ bos_token }}' * 3])
def test_a_template_that_begins_twice_ends_its_prompt_where_it_ends(mine, begins):
    "The boundary was the first token: all of the prompt was learned, and scored, as if it were the reply"
    (mine/'chat_template.jinja').write_text(begins + TURNS + REPLY)
    tokenizer = load_tokenizer(mine, FULL)
    row, = encode(tokenizer, [[dict(role='user', content='Where does the fox live?')]], ['By the river.'])
    assert tokenizer.decode(row.ids[row.start:]) == 'By the river.</s>'
    assert tokenizer.decode(row.ids[:row.start]).endswith('</s><|assistant|>')


@pytest.mark.parametrize('template, told', [
    ('{{ tools[0].name }}' + TURNS, 'None has no element 0'),
    ('{% for d in documents %}{{ d }}{% endfor %}' + TURNS, "'NoneType' object is not iterable"),
    ("{{ raise_exception('only tools') }}", 'only tools'),
    ('{{ range(99) | random }}' + TURNS, 'draws at random'),
    ('{{ bos_token + unk_token }}' + TURNS, "'unk_token' is undefined"),
    ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}", 'chat template'),
])
def test_templates_that_need_what_is_not_there(mine, template, told):
    (mine/'chat_template.jinja').write_text(template)
    with pytest.raises(DataError) as e:
        encode(load_tokenizer(mine, FULL), [[dict(role='user', content='Where does the fox live?')]], ['By the river.'])
    assert told in str(e.value) and '\n' not in str(e.value), e.value
