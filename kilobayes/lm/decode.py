r"""Generation under a posterior: at every position the probabilities of S draws are averaged.

.. math:: p(x_t \mid x_{<t}) = \frac1S \sum_s \text{softmax}(z_s(x_{<t}))_{x_t}, \qquad
          I = H[p] - \frac1S \sum_s H[p_s]

All members see the same text, so a step is one forward of S B rows over a cache of keys and values. Blocks
below the first adapted one are computed and cached once, with B rows, whatever S is. Entropies are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes import host, tree
from kilobayes.errors import KilobayesError
from kilobayes.host.cache import Members, accepts
from kilobayes.lm.generated import Generated, Step
from kilobayes.lm.sampling import Sampling, pick
from kilobayes.modes import evaluation
from kilobayes.types import Params

CACHED_TOKENS = 1 << 16  # 0.5 GB of keys and values in a model of 12 layers and width 512
Generators = torch.Generator | Sequence[torch.Generator]


@torch.inference_mode()
def steps(
    model: nn.Module,
    theta: Params | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    *,
    gen: Generators | None = None,
    completions: int = 1,
    stop_ids: Collection[int] = (),
    stopped: Callable[[list[int]], bool] | None = None,
    transform: Callable[[Tensor], Tensor] | None = None,
    longest: int | None = None,
    cached_tokens: int = CACHED_TOKENS,
) -> Iterator[Step]:
    """Generates position by position; until the iterator ends or is closed the model is in use.

    Args:
        model: a causal language model, hosted or, with ``theta`` None, any.
        theta: draws ``(S, ...)``.
        input_ids, attention_mask: prompts ``(B, T)``, padded to the left.
        gen: one generator, which draws a number for each running sequence at every position, or one for each
            sequence, whose text then depends on no other. Unused at temperature 0.
        completions: sequences of each prompt, row b's being b n to b n + n - 1; the prompt is read once.
        stop_ids: tokens that end a sequence.
        stopped: whether the tokens written so far end a sequence.
        transform: of scores ``(S, R, V)``, such as a temperature's.
        longest: tokens that the model takes, prompt included.
        cached_tokens: sequences x members x tokens held at once; more draws are taken in turns.

    Raises:
        KilobayesError: prompts that are empty, too long or padded to the right; no generator to sample from;
            a model whose cache is not made of keys and values.
    """
    lengths = _checked(input_ids, attention_mask, longest)
    count = len(input_ids) * completions
    if sampling.temperature > 0 and gen is None:
        raise KilobayesError("sampling needs a generator", "temperature above 0", "gen=torch.Generator()")
    device = next(model.parameters()).device
    members = 1 if theta is None else tree.size(theta)
    room = cached_tokens // (count * (input_ids.shape[1] + sampling.max_new_tokens))
    chunk = max(1, min(members, room))
    with ExitStack() as stack:
        stack.enter_context(evaluation(model))
        stack.enter_context(host.packed(model, next(model.parameters()).dtype, backward=False))
        parts = [
            Members(model, None if theta is None else _part(theta, first, chunk))
            for first in range(0, members, chunk)
        ]
        if len(parts) == 1:  # made ready once
            stack.enter_context(parts[0].ready())
        mask = attention_mask.to(device)
        inputs = {"input_ids": input_ids.to(device), "attention_mask": mask}
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        rows = list(range(len(input_ids)))
        written: list[list[int]] = [[] for _ in range(count)]
        while True:
            if accepts(model, "position_ids"):
                inputs["position_ids"] = positions
            scores = parts[0](inputs) if len(parts) == 1 else torch.cat([_turn(p, inputs) for p in parts])
            kept = torch.arange(len(rows))
            if len(rows) < count and not written[0]:  # the prompts have been read, once for all completions
                kept, rows = kept.repeat_interleave(completions), list(range(count))
                scores = scores[:, kept.to(device)]
            if transform is not None:
                scores = transform(scores)
            step = choose(scores, rows, sampling, _uniform(gen, rows) if sampling.temperature else None)
            for at, row in enumerate(rows):
                written[row].append(step.tokens[at])
                full = lengths[row // completions] + len(written[row]) == longest
                if step.finish[at]:
                    continue
                if step.tokens[at] in stop_ids or (stopped is not None and stopped(written[row])):
                    step.finish[at] = "stop"
                elif full or len(written[row]) == sampling.max_new_tokens:
                    step.finish[at] = "length"
            yield step
            going = torch.tensor([at for at, finish in enumerate(step.finish) if not finish])
            if not len(going):
                return
            moved = kept[going].to(device)
            if len(moved) != len(mask) or len(set(kept.tolist())) != len(kept):
                for part in parts:
                    part.keep(moved)
            rows = [rows[at] for at in going.tolist()]
            tokens = torch.tensor([step.tokens[at] for at in going.tolist()], device=device)
            mask = torch.cat([mask[moved], mask.new_ones(len(going), 1)], dim=1)
            inputs = {"input_ids": tokens[:, None], "attention_mask": mask}
            positions = positions[moved, -1:] + 1


def generate(
    model: nn.Module,
    theta: Params | None,
    input_ids: Tensor,
    attention_mask: Tensor,
    sampling: Sampling,
    **options: Any,
) -> list[Generated]:
    """Sequences of every prompt in order, ``completions`` of each; arguments as of :func:`steps`."""
    out = [Generated() for _ in range(len(input_ids) * options.get("completions", 1))]
    for step in steps(model, theta, input_ids, attention_mask, sampling, **options):
        for at, row in enumerate(step.rows):
            out[row].add(step, at)
    return out


def averaged(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Averaged probabilities ``(R, V)``, their entropy and the mutual information ``(R,)``, float32, nats.

    Args:
        scores: ``(S, R, V)``.
    """
    each = scores.float().softmax(dim=-1)
    probs = each.mean(dim=0) if len(each) > 1 else each[0]
    entropy = torch.special.entr(probs).sum(dim=-1)
    if len(each) == 1:
        return probs, entropy, torch.zeros_like(entropy)
    own = torch.special.entr(each).sum(dim=-1).mean(dim=0)
    return probs, entropy, (entropy - own).clamp(min=0.0)


