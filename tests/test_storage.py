"""The settings, the database and its spool: real files, real locks, real damage."""

import gzip
import http.server
import json
import logging
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sentry_sdk
from conftest import ROOT, SECRET, count_rows, event_payload, load, post, sign, wait_for, wire
from werkzeug.test import EnvironBuilder

import collector
from collector import choose_journal_mode, create_app


def house(app):
    """Return the app's Collector."""
    return app.extensions["collector"]


def keep_house(client):
    """Ask for /health to the end, after which the app does its chores; return the status."""
    return client.get("/health", buffered=True).status_code


def event_ids(app):
    """Return the event ids that are stored, in the order of their rows."""
    return [
        row[0]
        for row in house(app)
        .database.connection()
        .execute("SELECT event_id FROM errors ORDER BY id")
    ]


def spooled(app):
    """Return how many deliveries wait."""
    return len(house(app).spool.names())


def back_up(app, target):
    """Back the database up with the command."""
    assert app.test_cli_runner().invoke(args=["backup", str(target)]).exit_code == 0


def refuse_bad(app):
    """Make the database refuse the event "bad", for which no other is to blame."""
    refuse = (
        "BEFORE INSERT ON errors WHEN new.event_id = 'bad' BEGIN SELECT RAISE(ABORT, 'no'); END"
    )
    house(app).database.connection().execute(f"CREATE TRIGGER refuse {refuse}")


