"""Measure the collector beside a bare server and bare SQLite, in one run, and print the figures beside their targets.

    python tests/benchmark.py [--quick] [--rows N] [--seconds S] [--seed N] [--csv FILE]

Run it with the Python that has the packages of requirements.txt; it needs no others, and uses wrk if that is installed.
It makes its data in a temporary folder (TMPDIR names another; it should be on a disk, since on tmpfs a sync costs
nothing), starts its own servers on free ports, and removes both at the end. A full run takes 10 to 15 minutes and up to
13 GB of disk, a quick one half a minute; Linux only. Figures of different runs differ with whatever else the machine
does; what is compared by a ratio was measured in turns within this run. A missed target does not change the exit
status, a delivery that was acknowledged and is not there does.
"""

import argparse
import csv
import hashlib
import hmac
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from array import array
from collections import Counter, namedtuple
from contextlib import ExitStack, closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from collector import parse_error  # noqa: E402

SECRET = "0123456789abcdef" * 4
WORKERS, CLIENTS = 2, 16
BODY_BYTES = 20_000
fork = multiprocessing.get_context("fork")


# --------------------------------------------------------------------------------------------------
# Deliveries: made up, but in the form, the size and the words of real ones
# --------------------------------------------------------------------------------------------------

# Source lines come from the standard library, because made-up ones do not compress as real ones do.
SOURCES = (
    "argparse ast calendar cmd configparser copy csv difflib doctest fractions ftplib inspect mailbox pdb pickle "
    "shutil smtplib socket subprocess tarfile textwrap threading traceback uuid zipimport"
).split()
NOUNS = (
    "account address agent amount archive article asset balance bank basket batch bill booking branch budget buffer "
    "campaign card cart catalog category channel charge checkout client comment company connection contact contract "
    "coupon currency customer dashboard database delivery device discount document domain email employee event export "
    "feature feed file filter folder form gateway group image import index inventory invoice item job key language "
    "ledger license limit link list location login member message meter model module note notification number object "
    "offer option order package page parcel partner password payment permission photo plan policy portal position post "
    "price product profile project promotion property provider quantity query queue quote rate receipt record refund "
    "region report request reservation resource result review role route rule salary schedule schema score screen "
    "section seller server service session setting shipment signal source stock store stream subscription supplier "
    "table task tax team template tenant term theme ticket token topic tracking transaction transfer upload user value "
    "vehicle vendor version video voucher wallet warehouse webhook widget window worker zone"
).split()
VERBS = "build check close create delete fetch find import load merge open parse print read refresh render save".split()
ENDS = "missing,not found,is not valid,timed out,was refused,has no default,already exists,out of range".split(
    ","
)
EXCEPTIONS = (
    "KeyError ValueError TypeError AttributeError ConnectionError TimeoutError IntegrityError OperationalError "
    "PermissionError ValidationError NotFoundError IndexError ZeroDivisionError AssertionError"
).split()
PROJECTS = {  # in the order of how many errors they have; a project has one platform, so many pairs match nothing
    "shop": "javascript", "api": "python", "billing": "java", "mobile": "cocoa", "worker": "python", "admin": "php",
    "search": "go", "mail": "node", "reports": "ruby", "intern": "csharp",
}  # fmt: skip
ALL, PLAIN = "all platforms, most with source lines", "chained traces without source lines"
WITH_VARIABLES, WITHOUT_SOURCE = ("python", "php"), ("java", "cocoa", "csharp")
FRAME_KEYS = (
    "abs_path colno context_line data errors filename function image_addr in_app instruction_addr lineno module "
    "package platform post_context pre_context raw_function symbol symbol_addr trust vars"
).split()
OLD_PROJECT = "legacy"  # the oldest tenth has it, and level debug
RARE_WORD, SINGLE_WORD = "quokka", "zyzzyva"  # in one of 10,000 errors, in one


def falling(count):
    """Return cumulative weights that fall as those of words do: half of the first for the second, then a third ..."""
    return list(itertools.accumulate(1 / (index + 1) for index in range(count)))


