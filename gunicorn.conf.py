"""Settings of gunicorn: `gunicorn` alone, in this folder, starts the service."""

import contextlib
import errno
import fcntl
import gc
import logging
import math
import os
import re
import resource
import selectors
import socket
import sqlite3
import sys
import tempfile
import time
from collections import deque
from datetime import datetime

from gunicorn import http
from gunicorn.http import wsgi
from gunicorn.http.errors import LimitRequestHeaders, NoMoreData, ParseException
from gunicorn.workers.sync import SyncWorker

log = logging.getLogger("collector")


def check_port(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("0.0.0.0", port))


previous = sys.modules.pop("collector", None)  # a reload takes up new code
try:
    import collector

    settings = collector.read_settings()
    collector.check_folder(settings["DATABASE_URL"])
    if previous is not None:
        if settings["PORT"] != previous.settings_in_use["PORT"]:
            check_port(settings["PORT"])
        collector.app_in_use = collector.make_app(settings)
except BaseException as fault:  # SystemExit, too, is what a bad setting raises
    if previous is None:
        raise
    log.error("cannot reload, going on as before: %s: %s", type(fault).__name__, fault)
    collector = sys.modules["collector"] = previous
    settings = collector.settings_in_use
collector.settings_in_use = settings

REQUEST_SECONDS = 5  # for a request to arrive whole; Sentry ends its own after that
REPLY_SECONDS = 5  # for a client to take something more of the reply
READER_SECONDS = 3  # for a reader to wait for other readers
GO_ON_SECONDS = 0.02  # for long replies to go on before
GIVE_WAY_SECONDS = 0.002  # for others to get the slot
LEAVING_SECONDS = 1  # for a client to take a refusal
STOPPING_SECONDS = 1.4  # for what is in hand when the worker is told to end, of that
LAST_ACCEPT_SECONDS = 0.3  # for connections that wait to be accepted, and
LAST_WRITE_SECONDS = 1  # for the database to be free
STILL_SECONDS = 0.5  # for a long request to move while others wait for room, and
FAVOUR_SECONDS = 1  # for one of those to go on without
FIRST_BYTES = 65536  # to read of a request before it is known how long it is
STEP_BYTES = 256 * 1024  # to read of a long one at a time
HEAD_BYTES = 65536  # of a request
PART_BYTES = 65536  # of a reply that are worth sending before more of it is made
MOST_AT_ONCE = 10  # webhooks that share a commit,
MOST_AT_ONCE_BYTES = 256 * 1024  # and when no more are added to them
MOST_READERS = 50  # that wait for their turn in one worker
SPARE_FILES = (
    100  # for other connections and the database, of those that the system lets a worker open
)
MOST_KEPT = 300  # connections that a worker keeps, and
MOST_KEPT_BYTES = max(
    16 * 1024 * 1024, 2 * settings["MAX_BODY_BYTES"]
)  # of their long requests, and of replies

bind = f"0.0.0.0:{settings['PORT']}"
workers = settings["WEB_CONCURRENCY"]
wsgi_app = (
    "collector:create_app()"  # gunicorn wants one, though the workers have the app of the master
)
timeout = 15  # a backstop: no client can hold a worker
graceful_timeout = 2
worker_tmp_dir = "/dev/shm"  # a heartbeat on a busy disk would block
forwarder_headers = ""  # nobody in front moves this service to another path
control_socket_disable = True  # it needs a writable home
proc_name = "sentry-error-collector"

BODY = re.compile(
    rb"\r\n(?:Content-Length:[ \t]*0*([0-9]{1,18})|Transfer-Encoding:)", re.IGNORECASE
)
CONTINUE = re.compile(rb"\r\nExpect:[ \t]*100-continue[ \t]*\r\n", re.IGNORECASE)
BY_THEMSELVES = b"POST ", b"\r\nPOST ", b"GET /health"  # requests that wait for no reader
STATUSES = {
    "LimitRequestLine": "414 URI Too Long",
    "LimitRequestHeaders": "431 Request Header Fields Too Large",
    "NoMoreData": "408 Request Timeout",
}
# A byte a slot; record locks belong to a process, not to the file. A reload keeps it.
SLOTS = collector.slots = getattr(previous, "slots", None) or tempfile.TemporaryFile(
    dir=worker_tmp_dir
)


