"""Receive Sentry's webhooks, keep every new error, and give the latest one back."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(f"The collector needs Python 3.11 or newer, this is {sys.version.split()[0]}.")

import base64
import codecs
import errno
import fcntl
import gc
import hashlib
import hmac
import http.client
import json
import logging
import math
import os
import re
import sqlite3
import string
import threading
import time
import unicodedata
import uuid
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

import click
from dotenv import dotenv_values
from flask import Blueprint, Flask, Response, current_app, g, render_template, request
from markupsafe import Markup, escape
from werkzeug.exceptions import HTTPException, abort
from werkzeug.sansio.utils import host_is_trusted

VERSION = "2.0.0"
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
    r"authori[sz]ation|cookie|passw|passphrase|passcode|pwd|secret|token|credential|sess(?:ion|id)"
    r"|[cx]srf|dsn$|shared[-_. ]?access|[-_. ]signature$|card[-_. ]?number"
    r"|(?:api|auth|access|private|signing|encryption|ssh|subscription|functions?|master|account"
    r"|storage|service|license|hmac|rsa)[-_. ]?key"
    r"|(?<![a-z])(?:dsn|jwt|bearer|pw(?![a-z])|(?:pass|o?auth|creds|sid|sig|t?otp|cvv)$)",
    re.IGNORECASE,
)
# The names of numbers that are counts, such as max_tokens, and no secrets.
COUNT_NAME = re.compile(r"tokens$|max|count|total|limit|duration|length", re.IGNORECASE)
# The names of values that are URLs, queries or forms, which may have secrets as parameters.
LINK_NAME = re.compile(
    r"(?:ur[il]|query|query[-_]?string|referr?er|location|body|form)$", re.IGNORECASE
)
# The password in a URL: what is before it, and it.
URL_PASSWORD = re.compile(r"(://[^/?#\s:@]*:)[^/?#\s@]+(?=@)")
LINK_STARTS = "http://", "https://", "/", "?"  # beginnings of other values that may be URLs
# A parameter of a query or a form, and a member of an object in JSON or Python's form, which may be
# broken: up to the value, the name in it.
PARAMETER = re.compile(r"(?<![^?&;#])((?P<name>[^?&;#=]{1,200})=)[^&;#]*")
MEMBER = re.compile(
    r"""((["'])(?P<name>[^"'\\]{1,200})\2\s*:\s*)"""
    r"""(?:"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[^,}\]\s]+)"""
)


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


@contextmanager
def uncollected():
    """Run the block without Python's cyclic garbage collector, which slows decoding."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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
        with uncollected():
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
        with uncollected():
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
    if not name.islower():
        name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # dbPass
    return SECRET_NAME.search(name) is not None


def is_count(name, value):
    """Return True for a number that is no secret in spite of its name, and for a boolean."""
    if isinstance(value, int | float) and COUNT_NAME.search(name):
        return True
    return isinstance(value, bool)


def mask(match):
    """Return a match of PARAMETER or MEMBER, without its value if that is a secret."""
    return match[1] + MASK if is_secret(match["name"]) else match[0]


def mask_query(value):
    """Return a query or a URL without its password and the values of secret parameters."""
    return value and PARAMETER.sub(mask, URL_PASSWORD.sub(rf"\1{MASK}", value))


def mask_value(name, value):
    """Return a plain value of this name without secrets."""
    if is_secret(name) and not is_count(name, value):
        return MASK
    if not isinstance(value, str):
        return value
    if value.startswith(("{", "[")):
        return MEMBER.sub(mask, value)
    if LINK_NAME.search(name) or value.startswith(LINK_STARTS):
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
    label = first((copy.get("name"), copy.get("key")))
    if "value" in copy and isinstance(label, str) and is_secret(label):
        copy["value"] = MASK
    if len(value) > kept:
        copy[REST] = rest(len(value) - kept)
    return copy


def plain_list(value, depth, room):
    """Return a plain copy of a list, of its first ITEMS values at most."""
    kept = take_room(room, "values", min(len(value), ITEMS))
    copy = [plain(item, depth, room) for item in value[:kept]]
    if len(value) % 2 == 0:  # perhaps names, each with its value after it
        for index in range(1, kept, 2):
            name = value[index - 1]
            is_name = isinstance(name, str) and re.fullmatch(r"[\w. \[\]-]{1,200}", name)
            if is_name and is_secret(name):
                copy[index] = MASK
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

    They are sent as pairs, as objects with `key` or `name` and `value`, or as one object.
    """
    if isinstance(value, dict):
        items = islice(value.items(), limit)
    else:
        value = as_list(value)
        items = value[:limit]
    room = new_room()
    pairs = []
    for item in items:
        pair = item
        if isinstance(item, dict):
            pair = (first((item.get("key"), item.get("name"))), item.get("value"))
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


def parse_line(value, column=None):
    """Return a source line as clean text, which is empty for anything else than text.

    Of a long one the part around `column` stays, which then is in its middle.
    """
    is_long = isinstance(value, str) and len(value) > LINE_LENGTH
    if is_long and LINE_LENGTH // 2 < (column or 0) <= len(value):
        value = REST + value[column - LINE_LENGTH // 2 + 1 :]
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
    column = first((integer(get("colno")), integer(get("colNo"))))
    in_app = first((get("in_app"), get("inApp")))
    address = first((get("instruction_addr"), get("instructionAddr")))
    return {
        "filename": text(get("filename")),
        "abs_path": text(get("abs_path")) or text(get("absPath")),
        "module": text(get("module")),
        "function": text(get("function")),
        "lineno": number,
        "colno": column,
        "in_app": in_app if isinstance(in_app, bool) else None,
        "pre_context": parse_lines(lines.get("pre_context"), last=True),
        "context_line": parse_line(own_line, column) if isinstance(own_line, str) else None,
        "post_context": parse_lines(lines.get("post_context")),
        "package": text(get("package")),
        "instruction_addr": identifier(address),
        "vars": as_object(order_variables(get("vars"), own_line), room, VARIABLES),
    }


def order_variables(variables, line):
    """Return a frame's variables, of too many first those that its source line names."""
    if not isinstance(variables, dict) or len(variables) <= VARIABLES:
        return variables
    words = re.findall(r"\w+", text(line) or "")
    return {word: variables[word] for word in words if word in variables} | variables


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
    return join_pairs(read_pairs(headers, PAIRS), ", ") or None


def join_pairs(pairs, separator):
    """Return pairs of a name and a text as a dict without secrets, the texts of a name joined."""
    values = {}
    for name, value in pairs:
        shown = mask_value(name, value)
        if values.get(name) and shown:
            shown = cut(f"{values[name]}{separator}{shown}", COLUMN_LENGTH)
        values[name] = shown
    return values


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
    return MEMBER.sub(mask, text(data))


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


def parse_evidence(payload):
    """Return what Sentry shows of an occurrence, such as a slow query, as a dict of text."""
    occurrence = as_dict(find_error(payload)["event"].get("occurrence"))
    return join_pairs(read_pairs(occurrence.get("evidenceDisplay"), PAIRS), "; ")


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
        "tags": {name: mask_value(name, value) for name, value in parse_tags(event).items()},
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

# Columns of an error, in the order of the JSON keys.
COLUMNS = (
    "id received_at timestamp resource action event_id issue_id short_id title message culprit "
    "level status platform logger environment release project_id project_slug project_name "
    "exception_type exception_value permalink rule server category"
).split()
SCHEMA_VERSION = 2  # version of the database that this code reads and writes
WAIT_SECONDS = 0.5  # longest wait of a delivery for the turn and the database's lock together
PAUSE_SECONDS = 2  # time for which a worker leaves a database alone that it could not write
READ_SECONDS = 0.5  # longest time for the queries of one page, or of one part of an export
STEP_SECONDS = 0.05  # longest time of one step of maintenance
LOCAL_FILE_SYSTEMS = (
    "bcachefs btrfs ext2 ext3 ext4 f2fs jfs overlay ramfs reiserfs tmpfs xfs zfs".split()
)
LONG_WAL_PAGES = 4096  # pages of a WAL that is worth cutting
CHECKPOINT_TRANSACTIONS = 50  # transactions of a worker after which it moves the WAL into the file
SPOOL_BATCH = 50  # spooled deliveries that are stored in one transaction
SPOOL_BATCH_BYTES = 1024 * 1024  # bytes of their compressed bodies, after which a batch is full
SPOOL_LIMIT = 100_000  # deliveries in the spool
SPOOL_NEARLY_FULL = 0.9  # share of it from which on the log says so
SPOOL_FREE_BYTES = 64 * 1024 * 1024  # bytes of the disk that the spool leaves free
INDEX_BATCH = 200  # errors that are added to the search index in one transaction
DELETE_BATCH = 50  # expired errors that are deleted in one transaction
PAGE_CHARACTERS = 600_000  # most characters of a page, of which JSON makes up to twelve bytes each
DELIVERY_DAYS = 90  # days for which the counts of deliveries are kept apart by their time


def in_microseconds(when):
    """Return a time in UTC as ISO 8601 with microseconds, so that texts compare as times do."""
    return when.isoformat(timespec="microseconds").replace("+00:00", "Z")


def now(**ago):
    """Return the time as ISO 8601, or the time `ago`, as in now(days=2)."""
    return in_microseconds(datetime.now(UTC) - timedelta(**ago))


def choose_journal_mode(folder, mounts=Path("/proc/self/mountinfo")):
    """Return WAL for a folder on a local file system, else PERSIST: over a network WAL corrupts."""
    folder = os.fsencode(os.path.realpath(folder))
    longest = -1
    file_system = None
    try:
        lines = mounts.read_bytes().splitlines()
    except OSError:
        lines = []
    for line in lines:
        mount_fields, _, type_fields = line.partition(b" - ")
        escaped = mount_fields.split(b" ")[4]
        mount = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), escaped)
        is_above = os.path.commonpath((folder, mount)) == mount
        if is_above and len(mount) >= longest:
            longest = len(mount)
            file_system = type_fields.split(b" ")[0].decode()
    if file_system in LOCAL_FILE_SYSTEMS:
        return "WAL"
    return "PERSIST"


def busy_error(words):
    """Return the error that SQLite would raise for a lock that another process holds."""
    error = sqlite3.OperationalError(words)
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


def primary_code(error):
    """Return SQLite's code of an error, without what the extended codes add, or 0."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def is_busy(error):
    """Return True if an attempt failed only because another process holds a lock."""
    return primary_code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def is_interrupted(error):
    """Return True if a query was ended because it took too long."""
    return primary_code(error) == sqlite3.SQLITE_INTERRUPT


def read_steps():
    """Return the steps of schema.sql, SQL by version."""
    sql = Path(__file__).with_name("schema.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- Version ([0-9]+).*$", sql, flags=re.MULTILINE)
    return {int(version): step for version, step in zip(parts[1::2], parts[2::2], strict=True)}


class Database:
    """One SQLite file that several processes share, each with a connection, the writers in turn."""

    def __init__(self, path):
        self.path = path
        self.journal_mode = choose_journal_mode(path.parent)
        self.kept = None  # connection, opened on first use and so after the fork
        self.busy_timeout = None  # milliseconds for which it waits for the locks of others
        self.lock = None  # file that writers lock
        self.paused_until = -math.inf  # monotonic time
        self.trouble = None  # error that made the pause
        self.read_until = math.inf  # monotonic time at which the running query is ended
        self.transactions = 0  # transactions since the last checkpoint
        self.notify = lambda: None  # tells gunicorn that the worker is alive

    def connection(self):
        """Return the kept connection, its database at this code's version."""
        if self.kept is None:
            self.kept = self.open()
            self.busy_timeout = int(WAIT_SECONDS * 1000)
        return self.kept

    def reader(self):
        """Return the kept connection for reads, which end after READ_SECONDS from now."""
        connection = self.connection()
        self.read_until = time.monotonic() + READ_SECONDS
        return connection

    def open(self):
        """Return a new connection, after the steps that the database misses."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            connection.row_factory = sqlite3.Row
            connection.set_progress_handler(self.is_out_of_time, 10_000)
            self.read_until = math.inf
            self.prepare(connection)
            connection.execute("PRAGMA synchronous = FULL")
            # SQLite's own checkpoint would delay the reply to whoever comes next.
            connection.execute("PRAGMA wal_autocheckpoint = 0")
        except BaseException:
            connection.close()
            raise
        return connection

    def is_out_of_time(self):
        """Return True if the running query has had its time."""
        return time.monotonic() > self.read_until

    def prepare(self, connection):
        """Bring the database to this code's version and journal mode. Leaves a newer one alone."""
        version = self.version(connection)
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
        if version == SCHEMA_VERSION and mode.upper() == self.journal_mode:
            return
        try:
            with self.turn(time.monotonic() + WAIT_SECONDS):
                connection.execute(f"PRAGMA journal_mode = {self.journal_mode}")
                self.upgrade(connection)
        except sqlite3.OperationalError as error:
            if is_busy(error) and 0 < version < SCHEMA_VERSION:
                change = f"from version {version} to {SCHEMA_VERSION}"
                raise busy_error(
                    f"its schema is being changed {change}, or waits for that"
                ) from error
            raise

    def version(self, connection):
        """Return the version of the database. Raises sqlite3.DatabaseError for a newer one."""
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(
                f"it is of version {version}, made by a newer collector, and this one knows "
                f"{SCHEMA_VERSION}; run the newer collector, or move it and the files beside it "
                "away and restore a backup made before"
            )
        return version

    def upgrade(self, connection):
        """Apply the missing steps of the schema in one transaction. The caller has the turn."""
        version = self.version(connection)  # once more: another worker may have done it
        steps = [step for number, step in sorted(read_steps().items()) if number > version]
        if not steps:
            return
        if version:
            log.warning("changing the database from version %d to %d", version, SCHEMA_VERSION)
        started = time.monotonic()
        connection.create_function("server_of", 1, server_of, deterministic=True)
        connection.create_function("body_digest", 2, digest, deterministic=True)
        connection.create_function("body_category", 2, category_of, deterministic=True)
        script = "\n".join(steps)
        try:
            with alive(self.notify):
                connection.executescript(
                    f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {SCHEMA_VERSION}; COMMIT"
                )
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        if version:
            log.warning("changed the database in %.1f s", time.monotonic() - started)

    @contextmanager
    def turn(self, deadline):
        """Hold the lock that all writers of the collector take in the block.

        Waits for it until `deadline`.
        """
        if self.lock is None:
            # A file of its own: closing any other descriptor of the database drops SQLite's locks.
            self.lock = open(f"{self.path}.lock", "ab")
        while True:
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise busy_error("another process of the collector is writing") from None
            time.sleep(0.0003)
        try:
            yield
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    @contextmanager
    def transaction(self, seconds=None):
        """Run the block in a write transaction, in turn with all other writers, and commit it.

        Yields the connection. Raises sqlite3.Error or OSError if the database cannot be written
        within `seconds`, or WAIT_SECONDS. A worker that has waited for these in vain, or met
        another fault, leaves the database alone for PAUSE_SECONDS, so that deliveries are spooled
        at once.
        """
        if self.is_paused():
            raise self.trouble.with_traceback(None)
        is_patient = seconds is None
        deadline = time.monotonic() + (WAIT_SECONDS if is_patient else seconds)
        try:
            connection = self.connection()
            self.read_until = math.inf
            with self.turn(deadline):
                self.wait_for_locks(deadline - time.monotonic())
                connection.execute("BEGIN IMMEDIATE")
                yield connection
                connection.execute("COMMIT")
                self.transactions += 1
        except (sqlite3.Error, OSError) as error:
            if not is_busy(error):
                self.close_connection()
            if is_patient or not is_busy(error):
                self.pause(error)
            raise
        finally:
            if self.kept is not None:
                if self.kept.in_transaction:
                    self.kept.execute("ROLLBACK")
                # Reads wait as long as ever: even in WAL mode a checkpoint can make one wait.
                self.wait_for_locks(WAIT_SECONDS)

    def wait_for_locks(self, seconds):
        """Have SQLite wait for the locks of others for so long, in steps of 50 ms."""
        milliseconds = max(0, round(seconds * 20) * 50)
        if milliseconds != self.busy_timeout:  # to set it takes a twentieth of a webhook's time
            self.kept.execute(f"PRAGMA busy_timeout = {milliseconds}")
            self.busy_timeout = milliseconds

    def pause(self, error):
        """Leave the database alone for PAUSE_SECONDS because of an error."""
        self.paused_until = time.monotonic() + PAUSE_SECONDS
        self.trouble = error

    def is_paused(self):
        """Return True if this worker leaves the database alone for now."""
        return time.monotonic() < self.paused_until

    def checkpoint(self):
        """Move what the WAL holds into the database file, if there is enough of it."""
        if self.transactions < CHECKPOINT_TRANSACTIONS:
            return
        # In turn with the writers: SQLite before 3.51.3 may corrupt a WAL reset while written.
        with self.turn(time.monotonic()):
            connection = self.connection()
            moved = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            is_long = moved[1] > LONG_WAL_PAGES  # a long read of another program has let it grow
            if is_long and moved[1] == moved[2]:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self.transactions = 0

    def close_connection(self):
        """Close the kept connection. The next use opens one anew."""
        connection = self.kept
        self.kept = None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def close(self):
        """Close the connection and the lock file."""
        self.close_connection()
        if self.lock is not None:
            self.lock.close()
            self.lock = None


@contextmanager
def alive(notify):
    """Call `notify` once a second while the block runs, so that gunicorn does not end us."""
    is_over = threading.Event()

    def repeat():
        while not is_over.wait(1):
            notify()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def pack(body):
    """Return the columns of `bodies` for a body (bytes), to be made before the transaction."""
    packed = zlib.compress(body, 1)
    if len(packed) >= len(body):
        packed = body  # sqlar_uncompress takes a blob of the stated length for one not compressed
    return {"payload_bytes": len(body), "payload": packed}


def unpack(payload, payload_bytes):
    """Return the body (bytes) of the columns that pack made."""
    if len(payload) == payload_bytes:
        return payload
    return zlib.decompress(payload)


def digest(payload, payload_bytes):
    """Return what tells the body in the columns that pack made, damaged or not, from any other."""
    body = payload
    with suppress(zlib.error):
        body = unpack(payload, payload_bytes)
    return hashlib.sha256(body).hexdigest()[:32]


def category_of(payload, payload_bytes):
    """Return the category of the error in the columns that pack made, for the step to version 2."""
    try:
        return parse_error(load(unpack(payload, payload_bytes)), None, "")["category"]
    except Exception:  # a body that cannot be read must not keep the database from its change
        return "error"


# What a delivery says of the server and the project must not contradict what is known; what either
# side does not say matches.
SAME_PLACE = """
    coalesce(server = :server, TRUE)
    AND CASE
        WHEN project_id IS NOT NULL AND :project_id IS NOT NULL THEN project_id = :project_id
        ELSE coalesce(project_slug = :project_slug, TRUE)
    END
"""
# Columns that a stored error learns from later deliveries of it.
SCOPE = "server", "project_id", "project_slug", "project_name", "issue_id", "short_id"


def identity(row):
    """Return the SQL condition that finds the error of a delivery's row, if it is stored."""
    is_usual = row["action"] in (None, "created", "triggered")
    if is_usual and row["event_id"]:
        return f"event_id = :event_id AND {SAME_PLACE}"
    if is_usual and row["issue_id"]:
        return f"issue_id = :issue_id AND {SAME_PLACE}"
    return "digest = :digest"


def insert_error(connection, row):
    """Insert a row and its body unless the error is there.

    Returns its id, and True if it is new.
    `row` has the keys of COLUMNS but for the id, and those of pack. The caller's transaction makes
    looking and inserting one step.
    """
    condition = identity(row)
    row = row | {"digest": None}
    if condition.startswith("digest"):
        row["digest"] = digest(row["payload"], row["payload_bytes"])
    names = ", ".join(("id", *SCOPE))
    order = "ORDER BY id" if condition.startswith("event_id") else ""  # an issue may have many
    sql = f"SELECT {names} FROM errors WHERE {condition} {order} LIMIT 1"
    stored = connection.execute(sql, row).fetchone()
    if stored is None:
        return insert_row(connection, row | {"id": None}), True
    learn_scope(connection, stored, row)
    return stored["id"], False


def insert_row(connection, row):
    """Insert a row and its body as they are. Returns the error's id."""
    id_ = connection.execute(INSERT_ERROR, row).lastrowid
    connection.execute(
        "INSERT INTO bodies VALUES (?, ?, ?)", (id_, row["payload_bytes"], row["payload"])
    )
    return id_


INSERT_ERROR = "INSERT INTO errors ({}, digest) VALUES ({}, :digest)".format(
    ", ".join(COLUMNS), ", ".join(f":{name}" for name in COLUMNS)
)


def learn_scope(connection, stored, row):
    """Add to a stored error what a later delivery of it says of the server and the project.

    The row is inserted anew under its id, so that the triggers and the search index follow.
    """
    learnt = {name: row[name] for name in SCOPE if stored[name] is None and row[name] is not None}
    if not learnt:
        return
    id_ = stored["id"]
    sql = "SELECT * FROM errors JOIN bodies USING (id) WHERE id = ?"
    whole = dict(connection.execute(sql, (id_,)).fetchone())
    delete_errors(connection, [id_])
    insert_row(connection, whole | learnt)
    if id_ <= indexed_to(connection):
        index_rows(connection, [whole | learnt])


def delete_errors(connection, ids):
    """Delete errors with their bodies and what the search index holds of them."""
    marks = ", ".join("?" * len(ids))
    sql = f"SELECT * FROM errors WHERE id IN ({marks}) AND id <= ?"
    for row in connection.execute(sql, (*ids, indexed_to(connection))).fetchall():
        connection.execute(UNINDEX, (row["id"], *search_texts(row)))
    connection.execute(f"DELETE FROM errors WHERE id IN ({marks})", ids)


def select_error(connection, id_):
    """Return an error's row, or None."""
    sql = f"SELECT {', '.join(COLUMNS)} FROM errors WHERE id = ?"
    return connection.execute(sql, (id_,)).fetchone()


def select_body(connection, id_):
    """Return the body of a stored delivery as it was received (bytes), or None."""
    sql = "SELECT payload, payload_bytes FROM bodies WHERE id = ?"
    row = connection.execute(sql, (id_,)).fetchone()
    if row is None:
        return None
    return unpack(row["payload"], row["payload_bytes"])


# The search index

# Filters of the query string, each with the columns it is compared with.
FACETS = {
    "project": ("project_slug", "project_id"),
    "level": ("level",),
    "environment": ("environment",),
    "platform": ("platform",),
    "release": ("release",),
    "category": ("category",),
    "server": ("server",),
    "issue": ("issue_id",),
}
SEARCHED = "title message culprit exception_type exception_value".split()
# Chinese, Japanese and Korean text has no spaces between words, so each of its characters is one.
CJK = re.compile(
    "([\u1100-\u11ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\U00020000-\U0003ffff])"
)
SEARCH_COLUMNS = ", ".join((*SEARCHED, "facets"))
INDEX = f"INSERT INTO errors_search (rowid, {SEARCH_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
UNINDEX = (
    f"INSERT INTO errors_search (errors_search, rowid, {SEARCH_COLUMNS}) "
    "VALUES ('delete', ?, ?, ?, ?, ?, ?, ?)"
)


def spaced(value):
    """Return text with each Chinese, Japanese or Korean character as a word of its own."""
    if value is None or value.isascii():
        return value
    return CJK.sub(r" \1 ", value)


def facet(name, value):
    """Return a value to filter by as one word, which no searched word can be."""
    return f"\ue000{name}{value.encode().hex()}"


def search_texts(row):
    """Return the texts of the search index for an error, in the order of SEARCH_COLUMNS.

    The index can forget only what it was given. To change this, fill it anew by a schema step.
    """
    facets = []
    for name, columns in FACETS.items():
        for column in columns:
            if row[column]:
                facets.append(facet(name, row[column]))
    return [*(spaced(row[column]) for column in SEARCHED), " ".join(facets)]


def indexed_to(connection):
    """Return the id up to which errors are in the search index."""
    return connection.execute("SELECT indexed_to FROM search_progress").fetchone()[0]


def index_rows(connection, rows):
    """Add errors to the search index."""
    connection.executemany(INDEX, [(row["id"], *search_texts(row)) for row in rows])


def count_unindexed(connection):
    """Return how many errors may be missing in the search index."""
    sql = """SELECT coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'errors'), 0)
        - indexed_to FROM search_progress"""
    return connection.execute(sql).fetchone()[0]


def extend_index(database, seconds=STEP_SECONDS):
    """Add a batch of errors to the search index. Returns True if more are missing."""
    if not count_unindexed(database.connection()):
        return False
    with database.transaction(seconds) as connection:
        sql = "SELECT * FROM errors WHERE id > ? ORDER BY id LIMIT ?"
        rows = connection.execute(sql, (indexed_to(connection), INDEX_BATCH)).fetchall()
        index_rows(connection, rows)
        is_whole = len(rows) < INDEX_BATCH
        newest = "(SELECT seq FROM sqlite_sequence WHERE name = 'errors')" if is_whole else "?"
        last = [] if is_whole else [rows[-1]["id"]]
        connection.execute(f"UPDATE search_progress SET indexed_to = {newest}", last)
    return not is_whole


def complete_index(database):
    """Add what the search index misses. Raises IndexIncomplete if that takes too long."""
    until = time.monotonic() + READ_SECONDS
    try:
        while extend_index(database):
            if time.monotonic() > until:
                missing = count_unindexed(database.connection())
                raise IndexIncomplete(missing)
    except (sqlite3.Error, OSError) as error:
        # While nothing can be written, only the errors of the last moment are missing, unless the
        # index is being filled.
        log.warning("the search index cannot be extended: %s", error)
        missing = count_unindexed(database.connection())
        if missing > INDEX_BATCH:
            raise IndexIncomplete(missing) from None


class IndexIncomplete(Exception):
    """A search has to wait, since the index is being filled.

    It has the number of missing errors.
    """

    def __init__(self, missing):
        super().__init__(
            f"The search index is being filled, {missing} errors are missing; try again soon."
        )


# Reading


def words_of(query):
    """Return the words of a search, each Chinese, Japanese or Korean character one."""
    return re.findall(r"[^\W_]+", spaced(query))


def match_expression(filters):
    """Return the FTS5 query for the facets and the words of `filters`, or None without any.

    Any text is a safe query. What a word of `q` is made of has to stand together, in its order.
    """
    terms = []
    for name in FACETS:
        if name in filters:
            values = filters[name].split(",") if name == "level" else [filters[name]]
            options = " OR ".join(f'"{facet(name, value)}"' for value in values)
            terms.append(f"facets : ({options})")
    phrases = []
    for word in filters.get("q", "").split():
        escaped = spaced(word).replace('"', '""')
        phrases.append(f'"{escaped}"')
    if phrases:
        terms.append("- facets : (" + " ".join(phrases) + "*)")  # the last word may be a beginning
    return " AND ".join(terms) or None


def narrow(connection, filters):
    """Return `filters` with what takes a look into the database.

    An issue's short id becomes its issue id and server; an event id and times become bounds of ids.
    """
    narrowed = dict(filters)
    if "issue" in filters:
        sql = """SELECT issue_id, server FROM errors WHERE short_id = :issue
            AND issue_id IS NOT NULL AND (:server IS NULL OR server = :server)
            ORDER BY id DESC LIMIT 1"""
        row = connection.execute(sql, {"server": None} | filters).fetchone()
        if row:
            narrowed["issue"] = row["issue_id"]
            if row["server"]:
                narrowed.setdefault("server", row["server"])
    if "event" in filters:
        sql = "SELECT min(id) AS first, max(id) AS last FROM errors WHERE event_id = :event"
        narrowed |= bounds(connection.execute(sql, filters).fetchone())
    elif "since" in filters or "until" in filters:
        period = {"since": filters.get("since", ""), "until": filters.get("until", "~")}
        sql = """SELECT 1000 * min(id) AS first, 1000 * max(id) + 999 AS last FROM blocks
            WHERE first_at <= :until AND last_at >= :since"""
        narrowed |= bounds(connection.execute(sql, period).fetchone())
    return narrowed


def bounds(row):
    """Return the filters for the ids from the first to the last of a row, or for no id."""
    if row["first"] is None:
        return {"from_id": 1, "to_id": 0}
    return {"from_id": row["first"], "to_id": row["last"]}


CONDITIONS = {  # of the filters, {id} being the id of the table that is walked
    "project": "(errors.project_slug = :project OR errors.project_id = :project)",
    "level": "instr(',' || :level || ',', ',' || errors.level || ',') > 0",
    "environment": "errors.environment = :environment",
    "platform": "errors.platform = :platform",
    "release": "errors.release = :release",
    "category": "errors.category = :category",
    "server": "errors.server = :server",
    "issue": "errors.issue_id = :issue",
    "event": "errors.event_id = :event",
    "since": "errors.received_at >= :since",
    "until": "errors.received_at <= :until",
    "from_id": "{id} >= :from_id",
    "to_id": "{id} <= :to_id",
    "before": "{id} < :before",
    "after": "{id} > :after",
}


def find_errors(connection, filters, columns, limit, oldest_first=False):
    """Return a cursor over `columns`, SQL expressions, of the errors that match, newest first.

    `filters` are those of the query string, after `narrow`; `before` and `after` are ids.
    """
    match = match_expression(filters)
    source = "errors"
    row_id = "errors.id"
    conditions = ["TRUE"]
    if match:
        source = "errors_search CROSS JOIN errors ON errors.id = errors_search.rowid"
        row_id = "errors_search.rowid"
        conditions = ["errors_search MATCH :match"]
    # A facet finds the row, the column is sure.
    conditions += [sql.format(id=row_id) for name, sql in CONDITIONS.items() if name in filters]
    order = "ASC" if oldest_first else "DESC"
    sql = f"""SELECT {", ".join(columns)} FROM {source} WHERE {" AND ".join(conditions)}
        ORDER BY {row_id} {order} LIMIT :limit"""
    return connection.execute(sql, filters | {"match": match, "limit": limit})


def select_errors(connection, filters, limit, oldest_first=False):
    """Return up to `limit` rows and True if there are more, newest first unless told otherwise.

    A page has at least a row, and ends where its text exceeds PAGE_CHARACTERS.
    """
    names = [f"errors.{name}" for name in COLUMNS]
    return take_page(find_errors(connection, filters, names, limit + 1, oldest_first), limit)


def take_page(cursor, limit):
    """Return up to `limit` rows of a cursor, and True if it has more."""
    rows = []
    room = PAGE_CHARACTERS
    with closing(cursor):
        for row in cursor:
            if len(rows) == limit or room < 0:
                return rows, True
            rows.append(row)
            room -= sum(len(value) for value in row if isinstance(value, str))
    return rows, False


def select_overview(connection, filters, limit):
    """Return what the chart and the facets need of the newest `limit` errors that match."""
    columns = (
        "errors.received_at",
        "substr(errors.project_slug, 1, 200) AS project",
        "substr(errors.level, 1, 200) AS level",
        "substr(errors.release, 1, 200) AS release",
        "substr(errors.environment, 1, 200) AS environment",
    )
    return find_errors(connection, filters, columns, limit).fetchall()


ISSUE_CONDITIONS = {
    "project": "(issues.project_slug = :project OR issues.project_id = :project)",
    "server": "issues.server = :server",
    "level": CONDITIONS["level"],
    "category": CONDITIONS["category"],
    "issue": "(issues.issue_id = :issue OR issues.short_id = :issue)",
    "event": "issues.newest IN (SELECT id FROM errors WHERE event_id = :event)",
    "since": "issues.last_seen >= :since",
    "until": "issues.last_seen <= :until",
    "before": "issues.newest < :before",
}


def select_issues(connection, filters, limit):
    """Return up to `limit` issues, and True if there are more, the most recently seen first.

    Title, culprit, level and category are those of the newest error, of which `before` is an id.
    """
    source = "issues JOIN errors ON errors.id = issues.newest"
    order = "issues.newest"
    conditions = ["TRUE"]
    match = match_expression({"q": filters.get("q", "")})
    if match:
        source = (
            "errors_search CROSS JOIN issues ON issues.newest = errors_search.rowid "
            "JOIN errors ON errors.id = issues.newest"
        )
        order = "errors_search.rowid"
        conditions = ["errors_search MATCH :match"]
    conditions += [sql for name, sql in ISSUE_CONDITIONS.items() if name in filters]
    sql = f"""SELECT issues.issue_id, issues.short_id, nullif(issues.server, '') AS server,
        issues.project_id, issues.project_slug, errors.title, errors.culprit, errors.level,
        errors.category, issues.count, issues.first_seen, issues.last_seen, issues.newest
        FROM {source} WHERE {" AND ".join(conditions)} ORDER BY {order} DESC LIMIT :limit"""
    cursor = connection.execute(sql, filters | {"match": match, "limit": limit + 1})
    return take_page(cursor, limit)


def select_occurrences(connection, row):
    """Return how often the issue of an error's row was seen here, or None without an issue.

    A dict of count, first_seen, last_seen, and releases, the newest 20 of its newest 1,000 errors.
    """
    if row["issue_id"] is None:
        return None
    key = {"issue_id": row["issue_id"], "server": row["server"]}
    sql = """SELECT count, first_seen, last_seen FROM issues
        WHERE issue_id = :issue_id AND server = coalesce(:server, '')"""
    counted = connection.execute(sql, key).fetchone()
    if counted is None:  # deleted since the row was read
        return None
    sql = """SELECT release FROM (SELECT received_at, release FROM errors
            WHERE issue_id = :issue_id AND server IS :server ORDER BY received_at DESC LIMIT 1000)
        WHERE release IS NOT NULL GROUP BY release ORDER BY max(received_at) DESC LIMIT 20"""
    releases = [release for (release,) in connection.execute(sql, key)]
    return dict(counted) | {"releases": releases}


def select_extent(connection):
    """Return what changes with every error that comes, goes or learns its project."""
    sql = """SELECT (SELECT min(id) FROM errors), (SELECT max(id) FROM errors), deletions
        FROM search_progress"""
    return list(connection.execute(sql).fetchone())


def count_errors(connection):
    """Return how many errors are stored."""
    return connection.execute("SELECT coalesce(sum(count), 0) FROM blocks").fetchone()[0]


def count_rows(connection):
    """Return how many errors a database of any version holds."""
    return connection.execute("SELECT count(*) FROM errors").fetchone()[0]


def database_bytes(connection):
    """Return the size of the database in bytes."""
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    return pages * connection.execute("PRAGMA page_size").fetchone()[0]


def check_writable(database):
    """Commit a row and prove that an error can be inserted.

    Raises sqlite3.Error or OSError otherwise.
    """
    at = now()
    row = dict.fromkeys(COLUMNS) | {"received_at": at, "timestamp": at, "digest": None}
    row |= {"event_id": "health", "issue_id": "health"} | pack(b"{}")
    with database.transaction() as connection:
        connection.execute("SAVEPOINT health")
        insert_row(connection, row)
        connection.execute("ROLLBACK TO health")
        sql = "INSERT INTO health VALUES (1, :at) ON CONFLICT DO UPDATE SET checked_at = :at"
        connection.execute(sql, {"at": at})


def delete_expired(database, days):
    """Delete some errors that were received more than `days` ago. Returns how many."""
    limit = now(days=days)
    sql = "SELECT id FROM blocks WHERE first_at < ? ORDER BY id LIMIT 1"
    if not database.reader().execute(sql, (limit,)).fetchone():
        return 0
    with database.transaction(STEP_SECONDS) as connection:
        block = connection.execute(sql, (limit,)).fetchone()
        if block is None:  # another worker was here
            return 0
        of_block = {"first": 1000 * block["id"], "limit": limit, "count": DELETE_BATCH}
        condition = "FROM errors WHERE id BETWEEN :first AND :first + 999"
        expired = f"SELECT id {condition} AND received_at < :limit LIMIT :count"
        ids = [id_ for (id_,) in connection.execute(expired, of_block)]
        delete_errors(connection, ids)
        if len(ids) < DELETE_BATCH:  # none is left, so nobody has to look at this block again
            oldest = f"(SELECT min(received_at) {condition})"
            redate = f"UPDATE blocks SET first_at = {oldest} WHERE id = :first / 1000"
            connection.execute(redate, of_block)
    return len(ids)


# Counts of deliveries


class Counts:
    """The deliveries by outcome and reason that this worker has not written yet."""

    def __init__(self):
        self.pending = {}  # (count, time of the last) by (period, outcome, reason)

    def add(self, outcome, reason=""):
        """Count a delivery. Outcome and reason are of a fixed few."""
        at = now()
        key = (period_of(at), outcome, reason)
        count, _ = self.pending.get(key, (0, at))
        self.pending[key] = (count + 1, at)

    def write(self, database):
        """Add the pending counts to the database, if there are any."""
        if not self.pending:
            return
        rows = [(*key, *value) for key, value in self.pending.items()]
        sql = """INSERT INTO deliveries VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
            count = count + excluded.count, last_at = max(last_at, excluded.last_at)"""
        with database.transaction(STEP_SECONDS) as connection:
            connection.executemany(sql, rows)
            add_up_old_counts(connection)
        self.pending.clear()


def period_of(at):
    """Return the ten minutes that an ISO 8601 time is in, as the beginning of its text."""
    return at[:15] + "0"


def select_deliveries(connection):
    """Return the counts of deliveries by outcome and reason, the latest first.

    `last_hour` counts the last 60 to 70 minutes, `today` the day in UTC, `count` all that are kept.
    """
    sql = """SELECT outcome, nullif(reason, '') AS reason,
        coalesce(sum(count) FILTER (WHERE period >= :hour), 0) AS last_hour,
        coalesce(sum(count) FILTER (WHERE period >= :day), 0) AS last_day,
        coalesce(sum(count) FILTER (WHERE period >= :today), 0) AS today,
        sum(count) AS count, max(last_at) AS last_at
        FROM deliveries GROUP BY 1, 2 ORDER BY last_at DESC"""
    starts = {"hour": now(hours=1), "day": now(days=1)}
    starts = {name: period_of(at) for name, at in starts.items()} | {"today": now()[:10]}
    return [dict(row) for row in connection.execute(sql, starts)]


def add_up_old_counts(connection):
    """Add up the counts of more than DELIVERY_DAYS ago, so that the sums never fall."""
    limit = (now(days=DELIVERY_DAYS),)
    sql = """INSERT INTO deliveries SELECT '', outcome, reason, sum(count), max(last_at)
        FROM deliveries WHERE period < ? GROUP BY outcome, reason
        ON CONFLICT DO UPDATE SET count = excluded.count, last_at = excluded.last_at"""
    connection.execute(sql, limit)
    connection.execute("DELETE FROM deliveries WHERE period BETWEEN '0' AND ?", limit)


# The spool


class Spool:
    """A folder of deliveries that the database could not take, files in order of receipt."""

    def __init__(self, folder):
        self.folder = folder
        self.waiting = deque()  # names that were listed and not moved yet
        self.unreadable = set()  # names of files that the disk does not give back
        self.count = 0  # files in the folder, as counted at counted_at
        self.counted_at = -math.inf  # monotonic time

    def put(self, received_at, resource, body):
        """Write a delivery to disk, synced. Raises OSError if that cannot be done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.check_room()
        head = json.dumps([received_at, resource, len(body), zlib.crc32(body)]).encode()
        part = self.folder / f"{time.time_ns():020}-{os.getpid()}.part"
        try:
            with open(part, "xb") as file:
                file.write(head + b"\n" + body)
                file.flush()
                os.fsync(file.fileno())
            part.rename(part.with_suffix(".delivery"))
        except OSError:
            part.unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        self.count += 1

    def check_room(self):
        """Raise OSError if the spool is full or the disk nearly is."""
        if time.monotonic() > self.counted_at + 1:
            self.counted_at = time.monotonic()
            self.count = len(self.names())
            if self.count > SPOOL_LIMIT * SPOOL_NEARLY_FULL:
                log.warning(
                    "the spool holds %d deliveries, its limit is %d", self.count, SPOOL_LIMIT
                )
        if self.count >= SPOOL_LIMIT:
            raise OSError(errno.ENOSPC, f"the spool is full, it holds {self.count} deliveries")
        if free_bytes(self.folder) < SPOOL_FREE_BYTES:
            raise OSError(errno.ENOSPC, "the disk has less than 64 MB left")

    def names(self):
        """Return the names of the files that wait, in order of receipt."""
        try:
            return sorted(name for name in os.listdir(self.folder) if name.endswith(".delivery"))
        except OSError:
            return []

    def move(self, database, read_row):
        """Move a batch of deliveries into the database.

        Returns True if more wait.
        `read_row` makes a row of a body, a resource and a time of receipt. A file is removed after
        the commit; should that fail, the database knows the delivery when it comes again.
        """
        if not self.waiting:
            # Listed once for all that wait, because there may be many thousands of them.
            self.waiting.extend(name for name in self.names() if name not in self.unreadable)
        if not self.waiting:
            return False
        with self.alone() as is_alone:
            if not is_alone:  # another worker moves them
                self.waiting.clear()
                return False
            batch = self.read_batch(read_row)
            with database.transaction(STEP_SECONDS) as connection:
                for name, row in batch.items():
                    self.insert(connection, name, row)
            for name in batch:
                (self.folder / name).unlink(missing_ok=True)
        for name in batch:
            self.waiting.remove(name)
        if batch:
            log.info("moved %d spooled deliveries into the database", len(batch))
        return bool(self.waiting)

    @contextmanager
    def alone(self):
        """Hold the folder's lock in the block if no other worker does.

        Yields True if it is held.
        """
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield True
            except BlockingIOError:
                yield False
        finally:
            os.close(folder)

    def read_batch(self, read_row):
        """Return the rows of the next files by name, as many as one transaction takes."""
        batch = {}
        size = 0
        until = time.monotonic() + STEP_SECONDS
        for name in list(islice(self.waiting, SPOOL_BATCH)):
            row = self.read(name, read_row)
            if row is None:
                self.waiting.remove(name)
                continue
            batch[name] = row
            size += len(row["payload"])
            is_full = len(batch) >= SPOOL_BATCH or size > SPOOL_BATCH_BYTES
            if is_full or time.monotonic() > until:
                break
        return batch

    def read(self, name, read_row):
        """Return the row of a spooled delivery, or None if it is gone, unreadable or no error."""
        try:
            head, _, body = (self.folder / name).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None  # another worker has moved it
        except OSError as error:
            self.unreadable.add(name)
            log.error("cannot read a spooled delivery, it waits for the next start: %s", error)
            return None
        try:
            received_at, resource, *check = json.loads(head)
            datetime.fromisoformat(received_at)
            if check and check != [len(body), zlib.crc32(body)]:
                raise ValueError("the file is damaged")
            return read_row(body, resource, received_at) | pack(body)
        except MemoryError:
            raise
        except Exception as error:
            self.reject(name, error)
            return None

    def insert(self, connection, name, row):
        """Insert the row of a spooled delivery. Rejects it if the fault is its own."""
        try:
            insert_error(connection, row)
        except Exception as error:
            is_database = type(error) in (sqlite3.OperationalError, sqlite3.DatabaseError)
            if is_database or isinstance(error, MemoryError):
                raise
            self.reject(name, error)

    def reject(self, name, error):
        """Give a delivery that makes no error another name, for a person to look at."""
        file = self.folder / name
        with suppress(FileNotFoundError):
            rejected = file.rename(file.with_suffix(".rejected"))
            log.error(
                "cannot store a spooled delivery (%s), see %s", type(error).__name__, rejected
            )


def free_bytes(folder):
    """Return how many bytes of the folder's disk are free."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def sync_folder(path):
    """Sync a folder, without which a new name in it is not durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# Backup and restore


def open_read_only(path):
    """Return a connection that cannot write a database, nor make a file beside it."""
    uri = f"{path.absolute().as_uri()}?{'immutable=1' if is_at_rest(path) else 'mode=ro'}"
    return sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None)


def is_at_rest(path):
    """Return True for a database in WAL mode that no process has open.

    SQLite would make a WAL beside it to read it, as a file of this user's, were it not told that
    nobody writes. Not for a process that has a connection already, whose locks this would drop.
    """
    with open(path, "rb") as file:
        is_in_wal_mode = file.read(20)[18:] == b"\2\2"
    return is_in_wal_mode and not Path(f"{path}-wal").exists()


def copy_database(source, target, report=lambda share: None):
    """Copy what a connection reads into a new file at `target`.

    `report` gets the share that is done.
    """
    part = Path(f"{target}.part")
    part.unlink(missing_ok=True)
    source.execute("BEGIN")
    try:
        # One snapshot, or each writer would make the copy start again.
        source.execute("SELECT 1 FROM sqlite_schema").fetchone()
        with closing(sqlite3.connect(part)) as copy:
            source.backup(
                copy, pages=2000, progress=lambda _, left, pages: report(1 - left / max(pages, 1))
            )
            # One file, complete without a WAL beside it.
            copy.execute("PRAGMA journal_mode = DELETE")
    finally:
        source.execute("ROLLBACK")
    part.rename(target)


def check_backup(path):
    """Return how many errors a collector's database at `path` holds.

    Raises ValueError if it is none.
    """
    try:
        with closing(open_read_only(path)) as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            problem = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            columns = {row[1] for row in connection.execute("PRAGMA table_info(errors)")}
            if problem != "ok":
                raise ValueError(f"{path} is damaged: {problem}")
            if not version or not columns.issuperset(("received_at", "event_id", "permalink")):
                raise ValueError(f"{path} is no database of the collector")
            if version > SCHEMA_VERSION:
                raise ValueError(
                    f"{path} is of version {version}, this collector knows {SCHEMA_VERSION}; "
                    "restore it with the collector that made it"
                )
            return count_rows(connection)
    except sqlite3.OperationalError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no database of the collector ({error})") from None


def find_largest(sql, connections):
    """Return the largest of the numbers that a query finds in several databases."""
    return max(connection.execute(sql).fetchone()[0] for connection in connections)


def restore(database, file):
    """Replace the content of the live database by that of `file`.

    Returns the path of what it replaced.
    The service may run: writers wait, and what they receive is spooled. Ids go on from the larger
    of both, so that no id is used twice.
    """
    staged = database.path.with_name(f"{database.path.name}.restoring")
    replaced = database.path.with_name(f"{database.path.name}.before-restore")
    staged.unlink(missing_ok=True)
    with closing(open_read_only(file)) as source:
        copy_database(source, staged)
    copy = Database(staged)
    copy.journal_mode = "DELETE"
    try:
        live = database.connection()
        copy.connection()  # brings it up to date, before writers have to wait
        with database.turn(time.monotonic() + 60):
            if replaced.exists():
                replaced.rename(f"{replaced}-{replaced.stat().st_mtime_ns}")
            copy_database(live, replaced)
            sequence = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'errors'"
            both = live, copy.connection()
            last_id = find_largest(sequence, both)
            deletions = find_largest("SELECT deletions FROM search_progress", both)
            copy.connection().execute("DELETE FROM sqlite_sequence WHERE name = 'errors'")
            copy.connection().execute(
                "INSERT INTO sqlite_sequence VALUES ('errors', ?)", (last_id,)
            )
            # So that nobody takes the export of what is replaced for that of what is there now.
            copy.connection().execute("UPDATE search_progress SET deletions = ?", (deletions + 1,))
            copy.connection().backup(live)
    finally:
        copy.close()
        for name in (staged, Path(f"{staged}.lock")):
            name.unlink(missing_ok=True)
    return replaced


# --------------------------------------------------------------------------------------------------
# Presentation: one function for each shape that goes out
# --------------------------------------------------------------------------------------------------

TEXT_LENGTH = 8000  # most characters of a text form
NOTE_LENGTH = 1000  # characters of it that are kept for what it says of what was left out
URL_LENGTH = 300  # most characters of a URL in it; of a longer one the path is shown
SHARES = 2600, 1400, 700, 300  # characters that a section of each rank gets before any gets more
SOURCE_LINES = 3  # source lines around the one that failed
GAP_LENGTH = 30  # characters that a trace keeps for the words about what it lost
LONG_LINE = 100  # characters of a source line above which its column is told, too
LINE_SHOWN = 160  # most characters of a source line in a text form
VARIABLES_SHOWN = 1000  # characters of variables after which the others are left out
INNERMOST = "caused by (innermost)"  # role of the exception that was raised first
MARKS = 40  # most hidden characters of a value for each of which a page has a sign
CUT = "\ue000"  # stands for what a line of a text form lost; no text of an error may have it
HIDDEN_CATEGORIES = "Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp"  # Unicode's, of what has no picture
# Letters and marks without a picture: Unicode's Default_Ignorable ones, and the blank of Braille.
BLANKS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)
ANSI = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|.)",
    re.DOTALL,
)
# What a script or an emoji needs: a joiner between two of its characters, a selector after a sign.
NEEDED = re.compile(
    "[\u200c\u200d](?<=[\u0600-\u1cff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff].)"
    "(?=[\u0600-\u1cff\u2190-\u2bff\U0001f000-\U0001faff])"
    "|\U0001f3f4[\U000e0030-\U000e007a]{3,6}\U000e007f"
    "|[\ufe0e\ufe0f](?<=[#*0-9\xa9\xae\u203c\u2049\u2122-\u3299\U0001f000-\U0001faff].)"
)
BARS = {  # seconds of a bar of the chart, by their words
    "minute": 60, "5 minutes": 300, "10 minutes": 600, "30 minutes": 1800, "hour": 3600,
    "3 hours": 10_800, "6 hours": 21_600, "12 hours": 43_200, "day": 86_400, "2 days": 172_800,
    "week": 604_800, "4 weeks": 2_419_200, "13 weeks": 7_862_400, "year": 31_449_600,
    "10 years": 314_496_000,
}  # fmt: skip


def as_json(value):
    """Return a value as a line of JSON, ASCII so that no terminal obeys it."""
    return json.dumps(value) + "\n"


def as_words(value, indent=None):
    """Return text as it is, and any other JSON value as JSON, over several lines if indented."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, indent=indent)


def joined(*values):
    """Return the values that are not empty, with a blank between them."""
    return " ".join(str(value) for value in values if value)


def summary(row, base=""):
    """Return the scalar keys of an error. `base` is what the addresses here begin with."""
    return {"id": row["id"], "url": f"{base}/errors/{row['id']}"} | dict(row)


def detail(row, body, occurrences, base=""):
    """Return an error in full. `body` is the delivery as it was received (bytes)."""
    return summary(row, base) | parse_detail(load(body)) | {"occurrences": occurrences}


def issue(row, base=""):
    """Return an issue. `base` is what the addresses here begin with."""
    query = {"issue": row["issue_id"]}
    if row["server"]:
        query["server"] = row["server"]
    return dict(row) | {"url": f"{base}/errors?{urlencode(query)}"}


def entry_id(error):
    """Return the id of an error in a feed, which stays the same under any address."""
    names = f"{error['id']} {error['received_at']} {error['event_id']} {error['issue_id']}"
    return f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, names)}"


