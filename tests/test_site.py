"The pages as a reader of the site meets them: links, headings, figures with words, code that is shown, weight, the sidebar"
import ast
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import make_llms
import make_readme
import make_sidebar
import pytest
import refresh
import show_code
from test_house import report

NBS = Path(__file__).parents[1] / 'nbs'
PAGES = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
CELLS = {p: json.loads(p.read_text(encoding='utf-8'))['cells'] for p in PAGES}
FENCE = re.compile(r'^(`{3,}|~{3,}).*?^\1`*~*\s*$', re.S | re.M)
LINK = re.compile(r'\]\(([^)\s]+)\)')


def name(page: Path) -> str: return page.relative_to(NBS).as_posix()


def prose(cells: list[dict]) -> Iterator[str]:
    "The text of every markdown cell, without blocks of code"
    for cell in cells:
        if cell['cell_type'] == 'markdown': yield FENCE.sub('', ''.join(cell['source']))


def headings(cells: list[dict]) -> list[tuple[int, str]]:
    "Depth and text of every heading, in order"
    return [(len(m[1]), m[2].strip()) for text in prose(cells) for m in re.finditer(r'^(#{1,6}) (.+)$', text, re.M)]


def anchor(heading: str) -> str:
    "The address that Quarto gives a heading: `What a 7 % gap is` -> what-a-7-gap-is"
    plain = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', heading)
    if given := re.search(r'\{#([\w-]+)[^}]*\}\s*$', plain): return given[1]
    kept = re.sub(r'[^\w\s.-]', '', plain).strip().lower()
    return re.sub(r'^[^a-z]+', '', re.sub(r'\s+', '-', kept))


def dead_links(page: Path, cells: list[dict]) -> list[str]:
    "Links of a page to pages, files and headings that are not there"
    lost = []
    for address in (a for text in prose(cells) for a in LINK.findall(re.sub(r'`[^`\n]*`', '', text))):
        if re.match(r'https?:|mailto:', address): continue
        place, _, mark = address.partition('#')
        target = (page.parent / place).resolve() if place else page
        marks = {anchor(h) for _, h in headings(cells if target == page else CELLS.get(target, []))}
        if place and (not target.exists() or place.endswith('.html')) or mark and mark not in marks: lost.append(address)
    return lost


def heading_faults(cells: list[dict]) -> list[str]:
    "Levels that are left out, titles behind the first, and headings that are there twice"
    found = headings(cells)
    faults = [f'more than one title: {text}' for depth, text in found[1:] if depth == 1]
    faults += [f'a level is left out above: {b[1]}' for a, b in zip(found, found[1:], strict=False) if b[0] > a[0] + 1]
    return faults + ([] if found and found[0][0] == 1 else ['no title'])


def directives(source: str) -> dict[str, str]:
    "The marks at the head of a cell that have a value"
    marks = (re.match(r'#\|\s*([\w-]+):\s*(.+)$', line) for line in source.splitlines() if line.startswith('#|'))
    return {m[1]: m[2] for m in marks if m}


def pictures(cell: dict) -> int:
    "How many pictures a cell has put out"
    return sum(any(kind.startswith('image/') for kind in o.get('data', {})) for o in cell.get('outputs', []))


def words(text: str) -> list[str]:
    "A caption or several, as YAML holds them"
    value = json.loads(text)
    return value if isinstance(value, list) else [value]


def figure_faults(cells: list[dict]) -> list[str]:
    "Pictures without label, caption or alt text, or with fewer of them than pictures"
    faults, labels = [], Counter()
    for cell in cells:
        if not (n := pictures(cell)): continue
        marks = directives(''.join(cell['source']))
        labels[marks.get('label', '')] += 1
        if not re.fullmatch(r'fig-[a-z0-9-]+', marks.get('label', '')): faults.append(f'{cell["id"]}: no label fig-…')
        for key in ('fig-cap', 'fig-alt'):
            told = words(marks.get(key, '[]'))
            if len(told) != n: faults.append(f'{cell["id"]}: {n} pictures, {len(told)} of {key}')
            faults += [f'{cell["id"]}: {key} says too little: {t}' for t in told if len(t) < 30]
        same = 'fig-cap' in marks and marks['fig-cap'] == marks.get('fig-alt')
        faults += [f'{cell["id"]}: alt text and caption are the same'] * same
    return faults + [f'{label} is there {n} times' for label, n in labels.items() if label and n > 1]


