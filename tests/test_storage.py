"""The settings, the database, its spool and its search index: real files, locks and damage."""

import gzip
import http.server
import json
import math
import os
import random
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
from pathlib import Path

import pytest
import sentry_sdk
from conftest import (
    PAYLOADS,
    ROOT,
    SECRET,
    core,
    count_rows,
    counts,
    event_ids,
    event_payload,
    load,
    locked,
    maintain,
    post,
    select,
    sign,
    spooled,
    wire,
)

import collector
from collector import COLUMNS, Database, busy_error, choose_journal_mode, create_app

BODY_COLUMNS = "payload_bytes", "payload"
OLD_COLUMNS = COLUMNS[:-2]  # columns of 1.0.0


def error_row(body=b"{}", **columns):
    """Return the row of a delivery, with the columns given, as insert_error takes it."""
    at = collector.now()
    row = dict.fromkeys(COLUMNS[1:]) | {"received_at": at, "timestamp": at, "action": "created"}
    return row | columns | collector.pack(body)


def insert(app, *rows):
    """Insert rows in one transaction; return (id, True if it is new) of each."""
    with core(app).database.transaction() as connection:
        return [collector.insert_error(connection, row) for row in rows]


def ids(client, **query):
    """Return the ids of the errors that /errors lists for a query."""
    reply = client.get("/errors", query_string=query)
    assert reply.status_code == 200, reply.text
    return [row["id"] for row in reply.json]


def put(app, payload, received_at=None, resource="error"):
    """Spool a delivery, a dict or bytes."""
    body = payload if isinstance(payload, bytes) else wire(payload)
    core(app).spool.put(received_at or collector.now(), resource, body)


def database_path(app):
    """Return the path of the app's database."""
    return core(app).database.path


def begin_pause(app):
    """Have the worker leave the database alone, as after a wait in vain for its lock."""
    core(app).database.pause(sqlite3.OperationalError("database is locked"))


def end_pause(app):
    """Let the worker try the database again, as after PAUSE_SECONDS."""
    core(app).database.paused_until = -math.inf


