"""greedy-stream inspect PATH: what a file or directory of weights is, what it lacks, and the command that runs it."""

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import nn

from engine.commands.stderr import is_bad_input, line_of, need_stdout, say
from engine.config import TransformerConfig
from engine.files import read_json
from engine.loader import CHECKPOINT_PRESET, settings_of
from engine.model.tiny_vae import TinyVAE, TinyVAEConfig
from engine.model.transformer import WanTransformer
from engine.model.umt5 import UMT5Config, UMT5Encoder
from engine.model.vae import VAE, VAEConfig
from engine.options import Parser, add_options, option, options_of
from engine.presets import presets_for
from engine.program import cleanly
from engine.weights.adapters import describe
from engine.weights.checkpoint import check_tensors
from engine.weights.containers import Container, open_container
from engine.weights.finding import OPTIONS, candidates, contents_of, part_files
from engine.weights.folders import Given, belongs, find_parts, tiny_config
from engine.weights.names import WORDS, Found, Part, is_adapter, recognise, unwrapped
from engine.weights.shapes import transformer_config, transformer_of, umt5_of, vae_of
from engine.weights.sources import FileSource, source_of, what_instead

EPILOG = """\
exit status: 0 if the engine runs it, 2 if not

examples:
  greedy-stream inspect self_forcing_dmd.pt
  greedy-stream inspect wan_models/Wan2.1-T2V-1.3B
"""


Config = TransformerConfig | VAEConfig | UMT5Config | TinyVAEConfig


@dataclass(frozen=True)
class Options:
    path: Path = option(metavar="PATH", help="a file of weights, or a directory", positional=True)
    json: bool = option(False, "print the report as JSON")


@dataclass
class Report:
    """What a path is: `lines` for the reader, `command` if it runs, `problem` if not."""

    path: str
    kind: str
    lines: list[str] = field(default_factory=list)
    command: str | None = None
    problem: str | None = None


def inspect(path: Path) -> Report:
    """Describe a path. FileNotFoundError where there is nothing, ValueError for a file that cannot be opened."""
    if not path.exists():
        raise FileNotFoundError(f"inspect: got {path}, expected an existing file or directory")
    if path.is_dir():
        return _directory(path)
    return _containers(path, [open_container(path)])


def _directory(path: Path) -> Report:
    if (path / "manifest.json").is_file():
        return Report(
            str(path), "bundle", [f"python -m export inspect {path}"], f"python -m engine.run --bundle {path}"
        )
    if (path / "model_index.json").is_file() or (path / "transformer").is_dir():
        return _model(path)
    if (path / "adapter_config.json").is_file():
        files = candidates(path)
        names = [key for file in files if file.name.startswith("adapter_model") for key in open_container(file).tensors]
        if (adapter := _adapter(path, names)) is not None:
            return adapter
    # Wan's own folder holds several parts beside each other; a component's, or a checkpoint's, holds one.
    files = candidates(path)
    held = set[Part]().union(*(contents_of(file).parts for file in files))
    if not held and files and (adapter := _adapter(path, list(open_container(files[0]).tensors))) is not None:
        return adapter
    if len(held) == 1 and not any(path.glob("*/*/spiece.model")):
        return _containers(path, [open_container(file) for file in part_files(path, held.pop()).files])
    return _model(path)


def _model(path: Path) -> Report:
    """A directory with all parts of a model, or one that lacks some."""
    report = Report(str(path), "model directory")
    try:
        settings = settings_of(path)
        parts = find_parts(path, Given())
    except (ValueError, OSError) as error:
        report.problem = str(error)
        return report
    configs: list[tuple[FileSource, Config]] = [
        (parts.transformer, parts.config), (parts.vae, parts.vae_config), (parts.text_encoder, parts.text_config)
    ]  # fmt: skip
    report.lines += [_line(source, config) for source, config in configs] + _tiny(path)
    report.lines += [f"tokenizer: {parts.tokenizer}", *(f"note: {note}" for note in parts.notes)]
    if (path / "engine.json").is_file():
        report.lines.append(f"engine.json: preset {settings.preset}, {settings.width}x{settings.height}")
    report.problem = next(filter(None, (_lacks(source, config) for source, config in configs)), None)
    if report.problem is None:
        report.command = f'python -m engine.run --model {quote(str(path))} --prompt "..." --seconds 5 --out video.mp4'
    return report


def _tiny(path: Path) -> list[str]:
    """Lines about a model's own tiny VAE; the model runs without it."""
    if not (path / "tiny_vae").is_dir():
        return []
    try:
        parts = find_parts(path, Given(decoder="tiny"))
        assert parts.tiny_vae is not None
        assert parts.tiny_config is not None
        line, problem = _line(parts.tiny_vae, parts.tiny_config), _lacks(parts.tiny_vae, parts.tiny_config)
    except (ValueError, OSError) as error:
        return [f"note: --decoder tiny does not run: {error}"]
    return [line, *(f"note: {note}" for note in parts.tiny_vae.notes),
            *([f"note: --decoder tiny does not run: {problem}"] if problem else [])]  # fmt: skip


