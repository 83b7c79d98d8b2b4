"report.html, results.tex and figure.pdf of a run, and `w2s report DIR`: one page that needs nothing else, in which texts stay texts"
import base64
import os
import re
import shutil
import stat
from dataclasses import replace
from html.parser import HTMLParser

import pandas as pd
import pytest
from typer.testing import CliRunner

from w2s.cli.app import app
from w2s.compare.label_settings import fill_labels
from w2s.compare.upkeep import verify_folder
from w2s.data.hygiene import DataReport
from w2s.errors import ConfigError
from w2s.experiments import labels
from w2s.io.html import html_page, markdown_reader
from w2s.io.manifests import INCOMPLETE, MANIFEST, read_manifest
from w2s.report.again import EXPERIMENTS, _named, experiment_of, report_again
from w2s.report.folder import fill_folder
from w2s.report.latex import escape_latex, latex_table
from w2s.report.summary import gap_line, limitations, mde_words, not_significant, power_lines, question, verdict
from w2s.report.write import write

EVIL = '<img src=x onerror=y><script>z</script> [x](javascript:z) ![y](http://a.b/c.png) & "quoted" \\ $x$ `c` |'


class Seen(HTMLParser):
    "Every tag of a page with its attributes, and its words"
    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ('meta', 'link', 'img', 'br', 'hr'): self.open.append(tag)

    def handle_endtag(self, tag): assert self.open.pop() == tag, tag
    def handle_data(self, data): self.words.append(data)
    def of(self, tag): return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    given = dict(weak='pico', strong='nano', n_labelled=40, n_unlabelled=40, n_test=40, seeds=1, methods='xent,hard')
    out = tmp_path_factory.mktemp('page')/'run'
    return labels.run(fill_labels(given | dict(student=dict(epochs=1), supervisor=dict(epochs=1))), out, quiet=True)


@pytest.fixture(scope='module')
def folder(result): return write(result)


@pytest.fixture(scope='module')
def page(folder): return (folder/'report.html').read_text(encoding='utf-8')


# One page that needs nothing else

def test_a_page_fetches_nothing_and_runs_nothing(page):
    seen = Seen(page)
    assert seen.open == [], 'every tag is closed'
    names = {tag for tag, _ in seen.tags}
    assert not names & {'script', 'iframe', 'object', 'embed', 'base', 'form', 'video', 'audio'}
    for _, attrs in seen.tags:
        for key in ('src', 'href', 'srcset', 'poster'): assert attrs.get(key, 'data:').startswith('data:'), attrs
        assert not any(k.startswith('on') for k in attrs)
    assert 'url(' not in page and '@import' not in page
    assert any("default-src 'none'" in a.get('content', '') for a in seen.of('meta'))


def test_pictures_are_inside_once_each_and_have_words(page, folder):
    images = Seen(page).of('img')
    data = [base64.b64decode(a['src'].partition('base64,')[2]) for a in images]
    assert len(data) == len(set(data)) == 3, 'the result, what became of errors, and the training'
    assert set(data) == {(folder/f'{n}.png').read_bytes() for n in ('figure', 'inheritance', 'training')}
    assert all(len(a['alt']) > 10 for a in images)


def test_measures_have_the_names_of_the_field(page):
    text = page[:page.index('<h2>Details</h2>')]
    assert 'AUROC' in text and 'auroc' not in text


def test_the_answer_comes_first_and_details_are_folded(page, result):
    seen = Seen(page)
    text = ' '.join(seen.words)
    order = ['Arms', 'Not significant', 'Limitations', 'Details', 'Data report', 'Settings', 'How it was made']
    at = [text.index(x) for x in (question(result), verdict(result)[0], *order)]
    assert at == sorted(at)
    folded = re.findall(r'<details class="[\w-]+"><summary>(.*?)</summary>', page)
    for part in ('Data report', 'Training curves', 'Disagreements', 'All tables', 'Settings', 'How it was made'): assert part in folded
    assert '<details open' not in page and seen.of('html')[0]['lang'] == 'en' and len(seen.of('h1')) == 1


