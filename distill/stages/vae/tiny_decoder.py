"""Distil a model's VAE decoder into a tiny one in TAEHV's layout (engine/model/tiny_vae.py).

    python -m distill tiny_decoder --config distill/configs/tiny.toml --out runs/tiny_decoder

It learns what the model's own decoder makes of clips of the data, and of latents that the model itself streams: these
are less clean than encoded clips. The streams are made first, into --out/streams, with the captions of the data.

    loss = |o - t| + (o - t)^2 + edges |dx o - dx t| + motion |dt o - dt t|

o and t are the frames of the tiny and of the model's decoder, dx differences of neighbouring pixels, dt those of
neighbouring frames; every term is a mean. The published decoders add LPIPS and a weak discriminator instead of `edges`.

Writes --out/tiny_vae/, which `--vae-decoder` and a model's folder take, and --out/report.json: PSNR to the model's
decoder on clips and streams that were held back, and the mean change from frame to frame of both decoders.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

import engine
from distill.data.shards import Shards, shard_path, write_index, write_shard
from distill.training.draws import Draws
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from distill.training.stage import Stage, TrainingOptions
from engine.files import read_json, whole_file, write_json
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig, expect_fit
from engine.model.vae import VAE
from engine.options import option
from engine.stream import Pipeline
from engine.weights.adapters import base_hash

SHARD = 8  # streamed clips per shard
TINY_VAE = "tiny_vae"  # folder of the decoder, and in a model's folder
PEAK = 2.0  # of frames, from -1 to 1


@dataclass(frozen=True)
class TinyDecoderConfig(FitConfig):
    """The table [tiny_decoder]."""

    model: str = option("engine/assets/sprites", "pipeline directory whose decoder is distilled, and which streams")
    data: str = option("runs/bank/clips", "folder of captioned latents")
    steps: int = option(3000, "optimiser steps")
    lr: float = option(2e-3, "highest learning rate")
    frames: int = option(9, "latent frames per clip")
    clips: int = option(0, "clips of the data to train on; 0: all but those held back")
    remember: float = option(2.0, "GB of the model's frames that a process keeps instead of decoding them again")
    crop: int = option(0, "latent pixels of a random square of each clip; 0: the whole picture")
    streams: int = option(128, "clips that the model streams, beside those of the data")
    stream_share: float = option(0.5, "share of the steps that train on them")
    held: int = option(16, "last clips of the data, and last streams, that are held back for the report")
    edges: float = option(1.0, "weight of the error of differences between neighbouring pixels")
    motion: float = option(1.0, "weight of the error of differences between neighbouring frames")
    widths: tuple[int, ...] = option((64, 32, 32), "channels of the stages, then of the last convolution")
    upsample_space: tuple[bool, ...] = option((True, True), "which stages double height and width")
    upsample_time: tuple[bool, ...] = option((True, True), "which stages double the frames")
    blocks: int = option(3, "memory blocks per stage")
    patch: int = option(1, "pixels of a side that the last convolution writes at once")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard or self.recompute:
            raise ValueError("got shard or recompute, expected neither: a decoder this small needs none")
        for name, least in (("frames", 2), ("crop", 0), ("streams", 0), ("held", 1), ("edges", 0), ("motion", 0),
                            ("clips", 0), ("remember", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.stream_share <= 1:
            raise ValueError(f"stream_share: got {self.stream_share}, expected 0 to 1")
        if 0 < self.streams <= self.held:
            raise ValueError(f"streams: got {self.streams}, expected 0 or more than the {self.held} held back")

    def tiny(self, vae: VAE) -> TinyVAEConfig:
        """The shape of the decoder. ValueError if its factors of size are not those of the model's VAE."""
        shape = TinyVAEConfig(
            z_dim=vae.config.z_dim, widths=self.widths, upsample_space=self.upsample_space,
            upsample_time=self.upsample_time, blocks=self.blocks, patch=self.patch, encoder_width=None,
        )  # fmt: skip
        expect_fit(shape, vae.config, f"tiny_decoder for {self.model}")
        return shape


@dataclass(frozen=True)
class TinyDecoderOptions(TrainingOptions):
    out: Path = option(Path("runs/tiny_decoder"), "folder of checkpoints, logs, streams and the decoder")


