"`w2s label`, `w2s refine` and `--vary` leave one page of HTML, too: it needs nothing else, and the answer comes first"
import base64
import json
import re

import pytest
from test_report_html import EVIL, Seen
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.preference_data import ladder_world
from w2s.io.html import document_page, split_document
from w2s.world.rows import world_preferences

SMALL = '--weak pico --strong nano --seeds 1 --epochs 1 --n-labelled 8 --n-unlabelled 8 --n-test 8'
VARIED = {
    'labels': (f'classify --data world:storage {SMALL} --no-baseline --method xent --vary n_labelled --values 8,12', 'n_labelled'),
    'preferences': (f'preferences {SMALL} --samples 0 --vary beta --values .5,1', 'beta'),
}


def start(*words):
    done = CliRunner().invoke(app, list(map(str, words)))
    assert done.exit_code == 0, f'{done.output}\n{done.exception!r}'
    return done.output


def write_lines(path, rows): path.write_text(''.join(json.dumps(r) + '\n' for r in rows), encoding='utf-8')


@pytest.fixture(scope='module', params=['label', 'refine', *VARIED])
def made(request, tmp_path_factory):
    "What was made: its kind, the page, the same in Markdown, and what was printed"
    kind, home = request.param, tmp_path_factory.mktemp('page')
    if kind == 'label':
        splits = world_preferences(ladder_world(), rows=80, test_rows=4, seed=3, label_share=.5)
        for name, part in {'train': 'train_gt', 'rows': 'train_w2s'}.items():
            write_lines(home/f'{name}.jsonl', [{k: r[k] for k in ('prompt', 'chosen', 'rejected')} for r in splits[part]])
        said = start('label', '--model', 'pico', '--train', home/'train.jsonl', '--rows', home/'rows.jsonl', '--epochs', 1, '--out',
                     home/'made.parquet')
        page = home/'made.html'
    elif kind == 'refine':
        rows = [dict(question=f'What is {i}?', answer=EVIL) for i in range(3)]
        write_lines(home/'rows.jsonl', rows)
        words = '--strong scholar --method ask-to-improve --max-tokens 8'.split()
        said = start('refine', '--questions', home/'rows.jsonl', *words, '--out', home/'made.jsonl')
        page = home/'made.html'
    else:
        words, setting = VARIED[kind]
        said, page = start('run', *words.split(), '--out', home/'run'), home/'run'/f'{setting}.html'
    return kind, page, page.with_suffix('.md').read_text(encoding='utf-8'), said


def test_the_page_fetches_nothing_and_runs_nothing(made):
    page = made[1].read_text(encoding='utf-8')
    seen = Seen(page)
    assert seen.open == [] and not {tag for tag, _ in seen.tags} & {'script', 'iframe', 'object', 'embed', 'base', 'form'}
    for _, attrs in seen.tags:
        for key in ('src', 'href', 'srcset', 'poster'): assert attrs.get(key, 'data:').startswith('data:'), attrs
        assert not any(k.startswith('on') for k in attrs)
    assert any("default-src 'none'" in a.get('content', '') for a in seen.of('meta')) and 'url(' not in page


def test_the_page_says_what_the_text_says(made):
    "Every number of the report is in it, and its parts are folded in the same order"
    kind, path, text, _ = made
    page = ' '.join(Seen(path.read_text(encoding='utf-8')).words)
    _, first, parts = split_document(text)
    for number in re.findall(r'\d+\.\d+', ' '.join(parts.values()) + (first if kind == 'label' else '')): assert number in page, number
    at = [page.index(h) for h in ('Answer', 'Details', 'Settings')]
    assert at == sorted(at) and all(h in page for h in parts)


def test_the_page_is_named_and_the_answer_stands_open(made):
    kind, path, _, said = made
    assert path.name in said.splitlines()[-1]
    page = path.read_text(encoding='utf-8')
    answer = page[page.index('<section class="answer">'):page.index('<h2>Details</h2>')]
    assert {'label': 'the supervisor is right in', 'refine': 'answered 3 questions by the method ask-to-improve'}.get(kind, 'PGR') in answer
    pictures = Seen(page).of('img')
    assert len(pictures) == (kind in VARIED) and all(len(a['alt']) > 10 for a in pictures)
    for a in pictures: assert base64.b64decode(a['src'].partition('base64,')[2]) == path.with_suffix('.png').read_bytes()


DOCUMENTS = { # a text: its title, what stands first, its headings
    '# A\n\nfirst\n\n## B\n\nx': ('A', 'first', ['B']),
    '# A\\*\\<b\\>\n\n## B \\| C\n\nx\n\n## D': ('A*<b>', '', ['B | C', 'D']),
    '# A\n\n```toml\n# none\n## nor this\n```\n\n## B\n\n~~~\n## nor that\n~~~': ('A', '```toml\n# none\n## nor this\n```', ['B']),
    '# A\n\n> ## quoted\n\n- ## in a list\n\n### smaller\n\n## B': ('A', '> ## quoted\n\n- ## in a list\n\n### smaller', ['B']),
    '# A\n\n\\## escaped\n\n    ## in an indented block\n\n## B': ('A', '\\## escaped\n\n    ## in an indented block', ['B']),
}


@pytest.mark.parametrize('text', DOCUMENTS)
def test_parts_of_a_document(text):
    title, first, parts = split_document(text)
    assert (title, first, list(parts)) == DOCUMENTS[text]


def test_what_stands_in_a_document_stays_text():
    page = document_page(f'# Title\n\n{EVIL}\n\n## Part\n\n{EVIL}', EVIL, {}, (), EVIL)
    tags = {tag for tag, _ in Seen(page).tags}
    assert not tags & {'img', 'script', 'a'}
