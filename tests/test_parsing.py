"""The parser: every field from every shape, and nothing that a payload may hold breaks it."""

import copy
import gzip
import hashlib
import json
import sys
import time
import tracemalloc

import pytest
from conftest import PAYLOADS, event_payload, load, wire

import collector
from collector import (
    Refused,
    find_error,
    identity,
    parse_body,
    parse_clues,
    parse_detail,
    parse_error,
)

RECEIVED = "2026-04-01T00:00:00.000001Z"
COLUMNS = (
    "received_at timestamp resource action event_id issue_id short_id title message culprit level status platform "
    "logger environment release project_id project_slug project_name exception_type exception_value permalink rule "
    "server category"
).split()
EMPTY = dict.fromkeys(COLUMNS) | {
    "received_at": RECEIVED, "timestamp": RECEIVED, "category": "error"
}  # fmt: skip
EXPECTED = json.loads((PAYLOADS / "parsed/expected.json").read_text(encoding="utf-8"))
ROWS = EXPECTED["rows"]
DETAILS = EXPECTED["details"]
FAULTS = json.loads((PAYLOADS / "faults/expected.json").read_text(encoding="utf-8"))
NO_ERRORS = "issue.resolved comment.created installation.created metric_alert.resolved".split()


def row_of(payload, resource=None):
    return parse_error(payload, resource, RECEIVED)


def detail_of(**event):
    """Return the detail of an error with this event."""
    return parse_detail({"action": "created", "data": {"error": event}})


@pytest.mark.parametrize("name", ROWS)
def test_the_row_of_a_sample_is_whole(name):
    assert row_of(load(name)) == EMPTY | {"server": "sentry.io"} | ROWS[name]


@pytest.mark.parametrize("name", NO_ERRORS)
def test_a_delivery_that_is_no_error_makes_no_row(name):
    assert find_error(load(name)) is None
    assert row_of(load(name), name.split(".")[0]) is None


def test_the_resource_header_goes_before_the_shape():
    assert row_of(load("documented.created"), "issue")["resource"] == "issue"


def at(value, path):
    """Return what lies at a dotted path."""
    for key in path.split("."):
        value = value[int(key) if key.isdigit() else key]
    return value


@pytest.mark.parametrize("name", [name for name in FAULTS if name != "_about"])
def test_a_payload_of_a_kind_that_was_once_misread_is_read_right(name):
    payload = load(f"faults/{name.removesuffix('.json')}")
    found = parse_detail(payload)
    found["stacktrace"] = [frame["function"] for frame in found["stacktrace"]]
    found["breadcrumbs"] = [crumb["message"] for crumb in found["breadcrumbs"]]
    found |= row_of(payload)
    expected = {key: value for key, value in FAULTS[name].items() if key.split(".")[0] in found}
    assert {key: at(found, key) for key in expected} == expected


@pytest.mark.parametrize(("payload", "resource"), [
    ({"action": "created", "data": {"error": {}, "event": {}, "issue": {}}}, "error"),
    ({"action": "created", "data": {"error": None, "event": {}, "issue": {}}}, "event_alert"),
    ({"action": "created", "data": {"error": [], "event": 5, "issue": {}}}, "issue"),
    ({"action": "unresolved", "data": {"issue": {}}}, "issue"),
    ({"action": "triggered", "data": {"event": {}}, "event": {}}, "event_alert"),
    ({"event": {}, "group": {}, "project": None}, None), ({"event": {}, "group": []}, None),
    ({"event": {}, "data": None, "action": ""}, None),
])  # fmt: skip
def test_the_shape_is_told_by_the_keys(payload, resource):
    expected = EMPTY | {"resource": resource, "action": payload.get("action") or None}
    assert row_of(payload) == expected


NOT_ERRORS = [
    {}, {"action": "created"}, {"action": "created", "data": None}, {"action": "created", "data": []},
    {"action": "created", "data": {"error": None, "event": "x", "issue": []}},
    {"action": "created", "data": {"issue": {}, "activity": {}}}, {"action": "resolved", "data": {"issue": {}}},
    {"action": "created", "event": {}}, {"event": {}, "data": {}}, {"event": []}, {"group": {}, "project": {}},
]  # fmt: skip


@pytest.mark.parametrize("payload", NOT_ERRORS, ids=range(len(NOT_ERRORS)))
def test_anything_else_is_no_error(payload):
    assert find_error(payload) is None


# The field table: a column, the shape, and where its value is found, the best place first

BASES = {
    "error": {"action": "created", "data": {"error": {}}},
    "alert": {"action": "triggered", "data": {"event": {}}},
    "issue": {"action": "created", "data": {"issue": {}}},
    "documented": {"action": "created", "data": {"event": {}, "issue": {}, "project": {}}},
    "legacy": {"event": {}},
    "hook": {"event": {}, "group": {}, "project": {}},
}
AT = "2026-02-03T04:05:06"
API = "https://sentry.io/api/0"


def values(**exception):
    """Return an exception list of which only the last element counts."""
    return [{"type": "Inner", "value": "inner"}, None, exception]


