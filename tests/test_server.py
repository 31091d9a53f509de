"""A real gunicorn: killed, its database locked, full, changed or restored, its clients hostile."""

import contextlib
import http.client
import json
import os
import random
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import (
    PAYLOADS,
    ROOT,
    SECRET,
    Server,
    core,
    event_payload,
    locked,
    sign,
    wait_for,
    wire,
)

from collector import create_app, insert_error, pack, parse_error, select_body

SEED = int(os.environ.get("CRASH_SEED") or time.time_ns() % 1_000_000)
CRASH_ROUNDS = int(os.environ.get("CRASH_ROUNDS") or 2)
ROUNDS = int(os.environ.get("ROUNDS") or 1)
SIGNED = {"SENTRY_CLIENT_SECRET": SECRET}
GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /sentry/webhook HTTP/1.1\r\nHost: x\r\n"
HOST = b"Host: x\r\n\r\n"
AT = "2025-01-02T03:04:05.000000Z"
FULL = 600  # errors of 20 kB in the server with many
PROMPT = 2  # seconds; the promise is one, which a busy machine may double


def numbered(number, **event):
    """Return the small delivery of a number."""
    return event_payload(f"{number:032x}", **event)


def timed(action, *arguments, **options):
    """Return how many seconds a call took, and what it returned."""
    started = time.monotonic()
    result = action(*arguments, **options)
    return time.monotonic() - started, result


def children(pid):
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(server):
    return children(server.process.pid)


def wait_for_workers(server):
    """Wait until each worker has answered a webhook, as a log line of its own shows."""

    def all_have_answered():
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: server.deliver(b"{}"), range(8)))
        log, pids = server.log.read_text(), workers(server)
        expected = int(server.env.get("WEB_CONCURRENCY", 4))
        return len(pids) == expected and all(f"[{pid}] [INFO] webhook" in log for pid in pids)

    wait_for(all_have_answered)


def held(server, and_waiting=False):
    """Return how many connections the server's processes hold, or those that wait, too."""
    port, lines = f":{server.port:04X}", Path("/proc/net/tcp").read_text().splitlines()[1:]
    sockets = [line.split() for line in lines]
    if and_waiting:
        return sum(item[1].endswith(port) and item[3] == "01" for item in sockets)
    return sum(item[1].endswith(port) and item[3] != "0A" and item[9] != "0" for item in sockets)


def database_of(server):
    return server.folder / "data" / "errors.db"


def spooled(server):
    return sorted((server.folder / "data" / "spool").glob("*.delivery"))


def read_database(path):
    """Return (id, body) by event id of a database, in order of the ids; fail if it is damaged."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        assert [row[0] for row in connection.execute("PRAGMA integrity_check")] == ["ok"]
        sql = "SELECT id, event_id FROM errors WHERE event_id IS NOT NULL ORDER BY id"
        rows = connection.execute(sql).fetchall()
        errors = {row["event_id"]: (row["id"], select_body(connection, row["id"])) for row in rows}
    assert len(errors) == len(rows)
    return errors


def read_all(server):
    """Return the bodies in the server's database by event id, in order of their ids."""
    errors = read_database(database_of(server))
    return {event_id: body for event_id, (_, body) in errors.items()}


def wait_for_empty_spool(server):
    """Wait until all that was spooled is in the database, as health checks move it there."""
    wait_for(lambda: server.request("GET", "/health")[0] == 200 and not spooled(server), 20)


def deliver_at_once(server, numbers):
    """Deliver all at once; return the statuses, and how long the slowest took."""
    with ThreadPoolExecutor(len(numbers)) as pool:
        answers = list(pool.map(lambda number: timed(server.deliver, numbered(number)), numbers))
    return [status for _, (status, _) in answers], max(seconds for seconds, _ in answers)


def spool(server, number, payload):
    """Put a delivery into the spool, the earlier the less its number, as 1.0.0 did."""
    body = json.dumps([AT, "error"]).encode() + b"\n" + wire(payload)
    file = server.folder / "data" / "spool" / f"{number:020}-1.delivery"
    file.write_bytes(body)
    return file


