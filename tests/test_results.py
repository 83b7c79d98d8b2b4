"""What stands in results and reports of every kind of feedback: groups, seeds, the gap that is recovered, differences that allow for their
number, curves and files"""
import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from w2s.compare.demonstration_settings import fill_demonstrations
from w2s.compare.label_settings import fill_labels
from w2s.compare.preference_settings import fill_settings
from w2s.compare.preference_tables import row_groups
from w2s.compare.result import Result, pgr_text, show_table
from w2s.compare.tables import DIFFERENCES, GAPS, WHO
from w2s.compare.toxicity_settings import fill_toxicity
from w2s.compare.win_rates import win_table
from w2s.evaluate.clusters import by_group
from w2s.evaluate.intervals import interval_table
from w2s.evaluate.metrics import ITEM_COLUMNS
from w2s.evaluate.several import holm
from w2s.experiments import demonstrations as transfer
from w2s.experiments import labels as classify
from w2s.experiments import preferences as weak_teacher
from w2s.experiments import toxicity
from w2s.experiments.vary import Varied
from w2s.report.page import report_text
from w2s.report.write import page_of, write

COLUMNS = {'a', 'b', 'metric', 'value', 'low', 'high', 'n', 'seeds', 'level', 'p', 'family', 'p_holm', 'significant', 'detectable'}


@pytest.fixture(scope='module')
def preferences(tmp_path_factory):
    return weak_teacher.run(
        fill_settings(dict(weak='pico', strong='pico', n_labelled=30, n_unlabelled=30, n_test=150, seeds=2)),
        tmp_path_factory.mktemp('weak'),
        quiet=True,
    )


@pytest.fixture(scope='module')
def labels(tmp_path_factory):
    given = dict(
        weak='pico',
        strong='nano',
        n_labelled=60,
        n_unlabelled=60,
        n_test=60,
        seeds=1,
        methods='xent,hard',
        student=dict(epochs=1),
        supervisor=dict(epochs=1),
    )
    return classify.run(fill_labels(given), tmp_path_factory.mktemp('labels'), quiet=True)


@pytest.fixture(scope='module')
def demonstrations(tmp_path_factory):
    given = dict(
        weak='pico',
        strong='nano',
        seeds=2,
        n_labelled=8,
        n_unlabelled=8,
        n_test=12,
        demonstrate=dict(epochs=1),
        student=dict(epochs=1),
        max_tokens=16,
        examples=2,
    )
    return transfer.run(fill_demonstrations(given), tmp_path_factory.mktemp('persona'), quiet=True)


@pytest.fixture(scope='module')
def kind(tmp_path_factory):
    given = dict(
        weak='pico',
        strong='pico',
        seeds=2,
        n_labelled=24,
        n_unlabelled=32,
        n_test=12,
        speak=dict(samples=3, max_tokens=12),
        sft=dict(epochs=1),
        dpo=dict(epochs=1),
    )
    return toxicity.run(fill_toxicity(given), tmp_path_factory.mktemp('kind'), quiet=True)


RUNS = ('preferences', 'labels', 'demonstrations', 'kind')


def report_of(result): return report_text(result, page_of(result))


@pytest.fixture(params=RUNS)
def any_run(request): return request.param, request.getfixturevalue(request.param)


# Groups

def test_preferences_are_clustered_when_intervals_are_made_and_not_before(preferences):
    "Items are of rows, as they were; intervals, differences and wins of the people or prompts that rows are about"
    groups = row_groups(preferences.test)
    n = len(set(groups.values()))
    assert n < len(groups) == 150 and set(preferences.items['id']) == set(groups) and list(preferences.items) == ITEM_COLUMNS
    assert set(preferences.intervals.n) == {n} and set(preferences.differences.n) == {n}
    means = preferences.items.groupby(['role', 'method', 'metric']).value.mean()
    for r in preferences.intervals.itertuples(): assert r.value == pytest.approx(means[r.role, r.method, r.metric], abs=1e-9)


