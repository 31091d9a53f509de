"""The worker, serving a bare app: no client can hold it, and gunicorn's options work as its manual says."""

import contextlib
import http.client
import json
import os
import re
import select
import signal
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import ROOT, Server, wait_for

HEAD = b"POST /hook HTTP/1.1\r\nHost: x\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SLOW = 3  # seconds; more than any POST waits on a busy machine, less than a held worker costs


def post_of(body, length=None):
    """Return the bytes of a POST, whose length may be given wrong."""
    return HEAD + b"Content-Length: %d\r\n\r\n" % (length or len(body)) + body


def get(path, method="GET"):
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


class BareServer(Server):
    """A gunicorn that serves the bare app with the worker."""

    def __init__(self, folder, *arguments, **env):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        super().__init__(folder, PYTHONPATH=paths, **{"WEB_CONCURRENCY": "4", **env})
        self.opened = []
        bind = f"--bind=127.0.0.1:{self.port}"
        self.start(bind, *arguments, config=ROOT / "tests" / "bare_app.py")
        wait_for(lambda: len(self.workers()) == int(self.env["WEB_CONCURRENCY"]))

    def connect(self, data=b"", address=None, receive=None):
        """Return a connection that has sent `data`; `receive` is the size of its receive buffer."""
        address = address or ("127.0.0.1", self.port)
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        if ":" in address[0]:
            family = socket.AF_INET6
        connection = socket.socket(family)
        self.opened.append(connection)
        if receive:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        connection.settimeout(20)
        connection.connect(address)
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

    def kill(self):
        self.let_go()
        super().kill()


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
def one(tmp_path_factory):
    """Return a server that many tests use."""
    server = BareServer(tmp_path_factory.mktemp("one"), REQUEST_SECONDS="60")
    yield server
    server.end()


@pytest.fixture
def shared(one):
    """Return that server, and fail if a test ends one of its workers or leaves a fault in its log."""
    workers = one.workers()
    since = one.log.stat().st_size
    yield one
    one.let_go()
    one.ask(post_of(b"{}"))
    assert_unharmed(one, workers, since)