@contextmanager
def locked(app):
    """Hold the database's write lock as another program would."""
    with closing(sqlite3.connect(house(app).database.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


# --------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------

PASSWORD = "hunter2"
BAD_SETTINGS = [
    ("DATABASE_URL", f"postgresql://me:{PASSWORD}@db/errors"),
    ("DATABASE_URL", f"mysql:///{PASSWORD}"),
    ("DATABASE_URL", "errors.db"),
    ("DATABASE_URL", "/data/errors.db"),
    ("DATABASE_URL", "sqlite://errors.db"),
    ("DATABASE_URL", "sqlite://"),
    ("DATABASE_URL", "sqlite:///"),
    ("DATABASE_URL", "sqlite:///:memory:"),
    ("DATABASE_URL", "sqlite:///errors.db?mode=ro"),
    ("DATABASE_URL", "sqlite:////dev/null/errors.db"),
    ("DATABASE_URL", "sqlite:////proc/errors/errors.db"),
    ("DATABASE_URL", f"sqlite:///{tempfile.gettempdir()}"),
    ("SENTRY_DSN", "on"),
    ("SENTRY_DSN", f"https://{PASSWORD}@"),
    ("SENTRY_DSN", f"https://{PASSWORD}@sentry.example.com"),
    ("SENTRY_DSN", f"https://{PASSWORD}@sentry.example.com/project"),
    ("SENTRY_DSN", f"https://{PASSWORD}@[/1"),
    ("SENTRY_DSN", f"https://{PASSWORD}@sentry.example.com:99999/1"),
    ("SENTRY_CLIENT_SECRET", " , "),
    ("SENTRY_ACTIONS", "created;triggered"),
    ("SENTRY_ACTIONS", "Created"),
    ("SENTRY_ACTIONS", "created triggered"),
    ("SENTRY_ACTIONS", ","),
    ("RETENTION_DAYS", "0"),
    ("RETENTION_DAYS", "-1"),
    ("RETENTION_DAYS", "30d"),
    ("RETENTION_DAYS", "1.5"),
    ("RETENTION_DAYS", "36501"),
    ("MAX_BODY_BYTES", "0"),
    ("MAX_BODY_BYTES", "5MB"),
    ("MAX_BODY_BYTES", "1e6"),
    ("MAX_BODY_BYTES", "9" * 5000),
    ("WEB_CONCURRENCY", "two"),
    ("WEB_CONCURRENCY", "0"),
    ("WEB_CONCURRENCY", "257"),
    ("PORT", "http"),
    ("PORT", "0"),
    ("PORT", "65536"),
    ("PORT", "٨٠٠٠"),
]


@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS, ids=lambda value: ascii(value)[1:30])
def test_a_bad_setting_stops_the_start_with_one_line(make_app, monkeypatch, name, value):
    monkeypatch.setenv("API_TOKEN", "another " + PASSWORD)
    with pytest.raises(SystemExit) as stop:
        make_app(**{name: value})
    line = str(stop.value.code)
    assert line.startswith(f"{name}: ")
    assert f"for example {name}=" in line
    assert "\n" not in line
    assert line.isascii()
    assert len(line) < 400
    assert PASSWORD not in line


def test_the_start_ends_with_a_status_and_the_line_alone(tmp_path):
    for variable, value in (("PORT", "x"), ("DATABASE_URL", "sqlite:////dev/null/x/errors.db")):
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "DATABASE_URL": f"sqlite:///{tmp_path}/e.db",
            variable: value,
        }
        command = [sys.executable, "-c", "import collector; collector.create_app()"]
        done = subprocess.run(
            command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1
        assert done.stderr.startswith(f"{variable}: ")
        assert done.stderr.count("\n") == 1


def test_an_empty_setting_is_an_unset_one(make_app, monkeypatch):
    for name in (
        "SENTRY_DSN",
        "SENTRY_CLIENT_SECRET",
        "SENTRY_ACTIONS",
        "API_TOKEN",
        "RETENTION_DAYS",
        "MAX_BODY_BYTES",
    ):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("PORT", "  ")
    config = make_app(WEB_CONCURRENCY="").test_client().get("/config").json
    assert config["sentry_actions"] == ["created"]
    assert config["max_body_bytes"] == 5 * 1024 * 1024
    assert (config["web_concurrency"], config["port"], config["retention_days"]) == (2, 8000, None)
    assert (
        not config["sentry_dsn_set"]
        and not config["sentry_client_secret_set"]
        and not config["api_token_set"]
    )


def test_the_environment_wins_over_the_env_file_and_both_over_the_defaults(
    tmp_path, monkeypatch, make_app
):
    lines = [
        'API_TOKEN="from file"',
        "SENTRY_ACTIONS=created,triggered",
        "RETENTION_DAYS=7",
        "PORT=9000",
        "MAX_BODY_BYTES=",
    ]
    (tmp_path / ".env").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("RETENTION_DAYS", "30")
    monkeypatch.setenv("PORT", "")
    client = make_app().test_client()
    assert client.get("/config").status_code == 401
    config = client.get("/config", headers={"Authorization": "Bearer from file"}).json
    assert config["sentry_actions"] == ["created", "triggered"]
    assert (config["retention_days"], config["port"], config["max_body_bytes"]) == (
        30,
        9000,
        5 * 1024 * 1024,
    )


def test_the_settings_are_read_once(make_app, monkeypatch):
    client = make_app().test_client()
    monkeypatch.setenv("API_TOKEN", "later")
    assert client.get("/errors").status_code == 200


@pytest.mark.parametrize("scheme", ["sqlite:///", "sqlite+aiosqlite:///"])
def test_the_folder_of_the_database_is_made(tmp_path, scheme):
    for path in (f"{tmp_path}/a/b/errors.db", "relative/errors.db"):
        app = create_app({"DATABASE_URL": scheme + path})
        assert post(app.test_client(), event_payload()).status_code == 201
        assert (tmp_path / path).is_file()
        house(app).database.close()


def test_a_number_may_be_a_secret(make_app):
    client = make_app(SENTRY_CLIENT_SECRET=12345).test_client()
    body = wire(event_payload())
    assert post(client, body).status_code == 401
    assert post(client, body, **sign(body, "12345")).status_code == 201


@pytest.fixture
def start_log(caplog):
    """Return a function that gives what the collector has logged so far."""
    logger = logging.getLogger("collector")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


def test_the_start_says_in_one_line_what_is_on_and_what_is_off(make_app, start_log):
    make_app()
    make_app(
        SENTRY_CLIENT_SECRET=SECRET,
        API_TOKEN="t0ken",
        SENTRY_ACTIONS="created,triggered",
        RETENTION_DAYS="9",
    )
    off, on = [line for line in start_log().splitlines() if "signature check" in line]
    for words in (
        "signature check OFF",
        "read token OFF",
        "Sentry reports off",
        "actions created;",
        "retention off",
    ):
        assert words in off
    for words in (
        "signature check on",
        "read token on",
        "actions created,triggered",
        "retention 9 days",
        "journal mode",
    ):
        assert words in on
    assert SECRET not in start_log() and "t0ken" not in start_log()


@contextmanager
def unprivileged(folder):
    """Give up root's powers, if we have them, over a folder that is handed to nobody."""
    if os.geteuid():
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, 65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def open_folder():
    """Return a folder that other users reach, which those of tmp_path are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_a_folder_that_cannot_be_written_stops_the_start_and_names_the_owner(open_folder):
    folder = open_folder / "data"
    folder.mkdir(mode=0o555)
    with unprivileged(open_folder), pytest.raises(SystemExit) as stop:
        create_app({"DATABASE_URL": f"sqlite:///{folder}/errors.db"})
    line = str(stop.value.code)
    assert line.startswith(f"DATABASE_URL: cannot write in {folder}")
    assert f"uid {folder.stat().st_uid}" in line
    assert "chown" in line


# --------------------------------------------------------------------------------------------------
# The database
# --------------------------------------------------------------------------------------------------

ROOT_MOUNT = "22 1 8:1 / / rw,relatime shared:1 - {} /dev/sda1 rw\n"
MOUNTS = [
    (ROOT_MOUNT.format("ext4"), "/data", "WAL"),
    (ROOT_MOUNT.format("xfs"), "/data", "WAL"),
    (ROOT_MOUNT.format("overlay"), "/data", "WAL"),
    (ROOT_MOUNT.format("virtiofs"), "/data", "PERSIST"),
    (ROOT_MOUNT.format("somefs"), "/data", "PERSIST"),
    (ROOT_MOUNT.format("overlay") + "30 22 0:40 / /data rw - 9p host rw\n", "/data", "PERSIST"),
    (ROOT_MOUNT.format("overlay") + "30 22 0:40 / /data rw - 9p host rw\n", "/database", "WAL"),
    (
        ROOT_MOUNT.format("nfs4") + "30 22 0:40 / /data rw shared:3 master:1 - ext4 /dev/sdb rw\n",
        "/data/deep/er",
        "WAL",
    ),
    (ROOT_MOUNT.format("ext4") + "30 22 0:40 / /data rw - fuse.osxfs a rw\n", "/data", "PERSIST"),
    (
        ROOT_MOUNT.format("ext4")
        + "30 22 0:40 / /data rw - cifs //a/b rw\n31 30 8:2 / /data rw - btrfs b rw\n",
        "/data",
        "WAL",
    ),
    (
        ROOT_MOUNT.format("ext4") + "30 22 0:40 / /my\\040data rw - fuse a rw\n",
        "/my data/x",
        "PERSIST",
    ),
    (
        ROOT_MOUNT.format("ext4") + "30 22 0:40 / /my\\134data rw - fuse a rw\n",
        "/my\\data/x",
        "PERSIST",
    ),
    (ROOT_MOUNT.format("ext4") + "30 22 0:40 / /dätä rw - nfs a rw\n", "/dätä", "PERSIST"),
    (ROOT_MOUNT.format("ext4") + "30 22 0:40 / /d\udce4ta rw - nfs a rw\n", "/data", "WAL"),
    ("", "/data", "PERSIST"),
]


@pytest.mark.parametrize(("mounts", "folder", "expected"), MOUNTS, ids=range(len(MOUNTS)))
def test_write_ahead_logging_is_for_local_file_systems_only(tmp_path, mounts, folder, expected):
    (tmp_path / "mountinfo").write_bytes(mounts.encode("utf-8", "surrogateescape"))
    assert choose_journal_mode(folder, tmp_path / "mountinfo") == expected


def test_without_a_list_of_mounts_the_journal_is_the_safe_one(tmp_path):
    assert choose_journal_mode(tmp_path, tmp_path / "missing") == "PERSIST"


def test_a_link_is_followed_to_the_file_system_it_leads_to(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to(tmp_path / "there")
    (tmp_path / "mountinfo").write_text(
        ROOT_MOUNT.format("ext4") + f"30 22 0:1 / {tmp_path}/there rw - nfs a rw\n"
    )
    assert choose_journal_mode(tmp_path / "here", tmp_path / "mountinfo") == "PERSIST"


@pytest.mark.parametrize("mode", ["WAL", "PERSIST"])
def test_the_journal_is_the_one_chosen_and_every_commit_is_synced(make_app, monkeypatch, mode):
    monkeypatch.setattr(collector, "choose_journal_mode", lambda folder: mode)
    app = make_app()
    client = app.test_client()
    assert post(client, event_payload()).status_code == 201
    connection = house(app).database.connection()
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == mode.lower()
    assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2
    assert client.get("/config").json["journal_mode"] == mode
    assert keep_house(client) == 200


def test_the_schema_is_safe_to_run_again(app, client):
    post(client, event_payload())
    schema = (ROOT / "schema.sql").read_text()
    with closing(sqlite3.connect(house(app).database.path)) as other:
        before = other.execute("SELECT * FROM sqlite_schema").fetchall()
        other.executescript(schema)
        assert other.execute("SELECT * FROM sqlite_schema").fetchall() == before
    assert count_rows(app) == 1


def test_an_app_finds_what_another_has_stored(make_app):
    post(make_app().test_client(), event_payload())
    assert make_app().test_client().get("/errors/latest").json["id"] == 1


def test_an_id_is_never_used_twice(app, client):
    for number in range(3):
        post(client, event_payload(str(number)))
    with house(app).database.turn() as connection:
        connection.execute("DELETE FROM errors")
    assert post(client, event_payload("0")).json["id"] == 4


def test_a_committed_row_is_in_the_file_before_the_reply(app, client):
    post(client, event_payload())
    copies = house(app).database.path.parent.parent / "copy"
    shutil.copytree(house(app).database.path.parent, copies)
    with closing(sqlite3.connect(copies / "errors.db")) as copy:
        assert copy.execute("SELECT event_id FROM errors").fetchall() == [("0" * 32,)]
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def body_that_packs_to_its_own_length():
    """Return a delivery that would pass for one that is not compressed once it is."""
    for number in range(2000):
        body = b'{"event":{"id":"%b"}}' % (b"ab" * 5 + os.urandom(number // 2).hex().encode())
        if len(zlib.compress(body, 1)) == len(body):
            return body
    raise AssertionError("no such body was found")


BODIES = [
    body_that_packs_to_its_own_length(),
    b'{"event":{}}',
    b' {\r\n\t"event" : { "id":1, "id":2 } }\n\n',
    '{"event": {"title": "Ünï ☕ \U0001f375"}}'.encode(),
    b'{"event":{"title":"\\ud83c\\udf75 \\ud800 \\u0000"}}',
    b'{"event":{"id":"' + os.urandom(3000).hex().encode() + b'"}}',
    b'{"event":{"extra":"' + b"a" * 200_000 + b'"}}',
    wire(load("error.created.python")),
]


def test_a_body_can_be_had_back_byte_for_byte(client):
    for number, body in enumerate(BODIES, 1):
        assert post(client, body).json == {
            "status": "stored",
            "id": number,
            "url": f"/errors/{number}",
        }
        assert client.get(f"/errors/{number}/payload").data == body


def test_a_body_takes_a_fraction_of_its_size(app, client):
    post(client, wire(load("error.created.python")) + b" " * 20_000)
    row = (
        house(app)
        .database.connection()
        .execute("SELECT length(payload), payload_bytes FROM errors")
        .fetchone()
    )
    assert row[0] < row[1] / 5


def test_the_sqlite_shell_reads_the_bodies(app, client):
    shell = shutil.which("sqlite3")
    if not shell or "sqlar_uncompress" not in shell_output(
        shell, ":memory:", "SELECT name FROM pragma_function_list"
    ):
        pytest.skip("needs the sqlite3 shell with sqlar_uncompress")
    for body in BODIES:
        post(client, body)
    sql = "SELECT hex(sqlar_uncompress(payload, payload_bytes)) FROM errors ORDER BY id"
    hexes = shell_output(shell, str(house(app).database.path), sql).split()
    assert [bytes.fromhex(text) for text in hexes] == BODIES


def shell_output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


POSTER = """
import json, sys
from collector import create_app
app = create_app()
client = app.test_client()
print("ready", flush=True)
sys.stdin.readline()
bodies = json.load(open(sys.argv[1]))
print(json.dumps([client.post("/sentry/webhook", json=body).json["status"] for body in bodies]))
"""


def test_the_database_decides_what_is_a_duplicate_also_between_processes(tmp_path):
    bodies = [event_payload(f"event {number}") for number in range(20)]
    bodies += [
        {"action": "created", "data": {"issue": {"id": f"issue {number}"}}} for number in range(20)
    ]
    bodies += [{"event": {"title": f"without ids {number}"}} for number in range(20)]
    (tmp_path / "bodies.json").write_text(json.dumps(bodies))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "DATABASE_URL": f"sqlite:///{tmp_path}/data/errors.db",
    }
    command = [sys.executable, "-c", POSTER, str(tmp_path / "bodies.json")]
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
    }
    processes = [subprocess.Popen(command, env=env, cwd=tmp_path, **pipes) for _ in range(4)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        statuses = [json.loads(process.communicate(timeout=30)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for outcomes in zip(*statuses, strict=True):
        assert sorted(outcomes) == ["duplicate", "duplicate", "duplicate", "stored"]
    with closing(sqlite3.connect(tmp_path / "data/errors.db")) as connection:
        assert connection.execute("SELECT count(*) FROM errors").fetchone()[0] == 60
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_old_errors_are_deleted_in_steps_and_new_ones_stay(make_app):
    app = make_app(RETENTION_DAYS="30")
    client = app.test_client()
    for number in range(130):
        words = {
            name: f"{name}{number:03}" for name in ("title", "message", "culprit", "type", "value")
        }
        post(client, event_payload(f"{number:03}", metadata=words, **words))
    old, young = (
        f"{(datetime.now(UTC) - timedelta(days=days)).isoformat()[:19]}.000000Z"
        for days in (31, 29)
    )
    with house(app).database.turn() as connection:
        connection.execute("UPDATE errors SET received_at = iif(id <= 120, ?, ?)", (old, young))
    counts = [count_rows(app)]
    while counts[-1] > 10:
        # What is too old is looked for once a second at most.
        wait_for(lambda: keep_house(client) == 200 and count_rows(app) < counts[-1])
        counts.append(count_rows(app))
        assert counts[-2] - counts[-1] <= 50
    assert event_ids(app) == [f"{number:03}" for number in range(120, 130)]
    for name in words:
        sql = "SELECT rowid FROM errors_search WHERE errors_search MATCH ?"
        found = (
            house(app).database.connection().execute(sql, (f"{name}001 OR {name}125",)).fetchall()
        )
        assert [row[0] for row in found] == [126]
    assert [client.get(f"/errors?q=title{number}").json != [] for number in ("001", "125")] == [
        False,
        True,
    ]
    assert client.get("/errors/1").status_code == 404
    assert post(client, event_payload("000")).json["id"] == 131


def test_without_retention_nothing_is_deleted(app, client):
    post(client, event_payload())
    with house(app).database.turn() as connection:
        connection.execute("UPDATE errors SET received_at = '1999-01-01T00:00:00.000000Z'")
    assert keep_house(client) == 200
    assert count_rows(app) == 1


def test_a_database_put_in_the_place_of_another_is_used_at_once(make_app, tmp_path):
    app = make_app()
    client = app.test_client()
    post(client, event_payload("kept"))
    back_up(app, tmp_path / "copy.db")
    post(client, event_payload("lost"))
    for name in ("errors.db", "errors.db-wal", "errors.db-shm"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    assert keep_house(client) == 200
    assert client.get("/errors").json == []
    for name in ("errors.db", "errors.db-wal", "errors.db-shm"):
        (tmp_path / "data" / name).unlink(missing_ok=True)
    (tmp_path / "copy.db").rename(tmp_path / "data" / "errors.db")
    assert [row["event_id"] for row in client.get("/errors").json] == ["kept"]
    assert post(client, event_payload("next")).status_code == 201
    assert event_ids(app) == ["kept", "next"]


def test_a_restored_database_does_not_take_up_the_log_of_the_one_before(make_app, tmp_path):
    apps = [make_app(), make_app()]
    clients = [app.test_client() for app in apps]
    post(clients[0], event_payload("kept"))
    back_up(apps[0], tmp_path / "copy.db")
    for client in clients:
        post(client, event_payload("lost"))
    (tmp_path / "copy.db").rename(tmp_path / "data/errors.db")
    for client in clients:
        assert [row["event_id"] for row in client.get("/errors").json] == ["kept"]
    assert [
        post(client, event_payload(f"{number}")).status_code
        for number, client in enumerate(clients)
    ] == [201, 201]
    for app in apps:
        assert event_ids(app) == ["kept", "0", "1"]
        assert (
            house(app).database.connection().execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        )


# --------------------------------------------------------------------------------------------------
# A database that cannot be written
# --------------------------------------------------------------------------------------------------


def seconds_to_post(client, payload, status):
    """Post a payload, check the reply's status, and return how long it took."""
    started = time.monotonic()
    reply = post(client, payload)
    taken = time.monotonic() - started
    assert reply.status_code == status
    return taken


def test_a_delivery_waits_for_a_lock_once_and_is_then_spooled(app, client, monkeypatch):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 1)
    assert post(client, event_payload("first")).status_code == 201
    with locked(app) as other:
        assert 0.9 < seconds_to_post(client, event_payload("second"), 202) < 3
        assert (
            min(
                seconds_to_post(client, event_payload(name), 202)
                for name in ("third", "fourth", "fifth")
            )
            < 0.2
        )
        assert [client.get("/errors/latest").json["event_id"], spooled(app)] == ["first", 4]
        for path in ("/", "/config"):
            state = client.get(path).json
            assert state.get("counts", state)["spooled"] == 4
        health = client.get("/health")
        assert (health.status_code, health.headers["Retry-After"]) == (503, "5")
        assert "locked" in health.json["error"] and " 4 deliveries " in health.json["error"]
        other.execute("ROLLBACK")
    assert keep_house(client) == 200
    assert event_ids(app) == ["first", "second", "third", "fourth", "fifth"]
    assert spooled(app) == 0


