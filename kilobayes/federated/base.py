"""The base with its adapter as a server has it: to mix what users send, without any data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from kilobayes import tree
from kilobayes.collaboration import rounds
from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.models import fingerprint, load_causal
from kilobayes.options import Options
from kilobayes.workflows.attach import attach, device_of, start
from kilobayes.workflows.finetune import fingerprint_of
from kilobayes.workflows.kinds import kind_of


@dataclass(frozen=True, eq=False)
class Hosted:
    """A base with an adapter.

    Attributes:
        like: shapes of a user's update.
        outputs: classes, or words of the vocabulary.
    """

    model: nn.Module
    like: rounds.Shapes
    fingerprint: str
    outputs: int


def hosted(options: Options, together: Together, classes: Sequence[str] | None) -> Hosted:
    """The base model of a collaboration.

    Raises:
        KilobayesError: no classes where some are learned; as loading does.
    """
    device = device_of(options.device)
    if options.task == "lm":
        base = load_causal(options.model, dtype=options.dtype, device=device)
        print_ = fingerprint(base.model)
    elif classes is None:
        raise KilobayesError(
            "a server sees no data, so no classes", "none", "write them, as in classes: no,yes"
        )
    else:
        base = kind_of(options.task).load(options.model, classes, options.dtype, device)
        print_ = fingerprint_of(base)
    bare: Any = base.model
    outputs = len(classes or ()) if options.task == "classify" else int(bare.config.vocab_size)
    model = attach(base, options)
    leaves = tree.plain(start(model, base, [options.seed]))
    like = rounds.shapes(leaves)
    if together.share == "moments":
        like |= {f"{k}{end}": v for k, v in like.items() for end in (rounds.MEAN, rounds.VARIANCE)}
    return Hosted(model, like, print_, outputs)
