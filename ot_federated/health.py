"""What ``ot-federated doctor`` finds, and the checks that both parties need.

A check returns findings and never raises for what it looks at: the point is to see everything that is wrong at once.
Each finding that is not well says what to do.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import platform
import shutil
import socket
import ssl
import stat
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from ot_federated.certificates import describe_certificate, is_signed_by, read_certificate_file, read_private_key
from ot_federated.errors import OtFederatedError

Level = Literal["ok", "warning", "error"]
renew_before = timedelta(days=30)
low_disk_bytes, no_disk_bytes = 10 * 10**9, 10**9
# Flower refuses a SuperNode's call that is signed more than 5 s after or 305 s before the SuperLink's own time.
max_ahead_seconds, max_behind_seconds = 5.0, 300.0
connect_seconds = 10.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: What was looked at.
        level: ``ok``; ``warning``: it works today; ``error``: it does not.
        found: What was found.
        remedy: What to do; empty where nothing need be done.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""


def well(check: str, found: str) -> Finding:
    """Return a finding that all is well."""
    return Finding(check=check, level="ok", found=found)


def gather(checks: Iterable[tuple[str, Callable[[], Iterable[Finding]]]]) -> list[Finding]:
    """Run checks by name; what one of them raises becomes a finding, and the others run."""
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings += check()
        except OtFederatedError as error:
            findings.append(Finding(check=name, level="error", found=str(error), remedy="Do what the text says."))
        except OSError as error:
            remedy = "Check that it exists and that this user may read it."
            findings.append(Finding(check=name, level="error", found=str(error), remedy=remedy))
    return findings


def check_versions() -> list[Finding]:
    """Compare what is installed with what this release asks for."""
    wrong, found = [], [f"Python {platform.python_version()}"]
    for text in importlib.metadata.requires("ot-federated") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
        if requirement.name in ("flwr", "torch", "transformers"):
            found.append(f"{requirement.name} {version}")
    found.insert(0, f"ot-federated {importlib.metadata.version('ot-federated')}")
    if wrong:
        remedy = "Install this release with its dependencies again: pip install ot-federated."
        return [Finding(check="versions", level="error", found="; ".join(wrong), remedy=remedy)]
    return [well("versions", ", ".join(found))]


def check_certificate(path: Path, *, check: str, remedy: str, now: datetime | None = None) -> list[Finding]:
    """Look at a certificate's dates.

    Args:
        path: The certificate.
        check: How the finding is called.
        remedy: How to get a new one.
        now: The time to compare with; the present one by default.
    """
    facts, now = describe_certificate(path), now or datetime.now(UTC)
    until = f"{path}: {facts.subject}, valid until {facts.not_after:%Y-%m-%d}"
    if now < facts.not_before:
        return [
            Finding(
                check=check,
                level="error",
                found=f"{path} is not valid before {facts.not_before:%Y-%m-%d %H:%M} UTC",
                remedy="Set this machine's clock; if it is right, the machine that made the certificate was wrong.",
            )
        ]
    if now > facts.not_after:
        return [Finding(check=check, level="error", found=f"{until}: it has expired", remedy=remedy)]
    if now + renew_before > facts.not_after:
        return [Finding(check=check, level="warning", found=f"{until}: soon", remedy=remedy)]
    return [well(check, until)]


def check_secret(path: Path, *, check: str) -> list[Finding]:
    """Look at a private key, and who may read it."""
    read_private_key(path)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        found = f"{path} can be read by others than its owner (mode {mode:o})"
        return [
            Finding(check=check, level="error", found=found, remedy=f"chmod 600 {path}; make a new key if they did.")
        ]
    return [well(check, f"{path}, for its owner's eyes")]


def check_pair(key: Path, certificate: Path, authority: Path) -> list[Finding]:
    """Check that a certificate is that of a key, and of an authority."""
    if read_private_key(key).public_key() != read_certificate_file(certificate).public_key():
        found = f"{key} is not the key of {certificate}"
        remedy = "Move both away and run: ot-federated keys server."
        return [Finding(check="certificate's key", level="error", found=found, remedy=remedy)]
    if not is_signed_by(certificate, authority):
        found = f"{certificate} was not signed by {authority}"
        remedy = "Data owners would refuse it: issue it with ot-federated keys server, or give them the right ca.crt."
        return [Finding(check="certificate's authority", level="error", found=found, remedy=remedy)]
    return [well("certificate's authority", f"{certificate} is of {authority}")]


def check_disk(directory: Path, *, check: str) -> list[Finding]:
    """Look at the free bytes of the disk on which ``directory`` is, or would be."""
    place = directory
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    found = f"{directory}: {free / 1e9:.1f} GB free"
    remedy = "Free some space, or put it on another disk; a bundle needs twice its size while it arrives."
    if free < no_disk_bytes:
        return [Finding(check=check, level="error", found=found, remedy=remedy)]
    return [
        Finding(check=check, level="warning", found=found, remedy=remedy)
        if free < low_disk_bytes
        else well(check, found)
    ]


def check_device(name: str = "auto") -> list[Finding]:
    """Say on what models would run."""
    import torch

    from ot_federated.devices import choose_device

    device = choose_device(name)
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        return [well("device", f"{torch.cuda.get_device_name(device)}: {free / 1e9:.1f} of {total / 1e9:.1f} GB free")]
    if device == "cpu" and name == "auto" and shutil.which("nvidia-smi"):
        found = f"there is an NVIDIA driver, and torch {torch.__version__} does not use it"
        remedy = "Install a CUDA build of torch, or say device=cpu if that is meant."
        return [Finding(check="device", level="warning", found=found, remedy=remedy)]
    return [well("device", device)]


def check_time_service() -> list[Finding]:
    """Ask systemd whether the clock is kept right; nothing where it cannot tell."""
    command = shutil.which("timedatectl")
    if not command:
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(
            [command, "show", "--property=NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        if told == "no":
            remedy = "timedatectl set-ntp true. A clock that runs 5 s ahead of the model owner's shuts a SuperNode out."
            return [
                Finding(check="time service", level="warning", found="the clock is not synchronised", remedy=remedy)
            ]
        return [well("time service", "the clock is synchronised")]
    return []


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a TLS server answered to one request, and by how many seconds this machine's clock is ahead of its own."""

    status: int
    seconds_ahead: float | None


