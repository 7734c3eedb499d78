"""The folder of keys: an authority, the server's certificate, a bundle for every device.

    FOLDER/                       0700
        ca.key  ca.crt            the authority; ca.key may be kept elsewhere between calls
        server.key  server.crt    for the server and its proxy
        server.json               the server's names and ports
        devices/NAME/             what one device needs: copy this folder to it
            device.key  device.pub  ca.crt  device.json  tesserafl-device.service

`create` makes what is missing and never replaces a key.
"""

from __future__ import annotations

import shutil
import ssl
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from tesserafl.core.errors import ConfigError, TrustError
from tesserafl.run import signing
from tesserafl.run.addresses import check_address, check_host, check_name, device_names, joined
from tesserafl.run.keyfiles import kept, private_folder, read_valid, there, write_new
from tesserafl.run.systemd import UNIT, device_unit

__all__ = [
    "DAYS",
    "DeviceFiles",
    "ServerFiles",
    "create",
    "device_files",
    "device_keys",
    "device_names",
    "fill_bundle",
    "server_files",
]

PORT = 8443
"""Where devices reach the fleet path, that is the proxy."""
ENROL_PORT = 8444
"""Where devices with a token register their key."""
DAYS = 730
"""Validity of a server's certificate."""
LOCAL = ("localhost", "127.0.0.1")
"""What every server is called from its own machine, where the proxy reaches it."""

_Port = Annotated[int, Field(ge=1, le=65535)]


