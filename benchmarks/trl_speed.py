"""w2s against TRL and transformers, in pairs: `python benchmarks/trl_speed.py --data FILE.jsonl.gz`

Preference rows (`chosen` and `rejected` as whole dialogues, "… Assistant: …") that fit 512 tokens, a base in NF4 that computes in float32,
LoRA of rank 16 on all linear layers, batches of 8 pairs. *TRL* is set up as well as its documentation allows: no gradient checkpointing,
no bfloat16, adapter in float32, reference log-probs computed before training (and counted), rows sorted by length, no logging. *TRL as
started* has TRL's defaults for these, except for bfloat16, which is off there too: random order, gradient checkpointing, reference
computed at each step. *Padded* is w2s with packing and merging switched off. Labelling is compared with a loop over batches of 8 sequences
sorted by length, the class head with the Trainer of transformers on rows sorted by length. *Shared prompts* are rows of random tokens, a
prompt of 512 with two responses of 64, against w2s that computes the prompt with each response. The contenders take turns in one process;
the most memory is that of a process of its own. Writes trl_speed.md.
"""
import argparse
import gzip
import json
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from unittest.mock import patch
from uuid import uuid4

import numpy as np
import pandas as pd
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from w2s.bench.machine import machine_line
from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.class_heads import add_class_adapter
from w2s.models.four_bits import NF4Config
from w2s.models.load import LoadSettings, load_base, load_tokenizer
from w2s.models.zoo import zoo_folder
from w2s.train.class_head import class_logits
from w2s.train.labels import label_objective
from w2s.train.logprobs import score
from w2s.train.loop import TrainSettings, preference_objective, sft_objective, train
from w2s.train.packing import SHARE
from w2s.train.tokens import Encoded, EncodedRow, encode_rows

CUT, BATCH = 512, 8
LORA, PEER = LoraSettings(rank=16, alpha=32), dict(r=16, lora_alpha=32, target_modules='all-linear')
STEP = TrainSettings(batch_size=BATCH, learning_rate=1e-4, warmup=0, schedule='constant', checkpoint_every=10**6)
QUIET = dict(
    report_to=[],
    logging_strategy='no',
    save_strategy='no',
    disable_tqdm=True,
    learning_rate=1e-4,
    lr_scheduler_type='constant',
    num_train_epochs=1,
    per_device_train_batch_size=BATCH,
    bf16=False,
    use_cpu=True,
)


def read_rows(file: Path, tokenizer, n: int) -> tuple[list[dict], list[EncodedRow]]:
    "The first rows that fit, as texts and as tokens"
    texts = []
    with gzip.open(file, 'rt', encoding='utf-8') as lines:
        for line in lines:
            r = json.loads(line)
            k = r['chosen'].rfind('\n\nAssistant:') + len('\n\nAssistant:')
            if r['rejected'].startswith(r['chosen'][:k]):
                texts.append(dict(id=str(len(texts)), prompt=r['chosen'][:k], chosen=r['chosen'][k:], rejected=r['rejected'][k:]))
            if len(texts) == 4*n + 40: break
    rows = [r for r in encode_rows(tokenizer, Dataset.from_list(texts), ('chosen', 'rejected'), CUT).rows if not r.cut][:n]
    return [texts[int(r.id)] for r in rows], rows


def write_model(name: str, place: Path) -> str:
    """The folder of a model: of the ladder with positions for 512 tokens, or a random Llama of 25 million weights; both with the tokenizer
    of `place`"""
    folder = place/name
    if folder.exists(): return str(folder)
    if name == 'l25':
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=8192,
                hidden_size=512,
                intermediate_size=1536,
                num_hidden_layers=6,
                num_attention_heads=8,
                max_position_embeddings=2*CUT,
            )
        )
    else: model = AutoModelForCausalLM.from_pretrained(zoo_folder(name))
    model.config.max_position_embeddings = 2*CUT
    model.save_pretrained(folder)
    load_tokenizer('base').save_pretrained(folder)
    return str(folder)


