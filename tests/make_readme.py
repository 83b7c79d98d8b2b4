"""README.md from nbs/index.ipynb, without Quarto: `python tests/make_readme.py` writes it, `--check` only compares.

Markdown cells stay as they are, but links to pages get the folder of the notebooks in front. Code cells are fenced,
text/markdown outputs stay as they are, text/plain outputs are fenced. Cells marked `#| hide` are left out.
"""
import argparse
import difflib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'nbs' / 'index.ipynb'
README = ROOT / 'README.md'
HEAD = '<!-- Made from nbs/index.ipynb by tests/make_readme.py: change it there, not here -->'
LINK = re.compile(r'(\]\()(?!https?:|mailto:|#|/)([^)\s]+\))')
DIRECTIVE = re.compile(r'^#\s*\|\s*(.+)$')


def fenced(text: str, language: str = '') -> str:
    "A Markdown fence around text"
    return f'```{language}\n{text.rstrip()}\n```'


def directives(source: str) -> set[str]:
    "The `#| ...` marks at the head of a code cell, without spaces around colons"
    return {re.sub(r'\s*:\s*', ':', mark[1].strip()) for mark in map(DIRECTIVE.match, source.splitlines()) if mark}


def output_text(output: dict, where: str) -> str:
    "One saved output as Markdown; what cannot be shown in a README is an error"
    if output['output_type'] == 'stream':
        if output['name'] != 'stdout': raise SystemExit(f'{where}: a saved stderr output; mend its cause and run the cell again')
        return fenced(''.join(output['text']))
    if output['output_type'] == 'error': raise SystemExit(f'{where}: a saved error; mend the cell and run it again')
    data = output['data']
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    pictures = [kind for kind in data if kind.startswith('image/')]
    if pictures: raise SystemExit(f'{where}: a picture ({pictures[0]}); the README can hold none, show a table')
    if 'text/plain' in data: return fenced(''.join(data['text/plain']))
    raise SystemExit(f'{where}: an output without text: {", ".join(data)}')


def cell_text(cell: dict, where: str) -> list[str]:
    "The Markdown blocks that one cell becomes"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return [LINK.sub(r'\1nbs/\2', source)] if source else []
    if cell['cell_type'] != 'code' or not source: return []
    marks = directives(source)
    if 'hide' in marks or 'include:false' in marks: return []
    code = '\n'.join(line for line in source.splitlines() if not DIRECTIVE.match(line)).strip()
    blocks = [fenced(code, 'python')] if code and not marks & {'echo:false', 'hide_input'} else []
    if not marks & {'output:false', 'hide_output'}: blocks += [output_text(output, where) for output in cell['outputs']]
    return blocks


def readme() -> str:
    "The whole README"
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    blocks = [block for i, cell in enumerate(cells) for block in cell_text(cell, f'{NOTEBOOK.name}, cell {i}')]
    for link in re.findall(r'\]\((nbs/[^)#\s]+)', '\n'.join(blocks)):
        if not (ROOT / link).exists(): raise SystemExit(f'{NOTEBOOK.name}: a link to {link}, which is not there')
    return '\n\n'.join([HEAD, *blocks]) + '\n'


def main(check: bool) -> int:
    "Write the README, or say how the one that is there differs"
    new, old = readme(), README.read_text(encoding='utf-8') if README.exists() else ''
    if not check:
        README.write_text(new, encoding='utf-8')
        return 0
    if new == old: return 0
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'made from nbs/index.ipynb'))
    print('README.md does not follow from nbs/index.ipynb; run: python tests/make_readme.py')
    return 1


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare only; exit status 1 if they differ')
    sys.exit(main(parser.parse_args().check))