def test_what_belongs_together_is_no_news(preferences):
    "Each test row three times under the same group: the same intervals. Left ungrouped they would shrink"
    items = preferences.items[(preferences.items.metric == 'accuracy') & (preferences.items.seed == 0)] # one seed: the rows alone
    groups = row_groups(preferences.test)
    thrice = pd.concat([items.assign(id=items['id'] + f' {k}') for k in range(3)])
    more = {f'{i} {k}': g for i, g in groups.items() for k in range(3)}
    one, same, wrong = (interval_table(t) for t in (by_group(items, groups), by_group(thrice, more), thrice))
    for column in ('value', 'low', 'high'): assert np.allclose(one[column], same[column])
    assert ((wrong.high - wrong.low) < .8*(one.high - one.low)).all()


def test_wins_know_groups_and_seeds(preferences):
    "Both limits of a win rate and of the one at equal length: wider where rows belong together, and where the two seeds disagree"
    pairs, groups = [(('student', 'dpo weak'), ('baseline', 'sft human'))], row_groups(preferences.test)
    def width(t, what): return float(t[f'{what}high'].iloc[0] - t[f'{what}low'].iloc[0])
    grouped = win_table(preferences.responses, pairs, groups)
    said = preferences.responses
    flip = said.assign(gold_reward=np.where((said.seed == 1) & (said.role == 'student'), said.gold_reward + 3., said.gold_reward))
    for what in ('', 'equal_'): assert width(win_table(flip, pairs, groups), what) > 1.2*width(grouped, what), what
    twice = pd.concat([said, said.assign(id=said['id'] + 'x')])
    both = groups | {f'{i}x': g for i, g in groups.items()}
    assert width(win_table(twice, pairs, both), '') == pytest.approx(width(grouped, ''), rel=1e-6)


def test_labels_agree_over_groups(preferences):
    t = preferences.labels
    assert (t.low < t.agreement).all() and (t.agreement < t.high).all() and len(t) == 2


# Differences

def test_every_difference_says_how_sure_it_is_and_what_could_be_seen(any_run):
    name, result = any_run
    d = result.differences
    assert len(d) and COLUMNS <= set(d), COLUMNS - set(d)
    assert (d.significant == (d.p_holm <= .05 + 1e-12)).all() and (d.p_holm >= d.p - 1e-12).all()
    known = d.value.notna() & d.low.notna() & (d.low < d.high)
    assert (d[known & d.significant].low * d[known & d.significant].high >= 0).all(), (
        'a significant difference has zero outside its raw interval'
    )
    assert (d.detectable.dropna() > 0).all() and d.detectable.notna().any()


def test_several_methods_against_one_baseline_are_a_family(labels):
    "Two methods: the smaller p counts twice, as by Holm; the raw intervals stay"
    of = labels.differences[(labels.differences.metric == 'accuracy') & labels.differences.a.str.startswith('student')]
    for _, part in of.groupby('b'):
        if part.a.nunique() < 2: continue
        assert set(part.family) >= {2} and np.allclose(part.p_holm, holm(part.p))


def test_values_of_a_variation_are_a_family(preferences):
    "The same comparison at three values: three chances"
    varied = Varied(preferences.folder, 'beta', {v: preferences for v in ('0.1', '1', '3')})
    one, three = preferences.differences, varied.differences
    for r in one[one.family == 1].itertuples():
        found = three[(three.a == r.a) & (three.b == r.b) & (three.metric == r.metric)]
        assert set(found.family) == {3} and np.allclose(found.p_holm, min(1., 3*r.p)) and np.allclose(found.low, r.low)
    assert len(varied.pgr) == 3*len(preferences.pgr)


# Reports

def test_a_report_begins_with_the_gap_that_is_recovered(any_run):
    "A number with its interval, or why there is none; before any other table"
    name, result = any_run
    text = report_of(result)
    assert 'PGR' in text or 'erformance gap recovered' in text
    at = min(i for i in (text.find('PGR'), text.find('gap recovered'), text.find('Gap recovered')) if i >= 0)
    assert at < text.index('| ---'), name


