"""`async for frame in stream`: the event loop stays free, and a task that ends early leaves the stream as it was."""

import asyncio
import random
import threading

import numpy as np
import pytest

from engine.runtime.streams import Cancelled

PROMPT, OTHER = "a red circle moving right", "a blue square on gray"


def frames_of(pipeline, count):
    with pipeline.stream(PROMPT, seed=3, frames=count) as stream:
        return list(stream)


def same(got, expected):
    assert len(got) == len(expected)
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_same_frames(any_pipeline):
    async def main():
        with any_pipeline.stream(PROMPT, seed=3, frames=11) as stream:
            got = [(frame, stream.serial) async for frame in stream]
            assert stream.emitted == 11
            assert [frame async for frame in stream] == []
        assert [frame async for frame in stream] == []
        return got

    got = asyncio.run(main())
    same([frame for frame, _ in got], frames_of(any_pipeline, 11))
    assert [serial.frame for _, serial in got] == list(range(11))


def test_another_thread_computes(any_pipeline, monkeypatch):
    """Meanwhile the event loop runs other tasks."""
    stream, threads, ticked = any_pipeline.stream(PROMPT), [], threading.Event()
    make = stream._decode_ahead

    def watched():
        threads.append(threading.get_ident())
        assert ticked.wait(60)
        make()

    monkeypatch.setattr(stream, "_decode_ahead", watched)

    async def main():
        async def tick():
            ticked.set()

        frame, _ = await asyncio.gather(anext(stream), tick())
        return frame

    assert asyncio.run(main()).ndim == 3
    assert threads != [threading.get_ident()]


def test_leaving_the_loop(any_pipeline):
    expected = frames_of(any_pipeline, 21)

    async def main():
        got = []
        with any_pipeline.stream(PROMPT, seed=3) as stream:
            while len(got) < 15:
                async for frame in stream:
                    got.append(frame)
                    if len(got) % 5 in (0, 3):
                        break
                got.append(next(stream))
            return got, list(stream.rest())

    got, rest = asyncio.run(main())
    same([*got, *rest], expected[: len(got) + len(rest)])


def test_tasks_that_are_cancelled_lose_no_frame(any_pipeline):
    """At any moment: before, during and after the work of the thread."""
    count, draw = 60, random.Random(2)
    expected = frames_of(any_pipeline, count)

    async def main():
        got, cancelled = [], 0
        with any_pipeline.stream(PROMPT, seed=3) as stream:

            async def take():
                async for frame in stream:
                    got.append(frame)

            while len(got) < count:
                task = asyncio.create_task(take())
                await asyncio.sleep(draw.choice([0, 1e-4, 5e-4, 2e-3, 1e-2]))
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                cancelled += 1
                if cancelled % 3 == 0 or cancelled > 300:
                    got.append(next(stream))  # no cancel is left behind
        return got[:count]

    same(asyncio.run(main()), expected)


def test_a_cancel_of_the_stream_reaches_the_task(any_pipeline):
    async def main():
        with any_pipeline.stream(PROMPT, seed=3) as stream:
            stream.cancel()
            with pytest.raises(Cancelled):
                await anext(stream)
            return [await anext(stream) for _ in range(6)]

    same(asyncio.run(main()), frames_of(any_pipeline, 6))


def test_a_prompt_is_set_from_the_loop(any_pipeline):
    async def main():
        serials = []
        with any_pipeline.stream(PROMPT, seed=3, frames=60) as stream:

            async def switch():
                for number in range(1, 6):
                    assert stream.set_prompt((PROMPT, OTHER)[number % 2]) == number
                    await asyncio.sleep(2e-3)

            switching = asyncio.create_task(switch())
            async for _ in stream:
                serials.append(stream.serial)
            await switching
        return serials

    prompts = [serial.prompt for serial in asyncio.run(main())]
    assert prompts == sorted(prompts)
    assert prompts[-1] > 0


def test_two_tasks(any_pipeline):
    """The second one is told; no frame is lost or comes twice."""
    expected = frames_of(any_pipeline, 40)

    async def main():
        got, refused = [], []
        with any_pipeline.stream(PROMPT, seed=3, frames=40) as stream:

            async def take():
                while stream.emitted < 40:
                    try:
                        async for frame in stream:
                            got.append(frame)
                    except ValueError as error:
                        refused.append(str(error))
                        await asyncio.sleep(1e-3)

            await asyncio.gather(take(), take())
        return got, refused

    got, refused = asyncio.run(main())
    assert set(refused) <= {"stream: got a call while another one runs, expected one at a time"}
    assert sorted(frame.tobytes() for frame in got) == sorted(frame.tobytes() for frame in expected)
