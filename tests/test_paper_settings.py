"The settings at the end of each paper's page: every key is known, all values are filled in, and the command takes the file"
import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from w2s.cli.app import PREFERENCES, app
from w2s.cli.demonstrations import COMMANDS as TRANSFERS
from w2s.cli.demonstrations import TOXICITY
from w2s.cli.flags import settings_table
from w2s.cli.labels import COMMANDS as LABELS
from w2s.compare.config import read_toml, to_table
from w2s.compare.settings import make_settings

OURS = ('50_real_models',) # a study of no paper
PAGES = sorted(p for p in (Path(__file__).parents[1]/'nbs'/'papers').glob('*.ipynb') if p.stem not in OURS)
COMMANDS = {'preferences': PREFERENCES, **LABELS, **TRANSFERS, 'toxicity': TOXICITY}
BLOCK = re.compile(r'^Save as `([\w.-]+)`:\n\n```toml\n(.*?)^```\n\n```bash\n(.*?)^```', re.M | re.S)


def blocks(page):
    "Name of a file, its content, and the command, of each of a page"
    cells = [''.join(c['source']) + '\n' for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown']
    return [found for text in cells if text.startswith("## The paper's settings, to copy\n") for found in BLOCK.findall(text)]


ALL = {f'{page.stem} {name}': (name, text, command.strip()) for page in PAGES for name, text, command in blocks(page)}


def flat(table, path=''):
    "Every value by its whole name"
    for key, value in table.items():
        if isinstance(value, dict): yield from flat(value, f'{path}{key}.')
        else: yield f'{path}{key}', value


@pytest.mark.parametrize('page', PAGES, ids=lambda p: p.stem)
def test_each_page_ends_with_settings(page):
    titles = [m[1] for c in json.loads(page.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'markdown'
              for m in re.finditer(r'^## (.*)$', re.sub(r'^```.*?^```', '', ''.join(c['source']), flags=re.M | re.S), re.M)]
    assert titles[-2:] == ["The paper's settings, to copy", 'Where next'] and blocks(page)


@pytest.mark.parametrize('which', ALL)
def test_settings_of_a_paper_are_filled_in(which, tmp_path):
    name, text, line = ALL[which]
    (tmp_path/name).write_text(text, encoding='utf-8')
    program, run, command, *flags = shlex.split(line)
    assert (program, run) == ('w2s', 'run') and flags[:2] == ['--config', name] and flags[2] == '--out'

    context = typer.main.get_command(app).commands['run'].commands[command].make_context(command, list(flags)) # raises for an unknown flag
    assert str(context.params['config']) == name

    kind = COMMANDS[command]
    config = make_settings(kind.settings, settings_table(kind, {}, tmp_path/name)) # raises for an unknown key and a bad value
    filled, given = dict(flat(to_table(config))), dict(flat(read_toml(tmp_path/name)))
    for key, value in given.items():
        have = filled[key] if key in filled else filled[f'lora.{key}']
        assert (list(have) if isinstance(value, list) else have) == value, f'{key}: {value} is given, {have} is used'


@pytest.mark.parametrize('which', ALL)
def test_a_choice_of_ours_is_marked(which):
    "The papers and their code have one seed each, and none trains in 4 bits"
    lines = dict(re.findall(r'^(\w+) = (.*)$', ALL[which][1], re.M))
    assert '# ours' in lines['seeds'] and all(re.search(r' # ours(: .+)?$', line) for line in lines.values() if '#' in line)
