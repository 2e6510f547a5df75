"""The thread that does all model work: batches of rows and positions of texts, in turn."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kilobayes.errors import KilobayesError
from kilobayes.serve.decoder import Writing
from kilobayes.serve.metrics import Metrics
from kilobayes.serve.pool import Pool, Row
from kilobayes.serve.queue import Full, Job, Waiting
from kilobayes.serve.shelf import Shelf


@dataclass(frozen=True)
class Limits:
    """How much a server takes on.

    Attributes:
        max_batch: rows of a forward, and texts that are written side by side.
        max_wait: seconds that a batch waits for more rows.
        max_queue: rows that may wait; more are refused with 429.
        max_body: bytes of a request; more are refused with 413.
        timeout: seconds that a request may take; then it is answered with 504.

    Raises:
        KilobayesError: a limit that lets nothing through.
    """

    max_batch: int = 32
    max_wait: float = 0.005
    max_queue: int = 1024
    max_body: int = 1 << 20
    timeout: float = 60.0

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_body"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise KilobayesError(f"--{flag} must be at least 1", f"found {getattr(self, name)}")
        if not self.max_wait >= 0 or not self.timeout > 0:
            raise KilobayesError(
                "times must be positive", f"--max-wait-ms {1e3 * self.max_wait:g}, --timeout {self.timeout:g}"
            )


class Engine:
    """Takes rows and texts from any thread, and computes them in one of its own."""

    def __init__(self, shelf: Shelf, limits: Limits, metrics: Metrics) -> None:
        self.shelf, self.limits, self.metrics = shelf, limits, metrics
        self._waiting: dict[int, Waiting] = {id(pool): Waiting() for pool in shelf.pools}
        self._since: dict[int, float] = {}
        self._new: list[tuple[Any, int, Writing]] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="models", daemon=True)
        metrics.queue.set_function(lambda: self.queued)

    @property
    def queued(self) -> int:
        """Rows and texts that wait."""
        texts = len(self._new) + sum(decoder.waiting.rows for decoder in self.shelf.decoders)
        return texts + sum(waiting.rows for waiting in self._waiting.values())

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """End after what has been taken on."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()
        for pool in self.shelf.pools:
            pool.close()
        for decoder in self.shelf.decoders:
            decoder.close()

    def ask(self, name: str, rows: Sequence[Row]) -> Job:
        """Class scores of rows by a run: the future of the job holds ``(S, C)`` for each.

        Raises:
            Full: too much waits already.
        """
        pool, run = self.shelf.classifiers[name]
        job = Job(run, rows)
        with self._changed:
            self._check(len(rows))
            self._waiting[id(pool)].put(job)
            self._since.setdefault(id(pool), time.monotonic())
            self._changed.notify()
        return job

    def write(self, name: str, texts: Sequence[Writing]) -> None:
        """Texts to be written by a run; each tells of its positions itself.

        Raises:
            Full: too much waits already.
        """
        decoder, run = self.shelf.speakers[name]
        with self._changed:
            self._check(len(texts))
            self._new += [(decoder, run, text) for text in texts]
            self._changed.notify()

    def _check(self, more: int) -> None:
        if self._closing or self.queued + more > self.limits.max_queue:
            raise Full

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._work() and not self._closing:
                    self._changed.wait()
                if not self._work():
                    return
                for decoder, run, text in self._new:
                    decoder.put(run, text)
                self._new.clear()
            for pool in self.shelf.pools:
                batch = self._batch(pool)
                if batch:
                    self._answer(pool, batch)
            for decoder in self.shelf.decoders:
                if decoder.busy:
                    written = decoder.step()
                    if written:
                        self.metrics.tokens.labels("written").inc(written)
                        self.metrics.batch.labels("texts").observe(written)

    def _work(self) -> bool:
        return bool(
            self._new
            or any(waiting.rows for waiting in self._waiting.values())
            or any(decoder.busy for decoder in self.shelf.decoders)
        )

    def _batch(self, pool: Pool) -> list[tuple[Job, int]]:
        """The next rows of a pool, after the wait for more; none while texts are written and it waits."""
        waiting, limits = self._waiting[id(pool)], self.limits
        with self._changed:
            end = self._since.get(id(pool), 0.0) + limits.max_wait
            while 0 < waiting.rows < limits.max_batch and not self._closing:
                left = end - time.monotonic()
                if left <= 0:
                    break
                if self._new or any(decoder.busy for decoder in self.shelf.decoders):
                    return []
                self._changed.wait(left)
            batch = waiting.take(limits.max_batch)
            if waiting.rows:
                self._since[id(pool)] = time.monotonic() - limits.max_wait  # they have waited already
            else:
                self._since.pop(id(pool), None)
        return batch

    def _answer(self, pool: Pool, batch: list[tuple[Job, int]]) -> None:
        self.metrics.batch.labels("rows").observe(len(batch))
        self.metrics.adapters.observe(len({job.run for job, _ in batch}))
        try:
            scores = pool.scores([(job.run, job.rows[at]) for job, at in batch])
        except Exception as error:  # whatever it was, those who wait must be told
            for job, _ in batch:
                job.fail(error)
            return
        for (job, at), found in zip(batch, scores):
            job.answer(at, found)
