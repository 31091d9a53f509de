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
import select
import socket
import tempfile
import time

from gunicorn.workers.sync import SyncWorker

REQUEST_SECONDS = 5  # time for a request to arrive whole, and for a reader to be taken up
YOUNG_SECONDS = 1  # age up to which an unfinished request keeps its worker from readers
PART_SECONDS = 5  # time for a client to take a part of its reply
PART_BYTES = 64 * 1024  # bytes of such a part
STOPPING_SECONDS = 1  # time in which a stopping worker serves what is here
POLL_SECONDS = 0.02  # time between two attempts to get a reader's slot
IDLE_SECONDS = 0.5  # longest time between two steps of maintenance
MOST_HELD = 400  # requests that a worker holds, more than a burst brings
MOST_BYTES = 32 * 1024 * 1024  # bytes of them
RECEIVE_BYTES = 256 * 1024  # bytes that are received at a time
HEAD_BYTES = 64 * 1024  # bytes in which the head of a request has to end
MOST_LINES = 100_000  # lines of a chunked request, because gunicorn takes 3 us for a chunk

LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\nTransfer-Encoding:", re.IGNORECASE)
CONTINUE = re.compile(rb"\r\nExpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
LAST_CHUNK = re.compile(rb"\r\n0+[ \t]*(;[^\r\n]*)?\r\n([^\r\n]+\r\n)*\r\n\Z")
EXTENSION = re.compile(rb"\r\n[0-9a-fA-F]{1,8}[ \t]*;[^\r\n]{100}")
URGENT = (b"POST ", b"GET /health")  # beginnings of the requests that wait for no reader

TURNED_AWAY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: application/json\r\n\r\n"
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
        self.is_whole = False  # gunicorn can serve it, or refuse it

    def receive(self):
        """Take in what is here. Raises OSError if the connection is broken or abused."""
        with contextlib.suppress(BlockingIOError):
            part = super().recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            self.data += part
            self.is_whole = not part or self.has_come()

    def has_come(self):
        """Return True if the data end the request, or if no more of it is wanted.

        This only decides when gunicorn starts, which reads the data from their first byte.
        """
        end = self.data.find(b"\r\n\r\n", 0, HEAD_BYTES) + 4
        if end < 4:
            return len(self.data) >= HEAD_BYTES
        head = self.data[:end]
        length = LENGTH.search(head)
        has_come = True
        if CHUNKED.search(head):
            last_kilobyte = max(end - 2, len(self.data) - 1024)
            has_come = LAST_CHUNK.search(self.data, last_kilobyte) is not None
            if has_come and (self.data.count(b"\n") > MOST_LINES or EXTENSION.search(self.data)):
                raise ConnectionAbortedError("chunks are tiny or have long extensions")
        elif length:
            missing = end + int(length[1]) - len(self.data)
            has_come = missing <= 0 or missing > MOST_BYTES  # which the app refuses by its length
        if not has_come and len(self.data) == end and CONTINUE.search(head):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)
        return has_come

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
    """A sync worker that no client can hold.

    At most all workers but one serve readers at a time. POST requests and health checks wait for
    none.
    """

    # File of which the worker of a reader locks a byte. The kernel unlocks that of a dead worker.
    slots = None

    def __init__(self, *args):
        super().__init__(*args)
        if Worker.slots is None:  # in the master, so that all workers have the same
            Worker.slots = tempfile.TemporaryFile(dir=self.cfg.worker_tmp_dir)
        self.held = []  # clients, the oldest first
        self.logged_at = 0  # time of the last line about a client that was dropped

    def maintain(self):
        """Do a short step of work between requests, and return True if more is to do."""
        return False

    def accept(self, listener):
        """Accept a connection, and serve what can be served."""
        accepted, addr = listener.accept()
        self.held.append(Client(self, listener, accepted, addr))
        self.step(0)
        self.serve_reader()

    def wait(self, timeout):
        """Wait until there is something to do; return the listeners that have connections."""
        self.notify()
        timeout = IDLE_SECONDS
        if self.held:
            timeout = POLL_SECONDS
        if self.maintain() or self.serve_reader():
            timeout = 0
        return self.step(timeout)

    def step(self, timeout):
        """Receive, serve what is urgent, drop what is late; return the listeners that are ready."""
        unfinished = [client for client in self.held if not client.is_whole]
        ready, _, _ = select.select([*self.wait_fds, *unfinished], [], [], timeout)
        if self.PIPE[0] in ready:
            os.read(self.PIPE[0], 4096)
        for client in set(unfinished).intersection(ready):
            try:
                client.receive()
            except OSError as error:
                self.drop(client, error)
        if len(self.held) > MOST_HELD:
            self.drop(self.held[0], "too many requests are unfinished")
        if sum(len(client.data) for client in self.held) > MOST_BYTES:
            largest = max(self.held, key=lambda client: len(client.data))
            self.drop(largest, "unfinished requests are too large together")
        for client in list(self.held):
            if client.is_whole and client.data.startswith(URGENT):
                self.serve(client)
            elif time.monotonic() > client.late_at:
                if client.is_whole:
                    with contextlib.suppress(OSError):
                        client.send(TURNED_AWAY, socket.MSG_DONTWAIT)
                self.drop(client, "it did not come whole in time, or waited too long for readers")
        return [listener for listener in self.sockets if listener in ready]

    def serve(self, client):
        """Have gunicorn serve a request that is whole."""
        self.held.remove(client)
        with contextlib.suppress(OSError):  # of gunicorn's own reply to a client that has gone
            self.handle(client.listener, client, client.addr)

    def serve_reader(self):
        """Serve the reader who waits longest, if none of the webhooks can be late by it.

        Returns True if it was served.
        """
        readers = [client for client in self.held if client.is_whole]
        unfinished = [client for client in self.held if not client.is_whole]
        if not readers or any(time.monotonic() < client.young_until for client in unfinished):
            return False
        for slot in range(max(self.cfg.workers - 1, 1)):
            with contextlib.suppress(BlockingIOError):
                fcntl.lockf(Worker.slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                self.serve(readers[0])
                fcntl.lockf(Worker.slots, fcntl.LOCK_UN)
                return True
        return False

    def drop(self, client, cause):
        """Close a connection, and log it once a second at most, because strangers can cause it."""
        self.held.remove(client)
        client.close()
        if time.monotonic() > self.logged_at + 1:
            self.logged_at = time.monotonic()
            self.log.warning("dropped a client: %s", cause)

    def run(self):
        """Serve until the worker is told to end, then for a while what is here."""
        super().run()
        until = time.monotonic() + STOPPING_SECONDS
        ready = self.step(0)
        while (ready or self.held) and time.monotonic() < until:
            # The second half of the time is for those that were accepted in the first.
            if ready and time.monotonic() < until - STOPPING_SECONDS / 2:
                with contextlib.suppress(OSError):
                    self.accept(ready[0])
            self.serve_reader()
            ready = self.step(POLL_SECONDS)

    def handle_quit(self, sig, frame):
        """End as at SIGTERM, where gunicorn would exit in the middle of a request."""
        self.cfg.worker_int(self)
        self.handle_exit(sig, frame)