def read_source(name):
    """Return the lines of a module of the standard library, and where in it code may crash: (line number, function)."""
    lines = (
        (Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8").splitlines()
    )
    places, function = [], "<module>"
    for number, line in enumerate(lines):
        found = re.match(r"\s*def (\w+)", line)
        function = found[1] if found else function
        if re.match(r" {8,}[a-z]", line) and number > 5:
            places.append((number, function))
    return lines, places


class Traffic:
    """Errors and deliveries from a seed: a few issues have most errors, a few words make most texts.

    Without source, the templates are those of platforms that send none: chained traces, which compress to an eighth,
    where source lines and variables compress to a quarter.
    """

    def __init__(self, seed, templates=200, with_source=True):
        self.random = random.Random(seed)
        syllables = [
            first + second
            for first in "bcdfghklmnprstvz"
            for second in ("a", "e", "i", "o", "u", "an", "er")
        ]
        tail = {
            "".join(self.random.choices(syllables, k=self.random.choice((2, 3, 4))))
            for _ in range(8000)
        }
        self.words = NOUNS + sorted(tail)
        self.word_weights = falling(len(self.words))
        self.sources = {name: read_source(name) for name in SOURCES}
        issues = [self.make_issue(index) for index in range(templates)]
        issues = [issue for issue in issues if with_source or issue["platform"] in WITHOUT_SOURCE]
        self.templates = [self.make_template(issue) for issue in issues]

    def some_words(self, count):
        return self.random.choices(self.words, cum_weights=self.word_weights, k=count)

    def make_issue(self, index):
        """Return what the errors of one issue have in common, as columns."""
        choose = self.random.choice
        project = (
            self.random.choices(list(PROJECTS), cum_weights=falling(len(PROJECTS)))[0]
            if index
            else "shop"
        )
        first, second, *more = self.some_words(5)
        kind = choose(EXCEPTIONS)
        value = f"{choose(VERBS)} {first} @NUMBER@: {second} {choose(ENDS)} ({' '.join(more)})"
        return {
            "issue_id": str(4_100_000_000 + index),
            "short_id": f"{project.upper()}-{index:X}",
            "project_slug": project,
            "platform": PROJECTS[project],
            "level": self.random.choices(("error", "warning", "fatal", "info"), (85, 8, 4, 3))[0],
            "environment": self.random.choices(
                ("production", "staging", "development"), (75, 20, 5)
            )[0],
            "exception_type": kind,
            "exception_value": value,
            "title": f"{kind}: {value}",
            "message": value,
            "culprit": f"{project}.{choose(NOUNS)}.{first} in {choose(VERBS)}_{second}",
        }

    def make_frame(self, platform, files, values):
        """Return a place in one of `files` as a frame in Sentry's form, most of whose keys are null."""
        if platform in WITHOUT_SOURCE:
            first, second = self.random.choices(NOUNS, cum_weights=falling(len(NOUNS)), k=2)
            module = f"com.acme.{first}.{second.title()}{self.random.choice(('Service', 'Handler', 'Store'))}"
            function, number = (
                f"{self.random.choice(VERBS)}{first.title()}",
                self.random.randrange(900),
            )
            found = {
                "filename": f"{second.title()}.java",
                "module": module,
                "function": function,
                "lineno": number,
            }
            return dict.fromkeys(FRAME_KEYS) | found | {"in_app": True, "data": {"orig_in_app": 1}}
        name = self.random.choice(files)
        lines, places = self.sources[name]
        number, function = self.random.choice(places)
        found = {
            "filename": f"{name}.py",
            "abs_path": f"/usr/src/app/lib/{name}.py",
            "module": name,
        }
        found |= {
            "function": function,
            "lineno": number + 1,
            "in_app": name < "f",
            "data": {"orig_in_app": 1},
        }
        found |= {"pre_context": lines[max(number - 5, 0) : number], "context_line": lines[number]}
        found |= {"post_context": lines[number + 1 : number + 6], "vars": None}
        if platform in WITH_VARIABLES:
            names = dict.fromkeys(
                re.findall(r"[a-z_]{3,}", "".join(lines[number - 5 : number + 1]))
            )
            found["vars"] = {
                name: values.setdefault(name, self.make_value()) for name in list(names)[:6]
            }
        return dict.fromkeys(FRAME_KEYS) | found

    def make_value(self):
        """Return what Sentry's SDK says of a variable."""
        word, number = self.random.choice(self.words), self.random.randrange(10**6)
        address = f"0x7f{self.random.getrandbits(40):010x}"
        return self.random.choice(
            ("None", f"'{word}'", f"<{word.title()} at {address}>", f"{number}", f"['{word}']")
        )

    def make_template(self, issue):
        """Return the body of an issue's deliveries, with @EVENT@ and @NUMBER@ where one differs from the next."""
        project, at = issue["project_slug"], "2026-01-31T12:00:00.000000Z"
        tags = {
            "level": issue["level"],
            "environment": issue["environment"],
            "server_name": f"{project}-3",
        }
        tags |= {
            "runtime": "CPython 3.11.7",
            "transaction": f"/{project}/@NUMBER@",
            "user": "id:@NUMBER@",
        }
        frames, files, values = [], self.random.choices(SOURCES, k=4), {}
        event = {
            "event_id": "@EVENT@", "project": 5_000_000, "release": f"{project}@2.31.0", "dist": None,
            "platform": issue["platform"], "message": "", "datetime": at, "tags": [list(tag) for tag in tags.items()],
            "breadcrumbs": {"values": [self.make_crumb(number) for number in range(12)]},
            "contexts": {"runtime": {"name": "CPython", "version": "3.11.7", "type": "runtime"},
                         "trace": {"trace_id": "@EVENT@", "span_id": f"{self.random.getrandbits(64):016x}"}},
            "culprit": issue["culprit"], "environment": issue["environment"],
            "exception": {"values": [{"type": issue["exception_type"], "value": issue["exception_value"],
                                      "module": "builtins", "mechanism": {"type": "wsgi", "handled": False},
                                      "stacktrace": {"frames": frames}}]},
            "fingerprint": ["{{ default }}"], "hashes": [f"{self.random.getrandbits(128):032x}"],
            "level": issue["level"],
            "logger": "", "metadata": {"type": issue["exception_type"], "value": issue["exception_value"]},
            "modules": {name: f"{self.random.randrange(9)}.{self.random.randrange(30)}.1" for name in NOUNS[:40]},
            "received": 1769860800.25, "request": {"method": "POST", "url": f"https://{project}.example.com/@NUMBER@"},
            "sdk": {"name": "sentry.python.flask", "version": "2.20.0"}, "timestamp": 1769860800.0,
            "title": issue["title"], "type": "error", "version": "7", "issue_id": issue["issue_id"],
            "url": f"https://sentry.io/api/0/projects/acme/{project}/events/@EVENT@/",
            "web_url": f"https://acme.sentry.io/issues/{issue['issue_id']}/events/@EVENT@/",
            "issue_url": f"https://sentry.io/api/0/organizations/acme/issues/{issue['issue_id']}/",
        }  # fmt: skip
        payload = {
            "action": "created",
            "installation": {"uuid": "65027794-169a-4042-80d0-808ece377141"},
        }
        payload |= {
            "data": {"error": event},
            "actor": {"type": "application", "id": "sentry", "name": "Sentry"},
        }
        chain = event["exception"]["values"]
        if (
            issue["platform"] in WITHOUT_SOURCE
        ):  # chained, as Java's are: each cause has the outer frames again
            chain[:0] = [json.loads(json.dumps(chain[0])) for _ in range(2)]
        length = len(json.dumps(payload, separators=(",", ":")))
        while length < BODY_BYTES - 500:
            frames.append(self.make_frame(issue["platform"], files, values))
            length += (len(json.dumps(frames[-1], separators=(",", ":"))) + 1) * len(chain)
        for cause in chain[:-1]:
            cause["type"], cause["stacktrace"]["frames"] = self.random.choice(EXCEPTIONS), frames
        return json.dumps(payload, separators=(",", ":")).encode()

    def make_crumb(self, number):
        first, second, third = self.some_words(3)
        message = f"SELECT {first}, {second} FROM {third} WHERE id = @NUMBER@ AND {first} > {self.random.random():.6f}"
        crumb = {
            "timestamp": 1769860700 + number * 1.37,
            "type": "default",
            "category": "query",
            "level": "info",
        }
        return crumb | {"message": message, "data": None}

    def bodies(self, count):
        """Return the bodies of `count` deliveries, each with an event id of its own."""
        found = []
        for template in self.random.choices(self.templates, k=count):
            event, number = (
                b"%032x" % self.random.getrandbits(128),
                b"%07d" % self.random.randrange(10**7),
            )
            found.append(template.replace(b"@EVENT@", event).replace(b"@NUMBER@", number))
        return found

    def rows(self, count, days=90):
        """Yield the rows of `count` errors that came over some days, as parse_error would make them, and a payload."""
        packed = [(zlib.compress(body, 1), len(body)) for body in self.bodies(len(self.templates))]
        base = parse_error(json.loads(self.templates[0]), "error", "")
        issues = [base | self.make_issue(index) for index in range(max(count // 50, 50))]
        start, weights = datetime.now(UTC) - timedelta(days=days), falling(len(issues))
        chosen = self.random.choices(issues, cum_weights=weights, k=count)
        for index, issue in enumerate(chosen):
            at = f"{start + timedelta(days=days) * (index / count):%Y-%m-%dT%H:%M:%S.%fZ}"
            row = issue | {
                "received_at": at,
                "timestamp": at,
                "event_id": f"{self.random.getrandbits(128):032x}",
            }
            number = str(self.random.randrange(10**7))
            if index < count // 10 and index % 10 == 0:
                row |= {"project_slug": OLD_PROJECT, "level": "debug"}
            number += f" {RARE_WORD}" if index % 10_000 == 5_000 else ""
            number += f" {SINGLE_WORD}" if index == count // 3 else ""
            for column in ("title", "message", "exception_value"):
                row[column] = row[column].replace("@NUMBER@", number)
            payload, length = packed[index % len(packed)]
            yield row | {"payload": payload, "payload_bytes": length}


def sign(body):
    """Return the request that delivers a body, as Sentry sends it."""
    head = (
        "POST /sentry/webhook HTTP/1.1\r\nHost: collector.example.com\r\nAccept: */*\r\n"
        "Accept-Encoding: gzip, deflate\r\n"
        "Connection: close\r\nContent-Type: application/json\r\nRequest-ID: 2f4e6a8c0b1d3f5a7c9e0d2b4f6a8c1e\r\n"
        "Sentry-Hook-Resource: error\r\nSentry-Hook-Timestamp: 1769860800\r\n"
        "User-Agent: sentry/25.6.0 (https://sentry.io)\r\n"
        f"Sentry-Hook-Signature: {hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


# --------------------------------------------------------------------------------------------------
# Servers
# --------------------------------------------------------------------------------------------------

BARE = """
def bare(environ, start_response):
    environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", "3")])
    return [b"{}\\n"]


def flask():
    from flask import Flask, request

    app = Flask(__name__)

    @app.post("/sentry/webhook")
    def receive_webhook():
        request.get_data()
        return {}

    return app
"""
SETTINGS = (
    "DATABASE_URL SENTRY_DSN SENTRY_CLIENT_SECRET SENTRY_ACTIONS API_TOKEN RETENTION_DAYS MAX_BODY_BYTES "
    "GUNICORN_CMD_ARGS"
).split()


def free_port():
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))
        return probe.getsockname()[1]


class Server:
    """A gunicorn in a process group of its own."""

    def __init__(self, folder, config, *arguments, **env):
        self.folder, self.port = Path(folder), free_port()
        self.folder.mkdir(exist_ok=True)
        self.env = {key: value for key, value in os.environ.items() if key not in SETTINGS}
        self.env |= {
            "PYTHONPATH": str(ROOT),
            "PORT": str(self.port),
            "WEB_CONCURRENCY": str(WORKERS),
            **env,
        }
        command = [sys.executable, "-m", "gunicorn", "--config", str(config), *arguments]
        self.log = self.folder / "server.log"
        with self.log.open("wb") as log:
            # In a folder of its own, where no .env of the developer's is.
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self, path="/sentry/webhook", seconds=30):
        """Wait until the server answers and all its workers are there."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError):
                fetch(self.port, get(path))
                if len(self.workers()) == WORKERS:
                    return self
            time.sleep(0.02)
        raise SystemExit(f"a server did not start:\n{self.log.read_text()}")

    def workers(self):
        """Return the process ids of the workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]

    def memory(self):
        """Return the megabytes of the largest worker (PSS)."""
        found = []
        for pid in self.workers():
            with suppress(OSError):
                found.append(
                    int(
                        re.search(r"Pss:\s+(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1]
                    )
                    / 1024
                )
        return max(found)

    def cpu(self):
        """Return the seconds that the workers have computed."""
        times = [
            Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1].split() for pid in self.workers()
        ]
        return sum(int(fields[11]) + int(fields[12]) for fields in times) / os.sysconf("SC_CLK_TCK")

    def stop(self):
        """Stop the server, and kill what is left of it."""
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        end_group(self.process)


def end_group(process):
    """Kill a process and all in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def start_collector(stack, folder):
    """Return a running collector on folder/data/errors.db; it ends with the stack."""
    url = f"sqlite:///{folder}/data/errors.db"
    server = Server(
        folder, ROOT / "gunicorn.conf.py", DATABASE_URL=url, SENTRY_CLIENT_SECRET=SECRET
    )
    stack.callback(server.stop)
    return server.wait("/health")


def start_bare(stack, folder, app):
    """Return a running gunicorn with plain settings on one of the apps of BARE; it ends with the stack."""
    folder.mkdir()
    (folder / "bare.py").write_text(BARE)
    config = folder / "plain.py"
    config.write_text(
        f"workers = {WORKERS}\nworker_class = 'sync'\ncontrol_socket_disable = True\n"
    )
    server = Server(folder, config, app)  # gunicorn takes port and workers from the environment
    stack.callback(server.stop)
    return server.wait()


# --------------------------------------------------------------------------------------------------
# Load: several processes on raw sockets, a connection for each request as Sentry makes it, requests made beforehand
# --------------------------------------------------------------------------------------------------

Load = namedtuple("Load", "latencies statuses seconds cpu")
PATIENCE = struct.pack(
    "ll", 20, 0
)  # seconds; set in the kernel, because Python's own time-outs cost a call each


def exchange(address, request):
    """Return the reply (bytes) to a request, read to the length it states or else to its end."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, PATIENCE)
        connection.connect(address)
        connection.sendall(request)
        reply = connection.recv(65536)
        head, ends, _ = reply.partition(b"\r\n\r\n")
        found = re.search(rb"\r\nContent-Length: (\d+)", head)
        length = len(head) + len(ends) + int(found[1]) if found and ends else sys.maxsize
        parts, got = [reply], len(reply)
        while got < length and parts[-1]:
            parts.append(connection.recv(262144))
            got += len(parts[-1])
        return b"".join(parts)


def get(path):
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n\r\n".encode()


def fetch(port, request):
    """Return the seconds and the status of a request."""
    started = time.perf_counter()
    reply = exchange(("127.0.0.1", port), request)
    return time.perf_counter() - started, int(reply[9:12] or 0)


def start_process(target, *arguments):
    """Start a process that runs a function; an interrupt from the terminal is left to its parent, which ends it."""
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = fork.Process(target=target, args=arguments, daemon=True)
        process.start()
    finally:
        signal.signal(signal.SIGINT, kept)
    return process


def run_client(pipe, address, requests, start, end):
    """Send requests one after the other from `start` to `end` (monotonic); send what came of it through a pipe."""
    latencies, statuses, clock = array("d"), Counter(), time.monotonic
    time.sleep(max(start - clock(), 0))
    before = resource.getrusage(resource.RUSAGE_SELF)
    begun = clock()
    for request in requests:
        if begun >= end:
            break
        try:
            status = exchange(address, request)[9:12]
        except OSError as error:
            status = type(error).__name__.encode()
        done = clock()
        latencies.append(done - begun)
        statuses[status] += 1
        begun = done
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    pipe.send((latencies, statuses, begun, cpu))
    pipe.close()


def load(port, requests, seconds, again=False, at_end=()):
    """Send requests from CLIENTS processes for some seconds, or until there are no more; `again` begins anew then.

    `at_end` are functions to call when 60 % of the time is over.
    """
    start, clients = time.monotonic() + 0.1, []
    for index in range(CLIENTS):
        mine = itertools.cycle(requests[index::CLIENTS]) if again else requests[index::CLIENTS]
        reader, writer = fork.Pipe(duplex=False)
        # An address for each client, because one alone would run out of ports.
        address = (f"127.0.0.{index + 1}", port)
        clients.append(
            (start_process(run_client, writer, address, mine, start, start + seconds), reader)
        )
        writer.close()
    if at_end:
        time.sleep(max(start + 0.6 * seconds - time.monotonic(), 0))
        for function in at_end:
            function()
    parts = [reader.recv() for _, reader in clients]
    for process, reader in clients:
        process.join()
        reader.close()
    latencies = sorted(itertools.chain.from_iterable(part[0] for part in parts))
    ended = max(part[2] for part in parts)
    return Load(
        latencies,
        sum((part[1] for part in parts), Counter()),
        ended - start,
        sum(part[3] for part in parts),
    )


def percentile(latencies, share):
    """Return the value that `share` of the sorted latencies do not exceed."""
    return latencies[max(math.ceil(share * len(latencies)) - 1, 0)]


def run_wrk(folder, port, requests, seconds):
    """Return what wrk measures with the same requests: how many per second, and the p99 in milliseconds."""
    for index in range(2):
        with (folder / f"requests.{index}").open("wb") as file:
            for request in requests[index::2]:
                file.write(b"%d\n%b" % (len(request), request))
    (folder / "post.lua").write_text(WRK_SCRIPT)
    command = [
        "wrk",
        "--threads",
        "2",
        "--connections",
        str(CLIENTS),
        "--duration",
        f"{max(round(seconds), 1)}s",
        "--latency",
    ]
    command += [
        "--script",
        str(folder / "post.lua"),
        f"http://127.0.0.1:{port}/sentry/webhook",
        "--",
        str(folder),
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    p99, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", said).groups()
    return float(re.search(r"Requests/sec:\s+([\d.]+)", said)[1]), float(p99) * {
        "us": 0.001,
        "ms": 1,
        "s": 1000,
    }[unit]


WRK_SCRIPT = """
local count = 0
function setup(thread) thread:set("number", count) count = count + 1 end
local requests, at = {}, 0
function init(args)
    local file = io.open(args[1] .. "/requests." .. number, "rb")
    while true do
        local length = file:read("*l")
        if not length then break end
        requests[#requests + 1] = file:read(tonumber(length))
    end
    file:close()
end
function request() at = at % #requests + 1 return requests[at] end
"""


# --------------------------------------------------------------------------------------------------
# Measurements: each adds results
# --------------------------------------------------------------------------------------------------

Result = namedtuple("Result", "what measured unit ratio target met")


class Bench:
    """What the measurements share: the options, the folder, the traffic, the results and the line of progress."""

    def __init__(self, options, folder, stack):
        self.options, self.folder, self.stack = options, folder, stack
        self.results, self.started = [], time.monotonic()
        self.traffic, self.plain_traffic = (
            Traffic(options.seed),
            Traffic(options.seed, with_source=False),
        )

    def say(self, words=""):
        """Show what is being done, where somebody is looking."""
        if sys.stderr.isatty():
            at = f"{time.monotonic() - self.started:4.0f} s  {words}" if words else ""
            print(
                f"\r\033[K{at[: shutil.get_terminal_size().columns - 1]}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def head(self, words):
        self.results.append(words)

    def add(self, what, measured, unit, ratio=None, target=""):
        """Add a result; `target` is a bound of the figure, as "< 64", or one of its ratio, as "ratio >= 0.35"."""
        met = None
        if target:
            value, bound = (
                ratio if target.startswith("ratio") else measured,
                float(target.split()[-1]),
            )
            met = value >= bound if ">=" in target else value < bound
        self.results.append(Result(what, measured, unit, ratio, target, met))

    def requests(self, count, traffic=None):
        return [sign(body) for body in (traffic or self.traffic).bodies(int(count))]


class Sample:
    """What the rounds of one contender gave."""

    def __init__(self):
        self.rates, self.latencies, self.cpu, self.done, self.client_cpu, self.seconds = (
            [],
            [],
            0,
            0,
            0,
            0,
        )
        self.statuses = Counter()

    def take(self, found, cpu):
        self.rates.append(len(found.latencies) / found.seconds)
        self.latencies = sorted([*self.latencies, *found.latencies])
        self.statuses += found.statuses
        self.cpu, self.client_cpu, self.seconds = (
            self.cpu + cpu,
            self.client_cpu + found.cpu,
            self.seconds + found.seconds,
        )


def insert_raw(connection, bodies, seconds):
    """Insert the rows of deliveries for some seconds, a transaction each; what makes the rows is not timed."""
    columns = [row[1] for row in connection.execute("PRAGMA table_info(errors)")][1:]
    sql = f"INSERT INTO errors ({', '.join(columns)}) VALUES ({', '.join(f':{name}' for name in columns)})"
    latencies, cpu = array("d"), 0
    for body in bodies:
        row = parse_error(json.loads(body), "error", "2026-01-31T12:00:00.000000Z")
        row |= {"payload": zlib.compress(body, 1), "payload_bytes": len(body)}
        before, begun = time.process_time(), time.perf_counter()
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(sql, row)
        connection.execute("COMMIT")
        latencies.append(time.perf_counter() - begun)
        cpu += time.process_time() - before
        if (total := sum(latencies) if len(latencies) % 50 == 0 else 0) > seconds:
            break
    total = sum(latencies)
    return Load(sorted(latencies), Counter(), total, 0), cpu


def open_raw(path):
    """Return a connection to a new database that differs from the collector's in nothing."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + (ROOT / "schema.sql").read_text()
    )
    return connection


def measure_webhooks(bench, server, traffic, words):
    """Let the contenders take the same deliveries in turns; the targets are ratios to the bare gunicorn app."""
    folder = bench.folder / f"beside {server.folder.name}"
    folder.mkdir()
    bare = start_bare(bench.stack, folder / "bare", "bare:bare")
    flask = start_bare(bench.stack, folder / "flask", "bare:flask()")
    raw = bench.stack.enter_context(closing(open_raw(folder / "raw.db")))
    contenders = {
        "bare gunicorn": bare,
        "bare Flask": flask,
        "collector": server,
        "raw SQLite": raw,
    }
    samples = {name: Sample() for name in contenders}
    rounds, names = bench.options.rounds, list(contenders)
    seconds = bench.options.seconds / rounds
    for turn in range(rounds):
        bench.say(f"webhooks, round {turn + 1} of {rounds}: making deliveries")
        bodies = traffic.bodies(int(3500 * seconds))
        requests = [sign(body) for body in bodies]
        for name in names[turn % 4 :] + names[: turn % 4]:
            bench.say(f"webhooks, round {turn + 1} of {rounds}: {name}")
            if name == "raw SQLite":
                samples[name].take(*insert_raw(raw, bodies, seconds))
                continue
            before = contenders[name].cpu()
            found = load(contenders[name].port, requests, seconds, again=name != "collector")
            samples[name].take(found, contenders[name].cpu() - before)
    report_webhooks(bench, samples, words)
    if shutil.which("wrk"):
        bench.say("webhooks: wrk")
        requests = bench.requests(3500 * max(round(seconds), 1), traffic)
        rates = {
            name: run_wrk(bench.folder, contenders[name].port, requests, seconds)
            for name in names[:3]
        }
        for name, (rate, p99) in rates.items():
            bench.add(f"{name}, by wrk: webhooks", rate, "/s", rate / rates["bare gunicorn"][0])
            bench.add(f"{name}, by wrk: p99", p99, "ms", p99 / rates["bare gunicorn"][1])
    for contender in (bare, flask):
        contender.stop()
    return samples["collector"].statuses[b"201"]


def report_webhooks(bench, samples, words):
    """Add the figures of the contenders; a rate is the median of its rounds, a ratio that of the rounds' ratios."""
    bench.head(
        f"webhooks: {WORKERS} workers, {CLIENTS} clients, {BODY_BYTES // 1000} kB signed, synced; {words}"
    )
    bare = samples["bare gunicorn"]
    for name, sample in samples.items():
        ours = name == "collector"
        ratio = statistics.median(
            rate / other for rate, other in zip(sample.rates, bare.rates, strict=True)
        )
        rate = statistics.median(sample.rates)
        bench.add(f"{name}: webhooks", rate, "/s", ratio, "ratio >= 0.35" if ours else "")
        for share, what, target in (
            (0.5, "p50", ""),
            (0.99, "p99", "< 40"),
            (1, "slowest", "< 1000"),
        ):
            value, other = (1000 * percentile(each.latencies, share) for each in (sample, bare))
            bench.add(f"{name}: {what}", value, "ms", value / other, target if ours else "")
        cpu, other = (1000 * each.cpu / len(each.latencies) for each in (sample, bare))
        bench.add(f"{name}: CPU of a webhook", cpu, "ms", cpu / other)
        wrong = {
            status.decode(): count
            for status, count in sample.statuses.items()
            if status not in (b"200", b"201")
        }
        if wrong:
            bench.add(f"{name}: NOT TAKEN {wrong}", sum(wrong.values()), "", None, "< 1")
    busy = bare.client_cpu / bare.seconds / os.cpu_count()
    bench.add("load generator: share of all cores beside bare gunicorn", 100 * busy, "%")
    could = len(bare.latencies) / bare.client_cpu * os.cpu_count()
    bench.add(
        "load generator: what all cores could send",
        could,
        "/s",
        could / statistics.median(bare.rates),
    )


def check_stored(folder, acknowledged):
    """End the run unless every acknowledged delivery is there."""
    with closing(sqlite3.connect(folder / "data" / "errors.db")) as connection:
        stored = connection.execute("SELECT count(*) FROM errors").fetchone()[0]
    if stored < acknowledged:
        raise SystemExit(f"{acknowledged} deliveries were acknowledged, {stored} are stored")
    return stored


def measure_memory(bench, server, at_start, taken):
    """Follow the memory of the largest worker over many webhooks (as many as fit in 150 seconds) and an export."""
    total, warm, until = bench.options.webhooks, None, time.monotonic() + 150
    while (taken < total and time.monotonic() < until) or warm is None:
        bench.say(f"memory: {taken:,} of {total:,} webhooks")
        found = load(server.port, bench.requests(min(5000, max(total - taken, 500))), 600)
        taken += found.statuses[b"201"]
        if warm is None:
            warm = server.memory()
    after = server.memory()
    bench.say("memory: export")
    started, (size, peak) = time.monotonic(), drain_export(server)
    seconds = time.monotonic() - started
    bench.head("memory of the largest worker (PSS)")
    bench.add("after start", at_start, "MB", None, "< 64")
    bench.add("after the first few thousand webhooks", warm, "MB", None, "< 64")
    bench.add(
        f"after {taken:,} webhooks (ratio to the first few thousand)",
        after,
        "MB",
        after / warm,
        "< 64",
    )
    bench.add("growth over those webhooks", after - warm, "MB", None, "< 4")
    bench.add(
        f"highest during an export of all {size / 1e6:,.0f} MB (ratio to before)",
        peak,
        "MB",
        peak / after,
        "< 64",
    )
    bench.add("growth by that export", peak - after, "MB", None, "< 4")
    bench.add("export: errors in full", taken / seconds, "/s")
    return taken


def drain_export(server):
    """Read an export of everything; return its bytes and the highest memory of a worker meanwhile."""
    peak, size, sampled = server.memory(), 0, time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), 20) as connection:
        connection.sendall(get("/errors?format=ndjson"))
        while data := connection.recv(1 << 20):
            size += len(data)
            if time.monotonic() - sampled > 0.5:
                peak, sampled = max(peak, server.memory()), time.monotonic()
    return size, max(peak, server.memory())


def measure_disk(bench, folder, words):
    """Weigh the database, indexes and search included, against the payloads that came in."""
    path = folder / "data" / "errors.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        sql = "SELECT sum(payload_bytes), sum(length(payload)) FROM errors"
        received, packed = connection.execute(sql).fetchone()
    bench.head(f"disk, per byte of payload received; {words}")
    bench.add("database", path.stat().st_size / received, "", None, "< 0.25")
    bench.add("of that the payloads, compressed", packed / received, "")


def fill(bench, path, rows):
    """Make a database of `rows` errors in bulk; durability does not matter here."""
    path.parent.mkdir(parents=True)
    started = time.monotonic()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        settings = (
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -400000;"
        )
        connection.executescript(settings + (ROOT / "schema.sql").read_text())
        columns = [row[1] for row in connection.execute("PRAGMA table_info(errors)")][1:]
        sql = f"INSERT INTO errors ({', '.join(columns)}) VALUES ({', '.join(f':{name}' for name in columns)})"
        source, done = bench.traffic.rows(rows), 0
        while batch := list(itertools.islice(source, 1000)):
            bench.say(f"making a database: {done:,} of {rows:,} errors")
            connection.execute("BEGIN")
            connection.executemany(sql, batch)
            connection.execute("COMMIT")
            done += len(batch)
    return time.monotonic() - started


QUERIES = {
    "pages": """
        / /?format=html /config /health
        /errors/latest /errors/latest?format=html /errors/latest?format=text
        /errors/{middle} /errors/{middle}?format=html /errors/{middle}?format=text /errors/{middle}/payload
        /errors /errors?limit=1000 /errors?format=text /errors?before={middle} /errors?after={middle} /errors?after=0
        /errors?after={newest} /errors?format=ndjson&limit=100
    """,
    "filters": """
        /errors?project=shop /errors?project=legacy /errors?project=nowhere /errors?level=error /errors?level=debug
        /errors?environment=development /errors?platform=ruby /errors?project=shop&limit=1000
        /errors?project=shop&before={middle} /errors?project=shop&after={middle}
        /errors?project=shop&level=error&environment=production /errors?project=shop&platform=java
        /errors?project=intern&level=fatal&environment=development /errors?project=legacy&environment=production
        /errors?project=shop&level=debug&environment=staging&platform=java /errors?level=debug&after={middle}
        /errors/latest?project=shop&platform=java /errors/latest?project=legacy /errors/latest?level=fatal
    """,
    "history of an issue": """
        /errors?issue=4100000000 /errors?issue=4100000000&limit=1000 /errors?issue={rare_issue} /errors?issue=SHOP-0
        /errors?issue=nowhere /errors?issue=4100000000&level=debug /errors?issue=4100000000&q=account
    """,
    "search": """
        /errors?q=account /errors?q=quokka /errors?q=zyzzyva /errors?q=xylophone
        /errors?q=a /errors?q=ac /errors?q=acc /errors?q=acco /errors?q=accou /errors?q=e /errors?q=not
        /errors?q=1 /errors?q=12 /errors?q=123 /errors?q=1234 /errors?q=12345
        /errors?q=valueerror /errors?q=account+address /errors?q=valueerror+keyerror /errors?q=keyerror+load+account+n
        /errors?q=account+address+agent+amount+archive+article+asset+balance+bank+basket /errors?q=shop.load
        /errors?q=account&before={middle} /errors?q=account&after={middle} /errors?q=account&limit=1000
        /errors/latest?q=account /errors/latest?q=zyzzyva
    """,
    "search and filters": """
        /errors?q=account&project=shop /errors?q=account&project=shop&level=error&environment=production
        /errors?q=account&project=shop&platform=java /errors?q=quokka&project=legacy /errors?q=zyzzyva&level=error
        /errors?q=a&project=intern&level=fatal /errors?q=account&level=debug /errors?q=account&project=legacy
        /errors?q=1&level=debug&after={middle}
    """,
    "times": """
        /errors?since=1h /errors?since=45d /errors?since=1m /errors?until={middle_day} /errors?until=89d
        /errors?since={middle_day}&until={next_day} /errors?since={middle_day}&until={next_day}&project=shop
        /errors?since=1h&project=legacy /errors?until=85d&level=debug /errors?until=80d&q=account
        /errors?since=1h&q=account /errors?since=1h&q=quokka /errors?until=89d&project=shop&platform=java
        /errors/latest?until=45d /errors?since=45d&limit=1000
    """,
    "pages for browsers": """
        /errors?format=html /errors?format=html&limit=1000 /errors?format=html&before={middle}
        /errors?format=html&project=shop /errors?format=html&project=shop&level=error&environment=production
        /errors?format=html&project=shop&platform=java /errors?format=html&q=account /errors?format=html&q=a
        /errors?format=html&q=account&project=shop /errors?format=html&issue=4100000000
        /errors?format=html&since=45d /errors?format=html&until=45d&level=error /errors?format=html&project=legacy
    """,
}


def concrete(path, rows):
    """Return the path of a query for a database of so many rows."""
    day = datetime.now(UTC) - timedelta(days=45)
    return path.format(
        middle=rows // 2,
        newest=rows,
        rare_issue=4_100_000_000 + max(rows // 50, 50) - 1,
        middle_day=f"{day:%Y-%m-%dT%H:%M:%SZ}",
        next_day=f"{day + timedelta(days=1):%Y-%m-%dT%H:%M:%SZ}",
    )


def measure_reads(bench, small, big, small_rows, big_rows):
    """Read every page and query from both databases in turns; the ratio is that of the medians."""
    for title, paths in QUERIES.items():
        bench.head(
            f"{title}: p99 with {big_rows:,} rows (ratio of the medians to {small_rows:,} rows)"
        )
        for path in paths.split():
            bench.say(f"reads: {path}")
            is_latest = path == "/errors/latest"
            times = read_both(
                [
                    (small.port, get(concrete(path, small_rows))),
                    (big.port, get(concrete(path, big_rows))),
                ],
                bench.options.reads * (5 if is_latest else 1),
            )
            ratio = statistics.median(times[1]) / statistics.median(times[0])
            bench.add(path, 1000 * percentile(sorted(times[1]), 0.99), "ms", ratio, "< 100")
            if is_latest:
                bench.add(
                    f"{path}: median",
                    1000 * statistics.median(times[1]),
                    "ms",
                    ratio,
                    "ratio < 1.2",
                )


def read_both(targets, count, seconds=5):
    """Return the seconds of `count` replies of each target, asked in turns."""
    times, until = [[] for _ in targets], time.monotonic() + seconds
    while len(times[0]) < count and time.monotonic() < until:
        for found, (port, request) in zip(times, targets, strict=True):
            took, status = fetch(port, request)
            if status not in (200, 404):
                raise SystemExit(f"{status} for {request.split(b' ')[1].decode()}")
            found.append(took)
    return times


def read_on(port, paths, pause, counts):
    """Read some paths over and over, to their ends, a piece and a pause at a time; count replies and refusals."""
    for path in itertools.cycle(paths):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 20) as connection:
            connection.sendall(get(path))
            data = connection.recv(1 << 16)
            counts[1 if data[9:12] == b"503" else 0] += 1
            while data:
                counts[2] += len(data)
                time.sleep(pause)
                data = connection.recv(1 << 16)


def read_long(path, counts):
    """Keep one read transaction open and busy, as somebody's sqlite3 shell may."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN")
        while True:
            for row in connection.execute("SELECT length(payload) FROM errors"):
                counts[2] += row[0]


class Neighbour:
    """Something else that goes on beside the webhooks, until it is stopped."""

    def __init__(self, target, *arguments):
        self.counts = fork.Array("Q", 3, lock=False)
        self.process = start_process(target, *arguments, self.counts)

    def stop(self):
        self.process.kill()
        self.process.join()


class Backup:
    """The backup command, begun anew until it is stopped."""

    def __init__(self, server):
        self.file = server.folder / "backup.db"
        command = [sys.executable, "-m", "flask", "--app", "collector", "backup", str(self.file)]
        with (server.folder / "backup.log").open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=server.folder,
                env=server.env,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def stop(self):
        end_group(self.process)
        for path in self.file.parent.glob("backup.db*"):
            path.unlink()


def measure_neighbours(bench, server):
    """Send webhooks while others use the database; they stop before the webhooks do, for what they leave behind."""
    searches = [path.format(middle=1, newest=1) for path in QUERIES["search"].split()]
    lists = [path.format(middle=1) for path in QUERIES["pages for browsers"].split()]
    database = server.folder / "data" / "errors.db"
    kinds = {
        "nothing": lambda: [],
        "an export": lambda: [Neighbour(read_on, server.port, ["/errors?format=ndjson"], 0)],
        "an export, read slowly": lambda: [
            Neighbour(read_on, server.port, ["/errors?format=ndjson"], 0.05)
        ],
        "searches by 4": lambda: [
            Neighbour(read_on, server.port, searches[index:], 0) for index in range(4)
        ],
        "pages for 4 browsers": lambda: [
            Neighbour(read_on, server.port, lists[index:], 0) for index in range(4)
        ],
        "a backup": lambda: [Backup(server)],
        "a long read by sqlite3": lambda: [Neighbour(read_long, database)],
    }
    kinds["all of these at once"] = lambda: [
        one for kind in list(kinds.values())[1:-1] for one in kind()
    ]
    bench.head(
        f"webhooks with {bench.options.rows:,} rows beside (rate as ratio to that beside nothing)"
    )
    undisturbed, stored = None, bench.options.rows
    for name, start in kinds.items():
        bench.say(f"webhooks beside {name}")
        seconds = bench.options.seconds * (0.5 if bench.options.quick else 1)
        requests = bench.requests(2500 * seconds)
        with ExitStack() as stack:
            neighbours = start()
            for neighbour in neighbours:
                stack.callback(neighbour.stop)
            found = load(
                server.port, requests, seconds, at_end=[neighbour.stop for neighbour in neighbours]
            )
        stored += found.statuses[b"201"]
        rate = len(found.latencies) / found.seconds
        undisturbed = undisturbed or rate
        bench.add(f"{name}: webhooks", rate, "/s", rate / undisturbed)
        bench.add(f"{name}: slowest", 1000 * found.latencies[-1], "ms", None, "< 1000")
        if set(found.statuses) != {b"201"}:
            wrong = {
                status.decode(): count
                for status, count in found.statuses.items()
                if status != b"201"
            }
            bench.add(f"{name}: NOT STORED AT ONCE {wrong}", sum(wrong.values()), "", None, "< 1")
    check_stored(server.folder, stored)


# --------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------


def file_system(folder):
    """Return the kind of file system that a folder is on."""
    best = ("", "unknown")
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, kind = line.split(" ")[4], line.split(" - ")[1].split(" ")[0]
        if os.path.commonpath((mount, os.path.realpath(folder))) == mount and len(mount) >= len(
            best[0]
        ):
            best = (mount, kind)
    return best[1]


def describe(options, folder):
    """Return the seed, the machine and what it has."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("gunicorn", "flask")]
    disk = file_system(folder)
    about = [
        f"seed {options.seed}",
        f"{os.cpu_count()} cores",
        f"{platform.system()} {platform.release()}",
    ]
    about += [
        f"Python {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
        *versions,
        f"data on {disk}",
    ]
    about += [f"load of others {os.getloadavg()[0]:.1f}"]
    about += (
        ["SYNCS COST NOTHING THERE; set TMPDIR to a folder on a disk"] if disk == "tmpfs" else []
    )
    return "; ".join(about)


def figure(value, unit=""):
    """Return a number with about three digits that matter."""
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f} {unit}".strip()


