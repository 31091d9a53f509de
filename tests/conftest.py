"""What the tests share: an app on a database of its own, deliveries as Sentry sends them, a real gunicorn.

    def test_it(app, database, log):
        client = app(API_TOKEN="t0ken")              a test client; called again: as after a restart
        client.deliver(payload, Request_ID="1")      posts a dict or bytes, signed by **sign(body)
        assert client.errors("level=fatal") == [1]   the ids of a list
        assert database("SELECT title FROM errors") == [("no",)]
        assert counts(client) == {("stored", None): 1} and "webhook stored 1" in log()[0]

    def test_it(server):
        it = server(WEB_CONCURRENCY="2")             a gunicorn that is up, killed after the test
        it.deliver(payload), it.get("/"), it.request("GET", "/errors"), it.kill(), it.start()

Wider fixtures take make_client(folder, **settings), and `with serving(folder, **settings) as server:`.
"""

import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from flask.testing import FlaskClient

from collector import create_app

MEMORY = Path("/dev/shm")  # spares hundreds of syncs, where there is room
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * 1024**3:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

ROOT = Path(__file__).resolve().parent.parent
PAYLOADS = ROOT / "tests" / "payloads"
SECRET = "0123456789abcdef" * 4
SETTINGS = (
    "DATABASE_URL SENTRY_DSN SENTRY_CLIENT_SECRET SENTRY_ACTIONS API_TOKEN PUBLIC_URL".split()
)
SETTINGS += "TRUSTED_HOSTS RETENTION_DAYS MAX_BODY_BYTES WEB_CONCURRENCY PORT".split()


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory):
    """Keep the developer's own settings and .env out of every test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        patch.chdir(tmp_path_factory.mktemp("clean"))
        yield


def load(name):
    """Return a payload of tests/payloads as a dict."""
    return json.loads((PAYLOADS / f"{name}.json").read_text(encoding="utf-8"))


def wire(payload):
    """Return the bytes that Sentry sends for a payload; bytes stay what they are."""
    if isinstance(payload, bytes):
        return payload
    return json.dumps(payload, separators=(",", ":")).encode()


def sign(body, secret=SECRET):
    """Return the headers that sign a body."""
    return {"Sentry-Hook-Signature": hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


def event_payload(event_id="0" * 32, **event):
    """Return a small error.created delivery. A number becomes an event id."""
    if isinstance(event_id, int):
        event_id = f"{event_id:032x}"
    event = {"event_id": event_id, "title": "ValueError: no", "level": "error", **event}
    return {"action": "created", "data": {"error": event}, "installation": {"uuid": "a"}}


def issue_event(number, issue, host="tea.sentry.io", **event):
    """Return a small delivery of an issue on a host, whose event id is the number."""
    url = f"https://{host}/organizations/tea/issues/{issue}/events/{number}/"
    return event_payload(number, **{"issue_id": str(issue), "web_url": url} | event)


def spooled(folder):
    """Return the files that wait in the spool, in their order."""
    return sorted((folder / "data" / "spool").glob("*.delivery"))


def put(folder, name, body, head=("2026-06-01T08:30:00.000000Z", "error")):
    """Put a file into the spool as a version of the collector did."""
    spool = folder / "data" / "spool"
    spool.mkdir(parents=True, exist_ok=True)
    (spool / f"{name}.delivery").write_bytes(json.dumps(head).encode() + b"\n" + body)


class Client(FlaskClient):
    """A test client that posts as Sentry does, and lets the app finish each reply as a server does."""

    def open(self, *args, **options):
        return super().open(*args, **{"buffered": True, **options})

    def deliver(self, payload, **headers):
        """Post a payload (dict or bytes); header names are given with underscores or dashes."""
        body = wire(payload)
        return self.post(
            "/sentry/webhook",
            data=body,
            headers={name.replace("_", "-"): value for name, value in headers.items()},
            environ_overrides={"CONTENT_LENGTH": str(len(body))},
        )

    def errors(self, query=""):
        """Return the ids that /errors lists for a query."""
        reply = self.get(f"/errors?{query}")
        assert reply.status_code == 200, reply.text
        return [error["id"] for error in reply.json]


def make_client(folder, **settings):
    """Return a client of a new app on folder/data/errors.db."""
    (folder / "data" / "spool").mkdir(parents=True, exist_ok=True)
    app = create_app({"DATABASE_URL": f"sqlite:///{folder}/data/errors.db", **settings})
    app.test_client_class = Client
    return app.test_client()


def core(client):
    """Return what the routes of a client's app share, which has `maintain` and `close`."""
    return client.application.extensions["collector"]


def maintain(client):
    """Do the maintenance that is due; all of it is in an app that has just been made."""
    for _ in range(10_000):
        if not core(client).maintain():
            return
    raise AssertionError("maintenance has no end")