# fmt: off
# Where any text is taken: a column, and for each shape the places, the best one first.
PLAIN_FIELDS = """
event_id: error data/error/event_id data/error/id; legacy event/event_id event/id; hook event/eventID event/id
issue_id: issue data/issue/id; legacy event/issue_id id; hook group/id event/groupID
short_id: issue data/issue/shortId; hook group/shortId; documented data/issue/shortId
exception_type: issue data/issue/metadata/type; hook event/metadata/type
exception_value: issue data/issue/metadata/value; hook event/metadata/value
title: documented data/event/occurrence/issueTitle data/event/title data/issue/title data/event/metadata/title
title: hook event/title group/title event/metadata/title
message: error data/error/metadata/title data/error/title; alert data/event/occurrence/issueTitle data/event/title
message: legacy event/message message event/logentry/message; hook event/message event/metadata/value event/title
message: issue data/issue/metadata/message data/issue/metadata/value data/issue/title
culprit: documented data/event/culprit data/event/occurrence/culprit data/issue/culprit; issue data/issue/culprit
culprit: legacy event/culprit culprit; hook event/culprit group/culprit
level: documented data/event/level data/event/occurrence/level data/event/tags/level data/issue/level
level: issue data/issue/level; legacy event/level level event/tags/level; hook event/tags/level group/level
status: issue data/issue/status; hook group/status
platform: documented data/event/platform data/issue/platform; issue data/issue/platform
platform: hook event/platform group/platform
logger: error data/error/logger data/error/tags/logger; issue data/issue/logger
logger: legacy event/logger logger event/tags/logger
project_id: issue data/issue/project/id; hook event/projectID
project_slug: documented data/project; legacy project_slug project; hook project/slug
project_name: documented data/issue/project/name data/project/name; legacy project_name; hook project/name
permalink: documented data/event/web_url data/issue/web_url data/issue/permalink
permalink: issue data/issue/web_url data/issue/permalink; legacy event/web_url url; hook event/url group/permalink
environment: error data/error/environment data/error/tags/environment
release: error data/error/release data/error/tags/release data/error/tags/sentry:release
release: hook event/release/version event/tags/release
rule: alert data/triggered_rule
"""
FIELD_TABLE = [
    ("issue_id", "documented", [("data/event/issue_id", "1"),
        ("data/event/issue_url", f"{API}/organizations/o/issues/2/", "2"),
        ("data/event/web_url", "https://o.sentry.io/issues/3/events/a/", "3"), ("data/issue/id", "4")]),
    ("issue_id", "error", [("data/error/issue_url", f"{API}/issues/2/", "2")]),
    ("exception_type", "error", [("data/error/exception/values", values(type="A"), "A"),
        ("data/error/exceptions", values(type="D"), "D"), ("data/error/metadata/type", "E")]),
    ("exception_type", "error", [("data/error/exception", values(type="A"), "A")]),
    ("exception_type", "documented", [("data/event/exceptions", values(type="A"), "A"),
        ("data/event/metadata/type", "B")]),
    ("exception_type", "legacy", [("event/exception/values", values(type="A"), "A"), ("event/metadata/type", "B")]),
    ("exception_value", "error", [("data/error/exception/values", values(value="A"), "A"),
        ("data/error/metadata/value", "B")]),
    ("title", "error", [("data/error/title", "A"), ("data/error/metadata", {"type": "T", "value": "V"}, "T: V")]),
    ("title", "issue", [("data/issue/title", "A"), ("data/issue/metadata", {"type": "T", "value": "V"}, "T: V")]),
    ("title", "issue", [("data/issue/metadata", {"title": "A", "type": "T", "value": "V"}, "A")]),
    ("title", "legacy", [("event/title", "A"), ("event/metadata/title", "B"),
        ("event/metadata", {"type": "T", "value": "V"}, "T: V"), ("message", "C")]),
    ("message", "error", [("data/error/message", "A"), ("data/error/logentry/formatted", "B"),
        ("data/error/logentry/message", "C"), ("data/error/occurrence/subtitle", "D"),
        ("data/error/contexts/feedback/message", "E"), ("data/error/metadata/message", "F"),
        ("data/error/exception/values", values(value="G"), "G"),
        ("data/error/metadata", {"value": "H", "title": "I"}, "H"), ("data/error/title", "J")]),
    ("project_id", "documented", [("data/event/project", 2**53, str(2**53)), ("data/issue/project/id", "6"),
        ("data/project/id", 7, "7")]),
    ("project_id", "legacy", [("event/project", 12, "12")]),
    ("project_slug", "documented", [("data/issue/project/slug", "a"), ("data/project/slug", "b"),
        ("data/event/url", f"{API}/projects/org/c/events/1/", "c")]),
    ("server", "documented", [("data/event/web_url", "https://a/issues/1/", "a"),
        ("data/issue/web_url", "https://b", "b"), ("data/issue/permalink", "https://c/", "c"),
        ("data/event/url", "https://d/api", "d"), ("data/issue/url", "https://e/api", "e"),
        ("data/event/issue_url", "https://f/api", "f")]),
    ("server", "legacy", [("event/web_url", "https://a", "a"), ("url", "https://b", "b"),
        ("event/url", "https://c", "c"), ("event/issue_url", "https://d", "d")]),
    ("server", "hook", [("group/permalink", "https://a", "a"), ("event/url", "https://b", "b")]),
    ("category", "documented", [("data/issue/issueCategory", "outage"),
        ("data/event/occurrence/type", 1006, "performance"), ("data/event/type", "csp", "csp")]),
    ("category", "hook", [("group/issueCategory", "error")]),
    ("timestamp", "documented", [("data/event/datetime", f"{AT}Z", f"{AT}Z"),
        ("data/event/timestamp", 0.5, "1970-01-01T00:00:00.500000Z"),
        ("data/event/received", 2, "1970-01-01T00:00:02Z"),
        ("data/issue/lastSeen", f"{AT}.5+02:00", "2026-02-03T02:05:06.500000Z"),
        ("data/issue/firstSeen", "2026-01-01T00:00:00Z")]),
    ("timestamp", "error", [("data/error/timestamp", AT, f"{AT}Z")]),
    ("timestamp", "hook", [("event/dateCreated", f"{AT}Z"), ("event/dateReceived", "2026-01-01T00:00:00Z"),
        ("group/lastSeen", "2026-01-02T00:00:00Z"), ("group/firstSeen", "2026-01-03T00:00:00Z")]),
    ("rule", "legacy", [("triggering_rules", ["First", "Second"], "First")]),
]
for line in PLAIN_FIELDS.strip().splitlines():
    column, _, shapes = line.partition(": ")
    for shape, *paths in map(str.split, shapes.split("; ")):
        FIELD_TABLE.append((column, shape, [(path, f"text {path}") for path in paths]))
# fmt: on
# What is no text, no id, no time, no list of objects and no object with a key that is looked for.
NOTHINGS = [None, "", [], {}, True, 1.5e300, [None], [[]], {"values": None}, {"unknown": "x"}]


def put(payload, path, value):
    """Set what lies at a path of keys; what is no dict on the way there becomes one."""
    *parents, last = path.split("/")
    for key in parents:
        if not isinstance(payload.get(key), dict):
            payload[key] = {}
        payload = payload[key]
    payload[last] = value


def filled(shape, places):
    """Return a payload of a shape with values at these places, given last to first."""
    payload = copy.deepcopy(BASES[shape])
    for path, value, *_ in places:
        put(payload, path, copy.deepcopy(value))
    return payload


@pytest.mark.parametrize(("column", "shape", "places"), FIELD_TABLE)
def test_a_field_is_the_first_place_that_holds_something(column, shape, places):
    for index, (_, value, *expected) in enumerate(places):
        for nothing in NOTHINGS:
            before = [(path, nothing) for path, *_ in places[:index]]
            payload = filled(shape, [*before, *places[index:]])
            # A place inside another that is nothing is lost with it, so it is put in again.
            put(payload, places[index][0], value)
            assert row_of(payload)[column] == (expected or [value])[0], (index, nothing)


@pytest.mark.parametrize(("column", "shape", "places"), FIELD_TABLE)
def test_a_field_is_null_if_nothing_is_there(column, shape, places):
    for path, *_ in places:
        keys = path.split("/")
        for nothing in NOTHINGS:
            for length in range(1, len(keys) + 1):
                row = row_of(filled(shape, [("/".join(keys[:length]), nothing)]))
                if row is not None:
                    assert row[column] == EMPTY[column], (path, nothing, length)


