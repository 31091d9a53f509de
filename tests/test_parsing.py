"""The parser: every field from every shape, and nothing that a payload may hold breaks it."""

import copy
import json

import pytest
from conftest import load, wire

from collector import COLUMNS, Refused, find_error, parse_body, parse_detail, parse_error

RECEIVED = "2026-04-01T00:00:00.000001Z"
EMPTY = dict.fromkeys(COLUMNS[1:]) | {"received_at": RECEIVED, "timestamp": RECEIVED}
SAMPLES = (
    "error.created.python error.created.java error.created.native event_alert.triggered.javascript "
    "event_alert.triggered.message issue.created documented.created legacy_plugin service_hook sentry8_legacy"
).split()
NO_ERRORS = "issue.resolved comment.created installation.created metric_alert.resolved".split()
TEA = "Kännchen übergelaufen: 抹茶ラテ ☕️🍵"

ROWS = {
    "error.created.python": {
        "timestamp": "2026-03-14T09:26:53.589793Z",
        "resource": "error",
        "action": "created",
        "event_id": "6f0a4d2b9c1e4f7a8b3d5e6c7a8b9c0d",
        "issue_id": "5900000011",
        "title": "CheckoutError: cannot price basket 4711",
        "message": "cannot price basket 4711",
        "culprit": "checkout",
        "level": "error",
        "platform": "python",
        "environment": "production",
        "release": "shop@2.14.0",
        "project_id": "4507000000000001",
        "project_slug": "shop",
        "exception_type": "CheckoutError",
        "exception_value": "cannot price basket 4711",
        "permalink": "https://tea-house.sentry.io/issues/5900000011/events/6f0a4d2b9c1e4f7a8b3d5e6c7a8b9c0d/",
    },
    "error.created.java": {
        "timestamp": "2026-03-15T22:10:05Z",
        "resource": "error",
        "action": "created",
        "event_id": "1b2c3d4e5f60718293a4b5c6d7e8f901",
        "issue_id": "5900000022",
        "title": "KettleException: cannot boil",
        "message": "cannot boil",
        "culprit": "com.example.brew.Kettle in boil",
        "level": "fatal",
        "platform": "java",
        "logger": "com.example.brew.Kettle",
        "environment": "staging",
        "release": "brew-4.2",
        "project_id": "4507000000000002",
        "project_slug": "brew",
        "exception_type": "KettleException",
        "exception_value": "cannot boil",
        "permalink": "https://tea-house.sentry.io/issues/5900000022/events/1b2c3d4e5f60718293a4b5c6d7e8f901/",
    },
    "error.created.native": {
        "timestamp": "2026-03-16T05:00:00.250000Z",
        "resource": "error",
        "action": "created",
        "event_id": "c0ffee00c0ffee00c0ffee00c0ffee00",
        "issue_id": "5900000033",
        "title": "SIGSEGV: Segfault",
        "message": "Segfault",
        "culprit": "pour",
        "level": "fatal",
        "platform": "native",
        "environment": "production",
        "release": "cup@1.0.7+42",
        "project_id": "4507000000000003",
        "project_slug": "cup",
        "exception_type": "SIGSEGV",
        "exception_value": "Segfault",
        "permalink": "https://tea-house.sentry.io/issues/5900000033/events/c0ffee00c0ffee00c0ffee00c0ffee00/",
    },
    "event_alert.triggered.javascript": {
        "timestamp": "2026-03-17T18:45:12.100000Z",
        "resource": "event_alert",
        "action": "triggered",
        "event_id": "77aa77aa77aa77aa77aa77aa77aa77aa",
        "issue_id": "5900000044",
        "title": "TypeError: cup is null",
        "message": "cup is null",
        "culprit": "?(static/teas)",
        "level": "error",
        "platform": "javascript",
        "project_id": "4507000000000004",
        "project_slug": "front",
        "exception_type": "TypeError",
        "exception_value": "cup is null",
        "permalink": "https://tea-house.sentry.io/issues/5900000044/events/77aa77aa77aa77aa77aa77aa77aa77aa/",
        "rule": "Every new error",
    },
    "event_alert.triggered.message": {
        "timestamp": "2026-03-18T00:00:00Z",
        "resource": "event_alert",
        "action": "triggered",
        "event_id": "0fedcba9876543210fedcba987654321",
        "issue_id": "5900000055",
        "title": TEA,
        "message": TEA,
        "level": "warning",
        "platform": "node",
        "logger": "kueche",
        "environment": "prüfstand",
        "release": "werkstatt-7",
        "project_id": "4507000000000005",
        "project_slug": "kueche",
        "permalink": "https://tea-house.sentry.io/issues/5900000055/events/0fedcba9876543210fedcba987654321/",
    },
    "issue.created": {
        "timestamp": "2026-03-14T09:26:53.589000Z",
        "resource": "issue",
        "action": "created",
        "issue_id": "5900000011",
        "short_id": "SHOP-2F",
        "title": "CheckoutError: cannot price basket 4711",
        "message": "cannot price basket 4711",
        "culprit": "checkout",
        "level": "error",
        "status": "unresolved",
        "platform": "python",
        "project_id": "4507000000000001",
        "project_slug": "shop",
        "project_name": "Shop",
        "exception_type": "CheckoutError",
        "exception_value": "cannot price basket 4711",
        "permalink": "https://tea-house.sentry.io/issues/5900000011/",
    },
    "documented.created": {
        "timestamp": "2026-03-19T10:20:30Z",
        "resource": "event_alert",
        "action": "created",
        "event_id": "d0c0d0c0d0c0d0c0d0c0d0c0d0c0d0c0",
        "issue_id": "5900000066",
        "short_id": "TEA-1",
        "title": "ValueError: too hot",
        "message": "too hot",
        "culprit": "brew.pour in pour",
        "level": "error",
        "status": "unresolved",
        "platform": "python",
        "environment": "production",
        "release": "1.2.3",
        "project_id": "42",
        "project_slug": "brew",
        "project_name": "Brew",
        "exception_type": "ValueError",
        "exception_value": "too hot",
        "permalink": "https://sentry.io/organizations/tea-house/issues/5900000066/",
    },
    "legacy_plugin": {
        "timestamp": "2026-03-20T09:46:40.750000Z",
        "event_id": "abababababababababababababababab",
        "issue_id": "5900000077",
        "title": "TimeoutError: supplier does not answer",
        "message": "supplier does not answer",
        "culprit": "shop.tasks in restock",
        "level": "error",
        "platform": "python",
        "logger": "shop.tasks",
        "environment": "production",
        "release": "shop@2.13.9",
        "project_id": "4507000000000001",
        "project_slug": "shop",
        "project_name": "Shop",
        "exception_type": "TimeoutError",
        "exception_value": "supplier does not answer",
        "permalink": "https://tea-house.sentry.io/issues/5900000077/?referrer=webhooks_plugin",
        "rule": "Tell the kitchen",
    },
    "service_hook": {
        "timestamp": "2026-03-20T08:00:01.500000Z",
        "event_id": "5eed5eed5eed5eed5eed5eed5eed5eed",
        "issue_id": "5900000088",
        "short_id": "SHOP-3A",
        "title": "LookupError: no such tea",
        "message": "no such tea",
        "culprit": "shop.teas in find",
        "level": "error",
        "status": "unresolved",
        "platform": "python",
        "environment": "production",
        "release": "shop@2.14.1",
        "project_id": "4507000000000001",
        "project_slug": "shop",
        "project_name": "Shop",
        "exception_type": "LookupError",
        "exception_value": "no such tea",
        "permalink": "https://tea-house.sentry.io/issues/5900000088/",
    },
    "sentry8_legacy": {
        "timestamp": "2016-04-07T03:33:20Z",
        "event_id": "31415",
        "issue_id": "1234",
        "title": "DryError: boiled dry",
        "message": "boiled dry",
        "culprit": "kettle.heat in heat",
        "level": "error",
        "platform": "python",
        "logger": "kettle",
        "release": "8.0",
        "project_slug": "kettle",
        "project_name": "Kettle",
        "exception_type": "DryError",
        "exception_value": "boiled dry",
        "permalink": "https://sentry.example.com/tea-house/kettle/issues/1234/",
    },
}


