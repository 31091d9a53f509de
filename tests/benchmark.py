"""Measure the collector, and print each figure beside its target.

    python tests/benchmark.py [--quick] [--only NAME] [--peer]

It needs Linux, and keeps its data in a temporary folder: TMPDIR names another place, which has to be on
a disk. Rates depend on the machine, so their targets are ratios to rates that are measured in turns.
"""

import argparse
import contextlib
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
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import SECRET, Server, sign

import collector

BODY_BYTES = 20_000  # bytes of a usual delivery
SMALL_BYTES = 1_500  # bytes of a delivery in the big database
LARGE_BYTES = 5_000_000  # bytes of the largest deliveries
DAYS = timedelta(days=90)  # time in which the errors of a database were received
MIDDLE = (datetime.now(UTC) - DAYS / 2).strftime("%Y-%m-%d")
FORK = multiprocessing.get_context("fork")
RANDOM = random.Random(1)

# Deliveries, made of random words

SYLLABLES = "ba ce di fo gu lan mer nis por tu".split()
WORDS = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in SYLLABLES]
PROJECTS = "shop api billing mobile worker admin search mail reports intern".split()
FRAME_KEYS = "abs_path colno context_line data errors package platform raw_function symbol vars"


def some(values):
    """Return a random value: the second is half as frequent as the first, the third a third ..."""
    return values[int((len(values) + 1) ** RANDOM.random()) - 1]


def make_frame():
    """Return a frame as Sentry sends those of Java, most of whose keys are null."""
    module = f"com.acme.{some(WORDS)}.{some(WORDS).title()}"
    place = {"module": module, "function": some(WORDS), "lineno": RANDOM.randrange(900)}
    return dict.fromkeys(FRAME_KEYS.split()) | place | {"in_app": "ba" in module}


def make_payload(issue_id, length):
    """Return a payload of `length` bytes with a chained trace, and @EVENT@ for its event id."""
    project = some(PROJECTS)
    kind = some(WORDS).title() + "Exception"
    value = f"{some(WORDS)} {some(WORDS)} was not {some(WORDS)} of {some(WORDS)}"
    frames = [make_frame()]
    event = {
        "event_id": "@EVENT@",
        "title": f"{kind}: {value}",
        "culprit": f"{some(WORDS)}.{some(WORDS)}",
        "level": some(["error", "warning", "fatal"]),
        "environment": some(["production", "staging"]),
        "platform": "java",
        "exception": {"values": [{"type": kind, "value": value, "stacktrace": {"frames": frames}}]},
        "url": f"https://sentry.io/api/0/projects/acme/{project}/events/@EVENT@/",
        "web_url": f"https://acme.sentry.io/issues/{issue_id}/events/@EVENT@/",
    }
    event["exception"]["values"] *= 3
    while len(json.dumps(event)) < length:
        frames.append(make_frame())
    return {"action": "created", "data": {"error": event}, "installation": {"uuid": "a"}}


def make_requests(count):
    """Return the requests of `count` deliveries, each with an event id of its own."""
    bodies = [json.dumps(make_payload(issue_id, BODY_BYTES)).encode() for issue_id in range(50)]
    requests = []
    for _ in range(count):
        requests.append(post(some(bodies).replace(b"@EVENT@", uuid.uuid4().hex.encode())))
    return requests


POST = (
    b"POST /sentry/webhook HTTP/1.1\r\nHost: collector.example.com\r\nConnection: close\r\n"
    b"Accept: */*\r\nAccept-Encoding: gzip, deflate\r\nContent-Type: application/json\r\n"
    b"User-Agent: sentry/25.6.0 (https://sentry.io)\r\nRequest-ID: 2f4e6a8c0b1d3f5a7c9e\r\n"
    b"Sentry-Hook-Resource: error\r\nSentry-Hook-Timestamp: 1769860800\r\n"
)


def post(body):
    """Return the request that delivers a body, as Sentry sends it."""
    signature = sign(body)["Sentry-Hook-Signature"]
    rest = f"Sentry-Hook-Signature: {signature}\r\nContent-Length: {len(body)}\r\n\r\n"
    return POST + rest.encode() + body


def get(path):
    """Return the request that reads a path."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()


# Load: a process for each client, a connection for each request


def exchange(port, request, body_after=0):
    """Return the reply to a request (bytes), whose body is sent `body_after` seconds after its head."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        head_bytes = request.index(b"\r\n\r\n") + 4 if body_after else 0
        connection.sendall(request[:head_bytes])
        time.sleep(body_after)
        connection.sendall(request[head_bytes:])
        parts = []
        while part := connection.recv(1 << 18):
            parts.append(part)
        return b"".join(parts)


