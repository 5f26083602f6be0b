"""Where the parts of a model lie: diffusers' pipeline directories, Wan's own folders, and parts given as files.

`find_parts` opens and checks everything that can be known before weights are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.config import TransformerConfig
from engine.files import read_json
from engine.model.umt5 import UMT5Config
from engine.model.vae import VAEConfig
from engine.weights.containers import open_container
from engine.weights.names import WORDS, Part, recognise, unwrapped
from engine.weights.shapes import expect_class, is_wan_config, transformer_config, transformer_of, umt5_of, vae_of
from engine.weights.sources import (
    STATES,
    FileSource,
    candidates,
    check_shards,
    files_of_index,
    open_source,
    shard_of,
    source_of,
)

_STANDARD = ("diffusion_pytorch_model", "model")  # names that go first where two files hold the same part
_SHAPE_KEYS = {"num_layers", "z_dim", "d_model"}  # a config.json of a transformer, a VAE, a text encoder has one
_TOKENIZER = ("tokenizer.json", "spiece.model")
# Parts of a pipeline that the engine runs or needs not; any other one that is there changes the video.
_CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}
_UNUSED = {"scheduler", "tokenizer"}  # presets have their own schedule; the tokenizer is read by its files


@dataclass(frozen=True)
class Given:
    """Parts that the user names one by one, in place of the directory's.

    checkpoint    transformer weights: a file, or a folder that holds one
    state         the state of a training checkpoint to take; None takes the first of `prefer`
    vae, text_encoder   a file, or a component folder
    tokenizer     a folder with tokenizer.json or spiece.model
    """

    checkpoint: Path | None = None
    state: str | None = None
    prefer: Sequence[str] = STATES
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None

    @property
    def complete(self) -> bool:
        """Whether no directory is needed."""
        return None not in (self.checkpoint, self.vae, self.text_encoder, self.tokenizer)


@dataclass(frozen=True)
class Parts:
    """The open sources of a model's parts, their shapes, and what the user should know about them."""

    transformer: FileSource
    config: TransformerConfig
    vae: FileSource
    vae_config: VAEConfig
    text_encoder: FileSource
    text_config: UMT5Config
    tokenizer: Path
    notes: list[str] = field(default_factory=list)


def find_parts(folder: Path, given: Given) -> Parts:
    """Open every part of a model and check them against each other; reads no weights.

    Raises FileNotFoundError for what is missing, ValueError for what cannot be read or contradicts (got, expected).
    """
    directory = _Directory(folder) if not given.complete else None
    return _checked(given, directory)


def _checked(given: Given, directory: "_Directory | None") -> Parts:
    notes = list(directory.notes) if directory else []
    transformer, vae, text = (_source(part, given, directory) for part in WORDS)
    config, note = _transformer_config(transformer, given, directory)
    notes += [note] if note else []
    raw = _config("vae", given.vae, directory)
    vae_config = vae_of(vae.shapes(), vae.label) if raw is None else _vae_config(raw)
    raw = _config("text_encoder", given.text_encoder, directory)
    text_config = umt5_of(text.shapes(), text.label) if raw is None else UMT5Config.from_dict(dict(raw))
    for what, got, expected in (
        ("in_channels", config.in_channels, vae_config.z_dim), ("out_channels", config.out_channels, vae_config.z_dim),
    ):  # fmt: skip
        if got != expected:
            raise ValueError(f"{transformer.label}: got {what} {got}, expected {expected}, the latent channels of "
                             f"the VAE ({vae.label})")  # fmt: skip
    if config.text_dim != text_config.d_model:
        raise ValueError(f"{transformer.label}: got text_dim {config.text_dim}, expected {text_config.d_model}, the "
                         f"width of the text encoder ({text.label})")  # fmt: skip
    tokenizer = _tokenizer(given.tokenizer, directory)
    for source in (transformer, vae, text):
        notes += source.notes
    return Parts(transformer, config, vae, vae_config, text, text_config, tokenizer, notes)


def _transformer_config(
    source: FileSource, given: Given, directory: "_Directory | None"
) -> tuple[TransformerConfig, str | None]:
    """The config.json's shape where its width is the tensors'; else, for a given file, what its tensors tell."""
    raw = _config("transformer", given.checkpoint, directory)
    known = transformer_config(raw, "transformer") if raw is not None else None
    config = transformer_of(source.shapes(), known, source.label)
    if known is None or config == known:
        return config, None
    if given.checkpoint is None:
        raise ValueError(f"{source.label}: got {_difference(config, known)} in the weights, expected what config.json "
                         "says")  # fmt: skip
    return config, f"{source.label}: its own shape is taken, not the directory's ({_difference(config, known)})"


