"""The client of the documentation, against a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from kilobayes.serve.app import application
from kilobayes.serve.shelf import Shelf

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_documented_client_works(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (*shelf.pools, *shelf.decoders):
        monkeypatch.setattr(part, "close", lambda: None)  # others use them after
    (code,) = re.findall(
        r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    with TestClient(application(shelf)) as client:
        text, doubt = names["complete"](client, "once there was", model="one", max_tokens=5, temperature=0)
        words = [token.strip() for token, _ in doubt]
        assert [word for word in words if not word.startswith("<")] == text.split()
        assert text
        assert all(information >= 0 for _, information in doubt)
        found = names["labels"](client, ["red", "blue w1"], model="a", coverage=0.6)
        assert len(found) == 2
        assert set(found) <= {"cold", "fresh", "warm", None}
        assert None not in names["labels"](client, ["red"], model="a")
