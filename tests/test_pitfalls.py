"The pitfalls of reference/landscape.md, part 3, by number: each was seen to fail on its mutation"
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from w2s.compare import answer as answer_page
from w2s.compare import learn, preference_stages, supervisors
from w2s.compare import preference_arms as arms
from w2s.compare import score as score_page
from w2s.compare.extensions import LABELLERS
from w2s.compare.learn import Study
from w2s.compare.models import know_model
from w2s.compare.preference_data import Reader, halves, load_preferences, readable
from w2s.compare.preference_settings import LabelUse, WeakTeacher
from w2s.compare.stages import Run, stage_folder
from w2s.data.rows import make_rows, to_pairs
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import DataError, W2SWarning
from w2s.experiments import preferences as weak_teacher
from w2s.experiments.preferences import know_models, run
from w2s.feedback.preferences import given_labels, label_pairs
from w2s.models.adapters import LoraSettings, adapter_hash, add_adapter, load_adapter, save_adapter
from w2s.models.load import Base, LoadSettings, load_base, load_tokenizer, set_mode
from w2s.models.tiny import pretrain, tiny_model, tiny_tokenizer
from w2s.train import checkpoints as checkpoint_module
from w2s.train import loop, losses
from w2s.train import reference as store_module
from w2s.train.batches import block
from w2s.train.checkpoints import checkpoints, trainable
from w2s.train.logprobs import check_model, head_of, response_hidden, response_logps, score, token_logps
from w2s.train.loop import TrainSettings, make_optimizer, material, preference_objective, sft_objective, step_gradient, train
from w2s.train.reference import logps_key, store_folder, stored_logps, tolerance
from w2s.train.tokens import EQUAL, TOO_LONG, Encoded, EncodedRow, encode, encode_rows

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT.parent/'shared'/'weights'
FULL = LoadSettings(quantize='none', dtype='float32')
PAIR = ('chosen', 'rejected')


def shake(model, seed=0, size=.05):
    "Move every adapter weight, B included"
    draw = torch.Generator().manual_seed(seed)
    for p in trainable(model).values(): p.data += size * torch.randn(p.shape, generator=draw)
    return model


def some_rows(lengths, vocab, seed=0, prompt=3):
    "Encoded preference rows with these lengths of chosen and rejected"
    rng = np.random.default_rng(seed)
    def one(n): return Encoded(tuple(rng.integers(3, vocab, n).tolist()), prompt)
    return [EncodedRow(f'row{i}', (one(a), one(b)), 0) for i, (a, b) in enumerate(lengths)]


def gradients(model):
    "Gradients by name; they are taken away"
    out = {n: p.grad.clone() for n, p in trainable(model).items()}
    for p in trainable(model).values(): p.grad = None
    return out


def largest_difference(a, b):
    "Over all tensors of two dictionaries, as a share of the largest number in them"
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a) / max(t.abs().max().item() for t in a.values())


def new_process(code, *args, seed='0'):
    "What a fresh Python prints"
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': seed, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope='module')
def texts(): return [r['prompt'] + r['chosen'] for r in sample_preferences(60, seed=3)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, texts):
    "A tiny model that has read a little, so that its attention looks at something"
    out = tiny_model(tmp_path_factory.mktemp('tiny')/'model', texts, layers=2)
    pretrain(out, texts, steps=40)
    return out


@pytest.fixture
def base(folder): return load_base(folder, FULL, device='cpu')


@pytest.fixture(scope='module')
def rows(folder): return encode_rows(load_tokenizer(folder), make_rows(sample_preferences(40, seed=5), 'preferences'), PAIR, 256).rows


@pytest.fixture
def sft(base, tmp_path):
    "A frozen SFT adapter whose values are not zero"
    model = shake(add_adapter(base, LoraSettings(rank=4), seed=1), 1)
    out = save_adapter(model, base, tmp_path/'sft')
    model.unload()
    return out


# --- 1: sequence log-probs in 16 bits

def test_pitfall_01_log_probs_are_summed_in_32_bits(tmp_path, texts):
    "512 tokens, a bf16 model, pairs that differ in three tokens: within 0.1 nat of 64 bits, and the sign of the margin right"
    base = load_base(tiny_model(tmp_path/'m', texts, layers=1, context=600), LoadSettings(quantize='none', dtype='bfloat16'), device='cpu')
    assert base.model.dtype == torch.bfloat16
    for p in base.model.parameters(): p.data *= 3 # logits that are not all alike
    rng, rows = np.random.default_rng(0), []
    for _ in range(24):
        first = rng.integers(3, 512, 516)
        second = first.copy()
        second[rng.integers(300, 516, 3)] = rng.integers(3, 512, 3)
        rows += [Encoded(tuple(x.tolist()), 4) for x in (first, second)]
    ours, exact, naive = [], [], []
    with torch.no_grad():
        for row in rows:
            data, head = block([row]), head_of(base.model)
            hidden = response_hidden(base.model, data)
            logits = hidden @ head['weight'].T
            ours.append(response_logps(base.model, data).item())
            exact.append((hidden.double() @ head['weight'].double().T).log_softmax(-1).gather(1, data.target[:, None]).sum().item())
            naive.append(logits.log_softmax(-1).gather(1, data.target[:, None]).sum().item())
    ours, exact, naive = (np.array(x).reshape(-1, 2) for x in (ours, exact, naive))
    assert abs(ours - exact).max() < .1 and abs(naive - exact).max() > .5
    assert (np.sign(ours[:, 0] - ours[:, 1]) == np.sign(exact[:, 0] - exact[:, 1])).mean() > .99


# --- 2: losses at the ends of the scale

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('smoothing', [0., .1])
def test_pitfall_02_dpo_has_a_gradient_wherever_it_is_wrong(dtype, smoothing):
    for m in (-60., -20., -8., 8., 20., 60.):
        for target in (0., .3, 1.):
            x = torch.tensor([m], dtype=dtype, requires_grad=True)
            loss = losses.cdpo(x, torch.tensor([target]), 1., smoothing)
            loss.sum().backward()
            p = target + smoothing*(1 - 2*target)
            want = 1/(1 + math.exp(-m)) - p
            assert torch.isfinite(loss).all() and torch.isfinite(x.grad).all()
            assert abs(x.grad.item() - want) < (1e-6 if dtype == torch.float32 else 5e-3)
            if abs(want) > .01: assert x.grad.item() * want > 0 # wrong: it must learn, in the right direction


def test_pitfall_02_log_probs_of_a_certain_model_are_finite():
    "Logits of ±120: log-prob and gradient of the sure-but-wrong token are finite and not zero"
    weight, hidden = torch.eye(4), torch.tensor([[120., -120., 0., 0.], [-120., 120., 20., 0.]], requires_grad=True)
    out = token_logps(hidden, torch.tensor([1, 0]), weight)
    out.sum().backward()
    assert torch.allclose(out, torch.tensor([-240., -240.])) and torch.isfinite(hidden.grad).all()
    assert hidden.grad[0, 1] == 1 and hidden.grad[1, 0] == 1


# --- 5: weights

def weighted_gradient(base, rows, weights, index, budget=4096, kind='dpo'):
    "Loss and gradient, times the size they were divided by"
    model = shake(add_adapter(base, LoraSettings(rank=2), seed=0), 4)
    ref = np.full((len(rows), 2), -30.) + np.arange(len(rows))[:, None]*[.5, -.5]
    goal = sft_objective(rows, weights) if kind == 'sft' else preference_objective(rows, ref, weights=weights)
    note = step_gradient(model, goal, index, budget)
    size, out = sum(goal.sizes[i] for i in index), gradients(model)
    model.unload()
    return note['loss'] * size, {n: g * size for n, g in out.items()}


@pytest.mark.parametrize('kind', ['dpo', 'sft'])
def test_pitfall_05_weights_act(base, rows, kind):
    four = rows[:4]
    plain = weighted_gradient(base, four, None, [0, 1, 2, 3], kind=kind)
    with pytest.raises(DataError, match='every weight is 0'): weighted_gradient(base, four, [0]*4, [0, 1, 2, 3], kind=kind)
    half, two = (weighted_gradient(base, four, w, i, kind=kind) for w, i in (([0, 1, 0, 1], [0, 1, 2, 3]), (None, [1, 3])))
    assert largest_difference(half[1], two[1]) < 1e-5 # a row of weight 0 teaches nothing
    doubled = weighted_gradient(base, four, [1, 2, 1, 1], [0, 1, 2, 3], kind=kind)
    assert largest_difference(doubled[1], plain[1]) > 1e-3 # it acts
    twice = weighted_gradient(base, four, None, [0, 1, 2, 3, 1], kind=kind)
    assert abs(doubled[0]/twice[0] - 1) < 1e-5 and largest_difference(doubled[1], twice[1]) < 1e-5
    random = [.3, 2.5, 0., 1.7]
    whole, parts = (
        weighted_gradient(base, four, random, [0, 1, 2, 3], kind=kind),
        weighted_gradient(base, four, random, [0, 1, 2, 3], 1, kind),
    )
    assert abs(whole[0] - plain[0]) > .05
    assert abs(whole[0]/parts[0] - 1) < 1e-5 and largest_difference(whole[1], parts[1]) < 1e-5


def test_pitfall_05_weights_do_not_cancel_at_batch_one(base, rows):
    "Divided by the weights of the batch, a single row would weigh 1 whatever its weight"
    one, three = weighted_gradient(base, rows[:1], [1.], [0]), weighted_gradient(base, rows[:1], [3.], [0])
    assert largest_difference({n: 3*g for n, g in one[1].items()}, three[1]) < 1e-5


