"A reward model from a folder as the gold judge of a run on rows from a file"
import json

import pytest
from conftest import reward_folder
from typer.testing import CliRunner

import w2s.compare.gold as gold
from w2s.cli.app import app
from w2s.compare.preference_settings import WeakTeacher
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import ModelError
from w2s.experiments.preferences import run
from w2s.models.adapters import LoraSettings
from w2s.models.load import LoadSettings
from w2s.models.tiny import pretrain, tiny_model
from w2s.report.write import write
from w2s.train.loop import TrainSettings

def test_a_reward_model_scores_the_responses_of_a_run_once(tmp_path, monkeypatch):
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(60, seed=3)]
    write_samples(tmp_path/'data', 60, seed=3)
    pretrain(tiny_model(tmp_path/'weak', texts, layers=1, seed=1), texts, steps=80) # it knows when an answer is over
    reward_folder(tmp_path/'judge', texts*5)
    step = TrainSettings(batch_size=8, learning_rate=3e-3)
    config = WeakTeacher(
        str(tmp_path / 'data'),
        str(tmp_path / 'weak'),
        str(tmp_path / 'weak'),
        n_labelled=12,
        n_unlabelled=12,
        n_test=6,
        load=LoadSettings('none', 'float32'),
        lora=LoraSettings(rank=2),
        sft=step,
        dpo=step,
        samples=2,
        response_tokens=24,
        gold=str(tmp_path / 'judge'),
    )
    first = run(config, tmp_path/'run', quiet=True)
    written = first.responses
    assert {'gold_reward', 'why'} <= set(written.columns) and 'right' not in written.columns
    assert written.gold_reward.nunique() > 10
    assert {'gold_reward', 'win_rate', 'longer_rate'} <= set(first.intervals.metric)
    page = (write(first)/'report.md').read_text(encoding='utf-8')
    assert 'by the reward model judge' in page and '## Wins, ties and losses' in page
    # each score is that of the model itself, read anew
    gold._scorer.cache_clear()
    one = written.iloc[7]
    assert abs(gold._scorer(config.gold)([one.prompt], [one.response])[0] - one.gold_reward) < 1e-6
    # and a second run asks no model at all
    gold.close_scorer()
    monkeypatch.setattr(gold, 'load_reward_model', None)
    assert run(config, tmp_path/'run', quiet=True).responses.equals(written)


@pytest.mark.parametrize(
    'kind, words',
    [
        ('a language model', 'is no reward model'),
        ('not there', 'nowhere'),
        ('several numbers', 'with 3 numbers a text'),
        ('no weights', 'holds no weights'),
        ('no tokenizer', 'tokenizer'),
    ],
)
@pytest.mark.parametrize('dry', [True, False])
def test_a_gold_model_that_could_not_judge_is_refused_before_anything_is_trained(tmp_path, kind, words, dry):
    "It is asked last: what is wrong with it must be found first"
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(20, seed=3)]
    write_samples(tmp_path/'data', 40, seed=3)
    judge = tmp_path/'judge'
    if kind == 'a language model': tiny_model(judge, texts)
    elif kind == 'not there': judge = tmp_path/'nowhere'
    else: reward_folder(judge, texts)
    if kind == 'several numbers':
        about = json.loads((judge/'config.json').read_text())
        (judge / 'config.json').write_text(
            json.dumps({**about, 'id2label': {str(i): str(i) for i in range(3)}, 'label2id': {str(i): i for i in range(3)}})
        )
    for name in {'no weights': ['model.safetensors'], 'no tokenizer': ['tokenizer.json', 'tokenizer_config.json']}.get(kind, []):
        (judge / name).unlink()
    told = CliRunner().invoke(
        app,
        [
            'run',
            'preferences',
            '--data',
            str(tmp_path / 'data'),
            '--weak',
            'pico',
            '--strong',
            'nano',
            '--seeds',
            '1',
            '--samples',
            '1',
            '--gold',
            str(judge),
            '--out',
            str(tmp_path / 'run'),
            *['--dry-run'][:dry],
        ],
    )
    assert isinstance(told.exception, ModelError) and words in str(told.exception), told.exception
    assert not list((tmp_path/'run').glob('stages/*'))
