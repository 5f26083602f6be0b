"""A steady chunk on the fast path, counted from shapes without a GPU: launches, bytes and FLOPs of every part."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu.launches import Counts, count
from bench.instruments import models
from bench.instruments.flops import META, EmptyNoise, chunk_cost, steady_index
from bench.instruments.meter import context_of, joined_of
from bench.instruments.spread import table
from bench.report.saved import Printed
from engine.generators import family_of
from engine.loader import assemble
from engine.model.cache import RingCache
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig, expect_fit
from engine.model.transformer import WanTransformer
from engine.model.vae import VAE, StreamingVAE, VAEConfig, frames_to_uint8
from engine.options import option
from engine.presets import find_preset
from engine.runtime.passes import Pass
from engine.runtime.stages import TorchStages
from engine.stream import Pipeline, PythonStream
from kernels.launch import HAVE_TRITON

ROWS = 512  # of the prompt's embedding, as Wan's prompts have


@dataclass(frozen=True, kw_only=True)
class Options(Printed):
    shape: str = option("wan2.1-1.3b", "of the model", choices=models.SHAPES)
    preset: str = option("greedy", "a name, or a .toml file", metavar="NAME|FILE")
    height: int | None = option(None, "pixels; default: the shape's own")
    width: int | None = option(None, "pixels; default: the shape's own")
    alone: bool = option(False, "context passes alone, instead of with the next chunk's first step")
    decoder: Literal["full", "tiny"] = option("full", "tiny: taew2_1's shape decodes")
    operations: bool = option(False, "also the operations of every part")


class CountedStages(TorchStages):
    """The torch backend's fast path on meta tensors; `parts` are what each function launched since the last clear."""

    def __init__(self, models: dict[str, WanTransformer], vae: StreamingVAE, join_context: bool, clean: bool) -> None:
        """clean: a chunk begins with the context pass of the one before, unless that is joined."""
        super().__init__(models, vae, None, join_context=join_context)
        self._context_first = clean and not join_context
        self.parts: dict[str, list[Counts]] = {}
        self.vae_flops = 0.0  # of one call; upsampling inside convolutions has fewer than the modules' shapes tell

    def _counted(self, part: str, call: Callable[[], Any]) -> Any:
        results: list[Any] = []
        self.parts.setdefault(part, []).append(count(lambda: results.append(call())))
        return results[0]

    def run(self, step: Pass, cache: RingCache, text_kv: Any) -> Tensor:
        name = step.kind.graph if step.context is None else joined_of(step.kind.graph)
        if self._context_first and step.kind.timed and not self.parts:
            name = context_of(name)
        return self._counted(name, partial(TorchStages.run, self, step, cache, text_kv))

    def vae_steady(self, latent: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """As it runs in a graph: the caches are moved on in place; then the frames as bytes."""

        def decode() -> Tensor:
            frames = self.vae.steady(latent, cache, in_place=True)[0]  # type: ignore[union-attr]
            return frames_to_uint8(frames)

        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            decode()
        self.vae_flops = counter.get_total_flops()
        return self._counted("vae", decode), cache


def steady_chunk(
    shape: str, preset: str, height: int | None = None, width: int | None = None, joined: bool = True,
    decoder: str = "full",
) -> tuple[Pipeline, CountedStages]:  # fmt: skip
    """The pipeline on the meta device, and its stages, whose parts hold what each call of a steady chunk launches."""
    config, vae_config, _, _ = models.SHAPES[shape]
    style, dtype = find_preset(preset), torch.bfloat16
    height, width = models.size_of(shape, META, height, width)
    family = family_of(style)
    with META, torch.inference_mode():
        transformers = {role: WanTransformer(config, family.conditioned(role)).to(dtype) for role in family.roles()}
        vae = (VAE(vae_config) if decoder == "full" else TinyVAE(_tiny(vae_config, shape))).to(dtype)
        for model in transformers.values():
            model.order_heads(style.local_heads)
            model.fuse()
        vae.fuse()
    stages = CountedStages(transformers, vae, joined, style.commit == "clean")
    pipeline = assemble(
        stages, config, style, dtype, META, height=height, width=width, name=preset, vae_config=vae_config
    )
    text = torch.empty(1, ROWS, config.text_dim, device=META, dtype=dtype)
    stream = PythonStream(pipeline, text, EmptyNoise(), None, None)
    for _ in range(steady_index(style)):
        stream.next_latent()
    with torch.inference_mode():
        latent = torch.empty(1, config.in_channels, 1, height // pipeline.spatial, width // pipeline.spatial,
                             device=META, dtype=dtype)  # fmt: skip
        cache = vae.first(latent)[1]
        stages.parts.clear()
        made = stream.next_latent()
        for frame in made.split(1, dim=2):
            stages.vae_steady(frame, cache)
    return pipeline, stages


def _tiny(config: VAEConfig, shape: str) -> TinyVAEConfig:
    """taew2_1's shape. ValueError for a VAE of other latents."""
    tiny = TinyVAEConfig(encoder_width=None)
    expect_fit(tiny, config, f"--decoder tiny --shape {shape}")
    return tiny


def measure(options: Options) -> dict[str, Any]:
    if not HAVE_TRITON:
        raise ValueError("counts: got no Triton, expected it (pip install 'greedy-stream[kernels]')")
    pipeline, stages = steady_chunk(
        options.shape, options.preset, options.height, options.width, joined=not options.alone,
        decoder=options.decoder,
    )  # fmt: skip
    flops = {name: cost.flops for name, cost in chunk_cost(pipeline, ROWS).items()}
    flops["vae"] = stages.vae_flops * pipeline.preset.chunk
    rows: list[dict[str, Any]] = []
    for name, calls in stages.parts.items():
        totals = [call.total for call in calls]
        rows.append({
            "part": name, "calls": len(calls), "launches": sum(n for n, _ in totals),
            "gigabytes": sum(b for _, b in totals) / 1e9, "teraflop": flops[name] / 1e12,
            "operations": [asdict(call) for call in calls[:1]],
        })  # fmt: skip
    whole = {key: sum(row[key] for row in rows) for key in ("calls", "launches", "gigabytes", "teraflop")}
    return {"shape": options.shape, "preset": options.preset, "height": pipeline.height, "width": pipeline.width,
            "joined": not options.alone, "rows": rows, "total": whole}  # fmt: skip


def run(options: Options) -> int:
    report = measure(options)
    if options.json:
        print(json.dumps(report))
        return 0
    print(f"{report['shape']}, {report['preset']}, {report['width']}x{report['height']}, bf16, one steady chunk\n")
    shown = ("part", "calls", "launches", "gigabytes", "teraflop")
    print(table([{key: row[key] for key in shown} for row in report["rows"]] + [{"part": "chunk", **report["total"]}]))
    for row in report["rows"] if options.operations else ():
        counts = row["operations"][0]
        ordered = sorted(counts["bytes"], key=lambda name: -counts["bytes"][name])
        print(f"\none call of {row['part']}\n")
        print(table([{"operation": name, "launches": counts["launches"][name], "gigabytes": counts["bytes"][name] / 1e9}
                     for name in ordered]))  # fmt: skip
    return 0