def ask(address: str, *, authority: Path, path: str, method: str = "POST") -> Answer:
    """Send one empty request over TLS and return the answer.

    Raises:
        OSError: If there is no connection (``ssl.SSLError`` among them: the certificate is not trusted).
        OtFederatedError: If the address is none.
    """
    host, port = split_address(address)
    context = ssl.create_default_context(cafile=str(authority))
    connection = http.client.HTTPSConnection(host, port, timeout=connect_seconds, context=context)
    began = time.time()
    try:
        connection.request(method, path, body=b"")
        response = connection.getresponse()
    except http.client.HTTPException as error:
        raise OSError(f"{address} answers, but not as a web server does ({error!r})") from error
    finally:
        connection.close()
    local, date = (began + time.time()) / 2, response.getheader("Date")
    ahead = None
    with contextlib.suppress(TypeError, ValueError):
        # The header has whole seconds: the half is its mean error.
        ahead = local - parsedate_to_datetime(date or "").timestamp() - 0.5
    return Answer(status=response.status, seconds_ahead=ahead)


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of ``HOST:PORT``.

    Raises:
        OtFederatedError: If it is something else.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise OtFederatedError(f"{address!r} is not HOST:PORT, such as fl.example.org:9443.")
    return host.strip("[]"), int(port)


def explain_connection(error: OSError) -> tuple[str, str]:
    """Return what is wrong with a connection, and what to do."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"its certificate is not trusted ({error.verify_message})",
            "Take the ca.crt that the model owner gave you, and the host name that is in its certificate.",
        )
    if isinstance(error, ssl.SSLError):
        return f"TLS fails ({error.reason or error})", "Check that the port is that of nginx, which speaks TLS."
    if isinstance(error, socket.gaierror):
        return "its name is unknown", "Check the spelling, and this machine's DNS."
    if isinstance(error, TimeoutError):
        return "no answer", "Let the firewall pass outgoing TCP to this host and port."
    return str(error), "Check that nginx runs there, and that the firewall passes outgoing TCP to this host and port."


def check_clock(seconds_ahead: float | None) -> list[Finding]:
    """Judge the difference between this machine's clock and the model owner's."""
    if seconds_ahead is None:
        return []
    found = f"{abs(seconds_ahead):.0f} s {'ahead of' if seconds_ahead > 0 else 'behind'} the model owner's"
    remedy = "Synchronise both clocks (timedatectl set-ntp true): Flower refuses calls that are signed at a wrong time."
    if seconds_ahead > max_ahead_seconds or seconds_ahead < -max_behind_seconds:
        return [Finding(check="clock", level="error", found=found, remedy=remedy)]
    # Half of what is allowed: a clock that drifts will pass the limit.
    if seconds_ahead > max_ahead_seconds / 2 or seconds_ahead < -max_behind_seconds / 2:
        return [Finding(check="clock", level="warning", found=found, remedy=remedy)]
    return [well("clock", found)]
