"""The site shows the code of API pages: `python tests/show_code.py` turns `#| export` into `#| exports` in every cell of nbs/api that holds
more than imports; `--check` only names such cells. What is exported stays the same."""
import argparse
import ast
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARK = '#| export'


def shows_nothing(source: str) -> bool:
    "Does a cell hold imports alone?"
    return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(source).body)


def hidden_cells(notebook: dict) -> list[dict]:
    "The exported cells whose code the site leaves out"
    found = [c for c in notebook['cells'] if c['cell_type'] == 'code' and ''.join(c['source']).partition('\n')[0].rstrip() == MARK]
    return [c for c in found if not shows_nothing(''.join(c['source']))]


def show(path: Path, check: bool) -> list[str]:
    "Change a page, or only name what there is to change"
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cells = hidden_cells(notebook)
    for cell in cells: cell['source'] = ''.join(cell['source']).replace(MARK, f'{MARK}s', 1).splitlines(keepends=True)
    if cells and not check:
        path.write_text(json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return [f'{path.relative_to(ROOT)} #{c["id"]}' for c in cells]


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='change nothing; exit with 1 where something would change')
    check = parser.parse_args().check
    found = [line for path in sorted((ROOT / 'nbs' / 'api').rglob('*.ipynb')) for line in show(path, check)]
    print('\n'.join(found) if check else f'{len(found)} cells')
    sys.exit(bool(found) and check)