def integrity(path):
    """Return what SQLite finds wrong in a database file."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("PRAGMA integrity_check").fetchall()


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
    ("SENTRY_ACTIONS", "created,resolved"),
    ("SENTRY_ACTIONS", ","),
    ("API_TOKEN", "tökén"),
    ("API_TOKEN", "two\nlines"),
    ("PUBLIC_URL", "errors.example.com"),
    ("PUBLIC_URL", "ftp://errors.example.com"),
    ("PUBLIC_URL", "https://"),
    ("PUBLIC_URL", "https://errors.example.com/?a=b"),
    ("PUBLIC_URL", 'https://errors.example.com/"'),
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
    monkeypatch.setenv("SENTRY_CLIENT_SECRET", f"another {PASSWORD}")
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
    env = os.environ | {"PYTHONPATH": str(ROOT), "PORT": "x"}
    command = [sys.executable, "-c", "import collector; collector.create_app()"]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("PORT: ")
    assert done.stderr.count("\n") == 1


DEFAULT_CONFIG = {
    "sentry_actions": ["created"],
    "max_body_bytes": 5 * 1024 * 1024,
    "web_concurrency": 4,
    "port": 8000,
    "retention_days": None,
    "public_url": "",
    "trusted_hosts": [],
    "sentry_dsn_set": False,
    "sentry_client_secret_set": False,
    "api_token_set": False,
}


def test_an_empty_setting_is_an_unset_one(make_app, monkeypatch):
    for name in DEFAULT_CONFIG:
        monkeypatch.setenv(name.upper().removesuffix("_SET"), "")
    monkeypatch.setenv("PORT", "  ")
    config = make_app(WEB_CONCURRENCY="").test_client().get("/config").json
    assert {name: config[name] for name in DEFAULT_CONFIG} == DEFAULT_CONFIG


def test_the_environment_wins_over_the_env_file_and_both_over_the_defaults(
    tmp_path, monkeypatch, make_app
):
    lines = 'API_TOKEN="from file"', "RETENTION_DAYS=7", "PORT=9000", "MAX_BODY_BYTES="
    monkeypatch.chdir(tmp_path)
    Path(".env").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("RETENTION_DAYS", "30")
    monkeypatch.setenv("PORT", "")
    client = make_app().test_client()
    assert client.get("/config").status_code == 401
    config = client.get("/config", headers={"Authorization": "Bearer from file"}).json
    given = {name: config[name] for name in ("retention_days", "port", "max_body_bytes")}
    assert given == {"retention_days": 30, "port": 9000, "max_body_bytes": 5 * 1024 * 1024}


def test_the_settings_are_read_once(make_app, monkeypatch):
    client = make_app().test_client()
    monkeypatch.setenv("API_TOKEN", "later")
    assert client.get("/errors").status_code == 200


@pytest.mark.parametrize("scheme", ["sqlite:///", "sqlite+aiosqlite:///"])
@pytest.mark.parametrize("path", ["{}/a/b/errors.db", "relative/errors.db"])
def test_the_folder_of_the_database_is_made(tmp_path, monkeypatch, make_app, scheme, path):
    monkeypatch.chdir(tmp_path)
    app = make_app(DATABASE_URL=scheme + path.format(tmp_path))
    assert post(app.test_client(), event_payload()).status_code == 201
    assert (tmp_path / path.format(tmp_path)).is_file()


def test_making_an_app_makes_no_file(tmp_path):
    create_app({"DATABASE_URL": f"sqlite:///{tmp_path}/data/errors.db"})
    assert list(tmp_path.iterdir()) == []


def test_the_links_of_the_database_are_resolved_once(tmp_path, make_app):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/real.db").touch()
    (tmp_path / "link.db").symlink_to(tmp_path / "there/real.db")
    app = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/link.db")
    client = app.test_client()
    assert post(client, event_payload()).status_code == 201
    assert client.get("/config").json["database_path"] == f"{tmp_path}/there/real.db"
    assert (tmp_path / "there/real.db-wal").stat().st_size > 0
    assert (tmp_path / "there/spool").is_dir()


def test_a_number_may_be_a_secret(make_app):
    client = make_app(SENTRY_CLIENT_SECRET=12345).test_client()
    body = wire(event_payload())
    assert post(client, body).status_code == 401
    assert post(client, body, **sign(body, "12345")).status_code == 201


STARTS = [
    (
        {},
        "signature check OFF;read token OFF;trusted hosts any;public URL as requested;"
        "Sentry reports off;actions created;retention off;journal mode",
    ),
    (
        {
            "SENTRY_CLIENT_SECRET": SECRET,
            "API_TOKEN": "t0ken",
            "SENTRY_ACTIONS": "created,triggered",
            "RETENTION_DAYS": "9",
            "TRUSTED_HOSTS": "localhost, a_b",
            "PUBLIC_URL": "https://errors.example.com/",
        },
        "signature check on;read token on;trusted hosts localhost, a_b;"
        "public URL https://errors.example.com;actions created,triggered;retention 9 days",
    ),
    ({"SENTRY_CLIENT_SECRET": f"'{SECRET}'"}, "has quotes at its ends"),
    ({"SENTRY_CLIENT_SECRET": f"{SECRET}\n"}, "has white space at its ends"),
]


@pytest.mark.parametrize(("settings", "expected"), STARTS, ids=range(len(STARTS)))
def test_the_start_says_in_one_line_what_is_on_and_what_is_off(make_app, settings, expected):
    line = collector.describe_start(core(make_app(**settings)))
    assert [part for part in expected.split(";") if part not in line] == []
    assert "\n" not in line
    assert SECRET not in line
    assert "t0ken" not in line


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


def test_a_folder_that_cannot_be_written_stops_the_start_and_names_the_owner(open_folder, make_app):
    folder = open_folder / "data"
    folder.mkdir(mode=0o555)
    with unprivileged(open_folder), pytest.raises(SystemExit) as stop:
        make_app(DATABASE_URL=f"sqlite:///{folder}/errors.db")
    line = str(stop.value.code)
    assert line.startswith(f"DATABASE_URL: cannot write in {folder}")
    assert f"uid {folder.stat().st_uid}" in line
    assert "chown" in line


# --------------------------------------------------------------------------------------------------
# The database
# --------------------------------------------------------------------------------------------------

ROOT_MOUNT = "22 1 8:1 / / rw,relatime shared:1 - {} /dev/sda1 rw\n"
EXT4 = ROOT_MOUNT.format("ext4")
OVERLAY = ROOT_MOUNT.format("overlay")
NFS = ROOT_MOUNT.format("nfs4")
MOUNTS = [
    (EXT4, "/data", "WAL"),
    (ROOT_MOUNT.format("xfs"), "/data", "WAL"),
    (OVERLAY, "/data", "WAL"),
    (ROOT_MOUNT.format("virtiofs"), "/data", "PERSIST"),
    (ROOT_MOUNT.format("somefs"), "/data", "PERSIST"),
    (OVERLAY + "30 22 0:40 / /data rw - 9p host rw\n", "/data", "PERSIST"),
    (OVERLAY + "30 22 0:40 / /data rw - 9p host rw\n", "/database", "WAL"),
    (NFS + "30 22 0:40 / /data rw shared:3 master:1 - ext4 /dev/sdb rw\n", "/data/deep/er", "WAL"),
    (EXT4 + "30 22 0:40 / /data rw - fuse.osxfs a rw\n", "/data", "PERSIST"),
    (
        EXT4 + "30 22 0:4 / /data rw - cifs //a/b rw\n31 30 8:2 / /data rw - btrfs b rw\n",
        "/data",
        "WAL",
    ),
    (EXT4 + "30 22 0:40 / /my\\040data rw - fuse a rw\n", "/my data/x", "PERSIST"),
    (EXT4 + "30 22 0:40 / /my\\134data rw - fuse a rw\n", "/my\\data/x", "PERSIST"),
    (EXT4 + "30 22 0:40 / /dätä rw - nfs a rw\n", "/dätä", "PERSIST"),
    (EXT4 + "30 22 0:40 / /d\udce4ta rw - nfs a rw\n", "/data", "WAL"),
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
    (tmp_path / "mountinfo").write_text(EXT4 + f"30 22 0:1 / {tmp_path}/there rw - nfs a rw\n")
    assert choose_journal_mode(tmp_path / "here", tmp_path / "mountinfo") == "PERSIST"


@pytest.mark.parametrize("mode", ["WAL", "PERSIST"])
def test_the_journal_is_the_one_chosen_and_every_commit_is_synced(make_app, monkeypatch, mode):
    monkeypatch.setattr(collector, "choose_journal_mode", lambda folder: mode)
    app = make_app()
    client = app.test_client()
    assert post(client, event_payload()).status_code == 201
    assert select(app, "PRAGMA journal_mode") == [(mode.lower(),)]
    assert select(app, "PRAGMA synchronous") == [(2,)]
    assert client.get("/config").json["journal_mode"] == mode
    assert client.get("/health").status_code == 200
    assert post(make_app().test_client(), event_payload("a")).json["id"] == 2


def test_a_change_of_the_journal_that_has_to_wait_is_not_called_one_of_the_schema(
    app, make_app, monkeypatch
):
    monkeypatch.setattr(collector, "choose_journal_mode", lambda folder: "PERSIST")
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.05)
    with core(app).database.turn(0):
        health = make_app().test_client().get("/health")
    assert (health.status_code, "schema" in health.json["error"]) == (503, False)


def test_an_id_is_never_used_twice(app, client):
    insert(app, *(error_row(event_id=name) for name in "abc"))
    with core(app).database.transaction() as connection:
        collector.delete_errors(connection, [1, 2, 3])
    assert count_rows(app) == 0
    assert post(client, event_payload("a")).json["id"] == 4


def test_a_committed_row_is_in_the_file_before_the_reply(app, client, tmp_path):
    post(client, event_payload())
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy/errors.db")) as copy:
        assert copy.execute("SELECT event_id FROM errors").fetchall() == [("0" * 32,)]
        assert copy.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def body_that_packs_to_its_own_length():
    """Return a delivery that would pass for one that is not compressed once it is."""
    for number in range(2000):
        body = b'{"event":{"id":"%b"}}' % (b"ab" * 5 + os.urandom(number // 2).hex().encode())
        if len(zlib.compress(body, 1)) == len(body):
            return body
    raise AssertionError("no such body in 2,000 trials")


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
        reply = {"status": "stored", "id": number, "url": f"/errors/{number}"}
        assert post(client, body).json == reply
        assert client.get(f"/errors/{number}/payload").data == body


def test_a_body_takes_a_fraction_of_its_size(app, client):
    post(client, wire(load("error.created.python")) + b" " * 20_000)
    ((packed, whole),) = select(app, "SELECT length(payload), payload_bytes FROM bodies")
    assert packed < whole / 5


def test_the_sqlite_shell_reads_the_bodies(app, client):
    shell = shutil.which("sqlite3")
    functions = "SELECT name FROM pragma_function_list"
    if not shell or "sqlar_uncompress" not in shell_output(shell, ":memory:", functions):
        pytest.skip("needs the sqlite3 shell with sqlar_uncompress")
    for body in BODIES:
        post(client, body)
    sql = "SELECT hex(sqlar_uncompress(payload, payload_bytes)) FROM bodies ORDER BY id"
    hexes = shell_output(shell, str(database_path(app)), sql).split()
    assert [bytes.fromhex(text) for text in hexes] == BODIES


def shell_output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout


def test_the_wal_stays_short(app, client, tmp_path):
    wal = tmp_path / "data/errors.db-wal"
    sizes = []
    for number in range(4):
        rows = [error_row(os.urandom(20_000), event_id=f"{number}-{each}") for each in range(60)]
        for row in rows:
            insert(app, row)
        maintain(app)
        sizes.append(wal.stat().st_size)
    assert max(sizes) < 1.5 * sizes[0]


def test_the_wal_of_a_database_that_was_killed_is_taken_up(make_app, tmp_path):
    post(make_app().test_client(), event_payload())
    shutil.copytree(tmp_path / "data", tmp_path / "left")
    killed = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/left/errors.db")
    assert event_ids(killed) == ["0" * 32]


POSTER = """
import json, sys
from collector import create_app
client = create_app().test_client()
print("ready", flush=True)
sys.stdin.readline()
bodies = json.load(open(sys.argv[1]))
print(json.dumps([client.post("/sentry/webhook", json=body).json["status"] for body in bodies]))
"""


def test_the_database_decides_what_is_a_duplicate_also_between_processes(tmp_path):
    bodies = []
    for number in range(20):
        bodies += [
            event_payload(f"event {number}"),
            {"action": "created", "data": {"issue": {"id": f"issue {number}"}}},
            {"event": {"title": f"without ids {number}"}},
        ]
    (tmp_path / "bodies.json").write_text(json.dumps(bodies))
    url = f"sqlite:///{tmp_path}/data/errors.db"
    env = os.environ | {"PYTHONPATH": str(ROOT), "DATABASE_URL": url}
    command = [sys.executable, "-c", POSTER, str(tmp_path / "bodies.json")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"text": True}
    processes = [subprocess.Popen(command, env=env, cwd=tmp_path, **pipes) for _ in range(3)]
    try:
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 3
        for process in processes:
            process.stdin.write("go\n")
            process.stdin.flush()
        statuses = [json.loads(process.communicate(timeout=30)[0]) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    for outcomes in zip(*statuses, strict=True):
        assert outcomes.count("stored") == 1
        # On a busy machine one may wait for the others for too long, and is spooled.
        assert set(outcomes) <= {"stored", "duplicate", "queued"}
    with closing(sqlite3.connect(tmp_path / "data/errors.db")) as connection:
        assert connection.execute("SELECT count(*) FROM errors").fetchone()[0] == 60
    assert integrity(tmp_path / "data/errors.db") == [("ok",)]


# --------------------------------------------------------------------------------------------------
# Schema steps
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def old_database(tmp_path):
    """Return the path of a database that version 1.0.0 made, with five errors and deliveries."""
    path = tmp_path / "data/errors.db"
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript((PAYLOADS / "database-1.0.0.sql").read_text(encoding="utf-8"))
    return path


def old_rows(path):
    """Return the errors of a database of either version, the columns of 1.0.0 alone."""
    with closing(sqlite3.connect(path)) as connection:
        sql = f"SELECT {', '.join(OLD_COLUMNS)} FROM errors ORDER BY id"
        return connection.execute(sql).fetchall()


def schema_of(path):
    """Return what is defined in a database, by name."""
    with closing(sqlite3.connect(path)) as connection:
        return dict(connection.execute("SELECT name, sql FROM sqlite_schema").fetchall())


def test_a_database_of_1_0_0_keeps_all_it_has(make_app, old_database):
    before = old_rows(old_database)
    with closing(sqlite3.connect(old_database)) as connection:
        bodies = connection.execute("SELECT id, payload_bytes, payload FROM errors").fetchall()
    app = make_app()
    assert old_rows(old_database) == before
    assert select(app, "SELECT id, payload_bytes, payload FROM bodies") == bodies
    assert select(app, "SELECT id, server, category FROM errors") == [
        (1, "sentry.io", "error"),
        (2, "sentry.io", "error"),
        (5, None, "error"),
        (6, "errors.example.org", "error"),
        (7, None, "error"),
    ]
    assert select(app, "SELECT * FROM deliveries ORDER BY period, outcome") == [
        ("2026-05-01T00:00", "stored", "", 2, "2026-05-01T10:00:01.000000Z"),
        ("2026-05-05T00:00", "refused", "signature wrong", 3, "2026-05-05T09:00:00.000000Z"),
        ("2026-05-05T00:00", "stored", "", 7, "2026-05-05T08:30:00.000000Z"),
    ]
    assert select(app, "PRAGMA user_version") == [(2,)]
    assert select(app, "PRAGMA integrity_check") == [("ok",)]


def test_errors_of_1_0_0_get_their_category(make_app, old_database):
    bodies = (
        wire(event_payload(type="csp", csp={"blocked_uri": "x"})),
        wire({"action": "created", "data": {"issue": {"id": "1", "issueCategory": "cron"}}}),
        b"no JSON",
    )
    sql = "UPDATE errors SET resource = 'issue', payload_bytes = ?, payload = ? WHERE id = ?"
    with closing(sqlite3.connect(old_database)) as connection:
        for id_, body in zip((1, 2, 5), bodies, strict=True):
            connection.execute(sql, (len(body), body, id_))
        connection.commit()
    assert select(make_app(), "SELECT category FROM errors") == [
        ("csp",), ("cron",), ("error",), ("error",), ("error",),
    ]  # fmt: skip


def test_the_issues_of_a_database_of_1_0_0_are_counted(make_app, old_database):
    app = make_app()
    first, second = "2026-05-01T10:00:00.000000Z", "2026-05-01T10:00:01.000000Z"
    third, fourth = "2026-05-04T08:30:00.000000Z", "2026-05-05T08:30:00.000000Z"
    assert select(app, "SELECT * FROM issues ORDER BY newest") == [
        ("77", "sentry.io", "SHOP-1", "4500", "shop", 2, first, second, 2),
        ("77", "errors.example.org", None, "12", None, 1, third, third, 6),
        ("78", "", None, None, "shop", 1, fourth, fourth, 7),
    ]


def test_an_upgraded_database_is_as_a_new_one(make_app, old_database, tmp_path):
    make_app()
    make_app(DATABASE_URL=f"sqlite:///{tmp_path}/new.db")
    assert schema_of(old_database) == schema_of(tmp_path / "new.db")


def test_errors_of_1_0_0_are_searched_by_all_there_is(make_app, old_database):
    client = make_app().test_client()
    assert ids(client, q="pot empty") == [2, 1]
    assert ids(client, q="没有") == [6]
    assert ids(client, level="error", project="shop") == [7, 1]
    assert ids(client, project="4500") == [2, 1]
    assert ids(client, server="sentry.io") == [2, 1]
    assert ids(client, issue="SHOP-1") == [2, 1]
    assert ids(client, release="1.4.2") == [2]
    assert ids(client, event="b" * 32) == [6]


def test_deliveries_of_1_0_0_are_known_again_and_ids_go_on(make_app, old_database):
    app = make_app(SENTRY_ACTIONS="created,triggered")
    client = app.test_client()
    for id_ in (1, 2, 5, 6, 7):
        body = client.get(f"/errors/{id_}/payload").data
        assert (post(client, body).json["status"], post(client, body).json["id"]) == (
            "duplicate",
            id_,
        )
    assert post(client, event_payload()).json["id"] == 10


def test_the_log_says_what_is_changed_and_how_long_it_took(make_app, old_database, log):
    make_app()
    first, second = [line for line in log() if "database" in line]
    assert first == "changing the database from version 1 to 2"
    assert second.startswith("changed the database in ")
    make_app()
    assert len([line for line in log() if "database" in line]) == 2


def test_an_upgrade_that_fails_half_way_leaves_the_old_database_whole(make_app, old_database, log):
    with closing(sqlite3.connect(old_database)) as connection:
        connection.execute("CREATE TABLE issues (mine)")  # in the way of one that is made late
    before = schema_of(old_database), old_rows(old_database)
    app = make_app()
    client = app.test_client()
    assert post(client, event_payload()).status_code == 202
    assert (schema_of(old_database), old_rows(old_database)) == before
    assert "issues already exists" in client.get("/health").json["error"]
    assert any("cannot be used" in line and "issues already exists" in line for line in log())
    with closing(sqlite3.connect(old_database)) as connection:
        connection.execute("DROP TABLE issues")
    maintain(app)
    assert event_ids(app) == [None, "a" * 32, None, "b" * 32, "c" * 32, "0" * 32]


def test_two_workers_that_start_at_once_change_the_database_once(make_app, old_database, log):
    databases = [Database(old_database) for _ in range(2)]
    barrier = threading.Barrier(2)

    def open_database(database):
        barrier.wait()
        database.open().close()

    with ThreadPoolExecutor() as pool:
        list(pool.map(open_database, databases))
    for database in databases:
        database.close()
    assert [line for line in log() if "changing" in line] == [
        "changing the database from version 1 to 2"
    ]
    assert count_rows(make_app()) == 5


def test_while_another_worker_changes_the_database_deliveries_are_spooled(
    make_app, old_database, monkeypatch
):
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.05)
    other = Database(old_database)
    with other.turn(0):
        app = make_app()
        client = app.test_client()
        assert post(client, event_payload()).status_code == 202
        health = client.get("/health")
        assert health.status_code == 503
        assert "its schema is being changed from version 1 to 2" in health.json["error"]
    other.close()
    maintain(app)
    assert count_rows(app) == 6
    assert client.get("/health").status_code == 200


def test_a_newer_database_is_left_alone_and_deliveries_are_spooled(make_app, old_database, log):
    with closing(sqlite3.connect(old_database)) as connection:
        connection.execute("PRAGMA user_version = 3")
    before = old_database.read_bytes()
    app = make_app()
    client = app.test_client()
    assert post(client, event_payload()).status_code == 202
    maintain(app)
    words = "it is of version 3, made by a newer collector"
    assert words in client.get("/health").json["error"]
    assert words in client.get("/errors").json["error"]
    assert any("deliveries are spooled" in line and words in line for line in log())
    core(app).database.close()
    assert old_database.read_bytes() == before
    assert spooled(app) == 1


# --------------------------------------------------------------------------------------------------
# Which deliveries are the same
# --------------------------------------------------------------------------------------------------

EVENT = {"event_id": "e" * 32, "issue_id": "77"}
KINDS = {
    "error webhook": {"action": "created", **EVENT},
    "issue alert": {"action": "triggered", **EVENT},
    "issue.created": {"action": "created", "issue_id": "77"},
    "legacy plugin": {"action": None, **EVENT},
    "service hook": {"action": None, **EVENT},
}
# The place of the first delivery, that of the second, and True if they can be the same error.
PLACES = [
    ({"server": "a"}, {"server": "a"}, True),
    ({"server": "a"}, {"server": "b"}, False),
    ({"server": "a"}, {}, True),
    ({}, {"server": "b"}, True),
    ({"project_id": "1"}, {"project_id": "1"}, True),
    ({"project_id": "1"}, {"project_id": "2"}, False),
    ({"project_id": "1"}, {}, True),
    ({}, {"project_id": "2"}, True),
    ({"project_slug": "a"}, {"project_slug": "a"}, True),
    ({"project_slug": "a"}, {"project_slug": "b"}, False),
    ({"project_id": "1"}, {"project_slug": "b"}, True),
    ({"project_id": "1", "project_slug": "a"}, {"project_id": "1", "project_slug": "b"}, True),
    ({"project_id": "1", "project_slug": "a"}, {"project_id": "2", "project_slug": "a"}, False),
    ({"project_id": "1", "project_slug": "a"}, {"project_slug": "b"}, False),
    ({"server": "a", "project_id": "1"}, {"server": "b", "project_id": "1"}, False),
    ({"server": "a", "project_id": "1"}, {"server": "a", "project_id": "2"}, False),
    ({"server": "a"}, {"project_id": "2"}, True),
]


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_which_pairs_of_deliveries_are_one_error(app, first, second):
    is_event_behind_issue = first == "issue.created" and second != "issue.created"
    connection = core(app).database.connection()
    for first_place, second_place, can_be_same in PLACES:
        connection.execute("BEGIN")
        rows = error_row(**KINDS[first], **first_place), error_row(**KINDS[second], **second_place)
        outcomes = [collector.insert_error(connection, row) for row in rows]
        connection.execute("ROLLBACK")
        is_same = can_be_same and not is_event_behind_issue
        expected = (1, False) if is_same else (2, True)
        assert outcomes == [(1, True), expected], (first_place, second_place)


TRIPLES = [
    ([{}, {"project_id": "1"}, {"project_id": "2"}, {}], [1, 1, 2, 1]),
    ([{}, {"project_id": "2"}, {"project_id": "1"}, {"project_id": "2"}], [1, 1, 2, 1]),
    ([{"project_id": "1"}, {}, {"project_id": "2"}], [1, 1, 2]),
    (
        [{"project_slug": "a"}, {"project_id": "1", "project_slug": "a"}, {"project_id": "2"}],
        [1, 1, 2],
    ),
    ([{}, {"server": "a"}, {"server": "b"}, {"server": "a"}], [1, 1, 2, 1]),
    ([{"project_id": "1"}, {"server": "a"}, {"server": "b", "project_id": "1"}], [1, 1, 2]),
]


def test_an_error_learns_the_ids_of_its_issue(app, client):
    post(client, event_payload("1", issue_id="7", project=5))
    post(client, event_payload("2"))
    issue = {"id": "7", "shortId": "APP-7", "title": "x", "project": {"id": "5", "slug": "app"}}
    reply = post(client, {"action": "created", "data": {"issue": issue}})
    assert (reply.json["status"], reply.json["id"]) == ("duplicate", 1)
    post(client, event_payload("2", issue_id="8"))
    assert ids(client, issue="APP-7") == [1]
    assert ids(client, issue="8") == [2]
    assert [row["short_id"] for row in client.get("/issues").json] == [None, "APP-7"]
    check_issues(app)


@pytest.mark.parametrize(("places", "expected"), TRIPLES, ids=range(len(TRIPLES)))
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_delivery_says_of_its_place_is_kept_for_the_next_one(app, kind, places, expected):
    rows = [error_row(**KINDS[kind], **place) for place in places]
    assert [id_ for id_, _ in insert(app, *rows)] == expected


def test_an_error_learns_its_place_and_search_filters_and_issues_follow(app, client):
    body = wire(event_payload())
    bare = error_row(body, **EVENT, title="findme", received_at="2026-01-01T00:00:00.000000Z")
    insert(app, bare, error_row(event_id="other"))
    assert ids(client, q="findme") == [1]  # it is in the index from here on
    place = {
        "server": "sentry.io",
        "project_id": "12",
        "project_slug": "shop",
        "project_name": "Shop",
    }
    assert insert(app, error_row(**EVENT, **place, title="another title")) == [(1, False)]
    kept = {name: bare[name] for name in COLUMNS[1:]}
    assert select(app, f"SELECT {', '.join(COLUMNS[1:])} FROM errors WHERE id = 1") == [
        tuple((kept | place).values())
    ]
    assert client.get("/errors/1/payload").data == body
    for query in ({"server": "sentry.io"}, {"project": "shop"}, {"project": "12"}, {"q": "findme"}):
        assert ids(client, **query) == [1]
    at = bare["received_at"]
    issue = ("77", "sentry.io", None, "12", "shop", 1, at, at, 1)
    assert select(app, "SELECT * FROM issues") == [issue]
    assert [row["id"] for row in client.get("/errors?after=0").json] == [1, 2]


ISSUE = {"action": "created", "data": {"issue": {"id": "77", "title": "of the issue"}}}
REGRESSION = {"action": "unresolved", "data": {"issue": {"id": "77"}, "event": {"event_id": "9"}}}
STORED_ONCE = [
    ("an issue behind an event", [event_payload(issue_id="77"), ISSUE, ISSUE], [1, 1, 1]),
    ("events behind an issue", [ISSUE, event_payload(issue_id="77"), ISSUE], [1, 2, 1]),
    (
        "issues of two numbers",
        [ISSUE, {"action": "created", "data": {"issue": {"id": "78"}}}],
        [1, 2],
    ),
    ("no ids", [{"event": {"title": "a"}}, {"event": {}}, {"event": {"title": "a"}}], [1, 2, 1]),
    ("text and number", [event_payload("12"), event_payload(12)], [1, 1]),
    (
        "a regression",
        [event_payload("9"), REGRESSION, REGRESSION, {**REGRESSION, "a": 1}],
        [1, 2, 2, 3],
    ),
    (
        "an event by every webhook",
        [
            {"action": "created", "data": {"error": {"event_id": "abc", "issue_id": "77"}}},
            {"action": "triggered", "data": {"event": {"event_id": "abc", "issue_id": "77"}}},
            {"id": "77", "project": "shop", "event": {"event_id": "abc"}},
            {"group": {"id": "77"}, "event": {"eventID": "abc"}},
        ],
        [1, 1, 1, 1],
    ),
    (
        "an event id on two servers",
        [
            event_payload("1", web_url="https://acme.sentry.io/issues/1/"),
            event_payload("1", web_url="https://errors.example.org/issues/1/"),
            event_payload("1", web_url="https://sentry.io/organizations/acme/issues/1/"),
        ],
        [1, 2, 1],
    ),
    (
        "an event id in two projects",
        [event_payload("1", project=1), event_payload("1", project=2)],
        [1, 2],
    ),
]


@pytest.mark.parametrize(
    ("name", "payloads", "expected"), STORED_ONCE, ids=lambda value: str(value)[:30]
)
def test_each_error_is_stored_once(make_app, name, payloads, expected):
    app = make_app(SENTRY_ACTIONS="created,triggered,unresolved")
    client = app.test_client()
    assert [post(client, payload).json["id"] for payload in payloads] == expected
    assert count_rows(app) == len(set(expected))


# --------------------------------------------------------------------------------------------------
# A database that cannot be written
# --------------------------------------------------------------------------------------------------


def seconds_to_post(client, payload, status=202):
    """Post a payload, check the reply's status, and return how long it took."""
    started = time.monotonic()
    reply = post(client, payload)
    taken = time.monotonic() - started
    assert reply.status_code == status
    return taken


