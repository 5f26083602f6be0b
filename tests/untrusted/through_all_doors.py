"""Gives planted folders to every loader of the product. Started by test_planted_code.py in the model's own folder.

Arguments: a marker to write on a look-up in the network, and the folders as JSON. Prints a line of JSON per call.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
MARKER, FOLDERS = Path(sys.argv[1]), {name: Path(path) for name, path in json.loads(sys.argv[2]).items()}


def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        with MARKER.open("a") as marker:
            marker.write(f"{event} {arguments}\n")


sys.addaudithook(watch)


def attempt(name, call):
    try:
        result = call()
        said = f"rc {result}" if isinstance(result, int) else "ok"
    except SystemExit as error:
        said = f"rc {error.code}"
    except (ValueError, OSError, ImportError) as error:
        said = f"{type(error).__name__}: {str(error)[:200]}"
    except Exception as error:
        said = f"UNEXPECTED {type(error).__name__}: {str(error)[:300]}"
    print(json.dumps([name, said]), flush=True)


def main():
    import torch

    import engine
    from distill.experiments.evaluate import teacher_videos
    from distill.models.base import Base
    from distill.models.pretrained import pretrained
    from distill.models.student_file import read_student
    from distill.stages.teacher import load_teacher
    from distill.training.state import load_state
    from engine import cli
    from engine.run import main as run
    from engine.weights.adapters import describe
    from export.calibrate import read_calibration
    from serve.__main__ import main as serve
    from serve.core.job_store import Store
    from serve.web.wire import picture_in

    model = FOLDERS["model"]
    short = ["--prompt", "red", "--frames", "1", "--out", "null", "--quiet"]
    modules = sorted(FOLDERS["files"].glob("*.py"))
    files = [file for file in sorted(FOLDERS["files"].iterdir()) if file not in modules[1:]]
    for name, folder in FOLDERS.items():
        attempt(f"load {name}", lambda folder=folder: engine.load(folder) and None)
        attempt(f"inspect {name}", lambda folder=folder: cli.main(["inspect", str(folder)]))
        attempt(f"tokenizer {name}", lambda folder=folder: engine.load(model, tokenizer=folder / "tokenizer") and None)
        attempt(f"adapter {name}", lambda folder=folder: describe(folder) and None)
        attempt(
            f"run adapter {name}", lambda folder=folder: run(["--model", str(model), *short, "--adapter", str(folder)])
        )
        attempt(f"bundle {name}", lambda folder=folder: engine.load_bundle(folder) and None)
        attempt(f"teacher {name}", lambda folder=folder: load_teacher(folder) and None)
        attempt(f"base {name}", lambda folder=folder: Base(folder, torch.float32) and None)
        attempt(f"videos {name}", lambda folder=folder: teacher_videos(folder, [], 1, 0, 1, 1.0) and None)
    attempt("run model", lambda: run(["--model", str(model), *short]))
    for file in files:
        attempt(f"inspect {file.name}", lambda file=file: cli.main(["inspect", str(file)]))
        attempt(f"describe {file.name}", lambda file=file: describe(file) and None)
        for option in ("checkpoint", "vae", "text_encoder", "tokenizer"):
            attempt(
                f"{option} {file.name}", lambda file=file, option=option: engine.load(model, **{option: file}) and None
            )
        attempt(f"state {file.name}", lambda file=file: load_state(file) and None)
        attempt(f"student {file.name}", lambda file=file: read_student(file) and None)
        attempt(f"scales {file.name}", lambda file=file: read_calibration(file) and None)
        attempt(f"upload {file.name}", lambda file=file: picture_in(file.read_bytes(), 16, 24) and None)
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    for kind, part in (
        (AutoencoderKLWan, "vae"),
        (WanTransformer3DModel, "transformer"),
        (UMT5EncoderModel, "text_encoder"),
    ):
        for name in ("model", "pickled"):
            attempt(
                f"pretrained {part} {name}",
                lambda kind=kind, place=FOLDERS[name] / part: pretrained(kind, place) and None,
            )
    attempt("jobs folder", lambda: Store(FOLDERS["files"]) and None)
    attempt("serve", lambda: serve(["--model", str(FOLDERS["index"]), "--port", "0"]))


main()
