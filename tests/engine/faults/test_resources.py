"""Memory, descriptors and threads that run out: one line that names what, and the frames made so far are kept."""

import hashlib
import os
import re
import resource
import signal
import subprocess
import time

import fake_stages
import pytest
from harness import FRAME, PROMPT, ROOT, SOON, ended, environment, forked, frames_in, grown, names, start, words_of

pytestmark = [pytest.mark.slow]
RUN = ["--quiet", "--prompt", PROMPT]
# What a line about memory says, whichever part of the program asked for it.
MEMORY = re.compile("Cannot allocate memory|memory: got|cannot allocate|failed to map|does not map|Unable to allocate")


def is_one_line(err):
    return err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1


def test_no_memory_in_engine_run(tmp_path):
    """While it loads, and in mid-stream."""
    (tmp_path / "late.mp4").write_bytes(b"old")
    short = [*RUN, "--frames", "1", "--out", "early.y4m"]
    cases = [{"words": short, "limits": [["RLIMIT_AS", extra]]} for extra in (0, 4, 16)]
    late = {"words": [*RUN, "--frames", "5000", "--out", "late.mp4"], "late": [9, ["RLIMIT_AS", 0]]}
    *early, (status, _, err) = forked(tmp_path, [*cases, late])
    for code, out, said in early:
        assert code in (1, 2)
        assert out == ""
        assert is_one_line(said), said
        assert MEMORY.search(said), said
    assert status == 1
    assert is_one_line(err), err
    kept = re.fullmatch(rf"error: (.*); kept (\d+) frames in {tmp_path}/late.kept.mp4\n", err)
    assert kept, err
    assert MEMORY.search(kept[1])
    assert frames_in(tmp_path / "late.kept.mp4") == int(kept[2]) >= 9
    assert (tmp_path / "late.mp4").read_bytes() == b"old"
    assert names(tmp_path) == ["late.kept.mp4", "late.mp4"]


def test_no_descriptors_in_engine_run(tmp_path):
    cases = [
        {"words": [*RUN, "--frames", "2", "--out", out], "limits": [["RLIMIT_NOFILE", most]]}
        for out in ("clip.y4m", "clip.mp4") for most in (3, 4, 6)
    ]  # fmt: skip
    results = forked(tmp_path, cases)
    assert {code for code, _, _ in results} <= {0, 1}
    failed = [err for code, _, err in results if code]
    assert len(failed) >= 3
    assert all(is_one_line(err) and "Too many open files" in err for err in failed), failed
    assert not [name for name in names(tmp_path) if name.endswith(".part")]


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become a user without processes")
def test_no_threads_in_engine_run(tmp_path):
    """RLIMIT_NPROC counts a user's processes and does not bind root. Without a second thread the stream runs."""
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        folder.chmod(folder.stat().st_mode | 0o711)
    tmp_path.chmod(0o777)
    lone = {"user": 23456, "limits": [["RLIMIT_NPROC", 1]]}
    words = [*RUN, "--frames", "5", "--out", f"{tmp_path}/clip.y4m"]
    try:
        one, two = forked(tmp_path, [{"words": [*words, "--threads", str(n)], **lone} for n in (1, 2)])
    finally:
        tmp_path.chmod(0o755)
    if "Permission denied" in one[2]:
        pytest.skip("other users cannot read the program here")
    assert one == (0, "", "")
    assert frames_in(tmp_path / "clip.y4m") == 5
    assert two[0] == 1
    assert "Thread creation failed: Resource temporarily unavailable" in two[2]  # of the OpenMP library, which exits
    assert "Traceback" not in two[2]


def peak_kb(words, folder):
    """The address space, in kilobytes, with which a command still works."""

    def works(limit):
        def lower():
            resource.setrlimit(resource.RLIMIT_AS, (limit << 10, limit << 10))

        return subprocess.run(words, cwd=folder, preexec_fn=lower, capture_output=True).returncode == 0

    low, high = 1000, 1_000_000
    while high - low > 8:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def test_no_memory_in_greedy_host(native_build, tmp_path):
    """Below what it needs, in steps: it starts and says so, or the system's loader does before it."""
    words = words_of("host", native_build, "--frames", "40", "--out", "clip.y4m")
    least = peak_kb(words, tmp_path)
    said = []
    for less in (8, 16, 32, 64, 128, 256, 512, 1024):

        def lower(less=less):
            resource.setrlimit(resource.RLIMIT_AS, ((least - less) << 10,) * 2)

        ran = subprocess.run(words, cwd=tmp_path, preexec_fn=lower, capture_output=True, text=True, timeout=SOON)
        if ran.returncode == 0 or ran.stderr.startswith("terminate called") or "loading shared" in ran.stderr:
            continue  # of the last two, the system says that not even main() was reached
        assert ran.returncode in (1, 2), ran
        assert is_one_line(ran.stderr), ran.stderr
        assert MEMORY.search(ran.stderr), ran.stderr
        said.append(ran.stderr)
    assert said
    assert not list(tmp_path.glob(".*.part"))


