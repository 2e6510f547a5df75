"""Tables and a chart of :mod:`adapter_study`: ``python benchmarks/adapter_table.py runs/adapters docs/results``."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import t as student

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "kilobayes"
import matplotlib.pyplot as plt  # noqa: E402

FACTS = {
    "bit_operations": "of the bit operations of LoRA at its largest rank",
    "density": "of the entries of W touched",
    "bound": "at most, by its bound",
}
SCORES = dict.fromkeys(("rte", "mrpc", "sst2", "trec"), "accuracy") | {"cola": "Matthews", "stsb": "Pearson"}


def read(cache: Path) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """(layers, data set) to adapter to what was found."""
    out: dict[tuple[str, str], dict[str, dict[str, Any]]] = defaultdict(dict)
    for path in sorted(cache.glob("*/*/*.json")):
        found = json.loads(path.read_text())
        out[found["targets"], found["data"]][found["arm"]] = found
    return dict(out)


def chosen(found: dict[str, Any], by: str = "score") -> tuple[float, list[dict[str, Any]]]:
    """The rate of the best mean score (or NLL) on validation rows, where no seed diverged, and its runs."""
    rates = sorted({run["rate"] for run in found["runs"]})
    each = {rate: [run for run in found["runs"] if run["rate"] == rate] for rate in rates}
    sound = {rate: runs for rate, runs in each.items() if not any(run["diverged"] for run in runs)}
    sign = -1.0 if by == "score" else 1.0
    best = min(sound, key=lambda rate: sign * np.mean([run["validation"][by] for run in sound[rate]]))
    return best, sound[best]


def size_of(found: dict[str, Any]) -> int:
    """Bytes stored: what the chosen runs took on average where that is learned, else the formula's."""
    each = [run["facts"]["bytes"] for run in chosen(found)[1] if "bytes" in run.get("facts", {})]
    return round(sum(each) / len(each)) if each else found["stored_bytes"]


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95% t-interval."""
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values)), float(half)


def table(data: str, arms: dict[str, dict[str, Any]]) -> list[str]:
    """One data set and choice of layers."""
    any_ = next(iter(arms.values()))
    s = any_["settings"]
    baseline = chosen(arms["LoRA"])[1] if "LoRA" in arms else None
    out = [
        f"{any_['rows']['train']} training, {any_['rows']['validation']} validation and {any_['rows']['test']} "
        f"{any_['split']} rows, {s['epochs']} epochs of batches of {s['batch_size']}, bfloat16 base.",
        "",
        f"| adapter | --lr | {SCORES[data]} | minus LoRA | --lr | NLL | trained | bytes | CPU seconds |",
        "|---" * 9 + "|",
    ]
    for found in sorted(arms.values(), key=lambda entry: -size_of(entry)):
        rate, runs = chosen(found)
        mean, half = interval([run["test"]["score"] for run in runs])
        calm, others = chosen(found, "nll")
        nll, spread = interval([run["test"]["nll"] for run in others])
        gap = "–"
        if baseline:
            apart = [a["test"]["score"] - b["test"]["score"] for a, b in zip(runs, baseline, strict=True)]
            gap = "{:+.3f} ± {:.3f}".format(*interval(apart))
        out.append(
            f"| `{found['adapter']}` | {rate:g} | {mean:.3f} ± {half:.3f} | {gap} | {calm:g} | {nll:.3f} ± {spread:.3f} | "
            f"{found['trained']:,} | {size_of(found):,} | {found['seconds']:.0f} |"
        )
    told = [
        f"{found['arm']}: "
        + ", ".join(f"{np.mean([r['facts'][k] for r in runs]):.3%} {text}" for k, text in known)
        for found in arms.values()
        for runs in [chosen(found)[1]]
        for known in [[(k, v) for k, v in FACTS.items() if k in runs[0].get("facts", {})]]
        if known
    ]
    return [*out, "", *("; ".join(told) + "." for _ in told[:1]), ""]


def summary(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Every adapter over the data sets that all were run on: means of scores, and the epochs' losses."""
    most = max(len(arms) for arms in found.values())
    common = [d for d, arms in found.items() if len(arms) == most]
    names = [arm for arm in found[common[0]] if all(arm in found[d] for d in common)]
    head = " | ".join(f"{d} ({SCORES[d]})" for d in common)
    out = [f"| adapter | {head} | mean | bytes | of LoRA's |", "|---" * (len(common) + 4) + "|"]
    size = {arm: round(np.mean([size_of(found[d][arm]) for d in common])) for arm in names}
    for arm in sorted(names, key=lambda name: -size[name]):
        means = [float(np.mean([r["test"]["score"] for r in chosen(found[d][arm])[1]])) for d in common]
        share = f"{size[arm] / size['LoRA']:.1%}" if "LoRA" in size else "–"
        cells = " | ".join(f"{m:.3f}" for m in means)
        out.append(f"| {arm} | {cells} | {np.mean(means):.3f} | {size[arm]:,} | {share} |")
    return [*out, ""]


