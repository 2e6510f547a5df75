"""``kilobayes demo``."""

from __future__ import annotations

import time
from pathlib import Path

from kilobayes.commands import console


def demo(out: Path, *, seed: int, quick: bool) -> None:
    """Train the arms, print the table and three sentences, write the report."""
    from kilobayes import __version__
    from kilobayes.workflows import demo as work
    from kilobayes.workflows.evaluate import evaluate

    began = time.monotonic()
    console.say(f"kilobayes {__version__} · cpu · offline · {out}")
    data = work.corpus(seed, quick)
    console.say(
        f"model: all-MiniLM-L6-v2 · data: docstring sentences, {len(data.train)} training, "
        f"{len(data.calibration)} calibration, {len(data.test)} test, {len(data.ood)} out of distribution · "
        f"{len(data.train.classes)} topics · sha256 {data.digest[:12]}"
    )
    out.mkdir(parents=True, exist_ok=True)
    evaluations = []
    try:
        for name, fitted in work.arms(data, out, seed, quick, console.bar):
            evaluations.append(evaluate(fitted, data.test, data.ood, name=name)[0])
    except KeyboardInterrupt:
        if not evaluations:
            raise
        console.say(f"stopped; {len(evaluations)} arms are kept")
    summaries = work.finish(out, evaluations, data)
    costs = [e.cost for e in evaluations]
    console.console.print(console.table([e.name for e in evaluations], summaries, costs))
    for told in work.told(evaluations[-1]):
        console.say(f"{told.kind}: “{told.text}”")
        console.say(f"  → {told.said}")
    console.say(f"{time.monotonic() - began:.0f} seconds")
    console.say(f"report: {out / 'report.html'}")
    console.say("your own data: kilobayes train --data yours.csv --out runs/mine")
