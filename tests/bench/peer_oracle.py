"""flashdreams as an oracle: recorded cases, and a VAE, through the wheel's own code on a processor.

    python peer_oracle.py CASES        # a line of JSON for each case: name, and error or skipped

A process of its own, because the wheel changes to run on a processor.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch
from safetensors.torch import load_file

from bench.adapters import flashdreams_wheel as wheel
from bench.adapters import given
from bench.adapters.flashdreams import Flashdreams
from bench.instruments import models, recordings
from bench.instruments.random_weights import RandomSource
from engine.model.vae import VAE

# What the wheel cannot express
TWO_SIZES = "it has no first chunk of another size"
OWN_STEPS = "it has one list of steps for all chunks"
NO_CONTEXT = "it ends every chunk with a context pass"
BF16 = "it rounds timesteps to bf16"
BATCH = "its modulation does not spread over a batch"


def skipped(case: recordings.Case, recording: recordings.Recording) -> str | None:
    """Why the wheel cannot replay this case; None where it can."""
    preset = recordings.preset_of(case, recording.shift)
    if case.dtype != torch.float32:
        return BF16
    if len(case.tensors["noise"]) > 1:
        return BATCH
    if preset.first_chunk:
        return TWO_SIZES
    if preset.commit != "clean":
        return NO_CONTEXT
    return OWN_STEPS if len(set(preset.steps)) > 1 else None


@torch.no_grad()
def replay(case: recordings.Case, recording: recordings.Recording) -> torch.Tensor:
    """The wheel's latents [1, F, C, h, w] of a case, from its weights, noise and text."""
    preset = recordings.preset_of(case, recording.shift)
    network = wheel.network_settings(recording.config, recording.text_rows)
    model = wheel.diffusion(
        load_file(recording.weights), network, torch.float32, chunk=preset.chunk, window=preset.window,
        sink=preset.attn_sink, steps=tuple(case.entry["steps"]), shift=preset.shift, batch=(1,),
    )  # fmt: skip
    model.config.noise_in_unpatchified_shape = True
    height, width = recording.latent_hw
    text = torch.nn.functional.pad(case.text, (0, 0, 0, recording.text_rows - case.text.shape[1]))
    cache = model.transformer.initialize_autoregressive_cache(height=height, width=width, text_embeddings=text)
    made: list[torch.Tensor] = []
    for latent in case.tensors.get("initial_latent", torch.empty(0, 0)).split(preset.chunk, dim=1):
        if latent.numel():
            cache.start(len(made))
            tokens = model.transformer.patchify_and_maybe_split_cp(latent)
            model.transformer.finalize_kv_cache(tokens, torch.zeros(()), cache)
            cache.finalize(len(made))
            made.append(latent)
    # Renoise rows are frames: one draw after each step but the last.
    fresh = iter(case.tensors.get("renoise", torch.empty(0)).split(preset.chunk))
    for noise in case.tensors["noise"].split(preset.chunk, dim=1):
        again = [next(fresh)[None] for _ in case.entry["steps"][1:]]
        with wheel.draws([noise, *again]):
            latent, final = model.generate(len(made), cache)
        model.finalize(final)
        made.append(latent)
    return torch.cat(made, dim=1)


@torch.no_grad()
def vae_error() -> float:
    """Largest difference of frames in [-1, 1] over two chunks, from ours."""
    config = models.SHAPES["tiny"][1]
    with torch.device("meta"):
        ours = VAE(config)
    source = RandomSource(ours, "vae")
    weights = dict(source.read())
    ours.load_state_dict(weights, assign=True)
    theirs = wheel.wan_vae(weights, config, torch.float32)
    latent = torch.randn(1, config.z_dim, 6, 4, 6, generator=torch.Generator().manual_seed(0))
    state = theirs.prepare_cache()
    found = torch.cat([theirs.decode(chunk, state) for chunk in latent.split(3, dim=2)], dim=2)
    return float((found - ours.decode(latent)).abs().max())


def networks_called() -> dict[str, object]:
    """Which network runs in the lane that compiles, with stand-ins for the compiler and for CUDA graphs.

    Calls of the plain and of the compiled one, over the latents of nine chunks and four chunks more; the same again for
    the latents of a second stream; and whether latents are those of the lane that does not compile.
    """
    from flashdreams.infra.cuda_graph import CUDAGraphWrapper

    class Counted(CUDAGraphWrapper):
        calls = 0

        def drain(self, *args, **kwargs):
            self.calls += 1
            return super().drain(*args, **kwargs)

        __call__ = drain

    settings = {"weights": {"shape": "tiny"}, "text": {"rows": 9, "seed": 1}, "device": "cpu", "dtype": "fp32"}
    engine = Flashdreams(settings)
    transformer = engine.model.transformer
    with TemporaryDirectory() as folder:
        files = [f"{folder}/{name}.safetensors" for name in ("plain", "first", "second")]
        engine.latents(0, 9, files[0], "fp32")
        plain, compiled = Counted(transformer.network), Counted(transformer.network)
        del transformer._network_call, transformer._network_call_uncond  # without CUDA graphs these are modules
        transformer._use_cuda_graph, transformer._network_call_uncond = True, plain
        transformer._network_call = engine._plain = plain
        engine.compiles, counts = True, []
        with mock.patch.object(wheel, "compiled", return_value=compiled):
            engine.latents(0, 9, files[1], "fp32")
            list(engine.chunks(3))
            engine.stages(1)
            counts.append([plain.calls, compiled.calls])
            engine.latents(0, 9, files[2], "fp32")
            counts.append([plain.calls, compiled.calls])
        found = [given.read_latents(file) for file in files]
    same = all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    return {"calls": counts, "same": same}


def main(folder: Path) -> None:
    wheel.open_wheel(torch.device("cpu"))
    recording = recordings.read_recording(folder)
    for case in recording.cases:
        why = skipped(case, recording)
        if why:
            print(json.dumps({"case": case.name, "skipped": why}))
            continue
        error = replay(case, recording) - case.tensors["output"]
        print(json.dumps({"case": case.name, "error": float(error.abs().max())}), flush=True)
    print(json.dumps({"case": "vae", "error": vae_error()}), flush=True)
    print(json.dumps({"case": "compiled", **networks_called()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
