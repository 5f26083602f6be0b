"""Prompts that blend, on every kind of stream: against hard switches to embeddings that torch interpolates."""

import threading
import time

import numpy as np
import pytest
import torch

from engine.runtime.streams import Cancelled

PROMPT, OTHER, THIRD = "a red circle moving right", "a blue square on gray", "teal"


def embedding(pipeline, seed):
    """An embedding of the pipeline's size that no text has."""
    shape = (1, pipeline.text_rows, pipeline.text_dim) if hasattr(pipeline, "text_dim") else None
    shape = shape or pipeline.encode_prompt(PROMPT).shape
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 3


@pytest.fixture(scope="module")
def ends(any_pipeline):
    return [embedding(any_pipeline, seed) for seed in (1, 2, 3)]


def told(pipeline, first, count, switches, cancels=False, ahead=False):
    """The chunks of a stream; `switches`: the arguments of set_prompt before a chunk, by its number."""
    made = []
    with pipeline.stream(first, seed=3) as stream:
        stream.looks_ahead = ahead
        for number in range(count):
            for arguments in switches.get(number, ()):
                stream.set_prompt(**arguments)
            if cancels:
                stream.cancel()
                with pytest.raises(Cancelled):
                    stream.next_chunk()
            made.append((stream.next_chunk(), stream.serial.prompt))
    return made


def same(got, expected):
    wrong = [at for at, (a, b) in enumerate(zip(got, expected, strict=True)) if not np.array_equal(a[0], b[0])]
    assert not wrong, wrong


def by_hand(start, target, at, steps, recommit=True):
    """Hard switches to the blends of a transition, the last one to the target itself."""
    on_the_way = [torch.lerp(start, target, step / steps) for step in range(1, max(steps, 1))]
    return {at + k: [{"prompt": one, "recommit": recommit}] for k, one in enumerate([*on_the_way, target])}


@pytest.mark.parametrize("recommit", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 2, 5])
@pytest.mark.parametrize("at", [0, 4])
def test_a_transition_is_a_row_of_switches(any_pipeline, ends, recommit, steps, at):
    first, target, _ = ends
    asked = {at: [{"prompt": target, "recommit": recommit, "transition": steps}]}
    got = told(any_pipeline, first, at + 7, asked)
    same(got, told(any_pipeline, first, at + 7, by_hand(first, target, at, steps, recommit)))
    assert [number for _, number in got] == [0] * at + [1] * 7
    plain, hard = (told(any_pipeline, first, at + 7, switches) for switches in ({}, by_hand(first, target, at, 0)))
    same(got[:at], plain[:at])
    assert not np.array_equal(got[at][0], plain[at][0])
    assert steps < 2 or not np.array_equal(got[at][0], hard[at][0])


def test_a_new_prompt_begins_at_the_blend_that_acts(any_pipeline, ends):
    first, second, third = ends
    asked = {2: [{"prompt": second, "transition": 4}], 4: [{"prompt": third, "transition": 3}], 8: [{"prompt": first}]}
    half = torch.lerp(first, second, 0.5)
    hands = {**by_hand(first, second, 2, 4), **by_hand(half, third, 4, 3), 8: [{"prompt": first}]}
    same(told(any_pipeline, first, 10, asked), told(any_pipeline, first, 10, hands))


def test_of_several_prompts_before_a_chunk_the_last_one_counts(any_pipeline, ends):
    """And it begins at what acts, not at one that no chunk shows."""
    first, second, third = ends
    asked = [{"prompt": second}, {"prompt": second, "transition": 7}, {"prompt": third, "transition": 2}]
    got = told(any_pipeline, first, 6, {2: asked})
    same(got, told(any_pipeline, first, 6, by_hand(first, third, 2, 2)))
    assert [number for _, number in got] == [0, 0, 3, 3, 3, 3]


def test_calls_that_are_cancelled_repeat_the_blend(any_pipeline, ends):
    first, second, third = ends
    asked = {1: [{"prompt": second, "transition": 4}], 3: [{"prompt": third, "transition": 3, "recommit": False}]}
    same(told(any_pipeline, first, 8, asked, cancels=True), told(any_pipeline, first, 8, asked))