@pytest.mark.parametrize("name", SAMPLES)
def test_the_row_of_a_sample_is_whole(name):
    assert parse_error(load(name), None, RECEIVED) == EMPTY | ROWS[name]


@pytest.mark.parametrize("name", NO_ERRORS)
def test_a_delivery_that_is_no_error_makes_no_row(name):
    assert find_error(load(name)) is None
    assert parse_error(load(name), name.split(".")[0], RECEIVED) is None


def test_the_resource_header_goes_before_the_shape():
    assert parse_error(load("documented.created"), "issue", RECEIVED)["resource"] == "issue"


@pytest.mark.parametrize(
    ("payload", "resource"),
    [
        ({"action": "created", "data": {"error": {}, "event": {}, "issue": {}}}, "error"),
        ({"action": "created", "data": {"error": None, "event": {}, "issue": {}}}, "event_alert"),
        ({"action": "created", "data": {"error": [], "event": 5, "issue": {}}}, "issue"),
        ({"action": "triggered", "data": {"event": {}}, "event": {}}, "event_alert"),
        ({"event": {}, "group": {}, "project": None}, None),
        ({"event": {}, "group": []}, None),
        ({"event": {}, "data": None, "action": ""}, None),
    ],
)
def test_the_shape_is_told_by_the_keys(payload, resource):
    row = parse_error(payload, None, RECEIVED)
    assert row == EMPTY | {"resource": resource, "action": payload.get("action") or None}


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"action": "created"},
        {"action": "created", "data": None},
        {"action": "created", "data": []},
        {"action": "created", "data": {"error": None, "event": "x", "issue": []}},
        {"action": "created", "data": {"issue": {}, "activity": {}}},
        {"action": "resolved", "data": {"issue": {}}},
        {"action": "created", "event": {}},
        {"event": {}, "data": {}},
        {"event": []},
        {"group": {}, "project": {}},
    ],
)
def test_anything_else_is_no_error(payload):
    assert find_error(payload) is None


