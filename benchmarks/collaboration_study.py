"""Users who fine-tune together: alone, FedAvg, an oracle, three schemes of trust, and the published average.

    python benchmarks/collaboration_study.py --data DATA --models MODELS --cache runs/collaboration
    python benchmarks/collaboration_table.py runs/collaboration docs/results

The first command runs whatever the cache does not hold yet and may be killed and run again; the second makes
the table of what is there. Users are real texts divided by label, language or style; each has rows to train
on, rows that trust is measured on and rates are chosen by, and rows to report on. Every arm's learning rate
is the one of lowest mean NLL on the second, with the first seed; then all seeds run at that rate. A scheme's temperature is chosen with it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from kilobayes.collaboration.party import gather
from kilobayes.collaboration.scheme import TEMPERATURES
from kilobayes.collaboration.settings import Together
from kilobayes.files import write_json
from kilobayes.options import Options
from kilobayes.tasks.data import Examples, load_examples
from kilobayes.tasks.sources import read_source
from kilobayes.tasks.text import Documents
from kilobayes.workflows.collaborate import run
from kilobayes.workflows.users import Own

SAME = {"kinds": "-"}  # the oracle is told shares, not words
ARMS: dict[str, dict[str, Any]] = {
    "alone": {"scheme": "local"},
    "FedAvg": {"scheme": "fedavg"},
    "FedAvg, leaves": {"scheme": "fedavg", "average": "leaves"},  # of one common start
    "FedAvg, factors": {"scheme": "fedavg", "average": "leaves"},  # as published: every user another A
    "oracle": {"scheme": "oracle"} | SAME,
    "weights": {"scheme": "weights"},
    "predictions": {"scheme": "predictions"},
    "validation": {"scheme": "validation"},
    "alone, SWAG": {"scheme": "local", "posterior": "SWAG(rank=0)"},
    "validation, moments": {
        "scheme": "validation", "posterior": "SWAG(rank=0)", "share": "moments", "average": "leaves",
    },
}  # fmt: skip
PAIRS = [(0, 1), (2, 3), (0, 2), (1, 3)]  # labels of the users of a kind
LANGUAGES = ("en", "de", "es", "tr")
STYLES = ("tinystories", "fairytale_stories", "tiny_shakespeare", "web_and_wiki_sample")


@dataclass(frozen=True)
class Setting:
    """Users and what they train: ``shares`` (U, kinds) are what an oracle knows."""

    people: dict[str, Own]
    shares: np.ndarray
    reference: Any
    options: dict[str, Any]


def by_label(a: argparse.Namespace, shares: np.ndarray, names: list[str]) -> Setting:
    """ag_news, divided by shares of the four topics; the rows reported on have a user's own shares."""
    draw = np.random.default_rng(0)
    pools: dict[str, list[list[int]]] = {}
    whole = {split: load_examples(a.data / "ag_news", split) for split in ("train", "test")}
    for split, rows in whole.items():
        labels = np.asarray(rows.labels)
        pools[split] = [draw.permutation(np.flatnonzero(labels == c)).tolist() for c in range(4)]

    def take(split: str, share: np.ndarray, count: int) -> Examples:
        wanted = draw.choice(4, size=count, p=share)
        return whole[split].take([pools[split][c].pop() for c in wanted])

    people = {}
    for at, name in enumerate(names):
        train = a.rows * (1 if at % 2 else 2) // 2
        parts = [("train", train), ("train", a.trust), ("test", a.tested)]
        people[name] = Own(*(take(split, shares[at], count) for split, count in parts))
    reference = replace(take("test", np.full(4, 0.25), a.reference), labels=None)
    return Setting(people, shares, reference, {"model": "minilm", "max_length": 48, "layers": "4,5"})


def topics(a: argparse.Namespace) -> Setting:
    """Label skew: shares of topics from Dirichlet's distribution."""
    shares = np.random.default_rng(1).dirichlet(np.full(4, 0.3), size=a.users)
    return by_label(a, shares, [f"user {u}" for u in range(a.users)])


