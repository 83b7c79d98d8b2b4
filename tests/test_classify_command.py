"""`w2s run safety`, `legal` and `classify`: what is written, what is refused, that a plan counts what is trained, and that a killed run
goes on"""
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.cli.labels import COMMANDS, classify_config
from w2s.compare.preference_data import ladder_world
from w2s.world.rows import label_rows

ROOT = Path(__file__).parents[1]
ALWAYS = {
    'report.md',
    'report.html',
    'results.tex',
    'figure.png',
    'figure.svg',
    'figure.pdf',
    'results.parquet',
    'items.parquet',
    'intervals.parquet',
    'differences.parquet',
    'labels.parquet',
    'weak_labels.parquet',
    'predictions.parquet',
    'pgr.parquet',
    'histories.parquet',
    'arms.parquet',
    'training.png',
    'training.svg',
    'training.pdf',
    'config.toml',
    'versions.json',
    'data_report.csv',
    'data_report.md',
    'manifest.json',
    'adapters',
    'stages',
    'inherited.parquet',
    'error_correlation.parquet',
    'inherited_rows.parquet',
    'inheritance.png',
    'inheritance.svg',
    'inheritance.pdf',
}
SMALL = ('--n-labelled', '60', '--n-unlabelled', '60', '--n-test', '60', '--seeds', '1', '--epochs', '1')
SAFETY = ('--weak', 'pico', '--strong', 'nano', *SMALL, '--method', 'xent,hard')


def w2s(*words):
    "`w2s run …` in this process"
    return CliRunner().invoke(app, ['run', *map(str, words)])


def ran(*words):
    "The same, that must succeed; what it printed, in one line"
    done = w2s(*words)
    assert done.exit_code == 0, done.output[-2000:] + repr(done.exception)
    return done.output


def refused(*words):
    "What is said against it"
    done = w2s(*words)
    assert done.exception is not None and done.exit_code == 1, done.output[-2000:]
    return str(done.exception) or done.output


def files(folder): return {p.name for p in folder.iterdir() if not p.name.startswith('.')}


def trained(folder): return len([f for f in (folder/'stages').iterdir() if (f/'adapter').is_dir() or (f/'probe.npz').is_file()])


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Settings, and texts with a class as somebody would bring them: with an empty one, and one twice with different labels"
    home = tmp_path_factory.mktemp('classify')
    (home/'often.toml').write_text('[student]\ncheckpoint_every = 2\n')
    rows = label_rows(ladder_world(), 'safety', 200, 5)
    table = [(r['prompt'], bool(r['label'])) for r in rows]
    table += [('', True), (table[0][0], not table[0][1])]
    with open(home/'safe.csv', 'w', newline='') as f: csv.writer(f).writerows([('prompt', 'is_safe'), *table])
    with open(home/'own.csv', 'w', newline='') as f:
        csv.writer(f).writerows(
            [('said', 'verdict', 'who'), *((p, 'fine' if y else 'bad', f'person {i % 40}') for i, (p, y) in enumerate(table[:200]))]
        )
    return home


@pytest.fixture(scope='module')
def safety(home):
    "One run of `w2s run safety`, and what it printed"
    return home/'safety', ran('safety', *SAFETY, '--config', home/'often.toml', '--out', home/'safety')


# What is written

def test_safety_writes_everything(safety):
    folder, printed = safety
    assert files(folder) == ALWAYS # one student, no snapshots: no sizes, no snapshots
    assert 'task safety' in printed and f'written to {folder}' in printed and 'PGR, pico teaches nano, accuracy: none, since' in printed
    text = (folder/'report.md').read_text(encoding='utf-8')
    for part in (
        '# pico teaches nano',
        '## PGR',
        '## Weak feedback',
        '## Settings',
        'data = "world:safety"',
        '60 test examples (',
        '319,808',
    ):
        assert part in text, part
    assert '## Stopping' not in text and json.loads((folder/'versions.json').read_text())['w2s']


