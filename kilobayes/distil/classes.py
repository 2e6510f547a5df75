r"""A classifier on another base, from what the source says of inputs.

The source's predictive, averaged over its posterior, is what the student learns, so it learns doubt as well:

.. math:: L(\theta) = -\frac1N \sum_n \sum_c q_n(c) \log p_\theta(c \mid x_n), \qquad
          q_n = \frac1S \sum_s p_{\theta_s}(\cdot \mid x_n)

With hard labels, as in Trans-LoRA (arXiv:2405.17258), q is one at the source's most probable class.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilobayes import host, spec
from kilobayes.distil.rows import Row, to_examples
from kilobayes.energy import ModelEnergy
from kilobayes.errors import KilobayesError
from kilobayes.options import Options
from kilobayes.random import generator
from kilobayes.step import Nll
from kilobayes.tasks.classify import Encoded
from kilobayes.tasks.protocol import Task
from kilobayes.workflows.attach import attach, card_of, device_of
from kilobayes.workflows.finetune import Fitted, fingerprint_of
from kilobayes.workflows.kinds import kind_of
from kilobayes.workflows.learn import Watch, check_calibration, choosing, learn

OBJECTIVES = ("probabilities", "text")


def targets(teacher: Fitted, rows: Sequence[Row], objective: str = "probabilities") -> Tensor:
    """What the student learns of each input ``(N, C)``: the averaged probabilities, or ones at the top.

    Raises:
        KilobayesError: an objective that classes do not have, or inputs of another kind than the source's.
    """
    check(objective)
    probs = teacher.predict(to_examples(rows)).probs
    if objective == "text":
        return torch.nn.functional.one_hot(probs.argmax(dim=-1), probs.shape[-1]).to(probs)
    return probs


def check(objective: str) -> None:
    """Refuse an objective that a classifier does not have."""
    if objective not in OBJECTIVES:
        raise KilobayesError(
            f"a classifier is not transferred by {objective!r}", f"known: {', '.join(OBJECTIVES)}",
            "averaged probabilities say all that its scores do",
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class SoftRows:
    """Encoded rows with the probabilities ``(N, C)`` to learn, as the training loop asks for them."""

    task: Task
    encoded: Encoded
    probs: Tensor

    def __len__(self) -> int:
        return len(self.encoded)

    def batch(self, rows: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        return self.task.collate(self.encoded, rows), self.probs[rows].float()


def soft_nll(task: Task) -> Nll:
    """Cross entropy to probabilities that come as ``(S, B C)``, in nats ``(S, B)``."""

    def nll(output: Any, labels: Tensor) -> Tensor:
        members, classes = len(labels), len(task.classes)
        scores = host.check_rows(task.readout(output), members, labels.shape[1] // classes)
        return -(labels.reshape(scores.shape) * scores.log_softmax(dim=-1)).sum(dim=-1)

    return nll


def transfer(
    options: Options,
    rows: Sequence[Row],
    probs: Tensor,
    classes: Sequence[str],
    held: tuple[Sequence[Row], Tensor] | None = None,
    *,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> Fitted:
    """A student of ``options``: its adapter trained on inputs and :func:`targets`, its posterior fitted.

    Where a posterior asks for labels, such as a temperature of the rows held out, they are drawn from the
    source's probabilities, so that it becomes as sure as the source and not surer.

    Args:
        held: inputs and probabilities that are not trained on.
        checkpoint: file to keep the training state in, and to resume from if ``options.resume``.

    Raises:
        KilobayesError: as training; a posterior that needs rows held out and gets none.
    """
    posterior = spec.posterior(options.posterior)
    check_calibration(posterior, options, held)
    kind = kind_of("classify")
    base = kind.load(options.model, classes, options.dtype, device_of(options.device))
    print_ = fingerprint_of(base)
    model = attach(base, options)
    task = kind.make(base, classes, min(options.max_length, base.longest or options.max_length), None)

    def encoded(some: Sequence[Row], soft: Tensor, stream: int) -> Encoded:
        drawn = torch.multinomial(soft, 1, generator=generator(options.seed, stream))[:, 0]
        return task.encode(to_examples(some, classes, drawn.tolist()))

    own = encoded(rows, probs, 11)
    energy = ModelEnergy(model, task, own if held is None else encoded(*held, 12), trained=own)
    done = learn(
        model, base, SoftRows(task, own, probs), choosing(model, task, soft_nll(task)), posterior, options,
        energy, about={"base": print_, "rows": _digest(rows, probs)}, checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
    about = {"classes": list(classes), "paired": len(rows[0]) == 2}
    card = card_of(options, model, posterior, print_, task.max_length, **about)
    return Fitted(model, task, posterior, done.state, card, own.truncated, done.trained, done.cost)


def agreement(student: Fitted, rows: Sequence[Row], probs: Tensor) -> dict[str, float]:
    """How far the student says what the source said of some inputs: the same class, and nats between them."""
    theirs = student.predict(to_examples(rows)).probs.clamp(min=1e-12)
    apart = (torch.special.xlogy(probs, probs) - probs * theirs.log()).sum(dim=-1)
    same = (theirs.argmax(dim=-1) == probs.argmax(dim=-1)).double()
    return {"same": float(same.mean()), "divergence_nats": float(apart.mean()), "rows": len(rows)}


def told(probs: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What the source's answers are like: its mean confidence, entropy in nats, and how often each class."""
    counts = np.bincount(probs.argmax(dim=-1).numpy(), minlength=len(classes))
    return {
        "confidence": float(probs.max(dim=-1).values.mean()),
        "entropy_nats": float(torch.special.entr(probs).sum(dim=-1).mean()),
        "classes": {name: int(count) for name, count in zip(classes, counts, strict=True)},
    }


def _digest(rows: Sequence[Row], probs: Tensor) -> str:
    found = hashlib.sha256("\x1e".join("\x1f".join(row) for row in rows).encode())
    found.update(probs.double().contiguous().numpy().tobytes())
    return found.hexdigest()
