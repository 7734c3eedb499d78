"""The systemd unit that keeps a device joined: restarts, no root, little in sight."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tesserafl.core.errors import ConfigError
from tesserafl.run.addresses import check_name

UNIT = "tesserafl-device.service"
"""The unit's file name."""
USER = "tesserafl"
"""Whom it runs as: `useradd --system --no-create-home tesserafl`."""
EXECUTABLE = "/opt/tesserafl/bin/tessera"
"""Where the template expects the command, a virtual environment under /opt."""
STATE = "/var/lib/tesserafl"
"""The device's folder: its bundle, what its worker keeps, nothing else is writable."""

_TEMPLATE = """\
# {name}, a device of TesseraFL. To install it, as root:
#   useradd --system --no-create-home {user}
#   install -d -o {user} -g {user} -m 700 {state}
#   cp -r THIS_FOLDER {state}/device && chown -R {user}: {state}/device
#   cp {unit} /etc/systemd/system/ && systemctl enable --now {unit}
[Unit]
Description=TesseraFL device {name}
# A server refuses signatures from a clock that is more than 5 s ahead or 305 s behind.
After=network-online.target time-sync.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={command}
User={user}
StateDirectory=tesserafl
StateDirectoryMode=0700
WorkingDirectory={state}
Environment=HOME={state} PYTHONUNBUFFERED=1
# A device that returns before its server has missed it, within about 50 s, is refused.
Restart=always
RestartSec=60
KillMode=mixed
TimeoutStopSec=30
UMask=0077

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ProtectProc=invisible
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
PrivateTmp=yes
PrivateDevices={private_devices}
LockPersonality=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
# MemoryDenyWriteExecute stays off: compiled kernels are written and then run.

[Install]
WantedBy=multi-user.target
"""


def device_unit(
    name: str,
    *,
    executable: str = EXECUTABLE,
    arguments: Sequence[str] = ("join", f"{STATE}/device"),
    gpu: bool = False,
) -> str:
    """The text of the unit of the device `name`.

    `executable`: absolute path of `tessera`. `arguments`: the call, for instance
    `("join", "/var/lib/tesserafl/device", "--data.path", "/srv/data")`. `gpu`: leave the
    machine's devices in sight.

    Raises:
        ConfigError: a path that is not absolute and plain, or an argument with a line's end in it.
    """
    if not re.fullmatch(r"/[A-Za-z0-9_./+-]+", executable):
        raise ConfigError(
            f"systemd needs the command's absolute path of plain characters, not {executable!r}"
        )
    return _TEMPLATE.format(
        name=check_name(name),
        unit=UNIT,
        user=USER,
        state=STATE,
        command=" ".join(map(_quoted, (executable, *arguments))),
        private_devices="no" if gpu else "yes",
    )


def _quoted(argument: str) -> str:
    """As systemd.syntax(7) and systemd.service(5) read it back: no variable, no specifier."""
    if re.search(r"[\x00-\x1f\x7f]", argument):
        raise ConfigError(f"the unit's argument {argument!r} holds a control character")
    text = argument.replace("\\", "\\\\").replace('"', '\\"')
    text = text.replace("%", "%%").replace("$", "$$")
    plain = re.fullmatch(r"[A-Za-z0-9_@:,./+=-]+", text)
    return text if plain else f'"{text}"'