def _containers(path: Path, containers: Sequence[Container]) -> Report:
    """A file, or the files of one component."""
    names = [unwrapped(key) for container in containers for key in container.tensors]
    found = recognise(names)
    kinds = ", ".join(sorted({container.kind for container in containers}))
    size = sum(container.file.stat().st_size for container in containers)
    tensors = [stored for container in containers for stored in container.tensors.values()]
    counted = Counter(str(stored.dtype).removeprefix("torch.") for stored in tensors)
    dtypes = ", ".join(f"{name} ({count})" for name, count in counted.most_common(6))
    report = Report(str(path), kinds, [f"{len(names)} tensors, {size / 1e9:.2f} GB: {dtypes}"])
    if not found and (adapter := _adapter(path, names)) is not None:
        return adapter
    if not found:
        report.problem = f"got {what_instead(names, found)}, expected a part of a Wan2.1 text-to-video model"
        return report
    options, presets = [], set[str]()
    for one in found:
        try:
            source = source_of(containers, str(path), one.state or None, one.naming.part)
            config = _config(source, path)
            report.lines.append(_line(source, config))
            if problem := _lacks(source, config):
                report.problem = report.problem or problem
            else:
                options.append(one)
                presets |= {_presets(config)} if isinstance(config, TransformerConfig) else set()
        except ValueError as error:
            report.problem = report.problem or str(error)
    report.lines += sorted(presets)
    if options:
        report.problem = None
        report.command = _command(path, options)
    return report


def _presets(config: TransformerConfig) -> str:
    """Which presets a transformer may be for; its tensors do not tell."""
    names = ", ".join(presets_for(config.dim))
    return (f"preset: the file does not tell which one its weights were trained for; of width {config.dim} there are "
            f"{names}; --preset NAME chooses, else {CHECKPOINT_PRESET} is taken")  # fmt: skip


def _adapter(path: Path, names: Sequence[str]) -> Report | None:
    """A LoRA file or PEFT folder; None for anything else."""
    if not is_adapter(names):
        return None
    report = Report(str(path), "adapter")
    try:
        about = describe(path)
    except ValueError as error:
        report.problem = str(error)
        return report
    if not about.blocks:
        report.problem = "got an adapter that changes no block, expected one for Wan's transformer"
        return report
    ranks = f", ranks {', '.join(map(str, about.ranks))}" if about.ranks else ""
    width = f" of a transformer of width {about.width}" if about.width else ""
    report.lines.append(
        f"{about.layout}: changes {about.parameters} parameters{width}, in {about.blocks} blocks{ranks}"
    )
    report.lines.append(f"spelling: {', '.join(about.spelling)}")
    report.lines += [f"note: {note}" for note in about.notes]
    report.command = f'python -m engine.run --model DIR --adapter {quote(str(path))} --prompt "..."'
    return report


def _command(path: Path, found: Sequence[Found]) -> str:
    """The command line that runs the parts of a file."""
    parts = list(dict.fromkeys(one.naming.part for one in found))
    given = " ".join(f"--{OPTIONS[part]} {quote(str(path))}" for part in parts)
    return f'python -m engine.run --model DIR {given} --prompt "..."'


def _config(source: FileSource, path: Path) -> Config:
    """A part's shape: from the config.json beside its files, else from its tensors."""
    part, file = source.found.naming.part, path / "config.json"
    raw = read_json(file) if file.is_file() else None
    if part == "transformer":
        known = None if raw is None else transformer_config(raw, file)
        return transformer_of(source.shapes(), known, source.label)
    if part == "tiny_vae":
        return tiny_config(source, raw if raw is not None and belongs(raw, part) else None, VAEConfig())
    if part == "vae":
        return vae_of(source.shapes(), source.label) if raw is None else VAEConfig.from_dict(raw)
    return umt5_of(source.shapes(), source.label) if raw is None else UMT5Config.from_dict(raw)


def _line(source: FileSource, config: Config) -> str:
    one = source.found
    where = f", state {one.state}" if one.state else ""
    stored = ", ".join(source.dtypes)
    return f"{WORDS[one.naming.part]}: {_words(config)}; {one.naming.name} names{where}; {stored} ({source.label})"


def _words(config: Config) -> str:
    if isinstance(config, TransformerConfig):
        heads = f"{config.num_attention_heads} heads of {config.attention_head_dim}"
        return f"{config.num_layers} blocks of width {config.dim} ({heads}), {config.in_channels} channels"
    if isinstance(config, VAEConfig):
        return f"{config.z_dim} latent channels, base {config.base_dim}"
    if isinstance(config, TinyVAEConfig):
        scale = f"{config.scale_factor_spatial} in space, {config.scale_factor_temporal} in time"
        return f"{config.z_dim} latent channels, widths {', '.join(map(str, config.widths))}; {scale}"
    return f"UMT5, {config.num_layers} blocks of width {config.d_model}, {config.vocab_size} tokens"


def _lacks(source: FileSource, config: Config) -> str | None:
    """The tensors that a part lacks, or has too many."""
    with torch.device("meta"):
        module: nn.Module
        if isinstance(config, TransformerConfig):
            module = WanTransformer(config)  # W_c comes from an adapter's condition.safetensors alone
        else:
            kinds = {VAEConfig: VAE, TinyVAEConfig: TinyVAE, UMT5Config: UMT5Encoder}
            module = kinds[type(config)](config)
    try:
        check_tensors(source.label, source.shapes(), module.state_dict())
    except ValueError as error:
        return str(error)
    return None


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 if the engine runs what was found, 2 if not."""
    parser = Parser(prog="greedy-stream inspect", description=__doc__, epilog=EPILOG)
    add_options(parser, Options)
    options = options_of(parser.parse_args(argv), Options)
    try:
        with cleanly():
            need_stdout("inspect")
            report = inspect(options.path)
            _show(report, options.json)
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {line_of(error)}")
        return 2 if is_bad_input(error) else 1
    return 2 if report.problem else 0


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(_plain(report)))
        return
    print(f"{report.path}: {report.kind}")
    for line in report.lines:
        print(f"  {line}")
    print(f"  does not run: {report.problem}" if report.problem else f"  runs with: {report.command}")


def _plain(report: Report) -> Mapping[str, Any]:
    return asdict(report)


if __name__ == "__main__":
    sys.exit(main())
