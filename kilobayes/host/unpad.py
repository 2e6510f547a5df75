"""Run a model's blocks on real tokens only, padding inside attention alone.

Rows of a batch are padded to the longest of them, so a third to two thirds of the products in linear layers
may be for tokens that nothing reads. Within :func:`real_tokens` the hidden states ``(rows, T, d)`` are laid
out ``(groups, N, d)`` between the first and the last block: N tokens for each member of a stack, all of its
real ones and as many padded ones as make members equal. Linear layers, norms and activations are token-wise
and need not know; attention gets its rows back, and what it returns is laid out again. Nothing else in a
block may mix tokens, and its keyword arguments must reach the attention function: as in ``ARCHITECTURES``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kilobayes.host.kernels import eager
from kilobayes.host.layer import KilobayesLayer
from kilobayes.host.pairing import _last_self_output
from kilobayes.host.stack import base_of
from kilobayes.host.tokens import backbone, lay_out

ARCHITECTURES = (
    "bert", "distilbert", "gemma", "gemma2", "gemma3_text", "gpt2", "llama", "mistral", "opt", "phi", "phi3",
    "qwen2", "qwen3", "roberta", "xlm-roberta",
)  # fmt: skip
ATTENTION = ("sdpa", "eager")
PREFIX = "real_tokens|"
LEAST_PADDING = 0.08  # moving tokens to and fro takes about a twentieth of a pass


class _Take(torch.autograd.Function):
    """``x[index]`` for distinct indices; its derivative needs no sums, only :class:`_Put`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.rows = index, x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Put.apply(grads[0], ctx.index, ctx.rows), None


