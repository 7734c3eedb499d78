"""Names of devices and addresses of servers: what they may be.

They end up in certificates, in nginx's and systemd's files and in commands, so they hold nothing
that has a meaning there.
"""

from __future__ import annotations

import ipaddress
import re

from tesserafl.core.errors import ConfigError

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*")


def device_names(asked: str) -> tuple[str, ...]:
    """`3` is device-0, device-1 and device-2; anything else is names with commas between them.

    Raises:
        ConfigError: neither a number from 0 to 10000 nor names.
    """
    if asked.isascii() and asked.isdigit():
        if int(asked) > 10_000:
            raise ConfigError(f"devices: {asked} given; at most 10000 are made at once")
        return tuple(f"device-{number}" for number in range(int(asked)))
    return tuple(check_name(name.strip()) for name in asked.split(","))


def check_name(name: str) -> str:
    """The name itself; ConfigError if no device may be called so."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"device name {name!r}: a letter first, then letters, digits, - and _, at most 63"
        )
    return name


def joined(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_address(address: str) -> str:
    """The address itself; ConfigError if it is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    check_host(bare)
    in_range = port.isascii() and port.isdigit() and 1 <= int(port) <= 65535
    if not in_range or (":" in bare) != (bare != host):
        raise ConfigError(
            f"address {address!r}: HOST:PORT is needed, [HOST]:PORT for IPv6, port 1 to 65535"
        )
    return address


def check_host(host: str) -> str:
    """The host itself; ConfigError if it is neither a name nor an address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
            raise ConfigError(
                f"server {host!r}: a DNS name or an IP address is needed, without https:// and port"
            ) from None
    return host
