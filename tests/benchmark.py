"""Measure the collector, and print each figure beside its target.

    python tests/benchmark.py [--quick] [--only NAME] [--peer]

It needs Linux, and keeps its data in a temporary folder: TMPDIR names another place, which has to be
on a disk. Rates depend on the machine, so their targets are ratios to rates measured in turns.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from functools import cached_property
from pathlib import Path
from threading import Thread

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import SECRET, Server, sign

import collector

BODY_BYTES = 20_000  # bytes of a usual delivery
SMALL_BYTES = 1_500  # bytes of a delivery in the big database
LARGE_BYTES = 5_000_000  # bytes of the largest deliveries
MIDDLE = collector.now(days=45)[:10]  # of the time in which the errors were received
FORK = multiprocessing.get_context("fork")
RANDOM = random.Random(1)
NAMES = "webhooks large queries neighbours".split()  # of the measurements
WORDS = ["".join(parts) for parts in itertools.product("ba ce di fo gu lan mer".split(), repeat=4)]
PROJECTS = "shop api billing mobile worker admin search mail reports intern".split()
POST = b"POST /sentry/webhook HTTP/1.1\r\nHost: a\r\nConnection: close\r\nRequest-ID: 1\r\n"
FRAME_KEYS = "in_app abs_path colno context_line data errors package platform symbol vars"


def some(values):
    """Return a random value: the second is half as frequent as the first, the third a third ..."""
    return values[int((len(values) + 1) ** RANDOM.random()) - 1]


def make_payload(issue_id, length):
    """Return a payload of `length` bytes with a chained trace, and @EVENT@ for its event id."""
    project = some(PROJECTS)
    frames = []
    cause = {"type": some(WORDS).title(), "value": f"{some(WORDS)} is not {some(WORDS)}"}
    cause["stacktrace"] = {"frames": frames}
    event = {"event_id": "@EVENT@", "title": f"{cause['type']}: {cause['value']}"}
    event |= {"level": some(["error", "warning", "fatal"]), "platform": "java"}
    event |= {"culprit": some(WORDS), "environment": some(["production", "staging"])}
    event["url"] = f"https://sentry.io/api/0/projects/acme/{project}/events/@EVENT@/"
    event["web_url"] = f"https://acme.sentry.io/issues/{issue_id}/events/@EVENT@/"
    event["exception"] = {"values": [cause, cause, cause]}
    while len(json.dumps(event)) < length:
        module = f"com.acme.{some(WORDS)}.{some(WORDS).title()}"
        place = {"module": module, "function": some(WORDS), "lineno": RANDOM.randrange(900)}
        frames.append(dict.fromkeys(FRAME_KEYS.split()) | place)
    return {"action": "created", "data": {"error": event}, "installation": {"uuid": "a"}}


def make_requests(count):
    """Return the requests of `count` deliveries each with its own event id."""
    bodies = [json.dumps(make_payload(issue_id, BODY_BYTES)) for issue_id in range(50)]
    requests = []
    for _ in range(count):
        body = some(bodies).replace("@EVENT@", uuid.uuid4().hex).encode()
        signature = sign(body)["Sentry-Hook-Signature"]
        rest = f"Sentry-Hook-Signature: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append(POST + rest.encode() + body)
    return requests


def exchange(port, request, body_after=0):
    """Return the reply (bytes) to a request, sending its body some seconds after its head."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head_bytes = request.index(b"\r\n\r\n") + 4 if body_after else 0
        connection.sendall(request[:head_bytes])
        time.sleep(body_after)
        connection.sendall(request[head_bytes:])
        return connection.makefile("rb").read()


def timed(server, path, body=None, **headers):
    """Return the milliseconds of a request, which has to succeed."""
    started = time.perf_counter()
    status, _, reply = server.request("POST" if body else "GET", path, body, headers, 60)
    milliseconds = 1000 * (time.perf_counter() - started)
    if status not in (200, 201):
        raise SystemExit(f"{path} was answered with {status} {reply[:1000]}")
    return milliseconds


def run_client(results, port, requests, start, body_after):
    """Send requests; put their milliseconds, the time of the end, and the CPU seconds."""
    latencies = []
    time.sleep(max(0, start - time.monotonic()))
    used = time.process_time()
    for request in requests:
        began = time.monotonic()
        latencies.append(float("inf"))
        with contextlib.suppress(OSError):
            if exchange(port, request, body_after)[9:12] in (b"200", b"201"):
                latencies[-1] = 1000 * (time.monotonic() - began)
    results.put((latencies, time.monotonic(), time.process_time() - used))


