"""nbs/sidebar.yml, the order of the site: `python tests/make_sidebar.py` writes it, `--check` only compares.

Sections and folders are ordered by hand below; the pages of a folder stand in the order of their numbers.
"""
import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NBS = ROOT / 'nbs'
SIDEBAR = NBS / 'sidebar.yml'
START = ('index.ipynb', 'tutorials/05_first_run.ipynb', 'tutorials/10_quickstart.ipynb')
PAPERS = { # authors of the paper that a page is about
    '10_weak_teacher': 'Tao & Li (2024): weak feedback',
    '11_equivalence': 'Tao & Li (2024): equivalence',
    '12_confidence': 'Afzali et al. (2026): confidence weights',
    '20_beyond_accuracy': 'Ye et al. (2024): safety, toxicity, law',
    '24_burns': 'Burns et al. (2023): generalization',
    '30_transfer': 'Somerstep et al. (2024): refinement',
}
API = { # folder -> what it is for, lowest first; '' holds the pages beside the folders
    'io': 'Files',
    'data': 'Data',
    'world': 'The toy world',
    'island': 'The island, a second world',
    'models': 'Models',
    'train': 'Training',
    'feedback': 'Feedback',
    'evaluate': 'Evaluation',
    'compare': 'Comparisons',
    'experiments': 'Experiments',
    'organism': 'The ladder of models',
    'files': 'Your own files',
    'plots': 'Figures',
    'report': 'Reports',
    'explore': 'Explore a result',
    'bench': 'Benchmarks',
    'export': 'Export',
    'check': 'Checks before a run',
    'cli': 'Command line',
    '': 'Package',
}


def pages_in(folder: str) -> list[str]:
    "The pages right in a folder, by number"
    found = (p for p in (NBS / folder).glob('*.ipynb') if p.name[0] not in '._')
    def number(path: Path) -> tuple:
        digits = path.name.partition('_')[0]
        return (int(digits) if digits.isdigit() else 0, path.name)
    return [p.relative_to(NBS).as_posix() for p in sorted(found, key=number)]


def quoted(text: str) -> str: return json.dumps(text, ensure_ascii=False)


def entries(pages: list[str], indent: int, names: dict[str, str] | None = None) -> list[str]:
    "A line each, with a name where it is not the page's title"
    space, lines = ' ' * indent, []
    for page in pages:
        other = (names or {}).get(Path(page).stem)
        lines += [f'{space}- href: {page}', f'{space}  text: {quoted(other)}'] if other else [f'{space}- {page}']
    return lines


def sections() -> dict[str, tuple[list[str], dict[str, str] | None]]:
    "All sections but the API: their pages, and names of pages that are not their titles"
    return {
        'Start here': (list(START), None),
        'Tutorials': ([p for p in pages_in('tutorials') if p not in START], None),
        'Papers': (pages_in('papers'), PAPERS),
        'Background': (pages_in('explanations'), None),
    }


def sidebar() -> str:
    "The whole file"
    lines = ['# Made by tests/make_sidebar.py: change it there, not here', 'website:', '  sidebar:', '    contents:']
    for name, (pages, names) in sections().items():
        lines += [f'      - section: {quoted(name)}', '        contents:', *entries(pages, 10, names)]
    lines += ['      - section: "API"', '        contents:']
    for folder, name in API.items():
        lines += [f'          - section: {quoted(name)}', '            contents:', *entries(pages_in(f'api/{folder}'.rstrip('/')), 14)]
    return '\n'.join(lines) + '\n'


def write_or_check(file: Path, made: str, program: str, about: str | None) -> None:
    "Write a file that follows from the pages, or with --check only compare; exits with 1 if it is another one"
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='write nothing; exit with 1 if the file is another one')
    if parser.parse_args().check:
        same = file.is_file() and file.read_text(encoding='utf-8') == made
        if not same: print(f'{file.relative_to(ROOT)} is not what the pages say: run python tests/{program}')
        sys.exit(not same)
    file.write_text(made, encoding='utf-8')


if __name__ == '__main__': write_or_check(SIDEBAR, sidebar(), 'make_sidebar.py', __doc__)