# --------------------------------------------------------------------------------------------------
# The field table: a column, the shape, and where its value is found, the best place first
# --------------------------------------------------------------------------------------------------

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


FIELD_TABLE = [
    ("event_id", "error", [("data/error/event_id", "a"), ("data/error/id", "b")]),
    ("event_id", "legacy", [("event/event_id", "a"), ("event/id", "b")]),
    ("event_id", "hook", [("event/eventID", "a"), ("event/id", "b")]),
    (
        "issue_id",
        "documented",
        [
            ("data/event/issue_id", "1"),
            ("data/event/issue_url", f"{API}/organizations/o/issues/2/", "2"),
            ("data/event/web_url", "https://o.sentry.io/issues/3/events/a/", "3"),
            ("data/issue/id", "4"),
        ],
    ),
    ("issue_id", "error", [("data/error/issue_url", f"{API}/issues/2/", "2")]),
    ("issue_id", "issue", [("data/issue/id", "5")]),
    ("issue_id", "legacy", [("event/issue_id", "1"), ("id", "6")]),
    ("issue_id", "hook", [("group/id", "7"), ("event/groupID", "8")]),
    ("short_id", "issue", [("data/issue/shortId", "TEA-1")]),
    ("short_id", "hook", [("group/shortId", "TEA-2")]),
    ("short_id", "documented", [("data/issue/shortId", "TEA-3")]),
    (
        "exception_type",
        "error",
        [("data/error/exception/values", values(type="A"), "A"), ("data/error/metadata/type", "B")],
    ),
    ("exception_type", "error", [("data/error/exception", values(type="A"), "A")]),
    ("exception_type", "issue", [("data/issue/metadata/type", "B")]),
    (
        "exception_type",
        "documented",
        [("data/event/exceptions", values(type="A"), "A"), ("data/event/metadata/type", "B")],
    ),
    (
        "exception_type",
        "legacy",
        [
            ("event/sentry.interfaces.Exception/values", values(type="A"), "A"),
            ("event/metadata/type", "B"),
        ],
    ),
    (
        "exception_type",
        "hook",
        [
            (
                "event/entries",
                [None, {"type": "exception", "data": {"values": values(type="A")}}],
                "A",
            ),
            ("event/metadata/type", "B"),
        ],
    ),
    (
        "exception_value",
        "error",
        [
            ("data/error/exception/values", values(value="A"), "A"),
            ("data/error/metadata/value", "B"),
        ],
    ),
    ("exception_value", "issue", [("data/issue/metadata/value", "B")]),
    ("exception_value", "hook", [("event/metadata/value", "B")]),
    (
        "title",
        "documented",
        [("data/event/title", "A"), ("data/issue/title", "B"), ("data/event/metadata/title", "C")],
    ),
    (
        "title",
        "error",
        [("data/error/title", "A"), ("data/error/metadata", {"type": "T", "value": "V"}, "T: V")],
    ),
    (
        "title",
        "issue",
        [("data/issue/title", "A"), ("data/issue/metadata", {"type": "T", "value": "V"}, "T: V")],
    ),
    ("title", "issue", [("data/issue/metadata", {"title": "A", "type": "T", "value": "V"}, "A")]),
    ("title", "legacy", [("event/title", "A"), ("event/metadata/title", "B"), ("message", "C")]),
    ("title", "hook", [("event/title", "A"), ("group/title", "B"), ("event/metadata/title", "C")]),
    (
        "message",
        "error",
        [
            ("data/error/message", "A"),
            ("data/error/logentry/formatted", "B"),
            ("data/error/logentry/message", "C"),
            ("data/error/exception/values", values(value="D"), "D"),
            ("data/error/metadata", {"value": "E", "title": "F"}, "E"),
            ("data/error/title", "G"),
        ],
    ),
    ("message", "error", [("data/error/metadata/title", "F"), ("data/error/title", "G")]),
    (
        "message",
        "legacy",
        [
            ("event/message", "A"),
            ("message", "B"),
            ("event/sentry.interfaces.Message/message", "C"),
        ],
    ),
    (
        "message",
        "hook",
        [("event/message", "A"), ("event/metadata/value", "B"), ("event/title", "C")],
    ),
    ("message", "issue", [("data/issue/metadata/value", "A"), ("data/issue/title", "B")]),
    ("culprit", "documented", [("data/event/culprit", "A"), ("data/issue/culprit", "B")]),
    ("culprit", "issue", [("data/issue/culprit", "A")]),
    ("culprit", "legacy", [("event/culprit", "A"), ("culprit", "B")]),
    ("culprit", "hook", [("event/culprit", "A"), ("group/culprit", "B")]),
    (
        "level",
        "documented",
        [
            ("data/event/level", "fatal"),
            ("data/event/tags/level", "info"),
            ("data/issue/level", "error"),
        ],
    ),
    ("level", "issue", [("data/issue/level", "debug")]),
    (
        "level",
        "legacy",
        [("event/level", "fatal"), ("level", "error"), ("event/tags/level", "info")],
    ),
    ("level", "hook", [("event/tags/level", "info"), ("group/level", "error")]),
    ("status", "issue", [("data/issue/status", "unresolved")]),
    ("status", "hook", [("group/status", "unresolved")]),
    ("platform", "documented", [("data/event/platform", "ruby"), ("data/issue/platform", "go")]),
    ("platform", "issue", [("data/issue/platform", "go")]),
    ("platform", "hook", [("event/platform", "ruby"), ("group/platform", "go")]),
    ("logger", "error", [("data/error/logger", "a"), ("data/error/tags/logger", "b")]),
    ("logger", "issue", [("data/issue/logger", "a")]),
    ("logger", "legacy", [("event/logger", "a"), ("logger", "b"), ("event/tags/logger", "c")]),
    (
        "project_id",
        "documented",
        [("data/event/project", 2**53, str(2**53)), ("data/project/id", 7, "7")],
    ),
    ("project_id", "issue", [("data/issue/project/id", "4507000000000001")]),
    ("project_id", "hook", [("event/projectID", "12")]),
    ("project_id", "legacy", [("event/project", 12, "12")]),
    (
        "project_slug",
        "documented",
        [
            ("data/issue/project/slug", "a"),
            ("data/project/slug", "b"),
            ("data/event/url", f"{API}/projects/org/c/events/1/", "c"),
        ],
    ),
    ("project_slug", "documented", [("data/project", "b")]),
    ("project_slug", "legacy", [("project_slug", "a"), ("project", "b")]),
    ("project_slug", "hook", [("project/slug", "a")]),
    ("project_name", "documented", [("data/issue/project/name", "A"), ("data/project/name", "B")]),
    ("project_name", "legacy", [("project_name", "A")]),
    ("project_name", "hook", [("project/name", "A")]),
    (
        "permalink",
        "documented",
        [
            ("data/event/web_url", "https://a"),
            ("data/issue/web_url", "https://b"),
            ("data/issue/permalink", "https://c"),
        ],
    ),
    (
        "permalink",
        "issue",
        [("data/issue/web_url", "https://a"), ("data/issue/permalink", "https://b")],
    ),
    ("permalink", "legacy", [("event/web_url", "https://a"), ("url", "https://b")]),
    ("permalink", "hook", [("event/url", "https://a"), ("group/permalink", "https://b")]),
    (
        "environment",
        "error",
        [("data/error/environment", "a"), ("data/error/tags/environment", "b")],
    ),
    (
        "release",
        "error",
        [
            ("data/error/release", "a"),
            ("data/error/tags/release", "b"),
            ("data/error/tags/sentry:release", "c"),
        ],
    ),
    ("release", "hook", [("event/release/version", "a"), ("event/tags/release", "b")]),
    (
        "timestamp",
        "documented",
        [
            ("data/event/datetime", f"{AT}Z", f"{AT}Z"),
            ("data/event/timestamp", 0.5, "1970-01-01T00:00:00.500000Z"),
            ("data/event/received", 2, "1970-01-01T00:00:02Z"),
            ("data/issue/lastSeen", f"{AT}.5+02:00", "2026-02-03T02:05:06.500000Z"),
            ("data/issue/firstSeen", "2026-01-01T00:00:00Z"),
        ],
    ),
    ("timestamp", "error", [("data/error/timestamp", AT, f"{AT}Z")]),
    (
        "timestamp",
        "hook",
        [
            ("event/dateCreated", f"{AT}Z"),
            ("event/dateReceived", "2026-01-01T00:00:00Z"),
            ("group/lastSeen", "2026-01-02T00:00:00Z"),
            ("group/firstSeen", "2026-01-03T00:00:00Z"),
        ],
    ),
    ("rule", "alert", [("data/triggered_rule", "Every error")]),
    ("rule", "legacy", [("triggering_rules", ["First", "Second"], "First")]),
]
PLACES = [
    pytest.param(
        column, shape, places, index, id=f"{column}-{shape}-{places[index][0].split('/')[-1]}"
    )
    for column, shape, places in FIELD_TABLE
    for index in range(len(places))
]
# What is no text, no id, no time, no list of objects and no object with what we look for.
NOTHINGS = [None, "", [], {}, True, 1.5e300, [None], [[]], {"values": None}, {"unknown": "x"}]


