"""Put the trained parts together as one pipeline directory.

    python -m distill assemble --teacher runs/teacher/teacher --vae runs/vae/vae --student runs/student/student.pt \\
        --out engine/assets/sprites

The directory is a stock diffusers WanPipeline. It also holds the student's adapters in PEFT's layout: adapters/etm and
adapters/sdd, or adapters/dit of a causal student. base.json in each adapter holds the hash of its base weights;
engine.json says how the student streams. A teacher that is a pipeline directory itself, such as Wan2.1's, gives its
parts as they are, and size, frame rate and fp8_keep of its engine.json. Parts that were trained here become float16.
Without --student the stage writes only the teacher's pipeline.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
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
from distill.models.pretrained import pretrained
from distill.models.student import adapter_of
from distill.models.student_file import AnyStudent, read_student
from distill.training.stage import Options, Stage
from engine.files import read_json, whole_folder, write_json
from engine.loader import Settings, settings_of
from engine.options import option
from engine.weights.adapters import base_hash
from engine.weights.finding import part_files

FPS = 8
TRAINED_VAE = Path("runs/vae/vae")  # of stage train_vae
PARTS = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")  # of a WanPipeline


@dataclass(frozen=True)
class AssembleOptions(Options):
    teacher: Path = option(Path("runs/teacher/teacher"), "folder of the teacher", metavar="DIR")
    vae: Path | None = option(
        None, "folder of the VAE; default: the teacher's own, or runs/vae/vae where it has none", metavar="DIR"
    )
    student: Path | None = option(None, "student.pt of next_chunk, rl or dmd", metavar="FILE")
    out: Path = option(Path("engine/assets/sprites"), "pipeline directory to write", metavar="DIR")


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is a diffusers pipeline directory; the folder of stage `teacher` is not."""
    return (folder / "model_index.json").is_file()


def copy_pipeline(pipeline: Path, vae: Path | None, out: Path) -> None:
    """The pipeline's parts as they are, without adapters and engine.json; `vae` replaces its VAE."""
    shutil.copy(pipeline / "model_index.json", out)
    sources = {name: pipeline / name for name in PARTS}
    if vae and is_pipeline(vae.parent):
        sources["vae"] = vae
    elif vae:
        del sources["vae"]
        pretrained(AutoencoderKLWan, vae).half().save_pretrained(out / "vae")
        clean_paths(out / "vae")
    for name, source in sources.items():
        shutil.copytree(source, out / name)


def write_pipeline(teacher: Path, vae: Path, out: Path) -> None:
    """A stock WanPipeline directory with float16 weights, of what the stages `teacher` and `train_vae` wrote."""
    pipeline = WanPipeline(
        tokenizer=build_tokenizer(),  # a fresh one: a used one stores its padding and its path
        text_encoder=pretrained(UMT5EncoderModel, teacher / "text_encoder").half(),
        vae=pretrained(AutoencoderKLWan, vae).half(),
        transformer=pretrained(WanTransformer3DModel, teacher / "transformer").half(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
    )
    pipeline.save_pretrained(out)
    clean_paths(out)
    config = out / "text_encoder" / "config.json"  # stored small, computed in float32
    write_json(config, {**read_json(config), "dtype": "float32"}, indent=2)


def clean_paths(folder: Path) -> None:
    """Take the paths of the training machine out of the JSON files."""
    for path in folder.rglob("*.json"):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and "_name_or_path" in content:
            del content["_name_or_path"]
            write_json(path, content, indent=2)


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


def assemble(teacher: Path, vae: Path | None, student: Path | None, out: Path) -> None:
    """Write the whole directory `out`; it replaces an older one. `vae`: another than the teacher's own."""
    given = settings_of(teacher) if is_pipeline(teacher) else Settings(height=SIZE, width=SIZE, fps=FPS)
    settings = replace(given, preset=Settings.preset, overrides={})  # those of the teacher's own student, if any
    with whole_folder(out) as part:
        if is_pipeline(teacher):
            copy_pipeline(teacher, vae, part)
        else:
            write_pipeline(teacher, vae or TRAINED_VAE, part)
        if student is not None:
            trained, config = read_student(student)
            model = config.student(Base(part, config.dtype))
            model.load_trained(trained)
            write_adapters(model, part)
            settings = replace(settings, preset=config.preset_name, overrides=config.preset_fields())
        if student is not None or (teacher / "engine.json").is_file():
            write_json(part / "engine.json", changed(settings), indent=2)


def changed(settings: Settings) -> dict[str, Any]:
    """engine.json: size, frame rate and preset always, the rest where it differs from the defaults."""
    always, plain = ("height", "width", "fps", "preset"), Settings()
    return {name: value for name, value in asdict(settings).items() if name in always or value != getattr(plain, name)}


def run(options: AssembleOptions) -> None:
    """Write the directory and print its size."""
    assemble(options.teacher, options.vae, options.student, options.out)
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {size / 1e6:.2f} MB")


STAGE = Stage(AssembleOptions, run)