def _source(part: Part, given: Given, directory: "_Directory | None") -> FileSource:
    path: Path | None = {"transformer": given.checkpoint, "vae": given.vae, "text_encoder": given.text_encoder}[part]
    state, prefer = (given.state, given.prefer) if part == "transformer" else (None, STATES)
    if path is not None:
        return open_source(path, state, part, prefer)
    assert directory is not None
    if part == "transformer" and state is not None:
        raise ValueError(f"checkpoint_state: got {state!r} without a checkpoint, expected both")
    return directory.source(part, prefer)


def _config(part: Part, given: Path | None, directory: "_Directory | None") -> dict[str, Any] | None:
    """The raw config that goes with a part: beside the given file's folder, or the directory's."""
    if given is not None and given.is_dir() and (given / "config.json").is_file():
        raw = read_json(given / "config.json")
        if _SHAPE_KEYS & raw.keys():  # else it belongs to the training that wrote the checkpoint
            return raw
    if given is not None and part != "transformer":
        return None  # a file: its tensors tell
    return directory.config(part) if directory else None


def _vae_config(raw: Mapping[str, Any]) -> VAEConfig:
    expect_class(raw, ("AutoencoderKLWan",), "vae")
    return VAEConfig.from_dict(dict(raw))


def _difference(got: Any, expected: Any) -> str:
    names = [name for name in vars(got) if getattr(got, name) != getattr(expected, name)]
    return ", ".join(f"{name} {getattr(got, name)} instead of {getattr(expected, name)}" for name in names)


def _tokenizer(given: Path | None, directory: "_Directory | None") -> Path:
    if given is not None:
        if given.is_file():
            given = given.parent
        if not given.is_dir():
            raise FileNotFoundError(f"tokenizer: got {given}, expected a folder with {' or '.join(_TOKENIZER)}")
        return given
    assert directory is not None
    return directory.tokenizer()


class _Directory:
    """A model directory in diffusers' layout (a folder per part) or in Wan's own (files beside each other)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        check_folder(folder)
        self.notes: list[str] = []
        self._unreadable: list[str] = []
        self._seen: dict[Path, set[Part]] = {}
        self._groups = groups_of(folder)
        self.components = (folder / "model_index.json").is_file() or (folder / "transformer").is_dir()
        if self.components:
            self.notes += check_index(folder)
        elif not (folder / "config.json").is_file() and not candidates(folder):
            raise FileNotFoundError(f"{folder}: got {_content(folder)}, expected a diffusers pipeline directory "
                                    "(model_index.json, transformer/, ...) or Wan's own folder")  # fmt: skip

    def source(self, part: Part, prefer: Sequence[str]) -> FileSource:
        if self.components:
            return open_source(self.folder / part, None, part, prefer)
        files = self._files(part)
        label = str(self.folder / files[0].name)
        return source_of([open_container(file) for file in files], label, None, part, prefer)

    def _files(self, part: Part) -> list[Path]:
        """The files of Wan's own folder that hold a part, by their keys."""
        holding = [files for files in self._groups if any(part in self._parts(file) for file in files)]
        if len(holding) > 1:
            standard = [files for files in holding if (shard_of(files[0]) or (files[0].stem,))[0] in _STANDARD]
            holding = standard if len(standard) == 1 else holding
        option = f"--{_OPTIONS[part]} FILE"
        if not holding and self._unreadable:
            raise ValueError(f"{self._unreadable[0]}; it may be the {WORDS[part]}")
        if not holding:
            seen = ", ".join(files[0].name for files in self._groups) or "no weight files"
            raise FileNotFoundError(f"{self.folder}: got no {WORDS[part]} ({seen}), expected one, or {option}")
        if len(holding) > 1:
            names = ", ".join(sorted(files[0].name for files in holding))
            raise ValueError(f"{self.folder}: got several files with a {WORDS[part]} ({names}), expected one, or "
                             f"{option}")  # fmt: skip
        return holding[0]

    def _parts(self, file: Path) -> set[Part]:
        if file not in self._seen:
            try:
                self._seen[file] = parts_of(file)
            except (ValueError, OSError) as error:
                self._seen[file] = set()
                self._unreadable.append(str(error))
        return self._seen[file]

    def config(self, part: Part) -> dict[str, Any] | None:
        if self.components:
            file = self.folder / part / "config.json"
            # A transformer that a file replaces needs no folder here.
            return read_json(file) if file.is_file() or part != "transformer" else None
        file = self.folder / "config.json"
        if part != "transformer" or not file.is_file():
            return None
        raw = read_json(file)
        if not is_wan_config(raw) and raw.get("_class_name") != "WanTransformer3DModel":
            raise ValueError(f"{file}: got _class_name {raw.get('_class_name')!r}, expected 'WanModel'")
        return raw

    def tokenizer(self) -> Path:
        if self.components:
            place = self.folder / "tokenizer"
            if not any((place / name).is_file() for name in _TOKENIZER):
                raise FileNotFoundError(f"{place}: got neither {' nor '.join(_TOKENIZER)}, expected one of them")
            return place
        places = [self.folder, *sorted(p for p in self.folder.glob("*") if p.is_dir()),
                  *sorted(p for p in self.folder.glob("*/*") if p.is_dir())]  # fmt: skip
        found = [place for place in places if any((place / name).is_file() for name in _TOKENIZER)]
        named = [place for place in found if "umt5" in place.name]  # others may belong to parts that are not used
        found = named if len(found) > 1 and len(named) == 1 else found
        if len(found) != 1:
            got = ", ".join(str(place.relative_to(self.folder)) for place in found) or "none"
            raise FileNotFoundError(f"{self.folder}: got tokenizers {got}, expected one, as google/umt5-xxl")
        return found[0]


