"""A client's line: whom it believes, what it takes, when it tries again, what it lets itself be told."""

from __future__ import annotations

import dataclasses
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx2")

from kilobayes import cli
from kilobayes.collaboration.scheme import Scheme
from kilobayes.collaboration.settings import Together
from kilobayes.errors import KilobayesError
from kilobayes.federated import certificates, client, session, tokens
from kilobayes.federated.app import application
from kilobayes.federated.closing import Late, Plan
from kilobayes.federated.ledger import Ledger
from kilobayes.federated.room import Room
from kilobayes.federated.serving import Where
from kilobayes.options import Options
from kilobayes.testing.tiny import tiny_model

from .served import Running, running

Make = Callable[..., session.Session]
TOKEN = "the-token-of-ben"
HELLO = {"rows": 3, "fingerprint": "f", "reference": ""}


@pytest.fixture
def line() -> Iterator[Make]:
    """Makes sessions, and closes them before the server ends."""
    with ExitStack() as stack:

        def made(server: str, user: str, token: str, *more: Any, **given: Any) -> session.Session:
            found = session.Session(server, user, token, *more, **({"patience": 5} | given))
            stack.callback(found.close)
            return found

        yield made


def app(folder: Path) -> Any:
    plan = Plan(
        ["anna", "ben"], [1, 2], Scheme("fedavg"), "leaves", tiny_model("LoRAXS(r=2)"), {"x": (2,)}, "f"
    )
    room = Room(plan, Ledger(folder, {}))
    return application(room, {"settings": 1}, {"ben": tokens.digest(TOKEN)}, largest=10_000)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return certificates.make(tmp_path_factory.mktemp("tls"), ["localhost", "127.0.0.1"])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, pair: tuple[Path, Path]) -> Iterator[Running]:
    with running(app(tmp_path_factory.mktemp("server")), pair) as found:
        yield found


def test_a_client_that_is_known_is_answered(served: Running, pair: tuple[Path, Path], line: Make) -> None:
    known = line(served.server, "ben", TOKEN, pair[0])
    assert known.settings()["settings"] == 1
    assert known.join(HELLO, 1 << 20)["round"] == 0
    with pytest.raises(Late):
        known.send_losses(0, torch.zeros(1, 2))
    with pytest.raises(KilobayesError, match="422 the update cannot be mixed; x is"):
        known.send_update(0, {"x": torch.zeros(1, 3)}, None)
    known.client.headers["accept-encoding"] = "gzip"
    with pytest.raises(KilobayesError, match="413"):
        known.send_update(0, {"x": torch.zeros(1, 30_000)}, None)
    assert known.send_update(0, {"x": torch.zeros(1, 2)}, None) < 200
    known.largest = 10
    with pytest.raises(KilobayesError, match="sends more than 10 bytes"):
        known.status()


@pytest.mark.parametrize(("user", "token"), [("ben", "another"), ("anna", TOKEN), ("ben", TOKEN[:-1])])
def test_a_wrong_token_is_told_at_once(
    served: Running, pair: tuple[Path, Path], line: Make, user: str, token: str
) -> None:
    with pytest.raises(KilobayesError, match="does not know this user by this token"):
        line(served.server, user, token, pair[0]).settings()


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ü", "x "])
def test_what_is_no_token(served: Running, token: str) -> None:
    with pytest.raises(KilobayesError, match="no token"):
        session.Session(served.server, "ben", token)


def test_a_wrong_certificate_is_told_at_once(
    served: Running, pair: tuple[Path, Path], tmp_path: Path, line: Make
) -> None:
    other, _ = certificates.make(tmp_path, ["localhost"])
    for wrong in (other, None):
        with pytest.raises(KilobayesError, match="no certificate that is trusted"):
            line(served.server, "ben", TOKEN, wrong).settings()
    elsewhere = certificates.make(tmp_path / "elsewhere", ["host.example.org"])
    with (
        running(app(tmp_path / "server"), elsewhere) as named,
        pytest.raises(KilobayesError, match="no certificate that is trusted"),
    ):
        line(named.server, "ben", TOKEN, elsewhere[0]).settings()
    with pytest.raises(KilobayesError, match="holds no certificate"):
        session.Session(served.server, "ben", TOKEN, tmp_path / "absent.pem")


def test_a_server_that_is_away_is_waited_for(tmp_path: Path, line: Make) -> None:
    said: list[str] = []
    with running(app(tmp_path)) as first:
        patient = line(f"http://{first.server}", "ben", TOKEN, patience=60, say=said.append)
        patient.join(HELLO, 1 << 20)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(patient.status()))
    asking.start()
    while not said:
        time.sleep(0.01)
    with running(app(tmp_path), None, first.port):
        asking.join(60)
        patient.close()
    assert found[0]["round"] == 0
    assert "cannot be reached" in said[0]
    assert "is back" in said[1]
    with pytest.raises(KilobayesError, match="does not answer"):
        line(f"http://{first.server}", "ben", TOKEN, patience=0.1).status()


