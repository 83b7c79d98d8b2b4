"The house rules: imports go down only and are declared, the package starts fast, what is public is documented, saved outputs are clean"
import ast
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'w2s'
MODULES = sorted(path for path in PACKAGE.rglob('*.py') if path.name not in ('__init__.py', '_modidx.py'))
NOTEBOOKS = sorted(path for path in (ROOT / 'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in path.relative_to(ROOT).parts))
# The floors, lowest first: a module imports only from its own floor's lower numbers and from the floors before it
FLOORS = [
    'errors',
    'io',
    'data',
    'world',
    'island',
    'models',
    'train',
    'feedback',
    'evaluate',
    'compare',
    'experiments',
    'organism',
    'files',
    'plots',
    'report',
    'explore',
    'bench',
    'export',
    'check',
    'cli',
    'trl',
    '__main__',
]
HEAVY = ['torch', 'numpy', 'ray', 'transformers', 'datasets', 'peft', 'accelerate', 'bitsandbytes', 'pandas', 'pyarrow',
         'matplotlib', 'seaborn', 'sklearn', 'scipy']


def dotted(path: Path) -> str:
    "w2s/data/rows.py -> w2s.data.rows"
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts)


def report(offenders: list[str], rule: str) -> None:
    "Fail with the whole list, so that one run shows all there is to mend"
    assert not offenders, f'{rule}:\n  ' + '\n  '.join(offenders)


def imported(path: Path) -> Iterator[tuple[str, int]]:
    "Every module that a file names in an import, in full, with its line"
    tree = ast.parse(path.read_text(encoding='utf-8'))
    package = dotted(path).split('.')[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            module = '.'.join(base + ([node.module] if node.module else []))
            own = module.split('.')[0] == 'w2s'
            for name in node.names:  # `from w2s.data import rows` names the module w2s.data.rows
                full = f'{module}.{name.name}'
                yield (full if own and (ROOT / full.replace('.', '/')).with_suffix('.py').exists() else module), node.lineno


# Imports

def place(module: str) -> tuple[int, int]:
    "Floor of a module, and the number of its notebook"
    floor = module.split('.')[1]
    assert floor in FLOORS, f'{module}: no floor is named {floor}; put it in its place in FLOORS (tests/test_house.py)'
    head = (ROOT / module.replace('.', '/')).with_suffix('.py').read_text(encoding='utf-8')
    page = re.search(r'File to edit: \S*?(\d+)\w?_[\w.]+\.ipynb', head)
    assert page, f'{module}: not exported from a numbered notebook'
    return FLOORS.index(floor), int(page[1])


def test_every_module_has_its_notebook():
    offenders = []
    for path in MODULES:
        page = re.search(r'File to edit: (\S+\.ipynb)', path.read_text(encoding='utf-8'))
        if not page or not (path.parent / page[1]).exists():
            offenders.append(f'{path.relative_to(ROOT)}: {page[1] if page else "no notebook named"}')
    report(offenders, 'every module follows from a notebook that is there')


def test_imports_go_down():
    offenders = []
    for path in MODULES:
        for target, line in imported(path):
            if target.split('.')[0] != 'w2s' or target == 'w2s': continue
            if not (ROOT / target.replace('.', '/')).with_suffix('.py').exists():
                offenders.append(f'{path.relative_to(ROOT)}:{line} imports {target}, which is no module of ours')
            elif place(target) >= place(dotted(path)): offenders.append(f'{path.relative_to(ROOT)}:{line} imports {target}')
    report(offenders, f'imports go down only ({" < ".join(FLOORS)}; within a folder to lower notebook numbers)')


def test_no_tools_at_run_time():
    tools = {'fastcore', 'nbdev', 'execnb', 'trl', 'pytest', 'IPython'}
    offenders = [f'{path.relative_to(ROOT)}:{line} imports {name}' for path in MODULES for name, line in imported(path)
                 # trainers for users of TRL, an extra
                 if name.split('.')[0] in tools and not (name == 'trl' and path == ROOT/'w2s'/'trl.py')]
    offenders += [
        f'{path.relative_to(ROOT)}:{line} imports w2s.trl' for path in MODULES for name, line in imported(path) if name == 'w2s.trl'
    ]
    report(offenders, 'w2s must run without what it is built and tested with')


EACH_ALONE = '''
import importlib, os, sys, traceback
modules = sys.argv[1].split()
exec(sys.argv[2])
failed = 0
for name in modules:
    child = os.fork()
    if child == 0:
        try: importlib.import_module(name)
        except BaseException:
            print(f'import {name}', file=sys.stderr); traceback.print_exc(); sys.stderr.flush(); os._exit(1)
        os._exit(0)
    failed += os.waitpid(child, 0)[1] != 0
sys.exit(failed > 0)
'''


def others(path: Path) -> set[str]:
    "The import statements that run when a file is imported, without those of our own modules"
    own = ('from w2s', 'import w2s', 'from .', 'from __future__')
    lines = {
        ast.unparse(node) for node in ast.parse(path.read_text(encoding='utf-8')).body if isinstance(node, (ast.Import, ast.ImportFrom))
    }
    return {line for line in lines if not line.startswith(own)}


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_each_module_imports_alone():
    "Each in a process that has loaded none of ours. Torch and its like are loaded once, then the process is forked: they take seconds"
    there = [m for m in MODULES if m != ROOT/'w2s'/'trl.py' or importlib.util.find_spec('trl')]
    before = sorted(set().union(*map(others, there)))
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', EACH_ALONE, ' '.join(map(dotted, there)), '\n'.join(before)],
                          cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-6000:]


def test_first_cell_is_title_and_subtitle():
    "The site takes both from the first cell and drops the cell: what else stands there nobody reads"
    offenders = []
    for path in sorted((ROOT / 'nbs').rglob('*.ipynb')):
        cell = json.loads(path.read_text(encoding='utf-8'))['cells'][0]
        lines = [line for line in ''.join(cell['source']).splitlines() if line.strip()]
        if cell['cell_type'] != 'markdown' or not lines[0].startswith('# ') or len(lines) != 2 or not lines[1].startswith('> '):
            offenders.append(str(path.relative_to(ROOT)))
    report(offenders, 'the first cell of a page is a title and one line of subtitle')


# Files of a maintained project

def test_citation_has_the_version():
    "CITATION.cff names the version of settings.ini, and the changelog knows it"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    version = ini['DEFAULT']['version']
    assert re.search(rf'^version: {re.escape(version)}$', (ROOT / 'CITATION.cff').read_text(encoding='utf-8'), re.M)
    assert f'## {version}' in (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')


# Requirements

def requirements(key: str) -> set[str]:
    "Names on a line of settings.ini, as PyPI spells them: lower case, hyphens"
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return {re.match(r'[\w.-]+', item)[0].lower().replace('_', '-') for item in ini['DEFAULT'][key].split()}


def undeclared(names: set[str], declared: set[str]) -> set[str]:
    "Top-level imports that are neither Python's own, nor ours, nor declared"
    distribution = {'sklearn': 'scikit-learn', 'yaml': 'pyyaml', 'PIL': 'pillow', 'IPython': 'ipython', 'markdown_it': 'markdown-it-py'}
    known = sys.stdlib_module_names | {'tomllib', 'w2s'} | {p.stem for p in Path(__file__).parent.glob('*.py')}
    return {name for name in names - known if distribution.get(name, name).lower().replace('_', '-') not in declared}


def test_requirements_are_declared():
    names = {name.split('.')[0] for path in MODULES for name, _ in imported(path)}
    # an extra, imported only where it is asked for
    lines = ('requirements', 'ray_requirements', 'trl_requirements', 'jupyter_requirements')
    missing = undeclared(names, set().union(*map(requirements, lines)))
    assert not missing, f'imported by w2s, not in the lines {", ".join(lines)} of settings.ini: {sorted(missing)}'


def test_test_requirements_are_declared():
    names = {name.split('.')[0] for path in (ROOT / 'tests').glob('*.py') for name, _ in imported(path)}
    code = [''.join(cell['source']) for path in NOTEBOOKS for cell in cells(path) if cell['cell_type'] == 'code']
    names |= {name for source in code for name in re.findall(r'^\s*(?:import|from)\s+(\w+)', source, flags=re.MULTILINE)}
    # a test runs a benchmark in small, or takes a function of another test
    names -= {path.stem for folder in ('benchmarks', 'tests') for path in (ROOT / folder).glob('*.py')}
    declared = set().union(*map(requirements, ('requirements', 'ray_requirements', 'jupyter_requirements', 'dev_requirements')))
    missing = undeclared(names, declared | {'ipython', 'setuptools'})
    assert not missing, f'imported by tests or notebooks, in no requirement line of settings.ini: {sorted(missing)}'


# Start-up

def cpu_seconds(command: list[str]) -> float:
    "Least processor time of three runs of a command: what a person waits for on an idle machine, whatever else runs here now"
    best = float('inf')
    for _ in range(3):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        stderr = process.stderr.read().decode()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        process.stderr.close()
        assert process.returncode == 0, f'{" ".join(command)}: {stderr[-2000:]}'
        best = min(best, usage.ru_utime + usage.ru_stime)
    return best


@pytest.mark.parametrize('module', ['w2s', 'w2s.cli.app'])
def test_heavy_imports_are_lazy(module):
    code = f'import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stdout.split(), f'`import {module}` loads {done.stdout.strip()}; import them inside the functions that need them'


def test_import_is_fast():
    assert (took := cpu_seconds([sys.executable, '-c', 'import w2s'])) < 1, f'import w2s takes {took:.2f} s'


def test_help_is_fast():
    program = Path(sys.executable).with_name('w2s')
    assert program.exists(), f"{program} is not there: pip install -e '.[dev]'"
    assert (took := cpu_seconds([str(program), '--help'])) < 1, f'w2s --help takes {took:.2f} s'


# Documentation

def comment_lines(source: str) -> set[int]:
    "Numbers of the lines that hold a comment"
    return {token.start[0] for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type == tokenize.COMMENT}


def parameters(function: ast.FunctionDef, method: bool) -> list[ast.arg]:
    "All parameters of a function, without self or cls"
    spec = function.args
    static = any(isinstance(mark, ast.Name) and mark.id == 'staticmethod' for mark in function.decorator_list)
    plain = (spec.posonlyargs + spec.args)[1 if method and not static else 0:]
    return plain + [arg for arg in (spec.vararg, *spec.kwonlyargs, spec.kwarg) if arg]


def faults(function: ast.FunctionDef, method: bool, comments: set[int]) -> list[str]:
    "What a public function lacks"
    args = parameters(function, method)
    lines = [arg.lineno for arg in args]
    found = [] if ast.get_docstring(function) else ['no docstring']
    if function.returns is None: found.append('no return annotation')
    for arg in args:
        if arg.annotation is None: found.append(f'{arg.arg}: no annotation')
        elif 'help=' in ast.unparse(arg.annotation): continue  # an option of the command line explains itself
        if lines.count(arg.lineno) > 1 or not comments & set(range(arg.lineno, (arg.end_lineno or arg.lineno) + 1)):
            found.append(f'{arg.arg}: no comment beside it')
    return found


def public(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef, bool]]:
    "Public functions, classes, and methods of public classes: name, node, whether it is a method"
    for node in ast.parse(path.read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name[0] != '_':
            yield node.name, node, False
            if isinstance(node, ast.ClassDef):
                yield from ((f'{node.name}.{item.name}', item, True) for item in node.body
                            if isinstance(item, ast.FunctionDef) and item.name[0] != '_')


def test_public_is_documented():
    offenders = []
    for path in MODULES:
        comments = comment_lines(path.read_text(encoding='utf-8'))
        for name, node, method in public(path):
            if isinstance(node, ast.ClassDef): found = [] if ast.get_docstring(node) else ['no docstring']
            else: found = faults(node, method, comments)
            if found: offenders.append(f'{path.relative_to(ROOT)}:{node.lineno} {name}: {"; ".join(found)}')
    report(offenders, 'every public function has a docstring, annotations, and a comment beside each parameter')


def comments_with_backticks(source: str) -> list[int]:
    "Lines of signatures and of fields whose comment holds a backtick: the site makes a link of it, inside of code"
    places = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef): places |= set(range(node.lineno, max(node.body[0].lineno, node.lineno + 1)))
        elif isinstance(node, ast.ClassDef):
            places |= {n for f in node.body if isinstance(f, ast.AnnAssign) for n in range(f.lineno, f.end_lineno + 1)}
    comments = (t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT)
    return [t.start[0] for t in comments if t.start[0] in places and '`' in t.string]


def test_comments_of_parameters_hold_no_backticks():
    offenders = [f'{path.relative_to(ROOT)}:{n}' for path in MODULES for n in comments_with_backticks(path.read_text(encoding='utf-8'))]
    report(offenders, 'a comment of a parameter, a result or a field holds no backticks')


@pytest.mark.parametrize('source, lines', [
    ('def f(\n    x: int, # of `g`\n) -> int: # as `x`\n    return x # `x`', [2, 3]),
    ('class A:\n    x: int # of `g`\n    # `y`\n    y: int', [2]),
    ('def f(\n    x: int, # of g\n) -> int: return x', []),
])
def test_backticks_are_found(source, lines): assert comments_with_backticks(source) == lines


# Sizes and types

MOST_LINES = 300 # of code in a module
LONGER: dict[str, int] = {} # longer ones, which may only become shorter, and go
MOST_ANY = { # folder -> parameters and results of public functions that are `Any`, without **more; may only become fewer
    'bench': 14,
    'trl': 11,
    'cli': 16,
    'compare': 48,
    'data': 25,
    'errors': 1,
    'evaluate': 12,
    'experiments': 4,
    'feedback': 7,
    'files': 1,
    'io': 9,
    'models': 55,
    'organism': 4,
    'report': 3,
    'train': 104,
}


def code_lines(path: Path) -> int:
    "Lines of a module that are no import, no comment and not empty"
    source = path.read_text(encoding='utf-8')
    skipped = {
        n
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for n in range(node.lineno, node.end_lineno + 1)
    }
    return sum(n not in skipped and bool(line.strip()) and line.strip()[0] != '#' for n, line in enumerate(source.splitlines(), 1))


def test_modules_are_short():
    offenders = []
    for path in MODULES:
        name, lines = path.relative_to(PACKAGE).as_posix(), code_lines(path)
        if lines > LONGER.get(name, MOST_LINES): offenders.append(f'{name}: {lines} lines, {LONGER.get(name, MOST_LINES)} at most')
    report(offenders, 'a page has one problem, and its module 300 lines of code')


def untyped(function: ast.FunctionDef) -> list[str]:
    "Parameters whose type is Any, and 'return'; what ** collects is left out"
    kinds = [(arg.arg, arg.annotation) for arg in parameters(function, False) if arg is not function.args.kwarg] + [
        ('return', function.returns)
    ]
    return [name for name, kind in kinds if kind is not None and ast.unparse(kind) == 'Any']


def test_any_becomes_rarer():
    "A type that says nothing is not added; where some have gone, the number in MOST_ANY goes down with them"
    found: dict[str, list[str]] = {}
    for path in MODULES:
        for name, node, _ in public(path):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(dotted(path).split('.')[1], []).extend(
                    f'{path.relative_to(ROOT)}:{node.lineno} {name}: {arg}' for arg in untyped(node)
                )
    offenders = [f'{folder}: {len(items)}, {MOST_ANY.get(folder, 0)} at most\n    ' + '\n    '.join(items)
                 for folder, items in found.items() if len(items) > MOST_ANY.get(folder, 0)]
    report(offenders, 'no public function has more parameters and results of type Any than before')


# Saved outputs

ADDRESS = re.compile(r'\b0x[0-9a-fA-F]{6,}')
FOLDER = re.compile(r'(?<![\w.~/:])/(?:work|root|home|tmp|Users|opt|mnt|private|var/folders)/|\b[A-Z]:\\\\?Users')


def cells(path: Path) -> list[dict]:
    "The cells of a notebook"
    return json.loads(path.read_text(encoding='utf-8'))['cells']


def text_of(output: dict) -> str:
    "The readable part of a saved output"
    kinds = {kind: part for kind, part in output.get('data', {}).items() if not kind.startswith('image/') or kind.endswith('svg+xml')}
    return ''.join(
        ''.join(part) if isinstance(part, (str, list)) else json.dumps(part) for part in [output.get('text', ''), *kinds.values()]
    )


def output_faults(output: dict) -> list[str]:
    "What a saved output must not hold"
    text = text_of(output)
    found = ['a saved error'] if output['output_type'] == 'error' else []
    if output.get('name') == 'stderr': found.append(f'stderr: {text[:80]!r}')
    if match := ADDRESS.search(text): found.append(f'a memory address: {match[0]}')
    if match := FOLDER.search(text): found.append(f'a path of one machine: {text[match.start():match.start() + 60]!r}')
    return found


def test_saved_outputs_are_clean():
    offenders = [f'{path.relative_to(ROOT)}, cell {i}: {fault}' for path in NOTEBOOKS for i, cell in enumerate(cells(path))
                 for output in cell.get('outputs', []) for fault in output_faults(output)]
    report(offenders, 'saved outputs are the same on every machine')


# Size

def nodes(*folders: str) -> Iterator[tuple[Path, ast.AST]]:
    "Everything in the modules of some folders"
    for path in MODULES:
        if path.parent.name in folders: yield from ((path, node) for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))))


