"""A real gunicorn: its settings, killed, stopped, its database locked or changed, its clients hostile."""

import contextlib
import http.client
import http.server
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, SECRET, children, event_payload, locked, select, sign, wait_for, wire

from collector import create_app

SEED = int(os.environ.get("CRASH_SEED") or time.time_ns() % 1_000_000)
SIGNED = {"SENTRY_CLIENT_SECRET": SECRET}
AT = "2025-01-02T03:04:05.000000Z"


def read_all(server):
    """Return the bodies of the server's database by event id, in order of ids; fail if it is damaged."""
    assert select(server.database, "PRAGMA integrity_check") == [("ok",)]
    sql = "SELECT event_id, payload, payload_bytes FROM errors JOIN bodies USING (id) WHERE event_id NOTNULL ORDER BY id"
    rows = select(server.database, sql)
    bodies = {}
    for event_id, payload, size in rows:
        bodies[event_id] = payload if len(payload) == size else zlib.decompress(payload)
    assert len(bodies) == len(rows)
    return bodies


def wait_for_empty_spool(server):
    wait_for(lambda: not server.spooled() and server.get("/health") == {"status": "ok"})


def wait_for_workers(server, count=4):
    """Wait until each worker has answered a webhook, as a log line of its own shows."""

    def all_have_answered():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: server.deliver(b"{}"), range(8)))
        log = server.log.read_text()
        pids = server.workers()
        return len(pids) == count and all(f"[{pid}] [INFO] webhook" in log for pid in pids)

    wait_for(all_have_answered)
    return server


def timed(action, *arguments):
    """Return how many seconds a call took, and what it returned."""
    started = time.monotonic()
    result = action(*arguments)
    return time.monotonic() - started, result


def deliver_at_once(server, payloads):
    """Deliver all at once; return the statuses, and how long the slowest took."""
    with ThreadPoolExecutor(len(payloads)) as pool:
        answers = list(pool.map(lambda payload: timed(server.deliver, payload), payloads))
    return [status for _, (status, _) in answers], max(seconds for seconds, _ in answers)