@pytest.mark.parametrize("server", ["http://example.org:80", "ftp://localhost", "", "https://a/path", "a b"])
def test_addresses_that_are_not_taken(server: str) -> None:
    with pytest.raises(KilobayesError, match=r"is not encrypted|is an address"):
        session.address(server)


def test_addresses_that_are_taken() -> None:
    assert session.address("host.example.org:8443") == "https://host.example.org:8443"
    assert session.address("http://127.0.0.1:8443/") == "http://127.0.0.1:8443"


def test_certificates_hold_for_strict_readers_and_their_keys_for_nobody_else(
    served: Running, pair: tuple[Path, Path]
) -> None:
    certificate, key = pair
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    context = ssl.create_default_context(cafile=str(certificate))
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of later Pythons
    (found,) = context.get_ca_certs()
    assert found["subjectAltName"] == (("DNS", "localhost"), ("IP Address", "127.0.0.1"))
    with (
        socket.create_connection(("127.0.0.1", served.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as safe,
    ):
        assert safe.version() == "TLSv1.3"
    with pytest.raises(KilobayesError, match="has a certificate already"):
        certificates.make(certificate.parent, ["localhost"])
    with pytest.raises(KilobayesError, match="names and addresses of machines"):
        certificates.make(certificate.parent / "other", ["a,DNS:b"])
    assert not list((certificate.parent / "other").glob("*.pem"))


def test_servers_do_not_let_others_in_unprotected(pair: tuple[Path, Path]) -> None:
    with pytest.raises(KilobayesError, match="lets other machines in"):
        Where(host="0.0.0.0")
    with pytest.raises(KilobayesError, match="no certificate and its key"):
        Where(certificate=pair[1], key=pair[0])
    with pytest.raises(KilobayesError, match="has a key"):
        Where(certificate=pair[0])
    assert Where(host="0.0.0.0", certificate=pair[0], key=pair[1]).port == 8443


def test_the_server_keeps_digests_of_tokens_alone(tmp_path: Path, capsys: Any) -> None:
    words = ["server", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "s")]
    assert cli.run([*words, "--invite", "anna,ben", "--make-certificate", "localhost"]) == 0
    printed = dict(line.split(": KILOBAYES_TOKEN=") for line in capsys.readouterr().err.splitlines()[1:])
    assert list(printed) == ["anna", "ben"]
    kept = tokens.read(tmp_path / "s")
    assert not any(token in (tmp_path / "s" / "users.json").read_text() for token in printed.values())
    assert tokens.admitted(kept, "anna", printed["anna"])
    assert not tokens.admitted(kept, "ben", printed["anna"])
    assert not tokens.admitted(kept, "cara", "")
    again = tokens.invite(tmp_path / "s", ["anna"])
    assert not tokens.admitted(tokens.read(tmp_path / "s"), "anna", printed["anna"])
    assert tokens.admitted(tokens.read(tmp_path / "s"), "anna", again["anna"])
    for name in ("../x", "", ".x", "a/b", "a" * 65, "a|b"):
        with pytest.raises(KilobayesError, match="a user's name"):
            tokens.invite(tmp_path / "s", [name])


def told(**given: Any) -> dict[str, Any]:
    options = Options(posterior="Point()", adapter="LoRA(r=3)", data="/etc", out="/etc", test="/etc/passwd")
    whole = {"options": dataclasses.asdict(options), "together": dataclasses.asdict(Together())}
    whole |= {"classes": ["a", "b"], "fingerprint": "f", "reference": "", "users": 2, "version": "1"}
    for name, values in given.items():
        whole[name] = whole[name] | values if isinstance(whole[name], dict) else values  # type: ignore[operator]
    return whole


def test_settings_of_the_server_leave_the_users_files_alone() -> None:
    found = client.agreed(told(together={"reference": "/etc/passwd"}), {"out": "mine", "test": ""}, "")
    assert (found.options.data, found.options.test, found.options.out) == ("", "", "mine")
    assert (found.options.adapter, found.together.reference) == ("LoRA(r=3)", "")
    assert client.agreed(told(), {"model": "here"}, "").options.model == "here"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"options": {"calibration": "/etc/passwd"}}, "names a file for calibration"),
        ({"options": {"epochs": 0}}, "--epochs must be"),
        ({"options": {"trust_remote_code": True}}, "not understood"),
        ({"together": {"steps": "many"}}, "whole number"),
        ({"classes": "ab"}, "no list of words"),
        ({"users": None}, "not understood"),
        ({"together": {"scheme": "predictions"}}, "--reference"),
    ],
)
def test_settings_that_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(KilobayesError, match=said):
        client.agreed(told(**given), {}, "")
