"""Responses by vLLM, which is not there: a stand-in takes its arguments and generates by transformers

The names are those of vLLM 0.24.0 and 0.32.0 both: fields of `SamplingParams`, parameters of `LLM` and two fields of `EngineArgs`. The
stand-in ends where vLLM does by its source: at a token of `stop_token_ids`, at the model's end token unless it is ignored, when a stop
string is in the text, or at `max_tokens`; the last token is among those that come out. Mutations are named in the tests; the real engine is
in tests/test_gpu.py.
"""
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare import models
from w2s.compare.answer import answer_texts
from w2s.compare.learn import Study
from w2s.compare.models import know_model, model_lines, open_base
from w2s.compare.preference_arms import know_models
from w2s.compare.preference_settings import WeakTeacher
from w2s.compare.stages import Run, walk_stages
from w2s.compare.toxicity_settings import Toxicity
from w2s.data.samples import sample_preferences
from w2s.errors import ConfigError, ModelError
from w2s.models.adapters import LoraSettings, add_adapter, save_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import pretrain, tiny_model
from w2s.train import generate as page
from w2s.train import vllm_engine
from w2s.train.endings import end_ids
from w2s.train.generate import GenerateSettings, generate, respond
from w2s.train.vllm_engine import check_vllm, load_vllm, sampling_arguments, stop_vllm

SAMPLING = set(
    'allowed_token_ids bad_words detokenize extra_args flat_logprobs frequency_penalty ignore_eos include_stop_str_in_output logit_bias '
    'logprob_token_ids logprobs max_tokens min_p min_tokens n output_kind presence_penalty prompt_logprobs repetition_detection '
    'repetition_penalty routed_experts_prompt_start seed skip_clone skip_reading_prefix_cache skip_special_tokens '
    'spaces_between_special_tokens stop stop_token_ids structured_outputs temperature thinking_token_budget top_k top_p'.split()
)
ENGINE = set(
    'allowed_local_media_path allowed_media_domains attention_config chat_template compilation_config convert cpu_offload_gb '
    'disable_custom_all_reduce dtype enable_return_routed_experts enforce_eager gpu_memory_utilization hf_overrides hf_token '
    'kv_cache_memory_bytes logits_processors mm_processor_kwargs model offload_group_size offload_num_in_group offload_params '
    'offload_prefetch_step pooler_config profiler_config quantization quantization_config revision runner seed skip_tokenizer_init '
    'spec_method spec_model spec_tokens structured_outputs_config tensor_parallel_size tokenizer tokenizer_mode tokenizer_revision '
    'trust_remote_code'.split()
) | {'max_model_len', 'generation_config'}
FULL = LoadSettings('none', 'float32', device='cpu')
FAST = replace(FULL, engine='vllm')
GREEDY = GenerateSettings(max_tokens=14, temperature=0)


class SamplingParams:
    "n, temperature, top_p … of one prompt"
    def __init__(self, **given):
        assert given.keys() <= SAMPLING, given.keys() - SAMPLING
        assert given['top_k'] >= 0 and 0 <= given['temperature'] <= 2 and isinstance(given['stop'], list)
        vars(self).update({'ignore_eos': False, 'stop_token_ids': []} | given)


