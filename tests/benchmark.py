"""Measure the collector, and print each figure beside its target.

    python tests/benchmark.py [--rows 1000000] [--rounds 20] [--only NAME] [--peer]

It needs Linux, and a disk under TMPDIR. Rates are compared with rates measured in turns.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import random
import re
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
from conftest import SECRET, Server, children, select, sign

BODY_BYTES = 20_000  # bytes of a usual delivery
LARGE_BYTES = 5_000_000
MIDDLE = time.strftime("%Y-%m-%d", time.gmtime(time.time() - 45 * 86400))  # of the times of receipt
FORK = multiprocessing.get_context("fork")
RANDOM = random.Random(1)
NAMES = "webhooks large queries neighbours storm".split()  # of the measurements
WORDS = ["".join(parts) for parts in itertools.product("ba ce di fo gu lan mer".split(), repeat=4)]
PROJECTS = "shop api mobile intern".split()
POST = b"POST /sentry/webhook HTTP/1.1\r\nHost: a\r\nConnection: close\r\nRequest-ID: 1\r\n"
FRAME_KEYS = "in_app abs_path colno context_line data errors package platform symbol vars"


def some(values):
    """Return a random value: the second is half as frequent as the first, the third a third ..."""
    return values[int((len(values) + 1) ** RANDOM.random()) - 1]


def make_payload(issue_id, length):
    """Return a payload of `length` bytes with a chained trace, and @EVENT@ for its event id."""
    frames = []
    cause = {"type": some(WORDS).title(), "value": f"{some(WORDS)} is not {some(WORDS)}"}
    cause["stacktrace"] = {"frames": frames}
    event = {"event_id": "@EVENT@", "title": f"{cause['type']}: {cause['value']}"}
    event |= {"level": some(["error", "warning", "fatal"]), "culprit": some(WORDS)}
    event["url"] = f"https://sentry.io/api/0/projects/acme/{some(PROJECTS)}/events/@EVENT@/"
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
    assert status in (200, 201), f"{path} was answered with {status} {reply[:1000]}"
    return 1000 * (time.perf_counter() - started)


def run_client(results, port, requests, start, body_after):
    """Send requests; put their milliseconds and the time of the end."""
    latencies = []
    time.sleep(max(0, start - time.monotonic()))
    for request in requests:
        began = time.monotonic()
        latencies.append(float("inf"))
        with contextlib.suppress(OSError):
            if exchange(port, request, body_after)[9:12] in (b"200", b"201"):
                latencies[-1] = 1000 * (time.monotonic() - began)
    results.put((latencies, time.monotonic()))


class Load:
    """Rate and latencies (ms, infinite if refused) of requests that clients sent at the same time."""

    def __init__(self, server, requests, clients=16, body_after=0, kind=FORK.Process):
        start = time.monotonic() + 0.5 + 0.01 * clients
        queue = FORK.SimpleQueue()
        for index in range(clients):
            mine = (queue, server.port, requests[index::clients], start, body_after)
            kind(target=run_client, args=mine, daemon=True).start()
        results = [queue.get() for _ in range(clients)]
        self.latencies = sorted(itertools.chain(*(result[0] for result in results)))
        self.rate = len(requests) / (max(result[1] for result in results) - start)


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


FILL = """
    WITH RECURSIVE numbers (n) AS (SELECT :first UNION ALL SELECT n + 1 FROM numbers LIMIT :count)
    INSERT INTO errors (received_at, timestamp, identity, issue_id, event_id, title, {0})
    SELECT strftime('%Y-%m-%dT%H:%M:%S.000000Z', :now + (n - :last) * 7776000.0 / :last, 'unixepoch'),
        errors.timestamp, n, abs(random()) % (:last / 100 + 1), printf('%032x', n),
        errors.title || ' n' || n, {0}
    FROM numbers JOIN errors ON errors.id = 1 + n % 1000
"""
FILL_BODIES = """INSERT INTO bodies SELECT errors.id, payload_bytes, payload FROM errors
    JOIN bodies ON bodies.id = 1 + errors.id % 1000 WHERE errors.id > 1000"""
COPIED = "server, category, level, platform, environment, project_slug, culprit, exception_type, exception_value"


def fill(server, count):
    """Deliver 1,000 errors, and copy them in the database until it has `count` of a hundredth as many issues."""
    for number in range(1000):
        body = json.dumps(make_payload(number, 1500)).replace("@EVENT@", f"{number:032x}")
        timed(server, "/sentry/webhook", body.encode(), **sign(body.encode()))
    server.stop()
    with contextlib.closing(sqlite3.connect(server.database)) as connection:
        connection.execute("PRAGMA cache_size = -400000")
        values = {"first": 1001, "count": count - 1000, "last": count, "now": time.time()}
        connection.execute(FILL.format(COPIED), values)
        connection.execute(FILL_BODIES)
        connection.commit()
    return server.start()


def peak_memory(server):
    """Return the megabytes of RAM that the largest worker has had since the last call."""
    peaks = []
    for worker in children(server.process.pid):
        status = Path(f"/proc/{worker}/status").read_text()
        peaks += re.findall(r"VmHWM:\s*([0-9]+)", status)  # none of a child that has ended
        Path(f"/proc/{worker}/clear_refs").write_text("5")
    return max(map(int, peaks)) / 1024


BARE = """
control_socket_disable = True
def app(environ, start_response):
    environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "3")])
    return [b"{}\\n"]
