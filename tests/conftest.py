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


def pytest_collection_modifyitems(items):
    "Notebooks first, in the order of test_notebooks.py: a long one started last would leave a worker idle. And mark the quick tier"
    items.sort(key=lambda item: item.path.name != 'test_notebooks.py')
    for item in items:
        if item.path.stem in QUICK and item.originalname not in LONG: item.add_marker('quick')
