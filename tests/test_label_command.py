"""`w2s label`: labels never leak, groups never meet, probabilities follow the held-out pairs, a killed run goes on, and the file is one
that TRL and w2s can read"""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from scipy.special import expit

from w2s.compare.preference_data import ladder_world
from w2s.data.readers import read_preferences
from w2s.data.rows import make_rows, to_pairs
from w2s.data.tables import read_table
from w2s.errors import ConfigError, DataError
from w2s.feedback.preferences import label_pairs
from w2s.files import label as page
from w2s.files.label import Labelled, label, label_settings, measured_text, trl_table, verdict
from w2s.files.label_rows import LabelJob, read_pairs, word_margins
from w2s.world.rows import world_preferences

ROOT = Path(__file__).parents[1]
FAST = dict(sft=dict(epochs=1, checkpoint_every=2), dpo=dict(epochs=2, checkpoint_every=2))


def write(path, rows):
    path.write_text('\n'.join(json.dumps(r) for r in rows), encoding='utf-8')
    return str(path)


def plain(rows, *names): return [{n: r[n] for n in names} for r in rows]


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Labelled pairs, pairs to label, and the same pairs with labels of three kinds"
    home = tmp_path_factory.mktemp('label')
    splits = world_preferences(ladder_world(), rows=240, test_rows=4, seed=3, label_share=.75)
    write(home/'train.jsonl', plain(splits['train_gt'], 'prompt', 'chosen', 'rejected'))
    rows = plain(splits['train_w2s'], 'prompt', 'chosen', 'rejected')
    write(home/'right.jsonl', rows)
    write(home/'wrong.jsonl', [r | dict(chosen=r['rejected'], rejected=r['chosen']) for r in rows])
    write(home/'bare.jsonl', [dict(prompt=r['prompt'], response_0=r['chosen'], response_1=r['rejected']) for r in rows])
    return home


@pytest.fixture(scope='module')
def done(home):
    "One labelling"
    return label(
        label_settings('pico', FAST),
        LabelJob(str(home / 'right.jsonl'), str(home / 'train.jsonl')),
        home / 'right.parquet',
        home / 'work',
        quiet=True,
    )


# What must not leak

@pytest.mark.parametrize('other', ['wrong', 'bare'])
def test_labels_of_the_rows_are_never_used(home, done, other):
    "All labels turned round, or none at all: the same file, to the last bit, and another agreement"
    again = label(
        label_settings('pico', FAST),
        LabelJob(str(home / f'{other}.jsonl'), str(home / 'train.jsonl')),
        home / f'{other}.parquet',
        home / 'work',
        quiet=True,
    )
    assert (home/f'{other}.parquet').read_bytes() == (home/'right.parquet').read_bytes()
    on_rows = [r.scores[r.scores.on == 'rows'].accuracy.iloc[:1].tolist() for r in (done, again)]
    assert on_rows[1] == ([] if other == 'bare' else [pytest.approx(1 - on_rows[0][0])])


def test_no_prompt_is_on_two_sides(home, tmp_path):
    "A prompt that is to be labelled is taken out of the training, and counted"
    rows = [json.loads(line) for line in (home/'right.jsonl').read_text().splitlines()]
    known = [json.loads(line) for line in (home/'train.jsonl').read_text().splitlines()]
    write(tmp_path/'train.jsonl', known + [dict(prompt=r['prompt'].upper(), chosen=' yes', rejected=' no') for r in rows[:5]])
    config, job = label_settings('pico', FAST), LabelJob(str(home/'right.jsonl'), str(tmp_path/'train.jsonl'))
    data = page.load_label_data(job, page.know_model('weak', 'pico', config).reader, None, False)
    sides = [set(d['group']) for d in (data.train, data.held, data.rows)]
    assert not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert 'dropped       5 of' in str(data.report) and len(data.rows) == len(rows)


def test_held_out_pairs_are_not_trained_on(home, done):
    "Turn the labels of the held-out pairs round: the margins stay, the accuracy does not"
    ids = set(done.data.held['id'])
    read = read_preferences(home/'train.jsonl').splits['all']
    turned = [
        dict(
            prompt=r['prompt'],
            **(dict(chosen=r['rejected'], rejected=r['chosen']) if r['id'] in ids else dict(chosen=r['chosen'], rejected=r['rejected'])),
        )
        for r in read
    ]
    write(home/'turned.jsonl', turned)
    job = LabelJob(str(home/'right.jsonl'), str(home/'turned.jsonl'))
    try: other = label(label_settings('pico', FAST), job, home/'turned.parquet', home/'work', quiet=True)
    except DataError as e: # a supervisor that is right on them is wrong on them now: no temperature can mend that
        assert 'no temperature' in str(e) and len(list((home/'work'/'stages').glob('weak-seed0-dpo-*'))) == 1
    else: assert np.array_equal(other.margin, done.margin) and other.temperature != done.temperature