def test_a_phone_paper_and_the_dark_are_thought_of(page):
    for part in ('width=device-width', 'prefers-color-scheme: dark', '@media print', 'max-width: 30rem', 'overflow-x: auto'):
        assert part in page


def test_what_made_a_run_is_in_its_report(page, folder):
    "The command, versions, commit, date and time: of this run"
    made = read_manifest(folder/MANIFEST)['made']
    text, stages = ' '.join(Seen(page).words), len(made['stages'])
    packages = [f'{name} {made["versions"][name]}' for name in ('w2s', 'torch')]
    for part in (*packages, made['python'], f'in {stages} stages', made['time'][:10]): assert part in text, part
    assert made['commit'] in text and re.search(r'Time: [\d.]+ (s|min|h)', text)
    assert 'Command: ' in (folder/'report.md').read_text(encoding='utf-8')


# Texts stay texts

@pytest.mark.parametrize('where', ['title', 'question', 'open', 'folded', 'alt', 'end', 'heading'])
def test_a_text_cannot_become_a_part_of_the_page(where):
    "Wherever it stands, raw: none of it is escaped before"
    png = b'\x89PNG'
    text = html_page(
        EVIL if where == 'title' else 'T',
        EVIL if where == 'question' else 'Q',
        {EVIL if where == 'heading' else 'Answer': EVIL if where == 'open' else '![p](p.png)'},
        {'Data': EVIL if where == 'folded' else 'text'},
        {'p': (png, EVIL if where == 'alt' else 'told')},
        EVIL if where == 'end' else '',
    )
    seen = Seen(text)
    assert not {'script', 'iframe'} & {tag for tag, _ in seen.tags} and not any('onerror' in a for _, a in seen.tags)
    assert [a.get('src', '')[:5] for a in seen.of('img')] in ([], ['data:'])
    assert not any('javascript' in a.get('href', '') for a in seen.of('a'))
    assert 'http://a.b' not in ' '.join(str(v) for _, a in seen.tags for v in a.values())


def test_a_run_with_such_texts(result, tmp_path):
    "In names, notes, the report on data: nothing of it is a tag"
    found = DataReport().add(EVIL, 'train', 3, 9, 'cut', EVIL)
    evil = replace(result, origin=EVIL, notes=(EVIL,), models=(EVIL,), report=replace(found, rows_in={'train': 9}),
                   arms=result.arms.assign(adapter=EVIL))
    text = (write(evil, tmp_path/'out')/'report.html').read_text(encoding='utf-8')
    seen = Seen(text)
    assert 'script' not in {tag for tag, _ in seen.tags} and not seen.of('a') and len(seen.of('img')) == 3
    assert sum(w.count('<script>z</script>') for w in seen.words) >= 4


@pytest.mark.parametrize('cell', ['a|b', '**b**', '<b>', '![x](y.png)', '# x', '- x', '```', '$x$', '&lt;'])
def test_markdown_of_a_cell_is_its_text(cell):
    from w2s.io.console import markdown_table
    html = markdown_reader().render(markdown_table(['a', 'b'], [[cell, '1']]), {'pictures': {}, 'shown': set()})
    assert ''.join(Seen(html).words).split() == ['a', 'b', *cell.split(), '1']


LATEX = {'a_b': r'a\_b', '50 %': r'50 \%', 'R&D': r'R\&D', '{x}': r'\{x\}', '#1': r'\#1', 'a\\b': r'a\textbackslash{}b',
         '$5': r'\$5',
         'x^2': r'x\textasciicircum{}2', 'a~b': r'a\textasciitilde{}b', '-0.1': '$-$0.1', 'dpo-weak': 'dpo-weak', 'a\nb': 'a b',
         '±1': r'$\pm$1'}


@pytest.mark.parametrize('text', LATEX)
def test_latex_sets_a_text_as_it_is(text): assert escape_latex(text) == LATEX[text]


