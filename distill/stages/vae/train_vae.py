"""Train the sprites VAE (a stock AutoencoderKLWan) on clips of growing length; resumes from --out.

    python -m distill train_vae --config distill/configs/sprites.toml --out runs/vae

Writes --out/vae/ (diffusers layout, with latents_mean and latents_std) and --out/report.json.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from distill.data import switches
from distill.data.switches import with_switches
from distill.models.codec import LATENT_CHANNELS, build_vae, decode_raw, encode_moments, initialise
from distill.models.pretrained import pretrained
from distill.scores.tasks import find_task
from distill.training.stage import Stage, TrainingOptions
from distill.training.state import Progress, load_state, save_state, set_lr
from engine.files import write_json
from engine.options import option


@dataclass(frozen=True)
class VaeConfig:
    """The table [vae]."""

    task: str = option("sprites", "clips to draw: sprites or scenes")
    start: str = option("", "VAE to start from; empty: a new one")
    decoder_only: bool = option(False, "the encoder stays, so that models of its latents stay valid")
    switch_share: float = option(0.0, "scenes: share of the clips in which the prompt is switched")
    steps: int = option(3000, "optimiser steps")
    lr: float = option(2e-3, "highest learning rate")
    warmup: int = option(50, "steps of linear warm-up")
    weight_decay: float = option(1e-4, "of AdamW")
    foreground_weight: float = option(8.0, "extra weight of the error on objects")
    kl_weight: float = option(2e-4, "weight of the KL term")
    image_share: float = option(0.35, "first share of the steps: single frames only")
    short_share: float = option(0.75, "until this share of the steps: short clips; after it long ones too")
    short: tuple[int, int] = option((5, 8), "frames and clips of a short batch")
    long: tuple[tuple[int, int], ...] = option(((9, 5), (17, 3), (33, 2)), "frames and clips of the long batches")
    images: int = option(16, "images per batch of single frames")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the weights; the data takes the next one")
    save_every: int = option(200, "steps between two checkpoints")
    log_every: int = option(20, "steps between two progress lines")


@dataclass(frozen=True)
class VaeOptions(TrainingOptions):
    out: Path = option(Path("runs/vae"), "folder of checkpoints, logs and the VAE")


def batch_shape(step: int, config: VaeConfig) -> tuple[int, int]:
    """Frames and clips of a step: images first, then short clips, then longer ones. Every fifth step takes images."""
    done = step / config.steps
    if done < config.image_share or step % 5 == 0:
        return 1, config.images
    if done < config.short_share or step % 3:
        return config.short
    return tuple(config.long[step // 3 % len(config.long)])


def loss_of(vae: AutoencoderKLWan, video: Tensor, cover: Tensor, config: VaeConfig) -> Tensor:
    """Foreground-weighted squared and absolute error, plus the KL term."""
    with torch.autocast("cpu", torch.bfloat16):
        with torch.set_grad_enabled(not config.decoder_only):
            mean, log_var = encode_moments(vae, video).float().chunk(2, 1)
        log_var = log_var.clamp(-12, 4)
        latent = mean + torch.exp(0.5 * log_var) * torch.randn_like(mean)
        error = decode_raw(vae, latent).float() - video
    weight = 1 + config.foreground_weight * (cover > 0).float()
    rebuilt = (weight * (error.square() + 0.25 * error.abs())).mean()
    kl = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).mean()
    return rebuilt + config.kl_weight * kl


@torch.no_grad()
def validate(vae: AutoencoderKLWan, name: str, frames: int, count: int, seed: int = 999) -> dict[str, object]:
    """PSNR (all, foreground, foreground per frame) and scores of reconstructed clips of the training side."""
    task = find_task(name)
    specs = task.draw(count, seed)
    video, cover = task.render(specs, frames)
    moments = [encode_moments(vae, part)[:, :LATENT_CHANNELS] for part in video.split(8)]
    rebuilt = torch.cat([decode_raw(vae, part) for part in moments]).clamp(-1, 1)
    square, inside = (rebuilt - video).square(), (cover > 0).float()
    per_frame = (square * inside).sum((0, 1, 3, 4)) / (3 * inside.sum((0, 1, 3, 4)))

    def psnr(error: Tensor) -> float:
        return round(10 * math.log10(4 / float(error)), 2)

    return {
        "psnr": psnr(square.mean()),
        "foreground_psnr": psnr((square * inside).sum() / (3 * inside.sum())),
        "foreground_psnr_per_frame": [psnr(e) for e in per_frame],
        "scores": task.score(list(rebuilt), specs),
    }


@torch.no_grad()
def latent_statistics(
    vae: AutoencoderKLWan, name: str, clips: int = 96, frames: int = 33
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of every latent channel, over training clips."""
    task = find_task(name)
    specs = task.draw(clips, 5)
    parts = [encode_moments(vae, task.render(specs[i : i + 8], frames)[0]) for i in range(0, clips, 8)]
    latent = torch.cat(parts)[:, :LATENT_CHANNELS]
    return latent.mean((0, 2, 3, 4)).tolist(), latent.std((0, 2, 3, 4)).tolist()


def train(config: VaeConfig, out: Path, board: Path | None = None, stop_at: int | None = None) -> AutoencoderKLWan:
    """Train, or resume. `stop_at` ends the run early, as a kill would."""
    torch.manual_seed(config.seed)
    task = find_task(config.task)
    vae = pretrained(AutoencoderKLWan, config.start) if config.start else initialise(build_vae())
    if config.decoder_only:
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    render = switches.render if config.switch_share else task.render
    optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    data = torch.Generator().manual_seed(config.seed + 1)
    first = 0
    if state := load_state(out / "state.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        data.set_state(state["data"])
        first = state["step"]
    progress = Progress("vae", config.steps, config.log_every, board)
    for step in range(first, min(config.steps, stop_at or config.steps)):
        curve = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        set_lr([optimizer], config.lr * curve * min(1.0, (step + 1) / config.warmup))
        frames, clips = batch_shape(step, config)
        specs = task.sample(clips, data)
        if config.switch_share and frames > 1:
            share = float(torch.rand((), generator=data) < config.switch_share)  # a batch is too small for a share
            specs = with_switches(specs, share, data)
        video, cover = render(specs, frames)
        loss = loss_of(vae, video, cover, config)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.clip)
        optimizer.step()
        progress.update(step + 1, loss.item())
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            save_state(
                out / "state.pt",
                {
                    "vae": vae.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "data": data.get_state(),
                    "step": step + 1,
                },
            )
            shown = 1 if frames == 1 and step < config.image_share * config.steps else 17
            score = validate(vae, config.task, shown, 8)
            print("vae", step + 1, {k: score[k] for k in ("psnr", "foreground_psnr")}, flush=True)
    return vae


def run(config: VaeConfig, options: VaeOptions) -> None:
    """Train, then write the VAE and its report."""
    vae = train(config, options.out, options.board).eval()
    if not config.decoder_only:
        mean, std = latent_statistics(vae, config.task)
        vae.register_to_config(latents_mean=mean, latents_std=std)
    vae.save_pretrained(options.out / "vae")
    report = {str(frames): validate(vae, config.task, frames, 32) for frames in (1, 5, 17, 33)}
    write_json(options.out / "report.json", report)
    print(json.dumps(report))


STAGE = Stage(VaeOptions, run, VaeConfig, "vae")
