"""The proxy's configuration; what it does is shown in tests/e2e/test_fleet_proxy.py."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from tesserafl import cli
from tesserafl.core.errors import ConfigError
from tesserafl.run import certs, proxy, signing
from tesserafl.run.proxy import FLEET_PATHS, ProxySettings, render

FILES = certs.ServerFiles(
    folder=Path("/k"),
    ca=Path("/k/ca.crt"),
    certificate=Path("/k/server.crt"),
    key=Path("/k/server.key"),
    hosts=("lab",),
    port=8443,
    enrol_port=8444,
)


def test_a_superlink_that_others_reach_is_refused() -> None:
    for good in ("127.0.0.1:8000", "127.9.9.9:8000", "[::1]:8000", "localhost:1"):
        assert f"server {good};" in render(FILES, Path("/r"), ProxySettings(superlink=good))
    for bad in ("0.0.0.0:8000", "192.0.2.1:8000", "[::]:8000", "lab:8000", "127.0.0.1"):
        with pytest.raises(ConfigError):
            render(FILES, Path("/r"), ProxySettings(superlink=bad))


def test_nothing_can_be_written_into_the_configuration() -> None:
    for path in ('/k/";}', "/k/$host", "/k/a;b", "/k/a\nb", "/k/{a", "/k/\u00e9"):
        with pytest.raises(ConfigError, match="nginx reads"):
            render(replace(FILES, key=Path(path)), Path("/r"), ProxySettings())
        with pytest.raises(ConfigError, match="nginx reads"):
            render(FILES, Path(path), ProxySettings())
    for listen in ("", "lab", "0.0.0.0; evil", "*"):
        with pytest.raises(ConfigError, match="is no IP address"):
            render(FILES, Path("/r"), ProxySettings(listen=listen))
    for size in (0, 5, 1025):
        with pytest.raises(ConfigError, match="max_body_mib"):
            render(FILES, Path("/r"), ProxySettings(max_body_mib=size))
    with pytest.raises(ConfigError, match="message_mib must be positive"):
        render(FILES, Path("/r"), ProxySettings(message_mib=0.0))


def test_larger_messages_have_longer_lists_of_parts() -> None:
    def bound(mib: float) -> int:
        found = re.search(
            r"\(\?:push-messages\)\$ \{\s*client_max_body_size (\d+);",
            render(FILES, Path("/r"), ProxySettings(message_mib=mib)),
        )
        assert found is not None
        return int(found[1])

    assert bound(32.0) == 1024 + 96 * (7 + 12)
    assert bound(0.001) < bound(32.0) < bound(500.0) == 1024 + 96 * (100 + 12)


def test_the_open_paths_are_those_that_a_device_of_flower_calls() -> None:
    # What Flower's device calls in this version, read from its source: an upgrade must look here.
    flwr = pytest.importorskip("flwr", reason="Flower is not installed (extra `flower`)")
    source = Path(flwr.__file__).parent / "supernode/fleet_http_client.py"
    called = set(re.findall(r'path="/v1/fleet/([a-z-]+)"', source.read_text("utf-8")))
    assert called - {"register-node", "unregister-node"} == set(FLEET_PATHS)


needs_keys = pytest.mark.skipif(
    not signing.AVAILABLE, reason="keys need the extra `flower`, which is not installed"
)


@needs_keys
@pytest.mark.skipif(proxy.program() is None, reason="nginx is not installed (nginx-light)")
@pytest.mark.parametrize("listen", ["0.0.0.0", "::1"])
def test_nginx_takes_the_file_that_the_command_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], listen: str
) -> None:
    folder = tmp_path / "my keys"
    cli.main(["certs", str(folder), "--server", "lab", "--devices", "a,b"])
    assert str(folder / "devices/b") in capsys.readouterr().out
    with pytest.raises(SystemExit):  # nginx's own folder cannot hold a space
        cli.main(["proxy", str(folder)])
    assert "choose a plainer folder" in capsys.readouterr().err
    folder = folder.rename(tmp_path / "keys")
    cli.main(["proxy", str(folder), "--listen", listen])
    assert "Start it with" in capsys.readouterr().out
    command = [*proxy.start_command(folder / "nginx.conf"), "-t"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


@needs_keys
def test_the_command_prints_a_token_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["certs", str(tmp_path / "keys"), "--server", "lab"])
    capsys.readouterr()
    cli.main(["token", str(tmp_path / "keys"), "--name", "alice"])
    out = capsys.readouterr().out
    assert out.startswith("tessera1-") and out.count("\n") == 1
    with pytest.raises(SystemExit) as caught:
        cli.main(["token", str(tmp_path / "other"), "--name", "alice"])
    assert caught.value.code == 1
    assert "tessera certs" in capsys.readouterr().err