def counts(client, **headers):
    """Return the counts of deliveries by (outcome, reason), those in memory written first."""
    core(client).close()
    rows = client.get("/config", headers=headers).json["deliveries"]
    return {(row["outcome"], row["reason"]): row["count"] for row in rows}


@pytest.fixture
def app(tmp_path):
    """Return a function that makes an app with the settings given, and returns its client."""
    with contextlib.ExitStack() as stack:

        def make(**settings):
            client = make_client(tmp_path, **settings)
            stack.callback(core(client).close)
            return client

        yield make


@pytest.fixture
def client(app):
    return app()


def select(path, sql, *values):
    """Return the rows of a query on a database, as tuples; nothing is written."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(sql, values).fetchall()


@pytest.fixture
def path(tmp_path):
    """Return the path of the database of `app`."""
    return tmp_path / "data" / "errors.db"


@pytest.fixture
def database(path):
    """Return a function that returns the rows of a query on the database of `app`."""
    return lambda sql, *values: select(path, sql, *values)


def write(path, sql, *values):
    """Run a statement on a database and commit it."""
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(sql, values)
        connection.commit()


@contextlib.contextmanager
def locked(path):
    """Hold the write lock of a database, as a VACUUM or somebody's shell would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


@pytest.fixture
def log(caplog):
    """Return a function that returns the lines that the collector has logged in this process."""
    caplog.set_level(logging.INFO, logger="gunicorn.error")
    return lambda: [record.getMessage() for record in caplog.records]


def wait_for(condition, seconds=20):
    """Return the condition's first true value; fail if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {condition}")


def children(pid):
    """Return the processes that a process has started, none if it has ended."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return [int(child) for child in file.read_text().split()]
    return []


def start_gunicorn(folder, log, env, *arguments):
    """Return the process of a gunicorn that runs in `folder` and whose output goes to the file `log`."""
    command = [Path(sys.executable).with_name("gunicorn"), *arguments]
    with open(log, "ab") as output:
        options = {"stdout": output, "stderr": output, "start_new_session": True}
        return subprocess.Popen(command, cwd=folder, env=env, **options)


class Server:
    """A real gunicorn with the settings of the README, in a process group and a folder of its own."""

    def __init__(self, folder, **env):
        # Bound, but not listening: while the server is down nobody else is given its port.
        self.place = socket.socket()
        self.place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.place.bind(("127.0.0.1", 0))
        self.port = self.place.getsockname()[1]
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "server.log"
        self.database = self.folder / "data" / "errors.db"
        self.env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
        self.env |= {"DATABASE_URL": f"sqlite:///{self.database}", "PORT": str(self.port)}
        self.env |= {"PYTHONPATH": str(ROOT), **env}
        self.process = None

    def start(self, *arguments, config=ROOT / "gunicorn.conf.py", wait=True):
        """Start gunicorn in the folder, where no developer's .env is; return this server."""
        options = ["--config", config, *arguments]
        self.process = start_gunicorn(self.folder, self.log, self.env, *options)
        if wait:
            wait_for(self.is_up)
        return self

    def is_up(self):
        """Return True once it answers; fail if it has ended."""
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError):
            return self.request("GET", "/health")[0] in (200, 503)

    def request(self, method, path, body=None, headers=None, timeout=20):
        """Return status, headers and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def deliver(self, payload, headers=None):
        """Post a payload as Sentry would; return the status and the reply, parsed."""
        status, _, reply = self.request("POST", "/sentry/webhook", wire(payload), headers)
        return status, json.loads(reply)

    def get(self, path, **headers):
        """Return the parsed JSON of a path."""
        return json.loads(self.request("GET", path, headers=headers)[2])

    def spooled(self):
        """Return the files that wait in the spool."""
        return sorted((self.folder / "data" / "spool").glob("*.delivery"))

    def workers(self):
        """Return the process ids of the workers."""
        return children(self.process.pid)

    def stop(self):
        """Ask the server to end; return its exit status."""
        self.process.terminate()
        return self.process.wait(20)

    def kill(self):
        """Kill every process of the server at once, as a power cut would."""
        if self.process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def end(self):
        """Kill the server, and give its port back."""
        self.kill()
        self.place.close()


@contextlib.contextmanager
def serving(folder, **env):
    """Run a gunicorn on a folder with the settings given."""
    server = Server(folder, **env)
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture
def server(tmp_path):
    """Return a function that starts a gunicorn with the settings given; all are killed at the end."""
    with contextlib.ExitStack() as stack:

        def make(*arguments, folder=tmp_path / "server", wait=True, **env):
            server = Server(folder, **env)
            stack.callback(server.end)
            return server.start(*arguments, wait=wait)

        yield make
