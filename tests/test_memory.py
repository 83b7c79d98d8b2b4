"Peak memory of a DPO step: response tokens × width, and a constant; not the vocabulary"
import sys
from pathlib import Path

from w2s.train import logprobs

sys.path.insert(0, str(Path(__file__).parents[1]/'benchmarks'))
from memory_vocabulary import measure

HIDDEN, SMALL, LARGE = 64, 2048, 131072


def bound(tokens):
    """32 numbers of the width a token (layers, adapter, hidden states), four tables of a piece of logits, and the piece of the head in 32
    bits"""
    return 4*(32*HIDDEN*tokens + 4*logprobs.CELLS + 4*logprobs.PIECE*HIDDEN)


def test_a_step_grows_with_tokens_and_not_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(logprobs, 'CELLS', 2**18) # a small constant, so that nothing hides behind it
    monkeypatch.setattr(logprobs, 'PIECE', 1024) # so that both vocabularies go the same way, in pieces
    peak = {(v, t): measure(v, t, HIDDEN) for v in (SMALL, LARGE) for t in (256, 1024)}
    for (v, t), most in peak.items(): assert most < bound(t), (v, t)
    slopes = [peak[v, 1024] - peak[v, 256] for v in (SMALL, LARGE)]
    assert .6 < slopes[0]/slopes[1] < 1.6 and slopes[1] > 0
    assert peak[LARGE, 1024] < 1.5*peak[SMALL, 1024]


def test_a_table_of_logits_breaks_the_bound(monkeypatch):
    "The mutation: the same step with the logits of every position"
    monkeypatch.setattr(logprobs, 'CELLS', 2**18)
    few, many = (measure(v, 256, HIDDEN, naive=True) for v in (SMALL, LARGE))
    assert many > 10*bound(256) and many > 30*few


def test_beyond_a_piece_the_vocabulary_is_for_free():
    "As the package is set"
    assert abs(measure(16384, 256, HIDDEN) / measure(LARGE, 256, HIDDEN) - 1) < .02


def test_the_constant_is_small():
    "As the package is set: 64 times the vocabulary costs less than twice the memory"
    assert measure(LARGE, 1024, HIDDEN) < 2*measure(SMALL, 1024, HIDDEN)
