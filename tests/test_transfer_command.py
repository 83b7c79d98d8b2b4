"""`w2s run persona`, `explanation`, `gender`, `maths`, `toxicity` and `w2s refine`: what is written, what is refused, that a plan counts
what is trained, and that a killed one goes on"""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.cli.demonstrations import COMMANDS, transfer_config
from w2s.compare import demonstration_tasks as transfer_tasks
from w2s.compare.demonstration_stages import TrainingRows
from w2s.evaluate.intervals import with_limits
from w2s.feedback.demonstrators import demonstrated
from w2s.feedback.forms import CHAT, WORLD
from w2s.files.refine import REFINE_METHODS, RefinedFile, beside, facts, fill_refine, refine_file, refined_text, trl_rows
from w2s.models.zoo import zoo_folder

ROOT = Path(__file__).parents[1]
ALWAYS = {
    'report.md',
    'report.html',
    'results.tex',
    'figure.png',
    'figure.svg',
    'figure.pdf',
    'plane.png',
    'plane.svg',
    'plane.pdf',
    'results.parquet',
    'items.parquet',
    'intervals.parquet',
    'differences.parquet',
    'labels.parquet',
    'pgr.parquet',
    'examples.parquet',
    'answers.parquet',
    'training_rows.parquet',
    'histories.parquet',
    'arms.parquet',
    'training.png',
    'training.svg',
    'training.pdf',
    'data_report.csv',
    'data_report.md',
    'config.toml',
    'versions.json',
    'manifest.json',
    'adapters',
    'stages',
}
WEAK = ('--weak', 'pico', '--n-labelled', '8')
TINY = ('--strong', 'nano', '--n-unlabelled', '8', '--n-test', '6', '--seeds', '1', '--epochs', '1', '--max-tokens', '16')
KIND = (
    '--weak',
    'pico',
    '--strong',
    'nano',
    '--n-labelled',
    '8',
    '--n-unlabelled',
    '8',
    '--n-test',
    '4',
    '--seeds',
    '1',
    '--epochs',
    '1',
    '--dpo-epochs',
    '1',
    '--samples',
    '2',
    '--max-tokens',
    '8',
    '--examples',
    '2',
)


def w2s(*words):
    "`w2s …` in this process"
    return CliRunner().invoke(app, list(map(str, words)))


def ran(*words):
    "The same, that must succeed; what it printed"
    done = w2s(*words)
    assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)
    return done.output


def refused(*words):
    "What is said against it"
    done = w2s(*words)
    assert done.exception is not None and done.exit_code == 1, done.output[-2000:]
    return str(done.exception) or done.output


def files(folder): return {p.name for p in folder.iterdir() if not p.name.startswith('.')}


def trained(folder): return len([f for f in (folder/'stages').iterdir() if (f/'adapter').is_dir()])


@pytest.fixture(scope='module')
def persona(tmp_path_factory):
    "One run of `w2s run persona` with an ablation and all methods but two, and what it printed"
    out = tmp_path_factory.mktemp('persona')/'run'
    words = (
        'run',
        'persona',
        *WEAK,
        *TINY,
        '--method',
        'naive,in-context,own-answers,infer-and-respond',
        '--batch',
        '3',
        '--ablation',
        '1,2',
        '--out',
        out,
    )
    return out, words, ran(*words)


# What is written

# where answers are right or wrong
INHERITED = {'inherited.parquet', 'inherited_rows.parquet', 'inheritance.png', 'inheritance.svg', 'inheritance.pdf'}


