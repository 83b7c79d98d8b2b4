"A table that a command prints is no wider than the terminal, and no word of it is cut"
import os

import pandas as pd
import pytest

from w2s.compare.plan import Plan
from w2s.data.score_items import Item, gather_items
from w2s.evaluate.paired import compare_results
from w2s.files import label
from w2s.files.label import SHOWN
from w2s.io import console
from w2s.io.console import fit_table, text_width

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
