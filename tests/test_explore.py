"What a researcher does with a result in a notebook: live curves, tabs, feedback rows, tokens that moved the margin, two results compared"
import json
import math
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from test_report_html import Seen

from w2s.compare.label_settings import fill_labels
from w2s.compare.models import open_base
from w2s.compare.preference_settings import fill_settings
from w2s.compare.result import Result
from w2s.errors import ConfigError, DataError
from w2s.evaluate.paired import compare_results
from w2s.experiments import labels, preferences
from w2s.explore import browse as browse_page
from w2s.explore.browse import browse_feedback
from w2s.explore.cards import demonstration_card, label_card, pair_card
from w2s.explore.feedback import demonstration_feedback, feedback_rows, filter_rows, sort_rows
from w2s.explore.tabs import data_html, settings_html, table_html, tabs_html
from w2s.explore.tokens import find_policy, token_pieces, token_shifts
from w2s.io import console, live
from w2s.models.adapters import load_adapter
from w2s.report.write import write

EVIL = '<img src=x onerror=y><script>z</script> "q" \'a\' & <b>'


@pytest.fixture(scope='module')
def pairs(tmp_path_factory) -> Result:
    given = dict(weak='pico', strong='nano', n_labelled=30, n_unlabelled=30, n_test=20, seeds=2, samples=0, others=(),
                 sft=dict(epochs=1), dpo=dict(epochs=2))
    return preferences.run(fill_settings(given), tmp_path_factory.mktemp('pairs')/'run', quiet=True)


@pytest.fixture(scope='module')
def texts(tmp_path_factory) -> Result:
    given = dict(weak='pico', strong='nano', n_labelled=40, n_unlabelled=40, n_test=40, seeds=1, methods='xent',
                 student=dict(epochs=1), supervisor=dict(epochs=1))
    return labels.run(fill_labels(given), tmp_path_factory.mktemp('texts')/'run', quiet=True)


# Live curves

class Notebook:
    "A shell that records what is displayed, and a clock that stands still"
    def __init__(self, monkeypatch, **kernel):
        self.sent, self.now, self.ended = [], 0., []
        publish = lambda data, transient=None, update=False: self.sent.append((data, transient, update))  # noqa: E731
        events = SimpleNamespace(register=lambda name, act: self.ended.append(act), unregister=lambda name, act: self.ended.remove(act))
        shell = SimpleNamespace(display_pub=SimpleNamespace(publish=publish), events=events, **kernel)
        monkeypatch.setitem(sys.modules, 'IPython', SimpleNamespace(get_ipython=lambda: shell))
        monkeypatch.delenv('IN_TEST', raising=False)
        monkeypatch.delenv('RANK', raising=False)
        monkeypatch.setattr(live.time, 'monotonic', lambda: self.now)
        monkeypatch.setattr(live, '_OPEN', [])


def train(book, steps=40, seconds=.3, label='student-seed0-dpo'):
    with console.progress_bar(steps, label, 'step') as bar:
        for i in range(steps):
            book.now += seconds
            bar.set_postfix(loss=f'{1/(1 + i):.3f}', refresh=False)
            bar.update()


@pytest.mark.parametrize('seconds', [.01, .3, 1., 5.])
def test_one_display_at_most_once_a_second(monkeypatch, seconds):
    book = Notebook(monkeypatch, kernel=1)
    train(book, seconds=seconds)
    train(book, seconds=seconds, label='second')
    spent = 80*seconds
    for act in list(book.ended): act(None)
    assert len(book.sent) <= 2 + spent and len({t['display_id'] for _, t, _ in book.sent}) == 1
    assert [update for _, _, update in book.sent] == [False] + [True]*(len(book.sent) - 1), 'updated in place'
    last = book.sent[-1][0]['text/html']
    assert last.count('<svg') == 2 and '<progress' not in last and 'second' in last and not book.ended and not live._OPEN
    assert not {'script', 'img'} & {tag for tag, _ in Seen(last).tags}


