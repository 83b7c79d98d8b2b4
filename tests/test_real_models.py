"The benchmark of a real model says which folder it lacks, and names no place of any machine"
import runpy
from pathlib import Path

import pytest

from w2s.errors import ConfigError

SCRIPT = Path(__file__).parents[1]/'benchmarks'/'real_models.py'


@pytest.mark.parametrize('lacks', ['W2S_REAL_MODELS', 'W2S_REAL_DATA'])
def test_a_folder_that_is_not_named(lacks, monkeypatch, tmp_path):
    for name in ('W2S_REAL_MODELS', 'W2S_REAL_DATA'): monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv(lacks, '')
    script = runpy.run_path(str(SCRIPT))
    for name in script['STUDIES']:
        with pytest.raises(ConfigError, match=f'{lacks} is not set'): script['settings'](name)


def test_settings_lie_in_the_named_folders(monkeypatch, tmp_path):
    "Every path of a study is in one of the two folders, and its settings are settings of its experiment"
    from w2s.compare.label_settings import fill_labels
    monkeypatch.setenv('W2S_REAL_MODELS', str(tmp_path/'models'))
    monkeypatch.setenv('W2S_REAL_DATA', str(tmp_path/'rows'))
    script = runpy.run_path(str(SCRIPT))
    for name in script['STUDIES']:
        config = fill_labels(script['settings'](name))
        assert all(Path(m).parent == tmp_path/'models' for m in (*config.weak, *config.strong))
        assert (tmp_path/'rows') in Path(config.data).parents and config.seeds >= 2