def rates(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Mean validation NLL at each rate, relative to the adapter's best: whether one --lr works for all."""
    arms: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    factors: dict[str, dict[str, float]] = {}
    for data in found.values():
        for arm, entry in data.items():
            factors[arm] = entry["factors"]
            values = {
                rate: float(np.mean([r["validation"]["nll"] for r in entry["runs"] if r["rate"] == rate]))
                for rate in sorted({r["rate"] for r in entry["runs"]})
            }
            for rate, value in values.items():
                arms[arm][rate].append(value - min(values.values()))
    grid = sorted({rate for values in arms.values() for rate in values})
    out = [
        "| adapter | factors | " + " | ".join(f"{r:g}" for r in grid) + " |",
        "|---" * (len(grid) + 2) + "|",
    ]
    for arm, values in arms.items():
        told = ", ".join(f"{k} {v:g}" for k, v in factors[arm].items()) or "1"
        out.append(f"| {arm} | {told} | " + " | ".join(f"{np.mean(values[r]):.3f}" for r in grid) + " |")
    return [*out, ""]


def curves(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Training loss of the first epochs of OLoRA and LoRA at the same rates."""
    out = ["| data | --lr | LoRA, epochs 1, 2, 3 | OLoRA, epochs 1, 2, 3 |", "|---|---|---|---|"]
    for data, arms in found.items():
        if not {"LoRA", "OLoRA"} <= set(arms):
            continue
        for rate in sorted({r["rate"] for r in arms["LoRA"]["runs"]}):
            cells = []
            for arm in ("LoRA", "OLoRA"):
                losses = np.mean([r["train_nll"] for r in arms[arm]["runs"] if r["rate"] == rate], axis=0)
                cells.append(", ".join(f"{v:.3f}" for v in losses[:3]))
            out.append(f"| {data} | {rate:g} | {cells[0]} | {cells[1]} |")
    return [*out, ""]


def chart(found: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Bytes against score, a panel for each data set that has more than a baseline; a colour an adapter."""
    shown = {data: arms for data, arms in found.items() if len(arms) > 2}
    names = sorted({arm for arms in shown.values() for arm in arms})
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    across = min(3, len(shown))
    down = -(-len(shown) // across)
    figure, grid = plt.subplots(down, across, figsize=(4.2 * across, 3.1 * down + 0.6), squeeze=False)
    axes = grid.flatten()
    for axis in axes[len(shown) :]:
        axis.remove()
    for axis, (data, arms) in zip(axes, shown.items(), strict=False):
        for arm in names:
            if arm in arms:
                mean, half = interval([run["test"]["score"] for run in chosen(arms[arm])[1]])
                place = (size_of(arms[arm]), mean)
                axis.errorbar(
                    *place, yerr=half, fmt="o", markersize=5, capsize=2, color=colours[arm], label=arm
                )
        axis.set_xscale("log")
        axis.set_xlim(1e3, 1e6)
        axis.set_title(data, fontsize=10)
        axis.set_xlabel("bytes of the compact file's tensors", fontsize=8)
        axis.set_ylabel(SCORES[data], fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    handles, labels = max(
        (a.get_legend_handles_labels() for a in axes[: len(shown)]), key=lambda pair: len(pair[1])
    )
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.16 / down, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("cache", type=Path)
    p.add_argument("out", type=Path)
    a = p.parse_args()
    everything = read(a.cache)
    out = [
        "# Every adapter on small data, learning rates tuned for every one",
        "",
        "MiniLM-L6. Made by `python benchmarks/adapter_study.py --data DIR` and `python "
        "benchmarks/adapter_table.py CACHE docs/results`; all numbers are in [adapters.json](adapters.json). Each "
        "adapter takes, of three, the `--lr` of its best score on validation rows for its score on test rows, and that of "
        "its lowest NLL for its NLL; its own factors multiply it leaf by leaf. Mean over seeds with its 95% t-interval; differences are paired by seed. "
        "Bytes are of the compact file's tensors in float32, heads apart; seconds are of one member, trained in a stack.",
        "",
    ]
    for targets in ("q,v", "all linear"):
        found = {data: arms for (t, data), arms in everything.items() if t == targets}
        if not found:
            continue
        name = "adapters.svg" if targets == "q,v" else "adapters-all.svg"
        chart(found, a.out / name)
        place = "query and value" if targets == "q,v" else "all linear layers of the blocks"
        out += [f"## On {place}", "", f"![Bytes against score, {place}]({name})", "", *summary(found)]
        out += [
            "Validation NLL at each `--lr`, minus the lowest, mean over data sets, in nats:",
            "",
            *rates(found),
        ]
        if targets == "q,v":
            out += ["Mean training loss of early epochs, nats:", "", *curves(found)]
        for data, arms in found.items():
            out += [f"### {data}, {place}", "", *table(data, arms)]
    (a.out / "adapters.md").write_text("\n".join(out).rstrip() + "\n", encoding="utf-8")
    kept = [entry for arms in everything.values() for entry in arms.values()]
    (a.out / "adapters.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