@pytest.mark.parametrize(("value", "expected"), [
    ("2026-03-14T09:26:53Z", "2026-03-14T09:26:53Z"), ("2026-03-14T09:26:53.5+00:00", "2026-03-14T09:26:53.500000Z"),
    ("2026-03-14T01:26:53-08:00", "2026-03-14T09:26:53Z"), ("2026-03-14 09:26:53", "2026-03-14T09:26:53Z"),
    (1773480413.589793, "2026-03-14T09:26:53.589793Z"), (0, "1970-01-01T00:00:00Z"), (-1, "1969-12-31T23:59:59Z"),
    ("0001-01-01T00:00:00+14:00", RECEIVED), ("9999-12-31T23:59:59-14:00", RECEIVED), ("today", RECEIVED),
    ("\ud800", RECEIVED), ("2" * 9000, RECEIVED), (1e300, RECEIVED), (float("inf"), RECEIVED),
    (float("nan"), RECEIVED), (2**70, RECEIVED), (True, RECEIVED), ([1], RECEIVED),
])  # fmt: skip
def test_a_time_is_utc_or_else_that_of_receipt(value, expected):
    assert row_of({"event": {"timestamp": value}})["timestamp"] == expected


@pytest.mark.parametrize(("value", "expected"), [
    ("x", "x"), (0, "0"), (2**70, str(2**70)), (-5, "-5"), (1.0, None), (False, None), ({}, None),
    ("a\0b", "a\ufffdb"), ("a\ud800b", "a?b"),
])  # fmt: skip
def test_an_id_is_text_whether_sent_as_text_or_number(value, expected):
    assert row_of({"event": {"event_id": value}})["event_id"] == expected


@pytest.mark.parametrize(("url", "server"), [
    ("https://sentry.io/organizations/a/issues/1/", "sentry.io"),
    ("https://Tea-House.Sentry.IO/issues/1/", "sentry.io"), ("https://us.sentry.io/api/0/", "sentry.io"),
    ("https://notsentry.io/", "notsentry.io"), ("https://sentry.io.example.org/", "sentry.io.example.org"),
    ("http://sentry:9000/issues/1/", "sentry:9000"), ("http://localhost:9001", "localhost:9001"),
    ("https://a.example.org:443/x", "a.example.org"), ("http://a.example.org:80?x", "a.example.org"),
    ("http://user:word@a.example.org/", "a.example.org"), ("http://[::1]:9000/", "[::1]:9000"), ("https://", None),
    ("/issues/1/", None), ("javascript:alert(1)", None), ("https://a b/", None),
    ("https://" + "a" * 300 + "/", "a" * 199 + "…"),
])  # fmt: skip
def test_a_server_is_the_host_of_a_link(url, server):
    assert row_of({"event": {"web_url": url}})["server"] == server


@pytest.mark.parametrize(("event", "category"), [
    ({}, "error"), ({"type": "error"}, "error"), ({"type": "transaction"}, "error"),
    *[({"type": kind}, kind) for kind in "csp hpkp expectct expectstaple nel feedback".split()],
    ({"type": ["csp"]}, "error"), ({"occurrence": {"type": 1019}}, "performance"),
    ({"occurrence": {"type": 2001}}, "profile"), ({"occurrence": {"type": 3502}}, "ai_detected"),
    ({"occurrence": {"type": 4001}}, "cron"), ({"occurrence": {"type": 5002}}, "replay"),
    ({"occurrence": {"type": 6001}, "type": "csp"}, "feedback"), ({"occurrence": {"type": 7001}}, "uptime"),
    ({"occurrence": {"type": 8001}}, "metric"), ({"occurrence": {"type": 11003}}, "preprod"),
    ({"occurrence": {"type": 12001}}, "instrumentation"), ({"occurrence": {"type": 13001}}, "configuration"),
    ({"occurrence": {"type": 9001}}, "other"), ({"occurrence": {"type": 99000}}, "other"),
    ({"occurrence": {"type": 0}}, "other"), ({"occurrence": {"type": True}}, "error"),
    ({"occurrence": {"type": 2**80}}, "error"), ({"occurrence": []}, "error"),
])  # fmt: skip
def test_a_category_tells_an_error_from_the_rest(event, category):
    assert row_of({"event": event})["category"] == category


def test_the_metadata_of_an_occurrence_are_no_exception():
    metadata = {"type": "Slow", "value": "SELECT", "title": "N+1 Query"}
    row = row_of({"event": {"metadata": metadata, "occurrence": {"subtitle": "SELECT 1"}}})
    assert (row["exception_type"], row["exception_value"]) == (None, None)
    assert (row["title"], row["message"]) == ("N+1 Query", "SELECT 1")


@pytest.mark.parametrize(("row", "expected"), [
    ({"event_id": "e", "issue_id": "5", "server": "s", "project_id": "1", "project_slug": "p"}, "e s 1"),
    ({"event_id": "e", "project_slug": "p"}, "e  p"), ({"event_id": "e", "action": None}, "e  "),
    ({"event_id": "e", "action": "triggered", "server": "s"}, "e s "),
    ({"issue_id": "5", "server": "s", "project_id": "1"}, "issue 5 s"), ({"issue_id": "5"}, "issue 5 "),
    ({"project_id": "1"}, "digest"), ({"event_id": "e", "action": "unresolved"}, "digest"),
    ({"issue_id": "5", "action": "unresolved"}, "digest"),
])  # fmt: skip
def test_the_identity_of_an_error_is_its_event_else_its_issue_else_its_body(row, expected):
    if expected == "digest":
        expected = hashlib.sha256(b"body").hexdigest()[:32]
    assert identity(EMPTY | {"action": "created"} | row, b"body") == expected


# The main exception and the frames of the crash


def named(type_, exception_id=None, **more):
    """Return an exception with an id in its mechanism."""
    mechanism = {"exception_id": exception_id}
    return {"type": type_, "value": type_.lower(), "mechanism": mechanism, **more}


CHAIN = [named("A", 2), named("B", 1), named("C", 0)]


@pytest.mark.parametrize(("main_id", "exceptions", "main"), [
    (None, CHAIN, "C"), (2, CHAIN, "A"), (1, CHAIN, "B"), (0, CHAIN, "C"), ("1", CHAIN, "B"), (7, CHAIN, "C"),
    (True, CHAIN, "C"), ([], CHAIN, "C"), (1, [{"type": "A", "mechanism": 5}, named("B")], "B"),
    (0, [named("A", 0), *[named("B", number) for number in range(1, 70)]], "A"),
    (0, [named("A", 0), *[named("B", number) for number in range(1, 600)]], "A"),
])  # fmt: skip
def test_the_main_exception_is_the_named_one_else_the_outermost(main_id, exceptions, main):
    event = {"main_exception_id": main_id, "exception": {"values": exceptions}}
    row = row_of({"event": event})
    shown = detail_of(**event)["exceptions"]
    assert (row["exception_type"], row["message"]) == (main, main.lower())
    assert row["title"] == f"{main}: {main.lower()}"
    assert [exception["type"] for exception in shown if exception["main"]] == [main]


def frame(**known):
    """Return a frame as it goes out."""
    return dict.fromkeys(collector.FRAME) | known


def trace(*functions):
    """Return a stacktrace as Sentry sends it."""
    return {"frames": [{"function": function} for function in functions]}


