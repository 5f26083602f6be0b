"""flashdreams' Self-Forcing recipe as an adapter: the same weights through the wheel's own code.

python -m bench.adapters.flashdreams      # speaks JSON lines on stdin and stdout

On a GPU the network and the decoder run in the wheel's CUDA graphs. {"compile": true} in `open` also compiles the
network, in the wheel's own mode. The embedding of a prompt is given, because encoding costs both sides the same.
"""

import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.adapters import flashdreams_wheel as wheel
from bench.adapters import given
from bench.adapters.protocol import Engine, serve
from engine.runtime.device import DTYPES, device_of
from engine.weights.names import diffusers_name


class Rollout:
    """One video of the wheel: the network's cache, the decoder's cache, the next chunk's number."""

    def __init__(self, model: Any, vae: Any, text: Tensor, latent: tuple[int, int]) -> None:
        """text [rows, text_dim]; latent: height and width."""
        self.model, self.vae, self.index = model, vae, 0
        height, width = latent
        self.cache = model.transformer.initialize_autoregressive_cache(height=height, width=width, text_embeddings=text)
        self.decoded = vae.prepare_cache()

    def generate(self) -> tuple[Tensor, Any]:
        """The next chunk's latent [F, C, h, w], and what `finalize` needs."""
        return self.model.generate(self.index, self.cache)

    def finalize(self, final: Any) -> None:
        """The pass that writes the chunk's keys and values."""
        self.model.finalize(final)
        self.index += 1

    def decode(self, latent: Tensor) -> Tensor:
        """Frames uint8 [1, 3, T, H, W] on the host."""
        frames = self.vae.decode(latent.transpose(0, 1)[None], self.decoded)
        return ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