def test_each_cell_has_a_display_of_its_own(monkeypatch):
    book = Notebook(monkeypatch, kernel=1)
    for _ in range(2):
        train(book)
        for act in list(book.ended): act(None)
    assert len({t['display_id'] for _, t, _ in book.sent}) == 2


@pytest.mark.parametrize('where', ['a test', 'a terminal with IPython', 'another process of one training', 'no IPython', 'quiet'])
def test_elsewhere_nothing_changes(monkeypatch, where):
    book = Notebook(monkeypatch, **({} if where == 'a terminal with IPython' else {'kernel': 1}))
    if where == 'a test': monkeypatch.setenv('IN_TEST', '1')
    if where == 'another process of one training': monkeypatch.setenv('RANK', '1')
    if where == 'no IPython': monkeypatch.delitem(sys.modules, 'IPython')
    with console.progress_bar(3, 'x', 'step', quiet=where == 'quiet') as bar: bar.update()
    assert type(bar).__module__.startswith('tqdm') and not book.sent


def test_a_curve_is_small_and_its_title_is_text():
    "A loss that is not a number is left out"
    assert live.curve_svg([[(0, math.nan), (1, 2.), (2, math.inf), (3, 1.)]], EVIL).count(',') == 2
    points = [(i, math.sin(i)) for i in range(10**5)]
    assert len(live.curve_svg([points], 'long')) < 5000
    Seen(live.curve_svg([points], EVIL))
    assert '<img' not in live.curve_svg([points], EVIL)


# Tabs

def panel(html, heading): return html.partition(f'<section><h4>{heading}</h4>')[2].partition('</section>')[0]


@pytest.mark.cases(1)
@pytest.mark.parametrize('kind', ['pairs', 'texts'])
def test_a_result_in_tabs(kind, request):
    result = request.getfixturevalue(kind)
    html = result._repr_html_()
    seen = Seen(html.replace('<input type', '<br type'))
    assert not seen.open and not {'script', 'iframe', 'link'} & {tag for tag, _ in seen.tags}
    assert 'http' not in html.replace('http-equiv', '') and len(html) < 150_000
    heads = re.findall(r'<h4>(.*?)</h4>', html)
    assert heads == ['Answer', 'Differences', 'Figure', 'Curves', 'Data', 'Settings']
    ids = re.findall(r'<input type="radio" name="(.*?)" id="(.*?)"', html)
    assert len({i for _, i in ids}) == 6 and html.count(' checked>') == 1
    assert re.findall('<label for="(.*?)"', html) == [i for _, i in ids]
    assert panel(html, 'Answer').startswith('<p>PGR') and panel(html, 'Figure').startswith('<figure><img alt="')
    assert panel(html, 'Curves').count('<svg') == result.curves.groupby(['stage', 'method', 'weak', 'strong']).ngroups
    assert ids[0][0] not in result._repr_html_(), 'shown twice on a page, the two do not disturb each other'
    assert repr(result).startswith('- PGR')


def test_hostile_names_are_text(pairs):
    evil = replace(pairs, origin=EVIL, notes=(EVIL,), curves=pairs.curves.assign(method=EVIL), differences=pairs.differences.assign(a=EVIL),
                   intervals=pairs.intervals.assign(strong=EVIL))
    html = evil._repr_html_()
    tags = [(tag, attrs) for tag, attrs in Seen(html.replace('<input type', '<br type')).tags]
    assert 'script' not in {t for t, _ in tags} and all(a.get('src', 'data:').startswith('data:image/png') for t, a in tags if t == 'img')
    assert html.count('&lt;script&gt;') >= 4
    assert '<script' not in tabs_html({EVIL: ''})


def test_settings_name_no_folder(pairs, tmp_path):
    config = fill_settings(dict(data=str(tmp_path/'sub'/'mine__1.jsonl'), weak='pico'))
    text = settings_html(replace(pairs, config=config))
    assert str(tmp_path) not in text and '…/mine__1.jsonl' in text and 'pico' in text
    assert str(tmp_path) not in (text := data_html(replace(pairs, config=config, origin=f'Rows read from {config.data}.')))
    assert 'Rows read from …/mine__1.jsonl.' in text
    assert 'first 3 of 9 rows' in table_html(pd.DataFrame(dict(a=range(9))), 3)


