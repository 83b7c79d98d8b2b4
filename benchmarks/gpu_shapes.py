"""Ours against TRL and transformers on the shapes of models that people train: `python benchmarks/gpu_shapes.py [--shapes opt-1.3b …]`

Models with random weights in the shapes of OPT-1.3B and Llama-3-8B, bases in NF4, LoRA of rank 16 on all linear layers; `w2s bench` does
the measuring. A model with random weights is as fast as a trained one, except that its responses never end. Writes a folder per shape
with bench.md, bench.csv, turns.csv and bench.png.
"""
import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
import transformers

from w2s.bench.jobs import WORDS
from w2s.bench.run import bench, write_bench
from w2s.models.tiny import tiny_tokenizer

LLAMA = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
             vocab_size=128256)
OPT = dict(hidden_size=2048, ffn_dim=8192, num_hidden_layers=24, num_attention_heads=32, vocab_size=50272, word_embed_proj_dim=2048)
SHAPES = {
    'opt-1.3b': lambda: transformers.OPTConfig(**OPT, max_position_embeddings=4096, dropout=0., attention_dropout=0.),
    'llama-3-8b': lambda: transformers.LlamaConfig(**LLAMA, max_position_embeddings=8192, rope_theta=5e5, tie_word_embeddings=False),
    'llama-25m': lambda: transformers.LlamaConfig(hidden_size=512, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=8,
                                                  vocab_size=8192, max_position_embeddings=4096, tie_word_embeddings=False),
}


def write_model(folder: Path, shape: str) -> Path:
    "Random weights of a shape in bfloat16, and a tokenizer that knows the words of the benchmark"
    config = SHAPES[shape]()
    torch.manual_seed(0)
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try: model = transformers.AutoModelForCausalLM.from_config(config)
        finally: torch.set_default_dtype(before)
    tokenizer = tiny_tokenizer([' '.join(WORDS)])
    config.pad_token_id, config.bos_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    model.config = config
    model.generation_config = transformers.GenerationConfig.from_model_config(config)
    model.save_pretrained(folder, max_shard_size='4GB')
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    "Measure every shape"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=['opt-1.3b', 'llama-3-8b'], choices=list(SHAPES))
    parser.add_argument('--what', nargs='+', default=['dpo', 'sft', 'label', 'generate'])
    parser.add_argument('--lengths', nargs='+', type=int, default=[512, 1024, 2048])
    parser.add_argument('--rows', type=int, default=16)
    parser.add_argument('--batch-size', type=int, default=8)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--out', type=Path, default=Path('gpu_shapes'))
    args = parser.parse_args()
    for shape in args.shapes:
        with tempfile.TemporaryDirectory() as tmp:
            folder = write_model(Path(tmp)/shape, shape)
            if torch.cuda.is_available(): torch.cuda.empty_cache()
            found = bench(str(folder), args.what, args.lengths, args.batch_size, args.rows, args.repeats, say=partial(print, flush=True))
            print(write_bench(found, args.out/shape))


if __name__ == '__main__': main()
