"""The page and the figures of what ``transfer_study.py`` has in its cache.

python benchmarks/transfer_table.py runs/transfer docs/results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kilobayes.files import write_json, write_text_atomically
from kilobayes.metrics import Interval, over_seeds

ARMS = ("seeds only", "random inputs", "unfiltered", "filtered", "real inputs", "oracle")
SHOWN = {"accuracy": "accuracy", "nll": "NLL, nats", "ece": "ECE", "agreement": "says what the source says"}
STORIES = {"bits_per_byte": "bits per byte"}
HEAD = """# Transfer to other bases

Made by `python benchmarks/transfer_study.py --data DATA --models MODELS` and `python benchmarks/transfer_table.py CACHE
docs/results`; all numbers are in [transfer.json](transfer.json), and [Transfer](../transfer.md) says what the words mean. Means over
seeds, with half the width of a 95% t-interval, which with three seeds is wide; what is paired is paired by seed. Every student takes
the rate of its lowest NLL on real validation rows with the first seed, which somebody without the data could not do.

*Seeds only*: five real rows. *Random inputs*: unlabelled texts of other data sets. *Unfiltered*: of language models what the target
writes, else the unlabelled texts nearest to the seeds. *Filtered*: likewise, those that the discriminator takes for real. *Real
inputs*: the task's own, without labels. All of these are answered by the source. *Oracle*: the target trained on the real rows with
their labels, as if the data were still there.
"""


def read(folder: Path) -> list[dict[str, Any]]:
    """JSON of a folder's files, in order."""
    return [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]


def runs(folder: Path) -> dict[str, Any]:
    """Figures on test rows, by arm: a list over seeds, and the chosen rate."""
    out: dict[str, Any] = {}
    for chosen in [None, *ARMS]:
        name = "untrained" if chosen is None else chosen.replace(" ", "-")
        path = folder.parents[1] / "chosen" / folder.name / f"{name}.json"
        if chosen is not None and not path.exists():
            continue
        rate = 0.0 if chosen is None else json.loads(path.read_text(encoding="utf-8"))["rate"]
        files = [
            json.loads(p.read_text(encoding="utf-8"))
            for p in sorted((folder / name).glob(f"{rate:g}-*.json"))
        ]
        found = [f["test"] for f in files if "test" in f]
        if found:
            out[chosen or "target, untrained"] = {
                "rate": rate,
                "failed": len(files) - len(found),
                "test": found,
            }
    return out


def spread(values: Sequence[float], digits: int = 3) -> str:
    """A mean with half the width of its interval."""
    found = over_seeds([{"v": Interval(v, v, v)} for v in values])["v"]
    width = f" ± {(found.high - found.low) / 2:.{digits}f}" if found.n > 1 else ""
    return f"{found.mean:.{digits}f}{width}"


def arms_table(source: list[dict[str, Any]], found: dict[str, Any], shown: dict[str, str]) -> list[str]:
    """A row an arm."""
    lines = ["| arm | rate | " + " | ".join(shown.values()) + " |", "|---|---|" + "---|" * len(shown)]
    arms = {"source": {"rate": None, "failed": 0, "test": [s["test"] for s in source]}} | found
    for arm, of in arms.items():
        cells = [spread([t[k] for t in of["test"]]) for k in shown]
        missing = f" ({of['failed']} seeds without enough inputs)" if of["failed"] else ""
        lines.append(f"| {arm}{missing} | {of['rate'] or '-'} | {' | '.join(cells)} |")
    return lines


def differences(found: dict[str, Any], key: str, sign: float) -> list[str]:
    """Filtered against the arms that say what filtering and the data are worth."""
    out = []
    for other in ("unfiltered", "random inputs", "real inputs", "oracle"):
        if "filtered" in found and other in found:
            pairs = zip(found["filtered"]["test"], found[other]["test"])
            out.append(f"{other} {spread([sign * (a[key] - b[key]) for a, b in pairs])}")
    return out


def inputs_table(folder: Path) -> list[str]:
    """How each arm's inputs came about."""
    lines = [
        "| inputs | proposals | passed | judged real | exact copies | near copies |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ("random inputs", "unfiltered", "filtered"):
        found = [
            f["about"]
            for f in map(_read, sorted(folder.glob(f"{arm.replace(' ', '-')}-*.json")))
            if "about" in f
        ]
        if not found or "tries" not in found[0]:
            continue
        passed = [1.0 - f["rejected"] / f["tries"] for f in found] if arm == "filtered" else None
        cells = [
            spread([f["tries"] for f in found], 0),
            "all" if passed is None else spread(passed, 2),
            spread([f["accepted"] for f in found], 2),
            *(spread([f["duplicates"][k] for f in found], 1) for k in ("exact", "near")),
        ]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return lines


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


def judged(folder: Path) -> str:
    """What the discriminators make of rows that they did not see, and how good the source's are."""
    found = [_read(p)["held_out"] for p in sorted(folder.glob("*/discriminator/discriminator.json"))]
    parts = {"accepts_real": "of the real", "accepts_synthetic": "of the made-up"}
    told = ", ".join(f"{spread([f[k] for f in found], 2)} {words}" for k, words in parts.items())
    return f"Of rows held out the discriminators pass {told}; AUROC {spread([f['auroc'] for f in found], 2)}."


def table(cache: Path, out: Path) -> None:
    """``transfer.md`` and ``transfer.json`` of what the cache holds."""
    lines, kept = HEAD.splitlines(), {}
    for folder in [cache / n for n in ("trec", "sst2", "stories") if (cache / n / "source").is_dir()]:
        shown, facts = STORIES if folder.name == "stories" else SHOWN, _read(folder / "facts.json")
        source = read(folder / "source")
        kept[folder.name] = {"facts": facts, "source": source, "arms": {}}
        lines += ["", f"## {folder.name}", "", _about(folder.name, facts), "", judged(folder / "sources"), ""]
        lines += inputs_table(folder / "inputs")
        for adapter in sorted((folder / "students").iterdir()):
            found = runs(adapter)
            kept[folder.name]["arms"][adapter.name] = found
            lines += ["", f"### {folder.name}, to {adapter.name}", "", *arms_table(source, found, shown), ""]
            key, sign = ("bits_per_byte", -1.0) if folder.name == "stories" else ("accuracy", 1.0)
            told = "; ".join(differences(found, key, sign)) or "nothing to compare"
            lines.append(f"Filtered is better, in {shown[key]}, than: {told}.")
    write_json(out / "transfer.json", kept)
    write_text_atomically(out / "transfer.md", "\n".join(lines) + "\n")


def _about(name: str, facts: dict[str, Any]) -> str:
    if name == "stories":
        return (
            f"LoRA on stories260K, trained on {facts['documents']} texts of fairytale_stories, to TinyStories-656K: another "
            f"tokenizer, by text. Inputs are {facts['words']} words; {facts['documents']} texts are written, "
            f"{facts['length']} tokens each at most; {facts['scored']} test texts."
        )
    return (
        f"LoRA of rank 8 under SWAG on MiniLM, trained on {facts['rows']} rows, to a base of {facts['blocks']} of its six blocks; {facts['rows']} "
        f"inputs, from {facts['pool']:,} unlabelled texts of other data sets; {facts['test']} test rows, "
        f"{len(facts['classes'])} classes, {facts['epochs']} epochs."
    )


if __name__ == "__main__":
    table(Path(sys.argv[1]), Path(sys.argv[2]))
