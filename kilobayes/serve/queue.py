"""What waits for the model: rows in turn, run by run and request by request, so that none starves another."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any


class Full(Exception):
    """The queue holds as much as it may."""


class Job:
    """A request's rows for one run; its future holds one answer a row, in order.

    Args:
        run: which run is asked.
        rows: what it is asked, at least one.
    """

    def __init__(self, run: int, rows: Sequence[Any]) -> None:
        self.run, self.rows, self.taken = run, rows, 0
        self.future: Future[list[Any]] = Future()
        self._answers: list[Any] = [None] * len(rows)
        self._missing = len(rows)

    @property
    def left(self) -> int:
        """Rows that nobody has taken yet."""
        return len(self.rows) - self.taken

    def answer(self, at: int, value: Any) -> None:
        """The answer to row ``at``; the last one ends the job."""
        self._answers[at] = value
        self._missing -= 1
        if not self._missing:
            settle(self.future, self._answers)

    def fail(self, error: BaseException) -> None:
        """End the job with an error; what is not taken yet never will be."""
        self.taken = len(self.rows)
        settle(self.future, error)


def settle(future: Future[Any], value: Any) -> None:
    """A future's result, or its exception; one that was cancelled or has ended is left alone."""
    try:
        if isinstance(value, BaseException):
            future.set_exception(value)
        else:
            future.set_result(value)
    except InvalidStateError:
        pass


class Waiting:
    """Jobs whose rows are taken in turn: a row of each run, in each run a row of each request."""

    def __init__(self) -> None:
        self._runs: OrderedDict[int, deque[Job]] = OrderedDict()
        self.rows = 0

    def put(self, job: Job) -> None:
        """Another job, behind those of its run."""
        self._runs.setdefault(job.run, deque()).append(job)
        self.rows += job.left

    def take(self, most: int) -> list[tuple[Job, int]]:
        """At most so many rows, as jobs and places in them; cancelled jobs are dropped."""
        out: list[tuple[Job, int]] = []
        while self._runs and len(out) < most:
            run, jobs = self._runs.popitem(last=False)
            job = jobs.popleft()
            if job.future.cancelled():
                self.rows -= job.left
            else:
                out.append((job, job.taken))
                job.taken += 1
                self.rows -= 1
                if job.left:
                    jobs.append(job)
            if jobs:
                self._runs[run] = jobs
        return out