class Connection:
    """A client's connection: its request as it comes, its reply as it goes. gunicorn takes it for the socket.

    It is kept while it receives, then waits to be served, is kept again while it sends the reply or a part of it, waits
    for the next part to be made, and so on to the end; one that was refused is kept until its client has the reply.
    """

    def __init__(self, client, addr):
        self.client, self.addr = client, addr
        self.request, self.head_length = bytearray(), 0
        self.said, self.length = (
            math.inf,
            math.inf,
        )  # bytes that the client means to send, bytes that are waited for
        self.reply, self.parts = bytearray(), None  # parts makes more of the reply
        self.is_waiting = self.has_begun = self.is_made = (
            False  # the app has to wait; some was sent; all is there
        )
        self.then, self.until = (
            None,
            0,
        )  # what to do when the client has moved, and how long to wait for that
        self.began_at, self.moved_at, self.favoured_at = time.monotonic(), 0, 0

    def fileno(self):
        return self.client.fileno()

    def is_whole(self):
        return len(self.request) >= self.length

    def lacks(self):
        return self.length - len(self.request)

    def is_long(self):
        return self.head_length and self.length > FIRST_BYTES

    def receive(self):
        """Take in what has come; say whether that is the whole request, or no more of it will come."""
        try:
            data = self.client.recv(
                min(self.lacks(), STEP_BYTES) if self.is_long() else FIRST_BYTES
            )
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self.request += data
        self.moved_at = time.monotonic()
        if not self.head_length:
            self.measure()
        return not data or self.is_whole()

    def measure(self):
        """Find out how long the request is, once its head is here."""
        end = self.request.find(b"\r\n\r\n") + 4
        if end < 4:
            if (
                len(self.request) > HEAD_BYTES or b"\n\n" in self.request
            ):  # this is no head, nor will be
                self.length = 0
            return
        found = BODY.search(self.request, 0, end)
        self.head_length, self.said = end, end + (int(found[1] or 2**63) if found else 0)
        is_wanted = (
            self.request.startswith(BY_THEMSELVES) and self.said - end <= settings["MAX_BODY_BYTES"]
        )
        self.length = self.said if is_wanted else end
        if not self.is_whole() and CONTINUE.search(self.request, 0, end):
            with contextlib.suppress(OSError):
                self.client.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def take_request(self):
        """Return the request as the pieces that gunicorn reads."""
        end, request = self.head_length or len(self.request), memoryview(self.request)
        self.said -= len(request)
        self.request = b""
        return [bytes(request[:end]), bytes(request[end:])]

    def sendall(self, data):
        self.reply += data

    def send(self, data):
        """Pass over gunicorn's 100 Continue, for which it is too late."""
        return len(data)

    def end(self):
        """Let the app do what it left for after the reply."""
        parts, self.parts = self.parts, None
        parts.close()

    def flush(self):
        """Send what the client takes now of the reply."""
        with contextlib.suppress(BlockingIOError):
            while self.reply:
                del self.reply[: self.client.send(self.reply)]
                self.has_begun = True


