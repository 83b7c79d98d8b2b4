"What every test needs: one thread a worker, no network, the long notebooks first, and the folder of shared data"
import os

# Before anything loads torch: two workers with two threads each would fight over two cores.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def shared() -> Path:
    "The folder `shared` beside the clone, with real data and weights; the test is skipped where it is not"
    folder = ROOT.parent / 'shared'
    if not folder.is_dir(): pytest.skip('needs the folder `shared` beside the clone')
    return folder


def pytest_collection_modifyitems(items):
    "Notebooks first, in the order of test_notebooks.py: a long one started last would leave a worker idle"
    items.sort(key=lambda item: item.path.name != 'test_notebooks.py')
