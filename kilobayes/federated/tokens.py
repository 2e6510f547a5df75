"""Who may take part: a token for each user, of which the server keeps a digest alone."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Sequence
from pathlib import Path

from kilobayes.errors import KilobayesError
from kilobayes.files import write_json

FILE = "users.json"


def digest(token: str) -> str:
    """SHA-256 of a token. Tokens are drawn with 256 bits, so that no salt and no slow hash is needed."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def read(folder: Path) -> dict[str, str]:
    """Digests by user, in the order of invitation; empty before the first.

    Raises:
        KilobayesError: the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(v, str) and len(v) == 64 for v in found.values()):
        raise KilobayesError(f"{path} is damaged", "digests by user are expected", "invite the users again")
    return found


def invite(folder: Path, users: Sequence[str]) -> dict[str, str]:
    """New tokens by user, which nobody can read again; a user who had one has another now."""
    from kilobayes.federated.wire import check_name

    fresh = {check_name(user): secrets.token_urlsafe(32) for user in users}
    write_json(folder / FILE, read(folder) | {user: digest(token) for user, token in fresh.items()})
    return fresh


def admitted(users: dict[str, str], user: str, token: str) -> bool:
    """Whether a token is the user's; takes as long for a user who is not there."""
    kept = users.get(user, "")
    return hmac.compare_digest(digest(token), kept or "0" * 64) and bool(kept)