def test_a_table_for_a_paper(folder):
    text = (folder/'results.tex').read_text(encoding='utf-8')
    rows = [line for line in text.splitlines() if line.endswith(r'\\')]
    assert len({len(re.findall(r'(?<!\\)&', r)) for r in rows}) == 1 and len(rows) >= 6
    for rule in (r'\toprule', r'\midrule', r'\bottomrule', r'\caption{'): assert text.count(rule) == 1
    bare = re.sub(r'\\[%&#_${}]', '', text.partition('\n')[2])
    assert '%' not in bare and '#' not in bare and bare.count('{') == bare.count('}')
    assert latex_table(pd.DataFrame({'a': ['[x]', '*']}), 'c').count('{}[x]') == 1


# What is said

ROW = dict(role='student', method='dpo', weak='pico', strong='base', metric='gold_reward', gap=.8, gap_low=.6, gap_high=1., value=.53,
           low=.4, high=.66, level=.95, refused='', note='')


def test_a_gap_in_a_sentence():
    assert gap_line(ROW) == (
        'base, taught by pico (dpo), recovers 53% of the gap of 0.800 [0.600, 1.000] in gold reward: PGR 0.53 [0.40, 0.66], '
        '95 % confidence interval.'
    )
    refused = gap_line(ROW | dict(refused='the gap may be zero: ceiling minus floor is 0; more rows would tell', value=float('nan')))
    assert refused.startswith('No PGR on gold reward') and 'the gap may be zero' in refused and 'nan' not in refused


def test_the_reported_gap_leads_and_the_refused_one_stays(result):
    table = pd.DataFrame([ROW | dict(metric='accuracy', refused='the gap may be zero: x'), ROW])
    lines = verdict(replace(result, pgr=table))
    assert 'recovers 53%' in lines[0] and 'No PGR on accuracy' in lines[1]
    many = verdict(replace(result, pgr=pd.concat([table.assign(method=str(i)) for i in range(9)])))
    assert many[-1].startswith('14 more') or len(many) <= 5


@pytest.mark.parametrize('seeds,said', [(1, 'One seed'), (2, 'Two seeds'), (5, '5 seeds')])
def test_seeds_limit_a_run(result, seeds, said):
    lines = limitations(replace(result, intervals=result.intervals.assign(seeds=seeds)))
    assert lines[0].startswith(said) and any('toy world' in line for line in lines)


def test_what_was_cut_limits_a_run(result):
    report, extra = DataReport().add('longer than 128 tokens', 'train', 3, 9, 'cut'), dict(result.extra, cut={'answers': (2, 8)})
    lines = limitations(replace(result, report=report, extra=extra))
    assert '3 of 9 examples (train) cut: longer than 128 tokens.' in lines
    assert '2 of 8 answers hit their limit of tokens and were cut.' in lines


def test_what_could_not_have_been_seen(result):
    assert mde_words(.0512) == '0.051' and 'whole range' in mde_words(1.4, 1.) and mde_words(float('nan')) == 'not known'
    n = int((~result.differences.significant).sum())
    assert power_lines(result)[0].startswith(f'{len(result.differences) - n} of {len(result.differences)}')
    assert len(not_significant(result, 99)) == n and all('MDE' in line for line in not_significant(result, 99))
    none = replace(result, differences=result.differences.iloc[:0])
    assert power_lines(none) == ['No two arms are compared.'] and not_significant(none) == []


# The files of a run

def test_the_files_are_known_and_readable(folder):
    "In the manifest, found when damaged, and readable by others as the umask says"
    names = {'report.html', 'results.tex', 'figure.pdf', 'training.pdf'}
    assert names <= set(read_manifest(folder/MANIFEST)['files'])
    mask = os.umask(0)
    os.umask(mask)
    for name in names: assert stat.S_IMODE((folder/name).stat().st_mode) == 0o666 & ~mask, name
    assert (folder/'figure.pdf').read_bytes().startswith(b'%PDF')


