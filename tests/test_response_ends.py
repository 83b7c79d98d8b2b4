"Responses that the limit of tokens cuts: defaults that fit the rows, refused before the start, counted in the report"
import json

import numpy as np
import pandas as pd
import pytest
from conftest import reward_folder

from w2s.compare import answer, gold
from w2s.compare.arms import Arm, Made
from w2s.compare.config import to_toml
from w2s.compare.demonstration_tables import cut_answers
from w2s.compare.learn import Study
from w2s.compare.models import know_model, open_base
from w2s.compare.plan import plan
from w2s.compare.preference_data import load_preferences
from w2s.compare.preference_settings import WeakTeacher, fill_settings, sampling
from w2s.compare.response_ends import check_cut, check_lengths, check_responses, chosen_tokens, cut_words
from w2s.compare.stages import Run
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import ConfigError
from w2s.experiments import preferences as weak_teacher
from w2s.experiments.preferences import open_preferences
from w2s.models.load import LoadSettings
from w2s.models.tiny import tiny_model
from w2s.train.endings import Response
from w2s.train.generate import generate

LONG = 'Good question! The answer is 6 and Good question! The answer is 9.'
REAL = dict(weak='facebook/opt-125m', strong='facebook/opt-1.3b', samples=2, gold='judge')


# Defaults

@pytest.mark.parametrize(
    'given, wanted',
    [
        ({}, (1.0, 32)),
        (dict(data='world:7', weak='facebook/opt-125m', strong='facebook/opt-1.3b'), (1.0, 32)),
        (dict(data='hh', **REAL), (0.7, 256)),
        (dict(data='pairs.jsonl', **REAL, temperature=1.2), (1.2, 256)),
        (dict(data='pairs.jsonl', **REAL, response_tokens=32), (0.7, 32)),
        (dict(data='pairs.jsonl', samples=1, gold='judge'), (0.7, 64)),
        (dict(data='pairs.jsonl', weak='pico', strong='./mine', samples=1, gold='judge'), (0.7, 256)),
    ],
)
def test_defaults_fit_the_rows(given, wanted):
    "The world's answers are a line; the paper's limit for rows from a file; half of what a small model reads"
    for c in (fill_settings(given), WeakTeacher(**given)): assert (sampling(c).temperature, sampling(c).max_tokens) == wanted
    filled = fill_settings(given)
    assert (filled.temperature, filled.response_tokens) == wanted and f'response_tokens = {wanted[1]}' in to_toml(filled)


@pytest.mark.parametrize('given', [{}, dict(data='pairs.jsonl', weak='a', strong='b')])
def test_settings_of_a_run_without_its_responses(given):
    "What a run wrote down, given back with samples = 0, is no mistake; any other value is"
    filled = fill_settings(given | dict(samples=2, gold='' if not given else 'judge'))
    usual = dict(temperature=filled.temperature, response_tokens=filled.response_tokens)
    assert not fill_settings(given | dict(samples=0, gold='') | usual).samples
    for name in usual:
        with pytest.raises(ConfigError, match='do nothing without samples'):
            fill_settings(given | usual | {'samples': 0, name: usual[name] * 2})


# Before the start

@pytest.fixture(scope='module')
def rows(tmp_path_factory):
    "A model, a reward model, and short preference rows"
    folder = tmp_path_factory.mktemp('ends')
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(60, seed=3)]
    write_samples(folder/'data', 60, seed=3)
    tiny_model(folder/'model', texts, layers=1, seed=1)
    reward_folder(folder/'judge', texts)
    return folder


def config_of(rows, **more):
    return WeakTeacher(
        **dict(
            data=str(rows / 'data'),
            weak=str(rows / 'model'),
            strong=str(rows / 'model'),
            n_labelled=12,
            n_unlabelled=12,
            n_test=6,
            samples=1,
            gold=str(rows / 'judge'),
            load=LoadSettings('none', 'float32'),
        )
        | more
    )


def loaded(c):
    model = know_model('strong', c.strong, c)
    return model, load_preferences(c.data, [model.reader], c.n_test)


def test_lengths_are_those_of_the_chosen_responses(rows):
    model, data = loaded(config_of(rows))
    tok = model.reader.tokenizer
    chosen = [len(tok(r, add_special_tokens=False)['input_ids']) for part in data.train.values() for r in part['chosen']]
    assert np.abs(chosen_tokens(model, list(data.train.values())) - 1 - chosen).max() <= 1 # an end token, and a space that joins


@pytest.mark.parametrize('tokens, more', [(4, {}), (500, {}), (4, dict(supervisor='reward'))])
def test_a_limit_that_cannot_be_right_is_refused_before_the_first_training(rows, tmp_path, tokens, more):
    "Most training responses are longer; or no prompt leaves room for so many"
    c = config_of(rows, response_tokens=tokens, **more)
    for do in (lambda: weak_teacher.run(c, tmp_path/'run', quiet=True), lambda: plan(open_preferences, c, tmp_path/'run')):
        with pytest.raises(ConfigError, match='raise response_tokens' if tokens == 4 else 'leave no room for a response of 500 tokens'):
            do()
    assert not (tmp_path/'run').exists()


def test_without_responses_no_limit_is_looked_at(rows):
    c = config_of(rows, samples=0, gold='')
    model, data = loaded(c)
    assert check_responses(c, [model], data) == ''


def test_what_the_limit_would_cut_is_said(rows):
    c = config_of(rows, response_tokens=10)
    model, data = loaded(c)
    long = (chosen_tokens(model, list(data.train.values())) > 10).mean()
    assert 0 < long < .5 and f'{long:.1%} of the chosen training responses have more' in check_responses(c, [model], data)


