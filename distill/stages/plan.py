"""The cost of next_chunk, consistency, rl or dmd at full size, without running it: models on the meta device, counted.

    python -m distill next_chunk --config distill/configs/wan2.1-1.3b.toml --dry-run

Parameters and optimiser states are exact counts. FLOPs follow the code: dense products and attention, two operations
per multiply-add. Activation memory is an estimate of the tensors kept for the backward pass. No number here is a
measurement on the hardware that the config names.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch

from distill.models.critic import Critic
from distill.models.student import Student
from distill.stages.consistency import ConsistencyConfig
from distill.stages.dmd import DmdConfig, discriminator_of, presets_of
from distill.stages.next_chunk import NextChunkConfig
from distill.stages.rl import RlConfig
from distill.training.loop import FitConfig, split
from engine.config import TransformerConfig
from engine.model.transformer import WanTransformer
from engine.options import option, read_table

GIB = 1 << 30


@dataclass(frozen=True)
class ClusterConfig:
    """The table [cluster]: machine, model and data of a plan. Only --dry-run reads it."""

    gpus: int = option(64, "number of GPUs")
    memory_gib: float = option(80.0, "memory per GPU")
    tflops: float = option(400.0, "sustained 16-bit TFLOP/s per GPU: an assumption, not a measurement")
    transformer: str = option("", "config.json of the transformer; empty: Wan2.1-T2V-1.3B")
    text_encoder_gib: float = option(10.6, "UMT5-xxl's encoder in bf16")
    text_embedding_gib: float = option(2.0, "its embedding, which every GPU holds whole")
    text_rows: int = option(512, "text rows per prompt")
    height: int = option(60, "latent pixels")
    width: int = option(104, "latent pixels")
    frames: int = option(21, "latent frames per clip")
    clips: int = option(100_000, "clips of the data, for the length of an epoch")


@dataclass(frozen=True)
class Plan:
    """A stage's cost: memory in bytes per GPU, FLOPs per step over all GPUs."""

    parameters: int
    trained: int
    weights: int
    optimiser: int
    activations: int
    tokens: int
    flops: float
    seconds: float
    steps_an_epoch: int

    @property
    def memory(self) -> int:
        return self.weights + self.optimiser + self.activations


def forward_flops(config: TransformerConfig, tokens: int, pairs: int, rows: int, prompts: int) -> float:
    """One forward pass over `tokens` tokens in `prompts` clips, with `pairs` query-key pairs of self-attention."""
    dim, layers = config.dim, config.num_layers
    linear = 8 * dim * dim + 4 * dim * config.ffn_dim + 4 * dim * dim  # self-attention, feed-forward, cross q and o
    return layers * (tokens * linear + 4 * dim * (pairs + tokens * rows) + prompts * rows * 4 * dim * dim)


def _passes(config: TransformerConfig, made: NextChunkConfig, n: int, frames: int, rows: int) -> tuple[float, float]:
    """FLOPs of the teacher-forced student and of the teacher, for one clip of `frames` frames of n tokens."""
    etm = sum(min(i, made.window) + 1 for i in range(frames - 1)) * n * n
    sdd = (sum(min(i, 1) + 1 for i in range(frames - 1)) + sum(min(i, 2) + 1 for i in range(frames))) * n * n
    student = forward_flops(config, (2 * frames - 1) * n, sdd, rows, 1)
    if made.etm:
        student += forward_flops(config, (frames - 1) * n, etm, rows, 1)
    return student, forward_flops(config, frames * n, frames * frames * n * n, rows, 1)


def _one_frame(config: TransformerConfig, made: NextChunkConfig, n: int, rows: int, steps: float) -> float:
    """FLOPs to stream one frame: ETM, context and denoising steps, each over a constant number of keys."""
    etm = forward_flops(config, n, (made.window + 1) * n * n, rows, 0)
    sdd = forward_flops(config, n, 2 * n * n, rows, 0) + steps * forward_flops(config, n, 3 * n * n, rows, 0)
    return etm * made.etm + sdd


