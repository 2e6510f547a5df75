r"""A mask for every token on the inputs of adapted layers: the dropout published for LoRA, with no generator.

.. math:: y = W x + \Delta\Bigl(\frac{x \odot z}{1 - p}\Bigr), \qquad
          z_j \sim \text{Bernoulli}(1 - p) \text{ for each token and column}

where Delta is whatever map the adapter builds. z is a hash of the draw's seed, the site, the row's real
tokens in their order, the token's place among them, and the column. So nothing is drawn in layers, and a
prediction depends neither on the other rows of its batch nor on padding, chunks, micro-batches, processes or
recomputation. Rows with the same tokens have the same masks.

A draw says so by a leaf ``"site/~tokens"``, int64 ``(S, 2)``: the draw's seed, and the share kept in units of
2^-16. :func:`~kilobayes.host.build` takes these leaves from the weights, and
:func:`~kilobayes.host.install` puts :class:`Masked` around the sites' operators. Heads are not masked.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobayes.counter import GOLDEN, mix, signed
from kilobayes.errors import KilobayesError
from kilobayes.tree import SHARES, TOKENS, split_key
from kilobayes.types import Operator, Params


@dataclass(frozen=True, eq=False)
class Seeds:
    """The leaf of a draw as an entry of what :func:`~kilobayes.host.build` returns, beside the operators.

    Attributes:
        values: int64 ``(S, 2)``.
    """

    values: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Alone it changes nothing."""
        return x


class Places:
    """Which token stands where in the forward under way, or in the last one, whose layers may run again."""

    def __init__(self, backbone: nn.Module) -> None:
        self.keys = self.laid = torch.empty(0, 0, dtype=torch.int64)  # (rows, T), and as real_tokens lays out
        self.hook = backbone.register_forward_pre_hook(self.start, with_kwargs=True)

    def start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A key for each token of a forward: its row's tokens and its place, padding aside."""
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        others = [k for k in ("past_key_values", "decoder_input_ids") if given.get(k) is not None]
        if not isinstance(ids, Tensor) or ids.dim() != 2 or others:
            raise _unknown(f"the model was called with {', '.join(others) or 'no input_ids'}")
        mask = torch.ones_like(ids) if mask is None else mask
        if not isinstance(mask, Tensor) or mask.shape != ids.shape:
            raise _unknown("the model was called with a mask that is not one of the rows' tokens")
        real = (mask != 0).to(ids.dtype)
        step = real.cumsum(dim=1) * signed(GOLDEN)
        rows = mix((mix(mix(ids) + step) * real).sum(dim=1, keepdim=True))
        self.keys = self.laid = mix(rows + step)

    def lay_out(self, layout: Any) -> None:
        """The same tokens as blocks see them."""
        if layout is None:
            self.laid = self.keys
            return
        rows = self.keys.repeat(-(-layout.rows // len(self.keys)), 1)[: layout.rows]
        self.laid = rows.flatten()[layout.index]

    def of(self, x: Tensor, stack: int, inside: bool) -> Tensor:
        """Keys ``(S or 1, n)`` of a layer's input.

        Args:
            inside: whether the layer is in a block, where an input of two axes is of all tokens; elsewhere it
                is of one for each row.

        Raises:
            KilobayesError: the input is not of the forward's tokens.
        """
        first = x.shape[1] == 1 if x.dim() == 3 else not inside
        keys = self.keys[:, :1] if first else self.laid
        times, rest = divmod(x.shape[:-1].numel(), max(keys.numel(), 1))
        fits = x.dim() == 2 or (x.dim() == 3 and x.shape[1] == keys.shape[1])
        if not fits or rest or times not in (1, stack) or (times == 1 and keys.numel() % stack):
            raise _unknown(f"a layer's input {tuple(x.shape)} for rows {tuple(self.keys.shape)}")
        return keys.reshape(stack if times == 1 else 1, -1)


@dataclass(frozen=True, eq=False)
class Masked:
    """An operator whose input is masked token by token.

    Attributes:
        seeds: ``(S,)`` of the draws, mixed with the site.
        keep: p's complement.
        operator: of the site.
        inside: whether the site is in a block.
    """

    seeds: Tensor
    keep: float
    operator: Operator
    places: Places
    inside: bool

    def mask(self, x: Tensor) -> Tensor:
        """A layer's input ``(rows, ..., d)``, member by member, with columns dropped and the rest scaled."""
        stack, width = len(self.seeds), x.shape[-1]
        tokens = mix(self.seeds[:, None] + self.places.of(x, stack, self.inside))  # (S, n)
        columns = torch.arange(1, width // 4 + 2, device=x.device) * signed(GOLDEN)
        bits = mix(tokens[..., None] + columns).view(torch.int16)[..., :width]  # four numbers of each hash
        kept = bits < round(self.keep * SHARES) - SHARES // 2
        return x * kept.view(x.shape) / self.keep

    def __call__(self, x: Tensor) -> Tensor:
        raise _unknown("the adapter was applied to something else than a layer's input")


def split(theta: Params) -> tuple[Params, dict[str, Operator]]:
    """A draw's weights, and its seeds by key."""
    own = {key: value for key, value in theta.items() if split_key(key)[1] != TOKENS}
    return own, {key: Seeds(value) for key, value in theta.items() if key not in own}


def wrapped(
    base: nn.Module, sites: Mapping[str, Any], built: Mapping[str, Operator] | None
) -> dict[str, Operator]:
    """What was built, with masks around the operators of the sites that have seeds.

    Args:
        sites: the adapted layers; what is installed on them stops following the model's forwards.

    Raises:
        KilobayesError: there are seeds, but of none of the sites.
    """
    for before in _places(sites.values()):
        before.hook.remove()
    out = dict(built or {})
    seeds = {key: out.pop(key) for key in tuple(out) if split_key(key)[1] == TOKENS}
    found = {s: seeds.get(f"{s}/{TOKENS}", seeds.get(f"*/{TOKENS}")) for s in sites} if seeds else {}
    now = Places(backbone(base)) if any(found.values()) else None
    for site, own in found.items():
        if isinstance(own, Seeds) and now is not None:
            mixed = mix(mix(own.values[:, 0]) + zlib.crc32(site.encode()))
            inside = any(part.isdigit() for part in site.split("."))
            out[site] = Masked(mixed, int(own.values[0, 1]) / SHARES, out[site], now, inside)
    if seeds and now is None:
        raise KilobayesError(
            "masks of tokens are for the inputs of adapted layers",
            f"leaves were chosen at {', '.join(split_key(key)[0] for key in seeds)}",
            "choose an adapter's leaves, as in over='*/A'",
        )
    return out


def backbone(base: Any) -> nn.Module:
    """The part of a model that is called with a batch's tokens and their mask.

    A decoder that is a part of its own, as OPT's, is called past the module around it by its language model.
    """
    found = getattr(base, str(base.base_model_prefix), base)
    whole = getattr(base.config, "is_encoder_decoder", False)
    return found if whole else getattr(found, "decoder", found)


def lay_out(layers: Iterable[Any], layout: Any) -> None:
    """Tells the masks of adapted layers how blocks see tokens: as laid out, or in rows where it is None."""
    for places in _places(layers):
        places.lay_out(layout)


def _places(layers: Iterable[Any]) -> set[Places]:
    return {layer.installed.places for layer in layers if isinstance(layer.installed, Masked)}


def _unknown(found: str) -> KilobayesError:
    return KilobayesError("masks of tokens need to know each token", found, 'take MCDropout(noise="row")')
