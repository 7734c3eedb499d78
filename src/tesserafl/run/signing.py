"""Keys and certificates as bytes. All of `cryptography` (extra `flower`) is used here.

Curve P-384 throughout: Flower asks a NIST curve of its nodes, and one curve is enough.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from typing import Any

from tesserafl.core.errors import ConfigError, TrustError

try:
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    AVAILABLE = True
except ImportError:  # the extra is not installed; `needed` says so when a key is asked for
    AVAILABLE = False

AUTHORITY_DAYS = 3650
"""Validity of the authority's certificate. Whoever replaces it visits every device."""


def needed() -> None:
    """Say what to install if `cryptography` is missing.

    Raises:
        ConfigError: it is.
    """
    if not AVAILABLE:
        raise ConfigError(
            "keys and certificates need the package cryptography, which is not installed; "
            "pip install 'tesserafl[flower]'"
        )


def new_key() -> bytes:
    """A private key, PKCS 8 in PEM, not encrypted."""
    needed()
    return bytes(
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def authority(key: bytes, days: int = AUTHORITY_DAYS) -> bytes:
    """A self-signed certificate, PEM, that may sign servers and nothing below them."""
    private = _private(key, "the authority's key")
    name = _named("TesseraFL authority")
    usage = _usage(key_cert_sign=True, crl_sign=True)
    return _signed(
        _builder(name, name, private.public_key(), private.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True),
        private,
    )


def server_certificate(
    authority_key: bytes, authority_certificate: bytes, key: bytes, hosts: Sequence[str], days: int
) -> bytes:
    """A certificate for a TLS server that answers to `hosts`, names and addresses; PEM.

    It ends with the authority's certificate at the latest.

    Raises:
        TrustError: the authority's key and certificate do not belong together, or it has expired.
    """
    signer = _private(authority_key, "the authority's key")
    issuer = _certificate(authority_certificate)
    if issuer.public_key() != signer.public_key():
        raise TrustError(
            "ca.key and ca.crt do not belong together; put back the pair that was made together"
        )
    alternatives = [_alternative(host) for host in hosts]
    private = _private(key, "the server's key")
    left = (issuer.not_valid_after_utc - _now()).days
    if left < 1:
        raise TrustError(
            "the authority's certificate has expired; make a new folder with tessera certs and "
            "give every device its new ca.crt"
        )
    return _signed(
        _builder(
            _named(hosts[0][:64]),
            issuer.subject,
            private.public_key(),
            signer.public_key(),
            min(days, left),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False),
        signer,
    )


def device_pair(name: str) -> tuple[bytes, bytes]:
    """A device's private and public key in OpenSSH's format; Flower 1.41 reads no other."""
    needed()
    private = ec.generate_private_key(ec.SECP384R1())
    secret = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    return bytes(secret), _line(private.public_key(), name)


def public_of(private: bytes) -> bytes:
    """The public key of an OpenSSH private key. TrustError if it is damaged."""
    needed()
    try:
        return _line(serialization.load_ssh_private_key(private, None).public_key(), "")
    except (ValueError, UnsupportedAlgorithm, TypeError) as error:
        raise TrustError(f"an OpenSSH key that cannot be read: {error}") from error


def public_line(public: bytes, name: str) -> bytes:
    """The public key that `public` holds, written anew with the device's name as its comment.

    Raises:
        TrustError: it is not one line with an ECDSA key on P-384.
    """
    needed()
    try:
        if len(public.splitlines()) != 1:
            raise ValueError("more or less than one line")
        key = serialization.load_ssh_public_key(public)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TrustError(f"a public key that cannot be read: {error}") from error
    if not (isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1)):
        raise TrustError("a public key of another kind; an ecdsa-sha2-nistp384 key is needed")
    return _line(key, name)


def belong_together(private: bytes, public: bytes) -> bool:
    """Whether two OpenSSH files are one pair. TrustError if one of them is damaged."""
    needed()
    try:
        key = serialization.load_ssh_private_key(private, None)
        other = serialization.load_ssh_public_key(public)
    except (ValueError, UnsupportedAlgorithm, TypeError) as error:
        raise TrustError(f"an OpenSSH key that cannot be read: {error}") from error
    return bool(key.public_key() == other)


def fingerprint(certificate: bytes) -> bytes:
    """SHA-256 of a PEM certificate's contents; 32 bytes."""
    return hashlib.sha256(
        _certificate(certificate).public_bytes(serialization.Encoding.DER)
    ).digest()


def days_left(certificate: bytes) -> float:
    """Days until a PEM certificate expires; negative when it has."""
    return float((_certificate(certificate).not_valid_after_utc - _now()) / datetime.timedelta(1))


def names_in(certificate: bytes) -> tuple[str, ...]:
    """The names and addresses that a PEM certificate is for."""
    extension = _certificate(certificate).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    return tuple(str(entry.value) for entry in extension.value)


def _builder(subject: Any, issuer: Any, public: Any, signer: Any, days: int) -> Any:
    # Begins a day ago: devices' clocks differ. Key identifiers: Python 3.13 refuses a chain
    # without them.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - datetime.timedelta(days=1))
        .not_valid_after(_now() + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _signed(builder: Any, key: Any) -> bytes:
    certificate = builder.sign(key, hashes.SHA384())
    return bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _usage(**set_to: bool) -> Any:
    every = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: set_to.get(name, False) for name in every.split()})


def _named(name: str) -> Any:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative(host: str) -> Any:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _line(key: Any, name: str) -> bytes:
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return b" ".join((bytes(text), name.encode("ascii"))).strip() + b"\n"


def _private(data: bytes, what: str) -> Any:
    needed()
    try:
        return serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise TrustError(f"{what} cannot be read: {error}") from error


def _certificate(data: bytes) -> Any:
    needed()
    try:
        return x509.load_pem_x509_certificate(data)
    except ValueError as error:
        raise TrustError(f"a certificate that cannot be read: {error}") from error


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
