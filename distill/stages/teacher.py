"""Train the bidirectional teacher and its text encoder on the latent bank; resumes from --out.

    python -m distill teacher --config distill/configs/sprites.toml --out runs/teacher
    torchrun --nproc_per_node 2 -m distill teacher --config ... --out ...

Images come first, then clips. Every clip gets its noise levels sigma in one of three ways: one per frame, a clean
prefix of random length (sigma = 0, not in the loss), or one for the whole clip. This mixture makes motion follow the
prompt, and it lets the same teacher judge a frame after a clean past.
Writes --out/teacher/{transformer,text_encoder,tokenizer} in the stock layouts.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from distill.data.text_encoder import build_text_encoder, build_tokenizer, encode
from distill.models.codec import Codec
from distill.models.pretrained import pretrained
from distill.models.sampling import contact_sheet, joint_flow, noised, sample_joint, shifted
from distill.scores.tasks import find_task
from distill.stages.latents import Bank
from distill.training.draws import Draws
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from distill.training.stage import Stage, TrainingOptions
from engine.config import TransformerConfig
from engine.files import write_json
from engine.model.transformer import TextKV, WanTransformer
from engine.options import option

SPRITES = TransformerConfig(
    patch_size=(1, 1, 1),
    num_attention_heads=4,
    attention_head_dim=32,
    in_channels=8,
    out_channels=8,
    text_dim=64,
    freq_dim=128,
    ffn_dim=512,
    num_layers=4,
)


@dataclass(frozen=True)
class TeacherConfig(FitConfig):
    """The table [teacher]."""

    task: str = option("sprites", "task that scores the teacher: sprites or scenes")
    start: str = option("", "teacher to start from; empty: a new one")
    bank: str = option("runs/bank", "folder of captioned latents that stage latents wrote")
    vae: str = option("runs/vae/vae", "VAE that decodes clips to score")
    image_steps: int = option(1200, "first steps, on images only")
    steps: int = option(10000, "optimiser steps, images included")
    batch: int = option(64, "images per step; `cycle` sets the number of clips")
    cycle: tuple[tuple[int, int], ...] = option(
        ((5, 8), (2, 20), (9, 6), (3, 14), (5, 8), (1, 40), (9, 6), (3, 14)),
        "latent frames and clips of successive steps",
    )
    late_cycle: tuple[tuple[int, int], ...] = option(
        ((9, 6), (5, 8), (9, 6), (3, 14), (9, 6), (1, 40)), "the same for the last `late_share` of the steps"
    )
    late_share: float = option(0.4, "share of the steps that take `late_cycle`")
    lr: float = option(2e-3, "highest learning rate")
    warmup: int = option(100, "steps of linear warm-up")
    decay: float = option(0.4, "share of the steps over which the learning rate falls")
    weight_decay: float = option(0.01, "of Muon and AdamW")
    ema: float = option(0.997, "decay of the moving average of the trained weights")
    caption_dropout: float = option(0.1, "share of the samples that train without a caption")
    image_shift: float = option(2.0, "shift of the noise levels of images")
    video_shift: float = option(3.0, "shift of the noise levels of clips")
    independent: float = option(0.3, "share of the clips with one noise level per frame")
    prefix: float = option(0.4, "share of the clips with a clean prefix")
    save_every: int = option(250, "steps between two checkpoints")
    score_every: int = option(1500, "steps between two scores; 0: never score")
    log_every: int = option(25, "steps between two progress lines")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard or self.recompute:
            raise ValueError("got shard or recompute, expected neither: a teacher this small needs none")


@dataclass(frozen=True)
class TeacherOptions(TrainingOptions):
    out: Path = option(Path("runs/teacher"), "folder of checkpoints, logs and the teacher")


class Teacher(nn.Module):
    """A transformer and a text encoder, trained together."""

    def __init__(self, config: TransformerConfig = SPRITES) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerBase = build_tokenizer()
        self.transformer = WanTransformer(config)
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        nn.init.zeros_(self.transformer.proj_out.weight)
        nn.init.zeros_(self.transformer.proj_out.bias)

    def encode(self, captions: list[str]) -> Tensor:
        """Captions -> text_emb [B, rows, text_dim]."""
        return encode(self.tokenizer, self.text_encoder, captions)

    def prepare(self, captions: list[str]) -> TextKV:
        """Captions -> cross-attention K, V."""
        return self.transformer.prepare_text(self.encode(captions))

    def save(self, folder: Path) -> None:
        """Write the stock layouts of diffusers and transformers, in float16: a student trains on shipped weights."""
        stock = WanTransformer3DModel(**asdict(self.transformer.config), rope_max_seq_len=1024)
        stock.load_state_dict(self.transformer.state_dict())
        stock.half().save_pretrained(folder / "transformer")
        copy.deepcopy(self.text_encoder).half().save_pretrained(folder / "text_encoder")
        build_tokenizer().save_pretrained(folder / "tokenizer")


def load_teacher(folder: Path) -> Teacher:
    """Read a trained teacher from its stock layout, frozen, with today's tokenizer. New words get fresh embeddings."""
    shape = TransformerConfig.from_dict(json.loads((folder / "transformer" / "config.json").read_text()))
    teacher = Teacher(shape)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    teacher.transformer.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    encoder = pretrained(UMT5EncoderModel, folder / "text_encoder").float()
    teacher.text_encoder = encoder
    if encoder.config.vocab_size < len(teacher.tokenizer):
        encoder.resize_token_embeddings(len(teacher.tokenizer), mean_resizing=False)
    return teacher.eval().requires_grad_(False)


