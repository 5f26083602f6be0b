"""The flashdreams wheel on given weights: the only module that imports it, and the only one that changes it.

A race uses its transformer, its scheduler and its decoder of Wan's VAE. `open_wheel` comes first, in a process of its
own: it puts stand-ins where the wheel imports what a race does not use, and lets it run on a processor.
"""

import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import TransformerConfig
from engine.model.vae import VAEConfig

EXTRA = "pip install 'greedy-stream[race]'"
COMPILE_MODE = "max-autotune-no-cudagraphs"  # the wheel's own, for what it captures in CUDA graphs
STEPS, SHIFT = (1000, 750, 500, 250), 5.0  # as Self-Forcing was trained; the wheel's own recipe has shift 8
CHUNK, WINDOW = 3, 21


def wheel_version() -> str:
    """The installed version. ValueError that names the extra where there is none."""
    try:
        return version("flashdreams")
    except PackageNotFoundError:
        raise ValueError(f"flashdreams: got no installed wheel, expected one ({EXTRA})") from None


def open_wheel(device: torch.device) -> None:
    """Import the wheel. ValueError where it is not installed."""
    wheel_version()
    absent = _stand_ins()
    import flashdreams.recipes.wan  # noqa: F401

    for name in absent:  # other libraries ask whether these are installed
        del sys.modules[name]
    if device.type != "cuda":
        _on_processor()


class _Unused:
    """A class, or a logger, of which the wheel takes the name alone."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def _module(name: str, **names: Any) -> None:
    sys.modules[name] = made = types.ModuleType(name)
    made.__dict__.update(names)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, made)


def _stand_ins() -> list[str]:
    """Stand-ins for what a race does not use; returns those of packages that are not installed.

    These packages read checkpoints in the cloud, write logs, and ask about processors near a GPU.
    """
    made: dict[str, dict[str, Any]] = {
        "boto3": {}, "botocore": {}, "botocore.exceptions": {"ClientError": type("ClientError", (Exception,), {})},
        "loguru": {"logger": _Unused()}, "pynvml": {},
    }  # fmt: skip
    missing = {name for name in ("boto3", "botocore", "loguru", "pynvml") if find_spec(name) is None}
    absent = [name for name in made if name.partition(".")[0] in missing]
    for name in absent:
        _module(name, **made[name])
    # The text and image encoders: a race gives embeddings. To import them takes longer than all else together, because
    # they bring half of transformers, and it fails with versions of it that the engine allows.
    import flashdreams.infra.encoder  # noqa: F401  the parents first

    _module("flashdreams.infra.encoder.text")
    _module("flashdreams.infra.encoder.text.umt5", UMT5TextEncoder=_Unused, UMT5TextEncoderConfig=_Unused)
    _module("flashdreams.infra.encoder.image")
    _module("flashdreams.infra.encoder.image.clip", CLIPImageEncoder=_Unused, CLIPImageEncoderConfig=_Unused)
    return absent


def _on_processor() -> None:
    """Replace the two functions that insist on a GPU: the rotation's Triton kernel, and cuDNN's attention."""
    from flashdreams.core.attention import cp, rope

    def attention(query: Tensor, key: Tensor, value: Tensor, return_lse: bool = False) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(query, key, value), None

    rope.apply_rotary_pos_emb = rotate
    cp.torch_sdpa_cudnn = attention


def rotate(x: Tensor, freqs: Tensor, interleaved: bool = False, inplace: bool = True, **_: Any) -> Tensor:
    """What the kernel computes: x [S, 1, H, D] or [B, S, H, D], angles [S, 1, 1, D] whose pairs are equal."""
    if not interleaved:
        raise ValueError("rotate: got halves, expected interleaved pairs")
    angles = freqs[:, 0, :, 0::2].float()  # [S, 1, D / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2].clone(), x[..., 1::2].clone()
    out = x if inplace else x.clone()
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = odd * cos + even * sin
    return out


def network_settings(config: TransformerConfig, rows: int) -> dict[str, Any]:
    """The wheel's network settings of our transformer's shape, for a prompt's embedding of `rows` rows."""
    return {
        "patch_size": config.patch_size, "text_len": rows, "in_dim": config.in_channels, "dim": config.dim,
        "ffn_dim": config.ffn_dim, "freq_dim": config.freq_dim, "text_dim": config.text_dim,
        "out_dim": config.out_channels, "num_heads": config.num_attention_heads, "num_layers": config.num_layers,
        "cross_attn_norm": config.cross_attn_norm, "eps": config.eps,
    }  # fmt: skip


def network_names(network: Mapping[str, Any]) -> list[str]:
    """The names of the network's tensors, Wan's own."""
    from flashdreams.recipes.wan import WanDiTNetworkConfig

    with torch.device("meta"):
        return list(WanDiTNetworkConfig(**network).setup().state_dict())