def test_a_prompt_after_a_call_that_was_cancelled_begins_at_the_last_chunk(any_pipeline, ends):
    first, second, third = ends
    with any_pipeline.stream(first, seed=3) as stream:
        got = [(stream.next_chunk(), 0)]
        stream.set_prompt(second, transition=3)
        got.append((stream.next_chunk(), 0))
        stream.cancel()
        with pytest.raises(Cancelled):
            stream.next_chunk()  # it would have stood at 2/3
        stream.set_prompt(third, transition=2)
        got += [(stream.next_chunk(), 0) for _ in range(4)]
    start = torch.lerp(first, second, 1 / 3)
    hands = {1: [{"prompt": start}], 2: [{"prompt": torch.lerp(start, third, 0.5)}], 3: [{"prompt": third}]}
    same(got, told(any_pipeline, first, 6, hands))


def test_a_flush_ends_a_transition(any_pipeline, ends):
    """The target acts at once, and a transition after that begins there."""
    first, second, third = ends
    for made in (0, 1, 3):
        with any_pipeline.stream(first, seed=3) as stream:
            stream.next_chunk()
            stream.set_prompt(second, transition=4)
            for _ in range(made):
                stream.next_chunk()
            stream.flush()
            got = [(stream.next_chunk(), stream.serial.prompt) for _ in range(3)]
            stream.flush()
            stream.set_prompt(third, transition=2)
            later = [(stream.next_chunk(), stream.serial.prompt) for _ in range(3)]
        same(got, told(any_pipeline, second, 3, {}))
        same(later, told(any_pipeline, second, 3, by_hand(second, third, 0, 2)))
        assert [number for _, number in got + later] == [1, 1, 1, 2, 2, 2]


def test_a_prompt_that_is_refused_leaves_the_transition(any_pipeline, ends):
    first, second, _ = ends
    asked = {1: [{"prompt": second, "transition": 4}]}
    with any_pipeline.stream(first, seed=3) as stream:
        got = [(stream.next_chunk(), 0)]
        stream.set_prompt(second, transition=4)
        for _ in range(5):
            with pytest.raises(ValueError, match=r"^prompt: got "):
                stream.set_prompt("", transition=2)
            got.append((stream.next_chunk(), 0))
    same(got, told(any_pipeline, first, 6, asked))


def test_texts_blend_as_their_embeddings(any_pipeline, kind):
    asked = {2: [{"prompt": OTHER, "transition": 3}], 7: [{"prompt": ((THIRD, 3), (PROMPT, 1)), "transition": 2}]}
    got = told(any_pipeline, PROMPT, 11, asked)
    if kind == "native":
        import fake_stages

        from engine.config import Preset

        python = fake_stages.fake_pipeline(Preset("greedy", shift=2.0, solver="euler", max_position=4))
        for (mine, number), (theirs, other) in zip(got, told(python, PROMPT, 11, asked), strict=True):
            assert np.abs(mine.astype(int) - theirs).max() <= 1
            assert number == other
        return
    red, blue, teal = map(any_pipeline.encode_prompt, (PROMPT, OTHER, THIRD))
    mixed = teal * 0.75 + red * 0.25
    same(got, told(any_pipeline, PROMPT, 11, {**by_hand(red, blue, 2, 3), **by_hand(blue, mixed, 7, 2)}))


def test_one_weighted_text_is_the_text(any_pipeline):
    expected = told(any_pipeline, PROMPT, 5, {2: [{"prompt": OTHER}]})
    for weight in (1.0, 1, 0.3, 1e-300):
        got = told(any_pipeline, [(PROMPT, weight)], 5, {2: [{"prompt": [[OTHER, weight]]}]})
        same(got, expected)