# What is hidden in text


def hidden_characters(value):
    """Return the set of a text's characters that nobody sees, or that move or reorder others."""
    if value.isascii() and value.isprintable():  # as most text is, and a page has thousands
        return set()
    hidden = set()
    for character in set(value):
        is_hidden = unicodedata.category(character) in HIDDEN_CATEGORIES
        if is_hidden or BLANKS.match(character):
            hidden.add(character)
    return hidden - {"\n", "\t"}


def without_hidden(value):
    """Return text without escape sequences and hidden characters."""
    value = ANSI.sub("", value)
    signs = {}
    for character in hidden_characters(value):
        signs[ord(character)] = " " if character.isspace() else ""
    return value.translate(signs)


def visible(value, length=2000):
    """Return a value as HTML of at most `length` characters, with a sign for each hidden one.

    What Arabic, Indic scripts and emoji need of hidden characters stays.
    """
    shown = cut(as_words(value), length).replace("\r\n", "\n")
    hidden = hidden_characters(shown)
    if not hidden:
        return escape(shown)
    shown = str(escape(shown))
    marks = sum(shown.count(character) for character in hidden)
    marks -= len("".join(NEEDED.findall(shown)))
    if marks > MARKS:
        shown = shown.translate(dict.fromkeys(map(ord, hidden)))
        return Markup(shown + rest(marks, "hidden characters"))
    needed_or_hidden = f"{NEEDED.pattern}|([{''.join(sorted(hidden))}])"
    return Markup(re.sub(needed_or_hidden, sign_of, shown))


