"A folder that is given as a model: one that is whole is read, any other is refused in one sentence that says what it is"
import json
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.models import know_model
from w2s.compare.preference_data import Reader, readable
from w2s.data.hygiene import DataReport
from w2s.errors import ConfigError, ModelError
from w2s.evaluate.reward_models import load_reward_model
from w2s.evaluate.similarity import encoder_vectors
from w2s.evaluate.toxicity_scorers import load_classifier_scorer
from w2s.models.adapters import LoraSettings, add_adapter, save_adapter
from w2s.models.class_heads import word_ids
from w2s.models.load import LoadSettings, load_base, load_tokenizer
from w2s.models.tiny import tiny_model, tiny_tokenizer
from w2s.train.generate import GenerateSettings, respond
from w2s.train.logprobs import check_model

FULL, PICKLE = LoadSettings('none', 'float32'), LoadSettings('none', 'float32', allow_pickle=True)
TEXTS = ['Where does the fox live?', 'The fox lives by the river.']
REAL = Path(__file__).parents[2]/'shared'/'weights'
LAYER = 'model.layers.1.mlp.down_proj.weight'


@pytest.fixture(scope='module')
def good(tmp_path_factory): return tiny_model(tmp_path_factory.mktemp('good')/'tiny', TEXTS)


@pytest.fixture
def mine(good, tmp_path): return Path(shutil.copytree(good, tmp_path/'model'))


def setting(**new):
    def change(folder):
        path = folder/'config.json'
        config = json.loads(path.read_text()) | new
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return change


def tensors(change):
    def apply(folder):
        kept = load_file(folder/'model.safetensors')
        save_file(change(kept) or kept, folder/'model.safetensors', metadata={'format': 'pt'})
    return apply


def written(name, content): return lambda folder: (folder/name).write_bytes(content if isinstance(content, bytes) else content.encode())
def cut(name, size): return lambda folder: (folder/name).write_bytes((folder/name).read_bytes()[:size])
def gone(*names): return lambda folder: [(folder/n).unlink() for n in names]
def both(*changes): return lambda folder: [c(folder) for c in changes]


POINTER = 'version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n'
ADAPTER = json.dumps(dict(peft_type='LORA', base_model_name_or_path='org/base', r=8))


def as_pickle(folder):
    torch.save(load_file(folder/'model.safetensors'), folder/'pytorch_model.bin')
    (folder/'model.safetensors').unlink()


def sharded(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size='100KB')
    (folder/'model.safetensors').unlink(missing_ok=True)


def lost_shard(folder):
    sharded(folder)
    sorted(folder.glob('model-0000*'))[1].unlink()


def encoder(kind, **more):
    "A model of another kind in the place of this one"
    def change(folder):
        (folder/'model.safetensors').unlink()
        config = getattr(transformers, f'{kind}Config')(**more)
        name = {
            'T5': 'T5ForConditionalGeneration',
            'Bart': 'BartForConditionalGeneration',
            'Whisper': 'WhisperForConditionalGeneration',
            'ViT': 'ViTModel',
            'CLIP': 'CLIPModel',
        }.get(kind, f'{kind}ForMaskedLM')
        getattr(transformers, name)(config).save_pretrained(folder)
    return change