def diffusion(
    weights: dict[str, Tensor], network: dict[str, Any], dtype: torch.dtype, *, chunk: int = CHUNK,
    window: int = WINDOW, sink: int = 0, steps: tuple[int, ...] = STEPS, shift: float = SHIFT,
    batch: tuple[int, ...] = (), graph: bool = False,
) -> Any:  # fmt: skip
    """The wheel's DiffusionModel on weights with Wan's names.

    window  latent frames that attention sees, the first `sink` and the current chunk included
    batch   its dimensions before tokens; the wheel's recipe has none
    graph   whether CUDA graphs run the network once its cache is full
    """
    from flashdreams.infra.diffusion.model import DiffusionModelConfig
    from flashdreams.infra.diffusion.scheduler.fm import FlowMatchSchedulerConfig
    from flashdreams.recipes.wan import Wan21TransformerConfig, WanDiTNetworkConfig
    from flashdreams.recipes.wan.transformer import wan21

    config = DiffusionModelConfig(
        transformer=Wan21TransformerConfig(
            network=WanDiTNetworkConfig(**network), dtype=dtype, checkpoint_path="given", batch_shape=batch,
            len_t=chunk, window_size_t=window - sink, sink_size_t=sink, compile_network=False, use_cuda_graph=graph,
        ),
        scheduler=FlowMatchSchedulerConfig(
            num_inference_steps=len(steps), denoising_timesteps=list(steps), shift=shift, warp_denoising_step=True
        ),
        seed=0,
    )  # fmt: skip
    with mock.patch.object(wan21, "load_checkpoint", return_value=weights):
        return config.setup().eval().requires_grad_(False)


def filled_after(transformer: Any) -> int:
    """The first chunk whose attention sees a full cache: from there on the wheel captures."""
    return transformer._cuda_graph_capture_ar_idx


def compiled(transformer: Any) -> Any:
    """The network compiled in the wheel's own mode, inside its CUDA graph: to be put in place once the cache is full.

    The wheel compiles before the first chunk. Then each length of a cache that is not full is compiled as well, which
    takes minutes and changes nothing later.
    """
    from flashdreams.infra.compile import compile_module
    from flashdreams.infra.cuda_graph import CUDAGraphWrapper

    network = compile_module(transformer.network, mode=COMPILE_MODE)
    return CUDAGraphWrapper(network, transformer.config.cuda_graph_warmup_iters)


def wan_vae(weights: dict[str, Tensor], config: VAEConfig, dtype: torch.dtype, graph: bool = False) -> Any:
    """The wheel's decoder of Wan's VAE on weights with diffusers' names; those of the encoder are left out."""
    from flashdreams.recipes.wan.autoencoder import vae

    named = {_vae_name(name, config.num_res_blocks + 1): tensor for name, tensor in weights.items() if _decodes(name)}
    with mock.patch.object(vae, "load_checkpoint", return_value=named):
        made = vae.WanVAE(
            "given", use_cuda_graph=graph, use_compile=False, enable_encoder=False, base_dim=config.base_dim,
            decoder_base_dim=config.decoder_base_dim, z_dim=config.z_dim, dim_mult=config.dim_mult,
            num_res_blocks=config.num_res_blocks, temperal_downsample=config.temperal_downsample,
            latent_mean=config.latents_mean, latent_std=config.latents_std, decoder_out_channels=config.out_channels,
        )  # fmt: skip
    missing = [name for name, tensor in [*made.named_parameters(), *made.named_buffers()] if tensor.is_meta]
    if missing:
        raise ValueError(f"vae: got no {missing[0]}, expected all of the decoder's tensors")
    return made.to(dtype)


def _decodes(name: str) -> bool:
    return name.startswith(("decoder.", "post_quant_conv."))


def _vae_name(name: str, per_level: int) -> str:
    """Wan's name of a decoder's tensor, from diffusers'; `per_level`: residual blocks of a level."""
    if name.startswith("post_quant_conv."):
        return name.replace("post_quant_conv", "conv2")
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}  # fmt: skip
    name = re.sub(r"(resnets\.\d+)\.(norm1|conv1|norm2|conv2|conv_shortcut)\b", lambda m: f"{m[1]}.{inner[m[2]]}", name)
    for theirs, wan in (("mid_block.resnets.0", "middle.0"), ("mid_block.attentions.0", "middle.1"),
                        ("mid_block.resnets.1", "middle.2"), ("conv_in", "conv1"), ("norm_out", "head.0"),
                        ("conv_out", "head.2")):  # fmt: skip
        name = name.replace(theirs, wan)
    # Wan counts residual blocks and upsamplers in one row.
    level = per_level + 1
    name = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"upsamples.{int(m[1]) * level + int(m[2])}", name)
    return re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"upsamples.{int(m[1]) * level + per_level}", name)


class _GivenDraws:
    """What the wheel's sampling modules call torch: all of torch, but draws are given."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self.waiting = list(values)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def randn(self, size: Sequence[int], device: torch.device, dtype: torch.dtype, generator: Any = None) -> Tensor:
        return self._taken(size).to(device, dtype)

    def empty_like(self, like: Tensor) -> Any:
        """Something that only `normal_` is called on."""
        drawn = self._taken(like.shape).to(like)
        return types.SimpleNamespace(normal_=lambda generator=None: drawn)

    def _taken(self, shape: Sequence[int]) -> Tensor:
        if not self.waiting or list(self.waiting[0].shape) != list(shape):
            given = list(self.waiting[0].shape) if self.waiting else "no more"
            raise ValueError(f"draws: got a request for {list(shape)}, expected one for {given}")
        return self.waiting.pop(0).clone()


@contextmanager
def draws(values: Sequence[Tensor]) -> Iterator[None]:
    """The wheel's next draws are these values, in order: it has no argument for noise.

    Only its two sampling modules see it: a compiler draws from torch as well. ValueError for another shape, and where a
    value is left over.
    """
    from flashdreams.infra.diffusion.model import base
    from flashdreams.infra.diffusion.scheduler import fm

    source = _GivenDraws(values)
    with mock.patch.object(base, "torch", source), mock.patch.object(fm, "torch", source):
        yield
    if source.waiting:
        raise ValueError(f"draws: got {len(values) - len(source.waiting)} requests, expected {len(values)}")
