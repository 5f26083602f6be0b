"""Runs the two programs under faults: as processes of their own, and as forks of one process that has imported all."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import fake_stages

ROOT = Path(__file__).parents[3]
SOON = 60  # seconds for what takes one: a busy machine may need more
PROMPT = "a red circle moving right slowly on a gray background"
PIXELS = {"run": (32, 32), "host": (fake_stages.HEIGHT, fake_stages.WIDTH)}
FRAME = {name: 3 * height * width for name, (height, width) in PIXELS.items()}  # bytes


PROMPT_WORDS = ("--prompt", PROMPT)


def words_of(program: str, build: Path, *words: str, prompt: Sequence[str] = PROMPT_WORDS) -> list[str]:
    """The command line of engine.run over the embedded model, or of greedy-host over formulas."""
    if program == "run":
        return [sys.executable, "-m", "engine.run", "--quiet", *prompt, *words]
    plugins = ["--plugin-dir", str(build / "fake_plugin")]
    return [str(build / "greedy-host"), str(fake_stages.RECORDED), *plugins, "--quiet", *prompt, *words]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def start(program: str, build: Path, folder: Path, *words: str, prompt: Sequence[str] = PROMPT_WORDS,
          **options: Any) -> "subprocess.Popen[bytes]":  # fmt: skip
    """Start a program in a folder, in a process group of its own. Programs in folder/bin come first in its PATH."""
    path = f"{folder}/bin:{os.environ['PATH']}"
    pipes = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True} | options
    command = words_of(program, build, *words, prompt=prompt)
    return subprocess.Popen(command, cwd=folder, env=environment(PATH=path), **pipes)


def ended(process: "subprocess.Popen[bytes]", within: float = SOON) -> tuple[int, str]:
    """Exit status and stderr of a process that must end by itself."""
    try:
        _, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"still there after {within} s") from None
    return process.returncode, (err or b"").decode()


def grown(process: "subprocess.Popen[bytes]", folder: Path, name: str, size: int, earlier: Sequence[str] = ()) -> Path:
    """The temporary file of a running process, once it is larger than `size` bytes. `earlier`: files of others."""
    while process.poll() is None:
        for part in folder.glob(f".{name}.*.part"):
            if part.name not in earlier and part.stat().st_size > size:
                return part
        time.sleep(0.01)
    raise AssertionError(process.communicate())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "bin")


def frames_in(path: Path) -> int:
    """How many frames another program decodes."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


FORKS = """
import json, os, resource, signal, sys
from importlib import import_module

def limit(kind, value):
    kind = getattr(resource, kind)
    if kind == resource.RLIMIT_AS:  # megabytes more than there are
        value = int(open("/proc/self/statm").read().split()[0]) * 4096 + int(value * 2**20)
    resource.setrlimit(kind, (value, resource.RLIM_INFINITY if kind == resource.RLIMIT_AS else value))

def late(frames, *limits):
    from engine.commands.record import Recording
    real = Recording._write
    def write(self, chunk):
        real(self, chunk)
        if self.interrupt.written >= frames and limits:
            for kind, value in limits:
                limit(kind, value)
    Recording._write = write

def run(case):
    signal.alarm(300)
    for number, target in case.get("streams", {}).items():
        if target is None:
            os.close(int(number))
            open(os.devnull)  # as engine.program holds the numbers of closed streams
            setattr(sys, ("stdin", "stdout", "stderr")[int(number)], None)
        else:
            os.dup2(os.open(target, os.O_RDWR), int(number))
    if "late" in case:
        late(case["late"][0], *case["late"][1:])
    for kind, value in case.get("limits", []):
        limit(kind, value)
    if "user" in case:
        os.setuid(case["user"])
    try:
        return import_module(case.get("module", "engine.run")).main(case["words"]) or 0
    except SystemExit as stopped:
        return stopped.code or 0

cases, results = json.load(sys.stdin), []
for module in {case.get("module", "engine.run") for case in cases}:
    import_module(module)
for case in cases:
    out, err = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(out[1], 1), os.dup2(err[1], 2)
        for end in (*out, *err):
            os.close(end)
        code = 99
        try:
            code = run(case)
            if sys.stdout is not None and not sys.stdout.closed:
                sys.stdout.flush()
        except BaseException as error:
            os.write(2, f"Traceback: {error!r}".encode())
        os._exit(code)
    os.close(out[1]), os.close(err[1])
    said = [open(end[0], "rb").read().decode("latin-1") for end in (out, err)]
    results.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *said))
print(json.dumps(results))
"""


def forked(folder: Path, cases: list[dict[str, Any]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of `module`.main(words) in forks of one process, one after the other.

    limits, late   limits of resources, [name, value]: from the begin, or once [frames, *limits] so many are written
    streams        number of a standard stream -> a file to put there; None closes it
    user           the user's number
    """
    ran = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(cases), cwd=folder, env=environment(), text=True,
        capture_output=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return [tuple(one) for one in json.loads(ran.stdout)]