def test_arms_of_safety(safety):
    folder, _ = safety
    said = pd.read_parquet(folder/'predictions.parquet')
    arms = set(said[['role', 'method', 'weak', 'strong']].itertuples(index=False, name=None))
    assert arms == {
        ('baseline', 'untuned', '', 'nano'),
        ('baseline', "bag of words, supervisor's rows", '', ''),
        ('baseline', "bag of words, students' rows", '', ''),
        ('floor', 'ground truth', 'pico', ''),
        ('student', 'xent', 'pico', 'nano'),
        ('student', 'hard', 'pico', 'nano'),
        ('ceiling', 'ground truth', '', 'nano'),
    }
    assert said.groupby(['role', 'method']).size().eq(60).all() and said['id'].nunique() == 60 and np.allclose(said['p0'] + said['p1'], 1)
    means = pd.read_parquet(folder/'results.parquet').query('metric == "accuracy"').set_index(['role', 'method'])['value']
    right = said.assign(right=(said['p1'] > said['p0']).astype(int) == said['label']).groupby(['role', 'method'])['right'].mean()
    assert np.allclose(means.sort_index(), right.sort_index()) # the table is of the predictions beside it
    assert {f.name for f in (folder / 'adapters').iterdir()} == {
        'floor-ground-truth-pico-seed0',
        'student-xent-pico-nano-seed0',
        'student-hard-pico-nano-seed0',
        'ceiling-ground-truth-nano-seed0',
    }


def test_settings_are_read_back(safety):
    "config.toml of a run asks for the same run"
    folder, _ = safety
    again = classify_config('classify', {}, folder/'config.toml')
    assert (
        again == classify_config('safety', {'data': 'world:safety'}, folder / 'config.toml')
        and again.student.epochs == again.supervisor.epochs == 1
    )
    assert trained(folder) == 4


def test_again_finds_all(home, safety):
    "A second time nothing is trained, and every number is the same"
    folder, _ = safety
    before = {n: (folder/n).read_bytes() for n in files(folder) if n.endswith(('.parquet', '.md', '.svg', '.toml'))}
    printed = ran('safety', *SAFETY, '--config', home/'often.toml', '--out', folder)
    assert ': starting' not in printed and ': going on' not in printed
    assert {n: (folder/n).read_bytes() for n in before} == before


@pytest.mark.long
def test_chain_and_rounds(home):
    "`--chain` names three models; the plan counts what is trained"
    out = home/'legal'
    words = ('legal', '--chain', 'pico,pico,nano', *SMALL, '--method', 'xent', '--rounds', '2', '--no-baseline', '--out', out)
    planned = ran(*words, '--dry-run')
    assert not out.exists() and 'via = [\n    "pico",\n]' in planned and 'data = "world:storage"' in planned
    ran(*words)
    said = pd.read_parquet(out/'predictions.parquet')
    assert list(dict.fromkeys(said.loc[said['role'] == 'student', 'method'])) == ['xent', 'xent, via pico', 'xent, round 2']
    assert not said['method'].str.contains('bag').any()
    assert trained(out) == 9 and f'{trained(out)} trainings, all seeds together' in planned


READ = 'safe.csv: text: prompt; label: is_safe'


def test_own_file(home):
    "A table of prompt and is_safe; two students, snapshots, stopping"
    out = home/'own'
    printed = ran(
        'classify',
        '--data',
        home / 'safe.csv',
        '--weak',
        'pico',
        '--strong',
        'pico,nano',
        '--readout',
        'words',
        *SMALL,
        '--method',
        'xent',
        '--snapshots',
        '2',
        '--validate',
        '0.25',
        '--contradictions',
        'drop',
        '--out',
        out,
    )
    assert files(out) == ALWAYS | {
        'sizes.png',
        'sizes.svg',
        'sizes.pdf',
        'pgr.png',
        'pgr.svg',
        'pgr.pdf',
        'snapshots.png',
        'snapshots.svg',
        'snapshots.pdf',
        'snapshots.parquet',
        'stops.parquet',
    }
    assert 'a text is empty' in printed and '(is_safe)' in printed
    text = (out/'report.md').read_text(encoding='utf-8')
    for part in (
        '# pico teaches pico, nano',
        '## Stopping by weak labels',
        'Classes: False, True.',
        'a text is empty',
        '![PGR over',
        'xent, stopped',
        READ,
    ):
        assert part in text, part
    assert READ in printed and READ in (out/'data_report.md').read_text(encoding='utf-8')
    stops = pd.read_parquet(out/'stops.parquet')
    assert len(stops) == 2 and np.allclose(stops['regret'], stops['best'] - stops['chosen']) and (stops['regret'] >= 0).all()


