"""README.md from nbs/index.ipynb, without Quarto: `python tests/make_readme.py` writes it, `--check` only compares.

Markdown cells stay as they are, but links to pages get the folder of the notebooks in front. Code cells are fenced,
text/markdown outputs stay as they are, text/plain outputs are fenced, pictures are written to nbs/images under the label of
their cell and shown with its alt text. Cells marked `#| hide` are left out.
"""
import argparse
import base64
import difflib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / 'nbs' / 'index.ipynb'
README = ROOT / 'README.md'
IMAGES = ROOT / 'nbs' / 'images'
HEAD = '<!-- Made from nbs/index.ipynb by tests/make_readme.py: change it there, not here -->'
LINK = re.compile(r'(\]\()(?!https?:|mailto:|#|/)([^)\s]+\))')
DIRECTIVE = re.compile(r'^#\s*\|\s*(.+)$')


def fenced(text: str, language: str = '') -> str:
    "A Markdown fence around text"
    return f'```{language}\n{text.rstrip()}\n```'


def directives(source: str) -> set[str]:
    "The `#| ...` marks at the head of a code cell, without spaces around colons"
    return {re.sub(r'\s*:\s*', ':', mark[1].strip()) for mark in map(DIRECTIVE.match, source.splitlines()) if mark}


def value_of(source: str, key: str) -> str:
    "The value of a mark such as `#| label: fig-front`, without quotes; '' where there is none"
    found = re.search(rf'^#\s*\|\s*{key}:\s*(.+)$', source, re.M)
    return found[1].strip().strip('"') if found else ''


def picture_text(data: dict, source: str, where: str, pictures: dict[str, bytes]) -> str:
    "A saved picture as Markdown, and its bytes among the files to write"
    label, alt = value_of(source, 'label'), value_of(source, 'fig-alt')
    if 'image/png' not in data or not label or not alt:
        raise SystemExit(f'{where}: a picture needs #| label: and #| fig-alt:, and must be a PNG')
    name = f'{label.removeprefix("fig-")}.png'
    pictures[name] = base64.b64decode(''.join(data['image/png']))
    return f'![{alt}](nbs/images/{name})'


def output_text(output: dict, where: str, source: str, pictures: dict[str, bytes]) -> str:
    "One saved output as Markdown; what cannot be shown in a README is an error"
    if output['output_type'] == 'stream':
        if output['name'] != 'stdout': raise SystemExit(f'{where}: a saved stderr output; mend its cause and run the cell again')
        return fenced(''.join(output['text']))
    if output['output_type'] == 'error': raise SystemExit(f'{where}: a saved error; mend the cell and run it again')
    data = output['data']
    if 'text/markdown' in data: return ''.join(data['text/markdown']).strip()
    if any(kind.startswith('image/') for kind in data): return picture_text(data, source, where, pictures)
    if 'text/plain' in data: return fenced(''.join(data['text/plain']))
    raise SystemExit(f'{where}: an output without text: {", ".join(data)}')


def cell_text(cell: dict, where: str, pictures: dict[str, bytes]) -> list[str]:
    "The Markdown blocks that one cell becomes"
    source = ''.join(cell['source']).strip()
    if cell['cell_type'] == 'markdown': return [LINK.sub(r'\1nbs/\2', source)] if source else []
    if cell['cell_type'] != 'code' or not source: return []
    marks = directives(source)
    if 'hide' in marks or 'include:false' in marks: return []
    code = '\n'.join(line for line in source.splitlines() if not DIRECTIVE.match(line)).strip()
    blocks = [fenced(code, 'python')] if code and not marks & {'echo:false', 'hide_input'} else []
    if marks & {'output:false', 'hide_output'}: return blocks
    blocks += [output_text(output, where, source, pictures) for output in cell['outputs']]
    return blocks


def readme() -> tuple[str, dict[str, bytes]]:
    "The whole README, and the pictures in it by name"
    pictures: dict[str, bytes] = {}
    cells = json.loads(NOTEBOOK.read_text(encoding='utf-8'))['cells']
    blocks = [block for i, cell in enumerate(cells) for block in cell_text(cell, f'{NOTEBOOK.name}, cell {i}', pictures)]
    for link in re.findall(r'\]\((nbs/[^)#\s]+)', '\n'.join(blocks)):
        if (ROOT / link).exists() or Path(link).name in pictures: continue
        raise SystemExit(f'{NOTEBOOK.name}: a link to {link}, which is not there')
    return '\n\n'.join([HEAD, *blocks]) + '\n', pictures


def main(check: bool) -> int:
    "Write the README, or say how the one that is there differs"
    (new, pictures), old = readme(), README.read_text(encoding='utf-8') if README.exists() else ''
    if not check:
        README.write_text(new, encoding='utf-8')
        IMAGES.mkdir(exist_ok=True)
        for name, data in pictures.items(): (IMAGES/name).write_bytes(data)
        return 0
    stale = [name for name, data in pictures.items() if not (IMAGES/name).exists() or (IMAGES/name).read_bytes() != data]
    if new == old and not stale: return 0
    if stale: print(f'nbs/images: {", ".join(stale)} not as saved in the notebook')
    sys.stdout.writelines(difflib.unified_diff(old.splitlines(True), new.splitlines(True), 'README.md', 'made from nbs/index.ipynb'))
    print('README.md does not follow from nbs/index.ipynb; run: python tests/make_readme.py')
    return 1


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='compare only; exit status 1 if they differ')
    sys.exit(main(parser.parse_args().check))
