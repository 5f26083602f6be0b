"""Adapters of a live session: their strengths change with a chunk, for this session alone."""

import asyncio

import httpx
import numpy as np
import pytest
import torch
from clients import connected, started
from safetensors.torch import save_file
from serving import app_on_a_thread
from sessions import PROMPT

import engine
from serve.build import make_server
from serve.options import Network, Sessions
from serve.web.app import make_app


@pytest.fixture(scope="module")
def adapted(model_dir, tmp_path_factory):
    """The tiny pipeline with one adapter, named style, at strength 0.5."""
    generator, tensors = torch.Generator().manual_seed(5), {}
    for block in range(2):
        for name in ("self_attn.q", "self_attn.o", "cross_attn.v"):
            key = f"diffusion_model.blocks.{block}.{name}"
            tensors[f"{key}.lora_down.weight"] = torch.randn(3, 32, generator=generator) * 0.3
            tensors[f"{key}.lora_up.weight"] = torch.randn(32, 3, generator=generator) * 0.3
    file = tmp_path_factory.mktemp("adapter") / "style.safetensors"
    save_file(tensors, file)
    return engine.load(model_dir, adapters=[f"{file}:0.5"])


@pytest.fixture(scope="module")
def url(adapted):
    with app_on_a_thread(make_app(make_server(adapted, "styled", Network(), Sessions(sessions=3)))) as address:
        yield address


def engines(pipeline, count, changes):
    made = []
    with pipeline.stream(PROMPT, seed=3) as stream:
        for number in range(count):
            if number in changes:
                stream.set_adapters(changes[number])
            made.append(stream.next_chunk())
    return made


def data(client):
    return [chunk["data"] for chunk in client.chunks]


def test_strengths_change_with_a_chunk_and_leave_other_sessions_alone(url, adapted):
    async def run():
        async with started(url, num_frames=29) as other, started(url) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=1)
            await client.interact("a", adapters={"style": 1.5})
            chunk = await client.until("video.chunk_metadata", started_event_ids=["a"])
            at = chunk["generation_chunk_index"]
            await client.until("video.chunk_metadata", generation_chunk_index=at + 2)
            await client.send("session.stop")
            await asyncio.gather(client.rest(), other.rest())
            return client, other, at

    client, other, at = asyncio.run(run())
    assert data(client) == [c.tobytes() for c in engines(adapted, len(client.chunks), {at: {"style": 1.5}})]
    plain = engines(adapted, 8, {})
    assert data(other) == [c.tobytes() for c in plain]
    assert not np.array_equal(plain[1], engines(adapted, 2, {0: {"style": 1.5}})[1])


def test_a_session_starts_at_its_strengths_and_is_made_again_at_them(url, adapted):
    async def run(**fields):
        async with started(url, num_frames=21, **fields) as client:
            await client.rest()
            return client

    first = asyncio.run(run(adapters={"style": 1.0}))
    assert data(first) == [c.tobytes() for c in engines(adapted, 6, {0: {"style": 1.0}})]
    history = [{"chunk": 2, "adapters": {"style": 0.0}}]
    again = asyncio.run(run(adapters={"style": 1.0}, resume={"chunk": 3, "history": history}))
    expected = engines(adapted, 6, {0: {"style": 1.0}, 2: {"style": 0.0}})
    assert data(again) == [c.tobytes() for c in expected[3:]]


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ({"other": 1.0}, "adapters: got the name 'other', expected one of style"),
        ({"style": "1"}, "got '1', expected"),
        ({"style": float("inf")}, "adapters.style: got inf, expected"),
        ({"../style": 1.0}, "adapters: got the name '../style', expected one of style"),
    ],
)  # fmt: skip
def test_bad_strengths(url, strengths, expected):
    async def run():
        async with started(url, speed=1) as client:
            await client.until("video.start")
            await client.interact("x", adapters=strengths)
            error = await client.until("error")
            await client.send("session.stop")
        async with connected(url) as refused:
            await refused.send("session.start", prompt=PROMPT, adapters=strengths)
            return error, await refused.rest()

    error, (refused, *_) = asyncio.run(run())
    assert expected in error["message"]
    assert (refused["type"], refused["code"]) == ("error", "invalid_request")
    assert expected in refused["message"]


def test_the_model_lists_them(url):
    (model,) = httpx.get(f"{url}/v1/models").json()["data"]
    assert (model["adapters"], model["strengths"]) == (["style"], {"style": 0.5})


def test_a_restart_keeps_the_strengths_that_were_set_last(url, adapted):
    async def run():
        async with started(url) as client:
            await client.until("video.chunk_metadata", generation_chunk_index=1)
            await client.interact("a", adapters={"style": 1.5})
            await client.until("video.chunk_metadata", started_event_ids=["a"])
            await client.interact("b", reset=True)
            await client.until("video.chunk_metadata", take=1, generation_chunk_index=2)
            name = client.seen[0]["session"]
            async with httpx.AsyncClient() as http:
                about = (await http.get(f"{url}/v1/sessions/{name}")).json()
            await client.send("session.stop")
            return [chunk for chunk in client.chunks if chunk["take"] == 1], about["history"]

    chunks, history = asyncio.run(run())
    made = engines(adapted, 3, {0: {"style": 1.5}})
    assert [chunk["data"] for chunk in chunks[:3]] == [one.tobytes() for one in made]
    assert history == [{"chunk": 0, "transition_chunks": 0, "adapters": {"style": 1.5}}]