def traced(function, **more):
    """Return an exception or a thread with a stacktrace of one frame."""
    return {"stacktrace": trace(function), **more}


NO_FRAMES = [
    {}, {"stacktrace": None}, {"stacktrace": {"frames": []}}, {"stacktrace": {"frames": [None]}},
]  # fmt: skip
# An event, the functions of its stacktrace, and those of its exceptions.
FRAME_PLACES = [
    ({"exception": {"values": [traced("a"), traced("b")]}, "threads": [traced("c")]}, "b", ["a", "b"]),
    ({"exception": [traced("a")], "stacktrace": trace("b")}, "a", ["a"]),
    *[({"exception": [traced("a"), empty, None], "stacktrace": trace("b")}, "a", ["a", ""]) for empty in NO_FRAMES],
    ({"main_exception_id": 1, "exception": [named("A", 1, **traced("a")), named("B", 0, **traced("b"))]}, "a", ["a", "b"]),
    ({"exception": [traced("a"), {"thread_id": 5}], "threads": [traced("b", id=4), traced("c", id="5")]}, "c", ["a", "c"]),
    ({"exception": [traced("a"), {"thread_id": 5}], "threads": [{"id": 5}, traced("b")]}, "a", ["a", ""]),
    ({"exception": [{"thread_id": None}], "threads": [traced("b", id=None)]}, "b", ["b"]),
    ({"exception": {"values": [{}]}, "threads": [traced("a"), traced("b", crashed=True)]}, "b", ["b"]),
    ({"threads": {"values": [traced("a"), None, traced("b", current=True)]}, "stacktrace": trace("c")}, "b", []),
    ({"threads": [traced("a", current=True), traced("b", crashed=True)]}, "b", []),
    ({"threads": {"values": [{"crashed": True, "stacktrace": None}, traced("a")]}}, "a", []),
    ({"exception": None, "threads": None, "stacktrace": trace("a", "b")}, "ab", []),
    ({"exceptions": [{}], "stacktrace": trace("a")}, "a", ["a"]),
    ({"metadata": {"function": "a"}, "exception": [{}]}, "a", ["a"]),
    ({"stacktrace": [trace("a")], "threads": 5, "exception": "x"}, "", []),
    ({"stacktrace": {"frames": {"function": "x"}}}, "", []),
    ({}, "", []),
]  # fmt: skip


def functions(frames):
    return [item["function"] for item in frames]


@pytest.mark.parametrize(("event", "stacktrace", "exceptions"), FRAME_PLACES)
def test_the_stacktrace_is_that_of_the_crash(event, stacktrace, exceptions):
    found = detail_of(**event)
    assert functions(found["stacktrace"]) == list(stacktrace)
    shown = [functions(exception["frames"]) for exception in found["exceptions"]]
    assert shown == [list(names) for names in exceptions]


def test_an_issue_without_frames_has_its_place_as_the_only_one():
    issue = {"metadata": {"filename": "app/price.ts", "function": "priceOf", "type": "E"}}
    found = parse_detail({"action": "created", "data": {"issue": issue}})
    assert found["stacktrace"] == [frame(filename="app/price.ts", function="priceOf")]


@pytest.mark.parametrize(("sent", "shown"), EXPECTED["frames"], ids="12345")
def test_a_frame_has_every_key_in_either_spelling(sent, shown):
    assert detail_of(stacktrace={"frames": [sent]})["stacktrace"] == [shown]


# The other parts of the detail

NO_DETAIL = {
    "exceptions": [], "stacktrace": [], "tags": {}, "actor": None, "request": None, "breadcrumbs": [],
    "user": None, "contexts": None, "extra": None, "csp": None, "issue_stats": None,
}  # fmt: skip
NO_CLUES = {
    "errors": [], "omitted": [], "signals": [], "template": None, "locks": [], "evidence": {},
}  # fmt: skip


@pytest.mark.parametrize("payload", BASES.values(), ids=BASES)
def test_every_key_is_there_even_of_an_empty_delivery(payload):
    assert parse_detail(payload) == NO_DETAIL
    assert parse_clues(payload) == NO_CLUES


@pytest.mark.parametrize("nothing", NOTHINGS[:-1])
def test_a_part_of_the_wrong_type_is_nothing(nothing):
    parts = "exception threads stacktrace tags request breadcrumbs csp entries".split()
    found = detail_of(**dict.fromkeys(parts, nothing))
    if isinstance(nothing, dict):  # as sent
        assert found["csp"] == nothing
        found |= {"csp": None, "tags": {}}
    assert found == NO_DETAIL


@pytest.mark.parametrize("name", DETAILS)
def test_the_detail_of_a_sample_is_whole(name):
    found = parse_detail(load(name))
    assert json.dumps(found) == json.dumps(DETAILS[name])  # in the same order, too


@pytest.mark.parametrize(("tags", "expected"), [
    (None, {}), ("x", {}), ([], {}), ([["a", "1"], ["b", None], ["c", ""]], {"a": "1", "b": None, "c": ""}),
    ([["a", 1], ["b", True], ["c", [2]], ["d", 2**70]], {"a": "1", "b": "true", "c": "[2]", "d": str(2**70)}),
    ([{"key": "a", "value": "1"}, {"key": "b"}, {"value": "2"}], {"a": "1", "b": None}),
    ({"a": "1", "b": {"c": 2}}, {"a": "1", "b": '{"c": 2}'}),
    ([["a"], ["a", "b", "c"], [1, "x"], "ab", None, 5, [None, None]], {}),
    ([["\ud800", "\udfff\0"]], {"?": "?\ufffd"}), ([["a", "1"], ["a", "2"]], {"a": "1, 2"}),
])  # fmt: skip
def test_tags_are_one_dict_of_text_whatever_form_they_had(tags, expected):
    assert detail_of(tags=tags)["tags"] == expected


def crumbs_of(*crumbs):
    shown = detail_of(breadcrumbs={"values": list(crumbs)})["breadcrumbs"]
    return [crumb["message"] for crumb in shown]


def crumb(message, timestamp):
    return {"message": message, "timestamp": timestamp}


@pytest.mark.parametrize(("crumbs", "expected"), [
    ([crumb("a", 3), crumb("b", 1), crumb("c", 2)], "bca"),
    ([crumb("a", 3), crumb("b", 1), crumb("c", 3), crumb("d", 1)], "bdac"),
    ([crumb("a", "2026-01-01T00:00:00.5Z"), crumb("b", "2026-01-01T00:00:00Z"), crumb("c", 5)], "cba"),
    ([crumb("a", "2026-01-01T02:00:00+02:00"), crumb("b", "2025-12-31T23:59:59")], "ba"),
    ([crumb("a", 3), crumb("b", None), crumb("c", 2)], "abc"),
    ([crumb("a", 3), None, crumb("b", True), crumb("c", 2)], "abc"), ([], ""),
])  # fmt: skip
def test_breadcrumbs_are_sorted_by_time_where_all_have_one(crumbs, expected):
    assert crumbs_of(*crumbs) == list(expected)


