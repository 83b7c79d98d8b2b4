"Sampling responses: what is too long for the page. Each test was seen to fail on the mutation that its comment names"
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from w2s.data.samples import sample_preferences
from w2s.errors import ConfigError, DataError, ModelError
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base, load_tokenizer
from w2s.models.tiny import pretrain, tiny_model, tiny_tokenizer
from w2s.models.zoo import model_folder
from w2s.train import generate as page
from w2s.train import sampling
from w2s.train.batches import block
from w2s.train.endings import cut_at, end_ids, response_text
from w2s.train.generate import GenerateSettings, generate, generate_inputs, prompt_ids, respond, write
from w2s.train.journal import open_journal, read_line
from w2s.train.logprobs import response_logps
from w2s.train.sampling import ban_repeats, draws, likeliest, nucleus, pick
from w2s.train.tokens import Encoded, encode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT/'benchmarks'))
WEIGHTS = ROOT.parent/'shared'/'weights'
FULL, NF4, NF4_16 = LoadSettings('none', 'float32'), LoadSettings('nf4', 'float32'), LoadSettings()
GREEDY = GenerateSettings(max_tokens=20, temperature=0)
YE = GenerateSettings(max_tokens=14, temperature=.7, top_p=.95, top_k=50, no_repeat_ngram=2)   # Ye et al. 2410.12621, but for the length


@pytest.fixture(scope='module')
def texts(): return [r['prompt'] + r['chosen'] for r in sample_preferences(200, seed=1)]


@pytest.fixture(scope='module')
def folder(tmp_path_factory, texts):
    "A tiny model that answers in sentences"
    out = tiny_model(tmp_path_factory.mktemp('tiny')/'model', texts, layers=2)
    pretrain(out, texts, steps=120)
    return out


@pytest.fixture(scope='module')
def prompts(): return list(dict.fromkeys(r['prompt'] for r in sample_preferences(50, seed=2)))[:24]


@pytest.fixture
def base(folder): return load_base(folder, FULL, device='cpu')


def texts_of(base, prompts, settings, model=None, **more):
    return generate(model or base.model, base.tokenizer, prompts, settings, quiet=True, **more)


# --- pitfall 6: padding, for every family that training supports

def letters(end):
    "A tokenizer of 120 words whose end token has this id"
    words = {f'w{i}': i for i in range(120) if i != end}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({**words, '</s>': end}, unk_token='w119')), eos_token='</s>')


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
    return model


@pytest.mark.cases(8)
@pytest.mark.parametrize('again', [0, 2], ids=['', 'no pair twice'])
@pytest.mark.parametrize('name', ['llama', 'gpt2', 'opt', 'gpt_neox', 'qwen2', 'gemma2', 'mistral'])
def test_pitfall_06_a_padded_row_says_what_it_says_alone(name, again):
    """Greedy ids = those of transformers' generate, row by row; rows end at different steps. Mutations: no positions; a mask of ones; the
    end ignored in `advance`; `state.text` not selected there"""
    model, rng = family(name), np.random.default_rng(0)
    prompts, expected = [rng.integers(1, 119, n).tolist() for n in (3, 17, 9, 30, 1, 12, 5, 22)], []
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    for p in prompts:
        x = torch.tensor([p])
        expected.append(model.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=24, pad_token_id=0,
                                       no_repeat_ngram_size=again)[0, len(p):].tolist())
    end = expected[0][3] # a token that some rows come to early becomes the end token
    expected = [e[:e.index(end) + 1] if end in e else e for e in expected]
    with torch.no_grad():
        made = write(
            model,
            letters(end),
            prompts,
            torch.zeros(len(prompts), 24, dtype=torch.float64),
            replace(GREEDY, max_tokens=24, no_repeat_ngram=again),
        )
    assert [r.tokens for r in made] == [len(e) for e in expected] and [r.ended for r in made] == [e[-1] == end for e in expected]
    assert [r.text.split() for r in made] == [[f'w{i}' for i in e if i != end] for e in expected]
    assert len({tuple(e) for e in expected}) >= 6 and len({len(e) for e in expected}) > 1