def test_persona_writes_everything(persona):
    out, _, printed = persona
    assert files(out) == ALWAYS | INHERITED | {'error_correlation.parquet', 'examples.png', 'examples.svg', 'examples.pdf'}
    assert f'written to {out}' in printed
    text = (out/'report.md').read_text(encoding='utf-8')
    for part in (
        '# persona: pico teaches nano',
        '## PGR',
        '## Differences',
        '## Weak feedback',
        '## Weak answers in context',
        'student own answers',
        'Concepts that were named',
        'How models were asked:',
        'task = "persona"',
    ):
        assert part in text, part
    assert 'Incomplete' not in text
    t = pd.read_parquet(out/'intervals.parquet')
    for r in t.itertuples(): assert f'| {r.role} | {r.method} |' in text # every arm is in the report, with every number
    arms = text[text.index('## Arms'):text.index('## Weak answers in context')]
    assert all(with_limits(r.value, r.low, r.high) in arms for r in t.itertuples())


def test_lessons_are_what_was_learned(persona):
    out, _, _ = persona
    rows = pd.read_parquet(out/'training_rows.parquet').to_dict('records')
    assert {r['method'] for r in rows} == {'naive', 'in-context', 'own answers', 'infer-and-respond'} and len(rows) == 32
    for r in rows:
        if r['method'] == 'naive': assert r['answer'] == r['weak_answer']
        assert bool(r['concept']) == (r['method'] == 'infer-and-respond') and (r['weak'] == '') == (r['method'] == 'own answers')
    said = pd.read_parquet(out/'answers.parquet')
    assert said.groupby(['role', 'method', 'weak']).size().eq(6).all()


def test_a_plan_counts_what_is_trained(persona):
    out, words, _ = persona
    planned = ran(*words, '--dry-run')
    assert trained(out) == 6 and f'{trained(out)} trainings, all seeds together' in planned and 'done before' in planned
    assert transfer_config('persona', {}, out/'config.toml') == transfer_config('persona', dict(data='world'), out/'config.toml')


def test_again_finds_all(persona):
    "A second time nothing is trained, and every number is the same"
    out, words, _ = persona
    before = {n: (out/n).read_bytes() for n in files(out) if n.endswith(('.parquet', '.md', '.svg', '.toml', '.jsonl'))}
    printed = ran(*words)
    assert ': starting' not in printed and ': going on' not in printed and ': found' in printed
    assert {n: (out/n).read_bytes() for n in before} == before


@pytest.mark.parametrize(
    'words, metrics',
    [
        (['explanation', *WEAK], {'accuracy', 'analogy'}),
        (['explanation', '--form', 'digits'], {'accuracy', 'technique', 'regions'}),
        (['gender'], {'accuracy', 'truth', 'female', 'pronouns'}),
        (['maths', *WEAK], {'accuracy', 'working'}),
        (['maths', '--level', 'math', *WEAK], {'accuracy', 'working'}),
    ],
)
def test_every_command_ends(tmp_path, monkeypatch, words, metrics):
    monkeypatch.setattr(transfer_tasks, 'SCHOOL_DIGITS', 16) # 1500 lessons take a minute
    out = tmp_path/'run'
    ran('run', *words, *TINY, '--method', 'naive', '--out', out)
    assert files(out) == ALWAYS | (INHERITED if words[0] == 'maths' else set())
    t = pd.read_parquet(out/'intervals.parquet')
    assert metrics <= set(t.metric) and set(t.role) == {'floor', 'baseline', 'student', 'ceiling'}