def sign_of(match):
    """Return what a page shows for a hidden character, itself where it is needed."""
    if match[1] is None:
        return match[0]
    return f'<b class="unseen">U+{ord(match[1]):04X}</b>'


def flat(value, length=200):
    """Return a value as one line of at most `length` characters, without hidden ones."""
    words = as_words(value)
    read = words[: 8 * length]
    line = " ".join(without_hidden(read).split())
    if len(words) > len(read):
        line += CUT
    return shorten(line, length)


def shorten(line, length):
    """Return a line of a text form, of at most `length` characters."""
    if len(line) <= length:
        return line
    return line[: length - 1] + CUT


# Traces


def no_trace(error):
    """Return the sentence that says why an error has no stack trace."""
    kinds = {"csp": "a report of a browser about a forbidden source"}
    category = error["category"] or "error"
    if category != "error":
        kind = kinds.get(category, f"an issue of the category {category[:40]}")
        return f"There is no stack trace: this is {kind}."
    if error["resource"] == "issue":
        words = "There is no stack trace: an issue webhook never has one, error webhooks and issue"
        return f"{words} alerts do."
    return "There is no stack trace: the SDK that reported this sent none."


def chain_of(error, parsed):
    """Return the exceptions with a `role` each: the main one, what caused it, what wraps it.

    An event without exceptions gives one that has its stacktrace, if there is anything to show.
    """
    exceptions = parsed["exceptions"]
    if not exceptions:
        only = {"type": error["exception_type"], "value": error["exception_value"]}
        only |= {"module": None, "mechanism": None, "main": True, "frames": parsed["stacktrace"]}
        is_empty = not any(only[key] for key in ("type", "value", "frames"))
        is_no_error = (error["category"] or "error") != "error"
        if is_empty or (is_no_error and not only["frames"]):
            return []
        return [only | {"role": "exception"}]
    main = [exception["main"] for exception in exceptions].index(True)
    chain = [exceptions[main] | {"role": "exception"}]
    for exception in reversed(exceptions[:main]):
        chain.append(exception | {"role": "caused by"})
    if main:
        chain[main - innermost(exceptions[:main])]["role"] = INNERMOST
    for exception in exceptions[main + 1 :]:
        chain.append(exception | {"role": "wrapped in"})
    return chain


