"""Is a name a local path or a hub id, and can the hub be reached at all?

The hub's own client tries a dead network for half a minute before it gives up; a short look beforehand
spares that.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from kilobayes.errors import KilobayesError, nearest

SECONDS = 4.0


def told_offline() -> bool:
    """True when the environment asks for cached copies only (``HF_HUB_OFFLINE``)."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}


def reachable() -> bool:
    """True when the hub's host (``HF_ENDPOINT``) takes a connection; behind a proxy it is taken to do so."""
    if told_offline():
        return False
    if urllib.request.getproxies().keys() & {"https", "http", "all"}:
        return True
    url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((url.hostname or "", url.port or 443), timeout=SECONDS).close()
    except (OSError, ValueError):
        return False
    return True


def local_path(source: str | Path) -> Path | None:
    """The path if it exists, None for what can only be a hub id (``name``, ``owner/name``).

    Raises:
        KilobayesError: neither; the nearest name in the same directory is suggested.
    """
    path, text = Path(source).expanduser(), str(source)
    if text.strip() and path.exists():
        return path
    within = path.parent != Path() and path.parent.exists()
    if not (isinstance(source, Path) or text[:1] in "./~" or within or _file_like(text)):
        return None
    siblings = sorted(item.name for item in path.parent.iterdir()) if path.parent.is_dir() else []
    guess = nearest(path.name, siblings)
    shown = f"{', '.join(siblings[:8])}{', ...' if len(siblings) > 8 else ''}" if siblings else "nothing"
    raise KilobayesError(
        f"there is no file or directory {text!r}",
        f"{path.parent} {f'holds: {shown}' if path.parent.is_dir() else 'is no directory'}",
        f"did you mean {path.parent / guess}?" if guess else "check the path",
    )


def _file_like(text: str) -> bool:
    """Not of the form of a hub id, or with an ending that a data file has."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text, re.ASCII) is None or bool(
        re.search(r"\.(jsonl?|csv|tsv|parquet|gz|safetensors|txt)$", text.lower())
    )


def first_line(error: BaseException) -> str:
    """Kind and first line of another library's error, to quote in ours."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