SMALL = dict(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=64)
SPOILT = {
    'adapter': (
        both(gone('config.json', 'model.safetensors'), written('adapter_config.json', ADAPTER)),
        r'holds an adapter, not a model; name the model that it belongs to \(org/base\)',
    ),
    'adapter, no base': (both(gone('config.json'), written('adapter_config.json', '{}')), 'holds an adapter'),
    'model and adapter': (written('adapter_config.json', ADAPTER), 'holds a model and an adapter'),
    'gguf': (
        both(gone('config.json', 'model.safetensors'), written('model-q4.gguf', b'GGUF\x03')),
        'holds model-q4.gguf; GGUF is the form of llama.cpp',
    ),
    'own form': (
        both(gone('config.json', 'model.safetensors'), written('params.json', '{}'), written('consolidated.00.pth', b'x')),
        "maker's own form",
    ),
    'no config': (gone('config.json'), 'has no config.json'),
    'empty': (lambda f: (shutil.rmtree(f), f.mkdir()), 'has no config.json'),
    'deeper': (lambda f: (shutil.copytree(f, f / 'snapshots' / 'ab12'), (f / 'config.json').unlink()), 'ab12 has; name that'),
    'pointer': (written('model.safetensors', POINTER), 'is a pointer of Git LFS'),
    'pointer config': (written('config.json', POINTER), 'config.json is a pointer of Git LFS'),
    'pointer tokenizer': (written('tokenizer.json', POINTER), 'tokenizer.json is a pointer of Git LFS'),
    'half': (cut('model.safetensors', 200_000), r'model.safetensors is damaged: it has 200,000 bytes, and should have'),
    'header': (cut('model.safetensors', 100), 'is damaged'),
    'nothing': (cut('model.safetensors', 0), 'is damaged'),
    'text': (written('model.safetensors', '<html>404'), 'is damaged'),
    'header of no use': (written('model.safetensors', (2).to_bytes(8, 'little') + b'[]'), 'its header cannot be read'),
    'longer': (lambda f: (f / 'model.safetensors').write_bytes((f / 'model.safetensors').read_bytes() + b'more'), 'is damaged'),
    'half config': (cut('config.json', 60), 'config.json is damaged: it is no JSON'),
    'list config': (written('config.json', '[1]'), 'config.json is damaged: it holds list'),
    'binary config': (written('config.json', b'\xff\xfe\x00'), 'config.json is damaged'),
    'deep config': (written('config.json', '[' * 100_000), 'config.json is damaged'),
    'lost shard': (lost_shard, 'lacks model-00002-of'),
    'no weights': (gone('model.safetensors'), 'holds no weights'),
    'pickle': (as_pickle, 'only pytorch_model.bin, which can run any code .* give --allow-pickle'),
    'no tokenizer': (lambda f: [p.unlink() for p in f.glob('*token*')], 'has no tokenizer that can be read'),
    'half tokenizer': (cut('tokenizer.json', 500), 'has no tokenizer that can be read'),
    'tokenizer of no use': (written('tokenizer.json', '{"model": 3}'), 'has no tokenizer that can be read'),
    'wider': (setting(hidden_size=128, num_attention_heads=4), r'is not whole: its files hold, in another shape, 20 tensors .*64, not 128'),
    'more tokens': (setting(vocab_size=600), 'in another shape, 1 tensor .*embed_tokens'),
    'deeper model': (setting(num_hidden_layers=3), r'lack 9 tensors \(model.layers.2'),
    'shallower': (setting(num_hidden_layers=1), r'hold, beyond what the model has, 9 tensors \(model.layers.1'),
    'heads': (setting(num_attention_heads=3), 'cannot be loaded|is not whole'),
    'type': (setting(hidden_size='many'), 'cannot be loaded|damaged'),
    'negative': (setting(num_hidden_layers=-1), 'describes no model: its "num_hidden_layers" is -1'),
    'no heads': (setting(num_attention_heads=0), 'describes no model: its "num_attention_heads" is 0'),
    'null': (setting(hidden_size=None), 'cannot be loaded'),
    'unknown kind': (
        setting(model_type='llama9', architectures=['Llama9ForCausalLM']),
        'is of a kind that this version of transformers does not know',
    ),
    'no kind': (setting(model_type=..., architectures=...), 'transformers does not know|cannot be loaded'),
    'own code': (
        setting(model_type='mine', auto_map={'AutoConfig': 'mine.Mine', 'AutoModelForCausalLM': 'mine.MineLM'}),
        'runs code of its own; if you trust it, set trust_remote_code = true under',
    ),
    'another family': (setting(model_type='gpt2', architectures=['GPT2LMHeadModel']), 'is not whole'),
    'T5': (
        encoder('T5', d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=512),
        'is of the kind "t5", which reads with an encoder and writes with a decoder',
    ),
    'BART': (
        encoder(
            'Bart',
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=512,
        ),
        'is of the kind "bart"',
    ),
    'Whisper': (
        encoder(
            'Whisper',
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            vocab_size=512,
            pad_token_id=0,
        ),
        'is of the kind "whisper"',
    ),
    'BERT': (encoder('Bert', **SMALL), 'is of the kind "bert", an encoder that looks at later tokens'),
    'RoBERTa': (encoder('Roberta', **SMALL), 'is of the kind "roberta", an encoder'),
    'DistilBERT': (encoder('DistilBert', dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=512), 'is of the kind "distilbert"'),
    'ModernBERT': (encoder('ModernBert', **SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2), 'is of the kind "modernbert"'),
    'ViT': (
        encoder('ViT', hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8),
        'w2s needs a causal language model',
    ),
}


