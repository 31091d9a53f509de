"""The doctor, and what a start says that cannot be one."""

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from conftest import ROOT, Server, core, event_payload, locked, post

from collector import create_app


@pytest.fixture
def port():
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def path(make_app):
    """Return the path of a database with one error, its service stopped."""
    app = make_app()
    post(app.test_client(), event_payload())
    core(app).close()
    return core(app).database.path


def run(path, port, *arguments):
    """Run a command of the project; return its exit status and what it said."""
    app = create_app({"DATABASE_URL": f"sqlite:///{path}", "PORT": port})
    done = app.test_cli_runner().invoke(args=[str(argument) for argument in arguments])
    return done.exit_code, done.output


def look(path, port):
    """Return the doctor's exit status, and its lines by verdict."""
    status, output = run(path, port, "doctor")
    return status, read_lines(output)


def read_lines(output):
    """Return the doctor's lines by verdict, those about settings left out."""
    lines = {"ok": [], "note": [], "FAULT": []}
    for line in output.splitlines():
        verdict, words = line.split(maxsplit=1)
        if "settings" not in words and "not set" not in words:
            lines[verdict].append(words)
    return lines


def snapshot(folder):
    """Return the content and the times of all that is in a folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    states = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in files}
    return states | {file: file.stat().st_mode for file in folder.rglob("*") if file.is_dir()}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Return a server that several tests use."""
    server = Server(tmp_path_factory.mktemp("server"))
    yield server.start()
    server.kill()


def test_a_healthy_installation_has_no_fault(server):
    server.deliver(event_payload())
    status, lines = look(server.folder / "data" / "errors.db", server.port)
    assert (status, lines["FAULT"], lines["note"]) == (0, [], [])
    assert "is whole; errors: 1," in lines["ok"][1]
    assert lines["ok"][4] == f"the service on port {server.port} stores errors"


def test_a_locked_database_is_the_fault_of_the_service(make_server):
    server = make_server()
    with locked(server.folder / "data" / "errors.db"):
        assert server.deliver(event_payload())[0] == 202
        status, lines = look(server.folder / "data" / "errors.db", server.port)
    (fault,) = lines["FAULT"]
    assert (status, "end the program that holds its lock" in fault) == (1, True), fault
    assert "deliveries in the spool: 1" in lines["ok"]


def test_where_nothing_has_started_all_is_still_to_come(tmp_path, port):
    status, lines = look(tmp_path / "data" / "errors.db", port)
    assert [note.rpartition("; ")[2] for note in lines["note"]] == ["the start makes it"] * 2
    (fault,) = lines["FAULT"]
    assert (status, "start the service" in fault) == (1, True)
    assert list(tmp_path.iterdir()) == []


def spoil_nothing(path):
    """Leave all as it is: the service alone is stopped."""


def make_rubbish(path):
    path.write_bytes(b"rubbish" * 4096)


def make_newer(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 9")


def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[: 3 * 4096] + b"\xff" * 4 * 4096 + content[7 * 4096 :])


def reject(path):
    (path.parent / "spool").mkdir(exist_ok=True)
    (path.parent / "spool" / "1.rejected").write_bytes(b"")


FAULTS = [
    (spoil_nothing, []),
    (make_rubbish, ["file is not a database", "move it", "restore FILE"]),
    (damage, ["is damaged", "move it", "restore FILE"]),
    (make_newer, ["is of version 9", "with the collector that made it", "restore FILE"]),
    (reject, ["not to be stored: 1", "spool/*.rejected"]),
]


@pytest.mark.parametrize(("spoil", "words"), FAULTS)
def test_each_fault_is_named_with_its_cure_and_nothing_is_written(path, port, spoil, words):
    spoil(path)
    before = snapshot(path.parent)
    status, lines = look(path, port)
    assert snapshot(path.parent) == before
    said = " ".join(lines["FAULT"])
    assert status == 1
    assert f"nothing answers on port {port}" in said
    assert len(lines["FAULT"]) == 1 + bool(words)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("spoil", [make_rubbish, make_newer])
def test_a_restore_onto_what_it_cannot_replace_says_what_to_do_first(path, port, spoil):
    run(path, port, "backup", path.with_name("copy.db"))
    spoil(path)
    status, words = run(path, port, "restore", path.with_name("copy.db"), "--yes")
    assert (status, "move it and the files beside it" in words) == (1, True), words
    for file in path.parent.glob("errors.db*"):
        file.unlink()
    assert run(path, port, "restore", path.with_name("copy.db"), "--yes")[0] == 0
    assert "is whole; errors: 1," in look(path, port)[1]["ok"][1]


def run_bound(*arguments, **env):
    """Run a program of the project as a user whom the rights of files bind, even if this is root."""
    prefix = []
    if os.getuid() == 0:
        prefix = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
    command = [*prefix, sys.executable, "-m", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_folder_that_cannot_be_written_stops_the_start_and_is_a_fault(path, port):
    env = {"DATABASE_URL": f"sqlite:///{path}", "PORT": str(port)}
    path.parent.chmod(0o555)
    try:
        start = run_bound("gunicorn", **env)
        doctor = run_bound("flask", "--app", "collector", "doctor", **env)
    finally:
        path.parent.chmod(0o755)
    (line,) = [line for line in start.stderr.splitlines() if not line.startswith("[")]
    assert (start.returncode, "cannot write in" in line, "chown it" in line) == (1, True, True)
    fault = read_lines(doctor.stdout)["FAULT"][0]
    assert (doctor.returncode, f"cannot write {path.parent}, " in fault) == (1, True), fault


def test_an_old_python_is_told_which_it_needs():
    pythons = [shutil.which("python3.10"), *Path.home().glob(".pyenv/versions/3.10*/bin/python")]
    program = pythons[-1]
    if program is None:
        pytest.skip("needs a Python 3.10")
    done = subprocess.run(
        [program, "-c", "import collector"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    words = "The collector needs Python 3.11 or newer, this is 3.10."
    assert (done.returncode, done.stderr.startswith(words), done.stderr.count("\n")) == (1, True, 1)
