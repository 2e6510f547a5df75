"""Transfer between base models from Python; ``kilobayes transfer`` on the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kilobayes.api import load
from kilobayes.card import read_card
from kilobayes.options import Options, from_mapping
from kilobayes.workflows.discriminator import Discriminator
from kilobayes.workflows.discriminator import train_discriminator as _train
from kilobayes.workflows.transfer import Plan
from kilobayes.workflows.transfer import transfer as _transfer
from kilobayes.workflows.transfer_inputs import Making


def train_discriminator(
    run: str | Path,
    data: Any,
    out: str | Path = "",
    *,
    seeds: Any = None,
    unlabelled: Any = None,
    **more: Any,
) -> Discriminator:
    """What tells a run's real inputs from made-up ones, trained while its data is there.

    Args:
        more: fields of :class:`~kilobayes.workflows.transfer_inputs.Making`, such as ``generator`` or
            ``how``; of :class:`~kilobayes.options.Options`; and the others of
            :func:`kilobayes.workflows.discriminator.train_discriminator`.

    Raises:
        KilobayesError: as that.
    """
    making = making_of(more)
    return _train(run, data, out, seeds=seeds, unlabelled=unlabelled, making=making, **more)


def transfer(
    run: str | Path,
    to: str,
    out: str | Path,
    *,
    seeds: Any = None,
    unlabelled: Any = None,
    audit: Any = None,
    columns: dict[str, str | None] | None = None,
    **more: Any,
) -> Any:
    """A run on another base without the task's data, written to ``out`` and loaded.

    Args:
        to: the target base.
        seeds: a few real examples to start from.
        unlabelled: texts to make inputs from.
        audit: real rows that made-up inputs are compared with, for the report alone.
        columns: ``text_column`` and ``pair_column`` of ``unlabelled``.
        more: fields of :class:`~kilobayes.workflows.transfer.Plan`, such as ``discriminator`` or
            ``inputs``; of :class:`~kilobayes.workflows.transfer_inputs.Making`, such as ``generator``; and of
            :class:`~kilobayes.options.Options`, of the student, whose ``adapter``, ``posterior`` and longest
            row are the source's unless they are named.

    Raises:
        KilobayesError: as :func:`kilobayes.workflows.transfer.transfer`.
    """
    plan, options = planned(run, more | {"model": to, "out": str(out)})
    _transfer(plan, options, seeds=seeds, unlabelled=unlabelled, audit=audit, columns=columns)
    return load(out, model=to, device=options.device)


def making_of(given: dict[str, Any]) -> Making:
    """The fields of ``Making``, taken out of ``given``; the seed stays, for it is training's as well."""
    names = [f.name for f in dataclasses.fields(Making)]
    found = {k: given[k] for k in names if k in given}
    for name in set(found) - {"seed"}:
        given.pop(name)
    return Making(**found)


def planned(run: str | Path, given: Mapping[str, Any]) -> tuple[Plan, Options]:
    """Settings of one flat mapping, each where it belongs."""
    rest = dict(given)
    making = making_of(rest)
    names = {f.name for f in dataclasses.fields(Plan)} - {"run", "making"}
    plan = Plan(str(run), making, **{k: rest.pop(k) for k in names & set(rest)})
    card = read_card(Path(run), "")
    kept: dict[str, Any] = {
        "adapter": card.adapter,
        "posterior": card.posterior,
        "max_length": card.max_length,
    }
    kept |= {"samples": card.samples, "dtype": card.dtype}
    kept |= {"calibration": "0.2"} | from_mapping(rest, "the transfer")
    return plan, Options(**kept)