@pytest.mark.parametrize('kind', SPOILT)
def test_what_is_no_model_is_named(mine, kind):
    "In one sentence without the words of a library where there are better ones"
    change, words = SPOILT[kind]
    change(mine)
    with pytest.raises(ModelError, match=words) as told: load_base(mine, FULL, device='cpu')
    said = str(told.value)
    assert '\n' not in said and 'Traceback' not in said and len(said) < 700 and str(mine) in said


EARLY = [k for k in SPOILT if k not in ('wider', 'more tokens', 'deeper model', 'shallower', 'another family', 'heads')]


@pytest.mark.parametrize('kind', EARLY)
def test_it_is_known_before_weights_are_read(mine, kind, monkeypatch):
    "By a plan, which loads nothing"
    change, words = SPOILT[kind]
    change(mine)
    monkeypatch.setattr(AutoModelForCausalLM, 'from_pretrained', None)
    with pytest.raises(ModelError, match=words):
        know_model('weak', str(mine), SimpleNamespace(load=FULL, max_length=64, lora=LoraSettings()))


@pytest.mark.parametrize('name', ['model.safetensors', 'config.json', 'model.gguf'])
def test_a_file_in_the_place_of_a_folder(mine, name):
    written('model.gguf', b'GGUF')(mine)
    with pytest.raises(ModelError, match='is a GGUF file' if name.endswith('gguf') else 'is a file; name the folder that it is in'):
        load_base(mine / name, FULL, device='cpu')


def test_an_adapter_of_our_own_is_no_model(good, tmp_path):
    base = load_base(good, FULL, device='cpu')
    save_adapter(add_adapter(base), base, tmp_path)
    with pytest.raises(ModelError, match=f'{tmp_path} is no model: it holds an adapter, .*{good.name}'):
        load_base(tmp_path, FULL, device='cpu')


COMMANDS = {
    'run': ['run', 'preferences', '--data', 'rows.jsonl', '--strong', 'pico', '--dry-run', '--weak'],
    'classify': ['run', 'classify', '--data', 'classes.jsonl', '--text', 'text', '--strong', 'pico', '--dry-run', '--weak'],
    'label': ['label', '--rows', 'rows.jsonl', '--train', 'train.jsonl', '--out', 'out.parquet', '--model'],
    'persona': ['run', 'persona', '--strong', 'pico', '--dry-run', '--weak'],
    'refine': [
        'refine',
        '--questions',
        'rows.jsonl',
        '--question',
        'prompt',
        '--weak-answers',
        'rows.jsonl',
        '--answer',
        'rejected',
        '--out',
        'out.jsonl',
        '--strong',
    ],
}


