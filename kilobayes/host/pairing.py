"""The ``outer`` pairing: every row to every member, with the deterministic prefix computed once.

Below the first adapted block all members agree, so these blocks see the B rows of the batch; at the first
adapted block the hidden state is repeated S times, member by member, and the output has S B rows. The ``zip``
pairing needs no code: block s of the rows simply goes to member s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kilobayes.errors import KilobayesError
from kilobayes.host.stack import base_of, heads, layers

# Tensors whose first axis is never the batch, though it may have as many entries.
NOT_ROWS = (
    "cache_position",
    "head_mask",
    "cross_attn_head_mask",
    "decoder_head_mask",
    "rel_embeddings",
    "relative_pos",
)


def _map_rows(value: Any, rows: int, fn: Callable[[Tensor], Tensor], least: int = 1) -> Any:
    """``fn`` of every tensor, in containers too, that has ``rows`` rows and at least ``least`` axes."""
    if isinstance(value, Tensor):
        return fn(value) if value.dim() >= least and value.shape[0] == rows else value
    if type(value) in (list, tuple):
        return type(value)(_map_rows(v, rows, fn, least) for v in value)
    if type(value) is dict:
        return {k: v if k in NOT_ROWS else _map_rows(v, rows, fn, least) for k, v in value.items()}
    return value


def repeat(value: Any, rows: int, stack: int, least: int = 1) -> Any:
    """Every tensor, in containers too, that has ``rows`` rows, repeated member by member."""

    def each(t: Tensor) -> Tensor:
        return t.unsqueeze(0).expand(stack, *t.shape).flatten(0, 1)

    return _map_rows(value, rows, each, least)


def shared_prefix(model: nn.Module) -> tuple[nn.Module, list[nn.Module]] | None:
    """The backbone and its blocks from the first adapted one on, or None where members cannot share a prefix.

    They can where all that is adapted lies in one list of blocks, each run once, or after it.
    Encoder-decoders have two lists; ALBERT runs one block many times.
    """
    base: Any = base_of(model)
    prefix = getattr(base, "base_model_prefix", "")
    backbone = getattr(base, prefix, base) if prefix else None
    config = getattr(base, "config", None)
    if backbone is None or config is None or getattr(config, "is_encoder_decoder", False):
        return None
    inside = f"{prefix}." if backbone is not base else ""
    lists: dict[str, list[int]] = {}
    for path in (*layers(model), *heads(model)):
        parts = path.split(".")
        at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
        if at is not None:
            lists.setdefault(".".join(parts[:at]), []).append(int(parts[at]))
        elif path.startswith(inside) and "pooler" not in parts:
            return None  # before or after the blocks, there is no telling
    if len(lists) != 1:
        return None
    ((path, indices),) = lists.items()
    holder = base.get_submodule(path)
    if not isinstance(holder, nn.ModuleList) or not path.startswith(inside):
        return None
    if len(holder) != getattr(config.get_text_config(), "num_hidden_layers", -1):
        return None
    # DeBERTa may add a convolution of the embeddings to what leaves its first block. BLOOM's biases have
    # rows times heads; the other two give what leaves the last block the shape of the token ids.
    if getattr(config, "conv_kernel_size", 0) or config.model_type in ("bloom", "gpt_bigcode", "openai-gpt"):
        return None
    if path.startswith(f"{inside}decoder."):  # OPT's language model calls its backbone's decoder itself
        backbone = backbone.decoder
    return backbone, list(holder)[min(indices) :]


@contextmanager
def outer(model: nn.Module, stack: int, share_prefix: bool = True) -> Iterator[None]:
    """Within it, a forward of B rows returns S B rows, member by member: ``logits.reshape(S, B, ...)``.

    The model around the blocks sees S B rows, so labels, losses and decoders that look for a row's last token
    work; the backbone below the first adapted block sees B. Leave it only after the backward of a
    checkpointed forward.

    Args:
        model: a hosted model whose installed or stored stack has ``stack`` members.
        share_prefix: False repeats at the top whatever the architecture; so it is where no prefix can be
            shared.
    """
    if stack == 1:
        yield
        return
    base = base_of(model)
    found = shared_prefix(model) if share_prefix else None
    handles = []

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rows = _rows(args, kwargs)
        return repeat(args, rows, stack), repeat(kwargs, rows, stack)

    def first_member(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rows = _rows(args, kwargs)
        return tuple(_map_rows([args, kwargs], rows, lambda t: t[: rows // stack]))  # type: ignore[return-value]

    def at_first(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        rows = _rows(args, kwargs)
        return repeat(args, rows, stack, least=2), repeat(kwargs, rows, stack, least=2)

    def at_later(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        # The hidden state of the block before has S B rows; masks and positions from the model's loop have B.
        rows = _rows(args, kwargs) // stack
        return repeat(args, rows, stack, least=2), repeat(kwargs, rows, stack, least=2)

    if found is None or found[0] is not base:
        handles.append(base.register_forward_pre_hook(enter, with_kwargs=True))
    if found is not None:
        backbone, blocks = found
        if backbone is not base:
            handles.append(backbone.register_forward_pre_hook(first_member, with_kwargs=True))
        for index, block in enumerate(blocks):
            hook = at_later if index else at_first
            handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(args: tuple, kwargs: dict) -> int:
    """Rows of the main input: the first tensor given, positions and the like aside."""
    named = [kwargs.get(k) for k in ("input_ids", "inputs_embeds", "hidden_states", "decoder_input_ids")]
    first = next((v for v in (*args, *named, *kwargs.values()) if isinstance(v, Tensor)), None)
    if first is None:
        raise KilobayesError(
            "the forward got no tensor to count rows of", remedy="pass input_ids or inputs_embeds"
        )
    return first.shape[0]


@contextmanager
def read_token(model: nn.Module) -> Iterator[None]:
    """Within it, BERT-like encoders run the token-wise half of their last block for the first token only.

    A classifier reads that token alone, so the logits are unchanged; hidden states of other tokens do not
    exist. Other architectures are left as they are.
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
    if kind not in (
        "BertForSequenceClassification",
        "RobertaForSequenceClassification",
        "XLMRobertaForSequenceClassification",
    ):
        return None
    encoder = base.get_submodule(base.base_model_prefix).get_submodule("encoder.layer")  # type: ignore[arg-type]
    assert isinstance(encoder, nn.ModuleList)
    return encoder[-1].get_submodule("attention.output")


def check_rows(logits: Tensor, stack: int, rows: int) -> Tensor:
    """Logits ``(S B, ...)`` as ``(S, B, ...)``.

    Raises:
        KilobayesError: the model dropped or repeated rows, so members cannot be told apart.
    """
    if logits.shape[0] != stack * rows:
        raise KilobayesError(
            f"the model returned {logits.shape[0]} rows for {stack} members of {rows}",
            remedy="use outer(model, stack, share_prefix=False), and check the size of the stack",
        )
    return logits.reshape(stack, rows, *logits.shape[1:])
