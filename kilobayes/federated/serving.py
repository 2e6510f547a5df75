"""From settings to a listening server."""

from __future__ import annotations

import dataclasses
import math
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.options import Options


@dataclasses.dataclass(frozen=True)
class Where:
    """How a server is reached.

    Args:
        certificate, key: PEM files; None for plain HTTP, which is for this machine alone.
        least: users without whom a round is skipped.
        wait: seconds after a round's first update.
        model: where the base is on this machine; "" for where the settings say.
        device: of this machine.

    Raises:
        KilobayesError: other machines are let in without a certificate; numbers that make no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8443
    certificate: Path | None = None
    key: Path | None = None
    least: int = 2
    wait: float = 600.0
    model: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        from kilobayes.serve.server import loopback

        if (self.certificate is None) != (self.key is None):
            raise KilobayesError("a certificate has a key, and a key a certificate", "one of the two")
        if self.certificate is None and not loopback(self.host):
            raise KilobayesError(
                f"--host {self.host} lets other machines in, and there is no certificate",
                remedy="--make-certificate NAME-OF-THIS-MACHINE makes one; or stay on --host 127.0.0.1",
            )
        if self.least < 1 or not 0 < self.wait < math.inf:
            raise KilobayesError("--min-users is at least 1, and --wait above 0 seconds")
        if self.certificate is not None:
            try:
                ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                    self.certificate, self.key
                )
            except (OSError, ssl.SSLError) as error:
                raise KilobayesError(
                    f"{self.certificate} and {self.key} are no certificate and its key", str(error)[:200]
                ) from None


def serve(
    options: Options,
    together: Together,
    folder: Path,
    users: dict[str, str],
    where: Where,
    say: Callable[[str], None],
) -> bool:
    """Listen until all users have all, or the process is asked to end.

    Args:
        users: digests of tokens by user.

    Returns:
        whether the collaboration is over.

    Raises:
        KilobayesError: as everything it calls.
    """
    from kilobayes.collaboration import rounds
    from kilobayes.collaboration.scheme import Scheme
    from kilobayes.federated import wire
    from kilobayes.federated.app import application
    from kilobayes.federated.base import hosted
    from kilobayes.federated.client import digest
    from kilobayes.federated.closing import Plan
    from kilobayes.federated.ledger import Ledger
    from kilobayes.federated.room import Room
    from kilobayes.serve import server as http

    scheme = Scheme(together.scheme, together.temperature, together.top)
    exchanges = rounds.exchanges(together.steps, together.warmup_steps, together.every)
    if scheme.name == "local":
        raise KilobayesError(
            "the scheme local exchanges nothing", "", "kilobayes train does it without a server"
        )
    if len(users) < where.least:
        raise KilobayesError(
            f"a round needs {where.least} users", f"{len(users)} are invited", "as in --invite anna,ben"
        )
    kinds = [word.strip() for word in together.kinds.split(",")] if together.kinds else []
    if scheme.needs == "kinds" and len(kinds) != len(users):
        raise KilobayesError("the scheme oracle needs a kind for each user", f"{len(kinds)} for {len(users)}")
    reference = digest(together.reference)
    classes = together.named()
    with http.listen(where.host, where.port) as listening:
        here = dataclasses.replace(options, device=where.device, model=where.model or options.model)
        base = hosted(here, together, classes)
        numbers = sum(math.prod(shape) for shape in base.like.values())
        plan = Plan(
            users=sorted(users), exchanges=exchanges, scheme=scheme, average=together.average,
            model=base.model, like=base.like, fingerprint=base.fingerprint, reference=reference, kinds=kinds,
            least=where.least, wait=where.wait,
        )  # fmt: skip
        ours = dataclasses.asdict(together)
        identity = options.identity() | ours | {"base": base.fingerprint, "reference": reference}
        room = Room(plan, Ledger(folder, identity), say)
        predicted = together.positions * base.outputs if scheme.needs == "predictions" else 0
        settings: dict[str, Any] = {
            "options": dataclasses.asdict(options), "together": ours, "classes": classes,
            "fingerprint": base.fingerprint, "reference": reference, "users": len(users),
        }  # fmt: skip
        found: list[Any] = []
        app = application(
            room,
            settings,
            users,
            largest=4 * (numbers + predicted) + wire.SPARE,
            ended=lambda: setattr(found[0], "should_exit", True),
            stopping=lambda: bool(found[0].should_exit),
        )
        scheme_of = "https" if where.certificate else "http"
        shown = f"[{where.host}]" if ":" in where.host else where.host
        address = f"{scheme_of}://{shown}:{listening.getsockname()[1]}"

        def ready() -> None:
            say(f"{len(users)} users: {', '.join(sorted(users))}; round {room.state.round + 1} is open")
            say(f"serving at {address}")

        tls = None if where.certificate is None or where.key is None else (where.certificate, where.key)
        found.append(http.prepared(app, 30.0, ready, tls=tls))
        found[0].run(sockets=[listening])
    return room.emptied
