"""Requests a second and latency of ``kilobayes serve``, asked over loopback by another process.

Clients ask back to back, each request one text for one of N adapters in turn. "mixed" is the server as it
is: rows of different adapters share a forward. "apart" is the same server whose batches hold rows of one
adapter alone. Adapters are random LoRA r=8 on MiniLM's queries and values, each a posterior of so many draws.
Results are kept in --out, setting by setting; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXT = "the film was a long slow look at how people live and what they want from each other now"


def make(folder: Path, adapters: int, samples: int) -> None:
    """Runs r0, r1, ... of random draws, so that nothing needs training."""
    import torch

    from kilobayes import host, store
    from kilobayes.models import load_base
    from kilobayes.options import Options
    from kilobayes.posteriors import Ensemble, Point
    from kilobayes.random import generator
    from kilobayes.workflows.attach import attach
    from kilobayes.workflows.finetune import fingerprint_of

    base = load_base("minilm", ["no", "yes"])
    print_ = fingerprint_of(base)
    model: Any = attach(base, Options(data="none", adapter="LoRA(r=8)"))
    posterior = Ensemble(Point(), members=samples)
    shapes = {key: value.shape[1:] for key, value in host.read(model).items()}
    for at in range(adapters):
        gen = generator(at)
        theta = {key: 0.05 * torch.randn(samples, *shape, generator=gen) for key, shape in shapes.items()}
        host.write(model, {key: value[:1] for key, value in theta.items()})
        card = store.Card(
            posterior=repr(posterior), adapter=repr(host.method(model)), base="minilm", fingerprint=print_,
            classes=["no", "yes"], max_length=64, samples=samples, seed=at,
            target_modules=[site.name for site in host.sites(model)],
        )  # fmt: skip
        store.save(folder / f"r{at}", model, posterior, posterior.init(theta, gen), card)


def serve(folder: Path, adapters: int, apart: bool) -> None:
    """The server's process."""
    from kilobayes import cli
    from kilobayes.serve import queue

    if apart:
        mixed = queue.Waiting.take

        def of_one_run(self: Any, most: int) -> Any:
            first = next(iter(self._runs), None)
            others = {run: self._runs.pop(run) for run in list(self._runs) if run != first}
            rows = mixed(self, most)
            left = dict(self._runs)
            self._runs.clear()
            self._runs.update(others | left)  # the others are next
            return rows

        queue.Waiting.take = of_one_run  # type: ignore[method-assign]
    runs = [str(folder / f"r{at}") for at in range(adapters)]
    sys.exit(
        cli.run(["serve", *runs, "--port", "0", "--device", "cpu", "--max-wait-ms", "2", "--timeout", "120"])
    )


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used: what a busy machine does not change much."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def ask(address: str, pid: int, clients: int, adapters: int, seconds: float) -> dict[str, float]:
    """Requests a second, the median and 99th percentile of their milliseconds, and the server's processor's."""
    import httpx2

    draw = random.Random(clients)
    texts = [" ".join(draw.choices(TEXT.split(" "), k=draw.randint(8, 30))) for _ in range(256)]
    found: list[float] = []
    # no encryption, so no certificates to be read while the clock runs
    client = httpx2.AsyncClient(base_url=address, timeout=130, verify=False, limits=httpx2.Limits())

    async def once(at: int) -> None:
        body = {"model": f"r{at % adapters}", "texts": [texts[at % len(texts)]]}
        answer = await client.post("/predict", json=body)
        answer.raise_for_status()

    async def one(number: int) -> None:
        at = number
        while time.perf_counter() < end:
            began = time.perf_counter()
            await once(at)
            found.append(time.perf_counter() - began)
            at += clients + 1  # so that a client does not stay with one adapter

    async with client:
        await asyncio.gather(*(once(number) for number in range(clients)))  # connections are made
        before, start = processor(pid), time.perf_counter()
        end = start + seconds
        await asyncio.gather(*(one(number) for number in range(clients)))
        spent = processor(pid) - before
    taken = time.perf_counter() - start
    p99 = statistics.quantiles(found, n=100)[98] if len(found) > 1 else found[0]
    return {
        "requests": len(found), "per_second": round(len(found) / taken, 2),
        "p50_ms": round(1e3 * statistics.median(found), 1), "p99_ms": round(1e3 * p99, 1),
        "cpu_ms": round(1e3 * spent / len(found), 2),
    }  # fmt: skip


def measure(folder: Path, adapters: int, arm: str, clients: list[int], seconds: float, kept: Any) -> None:
    """One server, asked by more and more clients."""
    command = [sys.executable, __file__, "--serve", str(folder), "--adapters", str(adapters), "--arm", arm]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        address = line.split()[-1]
        for count in clients:
            result = asyncio.run(ask(address, process.pid, count, adapters, seconds))
            kept(f"{arm}, {adapters} adapters, {count} clients", result)
    finally:
        process.terminate()
        process.wait(timeout=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each setting")
    parser.add_argument("--samples", type=int, default=4, help="draws of each adapter")
    parser.add_argument("--out", type=Path, help="JSON file to keep results in, and to go on from")
    parser.add_argument("--quick", action="store_true", help="a second each, few clients")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapters", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--arm", default="mixed", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve, asked.adapters, asked.arm == "apart")
    clients, many = ([1, 8], 4) if asked.quick else ([1, 8, 64], 32)
    seconds = 1.0 if asked.quick else asked.seconds
    known = json.loads(asked.out.read_text()) if asked.out and asked.out.exists() else {}
    results: dict[str, Any] = known.get("results", {})
    settings = {"samples": asked.samples, "seconds": seconds, "load": [round(x, 1) for x in os.getloadavg()]}

    def kept(name: str, result: dict[str, float]) -> None:
        results[name] = result
        print(f"{name}: {result}", file=sys.stderr, flush=True)
        if asked.out:
            asked.out.write_text(json.dumps({"settings": settings, "results": results}, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), many, asked.samples)
        for adapters, arm in ((1, "mixed"), (many, "mixed"), (many, "apart")):
            left = [
                count for count in clients if f"{arm}, {adapters} adapters, {count} clients" not in results
            ]
            if left:
                measure(Path(folder), adapters, arm, left, seconds, kept)
    print(json.dumps({"settings": settings, "results": results}, indent=2))


if __name__ == "__main__":
    main()
