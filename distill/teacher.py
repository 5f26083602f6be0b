"""Train the bidirectional teacher and its text encoder on the latent bank; resumes from --out.

    python -m distill.teacher --config distill/configs/sprites.toml --out runs/teacher

Images first, then clips. Every clip of a batch gets its noise levels in one of three ways: independent per frame, a
clean prefix of random length (t = 0, not in the loss), or one level for the clip. The mixture is what makes motion
follow the prompt, and it lets the same teacher judge a frame after a clean past.
Writes --out/teacher/{transformer,text_encoder,tokenizer} in the stock layouts.
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from distill.codec import Codec
from distill.latents import Bank
from distill.sampling import contact_sheet, joint_flow, sample_joint, shifted
from distill.tasks import find_task
from distill.text import build_text_encoder, build_tokenizer, encode
from distill.training import (
    Ema,
    Progress,
    load_config,
    load_state,
    parse_arguments,
    run_stage,
    save_state,
    set_lr,
    trapezoid,
)
from engine.config import TransformerConfig
from engine.transformer import TextKV, WanTransformer

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
class TeacherConfig:
    task: str = "sprites"
    start: str = ""  # teacher to go on from; none begins anew
    bank: str = "runs/bank"
    vae: str = "runs/vae/vae"
    image_steps: int = 1200
    steps: int = 10000  # all of them, images included
    images: int = 64
    # Latent frames and clips of successive steps, until the late share of the run and in it.
    cycle: tuple[tuple[int, int], ...] = ((5, 8), (2, 20), (9, 5), (3, 13), (5, 8), (1, 40), (9, 5), (3, 13))
    late_cycle: tuple[tuple[int, int], ...] = ((9, 5), (5, 8), (9, 5), (3, 13), (9, 5), (1, 40))
    late_share: float = 0.4
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.997
    caption_dropout: float = 0.1
    image_shift: float = 2.0
    video_shift: float = 3.0
    independent: float = 0.3  # share of clips with a noise level per frame
    prefix: float = 0.4  # share of clips with a clean prefix
    seed: int = 0
    save_every: int = 250
    score_every: int = 1500
    log_every: int = 25


class Teacher(nn.Module):
    """The transformer and the text encoder that is trained with it."""

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
        """Write the stock diffusers and transformers layouts, in float16: a student is trained on what ships."""
        stock = WanTransformer3DModel(**asdict(self.transformer.config), rope_max_seq_len=1024)
        stock.load_state_dict(self.transformer.state_dict())
        stock.half().save_pretrained(folder / "transformer")
        copy.deepcopy(self.text_encoder).half().save_pretrained(folder / "text_encoder")
        build_tokenizer().save_pretrained(folder / "tokenizer")


def load_teacher(folder: Path) -> Teacher:
    """Read a trained teacher from its stock layout, frozen, with today's tokenizer; new words get fresh embeddings."""
    shape = TransformerConfig.from_dict(json.loads((folder / "transformer" / "config.json").read_text()))
    teacher = Teacher(shape)
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    teacher.transformer.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").float()
    teacher.text_encoder = encoder
    if encoder.config.vocab_size < len(teacher.tokenizer):
        encoder.resize_token_embeddings(len(teacher.tokenizer), mean_resizing=False)
    return teacher.eval().requires_grad_(False)