def test_few_kinds_of_records():
    "One `Arm`, one `SeedRows` and one `Made` for all kinds of feedback: a new dataclass needs a better reason than a fourth kind"
    found = [
        f'{path.stem}.{n.name}'
        for path, n in nodes('compare', 'experiments')
        if isinstance(n, ast.ClassDef) and any('dataclass' in ast.unparse(d) for d in n.decorator_list)
    ]
    assert len(found) <= 40, f'{len(found)} dataclasses in compare and experiments: {", ".join(sorted(found))}'


def test_no_function_is_long():
    "Its parameters, each with a comment, are counted"
    offenders = [
        f'{path.relative_to(ROOT)}:{n.lineno} {n.name}: {n.end_lineno - n.lineno + 1} lines'
        for path, n in nodes(*FLOORS)
        if isinstance(n, ast.FunctionDef) and n.end_lineno - n.lineno + 1 > 40
    ]
    report(offenders, 'a function has at most 40 lines')


@pytest.mark.parametrize('name', ['preferences', 'labels', 'demonstrations', 'toxicity'])
def test_the_page_of_an_experiment_is_short(name):
    "What is engine belongs to compare"
    lines = code_lines(PACKAGE / 'experiments' / f'{name}.py')
    assert lines <= 80, f'experiments/{name}.py has {lines} lines of code; 80 are allowed'
