"""Every notebook is a test: one pytest case each, so that xdist, --durations and coverage see them. What its cells print is compared with
the saved outputs, whose numbers may differ by the machine and whose words may not"""
import json
import re
import warnings
from difflib import unified_diff
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from execnb.nbio import read_nb
from execnb.shell import CaptureShell
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_nb

CFG = get_config()
# Folders whose pages train or run whole experiments, the slowest first
SLOW = [
    'tutorials',
    'papers',
    'cli',
    'experiments',
    'report',
    'compare',
    'explanations',
    'feedback',
    'train',
    'models',
    'files',
    'evaluate',
]
# Folders of pages without models, which print the same words on any machine; what a model writes may depend on its processor
SAME_EVERYWHERE = ('data', 'io', 'plots', 'world')


def slowest_first(path: Path) -> tuple:
    "Sort key: the folder's place in SLOW, then the number of code cells"
    folder = path.parent.name
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = sum(cell['cell_type'] == 'code' for cell in cells)
    return (SLOW.index(folder) if folder in SLOW else len(SLOW), -code, str(path))


NOTEBOOKS = sorted((path.resolve() for path in nbglob(as_path=True)), key=slowest_first)


@pytest.fixture
def registries():
    """A page that defines a method of w2s registers it again, from the page: the tests that follow in this process want that of the
    package. A page begins without the options that another one set"""
    from w2s.compare.extensions import IMPORTED, KINDS
    before = {kind: dict(registry.items()) for kind, registry in KINDS.items()} # reading them all imports their modules
    pd.reset_option('^display')
    plt.rcdefaults()
    yield
    IMPORTED.clear()
    for kind, found in before.items():
        KINDS[kind].found.clear()
        KINDS[kind].found.update(found)


# hexadecimal hashes, temporary folders, numbers with their signs and exponents
VARIES = re.compile(r'0x[0-9a-f]+|\b(?=[a-f]*\d)[0-9a-f]{6,}\b|/tmp/[\w.-]+|[-+~]?\d[\d.,:]*(?:e[-+]?\d+)?')


def joined(text): return text if isinstance(text, str) else ''.join(text)


def plain(html): return re.sub('(?s)<style.*?</style>|<[^>]+>', '\n', joined(html))


def shown(cell) -> list[str]:
    "Lines that a cell printed or returned as text, with 0 for every number and one space for many"
    texts = []
    for out in cell.get('outputs', []):
        if out.get('name') == 'stdout': texts.append(out['text'])
        elif 'text/html' in (data := out.get('data', {})): texts.append(plain(data['text/html']))
        elif 'text/plain' in data: texts.append(data['text/plain'])
    return [' '.join(line.split()) for line in VARIES.sub('0', '\n'.join(map(joined, texts))).splitlines() if line.strip()]


def stale(saved, made) -> str:
    "The cells of a page whose saved outputs say something else than those that were just made"
    before, out = {c['id']: c for c in saved.cells}, []
    for cell in made.cells:
        if cell.cell_type != 'code' or not cell.get('was_run'): continue
        a, b = shown(before[cell['id']]), shown(cell)
        if a != b: out += [f'cell {cell["id"]}:', *list(unified_diff(a, b, 'saved', 'made', lineterm='', n=0))[:12]]
    return '\n'.join(out)


@pytest.fixture
def ran(monkeypatch):
    "The pages that are run, with what their cells printed"
    pages = []
    class Kept(CaptureShell):
        def run_all(self, nb, **options):
            pages.append(nb)
            super().run_all(nb, postproc=lambda cell: cell.update(was_run=True), **options)
    monkeypatch.setattr('nbdev.test.CaptureShell', Kept)
    return pages


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.relative_to(CFG.nbs_path.resolve()).as_posix())
def test_notebook(path, capfd, registries, ran):
    saved = read_nb(path)
    passed, _ = run_nb(path, skip_flags=CFG.tst_flags.split(), basepath=CFG.config_path)
    assert passed, capfd.readouterr().err[-3000:]
    if not (found := stale(saved, ran[0])): return
    assert path.parent.name not in SAME_EVERYWHERE, f'outputs of another state; refresh the page and look at it:\n{found}'
    warnings.warn(f'{path.name} prints something else than it did when it was saved:\n{found}', stacklevel=1)