def test_weights_count_by_their_share(any_pipeline):
    first = told(any_pipeline, [(PROMPT, 3.0), (OTHER, 1.0)], 4, {})
    same(told(any_pipeline, [(PROMPT, 0.75), (OTHER, 0.25)], 4, {}), first)
    for other in ([(PROMPT, 1.0), (OTHER, 3.0)], PROMPT, OTHER):
        assert not np.array_equal(told(any_pipeline, other, 1, {})[0][0], first[0][0])


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        *[({"prompt": [(PROMPT, 1.0), (OTHER, weight)]}, r"prompt: got weights \[1.0, .*\], expected them above 0, and")
          for weight in (0, -1.0, NAN, INFINITE, -INFINITE)],
        ({"prompt": [(PROMPT, 1e308), (OTHER, 1e308)]}, "prompt: got weights .* and a finite sum"),
        *[({"prompt": words}, "prompt: got .*, expected a text, an embedding, or pairs of a text and a weight")
          for words in ([], [PROMPT], [(PROMPT,)], [(PROMPT, "1")], [(PROMPT, 10**400)], [(1.0, PROMPT)], 5, None)],
        ({"prompt": [(PROMPT, 1.0), ("", 1.0)]}, "prompt: got an empty text, expected words"),
        *[({"prompt": OTHER, "transition": steps}, "transition: got .*, expected 0 to 1048576 chunks")
          for steps in (-1, 1.5, NAN, "3", True, 2**20 + 1, 2**64)],
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_blend_is_refused(any_pipeline, asked, said):
    with any_pipeline.stream(PROMPT, seed=3) as stream:
        with pytest.raises(ValueError, match=f"^{said}"):
            stream.set_prompt(**asked)
        assert stream.set_prompt(OTHER) == 1
    if "transition" not in asked:
        with pytest.raises(ValueError, match=f"^{said}"):
            any_pipeline.stream(asked["prompt"])


def test_embeddings_of_other_rows_do_not_blend(any_pipeline, ends, kind):
    if kind != "torch":
        pytest.skip("a bundle's graphs take one number of rows")
    first = ends[0]
    with any_pipeline.stream(first, seed=3) as stream:
        stream.next_chunk()
        with pytest.raises(ValueError, match=r"^transition: got an embedding \[1, 3, .* after one .*, expected"):
            stream.set_prompt(first[:, :3], transition=2)
        assert stream.set_prompt(first[:, :3]) == 1
        stream.next_chunk()
        with pytest.raises(ValueError, match="transition: got an embedding"):
            stream.set_prompt(first, transition=2)
        stream.next_chunk()


@pytest.mark.parametrize("recommit", [True, False])
def test_a_stream_that_looks_ahead_blends_the_same(any_pipeline, ends, kind, recommit):
    """What was made ahead has the old blend; with recommit a new prompt makes it again."""
    if kind == "native":
        pytest.skip("the core makes a chunk when it is asked for")
    first, second, third = ends
    asked = {2: [{"prompt": second, "recommit": recommit, "transition": 4}]}
    asked |= {4: [{"prompt": third, "transition": 3}]} if recommit else {}
    if not recommit:  # the switch itself finds the last chunk committed under the old prompt
        asked = {0: asked[2]}
    same(told(any_pipeline, first, 9, asked, ahead=True), told(any_pipeline, first, 9, asked))


def test_any_thread_may_ask_at_any_time(any_pipeline):
    stream, over, numbers = any_pipeline.stream(PROMPT, seed=3), threading.Event(), []

    def ask():
        while not over.is_set():
            numbers.append(stream.set_prompt((PROMPT, OTHER, THIRD)[len(numbers) % 3], transition=len(numbers) % 5))
            time.sleep(2e-3)

    thread, shown = threading.Thread(target=ask), []
    thread.start()
    try:
        while thread.is_alive() and not numbers:
            time.sleep(1e-3)
        for _ in range(20):
            stream.next_chunk()
            shown.append(stream.serial.prompt)
    finally:
        over.set()
        thread.join()
    assert shown == sorted(shown)
    stream.flush()
    last = (PROMPT, OTHER, THIRD)[(len(numbers) - 1) % 3]
    same([(stream.next_chunk(), 0) for _ in range(3)], told(any_pipeline, last, 3, {}))
    assert stream.serial.prompt == numbers[-1]
