"""Tables and plots of :mod:`study`: ``python benchmarks/study_table.py runs/study docs/results``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_arms import ARMS, KINDS

from kilobayes.checkpoint import read_tensors
from kilobayes.metrics import Evaluation, over_seeds, summarise
from kilobayes.posteriors.temperature import best_temperature

BASELINE = ("LoRA", "temperature")
VARIANTS = ("plain", "temperature", "scale, temperature")
SHOWN = {
    "accuracy": "accuracy",
    "nll": "NLL",
    "ece": "ECE(15)",
    "brier": "Brier",
    "error_auroc": "error AUROC",
    "ood_auroc": "OOD AUROC",
    "shift_nll": "NLL under shift",
}


def averaged(drawn: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Averaged probabilities ``(N, C)`` and mutual information ``(N,)`` in nats."""
    each = drawn.double().softmax(-1)
    mean = each.mean(0)
    information = torch.special.entr(mean).sum(-1) - torch.special.entr(each).sum(-1).mean(0)
    return mean.numpy(), information.clamp(min=0).numpy()


def path_of(folder: Path, label: str, rate: float, replicate: int) -> Path:
    return (
        folder / "scores" / label.replace(", ", "-").replace(" ", "-") / f"{rate:g}-{replicate}.safetensors"
    )


def replicate_of(
    folder: Path, facts: dict, arm: str, variant: str, rate: float, number: int
) -> dict[str, Any]:
    """All metrics of one replicate, by name, and what it cost."""
    label = f"{arm} scaled" if variant.startswith("scale") else arm
    scores, about = read_tensors(path_of(folder, label, rate, number))
    labels = {k: np.asarray(v) for k, v in facts["labels"].items()}
    t = 1.0
    if variant != "plain":
        t = best_temperature(scores["calibration"].double(), torch.as_tensor(labels["calibration"]))
    probs, information = averaged(scores["test"] / t)
    outside = averaged(scores["ood"] / t) if "ood" in scores else (None, None)
    blank = [""] * len(probs)
    found = Evaluation(
        name=arm, classes=facts["classes"], labels=labels["test"], probs=probs, mutual_information=information,
        texts=blank, ood_probs=outside[0], ood_mutual_information=outside[1],
        ood_texts=None if outside[0] is None else [""] * len(outside[0]),
    )  # fmt: skip
    out: dict[str, Any] = {"summary": summarise(found, bins=15, resamples=1), "temperature": t}
    if "shift" in scores:
        mean, _ = averaged(scores["shift"] / t)
        out["shift_nll"] = float(-np.log(mean[range(len(mean)), labels["shift"]].clip(1e-12)).mean())
    out |= {"seconds": float(about["seconds"]), "bytes": float(about["bytes"])}
    out["scale"] = json.loads(about["scale"]) if "scale" in about else None
    return out


def results_of(folder: Path) -> dict[str, Any]:
    """Every arm and variant that the cache holds for one data set."""
    facts, chosen = (json.loads((folder / n).read_text()) for n in ("facts.json", "chosen.json"))
    rows: dict[str, Any] = {}
    for arm in ARMS:
        for variant in VARIANTS:
            if arm not in chosen:
                continue
            rate = chosen[arm]["plain" if variant == "plain" else "tempered"]
            if variant.startswith("scale") and not path_of(folder, f"{arm} scaled", rate, 0).exists():
                continue
            each = [
                replicate_of(folder, facts, arm, variant, rate, r)
                for r in range(facts["settings"]["replicates"])
            ]
            spread = over_seeds([e["summary"] for e in each])
            values = {k: [s.mean, s.low, s.high] for k, s in spread.items() if k in SHOWN}
            if all("shift_nll" in e for e in each):
                shift = [e["shift_nll"] for e in each]
                values["shift_nll"] = [float(np.mean(shift)), min(shift), max(shift)]
            rows[f"{arm} | {variant}"] = {
                "rate": rate,
                "metrics": values,
                "each_nll": [e["summary"]["nll"].value for e in each],
                "temperatures": [e["temperature"] for e in each],
                "scales": [e["scale"] for e in each],
                "seconds": float(np.mean([e["seconds"] for e in each])),
                "bytes": each[0]["bytes"],
            }
    base = rows[" | ".join(BASELINE)]["each_nll"]
    at_rate: dict[float, list[float]] = {}
    for row in rows.values():
        rate = row["rate"]
        if rate not in at_rate:
            each = [
                replicate_of(folder, facts, *BASELINE, rate, r)
                for r in range(facts["settings"]["replicates"])
            ]
            at_rate[rate] = [e["summary"]["nll"].value for e in each]
        row["nll_gap"] = [float(a - b) for a, b in zip(row["each_nll"], base, strict=True)]
        row["nll_gap_at_rate"] = [float(a - b) for a, b in zip(row["each_nll"], at_rate[rate], strict=True)]
    return {"facts": {k: v for k, v in facts.items() if k != "labels"}, "rows": rows}


