r"""A language model on another base, from what the source writes.

By *text*, the source goes on from each input at temperature 1, with probabilities averaged over its posterior
at every token, and the student learns what was written. This is maximum likelihood under the source, so it
goes to the least KL divergence from it, and works between any two tokenizers. By *logits*, for one and the
same tokenizer, the student learns the source's whole distribution at each of those tokens instead:

.. math:: L(\theta) = -\frac1T \sum_t \sum_{v \in K_t} q_t(v) \log p_\theta(v \mid x, y_{<t})

:math:`K_t` are the most probable tokens and q their averaged probabilities, scaled to sum to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kilobayes import host, spec, tree
from kilobayes.distil.rows import Row
from kilobayes.errors import KilobayesError
from kilobayes.files import digest
from kilobayes.host.vocabulary import HiddenHead, check_output
from kilobayes.language import LanguageModel
from kilobayes.lm.energy import LanguageEnergy, forward, running
from kilobayes.models import fingerprint, load_causal
from kilobayes.options import Options
from kilobayes.posteriors import ask
from kilobayes.step import Nll
from kilobayes.tasks.lm import Language, TokenRows
from kilobayes.tasks.packing import IGNORED, Tokens
from kilobayes.tasks.text import Documents
from kilobayes.workflows.attach import attach, card_of, device_of
from kilobayes.workflows.language import FittedLanguage, row_nll, sampling
from kilobayes.workflows.learn import Watch, check_calibration, learn, writing

OBJECTIVES = ("text", "logits")
MOST = 128  # tokens of a distribution that are kept
Written = tuple[str, str, bool]  # what was given, what was written, whether it was cut before its end


def check(objective: str, teacher: Any = None, student: Any = None) -> None:
    """Refuse an objective that language models, or these two tokenizers, do not have.

    Raises:
        KilobayesError: an unknown one; ``logits`` where the tokenizers differ.
    """
    if objective not in OBJECTIVES:
        raise KilobayesError(
            f"a language model is not transferred by {objective!r}", f"known: {', '.join(OBJECTIVES)}"
        )
    if objective == "logits" and teacher is not None and not same_tokenizer(teacher, student):
        raise KilobayesError(
            "the tokenizers differ, so the source's probabilities are of other tokens",
            f"{len(teacher)} and {len(student)} entries",
            "take --objective text, which works between any two",
        )


def same_tokenizer(first: Any, second: Any) -> bool:
    """Whether two tokenizers have the same entries, special tokens, and way of cutting a text."""
    special = [(t.bos_token_id, t.eos_token_id) for t in (first, second)]
    same = first.get_vocab() == second.get_vocab() and special[0] == special[1]
    probe = "Once upon a time, there were 3 bears:\n\tthe smallest -- naïve! -- said “hello”."
    return same and first(probe)["input_ids"] == second(probe)["input_ids"]


def write(
    teacher: LanguageModel,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    completions: int = 1,
    seed: int = 0,
    batch_size: int = 32,
) -> list[Written]:
    """What the source writes after each input; what is empty is left out."""
    replies = teacher.generate(
        [row[0] for row in rows], max_new_tokens=max_new_tokens, temperature=temperature, alternatives=0,
        completions=completions, overlap=None, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    return [
        (row[0], done.text, done.generated.finish == "length")
        for row, reply in zip(rows, replies, strict=True)
        for done in reply.completions
        if done.text.strip()
    ]


def encode(task: Language, written: Sequence[Written]) -> Tokens:
    """Token rows of what was written; one that was cut does not teach that a text ends there."""
    found = task.encode(Documents("pairs", [(given, text) for given, text, _ in written]))
    labels = [
        [*row[:-1], IGNORED] if written[document][2] and row[-1] in task.end else row
        for row, document in zip(found.labels, found.documents, strict=True)
    ]
    return replace(found, labels=labels)


@dataclass(frozen=True, eq=False)
class Soft:
    """Distributions at n learned tokens, in the order of rows: tokens and probabilities ``(n, k)``."""

    tokens: Tensor
    probs: Tensor


@torch.inference_mode()
def distributions(teacher: LanguageModel, task: Language, tokens: Tokens, most: int = MOST) -> Soft:
    """The source's averaged probabilities at every learned token, the ``most`` largest of them.

    Args:
        task: of the tokenizer that both have.
    """
    theta = teacher.draws()
    members = 1 if theta is None else tree.size(theta)
    device = next(teacher.model.parameters()).device
    found: list[tuple[Tensor, Tensor]] = []
    with running(teacher.model) as head:
        if theta is not None:
            moved = {k: v.to(device) for k, v in theta.items()}
            host.install(teacher.model, host.build(teacher.model, moved))
        with host.outer(teacher.model, members):
            for rows in torch.arange(len(tokens)).split(16):
                hidden, _, _ = forward(teacher.model, head, task, tokens, rows, members)
                for part in hidden.split(256, dim=1):
                    scores = torch.stack([head.vocabulary.scores(each) for each in part])
                    if teacher.posterior is not None:
                        scores = ask.transform(teacher.posterior, teacher.state, scores)
                    probs = scores.softmax(dim=-1).mean(dim=0)
                    top = probs.topk(min(most, probs.shape[-1]), dim=-1)
                    found.append((top.indices.cpu(), top.values.cpu()))
    with torch.inference_mode(False):
        probs = torch.cat([p for _, p in found]).clone()
        return Soft(torch.cat([i for i, _ in found]).clone(), probs / probs.sum(dim=-1, keepdim=True))


def numbered(tokens: Tokens) -> Tokens:
    """The same rows, each label replaced by its number among all learned tokens."""
    count, labels = 0, []
    for row in tokens.labels:
        labels.append([IGNORED] * len(row))
        for at, label in enumerate(row):
            if label != IGNORED:
                labels[-1][at], count = count, count + 1
    return replace(tokens, labels=labels)


def soft_nll(head: HiddenHead, soft: Soft, per_row: float) -> Nll:
    """Rows' sums of cross entropies over ``per_row``, in nats ``(S, B)``, of labels that are numbers."""

    def nll(output: Any, labels: Tensor) -> Tensor:
        hidden = head.take()
        flat = labels.reshape(hidden.shape[:2])
        at = (flat != IGNORED).nonzero(as_tuple=True)
        which = flat[at].cpu()
        logs = head.vocabulary.scores(hidden[at]).log_softmax(dim=-1)
        each = -(soft.probs[which].to(logs) * logs.gather(-1, soft.tokens[which].to(logs.device))).sum(dim=-1)
        return each.new_zeros(len(hidden)).index_add(0, at[0], each).reshape(len(labels), -1) / per_row

    return nll