class _Put(torch.autograd.Function):
    """Rows put at distinct places of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.index = index
        return x.new_zeros(rows, *x.shape[1:]).index_copy_(0, index, x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(grads[0], ctx.index), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    return _Take.apply(x, index) if eager(x.device.type) else x[index]


def _put(x: Tensor, index: Tensor, rows: int) -> Tensor:
    if eager(x.device.type):
        return _Put.apply(x, index, rows)
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, index, x)


@dataclass(frozen=True, eq=False)
class Layout:
    """Which tokens of a padded batch are kept, and where.

    Attributes:
        index: ``(G, N)`` distinct positions in the flattened ``(rows, T)``, group by group.
        rows, length: of the padded batch.
    """

    index: Tensor
    rows: int
    length: int
    memory: dict[Any, Any] = field(default_factory=dict)

    def places(self, groups: int) -> Tensor:
        """Positions ``(groups N)``, where the batch is repeated as often as ``groups`` is more than G."""
        times = groups // len(self.index)
        if times not in self.memory:
            shift = torch.arange(times, device=self.index.device) * (self.rows * self.length)
            self.memory[times] = (self.index + shift.view(-1, 1, 1)).flatten()
        return self.memory[times]

    def fits(self, x: Any) -> bool:
        """Whether x is laid out so: ``(m G, N, ...)``."""
        groups, tokens = self.index.shape
        return isinstance(x, Tensor) and x.dim() > 2 and x.shape[1] == tokens and x.shape[0] % groups == 0

    def take(self, x: Tensor) -> Tensor:
        """``(m rows, T, ...)`` to ``(m G, N, ...)``."""
        groups = x.shape[0] // self.rows * len(self.index)
        return _take(x.flatten(0, 1), self.places(groups)).unflatten(0, (groups, self.index.shape[1]))

    def pad(self, x: Tensor) -> Tensor:
        """``(m G, N, ...)`` to ``(m rows, T, ...)``, zero where no token is kept."""
        rows = x.shape[0] // len(self.index) * self.rows
        flat = _put(x.flatten(0, 1), self.places(x.shape[0]), rows * self.length)
        return flat.unflatten(0, (rows, self.length))

    def positions(self, x: Tensor) -> Tensor:
        """What belongs to each position, ``(1 or rows, T, ...)``, laid out; the same for all blocks."""
        if id(x) not in self.memory:
            whole = x if x.shape[0] == self.rows else x[:1].expand(self.rows, *x.shape[1:])
            self.memory[id(x)] = (x, self.take(whole))  # x is kept, so that its id stays taken
        return self.memory[id(x)][1]


def layout_of(mask: Tensor, groups: int) -> Layout | None:
    """The layout of a padding mask ``(rows, T)``, or None where too little is padded."""
    rows, length = mask.shape
    kept = mask != 0
    kept[:, 0] = True  # encoders classify from it, whatever the mask says
    grouped = kept.view(groups, -1)
    tokens = int(grouped.sum(dim=1).max())
    if groups * tokens > (1.0 - LEAST_PADDING) * rows * length:
        return None
    order = grouped.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :tokens]
    first = torch.arange(groups, device=mask.device).unsqueeze(1) * (rows * length // groups)
    return Layout(order + first, rows, length)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    kind: str,
    real_tokens: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """transformers' attention function of that kind, on rows with their padding; ``(m G, H, N, D)`` in."""
    own = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    inner: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(kind, own)  # type: ignore[arg-type]
    if real_tokens is None:
        return inner(module, query, key, value, attention_mask, *args, **kwargs)
    padded = [real_tokens.pad(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value)]
    rows = padded[0].shape[0]
    if attention_mask is not None and attention_mask.shape[0] not in (1, rows):
        attention_mask = attention_mask.repeat(rows // attention_mask.shape[0], 1, 1, 1)
    out, weights = inner(module, *padded, attention_mask, *args, **kwargs)
    return real_tokens.take(out), weights


for _kind in ATTENTION:
    AttentionInterface.register(PREFIX + _kind, functools.partial(_attention, kind=_kind))
    AttentionMaskInterface.register(PREFIX + _kind, ALL_MASK_ATTENTION_FUNCTIONS[_kind])


@contextmanager
def real_tokens(model: nn.Module) -> Iterator[nn.Module]:
    """Within it, a forward with a padding mask ``(rows, T)`` runs the model's blocks on its real tokens.

    Outputs at real tokens are what they would be, to rounding; hidden states of padded tokens are zero, where
    before they were numbers that nothing reads. A batch with little padding, with a cache of keys, or whose
    hidden states or attentions are asked for runs as before, and so does any forward of an architecture that
    is not among ``ARCHITECTURES``. Rows are those of ``outer`` or grouped by member, as for any stack;
    ``packed``, ``read_token`` and ``outer`` may be entered before or after. Leave it only after the backward
    of a checkpointed forward, before which there must be no other forward.

    Yields:
        The same model.
    """
    base: Any = base_of(model)
    config: Any = getattr(base, "config", None)
    kind: Any = getattr(config, "_attn_implementation", None)
    known = getattr(config, "model_type", None) in ARCHITECTURES and kind in ATTENTION
    # attention to another sequence needs rows; chunks want a number of tokens that they divide
    if not known or any(getattr(config, k, 0) for k in ("add_cross_attention", "chunk_size_feed_forward")):
        yield model
        return
    lists = (m for m in base.modules() if isinstance(m, nn.ModuleList))
    blocks = next(m for m in lists if len(m) == config.num_hidden_layers)
    adapted = [m for m in base.modules() if isinstance(m, KilobayesLayer)]
    now: dict[str, Any] = {}  # the mask and the layout of the forward under way

    def start(module: nn.Module, args: tuple, kwargs: dict) -> None:
        mask = kwargs.get("attention_mask")
        asked = ("output_hidden_states", "output_attentions")
        whole = any(kwargs.get(name) or getattr(config, name, False) for name in asked)
        plain = isinstance(mask, Tensor) and mask.dim() == 2 and not whole
        now.update(mask=mask if plain else None, layout=None)

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        hidden = kwargs["hidden_states"] if (named := "hidden_states" in kwargs) else args[0]
        if module is blocks[0] and now.get("mask") is not None:
            mask, rows = now["mask"], hidden.shape[0]
            stack = max((layer.stack() for layer in adapted), default=1)
            if rows < len(mask):  # members share what is below the first adapted block
                mask, stack = mask[:rows], 1
            elif rows > len(mask):
                mask = mask.repeat(rows // len(mask), 1)
            cached = kwargs.get("past_key_values") is not None or mask.shape[1] != hidden.shape[1]
            now["layout"] = None if cached else layout_of(mask, stack if rows % stack == 0 else 1)
            lay_out(adapted, now["layout"])
        layout: Layout | None = now.get("layout")
        if layout is None:
            return None
        if module is blocks[0]:
            hidden = layout.take(hidden)
            args = args if named else (hidden, *args[1:])
            kwargs = kwargs | {"hidden_states": hidden} if named else kwargs
        if isinstance(pair := kwargs.get("position_embeddings"), tuple):
            kwargs = kwargs | {"position_embeddings": tuple(layout.positions(x) for x in pair)}
        return args, kwargs | {"real_tokens": layout}

    def leave(module: nn.Module, args: tuple, out: Any) -> Any:
        layout: Layout | None = now.get("layout")
        if layout is None:
            return out
        first, *rest = out if isinstance(out, tuple) else (out,)
        first = layout.pad(first) if layout.fits(first) else first
        return (first, *rest) if isinstance(out, tuple) else first

    def before_others(module: nn.Module, args: tuple) -> tuple:
        # read_token's hook looks for tokens where they are in rows
        layout: Layout | None = now.get("layout")
        others = len(module._forward_pre_hooks) > 1
        return tuple(layout.pad(a) if others and layout and layout.fits(a) else a for a in args)

    handles = [
        backbone(base).register_forward_pre_hook(start, with_kwargs=True),
        *(block.register_forward_pre_hook(enter, with_kwargs=True) for block in blocks),
        blocks[-1].register_forward_hook(leave),
    ]
    if (last := _last_self_output(base)) is not None:
        handles.append(last.register_forward_pre_hook(before_others, prepend=True))
    config._attn_implementation = PREFIX + kind
    try:
        yield model
    finally:
        config._attn_implementation = kind
        for handle in handles:
            handle.remove()