@pytest.mark.cases(2)
@pytest.mark.parametrize('load', [FULL, NF4, NF4_16, LoadSettings('none')], ids=['fp32', 'nf4 fp32', 'nf4 bf16', 'bf16'])
@pytest.mark.parametrize(
    'settings',
    [
        replace(GREEDY, max_tokens=14),
        GenerateSettings(max_tokens=14, temperature=1),
        GenerateSettings(max_tokens=10, temperature=1.2, top_p=0.9, samples=3),
        replace(YE, temperature=1.2, top_k=8, samples=2),
    ],
    ids=['greedy', 'sampled', 'three samples', 'as Ye et al.'],
)
def test_batches_of_1_4_16_and_all_say_the_same(folder, prompts, load, settings):
    "On a CPU, to the letter. Mutations: draws in the order of the batch; rows padded to the longest of the batch"
    base = load_base(folder, load, device='cpu')
    alone = texts_of(base, prompts, replace(settings, token_budget=1))
    assert len({t for row in alone for t in row}) >= 3
    for rows in (4, 16, 1000):
        assert texts_of(base, prompts, replace(settings, token_budget=80*settings.samples*rows)) == alone


def test_a_row_keeps_its_text_when_rows_come_and_go(folder, prompts):
    "16 bits; other rows longer, fewer, in another order"
    base, s = load_base(folder, NF4_16, device='cpu'), GenerateSettings(max_tokens=14, temperature=1)
    long = [p.replace('Question:', 'Question: Please think about it for a long while:') for p in prompts]
    assert max(map(len, prompt_ids(base.tokenizer, long))) > 8 + max(map(len, prompt_ids(base.tokenizer, prompts)))
    for how in (s, YE):
        whole = texts_of(base, prompts, how)
        assert texts_of(base, prompts + long, how)[:len(prompts)] == whole == texts_of(base, prompts[::-1], how)[::-1]
        assert texts_of(base, prompts[::3], how) == whole[::3]


def test_greedy_is_that_of_transformers_with_an_adapter(base, prompts):
    model = add_adapter(base, LoraSettings(rank=4, dropout=.5))
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad: p.data += .05*torch.randn_like(p)
    ours = texts_of(base, prompts[:16], GREEDY, model) # dropout of .5 must not act. Mutation: no set_mode
    expected = []
    for p in prompts[:16]:
        x = base.tokenizer(p, return_tensors='pt', return_token_type_ids=False)
        out = model.generate(**x, do_sample=False, max_new_tokens=20, pad_token_id=0)
        expected.append([base.tokenizer.decode(out[0, x.input_ids.shape[1]:], skip_special_tokens=True)])
    assert ours == expected
    model.unload()
    assert ours != texts_of(base, prompts[:16], GREEDY)


# --- seeds: pitfall 17

CODE = '''
import sys
from w2s.models.load import LoadSettings, load_base
from w2s.train.generate import GenerateSettings, generate
base = load_base(sys.argv[1], LoadSettings('none', 'float32'), device='cpu')
import hashlib, random, torch
torch.manual_seed(random.randrange(10**6))
out = generate(base.model, base.tokenizer, ['Question: What do bees make?\\nAnswer:', 'Answer:'], \
GenerateSettings(max_tokens=20, samples=4), quiet=True)
print(hashlib.sha256(repr(out).encode()).hexdigest())
'''


