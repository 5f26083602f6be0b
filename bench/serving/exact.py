"""The frames that a server owes: those of the engine's own command, with the same prompt, seed and length."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

from bench.instruments.check import Check
from bench.serving.viewers import Seen

LEAST = 5  # frames that say anything


def checksum(
    model: Sequence[str], prompt: str, seed: int, frames: int, switches: Sequence[tuple[int, str]] = ()
) -> str:
    """The sha256 of `python -m engine.run --out checksum`; `switches`: frame and prompt. ValueError if it fails."""
    command = [sys.executable, "-m", "engine.run", "--prompt", prompt, "--seed", str(seed), "--frames", str(frames)]
    for frame, following in switches:
        command += ["--prompt-at", f"{frame}f", following]
    done = subprocess.run([*command, "--out", "checksum", "--json", *model], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"engine.run: got {(done.stderr.strip().splitlines() or ['nothing'])[-1]}, expected a checksum"
        )
    return json.loads(done.stdout.splitlines()[-1])["sha256"]


def compared(model: Sequence[str], seen: Seen, what: str) -> Check:
    """Whether a viewer of raw frames got the engine's, bit for bit."""
    if seen.frames < LEAST:
        return Check(
            what, False, f"got {seen.frames} frames ({seen.failed or seen.refused}), expected at least {LEAST}"
        )
    expected = checksum(model, seen.plan.prompts[0], seen.plan.seed, seen.frames)
    got = seen.digests[seen.frames]
    return Check(what, got == expected, f"{seen.frames} frames, sha256 {got[:16]}, engine.run {expected[:16]}")