"""
# The usual design in one process: an ORM, one table of the same columns, one commit each.
PEER = """
import sqlite3, time
from fastapi import FastAPI, Request
from sqlalchemy import Column, Integer, LargeBinary, String, create_engine, select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import declarative_base
NAMES = "event_id issue_id title culprit level platform release url web_url type value".split()
Base = declarative_base()
class Error(Base):
    __tablename__ = "errors"
    id, received_at = Column(Integer, primary_key=True), Column(Integer, default=time.time)
    locals().update({name: Column(String, index=name[-3:] == "_id") for name in NAMES})
    body = Column(LargeBinary)
sqlite3.connect("peer.db").execute("PRAGMA journal_mode = WAL")
Base.metadata.create_all(create_engine("sqlite:///peer.db"))
Session = async_sessionmaker(create_async_engine("sqlite+aiosqlite:///peer.db"))
app = FastAPI()
app.get("/health")(lambda: {})
@app.post("/sentry/webhook", status_code=201)
async def receive_webhook(request: Request):
    body = await request.body()
    found = (await request.json())["data"]["error"]
    found |= found["exception"]["values"][-1]
    async with Session() as session:
        known = await session.scalar(select(Error).where(Error.event_id == found["event_id"]))
        if known is None:
            session.add(Error(body=body, **{name: found.get(name) for name in NAMES}))
            await session.commit()
    return {"status": "stored"}
