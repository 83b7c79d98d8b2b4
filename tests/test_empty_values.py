"""An option or setting without a value is never the default: it may be a variable of the shell that was not set"""
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from w2s.cli.app import LABELS, PREFERENCES, TOXICITY, TRANSFERS, app
from w2s.cli.check import check_function
from w2s.cli.places import MAY_BE_EMPTY, PLACES, FullCommand
from w2s.compare.options import kinds_of, options_of, set_path
from w2s.compare.settings import make_settings
from w2s.errors import ConfigError
from w2s.files.jobs import LabelJob, RefineJob

CLASSES = {
    'preferences': PREFERENCES.settings,
    'labels': LABELS['classify'].settings,
    'demonstrations': TRANSFERS['persona'].settings,
    'toxicity': TOXICITY.settings,
    'label': LabelJob,
    'refine': RefineJob,
}


def commands(group, name=''):
    "Every command with its words"
    for word, c in getattr(group, 'commands', {}).items():
        if hasattr(c, 'commands'): yield from commands(c, f'{name} {word}')
        else: yield f'{name} {word}'.strip(), c


def text_options(command):
    "Options that take a text and have no reader of their own, which would refuse it"
    return [p for p in command.params if p.param_type_name == 'option' and not p.is_flag and p.opts[0] not in ('--help', '-h')]


ALL = dict(commands(typer.main.get_command(app)))


def test_every_command_with_options_refuses_empty_ones():
    "A command that is added later, too"
    lacking = [name for name, c in ALL.items() if text_options(c) and not isinstance(c, FullCommand)]
    assert not lacking and len([c for c in ALL.values() if text_options(c)]) > 15


@pytest.mark.parametrize('name', [n for n, c in ALL.items() if text_options(c)])
def test_an_option_without_a_value_is_said(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for p in text_options(ALL[name]):
        if p.name in MAY_BE_EMPTY or p.opts[0] in PLACES: continue
        for words in ([p.opts[0], ''], [f'{p.opts[0]}=']):
            with pytest.raises(ConfigError, match=f'^{p.opts[0]} is empty'): ALL[name].make_context(name, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flag', ['--strong', '--config'])
def test_check_and_plan_pass_it_on(flag):
    for words in (['check', '--kind', 'labels'], ['plan', 'safety']):
        done = CliRunner().invoke(app, [*words, flag, ''])
        assert isinstance(done.exception, ConfigError) and f'{flag} is empty' in str(done.exception), done.exception
    assert check_function


def text_settings():
    for kind, cls in CLASSES.items():
        for o in options_of(cls):
            if any(k is str or getattr(k, '__origin__', None) is tuple for k in kinds_of(o.kind)): yield kind, o.paths[0], o.kind


def usual(cls, path):
    name, *rest = path.split('.')
    value = cls.usual(name)
    for part in rest: value = getattr(value, part)
    return value


@pytest.mark.parametrize('kind, path, type_', list(text_settings()), ids=str)
def test_an_empty_setting_of_a_file_is_said(kind, path, type_):
    "Where the default is empty, as of a column that is recognised, an empty text is what w2s itself writes"
    cls, bad = CLASSES[kind], [' '] if not path.endswith('stop') else []
    if str in kinds_of(type_) and usual(cls, path) != '' and path != 'weak': bad.append('')
    if 'tuple' in str(type_): bad.append([''])
    if path == 'imports': bad = [] # modules are looked for first, and none has an empty name
    for value in bad:
        table = {}
        set_path(table, path, value)
        with pytest.raises(ConfigError) as e: make_settings(cls, table)
        if 'tuple' in str(type_) and value != ['']: continue # no name at all: each setting says so in its own words
        assert path.split('.')[0] in str(e.value) and 'is empty' in str(e.value), e.value


@pytest.mark.parametrize('kind', ['preferences', 'labels', 'toxicity'])
@pytest.mark.parametrize('model', ['weak', 'strong'])
def test_a_file_of_settings_without_a_model(kind, model):
    with pytest.raises(ConfigError, match=f'{model} is empty'): make_settings(CLASSES[kind], {model: ''})


def test_what_w2s_writes_is_read(tmp_path):
    "A supervisor without a model is written with an empty name"
    from w2s.compare.config import read_toml, to_toml
    for kind, cls in CLASSES.items():
        given = dict(preferences=dict(supervisor='length'), label=dict(rows='a.jsonl'), refine=dict(questions='q.jsonl')).get(kind, {})
        config = make_settings(cls, given)
        Path(tmp_path/'c.toml').write_text(to_toml(config), encoding='utf-8')
        assert make_settings(cls, read_toml(tmp_path/'c.toml')) == config
