"""Whose turn it is."""

from __future__ import annotations

from kilobayes.serve.queue import Job, Waiting


def taken(waiting: Waiting, jobs: dict[str, Job], most: int) -> list[str]:
    names = {id(job): name for name, job in jobs.items()}
    return [f"{names[id(job)]}{at}" for job, at in waiting.take(most)]


def test_runs_take_turns_and_in_a_run_requests_do() -> None:
    jobs = {"a": Job(0, "xxxxx"), "b": Job(0, "xx"), "c": Job(1, "xxx")}
    waiting = Waiting()
    for job in jobs.values():
        waiting.put(job)
    assert waiting.rows == 10
    # run 0 and run 1 alternate; in run 0, a and b do
    assert taken(waiting, jobs, 6) == ["a0", "c0", "b0", "c1", "a1", "c2"]
    assert taken(waiting, jobs, 9) == ["b1", "a2", "a3", "a4"]
    assert waiting.rows == 0
    assert waiting.take(3) == []


def test_what_is_cancelled_is_not_computed() -> None:
    jobs = {"a": Job(0, "xxx"), "b": Job(0, "x")}
    waiting = Waiting()
    for job in jobs.values():
        waiting.put(job)
    assert taken(waiting, jobs, 1) == ["a0"]
    jobs["a"].future.cancel()
    assert taken(waiting, jobs, 9) == ["b0"]
    assert waiting.rows == 0
    jobs["a"].answer(0, "late")  # nobody waits for it
    assert jobs["a"].future.cancelled()


def test_answers_keep_their_places_and_an_error_ends_a_job() -> None:
    job = Job(0, "xy")
    job.answer(1, "second")
    assert not job.future.done()
    job.answer(0, "first")
    assert job.future.result() == ["first", "second"]
    failed = Job(0, "xy")
    failed.fail(ValueError("no"))
    failed.answer(0, "late")
    assert isinstance(failed.future.exception(), ValueError)
    assert failed.left == 0