def transfer(
    options: Options,
    written: Sequence[Written],
    held: Sequence[Written] | None = None,
    *,
    teacher: LanguageModel | None = None,
    checkpoint: Path | None = None,
    watch: Watch | None = None,
) -> FittedLanguage:
    """A student of ``options``, trained on what the source wrote.

    Args:
        held: written texts that are not trained on, for posteriors that are fitted afterwards.
        teacher: by logits, whose distributions are learned; None learns the texts.
        checkpoint: file to keep the training state in, and to resume from if ``options.resume``.

    Raises:
        KilobayesError: as training; tokenizers that differ, by logits.
    """
    posterior = sampling(spec.posterior(options.posterior))
    check_calibration(posterior, options, held)
    base = load_causal(options.model, dtype=options.dtype, device=device_of(options.device))
    if teacher is not None:
        check("logits", teacher.tokenizer, base.tokenizer)
    print_ = fingerprint(base.model)
    task = Language(base.tokenizer, min(options.max_length, base.longest or options.max_length))
    tokens = encode(task, written)
    check_output(base.model, torch.tensor([tokens.ids[0]], device=next(base.model.parameters()).device))
    soft = None if teacher is None else distributions(teacher, task, tokens)
    model = attach(base, options)
    rows = digest([repr([list(w) for w in written])])
    apart, per_row = encode(task, held) if held else tokens, tokens.mean_counted
    energy = LanguageEnergy(model, task, apart, trained=tokens, per_row=per_row)
    if soft is None:
        data, within = TokenRows(task, tokens), writing(model, lambda head: row_nll(head, per_row))
    else:
        data = TokenRows(task, numbered(tokens))
        within = writing(model, lambda head: soft_nll(head, soft, per_row))
    done = learn(
        model, base, data, within, posterior, options, energy,
        about={"base": print_, "rows": rows, "soft": soft is not None}, checkpoint=checkpoint, watch=watch,
    )  # fmt: skip
    card = card_of(options, model, posterior, print_, task.max_length)
    return FittedLanguage(model, task, posterior, done.state, card, tokens, done.trained, done.cost)
