"""Receive Sentry's webhooks, keep every new error, and give the latest one back."""

import base64
import codecs
import fcntl
import hashlib
import hmac
import json
import logging
import math
import os
import re
import sqlite3
import threading
import time
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import click
from dotenv import dotenv_values
from flask import Blueprint, Flask, Response, current_app, render_template, request, url_for
from markupsafe import Markup, escape
from werkzeug.exceptions import HTTPException, abort
from werkzeug.wsgi import ClosingIterator

VERSION = "1.0.0"
log = logging.getLogger("collector")


# --------------------------------------------------------------------------------------------------
# Parsing: bytes and dicts in, dicts out; no Flask, no sqlite3, no clock
# --------------------------------------------------------------------------------------------------

# The most that is read of a payload, which itself stays whole, so that no delivery takes long.
COLUMN_LENGTH = 8192  # characters of a text, where Sentry cuts messages, too
NAME_LENGTH = 200  # characters of the name of a tag, a header or a variable
LINE_LENGTH = 1024  # characters of a source line
CONTEXT_LINES = 20  # source lines before a frame's own, and after it
FRAMES = 250  # frames of an exception, the newest ones
EVENT_FRAMES = 2500  # frames of all exceptions of an event
EXCEPTIONS = 50  # exceptions of an event, the outermost ones
VARIABLES = 50  # variables of a frame
TAGS = 200  # tags of an event
PAIRS = 100  # headers of a request, and parameters of its query
CRUMBS = 20  # breadcrumbs of an event, the newest ones
ITEMS = 200  # values of an object or of a list
VALUES = 20_000  # values of one part of an event, such as its contexts, at any depth
DEPTH = 6  # levels of nested objects and lists
JSON_LENGTH = 100_000  # characters of a request's body, sent as JSON text, that are read as JSON
SCANNED_ENTRIES = 100  # entries of a service hook's event, which has about ten
SCANNED_OBJECTS = 10_000  # exceptions, threads or breadcrumbs, among which some are looked for

REST = "…"  # the key under which an object says how much of it was cut
MASK = "[masked]"  # what stands in the place of a secret

# The names of values that are secrets, however their parts are joined.
SECRET_NAME = re.compile(
    r"authori[sz]ation|cookie|passw|passphrase|pwd|secret|token|credential|sess(?:ion|id)|[cx]srf"
    r"|(?:api|auth|access|private|signing|encryption|ssh)[-_. ]?key|dsn$"
    r"|(?<![a-z])(?:dsn|jwt|bearer|(?:pass|o?auth)$|pw(?![a-z]))",
    re.IGNORECASE,
)
# The names of values that are URLs or queries, which may have secrets among their parameters.
LINK_NAME = re.compile(r"(?:ur[il]|query|query[-_]?string|referr?er|location)$", re.IGNORECASE)
# A parameter of a query or a form, and a member of broken JSON: up to the value, the name in it.
PARAMETER = re.compile(r"(?<![^?&;#])(([^?&;#=]{1,200})=)[^&;#]*")
JSON_MEMBER = re.compile(r'("([^"\\]{1,200})"\s*:\s*)(?:"(?:[^"\\]|\\.)*"?|[^,}\]\s]+)')


class Refused(Exception):
    """A delivery is not taken.

    `status` is the HTTP status, `reason` the name it is counted under, `words` are for its sender.
    """

    def __init__(self, status, reason, words):
        super().__init__(words)
        self.status = status
        self.reason = reason
        self.words = words


def refuse_constant(name):
    """Raise ValueError for NaN and Infinity, which Python's decoder would take."""
    raise ValueError(f"{name} is not JSON")


# Made once, because json.loads makes one for each call that has an option.
DECODER = json.JSONDecoder(parse_constant=refuse_constant)
GZIP_START = b"\x1f\x8b"
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)


def parse_body(body):
    """Return the delivery, a dict, in `body` (bytes). Raises Refused for anything else."""
    if body.startswith(GZIP_START):
        words = "The body is compressed with gzip; have it sent as it is, Sentry does not compress."
        raise Refused(400, "gzip", words)
    if body.startswith(BYTE_ORDER_MARKS):
        words = "The body starts with a byte order mark; send JSON text encoded as UTF-8 without."
        raise Refused(400, "byte order mark", words)
    try:
        # Decoded first, because json.loads would guess UTF-16 and UTF-32 from bytes.
        payload = DECODER.decode(body.decode("utf-8"))
    except UnicodeDecodeError:
        words = "The body is not UTF-8; send JSON text encoded as UTF-8."
        raise Refused(400, "not UTF-8", words) from None
    except RecursionError:
        words = "The JSON is nested too deeply; send what Sentry sends."
        raise Refused(400, "not JSON", words) from None
    except ValueError as error:
        words = f"The body is not JSON ({error}); send a JSON object."
        raise Refused(400, "not JSON", words) from None
    if not isinstance(payload, dict):
        words = "The JSON is not an object; send one with 'action' and 'data'."
        raise Refused(400, "no object", words)
    if not text(payload.get("action")) and not isinstance(payload.get("event"), dict):
        words = (
            "The JSON has neither an 'action' nor a legacy 'event'; send only Sentry's webhooks."
        )
        raise Refused(400, "no delivery", words)
    return payload


def load(body):
    """Return the payload in a stored body (bytes), which parse_body has taken."""
    try:
        return json.loads(body)
    except RecursionError:
        # It is nested as deeply as the stack allowed when it was received. A new thread has a whole
        # stack, of which any request has used up more.
        with ThreadPoolExecutor(1) as executor:
            return executor.submit(json.loads, body).result()


def clean(value):
    """Return text that SQLite and UTF-8 can hold, without lone surrogates and NUL."""
    if not value.isascii():  # Most text is, and the round trip takes time.
        value = value.encode("utf-8", "replace").decode("utf-8")
    return value.replace("\0", "\ufffd")


def cut(value, length):
    """Return text of at most `length` characters, with an ellipsis where it lost some."""
    if value is None or len(value) <= length:
        return value
    return value[: length - 1] + "…"


def text(value, length=COLUMN_LENGTH):
    """Return clean text of at most `length` characters for text that is not empty, else None."""
    if not isinstance(value, str) or not value:
        return None
    if len(value) > length:
        value = cut(value, length)
    return clean(value)


def integer(value):
    """Return an integer that fits 64 bits, sent as such or as its digits, else None."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,18}", value):
        return int(value)
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def identifier(value):
    """Return an id, sent as text or as an integer, as text, else None."""
    if type(value) is int:
        value = str(value)
    return text(value)


def parse_time(value):
    """Return a time, sent as ISO 8601 or as seconds since 1970, as a datetime in UTC, else None."""
    try:
        if isinstance(value, str):
            when = datetime.fromisoformat(value[:NAME_LENGTH])
            if when.tzinfo is None:
                return when.replace(tzinfo=UTC)
            return when.astimezone(UTC)
        if isinstance(value, bool):
            return None
        return datetime.fromtimestamp(value, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def moment(value):
    """Return a time that parse_time understands as ISO 8601 in UTC with Z, else None."""
    when = parse_time(value)
    return when and when.isoformat().replace("+00:00", "Z")


def first(values):
    """Return the first value that is not None, else None."""
    return next((value for value in values if value is not None), None)


def as_dict(value):
    """Return a dict as it is, and an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def as_list(value):
    """Return a list as it is, and an empty one for anything else."""
    return value if isinstance(value, list) else []


def objects(value):
    """Return the dicts among the last SCANNED_OBJECTS of a list, or of the `values` of a dict."""
    if isinstance(value, dict):
        value = value.get("values")
    return [item for item in as_list(value)[-SCANNED_OBJECTS:] if isinstance(item, dict)]


def is_secret(name):
    """Return True if a value of this name is a secret."""
    return SECRET_NAME.search(name) is not None


def mask(match):
    """Return a match of PARAMETER or JSON_MEMBER, without its value if that is a secret."""
    return match[1] + MASK if is_secret(match[2]) else match[0]


def mask_query(value):
    """Return a query, or a URL with one, without the values of parameters that are secrets."""
    return value and PARAMETER.sub(mask, value)


def mask_value(name, value):
    """Return a plain value of this name without secrets."""
    if is_secret(name):
        return MASK
    if isinstance(value, str) and LINK_NAME.search(name):
        return mask_query(value)
    return value


def new_room():
    """Return how much may be read of one part of an event."""
    return {"values": VALUES, "frames": EVENT_FRAMES}


def take_room(room, kind, wanted):
    """Return how many of the `wanted` values or frames may be read, and take them off the room."""
    taken = min(wanted, room[kind])
    room[kind] -= taken
    return taken


def plain(value, depth=DEPTH, room=None):
    """Return a copy of any JSON value that can be sent as JSON again, without secrets.

    It is cut, with a word that it was, where it is nested deeper than `depth`, or has more values
    than there is `room` for. A number that other readers of JSON may not take is made text.
    """
    room = room or new_room()
    if isinstance(value, str):
        return clean(cut(value, COLUMN_LENGTH))
    if isinstance(value, dict | list) and value and not depth:
        return REST
    if isinstance(value, dict):
        return plain_object(value, depth - 1, room)
    if isinstance(value, list):
        return plain_list(value, depth - 1, room)
    if value is None or isinstance(value, bool) or integer(value) is not None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return cut(str(value), COLUMN_LENGTH)


def rest(number, what="more"):
    """Return the word that stands for values that were cut."""
    return f"… {number:,} {what} cut"


def plain_object(value, depth, room, limit=ITEMS):
    """Return a plain copy of a dict, of its first `limit` values at most."""
    kept = take_room(room, "values", min(len(value), limit))
    copy = {}
    for key, item in islice(value.items(), kept):
        name = clean(cut(key, NAME_LENGTH))
        copy[name] = mask_value(name, plain(item, depth, room))
    if len(value) > kept:
        copy[REST] = rest(len(value) - kept)
    return copy


def plain_list(value, depth, room):
    """Return a plain copy of a list, of its first ITEMS values at most."""
    if len(value) == 2 and isinstance(value[0], str) and is_secret(value[0][:NAME_LENGTH]):
        value = [value[0], MASK]  # a pair of a name and a value
    kept = take_room(room, "values", min(len(value), ITEMS))
    copy = [plain(item, depth, room) for item in value[:kept]]
    if len(value) > kept:
        copy.append(rest(len(value) - kept))
    return copy


def as_object(value, room=None, limit=ITEMS):
    """Return a plain copy of a dict, and None for anything else."""
    if not isinstance(value, dict):
        return None
    return plain_object(value, DEPTH - 1, room or new_room(), limit)


def as_text(value, room=None):
    """Return a value as text, JSON text where it is an object, a list or a boolean."""
    value = plain(value, room=room)
    if value is None or isinstance(value, str):
        return value
    return cut(json.dumps(value), COLUMN_LENGTH)


def read_pairs(value, limit):
    """Return the first `limit` names and values, text or None, of a list of them as pairs.

    They are sent as pairs, as objects with `key` and `value`, or as one object.
    """
    if isinstance(value, dict):
        items = islice(value.items(), limit)
    else:
        value = as_list(value)
        items = value[:limit]
    room = new_room()
    pairs = []
    for item in items:
        pair = (item.get("key"), item.get("value")) if isinstance(item, dict) else item
        if isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str):
            pairs.append((clean(cut(pair[0], NAME_LENGTH)), as_text(pair[1], room)))
    if len(value) > limit:
        pairs.append((REST, rest(len(value) - limit)))
    return pairs


def find_error(payload):
    """Return where the parts of a delivery's error lie, dicts by name, or None without an error."""
    action = text(payload.get("action"))
    data = as_dict(payload.get("data"))
    issue = as_dict(data.get("issue"))
    project = data.get("project")
    if isinstance(project, str):
        project = {"slug": project}
    error = {"issue": issue, "project": as_dict(project), "data": data}
    for key, resource in (("error", "error"), ("event", "event_alert")):
        if isinstance(data.get(key), dict):
            return error | {"event": data[key], "kind": {"resource": resource}}
    if isinstance(data.get("issue"), dict) and data.get("activity") is None:
        if action in ("created", "unresolved"):  # a new issue, or one that has come back
            return error | {"event": {}, "kind": {"resource": "issue"}}
        return None
    event = payload.get("event")
    if action or payload.get("data") is not None or not isinstance(event, dict):
        return None
    if isinstance(payload.get("group"), dict):
        project = as_dict(payload.get("project"))
        return {"event": event, "hook": event, "issue": payload["group"], "project": project}
    return {"event": event, "legacy": payload}


