"""A user's side of the rounds: train, send, take one's mixture, and go on; killed and started again, too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kilobayes import tree
from kilobayes.collaboration import rounds
from kilobayes.collaboration.party import Party, gather
from kilobayes.collaboration.scheme import Scheme
from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.federated import wire
from kilobayes.federated.closing import Late
from kilobayes.federated.session import Session
from kilobayes.options import Options

LOCAL = ("data", "out", "test", "ood", "device", "resume")  # of the options: never the server's to say
HERE = ("reference",)  # of a collaboration's settings, likewise


@dataclass(frozen=True)
class Agreed:
    """Settings that a server gave, and those that are the user's own."""

    options: Options
    together: Together
    classes: list[str] | None
    fingerprint: str
    reference: str
    users: int


def agreed(told: Mapping[str, Any], own: Mapping[str, Any], reference: str) -> Agreed:
    """What to train by: the server's settings, but for what is the user's alone to say.

    Nothing in them is run: specifications of adapters and posteriors are parsed, never evaluated.

    Args:
        own: keys of :class:`Options` that win.
        reference: the file of shared rows, "" for none.

    Raises:
        KilobayesError: settings that this version does not know, or that reach for files of this machine.
    """
    try:
        options = {k: v for k, v in told["options"].items() if k not in LOCAL}
        together = {k: v for k, v in told["together"].items() if k not in HERE}
        if together.get("scheme") == "predictions" and not reference:
            raise KilobayesError("the shared rows are missing", remedy="name their file: --reference")
        made = Options(**(options | dict(own)))
        terms = Together(**together, reference=reference)
        classes, users = told["classes"], int(told["users"])
        fingerprint, digest = str(told["fingerprint"]), str(told["reference"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise KilobayesError(
            "the server's settings are not understood",
            f"{type(error).__name__}: {error}; it runs kilobayes {told.get('version')!s:.20}",
            "take the same version on both sides",
        ) from None
    if made.held_out() is None:
        raise KilobayesError(
            "the server names a file for calibration", f"found {made.calibration!r:.80}", "it must be a share"
        )
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise KilobayesError("the server's classes are no list of words")
    return Agreed(made, terms, classes, fingerprint, digest, users)


def digest(reference: str) -> str:
    """SHA-256 of the file of shared rows, which all must have alike; "" for none."""
    return hashlib.sha256(Path(reference).read_bytes()).hexdigest() if reference else ""


def take_part(
    session: Session, terms: Agreed, user: str, data: Any, folder: Path, say: Callable[[str], None]
) -> Party:
    """From settings and data to the end of a collaboration; the user's run is in the folder then.

    Raises:
        KilobayesError: another base than the server's, other shared rows, and as :func:`follow`.
    """
    if digest(terms.together.reference) != terms.reference:
        raise KilobayesError(
            "the shared rows are not the server's",
            terms.together.reference or "none",
            "name them: --reference",
        )
    party = gather(terms.options, terms.together, {user: data}, folder, terms.classes)
    if party.fingerprint != terms.fingerprint:
        raise KilobayesError(
            f"{terms.options.model} is another base model than the server's",
            f"fingerprint {party.fingerprint:.12}, not {terms.fingerprint:.12}",
            "name a folder with the same files: --model",
        )
    update = party.update()
    hello = {"rows": party.rows[0], "fingerprint": party.fingerprint, "reference": terms.reference}
    session.join(hello, terms.users * (rounds.bytes_of(update) + wire.SPARE))
    terms_ = terms.together
    scheme = Scheme(terms_.scheme, terms_.temperature, terms_.top)
    steps = rounds.exchanges(terms_.steps, terms_.warmup_steps, terms_.every)
    follow(session, party, steps, scheme, say)
    party.save([folder])
    session.done()
    return party


def follow(
    session: Session,
    party: Party,
    exchanges: Sequence[int],
    scheme: Scheme,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Take part until the end: at most once in each round, however often this is started.

    Args:
        party: of one user; its checkpoint says where training stands.
        exchanges: the step of each round.

    Raises:
        KilobayesError: as the session does.
    """
    while True:
        try:
            told = session.status()
            _take(session, party, exchanges, told["latest"], say)
            if told["over"]:
                break
            _round(session, party, exchanges, int(told["round"]), scheme, say)
        except Late:
            say("the round is over without this client; on to the next")
    party.train(exchanges[-1])


def _round(
    session: Session,
    party: Party,
    exchanges: Sequence[int],
    at: int,
    scheme: Scheme,
    say: Callable[[str], None],
) -> None:
    update = party.train(exchanges[at])
    asked = scheme.needs == "predictions"
    size = session.send_update(at, update, party.predictions() if asked else None)
    say(f"round {at + 1} of {len(exchanges)}: step {exchanges[at]}, {size:,} bytes sent")
    if scheme.needs == "losses" and (found := session.everyone(at)) is not None:
        session.send_losses(at, party.losses(found[1]))
    session.mixed(at)  # waits; what came of it is taken where things are found to stand


def _take(
    session: Session, party: Party, exchanges: Sequence[int], latest: int | None, say: Callable[[str], None]
) -> None:
    """Adopt the last mixture that was made for this user, if that has not been done.

    A client that lost its disk begins with it, too; one with an older copy of its checkpoint trains on.
    """
    if latest is None or not 0 <= latest < len(exchanges):
        return
    if party.step and (party.step != exchanges[latest] or party.adopted == party.step):
        return
    theta = session.mixed(latest)
    if theta is None:
        return
    if odd := rounds.wrong(theta, rounds.shapes(party.update())):
        raise KilobayesError("the server sent a mixture that does not fit", odd)
    if party.step:
        party.adopt(theta)
    else:
        party.start = tree.plain(theta)
    say(f"round {latest + 1} of {len(exchanges)}: mixture of {rounds.bytes_of(theta):,} bytes adopted")