def peer(folder: str, kind=AutoModelForCausalLM, **more):
    "The same base for the others"
    return kind.from_pretrained(folder, quantization_config=NF4Config(torch.float32), dtype=torch.float32, device_map={'': 'cpu'}, **more)


def in_32_bits(trainer):
    for p in trainer.model.parameters():
        if p.requires_grad: p.data = p.data.float()
    return trainer


def by_length(rows: list[EncodedRow]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: max(len(s.ids) for s in rows[i].sequences))


class Ours:
    def __init__(self, folder: str, texts, rows, plain=False, shared=True):
        self.share = SHARE if shared else CUT*2 # a prompt shorter than this goes through the model with each response
        self.base, self.rows = (
            load_base(folder, LoadSettings('nf4', 'float32', device='cpu', **(dict(packing='off', merging='off') if plain else {}))),
            rows,
        )

    def run(self, goal, make=add_adapter) -> None:
        model = make(self.base, LORA)
        train(model, goal, STEP, tempfile.mkdtemp(), quiet=True)
        model.unload()

    def dpo(self): self.run(preference_objective(self.rows, score(self.base.model, self.rows, quiet=True)))
    def dpo_prompts(self):
        with patch('w2s.train.packing.SHARE', self.share): self.dpo()
    def label_prompts(self):
        with patch('w2s.train.packing.SHARE', self.share): self.label()
    def sft(self): self.run(sft_objective(self.rows))
    def label(self):
        for _ in range(2): score(self.base.model, self.rows, quiet=True)
    def head(self):
        texts = [EncodedRow(r.id, (Encoded(r.sequences[0].ids, len(r.sequences[0].ids)),), 0) for r in self.rows]
        self.run(label_objective(texts, [[i % 2, 1 - i % 2] for i in range(len(texts))], forward=class_logits), add_class_adapter)


class Theirs:
    def __init__(self, folder: str, texts, rows, best=True):
        self.folder, self.tokenizer, self.best = folder, load_tokenizer(folder), best
        order = by_length(rows) if best else range(len(rows))
        self.texts, self.rows = [texts[i] for i in order], [rows[i] for i in order]

    def setup(self, **more):
        best = dict(train_sampling_strategy='sequential', gradient_checkpointing=False, **more)
        return QUIET | (best if self.best else {})

    def finish(self, trainer): return in_32_bits(trainer) if self.best else trainer
    def table(self, *columns): return Dataset.from_list([{c: t[c] for c in columns} for t in self.texts])

    def dpo(self):
        from trl import DPOConfig, DPOTrainer
        args = DPOConfig(
            tempfile.mkdtemp(),
            max_length=CUT,
            beta=0.1,
            **self.setup(precompute_ref_log_probs=True, precompute_ref_batch_size=BATCH),
        )
        plain, self.reference = DPOTrainer._precompute_ref_logps, (0., 0.)
        def timed(trainer, dataset, *a):
            dataset._fingerprint = uuid4().hex # or it would find those of the run before
            out = []
            self.reference = clocked(lambda: out.append(plain(trainer, dataset, *a)))
            return out[0]

        with patch.object(DPOTrainer, '_precompute_ref_logps', timed):
            trainer = self.finish(
                DPOTrainer(
                    peer(self.folder),
                    args=args,
                    train_dataset=self.table('prompt', 'chosen', 'rejected'),
                    processing_class=self.tokenizer,
                    peft_config=LoraConfig(task_type='CAUSAL_LM', **PEER),
                )
            )
        return trainer.train

    def sft(self):
        from trl import SFTConfig, SFTTrainer
        data = Dataset.from_list([dict(prompt=t['prompt'], completion=t['chosen']) for t in self.texts])
        args = SFTConfig(tempfile.mkdtemp(), max_length=CUT, completion_only_loss=True, **self.setup())
        return self.finish(
            SFTTrainer(
                peer(self.folder),
                args=args,
                train_dataset=data,
                processing_class=self.tokenizer,
                peft_config=LoraConfig(task_type='CAUSAL_LM', **PEER),
            )
        ).train

    def label(self):
        model = peer(self.folder)
        flat = sorted((s for r in self.rows for s in r.sequences), key=lambda s: len(s.ids))
        def loop():
            for _ in range(2):
                for i in range(0, len(flat), BATCH):
                    some = flat[i:i + BATCH]
                    time_ = max(len(s.ids) for s in some)
                    ids = torch.tensor([[*s.ids, *[0]*(time_ - len(s.ids))] for s in some])
                    mask = torch.tensor([[1]*len(s.ids) + [0]*(time_ - len(s.ids)) for s in some])
                    with torch.no_grad():
                        logps = (
                            model(input_ids=ids, attention_mask=mask)
                            .logits[:, :-1]
                            .log_softmax(-1)
                            .gather(2, ids[:, 1:, None])[..., 0]
                        )
                    for n, s in enumerate(some): float(logps[n, s.start - 1:len(s.ids) - 1].sum())
        return loop

    def head(self):
        from peft import get_peft_model
        model = get_peft_model(
            peer(self.folder, AutoModelForSequenceClassification, num_labels=2, pad_token_id=self.tokenizer.pad_token_id or 0),
            LoraConfig(task_type='SEQ_CLS', **PEER),
        )
        data = Dataset.from_list([dict(input_ids=list(r.sequences[0].ids), labels=i % 2) for i, r in enumerate(self.rows)])
        def collate(some):
            longest = max(len(x['input_ids']) for x in some)
            return dict(
                input_ids=torch.tensor([x['input_ids'] + [0] * (longest - len(x['input_ids'])) for x in some]),
                labels=torch.tensor([x['labels'] for x in some]),
                attention_mask=torch.tensor([[1] * len(x['input_ids']) + [0] * (longest - len(x['input_ids'])) for x in some]),
            )
        args = TrainingArguments(tempfile.mkdtemp(), **self.setup())
        return Trainer(model, args, train_dataset=data, data_collator=collate).train