def test_a_queued_delivery_says_no_more_than_that(app, client, monkeypatch):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    with locked(app):
        reply = post(client, event_payload())
    assert (reply.status_code, reply.json) == (202, {"status": "queued"})
    assert "Location" not in reply.headers
    assert count_rows(app) == 0


def test_a_delivery_is_stored_if_the_lock_goes_in_time(app, client):
    other = sqlite3.connect(house(app).database.path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.4, other.execute, ["COMMIT"])
    timer.start()
    assert 0.3 < seconds_to_post(client, event_payload(), 201) < 2.9
    timer.join()
    other.close()


def test_a_read_is_not_kept_waiting_by_a_lock(app, client):
    post(client, event_payload())
    with locked(app):
        started = time.monotonic()
        for path in (
            "/errors/latest",
            "/errors",
            "/errors/1/payload",
            "/errors?format=ndjson",
            "/",
            "/config",
        ):
            assert client.get(path).status_code == 200
        assert time.monotonic() - started < 2.5


def test_what_is_spooled_comes_in_after_the_next_delivery_too(app, client, monkeypatch):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    with locked(app):
        post(client, event_payload("spooled"), Sentry_Hook_Resource="error")
    reply = client.post("/sentry/webhook", data=wire(event_payload("next")), buffered=True)
    assert (reply.status_code, reply.json["id"]) == (201, 1)
    assert event_ids(app) == ["next", "spooled"]
    before, after = client.get("/errors").json
    assert before["received_at"] < after["received_at"]
    assert before["resource"] == "error"


