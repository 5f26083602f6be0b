"""Jobs that wait for each other, done in this process or in several side by side, and the time that is left."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch


@dataclass(frozen=True)
class Job:
    """One training or measurement of an arm's seed.

    kind   jobs of one kind take time in proportion to their size; sizes of other kinds are of its order
    needs  jobs that have to be done before
    """

    name: str
    kind: str
    size: float
    needs: tuple[str, ...] = ()
    arm: str = ""
    seed: int = 0
    steps: str = ""


Worker = Callable[[Job], str]  # does a job, and says how it ended


class Clock:
    """How long the jobs that are left will take, by the time that others took."""

    def __init__(self, jobs: list[Job], workers: int) -> None:
        self._left, self._workers = dict.fromkeys(jobs), workers
        self._spent: dict[str, tuple[float, float]] = {}  # kind -> (seconds, size)

    def done(self, job: Job, seconds: float) -> None:
        del self._left[job]
        before = self._spent.get(job.kind, (0.0, 0.0))
        self._spent[job.kind] = before[0] + seconds, before[1] + job.size

    def left(self) -> float:
        """Seconds, once a job is done. A kind without a finished job goes at the rate of all others."""
        every = [sum(part) for part in zip(*self._spent.values(), strict=True)]
        rates = {kind: seconds / size for kind, (seconds, size) in self._spent.items()}
        return sum(job.size * rates.get(job.kind, every[0] / every[1]) for job in self._left) / self._workers


def done_jobs(jobs: list[Job], make_worker: Callable[[], Worker], workers: int) -> Iterator[tuple[Job, str, float]]:
    """Do all jobs; yields each with its worker's words and its seconds. `jobs` needs no name that stands behind it."""
    if workers == 1 or len(jobs) < 2:
        worker = make_worker()
        for job in jobs:
            begun = time.monotonic()
            yield job, worker(job), time.monotonic() - begun
    else:
        yield from _side_by_side(jobs, make_worker, min(workers, len(jobs)))


def _side_by_side(jobs: list[Job], make_worker: Callable[[], Worker], workers: int) -> Iterator[tuple[Job, str, float]]:
    context, waiting = multiprocessing.get_context("spawn"), list(jobs)
    missing = {job.name for job in jobs}
    idle, busy = list[Connection](), dict[Connection, tuple[Job, float]]()
    processes = []
    try:
        for _ in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, make_worker, torch.get_num_threads()), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            idle.append(here)
        while waiting or busy:
            ready = [job for job in waiting if missing.isdisjoint(job.needs)]
            for job in ready[: len(idle)]:
                connection = idle.pop()
                connection.send(job)
                busy[connection] = job, time.monotonic()
                waiting.remove(job)
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                job, begun = busy.pop(connection)
                words = _answer(connection, job)
                idle.append(connection)
                missing.discard(job.name)
                yield job, words, time.monotonic() - begun
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _answer(connection: Connection, job: Job) -> str:
    """What a process says of its job. Its errors are raised here."""
    try:
        answer = connection.recv()
    except EOFError:
        raise OSError(f"{job.name}: got a process that ended, expected it to finish") from None
    if isinstance(answer, Exception):
        raise answer
    return str(answer)


def _serve(connection: Connection, make_worker: Callable[[], Worker], threads: int) -> None:
    """A process: answers jobs until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    torch.set_num_threads(threads)
    worker: Worker | None = None
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            worker = worker or make_worker()
            connection.send(worker(job))
        except ValueError as error:
            connection.send(ValueError(str(error)))  # a subclass may not come through whole
        except OSError as error:
            connection.send(error)
