"""Put the trained parts together as one pipeline directory.

    python -m distill assemble --teacher runs/teacher/teacher --vae runs/vae/vae --student runs/student/student.pt \\
        --out engine/assets/sprites

The directory is a stock diffusers WanPipeline with float16 weights. It also holds the student's adapters in PEFT's
layout: adapters/etm and adapters/sdd, or adapters/dit of a causal student. base.json in each adapter holds the hash of
its base weights; engine.json says how the student streams.
Without --student the stage writes only the teacher's pipeline.
"""

import json
from dataclasses import dataclass
from pathlib import Path

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
from distill.models.pretrained import pretrained
from distill.models.student import adapter_of
from distill.stages.next_chunk import AnyStudent, load_student
from distill.training.stage import Options, Stage
from engine.files import whole_folder, write_json
from engine.options import option
from engine.weights.adapters import base_hash
from engine.weights.finding import part_files

FPS = 8


@dataclass(frozen=True)
class AssembleOptions(Options):
    teacher: Path = option(Path("runs/teacher/teacher"), "folder of the teacher", metavar="DIR")
    vae: Path = option(Path("runs/vae/vae"), "folder of the VAE", metavar="DIR")
    student: Path | None = option(None, "student.pt of next_chunk, rl or dmd", metavar="FILE")
    out: Path = option(Path("engine/assets/sprites"), "pipeline directory to write", metavar="DIR")


def write_pipeline(teacher: Path, vae: Path, out: Path) -> None:
    """A stock WanPipeline directory with float16 weights."""
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),  # a fresh one: a used one stores its padding and its path
        text_encoder=pretrained(UMT5EncoderModel, teacher / "text_encoder").half(),
        vae=pretrained(AutoencoderKLWan, vae).half(),
        transformer=pretrained(WanTransformer3DModel, teacher / "transformer").half(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    pipeline.save_pretrained(out)
    for path in out.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "_name_or_path" in content:  # the path of the training machine
            del content["_name_or_path"]
            write_json(path, content, indent=2)
    config = out / "text_encoder" / "config.json"  # stored small, computed in float32
    write_json(config, {**json.loads(config.read_text()), "dtype": "float32"}, indent=2)


def write_adapters(student: AnyStudent, out: Path) -> None:
    """adapters/ROLE of every transformer of the student, bound to the transformer beside them."""
    base = base_hash(part_files(out / "transformer", "transformer").files)
    for name, model in student.stages.models.items():
        folder = out / "adapters" / name
        folder.mkdir(parents=True)
        student.lora.save_pretrained(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["target_modules"].sort()  # PEFT keeps a set; sorted, the same student gives the same file
        write_json(folder / "adapter_config.json", config, indent=2)
        tensors = {key: value.half().contiguous() for key, value in adapter_of(model).items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        write_json(folder / "base.json", {"base_sha256": base}, indent=2)
        if model.condition_proj is not None:
            weight = model.condition_proj.weight.detach().half().contiguous()
            save_file({"condition_proj.weight": weight}, folder / "condition.safetensors")


def assemble(teacher: Path, vae: Path, student: Path | None, out: Path) -> None:
    """Write the whole directory `out`; it replaces an older one."""
    with whole_folder(out) as part:
        write_pipeline(teacher, vae, part)
        if student is not None:
            model, config, _ = load_student(student, Base(part))
            write_adapters(model, part)
            geometry = {"height": SIZE, "width": SIZE, "fps": FPS}
            settings = {**geometry, "preset": config.preset_name, "overrides": config.preset_fields()}
            write_json(part / "engine.json", settings, indent=2)


def run(options: AssembleOptions) -> None:
    """Write the directory and print its size."""
    assemble(options.teacher, options.vae, options.student, options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.2f} MB")


STAGE = Stage(AssembleOptions, run)