class Load:
    """What came of requests that several clients have sent at the same time."""

    def __init__(self, server, requests, clients=16, body_after=0, kind=FORK.Process):
        start = time.monotonic() + 0.5 + 0.01 * clients
        queue = FORK.SimpleQueue()
        for index in range(clients):
            mine = (queue, server.port, requests[index::clients], start, body_after)
            kind(target=run_client, args=mine, daemon=True).start()
        results = [queue.get() for _ in range(clients)]
        # In milliseconds, infinite where the webhook was not stored.
        self.latencies = sorted(itertools.chain(*(result[0] for result in results)))
        seconds = max(result[1] for result in results) - start
        self.rate = len(requests) / seconds
        self.cores = sum(result[2] for result in results) / seconds  # that the clients took


# Neighbours: connections at a time, what each sends first and then every 0.1 s, seconds it stays

HALF = POST + b"Content-Length: 20000\r\n\r\n{"
NEIGHBOURS = {
    "40 half-sent webhooks": (40, HALF, b"", 4),
    "6 dripping webhooks": (6, HALF, b" ", 5),
    "3 chunked drips": (3, POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 5),
    "20 TLS hellos": (20, b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200), b"", 4),
    "4 sipped exports": (4, b"GET /errors?format=ndjson HTTP/1.1\r\n\r\n", b"", 10),
    "18 clients that stay": (18, b"GET /health HTTP/1.1\r\n\r\n", b"", 3),
    "40 searches a second": (4, b"GET /errors?q=ba&level=error HTTP/1.1\r\n\r\n", b"", 0.1),
}


def pester(port, count, request, drip, seconds):
    """Keep connections that send a request or a part of it, then drip and sip every 0.1 s."""
    held = {}  # time to close, by connection
    while True:
        with contextlib.suppress(OSError):
            while len(held) < count:
                connection = socket.create_connection(("127.0.0.1", port), 5)
                held[connection] = time.monotonic() + seconds
                connection.sendall(request)
                connection.setblocking(False)
        time.sleep(0.1)
        for connection, until in list(held.items()):
            with contextlib.suppress(OSError):
                connection.send(drip)
                connection.recv(2000)
            if time.monotonic() > until:
                connection.close()
                del held[connection]