def print_table(results):
    """Print the results in aligned columns."""
    lines = [("", "measured", "ratio", "target", "met")]
    for result in results:
        if isinstance(result, str):
            lines += [("",) * 5, (result, *("",) * 4)]
        else:
            ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
            met = {None: "", True: "yes", False: "NO"}[result.met]
            target = (
                f"{result.target} {'' if result.target.startswith('ratio') else result.unit}"
                if result.target
                else ""
            )
            lines.append(
                (
                    f"  {result.what}",
                    figure(result.measured, result.unit),
                    ratio,
                    target.strip(),
                    met,
                )
            )
    widths = [max(len(line[index]) for line in lines if line[1]) for index in range(5)]
    for what, measured, ratio, target, met in lines:
        line = f"{what:{widths[0]}}  {measured:>{widths[1]}}  {ratio:>{widths[2]}}  {target:{widths[3]}}  {met}"
        print(line.rstrip())
    missed = [
        result.what for result in results if not isinstance(result, str) and result.met is False
    ]
    judged = sum(1 for result in results if not isinstance(result, str) and result.met is not None)
    print(
        f"\n{judged - len(missed)} of {judged} targets met"
        + (f"; missed: {'; '.join(missed)}" if missed else "")
    )


def write_csv(file, results):
    """Write the results as CSV."""
    section = ""
    writer = csv.writer(file)
    writer.writerow(("section", *Result._fields))
    for result in results:
        if isinstance(result, str):
            section = result
        else:
            writer.writerow((section, *result))


