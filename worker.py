"""A gunicorn sync worker that takes up a request once all of it is here.

gunicorn's own SyncWorker reads a request while it serves it, so a client that sends slowly holds
the worker. This one receives requests into memory without waiting, several at a time, and hands
each that is whole to gunicorn's own `handle`.
"""

import contextlib
import errno
import fcntl
import os
import re
import resource
import select
import socket
import tempfile
import time

from gunicorn.workers.sync import SyncWorker

REQUEST_SECONDS = 5  # time for a request to arrive whole
READER_SECONDS = 3  # time for a reader to be taken up after that
YOUNG_SECONDS = 1  # age up to which an unfinished request keeps its worker from readers
PART_SECONDS = 5  # time for a client to take a part of its reply
PART_BYTES = 64 * 1024  # bytes of such a part
STOPPING_SECONDS = 1  # time in which a stopping worker serves what is here
POLL_SECONDS = 0.02  # time between two attempts to serve a reader
IDLE_SECONDS = 0.5  # longest time between two steps of maintenance
MOST_HELD = min(400, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)  # requests of a burst
MOST_BYTES = 33 * 1024 * 1024  # bytes of them, the largest body with its head
HEAD_BYTES = 64 * 1024  # bytes in which a head has to end, and what follows the last chunk
MOST_CHUNKS = 50_000  # chunks of a request, for which gunicorn takes half a second

LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\nTransfer-Encoding:[^\r\n]*chunked", re.IGNORECASE)
CONTINUE = re.compile(rb"\r\nExpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
CHUNK_LINE = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,190}\r\n")
URGENT = (b"POST ", b"GET /health", b"HEAD /health")  # beginnings of what waits for no reader
BUFFER = memoryview(bytearray(64 * 1024))  # what is received of a request at a time
TURNED_AWAY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: application/json\r\nX-Robots-Tag: noindex\r\n\r\n"
    b'{"error": "Other readers keep all workers but one; try again, or raise WEB_CONCURRENCY."}\n'
)