def test_pitfall_17_two_processes_say_the_same(folder):
    "Mutation: hash() for the seed of a row"
    def run(seed):
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'PYTHONHASHSEED': seed, 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
        done = subprocess.run([sys.executable, '-W', 'ignore', '-c', CODE, str(folder)], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout.split()[-1]
    assert run('1') == run('2')


def test_pitfall_17_seed_row_sample_and_arm_act(base, prompts):
    s = GenerateSettings(max_tokens=20, temperature=1.2)
    one = texts_of(base, prompts, s)
    assert one == texts_of(base, prompts, s)
    for other in (dict(seed=1), dict(arm='student'), dict(ids=[f'row {i}' for i in range(len(prompts))])):
        assert np.mean([a != b for a, b in zip(one, texts_of(base, prompts, s, **other), strict=True)]) > 0.5
    many = texts_of(base, prompts, replace(s, samples=3))
    assert [r[:1] for r in many] == one                             # more samples do not change the first
    assert np.mean([len(set(r)) > 1 for r in many]) > .5            # and differ from it
    longer = texts_of(base, prompts, replace(s, max_tokens=40))     # nor do more tokens
    assert all(b.startswith(a.rstrip('\ufffd')) for (a,), (b,) in zip(one, longer, strict=True)) # a letter may have been cut in two


def test_draws_are_uniform_and_unrelated():
    x = np.stack([draws(s, f'row {i}', k, 8) for s in range(5) for i in range(200) for k in range(5)])
    assert x.min() >= 0 and x.max() < 1
    counts = np.histogram(x, 50, (0, 1))[0]
    assert ((counts - counts.mean())**2 / counts.mean()).sum() < 85.4   # chi-square, 49 degrees of freedom, p = .001
    c = np.corrcoef(x.T)
    assert abs(c[~np.eye(8, dtype=bool)]).max() < .06
    assert len(np.unique(x)) > .99*x.size
    assert (draws(0, 'a"b', 0, 4) != draws(0, 'a\\"b', 0, 4)).all() and (draws(1, '2', 3, 4) != draws(12, '', 3, 4)).all()
    assert draws(0, '\ud800 half a letter', 0, 2).shape == (2,)


def test_rows_of_one_prompt_are_computed_once_unless_they_have_names(base, prompts):
    read = []
    hook = base.model.get_decoder().register_forward_pre_hook(lambda m, a, k: read.append(k['input_ids'].shape), with_kwargs=True)
    s = GenerateSettings(max_tokens=8, samples=5, temperature=1.5)
    out = texts_of(base, [prompts[0], prompts[1], prompts[0]], s)
    assert read[0][0] == 2 and read[1] == (10, 1) and out[0] == out[2] != out[1] # the prompt is read once for five samples
    read.clear()
    named = texts_of(base, [prompts[0], prompts[0]], s, ids=['a', 'b'])
    assert read[0][0] == 2 and named[0] != named[1]
    hook.remove()


# --- the distribution

def test_pick_follows_the_probabilities():
    "20,000 draws from 60 tokens against the softmax. Mutations: temperature multiplied; searchsorted from the left"
    torch.manual_seed(0)
    z = 2*torch.randn(60)
    z[[0, 7, 59]] = -torch.inf # never: not at the ends, not in the middle
    u = torch.from_numpy(np.concatenate([draws(0, str(i), 0, 100) for i in range(200)]))
    for temperature in (.5, 1., 2.):
        p = (z.double()/temperature).softmax(0)
        counts = torch.bincount(pick(z.expand(len(u), -1), u, temperature), minlength=60)
        seen = p > 0
        assert counts[~seen].sum() == 0
        assert ((counts - len(u)*p)[seen]**2 / (len(u)*p[seen])).sum() < 95   # chi-square, 56 degrees of freedom, p = .001
    zero = torch.tensor([0, 2**-32, 1 - 2**-32], dtype=torch.float64)
    assert pick(z.expand(3, -1), zero, 1.).tolist() == [1, 1, 58]


def test_temperature_moves_the_entropy_and_near_zero_is_greedy(base, prompts):
    z = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).expand(4000, -1)
    u = torch.from_numpy(draws(0, '', 0, 4000))
    def entropy(t, p=1.):
        share = torch.bincount(pick(z, u, t, p), minlength=300).double() / len(z)
        return -(share[share > 0] * share[share > 0].log()).sum().item()
    by_temperature = [entropy(t) for t in (.05, .3, .7, 1., 2.)]
    assert by_temperature == sorted(by_temperature) and by_temperature[-1] - by_temperature[0] > 3
    by_nucleus = [entropy(1., p) for p in (.1, .5, .9, 1.)]
    assert by_nucleus == sorted(by_nucleus) and by_nucleus[-1] - by_nucleus[0] > 2
    assert texts_of(base, prompts, replace(GREEDY, temperature=1e-4)) == texts_of(base, prompts, GREEDY)
    assert texts_of(base, prompts, replace(GREEDY, temperature=1., top_p=1e-9)) == texts_of(base, prompts, GREEDY)