def test_a_report_says_clear_or_what_could_have_been_seen(any_run):
    name, result = any_run
    text = report_of(result)
    for column in ('significant', 'detectable', 'verdict'): assert f'| {column} ' in text, column
    if (~result.differences.significant).any(): assert 'no significant difference' in text
    else: assert 'higher' in text or 'lower' in text


def test_the_gap_is_in_a_file(any_run):
    "With the reason where it is refused"
    _, result = any_run
    write(result)
    table = pd.read_parquet(result.folder/'pgr.parquet')
    assert len(table) and {'metric', 'value', 'low', 'high', 'refused', 'note'} <= set(table)
    for r in table.itertuples(): assert (r.refused != '') == np.isnan(r.value)


def test_two_seeds_are_said_to_be_few(any_run):
    name, result = any_run
    seeds = int(result.intervals.seeds.max())
    assert ('too few to know' if seeds == 2 else 'one seed' if seeds == 1 else '') in report_of(result)


# One result, one report, whatever the feedback

HEADINGS = ['PGR', 'Differences', 'Arms', 'Weak feedback', 'Error inheritance', 'Data report', 'Training', 'Settings', 'How it was made']
SHARED = {f'{t}.parquet' for t in ('items', 'results', 'intervals', 'differences', 'pgr', 'histories', 'arms', 'labels')} | {
    'report.md',
    'report.html',
    'results.tex',
    'figure.pdf',
    'training.pdf',
    'config.toml',
    'versions.json',
    'data_report.md',
    'data_report.csv',
    'figure.png',
    'figure.svg',
    'training.png',
    'training.svg',
    'adapters',
    'manifest.json',
}


def headings(text): return [line[3:] for line in text.splitlines() if line.startswith('## ')]


def test_the_gap_is_the_first_thing_that_is_said(any_run):
    "In the console, in a notebook and in the report: PGR with its interval, or why there is none, and one table"
    _, result = any_run
    assert type(result) is Result
    first = pgr_text(result).splitlines()[0]
    assert first.startswith('- PGR') and ('[' in first or 'since' in first)
    assert repr(result).startswith(first) and str(result).startswith(first)
    html = result._repr_html_()
    answer = html.partition('<section><h4>Answer</h4>')[2].partition('</section>')[0]
    assert answer.startswith('<p>PGR') and answer.count('<table') == 1
    assert headings(report_of(result))[0] == 'PGR' and report_of(result).index('PGR') < report_of(result).index('|')


def test_a_reason_stands_where_a_gap_cannot_be_found(any_run):
    "Without the ceiling, and without the floor: no number is made up, and the first line says what is missing"
    from w2s.compare.tables import recover_gaps
    _, result = any_run
    for role in ('ceiling', 'floor'):
        items = result.items[result.items.role != role]
        lost = replace(result, items=items, pgr=recover_gaps(items, result.kind))
        assert lost.pgr.empty and repr(lost).splitlines()[0].startswith('- PGR: none, since ')


def test_columns_are_the_same_for_every_kind(any_run):
    _, result = any_run
    for table in (result.items, result.table, result.intervals, result.arms, result.curves): assert set(WHO) <= set(table)
    assert list(result.differences) == DIFFERENCES and list(result.pgr) == GAPS
    assert list(show_table(result))[:4] == WHO
    assert set(result.table.role) >= {'baseline', 'floor', 'student', 'ceiling'} and 'base' not in set(result.table.role)


def test_significant_is_what_holm_says_of_the_p_values(any_run):
    "Of every question: the same pair of roles, students of all methods together"
    _, result = any_run
    d = result.differences
    def question(name): return 'student' if name.startswith('student') else name
    for _, part in d.assign(x=d.a.map(question), y=d.b.map(question)).groupby(['metric', 'x', 'y']):
        assert np.allclose(part.p_holm, holm(part.p), equal_nan=True) and set(part.family) == {len(part)}
        assert list(part.significant) == [bool(p <= .05) for p in holm(part.p)]
    assert d.a.str.split().str[0].isin(('student', 'human', 'floor', 'ceiling')).all() and not d.a.str.contains(r'\(').any()


