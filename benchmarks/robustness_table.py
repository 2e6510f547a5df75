"""Spreads, the table and the plots of :mod:`robustness`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

MEASURES = {"accuracy": "accuracy", "nll": "NLL", "nll_t": "NLL with a temperature"}
SPREADS = {"range": "max − min", "std": "standard deviation", "iqr": "interquartile range"}
COLOURS = {"LoRA": "#555555", "SWAG": "#0072b2", "BLoB": "#d55e00", "MonteCLoRA": "#009e73"}


def spread(values: np.ndarray) -> dict[str, float]:
    """Over the grid: best is the largest, whichever is wanted; the standard deviation is that of the grid itself."""
    low, high = np.quantile(values, [0.25, 0.75])
    return {
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        "range": float(np.ptp(values)),
        "std": float(values.std()),
        "iqr": float(high - low),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """By arm and measure: the spread over the grid of each seed, as mean, smallest and largest over seeds."""
    out: dict[str, Any] = {}
    for arm in dict.fromkeys(run["arm"] for run in runs):
        own = [run for run in runs if run["arm"] == arm]
        out[arm] = {"runs": len(own), "diverged": sum(run["diverged"] for run in own)}
        for measure in MEASURES:
            each = [
                spread(np.array([run[measure] for run in own if run["seed"] == seed]))
                for seed in sorted({run["seed"] for run in own})
            ]
            out[arm][measure] = {
                name: [float(np.mean(found)), min(found), max(found)]
                for name in each[0]
                for found in [[e[name] for e in each]]
            }
    return out


def table(results: dict[str, Any]) -> str:
    """Markdown of all data sets."""
    out = ["# Robustness", ""]
    out += [
        "How much test accuracy and NLL (nats) move over a grid of learning rates and batch sizes. No cell is picked:",
        "a smaller spread means less to tune. The spread is taken over the grid for each seed; shown are the mean",
        "over seeds and, in brackets, the smallest and the largest. Best is the best cell by test rows, which tuning",
        "cannot promise to find.",
        "",
    ]
    for name, found in results.items():
        s, rows = found["settings"], found["rows"]
        rates = ", ".join(f"{rate:g}" for rate in s["rates"])
        out += [f"## {name}", "", "```console", f"$ {found['command']}", "```", ""]
        out += [
            f"Rates {rates}; batches of {', '.join(map(str, s['batches']))}; {s['seeds']} seeds; {s['epochs']} epochs"
            f" of {rows['train']} rows; {rows['test']} test rows, temperatures from {rows['calibration']} others;"
            f" {s['samples']} samples; {s['dtype']} base; {found['seconds']:.0f} s of processor time.",
            "",
            f"![Accuracy and NLL by learning rate on {name}](robustness-{name}.svg)",
            "",
        ]
        for measure, title in MEASURES.items():
            best, worst = ("max", "min") if measure == "accuracy" else ("min", "max")
            heads = [title, "best", "mean", "worst", *SPREADS.values(), "diverged"]
            out += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
            for arm, row in found["arms"].items():
                cells = [f"{row[measure][key][0]:.3f}" for key in (best, "mean", worst)]
                cells += ["{:.3f} ({:.3f} to {:.3f})".format(*row[measure][key]) for key in SPREADS]
                out.append("| " + " | ".join([arm, *cells, f"{row['diverged']} of {row['runs']}"]) + " |")
            out.append("")
    return "\n".join(out)


def picture(name: str, found: dict[str, Any], path: Path) -> None:
    """Accuracy and NLL by learning rate: the mean line, and a band over batch sizes and seeds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = name  # the same file for the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for axis, measure in zip(axes, ("accuracy", "nll")):
        for index, arm in enumerate(found["arms"]):
            own = [run for run in found["runs"] if run["arm"] == arm]
            rates = sorted({run["rate"] for run in own})
            values = [[run[measure] for run in own if run["rate"] == rate] for rate in rates]
            colour = COLOURS.get(arm, f"C{index}")
            axis.plot(rates, [np.mean(v) for v in values], color=colour, marker="o", markersize=3, label=arm)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(rates, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(
            xscale="log", xlabel="learning rate", ylabel="accuracy" if measure == "accuracy" else "NLL, nats"
        )
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes[1].yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes[1].yaxis.set_minor_formatter(ticker.NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=4, frameon=False, loc="outside upper center")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
