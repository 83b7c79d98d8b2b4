"Models of many families, each tiny and random but of its real class: what is computed for them is right, or they are refused in words"
import os
import warnings

import pytest
import torch
from bitsandbytes import functional as bnb
from families import ALIKE, COMMANDS, EYE, FAMILIES, MINE, MOE, TOKENIZERS, S, letters, make_model, nested, of, own_logp, tried, write_rows
from peft import AutoPeftModelForCausalLM, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from w2s.compare.learn import check_checkpointing
from w2s.compare.models import know_model, model_inputs
from w2s.compare.preference_settings import WeakTeacher
from w2s.errors import ModelError
from w2s.models import load
from w2s.models.adapter_files import PURE_MAMBA, adapter_line, linear_layers
from w2s.models.adapters import LoraSettings, add_adapter, load_adapter, plan_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base, load_config
from w2s.train import logprobs
from w2s.train.batches import block
from w2s.train.generate import GenerateSettings, respond
from w2s.train.logprobs import check_model, head_of, response_logps
from w2s.train.loop import TrainSettings
from w2s.train.tokens import Encoded

warnings.filterwarnings('ignore')
FULL, HALF, NF4, NF4_32 = (
    LoadSettings('none', 'float32'),
    LoadSettings('none', 'bfloat16'),
    LoadSettings('nf4', 'bfloat16'),
    LoadSettings('nf4', 'float32'),
)

MIXTURES = [
    'mixtral',
    'granitemoe',
    'phimoe',
    'qwen3_moe',
    'qwen2_moe',
    'gpt_oss',
    'jetmoe',
    'llama4',
    'qwen3_next',
    'jamba',
    'granite hybrid',
]
HYBRIDS = ['qwen3_5', 'qwen3_next', 'lfm2', 'bamba', 'jamba', 'granite hybrid', 'falcon_h1']
ODD = ['mamba', 'rwkv', 'modernbert decoder', 'mamba2', 'falcon_mamba', 'xlstm']
ALL = os.environ.get('W2S_FAMILIES') == 'all'
PLAIN = [f for f in FAMILIES if f not in ODD and (ALL or f not in ALIKE)]
PURE = ['mamba2', 'falcon_mamba', 'xlstm'] # like Mamba: in 32 bits only, or with a small --nf4-share


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Where a model of a family lies"
    home, made = tmp_path_factory.mktemp('families'), {}
    def folder(name):
        if name not in made: made[name] = make_model(name, home/name.replace(' ', '-'))
        return made[name]
    return folder


