"""Streams that are alive when the interpreter ends, forked processes, and objects of the core that were never made."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LIMIT = 120  # seconds, so that a hang fails; each takes a few
OPEN = """
import gc, os, signal, sys, threading, time
from pathlib import Path
import fake_stages
from csrc_tools import load_core, open_fake
from engine.config import Preset
from engine.stream import Pipeline

built = Path(sys.argv[1])
def open_native():
    core = sys.modules["engine._C"] = load_core(built)
    return open_fake(core, built, fake_stages.RECORDED)
def open_torch():
    return fake_stages.fake_pipeline(Preset("greedy", shift=2.0, solver="euler", max_position=4))
pipeline = {"native": open_native, "torch": open_torch}[sys.argv[2]]()
stream = pipeline.stream("a red circle")
stream.next_chunk()
def forever(stream):
    while True:
        stream.next_chunk()
"""


def ran(code, built, kind):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, "-c", OPEN + code, str(built), kind], env=environment, capture_output=True, text=True,
        timeout=LIMIT, cwd=ROOT,
    )  # fmt: skip


DAEMON = "threading.Thread(target={}, daemon=True).start(); time.sleep(0.1)\n"
ENDS = {
    "in a cycle": "held = [stream, pipeline]; held.append(held); stream.itself = held; del held, stream, pipeline",
    "in threads": DAEMON.format("lambda: forever(pipeline.stream('teal'))") + DAEMON.format("lambda: list(stream)"),
    "sys.exit": DAEMON.format("lambda: forever(stream)") + "sys.exit(0)",
    "closed after the end": "import atexit; atexit.register(stream.close); held = stream.next_chunk()",
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends(core, native_build, end):
    done = ran("print('made', flush=True)\n" + ENDS[end], native_build, "native")
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")


FORK = """
stop = threading.Event()
def busy():
    other = pipeline.stream("teal", seed=2)
    while not stop.is_set():
        other.next_chunk()
threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
time.sleep(0.1)
child = os.fork()
if child == 0:
    signal.alarm(60)
    calls = [stream.next_chunk, stream.__next__, stream.rest, stream.flush, lambda: stream.set_prompt("red"),
             lambda: pipeline.stream("red")]
    for call in calls:
        try:
            call()
        except ValueError as error:
            print(error)
        else:
            print("no error")
    stream.cancel()
    stream.close()
    sys.stdout.flush()
    del stream, pipeline
    gc.collect()
    sys.exit(7)
_, status = os.waitpid(child, 0)
stop.set()
for thread in threads:
    thread.join()
stream.next_chunk()
print("child", os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["native", "torch"])
def test_a_forked_process_gets_an_error(core, native_build, kind):
    """While other threads of its parent are inside streams. The parent goes on."""
    done = ran(FORK, native_build, kind)
    assert (done.returncode, done.stderr) == (0, "")
    said = "process: got a fork of the one that opened the pipeline, expected the same one\n"
    assert done.stdout == 6 * said + "child 7\n"


@pytest.mark.parametrize("name", ["Bundle", "Session"])
def test_an_object_that_was_not_made_cannot_be_used(core, name):
    kind = getattr(core, name)
    ways = [
        lambda: kind(), lambda: kind.__new__(kind), lambda: object.__new__(kind), lambda: type("Own", (kind,), {})(),
        lambda: kind.__new__(type("Own", (kind,), {})), lambda: kind.__base__.__new__(kind),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(TypeError):
            way()


def test_objects_cannot_be_copied(core, formulas):
    for one in (formulas._bundle, formulas.stream("teal")._session):
        for way in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError):
                way(one)
        with pytest.raises(TypeError):
            one.__init__()