def test_what_is_spooled_comes_in_at_the_next_start_in_order(make_app):
    first = make_app()
    for number in range(45):
        house(first).spool.put(collector.now(), "error", wire(event_payload(f"{number:02}")))
    second = make_app()
    assert count_rows(second) >= 20
    wait_for(lambda: keep_house(second.test_client()) == 200 and not spooled(second))
    assert event_ids(second) == [f"{number:02}" for number in range(45)]
    assert spooled(second) == 0


NAMELESS = [
    event_payload(),
    {"action": "created", "data": {"issue": {"id": "1"}}},
    {"event": {"title": "without ids"}},
    {"event": {}},
]


@pytest.mark.parametrize("payload", NAMELESS)
def test_a_delivery_comes_in_once_even_if_its_file_outlives_the_commit(
    app, client, monkeypatch, payload
):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    with locked(app):
        assert post(client, payload).status_code == 202
    (file,) = house(app).spool.folder.glob("*.delivery")
    kept = file.read_bytes()
    for _ in range(2):
        assert keep_house(client) == 200
        assert (count_rows(app), spooled(app)) == (1, 0)
        file.write_bytes(kept)
    assert client.get("/errors/1/payload").data == wire(payload)


def test_a_spooled_file_that_makes_no_sense_is_set_aside_and_holds_up_nobody(
    app, client, monkeypatch
):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    folder = house(app).spool.folder
    head = b'["2026-01-01T00:00:00.000000Z", null]\n'
    for number, content in enumerate(
        (
            b"",
            b"[]\n{}",
            head + b"no JSON",
            head + b"[]",
            head + b'{"action": "x"}',
            b'[null, null]\n{"event": {}}',
        )
    ):
        (folder / f"0-{number}.delivery").write_bytes(content)
    (folder / "0-9.part").write_bytes(head + b'{"ev')
    with locked(app):
        post(client, event_payload())
    assert keep_house(client) == 200
    assert event_ids(app) == ["0" * 32]
    assert sorted(file.name for file in folder.glob("*.rejected")) == [
        f"0-{number}.rejected" for number in range(6)
    ]
    assert client.get("/config").json["spooled"] == 0