# The interfaces of an event, and what follows "sentry.interfaces." in those of Sentry 8 and before.
INTERFACES = {
    "exception": "Exception", "threads": "Threads", "stacktrace": "Stacktrace", "user": "User",
    "logentry": "Message", "request": "Http", "breadcrumbs": "Breadcrumbs", "csp": "Csp",
}  # fmt: skip


def places(event, name):
    """Return what lies where the forms of an event keep an interface, the usual place first."""
    found = [event.get(name), event.get(f"sentry.interfaces.{INTERFACES[name]}")]
    # The event of a service hook has the API's form, with a list of entries.
    entry_type = "message" if name == "logentry" else name
    for entry in as_list(event.get("entries"))[:SCANNED_ENTRIES]:
        if isinstance(entry, dict) and entry.get("type") == entry_type:
            found.append(entry.get("data"))
    return found


def find_object(event, name):
    """Return an event's interface that is one object, an empty dict without it."""
    for place in places(event, name):
        if isinstance(place, dict) and place:
            return place
    return {}


def find_list(event, name):
    """Return an event's interface that is a list of objects, an empty list without it."""
    for place in places(event, name):
        found = objects(place)
        if found:
            return found
    return []


def find_exceptions(event):
    """Return an event's exceptions as they were sent, the inner cause first."""
    return find_list(event, "exception") or objects(event.get("exceptions"))


def find_metadata(event, issue):
    """Return what Sentry read of an event, or of its issue where the event has nothing."""
    return as_dict(event.get("metadata")) or as_dict(issue.get("metadata"))


def find_main(event, exceptions):
    """Return the exception that Sentry names as the main one, else the outermost, {} without any.

    It is named by an id, which is not its position in the list.
    """
    main_id = identifier(event.get("main_exception_id"))
    if main_id is not None:
        for exception in exceptions:
            mechanism = as_dict(exception.get("mechanism"))
            if identifier(mechanism.get("exception_id")) == main_id:
                return exception
    if exceptions:
        return exceptions[-1]
    return {}


def parse_tags(event):
    """Return an event's tags as one dict of text."""
    return dict(read_pairs(event.get("tags"), TAGS))


def server_of(url):
    """Return the server of a URL, which is its host and any unusual port, else None."""
    pattern = r"https?://(?:[^/?#\s]*@)?([^/?#\s:@\\]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?(?:[/?#]|$)"
    match = re.match(pattern, (text(url) or "").lower())
    if match is None:
        return None
    host, port = match.groups()
    host = cut(host, NAME_LENGTH)
    if host == "sentry.io" or host.endswith(".sentry.io"):
        return "sentry.io"  # Its regions and organisations differ in the host, never in the ids.
    return host if port in (None, ":80", ":443") else host + port


# A column's value is the first of these that its parser makes something of: "part.key", where the
# parts are those of find_parts.
FIELDS = {
    "timestamp": (
        moment,
        "event.datetime event.timestamp event.received event.dateCreated event.dateReceived "
        "issue.lastSeen issue.firstSeen",
    ),
    "event_id": (identifier, "event.event_id event.eventID event.id"),
    "issue_id": (identifier, "event.issue_id derived.issue_id issue.id legacy.id event.groupID"),
    "short_id": (text, "issue.shortId"),
    "title": (
        text,
        "occurrence.issueTitle event.title issue.title metadata.title derived.summary "
        "legacy.message",
    ),
    "message": (
        text,
        "event.message legacy.message logentry.formatted logentry.message occurrence.subtitle "
        "feedback.message metadata.message crash.value metadata.value metadata.title "
        "occurrence.issueTitle event.title issue.title derived.summary",
    ),
    "culprit": (text, "event.culprit occurrence.culprit issue.culprit legacy.culprit"),
    "level": (text, "event.level occurrence.level legacy.level tags.level issue.level"),
    "status": (text, "issue.status"),
    "platform": (text, "event.platform issue.platform"),
    "logger": (text, "event.logger issue.logger legacy.logger tags.logger"),
    "environment": (text, "event.environment tags.environment"),
    "release": (text, "event.release release.version tags.release tags.sentry:release"),
    "project_id": (identifier, "derived.project_id issue_project.id event.projectID project.id"),
    "project_slug": (
        text,
        "issue_project.slug legacy.project_slug legacy.project project.slug derived.project_slug",
    ),
    "project_name": (text, "issue_project.name legacy.project_name project.name"),
    "exception_type": (text, "crash.type cause.type"),
    "exception_value": (text, "crash.value cause.value"),
    "permalink": (text, "event.web_url hook.url issue.web_url issue.permalink legacy.url"),
    "rule": (text, "data.triggered_rule derived.rule"),
    "server": (
        server_of,
        "event.web_url issue.web_url issue.permalink legacy.url hook.url event.url issue.url "
        "event.issue_url",
    ),
    "category": (text, "derived.category"),
}
FIELDS = {
    column: (parse, [path.split(".", 1) for path in paths.split()])
    for column, (parse, paths) in FIELDS.items()
}
# The categories of occurrences by the thousands of their type's number.
OCCURRENCES = {
    1: "performance", 2: "profile", 4: "cron", 5: "replay", 6: "feedback", 7: "uptime", 8: "metric",
}  # fmt: skip
# The types of events that are no errors, which are their categories, too.
EVENT_TYPES = ("csp", "hpkp", "expectct", "expectstaple", "nel", "feedback")


def search_url(pattern, *urls):
    """Return what `pattern` finds in the first of the URLs that has it, else None."""
    for url in urls:
        match = re.search(pattern, text(url) or "")
        if match:
            return match[1]
    return None


