"""The database, its upgrades and its spool: real files, locks, damage and kills."""

import fcntl
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from conftest import (
    PAYLOADS,
    ROOT,
    SETTINGS,
    core,
    counts,
    event_payload,
    load,
    locked,
    maintain,
    put,
    select,
    serving,
    spooled,
    wait_for,
    wire,
    write,
)

DAY = 24 * 3600


def age(path, days, condition="TRUE"):
    """Have errors been received so many days ago."""
    at = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime(time.time() - days * DAY))
    write(path, f"UPDATE errors SET received_at = ? WHERE {condition}", at)


# --------------------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------------------


def test_a_row_is_in_the_file_before_the_reply(client, tmp_path):
    client.deliver(event_payload(1))
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    assert select(tmp_path / "copy" / "errors.db", "SELECT id FROM errors") == [(1,)]


def test_every_commit_and_every_spooled_file_is_synced(client, tmp_path, path):
    system_calls = shutil.which("strace")
    if system_calls is None:
        pytest.skip("no strace")
    client.deliver(event_payload(1))
    trace = tmp_path / "trace"
    tracer = subprocess.Popen(
        [system_calls, "-fy", "-e", "trace=fdatasync,fsync", "-o", trace, "-p", str(os.getpid())],
        stderr=subprocess.PIPE,
    )
    if b"attached" not in tracer.stderr.readline():
        pytest.skip("strace may not attach here")
    client.deliver(event_payload(2))
    with locked(path):
        assert client.deliver(event_payload(3)).status_code == 202
    tracer.terminate()
    tracer.communicate()
    synced = re.findall(r"sync\(\d+<(.*?)>\) += 0", trace.read_text())
    *database, file, folder = [Path(name).name for name in synced]
    assert database[0].startswith("errors.db")
    assert (file.rpartition(".")[2], folder) == ("part", "spool")


@pytest.mark.parametrize("body", [b'{"action":"created", "data":{"error":{}}}', b""])
def test_a_body_can_be_had_back_byte_for_byte(client, database, body):
    body = body or wire(load("error.created.python"))
    assert client.deliver(body).status_code == 201
    assert client.get("/errors/1/payload").data == body
    (length, kept) = database("SELECT payload_bytes, length(payload) FROM bodies")[0]
    assert length == len(body)
    assert kept <= length


def test_an_id_is_never_used_twice(app, path):
    for number in (1, 2, 3):
        app().deliver(event_payload(number))
    write(path, "DELETE FROM errors")
    assert app().deliver(event_payload(4)).json["id"] == 4


def test_the_journal_is_the_one_chosen_and_stays_short(client, path):
    body = wire(event_payload(1, message=os.urandom(300_000).hex()))
    for number in range(1, 61):
        client.deliver(body.replace(b"0" * 31 + b"1", f"{number:032x}".encode()))
    mode = client.get("/config").json["journal_mode"]
    assert select(path, "PRAGMA journal_mode") == [(mode.lower(),)]
    if mode == "WAL":
        assert Path(f"{path}-wal").stat().st_size <= 17 * 1024**2


# --------------------------------------------------------------------------------------------------
# Faults
# --------------------------------------------------------------------------------------------------