class Worker(SyncWorker):
    """A sync worker that no client can hold.

    It serves one request at a time, each once it is here whole, and sends a reply as its client takes it. Webhooks go
    first. Readers take turns, part by part of a long reply, and at most all workers but one do so at a time. gunicorn's
    hooks around a request are not called.
    """

    collector = stopped_at = None

    def load_wsgi(self):
        self.wsgi = (
            collector.app_in_use
        )  # made by the master: whatever changes on the disk, a worker can start
        self.collector = self.wsgi.extensions["collector"]

    def handle_exit(self, sig, frame):
        self.begin_to_stop()
        super().handle_exit(sig, frame)

    def begin_to_stop(self):
        if self.collector and not self.stopped_at:
            self.stopped_at = time.monotonic()
            self.collector.database.gives_up_at = self.stopped_at + LAST_WRITE_SECONDS

    handle_quit = handle_exit  # Ctrl-C, too, leaves time for what is in hand

    def run(self):
        self.kept, self.webhooks, self.served = (
            {},
            [],
            [],
        )  # connections; what the app has yet to do after replies
        self.readers, self.longer, self.goes_on_until = (
            deque(),
            deque(),
            0,
        )  # who begin, who go on with a long reply
        self.paused, self.favourite = (
            set(),
            None,
        )  # long requests that wait for room, and the one that needs none
        self.selector, self.looked_at, self.has_more_to_do = selectors.DefaultSelector(), 0, False
        with contextlib.suppress(sqlite3.Error, OSError):
            self.collector.database.connection()  # before there are clients, who may use up what files it may open
        for source in (*self.sockets, self.PIPE[0]):
            self.selector.register(source, selectors.EVENT_READ)
        for listener in self.sockets:
            listener.setblocking(False)
        while self.alive:
            self.step(self.sockets)
        self.begin_to_stop()
        for listener in self.sockets:
            self.selector.unregister(listener)
        while (
            self.take_in(self.sockets) and time.monotonic() < self.stopped_at + LAST_ACCEPT_SECONDS
        ):
            self.step(())  # who has connected is not refused
        while self.has_work() and time.monotonic() < self.stopped_at + STOPPING_SECONDS:
            self.step(())
        self.collector.write_counts(wait=0.1)

    def has_work(self):
        has_begun = any(connection.request or connection.reply for connection in self.kept)
        return has_begun or self.webhooks or self.readers or self.longer

    def step(self, listeners):
        """Serve some webhooks and a part of a reader's reply, or wait for clients if there are none."""
        self.notify()
        self.take_in(listeners)
        is_busy = self.serve_webhooks() | self.serve_reader()
        while self.served:
            self.attempt(Connection.end, self.served.pop())
        if self.kept or not is_busy:
            pause = (
                GIVE_WAY_SECONDS / 2 if self.readers or self.longer else 0.1 if self.kept else 0.5
            )
            is_busy |= self.watch(0 if is_busy or self.has_more_to_do else pause)
        if not is_busy and (
            self.has_more_to_do or time.monotonic() > self.collector.kept_house_at + 0.1
        ):
            self.has_more_to_do = self.collector.keep_house()
            if not self.is_parent_alive():
                self.alive = False

    def take_in(self, listeners):
        """Accept as many connections as may bring webhooks that share a commit; say whether there were any."""
        for number in range(MOST_AT_ONCE):
            if sum(len(connection.request) for connection in self.webhooks) > MOST_AT_ONCE_BYTES:
                return True
            if not sum(map(self.accept, listeners)):
                return number > 0
        return True

    def watch(self, seconds):
        """Go on with the connections whose clients have moved or have had their time; say whether there are any."""
        events = self.selector.select(seconds)
        for key, _ in events:
            if key.fd == self.PIPE[0]:
                os.read(key.fd, 4096)
            elif key.fileobj in self.kept:  # and not dropped just now
                self.attempt(key.fileobj.then, key.fileobj)
        if self.paused:
            self.share_room()
        if self.kept and time.monotonic() > self.looked_at + 0.1:
            self.looked_at = time.monotonic()
            for connection in list(self.kept):
                if connection in self.kept and connection.until < self.looked_at:
                    self.attempt(self.expire, connection)
        return bool(events)

    def expire(self, connection):
        if connection.then == self.receive and connection.request:
            self.take(connection)
        else:
            self.drop(connection)

    def attempt(self, action, connection):
        """Do something for a connection; should that fail, it costs nobody else anything."""
        try:
            action(connection)
        except Exception:
            self.log.exception("fault in a connection")
            self.drop(connection)

    def accept(self, listener):
        """Accept a connection and take in what it brings; say whether there was one."""
        try:
            client, addr = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and self.kept:
                self.drop_one()
                return True
            return error.errno == errno.ECONNABORTED
        client.setblocking(False)
        self.attempt(self.receive, Connection(client, addr))
        return True

    def receive(self, connection):
        if connection.receive():
            self.take(connection)
            return
        if connection.then is None:
            self.keep(connection, self.receive, REQUEST_SECONDS)
        if connection.is_long() and connection is not self.favourite and not self.has_room():
            self.pause(connection)

    def has_room(self):
        """Say whether there is memory for more of the long requests."""
        return (
            sum(len(other.request) for other in self.kept if other.is_long()) + STEP_BYTES
            <= MOST_KEPT_BYTES
        )

    def share_room(self):
        """Let paused requests go on if there is room, else one of them for a while; end those that hold it idly."""
        now, waiting = (
            time.monotonic(),
            sorted(self.paused, key=lambda other: (other.favoured_at, other.lacks())),
        )
        if not self.has_room():
            receiving = [
                other for other in self.kept if other.is_long() and other.then == self.receive
            ]
            for connection in receiving:
                if connection not in self.paused and connection.moved_at < now - STILL_SECONDS:
                    self.attempt(self.expire, connection)
            if self.favourite in self.kept and self.favourite.then == self.receive:
                if now < self.favourite.favoured_at + FAVOUR_SECONDS:
                    return
                self.pause(self.favourite)
            self.favourite, waiting = waiting[0], waiting[:1]
            self.favourite.favoured_at = now
        for connection in self.paused.intersection(waiting):
            self.paused.remove(connection)
            self.selector.register(connection, selectors.EVENT_READ)
            connection.moved_at = now
            connection.until = min(now + REQUEST_SECONDS, connection.began_at + 2 * REQUEST_SECONDS)

    def pause(self, connection):
        self.selector.unregister(connection)
        self.paused.add(connection)

    def take(self, connection):
        """Put a request of which no more will come where it waits for its turn."""
        self.release(connection)
        if not connection.is_whole():
            del connection.request[
                connection.head_length or len(connection.request) :
            ]  # the rest is of no use
        if not connection.request:
            self.drop(connection)
        elif connection.request.startswith(BY_THEMSELVES):
            self.webhooks.append(connection)
        elif len(self.readers) < MOST_READERS:
            connection.until = time.monotonic() + READER_SECONDS
            self.readers.append(connection)
        else:
            self.turn_away(connection)

    def serve_webhooks(self):
        """Hand the app all webhooks that are here, then ask for the replies, so that they share a commit."""
        webhooks, self.webhooks = self.webhooks, []
        for connection in webhooks:
            self.serve(connection, hand_over=True)
        for connection in webhooks:
            if not connection.is_made:
                self.serve(connection)
        self.webhooks += [connection for connection in webhooks if connection.is_waiting]
        return bool(webhooks)

    def serve_reader(self):
        """Serve the reader who has waited longest, if a slot is free; say whether one was served."""
        now = time.monotonic()
        while self.readers and self.readers[0].until < now:
            self.turn_away(self.readers.popleft())
        # Who goes on with a long reply lets others begin: those of this worker, and of others, who look for the slot.
        if now > self.goes_on_until + GIVE_WAY_SECONDS:
            self.goes_on_until = now + GO_ON_SECONDS
        queue = self.longer if self.longer and now < self.goes_on_until else self.readers
        if not queue or not self.take_slot():
            return False
        try:
            self.serve(queue.popleft())
        finally:
            fcntl.lockf(SLOTS, fcntl.LOCK_UN)
        return True

    def take_slot(self):
        """Say whether this worker may serve a reader now: at most all but one do at a time."""
        for slot in range(max(self.cfg.workers - 1, 1)):
            with contextlib.suppress(OSError):
                fcntl.lockf(SLOTS, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
                return True
        return False

    def serve(self, connection, hand_over=False):
        """Make the next part of a reply, and send what the client takes of it; or only hand the request to the app."""
        try:
            connection.parts = connection.parts or self.make_reply(connection)
            for _ in connection.parts:
                if hand_over or connection.is_waiting:
                    return
                if connection.is_made or len(connection.reply) > PART_BYTES:
                    break
        except (ParseException, NoMoreData) as error:
            self.refuse(connection, error)
        except Exception:
            self.log.exception("fault in a request")
            self.reply_with_error(
                connection,
                "500 Internal Server Error",
                "A fault of the collector's own; its log says more.",
            )
        else:
            self.send(connection)

    def make_reply(self, connection):
        """Have the app serve a request; yield when it has it, after each part of its reply, and at the reply's end."""
        if not connection.head_length and len(connection.request) > HEAD_BYTES:
            raise LimitRequestHeaders("too long")
        request = next(http.get_parser(self.cfg, connection.take_request(), connection.addr))
        started, server = datetime.now(), connection.client.getsockname()
        response, environ = wsgi.create(request, connection, connection.addr, server, self.cfg)
        response.force_close()
        environ["collector.serves_others"] = True
        self.nr += 1
        if self.nr >= self.max_requests:
            self.alive = False
        parts = self.wsgi(environ, response.start_response)
        try:
            yield
            for part in parts:
                connection.is_waiting = response.status is None  # the app cannot say yet
                if not connection.is_waiting:
                    response.write(part)
                del part
                yield
            response.close()
            connection.is_made = True
            self.log.access(response, request, environ, datetime.now() - started)
            yield
        finally:
            parts.close()

    def send(self, connection):
        """Send what the client takes now; go on to the next part if that is all, or let the client go."""
        try:
            connection.flush()
            if connection.reply:
                self.keep(connection, self.send, REPLY_SECONDS, selectors.EVENT_WRITE)
            elif not connection.is_made:
                self.release(connection)
                self.longer.append(connection)
            elif connection.said == 0:
                self.drop(connection)
            else:  # to close now would reset the connection, and the reply be lost
                connection.client.shutdown(socket.SHUT_WR)
                self.keep(connection, self.discard, LEAVING_SECONDS)
        except OSError:
            self.drop(connection)

    def discard(self, connection):
        """Pass over what a client sends that has been refused, until it closes."""
        try:
            is_over = not connection.client.recv(1 << 20)
        except BlockingIOError:
            is_over = False
        except OSError:
            is_over = True
        if is_over:
            self.drop(connection)

    def refuse(self, connection, error):
        """Reply to what is no HTTP that can be served."""
        name = type(error).__name__
        status = STATUSES.get(name, "400 Bad Request")
        if not isinstance(error, NoMoreData):
            # gunicorn would log the whole of a line that may have megabytes.
            self.log.warning(
                "no HTTP that can be served, from %s: %s",
                (connection.addr or ["a socket"])[0],
                name,
            )
        words = f"This is no HTTP that can be served ({name}); send a plain request, and all of it."
        self.reply_with_error(connection, status, words)

    def turn_away(self, connection):
        """Refuse a reader who has waited in vain."""
        words = "Other readers keep all workers but the one for webhooks; try again, or raise WEB_CONCURRENCY."
        self.reply_with_error(connection, "503 Service Unavailable", words, "Retry-After: 1\r\n")

    def reply_with_error(self, connection, status, words, header=""):
        """Reply in the one shape of errors, or break off a reply that has begun."""
        if connection.has_begun:
            self.drop(connection)
            return
        head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n{header}\r\n"
        connection.reply[:] = (head + collector.as_json({"error": words})).encode()
        connection.is_made, connection.said = True, math.inf
        self.send(connection)

    def keep(self, connection, then, seconds, events=selectors.EVENT_READ):
        """Keep a connection until its client moves, for some seconds at most; drop others where there are too many."""
        self.release(connection)
        self.selector.register(connection, events)
        self.kept[connection] = None
        connection.then, connection.until = then, time.monotonic() + seconds
        if len(self.kept) > min(
            MOST_KEPT, max(resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FILES, 16)
        ):
            self.drop_one()
        if sum(len(other.reply) for other in self.kept) > MOST_KEPT_BYTES:
            self.drop(max(self.kept, key=lambda other: len(other.reply)))

    def drop_one(self):
        """Drop a connection that is kept, the first without a head, or of all."""
        self.drop(min(self.kept, key=lambda other: other.head_length > 0))

    def release(self, connection):
        if connection in self.kept:
            del self.kept[connection]
            if connection in self.paused:
                self.paused.remove(connection)
            else:
                self.selector.unregister(connection)

    def drop(self, connection):
        """Close a connection; what the app left for after the reply is done when others have theirs."""
        self.release(connection)
        connection.client.close()
        if connection.parts:
            self.served.append(connection)


worker_class = Worker


def on_starting(server):
    if server.cfg.is_ssl or server.cfg.proxy_protocol != "off":
        raise SystemExit(
            "certfile, proxy_protocol: this service speaks plain HTTP; see the README for a proxy in front"
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1024:
        resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (1024 if hard == resource.RLIM_INFINITY else min(1024, hard), hard),
        )
    collector.app_in_use = collector.make_app(settings)
    gc.freeze()  # what is there now stays, and is shared by the workers


def when_ready(server):
    """Let the kernel keep connections until they bring data: browsers open spare ones."""
    for listener in server.LISTENERS:
        if hasattr(socket, "TCP_DEFER_ACCEPT") and listener.sock.family in (
            socket.AF_INET,
            socket.AF_INET6,
        ):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
