"What every test needs: one thread a worker, no network, the long notebooks first, and the folder of shared data"
import gc
import os

# Before anything loads torch: two workers with two threads each would fight over two cores.
os.environ['OMP_NUM_THREADS'] = '1'
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
# Commands that tests start are those of an installation, which keeps what Python has compiled
os.environ.pop('PYTHONDONTWRITEBYTECODE', None)

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def shared() -> Path:
    "The folder `shared` beside the clone, with real data and weights; the test is skipped where it is not"
    folder = ROOT.parent / 'shared'
    if not folder.is_dir(): pytest.skip('needs the folder `shared` beside the clone')
    return folder


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    "A tiny model that has read a little; modules that need another one have their own"
    from w2s.data.samples import sample_preferences
    from w2s.models.tiny import pretrain, tiny_model
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(60, seed=3)]
    out = tiny_model(tmp_path_factory.mktemp('tiny')/'model', texts)
    pretrain(out, texts, steps=40)
    return out


def reward_folder(folder, texts):
    "A tiny reward model"
    import torch
    from transformers import LlamaForSequenceClassification

    from w2s.models.tiny import tiny_config, tiny_tokenizer
    tok = tiny_tokenizer(texts)
    config = tiny_config(len(tok))
    config.num_labels = 1
    torch.manual_seed(5)
    model = LlamaForSequenceClassification(config)
    model.score.weight.data.normal_(std=1.) # far enough from zero that answers differ in bfloat16
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


# The quick tier, `pytest -m quick`: what a change breaks most often, in under two minutes. Whole files, less what takes long in them
QUICK = (
    'test_house',
    'test_data',
    'test_label_measures',
    'test_labels',
    'test_maths',
    'test_preference_losses',
    'test_forms',
    'test_world_facts',
    'test_world_safety',
    'test_columns',
    'test_escaping',
    'test_model_folders',
    'test_settings',
    'test_walk',
    'test_extensions',
)
LONG = (
    'test_each_module_imports_alone',
    'test_paired_intervals_are_those_of_a_bootstrap_that_computes_the_statistic_anew',
    'test_real_helpful_rows_are_read_and_cleaned_in_seconds',
    'test_pitfall_05_weights_act_in_four_bits',
    'test_every_command_says_what_it_reads',
    'test_the_report_of_a_run_says_what_it_read',
    'test_leave_out_in_a_file_of_settings',
)


# A plain `pytest` takes minutes: it leaves out tests marked `long`, and of a test marked `cases(n)` all but n of its cases, evenly spread.
# `pytest --all` runs everything, and so does a plain one in which files, tests or `-k` are named.

def pytest_addoption(parser):
    parser.addoption('--all', action='store_true', help='run the tests marked long too, and every case of tests marked cases')


def pytest_configure(config):
    named = config.args_source is config.ArgsSource.ARGS or bool(config.option.keyword)
    if not hasattr(config, 'workerinput'): config.option.all |= named # workers are told by this process


def spread(n: int, most: int) -> set[int]:
    "Which of n cases: at most so many, the first and the last among them"
    return set(range(n)) if n <= most else {round(i*(n - 1)/max(most - 1, 1)) for i in range(most)}


def kept(items):
    "The tests of a plain run"
    places = {}
    for item in items: places.setdefault((item.path, item.cls, item.originalname), []).append(item)
    chosen = set()
    for cases in places.values():
        mark = cases[0].get_closest_marker('cases')
        chosen |= {cases[i].nodeid for i in spread(len(cases), mark.args[0] if mark else len(cases))}
    return [item for item in items if item.nodeid in chosen and not item.get_closest_marker('long')]


def pytest_collection_finish():
    "What is there now stays: the garbage collector, which a page of ours may call a hundred times, need not look at it again"
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    "Every page has left a shell of IPython, and each of them collects all garbage when Python ends"
    gc.freeze()


def pytest_collection_modifyitems(config, items):
    """Notebooks first, in the order of test_notebooks.py: a long one started last would leave a worker idle. Mark the quick tier, and
    leave out what a plain run leaves out"""
    items.sort(key=lambda item: item.path.name != 'test_notebooks.py')
    for item in items:
        if item.path.stem in QUICK and item.originalname not in LONG: item.add_marker('quick')
    if config.option.all: return
    now = kept(items)
    stays = set(now)
    config.hook.pytest_deselected(items=[item for item in items if item not in stays])
    items[:] = now