def find_category(event, issue, occurrence):
    """Return what kind of issue it is: error, performance, cron and so on."""
    sent = text(issue.get("issueCategory"), NAME_LENGTH)
    if sent:
        return sent.lower()
    occurrence_type = integer(occurrence.get("type"))
    if occurrence_type is not None and occurrence_type // 1000 in OCCURRENCES:
        return OCCURRENCES[occurrence_type // 1000]
    return event["type"] if event.get("type") in EVENT_TYPES else "error"


def find_parts(error):
    """Return the parts of an error (see find_error) with those that must be looked for."""
    event = error["event"]
    issue = as_dict(error.get("issue"))
    parts = error | {
        "metadata": find_metadata(event, issue),
        "crash": find_main(event, find_exceptions(event)),
        "tags": parse_tags(event),
        "logentry": find_object(event, "logentry"),
        "occurrence": as_dict(event.get("occurrence")),
        "feedback": as_dict(as_dict(event.get("contexts")).get("feedback")),
        "release": as_dict(event.get("release")),
        "issue_project": as_dict(issue.get("project")),
    }
    # The metadata of an occurrence, such as a slow query, is that of no exception.
    if not parts["occurrence"]:
        parts["cause"] = parts["metadata"]
    return parts | {"derived": derive(event, issue, parts)}


def derive(event, issue, parts):
    """Return the values that no part of an error holds as they are."""
    project_id = identifier(event.get("project"))
    if not re.fullmatch("[0-9]+", project_id or ""):
        project_id = None  # Other forms of events have a slug there.
    summary = (pick(parts, *FIELDS["exception_type"]), pick(parts, *FIELDS["exception_value"]))
    rules = as_list(as_dict(parts.get("legacy")).get("triggering_rules"))
    return {
        "issue_id": search_url("/issues/([0-9]+)", event.get("issue_url"), event.get("web_url")),
        "project_id": project_id,
        "project_slug": search_url("/api/0/projects/[^/]+/([^/]+)/events/", event.get("url")),
        "summary": ": ".join(filter(None, summary)),
        "rule": first(rules[:1]),
        "category": find_category(event, issue, parts["occurrence"]),
    }


def pick(parts, parse, paths):
    """Return the first value at the paths that `parse` makes something of, else None."""
    for part, key in paths:
        if part in parts:
            value = parse(parts[part].get(key))
            if value is not None:
                return value
    return None


def parse_error(payload, resource, received_at):
    """Return the row of a delivery's error but for its payload columns, or None without an error.

    `resource` is the Sentry-Hook-Resource header or None, `received_at` an ISO 8601 time.
    """
    error = find_error(payload)
    if error is None:
        return None
    parts = find_parts(error)
    kind = as_dict(error.get("kind"))
    row = {"received_at": received_at}
    row["resource"] = text(resource) or kind.get("resource")
    row["action"] = text(payload.get("action"))
    for column, (parse, paths) in FIELDS.items():
        row[column] = pick(parts, parse, paths)
    row["timestamp"] = row["timestamp"] or received_at
    return row


def parse_line(value):
    """Return a source line as clean text, which is empty for anything else than text."""
    return text(value, LINE_LENGTH) or ""


def parse_lines(lines, last=False):
    """Return the first CONTEXT_LINES of a list of source lines, or the last ones, else None."""
    if not isinstance(lines, list):
        return None
    number = len(lines) - CONTEXT_LINES
    if number <= 0:
        return [parse_line(value) for value in lines]
    if last:
        return [rest(number), *map(parse_line, lines[-CONTEXT_LINES:])]
    return [*map(parse_line, lines[:CONTEXT_LINES]), rest(number)]


def find_lines(frame, number):
    """Return a frame's source lines as the dict of the keys that a service hook has no names for.

    It sends pairs of a line's number and its text, and `number` is that of the frame's own line.
    """
    pairs = as_list(frame.get("context"))[:ITEMS]
    if number is None or not pairs:
        return frame
    lines = {"pre_context": [], "context_line": None, "post_context": []}
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
            continue
        if pair[0] < number:
            lines["pre_context"].append(pair[1])
        elif pair[0] > number:
            lines["post_context"].append(pair[1])
        else:
            lines["context_line"] = pair[1]
    return lines


def parse_frame(frame, room):
    """Return a frame in the shape that goes out, whichever spelling it has."""
    get = frame.get
    number = first((integer(get("lineno")), integer(get("lineNo"))))
    lines = find_lines(frame, number)
    own_line = lines.get("context_line")
    in_app = first((get("in_app"), get("inApp")))
    address = first((get("instruction_addr"), get("instructionAddr")))
    return {
        "filename": text(get("filename")),
        "abs_path": text(get("abs_path")) or text(get("absPath")),
        "module": text(get("module")),
        "function": text(get("function")),
        "lineno": number,
        "colno": first((integer(get("colno")), integer(get("colNo")))),
        "in_app": in_app if isinstance(in_app, bool) else None,
        "pre_context": parse_lines(lines.get("pre_context"), last=True),
        "context_line": parse_line(own_line) if isinstance(own_line, str) else None,
        "post_context": parse_lines(lines.get("post_context")),
        "package": text(get("package")),
        "instruction_addr": identifier(address),
        "vars": as_object(get("vars"), room, VARIABLES),
    }


def parse_frames(holder, room):
    """Return the frames of an exception, a thread or an event, the oldest call first.

    They are read from the newest on, to which the room goes. The first one says if some were cut.
    """
    sent = []
    for place in places(holder, "stacktrace"):
        sent = sent or as_list(as_dict(place).get("frames"))
    number_cut = len(sent) - take_room(room, "frames", min(len(sent), FRAMES))
    parsed = []
    for frame in reversed(sent[number_cut:]):
        if isinstance(frame, dict):
            parsed.append(parse_frame(frame, room))
    if number_cut:
        parsed.append(parse_frame({"function": rest(number_cut, "older frames")}, room))
    parsed.reverse()
    return parsed


def parse_thread(event, exception, room):
    """Return the frames of the thread that an exception names, an empty list without one."""
    thread_id = identifier(first((exception.get("thread_id"), exception.get("threadId"))))
    if thread_id is not None:
        for thread in find_list(event, "threads"):
            if identifier(thread.get("id")) == thread_id:
                return parse_frames(thread, room)
    return []


def parse_crash(event, metadata, room):
    """Return the frames of an event of which no exception has any."""
    threads = find_list(event, "threads")
    threads.sort(key=lambda thread: thread.get("current") is not True)
    threads.sort(key=lambda thread: thread.get("crashed") is not True)
    for holder in (*threads, event):
        frames = parse_frames(holder, room)
        if frames:
            return frames
    place = {key: text(metadata.get(key)) for key in ("filename", "function")}
    return [parse_frame(place, room)] if any(place.values()) else []


def parse_exception(exception, main, room):
    """Return an exception in the shape that goes out, where `main` is the main one as sent."""
    return {
        "type": text(exception.get("type")),
        "value": text(exception.get("value")),
        "module": text(exception.get("module")),
        "mechanism": plain(exception.get("mechanism"), room=room),
        "main": exception is main,
        "frames": parse_frames(exception, room),
    }


def parse_exceptions(event, metadata):
    """Return an event's exceptions, the inner cause first, and the stacktrace of the crash.

    The stacktrace is that of the main exception, unless it has none and another one has.
    """
    sent = find_exceptions(event)
    main = find_main(event, sent)
    kept = sent[-EXCEPTIONS:]
    if sent and all(exception is not main for exception in kept):
        kept[0] = main
    room = new_room()
    parsed = [parse_exception(exception, main, room) for exception in reversed(kept)]
    parsed.reverse()
    crash = next((exception for exception in parsed if exception["main"]), {"frames": []})
    crash["frames"] = crash["frames"] or parse_thread(event, main, room)
    with_frames = [exception for exception in (*parsed, crash) if exception["frames"]]
    if with_frames:
        stacktrace = with_frames[-1]["frames"]
    else:
        stacktrace = parse_crash(event, metadata, room)
        crash["frames"] = stacktrace
    if len(sent) > EXCEPTIONS:
        cut_off = {"type": REST, "value": rest(len(sent) - EXCEPTIONS, "inner exceptions")}
        parsed.insert(0, parse_exception(cut_off, main, room))
    return parsed, stacktrace


def parse_headers(headers):
    """Return a request's headers, sent as pairs, as an object or as lines, as a dict, else None."""
    if isinstance(headers, str):
        headers = [line.partition(":")[::2] for line in headers[:COLUMN_LENGTH].splitlines()]
    pairs = read_pairs(headers, PAIRS)
    return {name: mask_value(name, value) for name, value in pairs} or None


def parse_query(query):
    """Return the query of a request's URL, sent as text, as pairs or as an object, as text."""
    if isinstance(query, str):
        return mask_query(text(query))
    pairs = read_pairs(query, PAIRS)
    return text("&".join(f"{name}={mask_value(name, value) or ''}" for name, value in pairs))


def parse_data(data):
    """Return a request's body, sent as text or as JSON, as JSON where it can be read as such."""
    if not isinstance(data, str):
        return plain(data)
    if not data[:NAME_LENGTH].lstrip().startswith(("{", "[")):
        return mask_query(text(data))
    if len(data) <= JSON_LENGTH:
        with suppress(ValueError, RecursionError):
            return plain(json.loads(data))
    return JSON_MEMBER.sub(mask, text(data))


def parse_request(event):
    """Return the request in which an error happened, None without one."""
    request = find_object(event, "request")
    if not request:
        return None
    return {
        "method": text(request.get("method")),
        "url": mask_query(text(request.get("url"))),
        "query": parse_query(first((request.get("query_string"), request.get("query")))),
        "headers": parse_headers(request.get("headers")),
        "data": parse_data(request.get("data")),
    }


def parse_crumb(crumb, room):
    """Return a breadcrumb in the shape that goes out."""
    words = {key: text(crumb.get(key)) for key in ("type", "category", "level", "message")}
    data = plain(crumb.get("data"), room=room)
    return {"timestamp": moment(crumb.get("timestamp")), **words, "data": data}


def parse_crumbs(event):
    """Return an event's newest breadcrumbs, the newest last.

    They are sorted where all have a time, because some SDKs append groups of older ones.
    """
    crumbs = find_list(event, "breadcrumbs")
    times = [parse_time(crumb.get("timestamp")) for crumb in crumbs]
    if None not in times:
        order = sorted(range(len(crumbs)), key=times.__getitem__)
        crumbs = [crumbs[index] for index in order]
    room = new_room()
    return [parse_crumb(crumb, room) for crumb in crumbs[-CRUMBS:]]


def parse_actor(actor):
    """Return who caused a delivery, None where it is not said."""
    if not as_dict(actor):
        return None
    return {key: identifier(actor.get(key)) for key in ("type", "id", "name")}


def parse_stats(issue):
    """Return what an issue delivery says of its issue's counts, None where it says nothing."""
    stats = {
        "count": integer(issue.get("count")),
        "user_count": integer(issue.get("userCount")),
        "first_seen": moment(issue.get("firstSeen")),
        "last_seen": moment(issue.get("lastSeen")),
        "priority": text(issue.get("priority")),
    }
    return stats if any(value is not None for value in stats.values()) else None


def parse_detail(payload):
    """Return what of a stored payload has no column, in the shapes that go out."""
    error = find_error(payload)
    event = error["event"]
    issue = as_dict(error.get("issue"))
    extra = first((event.get("extra"), as_dict(error.get("hook")).get("context")))
    exceptions, stacktrace = parse_exceptions(event, find_metadata(event, issue))
    return {
        "exceptions": exceptions,
        "stacktrace": stacktrace,
        "tags": parse_tags(event),
        "actor": parse_actor(payload.get("actor")),
        "request": parse_request(event),
        "breadcrumbs": parse_crumbs(event),
        "user": as_object(find_object(event, "user") or None),
        "contexts": as_object(event.get("contexts")),
        "extra": as_object(extra),
        "csp": as_object(find_object(event, "csp") or None),
        "issue_stats": parse_stats(issue),
    }


# --------------------------------------------------------------------------------------------------
# Storage: all SQL and all files are here; knows no payload shapes
# --------------------------------------------------------------------------------------------------

COLUMNS = (
    "id received_at timestamp resource action event_id issue_id short_id title message culprit level status platform "
    "logger environment release project_id project_slug project_name exception_type exception_value permalink rule"
).split()
SCHEMA_VERSION = 1  # as schema.sql sets it
WAIT_SECONDS = (
    3  # for the database's lock, by the first delivery that finds it taken, which is then spooled
)
TURN_SECONDS = 0.5  # of that before others are served meanwhile; writers of ours take milliseconds
READ_SECONDS = 2  # for a read to wait for a writer, which only the rollback journal asks of it
LOCAL_FILE_SYSTEMS = (
    "bcachefs btrfs ext2 ext3 ext4 f2fs jfs overlay ramfs reiserfs tmpfs xfs zfs".split()
)
CHECKPOINT_CHANGES = (
    1000  # of rows, about 130 errors: so the WAL stays short and is written over in place
)
LONG_WAL_BYTES = (
    32 * 1024 * 1024
)  # what a long foreign read, or a burst of large deliveries, lets it grow to
SPOOL_BATCH, SPOOL_BATCH_BYTES = (
    50,
    1024 * 1024,
)  # spooled deliveries that are moved in one transaction
DELIVERY_DAYS = 90  # that the counts of deliveries are kept


def in_microseconds(when):
    """Return a time in UTC as ISO 8601 with microseconds, so that texts compare as times do."""
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now(days_ago=0):
    """Return the time, or the time some days ago."""
    return in_microseconds(datetime.now(UTC) - timedelta(days=days_ago))


def choose_journal_mode(folder, mounts=Path("/proc/self/mountinfo")):
    """Return WAL where `folder` is known to be on a local file system, else PERSIST: over a network WAL corrupts."""
    folder, best, file_system = os.fsencode(os.path.realpath(folder)), -1, None
    with suppress(OSError):
        for line in mounts.read_bytes().splitlines():
            about, _, kind = line.partition(b" - ")
            mount = re.sub(
                rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), about.split(b" ")[4]
            )
            if os.path.commonpath((folder, mount)) == mount and len(mount) >= best:
                best, file_system = len(mount), kind.split(b" ")[0].decode()
    return "WAL" if file_system in LOCAL_FILE_SYSTEMS else "PERSIST"


def is_busy(error):
    """Say whether an attempt failed only because another process holds a lock."""
    code = (
        getattr(error, "sqlite_errorcode", 0) & 0xFF
    )  # the primary code; extended ones tell the kind of busy
    return isinstance(error, BlockingIOError) or code in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def identity(path):
    """Return what tells a file, by its path or descriptor, from another that took its place; None if there is none."""
    with suppress(FileNotFoundError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return None


class Database:
    """One SQLite file as several processes share it: each keeps a connection, and writers take turns."""

    def __init__(self, path):
        self.path, self.gives_up_at = Path(path), math.inf  # monotonic; set when the service stops
        self.journal_mode = choose_journal_mode(self.path.parent)
        self.kept = threading.local()
        self.is_first = False  # of all workers, to have found the database locked
        self.changes, self.checkpointing = CHECKPOINT_CHANGES, None

    def lock_file(self):
        """Return the file that writers lock, opened. A byte in it says that somebody has waited in vain for a write."""
        lock, path = getattr(self.kept, "lock", None), f"{self.path}.lock"
        if lock is None or identity(lock.fileno()) != identity(path):
            # A file of its own: to close any other descriptor of the database drops SQLite's locks on it.
            lock = self.kept.lock = open(path, "ab")
        return lock

    def is_in_trouble(self):
        """Say whether somebody has waited in vain for a write, and nobody has written since."""
        with suppress(OSError):
            return os.fstat(self.lock_file().fileno()).st_size > 0
        return False

    def note_trouble(self, wait):
        """Tell all workers of a wait in vain, if it was a full one; say whether that is news."""
        return wait is None and time.monotonic() < self.gives_up_at and self.mark_trouble(True)

    def mark_trouble(self, is_there):
        """Tell all workers whether there is trouble; say whether that is news."""
        with suppress(OSError):  # it can only make others wait
            if self.is_in_trouble() != is_there:
                os.ftruncate(self.lock_file().fileno(), is_there)
                return True
        return False

    def patiently(self, attempt, deadline):
        """Call `attempt` until no lock is in its way; let it fail at the deadline, or soon if the service stops."""
        while True:
            try:
                return attempt()
            except (BlockingIOError, sqlite3.OperationalError) as error:
                if not is_busy(error) or time.monotonic() >= min(deadline, self.gives_up_at):
                    raise
            time.sleep(0.00005)

    def connection(self):
        """Return the kept connection to read with; it is opened on first use, and so after the fork."""
        if self.is_stale():
            with self.locked(time.monotonic() + TURN_SECONDS):
                pass
        return self.kept.connection

    def is_stale(self):
        """Say whether the kept connection is none, or one to a file that another has replaced, as a restore does."""
        return getattr(self.kept, "connection", None) is None or self.kept.identity != identity(
            self.path
        )

    @contextmanager
    def locked(self, deadline):
        """Hold the lock that all writers take, with a kept connection to the database as it is now."""
        lock = self.lock_file()
        # Polled, because a blocking flock knows no deadline.
        try:
            self.patiently(lambda: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB), deadline)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, "another process of the collector writes and takes long"
            ) from None
        try:
            if self.is_stale():
                self.discard_foreign_wal()
                self.drop_connection()
                self.kept.connection = self.patiently(self.open, deadline)
                self.kept.identity, self.kept.wal = (
                    identity(self.path),
                    identity(f"{self.path}-wal"),
                )
            yield self.kept.connection
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)

    def discard_foreign_wal(self):
        """Remove a WAL that is not of the database beside it, as a restore may leave it: SQLite would apply it."""
        # Before the old connection is closed: its open WAL keeps the inode from being used again.
        kept, wal = getattr(self.kept, "wal", None), f"{self.path}-wal"
        was_replaced = kept and kept == identity(wal) and self.kept.identity != identity(self.path)
        if was_replaced or (Path(wal).exists() and self.is_complete()):
            log.warning(
                "the database was replaced; the WAL that was left of the one before is removed"
            )
            for name in (wal, f"{self.path}-shm"):
                Path(name).unlink(missing_ok=True)
        self.kept.wal = None

    def is_complete(self):
        """Say whether the database is by its header one without a WAL, as a backup is, and one in use never."""
        # To read the header drops SQLite's locks of this process: only the first connection's are not there yet.
        if threading.current_thread() is not threading.main_thread():
            return False
        try:
            with open(self.path, "rb") as file:
                return file.read(20)[18:] in (b"", b"\1\1")
        except FileNotFoundError:
            return True

    def open(self):
        """Return a connection to the database, its schema applied; the caller holds the lock."""
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute(f"PRAGMA journal_mode = {self.journal_mode}")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(
                "PRAGMA journal_size_limit = 16777216"
            )  # bytes; what a long reader let the WAL grow to
            connection.execute(
                "PRAGMA wal_autocheckpoint = 0"
            )  # it would hold up the reply to who happens to be next
            if connection.execute("PRAGMA user_version").fetchone()[0] != SCHEMA_VERSION:
                schema = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
                connection.executescript(f"BEGIN IMMEDIATE; {schema}; COMMIT")
            connection.execute(f"PRAGMA busy_timeout = {READ_SECONDS * 1000}")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def turn(self, wait=None):
        """Yield a connection inside a write transaction of its own, in turn with all other writers, and commit it.

        Raises sqlite3.Error or OSError if the database cannot be written within `wait` seconds. Who has waited in vain
        for TURN_SECONDS tells all workers, and nobody waits again until a write succeeds: a crowd would fill them all.
        """
        self.is_first, patience = False, 0.01 if self.is_in_trouble() else TURN_SECONDS
        deadline = time.monotonic() + (patience if wait is None else wait)
        try:
            with self.locked(deadline) as connection:
                connection.execute("PRAGMA busy_timeout = 0")  # to wait is `patiently`'s
                try:
                    try:
                        self.patiently(lambda: connection.execute("BEGIN IMMEDIATE"), deadline)
                    except sqlite3.OperationalError:
                        self.is_first = self.note_trouble(
                            wait
                        )  # in turn, so that one of all workers is
                        raise
                    before = connection.total_changes
                    yield connection
                    self.changes += connection.total_changes - before
                    self.patiently(lambda: connection.execute("COMMIT"), deadline)
                finally:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    connection.execute(f"PRAGMA busy_timeout = {READ_SECONDS * 1000}")
        except (sqlite3.Error, OSError) as error:
            self.note_trouble(wait)
            if not is_busy(error):
                self.drop_connection()
            raise
        self.mark_trouble(False)

    def checkpoint(self):
        """Move what the WAL holds into the database, if it is time to; a long one is left to a thread."""
        if self.changes < CHECKPOINT_CHANGES or (
            self.checkpointing and self.checkpointing.is_alive()
        ):
            return
        with suppress(FileNotFoundError):  # another journal mode has no WAL
            if os.stat(f"{self.path}-wal").st_size < LONG_WAL_BYTES:
                self.run_checkpoint()
            else:  # deliveries are spooled meanwhile, not kept waiting
                self.checkpointing = threading.Thread(target=self.run_long_checkpoint, daemon=True)
                self.checkpointing.start()

    def run_checkpoint(self):
        # In turn with the writers: SQLite before 3.51.3 may corrupt a WAL that is written and reset at once.
        with self.locked(time.monotonic() + 0.1) as connection:
            connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self.changes = 0

    def run_long_checkpoint(self):
        try:
            self.run_checkpoint()
        except (sqlite3.Error, OSError) as error:
            log.warning("a checkpoint of the WAL has to be made again: %s", error)
        finally:
            self.close()

    def drop_connection(self):
        """Close the kept connection; the next use opens one anew."""
        connection, self.kept.connection = getattr(self.kept, "connection", None), None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def close(self):
        """Close all that is kept, as before a fork."""
        if self.checkpointing not in (None, threading.current_thread()):
            self.checkpointing.join()
        self.drop_connection()
        lock, self.kept.lock = getattr(self.kept, "lock", None), None
        if lock is not None:
            lock.close()