@contextmanager
def damaged(path):
    """Have pages in the middle of the database overwritten, then put the right ones back."""
    write(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    whole = path.read_bytes()
    path.write_bytes(whole[:4096] + b"\xff" * (len(whole) - 4096))
    yield
    for name in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        name.unlink(missing_ok=True)
    path.write_bytes(whole)


@contextmanager
def no_database(path):
    """Have the file be none of SQLite's, then be none at all."""
    path.write_bytes(b"no database" * 1000)
    yield
    path.unlink()


@contextmanager
def folder_in_place(path):
    """Have a folder where the database should be."""
    path.mkdir()
    yield
    path.rmdir()


@contextmanager
def turn_taken(path):
    """Hold the lock that the writers of the collector take in turn."""
    with open(f"{path}.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def changed(sql, back):
    """Return a fault: a database that a statement has changed, until another changes it back."""

    @contextmanager
    def fault(path):
        write(path, sql)
        yield
        write(path, back)

    return fault


GONE = changed("ALTER TABLE bodies RENAME TO gone", "ALTER TABLE gone RENAME TO bodies")
FOREIGN = changed("CREATE TABLE theirs (x)", "DROP TABLE theirs")
NEWER = changed("PRAGMA user_version = 4", "PRAGMA user_version = 3")
FAULTS = {  # (is the database made before, the fault, words of /health)
    "locked": (True, locked, "database is locked"),
    "the turn does not come": (True, turn_taken, "holds the lock to write"),
    "a table is missing": (True, GONE, "no such table"),
    "damaged pages": (True, damaged, "malformed"),
    "no database": (False, no_database, "file is not a database"),
    "a folder": (False, folder_in_place, "unable to open"),
    "another program's": (False, FOREIGN, "another program's"),
    "a newer version": (True, NEWER, "made by a newer collector"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_the_database_cannot_take_is_spooled_and_stored_later(app, tmp_path, path, log, name):
    is_made, fault, words = FAULTS[name]
    if is_made:
        first = app()
        first.deliver(event_payload(1))
        counts(first)  # and closes it
    path.parent.mkdir(exist_ok=True)
    with fault(path):
        client = app()
        for number in (2, 3):
            reply = client.deliver(event_payload(number))
            assert (reply.status_code, reply.json) == (202, {"status": "queued"})
        maintain(client)
        assert len(spooled(tmp_path)) == 2
        health = client.get("/health")
        assert (health.status_code, health.json["status"]) == (200, "spooling")
        assert health.json["spooled"] == 2
        assert words in health.json["problem"]
        assert any("cannot store a delivery" in line for line in log())
        assert client.get("/metrics").status_code == 200
    client = app()
    maintain(client)
    assert spooled(tmp_path) == []
    assert len(client.errors()) == 2 + is_made
    assert client.get("/health").json == {"status": "ok"}


def test_a_database_that_is_not_for_us_is_left_as_it_is(app, tmp_path, path):
    path.parent.mkdir()
    cases = (
        "CREATE TABLE theirs (x)",
        "CREATE TABLE errors (x)",
        "CREATE TABLE errors (x); CREATE TABLE health (x); PRAGMA user_version = 4",
        "CREATE TABLE theirs (x); PRAGMA user_version = 3",
        "CREATE TABLE errors (x); CREATE TABLE health (x); PRAGMA user_version = 2",
    )
    for sql in cases:
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript(sql)
        before = path.read_bytes()
        client = app()
        assert client.deliver(event_payload(1)).status_code == 202
        maintain(client)
        for place in ("/errors", "/errors?format=ndjson"):
            assert client.get(place).status_code == 503
        core(client).close()
        assert path.read_bytes() == before, sql
        path.unlink()


@pytest.mark.parametrize("what", ["the file", "the folder"])
def test_what_is_acknowledged_after_the_database_was_deleted_is_kept(app, tmp_path, path, what):
    client = app()
    client.deliver(event_payload(1))
    if what == "the file":
        path.unlink()
    else:
        shutil.rmtree(path.parent)
    assert client.deliver(event_payload(2)).status_code == 202
    client = app()
    assert client.deliver(event_payload(3)).status_code == 201
    maintain(client)
    rows = select(path, "SELECT event_id FROM errors ORDER BY event_id")
    assert rows == [(f"{2:032x}",), (f"{3:032x}",)]


def test_a_lock_costs_one_delivery_the_wait_and_the_next_ones_nothing(client, path):
    client.deliver(event_payload(1))
    with locked(path):
        started = time.monotonic()
        assert client.deliver(event_payload(2)).status_code == 202
        waited = time.monotonic() - started
        started = time.monotonic()
        for number in range(3, 8):
            assert client.deliver(event_payload(number)).status_code == 202
        assert time.monotonic() - started < waited
        assert client.errors() == [1]  # nor does a read wait


def test_if_neither_takes_it_sentry_is_told(app, tmp_path, path, log):
    client = app()
    client.deliver(event_payload(1))
    (path.parent / "spool").rmdir()
    (path.parent / "spool").write_text("in the way")
    with locked(path):
        reply = client.deliver(event_payload(2))
        assert (reply.status_code, "Retry-After" in reply.headers) == (503, True)
        assert any("LOST a delivery" in line for line in log())
        health = client.get("/health")
        assert health.status_code == 503
    # In the pause the database, which works again, is asked before a delivery is refused.
    assert client.deliver(event_payload(3)).status_code == 201
    assert counts(client) == {("stored", None): 2, ("refused", "disk"): 1}


def test_a_row_that_the_database_refuses_holds_up_nobody(app, tmp_path, path, log):
    client = app()
    client.deliver(event_payload(1))
    write(
        path,
        "CREATE TRIGGER no BEFORE INSERT ON errors WHEN new.title = 'bad' "
        "BEGIN SELECT RAISE(ABORT, 'no'); END",
    )
    assert client.deliver(event_payload(2, title="bad")).status_code == 202
    assert client.deliver(event_payload(3)).status_code == 201  # no pause
    maintain(app())
    assert spooled(tmp_path) == []
    assert len(list((path.parent / "spool").glob("*.rejected"))) == 1
    assert len([line for line in log() if "cannot store a spooled delivery" in line]) == 1


def test_health_is_spooling_while_errors_are_refused_though_the_heartbeat_is_not(client, path):
    client.get("/health")
    write(path, "CREATE TRIGGER t BEFORE INSERT ON errors BEGIN SELECT RAISE(FAIL, 'no'); END")
    assert client.get("/health").json["status"] == "spooling"


def test_a_fault_of_its_own_is_logged_without_a_word_of_a_delivery(app, path, log):
    client = app()
    client.deliver(event_payload(1))
    write(path, "UPDATE bodies SET payload_bytes = 9, payload = CAST('\"hunter2\"' AS BLOB)")
    reply = client.get("/errors/1")
    assert (reply.status_code, list(reply.json)) == (500, ["error"])
    words = "\n".join(log())
    assert "failure in web.show_error: AttributeError" in words and "in find_error" in words
    assert "hunter2" not in words


def test_a_delivery_for_which_the_memory_is_short_is_spooled(server):
    it = server(WEB_CONCURRENCY="1")
    wait_for(lambda: len(it.workers()) == 1)  # the child for the upgrade has ended
    (worker,) = it.workers()
    used = int(Path(f"/proc/{worker}/statm").read_text().split()[0]) * resource.getpagesize()
    unlimited = resource.prlimit(worker, resource.RLIMIT_AS, (used + 60 * 2**20, -1))
    # As text 3 MB, as objects more than 100 MB.
    status, reply = it.deliver(event_payload(1, extra={"a": [{}] * 900_000}))
    assert (status, reply) == (202, {"status": "queued"})
    # Another one, behind it in the spool, need not wait for it.
    put(it.folder, "9", wire(event_payload(2)))
    wait_for(lambda: it.get("/errors"))
    assert [error["event_id"] for error in it.get("/errors")] == [f"{2:032x}"]
    resource.prlimit(worker, resource.RLIMIT_AS, unlimited)
    wait_for(lambda: len(it.get("/errors")) == 2 and not it.spooled())


# --------------------------------------------------------------------------------------------------
# The spool
# --------------------------------------------------------------------------------------------------


def test_spool_files_of_every_version_come_in_in_order(app, tmp_path):
    body = wire(event_payload(2))
    at = "2026-06-02T08:30:00.000000Z"
    put(tmp_path, "1", wire(event_payload(1)), [at, "error"])
    put(tmp_path, "2", body, [at, "error", len(body), 123])  # of 2.0.0: length and checksum
    put(tmp_path, "3", wire(event_payload(3)), [at, None])
    client = app()
    maintain(client)
    assert spooled(tmp_path) == []
    errors = client.get("/errors").json
    assert [int(error["event_id"], 16) for error in errors] == [3, 2, 1]
    assert {error["received_at"] for error in errors} == {at}


def test_a_file_that_holds_no_error_is_renamed_and_one_that_cannot_be_read_waits(
    app, tmp_path, path, log
):
    put(tmp_path, "1", b"no JSON")
    put(tmp_path, "2", b'{"action": "created", "data": {}}')
    put(tmp_path, "3", wire(event_payload(1)), head="no head")
    put(tmp_path, "4", wire(event_payload(2)), head=["no time", None])
    for number in (5, 7):
        (path.parent / "spool" / f"{number}.delivery").mkdir()  # even root cannot read it
    put(tmp_path, "6", wire(event_payload(3)))
    client = app()
    wait_for(lambda: maintain(client) or client.errors() == [1])
    names = sorted(file.name for file in (path.parent / "spool").iterdir())
    rejected = [f"{number}.rejected" for number in range(1, 5)]
    assert names == [*rejected, "5.delivery", "7.delivery"]
    assert len([line for line in log() if "cannot store a spooled delivery" in line]) == 4
    for _ in range(4):
        core(client).due = dict.fromkeys(core(client).due, 0)
        maintain(client)
    # Once, and once more after another one was moved.
    assert len([line for line in log() if "IsADirectoryError" in line]) == 2


# --------------------------------------------------------------------------------------------------
# Upgrades
# --------------------------------------------------------------------------------------------------

OLD_COLUMNS = (
    "id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, "
    "culprit, level, status, platform, logger, environment, release, project_id, project_slug, "
    "project_name, exception_type, exception_value, permalink, rule"
)
VERSIONS = {
    "1.0.0": {
        "bodies": "SELECT id, payload_bytes, payload FROM errors",
        "next": 10,
        "outcomes": {("stored", None): 9, ("refused", "signature wrong"): 3},
    },
    "2.0.0": {
        "bodies": "SELECT id, payload_bytes, payload FROM bodies",
        "next": 13,
        "outcomes": {("stored", None): 42, ("refused", "signature wrong"): 4},
    },
}


def make_old(path, version):
    """Make a database as a version of the collector has left it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(f"PRAGMA journal_mode = WAL; {sql_of(version)}")


def sql_of(version):
    """Return the SQL that makes a database of a version."""
    return (PAYLOADS / f"database-{version}.sql").read_text(encoding="utf-8")


def schema_of(path):
    """Return what is defined in a database."""
    return sorted(select(path, "SELECT name, sql FROM sqlite_schema"))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_database_of_an_older_version_keeps_all_it_has(app, tmp_path, path, log, version):
    make_old(path, version)
    old = VERSIONS[version]
    rows = select(path, f"SELECT {OLD_COLUMNS} FROM errors ORDER BY id")
    bodies = select(path, old["bodies"])
    client = app(SENTRY_ACTIONS="created,triggered,unresolved")
    assert len(client.errors()) == len(rows)
    assert select(path, f"SELECT {OLD_COLUMNS} FROM errors ORDER BY id") == rows
    assert select(path, "SELECT id, payload_bytes, payload FROM bodies") == bodies
    assert select(path, "PRAGMA integrity_check") == [("ok",)]
    assert counts(client) == old["outcomes"]
    lines = [line for line in log() if "upgrad" in line]
    assert lines[0] == f"upgrading the database from version {version[0]} to 3"
    assert lines[1].startswith("upgraded the database in ")
    # All are known again, and ids go on.
    for id_, *_ in rows:
        body = client.get(f"/errors/{id_}/payload").data
        reply = client.deliver(body).json
        assert reply["status"] == "duplicate", (id_, reply)
    assert client.deliver(event_payload(99)).json["id"] == old["next"]
    (path.parent / "new").mkdir()
    fresh = app(DATABASE_URL=f"sqlite:///{path.parent}/new/errors.db")
    fresh.errors()
    assert schema_of(path) == schema_of(path.parent / "new" / "errors.db")


def test_doubles_by_the_new_identity_keep_rows_of_their_own(app, path, database):
    make_old(path, "2.0.0")
    client = app()
    client.errors()
    assert dict(database("SELECT id, identity FROM errors")) == {
        1: f"{'a' * 32} sentry.io 4500",
        2: f"{'b' * 32} sentry.io 4500",
        3: "issue 80 sentry.io",
        4: "double 4",
        5: "13935133e3a7083a92b1c7780cca2193",
        6: f"{'c' * 32} sentry.io 4500",
        9: "e17a8c2f5f44bf3d2c649aa7ade5353b",
    }
    assert client.errors("issue=80") == [4, 3]
    assert client.errors(f"event={'b' * 32}") == [2]
    write(path, "UPDATE errors SET event_id = 'x' WHERE id = 4")
    assert client.errors("event=x") == [4]


def test_errors_of_1_0_0_get_server_and_category(app, path, database):
    make_old(path, "1.0.0")
    body = wire({"action": "created", "data": {"issue": {"id": "1", "issueCategory": "cron"}}})
    sql = "UPDATE errors SET resource = 'issue', payload_bytes = ?, payload = ? WHERE id = ?"
    write(path, sql, len(body), body, 1)
    write(path, sql, 7, b"no JSON", 2)
    app().errors()
    assert database("SELECT id, server, category FROM errors ORDER BY id") == [
        (1, "sentry.io", "cron"),
        (2, "sentry.io", "error"),
        (5, None, "error"),
        (6, "errors.example.org", "error"),
        (7, None, "error"),
    ]


def test_an_upgrade_that_fails_leaves_the_old_database_whole(app, tmp_path, path, log):
    make_old(path, "2.0.0")
    write(path, "CREATE TABLE outcomes (mine)")  # in the way of one that is made late
    before = schema_of(path), select(path, "SELECT * FROM errors")
    client = app()
    assert client.deliver(event_payload(1)).status_code == 202
    assert (schema_of(path), select(path, "SELECT * FROM errors")) == before
    assert "outcomes already exists" in client.get("/health").json["problem"]
    assert any("outcomes already exists" in line for line in log())
    write(path, "DROP TABLE outcomes")
    client = app()
    maintain(client)
    assert len(client.errors()) == 8


def test_an_upgrade_that_was_killed_starts_again(tmp_path, path):
    make_old(path, "2.0.0")
    many = """WITH RECURSIVE n (i) AS (VALUES (100) UNION ALL SELECT i + 1 FROM n WHERE i < 60000)
        INSERT INTO errors (id, received_at, timestamp, event_id, title)
        SELECT i, '2026-06-10T08:30:00.000000Z', '2026-06-10', 'event ' || i, 'many' FROM n"""
    write(path, many)
    rows = select(path, f"SELECT {OLD_COLUMNS} FROM errors ORDER BY id")
    code = f"""
import pathlib, collector
print("ready", flush=True)
collector.Database(pathlib.Path({str(path)!r})).connection()
"""
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert b"ready" in child.stdout.readline()
    wal = Path(f"{path}-wal")
    wait_for(lambda: (wal.exists() and wal.stat().st_size > 2**20) or child.poll() is not None)
    child.kill()
    child.communicate()
    with serving(tmp_path) as it:
        wait_for(lambda: it.get("/health")["status"] == "ok")
        assert select(path, f"SELECT {OLD_COLUMNS} FROM errors ORDER BY id") == rows
        assert select(path, "PRAGMA user_version") == [(3,)]
        assert select(path, "PRAGMA integrity_check") == [("ok",)]


def test_workers_serve_while_a_database_waits_for_its_upgrade(server, tmp_path):
    folder = tmp_path / "server"
    path = folder / "data" / "errors.db"
    make_old(path, "2.0.0")
    with locked(path):
        it = server(WEB_CONCURRENCY="2")
        status, reply = it.deliver(event_payload(1))
        assert (status, reply) == (202, {"status": "queued"})
        health = it.get("/health")
        assert health["status"] == "spooling"
        assert "version 2" in health["problem"]
    wait_for(lambda: it.get("/health")["status"] == "ok" and not it.spooled())
    assert len(it.get("/errors")) == 8
    assert "upgraded the database" in it.log.read_text()


# --------------------------------------------------------------------------------------------------
# Retention and the reserve
# --------------------------------------------------------------------------------------------------


def test_old_errors_are_deleted_with_their_bodies_and_the_log_says_so(app, path, database, log):
    client = app()
    for number in range(1, 131):
        client.deliver(event_payload(number))
    age(path, 31, "id <= 120")
    maintain(client)
    assert database("SELECT count(*) FROM errors") == [(130,)]  # without RETENTION_DAYS all stay
    client = app(RETENTION_DAYS="30")
    maintain(client)
    assert database("SELECT min(id), count(*) FROM errors") == [(121, 10)]
    assert database("SELECT min(id), count(*) FROM bodies") == [(121, 10)]
    counts(client)
    assert "deleted 120 errors that were older than 30 days" in log()


@pytest.fixture
def volume(tmp_path):
    """Return a folder on a volume of 48 MB."""
    folder = tmp_path / "volume"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_volume_takes_errors_again_by_retention_alone(volume):
    with serving(volume, RETENTION_DAYS="30", WEB_CONCURRENCY="2") as it:
        number = 0
        for size in (150_000, 500):
            status = 201
            while status == 201:
                number += 1
                noise = os.urandom(size).hex()
                status, reply = it.deliver(event_payload(number, message=noise))
                assert number < 5000
        assert (status, "reserve" in reply["error"]) == (503, True)
        assert it.request("GET", "/health")[0] == 503
        assert not it.spooled()
        age(it.database, 31)
        fill = iter(range(1000, 2000))
        wait_for(lambda: it.deliver(event_payload(next(fill)))[0] == 201)
        wait_for(lambda: select(it.database, "SELECT count(*) FROM errors")[0][0] < 100)
        assert it.get("/health") == {"status": "ok"}
        assert select(it.database, "PRAGMA integrity_check") == [("ok",)]


# --------------------------------------------------------------------------------------------------
# Health
# --------------------------------------------------------------------------------------------------


def test_health_commits_a_row_and_uses_no_id(client, database):
    assert client.get("/health").json == {"status": "ok"}
    first = database("SELECT checked_at FROM health")
    assert client.get("/health").json == {"status": "ok"}
    assert database("SELECT checked_at FROM health") > first
    assert client.deliver(event_payload(1)).json["id"] == 1
    assert database("SELECT id FROM bodies") == [(1,)]


# --------------------------------------------------------------------------------------------------
# The backup command
# --------------------------------------------------------------------------------------------------


def start_backup(path, file, cwd):
    """Start the backup command for a database, and return its process."""
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    env["DATABASE_URL"] = f"sqlite:///{path}"
    command = [sys.executable, "-m", "flask", "--app", ROOT / "collector", "backup", file]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=env, **output)


def back_up(path, file, cwd):
    """Run the backup command for a database in a process of its own; return status and output."""
    process = start_backup(path, file, cwd)
    output, _ = process.communicate()
    return process.returncode, output


def test_a_backup_of_a_service_at_rest_leaves_nothing_beside_the_database(app, path, tmp_path):
    client = app()
    client.deliver(event_payload(1))
    counts(client)
    core(client).close()
    before = sorted(file.name for file in path.parent.iterdir())
    assert back_up(path, tmp_path / "copy.db", tmp_path)[0] == 0
    assert sorted(file.name for file in path.parent.iterdir()) == before
    assert select(tmp_path / "copy.db", "SELECT count(*) FROM errors") == [(1,)]


def test_a_backup_during_which_the_service_starts_is_refused(app, path, tmp_path):
    client = app()
    client.get("/health")
    core(client).close()
    write(path, "CREATE TABLE ballast AS SELECT zeroblob(64000000)")
    part = tmp_path / "copy.db.part"
    process = start_backup(path, tmp_path / "copy.db", tmp_path)
    while not part.exists():
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    Path(f"{path}-wal").touch()
    process.send_signal(signal.SIGCONT)
    assert "has started meanwhile" in process.communicate()[0]
    assert (process.returncode, part.exists()) == (1, False)


def test_a_backup_that_cannot_be_made_says_why_and_harms_nothing(app, path, tmp_path):
    client = app()
    client.deliver(event_payload(1))
    there = tmp_path / "there.db"
    there.write_text("mine")
    foreign_database = tmp_path / "theirs.db"
    write(foreign_database, "CREATE TABLE theirs (x)")
    cases = (
        (path, there, "there"),
        (tmp_path / "none" / "errors.db", tmp_path / "copy.db", "no database"),
        (path, tmp_path / "no folder" / "copy.db", "unable to open"),
        (foreign_database, tmp_path / "copy.db", "another program's"),
    )
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda case: back_up(*case[:2], tmp_path), cases)
    for (status, output), (_, _, words) in zip(results, cases, strict=True):
        assert status != 0
        assert words in output
        assert "Traceback" not in output
    assert there.read_text() == "mine"
    assert not (tmp_path / "copy.db").exists()
    assert not (tmp_path / "none").exists()
    assert not list(tmp_path.rglob("*.part"))