def _turn(part: Members, inputs: dict[str, Tensor]) -> Tensor:
    with part.ready():
        return part(inputs)


def choose(scores: Tensor, rows: list[int], sampling: Sampling, uniform: Tensor | None) -> Step:
    """The next token of each row, of scores ``(S, R, V)``, and what is reported of it."""
    probs, entropy, information = averaged(scores)
    tokens = pick(probs, sampling, probs.new_zeros(len(rows)) if uniform is None else uniform)
    chosen = probs.gather(1, tokens[:, None])[:, 0].log()
    top = probs.topk(min(sampling.alternatives, probs.shape[-1]), dim=-1)
    doubtful = torch.zeros(len(rows), dtype=torch.bool, device=probs.device)
    if sampling.stop_entropy is not None:
        doubtful |= entropy > sampling.stop_entropy
    if sampling.stop_information is not None:
        doubtful |= information > sampling.stop_information
    return Step(
        rows, tokens.tolist(), chosen.tolist(), entropy.tolist(), information.tolist(),
        top.indices.tolist(), top.values.tolist(), ["uncertain" if d else "" for d in doubtful.tolist()],
    )  # fmt: skip


def _uniform(gen: Generators | None, rows: list[int]) -> Tensor:
    """A number in [0, 1) for each running sequence, drawn on the CPU."""
    if isinstance(gen, torch.Generator):
        return torch.rand(len(rows), generator=gen, dtype=torch.float64)
    assert gen is not None
    return torch.cat([torch.rand(1, generator=gen[row], dtype=torch.float64) for row in rows])


def _part(theta: Params, first: int, count: int) -> Params:
    return {key: value[first : first + count] for key, value in theta.items()}


def _checked(input_ids: Tensor, mask: Tensor, longest: int | None) -> list[int]:
    """Tokens of each prompt."""
    if input_ids.dim() != 2 or mask.shape != input_ids.shape or not len(input_ids):
        raise KilobayesError(
            "prompts are token ids and a mask of one shape (B, T)",
            f"found {tuple(input_ids.shape)} and {tuple(mask.shape)}",
        )
    lengths = mask.sum(dim=1).tolist()
    if not all(lengths):
        raise KilobayesError(
            f"prompt {lengths.index(0) + 1} is empty", "no token to go on from", "give it a text"
        )
    if not bool(mask[:, -1].all()):
        raise KilobayesError("prompts must be padded to the left", 'found padding at the end',
                             'tokenizer.padding_side = "left"')  # fmt: skip
    if longest is not None and max(lengths) >= longest:
        at = lengths.index(max(lengths))
        raise KilobayesError(
            f"prompt {at + 1} has {lengths[at]} tokens", f"the model takes {longest}, with the answer",
            "shorten it",
        )  # fmt: skip
    return lengths