@pytest.mark.parametrize('name', ['report.html', 'results.tex', 'figure.pdf'])
def test_a_damaged_file_is_named(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path/'run')
    (tmp_path/'run'/name).write_bytes((tmp_path/'run'/name).read_bytes()[:-1])
    assert any(name in str(f) and f.damaged for f in verify_folder(tmp_path/'run') if f.problem)


def test_an_edited_page_is_kept(result, folder, tmp_path):
    shutil.copytree(folder, tmp_path/'run')
    (tmp_path/'run'/'report.html').write_text('my own page')
    with pytest.warns(match='kept as report.html.edited'): report_again(tmp_path/'run')
    assert (tmp_path/'run'/'report.html.edited').read_text() == 'my own page'


def test_the_home_folder_is_in_no_page_and_no_picture_is_harmed(monkeypatch, tmp_path):
    "A home whose name may be in a picture's letters: those are data, not a text"
    from pathlib import Path
    monkeypatch.setattr(Path, 'home', lambda: Path('/a'))
    fill_folder(tmp_path, None, {}, {}, {'p.html': lambda folder: 'data:/a/b', 'q.md': 'in /a/b'}, {})
    assert (tmp_path/'p.html').read_text() == 'data:/a/b' and (tmp_path/'q.md').read_text() == 'in ~/b'


# Again

def test_every_experiment_is_known_by_its_settings():
    from w2s.compare.config import to_table
    from w2s.compare.settings import make_settings
    for kind, (settings, opener) in EXPERIMENTS.items():
        assert experiment_of(to_table(make_settings(_named(settings), {}))) == kind and callable(_named(opener))
    with pytest.raises(ConfigError, match='no experiment of this version'): experiment_of({'nothing': 1})


def test_a_report_is_made_again(folder, tmp_path):
    "From the stages alone: the same numbers, what made the run is still that of the run, and the folder is whole"
    out = tmp_path/'run'
    shutil.copytree(folder, out)
    before = {n: (out/n).read_bytes() for n in ('items.parquet', 'results.tex', 'figure.png')}
    made = read_manifest(out/MANIFEST)['made']
    for name in ('report.html', 'figure.png'): (out/name).unlink()
    done = CliRunner().invoke(app, ['report', str(out)])
    assert done.exit_code == 0 and 'report.html' in done.output, done.output
    assert {n: (out/n).read_bytes() for n in before} == before
    again = read_manifest(out/MANIFEST)['made']
    for key in ('command', 'time', 'versions', 'stages'): assert again[key] == made[key], key
    assert not [f for f in verify_folder(out) if f.problem] and not (out/INCOMPLETE).exists()


LACKING = {
    'no run': (lambda out: shutil.rmtree(out) or out.mkdir(), 'holds no finished run'),
    'no settings': (lambda out: (out/'config.toml').unlink(), 'holds no finished run'),
    'a damaged manifest': (lambda out: [(out/n).write_text('{') for n in (MANIFEST, f'.{MANIFEST}')], 'holds no finished run'),
    'not finished': (lambda out: (out/INCOMPLETE).write_text('x'), 'the run is not finished'),
    'a stage is gone': (lambda out: shutil.rmtree(sorted((out/'stages').glob('*'))[0]), 'missing, damaged or of other data'),
    'a stage is damaged': (lambda out: next((out/'stages').glob('*/adapter/*.safetensors')).write_bytes(b'x'), 'missing, damaged or of'),
}


@pytest.mark.parametrize('what', LACKING)
def test_nothing_is_trained_for_a_report(folder, tmp_path, what):
    "A sentence, and the folder is left as it was"
    out = tmp_path/'run'
    shutil.copytree(folder, out)
    change, said = LACKING[what]
    change(out)
    there = {p.relative_to(out) for p in out.rglob('*')}
    with pytest.raises(ConfigError, match=said): report_again(out)
    assert {p.relative_to(out) for p in out.rglob('*')} - there <= {type(out)('.lock')}