def put(payload, path, value):
    """Set what lies at a path of keys; what is no dict on the way there becomes one."""
    *parents, last = path.split("/")
    for key in parents:
        if not isinstance(payload.get(key), dict):
            payload[key] = {}
        payload = payload[key]
    payload[last] = value


@pytest.mark.parametrize(("column", "shape", "places", "index"), PLACES)
def test_a_field_is_found_in_its_place(column, shape, places, index):
    payload = copy.deepcopy(BASES[shape])
    path, value, *expected = places[index]
    put(payload, path, value)
    assert parse_error(payload, None, RECEIVED)[column] == (expected or [value])[0]


@pytest.mark.parametrize(("column", "shape", "places", "index"), PLACES)
def test_the_first_place_that_holds_something_wins(column, shape, places, index):
    value, *expected = places[index][1:]
    for nothing in NOTHINGS:
        payload = copy.deepcopy(BASES[shape])
        for path, value_there, *_ in places[index:]:
            put(payload, path, value_there)
        for path, *_ in places[:index]:
            # A tag's value is made text whatever it is.
            put(payload, path, None if "/tags/" in path else nothing)
        assert parse_error(payload, None, RECEIVED)[column] == (expected or [value])[0], nothing


@pytest.mark.parametrize(("column", "shape", "places", "index"), PLACES)
def test_a_field_is_null_if_nothing_is_there(column, shape, places, index):
    path = places[index][0]
    for nothing in NOTHINGS:
        for length in range(1, path.count("/") + 2):
            payload = copy.deepcopy(BASES[shape])
            put(payload, "/".join(path.split("/")[:length]), nothing)
            row = parse_error(payload, None, RECEIVED)
            assert row is None or row[column] == EMPTY[column] or "/tags/" in path, (
                nothing,
                length,
            )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-03-14T09:26:53Z", "2026-03-14T09:26:53Z"),
        ("2026-03-14T09:26:53.5+00:00", "2026-03-14T09:26:53.500000Z"),
        ("2026-03-14T01:26:53-08:00", "2026-03-14T09:26:53Z"),
        ("2026-03-14 09:26:53", "2026-03-14T09:26:53Z"),
        (1773480413.589793, "2026-03-14T09:26:53.589793Z"),
        (0, "1970-01-01T00:00:00Z"),
        (-1, "1969-12-31T23:59:59Z"),
        ("0001-01-01T00:00:00+14:00", RECEIVED),
        ("9999-12-31T23:59:59-14:00", RECEIVED),
        ("today", RECEIVED),
        ("\ud800", RECEIVED),
        (1e300, RECEIVED),
        (float("inf"), RECEIVED),
        (float("nan"), RECEIVED),
        (2**70, RECEIVED),
        (-(2**63), RECEIVED),
        (True, RECEIVED),
        ([1], RECEIVED),
    ],
)
def test_a_time_is_utc_or_else_that_of_receipt(value, expected):
    assert parse_error({"event": {"timestamp": value}}, None, RECEIVED)["timestamp"] == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("x", "x"),
        (0, "0"),
        (2**70, str(2**70)),
        (-5, "-5"),
        (1.0, None),
        (False, None),
        ({}, None),
        ("a\0b", "a\ufffdb"),
        ("a\ud800b", "a?b"),
    ],
)
def test_an_id_is_text_whether_sent_as_text_or_number(value, expected):
    assert parse_error({"event": {"event_id": value}}, None, RECEIVED)["event_id"] == expected


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (None, {}),
        ("x", {}),
        ([], {}),
        ([["a", "1"], ["b", None]], {"a": "1", "b": None}),
        (
            [["a", 1], ["b", True], ["c", [2]], ["d", 2**70]],
            {"a": "1", "b": "true", "c": "[2]", "d": "null"},
        ),
        ([{"key": "a", "value": "1"}, {"key": "b"}, {"value": "2"}], {"a": "1", "b": None}),
        ({"a": "1", "b": {"c": 2}}, {"a": "1", "b": '{"c": 2}'}),
        ([["a"], ["a", "b", "c"], [1, "x"], "ab", None, 5, [None, None]], {}),
        ([["\ud800", "\udfff\0"]], {"?": "?\ufffd"}),
        ([["a", "1"], ["a", "2"]], {"a": "2"}),
    ],
)
def test_tags_are_one_dict_of_text_whatever_form_they_had(tags, expected):
    assert parse_detail({"event": {"tags": tags}})["tags"] == expected


