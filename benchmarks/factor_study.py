"""By how much an adapter's leaves, and its head, should learn faster than ``--lr``: every adapter's factors.

    python benchmarks/factor_study.py --data DIR --cache runs/factors
    python benchmarks/factor_study.py --cache runs/factors --table docs/results

At the default rate, all of an adapter's own factors are multiplied by 1/4, 1 and 4, and the head's factor is 1
or 4: every cell and seed is a member of one stack. Scored by NLL on validation rows held out of training; no
test rows are read. One file of the cache for each data set and adapter, so it may be killed and run again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import adapter_study
import torch
from adapter_study import ARMS, nats, read
from torch import Tensor

from kilobayes import host, spec, train, tree
from kilobayes.energy import ModelEnergy
from kilobayes.files import write_json, write_text_atomically
from kilobayes.models import load_base
from kilobayes.options import Options
from kilobayes.predict import Rows, class_nll
from kilobayes.tasks.classify import Classify
from kilobayes.workflows.attach import attach, start
from kilobayes.workflows.learn import choosing

ROWS = {"sst2": 250, "trec": 250}
BODY, HEAD = (0.25, 1.0, 4.0), (1.0, 4.0)
LR = 2e-3


def work(rows: adapter_study.Set, text: str, a: argparse.Namespace) -> dict[str, Any]:
    """Validation NLL of every cell and seed of one adapter."""
    base = load_base("minilm", rows.classes, dtype="bfloat16")
    model: Any = attach(base, Options(adapter=text, target_modules="query,value", dtype="bfloat16"))
    task = Classify(base.tokenizer, tuple(rows.classes), a.max_length)
    cells = [(body, head, seed) for body in BODY for head in HEAD for seed in range(a.seeds)]
    seeds = [seed for _, _, seed in cells]
    theta, method = start(model, base, seeds), host.method(model)
    own = method.rates() if hasattr(method, "rates") else {}
    leaves = {tree.split_key(key)[1] for key in theta if tree.split_key(key)[0] not in host.heads(model)}
    bodies, heads = (torch.tensor([cell[at] for cell in cells]) for at in (0, 1))
    factors: dict[str, Tensor] = {leaf: own.get(leaf, 1.0) * bodies for leaf in leaves} | {"head": heads}
    vars(method)["rates"] = lambda: factors  # a factor for each member
    settings = train.Settings(lr=LR, epochs=a.epochs, seeds=tuple(seeds), batch_size=16)
    with choosing(model, task, class_nll(task)) as nll:
        data = Rows(task, rows.parts["train"])
        done = train.fit(model, data, nll, spec.posterior("Point()"), theta, settings)
    held = rows.parts["validation"]
    scores = ModelEnergy(model, task, held).logits(done.state.theta).float()
    assert held.labels is not None
    losses = [float(nats(each, held.labels).mean()) for each in scores]
    return {"factors": own, "runs": [[*cell, nll] for cell, nll in zip(cells, losses, strict=True)]}


def table(cache: Path) -> str:
    """Mean NLL over seeds of every cell, minus the adapter's lowest on that data set; mean over data sets."""
    cells = [(body, head) for body in BODY for head in HEAD]
    lines = ["| adapter | factors | " + " | ".join(f"x{b:g}, head {h:g}" for b, h in cells) + " |"]
    lines.append("|---|---|" + "---|" * len(cells))
    count = len(list(cache.iterdir()))
    for arm in ARMS:
        paths = sorted(cache.glob(f"*/{arm}.json"))
        if len(paths) < count:
            continue
        found = [json.loads(path.read_text()) for path in paths]
        worse = torch.zeros(len(cells), dtype=torch.float64)
        for one in found:
            means = torch.tensor(
                [
                    sum(nll for b, h, _, nll in one["runs"] if (b, h) == cell)
                    / sum((b, h) == cell for b, h, *_ in one["runs"])
                    for cell in cells
                ]
            )
            worse += (means - means.min()) / count
        told = ", ".join(f"{k} {v:g}" for k, v in found[0]["factors"].items()) or "1"
        lines.append(f"| {arm} | {told} | " + " | ".join(f"{v:.3f}" for v in worse.tolist()) + " |")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, help="folder of the data sets' folders")
    p.add_argument("--table", type=Path, help="write factors.md there from what is in the cache, and stop")
    p.add_argument("--only", default=";".join(ROWS), help="data sets, separated by semicolons")
    p.add_argument("--arms", default=";".join(ARMS), help="adapters, separated by semicolons")
    p.add_argument("--cache", type=Path, default=Path("runs/factors"))
    p.add_argument("--seeds", type=int, default=2)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--validation", type=int, default=200)
    p.add_argument("--test-rows", type=int, default=1)
    p.add_argument("--max-length", type=int, default=48)
    a = p.parse_args()
    if a.table:
        text = f"""# Factors of the learning rate

MiniLM, query and value, --lr {LR:g}. Made by `python benchmarks/factor_study.py --data DIR` and then with `--table
docs/results`. Each adapter has the factors of the second column, which every cell multiplies; a cell is the mean NLL
on validation rows over {" and ".join(sorted(p.name for p in a.cache.iterdir()))} and over seeds, minus the adapter's lowest on that data set, in nats.

{table(a.cache)}
"""
        write_text_atomically(a.table / "factors.md", text)
        return
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    adapter_study.ROWS.update(ROWS)
    for name in a.only.split(";"):
        rows = None
        for arm in a.arms.split(";"):
            path = a.cache / name / f"{arm}.json"
            if path.exists():
                continue
            rows = rows or read(name, a.data, a)
            clock = time.monotonic()
            found = work(rows, ARMS[arm], a)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
            print(f"{name} {arm}: {time.monotonic() - clock:.0f} s", flush=True)


if __name__ == "__main__":
    main()
