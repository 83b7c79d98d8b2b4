"Parts of a world share nobody and nothing, and the human of the world errs as often as is stated"
import numpy as np

from w2s.compare.toxicity_data import spoken_pairs
from w2s.world.facts import make_world
from w2s.world.parts import parts
from w2s.world.scenes import scene_questions, toxicity_verdict

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


def test_a_human_chooses_the_kinder_line_as_often_as_stated():
    scenes = [dict(s, group=s['speaker']) for s in scene_questions(make_world(), 2000, 0)]
    said = [(' You worm!', ' Never mind.') if i % 2 else (' So it goes.', ' Go away, you toad!') for i in range(1990)] + [
        (' Same.', ' Same.')
    ] * 10
    rows = spoken_pairs(scenes, said, .72, 0)
    assert len(rows) == 1990
    assert abs(np.mean(rows['gold']) - .72) < .04
    assert all(
        (toxicity_verdict(c).score < toxicity_verdict(r).score) == bool(g)
        for c, r, g in zip(rows['chosen'], rows['rejected'], rows['gold'], strict=True)
    )
