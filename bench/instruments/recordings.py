"""Replay streams that public code computed, through the ordinary engine path, and compare.

A directory of cases holds model*.safetensors (weights in Self-Forcing's names), cases.json / cases.safetensors
(model config, and per case its settings, noise, renoise draws and output) and any further pair of NAME.json /
NAME.safetensors with cases for the same weights. A case's own entry holds all its settings.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bench.instruments.ways import stages_through
from engine.config import Preset, TransformerConfig
from engine.files import read_json
from engine.loader import assemble
from engine.sampling.noise import ReplayNoise
from engine.stream import PythonStream
from engine.weights.checkpoint import load_transformer
from engine.weights.sources import open_source

# dtype -> largest (max_abs_error, rms_error) that passes. Processors sum bf16 products in different orders. So the
# largest error may be two units in the last place of values from 4 to 8, where latents end. Any other order of rounding
# gives an rms error of 6.5e-3 to 7.4e-3, and bf16 against fp32 gives 8.2e-3; faults start at .13.
TOLERANCE = {torch.float32: (2e-5, 2e-5), torch.bfloat16: (2**-4, 1.2e-2)}
_CONTEXT_FRAMES = 21  # frames that the public code keeps when attention is global


@dataclass(frozen=True)
class Case:
    """One recorded stream: its entry in the JSON and its tensors."""

    name: str
    entry: dict[str, Any]
    tensors: dict[str, Tensor]  # noise, output; some cases also have renoise or initial_latent
    text: Tensor  # [B, rows, text_dim]

    @property
    def dtype(self) -> torch.dtype:
        name = self.entry.get("dtype", "torch.float32").removeprefix("torch.")
        found = {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(name)
        if found is None:
            raise ValueError(f"{self.name}: got dtype {name!r}, expected float32 or bfloat16")
        return found


@dataclass(frozen=True)
class Result:
    name: str
    dtype: str
    max_abs_error: float
    rms_error: float
    passed: bool


@dataclass(frozen=True)
class Recording:
    """A directory of cases."""

    config: TransformerConfig
    text_rows: int
    latent_hw: tuple[int, int]
    shift: float
    weights: Path
    cases: list[Case]


_MODEL_KEYS = (
    "patch_size", "num_heads", "dim", "in_dim", "out_dim", "text_dim", "freq_dim", "ffn_dim", "num_layers",
    "cross_attn_norm", "eps",
)  # fmt: skip


def _require(raw: dict[str, Any], names: tuple[str, ...], where: object) -> None:
    missing = [name for name in names if name not in raw]
    if missing:
        raise ValueError(f"{where}: got keys {', '.join(raw)}, expected also {', '.join(missing)}")


def model_config(raw: dict[str, Any]) -> TransformerConfig:
    """A transformer config from Wan's own key names."""
    _require(raw, _MODEL_KEYS, "model_config")
    return TransformerConfig(
        patch_size=tuple(raw["patch_size"]), num_attention_heads=raw["num_heads"],
        attention_head_dim=raw["dim"] // raw["num_heads"], in_channels=raw["in_dim"], out_channels=raw["out_dim"],
        text_dim=raw["text_dim"], freq_dim=raw["freq_dim"], ffn_dim=raw["ffn_dim"], num_layers=raw["num_layers"],
        cross_attn_norm=raw["cross_attn_norm"], eps=raw["eps"],
    )  # fmt: skip


def read_recording(folder: Path) -> Recording:
    """Read every case of a directory."""
    main = read_json(folder / "cases.json")
    _require(main, ("model_config", "latent_hw"), folder / "cases.json")
    weights = sorted(folder.glob("model*.safetensors"))
    if len(weights) != 1:
        raise ValueError(f"{folder}: got {len(weights)} files model*.safetensors, expected one")
    texts = {key: t for key, t in _tensors(folder / "cases.safetensors") if key.startswith("text_embeds")}
    cases = []
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)
        entries = content.get("cases", content)
        entries = {name: e for name, e in entries.items() if isinstance(e, dict) and "chunk" in e}
        if entries:
            held = dict(_tensors(file.with_suffix(".safetensors")))
            cases += [_case(name, entry, held, texts) for name, entry in entries.items()]
    config = model_config(main["model_config"])
    return Recording(
        config, main["model_config"].get("text_len", 512), tuple(main["latent_hw"]),
        main.get("timestep_shift", 5.0), weights[0], cases,
    )  # fmt: skip


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if not file.is_file():
        raise FileNotFoundError(f"got no file {file}, expected the tensors of its cases")
    with safe_open(file, framework="pt") as opened:
        for key in opened.keys():  # noqa: SIM118 - a safe_open handle is no mapping
            yield key, opened.get_tensor(key)


def _case(name: str, entry: dict[str, Any], held: dict[str, Tensor], texts: dict[str, Tensor]) -> Case:
    stepped = any(entry.get(key) for key in ("calls", "warped_steps", "steps"))
    _require(entry, ("local_attn_size",) if stepped else ("local_attn_size", "steps"), name)
    tensors = {key.removeprefix(name + "/"): t for key, t in held.items() if key.startswith(name + "/")}
    for need in ("noise", "output"):
        if need not in tensors:
            raise ValueError(f"{name}: got no tensor {name}/{need}, expected one")
    batch = len(tensors["noise"])
    fitting = [tensors["text_embeds"]] if "text_embeds" in tensors else [t for t in texts.values() if len(t) == batch]
    if not fitting:
        raise ValueError(f"{name}: got no text_embeds of batch {batch}, expected one")
    return Case(name, entry, tensors, fitting[0])


