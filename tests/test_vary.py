"""A comparison at several values of a setting: what is shared, what goes on after a kill, the same rows for all; and what is done with
labels before a student sees them"""
import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tomli_w
from datasets import Dataset
from scipy.special import expit
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare import learn, preference_data, supervisors
from w2s.compare.config import to_table
from w2s.compare.learn import Study
from w2s.compare.preference_data import LoadedData, halves, load_preferences
from w2s.compare.preference_settings import SUBSETS, LabelUse, WeakTeacher
from w2s.compare.stages import Run
from w2s.compare.supervisors import hold_out, join_rewards, student_rows, supervise
from w2s.data.rows import make_rows, to_pairs
from w2s.data.samples import sample_preferences, write_samples
from w2s.errors import ConfigError, DataError
from w2s.evaluate.metrics import agreement
from w2s.experiments import vary
from w2s.experiments.preferences import know_models, run
from w2s.experiments.vary import USES, VARIATIONS, contrast, run_varied, variants
from w2s.feedback.audit import matches
from w2s.feedback.preferences import given_labels, label_pairs
from w2s.models.tiny import tiny_model
from w2s.models.zoo import LADDER

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Rows and two tiny models that have learned nothing"
    home = tmp_path_factory.mktemp('vary')
    write_samples(home/'data', 50, seed=3)
    texts = [r['prompt'] + r['chosen'] for r in sample_preferences(50, seed=3)]
    for name, seed in (('weak', 1), ('strong', 2)): tiny_model(home/name, texts, layers=1, seed=seed)
    return home


@pytest.fixture(scope='module')
def given(home):
    "Settings of a comparison of a few seconds"
    step = dict(batch_size=8, learning_rate=1e-2)
    return dict(
        data=str(home / 'data'),
        weak=str(home / 'weak'),
        strong=str(home / 'strong'),
        n_labelled=12,
        n_unlabelled=12,
        n_test=8,
        load=dict(quantize='none', dtype='float32'),
        lora=dict(rank=2),
        sft=step,
        dpo=step,
    )


@pytest.fixture(scope='module')
def by_use(given, tmp_path_factory):
    "Three uses of labels, the folder, and what was printed"
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(StringIO()):
        return run_varied(given, 'use', ['hard', 'soft', 'confidence'], tmp_path_factory.mktemp('by')/'use'), said.getvalue()


def stages(folder): return [p.name.rsplit('-', 1)[0] for p in (folder/'stages').iterdir() if not p.name.startswith('.')]


# What is shared

def test_variations_share_stages(by_use):
    "Only what the use of labels reaches is done once for each value"
    varied, said = by_use
    done = stages(varied.folder)
    own = {'student-seed0-dpo', 'student-dpo-weak-seed0-test'}
    assert {k: done.count(k) for k in done} == {k: 3 if k in own else 1 for k in done} and len(done) == 16 + 2*len(own)
    lines = [line for line in said.splitlines() if line.startswith('[')]
    total = len(lines)
    assert total == 3*16 and lines[-1].startswith(f'[{total}/{total}]') # no more and no fewer than were announced
    assert sum(line.endswith(': found') for line in lines) == total - len(done)


def test_shared_arms_are_equal_and_others_are_not(by_use):
    "Human, ceiling and floor have the same scores at each value; the students differ, and a difference between values knows it"
    items = {at: r.items.set_index(['role', 'method', 'metric', 'id']).value for at, r in by_use[0].results.items()}
    for at in ('soft', 'confidence'):
        same = items[at].sub(items['hard']).abs().groupby('role').max()
        assert same[['human', 'ceiling', 'floor', 'baseline']].max() == 0 and same['student'] > 0
    e = contrast(by_use[0], 'soft', 'hard', 'logp_chosen')
    assert (
        np.isclose(e.value, (items['soft'] - items['hard']).xs('logp_chosen', level='metric')['student'].mean())
        and e.low <= e.value <= e.high
    )
    assert contrast(by_use[0], 'soft', 'hard', 'logp_chosen', 'human').value == 0