@dataclass(frozen=True)
class _Work:
    """A step's work on one clip: tokens whose activations are kept for the backward pass, and FLOPs."""

    sequence: int
    flops: float


def _next_chunk(config: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int) -> _Work:
    parallel, _ = _passes(shape, config, n, frames, rows)
    first, alone = config.first_batch / config.batch, forward_flops(shape, n, n * n, rows, 1)
    guided = 2 * config.substeps * alone if config.first == "guided" else 0.0
    one = _one_frame(shape, config, n, rows, config.sampling_steps)
    rolled = config.roll_share * (1 - config.roll_from) * (frames - 2) * one
    through = 1 + _backward(config)
    return _Work((3 * frames - 2) * n, parallel * through + first * (alone * through + guided) + rolled)


def _consistency(
    config: ConsistencyConfig, made: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int
) -> _Work:
    parallel, _ = _passes(shape, made, n, frames, rows)
    target = (2 + (config.guidance != 1)) * (1 - 1 / config.levels)  # teacher and average; none at the last level
    return _Work((3 * frames - 2) * n, parallel * (1 + _backward(config) + target))


def _rl(config: RlConfig, made: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int) -> _Work:
    middle, (_, joint) = frames // 2, _passes(shape, made, n, frames, rows)
    past = forward_flops(shape, middle * n, (made.window + 1) * middle * n * n, rows, 1)
    step = past * made.etm + forward_flops(shape, 3 * n, 6 * n * n, rows, 1)
    judge = step * (2 + _backward(config) if config.critic == "trained" else 1)
    real = 2 * joint * (middle + 1) / frames
    rolled = (middle + 0.5) * _one_frame(shape, made, n, rows, made.sampling_steps)
    return _Work((middle + 3) * n, rolled + step * (1 + _backward(config)) + judge + real)


def _dmd(config: DmdConfig, made: NextChunkConfig, shape: TransformerConfig, n: int, frames: int, rows: int) -> _Work:
    length = max(config.rollout, frames)
    parallel, _ = _passes(shape, made, n, length, rows)
    _, joint = _passes(shape, made, n, frames, rows)
    counts = [len(preset.steps[-1]) for preset in presets_of(config, made)]
    rolled = length * _one_frame(shape, made, n, rows, (mean(counts) + 1) / 2)  # a drawn exit is half way
    sid, through = config.loss == "sid", 1 + _backward(config)
    learning = parallel * through + 3 * joint * (through if sid else 1)
    judged = 0  # clips that the discriminator sees, whose activations are kept
    if config.adversarial:
        judged = 4 if config.r1 or config.r2 else 2
        learning += joint * through
        if config.opponent == "next":  # the smallest number of steps is nobody's next one
            rolled += sum(length * _one_frame(shape, made, n, rows, count) for count in counts[1:]) / len(counts)
    flops = rolled + learning / config.critic_every + joint * through * (1 + judged)
    return _Work((3 * length - 2 + frames * (1 + 3 * sid + judged + (judged > 0))) * n, flops)


def _backward(config: FitConfig) -> float:
    """A backward pass counts as two forward passes, and one more where blocks are recomputed."""
    return 3.0 if config.recompute else 2.0