def table(name: str, found: dict[str, Any]) -> list[str]:
    facts, rows = found["facts"], found["rows"]
    s = facts["settings"]
    shown = [k for k in SHOWN if any(k in r["metrics"] for r in rows.values())]
    out = [
        f"## {name}",
        "",
        f"{facts['rows']['train']} training and {facts['rows']['calibration']} calibration rows, "
        f"{facts['rows']['test']} of {facts['split']}; unfamiliar rows: {facts['ood']}"
        + (f"; shifted rows: {facts['shift']}" if facts["shift"] else "")
        + f". {s['epochs']} epochs, rates {s['rates']}, {s['dtype']} base, {s['replicates']} replicates.",
        "",
        f"![NLL of every arm on {name}](posteriors-{name}.svg)",
        "",
    ]
    for variant in (v for v in VARIANTS if any(key.endswith(f" | {v}") for key in rows)):
        heads = {"plain": "As it is", "temperature": "With a temperature"}
        out += [f"### {name}: {heads.get(variant, 'With one scale and a temperature')}", ""]
        out += [
            "| arm | rate | " + " | ".join(SHOWN[k] for k in shown) + " | NLL − baseline | seconds | kB |"
        ]
        out += ["|---" * (len(shown) + 5) + "|"]
        for key, row in rows.items():
            arm, kind = key.split(" | ")
            if kind == variant:
                gaps = [row["nll_gap"], row["nll_gap_at_rate"]]
                differences = [f"{np.mean(g):+.3f} ({min(g):+.3f} to {max(g):+.3f})" for g in gaps]
                cells = [cell(row["metrics"].get(k)) for k in shown]
                out.append(
                    f"| {arm} | {row['rate']:g} | " + " | ".join(cells)
                    + f" | {' | '.join(differences)} | {row['seconds']:.0f} | "
                    f"{row['bytes'] / 1000:,.0f} |"
                )  # fmt: skip
        out.append("")
    return out


def cell(value: list[float] | None) -> str:
    if value is None or value[0] != value[0]:
        return "–"
    return f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"


def plot(name: str, found: dict[str, Any], out: Path) -> None:
    """NLL of every arm and variant: replicates as dots around their mean."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "kilobayes"
    from matplotlib import pyplot as plt

    rows = found["rows"]
    arms = [a for a in ARMS if f"{a} | plain" in rows]
    colours = dict(zip(VARIANTS, ("#9aa5b1", "#1f6feb", "#b3450a"), strict=True))
    figure, axes = plt.subplots(figsize=(7.2, 0.34 * len(arms) + 1.3))
    for at, arm in enumerate(arms):
        for shift, variant in zip((-0.22, 0.0, 0.22), VARIANTS, strict=True):
            row = rows.get(f"{arm} | {variant}")
            if row:
                y = [at + shift] * len(row["each_nll"])
                axes.plot(row["each_nll"], y, ".", ms=4, alpha=0.45, color=colours[variant])
                label = variant if arm == "SWAG" else None
                axes.plot(
                    [np.mean(row["each_nll"])], y[:1], "|", ms=9, mew=2, color=colours[variant], label=label
                )
    axes.axvline(np.mean(rows[" | ".join(BASELINE)]["each_nll"]), color="#1f6feb", lw=0.8, ls=":")
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel(f"NLL on {name}'s test rows, nats (dotted: LoRA with a temperature)")
    axes.legend(loc="best", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def overall(results: dict[str, Any]) -> list[str]:
    """Differences from the baseline on every data set, and where every replicate is ahead."""
    out = ["## All data sets: NLL minus that of LoRA with a temperature", ""]
    out += [
        "Mean over replicates, in nats; bold where every replicate is ahead of its baseline. First against the",
        "",
    ]
    out[-1:] = [
        "baseline at its own rate, then, after the stroke, against the baseline at the arm's rate.",
        "",
    ]
    out += ["| arm | variant | " + " | ".join(results) + " |", "|---" * (len(results) + 2) + "|"]
    for arm in ARMS:
        for variant in VARIANTS:
            rows = [r["rows"].get(f"{arm} | {variant}") for r in results.values()]
            if any(rows):
                cells = [f"{bold(r['nll_gap'])} / {bold(r['nll_gap_at_rate'])}" if r else "–" for r in rows]
                out.append(f"| {arm} | {variant} | " + " | ".join(cells) + " |")
    return [*out, ""]


def bold(gaps: list[float]) -> str:
    text = f"{np.mean(gaps):+.3f}"
    return f"**{text}**" if max(gaps) < 0 else text


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    p.add_argument("out", type=Path)
    a = p.parse_args()
    results = {f.name: results_of(f) for f in sorted(a.cache.iterdir()) if (f / "chosen.json").exists()}
    lines = [
        "# Every posterior, learning rates tuned for every arm",
        "",
        "MiniLM-L6 with LoRA (r=8 on query and value), batch 16. Made by `python benchmarks/study.py --data ...` "
        "(its docstring says what it does) and `python benchmarks/study_table.py CACHE docs/results`; all numbers are in "
        "[posteriors.json](posteriors.json). Each arm takes the learning rate of its lowest NLL on calibration rows and is "
        "scored on test rows at that rate alone. Mean over replicates with its 95% t-interval (under shift: lowest and "
        "highest); ECE has 15 bins of equal width; OOD AUROC is by predictive entropy; error AUROC says whether confidence "
        "tells right from wrong. The baseline is LoRA with a temperature, paired by replicate. Seconds are CPU seconds of "
        "training and fitting one arm's posterior, trained in stacks; kB is its state in float32.",
        "",
        "Trained: " + "; ".join(f"{k}: `{v}`" for k, v in KINDS.items()) + ".",
        "",
        *overall(results),
    ]
    for name, found in results.items():
        lines += table(name, found)
        plot(name, found, a.out / f"posteriors-{name}.svg")
    (a.out / "posteriors.md").write_text("\n".join(lines))
    (a.out / "posteriors.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(overall(results)))


if __name__ == "__main__":
    main()