def test_a_value_is_the_run_of_its_settings(by_use, tmp_path):
    "One value alone, in another folder: the same numbers to the bit"
    alone = run(by_use[0].results['confidence'].config, tmp_path/'alone', quiet=True)
    for table in ('items', 'intervals', 'differences', 'labels', 'weak_labels'):
        pd.testing.assert_frame_equal(getattr(alone, table), getattr(by_use[0].results['confidence'], table), check_exact=True)


def test_killed_in_the_middle(by_use, given, tmp_path, monkeypatch):
    "An exception in the second value's training: the next start trains what was not finished, and ends in the same numbers"
    real, trained, touched = learn.train, [], {}
    def train(model, goal, settings, folder, seed, name, quiet, **more):
        trained.append(name)
        if trained.count('student-seed0-dpo') == 2 and not touched: raise KeyboardInterrupt
        return real(model, goal, settings, folder, seed, name, quiet, **more)
    monkeypatch.setattr(learn, 'train', train)
    def start(): return run_varied(given, 'use', ['hard', 'soft', 'confidence'], tmp_path/'run', quiet=True)
    with pytest.raises(KeyboardInterrupt): start()
    files = [p for f in (tmp_path/'run'/'stages').iterdir() if not f.name.startswith('.') for p in f.rglob('*')]
    touched.update({p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files})
    before = len(trained)
    again = start()
    assert trained[before - 1:] == ['student-seed0-dpo']*3 # the one that was cut off, anew, and the third value's
    assert before == 9 and {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files} == touched
    for at, r in again.results.items(): pd.testing.assert_frame_equal(r.items, by_use[0].results[at].items, check_exact=True)
    assert sorted(stages(tmp_path/'run')) == sorted(stages(by_use[0].folder))


# The same rows for all: pitfall 18

def letters(folder, texts):
    "A tiny model that reads letter by letter, and knows no snow"
    tiny_model(folder, texts, layers=1, seed=5)
    tok = Tokenizer(models.WordLevel({t: i for i, t in enumerate(['<unk>', '</s>', *'abcdefghijklmnopqrstuvwxyz .:?'])}, unk_token='<unk>'))
    tok.pre_tokenizer = pre_tokenizers.Split('', 'isolated')
    PreTrainedTokenizerFast(tokenizer_object=tok, eos_token='</s>', unk_token='<unk>').save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize('setting', ['supervisor', 'student'])
def test_models_of_all_values_have_the_same_rows(given, home, tmp_path, monkeypatch, setting):
    "Rows that one of the two tokenizers cannot read are gone for both, in training and in test"
    (tmp_path/'data').mkdir()
    for k, split in enumerate(('train_gt', 'train_w2s', 'test')):
        rows = [dict(prompt=f'{split.replace("_", " ")} {c}?', chosen=f'it is {c}.', rejected='no idea.') for c in 'abcdefghijklmnopqrst']
        rows.insert(3 + k, dict(prompt=f'what falls in {split}?', chosen='it is ☃', rejected='it is ☂'))
        (tmp_path/'data'/f'{split}.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')
    values = [given['strong'], letters(tmp_path/'letters', ['it is a'])]
    monkeypatch.setattr(vary, '_finish', lambda opened, run: opened.make.args[3])
    monkeypatch.setattr(vary, '_say_other_rows', lambda *results: None)
    seen = run_varied(
        given | dict(data=str(tmp_path / 'data'), n_labelled=None, n_unlabelled=None, n_test=None),
        setting,
        values,
        tmp_path / 'run',
        quiet=True,
    ).results
    easy, hard = (seen[v] for v in values)
    assert len(easy.test) == 20 and list(easy.test['id']) == list(hard.test['id'])
    for seed in (0, 1):
        for a, b in zip(halves(easy.train, None, None, seed), halves(hard.train, None, None, seed), strict=True):
            assert len(a) == 20 and list(a['id']) == list(b['id']) and not any('falls' in p for p in a['prompt'])
    alone, strong = know_models(WeakTeacher(str(tmp_path/'data'), given['weak'], given['strong']))
    assert len(load_preferences(str(tmp_path/'data'), [m.reader for m in (*alone, strong)]).test) == 21 # by themselves, they read it


