"""The seeded noise: words of Philox4x64-10 from its definition, Box-Muller from the math module."""

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from engine.sampling.noise import DrawnAhead, PhiloxNoise, ReplayNoise

WORD = 2**64 - 1
M = 0xD2E7470EE14C6C93, 0xCA5A826395121157
W = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B


def philox(counter, key):
    """Philox4x64-10 (Salmon et al., 2011) in integers: four words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = M[0] * c[0], M[1] * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second & WORD, first >> 64 ^ c[3] ^ k[1], first & WORD]
        k = [(k[0] + W[0]) & WORD, (k[1] + W[1]) & WORD]
    return c


def gaussians(seed, chunk, draw, size):
    """What PhiloxNoise says it draws, one number at a time."""
    words = [word for block in range(size // 4 + 1) for word in philox((block + 1, draw, chunk, 0), (seed, 0))]
    values = []
    for i in range(0, size, 2):
        u = [((word >> 11) + 1) / 2**53 for word in words[i : i + 2]]
        radius, angle = math.sqrt(-2 * math.log(u[0])), 2 * math.pi * u[1]
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:size]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0,) * 4, (0,) * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
        ((WORD,) * 4, (WORD,) * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_the_reference_gives_random123s_known_answers(counter, key, words):
    assert philox(counter, key) == [int(word, 16) for word in words.split()]


@pytest.mark.parametrize(
    ("seed", "chunk", "draw"), [(0, 0, 0), (1, 0, 3), (WORD, 2**40, 7), (2**63 + 12345, 2**32, 2**33)]
)
def test_values_are_the_definition(seed, chunk, draw):
    source = PhiloxNoise(seed)
    words = source._words(chunk, draw, 9)
    expected = [w for block in range(3) for w in philox((block + 1, draw, chunk, 0), (seed, 0))]
    assert words.tolist() == expected[:9]
    if draw < 100:
        got = source.draw(chunk, draw + 1, (3, 7))[draw].flatten().double().numpy()
        assert np.abs(got - np.array(gaussians(seed, chunk, draw, 21))).max() <= 3e-7  # one rounding to float32


def test_shape_only_cuts_the_sequence():
    source = PhiloxNoise(3)
    long = source.draw(2, 1, (1, 40)).flatten()
    assert torch.equal(source.draw(2, 1, (3, 5)).flatten(), long[:15])
    assert source.draw(2, 1, (3, 5)).dtype == torch.float32


def test_what_was_drawn_before_does_not_matter():
    used, fresh = PhiloxNoise(5), PhiloxNoise(5)
    for chunk in (9, 0, 4):
        used.draw(chunk, 3, (17,))
    assert torch.equal(used.draw(4, 2, (8, 3)), fresh.draw(4, 2, (8, 3)))
    assert torch.equal(used.draw(4, 1, (8, 3))[0], fresh.draw(4, 4, (8, 3))[0])


def test_chunks_draws_and_seeds_are_separate():
    rows = [PhiloxNoise(seed).draw(chunk, 3, (4096,)) for seed in (0, 1) for chunk in (0, 1, 2)]
    rows = torch.cat(rows).double()
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / 4096**0.5


def test_values_are_gaussian():
    x = PhiloxNoise(11).draw(0, 1, (1_000_001,)).double().flatten()
    assert abs(x.mean()) < 5e-3
    assert abs(x.std() - 1) < 5e-3
    assert abs((x**3).mean()) < 1.5e-2
    assert abs((x**4).mean() - 3) < 4e-2
    for at in (-2.0, -1.0, 0.0, 0.5, 1.5):
        below = 0.5 * (1 + math.erf(at / 2**0.5))
        assert abs((x < at).double().mean() - below) < 3e-3
    assert abs((x[:-1] * x[1:]).mean()) < 5e-3  # neighbours come from one pair of words
    assert x.isfinite().all()


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seeds_out_of_range_are_refused(seed):
    with pytest.raises(ValueError, match=r"got .*expected"):
        PhiloxNoise(seed)


def test_replay_gives_what_was_recorded_and_nothing_else():
    draws = {(0, 0): torch.randn(1, 2), (0, 1): torch.randn(1, 2), (2, 0): torch.randn(1, 2)}
    source = ReplayNoise(draws)
    assert torch.equal(source.draw(0, 2, (1, 2)), torch.stack([draws[0, 0], draws[0, 1]]))
    assert torch.equal(source.draw(2, 1, (1, 2))[0], draws[2, 0])
    for chunk, count, shape in ((1, 1, (1, 2)), (0, 3, (1, 2)), (0, 1, (2, 1))):
        with pytest.raises(ValueError, match=r"noise: got .*expected"):
            source.draw(chunk, count, shape)


class Watched:
    """Philox, and who asked for what on which thread; at most one thread at a time may use it."""

    def __init__(self, fails=()):
        self.source, self.fails, self.asked, self.busy = PhiloxNoise(3), fails, [], False

    def draw(self, chunk, count, shape):
        assert not self.busy
        self.busy = True
        try:
            time.sleep(0.01)
            self.asked.append((chunk, threading.current_thread().name))
            if chunk in self.fails:
                raise RuntimeError("out of entropy")
            return self.source.draw(chunk, count, shape)
        finally:
            self.busy = False


@pytest.fixture
def worker():
    with ThreadPoolExecutor(1, thread_name_prefix="noise") as pool:
        yield pool


def test_what_was_asked_for_ahead_is_drawn_once_and_equal(worker):
    watched, plain = Watched(), PhiloxNoise(3)
    ahead = DrawnAhead(watched, worker)
    for chunk in range(4):
        ahead.prepare(chunk, 2, (5, 3))
        ahead.prepare(chunk, 2, (5, 3))  # again: a chunk that is made again
        assert torch.equal(ahead.draw(chunk, 2, (5, 3)), plain.draw(chunk, 2, (5, 3)))
    assert [chunk for chunk, _ in watched.asked] == [0, 1, 2, 3]
    assert all(name.startswith("noise") for _, name in watched.asked)


def test_other_draws_than_those_asked_for_wait_for_the_worker(worker):
    watched, plain = Watched(), PhiloxNoise(3)
    ahead = DrawnAhead(watched, worker)
    ahead.prepare(5, 2, (5, 3))
    assert torch.equal(ahead.draw(4, 1, (2,)), plain.draw(4, 1, (2,)))
    assert torch.equal(ahead.draw(5, 2, (5, 3)), plain.draw(5, 2, (5, 3)))
    assert [chunk for chunk, _ in watched.asked] == [5, 4]  # what was prepared is kept
    ahead.prepare(6, 2, (5, 3))
    ahead.prepare(7, 2, (5, 3))  # replaces it
    assert torch.equal(ahead.draw(6, 2, (5, 3)), plain.draw(6, 2, (5, 3)))


def test_an_error_on_the_worker_belongs_to_the_call_that_wants_these_draws(worker):
    ahead = DrawnAhead(Watched(fails=(1,)), worker)
    ahead.prepare(1, 1, (2,))
    ahead.draw(0, 1, (2,))
    with pytest.raises(RuntimeError, match="out of entropy"):
        ahead.draw(1, 1, (2,))
    ahead.prepare(2, 1, (2,))
    ahead.draw(2, 1, (2,))


def test_a_worker_that_has_ended_is_no_failure():
    """As when the main thread has returned while another one streams."""
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    ahead = DrawnAhead(PhiloxNoise(3), pool)
    ahead.prepare(1, 1, (2,))
    assert torch.equal(ahead.draw(1, 1, (2,)), PhiloxNoise(3).draw(1, 1, (2,)))


@pytest.mark.parametrize("family", ["pipeline", "causal"])
def test_streams_that_draw_ahead_show_the_same_frames(request, family, worker):
    """As on a GPU: chunk 0 is drawn while the stream opens, the next one while a chunk is denoised."""
    pipeline = request.getfixturevalue(family)
    expected = list(pipeline.stream("a red circle", seed=3, frames=30))
    watched = Watched()
    with pipeline.stream("a red circle", noise=DrawnAhead(watched, worker), frames=30) as stream:
        frames = list(stream)
    assert np.array_equal(frames, expected)
    chunks = [chunk for chunk, _ in watched.asked]
    assert chunks == list(range(len(chunks)))
    assert all(name.startswith("noise") for _, name in watched.asked)


def test_a_prompt_switch_and_given_latents_draw_the_right_chunks(pipeline, worker):
    image = np.stack(list(pipeline.stream("a blue square", frames=1)))
    runs = []
    for noise in (PhiloxNoise(3), DrawnAhead(Watched(), worker)):
        with pipeline.stream("a red circle", noise=noise, clip=image) as stream:
            stream.looks_ahead = True
            first = [stream.next_chunk() for _ in range(3)]
            stream.set_prompt("a blue square")
            runs.append(np.concatenate([*first, *(stream.next_chunk() for _ in range(2))]))
    assert np.array_equal(*runs)
