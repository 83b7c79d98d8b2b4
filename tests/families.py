"Configurations of model families, tiny and with random weights, but of their real classes; and tokenizers of several kinds"
import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerFast

S = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MOE = dict(num_local_experts=4, num_experts_per_tok=2)
SSM = dict(mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_chunk_size=16)
DELTA = dict(
    head_dim=16,
    layer_types=['linear_attention', 'full_attention'],
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
)
EYE = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8)
FOURTH = dict(
    head_dim=16,
    global_head_dim=16,
    sliding_window=16,
    final_logit_softcapping=8.0,
    layer_types=['sliding_attention', 'full_attention'],
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=0,
    vocab_size_per_layer_input=96,
)
MINE = dict(vocab_size=96, bos_token_id=1, eos_token_id=2)


def nested(kind, text, **more):
    "A configuration as it is published: the settings of the language part inside those of the whole"
    return lambda: getattr(transformers, kind)(text_config=text, **more)


def of(kind, **k): return lambda: getattr(transformers, kind)(**k)


FAMILIES = {
    'gemma2': of('Gemma2Config', **S, head_dim=16, sliding_window=16, final_logit_softcapping=10.0),
    'gemma3 nested': nested(
        'Gemma3Config', {**S, 'head_dim': 16, 'sliding_window': 16}, vision_config=EYE, mm_tokens_per_image=4, image_token_index=90
    ),
    'gemma4 nested': nested(
        'Gemma4Config',
        {**S, **FOURTH},
        vision_config=None,
        audio_config=None,
        image_token_id=90,
        audio_token_id=91,
        video_token_id=92,
        boi_token_id=93,
        eoi_token_id=94,
    ),
    'mixtral': of('MixtralConfig', **S, **MOE),
    'granitemoe': of('GraniteMoeConfig', **S, **MOE, logits_scaling=4.0),
    'phimoe': of('PhimoeConfig', **S, **MOE, router_jitter_noise=0.0),
    'qwen3_moe': of('Qwen3MoeConfig', **S, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64),
    'qwen2_moe': of(
        'Qwen2MoeConfig', **S, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
    ),
    'gpt_oss': of('GptOssConfig', **S, **MOE, head_dim=16, sliding_window=16),
    'jetmoe': of('JetMoeConfig', **{**S, 'num_key_value_heads': 2}, kv_channels=16, **MOE),
    'llama4': of(
        'Llama4TextConfig',
        **S,
        head_dim=16,
        intermediate_size_mlp=64,
        num_local_experts=2,
        num_experts_per_tok=1,
        interleave_moe_layer_step=1,
    ),
    'falcon': of('FalconConfig', **MINE, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    'cohere': of('CohereConfig', **S, logit_scale=0.25),
    'granite': of('GraniteConfig', **S, logits_scaling=4.0),
    'hyperclovax': of('HyperCLOVAXConfig', **S, logits_scaling=4.0),
    'nanochat': of('NanoChatConfig', **S),
    'recurrent_gemma': of(
        'RecurrentGemmaConfig', **{**S, 'num_hidden_layers': 3}, lru_width=64, attention_window_size=16, logits_soft_cap=5.0
    ),
    'qwen3_5': of('Qwen3_5TextConfig', **S, **DELTA),
    'qwen3_next': of(
        'Qwen3NextConfig', **S, **DELTA, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    'lfm2': of('Lfm2Config', **S, layer_types=['conv', 'full_attention']),
    'bamba': of('BambaConfig', **S, **SSM, attn_layer_indices=[1]),
    'jamba': of(
        'JambaConfig',
        **S,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=4,
        num_experts_per_tok=2,
        use_mamba_kernels=False,
        mamba_d_state=8,
        mamba_dt_rank=8,
    ),
    'granite hybrid': of(
        'GraniteMoeHybridConfig', **S, **SSM, **MOE, layer_types=['mamba', 'attention'], shared_intermediate_size=64, logits_scaling=2.0
    ),
    'falcon_h1': of('FalconH1Config', **S, **SSM, mamba_d_ssm=128, lm_head_multiplier=0.5),
    'gpt2': of('GPT2Config', **MINE, n_embd=64, n_layer=2, n_head=4, n_positions=512),
    'bloom': of('BloomConfig', **MINE, hidden_size=64, n_layer=2, n_head=4),
    'mpt': of('MptConfig', vocab_size=96, d_model=64, n_layers=2, n_heads=4, max_seq_len=512),
    'mamba': of('MambaConfig', **MINE, pad_token_id=0, hidden_size=64, num_hidden_layers=2),
    'rwkv': of('RwkvConfig', vocab_size=96, hidden_size=64, attention_hidden_size=64, num_hidden_layers=2),
    'modernbert decoder': of('ModernBertDecoderConfig', **S),
    'opt': of(
        'OPTConfig',
        **MINE,
        pad_token_id=0,
        hidden_size=64,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=512,
    ),
    'pythia': of('GPTNeoXConfig', **{k: v for k, v in S.items() if k != 'num_key_value_heads'}),
    'llama': of('LlamaConfig', **S),
    'mistral': of('MistralConfig', **S, sliding_window=16),
    'qwen2': of('Qwen2Config', **S),
    'qwen3': of('Qwen3Config', **S, head_dim=16),
    'phi3': of('Phi3Config', **S),
    'gptj': of('GPTJConfig', **MINE, n_embd=64, n_layer=2, n_head=4, n_positions=512, rotary_dim=8),
    'stablelm': of('StableLmConfig', **S),
    'cohere2': of('Cohere2Config', **S, sliding_window=16, logit_scale=0.25),
    'olmoe': of('OlmoeConfig', **S, num_experts=4, num_experts_per_tok=2),
    'deepseek_v3': of(
        'DeepseekV3Config',
        **{**S, 'num_key_value_heads': 4},
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
    ),
    'mistral3 nested': nested(
        'Mistral3Config', {'model_type': 'mistral', **S}, vision_config={'model_type': 'pixtral', **EYE}, image_token_index=90
    ),
    'qwen3_5 nested': nested(
        'Qwen3_5Config',
        {**S, **DELTA},
        vision_config=dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=2, out_hidden_size=64, patch_size=8),
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    ),
    'nemotron_h': of(
        'NemotronHConfig',
        **S,
        layers_block_type=['mamba', 'attention', 'mlp'],
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=8,
        n_groups=1,
        chunk_size=16,
        head_dim=16,
        use_mamba_kernels=False,
    ),
    'zamba2': of(
        'Zamba2Config',
        **S,
        layers_block_type=['mamba', 'hybrid'],
        mamba_d_state=8,
        mamba_expand=2,
        n_mamba_heads=4,
        chunk_size=16,
        num_mem_blocks=1,
        adapter_rank=8,
        mamba_ngroups=1,
        use_mem_rope=True,
    ),
    'mamba2': of(
        'Mamba2Config',
        **MINE,
        pad_token_id=0,
        hidden_size=64,
        num_hidden_layers=2,
        num_heads=4,
        head_dim=32,
        state_size=8,
        n_groups=1,
        chunk_size=16,
    ),
    'falcon_mamba': of('FalconMambaConfig', **MINE, pad_token_id=0, hidden_size=64, num_hidden_layers=2, state_size=8),
    'xlstm': of(
        'xLSTMConfig',
        **MINE,
        pad_token_id=0,
        hidden_size=64,
        embedding_dim=64,
        num_hidden_layers=2,
        num_heads=4,
        chunk_size=16,
        output_logit_soft_cap=5.0,
        qk_dim_factor=1.0,
        v_dim_factor=1.0,
    ),
    'lfm2_moe': of(
        'Lfm2MoeConfig',
        **S,
        layer_types=['conv', 'full_attention'],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_dense_layers=1,
    ),
    'olmo_hybrid': of(
        'OlmoHybridConfig',
        **S,
        layer_types=['linear_attention', 'full_attention'],
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
    ),
    'minimax': of(
        'MiniMaxConfig',
        **S,
        head_dim=16,
        layer_types=['linear_attention', 'full_attention'],
        num_local_experts=4,
        num_experts_per_tok=2,
        block_size=16,
    ),
    'bitnet': of('BitNetConfig', **S),
    'gpt_neo': of(
        'GPTNeoConfig',
        **MINE,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[['global', 'local'], 1]],
        max_position_embeddings=512,
        window_size=16,
    ),
}


