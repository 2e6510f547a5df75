"""``server`` and ``client``: a collaboration of users on machines of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kilobayes.commands.flags import Device, Label, Model, Pair, Text
from kilobayes.errors import KilobayesError

Out = Annotated[Path, typer.Option(help="Folder of all that is remembered; what is there is gone on with.")]
File = Annotated[Path | None, typer.Option(help="PEM file.")]


def server(
    settings: Annotated[Path, typer.Argument(help="Settings, as of kilobayes collaborate.")],
    out: Out = Path("runs/server"),
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than loopback need TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8443,
    certificate: File = None,
    key: File = None,
    min_users: Annotated[int, typer.Option(min=1, help="With fewer, a round is skipped.")] = 2,
    wait: Annotated[float, typer.Option(help="Seconds after the first update of a round to wait.")] = 600.0,
    invite: Annotated[
        str, typer.Option(help="Make tokens for these users, separated by commas, print them, and end.")
    ] = "",
    make_certificate: Annotated[
        str, typer.Option(help="Make a certificate for these names of this machine, and end.")
    ] = "",
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Let users on other machines collaborate: adapters travel, data do not."""
    from kilobayes.commands import console
    from kilobayes.commands.serve import needed

    needed()
    from kilobayes.collaboration.settings import read
    from kilobayes.federated import certificates, tokens
    from kilobayes.federated.serving import Where, serve
    from kilobayes.run_yaml import read_flat

    if make_certificate:
        made, _ = certificates.make(out, _words(make_certificate))
        console.say(f"{made}: give it to the users, who name it with --certificate")
    if invite:
        for user, token in tokens.invite(out, _words(invite)).items():
            console.say(f"{user}: KILOBAYES_TOKEN={token}")
    if make_certificate or invite:
        return
    if certificate is None and key is None and (out / certificates.CERTIFICATE).exists():
        certificate, key = out / certificates.CERTIFICATE, out / certificates.KEY
    flat = {str(k).replace("-", "_"): v for k, v in read_flat(settings).items()}
    given, together, _ = read(flat, str(settings))
    where = Where(host, port, certificate, key, min_users, wait, model or "", device)
    over = serve(given, together, out, tokens.read(out), where, console.say)
    console.say("over: every user has the last mixture" if over else "stopped; start it again to go on")


def client(
    server: Annotated[str, typer.Option(help="Its address, HOST:PORT.")],
    user: Annotated[str, typer.Option(help="Your name there.")],
    data: Annotated[str, typer.Option(help="Your data, as kilobayes train takes them; they stay here.")],
    token: Annotated[str, typer.Option(envvar="KILOBAYES_TOKEN", show_envvar=True, help="Your token.")] = "",
    certificate: Annotated[
        Path | None, typer.Option(help="The server's certificate, or its authority's; default the system's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of your run; default runs/USER. What is there is gone on with."),
    ] = None,
    reference: Annotated[str, typer.Option(help="The shared rows, where the scheme needs them.")] = "",
    test: Annotated[str, typer.Option(help="Data to evaluate on; default the data's own split.")] = "",
    text_column: Text = None,
    pair_column: Pair = None,
    label_column: Label = None,
    patience: Annotated[float, typer.Option(help="Seconds to go on trying to reach the server.")] = 86400.0,
    model: Model = None,
    device: Device = "auto",
) -> None:
    """Take part in a collaboration; stop it and start it again at will."""
    from kilobayes.commands import console
    from kilobayes.commands.serve import needed

    needed()
    from kilobayes.federated.session import Session
    from kilobayes.federated.wire import check_name

    if not token:
        raise KilobayesError(
            "a token is needed", "none", "set KILOBAYES_TOKEN as the server's keeper gave it"
        )
    folder = out or Path("runs") / check_name(user)
    own = {
        "out": str(folder), "test": test, "device": device, "model": model,
        "text_column": text_column, "pair_column": pair_column, "label_column": label_column,
    }  # fmt: skip
    session = Session(server, user, token, certificate, patience=patience, say=console.say)
    try:
        told = session.settings()
        from kilobayes.federated import client as following

        terms = following.agreed(told, {k: v for k, v in own.items() if v is not None}, reference)
        o, t = terms.options, terms.together
        console.say(f"model {o.model}, adapter {o.adapter}, posterior {o.posterior}, {t.steps} steps")
        console.say(f"trust by {t.scheme}, among {terms.users} users; run {folder}")
        following.take_part(session, terms, user, data, folder, console.say)
    finally:
        session.close()
    console.say(f"done; kilobayes {'generate' if o.task == 'lm' else 'evaluate'} {folder} ...")


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",") if word.strip()]
