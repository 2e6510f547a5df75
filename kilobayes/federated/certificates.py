"""A certificate of one's own, which clients are given as a file: no authority is needed."""

from __future__ import annotations

import ipaddress
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from kilobayes.errors import KilobayesError

CERTIFICATE, KEY = "certificate.pem", "key.pem"
DAYS = 825


def make(folder: Path, hosts: Sequence[str]) -> tuple[Path, Path]:
    """Write ``certificate.pem``, to be given to users, and ``key.pem``, which only the server may read.

    Args:
        hosts: names and addresses that clients will call the server by.

    Raises:
        KilobayesError: there is one already, no host is named, or openssl is missing or refuses.
    """
    certificate, key = folder / CERTIFICATE, folder / KEY
    if certificate.exists() or key.exists():
        raise KilobayesError(f"{folder} has a certificate already", remedy="delete it first, or keep it")
    if not hosts:
        raise KilobayesError("a certificate needs a name", remedy="as in --make-certificate host.example.org")
    names = ",".join(_named(host) for host in hosts)
    program = shutil.which("openssl")
    if program is None:
        raise KilobayesError("openssl is not installed", remedy="install it, or bring a certificate")
    folder.mkdir(parents=True, exist_ok=True)
    os.close(os.open(key, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))  # before openssl writes into it
    command = [
        program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-sha256", "-nodes",
        "-days", str(DAYS), "-subj", "/CN=kilobayes", "-keyout", str(key), "-out", str(certificate),
        "-addext", f"subjectAltName={names}",
        "-addext", "keyUsage=critical,digitalSignature,keyCertSign",
        "-addext", "extendedKeyUsage=serverAuth",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        key.unlink(missing_ok=True)
        certificate.unlink(missing_ok=True)
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise KilobayesError("openssl made no certificate", last[:200], "check the names")
    return certificate, key


def _named(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        pass
    if not host or not all(c.isascii() and (c.isalnum() or c in ".-*") for c in host):
        raise KilobayesError("a certificate is for names and addresses of machines", f"found {host!r:.80}")
    return f"DNS:{host}"
