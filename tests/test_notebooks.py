"Every notebook is a test: one pytest case each, so that xdist, --durations and coverage see them"
import json
from pathlib import Path

import pytest
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


def slowest_first(path: Path) -> tuple:
    "Sort key: the folder's place in SLOW, then the number of code cells"
    folder = path.parent.name
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    code = sum(cell['cell_type'] == 'code' for cell in cells)
    return (SLOW.index(folder) if folder in SLOW else len(SLOW), -code, str(path))


NOTEBOOKS = sorted((path.resolve() for path in nbglob(as_path=True)), key=slowest_first)


@pytest.fixture
def registries():
    "A page that defines a method of w2s registers it again, from the page: the tests that follow in this process want that of the package"
    from w2s.compare.extensions import IMPORTED, KINDS
    before = {kind: dict(registry.items()) for kind, registry in KINDS.items()} # reading them all imports their modules
    yield
    IMPORTED.clear()
    for kind, found in before.items():
        KINDS[kind].found.clear()
        KINDS[kind].found.update(found)


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.relative_to(CFG.nbs_path.resolve()).as_posix())
def test_notebook(path, capfd, registries):
    passed, _ = run_nb(path, skip_flags=CFG.tst_flags.split(), basepath=CFG.config_path)
    assert passed, capfd.readouterr().err[-3000:]