class _Server(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Annotated[int, Field(ge=1, le=1)] = 1
    hosts: Annotated[list[str], Field(min_length=1)]
    port: _Port
    enrol_port: _Port


class _Device(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    version: Annotated[int, Field(ge=1, le=1)] = 1
    name: str
    server: str


@dataclass(frozen=True, kw_only=True)
class ServerFiles:
    """What a server needs; every file exists and fits the others."""

    folder: Path
    ca: Path
    certificate: Path
    key: Path
    hosts: tuple[str, ...]
    port: int
    enrol_port: int

    @property
    def address(self) -> str:
        """HOST:PORT under which devices reach the fleet path."""
        return joined(self.hosts[0], self.port)


@dataclass(frozen=True, kw_only=True)
class DeviceFiles:
    """What a device needs; every file exists and the keys are one pair."""

    folder: Path
    ca: Path
    key: Path
    public: Path
    name: str
    server: str
    """HOST:PORT."""


def create(
    folder: Path,
    *,
    hosts: Sequence[str] = (),
    devices: Sequence[str] = (),
    days: int = DAYS,
    port: int | None = None,
    enrol_port: int | None = None,
) -> list[Path]:
    """Make what is missing of a folder of keys; returns the paths that are new.

    `hosts`: the server's names and addresses, the one that devices use first. Needed once.
    `devices`: names; those that have a bundle already are left as they are.

    Raises:
        ConfigError: a name, a port or a number of days that cannot be, or no server's name.
        TrustError: what is there contradicts what is asked, or is incomplete.
    """
    signing.needed()
    if not 1 <= days <= signing.AUTHORITY_DAYS:
        raise ConfigError(f"days: {days} given; 1 to {signing.AUTHORITY_DAYS} are allowed")
    for device in devices:
        check_name(device)
    private_folder(folder)
    server, made = _settled(folder, hosts, port, enrol_port)
    made += _made_authority(folder)
    made += _made_server(folder, server, days)
    bundles = folder / "devices"
    private_folder(bundles)
    address = joined(server.hosts[0], server.port)
    for device in dict.fromkeys(devices):
        if not (bundles / device).exists():
            made.append(_made_bundle(bundles, device, address, folder / "ca.crt"))
    return made


def server_files(folder: Path) -> ServerFiles:
    """The server's files, checked.

    Raises:
        TrustError: one is missing, damaged, expired, readable for others or of another pair.
    """
    server = read_valid(folder / "server.json", _Server, f"tessera certs {folder} --server HOST")
    files = ServerFiles(
        folder=folder,
        ca=there(folder / "ca.crt"),
        certificate=there(folder / "server.crt"),
        key=kept(folder / "server.key"),
        hosts=tuple(server.hosts),
        port=server.port,
        enrol_port=server.enrol_port,
    )
    again = f"remove {files.certificate} and call tessera certs {folder}; the key and devices stay"
    if signing.days_left(files.certificate.read_bytes()) <= 0:
        raise TrustError(f"{files.certificate} has expired; {again}")
    if signing.days_left(files.ca.read_bytes()) <= 0:
        raise TrustError(f"{files.ca} has expired; begin a new folder, devices need its ca.crt")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(files.certificate, files.key)
    except ssl.SSLError as error:
        raise TrustError(f"{files.certificate} is not of {files.key} ({error}); {again}") from error
    return files


def device_files(folder: Path) -> DeviceFiles:
    """A device's files, checked; `folder` is a bundle, or what `enrol` filled.

    Raises:
        TrustError: one is missing, damaged, readable for others or of another pair.
    """
    device = read_valid(
        folder / "device.json", _Device, f"copy the device's whole bundle to {folder}"
    )
    files = DeviceFiles(
        folder=folder,
        ca=there(folder / "ca.crt"),
        key=kept(folder / "device.key"),
        public=there(folder / "device.pub"),
        name=check_name(device.name),
        server=check_address(device.server),
    )
    if not signing.belong_together(files.key.read_bytes(), files.public.read_bytes()):
        raise TrustError(f"{files.key} and {files.public} are not one pair; copy the bundle again")
    signing.fingerprint(files.ca.read_bytes())
    return files


def device_keys(folder: Path) -> dict[str, Path]:
    """Public keys of the devices that may join, by name; those that enrolled are among them."""
    found = sorted((folder / "devices").glob("[!.]*/device.pub"))
    return {check_name(path.parent.name): path for path in found}


def fill_bundle(folder: Path, name: str, server: str, authority: bytes) -> None:
    """Write what a bundle holds beside the key; device.json last, as it makes the bundle whole."""
    (folder / "ca.crt").write_bytes(authority)
    (folder / UNIT).write_text(device_unit(name), encoding="utf-8")
    text = _Device(name=name, server=server).model_dump_json(indent=1)
    (folder / "device.json").write_text(text + "\n", encoding="utf-8")


def _settled(
    folder: Path, hosts: Sequence[str], port: int | None, enrol_port: int | None
) -> tuple[_Server, list[Path]]:
    path = folder / "server.json"
    if path.exists():
        server = read_valid(path, _Server, "put it back")
        asked = {"server": list(hosts), "port": port, "enrol-port": enrol_port}
        has = {"server": server.hosts, "port": server.port, "enrol-port": server.enrol_port}
        for flag, value in asked.items():
            if value and value != has[flag]:
                raise TrustError(
                    f"{path} says {flag} {has[flag]}, and {value} is asked; to change it remove "
                    f"{path} and {folder / 'server.crt'} and call again: keys and devices stay, "
                    f"but each device's device.json names the old server"
                )
        return server, []
    if not hosts:
        raise ConfigError(f"{folder} has no server yet; give its name: --server HOST[,HOST...]")
    server = _Server(
        hosts=[check_host(host) for host in dict.fromkeys(hosts)],
        port=PORT if port is None else port,
        enrol_port=ENROL_PORT if enrol_port is None else enrol_port,
    )
    return server, [write_new(path, (server.model_dump_json(indent=1) + "\n").encode(), 0o644)]


def _made_authority(folder: Path) -> list[Path]:
    key, certificate = folder / "ca.key", folder / "ca.crt"
    if certificate.exists():
        return []
    if key.exists() and (folder / "server.crt").exists():
        raise TrustError(
            f"{certificate} does not exist, but devices may have it already; put it back. If none "
            f"has, remove {key} and {folder / 'server.crt'} and call again"
        )
    made = [] if key.exists() else [write_new(key, signing.new_key())]
    return [*made, write_new(certificate, signing.authority(key.read_bytes()), 0o644)]


def _made_server(folder: Path, server: _Server, days: int) -> list[Path]:
    key, certificate, signer = (folder / name for name in ("server.key", "server.crt", "ca.key"))
    if certificate.exists():
        kept(key)
        return []
    if not signer.exists():
        raise TrustError(f"{certificate} is to be made, which needs {signer}; put it back")
    made = [] if key.exists() else [write_new(key, signing.new_key())]
    hosts = list(dict.fromkeys([*server.hosts, *LOCAL]))
    signed = signing.server_certificate(
        signer.read_bytes(), (folder / "ca.crt").read_bytes(), key.read_bytes(), hosts, days
    )
    return [*made, write_new(certificate, signed, 0o644)]


def _made_bundle(bundles: Path, name: str, server: str, authority: Path) -> Path:
    private, public = signing.device_pair(name)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=bundles))  # 0700
    try:
        write_new(folder / "device.key", private)
        write_new(folder / "device.pub", public, 0o644)
        fill_bundle(folder, name, server, authority.read_bytes())
        folder.rename(bundles / name)  # a bundle is there as a whole or not at all
    except BaseException:
        shutil.rmtree(folder)
        raise
    return bundles / name