def test_probe_on_own_columns(home):
    "Columns by name, classes in a chosen order, and a probe, which trains nothing"
    out, words = home/'probe', ('--text', 'said', '--label', 'verdict', '--group', 'who', '--classes', 'fine,bad')
    ran(
        'classify',
        '--data',
        home / 'own.csv',
        *words,
        '--weak',
        'pico',
        '--strong',
        'nano',
        '--readout',
        'probe',
        '--n-labelled',
        '50',
        '--n-unlabelled',
        '50',
        '--n-test',
        '60',
        '--seeds',
        '1',
        '--out',
        out,
    )
    assert files(out) == ALWAYS - {'training.png', 'training.svg', 'training.pdf'} and all(
        part in (out / 'report.md').read_text(encoding='utf-8')
        for part in ('Classes: fine, bad.', 'own.csv: text: said; label: verdict; group: who')
    )
    said = pd.read_parquet(out/'predictions.parquet')
    assert {f.name for f in (out/'adapters'/'floor-ground-truth-pico-seed0').iterdir()} >= {'probe.npz'} and trained(out) == 3
    test = said[said['role'] == 'floor']
    with open(home/'own.csv', newline='') as f: verdicts = [r['verdict'] for r in csv.DictReader(f)]
    assert abs((test['label'] == 0).mean() - np.mean([v == 'fine' for v in verdicts])) < .25 # class 0 is the first that was named


# What is refused

@pytest.mark.parametrize('words, said', [
    (['classify'], 'w2s run classify needs rows: give --data my.csv'),
    (['classify', '--data', 'nowhere.csv'], 'nowhere.csv'),
    (['safety', '--chain', 'pico,nano,base', '--weak', 'pico'], 'leave out --weak'),
    (['safety', '--chain', 'pico,nano,base', '--via', 'pico', '--strong', 'base'], 'leave out --via, --strong'),
    (['legal', '--chain', 'pico,base'], 'for two take --weak and --strong'),
    (['safety', '--method', 'confidense'], 'did you mean "confidence"'),
    (['safety', '--method', 'confidence(highst=0.5)'], 'option of confidence'),
    (['safety', '--method', 'xent,xent'], 'given twice'),
    (['safety', '--readout', 'haed'], 'did you mean "head"'),
    (['safety', '--words', 'no,yes', '--readout', 'head', '--head-start', 'random'], 'nothing would look at them'),
    (['safety', '--head-start', 'random'], 'has no head'),
    (['safety', '--method', 'confidence(highest=2)'], 'highest'),
    (['safety', '--words', 'no,yes,maybe'], 'want one a class'),
    (['safety', '--validate', '0.2'], 'set snapshots, too'),
    (['safety', '--readout', 'probe', '--epochs', '3', '--method', 'xent'], 'a probe is not trained by steps'),
    (['safety', '--label-share', '1'], 'must lie between 0 and 1'),
    (['safety', '--weak', 'base', '--strong', 'pico'], 'nobody teaches pico'),
    (['safety', '--weak', 'picko'], 'did you mean "pico"'),
    (['legal', '--data', 'world:weather'], 'task of the world'),
    (['safety', '--quantize', 'int8'], 'nf4'),
])
def test_refusals(tmp_path, words, said):
    "In a sentence, before anything is written"
    assert said in refused(*words, '--out', tmp_path/'none')
    assert not list(tmp_path.iterdir())


