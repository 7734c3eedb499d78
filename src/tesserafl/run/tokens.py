"""FOLDER/tokens.json: hashes of the secrets of tokens, until when they are good, and who took them.

Every change holds a lock on FOLDER/tokens.lock: `tessera token` and the enrolment server are two
processes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tesserafl.core.errors import TrustError
from tesserafl.run.files import write_atomic

SECRET_BYTES = 16
"""128 bits from the system: not to be guessed, so a plain hash of it is enough."""
HASH_BYTES = 32


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    secret_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    expires: float
    public_key: str | None = None


class _Tokens(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Annotated[int, Field(ge=1, le=1)] = 1
    tokens: dict[str, _Entry] = {}


def add_token(folder: Path, name: str, secret: bytes, seconds: float) -> None:
    """Note the hash of a secret for `name`; an older one of that name goes, expired ones too."""
    now = time.time()
    with _locked(folder) as tokens:
        kept = {other: entry for other, entry in tokens.tokens.items() if entry.expires > now}
        kept[name] = _Entry(secret_sha256=_hash(secret), expires=now + seconds)
        tokens.tokens = kept


def take_token(folder: Path, secret: bytes, public_key: str) -> str:
    """The name that the secret stands for; from now on it is good for this key alone.

    Raises:
        TrustError: no such token, expired, or taken by another key. The words are the same for a
            token that never was and one that is not any more.
    """
    asked = _hash(secret)
    with _locked(folder) as tokens:
        found = None
        for name, entry in tokens.tokens.items():
            # All are compared, each in constant time: how long it takes tells nothing.
            if hmac.compare_digest(entry.secret_sha256, asked):
                found = name
        if found is None or tokens.tokens[found].expires <= time.time():
            raise TrustError("unknown or expired; ask for a new one")
        entry = tokens.tokens[found]
        if entry.public_key not in (None, public_key):
            raise TrustError("used already by another key; ask for a new one")
        tokens.tokens[found] = entry.model_copy(update={"public_key": public_key})
        return found


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[_Tokens]:
    """The tokens; what the block changed of them is written when it ends without an error."""
    path = folder / "tokens.json"
    descriptor = os.open(folder / "tokens.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            data = path.read_bytes() if path.exists() else b"{}"
            tokens = _Tokens.model_validate_json(data)
        except ValidationError as error:
            raise TrustError(
                f"{path} is damaged: {error.errors()[0]['msg']}; remove it and make new tokens"
            ) from error
        yield tokens
        write_atomic(path, tokens.model_dump_json(indent=1).encode() + b"\n")
    finally:
        os.close(descriptor)
