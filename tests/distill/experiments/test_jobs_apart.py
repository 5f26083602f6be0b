"""Jobs wait for what they need, also in processes of their own, whose errors come back; the estimate adds up."""

import os
import time
from pathlib import Path

import pytest

from distill.experiments.jobs import Clock, Job, done_jobs

JOBS = [Job("a", "train", 2), Job("b", "train", 2, ("a",)), Job("c", "scores", 1, ("b",)), Job("d", "train", 2)]


class Log:
    """A worker that writes when its jobs begin and end, and fails as their names say."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, job: Job) -> str:
        if job.name == "refuses":
            raise ValueError("x: got 1, expected 2")
        if job.name == "dies":
            os._exit(3)
        with self.path.open("a") as log:
            log.write(f"+{job.name}\n")
        time.sleep(0.05)
        with self.path.open("a") as log:
            log.write(f"-{job.name}\n")
        return f"{job.name} by {os.getpid()}"


class Start:
    """Makes a worker in the process that will use it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> Log:
        return Log(self.path)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_jobs_wait_for_what_they_need(workers: int, tmp_path: Path) -> None:
    found = {job.name: words for job, words, _ in done_jobs(JOBS, Start(tmp_path / "log"), workers)}
    assert found.keys() == {job.name for job in JOBS}
    processes = {words.split()[-1] for words in found.values()}
    assert (str(os.getpid()) in processes) == (workers == 1)
    lines = (tmp_path / "log").read_text().split()
    for job in JOBS:
        assert all(lines.index(f"-{need}") < lines.index(f"+{job.name}") for need in job.needs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("refuses", "x: got 1, expected 2"), ("dies", "dies: got a process")])
def test_errors_come_back(name: str, words: str, tmp_path: Path) -> None:
    jobs = [Job("a", "train", 1), Job(name, "train", 1, ("a",)), Job("b", "train", 1, (name,))]
    with pytest.raises((ValueError, OSError), match=words):
        list(done_jobs(jobs, Start(tmp_path / "log"), 2))
    assert "+b" not in (tmp_path / "log").read_text()


def test_time_left() -> None:
    """By kind where one is done, else at the rate of the others; several processes share it."""
    clock = Clock(JOBS, 2)
    clock.done(JOBS[0], 20.0)
    assert clock.left() == pytest.approx((2 + 1 + 2) * 10 / 2)
    clock.done(JOBS[2], 30.0)
    assert clock.left() == pytest.approx(4 * 10 / 2)
    clock.done(JOBS[1], 40.0)
    assert clock.left() == pytest.approx(2 * 15 / 2)
    clock.done(JOBS[3], 1.0)
    assert clock.left() == 0
