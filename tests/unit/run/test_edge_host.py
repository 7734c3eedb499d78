"""The processes of an edge, with scripts in the place of Flower's programs."""

from __future__ import annotations

import fcntl
import socket
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from devices_at_hand import PostAtHand, experiment_for_four, parts

from tesserafl.core.errors import CheckpointError, TesseraError
from tesserafl.engines import remote
from tesserafl.engines.attendance import Disowned
from tesserafl.engines.orders import Bye, Hello, Store, reply_of, sealed
from tesserafl.run import edge_host, join, serve
from tesserafl.run.edge import EdgeResident
from tesserafl.run.edge_host import edge_noted, host, is_edge
from tesserafl.run.experiment import to_json
from tesserafl.run.files import read_json
from tesserafl.run.holding import Local
from tesserafl.run.hosting import Hosting
from tesserafl.run.join import Line
from tesserafl.run.serve import Link
from tesserafl.run.setup import prepare

RUN = "b" * 32
LISTENS = """
port = int(sys.argv[sys.argv.index("--port") + 1])
server = socket.create_server(("127.0.0.1", port))
time.sleep(60)
"""


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Scripts in the place of Flower's programs: a link that listens, a run that is started."""

    def put(name, text):
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\nimport sys, json, time, socket\n{text}\n")
        path.chmod(0o755)

    put("flower-superlink", LISTENS)
    put("flower-supernode", "time.sleep(60)")
    put("flwr", "print(json.dumps({'success': True, 'run-id': 7}))")
    for module in (serve, join):
        monkeypatch.setattr(module, "program", lambda name: str(tmp_path / name))
        monkeypatch.setattr(module, "_PAUSE", 0.01)
    monkeypatch.setattr(edge_host, "_PAUSE", 0.01)
    monkeypatch.setattr(edge_host, "die_with_parent", lambda how: None)
    return put


@pytest.fixture
def hosted(tmp_path):
    """Starts an edge in a thread; what it ended with."""
    ends = []

    def start(**changes):
        line, folder = Line(address="127.0.0.1:1", keys=None), tmp_path / "edge-a"
        link = Link(port=_free())

        def work():
            try:
                host(line, "edge-a", folder, link, Hosting(), Local(), once=True, **changes)
                ends.append(None)
            except TesseraError as error:
                ends.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread, folder, ends

    return start


def _free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Lost(PostAtHand):
    def nodes(self):
        raise Disowned("Flower refuses this process")


