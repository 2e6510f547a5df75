"""The ``outer`` pairing: every row to every member, with the deterministic prefix computed once.

Below the first adapted block all members agree, so these blocks see the B rows of the batch; at the first adapted
block the hidden state is repeated S times, member by member, and the output has S B rows. The ``zip`` pairing needs
no code: block s of the rows simply goes to member s.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kilobayes.host.stack import base_of, layers


def repeat(value: Any, rows: int, stack: int) -> Any:
    """Tensors with ``rows`` rows repeated ``stack`` times, member by member; containers likewise, others as they are."""
    if isinstance(value, Tensor):
        if value.dim() and value.shape[0] == rows:
            return value.unsqueeze(0).expand(stack, *value.shape).flatten(0, 1)
        return value
    if type(value) in (list, tuple):
        return type(value)(repeat(v, rows, stack) for v in value)
    if type(value) is dict:
        return {k: repeat(v, rows, stack) for k, v in value.items()}
    return value


def adapted_blocks(model: nn.Module) -> list[nn.Module]:
    """The model's blocks from the first adapted one on, or [] where there is no single list of blocks around them."""
    base = base_of(model)
    lists: dict[str, list[int]] = {}
    for site in layers(model):
        parts = site.split(".")
        at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        if at is None:
            return []
        lists.setdefault(".".join(parts[:at]), []).append(int(parts[at]))
    if len(lists) != 1:
        return []
    (path, indices), = lists.items()
    holder = base.get_submodule(path)
    return list(holder)[min(indices) :] if isinstance(holder, nn.ModuleList) else []


@contextmanager
def outer(model: nn.Module, stack: int, share_prefix: bool = True) -> Iterator[None]:
    """Within it, a forward of B rows returns S B rows, member by member: ``logits.reshape(S, B, ...)``.

    Args:
        model: a hosted model whose installed or stored stack has ``stack`` members.
        share_prefix: False repeats the inputs at the top instead. Needed where the model itself indexes the batch
            after its blocks, as decoders do for sequence classification; they are recognised and repeated at the top.
    """
    base = base_of(model)
    blocks = adapted_blocks(model) if share_prefix and not _indexes_rows(base) else []
    seen: dict[str, int] = {}
    handles = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        seen["rows"] = _rows(args, kwargs)
        if not blocks:
            args, kwargs = repeat(args, seen["rows"], stack), repeat(kwargs, seen["rows"], stack)
        return args, kwargs

    def at_block(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # Later blocks get the S B rows of the one before, but masks and positions of B rows from the model's loop.
        return repeat(args, seen["rows"], stack), repeat(kwargs, seen["rows"], stack)

    if stack > 1:
        handles.append(base.register_forward_pre_hook(enter, with_kwargs=True))
        handles += [block.register_forward_pre_hook(at_block, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(args: tuple, kwargs: dict) -> int:
    first = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
    if first is None:
        raise ValueError("the forward got no tensor to count rows of")
    return first.shape[0]


def _indexes_rows(base: nn.Module) -> bool:
    """Whether the model picks rows itself after its blocks: decoders do, to find the last token of a sequence."""
    head = next((name for name in ("score",) if hasattr(base, name)), None)
    return head is not None


@contextmanager
def read_token(model: nn.Module) -> Iterator[None]:
    """Within it, BERT-like encoders run the token-wise half of their last block for the first token only.

    A classifier reads that token alone, so the logits are unchanged; hidden states of other tokens do not exist.
    Other architectures are left as they are.
    """
    last = _last_self_output(base_of(model))
    if last is None:
        yield
        return

    def first_token(module: nn.Module, args: tuple) -> tuple:
        return tuple(a[:, :1] if isinstance(a, Tensor) and a.dim() == 3 else a for a in args)

    handle = last.register_forward_pre_hook(first_token)
    try:
        yield
    finally:
        handle.remove()


def _last_self_output(base: nn.Module) -> nn.Module | None:
    """``attention.output`` of the last block, if the model classifies from its first token as BERT does."""
    kind = type(base).__name__
    if kind not in ("BertForSequenceClassification", "RobertaForSequenceClassification"):
        return None
    encoder = base.get_submodule(base.base_model_prefix).get_submodule("encoder.layer")  # type: ignore[arg-type]
    assert isinstance(encoder, nn.ModuleList)
    return encoder[-1].get_submodule("attention.output")


def check_rows(logits: Tensor, stack: int, rows: int) -> Tensor:
    """Logits ``(S B, ...)`` as ``(S, B, ...)``.

    Raises:
        RuntimeError: the model dropped or reordered rows, so members cannot be told apart.
    """
    if logits.shape[0] != stack * rows:
        raise RuntimeError(
            f"the model returned {logits.shape[0]} rows for {stack} members of {rows}; it indexes the batch itself. "
            "Use outer(model, stack, share_prefix=False)"
        )
    return logits.reshape(stack, rows, *logits.shape[1:])


