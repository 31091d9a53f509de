"""Fixtures: an app on a database of its own, signed deliveries, and a real gunicorn."""

import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import math
import os
import py_compile
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jinja2 import FileSystemBytecodeCache

from collector import Collector, check_folder, create_app, read_settings

# In memory where there is room for it: a database for each test is hundreds of syncs. A kill loses no
# more there than on a disk.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2 * 1024**3:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

ROOT = Path(__file__).resolve().parent.parent
PAYLOADS = Path(__file__).resolve().parent / "payloads"
SECRET = "0123456789abcdef" * 4
SETTINGS = (
    "DATABASE_URL SENTRY_DSN SENTRY_CLIENT_SECRET SENTRY_ACTIONS API_TOKEN PUBLIC_URL "
    "TRUSTED_HOSTS RETENTION_DAYS MAX_BODY_BYTES WEB_CONCURRENCY PORT"
).split()


# Compiled once for all servers and commands, which by PYTHONDONTWRITEBYTECODE would each do it anew.
# A file that has changed since is compiled, whatever its time and size are.
for name in ("collector.py", "worker.py"):
    with contextlib.suppress(OSError):
        py_compile.compile(
            ROOT / name, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
        )

TEMPLATES = FileSystemBytecodeCache()  # compiled once for all apps


@pytest.fixture(autouse=True, scope="session")
def clean_environment(tmp_path_factory):
    """Keep the developer's own settings and .env out of every test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in SETTINGS:
            patch.delenv(name, raising=False)
        patch.chdir(tmp_path_factory.mktemp("clean"))
        yield


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    """Return the bytes of a database that an app has just made."""
    path = tmp_path_factory.mktemp("empty") / "errors.db"
    database = core(create_app({"DATABASE_URL": f"sqlite:///{path}"})).database
    database.connection()
    database.close()
    return path.read_bytes()


@pytest.fixture(scope="session")
def spare_apps():
    """Return a list for apps that no test uses, because half a test's time went into routes."""
    return []


@pytest.fixture
def make_app(tmp_path, empty_database, spare_apps):
    """Return a function that makes an app on tmp_path/data/errors.db, as a worker has it.

    Of an earlier test's app it has only the routes and the templates. Where there is no database
    it gets a copy of an empty one, which takes less than to make it.
    """
    apps = []

    def make(**config):
        config = {"DATABASE_URL": f"sqlite:///{tmp_path}/data/errors.db", **config}
        app = spare_apps.pop() if spare_apps else create_app()
        app.extensions["collector"] = Collector(read_settings(config))
        app.jinja_env.bytecode_cache = TEMPLATES
        path = core(app).database.path
        check_folder(path)
        if not path.exists():
            path.write_bytes(empty_database)
        core(app).start()
        apps.append(app)
        return app

    yield make
    for app in apps:
        core(app).database.close()
    spare_apps += apps


@pytest.fixture
def app(make_app):
    return make_app()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture(scope="session")
def idle_app(tmp_path_factory):
    """Return an app for all tests that store nothing."""
    path = tmp_path_factory.mktemp("idle") / "errors.db"
    app = create_app({"DATABASE_URL": f"sqlite:///{path}"})
    app.jinja_env.bytecode_cache = TEMPLATES
    yield app
    core(app).database.close()


def load(name):
    """Return a payload of tests/payloads as a dict."""
    return json.loads((PAYLOADS / f"{name}.json").read_text(encoding="utf-8"))


def wire(payload):
    """Return the bytes that Sentry sends for a payload."""
    return json.dumps(payload, separators=(",", ":")).encode()


def sign(body, secret=SECRET):
    """Return the headers that sign a body."""
    return {"Sentry-Hook-Signature": hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()}


def event_payload(event_id="0" * 32, **event):
    """Return a small error.created delivery."""
    event = {"event_id": event_id, "title": "ValueError: no", "level": "error", **event}
    return {"action": "created", "data": {"error": event}, "installation": {"uuid": "a"}}


def post(client, payload, **headers):
    """Post a payload (dict or bytes) with a test client; header names are given with underscores."""
    body = payload if isinstance(payload, bytes) else wire(payload)
    return client.post(
        "/sentry/webhook",
        data=body,
        headers={key.replace("_", "-"): value for key, value in headers.items()},
    )


