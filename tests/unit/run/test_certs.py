"""The folder of keys."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from tesserafl.core.errors import ConfigError, TrustError
from tesserafl.run import certs, signing
from tesserafl.run.addresses import check_address, check_host, device_names
from tesserafl.run.keyfiles import write_new

pytest.importorskip("cryptography", reason="keys need the extra `flower`")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certs") / "keys"
    certs.create(folder, hosts=["lab.example.org", "192.0.2.7"], devices=["alice", "bob"])
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    import shutil

    shutil.copytree(made, tmp_path / "keys")
    return tmp_path / "keys"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_private_files_are_for_their_owner(made: Path) -> None:
    keys = [made / "ca.key", made / "server.key", made / "devices/alice/device.key"]
    assert [mode(key) for key in keys] == [0o600] * 3
    assert mode(made) == mode(made / "devices") == mode(made / "devices/alice") == 0o700
    assert not list(made.rglob(".*"))  # nothing half-made stays


def handshake(folder: Path, authority: Path, host: str) -> None:
    files = certs.server_files(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    client = ssl.create_default_context(cafile=authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    near, far = socket.socketpair()

    def serve() -> None:
        with near, contextlib.suppress(ssl.SSLError, OSError):
            context.wrap_socket(near, server_side=True).close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with far, client.wrap_socket(far, server_hostname=host) as secured:
            assert secured.version() == "TLSv1.3"
    finally:
        thread.join()


@pytest.mark.parametrize("host", ["lab.example.org", "192.0.2.7", "localhost", "127.0.0.1"])
def test_the_certificate_is_for_every_name_of_the_server(made: Path, host: str) -> None:
    handshake(made, made / "devices/bob/ca.crt", host)


def test_other_names_and_other_authorities_are_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(made, made / "ca.crt", "evil.example.org")
    certs.create(tmp_path / "other", hosts=["lab.example.org"])
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        handshake(made, tmp_path / "other/ca.crt", "lab.example.org")


def test_a_server_cannot_sign(made: Path) -> None:
    # Else whoever takes the server's key could pretend to be any other server of the authority.
    import subprocess

    text = subprocess.run(
        ["openssl", "x509", "-in", made / "server.crt", "-noout", "-text"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "CA:FALSE" in text and "Certificate Sign" not in text
    assert "TLS Web Server Authentication" in text


def test_days_are_kept_and_end_with_the_authority(tmp_path: Path) -> None:
    certs.create(tmp_path, hosts=["a"], days=30)
    assert 29.9 < signing.days_left((tmp_path / "server.crt").read_bytes()) < 30.1
    (tmp_path / "server.crt").unlink()
    certs.create(tmp_path, days=3650)
    ends = [signing.days_left((tmp_path / n).read_bytes()) for n in ("server.crt", "ca.crt")]
    assert ends[0] <= ends[1]
    with pytest.raises(ConfigError, match="days: 0 given; 1 to 3650"):
        certs.create(tmp_path, days=0)


def test_device_keys_are_what_flower_reads(made: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key

    bundle = made / "devices/alice"
    key = load_ssh_private_key((bundle / "device.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp384r1"
    assert (bundle / "device.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    assert (bundle / "device.pub").read_text().endswith(" alice\n")


def test_a_bundle_is_all_that_a_device_needs(made: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made / "devices/bob", tmp_path / "bundle")
    files = certs.device_files(tmp_path / "bundle")
    assert (files.name, files.server) == ("bob", "lab.example.org:8443")
    assert files.ca.read_bytes() == (made / "ca.crt").read_bytes()
    secrets = [path.name for path in (tmp_path / "bundle").iterdir() if mode(path) == 0o600]
    assert secrets == ["device.key"]  # above all not the authority's
    assert (tmp_path / "bundle/tesserafl-device.service").is_file()


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_devices_added_later_are_the_only_change(folder: Path) -> None:
    before = everything(folder)
    made = certs.create(folder, devices=["alice", "bob", "carol"])
    assert made == [folder / "devices/carol"]
    after = everything(folder)
    assert {name: after[name] for name in before} == before
    assert set(certs.device_keys(folder)) == {"alice", "bob", "carol"}
    assert certs.create(folder, hosts=["lab.example.org", "192.0.2.7"], devices=["bob"]) == []


def test_the_authoritys_key_may_lie_elsewhere(folder: Path) -> None:
    kept = (folder / "ca.key").read_bytes()
    (folder / "ca.key").unlink()
    certs.create(folder, devices=["carol"])
    (folder / "server.crt").unlink()
    with pytest.raises(TrustError, match=r"server\.crt is to be made, which needs .*ca\.key"):
        certs.create(folder)
    (folder / "ca.key").write_bytes(kept)
    key = (folder / "server.key").read_bytes()
    assert certs.create(folder) == [folder / "server.crt"]  # renewed, with the key of before
    assert (folder / "server.key").read_bytes() == key


def test_what_contradicts_is_refused_and_named(folder: Path) -> None:
    with pytest.raises(TrustError, match=r"server\.json says server .*lab.*remove"):
        certs.create(folder, hosts=["other.example.org"])
    with pytest.raises(TrustError, match="says port 8443, and 9000"):
        certs.create(folder, port=9000)
    (folder / "ca.crt").unlink()
    before = everything(folder)
    with pytest.raises(TrustError, match=r"ca\.crt does not exist.*put it back"):
        certs.create(folder, devices=["carol"])
    assert everything(folder) == before


def test_an_authority_of_another_pair_signs_nothing(folder: Path, tmp_path: Path) -> None:
    certs.create(tmp_path / "other", hosts=["b"])
    (folder / "server.crt").unlink()
    (folder / "ca.key").write_bytes((tmp_path / "other/ca.key").read_bytes())
    with pytest.raises(TrustError, match="do not belong together"):
        certs.create(folder)


def test_a_key_is_never_replaced(tmp_path: Path) -> None:
    path = write_new(tmp_path / "key", b"first")
    with pytest.raises(TrustError, match="key exists and is not replaced"):
        write_new(path, b"second")
    assert path.read_bytes() == b"first" and list(tmp_path.iterdir()) == [path]


def test_readers_refuse_what_does_not_fit(folder: Path, tmp_path: Path) -> None:
    bundle = folder / "devices/alice"
    (bundle / "device.key").chmod(0o644)
    with pytest.raises(TrustError, match=r"chmod 600 .*device\.key"):
        certs.device_files(bundle)
    (bundle / "device.key").chmod(0o600)
    (bundle / "device.pub").write_bytes((folder / "devices/bob/device.pub").read_bytes())
    with pytest.raises(TrustError, match="not one pair"):
        certs.device_files(bundle)
    certs.create(tmp_path / "other", hosts=["b"])
    (folder / "server.key").write_bytes((tmp_path / "other/server.key").read_bytes())
    with pytest.raises(TrustError, match=r"server\.crt is not of"):
        certs.server_files(folder)
    with pytest.raises(TrustError, match=r"server\.json does not exist; tessera certs"):
        certs.server_files(tmp_path / "nothing")


@pytest.mark.parametrize(
    "change",
    [{"version": 2}, {"name": "../up"}, {"server": "x:99999"}, {"server": "x;y:1"}, {"extra": 1}],
)
def test_a_devices_description_is_checked(folder: Path, change: dict[str, object]) -> None:
    path = folder / "devices/alice/device.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((TrustError, ConfigError)):
        certs.device_files(path.parent)


def test_an_expired_certificate_says_how_to_renew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=731)
    monkeypatch.setattr(signing, "_now", lambda: later)
    with pytest.raises(TrustError, match=r"server\.crt has expired; remove"):
        certs.server_files(folder)


def test_without_the_extra_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "AVAILABLE", False)
    with pytest.raises(ConfigError, match=r"pip install 'tesserafl\[flower\]'"):
        certs.create(tmp_path / "keys", hosts=["a"])
    assert not (tmp_path / "keys").exists()


def test_names_and_numbers_of_devices() -> None:
    assert device_names("3") == ("device-0", "device-1", "device-2")
    assert device_names("a,b-2") == ("a", "b-2")
    for bad in ("", "a,,b", "..", "a/b", "a b", "-a", "10001", "a" * 64, "\u0663"):
        with pytest.raises(ConfigError):
            device_names(bad)


def test_hosts_and_addresses() -> None:
    for good in ("lab", "a.example.org", "10.0.0.1", "::1"):
        assert check_host(good) == good
    for bad in ("", "https://a", "a:80", "a;b", "a b", "-a", "a..b", "1.2.3", "a\n", "a" * 254):
        with pytest.raises(ConfigError):
            check_host(bad)
    assert check_address("[::1]:80") == "[::1]:80"
    for bad in ("lab", "lab:", "lab:0", "lab:65536", "::1:80", "[a]:80", "lab:\u0663"):
        with pytest.raises(ConfigError):
            check_address(bad)