"""

QUERIES = {
    "page": "/ /config /metrics /health /errors/latest /errors/9999 /errors/9999/payload /errors "
    "/errors?limit=1000 /errors?before=9999 /errors?after=9999 /issues /issues?before=9999",
    "frequent filter": f"/errors?project=shop /errors?level=error,fatal /errors?issue=7 /errors?q=ba "
    f"/errors?since={MIDDLE} /errors/latest?project=intern /issues?level=fatal /issues?q=ba",
    "rare filter or word": "/errors?project=no /errors?q=no /errors?q=n99999 /errors?environment=no "
    f"/issues?q=no /errors?release=no&after=9 /issues?project=no /errors?q={'a' * 100}",
}
READS = """/errors/{0} /errors/{0}?format=text /errors/{0}?format=html /errors/{0}/payload /errors
    /errors?format=html /errors?format=ndjson&limit=1 /issues"""
LARGE_EVENTS = {
    "{} frames": {"exception": {"values": [{"stacktrace": {"frames": [{}] * (LARGE_BYTES // 3)}}]}},
    "{} values": {"extra": {"a": [{"": 0}] * (LARGE_BYTES // 7)}},
    "breadcrumbs": {"breadcrumbs": {"values": [{"message": "m"}] * (LARGE_BYTES // 16)}},
    "context keys": {"contexts": {"c": dict.fromkeys(map(str, range(LARGE_BYTES // 15)))}},
}


class Bench:
    """The measurements, their servers, and the table."""

    def __init__(self, options, folder, stack):
        self.options = options
        self.folder = folder
        self.stack = stack  # which ends the servers
        self.verdicts = []

    def start(self, name, code="", *arguments, **env):
        """Return a new server, a collector or else what `code` has, settings and app."""
        server = Server(self.folder / name, SENTRY_CLIENT_SECRET=SECRET, **env)
        self.stack.callback(server.end)
        if not code:
            return server.start()
        (server.folder / f"{name}.py").write_text(code)
        return server.start(*arguments, f"{name}:app", config=f"{name}.py")

    @cached_property
    def big(self):
        """The server of the big database."""
        return fill(self.start("big"), self.options.rows)

    def add(self, what, figure, unit="", target=""):
        """Print a line of the table; a target is like "< 60"."""
        verdict = ""
        if target:
            comparison, bound = target.split()
            is_met = figure >= float(bound) if comparison == ">=" else figure < float(bound)
            verdict = "met" if is_met else "MISSED"
            self.verdicts.append(verdict)
        print(f"{what:<70.70} {figure:>10,.2f} {unit:<4} {target:<8} {verdict}", flush=True)

    def measure_webhooks(self):
        """Measure rates in turns, a burst, an export, and the memory and disk of that."""
        server = self.start("webhooks")
        loads = {server: [], self.start("bare", BARE, WEB_CONCURRENCY="2"): []}
        if self.options.peer:
            path = str(self.folder / "packages")
            pip = "-m pip install -q fastapi sqlalchemy aiosqlite greenlet uvicorn-worker --target"
            subprocess.run([sys.executable, *pip.split(), path], check=True)
            kind = ("--worker-class", "uvicorn_worker.UvicornWorker", "--no-control-socket")
            loads[self.start("peer", PEER, *kind, PYTHONPATH=path, WEB_CONCURRENCY="1")] = []
        peaks = []
        for _ in range(self.options.rounds):
            requests = make_requests(5000)
            for contender, its_loads in loads.items():
                its_loads.append(Load(contender, requests))
            peaks.append(peak_memory(server))
        rates = [statistics.median(load.rate for load in its_loads) for its_loads in loads.values()]
        self.add("webhooks", rates[0], "/s")
        self.add("requests of a bare gunicorn with 2 workers", rates[1], "/s")
        self.add("webhooks: share of bare gunicorn's", rates[0] / rates[1], "", ">= 0.30")
        if self.options.peer:
            self.add("webhooks: times those of FastAPI", rates[0] / rates[2], "", ">= 4")
        p99 = [load.latencies[int(0.99 * len(requests))] for load in loads[server]]
        self.add("webhooks: p99", statistics.median(p99), "ms", "< 60")
        self.add("memory of a worker over the webhooks", max(peaks), "MB", "< 64")
        self.add("of that growth after the first of them", peaks[-1] - peaks[0], "MB", "< 4")
        slowest = Load(server, make_requests(300), clients=300, kind=Thread).latencies[-1]
        self.add("burst of 300 webhooks: slowest", slowest, "ms", "< 1000")
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"GET /errors?format=ndjson HTTP/1.1\r\nHost: a\r\n\r\n")
            while connection.recv(1 << 20):
                pass
        self.add("memory of a worker during an export", peak_memory(server), "MB", "< 64")
        server.stop()
        sql = "SELECT count(*), sum(payload_bytes) FROM bodies"
        ((stored, received),) = select(server.database, sql)
        lost = len(requests) * len(peaks) + 300 - stored
        self.add("acknowledged webhooks that are not stored", lost, "", "< 1")
        share = server.database.stat().st_size / received
        self.add("disk per stored byte of payload", share, "", "< 0.30")

    def measure_large(self):
        """Measure the time to store and read large deliveries, and the memory of that."""
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
            self.add(f"5 MB of {name}: memory of the worker", peak_memory(server), "MB", "< 300")

    def measure_queries(self):
        """Measure pages and queries over the big database beside a small one."""
        servers = [self.big, fill(self.start("small"), 1000)]
        times = [[timed(server, "/errors/latest") for server in servers] for _ in range(200)]
        big, small = map(statistics.median, zip(*times, strict=True))
        self.add("/errors/latest: times that with 1,000 errors", big / small, "", "< 1.3")
        for kind, paths in QUERIES.items():
            p95 = {}
            for path in paths.split():
                for form in ("application/json", "text/html"):
                    times = [timed(self.big, path, Accept=form) for _ in range(20)]
                    p95[f"{path} as {form}"] = sorted(times)[-2]
            slowest = max(p95, key=p95.get)
            may_be_part = kind.startswith("rare") and self.options.rows > 100_000
            target = "< 500" if may_be_part else "< 100"
            self.add(f"slowest {kind} of {len(p95)}: {slowest}", p95[slowest], "ms", target)

    def measure_neighbours(self):
        """Measure the slowest webhook beside hostile neighbours, its body at once or later."""
        kinds = {"nobody": []} | {name: [kind] for name, kind in NEIGHBOURS.items()}
        kinds["all of these"] = NEIGHBOURS.values()
        for name, kind in kinds.items():
            processes = [FORK.Process(target=pester, args=(self.big.port, *each)) for each in kind]
            for process in processes:
                process.start()
            for body_after in (0, 0.1):
                load = Load(self.big, make_requests(100 if body_after else 500), 4, body_after)
                what = f"slowest webhook beside {name}, body {body_after} s after its head"
                self.add(what, load.latencies[-1], "ms", "< 1000")
            for process in processes:
                process.kill()

    def measure_storm(self):
        """Measure the lists while nine of ten errors, the newest, are of one issue."""
        server = self.big
        server.stop()
        with contextlib.closing(sqlite3.connect(server.database)) as connection:
            sql = "UPDATE errors SET issue_id = 'storm', server = 'sentry.io' WHERE id > ?"
            connection.execute(sql, (self.options.rows // 10,))
            connection.commit()
        server.start()
        paths = "/issues /errors?issue=storm /errors/latest /issues?q=no /issues?issue=storm"
        for path in paths.split():
            slowest = max(timed(server, path) for _ in range(5))
            self.add(f"in a storm: {path}", slowest, "ms", "< 500")


def main():
    """Run the measurements that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="of 5,000 webhooks each")
    parser.add_argument("--rows", type=int, default=1_000_000, help="errors in the big database")
    parser.add_argument("--only", choices=NAMES)
    parser.add_argument("--peer", action="store_true", help="install FastAPI, and compare with it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        bench = Bench(options, Path(folder), stack)
        for name in [options.only] if options.only else NAMES:
            getattr(bench, f"measure_{name}")()
    print(f"{bench.verdicts.count('met')} of {len(bench.verdicts)} targets met")


if __name__ == "__main__":
    main()
