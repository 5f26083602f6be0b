"""Results of gpu-check: one file of JSON lines, to which every step appends what it found at once.

kind     fields besides `step`
machine  what `header.machine` gives
check    name, passed, detail: right or wrong
speed    variant, fps, ms_p50, ms_p99, ...: a stream
row      a table's row: one operation or one convolution
ended    seconds, status: 0, the exit status, or "over its limit"
"""

import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.commands.kernels import said


@dataclass(frozen=True)
class Lines:
    """Appends the lines of one step. On a processor (`smoke`) steps do the same work at tiny shapes."""

    file: Path
    step: str
    smoke: bool

    def add(self, kind: str, **fields: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps({"step": self.step, "kind": kind, **fields}) + "\n")

    def check(self, name: str, passed: bool, detail: str) -> None:
        self.add("check", name=name, passed=bool(passed), detail=detail)
        print(f"{'ok ' if passed else 'RED'} {name}: {detail}", flush=True)

    def attempt(self, name: str, call: Callable[[], object]) -> bool:
        """Run a part of a step; one that raises is a red check, and the parts after it still run."""
        try:
            call()
        except torch.AcceleratorError as lost:  # nothing runs in this process any more
            self.check(name, False, said(lost))
            raise  # with its traceback
        except Exception as error:
            traceback.print_exc()  # the line alone does not tell where
            self.check(name, False, said(error))
            return False
        return True

    @property
    def device(self) -> str:
        return "cpu" if self.smoke else "cuda"