@pytest.mark.parametrize('source', ['world', 'file'])
def test_shares_have_the_same_test_rows(source, given, tmp_path, monkeypatch):
    "Other halves, the same test rows; the number of rows in both halves together does not change"
    monkeypatch.setattr(vary, '_finish', lambda opened, run: opened.make.args[3])
    monkeypatch.setattr(vary, '_say_other_rows', lambda *results: None)
    for name in ('WORLD_TRAIN', 'WORLD_TEST'): monkeypatch.setattr(preference_data, name, 40) # they are made in no time
    settings = dict(n_labelled=20, n_unlabelled=20, n_test=20) if source == 'world' else given
    seen = run_varied(settings, 'share', ['1/4', '.4', '1/2'], tmp_path, quiet=True).results
    assert len({tuple(d.test['id']) for d in seen.values()}) == 1
    for at, share in (('1/4', .25), ('.4', .4), ('1/2', .5)):
        both = settings['n_labelled'] + settings['n_unlabelled']
        labelled, unlabelled = halves(seen[at].train, round(share*both), both - round(share*both), 0)
        assert (len(labelled), len(unlabelled)) == (round(share*both), both - round(share*both))


# Settings

def flat(table, where=''):
    "Settings by their whole names"
    return {k: v for n, x in table.items() for k, v in (flat(x, f'{where}{n}.') if isinstance(x, dict) else {where + n: x}).items()}


VARIED = {
    'supervisor': {'weak', 'supervisor'},
    'student': {'strong'},
    'share': {'n_labelled', 'n_unlabelled'},
    'beta': {'beta'},
    'labels': {'labels.subset'},
    'use': {f'labels.{f}' for f in ('targets', 'weights', 'keep', 'calibrate')},
    'loss': {'loss', 'labels.weights'},
    'start': {'start'},
}


@pytest.mark.parametrize('setting', VARIATIONS)
def test_every_value_makes_settings_for_the_ladder(setting):
    "Valid, no two alike, all of models that are there, and nothing differs but what is varied"
    configs = variants({}, setting)
    assert list(configs) == list(VARIATIONS[setting].values) and len({str(c) for c in configs.values()}) == len(configs)
    tables = [flat(to_table(c)) for c in configs.values()]
    assert {k for t in tables for k in t if t[k] != tables[0].get(k)} == VARIED[setting]
    for c in configs.values():
        assert c.data == 'world' and {c.strong, *c.weak.split('+')} <= set(LADDER) and c.seeds == 3 and c.samples == 2
        assert c.others == VARIATIONS[setting].others


def test_values_of_the_papers_are_there():
    "Every subset, every weight, every loss with and without weights"
    assert VARIATIONS['labels'].values == SUBSETS and {LabelUse(**u) for u in USES.values()} >= {
        LabelUse(),
        LabelUse(targets='soft'),
        LabelUse(weights='confidence'),
    }
    pairs = {(c.loss, c.labels.weights) for c in variants({}, 'loss').values()}
    assert pairs == {(loss, w) for loss in ('dpo', 'cdpo', 'rdpo', 'ipo') for w in ('none', 'confidence')}


