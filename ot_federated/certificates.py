"""Keys and certificates of a federation: its own certificate authority, the owner's TLS certificate, SuperNode keys.

Two kinds of proof, both on elliptic curves that Flower takes (NIST P-384). The model owner's certificate, signed by the
federation's authority, tells data owners that they speak to the model owner; each data owner's key pair, whose public
half the model owner registers, tells the model owner who speaks. Private keys are written for their owner's eyes, and
nothing that exists is ever overwritten.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ot_federated.cache import atomic_write_bytes
from ot_federated.errors import ConfigError, OtFederatedError

authority_days, server_days = 3650, 397
# Clocks differ by minutes, and a certificate that is not valid yet is refused like an expired one.
backdate = timedelta(hours=1)
# The SuperLink listens here, and the proxy in front of it checks its certificate.
local_hosts = ("localhost", "127.0.0.1")


class CertificateError(OtFederatedError):
    """A key or certificate cannot be read, or is in the way."""


@dataclass(frozen=True, kw_only=True)
class CertificateFacts:
    """What matters about a certificate.

    Attributes:
        subject: Its common name.
        hosts: Names and addresses that it is for; empty for an authority.
        not_before: Begin of its validity, in UTC.
        not_after: End of its validity, in UTC.
        is_authority: Whether it may sign others.
    """

    subject: str
    hosts: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    is_authority: bool


def make_authority(directory: Path, *, name: str = "ot-federated CA", days: int = authority_days) -> tuple[Path, Path]:
    """Make an authority: ``ca.key``, which never leaves the model owner, and ``ca.crt``, which every data owner gets.

    Returns:
        The two files.

    Raises:
        CertificateError: If one of them exists.
    """
    key_file, certificate_file = directory / "ca.key", directory / "ca.crt"
    refuse_existing(key_file, certificate_file)
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        _begin(subject, issuer=subject, key=key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    _write_private(key_file, key, serialization.PrivateFormat.PKCS8)
    atomic_write_bytes(certificate_file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return key_file, certificate_file


def issue_server_certificate(
    directory: Path, *, authority: Path, hosts: Sequence[str], days: int = server_days
) -> tuple[Path, Path]:
    """Issue the model owner's certificate: ``server.key`` and ``server.crt``.

    Args:
        directory: Where they are written.
        authority: Directory of ``ca.key`` and ``ca.crt``.
        hosts: Names or addresses by which data owners reach the model owner; ``localhost`` is always added.
        days: Validity.

    Returns:
        The two files.

    Raises:
        CertificateError: If one of them exists, or the authority cannot be read.
        ConfigError: If no host is given, or one is not a name or an address.
    """
    if not hosts:
        raise ConfigError("Name the host by which data owners reach the model owner, such as fl.example.org.")
    key_file, certificate_file = directory / "server.key", directory / "server.crt"
    refuse_existing(key_file, certificate_file)
    ca_key = read_private_key(authority / "ca.key")
    ca = read_certificate_file(authority / "ca.crt")
    if ca_key.public_key() != ca.public_key():
        raise CertificateError(f"{authority}/ca.key is not the key of {authority}/ca.crt: they are of two authorities.")
    names = [general_name(host) for host in dict.fromkeys([*hosts, *local_hosts])]
    key = ec.generate_private_key(ec.SECP384R1())
    # A common name has 64 characters at most; what counts are the names above.
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    certificate = (
        _begin(subject, issuer=ca.subject, key=key.public_key(), days=days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    _write_private(key_file, key, serialization.PrivateFormat.PKCS8)
    atomic_write_bytes(certificate_file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
    return key_file, certificate_file


def make_node_key(path: Path) -> tuple[Path, Path]:
    """Make a SuperNode's key pair in OpenSSH's format: ``path``, which never leaves the data owner, and ``path.pub``.

    Returns:
        The two files.

    Raises:
        CertificateError: If one of them exists.
    """
    public_file = path.with_name(f"{path.name}.pub")
    refuse_existing(path, public_file)
    key = ec.generate_private_key(ec.SECP384R1())
    _write_private(path, key, serialization.PrivateFormat.OpenSSH)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    atomic_write_bytes(public_file, public + f" {path.name}\n".encode(), mode=0o644)
    return path, public_file


def describe_certificate(path: Path) -> CertificateFacts:
    """Return what matters about a certificate.

    Raises:
        CertificateError: If it cannot be read.
    """
    certificate = read_certificate_file(path)
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    hosts: tuple[str, ...] = ()
    is_authority = False
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = tuple(str(name.value) for name in names)
    with contextlib.suppress(x509.ExtensionNotFound):
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    return CertificateFacts(
        subject=str(common[0].value) if common else "",
        hosts=hosts,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        is_authority=is_authority,
    )


def is_signed_by(path: Path, authority: Path) -> bool:
    """Say whether the certificate in ``path`` was signed by the one in ``authority``.

    Raises:
        CertificateError: If one of them cannot be read.
    """
    certificate, ca = read_certificate_file(path), read_certificate_file(authority)
    try:
        certificate.verify_directly_issued_by(ca)
    # ValueError: another issuer. TypeError: a key of a kind that cannot sign. InvalidSignature has no common base.
    except Exception:
        return False
    return True


def read_certificate_file(path: Path) -> x509.Certificate:
    """Read the first certificate of a PEM file.

    Raises:
        CertificateError: If it cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateError(
            f"{path} cannot be read as a certificate ({error}). The model owner makes certificates with: "
            "ot-federated keys ca, ot-federated keys server."
        ) from error


def read_private_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read an elliptic-curve private key without a password, in PEM or OpenSSH's format.

    Raises:
        CertificateError: If it cannot be read, or is of another kind.
    """
    try:
        data = path.read_bytes()
        if b"OPENSSH PRIVATE KEY" in data:
            key: object = serialization.load_ssh_private_key(data, password=None)
        else:
            key = serialization.load_pem_private_key(data, password=None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(f"{path} cannot be read as a private key ({error}).") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path} is not an elliptic-curve key. Make one with ot-federated keys.")
    return key


def general_name(host: str) -> x509.GeneralName:
    """Return a host's name or address as certificates have it.

    Raises:
        ConfigError: If it is neither.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(label.replace("-", "").isalnum() and label.isascii() for label in labels):
        raise ConfigError(f"{host!r} is neither a host name nor an address: give it without https:// and port.")
    return x509.DNSName(host)


def refuse_existing(*paths: Path) -> None:
    """Check that none of the files exists.

    Raises:
        CertificateError: If one does: who depends on it would be shut out.
    """
    for path in paths:
        if path.exists():
            raise CertificateError(
                f"{path} exists, and is not overwritten: move it away first if it shall be replaced."
            )


def _begin(
    subject: x509.Name, *, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - backdate)
        .not_valid_after(now + timedelta(days=days))
    )


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    data = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    # The partial file must not be readable for others for a moment either.
    before = os.umask(0o077)
    try:
        atomic_write_bytes(path, data, mode=0o600)
    finally:
        os.umask(before)