def frame(**known):
    """Return a frame as it goes out."""
    keys = "filename abs_path module function lineno colno in_app pre_context context_line post_context".split()
    return dict.fromkeys(keys) | known


def trace(*functions):
    """Return a stacktrace as Sentry sends it."""
    return {"frames": [{"function": function} for function in functions]}


ONE, TWO, THREE, FOUR, FIVE = (trace(f"main {number}", f"crash {number}") for number in range(1, 6))
FRAME_PLACES = [
    (
        {
            "exception": {"values": [{"stacktrace": ONE}, {"stacktrace": TWO}]},
            "threads": {"values": []},
        },
        TWO,
    ),
    (
        {
            "exception": {"values": [{"stacktrace": ONE}, {"stacktrace": None}, None]},
            "stacktrace": TWO,
        },
        ONE,
    ),
    (
        {
            "exception": {"values": [{"stacktrace": ONE}, {"stacktrace": {"frames": []}}]},
            "stacktrace": TWO,
        },
        ONE,
    ),
    ({"exception": {"values": [{"stacktrace": ONE}, {"stacktrace": {"frames": [None]}}]}}, ONE),
    ({"exception": [{"stacktrace": ONE}], "stacktrace": TWO}, ONE),
    (
        {
            "exception": {"values": [{}]},
            "threads": {"values": [{"stacktrace": ONE}, {"crashed": True, "stacktrace": TWO}]},
        },
        TWO,
    ),
    (
        {
            "threads": {
                "values": [{"stacktrace": ONE}, None, {"current": True, "stacktrace": TWO}]
            },
            "stacktrace": THREE,
        },
        TWO,
    ),
    (
        {
            "threads": [{"current": True, "stacktrace": ONE}, {"crashed": True, "stacktrace": TWO}],
            "stacktrace": THREE,
        },
        TWO,
    ),
    ({"threads": {"values": [{"stacktrace": ONE}]}, "stacktrace": TWO}, ONE),
    ({"threads": {"values": [{"crashed": True, "stacktrace": None}, {"stacktrace": ONE}]}}, ONE),
    ({"exception": None, "threads": None, "stacktrace": ONE}, ONE),
    ({"sentry.interfaces.Stacktrace": ONE}, ONE),
    (
        {
            "sentry.interfaces.Exception": {"values": [{"stacktrace": ONE}]},
            "sentry.interfaces.Stacktrace": TWO,
        },
        ONE,
    ),
    ({"exceptions": [{"stacktrace": ONE}], "stacktrace": TWO}, ONE),
    ({"entries": [{"type": "exception", "data": {"values": [{"stacktrace": ONE}]}}]}, ONE),
    ({"entries": [{"type": "stacktrace", "data": ONE}]}, ONE),
    ({"stacktrace": [ONE], "threads": 5, "exception": "x"}, None),
    ({"stacktrace": {"frames": {"function": "x"}}}, None),
    ({}, None),
]


