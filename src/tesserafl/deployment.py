"""The commands that prepare a deployment: keys, join tokens and the proxy. They need no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from tesserafl.run import certs as keys
from tesserafl.run.proxy import ProxySettings


@dataclass(frozen=True)
class CertsOptions:
    """Make the keys and certificates of a server and its devices; what is there already stays."""

    folder: tyro.conf.Positional[Path]
    """where the keys are, or will be"""
    server: str = ""
    """its DNS names and IP addresses, with commas between, devices use the first; needed once"""
    devices: str = ""
    """devices that get a key: a number, or names with commas between; new ones are added"""
    days: int = keys.DAYS
    """validity of the server's certificate"""
    port: int | None = None
    """where devices reach the server, 8443 if not given; fixed with the server's name"""
    enrol_port: int | None = None
    """where devices with a token register, 8444 if not given; fixed with the server's name"""


@dataclass(frozen=True)
class TokenOptions:
    """Make a line of text with which a device makes its own key and registers it, once."""

    folder: tyro.conf.Positional[Path]
    """the folder of tessera certs"""
    name: str
    """what the device will be called; an unused token of the same name stops working"""
    days: float = 7.0
    """how long the token is good"""


@dataclass(frozen=True)
class ProxyOptions:
    """Write FOLDER/nginx.conf: a proxy by which devices reach the fleet path and nothing else."""

    folder: tyro.conf.Positional[Path]
    """the folder of tessera certs"""
    settings: Annotated[ProxySettings, tyro.conf.arg(name="")] = field(
        default_factory=ProxySettings
    )


def certs(args: list[str]) -> None:
    """`tessera certs`."""
    options = tyro.cli(CertsOptions, args=args, prog="tessera certs")
    made = keys.create(
        options.folder,
        hosts=[host.strip() for host in options.server.split(",")] if options.server else (),
        devices=keys.device_names(options.devices) if options.devices else (),
        days=options.days,
        port=options.port,
        enrol_port=options.enrol_port,
    )
    for path in made:
        print(path)
    if not made:
        print(f"{options.folder} is complete; nothing was made")
    if any(path.parent.name == "devices" for path in made):
        print("Copy each device's folder to it; whoever has the folder can join as that device.")


def token(args: list[str]) -> None:
    """`tessera token`: the token alone on standard output."""
    from tesserafl.run.enrol import create_token

    options = tyro.cli(TokenOptions, args=args, prog="tessera token")
    print(create_token(options.folder, options.name, options.days))


def proxy(args: list[str]) -> None:
    """`tessera proxy`: the file, and how to start it."""
    from tesserafl.run.proxy import program, start_command, write

    options = tyro.cli(ProxyOptions, args=args, prog="tessera proxy")
    path = write(keys.server_files(options.folder), options.settings)
    print(path)
    print(f"Start it with  {' '.join(start_command(path))}")
    if program() is None:
        print("nginx is not installed here; on Debian: apt-get install nginx-light")


COMMANDS: dict[str, Callable[[list[str]], None]] = {"certs": certs, "token": token, "proxy": proxy}
"""What `tessera NAME` calls."""
