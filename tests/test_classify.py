"""A comparison by labels does not see what it must not see (pitfall 18), and gives everybody the same rows."""
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from w2s.compare import label_arms as class_arms
from w2s.compare import label_data as class_data
from w2s.compare.label_settings import fill_labels
from w2s.errors import ConfigError
from w2s.experiments import labels as classify
from w2s.models.adapters import adapter_hash

GIVEN = dict(
    weak='pico',
    strong='micro',
    seeds=1,
    n_labelled=40,
    n_unlabelled=100,
    n_test=60,
    methods='xent,confidence',
    snapshots=2,
    validate=0.25,
    via='pico',
)


@pytest.fixture(scope='module')
def result(tmp_path_factory):
    return classify.run(fill_labels(GIVEN), tmp_path_factory.mktemp('classify'), quiet=True)


def hashes(r): return {k: adapter_hash(v) for k, v in r.adapters.items()}


def turned(rows):
    "The same rows with the opposite gold labels"
    labels, probs = [1 - x for x in rows['label']], [p[::-1] for p in rows['probs']]
    return rows.remove_columns(['label', 'probs']).add_column('label', labels).add_column('probs', probs)


def test_gold_labels_of_the_students_rows_reach_the_ceiling_only(result, tmp_path, monkeypatch):
    real = class_data.label_halves
    def wrong(config, data, seed):
        labelled, unlabelled = real(config, data, seed)
        return labelled, turned(unlabelled)
    monkeypatch.setattr(class_arms, 'label_halves', wrong)
    other = hashes(classify.run(fill_labels(GIVEN | dict(baseline=False)), tmp_path, quiet=True))
    same = {k for k, v in hashes(result).items() if other[k] == v}
    assert set(other) - same == {k for k in other if k.startswith('ceiling')}
    assert any(k.startswith('student') for k in same) and any(k.startswith('floor') for k in same)


def test_gold_labels_of_the_test_rows_change_no_model_and_no_choice(result, tmp_path, monkeypatch):
    real = classify.load_labels
    def wrong(config, readers):
        data = real(config, readers)
        return replace(data, test=turned(data.test))
    monkeypatch.setattr(classify, 'load_labels', wrong)
    other = classify.run(fill_labels(GIVEN), tmp_path, quiet=True)
    assert hashes(other) == hashes(result)
    assert other.stops.step.tolist() == result.stops.step.tolist()
    p = [c for c in result.predictions if c.startswith('p')]
    pd.testing.assert_frame_equal(other.predictions[p], result.predictions[p])
    of = {r.method: r.value for r in other.intervals[(other.intervals.metric == 'accuracy')].itertuples()}
    for r in result.intervals[(result.intervals.metric == 'accuracy')].itertuples(): assert of[r.method] == pytest.approx(1 - r.value)


def test_everybody_is_asked_about_the_same_rows(result):
    ids = result.predictions.groupby(['role', 'method', 'weak', 'strong', 'seed'])['id'].agg(tuple)
    assert ids.nunique() == 1 and len(ids.iloc[0]) == 60


def test_nobody_labels_what_it_learned_from(result):
    config = fill_labels(GIVEN)
    for seed in range(3):
        part = class_arms.part_rows(config, class_data.world_labels(config), seed)
        groups = [set(d['group']) for d in (part.labelled, part.unlabelled, part.extra['held'], part.test)]
        assert all(not a & b for i, a in enumerate(groups) for b in groups[i + 1:])


def test_scores_of_groups_have_the_mean_of_the_rows(result):
    p = result.predictions
    right = (p[['p0', 'p1']].to_numpy().argmax(1) == p.label).groupby([p.role, p.method]).mean()
    shown = result.intervals[result.intervals.metric == 'accuracy'].set_index(['role', 'method'])['value']
    np.testing.assert_allclose(shown.loc[right.index].to_numpy(), right.to_numpy(), atol=1e-9)


def test_what_cannot_act_is_refused(tmp_path):
    with pytest.raises(ConfigError, match='nobody teaches pico'):
        classify.run(fill_labels(dict(weak='micro', strong='pico')), tmp_path / 'x', quiet=True)
    assert not (tmp_path/'x').exists()