def import_faults(cells: list[dict]) -> list[str]:
    """Imports that make the site run a cell: its processor runs every cell with an import, a page's slow and GPU cells too, and warns where
    a cell that is shown does something else as well"""
    faults = []
    for cell in cells:
        source = ''.join(cell['source'])
        marks = {line[2:].strip() for line in source.splitlines() if line.startswith('#|')}
        if cell['cell_type'] != 'code' or marks & {'export', 'exports', 'exporti'} or 'eval: false' in marks: continue
        body = ast.parse(re.sub('^(?=[%!])', '#', source, flags=re.M)).body
        kinds = (ast.Import, ast.ImportFrom)
        if not any(isinstance(node, kinds) for statement in body for node in ast.walk(statement)): continue
        if flags := marks & {'slow', 'gpu'}: faults.append(f'{cell["id"]}: {", ".join(flags)}, with an import')
        elif 'hide' not in marks and not all(isinstance(statement, kinds) for statement in body):
            faults.append(f'{cell["id"]}: an import and other code')
    return faults


# The pages

def test_every_link_leads_somewhere():
    dead = [f'{name(p)}: {a}' for p, cells in CELLS.items() for a in dead_links(p, cells)]
    report(dead, 'links lead to pages (.ipynb) and headings that are there')


def test_headings_are_in_order():
    report([f'{name(p)}: {f}' for p, cells in CELLS.items() for f in heading_faults(cells)], 'one title, and no level left out')


def test_imports_stand_alone():
    report([f'{name(p)} {f}' for p, cells in CELLS.items() for f in import_faults(cells)], 'the site runs every cell with an import')


def test_every_figure_has_words():
    faults = [f'{name(p)} {f}' for p, cells in CELLS.items() for f in figure_faults(cells)]
    report(faults, 'a figure has #| label: fig-…, #| fig-cap and #| fig-alt')


def test_the_front_page_begins_with_a_figure_and_the_readme_shows_it():
    first = next(i for i, cell in enumerate(CELLS[NBS/'index.ipynb']) if pictures(cell))
    text, files = make_readme.readme()
    assert first < 5 and list(files) == ['front.png'] and (NBS/'images'/'front.png').read_bytes() == files['front.png']
    assert '](nbs/images/front.png)' in text[:2500] and text == (NBS.parent/'README.md').read_text(encoding='utf-8')


def test_the_code_of_api_pages_is_shown():
    report([line for p in PAGES if 'api' in p.parts for line in show_code.show(p, True)], 'run python tests/show_code.py')


def test_no_default_is_a_path_of_this_machine():
    "The site would show it in the signature"
    found = [f'{name(p)}: {line.strip()}' for p, cells in CELLS.items() if 'api' in p.parts for cell in cells for line in cell['source']
             if re.match(r' +\w+: Path = [A-Z_]+,', line)]
    report(found, 'a default that is a folder is None in the signature')


def test_pages_are_light():
    heavy = [f'{name(p)}: {p.stat().st_size:,} bytes' for p in PAGES if p.stat().st_size > refresh.MOST]
    report(heavy, 'python tests/refresh.py --figures PAGE')


def test_the_sidebar_has_every_page_once():
    text = make_sidebar.SIDEBAR.read_text(encoding='utf-8')
    assert text == make_sidebar.sidebar(), 'run python tests/make_sidebar.py'
    listed = Counter(re.findall(r'^ +- (?:href: )?(\S+\.ipynb)$', text, re.M))
    assert set(listed) == {name(p) for p in PAGES} and set(listed.values()) == {1}
    sections = re.findall(r'^      - section: "(.*)"', text, re.M)
    assert sections == ['Start here', 'Tutorials', 'Papers', 'Background', 'API']


def test_a_language_model_finds_every_page():
    "llms.txt: each page once, by its address on the site, with its subtitle"
    text = make_llms.LLMS.read_text(encoding='utf-8')
    assert text == make_llms.llms(), 'run python tests/make_llms.py'
    links = re.findall(r'^- \[.+?\]\((\S+)\)(: .+)?$', text, re.M)
    assert Counter(a for a, _ in links) == Counter({make_llms.address(name(p)): 1 for p in PAGES})
    assert all(told for _, told in links) and len(links) == text.count('\n- ')
    assert text.startswith('# w2s\n\n> ') and '\n## API: ' in text and '.ipynb' not in text


ADDRESS = {
    'index.ipynb': 'https://w2s-project.github.io/w2s/index.html',
    'api/data/030_rows.ipynb': 'https://w2s-project.github.io/w2s/api/data/rows.html',
    'papers/24_burns.ipynb': 'https://w2s-project.github.io/w2s/papers/burns.html',
    'api/10_errors.ipynb': 'https://w2s-project.github.io/w2s/api/errors.html',
}


@pytest.mark.parametrize('page', ADDRESS)
def test_pages_have_addresses(page): assert make_llms.address(page) == ADDRESS[page]


def test_the_site_publishes_the_list():
    "At its root; it is named as a resource, since no page links to it"
    assert re.search(r'^project: {.*resources: \[.*\bllms\.txt\b.*\]', (NBS/'_quarto.yml').read_text(encoding='utf-8'), re.M)