def draw_times(
    clips: int, frames: int, shift: float, config: TeacherConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Noise levels t [clips, frames] in [0, 1] and loss weights [clips, frames] (0 on a clean prefix)."""

    def draw(*shape: int) -> Tensor:
        uniform = torch.rand(shape, generator=generator)
        normal = torch.sigmoid(torch.randn(shape, generator=generator))
        pick = torch.rand(shape, generator=generator) < 0.25
        return shifted(torch.where(pick, uniform, normal), shift)

    shared = draw(clips, 1).expand(clips, frames)
    if frames == 1:
        return shared.clone(), torch.ones(clips, 1)
    kind = torch.rand(clips, 1, generator=generator)
    t = torch.where(kind < config.independent, draw(clips, frames), shared)
    length = torch.randint(1, frames, (clips, 1), generator=generator)
    clean = (kind > 1 - config.prefix) & (torch.arange(frames) < length)
    return t.masked_fill(clean, 0.0), (~clean).float()


def batch_shape(step: int, config: TeacherConfig) -> tuple[int, int]:
    """Latent frames and clips of a step."""
    if step < config.image_steps:
        return 1, config.images
    late = step >= config.steps * (1 - config.late_share)
    cycle = config.late_cycle if late else config.cycle
    frames, clips = cycle[step % len(cycle)]
    return frames, clips


def loss_of(teacher: Teacher, bank: Bank, step: int, config: TeacherConfig, generator: torch.Generator) -> Tensor:
    """Flow matching (Eq. 3, 4) on one random batch."""
    frames, clips = batch_shape(step, config)
    latent, captions = bank.draw(clips, frames, generator)
    dropped = torch.rand(clips, generator=generator) < config.caption_dropout
    captions = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
    shift = config.image_shift if frames == 1 else config.video_shift
    t, weight = draw_times(clips, frames, shift, config, generator)
    noise = torch.randn(latent.shape, generator=generator)
    level = t[:, None, :, None, None]
    flow = joint_flow(teacher.transformer, (1 - level) * latent + level * noise, t, teacher.prepare(captions))
    error = (flow - (noise - latent)).square().mean((1, 3, 4))
    return (error * weight).sum() / weight.sum()


def optimizers_of(teacher: Teacher, config: TeacherConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    named = list(teacher.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and ".blocks." in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=config.lr,
            momentum=0.95,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(rest, lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay),
    ]


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
    """Scores of generated clips of `frames` latent frames by the task's own evaluator."""
    task = find_task(name)
    specs = task.draw(count, seed, hidden=hidden)
    videos = generate(teacher, codec, [spec.caption for spec in specs], frames, seed + 1)
    if sheet is not None:
        contact_sheet(videos[:12], sheet)
    return task.score(list(videos), specs)


def train(config: TeacherConfig, out: Path, board: Path | None = None, stop_at: int | None = None) -> Teacher:
    """Run (or go on with) the training and return the averaged teacher; `stop_at` ends it early, as a kill would."""
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed + 1)
    bank, averaged = Bank.load(Path(config.bank)), Teacher().eval()
    teacher = load_teacher(Path(config.start)).train().requires_grad_() if config.start else Teacher()
    optimizers, ema = optimizers_of(teacher, config), Ema(dict(teacher.named_parameters()), config.ema)
    codec = Codec(AutoencoderKLWan.from_pretrained(config.vae)) if config.score_every else None
    first = 0
    if state := load_state(out / "state.pt"):
        teacher.load_state_dict(state["teacher"])
        ema.load(state["ema"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        first = state["step"]
    progress = Progress("teacher", config.steps, config.log_every, board)
    for step in range(first, min(config.steps, stop_at or config.steps)):
        set_lr(optimizers, config.lr * trapezoid(step, config.steps, config.warmup, config.decay))
        loss = loss_of(teacher, bank, step, config, generator)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), config.clip)
        for optimizer in optimizers:
            optimizer.step()
        ema.update(step)
        done = step + 1
        progress.update(done, loss.item())
        if done % config.save_every == 0 or done == config.steps:
            state = {
                "teacher": teacher.state_dict(),
                "ema": ema.mean,
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "generator": generator.get_state(),
                "step": done,
            }
            save_state(out / "state.pt", state)
        if codec is not None and (done % config.score_every == 0 or done == config.image_steps):
            averaged.load_state_dict(ema.mean, strict=False)
            frames = 1 if done <= config.image_steps else bank.frames
            sheet = out / f"step{done:05d}.png"
            scores = score(averaged, codec, config.task, 20, frames, 77, hidden=False, sheet=sheet)
            print(f"teacher {done}", {k: v["mean"] for k, v in scores.items()}, flush=True)
    averaged.load_state_dict(ema.mean, strict=False)
    return averaged


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/teacher")
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "teacher", TeacherConfig)
    teacher = train(config, arguments.out, arguments.out if arguments.tensorboard else None)
    teacher.save(arguments.out / "teacher")
    codec = Codec(AutoencoderKLWan.from_pretrained(config.vae))
    frames = Bank.load(Path(config.bank)).frames
    scores = score(teacher, codec, config.task, 64, frames, 4242, hidden=True, sheet=arguments.out / "final.png")
    (arguments.out / "report.json").write_text(json.dumps(scores, indent=1))
    print(json.dumps(scores))


if __name__ == "__main__":
    run_stage(main)