TOKENIZERS = { # how they differ: what they add by themselves, and what they do not have
    'adds nothing': {},
    'adds begin': dict(add='b'),
    'adds both': dict(add='be'),
    'no begin': dict(bos_token=None),
    'no end': dict(eos_token=None),
    'no pad': dict(pad_token=None),
    'pad is end': dict(pad_token='</s>'),
    'one token for both': dict(bos_token='</s>', add='b'),
    'template': dict(template=True),
    'template, no end': dict(template=True, eos_token=None),
}
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def letters(add='', template=False, **special):
    "A tokenizer with fewer tokens than the models have"
    chars = ['<pad>', '<s>', '</s>', '<unk>', *'abcdefghijklmnopqrstuvwxyz .?<>0123456789:\nABCDEFGHIJKLMNOPQRSTUVWXYZ']
    kind = Tokenizer(models.WordLevel({c: i for i, c in enumerate(chars)}, unk_token='<unk>'))
    kind.pre_tokenizer, kind.decoder = pre_tokenizers.Split('', 'isolated'), decoders.Fuse()
    names = dict(unk_token='<unk>', pad_token='<pad>', bos_token='<s>', eos_token='</s>') | special
    tok = PreTrainedTokenizerFast(tokenizer_object=kind, **{k: v for k, v in names.items() if v})
    marks = {'b': names['bos_token'], 'e': names['eos_token']}
    if add:
        tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=' '.join([*([marks['b']] if 'b' in add else []), '$A', *([marks['e']] if 'e' in add else [])]),
            special_tokens=[(t, chars.index(t)) for t in dict.fromkeys(marks[a] for a in add)],
        )
    if template: tok.chat_template = TEMPLATE
    return tok