def innermost(causes):
    """Return the index of the cause with most parents, by the ids in a group, else of the first."""
    mechanisms = [as_dict(cause["mechanism"]) for cause in causes]
    own_parents = [integer(mechanism.get("parent_id")) for mechanism in mechanisms]
    ids = [integer(mechanism.get("exception_id")) for mechanism in mechanisms]
    parents = dict(zip(ids, own_parents, strict=True))
    depths = []
    for own_parent in own_parents:
        depth = 0
        parent = own_parent
        while parent is not None and depth < len(causes):
            depth += 1
            parent = parents.get(parent)
        depths.append(depth)
    return depths.index(max(depths))


def is_close(exception):
    """Return True for the main exception and for the innermost cause, which are shown closely."""
    return exception["role"] in ("exception", INNERMOST)


def own_frame(frames):
    """Return the last frame of the application's own code, else the last frame."""
    own = [frame for frame in frames if frame["in_app"]]
    return (own or frames)[-1]


def says_cut(frame):
    """Return True for a frame that stands for older ones, which were cut when they were read."""
    is_bare = frame["lineno"] is None and not frame["filename"]
    return is_bare and (frame["function"] or "").startswith(REST)


def fold(frames, marked=False):
    """Return runs of frames as (True for library code, frames).

    The crash is shown as own code is, and all frames are where none is marked.
    """
    marked = marked or any(frame["in_app"] for frame in frames)
    runs = []
    for frame in frames:
        is_library = marked and not frame["in_app"] and frame is not frames[-1]
        if frame is frames[0] and says_cut(frame):
            is_library = False
        if not runs or runs[-1][0] != is_library:
            runs.append((is_library, []))
        runs[-1][1].append(frame)
    return runs


def last_part(package):
    """Return the last part of a package's path, and a .NET assembly without its version."""
    return re.split(r"[/\\]", package)[-1].partition(", Version=")[0] or package


def qualified(frame):
    """Return the function of a frame, with its class or module where the file does not say it."""
    function = frame["function"] or "?"
    module = (frame["module"] or "").removeprefix("Elixir.")
    file = frame["filename"] or frame["abs_path"] or ""
    path = re.sub(r"[.:\\]+", "/", module)
    is_said = path in re.sub(r"[.:\\]+", "/", file) or module in function
    if is_said or module.startswith(("<", "__main__")):
        return function
    if " " in function.partition("(")[0]:  # it begins with what it returns
        return f"{function} of {module}"
    return f"{module}.{function}"


def place(frame):
    """Return where a frame is, in the words of a Python traceback."""
    if says_cut(frame):
        return f"[{frame['function']}]"
    file = frame["filename"] or frame["abs_path"]
    package = frame["package"] and last_part(frame["package"])
    parts = [f'File "{file or package or frame["module"] or "?"}"']
    if (frame["lineno"] or 0) > 0:
        parts.append(f"line {frame['lineno']}")
    line = frame["context_line"] or ""
    is_minified = len(line) > LONG_LINE or "{snip}" in line
    if frame["colno"] and (is_minified or not line.strip()):
        parts.append(f"column {frame['colno']}")
    function = qualified(frame)
    if not file and not package:
        function = frame["function"] or "?"  # the module stands for the file
    parts.append(f"in {function}")
    if package and file:
        parts.append(f"package {package}")
    if package and frame["instruction_addr"]:
        parts.append(f"address {frame['instruction_addr']}")
    return ", ".join(parts)


def source_lines(frame):
    """Return a frame's source lines as (number or None, text, True where it failed)."""
    if frame["context_line"] is None:
        return []
    before = frame["pre_context"] or []
    lines = [*before, frame["context_line"], *(frame["post_context"] or [])]
    first_number = frame["lineno"] and frame["lineno"] - len(before)
    numbered = []
    for index, line in enumerate(lines):
        number = None
        if first_number is not None and first_number + index > 0:
            number = first_number + index
        numbered.append((number, line, index == len(before)))
    return numbered


