"""python -m export: a model and a preset -> a bundle that runs without them.

python -m export --out BUNDLE [--model DIR] [--preset NAME]     write
python -m export inspect BUNDLE                                 what is inside
python -m export verify BUNDLE                                  hashes, then the golden frames again
"""

import argparse
import sys
from pathlib import Path

from engine.bundle import read_manifest
from engine.loader import EMBEDDED, load
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


def _verify(folder: Path) -> int:
    worst = verify_bundle(folder)
    verdict = "as stored" if worst <= TOLERANCE else f"FAILED, expected at most {TOLERANCE}"
    print(f"{folder}: hashes good, golden frames at most {worst} grey levels off: {verdict}")
    return 0 if worst <= TOLERANCE else 1


def _export(args: argparse.Namespace) -> int:
    if args.out is None:
        raise ValueError("export: got no --out, expected a new directory")
    pipeline = load(
        args.model, preset=args.preset, checkpoint=args.checkpoint, adapters=args.adapter, device="cpu",
        dtype=args.precision, height=args.height, width=args.width,
    )  # fmt: skip
    folder = args.model or EMBEDDED
    for line in write_bundle(pipeline, args.out, folder / "tokenizer", args.prompt, args.seed):
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
    parser.add_argument("--backend", choices=("onnx",), default="onnx")
    parser.add_argument("--precision", choices=("fp32",), default="fp32")
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
        return _inspect(args.bundle) if args.what == "inspect" else _verify(args.bundle)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
