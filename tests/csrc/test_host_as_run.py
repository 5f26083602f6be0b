"""greedy-host and engine.run side by side: the same numbers, prompts, outputs and messages, over one bundle."""

import codecs
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import fake_stages
import pytest
from csrc_tools import HANG

import engine.run

ROOT = Path(__file__).parents[2]
RED, TEAL, BLUE = "a red circle moving right", "teal", "a blue square on gray"
FRAMES = ["--frames", "13"]
pytestmark = [pytest.mark.slow]


@pytest.fixture
def both(core, native_build, tmp_path, monkeypatch, capfd):
    """Runs both programs on the same words. Returns, of each, the exit status and the checksum or the last error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    plugins, plain = native_build / "fake_plugin", core.open_bundle
    monkeypatch.setattr(core, "open_bundle", lambda path, **rest: plain(path, **{**rest, "plugin_dir": str(plugins)}))

    def host(words, stdin):
        command = [native_build / "greedy-host", fake_stages.RECORDED, "--plugin-dir", plugins, "--quiet", *words]
        ran = subprocess.run(command, input=stdin, capture_output=True, timeout=HANG)
        lines = ran.stderr.decode().splitlines()
        assert len(lines) <= 1, lines
        return ran.returncode, lines[0] if lines else ran.stdout.decode().strip()

    def python(words, stdin):
        if stdin is not None:
            (tmp_path / ".stdin").write_bytes(stdin)
            monkeypatch.setattr(sys, "stdin", (tmp_path / ".stdin").open())
        try:
            fixed = ["--bundle", str(fake_stages.RECORDED), "--backend", "native", "--quiet"]
            code = engine.run.main([*fixed, "--json", *map(os.fsdecode, words)])
        except SystemExit as stopped:
            code = stopped.code
        out, err = capfd.readouterr()
        assert len(err.splitlines()) <= 1, err
        return code, err.strip() if err else json.loads(out.splitlines()[-1]).get("sha256", "")

    def run(*words, stdin=None):
        return host(words, stdin), python(words, stdin)

    run.host, run.python = host, python
    return run


def same(both, *words, status=None, said="", stdin=None):
    host, python = both(*words, stdin=stdin)
    assert host == python
    assert status is None or host[0] == status, host
    assert said in host[1]
    return host[1]


NUMBERS = {
    "1": True, "+1": True, "0001": True, "-0": None, "0": None, "-1": False, " 1": False, "1 ": False, " -1": False,
    "0x10": False, "1e3": False, "1_000": False, "１": False, "١": False, "": False, "nan": False, "inf": False,
    "1e400": False, "1.0": False, "--1": False, "+": False, "1\n": False, str(2**53): None, str(2**63): None,
    str(2**64 - 1): None, str(2**64): False, str(2**64 + 1): False, str(-(2**64) + 1): False, "9" * 400: False,
}  # fmt: skip
TAKEN = {"--seed": ["-0", "0", str(2**53), str(2**63), str(2**64 - 1)], "--frames": [], "--threads": []}


@pytest.mark.parametrize("option", TAKEN)
@pytest.mark.parametrize("text", NUMBERS, ids=ascii)
def test_numbers(both, option, text):
    """None in the table: whether it is taken depends on the option."""
    good = NUMBERS[text] if NUMBERS[text] is not None else text in TAKEN[option]
    rest = [] if option == "--frames" else ["--frames", "5"]
    one = f"{option}={text}" if text.startswith("-") else None
    result = same(both, "--prompt", RED, "--out", "checksum", *rest, *([one] if one else [option, text]),
                  status=0 if good else 2)  # fmt: skip
    if good and option == "--seed":
        plain = same(both, "--prompt", RED, "--out", "checksum", *rest, option, str(int(text)), status=0)
        assert result == plain
    if not good:
        assert f"{option.removeprefix('--')}: got " in result


def test_seeds_beyond_63_bits_differ(both):
    seeds = [0, 1, 2**32, 2**63, 2**64 - 1]
    sums = [same(both, "--prompt", RED, "--out", "checksum", "--frames", "1", "--seed", str(seed)) for seed in seeds]
    assert len(set(sums)) == len(seeds)


SECONDS = {
    "1": 0, "0.3": 0, ".5": 0, "1e-3": 0, "1.0625": 0, "+1": 0, "0": 2, "-0.0": 2, "-1": 2, "-1e-7": 2, "-1e5": 2,
    "-1e22": 2, "nan": 2, "inf": 2, "1e16": 2, "1.2345678e300": 2, "x": 2, "": 2, "1_0": 2, "1,5": 2, " 1": 2, "0x1": 2,
    "1e-400": 2,
}  # fmt: skip


@pytest.mark.parametrize("text", SECONDS)
def test_seconds(both, text):
    got = same(both, "--prompt", RED, "--out", "checksum", f"--seconds={text}", status=SECONDS[text])
    if text in ("1", ".5"):
        frames = str(round(8 * float(text)))
        assert got == same(both, "--prompt", RED, "--out", "checksum", "--frames", frames, status=0)


@pytest.mark.parametrize("words", [["--frames", "2", "--seconds", "1"], ["--seconds", "1", "--frames", "2"]])
def test_two_lengths(both, words):
    same(both, "--prompt", RED, "--out", "checksum", *words, status=2, said="not allowed with argument")


def test_a_prompt_after_the_last_second(both):
    words = ["--prompt", RED, "--out", "checksum", "--seconds", "1", "--prompt-at", "1s", TEAL]
    same(both, *words, status=2, said="expected one before the end at 8")


PROMPTS = {
    "plain": RED.encode(),
    "CRLF": RED.encode() + b"\r\n[5f] teal\r\n",
    "CR": b"red\r[5f] teal\r[9f]blue",
    "other line breaks": "red\x0b[5f] teal\u2028[9f] blue\x85circle".encode(),
    "UTF-8 with a mark": codecs.BOM_UTF8 + b"[0f] red\n[5f] teal",
    "UTF-16 LE": codecs.BOM_UTF16_LE + "red ö 🎈\n[5f] teal".encode("utf-16-le"),
    "UTF-16 BE": codecs.BOM_UTF16_BE + "red ö 🎈\n[5f] teal".encode("utf-16-be"),
    "UTF-32 LE": codecs.BOM_UTF32_LE + "red ö 🎈\n[5f] teal".encode("utf-32-le"),
    "UTF-32 BE": codecs.BOM_UTF32_BE + "red ö 🎈\n[5f] teal".encode("utf-32-be"),
    "times": f"[0s]{RED}\n\n[0.625s]\na blue\nsquare on gray\n[9f]\t{TEAL}".encode(),
    "times in another order": f"[0f] {RED}\n[9f] {TEAL}\n \u3000[5f] {BLUE}\n".encode(),
    "half a frame": b"red\n[0.5625s] teal\n[+.1e1s] blue",
    "rounds to even": b"red\n[0.5625s] teal\n[0.0625s] blue",
    "two at one time": b"red\n[5f] blue\n[5f] teal",
    "brackets that are no time": "[red] a [3s] [4] circle\n[5x] teal\n[ 5f] blue\n[５f] gray\n[".encode(),
    "a hole before the first time": b"\n \n[0f] red",
    "empty": b"",
    "blank": b"\n \n\xe2\x80\x8b\n",
    "shows nothing": b"\xe2\x80\x8b'\x01"[:3],
    "only a mark": codecs.BOM_UTF8,
    "only a mark of UTF-16": codecs.BOM_UTF16_LE,
    "Latin-1": "a réd circle".encode("latin-1"),
    "Latin-1 behind a mark": codecs.BOM_UTF8 + "a réd circle".encode("latin-1"),
    "cut": "a réd".encode()[:4],
    "overlong": b"a \xc0\xafb",
    "a surrogate": b"a \xed\xa0\x80b",
    "too large": b"a \xf5\x80\x80\x80b",
    "every byte": bytes(range(256)),
    "UTF-16 without a mark": RED.encode("utf-16-le"),
    "half a unit": codecs.BOM_UTF16_LE + b"a",
    "a lone low surrogate": codecs.BOM_UTF16_LE + b"a\0\x00\xdcb\0",
    "a lone high surrogate": codecs.BOM_UTF16_LE + b"a\0\x00\xd8b\0",
    "a high surrogate at the end": codecs.BOM_UTF16_LE + b"a\0\x00\xd8",
    "a surrogate in UTF-32": codecs.BOM_UTF32_LE + b"a\0\0\0\x00\xd8\0\0",
    "half a unit of UTF-32": codecs.BOM_UTF32_LE + b"a\0\0\0b\0",
    "beyond Unicode": codecs.BOM_UTF32_LE + b"a\0\0\0\xff\xff\xff\x7f",
    "late": b"[3f] red",
    "past": b"red\n[13f] blue",
    "far past": b"red\n[99999999999999999999f] blue",
    "negative": b"red\n[-1s] blue",
    "minus zero": b"red\n[-0s] blue",
    "no number": b"red\n[1.2.3s] blue",
    "half a number": b"red\n[1.5f] blue",
    "a point": b"red\n[.s] blue",
    "a hole": b"red\n[2f]\n[5f] blue",
    "NUL": b"a red\0 circle",
    "too long": b"&amp;" * 5000,
    "larger than 16 MB": b"a" * ((16 << 20) + 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompt_files(both, tmp_path, name):
    (tmp_path / "p.txt").write_bytes(PROMPTS[name])
    got = same(both, *FRAMES, "--out", "checksum", "--prompt-file", "p.txt")
    if name in ("UTF-16 LE", "UTF-16 BE", "UTF-32 LE", "UTF-32 BE"):
        assert got == same(both, *FRAMES, "--out", "checksum", "--prompt", "red ö 🎈", "--prompt-at", "5f", "teal",
                           status=0)  # fmt: skip
    if name in ("CRLF", "two at one time"):
        first = RED if name == "CRLF" else "red"
        assert got == same(both, *FRAMES, "--out", "checksum", "--prompt", first, "--prompt-at", "5f", TEAL, status=0)


@pytest.mark.parametrize("name", ["UTF-8 with a mark", "times", "empty", "Latin-1"])
def test_prompts_from_stdin(both, name):
    same(both, *FRAMES, "--out", "checksum", "--prompt-file", "-", stdin=PROMPTS[name])


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([], 2),
        (["--prompt", RED, "--prompt-file", "p.txt"], 2),
        (["--prompt-file", "p.txt", "--prompt", RED], 2),
        (["--prompt-file", "nowhere.txt"], 2),
        (["--prompt-file", "."], 2),
        (["--prompt-file", "p.txt/inside"], 2),
        (["--prompt-file", ""], 2),
        (["--prompt-file", "x" * 300], 2),
        (["--prompt-file", "p.txt", "--prompt-at", "5f", BLUE], 0),
        (["--prompt-file", "p.txt", "--prompt-at", "0.625s", BLUE], 0),
        (["--prompt-file", "p.txt", "--prompt-at", "1e-1s", BLUE], 0),
        (["--prompt-file", "p.txt", "--prompt-at", "5f", " "], 2),
        (["--prompt-file", "p.txt", "--prompt-at", "13f", BLUE], 2),
        *((["--prompt", RED, "--prompt-at", when, BLUE], 2) for when in (
            "", "f", "s", " 5f", "5 f", "0x5f", "1_0f", "５f", "nans", "infs", "1e400s", "1e300s",
            "5.0f", f"{2**64 + 5}f",
        )),
        (["--prompt", ""], 2),
        (["--prompt", "\u3164"], 2),
        (["--prompt", "it's \u200b\x01"[5:]], 2),
        (["--prompt", b"r\xe9d"], 2),
        (["--prompt", RED, "--prompt-at", "5f", b"r\xe9d"], 2),
        (["--prompt-file", b"r\xe9d"], 2),
    ],
    ids=ascii,
)  # fmt: skip
def test_prompts_of_the_command_line(both, tmp_path, words, status):
    (tmp_path / "p.txt").write_bytes(RED.encode() + b"\n[5f] teal")
    same(both, *FRAMES, "--out", "checksum", *words, status=status)
    assert {path.name for path in tmp_path.iterdir()} <= {"p.txt"}


BLENDS = [
    (["--blend", TEAL, "0.5"], 0),
    (["--blend", TEAL, ".5", "--blend", BLUE, "+2e0"], 0),
    (["--blend", TEAL, "1", "--prompt-at", "5f", BLUE, "--transition", "2"], 0),
    (["--transition", "3", "--prompt-at", "1f", BLUE, "--prompt-at", "5f", TEAL], 0),
    (["--transition", "3", "--no-recommit", "--prompt-at", "1f", BLUE], 0),
    (["--transition", "1", "--prompt-at", "1f", BLUE], 0),
    (["--transition", "4", "--prompt-at", "0f", BLUE], 0),
    (["--transition", "1048576", "--prompt-at", "1f", BLUE], 0),
    *((["--blend", TEAL, weight], 2) for weight in ("0", "-1", "nan", "inf", "x", "", " 1", "1_0", "1e400", "-0.0")),
    (["--blend", TEAL, "1e308", "--blend", BLUE, "1e308"], 2),
    (["--blend", "", "1"], 2),
    (["--blend", "\u200b", "1"], 2),
    (["--blend", b"r\xe9d", "1"], 2),
    *((["--prompt-at", "1f", BLUE, f"--transition={steps}"], 2)
      for steps in ("-1", "x", "1.5", "", "1048577", str(2**64))),
]  # fmt: skip


@pytest.mark.parametrize(("words", "status"), BLENDS, ids=ascii)
def test_blends(both, words, status):
    same(both, *FRAMES, "--out", "checksum", "--prompt", RED, *words, status=status)


def test_blends_show(both):
    def of(*words):
        return same(both, *FRAMES, "--out", "checksum", "--prompt", RED, *words, status=0)

    mixed = [of(), of("--blend", TEAL, "0.5"), of("--blend", TEAL, "2"), of("--blend", BLUE, "2")]
    assert len(set(mixed)) == 4
    at = ["--prompt-at", "1f", BLUE]
    hard, once, soft, softer = (of(*at, "--transition", steps) for steps in "0123")
    assert hard == of(*at) == once
    assert len({hard, soft, softer}) == 3


def test_a_blend_needs_a_prompt_of_the_command_line(both, tmp_path):
    (tmp_path / "p.txt").write_text(RED)
    same(both, *FRAMES, "--out", "checksum", "--prompt-file", "p.txt", "--blend", TEAL, "1", status=2,
         said="--blend: got no --prompt to mix it with, expected one")  # fmt: skip


@pytest.mark.parametrize("when", ["-1f", "-1s", "-x"])
def test_a_time_below_zero(both, when):
    """argparse says it in other words: it takes the text for an option."""
    for status, said in both(*FRAMES, "--out", "checksum", "--prompt", RED, "--prompt-at", when, BLUE):
        assert status == 2
        assert "--prompt-at: " in said


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "an empty name"),
        ("nowhere/v.y4m", "an existing directory"),
        ("file/v.y4m", "to be a directory"),
        ("file/deeper/v.y4m", "an existing directory"),
        ("x" * 300 + ".y4m", "a name of 304 bytes, expected at most 255"),
        ("x/" * 3000 + "v.y4m", "a shorter path (File name too long)"),
        ("/dev/full", "a device or pipe"),
        ("pipe.y4m", "a device or pipe"),
        ("circle.y4m", "a link to itself"),
        ("locked.y4m", "which is write-protected"),
        ("closed/v.y4m", "a directory that can be written"),
        ("/proc/v.y4m", "a place for a new file"),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_places_that_take_no_file(both, tmp_path, out, said):
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.y4m")
    (tmp_path / "circle.y4m").symlink_to("circle.y4m")
    (tmp_path / "locked.y4m").write_bytes(b"old")
    (tmp_path / "locked.y4m").chmod(0o400)
    (tmp_path / "closed").mkdir(mode=0o500)
    if said in ("which is write-protected", "a directory that can be written") and os.access("closed", os.W_OK):
        pytest.skip("this user may write everywhere")
    before = sorted(tmp_path.iterdir())
    same(both, "--frames", "2", "--prompt", RED, "--out", out, said=said)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["clip.Y4M", "CLIP.Rgb", "clip.y4m.RGB"])
def test_suffixes_in_other_case(both, tmp_path, name):
    files = {}
    for one in (name, name.lower()):
        for program in both(*FRAMES, "--prompt", RED, "--out", one):
            assert program[0] == 0, program
        files[one] = Path(one).read_bytes()
    assert files[name] == files[name.lower()]
    assert files[name]


@pytest.mark.parametrize("name", ["clip.y4m", "clip.rgb", "CLIP.Y4M"])
@pytest.mark.parametrize("older", [False, True])
def test_a_limit_on_the_file_size_names_the_file(both, tmp_path, name, older):
    """As a full disk: an error of write."""
    if older:
        (tmp_path / name).write_bytes(b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    said = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    kept = tmp_path / (f"{Path(name).stem}.kept{Path(name).suffix}" if older else name)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        host = both.host(["--frames", "200", "--prompt", RED, "--out", name], None)
        made = kept.read_bytes()
        kept.unlink()
        python = both.python(["--frames", "200", "--prompt", RED, "--out", name], None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, said)
    error = f"error: output: got File too large for {name}, expected it to be written; kept "
    assert host == (1, f"{error}what was made in {kept}")
    assert python == (1, f"{error}{12 if name.lower().endswith('y4m') else 13} frames in {kept}")
    assert len(kept.read_bytes()) == len(made)
    assert ".part" not in host[1] + python[1]


@pytest.mark.parametrize("several", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_stdout_that_takes_no_video(native_build, tmp_path, several):
    """Closed, open for reading, full, or a pipe without a reader, before anything is loaded. Python takes its time."""
    host = f"{native_build}/greedy-host {fake_stages.RECORDED} --plugin-dir {native_build}/fake_plugin --quiet"
    python = f"{sys.executable} -m engine.run --quiet"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    cases = [
        ("--out - >&-", 2, "error: output: got - with stdout closed, expected a pipe or a redirection\n"),
        ("--out - >&- <&-", 2, "error: output: got - with stdout closed, expected a pipe or a redirection\n"),
        ("--out - 1< /dev/null", 2,
         "error: output: got - with stdout open for reading, expected a pipe or a redirection\n"),
        ("--out - > /dev/full", 1,
         "error: output: got No space left on device for -, expected it to be written\n"),
        ("--out - | sleep 0", 0, ""),
        ("--out clip.rgb >&- 2>&-", 0, ""),
        ("--out clip.rgb <&- >&- 2>&-", 0, ""),
    ]  # fmt: skip
    for program in (host, python):
        for words, status, said in cases if several or program is host else cases[3:5]:
            command = f"{program} --prompt a --frames 2 {words}; exit ${{PIPESTATUS[0]}}"
            ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, cwd=tmp_path,
                                 timeout=HANG)  # fmt: skip
            assert (ran.returncode, ran.stderr) == (status, said), command
            if "clip.rgb" in words:
                size = 2 * 3 * (128 if program is host else 32 * 32)
                assert [path.name for path in tmp_path.iterdir()] == ["clip.rgb"]
                assert (tmp_path / "clip.rgb").stat().st_size == size
                (tmp_path / "clip.rgb").unlink()
            assert not list(tmp_path.iterdir())
    ran = subprocess.run(["bash", "-c", f"{python} --prompt a --frames 1 --out null --json >&-"], capture_output=True,
                         text=True, env=environment, timeout=HANG)  # fmt: skip
    assert (ran.returncode, ran.stderr) == (2, "error: --json: got stdout closed, expected a pipe or a redirection\n")
    ran = subprocess.run(["bash", "-c", f"{host} --prompt a --frames 1 --out checksum >&-"], capture_output=True,
                         text=True, timeout=HANG)  # fmt: skip
    assert ran.returncode == 2
    assert ran.stderr == "error: output: got checksum with stdout closed, expected a pipe or a redirection\n"
    ran = subprocess.run(["bash", "-c", f"{host} --prompt-file - --out null <&-"], capture_output=True, text=True,
                         timeout=HANG)  # fmt: skip
    assert (ran.returncode, ran.stderr) == (
        2, "error: --prompt-file -: got stdin closed, expected a text file\n",
    )  # fmt: skip
