"""Ours against TRL and transformers, in pairs: `python benchmarks/trl_speed.py --data FILE.jsonl.gz`

Rows of preferences (`chosen` and `rejected` as whole dialogues, "… Assistant: …") cut at 512 tokens, a base in NF4 that computes in
float32, LoRA of rank 16 on all linear layers, batches of 8. TRL is set up at its best: no gradient checkpointing, no bfloat16, adapter in
float32, reference log-probs computed before, rows sorted by length, no logging. Each pair of contenders runs in turn in one process;
medians of some repeats, processor seconds and wall; the most memory in a process of its own. Ours once more as it is without packing and
merging. Writes trl_speed.md.
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
import torch
import transformers
from datasets import Dataset
from memory_vocabulary import machine
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from w2s.models.adapters import LoraSettings, add_adapter
from w2s.models.class_heads import add_class_adapter
from w2s.models.four_bits import NF4Config
from w2s.models.load import LoadSettings, load_base, load_tokenizer
from w2s.models.zoo import zoo_folder
from w2s.train.class_head import class_logits
from w2s.train.labels import label_objective
from w2s.train.logprobs import score
from w2s.train.loop import TrainSettings, preference_objective, sft_objective, train
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
    gradient_checkpointing=False,
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
                max_position_embeddings=CUT,
            )
        )
    else: model = AutoModelForCausalLM.from_pretrained(zoo_folder(name))
    model.config.max_position_embeddings = CUT
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
    def __init__(self, folder: str, texts, rows, plain=False):
        self.base, self.rows = (
            load_base(folder, LoadSettings('nf4', 'float32', device='cpu', **(dict(packing='off', merging='off') if plain else {}))),
            rows,
        )

    def run(self, goal, make=add_adapter) -> None:
        model = make(self.base, LORA)
        train(model, goal, STEP, tempfile.mkdtemp(), quiet=True)
        model.unload()

    def dpo(self): self.run(preference_objective(self.rows, score(self.base.model, self.rows, quiet=True)))
    def sft(self): self.run(sft_objective(self.rows))
    def label(self):
        for _ in range(2): score(self.base.model, self.rows, quiet=True)
    def head(self):
        texts = [EncodedRow(r.id, (Encoded(r.sequences[0].ids, len(r.sequences[0].ids)),), 0) for r in self.rows]
        self.run(label_objective(texts, [[i % 2, 1 - i % 2] for i in range(len(texts))], forward=class_logits), add_class_adapter)


class Theirs:
    def __init__(self, folder: str, texts, rows):
        self.folder, self.tokenizer = folder, load_tokenizer(folder)
        self.texts, self.rows = [texts[i] for i in by_length(rows)], [rows[i] for i in by_length(rows)]
        self.model = peer(folder)

    def table(self, *columns): return Dataset.from_list([{c: t[c] for c in columns} for t in self.texts])

    def dpo(self):
        from trl import DPOConfig, DPOTrainer
        args = DPOConfig(
            tempfile.mkdtemp(),
            precompute_ref_log_probs=True,
            max_length=CUT,
            beta=0.1,
            train_sampling_strategy='sequential',
            precompute_ref_batch_size=BATCH,
            **QUIET,
        )
        plain, self.reference = DPOTrainer._precompute_ref_logps, (0., 0.)
        def timed(trainer, dataset, *a):
            dataset._fingerprint = uuid4().hex # or it would find those of the run before
            out = []
            self.reference = clocked(lambda: out.append(plain(trainer, dataset, *a)))
            return out[0]

        with patch.object(DPOTrainer, '_precompute_ref_logps', timed):
            trainer = in_32_bits(
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
        args = SFTConfig(tempfile.mkdtemp(), max_length=CUT, completion_only_loss=True, train_sampling_strategy='sequential', **QUIET)
        return in_32_bits(
            SFTTrainer(
                peer(self.folder),
                args=args,
                train_dataset=data,
                processing_class=self.tokenizer,
                peft_config=LoraConfig(task_type='CAUSAL_LM', **PEER),
            )
        ).train

    def label(self):
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
                            self.model(input_ids=ids, attention_mask=mask)
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
        args = TrainingArguments(tempfile.mkdtemp(), train_sampling_strategy='sequential', **QUIET)
        return Trainer(model, args, train_dataset=data, data_collator=collate).train


def peak() -> float:
    "GiB: the most that this process has had; what it was forked from does not count"
    return int(re.findall(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text(encoding='utf-8'))[0])/2**20


def clocked(work) -> tuple[float, float]:
    "Processor seconds, and seconds"
    a, b = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - a, time.perf_counter() - b


CASES = {
    'DPO, reference counted in': ('dpo', 24),
    'SFT': ('sft', 16),
    'label pairs (two passes)': ('label', 32),
    'class head': ('head', 16),
}


def seconds(who: str, task: str, made) -> tuple[float, float]:
    if who != 'theirs': return clocked(getattr(made, task))
    work, reference = getattr(made, task)(), made.reference if task == 'dpo' else (0., 0.) # the trainer computes it when it is made
    a, b = clocked(work)
    return a + reference[0], b + reference[1]


def open_one(who: str, folder: str, texts, rows):
    return Theirs(folder, texts, rows) if who == 'theirs' else Ours(folder, texts, rows, who == 'plain')


def measure(models, tasks, file: Path, repeats: int, place: Path) -> list[str]:
    lines = []
    for name in models:
        folder = write_model(name, place)
        for what, (task, n) in CASES.items():
            if task not in tasks: continue
            texts, rows = read_rows(file, load_tokenizer(folder), max(8, n//(3 if name == 'l25' else 1)))
            made, found = {who: open_one(who, folder, texts, rows) for who in ('ours', 'plain', 'theirs')}, {}
            for _ in range(repeats):
                for who, one in made.items(): found.setdefault(who, []).append(seconds(who, task, one))
            cpu, wall = ({who: float(np.median([x[k] for x in v])) for who, v in found.items()} for k in (0, 1))
            peaks = {
                who: float(
                    subprocess.run(
                        [sys.executable, __file__, '--peak', who, task, folder, str(len(rows)), '--data', str(file)],
                        capture_output=True,
                        text=True,
                        check=True,
                    ).stdout.split()[-1]
                )
                for who in ('ours', 'theirs')
            }
            ratios = sorted(t[0]/o[0] for o, t in zip(found['ours'], found['theirs'], strict=True))
            lines.append(
                f'| {what} | {name} | {len(rows)} | {cpu["ours"]:.2f} | {cpu["plain"]:.2f} | {cpu["theirs"]:.2f} | '
                f'**{cpu["theirs"] / cpu["ours"]:.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {wall["theirs"] / wall["ours"]:.2f} | '
                f'{peaks["ours"]:.2f} | {peaks["theirs"]:.2f} | {peaks["ours"] / peaks["theirs"]:.2f} |'
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--data', type=Path, required=True)
    parser.add_argument('--models', nargs='+', default=['base', 'l25'])
    parser.add_argument('--tasks', nargs='+', default=[task for task, _ in CASES.values()])
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--peak', nargs=4, help='measure the memory of one contender')
    a = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    transformers.logging.set_verbosity_error()
    if a.peak:
        who, task, folder, n = a.peak
        seconds(who, task, open_one(who, folder, *read_rows(a.data, load_tokenizer(folder), int(n))))
        return print(peak())
    with tempfile.TemporaryDirectory() as place: lines = measure(a.models, a.tasks, a.data, a.repeats, Path(place))
    import trl

    head = [
        '| task | model | rows | ours, s | without packing and merging, s | others, s | others per ours | the same in wall time | ours, '
        'GiB | others, GiB | ours per others |',
        '|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|',
    ]
    on = machine('cpu').partition(';')[0]
    said = (f'{on}; instruction set {torch.backends.cpu.get_cpu_capability()}, one thread; torch {torch.__version__}, transformers '
            f'{transformers.__version__}, TRL {trl.__version__}; processor seconds, medians of {a.repeats} runs in turn')
    Path(__file__).with_suffix('.md').write_text(
        '\n'.join(['# Ours against TRL and transformers', '', (__doc__ or '').split('\n\n')[1], '', said + '.', '', *head, *lines]) + '\n',
        encoding='utf-8',
    )


if __name__ == '__main__': main()