@pytest.mark.parametrize('top_p', [.05, .3, .8, .95, .999])
def test_nucleus_is_that_of_transformers(top_p):
    "Mutation: keep only tokens before the share is full, without the one that fills it"
    z = 3*torch.randn(200, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = TopPLogitsWarper(top_p)(None, z) > -torch.inf
    assert ((nucleus(z.softmax(1), top_p) > 0) == kept).all()
    assert (nucleus(7*z.softmax(1), top_p) > 0).eq(kept).all() # multiples of probabilities do as well


@pytest.mark.parametrize('top_k', [1, 3, 40, 79, 80, 500])
def test_top_k_is_that_of_transformers_alone_and_before_top_p(top_k):
    "Also where tokens are equal. Mutations: `>`; the place after the k-th; top_p before top_k"
    z = 3*torch.randn(200, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:100] = z[:100].round() # full of equals
    assert ((likeliest(z.softmax(1), top_k) > 0) == (TopKLogitsWarper(top_k)(None, z) > -torch.inf)).all()
    z, u = z[100:].float(), torch.from_numpy(draws(0, 'rows', 0, 100))
    left = TopPLogitsWarper(.8)(None, TopKLogitsWarper(top_k)(None, z/1.3))
    assert (pick(z, u, 1.3, .8, top_k) == pick(left, u, 1.)).all()
    if top_k == 3: assert (pick(z, u, 1.3, .8, top_k) != pick(z, u, 1.3, .8)).any()


@pytest.mark.parametrize('n', [1, 2, 3, 4])
def test_no_repeat_is_that_of_transformers_without_the_pads(n):
    "Mutations: pads count; the last n tokens are looked for; the first match alone is banned"
    rows, free = torch.randint(0, 7 if n < 3 else 3, (300, 14), generator=torch.Generator().manual_seed(n)), torch.randn(300, 7)
    expected = NoRepeatNGramLogitsProcessor(n)(rows, free.clone())
    assert (ban_repeats(free, rows, n) == expected).all() and (expected.isinf().sum(1) > 1).any()
    assert (ban_repeats(free, torch.cat([torch.full((300, n + 2), -1), rows], 1), n) == expected).all()
    for short in (1, 2, 3):
        assert (
            ban_repeats(free, torch.cat([torch.full((300, 5), -1), rows[:, :short]], 1), n)
            == NoRepeatNGramLogitsProcessor(n)(rows[:, :short], free.clone())
        ).all()


def test_no_repeat_texts_are_those_of_transformers(base, prompts):
    "Greedy, each row as alone; a prompt's own pairs are banned, too. Mutation: the response alone counts"
    for n in (2, 3):
        s, expected = replace(GREEDY, no_repeat_ngram=n, max_tokens=40), []
        for p in prompts[:12]:
            x = base.tokenizer(p, return_tensors='pt', return_token_type_ids=False)
            out = base.model.generate(**x, do_sample=False, max_new_tokens=40, pad_token_id=0, no_repeat_ngram_size=n)
            expected.append([base.tokenizer.decode(out[0, x.input_ids.shape[1]:], skip_special_tokens=True)])
        assert texts_of(base, prompts[:12], s) == expected
    assert (
        sum(
            a != b
            for a, b in zip(texts_of(base, prompts, replace(GREEDY, no_repeat_ngram=2)), texts_of(base, prompts, GREEDY), strict=True)
        )
        > 2
    )
    assert texts_of(base, prompts[:6], replace(YE, top_k=1, top_p=1.0, no_repeat_ngram=0)) == texts_of(
        base, prompts[:6], replace(GREEDY, max_tokens=14)
    ) # top_k 1 is greedy


def test_no_pair_comes_twice_in_any_sample(base, prompts):
    s, checked = replace(YE, samples=4, temperature=1.5, max_tokens=30), 0
    for p, row in zip(prompts, respond(base.model, base.tokenizer, prompts, s, quiet=True), strict=True):
        for r in row:
            ids = prompt_ids(base.tokenizer, [p + r.text])[0]
            asked = set(zip(prompt_ids(base.tokenizer, [p])[0], prompt_ids(base.tokenizer, [p])[0][1:], strict=False))
            if len(ids) - len(prompt_ids(base.tokenizer, [p])[0]) + r.ended != r.tokens: continue # another cut of the same text
            new = list(zip(ids, ids[1:], strict=False))[len(prompt_ids(base.tokenizer, [p])[0]) - 1:]
            assert len(set(new)) == len(new) and asked.isdisjoint(new)
            checked += 1
    assert checked > 40


def test_large_vocabularies_go_in_pieces(monkeypatch):
    z, u = torch.randn(50, 33), torch.rand(50, dtype=torch.float64)
    whole = pick(z, u, 1., .9)
    monkeypatch.setattr(sampling, 'CELLS', 100)
    assert (pick(z, u, 1., .9) == whole).all()


# --- how a response ends: pitfalls 7 and 9

def test_pitfall_07_pad_is_eos_and_the_response_ends_there(folder, prompts):
    "Nothing runs on past its end, and no prompt loses its end tokens to the mask. Mutation: ends = set()"
    base = load_base(folder, FULL, device='cpu')
    before = respond(base.model, base.tokenizer, prompts, GREEDY, quiet=True)
    base.tokenizer.pad_token = base.tokenizer.eos_token
    assert respond(base.model, base.tokenizer, prompts, GREEDY, quiet=True) == before
    assert np.mean([r.ended for row in before for r in row]) > .7
    for (r,), p in zip(before, prompts, strict=True):
        ids, eos = prompt_ids(base.tokenizer, [p])[0], base.tokenizer.eos_token_id
        written = base.tokenizer(p + r.text)['input_ids'][len(ids):]
        assert eos not in written and r.tokens == len(written) + r.ended and r.ended == (r.tokens < 20 or r.tokens == len(written) + 1)


def test_pitfall_07_ends_of_a_chat_turn_count_and_ordinary_words_do_not(base, prompts):
    "A model whose configuration names more ends. Mutation: the tokenizer's end token alone"
    tok, model = base.tokenizer, base.model
    tok.add_special_tokens({'additional_special_tokens': ['<|eot|>']})
    eot, word = tok.convert_tokens_to_ids('<|eot|>'), tok(' answer')['input_ids'][-1]
    model.generation_config.eos_token_id = [2, eot, word]
    assert end_ids(model, tok) == {2, eot}
    model.generation_config.eos_token_id = None
    assert end_ids(model, tok) == {2}
    tok.eos_token = None
    assert end_ids(model, tok) == {model.config.eos_token_id} == {2}
    tok.eos_token = '</s>'


@pytest.mark.parametrize('stop', [('.',), ('answer is',), ('er', 'h'), ('that helps', 'Everybody'), ('\n',), (' ',), ('é', '你')])
def test_stop_strings_cut_as_if_the_text_were_whole(base, prompts, stop):
    """In the middle of tokens, over several of them, at the first. Mutations: `may_end` looks for the whole stop string in one token; the
    stop string stays in the text"""
    s = GenerateSettings(max_tokens=24, temperature=1.)
    whole = respond(base.model, base.tokenizer, prompts, s, quiet=True)
    stopped = respond(base.model, base.tokenizer, prompts, replace(s, stop=stop), quiet=True)
    for (w,), (r,) in zip(whole, stopped, strict=True):
        assert r.text == cut_at(w.text, stop) and r.ended == (w.ended or r.text != w.text) and r.tokens <= w.tokens
        assert not any(x in r.text for x in stop)
        if r.text != w.text: # it stopped at once, and not at the end of the sentence
            first = min((w.text.find(x), x) for x in stop if x in w.text)[1]
            assert r.tokens <= len(base.tokenizer(r.text + first)['input_ids']) + 2
    if stop[0] in ('.', 'answer is', 'er', ' '): assert sum(r.tokens for r, in stopped) < sum(w.tokens for w, in whole)


PROMPT, REPLY = 'Question: What do bees make?\nAnswer:', ' The answer is honey. I hope that helps.'
MADE = ['byte bpe', 'bpe with begin', 'begin and end', 'metaspace', 'wordpiece', 'words']


def made(kind, texts):
    "Tokenizers of kinds that people have"
    special, names = ['<pad>', '<s>', '</s>', '<unk>'], dict(pad_token='<pad>', bos_token='<s>', eos_token='</s>')
    if kind in ('byte bpe', 'bpe with begin', 'begin and end'):
        tok = tiny_tokenizer(texts, 400).backend_tokenizer
        if kind != 'byte bpe':
            tok.post_processor = processors.TemplateProcessing(
                single='<s> $A' + (' </s>' if kind == 'begin and end' else ''), special_tokens=[('<s>', 1), ('</s>', 2)]
            )
        return PreTrainedTokenizerFast(tokenizer_object=tok, **names)
    if kind == 'metaspace':
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
    else: # one token is a space and a word
        tok, trainer = (
            Tokenizer(models.WordLevel(unk_token='<unk>')),
            trainers.WordLevelTrainer(special_tokens=special, show_progress=False),
        )
        tok.pre_tokenizer, tok.decoder = pre_tokenizers.Split(' ', 'merged_with_next'), decoders.Fuse()
    tok.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, unk_token='<unk>', **names)