def test_sums_of_a_file_and_answers_of_a_file(tmp_path):
    "GSM8K's form, weak answers in a table, no weak model at all"
    sums = [
        dict(
            question=f'Ann has {a} pears and finds {b}. How many has she?',
            answer=f'She has {a} + {b} = <<{a}+{b}={a + b}>>{a + b}.\n#### {a + b}',
        )
        for a in range(2, 8)
        for b in range(2, 6)
    ]
    (tmp_path/'sums.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in sums))
    (tmp_path / 'said.jsonl').write_text(
        ''.join(json.dumps(dict(question=r['question'], answer=r['answer'].rpartition(' ')[2])) + '\n' for r in sums)
    )
    words = (
        'run',
        'maths',
        '--data',
        tmp_path / 'sums.jsonl',
        '--answers',
        tmp_path / 'said.jsonl',
        '--strong',
        'nano',
        '--n-unlabelled',
        '8',
        '--n-test',
        '6',
        '--seeds',
        '1',
        '--epochs',
        '1',
        '--max-tokens',
        '8',
        '--max-length',
        '256',
        '--examples',
        '1',
        '--out',
        tmp_path / 'run',
    )
    planned = ran(*words, '--dry-run')
    assert not (tmp_path/'run').exists() and '24 questions of' in planned and '3 trainings, all seeds together' in planned
    printed = ran(*words)
    for read in ('sums.jsonl: question: question; answer: answer', 'said.jsonl: question: question; answer: answer'):
        assert all(read in text for text in (planned, printed, (tmp_path/'run'/'report.md').read_text(encoding='utf-8'))), read
    t = pd.read_parquet(tmp_path/'run'/'intervals.parquet')
    floor = t[(t.role == 'floor') & (t.metric == 'accuracy')].iloc[0]
    assert (floor.weak, floor.value, floor.n) == ('said', 1., 6)
    assert trained(tmp_path/'run') == 3


def test_toxicity_writes_everything(tmp_path):
    out = tmp_path/'run'
    words = ('run', 'toxicity', *KIND, '--method', 'naive,in-context', '--out', out)
    planned = ran(*words, '--dry-run')
    assert not out.exists()
    printed = ran(*words)
    assert (
        f'written to {out}' in printed
        and 'report.md' in files(out)
        and {'figure.png', 'samples.parquet', 'intervals.parquet', 'adapters'} <= files(out)
    )
    assert f'{trained(out)} trainings' in planned
    text = (out/'report.md').read_text(encoding='utf-8')
    assert (
        text.startswith('# Toxicity: pico teaches nano') and '## Arms' in text and ('## Incomplete' in text) == ('incomplete:' in printed)
    )
    samples = pd.read_parquet(out/'samples.parquet')
    assert samples.groupby(['role', 'method']).size().eq(8).all() and set(pd.read_parquet(out/'prompts.parquet').columns) == {'id', 'kind'}


# What is refused

@pytest.mark.parametrize('words, said', [
    (['persona', '--method', 'incontext'], 'did you mean "in-context"'),
    (['persona', '--form', 'digits'], 'it belongs to w2s run explanation'),
    (['maths', '--level', 'gsm9k'], 'did you mean "gsm8k"'),
    (['gender', '--method', 'bootstrap'], 'needs a model in between'),
    (['persona', '--data', 'mine.csv'], 'name a model as judge'),
    (['persona', '--data', 'mine.csv', '--judge', 'base'], 'which style is wanted'),
    (['maths', '--data', 'nowhere.jsonl'], 'nowhere.jsonl'),
    (['explanation', '--form', 'digits', '--data', 'mine.csv'], 'data must be "world"'),
    (['persona', '--ablation', '1,two'], '"two" is not a whole number'),
    (['persona', '--ablation', '0'], 'begin at 1'),
    (['persona', '--samples', '9'], 'samples belongs to the method resampled'),
    (['persona', '--answers', 'a.csv', '--weak', 'pico,nano'], 'a file holds the answers of one weak model'),
    (['persona', '--instruction', 'Talk.', '--demonstrator', 'tuned'], 'instruction is what a prompted weak model is told'),
    (['persona', '--weak', 'picko'], 'did you mean "pico"'),
    (['persona', '--strong', 'nano', '--quantize', 'int8'], 'nf4'),
    (['toxicity', '--decoding', 'rpt'], 'did you mean "rtp"'),
    (['toxicity', '--data', 'prompts.jsonl'], 'w2s toxicity fit'),
    (['toxicity', '--threshold', '1'], 'between 0 and 1'),
    (['toxicity', '--method', 'ppo'], 'method'),
])
def test_refusals(tmp_path, words, said):
    "In a sentence, before anything is written"
    assert said in refused('run', *words, '--out', tmp_path/'none')
    assert not list(tmp_path.iterdir())


def test_one_list_of_flags():
    helps = [w2s('run', c, '--help').output for c in COMMANDS]
    flags = [{w for w in h.split() if w.startswith('--')} - {'--form', '--level'} for h in helps] # these two belong to one command each
    assert all(f == flags[0] for f in flags) and len(flags[0]) > 30
    assert (
        '--form' in helps[list(COMMANDS).index('explanation')]
        and '--level' in helps[list(COMMANDS).index('maths')]
        and '--level' not in helps[0]
    )


# Refining a file

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A table of questions about the world with answers in a voice, one of them empty"
    home = tmp_path_factory.mktemp('refine')
    asked = transfer_tasks.world_rows('persona', 0, (5, 12, 4)).unlabelled
    rows = [dict(question=q, answer='' if i == 4 else a.strip()) for i, (q, a) in enumerate(zip(asked.questions, asked.gold, strict=True))]
    (home/'weak.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows))
    (home/'questions.jsonl').write_text(''.join(json.dumps(dict(prompt=r['question'])) + '\n' for r in rows[:6]))
    return home


def lines(path): return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.mark.parametrize('method', REFINE_METHODS)
def test_refine_writes_rows_and_report(home, tmp_path, method):
    out = tmp_path/'refined.jsonl'
    weak = ('--answer', 'answer') if method != 'own-answers' else ()
    printed = ran(
        'refine', '--method', method, '--questions', home / 'weak.jsonl', *weak, '--strong', 'nano', '--max-tokens', '16', '--out', out
    )
    rows, weak_rows = lines(out), {r['question']: r['answer'] for r in lines(home/'weak.jsonl')}
    told = json.loads(out.with_suffix('.json').read_text(encoding='utf-8'))
    assert files(tmp_path) == {f'refined.{s}' for s in ('jsonl', 'md', 'json', 'html', 'work')} and f'written: {out}' in printed
    assert (
        told['written'] == len(rows)
        and told['written'] + told['empty'] == told['questions'] == 12
        and told['settings']['method'] == method
        and told['versions']['w2s']
    )
    for r in rows:
        question = r['prompt'].removeprefix('Q: ').removesuffix('\nA:')
        assert (
            r['completion'].startswith(' ')
            and r['completion'].strip()
            and '\n' not in r['completion']
            and r['source'] == f'{method}:nano'
            and r['id']
        )
        assert ('concept' in r) == (method == 'infer-and-respond')
        # beside its own question, though an empty one lies between
        assert r.get('weak_answer') == (None if method == 'own-answers' else weak_rows[question])
    if method == 'ask-to-improve': assert told['empty'] >= 1 # nothing to improve
    if method != 'own-answers': assert told['weak_empty'] == 1
    read = 'weak.jsonl: question: question' + ('' if method == 'own-answers' else '; answer: answer')
    assert read in printed and read in out.with_suffix('.md').read_text(encoding='utf-8')


def test_questions_and_answers_in_two_files(home, tmp_path):
    "Only the questions that are asked; and prompts of one's own"
    (tmp_path/'form.toml').write_text('ask = "Q: {question} \\nA:"\n')
    ran(
        'refine',
        '--questions',
        home / 'questions.jsonl',
        '--weak-answers',
        home / 'weak.jsonl',
        '--strong',
        'nano',
        '--max-tokens',
        '16',
        '--examples',
        '2',
        '--prompts',
        tmp_path / 'form.toml',
        '--out',
        tmp_path / 'r.jsonl',
    )
    rows, weak = lines(tmp_path/'r.jsonl'), {r['question']: r['answer'] for r in lines(home/'weak.jsonl')}
    assert all(r['prompt'].endswith(' \nA:') for r in rows) and 1 <= len(rows) <= 6
    assert all(weak[r['prompt'].removeprefix('Q: ').removesuffix(' \nA:')] == r['weak_answer'] for r in rows)
    assert json.loads((tmp_path/'r.json').read_text(encoding='utf-8'))['form']['ask'] == 'Q: {question} \nA:'


def test_shown_prompts_can_be_given_back(tmp_path):
    shown = ran('refine', '--show-prompts', '--strong', 'nano')
    (tmp_path/'form.toml').write_text(shown)
    assert ran('refine', '--show-prompts', '--strong', 'nano', '--prompts', tmp_path/'form.toml') == shown
    (tmp_path/'odd.toml').write_text('improve = "Better!"\n')
    assert 'lacks {question}' in refused('refine', '--show-prompts', '--strong', 'nano', '--prompts', tmp_path/'odd.toml')


@pytest.mark.parametrize('words, said', [
    ([], 'give --questions FILE'),
    (['--questions', 'WEAK', '--method', 'improve'], 'ask-to-improve'),
    (['--questions', 'WEAK', '--samples', '4'], 'samples does nothing'),
    (['--questions', 'WEAK', '--examples', '11'], '--examples'),
    (['--questions', 'WEAK', '--answer', 'reply'], 'has no column reply'),
    (['--questions', 'WEAK', '--question', 'q'], 'has no column q'),
    (['--questions', 'WEAK', '--weak-answers', 'QUESTIONS'], 'has no column answer'),
    (['--questions', 'WEAK', '--strong', 'nanno'], 'nanno'),
    (['--questions', 'nowhere.csv'], 'no such file'),
])
def test_refusals_of_refine(home, tmp_path, words, said):
    full = [{'WEAK': str(home/'weak.jsonl'), 'QUESTIONS': str(home/'questions.jsonl')}.get(w, w) for w in words]
    strong = () if '--strong' in full else ('--strong', 'nano')
    assert said in refused('refine', *full, *strong, '--out', tmp_path/'r.jsonl')
    assert not list(tmp_path.glob('r.*l'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'content, said',
    [(None, 'form.toml'), ('improve = "Better!"', 'lacks {question}'), ('better = "x"', 'better'), ('improve = ', 'form.toml')],
)
@pytest.mark.parametrize('dry', [True, False])
def test_templates_of_ones_own_are_looked_at_by_a_dry_run(home, tmp_path, content, said, dry):
    if content is not None: (tmp_path/'form.toml').write_text(content)
    assert said in refused(
        'refine',
        '--questions',
        home / 'weak.jsonl',
        '--strong',
        'nano',
        '--prompts',
        tmp_path / 'form.toml',
        '--out',
        tmp_path / 'out' / 'r.jsonl',
        *['--dry-run'][:dry],
    )


def test_refusal_is_one_line(tmp_path):
    "As the user sees it: no traceback"
    command = [
        sys.executable,
        '-c',
        'from w2s.cli.app import main; main()',
        'refine',
        '--questions',
        str(tmp_path / 'none.csv'),
        '--out',
        str(tmp_path / 'r.jsonl'),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'HF_HUB_OFFLINE': '1'})
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and done.stderr.startswith('error: ') and 'no such file' in done.stderr


def test_rows_for_chat_models():
    "Messages on both sides, as TRL wants them; the empty answer is left out, the others keep their weak answer and concept"
    questions, said = ['one?', 'two?', 'three?'], ['A one.', ' ', 'A three.']
    learned = TrainingRows('infer-and-respond', 'w', said, demonstrated(CHAT, questions, said, 'w'), ('c1', 'c1', 'c2'))
    done = RefinedFile(
        fill_refine(dict(questions='q.csv', strong='./chat', method='infer-and-respond')), CHAT, questions, ['w1', 'w2', 'w3'], learned, 0
    )
    rows = trl_rows(done)
    assert [(r['prompt'][0]['content'], r['completion'], r['weak_answer'], r['concept']) for r in rows] == [
        ('one?', [{'role': 'assistant', 'content': 'A one.'}], 'w1', 'c1'),
        ('three?', [{'role': 'assistant', 'content': 'A three.'}], 'w3', 'c2'),
    ]
    assert (
        (facts(done)['written'], facts(done)['empty'], facts(done)['concepts']) == (2, 1, 2)
        and '(nothing)' in refined_text(done)
        and len(beside(done)) == 3
    )
    plain = replace(done, form=WORLD, learned=TrainingRows('in-context', 'w', said, demonstrated(WORLD, questions, said, 'w')))
    assert [(r['prompt'], r['completion']) for r in trl_rows(plain)] == [('Q: one?\nA:', ' A one.'), ('Q: three?\nA:', ' A three.')]


def test_trl_reads_the_rows(home, tmp_path):
    "TRL's SFT trainer masks the prompt and learns the completion, as it is written in the file"
    trl = pytest.importorskip('trl', reason='TRL is a peer for tests; it is installed for Python 3.11 and later')
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    refine_file(
        fill_refine(dict(questions=str(home / 'weak.jsonl'), strong='nano', method='own-answers', max_tokens=16)),
        tmp_path / 'r.jsonl',
        quiet=True,
    )
    rows = load_dataset('json', data_files=str(tmp_path/'r.jsonl'), split='train', cache_dir=str(tmp_path/'cache'))
    tokenizer = AutoTokenizer.from_pretrained(zoo_folder('pico'))
    args = trl.SFTConfig(
        output_dir=str(tmp_path / 'out'),
        report_to='none',
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(zoo_folder('pico')), args=args, train_dataset=rows, processing_class=tokenizer
    )
    for r, t in zip(rows, trainer.train_dataset, strict=True):
        learned = [i for i in t['labels'] if i != -100]
        assert 0 < len(learned) < len(t['input_ids'])
        assert tokenizer.decode(learned, skip_special_tokens=True).strip() == r['completion'].strip()


# Killed

def test_killed_refinement_goes_on(tmp_path):
    "`kill -9` while answers are made, started again: what was there is not made twice, and the file is that of a run without a kill"
    questions = transfer_tasks.world_rows('persona', 0, (5, 400, 4)).unlabelled.questions
    (tmp_path/'q.jsonl').write_text(''.join(json.dumps(dict(question=q)) + '\n' for q in questions))
    words = ['refine', '--method', 'own-answers', '--questions', str(tmp_path/'q.jsonl'), '--strong', 'nano', '--max-tokens', '60']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    def start():
        return subprocess.Popen(
            [sys.executable, '-c', 'from w2s.cli.app import main; main()', *words, '--out', str(tmp_path / 'r.jsonl')],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    def journal(): # not a file that is being written: it has another name a moment later
        found = tmp_path.glob('r.work/stages/.unfinished-*/checkpoints/*.jsonl')
        return next((j for j in found if not j.name.startswith('.')), None)
    first, limit = start(), time.time() + 300
    while first.poll() is None and time.time() < limit:
        if (j := journal()) and len(j.read_bytes().splitlines()) > 1: break # a line that says what it is of, and a line a batch
        time.sleep(.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and not (tmp_path/'r.jsonl').exists() and journal(), 'it was over before it could be killed'
    kept = journal().read_bytes()
    again = start()
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-2000:]
    assert 'own-answers: going on' in printed and len(kept.splitlines()) < 4
    ran(*words, '--out', tmp_path/'whole.jsonl')
    assert (tmp_path/'r.jsonl').read_bytes() == (tmp_path/'whole.jsonl').read_bytes()
    told = [json.loads((tmp_path/f'{n}.json').read_text()) for n in ('r', 'whole')]
    assert told[0] == told[1] and np.isclose(told[0]['written'] + told[0]['empty'], len(questions))
