"""Every adapter on small real data: score, numbers trained, bytes stored and seconds; learning rates tuned.

    python benchmarks/adapter_study.py --data DIR --only "sst2;mrpc" --cache runs/adapters
    python benchmarks/adapter_table.py runs/adapters docs/results

One file of the cache for each data set, choice of layers and adapter: all rates and seeds are trained as one
stack, validation rows are held out of training to choose the rate, and test rows are scored at every rate, so
that the table can also say how much the choice matters. May be killed and run again. Scores are accuracy,
Matthews correlation on cola, Pearson correlation on stsb; stsb's grade, over 5, is the probability of the
second of two classes, trained by cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn.metrics import matthews_corrcoef
from torch import Tensor
from torch.nn.functional import cross_entropy

from kilobayes import host, parametrise, spec, train, tree
from kilobayes.energy import ModelEnergy
from kilobayes.files import write_json
from kilobayes.models import load_base
from kilobayes.options import Options
from kilobayes.predict import Rows
from kilobayes.tasks.classify import Classify, Encoded
from kilobayes.tasks.data import available_splits, load_examples
from kilobayes.tasks.split import stratified_holdout
from kilobayes.types import delta
from kilobayes.workflows.attach import attach, start
from kilobayes.workflows.data import first_test
from kilobayes.workflows.learn import choosing

ROWS = {"rte": 300, "mrpc": 400, "cola": 1000, "sst2": 500, "stsb": 500, "trec": 300}  # cola's are short
ARMS = {
    "LoRA": "LoRA(r=8)",
    "OLoRA": "OLoRA(r=8)",
    "VB-LoRA": "VBLoRA()",
    "LoRA-XS": "LoRAXS(r=16)",
    "VeRA": "VeRA(r=256)",
    "NOLA": "NOLA()",
    "RoseLoRA": "RoseLoRA()",
    "MoRA": "MoRA()",
    "HydraLoRA": "HydraLoRA()",
    "B-LoRA": "BLoRA()",
}
TARGETS = {"q,v": "query,value", "all linear": "all-linear"}


@dataclass(frozen=True, eq=False)
class Set:
    """A data set's rows, tokenised: ``parts`` by name; ``graded`` where labels are grades in [0, 1]."""

    classes: list[str]
    parts: dict[str, Encoded]
    graded: bool
    split: str


def read(name: str, folder: Path, a: argparse.Namespace) -> Set:
    """Training, validation (held out of the training file) and test rows."""
    source, graded = str(folder / name), name == "stsb"
    split = first_test(available_splits(source))
    base = load_base("minilm", ["no", "yes"], dtype="bfloat16")
    if graded:
        grades = {s: _grades(folder / name / f"{s}.jsonl") for s in ("train", split)}
        order = np.random.default_rng(0).permutation(len(grades["train"]))
        everything = load_examples(source, "train", need_labels=False)
        kept, held = order[: ROWS[name]], order[ROWS[name] : ROWS[name] + a.validation]
        test = load_examples(source, split, need_labels=False)
        some = np.random.default_rng(1).permutation(len(test))[: a.test_rows]
        rows = {"train": everything.take(kept), "validation": everything.take(held), "test": test.take(some)}
        known = {
            "train": grades["train"][kept],
            "validation": grades["train"][held],
            "test": grades[split][some],
        }
        classes = ["0", "1"]
    else:
        everything = load_examples(source, "train", limit=ROWS[name] + a.validation, seed=0)
        first, second = stratified_holdout(everything.labels, a.validation, 0)
        classes = everything.classes
        test = load_examples(source, split, classes=classes, limit=a.test_rows, seed=0)
        rows = {"train": everything.take(first), "validation": everything.take(second), "test": test}
        known = {}
    task = Classify(base.tokenizer, tuple(classes), a.max_length)
    parts = {k: task.encode(v) for k, v in rows.items()}
    for key, values in known.items():
        parts[key] = replace(parts[key], labels=torch.as_tensor(values, dtype=torch.float32))
    return Set(list(classes), parts, graded, split)


def _grades(path: Path) -> np.ndarray:
    with open(path, encoding="utf-8") as file:
        return np.array([json.loads(line)["label"] / 5.0 for line in file])