SAME_BYTES = "event_id IS NULL AND issue_id IS NULL AND payload_bytes = :payload_bytes AND payload = :payload"
INSERT = f"""
INSERT INTO errors ({", ".join(COLUMNS[1:])}, payload_bytes, payload)
SELECT {", ".join(f":{name}" for name in COLUMNS[1:])}, :payload_bytes, :payload
WHERE CASE
    WHEN :event_id IS NOT NULL THEN TRUE  -- the unique index decides
    WHEN :issue_id IS NOT NULL THEN NOT EXISTS (SELECT 1 FROM errors WHERE issue_id = :issue_id)
    ELSE NOT EXISTS (SELECT 1 FROM errors WHERE {SAME_BYTES})
END
ON CONFLICT DO NOTHING RETURNING id
"""


def pack(body):
    """Return the payload columns for a body (bytes): to be made before a turn, so that nobody waits for it."""
    packed = zlib.compress(body, 1)
    # sqlar_uncompress takes a blob of the stated length for one that is not compressed.
    return {"payload_bytes": len(body), "payload": packed if len(packed) < len(body) else body}


def insert_error(connection, row):
    """Insert a row, its payload columns with it, unless it is there already; return its id and whether it is new."""
    found = connection.execute(INSERT, row).fetchone()
    if found:
        return found["id"], True
    known = (
        "event_id = :event_id"
        if row["event_id"]
        else "issue_id = :issue_id"
        if row["issue_id"]
        else SAME_BYTES
    )
    return connection.execute(f"SELECT min(id) FROM errors WHERE {known}", row).fetchone()[0], False


def select_error(connection, id_):
    """Return an error's row without its payload, or None."""
    return connection.execute(
        f"SELECT {', '.join(COLUMNS)} FROM errors WHERE id = ?", (id_,)
    ).fetchone()


def select_body(connection, id_):
    """Return the body of a stored delivery as it was received (bytes)."""
    row = connection.execute(
        "SELECT payload, payload_bytes FROM errors WHERE id = ?", (id_,)
    ).fetchone()
    if row is None:
        return None
    return (
        row["payload"]
        if len(row["payload"]) == row["payload_bytes"]
        else zlib.decompress(row["payload"])
    )


FACETS = {  # as schema.sql makes them: the filter's name, the column
    "project": "project_slug",
    "level": "level",
    "environment": "environment",
    "platform": "platform",
    "issue": "issue_id",
}


def match_expression(filters):
    """Return the FTS5 query for the facets and words of `filters`, or None without any; any text is a safe query."""
    terms = [
        f'facets : "\ue000{key}{filters[key].encode().hex()}"' for key in FACETS if key in filters
    ]
    words = ['"{}"'.format(word.replace('"', '""')) for word in filters.get("q", "").split()]
    if words:
        terms.append("- facets : (" + " ".join(words) + "*)")
    return " AND ".join(terms) or None


def narrow(connection, filters):
    """Return `filters` with what takes a look: a short id made an issue id, times with the bounds they give for ids."""
    found = dict(filters)
    if "issue" in filters:
        sql = "SELECT issue_id FROM errors WHERE short_id = :issue AND issue_id IS NOT NULL ORDER BY id DESC LIMIT 1"
        row = connection.execute(sql, filters).fetchone()
        found["issue"] = row["issue_id"] if row else filters["issue"]
    if "since" in filters or "until" in filters:
        # Ids follow the times of receipt but for deliveries that were spooled, so these are bounds and no more. Left to
        # itself SQLite would look for the least id by walking through the table.
        bounds = {"since": ("min(id)", "from_id", 2**63 - 1), "until": ("max(id)", "to_id", 0)}
        bounds = [bound for key, bound in bounds.items() if key in filters]
        sql = f"SELECT {', '.join(sought for sought, _, _ in bounds)} FROM errors INDEXED BY errors_received_at"
        period = (filters.get("since", ""), filters.get("until", "~"))
        ids = connection.execute(f"{sql} WHERE received_at BETWEEN ? AND ?", period).fetchone()
        found |= {
            name: none if id_ is None else id_
            for (_, name, none), id_ in zip(bounds, ids, strict=True)
        }
    return found


def select_errors(connection, filters, limit, oldest_first=False, columns=COLUMNS):
    """Return up to `limit` rows without payloads, newest first unless told otherwise.

    `filters` are those of the query string, after `narrow`; `before` and `after` are ids.
    """
    match = match_expression(filters)
    source = (
        "errors_search CROSS JOIN errors ON errors.id = errors_search.rowid" if match else "errors"
    )
    row_id = "errors_search.rowid" if match else "errors.id"
    # A facet finds the row, the column is sure.
    conditions = {key: f"errors.{column} = :{key}" for key, column in FACETS.items()} | {
        "since": "errors.received_at >= :since",
        "until": "errors.received_at <= :until",
        "from_id": f"{row_id} >= :from_id",
        "to_id": f"{row_id} <= :to_id",
        "before": f"{row_id} < :before",
        "after": f"{row_id} > :after",
    }
    where = [condition for key, condition in conditions.items() if key in filters]
    where += ["errors_search MATCH :match"] if match else []
    sql = f"SELECT {', '.join(f'errors.{name}' for name in columns)} FROM {source}"
    sql += f" WHERE {' AND '.join(where)}" if where else ""
    sql += f" ORDER BY {row_id} {'ASC' if oldest_first else 'DESC'} LIMIT :limit"
    return connection.execute(sql, filters | {"match": match, "limit": limit}).fetchall()


def select_extent(connection):
    """Return the oldest and the newest error's id, None if there is none."""
    return list(
        connection.execute(
            "SELECT (SELECT min(id) FROM errors), (SELECT max(id) FROM errors)"
        ).fetchone()
    )


def count_errors(connection):
    """Return how many errors are stored."""
    return connection.execute("SELECT count(*) FROM errors").fetchone()[0]


def select_neighbours(connection, id_):
    """Return the ids of the next newer and the next older error, None where there is none."""
    sql = "SELECT (SELECT min(id) FROM errors WHERE id > :id), (SELECT max(id) FROM errors WHERE id < :id)"
    return tuple(connection.execute(sql, {"id": id_}).fetchone())


def check_writable(database):
    """Commit a row; raise sqlite3.Error or OSError if that cannot be done."""
    with database.turn() as connection:
        sql = "INSERT INTO health VALUES (1, :at) ON CONFLICT DO UPDATE SET checked_at = :at"
        connection.execute(sql, {"at": now()})


def delete_old_errors(database, days, most=50):
    """Delete those of the `most` oldest errors that are older than `days`; return how many were."""
    limit = now(days)
    oldest = "SELECT id FROM (SELECT id, received_at FROM errors ORDER BY id LIMIT ?) WHERE received_at < ?"
    if not database.connection().execute(oldest, (most, limit)).fetchone():
        return 0
    with database.turn(wait=0) as connection:
        return connection.execute(
            f"DELETE FROM errors WHERE id IN ({oldest})", (most, limit)
        ).rowcount


class Tally:
    """Count deliveries by day, outcome and reason, in memory until the next write takes the counts along."""

    def __init__(self):
        self.pending, self.credit, self.credited_at = {}, 100, time.monotonic()

    def add(self, outcome, reason):
        """Count a delivery; an outcome and a reason are of a fixed few."""
        at = now()
        key = (at[:10], outcome, reason)
        self.pending[key] = (self.pending.get(key, (0,))[0] + 1, at)

    def may_write(self):
        """Say whether the counts alone are worth a write: 100 times at once, then once a second, whatever arrives."""
        at = time.monotonic()
        self.credit, self.credited_at = min(100, self.credit + at - self.credited_at), at
        if self.credit < 1:
            return False
        self.credit -= 1
        return True

    def write(self, connection, outcomes=()):
        """Add the counts, and `outcomes`, in the caller's transaction; clear `pending` after its commit."""
        sql = """INSERT INTO deliveries VALUES (?, ?, ?, ?, ?)
            ON CONFLICT DO UPDATE SET count = count + excluded.count, last_at = max(last_at, excluded.last_at)"""
        at = now()
        counts = [(*key, *value) for key, value in self.pending.items()]
        counts += [
            (at[:10], outcome, "", count, at) for outcome, count in Counter(outcomes).items()
        ]
        connection.executemany(sql, counts)
        connection.execute("DELETE FROM deliveries WHERE day < ?", (now(DELIVERY_DAYS)[:10],))


def select_deliveries(connection):
    """Return the counts of deliveries by outcome and reason, today's and of all days kept, the latest first."""
    sql = """SELECT outcome, nullif(reason, '') AS reason, sum(count) FILTER (WHERE day = ?) AS today,
        sum(count) AS count, max(last_at) AS last_at FROM deliveries GROUP BY 1, 2 ORDER BY last_at DESC"""
    return [
        dict(row) | {"today": row["today"] or 0} for row in connection.execute(sql, (now()[:10],))
    ]


