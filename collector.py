"""Receive Sentry's webhooks, keep every new error, and give the latest one back.

Parsing makes a row and a detail of a payload. Storage keeps rows, bodies and spooled deliveries.
Intake is the one way in. Presentation makes every shape that goes out. Web has the routes, Wiring
the settings and the app. To know the house, read `receive_webhook`, `Store.keep`, `insert`,
`parse_error`, `show` and `create_app`.
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"The collector needs Python 3.11 or newer, this is {sys.version.split()[0]}.")

import base64
import errno
import fcntl
import functools
import gc
import hashlib
import hmac
import json
import logging
import math
import os
import re
import shutil
import sqlite3
import tempfile
import time
import traceback
import zlib
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import chain, groupby, islice
from pathlib import Path
from urllib.parse import urlencode

import click
from dotenv import dotenv_values
from flask import Blueprint, Flask, Response, current_app, g, render_template, request
from markupsafe import Markup, escape
from werkzeug.datastructures import MIMEAccept, WWWAuthenticate
from werkzeug.exceptions import HTTPException, abort
from werkzeug.sansio.utils import host_is_trusted

VERSION = "3.0.0"
log = logging.getLogger("gunicorn.error")


# --------------------------------------------------------------------------------------------------
# Parsing: bytes and dicts in, dicts out; no Flask, no sqlite3, no clock
# --------------------------------------------------------------------------------------------------

# The most that is read of a payload, which itself stays whole, so that no delivery takes long.
COLUMN_LENGTH = 8192  # characters of a text, where Sentry cuts messages, too
NAME_LENGTH = 200  # characters of the name of a value
LINE_LENGTH = 1024  # characters of a source line
JSON_LENGTH = 100_000  # characters of a request's body, sent as JSON text, that are read as JSON
FRAMES = 250  # frames of an exception, the newest ones
EXCEPTIONS = 50  # exceptions of an event, the outermost ones
NEAREST = 20  # breadcrumbs, source lines on a side, and what else is only for people
ITEMS = 500  # values of an object or of a list
VALUES = 50_000  # values of an event at any depth, where 32 characters count as one more
DEPTH = 12  # levels of nested objects and lists, as a Redux state has
REST = "…"  # what stands for all that was cut, as a value, a key or a last item
MASK = "[masked]"  # what stands in the place of a secret
DECODER = json.JSONDecoder(parse_constant=int)  # which raises ValueError for NaN and Infinity
SECRET_NAME = re.compile(
    r"authori[sz]ation|cookie|passw|passphrase|passcode|pwd|secret|token|credential|sess(?:ion|id)"
    r"|[cx]srf|dsn$|shared[-_. ]?access|[-_. ]signature$|card[-_. ]?number|(?:api|auth|access|rsa"
    r"|private|signing|encryption|ssh|subscription|functions?|master|account|storage|service|hmac"
    r"|license)[-_. ]?key|(?<![a-z])(?:dsn|jwt|bearer|pw(?![a-z])"
    r"|(?:pass|o?auth|creds|sid|sig|t?otp|cvv)$)")  # fmt: skip
NAME = re.compile(r" ?[^\s=]+(?:(?<!:) [^\s=]+){0,2}")  # of a parameter or in a list: no prose
PARAMETER = re.compile(r"((?:^|(?<=[?&;#\n]))([^?&;#=\n]{1,200})=)[^?&;#\n]*")  # its name, all
COUNT_NAME = re.compile(r"(?i)tokens$|max|(?<!ac)count|total|limit|duration|length")  # no secrets
MEMBER_NAME = re.compile(r"""["']([^"']{1,200})["']\s*:\s*""")  # in JSON or Python's form
URL = re.compile(r"(?:(?<=://)|(?<![\w/.:])/)[^\s\"'<>]+")  # whole, or a path
URL_PASSWORD = re.compile(r"(://[^/?#\s:]*:)(?![0-9]+\.{3}$)[^/?#\s]+(?=@|…$|\.{3}$)")  # or cut
SERVER = re.compile(r"^https?://(?:[^/?#\s]*@)?((?:[^/?#\s:@\\]+|\[[0-9a-f:.]+\])"
    r"(?::(?!80\b|443\b)[0-9]{1,5})?)(?::80|:443)?(?:[/?#]|$)")  # fmt: skip
OCCURRENCES = {1: "performance", 2: "profile", 3: "ai_detected", 4: "cron", 5: "replay",
    6: "feedback", 7: "uptime", 8: "metric", 11: "preprod", 12: "instrumentation",
    13: "configuration"}  # fmt: skip


class Refused(Exception):
    """A delivery is not taken, for a reason that REASONS tells; `detail` is put into its words."""

    def __init__(self, reason, detail=""):
        self.reason = reason
        self.detail = detail


def load(body):
    """Return the JSON value in `body` (bytes). Raises ValueError, or RecursionError if too deep."""
    words = body.decode("utf-8-sig")  # because json.loads would guess UTF-16 and UTF-32, too
    try:
        return DECODER.decode(words)
    except RecursionError:
        with ThreadPoolExecutor(1) as executor:  # whose stack is whole, so that it is read again
            return executor.submit(DECODER.decode, words).result()


def parse_body(body):
    """Return the delivery, a dict, in `body` (bytes). Raises Refused for anything else."""
    try:
        payload = load(body)
    except UnicodeDecodeError:
        raise Refused("not UTF-8") from None
    except RecursionError:
        raise Refused("not JSON", "it is nested too deeply") from None
    except ValueError as error:
        raise Refused("not JSON", error) from None
    if not isinstance(payload, dict):
        raise Refused("no object")
    if not text(payload.get("action")) and not isinstance(payload.get("event"), dict):
        raise Refused("no delivery")
    return payload


def clean(value):
    """Return text that SQLite and UTF-8 can hold, without the secrets of URLs in it."""
    if not value.isascii():  # Most text is, and the round trip takes time.
        value = value.encode("utf-8", "replace").decode("utf-8")
    if "/" in value and ("=" in value or "@" in value or value[-1] in ".…"):
        value = URL_PASSWORD.sub(rf"\1{MASK}", value)
        value = URL.sub(lambda url: PARAMETER.sub(mask, url[0]), value)
    return value.replace("\0", "\ufffd")


def cut(value, length):
    """Return text of at most `length` characters, with an ellipsis where it lost some."""
    return value if value is None or len(value) <= length else value[: length - 1] + REST


def text(value, length=COLUMN_LENGTH):
    """Return clean text of at most `length` characters for text that is not empty, else None."""
    return clean(cut(value, length)) if isinstance(value, str) and value else None


def integer(value):
    """Return an integer that fits 64 bits, sent as such or as its digits, else None."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    return value if type(value) is int and abs(value) < 2**63 else None


def identifier(value):
    """Return an id, sent as text or as an integer, as text, else None."""
    return str(value) if type(value) is int else text(value)


def parse_time(value):
    """Return a time, sent as ISO 8601 or as seconds since 1970, as a datetime in UTC, else None."""
    try:
        if isinstance(value, str):
            when = datetime.fromisoformat(value[:NAME_LENGTH])
            return when.replace(tzinfo=when.tzinfo or UTC).astimezone(UTC)
        return None if isinstance(value, bool) else datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def moment(value):
    """Return a time that parse_time understands as ISO 8601 in UTC with Z, else None."""
    when = parse_time(value)
    return when and when.isoformat().replace("+00:00", "Z")


def server_of(url):
    """Return the server of a URL, which is its host and any unusual port, else None."""
    server = next(iter(SERVER.findall((text(url) or "").lower())), None)
    is_cloud = f".{server}".endswith(".sentry.io")  # whose ids are the same on every host
    return "sentry.io" if is_cloud else cut(server, NAME_LENGTH)


def as_dict(value):
    """Return a dict as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def objects(value, most=10_000):
    """Return the dicts among the last items of a list, or of the `values` of a dict."""
    values = as_dict(value).get("values", value)
    return [item for item in only(list)(values, [])[-most:] if isinstance(item, dict)]


def pairs(value):
    """Return pairs, or objects with key or name and value, as one dict, None without any."""
    found = {}
    for sent in only(list)(value, [])[: ITEMS + 1]:
        pair = sent
        if isinstance(sent, dict):
            pair = [sent.get("key") or sent.get("name"), sent.get("value")]
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str):
            name, item = pair
            if isinstance(item, str) and isinstance(found.get(name), str):
                item = cut(f"{found[name]}, {item}", COLUMN_LENGTH)  # as HTTP joins headers
            found[name] = item
    return found or as_dict(value) or None


@functools.lru_cache(maxsize=4096)
def is_secret(name):
    """Return True if a value of this name is a secret, however the parts of the name are joined."""
    name = name.strip("'\"[] ")  # as Python's variables and PHP's parameters have them
    if not name.islower():
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()  # dbPass
    return SECRET_NAME.search(name) is not None


def mask(match):
    """Return a match of PARAMETER without its value if that is a secret."""
    return match[1] + MASK if is_secret(match[2]) and NAME.fullmatch(match[2]) else match[0]


def launder_text(value, room):
    """Return text without the secrets of a URL, of a query, or of an object in text form."""
    value = cut(value, COLUMN_LENGTH)
    room[0] -= len(value) // 32
    if room[0] <= 0:
        return REST
    value = clean(value)
    if "=" in value:
        value = PARAMETER.sub(mask, value)
    if value.lstrip()[:1] in ("{", "["):
        for name in MEMBER_NAME.finditer(value):
            if is_secret(name[1]):
                return value[: name.end()] + MASK  # with all that follows, which may be of it
    return value


def launder(value, room, name="", depth=DEPTH):
    """Return a copy of a value of this name that JSON can hold, bounded and without secrets."""
    room[0] -= 1 + len(name) // 32  # a list of the number of values that may still be copied
    if value is None or isinstance(value, bool):
        return value
    is_number = isinstance(value, int | float)
    if is_secret(name) and not (is_number and COUNT_NAME.search(name)):
        return MASK
    if isinstance(value, str):
        return launder_text(value, room)
    if is_number:
        return value if abs(value) < 2**63 else str(value)  # which not all readers of JSON take
    most = ITEMS if depth and room[0] > 0 else 0
    rest = [REST] * (len(value) > most)  # one or none
    if isinstance(value, list):
        copy = []
        before = ""
        for item in value[:most]:
            copy.append(launder(item, room, before, depth - 1))
            may_be_name = len(value) % 2 == 0 and isinstance(item, str) and len(item) < NAME_LENGTH
            before = item if may_be_name and NAME.fullmatch(item) else ""
        return copy + rest
    copy = {}
    label = value.get("name") or value.get("key")
    for key, item in islice(value.items(), most):
        shown = clean(cut(key, NAME_LENGTH))
        is_labelled = key == "value" and isinstance(label, str)
        copy[shown] = launder(item, room, label[:NAME_LENGTH] if is_labelled else shown, depth - 1)
    return copy | dict.fromkeys(rest, REST)


def texts(value):
    """Return a laundered dict with its values as text, JSON where they are none, or None."""
    copy = {}
    for name, item in as_dict(value).items():
        copy[name] = item if isinstance(item, str | None) else cut(json.dumps(item), COLUMN_LENGTH)
    return copy or None


def table(rows):
    """Return {key: [(parser, path)]} of rows, which give (parser, paths, ...) or one of both."""
    compiled = {}
    for keys, row in rows.items():
        for key in keys.split():
            compiled[key] = []
            steps = row if isinstance(row, tuple) else (row, key)
            if isinstance(row, str):  # paths alone
                steps = (text, row)
            for parse, paths in zip(steps[::2], steps[1::2], strict=True):
                compiled[key] += [(parse, path.split(".")) for path in paths.split()]
    return compiled


def apply(rows, source):
    """Return what a table finds in a dict, for each key the first that its parser takes."""
    found = dict.fromkeys(rows)
    for key, steps in rows.items():
        for parse, path in steps:
            value = source
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                found[key] = parse(value)
            if found[key] is not None:
                break
    return found


def shape(rows, source):
    """Return what a table finds in a dict, None if it finds nothing."""
    found = apply(rows, source)
    return None if all(value is None for value in found.values()) else found


def only(kind):
    """Return the parser that takes values of a type as they are, and no others."""
    return lambda value, other=None: value if isinstance(value, kind) else other


def found_in(pattern):
    """Return the parser that takes what the group of a pattern finds in text or in a number."""
    return lambda value: next(iter(re.findall(pattern, identifier(value) or "")), None)


# The columns of an error: paths in what find_error returns, and what parse_error adds to that.
FIELDS = table({
    "received_at": text, "action": text, "resource": "header shape", "short_id": "issue.shortId",
    "timestamp": (moment, "event.datetime event.timestamp event.received event.dateCreated "
        "event.dateReceived issue.lastSeen issue.firstSeen", text, "received_at"),
    "event_id": (identifier, "event.event_id event.eventID event.id"),
    "issue_id": (identifier, "event.issue_id", found_in("/issues/([0-9]+)"), "event.issue_url "
        "event.web_url", identifier, "issue.id id event.groupID"),
    "status": "issue.status", "platform": "event.platform issue.platform",
    "title": "event.occurrence.issueTitle event.title issue.title metadata.title",
    "message": "event.message message event.logentry.formatted event.logentry.message "
        "event.occurrence.subtitle event.contexts.feedback.message metadata.message "
        "main.value metadata.value metadata.title",
    "exception_type": "main.type cause.type", "exception_value": "main.value cause.value",
    "culprit": "event.culprit event.occurrence.culprit issue.culprit culprit",
    "level": "event.level event.occurrence.level level tags.level issue.level",
    "logger": "event.logger issue.logger logger tags.logger", "rule": "triggered_rule first_rule",
    "environment": "event.environment tags.environment",
    "release": "event.release event.release.version tags.release tags.sentry:release",
    "project_id": (found_in("^([0-9]+)$"), "event.project",
        identifier, "issue.project.id event.projectID project.id"),
    "project_slug": (text, "issue.project.slug project_slug project project.slug",
        found_in("/api/0/projects/[^/]+/([^/]+)/events/"), "event.url"),
    "project_name": "issue.project.name project_name project.name",
    "permalink": "event.web_url url hook.url issue.web_url issue.permalink",
    "server": (server_of, "event.web_url issue.web_url issue.permalink url event.url issue.url "
        "event.issue_url"),
    "category": (text, "issue.issueCategory kind",
        found_in("^(csp|hpkp|expectct|expectstaple|nel|feedback)$"), "event.type"),
})  # fmt: skip


def find_error(payload):
    """Return where the parts of a delivery's error lie, a dict, or None without an error."""
    action = text(payload.get("action"))
    data = as_dict(payload.get("data"))
    is_new = action in ("created", "unresolved") and data.get("activity") is None
    if isinstance(data.get("error"), dict):
        found = data | {"event": data["error"], "shape": "error"}
    elif isinstance(data.get("event"), dict):
        found = data | {"shape": "event_alert"}
    elif is_new and isinstance(data.get("issue"), dict):
        found = data | {"event": {}, "shape": "issue"}
    elif not action and payload.get("data") is None and isinstance(payload.get("event"), dict):
        found = payload | {"issue": payload.get("group"), "hook": payload["event"], "shape": None}
    else:
        return None
    issue = as_dict(found.get("issue"))
    metadata = as_dict(found["event"].get("metadata")) or as_dict(issue.get("metadata"))
    return found | {"action": action, "issue": issue, "metadata": metadata}