@pytest.fixture(params=[*MADE, 'babyllama105', 'english-1m', 'stories260K'])
def tokenizer(request, texts):
    if request.param in MADE: return made(request.param, [*texts, PROMPT + REPLY, PROMPT])
    if not (WEIGHTS/request.param).is_dir(): pytest.skip('needs ../shared/weights')
    return load_tokenizer(WEIGHTS/request.param)


def test_pitfall_09_the_prompt_is_read_as_in_training_and_the_text_comes_back(tokenizer):
    """Begin token once, no end token; the response keeps its leading space. Mutations: decode the response alone; keep the end token of the
    prompt"""
    row, = encode(tokenizer, [PROMPT], [REPLY])
    ids, = prompt_ids(tokenizer, [PROMPT])
    assert tuple(ids) == row.ids[:row.start] and ids[-1] != tokenizer.eos_token_id
    if tokenizer.bos_token:
        assert prompt_ids(tokenizer, [tokenizer.bos_token + PROMPT])[0].count(tokenizer.bos_token_id) == max(
            1, ids.count(tokenizer.bos_token_id)
        )
    back, whole = (
        response_text(tokenizer, ids, row.response),
        tokenizer.decode(row.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    )
    assert whole == tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) + back
    assert back.startswith(' ') and 'hope' in back