def run_command(server, *arguments):
    """Run a command beside the server, as the README says; return what it said."""
    command = [sys.executable, "-m", "flask", "--app", "collector", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=server.env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


opened = []


@pytest.fixture(autouse=True)
def close_connections():
    """Close what a test has opened with connect."""
    yield
    while opened:
        opened.pop().close()


def connect(server, data=b"", receive=None):
    """Return a connection that has sent `data`; `receive` is the size of its receive buffer."""
    connection = socket.socket()
    opened.append(connection)
    if receive:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(data)
    return connection


def read_to_end(connection):
    """Return what comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def head_of(body, **headers):
    """Return the head of a webhook's request as bytes."""
    headers = {"Host": "x", "Content-Length": len(body), **sign(body), **headers}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /sentry/webhook HTTP/1.1\r\n{lines}\r\n".encode()


class Senders:
    """Clients that each post signed deliveries of their own, one after the other, until told to stop."""

    series = "5"  # what the event ids of theirs start with

    def __init__(self, server, count=4, most=10_000, pause=0.003):
        self.server, self.most, self.pause, self.over = server, most, pause, threading.Event()
        self.answers = []  # (event id, body, status or None, seconds)
        self.threads = [
            threading.Thread(target=self.send, args=(number,)) for number in range(count)
        ]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()
        for thread in self.threads:
            thread.join()

    def send(self, sender):
        source, number, body = random.Random(SEED + sender), 0, None
        while not self.over.wait(self.pause):
            event_id = f"{self.series}{sender:07x}{number:024x}"
            body = body or wire(
                event_payload(event_id, extra=source.randbytes(source.randrange(self.most)).hex())
            )
            seconds, status = timed(self.post, body)
            self.answers.append((event_id, body, status, seconds))
            if status is None:  # once more: it may be stored, and must not be stored twice
                time.sleep(0.01)
            else:
                number, body = number + 1, None

    def post(self, body):
        """Return the status of the reply, which is the acknowledgement, or None without one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=20)
        try:
            connection.request("POST", "/sentry/webhook", body, sign(body))
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()

    def acknowledged(self):
        """Return the bodies by event id of the deliveries that were answered 2xx."""
        return {
            event_id: body
            for event_id, body, status, _ in list(self.answers)
            if status and status < 300
        }

    def statuses(self):
        return {status for _, _, status, _ in list(self.answers)}

    def slowest(self):
        return max(seconds for _, _, _, seconds in self.answers)


def assert_all_there(server, senders):
    """Fail unless each acknowledged delivery is stored byte for byte, and every row can be read."""
    bodies, acknowledged = read_all(server), senders.acknowledged()
    assert {event_id: bodies.get(event_id) for event_id in acknowledged} == acknowledged
    status, _, lines = server.request("GET", "/errors?format=ndjson")
    assert (status, lines.count(b"\n")) == (200, len(bodies))


# Crashes


def test_what_was_acknowledged_outlives_kill_9(make_server):
    print(f"CRASH_SEED={SEED} CRASH_ROUNDS={CRASH_ROUNDS}")
    chance, kills = random.Random(SEED), 0
    server = make_server(WEB_CONCURRENCY="3", **SIGNED)
    with Senders(server) as senders:
        for _ in range(CRASH_ROUNDS):
            until = time.monotonic() + chance.uniform(0.3, 0.6)
            while time.monotonic() < until:
                time.sleep(chance.uniform(0, 0.2))
                for pid in chance.sample(workers(server), k=min(1, len(workers(server)))):
                    os.kill(pid, signal.SIGKILL)
                    kills += 1
            server.kill()
            server.start()
    wait_for_empty_spool(server)
    print(
        f"{kills} workers and {CRASH_ROUNDS} servers killed; {len(senders.acknowledged())} acknowledged"
    )
    assert kills and len(senders.acknowledged()) > 20 * CRASH_ROUNDS
    assert senders.statuses() <= {None, 200, 201, 202}
    assert_all_there(server, senders)


def test_kill_9_while_spooling_beside_a_corrupt_file_loses_nothing_acknowledged(
    make_server, tmp_path
):
    print(f"CRASH_SEED={SEED}")
    chance = random.Random(SEED)
    database = tmp_path / "server" / "data" / "errors.db"
    database.parent.mkdir(parents=True)
    database.write_bytes(b"This was a database once. " * 1000)
    server = make_server(WEB_CONCURRENCY="3", **SIGNED)
    status, _, reply = server.request("GET", "/health")
    assert status == 503 and b"not a database" in reply
    with Senders(server) as senders:
        for _ in range(6):
            time.sleep(chance.uniform(0.05, 0.15))
            os.kill(chance.choice(wait_for(lambda: workers(server))), signal.SIGKILL)
    assert senders.statuses() <= {None, 202} and len(senders.acknowledged()) > 20
    assert server.get("/config")["spooled"] >= len(senders.acknowledged())
    database.unlink()
    # These have met the corrupt file, and leave the database alone for a while.
    for pid in workers(server):
        os.kill(pid, signal.SIGKILL)
    wait_for_empty_spool(server)
    assert_all_there(server, senders)
    entered = list(read_all(server))
    for sender in range(4):
        own = [
            event_id for event_id in entered if event_id.startswith(f"{senders.series}{sender:07x}")
        ]
        assert own == sorted(own)


# A database that cannot be written


def test_deliveries_to_a_locked_database_are_answered_at_once_and_stored_once(make_server):
    server = make_server()
    wait_for_workers(server)
    statuses, unlocked = deliver_at_once(server, range(40))
    assert statuses == [201] * 40
    with locked(database_of(server)):
        statuses, slowest = deliver_at_once(server, range(40, 80))
        print(f"slowest of 40 at once: {unlocked:.2f} s, beside a lock {slowest:.2f} s")
        assert statuses == [202] * 40
        assert slowest < 1 + unlocked
        status, headers, reply = server.request("GET", "/health")
        assert (status, headers["Content-Type"]) == (503, "application/json")
        assert "end the program that holds its lock" in json.loads(reply)["error"]
        assert server.get("/")["counts"] == {"errors": 40, "spooled": 40}
    server.kill()
    server.start()  # whose workers do not wait for the end of a pause
    wait_for_empty_spool(server)
    assert sorted(read_all(server)) == [f"{number:032x}" for number in range(80)]
    assert server.get("/")["counts"] == {"errors": 80, "spooled": 0}


def test_health_checks_beside_a_lock_keep_no_webhook_waiting(make_server):
    server = make_server()
    wait_for_workers(server)
    with ThreadPoolExecutor(21) as pool:
        checks = [pool.submit(server.request, "GET", "/health") for _ in range(20)]
        assert {check.result()[0] for check in checks} == {200}
        with locked(database_of(server)):
            checks = [pool.submit(server.request, "GET", "/health") for _ in range(20)]
            seconds, (status, _) = timed(server.deliver, numbered(1))
            assert {check.result()[0] for check in checks} == {503}
    print(f"behind 20 health checks: {seconds:.2f} s")
    assert status == 202
    assert seconds < PROMPT


def test_a_delivery_whose_sender_has_hung_up_is_stored(make_server):
    server = make_server(**SIGNED)
    body = wire(numbered(1))
    with locked(database_of(server)):
        connect(server, head_of(body) + body).close()
        time.sleep(0.2)
    wait_for_empty_spool(server)
    wait_for(lambda: read_all(server) == {f"{1:032x}": body})


def test_a_delivery_that_waits_for_the_lock_is_spooled_when_the_service_stops(make_server):
    server = make_server()
    with locked(database_of(server)), ThreadPoolExecutor() as pool:
        answer = pool.submit(server.deliver, numbered(1))
        wait_for(lambda: held(server))
        server.process.terminate()
        assert answer.result() == (202, {"status": "queued"})
        assert server.process.wait(10) == 0
        assert len(spooled(server)) == 1
    server.start()
    wait_for_empty_spool(server)
    assert list(read_all(server)) == [f"{1:032x}"]


def test_what_was_counted_is_written_when_the_service_stops(make_server):
    server = make_server()
    for _ in range(20):
        assert server.deliver(b"[]")[0] == 400
    server.process.terminate()
    assert server.process.wait(10) == 0
    with contextlib.closing(sqlite3.connect(database_of(server))) as connection:
        sql = "SELECT outcome, reason, sum(count) FROM deliveries"
        assert connection.execute(sql).fetchall() == [("refused", "no object", 20)]


def test_a_long_spool_enters_in_order_while_webhooks_come_in(make_server):
    server = make_server()
    wait_for_workers(server)
    source = random.Random(SEED)
    for number in range(1000, 1005):
        spool(server, number, numbered(number, extra=source.randbytes(1_000_000).hex()))
    for number in range(1005, 1250):
        spool(server, number, numbered(number))
    with Senders(server, count=2) as senders:
        wait_for(lambda: not spooled(server), 30)
    print(f"{len(senders.answers)} webhooks meanwhile, slowest {senders.slowest():.2f} s")
    assert senders.statuses() <= {201, 202}
    assert senders.slowest() < PROMPT
    entered = [int(event_id, 16) for event_id in read_all(server) if event_id.startswith("0")]
    assert entered == list(range(1000, 1250))
    times = {row["received_at"] for row in server.get(f"/errors?limit=1000&until={AT}")}
    assert times == {AT}


def limit_files(server, size):
    """Let the workers write no file beyond `size` bytes, as a full disk or a quota would."""
    for pid in workers(server):
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def test_at_the_limit_of_the_disk_a_delivery_is_spooled_or_refused_with_retry_after(make_server):
    server = make_server()
    wait_for_workers(server)
    long = {"extra": random.Random(SEED).randbytes(50_000).hex()}
    for number in range(4):
        assert server.deliver(numbered(number, **long))[0] == 201
    limit_files(server, 65_536)  # the database has more already, a small spooled delivery has less
    assert server.deliver(numbered(4)) == (202, {"status": "queued"})
    status, headers, reply = server.request("POST", "/sentry/webhook", wire(numbered(5, **long)))
    assert status == 503, (reply, server.log.read_text())
    assert headers["Retry-After"] == "5"
    assert b"Neither the database nor the spool can be written" in reply
    assert server.request("GET", "/health")[0] == 503
    assert b"LOST" in server.log.read_bytes()
    limit_files(server, resource.RLIM_INFINITY)
    wait_for(lambda: server.request("GET", "/health")[0] == 200)  # the pause is over
    assert server.deliver(numbered(6))[0] in (201, 202)
    wait_for_empty_spool(server)
    assert sorted(int(event_id, 16) for event_id in read_all(server)) == [0, 1, 2, 3, 4, 6]
    assert not list((server.folder / "data" / "spool").iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """Return a folder on a disk of one megabyte."""
    folder = tmp_path / "server" / "data"
    folder.mkdir(parents=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("to mount a small disk takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_loses_nothing_acknowledged(small_disk, make_server):
    server = make_server(**SIGNED)
    with Senders(server, count=2, most=20_000) as senders:
        wait_for(lambda: 503 in senders.statuses())
    assert senders.statuses() == {201, 503}  # the spool leaves 64 MB of a disk free
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


# A database that is changed


def test_a_database_of_1_0_0_is_changed_while_deliveries_come_in(make_server, tmp_path):
    path = tmp_path / "server" / "data" / "errors.db"
    path.parent.mkdir(parents=True)
    columns = "received_at, timestamp, event_id, title, payload_bytes, payload"
    fill = f"""WITH RECURSIVE numbers(n) AS (VALUES (1) UNION ALL SELECT n + 1 FROM numbers LIMIT 5000)
        INSERT INTO errors ({columns})
        SELECT '{AT}', '{AT}', printf('old%d', n), 'old error', 12, '{{"event":{{}}}}' FROM numbers"""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((PAYLOADS / "database-1.0.0.sql").read_text(encoding="utf-8"))
        connection.execute(fill)
        connection.commit()
    server = make_server(wait=False, **SIGNED)
    with Senders(server) as senders:
        wait_for(lambda: 201 in senders.statuses(), 30)
    assert senders.statuses() <= {None, 201, 202}
    wait_for_empty_spool(server)
    log = server.log.read_text()
    assert log.count("changing the database from version 1 to 2") == 1
    assert log.count("changed the database in ") == 1
    assert "WORKER TIMEOUT" not in log
    errors = read_database(path)
    ids = [id_ for id_, _ in errors.values()]
    assert ids[:5] == [2, 6, 7, 10, 11]
    acknowledged = senders.acknowledged()
    assert {event_id: errors[event_id][1] for event_id in acknowledged} == acknowledged
    with contextlib.closing(sqlite3.connect(path)) as connection:
        stored = connection.execute("SELECT count(*) FROM errors").fetchone()[0]
    assert stored >= 5005 + len(acknowledged)


def test_a_restore_under_load_loses_nothing_and_uses_no_id_twice(make_server, tmp_path):
    server = make_server(**SIGNED)
    with Senders(server) as senders:
        wait_for(lambda: len(senders.answers) > 60)
        print(run_command(server, "backup", tmp_path / "copy.db"), end="")
        sent = len(senders.answers)
        wait_for(lambda: len(senders.answers) > sent + 60)
        print(run_command(server, "restore", tmp_path / "copy.db", "--yes"), end="")
        sent = len(senders.answers)
        wait_for(lambda: len(senders.answers) > sent + 60)
    wait_for_empty_spool(server)
    live = read_database(database_of(server))
    replaced = read_database(f"{database_of(server)}.before-restore")
    copy = read_database(tmp_path / "copy.db")
    acknowledged = senders.acknowledged()
    print(
        f"{len(acknowledged)} acknowledged: {len(copy)} in the backup, {len(replaced)} replaced, "
        f"{len(live)} there now; slowest {senders.slowest():.2f} s"
    )
    assert senders.statuses() <= {200, 201, 202}
    assert copy.items() <= live.items()
    assert copy.items() <= replaced.items()
    kept = {event_id: body for event_id, (_, body) in (replaced | live).items()}
    assert {event_id: kept[event_id] for event_id in acknowledged} == acknowledged
    events = {id_: event_id for event_id, (id_, _) in replaced.items()}
    assert [
        id_ for event_id, (id_, _) in live.items() if events.get(id_, event_id) != event_id
    ] == []
    assert max(id_ for id_, _ in live.values()) > max(events)


# What comes through gunicorn


def test_a_chunked_delivery_is_taken_up_to_the_limit(make_server):
    body = wire(numbered(1))
    server = make_server(MAX_BODY_BYTES=str(len(body)))

    def deliver(*parts):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        with contextlib.closing(connection):
            headers = {"Transfer-Encoding": "chunked"}
            connection.request("POST", "/sentry/webhook", iter(parts), headers, encode_chunked=True)
            return connection.getresponse().status

    assert deliver(body[:10], body[10:], b" ") == 413
    assert read_all(server) == {}
    assert deliver(body[:10], body[10:]) == 201
    assert read_all(server) == {f"{1:032x}": body}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a server that several tests use."""
    server = Server(tmp_path_factory.mktemp("shared"), SENTRY_ACTIONS="created,triggered")
    wait_for_workers(server.start())
    yield server
    server.kill()


def test_the_scheme_that_a_proxy_names_is_believed_and_a_path_is_not(shared):
    headers = {"Host": "errors_1:8000", "X-Forwarded-Proto": "https", "SCRIPT_NAME": "/elsewhere"}
    _, _, reply = shared.request("GET", "/", headers=headers)
    address = json.loads(reply)["connect"]["webhook_url"]
    assert address == "https://errors_1:8000/sentry/webhook"


# Connections


def added_log(server, since):
    """Return what was logged after the first `since` bytes."""
    return server.log.read_bytes()[since:].decode()


def test_a_stop_under_load_is_clean(make_server):
    server = make_server(**SIGNED)
    wait_for_workers(server)
    with Senders(server, count=8) as senders:
        wait_for(lambda: len(senders.answers) > 50)
        server.process.terminate()
        seconds, code = timed(server.process.wait, 10)
        senders.over.set()
    assert code == 0 and seconds < 3
    assert server.log.read_text().count("Worker exiting") == 4
    assert not Path(f"{database_of(server)}-wal").exists()
    server.start()
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


def test_a_rolling_restart_refuses_no_connection_and_loses_no_delivery(make_server):
    # gunicorn starts itself again by its path, beside which a folder is called http.
    server = make_server(**SIGNED, PYTHONSAFEPATH="1")
    with Senders(server) as senders:
        server.process.send_signal(signal.SIGUSR2)
        new = wait_for(lambda: [pid for pid in workers(server) if len(children(pid)) == 4])[0]
        server.process.terminate()
        assert server.process.wait(10) == 0
        sent = len(senders.answers)
        wait_for(lambda: len(senders.answers) > sent + 20)
    print(f"{len(senders.answers)} deliveries, slowest {senders.slowest():.2f} s")
    assert len(children(new)) == 4 and senders.statuses() <= {201, 202}
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


def test_forged_deliveries_of_the_largest_size_keep_no_webhook_waiting(make_server):
    server = make_server(**SIGNED)
    wait_for_workers(server)
    large, body = (
        wire(numbered(1, extra=[{str(each): each} for each in range(300_000)])),
        wire(numbered(2)),
    )
    with ThreadPoolExecutor(10) as pool:
        forged = [
            pool.submit(server.deliver, large, {"Sentry-Hook-Signature": "0" * 64})
            for _ in range(10)
        ]
        wait_for(lambda: held(server))
        seconds, (status, _) = timed(server.deliver, body, sign(body))
        assert {answer.result()[0] for answer in forged} == {401}
    print(f"behind 10 forged deliveries of {len(large)} bytes: {seconds:.2f} s")
    assert status == 201 and seconds < 1
    assert list(read_all(server)) == [f"{2:032x}"]


# Broken HTTP

BROKEN = {
    "nothing": b"",
    "empty lines": b"\r\n\r\n\r\n\r\n",
    "words": b"no HTTP at all\r\n\r\n",
    "bytes": bytes(range(256)) * 10,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\n" + HOST,
    "method in small letters": b"get / HTTP/1.1\r\n" + HOST,
    "unknown method": b"BREW / HTTP/1.1\r\n" + HOST,
    "long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST,
    "no end": b"A" * 1_000_000,
    "asterisk": b"GET * HTTP/1.1\r\n" + HOST,
    "whole URL": b"GET http://x/errors HTTP/1.1\r\n" + HOST,
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\n" + HOST,
    "TRACE": b"TRACE / HTTP/1.1\r\n" + HOST,
    "path no UTF-8": b"GET /errors/%ff%fe HTTP/1.1\r\n" + HOST,
    "path not escaped": b"GET /errors/\xff HTTP/1.1\r\n" + HOST,
    "path upwards": b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST,
    "id too large": b"GET /errors/99999999999999999999999999 HTTP/1.1\r\n" + HOST,
    "query no UTF-8": b"GET /errors?q=%ff%00&project=%zz HTTP/1.1\r\n" + HOST,
    "header without colon": GET + b"x" * 50 + b"\r\n\r\n",
    "long header without colon": GET + b"\x80" * 800_000 + b"\r\n\r\n",
    "long header": GET + b"X: " + b"y" * 50_000 + b"\r\n\r\n",
    "many headers": GET + b"X: y\r\n" * 5000 + b"\r\n",
    "folded header": GET + b"X: y\r\n z\r\n\r\n",
    "NUL in header": GET + b"X: \0\r\n\r\n",
    "line feeds only": GET.replace(b"\r", b"") + b"\n",
    "two hosts": GET + HOST,
    "odd host": b"GET / HTTP/1.1\r\nHost: \xff:/@[\r\n\r\n",
    "script name": GET + b"SCRIPT_NAME: /x\r\n\r\n",
    "path info": GET + b"PATH_INFO: /errors/1\r\n\r\n",
    "two schemes": GET + b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n",
    "odd accept": GET + b"Accept: \xff;q=nan, text/html;q=1e999, ;;;\r\n\r\n",
    "odd authorization": GET + b"Authorization: Basic \xff\xfe:::\r\n\r\n",
    "odd etag": GET + b'If-None-Match: W/"\xff, "", *\r\n\r\n',
    "odd range": GET + b"Range: bytes=-9-9,\xff\r\n\r\n",
    "odd cookie": GET + b"Cookie: \xff=\x80; =;;\r\n\r\n",
    "expectation": POST + b"Expect: miracles\r\nContent-Length: 2\r\n\r\n{}",
    "no length": POST + b"\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "length in words": POST + b"Content-Length: two\r\n\r\n{}",
    "length in odd digits": POST + "Content-Length: ²\r\n\r\n{}".encode("latin-1"),
    "endless length": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "length too large": POST + b"Content-Length: 999999999999\r\n\r\n{}",
    "body cut short": POST + b"Content-Length: 100\r\n\r\n{}",
    "chunked": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks of nonsense": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "chunked and a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    "gzip": POST + b"Transfer-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "odd type": POST
    + b"Content-Type: multipart/form-data; boundary=\xff\r\nContent-Length: 2\r\n\r\n{}",
    "odd signature": POST + b"Sentry-Hook-Signature: \xe9\r\nContent-Length: 2\r\n\r\n{}",
    "odd resource": POST + b"Sentry-Hook-Resource: \xe9\x85\xa0\r\nContent-Length: 2\r\n\r\n{}",
}


def exchange(server, data):
    """Return the reply to `data` from a client that says no more, and its status, None without one."""
    with connect(server) as connection:
        with contextlib.suppress(OSError):  # it may close before all is sent
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        reply = read_to_end(connection)
    return reply, int(reply.split(b" ")[1]) if reply else None


@pytest.mark.parametrize("name", BROKEN)
def test_broken_http_is_refused_in_a_short_log_line_at_most(shared, name):
    before, since = (workers(shared), shared.get("/")["counts"]), shared.log.stat().st_size
    reply, status = exchange(shared, BROKEN[name])
    assert status is None or status < 500, reply[:500]
    assert (workers(shared), shared.get("/")["counts"]) == before
    logged = added_log(shared, since)
    assert (
        logged.count("\n") <= 1
        and len(logged) < 1000
        and logged.isprintable() is not logged.endswith("\n")
    ), logged


def test_mutated_requests_never_end_in_a_fault_or_a_dead_worker(shared):
    print(f"CRASH_SEED={SEED}")
    chance, before = random.Random(SEED), workers(shared)
    error = numbered(7, exception={"values": [{"type": "E", "value": "é"}]})
    samples = [wire(error), json.dumps(error, ensure_ascii=False).encode()]
    for _ in range(200):
        body = chance.choice(samples)
        data = bytearray(
            head_of(body) + body if chance.random() < 0.8 else GET + b"Accept: text/html\r\n\r\n"
        )
        for _ in range(chance.choice((1, 2, 5, 50))):
            start = chance.randrange(len(data))
            data[start : start + chance.randrange(3)] = chance.randbytes(chance.randrange(4))
        reply, status = exchange(shared, bytes(data))
        assert status is None or status < 500, (data, reply)
    assert workers(shared) == before and "Traceback" not in shared.log.read_text()
    status, _, lines = shared.request("GET", "/errors?format=ndjson")
    assert (status, lines.count(b"\n")) == (200, shared.get("/")["counts"]["errors"])


# Slow neighbours


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Return a server that holds many errors."""
    server = Server(tmp_path_factory.mktemp("full"))
    database = core(create_app({"DATABASE_URL": server.env["DATABASE_URL"]})).database
    text = random.Random(1).randbytes(10_000).hex()
    packed = pack(wire(event_payload(extra=text)))
    with database.transaction() as connection:
        for number in range(FULL):
            payload = event_payload(f"f{number:031x}", title=f"Full {number}", extra=text)
            insert_error(connection, parse_error(payload, "error", AT) | packed)
    database.close()
    yield server.start()
    server.kill()


def test_no_webhook_waits_for_an_export_a_search_a_backup_or_a_shell(full, tmp_path):
    over, exports = threading.Event(), []

    def repeat(action):
        while not over.is_set():
            action()

    with contextlib.closing(sqlite3.connect(database_of(full), isolation_level=None)) as shell:
        shell.execute("BEGIN")
        assert shell.execute("SELECT count(*) FROM errors").fetchone()[0] >= FULL
        with ThreadPoolExecutor() as pool, Senders(full, count=2) as senders:
            reads = [
                pool.submit(
                    repeat,
                    lambda: exports.append(
                        full.request("GET", "/errors?format=ndjson", timeout=60)
                    ),
                ),
                pool.submit(
                    repeat, lambda: full.request("GET", "/errors?q=full+1&format=html&limit=1000")
                ),
                pool.submit(
                    repeat, lambda: full.request("GET", "/errors?q=f&level=error&since=9999d")
                ),
            ]
            try:
                run_command(full, "backup", tmp_path / "copy.db")
                wait_for(lambda: len(senders.answers) > 100, 20)
                wait_for(lambda: 200 in {status for status, *_ in exports}, 20)
            finally:
                over.set()
            for read in reads:
                read.result()
    print(
        f"slowest of {len(senders.answers)} webhooks beside slow neighbours: {senders.slowest():.3f} s"
    )
    assert senders.statuses() == {201} and senders.slowest() < PROMPT
    assert max(lines.count(b"\n") for _, _, lines in exports) >= FULL
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert copy.execute("SELECT count(*) FROM errors").fetchone()[0] >= FULL


def test_no_webhook_waits_for_what_a_long_read_has_left_to_do(make_server):
    server = make_server()
    wal = Path(f"{database_of(server)}-wal")
    with contextlib.closing(sqlite3.connect(database_of(server), isolation_level=None)) as shell:
        shell.execute("BEGIN")
        shell.execute("SELECT count(*) FROM errors").fetchone()
        with contextlib.closing(sqlite3.connect(database_of(server))) as other:
            other.execute("CREATE TABLE written AS SELECT zeroblob(17 * 1024 * 1024)")
    grown = wal.stat().st_size
    assert grown > 16 * 1024 * 1024  # what is kept of it
    with Senders(server, count=2) as senders:
        wait_for(
            lambda: wal.stat().st_size < grown, 20
        )  # all of it is in the database, and it begins anew
    print(
        f"slowest of {len(senders.answers)} webhooks after a long read: {senders.slowest():.3f} s"
    )
    assert senders.statuses() <= {201, 202} and senders.slowest() < PROMPT
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


def test_a_client_that_leaves_half_way_through_an_export_frees_its_worker(full):
    since, before = full.log.stat().st_size, workers(full)
    for _ in range(4):
        with connect(full, b"GET /errors?format=ndjson HTTP/1.1\r\nHost: x\r\n\r\n") as connection:
            assert len(connection.recv(1 << 16)) > 0
    seconds, (status, _, lines) = timed(full.request, "GET", "/errors?format=ndjson&limit=100")
    assert (status, lines.count(b"\n")) == (200, 100) and seconds < 2
    assert workers(full) == before and added_log(full, since) == ""


# Starts


def test_several_servers_start_at_once_on_an_empty_folder(tmp_path):
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        url = f"sqlite:///{folder}/data/errors.db"
        settings = {"DATABASE_URL": url, "WEB_CONCURRENCY": "2"}
        servers = [Server(folder / f"{each}", **settings) for each in range(4)]
        try:
            for server in servers:
                server.start(wait=False)
            for server in servers:
                wait_for(server.is_up, 20)
            statuses = [server.deliver(numbered(1))[0] for server in servers]
            assert statuses == [201] + [200] * 3
        finally:
            for server in servers:
                server.kill()
        lines = [line for server in servers for line in server.log.read_text().splitlines()]
        # Another program may take a port for a moment; gunicorn tries again.
        assert [line for line in lines if "ERROR" in line and "in use" not in line] == []
        assert "Traceback (most recent call last):" not in lines


BAD_STARTS = [
    ("DATABASE_URL", "postgresql://user:secret@host/db", "'postgresql'"),
    ("DATABASE_URL", "sqlite:////dev/null/errors.db", "Not a directory"),
    ("SENTRY_DSN", "secret", "not a DSN"),
]


def test_a_bad_setting_stops_the_start_with_one_line(make_server, tmp_path):
    servers = []
    for number, (name, value, _) in enumerate(BAD_STARTS):
        servers.append(make_server(folder=tmp_path / str(number), wait=False, **{name: value}))
    for server, (name, _, fault) in zip(servers, BAD_STARTS, strict=True):
        assert server.process.wait(20) != 0
        log = server.log.read_text()
        (line,) = {line for line in log.splitlines() if not line.startswith("[")}
        assert line.startswith(f"{name}: ")
        assert fault in line
        assert "secret" not in log


# Proxies and browsers before it


def test_no_header_of_a_proxy_refuses_a_delivery_and_its_last_scheme_is_that_of_links(make_server):
    server = make_server()
    hostile = {"X-Forwarded-Protocol": "https", "X-Forwarded-Ssl": "off"}
    for number, (sent, scheme) in enumerate(
        [("https,http", "http"), ("http, HTTPS", "https"), ("https", "https"), ("gopher", "http")]
    ):
        headers = hostile | {"X-Forwarded-Proto": sent}
        status, _ = server.deliver(event_payload(f"{number:032}"), headers)
        assert status == 201
        address = server.get("/", **headers)["connect"]["webhook_url"]
        assert address == f"{scheme}://127.0.0.1:{server.port}/sentry/webhook"


def test_a_page_does_not_wait_for_the_spare_connections_of_browsers(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    seconds = []
    for _ in range(5):
        spare = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
        started = time.monotonic()
        assert server.request("GET", "/config")[0] == 200
        seconds.append(time.monotonic() - started)
        for connection in spare:
            connection.close()
    assert min(seconds) < 0.9  # a worker that holds one of them waits for a second
