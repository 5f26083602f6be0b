"""How programs end by a signal, from their first imports on: no traceback, and the status 128 + its number."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from limits import HANG

from engine.program import cleanly

ROOT = Path(__file__).parents[3]
PROGRAMS = {
    "engine.run": ["-m", "engine.run", "--prompt", "a", "--out", "clip.mp4"],
    "greedy-stream run": ["greedy-stream", "run", "--prompt", "a", "--out", "clip.mp4"],
    "export": ["-m", "export", "--out", "bundle"],
    "distill": ["-m", "distill", "gallery", "--out", "gallery.webp"],
    "bench": ["-m", "bench", "stream", "--rounds", "1000"],
}
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]

pytestmark = [pytest.mark.slow]


def start(folder, words):
    script = folder / "greedy-stream"
    script.write_text("import sys\nfrom engine.cli import main\nif __name__ == '__main__':\n    sys.exit(main())\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # A child of a process in the background has SIGINT ignored, and one below nohup has SIGHUP.
    usual = {number: signal.signal(number, signal.SIG_DFL) for number in SIGNALS}
    try:
        return subprocess.Popen([sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, text=True)  # fmt: skip
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def wait_for_handlers(process):
    """Until the program has its own code running: before that only Python itself is there."""
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.partition("SigCgt:")[2].split()[0], 16)
        if caught >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.002)
    raise AssertionError(process.communicate())


def said_by(process, number):
    """stdout and stderr of a program that got a signal, without a traceback."""
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        out, err = process.communicate(timeout=HANG)
        # Python drops what a handler raises inside a finalizer, and says so.
        assert "Exception ignored in" in err, (out, err)
        assert "KeyboardInterrupt" in err
    else:
        assert "Traceback" not in err
    return out, err


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_signal_at_any_time_of_the_start(tmp_path, name, number):
    draw = random.Random(f"{name} {number}")
    for latest in (0.02, 3.0):
        process = start(tmp_path, PROGRAMS[name])
        wait_for_handlers(process)
        time.sleep(draw.uniform(0, latest))
        process.send_signal(number)
        out, err = said_by(process, number)
        if process.returncode == 0:  # engine.run alone, once it has frames
            assert "engine.run" in name or name.startswith("greedy-stream")
            assert (tmp_path / "clip.mp4").stat().st_size > 0
            continue
        assert process.returncode == 128 + number, (out, err)
        assert "error" not in err
        if "memory plan" in err:  # its work had begun: it says how it ended
            assert err.endswith("stopped before the first frame\n")
        assert {path.name for path in tmp_path.iterdir()} <= {"greedy-stream", "clip.mp4", "gallery.webp"}


def test_what_is_ignored_stays_ignored(tmp_path):
    """As nohup wants it."""
    code = """
import signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
sys.argv[0] = 'greedy-stream'
import engine
print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
"""
    out, err = start(tmp_path, ["-c", code]).communicate(timeout=HANG)
    assert (out, err) == ("True\n", "")


def test_a_program_of_others_keeps_its_handlers(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import engine\n")
    (tmp_path / "other" / "__main__.py").write_text(
        "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler, "
        "signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)\n"
    )
    for words in (["-m", "other"], ["-m", "other", "-m", "engine.run"]):
        out, err = start(tmp_path, words).communicate(timeout=HANG)
        assert (out, err) == ("True True\n", "")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_block_is_left_cleanly(number):
    """What is half done is undone, also where a library turns the signal into an error of its own."""
    before, undone = [signal.getsignal(one) for one in SIGNALS], []

    def work(error):
        try:
            os.kill(os.getpid(), number)
            time.sleep(HANG)
        except KeyboardInterrupt:
            if error is not None:
                raise error from None
            raise
        finally:
            undone.append(error)

    for error in (None, ImportError("numpy failed to import")):
        with pytest.raises(SystemExit) as ended, cleanly():
            work(error)
        assert ended.value.code == 128 + number
    assert len(undone) == 2
    assert [signal.getsignal(one) for one in SIGNALS] == before
    with pytest.raises(ValueError, match="as it is"), cleanly():
        raise ValueError("as it is")


@pytest.mark.parametrize(
    "flags", [[], ["-B"], ["-Ximporttime"], ["-X", "utf8"], ["-Wmodule"], ["-W", "ignore"], ["-P"]]
)
def test_every_way_to_start_a_program(tmp_path, flags):
    """Handlers are there from the first import on, whatever the interpreter's own options are."""
    for words in (["-m", "engine.run"], ["-mengine.run"], ["-Bm", "engine.run"]):
        process = start(tmp_path, [*flags, *words, "--help"])
        wait_for_handlers(process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=HANG)
        assert process.returncode == 128 + signal.SIGTERM


def test_a_handler_of_a_host_stays(monkeypatch):
    """Python reports a handler that another language installed as None, and cannot set it again."""
    getsignal = signal.getsignal
    monkeypatch.setattr(signal, "getsignal", lambda number: None if number == signal.SIGTERM else getsignal(number))
    with cleanly():
        assert getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert getsignal(signal.SIGHUP) is not signal.SIG_DFL


CODE = "exec(open('a.py').read(), {})"
WAYS = {
    "script": ["a.py"], "-c": ["-c", CODE], "-P": ["-P", "-c", CODE],
    "thread": ["-c", f"from threading import Thread; x = Thread(target=lambda: {CODE}); x.start(); x.join()"],
    "stdin closed": ["-c", f"import os; os.close(0); {CODE}"],
}  # fmt: skip


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=[] if way in ("script", "stdin closed") else pytest.mark.thorough) for way in WAYS]
)
def test_a_host_that_imports_the_package_stays_as_it_is(tmp_path, way):
    """Its handlers and its closed streams; a run inside it leaves the handlers as well."""
    (tmp_path / "a.py").write_text("""
import os, signal
def state():
    return [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)], os.listdir('/proc/self/fd')
before = state()
import engine
print(before == state())
from engine.run import main
print(main(['--prompt', 'a', '--frames', '0']), before[0] == state()[0])
""")
    out, err = start(tmp_path, WAYS[way]).communicate(timeout=HANG)
    assert out == "True\n2 True\n", err
