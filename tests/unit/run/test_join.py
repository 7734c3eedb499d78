"""The way of a device to its server, its socket, and its SuperNode that is kept up."""

from __future__ import annotations

import os
import stat
import sys
import threading
import weakref
from pathlib import Path

import pytest
from devices_at_hand import parts

from tesserafl.core.errors import CheckpointError, ConfigError, TrustError
from tesserafl.engines.orders import (
    Bye,
    Envelope,
    Missing,
    Refusal,
    Store,
    Stranger,
    read_envelope,
    reply_of,
    sealed,
    write_envelope,
)
from tesserafl.run import certs, join
from tesserafl.run.files import alone_in
from tesserafl.run.holding import Local
from tesserafl.run.join import Line, line_to, listening

RUN = "c" * 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    certs.create(folder, hosts=["fl.example.org"], devices=["alice"], port=9443)
    return folder / "devices" / "alice"


@pytest.mark.parametrize("place", ["127.0.0.1:8443", "localhost:1", "[::1]:8443", "127.9.9.9:80"])
def test_this_machine_may_be_reached_without_keys(place):
    assert line_to(place) == Line(address=place, keys=None)


@pytest.mark.parametrize("place", ["192.168.1.2:8443", "fl.example.org:8443", "[2001:db8::1]:8443"])
def test_another_machine_may_not(place):
    with pytest.raises(ConfigError, match="without keys everybody could read along"):
        line_to(place)


@pytest.mark.parametrize("place", ["nowhere", "127.0.0.1", "localhost:http", "127.0.0.1:0"])
def test_what_is_neither_a_folder_nor_an_address_is_refused(place):
    with pytest.raises(ConfigError):
        line_to(place)


def test_a_bundle_names_the_server_and_the_device(bundle):
    line = line_to(str(bundle))
    assert line.address == "fl.example.org:9443"
    assert line.name_of("") == line.name_of("alice") == "alice"
    with pytest.raises(ConfigError, match="are 'alice''s, not 'bob''s"):
        line.name_of("bob")
    assert line.folder_of("alice") == bundle / "state"


def test_a_damaged_bundle_is_refused(tmp_path):
    with pytest.raises(TrustError, match="bundle"):
        line_to(str(tmp_path))


def test_without_keys_a_device_needs_a_name_that_may_be_one():
    line = Line(address="127.0.0.1:1", keys=None)
    assert line.name_of("bob") == "bob" and line.folder_of("bob") == Path("bob-state")
    for name in ("", "../bob", "b b", "0"):
        with pytest.raises(ConfigError, match="device name"):
            line.name_of(name)


def asked(path: Path, envelope: Envelope) -> Envelope | None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        with connection.makefile("rwb") as pipe:
            write_envelope(pipe, envelope)
            return read_envelope(pipe)


def test_the_socket_answers_its_owner_and_outlives_bad_callers(tmp_path):
    import socket

    (resident,) = parts(tmp_path, [0]).values()
    with listening(resident) as path:
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        for junk in (b"", b"junk that is no frame at all", b"TSRA"):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(str(path))
                connection.sendall(junk)
        assert reply_of(asked(path, sealed(Store(run=RUN)))) == Stranger()
        refusal = reply_of(asked(path, Envelope(head=b"junk")))
        assert isinstance(refusal, Refusal) and "head is wrong" in refusal.text
        # A fault of ours ends one answer and not the device.
        resident.answer, answer = None, resident.answer
        assert asked(path, sealed(Store(run=RUN))) is None
        resident.answer = answer
        assert reply_of(asked(path, sealed(Bye(run=RUN)))) == Missing(parcels=[])
        assert resident.over


def test_who_hands_an_order_over_does_not_keep_it():
    """Its parcels would take the device's memory while it trains."""
    kept = []

    class Forgetful:
        def answer(self, envelope):
            seen = weakref.ref(envelope)
            del envelope
            kept.append(seen())
            return sealed(Stranger())

    with listening(Forgetful()) as path:
        assert reply_of(asked(path, sealed(Store(run=RUN)))) == Stranger()
    assert kept == [None]
    assert not path.exists()


def test_the_supernode_is_kept_up_and_told_of_the_end(tmp_path, monkeypatch):
    """With a program in its place that ends at once two times."""
    told = tmp_path / "told"
    program = tmp_path / "supernode"
    program.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        f"told = open({str(told)!r}, 'a')\n"
        "print(*sys.argv[1:], file=told, flush=True)\n"
        f"if len(open({str(told)!r}).readlines()) < 3: sys.exit(3)\n"
        "def end(*_):\n"
        "    print('interrupted', file=told, flush=True)\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGINT, end)\n"
        "print('ready', file=told, flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(join, "program", lambda name: str(program))
    monkeypatch.setattr(join, "_PAUSE", 0.02)
    made = []

    class Resident(join.Resident):
        def __init__(self, **values):
            super().__init__(**values)
            made.append(self)

    monkeypatch.setattr(join, "Resident", Resident)
    line = Line(address="127.0.0.1:9", keys=None)
    work = threading.Thread(
        target=join.join,
        args=(line, "bob", tmp_path / "state", Local(client=0)),
        kwargs={"once": True, "again_seconds": 0.05},
    )
    work.start()
    while not told.exists() or "ready" not in told.read_text():
        assert work.is_alive()
        os.sched_yield()
    alone = alone_in(tmp_path / "state")
    with pytest.raises(CheckpointError, match="another process works in"), alone:
        pass
    made[0].over = True
    work.join()
    lines = told.read_text().splitlines()
    starts = [text for text in lines if text.startswith("--superlink 127.0.0.1:9 --host 127.0.0.1")]
    assert len(starts) == 3 and lines[-1] == "interrupted"
    assert all("--insecure" in text and "--node-config resident=" in text for text in starts)
    assert len({text.rsplit("--port ")[1] for text in starts}) >= 1