def test_what_does_not_fit_is_refused_before_anything_is_run(given, tmp_path):
    "One bad value of many, and settings that a value has no use for: no folder is left behind"
    for more, setting, values in (
        ({}, 'beta', ['1', '-1']),
        ({}, 'share', ['1/4', '1']),
        ({}, 'loss', ['dpo', 'dpo strong']),
        ({}, 'start', ['sft', 'dpo']),
        (dict(labels=dict(targets='soft')), 'labels', ['match', 'random match']),
        (dict(smoothing=0.1), 'loss', ['cdpo', 'ipo']),
    ):
        with pytest.raises(ConfigError): run_varied(given | more, setting, values, tmp_path/'out', quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('setting, values', [('student', ['base', 'strong']), ('supervisor', ['pico', 'weak'])])
def test_a_value_of_the_ladder_beside_another_model(home, setting, values):
    "Values that are models of the ladder and models that are not: the settings of all are those of one kind, or it is refused"
    chosen = [v if v in LADDER else str(home/v) for v in values]
    try: configs = variants({}, setting, chosen)
    except ConfigError: return
    tables = [flat(to_table(c)) for c in configs.values()]
    assert {k for t in tables for k in t if t[k] != tables[0].get(k)} <= VARIED[setting]


# Ensembles

def test_an_ensemble_says_the_mean_probability():
    "Not the mean of rewards; one supervisor's rewards are left as they are, to the bit"
    rng = np.random.default_rng(0)
    rewards = [rng.normal(size=(50, 2))*s for s in (.1, 1., 20.)]
    mean = np.mean([expit(r[:, 0] - r[:, 1]) for r in rewards], axis=0)
    both = join_rewards(rewards)
    assert np.allclose(expit(both[:, 0] - both[:, 1]), mean, atol=1e-12) and join_rewards(rewards[:1]) is rewards[0]
    assert np.allclose(join_rewards(rewards[::-1]), both)
    sure = join_rewards([np.array([[900., -900.], [0., 0.]])]*2)
    assert np.isfinite(sure).all() and sure[0, 0] > sure[0, 1] and sure[1, 0] == sure[1, 1]


@pytest.fixture
def pool(): return make_rows(sample_preferences(80, seed=1), 'preferences')


@pytest.fixture
def supervised(pool, tmp_path, monkeypatch):
    "`supervise` with supervisors that answer at random, each in its own way"
    def rewards(who, pairs):
        rng = np.random.default_rng([ord(who.model.name), who.seed])
        return rng.normal(size=(len(pairs), 2)) + np.array(pairs['prob_a'])[:, None]*[2, 0]
    monkeypatch.setattr(supervisors, 'train_supervisor', lambda study, model, rows, seed: supervisors.supervisor_arm(model, 'dpo', seed))
    monkeypatch.setattr(supervisors, 'ask', lambda study, who, pairs, name: rewards(who, pairs))
    def label(models, **use):
        study = Study(WeakTeacher('rows', labels=LabelUse(**use)), Run(tmp_path), True)
        return supervise(study, [SimpleNamespace(name=n) for n in models], LoadedData({'train': pool}, pool, None, ''))[0]
    return label


def test_labels_of_an_ensemble(supervised):
    "The students' labels are the mean of what the members say of the same pairs"
    one, two, three = (supervised(n) for n in 'abc')
    both = supervised('abc')
    assert list(both.extra['weak'].rows['id']) == list(one.extra['weak'].rows['id']) and len(both.extra['supervisors']) == 3
    assert np.allclose(both.extra['weak'].prob_a, np.mean([s.extra['weak'].prob_a for s in (one, two, three)], axis=0), atol=1e-12)
    assert both.extra['weak'].rows['source'][0] == 'weak:a+b+c' and both.extra['temperature'] == 1


def test_a_temperature_belongs_to_what_was_asked(supervised):
    "Fitted on held-out labelled rows, of the ensemble and not of its members; choices stay, and what is held out is not learned from"
    plain, soft = supervised('ab'), supervised('ab', targets='soft', calibrate=.5)
    assert soft.extra['temperature'] != 1 and np.array_equal(soft.extra['weak'].prob_a > .5, plain.extra['weak'].prob_a > .5)
    gap = [np.log(x/(1 - x)) for x in (plain.extra['weak'].prob_a, soft.extra['weak'].prob_a)]
    assert np.allclose(gap[0]/soft.extra['temperature'], gap[1])
    learn, held = hold_out(soft.labelled, .5, 0)
    assert not set(learn['group']) & set(held['group']) and len(learn) + len(held) == len(soft.labelled)
    with pytest.raises(DataError, match='too few'): hold_out(soft.labelled, .1, 0)


# Random labels and subsets

def labelled(pool, seed, ties=0):
    "Weak labels at random, human ones, some of them undecided"
    pairs = to_pairs(pool, seed)
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(len(pairs), 2)) + np.array(pairs['prob_a'])[:, None]*[1, 0]
    undecided = pairs.to_pandas().assign(prob_a=lambda t: t['prob_a'].where(np.arange(len(t)) >= ties, .5))
    return label_pairs(pairs, rewards, 'weak:x'), given_labels(
        Dataset.from_pandas(undecided, features=pairs.features, preserve_index=False)
    )


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_random_labels_have_exactly_the_error_rate(pool, seed):
    "As many wrong ones as the supervisor has, in another place; so the subsets are as large as the supervisor's"
    weak, human = labelled(pool, seed)
    rows = {which: student_rows(weak, human, LabelUse(which), seed) for which in SUBSETS}
    wrong = int((~matches(weak, human)).sum())
    assert 5 < wrong < 60
    for kind in ('', 'random '):
        a, b = (rows[f'{kind}{x}'] for x in ('match', 'mismatch'))
        assert (len(a), len(b)) == (len(pool) - wrong, wrong) and set(a['id']) | set(b['id']) == set(pool['id'])
    said = {which: dict(zip(rows[which]['id'], rows[which]['chosen'], strict=True)) for which in ('all', 'random')}
    own = dict(zip(human.rows['id'], human.rows['chosen'], strict=True))
    errors = {which: {i for i in own if said[which][i] != own[i]} for which in said}
    assert len(errors['random']) == len(errors['all']) == wrong and errors['random'] != errors['all']
    assert errors['random'] == set(rows['random mismatch']['id']) and errors['all'] == set(rows['mismatch']['id'])