# What comes out

def test_columns_and_numbers(home, done):
    t = read_table(home/'right.parquet')
    assert t.column_names == ['prompt', 'chosen', 'rejected', 'prob', 'weight', 'id', 'margin']
    prob, margin = np.array(t['prob']), np.array(t['margin'])
    assert np.allclose(prob, expit(margin/done.temperature)) and np.allclose(t['weight'], np.abs(2*prob - 1)) and (prob >= .5).all()
    given = {(r['prompt'], frozenset((r['chosen'], r['rejected']))) for r in read_preferences(home/'right.jsonl').splits['all']}
    assert {(r['prompt'], frozenset((r['chosen'], r['rejected']))) for r in t} == given


def test_w2s_reads_its_own_labels(home, done):
    "With prob and weight, so that `w2s run` can learn from them"
    back = read_preferences(home/'right.parquet').splits['all']
    assert [back[c][:] for c in ('chosen', 'prob', 'weight', 'id')] == [done.labels.rows[c][:] for c in ('chosen', 'prob', 'weight', 'id')]


def chat_labels(done):
    "The same labelling, of prompts that are messages"
    rows = make_rows([dict(prompt=[dict(role='user', content='Hi')], chosen=' Yes', rejected=' No')], 'preferences')
    return replace(done, labels=label_pairs(to_pairs(rows), np.array([[0., 1.]]), 'weak:x'), margin=np.array([1.]))


def test_chat_is_written_as_chat(done):
    "TRL wants lists of messages on both sides, or on none"
    (row,) = trl_table(chat_labels(done))
    assert row['prompt'] == [dict(role='user', content='Hi')] and [row[c][0]['role'] for c in ('chosen', 'rejected')] == ['assistant']*2


def test_trl_takes_the_file(home, done):
    "Text and chat are the two forms of TRL"
    trl = pytest.importorskip('trl')
    assert not trl.is_conversational(read_table(home/'right.parquet')[0])
    assert trl.is_conversational(trl_table(chat_labels(done))[0])


def test_report_says_what_was_measured(home, done):
    told = json.loads((home/'right.json').read_text(encoding='utf-8'))
    text = (home/'right.md').read_text(encoding='utf-8')
    assert (
        told['temperature'] == done.temperature
        and told['labelled'] == len(done.labels.rows)
        and {r['on'] for r in told['scores']} == {'held out', 'rows'}
    )
    assert 'prompt: prompt; chosen: chosen; rejected: rejected' in text and '## The rows' in text
    assert told['verdict'] in text and '[dpo]' in text and 'bag of words' in text and 'the longer one' in text
    assert told['settings']['dpo']['epochs'] == 2 and told['job']['calibrate'] == .2


def at_chance(done: Labelled, low: float) -> str:
    "The verdict, if the interval began here"
    return verdict(replace(done, scores=done.scores.assign(low=low)))


def test_verdict_is_honest(done):
    "Not better than a coin, and behind a baseline: said in capitals"
    assert 'better than a coin.' in at_chance(done, .51) and 'NOT' not in at_chance(done, .51)
    assert 'NOT shown to be better than a coin' in at_chance(done, .5)
    assert 'BEHIND' in verdict(replace(done, ahead=done.ahead.assign(value=-.2, low=-.3, high=-.1)))


def test_without_calibration(home):
    "Nothing held out, nothing measured, and that is said"
    out = label(
        label_settings('pico', FAST),
        LabelJob(str(home / 'bare.jsonl'), str(home / 'train.jsonl'), calibrate=0.0),
        home / 'raw.parquet',
        home / 'work0',
        quiet=True,
    )
    assert out.temperature == 1 and out.data.held is None and 'Nothing was measured' in measured_text(out)
    assert np.allclose(out.labels.rows['prob'], expit(out.margin))


@pytest.mark.parametrize('kind, train', [('reward', True), ('judge', True), ('judge', False)])
def test_other_supervisors(home, tmp_path, kind, train):
    "A reward model, and a judge that needs no training"
    config = label_settings('pico', FAST | dict(supervisor=kind))
    job = LabelJob(str(home/'right.jsonl'), str(home/'train.jsonl') if train else None)
    try: out = label(config, job, tmp_path/'x.parquet', quiet=True)
    except DataError as e: assert 'no temperature' in str(e) and kind == 'judge' # a judge of this size is a coin
    else: assert out.data.held is None or len(out.scores) == 8


# Baselines

