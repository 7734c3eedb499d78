"""What `tessera serve` says when something around it is not as it should be."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from tesserafl.core.errors import CheckpointError, ConfigError, TesseraError
from tesserafl.run import serve
from tesserafl.run.children import child, end, tail_of
from tesserafl.run.files import write_json
from tesserafl.run.serve import Link, resume_serving


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Scripts in the place of Flower's programs; by default they do nothing and end."""

    def put(name, text="pass"):
        path = tmp_path / name
        path.write_text(f"#!{sys.executable}\nimport sys, json, time, socket\n{text}\n")
        path.chmod(0o755)

    for name in ("flower-superlink", "flwr"):
        put(name)
    monkeypatch.setattr(serve, "program", lambda name: str(tmp_path / name))
    monkeypatch.setattr(serve, "_PAUSE", 0.01)
    return put


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "run"
    found.mkdir()
    write_json(found / "config.json", {})
    return found


def free():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


LISTENS = """
port = int(sys.argv[sys.argv.index("--port") + 1])
server = socket.create_server(("127.0.0.1", port))
"""


def test_a_run_that_is_over_is_not_served_again(programs, folder):
    write_json(folder / "summary.json", {"accuracy": 0.5})
    assert serve.serve(folder, Link()) == {"accuracy": 0.5}
    assert not (folder / "link.json").exists()


def test_a_port_that_is_taken_is_named(programs, folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of this machine is taken"):
            serve.serve(folder, Link(port=port))


def test_a_superlink_that_does_not_start_tells_why(programs, folder):
    programs("flower-superlink", "sys.exit('no such flag')")
    with pytest.raises(TesseraError, match="did not start: no such flag"):
        serve.serve(folder, Link(port=free()))


def test_a_run_that_flower_does_not_start_is_an_error(programs, folder):
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", "print('x'); print(json.dumps({'success': False, 'error-message': 'why'}))")
    with pytest.raises(TesseraError, match=r"Flower did not start the run: .*why"):
        serve.serve(folder, Link(port=free()))
    programs("flwr", "sys.exit('no connection')")
    with pytest.raises(TesseraError, match="no connection"):
        serve.serve(folder, Link(port=free()))


STARTS = "print(json.dumps({'success': True, 'run-id': 7, 'runs': [{'status': STATUS}]}))"


def test_a_superlink_that_ends_in_the_run_tells_how_to_go_on(programs, folder):
    programs("flower-superlink", LISTENS + "time.sleep(1.0); sys.exit('disk full')")
    programs("flwr", STARTS.replace("STATUS", "'running'"))
    with pytest.raises(TesseraError, match="SuperLink ended: disk full\nTo go on: tessera resume"):
        serve.serve(folder, Link(port=free()))


def test_a_server_app_that_ends_without_a_word_tells_how_to_go_on(programs, folder, monkeypatch):
    monkeypatch.setattr(serve, "_LOOK_SECONDS", 0.0)
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", STARTS.replace("STATUS", "'finished:failed'"))
    with pytest.raises(TesseraError, match="ended as 'finished:failed'"):
        serve.serve(folder, Link(port=free()))


def test_the_error_of_a_run_is_its_servers(programs, folder):
    """What an earlier serving left is not taken for this one's."""
    write_json(folder / "error.json", {"text": "of before"})
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    error = f"open({str(folder / 'error.json')!r}, 'w').write(json.dumps({{'text': 'no device'}}))"
    programs("flwr", error + "\n" + STARTS.replace("STATUS", "'running'"))
    with pytest.raises(TesseraError, match=r"^no device$"):
        serve.serve(folder, Link(port=free()))


def test_events_are_passed_on_and_the_summary_is_the_runs(programs, folder):
    events = folder / "events.jsonl"
    events.write_text('{"kind": "start"}\n{"kind": "round", "round": 1}\n')
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    ends = (
        f'open({str(events)!r}, \'a\').write(\'{{"kind": "round", "round": 2}}\\n{{"torn\')\n'
        f"open({str(folder / 'summary.json')!r}, 'w').write('{{\"accuracy\": 1.0}}')\n"
    )
    programs("flwr", ends + STARTS.replace("STATUS", "'running'"))
    heard = []
    assert serve.serve(folder, Link(port=free()), heard.append) == {"accuracy": 1.0}
    assert [event["kind"] for event in heard] == ["open", "resume", "round"]
    assert heard[2]["round"] == 2


def test_a_link_that_is_damaged_is_named(folder):
    write_json(folder / "link.json", {"port": "many"})
    with pytest.raises(CheckpointError, match=r"link\.json is damaged"):
        resume_serving(folder)


def test_a_run_goes_on_where_devices_look_for_it(programs, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(serve, "serve", lambda folder, link, listener: seen.append(link))
    write_json(folder / "link.json", {"keys": None, "port": 99, "through_proxy": True})
    resume_serving(folder)
    assert seen == [Link(port=99)]


@dataclass
class Spoken:
    commands: list[list[str]] = field(default_factory=list)

    def __call__(self, command, **_):
        self.commands.append(command)
        text = json.dumps({"success": False, "error-message": "public key is already in use"})
        return subprocess.CompletedProcess(command, 0, text, "")


def test_a_device_may_be_registered_twice(programs, tmp_path, monkeypatch):
    spoken = Spoken()
    monkeypatch.setattr(serve.subprocess, "run", spoken)
    serve.Flower(home=tmp_path).register("alice", tmp_path / "alice.pub")
    assert "--name" in spoken.commands[0] and "alice" in spoken.commands[0]


def test_a_child_ends_with_what_it_said(tmp_path):
    log = tmp_path / "logs" / "log"
    process = child([sys.executable, "-c", "print('x' * 50)"], {}, log)
    process.wait()
    assert tail_of(log, 10) == "x" * 10 and tail_of(tmp_path / "none") == ""
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('here', "
        "flush=True); time.sleep(60)"
    )
    process = child([sys.executable, "-c", stubborn], {}, log)
    while "here" not in tail_of(log):
        assert process.poll() is None
    end(process, 0.1)
    assert process.poll() == -9
    end(process)  # it may be ended twice
