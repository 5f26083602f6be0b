"""Where the parts of a model lie: diffusers' pipeline directories, Wan's own folders, and parts given as files.

`find_parts` opens and checks everything that can be known before weights are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from engine.config import TransformerConfig
from engine.files import read_json
from engine.model.tiny_vae import TinyVAEConfig, expect_fit
from engine.model.umt5 import UMT5Config
from engine.model.vae import VAEConfig
from engine.weights.containers import open_container
from engine.weights.finding import OPTIONS, Folder, candidates, choose
from engine.weights.names import Part, other_kind, unwrapped
from engine.weights.shapes import (
    expect_class,
    is_wan_config,
    last_rows,
    text_rows_of,
    tiny_vae_of,
    transformer_config,
    transformer_of,
    umt5_of,
    vae_of,
)
from engine.weights.sources import STATES, FileSource, open_source, source_of

# Keys of a config.json that belongs to a part; another one belongs to the training that wrote a checkpoint.
_SHAPE_KEYS: dict[Part, str] = {"transformer": "num_layers", "vae": "z_dim", "text_encoder": "d_model"}
_TOKENIZER = ("tokenizer.json", "spiece.model")
# Parts of a pipeline that the engine runs or needs not; any other one that is there changes the video.
_CLASSES = {"transformer": "WanTransformer3DModel", "vae": "AutoencoderKLWan", "text_encoder": "UMT5EncoderModel"}
# Presets have their own schedule, the tokenizer is read by its files, and a tiny VAE where it is asked for.
_UNUSED = {"scheduler", "tokenizer", "tiny_vae"}


@dataclass(frozen=True)
class Given:
    """Parts that the user names one by one, in place of the directory's.

    checkpoint    transformer weights: a file, or a folder that holds one
    state         the state of a training checkpoint to take; None takes the first of `prefer`
    vae, text_encoder   a file, or a folder that holds one
    tokenizer     a folder with tokenizer.json or spiece.model in it
    vae_decoder   a tiny VAE that decodes in the place of the VAE; `decoder` "tiny" takes the directory's own
    dtype         that the weights will have: it decides between variants of the files
    """

    checkpoint: Path | None = None
    state: str | None = None
    prefer: Sequence[str] = STATES
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    vae_decoder: Path | None = None
    decoder: str = "full"
    dtype: torch.dtype | None = None

    @property
    def tiny(self) -> bool:
        """Whether a tiny VAE decodes."""
        return self.vae_decoder is not None or self.decoder == "tiny"

    @property
    def complete(self) -> bool:
        """Whether no directory is needed."""
        return self.decoder != "tiny" and None not in (self.checkpoint, self.vae, self.text_encoder, self.tokenizer)


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
    text_rows: int | None = None  # of a prompt, where the transformer's config.json tells
    tiny_vae: FileSource | None = None  # that decodes in the place of the VAE
    tiny_config: TinyVAEConfig | None = None
    notes: list[str] = field(default_factory=list)


def find_parts(folder: Path, given: Given) -> Parts:
    """Open every part of a model and check them against each other; reads no weights.

    Raises FileNotFoundError for what is missing, ValueError for what cannot be read or contradicts (got, expected).
    """
    directory = _Directory(folder, given.dtype) if not given.complete else None
    return _checked(given, directory)


def _checked(given: Given, directory: "_Directory | None") -> Parts:
    notes = list(directory.notes) if directory else []
    needed: tuple[Part, ...] = ("transformer", "vae", "text_encoder")
    transformer, vae, text = (_source(part, given, directory) for part in needed)
    raw = _config("transformer", given.checkpoint, transformer, directory)
    config, note = _transformer_config(transformer, given, raw)
    text_rows = text_rows_of(raw, transformer.label) if raw is not None else None
    notes += [note] if note else []
    raw = _config("vae", given.vae, vae, directory)
    vae_config = vae_of(vae.shapes(), vae.label) if raw is None else _vae_config(raw)
    raw = _config("text_encoder", given.text_encoder, text, directory)
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
    tiny = _source("tiny_vae", given, directory) if given.tiny else None
    tiny_config = _tiny_config(tiny, vae_config, given, directory) if tiny else None
    for source in (transformer, vae, text, *filter(None, [tiny])):
        notes += source.notes
    return Parts(
        transformer, config, vae, vae_config, text, text_config, tokenizer, text_rows, tiny, tiny_config, notes
    )


def _tiny_config(source: FileSource, vae: VAEConfig, given: Given, directory: "_Directory | None") -> TinyVAEConfig:
    """The tiny decoder's shape. ValueError unless it decodes the VAE's latents to pictures of the same size."""
    config = tiny_config(source, _config("tiny_vae", given.vae_decoder, source, directory), vae)
    expect_fit(config, vae, source.label)
    return config


def tiny_config(source: FileSource, raw: Mapping[str, Any] | None, vae: VAEConfig) -> TinyVAEConfig:
    """The shape of a tiny decoder: what its config.json says, and what its tensors tell beside that."""
    config = tiny_vae_of(source.shapes(), source.label, vae)
    if raw is not None:
        expect_class(raw, ("TinyVAE",), "tiny_vae")
        config = TinyVAEConfig.from_dict({**asdict(config), **raw})
    elif any("lighttae" in file.name.lower() for file in source.files):
        config = replace(config, latents_mean=vae.latents_mean, latents_std=vae.latents_std)
        source.notes.append(f"{source.label}: it takes latents that are not normalised (LightTAE)")
    source.keep_last(last_rows(source.shapes(), config))
    return replace(config, encoder_width=None)


def _transformer_config(
    source: FileSource, given: Given, raw: Mapping[str, Any] | None
) -> tuple[TransformerConfig, str | None]:
    """The config.json's shape where its width is the tensors'; else, for a given file, what its tensors tell."""
    known = transformer_config(raw, "transformer") if raw is not None else None
    config = transformer_of(source.shapes(), known, source.label)
    if known is None or config == known:
        return config, None
    if given.checkpoint is None:
        raise ValueError(f"{source.label}: got {_difference(config, known)} in the weights, expected what config.json "
                         "says")  # fmt: skip
    return config, f"{source.label}: its own shape is taken, not the directory's ({_difference(config, known)})"


def _source(part: Part, given: Given, directory: "_Directory | None") -> FileSource:
    path: Path | None = {"transformer": given.checkpoint, "vae": given.vae, "text_encoder": given.text_encoder,
                         "tiny_vae": given.vae_decoder}[part]  # fmt: skip
    state, prefer = (given.state, given.prefer) if part == "transformer" else (None, STATES)
    if path is not None:
        if path.is_dir():
            check_folder(path, OPTIONS[part])
        if part == "transformer" and (path / "model_index.json").is_file():
            check_index(path)
        return open_source(path, state, part, prefer, given.dtype)
    if directory is None:
        raise ValueError("decoder: got tiny without a model directory, expected --vae-decoder FILE")
    if part == "transformer" and state is not None:
        raise ValueError(f"checkpoint_state: got {state!r} without a checkpoint, expected both")
    return directory.source(part, prefer)


def _config(
    part: Part, given: Path | None, source: FileSource, directory: "_Directory | None"
) -> dict[str, Any] | None:
    """The raw config that goes with a part: beside the files in a given folder, or the directory's."""
    if given is not None and given.is_dir() and (file := source.files[0].parent / "config.json").is_file():
        raw = read_json(file)
        if belongs(raw, part):
            return raw
    if given is not None and part != "transformer":
        return None  # a file: its tensors tell
    return directory.config(part) if directory else None


