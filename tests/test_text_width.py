"Tables and sentences that a command prints are no wider than the terminal, and no word of them is cut"
import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pandas as pd
import pytest
import typer

from w2s.check.check import Checked
from w2s.check.lights import Line
from w2s.cli.guard import prepare_streams
from w2s.cli.repeat import hear_lines
from w2s.compare.plan import Plan
from w2s.data.score_items import Item, gather_items
from w2s.evaluate.paired import compare_results
from w2s.explore.browse import FeedbackBrowser
from w2s.files import label
from w2s.files.label import SHOWN
from w2s.io import console
from w2s.io.console import SentenceStream, fit_table, fit_text, sentence_width, text_width

ROOT = Path(__file__).resolve().parents[1]
WHO = ['role', 'method', 'weak', 'strong']
METRICS = ['accuracy', 'balanced_accuracy', 'f1_weighted', 'auroc', 'log_perplexity', 'student − human: gold_reward']
CELL = '-0.108 [-0.604, 0.387]'
ARMS = [('baseline', "bag of words, supervisor's rows", '', ''), ('baseline', 'untuned, in context', 'pico', 'scholar'),
        ('student', 'confidence', 'pico', 'scholar'), ('ceiling', 'ground truth', '', 'scholar')]
WIDE = pd.DataFrame([(*arm, *[CELL]*len(METRICS)) for arm in ARMS], columns=[*WHO, *METRICS])


def widest(text): return max(map(len, text.split('\n')))


@pytest.mark.parametrize('width', [80, 100, 120, 160])
@pytest.mark.parametrize('some', range(1, len(METRICS) + 1))
def test_no_table_is_wider_and_no_word_is_cut(width, some):
    table = WIDE[[*WHO, *METRICS[:some]]]
    text = fit_table(table, WHO, width)
    assert widest(text) <= width
    words = text.split()
    for cell in [*table.columns, *table.to_numpy().ravel()]: assert all(w in words for w in cell.split()), cell
    assert text.count(CELL) == len(table)*some # an interval stays beside its value


def test_every_part_names_its_rows():
    parts = fit_table(WIDE, WHO, 80).split('\n\n')
    assert len(parts) == 3 and all(p.split()[:4] == WHO and p.count('confidence') == 1 for p in parts)


def test_what_fits_is_printed_as_before():
    assert fit_table(WIDE, WHO, 500) == WIDE.to_string(index=False)


@pytest.mark.parametrize('width', [60, 80])
def test_long_names_break_behind_their_marks(width):
    long = WIDE.assign(weak='facebook/opt-1.3b', strong='meta-llama/Meta-Llama-3.1-8B-Instruct')
    text = fit_table(long, WHO, width)
    assert widest(text) <= width
    for word in text.split(): assert len(word) < 3 or any(word in c for c in (*long.columns, *long.to_numpy().ravel())), word


def test_names_without_marks_are_broken_before_a_table_is_too_wide():
    assert widest(fit_table(WIDE.assign(strong='x'*90), WHO, 80)) <= 80


def test_empty_tables():
    for t in (WIDE.iloc[:0], WIDE[WHO[:1]].iloc[:0], pd.DataFrame()): assert isinstance(fit_table(t, WHO, 40), str)


def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    assert text_width() == 80
    monkeypatch.delenv('COLUMNS')
    monkeypatch.setattr(console.shutil, 'get_terminal_size', lambda fallback: os.terminal_size(fallback))
    assert text_width() == 100 # no terminal: a file, a pipe, a notebook


