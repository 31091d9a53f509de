"""A real gunicorn: killed, stopped, reloaded, its database locked or broken, its clients slow or hostile."""

import contextlib
import http.client
import json
import os
import random
import resource
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, SECRET, Server, event_payload, sign, wait_for, wire

from collector import LONG_WAL_BYTES, create_app, insert_error, pack, parse_error, select_body

SEED = int(os.environ.get("CRASH_SEED") or time.time_ns() % 1_000_000)
CRASH_ROUNDS = int(os.environ.get("CRASH_ROUNDS") or 2)
ROUNDS = int(os.environ.get("ROUNDS") or 1)
SIGNED = {"SENTRY_CLIENT_SECRET": SECRET}
GET, POST, HOST = (
    b"GET / HTTP/1.1\r\nHost: x\r\n",
    b"POST /sentry/webhook HTTP/1.1\r\nHost: x\r\n",
    b"Host: x\r\n\r\n",
)


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
        expected = int(server.env.get("WEB_CONCURRENCY", 2))
        return len(pids) == expected and all(f"[{pid}] [INFO] webhook" in log for pid in pids)

    wait_for(all_have_answered)


def held(server, and_waiting=False):
    """Return how many connections the server's processes hold, and how many wait to be accepted if that is asked."""
    port, lines = f":{server.port:04X}", Path("/proc/net/tcp").read_text().splitlines()[1:]
    sockets = [line.split() for line in lines]
    if and_waiting:
        return sum(item[1].endswith(port) and item[3] == "01" for item in sockets)
    return sum(item[1].endswith(port) and item[3] != "0A" and item[9] != "0" for item in sockets)


def database_of(server):
    return server.folder / "data" / "errors.db"


def spooled(server):
    return sorted((server.folder / "data" / "spool").glob("*.delivery"))


def read_all(server):
    """Return the bodies in the database by event id, in order; fail if one is there twice or the file is damaged."""
    with contextlib.closing(sqlite3.connect(database_of(server))) as connection:
        connection.row_factory = sqlite3.Row
        assert [row[0] for row in connection.execute("PRAGMA integrity_check")] == ["ok"]
        rows = connection.execute("SELECT id, event_id FROM errors ORDER BY id").fetchall()
        bodies = {row["event_id"]: select_body(connection, row["id"]) for row in rows}
    assert len(bodies) == len(rows)
    return bodies


def wait_for_empty_spool(server):
    """Wait until all that was spooled is in the database, as health checks move it there."""
    wait_for(lambda: server.request("GET", "/health")[0] == 200 and not spooled(server), 20)


@contextlib.contextmanager
def locked(server):
    """Hold the database's lock, as a VACUUM or somebody's shell would."""
    with contextlib.closing(
        sqlite3.connect(database_of(server), isolation_level=None)
    ) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


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

    def __init__(self, server, count=4, most=10_000, pause=0):
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
        """Return the status of the reply, which is the acknowledgement whatever becomes of the rest; None without."""
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
    """Assert that each acknowledged delivery is in the database, byte for byte, and every row can be read."""
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
            until = time.monotonic() + chance.uniform(0.3, 0.9)
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
        for _ in range(8):
            time.sleep(chance.uniform(0.05, 0.2))
            os.kill(chance.choice(wait_for(lambda: workers(server))), signal.SIGKILL)
    assert senders.statuses() <= {None, 202} and len(senders.acknowledged()) > 20
    assert server.get("/config")["spooled"] >= len(senders.acknowledged())
    database.unlink()
    wait_for_empty_spool(server)
    assert_all_there(server, senders)
    entered = list(read_all(server))
    for sender in range(4):
        own = [
            event_id for event_id in entered if event_id.startswith(f"{senders.series}{sender:07x}")
        ]
        assert own == sorted(own)


# A database that cannot be written


def test_deliveries_to_a_locked_database_are_spooled_and_enter_in_order(make_server):
    server = make_server()
    wait_for_workers(server)
    with ThreadPoolExecutor() as pool:
        assert server.deliver(numbered(0))[0] == 201
        with locked(server):
            # Only one waits for the lock, for all workers.
            first = list(pool.map(lambda number: timed(server.deliver, numbered(number)), (1, 2)))
            later = [timed(server.deliver, numbered(number)) for number in range(3, 13)]
            assert [answer for _, answer in first + later] == [(202, {"status": "queued"})] * 12
            assert 2.5 < max(seconds for seconds, _ in first) < 4.5, first
            assert max(seconds for seconds, _ in later) < 0.5, later
            status, headers, reply = server.request("GET", "/health")
            assert (status, headers["Content-Type"]) == (503, "application/json")
            assert "locked" in json.loads(reply)["error"] and "12" in json.loads(reply)["error"]
            assert server.get("/")["counts"] == {"errors": 1, "spooled": 12}
            assert server.get("/config")["spooled"] == 12
        seconds, (status, _) = timed(server.deliver, numbered(99))
        assert status == 201 and seconds < 0.5
    wait_for(lambda: not spooled(server))
    entered = [int(event_id, 16) for event_id in read_all(server)]
    assert sorted(entered[:4]) == [0, 1, 2, 99] and entered[4:] == list(range(3, 13))
    assert server.get("/")["counts"] == {"errors": 14, "spooled": 0}