def test_a_delivery_waits_half_a_second_for_a_lock_and_the_next_ones_not_at_all(
    app, client, monkeypatch
):
    monkeypatch.setattr(collector, "PAUSE_SECONDS", 3600)
    assert post(client, event_payload("first")).status_code == 201
    with locked(database_path(app)) as other:
        assert 0.4 < seconds_to_post(client, event_payload("second")) < 3
        assert min(seconds_to_post(client, event_payload(name)) for name in "abc") < 0.3
        end_pause(app)
        assert 0.4 < seconds_to_post(client, event_payload("third")) < 3
        assert [client.get("/errors/latest").json["event_id"], spooled(app)] == ["first", 5]
        for path in ("/", "/config"):
            state = client.get(path).json
            assert state.get("counts", state)["spooled"] == 5
        health = client.get("/health")
        assert (health.status_code, health.headers["Retry-After"]) == (503, "5")
        assert "locked" in health.json["error"]
        assert "end the program that holds its lock" in health.json["error"]
        assert "In the spool: 5." in health.json["error"]
        other.execute("ROLLBACK")
    assert seconds_to_post(client, event_payload("fourth")) < 3  # it is still left alone
    maintain(app)
    assert event_ids(app) == ["first", "second", "a", "b", "c", "third", "fourth"]
    assert spooled(app) == 0
    assert counts(client) == {("stored", None): 1, ("queued", "database locked"): 6}


