"""python -m export: a model and a preset -> a bundle that runs without them.

python -m export --out BUNDLE [--model DIR] [--preset NAME] [--backend NAME]...   write
python -m export inspect BUNDLE                                                   what is inside
python -m export verify BUNDLE [--backend NAME]...                                hashes, then the golden frames again

tensorrt is written against TensorRT 11 and was not executed by us (docs/tensorrt.md).
A bundle with aoti or tensorrt holds machine code, which whoever opens it runs: take one only from where you would take
a program.
"""

import argparse
import sys
from pathlib import Path

from engine.bundles.manifest import read_manifest
from engine.loader import EMBEDDED, load, settings_of
from engine.runtime.device import PRECISIONS
from engine.stream import Pipeline
from export.calibrate import calibrate, read_calibration
from export.fp8 import GRANULARITIES, Recipe, quantize
from export.tensorrt import BuildOptions
from export.tensorrt_onnx import ATTENTIONS
from export.write import COUNTED, TOLERANCE, verify_bundle, write_bundle


def _inspect(folder: Path) -> int:
    manifest = read_manifest(folder)
    size = sum(file.bytes for file in manifest.files.values())
    print(f"{folder}: {size / 1e6:.1f} MB in {len(manifest.files)} files, format {manifest.version}")
    shape = f"{manifest.width}x{manifest.height} at {manifest.fps:g} fps, {manifest.precision}"
    print(f"{shape}, preset {manifest.preset_name}")
    print("  " + ", ".join(f"{key} {value}" for key, value in manifest.preset.items()))
    for name, backend in manifest.backends.items():
        print(f"{name}: " + ", ".join(f"{package} {version}" for package, version in backend.versions.items()))
        for graph, spec in backend.graphs.items():
            size = manifest.files[spec.file].bytes
            print(f"  {graph:20} {len(spec.inputs):4} inputs {len(spec.outputs):4} outputs {size / 1e3:8.1f} kB")
    return 0


def _verify(folder: Path, backends: list[str]) -> int:
    worst = verify_bundle(folder, backends)
    precision = read_manifest(folder).precision
    allowed, counted = TOLERANCE[precision], COUNTED[precision]
    for key, apart in worst.items():
        verdict = "as stored" if apart <= allowed else f"FAILED, expected at most {allowed}"
        print(f"{folder}: {key}: hashes good, golden frames {counted} {apart} grey levels off: {verdict}")
    return 0 if max(worst.values()) <= allowed else 1


def _export(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("export: got no --out, expected a new directory")
    folder = args.model or EMBEDDED
    tokenizer, backends = folder / "tokenizer", args.backend or ["onnx"]
    fp8, around = args.precision == "fp8", "fp32" if "onnx" in backends else "bf16"  # what is not FP8
    pipeline = load(
        args.model, preset=args.preset, checkpoint=args.checkpoint, adapters=args.adapter, device=args.device,
        dtype=around if fp8 else args.precision, height=args.height, width=args.width,
    )  # fmt: skip
    pipeline = _quantized(pipeline, args, settings_of(folder)["fp8_keep"]) if fp8 else pipeline
    if args.attention == "plugin_fp8" and not fp8:
        raise ValueError(f"--attention: got plugin_fp8 with --precision {args.precision}, expected fp8 with it")
    plans = BuildOptions(args.attention, strip=args.strip, timing_cache=args.timing_cache)
    for line in write_bundle(pipeline, args.out, tokenizer, args.prompt, args.seed, backends, args.reuse, plans):
        print(line, file=sys.stderr)
    print(args.out)
    return 0


def _quantized(pipeline: Pipeline, args: argparse.Namespace, keep: list[str]) -> Pipeline:
    recipe, amax = Recipe(args.fp8_activations, tuple(keep)), None
    if args.calibration is not None:
        amax = read_calibration(args.calibration)
    elif recipe.activations == "tensor":
        print("calibrating on --prompt alone (export.calibrate takes more)", file=sys.stderr)
        amax = calibrate(pipeline, [args.prompt], seeds=(0, 1))
    return quantize(pipeline, recipe, amax)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("write", "inspect", "verify"), default="write")
    parser.add_argument("bundle", nargs="?", type=Path, help="for inspect and verify")
    parser.add_argument("--out", type=Path, metavar="BUNDLE", help="new directory to write")
    parser.add_argument("--model", type=Path, metavar="DIR", help="pipeline directory (default: the embedded model)")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="transformer weights instead of the directory's"
    )
    parser.add_argument("--adapter", type=Path, action="append", default=[], metavar="PATH")
    parser.add_argument("--preset", metavar="NAME|FILE.toml")
    parser.add_argument(
        "--backend", choices=("onnx", "aoti", "tensorrt"), action="append", default=[],
        help="may be repeated: one bundle for several, the first is its default (onnx)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--fp8-activations", choices=GRANULARITIES, default="tensor",
        help="one scale a tensor, calibrated, or one a token, found as it goes (not for tensorrt)",
    )  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="from export.calibrate, or ModelOpt's amax")
    parser.add_argument(
        "--attention", choices=ATTENTIONS, default="native",
        help="tensorrt: its own, or our kernel as a plugin (plugin_fp8: on FP8 caches)",
    )  # fmt: skip
    parser.add_argument("--strip", action="store_true", help="tensorrt: weights outside the plans, shared")
    parser.add_argument("--timing-cache", type=Path, metavar="FILE", help="tensorrt: kernels measured before")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what aoti compiles for (cpu)")
    parser.add_argument("--reuse", type=Path, metavar="BUNDLE", help="copy its compiled graphs where nothing changed")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument(
        "--prompt", default="a red circle moving right slowly on a gray background", help="of the golden frames"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the golden frames")
    args = parser.parse_args(argv)
    try:
        if args.what == "write":
            return _export(args)
        if args.bundle is None:
            raise ValueError(f"{args.what}: got no bundle, expected a directory")
        return _inspect(args.bundle) if args.what == "inspect" else _verify(args.bundle, args.backend)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