def test_breadcrumbs_are_the_newest_twenty():
    crumbs = [crumb(str(number), number) for number in range(50)]
    newest = [str(number) for number in range(30, 50)]
    assert crumbs_of(*crumbs) == newest
    assert crumbs_of(*reversed(crumbs)) == newest
    assert crumbs_of(*[{"message": str(number)} for number in range(50)]) == newest


NO_STATS = dict.fromkeys("count user_count first_seen last_seen priority".split())


@pytest.mark.parametrize(("key", "sent", "expected"), [
    ("actor", {"type": "user", "id": 7, "name": "Anna"}, {"type": "user", "id": "7", "name": "Anna"}),
    ("actor", {"id": [], "name": None}, None), ("actor", {"id": 0}, {"type": None, "id": "0", "name": None}),
    ("actor", None, None), ("actor", [], None), ("actor", "Anna", None), ("issue_stats", {}, None),
    ("issue_stats", {"count": [], "userCount": "many", "firstSeen": 1e300, "priority": 5}, None),
    ("issue_stats", {"count": "9" * 19, "userCount": 0}, NO_STATS | {"user_count": 0}),
    ("issue_stats", {"count": "12", "userCount": 3, "firstSeen": "2026-01-01T00:00:00Z", "lastSeen": 5,
        "priority": "high"}, {"count": 12, "user_count": 3, "first_seen": "2026-01-01T00:00:00Z",
        "last_seen": "1970-01-01T00:00:05Z", "priority": "high"}),
])  # fmt: skip
def test_an_actor_and_the_counts_of_an_issue_are_objects_or_null(key, sent, expected):
    payload = {"action": "created", "data": {"issue": sent}, "actor": sent}
    if key == "actor":
        payload["data"] = {"issue": {}}
    assert parse_detail(payload)[key] == expected


@pytest.mark.parametrize("parts", [
    {"csp": {"blocked_uri": "https://evil.example.com", "effective_directive": "img-src"},
     "user": {"id": 7, "ip_address": "127.0.0.1"}, "contexts": {"os": {"name": "Linux"}, "app": None},
     "extra": {"n": [1, 2.5, None, True]}},
    {"user": {}, "contexts": {}, "extra": {}, "csp": {}},
])  # fmt: skip
def test_csp_reports_users_contexts_and_extra_are_as_sent(parts):
    found = detail_of(**parts)
    assert {key: found[key] for key in parts} == parts


REQUESTS = [
    ({"query_string": "a=b&c=d"}, {"query": "a=b&c=d"}),
    ({"query_string": [["a", "b"], ["a", "c"], None]}, {"query": "a=b&a=c"}),
    ({"query_string": {"a": "b", "c": None}}, {"query": "a=b&c="}), ({"query": [["a", "b"]]}, {"query": "a=b"}),
    ({"headers": [["Host", "x"], ["Accept", ["y"]]]}, {"headers": {"Host": "x", "Accept": '["y"]'}}),
    ({"headers": {"Host": "x"}}, {"headers": {"Host": "x"}}),
    ({"headers": [["Via", "a"], ["Via", "b"], ["Via", "c"]]}, {"headers": {"Via": "a, b, c"}}),
    ({"data": "plain words"}, {"data": "plain words"}), ({"data": {"a": 1}}, {"data": {"a": 1}}),
    ({"data": ' {"a": [1]}'}, {"data": {"a": [1]}}), ({"data": "[1, 2"}, {"data": "[1, 2"}),
    ({"data": "[" * 90_000}, {"data": "[" * 8191 + "…"}),
    ({"method": "GET", "url": [], "headers": 7, "query_string": 1.5}, {"method": "GET"}),
]  # fmt: skip


@pytest.mark.parametrize(("request_", "expected"), REQUESTS, ids=range(len(REQUESTS)))
def test_a_request_is_read_in_every_form(request_, expected):
    nothing = dict.fromkeys(("method", "url", "query", "headers", "data"))
    assert detail_of(request=request_)["request"] == nothing | expected


# Secrets are masked by their name, in everything but the payload

SECRET_NAMES = (
    "authorization Authorization PROXY-AUTHORIZATION HTTP_AUTHORIZATION cookie Set-Cookie HTTP_COOKIE cookies "
    "password Password db_password password2 passwd DB_PASSWD secret client_secret SENTRY_CLIENT_SECRET "
    "token access_token X-Auth-Token csrfmiddlewaretoken refreshToken apikey api_key X-Api-Key API-KEY "
    "credentials AWS_CREDENTIALS session sessionid PHPSESSID csrf X-CSRF-Header x_xsrf private_key PRIVATE-KEY "
    "dsn SENTRY_DSN sentryDsn passphrase mysql_pwd jwt user[password] dbPass basicAuth idJwt passcode connect.sid "
    "Ocp-Apim-Subscription-Key x-functions-key accountKey X-Amz-Signature sig otp"
).split() + ["api key", "private key", "set cookie"]
PLAIN_NAMES = (
    "author authenticated host key keyboard path compass user_agent accept recordsNumber friends_name content-type "
    "monkey bypass signature inside design options hotkey"
).split()