# Rows

FEEDBACK = pd.DataFrame(dict(seed=0, id=list('abcd'), prompt_text=['one', 'two', 'Three', 'four'], chosen='x', rejected='y',
                             confidence=[.9, .6, .75, .6], margin=[2.2, .4, 1.1, .4], agrees=[0., 1., .5, 0.]))


@pytest.mark.parametrize('given,left', [
    ({}, 'abcd'), (dict(confidence=(.6, .75)), 'bcd'), (dict(margin=(1, 9)), 'ac'), (dict(agrees=True), 'b'), (dict(agrees=False), 'ad'),
    (dict(text='THREE'), 'c'), (dict(confidence=(0, .7), agrees=False), 'd'), (dict(text='(o'), ''),
])
def test_rows_that_fit(given, left): assert ''.join(filter_rows(FEEDBACK, **given)['id']) == left


@pytest.mark.parametrize('by,descending,order', [
    ('confidence', True, 'acbd'), ('confidence', False, 'bdca'), ('margin', True, 'acbd'), ('id', True, 'dcba'), ('', True, 'abcd')])
def test_rows_in_order(by, descending, order): assert ''.join(sort_rows(FEEDBACK, by, descending)['id']) == order


def test_what_is_not_there_is_refused(pairs):
    with pytest.raises(ConfigError, match='did you mean "margin"'): pairs.browse(sort='margn')
    with pytest.raises(ConfigError, match='give the lower end first'): pairs.browse(confidence=(1, 0))
    with pytest.raises(ConfigError, match='no ground truth'): filter_rows(FEEDBACK.drop(columns='agrees'), agrees=True)
    with pytest.raises(ConfigError, match='no margin'): filter_rows(FEEDBACK.drop(columns='margin'), margin=(0, 1))
    with pytest.raises(DataError, match='keeps no texts'): feedback_rows(replace(pairs, kind=replace(pairs.kind, name='toxicity')))


def test_feedback_of_pairs_is_that_of_the_labels(pairs):
    rows, t = feedback_rows(pairs), pairs.weak_labels
    assert len(rows) == 60 and rows['confidence'].between(.5, 1).all()
    assert np.allclose(1/(1 + np.exp(-rows['margin'])), t['prob']) and rows['agrees'].tolist() == t['gold'].tolist()


def test_feedback_of_texts_is_what_students_learn_from(texts):
    rows, quality = feedback_rows(texts), texts.labels.iloc[0]
    assert len(rows) == quality['rows'] == 40 and rows['agrees'].mean() == pytest.approx(quality['accuracy'])
    assert (rows['agrees'] == (rows['given'] == rows['truth'])).all() and set(rows['truth']) <= set(texts.classes)
    assert (write(texts)/'weak_labels.parquet').is_file()


def test_feedback_of_demonstrations():
    t = pd.DataFrame(dict(method=['naive', 'fix'], weak='pico', seed=0, question='q', weak_answer='a b', answer=['a b', 'a c'], concept=''))
    rows = demonstration_feedback(SimpleNamespace(training_rows=t))
    assert rows['changed'].tolist() == [0, 1] and rows['id'].is_unique
    before = demonstration_card(rows.iloc[1].to_dict())
    assert '>b</span>' in before and '>c</span>' in before and before.count('a ') >= 2


# Tokens that moved the margin

def direct(policy, adapter, row):
    "Log-probs of the response tokens from the model's own logits"
    base, reader = open_base(policy.model), policy.model.reader.tokenizer
    model = load_adapter(base, adapter) if adapter else base.model
    out = []
    for side in ('chosen', 'rejected'):
        start = len(reader(row['prompt'])['input_ids'])
        ids = reader(row['prompt'] + row[side])['input_ids']
        if ids[-1] != reader.eos_token_id: ids = [*ids, reader.eos_token_id]
        if ids[0] != reader.bos_token_id: ids, start = [reader.bos_token_id, *ids], start + 1
        with torch.no_grad(): logits = model(torch.tensor([ids])).logits[0].float()
        start -= reader(row['prompt'])['input_ids'][-1] == reader.eos_token_id
        out.append(logits.log_softmax(-1)[range(start - 1, len(ids) - 1), ids[start:]].double().numpy())
    if adapter: model.unload()
    return out


