"""Files that hold keys: for their owner alone, whole or absent, never replaced."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tesserafl.core.errors import TrustError

_Kind = TypeVar("_Kind", bound=BaseModel)


def write_new(path: Path, data: bytes, mode: int = 0o600) -> Path:
    """Write a file that must not exist yet; it appears whole or not at all.

    Raises:
        TrustError: it exists.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # unlike a rename it never replaces
    except FileExistsError as error:
        raise TrustError(
            f"{path} exists and is not replaced; move it away if it is not needed any more"
        ) from error
    finally:
        temporary.unlink()
    return path


def private_folder(folder: Path) -> None:
    """Make the folder, parents too, for its owner alone."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)


def read_valid(path: Path, kind: type[_Kind], remedy: str) -> _Kind:
    """The value in a JSON file; TrustError with `remedy` if it is missing or damaged."""
    try:
        return kind.model_validate_json(there(path, remedy).read_bytes())
    except ValidationError as error:
        raise TrustError(f"{path} is damaged: {error.errors()[0]['msg']}; {remedy}") from error


def there(path: Path, remedy: str = "make it with tessera certs, or put it back") -> Path:
    """The path itself; TrustError if there is no file."""
    if not path.is_file():
        raise TrustError(f"{path} does not exist; {remedy}")
    return path


def kept(path: Path) -> Path:
    """The path of a private key; TrustError if it is missing or others can read it."""
    if there(path).stat().st_mode & 0o077:
        raise TrustError(f"{path} can be read by others on this machine; chmod 600 {path}")
    return path