@pytest.fixture
def make_server(tmp_path):
    """Return a function that starts a server of a test's own."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, **env):
            server = BareServer(tmp_path, *arguments, **env)
            stack.callback(server.end)
            return server

        yield make


def assert_unharmed(server, workers, since=0):
    """Assert that no worker has died, and that the log has neither a fault nor much else."""
    log = server.log.read_bytes()[since:].decode()
    assert server.workers() == workers
    assert not re.search("Traceback|ERROR|CRITICAL", log), log
    assert not since or len(log) < 2000, log


# Clients that would hold a worker

HOSTILE = {
    "half a body": post_of(b"{", length=100),
    "half a head": HEAD + b"Content-Le",
    "silent": b"",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "looks finished": CHUNKED + b"64\r\n\r\n0\r\n\r\n",
    "expects to be told": HEAD + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n",
    "stays": post_of(b"{}"),
    "broken and stays": b"no HTTP\r\n\r\n",
    "claims too much": post_of(b"{}", length=10**15),
    "without a length": HEAD + b"\r\n",
    "tiny chunks": CHUNKED + b"1\r\nx\r\n" * 60_000,
    "long extensions": CHUNKED + (b"1;" + b"x" * 8000 + b"\r\nx\r\n") * 100,
}
DRIPPING = {
    "a body": (HEAD + b"Content-Length: 999\r\n\r\n", b"x"),
    "a head": (HEAD, b"X: y\r\n"),
    "chunks": (CHUNKED, b"5\r\n0\r\n\r\n\r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
}


def drip(server, start, piece):
    connection = server.connect(start)

    def send():
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(piece)
                time.sleep(0.02)

    threading.Thread(target=send, daemon=True).start()


def reset(connection):
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_no_post_waits_for_whoever_sends_slowly_or_wrongly_drips_resets_or_reads(shared):
    for _ in range(5):  # more of each than there are workers
        for data in HOSTILE.values():
            with contextlib.suppress(ConnectionError):  # some are dropped at once
                shared.connect(data)
        for start, piece in DRIPPING.values():
            drip(shared, start, piece)
        for data in (b"GET / HT", post_of(b"{", length=9), post_of(b"{}"), get("/export?mb=1")):
            reset(shared.connect(data))
        shared.connect(get("/export?mb=8"), receive=4096)  # which takes nothing
    assert slowest_post(shared, 24) < SLOW


def test_who_sends_or_takes_nothing_is_dropped_but_not_who_takes_slowly_for_long(make_server):
    env = {"WEB_CONCURRENCY": "3", "REQUEST_SECONDS": "0.5", "PART_SECONDS": "1"}
    server = make_server("--timeout", "1", **env)
    workers = server.workers()

    slow = server.connect(get("/export?mb=6"), receive=65536)
    sip = server.connect(get("/export?mb=20"), receive=4096)
    assert slow.recv(1) and sip.recv(1)  # no other reader is served as long as these are

    def take_slowly():
        received = 0
        until = time.monotonic() + 2.2  # gunicorn looks once a second
        while part := slow.recv(1 << 14):
            received += len(part)
            time.sleep(0.03 if time.monotonic() < until else 0)
        return time.monotonic() > until and received > 6 << 20

    with ThreadPoolExecutor() as pool:
        whole = pool.submit(take_slowly)
        started = time.monotonic()
        half = server.connect(post_of(b"{", length=100))
        assert read(half) == b""
        assert time.monotonic() - started > 0.5
        server.ask(get("/page"))  # which has to wait for the end of one of them
        assert len(read(sip)) < 20 << 20
        assert whole.result()
    assert "dropped a client: a request did not come whole" in server.log.read_text()
    assert_unharmed(server, workers)


def test_of_too_many_requests_the_oldest_is_dropped_and_of_too_large_ones_the_largest(make_server):
    server = make_server(WEB_CONCURRENCY="1", REQUEST_SECONDS="60")
    first = server.connect(post_of(b"{", length=100))
    assert server.ask(post_of(b"{}"))["length"] == 2  # by then the other is accepted
    others = [server.connect(post_of(b"{", length=100)) for _ in range(430)]
    assert read(first) == b""
    assert server.ask(post_of(b"{}"))["length"] == 2
    assert server.log.read_text().count("too many") < 20
    others[-1].setblocking(False)
    with pytest.raises(BlockingIOError):
        others[-1].recv(1)
    server.let_go()
    sizes = [4_000_000, 7_900_000, 7_800_000, 7_800_000, 7_800_000]
    large = [server.connect(post_of(bytes(size), length=size + 9)) for size in sizes]
    assert read(large[1]) == b""
    large[0].sendall(bytes(9))
    assert reply_of(large[0])["length"] == sizes[0] + 9


def test_a_worker_that_may_open_few_files_goes_on(make_server):
    server = make_server(WEB_CONCURRENCY="1", FILES="60")
    workers = server.workers()
    for _ in range(100):
        server.connect(post_of(b"{", length=100))
    assert slowest_post(server) < SLOW
    assert_unharmed(server, workers)


# Requests of every kind


def test_bodies_of_every_size_arrive_whole(shared):
    for size in (0, 1, 20_000, 5_000_000):
        assert shared.ask(post_of(bytes(size)))["length"] == size
    largest = shared.connect(post_of(bytes(32 << 20))[:-1])
    time.sleep(0.1)  # meanwhile it is held unfinished
    largest.sendall(b"!")
    assert reply_of(largest)["length"] == 32 << 20


CHUNK = b"14;name=value\r\n{\r\n0\r\n\r\n!\r\n,\r\n0\r\n\r\n}\r\n"  # with ends of chunks in it
ENDS = [b"0\r\n\r\n", b"000 ;a=b\r\n\r\n", b"0\r\nX: y\r\nZ: y\r\n\r\n", b"0\r\n\r\nGET / HTTP"]


@pytest.mark.parametrize("end", ENDS)
def test_a_chunked_post_is_taken_like_any_other(shared, end):
    assert shared.ask(CHUNKED + CHUNK * 3 + end)["length"] == 60
    large = b"F4240\r\n" + bytes(1_000_000) + b"\r\n"
    assert shared.ask(CHUNKED + large + CHUNK + end)["length"] == 1_000_020
    assert shared.ask(CHUNKED + b"1\r\nx\r\n" * 40_000 + end)["length"] == 40_000


@pytest.mark.parametrize(
    ("request_", "length"),
    [(post_of(b"{\r\n\r\n}"), 6), (CHUNKED + CHUNK * 2 + b"0\r\nX: y\r\n\r\n", 40)],
)
def test_a_request_may_be_split_at_any_byte(shared, request_, length):
    parts = [(request_[:place], request_[place:]) for place in range(1, len(request_))]
    begun = [(shared.connect(start), rest) for start, rest in parts]
    shared.ask(post_of(b"{}"))  # meanwhile the beginnings are read
    for connection, rest in begun:
        connection.sendall(rest)
    assert [reply_of(connection)["length"] for connection, _ in begun] == [length] * len(parts)


@pytest.mark.parametrize(
    "data",
    [
        CHUNKED + b"5\r\nno",
        HOSTILE["tiny chunks"] + b"0\r\n\r\n",
        HOSTILE["long extensions"] + b"0\r\n\r\n",
        HEAD + b"X: " + b"y" * 100_000 + b"\r\n\r\n",
        b"x" * 800_000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"\x80" * 9000 + b"\r\n\r\n",
        b"GET / HTTP/1.1\nHost: x\n\n",
        b"",
    ],
)
def test_a_request_that_cannot_become_whole_ends_with_its_client(shared, data):
    connection = shared.connect()
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
    assert b" 200 OK" not in read(connection)


def test_a_body_may_wait_for_leave_and_a_second_request_does_no_harm(shared):
    connection = shared.connect(HEAD + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n")
    assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(b"12345")
    assert reply_of(connection)["length"] == 5
    reply = read(shared.connect(post_of(b"{}") * 2 + bytes(100_000)))
    assert reply.count(b"HTTP/1.1 200") == 1 and b'"length": 2' in reply


# Readers


def begin(server, request):
    """Return the connection of a request that a worker serves from now on until there is a file "over"."""
    others = len(list(server.log.parent.glob("over-begun-*")))
    connection = server.connect(request)
    wait_for(lambda: len(list(server.log.parent.glob("over-begun-*"))) > others)
    return connection


def assert_turned_away(connection):
    """Assert that a reader is told to come again."""
    response = http.client.HTTPResponse(connection)
    response.begin()
    assert (response.status, response.headers["Retry-After"]) == (503, "1")
    assert "WEB_CONCURRENCY" in json.loads(response.read())["error"]


def test_readers_leave_a_worker_to_posts_and_one_who_waits_in_vain_is_told(make_server, tmp_path):
    server = make_server("--timeout", "60", READER_SECONDS="0.5")
    readers = [begin(server, get("/page?until=over")) for _ in range(3)]
    late = server.connect(get("/page"))
    assert slowest_post(server, 4) < SLOW
    server.ask(get("/health"))
    assert read(server.connect(get("/health", "HEAD"))).startswith(b"HTTP/1.1 200")
    assert_turned_away(late)
    wait_for(lambda: "a reader waited too long" in server.log.read_text())
    (tmp_path / "over").touch()
    assert len({reply_of(reader)["pid"] for reader in readers}) == 3
    server.ask(get("/page"))


def test_the_slot_of_a_worker_that_is_killed_is_free(make_server):
    server = make_server("--timeout", "60", WEB_CONCURRENCY="2")
    before = server.workers()
    begin(server, get("/page?until=over"))
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: len(set(server.workers()) - set(before)) == 2)
    server.ask(get("/page"))


def test_no_reader_is_taken_up_while_a_post_may_come_whole_however_long_it_waits(make_server):
    server = make_server(WEB_CONCURRENCY="1", READER_SECONDS="1", YOUNG_SECONDS="0.8")
    post = server.connect(post_of(b"{", length=2))
    server.ask(get("/health"))  # by then the other is accepted
    page = server.connect(get("/page"))
    server.ask(get("/health"))
    post.sendall(b"}")
    assert "/page" not in reply_of(post)["served"]
    assert reply_of(page)["served"][-2:] == ["/hook", "/page"]
    server.connect(post_of(b"{", length=2))
    server.ask(get("/health"))
    reset(server.connect(get("/gone")))  # on whom no time is lost
    assert server.ask(get("/page"))["served"][-2:] == ["/health", "/page"]  # in the end
    server.connect(post_of(b"{", length=2))
    server.ask(get("/health"))
    late = server.connect(get("/late"))
    while not select.select([late], [], [], 0.05)[0]:
        server.connect(post_of(b"{", length=2))
    assert_turned_away(late)
    assert "/late" not in server.ask(get("/health"))["served"]
    reset(server.connect(post_of(b"{}").replace(b"/hook", b"/gone")))  # whose request counts
    wait_for(lambda: "/gone" in server.ask(post_of(b"{}"))["served"])


def test_what_has_come_while_a_reader_was_served_is_taken_up_however_late(make_server, tmp_path):
    server = make_server(
        "--timeout", "60", WEB_CONCURRENCY="1", YOUNG_SECONDS="0.1", REQUEST_SECONDS="0.5"
    )
    request = post_of(bytes(120_000))
    post = server.connect(request[:100])
    begin(server, get("/page?until=over"))
    post.sendall(request[100:])
    time.sleep(0.5)  # until its time is over
    (tmp_path / "over").touch()
    assert reply_of(post)["length"] == 120_000


# Between requests, and the end


def test_maintenance_is_done_while_nobody_waits_and_again_and_again(make_server):
    server = make_server("--timeout", "60", WEB_CONCURRENCY="1", IDLE_SECONDS="0.2")
    wait_for(lambda: server.ask(post_of(b"{}"))["maintained"] >= 1000)
    before = server.ask(post_of(b"{}"))["maintained"]
    time.sleep(0.6)
    assert before + 3 <= server.ask(post_of(b"{}"))["maintained"] < before + 20


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_what_is_here_is_served_before_the_end(make_server, tmp_path, sign):
    server = make_server("--timeout", "60", WEB_CONCURRENCY="1", YOUNG_SECONDS="0.1")
    if sign == signal.SIGTERM:
        server.connect(post_of(b"{", length=100))  # for which it does not wait for long
    in_hand = begin(server, post_of(b"{}").replace(b"/hook", b"/hook?until=over"))
    backlog = [server.connect(post_of(b"{}")) for _ in range(20)]
    page = server.connect(get("/page"))
    os.killpg(server.process.pid, sign)
    (tmp_path / "over").touch()
    started = time.monotonic()
    assert [reply_of(each)["length"] for each in [in_hand, *backlog]] == [2] * 21
    assert reply_of(page)["length"] == 0
    assert server.process.wait(10) == 0
    assert time.monotonic() - started < SLOW
    assert not re.search("Traceback|ERROR|CRITICAL", server.log.read_text())


def test_a_worker_that_has_served_its_most_requests_finishes_those_it_holds(make_server):
    server = make_server("--max-requests", "9", WEB_CONCURRENCY="1", STOPPING_SECONDS="20")
    held = server.connect(post_of(b"{", length=2))
    while "Autorestarting" not in server.log.read_text():
        server.ask(get("/health"))
    held.sendall(b"}")
    assert reply_of(held)["length"] == 2


# Sockets


def test_it_serves_unix_sockets_and_ipv6(make_server, tmp_path):
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        six = probe.getsockname()
    server = make_server(f"--bind=unix:{tmp_path}/sock", f"--bind=[::1]:{six[1]}")
    workers = server.workers()
    body = bytes(3_000_000)
    addresses = (None, f"{tmp_path}/sock", six)
    for address in addresses:
        assert server.ask(get("/page"), address)["length"] == 0
    for address in addresses:
        assert server.ask(CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", address)["length"] == 2
        assert server.ask(post_of(body), address)["length"] == len(body)
        connection = server.connect(post_of(body)[:-10], address)
        connection.sendall(body[:10])
        assert reply_of(connection)["length"] == len(body)
        for _ in range(5):
            server.connect(post_of(b"{", length=100), address)
            server.connect(b"GET / HT", address).close()
    assert slowest_post(server) < SLOW
    assert_unharmed(server, workers)