@pytest.mark.parametrize(
    "damage", [b"this is no database\n" * 5000, b"SQLite format 3\0" + b"\xff" * 100_000]
)
def test_a_corrupt_database_costs_no_delivery(make_app, tmp_path, damage):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/errors.db").write_bytes(damage)
    app = make_app()
    client = app.test_client()
    for number in range(3):
        assert seconds_to_post(client, event_payload(str(number)), 202) < 2.5
    health = client.get("/health")
    assert health.status_code == 503
    assert "not a database" in health.json["error"] or "malformed" in health.json["error"]
    assert client.get("/config").json["spooled"] == 3
    assert client.get("/").json["problem"].startswith("The database cannot be read")
    for path in (
        "/errors",
        "/errors/latest",
        "/errors/1",
        "/errors/1/payload",
        "/errors?format=ndjson",
    ):
        reply = client.get(path)
        assert (reply.status_code, reply.headers["Retry-After"], list(reply.json)) == (
            503,
            "5",
            ["error"],
        )
    (tmp_path / "data/errors.db").unlink()
    assert keep_house(client) == 200
    assert event_ids(app) == ["0", "1", "2"]


def test_a_database_damaged_while_it_is_in_use_costs_no_delivery(app, client, tmp_path):
    post(client, event_payload("before"))
    house(app).database.connection().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / "data/errors.db").open("r+b") as file:
        file.write(b"\0" * 100)
    house(app).database.close()
    assert post(client, event_payload("after")).status_code == 202
    assert keep_house(client) == 503
    assert spooled(app) == 1


def test_a_read_only_database_costs_no_delivery_and_health_says_so(app, client):
    house(app).database.connection().execute("PRAGMA query_only = ON")
    health = client.get("/health")
    assert health.status_code == 503
    assert "readonly" in health.json["error"]
    house(app).database.connection().execute("PRAGMA query_only = ON")
    assert post(client, event_payload()).status_code == 202
    assert keep_house(client) == 200
    assert event_ids(app) == ["0" * 32]


def test_a_database_file_without_write_permission_costs_no_delivery(open_folder):
    app = create_app({"DATABASE_URL": f"sqlite:///{open_folder}/data/errors.db"})
    client = app.test_client()
    assert [post(client, event_payload("a")).status_code, keep_house(client)] == [201, 200]
    house(app).database.close()
    (open_folder / "data/errors.db").chmod(0o444)
    with unprivileged(open_folder):
        statuses = [client.get("/health").status_code, post(client, event_payload("b")).status_code]
        house(app).database.close()
    assert statuses == [503, 202]
    (open_folder / "data/errors.db").chmod(0o644)
    assert keep_house(client) == 200
    assert event_ids(app) == ["a", "b"]
    house(app).database.close()


def test_a_full_disk_costs_no_delivery(app, client):
    connection = house(app).database.connection()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    payload = event_payload(extra=os.urandom(100_000).hex())
    assert post(client, payload).status_code == 202
    assert keep_house(client) == 200
    assert client.get("/errors/1/payload").data == wire(payload)


def test_if_neither_database_nor_spool_can_be_written_sentry_is_told(
    app, client, tmp_path, start_log
):
    shutil.rmtree(tmp_path / "data")
    reply = post(client, event_payload())
    assert (reply.status_code, reply.headers["Retry-After"], list(reply.json)) == (
        503,
        "5",
        ["error"],
    )
    assert "LOST" in start_log()
    assert "ValueError" not in start_log()
    health = client.get("/health")
    assert health.status_code == 503
    assert [client.get(path).status_code for path in ("/", "/config", "/errors")] == [200, 200, 503]
    assert client.get("/").json["problem"]
    (tmp_path / "data/spool").mkdir(parents=True)
    assert keep_house(client) == 200
    assert post(client, event_payload()).status_code == 201