@pytest.mark.parametrize('ties', [0, 12])
def test_random_labels_where_a_human_was_undecided(pool, ties):
    "A pair without a human choice cannot be labelled wrongly: the agreement that tables show is the supervisor's, whatever their number"
    weak, human = labelled(pool, 4, ties)
    random = to_pairs(student_rows(weak, human, LabelUse('random'), 4), 4)
    assert list(random['response_a']) == list(to_pairs(pool, 4)['response_a'])
    assert agreement(random['prob_a'], human.prob_a).mean() == agreement(weak.prob_a, human.prob_a).mean()


def test_the_most_confident_are_kept(pool):
    "A share of a subset, and of no other rows"
    weak, human = labelled(pool, 3)
    match = student_rows(weak, human, LabelUse('match'), 3)
    kept = student_rows(weak, human, LabelUse('match', keep=.25), 3)
    assert len(kept) == round(len(match)/4) and set(kept['id']) <= set(match['id'])
    assert min(kept['prob']) >= np.quantile(match['prob'], .7)


# From a terminal

def test_vary_from_a_terminal(given, tmp_path):
    """Stages, tables, figure and a page of text of each value, under the name of the setting; a wrong name is refused before there is a
    folder"""
    (tmp_path/'run.toml').write_text(tomli_w.dumps(given), encoding='utf-8')
    def w2s(*words):
        return CliRunner().invoke(
            app, ['run', 'preferences', '--config', str(tmp_path / 'run.toml'), '--out', str(tmp_path / 'out'), *words],
            env={'COLUMNS': '300'}, # headings in one line
        )
    wrong = w2s('--vary', 'strat')
    assert isinstance(wrong.exception, ConfigError) and 'did you mean "start"' in str(wrong.exception) and not (tmp_path/'out').exists()
    done = w2s('--vary', 'start')
    assert done.exit_code == 0, done.output[-2000:]
    written = {p.name for p in (tmp_path/'out').iterdir()}
    assert {
        'stages',
        'start.md',
        'start.png',
        'start.svg',
        'start-versions.json',
        *(f'start-{t}.parquet' for t in ('intervals', 'differences', 'labels', 'items')),
    } <= written
    table = pd.read_parquet(tmp_path/'out'/'start-intervals.parquet')
    assert set(table['setting']) == {'start'} and set(table['at']) == {'sft', 'base'} == set(VARIATIONS['start'].values)
    both = table[(table.role == 'student') & (table.metric == 'accuracy')]
    assert len(both) == 2 and (both.n == 8).all()
    text = (tmp_path/'out'/'start.md').read_text(encoding='utf-8')
    assert text.startswith('# start: sft, base') and '## Accuracy' in text and 'student − human: accuracy' in done.output