def test_word_baseline_is_odd():
    "It knows no sides: change them, and the margin changes its sign"
    rows = make_rows([dict(prompt=f'{i}', chosen=f' good {i}', rejected=f' a bad one {i}') for i in range(30)], 'preferences')
    a, b = to_pairs(rows, 1), to_pairs(rows, 2)
    swapped = np.array([x != y for x, y in zip(a['response_a'], b['response_a'], strict=True)])
    assert 0 < swapped.sum() < 30
    assert np.allclose(word_margins(a, a), np.where(swapped, -1, 1) * word_margins(b, b), atol=1e-3)


# Reading

def test_ties_and_missing_labels_are_still_labelled(tmp_path):
    "A row without a verdict is a row to label; what it lacks is only the comparison"
    rows = [dict(prompt=f'{i}', response_a=f'a{i}', response_b=f'b{i}', label=x) for i, x in enumerate(['a', 'b', 'tie', None])]
    read, refused, n = read_pairs(write(tmp_path/'x.jsonl', rows))
    assert (len(read), refused, n) == (4, [], 4) and np.array_equal(read['gold'], [1, 0, np.nan, np.nan], equal_nan=True)
    assert read['prob'][:] == [1.]*4 and read['chosen'][:] == [f'a{i}' for i in range(4)]


def test_soft_labels_and_missing_texts(tmp_path):
    read, refused, n = read_pairs(
        write(
            tmp_path / 'x.jsonl',
            [dict(prompt='p', chosen='c', rejected='r', prob=0.7), dict(prompt='q', chosen=None, rejected='r', prob=0.9)],
        )
    )
    assert (read['gold'][:], read['prob'][:], len(refused), n) == ([.7], [1.], 1, 2)


# Errors

@pytest.mark.parametrize('job, out, said', [
    (dict(rows='right.jsonl'), 'x.parquet', 'learns from labelled pairs'),
    (dict(rows='right.jsonl', train='train.jsonl'), 'x.csv', 'name it so'),
    (dict(rows='right.jsonl', train='right.jsonl'), 'x.parquet', 'shows nothing'),
    (dict(rows='right.jsonl', train='train.jsonl', calibrate=1.), 'x.parquet', 'from 0 to below 1'),
    (dict(rows='nowhere.jsonl', train='train.jsonl'), 'x.parquet', 'neither a file'),
])
def test_errors_leave_nothing_behind(home, tmp_path, job, out, said):
    with pytest.raises((ConfigError, DataError), match=said):
        label(
            label_settings('pico'),
            LabelJob(**{k: str(home / v) if isinstance(v, str) else v for k, v in job.items()}),
            tmp_path / out,
            quiet=True,
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'given, said',
    [(dict(seeds=3), 'do nothing here'), (dict(betta=1.0), 'did you mean "beta"'), (dict(supervisor='dpoo'), 'did you mean "dpo"')],
)
def test_settings_that_do_nothing_are_refused(given, said):
    with pytest.raises(ConfigError, match=said): label_settings('pico', given)


# Killed

def start(home, out, work):
    command = [
        sys.executable,
        '-c',
        'from w2s.cli.app import main; main()',
        'label',
        '--model',
        'pico',
        '--rows',
        home / 'bare.jsonl',
        '--train',
        home / 'train.jsonl',
        '--out',
        out,
        '--work',
        work,
        '--config',
        home / 'fast.toml',
    ]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen([str(c) for c in command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_killed_while_training(home, done, tmp_path):
    "`kill -9` at a checkpoint of DPO, started again: the same file, and SFT is not done twice"
    (home/'fast.toml').write_text('[sft]\nepochs = 1\ncheckpoint_every = 2\n[dpo]\nepochs = 2\ncheckpoint_every = 2\n')
    out, work = tmp_path/'weak.parquet', tmp_path/'work'
    first, limit = start(home, out, work), time.time() + 240
    while not list(work.glob('stages/.unfinished-*-dpo-*/checkpoints/*')) and first.poll() is None and time.time() < limit: time.sleep(.02)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not out.exists() and first.returncode == -signal.SIGKILL
    again = start(home, out, work)
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-2000:]
    assert 'weak-seed0-sft: found' in printed and 'weak-seed0-dpo: going on' in printed
    assert out.read_bytes() == (home/'right.parquet').read_bytes()


# Real dialogues

def test_real_dialogues_are_read(shared):
    "Whole dialogues, of which the reader refuses what cannot be cut"
    rows, refused, n = read_pairs(str(shared/'data'/'hh_helpful'/'helpful_train_w2s.jsonl.gz'))
    assert n == 4000 and len(rows) + len(refused) == n and len(rows) > 3900
    assert isinstance(rows, Dataset) and not np.isnan(rows['gold'][:]).any()