def test_health_commits_a_row(app, client):
    checks = []
    for _ in range(2):
        assert client.get("/health").json == {"status": "ok"}
        with closing(sqlite3.connect(house(app).database.path)) as other:
            checks.append(other.execute("SELECT checked_at FROM health").fetchone()[0])
    assert checks[0] < checks[1]


def test_health_is_bad_while_another_holds_the_lock(app, client):
    with locked(app):
        started = time.monotonic()
        assert client.get("/health").status_code == 503
        assert time.monotonic() - started < 2.5
    assert client.get("/health").status_code == 200


# --------------------------------------------------------------------------------------------------
# The counts of deliveries
# --------------------------------------------------------------------------------------------------


def counted(app, outcome):
    """Return how many deliveries of an outcome the database knows of."""
    sql = "SELECT coalesce(sum(count), 0) FROM deliveries WHERE outcome = ?"
    return house(app).database.connection().execute(sql, (outcome,)).fetchone()[0]


def test_strangers_cannot_make_the_disk_work(app, client):
    statements, started = [], time.monotonic()
    house(app).database.connection().set_trace_callback(statements.append)
    for _ in range(300):
        assert post(client, b"nonsense").status_code == 400
    assert 1 <= statements.count("COMMIT") <= 101 + time.monotonic() - started
    assert post(client, event_payload()).status_code == 201
    assert counted(app, "refused") == 300


def test_the_counts_stay_few_whatever_arrives(app, client):
    for number in range(150):
        assert post(client, {"action": f"action {number}", "data": {}}).status_code == 200
        post(client, b"x" * number)
    post(client, event_payload())
    rows = house(app).database.connection().execute("SELECT count(*) FROM deliveries").fetchone()[0]
    assert rows <= 8


def test_old_counts_go(app, client):
    post(client, event_payload("a"))
    old, young = ((datetime.now(UTC) - timedelta(days=days)).isoformat()[:10] for days in (100, 80))
    with house(app).database.turn() as connection:
        for day in (old, young):
            connection.execute("INSERT INTO deliveries VALUES (?, 'stored', '', 5, ?)", (day, day))
    post(client, event_payload("b"))
    days = [
        row[0]
        for row in house(app)
        .database.connection()
        .execute("SELECT DISTINCT day FROM deliveries ORDER BY day")
    ]
    assert days[0] == young
    assert counted(app, "stored") == 7
    stored = next(
        row for row in client.get("/config").json["deliveries"] if row["outcome"] == "stored"
    )
    assert (stored["today"], stored["count"]) == (2, 7)


def test_a_rolled_back_delivery_is_not_counted_as_stored(app, client, monkeypatch):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    with locked(app):
        post(client, event_payload("a"))
    post(client, event_payload("b"))
    assert [counted(app, "stored"), counted(app, "queued")] == [1, 1]


# --------------------------------------------------------------------------------------------------
# Backup
# --------------------------------------------------------------------------------------------------


def test_a_backup_is_one_consistent_file_while_deliveries_come_in(app, client, tmp_path):
    for number in range(50):
        post(client, event_payload(f"before {number}"))
    stop, posted = threading.Event(), []

    def deliver():
        with app.test_client() as other:
            while not stop.is_set():
                posted.append(
                    post(
                        other,
                        event_payload(f"meanwhile {len(posted)}", extra=os.urandom(2000).hex()),
                    ).status_code
                )
        house(app).database.close()

    thread = threading.Thread(target=deliver)
    thread.start()
    try:
        wait_for(lambda: len(posted) > 20)
        done = app.test_cli_runner().invoke(args=["backup", str(tmp_path / "copy.db")])
        seen = len(posted)
        wait_for(lambda: len(posted) > seen)
    finally:
        stop.set()
        thread.join()
    assert done.exit_code == 0, done.output
    assert "%" in done.output and "errors" in done.output
    assert set(posted) == {201}
    assert not list(tmp_path.glob("copy.db?*"))
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        ids = [row[0] for row in copy.execute("SELECT id FROM errors ORDER BY id")]
    assert ids == list(range(1, len(ids) + 1))
    assert 70 <= len(ids) <= 50 + len(posted)


def test_a_backup_is_of_one_moment_and_no_writer_makes_it_start_again(app, client, tmp_path):
    house(app).database.connection().execute("PRAGMA synchronous = OFF")
    for number in range(6):
        post(client, event_payload(f"before {number}", extra=os.urandom(2_000_000).hex()))
    shares = []

    def report(share):
        shares.append(share)
        assert len(shares) < 50
        post(client, event_payload(f"meanwhile {len(shares)}"))

    collector.backup(house(app).database.path, tmp_path / "copy.db", report)
    assert len(shares) >= 2
    assert shares == sorted(shares)
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT count(*) FROM errors").fetchone()[0] == 6
    assert count_rows(app) == 6 + len(shares)


def test_a_backup_can_be_served(make_app, tmp_path):
    app = make_app()
    post(app.test_client(), event_payload(title="findme"))
    back_up(app, tmp_path / "copy.db")
    restored = create_app({"DATABASE_URL": f"sqlite:///{tmp_path}/copy.db"})
    assert restored.test_client().get("/errors/latest?q=findme").json["id"] == 1
    house(restored).database.close()


@pytest.mark.parametrize("target", ["there.db", "missing/copy.db"])
def test_a_backup_that_cannot_be_made_says_why_and_harms_nothing(app, tmp_path, target):
    (tmp_path / "there.db").write_text("precious")
    done = app.test_cli_runner().invoke(args=["backup", str(tmp_path / target)])
    assert done.exit_code == 1
    assert done.output.startswith("Error: ") or "\nError: " in done.output
    assert target in done.output
    assert (tmp_path / "there.db").read_text() == "precious"


