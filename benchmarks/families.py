"""Families of models and commands: right, or refused in a sentence. `python benchmarks/families.py > benchmarks/families.md`

Each family is tiny and has random weights, but it is made of the classes of transformers, and its tokenizer is one of ten kinds. Each
command is run on a few rows and through to its end. Where a student was trained, its log-probs are held against the model's own logits.
"""
import argparse
import contextlib
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ['HF_HUB_OFFLINE'] = '1'
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'tests'))
warnings.filterwarnings('ignore')

from families import ALIKE, COMMANDS, FAMILIES, TOKENIZERS, make_model, tried, write_rows

ALIKE += ('granitemoe', 'qwen2_moe', 'nanochat', 'jetmoe', 'qwen3_5')


def one(family: str, tokenizer: str, home: Path) -> dict[str, str]:
    "What became of each command; an error that is no sentence of w2s is a fault"
    model, rows = make_model(family, home/'model', tokenizer), home/'rows'
    rows.mkdir()
    # messages, also for a tokenizer without a template
    write_rows(rows, chat=TOKENIZERS[tokenizer].get('template', False) or tokenizer == 'no pad')
    out = {}
    for command in COMMANDS:
        try:
            with contextlib.redirect_stdout(sys.stderr): out[command] = tried(command, model, rows, home/command)
        except Exception as e: out[command] = f'FAULT {type(e).__name__}: {" ".join(str(e).split())[:200]}'
    return out


def shown(sentence: str, notes: dict[str, int], family: str, home: Path) -> str:
    "A cell: the number of the sentence in which it is refused"
    if sentence == 'right': return sentence
    text = sentence.replace(str(home/'model'), 'MODEL').replace(str(home), 'HOME').replace('|', '\\|')
    return f'{"FAULT" if sentence.startswith("FAULT") else "refused"} ({notes.setdefault(text, len(notes) + 1)})'


def main() -> None:
    "Print the table"
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', default='', help='families, with commas between them')
    parser.add_argument('--all', action='store_true', help='also those that are nearly as another one')
    args = parser.parse_args()
    asked = args.only
    families, kinds, notes, lines, start = (
        asked.split(',') if asked else [f for f in FAMILIES if args.all or f not in ALIKE],
        list(TOKENIZERS),
        dict[str, int](),
        [],
        time.monotonic(),
    )
    counts = dict(right=0, refused=0, FAULT=0)
    for n, family in enumerate(families):
        with tempfile.TemporaryDirectory() as place:
            home, tokenizer = Path(place), kinds[list(FAMILIES).index(family) % len(kinds)]
            cells = [shown(s, notes, family, home) for s in one(family, tokenizer, home).values()]
        for c in cells: counts[c.split()[0]] += 1
        lines.append(f'| {family} | {tokenizer} | ' + ' | '.join(cells) + ' |')
        print(f'{n + 1} of {len(families)}: {lines[-1]}', file=sys.stderr, flush=True)
    print(
        '# Families of models and commands\n\nMade by `python benchmarks/families.py > benchmarks/families.md`. Tiny models with random '
        'weights, of the classes of transformers; '
        f'transformers {version("transformers")}, PEFT {version("peft")}, bitsandbytes {version("bitsandbytes")}, on a CPU, seed 0, '
        f'{time.monotonic() - start:.0f} s.\n\n'
        '*Right*: the command ran through to its end with finite numbers, and the log-probs of the trained student were those of its own '
        'logits (to 1e-4 in 32 bits, 3 % in NF4 with bfloat16). '
        'Columns without a number of bits: 32 bits; words: NF4. Rows are messages for tokenizers with a template and for those without a '
        'pad token (and so without a template), else texts.\n\n'
        f'{len(families)} families × {len(COMMANDS)} commands: {counts["right"]} right, {counts["refused"]} refused in a sentence, '
        f'{counts["FAULT"]} neither.\n'
    )
    print('| family | tokenizer | ' + ' | '.join(COMMANDS) + ' |\n|' + '---|'*(len(COMMANDS) + 2))
    print('\n'.join(lines) + '\n')
    for text, n in notes.items(): print(f'{n}. {text}')


if __name__ == '__main__': main()
