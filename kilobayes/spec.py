"""Methods written as text: ``"SWAG(rank=20)"`` to an object, and back.

Only names of adapters and posteriors, literals, and such calls nested in each other are understood; nothing
is evaluated.
"""

from __future__ import annotations

import ast
import dataclasses
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

from kilobayes.catalog import ADAPTERS, POSTERIORS, catalog
from kilobayes.errors import KilobayesError, nearest

LONGEST = 2000  # characters; Python's parser, and ours, recurse


def check(text: str, kind: str) -> str:
    """Validate a specification without importing the method; returns its text.

    Args:
        text: such as ``"LoRA(r=8)"``, ``"SWAG"`` or ``"Temperature(SWAG(rank=10))"``.
        kind: ``"adapters"`` or ``"posteriors"``.

    Raises:
        KilobayesError: it is no such call, or a name or keyword in it is unknown.
    """
    _walk(_tree(text), kind, text)
    return text


def parse(text: str, kind: str) -> Any:
    """The adapter or posterior that a specification names.

    Raises:
        KilobayesError: as :func:`check`, or a value that the method itself refuses.
    """
    return _make(_tree(text), kind, text)


def format(method: Any) -> str:
    """The shortest specification that gives the same object, as a person writes it.

    Fields at their defaults are left out, and a wrapped method that comes first needs no name.
    """
    shown = []
    for place, field in enumerate(dataclasses.fields(method)):
        value = getattr(method, field.name)
        if value != field.default:
            nested = dataclasses.is_dataclass(value)
            text = format(value) if nested else repr(value)
            shown.append(text if nested and place == 0 else f"{field.name}={text}")
    return f"{type(method).__name__}({', '.join(shown)})"


def _tree(text: str) -> ast.expr:
    remedy = 'write it as in "SWAG(rank=20)"'
    if len(text) > LONGEST:
        raise KilobayesError("that is not a method's specification", f"it has {len(text)} characters", remedy)
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise KilobayesError(f"{text!r} is not a method's specification", str(error), remedy) from None


def _walk(node: ast.expr, kind: str, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """The method's name and its arguments as syntax, every name and keyword checked."""
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    known = catalog(kind)
    if not isinstance(call.func, ast.Name):
        raise KilobayesError(
            f"{text!r} is not a method's specification",
            f"known {kind}: {', '.join(known)}",
            'write it as in "SWAG(rank=20)"',
        )
    name = call.func.id
    if name not in known:
        guess = nearest(name, known)
        raise KilobayesError(
            f"there is no {kind[:-1]} called {name!r}",
            f"known: {', '.join(known)}",
            f"did you mean {guess}?" if guess else "kilobayes list shows them with their options",
        )
    fields = list(known[name].defaults)
    named = {k.arg or "**": k.value for k in call.keywords}
    given = fields[: len(call.args)] + [k.arg or "**" for k in call.keywords]
    if len(call.args) > len(fields):
        raise KilobayesError(
            f"{name} takes at most {len(fields)} values", f"found {len(call.args)} in {text!r}"
        )
    for keyword in named:
        if keyword not in fields:
            guess = nearest(keyword, fields)
            raise KilobayesError(
                f"{name} has no option {keyword!r}",
                f"its options: {', '.join(fields)}",
                f"did you mean {guess}=?" if guess else "",
            )
    twice = sorted({key for key in given if given.count(key) > 1})
    if twice:
        raise KilobayesError(f"{name} is given {', '.join(twice)} twice", f"found {text!r}")
    values = dict(zip(fields, call.args, strict=False)) | named
    for value in values.values():
        if isinstance(value, ast.Call) or (isinstance(value, ast.Name) and value.id in known):
            _walk(value, kind, text)
        else:
            _literal(value, text)
    return name, fields, values


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError):
        shown = ast.get_source_segment(text.strip(), node) or text
        raise KilobayesError(
            f"{shown!r} in {text!r} is neither a number, a text nor a known method",
            remedy='texts need quotes, as in over="*/A"',
        ) from None


def _make(node: ast.expr, kind: str, text: str) -> Any:
    import importlib

    name, _, values = _walk(node, kind, text)
    method = getattr(importlib.import_module(f"kilobayes.{kind}"), name)
    known = catalog(kind)
    made = {
        key: _make(value, kind, text)
        if isinstance(value, ast.Call) or (isinstance(value, ast.Name) and value.id in known)
        else _literal(value, text)
        for key, value in values.items()
    }
    hints = get_type_hints(method)
    for key, value in made.items():
        if not _fits(value, hints[key]):
            wanted = getattr(hints[key], "__name__", str(hints[key]))
            raise KilobayesError(f"{name}'s {key} is of type {wanted}", f"found {value!r} in {text!r}")
    try:
        return method(**made)
    except (TypeError, ValueError) as error:
        raise KilobayesError(f"{text!r} does not work", str(error)) from error


def _fits(value: Any, hint: Any) -> bool:
    """Whether a literal or a method is of a field's type; a whole number is also a float."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(hint))
    kind = get_origin(hint) or hint
    if not isinstance(kind, type):
        return True
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind in (bool, object)
    return isinstance(value, (int, float) if kind is float else kind)


def adapter(value: Any) -> Any:
    """An adapter from an adapter or its specification."""
    return parse(value, ADAPTERS) if isinstance(value, str) else value


def posterior(value: Any) -> Any:
    """A posterior from a posterior or its specification."""
    return parse(value, POSTERIORS) if isinstance(value, str) else value
