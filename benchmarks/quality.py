"""Accuracy and calibration of LoRA, temperature, SWAG, ensembles and MultiSWAG, learning rates tuned.

    python benchmarks/quality.py --data trec=DIR/trec --ood trec=DIR/sst2

For every data set, three replicates of three members are trained for each learning rate of a grid, once
plainly and once with SWAG, as stacks. Every arm picks its own learning rate by NLL on calibration rows (held
out of training, also used for temperatures) and is then scored once on test rows. Data sets are added to the
JSON file of ``--out``, from which the Markdown table is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from quality_table import markdown

from kilobayes import host, spec, train, tree
from kilobayes.metrics import Evaluation, over_seeds, summarise
from kilobayes.models import load_base
from kilobayes.options import Options
from kilobayes.posteriors.temperature import best_temperature
from kilobayes.predict import Rows, class_nll, logits
from kilobayes.random import generator
from kilobayes.tasks.classify import Classify
from kilobayes.tasks.data import available_splits, load_examples
from kilobayes.tasks.split import stratified_holdout
from kilobayes.workflows.data import first_test
from kilobayes.workflows.evaluate import versions
from kilobayes.workflows.finetune import attach, start

REPLICATES, MEMBERS = 3, 3
ARMS = ["LoRA", "LoRA + temperature", "SWAG", "SWAG + temperature", "ensemble", "ensemble + temperature",
        "MultiSWAG", "MultiSWAG + temperature"]  # fmt: skip


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", action="append", required=True, help="NAME=FOLDER, repeated")
    p.add_argument("--ood", action="append", default=[], help="NAME=FOLDER of rows of another kind, repeated")
    p.add_argument("--rates", default="3e-4,1e-3,3e-3")
    p.add_argument("--swag", default="SWAG(rank=10)")
    p.add_argument("--rows", type=int, default=500)
    p.add_argument("--calibration", type=int, default=200)
    p.add_argument("--test-rows", type=int, default=500)
    p.add_argument("--ood-rows", type=int, default=300)
    p.add_argument("--epochs", type=int, default=8)
    p.add_argument("--samples", type=int, default=10)
    p.add_argument("--replicates", type=int, default=REPLICATES)
    p.add_argument("--stack", type=int, default=9, help="members trained at once")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--out", type=Path, default=Path("docs/results"))
    return p.parse_args()


def pairs(values: list[str]) -> dict[str, str]:
    return dict(v.split("=", 1) for v in values)


def study(name: str, source: str, ood: str | None, a: argparse.Namespace) -> dict:
    began = time.process_time()
    everything = load_examples(source, "train", limit=a.rows + a.calibration, seed=0)
    kept, held = stratified_holdout(everything.labels, a.calibration, 0)
    examples, calibration = everything.take(kept), everything.take(held)
    split = first_test(available_splits(source))
    test = load_examples(source, split, classes=everything.classes, limit=a.test_rows, seed=0)
    base = load_base("minilm", everything.classes, dtype=a.dtype)
    model = attach(base, Options(data=name, dtype=a.dtype))
    task = Classify(base.tokenizer, tuple(everything.classes), 128)
    parts = {"calibration": task.encode(calibration), "test": task.encode(test)}
    if ood:
        other = load_examples(
            ood, first_test(available_splits(ood)), need_labels=False, limit=a.ood_rows, seed=0
        )
        parts["ood"] = task.encode(other)
    rows = Rows(task, task.encode(examples))
    rates = [float(r) for r in a.rates.split(",")]
    seeds = list(range(a.replicates * MEMBERS))
    runs = [(rate, seed) for rate in rates for seed in seeds]
    found: dict[tuple[str, float, int], dict[str, torch.Tensor]] = {}
    draws: dict[tuple[str, float, int], dict[str, torch.Tensor]] = {}
    seconds = {}
    for kind in ("Point()", a.swag):
        posterior, clock = spec.posterior(kind), time.process_time()
        states = {}
        for at in range(0, len(runs), a.stack):
            part = runs[at : at + a.stack]
            settings = train.Settings(
                lr=tuple(r for r, _ in part), epochs=a.epochs, seeds=tuple(s for _, s in part), batch_size=16
            )
            theta = start(model, base, [s for _, s in part])
            with host.packed(model), host.read_token(model):
                done = train.fit(model, rows, class_nll(task), posterior, theta, settings)
            for i, run in enumerate(part):
                if i not in done.diverged:
                    states[run] = tree.state_member(done.state, i)
            print(f"{name} {kind} {at + len(part)}/{len(runs)} diverged {done.diverged} "
                  f"{time.process_time() - began:.0f} s", flush=True)  # fmt: skip
        seconds[kind] = (time.process_time() - clock) / len(runs)
        for run, state in states.items():
            draws[kind, *run] = posterior.sample(
                state, posterior.support(state) or a.samples, generator(run[1], 7)
            )
            found[kind, *run] = {"calibration": logits(model, draws[kind, *run], task, parts["calibration"])}

    def score(kind: str, rate: float) -> None:
        """Test rows are looked at only for the rates that calibration rows chose."""
        for run in [r for r in found if r[:2] == (kind, rate) and "test" not in found[r]]:
            found[run] |= {
                k: logits(model, draws[run], task, e) for k, e in parts.items() if k != "calibration"
            }

    labels = {"calibration": np.asarray(calibration.labels), "test": np.asarray(test.labels)}
    return {
        "rows": {"train": len(examples), "calibration": len(calibration), "test": f"{len(test)} of {split}"},
        "ood": ood and f"{len(parts['ood'])} rows of {Path(ood).name}",
        "classes": len(everything.classes),
        "seconds_per_member": seconds,
        "arms": arms(found, score, labels, everything.classes, rates, a),
    }


def arms(
    found: dict,
    score: Callable[[str, float], None],
    labels: dict,
    classes: list[str],
    rates: list[float],
    a: argparse.Namespace,
) -> dict:
    """Each arm at its own best learning rate: intervals over replicates."""
    out = {}
    for arm in ARMS:
        kind = a.swag if "SWAG" in arm else "Point()"
        pooled = arm.startswith(("ensemble", "Multi"))
        tempered = "temperature" in arm
        scores, chosen = {}, {}
        for rate in rates:
            temperatures, nlls = [], []
            for replicate in range(a.replicates):
                got = [found.get((kind, rate, m)) for m in _members(replicate, pooled)]
                if any(g is None for g in got):
                    break  # a member diverged at this rate
                joined = torch.cat([g["calibration"] for g in got])
                truth = torch.as_tensor(labels["calibration"])
                temperatures.append(best_temperature(joined.double(), truth) if tempered else 1.0)
                nlls.append(_nll(joined / temperatures[-1], labels["calibration"]))
            if len(nlls) == a.replicates:
                scores[rate], chosen[rate] = float(np.mean(nlls)), temperatures
        best = min(scores, key=scores.__getitem__)
        score(kind, best)
        summaries = []
        for replicate, t in enumerate(chosen[best]):
            got = [found[kind, best, m] for m in _members(replicate, pooled)]
            joined = {k: torch.cat([g[k] for g in got]) / t for k in got[0]}
            summaries.append(
                summarise(_evaluation(arm, joined, labels["test"], classes), bins=15, seed=replicate)
            )
        spread = over_seeds(summaries)
        out[arm] = {
            "rate": best,
            "calibration_nll": scores,
            "temperatures": chosen[best],
            "metrics": {
                k: {"mean": s.mean, "low": s.low, "high": s.high, "std": s.std} for k, s in spread.items()
            },
            "nll_interval_rows": [(s["nll"].value, s["nll"].low, s["nll"].high) for s in summaries],
            "nll_of_each_replicate": [s["nll"].value for s in summaries],
        }
    for arm in ARMS:  # paired over replicates: same seeds, same rows
        gap = np.subtract(
            out[arm]["nll_of_each_replicate"], out["LoRA + temperature"]["nll_of_each_replicate"]
        )
        out[arm]["nll_minus_lora_temperature"] = [float(g) for g in gap]
    return out


def _members(replicate: int, pooled: bool) -> list[int]:
    """Seeds of a replicate: three for pooled arms, the first of them for single ones."""
    first = replicate * MEMBERS
    return list(range(first, first + MEMBERS)) if pooled else [first]


def _nll(scores: torch.Tensor, labels: np.ndarray) -> float:
    probs = scores.double().softmax(-1).mean(0)
    return float(-probs[range(len(labels)), labels].clamp(min=1e-12).log().mean())


def _evaluation(arm: str, scores: dict, labels: np.ndarray, classes: list[str]) -> Evaluation:
    def of(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        p = x.double().softmax(-1)
        mean = p.mean(0)
        information = torch.special.entr(mean).sum(-1) - torch.special.entr(p).sum(-1).mean(0)
        return mean.numpy(), information.clamp(min=0).numpy()

    probs, information = of(scores["test"])
    outside = of(scores["ood"]) if "ood" in scores else (None, None)
    texts = [""] * len(labels)
    return Evaluation(
        name=arm, classes=classes, labels=labels, probs=probs, mutual_information=information, texts=texts,
        ood_probs=outside[0], ood_mutual_information=outside[1],
        ood_texts=None if outside[0] is None else [""] * len(outside[0]),
    )  # fmt: skip


def main() -> None:
    a = arguments()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    data, ood = pairs(a.data), pairs(a.ood)
    a.out.mkdir(parents=True, exist_ok=True)
    file = a.out / "quality.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    settings = {k: getattr(a, k) for k in ("epochs", "rates", "dtype", "replicates", "samples", "swag")}
    settings["members"] = MEMBERS
    # folders of this machine are shortened to their last name
    command = shlex.join(["python", "benchmarks/quality.py", *(_short(v) for v in sys.argv[1:])])
    for name, source in data.items():
        found = study(name, source, ood.get(name), a)
        results[name] = {"command": command, "versions": versions(), "settings": settings} | found
        file.write_text(json.dumps(results, indent=1) + "\n")
        (a.out / "quality.md").write_text(markdown(results) + "\n")
        print(markdown({name: results[name]}))


def _short(value: str) -> str:
    name, equals, folder = value.partition("=")
    return f"{name}=DIR/{Path(folder).name}" if equals else value


if __name__ == "__main__":
    main()
