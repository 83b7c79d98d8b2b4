"""Memory of a training step: the estimate against what is counted and allocated: `python benchmarks/step_memory.py`

First the real shapes of public models, without their weights: the estimate, made of two and four layers, against a step of all of
them. Then models that are there, with random weights: the estimate against every allocation that PyTorch's profiler reports on a
CPU, or `torch.cuda.max_memory_allocated` on a GPU. Writes step_memory.md beside this file.
"""
import argparse
import platform
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from memory_vocabulary import peak_bytes
from peft import LoraConfig, get_peft_model

from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.load import LoadSettings, load_base
from w2s.models.tiny import tiny_model
from w2s.train.batches import block
from w2s.train.checkpoints import trainable
from w2s.train.logprobs import response_logps
from w2s.train.step_memory import compute_twice, count_step, estimate_step, twin
from w2s.train.tokens import Encoded

SHAPES: dict[str, Any] = {
    'OPT-125M': transformers.OPTConfig(),
    'OPT-1.3B': transformers.OPTConfig(hidden_size=2048, num_hidden_layers=24, ffn_dim=8192, num_attention_heads=32),
    'Qwen2.5-0.5B': transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    'Llama-3-8B': transformers.LlamaConfig(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    ),
}


def shaped(config: Any) -> Any:
    "A model of this configuration, without weights, with an adapter on each linear layer"
    with torch.device('meta'):
        bare = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).requires_grad_(False)
        return get_peft_model(bare, LoraConfig(r=8, task_type='CAUSAL_LM', target_modules='all-linear'))


def counted_rows(tokens: int, time_: int) -> Iterator[str]:
    "A line for each shape and way"
    for name, config in SHAPES.items():
        model = shaped(config)
        for twice in (False, True):
            start = time.perf_counter()
            found = estimate_step(model, time_, twice, tokens).at(tokens)
            took = time.perf_counter() - start
            real = count_step(twin(model), tokens//time_, time_, twice)
            yield (f'| {name} | {"checkpointing" if twice else "plain"} | {found/2**30:.2f} | {real/2**30:.2f} | {found/real - 1:+.1%} | '
                   f'{took:.1f} |')


def allocated_rows(device: str) -> Iterator[str]:
    "A line for each size, number of bits and way"
    with tempfile.TemporaryDirectory() as tmp:
        for hidden, layers in ((128, 6), (256, 8)):
            folder = tiny_model(Path(tmp)/str(hidden), ['The fox lives by the river.']*20, hidden=hidden, layers=layers)
            for bits in ('none', 'nf4'):
                model = add_adapter(load_base(folder, LoadSettings(bits, 'float32', device=device)), LoraSettings())
                data, weights = block([Encoded(tuple([5]*128), 64)]*16), list(trainable(model).values())
                for twice in (False, True):
                    compute_twice(model, twice)
                    def work(model: Any = model, data: Any = data, weights: Any = weights) -> Any:
                        return torch.autograd.grad(response_logps(model, data).sum(), weights)
                    work()
                    real, found = peak_bytes(work, device), estimate_step(model, 128, twice, 16*128).at(16*128)
                    yield (f'| {hidden} wide, {layers} layers, {"4 bits" if bits == "nf4" else "float32"} | '
                           f'{"checkpointing" if twice else "plain"} | {found/2**20:.1f} | {real/2**20:.1f} | {found/real - 1:+.1%} |')
                compute_twice(model, False)
                model.unload()


def main() -> None:
    "Count, measure, write"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--tokens', type=int, default=8192)
    parser.add_argument('--time', type=int, default=512)
    args = parser.parse_args()
    device, lines = 'cuda' if torch.cuda.is_available() else 'cpu', []
    def say(line: str) -> None:
        lines.append(line)
        print(line, flush=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', FutureWarning)
        say(
            f'# Memory of a training step\n\nPyTorch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}, '
            f'{device}. `python benchmarks/step_memory.py`\n'
        )
        say(
            f'Real shapes in bfloat16 without weights, LoRA of rank 8, one block of {args.tokens:,} tokens in sequences of {args.time}; '
            'GiB beyond the weights, seconds of the estimate.\n'
        )
        say('| model | | estimated | counted | | s |\n|---|---|---|---|---|---|')
        for line in counted_rows(args.tokens, args.time): say(line)
        say(
            '\nModels with weights, 2,048 tokens; MiB, by the profiler on a CPU, by the allocator on a GPU.\n\n| model | | estimated | '
            'allocated | |\n|---|---|---|---|---|'
        )
        for line in allocated_rows(device): say(line)
    Path(__file__).with_suffix('.md').write_text('\n'.join(lines) + '\n', encoding='utf-8')


if __name__ == '__main__': main()