def timed(server, request):
    """Return the milliseconds of a request, which has to succeed."""
    started = time.perf_counter()
    reply = exchange(server.port, request)
    milliseconds = 1000 * (time.perf_counter() - started)
    if reply[9:12] not in (b"200", b"201"):
        raise SystemExit(f"{request[:100]} was answered with {reply[:1000]}")
    return milliseconds


def run_client(results, port, requests, start, body_after):
    """Send requests; put their milliseconds, how many were stored, the time and the CPU seconds."""
    latencies = []
    stored = 0
    time.sleep(max(0, start - time.monotonic()))
    used = time.process_time()
    for request in requests:
        began = time.monotonic()
        with contextlib.suppress(OSError):
            stored += exchange(port, request, body_after)[9:12] in (b"200", b"201")
        latencies.append(1000 * (time.monotonic() - began))
    results.put((latencies, stored, time.monotonic(), time.process_time() - used))


def start_process(function, *arguments):
    """Return a new process that runs a function."""
    process = FORK.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


class Load:
    """What came of requests that several clients have sent at the same time."""

    def __init__(self, server, requests, clients=16, body_after=0):
        start = time.monotonic() + 0.5 + 0.01 * clients
        queue = FORK.SimpleQueue()
        for index in range(clients):
            mine = requests[index::clients]
            start_process(run_client, queue, server.port, mine, start, body_after)
        results = [queue.get() for _ in range(clients)]
        self.latencies = []  # milliseconds, the fastest first
        for latencies, *_ in results:
            self.latencies = sorted(self.latencies + latencies)
        self.stored = sum(result[1] for result in results)
        seconds = max(result[2] for result in results) - start
        self.rate = len(requests) / seconds
        self.cores = sum(result[3] for result in results) / seconds  # that the clients took


# Neighbours: connections at a time, what each sends first and then every 0.1 s, seconds it stays

HALF = POST + b"Content-Length: 20000\r\n\r\n{"
NEIGHBOURS = {
    "40 half-sent webhooks": (40, HALF, b"", 4),
    "6 dripping webhooks": (6, HALF, b" ", 9),
    "3 chunked drips": (3, POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 9),
    "20 TLS hellos": (20, b"\x16\x03\x01\x02\x00\x01\x00" + bytes(200), b"", 4),
    "4 sipped exports": (4, get("/errors?format=ndjson"), b"", 60),
    "18 clients that stay": (18, get("/health"), b"", 3),
    "40 searches a second": (4, get("/errors?q=ba&level=error&format=html"), b"", 0.1),
}


def pester(port, count, request, drip, seconds):
    """Keep connections that send a request, or a part of it, then drip and take a sip every 0.1 s."""
    held = {}  # time to close, by connection
    while True:
        with contextlib.suppress(OSError):
            while len(held) < count:
                connection = socket.create_connection(("127.0.0.1", port), 5)
                held[connection] = time.monotonic() + seconds
                connection.sendall(request)
                connection.setblocking(False)
        time.sleep(0.1)
        for connection in list(held):
            try:
                connection.send(drip)
                connection.recv(2000)
            except BlockingIOError:
                pass
            except OSError:
                held[connection] = 0
            if time.monotonic() > held[connection]:
                connection.close()
                del held[connection]


# Servers


