"""Run notebooks as the tests do and save their outputs: `python tests/refresh.py [--flags "slow gpu"] nbs/api/data/020_rows.ipynb ...`

Cells marked with a flag of `settings.ini: tst_flags` are left out, with the outputs they have, unless the flag is given.
"""
import argparse
import os
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives


def run_save(path: Path, flags: str = '') -> None:
    "Run one notebook in its own folder and write it back, cleaned, with the outputs of this run"
    cfg, nb = get_config(), read_nb(path)
    skip = set(cfg.tst_flags.split()) - set(flags.split())

    def left_out(cell):
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        marks = extract_directives(cell, remove=False)
        return marks.get('eval:', [''])[0].lower() == 'false' or bool(skip & marks.keys())

    for cell in nb.cells: # else a cell that no longer prints anything would keep its old output
        if not left_out(cell): cell['outputs'] = []
    with working_directory(path.parent): CaptureShell(path).run_all(nb, exc_stop=True, preproc=left_out)
    clean_nb(nb)
    write_nb(nb, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--flags', default='', help='flags to run too, for example "slow"')
    parser.add_argument('notebooks', nargs='+', type=Path)
    args = parser.parse_args()
    os.environ['IN_TEST'] = '1'
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    sys.path.insert(0, str(get_config().config_path))
    for notebook in args.notebooks: run_save(notebook.resolve(), args.flags)