def test_what_commands_print(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    scores = [
        gather_items((Item('x', str(i), dict(balanced_accuracy=(i*k) % 7 / 7)) for i in range(20)), f'nano/student/{name}', 'x', 'run')
        for k, name in ((1, 'confidence'), (2, 'xent'))
    ]
    head = str(compare_results(*scores)).split('\n\nbalanced_accuracy:')[0]
    assert widest(head) <= 80 and 'significant' in head and head.count('balanced_accuracy') == 2
    stages = pd.DataFrame([('student-base-confidence-pico-test', 'scholar', 'score', 12000, 1234567, 'to do', .5)],
                          columns=['stage', 'model', 'kind', 'rows', 'tokens', 'state', 'minutes'])
    plan = repr(Plan(stages, 1, 0., '', '')).split('\n\n')[1]
    assert widest(plan) <= 80 and 'minutes' in plan
    scores = pd.DataFrame([('held out', 'supervisor, calibrated', 1000, *[.123]*7)], columns=[*SHOWN])
    text = label._in_terminal(scores)
    assert widest(text) <= 80 and '|' not in text and widest(label._in_markdown(scores)) > 80


SENTENCES = ('- student minus human: −0.034 [−0.081, 0.011], 95 % CI: no significant difference; the minimum detectable effect is 0.065 at '
             '80 % power, and [0.601, 0.702] is the interval of the student',
             'refused       3 of 700 rows (train): chosen and rejected differ before the last assistant turn; row 204, row 225, row 429',
             'written to runs/a-long-name/of-a-folder/with-parts: report.html, report.md, figure.png, results.tex, adapters/ …')


@pytest.mark.parametrize('width', [40, 60, 80, 100])
@pytest.mark.parametrize('text', SENTENCES)
def test_sentences_are_broken_between_words(text, width):
    lines = fit_text(text, width=width).split('\n')
    assert ' '.join(text.split()) == ' '.join(' '.join(lines).split()) # every word, none cut
    assert all(len(line) <= width or len(line.split()) == 1 for line in lines) and len(lines) > 1
    assert '[0.601, 0.702]' not in text or any('[0.601, 0.702]' in line for line in lines)


@pytest.mark.parametrize('command', ["w2s run preferences --out runs/x --seeds 3", "pip install 'w2s[jupyter]'", 'bash jobs/study.sh'])
@pytest.mark.parametrize('before', range(5, 70, 7))
def test_commands_to_copy_stay_on_a_line(command, before):
    text = f'{"word "*(before//5)}do this: {command}; then that'
    assert any(command in line for line in fit_text(text, width=60).split('\n'))


def test_tables_settings_code_and_frames_are_left_alone():
    table = WIDE[WHO].assign(note='x'*60).to_string(index=False)
    words = 'a b '*40
    for text in (table, f'name = "{words}', '| ' + 'a | '*50, '╭' + '─ '*60, f'\x1b[31m{words}', f'```\n{words}', f'"""\n\n{words}'):
        assert fit_text(text, width=60) == text


def plain(text): return re.sub(r'\x1b\[[\d;]*m', '', text)


class Terminal(io.StringIO):
    def isatty(self): return True


WIDTHS = [(True, 72, 72), (True, 250, 100), (False, None, 0), (False, 72, 0), (False, 250, 0)]


@pytest.mark.parametrize('terminal, columns, width', WIDTHS)
def test_only_a_terminal_breaks_lines(monkeypatch, terminal, columns, width):
    monkeypatch.setattr(console.shutil, 'get_terminal_size', lambda fallback: os.terminal_size((columns or fallback[0], 24)))
    if columns and not terminal: monkeypatch.setenv('COLUMNS', str(columns))
    else: monkeypatch.delenv('COLUMNS', raising=False)
    out = Terminal() if terminal else io.StringIO()
    with redirect_stdout(out):
        assert sentence_width() == width
        text = fit_text('word '*60)
    assert ('\n' in text) is bool(width) and (not width or widest(text) <= width)


def test_a_stream_prints_lines_that_fit_and_those_in_front_of_it_hear_whole_ones(monkeypatch):
    monkeypatch.setenv('COLUMNS', '40')
    shown = Terminal()
    with redirect_stdout(SentenceStream(shown)), hear_lines() as heard:
        print(SENTENCES[0], flush=True)
        print(SENTENCES[1])
    assert heard == list(SENTENCES[:2]) and shown.getvalue().count('\n') > 5 and widest(shown.getvalue()) <= 40
    with redirect_stdout(SentenceStream(shown)): typer.echo(SENTENCES[0])
    assert widest(shown.getvalue()) <= 40


def test_commands_start_with_such_a_stream_where_lines_are_to_fit(monkeypatch):
    monkeypatch.setenv('COLUMNS', '40')
    for out, kind in ((Terminal(), SentenceStream), (io.StringIO(), io.StringIO)):
        with redirect_stdout(out):
            prepare_streams()
            prepare_streams()
            assert type(sys.stdout) is kind and not isinstance(getattr(sys.stdout, 'stream', None), SentenceStream)


def test_errors_fit_the_terminal():
    "In a terminal of 45 columns; in a pipe the line stays whole, though COLUMNS says 45 there, too"
    words = [sys.executable, '-m', 'w2s', 'run', 'preferences', '--seeds', '3', '--values', '1,2']
    env = {**os.environ, 'COLUMNS': '45', 'PYTHONPATH': str(ROOT)}
    ours, theirs = os.openpty()
    in_terminal = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=theirs, check=False)
    os.close(theirs)
    lines = plain(os.read(ours, 10_000).decode()).splitlines()
    os.close(ours)
    assert in_terminal.returncode == 1 and lines[0].startswith('error: --values') and len(lines) > 1, lines
    assert max(map(len, lines)) <= 45
    in_pipe = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert in_pipe.returncode == 1 and len(in_pipe.stderr.strip().splitlines()) == 1, in_pipe.stderr


def test_lights_of_a_check_fit(monkeypatch):
    found = Checked((Line('loads', 'ok', 'yes', 'pico'), Line('what it can find', 'look', 'more examples would show smaller effects '*4)))
    monkeypatch.setenv('COLUMNS', '80')
    with redirect_stdout(Terminal()): lines = repr(found).split('\n')
    assert widest('\n'.join(lines)) <= 80 and lines[0].startswith('ok    loads (pico)') and lines[2].startswith(' '*24)
    assert repr(found).split('\n')[1].count('effects') == 4 # whole, so that grep finds it


def test_rows_to_browse_fit(monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    rows = pd.DataFrame([dict(id='1', seed=0, confidence=.981, margin=3.2, prompt='What? '*20, chosen='This. '*20, rejected='That! '*20)]*3)
    text = repr(FeedbackBrowser(None, rows, 'floor'))
    assert widest(text) <= 80 and text.count('confidence') == 1
