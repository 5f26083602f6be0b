"""What a stage tells the command line: its config, its options and what to run.

Every module of a stage ends with `STAGE = Stage(...)`. `distill/__main__.py` reads it, and nothing else of the stage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.options import option


@dataclass(frozen=True)
class Options:
    """Command-line options of every stage."""

    threads: int = option(1, "CPU threads; on two cores, two runs of one thread beat one run of two")
    debug: bool = option(False, "show the traceback of an error")


@dataclass(frozen=True)
class TableOptions(Options):
    """Options of a stage whose config is a table of a TOML file."""

    config: Path = option(Path("distill/configs/sprites.toml"), "TOML file with one table per stage", metavar="FILE")
    set: tuple[str, ...] = option((), "replace one entry of the table; may be repeated", metavar="KEY=VALUE")


@dataclass(frozen=True)
class TrainingOptions(TableOptions):
    """Options of a stage that trains. Subclasses add `out`, with a default of their own."""

    out: Path = option(Path("runs"), "folder of checkpoints and logs")
    tensorboard: bool = option(False, "also write TensorBoard logs to --out")

    @property
    def board(self) -> Path | None:
        """The folder of TensorBoard logs, if they are wanted."""
        return self.out if self.tensorboard else None


@dataclass(frozen=True)
class Stage:
    """One stage as the command line sees it.

    options  dataclass of its command-line options, a subclass of Options
    run      called as run(config, options), or as run(options) for a stage without a config
    config   dataclass that `table` of the config file fills
    """

    options: type[Options]
    run: Callable[..., None]
    config: type | None = None
    table: str = ""


def leave_processes() -> None:
    """Wait for the other processes, if there are any, and close the connections to them.

    Without this, gloo's threads can outlive tensors that Python tears down at its end, and abort.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
