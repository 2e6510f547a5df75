"""A client's line to its server: TLS, the user's token, and patience with servers that are away."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from torch import Tensor

from kilobayes.errors import KilobayesError
from kilobayes.federated import wire
from kilobayes.federated.closing import Late
from kilobayes.federated.door import USER
from kilobayes.types import Params

FIRST, LONGEST = 0.2, 15.0  # seconds before the next try: doubled after each
ANSWER = 120.0  # seconds that an answer may take
SETTINGS = 1 << 20  # bytes of an answer that is not tensors


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        tensors: whether the body holds some; else it is JSON, or empty.
    """

    status: int
    tensors: bool
    body: bytes


def address(server: str) -> str:
    """``https://HOST:PORT``; plain HTTP is for this machine alone.

    Raises:
        KilobayesError: it is no address, or unprotected.
    """
    from kilobayes.serve.server import loopback

    whole = server if "://" in server else f"https://{server}"
    try:
        url = httpx2.URL(whole)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    odd = url.path not in ("", "/") or any(c.isspace() for c in whole)
    if url.scheme not in ("http", "https") or not url.host or odd:
        raise KilobayesError("--server is an address", f"found {server!r:.80}", "as in host.example.org:8443")
    if url.scheme == "http" and not loopback(url.host):
        raise KilobayesError(f"{server} is not encrypted", "http to another machine", "leave http:// out")
    return whole.rstrip("/")


def trusted(certificate: Path | None) -> ssl.SSLContext:
    """Whom to believe: holders of this certificate or authority, or the system's authorities.

    Raises:
        KilobayesError: the file holds no certificate.
    """
    if certificate is None:
        return ssl.create_default_context()
    try:
        return ssl.create_default_context(cafile=str(certificate))
    except (OSError, ssl.SSLError) as error:
        raise KilobayesError(f"{certificate} holds no certificate", str(error)[:200]) from None


class Session:
    """What a client asks of a server, tried again until it is answered.

    Args:
        patience: seconds without any answer after which to give up.
        say: told when the server is away, and back.

    Raises:
        KilobayesError: of every method: the token, the certificate or what was sent is refused, or nobody
            answers.
    """

    def __init__(
        self,
        server: str,
        user: str,
        token: str,
        certificate: Path | None = None,
        *,
        patience: float = 3600.0,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.server, self.patience, self.say = address(server), patience, say
        if not token or not token.isascii() or not token.isprintable() or " " in token:
            raise KilobayesError("this is no token", "", "copy it again from who keeps the server")
        headers = {USER: wire.check_name(user), "authorization": f"Bearer {token}"}
        self.client = httpx2.Client(
            base_url=self.server, headers=headers, timeout=ANSWER, verify=trusted(certificate),
            follow_redirects=False, trust_env=False,
        )  # fmt: skip
        self.largest = SETTINGS

    def close(self) -> None:
        self.client.close()

    def settings(self) -> dict[str, Any]:
        return wire.read_json(self._ask("GET", "/v1/settings").body)

    def join(self, hello: dict[str, Any], largest: int) -> dict[str, Any]:
        """Say who one is; answers of more bytes than ``largest`` are not taken from then on."""
        self.largest = max(SETTINGS, largest)
        return wire.read_json(self._ask("POST", "/v1/join", json=hello).body)

    def status(self) -> dict[str, Any]:
        return wire.read_json(self._ask("GET", "/v1/status").body)

    def send_update(self, at: int, theta: Params, predictions: Tensor | None) -> int:
        """Bytes sent. Raises :class:`Late` too."""
        body = wire.pack_update(theta, predictions)
        self._ask("POST", f"/v1/rounds/{at}/update", content=body)
        return len(body)

    def everyone(self, at: int) -> tuple[list[str], Params] | None:
        """Users of the round and their updates, when all have sent; None if the round is over without one."""
        while True:
            found = self._ask("GET", f"/v1/rounds/{at}/updates")
            told = self.status()
            if told["round"] != at:
                return None
            if found.tensors:
                return told["present"], wire.unpack_everyone(found.body, told["present"])

    def send_losses(self, at: int, losses: Tensor) -> None:
        """Raises :class:`Late` too."""
        body = wire.pack({wire.LOSSES: losses.double()})
        self._ask("POST", f"/v1/rounds/{at}/losses", content=body)

    def mixed(self, at: int) -> Params | None:
        """One's mixture, when the round is over; None if one was not part of it.

        Raises:
            Late: the server is before that round.
        """
        while True:
            found = self._ask("GET", f"/v1/rounds/{at}/mixed")
            if found.tensors:
                return wire.unpack(found.body)
            if found.status == 204:
                return None
            if wire.read_json(found.body)["round"] < at:
                raise Late

    def done(self) -> None:
        self._ask("POST", "/v1/done")

    def _ask(self, method: str, path: str, **given: Any) -> Answer:
        wait, since, away = FIRST, time.monotonic(), False
        while True:
            try:
                answer = self._once(method, path, given)
                if answer.status < 500:
                    if away:
                        self.say(f"{self.server} is back")
                    return self._checked(answer)
                found = f"it answers {answer.status}"
            except httpx2.HTTPError as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    raise KilobayesError(
                        f"{self.server} has no certificate that is trusted",
                        str(error)[:200],
                        "name the file that its keeper gave you: --certificate certificate.pem",
                    ) from None
                found = f"{type(error).__name__}: {error}"[:200]
            if time.monotonic() - since > self.patience:
                raise KilobayesError(f"{self.server} does not answer", found, "start this client again later")
            if not away:
                self.say(f"{self.server} cannot be reached, {found}; trying again")
            away = True
            time.sleep(wait)
            wait = min(2 * wait, LONGEST)

    def _once(self, method: str, path: str, given: dict[str, Any]) -> Answer:
        # identity, raw: a small answer must not unfold into a large one
        with self.client.stream(method, path, headers={"accept-encoding": "identity"}, **given) as got:
            parts, size = [], 0
            for part in got.iter_raw():
                size += len(part)
                if size > self.largest:
                    raise KilobayesError(f"{self.server} sends more than {self.largest} bytes")
                parts.append(part)
            kind = got.headers.get("content-type", "")
            tensors = got.status_code == 200 and kind.startswith(wire.TENSORS)
            return Answer(got.status_code, tensors, b"".join(parts))

    def _checked(self, answer: Answer) -> Answer:
        if answer.status == 401:
            raise KilobayesError(
                f"{self.server} does not know this user by this token",
                "401",
                "set --user and KILOBAYES_TOKEN as its keeper gave them to you",
            )
        if answer.status == 409:
            raise Late
        if answer.status >= 300:
            try:
                told = wire.read_json(answer.body).get("error", "")
            except KilobayesError:
                told = ""
            raise KilobayesError(f"{self.server} refuses", f"{answer.status} {told}"[:500])
        return answer