@pytest.mark.parametrize('long, refused', [(0., False), (.3, False), (.5, False), (.51, True), (1., True)])
def test_most_means_more_than_half(long, refused):
    lengths = np.where(np.arange(100) < 100*long, 33, 32)
    c = WeakTeacher(samples=1, response_tokens=32)
    if not refused: assert f'{long:.1%}' in check_lengths(c, lengths)
    else:
        with pytest.raises(ConfigError, match=f'{long:.0%} of the chosen'): check_lengths(c, lengths)


# What came out

def stage(rows, where, **more):
    c = config_of(rows, **more)
    model, data = loaded(c)
    return gold.sample_stage(Study(c, Run(where, lambda line: None), True), model, None, 'base', data.test, 0), c, model, data


def test_a_response_is_cut_if_and_only_if_it_fills_the_limit_without_an_end(rows, tmp_path):
    written, c, model, data = stage(rows, tmp_path, response_tokens=12, samples=3)
    base = open_base(model)
    longer = generate(
        base.model,
        base.tokenizer,
        list(data.test['prompt']),
        sampling(config_of(rows, response_tokens=24, samples=3)),
        0,
        quiet=True,
        ids=list(data.test['id']),
        arm='base',
    )
    flat = [(w, text) for row, others in zip(written, longer, strict=True) for w, text in zip(row, others, strict=True)]
    assert {w.cut for w, _ in flat} <= {True, False} and any(w.cut for w, _ in flat)
    for w, text in flat: assert w.cut == (text != w.text) and text.startswith(w.text) # another limit shows what is behind it


def test_the_table_of_responses_knows(rows, tmp_path):
    written, _, _, data = stage(rows, tmp_path, response_tokens=12, samples=2)
    def score(prompts, texts): return pd.DataFrame({'gold_reward': [1.]*len(texts), 'why': ''})
    table = gold.response_rows(score, data.test, written, 'baseline', 'sft', 0)
    assert table.cut.tolist() == [w.cut for row in written for w in row]
    assert gold.response_rows(score, data.test, [[w.text for w in row] for row in written], 'baseline', 'sft', 0).cut.isna().all()


def responses(*cut): return pd.DataFrame({'role': ['floor', 'student']*(len(cut)//2), 'method': 'dpo', 'cut': pd.array(cut, 'boolean')})


@pytest.mark.parametrize(
    'cut, refused',
    [
        ([True] * 4, True),
        ([True, True, True, False], True),
        ([True, False] * 2, False),
        ([False] * 4, False),
        ([None, None, True, True], True),
    ],
)
def test_a_table_of_beginnings_is_refused(cut, refused):
    table = responses(*cut)
    if not refused: return check_cut(table, 32)
    with pytest.raises(ConfigError, match='raise response_tokens, or leave responses out with samples = 0'): check_cut(table, 32)


@pytest.mark.parametrize(
    'cut, said',
    [
        ([True, False, True, False], '2 of 4 responses (50.0%)'),
        ([True, False, True, False], 'floor (dpo), 100.0%'),
        ([False] * 4, 'None of 4 responses'),
        ([None] * 4, 'was not written down'),
        ([None, None, False, True], '1 of 2 responses'),
    ],
)
def test_how_many_were_cut_is_said(cut, said): assert said in cut_words(responses(*cut), 32)


def test_a_run_counts_what_was_cut(rows, tmp_path, monkeypatch):
    "From the sampling to the report; and a run whose responses were mostly cut has no result"
    def judge(prompts, texts): return pd.DataFrame({'gold_reward': [float(len(t)) for t in texts], 'why': ''})
    monkeypatch.setattr('w2s.compare.preference_arms.gold_judge', lambda config, root: judge)
    c = config_of(rows, response_tokens=16, samples=2)
    def answers(share):
        def respond(model, tok, prompts, how, *a):
            return [[Response(' Yes', 2, (7 * i + k) % 10 >= 10 * share) for k in range(how.samples)] for i in range(len(prompts))]
        return respond
    with monkeypatch.context() as m:
        m.setattr(answer, 'respond', answers(.8))
        with pytest.raises(ConfigError, match='what was trained is kept'): weak_teacher.run(c, tmp_path/'a', quiet=True)
    monkeypatch.setattr(answer, 'respond', answers(.2))
    done = weak_teacher.run(c, tmp_path/'b', quiet=True)
    n = int(done.responses.cut.sum())
    assert 0 < n < len(done.responses)/2 and f'{n} of {len(done.responses)} responses' in done.caption
    kept = [json.loads(f.read_text()) for f in (tmp_path/'b').rglob('texts.json')]
    assert sum(cut for rows in kept for row in rows for _, cut in row) == n


# Answers of a transfer

def test_answers_of_a_transfer_that_fill_their_tokens_are_counted(rows):
    "Those of the weak model and of everybody's test, each with the model's own tokens; a file's are not looked at"
    model, _ = loaded(config_of(rows))
    n = len(model.reader.tokenizer(LONG, add_special_tokens=False)['input_ids'])
    test = [[LONG, 'No.'], [LONG]]
    def arm(role, model, seed, **extra): return Arm(role, 'm', seed=seed, model=model, extra=extra)
    arms = [arm('floor', model, k, given=[LONG, 'Yes.', ''], answers=test) for k in (0, 1)]
    arms += [arm('floor', None, k, given=[LONG]*5, answers=test) for k in (0, 1)]
    arms += [arm(role, model, k, answers=test) for role in ('student', 'baseline') for k in (0, 1)]
    made = Made(arms, [])
    assert cut_answers(made, n) == {'weak answers': (2, 6), 'answers to the test': (8, 12)}
    assert cut_answers(made, 2*n) == {'weak answers': (0, 6), 'answers to the test': (0, 12)}
