"""The frames that a server owes: those of the engine's own command, with the same prompt, seed and length."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence

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


def compared(model: Sequence[str], viewers: Mapping[str, Seen]) -> list[Check]:
    """Whether viewers of one prompt and seed, who took raw frames, got the engine's, bit for bit. Keys name the checks.

    The engine makes the longest of the videos. The others are beginnings of it: each chunk's sum must be the same.
    """
    found = []
    longest = max(viewers.values(), key=lambda one: one.frames)
    owed = ""
    if longest.frames >= LEAST:
        owed = checksum(model, longest.plan.prompts[0], longest.plan.seed, longest.frames)
    for name, one in viewers.items():
        if one.frames < LEAST:
            why = one.failed or one.refused or "it took too long"
            found.append(Check(name, False, f"got {one.frames} frames ({why}), expected at least {LEAST}"))
            continue
        wrong = [frames for frames, digest in one.digests.items() if digest != longest.digests.get(frames)]
        right = not wrong and longest.digests[longest.frames] == owed
        detail = f"{one.frames} frames, sha256 {one.digests[one.frames][:16]}; the longest video "
        detail += f"{longest.digests[longest.frames][:16]}, engine.run {owed[:16]}"
        found.append(Check(name, right, detail + (f"; the first {min(wrong)} frames differ" if wrong else "")))
    return found
