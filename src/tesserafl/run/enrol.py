"""Join tokens: a device makes its own key, and one line of text lets it register that key once.

A token is the enrolment server's address, the SHA-256 of the authority's certificate and a secret.
The device first fetches the certificate from a server that it does not trust yet and compares its
fingerprint; it sends the secret only over TLS that this certificate vouches for. The server keeps a
hash of the secret. The first key that is shown with it takes the token; the same key may be shown
again until the token expires, so that an answer lost on the way harms nobody.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from tesserafl.core.errors import ConfigError, TrustError
from tesserafl.run import signing
from tesserafl.run.addresses import check_address, check_name, joined
from tesserafl.run.certs import DeviceFiles, device_files, fill_bundle, server_files
from tesserafl.run.keyfiles import private_folder, write_new
from tesserafl.run.tokens import HASH_BYTES, SECRET_BYTES, add_token

PREFIX = "tessera1-"
"""Begins every token; the digit is the format's version."""
CERTIFICATE_PATH = "/v1/ca.crt"
"""Where the authority's certificate is fetched."""
ENROL_PATH = "/v1/enrol"
"""Where a key is registered."""
ANSWER_BYTES = 65536
"""Longest answer that a device reads."""
TIMEOUT_SECONDS = 60.0
"""How long a device waits for a connection or an answer."""
_SUM_BYTES = 4


class Request(BaseModel):
    """What a device sends to register its key."""

    model_config = ConfigDict(extra="forbid", strict=True)
    secret: str
    """hexadecimal"""
    public_key: str
    """one line, OpenSSH"""


class Accepted(BaseModel):
    """What the server answers: who the device is from now on."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    server: str
    """HOST:PORT of the fleet path"""


@dataclass(frozen=True, kw_only=True)
class Token:
    """What a token says."""

    address: str
    """HOST:PORT of the enrolment server."""
    fingerprint: bytes
    """SHA-256 of the authority's certificate."""
    secret: bytes

    def text(self) -> str:
        """One line without spaces."""
        body = self.fingerprint + self.secret + self.address.encode("ascii")
        whole = hashlib.sha256(body).digest()[:_SUM_BYTES] + body
        return PREFIX + base64.urlsafe_b64encode(whole).decode().rstrip("=")


def read_token(text: str) -> Token:
    """The token in a line of text.

    Raises:
        TrustError: it is none, of another version, or a character of it is wrong or missing.
    """
    line = text.strip()
    again = "copy the whole line that tessera token printed"
    if not line.startswith(PREFIX):
        raise TrustError(f"a token begins with {PREFIX}, this begins with {line[:12]!r}; {again}")
    coded = line[len(PREFIX) :]
    try:
        whole = base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise TrustError(f"the token is damaged; {again}") from error
    body = whole[_SUM_BYTES:]
    if hashlib.sha256(body).digest()[:_SUM_BYTES] != whole[:_SUM_BYTES]:
        raise TrustError(f"the token is damaged; {again}")
    split = HASH_BYTES + SECRET_BYTES
    return Token(
        address=check_address(body[split:].decode("ascii", errors="replace")),
        fingerprint=body[:HASH_BYTES],
        secret=body[HASH_BYTES:split],
    )


def create_token(folder: Path, name: str, days: float = 7.0) -> str:
    """A token for the device `name`, good for one key until `days` have passed.

    A token that was made for the same name before and not used stops working.

    Raises:
        ConfigError: a name that cannot be, or days that are not between 0 and 365.
        TrustError: the folder holds no server, or the device has a key already.
    """
    files = server_files(folder)
    check_name(name)
    if not 0 < days <= 365:
        raise ConfigError(f"days: {days:g} given; more than 0 and at most 365 are allowed")
    if (folder / "devices" / name).exists():
        raise TrustError(
            f"{folder / 'devices' / name} exists: the device has a key already. Choose another "
            f"name, or remove that folder if the device is gone"
        )
    secret = os.urandom(SECRET_BYTES)  # never from a seed: it must not be repeatable
    add_token(folder, name, secret, days * 86400)
    return Token(
        address=joined(files.hosts[0], files.enrol_port),
        fingerprint=signing.fingerprint(files.ca.read_bytes()),
        secret=secret,
    ).text()


def enrol(token: str, folder: Path) -> DeviceFiles:
    """Make a key in `folder`, register it with the server of the token, fill the folder.

    May be called again after a failure: the key that was made is used again.

    Raises:
        TrustError: the folder is a device's already, the token is damaged, used or expired, or the
            server is not the one that the token is of.
        ConfigError: the server cannot be reached, or asks to wait.
    """
    signing.needed()
    ticket = read_token(token)
    if (folder / "device.json").exists():
        raise TrustError(f"{folder} belongs to a device already; join with it, or choose another")
    private_folder(folder)
    public = _own_key(folder)
    authority = _fetched(ticket)
    body = Request(secret=ticket.secret.hex(), public_key=public.decode("ascii").strip())
    context = ssl.create_default_context(cadata=authority.decode("ascii"))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    status, answer = _asked(ticket, context, "POST", ENROL_PATH, body.model_dump_json().encode())
    if status != 200:
        raise _refusal(status, answer)
    try:
        accepted = Accepted.model_validate_json(answer)
        name, server = check_name(accepted.name), check_address(accepted.server)
    except (ValidationError, ConfigError) as error:
        raise TrustError(f"the server's answer makes no sense: {error}") from error
    (folder / "device.pub").write_bytes(signing.public_line(public, name))
    fill_bundle(folder, name, server, authority)
    return device_files(folder)


def _own_key(folder: Path) -> bytes:
    """The public key of folder/device.key, which is made if it is not there yet."""
    path = folder / "device.key"
    if not path.exists():
        private, _ = signing.device_pair("new")
        write_new(path, private)
    return signing.public_of(path.read_bytes())


def _fetched(ticket: Token) -> bytes:
    """The authority's certificate. Nothing is trusted on the way but its fingerprint."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    status, answer = _asked(ticket, blind, "GET", CERTIFICATE_PATH)
    try:
        same = status == 200 and hmac.compare_digest(
            signing.fingerprint(answer), ticket.fingerprint
        )
    except TrustError:
        same = False
    if not same:
        raise TrustError(
            f"{ticket.address} shows another authority than the token's: either the token is of "
            f"another server, or somebody sits between. Nothing was sent; ask for a new token"
        )
    return answer


def _asked(
    ticket: Token, context: ssl.SSLContext, method: str, path: str, body: bytes = b""
) -> tuple[int, bytes]:
    host, _, port = ticket.address.rpartition(":")
    connection = http.client.HTTPSConnection(
        host.strip("[]"), int(port), context=context, timeout=TIMEOUT_SECONDS
    )
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        data = answer.read(ANSWER_BYTES + 1)
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"{ticket.address} cannot show that it is the token's server: {error.verify_message}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise ConfigError(
            f"{ticket.address} does not answer ({error or type(error).__name__}); is the server "
            f"up, and does a firewall let its enrolment port through?"
        ) from error
    finally:
        connection.close()
    if len(data) > ANSWER_BYTES:
        raise TrustError(f"{ticket.address} answers more than {ANSWER_BYTES} bytes")
    return answer.status, data


def _refusal(status: int, answer: bytes) -> Exception:
    try:
        said = str(json.loads(answer)["error"])[:300]
    except (ValueError, KeyError, TypeError):
        said = "no reason given"
    if status in (429, 503):
        return ConfigError(f"the server cannot register the device now: {said}; try again later")
    return TrustError(f"the server refuses the token: {said}")
