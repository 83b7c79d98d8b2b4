"The last layer is computed where something is predicted: in every family the same log-probs and gradients, or the whole layer"
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from w2s.train.last_layer import last_layer_at, token_wise
from w2s.train.logprobs import response_logps
from w2s.train.packed_models import TRIMS, packed_states, why_not_packed
from w2s.train.packing import pack
from w2s.train.tokens import Encoded

SIZE = dict(vocab_size=120, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES = {
    'llama': {}, 'mistral': dict(sliding_window=6), 'qwen2': {}, 'qwen3': {}, 'gemma': {}, 'gemma3_text': dict(sliding_window=6),
    'olmo2': {}, 'granite': {}, 'smollm3': {}, 'starcoder2': {}, 'stablelm': {},
}
WHOLE = {'gpt2': dict(n_embd=32, n_head=4, n_layer=2, vocab_size=120), 'phi3': SIZE, 'opt': dict(SIZE, ffn_dim=48, word_embed_proj_dim=32)}
SEQUENCES = [Encoded(tuple(range(5, 5 + n)), start) for n, start in ((20, 12), (17, 12), (25, 12), (9, 4))]


def model_of(kind, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **more)).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(.05*torch.randn_like(p))
    return model


def numbers(model, trim):
    "Log-probs of the responses, and gradients of all weights"
    setattr(model, TRIMS, trim)
    model.zero_grad()
    logps = response_logps(model, pack(SEQUENCES))
    logps.sum().backward()
    return [logps.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize('kind', FAMILIES)
def test_log_probs_and_gradients_are_the_same(kind):
    model = model_of(kind, **SIZE, **FAMILIES[kind])
    assert why_not_packed(model) == '' and getattr(model, TRIMS) is True
    for a, b in zip(numbers(model, False), numbers(model, True), strict=True):
        assert (a - b).abs().max() <= 1e-5*max(1., a.abs().max().item())


@pytest.mark.parametrize('kind', WHOLE)
def test_a_model_with_other_names_keeps_its_whole_last_layer(kind):
    model = model_of(kind, **WHOLE[kind])
    why_not_packed(model)
    assert token_wise(model.get_decoder()) == [] and getattr(model, TRIMS, False) is False


def test_fewer_tokens_go_through_the_last_layer_only():
    model = model_of('llama', **SIZE)
    seen = []
    for layer in model.model.layers: layer.mlp.up_proj.register_forward_hook(lambda m, x, y: seen.append(x[0].shape[1]))
    why_not_packed(model)
    seen.clear()
    data = pack(SEQUENCES)
    with torch.no_grad(): response_logps(model, data)
    assert seen == [data.input_ids.shape[1], len(data.position.unique())] and seen[1] < seen[0]


@pytest.mark.filterwarnings('ignore::w2s.errors.W2SWarning')
def test_a_layer_that_mixes_tokens_is_found_out():
    "By the trial: its feed-forward part looks at the token before"
    model = model_of('llama', **SIZE)
    mlp = model.model.layers[-1].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x + x.roll(1, 1))
    why_not_packed(model)
    assert getattr(model, TRIMS, False) is False


def test_the_model_is_as_before():
    "Also after an error"
    model = model_of('llama', **SIZE)
    before = [m.forward for m in token_wise(model.model)]
    with pytest.raises(ZeroDivisionError), last_layer_at(model.model, torch.tensor([1])): raise ZeroDivisionError
    assert [m.forward for m in token_wise(model.model)] == before and not any('forward' in vars(m) for m in token_wise(model.model))
    why_not_packed(model)
    with torch.no_grad(): assert packed_states(model, pack(SEQUENCES)).isfinite().all()