@pytest.mark.parametrize('kind', ['half', 'T5', 'adapter', 'pickle'])
@pytest.mark.parametrize('command', COMMANDS)
def test_commands_say_it_in_a_sentence(mine, tmp_path, monkeypatch, command, kind):
    "By --dry-run already, where they have it"
    monkeypatch.chdir(tmp_path)
    for name, first in (('rows', 0), ('train', 60)):
        (tmp_path / f'{name}.jsonl').write_text(
            ''.join(
                json.dumps(dict(prompt=f'Question {i}?', chosen=f'Yes {i}.', rejected=f'No {i}.')) + '\n' for i in range(first, first + 60)
            )
        )
    (tmp_path/'classes.jsonl').write_text(''.join(json.dumps(dict(text=f'Case {i}.', label=i % 2)) + '\n' for i in range(60)))
    change, words = SPOILT[kind]
    change(mine)
    out = CliRunner().invoke(app, [*COMMANDS[command], str(mine)])
    assert isinstance(out.exception, ModelError), out.output # the command line prints what it says
    assert re.search(words, str(out.exception)) and 'Traceback' not in out.output


# Weights

MISSING = {
    'one': (lambda t: t.pop(LAYER) is None, r'lack 1 tensor \(model.layers.1.mlp.down_proj.weight\)'),
    'embeddings': (lambda t: t.pop('model.embed_tokens.weight') is None, 'lack .*embed_tokens'),
    'norm': (lambda t: t.pop('model.norm.weight') is None, 'lack 1 tensor .*norm'),
    'many': (lambda t: [t.pop(k) for k in list(t) if 'layers.0.' in k] and None, r'lack 9 tensors \(.*and 6 more\)'),
    'other names': (
        lambda t: {k.replace('mlp', 'ffn'): v for k, v in t.items()},
        'lack 6 tensors .*; they hold, beyond what the model has, 6 tensors',
    ),
    'surplus': (
        lambda t: t | {'model.layers.1.mlp.extra.weight': torch.zeros(2)},
        r'beyond what the model has, 1 tensor \(model.layers.1.mlp.extra.weight',
    ),
    'lora left': (lambda t: t | {'model.layers.1.mlp.down_proj.lora_A.weight': torch.zeros(2, 2)}, 'beyond what the model has'),
    'head of its own': (lambda t: t | {'lm_head.bias': torch.zeros(len(t['model.embed_tokens.weight']))}, 'beyond what the model has'),
    'transposed': (
        lambda t: t | {LAYER: t[LAYER].T.contiguous()},
        r'in another shape, 1 tensor \(model.layers.1.mlp.down_proj.weight \(128×64, not 64×128\)',
    ),
    'body only': (lambda t: {k: v for k, v in t.items() if 'layers' not in k}, 'lack 18 tensors'),
}


@pytest.mark.parametrize('kind', MISSING)
def test_a_checkpoint_must_be_whole(mine, kind):
    "Missing tensors would be random, surplus ones ignored"
    change, words = MISSING[kind]
    tensors(change)(mine)
    with pytest.raises(ModelError, match=words): load_base(mine, FULL, device='cpu')


@pytest.mark.parametrize('untied', [setting(tie_word_embeddings=False)], ids=['config'])
def test_a_head_of_its_own_that_is_missing(mine, untied):
    untied(mine)
    with pytest.raises(ModelError, match='lack 1 tensor .*lm_head.weight'): load_base(mine, FULL, device='cpu')


FINE = {
    'tied': lambda t: None,
    'tied, with its copy': lambda t: t | {'lm_head.weight': t['model.embed_tokens.weight'].clone()},
    'tables': lambda t: (
        t
        | {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.zeros(16), 'model.layers.1.self_attn.rotary_emb.inv_freq': torch.zeros(16)}
    ),
}


@pytest.mark.parametrize('kind', FINE)
def test_what_nothing_reads_may_be_there(mine, good, kind):
    tensors(FINE[kind])(mine)
    got, want = (load_base(f, FULL, device='cpu').model for f in (mine, good))
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