NAME = "NAME"  # stands for the name of a secret, "hush" for the secret
FRAMES = {"frames": [{"vars": {NAME: "hush", "a": {"b": [{NAME: {"c": "hush"}}]}}}]}
MASKED = {NAME: "[masked]"}
# An event, the path in its detail, and what is shown there.
SECRETS = [
    ({"request": {"headers": [[NAME, "hush"], ["Host", "x"]]}}, "request.headers", {**MASKED, "Host": "x"}),
    ({"request": {"headers": {NAME: "hush"}}}, "request.headers", MASKED),
    ({"request": {"headers": {NAME: ["hush"]}}}, "request.headers", MASKED),
    ({"request": {"headers": [{"key": NAME, "value": "hush"}]}}, "request.headers", MASKED),
    ({"request": {"url": "https://x/?a=1&NAME=hush#y"}}, "request.url", "https://x/?a=1&NAME=[masked]#y"),
    ({"request": {"url": "https://x/#NAME=hush"}}, "request.url", "https://x/#NAME=[masked]"),
    ({"request": {"query_string": "a=1&NAME=hush;b=2"}}, "request.query", "a=1&NAME=[masked];b=2"),
    ({"request": {"query_string": "?NAME=hush"}}, "request.query", "?NAME=[masked]"),
    ({"request": {"query_string": [["a", "1"], [NAME, "hush&hush"]]}}, "request.query", "a=1&NAME=[masked]"),
    ({"request": {"query_string": {NAME: "hush"}}}, "request.query", "NAME=[masked]"),
    ({"request": {"data": {"a": 1, NAME: ["hush"]}}}, "request.data", {"a": 1, **MASKED}),
    ({"request": {"data": [[NAME, "hush"], ["a", "b"]]}}, "request.data", [[NAME, "[masked]"], ["a", "b"]]),
    ({"request": {"data": "a=1&NAME=hush"}}, "request.data", "a=1&NAME=[masked]"),
    ({"request": {"data": "NAME=hush"}}, "request.data", "NAME=[masked]"),
    ({"request": {"data": '{"a": [{"NAME": "hush"}]}'}}, "request.data", {"a": [MASKED]}),
    ({"request": {"data": ' [{"NAME": {"a": "hush"}}]'}}, "request.data", [MASKED]),
    ({"request": {"data": '{"a": 1, "NAME": "hush'}}, "request.data", '{"a": 1, "NAME": [masked]'),
    ({"request": {"data": "{'NAME': 'hu\\'sh', 'n': 1}"}}, "request.data", "{'NAME': [masked]"),
    ({"request": {"data": '{"NAME":hush,"a":'}}, "request.data", '{"NAME":[masked]'),
    ({"request": {"data": '{"NAME": "hush", "a": "' + "x" * 200_000}}, "request.data", '{"NAME": [masked]'),
    ({"request": {"url": "x", "cookies": [[NAME, "hush"]], "env": {NAME: "hush"}}}, "request.url", "x"),
    ({"stacktrace": FRAMES}, "stacktrace.0.vars", {**MASKED, "a": {"b": [MASKED]}}),
    ({"exception": [{"stacktrace": FRAMES}]}, "stacktrace.0.vars.NAME", "[masked]"),
    ({"threads": [{"crashed": True, "stacktrace": FRAMES}]}, "stacktrace.0.vars.NAME", "[masked]"),
    ({"exception": [{"mechanism": {"data": {NAME: "hush"}}}]}, "exceptions.0.mechanism.data", MASKED),
    ({"breadcrumbs": [{"data": {NAME: "hush", "a": [[NAME, "hush"]]}}]}, "breadcrumbs.0.data.a", [[NAME, "[masked]"]]),
    ({"breadcrumbs": [{"data": {"http.query": "NAME=hush"}}]}, "breadcrumbs.0.data", {"http.query": "NAME=[masked]"}),
    ({"breadcrumbs": [{"message": "the NAME was found"}]}, "breadcrumbs.0.message", "the NAME was found"),
    ({"user": {NAME: "hush"}}, "user", MASKED),
    ({"contexts": {"response": {"headers": [[NAME, "hush"]]}}}, "contexts.response.headers", [[NAME, "[masked]"]]),
    ({"extra": {NAME: {"a": "hush"}, "a": {"b": {"c": {"d": {"e": {NAME: 5.5}}}}}}}, "extra.a.b.c.d.e", MASKED),
    ({"extra": {"a": [NAME, "hush", "Host", "x"]}}, "extra.a", [NAME, "[masked]", "Host", "x"]),
    ({"extra": {"a": {"name": NAME, "value": "hush"}}}, "extra.a", {"name": NAME, "value": "[masked]"}),
    ({"extra": {"a": [{"key": NAME, "value": "hush"}]}}, "extra.a", [{"key": NAME, "value": "[masked]"}]),
    ({"tags": [[NAME, "hush"]]}, "tags", MASKED),
    ({"tags": {NAME: "hush"}}, "tags", MASKED),
    ({"tags": [["url", "/pay?NAME=hush"]]}, "tags.url", "/pay?NAME=[masked]"),
    ({"errors": [], "extra": {"a": '{"n": {"NAME": "hush"}}'}}, "extra.a", '{"n": {"NAME": [masked]'),
    ({"csp": {"blocked_uri": "https://x/?NAME=hush"}}, "csp.blocked_uri", "https://x/?NAME=[masked]"),
]  # fmt: skip


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_secret_is_masked_wherever_its_name_stands(name):
    for event, path, expected in SECRETS:
        event_, path_, expected_ = json.loads(
            json.dumps([event, path, expected]).replace(NAME, name)
        )
        found = detail_of(**event_)
        assert "hush" not in json.dumps(found), event_
        if "." not in name:
            assert at(found, path_) == expected_, event_


@pytest.mark.parametrize("name", PLAIN_NAMES)
def test_what_is_no_secret_by_its_name_is_shown(name):
    found = detail_of(extra={name: "shown"}, request={"query_string": f"{name}=shown"})
    assert found["extra"] == {name: "shown"}
    assert found["request"]["query"] == f"{name}=shown"


@pytest.mark.parametrize(("value", "expected"), [
    (["x", "token", "y"], None), (["the password was wrong", "shown"], None),
    (["Cookie: a", "B: c"], ["Cookie: a", "B: c"]),
    ({"max_tokens": 4096, "token_count": 5, "has_session": True}, None), ({"token": None, "password": False}, None),
    ({"token": 482913, "tokens": "hush"}, {"token": "[masked]", "tokens": "[masked]"}),
    ({"key": "a", "value": "b"}, None),
    ({"note": "    token=None,", "sql": "SELECT * FROM session WHERE session_key=1"}, None),
    ("https://bob:hush@a.example.com/x", "https://bob:[masked]@a.example.com/x"),
    ("no postgres://bob:hu@sh@db for you", "no postgres://bob:[masked]@db for you"),
    ("https://a.example.com:8080/@bob", "https://a.example.com:8080/@bob"),
    ("redis://:hush@db", "redis://:[masked]@db"),
])  # fmt: skip
def test_what_is_masked_is_the_secret_alone(value, expected):
    assert detail_of(extra={"a": value})["extra"] == {"a": value if expected is None else expected}