def make_model(name, place, tokenizer='adds nothing', seed=0, config=None):
    "A model of a family in a folder; its weights are large enough for its layers to matter"
    torch.manual_seed(seed)
    config = config or FAMILIES[name]()
    made = (AutoModelForImageTextToText if name in IMAGES else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for p in made.parameters():
            if p.dim() > 1: p.copy_(.15*torch.randn(p.shape))
    made.save_pretrained(place)
    letters(**TOKENIZERS[tokenizer]).save_pretrained(place)
    return place


IMAGES = ['mistral3 nested'] # no causal language models to transformers
# nearly as another one: tried where all are asked for
ALIKE = ('qwen2', 'phi3', 'stablelm', 'gptj', 'gpt_neo', 'mistral', 'cohere2', 'olmo_hybrid', 'bitnet', 'olmoe', 'lfm2_moe')


# Commands, each on a few rows and through to its end

FAST = dict(sft=dict(batch_size=4, learning_rate=1e-3), dpo=dict(batch_size=4, learning_rate=1e-3), lora=dict(rank=2))
LOADS = {'32 bits': dict(quantize='none', dtype='float32'), 'nf4': dict(quantize='nf4', dtype='bfloat16')}


def write_rows(place, chat):
    "Rows for every command, as texts or as messages"
    def ask(text): return [dict(role='user', content=text)] if chat else text
    def say(text): return text.strip() if chat else text
    def pairs(who, n):
        return [
            dict(
                prompt=ask(f'how far is it to the {who} of {chr(97 + i)}?'),
                chosen=say(f' an hour {"and one more"[:i]}.'),
                rejected=say(' go away.'),
            )
            for i in range(n)
        ]
    def talk(r):
        return (
            dict(
                chosen=[*r['prompt'], dict(role='assistant', content=r['chosen'])],
                rejected=[*r['prompt'], dict(role='assistant', content=r['rejected'])],
            )
            if chat
            else r
        )
    tables = {
        'prefs': map(talk, pairs('mill', 12)),
        'train': map(talk, pairs('well', 10)),
        'classes': [dict(text=f'{"good" if i % 2 else "bad"} day {chr(97 + i)}', label=i % 2) for i in range(16)],
        'questions': [dict(question=f'how far is {chr(97 + i)}?', answer=f'{chr(97 + i)} miles') for i in range(4)],
    }
    for name, rows in tables.items(): (place/f'{name}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))


def prefer(model, rows, out, how):
    "The whole comparison; at the end the student's log-probs are held against the model's own logits"
    from w2s.compare.preference_settings import fill_settings
    from w2s.experiments.preferences import run
    config = fill_settings(dict(data=str(rows/'prefs.jsonl'), weak=str(model), strong=str(model), load=LOADS[how], max_length=128, **FAST))
    result = run(config, out, quiet=True)
    numbers = result.items.select_dtypes('number')
    assert len(result.items) and numbers.notna().all().all()
    check_student(model, LOADS[how], next((out/'stages').glob('student-*-dpo-*'))/'adapter')


def check_student(model, how, adapter):
    "Are our log-probs of a trained student those of its own logits?"
    from w2s.models.adapters import load_adapter
    from w2s.models.load import LoadSettings, load_base
    from w2s.train.batches import block
    from w2s.train.logprobs import response_logps
    from w2s.train.tokens import encode
    base = load_base(model, LoadSettings(**how), device='cpu')
    student = load_adapter(base, adapter)
    sequences = encode(base.tokenizer, ['how far is it?', 'is it far to the mill?'], [' an hour.', ' go away, and far.'])
    with torch.no_grad():
        ours, own = response_logps(student, block(sequences)).double(), torch.stack([own_logp(student, s) for s in sequences])
    assert torch.allclose(ours, own, rtol=1e-4 if how['dtype'] == 'float32' else .03, atol=2e-3), (ours, own)


def own_logp(model, s):
    "The obvious way: all logits of one sequence"
    z = model(torch.tensor([s.ids])).logits[0].double().log_softmax(-1)
    return sum(z[t - 1, s.ids[t]] for t in range(s.start, len(s.ids)))


def give_labels(model, rows, out, how):
    from w2s.files.label import label, label_settings
    from w2s.files.label_rows import LabelJob
    done = label(
        label_settings(str(model), dict(load=LOADS[how], max_length=128, **FAST)),
        LabelJob(str(rows / 'prefs.jsonl'), str(rows / 'train.jsonl'), 0.0),
        out / 'o.parquet',
        quiet=True,
    )
    probs = list(done.labels.rows['prob'])
    assert len(probs) == 12 and all(.5 <= p <= 1 for p in probs)


def classify(readout):
    def run_it(model, rows, out, how):
        from w2s.compare.label_settings import fill_labels
        from w2s.experiments.labels import run
        quick = {k: v for k, v in dict(supervisor=FAST['sft'], student=FAST['sft']).items() if readout != 'probe'}
        words = {} if readout == 'probe' else dict(words=[' no', ' yes'])
        result = run(
            fill_labels(
                dict(
                    data=str(rows / 'classes.jsonl'),
                    weak=[str(model)],
                    strong=[str(model)],
                    readout=readout,
                    load=LOADS[how],
                    max_length=64,
                    baseline=False,
                    **quick,
                    **words,
                )
            ),
            out,
            quiet=True,
        )
        assert len(result.items) and result.items.select_dtypes('number').notna().all().all()
    return run_it


def refine(model, rows, out, how):
    from w2s.files.refine import fill_refine, refine_file
    out.mkdir(exist_ok=True)
    done = refine_file(
        fill_refine(dict(questions=str(rows / 'questions.jsonl'), strong=str(model), examples=1, max_tokens=3, load=LOADS[how])),
        out / 'o.jsonl',
        quiet=True,
    )
    assert len(done.learned.answers) == 4


COMMANDS = {
    'preferences': (prefer, '32 bits'),
    'preferences, nf4': (prefer, 'nf4'),
    'label': (give_labels, '32 bits'),
    'head': (classify('head'), '32 bits'),
    'words': (classify('words'), 'nf4'),
    'probe': (classify('probe'), '32 bits'),
    'refine': (refine, '32 bits'),
}


def tried(command, model, rows, out):
    "'right', or the sentence in which it is refused; anything else is an error of its own"
    from w2s.errors import W2SError
    run, how = COMMANDS[command]
    try: run(model, rows, out, how)
    except W2SError as e: return str(e)
    return 'right'