@pytest.mark.parametrize(("event", "expected"), FRAME_PLACES)
def test_the_frames_are_those_of_the_crash(event, expected):
    frames = [frame(function=item["function"]) for item in (expected or {"frames": []})["frames"]]
    assert parse_detail({"action": "created", "data": {"error": event}})["stacktrace"] == frames


def test_a_frame_has_every_key_in_either_spelling():
    frames = [
        {
            "filename": "a.py", "abs_path": "/a.py", "module": "a", "function": "f", "lineno": 0, "colno": 7,
            "in_app": False, "pre_context": ["1", None, 2], "context_line": "", "post_context": [],
        },
        {"filename": "", "absPath": "/b.py", "lineNo": 5, "colNo": 6, "inApp": True},
        {"filename": 5, "lineno": "7", "colno": 1.5, "in_app": "yes", "pre_context": "x", "context_line": []},
        {"lineno": 2**63, "colno": True, "context_line": "\ud800\0", "pre_context": ["\ud800"], "function": {}},
    ]  # fmt: skip
    assert parse_detail({"event": {"stacktrace": {"frames": frames}}})["stacktrace"] == [
        frame(
            filename="a.py", abs_path="/a.py", module="a", function="f", lineno=0, colno=7, in_app=False,
            pre_context=["1", "", ""], context_line="", post_context=[],
        ),
        frame(abs_path="/b.py", lineno=5, colno=6, in_app=True),
        frame(),
        frame(context_line="?\ufffd", pre_context=["?"]),
    ]  # fmt: skip