class Spool:
    """A folder of deliveries that the database could not take yet, a file each, their names in order of receipt."""

    def __init__(self, folder):
        self.folder, self.queue, self.ready, self.unreadable = Path(folder), deque(), [], set()

    def put(self, received_at, resource, body):
        """Write a delivery to disk, synced; raise OSError if that cannot be done."""
        self.folder.mkdir(exist_ok=True)
        name = f"{time.time_ns():020}-{os.getpid()}"
        part = self.folder / f"{name}.part"
        try:
            with open(part, "xb") as file:
                file.write(json.dumps([received_at, resource]).encode() + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            part.rename(part.with_suffix(".delivery"))
        except OSError:
            part.unlink(missing_ok=True)
            raise
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name is durable only once the folder is
        finally:
            os.close(folder)

    def names(self):
        """Return the names of the files that wait, in no order."""
        try:
            return [name for name in os.listdir(self.folder) if name.endswith(".delivery")]
        except OSError:
            return []

    def drain(self, database, read_row, seconds=0.05):
        """Move deliveries into the database for about `seconds`, in order; say whether more of them wait.

        `read_row` makes a row of a resource, a time and a body. A file is removed after the commit; should that fail,
        the database knows the delivery when it comes again.
        """
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            # What was made ready is kept if the database has no time for it now.
            self.ready = self.ready or self.make_ready(read_row, until)
            if not self.ready:
                break
            with database.turn(wait=0.01) as connection:
                for file, row in self.ready:
                    self.insert(connection, file, row)
            for file, _ in self.ready:
                file.unlink(missing_ok=True)
            log.info("moved %d spooled deliveries into the database", len(self.ready))
            self.ready = []
        return bool(self.ready or self.queue)

    def make_ready(self, read_row, until):
        """Return the next files with their rows, as many as there is time for and as share a transaction."""
        if not self.queue:
            # Listed once for all that wait: there may be many thousands of them.
            self.queue = deque(sorted(name for name in self.names() if name not in self.unreadable))
        ready, size = [], 0
        while self.queue and len(ready) < SPOOL_BATCH and size < SPOOL_BATCH_BYTES:
            file = self.folder / self.queue[0]
            row = self.read(file, read_row)
            self.queue.popleft()
            if row:
                ready.append((file, row))
                size += len(row["payload"])
            if time.monotonic() > until:
                break
        return ready

    def read(self, file, read_row):
        """Return the row of a spooled delivery, None if it is gone, can't be read, or makes no error."""
        try:
            head, _, body = file.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None  # another worker has just moved it
        except OSError as error:
            self.unreadable.add(file.name)
            log.error("cannot read a spooled delivery, it waits for the next start: %s", error)
            return None
        try:
            received_at, resource = json.loads(head)
            return read_row(body, resource, received_at) | pack(body)
        except MemoryError:
            raise
        except Exception as error:
            self.set_aside(file, error)
            return None

    def insert(self, connection, file, row):
        try:
            insert_error(connection, row)
        except Exception as error:
            if type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError, MemoryError):
                raise  # the fault is not the delivery's
            self.set_aside(file, error)

    def set_aside(self, file, error):
        """Give a delivery that makes no error another name, for a person to see."""
        with suppress(FileNotFoundError):  # another worker has done so
            aside = file.rename(file.with_suffix(".rejected"))
            log.error(
                "cannot make an error of a spooled delivery (%s), see %s",
                type(error).__name__,
                aside,
            )


def backup(path, target, report):
    """Copy the database at `path`, as it is at this moment, to a new file; `report` gets the share that is done."""
    part = Path(f"{target}.part")
    part.unlink(missing_ok=True)
    with closing(
        sqlite3.connect(f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, timeout=10)
    ) as source:
        source.execute("BEGIN")
        source.execute(
            "SELECT 1 FROM sqlite_schema"
        ).fetchone()  # one snapshot, or each writer would restart the copy
        with closing(sqlite3.connect(part)) as copy:
            source.backup(
                copy, pages=2000, progress=lambda _, left, pages: report(1 - left / max(pages, 1))
            )
            copy.execute(
                "PRAGMA journal_mode = DELETE"
            )  # one file, complete without a -wal beside it
    part.rename(target)


# --------------------------------------------------------------------------------------------------
# Presentation: one function for each shape that goes out
# --------------------------------------------------------------------------------------------------