def test_pitfall_09_letters_of_several_bytes(texts):
    "A letter that comes in several tokens is whole again, also where it was cut off"
    tok = tiny_tokenizer(texts, 300)
    ids, reply = tok('Name: Zoë é')['input_ids'], tok(' 你好 ö')['input_ids']
    assert response_text(tok, ids, reply) == ' 你好 ö'
    assert response_text(tok, ids, reply[:2]).startswith(' ')
    assert not response_text(tok, ids, reply).startswith('é')


def test_chat_prompts(base):
    tok = base.tokenizer
    tok.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    talk = [dict(role='user', content='What do bees make?')]
    same = 'user: What do bees make?\nassistant:'
    assert texts_of(base, [talk], GREEDY) == texts_of(base, [same], GREEDY)
    assert prompt_ids(tok, [talk, same])[0] == prompt_ids(tok, [same])[0]
    tok.chat_template = None


# --- what must not happen

def test_prompts_without_room_are_named(base, prompts):
    with pytest.raises(
        DataError,
        match=r'1 of 3 prompts .* 20 tokens: the model reads 256 in all, and row 1 \(.the long one.\) has \d\d\d; shorten prompts to 236',
    ):
        texts_of(base, [prompts[0], 'again '*150, prompts[1]], GREEDY, ids=['a', 'the long one', 'b'])
    room = 256 - len(prompt_ids(base.tokenizer, [prompts[0]])[0])
    texts_of(base, [prompts[0]], replace(GREEDY, max_tokens=room))
    with pytest.raises(DataError): texts_of(base, [prompts[0]], replace(GREEDY, max_tokens=room + 1))


@pytest.mark.parametrize(
    'bad, message',
    [
        (dict(max_tokens=0), 'max_tokens is 0'),
        (dict(samples=0), 'samples is 0'),
        (dict(token_budget=0), 'token_budget'),
        (dict(temperature=-1), 'temperature is -1'),
        (dict(temperature=float('nan')), 'temperature is nan'),
        (dict(top_p=0), 'top_p is 0'),
        (dict(top_p=1.1), 'top_p is 1.1'),
        (dict(stop='\n'), 'texts in brackets'),
        (dict(stop=('',)), 'texts in brackets'),
        (dict(temperature=0, samples=2), 'all samples are the same'),
        (dict(temperature=0, top_p=0.9), 'top_p and top_k do nothing'),
        (dict(temperature=0, top_k=5), 'top_p and top_k do nothing'),
        (dict(top_k=-1), 'top_k is -1'),
        (dict(no_repeat_ngram=-2), 'no_repeat_ngram is -2'),
    ],
)
def test_settings_that_do_nothing_are_refused(bad, message):
    with pytest.raises(ConfigError, match=message): GenerateSettings(**bad)