def check_folder(folder: Path) -> None:
    """FileNotFoundError with the way out for what people pass as a model and is none."""
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        raise FileNotFoundError(f"model: got {folder}, which is no directory here, expected one; download a model of "
                                f"a hub first (hf download {folder} --local-dir {folder.name})")  # fmt: skip
    if folder.is_file():
        raise FileNotFoundError(f"model: got {folder}, a file, expected a directory; pass a transformer's weights as "
                                "--checkpoint, a VAE as --vae, a text encoder as --text-encoder")  # fmt: skip
    if not folder.is_dir():
        raise FileNotFoundError(f"model: got {folder}, expected a diffusers pipeline directory or Wan's own folder")
    if (folder / "snapshots").is_dir():  # the hub's cache
        kept = sorted(place for place in (folder / "snapshots").iterdir() if place.is_dir())
        head = folder / "refs" / "main"
        current = folder / "snapshots" / head.read_text().strip() if head.is_file() else None
        use = current if current in kept else kept[-1] if kept else "one of its snapshots"
        raise FileNotFoundError(f"model: got {folder}, the root of a download cache, expected {use}")
    for name in ("low_noise_model", "high_noise_model"):
        if (folder / name).is_dir():
            raise ValueError(f"model: got {folder} with {name}/ (Wan2.2-A14B), expected a model of one transformer")


def check_index(folder: Path) -> list[str]:
    """Notes about parts that are not used. ValueError for a pipeline of which the engine would run a part only."""
    file = folder / "model_index.json"
    index = read_json(file) if file.is_file() else {}
    expect_class(index, ("WanPipeline",), file)
    if index.get("boundary_ratio") is not None:
        raise ValueError(f"{file}: got boundary_ratio {index['boundary_ratio']} (two transformers, as Wan2.2-A14B), "
                         "expected a model of one transformer")  # fmt: skip
    if index.get("expand_timesteps"):
        raise ValueError(f"{file}: got expand_timesteps (Wan2.2-TI2V-5B), expected a Wan2.1 text-to-video model")
    parts = {name: value for name, value in index.items() if not name.startswith("_") and isinstance(value, list)}
    there = {name for name, value in parts.items() if any(value)}
    for name, expected in _CLASSES.items():
        if name in there and parts[name][-1] != expected:
            raise ValueError(f"{file}: got {name} {parts[name][-1]}, expected {expected}")
    # A folder that the index does not name is a part all the same.
    there |= {place.name for place in folder.iterdir() if (place / "config.json").is_file()}
    others = sorted(there - set(_CLASSES) - _UNUSED)
    if fatal := [name for name in others if name.startswith(("transformer", "image_encoder"))]:
        raise ValueError(f"{folder}: got {', '.join(fatal)} as well, expected a text-to-video model of one transformer")
    return [f"{folder}: {', '.join(others)} is there and not used"] if others else []


_OPTIONS: dict[Part, str] = {"transformer": "checkpoint", "vae": "vae", "text_encoder": "text-encoder"}


def parts_of(file: Path) -> set[Part]:
    """Which parts a file holds. ValueError for one that cannot be read."""
    return {found.naming.part for found in recognise(map(unwrapped, open_container(file).tensors))}


def groups_of(folder: Path) -> list[list[Path]]:
    """The weight files of a folder; those of an index, and those that are numbered, belong together."""
    groups: list[list[Path]] = []
    indexed: set[Path] = set()
    for index in sorted(folder.glob("*.index.json")):
        files = files_of_index(index)
        if missing := [file.name for file in files if not file.is_file()]:
            raise FileNotFoundError(f"{folder}: got no {', '.join(missing)}, expected it: {index.name} names it")
        groups.append(files)
        indexed |= set(files)
    by_stem: dict[str, list[Path]] = {}
    for file in candidates(folder):
        if file not in indexed:
            shard = shard_of(file)
            by_stem.setdefault(f"{shard[0]} of {shard[2]}" if shard else file.name, []).append(file)
    for files in by_stem.values():
        check_shards(files)
    return groups + list(by_stem.values())


def _content(folder: Path) -> str:
    names = sorted(place.name for place in folder.iterdir())
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
