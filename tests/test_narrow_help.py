"""On a narrow terminal the help keeps flags and words whole: a table would cut them"""
import re

import pytest
import typer
from typer.testing import CliRunner

from w2s.cli.app import app

def commands(group, name=()):
    for word, c in getattr(group, 'commands', {}).items():
        yield (*name, word)
        yield from commands(c, (*name, word))


@pytest.fixture(scope='module')
def group(): return typer.main.get_command(app)


def asked(words, width): return CliRunner().invoke(app, [*words, '--help'], env=dict(COLUMNS=str(width)))


@pytest.mark.parametrize('width', [30, 60])
@pytest.mark.parametrize('words', [(), ('run',), ('label',), ('run', 'safety'), ('run', 'maths'), ('toxicity', 'fit'), ('zoo',)], ids=str)
def test_flags_and_words_are_whole(group, words, width):
    done, command = asked(words, width), group
    for w in words: command = command.commands[w]
    assert not done.exit_code and 'Usage: ' in done.output
    lines = done.output.splitlines()
    assert all(len(x) <= width or ' ' not in x.strip() for x in lines), [x for x in lines if len(x) > width]
    pieces = set(re.split(r'[\s,]+', done.output))
    for p in command.params:
        if not p.hidden and p.param_type_name == 'option': assert set(p.opts) <= pieces
    assert not re.search(r'\w…', done.output.replace('1, …', ''))
    for name in getattr(command, 'commands', {}): assert name in pieces or command.commands[name].hidden


def test_every_command_has_it(group):
    "Also those that are added later"
    for words in commands(group):
        command = group
        for w in words: command = command.commands[w]
        assert hasattr(type(command), 'format_help') and 'NarrowHelp' in [c.__name__ for c in type(command).__mro__], words


def test_a_wide_terminal_has_the_table(): assert '╭─ ' in asked(('run', 'safety'), 200).output