# The checks find what they are for

def md(text): return {'cell_type': 'markdown', 'source': text}
def code(source, n=0): return {'cell_type': 'code', 'id': 'x', 'source': source, 'outputs': [{'data': {'image/png': ''}}] * n}


HERE = NBS / 'api' / 'data' / 'new.ipynb'
LINKS = {
    '[a](030_rows.ipynb)': True,
    '[a](https://example.org/x.html)': True,
    '[a](../../tutorials/05_first_run.ipynb)': True,
    '`[a](none.ipynb)`': True,
    '```\n[a](none.ipynb)\n```': True,
    '[a](none.ipynb)': False,
    '[a](030_rows.html)': False,
    '[a](05_first_run.ipynb)': False,
    '[a](030_rows.ipynb#no-such-heading)': False,
    '![a](none.png)': False,
    '# A title\n\n[a](#a-title)': True,
    '# A title\n\n[a](#A-title)': False,
}


@pytest.mark.parametrize('text', LINKS)
def test_dead_links_are_found(text): assert (not dead_links(HERE, [md(text)])) is LINKS[text]


@pytest.mark.parametrize('text,fine', [('# a\n## b\n### c\n## d', True), ('# a\n### c', False), ('# a\n## b\n# c', False), ('## a', False),
                                       ('# a\n```\n### c\n```\n## b', True), ('', False)])
def test_headings_out_of_order_are_found(text, fine): assert (not heading_faults([md(text)])) is fine


CAP, ALT = f'#| fig-cap: "{"caption "*8}"', f'#| fig-alt: "{"seen "*8}"'
FIGURES = {
    'all': ([code(f'#| label: fig-a\n{CAP}\n{ALT}\nplot()', 1)], True),
    'no picture': ([code('plot()')], True),
    'two, listed': ([code(f'#| label: fig-a\n#| fig-cap: ["{"a "*20}", "{"b "*20}"]\n#| fig-alt: ["{"c "*20}", "{"d "*20}"]', 2)], True),
    'two, one text': ([code(f'#| label: fig-a\n{CAP}\n{ALT}', 2)], False),
    'no label': ([code(f'{CAP}\n{ALT}', 1)], False),
    'a label of no figure': ([code(f'#| label: a\n{CAP}\n{ALT}', 1)], False),
    'no alt text': ([code(f'#| label: fig-a\n{CAP}', 1)], False),
    'no caption': ([code(f'#| label: fig-a\n{ALT}', 1)], False),
    'an empty alt text': ([code(f'#| label: fig-a\n{CAP}\n#| fig-alt: ""', 1)], False),
    'the caption again': ([code(f'#| label: fig-a\n{CAP}\n{CAP.replace("fig-cap", "fig-alt")}', 1)], False),
    'in the middle of the code': ([code(f'plot()\n{CAP}\n{ALT}', 1)], False),
    'one label twice': ([code(f'#| label: fig-a\n{CAP}\n{ALT}', 1)] * 2, False),
}


@pytest.mark.parametrize('what', FIGURES)
def test_figures_without_words_are_found(what): assert (not figure_faults(FIGURES[what][0])) is FIGURES[what][1]


HIDDEN = {'#| export\nimport os': False, '#| export\ndef f(): pass': True, '#| export\nX = 1': True, '#| exports\nX = 1': False,
          'X = 1': False, '#| export\nfrom a import (\n    b\n)': False}


@pytest.mark.parametrize('source,hidden', HIDDEN.items())
def test_hidden_code_is_found(source, hidden): assert bool(show_code.hidden_cells({'cells': [code(source)]})) is hidden


IMPORTS = {'import a\nfrom b import c': True, '#| hide\nimport a\na.quiet()': True, '#| export\nimport a\nb = a.c': True,
           '#| gpu\nlabel(pairs)': True, '#| slow\n#| eval: false\nimport a': True, '%matplotlib inline\nimport a': True,
           'import a\na.b()': False, 'def f():\n    import a': False, '#| gpu\nimport a': False, '#| hide\n#| slow\nimport a': False}


@pytest.mark.parametrize('source,fine', IMPORTS.items())
def test_imports_beside_code_are_found(source, fine): assert (not import_faults([code(source)])) is fine


ADDRESSES = {'What a 7 % gap is': 'what-a-7-gap-is', 'One clause, many things': 'one-clause-many-things', '`w2s run`': 'w2s-run',
             'A {#own}': 'own', '[Link](x.ipynb) here': 'link-here'}


@pytest.mark.parametrize('heading', ADDRESSES)
def test_headings_have_addresses(heading): assert anchor(heading) == ADDRESSES[heading]
