"""Settings of gunicorn: `gunicorn` alone, in this folder, starts the service."""

import contextlib
import fcntl
import logging
import select
import signal
import socket
import sys
import tempfile
import time

from gunicorn.http.errors import ParseException
from gunicorn.workers.sync import SyncWorker

sys.modules.pop("collector", None)  # a reload takes up new code
import collector  # noqa: E402

REQUEST_SECONDS = 5  # for a request to arrive whole; Sentry ends its own after that
REPLY_SECONDS = 5  # more for the reply to be taken, or its next part
SLOT_SECONDS = 3  # for another reader to end
LEAVING_SECONDS = 1  # for a client to take a refusal
MOST_ASIDE = 50  # connections of a kind that a worker keeps aside

settings = collector.read_settings()
collector.check_folder(settings["DATABASE_URL"])
bind = f"0.0.0.0:{settings['PORT']}"
workers = settings["WEB_CONCURRENCY"]
wsgi_app = "collector:create_app()"
timeout = 15  # a backstop: the worker cuts slow clients off by itself
graceful_timeout = 2
worker_tmp_dir = "/dev/shm"  # a heartbeat on a busy disk would block
forwarder_headers = ""  # nobody in front moves this service to another path
control_socket_disable = True  # it needs a writable home
proc_name = "sentry-error-collector"


def refusal(status, words, header=""):
    """Return an HTTP response (bytes) in the one shape of errors."""
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n{header}\r\n"
    return (head + collector.as_json({"error": words})).encode()


class Worker(SyncWorker):
    """A sync worker that no client can hold for longer than a few seconds."""

    client = None

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.parked = []  # readers who wait for a slot: (until when, listener, client, address)
        self.leaving = []  # connections that were refused, until their clients have the reply: (until when, client)

    def init_signals(self):
        super().init_signals()
        signal.signal(signal.SIGALRM, self.cut_off)

    def load_wsgi(self):
        super().load_wsgi()
        shared = self.wsgi.extensions["collector"]
        shared.keep_alive = self.keep_alive
        shared.database.stopping = lambda: not self.alive

    def keep_alive(self):
        """Grant a long reply more time."""
        self.notify()
        signal.setitimer(signal.ITIMER_REAL, REPLY_SECONDS, REPLY_SECONDS)

    def cut_off(self, sig, frame):
        """End the reading first, which harms no request that is here; the second time end the connection."""
        with contextlib.suppress(OSError):
            self.client.shutdown(self.cut)
        self.cut = socket.SHUT_RDWR

    def handle(self, listener, client, addr):
        # With TCP_DEFER_ACCEPT a connection comes with its first bytes; one without has been silent all that time.
        if DEFERRED and not select.select([client], [], [], 0)[0]:
            client.close()
            return
        # A reader who has to wait is put aside, so that no webhook waits behind him.
        head = b""
        with contextlib.suppress(OSError):
            head = client.recv(11, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        reads = not head.startswith((b"POST ", b"GET /health")) and not b"POST ".startswith(head)
        if reads and len(self.parked) >= MOST_ASIDE:
            self.refuse(client)
        elif reads and not self.take_slot():
            self.parked.append((time.monotonic() + SLOT_SECONDS, listener, client, addr))
        else:
            self.serve(listener, client, addr)

    def serve(self, listener, client, addr):
        """Serve a connection, for so long as the limits allow."""
        self.client, self.cut = client, socket.SHUT_RD
        signal.setitimer(signal.ITIMER_REAL, REQUEST_SECONDS, REPLY_SECONDS)
        try:
            super().handle(listener, client, addr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            fcntl.lockf(SLOTS, fcntl.LOCK_UN)

    def accept(self, listener):
        while self.leaving and (time.monotonic() > self.leaving[0][0] or len(self.leaving) > MOST_ASIDE):
            self.leaving.pop(0)[1].close()
        if self.parked and time.monotonic() > self.parked[0][0]:
            self.refuse(self.parked.pop(0)[2])
        elif self.parked and self.take_slot():
            self.serve(*self.parked.pop(0)[1:])
        super().accept(listener)

    def wait(self, timeout):
        return super().wait(0.005 if self.parked else min(timeout, LEAVING_SECONDS) if self.leaving else timeout)

    def refuse(self, client):
        """Turn a reader away who has waited in vain."""
        with contextlib.suppress(OSError):
            client.setblocking(False)
            words = "Other readers keep all workers but the one for webhooks; try again, or raise WEB_CONCURRENCY."
            client.sendall(refusal("503 Service Unavailable", words, "Retry-After: 1\r\n"))
        self.let_go(client, unread=True)

    def handle_request(self, listener, req, client, addr):
        super().handle_request(listener, req, client, addr)
        self.let_go(client, unread=getattr(req.body.reader, "length", 1))

    def let_go(self, client, unread):
        """Close a connection after the reply; one with unread data a little later, or the reply would be lost."""
        # gunicorn waits two seconds for the client to close first, and keeps everybody else waiting.
        with contextlib.suppress(OSError):
            if unread:
                client.shutdown(socket.SHUT_WR)
                self.leaving.append((time.monotonic() + LEAVING_SECONDS, client.dup()))
        client.close()

    def handle_error(self, req, client, addr, exc):
        if not isinstance(exc, ParseException):
            super().handle_error(req, client, addr, exc)
            return
        # gunicorn would log the whole of a line that may have megabytes.
        name = type(exc).__name__
        self.log.warning("no HTTP that can be served, from %s: %s", addr[0] if addr else "a socket", name)
        status = STATUSES.get(name, "400 Bad Request")
        with contextlib.suppress(OSError):
            client.sendall(refusal(status, f"This is no HTTP that can be served ({name}); send a plain request."))
        self.let_go(client, unread=True)

    def take_slot(self):
        """Say whether this worker may read now: at most all but one do at a time, so that one is free for webhooks."""
        for slot in range(workers - 1):
            with contextlib.suppress(OSError):
                fcntl.lockf(SLOTS, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                return True
        return workers == 1


worker_class = Worker
SLOTS = tempfile.TemporaryFile(dir=worker_tmp_dir)  # a byte a slot; record locks belong to a process, not to the file
STATUSES = {"LimitRequestLine": "414 URI Too Long", "LimitRequestHeaders": "431 Request Header Fields Too Large"}
DEFERRED = hasattr(socket, "TCP_DEFER_ACCEPT")


def on_starting(server):
    """Make the database and log the settings once, before there are workers."""
    start = logging.getLogger("collector.start")
    start.disabled = False
    collector.create_app()
    start.disabled = True


on_reload = on_starting


def when_ready(server):
    """Let the kernel keep connections until they bring data: browsers open spare ones."""
    for listener in server.LISTENERS:
        if DEFERRED and listener.sock.family in (socket.AF_INET, socket.AF_INET6):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