@torch.no_grad()
def stream_clips(
    pipeline: Pipeline, config: TinyDecoderConfig, data: Shards, out: Path, accelerator: Accelerator
) -> Shards:
    """Latents that the model streams under captions of the data, as shards. Processes take turns at shards.

    ValueError where those in the folder are of other weights or settings: another model may lie at that path by now.
    """
    side = min(pipeline.height, pipeline.width) // pipeline.spatial
    if config.crop > side:
        raise ValueError(f"crop: got {config.crop}, expected at most the {side} of {config.model}'s streams")
    files = (file for file in Path(config.model).rglob("*.safetensors") if file.parent.name != TINY_VAE)
    made = {"weights": base_hash(files), "seed": config.seed, "frames": config.frames, "streams": config.streams}
    if accelerator.is_main_process:
        _expect_same(out / "made.json", made)
    accelerator.wait_for_everyone()
    shards = -(-config.streams // SHARD)
    for number in range(accelerator.process_index, shards, accelerator.num_processes):
        if shard_path(out, number).is_file():
            continue
        clips = range(number * SHARD, min((number + 1) * SHARD, config.streams))
        captions = data.captions([clip % len(data) for clip in clips])
        text_emb = torch.cat([pipeline.encode_prompt(caption) for caption in captions])
        chunks = list[Tensor]()
        with pipeline.stream(text_emb, seed=config.seed * 1_000_003 + number) as stream:
            while sum(chunk.shape[2] for chunk in chunks) < config.frames:
                chunks.append(stream.next_latent())
        latents = torch.cat(chunks, 2)[:, :, : config.frames].cpu()
        write_shard(out, number, latents.half() if latents.dtype == torch.float32 else latents, captions)
        print(f"{out.parent.name}: streamed {number + 1}/{shards}", flush=True)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_index(out, shards, made)
    accelerator.wait_for_everyone()
    return Shards(out)


def _expect_same(file: Path, made: dict[str, str | int]) -> None:
    """Keep what makes the shards of a folder. ValueError where something else made those that are there."""
    if not file.is_file():
        write_json(file, made)
    elif (kept := read_json(file)) != made:
        raise ValueError(f"{file.parent}: got streams of {kept}, expected {made}; remove the folder, or choose another")


class TinyDecoder(Objective):
    """The distance of a tiny decoder's frames to those of the model's decoder."""

    def __init__(self, config: TinyDecoderConfig, vae: VAE, data: Shards, streams: Shards | None = None) -> None:
        super().__init__()
        if config.frames > data.frames:
            raise ValueError(f"frames: got {config.frames}, expected at most the {data.frames} of {data.folder}")
        if len(data) <= config.held:
            raise ValueError(f"data: got {len(data)} clips, expected more than the {config.held} held back")
        if config.crop > min(data.shape[2:]):
            raise ValueError(f"crop: got {config.crop}, expected at most {min(data.shape[2:])}")
        self._frozen = [vae]  # a list hides it from this module, which then neither moves nor synchronises it
        self.config, self.data, self.streams = config, data, streams
        self.decoder = TinyVAE(config.tiny(vae))
        self._targets: dict[tuple[Path, int], Tensor] = {}

    @property
    def vae(self) -> VAE:
        return self._frozen[0]

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        return {"decoder": (dict(self.decoder.named_parameters()), 1.0)}

    def free(self, source: Shards) -> int:
        """Clips from the first on that are trained on."""
        free = len(source) - self.config.held
        return min(free, self.config.clips or free) if source is self.data else free

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        streamed = float(torch.rand((), generator=draws.shared)) < config.stream_share
        source = self.streams if streamed and self.streams is not None else self.data
        clips = draws.clips(config.batch, self.free(source))
        latents, target = self.pair(source, clips)
        if config.crop:
            latents, target = self._cropped(latents, target, draws)
        parts = self.errors(self.decoder.reconstruct(latents), target)
        return torch.stack(list(parts.values())).sum(), parts

    def pair(self, source: Shards, clips: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents [B, C, F, h, w] of some clips, and what the VAE makes of them, [B, 3, 1 + 4 (F - 1), H, W]."""
        device = next(self.vae.parameters()).device
        latents = source.read(clips, self.config.frames)[0].to(device)
        return latents, torch.cat([self._target(source, clip) for clip in clips]).to(device).float()

    @torch.no_grad()
    def _target(self, source: Shards, clip: int) -> Tensor:
        """The frames of one clip, float16 on the host."""
        key = source.folder, clip
        if key in self._targets:
            return self._targets[key]
        latents = source.read([clip], self.config.frames)[0].to(next(self.vae.parameters()).device)
        target = self.vae.decode(latents).half().cpu()
        if sum(kept.nbytes for kept in self._targets.values()) + target.nbytes <= self.config.remember * 1e9:
            self._targets[key] = target
        return target

    def _cropped(self, latents: Tensor, target: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """The same random square of both, another one for every clip."""
        side, scale = self.config.crop, self.decoder.config.scale_factor_spatial
        tops, lefts = (draws.choice(size - side + 1).tolist() for size in latents.shape[3:])
        parts = [(latents[i, :, :, top : top + side, left : left + side],
                  target[i, :, :, top * scale : (top + side) * scale, left * scale : (left + side) * scale])
                 for i, (top, left) in enumerate(zip(tops, lefts, strict=True))]  # fmt: skip
        cut = [torch.stack(part) for part in zip(*parts, strict=True)]
        return cut[0], cut[1]

    def errors(self, made: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The terms of the loss, weighted: frames [B, 3, T, H, W] made and wanted."""
        error, config = made - target, self.config
        parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
        if config.edges:
            parts["edges"] = config.edges * torch.stack([error.diff(dim=dim).abs().mean() for dim in (3, 4)]).mean()
        if config.motion:
            parts["motion"] = config.motion * error.diff(dim=2).abs().mean()
        return parts

    @torch.no_grad()
    def report(self) -> dict[str, dict[str, float]]:
        """On what was held back, clip by clip: PSNR in dB, and the mean change from frame to frame of both decoders."""
        found = {}
        for name, source in (("clips", self.data), ("streams", self.streams)):
            if source is None:
                continue
            squares, changes = list[Tensor](), list[Tensor]()
            for clip in range(len(source) - self.config.held, len(source)):
                latents, target = self.pair(source, [clip])
                made = self.decoder.decode(latents).float()
                squares.append((made - target).square().mean())
                changes.append(torch.stack([video.diff(dim=2).abs().mean() for video in (made, target)]))
            own, model = torch.stack(changes).mean(0).tolist()
            psnr = 10 * math.log10(PEAK**2 / float(torch.stack(squares).mean()))
            found[name] = {"psnr": psnr, "change": own, "change_of_model": model}
        return found


def save_tiny(folder: Path, decoder: TinyVAE) -> None:
    """Write config.json and the weights, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.detach().half().cpu().contiguous() for name, value in decoder.state_dict().items()}
    with whole_file(folder / "diffusion_pytorch_model.safetensors") as part:
        save_file(weights, part, {"format": "pt"})
    write_json(folder / "config.json", {"_class_name": "TinyVAE"} | asdict(decoder.config))


def train(
    config: TinyDecoderConfig,
    out: Path,
    board: Path | None = None,
    stop_at: int | None = None,
    accelerator: Accelerator | None = None,
) -> TinyDecoder:
    """Train, or resume. A complete run also writes the averaged decoder and its report."""
    accelerator = accelerator or accelerator_of(config)
    pipeline = engine.load(config.model, device=str(accelerator.device), precision=config.precision, eager=True)
    data = Shards(Path(config.data))
    torch.manual_seed(config.seed)  # every process starts from the same weights
    vae = pipeline.stages.modules()["vae"]
    assert isinstance(vae, VAE)
    objective = TinyDecoder(config, vae, data)
    if config.streams:
        objective.streams = stream_clips(pipeline, config, data, out / "streams", accelerator)
    averaged = fit(objective, config, out, accelerator, board, stop_at)
    if accelerator.is_main_process and (stop_at is None or stop_at >= config.steps):
        objective.decoder.load_state_dict(averaged)
        save_tiny(out / TINY_VAE, objective.decoder)
        report = objective.report()
        write_json(out / "report.json", report)
        print(json.dumps(report), flush=True)
    return objective


def run(config: TinyDecoderConfig, options: TinyDecoderOptions) -> None:
    train(config, options.out, options.board)


STAGE = Stage(TinyDecoderOptions, run, TinyDecoderConfig, "tiny_decoder")
