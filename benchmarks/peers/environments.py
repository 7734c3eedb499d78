"""One virtual environment for each peer, made when it is first asked for.

The requirements name exact versions. torch comes first and alone: with its exact version pip takes
a local CPU wheel where there is one, else it would fetch gigabytes of CUDA libraries.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"
INSTALL_SECONDS = 1800


class NotInstalled(Exception):
    """An environment could not be made; says why."""


def interpreter(name: str | None, folder: Path) -> Path:
    """The Python of an environment.

    Args:
        name: of `requirements/NAME.txt`; None: the Python that runs this, which has TesseraFL.
        folder: where the environments are.

    Raises:
        NotInstalled: pip failed.
    """
    if name is None:
        return Path(sys.executable)
    wanted = (REQUIREMENTS / f"{name}.txt").read_text()
    place = folder.absolute() / name
    python, stamp = place / "bin" / "python", place / ".installed"
    digest = hashlib.sha256(wanted.encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return python
    print(f"installing the environment of {name}", file=sys.stderr, flush=True)
    shutil.rmtree(place, ignore_errors=True)
    venv.create(place, with_pip=True)
    lines = [line for line in wanted.splitlines() if line and not line.startswith("#")]
    first = [line for line in lines if line.startswith("torch==")]
    for packages in (first, lines):
        if packages:
            _pip(python, packages)
    stamp.write_text(digest)
    return python


def _pip(python: Path, packages: list[str]) -> None:
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*command, *packages],
            capture_output=True,
            text=True,
            timeout=INSTALL_SECONDS,
            env={**os.environ, "PIP_NO_INPUT": "1"},
        )
    except subprocess.TimeoutExpired as error:
        raise NotInstalled(f"pip took more than {INSTALL_SECONDS} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled((errors or done.stderr.splitlines() or ["pip failed"])[-1])