def nats(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of class scores ``(N, C)`` with classes ``(N,)``, or with a grade's two probabilities."""
    if labels.is_floating_point():
        labels = torch.stack([1.0 - labels, labels], dim=-1).to(scores)
    return cross_entropy(scores, labels, reduction="none")


def score(name: str, scores: Tensor, labels: Tensor) -> float:
    """The data set's own score of class scores ``(N, C)``."""
    if name == "stsb":
        return float(np.corrcoef(scores.softmax(-1)[:, 1].numpy(), labels.numpy())[0, 1])
    said = scores.argmax(-1)
    if name == "cola":
        return float(matthews_corrcoef(labels.numpy(), said.numpy()))
    return float((said == labels).double().mean())


def work(name: str, rows: Set, arm: str, text: str, targets: str, a: argparse.Namespace) -> dict[str, Any]:
    """One adapter on one data set: everything at every rate and seed."""
    base = load_base("minilm", rows.classes, dtype="bfloat16")
    options = Options(data=name, adapter=text, target_modules=TARGETS[targets], dtype="bfloat16")
    model: Any = attach(base, options)
    task = Classify(base.tokenizer, tuple(rows.classes), a.max_length)
    rates = [float(r) for r in a.rates.split(",")]
    runs = [(rate, seed) for rate in rates for seed in range(a.seeds)]
    settings = train.Settings(
        lr=tuple(r for r, _ in runs), epochs=a.epochs, seeds=tuple(s for _, s in runs), batch_size=16
    )
    theta = start(model, base, [s for _, s in runs])

    def nll(output: Any, labels: Tensor) -> Tensor:
        return nats(output.logits.float(), labels.flatten()).reshape(labels.shape)

    clock = time.process_time()
    with choosing(model, task, nll):
        done = train.fit(
            model, Rows(task, rows.parts["train"]), nll, spec.posterior("Point()"), theta, settings
        )
    seconds = (time.process_time() - clock) / len(runs)
    trained = done.state.theta
    heads = host.heads(model)
    own = {k: v for k, v in trained.items() if tree.split_key(k)[0] not in heads}
    sites, method = host.sites(model), host.method(model)
    found: list[dict[str, Any]] = []
    each = {
        k: ModelEnergy(model, task, rows.parts[k]).logits(trained).float() for k in ("validation", "test")
    }
    epochs = done.losses.split(-(-len(rows.parts["train"]) // 16))
    for index, (rate, seed) in enumerate(runs):
        entry: dict[str, Any] = {"rate": rate, "seed": seed, "diverged": index in done.diverged}
        for part, scores in each.items():
            labels = rows.parts[part].labels
            assert labels is not None
            entry[part] = {
                "nll": float(nats(scores[index], labels).mean()),
                "score": score(name, scores[index], labels),
            }
        entry["train_nll"] = [float(e[:, index].mean()) for e in epochs]
        entry["facts"] = facts(method, tree.member(own, index), sites)
        found.append(entry)
    return {
        "data": name,
        "split": rows.split,
        "rows": {k: len(v) for k, v in rows.parts.items()},
        "targets": targets,
        "arm": arm,
        "adapter": repr(method),
        "factors": method.rates() if hasattr(method, "rates") else {},
        "trained": tree.numbers(own),
        "stored_bytes": parametrise.stored(method, sites, tree.member(own, 0)),
        "seconds": seconds,
        "settings": {"epochs": a.epochs, "batch_size": 16, "max_length": a.max_length},
        "runs": found,
    }


def facts(method: Any, theta: Any, sites: list[Any]) -> dict[str, float]:
    """Of one trained member: bytes of its packed tensors, share of LoRA's bit operations, share of W touched."""
    out = {"bytes": float(tree.total_bytes(parametrise.pack(method, theta, sites).values()))}
    if hasattr(method, "operations"):
        lora = 1024 * sum(method.r * (site.d_in + site.d_out) for site in sites)
        out["bit_operations"] = float(method.operations(theta, sites)) / lora
    if hasattr(method, "density"):
        touched = whole = 0
        for site in sites:
            update = delta(method.build(tree.leaves_of(theta, site.name), {}, site), site.d_in)
            touched, whole = touched + int((update != 0).sum()), whole + update.numel()
        out["density"] = touched / whole
        out["bound"] = sum(method.density(s) * s.d_in * s.d_out for s in sites) / whole
    return out


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the data sets' folders")
    p.add_argument("--only", default=";".join(ROWS), help="data sets, separated by semicolons")
    p.add_argument("--arms", default=";".join(ARMS), help="of the table, or as BLoRA(r=4); by semicolons")
    p.add_argument("--targets", default="q,v", help="q,v or all linear")
    p.add_argument("--cache", type=Path, default=Path("runs/adapters"))
    p.add_argument("--rates", default="7e-4,2e-3,6e-3", help="times each adapter's own factors")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=int, default=6)
    p.add_argument("--validation", type=int, default=150)
    p.add_argument("--test-rows", type=int, default=400)
    p.add_argument("--max-length", type=int, default=64)
    a = p.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in a.only.split(";"):
        rows = None
        for arm in a.arms.split(";"):
            path = a.cache / name / a.targets.replace(" ", "-") / f"{arm}.json"
            if path.exists():
                continue
            rows = rows or read(name, a.data, a)
            clock = time.monotonic()
            found = work(name, rows, arm, ARMS.get(arm, arm), a.targets, a)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
            print(f"{name} {a.targets} {arm}: {time.monotonic() - clock:.0f} s", flush=True)


if __name__ == "__main__":
    main()