def test_a_crowd_at_a_locked_database_is_answered_within_the_second(make_server):
    server = make_server()
    wait_for_workers(server)
    with locked(server), ThreadPoolExecutor(40) as pool:
        assert server.request("GET", "/health")[0] == 503  # has waited for all
        answers = list(
            pool.map(lambda number: timed(server.deliver, numbered(number)), range(3, 43))
        )
        print(f"slowest of 40 at once: {max(answers)[0]:.2f} s")
        assert {status for _, (status, _) in answers} == {202}
        assert max(seconds for seconds, _ in answers) < 1
        checks = [connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(10)]
        seconds, (status, _) = timed(server.deliver, numbered(43))
        print(f"behind 10 health checks: {seconds:.2f} s")
        assert {read_to_end(check).split(b" ")[1] for check in checks} == {b"503"}
        assert status == 202 and seconds < 1


def test_while_one_delivery_waits_for_a_lock_the_others_are_served(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    body = wire(numbered(1))
    halves = [connect(server, head_of(body)) for _ in range(5)]
    with ThreadPoolExecutor(20) as pool:
        os.kill(workers(server)[0], signal.SIGSTOP)  # so that all are there at once
        with locked(server):
            answers = [
                pool.submit(timed, server.deliver, numbered(number)) for number in range(2, 14)
            ]
            wait_for(lambda: held(server, and_waiting=True) >= 17)
            os.kill(workers(server)[0], signal.SIGCONT)
            wait_for(lambda: server.log.read_text().count("webhook queued") == 11)
            for half in halves:
                half.sendall(body)
            began = time.monotonic()
            assert all(read_to_end(half).startswith(b"HTTP/1.1 202 ") for half in halves)
            assert time.monotonic() - began < 1
            seconds = sorted(answer.result()[0] for answer in answers)
            assert timed(server.get, "/errors")[0] < 1
    print(f"of 12 at once: {seconds[-2]:.2f} s, the one that waited {seconds[-1]:.2f} s")
    assert seconds[-2] < 1 and 2.5 < seconds[-1] < 4
    wait_for_empty_spool(server)
    assert len(read_all(server)) == 13


def test_health_checks_and_refusals_beside_a_lock_keep_no_webhook_waiting(make_server):
    server = make_server()
    wait_for_workers(server)
    with locked(server):
        checks = [connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(20)]
        refused = [connect(server, head_of(b"{}") + b"{}") for _ in range(60)]
        server.deliver(numbered(1))  # waits for all
        checks += [connect(server, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(20)]
        refused += [connect(server, head_of(b"{}") + b"{}") for _ in range(60)]
        seconds, (status, _) = timed(server.deliver, numbered(2))
        assert status == 202 and seconds < 1, seconds
        assert {read_to_end(check).split(b" ")[1] for check in checks} == {b"503"}


def test_few_files_and_many_connections_cost_no_delivery(make_server):
    server = make_server()
    for pid in workers(server):
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (256, hard))
    for _ in range(700):
        connect(server, b"GET /")
    answers = [timed(server.deliver, numbered(number)) for number in range(20)]
    assert {status for _, (status, _) in answers} == {201} and max(answers)[0] < 1
    assert server.request("GET", "/?format=html")[0] == 200


def test_a_spool_of_large_deliveries_holds_nobody_up(make_server):
    server = make_server()
    wait_for_workers(server)
    source = random.Random(1)
    for number in range(60):
        body = wire(numbered(1000 + number, extra=source.randbytes(1_000_000).hex()))
        file = server.folder / "data" / "spool" / f"{number:020}-1.delivery"
        file.write_bytes(b'["2025-01-02T03:04:05.000000Z", "error"]\n' + body)
    answers = []
    while spooled(server):
        answers.append(timed(server.deliver, numbered(len(answers))))
    print(f"{len(answers)} webhooks meanwhile, slowest {max(answers)[0]:.2f} s")
    assert {status for _, (status, _) in answers} == {201} and max(answers)[0] < 1
    ids = [int(event_id, 16) for event_id in read_all(server)]
    assert [number for number in ids if number >= 1000] == list(range(1000, 1060))


def test_a_lock_released_after_a_second_is_waited_for_even_if_the_sender_has_hung_up(make_server):
    server, bodies = make_server(**SIGNED), [wire(numbered(number)) for number in (1, 2)]
    with ThreadPoolExecutor() as pool:
        with locked(server):
            answer = pool.submit(timed, server.deliver, bodies[0], sign(bodies[0]))
            time.sleep(1)
        seconds, (status, _) = answer.result()
    assert status == 201 and 0.9 < seconds < 2.5, seconds
    with locked(server):
        connect(server, head_of(bodies[1]) + bodies[1]).close()
        time.sleep(1)
    wait_for(lambda: len(read_all(server)) == 2)
    assert sorted(read_all(server).values()) == sorted(bodies)
    assert server.log.read_text().count("webhook stored") == 2


def test_a_delivery_that_waits_for_the_lock_is_spooled_when_the_service_stops(make_server):
    server = make_server()
    with locked(server), ThreadPoolExecutor() as pool:
        answer = pool.submit(server.deliver, numbered(1))
        wait_for(lambda: held(server))
        server.process.terminate()
        seconds, code = timed(server.process.wait, 10)
        assert answer.result() == (202, {"status": "queued"})
        assert code == 0 and seconds < 3, seconds
        assert len(spooled(server)) == 1
    server.start()
    assert list(read_all(server)) == [f"{1:032x}"] and not spooled(server)


def test_spooled_deliveries_enter_at_the_next_start_health_check_or_webhook(make_server):
    server = make_server()
    wait_for_workers(server)
    for number, trigger in enumerate(
        (
            lambda: server.request("GET", "/health"),
            lambda: server.deliver(numbered(0)),
            lambda: (server.stop(), server.start()),
        )
    ):
        body = wire(numbered(number))
        file = server.folder / "data" / "spool" / f"{number:020}-1.delivery"
        file.write_bytes(
            json.dumps(["2025-01-02T03:04:05.000000Z", "error"]).encode() + b"\n" + body
        )
        trigger()
        wait_for(lambda: not spooled(server))
        assert list(read_all(server).values())[number:] == [body]
    assert {row["received_at"] for row in server.get("/errors")} == {"2025-01-02T03:04:05.000000Z"}


def test_a_long_spool_enters_while_webhooks_come_in(make_server):
    server = make_server()
    wait_for_workers(server)
    file, spool = server.folder / "delivery", server.folder / "data" / "spool"
    file.write_bytes(b'["2025-01-02T03:04:05.000000Z", "error"]\n' + wire(numbered(0)))
    for number in range(20_000):
        os.link(file, spool / f"{number:020}-1.delivery")
    slowest, number, deadline = 0, 0, time.monotonic() + 30
    while spooled(server) and time.monotonic() < deadline:
        number += 1
        seconds, (status, _) = timed(server.deliver, numbered(number))
        slowest = max(slowest, seconds)
        assert status in (201, 202)
    print(f"{number} webhooks meanwhile, slowest {slowest:.2f} s")
    assert not spooled(server) and slowest < 1


def test_a_spool_folder_cleared_away_is_made_again(make_server):
    server = make_server()
    wait_for_workers(server)
    database_of(server).unlink()
    database_of(server).mkdir()
    (server.folder / "data" / "spool").rmdir()
    assert server.deliver(numbered(1)) == (202, {"status": "queued"})
    database_of(server).rmdir()
    wait_for_empty_spool(server)
    assert list(read_all(server)) == [f"{1:032x}"]


def limit_files(server, size):
    """Let the workers write no file beyond `size` bytes, as a full disk or a quota would."""
    for pid in workers(server):
        hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, hard))


