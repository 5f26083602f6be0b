"""Train the bidirectional teacher and its text encoder on the latent bank; resumes from --out.

    python -m distill.teacher --config distill/configs/sprites.toml --out runs/teacher
    torchrun --nproc_per_node 2 -m distill.teacher --config ... --out ...

Images first, then clips. Every clip of a batch gets its noise levels in one of three ways: independent per frame, a
clean prefix of random length (t = 0, not in the loss), or one level for the clip. The mixture is what makes motion
follow the prompt, and it lets the same teacher judge a frame after a clean past.
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
from distill.models.sampling import contact_sheet, joint_flow, noised, sample_joint, shifted
from distill.scores.tasks import find_task
from distill.stages.latents import Bank
from distill.training.draws import Draws
from distill.training.loop import FitConfig, Objective, accelerator_of, fit
from distill.training.state import load_config, parse_arguments, run_stage
from engine.config import TransformerConfig
from engine.model.transformer import TextKV, WanTransformer

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
    task: str = "sprites"
    start: str = ""  # teacher to go on from; none begins anew
    bank: str = "runs/bank"
    vae: str = "runs/vae/vae"
    image_steps: int = 1200
    steps: int = 10000  # all of them, images included
    batch: int = 64  # images of a step; clips go by the cycle
    # Latent frames and clips of successive steps, until the late share of the run and in it.
    cycle: tuple[tuple[int, int], ...] = ((5, 8), (2, 20), (9, 6), (3, 14), (5, 8), (1, 40), (9, 6), (3, 14))
    late_cycle: tuple[tuple[int, int], ...] = ((9, 6), (5, 8), (9, 6), (3, 14), (9, 6), (1, 40))
    late_share: float = 0.4
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    ema: float = 0.997
    caption_dropout: float = 0.1
    image_shift: float = 2.0
    video_shift: float = 3.0
    independent: float = 0.3  # share of clips with a noise level per frame
    prefix: float = 0.4  # share of clips with a clean prefix
    save_every: int = 250
    score_every: int = 1500  # 0 never scores
    log_every: int = 25

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shard or self.recompute:
            raise ValueError("got shard or recompute, expected neither: a teacher this small needs none")


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


def draw_times(frames: int, shift: float, config: TeacherConfig, draws: Draws) -> tuple[Tensor, Tensor]:
    """Noise levels t [B, frames] in [0, 1] and loss weights [B, frames] that sum to 1 (0 on a clean prefix)."""

    def draw(count: int) -> Tensor:
        normal = torch.sigmoid(draws.normal(count))
        return shifted(torch.where(draws.uniform(count) < 0.25, draws.uniform(count), normal), shift)

    t = draw(1).expand(-1, frames)
    if frames == 1:
        return t, torch.ones_like(t)
    kind = draws.uniform(1)
    t = torch.where(kind < config.independent, draw(frames), t)
    length = 1 + draws.choice(frames - 1, 1)
    clean = (kind > 1 - config.prefix) & (torch.arange(frames) < length)
    judged = (~clean).float()
    return t.masked_fill(clean, 0.0), judged / judged.sum(1, keepdim=True)


def batch_shape(step: int, config: TeacherConfig) -> tuple[int, int]:
    """Latent frames and clips of a step."""
    if step < config.image_steps:
        return 1, config.batch
    late = step >= config.steps * (1 - config.late_share)
    cycle = config.late_cycle if late else config.cycle
    frames, clips = cycle[step % len(cycle)]
    return frames, clips


class FlowMatching(Objective):
    """Eq. 3, 4 for some samples of a step."""

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
        t, weight = draw_times(frames, config.image_shift if frames == 1 else config.video_shift, config, draws)
        device = self.teacher.transformer.proj_out.weight.device
        latent, t, weight = (part.to(device) for part in (latent, t, weight))
        noise = draws.normal(*latent.shape[1:]).to(device)
        flow = joint_flow(self.teacher.transformer, noised(latent, noise, t), t, self.teacher.prepare(captions))
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
    """Scores of generated clips of `frames` latent frames by the task's own evaluator."""
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
    """Run (or go on with) the training and return the averaged teacher; `stop_at` ends it early, as a kill would."""
    bank, averaged = Bank.load(Path(config.bank)), Teacher().eval()
    accelerator = accelerator or accelerator_of(config)
    codec = None
    if config.score_every and accelerator.is_main_process:
        codec = Codec(AutoencoderKLWan.from_pretrained(config.vae))
    torch.manual_seed(config.seed)  # weights start alike in every process
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


def main() -> None:
    arguments = parse_arguments(__doc__, "runs/teacher")
    torch.set_num_threads(arguments.threads)
    config = load_config(arguments.config, "teacher", TeacherConfig)
    accelerator = accelerator_of(config)
    teacher = train(config, arguments.out, arguments.out if arguments.tensorboard else None, None, accelerator)
    if not accelerator.is_main_process:
        return
    teacher.save(arguments.out / "teacher")
    if not config.score_every:
        return
    codec = Codec(AutoencoderKLWan.from_pretrained(config.vae))
    frames = Bank.load(Path(config.bank)).frames
    scores = score(teacher, codec, config.task, 64, frames, 4242, hidden=True, sheet=arguments.out / "final.png")
    (arguments.out / "report.json").write_text(json.dumps(scores, indent=1))
    print(json.dumps(scores))


if __name__ == "__main__":
    run_stage(main)