def source_line(line, column=None):
    """Return a source line for a text form, indented. Of a long one the part at `column`."""
    if line.startswith(REST) and (column or 0) > LINE_LENGTH // 2:
        column = LINE_LENGTH // 2  # see parse_line
    line = line.expandtabs(4)
    start = 0
    if len(line) > LINE_SHOWN and column and column < len(line):
        start = max(column - LINE_SHOWN // 2, 0)
    words = line[start:].lstrip()
    indentation = min(len(line) - start - len(words), 40)
    return (CUT if start else " " * indentation) + flat(words, LINE_SHOWN)


def closely(frame):
    """Yield the lines of the frame that matters most: its source, and its variables by use."""
    around = source_lines(frame)
    crash = [is_crash for _, _, is_crash in around].index(True) if around else 0
    for number, line, is_crash in around[max(crash - SOURCE_LINES, 0) : crash + SOURCE_LINES + 1]:
        mark = ">" if is_crash else " "
        shown = source_line(line, frame["colno"] if is_crash else None)
        yield f"{mark} {number or '':>5} | {shown}".rstrip()
    variables = frame["vars"] or {}
    read = " ".join(line for _, line, _ in around)
    used = set(re.findall(r"\w+", frame["context_line"] or ""))
    near = set(re.findall(r"\w+", read))
    names = [name for name in variables if name != REST]
    names.sort(key=lambda name: (name not in used, name not in near, name.startswith("__")))
    room = VARIABLES_SHOWN
    for index, name in enumerate(names):
        line = f"  {flat(name, 60)} = {flat(variables[name], 300)}"
        room -= len(line)
        if room < 0:
            yield f"  {len(names) - index} more variables{CUT}"
            break
        yield line
    if REST in variables:
        yield f"  {flat(variables[REST])}{CUT}"


def trace_lines(exception, marked):
    """Yield the lines of an exception's trace, the oldest call first, library frames folded."""
    frames = exception["frames"]
    shown_closely = own_frame(frames) if frames and is_close(exception) else None
    for is_library, run in fold(frames, marked):
        if is_library:
            yield f"[{len(run)} library frame{'s' if len(run) > 1 else ''}]"
            continue
        for frame in run:
            yield flat(place(frame), 300)
            if frame is shown_closely:
                yield from closely(frame)
            elif frame["context_line"]:
                yield "    " + source_line(frame["context_line"], frame["colno"]).strip()


def has_more(chain):
    """Return True if frames have source lines or variables that the text form does not show."""
    for exception in chain:
        shown = own_frame(exception["frames"]) if exception["frames"] else None
        for frame in exception["frames"]:
            is_shown = frame is shown and is_close(exception)
            if not is_shown and (frame["vars"] or frame["pre_context"] or frame["post_context"]):
                return True
    return False


# Text forms


def error_page(error, body):
    """Return what the text form and the page of an error show of it.

    `error` has the keys of a summary and `occurrences`, `body` is the delivery (bytes).
    """
    payload = load(body)
    parsed = parse_detail(payload)
    chain = chain_of(error, parsed)
    marked = any(frame["in_app"] for exception in chain for frame in exception["frames"])
    return {
        "error": error | parsed,
        "chain": chain,
        "marked": marked,
        "why": no_trace(error),
        "evidence": parse_evidence(payload),
    }


def error_text(error, body, url):
    """Return an error as text for a terminal or an agent, the most useful part first.

    The template puts nothing of the error's own text at the margin, and `flat` lets none of it
    begin a line.
    """
    page = error_page(error, body)
    words = render_template("error.txt", **page, url=url)
    left_out = []
    if has_more(page["chain"]):
        left_out.append("source lines and variables of other frames")
    return fit(words, url, left_out)


def fit(words, url, left_out):
    """Return a text form, a head and sections, cut to TEXT_LENGTH, which says what was left out."""
    head, *sections = words.strip("\n").split("\n\n")
    sections = [section.split("\n") for section in sections]
    shown = [head]
    missing = []
    for lines, room in zip(sections, share_out(sections, len(head)), strict=True):
        kept = cut_section(lines, room)
        left = len(lines) - len(kept)
        if left:
            name = lines[0].partition(" (")[0].rstrip(":")
            missing.append(f"{left} lines of {name}")
        if left and kept and rank(lines[0]) != 2:
            kept.insert(2, f"  [{left} lines left out]")
        if len(kept) > 1:
            shown.append("\n".join(kept))
    text_form = "\n\n".join(shown)
    left_out = missing[:6] + left_out
    if len(missing) > 6:
        left_out.append("more sections")
    if CUT in text_form:
        left_out.append("ends of long values (…)")
    if left_out:
        whole = f"{url}?format=json and {url}/payload"
        text_form += f"\n\nleft out: {', '.join(left_out)}; whole: {whole}"
    return text_form.replace(CUT, "…") + "\n"


def rank(name):
    """Return how late a section gets more than its share of the room: 0 for the main exception."""
    if name.startswith("exception"):
        return 0
    if name.startswith(INNERMOST):
        return 1
    if name.startswith(("caused by", "wrapped in")):
        return 3
    return 2


def size_of(lines):
    """Return the characters that a section of lines takes, with the blank line after it."""
    return sum(len(line) + 1 for line in lines) + 1


def share_out(sections, taken):
    """Return the characters that each section of lines may have, the head has `taken`."""
    room = TEXT_LENGTH - NOTE_LENGTH - taken
    given = [0] * len(sections)
    ranks = [rank(lines[0]) for lines in sections]
    for shares in (SHARES, [TEXT_LENGTH] * len(SHARES)):
        for index in sorted(range(len(sections)), key=ranks.__getitem__):
            size = size_of(sections[index])
            more = min(size, shares[ranks[index]]) - given[index]
            more = max(min(more, room), 0)
            given[index] += more
            room -= more
    return given


def cut_section(lines, room):
    """Return the lines of a section that there is room for.

    A trace keeps its first two lines and its end, breadcrumbs their end, other sections their
    beginning.
    """
    if size_of(lines) <= room:
        return lines
    is_trace = rank(lines[0]) != 2
    first_lines = lines[: 2 if is_trace else 1]
    others = lines[len(first_lines) :]
    ends_best = is_trace or lines[0].startswith("breadcrumbs")
    if ends_best:
        others.reverse()
    room -= size_of(first_lines)
    if is_trace:
        room -= GAP_LENGTH
    if room < 0:
        return []
    kept = []
    for line in others:
        room -= len(line) + 1
        if room < 0:
            break
        kept.append(line)
    if ends_best:
        kept.reverse()
    return first_lines + kept


def fit_rows(rows, has_more, line_of):
    """Return the first rows, whose lines fit a list as text, and True if there are more."""
    room = TEXT_LENGTH - NOTE_LENGTH
    for number, row in enumerate(rows):
        room -= len(line_of(row)) + 1
        if room < 0:
            return rows[:number], True
    return rows, has_more


def list_text(lines, next_url, nothing):
    """Return a list as text, a line each.

    `next_url` is the address of the next page or None, `nothing` stands for an empty list.
    """
    shown = lines or [nothing]
    if next_url and len(next_url) > NOTE_LENGTH - 10:
        next_url = "see the Link header"
    if next_url:
        shown = [*shown, f"next: {next_url}"]
    return "\n".join(shown).replace(CUT, "…") + "\n"


def error_line(row):
    """Return the line of an error in a list."""
    told = (row["received_at"], row["level"], row["project_slug"], row["title"], row["culprit"])
    return f"#{row['id']} {flat(joined(*told), 300)}"


def issue_line(row):
    """Return the line of an issue in a list. Its number is that of its newest error."""
    name = row["short_id"] or row["issue_id"]
    times = "1 time" if row["count"] == 1 else f"{row['count']} times"
    seen = f"{times}, last {row['last_seen']}"
    told = (name, row["level"], row["project_slug"], row["title"], row["culprit"])
    return f"#{row['newest']} {seen}: {flat(joined(*told), 300)}"


# Pages


def ago(value):
    """Return how long ago an ISO 8601 time was."""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(value)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if abs(seconds) >= size:
            direction = "ago" if seconds > 0 else "ahead"
            return f"{abs(seconds) // size:.0f} {unit} {direction}"
    return "just now"


def web_link(value):
    """Return a URL only if it is one that a browser may be sent to, else None."""
    return value if re.match(r"https?://[^\s]+$", value or "", re.IGNORECASE) else None


def chart(times, bars=40):
    """Return a bar chart of ISO 8601 times in UTC, None without times.

    `width` is the time of a bar in words. The `bars`, which end with the newest time, are dicts
    of an index, a count, its share of the highest, and the period.
    """
    if not times:
        return None
    stamps = [datetime.fromisoformat(value).timestamp() for value in times]
    span = max(stamps) - min(stamps)
    fitting = [words for words, seconds in BARS.items() if span / seconds < bars - 1]
    words = fitting[0] if fitting else max(BARS, key=BARS.get)
    width = BARS[words]
    first_bar = int(max(stamps) // width) - bars + 1
    counts = Counter(int(stamp // width) - first_bar for stamp in stamps)
    most = max(counts.values())
    drawn = []
    for index in range(bars):
        start = datetime.fromtimestamp((first_bar + index) * width, UTC)
        end = start + timedelta(seconds=width, microseconds=-1)
        bar = {"index": index, "since": in_microseconds(start), "until": in_microseconds(end)}
        drawn.append(bar | {"count": counts[index], "share": counts[index] / most})
    return {"bars": drawn, "most": most, "width": words}


PAGE_FILTERS = (
    visible, flat, shorten, as_words, ago, web_link, source_lines, fold, own_frame, trace_lines,
    qualified, last_part, entry_id, is_close,
)  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Web: thin routes, which read the request, call down and reply
# --------------------------------------------------------------------------------------------------

web = Blueprint("web", __name__, cli_group=None)
# Media types by the name of the form.
FORMS = {
    "json": "application/json",
    "html": "text/html",
    "text": "text/plain",
    "ndjson": "application/x-ndjson",
    "atom": "application/atom+xml",
}
FILTERS = (*FACETS, "event", "since", "until", "q")
LEVELS = "fatal", "error", "warning", "info", "debug", "sample"  # levels that Sentry knows
QUERY_WORDS = 40  # most words of a search, each Chinese, Japanese or Korean character one
RETRY_AFTER = "5"  # seconds, with a 503
EXPLAIN_BYTES = 256 * 1024  # largest body for which a wrong signature is explained
STATUSES = {"stored": 201, "duplicate": 200, "queued": 202}  # of the reply, by outcome
UNSAFE = re.compile(r"[^\w.:/-]", re.ASCII)  # what could end a log line or pass for another
CROSS_SITE = "cross-site", "same-site"  # values of Sec-Fetch-Site when another web page sends
MISSING_SIGNATURE = (
    "The Sentry-Hook-Signature header is missing: send by an internal integration, which signs. "
    "The legacy WebHooks plugin cannot; it needs SENTRY_CLIENT_SECRET unset."
)


class Collector:
    """What the routes of one app share, and the maintenance that runs between requests."""

    def __init__(self, settings):
        self.settings = settings
        path = settings["DATABASE_URL"]
        self.database = Database(path)
        self.spool = Spool(path.parent / "spool")
        self.counts = Counts()
        dsn = settings["SENTRY_DSN"]
        self.report = start_reports(dsn) if dsn else lambda error: None
        # Steps of maintenance by the seconds between two of them, the most urgent first.
        self.steps = {
            self.database.checkpoint: 0.1,
            self.move_spooled: 0.2,
            self.write_counts: 1,
            self.extend_index: 1,
            self.delete_expired: 1,
            self.log_deletions: 24 * 3600,
        }
        self.due = dict.fromkeys(self.steps, -math.inf)  # monotonic time of the next, by step
        self.deleted = 0  # expired errors since the last log line about them

    def start(self, notify=lambda: None):
        """Open the database, in the process that serves.

        `notify` tells gunicorn that the worker is alive while the schema is changed.
        """
        self.database.notify = notify
        try:
            self.database.connection()
        except (sqlite3.Error, OSError) as error:
            log.error("the database cannot be used, deliveries are spooled: %s", error)
            self.database.pause(error)

    def keep(self, body, payload, resource, received_at):
        """Store a delivery, or spool it whatever fails, because Sentry will not send it again.

        Returns the outcome, and the error's id or None. Raises Refused if neither is possible.
        """
        was_paused = self.database.is_paused()
        try:
            return self.store(body, payload, resource, received_at)
        except Exception as error:
            self.log_failure("cannot store a delivery, spooling it", error)
            reason = "fault of the collector"
            if is_busy(error):
                reason = "database locked"
            elif isinstance(error, sqlite3.Error | OSError):
                reason = "database not writable"
        try:
            self.spool.put(received_at, resource, body)
        except Exception as error:
            if was_paused:  # the database, which nobody has asked yet, is all that is left
                self.database.paused_until = -math.inf
                with suppress(Exception):
                    return self.store(body, payload, resource, received_at)
            log.critical("LOST a delivery: it can neither be stored nor spooled: %s", error)
            self.report(error)
            words = f"Neither the database nor the spool can be written: {error}; free the disk."
            raise Refused(503, "disk", words) from None
        self.counts.add("queued", reason)
        return "queued", None

    def store(self, body, payload, resource, received_at):
        """Commit a delivery's error. Returns the outcome and the error's id."""
        row = parse_error(payload, resource, received_at) | pack(body)
        with self.database.transaction() as connection:
            id_, is_new = insert_error(connection, row)
        outcome = "stored" if is_new else "duplicate"
        self.counts.add(outcome)
        return outcome, id_

    def log_failure(self, what, error):
        """Log and report a failure, with nothing of a delivery's content."""
        is_of_system = isinstance(error, sqlite3.Error | OSError)
        cause = error if is_of_system else "a fault of the collector's own"
        log.error("%s: %s: %s", what, type(error).__name__, cause)
        self.report(error)

    def maintain(self):
        """Do one short step of what must not delay a reply. Returns True if another is due."""
        if self.database.is_paused():
            return False
        step = self.next_step()
        if step is None:
            return False
        try:
            has_more = step()
        except (sqlite3.Error, OSError, MemoryError) as error:
            has_more = False
            if not is_busy(error):
                log.warning("maintenance failed: %s", error)
        self.due[step] = time.monotonic() + (0 if has_more else self.steps[step])
        return self.next_step() is not None

    def next_step(self):
        """Return the most urgent step of maintenance that is due, or None."""
        for step, due in self.due.items():
            if time.monotonic() >= due:
                return step
        return None

    def move_spooled(self):
        """Move some spooled deliveries into the database. Returns True if more wait."""

        def read_row(body, resource, received_at):
            return parse_error(parse_body(body), resource, received_at)

        return self.spool.move(self.database, read_row)

    def extend_index(self):
        """Add some errors to the search index. Returns True if more are missing."""
        return extend_index(self.database)

    def write_counts(self):
        """Write the counts of deliveries, which are in memory alone for about a second."""
        self.counts.write(self.database)

    def delete_expired(self):
        """Delete some errors that RETENTION_DAYS has passed. Returns True if there may be more."""
        days = self.settings["RETENTION_DAYS"]
        if not days:
            return False
        deleted = delete_expired(self.database, days)
        self.deleted += deleted
        return deleted > 0

    def log_deletions(self):
        """Log how many expired errors this worker has deleted in a day."""
        if self.deleted:
            days = self.settings["RETENTION_DAYS"]
            log.info("deleted %d errors that were older than %d days", self.deleted, days)
        self.deleted = 0

    def close(self):
        """Write what is only in memory, and close the database. The process ends."""
        self.log_deletions()
        with suppress(sqlite3.Error, OSError):
            self.write_counts()
        self.database.close()


def collector():
    """Return the Collector of the app that serves this request."""
    return current_app.extensions["collector"]


# The webhook


@web.post("/sentry/webhook")
def receive_webhook():
    """Take a delivery of Sentry's."""
    received_at = now()
    settings = collector().settings
    refuse_web_pages()
    body = read_body(settings["MAX_BODY_BYTES"])
    signature = request.headers.get("Sentry-Hook-Signature", "")
    check_signature(body, signature, settings["SENTRY_CLIENT_SECRET"])
    payload = parse_body(body)
    resource = request.headers.get("Sentry-Hook-Resource")
    ignored = reason_to_ignore(payload, resource, settings["SENTRY_ACTIONS"])
    if ignored:
        reason, words = ignored
        collector().counts.add("ignored", reason)
        return delivery_reply({"status": "ignored", "reason": words}, 200)
    outcome, id_ = collector().keep(body, payload, resource, received_at)
    reply = {"status": outcome}
    if id_ is not None:
        reply |= {"id": id_, "url": link(f"/errors/{id_}")}
    return delivery_reply(reply, STATUSES[outcome])


def delivery_reply(reply, status):
    """Log a delivery's outcome. Returns the response, after which maintenance goes on."""
    log_delivery(reply["status"], reply.get("id", ""), reply.get("reason", ""))
    response = Response(as_json(reply), status, mimetype=FORMS["json"])
    if status == 201:
        response.headers["Location"] = reply["url"]
    response.call_on_close(collector().maintain)
    return response


def refuse_web_pages():
    """Raise Refused if a web page in somebody's browser sends the delivery."""
    if request.headers.get("Sec-Fetch-Site") in CROSS_SITE:
        words = "A web page has sent this; only Sentry, or a program of yours, may post here."
        raise Refused(403, "sent by a web page", words)


def read_body(limit):
    """Return the request's body (bytes), of any transfer coding.

    Raises Refused if it is too long or cut short.
    """
    length = request.content_length
    if length is not None and length > limit:
        raise too_large(length, limit)
    stream = request.environ["wsgi.input"]
    try:
        body = stream.read(limit + 1 if length is None else length)
    except Exception:  # what gunicorn raises for a chunk that is none, or the connection's fault
        body = None
    if body is None or len(body) < (length or 0):
        words = "The delivery broke off before all of it had come; send it again, faster."
        raise Refused(400, "cut short", words)
    if len(body) > limit:
        raise too_large(f"more than {limit}", limit)
    return body


def too_large(length, limit):
    """Return the Refused for a delivery of `length` bytes."""
    words = (
        f"The delivery has {length} bytes, the limit is {limit}; raise MAX_BODY_BYTES to take it."
    )
    return Refused(413, "too large", words)


def is_signed(body, given, secrets):
    """Return True if `given` (bytes) signs a body (bytes) by one of the client secrets."""
    for secret in secrets:
        key = secret.encode("utf-8", "surrogateescape")
        signature = hmac.digest(key, body, "sha256").hex().encode()
        if hmac.compare_digest(signature, given):
            return True
    return False


def check_signature(body, signature, secrets):
    """Raise Refused unless one of `secrets` signs the body, or there are none."""
    given = signature.encode("utf-8", "replace")
    if not secrets or is_signed(body, given, secrets):
        return
    if not given:
        raise Refused(401, "signature missing", MISSING_SIGNATURE)
    reason, cure = explain_signature(body, given, secrets)
    raise Refused(401, reason, f"The Sentry-Hook-Signature is wrong: {cure}.")


def explain_signature(body, given, secrets):
    """Return the reason for a wrong signature, to be counted, and its probable cure."""
    if len(given) != 64:
        cure = f"it has {len(given)} characters, HMAC-SHA256 in hex has 64; let Sentry sign"
        return "signature length", cure
    if is_signed(body, given, [secret.strip() for secret in secrets]):
        reason = "white space in secret"
        return reason, CURES[reason]
    if is_signed(body, given, [secret.strip(" \t\"'") for secret in secrets]):
        reason = "quotes around secret"
        return reason, CURES[reason]
    if len(body) <= EXPLAIN_BYTES and is_signed(as_sentry_writes(body), given, secrets):
        cure = "a proxy in between rewrote the body; make it pass the bytes on as they are"
        return "body rewritten", cure
    return "signature wrong", SECRET_CURE


def as_sentry_writes(body):
    """Return the JSON of a body in the bytes that Sentry would send, or the body if it is none."""
    try:
        return json.dumps(json.loads(body), separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return body


def reason_to_ignore(payload, resource, accepted):
    """Return why a delivery is not stored, as (reason to count, words), or None if it is stored."""
    action = text(payload.get("action"))
    shown = ascii(cut(action, 40))
    if find_error(payload) is None:
        kind = UNSAFE.sub("?", resource or "unknown")[:40]
        return "no error", f"resource {kind} with action {shown} holds no new error"
    if action is None or action in accepted:
        return None
    words = f"action {shown} is not in SENTRY_ACTIONS"
    if action in ACTIONS:
        words += f"; SENTRY_ACTIONS={','.join(accepted)},{action} takes it"
    return "action not accepted", words


def log_delivery(*outcome):
    """Log a line about a delivery, with nothing of its content."""
    ids = []
    for name in ("Sentry-Hook-Resource", "Request-ID"):
        ids.append(UNSAFE.sub("?", request.headers.get(name, "-"))[:40])
    milliseconds = (time.monotonic() - g.started) * 1000
    log.info("webhook %s; %s; %.0f ms", joined(*outcome), joined(*ids), milliseconds)


def caller():
    """Return the address of the client, and of those whom a proxy names, for a log line."""
    forwarded = request.headers.get("X-Forwarded-For", "").replace(",", " ")
    addresses = joined(request.remote_addr or "a-socket", forwarded).split()
    return " ".join(UNSAFE.sub("?", address) for address in addresses)[:100]


# What all requests share


@web.before_app_request
def start_clock():
    """Note when the request began, for the log."""
    g.started = time.monotonic()


@web.before_request
def guard_reading():
    """Let only those read who know API_TOKEN and name a trusted host, where these are set."""
    if request.endpoint in ("web.receive_webhook", "web.show_health", "web.show_robots"):
        return
    settings = collector().settings
    hosts = settings["TRUSTED_HOSTS"]
    if hosts and not is_trusted(request.headers.get("Host", ""), hosts):
        abort(400, "This Host is not in TRUSTED_HOSTS; use one that is, or add it there.")
    token = settings["API_TOKEN"]
    if token and not knows_token(token):
        log_seldom("refused a reader without API_TOKEN, from %s", caller())
        words = "send 'Authorization: Bearer <token>', or the token as Basic password"
        abort(401, f"Reading needs API_TOKEN; {words}.")


def is_trusted(host, trusted):
    """Return True if a Host header names one of the trusted hosts."""
    # Werkzeug takes a host with an underscore, as compose services may have, for none.
    name = re.sub(r":[0-9]+$", "", host).lower()
    return name in trusted or host_is_trusted(host, trusted)


def knows_token(token):
    """Return True if the request carries the token, as Bearer token or as Basic password."""
    try:
        authorization = request.authorization
    except ValueError:  # the header is not ASCII
        return False
    if authorization is None:
        return False
    given = authorization.token if authorization.type == "bearer" else authorization.password
    given = (given or "").encode("utf-8", "replace")
    return hmac.compare_digest(given, token.encode("utf-8", "surrogateescape"))


last_lines = {}  # monotonic time of the last line, by format


def log_seldom(form, *values):
    """Log a line of this form at most once a second, because strangers can cause it."""
    if time.monotonic() > last_lines.get(form, -math.inf) + 1:
        last_lines[form] = time.monotonic()
        log.warning(form, *values)


def link(path):
    """Return the address of a path here: a whole one if PUBLIC_URL is set, else a path."""
    return (collector().settings["PUBLIC_URL"] or request.script_root) + path


def whole_link(path):
    """Return the whole address of a path here, by PUBLIC_URL or by what the request says."""
    if collector().settings["PUBLIC_URL"]:
        return link(path)
    # Werkzeug takes a host with an underscore, as compose services may have, for none.
    host = re.sub(r"[^\w.:\[\]-]", "", request.headers.get("Host", "localhost"))
    return f"{scheme()}://{host}{request.script_root}{path}"


def scheme():
    """Return http or https, as the nearest proxy says, else as the request came."""
    sent = request.headers.get("X-Forwarded-Proto", "").rpartition(",")[2].strip().lower()
    if sent in ("http", "https"):
        return sent
    return request.scheme


def choose_form(*forms):
    """Return the form to reply in: what ?format= says, else what the Accept header prefers.

    The first of `forms` is replied in where the client does not say; earlier ones are preferred to
    later ones that it names alike.
    """
    asked = request.args.get("format")
    if asked and asked not in forms:
        abort(400, f"format={ascii(asked[:40])} is unknown here; use one of {', '.join(forms)}.")
    return asked or max(forms, key=preference)


def preference(form):
    """Return how much the client prefers a form: the quality, and how exactly Accept names it."""
    types = {FORMS[form], "text/markdown"} if form == "text" else {FORMS[form]}
    group = FORMS[form].partition("/")[0] + "/*"
    accepted = [(0, 0)]
    for media_range, quality in request.accept_mimetypes:
        name = media_range.partition(";")[0].strip().lower()
        if name in types:
            accepted.append((3, quality))
        elif name == group:
            accepted.append((2, quality))
        elif name == "*/*":
            accepted.append((1, quality))
    exactness, quality = max(accepted)
    return quality, exactness if quality else 0


def read_query(*names):
    """Return the query string as a dict without empty values.

    Aborts with 400 on an unknown name or a repeat.
    """
    for name, values in request.args.lists():
        if name not in names:
            known = ", ".join(names) or "none"
            abort(400, f"The parameter {ascii(name[:40])} is unknown here; known are {known}.")
        if len(values) > 1:
            abort(400, f"The parameter {name} is given {len(values)} times; give it once.")
    query = {name: clean(value.strip()) for name, value in request.args.items()}
    return {name: value for name, value in query.items() if value}


def read_number(query, name, least, most):
    """Return a whole number of the query, or None.

    Aborts with 400 if it is another thing or out of bounds.
    """
    value = query.get(name)
    if value is None:
        return None
    is_number = re.fullmatch(r"[0-9]{1,19}", value) is not None
    if not is_number or not least <= int(value) <= most:
        abort(400, f"{name}={ascii(value[:40])} is not a whole number from {least} to {most}.")
    return int(value)


def read_time(query, name):
    """Return a time of the query as ISO 8601, or None.

    It is given as ISO 8601, as Unix seconds, or as long ago as 15m, 24h, 7d or 2w. Aborts with 400
    if it is none of these.
    """
    value = query.get(name)
    if value is None:
        return None
    ago = re.fullmatch(r"([0-9]{1,6})([mhdw])", value)
    if ago:
        minutes = int(ago[1]) * {"m": 1, "h": 60, "d": 1440, "w": 10080}[ago[2]]
        parsed = moment(max(time.time() - minutes * 60, 0))
    elif re.fullmatch(r"[0-9]{9,11}(\.[0-9]{1,9})?", value):
        parsed = moment(float(value))
    else:
        # A plus that is not encoded comes as a blank.
        parsed = moment(re.sub(r"(:[0-9.]+) ([0-9:]+)$", r"\1+\2", value.upper()))
    if parsed is None:
        forms = "ISO 8601, as 2026-01-31T12:00:00Z, Unix seconds, or 15m, 24h, 7d, 2w"
        abort(400, f"{name}={ascii(value[:40])} is not a time; use {forms}.")
    return in_microseconds(datetime.fromisoformat(parsed))


def read_filters(query):
    """Return the filters of a query as Storage takes them. Aborts with 400 on a bad one."""
    filters = {name: query.get(name) for name in (*FACETS, "event", "q")}
    filters |= {name: read_time(query, name) for name in ("since", "until")}
    filters |= {name: read_number(query, name, 0, 2**63 - 1) for name in ("before", "after")}
    filters = {name: value for name, value in filters.items() if value is not None}
    if "level" in filters:
        filters["level"] = re.sub(r"\s*,\s*", ",", filters["level"])
    for level in filters.get("level", "error").split(","):
        if level not in LEVELS:
            known = ", ".join(LEVELS)
            abort(400, f"level={ascii(level[:40])} is unknown; use {known}, comma-separated.")
    count = len(words_of(filters.get("q", "")))
    if count > QUERY_WORDS:
        abort(400, f"q has {count} words, the limit is {QUERY_WORDS}; search for fewer.")
    event_id = filters.get("q", "").replace("-", "").lower()
    if re.fullmatch(r"[0-9a-f]{32}", event_id):
        del filters["q"]
        filters["event"] = event_id
    return filters


def reader(filters):
    """Return a connection and the filters, narrowed, for a search that leaves no error out."""
    database = collector().database
    if match_expression(filters):
        complete_index(database)
    connection = database.reader()
    return connection, narrow(connection, filters)


def answer(form, state, render, next_page=None):
    """Reply in a form with what `render` returns, or with 304 to a client that has it.

    `state` is what tells the reply from others of the same address and form.
    """
    address = [request.headers.get("Host"), scheme(), link(request.full_path)]
    parts = as_json([STAMP, form, *address, *state])
    etag = hashlib.sha256(parts.encode()).hexdigest()[:32]
    if request.if_none_match.contains_weak(etag):
        response = Response(status=304)
    else:
        response = Response(render(), mimetype=FORMS[form])
    response.set_etag(etag)
    if next_page:
        response.headers["Link"] = f'<{link(next_page)}>; rel="next"'
    return response


# Reading

ERROR_QUERY = (*FILTERS, "limit", "before", "after", "format", "refresh")  # parameters of /errors
ISSUE_FILTERS = "q", "project", "level", "category", "server", "issue", "since", "until"
LIST_FIELDS = ("q", *FACETS, "event", "since", "until")  # of the form of filters
# Rows of a list in a form, by default and at most; a page of more would take a tenth of a second.
ROWS = {"json": (100, 1000), "text": (100, 1000), "html": (50, 250), "atom": (50, 50)}
OVERVIEW_ROWS = 5000  # errors of which a page has the chart, and counts of their values
FREE_STEP = 64 * 1024 * 1024  # bytes in whose multiples the free space of the disk is told
FACETS_SHOWN = "project", "level", "release", "environment"  # filters whose values a list counts


def minute():
    """Return what a page changes with that says how long ago things were."""
    return int(time.time() // 60)


def read_limit(query, form):
    """Return how many rows a list in a form may have, None for all, as an export may."""
    limit = read_number(query, "limit", 1, 1000)
    if form == "ndjson":
        return limit
    default, most = ROWS[form]
    return min(limit or default, most)


@web.get("/errors/latest")
def show_latest():
    """Show the newest error in full."""
    form = choose_form("json", "text", "html")
    query = read_query(*FILTERS, "format", "refresh")
    refresh = read_number(query, "refresh", 5, 3600)
    filters = read_filters(query)
    connection, narrowed = reader(filters)
    rows, _ = select_errors(connection, narrowed, 1)
    if rows:
        within = {name: value for name, value in query.items() if name in FILTERS}
        return show(connection, rows[0], form, within, refresh)
    if filters:
        abort(404, "No error matches; /errors lists those there are.")
    return abort(404, "No error has come in yet; see / for how.")


@web.get("/errors/<int:id_>")
def show_error(id_):
    """Show one error in full. `within` is the query of the list whose neighbours its page shows."""
    form = choose_form("json", "text", "html")
    query = read_query("format", "within")
    within = dict(parse_qsl(query.get("within", "")))
    within = {name: clean(value) for name, value in within.items() if name in FILTERS}
    connection, _ = reader(read_filters(within))
    return show(connection, find_row(connection, id_), form, within)


@web.get("/errors/<int:id_>/payload")
def show_payload(id_):
    """Show a delivery as it was received, byte for byte."""
    read_query()
    connection = collector().database.reader()
    row = find_row(connection, id_)
    return answer("json", [id_, row["received_at"]], lambda: find_body(connection, row))


def find_row(connection, id_):
    """Return an error's row. Aborts with 404 if there is none."""
    row = select_error(connection, id_) if id_ < 2**63 else None
    if row is None:
        abort_missing(id_)
    return row


def find_body(connection, row):
    """Return the body of a row's delivery (bytes). Aborts with 404 if it was deleted meanwhile."""
    body = select_body(connection, row["id"])
    if body is None:
        abort_missing(row["id"])
    return body


def abort_missing(id_):
    """Abort with 404 for an error that is not there."""
    abort(404, f"There is no error {str(id_)[:20]}; /errors lists those there are.")


def show(connection, row, form, within, refresh=None):
    """Reply with one error in full. `within` are the filters of the list that its page stays in."""
    error = summary(row, link("")) | {"occurrences": select_occurrences(connection, row)}
    state = [error]
    if form == "html":
        page = neighbours(connection, row, within) | {"refresh": refresh, "latest_url": None}
        if request.path.startswith("/errors/latest"):
            turned = None if refresh else 30
            page["latest_url"] = list_link(within, "/errors/latest", refresh=turned)
        state += [page, minute()]

    def render():
        body = find_body(connection, row)
        if form == "json":
            return as_json(detail(row, body, error["occurrences"], link("")))
        if form == "text":
            url = whole_link(f"/errors/{row['id']}")
            return error_text(error, body, url if len(url) <= URL_LENGTH else error["url"])
        return render_template("detail.html", **error_page(error, body), **page)

    return answer(form, state, render)


def neighbours(connection, row, within):
    """Return what the page of an error shows of others: its neighbours, and its issue's."""
    filters = narrow(connection, read_filters(within))
    newer = find_errors(
        connection, filters | {"after": row["id"]}, ["errors.id"], 1, oldest_first=True
    ).fetchone()
    older = find_errors(connection, filters | {"before": row["id"]}, ["errors.id"], 1).fetchone()
    page = {
        "within": within,
        "newer": newer and error_link(newer["id"], within),
        "older": older and error_link(older["id"], within),
        "siblings": [],
        "issue_url": None,
    }
    if row["issue_id"]:
        same = {"issue": row["issue_id"]}
        if row["server"]:
            same["server"] = row["server"]
        rows, _ = select_errors(connection, same, 11)
        page["siblings"] = [list_item(other, same) for other in rows if other["id"] != row["id"]]
        page["issue_url"] = list_link(same)
    return page


def error_link(id_, within):
    """Return the address of an error's page, which stays within the list with such filters."""
    path = f"/errors/{id_}"
    if within:
        path += "?" + urlencode({"within": urlencode(within)})
    return link(path)


def list_item(row, within):
    """Return an error for a table on a page, `within` being the filters of its list."""
    return summary(row) | {"url": error_link(row["id"], within)}


@web.get("/errors")
def list_errors():
    """List errors: a page of summaries, a feed or, as NDJSON, all of them in full."""
    form = choose_form("json", "text", "html", "ndjson", "atom")
    query = read_query(*ERROR_QUERY)
    limit = read_limit(query, form)
    read_number(query, "refresh", 5, 3600)
    filters = read_filters(query)
    connection, narrowed = reader(filters)
    if form == "ndjson":
        state = select_extent(connection)
        if "since" in filters or "until" in filters:
            state = [now()]  # what is in a period changes by the clock alone
        return answer(form, state, lambda: export(collector().database, narrowed, limit, link("")))
    oldest_first = "after" in filters
    rows, has_more = select_errors(connection, narrowed, limit, oldest_first)
    if form == "text":
        rows, has_more = fit_rows(rows, has_more, error_line)
    next_page = None
    if has_more:
        direction = "after" if oldest_first else "before"
        next_page = list_path(query, **{direction: rows[-1]["id"]})
    if form == "html":
        page = list_page(connection, query, narrowed, rows, has_more)
        state = [page, minute()]
    else:
        errors = [summary(row, link("")) for row in rows]
        state = [errors, has_more]

    def render():
        if form == "json":
            return as_json(errors)
        if form == "text":
            lines = [error_line(row) for row in rows]
            return list_text(lines, next_page and whole_link(next_page), "no errors")
        if form == "atom":
            return render_template("feed.xml", errors=errors, query=query).replace(CUT, "…")
        return render_template("list.html", **page)

    return answer(form, state, render, next_page)


def list_path(query, path="/errors", **changes):
    """Return the path of a list for a query with changes, None taking a parameter out."""
    changed = query | changes
    parameters = urlencode({name: value for name, value in changed.items() if value is not None})
    return path + (f"?{parameters}" if parameters else "")


def list_link(query, path="/errors", **changes):
    """Return the address of a list for a query with changes, see list_path."""
    return link(list_path(query, path, **changes))


def without(query, *names):
    """Return a query without some of its parameters."""
    return {name: value for name, value in query.items() if name not in names}


def list_page(connection, query, filters, rows, has_more):
    """Return what the page of a list shows."""
    oldest_first = "after" in filters
    has_newer = "before" in filters
    has_older = has_more
    if oldest_first:
        rows = rows[::-1]
        has_newer = has_more
        has_older = True
    plain_query = without(query, "before", "after")
    within = {name: value for name, value in query.items() if name in FILTERS}
    seen = select_overview(connection, without(filters, "before", "after"), OVERVIEW_ROWS)
    facets = {}
    for name in FACETS_SHOWN:
        facets[name] = count_values(name, [row[name] for row in seen], plain_query)
    bars = chart([row["received_at"] for row in seen])
    for bar in bars["bars"] if bars else []:
        bar["url"] = list_link(plain_query, since=bar["since"], until=bar["until"])
    return {
        "errors": [list_item(row, within) for row in rows],
        "query": query,
        "fields": LIST_FIELDS,
        "refresh": query.get("refresh"),
        "filtered": bool(within),
        "newer": list_link(plain_query, after=rows[0]["id"]) if rows and has_newer else None,
        "older": list_link(plain_query, before=rows[-1]["id"]) if rows and has_older else None,
        "chart": bars,
        "seen": len(seen),
        "has_unseen": len(seen) == OVERVIEW_ROWS,
        "facets": facets,
    }


def count_values(name, values, query):
    """Return the eight most frequent values of a filter as (value, count, address of the list)."""
    counts = Counter(value for value in values if value)
    return [
        (value, count, list_link(query, **{name: value})) for value, count in counts.most_common(8)
    ]


def export(database, filters, limit, base):
    """Yield errors in full, a line each, in reads so short that they stand in nobody's way."""
    oldest_first = "after" in filters
    left = limit or math.inf
    has_more = True
    while has_more and left > 0:
        count = int(min(left, 100))
        rows, has_more = select_errors(database.reader(), filters, count, oldest_first)
        counted = {}  # occurrences by issue, of this read only
        for row in rows:
            connection = database.reader()
            body = select_body(connection, row["id"])
            if body is None:  # deleted meanwhile
                continue
            key = (row["issue_id"], row["server"])
            if key not in counted:
                counted[key] = select_occurrences(connection, row)
            yield as_json(detail(row, body, counted[key], base))
        left -= len(rows)
        if rows:
            filters = filters | {"after" if oldest_first else "before": rows[-1]["id"]}


@web.get("/issues")
def list_issues():
    """List issues, the most recently seen first."""
    form = choose_form("json", "text", "html")
    query = read_query(*ISSUE_FILTERS, "limit", "before", "format", "refresh")
    limit = read_limit(query, form)
    refresh = read_number(query, "refresh", 5, 3600)
    filters = read_filters(query)
    database = collector().database
    if "q" in filters:
        complete_index(database)
    rows, has_more = select_issues(database.reader(), filters, limit)
    if form == "text":
        rows, has_more = fit_rows(rows, has_more, issue_line)
    issues = [issue(row, link("")) for row in rows]
    next_page = None
    if has_more:
        next_page = list_path(query, "/issues", before=rows[-1]["newest"])
    state = [issues, has_more]
    if form == "html":
        state.append(minute())

    def render():
        if form == "json":
            return as_json(issues)
        if form == "text":
            lines = [issue_line(row) for row in rows]
            return list_text(lines, next_page and whole_link(next_page), "no issues")
        page = {"issues": issues, "query": query, "fields": ISSUE_FILTERS, "refresh": refresh}
        page["older"] = next_page and link(next_page)
        return render_template("issues.html", filtered=bool(without(filters, "before")), **page)

    return answer(form, state, render, next_page)


def describe_state():
    """Return what the database and the spool hold, and why if the database cannot be read."""
    shared = collector()
    state = {
        "counts": {"errors": None, "spooled": len(shared.spool.names())},
        "newest": None,
        "oldest": None,
        "last_delivery_at": None,
        "last_refusal": None,
        "deliveries": [],
        "database_bytes": None,
        "free_bytes": None,
        "problem": None,
    }
    try:
        free = free_bytes(shared.database.path.parent)
        state["free_bytes"] = free // FREE_STEP * FREE_STEP  # or each byte would change the tag
        connection = shared.database.reader()
        state["counts"]["errors"] = count_errors(connection)
        newest, _ = select_errors(connection, {}, 1)
        oldest, _ = select_errors(connection, {}, 1, oldest_first=True)
        if newest:
            state["newest"] = summary(newest[0], link(""))
            state["oldest"] = summary(oldest[0], link(""))
        state |= describe_deliveries(connection)
        state["database_bytes"] = database_bytes(connection)
    except (sqlite3.Error, OSError) as error:
        shared.database.close_connection()
        state["problem"] = f"The database cannot be read: {error}."
    return state


def describe_deliveries(connection):
    """Return the deliveries by outcome and reason, with the cure where there is one."""
    deliveries = select_deliveries(connection)
    for row in deliveries:
        row["cure"] = CURES.get(row["reason"])
    refused = [row for row in deliveries if row["outcome"] == "refused"]
    return {
        "deliveries": deliveries,
        "last_delivery_at": max((row["last_at"] for row in deliveries), default=None),
        "last_refusal": refused[0] if refused else None,
    }


def describe_config():
    """Return the settings without secrets, and what depends on the machine."""
    database = collector().database
    settings = dict(collector().settings)
    config = {}
    for name in ("SENTRY_DSN", "SENTRY_CLIENT_SECRET", "API_TOKEN"):
        config[f"{name.lower()}_set"] = bool(settings.pop(name))
    path = settings.pop("DATABASE_URL")
    config |= {name.lower(): value for name, value in settings.items()}
    return config | {
        "database_path": str(path),
        "journal_mode": database.journal_mode,
        "sqlite_version": sqlite3.sqlite_version,
        "version": VERSION,
    }


ABOUT = {
    "name": "Sentry Error Collector",
    "version": VERSION,
    "description": "Receives Sentry's webhooks, keeps every new error, and gives the latest one "
    "back.",
    "endpoints": {
        "POST /sentry/webhook": "where Sentry delivers",
        "GET /errors/latest": f"the newest error, in full; {', '.join(FILTERS)}; "
        "format=json|html|text",
        "GET /errors/<id>": "one error, in full; format=json|html|text",
        "GET /errors/<id>/payload": "the delivery as it was received, byte for byte",
        "GET /errors": "summaries, newest first; filters as above, limit, before, after; "
        "format= also ndjson, in full, and atom, a feed",
        "GET /issues": f"issues, the most recently seen first; {', '.join(ISSUE_FILTERS)}, limit, "
        "before; format=json|html|text",
        "GET /": "this overview",
        "GET /config": "the configuration, without secrets",
        "GET /metrics": "counts, in the text format of Prometheus",
        "GET /health": "200 if a row can be committed, else 503",
    },
}
STEPS = (
    "In Sentry: Settings > Developer Settings > Create New Integration > Internal Integration; "
    "this as Webhook URL; permission Issue & Event: Read; webhooks: error (Business plan and "
    "above) or issue. For stack traces on every plan: Alert Rule Action on, the integration as an "
    "action of an alert rule, SENTRY_ACTIONS=created,triggered here. Then its Client Secret as "
    "SENTRY_CLIENT_SECRET here."
)
SECRET_CURE = "set SENTRY_CLIENT_SECRET to the Client Secret of the integration that sends"
# What to do about deliveries that were refused, ignored or queued, by the reason for that.
CURES = {
    "signature missing": "send through an internal integration; the legacy plugin cannot sign",
    "signature wrong": SECRET_CURE,
    "signature length": SECRET_CURE,
    "white space in secret": "remove the white space around SENTRY_CLIENT_SECRET",
    "quotes around secret": "remove the quotes around SENTRY_CLIENT_SECRET",
    "body rewritten": "make the proxy in between pass the bytes on as they are",
    "wrong address": "set the integration's Webhook URL to the address below",
    "too large": "raise MAX_BODY_BYTES",
    "cut short": "look at the proxy in between; it ends requests before they are whole",
    "sent by a web page": "none is needed: only Sentry, or a program of yours, may post here",
    "gzip": "make the proxy in between pass the bytes on as they are",
    "byte order mark": "send JSON text without a byte order mark",
    "not UTF-8": "send JSON text encoded as UTF-8",
    "not JSON": "point only Sentry's webhooks here",
    "no object": "point only Sentry's webhooks here",
    "no delivery": "point only Sentry's webhooks here",
    "disk": "free space on the disk; Sentry does not send these again",
    "no error": "none is needed: these tell of no new error",
    "action not accepted": "set SENTRY_ACTIONS=created,triggered to take issue alerts",
    "database locked": "end the program that holds its lock; these are kept in the spool",
    "database not writable": "see /health; these are kept in the spool",
    "fault of the collector": "see the log, and report it; these are kept in the spool",
}


@web.get("/")
def show_overview():
    """Show what this service is and what it holds."""
    form = choose_form("json", "html")
    connect = {"webhook_url": whole_link("/sentry/webhook"), "steps": STEPS}
    about = ABOUT | describe_state() | {"connect": connect}
    if form == "json":
        return answer(form, [about], lambda: as_json(about))
    page = about | {"config": describe_config()}
    return answer(form, [page, minute()], lambda: render_template("overview.html", **page))


@web.get("/config")
def show_config():
    """Show the configuration, no secret in it, and how deliveries fare."""
    state = describe_state()
    config = describe_config() | {"spooled": state["counts"]["spooled"]}
    for name in ("oldest", "newest"):
        error = state[name] or {"received_at": None}
        config[f"{name}_error_at"] = error["received_at"]
    for name in ("database_bytes", "free_bytes", "last_delivery_at", "last_refusal", "deliveries"):
        config[name] = state[name]
    config["problem"] = state["problem"]
    return answer("json", [config], lambda: as_json(config))


@web.get("/metrics")
def show_metrics():
    """Show counts in the text format of Prometheus."""
    state = describe_state()
    last = state["last_delivery_at"]
    seconds = datetime.fromisoformat(last).timestamp() if last else None
    words = render_template("metrics.txt", **state, last_delivery_seconds=seconds)
    return Response(words, content_type="text/plain; version=0.0.4; charset=utf-8")


@web.get("/robots.txt")
def show_robots():
    """Show crawlers that nothing here is for them."""
    return Response("User-agent: *\nDisallow: /\n", mimetype=FORMS["text"])


@web.get("/health")
def show_health():
    """Show whether an error that comes in now would be committed."""
    try:
        check_writable(collector().database)
    except (sqlite3.Error, OSError) as error:
        waiting = len(collector().spool.names())
        words = f"The database cannot be written: {error}; {cure_of(error)}."
        abort(503, f"{words} In the spool: {waiting}.")
    response = Response(as_json({"status": "ok"}), mimetype=FORMS["json"])
    response.call_on_close(collector().maintain)
    return response


RESTORE_CURE = (
    "stop the collector, move it and the files beside it that begin with its name away, restore a "
    "backup by 'flask --app collector restore FILE', and start again"
)


def cure_of(error):
    """Return what to do about a database that cannot be written."""
    if is_busy(error):
        return "end the program that holds its lock, or wait for it"
    code = primary_code(error)
    if code == sqlite3.SQLITE_FULL or getattr(error, "errno", 0) == errno.ENOSPC:
        return "free space on the disk"
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return RESTORE_CURE
    is_denied = getattr(error, "errno", 0) in (errno.EACCES, errno.EPERM, errno.EROFS)
    if is_denied or code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return "make the folder and its files writable for the collector's user"
    return "see the log"


# Replies to what cannot be served


def reply_with_error(status, words, headers=()):
    """Reply with the one error shape, or with a page of the same words to browsers."""
    headers = list(headers)
    if status == 503:
        headers.append(("Retry-After", RETRY_AFTER))
    accepted = request.accept_mimetypes.best_match([FORMS["json"], FORMS["html"]])
    is_named = request.args.get("format") in ("json", "text", "ndjson", "atom")
    if accepted == FORMS["html"] and not is_named:
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
    words = error.description
    if words == type(error).description:
        words = f"{error.name} for {request.method} of this page; / lists what there is."
    if request.method == "POST" and error.code in (404, 405):
        words = (
            f"Nothing takes a POST here; Sentry's webhooks go to {whole_link('/sentry/webhook')}"
        )
        collector().counts.add("refused", "wrong address")
        log_seldom(
            "webhook refused, wrong address %s, from %s",
            UNSAFE.sub("?", request.path)[:100],
            caller(),
        )
    headers = [item for item in error.get_headers() if item[0] == "Allow"]
    if error.code == 401:
        challenge = 'Basic realm="Sentry Error Collector", charset="UTF-8"'
        headers.append(("WWW-Authenticate", challenge))
    return reply_with_error(error.code, words, headers)


def handle_refusal(refused):
    """Count, log and reply to a delivery that is not taken."""
    collector().counts.add("refused", refused.reason)
    log_delivery(f"refused {refused.status} {refused.reason}, from {caller()}")
    response = reply_with_error(refused.status, refused.words)
    response.call_on_close(collector().maintain)
    return response


def handle_failure(error):
    """Reply to a read that the database, its disk, the memory or the clock ended."""
    if is_interrupted(error):
        log_seldom("ended a search that took too long, from %s", caller())
        words = (
            "The search takes longer than half a second; narrow the search, by a filter or words."
        )
        return reply_with_error(503, words)
    collector().log_failure("cannot read", error)
    collector().database.close_connection()
    return reply_with_error(503, f"The database cannot be read: {error}; try again.")


def handle_incomplete_index(error):
    """Reply to a search that the index cannot answer yet."""
    return reply_with_error(503, str(error))


def handle_fault(error):
    """Reply to a fault of the collector's own."""
    path = UNSAFE.sub("?", request.path)[:100]
    log.error("fault in %s %s", request.method, path, exc_info=error)
    collector().report(error)
    return reply_with_error(500, "A fault of the collector's own; its log says more.")


def add_headers(response):
    """Add what keeps hostile text harmless in a browser, and replies out of shared caches."""
    response.headers.extend(current_app.config["HEADERS"])
    return response


# Commands


@web.cli.command("backup")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
def backup_command(file):
    """Copy the database to a new FILE while the service runs."""
    path = collector().database.path
    if file.exists():
        raise click.ClickException(f"{file} exists; name a new file.")
    if not path.exists():
        raise click.ClickException(f"There is no database at {path}; name it by DATABASE_URL.")

    def report(share):
        if sys.stderr.isatty():
            click.echo(f"\r{share:4.0%} ", nl=False, err=True)

    try:
        was_at_rest = is_at_rest(path)
        with closing(open_read_only(path)) as source:
            copy_database(source, file, report)
        if was_at_rest and not is_at_rest(path):
            file.unlink()
            raise click.ClickException("The service has started meanwhile; make the backup again.")
        with closing(open_read_only(file)) as copy:
            errors = count_rows(copy)
    except (sqlite3.Error, OSError) as error:
        raise click.ClickException(f"cannot copy {path} to {file}: {error}") from None
    click.echo(f"{file}: {errors} errors, {file.stat().st_size} bytes")


@web.cli.command("restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--yes", is_flag=True, help="Replace what is there.")
def restore_command(file, yes):
    """Replace the errors by those of FILE, a backup, whether the service runs or not."""
    database = collector().database
    try:
        errors = check_backup(file)
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    check_folder(database.path)
    try:
        replaced_errors = count_rows(database.connection())
        click.echo(
            f"{file} has {errors} errors; {database.path} has {replaced_errors}, which it replaces."
        )
        if not yes:
            raise click.ClickException("Nothing is changed; add --yes to replace them.")
        replaced = restore(database, file)
    except (sqlite3.Error, OSError) as error:
        words = f"cannot replace {database.path} by {file}: {error}; {cure_of(error)}"
        raise click.ClickException(words) from None
    finally:
        database.close()
    click.echo(f"Restored. What was there is in {replaced}.")


@web.cli.command("health")
def health_command():
    """Exit with status 0 if the service answers on its port that it is healthy."""
    port = collector().settings["PORT"]
    try:
        status, words = ask_health(port)
    except (OSError, http.client.HTTPException) as error:
        raise click.ClickException(f"no answer on port {port}: {error}") from None
    if status != 200:
        raise click.ClickException(words)
    click.echo(words)


def ask_health(port):
    """Return the status and the text of /health of the service on a port of this machine."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace").strip()
    finally:
        connection.close()


@web.cli.command("doctor")
def doctor_command():
    """Check the installation and say what to do about each fault.

    Exits with status 1 if there is one.
    """
    checks = check_settings, check_data, check_database, check_disk, check_spool, check_service
    has_fault = False
    for check in checks:
        try:
            lines = list(check(collector()))
        except OSError as error:
            lines = [("FAULT", f"cannot look: {error}; run this as the user who serves")]
        for verdict, words in lines:
            click.echo(f"{verdict:6} {' '.join(words.split())[:400]}")
            has_fault |= verdict == "FAULT"
    sys.exit(has_fault)


def check_settings(shared):
    """Yield the doctor's lines, as (verdict, words), about the settings, which are valid by now."""
    yield "ok", "the settings are valid"
    remarks = {
        "SENTRY_CLIENT_SECRET": "anybody who reaches the port can post",
        "API_TOKEN": "anybody who reaches the port can read",
        "RETENTION_DAYS": "errors are kept for ever",
    }
    for name, words in remarks.items():
        if not shared.settings[name]:
            yield "note", f"{name} is not set: {words}"


def check_data(shared):
    """Yield the doctor's lines about the data folder and what is in it."""
    path = shared.database.path
    files = [file for file in (path.parent, *path.parent.glob("*")) if not os.access(file, os.W_OK)]
    if not path.parent.exists():
        yield "note", f"{path.parent} is not there; the start makes it"
    elif files:
        owner = files[0].stat().st_uid
        words = "chown it, or mount it so that it can be written"
        yield "FAULT", f"uid {os.getuid()} cannot write {files[0]}, uid {owner}'s; {words}"
    else:
        yield "ok", f"{path.parent} can be written; journal mode {shared.database.journal_mode}"


def check_database(shared):
    """Yield the doctor's line about the database."""
    path = shared.database.path
    if not path.exists() or path.stat().st_size == 0:
        yield "note", f"{path} is not there; the start makes it"
        return
    try:
        errors = check_backup(path)
        yield "ok", f"{path} is whole; errors: {errors}, size: {path.stat().st_size / 1e6:.1f} MB"
    except ValueError as error:
        yield "FAULT", f"{error}. To use a backup instead, {RESTORE_CURE}"


def check_disk(shared):
    """Yield the doctor's line about the free space."""
    folder = shared.database.path.parent
    while not folder.exists():
        folder = folder.parent
    free = free_bytes(folder)
    words = f"free on the disk: {free // 1_000_000} MB"
    if free < SPOOL_FREE_BYTES:
        yield "FAULT", f"{words}; free some, or deliveries are refused"
    else:
        yield "ok", words


def check_spool(shared):
    """Yield the doctor's lines about the spool."""
    waiting = len(shared.spool.names())
    words = f"deliveries in the spool: {waiting}"
    if waiting > SPOOL_LIMIT * SPOOL_NEARLY_FULL:
        yield "FAULT", f"{words}, of at most {SPOOL_LIMIT}; the service's line has the cause"
    else:
        yield "ok", words
    rejected = len(list(shared.spool.folder.glob("*.rejected")))
    if rejected:
        yield (
            "FAULT",
            f"spooled but not to be stored: {rejected}; see {shared.spool.folder}/*.rejected",
        )


def check_service(shared):
    """Yield the doctor's line about the running service."""
    port = shared.settings["PORT"]
    try:
        status, words = ask_health(port)
    except (OSError, http.client.HTTPException) as error:
        yield "FAULT", f"nothing answers on port {port}: {error}; start the service, or set PORT"
        return
    if status == 200:
        yield "ok", f"the service on port {port} stores errors"
    else:
        yield "FAULT", f"the service on port {port} does not store errors: {words}"


# --------------------------------------------------------------------------------------------------
# Wiring: the settings, and the app made of them
# --------------------------------------------------------------------------------------------------

DEFAULTS = {
    "DATABASE_URL": "sqlite:///./data/errors.db",
    "SENTRY_DSN": "",
    "SENTRY_CLIENT_SECRET": "",
    "SENTRY_ACTIONS": "created",
    "API_TOKEN": "",
    "PUBLIC_URL": "",
    "TRUSTED_HOSTS": "",
    "RETENTION_DAYS": "",
    "MAX_BODY_BYTES": str(5 * 1024 * 1024),
    "WEB_CONCURRENCY": "4",
    "PORT": "8000",
}
ACTIONS = "created", "triggered", "unresolved"  # actions of deliveries that hold an error
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; style-src 'sha256-{}'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


def stamp_code():
    """Return what changes with the code and the templates, because the replies do."""
    folder = Path(__file__).parent
    hashed = hashlib.sha256(VERSION.encode())
    for path in (Path(__file__), *sorted((folder / "templates").iterdir())):
        hashed.update(path.read_bytes())
    return hashed.hexdigest()


STAMP = stamp_code()


def fail(name, fault, example):
    """End the start with one line about a setting."""
    raise SystemExit(f"{name}: {fault}; for example {name}={example}")


def read_whole_number(settings, name, least, most):
    """Return a setting as a number. Ends the start if it is another thing or out of bounds."""
    value = settings[name].strip()
    is_number = re.fullmatch(r"[0-9]{1,12}", value) is not None
    if not is_number or not least <= int(value) <= most:
        fault = f"{ascii(value[:40])} is not a whole number from {least} to {most}"
        fail(name, fault, DEFAULTS[name] or 30)
    return int(value)


def read_list(settings, name):
    """Return the parts of a comma-separated setting."""
    return [part for part in re.split(r"\s*,\s*", settings[name]) if part]


def read_database_path(settings):
    """Return the path in DATABASE_URL, its links resolved. Ends the start if there is none."""
    url = settings["DATABASE_URL"].strip()
    match = re.fullmatch(r"sqlite(?:\+aiosqlite)?:///([^?#]+)", url)
    if not match or match[1] == ":memory:":
        scheme = ascii(url.split(":")[0][:40])  # the rest of a foreign URL may hold a password
        fault = f"it must name a file as sqlite:///PATH, its scheme is {scheme}"
        fail("DATABASE_URL", fault, DEFAULTS["DATABASE_URL"])
    # SQLite puts the WAL beside the file that a link leads to.
    return Path(os.path.realpath(match[1]))


def read_secrets(settings):
    """Return the client secrets as they were typed, so that a refusal can say what is wrong."""
    secrets = read_list(settings, "SENTRY_CLIENT_SECRET")
    if settings["SENTRY_CLIENT_SECRET"] and not secrets:
        fail("SENTRY_CLIENT_SECRET", "there is no secret between its commas", "0123abcd,4567ef89")
    return secrets


def read_actions(settings):
    """Return the accepted actions. Ends the start on an unknown one."""
    actions = read_list({"SENTRY_ACTIONS": settings["SENTRY_ACTIONS"].strip()}, "SENTRY_ACTIONS")
    unknown = [action for action in actions if action not in ACTIONS]
    if unknown or not actions:
        fault = f"{ascii(','.join(unknown)[:40])} is unknown, known are {', '.join(ACTIONS)}"
        fail("SENTRY_ACTIONS", fault, "created,triggered")
    return actions


def read_hosts(settings):
    """Return the trusted hosts. Ends the start on one that no Host header can be."""
    hosts = read_list({"TRUSTED_HOSTS": settings["TRUSTED_HOSTS"].strip().lower()}, "TRUSTED_HOSTS")
    for host in hosts:
        if not re.fullmatch(r"[\w.:\[\]-]+", host):
            fault = f"{ascii(host[:40])} is not the name of a host"
            fail("TRUSTED_HOSTS", fault, "localhost,errors.example.com")
    return hosts


def read_public_url(settings):
    """Return PUBLIC_URL without a slash at its end. Ends the start if it is no address."""
    url = settings["PUBLIC_URL"].strip().rstrip("/")
    if url and not re.fullmatch(r"https?://[^\s/?#\"'<>\\]+(/[^\s?#\"'<>\\]*)?", url):
        fault = f"{ascii(url[:60])} is not an address that begins with http:// or https://"
        fail("PUBLIC_URL", fault, "https://errors.example.com")
    return url


def read_token(settings):
    """Return API_TOKEN. Ends the start if a header cannot carry it."""
    token = settings["API_TOKEN"].strip()
    if not token.isascii() or not token.isprintable():
        fail("API_TOKEN", "it has characters other than ASCII", "5f1c0a9e7b3d4c62")
    return token


def read_settings(config=None):
    """Return the settings, checked, of `config`, the environment, .env and the defaults.

    The first that has a setting wins. An empty value is an unset one. Raises SystemExit with one
    line about the first that is bad.
    """
    settings = dict(DEFAULTS)
    try:
        from_file = dotenv_values(".env")
    except UnicodeDecodeError:
        raise SystemExit(".env: it is not UTF-8; write it anew as UTF-8 text") from None
    for source in (from_file, os.environ, config or {}):
        for name in DEFAULTS:
            value = str(source.get(name) or "")
            if value.strip():
                settings[name] = value
    days = settings["RETENTION_DAYS"]
    return {
        "DATABASE_URL": read_database_path(settings),
        "SENTRY_DSN": settings["SENTRY_DSN"].strip(),
        "SENTRY_CLIENT_SECRET": read_secrets(settings),
        "SENTRY_ACTIONS": read_actions(settings),
        "API_TOKEN": read_token(settings),
        "PUBLIC_URL": read_public_url(settings),
        "TRUSTED_HOSTS": read_hosts(settings),
        "RETENTION_DAYS": read_whole_number(settings, "RETENTION_DAYS", 1, 36500) if days else None,
        "MAX_BODY_BYTES": read_whole_number(settings, "MAX_BODY_BYTES", 1, 32 * 1024 * 1024),
        "WEB_CONCURRENCY": read_whole_number(settings, "WEB_CONCURRENCY", 1, 256),
        "PORT": read_whole_number(settings, "PORT", 1, 65535),
    }


def check_folder(path):
    """Make the folders of the database and the spool.

    Ends the process if they cannot be written.
    """
    folder = path.parent
    try:
        (folder / "spool").mkdir(parents=True, exist_ok=True)
        for probe in (folder / f".probe-{os.getpid()}", folder / "spool" / f".probe-{os.getpid()}"):
            probe.touch()
            probe.unlink()
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder")
    except OSError as error:
        whose = f", this is uid {os.getuid()}"
        if folder.exists():
            whose = f" owned by uid {folder.stat().st_uid}{whose}"
        cause = error.strerror or error
        fault = f"cannot write in {folder}{whose} ({cause}); chown it, or name another"
        fail("DATABASE_URL", fault, DEFAULTS["DATABASE_URL"])


REPORTED = "event_id", "timestamp", "platform", "level", "exception", "release"  # keys of a report
REPORT_SECONDS = 60  # shortest time between two reports


def start_reports(dsn):
    """Return a function that reports an exception to Sentry, once in REPORT_SECONDS at most."""
    import sentry_sdk  # here, because it costs a worker 10 MB and most run without

    reported_at = -math.inf

    def scrub(event, hint):
        # Neither a webhook's content nor a secret may leave: of an exception only what SQLite or
        # the system say of it.
        is_of_system = isinstance(hint["exc_info"][1], sqlite3.Error | OSError)
        if not is_of_system:
            for value in event.get("exception", {}).get("values", ()):
                value["value"] = ""
        return {key: event[key] for key in REPORTED if key in event}

    def report(error):
        nonlocal reported_at
        # A report may come back as a webhook, which may fail again.
        if time.monotonic() > reported_at + REPORT_SECONDS:
            reported_at = time.monotonic()
            sentry_sdk.capture_exception(error)

    try:
        sentry_sdk.init(
            dsn,
            release=VERSION,
            before_send=scrub,
            default_integrations=False,
            auto_enabling_integrations=False,
            send_client_reports=False,
            include_local_variables=False,
            include_source_context=False,
            max_breadcrumbs=0,
        )
    except (sentry_sdk.utils.BadDsn, ValueError):
        fail("SENTRY_DSN", "it is not a DSN of Sentry's", "https://key@o0.ingest.sentry.io/0")
    return report


def start_log():
    """Write the log to standard error, in the form of gunicorn's."""
    if log.handlers:
        return
    form = "[%(asctime)s] [%(process)d] [%(levelname)s] %(message)s"
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(form, "%Y-%m-%d %H:%M:%S %z"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def describe_start(shared):
    """Return what is on and what is off, in one line."""
    settings = shared.settings
    secrets = settings["SENTRY_CLIENT_SECRET"]
    days = settings["RETENTION_DAYS"]
    parts = [
        f"collector {VERSION}",
        "signature check " + ("on" if secrets else "OFF, anybody can post"),
        "read token " + ("on" if settings["API_TOKEN"] else "OFF, anybody can read"),
        "trusted hosts " + (", ".join(settings["TRUSTED_HOSTS"]) or "any"),
        "public URL " + (settings["PUBLIC_URL"] or "as requested"),
        "Sentry reports " + ("on" if settings["SENTRY_DSN"] else "off"),
        "actions " + ",".join(settings["SENTRY_ACTIONS"]),
        f"journal mode {shared.database.journal_mode}",
        "retention " + (f"{days} days" if days else "off"),
    ]
    for ends in (string.whitespace, "\"'"):
        if secrets != [secret.strip(ends) for secret in secrets]:
            kind = "white space" if ends == string.whitespace else "quotes"
            parts.append(f"SENTRY_CLIENT_SECRET has {kind} at its ends")
    return "; ".join(parts)


def create_app(config=None):
    """Return the app, its settings from `config` or the environment (see read_settings).

    No file is made.
    """
    start_log()
    settings = read_settings(config)
    app = Flask(__name__, static_folder=None)
    # Flask would redirect to the address without the slash; Sentry takes a redirect for success.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    app.extensions["collector"] = Collector(settings)
    style = Path(app.root_path, "templates", "style.css").read_text(encoding="utf-8")
    digest_of_style = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    app.config["HEADERS"] = {
        "Content-Security-Policy": CONTENT_SECURITY_POLICY.format(digest_of_style),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "private, no-cache",
        "Vary": "Accept, Authorization",
    }
    app.jinja_env.globals.update(
        style=Markup(style),
        version=VERSION,
        link=link,
        whole_link=whole_link,
        list_path=list_path,
        page_url=list_link,
        error_link=error_link,
    )
    app.jinja_env.filters.update({function.__name__: function for function in PAGE_FILTERS})
    app.register_blueprint(web)
    app.after_request(add_headers)
    app.register_error_handler(HTTPException, handle_http_error)
    app.register_error_handler(Refused, handle_refusal)
    app.register_error_handler(IndexIncomplete, handle_incomplete_index)
    for kind in (sqlite3.Error, OSError, MemoryError):
        app.register_error_handler(kind, handle_failure)
    app.register_error_handler(Exception, handle_fault)
    return app