def test_at_the_limit_of_the_disk_a_delivery_is_spooled_or_refused_with_retry_after(make_server):
    server, long = make_server(), {"extra": random.Random(SEED).randbytes(50_000).hex()}
    for number in range(4):
        assert server.deliver(numbered(number, **long))[0] == 201
    limit_files(server, 65_536)  # the database has more already, a small spooled delivery has less
    assert server.deliver(numbered(4)) == (202, {"status": "queued"})
    status, headers, reply = server.request("POST", "/sentry/webhook", wire(numbered(5, **long)))
    assert status == 503 and int(headers["Retry-After"]) > 0 and b"spool" in reply
    assert server.request("GET", "/health")[0] == 503
    assert b"LOST" in server.log.read_bytes()
    limit_files(server, resource.RLIM_INFINITY)
    assert server.deliver(numbered(6))[0] == 201
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
    assert senders.statuses() <= {201, 202, 503}
    subprocess.run(["mount", "-o", "remount,size=20m", small_disk], check=True)
    assert server.deliver(wire(numbered(9)), sign(wire(numbered(9))))[0] == 201
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


@pytest.mark.parametrize(
    "state",
    ["running, wal removed", "running, wal left", "killed, wal removed", "killed, wal left"],
)
def test_a_restored_database_is_taken_up(make_server, tmp_path, state):
    server, database = make_server(), tmp_path / "server" / "data" / "errors.db"

    def deliver(*numbers):
        with ThreadPoolExecutor(8) as pool:
            return set(
                pool.map(
                    lambda number: server.deliver(numbered(number, extra="x" * 5000))[0],
                    range(*numbers),
                )
            )

    assert deliver(0, 40) == {201}
    back_up(server, tmp_path / "copy.db")
    assert deliver(40, 80) == {201}
    if state.startswith("killed"):
        server.kill()
    if state.endswith("wal removed"):
        for suffix in ("-wal", "-shm"):
            Path(f"{database}{suffix}").unlink(missing_ok=True)
    os.replace(tmp_path / "copy.db", database)
    if state.startswith("killed"):
        server.start()
    assert deliver(80, 120) == {201}
    assert sorted(int(event_id, 16) for event_id in read_all(server)) == [
        *range(40),
        *range(80, 120),
    ]


