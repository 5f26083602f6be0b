"""The C++ core streams what Python streams: any kind of stream over graphs of formulas, and real graphs end to end."""

import ctypes
import dataclasses
import gc
import hashlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import fake_stages
import numpy as np
import pytest
import torch
from csrc_tools import HANG, ROOT, cmake, open_fake
from faults import ENGINE, events_of, plain, same, stumbling
from safetensors.torch import load_file, save_file

import engine.run
from engine.bundles.manifest import read_manifest
from engine.bundles.native import NativePipeline, NativeStream
from engine.config import LocalHeads, Preset
from engine.loader import load_bundle
from engine.model.text import PromptWarning
from engine.runtime.streams import Stream
from engine.stream import Pipeline

CHUNKS = 14
SWITCHES = {4: ("a blue square moving up", True), 5: ("teal", True), 8: ("a yellow triangle", False), 11: ("red", True)}
GREEDY, CAUSAL = Preset("greedy", shift=2.0), Preset("causal", chunk=3, window=6, shift=3.0)
PRESETS = {
    "greedy": dataclasses.replace(GREEDY, solver="euler", max_position=4),
    "greedy-unipc-chunks": dataclasses.replace(GREEDY, chunk=2, window=6, solver="unipc", max_position=9),
    "greedy-renoise-no-window": dataclasses.replace(GREEDY, window=1, solver="renoise", stop_after=2),
    "self-forcing": CAUSAL,
    "longlive": dataclasses.replace(CAUSAL, window=12, attn_sink=3, solver="euler"),
    "framewise": dataclasses.replace(CAUSAL, chunk=1, window=5, attn_sink=2, steps=((1000, 500), (1000,))),
    "diagonal": dataclasses.replace(CAUSAL, window=9, attn_sink=3, commit="noisy", warped=False,
                                    steps=((1000, 933, 357), (1000, 357.142857))),
    "uncommitted": dataclasses.replace(CAUSAL, commit="none"),
    "noisy-context": dataclasses.replace(CAUSAL, context_timestep=100.0),
    "local-heads": dataclasses.replace(CAUSAL, window=12, attn_sink=3, heads=LocalHeads(6, 3, ((0, 1), (1,)))),
    "local-heads-framewise": dataclasses.replace(CAUSAL, chunk=1, window=3, heads=LocalHeads(9, 0, ((), (0,)))),
}  # fmt: skip


@pytest.fixture(scope="module")
def fake(core: ModuleType, native_build: Path):
    """Opens a bundle of formulas as a native pipeline."""

    def opened(folder: Path) -> NativePipeline:
        return open_fake(core, native_build, folder)

    return opened


@pytest.fixture(scope="module")
def recorded(fake) -> NativePipeline:
    return fake(fake_stages.RECORDED)


def chunks_of(stream: Stream, count: int = CHUNKS) -> list[np.ndarray]:
    out = []
    for chunk in range(count):
        if chunk in SWITCHES:
            stream.set_prompt(*SWITCHES[chunk])
        out.append(stream.next_chunk())
    return out