def peak() -> float:
    "GiB: the most that this process has had; what it was forked from does not count"
    return int(re.findall(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text(encoding='utf-8'))[0])/2**20


def clocked(work) -> tuple[float, float]:
    "Processor seconds, and seconds"
    a, b = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - a, time.perf_counter() - b


CASES = { # task -> what it is, contenders beside ours, pairs by model
    'dpo': ('DPO, reference counted in', ('theirs', 'plain', 'user'), {'base': 16, 'l25': 8}),
    'dpo_prompts': ('DPO, shared prompts', ('alone',), {'l25': 8}),
    'sft': ('SFT', ('theirs', 'user'), {'base': 16, 'l25': 8}),
    'label': ('label pairs (two passes)', ('theirs',), {'base': 32, 'l25': 16}),
    'head': ('class head', ('theirs',), {'base': 16, 'l25': 8}),
    'label_prompts': ('label pairs, shared prompts', ('alone',), {'l25': 8}),
}
NAMES = {'theirs': 'TRL or transformers', 'plain': 'padded', 'user': 'TRL as started', 'alone': 'prompts not shared'}
FEW = {'plain': 1, 'user': 1} # turns of contenders that take fewer
MEMORY = ('dpo', 'sft') # tasks whose memory is measured, each contender in a process of its own


def random_rows(n: int) -> list[EncodedRow]:
    "Prompts of 512 random tokens, each with two responses of 64"
    rng = np.random.default_rng(0)
    def tokens(k: int) -> tuple[int, ...]: return tuple(rng.integers(3, 8000, k).tolist())
    prompts = [tokens(CUT) for _ in range(n)]
    return [EncodedRow(str(i), tuple(Encoded((*p, *tokens(64)), CUT) for _ in range(2)), 0) for i, p in enumerate(prompts)]


def seconds(who: str, task: str, made) -> tuple[float, float]:
    if who not in ('theirs', 'user'): return clocked(getattr(made, task))
    made.reference = (0., 0.) # the trainer computes it when it is made
    work = getattr(made, task)()
    a, b = clocked(work)
    return a + made.reference[0], b + made.reference[1]