class LLM:
    "A model of transformers that is asked for one token at a time"
    started, stopped, asked, made = [], [], [], []

    def __init__(self, **given):
        assert given.keys() <= ENGINE, given.keys() - ENGINE
        self.given = given
        self.model = AutoModelForCausalLM.from_pretrained(given['model'], dtype=getattr(torch, given['dtype'])).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(given['tokenizer'])
        assert given['max_model_len'] <= self.model.config.max_position_embeddings
        self.started.append(given)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: self.stopped.append(given)))

    def generate(self, prompts, sampling_params=None, *, use_tqdm=True):
        assert not use_tqdm and len(prompts) == len(sampling_params)
        self.asked.append(len(prompts))
        return [SimpleNamespace(outputs=[self.one(p['prompt_token_ids'], s, k) for k in reversed(range(s.n))])
                for p, s in zip(prompts, sampling_params, strict=True)]

    def one(self, prompt, s, k):
        ids, reason, draw = [], None, torch.Generator().manual_seed(s.seed + k)
        assert len(prompt) + s.max_tokens <= self.given['max_model_len']
        while reason is None:
            with torch.no_grad(): z = self.model(torch.tensor([[*prompt, *ids]])).logits[0, -1].float()
            ids.append(int(z.argmax() if s.temperature == 0 else torch.multinomial((z/s.temperature).softmax(0), 1, generator=draw)))
            text = self.tokenizer.decode(ids, skip_special_tokens=s.skip_special_tokens)
            over = ids[-1] in s.stop_token_ids or ids[-1] == self.tokenizer.eos_token_id and not s.ignore_eos
            reason = 'stop' if over or any(x in text for x in s.stop) else 'length' if len(ids) == s.max_tokens else None
        self.made.append(len(ids))
        return SimpleNamespace(index=k, token_ids=ids, text=text, finish_reason=reason, stop_reason=None)


@pytest.fixture
def vllm(monkeypatch):
    "The stand-in, on a processor"
    for seen in (LLM.started, LLM.stopped, LLM.asked, LLM.made): seen.clear()
    monkeypatch.setitem(sys.modules, 'vllm', SimpleNamespace(LLM=LLM, SamplingParams=SamplingParams, TokensPrompt=dict))
    monkeypatch.setattr(vllm_engine, 'version', lambda name: '0.32.0')
    monkeypatch.setattr(vllm_engine, 'check_vllm', lambda settings: None)
    monkeypatch.setattr(models, 'check_vllm', lambda settings: None)
    return LLM


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A tiny model that answers in sentences, with a second end token in its generation settings"
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(200, seed=1)]
    out = tiny_model(tmp_path_factory.mktemp('tiny')/'model', texts)
    pretrain(out, texts, steps=120)
    (out/'generation_config.json').write_text(json.dumps(dict(eos_token_id=[2, 1])))
    return out


@pytest.fixture(scope='module')
def prompts():
    asked = list(dict.fromkeys(r['prompt'] for r in sample_preferences(30, seed=2)))[:8]
    return [*asked, [dict(role='user', content='What is two and two?')], asked[0], [dict(role='user', content='Who are you?')]]


@pytest.mark.parametrize(
    'how', [GREEDY, replace(GREEDY, max_tokens=40), replace(GREEDY, stop=('.',)), replace(GREEDY, max_tokens=40, stop=('3', '! Th', '\n'))]
)
def test_greedy_texts_are_those_of_w2s(vllm, folder, prompts, how):
    """Text, tokens and end of every response, of texts and messages, and no token beyond the end. Mutations: an end token of
    generation_config.json is not known; no `stop_token_ids`; no `stop`"""
    base, fast = load_base(folder, FULL), load_vllm(folder, FULL)
    assert end_ids(fast.model.shape, fast.tokenizer) == end_ids(base.model, base.tokenizer) == {1, 2}
    ours = respond(base.model, base.tokenizer, prompts, how, quiet=True)
    theirs = respond(fast.model, fast.tokenizer, prompts, how, quiet=True)
    assert theirs == ours
    said = [r for row in ours for r in row]
    assert any(r.ended for r in said) and len({r.tokens for r in said}) > 2
    assert how.stop or not all(r.ended for r in said)
    assert [g['generation_config'] for g in vllm.started] == ['vllm'] and vllm.asked == [10] # one prompt is there twice
    assert sum(vllm.made) == sum(r.tokens for r in said) - ours[9][0].tokens


def test_a_text_is_a_function_of_its_row(vllm, folder, prompts):
    "Not of its neighbours, nor of the number of samples; another name or seed is another text. Mutation: the seed of the run alone"
    fast, how = load_vllm(folder, FULL), GenerateSettings(max_tokens=12, temperature=1., samples=3)
    def made(rows, **more): return generate(fast.model, fast.tokenizer, rows, how, **{'quiet': True} | more)
    whole = made(prompts[:4])
    assert made(prompts[2:4]) == whole[2:]
    assert [x[:2] for x in whole] == generate(fast.model, fast.tokenizer, prompts[:4], replace(how, samples=2), quiet=True)
    assert len({x for row in whole for x in row}) > 9
    assert all(a != b for other in (made(prompts[:4], seed=1), made(prompts[:4], arm='x')) for a, b in zip(other, whole, strict=True))
    same = made([prompts[0]]*2, ids=['a', 'b'])
    assert same[0] != same[1]