def test_the_detail_of_a_python_error_is_whole():
    found = parse_detail(load("error.created.python"))
    assert [
        (item["type"], item["value"], item["module"], item["mechanism"]["type"])
        for item in found["exceptions"]
    ] == [
        ("KeyError", "'price'", None, "chained"),
        ("CheckoutError", "cannot price basket 4711", "shop.errors", "flask"),
    ]
    assert [(item["function"], item["lineno"], item["in_app"]) for item in found["stacktrace"]] == [
        ("wsgi_app", 1511, False),
        ("dispatch_request", 902, False),
        ("checkout", 64, True),
        ("total_of", 41, True),
    ]
    assert found["stacktrace"][-1] == frame(
        filename="shop/basket.py", abs_path="/srv/shop/basket.py", module="shop.basket", function="total_of", lineno=41,
        in_app=True, post_context=[""],
        context_line='        raise CheckoutError(f"cannot price basket {basket.id}") from error',
        pre_context=["    try:", "        return sum(map(price_of, basket.teas))", "    except KeyError as error:"],
    )  # fmt: skip
    assert found["tags"] == dict(load("error.created.python")["data"]["error"]["tags"])
    assert found["actor"] == {"type": "application", "id": "sentry", "name": "Sentry"}
    assert found["request"] == {"method": "POST", "url": "https://shop.example.com/checkout"}
    assert found["breadcrumbs"][1:] == [
        {
            "timestamp": "2026-03-14T09:26:52.500000Z", "type": "http", "category": "httplib", "level": "info",
            "message": None,
            "data": {"method": "GET", "url": "https://stock.example.com/v1/tea/77", "status_code": 200},
        },
        {
            "timestamp": "2026-03-14T09:26:53.125000Z", "type": "default", "category": "query", "level": "warning",
            "message": "SELECT price FROM teas WHERE id = 77", "data": None,
        },
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "functions", "exceptions", "request_", "crumbs"),
    [
        (
            "error.created.java",
            ["main", "invoke", "boil"],
            ["IOException", "KettleException"],
            None,
            [],
        ),
        ("error.created.native", ["start_thread", "<unknown>", "pour"], ["SIGSEGV"], None, []),
        (
            "event_alert.triggered.javascript",
            [None, "pour"],
            ["TypeError"],
            {"method": None, "url": "https://shop.example.com/teas"},
            ["button#pour > span"],
        ),
        ("event_alert.triggered.message", [], [], None, ["Wasser heiß"]),
        ("issue.created", [], [], None, []),
        ("documented.created", ["main", "pour"], ["ValueError"], None, []),
        (
            "legacy_plugin",
            ["restock"],
            ["TimeoutError"],
            {"method": "GET", "url": "https://shop.example.com/restock"},
            [],
        ),
        (
            "service_hook",
            ["call", "find"],
            ["LookupError"],
            {"method": "GET", "url": "https://shop.example.com/teas/0"},
            ["looking for tea"],
        ),
        (
            "sentry8_legacy",
            ["heat"],
            ["DryError"],
            {"method": "PUT", "url": "http://kettle.example.com/heat"},
            ["water low"],
        ),
    ],
)
def test_the_detail_of_a_sample_comes_from_where_its_form_keeps_it(
    name, functions, exceptions, request_, crumbs
):
    found = parse_detail(load(name))
    assert [item["function"] for item in found["stacktrace"]] == functions
    assert [item["type"] for item in found["exceptions"]] == exceptions
    assert found["request"] == request_
    assert [item["message"] for item in found["breadcrumbs"]] == crumbs


def test_breadcrumbs_are_the_newest_twenty_in_order():
    crumbs = [{"message": str(number), "timestamp": number} for number in range(50)]
    found = parse_detail({"event": {"breadcrumbs": {"values": crumbs}}})["breadcrumbs"]
    assert [crumb["message"] for crumb in found] == [str(number) for number in range(30, 50)]


@pytest.mark.parametrize(
    ("actor", "expected"),
    [
        ({"type": "user", "id": 7, "name": "Anna"}, {"type": "user", "id": "7", "name": "Anna"}),
        ({"id": [], "name": None}, {"type": None, "id": None, "name": None}),
        (None, None),
        ([], None),
        ("Anna", None),
    ],
)
def test_an_actor_is_an_object_or_null(actor, expected):
    assert parse_detail({"event": {}, "actor": actor})["actor"] == expected


def test_a_mechanism_that_cannot_be_sent_on_is_made_one_that_can():
    deep = {
        "a": {"b": {"c": {"d": {"e": {"f": {"g": 1}}}}}},
        "n": 1e400,
        "big": 2**70,
        "\ud800": "\0",
    }
    event = {"exception": {"values": [{"mechanism": deep}]}}
    mechanism = parse_detail({"event": event})["exceptions"][0]["mechanism"]
    assert mechanism["n"] is mechanism["big"] is None
    assert mechanism["?"] == "\ufffd"
    assert json.loads(json.dumps(mechanism, allow_nan=False)) == mechanism