def test_older_files_with_masks_and_other_prefixes(tmp_path):
    "As GPT-2 was published: its body alone, with the causal masks"
    config = GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2)
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    tiny_tokenizer(TEXTS).save_pretrained(tmp_path)
    tensors(
        lambda t: (
            {k.removeprefix('transformer.'): v for k, v in t.items()}
            | {f'h.{i}.attn.bias': torch.ones(1, 1, 64, 64).tril() for i in (0, 1)}
            | {'h.0.attn.masked_bias': torch.tensor(-1e4)}
        )
    )(tmp_path)
    base = load_base(tmp_path, FULL, device='cpu')
    check_model(base)
    assert torch.equal(base.model.transformer.h[1].mlp.c_fc.weight, whole.transformer.h[1].mlp.c_fc.weight)


@pytest.mark.parametrize('form', [sharded, as_pickle], ids=['shards', 'pickle'])
def test_other_forms_are_read_where_they_are_allowed(mine, good, form):
    form(mine)
    got, want = load_base(mine, PICKLE, device='cpu').model, load_base(good, FULL, device='cpu').model
    assert all(torch.equal(a, b) for a, b in zip(got.parameters(), want.parameters(), strict=True))


@pytest.mark.parametrize(
    'content',
    [b'', b'\x80\x04garbage', b'PK\x03\x04half a zip', POINTER.encode(), pickle.dumps({'a': Path('x')}), b'<html>'],
    ids=['empty', 'garbage', 'zip', 'pointer', 'objects', 'page'],
)
def test_pickle_that_cannot_be_read(mine, content):
    (mine/'model.safetensors').unlink()
    written('pytorch_model.bin', content)(mine)
    with pytest.raises(ModelError, match='damaged|pointer of Git LFS|cannot be loaded') as told: load_base(mine, PICKLE, device='cpu')
    assert '\n' not in str(told.value)


@pytest.mark.parametrize('bad', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('where', [LAYER, 'model.norm.weight', 'model.embed_tokens.weight'])
def test_weights_that_are_no_numbers(mine, bad, where):
    def spoil(t): t[where].view(-1)[7] = bad
    tensors(spoil)(mine)
    with pytest.raises(ModelError, match=f'is damaged: {where} holds inf or NaN'): check_model(load_base(mine, FULL, device='cpu'))


# Reward models, classifiers and encoders

def scorer(folder, labels=1):
    "A model with a head of its own, as published ones are"
    torch.manual_seed(0)
    tok = load_tokenizer(folder)
    config = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=labels,
        id2label=dict(enumerate(['toxic', 'other'][:labels])),
        label2id={n: i for i, n in enumerate(['toxic', 'other'][:labels])},
    )
    (folder/'model.safetensors').unlink()
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)


ASK = {
    'reward model': lambda f, **k: load_reward_model(f, LoadSettings('none', 'float32', **k), device='cpu')([TEXTS[0]], [TEXTS[1]]),
    'classifier': lambda f, **k: load_classifier_scorer(f, 'toxic', LoadSettings('none', 'float32', **k), reading='sigmoid')(
        [''] * 2, TEXTS
    ),
    'encoder': lambda f, **k: encoder_vectors(TEXTS, f, LoadSettings('none', 'float32', **k)),
}
PARTS = {
    'missing': (tensors(lambda t: t.pop('model.layers.0.mlp.down_proj.weight') is None), 'lack .*down_proj'),
    'surplus': (tensors(lambda t: t | {'model.layers.0.mlp.extra.weight': torch.zeros(2)}), 'beyond what the model has'),
    'mismatched': (setting(intermediate_size=64), 'in another shape'),
    'pickle': (as_pickle, 'give --allow-pickle'),
    'half': (cut('model.safetensors', 5000), 'is damaged: it has 5,000'),
    'pointer': (written('model.safetensors', POINTER), 'pointer of Git LFS'),
    'quantized': (setting(quantization_config=dict(quant_method='gptq', bits=4)), 'saved in a quantized form'),
    'inf': (tensors(lambda t: t['model.layers.0.mlp.down_proj.weight'].fill_(torch.inf) is None), 'holds inf or NaN'),
    'adapter': (both(gone('config.json'), written('adapter_config.json', ADAPTER)), 'holds an adapter'),
    'no config': (gone('config.json'), 'has no config.json'),
    'T5': (setting(is_encoder_decoder=True, model_type='t5'), ''),
    'more tokens than embeddings': (lambda f: tokens_added(f, 40), 'token'),
}