class Flashdreams:
    def __init__(self, settings: dict[str, Any]) -> None:
        if "threads" in settings:
            torch.set_num_threads(int(settings["threads"]))
        self.device, self.dtype = device_of(settings["device"]), DTYPES[settings["dtype"]]
        wheel.open_wheel(self.device)
        torch.backends.cudnn.benchmark = True  # as its documentation advises
        graph = self.device.type == "cuda"
        self.compiles = bool(settings.get("compile"))
        if self.compiles and not graph:
            raise ValueError("compile: got true on a processor, expected a GPU")
        self.given = given.tensors(settings, self.dtype)
        self.text = given.text(settings, self.given.config)
        network = wheel.network_settings(self.given.config, self.given.rows)
        self.model = wheel.diffusion(self._network(network), network, self.dtype, graph=graph).to(self.device)
        self.vae = wheel.wan_vae(dict(self.given.vae.read()), self.given.vae_config, self.dtype, graph).to(self.device)
        spatial = self.given.vae_config.scale_factor_spatial
        self.latent = self.given.height // spatial, self.given.width // spatial
        self.full = wheel.filled_after(self.model.transformer)
        self._plain, self._compiled = self.model.transformer._network_call, None
        self._long: Rollout | None = None

    def _network(self, network: dict[str, Any]) -> dict[str, Tensor]:
        """The network's weights under Wan's names."""
        wan = {diffusers_name(name): name for name in wheel.network_names(network)}
        return {wan[name]: tensor.to(self.dtype) for name, tensor in self.given.transformer.read() if name in wan}

    @torch.no_grad()
    def generate(self, prompt: str, seed: int, frames: int) -> Iterator[int]:
        if self.given.embed is None:
            raise ValueError("generate: got random weights, expected a model directory")
        self._long, made = None, 0  # a new rollout drops what was captured for another
        rollout = self._rollout(self.given.embed(prompt))
        self.model.rng.manual_seed(seed)
        while made < frames:
            for count in self._chunk(rollout):
                made = min(made + count, frames)
                yield made

    @torch.no_grad()
    def warm(self) -> dict[str, Any]:
        rollout = self._stream()
        while rollout.index < self.full:
            list(self._chunk(rollout))
        for _ in range(5):  # of the network and of the decoder: eager calls, the capture, a replay
            list(self._chunk(rollout))
        self._wait()
        calls = {"network": self.model.transformer._network_call, "vae": self.vae._decoder_wrapper}
        return {"captured": {name: getattr(call, "_graph", None) is not None for name, call in calls.items()}}

    @torch.no_grad()
    def chunks(self, chunks: int) -> Iterator[int]:
        rollout, made = self._stream(), 0
        for _ in range(chunks):
            for count in self._chunk(rollout):
                made += count
                yield made
        self._wait()

    @torch.no_grad()
    def stages(self, chunks: int) -> dict[str, list[float]]:
        rollout = self._stream()
        found: dict[str, list[float]] = {"denoise": [], "context": [], "decode": []}
        for _ in range(chunks):
            marks = [self._now()]
            latent, final = self._generate(rollout)
            marks.append(self._now())
            rollout.finalize(final)
            marks.append(self._now())
            rollout.decode(latent)
            marks.append(self._now())
            for stage, (begin, end) in zip(found.values(), pairwise(marks), strict=True):
                stage.append(1e3 * (end - begin))
        return found

    @torch.no_grad()
    def latents(self, seed: int, chunks: int, file: str, timesteps: str) -> None:
        if DTYPES[timesteps] != self.dtype:
            raise ValueError(f"timesteps: got {timesteps}, expected {self.dtype}, to which the wheel rounds them")
        self._long = None
        self._long = rollout = self._rollout(self._text())
        config, steps, made = self.model.config, len(wheel.STEPS), []
        shape = (1, self.given.config.in_channels, wheel.CHUNK, *self.latent)
        # The wheel draws tokens. The shared noise has a latent's shape, and so here its other way of drawing.
        kept, config.noise_in_unpatchified_shape = config.noise_in_unpatchified_shape, True
        try:
            for chunk in range(chunks):
                noise = given.noise(seed, chunk, steps, shape).to(self.device, self.dtype)
                with wheel.draws([draw[0].transpose(0, 1) for draw in noise]):
                    latent, final = self._generate(rollout)
                rollout.finalize(final)
                made.append(latent.transpose(0, 1)[None])
        finally:
            config.noise_in_unpatchified_shape = kept
        given.write_latents(file, made)

    def _generate(self, rollout: Rollout) -> tuple[Tensor, Any]:
        """The rollout's next latent, through the compiled network once the cache is full."""
        if self.compiles and rollout.index == self.full:
            self._compiled = self._compiled or wheel.compiled(self.model.transformer)
            self.model.transformer._network_call = self._compiled
        return rollout.generate()

    def _chunk(self, rollout: Rollout) -> Iterator[int]:
        """Yields the next chunk's number of frames once they are on the host, then finalizes: as its runner does."""
        latent, final = self._generate(rollout)
        yield rollout.decode(latent).shape[2]
        rollout.finalize(final)

    def _stream(self) -> Rollout:
        """The long stream; it begins with the first request for it."""
        if self._long is None:
            self._long = self._rollout(self._text())
        return self._long

    def _rollout(self, text: Tensor) -> Rollout:
        if self.compiles:  # the caches of a new rollout have other addresses than those that were captured
            self.model.transformer._network_call = self._plain
            if self._compiled is not None:
                self._compiled.reset()
        return Rollout(self.model, self.vae, text[0].to(self.device, self.dtype), self.latent)

    def _text(self) -> Tensor:
        if self.text is None:
            raise ValueError("open: got no text, expected an embedding")
        return self.text

    def _now(self) -> float:
        self._wait()
        return time.perf_counter()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def build(settings: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    made = Flashdreams(settings)
    how = ("CUDA graphs" if made.device.type == "cuda" else "eager") + (", compiled" if made.compiles else "")
    about = (
        f"flashdreams {wheel.wheel_version()}, {settings['dtype']}, {how}, {len(wheel.STEPS)} steps, chunks of "
        f"{wheel.CHUNK}, window {wheel.WINDOW}"
    )
    return made, {"about": about, "fills": made.full}


if __name__ == "__main__":
    serve(build)
