"Frozen hidden states depend on a model and its texts: nothing of one study is read twice, whoever asks for it"
import json
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare import label_stages
from w2s.compare.label_settings import fill_labels
from w2s.compare.stages import Run
from w2s.errors import ConfigError
from w2s.io.manifests import read_manifest
from w2s.train.probe import load_probe

SMALL = '--n-labelled 13 --n-unlabelled 27 --n-test 20'
STUDIES = { # words -> pairs of model and texts
    'floor, student and ceiling': (
        f'run legal --weak pico --strong nano --seeds 1 {SMALL} --readout probe',
        5,
    ), # pico: labelled, unlabelled, test; nano: unlabelled, test
    'two seeds': (f'run legal --weak pico --strong nano --seeds 2 {SMALL} --readout probe', 8), # the test examples are those of both seeds
    'a model that teaches itself': (f'run legal --weak pico --strong pico --seeds 1 {SMALL} --readout probe', 3),
    'a method that cleans': (
        f'run legal --weak pico --strong nano --seeds 1 {SMALL} --readout words --epochs 1 --method xent,filter,relabel',
        1,
    ),
}


@pytest.mark.cases(2)
@pytest.mark.parametrize('study', STUDIES)
def test_no_text_is_read_twice_by_one_model(tmp_path, monkeypatch, study):
    words, least = STUDIES[study]
    seen, read = [], label_stages.last_hidden
    monkeypatch.setattr(
        label_stages,
        'last_hidden',
        lambda model, rows, *more: (
            seen.append((model.config.name_or_path, tuple(s.ids for r in rows for s in r.sequences))) or read(model, rows, *more)
        ),
    )
    done = CliRunner().invoke(app, [*words.split(), '--out', str(tmp_path/'run')])
    assert done.exit_code == 0, done.output[-1500:] + repr(done.exception)
    assert len(seen) == len(set(seen)) == least, [(w, len(t)) for w, t in seen]
    folders = list((tmp_path/'run'/'stages').glob('*-states-*'))
    assert len(folders) == len(seen) and all(read_manifest(f/'manifest.json') for f in folders)
    assert len({np.load(f/'hidden.npy').tobytes() for f in folders}) == len(folders)


def test_the_penalty_of_a_probe_is_a_setting(tmp_path, monkeypatch):
    "At its default a stage is found that was made before there was a choice; another one fits anew"
    states = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    targets = np.eye(2)[(states[:, 0] > 0).astype(int)]
    for name, made in dict(hidden_stage=states, read_later=(None, 'rows'), model_inputs={}).items():
        monkeypatch.setattr(label_stages, name, lambda *more, made=made: made)

    def fit(**given):
        study = SimpleNamespace(config=fill_labels(dict(readout='probe', **given)), run=Run(tmp_path, lambda line: None))
        return label_stages._probe_stage(study, SimpleNamespace(name='pico', reader=None), 'floor', states, targets, np.ones(40))
    plain, strong = fit(), fit(penalty=1000)
    assert fit(penalty=1.) == plain != strong
    known, more = (json.loads((folder/'inputs.json').read_text()) for folder in (plain, strong))
    assert set(known) == {'rows', 'target', 'weights'} and more == known | {'penalty': 1000}
    steep, flat = (np.abs(load_probe(folder/'probe.npz').coef).max() for folder in (plain, strong))
    assert flat < .1*steep


@pytest.mark.parametrize('given, why', [
    (dict(penalty=0., readout='probe'), 'must be a number above 0'),
    (dict(penalty=float('inf'), readout='probe'), 'must be a finite number'),
    (dict(penalty=2., readout='words'), 'penalty belongs to the readout "probe"'),
])
def test_a_penalty_that_does_nothing_is_refused(given, why):
    with pytest.raises(ConfigError, match=why): fill_labels(given)