def test_refusals_of_a_file(home, tmp_path):
    "Columns that are not there, classes that are not, contradictions, and rows that are not clean"
    own = ('classify', '--data', home/'own.csv', '--out', tmp_path/'none')
    assert 'has no column "text"' in refused(*own, '--text', 'text', '--label', 'verdict')
    assert 'no column is known as a label' in refused(*own, '--text', 'said')
    assert 'no row has the class "good"' in refused(*own, '--text', 'said', '--label', 'verdict', '--classes', 'good,bad')
    assert 'needs a label word for each of bad, fine' in refused(*own, '--text', 'said', '--label', 'verdict', '--readout', 'words')
    safe = ('classify', '--data', home/'safe.csv', '--out', tmp_path/'none')
    assert 'strict: the data is not clean' in refused(*safe, '--strict')
    assert '1 texts have different labels' in refused(*safe, '--contradictions', 'refuse')
    assert not list(tmp_path.iterdir())


@pytest.mark.cases(1)
@pytest.mark.parametrize('command', list(COMMANDS))
def test_plan_writes_nothing(home, tmp_path, command):
    "Settings as TOML that can be read back, the data report, and the number of trainings"
    rows = ('--data', str(home/'safe.csv')) if command == 'classify' else ()
    printed = ran(command, *rows, '--seeds', '3', '--lr', '0.01', '--dry-run', '--out', tmp_path/'none')
    assert not list(tmp_path.iterdir()) and 'rows left of rows read' in printed
    (tmp_path/'again.toml').write_text(re.split(r'\n\n(?=\w)', printed)[0])
    again = classify_config(command, {}, tmp_path/'again.toml')
    assert (again.student.learning_rate, again.supervisor.learning_rate, again.seeds) == (.01, .01, 3)
    assert '12 trainings, all seeds together' in printed.splitlines()[-1]


# Killed

def start(home, out):
    "The same command as that of `safety`, as a process of its own"
    command = [
        sys.executable,
        '-c',
        'from w2s.cli.app import main; main()',
        'run',
        'safety',
        *SAFETY,
        '--config',
        str(home / 'often.toml'),
        '--out',
        str(out),
    ]
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'HF_HUB_OFFLINE': '1'}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
def test_killed_while_a_student_learns(home, safety, tmp_path):
    "`kill -9` at a checkpoint of a student, started again: the same numbers, and the supervisor is not trained twice"
    out, limit = tmp_path/'killed', time.time() + 240
    first = start(home, out)
    while not list(out.glob('stages/.unfinished-student-nano-xent-*/checkpoints/*')) and first.poll() is None and time.time() < limit:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL and files(out) == {'stages', 'INCOMPLETE.txt'}
    again = start(home, out)
    printed, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors[-2000:]
    assert 'weak-pico-seed0: found' in printed and 'student-nano-xent-pico-seed0: going on' in printed
    for name in ('items', 'predictions', 'pgr', 'labels'):
        pd.testing.assert_frame_equal(pd.read_parquet(out / f'{name}.parquet'), pd.read_parquet(safety[0] / f'{name}.parquet'))
    weights = 'adapters/student-xent-pico-nano-seed0/adapter_model.safetensors'
    assert (out/weights).read_bytes() == (safety[0]/weights).read_bytes()


def test_two_at_once(home, safety):
    "A folder in which somebody works is left alone"
    from w2s.compare.stages import lock
    held = lock(safety[0])
    try: assert 'another process is working' in refused('safety', *SAFETY, '--config', home/'often.toml', '--out', safety[0])
    finally: held.release()


def test_one_list_of_flags():
    "The three commands share every flag"
    helps = [CliRunner().invoke(app, ['run', c, '--help']).output for c in COMMANDS]
    flags = [{w for w in h.split() if w.startswith('--')} for h in helps]
    assert flags[0] == flags[1] == flags[2] and len(flags[0]) > 30
