"""Run notebooks as the tests do and save their outputs: `python tests/refresh.py [--flags "slow gpu"] nbs/api/data/030_rows.ipynb ...`

Cells marked with a flag of `settings.ini: tst_flags` are left out, with the outputs they have, unless the flag is given.
Figures are saved with a palette of 256 colours and no wider than a screen shows them, narrower where the page would weigh more than 400 kB;
tables without the spaces between their tags. With `--figures` nothing is run and only that is done.
"""
import argparse
import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path

from execnb.nbio import nb2str, read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives

MOST = 400_000 # bytes of a page
WIDTHS = (1200, 1000, 850) # pixels across of its figures, the first that the page is light enough with; a column of the site has 800


def small_png(data: str, width: int) -> str:
    "A picture, in base64, of at most this width and 256 colours; as it was, where that is no smaller"
    from PIL import Image
    raw, out = base64.b64decode(data), io.BytesIO()
    image = Image.open(io.BytesIO(raw))
    if image.mode == 'P' and image.width <= width: return data
    dpi = image.info.get('dpi', (72, 72))
    if image.width > width:
        white = Image.new('RGBA', image.size, 'white')
        white.alpha_composite(image.convert('RGBA'))
        image = white.convert('RGB').resize((width, round(image.height*width/image.width)), Image.Resampling.LANCZOS)
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, 'png', optimize=True, dpi=dpi)
    return base64.b64encode(out.getvalue()).decode() if len(out.getvalue()) < len(raw) else data


def small_outputs(nb) -> None:
    "Let outputs take less room: figures no wider than a screen shows them, tables without the spaces between their tags"
    found = [o['data'] for cell in nb.cells for o in cell.get('outputs', []) if 'data' in o]
    for data in (d for d in found if 'text/html' in d):
        html = data['text/html'] if isinstance(data['text/html'], str) else ''.join(data['text/html'])
        if '<pre' not in html: data['text/html'] = re.sub(r'>\s+<', '><', html).strip()
    for width in WIDTHS:
        for data in (d for d in found if 'image/png' in d):
            data['image/png'] = small_png(data['image/png'] if isinstance(data['image/png'], str) else ''.join(data['image/png']), width)
        if len(nb2str(nb).encode()) < MOST: return


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
    small_outputs(nb)
    write_nb(nb, path)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--flags', default='', help='flags to run too, for example "slow"')
    parser.add_argument('--figures', action='store_true', help='run nothing; only let the saved outputs take less room')
    parser.add_argument('notebooks', nargs='+', type=Path)
    args = parser.parse_args()
    os.environ['IN_TEST'] = '1'
    os.environ.setdefault('HF_HUB_OFFLINE', '1')
    sys.path.insert(0, str(get_config().config_path))
    for notebook in args.notebooks:
        if args.figures:
            nb = read_nb(notebook)
            small_outputs(nb)
            write_nb(nb, notebook)
        elif len(args.notebooks) == 1: run_save(notebook.resolve(), args.flags)
        else: # in a process of its own: options that one page sets do not reach the next
            subprocess.run([sys.executable, __file__, '--flags', args.flags, str(notebook)], check=True)
