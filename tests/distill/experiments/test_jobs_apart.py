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


def in_order(log: Path, jobs: list[Job]) -> bool:
    """Whether every job of the log began after those that it needs had ended."""
    lines = log.read_text().split()
    return all(lines.index(f"-{need}") < lines.index(f"+{job.name}") for job in jobs for need in job.needs)


def test_jobs_in_this_process(tmp_path: Path) -> None:
    found = {job.name: words for job, words, _ in done_jobs(JOBS, Start(tmp_path / "log"), 1)}
    assert found == {job.name: f"{job.name} by {os.getpid()}" for job in JOBS}
    assert in_order(tmp_path / "log", JOBS)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("refuses", "x: got 1, expected 2"), ("dies", "dies: got a process")])
def test_jobs_side_by_side(name: str, words: str, tmp_path: Path) -> None:
    """Two processes do all that they can; an error ends the run and is raised here."""
    last = Job(name, "train", 1, tuple(job.name for job in JOBS))
    found = {}

    def work() -> None:
        for job, said, _ in done_jobs([*JOBS, last, Job("after", "train", 1, (name,))], Start(tmp_path / "log"), 2):
            found[job.name] = said

    with pytest.raises((ValueError, OSError), match=words):
        work()
    assert found.keys() == {job.name for job in JOBS}
    assert str(os.getpid()) not in {said.split()[-1] for said in found.values()}
    assert in_order(tmp_path / "log", JOBS)


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