def belongs(raw: Mapping[str, Any], part: Part) -> bool:
    """Whether a config.json beside a part's files tells its shape, and is not another part's or a training's."""
    if part == "tiny_vae":
        own = {field.name for field in fields(TinyVAEConfig)} & set(raw)
        return "widths" in own or (bool(own) and raw.get("_class_name", "TinyVAE") == "TinyVAE")
    return _SHAPE_KEYS[part] in raw and (part != "transformer" or "d_model" not in raw)


def _vae_config(raw: Mapping[str, Any]) -> VAEConfig:
    expect_class(raw, ("AutoencoderKLWan",), "vae")
    return VAEConfig.from_dict(dict(raw))


def _difference(got: Any, expected: Any) -> str:
    names = [name for name in vars(got) if getattr(got, name) != getattr(expected, name)]
    return ", ".join(f"{name} {getattr(got, name)} instead of {getattr(expected, name)}" for name in names)


def _tokenizer(given: Path | None, directory: "_Directory | None") -> Path:
    if given is not None:
        given = given.parent if given.is_file() else given
        if not given.is_dir():
            raise FileNotFoundError(f"tokenizer: got {given}, expected a folder with {' or '.join(_TOKENIZER)}")
        check_folder(given, "tokenizer")
        return find_tokenizer(given)
    assert directory is not None
    return directory.tokenizer()