def test_a_journal_goes_on(vllm, folder, prompts, tmp_path, monkeypatch):
    "Killed at the second call, and started again; the other engine does not take it. Mutation: the engine is not written down"
    fast, kept, plain = load_vllm(folder, FULL), tmp_path/'texts.jsonl', prompts[:6]
    whole = generate(fast.model, fast.tokenizer, plain, GREEDY, quiet=True)
    monkeypatch.setattr(page, 'AT_ONCE', 2)
    generating = vllm.generate
    def failing(self, *a, **k):
        if len(vllm.asked) == 2: raise KeyboardInterrupt
        return generating(self, *a, **k)
    monkeypatch.setattr(vllm, 'generate', failing)
    with pytest.raises(KeyboardInterrupt): generate(fast.model, fast.tokenizer, plain, GREEDY, quiet=True, journal=kept)
    monkeypatch.setattr(vllm, 'generate', generating)
    assert generate(fast.model, fast.tokenizer, plain, GREEDY, quiet=True, journal=kept) == whole
    assert vllm.asked == [6, 2, 2, 2]
    base = load_base(folder, FULL)
    with pytest.raises(ConfigError, match='vllm 0.32.0'): generate(base.model, base.tokenizer, plain, GREEDY, quiet=True, journal=kept)


def test_the_engine_has_room_for_the_rows(vllm, folder, monkeypatch):
    "The next power of two, not more than the model reads; started anew where that is another number, and stopped before"
    monkeypatch.setattr(vllm_engine, 'LEAST_ROOM', 32)
    fast = load_vllm(folder, FULL)
    for n, room in ((20, 64), (30, 64), (2, 32), (200, 256)): # one begin token and n others, with 14 to come
        generate(fast.model, fast.tokenizer, ['a'*n], GREEDY, quiet=True)
        assert vllm.started[-1]['max_model_len'] == room, n
    assert (len(vllm.started), len(vllm.stopped)) == (3, 2)
    stop_vllm(fast)
    assert len(vllm.stopped) == 3 and fast.model.llm is None
    stop_vllm(load_base(folder, FULL)) # nothing to stop


def test_an_engine_that_does_not_start_is_named(vllm, folder, monkeypatch):
    def refuse(self, **given): raise ValueError('Model architectures are not\n supported')
    monkeypatch.setattr(vllm, '__init__', refuse)
    fast = load_vllm(folder, FULL)
    with pytest.raises(ModelError, match=r'vLLM cannot run it \(Model architectures are not supported\); leave out --engine vllm'):
        generate(fast.model, fast.tokenizer, ['a'], GREEDY, quiet=True)


def test_settings_in_the_words_of_vllm():
    "The ends are those of w2s alone"
    how = GenerateSettings(30, 1.2, .9, 50, samples=4, stop=('x',))
    assert sampling_arguments(how, {7, 2}, 5) == dict(
        n=4, temperature=1.2, top_p=.9, top_k=50, max_tokens=30, stop=['x'], stop_token_ids=[2, 7], ignore_eos=True,
        skip_special_tokens=True, seed=5,
    )


@pytest.mark.parametrize('how, words', [
    (GenerateSettings(no_repeat_ngram=2), 'does not have no_repeat_ngram, and it is 2'),
    (GenerateSettings(temperature=2.5), 'from 0.01 to 2, and not 2.5'),
    (GenerateSettings(temperature=.001), 'and not 0.001'), # vLLM would sample at .01
])
def test_sampling_that_vllm_does_not_have_is_refused(how, words):
    with pytest.raises(ConfigError, match=words): sampling_arguments(how, {2}, 0)


