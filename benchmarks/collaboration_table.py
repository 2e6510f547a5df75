"""Tables and a chart of :mod:`collaboration_study`.

python benchmarks/collaboration_table.py runs/collaboration docs/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy.stats import t as student

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "kilobayes"
import matplotlib.pyplot as plt  # noqa: E402

from kilobayes.files import write_json, write_text_atomically  # noqa: E402

TITLES = {
    "topics": "ag_news, topics in shares of Dirichlet's distribution (0.3), MiniLM",
    "subsets": "ag_news, two of four topics each, MiniLM",
    "languages": "xquad_wiki in four languages, stories260K",
    "styles": "stories, fairy tales, plays and the web, TinyStories-656K",
}
HEAD = """# Collaboration

Users who fine-tune for themselves and average with whom it pays ([how](../collaborate.md)): {users} users, LoRA of rank 4,
{steps} steps of {batch_size} rows, {alone} alone and then an exchange every {every}. Every user has rows of its own to report on.
Each arm's learning rate, of {rates}, is the one of lowest mean NLL over users on the rows that trust is measured on, with the
first of {seeds} seeds; so is a scheme's temperature, of {factors} times its own (the column *rate* has both, as 3e-3x0.2).

NLL is in nats a row (ag_news) or a token, the mean over users; ± is half of a 95% t-interval over seeds, of the mean, or of the
difference to users who train alone, paired by seed. *Better off* are users whose NLL, averaged over seeds, is below theirs alone.
*Trust* is what a user takes, in the last round, of itself, of others of its kind, and of the rest. Kilobytes are of one user in all
rounds. "FedAvg, leaves" averages LoRA's A and B apart, of users with one start; "FedAvg, factors" the same of users who start from
an A of their own each, as published code does.

```console
$ python benchmarks/collaboration_study.py --data DATA --models MODELS --cache runs/collaboration
$ python benchmarks/collaboration_table.py runs/collaboration docs/results
```
"""
COLUMNS = ("arm", "rate", "NLL", "to alone", "better off", "worst user", "spread", "own / kind / rest",
           "kB up", "kB down", "seconds")  # fmt: skip


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95% t-interval; no width of one value."""
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Arms of a setting: their rate, the runs of every seed, and NLL ``(seeds, users)``."""
    facts = json.loads((folder / "facts.json").read_text())
    out = {}
    for arm, rate in json.loads((folder / "chosen.json").read_text()).items():
        place = folder / arm.replace(", ", "-").replace(" ", "-")
        runs = [json.loads((place / f"{rate}-{s}.json").read_text()) for s in range(facts["seeds"])]
        nll = np.array([[user["nll"] for user in run["test"]] for run in runs])
        out[arm] = {"rate": rate, "runs": runs, "nll": nll}
    return out


def trusted(run: dict[str, Any], shares: np.ndarray) -> tuple[float, float, float]:
    """What users take of themselves, of others of the same kind, and of the rest, on average."""
    w, own = np.array(run["W"]), np.eye(len(shares), dtype=bool)
    alike = (np.abs(shares[:, None] - shares).sum(axis=2) < 1e-9) & ~own
    return tuple(float((w * part).sum() / len(w)) for part in (own, alike, ~own & ~alike))  # type: ignore


def row(arm: str, found: dict[str, Any], alone: np.ndarray | None, shares: np.ndarray) -> list[str]:
    """An arm's line."""
    nll, runs = found["nll"], found["runs"]
    mean, half = interval(nll.mean(axis=1))
    shown = f"{mean:.4f}" + ("" if np.isnan(half) else f" ± {half:.4f}")
    difference, better = "", ""
    if alone is not None and arm != "alone":
        gap, width = interval((nll - alone).mean(axis=1))
        difference = f"{gap:+.4f}" + ("" if np.isnan(width) else f" ± {width:.4f}")
        better = f"{int((nll.mean(axis=0) < alone.mean(axis=0)).sum())} of {nll.shape[1]}"
    parts = [np.mean(v) for v in zip(*(trusted(run, shares) for run in runs))]
    numbers = [f"{np.mean([run[k] for run in runs]) / 1000:.0f}" for k in ("up", "down")]
    each = nll.mean(axis=0)
    lines = [arm, found["rate"], shown, difference, better, f"{each.max():.4f}", f"{each.std(ddof=1):.4f}"]
    lines.append(" / ".join(f"{p:.2f}" for p in parts))
    return [*lines, *numbers, f"{np.mean([run['seconds'] for run in runs]):.0f}"]