# --------------------------------------------------------------------------------------------------
# Reports to Sentry
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def sentry():
    """Run a server that takes envelopes as Sentry does; give its DSN and the list of envelopes that came in."""
    envelopes = []

    class Ingest(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            encoded = self.headers.get("Content-Encoding") == "gzip"
            envelopes.append((dict(self.headers), gzip.decompress(body) if encoded else body))
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ingest)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://public@127.0.0.1:{server.server_address[1]}/1", envelopes
    sentry_sdk.get_client().close(timeout=2)
    sentry_sdk.init()
    server.shutdown()
    thread.join()
    server.server_close()


def reported(envelopes):
    """Return the events in the envelopes that have come in."""
    sentry_sdk.flush(timeout=5)
    lines = [line for _, body in envelopes for line in body.split(b"\n") if line.startswith(b"{")]
    return [item for item in map(json.loads, lines) if "exception" in item]


def test_a_storage_failure_is_reported_without_content_or_secrets(make_app, tmp_path, sentry):
    dsn, envelopes = sentry
    (tmp_path / "data").mkdir()
    (tmp_path / "data/errors.db").write_bytes(b"no database " * 1000)
    secrets = {"SENTRY_CLIENT_SECRET": "c0nfidential-secret", "API_TOKEN": "c0nfidential-token"}
    client = make_app(SENTRY_DSN=dsn, **secrets).test_client()
    body = wire(
        event_payload(
            title="c0nfidential title", request={"url": "https://c0nfidential.example.com"}
        )
    )
    signature = sign(body, secrets["SENTRY_CLIENT_SECRET"])
    headers = {
        "Authorization": "Bearer c0nfidential-token",
        "Cookie": "c0nfidential=1",
        "X_Own": "c0nfidential",
    }
    assert post(client, body, **signature, **headers).status_code == 202
    (event,) = reported(envelopes)
    assert [value["type"] for value in event["exception"]["values"]][-1] == "DatabaseError"
    assert event["exception"]["values"][-1]["value"] == "file is not a database"
    sent = b"".join(body for _, body in envelopes)
    assert b"c0nfidential" not in sent
    assert signature["Sentry-Hook-Signature"].encode() not in sent
    for key in (
        b'"vars"',
        b'"context_line"',
        b'"request"',
        b'"breadcrumbs"',
        b'"server_name"',
        b'"user"',
    ):
        assert key not in sent


def test_failures_are_reported_once_a_minute_at_most(make_app, tmp_path, sentry):
    dsn, envelopes = sentry
    (tmp_path / "data").mkdir()
    (tmp_path / "data/errors.db").write_bytes(b"no database " * 1000)
    client = make_app(SENTRY_DSN=dsn).test_client()
    for number in range(5):
        assert post(client, event_payload(str(number))).status_code == 202
        assert client.get("/errors").status_code == 503
    assert len(reported(envelopes)) == 1


def test_a_fault_is_reported_without_its_words(make_app, sentry):
    dsn, envelopes = sentry
    app = make_app(SENTRY_DSN=dsn)
    client = app.test_client()
    post(client, event_payload())
    with house(app).database.turn() as connection:
        connection.execute(
            "UPDATE errors SET payload = 'c0nfidential', payload_bytes = length('c0nfidential')"
        )
    reply = client.get("/errors/1")
    assert (reply.status_code, list(reply.json)) == (500, ["error"])
    assert "c0nfidential" not in reply.text
    (event,) = reported(envelopes)
    assert not event["exception"]["values"][-1]["value"]
    assert b"c0nfidential" not in b"".join(body for _, body in envelopes)


def test_what_others_do_wrong_is_not_reported(make_app, sentry):
    dsn, envelopes = sentry
    client = make_app(
        SENTRY_DSN=dsn, SENTRY_CLIENT_SECRET=SECRET, MAX_BODY_BYTES="5000"
    ).test_client()
    body = wire(event_payload())
    assert post(client, body).status_code == 401
    assert post(client, b"[]", **sign(b"[]")).status_code == 400
    assert post(client, b"x" * 5001).status_code == 413
    assert [
        client.get(path).status_code for path in ("/errors/7", "/errors?limit=x", "/nowhere")
    ] == [404, 400, 404]
    assert client.put("/errors").status_code == 405
    assert post(client, body, **sign(body)).status_code == 201
    assert reported(envelopes) == []


def test_the_dsn_is_never_shown(make_app, sentry):
    dsn, _ = sentry
    client = make_app(SENTRY_DSN=dsn).test_client()
    for path in ("/", "/config", "/?format=html"):
        assert "public@" not in client.get(path).text
    assert client.get("/config").json["sentry_dsn_set"] is True


# --------------------------------------------------------------------------------------------------
# Deliveries that are committed together
# --------------------------------------------------------------------------------------------------


def hand_over(app, payload):
    """Hand a delivery to the app as a server does; return its reply, for which the server has not asked yet."""
    started = []
    environ = EnvironBuilder("/sentry/webhook", method="POST", data=wire(payload)).get_environ()
    return started, app.wsgi_app(
        environ, lambda status, headers: started.append((status, dict(headers)))
    )


def ask_for(reply):
    """Ask for a reply as a server does; return its status and its JSON."""
    started, parts = reply
    body = b"".join(parts)
    parts.close()
    return int(started[0][0].split()[0]), json.loads(body)


def test_deliveries_that_are_here_together_share_a_commit(app):
    statements = []
    house(app).database.connection().set_trace_callback(statements.append)
    replies = [hand_over(app, event_payload(name)) for name in "abca"]
    assert (statements.count("COMMIT"), [started for started, _ in replies]) == (0, [[]] * 4)
    answers = [ask_for(reply) for reply in replies]
    assert statements.count("COMMIT") == 1
    assert [(status, answer["status"], answer["id"]) for status, answer in answers] == [
        (201, "stored", 1),
        (201, "stored", 2),
        (201, "stored", 3),
        (200, "duplicate", 1),
    ]
    assert [started[0][1].get("Location") for started, _ in replies] == [
        "/errors/1",
        "/errors/2",
        "/errors/3",
        None,
    ]
    assert (event_ids(app), counted(app, "stored"), counted(app, "duplicate")) == (
        ["a", "b", "c"],
        3,
        1,
    )


