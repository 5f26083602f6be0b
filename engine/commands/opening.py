"""From the options of a command line to the pipeline that they ask for."""

from collections.abc import Callable
from typing import Any

from engine.bundles.manifest import read_manifest
from engine.bundles.native import NativePipeline
from engine.commands.job import Bundle, Model
from engine.config import Runtime
from engine.loader import load, load_bundle, settings_for
from engine.runtime.memory_plan import MemoryPlan
from engine.stream import Pipeline


def shape_of(model: Model, bundle: Bundle, fixed: tuple[str, ...], fps: float | None) -> tuple[int, int, float]:
    """Height and width in pixels, and frame rate, of the model or bundle to load. A bundle fixes its size.

    fixed: options that the user set and that a bundle would fix. ValueError if there is one beside a bundle.
    """
    if bundle.bundle is None:
        settings = settings_for(model.model, model.checkpoint, model.vae, model.text_encoder, model.tokenizer)
        return model.height or settings.height, model.width or settings.width, fps or settings.fps
    if fixed:
        name = fixed[0].replace("_", "-")
        raise ValueError(f"--bundle: got --{name} as well, expected none: a bundle fixes it")
    manifest = read_manifest(bundle.bundle)
    return manifest.height, manifest.width, fps or manifest.fps


def open_pipeline(
    model: Model, bundle: Bundle, runtime: Runtime, overrides: dict[str, Any], shape: tuple[int, int, float],
    planned: Callable[[MemoryPlan], object] | None = None,
) -> Pipeline | NativePipeline:  # fmt: skip
    """Load a model or a bundle. Errors as `engine.load` and `engine.load_bundle`."""
    if bundle.bundle is not None:
        return load_bundle(
            bundle.bundle, bundle.backend, threads=runtime.threads, verify=bundle.verify, planned=planned
        )
    if bundle.backend not in (None, "torch"):
        raise ValueError(f"--backend: got {bundle.backend}, expected --bundle with it (python -m export writes one)")
    height, width, fps = shape
    return load(
        model.model, preset=model.preset, overrides=overrides, checkpoint=model.checkpoint,
        checkpoint_state=model.checkpoint_state, vae=model.vae, text_encoder=model.text_encoder,
        tokenizer=model.tokenizer, vae_decoder=model.vae_decoder, decoder=model.decoder,
        adapters=model.adapter, height=height, width=width, fps=fps, runtime=runtime, planned=planned,
    )  # fmt: skip