@pytest.mark.parametrize('role', ['floor', 'student'])
def test_tokens_that_moved_the_margin(pairs, role):
    row = pairs.browse().rows.iloc[0].to_dict()
    policy = find_policy(pairs, role, row['seed'])
    found = token_shifts(policy, [row])[0]
    ours, theirs = direct(policy, policy.adapter, row), direct(policy, policy.reference, row)
    for side, a, b, sign in zip(('chosen', 'rejected'), ours, theirs, (1, -1), strict=True):
        assert np.allclose(found[side]['moved'], sign*policy.beta*(a - b), atol=2e-4)
        assert np.allclose(found[side]['policy'], a, atol=1e-3)
        assert ''.join(found[side]['token']).strip().startswith(row[side].strip()[:10])


def test_all_tokens_together_are_the_margin(pairs):
    rows = feedback_rows(pairs)
    for seed, part in rows.groupby('seed'):
        shifts = token_shifts(find_policy(pairs, 'floor', seed), part.to_dict('records'))
        assert np.allclose([sum(t['moved'].sum() for t in p.values()) for p in shifts], part['margin'], atol=2e-3)


class Bytes:
    "A tokenizer of bytes: most characters of other scripts take several tokens"
    def decode(self, ids, **options): return bytes(ids).decode('utf-8', 'replace')


@pytest.mark.parametrize('text', ['plain', 'né', '日本', 'a😀b', ''])
def test_pieces_are_the_text(text):
    pieces = token_pieces(Bytes(), list(text.encode()))
    assert [p for p, _ in pieces] == list(text) and [i for _, at in pieces for i in at] == list(range(len(text.encode())))


def test_without_a_policy_one_sentence_says_so(pairs):
    other = replace(pairs, arms=pairs.arms[pairs.arms['role'] != 'floor'])
    with pytest.raises(DataError, match='role="student"'): find_policy(other)
    browser = browse_feedback(replace(pairs, adapters={}, arms=pairs.arms.assign(adapter='')))
    html = browser._repr_html_()
    assert html.count('Without shades: ') == 1 and html.count('class="w2s-card"') == 4 and 'title=' not in html


# Cards, in a saved page and live

def test_the_first_rows_stand_as_cards(pairs):
    browser = pairs.browse(agrees=False, few=2)
    bundle = browser._repr_mimebundle_()
    assert set(bundle) == {'text/html', 'text/plain'} and (browser.rows['agrees'] < .5).all()
    assert bundle['text/html'].count('class="w2s-card"') == 2 and len(bundle['text/html']) < 30_000 and 'rgba(' in bundle['text/html']
    assert browser.rows['confidence'].is_monotonic_decreasing


def test_texts_of_rows_are_text(pairs):
    table = pd.DataFrame(dict(token=[EVIL], policy=[0.], reference=[1.], moved=[-1.]))
    row = FEEDBACK.iloc[0].to_dict() | dict(id=EVIL, prompt_text=EVIL, chosen=EVIL, rejected=EVIL)
    found = [pair_card(row), pair_card(row, dict(chosen=table, rejected=table)),
             label_card(row | dict(weak=EVIL, text=EVIL, given=EVIL, truth=EVIL)),
             demonstration_card(dict(id=EVIL, seed=0, weak=EVIL, method=EVIL, question=EVIL, weak_answer=EVIL, answer=f'{EVIL} more'))]
    for html in found:
        seen = Seen(html)
        assert not {'script', 'img'} & {t for t, _ in seen.tags} and not seen.open
        assert ''.join(seen.words).count('<script>z</script>') >= 3