def test_an_arm_without_weak_feedback_has_no_weak_model(any_run):
    _, result = any_run
    for table in (result.items, result.intervals, result.arms):
        for role in ('ceiling', 'human'): assert set(table[table.role == role].weak) <= {''}, role
        assert set(table[table.method == 'untuned'].weak) <= {''} and set(table[table.method == 'sft human'].weak) <= {''}
        assert '' not in set(table[table.role == 'floor'].weak) and set(table[table.role == 'floor'].strong) == {''}
        assert '' not in set(table[(table.role == 'student') & (table.method != 'own answers')].weak)


def test_every_training_has_its_curve(any_run):
    "One curve for each stage that trained an adapter: none is missing, none stands twice"
    name, result = any_run
    stages = [f.parent for f in (result.folder/'stages').glob('*/history.csv')]
    c = result.curves
    found = c.drop_duplicates(['role', 'method', 'weak', 'strong', 'seed', 'stage'])
    assert len(found) == len(stages) and not c.duplicated(['role', 'method', 'weak', 'strong', 'seed', 'stage', 'step']).any()
    firsts = c.groupby(['role', 'method', 'weak', 'strong', 'seed', 'stage'], sort=False).loss.first()
    assert set(firsts.round(9)) == {round(float(pd.read_csv(s/'history.csv').loss.iloc[0]), 9) for s in stages}
    assert set(found.seed) == set(result.items.seed)


def test_files_are_the_same_for_every_kind(any_run, tmp_path):
    "What all have, then the tables of this kind; the adapters have the names of the table of arms"
    _, result = any_run
    folder = write(result, tmp_path/'out')
    there = {p.name for p in folder.iterdir() if not p.name.startswith('.')}
    assert there >= SHARED, SHARED - there
    own = {f'{name}.parquet' for name, t in result.extra.items() if isinstance(t, pd.DataFrame) and len(t)}
    assert {n for n in there if n.endswith('.parquet')} == own | {n for n in SHARED if n.endswith('.parquet')}
    assert {p.name for p in (folder/'adapters').iterdir()} == set(pd.read_parquet(folder/'arms.parquet').adapter) - {''}
    assert (
        all(name.endswith(tuple(f'-seed{s}' for s in range(9))) for name in result.adapters)
        and json.loads((folder / 'versions.json').read_text())['w2s']
    )


def test_headings_are_the_same_for_every_kind(any_run):
    "In the same order; what one kind has beside them stands behind the arms"
    _, result = any_run
    found = headings(report_of(result))
    assert [h for h in found if h in HEADINGS] == HEADINGS
    assert all(found.index('Arms') < found.index(h) < found.index('Weak feedback') or h == 'Incomplete' for h in found if h not in HEADINGS)


def test_a_report_is_text_and_nothing_else(any_run):
    "Names and sentences of a user cannot become headings, tables, links or HTML"
    _, result = any_run
    evil = '<script>x</script>\n# Not a heading | [a](b)'
    notes, origin = replace(result, notes=(evil,)), replace(result, origin=evil, models=(evil,))
    for page in (report_of(notes), report_of(origin)):
        assert not re.search(r'(?<!\\)<script>|^# Not|(?<!\\)\[a\]\(b\)', page, re.M)
    assert headings(report_of(notes))[1] == 'Incomplete' and 'incomplete' in repr(notes) and '<script>' not in notes._repr_html_()


def test_what_a_kind_has_beside_them_is_a_part_of_the_result(any_run):
    "An extra table is an attribute; an unknown name is refused with the nearest one"
    _, result = any_run
    for name, value in result.extra.items(): assert getattr(result, name) is value
    with pytest.raises(AttributeError, match='did you mean "labels"'): result.lables # noqa: B018