def test_pitfall_05_weights_reach_every_arm():
    "What the human arm and the ceiling are trained on keeps the weights of the user's file"
    given = make_rows([r | {'weight': .5 + i} for i, r in enumerate(sample_preferences(8))], 'preferences')
    weights = dict(zip(given['prompt'], given['weight'], strict=True))
    for column in ('prob_a', 'gold_a'):
        arm = given_labels(to_pairs(given, 0), column).rows
        assert dict(zip(arm['prompt'], arm['weight'], strict=True)) == weights


# --- 6: padding

def family(name):
    "A tiny random model of a family; weights large enough to notice a wrong position or a seen pad"
    small = dict(
        vocab_size=120, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, max_position_embeddings=64
    )
    kv = small | dict(num_key_value_heads=2)
    config = {
        'llama': lambda: transformers.LlamaConfig(**kv),
        'mistral': lambda: transformers.MistralConfig(**kv, sliding_window=8, head_dim=16),
        'qwen2': lambda: transformers.Qwen2Config(**kv),
        'gpt_neox': lambda: transformers.GPTNeoXConfig(**small),
        'gemma2': lambda: transformers.Gemma2Config(
            **kv, head_dim=16, query_pre_attn_scalar=16, sliding_window=8, final_logit_softcapping=3.0
        ),
        'opt': lambda: transformers.OPTConfig(
            vocab_size=120,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=96,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            do_layer_norm_before=False,
            dropout=0.0,
        ),
        'gpt2': lambda: transformers.GPT2Config(
            vocab_size=120, n_embd=64, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
    }[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for n, p in model.named_parameters():
        if p.ndim > 1: p.data = torch.randn(p.shape) * (1. if 'pos' in n or 'wpe' in n or 'emb' in n or 'wte' in n else .25)
    return Base(name, model, None, name, FULL, 64)


@pytest.mark.parametrize('name', ['llama', 'gpt2', 'opt', 'gpt_neox', 'qwen2', 'gemma2', 'mistral'])
def test_pitfall_06_padding_does_not_leak(name):
    "Alone = padded right = padded left = the model's own logits, base and adapter, to 1e-4 in 32 bits"
    base = family(name)
    check_model(base)
    model = shake(add_adapter(base, LoraSettings(rank=2), seed=0))
    set_mode(model, False)
    sequences = [s for r in some_rows([(5, 30), (9, 14), (22, 6), (12, 13)], 120, prompt=4) for s in r.sequences]
    with torch.no_grad():
        alone = torch.cat([response_logps(model, block([s])) for s in sequences])
        own = []
        for s in sequences:
            logp = model(torch.tensor([s.ids])).logits[0].log_softmax(-1)
            own.append(sum(logp[t - 1, s.ids[t]].item() for t in range(s.start, len(s.ids))))
        for side in ('right', 'left'):
            data = block(sequences, side)
            assert (response_logps(model, data) - alone).abs().max() < 1e-4, side
            data.input_ids[data.attention_mask == 0] = 77 # whatever is under the padding
            assert (response_logps(model, data) - alone).abs().max() < 1e-4, side
    assert (alone - torch.tensor(own)).abs().max() < 1e-4
    assert len(set(alone.round(decimals=1).tolist())) == len(sequences) # a model that says the same of everything would pass, too


@pytest.mark.parametrize('name', ['gemma2', 'gpt2'])
def test_pitfall_06_check_model_notices(name, monkeypatch):
    "The check that every loaded model goes through refuses one whose head we read wrongly"
    from w2s.errors import ModelError
    from w2s.train import logprobs
    monkeypatch.setattr(logprobs, 'head_of', lambda model: head_of(model) | {'cap': None, 'scale': .5})
    with pytest.raises(ModelError, match='not those of its logits'): check_model(family(name))


# --- 7: pad is eos, and id 0 is a word

def as_pad(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_pitfall_07_the_end_token_is_learned_once_though_it_is_the_pad(folder):
    tokenizer = as_pad(load_tokenizer(folder))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    data = make_rows(
        [
            dict(prompt='Say it:', chosen=' one', rejected=' two</s>'),
            dict(prompt='Say it again, please:', chosen=' three four', rejected=' 5'),
        ],
        'preferences',
    )
    flat = [s for r in encode_rows(tokenizer, data, PAIR, 64).rows for s in r.sequences]
    for side in ('right', 'left'):
        b = block(flat, side)
        for n, s in enumerate(flat):
            learned = b.target[b.sequence == n].tolist()
            assert learned == list(s.response) and learned.count(2) == 1 and learned[-1] == 2
            assert b.attention_mask[n].sum() == len(s.ids)


def test_pitfall_07_id_zero_is_a_token_like_others(base):
    "Rows [5,0,7,0,9] and rows full of zeros: the mask is by length, not by id; read where the last attended token is"
    sequences = [Encoded((5, 0, 7, 0, 9), 2), Encoded((5, 0, 0), 1), Encoded((0, 0, 0, 0, 0, 0, 2), 3)]
    for side in ('right', 'left'):
        b = block(sequences, side)
        assert b.attention_mask.sum(1).tolist() == [5, 3, 7]
        assert b.target[b.sequence == 0].tolist() == [7, 0, 9] and b.target[b.sequence == 1].tolist() == [0, 0]
        last = [int(b.position[b.sequence == n].max()) + 1 for n in range(3)]
        assert last == ([4, 2, 6] if side == 'right' else [6, 6, 6])
        with torch.no_grad(): together = response_logps(base.model, b)
        alone = torch.cat([response_logps(base.model, block([s])) for s in sequences])
        assert (together - alone).abs().max() < 1e-4


# --- 8: what the token limit does (its text side is in test_data.py)

def letters():
    "One token a character; what it does not know becomes <unk>"
    tok = Tokenizer(models.WordLevel({t: i for i, t in enumerate(['<unk>', '</s>', *'abcdefghijklmnopqrstuvwxyz .:?'])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='</s>', unk_token='<unk>')


def crafted():
    "One long prompt; one pair that differs in characters the tokenizer does not know; one response that is too long; one good row"
    return [
        dict(prompt='a long question about many things ' * 4 + 'ends so:', chosen='yes', rejected='no'),
        dict(prompt='same?', chosen='x☃', rejected='x☂'),
        dict(prompt='too long?', chosen='b' * 90, rejected='no'),
        dict(prompt='good?', chosen='yes', rejected='no'),
    ]


def test_pitfall_08_long_and_equal_rows_are_counted_one_by_one():
    data, tokenizer = make_rows(crafted(), 'preferences'), letters()
    tokens = encode_rows(tokenizer, data, PAIR, 64)
    assert [bool(r.cut) for r in tokens.rows] == [True, False]
    assert list(tokens.refused.items()) == [(data['id'][1], EQUAL), (data['id'][2], TOO_LONG)]
    for r in tokens.rows: assert max(len(s.ids) for s in r.sequences) <= 64 and r.sequences[0].response != r.sequences[1].response
    cut = tokens.rows[0].sequences[0]
    assert tokenizer.decode(cut.ids).replace(' ', '').endswith('endsso:yes</s>') # from the left; the response is whole


def test_pitfall_08_the_report_says_one_one_one_and_strict_stops(tmp_path):
    path = tmp_path/'train.jsonl'
    easy = [dict(prompt=f'letter {c}?', chosen=f'it is {c}.', rejected='no idea.') for c in 'abcdefghijkl']
    path.write_text(''.join(json.dumps(r) + '\n' for r in [*crafted(), *easy]), encoding='utf-8')
    reader = Reader('weak', letters(), 95)
    data = load_preferences(str(path), [reader])
    found = data.report.table[data.report.table['model'] == 'weak']
    assert {k: found[found['check'] == k]['rows'].sum() for k in ('prompt cut', TOO_LONG, EQUAL)} == {
        'prompt cut': 1,
        TOO_LONG: 1,
        EQUAL: 1,
    }
    assert len(data.train['train']) + len(data.test) == 14
    with pytest.raises(DataError) as e: load_preferences(str(path), [reader], strict=True)
    assert all(k in str(e.value) for k in ('prompt cut', TOO_LONG, EQUAL))


def test_pitfall_08_a_row_that_one_model_cannot_read_is_gone_for_all(folder):
    data = make_rows(crafted(), 'preferences')
    from w2s.data.hygiene import DataReport
    out, _ = readable(
        {'train': data}, [Reader('weak', letters(), 64), Reader('strong', load_tokenizer(folder), 256)], DataReport(rows_in={'train': 4})
    )
    assert list(out['train']['prompt']) == [data['prompt'][0], data['prompt'][3]]


# --- 9: boundary, begin token, chat template

CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = dict(chatml=CHATML, llama3=LLAMA3, gemma=GEMMA)
TURNS = ['<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<start_of_turn>', '<end_of_turn>']
TALK = [
    dict(role='user', content='What do bees make?'),
    dict(role='assistant', content='Honey, of course.'),
    dict(role='user', content='And what do cows give?'),
]
PROMPT, REPLY = 'Question: What do bees make?\nAnswer:', ' The answer is honey. I hope that helps.'


def with_bos(tok):
    "A tokenizer that puts <s> before every text, as Llama's does"
    tok.post_processor = processors.TemplateProcessing(single='<s> $A', special_tokens=[('<s>', tok.token_to_id('<s>'))])
    return tok


def made(kind, texts):
    "A tokenizer of a kind that people have, learned from some texts"
    special = ['<pad>', '<s>', '</s>', '<unk>', '[CLS]', '[SEP]']
    names = dict(pad_token='<pad>', bos_token='<s>', eos_token='</s>', unk_token='<unk>')
    if kind == 'byte bpe': return tiny_tokenizer(texts, 400)
    if kind == 'byte bpe with bos':
        return PreTrainedTokenizerFast(
            tokenizer_object=with_bos(tiny_tokenizer(texts, 400).backend_tokenizer), **{k: v for k, v in names.items() if k != 'unk_token'}
        )
    if kind == 'unigram metaspace':
        tok, trainer = (
            Tokenizer(models.Unigram()),
            trainers.UnigramTrainer(vocab_size=300, special_tokens=special, unk_token='<unk>', show_progress=False),
        )
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    elif kind == 'wordpiece':
        tok, trainer = (
            Tokenizer(models.WordPiece(unk_token='<unk>')),
            trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False),
        )
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    else: # one token a letter, digits unknown
        tok = Tokenizer(
            models.WordLevel(
                {t: i for i, t in enumerate(dict.fromkeys([*special, *sorted(set(''.join(texts)) - set('0123456789'))]))}, unk_token='<unk>'
            )
        )
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=with_bos(tok), **names)
    tok.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=with_bos(tok) if kind == 'unigram metaspace' else tok, **names)


MADE = ['byte bpe', 'byte bpe with bos', 'unigram metaspace', 'wordpiece', 'letters']
REAL = ['babyllama105', 'english-1m', 'english-5m', 'stories260K']


@pytest.fixture(params=[*MADE, *REAL])
def tokenizer(request, texts):
    if request.param in MADE: return made(request.param, [*texts, PROMPT, REPLY])
    if not (WEIGHTS/request.param).is_dir(): pytest.skip('needs ../shared/weights')
    return load_tokenizer(WEIGHTS/request.param)


def shown(tokenizer, ids): return ''.join(tokenizer.decode(list(ids), skip_special_tokens=True).split())


def test_pitfall_09_plain_text(tokenizer):
    """Row = the text as the tokenizer reads it whole + one end token; the prompt as it is at inference is its beginning; the response is
    the response"""
    inference, whole = (tokenizer(t)['input_ids'] for t in (PROMPT, PROMPT + REPLY))
    row, = encode(tokenizer, [PROMPT], [REPLY])
    assert list(row.ids) == whole + [tokenizer.eos_token_id]
    assert list(row.ids[:row.start]) == inference
    assert shown(tokenizer, row.response) == shown(tokenizer, tokenizer(REPLY)['input_ids']) and 'honey' in shown(tokenizer, row.response)
    adds = tokenizer('x')['input_ids'][0] == tokenizer.bos_token_id
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert list(row.ids).count(tokenizer.bos_token_id) == adds and list(row.ids).count(tokenizer.eos_token_id) == 1


def test_pitfall_09_begin_and_end_tokens_are_not_doubled(tokenizer):
    "A prompt that already starts with the begin token, a response that already ends with the end token"
    if tokenizer.bos_token is None: pytest.skip('has no begin token')
    plain, = encode(tokenizer, [PROMPT], [REPLY])
    given, = encode(tokenizer, [tokenizer.bos_token + PROMPT], [REPLY + tokenizer.eos_token])
    assert list(given.ids).count(tokenizer.eos_token_id) == (1 if tokenizer.bos_token_id != tokenizer.eos_token_id else 2)
    assert given.ids[0] == tokenizer.bos_token_id != given.ids[1] and given.ids[-1] == tokenizer.eos_token_id != given.ids[-2]
    assert shown(tokenizer, given.response) == shown(tokenizer, plain.response)


@pytest.mark.parametrize('template', TEMPLATES)
def test_pitfall_09_chat(tokenizer, template):
    "Row = the template's own full render; the prompt at inference, with its generation prompt, is its beginning"
    tokenizer.add_special_tokens({'additional_special_tokens': TURNS})
    tokenizer.chat_template = TEMPLATES[template]
    row, = encode(tokenizer, [TALK], ['Milk, every day.'])
    full = [*TALK, dict(role='assistant', content='Milk, every day.')]
    def render(talk, **more): return list(tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True, **more)['input_ids'])
    assert list(row.ids) == render(full)
    inference = render(TALK, add_generation_prompt=True)
    assert list(row.ids[:row.start]) == inference
    text = shown(tokenizer, row.response)
    assert text == shown(tokenizer, tokenizer('Milk, every day.', add_special_tokens=False)['input_ids']) and 'day' in text
    if tokenizer.bos_token_id != tokenizer.eos_token_id:
        assert list(row.ids).count(tokenizer.bos_token_id) == ('bos_token' in TEMPLATES[template])
    closing = {'chatml': '<|im_end|>', 'llama3': '<|eot_id|>', 'gemma': '<end_of_turn>'}[template]
    assert list(row.response).count(tokenizer.convert_tokens_to_ids(closing)) == 1


def test_pitfall_09_messages_without_a_template_are_text(tokenizer):
    "As if somebody had written the conversation into the prompt: the same ids, the same boundary, one begin and one end token"
    tokenizer.chat_template = None
    text = '\n\n'.join({'user': 'Human: ', 'assistant': 'Assistant: '}.get(m['role'], '') + m['content'] for m in TALK) + '\n\nAssistant:'
    assert encode(tokenizer, [TALK], ['Milk.']) == encode(tokenizer, [text], [' Milk.'])


def test_pitfall_09_tokens_that_merge_over_the_boundary(folder):
    "The row is the text as it is read whole; the mask starts where it leaves the prompt, never inside it"
    tokenizer = load_tokenizer(folder)
    row, = encode(tokenizer, ['Ann says the answ'], ['er is cold.'])
    assert list(row.ids[:-1]) == tokenizer('Ann says the answer is cold.')['input_ids']
    assert list(row.ids[:row.start]) == tokenizer('Ann says the answ')['input_ids'][:row.start]
    assert tokenizer.decode(row.response[:-1]).endswith('er is cold.')


# --- 10: the reference is the SFT adapter, before and after

@pytest.mark.parametrize(
    'load', [FULL, LoadSettings(quantize='nf4', dtype='float32'), LoadSettings()], ids=['fp32', 'nf4 fp32', 'nf4 bf16']
)
def test_pitfall_10_the_reference_is_the_frozen_sft_adapter(folder, tmp_path, rows, load):
    base, rows = load_base(folder, load, device='cpu'), rows[:24]
    start = shake(add_adapter(base, LoraSettings(rank=4), seed=1), 1)
    sft = save_adapter(start, base, tmp_path/'sft')
    start.unload()
    reference, bare = (
        stored_logps(tmp_path / 'store', base, sft, rows, quiet=True),
        stored_logps(tmp_path / 'store', base, None, rows, quiet=True),
    )
    assert abs(reference - bare).min() > .01 # the adapter is not nothing
    policy = load_adapter(base, sft, trainable=True)
    history = train(
        policy, preference_objective(rows, reference), TrainSettings(batch_size=8, learning_rate=1e-2), tmp_path / 'ck', quiet=True
    )
    assert abs(history.loss[0] - math.log(2)) < (1e-5 if load.dtype == 'float32' else .02)
    assert abs(history.loss[2] - math.log(2)) > 1e-3 # and it learns
    moved = score(policy, rows, quiet=True)
    policy.unload()
    assert abs(moved - reference).max() > .1
    again = stored_logps(tmp_path/'store', base, sft, rows, quiet=True)
    assert (again == reference).all() and (stored_logps(tmp_path/'another', base, sft, rows, quiet=True) == reference).all()


# --- 11: what is kept, and for what

def hit(store, base, adapter, rows):
    "Would kept log-probs be used?"
    return store_folder(store, logps_key(base, adapter, rows)).is_dir()


def test_pitfall_11_hits_and_misses(folder, tmp_path, texts, base, sft):
    data = make_rows([dict(prompt=r['prompt'], chosen=r['chosen'], rejected=r['rejected']) for r in sample_preferences(12)], 'preferences')
    def read(tokenizer=base.tokenizer, limit=256, data=data): return encode_rows(tokenizer, data, PAIR, limit).rows
    store, rows = tmp_path/'store', read()
    stored_logps(store, base, sft, rows, quiet=True)
    same, other = tmp_path/'renamed', tmp_path/'other'
    shutil.copytree(folder, tmp_path/'moved')
    moved = load_base(tmp_path/'moved', FULL, device='cpu')
    for place, under in ((same, base), (tmp_path/'on-moved', moved)):
        model = load_adapter(under, sft)
        save_adapter(model, under, place)
        model.unload()
    model = shake(load_adapter(base, sft, trainable=True), 9)
    save_adapter(model, base, other)
    model.unload()
    changed = data.map(lambda r: r | dict(weight=.5, prob=.9, source='other'))
    hits = dict(
        again=(base, sft, read()),
        renamed_adapter=(base, same, rows),
        moved_base=(moved, tmp_path / 'on-moved', rows),
        other_weights_labels_and_source=(base, sft, read(data=changed)),
    )
    talk = make_rows([r | dict(prompt=[dict(role='user', content=r['prompt'])]) for r in sample_preferences(12)], 'preferences')
    chat = []
    for template in (CHATML, LLAMA3):
        tok = load_tokenizer(folder)
        tok.chat_template = template
        chat.append(read(tok, data=talk))
    stored_logps(store, base, sft, chat[0], quiet=True)
    wider = tiny_tokenizer(texts, 400)
    loads = [
        load_base(folder, x, device='cpu')
        for x in (LoadSettings(quantize='nf4', dtype='float32'), LoadSettings(quantize='none', dtype='bfloat16'))
    ]
    reseeded = load_base(tiny_model(tmp_path/'reseeded', texts, seed=1), FULL, device='cpu')
    short = max(len(s.ids) for r in rows for s in r.sequences) - 2
    assert any(r.cut for r in read(limit=short)) and read(wider) != rows
    misses = dict(
        max_length=(base, sft, read(limit=short)),
        tokenizer=(base, sft, read(wider)),
        subset=(base, sft, rows[:8]),
        order=(base, sft, rows[::-1]),
        template=(base, sft, chat[1]),
        no_adapter=(base, None, rows),
        adapter=(base, other, rows),
        quantize=(loads[0], sft, rows),
        dtype=(loads[1], sft, rows),
        weights=(reseeded, sft, rows),
    )
    assert {k: hit(store, *v) for k, v in {**hits, **misses}.items()} == {**dict.fromkeys(hits, True), **dict.fromkeys(misses, False)}


def test_pitfall_11_on_a_hit_rows_are_computed_again(tmp_path, base, sft, rows, monkeypatch):
    scored = []
    monkeypatch.setattr(store_module, 'score', lambda model, rows, *a, **k: scored.append(len(rows)) or score(model, rows, *a, **k))
    first = stored_logps(tmp_path/'s', base, sft, rows, quiet=True)
    assert scored == [len(rows)]
    assert (stored_logps(tmp_path/'s', base, sft, rows, quiet=True) == first).all() and scored == [len(rows)] # its own work is not doubted
    store_module._SEEN.clear() # another process
    assert (stored_logps(tmp_path/'s', base, sft, rows, quiet=True) == first).all() and scored == [len(rows), 8]
    kept = next((tmp_path/'s').glob('*/00000.npy'))
    kept.write_bytes((np.frombuffer(kept.read_bytes(), '<f8') + .05).tobytes())
    with pytest.warns(W2SWarning, match='damaged; its log-probs are computed again'):
        again = stored_logps(tmp_path / 's', base, sft, rows, quiet=True)
    assert (again == first).all()


# --- 12: the reference in the mode of the policy

@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_pitfall_12_kept_reference_is_the_one_on_line(folder, tmp_path, rows, dtype):
    "Dropout in the adapter's settings, a model left in training mode, batches of 1 and 8, with and without checkpointing"
    base, rows = load_base(folder, LoadSettings(quantize='none', dtype=dtype), device='cpu'), rows[:16]
    for p in base.model.parameters(): p.data *= 1.5
    start = shake(add_adapter(base, LoraSettings(rank=4, dropout=.1), seed=1), 1)
    sft = save_adapter(start, base, tmp_path/'sft')
    start.unload()
    set_mode(base.model, True)
    kept = stored_logps(tmp_path/'one', base, sft, rows, budget=1, quiet=True)
    together = stored_logps(tmp_path/'many', base, sft, rows, budget=8192, quiet=True)
    policy = load_adapter(base, sft, trainable=True)
    noisy = response_logps(policy, block(rows[0].sequences)).detach() # in training mode: dropout acts
    set_mode(policy, False)
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    online = np.array([response_logps(policy, block(r.sequences)).detach().tolist() for r in rows]) # with gradient
    bound = 1e-4 if dtype == 'float32' else max(tolerance(dtype, len(s.response)) for r in rows for s in r.sequences)
    assert abs(kept - online).max() < bound and abs(together - online).max() < bound
    assert abs(noisy.numpy() - kept[0]).max() > 1e-2


# --- 14: everything trained is in the optimizer, and everything is saved

RELOAD = '''
import sys, torch, numpy as np
from w2s.models.load import *
from w2s.models.adapters import load_adapter
base = load_base(sys.argv[1], LoadSettings(quantize=sys.argv[3], dtype='float32'), device='cpu')
torch.manual_seed(99)
model = load_adapter(base, sys.argv[2])
with torch.no_grad(): np.save(sys.argv[4], model(torch.arange(5, 45).view(2, 20)).logits.numpy())
print('done')
'''


@pytest.mark.cases(1)
@pytest.mark.parametrize('quantize', ['none', 'nf4'])
def test_pitfall_14_what_is_trained_is_saved(folder, tmp_path, rows, quantize):
    "Every adapter matrix is in the optimizer and changes in two steps; a new process finds the same logits to 1e-6"
    base = load_base(folder, LoadSettings(quantize=quantize, dtype='float32'), device='cpu')
    model = add_adapter(base, LoraSettings(rank=4), seed=0)
    before = {n: p.detach().clone() for n, p in trainable(model).items()}
    linear = [n for n, m in base.model.named_modules() if 'lora_A' in dict(m.named_children())]
    assert len(linear) == 2*7 and len(before) == 2*len(linear) and all(p.dtype == torch.float32 for p in before.values())
    held = [p for g in make_optimizer(model, TrainSettings()).param_groups for p in g['params']]
    assert {id(p) for p in held} == {id(p) for p in trainable(model).values()}
    train(model, sft_objective(rows[:16]), TrainSettings(batch_size=8, learning_rate=1e-2), tmp_path/'ck', quiet=True)
    same = [n for n, p in trainable(model).items() if torch.equal(p, before[n])]
    assert not same
    set_mode(model, False)
    with torch.no_grad(): ours = model(torch.arange(5, 45).view(2, 20)).logits.numpy()
    saved = load_file(save_adapter(model, base, tmp_path/'adapter')/'adapter_model.safetensors')
    assert len(saved) == len(before)
    with torch.no_grad(), model.disable_adapter(): assert abs(ours - model(torch.arange(5, 45).view(2, 20)).logits.numpy()).max() > .05
    new_process(RELOAD, folder, tmp_path/'adapter', quantize, tmp_path/'theirs.npy')
    assert abs(np.load(tmp_path/'theirs.npy') - ours).max() < 1e-6


# --- 15: checkpointing that acts and does not cut

def one_training(base, rows, tmp_path, on):
    "Weights after two steps, and the bytes kept for the backward pass"
    kept: dict[int, int] = {}
    own = {p.data_ptr() for p in base.model.parameters()}
    def pack(t):
        if t.data_ptr() not in own: kept[t.data_ptr()] = max(kept.get(t.data_ptr(), 0), t.numel()*t.element_size())
        return t
    model = add_adapter(base, LoraSettings(rank=4), seed=0)
    settings = TrainSettings(batch_size=8, epochs=1, learning_rate=1e-3, schedule='constant', gradient_checkpointing=on)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step_gradient(*prepared(model, rows, settings), budget=1 << 20)
    grads = gradients(model)
    train(model, sft_objective(rows[:16]), settings, tmp_path/f'ck{on}', quiet=True)
    step_gradient(model, sft_objective(rows), list(range(8)), 1 << 20)
    last = gradients(model)
    weights = {n: p.detach().clone() for n, p in trainable(model).items()}
    model.unload()
    return sum(kept.values()), grads, last, weights


def prepared(model, rows, settings):
    "As `train` prepares it"
    if settings.gradient_checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    set_mode(model, True)
    return model, sft_objective(rows), list(range(8))


def test_pitfall_15_checkpointing_acts_and_does_not_cut_the_gradient(tmp_path, texts, rows):
    "Eight layers: under a quarter of the bytes; gradients and weights equal; no LoRA matrix without a gradient after two steps"
    # with checkpointing sequences are padded, and sums are in another order
    base = load_base(tiny_model(tmp_path/'deep', texts, layers=8), replace(FULL, packing='off'), device='cpu')
    without, with_it = one_training(base, rows, tmp_path, False), one_training(base, rows, tmp_path, True)
    assert with_it[0] < .25 * without[0]
    for a, b in zip(without[1:], with_it[1:], strict=True): assert max((a[n] - b[n]).abs().max() for n in a) < 1e-6
    assert all(g.abs().max() > 0 for g in with_it[2].values()) and len(with_it[2]) == 2*7*8


def test_pitfall_15_train_turns_it_on(base, tmp_path, rows, monkeypatch):
    "What `train` runs is what was measured above: in training mode, with checkpointing, and off again at the end"
    seen = []
    real = loop.take_step
    def take_step(model, *a):
        seen.append((model.training, model.is_gradient_checkpointing))
        calls = []
        handles = [
            m.register_forward_hook(lambda *x: calls.append(1)) for n, m in model.named_modules() if n.endswith('layers.0.self_attn')
        ]
        note = real(model, *a)
        for h in handles: h.remove()
        seen.append(len(calls))
        return note
    monkeypatch.setattr(loop, 'take_step', take_step)
    model = add_adapter(base, LoraSettings(rank=2), seed=0)
    set_mode(model, False)
    train(model, sft_objective(rows[:4]), TrainSettings(batch_size=4, gradient_checkpointing=True), tmp_path/'c', quiet=True)
    assert seen == [(True, True), 2] # each layer is run once more in the backward pass
    assert not model.is_gradient_checkpointing


# --- 16: accumulation, the last partial batch, resume

def weights_after(base, rows, folder, kind='dpo', dropout=0., **settings):
    "Adapter weights and history of a training"
    model = shake(add_adapter(base, LoraSettings(rank=2, dropout=dropout), seed=0), 2)
    weights = [1., .2, 2., .7, 0.] * (len(rows)//5 + 1)
    ref = np.array([[-25. - i % 7, -26. + i % 5] for i in range(len(rows))])
    goal = preference_objective(rows, ref, weights=weights[:len(rows)]) if kind == 'dpo' else sft_objective(rows, weights[:len(rows)])
    try:
        history = train(
            model,
            goal,
            TrainSettings(**{'batch_size': 8, 'learning_rate': 1e-3, 'max_grad_norm': 1e9} | settings),
            folder,
            seed=3,
            quiet=True,
        )
        return {n: p.detach().clone() for n, p in trainable(model).items()}, history
    finally: model.unload()


@pytest.mark.parametrize('kind', ['dpo', 'sft'])
def test_pitfall_16_micro_batches_do_not_matter(base, tmp_path, rows, kind, monkeypatch):
    "1×8 = 8×1 = 4×2 after 3 steps of 8, 8 and 5 rows of unequal length and weight"
    rows, counts, results = rows[:21], [], []
    lengths = {sum(len(s.ids) for s in r.sequences) for r in rows}
    assert len(lengths) > 8
    real = loop.cut_for
    for budget in (1, None, 1 << 20):
        if budget is None:
            monkeypatch.setattr(loop, 'cut_for', lambda *a: lambda rows, b: [list(rows)[i : i + 2] for i in range(0, len(rows), 2)])
        else: monkeypatch.setattr(loop, 'cut_for', lambda *a: lambda rows, b: counts.append(real(*a)(rows, b)) or counts[-1])
        results.append(weights_after(base, rows, tmp_path/f'{kind}{budget}', kind, token_budget=budget or 1))
    assert [len(c) for c in counts] == [8, 8, 5, 1, 1, 1] or sorted(len(c) for c in counts) == [1, 1, 1, 5, 8, 8]
    for weights, history in results[1:]:
        assert largest_difference(weights, results[0][0]) < 1e-6
        assert np.allclose(history.loss, results[0][1].loss, atol=1e-6) and np.allclose(
            history.grad_norm, results[0][1].grad_norm, rtol=1e-4
        )
    assert len(results[0][1]) == 3


def test_pitfall_16_a_small_last_batch_is_divided_by_its_own_size(base, rows):
    "The mean over 5 rows, not over the 8 of a full batch"
    model = shake(add_adapter(base, LoraSettings(rank=2), seed=0), 2)
    goal = preference_objective(rows, np.full((len(rows), 2), -30.))
    alone = [step_gradient(model, goal, [i], 4096)['loss'] for i in range(5)]
    assert abs(step_gradient(model, goal, [0, 1, 2, 3, 4], 200)['loss'] - np.mean(alone)) < 1e-6


@pytest.mark.parametrize('stop', [1, 2, 4, 5])
def test_pitfall_16_stop_and_resume_ends_in_the_same_bits(base, tmp_path, rows, stop, monkeypatch):
    "Weights, optimizer, row order and curve, with dropout; the checkpoint is older than the stop"
    settings = dict(batch_size=4, epochs=2, checkpoint_every=2, token_budget=150, dropout=.1)
    straight = weights_after(base, rows[:10], tmp_path/'straight', **settings)
    assert len(straight[1]) == 6
    real, steps = loop.take_step, []
    def take_step(*a):
        if len(steps) == stop: raise KeyboardInterrupt
        steps.append(a[3])
        return real(*a)
    with monkeypatch.context() as m:
        m.setattr(loop, 'take_step', take_step)
        with pytest.raises(KeyboardInterrupt): weights_after(base, rows[:10], tmp_path/'stopped', **settings)
    with monkeypatch.context() as m:
        m.setattr(loop, 'take_step', lambda *a: steps.append(a[3]) or real(*a))
        resumed = weights_after(base, rows[:10], tmp_path/'stopped', **settings)
    assert len(steps) - stop == 6 - stop//2*2 # it went on from the last checkpoint, not from the start
    assert all(torch.equal(straight[0][n], resumed[0][n]) for n in straight[0])
    pd.testing.assert_frame_equal(straight[1], resumed[1], check_exact=True)
    a, b = (torch.load(checkpoints(tmp_path/x)[-1]/'optimizer.pt', weights_only=True) for x in ('straight', 'stopped'))
    assert a['param_groups'] == b['param_groups'] and a['state'].keys() == b['state'].keys() and len(a['state']) == len(straight[0])
    assert all(torch.equal(a['state'][k][x], b['state'][k][x]) for k in a['state'] for x in ('step', 'exp_avg', 'exp_avg_sq'))


@pytest.mark.parametrize('moment', ['weights', 'optimizer', 'history', 'sync', 'rename'])
def test_pitfall_16_killed_in_the_middle_of_a_save(base, tmp_path, rows, moment, monkeypatch):
    "The checkpoint before it loads, whatever file was being written"
    settings = dict(batch_size=4, epochs=2, checkpoint_every=2)
    straight = weights_after(base, rows[:10], tmp_path/'straight', **settings)
    place = {
        'weights': (checkpoint_module, 'save_file'),
        'optimizer': (torch, 'save'),
        'sync': (checkpoint_module, 'sync_tree'),
        'rename': (os, 'replace'),
        'history': (json, 'dumps'),
    }[moment]
    real, calls = getattr(*place), []
    def killed(*a, **k):
        # the second save
        second = {'rename': str(a[-1]).endswith('step-000004'), 'history': "'step': 3," in str(a)}.get(moment, len(calls) == 1)
        if second: raise KeyboardInterrupt
        calls.append(1)
        return real(*a, **k)
    with monkeypatch.context() as m:
        m.setattr(*place, killed)
        with pytest.raises(KeyboardInterrupt): weights_after(base, rows[:10], tmp_path/'k', **settings)
    assert [c.name for c in checkpoints(tmp_path/'k')] == ['step-000002'] and len(list((tmp_path/'k').glob('.writing-*'))) == 1
    resumed = weights_after(base, rows[:10], tmp_path/'k', **settings)
    assert all(torch.equal(straight[0][n], resumed[0][n]) for n in straight[0])


def test_pitfall_16_with_dropout_the_budget_acts_and_the_key_knows_it(base, tmp_path, rows):
    "The masks are drawn for each micro-batch"
    a, b = (weights_after(base, rows[:16], tmp_path/str(n), dropout=.2, token_budget=n)[0] for n in (150, 1 << 20))
    keys = [material(TrainSettings(token_budget=n), .2) for n in (150, 1 << 20)]
    assert largest_difference(a, b) > 1e-5 and keys[0] != keys[1]
    assert material(TrainSettings(token_budget=150)) == material(TrainSettings(token_budget=1 << 20))


# --- the whole experiment, small: for 17 and 18

@pytest.fixture(scope='module')
def world(tmp_path_factory, texts):
    "Rows, two models, and the settings of an experiment of some seconds"
    home = tmp_path_factory.mktemp('world')
    write_samples(home/'data', 60, seed=3)
    for name, layers in (('weak', 1), ('strong', 2)):
        tiny_model(home/name, texts, layers=layers, seed=layers)
        pretrain(home/name, texts, steps=30)
    step = TrainSettings(batch_size=8, learning_rate=3e-3)
    return WeakTeacher(
        str(home / 'data'),
        str(home / 'weak'),
        str(home / 'strong'),
        n_labelled=20,
        n_unlabelled=20,
        n_test=10,
        load=FULL,
        lora=LoraSettings(rank=2),
        sft=step,
        dpo=step,
    )


def adapters(result):
    "Hash of each trained adapter's weights"
    return {role_and_seed(k): sha(v/'adapter_model.safetensors') for k, v in sorted(result.adapters.items())}


def role_and_seed(name): return f'{name.partition("-")[0]}-{name.rpartition("-")[2]}' # of the name of an adapter


def sha(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@pytest.fixture(scope='module')
def done(world, tmp_path_factory): return run(world, tmp_path_factory.mktemp('done'), quiet=True)


def with_rows(world, folder, **change):
    "The same experiment on rows of which one file was changed"
    folder.mkdir()
    for path in Path(world.data).iterdir():
        lines = [json.loads(x) for x in path.read_text(encoding='utf-8').splitlines()]
        lines = [change[path.stem](r) for r in lines] if path.stem in change else lines
        (folder/path.name).write_text(''.join(json.dumps(r) + '\n' for r in lines), encoding='utf-8')
    return replace(world, data=str(folder))


# --- 10, 16 at the level of the experiment

def test_pitfall_10_every_dpo_stage_starts_from_its_reference(done):
    starts = {p.parent.name: pd.read_csv(p).loss[0] for p in (done.folder/'stages').glob('*-dpo-*/history.csv')}
    assert len(starts) == 4 and all(abs(v - math.log(2)) < 1e-5 for v in starts.values())
    ends = [pd.read_csv(p).value.iloc[-1] for p in (done.folder/'stages').glob('*-dpo-*/history.csv')]
    assert max(abs(v) for v in ends) > 1e-3


def test_pitfall_16_a_saved_model_has_its_recorded_scores(world, done):
    "Load the student and its SFT reference with PEFT alone, score the test rows anew: the recorded accuracy and log-probs"
    from peft import AutoPeftModelForCausalLM

    from w2s.report.write import write
    write(done)
    student = AutoPeftModelForCausalLM.from_pretrained(next((done.folder/'adapters').glob('student-*-seed0')), dtype=torch.float32)
    sft = next((done.folder/'stages').glob('student-seed0-sft-*'))/'adapter'
    reference = AutoPeftModelForCausalLM.from_pretrained(sft, dtype=torch.float32)
    items = done.items[(done.items.role == 'student')]
    test = make_rows([json.loads(x) for x in (Path(world.data)/'test.jsonl').read_text().splitlines()], 'preferences')
    rows = {r.id: r for r in encode_rows(load_tokenizer(world.strong), test, PAIR, 256).rows}
    ids = list(items[items.metric == 'accuracy'].id)
    assert set(ids) <= rows.keys()
    ours, theirs = (score(m, [rows[i] for i in ids], quiet=True) for m in (student, reference))
    kept = {m: items[items.metric == m].set_index('id').value.loc[ids].to_numpy() for m in ('accuracy', 'logp_chosen', 'margin')}
    assert np.allclose(kept['logp_chosen'], ours[:, 0], atol=1e-4)
    margin = .1*((ours - theirs)[:, 0] - (ours - theirs)[:, 1])
    assert np.allclose(kept['margin'], margin, atol=1e-4) and ((kept['accuracy'] == 1) == (margin > 0)).all()


def test_pitfall_11_beta_and_learning_rate_do_not_cost_a_reference(world, tmp_path, monkeypatch):
    "Another beta and another DPO learning rate reuse every SFT reference and score only what is new"
    folder = tmp_path/'run'
    run(world, folder, quiet=True)
    def kept(): return {p.parent.name: json.loads(p.read_text())['adapter'] for p in (folder/'store').glob('*/key.json')}
    before = kept()
    run(replace(world, beta=.2, dpo=replace(world.dpo, learning_rate=1e-3)), folder, quiet=True)
    new = {k: v for k, v in kept().items() if k not in before}
    old_sft = {v for v in before.values()}
    assert new and before.items() <= kept().items()
    fresh = {v for v in new.values()} & old_sft
    stages = {p.parent.name.rsplit('-', 1)[0]: p for p in (folder/'stages').glob('*-seed0-sft-*/inputs.json')}
    assert {k for k in stages} == {f'{a}-seed0-sft' for a in ('weak', 'student', 'human', 'ceiling')}
    weak_sft = adapter_hash(stages['weak-seed0-sft'].parent/'adapter')
    assert weak_sft not in fresh # the floor's reference on its own rows, on the student's pairs and on the test rows: all kept


# --- 17: seeds and keys

class Recorder:
    "Stands in for `run_stage`: gives every stage made-up outputs that are a function of its inputs, at no cost"
    def __init__(self): self.stages = {}

    def __call__(self, run, name, inputs, work, sketch=None):
        inputs = {k: v() if callable(v) else v for k, v in inputs.items()}
        folder = stage_folder(run, name, inputs)
        self.stages[name] = folder.name
        (folder/'adapter').mkdir(parents=True, exist_ok=True)
        seen = {k: v for k, v in inputs.items()} | {'kind': name.rsplit('-', 1)[-1]}
        save_file({'w': torch.tensor([hash_of(seen)])}, folder/'adapter'/'adapter_model.safetensors')
        (folder/'adapter'/'adapter_config.json').write_text('{"base_model_name_or_path": "x"}', encoding='utf-8')
        (folder/'texts.json').write_text('[]', encoding='utf-8') # responses: nobody reads them
        if name.endswith(('-labels', '-held-out', '-test')): # the stage's own files, but of random rewards
            rng = np.random.default_rng(hash_of(inputs))
            with pytest.MonkeyPatch.context() as m:
                m.setattr(arms, 'pair_rewards', lambda study, model, policy, reference, tokens, label: rng.normal(size=(2, len(tokens), 2)))
                self.rng = rng
                work(folder)
        return folder

    def rewards(self, pairs, **others): return self.rng.normal(size=(len(pairs), 2)) # of any supervisor


def hash_of(inputs): return int(hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:8], 16)


def nothing(*a): return pd.DataFrame()


def stage_keys(config, root, monkeypatch):
    "Name -> folder of every stage of this configuration; nothing is trained, nothing is written"
    recorder, study = Recorder(), Study(config, Run(root, lambda line: None), True)
    weak, strong = know_models(config)
    data = load_preferences(
        config.data, [m.reader for m in (*weak, strong)], config.n_test, config.strict, config.n_labelled, config.n_unlabelled
    )
    with monkeypatch.context() as m:
        for module in (learn, score_page, answer_page): m.setattr(module, 'run_stage', recorder)
        for kind in ('dpo', 'reward', 'judge'): m.setitem(LABELLERS.found, kind, replace(LABELLERS[kind], function=recorder.rewards))
        m.setattr(arms, 'response_rows', nothing)
        m.setattr(arms, 'gold_judge', lambda config, root: 'nobody' if config.samples else None)
        m.setattr(supervisors, 'fit_temperature', lambda margins, prob_a: 1 + abs(margins).mean())
        weak_teacher.make_arms(study, weak, strong, data)
    return recorder.stages


def one(arm): return {f'{arm}-seed0-test', f'{arm}-seed0-responses'}


UNTUNED = {'base-untuned-seed0-test'}
SFT_HUMAN = {'human-seed0-sft', *one('base-sft-human')}
HUMAN = {'human-seed0-dpo', *one('human-dpo-human')}
CEILING = {'ceiling-seed0-dpo', *one('ceiling-dpo-gold')}
SFT_WEAK = {'student-seed0-sft', *one('base-sft-weak')}
STUDENT = {'student-seed0-dpo', *one('student-dpo-weak')}
FLOOR = {'weak-seed0-dpo', *one('floor-dpo-human')}
TAUGHT = SFT_WEAK | STUDENT # what the labels reach
EVERY = {'weak-seed0-sft', 'weak-seed0-labels', 'ceiling-seed0-sft', *UNTUNED, *SFT_HUMAN, *HUMAN, *CEILING, *TAUGHT, *FLOOR}
TRAINED = EVERY - UNTUNED
BEFORE = {'weak-seed0-sft', 'ceiling-seed0-sft', *SFT_HUMAN} # what comes before any preference training
RESPONSES = {k for k in EVERY if k.endswith('-responses')}
TESTED = {k for k in EVERY if k.endswith('-test')} | RESPONSES
SOFT = {'labels': LabelUse(targets='soft')}
MIXED = {'human_share': (.5,)}


def mix(choice): return {'mixed-seed0-sft', 'mixed-seed0-dpo', *one(f'mixed-dpo-weak,-50%-human,-{choice}')}


def member(k): return {f'weak-seed{1000*k}-{part}' for part in ('sft', 'dpo', 'labels')}


def more_stages(config):
    "What these settings ask for, next to EVERY"
    more = {'weak-seed0-held-out'} if config.labels.calibrate else set()
    if not config.human_share: return more
    if 'disagree' in config.human_choice: more |= member(1) | member(2)
    return more.union(*map(mix, config.human_choice))


CHANGES = { # field: (another value, the stages that are not found any more[, what else is set before and after])
    'WeakTeacher.n_labelled': (12, {'weak-seed0-sft', 'weak-seed0-labels', *FLOOR, *TAUGHT}),
    'WeakTeacher.n_unlabelled': (12, TRAINED - {'weak-seed0-sft', *FLOOR}),
    'WeakTeacher.n_test': (7, TESTED),
    'WeakTeacher.seeds': (2, set()),
    'WeakTeacher.max_length': (30, EVERY),
    'WeakTeacher.beta': (0.2, EVERY - BEFORE | {'base-sft-human-seed0-test'}),
    'WeakTeacher.strict': (False, set()),
    'WeakTeacher.supervisor': ('reward', {'weak-seed0-sft', 'weak-seed0-labels', *FLOOR, *TAUGHT}),
    'WeakTeacher.loss': ('ipo', STUDENT | HUMAN | CEILING),
    'WeakTeacher.smoothing': (0.2, STUDENT | HUMAN | CEILING, {'loss': 'cdpo'}),
    'WeakTeacher.start': ('base', STUDENT | HUMAN | CEILING | SFT_WEAK | {'ceiling-seed0-sft'}),
    'WeakTeacher.others': (('ceiling',), HUMAN), # the SFT of human answers stays: win rates are against it
    'WeakTeacher.samples': (2, RESPONSES),
    'WeakTeacher.temperature': (1.0, RESPONSES),
    'WeakTeacher.response_tokens': (5, RESPONSES),
    'WeakTeacher.twin': (True, set()), # one training more
    'WeakTeacher.human_share': ((.5,), set()),
    'WeakTeacher.human_choice': (('uncertain',), mix('random'), MIXED),
    'WeakTeacher.ensemble': (2, mix('disagree') | member(2), MIXED | {'human_choice': ('disagree',)}),
    'WeakTeacher.price_human': (2., set(), MIXED),
    'WeakTeacher.price_weak': (.1, set(), MIXED),
    'WeakTeacher.target': ('pgr=0.5', set(), MIXED),
    'WeakTeacher.gold': ('b', set()),
    'WeakTeacher.gold_quantize': ('nf4', set()), # scores are kept by its name and bits, beside the stages
    'LoadSettings.packing': ('off', set()),
    'LoadSettings.merging': ('off', set()), # speed, and the last bits of a sum
    'LoadSettings.refill': ('off', set()), # speed of generation
    'LoadSettings.shard': ('on', set()), # where the work is done
    'LoadSettings.device': ('cpu', set()),
    'LoadSettings.compute': ('plain', set()), # on a CPU; on a GPU: test_a_stage_knows_where_its_model_computes
    'LabelUse.subset': ('match', TAUGHT),
    'LabelUse.targets': ('soft', STUDENT),
    'LabelUse.weights': ('confidence', STUDENT),
    'LabelUse.keep': (0.5, TAUGHT),
    'LabelUse.calibrate': (0.6, {'weak-seed0-sft', 'weak-seed0-labels', *FLOOR, *TAUGHT}, SOFT),
    'LoadSettings.quantize': ('nf4', EVERY),
    'LoadSettings.dtype': ('bfloat16', EVERY),
    'LoadSettings.trust_remote_code': (True, set()),
    'LoadSettings.allow_pickle': (True, set()),
    'LoadSettings.nf4_share': (0.5, set()),
    'LoraSettings.rank': (4, TRAINED),
    'LoraSettings.alpha': (8, TRAINED),
    'LoraSettings.dropout': (0.1, TRAINED),
    'LoraSettings.targets': (('q_proj',), TRAINED),
    'TrainSettings.epochs': (2, TRAINED),
    'TrainSettings.batch_size': (4, TRAINED),
    'TrainSettings.learning_rate': (1e-4, TRAINED),
    'TrainSettings.schedule': ('linear', TRAINED),
    'TrainSettings.warmup': (0.3, TRAINED),
    'TrainSettings.weight_decay': (0.1, TRAINED),
    'TrainSettings.max_grad_norm': (0.5, TRAINED),
    'TrainSettings.optimizer': ('paged_adamw_8bit', TRAINED),
    'TrainSettings.token_budget': (99, set()),
    'TrainSettings.gradient_checkpointing': (True, set()),
    'TrainSettings.checkpoint_every': (7, set()),
}
MORE = [ # other values, where one does not tell the whole
    ('WeakTeacher.supervisor', 'judge', {'weak-seed0-sft', 'weak-seed0-labels', *FLOOR, *TAUGHT}),
    ('WeakTeacher.loss', 'cdpo', STUDENT | HUMAN | CEILING),
    ('WeakTeacher.loss', 'rdpo', STUDENT | HUMAN | CEILING),
    ('WeakTeacher.smoothing', 0.1, set(), {'loss': 'rdpo'}), # it is what None means
    ('WeakTeacher.others', (), HUMAN | CEILING | {'ceiling-seed0-sft'}),
    ('LabelUse.weights', 'clipped', STUDENT, {'labels': LabelUse(weights='confidence')}),
    *(('LabelUse.subset', which, TAUGHT) for which in ('mismatch', 'random', 'random match', 'random mismatch')),
    ('LabelUse.targets', 'soft', STUDENT, {'labels': LabelUse(weights='confidence')}),
    ('LabelUse.targets', 'soft', STUDENT, {'loss': 'ipo'}),
]
PATHS = {'WeakTeacher.data', 'WeakTeacher.weak', 'WeakTeacher.strong', 'WeakTeacher.imports', 'WeakTeacher.also_test'} # by content, below
# for folders, for rows that are texts, and without vLLM; what they change: test_hub, test_chat_rows, test_vllm_engine
REFUSED = {'LoadSettings.revision', 'LoadSettings.chat_template', 'LoadSettings.engine'}
READING = {'WeakTeacher.column', 'WeakTeacher.leave_out', 'WeakTeacher.split'} # of a file; what is read counts, by content
TABLES = {'WeakTeacher.load', 'WeakTeacher.lora', 'WeakTeacher.sft', 'WeakTeacher.dpo', 'WeakTeacher.labels'}
WHERE = {'WeakTeacher.machines'} # the work is done, and not what it is: tests/test_parallel.py compares the bits
PLACES = {'WeakTeacher': '', 'LabelUse': 'labels', 'LoadSettings': 'load', 'LoraSettings': 'lora'} # class -> setting that holds it


def test_pitfall_17_every_field_is_in_the_table():
    "A new setting fails here until somebody says whether it matters"
    fields = {
        f'{c.__name__}.{f.name}' for c in (WeakTeacher, LabelUse, LoadSettings, LoraSettings, TrainSettings) for f in dataclasses.fields(c)
    }
    assert fields == CHANGES.keys() | PATHS | READING | REFUSED | TABLES | WHERE


@pytest.fixture(scope='module')
def asked(world):
    "The experiment with responses; nobody is there to judge them"
    return replace(world, samples=1, gold='a')


@pytest.fixture(scope='module')
def plain_keys(asked, tmp_path_factory):
    "Stages of the experiment with some settings"
    known = {}
    def keys(before):
        if str(before) not in known:
            with pytest.MonkeyPatch.context() as m:
                known[str(before)] = stage_keys(replace(asked, **before), tmp_path_factory.mktemp('plain'), m)
        return known[str(before)]
    return keys


def changed_keys(plain, config, root, monkeypatch):
    "The stages that are not found any more: their key is another one, or nobody asks for them"
    now = set(stage_keys(config, root, monkeypatch).values())
    return {k for k, folder in plain.items() if folder not in now}


CASES = [(f, 'sft' if f.startswith('Train') else '', *v) for f, v in CHANGES.items()] + [(f, '', *v) for f, *v in MORE]
CASES += [(f, 'dpo', value, stages - BEFORE) for f, (value, stages, *_) in CHANGES.items() if f.startswith('Train')]


def named(case): return f'{case[0]}-{case[1]}-{case[2]}'


@pytest.mark.cases(26)
@pytest.mark.parametrize('case', CASES, ids=named)
def test_pitfall_17_a_key_changes_if_and_only_if_the_setting_matters(asked, plain_keys, tmp_path, monkeypatch, case):
    (cls, name), part, value, declared, before = case[0].split('.'), case[1], case[2], case[3], case[4] if len(case) > 4 else {}
    plain, old = plain_keys(before), replace(asked, **before)
    place = part or PLACES[cls]
    config = replace(old, **{place: replace(getattr(old, place), **{name: value})} if place else {name: value})
    assert config != old or name == 'strict' # True would stop the run or change nothing; see test_pitfall_08
    assert {k.replace(f'-{old.loss}', '-dpo') for k in plain} == EVERY | more_stages(old)
    changed = {k.replace(f'-{old.loss}', '-dpo') for k in changed_keys(plain, config, tmp_path, monkeypatch)}
    assert changed == declared


def test_pitfall_17_a_temperature_reaches_the_student_alone(asked, tmp_path, monkeypatch):
    "The same labels, another temperature: other targets and weights, the same order"
    def keys(t):
        with monkeypatch.context() as m:
            m.setattr(supervisors, '_temperature', lambda *a: t)
            return stage_keys(replace(asked, labels=LabelUse(targets='soft', calibrate=.6)), tmp_path/str(t), monkeypatch)
    cold, hot = keys(.5), keys(2.)
    assert 'weak-seed0-held-out' in cold and {k for k in cold if cold[k] != hot[k]} == STUDENT


@pytest.mark.parametrize('kind, trained', [('dpo', {'sft', 'dpo'}), ('reward', {'reward'}), ('judge', set())])
def test_pitfall_17_a_second_supervisor_leaves_the_first_alone(asked, texts, tmp_path, monkeypatch, kind, trained):
    "An ensemble: trainings and labels of each one are found again, what the students are taught is new"
    tiny_model(tmp_path/'weak2', texts, layers=1, seed=77)
    single = stage_keys(replace(asked, supervisor=kind), tmp_path/'a', monkeypatch)
    stage_keys(replace(asked, supervisor=kind, weak=f'{asked.weak}+{tmp_path/"weak2"}'), tmp_path/'b', monkeypatch)
    there = {p.name for p in (tmp_path/'b'/'stages').iterdir()}
    assert {k for k in single if single[k] not in there} == TAUGHT | (one('floor-dpo-human') if kind == 'dpo' else set())
    for part in ('sft', 'dpo', 'reward'): assert len([n for n in there if n.startswith(f'weak-seed0-{part}-')]) == 2*(part in trained)
    assert len([n for n in there if n.startswith('weak-seed0-labels-')]) == 2


def test_pitfall_17_how_a_judge_is_asked_is_in_the_key(asked, tmp_path, monkeypatch):
    "Rows of the world are judged in another form than the same rows from a file"
    weak, pairs, keys = know_model('weak', asked.weak, asked), to_pairs(make_rows(sample_preferences(4), 'preferences')), []
    for source in ('world', asked.data):
        recorder, study = Recorder(), Study(replace(asked, data=source, supervisor='judge'), Run(tmp_path, lambda line: None), True)
        with monkeypatch.context() as m:
            m.setattr(score_page, 'run_stage', recorder)
            supervisors.ask(study, supervisors.supervisor_arm(weak, 'judge', 0), pairs, 'labels')
        keys += recorder.stages.values()
    assert keys[0] != keys[1]


def test_pitfall_17_content_counts_and_not_its_place(asked, plain_keys, tmp_path, monkeypatch, texts):
    "The same rows and models in other folders: no key changes. Other rows or weights: the keys that they reach"
    plain = plain_keys({})
    for name in ('data', 'weak', 'strong'): shutil.copytree(getattr(asked, name), tmp_path/f'copy-{name}')
    moved = replace(asked, **{n: str(tmp_path/f'copy-{n}') for n in ('data', 'weak', 'strong')})
    assert changed_keys(plain, moved, tmp_path/'a', monkeypatch) == set()
    other = with_rows(asked, tmp_path/'rows', train_gt=lambda r: r | dict(chosen=r['chosen'] + ' Yes.'))
    assert changed_keys(plain, other, tmp_path/'b', monkeypatch) == set(plain) - {
        k for k in plain if k.startswith(('human', 'ceiling', 'base-untuned', 'base-sft-human'))}
    tiny_model(tmp_path/'strong2', texts, layers=2, seed=77)
    reseeded = replace(asked, strong=str(tmp_path/'strong2'))
    assert changed_keys(plain, reseeded, tmp_path/'c', monkeypatch) == {k for k in plain if not k.startswith(('weak', 'floor'))}
    tiny_model(tmp_path/'weak2', texts, layers=1, seed=77)
    weak = changed_keys(plain, replace(asked, weak=str(tmp_path/'weak2')), tmp_path/'d', monkeypatch)
    assert weak == {k for k in plain if not k.startswith(('human', 'ceiling', 'base-untuned', 'base-sft-human'))}


@pytest.mark.parametrize(
    'columns, leave_out, same',
    [
        ((), (), True),
        ((), ('id',), True),
        (('prompt=prompt', 'chosen=chosen', 'rejected=rejected'), (), True),
        (('prompt=prompt', 'chosen=rejected', 'rejected=chosen'), (), False),
    ],
)
def test_pitfall_17_what_is_read_counts_and_not_how_it_was_named(world, tmp_path, columns, leave_out, same):
    "Rows of a file are in the keys by content; names of columns are not"
    path = tmp_path/'pairs.jsonl'
    path.write_text(
        ''.join(json.dumps(dict(id=i, prompt=f'Is {i} even?', chosen=f'Yes, {i}.', rejected=f'No, {i}.')) + '\n' for i in range(40))
    )
    readers = [know_model('weak', world.weak, world).reader]
    plain, other = (load_preferences(str(path), readers, columns=c, leave_out=o) for c, o in (((), ()), (columns, leave_out)))
    rows = [d.with_format(None)[:] for d in (plain.test, other.test)]
    assert (rows[0] == rows[1]) == same


def test_pitfall_17_seeds_are_in_the_keys(asked, tmp_path, monkeypatch):
    "Two seeds share no trained stage"
    keys = stage_keys(replace(asked, seeds=2), tmp_path, monkeypatch)
    one = {k.replace('seed0', ''): v.rsplit('-', 1)[1] for k, v in keys.items() if 'seed0' in k}
    two = {k.replace('seed1', ''): v.rsplit('-', 1)[1] for k, v in keys.items() if 'seed1' in k}
    assert one.keys() == two.keys() and all(one[k] != two[k] for k in one)


def test_pitfall_17_the_seed_itself_is_in_the_key(world, tmp_path, monkeypatch):
    "The same rows in the same order, trained with another seed: another adapter, another key"
    recorder, model = Recorder(), know_model('weak', world.weak, world)
    monkeypatch.setattr(learn, 'run_stage', recorder)
    rows = load_preferences(world.data, [model.reader], world.n_test).train['train_gt']
    study = Study(world, Run(tmp_path, lambda line: None), True)
    keys = {preference_stages.sft_stage(study, model, 'same', rows, seed).parent.name for seed in (0, 1, 0)}
    assert len(keys) == 2


def test_pitfall_17_names_that_abbreviate_alike_do_not_collide(tmp_path):
    "`loss` and `lr`, a value that moves from one to the other, an empty list and none"
    inputs = [
        dict(loss=1, lr=2),
        dict(loss=2, lr=1),
        dict(l=1),
        dict(loss=[]),
        dict(loss=None),
        dict(loss={}),
        dict(loss='1'),
        dict(loss=1),
        dict(loss=1.5),
        dict(loss=True),
    ]
    assert len({stage_folder(Run(tmp_path), 's', i).name for i in inputs}) == len(inputs)
    assert stage_folder(Run(tmp_path), 's', dict(a=1, b=2)) == stage_folder(Run(tmp_path), 's', dict(b=2, a=1))


AGAIN = '''
import sys, json, hashlib, warnings
import numpy as np
from pathlib import Path
from w2s.compare.config import from_table
from w2s.compare.preference_settings import WeakTeacher
from w2s.experiments.preferences import run
result = run(from_table(WeakTeacher, json.loads(sys.argv[1])), sys.argv[2], quiet=True)
sha = lambda b: hashlib.sha256(b).hexdigest()[:16]
out = {f'{k.partition("-")[0]}-{k.rpartition("-")[2]}': sha((Path(v)/'adapter_model.safetensors').read_bytes()) \
for k, v in sorted(result.adapters.items())}
out['labels'] = sha(next(Path(sys.argv[2]).glob('stages/*-labels-*/rewards.npy')).read_bytes())
out['items'] = sha(result.items.to_csv(index=False).encode())
print(json.dumps(out))
'''


@pytest.mark.long
def test_pitfall_17_same_seed_same_bits_in_two_processes(world, done, tmp_path):
    from w2s.compare.config import to_table
    table = json.dumps(to_table(replace(world, seeds=2)))
    first = json.loads(new_process(AGAIN, table, tmp_path/'a', seed='1'))
    torch.rand(3) # this process has another past
    here = adapters(done) | {'labels': sha(next((done.folder/'stages').glob('*-labels-*/rewards.npy')))}
    assert len([k for k in here if k.endswith('seed0')]) == 4
    seed0 = {k: v for k, v in first.items() if k.endswith('seed0')}
    assert seed0 == {k: v for k, v in here.items() if k.endswith('seed0')}
    assert all(first[k] != first[k.replace('seed0', 'seed1')] for k in seed0)
    assert sorted(p.parent.name for p in (tmp_path / 'a' / 'stages').glob('*seed0-labels*/rewards.npy'))[0] in {
        p.name for p in (done.folder / 'stages').iterdir()
    }


# --- 18: leakage

def turned(r): return r | dict(chosen=r['rejected'], rejected=r['chosen'], gold=1 - r['gold'])


def test_pitfall_18_human_and_gold_numbers_of_the_students_rows_are_not_read(world, done, tmp_path):
    """Every human and gold probability of train_w2s replaced: the weak supervisor and the student are the same to the bit, the human arm is
    not"""
    doubted = with_rows(
        world,
        tmp_path / 'data',
        train_w2s=lambda r: r | dict(prob=0.05, weight=1.0, gold=0.5),
        train_gt=lambda r: r | dict(prob=1.0, weight=1.0),
        test=lambda r: r | dict(prob=1.0, weight=1.0),
    )
    a, b = adapters(done), adapters(run(doubted, tmp_path/'out', quiet=True))
    assert [k for k in a if a[k] == b[k]] == ['floor-seed0', 'student-seed0']


def test_pitfall_18_student_does_not_see_human_labels(world, done, tmp_path):
    "chosen and rejected of train_w2s change places: the student of weak labels is the same to the bit"
    a, b = adapters(done), adapters(run(with_rows(world, tmp_path/'data', train_w2s=turned), tmp_path/'out', quiet=True))
    assert a['floor-seed0'] == b['floor-seed0'] and a['human-seed0'] != b['human-seed0']
    assert a['student-seed0'] == b['student-seed0']


def test_pitfall_18_the_sides_of_a_pair_do_not_know_the_label():
    "Ties go to b: if b were where the human's choice is, a labeller who knows nothing would be right"
    rows = sample_preferences(40)
    a, b = (to_pairs(make_rows(r, 'preferences'), seed=1) for r in (rows, [turned(r) for r in rows]))
    for c in ('id', 'response_a', 'response_b'): assert list(a[c]) == list(b[c])
    assert np.allclose(a['prob_a'], 1 - np.array(b['prob_a'])) and list(a['gold_a']) == list(b['gold_a']) # the truth does not turn
    assert .2 < np.mean(np.array(a['prob_a']) > .5) < .8
    assert list(label_pairs(a, np.zeros((40, 2)), 'tie').rows['chosen']) == list(label_pairs(b, np.zeros((40, 2)), 'tie').rows['chosen'])


@pytest.mark.parametrize(
    'use', [LabelUse(targets='soft'), LabelUse('all', 'soft', 'sigmoid', 0.5, 0.6), LabelUse('match'), LabelUse('random')], ids=str
)
def test_pitfall_18_only_subsets_read_human_labels_of_the_students_rows(asked, tmp_path, monkeypatch, use):
    """chosen and rejected of train_w2s change places: however weak labels are used, what the student is taught is the same; subsets and
    random errors are about them"""
    other = with_rows(asked, tmp_path/'rows', train_w2s=turned)
    a, b = (stage_keys(replace(c, labels=use), tmp_path/str(n), monkeypatch) for n, c in enumerate((asked, other)))
    changed = {k for k in a if a[k] != b[k]}
    assert changed & (TAUGHT | FLOOR | {'weak-seed0-sft', 'weak-seed0-labels'}) == (set() if use.subset == 'all' else TAUGHT)


def test_pitfall_18_test_rows_reach_nothing_but_the_evaluation(world, done, tmp_path):
    "Other responses and other labels in the test file: every adapter is the same to the bit, the scores are not"
    other = run(
        with_rows(world, tmp_path / 'data', test=lambda r: turned(r) | dict(rejected=r['chosen'] + ' Really.')),
        tmp_path / 'out',
        quiet=True,
    )
    assert adapters(other) == adapters(done)
    assert not np.allclose(other.table.value.to_numpy(), done.table.value.to_numpy())


def test_pitfall_18_all_roles_answer_for_the_same_rows(world, done):
    "Ids of test items equal for all roles and metrics that a role has; ceiling, human and student on the same pairs"
    ids = {tuple(sorted(g.id)) for _, g in done.items.groupby(['role', 'method', 'metric', 'seed'])}
    assert (
        len(ids) == 1 and len(set(next(iter(ids)))) == 10 and {'floor', 'student', 'human', 'ceiling', 'baseline'} == set(done.items.role)
    )
    source = {
        json.loads(x)['prompt']: n
        for n in ('train_gt', 'train_w2s', 'test')
        for x in (Path(world.data) / f'{n}.jsonl').read_text().splitlines()
    }
    weak, strong = (know_model(r, n, world) for r, n in (('weak', world.weak), ('strong', world.strong)))
    data = load_preferences(world.data, [weak.reader, strong.reader], world.n_test)
    for seed in (0, 1):
        labelled, unlabelled = halves(data.train, world.n_labelled, world.n_unlabelled, seed)
        _, best = arms.ceiling_rows(labelled, unlabelled, seed)
        assert {source[p] for p in labelled['prompt']} == {'train_gt'} and {source[p] for p in unlabelled['prompt']} == {'train_w2s'}
        assert sorted(best['id']) == sorted(unlabelled['id'])
        assert sorted(given_labels(to_pairs(unlabelled, seed)).rows['id']) == sorted(unlabelled['id'])
    assert {source[p] for p in data.test['prompt']} == {'test'}


def test_pitfall_18_no_group_is_in_two_halves_of_one_file(world, tmp_path):
    "One file, prompts that differ in case and white space: labelled, unlabelled and test rows share no group, for any seed"
    rows = [
        r | dict(prompt=p) for r in sample_preferences(40) for p in (r['prompt'], r['prompt'].upper() + ' ', r['prompt'].replace(' ', '  '))
    ]
    rows = [r | dict(chosen=f'{r["chosen"]} {i}') for i, r in enumerate(rows)]
    (tmp_path/'all.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    reader = Reader('weak', load_tokenizer(world.weak), 256)
    data = load_preferences(str(tmp_path/'all.jsonl'), [reader])
    for seed in range(5):
        a, b = halves(data.train, 30, 30, seed)
        groups = [set(x['group']) for x in (a, b, data.test)]
        assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2]) and all(groups)


def test_pitfall_18_the_run_stage_of_a_label_does_not_know_the_answer(done):
    "What the labelling stage depends on, word by word: nothing of the human labels"
    inputs = json.loads(next((done.folder/'stages').glob('*-labels-*/inputs.json')).read_text())
    assert inputs.keys() == {'policy', 'reference', 'base', 'quantize', 'dtype', 'device', 'rows', 'beta'}
