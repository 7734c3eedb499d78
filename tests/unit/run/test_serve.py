"""What `tessera serve` says when something around it is not as it should be."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from tesserafl.core.errors import CheckpointError, ConfigError, TesseraError
from tesserafl.run import follow, serve
from tesserafl.run.children import child, end, tail_of
from tesserafl.run.files import alone_in, write_json
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
    for module in (serve, follow):
        monkeypatch.setattr(module, "_PAUSE", 0.01)
    return put


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "run"
    found.mkdir()
    write_json(found / "config.json", {})
    write_json(found / "deployment.json", {"run": "0" * 32, "deployment": {}})
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


@pytest.fixture
def looks_all_the_time(monkeypatch):
    monkeypatch.setattr(follow, "_LOOK_SECONDS", 0.0)


def counting(folder, then):
    """A `flwr` that counts its runs into a file and then does what is given, with their number."""
    return f"""
book = {str(folder / "book")!r}
if sys.argv[1] == "run":
    open(book, "a").write("x")
runs = len(open(book).read())
status = "running"
{then}
print(json.dumps({{"success": True, "run-id": runs, "runs": [{{"status": status}}]}}))
"""


def test_a_run_that_is_lost_again_and_again_tells_how_to_go_on(
    programs, folder, looks_all_the_time
):
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", counting(folder, "status = 'finished:failed'"))
    with pytest.raises(TesseraError, match=r"lost .* 4 times .*finished:failed") as error:
        serve.serve(folder, Link(port=free()))
    assert str(error.value).endswith(f"To go on: tessera resume {folder}")
    assert (folder / "book").read_text() == "xxxx"


def test_a_run_that_flower_loses_goes_on_where_it_was(
    programs, folder, looks_all_the_time, monkeypatch
):
    """Once before a round, twice after one; its process left a note that it is at work."""
    events = folder / "events.jsonl"
    then = f"""
if sys.argv[1] == "run":
    if runs in (1, 3):
        open({str(events)!r}, "a").write(json.dumps({{"kind": "round", "round": runs}}) + "\\n")
    open({str(folder / serve.AT_WORK)!r}, "w").write("killed")
    if runs == 6:
        open({str(folder / "summary.json")!r}, "w").write("{{}}")
elif runs < 6:
    status = "finished:failed"
"""
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", counting(folder, then))
    heard = []
    monkeypatch.setattr(follow, "_BYE_SECONDS", 0.0)
    assert serve.serve(folder, Link(port=free()), heard.append) == {}
    assert (folder / "book").read_text() == "x" * 6
    told = [event["text"] for event in heard if event["kind"] == "open"]
    assert sum("goes on where it was" in text for text in told) == 5
    assert [event["round"] for event in heard if event["kind"] == "round"] == [1, 3]


def test_a_run_that_was_stopped_is_not_begun_again(programs, folder, looks_all_the_time):
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", counting(folder, "status = 'finished:stopped'"))
    with pytest.raises(TesseraError, match=r"stopped by Flower's command.*\nTo go on"):
        serve.serve(folder, Link(port=free()))
    assert (folder / "book").read_text() == "x"


def test_a_process_that_does_not_begin_is_told_of(
    programs, folder, looks_all_the_time, monkeypatch
):
    monkeypatch.setattr(follow, "_SLOW_SECONDS", 0.0)
    monkeypatch.setattr(follow, "_MOST_SECONDS", 0.5)
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", counting(folder, "status = 'starting'"))
    heard = []
    with pytest.raises(TesseraError, match=r"has not got the run's process to work.*\nTo go on"):
        serve.serve(folder, Link(port=free()), heard.append)
    assert any("status: starting" in event.get("text", "") for event in heard)


def test_a_process_that_is_given_up_and_does_not_end_is_an_error(
    programs, folder, looks_all_the_time, monkeypatch
):
    monkeypatch.setattr(follow, "_END_SECONDS", 0.05)
    programs("flower-superlink", LISTENS + "time.sleep(60)")
    programs("flwr", counting(folder, "status = 'finished:failed'"))
    with alone_in(folder), pytest.raises(TesseraError, match="it does not end"):
        serve.serve(folder, Link(port=free()))


def test_a_command_of_flowers_that_hangs_is_no_answer(programs, tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "_CALL_SECONDS", 0.05)
    programs("flwr", "time.sleep(60)")
    assert serve.Flower(home=tmp_path).status("7") == "unknown"


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