def subsets(a: argparse.Namespace) -> Setting:
    """Users who know two topics of the four, two users to each pair; some pairs overlap, some do not."""
    pairs = [PAIRS[(u // 2) % 4] for u in range(a.users)]
    shares = np.array([[0.5 if c in pair else 0.0 for c in range(4)] for pair in pairs])
    return by_label(a, shares, [f"topics {p}{q} {u % 2}" for u, (p, q) in enumerate(pairs)])


def writers(a: argparse.Namespace, model: str, texts: dict[str, tuple[list[str], list[str]]]) -> Setting:
    """Two users to a kind of texts, one with half of the other's; shared rows are of all kinds."""
    people, reference = {}, []
    for kind, (train, test) in texts.items():
        cut = [[t[: a.characters] for t in part] for part in (train, test)]
        at = 0
        reference += cut[0][-a.reference // len(texts) :]
        for half in range(2):
            count = a.rows * (1 if half else 2) // 2
            own = cut[0][at : at + count + a.trust]
            tested = cut[1][half * a.tested : (half + 1) * a.tested]
            parts = (own[:count], own[count:], tested)
            people[f"{kind} {half}"] = Own(*(Documents("text", part) for part in parts))
            at += count + a.trust
    people = dict(list(people.items())[: a.users])
    shares = np.repeat(np.eye(len(texts)), 2, axis=0)[: a.users]
    options = {"task": "lm", "model": str(a.models / model), "max_length": 128}
    return Setting(people, shares, Documents("text", reference), options)


def languages(a: argparse.Namespace, model: str = "stories260K") -> Setting:
    """Paragraphs of Wikipedia in four languages."""
    found = {}
    for language in LANGUAGES:
        both = []
        for split in ("train", "validation"):
            columns = read_source(a.data / "xquad_wiki", split).columns
            both.append([t for t, lang in zip(columns["text"], columns["lang"]) if lang == language])
        found[language] = (both[0], both[1])
    return writers(a, model, found)


def styles(a: argparse.Namespace, model: str = "TinyStories-656K") -> Setting:
    """Stories for children, fairy tales, plays and the web."""
    found = {}
    for name in STYLES:
        last = "test" if name in ("tiny_shakespeare", "fairytale_stories") else "validation"
        texts = [list(read_source(a.data / name, split).columns["text"]) for split in ("train", last)]
        if name == "tiny_shakespeare":  # blocks of several speeches, more of them and shorter
            texts = [[t[i : i + 500] for t in part for i in (0, 500, 1000)] for part in texts]
        found[name] = (texts[0], texts[1])
    return writers(a, model, found)


SETTINGS: dict[str, Callable[..., Setting]] = {
    "topics": topics, "subsets": subsets, "languages": languages, "styles": styles,
}  # fmt: skip


def one(setting: Setting, arm: str, choice: str, seed: int, a: argparse.Namespace) -> dict[str, Any]:
    """An arm at a rate, a temperature and a seed: figures on the rows of trust and of the report, W, bytes, seconds."""
    chosen, (rate, factor) = ARMS[arm], map(float, (choice + "x1").split("x")[:2])
    tau = TEMPERATURES.get(chosen["scheme"])
    posterior = chosen.get("posterior", "Point()")
    options = Options(
        lr=rate, seed=seed, batch_size=a.batch_size, adapter="LoRA(r=4)", posterior=posterior, samples=8,
        **setting.options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "reference.jsonl"
        rows = setting.reference.texts if isinstance(setting.reference, Examples) else setting.reference.rows
        reference.write_text("".join(json.dumps({"text": t}) + "\n" for t in rows), encoding="utf-8")
        together = Together(
            steps=a.steps, warmup_steps=a.alone, every=a.every, reference=str(reference), positions=128,
            temperature=None if tau is None else tau * factor,
            **{k: v for k, v in chosen.items() if k != "posterior"},
        )  # fmt: skip
        apart = range(100 * seed, 100 * seed + len(setting.people)) if arm == "FedAvg, factors" else None
        clock = time.process_time()
        party = gather(options, together, setting.people, Path(folder), starts=apart)
        lines = run(party, together, kinds=torch.tensor(setting.shares))
        seconds = time.process_time() - clock
        sent = {k: float(np.mean([sum(line[k]) for line in lines])) for k in ("up_bytes", "down_bytes")}
        figures = {"trust": party.test("trust"), "test": party.test()}
    lost = any(line["refused"] for line in lines)
    each = len(setting.people)
    return figures | {
        "seconds": seconds, "W": lines[-1]["trust"], "refused": lost, "lost": lines[-1]["lost"],
        "up": sent["up_bytes"] / each, "down": sent["down_bytes"] / each,
    }  # fmt: skip


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file holds, or what is made and then kept there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make())
    return json.loads(path.read_text())


def study(name: str, a: argparse.Namespace) -> None:
    setting, folder = SETTINGS[name](a), a.cache / name
    apart = ("data", "models", "cache", "only", "arms", "quick")
    facts = {k: v for k, v in vars(a).items() if k not in apart}
    facts |= {"options": setting.options | {"model": Path(setting.options["model"]).name}}
    facts |= {"users": list(setting.people), "shares": setting.shares.tolist(),
              "rows": [len(own.train) for own in setting.people.values()]}  # fmt: skip
    if cached(folder / "facts.json", lambda: facts) != json.loads(json.dumps(facts)):
        raise SystemExit(f"{folder} is of other settings; name another --cache")
    for arm in a.arms.split(";") if a.arms else ARMS:
        tuned = ARMS[arm]["scheme"] in TEMPERATURES
        factors = [f"x{f}" for f in a.factors.split(",")] if tuned else [""]
        choices = [f"{rate}{factor}" for rate in a.rates.split(",") for factor in factors]

        def at(choice: str, seed: int, arm: str = arm) -> dict[str, Any]:
            path = folder / arm.replace(", ", "-").replace(" ", "-") / f"{choice}-{seed}.json"
            return cached(path, lambda: one(setting, arm, choice, seed, a))

        found = {choice: at(choice, 0) for choice in choices}
        best = min(choices, key=lambda c: np.mean([f["nll"] for f in found[c]["trust"]]))
        done = [at(best, seed) for seed in range(a.seeds)]
        score = np.mean([f["nll"] for one_ in done for f in one_["test"]])
        print(f"{name}: {arm}, {best}, NLL {score:.4f}, {done[0]['seconds']:.1f} s a run", flush=True)
        kept = folder / "chosen.json"
        write_json(kept, (json.loads(kept.read_text()) if kept.exists() else {}) | {arm: best})


def main(given: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    p.add_argument("--models", type=Path, required=True, help="folder of the language models")
    p.add_argument("--cache", type=Path, default=Path("runs/collaboration"))
    p.add_argument("--only", help=f"settings, separated by commas: {', '.join(SETTINGS)}")
    p.add_argument("--arms", help="separated by semicolons; all if left out")
    p.add_argument("--rates", default="3e-3,1e-2,3e-2,1e-1")
    p.add_argument("--factors", default="1,0.2", help="of the schemes' own temperatures")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--users", type=int, default=8)
    p.add_argument("--rows", type=int, default=32, help="of a user to train on; every other has half")
    p.add_argument("--trust", type=int, default=8, help="rows of a user that trust is measured on")
    p.add_argument("--tested", type=int, default=20, help="rows of a user that are reported on")
    p.add_argument("--reference", type=int, default=24, help="shared rows")
    p.add_argument("--characters", type=int, default=200, help="of each text of the writers")
    p.add_argument("--steps", type=int, default=48)
    p.add_argument("--alone", type=int, default=16)
    p.add_argument("--every", type=int, default=8)
    p.add_argument("--batch-size", type=int, default=4)
    p.add_argument("--quick", action="store_true", help="two users, a few steps, to see that it runs")
    a = p.parse_args(given)
    if a.quick:
        a.users, a.rows, a.trust, a.tested, a.seeds, a.rates = 4, 8, 4, 4, 2, "3e-3"
        a.factors = "1"
        a.steps, a.alone, a.every = 6, 2, 2
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for name in a.only.split(",") if a.only else SETTINGS:
        study(name, a)


if __name__ == "__main__":
    main()