def _until(there):
    for _ in range(3000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")


def test_an_edge_answers_the_cloud_at_its_socket_until_the_run_is_over(programs, hosted, tmp_path):
    thread, folder, ends = hosted()
    _until(lambda: is_edge(folder))
    post = PostAtHand(residents=parts(tmp_path, (0,)))
    app = threading.Thread(target=edge_noted, args=(post, folder), daemon=True)
    app.start()
    path = read_json(folder / "edge.json")["socket"]
    _until(lambda: Path(path).exists())
    assert thread.is_alive()

    def ask(order):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(path)
            with connection.makefile("rwb") as pipe:
                join.write_envelope(pipe, sealed(order))
                return reply_of(join.read_envelope(pipe))

    assert ask(Store(run=RUN)).kind == "stranger"
    assert not (folder / "over.json").exists()
    assert ask(Bye(run=RUN)).kind == "missing"
    thread.join(30)
    assert ends == [None]
    assert not Path(path).exists()  # its place went with it


def test_what_the_server_app_cannot_do_ends_the_edge(programs, hosted, tmp_path):
    thread, folder, ends = hosted()
    _until(lambda: is_edge(folder))
    (folder / "edge.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"edge\.json is damaged"):
        edge_noted(PostAtHand(residents={}), folder)
    thread.join(30)
    assert "edge.json is damaged" in str(ends[0])


def test_a_server_app_that_flower_loses_is_started_again(programs, hosted, tmp_path):
    starts = tmp_path / "starts"
    programs(
        "flwr",
        f"open({str(starts)!r}, 'a').write('x')\n"
        "print(json.dumps({'success': True, 'run-id': 7}))",
    )
    thread, folder, ends = hosted()
    _until(lambda: is_edge(folder))
    path = Path(read_json(folder / "edge.json")["socket"])
    _until(starts.exists)
    for count in (2, 3):
        with (folder / "app.lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path.touch()  # somebody listens
            time.sleep(0.5)
        _until(lambda count=count: len(starts.read_text()) == count)
    assert thread.is_alive() and not ends
    (folder / "over.json").write_text("{}")
    thread.join(30)
    assert ends == [None]


def test_a_server_app_whose_post_is_another_s_ends_without_an_error_of_the_edge(tmp_path):
    lost = Lost(residents={})
    resident = EdgeResident(name="edge-a", folder=tmp_path, post=lost)
    resident.answer = lambda envelope: lost.nodes()
    with tempfile.TemporaryDirectory() as place:
        path = f"{place}/edge"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(path)
            server.listen(1)
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.connect(path)
                with connection.makefile("rwb") as pipe:
                    join.write_envelope(pipe, sealed(Store(run=RUN)))
                    pipe.flush()
                    with pytest.raises(Disowned):
                        join.answer_at(server, resident)


def test_an_edge_looks_after_its_devices_while_the_cloud_asks_nothing(tmp_path):
    """Who comes late hears that it has no seat, and who comes back is there again."""
    setup = prepare(experiment_for_four())
    post = PostAtHand(residents=parts(tmp_path, (0, 1)))
    edge = EdgeResident(name="edge-a", folder=tmp_path / "edge", post=post)

    def watch(remote):
        remote.clock, remote.pause = iter(range(0, 10**6, 5)).__next__, lambda _: None

    edge.watch = watch
    edge.idle()  # of no run
    hello = Hello(run=RUN, experiment=to_json(setup.experiment), spec=asdict(setup.data.spec))
    assert reply_of(edge.answer(sealed(hello))).kind == "edge"
    below = edge._hosted.remote
    post.away = {101}
    edge.idle()
    assert below.seated == {0}
    post.away = set()
    post.residents |= parts(tmp_path, (2,))
    for _ in range(3):
        edge.idle()
    assert below.seated == {0, 1}
    assert [text for text in below.refused.values()] == [
        "edge 'edge-a' has told the cloud who is below it; 'device-2' may join its next run"
    ]
    assert (102, "bye") in [(node, kind) for node, kind, _ in post.log]

    again = EdgeResident(name="edge-a", folder=tmp_path / "edge", post=post)
    again.watch = watch
    for _ in range(3):
        again.idle()  # it goes on with the run, and nobody has asked for something yet
    assert again._hosted.remote.seated == {0, 1}

    def broken():
        raise ValueError("the post is broken")

    post.nodes = broken
    edge.idle()  # it goes on
    post.nodes = Lost(residents={}).nodes
    with pytest.raises(Disowned):
        edge.idle()


def test_a_goodbye_ends_though_an_answer_to_it_breaks_off(tmp_path, monkeypatch):
    """A device that ends while it answers: Flower awaits the rest, and the cloud the edge."""
    monkeypatch.setattr(remote, "_GOODBYE", 0.2)
    post, freed = PostAtHand(residents=parts(tmp_path, (0, 1))), threading.Event()
    edge = EdgeResident(name="edge-a", folder=tmp_path / "edge", post=post)
    setup = prepare(experiment_for_four())
    hello = Hello(run=RUN, experiment=to_json(setup.experiment), spec=asdict(setup.data.spec))
    edge.answer(sealed(hello))
    post.pull = lambda names: freed.wait() and []
    assert reply_of(edge.answer(sealed(Bye(run=RUN)))).kind == "missing"
    assert edge.over and not (tmp_path / "edge" / RUN).exists()
    assert [kind for _, kind, _ in post.log][-2:] == ["bye", "bye"]
    freed.set()


def test_who_answers_at_a_socket_has_time_while_nobody_asks(tmp_path, monkeypatch):
    monkeypatch.setattr(join, "_IDLE_SECONDS", 0.01)
    calls = []

    def idle():
        calls.append(1)
        if len(calls) == 3:
            raise Disowned("it is over")

    with (
        tempfile.TemporaryDirectory() as place,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server,
    ):
        server.bind(f"{place}/edge")
        server.listen(1)
        with pytest.raises(Disowned):
            join.answer_at(server, None, idle)
    assert len(calls) == 3


def test_an_edge_that_has_no_seat_keeps_what_it_has(tmp_path):
    (tmp_path / RUN).mkdir()
    post = PostAtHand(residents=parts(tmp_path, (0,)))
    resident = EdgeResident(name="edge-a", folder=tmp_path, post=post)
    resident.answer(sealed(Bye(run=RUN, text="it came back with other devices")))
    assert not resident.over and (tmp_path / RUN).exists() and not post.log
    resident.answer(sealed(Bye(run=RUN)))
    assert resident.over and not (tmp_path / RUN).exists()


def test_a_link_that_ends_is_told(programs, hosted):
    programs("flower-superlink", LISTENS.replace("time.sleep(60)", "time.sleep(1); print('full')"))
    thread, _, ends = hosted()
    thread.join(30)
    assert "SuperLink ended" in str(ends[0]) and "full" in str(ends[0])