# Connections


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a server that several tests use."""
    server = Server(tmp_path_factory.mktemp("shared"), SENTRY_ACTIONS="created,triggered")
    wait_for_workers(server.start())
    yield server
    server.stop()


def added_log(server, since):
    """Return what was logged after the first `since` bytes."""
    return server.log.read_bytes()[since:].decode()


def test_a_hundred_silent_connections_keep_no_webhook_waiting(shared):
    since = shared.log.stat().st_size
    for _ in range(100):
        connect(shared)
    seconds = [timed(shared.deliver, numbered(1)) for _ in range(10)]
    print(f"slowest: {max(seconds)[0]:.3f} s")
    assert max(seconds)[0] < 1 and {status for _, (status, _) in seconds} <= {200, 201}
    assert len(added_log(shared, since).splitlines()) == 10


BIG = event_payload(
    "b" * 32, extra="".join(random.Random(1).choices("0123456789abcdef", k=5_000_000))
)


def drip(connection):
    """Send a byte every tenth of a second until the connection is closed."""

    def run():
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(b"x")
                time.sleep(0.1)

    threading.Thread(target=run).start()


def open_slow_clients(server):
    """Return connections, by kind, that would each hold a worker for good; BIG is error 1."""
    kinds = {
        "slow reader": connect(
            server, b"GET /errors/1/payload HTTP/1.1\r\nHost: x\r\n\r\n", receive=4096
        )
    }
    assert kinds["slow reader"].recv(1) == b"H"
    kinds |= {
        "half a head": connect(server, b"POST /sentry/webhook HTTP/1.1\r\nHost:"),
        "half a body": connect(server, head_of(b"{}" * 50) + b"{}"),
        "dripping head": connect(server, b"GET /errors HTTP/1.1\r\nX: "),
        "dripping body": connect(server, head_of(b"x" * 50_000)),
    }
    drip(kinds["dripping head"])
    drip(kinds["dripping body"])
    return kinds


def memory(server):
    """Return the megabytes of the largest worker (PSS)."""
    maps = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in workers(server)]
    return max(int(found.split("\nPss:")[1].split()[0]) / 1024 for found in maps)


def test_slow_clients_hold_no_worker_take_little_memory_and_cost_a_log_line_at_most(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    wait_for_workers(server)
    server.deliver(BIG)
    since, started, slow = server.log.stat().st_size, time.monotonic(), open_slow_clients(server)
    part = head_of(b"x" * 5_000_000) + b"x" * 4_000_000

    def send_most(client):
        with contextlib.suppress(OSError):
            client.sendall(part)

    more = [connect(server) for _ in range(60)]
    threads = [threading.Thread(target=send_most, args=(client,)) for client in more]
    for thread in threads:
        thread.start()
    wait_for(lambda: held(server) >= 60)
    waited, (status, _) = timed(server.deliver, numbered(1))
    reading, _ = timed(server.get, "/errors")
    print(
        f"behind {len(slow) + len(more)} slow clients and one worker: {waited:.2f} s, a reader {reading:.2f} s"
    )
    assert status == 201 and max(waited, reading) < 1
    highest = memory(server)
    ends = {
        kind: read_to_end(slow[kind]) for kind in reversed(slow)
    }  # the slow reader takes nothing until the last
    seconds = time.monotonic() - started
    highest = max(highest, memory(server))
    print(
        f"the slow ones are gone after {seconds:.1f} s; a worker had {highest:.0f} MB at the most"
    )
    assert seconds < 8 and highest < 100
    for client in more:
        client.close()
    for thread in threads:
        thread.join()
    wait_for(lambda: not held(server))
    assert len(ends["slow reader"]) < 5_000_000
    assert b" 400 " in ends["half a body"] and b" 400 " in ends["dripping body"]
    lines = added_log(server, since).splitlines()
    assert len(lines) <= 1 + len(slow) + len(more) and "Traceback" not in "".join(lines), lines
    assert server.get("/")["counts"] == {"errors": 2, "spooled": 0}


def test_long_uploads_that_stand_still_keep_no_long_delivery_waiting(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    heads = [connect(server, head_of(b"x" * 5_000_000)) for _ in range(20)]
    for head in heads[:6]:
        threading.Thread(target=head.sendall, args=(b"x" * 4_000_000,)).start()
    wait_for(lambda: memory(server) > 30)
    seconds, (status, _) = timed(server.deliver, numbered(1, extra="x" * 200_000))
    longer, (status_of_longer, _) = timed(server.deliver, numbered(2, extra="x" * 4_000_000))
    print(f"200 kB took {seconds:.2f} s, 4 MB {longer:.2f} s")
    assert (status, status_of_longer) == (201, 201) and seconds < 1 and longer < 2


def test_what_was_queued_is_counted_even_if_the_worker_ends(make_server):
    server = make_server()
    with locked(server):
        assert server.request("GET", "/health")[0] == 503  # has waited for all
        assert {server.deliver(numbered(number))[0] for number in range(20)} == {202}
    wait_for_empty_spool(server)
    reload(server)
    counts = {row["outcome"]: row["count"] for row in server.get("/")["deliveries"]}
    assert counts == {"queued": 20}


def test_a_request_that_comes_in_pieces_is_served_when_it_is_whole(make_server):
    server = make_server(WEB_CONCURRENCY="1", **SIGNED)
    body = wire(numbered(1, extra="x" * 200_000))
    pieces = connect(server, head_of(body)[:50])
    for number, (start, end) in enumerate(
        ((50, 300), (300, 5000), (5000, 150_000), (150_000, None)), 2
    ):
        small = wire(numbered(number))
        seconds, (status, _) = timed(server.deliver, small, sign(small))
        assert status == 201 and seconds < 1
        pieces.sendall((head_of(body) + body)[start:end])
    assert read_to_end(pieces).startswith(b"HTTP/1.1 201 ")
    assert read_all(server)[f"{1:032x}"] == body


def test_many_long_uploads_at_once_take_little_memory_and_the_honest_ones_come_through(make_server):
    server = make_server(WEB_CONCURRENCY="1", **SIGNED)
    honest = [wire(numbered(number, extra="x" * 2_000_000)) for number in range(12)]
    uploads = [connect(server, head_of(body) + body[:100_000]) for body in honest]
    for _ in range(60):
        connect(server, head_of(b"x" * 5_000_000) + b"x" * 500)
    for sender, body in zip(uploads, honest, strict=True):
        threading.Thread(target=sender.sendall, args=(body[100_000:],)).start()
    highest = memory(server)
    small = wire(numbered(99))
    seconds, (status, _) = timed(server.deliver, small, sign(small))
    assert status == 201 and seconds < 1
    for sender in uploads:
        highest = max(highest, memory(server))
        assert read_to_end(sender).startswith(b"HTTP/1.1 201 ")
    print(f"{highest:.0f} MB at the most")
    assert highest < 100


def test_a_client_that_waits_for_a_go_ahead_gets_it(make_server):
    server, body = make_server(), wire(numbered(1))
    client = connect(server, head_of(body, Expect="100-continue"))
    assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.sendall(body)
    assert read_to_end(client).startswith(b"HTTP/1.1 201 ")


def test_a_reader_who_sips_an_export_keeps_nobody_waiting(full):
    sips = [
        connect(full, b"GET /errors?format=ndjson HTTP/1.1\r\nHost: x\r\n\r\n", receive=4096)
        for _ in range(20)
    ]
    assert {sip.recv(1) for sip in sips} == {b"H"}
    seconds = [timed(full.request, "GET", "/errors?limit=1")[0] for _ in range(5)]
    seconds += [timed(full.deliver, event_payload(f"51b{number:029x}"))[0] for number in range(5)]
    assert max(seconds) < 1, seconds


def test_with_one_worker_an_export_stops_no_webhook(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    text = random.Random(1).randbytes(10_000).hex()
    for number in range(300):
        server.deliver(numbered(number, extra=text))
    with ThreadPoolExecutor() as pool:
        exports = [pool.submit(server.request, "GET", "/errors?format=ndjson") for _ in range(3)]
        with Senders(server, count=2) as senders:
            lines = [export.result()[2].count(b"\n") for export in exports]
    print(f"slowest of {len(senders.answers)} webhooks: {senders.slowest():.3f} s")
    assert min(lines) >= 300 and senders.statuses() == {201} and senders.slowest() < 1


@pytest.mark.parametrize("sign_", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_takes_3_seconds_at_most_and_finishes_what_is_in_hand(make_server, sign_):
    server = make_server(**SIGNED)
    server.deliver(wire(BIG), sign(wire(BIG)))
    body = wire(numbered(1))
    for _ in range(20):
        connect(server)
    open_slow_clients(server)
    in_hand = connect(server, head_of(body) + body[:-10])
    seconds, (status, _) = timed(server.deliver, wire(numbered(2)), sign(wire(numbered(2))))
    assert status == 201 and seconds < 1, seconds
    started = time.monotonic()
    os.killpg(
        server.process.pid, sign_
    ) if sign_ == signal.SIGINT else server.process.terminate()  # as Ctrl-C does
    wait_for(lambda: b"Handling signal: " in server.log.read_bytes())
    in_hand.sendall(body[-10:])
    assert read_to_end(in_hand).startswith(b"HTTP/1.1 201 ")
    assert server.process.wait(10) == 0
    seconds = time.monotonic() - started
    print(f"ended {seconds:.1f} s after {sign_.name}")
    assert seconds < 3
    assert "Traceback" not in server.log.read_text()
    assert list(read_all(server)) == ["b" * 32, f"{2:032x}", f"{1:032x}"]


def test_a_stop_under_load_is_clean(make_server):
    server = make_server(**SIGNED)
    with Senders(server, count=16) as senders:
        wait_for(lambda: len(senders.answers) > 300)
        server.process.terminate()
        seconds, code = timed(server.process.wait, 10)
        senders.over.set()
    assert code == 0 and seconds < 3
    assert server.log.read_text().count("Worker exiting") == 2
    assert not Path(f"{database_of(server)}-wal").exists()
    server.start()
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


def test_a_stop_lets_a_long_reply_end(full):
    with connect(full, b"GET /errors?format=ndjson HTTP/1.1\r\nHost: x\r\n\r\n") as client:
        head = client.recv(1 << 16)
        full.process.terminate()
        reply = head + read_to_end(client)
    assert full.process.wait(10) == 0
    full.start()
    assert reply.endswith(b"\r\n0\r\n\r\n") and reply.count(b"received_at") >= 2000


def test_a_reload_refuses_no_connection_and_loses_no_delivery(make_server):
    server = make_server(**SIGNED)
    with Senders(server) as senders:
        for _ in range(2):
            old = set(workers(server))
            server.process.send_signal(signal.SIGHUP)
            wait_for(lambda old=old: len(workers(server)) == 2 and not old & set(workers(server)))
    print(f"{len(senders.answers)} deliveries, slowest {senders.slowest():.2f} s")
    assert senders.statuses() <= {
        201,
        202,
    }  # spooled by a worker that is told to end while another writes
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


def token_is_set(server):
    return server.get("/config", Authorization="Bearer x").get("api_token_set")


def reload(server):
    """Reload a server and wait until it has its new workers."""
    old = set(workers(server))
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: len(workers(server)) == 2 and not old & set(workers(server)))


def test_a_reload_with_a_bad_setting_goes_on_as_before(make_server):
    server = make_server()
    settings = server.folder / ".env"
    for setting in ("RETENTION_DAYS=soon", "SENTRY_DSN=http://no"):
        settings.write_text(setting)
        reload(server)
        name, _ = setting.split("=")
        logged = [line for line in server.log.read_text().splitlines() if name in line]
        assert len(logged) == 1 and "going on as before" in logged[0], logged
    assert server.deliver(numbered(1))[0] == 201
    os.kill(
        workers(server)[0], signal.SIGKILL
    )  # a worker that takes the place of another reads no settings anew
    wait_for(lambda: len(workers(server)) == 2)
    assert server.deliver(numbered(2))[0] == 201 and not token_is_set(server)
    settings.write_text("API_TOKEN=x\n")
    reload(server)
    assert token_is_set(server) and server.process.poll() is None


def test_a_reload_to_a_port_that_is_taken_goes_on_as_before(tmp_path, shared):
    server, settings = Server(tmp_path), tmp_path / ".env"
    del server.env["PORT"]
    settings.write_text(f"PORT={server.port}")
    try:
        server.start()
        settings.write_text(f"PORT={shared.port}")
        reload(server)
        assert "going on as before: OSError" in server.log.read_text()
        assert server.deliver(numbered(1))[0] == 201
    finally:
        server.stop()


def test_a_reload_of_broken_code_goes_on_as_before(make_server, tmp_path):
    for name in ("collector.py", "gunicorn.conf.py", "schema.sql", "templates"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    server = make_server("--config", str(tmp_path / "gunicorn.conf.py"), PYTHONPATH=str(tmp_path))
    (tmp_path / "schema.sql").rename(tmp_path / "schema")
    style = tmp_path / "templates" / "style.css"
    style.rename(tmp_path / "style.css")
    reload(server)
    (tmp_path / "style.css").rename(style)
    with (tmp_path / "collector.py").open("a") as code:
        code.write("this is no code\n")
    reload(server)
    assert server.deliver(numbered(1))[0] == 201
    log = server.log.read_text()
    assert "as before: FileNotFoundError" in log and "as before: SyntaxError" in log


def test_a_rolling_restart_refuses_no_connection_and_loses_no_delivery(make_server):
    # gunicorn starts itself again by its path, beside which a folder is called http.
    server = make_server(**SIGNED, PYTHONSAFEPATH="1")
    with Senders(server) as senders:
        server.process.send_signal(signal.SIGUSR2)
        new = wait_for(lambda: [pid for pid in workers(server) if len(children(pid)) == 2])[0]
        server.process.terminate()
        assert server.process.wait(10) == 0
        sent = len(senders.answers)
        wait_for(lambda: len(senders.answers) > sent + 20)
    print(f"{len(senders.answers)} deliveries, slowest {senders.slowest():.2f} s")
    assert len(children(new)) == 2 and senders.statuses() <= {201, 202}
    wait_for_empty_spool(server)
    assert_all_there(server, senders)


def test_readers_that_wait_for_each_other_keep_no_webhook_waiting(make_server):
    server = make_server()
    wait_for_workers(server)
    server.deliver(BIG)
    slow = connect(server, b"GET /errors/1/payload HTTP/1.1\r\nHost: x\r\n\r\n", receive=4096)
    assert slow.recv(1) == b"H"
    before = workers(server)
    for pid in before:
        hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (200, hard))
    reads = [connect(server, b"GET /errors HTTP/1.1\r\nHost: x\r\n\r\n") for _ in range(500)]
    seconds, (status, _) = timed(server.deliver, numbered(1))
    slow.close()
    assert {read_to_end(read).split(b" ")[1] for read in reads} <= {b"200", b"503"}
    assert status == 201 and seconds < 1, seconds
    assert workers(server) == before


@pytest.mark.parametrize(
    "data",
    [
        b"no HTTP\r\n\r\n",
        b"POST no HTTP\r\n\r\n",
        POST + b"Transfer-Encoding: chunked\r\n\r\n",
        POST + b"Content-Length: 999999999\r\n\r\n",
    ],
)
def test_clients_that_do_not_close_after_a_refusal_keep_no_webhook_waiting(shared, data):
    for _ in range(8):
        connect(shared, data)
    seconds, (status, _) = timed(shared.deliver, numbered(1))
    assert status in (200, 201) and seconds < 1, seconds


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


def test_clients_that_reset_their_connections_do_no_harm(shared):
    before, since, chance = workers(shared), shared.log.stat().st_size, random.Random(SEED)
    export = b"GET /errors?format=ndjson HTTP/1.1\r\n" + HOST
    starts = [b"GET / HT", b"no HTTP\r\n\r\n", head_of(b"{}" * 50) + b"{}", export]
    for number in range(300):
        connection = connect(shared, chance.choice(starts))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if number % 2:
            time.sleep(0.001)
        connection.close()
    seconds, (status, _) = timed(shared.deliver, numbered(1))
    assert status in (200, 201) and seconds < 1, seconds
    assert workers(shared) == before
    log = added_log(shared, since)
    assert "ERROR" not in log and "Traceback" not in log, log


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
    assert len(reply) < 10_000 or name == "whole URL"


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
    """Return a server that holds 2,000 errors of 20 kB."""
    server = Server(tmp_path_factory.mktemp("full"))
    database = (
        create_app({"DATABASE_URL": server.env["DATABASE_URL"]}).extensions["collector"].database
    )
    text = random.Random(1).randbytes(10_000).hex()
    with database.turn() as connection:
        for number in range(2000):
            payload = event_payload(f"f{number:031x}", title=f"Full {number}", extra=text)
            insert_error(
                connection,
                parse_error(payload, "error", "2025-01-02T03:04:05.000000Z") | pack(wire(payload)),
            )
    database.close()
    yield server.start()
    server.stop()


def back_up(server, target):
    """Back the database up as the README says; return what was said."""
    command = [sys.executable, "-m", "flask", "--app", "collector", "backup", str(target)]
    done = subprocess.run(
        command, cwd=ROOT, env=server.env, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stderr


def test_no_webhook_waits_for_an_export_a_search_a_backup_or_a_shell(full, tmp_path):
    over, exports = threading.Event(), []

    def repeat(action):
        while not over.is_set():
            action()

    with contextlib.closing(sqlite3.connect(database_of(full), isolation_level=None)) as shell:
        shell.execute("BEGIN")
        assert shell.execute("SELECT count(*) FROM errors").fetchone()[0] >= 2000
        with ThreadPoolExecutor() as pool, Senders(full, count=2, pause=0.005) as senders:
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
                back_up(full, tmp_path / "copy.db")
                wait_for(lambda: len(senders.answers) > 300, 20)
                wait_for(lambda: 200 in {status for status, *_ in exports}, 20)
            finally:
                over.set()
            for read in reads:
                read.result()
    print(
        f"slowest of {len(senders.answers)} webhooks beside slow neighbours: {senders.slowest():.3f} s"
    )
    assert senders.statuses() == {201} and senders.slowest() < 1
    assert max(lines.count(b"\n") for _, _, lines in exports) >= 2000
    with contextlib.closing(sqlite3.connect(tmp_path / "copy.db")) as copy:
        assert copy.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
        assert copy.execute("SELECT count(*) FROM errors").fetchone()[0] >= 2000


def test_no_webhook_waits_for_what_a_long_read_has_left_to_do(make_server):
    server = make_server()
    source, wal = random.Random(1), Path(f"{database_of(server)}-wal")
    with contextlib.closing(sqlite3.connect(database_of(server), isolation_level=None)) as shell:
        shell.execute("BEGIN")
        shell.execute("SELECT count(*) FROM errors").fetchone()
        for number in range(150):
            assert server.deliver(numbered(number, extra=source.randbytes(300_000).hex()))[0] == 201
    grown = wal.stat().st_size
    assert grown > LONG_WAL_BYTES
    with Senders(server, count=2) as senders:
        wait_for(
            lambda: wal.stat().st_size < grown, 20
        )  # all of it is in the database, and it begins anew
    print(
        f"slowest of {len(senders.answers)} webhooks after a long read: {senders.slowest():.3f} s"
    )
    assert senders.statuses() <= {201, 202} and senders.slowest() < 1
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


@pytest.mark.parametrize("arguments", [[], ["--preload"]], ids=["plain", "preload"])
def test_eight_processes_start_at_once_on_an_empty_folder(tmp_path, arguments):
    for number in range(ROUNDS):
        folder = tmp_path / str(number)
        url = f"sqlite:///{folder}/data/errors.db"
        servers = [
            Server(folder / f"{each}", DATABASE_URL=url, WEB_CONCURRENCY="1") for each in range(8)
        ]
        try:
            for server in servers:
                server.start(*arguments, wait=False)
            for server in servers:
                wait_for(server.is_up, 20)
            statuses = [server.deliver(numbered(1))[0] for server in servers]
            assert statuses == [201] + [200] * 7
        finally:
            for server in servers:
                server.process.terminate()
            for server in servers:
                server.stop()
        lines = [line for server in servers for line in server.log.read_text().splitlines()]
        # Another program may take a port for a moment; gunicorn tries again.
        assert [line for line in lines if "ERROR" in line and "in use" not in line] == []
        assert "Traceback (most recent call last):" not in lines


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("DATABASE_URL", "postgresql://user:secret@host/db", "'postgresql'"),
        ("DATABASE_URL", "sqlite:////dev/null/errors.db", "Not a directory"),
        ("DATABASE_URL", "sqlite:////proc/errors.db", "cannot write"),
        ("SENTRY_DSN", "secret", "no DSN"),
        ("SENTRY_ACTIONS", "created;triggered", "commas"),
        ("RETENTION_DAYS", "soon", "'soon'"),
        ("MAX_BODY_BYTES", "-1", "'-1'"),
        ("WEB_CONCURRENCY", "0", "'0'"),
        ("PORT", "99999", "'99999'"),
    ],
)
def test_a_bad_setting_stops_the_start_with_one_line(make_server, name, value, fault):
    server = make_server(wait=False, **{name: value})
    assert server.process.wait(20) != 0
    lines = [line for line in server.log.read_text().splitlines() if not line.startswith("[")]
    assert len(lines) == 1 and lines[0].startswith(f"{name}: ") and fault in lines[0], (
        server.log.read_text()
    )
    assert "secret" not in server.log.read_text()
