"A report that somebody edited is kept when the command is given again: after a run that ended, and after one that was stopped"
import os
import warnings

import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.errors import W2SWarning
from w2s.io import manifests
from w2s.io.manifests import INCOMPLETE, MANIFEST, find_damage, publish, read_manifest, say_incomplete

NAMES = ('report.md', 'report.html', 'config.toml', 'versions.json', 'results.tex', 'labels.jsonl', 'rows.csv', 'figure.svg')


def results(number, names=NAMES):
    def write(folder):
        for name in names: (folder/name).write_text(f'{name}: {number}')
        (folder/'adapters').mkdir()
        (folder/'adapters'/'card.md').write_text(f'card {number}')
    return write


def kept(folder): return {p.name: p.read_text() for p in folder.iterdir() if '.edited' in p.name}


def quietly(folder, number, *more):
    "Publish; the names of what is said to be kept"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        publish(folder, results(number, *more), {})
    return [str(w.message) for w in said if w.category is W2SWarning]


@pytest.mark.parametrize('stopped', [False, True])
@pytest.mark.parametrize('name', NAMES)
def test_an_edited_text_is_kept(name, stopped, tmp_path):
    quietly(tmp_path, 1)
    if stopped: say_incomplete(tmp_path, 'a run is at work, or was killed')
    (tmp_path/name).write_text('my remarks')
    said = quietly(tmp_path, 2)
    assert kept(tmp_path) == {f'{name}.edited': 'my remarks'} and (tmp_path/name).read_text() == f'{name}: 2'
    assert len(said) == 1 and name in said[0] and f'kept as {name}.edited' in said[0]
    (tmp_path/name).write_text('other remarks') # and a second time
    quietly(tmp_path, 3)
    assert kept(tmp_path) == {f'{name}.edited': 'my remarks', f'{name}.edited1': 'other remarks'}


def test_an_edited_text_of_a_set_that_no_longer_has_it_is_kept(tmp_path):
    quietly(tmp_path, 1)
    (tmp_path/'rows.csv').write_text('mine')
    quietly(tmp_path, 2, NAMES[:2])
    assert kept(tmp_path) == {'rows.csv.edited': 'mine'} and not (tmp_path/'rows.csv').exists()


class Killed(BaseException): pass


def kill_at(monkeypatch, n):
    "The process ends at the n-th file that is moved, removed or written while results are replaced; False: there are not so many"
    left = [n]
    def counted(real):
        def call(*a, **k):
            left[0] -= 1
            if left[0] < 0: raise Killed
            return real(*a, **k)
        return call
    monkeypatch.setattr(manifests, 'write_manifest', counted(manifests.write_manifest))
    monkeypatch.setattr(manifests, 'remove_tree', counted(manifests.remove_tree))
    monkeypatch.setattr(manifests.os, 'replace', counted(os.replace))


def publish_killed(folder, number, n, *more):
    with pytest.MonkeyPatch.context() as m:
        kill_at(m, n)
        try: publish(folder, results(number, *more), {})
        except Killed: return True
    return False


@pytest.mark.parametrize('again', [None, 3, 9])
def test_a_kill_while_results_are_replaced_edits_nothing(again, tmp_path):
    "At any step, and killed once more at the next try: what w2s has written is never taken for the user's"
    few, n = NAMES[:3], 0
    while True:
        folder = tmp_path/str(n)
        folder.mkdir()
        quietly(folder, 1, few)
        if not publish_killed(folder, 2, n, few): break
        if again is not None: publish_killed(folder, 3, again, few)
        assert quietly(folder, 4, few) == [] and kept(folder) == {}
        assert find_damage(folder) == [] and not (folder/INCOMPLETE).exists() and 'replaced' not in read_manifest(folder/MANIFEST)['made']
        n += 1
    assert n > 10


def test_what_is_edited_after_a_kill_is_kept(tmp_path):
    n = 0
    while True:
        folder = tmp_path/str(n)
        folder.mkdir()
        quietly(folder, 1, NAMES[:3])
        if not publish_killed(folder, 2, n, NAMES[:3]): break
        there = (folder/'report.md').exists() # it may be the one that is being replaced
        if there: (folder/'report.md').write_text('mine')
        quietly(folder, 3, NAMES[:3])
        assert kept(folder) == ({'report.md.edited': 'mine'} if there else {}), n
        n += 1
    assert n > 10


def test_a_repeated_run_keeps_an_edited_report(tmp_path):
    "Through the command line, whose folder says that it is incomplete while it works"
    out = tmp_path/'run'
    words = ('run safety --weak pico --strong nano --seeds 1 --epochs 1 --n-labelled 8 --n-unlabelled 8 --n-test 8 --no-baseline '
             f'--method xent --out {out}').split()
    assert CliRunner().invoke(app, words).exit_code == 0
    (out/'report.md').write_text('my remarks')
    with pytest.warns(W2SWarning, match='kept as report.md.edited'): done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and done.output.count(': found') and 'starting' not in done.output
    assert (out/'report.md.edited').read_text() == 'my remarks' and (out/'report.md').read_text().startswith('# ')