def open_one(who: str, task: str, folder: str, n: int, file: Path):
    texts, rows = ([], random_rows(n)) if 'prompts' in task else read_rows(file, load_tokenizer(folder), n)
    if who in ('theirs', 'user'): return Theirs(folder, texts, rows, who == 'theirs')
    return Ours(folder, texts, rows, who == 'plain', who != 'alone')


def most_memory(who: str, task: str, folder: str, n: int, file: Path) -> float:
    words = [sys.executable, __file__, '--peak', who, task, folder, str(n), '--data', str(file)]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])


def take_turns(task: str, folder: str, n: int, repeats: int, file: Path) -> pd.DataFrame:
    "A row per turn: who, repeat, cpu and wall"
    made, found = {who: open_one(who, task, folder, n, file) for who in ('ours', *CASES[task][1])}, []
    for repeat in range(repeats):
        for who, one in made.items():
            if repeat < FEW.get(who, repeats):
                cpu, wall = seconds(who, task, one)
                found.append(dict(who=who, repeat=repeat, cpu=cpu, wall=wall))
    return pd.DataFrame(found)


def lines_of(task: str, name: str, folder: str, n: int, repeats: int, file: Path) -> list[str]:
    turns, lines = take_turns(task, folder, n, repeats, file), []
    cpu, wall = (turns.pivot(index='repeat', columns='who', values=k) for k in ('cpu', 'wall'))
    own = most_memory('ours', task, folder, n, file) if task in MEMORY else None
    for who in CASES[task][1]:
        ratio = (cpu[who]/cpu['ours']).dropna()
        other = most_memory(who, task, folder, n, file) if own and who == 'theirs' else None
        memory = f'{own:.2f} | {other:.2f} | {own / other:.2f}' if own and other else '– | – | –'
        spread = f' ({ratio.min():.2f} to {ratio.max():.2f})' if len(ratio) > 1 else ''
        lines.append(
            f'| {CASES[task][0]} | {name} | {n} | {NAMES[who]} | {len(ratio)} | {cpu["ours"].median():.2f} | {cpu[who].median():.2f} | '
            f'**{ratio.median():.2f}**{spread} | {(wall[who] / wall["ours"]).median():.2f} | {memory} |'
        )
        print(lines[-1], flush=True)
    return lines


def write(lines: list[str]) -> None:
    import trl

    head = [
        '| task | model | pairs | against | turns | w2s, s | other, s | other per w2s | the same in wall time | w2s, GiB | other, GiB | '
        'w2s per other |',
        '|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|',
    ]
    said = (
        f'{machine_line()}; torch {torch.__version__}, transformers {transformers.__version__}, TRL {trl.__version__}. Processor seconds: '
        'medians; the ratio is the median of those of the turns (with lowest and highest). Other work ran on the machine, so wall time is '
        'shown as a ratio only. "base" is the largest of the ladder, "l25" a random Llama of 25 million weights (hidden 512, 6 layers, '
        'feed-forward 1,536, vocabulary 8,192). Memory includes Python and its libraries (about 0.6 GiB).'
    )
    text = ['# w2s against TRL and transformers', '', (__doc__ or '').split('\n\n')[1].rsplit(' Writes', 1)[0], '', said, '', *head, *lines]
    Path(__file__).with_suffix('.md').write_text('\n'.join(text) + '\n', encoding='utf-8')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--models', nargs='+', default=['base', 'l25'])
    parser.add_argument('--tasks', nargs='+', default=list(CASES))
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--peak', nargs=4, help='measure the memory of one contender')
    a = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    transformers.logging.set_verbosity_error()
    if a.peak:
        who, task, folder, n = a.peak
        seconds(who, task, open_one(who, task, folder, int(n), a.data))
        return print(peak())
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        for task in a.tasks:
            for name in a.models:
                if (n := CASES[task][2].get(name)) is None: continue
                lines += lines_of(task, name, write_model(name, Path(place)), n, a.repeats, a.data)
                write(lines)


if __name__ == '__main__': main()