def find_exceptions(event):
    """Return an event's exceptions as sent, the inner cause first, and the main one or {}."""
    sent = objects(event.get("exception")) or objects(event.get("exceptions"))
    by_id = {identifier(as_dict(it.get("mechanism")).get("exception_id")): it for it in sent[::-1]}
    main = by_id.get(identifier(event.get("main_exception_id")) or REST, (sent or [{}])[-1])
    if len(sent) > EXCEPTIONS:
        sent = [{"type": REST}, *sent[-EXCEPTIONS:]]
        if all(exception is not main for exception in sent):
            sent[1] = main
    return sent, main


def parse_error(payload, resource, received_at):
    """Return the row of a delivery's error, or None. `resource` is the header's, or None."""
    error = find_error(payload)
    if error is None:
        return None
    event = error["event"]
    error |= {"header": resource, "received_at": received_at, "tags": pairs(event.get("tags"))}
    error["first_rule"] = next(iter(only(list)(error.get("triggering_rules"), [])), None)
    _, error["main"] = find_exceptions(event)
    occurrence = as_dict(event.get("occurrence"))
    error["cause"] = not occurrence and error["metadata"]  # An occurrence's has none.
    number = integer(occurrence.get("type"))
    error["kind"] = number is not None and OCCURRENCES.get(number // 1000, "other")
    row = apply(FIELDS, error)
    type_and_value = filter(None, (row["exception_type"], row["exception_value"]))
    row["title"] = row["title"] or ": ".join(type_and_value) or text(error.get("message"))
    row["message"] = row["message"] or row["title"]
    row["category"] = row["category"] or "error"
    return row


def identity(row, body):
    """Return the text by which a delivery's row is known to be of the same error as another."""
    is_usual = row["action"] in (None, "created", "triggered")
    project = row["project_id"] or row["project_slug"] or ""
    if is_usual and row["event_id"]:  # which is first, because the index finds it so
        return f"{row['event_id']} {row['server'] or ''} {project}"
    if is_usual and row["issue_id"]:
        return f"issue {row['issue_id']} {row['server'] or ''}"
    return hashlib.sha256(body).hexdigest()[:32]


def parse_line(value, column=None):
    """Return a source line as clean text, "" for none. Of a long one the part around `column`."""
    is_long = isinstance(value, str) and len(value) > LINE_LENGTH
    if is_long and LINE_LENGTH // 2 < (column or 0) <= len(value):
        value = REST + value[column - LINE_LENGTH // 2 + 1 :]
    return text(value, LINE_LENGTH) or ""


FRAME = table({
    "filename": text, "abs_path": "abs_path absPath", "module function": text,
    "lineno": (integer, "lineno lineNo"), "colno": (integer, "colno colNo"),
    "in_app": (only(bool), "in_app inApp"), "pre_context": only(list), "context_line": only(str),
    "post_context": only(list), "package": text, "instruction_addr":
    (identifier, "instruction_addr instructionAddr"), "vars": only(dict)})  # fmt: skip
EXCEPTION = table({"type value module": text, "mechanism": only(object)})
CRUMB = table({"timestamp": moment, "type category level message": text})
REQUEST = table({"method url": text, "query": (only(object), "query_string query"),
    "headers": pairs, "data": only(object)})  # fmt: skip
PARTS = table({"user contexts extra csp": only(dict)})
ACTOR = table({"type id name": identifier})
ISSUE_STATS = table({"count": integer, "user_count": (integer, "userCount"), "first_seen":
    (moment, "firstSeen"), "last_seen": (moment, "lastSeen"), "priority": text})  # fmt: skip
PROBLEM = table({"type name": text, "value": "value url"})
TEMPLATE = table({"filename context_line": text, "lineno": integer})
CLUE = table({"omitted": (only(list), "stacktrace.frames_omitted"),
    "signal": "mechanism.meta.signal.name mechanism.meta.mach_exception.name"})  # fmt: skip


def parse_frames(holder, room):
    """Return the frames of a holder, the oldest call first, where a first one says it was cut."""
    sent = objects(as_dict(holder.get("stacktrace")).get("frames"), FRAMES + 1)
    parsed = []
    for frame in reversed(sent[-FRAMES:] if room[0] > 0 else []):  # The newest get the room.
        found = apply(FRAME, frame)
        line = found["context_line"]
        found["context_line"] = line and parse_line(line, found["colno"])
        for key, kept in (("pre_context", slice(-NEAREST, None)), ("post_context", slice(NEAREST))):
            if found[key]:
                found[key] = [parse_line(line) for line in found[key][kept]]
                room[0] -= sum(map(len, found[key])) // 32
        found["vars"] = launder(found["vars"], room)
        room[0] -= 20 + sum(len(it) for it in found.values() if isinstance(it, str)) // 32
        parsed.append(found)
    if len(sent) > len(parsed):
        parsed.append(apply(FRAME, {"function": REST}))
    return parsed[::-1]


def parse_exceptions(error, room):
    """Return an event's exceptions, the inner cause first, and the stacktrace of the crash."""
    event = error["event"]
    exceptions, main = find_exceptions(event)
    parsed = []
    for exception in reversed(exceptions):
        found = apply(EXCEPTION, exception) | {"main": exception is main}
        found["mechanism"] = launder(found["mechanism"], room)
        found["frames"] = parse_frames(exception, room)
        parsed.append(found)
    threads = objects(event.get("threads"))
    thread_id = identifier(main.get("thread_id")) or REST
    holders = [thread for thread in threads if identifier(thread.get("id")) == thread_id]
    crash = next((found for found in parsed if found["main"]), {"frames": []})
    with_frames = [found for found in parsed if found["frames"]]
    if not with_frames:
        threads.sort(key=lambda it: (it.get("crashed") is not True, it.get("current") is not True))
        holders += [*threads, event, {"stacktrace": {"frames": [shape(FRAME, error["metadata"])]}}]
    for holder in holders:
        crash["frames"] = crash["frames"] or parse_frames(holder, room)
    stacktrace = crash["frames"] or [*with_frames, crash][0]["frames"]
    return {"exceptions": parsed[::-1], "stacktrace": stacktrace}


def parse_request(request, room):
    """Return the request in which an error happened, None without one."""
    found = shape(REQUEST, request)
    if found is None:
        return None
    body = found["data"]
    if isinstance(body, str) and body.lstrip()[:1] in ("{", "[") and len(body) <= JSON_LENGTH:
        with suppress(ValueError, RecursionError):  # of text that is no JSON
            found["data"] = json.loads(body)
    for key, value in found.items():
        found[key] = launder(value, room, key)
    items = only(list)(found["query"]) or as_dict(found["query"]).items()
    query = [f"{it[0]}={it[1] or ''}" for it in items if isinstance(it, list | tuple) and it[1:]]
    found["query"] = "&".join(query) or text(found["query"])
    return found | {"headers": texts(found["headers"])}


def parse_detail(payload):
    """Return what of a stored payload has no column, in the shapes that go out."""
    error = find_error(payload)
    event = error["event"]
    room = [VALUES]
    crumbs = objects(event.get("breadcrumbs"))
    with suppress(TypeError):  # One without a time cannot be compared. SDKs append older ones.
        crumbs = sorted(crumbs, key=lambda crumb: parse_time(crumb.get("timestamp")))
    return {
        **parse_exceptions(error, [VALUES]),
        "tags": texts(launder(pairs(event.get("tags")), room)) or {},
        "actor": shape(ACTOR, payload.get("actor")),
        "request": parse_request(event.get("request"), room),
        "breadcrumbs": [
            apply(CRUMB, it) | {"data": launder(it.get("data"), room)} for it in crumbs[-NEAREST:]
        ],
        **{key: launder(it, room) for key, it in apply(PARTS, event).items()},
        "issue_stats": shape(ISSUE_STATS, error["issue"]),
    }


def parse_clues(payload):
    """Return what else explains a crash, for people: the JSON of an error has none of it."""
    event = find_error(payload)["event"]
    room = [VALUES]
    clues = [apply(CLUE, exception) for exception in find_exceptions(event)[0]]
    for clue in clues:
        if [type(number) for number in clue["omitted"] or []] != [int, int]:
            clue["omitted"] = None
    evidence = pairs(as_dict(event.get("occurrence")).get("evidenceDisplay"))
    holders = []
    for thread in objects(event.get("threads")):
        locks = list(as_dict(thread.get("held_locks")).values())[:NEAREST]
        if locks and len(holders) < NEAREST:
            frames = parse_frames(thread, room)
            own = [frame for frame in frames if frame["in_app"]] or frames or [None]
            words = [json.dumps(lock) for lock in launder(locks, room)]
            named = {key: text(thread.get(key)) for key in ("name", "state")}
            holders.append(named | {"locks": words, "frame": own[-1]})
    return {
        "errors": [apply(PROBLEM, it) for it in launder(objects(event.get("errors"))[:20], room)],
        "omitted": [clue["omitted"] for clue in clues],  # an item for each exception
        "signals": [clue["signal"] for clue in clues],
        "template": shape(TEMPLATE, event.get("template")),
        "locks": holders,
        "evidence": texts(launder(evidence, room)) or {},
    }


# --------------------------------------------------------------------------------------------------
# Storage: all SQL and all files; knows no payload shapes
# --------------------------------------------------------------------------------------------------

# Columns of an error, in the order of the JSON keys.
COLUMNS = (
    "id received_at timestamp resource action event_id issue_id short_id title message culprit "
    "level status platform logger environment release project_id project_slug project_name "
    "exception_type exception_value permalink rule server category"
).split()
SCHEMA_VERSION = 3  # version of the database that this code reads and writes
TURN_SECONDS = 0.3  # longest wait of a delivery for its turn among the writers
LOCK_SECONDS = 0.2  # longest wait for a lock of another program on the database, of a read, too
PAUSE_SECONDS = 2  # time for which a worker leaves a database alone that it could not write
READ_SECONDS = 0.5  # longest time of one read
LIST_SECONDS = 0.3  # time after which a list replies with what it has
PERIOD_SECONDS = 0.1  # longest search for the ids of a period
LOCAL_FILE_SYSTEMS = "bcachefs btrfs ext2 ext3 ext4 f2fs overlay ramfs tmpfs xfs zfs".split()
PRAGMAS = (
    "synchronous = FULL",
    "temp_store = MEMORY",  # a read-only root has no folder for temporary files
    "journal_size_limit = 16777216",
    "secure_delete = FAST",  # Debian's default writes zeros over every page that a deletion frees
)
FIRST_BLOCK = 8  # rows that a walk looks at in any case
LARGEST_BLOCK = 2048
PAGE_CHARACTERS = 600_000  # most text of a page, a character of which JSON makes up to twelve bytes
RESERVE_BYTES = 64 * 1024 * 1024  # bytes of the disk that deliveries leave free for retention
SPOOL_LIMIT = 100_000  # deliveries in the spool
DELETE_ROWS = 20  # most expired errors that are deleted in one transaction
# Errors of what the database was given, which make no trouble for what comes next.
GIVEN_FAULTS = sqlite3.IntegrityError, sqlite3.DataError, sqlite3.ProgrammingError
RESTORE_CURE = "stop the service and put a backup in its place, without the files -wal and -shm"
CURES = {
    "": "see the log",
    "BUSY": "end the program that holds its lock, or wait for it",
    "EBUSY": "wait for it",
    "CORRUPT": RESTORE_CURE,
    "NOTADB": RESTORE_CURE,
    "INTERRUPT": "narrow what takes too long, by since=24h or other words",
}
OTHER_CURE = "let the collector's user write the folder and its files, and free space on the disk"


def in_microseconds(when):
    """Return a time in UTC as ISO 8601 with microseconds, so that texts compare as times do."""
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now(**ago):
    """Return the time as ISO 8601, or the time `ago`, as in now(days=2)."""
    return in_microseconds(datetime.now(UTC) - timedelta(**ago))


def kind_of(error):
    """Return the name that SQLite or the system has for an error, such as BUSY or ENOSPC."""
    if isinstance(error, OSError):
        return errno.errorcode.get(error.errno, "")
    return getattr(error, "sqlite_errorname", "SQLITE_").split("_")[1]


def is_busy(error):
    """Return True if an attempt failed only because another process holds a lock."""
    return kind_of(error) in ("BUSY", "EBUSY")


def cure_of(error):
    """Return what to do about an error of the database or its disk."""
    return CURES.get(kind_of(error), OTHER_CURE)


def choose_journal_mode(folder):
    """Return WAL for a folder on a local file system, else PERSIST: over a network WAL corrupts."""
    found = ("", "")  # the longest mount point above the folder, and its type
    with suppress(OSError):
        for line in Path("/proc/mounts").read_bytes().splitlines():
            _, mount, kind, *_ = line.split(b" ")
            # A blank is \040 there.
            mount = os.fsdecode(mount.decode("unicode_escape").encode("latin-1"))
            if len(mount) >= len(found[0]) and folder.is_relative_to(mount):
                found = (mount, kind.decode())
    return "WAL" if found[1] in LOCAL_FILE_SYSTEMS else "PERSIST"


class Database:
    """One SQLite file that several processes share, each with a connection, the writers in turn."""

    def __init__(self, path):
        self.path = path
        self.journal_mode = choose_journal_mode(path.parent)
        self.may_upgrade = True  # False in a worker of gunicorn, whose master has it done
        self.kept = None  # connection, opened on first use and so after the fork
        self.inode = None  # of the file that it has open
        self.read_until = math.inf  # monotonic time at which the running query is ended
        self.paused_until = -math.inf  # monotonic time
        self.trouble = None  # error that made the pause

    def connection(self):
        """Return the kept connection, its database at this code's version."""
        if self.kept is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=LOCK_SECONDS, isolation_level=None)
            try:
                self.prepare(connection)
                self.inode = os.stat(self.path).st_ino
            except BaseException:
                connection.close()
                raise
            self.kept = connection
        return self.kept

    def prepare(self, connection):
        """Set up a connection, and its database if that is new, old or in another journal mode."""
        connection.row_factory = sqlite3.Row
        for pragma in PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        version = read_version(connection)
        if 0 < version < SCHEMA_VERSION and not self.may_upgrade:
            words = f"its upgrade from version {version} goes on, or the log says why it failed"
            raise sqlite3.OperationalError(words)
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if version < SCHEMA_VERSION or mode.upper() != self.journal_mode:
            with self.turn(TURN_SECONDS):
                upgrade(connection)
                connection.execute(f"PRAGMA journal_mode = {self.journal_mode}")
        connection.set_progress_handler(lambda: time.monotonic() > self.read_until, 100)

    @contextmanager
    def reader(self, seconds=READ_SECONDS):
        """Yield the connection for reads, which are interrupted after so many seconds."""
        connection = self.connection()
        self.read_until = time.monotonic() + seconds
        try:
            yield connection
        finally:
            self.read_until = math.inf

    @contextmanager
    def turn(self, seconds):
        """Hold the lock that all writers of the collector take; wait so many seconds for it."""
        deadline = time.monotonic() + seconds
        # A file of its own: closing any other descriptor of the database drops SQLite's locks.
        with open(f"{self.path}.lock", "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        words = "another process of the collector holds the lock to write"
                        raise OSError(errno.EBUSY, words) from None
                time.sleep(0.0003)
            yield

    @contextmanager
    def transaction(self, seconds=TURN_SECONDS):
        """Yield the connection in a write transaction, in turn with all others, and commit it.

        Raises sqlite3.Error or OSError. After these a worker leaves the database alone for a while,
        so that deliveries are spooled at once. Maintenance waits 0 seconds and makes no pause.
        """
        if self.is_paused():
            raise self.trouble.with_traceback(None)
        try:
            connection = self.connection()
            with self.turn(seconds), connection:
                connection.execute("BEGIN IMMEDIATE")
                yield connection
            if os.stat(self.path).st_ino != self.inode:
                raise OSError("its file has been replaced")
        except GIVEN_FAULTS:
            raise
        except (sqlite3.Error, OSError) as error:
            if not is_busy(error):
                self.close()
            if seconds:
                self.paused_until = time.monotonic() + PAUSE_SECONDS
                self.trouble = error
            raise

    def is_paused(self):
        """Return True if this worker leaves the database alone for now."""
        return time.monotonic() < self.paused_until

    def close(self):
        """Close the connection. The next use opens it anew."""
        if self.kept is not None:
            with suppress(sqlite3.Error):
                self.kept.close()
            self.kept = None


def read_version(connection):
    """Return the version of the database. Raises sqlite3.DatabaseError if it is not for us."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    is_ours = {"errors", "health"} <= names and version > 0
    if names and not is_ours:
        raise sqlite3.DatabaseError("it is another program's; name another file in DATABASE_URL")
    if version > SCHEMA_VERSION:
        words = f"it was made by a newer collector; run that, or {RESTORE_CURE}"
        raise sqlite3.DatabaseError(words)
    return version


def upgrade(connection):
    """Bring a new or old database to this code's version in one transaction, in the turn."""
    version = read_version(connection)  # once more: another process may have done it
    if version == SCHEMA_VERSION:
        return
    sql = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
    steps, from_2, from_1 = re.split(r"^-- From version [0-9]$", sql, flags=re.MULTILINE)
    if version:
        log.warning("upgrading the database from version %d to %d", version, SCHEMA_VERSION)
        from_old = from_2 if version == 2 else from_1 + from_2
        steps = f"ALTER TABLE errors RENAME TO errors_old; {steps} {from_old}"
    started = time.monotonic()
    connection.create_function("server_of", 1, server_of, deterministic=True)
    connection.create_function("category_of", 2, category_of, deterministic=True)
    connection.create_function("digest_of", 2, digest_of, deterministic=True)
    with connection:
        connection.executescript(
            f"BEGIN IMMEDIATE; {steps}; PRAGMA user_version = {SCHEMA_VERSION}"
        )
    if version:
        log.warning("upgraded the database in %.1f s", time.monotonic() - started)


def category_of(payload, payload_bytes):
    """Return the category of the error in a body of 1.0.0, which may be damaged."""
    with suppress(Exception):  # or one body would keep the database from its upgrade
        return parse_error(load(unpack(payload, payload_bytes)), None, "")["category"]
    return "error"


def digest_of(payload, payload_bytes):
    """Return the digest of a body of 1.0.0, which may be damaged."""
    with suppress(zlib.error):
        payload = unpack(payload, payload_bytes)
    return hashlib.sha256(payload).hexdigest()[:32]


def pack(body):
    """Return the columns of `bodies` for a body (bytes), to be made before the transaction."""
    packed = zlib.compress(body, 1)
    if len(packed) >= len(body):
        packed = body  # sqlar_uncompress takes a blob of the stated length for one not compressed
    return {"payload": packed, "payload_bytes": len(body)}


def unpack(payload, payload_bytes):
    """Return the body (bytes) of the columns that pack made."""
    if len(payload) == payload_bytes:
        return payload
    return zlib.decompress(payload)


FIND_IDENTITY = "SELECT id, short_id FROM errors WHERE identity = :identity"
FIND_ISSUE = """SELECT id, short_id FROM errors WHERE issue_id = :issue_id AND server IS :server
    ORDER BY id LIMIT 1"""
LEARN_SHORT_ID = "UPDATE errors SET short_id = ? WHERE id = ?"
INSERT_ERROR = "INSERT INTO errors ({}, identity) VALUES ({}, :identity)".format(
    ", ".join(COLUMNS), ", ".join(f":{name}" for name in COLUMNS)
)
INSERT_BODY = "INSERT INTO bodies VALUES (last_insert_rowid(), :payload_bytes, :payload)"


def insert(connection, row):
    """Insert a row with its body unless the error is there. Return its id, and True if it is new.

    `row` has the keys of COLUMNS, `identity`, and those of pack. The caller's transaction makes
    looking and inserting one step.
    """
    known = connection.execute(FIND_IDENTITY, row).fetchone()
    is_issue_alone = row["action"] == "created" and row["event_id"] is None
    if known is None and is_issue_alone:
        known = connection.execute(FIND_ISSUE, row).fetchone()
    if known is None:
        id_ = connection.execute(INSERT_ERROR, row).lastrowid
        connection.execute(INSERT_BODY, row)
        return id_, True
    if known["short_id"] is None and row["short_id"] is not None:
        connection.execute(LEARN_SHORT_ID, (row["short_id"], known["id"]))
    return known["id"], False


def check_writable(database):
    """Commit a row and prove that an error can be inserted. Raises sqlite3.Error or OSError."""
    at = now()
    row = dict.fromkeys(COLUMNS) | {"received_at": at, "timestamp": at, "identity": "health"}
    check_room(database.path.parent, 0, database)
    with database.transaction() as connection:
        connection.execute("SAVEPOINT health")
        insert(connection, row | pack(b"{}"))
        connection.execute("ROLLBACK TO health")
        sql = "INSERT INTO health VALUES (1, :at) ON CONFLICT DO UPDATE SET checked_at = :at"
        connection.execute(sql, {"at": at})


def delete_expired(database, days):
    """Delete some errors of hours that are more than `days` ago. Return how many."""
    sql = "SELECT id FROM errors WHERE received_at < ? ORDER BY received_at LIMIT ?"
    with database.reader() as connection:
        ids = connection.execute(sql, (now(days=days)[:13], DELETE_ROWS)).fetchall()
    if not ids:
        return 0
    with database.transaction(0) as connection:
        connection.executemany("DELETE FROM bodies WHERE id = ?", ids)
        return connection.executemany("DELETE FROM errors WHERE id = ?", ids).rowcount


def add_outcomes(database, counts, seconds):
    """Add counts of deliveries, {(outcome, reason): (count, time of the last)}."""
    sql = """INSERT INTO outcomes VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET
        count = count + excluded.count, last_at = max(last_at, excluded.last_at)"""
    with database.transaction(seconds) as connection:
        connection.executemany(sql, [(*key, *value) for key, value in counts.items()])


# SQL conditions of the query's filters by name. Of a list of values each has to match. A plus keeps
# SQLite from an index that does not give the rows by id.
FILTERS = {
    "q": """(title LIKE :q ESCAPE '^' OR message LIKE :q ESCAPE '^' OR culprit LIKE :q ESCAPE '^'
        OR exception_type LIKE :q ESCAPE '^' OR exception_value LIKE :q ESCAPE '^')""",
    "project": "(project_slug = :project OR project_id = :project)",
    "level": "instr(',' || :level || ',', ',' || level || ',') > 0",
    "environment": "environment = :environment",
    "platform": "platform = :platform",
    "release": "release = :release",
    "category": "category = :category",
    "server": "server IS :server",
    "issue": "issue_id = :issue",
    "event": """event_id = :event AND errors.id IN (
        SELECT id FROM errors WHERE identity BETWEEN :event || ' ' AND :event || '!'
        UNION ALL SELECT id FROM errors WHERE identity BETWEEN 'double ' AND 'double!')""",
    "since": "+received_at >= :since",
    "until": "+received_at <= :until",
}
ISSUE_FILTERS = "q", "project", "level", "category", "server", "issue", "since", "until"


def locate(connection, filters):
    """Return the filters with issue id and server in the place of a short id.

    With its server, the index gives the rows of an issue by id.
    """
    sql = """SELECT issue_id AS issue, server FROM errors WHERE short_id = :issue
        AND issue_id IS NOT NULL AND server IS coalesce(:server, server) ORDER BY id DESC LIMIT 1"""
    found = connection.execute(sql, {"issue": None, "server": None} | filters).fetchone()
    return filters | dict(found or {})


def find_bounds(database, filters):
    """Return the first and the last id that the filters leave to a walk."""
    sql = "SELECT coalesce(min(id), 1), coalesce((SELECT max(id) FROM errors), 0) FROM errors"
    with database.reader() as connection:
        first, last = connection.execute(sql).fetchone()
    if "since" in filters or "until" in filters:
        # Not the ids at the ends of the period: what was spooled has a later id than its time.
        sql = """SELECT coalesce(min(+id), 1), coalesce(max(+id), 0) FROM errors
            WHERE received_at BETWEEN :since AND :until"""
        # A long period leaves all ids.
        with suppress(sqlite3.OperationalError), database.reader(PERIOD_SECONDS) as connection:
            first, last = connection.execute(sql, {"since": "", "until": "~"} | filters).fetchone()
    after = filters.get("after", 0)
    before = filters.get("before", math.inf)
    return max(first, after + 1), min(last, before - 1)


def build_condition(filters):
    """Return the SQL condition of the filters, and its parameters."""
    conditions = ["errors.id BETWEEN :first AND :last"]
    parameters = {}
    for name in FILTERS.keys() & filters.keys():
        sql = FILTERS[name]
        values = filters[name]
        if not isinstance(values, list):
            values = [values]
            if name == "q":  # an event id
                sql = FILTERS["event"].replace(":event", ":q")
        for number, value in enumerate(values):
            conditions.append(sql.replace(f":{name}", f":{name}_{number}"))
            parameters[f"{name}_{number}"] = value
    return " AND ".join(conditions), parameters


def blocks(first, last, is_upward):
    """Yield the bounds of blocks of ids, small ones first, from where a walk begins."""
    size = FIRST_BLOCK
    while first <= last:
        if is_upward:
            yield first, min(last, first + size - 1)
            first += size
        else:
            yield max(first, last - size + 1), last
            last -= size
        size = min(2 * size, LARGEST_BLOCK)


Walk = namedtuple("Walk", "rows last_id is_finished")  # last_id is that of the last row looked at


def walk(select, database, filters, limit, seconds=LIST_SECONDS):
    """Return the Walk over the rows that match, until the page is full, the time is over, or all.

    `filters` are values by the names of FILTERS, and the ids `before`, or `after` which the oldest
    come first. The first block is not ended by the clock, so that a walk always gets on.
    """
    deadline = time.monotonic() + seconds
    with database.reader() as connection:
        filters = locate(connection, filters)
    first, last = find_bounds(database, filters)
    condition, parameters = build_condition(filters)
    is_upward = "after" in filters
    sql = f"{select} {condition} ORDER BY errors.id {'ASC' if is_upward else 'DESC'}"
    rows = []
    last_id = filters.get("after", last + 1)
    room = PAGE_CHARACTERS
    left = READ_SECONDS
    for low, high in blocks(first, last, is_upward):
        try:
            with database.reader(left) as connection:
                for row in connection.execute(sql, parameters | {"first": low, "last": high}):
                    rows.append(row)
                    last_id = row["id"]
                    room -= sum(len(value) for value in row if isinstance(value, str))
                    if len(rows) == limit or room < 0:
                        return Walk(rows, last_id, last_id == (last if is_upward else first))
        except sqlite3.OperationalError as error:
            if kind_of(error) != "INTERRUPT" or left == READ_SECONDS:
                raise
            return Walk(rows, last_id, False)
        last_id = high if is_upward else low
        left = deadline - time.monotonic()
    return Walk(rows, last_id, True)


SELECT_ERRORS = f"SELECT {', '.join(COLUMNS)} FROM errors WHERE"
OF_ISSUE = "FROM errors AS one WHERE one.issue_id = errors.issue_id AND one.server IS errors.server"
SELECT_ISSUES = f"""
    SELECT id, issue_id, server, project_id, project_slug, title, culprit, level, category,
        coalesce(short_id, (SELECT max(short_id) FROM (
            SELECT short_id {OF_ISSUE} ORDER BY id LIMIT 100))) AS short_id,
        (SELECT count(*) {OF_ISSUE}) AS count,
        (SELECT received_at {OF_ISSUE} ORDER BY id LIMIT 1) AS first_seen,
        received_at AS last_seen, id AS newest
    FROM errors
    WHERE issue_id IS NOT NULL AND NOT EXISTS (SELECT 1 {OF_ISSUE} AND one.id > errors.id) AND"""
SELECT_OCCURRENCES = f"""
    SELECT (SELECT count(*) {OF_ISSUE}) AS count,
        (SELECT received_at {OF_ISSUE} ORDER BY id LIMIT 1) AS first_seen,
        (SELECT received_at {OF_ISSUE} ORDER BY id DESC LIMIT 1) AS last_seen
    FROM errors WHERE id = ? AND issue_id IS NOT NULL"""


select_errors = functools.partial(walk, SELECT_ERRORS)
select_issues = functools.partial(walk, SELECT_ISSUES)  # by their newest errors


def select_error(connection, id_):
    """Return an error's row, or None."""
    return connection.execute(f"{SELECT_ERRORS} id = ?", (id_,)).fetchone()


def select_body(connection, id_):
    """Return the body of a stored delivery as it was received (bytes), or None."""
    sql = "SELECT payload, payload_bytes FROM bodies WHERE id = ?"
    row = connection.execute(sql, (id_,)).fetchone()
    try:
        return row and unpack(*row)
    except zlib.error as error:
        raise sqlite3.DatabaseError(f"the body of error {id_} is damaged: {error}") from None


def select_occurrences(connection, row):
    """Return count, first_seen and last_seen of the issue of an error's row, or None."""
    found = connection.execute(SELECT_OCCURRENCES, (row["id"],)).fetchone()
    return found and dict(found)


def select_state(connection):
    """Return the count of the errors, and the rows of the newest and the oldest one or None."""
    ids = "SELECT count(*), (SELECT max(id) FROM errors), (SELECT min(id) FROM errors) FROM errors"
    count, newest, oldest = connection.execute(ids).fetchone()
    return {
        "errors": count,
        "newest": select_error(connection, newest),
        "oldest": select_error(connection, oldest),
    }


def select_hours(connection):
    """Return the hours of the last 48 as (2026-11-28T22, errors received in it), oldest first."""
    sql = "SELECT count(*) FROM errors WHERE received_at BETWEEN ? AND ? || '~'"
    hours = [now(hours=ago)[:13] for ago in range(47, -1, -1)]
    return [(hour, *connection.execute(sql, (hour, hour)).fetchone()) for hour in hours]


def select_outcomes(connection):
    """Return the counts of deliveries by outcome and reason, the latest first."""
    sql = """SELECT outcome, nullif(reason, '') AS reason, count, last_at FROM outcomes
        ORDER BY last_at DESC"""
    return [dict(row) for row in connection.execute(sql)]


def database_bytes(connection, pages="page_count"):
    """Return the size of the database in bytes, or of other pages that a pragma counts."""
    size = connection.execute("PRAGMA page_size").fetchone()[0]
    return size * connection.execute(f"PRAGMA {pages}").fetchone()[0]


def check_room(folder, wanted, database=None):
    """Raise OSError unless a folder has room beyond the reserve for retention.

    The free pages of the database, if it is given, count, too.
    """
    disk = shutil.disk_usage(folder)
    room = disk.free - min(RESERVE_BYTES, disk.total // 10)
    if database and room < wanted:
        with database.reader() as connection:
            room += database_bytes(connection, "freelist_count")
    if room < wanted:
        raise OSError(errno.ENOSPC, "only the reserve for retention is left of the disk")


def sync(path):
    """Sync what was written to a file, or the names in a folder, to disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


class Spool:
    """A folder of deliveries that the database could not take, files in order of receipt."""

    def __init__(self, folder):
        self.folder = folder

    def put(self, received_at, resource, body):
        """Write a delivery to disk, synced. Raises OSError if that cannot be done."""
        self.check_room(len(body))
        part = self.folder / f"{time.time_ns():020}-{os.getpid()}.part"
        try:
            with open(part, "xb") as file:
                file.write(json.dumps([received_at, resource]).encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            part.rename(part.with_suffix(".delivery"))
            sync(self.folder)  # without this a new name is not durable
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def check_room(self, size):
        """Raise OSError unless the spool, made if missing, takes a delivery of `size` bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        check_room(self.folder, size)
        if len(os.listdir(self.folder)) >= SPOOL_LIMIT:
            raise OSError(errno.ENOSPC, f"the spool is full, it holds {SPOOL_LIMIT} deliveries")

    def files(self):
        """Return the files that wait (paths), in order of receipt."""
        return sorted(self.folder.glob("*.delivery"))


def parse_spooled(content):
    """Return received_at, resource and body of a spooled file. Raises ValueError if it is none."""
    head, _, body = content.partition(b"\n")
    received_at, resource, *_ = json.loads(head)  # 2.0.0 wrote length and checksum, too
    datetime.fromisoformat(received_at)
    return received_at, resource, body


def copy_database(path, file):
    """Copy the database to a new file while the service runs.

    Raises ValueError if there is no database or the file is there, else sqlite3.Error or OSError.
    """
    if not path.exists() or not path.stat().st_size:
        raise ValueError(f"there is no database at {path}")
    if file.exists():
        raise ValueError(f"{file} is there already; name a new file")
    # To read a database at rest in WAL mode, SQLite would make files of this user's beside it.
    wal = Path(f"{path}-wal")
    is_at_rest = choose_journal_mode(path.parent) == "WAL" and not wal.exists()
    uri = f"{path.absolute().as_uri()}?{'immutable=1' if is_at_rest else 'mode=ro'}"
    part = file.with_name(f"{file.name}.part")
    part.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as connection:
            read_version(connection)
            connection.execute("VACUUM INTO ?", (str(part),))
        if is_at_rest and wal.exists():
            raise ValueError("the service has started meanwhile; try again")
        sync(part)
        part.rename(file)
        sync(file.absolute().parent)
    finally:
        part.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# Intake: what the routes of one app share, and the maintenance between requests
# --------------------------------------------------------------------------------------------------

STEP_SECONDS = 0.5  # time between two turns of a step of maintenance that has no more to do


class Store:
    """The one way in for deliveries, from the webhook and from the spool."""

    def __init__(self, settings, report):
        self.settings = settings
        self.report = report  # function that reports an exception of the collector's own
        path = settings["DATABASE_URL"]
        self.database = Database(path)
        self.spool = Spool(path.parent / "spool")
        self.waiting = []  # spooled files, the next one last, listed once for all that wait
        self.counts = {}  # (count, time of the last) by (outcome, reason), not written yet
        self.deleted = 0  # expired errors since the last log line about them
        self.failures = {}  # kind of the last failure by step of maintenance, logged once
        # Monotonic time at which a step of maintenance is due.
        self.due = dict.fromkeys((self.write_counts, self.move_spooled, self.prune), -math.inf)

    def upgrade(self):
        """Bring the database to this code's version, in a child that ends with its parent."""
        parent = os.getppid()
        while os.getppid() == parent:
            try:
                self.database.connection()
                break
            except (sqlite3.Error, OSError) as error:
                self.log_failure("cannot use the database, deliveries are spooled", error)
                if not is_busy(error):
                    break
            time.sleep(1)

    def keep(self, body, resource, received_at):
        """Store a delivery, or spool it whatever fails, because Sentry will not send it again.

        Returns the outcome, and the error's id or None. Raises Refused if it holds no wanted error,
        or if neither is possible.
        """
        was_paused = self.database.is_paused()
        try:
            wanted = self.settings["SENTRY_ACTIONS"]
            outcome, id_ = self.store(body, resource, received_at, wanted)
            self.count(outcome)
            return outcome, id_
        except Refused:
            raise
        except Exception as error:
            self.log_failure("cannot store a delivery, spooling it", error)
            is_of_database = isinstance(error, sqlite3.Error | OSError)
            reason = "database not writable" if is_of_database else "fault of the collector"
        try:
            self.spool.put(received_at, resource, body)
        except Exception as error:
            if was_paused:  # the database, which nobody has asked yet, is all that is left
                self.database.paused_until = -math.inf
                return self.keep(body, resource, received_at)
            self.log_failure("LOST a delivery: it can neither be stored nor spooled", error)
            raise Refused("disk", str(error)) from None
        self.count("queued", reason)
        return "queued", None

    def store(self, body, resource, received_at, wanted, seconds=TURN_SECONDS):
        """Commit a delivery's error, or raise Refused if it is unwanted. Return outcome and id."""
        payload = parse_body(body)
        row = parse_error(payload, resource, received_at)
        action = text(payload.get("action"))
        if row is None or action not in (None, *ACTIONS):
            told = f"resource {ascii(cut(resource, 40))} with action {ascii(cut(action, 40))}"
            raise Refused("no error", told)
        if action not in (None, *wanted):
            raise Refused("action not accepted", ",".join([*wanted, action]))
        row |= {"id": None, "identity": identity(row, body)} | pack(body)
        check_room(self.database.path.parent, 2 * len(body), self.database)
        with self.database.transaction(seconds) as connection:
            id_, is_new = insert(connection, row)
        return "stored" if is_new else "duplicate", id_

    def count(self, outcome, reason=""):
        """Count a delivery, in memory for about a second. Outcome and reason are a fixed few."""
        number, _ = self.counts.get((outcome, reason), (0, None))
        self.counts[outcome, reason] = (number + 1, now())

    def log_failure(self, what, error):
        """Log and report a failure, with nothing of a delivery's content."""
        cause = error
        if not isinstance(error, sqlite3.Error | OSError):  # its words may quote a delivery
            cause = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s: %s: %s", what, type(error).__name__, cause)
        self.report(error)

    def maintain(self):
        """Do the most urgent step of what must not delay a reply. Return True if more is due."""
        step = min(self.due, key=self.due.get)
        if self.database.is_paused() or self.due[step] > time.monotonic():
            return False
        self.due[step] = time.monotonic() + STEP_SECONDS
        try:
            if step():
                self.due[step] = time.monotonic()
            self.failures.pop(step, None)
        except (sqlite3.Error, OSError, MemoryError) as error:
            if not is_busy(error) and kind_of(error) != self.failures.get(step):
                self.failures[step] = kind_of(error)
                self.log_failure("maintenance failed", error)
        return min(self.due.values()) <= time.monotonic()

    def write_counts(self, seconds=0):
        """Write the counts of deliveries."""
        if self.counts:
            add_outcomes(self.database, self.counts, seconds)
            self.counts.clear()

    def move_spooled(self):
        """Move a spooled delivery into the database. Return True if more wait."""
        self.waiting = self.waiting or self.spool.files()[::-1]
        if not self.waiting:
            return False
        file = self.waiting.pop()  # so that one that cannot be read holds up no other
        with suppress(FileNotFoundError):  # another worker has moved it
            self.move(file, file.read_bytes())
        return bool(self.waiting)

    def move(self, file, content):
        """Store a spooled delivery, and remove its file, or rename it if it can never be stored."""
        try:
            received_at, resource, body = parse_spooled(content)
            self.store(body, resource, received_at, ACTIONS, 0)
            file.unlink(missing_ok=True)
        except Exception as error:
            is_of_system = isinstance(error, sqlite3.Error | OSError | MemoryError)
            if is_of_system and not isinstance(error, GIVEN_FAULTS):
                if not isinstance(error, MemoryError):  # for which others may be small enough
                    self.waiting.clear()  # so that it is the first one again
                raise
            aside = file.rename(file.with_suffix(".rejected"))
            log.error("cannot store a spooled delivery (%s), see %s", type(error).__name__, aside)

    def prune(self):
        """Delete some errors that RETENTION_DAYS has passed. Return True if there may be more."""
        days = self.settings["RETENTION_DAYS"]
        deleted = delete_expired(self.database, days) if days else 0
        self.deleted += deleted
        if self.deleted and not deleted:
            log.info("deleted %d errors that were older than %d days", self.deleted, days)
            self.deleted = 0
        return deleted > 0

    def close(self):
        """Write what is only in memory, and close the database. The process ends."""
        with suppress(sqlite3.Error, OSError):
            self.write_counts(TURN_SECONDS)
        self.database.close()


# --------------------------------------------------------------------------------------------------
# Presentation: one function for each shape that goes out
# --------------------------------------------------------------------------------------------------

TEXT_LENGTH = 7300  # characters of a text form's head and sections; the note below has 700 more
ROOT_CAUSE = "caused by (root)"  # role of the first exception in Sentry's order
# Characters that a section may have before it gets what others leave, and lines before those that
# are left out first, else the last ones are: by how the section begins.
SECTIONS = {
    "exception": (2600, 4),
    ROOT_CAUSE: (1400, 2),
    "caused by": (300, 2),
    "wrapped in": (300, 2),
    "breadcrumbs": (1200, 1),
    "": (700, None),
}
NEAR = 3  # causes of the main exception that are shown beside the root, and what wraps it
LINE_SHOWN = 160  # most characters of a source line in a text form
VARIABLES_SHOWN = 1000  # characters of variables after which the others are left out
CUT = "\ue000"  # stands in a text form for what a line lost; no text of an error may have it
KEPT_ON_PAGES = "\n\t\u200c\u200d"  # line ends, and what Arabic, Indic scripts and emoji need
# Letters and marks without a picture: Unicode's Default_Ignorable ones, and the blank of Braille.
BLANKS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
ESCAPE_SEQUENCES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]?"
)


def as_json(value):
    """Return a value as a line of JSON, ASCII so that no terminal obeys it."""
    return json.dumps(value) + "\n"


def summary(row, base):
    """Return the scalar keys of an error. `base` is what the addresses here begin with."""
    return {"id": row["id"], "url": f"{base}/errors/{row['id']}"} | dict(row)


def detail(error, body):
    """Return an error in full, of its summary with `occurrences` and its delivery (bytes)."""
    return error | parse_detail(load(body))


def issue(row, base):
    """Return an issue. `base` is what the addresses here begin with."""
    shown = dict(row) | {"url": issue_link(row, base)}
    shown.pop("id", None)  # of the walk; `newest` says the same
    return shown


def issue_link(row, base):
    """Return the address of the errors of a row's issue."""
    query = {"issue": row["issue_id"]}
    if row["server"]:
        query["server"] = row["server"]
    return f"{base}/errors?{urlencode(query)}"


def as_words(value, indent=None):
    """Return text as it is, and any other JSON value as JSON, over several lines if indented."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, indent=indent)


def without_hidden(value, kept=""):
    """Return text without escape sequences and hidden characters, its white space made blanks."""
    if value.isascii() and value.isprintable():  # as most text is, and a page has thousands
        return value
    value = BLANKS.sub("", ESCAPE_SEQUENCES.sub("", value))
    return "".join(c if c.isprintable() or c in kept else " " * c.isspace() for c in value)


def visible(value, length=2000):
    """Return a value as HTML of at most `length` characters, without hidden ones."""
    return escape(without_hidden(cut(as_words(value), length), KEPT_ON_PAGES))


def flat(value, length=200):
    """Return a value as one line of a text form, of at most `length` characters."""
    words = as_words(value)
    line = " ".join(without_hidden(words[: 8 * length]).split())
    if len(line) > length or len(words) > 8 * length or words == "…":
        return line[: length - 1].rstrip("…") + CUT
    return line


def no_trace(error, frames):
    """Return the sentence that says why an error has no stack trace, None if it has one."""
    category = error["category"] or "error"
    if category == "error" and error["resource"] == "issue" and not error["event_id"]:
        return "This issue webhook has no event; error webhooks and alerts have one with its trace."
    if frames:
        return None
    if category != "error":
        return f"There is no stack trace: this is an issue of the category {category[:40]}."
    return "There is no stack trace: the SDK that reported this sent none."


def chain_of(error, parsed, clues):
    """Return the exceptions and what is told of each: the main one, its causes, its wrappers."""
    chain = []
    for index, exception in enumerate(parsed["exceptions"]):
        told = {"omitted": clues["omitted"][index], "signal": clues["signals"][index]}
        chain.append(exception | told)
    if not chain:  # an event without exceptions may have words and a stack trace
        only = {"type": error["exception_type"], "value": error["exception_value"]}
        is_exception = error["category"] in (None, "error") and any(only.values())
        if is_exception or parsed["stacktrace"]:
            chain.append(only | {"main": True, "frames": parsed["stacktrace"]})
    main = next((index for index, link in enumerate(chain) if link["main"]), 0)
    causes = chain[:main][::-1]
    for index, link in enumerate(chain):
        link |= {"role": "caused by" if index < main else "wrapped in", "own": None}
    for link in causes[-1:]:
        link |= {"role": ROOT_CAUSE, "own": own_frame(link["frames"])}
    for link in chain[main : main + 1]:
        link |= {"role": "exception", "own": own_frame(link["frames"])}
    shown_causes = causes[:NEAR] + causes[NEAR:][-1:]
    return chain[main : main + 1] + shown_causes + chain[main + 1 :][:NEAR]


def own_frame(frames):
    """Return the last frame of the application's own code, else the last frame, else None."""
    own = [frame for frame in frames if frame["in_app"]]
    return next(reversed(own or frames), None)


def fold(frames, marked):
    """Return runs of frames as (True for library code, frames), the crash never in one of these."""
    runs = groupby(frames, lambda it: marked and not it["in_app"] and it is not frames[-1])
    return [(is_library, list(run)) for is_library, run in runs]


def place(frame):
    """Return where a frame is, in the words of a Python traceback."""
    file = frame["filename"] or frame["abs_path"]
    # The last part of a path, and a .NET assembly without its version.
    package = re.split(r"[/\\]", frame["package"] or "")[-1].partition(", Version=")[0]
    module = (frame["module"] or "").removeprefix("Elixir.")
    parts = [f'File "{file or package or module or "?"}"']
    if (frame["lineno"] or 0) > 0:
        parts.append(f"line {frame['lineno']}")
    line = (frame["context_line"] or "").strip()
    if frame["colno"] and (not line or len(line) > LINE_SHOWN or "{snip}" in line):
        parts.append(f"column {frame['colno']}")
    function = frame["function"] or "?"
    # A class or module is told where neither the file nor the function does so.
    path = re.sub(r"[.:\\]+", "/", module)
    is_told = path in re.sub(r"[.:\\]+", "/", file or package or module) or module in function
    if is_told or module.startswith(("<", "__main__")):
        parts.append(f"in {function}")
    elif " " in function.partition("(")[0]:  # it begins with what it returns
        parts.append(f"in {function} of {module}")
    else:
        parts.append(f"in {module}.{function}")
    if package and file:
        parts.append(f"package {package}")
    if frame["instruction_addr"] and (package or not frame["lineno"]):
        parts.append(f"address {frame['instruction_addr']}")
    return ", ".join(parts)


def source_lines(frame, around):
    """Return a frame's source lines as (number or 0, text, True where it failed)."""
    if frame["context_line"] is None:
        return []
    before = (frame["pre_context"] or [])[-around:]
    after = (frame["post_context"] or [])[:around]
    lineno = frame["lineno"] or 0
    if lineno < 1:
        lineno = -around  # so that no line has a number
    numbered = []
    for index, line in enumerate([*before, frame["context_line"], *after], -len(before)):
        numbered.append((max(lineno + index, 0), line, index == 0))
    return numbered


def source_line(line, column):
    """Return a source line for a text form, indented. Of a long one the part at `column`."""
    line = line.expandtabs(4)
    if line.startswith("…"):  # it was cut around the column when it was read
        column = len(line) // 2
    if len(line) > LINE_SHOWN and LINE_SHOWN < (column or 0) < len(line):
        return CUT + flat(line[column - LINE_SHOWN // 2 :], LINE_SHOWN)
    words = line.lstrip()
    return " " * min(len(line) - len(words), 40) + flat(words, LINE_SHOWN)


def variables_by_use(frame):
    """Return the lines of a frame's variables, those that its source line names first."""
    used = set(re.findall(r"\w+", frame["context_line"] or ""))
    room = VARIABLES_SHOWN
    lines = []
    variables = (frame["vars"] or {}).items()
    for name, value in sorted(variables, key=lambda item: item[0].strip("'") not in used):
        if not name.startswith("__") or not name.endswith("__"):
            lines.append(f"  {flat(name, 60)} = {flat(value, 300)}")
            room -= len(lines[-1])
        if room < 0:
            return [*lines[:-1], f"  more variables{CUT}"]
    return lines


def trace_lines(link, marked):
    """Yield the lines of an exception's trace, the oldest call first, library frames folded."""
    for is_library, run in fold(link["frames"], marked):
        if is_library:
            yield f"[{len(run)} library frame{'s' if len(run) > 1 else ''}]"
            continue
        for frame in run:
            yield flat(place(frame), 300)
            if frame is link["own"]:
                for number, line, is_crash in source_lines(frame, 3):
                    shown = source_line(line, is_crash and frame["colno"])
                    yield f"{'>' if is_crash else ' '} {number or '':>5} | {shown}".rstrip()
                yield from variables_by_use(frame)
            elif frame["context_line"]:
                yield "    " + source_line(frame["context_line"], frame["colno"]).strip()


def error_page(error, body):
    """Return what the page and the text form of an error show, of what `detail` takes."""
    payload = load(body)
    parsed = parse_detail(payload)
    clues = parse_clues(payload)
    chain = chain_of(error, parsed, clues)
    marked = any(frame["in_app"] for link in chain for frame in link["frames"])
    why = no_trace(error, parsed["stacktrace"])
    return {"error": error | parsed, "clues": clues, "chain": chain, "marked": marked, "why": why}


def error_text(error, body, url):
    """Return an error as text, the most useful part first. `url` is its whole address."""
    words = render_template("error.txt", **error_page(error, body), url=url)
    head, *sections = words.strip("\n").split("\n\n")
    sizes = []
    rules = []
    for section in sections:
        rules.append(next(SECTIONS[name] for name in SECTIONS if section.startswith(name)))
        sizes.append(min(len(section), rules[-1][0]) + 2)
    room = TEXT_LENGTH - len(head) - len(url)
    shown = [head]
    left_out = []
    for index, section in enumerate(sections):
        free = room - sum(sizes[index + 1 :])
        part = cut_section(section, min(room, max(sizes[index], free)) - 2, rules[index][1])
        if part != section:
            left_out.append(re.split("[:(]", section)[0].strip())
        if part:
            shown.append(part)
            room -= len(part) + 2
    text_form = "\n\n".join(shown)
    if CUT in text_form:
        left_out.append("long values (…)")
    if left_out:
        parts = ", ".join(dict.fromkeys(left_out))
        text_form += f"\n\nleft out: parts of {parts}; whole: {url}/payload"
    return text_form.replace(CUT, "…") + "\n"


def cut_section(section, room, first):
    """Return a section cut to `room` characters, by lines after the `first`, or else its last."""
    if len(section) <= room:
        return section
    lines = section.split("\n")
    number = len(lines)
    size = len(section) + 30  # with the words about what was left out
    while size > room and len(lines) > (first or 1):
        size -= len(lines.pop(first or -1)) + 1
    if size > room or len(lines) == 1:
        return ""
    lines.insert(first or number, f"  [{number - len(lines)} lines left out]")
    return "\n".join(lines)


def list_text(lines, next_url, nothing="no errors"):
    """Return a list as text, a line each, with the address of the next page if there is one."""
    shown = list(lines) or [nothing]
    if next_url:
        shown.append(f"next: {next_url}")
    return "\n".join(shown) + "\n"


def error_line(row):
    """Return the line of an error in a list."""
    told = (row["received_at"], row["level"], row["project_slug"], row["title"], row["culprit"])
    return f"#{row['id']} {flat(' '.join(filter(None, told)), 300)}".replace(CUT, "…")


def issue_line(row):
    """Return the line of an issue in a list. Its number is that of its newest error."""
    name = row["short_id"] or row["issue_id"]
    told = filter(None, (name, row["level"], row["project_slug"], row["title"], row["culprit"]))
    seen = f"count {row['count']}, last seen {row['last_seen']}"
    return f"#{row['newest']} {seen}: {flat(' '.join(told), 300)}".replace(CUT, "…")


PAGE_FILTERS = {
    each.__name__: each
    for each in (visible, flat, as_words, fold, place, source_lines, trace_lines)
}


# --------------------------------------------------------------------------------------------------
# Web: thin routes, which read the request, call down and reply
# --------------------------------------------------------------------------------------------------

web = Blueprint("web", __name__, cli_group=None)
STYLE = Path(__file__).with_name("templates").joinpath("style.css").read_text(encoding="utf-8")
STYLE_DIGEST = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS = {  # of every reply: they keep hostile text harmless, and replies out of shared caches
    "Content-Security-Policy": f"default-src 'none'; style-src 'sha256-{STYLE_DIGEST}'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "private, no-cache",
    "Vary": "Accept, Authorization",
}
JSON = "application/json"
FORMS = {  # media types by form, those preferred where Accept names several alike first
    "json": (JSON,),
    "text": ("text/plain", "text/markdown"),
    "html": ("text/html",),
    "ndjson": ("application/x-ndjson",),
}
PAGE_FORMS = "json", "text", "html"
ROWS = {"json": (100, 1000), "text": (100, 1000), "html": (50, 250)}  # default and most of a list
LISTS = {  # what selects and shapes the rows of a list, its filters and its template
    "errors": (select_errors, summary, error_line, FILTERS, "list.html"),
    "issues": (select_issues, issue, issue_line, ISSUE_FILTERS, "issues.html"),
}
LEVELS = "fatal", "error", "warning", "info", "debug", "sample"  # levels that Sentry knows
SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}  # of the units of a time ago
LATEST_SECONDS = 0.7  # longest search for one error
EXPORT_ROWS = 100  # rows that an export reads at a time
CHALLENGE = WWWAuthenticate("basic", {"realm": "Sentry Error Collector", "charset": "UTF-8"})
UNSAFE = re.compile(r"[^\w.:/-]", re.ASCII)  # what could end a log line or pass for another
REPLY_BYTES = 1024  # bytes of a refusal that Sentry keeps for the integration's owner to read
STATUSES = {"stored": 201, "duplicate": 200, "queued": 202}  # of the reply, by outcome
SECRET_CURE = "set SENTRY_CLIENT_SECRET to the Client Secret of the integration that sends"
SIGN_CURE = "sign, as internal integrations do; for the legacy plugin unset SENTRY_CLIENT_SECRET"
SENDER_CURE = "point only Sentry's webhooks here"
# What deliveries are counted under: the status of a refusal, what is wrong, and what to do.
REASONS = {
    "too large": (413, "The delivery is longer than {} bytes", "raise MAX_BODY_BYTES to take it"),
    "cut short": (400, "The delivery broke off", "look for a proxy that ends requests too early"),
    "signature missing": (401, "The Sentry-Hook-Signature header is missing", SIGN_CURE),
    "signature wrong": (401, "The Sentry-Hook-Signature is wrong", SECRET_CURE),
    "sent by a web page": (403, "A web page has sent this", "send it by Sentry or by a program"),
    "not UTF-8": (400, "The body is not UTF-8", "send JSON text encoded as UTF-8"),
    "not JSON": (400, "The body is not JSON ({})", SENDER_CURE),
    "no object": (400, "The JSON is not an object", SENDER_CURE),
    "no delivery": (400, "The JSON has neither an 'action' nor a legacy 'event'", SENDER_CURE),
    "wrong address": (404, "Nothing takes a POST here", "set the integration's Webhook URL to {}"),
    "disk": (503, "Neither database nor spool takes a delivery: {}", OTHER_CURE),
    "no error": (200, "{} holds no new error", "untick that webhook in Sentry to have fewer"),
    "action not accepted": (200, "SENTRY_ACTIONS={} would take this", "add it to SENTRY_ACTIONS"),
    "database not writable": (202, "", "see /health; these are in the spool"),
    "fault of the collector": (202, "", "see the log, and report it; these are in the spool"),
}


def read_number(least, most):
    """Return the parser of a whole number from `least` to `most` in a query."""

    def parse(value):
        is_number = re.fullmatch(r"[0-9]{1,19}", value) is not None
        if not is_number or not least <= int(value) <= most:
            raise ValueError(f"is not a whole number from {least} to {most}")
        return int(value)

    return parse


def read_levels(value):
    """Return levels, comma-separated. Raises ValueError on an unknown one."""
    levels = re.split(r"\s*,\s*", value)
    if not set(levels) <= set(LEVELS):
        raise ValueError(f"is not a level; use {', '.join(LEVELS)}, comma-separated")
    return ",".join(levels)


def read_time(value):
    """Return a time, given in any of its forms, as text that compares. Raises ValueError."""
    # A plus that is not encoded comes as a blank.
    given = re.sub(r"(:[0-9.]+) ([0-9:]+)$", r"\1+\2", value.upper())
    ago = re.fullmatch(r"([0-9]{1,6})([mhdw])", value)
    if ago:
        given = max(time.time() - int(ago[1]) * SECONDS[ago[2]], 0)
    elif re.fullmatch(r"[0-9]{9,11}(\.[0-9]{1,9})?", value):
        given = float(value)
    when = parse_time(given)
    if when is None:
        forms = "ISO 8601, as 2026-01-31T12:00:00Z, Unix seconds, or 15m, 24h, 7d, 2w"
        raise ValueError(f"is not a time; use {forms}")
    return in_microseconds(when)


def read_words(value):
    """Return patterns of LIKE for the words of a search, or the event id (text) that it is."""
    event_id = value.replace("-", "").lower()
    if re.fullmatch(r"[0-9a-f]{32}", event_id):
        return event_id
    words = re.sub("([%_^])", r"^\1", value).split()
    if len(words) > 10 or len(value) > 100:
        raise ValueError("is too long; use at most 10 words and 100 characters")
    return [f"%{word}%" for word in words]


LAST_ID = 2**63 - 1  # of SQLite
read_id = read_number(0, LAST_ID)
PARAMETERS = {  # parsers of the query's text by name; of other filters the text is the value
    "q": read_words,
    "level": read_levels,
    "since": read_time,
    "until": read_time,
    "limit": read_number(1, 1000),
    "before": read_id,
    "after": read_id,
}


@web.post("/sentry/webhook")
def receive_webhook():
    """Take a delivery from Sentry."""
    g.started = time.monotonic()
    received_at = now()
    settings = store().settings
    if request.headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
        raise Refused("sent by a web page")
    body = read_body(settings["MAX_BODY_BYTES"])
    check_signature(body, settings["SENTRY_CLIENT_SECRET"])
    resource = request.headers.get("Sentry-Hook-Resource")
    outcome, id_ = store().keep(body, resource, received_at)
    log_delivery(f"{outcome} {id_ or ''}".rstrip())
    reply = {"status": outcome}
    headers = {}
    if id_ is not None:
        reply |= {"id": id_, "url": link(f"/errors/{id_}")}
    if outcome == "stored":
        headers["Location"] = reply["url"]
    return Response(as_json(reply), STATUSES[outcome], headers, mimetype=JSON)


@web.get("/errors/latest")
def show_latest():
    """Show the newest error in full. It takes the filters of /errors, format=json|text|html."""
    form, filters = read_query(FILTERS, *PAGE_FORMS)
    walk = select_errors(store().database, filters, 1, LATEST_SECONDS)
    if walk.rows:
        return show(walk.rows[0]["id"], form)
    if not walk.is_finished:
        return abort(503, "The search takes too long; narrow it, for example by since=24h.")
    if filters:
        return abort(404, "No error matches; /errors lists those there are.")
    return abort(404, "No error has come in yet; see / for how.")


@web.get("/errors/<int:id_>")
def show_error(id_):
    """Show one error in full. It takes format=json|text|html."""
    form, _ = read_query((), *PAGE_FORMS)
    return show(id_, form)


@web.get("/errors/<int:id_>/payload")
def show_payload(id_):
    """Show a delivery as it was received, byte for byte."""
    read_query((), "json")
    _, body = find(id_)
    return respond(body, "json")


@web.get("/errors")
def list_errors():
    """List summaries of errors, newest first. It takes q=<words>, project, level, environment,
    platform, release, category, server, event, issue, since, until, limit, before=<id>, after=<id>
    (oldest first), format=json|text|html|ndjson (in full, a line each)."""
    form, query = read_query((*FILTERS, "limit", "before", "after"), *PAGE_FORMS, "ndjson")
    if form == "ndjson":
        # An export is never cached, nor read whole for a tag.
        lines = export(store().database, query, link(""))
        first = next(lines, "")  # before the status is sent, which a failure changes
        return Response(chain([first], lines), mimetype=FORMS[form][0])
    return show_list("errors", form, query)


@web.get("/issues")
def list_issues():
    """List issues, the most recently seen first. It takes q, project, level, category, server,
    issue, since, until (of the newest error), limit, before=<id>, format=json|text|html."""
    form, query = read_query((*ISSUE_FILTERS, "limit", "before"), *PAGE_FORMS)
    return show_list("issues", form, query)


@web.get("/")
def show_overview():
    """Show what this service is and what it holds. It takes format=json|html."""
    form, _ = read_query((), "json", "html")
    state = describe_state()
    about = {
        "name": "Sentry Error Collector",
        "version": VERSION,
        "description": __doc__.partition("\n")[0],
        "endpoints": describe_endpoints(),
        "connect": {"webhook_url": whole_link("/sentry/webhook")},
    }
    if form == "json":
        return respond(as_json(about | state), form)
    hours = []
    with suppress(sqlite3.Error, OSError), store().database.reader() as connection:
        hours = select_hours(connection)
    page = about | state | {"hours": hours, "config": describe_config()}
    return respond(render_template("overview.html", **page), form)


@web.get("/config")
def show_config():
    """Show the settings without secrets, and how deliveries fare."""
    read_query((), "json")
    state = describe_state()
    config = describe_config() | {"spooled": state["counts"]["spooled"]}
    config |= {name: state[name] for name in ("deliveries", "last_delivery_at", "problem")}
    return respond(as_json(config), "json")


@web.get("/metrics")
def show_metrics():
    """Show counts in the text format of Prometheus."""
    state = describe_state()
    last_at = state["last_delivery_at"]
    seconds = last_at and datetime.fromisoformat(last_at).timestamp()
    values = {"last_delivery_seconds": seconds, "health": describe_health()}
    words = render_template("metrics.txt", **state, **values)
    return Response(words, content_type="text/plain; version=0.0.4; charset=utf-8")


@web.get("/health")
def show_health():
    """Show whether a delivery that comes in now is taken: ok, spooling, or 503."""
    health = describe_health()
    if health["status"] == "refusing":
        abort(503, tell("disk", health["problem"]) + ".")
    return Response(as_json(health), mimetype=JSON)


# What the routes share


def store():
    """Return the Store of the app that serves this request."""
    return current_app.extensions["collector"]


def read_body(limit):
    """Return the request's body (bytes), of any transfer coding.

    Raises Refused if it is longer than `limit` bytes or cut short.
    """
    length = request.content_length  # None with chunks
    if (length or 0) > limit:
        raise Refused("too large", limit)
    try:
        body = request.environ["wsgi.input"].read(limit + 1 if length is None else length)
    except Exception:  # gunicorn has many, for chunks that are none and for broken connections
        raise Refused("cut short") from None
    if len(body) > limit:
        raise Refused("too large", limit)
    if len(body) < (length or 0):
        raise Refused("cut short")
    return body


def check_signature(body, secrets):
    """Raise Refused unless one of `secrets` signs the body (bytes), or there are none."""
    if not secrets:
        return
    # As bytes, because compare_digest refuses text that is not ASCII.
    given = request.headers.get("Sentry-Hook-Signature", "").encode("utf-8", "replace")
    if not given:
        raise Refused("signature missing")
    for secret in secrets:
        signature = hmac.digest(secret.encode("utf-8", "surrogateescape"), body, "sha256")
        if hmac.compare_digest(signature.hex().encode(), given):
            return
    raise Refused("signature wrong")


def tell(reason, detail):
    """Return what is wrong with a delivery and what to do, as one sentence without a stop."""
    _, fault, cure = REASONS[reason]
    return f"{fault}; {cure}".replace("{}", str(detail))


def log_delivery(outcome):
    """Log a line about a delivery, with nothing of its content."""
    given = [request.headers.get(name, "-") for name in ("Sentry-Hook-Resource", "Request-ID")]
    ids = " ".join(UNSAFE.sub("?", value)[:40] for value in given)
    log.info("webhook %s; %s; %.0f ms", outcome, ids, (time.monotonic() - g.started) * 1000)


def caller():
    """Return the address of the client, and of those whom a proxy names, for a log line."""
    forwarded = request.headers.get("X-Forwarded-For", "").replace(",", " ")
    addresses = f"{request.remote_addr or 'a-socket'} {forwarded}".split()
    return " ".join(UNSAFE.sub("?", address) for address in addresses)[:100]


@web.before_request
def guard_reading():
    """Let only those read who know API_TOKEN and name a trusted host, where these are set."""
    if request.endpoint in ("web.receive_webhook", "web.show_health"):
        return
    hosts = store().settings["TRUSTED_HOSTS"]
    host = request.headers.get("Host", "")
    # Werkzeug takes a host with an underscore, as compose services may have, for none.
    is_named = re.sub(r":[0-9]+$", "", host).lower() in hosts
    if hosts and not is_named and not host_is_trusted(host, hosts):
        abort(400, "This Host is not in TRUSTED_HOSTS; use one that is, or add it there.")
    token = store().settings["API_TOKEN"]
    if token and not knows_token(token):
        log.warning("refused a reader without API_TOKEN, from %s", caller())
        words = "send it by 'Authorization: Bearer <token>', or as Basic password"
        abort(401, f"Reading needs API_TOKEN; {words}.", www_authenticate=CHALLENGE)


def knows_token(token):
    """Return True if the request carries the token, as Bearer token or as Basic password."""
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "basic":
        with suppress(ValueError):  # of what is not a user and a password
            given = base64.b64decode(given).decode().partition(":")[2]
    is_equal = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
    return is_equal and scheme.lower() in ("basic", "bearer")


def link(path):
    """Return the address of a path here: a whole one if PUBLIC_URL is set, else a path."""
    return (store().settings["PUBLIC_URL"] or request.script_root) + path


def whole_link(path):
    """Return the whole address of a path here, by PUBLIC_URL or by what the request says."""
    if store().settings["PUBLIC_URL"]:
        return link(path)
    host = re.sub(r"[^\w.:\[\]-]", "", request.headers.get("Host", "")) or "localhost"
    scheme = request.headers.get("X-Forwarded-Proto", "").rpartition(",")[2].strip().lower()
    if scheme not in ("http", "https"):  # the nearest proxy says nothing
        scheme = request.scheme
    return f"{scheme}://{host}{link(path)}"


def read_query(names, *forms):
    """Return the form to reply in, and the values of the query's parameters that are not empty.

    Aborts with 400 on an unknown name, a repeat or a bad value.
    """
    query = {}
    for name, values in request.args.lists():
        if name not in (*names, "format"):
            known = ", ".join((*names, "format"))
            abort(400, f"The parameter {ascii(name[:40])} is unknown here; known are {known}.")
        if len(values) > 1:
            abort(400, f"The parameter {name} is given {len(values)} times; give it once.")
        value = clean(values[0].strip())
        if not value:
            continue
        try:
            query[name] = PARAMETERS.get(name, str)(value)
        except ValueError as error:
            abort(400, f"{name}={ascii(value[:40])} {error}.")
    form = query.pop("format", None) or preferred_form(forms)
    if form not in forms:
        abort(400, f"format={ascii(form[:40])} is unknown here; use {', '.join(forms)}.")
    return form, query


def preferred_form(forms):
    """Return the form that the Accept header prefers, the first one if it takes none."""
    types = {media_type: form for form in forms for media_type in FORMS[form]}
    # Without parameters such as a charset, which Werkzeug would compare.
    accepted = [(name.partition(";")[0], quality) for name, quality in request.accept_mimetypes]
    return types.get(MIMEAccept(accepted).best_match(types), forms[0])


def show_list(kind, form, query):
    """Reply with a page of a list, errors or issues."""
    select, shape, as_line, fields, template = LISTS[kind]
    default, most = ROWS[form]
    limit = min(query.pop("limit", default), most)
    walk = select(store().database, query, limit)
    following = next_page(walk, query)
    if form == "text":
        lines = [as_line(row) for row in walk.rows]
        address = following and whole_link(following)
        return respond(list_text(lines, address, f"no {kind}"), form, following)
    items = [shape(row, link("")) for row in walk.rows]
    if form == "json":
        return respond(as_json(items), form, following)
    page = {
        "following": following and link(following),
        "is_part": not walk.is_finished and len(items) < limit,
        "query": request.args.to_dict(),
        "fields": list(fields),
    }
    return respond(render_template(template, **{kind: items}, **page), form, following)


def next_page(walk, query):
    """Return the path where a list goes on, None at its end."""
    if walk.is_finished and "after" not in query:  # with which a poller goes on for ever
        return None
    direction = "after" if "after" in query else "before"
    parameters = request.args.to_dict() | {direction: walk.last_id}
    return f"{request.path.rstrip('/')}?{urlencode(parameters)}"


def respond(content, form, following=None):
    """Reply with content in a form, or with 304 to a client that has it.

    `following` is the path of the next page.
    """
    response = Response(content, mimetype=FORMS[form][0])
    if following:
        response.headers["Link"] = f'<{link(following)}>; rel="next"'
    response.set_etag(hashlib.sha256(response.data + str(following).encode()).hexdigest()[:32])
    return response.make_conditional(request)


def find(id_):
    """Return an error's row and the body of its delivery (bytes). Aborts with 404 without them."""
    with store().database.reader() as connection:
        row = select_error(connection, min(id_, LAST_ID))
        body = row and select_body(connection, row["id"])
    if body is None:  # the body alone if it has just been deleted
        abort(404, f"There is no error {str(id_)[:20]}; /errors lists those there are.")
    return row, body


def show(id_, form):
    """Reply with one error in full."""
    row, body = find(id_)
    with store().database.reader() as connection:
        occurrences = select_occurrences(connection, row)
    error = summary(row, link("")) | {"occurrences": occurrences}
    if form == "json":
        return respond(as_json(detail(error, body)), form)
    if form == "text":
        return respond(error_text(error, body, whole_link(f"/errors/{row['id']}")), form)
    issue_url = row["issue_id"] and issue_link(row, link(""))
    page = render_template("detail.html", **error_page(error, body), issue_url=issue_url)
    return respond(page, form)


def export(database, query, base):
    """Yield errors in full, a line each, in reads so short that they stand in nobody's way."""
    direction = "after" if "after" in query else "before"
    left = query.pop("limit", math.inf)
    is_finished = False
    while left > 0 and not is_finished:
        walk = select_errors(database, query, int(min(left, EXPORT_ROWS)))
        counted = {}  # occurrences by issue, of these rows only
        for row in walk.rows:
            key = (row["issue_id"], row["server"])
            with database.reader() as connection:
                body = select_body(connection, row["id"])
                if key not in counted:
                    counted[key] = select_occurrences(connection, row)
            if body is not None:  # else it was deleted meanwhile
                yield as_json(detail(summary(row, base) | {"occurrences": counted[key]}, body))
        left -= len(walk.rows)
        is_finished = walk.is_finished
        query[direction] = walk.last_id


def describe_endpoints():
    """Return what each route does, the first words of its docstring, by method and path."""
    endpoints = {}
    for rule in current_app.url_map.iter_rules():
        method = min(rule.methods - {"HEAD", "OPTIONS"})
        path = rule.rule.replace("int:id_", "id")
        words = current_app.view_functions[rule.endpoint].__doc__
        endpoints[f"{method} {path}"] = " ".join(words.split())
    return endpoints


def describe_state():
    """Return what the database and the spool hold, and why if the database cannot be read."""
    database = store().database
    counts = {"errors": None, "spooled": len(store().spool.files())}
    state = {"problem": None, "database_bytes": None, "deliveries": []}
    state |= dict.fromkeys(("newest", "oldest", "last_delivery_at"))
    try:
        with database.reader() as connection:
            held = select_state(connection)
            state["deliveries"] = select_outcomes(connection)
            state["database_bytes"] = database_bytes(connection)
    except (sqlite3.Error, OSError) as error:
        database.close()
        problem = f"The database cannot be read: {error}; {cure_of(error)}."
        return state | {"counts": counts, "problem": problem}
    counts["errors"] = held.pop("errors")
    for name, row in held.items():
        state[name] = row and summary(row, link(""))
    for row in state["deliveries"]:
        _, _, cure = REASONS.get(row["reason"], (None, None, None))
        row["cure"] = cure and cure.replace("{}", whole_link("/sentry/webhook"))
    if state["deliveries"]:
        state["last_delivery_at"] = state["deliveries"][0]["last_at"]
    return state | {"counts": counts}


def describe_config():
    """Return the settings without secrets, and what depends on the machine."""
    config = {name.lower(): value for name, value in store().settings.items()}
    for name in ("sentry_dsn", "sentry_client_secret", "api_token"):
        config[f"{name}_set"] = bool(config.pop(name))
    config["database_path"] = str(config.pop("database_url"))
    config["journal_mode"] = store().database.journal_mode
    return config | {"sqlite_version": sqlite3.sqlite_version, "version": VERSION}


def describe_health():
    """Return the JSON of /health, by its status what comes of a delivery now."""
    try:
        check_writable(store().database)
        return {"status": "ok"}
    except (sqlite3.Error, OSError) as error:
        problem = f"The database takes no rows: {error}; {cure_of(error)}."
    try:
        store().spool.check_room(0)
    except OSError as error:
        return {"status": "refusing", "problem": str(error)}
    return {"status": "spooling", "problem": problem, "spooled": len(store().spool.files())}


def reply_with_error(status, words, headers=()):
    """Reply with the one error shape, or with a page of the same words to browsers."""
    if status == 503:
        headers = [*headers, ("Retry-After", "5")]
    if preferred_form(PAGE_FORMS) == "html":
        page = render_template("error.html", status=status, words=words)
        return Response(page, status, headers, mimetype="text/html")
    while len(as_json({"error": words}).encode()) > REPLY_BYTES:
        words = cut(words, len(words) * 7 // 8)
    return Response(as_json({"error": words}), status, headers, mimetype=JSON)


def handle_http_error(error):
    """Reply to what a route aborted with, or Flask itself."""
    words = error.description
    if words == type(error).description:
        words = f"{error.name} for {request.method} of this page; / lists what there is."
    if request.method == "POST" and error.code in (404, 405):
        words = tell("wrong address", whole_link("/sentry/webhook")) + "."
        store().count("refused", "wrong address")
        path = UNSAFE.sub("?", request.path)[:100]
        log.warning("webhook refused, wrong address %s, from %s", path, caller())
    headers = [item for item in error.get_headers() if item[0] in ("Allow", "WWW-Authenticate")]
    return reply_with_error(error.code, words, headers)


def handle_refusal(refused):
    """Count, log and reply to a delivery that is not taken."""
    status, _, _ = REASONS[refused.reason]
    words = tell(refused.reason, refused.detail)
    if status == 200:
        store().count("ignored", refused.reason)
        log_delivery(f"ignored {refused.reason}")
        return Response(as_json({"status": "ignored", "reason": words}), mimetype=JSON)
    store().count("refused", refused.reason)
    log_delivery(f"refused {status} {refused.reason}, from {caller()}")
    return reply_with_error(status, f"{words}.")


def handle_failure(error):
    """Reply to a failure of the database, its disk or the memory, or to a fault of our own."""
    store().log_failure(f"failure in {request.endpoint}", error)
    if not isinstance(error, sqlite3.Error | OSError | MemoryError):
        return reply_with_error(500, "A fault of the collector's own; its log says more.")
    store().database.close()
    return reply_with_error(503, f"The database cannot be read: {error}; {cure_of(error)}.")


def finish_reply(response):
    """Add the headers of every reply, after which a step of maintenance is done."""
    response.headers.extend(HEADERS)
    response.call_on_close(store().maintain)
    return response


# --------------------------------------------------------------------------------------------------
# Wiring: the settings, and the app made of them
# --------------------------------------------------------------------------------------------------

ACTIONS = "created", "triggered", "unresolved"  # actions of deliveries that hold an error
REPORTED = "event_id", "timestamp", "platform", "level", "exception", "release"  # keys of a report
REPORT_SECONDS = 60  # shortest time between two reports
LIST = r"[\s,]*({0})(\s*,[\s,]*({0}))*[\s,]*"  # pattern of values with commas between
WORDS = ", ".join(ACTIONS)
ACTION_LIST = LIST.format("|".join(ACTIONS))
HOST_LIST = LIST.format(r"[\w.:\[\]-]+")
FILE_URL = r"sqlite(\+aiosqlite)?:///(?!:memory:)[^?#]+"
DATABASE_URL = "sqlite:///./data/errors.db"
# By name the default, a good value's pattern, the fault of another (or good numbers), an example.
SETTINGS = {
    "DATABASE_URL": (DATABASE_URL, FILE_URL, "it is not a file, as sqlite:///PATH", DATABASE_URL),
    "SENTRY_DSN": ("", r"https?://\S+", "it is not a DSN", "https://key@o0.ingest.sentry.io/0"),
    "SENTRY_CLIENT_SECRET": ("", r".*[^\s,\"'].*", "it holds no secret", "0123abcd,4567ef89"),
    "SENTRY_ACTIONS": ("created", ACTION_LIST, f"it is not a list of {WORDS}", "created,triggered"),
    "API_TOKEN": ("", "[ -~]+", "it is not ASCII, which a header can carry", "5f1c0a9e7b3d4c62"),
    "PUBLIC_URL": (
        "",
        r"https?://[^\s/?#\"'<>\\@]+(/[^\s?#\"'<>\\]*)?",
        "it is not an address that begins with http:// or https://",
        "https://errors.example.com",
    ),
    "TRUSTED_HOSTS": ("", HOST_LIST, "it is not a list of hosts", "localhost,errors.example.com"),
    "RETENTION_DAYS": ("", None, range(1, 36501), "30"),
    "MAX_BODY_BYTES": ("5242880", None, range(1, 32 * 1024 * 1024 + 1), "5242880"),
    "WEB_CONCURRENCY": ("4", None, range(1, 257), "4"),
    "PORT": ("8000", None, range(1, 65536), "8000"),
}


def fail(name, fault, example):
    """End the start with one line about a setting."""
    raise SystemExit(f"{name}: {fault}; for example {name}={example}")


def read_setting(name, value):
    """Return the value of a setting, a number where numbers are good. Ends the start on a bad one.

    The value is not shown, because it may hold a secret.
    """
    default, pattern, good, example = SETTINGS[name]
    if not value and not default:
        return default
    value = (value or default).strip()
    if isinstance(good, range) and re.fullmatch("[0-9]{1,12}", value) and int(value) in good:
        return int(value)
    if isinstance(good, range):
        good = f"it is not a whole number from {good[0]} to {good[-1]}"
    if pattern is None or not re.fullmatch(pattern, value):
        fail(name, good, example)
    return value


def split(value, surroundings=None):
    """Return the parts of a comma-separated setting, without their surroundings."""
    return list(filter(None, (part.strip(surroundings) for part in value.split(","))))


def read_settings(config=None):
    """Return the settings, checked, of `config`, the environment, .env and the defaults.

    The first that has a setting wins. An empty value is an unset one. Raises SystemExit with one
    line about the first that is bad.
    """
    try:
        from_file = dotenv_values(".env")
    except UnicodeDecodeError:
        raise SystemExit(".env: it is not UTF-8; write it anew as UTF-8 text") from None
    settings = {}
    for name in SETTINGS:
        given = [source.get(name) for source in (config or {}, os.environ, from_file)]
        settings[name] = read_setting(name, str(next(filter(None, given), "")))
    path = settings["DATABASE_URL"].partition(":///")[2]
    # SQLite puts the WAL beside the file that a link leads to.
    settings["DATABASE_URL"] = Path(os.path.realpath(path))
    settings["SENTRY_CLIENT_SECRET"] = split(settings["SENTRY_CLIENT_SECRET"], " \t\r\n\"'")
    settings["SENTRY_ACTIONS"] = split(settings["SENTRY_ACTIONS"])
    settings["TRUSTED_HOSTS"] = split(settings["TRUSTED_HOSTS"].lower())
    settings["PUBLIC_URL"] = settings["PUBLIC_URL"].rstrip("/")
    return settings | {"RETENTION_DAYS": settings["RETENTION_DAYS"] or None}


def check_folder(path):
    """Make the folders of the database and the spool. Ends the start if they are not writable."""
    folder = path.parent
    try:
        (folder / "spool").mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "spool"):
            tempfile.TemporaryFile(dir=place).close()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        fault = f"cannot write in {folder} as uid {os.getuid()} ({error.strerror or error})"
        fail("DATABASE_URL", f"{fault}; chown it, or name another", DATABASE_URL)


def start_reports(dsn):
    """Return a function that reports an exception to Sentry, once in REPORT_SECONDS at most."""
    if not dsn:
        return lambda error: None
    import sentry_sdk  # here, because it costs a worker 10 MB and most run without

    reported_at = -math.inf

    def scrub(event, hint):
        """Return what of a report may leave, None if it follows another too soon."""
        nonlocal reported_at
        # A report may come back as a webhook, which may fail again.
        if time.monotonic() < reported_at + REPORT_SECONDS:
            return None
        reported_at = time.monotonic()
        # No content of a webhook may leave: of an exception only what SQLite or the system say.
        if not isinstance(hint["exc_info"][1], sqlite3.Error | OSError):
            for value in event["exception"]["values"]:
                value["value"] = ""
        return {key: event[key] for key in REPORTED if key in event}

    try:
        sentry_sdk.init(
            dsn,
            release=VERSION,
            before_send=scrub,
            default_integrations=False,
            include_local_variables=False,
        )
    except (sentry_sdk.utils.BadDsn, ValueError):
        fail("SENTRY_DSN", *SETTINGS["SENTRY_DSN"][2:])
    return sentry_sdk.capture_exception


def hide_request(line):
    """Take what gunicorn quotes of a broken request, which may be a secret, off its log line."""
    line.msg = re.sub(r"(?s)^(Invalid request from ip=\S*?): .*", r"\1", str(line.msg))
    return True


def describe_start(store):
    """Return what is on and what is off, in one line."""
    settings = store.settings
    signed = "on" if settings["SENTRY_CLIENT_SECRET"] else "OFF, anybody can post"
    read = "on" if settings["API_TOKEN"] else "OFF, anybody can read"
    days = settings["RETENTION_DAYS"]
    return (
        f"collector {VERSION}; signature check {signed}; read token {read}; "
        f"trusted hosts {', '.join(settings['TRUSTED_HOSTS']) or 'any'}; "
        f"public URL {settings['PUBLIC_URL'] or 'as requested'}; "
        f"Sentry reports {'on' if settings['SENTRY_DSN'] else 'off'}; "
        f"actions {','.join(settings['SENTRY_ACTIONS'])}; "
        f"journal mode {store.database.journal_mode}; "
        f"retention {f'{days} days' if days else 'off'}"
    )


def create_app(config=None):
    """Return the app, its settings from `config` or the environment. No file is made."""
    if not log.handlers:  # without gunicorn, whose log this is
        log.addHandler(logging.StreamHandler())
        log.setLevel(logging.INFO)
    gc.set_threshold(50_000)  # or decoding a delivery takes three times as long
    settings = read_settings(config)
    app = Flask(__name__, static_folder=None)
    # Flask would redirect to the address without the slash; Sentry takes a redirect for success.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.extensions["collector"] = Store(settings, start_reports(settings["SENTRY_DSN"]))
    words = {"style": Markup(STYLE), "version": VERSION, "link": link, "whole_link": whole_link}
    app.jinja_env.globals.update(words)
    app.jinja_env.filters.update(PAGE_FILTERS)
    app.register_blueprint(web)
    app.after_request(finish_reply)
    app.register_error_handler(HTTPException, handle_http_error)
    app.register_error_handler(Refused, handle_refusal)
    app.register_error_handler(Exception, handle_failure)
    return app


@web.cli.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup(file):
    """Copy the database to a new FILE while the service runs."""
    try:
        copy_database(store().database.path, file)
    except (ValueError, sqlite3.Error, OSError) as error:
        raise click.ClickException(f"The backup failed: {error}") from None
    click.echo(f"{file}: {file.stat().st_size} bytes")
