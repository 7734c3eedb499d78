"""The device's systemd unit."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from tesserafl.core.errors import ConfigError
from tesserafl.run.systemd import UNIT, device_unit


def parsed(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_a_device_comes_back_but_not_too_soon() -> None:
    unit = parsed(device_unit("alice"))
    service = unit["Service"]
    assert service["Restart"] == "always" and int(service["RestartSec"]) >= 55
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"  # else it gives up after five starts
    assert service["User"] == "tesserafl" and service["StateDirectory"] == "tesserafl"
    assert service["NoNewPrivileges"] == "yes" and service["CapabilityBoundingSet"] == ""
    assert service["PrivateDevices"] == "yes"
    assert parsed(device_unit("a", gpu=True))["Service"]["PrivateDevices"] == "no"


def test_arguments_reach_the_command_as_they_are() -> None:
    hostile = ("join", "/srv/my data", '100% "sure" $HOME', "back\\slash", "; rm -rf /", "")
    text = device_unit("alice", arguments=hostile)
    assert (
        'ExecStart=/opt/tesserafl/bin/tessera join "/srv/my data" '
        '"100%% \\"sure\\" $$HOME" "back\\\\slash" "; rm -rf /" ""\n'
    ) in text
    for bad in ("a\nExecStartPre=/bin/evil", "a\0"):
        with pytest.raises(ConfigError, match="control character"):
            device_unit("alice", arguments=(bad,))
    for path in ("tessera", "/opt/a b", "/opt/$x", "/a\n"):
        with pytest.raises(ConfigError, match="absolute path"):
            device_unit("alice", executable=path)
    with pytest.raises(ConfigError, match="device name"):
        device_unit("alice\n[Service]")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    path = tmp_path / UNIT
    # The command must exist for the check; all else is as shipped.
    text = device_unit("alice", executable="/bin/true")
    path.write_text(text)
    call = ["systemd-analyze", "verify", "--man=no", str(path)]
    done = subprocess.run(call, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if UNIT in line]
    assert done.returncode == 0 and not said, done.stdout + done.stderr
    # The check itself sees a misspelt setting.
    path.write_text(text.replace("ProtectClock", "ProtectClocks"))
    done = subprocess.run(call, capture_output=True, text=True)
    assert "ProtectClocks" in done.stdout + done.stderr