def test_a_delivery_that_cannot_be_stored_costs_the_others_nothing(app):
    refuse_bad(app)
    replies = [hand_over(app, event_payload(name)) for name in ("a", "bad", "b")]
    assert [ask_for(reply)[0] for reply in replies] == [201, 202, 201]
    assert (event_ids(app), counted(app, "stored")) == (["a", "b"], 2)
    assert len(list(house(app).spool.folder.iterdir())) == 1


def test_a_group_that_finds_the_database_locked_is_spooled_in_order(app, client, monkeypatch):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    with locked(app):
        replies = [hand_over(app, event_payload(name)) for name in "abc"]
        assert [ask_for(reply) for reply in replies] == [(202, {"status": "queued"})] * 3
    assert keep_house(client) == 200
    assert event_ids(app) == ["a", "b", "c"]


def test_a_delivery_is_stored_even_if_nobody_asks_for_the_reply(app):
    _, parts = hand_over(app, event_payload("a"))
    parts.close()
    with locked(app):
        _, parts = hand_over(app, event_payload("b"))
        parts.close()
        assert spooled(app) == 1
    assert keep_house(app.test_client()) == 200
    assert event_ids(app) == ["a", "b"]


def test_threads_that_deliver_at_once_all_get_their_own_reply(app):
    def deliver(start):
        answers = [
            ask_for(hand_over(app, event_payload(f"{number}")))
            for number in range(start, start + 10)
        ]
        house(app).database.close()  # a thread has a connection of its own
        return answers

    with ThreadPoolExecutor(8) as pool:
        answers = [answer for answers in pool.map(deliver, range(0, 80, 10)) for answer in answers]
    ids = {row["event_id"]: row["id"] for row in app.test_client().get("/errors").json}
    assert [(status, answer["id"]) for status, answer in answers] == [
        (201, ids[f"{number}"]) for number in range(80)
    ]


# --------------------------------------------------------------------------------------------------
# What workers tell each other, and what stands in the way
# --------------------------------------------------------------------------------------------------


def test_only_one_of_all_workers_waits_for_a_lock(make_app, monkeypatch):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.5)
    first, second = make_app(), make_app()
    with locked(first):
        assert seconds_to_post(first.test_client(), event_payload("a"), 202) > 0.4
        assert seconds_to_post(second.test_client(), event_payload("b"), 202) < 0.3
        assert seconds_to_post(make_app().test_client(), event_payload("c"), 202) < 0.3
    assert keep_house(second.test_client()) == 200
    with locked(second):
        assert seconds_to_post(first.test_client(), event_payload("d"), 202) > 0.4


def test_a_spooled_file_that_cannot_be_read_is_told_of_and_holds_up_nobody(
    app, client, monkeypatch, start_log
):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.1)
    (house(app).spool.folder / "0-0.delivery").mkdir()
    with locked(app):
        post(client, event_payload())
    assert keep_house(client) == 200
    assert (event_ids(app), client.get("/config").json["spooled"]) == (["0" * 32], 1)
    assert keep_house(client) == 200
    assert start_log().count("cannot read a spooled delivery") == 1


def test_a_spooled_delivery_that_another_worker_has_set_aside_holds_up_nobody(app, client):
    refuse_bad(app)
    house(app).spool.put(collector.now(), "error", wire(event_payload("bad")))
    with locked(app):
        house(app).keep_house()
    (file,) = house(app).spool.folder.glob("*.delivery")
    file.rename(file.with_suffix(".rejected"))
    house(app).spool.put(collector.now(), "error", wire(event_payload("good")))
    assert keep_house(client) == 200
    assert (event_ids(app), spooled(app)) == (["good"], 0)


def test_the_wal_stays_short_without_a_checkpoint_before_a_reply(app, client):
    wal, statements = Path(f"{house(app).database.path}-wal"), []
    house(app).database.connection().set_trace_callback(statements.append)
    for number in range(400):
        client.post(
            "/sentry/webhook",
            data=wire(event_payload(str(number), extra="x" * 20_000)),
            buffered=True,
        )
        house(app).kept_house_at = 0
    assert 1 <= statements.count("PRAGMA wal_checkpoint(PASSIVE)") <= 10
    assert wal.stat().st_size < 8_000_000


def test_a_wal_of_another_database_is_not_taken_up_at_the_start(make_app, tmp_path):
    app = make_app()
    client = app.test_client()
    post(client, event_payload("kept"))
    back_up(app, tmp_path / "copy.db")
    post(client, event_payload("lost"))
    left = tmp_path / "left"
    shutil.copytree(tmp_path / "data", left)  # as a kill leaves it
    assert (left / "errors.db-wal").stat().st_size > 0
    shutil.copyfile(tmp_path / "copy.db", left / "errors.db")
    restored = create_app({"DATABASE_URL": f"sqlite:///{left}/errors.db"})
    assert event_ids(restored) == ["kept"]
    assert post(restored.test_client(), event_payload("next")).status_code == 201
    house(restored).database.close()
    with closing(sqlite3.connect(left / "errors.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_the_wal_of_a_database_that_was_killed_is_taken_up(make_app, tmp_path):
    post(make_app().test_client(), event_payload())
    shutil.copytree(tmp_path / "data", tmp_path / "left")
    killed = create_app({"DATABASE_URL": f"sqlite:///{tmp_path}/left/errors.db"})
    assert event_ids(killed) == ["0" * 32]
    house(killed).database.close()


def test_a_wal_whose_database_was_removed_is_not_taken_up(make_app, tmp_path):
    post(make_app().test_client(), event_payload("lost"))
    left = tmp_path / "left"
    shutil.copytree(tmp_path / "data", left)
    (left / "errors.db").unlink()
    fresh = create_app({"DATABASE_URL": f"sqlite:///{left}/errors.db"})
    assert post(fresh.test_client(), event_payload("new")).status_code == 201
    assert event_ids(fresh) == ["new"]
    house(fresh).database.close()
