"""python -m export: a model and a preset -> a bundle that runs without them.

python -m export --out BUNDLE [--model DIR] [--preset NAME] [--backend NAME]...   write
python -m export inspect BUNDLE                                                   list the content
python -m export verify BUNDLE [--backend NAME]...                                check hashes, replay the golden frames
python -m export verify BUNDLE --hashes-only                                      check hashes, run no code of it

tensorrt_rtx builds plans for GeForce and RTX cards, named by --gpu, on any x86-64 Linux machine. tensorrt builds for
the GPU of this machine. We never ran a plan of either (docs/tensorrt.md).
A bundle with aoti, tensorrt or tensorrt_rtx holds code, which runs when the bundle is opened. verify and --reuse open
it. Take such a bundle only from where you would take a program.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Literal

from engine.bundles.hashes import check_hashes
from engine.bundles.manifest import read_manifest
from engine.bundles.registry import BACKENDS
from engine.commands.stderr import is_bad_input, line_of, need_stdout, say
from engine.loader import load, settings_for
from engine.options import Parser, add_options, option, options_of
from engine.program import cleanly
from engine.runtime.device import PRECISIONS
from engine.stream import Pipeline
from export.calibrate import DEFAULT_PROMPT, Source, calibrate, read_calibration
from export.eight_bits import GRANULARITIES, LINEARS, Recipe, quantize
from export.tensorrt.build import BuildOptions


@dataclass(frozen=True, kw_only=True)
class Options(Source):
    what: Literal["write", "inspect", "verify"] = option("write", "what to do", positional=True)
    bundle: Path | None = option(None, "for inspect and verify", metavar="BUNDLE", positional=True)
    out: Path | None = option(None, "new directory to write", metavar="BUNDLE")
    checkpoint: Path | None = option(None, "transformer weights instead of the directory's", metavar="FILE")
    checkpoint_state: str | None = option(None, "state of a training checkpoint; default: the preset's", metavar="NAME")
    vae: Path | None = option(None, "VAE instead of the directory's", metavar="FILE")
    vae_decoder: Path | None = option(
        None, "tiny VAE (TAEHV, taew2_1) that decodes in the place of the VAE", metavar="FILE", exclusive="decoder"
    )
    decoder: Literal["full", "tiny"] = option("full", "tiny: the model's own tiny VAE decodes", exclusive="decoder")
    text_encoder: Path | None = option(None, "UMT5 encoder instead of the directory's", metavar="FILE")
    tokenizer: Path | None = option(None, "tokenizer instead of the directory's", metavar="DIR")
    adapter: tuple[str, ...] = option(
        (), "LoRA file or PEFT folder to merge, at a strength (1); may be repeated", metavar="PATH[:STRENGTH]"
    )
    backend: tuple[str, ...] = option(
        (), "may be repeated: one bundle for several, the first is its default (onnx)", choices=BACKENDS
    )
    precision: str = option("fp32", "of the graphs; int8 for onnx alone", choices=PRECISIONS)
    activations: str | None = option(
        None, "of fp8 and int8: one calibrated scale per tensor (default of fp8, and with --calibration), or one scale "
        "per token found at run time (default of int8; not for tensorrt)", choices=GRANULARITIES,
    )  # fmt: skip
    calibration: Path | None = option(None, "from export.calibrate, or ModelOpt's amax", metavar="FILE")
    device: Literal["cpu", "cuda"] = option("cpu", "what aoti compiles for")
    reuse: Path | None = option(
        None, "copy its compiled graphs where nothing changed, and open them, which runs their code", metavar="BUNDLE"
    )
    hashes_only: bool = option(False, "for verify: compare the hashes of all files and run no code of the bundle")
    debug: bool = option(False, "show tracebacks")
    prompt: str = option(DEFAULT_PROMPT, "of the golden frames", metavar="TEXT")
    seed: int = option(0, "of the golden frames (0)")


def _inspect(folder: Path) -> int:
    manifest = read_manifest(folder)
    size = sum(file.bytes for file in manifest.files.values())
    print(f"{folder}: {size / 1e6:.1f} MB in {len(manifest.files)} files, format {manifest.version}")
    shape = f"{manifest.width}x{manifest.height} at {manifest.fps:g} fps, {manifest.precision}"
    tiny = ", tiny VAE decodes" if manifest.decoder == "tiny" else ""
    print(f"{shape}, preset {manifest.preset_name}{tiny}")
    print("  " + ", ".join(f"{key} {value}" for key, value in manifest.preset.items()))
    for name, backend in manifest.backends.items():
        print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in backend.versions.items()))
        for graph, spec in backend.graphs.items():
            size = manifest.files[spec.file].bytes
            print(f"  {graph:20} {len(spec.inputs):4} inputs {len(spec.outputs):4} outputs {size / 1e3:8.1f} kB")
    return 0


def _needs_onnx() -> ModuleType:
    """export.write, whose tracing needs the packages of the extra onnx whatever the backend."""
    try:
        return import_module("export.write")
    except ModuleNotFoundError as error:
        expected = "it installed: pip install 'greedy-stream[onnx]'"
        raise ImportError(f"export: got no package {error.name}, expected {expected}") from None


def _hashes(folder: Path) -> int:
    manifest = read_manifest(folder)
    check_hashes(folder, manifest)
    print(f"{folder}: hashes of {len(manifest.files)} files good, nothing was run")
    return 0


def _verify(folder: Path, backends: Sequence[str]) -> int:
    write = _needs_onnx()
    found = write.verify_bundle(folder, backends)
    precision = read_manifest(folder).precision
    allowed, counted, failed = write.TOLERANCE[precision], write.COUNTED[precision], False
    for key, apart in found.items():
        result = f"golden frames not replayed: {apart}"
        if isinstance(apart, int):
            verdict = "as stored" if apart <= allowed else f"FAILED, expected at most {allowed}"
            result = f"golden frames {counted} {apart} grey levels off: {verdict}"
            failed |= apart > allowed
        print(f"{folder}: {key}: hashes good, {result}")
    return int(failed)


def _export(options: Options, plans: BuildOptions) -> int:
    if options.out is None:
        raise ValueError("export: got no --out, expected a new directory")
    write = _needs_onnx()
    backends = options.backend or ("onnx",)
    fp8, quantizes = options.precision == "fp8", options.precision in LINEARS
    around = "fp32" if "onnx" in backends else "bf16"  # all that is not quantised
    if options.precision == "int8" and (others := [backend for backend in backends if backend != "onnx"]):
        raise ValueError(f"--precision: got int8 for {others[0]}, expected --backend onnx alone with it")
    pipeline = load(
        options.model, preset=options.preset, checkpoint=options.checkpoint, adapters=options.adapter,
        checkpoint_state=options.checkpoint_state, vae=options.vae, text_encoder=options.text_encoder,
        tokenizer=options.tokenizer, vae_decoder=options.vae_decoder, decoder=options.decoder,
        device=options.device, precision=around if quantizes else options.precision, height=options.height,
        width=options.width,
    )  # fmt: skip
    for note in pipeline.notes:
        say(f"note: {note}")
    keep = settings_for(
        options.model, options.checkpoint, options.vae, options.text_encoder, options.tokenizer
    ).fp8_keep
    pipeline = _quantized(pipeline, options, keep) if quantizes else pipeline
    assert pipeline.tokenizer is not None
    if plans.attention.endswith("fp8") and not fp8:
        got = f"{plans.attention} with --precision {options.precision}"
        raise ValueError(f"--attention: got {got}, expected fp8 with it")
    if plans.gpu and "tensorrt_rtx" not in backends:
        raise ValueError(
            f"--gpu: got {plans.gpu[0]} for {', '.join(backends)}, expected --backend tensorrt_rtx with it"
        )
    lines = write.write_bundle(
        pipeline, options.out, pipeline.tokenizer.path, options.prompt, options.seed, backends, options.reuse, plans
    )  # fmt: skip
    for line in lines:
        say(line)
    print(options.out)
    return 0


def _quantized(pipeline: Pipeline, options: Options, keep: tuple[str, ...]) -> Pipeline:
    static = options.precision == "fp8" or options.calibration is not None
    activations = options.activations or ("tensor" if static else "token")
    if activations == "token" and options.calibration is not None:
        raise ValueError(f"--calibration: got {options.calibration} and --activations token, expected tensor with it")
    recipe, calibration = Recipe(activations, tuple(keep), options.precision), None
    if options.calibration is not None:
        calibration = read_calibration(options.calibration)
    elif activations == "tensor":
        say("calibrating on --prompt alone (export.calibrate takes more)")
        calibration = calibrate(pipeline, [options.prompt], seeds=(0, 1))
    if calibration is not None:
        say(calibration.summary())
    return quantize(pipeline, recipe, calibration)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m export", description=__doc__)
    add_options(parser, Options)
    add_options(parser, BuildOptions, "tensorrt", skip=["level"])
    args = parser.parse_args(argv)
    options = options_of(args, Options)
    try:
        with cleanly():
            if options.hashes_only and options.what != "verify":
                raise ValueError(f"--hashes-only: got {options.what}, expected verify with it")
            if options.what == "write":
                return _export(options, options_of(args, BuildOptions))
            if options.bundle is None:
                raise ValueError(f"{options.what}: got no bundle, expected a directory")
            need_stdout(options.what)
            if options.what == "inspect":
                return _inspect(options.bundle)
            return _hashes(options.bundle) if options.hashes_only else _verify(options.bundle, options.backend)
    except Exception as error:
        if options.debug:
            raise
        say(f"error: {line_of(error)}")
        return 2 if is_bad_input(error) else 1


if __name__ == "__main__":
    sys.exit(main())
