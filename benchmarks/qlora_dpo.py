"""Speed and memory of a DPO step by sequence length and precision: `python benchmarks/qlora_dpo.py`

A random Llama of the given shape, an adapter on all its linear layers, and a full micro-batch of pairs: tokens a second for training
(forward, backward) and for scoring, and the most memory over the process (GPU: the most that was allocated). Nobody publishes this table
for DPO with a 4-bit base; a random model is as fast as a trained one. On a GPU give it a real shape, for example
`--hidden 4096 --layers 32 --vocabulary 128256 --lengths 512 1024 2048 --checkpointing`. Writes qlora_dpo.md beside this file.
"""
import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from memory_vocabulary import machine
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from w2s.models.adapters import add_adapter
from w2s.models.load import Base, LoadSettings, load_base, set_mode
from w2s.models.tiny import tiny_tokenizer
from w2s.train.logprobs import score
from w2s.train.loop import TrainSettings, preference_objective, step_gradient
from w2s.train.tokens import Encoded, EncodedRow

PRECISIONS = {
    'nf4, bfloat16': LoadSettings('nf4', 'bfloat16'),
    'bfloat16': LoadSettings('none', 'bfloat16'),
    'float32': LoadSettings('none', 'float32'),
}


def write_model(folder: Path, hidden: int, layers: int, vocabulary: int, context: int) -> Path:
    "A random Llama of a shape, saved in bfloat16, with a tokenizer that is never used"
    config = LlamaConfig(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=hidden*11//4 // 64 * 64, num_hidden_layers=layers,
                         num_attention_heads=max(1, hidden//64), max_position_embeddings=context, tie_word_embeddings=False)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(['a tokenizer']).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    return folder


def pairs(length: int, tokens: int, vocabulary: int) -> list[EncodedRow]:
    "Random pairs of one length: half prompt, half response"
    rng = np.random.default_rng(0)
    def one() -> Encoded: return Encoded(tuple(rng.integers(3, vocabulary, length).tolist()), length//2)
    return [EncodedRow(str(i), (one(), one()), 0) for i in range(max(1, tokens // (2*length)))]


def seconds(work, device: torch.device, repeats: int = 3) -> float:
    "The median time of some repeats, after one that is not counted"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device.type == 'cuda': torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def peak(device: torch.device) -> float:
    "GiB: the most that was allocated on the GPU, or the most that the process has had"
    if device.type == 'cuda': return torch.cuda.max_memory_allocated()/2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20


def measure(base: Base, length: int, budget: int, checkpointing: bool) -> tuple[float, float, float]:
    "Tokens a second in training and in scoring, and GiB"
    rows, device = pairs(length, budget, base.model.config.vocab_size), base.model.device
    tokens, settings = sum(len(s.ids) for r in rows for s in r.sequences), TrainSettings(token_budget=budget)
    goal, model = preference_objective(rows, np.zeros((len(rows), 2))), add_adapter(base)
    if device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
    if checkpointing: model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})
    set_mode(model, True)
    train = seconds(lambda: step_gradient(model, goal, range(len(rows)), settings.token_budget), device)
    scoring = seconds(lambda: score(model, rows, budget, quiet=True), device)
    if checkpointing: model.gradient_checkpointing_disable()
    model.unload()
    return tokens/train, tokens/scoring, peak(device)


def main() -> None:
    "Measure, print and write"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--hidden', type=int, default=256)
    parser.add_argument('--layers', type=int, default=5)
    parser.add_argument('--vocabulary', type=int, default=4096)
    parser.add_argument('--lengths', type=int, nargs='+', default=[128, 256, 512])
    parser.add_argument('--budget', type=int, default=8192, help='tokens of a micro-batch')
    parser.add_argument('--checkpointing', action='store_true')
    a = parser.parse_args()
    lines = ['| base | sequence | training, tokens/s | scoring, tokens/s | peak, GiB |', '|---|---:|---:|---:|---:|']
    with tempfile.TemporaryDirectory() as tmp:
        folder = write_model(Path(tmp)/'model', a.hidden, a.layers, a.vocabulary, max(a.lengths))
        for name, settings in PRECISIONS.items():
            base = load_base(folder, settings)
            for length in a.lengths:
                train, scoring, memory = measure(base, length, a.budget, a.checkpointing)
                lines.append(f'| {name} | {length} | {train:,.0f} | {scoring:,.0f} | {memory:.2f} |')
                print(lines[-1], file=sys.stderr)
            size = base.model.num_parameters()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    text = (
        f'# A DPO step with an adapter, by precision and length\n\nRandom Llama, {size:,} parameters (width {a.hidden}, {a.layers} layers, '
        f'{a.vocabulary:,} words), LoRA rank 8 on all linear layers, micro-batches of {a.budget:,} tokens, gradient checkpointing '
        f'{"on" if a.checkpointing else "off"}; the median of three.\n\n'
        + '\n'.join(lines)
        + f'\n\nPeak: {"allocated on the GPU" if device == "cuda" else "of the whole process so far, so it never falls from row to row"}. '
        f'Measured on {machine(device)}; made by `python benchmarks/qlora_dpo.py`.\n'
    )
    print(text)
    Path(__file__).with_suffix('.md').write_text(text, encoding='utf-8')


if __name__ == '__main__': main()
