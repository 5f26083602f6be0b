"""Put the trained parts together as one pipeline directory.

    python -m distill.assemble --teacher runs/teacher/teacher --vae runs/vae/vae --student runs/student/student.pt \\
        --out engine/assets/sprites

The directory is a stock diffusers WanPipeline (float16 weights) with adapters/etm and adapters/sdd in PEFT's layout
beside it. base.json in each adapter holds the hash of the base weights it belongs to; engine.json says how the
student streams. Without --student only the teacher's pipeline is written.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from distill.data.sprites import SIZE
from distill.data.text_encoder import build_tokenizer
from distill.models.base import Base
from distill.models.student import Student
from distill.stages.next_chunk import load_student
from engine.weights.adapters import base_hash
from engine.weights.sources import weight_files

FPS = 8


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_pipeline(teacher: Path, vae: Path, out: Path) -> None:
    """A stock WanPipeline directory with float16 weights."""
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),  # a fresh one: a used one remembers padding and where it came from
        text_encoder=UMT5EncoderModel.from_pretrained(teacher / "text_encoder").half(),
        vae=AutoencoderKLWan.from_pretrained(vae).half(),
        transformer=WanTransformer3DModel.from_pretrained(teacher / "transformer").half(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    pipeline.save_pretrained(out)
    for path in out.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "_name_or_path" in content:  # where it was trained is nobody's business
            del content["_name_or_path"]
            write_json(path, content)
    config = out / "text_encoder" / "config.json"  # stored small, computed in float32
    write_json(config, {**json.loads(config.read_text()), "dtype": "float32"})


def write_adapters(student: Student, out: Path) -> None:
    """adapters/etm and adapters/sdd, bound to the transformer beside them."""
    base = base_hash(weight_files(out / "transformer"))
    for name, model in (("etm", student.etm), ("sdd", student.sdd)):
        folder = out / "adapters" / name
        folder.mkdir(parents=True)
        student.lora.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"].sort()  # PEFT keeps a set: the same student, the same file
        write_json(folder / "adapter_config.json", config)
        tensors = {key: value.half().contiguous() for key, value in student.adapter(model).items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        write_json(folder / "base.json", {"base_sha256": base})
    weight = student.sdd.condition_proj.weight.detach().half().contiguous()
    save_file({"condition_proj.weight": weight}, out / "adapters" / "sdd" / "condition.safetensors")


def assemble(teacher: Path, vae: Path, student: Path | None, out: Path) -> None:
    """Write the whole directory beside its name and rename it when complete."""
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write_pipeline(teacher, vae, part)
    if student is not None:
        model, config, _ = load_student(student, Base(part))
        if not isinstance(model, Student):
            raise ValueError(f"student: got family {config.family!r}, expected greedy")
        write_adapters(model, part)
        geometry = {"height": SIZE, "width": SIZE, "fps": FPS}
        write_json(part / "engine.json", {**geometry, "preset": "greedy", "overrides": config.preset_fields()})
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("runs/teacher/teacher"))
    parser.add_argument("--vae", type=Path, default=Path("runs/vae/vae"))
    parser.add_argument("--student", type=Path, help="student.pt of distill.stages.next_chunk")
    parser.add_argument("--out", type=Path, default=Path("engine/assets/sprites"))
    arguments = parser.parse_args()
    assemble(arguments.teacher, arguments.vae, arguments.student, arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.rglob("*") if path.is_file())
    print(f"{arguments.out}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
