"""Pictures of pages as a browser shows them: `python tests/screenshots.py _docs shots [PAGE.html ...]`

Each page at 1,400 and 390 pixels, light and dark, as PNG. Needs Chromium or Chrome (`--browser` names another one). Pages are served from
this machine, since a browser does not load all parts of a page from a file. Fails where a page is missing or shows nothing.
"""
import argparse
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

PAGES = (
    'index.html',
    'tutorials/05_first_run.html',
    'tutorials/40_your_own_method.html',
    'papers/10_weak_teacher.html',
    'explanations/50_speed.html',
    'api/train/110_packing.html',
)
WIDTHS = {1400: 1600, 390: 1400} # pixels across -> down
SCHEMES = {'light': 1, 'dark': 0} # name -> of the browser
BROWSERS = ('chromium', 'google-chrome', 'chromium-browser', 'chrome')
EMPTY = 8_000 # bytes: a picture of one colour is smaller


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass # a line for each request helps nobody


@contextmanager
def served(folder: Path):
    "The address of a folder while it is served"
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try: yield f'http://127.0.0.1:{server.server_port}'
    finally: server.shutdown()


def take(browser: str, address: str, out: Path, width: int, height: int, scheme: str) -> None:
    "One picture"
    words = [
        browser, '--headless=new', '--no-sandbox', '--disable-gpu', '--hide-scrollbars', f'--window-size={width},{height}',
        f'--blink-settings=preferredColorScheme={SCHEMES[scheme]}', '--virtual-time-budget=8000', f'--screenshot={out}', address,
    ]
    subprocess.run(words, check=True, capture_output=True, timeout=120)


def name_of(page: str, width: int, scheme: str) -> str: return f'{page.removesuffix(".html").replace("/", "-")}-{width}-{scheme}.png'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('site', type=Path, help='folder of the built site')
    parser.add_argument('out', type=Path, help='folder for the pictures')
    parser.add_argument('pages', nargs='*', default=PAGES)
    parser.add_argument('--browser', default=next(filter(shutil.which, BROWSERS), None))
    a = parser.parse_args()
    if not a.browser: parser.error(f'no browser found; looked for {", ".join(BROWSERS)}')
    if missing := [p for p in a.pages if not (a.site/p).is_file()]: parser.error(f'not in {a.site}: {", ".join(missing)}')
    a.out.mkdir(parents=True, exist_ok=True)
    bad = []
    with served(a.site) as address:
        for page in a.pages:
            for width, height in WIDTHS.items():
                for scheme in SCHEMES:
                    out = (a.out/name_of(page, width, scheme)).resolve()
                    take(a.browser, f'{address}/{page}', out, width, height, scheme)
                    if out.stat().st_size < EMPTY: bad.append(out.name)
    if bad: print('nothing is seen in: ' + ', '.join(bad))
    return bool(bad)


if __name__ == '__main__': sys.exit(main())
