"""Make a blinded page on which raters compare the videos of several models.

    python -m distill questionnaire make --videos videos/ --out study/

`videos/` has a folder per model with equal file names, such as videos/greedy/01.mp4 and videos/causvid/01.mp4. The
prompt stands in 01.txt beside each of them, or in the file of --captions (.jsonl or .csv with file and caption). Or a
manifest names the videos, by paths relative to it; `seconds` and `name` may be left out:

    {"models": {"greedy": [{"prompt": "a cat", "file": "a/1.mp4", "seconds": 4.9, "name": "cat"}], "causvid": [...]}}

Videos of one name, else of one prompt, are shown together. They are h264, vp9 or av1; sound and metadata are left out.

    study/page/       what raters get: index.html, its script and the videos under random names
    study/key.json    which name is which model; keep it from raters
"""

import json
import os
import secrets
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distill.raters import sources
from distill.raters.items import GROUPS, QUESTIONS, SCALE
from distill.raters.sources import Source
from distill.raters.study import FORMAT, KEY, LENGTHS, PAGE, Prompt, Study
from distill.training.stage import Options, Stage
from engine.files import whole_folder, write_json
from engine.options import option

FILES = ("index.html", "order.js", "page.js", "style.css")
HERE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class MakeOptions(Options):
    videos: Path | None = option(None, "folder with a sub-folder of videos per model", metavar="DIR", exclusive="of")
    manifest: Path | None = option(None, "JSON file that lists each model's videos", metavar="FILE", exclusive="of")
    captions: Path | None = option(None, "with --videos: all prompts, instead of NAME.txt", metavar="FILE")
    out: Path = option(Path("study"), "new folder for page and key", metavar="DIR")
    title: str = option("Comparing videos", "heading of the page")


def run(options: MakeOptions) -> None:
    """Copy the videos under blinded names, and write page and key: all of it or nothing."""
    models = _models(options)
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise ValueError(f"out: got {options.out}, which is there already, expected a new folder")
    with whole_folder(options.out) as part:
        study = _copied(models, options.title, part / PAGE / "videos")
        for name in FILES:
            shutil.copyfile(HERE / name, part / PAGE / name)
        script = f"const STUDY = {json.dumps(shown(study), indent=1)};\n"
        (part / PAGE / "study.js").write_text(script, encoding="utf-8")
        write_json(part / KEY, {"format": FORMAT, **asdict(study)})
    lengths = Counter(prompt.length for prompt in study.prompts)
    counted = ", ".join(f"{lengths[name]} of {name}" for name in LENGTHS if lengths[name])
    print(f"{len(study.models)} models, {len(study.prompts)} prompts ({counted})")
    print(f"page for raters: {options.out / PAGE}; key, not for raters: {options.out / KEY}")


def _models(options: MakeOptions) -> dict[str, dict[str, Source]]:
    if options.videos:
        models = sources.from_folder(options.videos, options.captions)
    elif options.manifest and not options.captions:
        models = sources.from_manifest(options.manifest)
    else:
        got = "--captions with --manifest" if options.manifest else "neither"
        raise ValueError(f"videos: got {got}, expected --videos, or --manifest alone")
    sources.check(models, str(options.videos or options.manifest))
    return models


def _copied(models: dict[str, dict[str, Source]], title: str, folder: Path) -> Study:
    folder.mkdir(parents=True)
    prompts = []
    for number, name in enumerate(next(iter(models.values())), 1):
        videos, seconds = {}, 0.0
        for model, found in models.items():
            blinded = secrets.token_hex(6)
            measured = sources.copy(Path(found[name].file), folder / f"{blinded}.mp4")
            os.utime(folder / f"{blinded}.mp4", (0, 0))  # times would tell the order of the models
            videos[blinded], seconds = model, max(seconds, found[name].seconds or measured)
        prompt = found[name].prompt
        prompts.append(Prompt(str(number), prompt, name, round(seconds, 3), videos))
    return Study(secrets.token_hex(8), title, tuple(models), tuple(prompts))


def shown(study: Study) -> dict[str, Any]:
    """What the page knows. The videos of a prompt are sorted by their random names."""
    return {
        "id": study.id,
        "title": study.title,
        "scale": SCALE,
        "groups": [group._asdict() | {"items": [item._asdict() for item in group.items]} for group in GROUPS],
        "questions": QUESTIONS,
        "prompts": [{"id": row.id, "prompt": row.prompt, "videos": sorted(row.videos)} for row in study.prompts],
    }


STAGE = Stage(MakeOptions, run)