# What once showed a secret: where it lies in an event, and the value there
LEAKS = {
    "a URL in a list": {"extra": {"v": ["https://u:hush@h/"]}},
    "a URL that is no link": {"extra": {"conn": "postgres://u:hush@h/db"}},
    "a parameter in a list": {"request": {"headers": [["Referer", ["https://h/?token=hush"]]]}},
    "a frame's file": {"stacktrace": {"frames": [{"filename": "https://u:hush@h/a.js"}]}},
    "words around a URL": {"title": "cannot reach postgres://u:hush@db now"},
    "a URL that was cut": {"title": "x" * 8160 + " https://user:hushhushhushhush@h/"},
    "a breadcrumb": {"breadcrumbs": [{"message": "GET https://h/?api_key=hush done"}]},
    "a nested member": {"extra": {"v": '{"user":{"password":"hush"}}'}},
    "a list under a secret name": {"extra": {"v": '{"password":["x","hush"],"a":1}'}},
    "a body that was cut": {"request": {"data": '{"user":{"password":"hush"},"x":"'}},
    "a problem": {"errors": [{"type": "invalid_data", "name": "password", "value": "hush"}]},
    "a name in quotes": {"stacktrace": {"frames": [{"vars": {"a": {"'pass'": "hush"}}}]}},
    "a name in brackets": {"request": {"query_string": "user[pass]=hush"}},
    "a path in words": {"title": "GET /reset?token=hush 500"},
    "a user with an address": {"title": "smtp://me@example.com:hush@example.com"},
    "a URL that Sentry cut": {"title": "cannot reach postgres://app:hush..."},
    "a line of text": {"request": {"data": "user=a\r\npassword=hush"}},
    "a problem with a cookie": {"errors": [{"name": "request.cookies", "value": "sid=hush"}]},
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_once_showed_a_secret_hides_it(name):
    payload = event_payload(**LEAKS[name])
    shown = json.dumps([row_of(payload), parse_detail(payload), parse_clues(payload)])
    assert "hush" not in shown and "[masked]" in shown


@pytest.mark.parametrize("part", ["tags", "extra"])
def test_every_key_is_there_however_much_another_holds(part):
    values = {f"k{number}": "x" * 8000 for number in range(400)}
    event = {"request": {"url": "https://h/"}, "user": {"id": 1}, part: values}
    payload = event_payload(**event)
    detail = parse_detail(payload)
    assert detail.keys() == NO_DETAIL.keys()
    assert detail["request"].keys() == {"method", "url", "query", "headers", "data"}


def test_words_beside_a_url_stay_and_so_does_a_url_without_secrets():
    title = "see https://h:8080/a?b=c&token=hush then more words; ok"
    assert row_of(event_payload(title=title))["title"] == title.replace("hush", "[masked]")


# What is too much is cut, and an ellipsis says so


def test_text_in_a_column_is_cut_and_says_so():
    row = row_of({"event": {"title": "x" * 8193, "culprit": "y" * 8192}})
    assert row["title"] == "x" * 8191 + "…"
    assert row["culprit"] == "y" * 8192


def many(number):
    """Return an object of many values."""
    return {f"k{index}": index for index in range(number)}


def nested(levels):
    """Return objects in objects, so many that the last one holds a number."""
    value = 1
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(("value", "expected"), [
    (many(501), many(500) | {"…": "…"}), ({"a": list(range(502))}, {"a": [*range(500), "…"]}),
    ({"a": "x" * 9000}, {"a": "x" * 8191 + "…"}), ({"k" * 300: 1}, {"k" * 199 + "…": 1}), (nested(12), nested(12)),
    ({"a": nested(12)}, json.loads(json.dumps(nested(13)).replace('{"a": 1}', '{"…": "…"}'))),
    ({"a": 1e400, "b": 2**70, "c": float("nan")}, {"a": "inf", "b": str(2**70), "c": "nan"}),
    ({"a": [[], {}], "b": -0.5, "c": None}, {"a": [[], {}], "b": -0.5, "c": None}),
    ({"\ud800": "\0"}, {"?": "\ufffd"}),
])  # fmt: skip
def test_an_object_that_cannot_be_sent_on_is_made_one_that_can(value, expected):
    assert detail_of(extra=value)["extra"] == expected
    assert detail_of(contexts=value)["contexts"] == expected


@pytest.mark.parametrize("tags", [
    list(map(list, many(505).items())), [{"key": key, "value": 1} for key in many(505)], many(505),
])  # fmt: skip
def test_five_hundred_tags_are_kept(tags):
    assert list(detail_of(tags=tags)["tags"]) == [*many(500), "…"]


def test_a_long_stacktrace_keeps_its_newest_frames():
    frames = [{"function": str(number)} for number in range(1300)]
    shown = functions(detail_of(exception=[{"stacktrace": {"frames": frames}}])["stacktrace"])
    assert shown == ["…", *[str(number) for number in range(1050, 1300)]]
    assert len(detail_of(stacktrace={"frames": frames[:250]})["stacktrace"]) == 250


def test_an_event_has_the_newest_frames_of_all_its_exceptions():
    frames = [{"function": str(number)} for number in range(300)]
    found = detail_of(exception=[{"stacktrace": {"frames": frames}}] * 40)["exceptions"]
    numbers = [len(exception["frames"]) for exception in found]
    assert 2_000 < sum(numbers) < 10_000 and numbers == sorted(numbers) and numbers[-1] == 251
    assert functions(found[0]["frames"]) == ["…"]


def test_a_long_chain_keeps_its_outermost_exceptions():
    found = detail_of(exception=[{"type": str(number)} for number in range(60)])["exceptions"]
    assert [item["type"] for item in found] == ["…", *[str(number) for number in range(10, 60)]]
    nothing = {"value": None, "module": None, "mechanism": None, "main": False, "frames": []}
    assert found[0] == nothing | {"type": "…"}


def test_source_lines_are_the_nearest_and_a_long_one_is_cut_around_its_column():
    lines = [str(number) for number in range(30)]
    sent = {"post_context": lines, "pre_context": lines, "context_line": "x" * 2000}
    around = {"context_line": "a" * 3000 + "CRASH" + "b" * 3000, "colno": 3003}
    shown = detail_of(stacktrace={"frames": [sent, around]})["stacktrace"]
    lines = {"post_context": lines[:20], "pre_context": lines[10:]}
    assert shown[0] == frame(context_line="x" * 1023 + "…", **lines)
    assert len(shown[1]["context_line"]) == 1024
    assert shown[1]["context_line"].index("CRASH") in range(500, 515)
    assert shown[1]["context_line"].startswith("…a") and shown[1]["context_line"].endswith("b…")


def test_a_tree_is_cut_where_it_has_too_many_values():
    shown = detail_of(extra={f"k{index}": many(400) for index in range(300)})["extra"]
    assert sum(map(len, shown.values())) in range(48_000, 51_000)
    assert shown["k299"] == {"…": "…"}


SIZE = 5 * 2**20


def repeat(item, size=SIZE):
    """Return a list of one item that takes `size` bytes as JSON."""
    return [item] * (size // (len(wire(item)) + 1))


KEYS = dict.fromkeys(map(str, range(SIZE // 13)), 1)
FRAMES = repeat({"in_app": True, "vars": {"a": 1}, "lineno": 5}, SIZE // 50)
DEEP = json.loads("[" * 300 + "]" * 300)
NAMES = [{f"{'x' * 180}Y{part}{name}": 1 for name in range(500)} for part in range(50)]
BOMBS = {
    "frames": {"exception": [{"stacktrace": {"frames": repeat({})}}]},
    "traces": {"exception": repeat({"stacktrace": {"frames": FRAMES}})},
    "exceptions": {"exception": repeat({"mechanism": {"exception_id": 1}}), "main_exception_id": 5},
    "breadcrumbs": {"breadcrumbs": repeat({"timestamp": 1})},
    "tag object": {"tags": KEYS},
    "threads": {"threads": repeat({"id": 1}), "exception": [{"thread_id": 7}]},
    "contexts": {"contexts": KEYS},
    "nested": {"extra": {"a": repeat(DEEP)}},
    "variables": {"stacktrace": {"frames": [{"vars": KEYS}]}},
    "source lines": {"stacktrace": {"frames": [{"pre_context": repeat(1)}]}},
    "form": {"request": {"data": "a=b&" * (SIZE // 4)}},
    "json": {"request": {"data": "{" + '"a":1,' * (SIZE // 8)}},
    "title": {"title": "x" * SIZE},
    "link": {"web_url": "https://" + "a@/issues/" * (SIZE // 10)},
    "links": {"extra": {str(number): "https://x/?" + "a=b&" * 2000 for number in range(500)}},
    "names": {"extra": {"a": NAMES}},
    "query": {"request": {"query_string": repeat(["a", "b"])}},
    "locks": {"threads": repeat({"held_locks": {"a": {"b": 8}}, "stacktrace": {"frames": [{}]}})},
}


@pytest.mark.parametrize("name", BOMBS)
def test_the_largest_delivery_is_read_in_the_time_and_the_memory_of_a_few(name):
    payload = {"action": "created", "data": {"error": BOMBS[name]}}
    started = time.process_time()
    row = row_of(payload)
    found = parse_detail(payload)
    clues = parse_clues(payload)
    # Ten times what it takes on a slow machine; without bounds the worst ones take up to 15 s.
    assert time.process_time() - started < 1
    check_storable(row, found | clues)
    assert len(json.dumps(found)) < 8_000_000


def test_the_largest_detail_takes_little_memory():
    payload = {"event": BOMBS["traces"]}
    tracemalloc.start()
    parse_detail(payload)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60_000_000


# Wrong types at every position of every sample

JUNK = [
    None, "", "\ud800\0", 0, -1, 2**70, 1e400, True, [], {}, [None], [[1, 2]], {"values": 5}, {"frames": [5]}, "2026",
]  # fmt: skip


def positions(value, path=()):
    """Yield the path of every position in a JSON value."""
    items = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from positions(item, (*path, key))


def check_storable(row, detail):
    """Fail unless a row fits its columns and a detail can be sent as JSON in UTF-8."""
    words = "".join(value for value in row.values() if value is not None)
    assert "\0" not in words
    words.encode()
    sent = json.dumps(detail, ensure_ascii=False, allow_nan=False)
    assert "\\u0000" not in sent
    sent.encode()


@pytest.mark.parametrize("name", ["issue.created", "legacy_plugin", "service_hook", "rich"])
def test_any_junk_at_any_position_is_survived(name):
    original = EXPECTED["rich"] if name == "rich" else load(name)
    payload = copy.deepcopy(original)
    for path in list(positions(payload)):
        holder = payload
        for key in path[:-1]:
            holder = holder[key]
        kept = holder[path[-1]]
        for junk in JUNK:
            holder[path[-1]] = junk
            row = row_of(payload)
            if row is not None:
                check_storable(row, parse_detail(payload) | parse_clues(payload))
        holder[path[-1]] = kept
    assert payload == original


# What else explains a crash


@pytest.mark.parametrize(("clue", "event", "expected"), EXPECTED["clues"])
def test_clues_tell_what_else_explains_a_crash(clue, event, expected):
    assert parse_clues(event_payload(**event))[clue] == expected


@pytest.mark.parametrize("name", ROWS)
def test_clues_stand_beside_the_exceptions_of_the_detail(name):
    clues = parse_clues(load(name))
    exceptions = parse_detail(load(name))["exceptions"]
    assert len(clues["omitted"]) == len(clues["signals"]) == len(exceptions)


# Bytes that are no delivery, and bytes that hardly are one

BAD_BODIES = [
    (b"", "not JSON"), (b" \n", "not JSON"), (b"{", "not JSON"), (b"{'action': 'created'}", "not JSON"),
    (b'{"action": "created"} x', "not JSON"), (b"NaN", "not JSON"),
    (b'{"action": "created", "data": {"error": {"timestamp": NaN}}}', "not JSON"),
    (b'{"action": "created", "data": -Infinity}', "not JSON"), (b"[]", "no object"), (b'"x"', "no object"),
    (b"5", "no object"), (b"null", "no object"), (b"{}", "no delivery"), (b'{"action": ""}', "no delivery"),
    (b'{"action": 5, "event": []}', "no delivery"),
    (b'{"action": ["created"], "data": {"error": {}}}', "no delivery"), (b"\xff\xfe{}", "not UTF-8"),
    ('{"action": "created"}'.encode("utf-16"), "not UTF-8"),
    (gzip.compress(b'{"action": "created", "data": {"error": {}}}'), "not UTF-8"),
    ('{"action": "created", "data": "é"}'.encode("latin-1"), "not UTF-8"),
    (b'{"action": "\xed\xa0\x80"}', "not UTF-8"), ('{"action": "created"}'.encode("utf-16-le"), "not JSON"),
    (b"[" * 100_000, "not JSON"), (b'{"action":' * 100_000, "not JSON"),
    (b'{"action":"created","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "reason"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bytes_that_are_no_delivery_are_refused(body, reason):
    with pytest.raises(Refused) as refused:
        parse_body(body)
    assert refused.value.reason == reason


@pytest.mark.parametrize("name", [*ROWS, *NO_ERRORS])
def test_the_bytes_of_a_sample_are_a_delivery(name):
    spaced = json.dumps(load(name), ensure_ascii=False, indent=1) + "\n"
    for body in (wire(load(name)), spaced.encode(), b"\xef\xbb\xbf" + wire(load(name))):
        assert parse_body(body) == load(name)
        assert collector.load(body) == load(name)


def load_deep(body, depth):
    """Read a stored body back with `depth` more frames on the stack."""
    if depth:
        return load_deep(body, depth - 1)
    return collector.load(body)


def deepest_body():
    """Return the most nested body that is taken here."""
    taken = None
    for levels in range(100, 20_000, 25):
        body = b'{"event":{"extra":{"a":' + b"[" * levels + b"]" * levels + b"}}}"
        try:
            parse_body(body)
        except Refused:
            return taken
        taken = body
    return taken


@pytest.mark.parametrize("used", [0, 100, 300])
def test_the_most_nested_body_that_is_taken_is_read_back_on_any_stack(used):
    body = deepest_body()
    room = sys.getrecursionlimit() - used - 200
    payload = load_deep(body, max(room, 0))
    assert '[["…"]]' in json.dumps(parse_detail(payload)["extra"], ensure_ascii=False)


def test_threads_with_locks_are_bounded():
    held = {str(n): {"address": n} for n in range(50)}
    thread = {"held_locks": held, "stacktrace": {"frames": [{"function": "f"}]}}
    clues = parse_clues(event_payload(threads={"values": [thread] * 5000}))
    assert len(clues["locks"]) == 20 and len(clues["locks"][0]["locks"]) == 20


def test_each_clue_belongs_to_its_exception_though_many_are_left_out():
    values = []
    for n in range(60):
        mechanism = {"exception_id": n, "meta": {"signal": {"name": f"S{n}"}}}
        values.append({"type": f"E{n}", "mechanism": mechanism})
    payload = event_payload(exception={"values": values}, main_exception_id=3)
    types = [exception["type"] for exception in parse_detail(payload)["exceptions"]]
    told = list(zip(types, parse_clues(payload)["signals"], strict=True))
    kept = [(f"E{n}", f"S{n}") for n in (3, *range(11, 60))]
    assert told == [("…", None), *kept]
