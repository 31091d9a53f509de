"""A WSGI app of a few lines and the settings that serve it, to test worker.py without the collector."""

import json
import os
import resource
import time
from pathlib import Path

if "FILES" in os.environ:  # that a process may have open, which the worker looks at
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(os.environ["FILES"]),) * 2)

import worker

wsgi_app = "bare_app:app"
worker_class = worker.Worker
preload_app = True
control_socket_disable = True
graceful_timeout = 2
timeout = 2
served = []
maintained = []

for name in (
    "REQUEST_SECONDS",
    "READER_SECONDS",
    "PART_SECONDS",
    "YOUNG_SECONDS",
    "IDLE_SECONDS",
    "STOPPING_SECONDS",
):
    setattr(worker, name, float(os.environ.get(name) or getattr(worker, name)))


def app(environ, start_response):
    """Reply with what was asked for: a page once the file `until` is there, an export of `mb` megabytes."""
    query = dict(pair.split("=") for pair in environ["QUERY_STRING"].split("&") if pair)
    served.append(environ["PATH_INFO"])
    body = environ["wsgi.input"].read() if environ["REQUEST_METHOD"] == "POST" else b""
    if "until" in query:
        Path(f"{query['until']}-begun-{os.getpid()}").touch()
        while not Path(query["until"]).exists():
            time.sleep(0.01)
    start_response("200 OK", [("Content-Type", "application/json")])
    if "mb" in query:
        return (bytes(1 << 20) for _ in range(int(query["mb"])))
    facts = {
        "pid": os.getpid(),
        "length": len(body),
        "served": served,
        "maintained": len(maintained),
    }
    return [json.dumps(facts).encode()]


def maintain():
    """Note that it was called, and ask to be called again at once for the first thousand times."""
    maintained.append(time.monotonic())
    return len(maintained) < 1000


def when_ready(server):
    """Leave lines about broken requests out of the log, as gunicorn.conf.py does."""
    server.log.error_log.addFilter(lambda line: not str(line.msg).startswith("Invalid request"))


def post_worker_init(worker):
    """Have the app's own functions called, not those of this file as settings."""
    import bare_app

    worker.maintain = bare_app.maintain