def fill(folder, count):
    """Make a database of `count` errors of a hundredth as many issues."""
    database = collector.Database(folder / "data" / "errors.db")
    for pragma in ("synchronous = OFF", "wal_autocheckpoint = 10000", "cache_size = -400000"):
        database.connection().execute(f"PRAGMA {pragma}")
    rows = [collector.parse_error(make_payload(i, 0), "error", "") for i in range(count // 100)]
    packed = collector.pack(json.dumps(make_payload(0, SMALL_BYTES)).encode())
    for first in range(0, count, 1000):
        with database.transaction() as connection:
            for number in range(first, first + 1000):
                at = collector.now(days=90 - 90 * number / count)
                row = rows[0] if number == count - 1 else some(rows)  # the newest is frequent
                own = {"received_at": at, "timestamp": at, "event_id": uuid.uuid4().hex}
                own["title"] = f"{row['title']} n{number}"
                collector.insert_error(connection, row | packed | own)
    collector.INDEX_BATCH = 20_000
    while collector.extend_index(database):
        pass
    database.close()


def peak_memory(server):
    """Return the megabytes of RAM that the largest worker has had since the last call."""
    pid = server.process.pid
    peaks = []
    for worker in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        status = Path(f"/proc/{worker}/status").read_text()
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
        Path(f"/proc/{worker}/clear_refs").write_text("5")
    return max(peaks)


BARE = """
control_socket_disable = True
def app(environ, start_response):
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "3")])
    return [b"{}\\n"]
"""
PEER = """
import json, sqlite3
from fastapi import FastAPI, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
control_socket_disable = preload_app = True
worker_class = "uvicorn_worker.UvicornWorker"
SCHEMA = "CREATE TABLE IF NOT EXISTS errors (event_id PRIMARY KEY, title, culprit, level, body);"
sqlite3.connect("peer.db").executescript("PRAGMA journal_mode = WAL;" + SCHEMA)
INSERT = text("INSERT OR IGNORE INTO errors VALUES (:event_id, :title, :culprit, :level, :body)")
engine = create_async_engine("sqlite+aiosqlite:///peer.db")
app = FastAPI()
app.get("/health")(lambda: {})
@app.post("/sentry/webhook")
async def receive_webhook(request: Request):
    body = (await request.body()).decode()
    async with engine.begin() as connection:
        await connection.execute(INSERT, json.loads(body)["data"]["error"] | {"body": body})
"""

QUERIES = {
    "page": """/ /config /metrics /health /errors/latest /errors/9999 /errors/9999/payload /errors
        /errors?limit=1000 /errors?before=9999 /errors?after=9999 /errors?format=atom""",
    "filter": f"""/errors?project=shop /errors?project=no /errors?level=error,fatal&limit=1000
        /errors?project=intern&level=fatal&environment=staging /errors?level=fatal&after=9999
        /errors?issue=7 /errors?issue=1&level=fatal /errors?since=1h /errors?until={MIDDLE}
        /errors?since={MIDDLE}&project=shop /errors/latest?project=intern&until=60d""",
    "search": f"""/errors?q=bababa /errors?q=baba /errors?q=b /errors?q=n9999 /errors?q=no /errors?q={"b." * 40}
        /errors?q=b&until={MIDDLE}&level=fatal /errors?q=bababa+mer+b /errors?q=b&after=9999""",
    "issue list": f"""/issues /issues?limit=1000 /issues?q=b /issues?q=no /issues?before=9999
        /issues?q=tutu&level=fatal /issues?since=1h /issues?level=fatal&until={MIDDLE}""",
}
READS = """/errors/{0} /errors/{0}?format=text /errors/{0}?format=html /errors/{0}/payload /errors
    /errors?format=html /errors?format=atom /errors?format=ndjson&limit=1 /issues"""
LARGE_EVENTS = {
    "{} frames": {"exception": {"values": [{"stacktrace": {"frames": [{}] * (LARGE_BYTES // 3)}}]}},
    "{} values": {"extra": {"a": [{"": 0}] * (LARGE_BYTES // 7)}},
    "exceptions": {"exception": {"values": [{"type": "E"}] * (LARGE_BYTES // 13)}},
    "breadcrumbs": {"breadcrumbs": {"values": [{"message": "m"}] * (LARGE_BYTES // 16)}},
    "tags": {"tags": [["a", "b"]] * (LARGE_BYTES // 10)},
    "one string": {"message": "m" * LARGE_BYTES},
    "4-byte characters": {"title": "\U0001f41b" * (LARGE_BYTES // 4)},
    "context keys": {"contexts": {"c": dict.fromkeys(map(str, range(LARGE_BYTES // 15)))}},
}


class Bench:
    """The measurements, their servers, and the table."""

    def __init__(self, options, folder, stack):
        self.options = options
        self.folder = folder
        self.stack = stack  # which stops the servers at its end
        self.verdicts = []

    def start(self, name, code="", **env):
        """Return a new server, a collector or else what `code` has, settings and app."""
        server = Server(self.folder / name, SENTRY_CLIENT_SECRET=SECRET, **env)
        self.stack.callback(server.stop)
        (server.folder / f"{name}.py").write_text(code)
        arguments = ["--config", f"{name}.py"] if code else []
        return server.start(*arguments, app=f"{name}:app" if code else "served:app")

    @cached_property
    def big(self):
        """The server of the big database."""
        fill(self.folder / "big", 20_000 if self.options.quick else 1_000_000)
        return self.start("big")

    def add(self, what, figure, unit="", target=""):
        """Print a line of the table; a target is like "< 60"."""
        verdict = ""
        if target:
            comparison, bound = target.split()
            is_met = figure >= float(bound) if comparison == ">=" else figure < float(bound)
            verdict = "met" if is_met else "MISSED"
            self.verdicts.append(verdict)
        digits = f"{figure:,.2f}" if figure < 10 else f"{figure:,.0f}"
        print(f"{what:<72.72} {digits:>8} {unit:<4} {target:<8} {verdict}", flush=True)

    def measure_webhooks(self):
        """Measure rates in turns, the memory of that, and a burst."""
        server = self.start("webhooks")
        loads = {server: [], self.start("bare", BARE, WEB_CONCURRENCY="2"): []}
        if self.options.peer:
            path = str(self.folder / "packages")
            pip = "-m pip install -q fastapi sqlalchemy aiosqlite greenlet uvicorn-worker --target"
            subprocess.run([sys.executable, *pip.split(), path], check=True)
            loads[self.start("peer", PEER, PYTHONPATH=path, WEB_CONCURRENCY="4")] = []
        peaks = []
        for _ in range(4 if self.options.quick else 20):
            requests = make_requests(1500 if self.options.quick else 5000)
            for contender, its_loads in loads.items():
                its_loads.append(Load(contender, requests))
            peaks.append(peak_memory(server))
        rates = [statistics.median(load.rate for load in its_loads) for its_loads in loads.values()]
        self.add("webhooks", rates[0], "/s")
        self.add("requests of a bare gunicorn with 2 workers", rates[1], "/s")
        self.add("cores that the clients take in the last round", its_loads[-1].cores)
        self.add("webhooks: share of bare gunicorn's", rates[0] / rates[1], "", ">= 0.30")
        if self.options.peer:
            self.add("webhooks: times those of FastAPI", rates[0] / rates[2], "", ">= 4")
        p99 = [load.latencies[int(0.99 * len(requests))] for load in loads[server]]
        self.add("webhooks: p99", statistics.median(p99), "ms", "< 60")
        self.add("memory of a worker over the webhooks", max(peaks), "MB", "< 64")
        self.add("of that growth after the first of them", peaks[-1] - peaks[0], "MB", "< 4")
        burst = Load(server, make_requests(300), clients=300, kind=Thread)
        self.add("burst of 300 webhooks: slowest", burst.latencies[-1], "ms", "< 1000")
        self.measure_stored(server, len(requests) * len(peaks) + 300)

    def measure_stored(self, server, sent):
        """Measure the memory of an export, and the disk that the stored webhooks take."""
        export = FORK.Process(target=timed, args=(server, "/errors?format=ndjson"))
        export.start()
        export.join(60)
        export.kill()
        self.add("memory of a worker during an export", peak_memory(server), "MB", "< 64")
        timed(server, "/errors?q=any")  # completes the search index
        server.stop()
        path = server.folder / "data" / "errors.db"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            sql = "SELECT count(*), sum(payload_bytes) FROM bodies"
            stored, received = connection.execute(sql).fetchone()
        self.add(f"webhooks of {sent:,} that are not stored", sent - stored, "", "< 1")
        self.add("disk per stored byte of payload", path.stat().st_size / received, "", "< 0.30")

    def measure_large(self):
        """Measure how long it takes to store and read large deliveries, and the memory of that."""
        server = self.start("large", WEB_CONCURRENCY="1")
        for number, name in enumerate(LARGE_EVENTS, 1):
            event = LARGE_EVENTS[name] | {"event_id": f"{number:032}"}
            payload = {"action": "created", "data": {"error": event}}
            body = json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode()
            peak_memory(server)
            times = {"POST": timed(server, "/sentry/webhook", body, **sign(body))}
            times |= {path: timed(server, path) for path in READS.format(number).split()}
            slowest = max(times, key=times.get)
            self.add(f"5 MB of {name}: slowest is {slowest}", times[slowest], "ms", "< 1000")
            self.add(f"5 MB of {name}: memory of the worker", peak_memory(server), "MB", "< 250")

    def measure_queries(self):
        """Measure pages and queries over the big database."""
        fill(self.folder / "small", 1000)
        servers = [self.big, self.start("small")]
        times = [[timed(server, "/errors/latest") for server in servers] for _ in range(200)]
        big, small = map(statistics.median, zip(*times, strict=True))
        self.add("/errors/latest: times that with 1,000 errors", big / small, "", "< 1.2")
        count = 5 if self.options.quick else 50
        for kind, paths in QUERIES.items():
            p99 = {}
            for path in paths.split():
                for form in ("application/json", "text/html"):
                    times = [timed(self.big, path, Accept=form) for _ in range(count)]
                    p99[f"{path} as {form}"] = sorted(times)[int(0.99 * count)]
            slowest = max(p99, key=p99.get)
            self.add(f"slowest {kind} of {len(p99)}: {slowest}", p99[slowest], "ms", "< 100")

    def measure_neighbours(self):
        """Measure the slowest webhook beside hostile neighbours, its body at once or later."""
        kinds = {"nobody": []} | {name: [kind] for name, kind in NEIGHBOURS.items()}
        kinds["all of these"] = NEIGHBOURS.values()
        for name, kind in kinds.items():
            processes = []
            for neighbour in kind:
                arguments = (self.big.port, *neighbour)
                processes.append(FORK.Process(target=pester, args=arguments, daemon=True))
                processes[-1].start()
            for body_after in (0, 0.1):
                load = Load(self.big, make_requests(100 if body_after else 500), 4, body_after)
                what = f"slowest webhook beside {name}, body {body_after} s after its head"
                self.add(what, load.latencies[-1], "ms", "< 1000")
            for process in processes:
                process.kill()


def main():
    """Run the measurements that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 rows instead of 1,000,000")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--peer", action="store_true", help="install FastAPI, and compare with it")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        disk = subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip()
        versions = f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"
        print(f"{os.cpu_count()} cores, {versions}, {disk}")
        bench = Bench(options, Path(folder), stack)
        for name in [options.only] if options.only else NAMES:
            getattr(bench, f"measure_{name}")()
    print(f"{bench.verdicts.count('met')} of {len(bench.verdicts)} targets met")


if __name__ == "__main__":
    main()