def close(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for number, (mine, theirs) in enumerate(zip(got, expected, strict=True)):
        assert mine.shape == theirs.shape, number
        assert np.abs(mine.astype(int) - theirs).max() <= 1, f"chunk {number}"


def test_the_recorded_bundle_is_current(tmp_path):
    preset = dataclasses.replace(GREEDY, solver="euler", max_position=4)
    written = fake_stages.write_fake_bundle(tmp_path / "fake.bundle", preset, version=1)
    for file in (f for f in written.rglob("*") if f.is_file()):
        recorded = fake_stages.RECORDED / file.relative_to(written)
        if file.name == "manifest.json":  # where 1000 is 1000.0
            assert json.loads(recorded.read_text()) == json.loads(file.read_text())
        else:
            assert recorded.read_bytes() == file.read_bytes(), file


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("start", ["text", "latents", "clip"])
def test_every_kind_of_stream_is_pythons(fake, tmp_path, name, start):
    preset = PRESETS[name]
    native = fake(fake_stages.write_fake_bundle(tmp_path / "fake.bundle", preset))
    python = fake_stages.fake_pipeline(preset)
    generator = torch.Generator().manual_seed(7)
    frames = 1 + fake_stages.TEMPORAL * (2 * preset.chunk - 1)
    if preset.family == "causal" and preset.chunk > 1 and start == "clip":
        frames -= 2  # Python would begin with a shorter chunk, which no exported graph takes
    shape = (1, fake_stages.CONFIG.in_channels, 2 * preset.chunk, fake_stages.HIGH, fake_stages.WIDE)
    given = {
        "text": {},
        "latents": {"latents": torch.randn(shape, generator=generator)},
        "clip": {"clip": np.random.default_rng(3).integers(0, 256, (frames, fake_stages.HEIGHT, fake_stages.WIDTH, 3),
                                                           dtype=np.uint8)},
    }[start]  # fmt: skip
    if "clip" in given and preset.family == "causal" and preset.chunk > 1:
        latents = native_latents(given["clip"], preset)
        expected = chunks_of(python.stream("a red circle", seed=5, latents=latents))
    else:
        expected = chunks_of(python.stream("a red circle", seed=5, **given))
    got = chunks_of(native.stream("a red circle", seed=5, **given))
    assert np.std(np.concatenate(expected)) > 5  # there is something to compare
    close(got, expected)


@pytest.mark.parametrize("name", ["greedy-unipc-chunks", "greedy-renoise-no-window", "longlive"])
def test_both_versions_of_a_manifest_stream_the_same(fake, tmp_path, name):
    new, old = (fake_stages.write_fake_bundle(tmp_path / f"{v}.bundle", PRESETS[name], version=v) for v in (2, 1))
    assert (new / "manifest.json").read_text().count("start_row") == (old / "manifest.json").read_text().count("kv_len")
    mine, theirs = (chunks_of(fake(folder).stream("a red circle", seed=5)) for folder in (new, old))
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def native_latents(clip: np.ndarray, preset: Preset) -> torch.Tensor:
    """What of a clip fills whole chunks, encoded: causal streams of exported graphs take nothing else."""
    latents = max((1 + (len(clip) - 1) // fake_stages.TEMPORAL) // preset.chunk, 1) * preset.chunk
    frames = 1 + fake_stages.TEMPORAL * (latents - 1)
    clip = clip[-frames:]
    held = np.concatenate([clip, np.repeat(clip[-1:], frames - len(clip), axis=0)])
    return fake_stages.fake_pipeline(preset).encoded(held)[0]


def test_prompts_matter_and_seeds_do(recorded):
    def video(prompt: str, seed: int) -> np.ndarray:
        return np.concatenate([recorded.stream(prompt, seed=seed).next_chunk() for _ in range(1)])

    assert not np.array_equal(video("a red circle", 0), video("teal", 0))
    assert not np.array_equal(video("a red circle", 0), video("a red circle", 1))
    assert np.array_equal(video("a red circle", 2**64 - 1), video("a red circle", 2**64 - 1))


def test_an_embedding_is_a_prompt(recorded):
    python = fake_stages.fake_pipeline(PRESETS["greedy"])
    embedding = torch.randn(1, recorded.text_rows, recorded.text_dim, generator=torch.Generator().manual_seed(1)) / 9
    close(chunks_of(recorded.stream(embedding), 4), chunks_of(python.stream(embedding), 4))


def test_frames_are_views_that_outlive_their_stream(recorded):
    with recorded.stream("a red circle", frames=9) as stream:
        frames = list(stream)
    assert len(frames) == 9
    kept = [frame.copy() for frame in frames]
    assert not frames[3].flags.owndata
    assert not frames[3].flags.writeable
    del stream
    gc.collect()
    for other in range(20):
        recorded.stream("teal", seed=other).next_chunk()
    assert all(np.array_equal(a, b) for a, b in zip(frames, kept, strict=True))


def test_bad_input_is_said(recorded, core, tmp_path, native_build):
    with pytest.raises(ValueError, match=r"got an embedding \[1, 2, 3\], expected \[1, 16, 6\]"):
        recorded.stream(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="clip: got uint8"):
        recorded.stream("a", clip=np.zeros((1, 3, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="latents: got"):
        recorded.stream("a", latents=torch.zeros(1, 2, 3, 4, 5))
    stream = recorded.stream("a")
    stream.next_chunk()
    with pytest.raises(ValueError, match="expected one before its first frame"):
        stream._session.push_frames(np.zeros((1, 8, 16, 3), np.uint8))
    stream.close()
    with pytest.raises(ValueError, match="got a closed one"):
        stream.next_chunk()
    with pytest.raises(FileNotFoundError, match=r"without manifest\.json"):
        NativePipeline(tmp_path)
    with pytest.raises(ImportError, match="got no plugin"):
        core.open_bundle(str(fake_stages.RECORDED), plugin_dir=str(tmp_path))
    compiled = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "compiled.bundle"))
    content = (compiled / "manifest.json").read_text()
    for old, target in (('"aoti-cpu"', '"aoti-cpu-x86_64-avx2"'), ('"target": "cpu"', '"target": "cpu-x86_64-avx2"')):
        content = content.replace(old, target)
    (compiled / "manifest.json").write_text(content)
    with pytest.raises(ImportError, match=r"got no libtorch_cpu\.so"):
        core.open_bundle(str(compiled), library_dir=str(tmp_path))
    with pytest.raises(ImportError, match="no backend tensorrt"):
        core.open_bundle(str(fake_stages.RECORDED), backend="tensorrt")


@pytest.mark.parametrize("prompt", ["", " ", "\u200b", "\x01", "&nbsp;", "re\udce9d", "a\0b", "&amp;" * 5000])
def test_prompts_that_no_model_can_read_are_refused(recorded, prompt):
    stream = recorded.stream("red")
    for call in (recorded.stream, stream.set_prompt):
        with pytest.raises(ValueError, match=r"^prompt: got .*, expected ") as raised:
            call(prompt)
        assert "\n" not in str(raised.value)
    if prompt.isascii() and "\0" not in prompt:  # those that reach the core
        with pytest.raises(ValueError, match=r"^prompt: got .*, expected "):
            stream._session.set_prompt([(prompt, 1.0)], True, 0)


def test_prompts_are_cleaned_as_in_python(recorded):
    chunks = [
        recorded.stream(text, seed=1).next_chunk() for text in ("teal", "ｔｅａｌ", "te\x01al", "te&#97;l", "red")
    ]
    for chunk in chunks[1:4]:
        assert np.array_equal(chunk, chunks[0])
    assert not np.array_equal(chunks[4], chunks[0])


def test_cut_prompts_say_so(recorded):
    with pytest.warns(PromptWarning, match='the prompt has 41 tokens, the model reads 16: the rest, from "teal teal'):
        recorded.stream("teal " * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recorded.stream("teal " * 15)


def test_words_that_a_manifest_may_lack(fake, tmp_path):
    bundle = fake_stages.write_fake_bundle(tmp_path / "bundle", PRESETS["greedy"])
    manifest = json.loads((bundle / "manifest.json").read_text())
    for field, known in (("prompt_cleaning", ("html", "ftfy")), ("decoder", ("full", "tiny"))):
        for name in known:
            (bundle / "manifest.json").write_text(json.dumps({**manifest, field: name}))
            assert getattr(read_manifest(bundle), field) == name
            fake(bundle).stream("teal").next_chunk()
        for wrong in ("none", "", 1, None):
            (bundle / "manifest.json").write_text(json.dumps({**manifest, field: wrong}))
            for reader in (read_manifest, fake):
                with pytest.raises(ValueError, match=field):
                    reader(bundle)


def test_arrays_of_another_shape_are_refused(recorded):
    session = recorded.stream("a")._session
    with pytest.raises(ValueError, match=r"push: got \[8, 16, 3\], expected \[any, 8, 16, 3\]"):
        session.push_frames(np.zeros((8, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"push: got \[1, 2, 3, 4\], expected \[\d+, any, \d+, \d+\]"):
        session.push_latent(np.zeros((1, 2, 3, 4), np.float32))
    with pytest.raises(ValueError, match=r"prompt: got \[16\], expected \[16, 6\]"):
        session.set_prompt_embedding(np.zeros(16, np.float32), True, 0)
    with pytest.raises(ValueError, match=r"prompt: got \[\], expected \[any\]"):
        session.set_prompt_tokens(np.array(3), True)


def altered(folder: Path, preset: Preset, change: Callable[[dict], None]) -> Path:
    """A bundle of formulas with `change` made to the graphs in its manifest."""
    bundle = fake_stages.write_fake_bundle(folder / "fake.bundle", preset)
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest["backends"]["aoti-cpu"]["graphs"])
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    return bundle


@pytest.mark.parametrize("graph", ["vae_first", "vae_encode_first"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_pictures_and_latents_are_floats(fake, tmp_path, graph, side):
    def narrow(graphs: dict) -> None:
        graphs[graph][side][0]["dtype"] = "float8_e4m3fn"

    with pytest.raises(ValueError, match=rf"graphs\.{graph}\.{side}\.\w+: got float8_e4m3fn .* expected float32"):
        fake(altered(tmp_path, PRESETS["greedy"], narrow))


def test_a_causal_graph_takes_no_temporal_context(fake, tmp_path):
    def add(graphs: dict) -> None:
        n = next(spec["shape"][0] for spec in graphs["dit"]["inputs"] if spec["name"] == "rope_cos")
        dim = next(spec["shape"][2] for spec in graphs["dit"]["inputs"] if spec["name"] == "k_0")
        graphs["dit"]["inputs"].append({"name": "c_f", "shape": [1, n, dim], "dtype": "float32"})

    with pytest.raises(ValueError, match=r"graphs\.dit\.inputs: got unknown tensor c_f"):
        fake(altered(tmp_path, PRESETS["self-forcing"], add)).stream("a")


def test_a_graph_that_changes_after_opening_is_refused(fake, tmp_path):
    bundle = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "bundle"))
    pipeline = fake(bundle)
    file = bundle / "graphs/aoti-cpu/vae_encode_first.so"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"vae_encode_first\.so: got sha256"):
        pipeline.stream("a", clip=np.zeros((1, fake_stages.HEIGHT, fake_stages.WIDTH, 3), np.uint8))


def test_an_unlisted_tokenizer_is_not_read(fake, tmp_path):
    bundle = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["tokenizer/tokenizer.json"]
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"tokenizer\.json: got a file that the manifest does not list"):
        fake(bundle)


@pytest.mark.parametrize("what", ["flip", "cut", "link", "graph"])
def test_a_damaged_bundle_is_refused(fake, tmp_path, what):
    bundle = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "bundle"))
    file = bundle / ("graphs/aoti-cpu/sdd.so" if what == "graph" else "weights.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    if what == "link":
        shutil.move(file, tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(data[:-1] if what == "cut" else data)
    with pytest.raises(ValueError, match={"cut": "bytes, expected", "link": "no plain file"}.get(what, "got sha256")):
        fake(bundle)


def test_other_threads_run_and_may_cancel_and_switch(recorded, core):
    stream = recorded.stream("a red circle")
    calm = recorded.stream("a red circle")
    clean, made = [calm.next_chunk() for _ in range(200)], []
    stop, cancelled = threading.Event(), 0

    def bother() -> None:
        while not stop.is_set():
            stream.cancel()
            time.sleep(0)

    thread = threading.Thread(target=bother)
    thread.start()
    try:
        for _ in range(200):
            try:
                made.append(stream.next_chunk())
            except core.Cancelled:
                cancelled += 1
    finally:
        stop.set()
        thread.join()
    assert cancelled > 0
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(made, clean, strict=False))  # none is lost
    stream.flush()
    assert np.array_equal(stream.next_chunk(), clean[0])
    stream.set_prompt("teal")
    assert not np.array_equal(stream.next_chunk(), clean[0])


@pytest.mark.parametrize("opcodes", [False, True], ids=["lines", "instructions"])
def test_an_interrupt_loses_no_frame(recorded, opcodes):
    """Chunks, frames and prompts mixed; every event of every call has its turn."""

    def step(number: int):
        return [NativeStream.next_chunk, next, next, lambda s: s.set_prompt(f"teal {number // 8}"), next][number % 5]

    places = (f"{ENGINE}/bundles/native.py", f"{ENGINE}/runtime/handover.py")
    lines = events_of(recorded.stream("a red circle").next_chunk, places=places, opcodes=opcodes) + 8
    steps = [step(number) for number in range(5 * lines)]
    expected = frames_of(plain(recorded.stream("a red circle", seed=5), steps))
    got, interrupts = stumbling(
        recorded.stream("a red circle", seed=5), steps, lambda n: [(1 + n // 5, places)], opcodes
    )
    same(frames_of(got), expected)
    assert interrupts > 2 * lines


def frames_of(results: list[np.ndarray]) -> list[np.ndarray]:
    """An interrupted frame may come back as a chunk of one, so count frames."""
    return [frame for result in results if result.ndim >= 3 for frame in (result if result.ndim == 4 else result[None])]


def test_real_signals_lose_no_chunk(recorded):
    """SIGINT comes at other moments of every call; what the core made is handed over, in order, each chunk once."""
    count = 12
    with recorded.stream("a red circle") as stream:
        expected = [stream.next_chunk() for _ in range(count)]
    stream, got, interrupts = recorded.stream("a red circle"), [], 0
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
    try:
        for number in range(40 * count):
            timer = threading.Timer(1e-4 * (number % 25), os.kill, (os.getpid(), signal.SIGINT))
            try:
                timer.start()
                try:
                    got.append(stream.next_chunk())
                finally:
                    timer.join()
                    time.sleep(0)
            except KeyboardInterrupt:
                interrupts += 1
            if stream.handed > len(got):  # returned, but not assigned
                got.append(stream.last)
            if len(got) == count:
                break
    finally:
        signal.signal(signal.SIGINT, before)
    assert [frames.shape for frames in got] == [frames.shape for frames in expected]
    close(got, expected)
    assert interrupts > 0


def test_numbers_that_are_not_finite(recorded, fake, native_build, tmp_path):
    plugin = ctypes.CDLL(str(native_build / "fake_plugin" / "libgreedy_aoti.so"))
    stream = recorded.stream("a red circle")
    stream.next_chunk()
    plugin.fake_nan_after(ctypes.c_long(2))
    try:
        said = r"^chunk 1, step 1 \(t = 1000\): got nan though all weights are finite, expected finite numbers$"
        with pytest.raises(FloatingPointError, match=said):
            stream.next_chunk()
    finally:
        plugin.fake_nan_after(ctypes.c_long(-1))
    nan = torch.full((1, recorded.text_rows, recorded.text_dim), torch.nan)
    with pytest.raises(ValueError, match="prompt: got nan, expected finite numbers"):
        recorded.stream(nan)
    channels, frames, height, width = recorded.latent
    with pytest.raises(ValueError, match="push: got inf, expected finite numbers"):
        recorded.stream("a", latents=torch.full((1, channels, frames, height, width), -torch.inf))
    bundle = Path(shutil.copytree(fake_stages.RECORDED, tmp_path / "bundle"))
    save_file({"a.weight": torch.ones(3), "b.weight": torch.tensor([0, torch.nan])}, bundle / "weights.safetensors")
    manifest = json.loads((bundle / "manifest.json").read_text())
    data = (bundle / "weights.safetensors").read_bytes()
    manifest["files"]["weights.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    spoiled = fake(bundle).stream("a red circle")
    with pytest.raises(ValueError, match=r"^weights\.safetensors: b\.weight: got nan, expected finite numbers$"):
        spoiled.next_chunk()


# --- real graphs


def test_compiled_graphs_give_pythons_video(core, aoti_bundle, pipeline):
    """81 frames, with a prompt switch, against the same graphs run by Python and against torch's own modules."""
    native = NativePipeline(aoti_bundle, "aoti")
    weights = load_file(aoti_bundle / "weights.safetensors")
    # The compiler that comes first names a tensor, with dots or underscores.
    rows = next(len(value) for key, value in weights.items() if key.replace(".", "_").endswith("embed_tokens_weight"))
    with pytest.raises(ValueError, match=f"got token {rows}, expected 0 to {rows - 1}"):
        native.stream("red")._session.set_prompt_tokens(np.array([rows]), True)
    assert native.stages.name == "native-aoti"
    pipelines: list[Pipeline | NativePipeline] = [native, load_bundle(aoti_bundle, "aoti"), pipeline]
    streams = [each.stream("a red circle moving right", seed=3) for each in pipelines]
    frames = 0
    while frames < 81:
        if frames == 41:
            for stream in streams:
                stream.set_prompt("a blue square moving up quickly")
        mine, *theirs = (stream.next_chunk().astype(int) for stream in streams)
        assert max(np.abs(mine - other).max() for other in theirs) <= 2, frames
        frames += len(mine)


def test_compiled_graphs_want_their_weights(core, aoti_bundle, tmp_path):
    bundle = Path(shutil.copytree(aoti_bundle, tmp_path / "bundle"))
    manifest = json.loads((bundle / "manifest.json").read_text())
    next(b for b in manifest["backends"].values() if b["backend"] == "aoti")["graphs"]["etm"]["weights"] = {}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="etm: got no weight for constant"):
        NativePipeline(bundle, "aoti")


def test_compiled_graphs_start_from_a_picture(core, aoti_bundle, pipeline):
    image = np.random.default_rng(1).integers(0, 256, (1, pipeline.height, pipeline.width, 3), dtype=np.uint8)
    with pipeline.stream("red", clip=image) as theirs, NativePipeline(aoti_bundle).stream("red", clip=image) as mine:
        for _ in range(4):
            assert np.abs(theirs.next_chunk().astype(int) - mine.next_chunk()).max() <= 2


def test_host_gives_pythons_video(native_build, aoti_bundle, pipeline, tmp_path):
    libraries = Path(torch.__file__).parent / "lib"
    words = ["--prompt", "a red circle moving right", "--prompt-at", "41", "a blue square", "--frames", "81", "--seed",
             "3", "--library-dir", libraries, "--backend", "aoti", "--out", tmp_path / "host.rgb"]  # fmt: skip
    ran = subprocess.run(
        [native_build / "greedy-host", aoti_bundle, *words], capture_output=True, text=True, timeout=HANG
    )
    assert ran.returncode == 0, ran.stderr
    assert engine.run.main(["--bundle", str(aoti_bundle), "--backend", "aoti", "--prompt", "a red circle moving right",
                            "--prompt-at", "41f", "a blue square", "--frames", "81", "--seed", "3", "--quiet",
                            "--out", str(tmp_path / "python.rgb")]) == 0  # fmt: skip
    mine, theirs = (np.fromfile(tmp_path / f"{name}.rgb", np.uint8).astype(int) for name in ("host", "python"))
    assert mine.size == 81 * pipeline.height * pipeline.width * 3
    assert np.abs(mine - theirs).max() <= 2


TORCH = Path(torch.__file__).parent


@pytest.fixture
def site(native_build, tmp_path) -> Path:
    """A site-packages folder that holds engine's native files as a wheel has them. Importing this engine fails."""
    cmake("--install", native_build, "--prefix", tmp_path / "site" / "engine")
    (tmp_path / "site" / "engine" / "__init__.py").write_text("raise AssertionError('engine was imported')\n")
    return tmp_path / "site"


def streamed(bundle: Path, *program: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs greedy-host without the environment variables of this process."""
    words = [*program, bundle, "--prompt", "a red circle", "--frames", "5", "--out", "checksum", "--quiet"]
    return subprocess.run(words, env={"OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True, timeout=HANG)


def test_host_finds_the_torch_it_is_installed_with(site, aoti_bundle, tmp_path, monkeypatch):
    program = site / "engine" / "bin" / "greedy-host"
    alone = streamed(aoti_bundle, program)
    assert alone.returncode == 2
    assert alone.stderr.startswith("error: aoti: got no libtorch_cpu.so")
    assert "; onnx: got no plugin " in alone.stderr  # every backend of the bundle says why it does not open
    assert alone.stderr.count("\n") == 1
    expected = streamed(aoti_bundle, program, "--library-dir", TORCH / "lib").stdout
    assert len(expected) == 65
    # A wheel: torch lies beside engine.
    (site / "torch").symlink_to(TORCH)
    assert streamed(aoti_bundle, program).stdout == expected
    assert streamed(aoti_bundle, program, GREEDY_LIBRARY_DIR="/nowhere").returncode == 2  # a variable overrides
    (site / "torch").unlink()
    # An editable installation: setup.py wrote where torch lies.
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    folders = runpy.run_path(str(ROOT / "setup.py"))["torch_libraries"]()
    assert TORCH / "lib" in folders
    (site / "engine" / "lib" / "library_dirs.txt").write_text("".join(f"{folder}\n" for folder in folders))
    assert streamed(aoti_bundle, program).stdout == expected


def test_host_script_finds_torch_elsewhere(site, aoti_bundle):
    script = ROOT / "csrc" / "host" / "greedy-host"
    ran = streamed(aoti_bundle, sys.executable, script, PYTHONPATH=str(site))
    assert (ran.returncode, len(ran.stdout)) == (0, 65), ran.stderr
    shutil.rmtree(site / "engine" / "bin")
    ran = streamed(aoti_bundle, sys.executable, script, PYTHONPATH=str(site))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"error: got no {site / 'engine' / 'bin' / 'greedy-host'}, expected ")
    assert ran.stderr.count("\n") == 1


def test_hosts_idle_threads_sleep(native_build, aoti_bundle):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    env["OMP_DISPLAY_ENV"] = "VERBOSE"  # libgomp shows what it read when it was loaded
    words = ["--prompt", "red", "--frames", "9", "--library-dir", Path(torch.__file__).parent / "lib", "--quiet",
             "--backend", "aoti", "--out", "checksum"]  # fmt: skip

    def run(*more, **changes):
        ran = subprocess.run([native_build / "greedy-host", aoti_bundle, *words, *more], env=env | changes,
                             capture_output=True, text=True, timeout=HANG)  # fmt: skip
        assert ran.returncode == 0, ran.stderr
        assert len(ran.stdout) == 65
        return re.findall(r"(GOMP_SPINCOUNT|OMP_NUM_THREADS) = '(\d+)", ran.stderr)

    assert ("GOMP_SPINCOUNT", "0") in run()
    assert run("--threads", "2") == [("OMP_NUM_THREADS", "2"), ("GOMP_SPINCOUNT", "0")]
    assert ("GOMP_SPINCOUNT", "0") not in run(OMP_WAIT_POLICY="active")


def test_command_line_takes_the_native_backend(core, aoti_bundle, tmp_path, capsys):
    words = ["--bundle", str(aoti_bundle), "--prompt", "red", "--frames", "10", "--quiet", "--json", "--out", "null"]
    assert engine.run.main([*words, "--backend", "native"]) == 0
    assert '"backend": "native-aoti"' in capsys.readouterr().out
    assert engine.run.main(["--backend", "native", "--prompt", "red", "--frames", "1", "--out", "null"]) == 2
    assert "expected --bundle with it" in capsys.readouterr().err


def test_bench_runtimes_checks_and_then_races(core, aoti_bundle, model_dir, capsys):
    from bench.__main__ import main

    given = ["runtimes", "--bundle", str(aoti_bundle), "--model", str(model_dir), "--pairs", "3", "--check-chunks", "3"]
    assert main([*given, "--prompt", "a red circle moving right"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["backends"] == ["torch", "aoti", "onnx", "native"]
    assert all(check["passed"] for check in found["checks"])
    assert found["stages"]["chunk"]["aoti"]["ratio"]["pairs"] == 3
