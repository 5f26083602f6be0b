"""Standard streams that are full, closed or left by their reader, for reports and help: nothing lost exits with 0."""

import os
import subprocess

import fake_stages
import pytest
from harness import ROOT, SOON, environment, forked, words_of

pytestmark = [pytest.mark.slow]
SPRITES = str(ROOT / "engine" / "assets" / "sprites")
FULL = "No space left on device"
RUN = ["--prompt", "a red circle", "--frames", "1"]
CLOSED = "got stdout closed, expected a pipe or a redirection\n"

CASES = {
    # a module, its words, what stands in place of streams -> exit status, a part of stderr
    "help, full": ("engine.run", ["--help"], {1: "/dev/full"}, 1, f"{FULL} on stdout"),
    "help of all, full": ("engine.cli", ["--help"], {1: "/dev/full"}, 1, f"{FULL} on stdout"),
    "report, full": ("engine.run", [*RUN, "--out", "null", "--json"], {1: "/dev/full"}, 1, f"report: got {FULL}"),
    "sum in the report, full": ("engine.run", [*RUN, "--out", "checksum", "--json"], {1: "/dev/full"}, 1, FULL),
    "sum on stderr, full": ("engine.run", [*RUN, "--out", "checksum"], {2: "/dev/full"}, 1, ""),
    "sum on stderr, closed": ("engine.run", [*RUN, "--out", "checksum"], {2: None}, 1, ""),
    "file, all closed": ("engine.run", [*RUN, "--out", "a.y4m"], {0: None, 1: None, 2: None}, 0, ""),
    "file, all full": ("engine.run", [*RUN, "--out", "b.y4m"], {1: "/dev/full", 2: "/dev/full"}, 0, ""),
    "report, closed": ("engine.run", [*RUN, "--out", "null", "--json"], {1: None}, 2, f"--json: {CLOSED}"),
    "inspect, full": ("engine.commands.inspect", [SPRITES], {1: "/dev/full"}, 1, f"got {FULL}"),
    "inspect, closed": ("engine.commands.inspect", [SPRITES], {1: None}, 2, f"inspect: {CLOSED}"),
    "inspect an error, closed": ("engine.commands.inspect", ["/nowhere"], {2: None}, 2, ""),
    "bundle, full": ("export.__main__", ["inspect", str(fake_stages.RECORDED)], {1: "/dev/full"}, 1, FULL),
    "bundle, closed": ("export.__main__", ["inspect", str(fake_stages.RECORDED)], {1: None}, 2, CLOSED),
    "video, stderr closed": ("engine.run", [*RUN, "--out", "-", "--format", "rgb"], {2: None}, 0, ""),
    "bad words, closed": ("engine.run", [*RUN, "--frames", "0"], {2: None}, 2, ""),
}


def test_every_stream_in_every_state(tmp_path):
    cases = [{"module": module, "words": words, "streams": streams} for module, words, streams, *_ in CASES.values()]
    for (name, (*_, status, said)), (code, out, err) in zip(CASES.items(), forked(tmp_path, cases), strict=True):
        assert code == status, (name, out, err)
        assert len(out) == (32 * 32 * 3 if name.startswith("video") else 0), name
        assert said in err, name
        assert "Traceback" not in err, name
        assert sum(line.startswith("error: ") for line in err.splitlines()) == bool(said), err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.y4m", "b.y4m"]


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_who_leaves_a_report(tmp_path, unbuffered):
    """As for other tools: the status of SIGPIPE, and no word."""
    words = [words_of("run", tmp_path)[0], "-m", "engine.commands.inspect", SPRITES]
    env = environment(PYTHONUNBUFFERED=unbuffered)
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, env=env, timeout=SOON)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_help_of_greedy_host(native_build):
    program = native_build / "greedy-host"
    for place, status in (("> /dev/full", 1), ("> /dev/null", 0), (">&-", 0)):
        assert subprocess.run(["sh", "-c", f"{program} --help {place}"], timeout=SOON).returncode == status
    words = " ".join(words_of("host", native_build, "--frames", "2", "--out", "checksum")).replace("a red", "'a red")
    words = words.replace("gray background", "gray background'")
    ran = subprocess.run(["sh", "-c", f"{words} > /dev/full"], stderr=subprocess.PIPE, text=True, timeout=SOON)
    assert ran.returncode == 1
    assert ran.stderr == "error: checksum: got no stdout that takes it, expected one\n"
