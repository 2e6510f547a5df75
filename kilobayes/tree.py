"""Operations on ``Params``, the flat dictionary of stacked tensors, and on states made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_type_hints

import torch
from torch import Tensor

from kilobayes.types import Params

# a draw's leaf that masks its sites' inputs token by token (host/tokens.py), and the parts of the share kept
TOKENS, SHARES = "~tokens", 1 << 16


def split_key(key: str) -> tuple[str, str]:
    """``"site/leaf"`` to ``("site", "leaf")``."""
    site, _, leaf = key.rpartition("/")
    return site, leaf


def leaves_of(params: Params, site: str) -> Params:
    """The leaves of one site and the shared ones, without the site in the key."""
    return {split_key(k)[1]: v for k, v in params.items() if split_key(k)[0] in (site, "*")}


def map_params(fn: Callable[[Tensor], Tensor], params: Params) -> Params:
    return {key: fn(value) for key, value in params.items()}


def plain(params: Params) -> Params:
    """The adapter's leaves alone, without what a draw or a posterior adds to them."""
    return {key: value for key, value in params.items() if "~" not in key}


def clone(params: Params) -> Params:
    """Detached copies, sharing no memory with the originals."""
    return map_params(lambda t: t.detach().clone(), params)


def chosen(params: Params, over: str) -> list[str]:
    """Keys of the leaves that a posterior is over, sorted.

    Args:
        over: a glob such as ``"*/A"`` or ``"*/bank"``; "" is every leaf called A, else every leaf of the
            adapter (all but those of heads, called weight and bias), else every leaf.

    Raises:
        ValueError: no leaf matches; the message names the leaves there are.
    """
    plain = sorted(key for key in params if "~" not in key)
    if over:
        found = [key for key in plain if fnmatchcase(key, over)]
    else:
        of_adapter = [key for key in plain if split_key(key)[1] not in ("weight", "bias")]
        found = [key for key in plain if split_key(key)[1] == "A"] or of_adapter or plain
    if not found:
        names = ", ".join(sorted({split_key(key)[1] for key in plain}))
        raise ValueError(
            f"no leaf matches over={over!r}; leaves are called {names}, as in over='*/{names.split(', ')[0]}'"
        )
    return found


def concatenate(stacks: Sequence[Params]) -> Params:
    """Stacks joined along the leading axis: ``(S1, ...)`` and ``(S2, ...)`` give ``(S1 + S2, ...)``."""
    return {key: torch.cat([stack[key] for stack in stacks]) for key in stacks[0]}


def member(params: Params, index: int | slice | Tensor) -> Params:
    """Members of a stack; an integer, negative ones from the end, keeps the leading axis, of length one."""
    if isinstance(index, int):
        index = slice(index, index + 1 or None)
    return map_params(lambda t: t[index], params)


def size(params: Params) -> int:
    """S, the length of the leading axis."""
    return next(iter(params.values())).shape[0]


def numbers(params: Params) -> int:
    """Numbers in one member."""
    return sum(value[0].numel() for value in params.values())


def flat(params: Params) -> Tensor:
    """All leaves of each member in one row: ``(S, P)``, keys in their order."""
    return torch.cat([value.flatten(1) for value in params.values()], dim=1)


def unflat(rows: Tensor, like: Params) -> Params:
    """The inverse of :func:`flat`: ``(n, P)`` to leaves ``(n, ...)``."""
    parts = rows.split([value[0].numel() for value in like.values()], dim=1)
    return {key: part.reshape(len(rows), *like[key].shape[1:]) for key, part in zip(like, parts, strict=True)}


def spread(k: int, n: int) -> Tensor:
    """Which of ``k`` members each of ``n`` draws comes from: in order, every member equally often (+-1).

    Fewer draws than members come from the first ``n``.
    """
    return torch.arange(n) * k // n if n >= k else torch.arange(n)


def shares(members: int, n: int) -> list[int]:
    """How many of n draws come from each member."""
    return torch.bincount(spread(members, n), minlength=members).tolist()  # type: ignore[no-any-return]


def flatten_state(state: Any, prefix: str = "") -> dict[str, Tensor]:
    """A state's tensors under names such as ``mean|site/leaf``; nested states nest with ``|``."""
    out: dict[str, Tensor] = {}
    for field in dataclasses.fields(state):
        value, name = getattr(state, field.name), prefix + field.name
        if isinstance(value, Tensor):
            out[name] = value
        elif isinstance(value, Mapping):
            out.update({f"{name}|{key}": tensor for key, tensor in value.items()})
        else:
            out.update(flatten_state(value, f"{name}|"))
    return out


def unflatten_state(posterior: Any, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The inverse of :func:`flatten_state`; the state's type is the one that ``posterior.init`` announces.

    A wrapping posterior holds the wrapped one as ``base`` and the wrapped state as ``inner``; one whose
    ``init`` announces no class of state, such as an ensemble, has the state of its base.

    Raises:
        KeyError: a tensor that the state needs is not there.
    """
    kind = get_type_hints(type(posterior).init)["return"]
    if not dataclasses.is_dataclass(kind):
        return unflatten_state(posterior.base, tensors, prefix)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        name = prefix + field.name
        if field.name == "inner":
            values[field.name] = unflatten_state(posterior.base, tensors, f"{name}|")
        elif name in tensors:
            values[field.name] = tensors[name]
        elif get_type_hints(kind)[field.name] is Tensor:
            raise KeyError(name)
        else:
            start = f"{name}|"
            values[field.name] = {k[len(start) :]: v for k, v in tensors.items() if k.startswith(start)}
    return kind(**values)  # type: ignore[operator]


def state_member(state: Any, index: int | slice | Tensor) -> Any:
    """The state of some members of an ensemble: every tensor indexed along its leading axis."""
    if isinstance(index, int):
        index = slice(index, index + 1 or None)
    return map_state(lambda t: t[index], state)


def map_state(fn: Callable[[Tensor], Tensor], state: Any) -> Any:
    """A state with ``fn`` applied to each of its tensors, nested states included."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = fn(value)
        elif isinstance(value, Mapping):
            changed[field.name] = map_params(fn, dict(value))
        else:
            changed[field.name] = map_state(fn, value)
    return dataclasses.replace(state, **changed)


def concatenate_states(states: Sequence[Any]) -> Any:
    """States of single members joined into the state of an ensemble."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(states[0]):
        values = [getattr(state, field.name) for state in states]
        if isinstance(values[0], Tensor):
            changed[field.name] = torch.cat(values)
        elif isinstance(values[0], Mapping):
            changed[field.name] = concatenate(values)
        else:
            changed[field.name] = concatenate_states(values)
    return dataclasses.replace(states[0], **changed)


def first_difference(a: Params, b: Params) -> str:
    """The first key whose tensors are not equal bit for bit, or "" when all are."""
    for key in sorted(set(a) | set(b)):
        if key not in a or key not in b or a[key].shape != b[key].shape or not torch.equal(a[key], b[key]):
            return key
    return ""


def total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
