"""The Markdown table of :mod:`quality`: ``python benchmarks/quality_table.py DIR`` writes it anew from DIR/quality.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

SHOWN = ("accuracy", "nll", "ece", "brier", "error_auroc", "ood_auroc")


def markdown(results: dict) -> str:
    lines = [
        "# Accuracy and calibration, learning rates tuned for every arm",
        "",
        "MiniLM-L6 with LoRA (r=8 on query and value), batch 16. Each arm takes the learning rate of its lowest NLL",
        "on calibration rows and is scored once on test rows. Single arms are the first member of each replicate,",
        "pooled arms all of its members. Mean over replicates with its 95% t-interval; ECE has 15 bins of equal",
        "width; OOD AUROC is by predictive entropy; error AUROC says whether confidence tells right from wrong.",
        "The last column is the difference over replicates: its mean, lowest and highest.",
        "",
    ]
    for name, r in results.items():
        s = r["settings"]
        lines += [
            f"## {name}",
            "",
            f"`{r['command']}`",
            "",
            f"{r['rows']['train']} training rows, {r['rows']['calibration']} calibration, {r['rows']['test']}; out of "
            f"distribution: {r['ood'] or 'none'}. {s['epochs']} epochs, rates {s['rates']}, {s['dtype']} base,",
            f"{s['replicates']} replicates of {s['members']} members; `{s['swag']}` with {s['samples']} samples a member.",
            "",
            "| arm | rate | accuracy | NLL | ECE | Brier | error AUROC | OOD AUROC | NLL − (LoRA + temperature) |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for arm, v in r["arms"].items():
            cells = [_cell(v["metrics"].get(k)) for k in SHOWN]
            gap = v["nll_minus_lora_temperature"]
            difference = f"{np.mean(gap):+.3f} ({min(gap):+.3f} to {max(gap):+.3f})"
            shown = "" if arm == "LoRA + temperature" else difference
            lines.append(f"| {arm} | {v['rate']:g} | " + " | ".join(cells) + f" | {shown} |")
        lines.append("")
    return "\n".join(lines)


def _cell(m: dict | None) -> str:
    return (
        "–" if m is None or m["mean"] != m["mean"] else f"{m['mean']:.3f} [{m['low']:.3f}, {m['high']:.3f}]"
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    table = markdown(json.loads((folder / "quality.json").read_text()))
    (folder / "quality.md").write_text(table + "\n")