def core(app):
    """Return the app's Collector."""
    return app.extensions["collector"]


def select(app, sql, *values):
    """Return the rows of a query on the app's database, as tuples."""
    return [tuple(row) for row in core(app).database.connection().execute(sql, values)]


def count_rows(app):
    """Return how many errors are stored."""
    return select(app, "SELECT count(*) FROM errors")[0][0]


def event_ids(app):
    """Return the event ids that are stored, in the order of their rows."""
    return [event_id for (event_id,) in select(app, "SELECT event_id FROM errors ORDER BY id")]


def spooled(app):
    """Return how many deliveries wait in the spool."""
    return len(core(app).spool.names())


def maintain(app):
    """Do all the maintenance there is, whether it is due or not, as after a pause."""
    shared = core(app)
    shared.database.paused_until = -math.inf
    shared.due = dict.fromkeys(shared.steps, -math.inf)
    while shared.maintain():
        pass


def counts(client):
    """Return the counts of deliveries as /config shows them, by outcome and reason."""
    core(client.application).write_counts()
    rows = client.get("/config").json["deliveries"]
    return {(row["outcome"], row["reason"]): row["count"] for row in rows}


@contextlib.contextmanager
def locked(path):
    """Hold the write lock of a database, as a VACUUM or somebody's shell would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


@pytest.fixture
def log(caplog):
    """Return a function that returns the lines that the collector has logged so far."""
    logger = logging.getLogger("collector")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="collector")
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.removeHandler(caplog.handler)


def wait_for(condition, seconds=10):
    """Return the condition's first true value; fail if there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {condition}")


gunicorns = []  # all processes of gunicorns; the last is to be the next one


def stand_by():
    """Start a process that waits to be told which gunicorn it is."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "standby.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    gunicorns.append(process)


def start_gunicorn(folder, log, env, *arguments):
    """Return the process of a gunicorn that runs in `folder` and whose output goes to the file `log`."""
    order = {"folder": str(folder), "log": str(log), "env": env, "arguments": arguments}
    if not gunicorns:
        stand_by()
    process = gunicorns[-1]
    process.stdin.write(f"{json.dumps(order)}\n")
    process.stdin.close()
    stand_by()
    return process


def pytest_sessionfinish():
    """End the process that waits, and what a test has left whose server did not come up."""
    for process in gunicorns:
        process.stdin.close()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Server:
    """A real gunicorn with the settings of the README, in a process group of its own."""

    def __init__(self, folder, **env):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder, self.log = Path(folder), Path(folder) / "server.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.env = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        self.env |= {
            "DATABASE_URL": f"sqlite:///{self.folder}/data/errors.db",
            "PORT": str(self.port),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            **env,
        }
        self.process = None

    def start(self, *arguments, app="served:app", wait=True):
        """Start gunicorn in self.folder, where no developer's .env is; its output goes to self.log."""
        config = ROOT / "gunicorn.conf.py"
        self.process = start_gunicorn(
            self.folder, self.log, self.env, "--config", str(config), *arguments, app
        )
        if wait:
            wait_for(self.is_up, 20)
        return self

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.request("GET", "/health")[0] in (200, 503)
        except OSError:
            return False

    def request(self, method, path, body=None, headers=None, timeout=10):
        """Return status, headers and body of one request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def deliver(self, payload, headers=None, timeout=10):
        """Post a payload as Sentry would; return the status and the reply, parsed."""
        body = payload if isinstance(payload, bytes) else wire(payload)
        status, _, reply = self.request("POST", "/sentry/webhook", body, headers, timeout)
        return status, json.loads(reply)

    def get(self, path, **headers):
        """Return the parsed JSON of a path."""
        return json.loads(self.request("GET", path, headers=headers)[2])

    def kill(self):
        """Kill every process of the server at once, as a power cut would."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self):
        """Stop the server if it runs; kill what is left."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process:
            self.kill()


@pytest.fixture
def make_server(tmp_path):
    """Return a function that starts a gunicorn with the settings given; all are killed at the end."""
    servers = []

    def make(*arguments, folder=tmp_path / "server", wait=True, **env):
        servers.append(Server(folder, **env))
        return servers[-1].start(*arguments, wait=wait)

    yield make
    for server in servers:
        server.kill()