def tokens_added(folder, n):
    "As when somebody adds tokens and forgets the embeddings; they stand in the texts"
    tok = load_tokenizer(folder)
    tok.add_tokens([f'x{i}' for i in range(n)] + ['fox', ' fox'])
    tok.save_pretrained(folder)


@pytest.mark.parametrize('kind', PARTS)
@pytest.mark.parametrize('what', ASK)
def test_scorers_and_encoders_must_be_whole(mine, what, kind):
    scorer(mine)
    change, words = PARTS[kind]
    change(mine)
    with pytest.raises(ModelError, match=words) as told: ASK[what](mine)
    assert '\n' not in str(told.value)


@pytest.mark.parametrize('what', ASK)
def test_scorers_and_encoders_that_are_whole(mine, what):
    scorer(mine)
    want = ASK[what](mine)
    as_pickle(mine)
    assert np.allclose(want, ASK[what](mine, allow_pickle=True), atol=1e-6)


def test_an_encoder_without_its_heads_is_whole(mine):
    "The head of a language model is left over, and the pooler of BERT missing: neither is read"
    encoder('Bert', **SMALL)(mine)
    assert encoder_vectors(TEXTS, mine).shape == (2, 32)


# Tokens without an embedding

def test_tokens_without_an_embedding_are_refused_before_training(mine):
    "Where the rows have such tokens, and only there"
    tokens_added(mine, 3)
    context = SimpleNamespace(load=FULL, max_length=64, lora=None)
    reader = know_model('weak', str(mine), context).reader
    def rows(prompt):
        return {
            'train': Dataset.from_list([dict(id=f'r{i}', prompt=prompt, chosen=' Yes.', rejected=' No.', group=str(i)) for i in range(3)])
        }
    with pytest.raises(
        ModelError,
        match=r'the weak model has embeddings of .* tokens, and its tokenizer makes token \d+ .* of 3 of 3 rows, the first is r0',
    ):
        readable(rows('Where is a fox?'), [reader], DataReport())
    assert len(readable(rows('Where is he?'), [reader], DataReport())[0]['train']) == 3
    assert isinstance(reader, Reader) and reader.vocabulary == 283


def test_tokens_without_an_embedding_are_refused_before_an_answer(mine):
    tokens_added(mine, 3)
    base = load_base(mine, FULL, device='cpu')
    with pytest.raises(ModelError, match='has embeddings of 283 tokens'):
        respond(base.model, base.tokenizer, ['Where is a fox?'], GenerateSettings(max_tokens=2), quiet=True)
    assert respond(base.model, base.tokenizer, ['Where is he?'], GenerateSettings(max_tokens=2), quiet=True)


# What a model may do on this machine is said

def test_open_doors_are_said(mine):
    as_pickle(mine)
    def notes(**more):
        return know_model('weak', str(mine), SimpleNamespace(load=LoadSettings('none', 'float32', **more), max_length=64, lora=None)).notes
    assert any('pickle form, which can run any code (allow_pickle)' in n for n in notes(allow_pickle=True))


def test_doors_that_nothing_goes_through_are_not_said(good):
    notes = know_model(
        'weak',
        str(good),
        SimpleNamespace(load=LoadSettings('none', 'float32', allow_pickle=True, trust_remote_code=True), max_length=64, lora=None),
    ).notes
    assert not any('pickle' in n or 'code' in n for n in notes)