def draw_sigmas(frames: int, shift: float, config: TeacherConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """Noise levels sigma [B, frames] and loss weights [B, frames] that sum to 1 (0 on a clean prefix)."""

    def draw(count: int) -> Tensor:
        normal = torch.sigmoid(draws.normal(count))
        return shifted(torch.where(draws.uniform(count) < 0.25, draws.uniform(count), normal), shift)

    sigma = draw(1).expand(-1, frames)
    if frames == 1:
        return sigma, torch.ones_like(sigma)
    kind = draws.uniform(1)
    sigma = torch.where(kind < config.independent, draw(frames), sigma)
    length = 1 + draws.choice(frames - 1, 1)
    clean = (kind > 1 - config.prefix) & (torch.arange(frames) < length)
    judged = (~clean).float()
    return sigma.masked_fill(clean, 0.0), judged / judged.sum(1, keepdim=True)


def batch_shape(step: int, config: TeacherConfig) -> tuple[int, int]:
    """Latent frames and clips of a step."""
    if step < config.image_steps:
        return 1, config.batch
    late = step >= config.steps * (1 - config.late_share)
    cycle = config.late_cycle if late else config.cycle
    frames, clips = cycle[step % len(cycle)]
    return frames, clips


class FlowMatching(Objective):
    """Flow matching (Eq. 3, 4) on some samples of a step."""

    def __init__(self, config: TeacherConfig, bank: Bank) -> None:
        super().__init__()
        self.config, self.bank = config, bank
        self.teacher = load_teacher(Path(config.start)).train().requires_grad_() if config.start else Teacher()

    def groups(self) -> dict[str, tuple[dict[str, nn.Parameter], float]]:
        return {"teacher": (dict(self.teacher.named_parameters()), 1.0)}

    def optimizers(self, config: FitConfig) -> list[torch.optim.Optimizer]:
        """Muon for the matrices of the blocks, AdamW for the rest."""
        named = self.teacher.named_parameters()
        matrices, rest = [], []
        for name, parameter in named:
            (matrices if parameter.ndim == 2 and ".blocks." in name else rest).append(parameter)
        shared: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
        return [
            torch.optim.Muon(matrices, momentum=0.95, adjust_lr_fn="match_rms_adamw", **shared),
            torch.optim.AdamW(rest, betas=(config.betas[0], config.betas[1]), **shared),
        ]

    def batch(self, step: int, config: FitConfig) -> int:
        return batch_shape(step, self.config)[1]

    def forward(self, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        config, frames = self.config, batch_shape(draws.step, self.config)[0]
        latent, captions = self.bank.draw(draws, frames)
        dropped = draws.uniform() < config.caption_dropout
        captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
        sigma, weight = draw_sigmas(frames, config.image_shift if frames == 1 else config.video_shift, config, draws)
        device = self.teacher.transformer.proj_out.weight.device
        latent, sigma, weight = (part.to(device) for part in (latent, sigma, weight))
        noise = draws.normal(*latent.shape[1:]).to(device)
        flow = joint_flow(self.teacher.transformer, noised(latent, noise, sigma), sigma, self.teacher.prepare(captions))
        error = (flow - (noise - latent)).square().mean((1, 3, 4))
        return (error * weight).sum(1).mean(), {}


@torch.no_grad()
def generate(
    teacher: Teacher,
    codec: Codec,
    captions: list[str],
    frames: int,
    seed: int,
    scale: float = 2.0,
    steps: int = 20,
) -> Tensor:
    """Videos [N, 3, 4 * frames - 3, 32, 32] of captions, with classifier-free guidance."""
    generator = torch.Generator().manual_seed(seed)
    config, videos = teacher.transformer.config, []
    for i in range(0, len(captions), 16):
        part = captions[i : i + 16]
        noise = torch.randn(len(part), config.in_channels, frames, 8, 8, generator=generator)
        text, empty = teacher.prepare(part), teacher.prepare([""] * len(part))
        videos.append(codec.decode(sample_joint(teacher.transformer, text, empty, noise, scale=scale, steps=steps)))
    return torch.cat(videos)


def score(
    teacher: Teacher,
    codec: Codec,
    name: str,
    count: int,
    frames: int,
    seed: int,
    *,
    hidden: bool,
    sheet: Path | None = None,
) -> dict[str, dict[str, float]]:
    """The task's scores of generated clips of `frames` latent frames."""
    task = find_task(name)
    specs = task.draw(count, seed, hidden=hidden)
    videos = generate(teacher, codec, [spec.caption for spec in specs], frames, seed + 1)
    if sheet is not None:
        contact_sheet(videos[:12], sheet)
    return task.score(list(videos), specs)


def train(
    config: TeacherConfig,
    out: Path,
    board: Path | None = None,
    stop_at: int | None = None,
    accelerator: Accelerator | None = None,
) -> Teacher:
    """Train, or resume, and return the averaged teacher. `stop_at` ends the run early, as a kill would."""
    bank, averaged = Bank.load(Path(config.bank)), Teacher().eval()
    accelerator = accelerator or accelerator_of(config)
    codec = None
    if config.score_every and accelerator.is_main_process:
        codec = Codec(pretrained(AutoencoderKLWan, config.vae))
    torch.manual_seed(config.seed)  # every process starts from the same weights
    objective = FlowMatching(config, bank)

    def watch(done: int, mean: dict[str, Tensor]) -> None:
        if codec is None or (done % config.score_every and done != config.image_steps):
            return
        averaged.load_state_dict(mean, strict=False)
        frames, sheet = 1 if done <= config.image_steps else bank.frames, out / f"step{done:05d}.png"
        found = score(averaged, codec, config.task, 32, frames, 77, hidden=False, sheet=sheet)
        print(f"teacher {done}", {name: value["mean"] for name, value in found.items()}, flush=True)

    mean = fit(objective, config, out, accelerator, board, stop_at, watch)
    averaged.load_state_dict(mean, strict=False)
    return averaged


def run(config: TeacherConfig, options: TeacherOptions) -> None:
    """Train, then write the teacher and its scores on held-out captions."""
    accelerator = accelerator_of(config)
    teacher = train(config, options.out, options.board, None, accelerator)
    if not accelerator.is_main_process:
        return
    teacher.save(options.out / "teacher")
    if not config.score_every:
        return
    codec = Codec(pretrained(AutoencoderKLWan, config.vae))
    frames = Bank.load(Path(config.bank)).frames
    scores = score(teacher, codec, config.task, 64, frames, 4242, hidden=True, sheet=options.out / "final.png")
    write_json(options.out / "report.json", scores)
    print(json.dumps(scores))


STAGE = Stage(TeacherOptions, run, TeacherConfig, "teacher")
