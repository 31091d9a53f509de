"""The worker, serving a bare app: no client can hold it, and gunicorn's options work as its manual says."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, start_gunicorn, wait_for

HOST = b"Host: x\r\n"
POST = b"POST /hook HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = (
    3  # seconds; more than any webhook waits even on a busy machine, less than a held worker costs
)


def post_of(body, length=None):
    """Return the bytes of a POST, whose length may be given wrong."""
    return POST + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


def children(pid):
    """Return the processes that a process has started."""
    return sorted(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


class BareServer:
    """A gunicorn that serves the bare app with the worker."""

    def __init__(self, folder, *arguments, bind=None, **env):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = probe.getsockname()
        self.log = Path(folder) / "log"
        self.log.parent.mkdir(exist_ok=True)
        self.opened = []
        binds = [f"127.0.0.1:{self.address[1]}", *(bind or [])]
        options = ["--config", str(ROOT / "tests/bare_app.py")]
        options += [part for each in binds for part in ("--bind", each)]
        paths = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "tests")])
        env = {"WEB_CONCURRENCY": "4", "PYTHONPATH": paths, **env}
        self.process = start_gunicorn(folder, self.log, os.environ | env, *options, *arguments)
        wait_for(self.is_up, 20)
        count = int(env["WEB_CONCURRENCY"])
        wait_for(lambda: len(self.workers()) == count, 20)

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.ask(get("/health"))

    def workers(self):
        return children(self.process.pid)

    def connect(self, data=b"", address=None, receive=None):
        """Return a connection that has sent `data`; `receive` is the size of its receive buffer."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if address and ":" in address[0]:
            family = socket.AF_INET6
        connection = socket.socket(family)
        self.opened.append(connection)
        if receive:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        connection.settimeout(20)
        connection.connect(address or self.address)
        connection.sendall(data)
        return connection

    def ask(self, data, address=None):
        """Return the reply to one request, parsed; fail if its status is not 200."""
        with self.connect(data, address) as connection:
            return reply_of(connection)

    def let_go(self):
        """Close the connections that a test has opened."""
        while self.opened:
            self.opened.pop().close()

    def stop(self):
        self.let_go()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def read(connection):
    """Return what comes until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def reply_of(connection):
    """Return the JSON of a connection's reply; fail if its status is not 200."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    assert response.status == 200
    return json.loads(response.read())