def sequences(top=90):
    draw = torch.Generator().manual_seed(3)
    return [Encoded(tuple(torch.randint(3, top, (n,), generator=draw).tolist()), n//2) for n in (14, 25, 9)]


def shaken(model, size=.05):
    draw = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if 'lora_B' in n: p.data = size*torch.randn(p.shape, generator=draw).to(p.dtype)
    return model.eval()


# Heads: A1, A4

@pytest.mark.parametrize('name', [*PLAIN, 'mamba', *PURE])
def test_log_probs_are_those_of_the_model(folders, name):
    "In 32 bits, padded together, against the model's own logits of each sequence alone; and the check passes in 32 and in 16 bits"
    base, rows = load_base(folders(name), FULL, device='cpu'), sequences()
    check_model(base)
    with torch.no_grad(): ours, own = response_logps(base.model, block(rows)), torch.stack([own_logp(base.model, s) for s in rows])
    assert torch.allclose(ours.double(), own, atol=2e-3)
    check_model(load_base(folders(name), HALF, device='cpu'))


def biased(model):
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.full((len(head.weight),), .01).to(head.weight.dtype)*torch.arange(len(head.weight)))


def dense(model):
    "A layer between body and head that changes little"
    plain, layer = model.lm_head.forward, torch.nn.Linear(64, 64, bias=False, dtype=model.dtype)
    torch.nn.init.eye_(layer.weight)
    layer.weight.data[0, 1] = .5
    model.lm_head.forward = lambda h: plain(layer(h))


WRONG = {
    'scale': lambda m, h: h | dict(scale=h['scale'] * 1.05),
    'cap': lambda m, h: h | dict(cap=12.0),
    'no cap': lambda m, h: h | dict(cap=None),
    'half the words': lambda m, h: h | dict(weight=h['weight'][:50]),
    'a bias left out': lambda m, h: biased(m) or h,
    'a layer left out': lambda m, h: dense(m) or h,
}


@pytest.mark.parametrize('load', [FULL, HALF], ids=['fp32', 'bf16'])
@pytest.mark.parametrize('name', WRONG)
def test_a_wrong_head_is_noticed(folders, monkeypatch, name, load):
    "On a model whose logits are small, where a cap changes nothing that a log-prob of some tokens would show"
    base = load_base(folders('gemma2'), load, device='cpu')
    base.model.model.norm.weight.data.fill_(-.999) # it is one plus this
    head = WRONG[name](base.model, head_of(base.model))
    monkeypatch.setattr(logprobs, 'head_of', lambda model: head)
    with pytest.raises(ModelError, match='are not those of its logits'): check_model(base)


@pytest.mark.parametrize('name, cap', [('gemma3 nested', None), ('gemma4 nested', 8.)])
def test_settings_of_the_language_part_count(folders, name, cap):
    base = load_base(folders(name), FULL, device='cpu')
    assert base.context == 512 and head_of(base.model)['cap'] == cap


def test_a_layer_in_front_of_the_head_is_refused(folders):
    with pytest.raises(ModelError, match='modernbert-decoder: logits from the hidden states are not those of its logits'):
        check_model(load_base(folders('modernbert decoder'), FULL, device='cpu'))


def test_weights_that_are_no_numbers_are_named(folders):
    for how in (FULL, NF4):
        base = load_base(folders('granite'), how, device='cpu')
        layer = base.model.model.layers[1].mlp.down_proj
        if how is FULL: layer.weight.data[0, 0] = torch.nan
        else: layer.weight.quant_state.offset = torch.tensor(torch.inf)
        with pytest.raises(ModelError, match='is damaged: model.layers.1.mlp.down_proj.weight holds inf or NaN'): check_model(base)


# Four bits: A2

@pytest.mark.parametrize('name', PLAIN)
def test_what_is_in_four_bits_is_known_before(folders, name):
    "Planned without weights, found on the loaded model; nearly all of the body, and nothing of the head"
    plan, base = load.plan_model(folders(name), NF4), load_base(folders(name), NF4, device='cpu')
    assert base.bits == plan.bits and base.bits.share > .8
    assert 'in 4 bits (NF4' in load.bits_line(plan, NF4) and type(base.model.get_output_embeddings()) is torch.nn.Linear
    check_model(base)


@pytest.mark.parametrize('name', [*MIXTURES, 'falcon'])
def test_four_bits_save_what_they_should(folders, name):
    "Half a byte a weight, instead of two: seen in the memory of the model"
    four, sixteen = (load_base(folders(name), how, device='cpu').model for how in (NF4, HALF))
    def body(model): return sum(p.numel()*p.element_size() for n, p in model.named_parameters() if 'embed' not in n and 'lm_head' not in n)
    assert body(four) < .4*body(sixteen)


def plain_copy(folder, four):
    "The same model in 32 bits, with the weights that the 4 bits stand for"
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for at, m in four.named_modules():
        if type(m).__name__ == 'Linear4bit':
            w, own = bnb.dequantize_4bit(m.weight.data, m.weight.quant_state), full.get_submodule(at).weight
            own.data = (w if w.shape == own.shape else w.T).clone()
    for n in four.four_bit_experts:
        at, _, leaf = n.rpartition('.')
        full.get_parameter(n).data = getattr(four.get_submodule(at), leaf).clone()
    return full


def same_adapter(trained, other):
    "An adapter on the same layers of another copy of the model"
    values = {n: p for n, p in trained.named_parameters() if '.lora_' in n}
    layers = sorted({n.removeprefix('base_model.model.').partition('.lora_')[0] for n in values})
    model = get_peft_model(other.requires_grad_(False), LoraConfig(r=8, lora_alpha=16, task_type='CAUSAL_LM', target_modules=layers))
    for n, p in model.named_parameters():
        if 'lora_A' in n: p.data = values[n].data.clone()
    return model


@pytest.mark.parametrize(
    'name, again', [(name, again) for name in [*MIXTURES, 'falcon'] for again in (False, True)[: 1 if name == 'jetmoe' else 2]]
) # Jet MoE's class offers no checkpointing
def test_gradients_go_through_four_bits(folders, name, again):
    "LoRA over frozen 4-bit experts and other layers: log-probs and every gradient as over the weights that they stand for"
    base, rows, got = load_base(folders(name), NF4_32, device='cpu'), sequences(), []
    other = plain_copy(folders(name), base.model)
    trained = add_adapter(base)
    for model in (shaken(trained), shaken(same_adapter(trained, other))):
        model.train()
        if again:
            model.gradient_checkpointing_enable({'use_reentrant': False})
            model.enable_input_require_grads()
        logp = response_logps(model, block(rows))
        (logp*torch.tensor([1., -1., .5])).sum().backward()
        got.append(
            (
                logp.detach(),
                {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None and 'lora' in n},
            )
        )
    (a, da), (b, db) = got
    most = max(g.abs().max() for g in db.values())
    assert torch.allclose(a, b, atol=1e-3) and da.keys() == db.keys() and max((da[n] - db[n]).abs().max() for n in db)/most < 1e-4


def test_checkpointing_that_a_class_does_not_offer(folders):
    settings = TrainSettings(gradient_checkpointing=True)
    check_checkpointing(load_base(folders('mixtral'), FULL, device='cpu'), settings)
    with pytest.raises(ModelError, match='jetmoe .*offers no gradient checkpointing'):
        check_checkpointing(load_base(folders('jetmoe'), FULL, device='cpu'), settings)


def test_too_little_in_four_bits_is_refused(folders):
    "Unless it is allowed; Mamba's layers are read past themselves"
    with pytest.raises(ModelError, match=r'only 5\d.\d% of the body.*--quantize none, or allow it by --nf4-share 0.[45]'):
        load_base(folders('mamba'), NF4, device='cpu')
    check_model(load_base(folders('mamba'), LoadSettings('nf4', 'bfloat16', nf4_share=.4), device='cpu'))
    with pytest.raises(ModelError, match='less than the share of 1 '):
        load_base(folders('granite'), LoadSettings(nf4_share=1.0), device='cpu')


FOUR = dict(bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
SAVED = {
    'double': (FOUR, NF4, ''),
    'other arithmetic': (FOUR, NF4_32, ''),
    'single': (FOUR | dict(bnb_4bit_use_double_quant=False), NF4, ''),
    'arithmetic in float16': (FOUR | dict(bnb_4bit_compute_dtype=torch.float16), NF4, ''),
    'asked for none': (FOUR, HALF, 'would win over --quantize none; take --quantize nf4, which uses it as it is'),
    'fp4': (FOUR | dict(bnb_4bit_quant_type='fp4'), NF4, 'quant_type fp4'),
    'stored otherwise': (FOUR | dict(bnb_4bit_quant_storage=torch.bfloat16), NF4, 'quant_storage bfloat16'),
}


@pytest.mark.parametrize('family', ['granite', 'gemma3 nested'])
@pytest.mark.parametrize('name', SAVED)
def test_a_checkpoint_saved_in_four_bits(folders, tmp_path, name, family):
    """One in NF4 is used as it is, in the arithmetic that is asked for, and that is said; what else it says of itself would win, so it is
    refused"""
    how, settings, words = SAVED[name]
    AutoModelForCausalLM.from_pretrained(
        folders(family), dtype=torch.bfloat16, device_map={'': 'cpu'}, quantization_config=BitsAndBytesConfig(load_in_4bit=True, **how)
    ).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    if words:
        with pytest.raises(ModelError, match=f'was saved in a quantized form .*{words}'): load_base(tmp_path, settings, device='cpu')
        return
    base, plan = load_base(tmp_path, settings, device='cpu'), load.plan_model(tmp_path, settings)
    check_model(base)
    four = [m for m in base.model.modules() if type(m).__name__ == 'Linear4bit']
    assert base.bits == plan.bits and base.bits.share > .8 and {m.compute_dtype for m in four} == {load.DTYPES[settings.dtype]}
    assert {m.weight.quant_state.nested for m in four} == {how['bnb_4bit_use_double_quant']}
    line = load.bits_line(plan, settings)
    assert 'as it was saved, used as it is' in line and ('its scales in 32 bits' in line) is not how['bnb_4bit_use_double_quant']


@pytest.mark.parametrize(
    'own',
    [
        dict(quant_method='gptq', bits=4, group_size=128),
        dict(quant_method='awq', bits=4),
        dict(quant_method='fp8'),
        dict(quant_method='mxfp4'),
        dict(quant_method='bitsandbytes', load_in_8bit=True),
        dict(quant_method='compressed-tensors'),
    ],
    ids=lambda q: q['quant_method'],
)
@pytest.mark.parametrize('load', [NF4, HALF], ids=['nf4', 'none'])
def test_other_quantizations_are_refused(folders, tmp_path, own, load):
    config = load_config(folders('granite'))
    config.quantization_config = own
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f'was saved in a quantized form \\(quant_method {own["quant_method"]}'):
        load_base(tmp_path, load, device='cpu')


# Adapters: A1, A12

@pytest.mark.parametrize(
    'name',
    [
        'gemma3 nested',
        'mixtral',
        'phimoe',
        'qwen3_moe',
        'gpt_oss',
        'llama4',
        'falcon',
        'recurrent_gemma',
        'qwen3_5',
        'lfm2',
        'bamba',
        'jamba',
        'gpt2',
        'mpt',
    ],
)
def test_adapters_leave_and_merge(folders, tmp_path, name):
    "What is trained here says the same in plain PEFT, and merged"
    base, rows = load_base(folders(name), FULL, device='cpu'), sequences()
    model = shaken(add_adapter(base))
    with torch.no_grad(): ours = response_logps(model, block(rows))
    save_adapter(model, base, tmp_path)
    alone = AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(ours.double(), torch.stack([own_logp(alone, s) for s in rows]), atol=2e-3)
        assert torch.allclose(ours.double(), torch.stack([own_logp(alone.merge_and_unload(), s) for s in rows]), atol=2e-3)


@pytest.mark.parametrize('name', ['mamba', 'mamba2', 'falcon_mamba', 'falcon_h1', 'nemotron_h', 'bamba', 'zamba2'])
def test_adapters_of_models_with_mamba(folders, name):
    """On what is asked as a layer: not on what a kernel is given, nor on what PEFT refuses; that is named, and asked for by name it is
    refused"""
    base, rows = load_base(folders(name), FULL, device='cpu'), sequences()
    before = [type(m) for m in base.model.modules()]
    model = add_adapter(base)
    on = {n.rpartition('.')[2] for n, m in model.named_modules() if hasattr(m, 'lora_A')}
    assert (
        'in_proj' in on
        and not on & {'conv1d', 'dt_proj'}
        and 'out_proj (' not in adapter_line(model).partition('; not on ')[0]
        and 'out_proj of recurrent layers (' in adapter_line(model)
    )
    response_logps(shaken(model), block(rows)).sum().backward()
    assert {
        n.split('.lora_')[0].rpartition('.')[2] for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    } == on
    model.unload()
    if base.model.config.model_type in PURE_MAMBA:
        with pytest.raises(ModelError, match='does not take this LoRA adapter.*out_proj'):
            add_adapter(base, LoraSettings(targets=('out_proj',)))
    assert [type(m) for m in base.model.modules()] == before


def test_dense_layers_that_take_no_adapter_are_named(folders):
    "PEFT takes the dense layers of some mixtures for experts, since they have the same names"
    for name in ('deepseek_v3', 'lfm2_moe', 'qwen2_moe'):
        plan = load.plan_model(folders(name), NF4)
        line = plan_adapter(plan, LoraSettings(), name)
        model = plan.model
        bare_ones = {n.rpartition('.')[2] for n in linear_layers(model) if '.base_layer' not in n and '.lora_' not in n}
        assert all(f'{n} (' in line.partition('; not on ')[2] for n in bare_ones), line


def test_adapters_on_experts_in_four_bits_are_refused(folders, tmp_path):
    sixteen, four = (load_base(folders('mixtral'), how, device='cpu') for how in (FULL, NF4_32))
    save_adapter(add_adapter(sixteen), sixteen, tmp_path)
    with pytest.raises(ModelError, match='tensors that have no place in .*experts in 4 bits take none: take --quantize none'):
        load_adapter(four, tmp_path)
    assert not any('lora' in n for n, _ in four.model.named_parameters())
    check_model(four)


def foreign(base, tmp_path, config):
    "An adapter that somebody else made with PEFT"
    model = get_peft_model(base.model, config)
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad: p.data = p.data + .1*torch.randn(p.shape, generator=draw)
    model.save_pretrained(tmp_path)
    model.unload() if hasattr(model, 'unload') else None
    return tmp_path


RIGHT = {
    'dora': dict(use_dora=True),
    'rank-stabilized': dict(use_rslora=True),
    'embeddings': dict(target_modules=['q_proj', 'embed_tokens']),
    'tokens': dict(trainable_token_indices=[4, 5]),
    'ranks': dict(rank_pattern={'q_proj': 2}, alpha_pattern={'v_proj': 4}),
}


@pytest.mark.parametrize('name', RIGHT)
def test_foreign_adapters_that_are_right(folders, tmp_path, name):
    "As plain PEFT has them, and the base is the same afterwards"
    base, rows = load_base(folders('granite'), FULL, device='cpu'), sequences()
    foreign(base, tmp_path, LoraConfig(**dict(r=4, target_modules=['q_proj', 'v_proj'], task_type='CAUSAL_LM') | RIGHT[name]))
    base = load_base(folders('granite'), FULL, device='cpu')
    with torch.no_grad():
        before = response_logps(base.model, block(rows))
        model = load_adapter(base, tmp_path)
        ours, own = (
            response_logps(model, block(rows)),
            torch.stack([own_logp(AutoPeftModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval(), s) for s in rows]),
        )
        assert torch.allclose(ours.double(), own, atol=2e-3) and not torch.allclose(ours, before, atol=1e-2)
        model.unload()
        assert torch.equal(response_logps(base.model, block(rows)), before)


REFUSED = {
    'head': (dict(target_modules=['q_proj', 'lm_head']), 'output head'),
    'saved head': (dict(modules_to_save=['lm_head']), 'replaces whole layers .*lm_head'),
    'saved norm': (dict(modules_to_save=['norm']), 'replaces whole layers .*norm'),
    'biases': (dict(bias='lora_only'), 'changes the biases'),
    'tied': (dict(target_modules=['q_proj', 'embed_tokens'], ensure_weight_tying=True), 'output head'),
    'tokens of a tied head': (dict(trainable_token_indices=[4, 5]), 'output head'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_foreign_adapters_that_cannot_be_right_are_refused(folders, tmp_path, name):
    "Those on the head would be left out of log-probs that are computed from the hidden states; others leave something behind in the base"
    family = 'gemma2' if 'tie' in name else 'granite'
    base, (how, words) = load_base(folders(family), FULL, device='cpu'), REFUSED[name]
    foreign(base, tmp_path, LoraConfig(**dict(r=4, target_modules=['q_proj'], task_type='CAUSAL_LM') | how))
    base = load_base(folders(family), FULL, device='cpu')
    with pytest.raises(ModelError, match=words): load_adapter(base, tmp_path)
    assert type(base.model.get_output_embeddings()) is torch.nn.Linear and not any(
        'lora' in n or 'trainable_tokens' in n for n, _ in base.model.named_parameters()
    )


@pytest.mark.parametrize(
    'config',
    [PromptTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3), PrefixTuningConfig(task_type='CAUSAL_LM', num_virtual_tokens=3)],
    ids=lambda c: c.peft_type.value,
)
def test_other_kinds_of_adapters_are_refused(folders, tmp_path, config):
    "They act in PEFT's forward pass, which is not used"
    foreign(load_base(folders('granite'), FULL, device='cpu'), tmp_path, config)
    with pytest.raises(ModelError, match=f'is of the kind {config.peft_type.value}'):
        load_adapter(load_base(folders('granite'), FULL, device='cpu'), tmp_path)


# Answers: A16

@pytest.mark.cases(27)
@pytest.mark.parametrize('name', [f for f in PLAIN if f not in ('recurrent_gemma', 'minimax')])
def test_answers_are_those_of_generate(folders, name):
    "Greedy ones to the letter; sampled ones do not depend on the batch"
    base = load_base(folders(name), FULL, device='cpu')
    tok, prompts = base.tokenizer, ['how far', 'the fox lives by', 'an hour', 'is']
    how = GenerateSettings(max_tokens=8, temperature=0)
    ours, want = [r.text for r, in respond(base.model, tok, prompts, how, quiet=True)], []
    unknown = list(range(max(tok.get_vocab().values()) + 1, 96))
    for p in prompts:
        x = tok(p, return_tensors='pt').input_ids
        y = base.model.generate(
            input_ids=x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=2,
            suppress_tokens=unknown,
        )
        want.append(tok.decode(y[0, x.shape[1]:], skip_special_tokens=True))
    assert ours == want
    how = GenerateSettings(max_tokens=8, temperature=1., samples=2)
    assert respond(base.model, tok, prompts, how, seed=1, quiet=True) == [
        respond(base.model, tok, [p], how, seed=1, quiet=True)[0] for p in prompts
    ]


@pytest.mark.parametrize('name', ['mamba', 'mamba2', 'falcon_mamba', 'rwkv', 'recurrent_gemma'])
def test_models_that_cannot_write_are_refused(folders, name):
    "Before anything is written"
    base, read = load_base(folders(name), FULL, device='cpu'), []
    base.model.register_forward_pre_hook(lambda *a: read.append(a))
    with pytest.raises(ModelError, match='keeps no cache of keys and values'):
        respond(base.model, base.tokenizer, ['how far'], GenerateSettings(max_tokens=4), quiet=True)
    assert not read


@pytest.mark.parametrize('name', ['minimax', 'xlstm'])
def test_a_cache_that_loses_what_it_carries_is_refused(folders, name):
    "Found by a short trial, before a prompt is read"
    base = load_base(folders(name), FULL, device='cpu')
    with pytest.raises(ModelError, match='keeps no cache of keys and values'):
        respond(base.model, base.tokenizer, ['how far', 'is'], GenerateSettings(max_tokens=4), quiet=True)


# Dropout of the base

NOISY = {
    'rwkv': of('RwkvConfig', vocab_size=96, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2, rescale_every=1),
    'opt': of(
        'OPTConfig',
        **MINE,
        pad_token_id=0,
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=128,
        dropout=0.5,
        attention_dropout=0.5,
    ),
    'gpt2': of('GPT2Config', **MINE, n_embd=64, n_layer=2, n_head=4, n_positions=128, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5),
    'llama': of('LlamaConfig', **S, attention_dropout=0.5),
    'phimoe': of('PhimoeConfig', **S, **MOE, router_jitter_noise=0.5, attention_dropout=0.5),
    'gemma3 nested': nested(
        'Gemma3Config',
        {**S, 'head_dim': 16, 'sliding_window': 16, 'attention_dropout': 0.5},
        vision_config=EYE,
        mm_tokens_per_image=4,
        image_token_index=90,
    ),
}


@pytest.mark.parametrize('name', NOISY)
def test_nothing_in_a_base_is_left_to_chance(tmp_path, name):
    """A base is frozen, and the reference of DPO has no dropout: what its configuration asks for is off in training, too, and said, and in
    the key"""
    make_model(name, tmp_path, config=NOISY[name]())
    model, rows = shaken(add_adapter(load_base(tmp_path, FULL, device='cpu'))), sequences()
    with torch.no_grad():
        seen = [response_logps(model.train(), block(rows)) for _ in range(2)]
        assert torch.equal(*seen) and torch.allclose(seen[0], response_logps(model.eval(), block(rows)))
    known = know_model('weak', str(tmp_path), WeakTeacher(data='x', load=FULL))
    assert any('does in training alone (' in n and 'is off' in n for n in known.notes) and model_inputs(known)['dropout'] == 'off'
    assert 'dropout' not in model_inputs(know_model('weak', 'pico', WeakTeacher(data='x', load=FULL)))


# Commands

CORE = [
    ('opt', 'adds begin', 'preferences, nf4'),
    ('mixtral', 'template', 'preferences, nf4'),
    ('gemma4 nested', 'no pad', 'preferences'),
    ('falcon', 'no begin', 'label'),
    ('qwen3_5 nested', 'template, no end', 'refine'),
    ('granite hybrid', 'no end', 'head'),
    ('mistral3 nested', 'one token for both', 'words'),
    ('nemotron_h', 'adds both', 'probe'),
    ('mamba', 'pad is end', 'preferences'),
    ('rwkv', 'template', 'words'),
    ('xlstm', 'template', 'preferences, nf4'),
]
TABLE = [(f, list(TOKENIZERS)[n % len(TOKENIZERS)], c) for n, f in enumerate(FAMILIES) for c in COMMANDS] if ALL else CORE
CANNOT = (
    {
        ('refine', f): 'keeps no cache of keys and values'
        for f in ('mamba', 'mamba2', 'falcon_mamba', 'rwkv', 'recurrent_gemma', 'minimax', 'xlstm')
    }
    | {
        (c, f): "of the body's weights can be put in 4 bits"
        for c in ('preferences, nf4', 'words')
        for f in ('mamba', 'mamba2', 'falcon_mamba')
    }
    | {(c, 'modernbert decoder'): 'are not those of its logits' for c in COMMANDS}
    | {('preferences, nf4', 'xlstm'): 'cannot be trained in these types'}
)


@pytest.mark.cases(2)
@pytest.mark.parametrize('name, tokenizer, command', TABLE)
def test_commands_are_right_or_refused(tmp_path, name, tokenizer, command):
    "Through to the end; the whole table is `benchmarks/families.py`, or this test with W2S_FAMILIES=all"
    (rows := tmp_path/'rows').mkdir()
    write_rows(rows, chat=TOKENIZERS[tokenizer].get('template', False) or tokenizer == 'no pad')
    out = tried(command, make_model(name, tmp_path/'model', tokenizer), rows, tmp_path/'out')
    assert out == 'right' if (command, name) not in CANNOT else CANNOT[command, name] in out
