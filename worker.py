"""A gunicorn sync worker that takes up a request once all of it is here.

gunicorn's own SyncWorker reads a request while it serves it, so a client that sends slowly holds
the worker. This one receives requests without waiting, several at a time, and hands each that is
whole to gunicorn's own `handle`.
"""

import contextlib
import errno
import fcntl
import math
import os
import re
import select
import socket
import tempfile
import time

from gunicorn.workers.sync import SyncWorker

REQUEST_SECONDS = 5  # time for a request to arrive whole
PART_SECONDS = 5  # time for a client to take a part of its reply
PART_BYTES = 65536  # bytes of such a part
READER_SECONDS = 3  # time for which a reader waits for a slot
YOUNG_SECONDS = 1.5  # age up to which an unfinished POST keeps its worker from readers
LEAVING_SECONDS = 1  # time for a client to take the reply to a request it has not sent whole
STOPPING_SECONDS = 1  # time in which a stopping worker serves what is here
POLL_SECONDS = 0.02  # time between two attempts to get a reader's slot
IDLE_SECONDS = 0.5  # longest time between two steps of maintenance
MOST_HELD = 400  # requests that a worker holds, more than a burst brings
MOST_HELD_BYTES = 32 * 1024 * 1024  # bytes of them
RECEIVE_BYTES = 256 * 1024  # bytes that are received at a time
HEAD_BYTES = 65536  # bytes of a request in which its head has to end
CHUNKS = 1000  # chunks of a body, beyond which they must have
CHUNK_BYTES = 64  # bytes on average
CHUNK_LINE_BYTES = 300  # bytes of the line before a chunk
LOG_LENGTH = 500  # characters of a log line, in which gunicorn quotes broken requests

LENGTH = re.compile(rb"\r\nContent-Length:[ \t]*([0-9]{1,18})[ \t]*\r\n", re.IGNORECASE)
CHUNKED = re.compile(rb"\r\nTransfer-Encoding:", re.IGNORECASE)
CONTINUE = re.compile(rb"\r\nExpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,8})[^\r\n]{0,200}\r\n")
URGENT = b"POST ", b"GET /health"  # beginnings of the requests that wait for no reader

BUSY = (
    b'{"error": "Other readers keep all workers but one; try again, or raise WEB_CONCURRENCY."}\n'
)
TURNED_AWAY = (
    b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(BUSY), BUSY)
)


class Request:
    """A connection, and what has come of its request."""

    def __init__(self, listener, client, addr):
        self.listener = listener
        self.client = client
        self.addr = addr
        self.data = bytearray()
        self.began_at = time.monotonic()
        self.waits_since = None  # time since which a reader waits for a slot
        self.head_bytes = 0  # bytes of the head, once it is here
        self.announced = math.inf  # bytes of the whole request, once that is known
        self.wanted = math.inf  # bytes with which it is served
        self.is_chunked = False
        self.walked = 0  # bytes up to the next chunk
        self.chunks = 0
        self.is_over = False  # the client sends no more
        self.is_leaving = False  # the client has its reply

    def fileno(self):
        """Return the file descriptor, for select."""
        return self.client.fileno()

    def age(self):
        """Return the seconds since the connection was accepted, or since its reply was sent."""
        return time.monotonic() - self.began_at

    def is_whole(self):
        """Return True if the request can be served."""
        return self.is_over or len(self.data) >= self.wanted

    def is_urgent(self):
        """Return True for a request that waits for no reader."""
        return self.data.startswith(URGENT)

    def is_young_post(self):
        """Return True if this is, or may become, a POST that is about to be whole."""
        is_unfinished = not self.is_whole() and not self.is_leaving
        may_be_post = b"POST ".startswith(self.data[:5])
        return is_unfinished and may_be_post and self.age() < YOUNG_SECONDS

    def receive(self):
        """Take in what is here. Raises OSError if the connection is broken or abused."""
        try:
            data = self.client.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        self.is_over = not data
        if self.is_leaving:
            return
        self.data += data
        if not self.head_bytes:
            self.read_head()
        if self.is_chunked:
            self.walk_chunks()

    def read_head(self):
        """Find the end of the head in what is here, and in the head how much follows."""
        end = self.data.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(self.data) > HEAD_BYTES:
                self.give_up()
            return
        self.head_bytes = end
        self.is_chunked = CHUNKED.search(self.data, 0, end) is not None
        if self.is_chunked:
            self.walked = end
        else:
            length = LENGTH.search(self.data, 0, end)
            self.announced = end + (int(length[1]) if length else 0)
            self.wanted = self.announced
            if self.announced > MOST_HELD_BYTES:
                self.wanted = end  # the app refuses it by its length
        if not self.is_whole() and CONTINUE.search(self.data, 0, end):
            self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n", socket.MSG_DONTWAIT)

    def walk_chunks(self):
        """Go on to the last chunk that is here, to see whether it ends the body."""
        while self.wanted == math.inf:
            size = CHUNK_SIZE.match(self.data, self.walked)
            if not size:
                if len(self.data) > self.walked + CHUNK_LINE_BYTES:
                    self.give_up()
                return
            chunk_bytes = int(size[1], 16)
            if chunk_bytes == 0:
                if self.data.find(b"\r\n\r\n", size.end() - 2) >= 0:
                    self.announced = len(self.data)
                    self.wanted = len(self.data)
                return
            end = size.end() + chunk_bytes + 2
            if end > len(self.data):
                return
            self.walked = end
            self.chunks += 1
            if self.chunks > max(CHUNKS, self.walked / CHUNK_BYTES):
                raise ConnectionAbortedError("the chunks are so small that to read them takes long")

    def give_up(self):
        """Have what is here served, which gunicorn refuses."""
        self.wanted = 0
        self.is_over = True