def table(cache: Path, out: Path) -> None:
    """``collaboration.md``, ``.json`` and ``.svg`` of what the cache holds."""
    folders = [cache / name for name in TITLES if (cache / name / "chosen.json").exists()]
    facts = {folder.name: json.loads((folder / "facts.json").read_text()) for folder in folders}
    first = next(iter(facts.values()))
    lines = HEAD.format(**first | {"users": len(first["users"])}).splitlines()
    kept: dict[str, Any] = {}
    every = {folder.name: read(folder) for folder in folders}
    for name, arms in every.items():
        shares, alone = np.array(facts[name]["shares"]), arms.get("alone", {}).get("nll")
        counts = ", ".join(map(str, facts[name]["rows"]))
        lines += ["", f"## {name}: {TITLES[name]}", "", f"Training rows of the users: {counts}.", "",
                  f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]  # fmt: skip
        for arm, found in arms.items():
            lines.append(f"| {' | '.join(row(arm, found, alone, shares))} |")
        kept[name] = {"facts": facts[name]} | {
            arm: {"rate": f["rate"], "runs": f["runs"]} for arm, f in arms.items()
        }
    lines += ["", "![differences to users alone](collaboration.svg)"]
    lines += ["", "The last W of three schemes, averaged over seeds: row u is what user u takes from each.", "",
              "![whom users trust](collaboration_trust.svg)"]  # fmt: skip
    write_json(out / "collaboration.json", kept)
    write_text_atomically(out / "collaboration.md", "\n".join(lines) + "\n")
    chart(every, out / "collaboration.svg")
    trusting(every, {name: f["users"] for name, f in facts.items()}, out / "collaboration_trust.svg")


def trusting(every: dict[str, dict[str, Any]], users: dict[str, list[str]], path: Path) -> None:
    """W of every setting and scheme."""
    schemes = ("weights", "predictions", "validation")
    size = (7.2, 2.1 * len(every))
    figure, grid = plt.subplots(len(every), 3, figsize=size, squeeze=False, layout="constrained")
    for line, (name, arms) in zip(grid, every.items()):
        short = [user.replace("_stories", "").replace("_and_wiki_sample", "") for user in users[name]]
        for axes, scheme in zip(line, schemes):
            if scheme not in arms:
                axes.axis("off")
                continue
            w = np.mean([run["W"] for run in arms[scheme]["runs"]], axis=0)
            shown = axes.imshow(w, cmap="Blues", vmin=0.0, vmax=1.0)
            axes.set_xticks([])
            axes.tick_params(length=0)
            axes.set_yticks(range(len(w)), short if axes is line[0] else [""] * len(w), fontsize=7)
            axes.set_title(f"{name}: {scheme}", fontsize=9)
    figure.colorbar(shown, ax=grid, shrink=0.4)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def chart(every: dict[str, dict[str, Any]], path: Path) -> None:
    """Every user's NLL against what it has alone, by arm, and their mean with its interval over seeds."""
    figure, grid = plt.subplots(1, len(every), figsize=(3.4 * len(every) + 1.2, 3.6), squeeze=False)
    for axes, (name, arms) in zip(grid[0], every.items()):
        alone = arms["alone"]["nll"]
        names = [arm for arm in arms if arm != "alone"]
        for at, arm in enumerate(names):
            gap = arms[arm]["nll"] - alone
            axes.plot(gap.mean(axis=0), np.full(gap.shape[1], at), ".", color="0.65", markersize=5)
            mean, half = interval(gap.mean(axis=1))
            axes.errorbar(mean, at, xerr=None if np.isnan(half) else half, fmt="o", color="C0", capsize=3)
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(names)), names if axes is grid[0][0] else [""] * len(names), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("nats to alone; left is better", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    table(Path(sys.argv[1]), Path(sys.argv[2]))
