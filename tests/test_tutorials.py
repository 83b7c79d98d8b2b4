"The tutorials in the wheel: `w2s notebooks DIR` copies those of the installed version, and the extra `jupyter` is all that they need"
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from test_house import requirements, undeclared
from typer.testing import CliRunner

from w2s import __version__
from w2s.cli.app import app
from w2s.cli.guard import GuardedGroup
from w2s.cli.notebooks import LIST, SITE, copy_notebooks, plain_cell, site_links, tutorials_folder
from w2s.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = {p.name: p for p in sorted((ROOT/'nbs'/'tutorials').glob('*.ipynb'))}


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    "A folder with what the wheel of this tree installs, and nothing else of the repository"
    tree, out = tmp_path_factory.mktemp('tree')/'w2s', tmp_path_factory.mktemp('site')
    shutil.copytree(ROOT/'w2s', tree/'w2s', ignore=shutil.ignore_patterns('__pycache__'))
    shutil.copytree(ROOT/'nbs'/'tutorials', tree/'nbs'/'tutorials')
    for name in 'setup.py settings.ini pyproject.toml MANIFEST.in README.md LICENSE NOTICE'.split(): shutil.copy(ROOT/name, tree)
    stale = tree/'build'/'lib'/'w2s'/'tutorials'/'00_gone.ipynb' # an earlier build, of a version that had one more
    stale.parent.mkdir(parents=True)
    stale.touch()
    command = [sys.executable, '-m', 'pip', 'wheel', '.', '--no-deps', '--no-build-isolation', '-q', '-w', str(out)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(next(out.glob('*.whl'))) as wheel: wheel.extractall(out/'packages')
    return out/'packages'


def test_the_wheel_has_the_tutorials_of_its_version(installed):
    there = {p.name: p.read_bytes() for p in (installed/'w2s'/'tutorials').iterdir()}
    assert there == {name: page.read_bytes() for name, page in PAGES.items()}


def test_the_command_of_an_installed_wheel(installed, tmp_path):
    env = {**os.environ, 'PYTHONPATH': str(installed)}
    done = subprocess.run([sys.executable, '-m', 'w2s', 'notebooks', 'my tutorials'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path/'my tutorials').iterdir()} == {*PAGES, LIST}
    first, *listed, last = done.stdout.splitlines()
    assert first == f'my tutorials: {len(PAGES)} tutorials of w2s {__version__}'
    assert last == "open them with: jupyter lab 'my tutorials'"
    assert [line.split()[0] for line in listed if '.ipynb' in line] == list(PAGES)


def start(*words):
    with pytest.MonkeyPatch.context() as m: # without it, tests of other files would see exit codes where they look for errors
        m.setattr(app.info, 'cls', GuardedGroup)
        done = CliRunner().invoke(app, ['notebooks', *map(str, words)])
    return done.exit_code, done.output


def edit(path): path.write_text(path.read_text(encoding='utf-8').replace('import', 'import ', 1), encoding='utf-8')


def link(path):
    path.rename(path.with_suffix('.mine'))
    path.symlink_to(path.with_suffix('.mine').name)
    edit(path)


CHANGES = { # what a reader did to a copy
    'edited': edit,
    'emptied': lambda path: path.write_text(''),
    'another file': lambda path: path.write_bytes(b'\xff\x00'),
    'a folder': lambda path: (path.unlink(), path.mkdir()),
    'a link to an edited one': link,
    'a link to nowhere': lambda path: (path.unlink(), path.symlink_to('nowhere')),
}


@pytest.mark.parametrize('listed', [True, False])
@pytest.mark.parametrize('what', CHANGES)
def test_nothing_of_the_reader_is_overwritten(what, listed, tmp_path):
    copies = copy_notebooks(tmp_path/'t')
    copies[0].unlink()
    CHANGES[what](copies[3])
    if not listed: (tmp_path/'t'/LIST).unlink()
    def state(): return [(p.name, p.is_symlink(), p.read_bytes() if p.is_file() else b'') for p in sorted((tmp_path/'t').iterdir())]
    before = state()
    code, said = start(tmp_path/'t')
    assert code == 1 and len(said.splitlines()) == 1 and copies[3].name in said and 'nothing is overwritten' in said, said
    assert state() == before, 'all or nothing'


def test_a_copy_of_an_earlier_version_is_replaced(tmp_path):
    old = tmp_path/'old'
    shutil.copytree(ROOT/'nbs'/'tutorials', old)
    edit(old/'10_quickstart.ipynb')
    copy_notebooks(tmp_path/'t', old)
    code, said = start(tmp_path/'t')
    assert code == 0, said
    fresh = copy_notebooks(tmp_path/'fresh')
    assert [p.read_bytes() for p in fresh] == [(tmp_path/'t'/p.name).read_bytes() for p in fresh]


@pytest.mark.parametrize('place', ['file', 'file/below'])
def test_a_place_that_cannot_be(place, tmp_path):
    (tmp_path/'file').touch()
    code, said = start(tmp_path/place)
    assert code == 1 and said.startswith('error: ') and len(said.splitlines()) == 1


def test_an_installation_without_tutorials(tmp_path):
    with pytest.raises(ConfigError, match='has no tutorials'): tutorials_folder(tmp_path)


# What is copied

def test_copies_have_code_as_it_is_and_links_that_lead_somewhere(tmp_path):
    copies, pages = copy_notebooks(tmp_path), {p.relative_to(ROOT/'nbs').as_posix() for p in (ROOT/'nbs').rglob('*.ipynb')}
    named = {'/'.join(re.sub(r'^\d+[a-z]?_', '', part) for part in p.split('/')).replace('.ipynb', '.html') for p in pages}
    for copy in copies:
        cells = json.loads(copy.read_text(encoding='utf-8'))['cells']
        old = json.loads(PAGES[copy.name].read_text(encoding='utf-8'))['cells']
        assert [c.get('outputs') for c in cells] == [c.get('outputs') for c in old]
        for cell, before in zip(cells, old, strict=True):
            text, source = ''.join(cell['source']), ''.join(before['source'])
            if cell['cell_type'] == 'code':
                assert text == ''.join(line for line in source.splitlines(keepends=True) if not line.startswith('#|'))
                continue
            for address in re.findall(r'\]\(([^()\s]+)\)', text):
                place = address.partition('#')[0]
                if place.startswith('https://w2s-project.github.io/w2s/'): assert place.partition('/w2s/')[2] in named, address
                elif '://' not in place and place: assert place in PAGES, address


LINKS = {
    '[a](../api/io/10_disk.ipynb)': '[a](https://w2s-project.github.io/w2s/api/io/disk.html)',
    '[a](../papers/24_burns.ipynb#by-task)': '[a](https://w2s-project.github.io/w2s/papers/burns.html#by-task)',
    '[a](../index.ipynb), [b](../api/10_errors.ipynb)':
        '[a](https://w2s-project.github.io/w2s/index.html), [b](https://w2s-project.github.io/w2s/api/errors.html)',
    '[a](10_quickstart.ipynb#x)': '[a](10_quickstart.ipynb#x)',
    '[a](https://arxiv.org/abs/2312.09390)': '[a](https://arxiv.org/abs/2312.09390)',
}


@pytest.mark.parametrize('text', LINKS)
def test_links_out_of_the_folder_lead_to_the_site(text): assert site_links(text) == LINKS[text]


def test_the_site_is_that_of_the_settings():
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    assert ini['DEFAULT']['doc_host'] + ini['DEFAULT']['doc_baseurl'] == SITE


@pytest.mark.parametrize('source,folded', [('#| hide\nimport os', True), ('#|hide\nimport os', True), ('#| slow\nimport os', False),
                                           ('import os # hide', False)])
def test_cells_that_the_site_hides_are_folded(source, folded):
    cell = plain_cell(dict(cell_type='code', source=source, metadata={}))
    assert (cell['metadata'] == {'jupyter': {'source_hidden': True}}) is folded and '#|' not in ''.join(cell['source'])


# What they need

def imports(page):
    "The top-level names that the cells of a page import, hidden ones, too"
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    code = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'code')
    nodes = [n for n in ast.walk(ast.parse(code)) if isinstance(n, (ast.Import, ast.ImportFrom))]
    return {name.split('.')[0] for n in nodes for name in ([a.name for a in n.names] if isinstance(n, ast.Import) else [n.module])}


@pytest.mark.parametrize('name', PAGES)
def test_the_jupyter_extra_is_all_that_a_tutorial_needs(name):
    lacking = undeclared(imports(PAGES[name]), requirements('requirements') | requirements('jupyter_requirements'))
    assert not lacking, f'{name} imports {sorted(lacking)}: neither required by w2s nor in its extra jupyter'