def slowest_post(server, count=12):
    """Return the seconds of the slowest POST, half of which send their body after the head."""

    def post(number):
        connection = server.connect(post_of(b"", length=5))
        time.sleep(0.02 * (number % 2))
        started = time.monotonic()
        connection.sendall(b"12345")
        assert reply_of(connection)["length"] == 5
        return time.monotonic() - started

    with ThreadPoolExecutor(4) as pool:
        return max(pool.map(post, range(count)))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    server = BareServer(tmp_path_factory.mktemp("shared"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def let_go(request):
    """Close what a test has opened at the shared server."""
    yield
    if "shared" in request.fixturenames:
        request.getfixturevalue("shared").let_go()


@pytest.fixture
def make_server(tmp_path):
    servers = []

    def make(*arguments, **options):
        servers.append(BareServer(tmp_path, *arguments, **options))
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def assert_unharmed(server, workers, since=0):
    """Assert that no worker has died and that the log has no fault."""
    log = server.log.read_bytes()[since:].decode()
    assert server.workers() == workers
    assert not re.search("Traceback|ERROR|CRITICAL", log), log


# Clients that would hold a worker


def half_sent(server):
    server.connect(post_of(b"{", length=100))


def half_a_head(server):
    server.connect(POST + b"Content-Le")


def silent(server):
    server.connect()


def tls(server):
    server.connect(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500))


def looks_finished(server):
    server.connect(CHUNKED + b"64\r\n\r\n0\r\n\r\n")


def expects_continue(server):
    server.connect(POST + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n")


def stays(server):
    server.connect(post_of(b"{}"))
    server.connect(b"no HTTP\r\n\r\n")


def claims_too_much(server):
    server.connect(post_of(b"{}", length=10**15))


def without_length(server):
    server.connect(POST + b"\r\n")


def reads_nothing(server):
    server.connect(get("/export?mb=8"), receive=4096)


def resets(server):
    for data in (b"GET / HT", post_of(b"{", length=9), post_of(b"{}"), get("/export?mb=1")):
        connection = server.connect(data)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()


def drips(server, start=POST + b"Content-Length: 999\r\n\r\n", piece=b"x"):
    connection = server.connect(start)

    def drip():
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(piece)
                time.sleep(0.02)

    threading.Thread(target=drip, daemon=True).start()


def drips_chunks(server):
    drips(server, CHUNKED, b"5\r\n0\r\n\r\n\r\n")


def drips_a_head(server):
    drips(server, POST, b"X: y\r\n")


HOSTILE = [half_sent, half_a_head, silent, tls, looks_finished, expects_continue, stays]
HOSTILE += [
    claims_too_much,
    without_length,
    reads_nothing,
    resets,
    drips,
    drips_chunks,
    drips_a_head,
]


@pytest.mark.parametrize("neighbour", HOSTILE, ids=lambda neighbour: neighbour.__name__)
def test_no_post_waits_for_a_client(shared, neighbour):
    workers = shared.workers()
    since = shared.log.stat().st_size
    for _ in range(8):
        neighbour(shared)
    assert slowest_post(shared) < SLOW
    shared.let_go()
    assert_unharmed(shared, workers, since)


def test_no_post_waits_for_all_of_them_at_once(shared):
    workers = shared.workers()
    since = shared.log.stat().st_size
    for neighbour in HOSTILE * 3:
        neighbour(shared)
    assert slowest_post(shared, 24) < SLOW
    shared.let_go()
    assert_unharmed(shared, workers, since)


def test_clients_that_send_or_take_nothing_are_dropped_after_some_seconds(make_server):
    server = make_server(WEB_CONCURRENCY="2", REQUEST_SECONDS="0.5", PART_SECONDS="0.5")
    workers = server.workers()
    sip = server.connect(get("/export?mb=20"), receive=4096)
    assert sip.recv(1)
    started = time.monotonic()
    half = server.connect(post_of(b"{", length=100))
    assert read(half) == b""
    assert time.monotonic() - started > 0.5
    server.ask(get("/page"))  # which has to wait for the end of the other reader
    assert len(read(sip)) < 20 << 20
    assert_unharmed(server, workers)


def test_of_too_many_requests_the_oldest_is_dropped_and_of_too_large_ones_the_largest(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    first = server.connect(post_of(b"{", length=100))
    time.sleep(0.1)
    others = [server.connect(post_of(b"{", length=100)) for _ in range(405)]
    assert read(first) == b""
    assert server.ask(post_of(b"{}"))["length"] == 2
    others[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        others[-1].recv(1)
    server.let_go()
    sizes = [4_000_000, 7_900_000, 7_500_000, 7_500_000, 7_500_000]
    large = [server.connect(post_of(bytes(size), length=size + 9)) for size in sizes]
    assert read(large[1]) == b""
    large[0].sendall(bytes(9))
    assert reply_of(large[0])["length"] == sizes[0] + 9


# Requests of every kind


@pytest.mark.parametrize("size", [0, 1, 20_000, 20_000_000])
def test_bodies_of_every_size_arrive_whole_in_whatever_pieces(shared, size):
    body = bytes(size)
    assert shared.ask(post_of(body))["length"] == size
    connection = shared.connect(post_of(body)[:60])
    time.sleep(0.05)
    connection.sendall(post_of(body)[60 : size // 2 + 60])
    time.sleep(0.05)
    connection.sendall(post_of(body)[size // 2 + 60 :])
    assert reply_of(connection)["length"] == size


@pytest.mark.parametrize("end", [b"0\r\n\r\n", b"000;a=b\r\n\r\n", b"0\r\nX: y\r\nZ: y\r\n\r\n"])
def test_a_chunked_post_is_taken_like_any_other(shared, end):
    chunk = b"8;name=value\r\n\r\n0\r\n\r\n!\r\n"
    assert shared.ask(CHUNKED + chunk * 3 + end)["length"] == 24
    connection = shared.connect(CHUNKED)
    for part in (
        chunk,
        chunk[:9],
        chunk[9:],
        b"F4240\r\n" + bytes(1_000_000),
        b"\r\n" + end[:1],
        end[1:],
    ):
        time.sleep(0.01)
        connection.sendall(part)
    assert reply_of(connection)["length"] == 1_000_016


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (CHUNKED + b"5\r\nno", None),
        (CHUNKED + b"1\r\nx\r\n" * 50_000, None),
        (CHUNKED + b"1\r\nx\r\n" + b"0;" + b"x" * 20_000, 400),
        (POST + b"X: " + b"y" * 100_000 + b"\r\n\r\n", None),
        (b"GET / HTTP/1.1\nHost: x\n\n", None),
        (b"", None),
    ],
)
def test_a_request_that_cannot_become_whole_ends_at_once(shared, data, status):
    workers = shared.workers()
    with shared.connect() as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        reply = read(connection)
        assert status is None or reply.startswith(b"HTTP/1.1 %d" % status)
    assert shared.workers() == workers


def test_a_body_follows_where_the_client_waits_to_be_told(shared):
    connection = shared.connect(POST + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b"12345")
    assert reply_of(connection)["length"] == 5


def test_a_second_request_on_a_connection_does_not_harm_the_first(shared):
    reply = read(shared.connect(post_of(b"{}") * 2 + bytes(100_000)))
    assert reply.count(b"HTTP/1.1 200") == 1 and b'"length": 2' in reply


def test_a_request_is_served_though_its_client_has_gone(make_server):
    server = make_server(WEB_CONCURRENCY="1")
    connection = server.connect(b"POST /gone HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    wait_for(lambda: "/gone" in server.ask(post_of(b"{}"))["served"])


@pytest.mark.parametrize(
    "data", [b"x" * 800_000 + b"\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"\x80" * 9000 + b"\r\n\r\n"]
)
def test_no_client_writes_much_into_the_log(shared, data):
    since = shared.log.stat().st_size
    with contextlib.suppress(OSError):
        read(shared.connect(data))
    shared.ask(post_of(b"{}"))
    assert shared.log.stat().st_size - since < 1000


# Readers


def begin(server, request):
    """Return the connection of a request that a worker serves from now on until there is a file "over"."""
    others = len(list(server.log.parent.glob("over-begun-*")))
    connection = server.connect(request)
    wait_for(lambda: len(list(server.log.parent.glob("over-begun-*"))) > others)
    return connection


def test_readers_leave_a_worker_to_posts_and_one_who_waits_in_vain_is_told(make_server, tmp_path):
    server = make_server("--timeout", "60", REQUEST_SECONDS="0.5")
    readers = [begin(server, get("/page?until=over")) for _ in range(3)]
    late = server.connect(get("/page"))
    assert slowest_post(server, 4) < SLOW
    server.ask(get("/health"))
    response = http.client.HTTPResponse(late)
    response.begin()
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert "WEB_CONCURRENCY" in json.loads(response.read())["error"]
    (tmp_path / "over").touch()
    assert len({reply_of(reader)["pid"] for reader in readers}) == 3
    server.ask(get("/page"))


def test_the_slot_of_a_worker_that_is_killed_is_free(make_server):
    server = make_server("--timeout", "60", WEB_CONCURRENCY="2")
    before = server.workers()
    begin(server, get("/page?until=over"))
    for pid in before:
        os.kill(int(pid), signal.SIGKILL)
    wait_for(lambda: len(set(server.workers()) - set(before)) == 2)
    server.ask(get("/page"))


def test_a_reader_leaves_the_turn_to_a_post_that_has_begun(make_server):
    server = make_server(WEB_CONCURRENCY="1", YOUNG_SECONDS="0.8")
    post = server.connect(POST + b"Content-Length: 2\r\n\r\n{")
    time.sleep(0.05)
    page = server.connect(get("/page"))
    time.sleep(0.05)
    post.sendall(b"}")
    assert "/page" not in reply_of(post)["served"]
    assert reply_of(page)["served"][-2:] == ["/hook", "/page"]
    half_sent(server)
    server.ask(get("/page"))  # does not wait for ever


def test_an_export_may_last_longer_than_the_timeout(make_server):
    server = make_server("--timeout", "1", WEB_CONCURRENCY="1")
    workers = server.workers()
    sip = server.connect(get("/export?mb=6"), receive=65536)
    received = 0
    until = time.monotonic() + 2.2  # gunicorn looks once a second
    while part := sip.recv(1 << 14):
        received += len(part)
        time.sleep(0.03 if time.monotonic() < until else 0)
    assert time.monotonic() > until and received > 6 << 20
    assert_unharmed(server, workers)


# Between requests


def test_maintenance_is_done_while_nobody_waits_and_again_and_again(make_server):
    server = make_server("--timeout", "60", WEB_CONCURRENCY="1", IDLE_SECONDS="0.2")
    wait_for(lambda: server.ask(post_of(b"{}"))["maintained"] >= 1000)
    before = server.ask(post_of(b"{}"))["maintained"]
    time.sleep(0.6)
    assert before + 3 <= server.ask(post_of(b"{}"))["maintained"] < before + 20


# The end


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_what_is_here_is_served_before_the_end(make_server, tmp_path, sign):
    server = make_server("--timeout", "60", WEB_CONCURRENCY="1", STOPPING_SECONDS="0.2")
    half_sent(server)
    in_hand = begin(server, post_of(b"{}").replace(b"/hook", b"/hook?until=over"))
    backlog = [server.connect(post_of(b"{}")) for _ in range(20)]
    os.killpg(server.process.pid, sign)
    (tmp_path / "over").touch()
    started = time.monotonic()
    assert [reply_of(each)["length"] for each in [in_hand, *backlog]] == [2] * 21
    assert server.process.wait(10) == 0
    assert time.monotonic() - started < SLOW
    assert not re.search("Traceback|ERROR|CRITICAL", server.log.read_text())


def test_max_requests_access_log_and_a_second_master_work(make_server, tmp_path):
    server = make_server("--max-requests", "3", "--access-logfile", "-", WEB_CONCURRENCY="2")
    first = server.workers()
    wait_for(lambda: str(server.ask(post_of(b"{}"))["pid"]) not in first)
    assert '"POST /hook HTTP/1.1" 200' in server.log.read_text()
    os.kill(server.process.pid, signal.SIGUSR2)
    wait_for(lambda: server.log.read_text().count("Booting worker") > 4)
    wait_for(lambda: len(server.workers()) == 3)  # one of them is the new master
    new = wait_for(lambda: [pid for pid in server.workers() if children(pid)])[0]
    server.process.terminate()
    server.process.wait(10)
    assert all(server.ask(post_of(b"{}"))["length"] == 2 for _ in range(5))
    os.kill(int(new), signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


# Sockets


def test_it_serves_unix_sockets_and_ipv6(make_server, tmp_path):
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        six = probe.getsockname()
    server = make_server(bind=[f"unix:{tmp_path}/sock", f"[::1]:{six[1]}"])
    workers = server.workers()
    for address in (None, f"{tmp_path}/sock", six):
        assert server.ask(get("/page"), address)["length"] == 0
        assert server.ask(CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", address)["length"] == 2
        body = bytes(3_000_000)
        assert server.ask(post_of(body), address)["length"] == len(body)
        connection = server.connect(post_of(body)[:-10], address)
        time.sleep(0.03)
        connection.sendall(body[:10])
        assert reply_of(connection)["length"] == len(body)
    for address in (None, f"{tmp_path}/sock", six):
        for _ in range(5):
            server.connect(post_of(b"{", length=100), address)
            server.connect(b"GET / HT", address).close()
    assert slowest_post(server) < SLOW
    assert_unharmed(server, workers)