def fill(folder, count):
    """Make a database of `count` errors of a hundredth as many issues."""
    database = collector.Database(folder / "data" / "errors.db")
    for pragma in ("synchronous = OFF", "wal_autocheckpoint = 10000", "cache_size = -400000"):
        database.connection().execute(f"PRAGMA {pragma}")
    rows = []
    for issue_id in range(count // 100):
        payload = make_payload(issue_id, SMALL_BYTES)
        row = collector.parse_error(payload, "error", "")
        rows.append(row | collector.pack(json.dumps(payload).encode()))
    for first in range(0, count, 1000):
        with database.transaction() as connection:
            for number in range(first, first + 1000):
                at = collector.in_microseconds(datetime.now(UTC) - DAYS * (1 - number / count))
                row = some(rows) | {"received_at": at, "timestamp": at}
                row["event_id"] = uuid.uuid4().hex
                row["title"] += f" n{number}"
                collector.insert_error(connection, row)
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

# What is measured

QUERIES = {
    "page": """/ /config /metrics /health /errors/latest /errors/9999 /errors/9999/payload /errors
        /errors?limit=1000 /errors?before=9999 /errors?after=9999 /errors?format=atom""",
    "filter": f"""/errors?project=shop /errors?project=intern&level=fatal&environment=staging
        /errors?project=no /errors?level=error,fatal&limit=1000 /errors?level=fatal&after=9999
        /errors?issue=7 /errors?issue=1&level=fatal /errors?since=1h /errors?until={MIDDLE}
        /errors?since={MIDDLE}&project=shop /errors?until=85d&level=fatal
        /errors/latest?project=intern&until=60d""",
    "search": f"""/errors?q=bababa /errors?q=b /errors?q=n /errors?q=n9999 /errors?q=nothing
        /errors?q=bababa+bababace+mer /errors?q=b+c+d+f+g+l+m+n+p+t /errors?q=tutu&project=intern
        /errors?q=b&before=9999 /errors?q=b&after=9999 /errors?q=b&until={MIDDLE}&level=fatal
        /errors?q=exception&limit=1000 /errors?q=bababa+n&platform=java""",
    "issue list": f"""/issues /issues?limit=1000 /issues?project=intern /issues?q=b /issues?q=no
        /issues?q=tutu&level=fatal /issues?since=1h /issues?until={MIDDLE} /issues?before=9999
        /issues?level=fatal&project=intern&until=60d""",
}
READS = """/errors/{0}?format=json /errors/{0}?format=text /errors/{0}?format=html /errors/{0}/payload
    /errors /errors?format=html /errors?format=text /errors?format=atom /issues /issues?format=html
    /errors?format=ndjson&limit=1"""


def repeat(value):
    """Return a list of a value, as long as JSON as the largest deliveries."""
    return [value] * (LARGE_BYTES // (len(json.dumps(value, separators=(",", ":"))) + 1))


LARGE_EVENTS = {
    "{} frames": {"exception": {"values": [{"stacktrace": {"frames": repeat({})}}]}},
    "frames of a key": {"exception": {"values": [{"stacktrace": {"frames": repeat({"": 0})}}]}},
    "exceptions": {"exception": {"values": repeat({"type": "E"})}},
    "breadcrumbs": {"breadcrumbs": {"values": repeat({"message": "m"})}},
    "tags": {"tags": repeat(["a", "b"])},
    "one string": {"message": "m" * LARGE_BYTES},
    "4-byte characters": {"title": "\U0001f41b" * (LARGE_BYTES // 4)},
    "context keys": {"contexts": {"c": dict.fromkeys(map(str, range(LARGE_BYTES // 15)))}},
}


class Bench:
    """The measurements, their servers, and the table."""

    def __init__(self, options, folder):
        self.options = options
        self.folder = folder
        self.servers = []
        self.verdicts = []

    def start(self, name, code="", **env):
        """Return a new server, a collector or else what `code` has, settings and app."""
        server = Server(self.folder / name, SENTRY_CLIENT_SECRET=SECRET, **env)
        (server.folder / f"{name}.py").write_text(code)
        self.servers.append(server)
        arguments = ["--config", f"{name}.py", f"{name}:app"] if code else []
        return server.start(*arguments)

    def start_contenders(self):
        """Return the servers whose rates are compared, by name."""
        contenders = {
            "bare gunicorn, 2 workers": self.start("bare", BARE, WEB_CONCURRENCY="2"),
            "the collector": self.start("webhooks"),
        }
        if self.options.peer:
            target = self.folder / "packages"
            packages = "fastapi sqlalchemy aiosqlite greenlet uvicorn-worker".split()
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", target]
            subprocess.run([*command, *packages], check=True)
            peer = self.start("peer", PEER, PYTHONPATH=str(target), WEB_CONCURRENCY="4")
            contenders["FastAPI + SQLAlchemy + aiosqlite"] = peer
        return contenders

    @cached_property
    def big(self):
        """The server of the big database."""
        started = time.monotonic()
        rows = 20_000 if self.options.quick else 1_000_000
        fill(self.folder / "big", rows)
        self.add(f"filling a database with {rows:,} errors", time.monotonic() - started, "s")
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
        """Measure rates in turns, a burst, and the memory and the disk that the webhooks took."""
        contenders = self.start_contenders()
        server = contenders["the collector"]
        self.add("memory of a worker at its start", peak_memory(server), "MB", "< 64")
        loads = {name: [] for name in contenders}
        peaks = []
        for _ in range(4 if self.options.quick else 20):
            requests = make_requests(1500 if self.options.quick else 5000)
            for name, contender in contenders.items():
                loads[name].append(Load(contender, requests))
            peaks.append(peak_memory(server))
        rates = []
        for name in contenders:
            rates.append(statistics.median(load.rate for load in loads[name]))
            cores = statistics.median(load.cores for load in loads[name])
            self.add(f"webhooks of {name} (the clients take {cores:.2f} cores)", rates[-1], "/s")
        self.add("webhooks: share of bare gunicorn's", rates[1] / rates[0], "", ">= 0.30")
        if self.options.peer:
            self.add("webhooks: times FastAPI's", rates[1] / rates[2], "", ">= 4")
        loads = loads["the collector"]
        p99 = statistics.median(load.latencies[int(0.99 * len(requests))] for load in loads)
        self.add("webhooks: p99", p99, "ms", "< 60")
        loads.append(Load(server, make_requests(300), clients=300))
        self.add("burst of 300 webhooks: slowest", loads[-1].latencies[-1], "ms", "< 1000")
        stored = sum(load.stored for load in loads)
        self.add("webhooks not stored", len(peaks) * len(requests) + 300 - stored, "", "< 1")
        self.add(f"memory of a worker over {stored:,} webhooks", max(peaks), "MB", "< 64")
        self.add("of that growth after the first webhooks", peaks[-1] - peaks[0], "MB", "< 4")
        self.measure_stored(server, stored)

    def measure_stored(self, server, acknowledged):
        """Measure the memory of an export, and the disk that the stored webhooks take."""
        export = start_process(timed, server, get("/errors?format=ndjson"))
        export.join(60)
        export.kill()
        self.add("memory of a worker during an export", peak_memory(server), "MB", "< 64")
        timed(server, get("/errors?q=any"))  # completes the search index
        server.stop()
        path = server.folder / "data" / "errors.db"
        sql = "SELECT count(*), sum(payload_bytes) FROM bodies"
        with contextlib.closing(sqlite3.connect(path)) as connection:
            stored, received = connection.execute(sql).fetchone()
        self.add("webhooks that were acknowledged and are lost", acknowledged - stored, "", "< 1")
        self.add("disk per stored byte of payload", path.stat().st_size / received, "", "< 0.30")

    def measure_large(self):
        """Measure how long it takes to store and read large deliveries, and the memory of that."""
        server = self.start("large", WEB_CONCURRENCY="1")
        for number, name in enumerate(LARGE_EVENTS, 1):
            event = LARGE_EVENTS[name] | {"event_id": f"{number:032}"}
            payload = {"action": "created", "data": {"error": event}}
            body = json.dumps(payload, separators=(",", ":"), ensure_ascii=False).encode()
            peak_memory(server)
            times = {"POST": timed(server, post(body))}
            for path in READS.format(number).split():
                times[path] = timed(server, get(path))
            slowest = max(times, key=times.get)
            self.add(f"5 MB of {name}: slowest is {slowest}", times[slowest], "ms", "< 1000")
            self.add(f"5 MB of {name}: memory of the worker", peak_memory(server), "MB", "< 250")

    def measure_queries(self):
        """Measure pages and queries over the big database, in two forms where there are two."""
        fill(self.folder / "small", 1000)
        times = {self.big: [], self.start("small"): []}
        for _ in range(100 if self.options.quick else 500):
            for server, its_times in times.items():
                its_times.append(timed(server, get("/errors/latest")))
        big, small = [statistics.median(its_times) for its_times in times.values()]
        self.add("/errors/latest: times that with 1,000 errors", big / small, "", "< 1.2")
        for kind, paths in QUERIES.items():
            p99 = {}
            for path in paths.split():
                for accept in ("application/json", "text/html"):
                    request = get(path).replace(
                        b"Connection", f"Accept: {accept}\r\nConnection".encode()
                    )
                    latencies = [
                        timed(self.big, request) for _ in range(5 if self.options.quick else 50)
                    ]
                    p99[f"{path} as {accept}"] = max(latencies)
            slowest = max(p99, key=p99.get)
            self.add(f"slowest {kind} of {len(p99)}: {slowest}", p99[slowest], "ms", "< 100")

    def measure_neighbours(self):
        """Measure the slowest webhook beside hostile neighbours, its body with its head or later."""
        kinds = {"nobody": []} | {name: [kind] for name, kind in NEIGHBOURS.items()}
        kinds["all of these"] = NEIGHBOURS.values()
        for name, kind in kinds.items():
            processes = [start_process(pester, self.big.port, *one) for one in kind]
            for body_after in (0, 0.1):
                requests = make_requests(500 if body_after == 0 else 100)
                load = Load(self.big, requests, 4, body_after)
                what = f"slowest webhook beside {name}, body {body_after} s after its head"
                self.add(what, load.latencies[-1], "ms", "< 1000")
                if load.stored < len(requests):
                    self.add("of these not stored", len(requests) - load.stored, "", "< 1")
            for process in processes:
                process.kill()


NAMES = "webhooks large queries neighbours".split()


def main():
    """Run the measurements that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20,000 rows instead of 1,000,000")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--peer", action="store_true", help="install FastAPI, and compare with it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="collector-benchmark-") as folder:
        disk = subprocess.check_output(["stat", "-f", "-c", "%T", folder], text=True).strip()
        python = sys.version.split()[0]
        print(f"{os.cpu_count()} cores, Python {python}, SQLite {sqlite3.sqlite_version}, {disk}")
        bench = Bench(options, Path(folder))
        try:
            for name in [options.only] if options.only else NAMES:
                getattr(bench, f"measure_{name}")()
        finally:
            for server in bench.servers:
                server.stop()
    print(f"{bench.verdicts.count('met')} of {len(bench.verdicts)} targets met")


if __name__ == "__main__":
    main()
