"""One call at a time in an object that threads share, also where calls end without giving their turn back."""

import random
import sys
import threading
import time

import pytest

from engine.runtime.handover import Turns

SECONDS = 2.0


def deep(levels):
    """Frames that come and go, as in a chunk that is made."""
    return deep(levels - 1) + 1 if levels else 0


@pytest.mark.parametrize("left", [0.0, 0.5], ids=["given back", "half of them left"])
def test_turns_exclude_each_other(left):
    turns, inside, most, counts = Turns(), [], [], {"had": 0, "refused": 0}

    def call(draw):
        frame = sys._getframe()
        turns.take(frame)
        inside.append(frame)
        for _ in range(20):
            deep(8)
        most.append(len(inside))
        inside.remove(frame)
        if draw.random() >= left:  # else as if an interrupt had come
            turns.give_back(frame)

    def keep_on(seed):
        draw, until = random.Random(seed), time.monotonic() + SECONDS
        while time.monotonic() < until:
            try:
                call(draw)
                counts["had"] += 1
            except ValueError:
                counts["refused"] += 1

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # so that calls overlap
    try:
        threads = [threading.Thread(target=keep_on, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert counts["had"] > 100
    assert counts["refused"] > 0
    assert max(most) == 1
    assert turns.free


def test_a_turn_ends_with_its_call():
    turns = Turns()

    def left():
        turns.take(sys._getframe())
        assert not turns.free
        with pytest.raises(ValueError, match="while another one runs"), turns:
            pass

    left()
    assert turns.free
    with turns:
        assert not turns.free
        other = threading.Thread(target=lambda: refused.append(turns.free))
        refused = []
        other.start()
        other.join()
        assert refused == [False]
    assert turns.free