def test_no_memory_in_the_c_interface(native_build, tmp_path):
    """GREEDY_NO_MEMORY: the session goes on once there is some, with the same frames, and closes."""
    code = tmp_path / "memory.c"
    code.write_text(C_PROGRAM)
    built = tmp_path / "memory"
    library = next(iter(native_build.glob("libgreedy_core.*")))
    libraries = [str(library), "-ldl", "-lpthread", "-lstdc++", "-lm"]
    subprocess.run(
        ["cc", "-o", built, code, f"-I{ROOT}/csrc/include", f"-Wl,-rpath,{native_build}", *libraries], check=True
    )
    ran = subprocess.run([built, fake_stages.RECORDED, native_build / "fake_plugin"], capture_output=True, text=True,
                         timeout=SOON)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.split()[0] == "same"
    assert int(ran.stdout.split()[1]) > 0


C_PROGRAM = r"""
#include <greedy/greedy.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* malloc in place of the C library's: the call number `failing` and all later ones fail while it is not 0. */
extern void *__libc_malloc(size_t size);
static long failing = 0, calls = 0;
void *malloc(size_t size) { return failing && ++calls >= failing ? NULL : __libc_malloc(size); }

static unsigned long sum(greedy_session *session, int frames, long at, int *refused) {
    unsigned long total = 5381;
    for (int i = 0; i < frames; ++i) {
        greedy_frame *frame;
        for (long try = at;; ++try) {
            failing = at ? try : 0, calls = 0;
            int status = greedy_next_frame(session, &frame);
            failing = 0;
            if (status == GREEDY_OK) break;
            char why[256];
            greedy_error(session, why, sizeof why);
            if (status != GREEDY_NO_MEMORY || !at) exit(fprintf(stderr, "%d %s\n", status, why));
            ++*refused;
        }
        for (int y = 0; y < frame->height; ++y)
            for (int x = 0; x < 3 * frame->width; ++x) total = total * 33 + frame->data[(size_t)y * frame->stride + x];
        greedy_frame_unref(&frame);
    }
    return total;
}

int main(int count, char **words) {
    char why[256];
    greedy_bundle *bundle;
    greedy_session *one, *two;
    greedy_settings settings;
    greedy_settings_init(&settings);
    settings.plugin_dir = words[count - 1];
    if (greedy_bundle_open(&bundle, words[1], &settings, why, sizeof why) < 0) return fprintf(stderr, "%s\n", why);
    if (greedy_open(&one, bundle, 1, why, sizeof why) < 0) return 2;
    if (greedy_open(&two, bundle, 1, why, sizeof why) < 0) return 2;
    if (greedy_set_prompt(one, "a red circle", 1) < 0 || greedy_set_prompt(two, "a red circle", 1) < 0) return 3;
    int refused = 0;
    unsigned long expected = sum(one, 13, 0, NULL), got = sum(two, 13, 1, &refused);
    printf("%s %d\n", expected == got ? "same" : "different", refused);
    greedy_close(&one), greedy_close(&two), greedy_bundle_close(&bundle);
    return expected != got;
}
"""


def test_a_folder_that_goes_away(native_build, tmp_path):
    (tmp_path / "far").mkdir()
    process = start("host", native_build, tmp_path, "--out", "far/clip.rgb")
    grown(process, tmp_path / "far", "clip.rgb", 10 * FRAME["host"]).unlink()
    (tmp_path / "far").rmdir()
    process.terminate()
    status, err = ended(process)
    assert status == 1
    assert err.startswith("error: output: got No such file or directory for far/clip.rgb, expected it to be written")
    assert is_one_line(err)


WITHOUT_PLACES = "mount -t tmpfs -o ro none /dev/shm && mount -t tmpfs -o ro none /var/tmp && exec"


def test_no_place_for_temporary_files(tmp_path):
    """No home, no folder for temporary files, and where root may, no shared memory: a stream needs none of them."""
    words = words_of("run", tmp_path, "--frames", "5", "--out", "clip.mp4")
    env = environment(TMPDIR="/nowhere", XDG_CACHE_HOME="/nowhere")
    env.pop("HOME", None)
    alone = ["unshare", "--mount", "sh", "-c", f'{WITHOUT_PLACES} "$@"', "sh"]
    if os.geteuid() == 0 and subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
        words = [*alone, *words]
    ran = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=10 * SOON)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert names(tmp_path) == ["clip.mp4"]
    assert frames_in(tmp_path / "clip.mp4") == 5


@pytest.mark.parametrize("program", ["run", "host"])
def test_a_program_that_stands_still_goes_on(native_build, tmp_path, program):
    """SIGSTOP and SIGCONT, as a machine that sleeps: the same bits, and no limit of time runs out."""
    frames = {"run": "200", "host": "4000"}[program]
    both = [
        start(program, native_build, tmp_path, "--frames", frames, "--format", "rgb", "--out", "-", stdout=-1)
        for _ in range(2)
    ]
    sums = []
    for process, stops in zip(both, (0, 3), strict=True):
        sums.append(hashlib.sha256(process.stdout.read(FRAME[program])))
        for _ in range(stops):
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            process.send_signal(signal.SIGCONT)
            sums[-1].update(process.stdout.read(50 * FRAME[program]))
        sums[-1].update(process.stdout.read())
        assert ended(process) == (0, "")
    assert sums[0].digest() == sums[1].digest()