@pytest.mark.parametrize('cls, given, words', [
    (WeakTeacher, dict(load=dict(engine='vlm', quantize='none')), 'did you mean "vllm"'),
    (WeakTeacher, dict(load=dict(engine='vllm')), 'take --quantize none'),
    (WeakTeacher, dict(load=dict(engine='vllm', quantize='none'), temperature=3.), 'and not 3'),
    (WeakTeacher, dict(load=dict(engine='vllm', quantize='none'), machines=dict(devices='0,1')), 'is for one process'),
    (Toxicity, dict(load=dict(engine='vllm', quantize='none'), decoding='ye'), 'no_repeat_ngram'),
])
def test_settings_are_refused_before_anything_is_read(cls, given, words):
    with pytest.raises(ConfigError, match=words): cls(**given)


def test_where_vllm_cannot_run(monkeypatch):
    "Without a GPU, on another GPU, with several processes, and where it is not installed"
    on = lambda device: LoadSettings('none', device=device, engine='vllm') # noqa: E731
    for device in ('cpu', 'cuda:1', 'xpu:0'):
        with pytest.raises(ConfigError, match=f'is to be loaded on {device}'): check_vllm(on(device))
    with pytest.raises(ConfigError, match=r"pip install 'w2s\[vllm\]'"): check_vllm(on('cuda:0'))
    monkeypatch.setattr(vllm_engine, 'version', lambda name: '0.32.0')
    check_vllm(on('cuda:0'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ConfigError, match='without torchrun'): check_vllm(on('cuda:0'))


@pytest.mark.parametrize('words, said', [([], '--quantize none'), (['--quantize', 'none', '--device', 'cpu'], 'on the first CUDA GPU')])
def test_a_command_refuses_before_any_work(tmp_path, words, said):
    done = CliRunner().invoke(app, ['run', 'preferences', '--engine', 'vllm', '--dry-run', '--out', str(tmp_path/'out'), *words])
    assert done.exit_code and isinstance(done.exception, ConfigError) and said in str(done.exception) and not (tmp_path/'out').exists()


def test_a_finished_run_is_read_without_vllm(folder):
    "On any machine, as `w2s export` and the tokens of a result need it. Mutation: `generate` does nothing"
    config = WeakTeacher(weak=str(folder), strong=str(folder), load=FAST)
    with pytest.raises(ConfigError, match='on the first CUDA GPU'): know_models(config)
    assert know_models(config, generate=False)[1].load.engine == 'vllm'


def test_untuned_by_vllm_and_adapters_by_w2s(vllm, folder, prompts, tmp_path):
    """In a comparison: keys, texts, notes and the plan; never is a base in memory beside the engine. Mutations: the key without the engine;
    the adapter left out; the base kept"""
    config = WeakTeacher(weak=str(folder), strong=str(folder), load=FAST)
    study, told = Study(config, Run(tmp_path/'run', lambda line: None), True), prompts[:3]
    model, plain = (know_model('strong', str(folder), replace(config, load=x), writes=True) for x in (FAST, FULL))
    assert 'it generates by vLLM 0.32.0 while it has no adapter, and by w2s with one' in model_lines([model])[0]
    assert 'vLLM' not in model_lines([plain])[0]
    base, adapter = open_base(plain), tmp_path/'adapter'
    worn = add_adapter(base, LoraSettings(rank=2))
    for p in worn.parameters(): p.data += .05*p.requires_grad
    save_adapter(worn, base, adapter)
    worn.unload()
    def ask(m, a=None): return answer_texts(study, m, 'said', a, told, GREEDY)
    def kinds(): return [(p.kind, s.found) for s in walk_stages(study.run, lambda: (ask(model), ask(model, adapter))) for p in s.passes]
    assert kinds() == [('other', False), ('write', False)]
    untuned = ask(model)
    assert len(vllm.asked) == 1 and [type(b.model).__name__ for b in models._OPEN.values()] == ['VllmModel']
    tuned = ask(model, adapter)
    assert len(vllm.asked) == len(vllm.stopped) == 1 # w2s has generated, and the engine is stopped
    assert untuned == ask(plain) != tuned == ask(plain, adapter)
    assert len(list((tmp_path/'run'/'stages').iterdir())) == 3 # the adapter's is one, the untuned model's two
    assert kinds() == [('other', True), ('write', True)]