def test_a_table_with_filters_in_a_live_notebook(texts, monkeypatch):
    pytest.importorskip('anywidget')
    from w2s.explore.widget import browser_widget
    texts = replace(texts, extra=dict(texts.extra, weak_labels=texts.weak_labels.assign(text=EVIL)))
    browser = texts.browse()
    box = browser_widget(browser.rows, browser.cards)
    controls, words, table, card = box.children
    assert len(table.df) == 40 and 'w2s-card' in card.value
    assert '<script' not in str(table._dt_args) and '<script' not in card.value, 'a text does nothing'
    truth = next(c for c in controls.children if c.description == 'truth')
    assert truth.value == 'any'
    truth.value = 'disagrees'
    wrong = browser.rows[browser.rows['agrees'] < .5]
    assert len(table.df) == len(wrong) and words.value.startswith(f'{len(wrong)} of 40') and wrong['id'].iloc[0] in card.value
    table.selected_rows = [1]
    assert wrong['id'].iloc[1] in card.value and wrong['id'].iloc[0] not in card.value
    next(c for c in controls.children if c.description == 'text').value = 'not in any text'
    assert len(table.df) == 0 and 'No row fits' in card.value
    monkeypatch.setattr(browse_page, 'is_live', lambda: True)
    assert 'application/vnd.jupyter.widget-view+json' in browser._repr_mimebundle_()


def test_a_filter_leaves_the_columns_and_all_rows_that_fit():
    "Without them an update of the table shows its index and leaves out rows beyond 64 kB, so that a click shows another row"
    pytest.importorskip('anywidget')
    from w2s.explore.widget import browser_widget
    text = [f'{i} ' + 'long '*60 for i in range(1500)]
    rows = pd.DataFrame(dict(weak='pico', seed=0, id=[str(i) for i in range(1500)], text=text, given='no', truth='yes',
                             confidence=.75 + .25*np.cos(range(1500)), margin=1., agrees=0.))
    controls, words, table, card = browser_widget(rows, lambda part: ' '.join(part['id'])).children
    def names(): return re.findall('<th>(.*?)</th>', table._dt_args['table_html'])
    before = names()
    assert 'confidence' in before and '' not in before and not table._dt_args.get('text_in_header_can_be_selected')
    controls.children[0].value = (.5, .95)
    assert not table._dt_args.get('text_in_header_can_be_selected') # else a click on a name does not sort
    assert names() == before and len(json.loads(table._dt_args['data_json'])) == len(table.df) and 1000 < len(table.df) < 1500
    table.selected_rows = [1000]
    assert card.value == table.df['text'].iloc[1000].split()[0]


@pytest.mark.parametrize('lost', ['itables', 'anywidget', 'ipywidgets'])
def test_what_is_not_installed_is_said(texts, monkeypatch, lost):
    monkeypatch.setattr(browse_page, 'is_live', lambda: True)
    monkeypatch.setattr(browse_page, 'find_spec', lambda name: None if name == lost else object())
    html = texts.browse()._repr_mimebundle_()['text/html']
    assert f'needs {lost}: <code>pip install' in html and 'w2s[jupyter]' in html and html.count('w2s-card') == 4


# Two results

def test_two_results_as_the_command_compares_them(pairs, tmp_path):
    other = replace(pairs, folder=tmp_path/'other', items=pairs.items.assign(
        value=pairs.items['value'].where(pairs.items['role'] != 'student', 1 - pairs.items['value'])))
    for result in (pairs, other): write(result, result.folder)
    for mine, at in (('', 'student'), ('floor', 'floor')):
        found = pairs.compare(other, mine)
        told = compare_results(f'{pairs.folder}@{at}', f'{other.folder}@{at}')
        pd.testing.assert_frame_equal(found.table.drop(columns=['a', 'b']), told.table.drop(columns=['a', 'b']))
        by_path = pairs.compare(other.folder, mine)
        pd.testing.assert_frame_equal(found.table.drop(columns=['b']), by_path.table.drop(columns=['b']))
    own = pairs.compare(pairs, 'student', 'floor', metrics=['accuracy'])
    assert own.table['metric'].tolist() == ['accuracy'] and '_repr_markdown_' in dir(own)
    with pytest.raises(ConfigError, match='unknown model of the run "studnet"'): pairs.compare(other, 'studnet')
    with pytest.raises(ConfigError, match='level 2'): pairs.compare(other, level=2)