TEXT_LENGTH = 8000  # characters of a text form at the most
URL_LENGTH = 300  # characters of a URL in it
ANSI = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|.)",
    re.DOTALL,
)
# Control characters but tab and line feed, and those that reorder or hide text.
UNSEEN = re.compile(
    "[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def as_json(value):
    """Return a value as a line of JSON, ASCII so that no terminal obeys it."""
    return json.dumps(value) + "\n"


def summary(row):
    """Return the scalar keys of an error."""
    return {"id": row["id"], "url": f"/errors/{row['id']}"} | dict(row)


def detail(row, body):
    """Return an error in full; `body` is the delivery as it was received (bytes)."""
    return summary(row) | parse_detail(load(body))


def fold(frames, marked=False):
    """Return runs of frames as (is library code, frames); the crash counts as own, and all where none is marked."""
    runs, marked = [], marked or any(frame["in_app"] for frame in frames)
    for frame in frames:
        library = bool(marked and not frame["in_app"] and frame is not frames[-1])
        if not runs or runs[-1][0] != library:
            runs.append((library, []))
        runs[-1][1].append(frame)
    return runs


def place(frame):
    """Return where a frame is, in the words of a Python traceback."""
    file = frame["filename"] or frame["abs_path"] or frame["module"] or "?"
    line = "" if frame["lineno"] is None else f", line {frame['lineno']}"
    return f'File "{file}"{line}, in {frame["function"] or "?"}'


def flat(value, length):
    """Return text on one line of at most `length` characters, nothing in it that a terminal would obey."""
    return cut(" ".join(UNSEEN.sub("", ANSI.sub("", str(value))).split()), length)


def joined(*values):
    return " ".join(str(value) for value in values if value)


def trace_lines(frames):
    """Return the lines of a stacktrace, the oldest call first, runs of library frames folded."""
    for library, run in fold(frames):
        if library:
            yield f"[{len(run)} library frame{'s'[: len(run) > 1]}]"
        for frame in [] if library else run:
            yield flat(place(frame), 300)
            line = flat(frame["context_line"] or "", 200)
            if line:
                yield f"  {line}"


def chain_lines(exceptions):
    """Return a line for each exception, the inner cause first, with the place where it was raised."""
    for found in exceptions:
        at = f"[{flat(place(found['frames'][-1]), 200)}]" if found["frames"] else ""
        yield joined(flat(f"{found['type'] or '?'}: {found['value'] or ''}", 400), at)


def error_text(row, body, url):
    """Return an error as text for a terminal or an agent, the most useful part first, TEXT_LENGTH characters at most.

    Only lines of ours start at the margin; the error's own words stand behind a key there, or indented.
    """
    found = parse_detail(load(body))
    http, crumbs = found["request"] or {}, found["breadcrumbs"]
    for crumb in crumbs:
        crumb["data"] = crumb["data"] and json.dumps(crumb["data"], ensure_ascii=False)
    values = {"error": row["id"]} | {
        key: row[key] for key in ("title", "level", "culprit", "environment", "release")
    }
    values |= {
        "project": row["project_slug"] or row["project_name"] or row["project_id"],
        "issue": joined(row["short_id"], row["issue_id"]),
        "event": row["event_id"],
        "happened": row["timestamp"],
        "received": row["received_at"],
        "message": None
        if row["message"] in (row["title"], row["exception_value"])
        else row["message"],
        **{key: row[key] for key in ("platform", "logger", "rule", "permalink")},
        "url": url,
    }
    lengths = {"title": 500, "message": 1000, "permalink": 300, "url": URL_LENGTH}
    head = {key: flat(value, lengths.get(key, 150)) for key, value in values.items() if value}
    words = ("timestamp", "category", "level", "message", "data")
    sections = {
        "stacktrace (oldest call first)": list(trace_lines(found["stacktrace"])),
        "exceptions (inner cause first)": list(chain_lines(found["exceptions"])),
        "tags": [flat(f"{key} = {value}", 200) for key, value in found["tags"].items()],
        "request": [flat(joined(http.get("method"), http.get("url")), 500)] if http else [],
        "breadcrumbs (newest last)": [
            flat(joined(*(crumb[word] for word in words)), 250) for crumb in crumbs
        ],
    }
    shown = "".join(f"{key}: {value}\n" for key, value in head.items())
    return shown + fit(
        sections, TEXT_LENGTH - len(shown) - 300 - 2 * URL_LENGTH, cut(url, URL_LENGTH)
    )


def fit(sections, room, url):
    """Return as much of sections of lines as there is room for, and what had to be left out."""
    parts, left_out = [], []
    for name, lines in sections.items():
        ends_best = "(" in name  # what is cut goes from the top where the end matters most
        kept, budget = [], min(room - len(name) - 3, TEXT_LENGTH // 2)
        for line in lines[::-1] if ends_best else lines:
            budget -= len(line) + 3
            if budget < 0:
                break
            kept.append(f"  {line}\n")
        if kept:
            parts.append(f"\n{name}:\n" + "".join(kept[::-1] if ends_best else kept))
            room -= len(parts[-1])
        if len(kept) < len(lines):
            left_out.append(f"{len(lines) - len(kept)} lines of {name.split(' (')[0]}")
    left_out.append("ends of long values, source context and the rest of the payload")
    return (
        "".join(parts) + f"\nleft out: {', '.join(left_out)}: {url}?format=json and {url}/payload\n"
    )


def errors_text(rows, more):
    """Return a list as text, an error a line, TEXT_LENGTH characters at most; `more` is the URL of the rest or None."""
    more = more if len(more or "") <= 10 * URL_LENGTH else "see the Link header"
    lines, room = [], TEXT_LENGTH - 200 - len(more or "")
    for row in rows:
        about = joined(
            row["received_at"], row["level"], row["project_slug"], row["title"], row["culprit"]
        )
        lines.append(f"#{row['id']} {flat(about, 300)}\n")
        room -= len(lines[-1])
        if room < 0:
            lines[-1] = (
                f"left out: {len(rows) - len(lines) + 1} more of this page; ask for fewer with limit=\n"
            )
            break
    return "".join(lines) + (f"next: {more}\n" if more else "") or "no errors\n"


def visible(value, length=2000):
    """Return text as HTML: escaped, cut, and a sign in place of each character that would hide or reorder others."""
    shown = str(escape(cut(str(value), length)))
    return Markup(UNSEEN.sub(lambda found: f'<b class="unseen">U+{ord(found[0]):04X}</b>', shown))


def ago(value):
    """Return how long ago an ISO 8601 time was."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(value)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= size:
            return f"{abs(seconds) // size:.0f} {unit} {'ago' if seconds > 0 else 'ahead'}"
    return "just now"


def web_link(value):
    """Return a URL only if it is one that a browser may be sent to, else None."""
    return value if re.match(r"https?://[^\s]+$", value or "", re.IGNORECASE) else None


def source_lines(frame):
    """Return a frame's source lines as (number or None, text, whether it crashed there)."""
    before, after, number = frame["pre_context"] or [], frame["post_context"] or [], frame["lineno"]
    lines = [] if frame["context_line"] is None else [*before, frame["context_line"], *after]
    return [
        (None if number is None else number - len(before) + index, line, index == len(before))
        for index, line in enumerate(lines)
    ]


def chart(times, bars=40):
    """Return a bar chart of ISO 8601 times as bars of (share of the highest, count, start), None without times."""
    if not times:
        return None
    stamps = [datetime.fromisoformat(value).timestamp() for value in times]
    newest = max(stamps)
    width = max((newest - min(stamps)) / (bars - 1), 1)
    counts = Counter(bars - 1 - int((newest - stamp) / width) for stamp in stamps)
    starts = [datetime.fromtimestamp(newest - (bars - index) * width, UTC) for index in range(bars)]
    most = max(counts.values())
    shown = [
        (counts[index] / most, counts[index], f"{start:%Y-%m-%d %H:%M:%S}")
        for index, start in enumerate(starts)
    ]
    return {"bars": shown, "most": most}


PAGE_FILTERS = (visible, ago, web_link, source_lines, fold)


# --------------------------------------------------------------------------------------------------
# Web: thin routes, which read the request, call down and reply
# --------------------------------------------------------------------------------------------------

web = Blueprint("web", __name__, cli_group=None)
FORMS = {
    "json": "application/json",
    "html": "text/html",
    "text": "text/plain",
    "ndjson": "application/x-ndjson",
}
FILTERS = (*FACETS, "since", "until", "q")
MISSING = (
    "The Sentry-Hook-Signature header is missing: send through an internal integration, which signs. "
    "The legacy WebHooks plugin cannot; it needs SENTRY_CLIENT_SECRET unset."
)
RECEIPTS = {
    "stored": "201 CREATED",
    "duplicate": "200 OK",
    "queued": "202 ACCEPTED",
    "lost": "503 SERVICE UNAVAILABLE",
}
RETRY_AFTER = "5"  # seconds, with a 503
EXPLAIN_BYTES = 256 * 1024  # of a forged delivery that are worth parsing
HIDDEN = re.compile(
    r"[^\w.:-]", re.ASCII
)  # in a log line, whatever could end it or pass for another


class Collector:
    """Hold what the routes of one app share."""

    def __init__(self, settings):
        self.settings, path = settings, settings["DATABASE_URL"]
        self.database, self.spool, self.tally = (
            Database(path),
            Spool(path.parent / "spool"),
            Tally(),
        )
        self.waiting, self.settling = [], threading.Lock()  # deliveries, and who commits them
        self.report = lambda error: None
        self.pruned_at = self.kept_house_at = -math.inf

    def count(self, outcome, reason):
        """Count a delivery that needs no transaction, and write the counts where that is cheap."""
        self.tally.add(outcome, reason)
        self.write_counts()

    def write_counts(self, wait=0):
        """Write the counts that no transaction has taken along yet, where that is cheap or worth waiting for."""
        if self.tally.pending and (wait or self.tally.may_write()):
            with suppress(sqlite3.Error, OSError):
                with self.database.turn(wait) as connection:
                    self.tally.write(connection)
                self.tally.pending.clear()

    def take(self, body, payload, resource, received_at):
        """Return a delivery that is to be settled, and waits for that together with those that arrive meanwhile."""
        try:
            row = parse_error(payload, resource, received_at) | pack(body)
        except Exception as error:  # a fault of ours, which must not cost the delivery
            row = error
        delivery = Delivery(body, resource, received_at, row)
        self.waiting.append(delivery)
        return delivery

    def settle(self, delivery):
        """Commit a delivery, in one transaction with all that wait; spool what cannot be committed.

        One that finds the database locked, the first of all, has no outcome yet: it is to be settled again soon.
        """
        with self.settling:
            if not delivery.outcome:
                waiting = self.waiting[:]
                del self.waiting[: len(waiting)]
                self.store(waiting if delivery in waiting else [*waiting, delivery])

    def settle_at_last(self, delivery):
        """Settle a delivery whose reply nobody waits for: what was received is stored."""
        delivery.waits_until = -math.inf
        self.settle(delivery)

    def store(self, deliveries):
        """Commit deliveries in one transaction, if need be in one each; spool what cannot be committed."""
        try:
            self.commit(deliveries)
        except Exception as error:  # whatever it is: Sentry will not send this again
            if is_busy(error) and self.database.is_first:
                first = deliveries[0]
                first.waits_until = (
                    first.waits_until or time.monotonic() + WAIT_SECONDS - TURN_SECONDS
                )
            for delivery in deliveries:
                if len(deliveries) > 1 and not is_busy(error):  # one of them may be the cause
                    self.store([delivery])
                elif not is_busy(error) or time.monotonic() > min(
                    delivery.waits_until, self.database.gives_up_at
                ):
                    self.put_aside(delivery, error)

    def commit(self, deliveries):
        found = []
        with self.database.turn() as connection:
            for delivery in deliveries:
                if isinstance(delivery.row, Exception):
                    raise delivery.row
                found.append(insert_error(connection, delivery.row))
            outcomes = ["stored" if is_new else "duplicate" for _, is_new in found]
            self.tally.write(connection, outcomes)
        self.tally.pending.clear()
        for delivery, outcome, (id_, _) in zip(deliveries, outcomes, found, strict=True):
            delivery.outcome, delivery.id = outcome, id_

    def put_aside(self, delivery, error):
        """Spool a delivery that the database could not take; it is lost if that fails too."""
        self.note("cannot store a delivery, spooling it", error)
        try:
            self.spool.put(delivery.received_at, delivery.resource, delivery.body)
            delivery.outcome = "queued"
            self.tally.add(
                "queued", "database locked" if is_busy(error) else "database not writable"
            )
        except (
            Exception
        ) as spool_error:  # memory may be short, too, and others wait behind this one
            log.critical(
                "LOST a delivery: neither the database nor the spool can be written: %s",
                spool_error,
            )
            delivery.outcome = "lost"
            self.tally.add("refused", "disk")

    def note(self, words, error):
        """Log and report a failure, in words that hold nothing of a delivery."""
        of_system = isinstance(error, sqlite3.Error | OSError)
        log.error(
            "%s: %s: %s",
            words,
            type(error).__name__,
            error if of_system else "a fault of the collector's own",
        )
        self.report(error)

    def keep_house(self):
        """Do a little of what must not hold a reply up: move what was spooled, delete what is too old, checkpoint.

        Returns whether there is more to do.
        """
        self.kept_house_at, days = time.monotonic(), self.settings["RETENTION_DAYS"]
        try:
            has_more = self.spool.drain(
                self.database, lambda body, *about: parse_error(parse_body(body), *about)
            )
            if days and time.monotonic() - self.pruned_at > 1:
                if delete_old_errors(self.database, days):
                    has_more = True
                else:
                    self.pruned_at = time.monotonic()
            self.write_counts()
            self.database.checkpoint()
        except (
            sqlite3.Error,
            OSError,
            RuntimeError,
            MemoryError,
        ):  # the next delivery or health check says so
            return False
        return has_more

    def keep_house_at_times(self):
        """Keep house, unless that was done just now: many deliveries may be replied to at once."""
        if time.monotonic() - self.kept_house_at > 0.01:
            self.keep_house()


class Delivery:
    """A delivery that was taken in: what came, the row made of it or what went wrong with that, what became of it."""

    def __init__(self, body, resource, received_at, row):
        self.body, self.resource, self.received_at, self.row = body, resource, received_at, row
        self.outcome, self.id, self.waits_until = None, None, 0  # monotonic; 0: has not waited


def collector():
    """Return the Collector of the app that serves this request."""
    return current_app.extensions["collector"]


def read_body(limit):
    """Return the request's body (bytes); raise Refused if it has no length, is too long or is cut short."""
    length = request.content_length
    if "Transfer-Encoding" in request.headers or length is None:
        raise Refused(
            411, "no length", "The delivery has no Content-Length; send it whole, not chunked."
        )
    if length > limit:
        words = f"The delivery has {length} bytes, the limit is {limit}; raise MAX_BODY_BYTES to take it."
        raise Refused(413, "too large", words)
    try:
        body = request.environ["wsgi.input"].read(length)
    except OSError:  # the connection's
        body = b""
    if len(body) < length:
        words = f"The delivery broke off before its {length} bytes had come; send it again, faster."
        raise Refused(400, "cut short", words)
    return body


def is_signed(body, given, secrets):
    """Say whether `given` (bytes) is the signature of a body (bytes) by one of the client secrets."""
    keys = [secret.encode("utf-8", "surrogateescape") for secret in secrets]
    signatures = [hmac.digest(key, body, "sha256").hex().encode() for key in keys]
    return any(hmac.compare_digest(signature, given) for signature in signatures)


def check_signature(body, signature, secrets):
    """Raise Refused, with what is probably wrong, unless one of `secrets` signs the body; check nothing without any."""
    given = (signature or "").encode("utf-8", "replace")
    if not secrets or is_signed(body, given, secrets):
        return
    if not given:
        raise Refused(401, "signature missing", MISSING)
    if len(given) != 64:
        reason, words = (
            "signature length",
            f"it has {len(given)} characters, HMAC-SHA256 in hex has 64; let Sentry sign",
        )
    elif is_signed(body, given, [secret.strip() for secret in secrets]):
        reason, words = (
            "white space in secret",
            "remove the white space around SENTRY_CLIENT_SECRET",
        )
    elif len(body) <= EXPLAIN_BYTES and is_signed(as_sentry_writes(body), given, secrets):
        reason, words = (
            "body rewritten",
            "a proxy in between rewrote the body; make it pass the bytes on as they are",
        )
    else:
        reason, words = (
            "signature wrong",
            "set SENTRY_CLIENT_SECRET to the Client Secret of the integration that sends",
        )
    raise Refused(401, reason, f"The Sentry-Hook-Signature is wrong: {words}.")


def as_sentry_writes(body):
    """Return the JSON of a body (bytes) in the bytes that Sentry would send, the body itself if it is none."""
    with suppress(ValueError, RecursionError):
        return json.dumps(json.loads(body), separators=(",", ":")).encode()
    return body


def reason_to_ignore(payload, accepted):
    """Return why a delivery is not stored, as the reason to count and in words, or None if it is."""
    action = text(payload.get("action"))
    shown = ascii(cut(action, 40))
    if find_error(payload) is None:
        return "no error", f"a delivery with action {shown} that holds no new error"
    if action is None or action in accepted:
        return None
    mend = (
        f"; SENTRY_ACTIONS={','.join(accepted)},triggered takes issue alerts"
        if action == "triggered"
        else ""
    )
    return "action not accepted", f"action {shown} is not in SENTRY_ACTIONS{mend}"


@web.post("/sentry/webhook/")  # Sentry follows no redirect, and takes one for success
@web.post("/sentry/webhook")
def receive_webhook():
    """Take a delivery of Sentry's."""
    received_at, started, shared = now(), time.monotonic(), collector()
    try:
        body = read_body(shared.settings["MAX_BODY_BYTES"])
        check_signature(
            body,
            request.headers.get("Sentry-Hook-Signature"),
            shared.settings["SENTRY_CLIENT_SECRET"],
        )
        payload = parse_body(body)
    except Refused as refused:
        shared.count("refused", refused.reason)
        log_delivery(request.environ, started, f"refused {refused.status} {refused.reason}")
        raise
    ignored = reason_to_ignore(payload, shared.settings["SENTRY_ACTIONS"])
    if ignored:
        shared.count("ignored", ignored[0])
        log_delivery(request.environ, started, f"ignored {ignored[1]}")
        response = Response(
            as_json({"status": "ignored", "reason": ignored[1]}), mimetype=FORMS["json"]
        )
    else:
        resource = request.headers.get("Sentry-Hook-Resource")
        response = Receipt(shared, shared.take(body, payload, resource, received_at), started)
    response.call_on_close(shared.keep_house_at_times)
    return response


class Receipt(Response):
    """The reply to a delivery, made when the server asks for it: those that it was handed together share a commit."""

    def __init__(self, shared, delivery, started):
        super().__init__(mimetype=FORMS["json"])
        self.shared, self.delivery, self.started = shared, delivery, started

    def __call__(self, environ, start_response):
        at_last = partial(self.shared.settle_at_last, self.delivery)
        return ClosingIterator(self.settle(environ, start_response), [at_last, self.close])

    def settle(self, environ, start_response):
        self.shared.settle(self.delivery)
        while not self.delivery.outcome:
            if environ.get("collector.serves_others"):
                yield b""  # gunicorn.conf.py's worker does so meanwhile, and asks again
            self.shared.settle(self.delivery)
        outcome, id_ = self.delivery.outcome, self.delivery.id
        log_delivery(environ, self.started, outcome, id_)
        reply, headers = {"status": outcome}, self.headers.to_wsgi_list()
        if id_:
            reply |= {"id": id_, "url": f"/errors/{id_}"}
        if outcome == "stored":
            headers.append(("Location", reply["url"]))
        if outcome == "lost":
            headers.append(("Retry-After", RETRY_AFTER))
            reply = {
                "error": "Neither the database nor the spool can be written; free the disk, see the log."
            }
        body = as_json(reply).encode()
        start_response(RECEIPTS[outcome], [*headers, ("Content-Length", str(len(body)))])
        yield body


def log_delivery(environ, started, *words):
    """Log a line about a delivery, nothing of its content in it."""
    about = (environ.get(name, "-") for name in ("HTTP_SENTRY_HOOK_RESOURCE", "HTTP_REQUEST_ID"))
    milliseconds = (time.monotonic() - started) * 1000
    log.info(
        "webhook %s; %s; %.0f ms",
        joined(*words),
        joined(*(HIDDEN.sub("?", word)[:40] for word in about)),
        milliseconds,
    )


@web.before_request
def guard_reading():
    """Let only those read who know API_TOKEN, if it is set."""
    token, given = collector().settings["API_TOKEN"], None
    if not token or request.endpoint in ("web.receive_webhook", "web.show_health"):
        return
    with suppress(ValueError):  # Werkzeug's, of a header that is not ASCII
        given = request.authorization
    words = (given.token if given.type == "bearer" else given.password) or "" if given else ""
    if not hmac.compare_digest(
        words.encode("utf-8", "replace"), token.encode("utf-8", "surrogateescape")
    ):
        abort(
            401,
            "Reading needs API_TOKEN; send 'Authorization: Bearer <token>', or the token as Basic password.",
        )


def choose_form(*forms):
    """Return the form to reply in: what ?format= says, else what the Accept header prefers, else the first."""
    asked, types = request.args.get("format"), {FORMS[form]: form for form in forms}
    if asked and asked not in forms:
        abort(400, f"format={ascii(asked[:40])} is unknown here; use one of {', '.join(forms)}.")
    return asked or types[request.accept_mimetypes.best_match(types, FORMS[forms[0]])]


def read_query(*names):
    """Return the query string as a dict without empty values; abort with 400 on a name not in `names` or a repeat."""
    for name, values in request.args.lists():
        if name not in names:
            abort(
                400,
                f"The parameter {ascii(name[:40])} is unknown here; known are {', '.join(names) or 'none'}.",
            )
        if len(values) > 1:
            abort(400, f"The parameter {name} is given {len(values)} times; give it once.")
    return {name: clean(value.strip()) for name, value in request.args.items() if value.strip()}


def read_number(query, name, least, most):
    """Return a whole number of the query, None if it isn't there; abort with 400 if it is none or out of bounds."""
    value = query.get(name)
    if value is not None and not (
        re.fullmatch(r"[0-9]{1,19}", value) and least <= int(value) <= most
    ):
        abort(400, f"{name}={ascii(value[:40])} is no whole number from {least} to {most}.")
    return value and int(value)


def read_time(query, name):
    """Return a time of the query, ISO 8601 or as long ago as 15m, 24h or 7d; abort with 400 if it is neither."""
    value = query.get(name)
    if value is None:
        return None
    ago = re.fullmatch(r"([0-9]{1,6})([mhd])", value)
    if ago:
        minutes = int(ago[1]) * {"m": 1, "h": 60, "d": 1440}[ago[2]]
        found = moment(max(time.time() - minutes * 60, 0))
    else:
        found = moment(
            value.replace(" ", "+") if "T" in value else value
        )  # a plus that was not encoded
    if found is None:
        abort(
            400,
            f"{name}={ascii(value[:40])} is no time; use ISO 8601, as 2026-01-31T12:00:00Z, or 15m, 24h, 7d.",
        )
    return in_microseconds(datetime.fromisoformat(found))


def read_filters(query):
    """Return the filters of a query as Storage takes them."""
    filters = {name: query.get(name) for name in (*FACETS, "q")}
    filters |= {name: read_time(query, name) for name in ("since", "until")}
    filters |= {name: read_number(query, name, 0, 2**63 - 1) for name in ("before", "after")}
    return {name: value for name, value in filters.items() if value is not None}


def answer(form, state, render, links=None):
    """Reply in a form with what `render` returns, or with 304 to a client that has it: `state` tells versions apart."""
    etag = hashlib.sha256(as_json([STAMP, form, request.full_path, *state]).encode()).hexdigest()[
        :32
    ]
    known = request.if_none_match.contains_weak(etag)
    response = Response(status=304) if known else Response(render(), mimetype=FORMS[form])
    response.set_etag(etag)
    response.headers.extend({"Link": links} if links else {})
    return response


def moving(connection):
    """Return what a page changes with that shows neighbours, and how long ago things were."""
    return [*select_extent(connection), int(time.time() // 60)]


@web.get("/errors/latest")
def show_latest():
    """Show the newest error in full."""
    form, query = choose_form("json", "html", "text"), read_query(*FILTERS, "format", "refresh")
    connection, filters = collector().database.connection(), read_filters(query)
    for row in select_errors(connection, narrow(connection, filters), 1):
        return show(connection, row, form, read_number(query, "refresh", 5, 3600))
    words = (
        "No error matches; /errors lists those there are."
        if filters
        else "No error has come in yet; see / for how."
    )
    return abort(404, words)


@web.get("/errors/<int:id_>")
def show_error(id_):
    """Show one error in full."""
    form, _ = choose_form("json", "html", "text"), read_query("format")
    connection = collector().database.connection()
    return show(connection, find_row(connection, id_), form)


@web.get("/errors/<int:id_>/payload")
def show_payload(id_):
    """Show a delivery as it was received, byte for byte."""
    read_query()
    connection = collector().database.connection()
    row = find_row(connection, id_)
    return answer("json", [id_, row["received_at"]], lambda: find_body(connection, row))


def found_or_404(found, id_):
    """Return what was found of an error; abort with 404 if that is nothing."""
    if found is None:
        abort(404, f"There is no error {str(id_)[:20]}; /errors lists those there are.")
    return found


def find_row(connection, id_):
    """Return an error's row; abort with 404 if there is none."""
    return found_or_404(select_error(connection, id_) if id_ < 2**63 else None, id_)


def find_body(connection, row):
    """Return the body of a row's delivery (bytes); abort with 404 if it was deleted since the row was read."""
    return found_or_404(select_body(connection, row["id"]), row["id"])


def show(connection, row, form, refresh=None):
    """Reply with one error in full."""
    id_, url = row["id"], url_for("web.show_error", id_=row["id"], _external=True)
    renders = {
        "json": lambda: as_json(detail(row, find_body(connection, row))),
        "text": lambda: error_text(row, find_body(connection, row), url),
        "html": lambda: render_template(
            "detail.html", refresh=refresh, **error_page(connection, row)
        ),
    }
    return answer(
        form,
        [id_, row["received_at"], *(moving(connection) if form == "html" else [])],
        renders[form],
    )


def error_page(connection, row):
    """Return what the page of an error shows."""
    found = parse_detail(load(find_body(connection, row)))
    newer, older = select_neighbours(connection, row["id"])
    siblings = select_errors(connection, {"issue": row["issue_id"]}, 11) if row["issue_id"] else []
    chain = found["exceptions"][::-1]  # the one that gave the title first, then what caused it
    if found["stacktrace"] and not any(exception["frames"] for exception in chain):
        chain = [{**(chain[0] if chain else {}), "frames": found["stacktrace"]}, *chain[1:]]
    return {
        "error": summary(row)
        | {key: found[key] for key in ("tags", "actor", "request", "breadcrumbs")},
        "chain": chain,
        "marked": any(frame["in_app"] for exception in chain for frame in exception["frames"]),
        "newer": newer,
        "older": older,
        "siblings": [summary(other) for other in siblings if other["id"] != row["id"]],
    }


@web.get("/errors")
def list_errors():
    """List errors: a page of summaries or, as NDJSON, all of them in full."""
    form = choose_form("json", "html", "text", "ndjson")
    query = read_query(*FILTERS, "limit", "before", "after", "format", "refresh")
    limit, refresh = read_number(query, "limit", 1, 1000), read_number(query, "refresh", 5, 3600)
    connection, filters = collector().database.connection(), read_filters(query)
    filters, oldest_first = narrow(connection, filters), "after" in filters
    if form == "ndjson":
        # What is in a period changes by the clock alone.
        state = [now()] if "since" in filters or "until" in filters else select_extent(connection)
        return answer(form, state, lambda: export(collector(), filters, limit))
    limit = limit or (50 if form == "html" else 100)
    rows = select_errors(connection, filters, limit + 1, oldest_first)
    rows, more = rows[:limit], len(rows) > limit
    next_page = (
        page_url(query, **{"after" if oldest_first else "before": rows[-1]["id"]}) if more else None
    )
    renders = {
        "json": lambda: as_json([summary(row) for row in rows]),
        "text": lambda: errors_text(rows, next_page),
        "html": lambda: render_template(
            "list.html", refresh=refresh, **list_page(connection, query, filters, rows, more)
        ),
    }
    state = [
        [[row["id"], row["received_at"]] for row in rows],
        more,
        *(moving(connection) if form == "html" else []),
    ]
    return answer(form, state, renders[form], more and f'<{next_page}>; rel="next"')


def page_url(query, **changes):
    """Return the URL of /errors for a query with changes, None taking a parameter out."""
    return url_for("web.list_errors", _external=True, **(query | changes))


def list_page(connection, query, filters, rows, more):
    """Return what the page of a list shows; its chart and counts are of the newest 10,000 errors that match."""
    oldest_first, query_ = (
        "after" in filters,
        {key: query[key] for key in query if key not in ("before", "after")},
    )
    rows = rows[::-1] if oldest_first else rows
    wide = {key: value for key, value in filters.items() if key not in ("before", "after")}
    seen = select_errors(connection, wide, 10_000, columns=("received_at", "project_slug", "level"))
    has_newer, has_older = (more, True) if oldest_first else ("before" in filters, more)
    counts = {
        name: Counter(row[FACETS[name]] for row in seen if row[FACETS[name]])
        for name in ("project", "level")
    }
    return {
        "errors": [summary(row) for row in rows],
        "query": query,
        "filtered": bool(wide),
        "newer": page_url(query_, after=rows[0]["id"]) if rows and has_newer else None,
        "older": page_url(query_, before=rows[-1]["id"]) if rows and has_older else None,
        "chart": chart([row["received_at"] for row in seen]),
        "seen": len(seen),
        "facets": {
            name: [
                (value, count, page_url(query_, **{name: value}))
                for value, count in found.most_common(8)
            ]
            for name, found in counts.items()
        },
        "page_url": page_url,
    }


def export(shared, filters, limit):
    """Yield errors in full, a line each, in reads so short that they stand in nobody's way."""
    lines, oldest_first, left = [], "after" in filters, limit or 2**63 - 1
    while left > 0:
        connection = shared.database.connection()
        rows = select_errors(connection, filters, min(left, 100), oldest_first)
        for row in rows:
            body = select_body(connection, row["id"])
            if body is not None:  # deleted meanwhile
                lines.append(as_json(detail(row, body)))
            if sum(map(len, lines)) > 65536:
                part, body = "".join(lines), None  # to keep little while the client takes it
                lines.clear()
                yield part
                del part
        left = left - len(rows) if len(rows) == 100 else 0
        filters = filters | (
            {"after" if oldest_first else "before": rows[-1]["id"]} if rows else {}
        )
    yield "".join(lines)


def describe_state():
    """Return what the database and the spool hold; of a database that cannot be read, why."""
    shared = collector()
    state = {"counts": {"errors": None, "spooled": len(shared.spool.names())}}
    state |= {"newest": None, "last_delivery_at": None, "deliveries": [], "problem": None}
    try:
        connection = shared.database.connection()
        state["counts"]["errors"] = count_errors(connection)
        state["newest"] = next(map(summary, select_errors(connection, {}, 1)), None)
        state["deliveries"] = select_deliveries(connection)
        state["last_delivery_at"] = max(
            (row["last_at"] for row in state["deliveries"]), default=None
        )
    except (sqlite3.Error, OSError) as error:
        shared.database.drop_connection()
        state["problem"] = f"The database cannot be read: {error}."
    return state


def describe_config():
    """Return the settings without secrets, and what was found out about the machine."""
    shared = collector()
    secret, plain_ = ("SENTRY_DSN", "SENTRY_CLIENT_SECRET", "API_TOKEN"), dict(shared.settings)
    is_set = {f"{name.lower()}_set": bool(plain_.pop(name)) for name in secret}
    found = {
        "database_path": str(plain_.pop("DATABASE_URL")),
        "journal_mode": shared.database.journal_mode,
    }
    found |= {"sqlite_version": sqlite3.sqlite_version, "version": VERSION}
    return is_set | {name.lower(): value for name, value in plain_.items()} | found


ABOUT = {
    "name": "Sentry Error Collector",
    "version": VERSION,
    "description": "Receives Sentry's webhooks, keeps every new error, and gives the latest one back.",
    "endpoints": {
        "POST /sentry/webhook": "where Sentry delivers",
        "GET /errors/latest": f"the newest error, in full; {', '.join(FILTERS)}; format=json|html|text",
        "GET /errors/<id>": "one error, in full; format=json|html|text",
        "GET /errors/<id>/payload": "the delivery as it was received, byte for byte",
        "GET /errors": "summaries, newest first; filters as above, limit, before, after; format= also ndjson, in full",
        "GET /": "this overview",
        "GET /config": "the configuration, without secrets",
        "GET /health": "200 if a row can be committed, else 503",
    },
}
STEPS = (
    "In Sentry: Settings > Developer Settings > Create New Integration > Internal Integration; this as Webhook URL; "
    "permission Issue & Event: Read; webhooks: error (Business plan and above) or issue. For stack traces on every "
    "plan: Alert Rule Action on, the integration as an action of an alert rule, SENTRY_ACTIONS=created,triggered here. "
    "Then its Client Secret as SENTRY_CLIENT_SECRET here."
)


@web.get("/")
def show_overview():
    """Show what this service is and what it holds."""
    form, state = choose_form("json", "html"), describe_state()
    about = ABOUT | state
    about |= {
        "connect": {"webhook_url": url_for("web.receive_webhook", _external=True), "steps": STEPS}
    }
    if form == "html":
        page = {**about, "config": describe_config()}
        return answer(
            form, [state, int(time.time() // 60)], lambda: render_template("overview.html", **page)
        )
    return answer(form, [about], lambda: as_json(about))


@web.get("/config")
def show_config():
    """Show the configuration, no secret in it, and how deliveries fare."""
    state = describe_state()
    fare = {name: state[name] for name in ("last_delivery_at", "deliveries", "problem")}
    config = describe_config() | {"spooled": state["counts"]["spooled"]} | fare
    return answer("json", [config], lambda: as_json(config))


@web.get("/health")
def show_health():
    """Say whether an error that comes in now would be committed."""
    try:
        check_writable(collector().database)
    except (sqlite3.Error, OSError) as error:
        waiting = len(collector().spool.names())
        abort(
            503,
            f"The database cannot be written: {error}; free its lock or disk. {waiting} deliveries are spooled.",
        )
    response = Response(as_json({"status": "ok"}), mimetype=FORMS["json"])
    response.call_on_close(collector().keep_house)
    return response


def reply_with_error(status, words, headers=()):
    """Reply with the one error shape, or with a page of the same words to browsers."""
    types = [FORMS["json"], FORMS["html"]]
    headers = [*headers, *([("Retry-After", RETRY_AFTER)] if status == 503 else [])]
    if (
        request.args.get("format") not in ("json", "text", "ndjson")
        and request.accept_mimetypes.best_match(types) == FORMS["html"]
    ):
        page = render_template("error.html", status=status, words=words)
        return Response(page, status, headers, mimetype=FORMS["html"])
    # 1,024 bytes are what Sentry keeps of a refusal, for the integration's owner to read.
    while len(as_json({"error": words})) > 1024:
        words = cut(words, len(words) * 7 // 8)
    return Response(as_json({"error": words}), status, headers, mimetype=FORMS["json"])


def handle_http_error(error):
    """Reply to what a route aborted with, or Flask itself."""
    if (error.code or 0) < 400:
        return error
    own = error.description != type(error).description
    words = (
        error.description
        if own
        else f"{error.name} for {request.method} of this page; / lists what there is."
    )
    headers = [item for item in error.get_headers() if item[0] == "Allow"]
    challenge = [("WWW-Authenticate", 'Basic realm="Sentry Error Collector", charset="UTF-8"')]
    return reply_with_error(error.code, words, headers + (challenge if error.code == 401 else []))


def handle_refusal(refused):
    """Reply to a delivery that is not taken."""
    return reply_with_error(refused.status, refused.words)


def handle_failure(error):
    """Reply to a read that the database, its disk or the memory failed."""
    collector().note("cannot read", error)
    collector().database.drop_connection()
    return reply_with_error(503, f"The database cannot be read: {error}; try again.")


def handle_fault(error):
    """Reply to a fault of our own."""
    log.error("fault in %s %s", request.method, HIDDEN.sub("?", request.path)[:100], exc_info=error)
    collector().report(error)
    return reply_with_error(500, "A fault of the collector's own; its log says more.")


def add_headers(response):
    """Add what keeps hostile text harmless in a browser, and replies out of shared caches."""
    response.headers.extend(current_app.config["HEADERS"])
    return response


@web.cli.command("backup")
@click.argument("file", type=click.Path(exists=False, dir_okay=False, path_type=Path))
def backup_command(file):
    """Copy the database to a new FILE while the service runs."""
    if file.exists():
        raise click.ClickException(f"{file} exists; name a new file.")
    try:
        backup(
            collector().database.path,
            file,
            lambda share: click.echo(f"\r{share:4.0%}", nl=False, err=True),
        )
        with closing(sqlite3.connect(file)) as copy:
            click.echo(
                f"\r{file}: {count_errors(copy)} errors, {file.stat().st_size} bytes", err=True
            )
    except (sqlite3.Error, OSError) as error:
        raise click.ClickException(f"cannot copy to {file}: {error}") from None


# --------------------------------------------------------------------------------------------------
# Wiring: the settings, and the app made of them
# --------------------------------------------------------------------------------------------------

DEFAULTS = {
    "DATABASE_URL": "sqlite:///./data/errors.db",
    "SENTRY_DSN": "",
    "SENTRY_CLIENT_SECRET": "",
    "SENTRY_ACTIONS": "created",
    "API_TOKEN": "",
    "RETENTION_DAYS": "",
    "MAX_BODY_BYTES": str(5 * 1024 * 1024),
    "WEB_CONCURRENCY": "2",
    "PORT": "8000",
}
STAMP = [VERSION, Path(__file__).stat().st_mtime_ns]  # other code makes other replies
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


def fail(name, fault, example):
    """End the start with one line about a setting."""
    raise SystemExit(f"{name}: {fault}; for example {name}={example}")


def whole_number(settings, name, least, most):
    """Return a setting as a number; end the start if it is none or out of bounds."""
    value = settings[name].strip()
    if not re.fullmatch(r"[0-9]{1,12}", value) or not least <= int(value) <= most:
        fail(
            name,
            f"{ascii(value[:40])} is no whole number from {least} to {most}",
            DEFAULTS[name] or 30,
        )
    return int(value)


def database_path(url):
    """Return the path in a DATABASE_URL; end the start if there is none."""
    found = re.fullmatch(r"sqlite(?:\+aiosqlite)?:///([^?#]+)", url.strip())
    if not found or found[1] == ":memory:":
        scheme = ascii(url.split(":")[0][:40])  # the rest of a foreign URL may hold a password
        fail(
            "DATABASE_URL",
            f"it must name a file as sqlite:///PATH, its scheme is {scheme}",
            DEFAULTS["DATABASE_URL"],
        )
    return Path(found[1]).absolute()


def read_settings(config=None):
    """Return the settings, checked, of `config`, the environment, .env and the defaults, the first that has one.

    An empty value is an unset one. Raises SystemExit with one line about the first that is bad.
    """
    settings = dict(DEFAULTS)
    for source in (dotenv_values(".env"), os.environ, config or {}):
        settings |= {
            name: str(source[name]) for name in DEFAULTS if str(source.get(name) or "").strip()
        }
    secrets = [part for part in re.split(r"\s*,\s*", settings["SENTRY_CLIENT_SECRET"]) if part]
    if settings["SENTRY_CLIENT_SECRET"] and not secrets:
        fail("SENTRY_CLIENT_SECRET", "there is no secret between its commas", "0123abcd,4567ef89")
    actions = [
        action for action in re.split(r"\s*,\s*", settings["SENTRY_ACTIONS"].strip()) if action
    ]
    if not actions or not all(re.fullmatch(r"[a-z_]+", action) for action in actions):
        fail(
            "SENTRY_ACTIONS",
            "it must be actions of Sentry's, separated by commas",
            "created,triggered",
        )
    return {
        "DATABASE_URL": database_path(settings["DATABASE_URL"]),
        "SENTRY_DSN": settings["SENTRY_DSN"].strip(),
        # Its ends are not stripped: what was typed is the secret, and a refusal says what may be wrong with it.
        "SENTRY_CLIENT_SECRET": secrets,
        "SENTRY_ACTIONS": actions,
        "API_TOKEN": settings["API_TOKEN"].strip(),
        "RETENTION_DAYS": whole_number(settings, "RETENTION_DAYS", 1, 36500)
        if settings["RETENTION_DAYS"]
        else None,
        "MAX_BODY_BYTES": whole_number(settings, "MAX_BODY_BYTES", 1, 512 * 1024 * 1024),
        "WEB_CONCURRENCY": whole_number(settings, "WEB_CONCURRENCY", 1, 256),
        "PORT": whole_number(settings, "PORT", 1, 65535),
    }


def check_folder(path):
    """Make the folders of the database and the spool; end the start if they cannot be written."""
    folder = path.parent
    try:
        (folder / "spool").mkdir(parents=True, exist_ok=True)
        for probe in (folder / f".probe-{os.getpid()}", folder / "spool" / f".probe-{os.getpid()}"):
            probe.touch()
            probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        whose = (
            f" owned by uid {folder.stat().st_uid}, this is uid {os.getuid()}"
            if folder.exists()
            else ""
        )
        fault = f"cannot write in {folder}{whose} ({error.strerror or error}); chown it, or name another"
        fail("DATABASE_URL", fault, DEFAULTS["DATABASE_URL"])


def start_reports(dsn):
    """Return a function that reports an exception to Sentry, once a minute at most."""
    import sentry_sdk  # here, because it costs a worker 10 MB and most run without

    kept, last = ("event_id", "timestamp", "platform", "level", "exception", "release"), [-math.inf]

    def scrub(event, hint):
        # Neither a webhook's content nor a secret may leave: of an exception only what SQLite or the system say of it.
        for value in event.get("exception", {}).get("values", ()):
            value["value"] = (
                value["value"] if isinstance(hint["exc_info"][1], sqlite3.Error | OSError) else ""
            )
        return {key: event[key] for key in kept if key in event}

    def report(error):
        if (
            time.monotonic() - last[0] > 60
        ):  # a report may come back as a webhook, which may fail again
            last[0] = time.monotonic()
            sentry_sdk.capture_exception(error)

    options = {
        "default_integrations": False,
        "auto_enabling_integrations": False,
        "send_client_reports": False,
    }
    options |= {
        "include_local_variables": False,
        "include_source_context": False,
        "max_breadcrumbs": 0,
    }
    try:
        sentry_sdk.init(dsn, release=VERSION, before_send=scrub, **options)
    except (sentry_sdk.utils.BadDsn, ValueError):
        fail("SENTRY_DSN", "it is no DSN of Sentry's", "https://key@o0.ingest.sentry.io/0")
    return report


def start_log():
    """Write the log to standard error, in the form of gunicorn's."""
    if not log.handlers:
        form = logging.Formatter(
            "[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s", "%Y-%m-%d %H:%M:%S %z"
        )
        log.addHandler(logging.StreamHandler())
        log.handlers[0].setFormatter(form)
        log.setLevel(logging.INFO)
        log.propagate = False


def describe_start(shared):
    """Return what is on and what is off, in one line."""
    settings = shared.settings
    secrets, days = settings["SENTRY_CLIENT_SECRET"], settings["RETENTION_DAYS"]
    return "; ".join(
        (
            f"collector {VERSION}",
            "signature check " + ("on" if secrets else "OFF, anybody can post"),
            "read token " + ("on" if settings["API_TOKEN"] else "OFF, anybody can read"),
            "Sentry reports " + ("on" if settings["SENTRY_DSN"] else "off"),
            "actions " + ",".join(settings["SENTRY_ACTIONS"]),
            f"journal mode {shared.database.journal_mode}",
            f"retention {f'{days} days' if days else 'off'}",
            *(
                ["SENTRY_CLIENT_SECRET has white space at its ends"]
                if secrets != [item.strip() for item in secrets]
                else []
            ),
        )
    )


def create_app(config=None):
    """Return the app, its settings from `config` or the environment (see read_settings), its database made."""
    settings = read_settings(config)
    check_folder(settings["DATABASE_URL"])
    return make_app(settings)


def make_app(settings):
    """Return the app of settings that were read and checked, its database made."""
    start_log()
    app = Flask(__name__, static_folder=None)
    app.url_map.merge_slashes = False  # it would redirect, which Sentry takes for success
    shared = app.extensions["collector"] = Collector(settings)
    if settings["SENTRY_DSN"]:
        shared.report = start_reports(settings["SENTRY_DSN"])
    style = Path(app.root_path, "templates", "style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    app.config["HEADERS"] = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY.format(digest),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "private, no-cache",
        "Vary": "Accept, Authorization",
    }
    app.jinja_env.globals.update(style=Markup(style), version=VERSION)
    app.jinja_env.filters.update({function.__name__: function for function in PAGE_FILTERS})
    app.register_blueprint(web)
    app.after_request(add_headers)
    app.register_error_handler(HTTPException, handle_http_error)
    app.register_error_handler(Refused, handle_refusal)
    for kind in (sqlite3.Error, OSError, MemoryError):
        app.register_error_handler(kind, handle_failure)
    app.register_error_handler(Exception, handle_fault)
    log.info(describe_start(shared))
    try:
        shared.database.connection()
        shared.keep_house()
    except (sqlite3.Error, OSError) as error:  # no reason not to start: deliveries are spooled
        log.error("the database cannot be used, deliveries will be spooled: %s", error)
    shared.database.close()  # nothing open may be carried across a fork
    return app
