"What somebody else has named or written stays text: in every report and in every table of a notebook, for every command"
import re
import shutil

import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.models.zoo import model_folder

EVIL = '<img src=x>[x](j:)|`c`![y](z)<script>'
NAME = '<img src=x onerror=y> [x](z)' # of a folder and of files: no slash
N = 60


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "A model, rows, columns, classes and files with such names and texts"
    home = tmp_path_factory.mktemp('evil')
    shutil.copytree(model_folder('pico'), home/NAME)
    asked, others = ([f'Who keeps {i}{what}? {EVIL}' for i in range(N)] for what in ('', ' dogs'))
    for prompts, file in ((asked, f'pairs {NAME}'), (others, 'more')):
        pd.DataFrame(
            dict(prompt=prompts, chosen=[f' It is {i}. {EVIL}' for i in range(N)], rejected=[f' No {i}. {EVIL}' for i in range(N)])
        ).to_json(home / f'{file}.jsonl', orient='records', lines=True)
    pd.DataFrame({'text': asked, 'label': [EVIL if i % 2 else 'safe <b>' for i in range(N)], f'more {EVIL}': range(N)}).to_csv(
        home / f'texts {NAME}.csv', index=False
    )
    pd.DataFrame(dict(question=asked, answer=[f'{i} {EVIL}' for i in range(N)])).to_csv(home/f'questions {NAME}.csv', index=False)
    pd.DataFrame(dict(question=asked, answer=range(N))).to_csv(home/f'sums {NAME}.csv', index=False)
    return home


def commands(home):
    "Each command on such rows, with such a model"
    model, lean = str(home/NAME), ['--quantize', 'none', '--dtype', 'float32']
    pairs, texts, questions, sums = (
        str(home / f'{k} {NAME}{e}') for k, e in (('pairs', '.jsonl'), ('texts', '.csv'), ('questions', '.csv'), ('sums', '.csv'))
    )
    one = ['--seeds', '1', *lean]
    return {
        'weak-teacher': [
            'run',
            'preferences',
            '--data',
            pairs,
            '--weak',
            model,
            '--strong',
            model,
            '--n-labelled',
            '8',
            '--n-unlabelled',
            '8',
            '--n-test',
            '6',
            *one,
        ],
        'vary': [
            'run',
            'preferences',
            '--data',
            pairs,
            '--weak',
            model,
            '--strong',
            model,
            '--n-labelled',
            '8',
            '--n-unlabelled',
            '8',
            '--n-test',
            '6',
            '--vary',
            'beta',
            '--values',
            '0.1,1',
            *one,
        ],
        'classify': [
            'run',
            'classify',
            '--data',
            texts,
            '--weak',
            model,
            '--strong',
            model,
            '--n-labelled',
            '8',
            '--n-unlabelled',
            '8',
            '--n-test',
            '6',
            '--method',
            'xent',
            '--max-length',
            '256',
            *one,
        ],
        'maths': [
            'run',
            'maths',
            '--data',
            sums,
            '--weak',
            model,
            '--strong',
            model,
            '--method',
            'in-context',
            '--examples',
            '1',
            '--n-labelled',
            '8',
            '--n-unlabelled',
            '8',
            '--n-test',
            '6',
            '--max-tokens',
            '8',
            *one,
        ],
        'toxicity': [
            'run',
            'toxicity',
            '--weak',
            model,
            '--strong',
            model,
            '--method',
            'in-context',
            '--n-labelled',
            '8',
            '--n-unlabelled',
            '8',
            '--n-test',
            '4',
            *one,
        ],
        'label': ['label', '--model', model, '--rows', pairs, '--train', str(home / 'more.jsonl'), '--max-length', '256', *lean],
        'refine': ['refine', '--questions', questions, '--strong', model, '--method', 'ask-to-improve', '--max-tokens', '8', *lean],
    }


def outside_code(text): return re.sub(r'^(`{3,}|~{3,}).*?^\1', '', text, flags=re.S | re.M)


@pytest.mark.cases(2)
@pytest.mark.parametrize('name', ['weak-teacher', 'vary', 'classify', 'maths', 'toxicity', 'label', 'refine'])
def test_reports_hold_no_tags_links_or_pictures_of_others(home, tmp_path, name):
    out = tmp_path/{'label': 'x.parquet', 'refine': 'x.jsonl'}.get(name, 'run')
    done = CliRunner().invoke(app, [*commands(home)[name], '--out', str(out)])
    assert done.exit_code == 0, (done.exception, done.output[-800:])
    pages = [p for p in tmp_path.rglob('*.md') if 'stages' not in p.parts]
    assert pages
    for page in pages:
        text = outside_code(page.read_text(encoding='utf-8'))
        # it is there, as text; that one report names no row
        assert 'img src' in text or (name, page.name) == ('toxicity', 'data_report.md'), page
        for raw in (r'(?<!\\)<img', r'(?<!\\)<script', r'(?<!\\)\[x\]\(', r'!\[y\]', r'(?<!\\)<b>'):
            assert not re.search(raw, text), (page.name, raw, re.search('.{60}' + raw + '.{40}', text))
        for table in re.findall(r'(?:^\|.*\n?)+', text, flags=re.M): # every line of a table has as many cells
            assert len({len(re.findall(r'(?<!\\)\|', line)) for line in table.strip().split('\n')}) == 1, table[:300]
