"Frozen hidden states depend on a model and its texts: nothing of one study is read twice, whoever asks for it"
import numpy as np
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare import label_stages
from w2s.io.manifests import read_manifest

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
