"""What a person reads of a collaboration: a table of users and a picture of trust."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kilobayes.collaboration.settings import Together
from kilobayes.options import Options

COLUMNS = {
    "nll": "NLL, nats",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "rows": "test rows",
}


def heat_map(path: Path, trust: Any, names: Sequence[str], title: str) -> None:
    """W as a picture: row u is how much user u takes from each."""
    import matplotlib
    from matplotlib.figure import Figure

    from kilobayes.files import replacing

    w = np.asarray(trust)
    side = 1.6 + 0.55 * len(names)
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(w, cmap="Blues", vmin=0.0, vmax=max(float(w.max()), 1e-9))
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("takes from")
    axes.set_ylabel("user")
    axes.set_title(f"Trust: {title}", fontsize=10)
    for u, v in np.ndindex(*w.shape):
        if w[u, v] >= 0.005:
            dark = w[u, v] > 0.6 * w.max()
            axes.text(
                v, u, f"{w[u, v]:.2f}", ha="center", va="center", fontsize=7, color="w" if dark else "k"
            )
    figure.colorbar(shown, ax=axes, shrink=0.8)
    with (
        replacing(path) as temporary,
        matplotlib.rc_context({"svg.hashsalt": "trust", "svg.fonttype": "none"}),
    ):
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def table(names: Sequence[str], figures: Sequence[dict[str, float]], rows: Sequence[int]) -> str:
    """Users' figures, their mean, the worst user and the spread, as Markdown."""
    keys = [key for key in COLUMNS if key in figures[0]]
    lines = [
        f"| user | training rows | {' | '.join(COLUMNS[k] for k in keys)} |",
        "|---|---|" + "---|" * len(keys),
    ]
    for name, count, own in zip(names, rows, figures, strict=True):
        lines.append(f"| {name} | {count} | {' | '.join(_cell(k, own[k]) for k in keys)} |")
    each = {k: np.array([own[k] for own in figures]) for k in keys}
    worst = int(np.argmax(each["nll"]))
    spread = {k: float(v.std(ddof=1)) for k, v in each.items()}
    lines.append(f"| **mean** | | {' | '.join(_cell(k, float(each[k].mean())) for k in keys)} |")
    lines.append(f"| **worst: {names[worst]}** | | {' | '.join(_cell(k, each[k][worst]) for k in keys)} |")
    cells = ["" if k == "rows" else _cell(k, spread[k]) for k in keys]
    lines.append(f"| **spread** (standard deviation over users) | | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(key: str, value: float) -> str:
    return f"{value:.0f}" if key == "rows" else f"{value:.2f}" if key == "perplexity" else f"{value:.4f}"


def readme(done: Any, options: Options, together: Together, rows: Sequence[int]) -> str:
    """The page of a collaboration."""
    up = sum(sum(line["up_bytes"]) for line in done.rounds)
    down = sum(sum(line["down_bytes"]) for line in done.rounds)
    verb = "generate" if options.task == "lm" else "predict"
    per = "token" if options.task == "lm" else "row"
    missing = sum(bool(line["refused"]) for line in done.rounds)
    left = f" In {missing} of them somebody was left out; `rounds.jsonl` says who and why." if missing else ""
    return f"""# {len(done.names)} users, {together.scheme}

Each user on its own test rows, which nobody trained on and no trust was measured on; NLL in nats per {per}:

{table(done.names, done.figures, rows)}

![trust](trust.svg)

Row u of the picture says how much user u takes of each user's adapter in the last of {len(done.rounds)}
rounds.{left} Everybody together sent {up:,} bytes and got {down:,}. Updates and, where trust is measured by
them, predictions travel as they are: a server sees every one.

`users/NAME` are runs: `kilobayes {verb} users/{done.names[0]} ...`. Adapter `{options.adapter}`, posterior
`{options.posterior}`, model {options.model}, seed {options.seed}.
`kilobayes collaborate collaborate.yaml --out OTHER` repeats the collaboration.
"""