def test_a_queued_delivery_says_no_more_than_that(app, client):
    begin_pause(app)
    reply = post(client, event_payload())
    assert (reply.status_code, reply.json) == (202, {"status": "queued"})
    assert "Location" not in reply.headers
    assert count_rows(app) == 0


def test_maintenance_leaves_a_locked_database_alone_for_the_same_time(app, client):
    put(app, event_payload("spooled"))
    begin_pause(app)
    post(client, event_payload("second"))
    statements = []
    core(app).database.connection().set_trace_callback(statements.append)
    core(app).due = dict.fromkeys(core(app).steps, -math.inf)
    assert core(app).database.is_paused()
    assert core(app).maintain() is False
    assert statements == []
    maintain(app)
    assert event_ids(app) == ["spooled", "second"]


def test_maintenance_beside_a_lock_waits_a_moment_and_makes_no_pause(app):
    put(app, event_payload())
    with locked(database_path(app)):
        started = time.monotonic()
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            core(app).move_spooled()
        assert time.monotonic() - started < 0.5
        assert not core(app).database.is_paused()
    assert spooled(app) == 1


def test_a_delivery_is_stored_if_the_lock_goes_in_time(app, client):
    other = sqlite3.connect(database_path(app), isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    timer = threading.Timer(0.15, other.execute, ["COMMIT"])
    timer.start()
    assert seconds_to_post(client, event_payload(), 201) > 0.1
    timer.join()
    other.close()


def test_a_read_is_not_kept_waiting_by_a_lock(app, client):
    post(client, event_payload(title="findme"))
    paths = (
        "/errors/latest",
        "/errors",
        "/errors?q=findme",
        "/errors/1/payload",
        "/errors?format=ndjson",
        "/",
        "/config",
    )
    with locked(database_path(app)):
        started = time.monotonic()
        for path in paths:
            assert client.get(path).status_code == 200
        assert time.monotonic() - started < 2.5


def write_rubbish(path):
    path.write_bytes(b"this is no database\n" * 5000)


def write_a_header_and_rubbish(path):
    path.write_bytes(b"SQLite format 3\0" + b"\xff" * 100_000)


@pytest.mark.parametrize("damage", [write_rubbish, write_a_header_and_rubbish])
def test_a_corrupt_database_costs_no_delivery(make_app, tmp_path, damage):
    (tmp_path / "data").mkdir()
    damage(tmp_path / "data/errors.db")
    app = make_app()
    client = app.test_client()
    for name in "abc":
        assert seconds_to_post(client, event_payload(name)) < 3
    health = client.get("/health")
    assert health.status_code == 503
    assert "not a database" in health.json["error"] or "malformed" in health.json["error"]
    assert "restore a backup" in health.json["error"]
    assert client.get("/config").json["spooled"] == 3
    assert client.get("/").json["problem"].startswith("The database cannot be read")
    for path in ("/errors", "/errors/latest", "/errors/1", "/errors?format=ndjson"):
        reply = client.get(path)
        assert (reply.status_code, list(reply.json)) == (503, ["error"])
        assert reply.headers["Retry-After"] == "5"
    (tmp_path / "data/errors.db").unlink()
    maintain(app)
    assert event_ids(app) == ["a", "b", "c"]


def test_a_database_damaged_while_it_is_in_use_costs_no_delivery(app, client, tmp_path):
    post(client, event_payload("before"))
    select(app, "PRAGMA wal_checkpoint(TRUNCATE)")
    with (tmp_path / "data/errors.db").open("r+b") as file:
        file.write(b"\0" * 100)
    core(app).database.close()
    assert post(client, event_payload("after")).status_code == 202
    maintain(app)
    assert client.get("/health").status_code == 503
    assert spooled(app) == 1


def test_a_database_without_write_permission_costs_no_delivery(make_app, open_folder):
    app = make_app(DATABASE_URL=f"sqlite:///{open_folder}/data/errors.db")
    client = app.test_client()
    assert post(client, event_payload("a")).status_code == 201
    core(app).database.close()
    path = open_folder / "data/errors.db"
    path.chmod(0o444)
    with unprivileged(open_folder):
        health = client.get("/health")
        assert post(client, event_payload("b")).status_code == 202
        core(app).database.close()
    assert (health.status_code, "readonly" in health.json["error"]) == (503, True)
    assert "make the folder and its files writable" in health.json["error"]
    path.chmod(0o644)
    maintain(app)
    assert event_ids(app) == ["a", "b"]


def test_a_full_disk_costs_no_delivery(app, client):
    ((pages,),) = select(app, "PRAGMA page_count")
    select(app, f"PRAGMA max_page_count = {pages}")
    payload = event_payload(extra=os.urandom(100_000).hex())
    assert post(client, payload).status_code == 202
    assert "free space on the disk" in client.get("/health").json["error"]
    maintain(app)
    assert client.get("/errors/1/payload").data == wire(payload)


def test_a_fault_in_parsing_costs_no_delivery(app, client, monkeypatch, log):
    def fail(*_):
        raise RuntimeError("c0nfidential")

    with monkeypatch.context() as patch:
        patch.setattr(collector, "parse_error", fail)
        assert post(client, event_payload("a")).status_code == 202
    assert not core(app).database.is_paused()
    assert post(client, event_payload("b")).status_code == 201
    maintain(app)
    assert event_ids(app) == ["b", "a"]
    assert "c0nfidential" not in "".join(log())
    assert any("RuntimeError" in line for line in log())


def test_if_neither_database_nor_spool_can_be_written_sentry_is_told(
    app, client, tmp_path, caplog, log
):
    core(app).database.close()
    for name in ("data/errors.db", "data/errors.db-wal", "data/errors.db-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "data/spool")
    (tmp_path / "data/spool").write_text("a file in its place")
    (tmp_path / "data/errors.db").mkdir()
    reply = post(client, event_payload())
    assert (reply.status_code, list(reply.json)) == (503, ["error"])
    assert reply.headers["Retry-After"] == "5"
    assert [record.message[:15] for record in caplog.records if record.levelname == "CRITICAL"] == [
        "LOST a delivery"
    ]
    assert client.get("/health").status_code == 503
    paths = ("/", "/config", "/errors")
    assert [client.get(path).status_code for path in paths] == [200, 200, 503]
    assert client.get("/").json["problem"]
    (tmp_path / "data/errors.db").rmdir()
    (tmp_path / "data/spool").unlink()
    maintain(app)
    assert post(client, event_payload()).status_code == 201
    assert counts(client)["refused", "disk"] == 1


def test_a_paused_worker_without_room_to_spool_asks_the_database_again(app, client, monkeypatch):
    monkeypatch.setattr("collector.SPOOL_LIMIT", 0)
    core(app).database.pause(busy_error("a lock that is gone by now"))
    assert post(client, event_payload()).status_code == 201


# --------------------------------------------------------------------------------------------------
# The spool
# --------------------------------------------------------------------------------------------------


def test_what_is_spooled_comes_in_after_a_webhook_or_a_health_check(app, client):
    at = "2025-01-02T03:04:05.000000Z"
    paths = {"POST": "/sentry/webhook", "GET": "/health"}
    for method, path in paths.items():
        put(app, event_payload(method), at)
        core(app).due = dict.fromkeys(core(app).steps, math.inf)
        core(app).due[core(app).move_spooled] = -math.inf
        body = wire(event_payload("next")) if method == "POST" else None
        assert client.open(path, method=method, data=body, buffered=True).status_code < 300
        assert spooled(app) == 0
    rows = select(app, "SELECT event_id, received_at, resource FROM errors WHERE id > 1")
    assert rows == [("POST", at, "error"), ("GET", at, "error")]


def test_what_is_spooled_comes_in_in_order_and_in_batches(app, client):
    for number in range(120):
        put(app, event_payload(f"{number:03}"))
    moved = []
    while spooled(app):
        core(app).move_spooled()
        moved.append(count_rows(app))
    assert event_ids(app) == [f"{number:03}" for number in range(120)]
    assert max(after - before for before, after in zip([0, *moved], moved, strict=False)) <= 50


def test_a_batch_of_large_deliveries_is_a_small_one(app):
    for number in range(8):
        put(app, event_payload(str(number), extra=os.urandom(300_000).hex()))
    core(app).move_spooled()
    assert 0 < count_rows(app) < 8


NAMELESS = [event_payload(), ISSUE, {"event": {"title": "without ids"}}, {"event": {}}]


@pytest.mark.parametrize("payload", NAMELESS, ids=range(len(NAMELESS)))
def test_a_delivery_comes_in_once_even_if_its_file_outlives_the_commit(app, client, payload):
    put(app, payload)
    (file,) = core(app).spool.folder.glob("*.delivery")
    kept = file.read_bytes()
    for _ in range(2):
        maintain(app)
        assert (count_rows(app), spooled(app)) == (1, 0)
        file.write_bytes(kept)
    assert client.get("/errors/1/payload").data == wire(payload)


def test_a_file_of_1_0_0_is_read(app, client):
    body = wire(event_payload())
    file = core(app).spool.folder / "00000000000000000001-1.delivery"
    file.write_bytes(b'["2025-01-02T03:04:05.000000Z", "error"]\n' + body)
    maintain(app)
    assert client.get("/errors/1/payload").data == body
    assert client.get("/errors/1").json["received_at"] == "2025-01-02T03:04:05.000000Z"


HEAD = b'["2026-01-01T00:00:00.000000Z", null]\n'
SPOILT = {
    "empty": b"",
    "head of no items": b"[]\n{}",
    "no time": b'[null, null]\n{"event": {}}',
    "no JSON": HEAD + b"no JSON",
    "no object": HEAD + b"[]",
    "no error": HEAD + b'{"action": "x"}',
    "cut short": b'["2026-01-01T00:00:00.000000Z", null, 99, 1]\n{"event": {}}',
    "changed": b'["2026-01-01T00:00:00.000000Z", null, 13, 1]\n{"event": {}}',
}


def test_a_spooled_file_that_makes_no_error_is_renamed_and_holds_up_nobody(app, client, log):
    folder = core(app).spool.folder
    for name, content in SPOILT.items():
        (folder / f"0-{name}.delivery").write_bytes(content)
    (folder / "0-9.part").write_bytes(HEAD + b'{"ev')
    put(app, event_payload())
    maintain(app)
    assert event_ids(app) == ["0" * 32]
    rejected = sorted(file.name for file in folder.glob("*.rejected"))
    assert rejected == sorted(f"0-{name}.rejected" for name in SPOILT)
    assert len([line for line in log() if "cannot store a spooled delivery" in line]) == len(SPOILT)
    assert client.get("/config").json["spooled"] == 0


def test_a_spooled_file_with_a_bit_changed_is_not_stored(app):
    put(app, event_payload(title="a word"))
    (file,) = core(app).spool.folder.glob("*.delivery")
    file.write_bytes(file.read_bytes().replace(b"a word", b"a sword"))
    maintain(app)
    assert count_rows(app) == 0
    assert file.with_suffix(".rejected").exists()


def test_a_spooled_file_that_cannot_be_read_is_told_of_once_and_holds_up_nobody(app, client, log):
    (core(app).spool.folder / "0-0.delivery").mkdir()
    put(app, event_payload())
    maintain(app)
    maintain(app)
    assert (event_ids(app), client.get("/config").json["spooled"]) == (["0" * 32], 1)
    assert "".join(log()).count("cannot read a spooled delivery") == 1


def refuse_bad(app):
    """Make the database refuse the event "bad", for which no other is to blame."""
    when = "BEFORE INSERT ON errors WHEN new.event_id = 'bad'"
    sql = f"CREATE TRIGGER refuse {when} BEGIN SELECT RAISE(ABORT, 'no'); END"
    with core(app).database.transaction() as connection:
        connection.execute(sql)


def test_a_row_that_the_database_refuses_holds_up_nobody(app, client):
    refuse_bad(app)
    statuses = [post(client, event_payload("bad")).status_code]
    end_pause(app)
    statuses.append(post(client, event_payload("a")).status_code)
    put(app, event_payload("b"))
    maintain(app)
    assert statuses == [202, 201]
    assert (event_ids(app), spooled(app)) == (["a", "b"], 0)
    assert len(list(core(app).spool.folder.glob("*.rejected"))) == 1


def test_only_one_worker_at_a_time_moves_what_is_spooled(make_app):
    first, second = make_app(), make_app()
    put(first, event_payload("a"))
    with core(second).spool.alone() as is_alone:
        assert is_alone
        maintain(first)
        assert (count_rows(first), spooled(first)) == (0, 1)
    maintain(first)
    assert (count_rows(first), spooled(first)) == (1, 0)


def test_two_workers_that_move_the_spool_at_once_lose_and_double_nothing(make_app):
    apps = [make_app(), make_app()]
    for number in range(150):
        put(apps[0], {"event": {"title": f"{number:03}"}})
    for app in apps:
        core(app).database.close()  # a connection is its thread's

    def move(app):
        while spooled(app):
            maintain(app)
        core(app).database.close()

    with ThreadPoolExecutor() as pool:
        list(pool.map(move, apps))
    titles = [title for (title,) in select(apps[0], "SELECT title FROM errors ORDER BY id")]
    assert titles == [f"{number:03}" for number in range(150)]


def test_a_full_spool_takes_no_more(app, client, monkeypatch, log):
    monkeypatch.setattr(collector, "SPOOL_LIMIT", 3)
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.05)
    with locked(database_path(app)):
        statuses = [post(client, event_payload(name)).status_code for name in "abcd"]
        assert statuses == [202, 202, 202, 503]
        core(app).spool.counted_at = -math.inf  # as a second later
        assert "the spool is full" in post(client, event_payload("e")).json["error"]
    assert "the spool holds 3 deliveries, its limit is 3" in log()
    maintain(app)
    assert event_ids(app) == ["a", "b", "c"]
    assert counts(client)["refused", "disk"] == 2


def test_the_spool_leaves_some_of_the_disk_free(app, client, monkeypatch):
    monkeypatch.setattr(collector, "SPOOL_FREE_BYTES", 2**62)
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.05)
    with locked(database_path(app)):
        reply = post(client, event_payload())
    assert (reply.status_code, "less than 64 MB" in reply.json["error"]) == (503, True)
    assert list(core(app).spool.folder.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# The search index
# --------------------------------------------------------------------------------------------------


def index_terms(connection):
    """Return every (term, id, column, place) of the search index."""
    connection.execute(
        "CREATE VIRTUAL TABLE temp.terms USING fts5vocab(main, errors_search, instance)"
    )
    terms = [tuple(row) for row in connection.execute("SELECT * FROM temp.terms")]
    connection.execute("DROP TABLE temp.terms")
    return sorted(terms)


def check_index(app):
    """Fail unless the search index holds exactly what a new one would, up to where it goes."""
    connection = core(app).database.connection()
    stored = index_terms(connection)
    sql = "SELECT * FROM errors WHERE id <= (SELECT indexed_to FROM search_progress)"
    connection.execute("BEGIN")
    connection.execute("INSERT INTO errors_search (errors_search) VALUES ('delete-all')")
    collector.index_rows(connection, connection.execute(sql).fetchall())
    rebuilt = index_terms(connection)
    connection.execute("ROLLBACK")
    assert stored == rebuilt


def check_issues(app):
    """Fail unless the issues table counts exactly what is stored."""
    counted = "SELECT issue_id, server, count, first_seen, last_seen, newest FROM issues"
    stored = """SELECT issue_id, coalesce(server, ''), count(*), min(received_at),
        max(received_at), max(id) FROM errors WHERE issue_id IS NOT NULL GROUP BY 1, 2"""
    assert sorted(select(app, counted)) == sorted(select(app, stored))


def test_the_index_lags_and_catches_up_before_a_search(app, client, monkeypatch):
    monkeypatch.setattr(collector, "INDEX_BATCH", 7)
    insert(app, *(error_row(event_id=str(number), title="tea") for number in range(20)))
    assert select(app, "SELECT indexed_to FROM search_progress") == [(0,)]
    assert ids(client, q="tea") == list(range(20, 0, -1))
    assert select(app, "SELECT indexed_to FROM search_progress") == [(20,)]
    check_index(app)


def test_the_index_is_filled_by_maintenance_in_batches(app, monkeypatch):
    monkeypatch.setattr(collector, "INDEX_BATCH", 7)
    insert(app, *(error_row(event_id=str(number)) for number in range(20)))
    maintain(app)
    assert select(app, "SELECT indexed_to FROM search_progress") == [(20,)]
    check_index(app)


def test_a_search_says_how_many_errors_a_long_fill_misses(app, client, monkeypatch):
    monkeypatch.setattr(collector, "INDEX_BATCH", 7)
    monkeypatch.setattr(collector, "READ_SECONDS", -1)
    insert(app, *(error_row(event_id=str(number), title="tea") for number in range(20)))
    reply = client.get("/errors?q=tea")
    assert (reply.status_code, "13 errors are missing" in reply.json["error"]) == (503, True)
    assert reply.headers["Retry-After"] == "5"


SEED = int(os.environ.get("STORAGE_SEED") or time.time_ns() % 1_000_000)


def random_row(chance):
    """Return the row of an event or an issue of few ids, servers and projects, at any time."""
    columns = {"issue_id": chance.choice(("1", "2", None)), "title": chance.choice("abc")}
    if chance.random() < 0.8:
        columns["event_id"] = str(chance.randrange(12))
    columns["server"] = chance.choice((None, "a", "b"))
    columns["project_id"] = chance.choice((None, "1", "2"))
    columns["project_slug"] = chance.choice((None, "x", "y"))
    columns["received_at"] = collector.now(days=chance.randrange(60))
    return error_row(str(chance.random()).encode(), **columns)


def check_period(app, chance):
    """Assert that a search for any period finds what was received in it."""
    since, until = (collector.now(days=chance.randrange(60)) for _ in range(2))
    connection = core(app).database.connection()
    filters = collector.narrow(connection, {"since": since, "until": until})
    found = [id_ for (id_,) in collector.find_errors(connection, filters, ["errors.id"], 1000)]
    sql = "SELECT id FROM errors WHERE received_at BETWEEN ? AND ? ORDER BY id DESC"
    assert found == [id_ for (id_,) in select(app, sql, since, until)]


def test_whatever_happens_issues_are_counted_and_the_indexes_are_exact(app, monkeypatch):
    print(f"STORAGE_SEED={SEED}")
    chance = random.Random(SEED)
    monkeypatch.setattr(collector, "DELETE_BATCH", 3)
    monkeypatch.setattr(collector, "INDEX_BATCH", 5)
    for _ in range(150):
        insert(app, *(random_row(chance) for _ in range(chance.randrange(4))))
        core(app).database.connection().execute("UPDATE sqlite_sequence SET seq = seq + 200")
        if chance.random() < 0.3:
            collector.extend_index(core(app).database)
        if chance.random() < 0.3:
            collector.delete_expired(core(app).database, chance.randrange(20, 60))
        check_period(app, chance)
        check_issues(app)
    check_index(app)
    bodies = select(app, "SELECT id FROM bodies ORDER BY id")
    assert bodies == select(app, "SELECT id FROM errors ORDER BY id")
    blocks = select(app, "SELECT id, count FROM blocks ORDER BY id")
    assert blocks == select(app, "SELECT id / 1000, count(*) FROM errors GROUP BY 1 ORDER BY 1")
    ((highest,),) = select(app, "SELECT seq FROM sqlite_sequence")
    assert highest > count_rows(app) > 0


SEARCHED = {
    1: {
        "title": "TeaError: pot is empty",
        "level": "error",
        "server": "sentry.io",
        "issue_id": "77",
        "short_id": "SHOP-1",
    },
    2: {"title": "茶壶里没有水了", "level": "warning", "server": "a", "issue_id": "77"},
    3: {"message": "주전자가 비었습니다", "level": "fatal", "server": "a", "short_id": "SHOP-1"},
    4: {"exception_value": "ポットが空です v1.2", "level": "info", "release": "web@1.2"},
    5: {"culprit": "brew.boil(water)", "exception_type": "KeyError", "issue_id": "78"},
}
SEARCHED[3]["issue_id"] = "79"
SEARCHES = [
    ({"q": "tea pot"}, []),
    ({"q": "pot empty"}, [1]),
    ({"q": "empty po"}, [1]),
    ({"q": "TEAERROR"}, [1]),
    ({"q": "没有"}, [2]),
    ({"q": "里没有水"}, [2]),
    ({"q": "有没"}, []),
    ({"q": "자가"}, [3]),
    ({"q": "トが 空"}, [4]),
    ({"q": "v1.2"}, [4]),
    ({"q": "2.v1"}, []),
    ({"q": "boil(water)"}, [5]),
    ({"q": "error"}, []),
    ({"q": "sentry.io"}, []),
    ({"level": "error"}, [1]),
    ({"level": "warning,fatal"}, [3, 2]),
    ({"level": "error,info", "q": "空"}, [4]),
    ({"server": "a"}, [3, 2]),
    ({"issue": "77"}, [2, 1]),
    ({"issue": "77", "server": "a"}, [2]),
    ({"issue": "SHOP-1"}, [3]),
    ({"issue": "SHOP-1", "server": "sentry.io"}, [1]),
    ({"release": "web@1.2"}, [4]),
    ({"event": "4" * 32}, [4]),
    ({"q": "4" * 32}, [4]),
    ({"q": "44444444-4444-4444-4444-444444444444"}, [4]),
    ({"q": "4" * 31}, []),
    ({"event": "4" * 32, "level": "error"}, []),
]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """Return a client of an app with the errors of SEARCHED."""
    url = f"sqlite:///{tmp_path_factory.mktemp('searched')}/errors.db"
    app = create_app({"DATABASE_URL": url})
    rows = []
    for id_, columns in SEARCHED.items():
        at = f"2026-05-0{id_}T00:00:00.000000Z"
        rows.append(error_row(event_id=str(id_) * 32, received_at=at, **columns))
    insert(app, *rows)
    yield app.test_client()
    core(app).database.close()


@pytest.mark.parametrize(("query", "expected"), SEARCHES, ids=str)
def test_a_search_lists_what_matches_newest_first(searched, query, expected):
    assert ids(searched, **query) == expected


PERIODS = [
    ({"since": "2026-05-03T00:00:00Z"}, [5, 4, 3]),
    ({"until": "2026-05-02"}, [2, 1]),
    ({"since": "2026-05-02T00:00:00+00:00", "until": "2026-05-03T00:00:00Z"}, [3, 2]),
    ({"since": "2026-05-01T23:59:59.999Z", "until": "2026-05-02T02:00:00+02:00"}, [2]),
    ({"since": "1777766400"}, [5, 4, 3]),
    ({"since": "1777766400.5"}, [5, 4]),
    ({"until": "1w", "since": "2w"}, []),
    ({"since": "99999m"}, []),
    ({"since": "24h"}, []),
    ({"since": "7d"}, []),
    ({"since": "20000d"}, [5, 4, 3, 2, 1]),
    ({"since": "9999-01-01"}, []),
]


@pytest.mark.parametrize(("query", "expected"), PERIODS, ids=str)
def test_a_period_is_given_in_any_of_its_forms(searched, monkeypatch, query, expected):
    monkeypatch.setattr(collector.time, "time", lambda: 1_900_000_000)
    assert ids(searched, **query) == expected


def test_a_period_reaches_what_was_received_out_of_order(app, client):
    days = "2026-05-03", "2026-05-01", "2026-05-04", "2026-05-02"
    insert(app, *(error_row(event_id=day, received_at=f"{day}T00:00:00.000000Z") for day in days))
    assert ids(client, since="2026-05-02", until="2026-05-03") == [4, 1]


ODD_QUERIES = [
    '"',
    "'",
    "*",
    "()",
    "a OR",
    "NEAR(a b)",
    "title:x",
    "-x",
    "^x",
    "{a b}:c",
    "\0",
    "\ue000leveld",
    "🍵",
    "á" * 500,
    "\u0301",
    '"a" AND "b',
    "a-b_c.d/e",
    "x" * 1900,
    "; DROP TABLE errors",
]


def test_no_search_is_a_fault(searched):
    chance = random.Random(SEED)
    print(f"STORAGE_SEED={SEED}")
    queries = list(ODD_QUERIES)
    for _ in range(60):
        queries.append("".join(chance.choices("\"'()*:^-+{}, aNOT\0é茶\ue000_", k=12)))
    for query in queries:
        assert searched.get("/errors", query_string={"q": query}).status_code == 200, query


BAD_FILTERS = [
    ({"level": "catastrophe"}, "level='catastrophe' is unknown"),
    ({"level": "error,"}, "is unknown"),
    ({"q": "a.a." * 20 + "a"}, "q has 41 words, the limit is 40"),
    ({"q": "茶" * 41}, "q has 41 words"),
    ({"since": "yesterday"}, "since='yesterday' is not a time"),
    ({"since": "12"}, "is not a time"),
    ({"until": "2y"}, "until='2y' is not a time"),
    ({"after": "x"}, "after='x' is not a whole number"),
    ({"colour": "red"}, "colour"),
]


@pytest.mark.parametrize(("query", "words"), BAD_FILTERS, ids=str)
def test_a_bad_filter_is_a_400_that_names_it(searched, query, words):
    reply = searched.get("/errors", query_string=query)
    assert (reply.status_code, words in reply.json["error"]) == (400, True), reply.text


def test_a_query_that_takes_too_long_is_ended(app, client, monkeypatch, log):
    rows = [error_row(event_id=str(number), title="tea", release="1") for number in range(3000)]
    insert(app, *rows)
    maintain(app)
    monkeypatch.setattr(collector, "READ_SECONDS", 0)
    reply = client.get("/errors?q=tea&release=1&since=1d&until=2020-01-01")
    assert reply.status_code == 200  # a short one has ended before it is looked at
    with core(app).database.transaction() as connection:
        connection.execute("UPDATE errors SET environment = 'production'")  # behind the index
    reply = client.get("/errors?format=html&q=tea")
    assert (reply.status_code, "narrow the search" in reply.text) == (503, True)
    assert any("a search that took too long" in line for line in log())
    monkeypatch.undo()
    assert client.get("/errors?q=tea&limit=1").status_code == 200
    assert post(client, event_payload()).status_code == 201


# --------------------------------------------------------------------------------------------------
# Issues
# --------------------------------------------------------------------------------------------------

ISSUE_ROWS = [
    {"issue_id": "1", "server": "a", "short_id": "A-1", "title": "tea", "level": "error"},
    {"issue_id": "1", "server": "b", "project_slug": "shop", "title": "milk", "level": "info"},
    {"issue_id": "2", "server": "a", "project_id": "12", "title": "pot", "level": "error"},
    {"title": "no issue", "level": "error"},
    {"issue_id": "1", "server": "a", "title": "teas", "level": "fatal", "project_slug": "shop"},
]
ISSUE_SEARCHES = [
    ({}, [(5, 2, "teas"), (3, 1, "pot"), (2, 1, "milk")]),
    ({"server": "a"}, [(5, 2, "teas"), (3, 1, "pot")]),
    ({"project": "shop"}, [(5, 2, "teas"), (2, 1, "milk")]),
    ({"project": "12"}, [(3, 1, "pot")]),
    ({"issue": "A-1"}, [(5, 2, "teas")]),
    ({"issue": "1", "server": "b"}, [(2, 1, "milk")]),
    ({"level": "error,info"}, [(3, 1, "pot"), (2, 1, "milk")]),
    ({"q": "tea"}, [(5, 2, "teas")]),
    ({"q": "milk pot"}, []),
    ({"since": "2026-05-03T00:00:00.000000Z"}, [(5, 2, "teas"), (3, 1, "pot")]),
    ({"until": "2026-05-03T00:00:00.000000Z"}, [(3, 1, "pot"), (2, 1, "milk")]),
    ({"before": 5}, [(3, 1, "pot"), (2, 1, "milk")]),
]


def test_issues_are_listed_by_their_newest_error(app):
    rows = []
    for day, columns in enumerate(ISSUE_ROWS, 1):
        at = f"2026-05-0{day}T00:00:00.000000Z"
        rows.append(error_row(event_id=str(day), received_at=at, **columns))
    insert(app, *rows)
    maintain(app)
    connection = core(app).database.connection()
    for filters, expected in ISSUE_SEARCHES:
        issues, _ = collector.select_issues(connection, filters, 10)
        listed = [(issue["newest"], issue["count"], issue["title"]) for issue in issues]
        assert listed == expected, filters


def test_the_occurrences_of_an_issue_are_counted_on_its_server(app):
    rows = []
    for day, release in enumerate(("1", None, "2", "1"), 1):
        at = f"2026-05-0{day}T00:00:00.000000Z"
        columns = {"issue_id": "1", "server": "a", "release": release, "received_at": at}
        rows.append(error_row(event_id=str(day), **columns))
    insert(app, *rows, error_row(event_id="5", issue_id="1", server="b", release="3"))
    connection = core(app).database.connection()
    row = collector.select_error(connection, 2)
    assert collector.select_occurrences(connection, row) == {
        "count": 4,
        "first_seen": "2026-05-01T00:00:00.000000Z",
        "last_seen": "2026-05-04T00:00:00.000000Z",
        "releases": ["1", "2"],
    }


# --------------------------------------------------------------------------------------------------
# Retention, counts and health
# --------------------------------------------------------------------------------------------------


def test_old_errors_are_deleted_in_steps_and_new_ones_stay(make_app, log):
    app = make_app(RETENTION_DAYS="30")
    client = app.test_client()
    words = "title", "message", "culprit", "exception_type", "exception_value"
    for number in range(130):
        columns = {name: f"{name}{number:03}" for name in words}
        days = 31 if number < 120 else 29
        insert(
            app, error_row(event_id=f"{number:03}", received_at=collector.now(days=days), **columns)
        )
    assert ids(client, q="title125") == [126]
    kept = [count_rows(app)]
    while core(app).delete_expired():
        kept.append(count_rows(app))
    assert kept == [130, 80, 30, 10]
    assert event_ids(app) == [f"{number:03}" for number in range(120, 130)]
    check_index(app)
    assert ids(client, q="title001") == []
    assert client.get("/errors/1").status_code == 404
    core(app).log_deletions()
    core(app).log_deletions()
    assert [line for line in log() if "deleted" in line] == [
        "deleted 120 errors that were older than 30 days"
    ]


def test_an_error_goes_by_its_own_time_whatever_came_before_it(make_app):
    app = make_app(RETENTION_DAYS="30")
    ages = {"ahead": -400, "young": 1, "old": 31, "older": 300, "newest": 0}
    for name, days in ages.items():
        insert(app, error_row(event_id=name, received_at=collector.now(days=days)))
    maintain(app)
    assert event_ids(app) == ["ahead", "young", "newest"]


def test_the_end_of_a_readers_time_does_not_keep_old_errors(make_app):
    app = make_app(RETENTION_DAYS="30")
    for days in (31, 1):
        insert(app, error_row(event_id=str(days), received_at=collector.now(days=days)))
    database = core(app).database
    database.connection().set_progress_handler(database.is_out_of_time, 1)
    database.read_until = 0
    assert core(app).delete_expired()
    assert event_ids(app) == ["1"]
    assert select(app, "SELECT * FROM blocks WHERE first_at < ?", collector.now(days=30)) == []


def test_without_retention_nothing_is_deleted(app):
    insert(app, error_row(received_at="1999-01-01T00:00:00.000000Z"))
    maintain(app)
    assert count_rows(app) == 1


def test_strangers_cannot_make_the_disk_work(app, client):
    maintain(app)
    statements = []
    core(app).database.connection().set_trace_callback(statements.append)
    for _ in range(200):
        assert client.post("/sentry/webhook", data=b"nonsense", buffered=True).status_code == 400
    assert statements.count("COMMIT") <= 10
    assert post(client, event_payload()).status_code == 201
    assert counts(client)["refused", "not JSON"] == 200


def test_the_counts_stay_few_whatever_arrives(app, client):
    for number in range(100):
        assert post(client, {"action": f"action {number}", "data": {}}).status_code == 200
        post(client, b"x" * number)
    post(client, event_payload())
    maintain(app)
    assert select(app, "SELECT count(DISTINCT outcome || reason) FROM deliveries") == [(3,)]
    assert count_rows(app) == 1


def test_deliveries_are_counted_by_ten_minutes_hour_day_and_in_all(app, client):
    times = {
        "now": collector.now(),
        "half an hour ago": collector.now(minutes=30),
        "two hours ago": collector.now(hours=2),
        "two days ago": collector.now(days=2),
    }
    with core(app).database.transaction() as connection:
        for at in times.values():
            row = (collector.period_of(at), "stored", "", 5, at)
            connection.execute("INSERT INTO deliveries VALUES (?, ?, ?, ?, ?)", row)
    assert collector.period_of("2026-05-01T10:59:59.999999Z") == "2026-05-01T10:50"
    (row,) = client.get("/config").json["deliveries"]
    expected = {"outcome": "stored", "reason": None, "last_hour": 10, "last_day": 15, "count": 20}
    assert expected.items() <= row.items()
    assert row["last_at"] == times["now"]


def test_old_counts_are_added_up(app, client):
    days = {"old": 91, "older": 400, "young": 89}
    with core(app).database.transaction() as connection:
        for ago in days.values():
            at = collector.now(days=ago)
            row = (collector.period_of(at), "stored", "", 5, at)
            connection.execute("INSERT INTO deliveries VALUES (?, ?, ?, ?, ?)", row)
    for number in range(2):
        post(client, event_payload(str(number)))
        assert counts(client) == {("stored", None): 16 + number}
        assert len(select(app, "SELECT * FROM deliveries WHERE count >= 5")) == 2


def test_counts_that_no_transaction_takes_along_are_written_at_the_end(app, client, make_app):
    for _ in range(3):
        post(client, b"nonsense")
    assert client.get("/config").json["deliveries"] == []
    core(app).close()
    assert counts(make_app().test_client()) == {("refused", "not JSON"): 3}


def test_health_commits_a_row_and_uses_no_id(app, client):
    checks = []
    for _ in range(2):
        assert client.get("/health").json == {"status": "ok"}
        with closing(sqlite3.connect(database_path(app))) as other:
            checks.append(other.execute("SELECT checked_at FROM health").fetchone()[0])
    assert checks[0] < checks[1]
    for table in ("errors", "bodies", "issues"):
        assert select(app, f"SELECT * FROM {table}") == []
    assert post(client, event_payload()).json["id"] == 1


BREAKAGES = [
    ("ALTER TABLE errors RENAME COLUMN rule TO other", "no column named rule"),
    ("ALTER TABLE bodies RENAME TO other", "no such table"),
    (
        "CREATE TRIGGER breaks BEFORE INSERT ON errors BEGIN SELECT RAISE(ABORT, 'not today'); END",
        "not today",
    ),
]


@pytest.mark.parametrize(("sql", "words"), BREAKAGES, ids=range(len(BREAKAGES)))
def test_health_is_bad_if_no_error_can_be_inserted(app, client, sql, words):
    select(app, sql)
    reply = client.get("/health")
    assert (reply.status_code, words in reply.json["error"]) == (503, True), reply.text
    assert reply.headers["Retry-After"] == "5"


# --------------------------------------------------------------------------------------------------
# Backup and restore
# --------------------------------------------------------------------------------------------------


def run(app, *arguments):
    """Run one of the commands; return its exit status and what it said."""
    done = app.test_cli_runner().invoke(args=[str(argument) for argument in arguments])
    return done.exit_code, done.output


def test_a_backup_is_one_file_that_can_be_served(app, client, tmp_path, make_app):
    post(client, event_payload(title="findme"))
    status, words = run(app, "backup", tmp_path / "copy.db")
    size = (tmp_path / "copy.db").stat().st_size
    assert (status, words) == (0, f"{tmp_path}/copy.db: 1 errors, {size} bytes\n")
    assert list(tmp_path.glob("copy.db?*")) == []
    copy = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/copy.db")
    assert ids(copy.test_client(), q="findme") == [1]


def test_a_backup_is_of_one_moment_and_no_writer_makes_it_start_again(app, client, tmp_path):
    bodies = [os.urandom(2_000_000) for _ in range(6)]
    insert(app, *(error_row(body, event_id=f"{each}") for each, body in enumerate(bodies)))
    shares = []

    def report(share):
        shares.append(share)
        assert len(shares) < 50
        assert post(client, event_payload(f"meanwhile {len(shares)}")).status_code == 201

    with closing(collector.open_read_only(database_path(app))) as source:
        collector.copy_database(source, tmp_path / "copy.db", report)
    assert len(shares) >= 2
    assert shares == sorted(shares)
    assert integrity(tmp_path / "copy.db") == [("ok",)]
    with closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("SELECT count(*) FROM errors").fetchone()[0] == 6
    assert count_rows(app) == 6 + len(shares)


@pytest.mark.parametrize("target", ["there.db", "missing/copy.db"])
def test_a_backup_that_cannot_be_made_says_why_and_harms_nothing(app, tmp_path, target):
    (tmp_path / "there.db").write_text("precious")
    status, words = run(app, "backup", tmp_path / target)
    assert status == 1
    assert words.startswith("Error: ")
    assert target in words
    assert (tmp_path / "there.db").read_text() == "precious"


def test_a_backup_of_nothing_is_refused_and_makes_nothing(tmp_path):
    env = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/data/errors.db"}
    command = [sys.executable, "-m", "flask", "--app", ROOT / "collector.py", "backup", "copy.db"]
    done = subprocess.run(
        command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    words = f"Error: There is no database at {tmp_path}/data/errors.db; name it by DATABASE_URL.\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def backup(app, client, tmp_path):
    """Return a backup of the event "kept", id 1, after which "lost", id 2, has come in."""
    post(client, event_payload("kept", issue_id="77"))
    assert run(app, "backup", tmp_path / "copy.db")[0] == 0
    post(client, event_payload("lost", issue_id="78"))
    return tmp_path / "copy.db"


def test_a_restore_replaces_the_errors_and_keeps_what_was_there(app, client, backup, tmp_path):
    status, words = run(app, "restore", backup, "--yes")
    path = database_path(app)
    assert (status, words.splitlines()) == (
        0,
        [
            f"{backup} has 1 errors; {path} has 2, which it replaces.",
            f"Restored. What was there is in {path}.before-restore.",
        ],
    )
    assert event_ids(app) == ["kept"]
    with closing(sqlite3.connect(f"{path}.before-restore")) as replaced:
        assert replaced.execute("SELECT event_id FROM errors").fetchall() == [("kept",), ("lost",)]
    assert post(client, event_payload("next")).json["id"] == 3
    check_issues(app)
    assert ids(client, issue="77") == [1]
    assert integrity(path) == [("ok",)]
    names = {file.name for file in path.parent.iterdir()}
    assert names - {"errors.db-wal", "errors.db-shm"} == {
        "errors.db",
        "errors.db.lock",
        "errors.db.before-restore",
        "spool",
    }


def test_a_second_restore_keeps_what_the_first_one_has_replaced(app, client, backup, tmp_path):
    for number in (1, 2):
        post(client, event_payload(f"{number:032x}", title=f"before restore {number}"))
        run = app.test_cli_runner().invoke(args=["restore", "--yes", str(backup)])
        assert run.exit_code == 0
    kept = []
    for path in sorted((tmp_path / "data").glob("errors.db.before-restore*")):
        with closing(sqlite3.connect(path)) as replaced:
            kept += [title for (title,) in replaced.execute("SELECT title FROM errors")]
    assert {"before restore 1", "before restore 2"} <= set(kept)


def test_an_export_of_other_content_has_another_tag_after_a_restore(app, client, backup):
    run(app, "restore", backup, "--yes")
    tag = client.get("/errors?format=ndjson").headers["ETag"]
    with closing(sqlite3.connect(backup)) as copy:
        copy.execute("UPDATE errors SET title = 'other'")
        copy.commit()
    run(app, "restore", backup, "--yes")
    reply = client.get("/errors?format=ndjson", headers={"If-None-Match": tag})
    assert (reply.status_code, json.loads(reply.text)["title"]) == (200, "other")


def test_a_restore_is_seen_by_the_workers_that_run(make_app, backup):
    worker = make_app()
    assert event_ids(worker) == ["kept", "lost"]
    assert run(make_app(), "restore", backup, "--yes")[0] == 0
    assert event_ids(worker) == ["kept"]
    assert post(worker.test_client(), event_payload("lost")).json["id"] == 3


def test_what_comes_in_during_a_restore_is_spooled(make_app, backup, monkeypatch):
    worker = make_app()
    client = worker.test_client()
    copy_database = collector.copy_database
    statuses = []

    def copy_and_deliver(*arguments):
        copy_database(*arguments)
        payload = event_payload(f"delivery {len(statuses)}")
        statuses.append(post(client, payload).status_code)

    monkeypatch.setattr(collector, "copy_database", copy_and_deliver)
    monkeypatch.setattr(collector, "WAIT_SECONDS", 0.05)
    assert run(make_app(), "restore", backup, "--yes")[0] == 0
    maintain(worker)
    assert statuses == [201, 202]  # the first was copied yet, the second came too late for that
    assert event_ids(worker) == ["kept", "delivery 1"]
    with closing(sqlite3.connect(f"{database_path(worker)}.before-restore")) as replaced:
        events = replaced.execute("SELECT event_id FROM errors").fetchall()
    assert events == [("kept",), ("lost",), ("delivery 0",)]


def test_without_yes_a_restore_changes_nothing(app, backup):
    status, words = run(app, "restore", backup)
    assert (status, "has 2, which it replaces" in words, "add --yes" in words) == (1, True, True)
    assert event_ids(app) == ["kept", "lost"]
    assert not Path(f"{database_path(app)}.before-restore").exists()


def test_ids_go_on_from_the_larger_of_both(app, client, backup, tmp_path):
    assert run(app, "restore", backup, "--yes")[0] == 0
    later = f"{database_path(app)}.before-restore"  # has had one more
    with core(app).database.transaction() as connection:
        connection.execute("UPDATE sqlite_sequence SET seq = 1")
    os.rename(later, tmp_path / "later.db")
    assert run(app, "restore", tmp_path / "later.db", "--yes")[0] == 0
    assert post(client, event_payload("next")).json["id"] == 3


def test_a_backup_of_1_0_0_is_brought_up_to_date(make_app, old_database, tmp_path):
    old = old_database.rename(tmp_path / "old.db")
    before = old.read_bytes()
    app = make_app()
    post(app.test_client(), event_payload())
    assert run(app, "restore", old, "--yes")[0] == 0
    assert event_ids(app) == [None, "a" * 32, None, "b" * 32, "c" * 32]
    assert ids(app.test_client(), q="没有") == [6]
    assert post(app.test_client(), event_payload()).json["id"] == 10
    assert old.read_bytes() == before


def make_newer(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 3")


def make_foreign(path):
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript("CREATE TABLE errors (id); PRAGMA user_version = 1")


def make_empty(path):
    path.write_bytes(b"")


def make_damaged(path):
    content = path.read_bytes()
    path.write_bytes(content[: 2 * 4096] + b"\xff" * 4096 + content[3 * 4096 :])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (make_newer, "is of version 3, this collector knows 2"),
        (make_foreign, "is no database of the collector"),
        (make_empty, "is no database of the collector"),
        (write_rubbish, "is no database of the collector"),
        (make_damaged, "damaged"),
    ],
)
def test_a_restore_refuses_what_is_no_backup(app, backup, spoil, words):
    spoil(backup)
    status, said = run(app, "restore", backup, "--yes")
    assert (status, words in said) == (1, True), said
    assert event_ids(app) == ["kept", "lost"]
    assert not Path(f"{database_path(app)}.before-restore").exists()


def test_a_restore_of_a_missing_file_says_so(app, tmp_path):
    status, words = run(app, "restore", tmp_path / "missing.db", "--yes")
    assert (status, "does not exist" in words) == (2, True)


def test_a_restore_where_there_is_no_database_makes_one(make_app, backup, tmp_path):
    app = make_app(DATABASE_URL=f"sqlite:///{tmp_path}/new/errors.db")
    core(app).database.close()
    shutil.rmtree(tmp_path / "new")
    assert run(app, "restore", backup, "--yes")[0] == 0
    assert event_ids(app) == ["kept"]


def test_a_restore_onto_a_corrupt_database_says_what_to_do_first(app, backup):
    path = database_path(app)
    core(app).database.close()
    write_rubbish(path)
    status, words = run(app, "restore", backup, "--yes")
    assert (status, "move it and the files beside it" in words) == (1, True), words
    for name in ("errors.db", "errors.db-wal", "errors.db-shm"):
        path.with_name(name).unlink(missing_ok=True)
    assert run(app, "restore", backup, "--yes")[0] == 0
    assert event_ids(app) == ["kept"]


# --------------------------------------------------------------------------------------------------
# Reports to Sentry
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def sentry():
    """Run a server that takes envelopes as Sentry does; return its DSN and a list of what came."""
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
    sentry_sdk.init(default_integrations=False)
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
    with core(app).database.transaction() as connection:
        connection.execute("UPDATE bodies SET payload = 'c0nfidential', payload_bytes = 12")
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
