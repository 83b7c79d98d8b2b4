"""nbs/llms.txt, the list of all pages for language models (https://llmstxt.org): `python tests/make_llms.py` writes it, `--check` compares.

Sections and their order are those of the sidebar; each page is a link with its title and its subtitle.
"""
import json
import re
from configparser import ConfigParser
from pathlib import Path

import make_sidebar

LLMS = make_sidebar.NBS/'llms.txt'
HOW = ('Documentation of the Python package and command `w2s`. API pages are named as their modules: '
       'api/evaluate/pgr is the page of `w2s.evaluate.pgr`. `pip install w2s`, then `w2s run preferences` is a whole experiment without '
       'a network; `w2s --help` lists all commands.')


def settings() -> dict[str, str]:
    "The lines of settings.ini"
    ini = ConfigParser(delimiters=['='])
    ini.read(make_sidebar.ROOT/'settings.ini', encoding='utf-8')
    return dict(ini['DEFAULT'])


def address(page: str) -> str:
    "Where a page is published: numbers in front of names are left out"
    parts = [re.sub(r'^\d+[a-z]?_', '', part) for part in page.removesuffix('.ipynb').split('/')]
    return f'{settings()["doc_host"]}{settings()["doc_baseurl"]}/{"/".join(parts)}.html'


def plain(text: str) -> str: return re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', text).strip()


def title_and_subtitle(page: str) -> tuple[str, str]:
    "What stands in the first cell of a page"
    first = ''.join(json.loads((make_sidebar.NBS/page).read_text(encoding='utf-8'))['cells'][0]['source'])
    title, *rest = [line for line in first.splitlines() if line.strip()]
    return plain(title.removeprefix('# ')), plain(' '.join(line.removeprefix('> ') for line in rest))


def line(page: str, other: str | None = None) -> str:
    "A page as an item of the list"
    title, subtitle = title_and_subtitle(page)
    return f'- [{other or title}]({address(page)})' + (f': {subtitle}' if subtitle else '')


def llms() -> str:
    "The whole file"
    lines = [f'# {settings()["lib_name"]}', '', f'> {settings()["description"]}', '', HOW]
    for section, (pages, names) in make_sidebar.sections().items():
        lines += ['', f'## {section}', '', *(line(p, (names or {}).get(Path(p).stem)) for p in pages)]
    for folder, name in make_sidebar.API.items():
        lines += ['', f'## API: {name}', '', *map(line, make_sidebar.pages_in(f'api/{folder}'.rstrip('/')))]
    return '\n'.join(lines) + '\n'


if __name__ == '__main__': make_sidebar.write_or_check(LLMS, llms(), 'make_llms.py', __doc__)