def test_names_of_finished_stages_stay():
    "Hashes of settings that were there before. Mutations: plain `asdict`; a later setting left out although it acts"
    old = dict(max_tokens=24, temperature=1., top_p=.9, samples=25, stop=('\n',))
    assert generate_inputs(GenerateSettings(**old, token_budget=5)) == old and list(generate_inputs(GenerateSettings(**old))) == list(old)
    assert generate_inputs(GenerateSettings(**old, top_k=5)) == old | dict(top_k=5)
    assert generate_inputs(replace(GREEDY, no_repeat_ngram=2))['no_repeat_ngram'] == 2


def test_no_rows_and_wrong_numbers_of_names(base, prompts):
    assert texts_of(base, [], GREEDY) == []
    with pytest.raises(DataError, match='2 ids for 3 prompts'): texts_of(base, prompts[:3], GREEDY, ids=['a', 'b'])


def test_tokens_without_a_piece_are_never_sampled(base, prompts):
    "A vocabulary padded to a round number. Mutation: all logits are used"
    known = max(base.tokenizer.get_vocab().values()) + 1
    base.model.resize_token_embeddings(known + 62, mean_resizing=False)
    with torch.no_grad():
        base.model.get_input_embeddings().weight[known:] = 50*base.model.get_input_embeddings().weight[2]
    out = respond(base.model, base.tokenizer, prompts, GenerateSettings(max_tokens=12, temperature=1.), quiet=True)
    assert all(r.ended or len(base.tokenizer(r.text)['input_ids']) >= 6 for row in out for r in row)


def test_models_without_keys_and_values_are_refused():
    config = transformers.MambaConfig(vocab_size=120, hidden_size=64, num_hidden_layers=1, state_size=4)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), pytest.raises(ModelError, match='no cache of keys and values'):
        write(model, letters(0), [[3, 4]], torch.zeros(1, 5, dtype=torch.float64), replace(GREEDY, max_tokens=5))


@pytest.mark.parametrize('load', [NF4, NF4_16], ids=['nf4 fp32', 'nf4 bf16'])
def test_pitfall_13_generation_leaves_4_bit_weights_alone(folder, prompts, load):
    "On a CPU bitsandbytes repacks weights in evaluation mode. Mutation: model.eval()"
    base = load_base(folder, load, device='cpu')
    before = {n: p.data.clone() for n, p in base.model.named_parameters()}
    data = block([Encoded(tuple(prompt_ids(base.tokenizer, [prompts[0]])[0]), 3)])
    with torch.no_grad(): score = response_logps(base.model, data)
    texts_of(base, prompts[:8], GREEDY)
    assert all((p.data == before[n]).all() for n, p in base.model.named_parameters())
    with torch.no_grad(): assert response_logps(base.model, data) == score


def test_the_programs_own_random_stream_is_left_alone(base, prompts):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    texts_of(base, prompts[:4], GenerateSettings(max_tokens=5))
    assert (torch.rand(3) == expected).all()


# --- killed and started again

KILLED = '''
import json, sys, time
from pathlib import Path
from w2s.models.load import LoadSettings, load_base
from w2s.train import generate as page
folder, prompts, settings, journal = sys.argv[1], *map(json.loads, sys.argv[2:4]), Path(sys.argv[4])
base, write = load_base(folder, LoadSettings('none', 'float32'), device='cpu'), page.write
page.write = lambda *a: (time.sleep(.1), write(*a))[1]
page.respond(base.model, base.tokenizer, prompts, page.GenerateSettings(**settings), 3, quiet=True, journal=journal)
'''