def test_text_in_a_column_is_cut_and_says_so():
    row = parse_error({"event": {"title": "x" * 8193, "culprit": "y" * 8192}}, None, RECEIVED)
    assert row["title"] == "x" * 8191 + "…"
    assert row["culprit"] == "y" * 8192


# --------------------------------------------------------------------------------------------------
# Wrong types at every position of every sample
# --------------------------------------------------------------------------------------------------

JUNK = [
    None,
    "",
    "\ud800\0",
    0,
    -1,
    2**70,
    1e400,
    True,
    [],
    {},
    [None],
    [[1, 2]],
    {"values": 5},
    {"frames": [5]},
    "2026",
]


def positions(value, path=()):
    """Yield the path of every position in a JSON value."""
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield (*path, key)
        yield from positions(item, (*path, key))


def check_storable(row, detail):
    """Fail unless a row fits its columns and a detail can be sent as JSON in UTF-8."""
    assert all(
        value is None or (isinstance(value, str) and "\0" not in value) for value in row.values()
    )
    "".join(filter(None, row.values())).encode()
    sent = json.dumps(detail, ensure_ascii=False, allow_nan=False)
    assert "\\u0000" not in sent
    sent.encode()


@pytest.mark.parametrize("name", SAMPLES + NO_ERRORS)
def test_any_junk_at_any_position_is_survived(name):
    payload = load(name)
    for path in list(positions(payload)):
        holder = payload
        for key in path[:-1]:
            holder = holder[key]
        kept = holder[path[-1]]
        for junk in JUNK:
            holder[path[-1]] = junk
            row = parse_error(payload, None, RECEIVED)
            if row is not None:
                check_storable(row, parse_detail(payload))
        holder[path[-1]] = kept
    assert payload == load(name)


# --------------------------------------------------------------------------------------------------
# Bytes that are no delivery
# --------------------------------------------------------------------------------------------------

BAD_BODIES = [
    (b"", "not JSON", "The body is not JSON"),
    (b" \n", "not JSON", "The body is not JSON"),
    (b"{", "not JSON", "The body is not JSON"),
    (b"{'action': 'created'}", "not JSON", "send a JSON object"),
    (b'{"action": "created"} x', "not JSON", "send a JSON object"),
    (b"NaN", "not JSON", "NaN"),
    (b'{"action": "created", "data": {"error": {"timestamp": NaN}}}', "not JSON", "NaN"),
    (b'{"action": "created", "data": -Infinity}', "not JSON", "Infinity"),
    (b"[]", "no object", "not an object"),
    (b'"x"', "no object", "not an object"),
    (b"5", "no object", "not an object"),
    (b"null", "no object", "not an object"),
    (b"{}", "no delivery", "neither an 'action' nor a legacy 'event'"),
    (b'{"action": ""}', "no delivery", "neither an 'action' nor a legacy 'event'"),
    (b'{"action": 5, "event": []}', "no delivery", "neither an 'action' nor a legacy 'event'"),
    (
        b'{"action": ["created"], "data": {"error": {}}}',
        "no delivery",
        "neither an 'action' nor a legacy 'event'",
    ),
    (b"\xff\xfe{}", "not UTF-8", "send JSON text encoded as UTF-8"),
    (
        '{"action": "created", "data": "é"}'.encode("latin-1"),
        "not UTF-8",
        "send JSON text encoded as UTF-8",
    ),
    (b'{"action": "\xed\xa0\x80"}', "not UTF-8", "send JSON text encoded as UTF-8"),
    ('{"action": "created"}'.encode("utf-16"), "not UTF-8", "send JSON text encoded as UTF-8"),
    ('{"action": "created"}'.encode("utf-16-le"), "not JSON", "The body is not JSON"),
    ('{"action": "created"}'.encode("utf-32-be"), "not JSON", "The body is not JSON"),
    (b"[" * 100_000, "not JSON", "nested too deeply"),
    (b'{"action":' * 100_000, "not JSON", "nested too deeply"),
    (
        b'{"action":"created","data":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "not JSON",
        "nested too deeply",
    ),
]


@pytest.mark.parametrize(("body", "reason", "words"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_bytes_that_are_no_delivery_are_refused(body, reason, words):
    with pytest.raises(Refused) as refused:
        parse_body(body)
    assert (refused.value.status, refused.value.reason) == (400, reason)
    assert words in refused.value.words


@pytest.mark.parametrize("name", SAMPLES + NO_ERRORS)
def test_the_bytes_of_a_sample_are_a_delivery(name):
    assert parse_body(wire(load(name))) == load(name)
    assert parse_body(
        (json.dumps(load(name), ensure_ascii=False, indent=1) + "\n").encode()
    ) == load(name)