def test_code_that_is_run_is_said(mine):
    (mine / 'mine.py').write_text(
        'from transformers import LlamaConfig, LlamaForCausalLM\nclass Mine(LlamaConfig): model_type = "mine"\nclass '
        'MineLM(LlamaForCausalLM): config_class = Mine\n'
    )
    SPOILT['own code'][0](mine)
    notes = know_model(
        'weak', str(mine), SimpleNamespace(load=LoadSettings('none', 'float32', trust_remote_code=True), max_length=64, lora=None)
    ).notes
    assert any('Python code of its own is run, as config.json ask' in n and '(trust_remote_code)' in n for n in notes)


# Label words

def metaspace(texts, first='always'):
    "A tokenizer that writes a space as a sign of its own, and one at the beginning of each text: as those of Llama 2, Mistral and T5"
    kind = Tokenizer(models.BPE(unk_token='<unk>'))
    kind.pre_tokenizer, kind.decoder = pre_tokenizers.Metaspace(prepend_scheme=first), decoders.Metaspace(prepend_scheme=first)
    kind.train_from_iterator(texts*20, trainers.BpeTrainer(vocab_size=200, special_tokens=['<unk>', '</s>'], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=kind, eos_token='</s>', unk_token='<unk>')


SAID = ['Is it safe? yes', 'Is it safe? no', 'Is it good? maybe', 'safe: unsafe', 'word safe', 'word unsafe', 'yes no yes no yes no maybe']
READERS = {
    'bytes': lambda: tiny_tokenizer(SAID * 5),
    'metaspace': lambda: metaspace(SAID),
    'metaspace, first': lambda: metaspace(SAID, 'first'),
    'metaspace, never': lambda: metaspace(SAID, 'never'),
}


@pytest.mark.parametrize('words', [(' no', ' yes'), (' safe', ' unsafe'), (' yes', ' no', ' maybe')], ids='/'.join)
@pytest.mark.parametrize('kind', READERS)
def test_label_words_are_tokenized_in_their_place(kind, words):
    "Behind a prompt, the token that tells them apart is the one that the model reads there"
    tok = READERS[kind]()
    ids, prompt = word_ids(tok, words), 'Is it good?'
    behind = [
        tok(prompt + w, add_special_tokens=False)['input_ids'][len(tok(prompt, add_special_tokens=False)['input_ids']) :] for w in words
    ]
    at = next(n for n in range(9) if len({b[n] for b in behind}) > 1)
    assert ids == tuple(b[at] for b in behind) and len(set(ids)) == len(words)


def test_words_that_begin_alike_are_told_apart_later():
    tok = READERS['bytes']()
    a, b = word_ids(tok, (' word safe', ' word unsafe'))
    assert a != b and len(tok(' word safe')['input_ids']) > 1


BAD = {
    'one is the beginning of the other': ((' no', ' no no'), "' no' is the beginning of another one"),
    'the same': ((' yes', ' yes'), 'do not begin with different tokens'),
    'empty': (('', ' yes'), "'' has no token"),
    'unknown': ((' yes', '☃'), 'does not know|no tokens of their own'),
}


@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('reader', ['bytes', 'metaspace'])
def test_words_that_cannot_be_told_apart(kind, reader):
    words, says = BAD[kind]
    if kind == 'unknown' and reader == 'bytes': return
    with pytest.raises(ConfigError, match=says): word_ids(READERS[reader](), words)


@pytest.mark.skipif(not (REAL/'stories260K').is_dir(), reason='needs the real weights')
def test_label_words_of_a_real_sentencepiece_tokenizer():
    tok = load_tokenizer(REAL/'stories260K')
    ids, prompt = word_ids(tok, (' no', ' yes')), 'Is it good?'
    start = tok(prompt, add_special_tokens=False)['input_ids']
    assert len(set(ids)) == 2 and all(
        i in tok(prompt + w, add_special_tokens=False)['input_ids'][len(start) :] for i, w in zip(ids, (' no', ' yes'), strict=True)
    )