class Client(socket.socket):
    """The socket of a request that is being served, of which no read and no write lasts long."""

    def __init__(self, worker, request):
        client = request.client
        super().__init__(client.family, client.type, client.proto, client.detach())
        self.worker = worker
        self.request = request
        self.is_complete = request.is_over or len(request.data) >= request.announced

    def recv(self, size):
        """Return what was received, and then b"", for gunicorn the end of the request."""
        data = bytes(self.request.data[:size])
        del self.request.data[:size]
        return data

    def send(self, data, *flags):
        """Pass over gunicorn's own "100 Continue", for which it is too late. Returns the length."""
        return len(data)

    def sendall(self, data):
        """Send data in parts, each of which the client has to take in PART_SECONDS."""
        view = memoryview(data)
        self.settimeout(IDLE_SECONDS)
        for start in range(0, len(view), PART_BYTES):
            self.send_part(view[start : start + PART_BYTES])

    def send_part(self, part):
        """Send a part of the reply, with signs of life for gunicorn meanwhile."""
        until = time.monotonic() + PART_SECONDS
        while part:
            self.worker.notify()
            with contextlib.suppress(TimeoutError):
                part = part[super().send(part) :]
            if part and time.monotonic() > until:
                raise BrokenPipeError(errno.EPIPE, "the client takes too long")

    def shutdown(self, how):
        """Have gunicorn close at once, where it would wait for the client to do so.

        A client that still sends would lose the reply by that, so the worker holds it for a while.
        """
        if not self.is_complete:
            super().shutdown(how)
            self.worker.hold_leaving(self.request, socket.socket(fileno=os.dup(self.fileno())))
        raise OSError(errno.ENOTCONN, "closed at once")


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
        self.held = []  # requests, the oldest first
        self.has_served_reader = False  # so that the next one waits for nothing
        self.logged_at = -math.inf  # time of the last line about a client that was dropped

    def maintain(self):
        """Do a short step of work between requests, and return True if more is to do."""
        return False

    def init_process(self):
        self.log.error_log.addFilter(shorten)
        super().init_process()

    def accept(self, listener):
        """Serve what has become whole, then accept a connection."""
        if self.held:
            self.collect(0)
        try:
            client, addr = listener.accept()
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self.log_dropped("no file is left for another connection")
            self.drop_oldest()
            raise BlockingIOError(errno.EAGAIN, "try again") from None
        request = Request(listener, client, addr)
        self.held.append(request)
        self.receive(request)
        self.serve_held()
        self.drop_excess()

    def wait(self, timeout):
        """Wait until there is something to do; return the listeners that have connections."""
        self.notify()
        if self.has_served_reader or self.maintain():
            timeout = 0
        elif self.held:
            timeout = POLL_SECONDS
        return self.collect(min(timeout, IDLE_SECONDS))

    def collect(self, timeout):
        """Receive what comes within `timeout` seconds and serve what is whole.

        Returns the listeners that have connections.
        """
        receiving = [request for request in self.held if request.waits_since is None]
        ready, _, _ = select.select([*self.wait_fds, *receiving], [], [], timeout)
        if self.PIPE[0] in ready:
            os.read(self.PIPE[0], 4096)
        for request in ready:
            if isinstance(request, Request):
                self.receive(request)
        self.drop_excess()
        self.serve_held()
        return [listener for listener in self.sockets if listener in ready]

    def receive(self, request):
        """Take in what is here of a request; drop it if its connection is broken."""
        try:
            request.receive()
        except OSError as error:
            if isinstance(error, ConnectionAbortedError):
                self.log_dropped(error)
            self.drop(request)

    def serve_held(self):
        """Serve the webhooks that are whole and one reader, and drop what has had its time."""
        waiting = []
        for request in list(self.held):
            if request.is_leaving or not request.is_whole():
                seconds = LEAVING_SECONDS if request.is_leaving else REQUEST_SECONDS
                if request.is_over or request.age() > seconds:
                    self.drop(request)
            elif request.is_urgent():
                self.serve(request)
            else:
                request.waits_since = request.waits_since or time.monotonic()
                waiting.append(request)
        self.has_served_reader = bool(waiting) and self.serve_reader(waiting)

    def serve_reader(self, waiting):
        """Serve the first of the waiting readers if it may be, and return True if it was."""
        for request in waiting[1:]:
            if time.monotonic() > request.waits_since + READER_SECONDS:
                self.turn_away(request)
        request = waiting[0]
        is_webhook_coming = any(other.is_young_post() for other in self.held)
        has_waited = time.monotonic() > request.waits_since + YOUNG_SECONDS
        if (has_waited or not is_webhook_coming) and self.take_slot():
            try:
                self.serve(request)
            finally:
                fcntl.lockf(Worker.slots, fcntl.LOCK_UN)
            return True
        if time.monotonic() > request.waits_since + READER_SECONDS:
            self.turn_away(request)
        return False

    def turn_away(self, request):
        """Refuse a reader who has waited too long."""
        self.log_dropped("a reader waited in vain for others")
        with contextlib.suppress(OSError):
            request.client.send(TURNED_AWAY, socket.MSG_DONTWAIT)
        self.drop(request)

    def take_slot(self):
        """Return True if this worker may serve a reader now."""
        for slot in range(max(self.cfg.workers - 1, 1)):
            with contextlib.suppress(OSError):
                fcntl.lockf(Worker.slots, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                return True
        return False

    def serve(self, request):
        """Have gunicorn serve a request that is whole."""
        self.held.remove(request)
        self.handle(request.listener, Client(self, request), request.addr)
        self.notify()

    def hold_leaving(self, request, client):
        """Hold the connection of a client that has its reply, but still sends."""
        leaving = Request(request.listener, client, request.addr)
        leaving.is_leaving = True
        self.held.append(leaving)

    def drop_excess(self):
        """Drop requests that are too many, or too large together."""
        if len(self.held) > MOST_HELD:
            self.log_dropped("there are too many unfinished requests")
            self.drop_oldest()
        if sum(len(request.data) for request in self.held) > MOST_HELD_BYTES:
            self.log_dropped("unfinished requests are too large together")
            self.drop(max(self.held, key=lambda request: len(request.data)))

    def drop_oldest(self):
        """Drop the request that is held longest."""
        if self.held:
            self.drop(self.held[0])

    def drop(self, request):
        """Close a connection."""
        self.held.remove(request)
        request.client.close()

    def log_dropped(self, cause):
        """Log why a client was dropped, at most once a second, because strangers can cause it."""
        if time.monotonic() > self.logged_at + 1:
            self.logged_at = time.monotonic()
            self.log.warning("dropped a client: %s", cause)

    def run(self):
        """Serve until the worker is told to end, then what is here."""
        super().run()
        until = time.monotonic() + STOPPING_SECONDS
        has_more = True
        while has_more and time.monotonic() < until:
            has_accepted = False
            for listener in self.sockets:
                with contextlib.suppress(OSError):
                    self.accept(listener)
                    has_accepted = True
            has_more = has_accepted or any(
                request.waits_since or request.is_young_post() for request in self.held
            )
            self.collect(0 if has_accepted else POLL_SECONDS)

    def handle_quit(self, sig, frame):
        """End as at SIGTERM, where gunicorn would exit in the middle of a request."""
        self.cfg.worker_int(self)
        self.handle_exit(sig, frame)


def shorten(record):
    """Cut a log line in which gunicorn quotes a request and perhaps a secret. Returns True."""
    if not record.args:
        message = str(record.msg)
        if message.startswith("Invalid request"):
            message = message.partition("'")[0]
        record.msg = message[:LOG_LENGTH]
    return True