def preset_of(case: Case, shift: float) -> Preset:
    """The preset of a recorded case."""
    entry = case.entry
    window, chunk = entry["local_attn_size"], entry["chunk"]
    total = case.tensors["output"].shape[1]
    context = float(entry.get("context_noise") or 0)
    steps, clean, warped = _steps_of(entry, context)
    return Preset(
        "causal", chunk=chunk, first_chunk=1 if entry.get("independent_first_frame") and chunk > 1 else 0,
        window=window if window > 0 else max(_CONTEXT_FRAMES, total), attn_sink=entry.get("sink_size", 0),
        steps=steps, warped=warped, shift=entry.get("timestep_shift", shift),
        commit="clean" if clean else "noisy", context_timestep=context,
    )  # fmt: skip


def _steps_of(entry: dict[str, Any], context: float) -> tuple[tuple[tuple[float, ...], ...], bool, bool]:
    """(steps of every chunk, whether chunks end in a context pass, whether the preset still has to warp the steps)."""
    calls = entry.get("calls")
    if not calls:
        if entry.get("warped_steps"):
            return (tuple(entry["warped_steps"]),), True, False
        rest = tuple(map(float, entry["steps"]))
        first = entry.get("first_chunk_steps")
        return ((tuple(map(float, first)), rest) if first else (rest,)), True, entry.get("warped", True)
    # `calls` lists all passes, also where a pipeline has step lists of its own for the first chunks.
    chunks = [[c["timestep"] for c in group] for _, group in groupby(calls, key=lambda c: c["current_start"])]
    supplied = [ts for ts in chunks if ts == [0.0]]  # initial latents: one clean pass each
    generated = chunks[len(supplied) :]
    clean = all(ts[-1] == context and len(ts) > 1 for ts in generated)
    rows = [tuple(ts[:-1] if clean else ts) for ts in generated]
    return (*[rows[0]] * len(supplied), *rows), clean, False


def replay(case: Case, recording: Recording, device: torch.device, way: str = "plain") -> Tensor:
    """The engine's latents for a case, [B, F, C, h, w], as recorded; through one of ways.WAYS."""
    preset = preset_of(case, recording.shift)
    source = open_source(recording.weights)
    model = load_transformer(recording.config, source, case.dtype, device)
    model.fuse()
    # No VAE takes part. The size in pixels only has to give the latent's size.
    height, width = recording.latent_hw
    pipeline = assemble(
        stages_through(way, {"dit": model}), recording.config, preset, case.dtype, device,
        height=height * 8, width=width * 8,
    )  # fmt: skip
    initial = case.tensors.get("initial_latent")
    supplied = initial.transpose(1, 2) if initial is not None else None
    text = torch.nn.functional.pad(case.text, (0, 0, 0, recording.text_rows - case.text.shape[1]))
    noise = case.tensors["noise"].transpose(1, 2)  # [B, C, F, h, w]
    stream = PythonStream(pipeline, text, ReplayNoise({}), None, supplied)
    chunks = [*stream.supplied]
    sizes: list[int] = []
    generated = noise.shape[2]
    while generated:
        sizes.append(min(preset.chunk_frames(len(chunks) + len(sizes)), generated))
        generated -= sizes[-1]
    stream.noise = ReplayNoise(_draws(stream, case, noise, len(chunks), sizes))
    latents = [stream.next_latent() for _ in range(len(chunks) + len(sizes))]
    return torch.cat(latents, dim=2).transpose(1, 2).float().cpu()


def _draws(
    stream: PythonStream, case: Case, noise: Tensor, first: int, sizes: list[int]
) -> dict[tuple[int, int], Tensor]:
    """Recorded draws by (chunk, number). Renoise rows are batch-major frames: one draw after each step but the last."""
    draws: dict[tuple[int, int], Tensor] = {}
    rows, row, start, batch = case.tensors.get("renoise"), 0, 0, len(noise)
    for chunk, size in enumerate(sizes, start=first):
        draws[chunk, 0] = noise[:, :, start : start + size]
        start += size
        for number in range(1, len(stream.schedule.steps(chunk))):
            if rows is None or row + batch * size > len(rows):
                raise ValueError(f"{case.name}: got {0 if rows is None else len(rows)} renoise rows, expected more")
            draws[chunk, number] = rows[row : row + batch * size].unflatten(0, (batch, size)).transpose(1, 2)
            row += batch * size
    return draws


def run(folder: Path, device: str = "cpu", way: str = "plain") -> list[Result]:
    """Replay every case of a directory, through one of ways.WAYS."""
    recording = read_recording(folder)
    results = []
    for case in recording.cases:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # on by default for convolutions
            error = replay(case, recording, torch.device(device), way) - case.tensors["output"].float()
        largest, rms = float(error.abs().max()), float(error.square().mean().sqrt())
        limits = TOLERANCE[case.dtype]
        # NaN compares as false, so a broken result never passes.
        passed = largest <= limits[0] and rms <= limits[1]
        results.append(Result(case.name, str(case.dtype).removeprefix("torch."), largest, rms, passed))
    return results


def report(results: list[Result]) -> dict[str, Any]:
    """The JSON of a run."""
    return {"cases": [asdict(result) for result in results], "passed": all(result.passed for result in results)}