def estimate(config: FitConfig, made: NextChunkConfig, cluster: ClusterConfig) -> Plan:
    """The plan of a stage by its config. `made` is the next-chunk config of its student."""
    shape = TransformerConfig()
    if cluster.transformer:
        shape = TransformerConfig.from_dict(json.loads(Path(cluster.transformer).read_text()))
    with torch.device("meta"):
        teacher = WanTransformer(shape).to(config.dtype)
        critic = head = None
        if isinstance(config, DmdConfig):
            critic = Critic(teacher, config.critic_rank)
            head = discriminator_of(config, made, shape)
        student = Student(teacher, made.rank, made.window, made.max_position, etm=made.etm)
    frozen = sum(p.numel() for p in student.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in student.trained().values())
    base = sum(p.numel() for p in teacher.parameters())
    _, ph, pw = shape.patch_size
    n = (cluster.height // ph) * (cluster.width // pw)
    rows, frames = cluster.text_rows, min(config.frames, cluster.frames)  # type: ignore[attr-defined]
    micro = len(split(config.batch, config.micro, 0, cluster.gpus)[0])
    started = 0  # trained weights that are kept as they began
    if critic is not None:
        work = _dmd(config, made, shape, n, frames, rows)
        critic_trained = sum(p.numel() for p in critic.trained().values())
        critic_frozen = sum(p.numel() for p in critic.parameters()) - critic_trained
        if head is not None:
            critic_trained += sum(p.numel() for p in head.parameters())
    elif isinstance(config, RlConfig):
        work, beside = _rl(config, made, shape, n, frames, rows), config.critic == "trained"
        critic_trained, critic_frozen = trained * beside, frozen * beside
    elif isinstance(config, ConsistencyConfig):
        work, critic_trained, critic_frozen = _consistency(config, made, shape, n, frames, rows), 0, 0
        started = trained
    else:
        work, critic_trained, critic_frozen = _next_chunk(made, shape, n, frames, rows), 0, 0
    width, sequence, learnt = 2 if config.precision == "bf16" else 4, work.sequence, trained + critic_trained
    kept = sequence * shape.dim * shape.num_layers * width
    # Whole blocks keep norms, projections, attention and feed-forward; recomputed blocks keep only their input.
    kept *= 1 if config.recompute else 14 + 2 * shape.ffn_dim // shape.dim
    peak = sequence * (14 * shape.dim + 2 * shape.ffn_dim) * width if config.recompute else 0
    flops = work.flops * config.batch
    embedding = cluster.text_embedding_gib * GIB
    held = (frozen + critic_frozen + base) * width + cluster.text_encoder_gib * GIB - embedding
    return Plan(
        parameters=frozen + critic_frozen + base + learnt,
        trained=learnt,
        weights=int(held / (cluster.gpus if config.shard else 1) + embedding) + 4 * (learnt + started),
        # Gradient, two moments, and the buckets in which several processes average gradients; the moving average.
        optimiser=learnt * 4 * (3 + (cluster.gpus > 1)) + 4 * trained,
        activations=micro * (kept + peak),
        tokens=sequence * config.batch,
        flops=flops,
        seconds=flops / (cluster.gpus * cluster.tflops * 1e12),
        steps_an_epoch=-(-cluster.clips // config.batch),
    )


def report(path: Path, stage: str, config: NextChunkConfig | ConsistencyConfig | RlConfig | DmdConfig) -> None:
    """Print the plan, last as JSON. A plan that does not fit raises ValueError."""
    cluster = read_table(ClusterConfig, path, "cluster")
    made = config if isinstance(config, NextChunkConfig) else read_table(NextChunkConfig, path, "next_chunk")
    plan = estimate(config, made, cluster)
    lines = {
        "parameters": f"{plan.parameters / 1e9:.2f} G held, {plan.trained / 1e6:.1f} M trained",
        "memory per GPU": f"{plan.memory / GIB:.1f} GiB = weights {plan.weights / GIB:.1f} + optimiser "
        f"{plan.optimiser / GIB:.1f} + activations {plan.activations / GIB:.1f} (estimated)",
        "tokens per step": f"{plan.tokens / 1e6:.2f} M",
        "FLOPs per step": f"{plan.flops / 1e15:.1f} P",
        "time per step": f"{plan.seconds:.1f} s at {cluster.tflops:g} TFLOP/s on each of {cluster.gpus} GPUs (assumed)",
        "epoch": f"{plan.steps_an_epoch} steps of {cluster.clips} clips; {config.steps} steps are "
        f"{config.steps / plan.steps_an_epoch:.1f} epochs, {config.steps * plan.seconds / 3600:.0f} h",
    }
    for name, text in lines.items():
        print(f"{name:>15}  {text}")
    print(json.dumps({"stage": stage, **asdict(plan), "memory": plan.memory}))
    if plan.memory > cluster.memory_gib * GIB:
        raise ValueError(
            f"memory: got {plan.memory / GIB:.1f} GiB per GPU, expected at most {cluster.memory_gib:g} "
            "(smaller micro, recompute = true, precision = 'bf16', shard = true)"
        )