def test_a_kill_in_the_middle_changes_no_text(folder, base, prompts, tmp_path, monkeypatch):
    """SIGKILL in the third pool of eight rows, and the last line in the journal cut off. Mutations: rows drawn in the order in which they
    are made; no journal; the half line kept"""
    s, journal, made, write = replace(YE, samples=2, temperature=1.1, token_budget=60), tmp_path/'texts.jsonl', [], page.write
    whole = respond(base.model, base.tokenizer, prompts, replace(s, token_budget=8192), 3, quiet=True)
    settings = json.dumps(
        {k: getattr(s, k) for k in ('max_tokens', 'temperature', 'top_p', 'top_k', 'no_repeat_ngram', 'samples', 'token_budget')}
    )
    process = subprocess.Popen(
        [sys.executable, '-W', 'ignore', '-c', KILLED, str(folder), json.dumps(prompts), settings, str(journal)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'},
    )
    # lines, the first of them the settings
    while process.poll() is None and (journal.read_bytes().count(b'\n') if journal.exists() else 0) < 3: time.sleep(.002)
    assert process.poll() is None, process.communicate()[1][-2000:]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    journal.write_bytes(journal.read_bytes()[:-7])
    kept = sum(len(read_line(line)) for line in journal.read_bytes().split(b'\n')[1:-1])
    monkeypatch.setattr(page, 'write', lambda *a: (made.append(len(a[2])), write(*a))[1])
    assert respond(base.model, base.tokenizer, prompts, s, 3, quiet=True, journal=journal) == whole
    assert 0 < kept < len(prompts) and sum(made) == len(prompts) - kept and len({r.text for row in whole for r in row}) > 20
    assert respond(base.model, base.tokenizer, prompts, s, 3, quiet=True, journal=journal) == whole and sum(made) == len(prompts) - kept


@pytest.mark.parametrize('every, kept_some', [(0., True), (600., False)])
def test_what_has_ended_is_written_down_before_its_pool_has(base, prompts, tmp_path, monkeypatch, every, kept_some):
    "All prompts are one pool, which fails when half of the responses have ended. With minutes to wait it is written down as a whole"
    s, journal, told, made, write = replace(YE, samples=2, temperature=1.1), tmp_path/'texts.jsonl', [], [], page.write
    whole = respond(base.model, base.tokenizer, prompts, s, 3, quiet=True)
    monkeypatch.setattr(page, 'EVERY', every)
    def failing(*a):
        def ended(row, response):
            told.append(row)
            a[6](row, response)
            if len(told) == len(prompts): raise KeyboardInterrupt
        return write(*a[:6], ended)
    monkeypatch.setattr(page, 'write', failing)
    with pytest.raises(KeyboardInterrupt): respond(base.model, base.tokenizer, prompts, s, 3, quiet=True, journal=journal)
    kept = sum(len(read_line(line)) for line in journal.read_bytes().splitlines()[1:])
    assert 0 < kept < len(prompts) if kept_some else kept == 0
    monkeypatch.setattr(page, 'write', lambda *a: (made.append(len(a[2])), write(*a))[1])
    assert respond(base.model, base.tokenizer, prompts, s, 3, quiet=True, journal=journal) == whole and sum(made) == len(prompts) - kept


def test_a_journal_of_other_rows_is_a_journal_of_some(base, prompts, tmp_path):
    "Rows come and go between the starts: what is there is not made again, what is not asked for is not returned"
    journal, s = tmp_path/'deep'/'texts.jsonl', replace(YE, token_budget=300)
    whole, some = texts_of(base, prompts, s), texts_of(base, prompts[:9], s, journal=journal)
    assert some == whole[:9] and texts_of(base, prompts[::-1], s, journal=journal) == whole[::-1]
    assert len(open_journal(journal, read_line(journal.read_bytes().splitlines()[0])['made'])) == len(prompts)
    assert texts_of(base, prompts[3:5], s, journal=journal) == whole[3:5]
    for other in (dict(seed=1), dict(arm='b')):
        with pytest.raises(ConfigError, match='made in another way'): texts_of(base, prompts, s, journal=journal, **other)
    for other in (dict(top_k=5), dict(no_repeat_ngram=0), dict(max_tokens=15), dict(stop=('.',))):
        with pytest.raises(ConfigError, match='settings'): texts_of(base, prompts, replace(s, **other), journal=journal)
    named = texts_of(base, prompts, s, ids=[f'{i}' for i in range(len(prompts))], journal=journal)
    assert named == texts_of(base, prompts, s, ids=[f'{i}' for i in range(len(prompts))]) != whole # a row is its name and its prompt


# --- the benchmark, in small

def test_a_token_of_a_large_batch_costs_less():
    "Three times less at least for 16 rows; 8 times were measured. Mutation: the token budget is not acted on"
    from generation import per_token, questions, three_ways
    base = load_base(str(model_folder('pico')), FULL, device='cpu')
    asked = questions(base, 32)
    for batch in (1, 16): per_token(base, asked, batch, 0)
    assert min(per_token(base, asked, 1, seed) for seed in (1, 2, 3)) > 3*min(per_token(base, asked, 16, seed) for seed in (1, 2, 3))
    assert len(three_ways(base, asked[:1], 0)) == 3 # which says that the texts are the same