def head_of(body, **headers):
    """Return the head of a webhook's request as bytes."""
    headers = {"Host": "x", "Content-Length": len(body), **sign(body), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /sentry/webhook HTTP/1.1\r\n{lines}\r\n".encode()


def connect(server, data=b""):
    """Return a connection that has sent some bytes."""
    connection = socket.create_connection(("127.0.0.1", server.port), 20)
    connection.sendall(data)
    return connection


def established(server):
    """Return how many connections the kernel holds as established on the server's side."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return [(row[1].rpartition(":")[2], row[3]) for row in rows].count((f"{server.port:04X}", "01"))


class Senders:
    """Clients that each post signed deliveries of their own, one after the other, until told to stop."""

    def __init__(self, server, count=4, most=10_000):
        self.server = server
        self.most = most
        self.over = threading.Event()
        self.answers = []  # (event id, body, status or None without an answer, seconds)
        self.threads = [threading.Thread(target=self.send, args=(n,)) for n in range(count)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def send(self, sender):
        source = random.Random(SEED + sender)
        number = 0
        body = None
        while not self.over.wait(0.003):
            event_id = f"5{sender:07x}{number:024x}"
            if body is None:
                extra = source.randbytes(source.randrange(self.most)).hex()
                body = wire(event_payload(event_id, extra=extra))
            seconds, status = timed(self.post, body)
            self.answers.append((event_id, body, status, seconds))
            if status is not None:  # else once more: it may be stored, and must not be stored twice
                number += 1
                body = None

    def post(self, body):
        try:
            return self.server.request("POST", "/sentry/webhook", body, sign(body))[0]
        except (OSError, http.client.HTTPException):
            return None

    def acknowledged(self):
        """Return the bodies by event id of the deliveries that were answered 2xx."""
        return {id_: body for id_, body, status, _ in list(self.answers) if (status or 999) < 300}

    def statuses(self):
        return {status for _, _, status, _ in list(self.answers)}

    def slowest(self):
        return max(seconds for _, _, _, seconds in self.answers)


def assert_all_there(server, senders):
    """Fail unless each acknowledged delivery is stored byte for byte, and every row can be read."""
    wait_for_empty_spool(server)
    bodies = read_all(server)
    acknowledged = senders.acknowledged()
    assert {event_id: bodies.get(event_id) for event_id in acknowledged} == acknowledged
    status, _, lines = server.request("GET", "/errors?format=ndjson")
    assert (status, lines.count(b"\n")) == (200, len(bodies))


# Settings

PASSWORD = "hunter2"
BAD_SETTINGS = {
    "DATABASE_URL": [
        f"postgresql://me:{PASSWORD}@db/errors", f"mysql:///{PASSWORD}", "errors.db", "/data/errors.db", "sqlite://",
        "sqlite://errors.db", "sqlite:///", "sqlite:///:memory:", "sqlite:///errors.db?mode=ro",
    ],
    "SENTRY_DSN": [
        "on", f"https://{PASSWORD}@", f"https://{PASSWORD}@sentry.example.com", f"https://{PASSWORD}@[/1",
        f"https://{PASSWORD}@sentry.example.com/project", f"https://{PASSWORD}@sentry.example.com:99999/1",
    ],
    "SENTRY_CLIENT_SECRET": [",", " , ", '""', "' '", '"",\'\''],
    "SENTRY_ACTIONS": ["created;triggered", "Created", "created triggered", "created,resolved", ","],
    "API_TOKEN": ["tökén", "two\nlines"],
    "PUBLIC_URL": [f"https://me:{PASSWORD}@e.example", "errors.example.com", "ftp://e.example", "https://", "https://e.example/?a=b", 'https://e.example/"'],
    "TRUSTED_HOSTS": [",", "https://errors.example.com", "a b"],
    "RETENTION_DAYS": ["0", "-1", "30d", "1.5", "36501", "\u0663"],
    "MAX_BODY_BYTES": ["0", "5MB", "1e6", "9" * 5000, str(32 * 1024 * 1024 + 1)],
    "WEB_CONCURRENCY": ["two", "0", "257"],
    "PORT": ["http", "0", "65536", "8000,8001"],
}  # fmt: skip


def test_a_bad_setting_stops_the_start_with_one_line(monkeypatch):
    monkeypatch.setenv("API_TOKEN", PASSWORD)
    for name, values in BAD_SETTINGS.items():
        for value in values:
            with pytest.raises(SystemExit) as stop:
                create_app({name: value})
            line = str(stop.value.code)
            assert line.startswith(f"{name}: ") and f"for example {name}=" in line, (name, value)
            assert line.isascii() and line.isprintable() and len(line) < 400, line
            assert PASSWORD not in line


FAILED_STARTS = [
    ({"PORT": "x"}, "PORT: .* not a whole number"),
    ({"DATABASE_URL": f"postgresql://user:{PASSWORD}@host/db"}, "DATABASE_URL: "),
    ({"DATABASE_URL": "sqlite:////dev/null/errors.db"}, "DATABASE_URL: cannot write in /dev/null"),
    ({"DATABASE_URL": "sqlite:////proc/errors.db"}, "DATABASE_URL: cannot write in /proc as uid 0"),
    ({"SENTRY_DSN": PASSWORD}, "SENTRY_DSN: it is not a DSN"),
]


def test_a_failed_start_ends_with_a_status_and_the_line_alone(server, tmp_path):
    started = [
        server(folder=tmp_path / str(number), wait=False, **env)
        for number, (env, _) in enumerate(FAILED_STARTS)
    ]
    for it, (_, words) in zip(started, FAILED_STARTS, strict=True):
        assert it.process.wait(20) != 0
        log = it.log.read_text()
        (line,) = {line for line in log.splitlines() if not line.startswith("[")}
        assert re.match(words, line) and PASSWORD not in log


def test_an_old_python_is_told_which_it_needs():
    code = "import sys; sys.version_info = (3, 10, 1); import collector"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("The collector needs Python 3.11 or newer")


def test_the_environment_wins_over_the_env_file_and_an_empty_value_is_an_unset_one(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    url = "sqlite+aiosqlite:///relative/errors.db"
    lines = [f"DATABASE_URL={url}", 'API_TOKEN="from file"', "RETENTION_DAYS=7", "MAX_BODY_BYTES="]
    Path(".env").write_text("\n".join(lines) + "\n")
    monkeypatch.setenv("RETENTION_DAYS", "30")
    monkeypatch.setenv("PORT", "")
    client = create_app({"WEB_CONCURRENCY": ""}).test_client()
    assert [file.name for file in tmp_path.iterdir()] == [".env"]  # to make an app makes no file
    monkeypatch.setenv("API_TOKEN", "later")
    assert client.get("/config").status_code == 401
    config = client.get("/config", headers={"Authorization": "Bearer from file"}).json
    expected = {
        "retention_days": 30, "port": 8000, "max_body_bytes": 5 * 1024 * 1024, "web_concurrency": 4,
        "sentry_actions": ["created"], "public_url": "", "trusted_hosts": [], "sentry_client_secret_set": False,
        "sentry_dsn_set": False, "api_token_set": True, "database_path": f"{tmp_path}/relative/errors.db",
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert client.post("/sentry/webhook", data=wire(event_payload())).status_code == 201
    assert select(tmp_path / "relative/errors.db", "SELECT count(*) FROM errors") == [(1,)]
    client.application.extensions["collector"].close()


def test_the_log_says_in_one_line_what_is_on_and_what_is_off(server, tmp_path):
    off = "signature check OFF|read token OFF|trusted hosts any|Sentry reports off|actions created;|retention off"
    on = "signature check on|read token on|trusted hosts localhost, a_b|public URL https://e.example;|"
    on += "actions created,triggered|retention 9 days"
    settings = {
        **SIGNED, "API_TOKEN": "t0ken", "SENTRY_ACTIONS": "created,triggered", "RETENTION_DAYS": "9",
        "TRUSTED_HOSTS": "localhost, a_b", "PUBLIC_URL": "https://e.example/",
    }  # fmt: skip
    (tmp_path / "link.db").symlink_to(tmp_path / "there.db")
    settings["DATABASE_URL"] = f"sqlite:///{tmp_path}/link.db"
    cases = {"on": settings, "off": {}}
    started = [server(folder=tmp_path / name, wait=False, **env) for name, env in cases.items()]
    for it, words in zip(started, (on, off), strict=True):
        wait_for(it.is_up)
        log = it.log.read_text()
        (line,) = [line for line in log.splitlines() if "signature check" in line]
        assert [word for word in words.split("|") if word not in line] == []
        assert "journal mode" in line and SECRET not in log and "t0ken" not in log
        assert "Traceback" not in log and "ERROR" not in log
    assert started[0].deliver(event_payload(), sign(wire(event_payload())))[0] == 201
    assert (tmp_path / "there.db-wal").exists() and not (tmp_path / "link.db-wal").exists()


ENTRYPOINT = (ROOT / "entrypoint.sh").read_text()


def test_what_gunicorn_refuses_is_logged_without_its_words(server):
    it = server(WEB_CONCURRENCY="1")
    with socket.create_connection(("127.0.0.1", it.port)) as client:
        client.sendall(b"POST /sentry/webhook HTTP/1.1\r\nHost: a\r\nX: 1\r\n hush\r\n\r\n")
        assert client.recv(4096).startswith(b"HTTP/1.1 400")
    wait_for(lambda: "Invalid request from ip=127.0.0.1\n" in it.log.read_text())
    assert "hush" not in it.log.read_text()


def enter(folder, owner=None, **env):
    """Run the container's entrypoint, its /data here; return the ended process of `id`."""
    folder.mkdir()
    (folder / "errors.db").touch()
    if owner:
        os.chown(folder, owner, owner)
    script = ENTRYPOINT.replace("/data", str(folder))
    command = ["sh", "-c", script, "sh", "sh", "-c", "id -u; echo $WEB_CONCURRENCY"]
    env = {"PATH": os.environ["PATH"]} | env
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_the_container_never_serves_as_root(tmp_path):
    bad = enter(tmp_path / "bad", WEB_CONCURRENCY="two")
    assert (bad.returncode, bad.stderr.count("\n")) == (1, 1)
    assert bad.stderr.startswith("WEB_CONCURRENCY: 'two' is not a whole number")
    if os.getuid():
        assert enter(tmp_path / "own", WEB_CONCURRENCY="").stdout == f"{os.getuid()}\n4\n"
        return
    for name, owner, expected in (("owned", 4321, 4321), ("roots", 0, 10001)):
        done = enter(tmp_path / name, owner, WEB_CONCURRENCY="3")
        assert (done.returncode, done.stdout) == (0, f"{expected}\n3\n"), done.stderr
        assert {file.stat().st_uid for file in (tmp_path / name).rglob("*")} == {expected}


# Reports to Sentry


@pytest.fixture
def sentry():
    """Run a server that takes envelopes as Sentry does; return its DSN and a list of the bodies."""
    bodies = []

    class Ingest(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = zlib.decompress(body, 31)
            bodies.append(body)
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ingest) as ingest:
        thread = threading.Thread(target=ingest.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://public@127.0.0.1:{ingest.server_address[1]}/1", bodies
        ingest.shutdown()
        thread.join()


WORD = "c0nfidential"


@pytest.mark.parametrize("cause", ["a fault", "the database"])
def test_failures_are_reported_without_content_once_a_minute_at_most(server, sentry, cause):
    dsn, bodies = sentry
    it = server(
        SENTRY_DSN=dsn, API_TOKEN=WORD, MAX_BODY_BYTES="5000", WEB_CONCURRENCY="1", **SIGNED
    )
    token = {"Authorization": f"Bearer {WORD}", "Cookie": WORD}
    body = wire(event_payload(title=WORD, request={"url": f"https://{WORD}.example"}))
    for wrong in (body, b"[]", b"x" * 5001):
        assert it.deliver(wrong)[0] in (401, 413)
    assert it.deliver(b"[]", sign(b"[]"))[0] == 400
    assert it.deliver(body, sign(body) | token)[0] == 201
    for path in ("/errors/7", "/errors?limit=x", "/nowhere", "/errors"):
        assert it.request("GET", path, headers=token)[0] in (200, 400, 404)
    assert bodies == []  # what others do wrong is not reported
    with contextlib.closing(sqlite3.connect(it.database)) as shell:
        if cause == "a fault":
            # No time, as the words of the fault will say.
            shell.execute("REPLACE INTO outcomes VALUES ('stored', '', 1, ?)", (WORD,))
        else:
            shell.execute("DROP TABLE errors")
        shell.commit()
    path, status = ("/metrics", 500) if cause == "a fault" else ("/errors/1", 503)
    for _ in range(3):
        assert it.request("GET", path, headers=token)[0] == status
    if cause == "the database":
        assert it.deliver(body, sign(body) | token)[0] == 202
    wait_for(lambda: bodies)
    assert it.stop() == 0
    (report,) = bodies
    assert (b"no such table" if cause == "the database" else b"ValueError") in report
    for word in (WORD, SECRET, sign(body)["Sentry-Hook-Signature"], "public@"):
        assert word.encode() not in report
    for key in ("vars", "request", "breadcrumbs", "server_name", "user", "modules"):
        assert f'"{key}"'.encode() not in report
    assert SECRET not in it.log.read_text()
    if cause == "the database":
        assert WORD not in it.log.read_text()


# Crashes


@pytest.mark.parametrize("state", ["sound", "corrupt"])
def test_what_is_acknowledged_outlives_kill_9_under_load(server, tmp_path, state):
    print(f"CRASH_SEED={SEED}")
    path = tmp_path / "server" / "data" / "errors.db"
    if state == "corrupt":
        path.parent.mkdir(parents=True)
        path.write_bytes(b"This was a database once. " * 1000)
    it = server(WEB_CONCURRENCY="3", **SIGNED)
    with Senders(it) as senders:
        for number in range(1, 5):
            wait_for(lambda least=100 * number: len(senders.answers) > least)
            for pid in it.workers():
                with contextlib.suppress(ProcessLookupError):  # it may have ended meanwhile
                    os.kill(pid, signal.SIGKILL)
            if number % 2 == 0:
                it.kill()
                it.start()
        wait_for(lambda: len(senders.answers) > 500)
    if state == "corrupt":
        assert senders.statuses() == {None, 202}
        assert len(it.spooled()) >= len(senders.acknowledged())
        path.unlink()
        it.kill()  # the workers have met the corrupt file
        it.start()
    assert senders.statuses() <= {None, 200, 201, 202} and len(senders.acknowledged()) > 200
    assert_all_there(it, senders)


# A database that cannot be written


def test_a_lock_delays_no_reply_and_loses_nothing_even_at_a_stop(server):
    it = wait_for_workers(server())
    payloads = [event_payload(number) for number in range(80)]
    statuses, unlocked = deliver_at_once(it, payloads[:40])
    assert statuses == [201] * 40
    statuses, _ = deliver_at_once(it, [event_payload(80)] * 20)
    assert sorted(statuses) == [200] * 19 + [201]
    with locked(it.database), ThreadPoolExecutor(20) as pool:
        seconds, (status, _) = timed(it.deliver, payloads[40])
        checks = [pool.submit(it.get, "/health") for _ in range(20)]
        statuses, slowest = deliver_at_once(it, payloads[41:])
        assert [status, *statuses] == [202] * 40
        assert max(seconds, slowest) < 1 + 2 * unlocked
        assert {check.result()["status"] for check in checks} == {"spooling"}
        assert "lock" in it.get("/health")["problem"]
        assert it.get("/")["counts"] == {"errors": 41, "spooled": 40}
    wait_for_empty_spool(it)
    first, second = wire(event_payload(81)), wire(event_payload(82))
    with locked(it.database):
        connect(it, head_of(first) + first).close()  # who hangs up
        wait_for(it.spooled)
        with connect(it, head_of(second) + second) as connection:
            wait_for(lambda: established(it) or len(it.spooled()) == 2)  # its request is here
            assert it.stop() == 0
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 202 ")
    it.start()
    wait_for_empty_spool(it)
    stored = read_all(it)
    assert sorted(stored) == [f"{number:032x}" for number in range(83)]
    assert stored[f"{81:032x}"] == first


def test_a_long_spool_enters_in_order_while_webhooks_come_in(server):
    it = wait_for_workers(server(**SIGNED))
    for number in range(1000, 1120):
        extra = os.urandom(500_000).hex() if number < 1005 else ""
        file = it.folder / "data" / "spool" / f"{number:020}-1.delivery"
        head = f'["{AT}", "error"]\n'.encode()
        file.with_suffix(".part").write_bytes(head + wire(event_payload(number, extra=extra)))
        file.with_suffix(".part").rename(file)
    with Senders(it, count=2) as senders:
        wait_for(lambda: not it.spooled(), 40)
    assert senders.statuses() <= {201, 202}
    assert_all_there(it, senders)
    assert not list((it.folder / "data" / "spool").glob("*.rejected"))
    entered = [int(event_id, 16) for event_id in read_all(it) if event_id.startswith("0")]
    assert sorted(entered) == list(range(1000, 1120))
    assert {row["received_at"] for row in it.get(f"/errors?limit=1000&until={AT}")} == {AT}


# Signals


def test_new_workers_and_masters_refuse_no_connection_and_lose_no_delivery(server):
    options = ("--max-requests", "60", "--max-requests-jitter", "30", "--access-logfile", "-")
    it = wait_for_workers(server(*options, WEB_CONCURRENCY="2", **SIGNED), 2)
    with Senders(it) as senders:
        wait_for(lambda: it.log.read_text().count("Autorestarting") > 4)
        old = set(it.workers())
        it.process.send_signal(signal.SIGHUP)
        wait_for(lambda: not old & set(it.workers()))
        it.process.send_signal(signal.SIGUSR2)  # which starts a new master beside this one
        wait_for(lambda: [pid for pid in it.workers() if len(children(pid)) == 2])
        assert it.stop() == 0
        sent = len(senders.answers)
        wait_for(lambda: len(senders.answers) > sent + 50)
    assert senders.statuses() <= {201, 202}
    log = it.log.read_text()
    assert '"POST /sentry/webhook HTTP/1.1" 201' in log and "Traceback" not in log
    assert_all_there(it, senders)


def test_a_stop_under_load_is_clean(server):
    it = wait_for_workers(server(**SIGNED))
    with Senders(it, count=8) as senders:
        wait_for(lambda: len(senders.answers) > 50)
        assert it.stop() == 0
        senders.over.set()
    log = it.log.read_text()
    assert log.count("Worker exiting") == 4 and "Traceback" not in log and "ERROR" not in log
    assert not Path(f"{it.database}-wal").exists()
    stored = log.count(" webhook stored ")  # and all of them are counted at the end
    sql = "SELECT count FROM outcomes WHERE outcome = 'stored'"
    assert select(it.database, sql) == [(stored,)] and stored > 50
    it.start()
    assert_all_there(it, senders)


def test_several_servers_start_at_once_on_an_empty_folder(server, tmp_path):
    settings = {"DATABASE_URL": f"sqlite:///{tmp_path}/data/errors.db", "WEB_CONCURRENCY": "2"}
    servers = [server(folder=tmp_path / str(each), wait=False, **settings) for each in range(4)]
    for it in servers:
        wait_for(it.is_up)
    assert [it.deliver(event_payload(1))[0] for it in servers] == [201, 200, 200, 200]
    log = "".join(it.log.read_text() for it in servers)
    assert "ERROR" not in log and "Traceback" not in log


def test_forged_deliveries_of_the_largest_size_keep_no_webhook_waiting(server):
    it = wait_for_workers(server(**SIGNED))
    body = wire(event_payload(1))
    calm, _ = timed(lambda: [it.deliver(b"{}") for _ in range(20)])
    large = wire(event_payload(extra=[{str(each): each} for each in range(300_000)]))
    with ThreadPoolExecutor(10) as pool:
        forged = [
            pool.submit(it.deliver, large, {"Sentry-Hook-Signature": "0" * 64}) for _ in range(10)
        ]
        seconds, (status, _) = timed(it.deliver, body, sign(body))
        assert {answer.result()[0] for answer in forged} == {401}
    assert status == 201 and seconds < 1 + 2 * calm
    assert list(read_all(it)) == [f"{1:032x}"]


def test_no_webhook_waits_for_an_export_a_search_a_backup_or_a_shell(server, tmp_path):
    it = wait_for_workers(server())
    for number in range(300):
        it.deliver(event_payload(number, title=f"Full {number}", extra=os.urandom(5000).hex()))
    over = threading.Event()
    replies = []

    def repeat(path):
        while not over.is_set():
            replies.append(it.request("GET", path, timeout=60))

    paths = "/errors?format=ndjson /errors?q=full+1&format=html&limit=250 /errors?q=f&since=9999d /issues".split()
    backup = [sys.executable, "-m", "flask", "--app", "collector", "backup", tmp_path / "copy.db"]
    with contextlib.closing(sqlite3.connect(it.database, isolation_level=None)) as shell:
        shell.execute("BEGIN")
        shell.execute("SELECT count(*) FROM errors").fetchone()
        with ThreadPoolExecutor() as pool, Senders(it, count=2) as senders:
            reads = [pool.submit(repeat, path) for path in paths]
            try:
                subprocess.run(backup, cwd=it.folder, env=it.env, check=True, capture_output=True)
                wait_for(lambda: len(senders.answers) > 100)
                wait_for(lambda: any(reply.count(b"\n") > 300 for _, _, reply in list(replies)))
            finally:
                over.set()
            for read in reads:
                read.result()
    print(f"slowest of {len(senders.answers)} webhooks: {senders.slowest():.3f} s")
    assert senders.statuses() == {201} and senders.slowest() < 2
    assert {status for status, _, _ in replies} <= {200, 503}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["copy.db", "server"]
    assert select(tmp_path / "copy.db", "PRAGMA integrity_check") == [("ok",)]
    assert select(tmp_path / "copy.db", "SELECT count(*) >= 300 FROM errors") == [(1,)]
    # Clients that leave half way through an export free their workers.
    for _ in range(4):
        with connect(it, b"GET /errors?format=ndjson HTTP/1.1\r\nHost: x\r\n\r\n") as left:
            assert left.recv(1 << 16)
    assert it.request("GET", "/errors?format=ndjson&limit=100")[2].count(b"\n") == 100
    assert "Traceback" not in it.log.read_text()


def test_the_kernel_keeps_spare_connections_of_browsers_from_the_workers(server):
    it = server(WEB_CONCURRENCY="1")
    spare = [connect(it) for _ in range(8)]
    assert it.request("GET", "/config")[0] == 200
    assert established(it) < len(spare)
    for connection in spare:
        connection.close()