def read_options():
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small numbers, half a minute")
    parser.add_argument("--rows", type=int, help="rows of the big database (1,000,000)")
    parser.add_argument("--seconds", type=float, help="of a measurement (10)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    options.rows = options.rows or (10_000 if options.quick else 1_000_000)
    options.seconds = options.seconds or (1 if options.quick else 10)
    options.rounds, options.reads, options.webhooks = (
        (2, 4, 5_000) if options.quick else (5, 100, 100_000)
    )
    return options


def main():
    options = read_options()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(
            number, lambda number, _: sys.exit(128 + number)
        )  # so that servers and folders are cleared away
    with ExitStack() as stack:
        file = stack.enter_context(options.csv.open("w", newline="")) if options.csv else None
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="collector-benchmark-"))
        )
        needed = options.rows * 12_000 + options.webhooks * 9_000
        if shutil.disk_usage(folder).free < needed:
            raise SystemExit(
                f"{folder} needs {needed / 1e9:.0f} GB; set TMPDIR to a larger disk, or --rows to less"
            )
        print(describe(options, folder), flush=True)
        bench = Bench(options, folder, stack)
        bench.say("starting")
        server = start_collector(stack, folder / "first")
        at_start = server.memory()
        taken = measure_webhooks(bench, server, bench.traffic, ALL)
        taken = check_stored(server.folder, taken)
        taken = measure_memory(bench, server, at_start, taken)
        server.stop()
        check_stored(server.folder, taken)
        measure_disk(bench, server.folder, ALL)
        shutil.rmtree(server.folder)
        server = start_collector(stack, folder / "plain")
        taken = measure_webhooks(bench, server, bench.plain_traffic, PLAIN)
        server.stop()
        check_stored(server.folder, taken)
        measure_disk(bench, server.folder, PLAIN)
        shutil.rmtree(server.folder)
        small_rows = min(1000, options.rows)
        fill(bench, folder / "small" / "data" / "errors.db", small_rows)
        fill(bench, folder / "big" / "data" / "errors.db", options.rows)
        small, big = (
            start_collector(stack, folder / "small"),
            start_collector(stack, folder / "big"),
        )
        measure_reads(bench, small, big, small_rows, options.rows)
        small.stop()
        measure_neighbours(bench, big)
        bench.say()
        print_table(bench.results)
        print(f"seed {options.seed}; {time.monotonic() - bench.started:.0f} s")
        if file:
            write_csv(file, bench.results)


if __name__ == "__main__":
    main()
