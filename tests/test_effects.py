"Effects in small: who is in which part, what is in a context, the same test for all arms and seeds, and nothing done twice"
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from w2s.errors import ConfigError, DataError
from w2s.evaluate.intervals import interval_table
from w2s.compare.effects import EFFECTS, context_prompts, run_effect, spoken_pairs
from w2s.compare.lab import Effects, parts
from w2s.train.loop import TrainSettings
from w2s.world.facts import make_world
from w2s.world.personas import questions
from w2s.world.scenes import scene_questions, toxicity_verdict

SHORT = TrainSettings(epochs=1, batch_size=8, learning_rate=1e-3)
SMALL = Effects(voice_gold=8, voice_asked=16, voice_test=6, context=2, label_gold=8, rule_gold=8, label_asked=8, label_test=10, scene_gold=16, scene_asked=16, scene_test=4,
                samples=3, voice=SHORT, label=SHORT, scene=SHORT, dpo=SHORT)


def names(items) -> set[str]: return {x.name for x in items}


def test_parts_share_nobody_and_nothing():
    world = make_world()
    real, trial = [parts(world, seed) for seed in (0, 1)], [parts(world, seed, trial=True) for seed in (100, 101)]
    for found in (*real, *trial):
        for kind in ('people', 'things'):
            sets = [names(getattr(part, kind)) for part in found.values()]
            assert all(len(s) > 20 for s in sets)
            assert not any(a & b for i, a in enumerate(sets) for b in sets[:i])
    for kind in ('people', 'things'):
        assert getattr(real[0]['test'], kind) == getattr(real[1]['test'], kind), 'the test is the same for all seeds'
        assert getattr(real[0]['labelled'], kind) != getattr(real[1]['labelled'], kind), 'the rest is not'
        used = set().union(*(names(getattr(part, kind)) for found in trial for part in found.values()))
        assert not used & names(getattr(real[0]['test'], kind)), 'a trial sees nobody and nothing of the real test'


def test_no_row_sees_its_own_answer():
    asked = questions(make_world(), 60, 3, people=make_world().people[:15])
    answers = [f' answer {i}.' for i in range(60)]
    prompts = context_prompts(asked, asked, answers, 5, 0)
    for q, prompt in zip(asked, prompts, strict=True):
        assert prompt.endswith(q['prompt']) and prompt.count('Q:') == 6 and prompt.count(' answer ') == 5
        assert prompt.count(q['name']) == 1, 'nor any answer about the same person'
    shown = [re.findall(r'answer (\d+)', p) for p in prompts]
    assert all(len(set(s)) == 5 for s in shown) and len({tuple(s) for s in shown}) == 60
    assert prompts == context_prompts(asked, asked, answers, 5, 0) != context_prompts(asked, asked, answers, 5, 1)
    with pytest.raises(DataError, match='ask more'): context_prompts(asked[:1], asked[:1], answers[:1], 1, 0)


def test_a_human_chooses_the_kinder_line_as_often_as_stated():
    scenes = scene_questions(make_world(), 2000, 0)
    said = [(' You worm!', ' Never mind.') if i % 2 else (' So it goes.', ' Go away, you toad!') for i in range(1990)] + [(' Same.', ' Same.')]*10
    rows = spoken_pairs(scenes, said, .72, 0)
    assert len(rows) == 1990
    assert abs(np.mean(rows['gold']) - .72) < .04
    assert all((toxicity_verdict(c).score < toxicity_verdict(r).score) == bool(g) for c, r, g in zip(rows['chosen'], rows['rejected'], rows['gold'], strict=True))


@pytest.mark.parametrize('effect', ['voice', 'storage', 'scenes'])
def test_one_test_for_all_and_nothing_twice(effect: str, tmp_path: Path):
    said: list[str] = []
    def both() -> pd.DataFrame:
        return pd.concat([run_effect(effect, 'pico', 'pico', seed, tmp_path, SMALL, said.append) for seed in (0, 1)], ignore_index=True)
    items = both()
    assert said[0].endswith('starting') # later, the un-tuned model's answers are found: they are the same for both seeds
    rows = items[items['id'] != 'all']
    for _, arms in rows.groupby('metric'):
        assert len({tuple(sorted(ids)) for _, ids in arms.groupby(['role', 'method', 'weak', 'seed'])['id']}) == 1
    assert rows['value'].between(0, 1).all() and len(set(zip(rows['role'], rows['method'], strict=True))) >= 5
    assert interval_table(items)['seeds'].eq(2).all()
    said.clear()
    again = both()
    assert {line.split(': ')[1] for line in said} == {'found'}
    pd.testing.assert_frame_equal(items, again)


def test_a_changed_setting_is_another_result(tmp_path: Path):
    said: list[str] = []
    run_effect('storage', 'pico', 'pico', 0, tmp_path, SMALL, said.append)
    said.clear()
    run_effect('storage', 'pico', 'pico', 0, tmp_path, replace(SMALL, label_asked=9), said.append)
    by = {line.split(': ')[0]: line.split(': ')[1] for line in said}
    assert by['storage-weak'] == by['storage-base-untuned-test'] == 'found'
    assert by['storage-weak-labels'] == by['storage-ceiling-xent'] == 'starting'


def test_wrong_names(tmp_path: Path):
    with pytest.raises(ConfigError, match='effect "voices".*voice'): run_effect('voices', 'pico', 'pico', 0, tmp_path)
    assert EFFECTS == ('voice', 'safety', 'legal', 'storage', 'scenes')