def find_tokenizer(folder: Path) -> Path:
    """The folder with a tokenizer: this one, or one inside it. FileNotFoundError unless there is exactly one."""
    depths = (folder, *sorted(folder.glob("*")), *sorted(folder.glob("*/*")))
    found = [place for place in depths if any((place / name).is_file() for name in _TOKENIZER)]
    if folder in found:
        return folder
    for fits in (lambda place: "umt5" in place.name, lambda place: place.name == "tokenizer"):
        # Others may belong to parts that are not used.
        named = [place for place in found if fits(place)]
        found = named if len(found) > 1 and len(named) == 1 else found
    if len(found) != 1:
        got = ", ".join(str(place.relative_to(folder)) for place in found) or "none"
        raise FileNotFoundError(f"{folder}: got tokenizers {got}, expected one, as google/umt5-xxl")
    return found[0]


class _Directory:
    """A model directory in diffusers' layout (a folder per part) or in Wan's own (files beside each other)."""

    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.folder, self._dtype = folder, dtype
        check_folder(folder)
        self.notes: list[str] = []
        self._weights = Folder(folder, dtype)
        self.components = (folder / "model_index.json").is_file() or (folder / "transformer").is_dir()
        if self.components:
            self.notes += check_index(folder)
        elif not (folder / "config.json").is_file() and not candidates(folder):
            raise FileNotFoundError(f"{folder}: got {_content(folder)}, expected a diffusers pipeline directory "
                                    "(model_index.json, transformer/, ...) or Wan's own folder")  # fmt: skip

    def source(self, part: Part, prefer: Sequence[str]) -> FileSource:
        if part == "tiny_vae" and self.components and not (self.folder / part).is_dir():
            raise FileNotFoundError(f"decoder: got tiny, but {self.folder} has no {part}/, expected it, or "
                                    "--vae-decoder FILE")  # fmt: skip
        if self._apart(part):
            return open_source(self.folder / part, None, part, prefer, self._dtype)
        chosen = choose(self.folder, part, [self._weights])
        label = str(self.folder / chosen.files[0].name)
        source = source_of([open_container(file) for file in chosen.files], label, None, part, prefer)
        source.notes += chosen.notes
        return source

    def _apart(self, part: Part) -> bool:
        """Whether a part has a folder of its own; in Wan's layout only a tiny VAE may."""
        return self.components or (part == "tiny_vae" and (self.folder / part).is_dir())

    def config(self, part: Part) -> dict[str, Any] | None:
        if self._apart(part):
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
        return find_tokenizer(self.folder)


def check_folder(folder: Path, what: str = "model") -> None:
    """FileNotFoundError with the way out for what people pass as a model, or a part of one, and is none."""
    if not folder.exists() and len(folder.parts) == 2 and not folder.is_absolute():
        raise FileNotFoundError(f"model: got {folder}, which is no directory here, expected one; download a model of "
                                f"a hub first (hf download {folder} --local-dir {folder.name})")  # fmt: skip
    if folder.is_file():
        raise FileNotFoundError(f"model: got {folder}, {_kind(folder)}, expected a directory; pass a transformer "
                                "as --checkpoint, a VAE as --vae, a text encoder as --text-encoder")  # fmt: skip
    if not folder.is_dir():
        raise FileNotFoundError(f"model: got {folder}, expected a diffusers pipeline directory or Wan's own folder")
    if (folder / "snapshots").is_dir():  # the hub's cache
        kept = sorted(place for place in (folder / "snapshots").iterdir() if place.is_dir())
        head = folder / "refs" / "main"
        current = folder / "snapshots" / head.read_text().strip() if head.is_file() else None
        use = current if current in kept else kept[-1] if kept else "one of its snapshots"
        raise FileNotFoundError(f"{what}: got {folder}, the root of a download cache, expected {use}")
    for name in ("low_noise_model", "high_noise_model"):
        if (folder / name).is_dir():
            raise ValueError(f"{what}: got {folder} with {name}/ (Wan2.2-A14B), expected a model of one transformer")


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


def _kind(file: Path) -> str:
    """What a file is, in words: a file, if it may be a part of a model."""
    try:
        return other_kind(map(unwrapped, open_container(file).tensors)) or "a file"
    except (ValueError, OSError, ImportError) as error:
        return str(error).removeprefix(f"{file}: got ").partition(", expected")[0]


def _content(folder: Path) -> str:
    names = sorted(place.name for place in folder.iterdir())
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"
