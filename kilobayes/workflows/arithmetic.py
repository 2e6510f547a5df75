"""Sums of runs: averages, interpolations, task vectors (Ilharco et al., arXiv:2212.04089) of adapters.

The base stays, so an adapter's update is its task vector, and a sum of runs has the sum of their updates.
Leaves are summed where that sums the updates (up to :data:`kilobayes.collaboration.updates.EXACT`); elsewhere
the updates themselves are, as one LoRA, whose rank is the sum of the ranks unless it is said.

Heads are maps, not updates: they are summed with coefficients divided by their sum, or are one run's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kilobayes import gauge, host, store, sums, tree
from kilobayes.collaboration import updates
from kilobayes.errors import KilobayesError
from kilobayes.files import write_json, write_text_atomically
from kilobayes.posteriors import Ensemble, Point
from kilobayes.posteriors.point import PointState
from kilobayes.types import LowRank, Params, Posterior
from kilobayes.workflows import addends
from kilobayes.workflows.addends import Addend
from kilobayes.workflows.evaluate import command, versions

POSTERIORS = ("auto", "point", "samples")


@dataclass(frozen=True, eq=False)
class Summed:
    """A sum of runs.

    Attributes:
        how: "leaves" or "updates".
        lost: distance of the updates to the exact sum over its norm; of draws, the largest.
        notes: what a person should know.
    """

    model: nn.Module
    posterior: Posterior
    state: Any
    card: store.Card
    how: str
    lost: float
    notes: list[str]


def write(summed: Summed, folder: Path, terms: Mapping[str, float], head: str = "") -> dict[str, int]:
    """A folder that is a run, with ``arithmetic.json`` to say of what; returns bytes by part."""
    sizes = store.save(folder, summed.model, summed.posterior, summed.state, summed.card)
    told = {"terms": dict(terms), "head": head, "how": summed.how, "lost": summed.lost, "notes": summed.notes}
    write_json(folder / "arithmetic.json", told)
    source = Path(head or next(iter(terms))) / "run.yaml"
    if source.exists():  # the columns that it was trained on
        shutil.copyfile(source, folder / "run.yaml")
    stored = float(sizes["checkpoint"] + sizes["posterior"])
    write_json(folder / "cost.json", {"stored_bytes": stored, "sizes": sizes})
    write_json(folder / "env.json", versions() | {"command": command()})
    sum_ = " ".join(f"{weight:+g}*{name}" for name, weight in terms.items())
    write_text_atomically(
        folder / "README.md",
        f"# {sum_}\n\nMade by `kilobayes arithmetic`: a sum of {summed.how}, {summed.lost:.2%} of its norm "
        "lost.\n"
        "What it predicts is not measured yet: `kilobayes evaluate` does, on labelled rows.\n",
    )
    return sizes


def combine(
    terms: Mapping[str, float],
    *,
    how: str = "auto",
    rank: int | None = None,
    head: str = "",
    posterior: str = "auto",
    samples: int | None = None,
    model: str | None = None,
    device: str = "auto",
) -> Summed:
    """The sum of runs with coefficients by folder.

    Args:
        how: "leaves", "updates", or "auto" for leaves where these give the same.
        rank: of a sum of updates; the best of it is kept.
        head: folder of the run whose head, classes and template are taken; "" for the mean of all.
        posterior: "point" sums the means, "samples" draws, "auto" SWAG's moments where all are SWAG and
            leaves are summed, means where all are points, and draws elsewhere.
        samples: draws that are summed; by default the first run's own.
        model: where the base is now.

    Raises:
        KilobayesError: runs that do not go together, and what :func:`kilobayes.collaboration.updates.factors`
            and :func:`kilobayes.sums.draws` refuse.
    """
    updates.check_way(how)
    if posterior not in POSTERIORS:
        raise KilobayesError(f"cannot sum posteriors by {posterior!r}", f"known: {', '.join(POSTERIORS)}")
    first, runs = addends.read(terms, head, model, device)
    lead = next(run.card for run in runs if not head or run.folder == head)
    weights = torch.tensor([[run.weight for run in runs]], dtype=torch.float64)
    leaves = _by_leaves(how, first, runs, weights)
    still = posterior == "point" or (
        posterior == "auto" and all(sums.still(r.posterior, r.state) for r in runs)
    )
    normal = [sums.gaussian(r.posterior, r.state) for r in runs] if leaves and posterior == "auto" else []
    moments = [found for found in normal if found is not None] if not still else []
    n = 0 if still or len(moments) == len(runs) else samples or lead.samples
    drawn = [run.weights(n, place) for place, run in enumerate(runs)]
    adapters = [
        {k: v for k, v in theta.items() if not _of_head(r.model, k)}
        for r, theta in zip(runs, drawn, strict=True)
    ]
    heads = _heads(runs, drawn)
    notes = ["Temperatures were left out; kilobayes calibrate fits one."] if _tempered(runs) else []
    target = first
    if leaves:
        theta = sums.total(
            adapters, [dict.fromkeys(a, r.weight) for a, r in zip(adapters, runs, strict=True)]
        )
        lost = _off(first, adapters, weights)
    else:
        found, lost = _summed(runs, drawn, weights, rank)
        target = addends.as_lora(first, lead, next(iter(found.values())).A.shape[1], model, device)
        theta = {f"{site}/A": f.A for site, f in found.items()} | {
            f"{site}/B": f.B for site, f in found.items()
        }
    made: Posterior = Ensemble(Point(), members=n) if n > 1 else Point()
    state: Any = PointState(theta | heads, {})
    if moments and not n:
        shares = [{k: r.share if _of_head(first, k) else r.weight for k in theta | heads} for r in runs]
        made, state = sums.moments(moments, shares)
    card = replace(
        lead, adapter=repr(host.method(target)), posterior=repr(made), samples=n or lead.samples,
        max_length=max(run.card.max_length for run in runs),
    )  # fmt: skip
    return Summed(target, made, state, card, "leaves" if leaves else "updates", lost, notes)


def _by_leaves(how: str, first: nn.Module, runs: Sequence[Addend], weights: Tensor) -> bool:
    """Whether leaves are summed."""
    alike = len({run.card.adapter for run in runs}) == 1
    if how == "leaves" and not alike:
        found = ", ".join(sorted({run.card.adapter for run in runs}))
        raise KilobayesError("leaves of different adapters have no sum", found, "take --how updates")
    if how != "auto" or not alike:
        return how == "leaves"
    means = [tree.member(run.posterior.mean(run.state), 0) for run in runs]
    return _off(first, means, weights) <= updates.EXACT


def _off(model: nn.Module, stacks: Sequence[Params], weights: Tensor) -> float:
    """How far sums of the runs' first members' leaves are from the sum of their updates."""
    own = host.read(model)
    users: Params = {}
    for key, value in own.items():
        held = [s[key][:1].to(value.device) if not _of_head(model, key) else value[:1] for s in stacks]
        users[key] = torch.cat(held).detach()
    return float(updates.discrepancy(model, users, updates.mix(users, weights), weights))


def _summed(
    runs: Sequence[Addend], drawn: Sequence[Params], weights: Tensor, rank: int | None
) -> tuple[dict[str, gauge.Averaged], float]:
    """Factors of the summed updates by site, all of one rank, and the share of the norm that is lost."""
    each = [updates.factors(run.model, theta) for run, theta in zip(runs, drawn, strict=True)]
    sites = host.sites(runs[0].model)
    exact = max(min(sum(f[s.name].A.shape[1] for f in each), s.d_in, s.d_out) for s in sites)
    out: dict[str, gauge.Averaged] = {}
    apart = whole = torch.zeros((), dtype=torch.float64)
    for site in sites:
        a, b = _side_by_side([f[site.name] for f in each])
        parts = [gauge.average(x, y, weights, rank=rank or exact) for x, y in zip(a, b, strict=True)]
        sizes = [gauge.norm(*gauge.concatenated(x, y, weights)) for x, y in zip(a, b, strict=True)]
        lost, size = torch.cat([p.lost for p in parts]), torch.cat(sizes)
        out[site.name] = gauge.Averaged(
            torch.cat([p.A for p in parts]), torch.cat([p.B for p in parts]), lost
        )
        apart, whole = apart + (lost * size).square(), whole + size.square()
    return out, float((apart / whole.clamp(min=1e-300)).sqrt().max())


def _side_by_side(each: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """Factors of several runs by draw, zeros to fill up: ``(n, runs, r, d_in)``, ``(n, runs, d_out, r)``."""
    r = max(f.A.shape[1] for f in each)
    a = [pad(f.A.detach().cpu().float(), (0, 0, 0, r - f.A.shape[1])) for f in each]
    b = [pad(f.B.detach().cpu().float(), (0, r - f.B.shape[2])) for f in each]
    return torch.stack(a, dim=1), torch.stack(b, dim=1)


def _heads(runs: Sequence[Addend], drawn: Sequence[Params]) -> Params:
    """Summed heads; those without a share may be of other classes."""
    held = [
        (r, {k: v for k, v in theta.items() if _of_head(r.model, k)})
        for r, theta in zip(runs, drawn, strict=True)
        if r.share
    ]
    if not held:
        return {}
    return sums.total([h for _, h in held], [dict.fromkeys(h, r.share) for r, h in held])


def _of_head(model: nn.Module, key: str) -> bool:
    return tree.split_key(key)[0] in host.heads(model)


def _tempered(runs: Sequence[Addend]) -> bool:
    return any("Temperature(" in repr(run.posterior) for run in runs)
