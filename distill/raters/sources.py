"""The videos of a study: from a folder per model, or from a manifest."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill.data.captions import find_videos
from engine.files import read_json
from engine.model.text import check_prompt
from engine.options import read

MOST_MODELS = 9  # letters A to I; P plays
CODECS = ("h264", "vp9", "av1")  # those that browsers play from an mp4
DECODERS = (*CODECS, "libvpx-vp9", "libdav1d", "libaom-av1")  # FFmpeg's names for them


@dataclass(frozen=True)
class Source:
    """One video of one model. Videos of one `name` belong to one prompt; without a name the prompt is the name."""

    prompt: str
    file: str
    name: str = ""
    seconds: float | None = None  # measured where it is not given


def from_folder(folder: Path, captions: Path | None) -> dict[str, dict[str, Source]]:
    """Model -> name -> video: a sub-folder per model, with equal file names. ValueError for one without a caption."""
    if not folder.is_dir():
        raise FileNotFoundError(f"videos: got {folder}, expected a folder with one sub-folder per model")
    models = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {}
    for model in models:
        videos, skipped = find_videos(model, captions)
        if skipped:
            raise ValueError(f"{model.name}/{skipped[0]}")
        sources = [
            Source(video.caption, str(model / video.file), str(Path(video.file).with_suffix(""))) for video in videos
        ]
        found[model.name] = _by_name(sources, f"model {model.name}")
    return found


def from_manifest(path: Path) -> dict[str, dict[str, Source]]:
    """Model -> name -> video of {"models": {MODEL: [{"prompt", "file", "seconds", "name"}, ...]}}."""
    content = read_json(path)
    models = content.get("models")
    if not isinstance(models, dict) or not all(isinstance(rows, list) for rows in models.values()):
        raise ValueError(f"{path}: got no object `models`, expected model -> list of videos")
    return {
        model: _by_name((_listed(row, path, f"{path}: {model}: video {n}") for n, row in enumerate(rows, 1)),
                        f"{path}: {model}")
        for model, rows in models.items()
    }  # fmt: skip


def _listed(row: Any, manifest: Path, what: str) -> Source:
    if not isinstance(row, dict):
        raise ValueError(f"{what}: got {type(row).__name__}, expected an object with prompt and file")
    source = read(Source, row, what)
    check_prompt(source.prompt, f"{what}: prompt")
    if source.seconds is not None and not source.seconds > 0:
        raise ValueError(f"{what}: seconds: got {source.seconds}, expected more than 0")
    prompt = source.prompt.strip()
    return Source(prompt, str(manifest.parent / source.file), source.name or prompt, source.seconds)


def _by_name(sources: Iterable[Source], what: str) -> dict[str, Source]:
    found: dict[str, Source] = {}
    for source in sources:
        if source.name in found:
            raise ValueError(f"{what}: got {source.name[:80]!r} twice, expected every name once")
        found[source.name] = source
    return found


def check(models: dict[str, dict[str, Source]], what: str) -> None:
    """ValueError unless at least two models have videos of the same prompts."""
    if not 2 <= len(models) <= MOST_MODELS:
        raise ValueError(f"{what}: got {len(models)} models, expected 2 to {MOST_MODELS}")
    (first, names), *others = models.items()
    if not names:
        raise ValueError(f"{what}: {first}: got no videos, expected some")
    for model, found in others:
        for one, other, lacking in ((model, first, names.keys() - found), (first, model, found.keys() - names)):
            if lacking:
                raise ValueError(f"{what}: {one}: got no video {min(lacking)[:80]!r}, expected it as of {other}")
        for name, source in found.items():
            if source.prompt != names[name].prompt:
                raise ValueError(f"{what}: {name[:80]!r}: got {source.prompt[:80]!r} for {model}, "
                                 f"expected the prompt of {first}, {names[name].prompt[:80]!r}")  # fmt: skip


def copy(source: Path, target: Path) -> float:
    """Copy a video's pictures into a new mp4, without sound and metadata. Returns its seconds.

    The coded frames stay as they are. ValueError or FileNotFoundError for what browsers do not play.
    """
    if not source.is_file():
        raise FileNotFoundError(f"video: got no file {source}, expected one")
    import av

    try:
        with av.open(str(source)) as given:
            videos = given.streams.video
            codec = videos[0].codec_context.name if videos else "no video"
            if codec not in DECODERS:
                raise ValueError(f"video: got {source} with {codec}, expected one of {', '.join(CODECS)}")
            with av.open(str(target), "w", format="mp4", options={"movflags": "faststart"}) as made:
                return _copy_packets(given, made)
    except av.error.FFmpegError as error:
        raise ValueError(f"video: got {source}, expected a video that can be read ({error.strerror})") from None


def _copy_packets(given: Any, made: Any) -> float:
    stream, begin, end = given.streams.video[0], None, 0.0
    out = made.add_stream_from_template(stream, opaque=True)
    for packet in given.demux(stream):
        if packet.pts is None or packet.dts is None:
            continue  # the last one, which is empty
        at = float(packet.pts * packet.time_base)
        begin = at if begin is None else min(begin, at)
        end = max(end, at + float((packet.duration or 0) * packet.time_base))
        packet.stream = out
        made.mux(packet)
    if begin is None:
        raise ValueError(f"video: got {given.name} without frames, expected some")
    return end - begin
