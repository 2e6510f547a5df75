"""The page and the figures of what ``language_study.py`` has in its cache.

python benchmarks/language_table.py runs/language docs/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from language_study import ARMS

from kilobayes.files import write_json, write_text_atomically
from kilobayes.metrics import Interval, over_seeds

SHOWN = {"nll": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte", "ece": "ECE",
         "accuracy": "accuracy"}  # fmt: skip
HEAD = """# Language models under posteriors

Two small models pretrained on simple stories, fine-tuned (LoRA of rank 8) on {documents} texts of `fairytale_stories`, {epochs}
epochs, and scored on its test split, on `tinystories` (what they were pretrained on) and on `web_and_wiki_sample`, {scored} texts
of each; of every text the first {characters} characters. Rates are the best of {rates} on validation texts with the first seed.
Means over {seeds} seeds, with half the width of a 95% t-interval, which with three seeds is wide. Probabilities are averaged over
{samples} draws. Seconds are of training and fitting, processor time of one thread on a machine that had other work; bytes are those
of the posterior's state. Perplexities of the two models are not comparable, bits per byte are.

```console
$ python benchmarks/language_study.py --data DATA --models MODELS --documents {documents} --scored {scored} --epochs {epochs} --rates {rates}
$ python benchmarks/language_table.py runs/language docs/results
```
"""


def table(cache: Path, out: Path) -> None:
    """``language.md`` and ``language.json`` of what the cache holds."""
    names = {"test": "fairytale_stories (test)", "stories": "tinystories", "web": "web_and_wiki_sample"}
    folders = sorted(p for p in cache.iterdir() if (p / "chosen.json").exists())
    settings = json.loads((folders[0] / "facts.json").read_text())
    kept: dict[str, Any] = {}
    lines = HEAD.format(**settings).splitlines()
    for folder in folders:
        facts, chosen = (json.loads((folder / f"{f}.json").read_text()) for f in ("facts", "chosen"))
        kept[folder.name] = {"facts": facts, "chosen": chosen, "arms": {}}
        runs = {"not fine-tuned": [folder / "scores" / "not-fine-tuned" / "0-0"]}
        for arm in (a for a in ARMS if a in chosen):
            place = folder / "scores" / arm.replace(" ", "-")
            runs[arm] = [place / f"{chosen[arm]:g}-{seed}" for seed in range(facts["seeds"])]
        read = {
            arm: [json.loads(p.read_text()) for p in paths]
            for arm, paths in runs.items()
            if paths[0].exists()
        }
        kept[folder.name]["arms"] = read
        lines += [
            "",
            f"## {folder.name}",
            "",
            "Learned tokens: " + ", ".join(f"{k} {v:,}" for k, v in facts["tokens"].items()) + ".",
        ]
        for part, title in names.items():
            lines += ["", f"### {folder.name}, {title}", "",
                      f"| arm | rate | {' | '.join(SHOWN.values())} | seconds | bytes |",
                      "|---|---|" + "---|" * (len(SHOWN) + 2)]  # fmt: skip
            for arm, found in read.items():
                spreads = over_seeds([{k: Interval(**v) for k, v in f[part].items()} for f in found])
                cells = [f"{spreads[k].mean:.4f}" + _margin(spreads[k]) for k in SHOWN]
                seconds = sum(f["seconds"] for f in found) / len(found)
                rate = f"{chosen[arm]:g}" if arm in chosen else "-"
                lines.append(
                    f"| {arm} | {rate} | {' | '.join(cells)} | {seconds:.0f} | {found[0]['bytes']:,} |"
                )
    write_json(out / "language.json", kept)
    write_text_atomically(out / "language.md", "\n".join(lines) + "\n")


def _margin(spread: Any) -> str:
    return f" ± {(spread.high - spread.low) / 2:.4f}" if spread.n > 1 else ""


if __name__ == "__main__":
    table(Path(sys.argv[1]), Path(sys.argv[2]))
