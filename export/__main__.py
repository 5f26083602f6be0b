"""python -m export: a model and a preset -> a bundle that runs without them.

python -m export --out BUNDLE [--model DIR] [--preset NAME] [--backend NAME]...   write
python -m export inspect BUNDLE                                                   what is inside
python -m export verify BUNDLE [--backend NAME]...                                hashes, then the golden frames again

A bundle with aoti holds machine code, which whoever opens it runs: take one only from where you would take a program.
"""

import argparse
import sys
from pathlib import Path

from engine.bundle import read_manifest
from engine.loader import DTYPES, EMBEDDED, load
from export.write import TOLERANCE, verify_bundle, write_bundle


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
    allowed = TOLERANCE[read_manifest(folder).precision]
    for key, apart in worst.items():
        verdict = "as stored" if apart <= allowed else f"FAILED, expected at most {allowed}"
        print(f"{folder}: {key}: hashes good, golden frames at most {apart} grey levels off: {verdict}")
    return 0 if max(worst.values()) <= allowed else 1


def _export(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("export: got no --out, expected a new directory")
    pipeline = load(
        args.model, preset=args.preset, checkpoint=args.checkpoint, adapters=args.adapter, device=args.device,
        dtype=args.precision, height=args.height, width=args.width,
    )  # fmt: skip
    folder = args.model or EMBEDDED
    tokenizer, backends = folder / "tokenizer", args.backend or ["onnx"]
    for line in write_bundle(pipeline, args.out, tokenizer, args.prompt, args.seed, backends, args.reuse):
        print(line, file=sys.stderr)
    print(args.out)
    return 0


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
        "--backend", choices=("onnx", "aoti"), action="append", default=[],
        help="may be repeated: one bundle for several, the first is its default (onnx)",
    )  # fmt: skip
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
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