class Client(socket.socket):
    """An accepted connection, and what has come of its request."""

    def __init__(self, worker, listener, accepted, addr):
        super().__init__(accepted.family, accepted.type, accepted.proto, accepted.detach())
        self.worker = worker
        self.listener = listener
        self.addr = addr
        self.young_until = time.monotonic() + YOUNG_SECONDS
        self.late_at = time.monotonic() + REQUEST_SECONDS
        self.data = bytearray()
        self.chunks = 0  # chunks that are here
        self.next_chunk = 0  # place of the one after them
        self.is_whole = False  # gunicorn can serve it, or refuse it

    def receive(self):
        """Take in what is here. Raises OSError if the connection is broken or abused."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(128):  # more parts than the kernel holds
                size = self.recv_into(BUFFER, 0, socket.MSG_DONTWAIT)
                self.data += BUFFER[:size]
                self.is_whole = size == 0 or self.has_come()
                if self.is_whole:
                    return

    def has_come(self):
        """Return True if all of the request is here, or if no more of it is wanted."""
        # This only decides when gunicorn starts, which reads the data from their first byte.
        end = self.data.find(b"\r\n\r\n", 0, HEAD_BYTES) + 4
        if end < 4:
            return len(self.data) >= HEAD_BYTES
        if len(self.data) == end and CONTINUE.search(self.data):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        if CHUNKED.search(self.data, 0, end):
            return self.has_last_chunk(end)
        length = LENGTH.search(self.data, 0, end)
        missing = end + int(length[1] if length else 0) - len(self.data)
        return missing <= 0 or missing > MOST_BYTES  # which the app refuses by its length

    def has_last_chunk(self, start):
        """Return True if the chunks from `start` on are here up to the last, and its trailers."""
        self.next_chunk = max(self.next_chunk, start)
        while self.chunks < MOST_CHUNKS and (line := CHUNK_LINE.match(self.data, self.next_chunk)):
            size = int(line[1], 16)
            if size == 0:
                return self.data.find(b"\r\n\r\n", line.end() - 2, line.end() + HEAD_BYTES) >= 0
            self.next_chunk = line.end() + size + 2
            self.chunks += 1
        if self.chunks == MOST_CHUNKS or len(self.data) > self.next_chunk + 200:
            raise ConnectionAbortedError("its chunks are too small, or have too long extensions")
        return False

    def recv(self, size, flags=0):
        """Return what was received, and then b"", for gunicorn the end of the request."""
        part = bytes(self.data[:size])
        del self.data[:size]
        return part

    def sendall(self, data, flags=0):
        """Send data in parts, each of which the client has to take in PART_SECONDS."""
        view = memoryview(data)
        self.settimeout(PART_SECONDS)
        for start in range(0, len(view), PART_BYTES):
            self.worker.notify()
            try:
                super().sendall(view[start : start + PART_BYTES])
            except TimeoutError:  # for which gunicorn would log a traceback
                raise BrokenPipeError(errno.EPIPE, "the client takes too long") from None


class Worker(SyncWorker):
    """A sync worker that no client can hold, of which all but one serve readers at a time."""

    handle_quit = SyncWorker.handle_exit  # where gunicorn would exit in the middle of a request
    slots = None  # file of which who serves a reader locks a byte, which the kernel frees at a kill

    def __init__(self, *args):
        super().__init__(*args)
        if Worker.slots is None:  # in the master, so that all workers have the same
            Worker.slots = tempfile.TemporaryFile(dir=self.cfg.worker_tmp_dir)
        self.unfinished = []  # clients whose request is not whole, the oldest first
        self.readers = []  # clients whose request is whole and waits, the oldest first
        self.logged_at = 0  # time of the last line about a client that was dropped
        self.maintain = lambda: False  # a step of work between requests, True if more is to do

    def accept(self, listener):
        """Accept a connection, and serve what can be served."""
        accepted, addr = listener.accept()
        self.unfinished.append(Client(self, listener, accepted, addr))
        self.step(0)
        self.serve_reader()

    def wait(self, timeout):
        """Wait until there is something to do, and return the listeners to accept from."""
        self.notify()
        timeout = POLL_SECONDS if self.readers else IDLE_SECONDS
        if self.maintain() or self.serve_reader():
            timeout = 0
        self.step(timeout)
        return self.sockets

    def step(self, timeout):
        """Receive what comes within `timeout`, serve what is urgent, and drop what is too much."""
        ready, _, _ = select.select([*self.wait_fds, *self.unfinished], [], [], timeout)
        if self.PIPE[0] in ready:
            os.read(self.PIPE[0], 4096)
        for each in ready:
            if isinstance(each, Client):
                self.receive(each)
        while sum(len(client.data) for client in self.unfinished + self.readers) > MOST_BYTES:
            largest = max(self.unfinished + self.readers, key=lambda client: len(client.data))
            self.drop(largest, "unfinished requests are too large together")
        while len(self.unfinished) + len(self.readers) > MOST_HELD:
            self.drop((self.readers + self.unfinished)[0], "there are too many requests")
        while self.readers and self.readers[0].late_at < time.monotonic():
            self.drop(self.readers[0], "a reader waited too long for others")
        while self.unfinished and self.unfinished[0].late_at < time.monotonic():
            self.drop(self.unfinished[0], "a request did not come whole in time")

    def receive(self, client):
        """Receive from a client, and serve its request if that is whole and urgent."""
        try:
            client.receive()
        except OSError as error:
            self.drop(client, error)
        if client.is_whole:
            self.unfinished.remove(client)
            client.late_at = time.monotonic() + READER_SECONDS
            if client.data.startswith(URGENT):
                self.handle(client.listener, client, client.addr)
            else:
                self.readers.append(client)

    def serve_reader(self):
        """Serve the reader who waits longest if no webhook can be late by it; return True if so."""
        is_one_coming = self.unfinished and time.monotonic() < self.unfinished[-1].young_until
        if not self.readers or is_one_coming:
            return False
        for slot in range(max(self.cfg.workers - 1, 1)):
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(Worker.slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                reader = self.readers.pop(0)
                if not reader.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):  # it is still there
                    self.handle(reader.listener, reader, reader.addr)
                reader.close()
                fcntl.lockf(Worker.slots, fcntl.LOCK_UN)
                return True
        return False

    def drop(self, client, cause):
        """Close a connection, and log it once a second at most, because strangers can cause it."""
        if client.is_whole:
            self.readers.remove(client)
            with contextlib.suppress(OSError):
                client.send(TURNED_AWAY, socket.MSG_DONTWAIT)
        else:
            self.unfinished.remove(client)
        client.close()
        if time.monotonic() > self.logged_at + 1:
            self.logged_at = time.monotonic()
            self.log.warning("dropped a client: %s", cause)

    def run(self):
        """Serve until the worker is told to end, then for a while what is here."""
        super().run()
        until = time.monotonic() + STOPPING_SECONDS
        for listener in self.sockets:
            with contextlib.suppress(OSError):  # no other connection waits
                while time.monotonic() < until - STOPPING_SECONDS / 2:
                    self.accept(listener)
        self.wait_fds = self.PIPE[:1]
        while (self.unfinished or self.readers) and time.monotonic() < until:
            self.step(POLL_SECONDS)
            self.serve_reader()
