"""A collaboration in one process: users trained as one stack, rounds of trust and averages, a run for each.

The folder holds ``collaborate.yaml``, ``rounds.jsonl`` (a line a round: W, bytes, losses, who was left out),
``trust.svg``, ``metrics.json``, ``README.md`` and ``users/NAME``, each a run. A killed collaboration goes on
with ``resume`` to the same result.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilobayes import tree
from kilobayes.collaboration import rounds, updates
from kilobayes.collaboration.party import Party, gather
from kilobayes.collaboration.scheme import Scheme
from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_lines, write_text_atomically
from kilobayes.model_files import model_folder
from kilobayes.options import Options
from kilobayes.types import Params
from kilobayes.workflows import users
from kilobayes.workflows.collaborate_page import heat_map, readme
from kilobayes.workflows.evaluate import command, versions
from kilobayes.workflows.folder import place


@dataclass(frozen=True, eq=False)
class Collaborated:
    """A collaboration that is on disk.

    Attributes:
        folder: of it; ``users/NAME`` in it are runs.
        names: the users.
        trust: W of every round ``(rounds, U, U)``.
        figures: of each user on its own test rows: "nll" (nats a row, or token), "accuracy", and of language
            models "perplexity" and "bits_per_byte".
        rounds: the lines of ``rounds.jsonl``.
    """

    folder: Path
    names: tuple[str, ...]
    trust: Tensor
    figures: list[dict[str, float]]
    rounds: list[dict[str, Any]]

    @property
    def worst(self) -> str:
        """The user of the highest negative log-likelihood."""
        return max(zip(self.figures, self.names, strict=True), key=lambda pair: pair[0]["nll"])[1]


def collaborate(
    options: Options,
    together: Together,
    people: str | Path | Mapping[str, Any],
    *,
    watch: Callable[..., None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Collaborated:
    """Train users together, each to a model of its own.

    Args:
        people: a folder with a folder or file of data for each user, or data by user.
        watch: called after each optimiser step.
        say: told of each stage in a line.

    Raises:
        KilobayesError: wrong settings or data; a folder that holds something else, or this one finished.
    """
    found = users.listed(people)
    kinds = kinds_of(together, list(found))
    folder = Path(options.out or "runs/collaboration")
    if (folder / "README.md").exists():
        raise KilobayesError(f"{folder} holds a finished collaboration", remedy="name another with --out")
    if (folder / "checkpoints").exists() and not options.resume:
        raise KilobayesError(
            f"{folder} holds an unfinished run",
            "checkpoints",
            f"kilobayes collaborate --resume --out {folder}",
        )
    options = place(replace(options, out=str(folder)))
    model_folder(options.model)
    party = gather(options, together, found, folder, watch=watch, say=say)
    counts = ", ".join(f"{name} {count}" for name, count in zip(party.names, party.rows, strict=True))
    say(f"{len(found)} users, {together.scheme}, training rows: {counts}; run {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    where = {name: source if isinstance(source, str) else "" for name, source in found.items()}
    write_settings(folder / "collaborate.yaml", options, together, where)
    write_json(folder / "env.json", versions() | {"command": command()})
    lines = run(party, together, folder / "rounds.jsonl", kinds, say)
    say("testing")
    figures = party.test()
    sizes = party.save([folder / "users" / name for name in party.names])
    trust = torch.tensor([line["trust"] for line in lines], dtype=torch.float64)
    done = Collaborated(folder, party.names, trust, figures, lines)
    write_json(folder / "metrics.json", {
        "scheme": together.scheme, "users": dict(zip(party.names, figures, strict=True)), "worst": done.worst,
        "rows": dict(zip(party.names, party.rows, strict=True)), "sizes": sizes,
    })  # fmt: skip
    heat_map(folder / "trust.svg", trust[-1], party.names, together.scheme)
    write_text_atomically(folder / "README.md", readme(done, options, together, party.rows))  # the last file
    return done


def run(
    party: Party,
    together: Together,
    path: Path | None = None,
    kinds: Tensor | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """All rounds that are not done yet; returns the lines of all.

    Args:
        path: of ``rounds.jsonl``.
        kinds: of users, for the oracle.
    """
    scheme = Scheme(together.scheme, together.temperature, together.top)
    lines: list[dict[str, Any]] = []
    if path is not None and path.exists() and party.step:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for step in rounds.exchanges(together.steps, together.warmup_steps, together.every):
        if step < party.step or step == party.adopted:
            continue
        sent = party.train(step)
        mixed, line = exchange(party, scheme, sent, together.average, kinds)
        before = max((old["step"] for old in lines if old["step"] < step), default=0)
        losses = party.training_losses[before:step].nanmean(dim=0).tolist()
        line = {"step": step} | line | {"loss": [None if v != v else round(v, 6) for v in losses]}
        lines = [*(old for old in lines if old["step"] < step), line]
        if path is not None:
            write_lines(path, lines)
        party.adopt(mixed)
        for name, why in line["refused"].items():
            say(f"note: step {step}: {name} was left out: {why}")
    return lines


def exchange(
    party: Party, scheme: Scheme, sent: Params, how: str, kinds: Tensor | None = None
) -> tuple[Params, dict[str, Any]]:
    """One round among the users of a party: their next updates ``(U, ...)``, and its line."""
    asked = rounds.by_user(sent, party.names, party.alive)
    good = rounds.accept(asked, rounds.shapes(party.start if party.together.share == "mean" else sent))
    here = torch.tensor([party.names.index(name) for name in good.names], dtype=torch.int64)
    evidence, predicted = None, 0
    if scheme.needs == "kinds" and kinds is not None:
        evidence = kinds[here]
    elif scheme.needs == "gram":
        evidence = updates.gram(party.model, tree.plain(good.theta))
    elif scheme.needs == "predictions":
        found = party.predictions()
        evidence, predicted = found[here], rounds.bytes_of(found[0])
    elif scheme.needs == "losses":
        evidence = party.losses(sent)[here][:, here]
    rows = [party.rows[i] for i in here.tolist()]
    trust = scheme.trust(evidence, rows)
    mixed = rounds.mix(party.model, good.theta, trust, how)
    theta = {key: value.clone() for key, value in sent.items()}
    for key, value in mixed.theta.items():
        theta[key][here] = value.to(theta[key])
    each = rounds.bytes_of(tree.member(sent, 0))
    up, down = (0, 0) if scheme.name == "local" else rounds.traffic(scheme.needs, each, len(rows), predicted)
    refused = {n: why if party.alive[party.names.index(n)] else "diverged" for n, why in good.refused.items()}
    whole = rounds.everyone(trust, good.names, party.names)
    present = [name in good.names for name in party.names]
    return theta, {
        "trust": [[round(x, 6) for x in row] for row in whole.tolist()],
        "average": mixed.how,
        "lost": round(float(mixed.lost.max()), 6),
        "up_bytes": [up * p for p in present],
        "down_bytes": [down * p for p in present],
        "refused": refused,
    }


def kinds_of(together: Together, names: list[str]) -> Tensor | None:
    """The kind of each user as a number ``(U,)``; None where none are named.

    Raises:
        KilobayesError: another number of words than users.
    """
    if not together.kinds:
        return None
    words = [word.strip() for word in together.kinds.split(",")]
    if len(words) != len(names):
        raise KilobayesError(
            f"{len(names)} users need {len(names)} kinds",
            f"found {len(words)}: {together.kinds:.60}",
            f"in the order {', '.join(names)}",
        )
    order = list(dict.fromkeys(words))
    return torch.tensor([order.index(word) for word in words])


def write_settings(path: Path, options: Options, together: Together, people: Mapping[str, str]) -> None:
    """The resolved settings, a key a line, so that they repeat the collaboration."""
    import yaml

    from kilobayes.collaboration.settings import APART

    kept = {k: v for k, v in dataclasses.asdict(options).items() if k not in (*APART, "resume")}
    whole = {"users": dict(people)} | dataclasses.asdict(together) | kept
    write_text_atomically(path, yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))
