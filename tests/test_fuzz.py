"""Whatever is sent or asked: never a fault, and never a row that cannot be read back through every endpoint."""

import copy
import json
import os
import re
from xml.etree import ElementTree

import pytest
from conftest import SECRET, core, event_payload, load, post, sign, wire
from test_parsing import BASES, FIELD_TABLE, SAMPLES, positions, put
from test_reading import DETAIL_KEYS, SUMMARY_KEYS, read_text

from collector import LEVELS, create_app, delete_errors

if not os.environ.get("CI"):  # there it must not be missing
    pytest.importorskip(
        "hypothesis", reason="fuzzing needs hypothesis, as CI has it: pip install hypothesis"
    )
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("EXAMPLES") or 20)
HURRIED = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
}
HOSTILE = [
    "error: 99\nurl: http://evil.example.com",
    "\n\nstacktrace (oldest call first):\n  x",
    "\x1b[2J\x1b]0;x\x07",
    "\u2028title: x\u202e\0",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "javascript:alert(1)",
    '"OR* NEAR(',
    "%s%n{0}",
    "x" * 9000,
    "\ud83c",
    "2026-01-01T00:00:00Z",
]
TEXT = st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(HOSTILE)
NUMBERS = (
    st.integers() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False, allow_infinity=False)
)
KEYS = (
    "type value values frames key data id name slug level message function filename lineno in_app url vars package "
    "context password timestamp exception_id thread_id mechanism stacktrace"
).split()
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(KEYS) | TEXT, inner, max_size=4)
    ),
    max_leaves=12,
)
PATHS = {
    shape: sorted(
        {place[0] for _, other, places in FIELD_TABLE if other == shape for place in places}
    )
    for shape in BASES
}
MORE_PATHS = (
    "exception/values threads stacktrace/frames breadcrumbs/values request tags contexts entries main_exception_id "
    "occurrence user extra csp request/headers request/query_string request/data context metadata/filename"
).split()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """Return an app that all examples share, one after another, and that does not wait for the disk."""
    url = f"sqlite:///{tmp_path_factory.mktemp('fuzz')}/errors.db"
    app = create_app({"DATABASE_URL": url, "SENTRY_ACTIONS": "created,triggered"})
    core(app).database.connection().execute("PRAGMA synchronous = OFF")
    yield app
    core(app).database.close()


def empty(app):
    """Delete what the last example left."""
    with core(app).database.transaction() as connection:
        delete_errors(connection, [id_ for (id_,) in connection.execute("SELECT id FROM errors")])
    return app.test_client()


def check_read_back(client, body, id_):
    """Fail unless an error can be read back in every form of every endpoint."""
    assert client.get(f"/errors/{id_}/payload").data == body
    error = client.get(f"/errors/{id_}").json
    assert list(error) == DETAIL_KEYS
    assert all(error[key] is None or isinstance(error[key], str) for key in SUMMARY_KEYS[1:])
    assert client.get("/errors/latest").json == error
    assert [row.items() <= error.items() for row in client.get("/errors").json] == [True]
    assert [json.loads(line) for line in client.get("/errors?format=ndjson").text.splitlines()] == [
        error
    ]
    check_text(client, id_)
    ElementTree.fromstring(client.get("/errors?format=atom").data)
    for path in (
        f"/errors/{id_}?format=html",
        "/errors?format=html",
        "/?format=html",
        "/",
        "/config",
        "/metrics",
        "/issues",
        "/issues?format=html",
        "/issues?format=text",
    ):
        reply = client.get(path)
        assert reply.status_code == 200
        assert b"<script" not in reply.data or reply.mimetype == "application/json"
    for name, key in {
        "project": "project_slug",
        "issue": "issue_id",
        "issue ": "short_id",
    }.items() | {(key, key) for key in ("level", "environment", "platform")}:
        value = error[key]
        # A query is cut at its ends, and an issue is first looked for by its short id.
        is_filter = name != "level" or value in LEVELS
        if (
            value
            and value == value.strip()
            and is_filter
            and (name != "issue " or error["issue_id"])
        ):
            assert [
                row["id"] for row in client.get("/errors", query_string={name.strip(): value}).json
            ] == [id_]


def check_text(client, id_):
    """Fail unless an error's text is short, its lines at the margin are ours, and nothing in it moves a cursor."""
    text = client.get(f"/errors/{id_}?format=text").text
    assert len(text) <= 8000
    head, _, _ = read_text(text)
    assert (head["error"], head["url"]) == (str(id_), f"http://localhost/errors/{id_}")
    listed = client.get("/errors?format=text").text
    assert re.fullmatch(rf"#{id_} [^\n]*\n", listed)
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text + listed)


def check_delivery(client, body, *statuses):
    """Post bytes; fail unless the status is one of these and an error that is stored can be read back."""
    reply = client.post(
        "/sentry/webhook", data=body, environ_overrides={"CONTENT_LENGTH": str(len(body))}
    )
    assert reply.status_code in statuses, reply.data
    if reply.status_code == 201:
        check_read_back(client, body, reply.json["id"])
    else:
        assert client.get("/errors").json == []
        assert len(reply.data) <= 1024


@st.composite
def shaped(draw):
    """Draw a delivery of one of the shapes with anything at all in the places where fields are found."""
    shape = draw(st.sampled_from(sorted(BASES)))
    payload = copy.deepcopy(BASES[shape])
    event = {"error": "data/error", "alert": "data/event", "documented": "data/event"}.get(
        shape, "event"
    )
    paths = PATHS[shape] + ([f"{event}/{path}" for path in MORE_PATHS] if shape != "issue" else [])
    for path in draw(st.lists(st.sampled_from(paths), max_size=8)):
        put(payload, path, draw(JSON))
    if draw(st.booleans()):
        payload["actor"] = draw(JSON)
    return payload


@st.composite
def mutated(draw):
    """Draw a sample in which anything at all has taken some places."""
    payload = load(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 5))):
        path = draw(st.sampled_from(list(positions(payload)) or [()]))
        holder = payload
        for key in path[:-1]:
            holder = holder[key]
        if path:
            holder[path[-1]] = draw(JSON)
    return payload


@st.composite
def garbled(draw):
    """Draw the bytes of a sample with some of them changed, doubled or gone."""
    body = bytearray(wire(load(draw(st.sampled_from(SAMPLES)))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        body[start : start + draw(st.integers(0, 30))] = draw(st.binary(max_size=10))
    return bytes(body)


@settings(max_examples=EXAMPLES, **HURRIED)
@given(payload=shaped())
@example(payload={"event": {"entries": [{"type": "exception", "data": [{"type": "x"}]}]}})
def test_anything_where_fields_are_found_can_be_read_back(app, payload):
    check_delivery(empty(app), wire(payload), 201, 200)


@settings(max_examples=EXAMPLES, **HURRIED)
@given(payload=mutated())
def test_anything_anywhere_in_a_sample_can_be_read_back_or_is_refused(app, payload):
    check_delivery(empty(app), wire(payload), 201, 200, 400)


@settings(max_examples=EXAMPLES, **HURRIED)
@given(body=garbled() | st.binary(max_size=200))
def test_broken_bytes_are_refused_or_can_be_read_back(app, body):
    check_delivery(empty(app), body, 201, 200, 400)


@settings(max_examples=EXAMPLES, **HURRIED)
@given(value=JSON)
def test_any_json_at_all_is_answered(app, value):
    check_delivery(empty(app), json.dumps(value).encode(), 201, 200, 400)


@settings(max_examples=EXAMPLES, **HURRIED)
@given(words=st.lists(TEXT, min_size=8, max_size=8), more=st.integers(1, 40))
def test_no_words_of_an_error_pass_for_ours(app, words, more):
    title, message, type_, value, function, file, line, tag = words
    frame = {"function": function, "filename": file, "context_line": line, "in_app": True}
    exception = {"type": type_, "value": value, "stacktrace": {"frames": [frame] * more}}
    crumbs = [{"message": message, "data": {tag: line}, "category": type_}] * more
    payload = event_payload(
        title=title, message=message, culprit=function, release=file, environment=tag, web_url=value, level=line,
        exception=[exception] * 3, tags=[[tag + str(number), value] for number in range(more)],
        request={"url": value, "method": tag}, breadcrumbs=crumbs,
    )  # fmt: skip
    client = empty(app)
    reply = post(client, payload)
    assert reply.status_code == 201
    check_text(client, reply.json["id"])


NAMES = "q project level environment platform issue since until limit before after format refresh within release category server event".split()
QUERIES = st.dictionaries(st.sampled_from(NAMES) | TEXT, TEXT | st.integers().map(str), max_size=4)
ROUTES = st.sampled_from(
    [
        "/errors",
        "/errors/latest",
        "/errors/1",
        "/errors/1/payload",
        "/issues",
        "/metrics",
        "/robots.txt",
        "/",
        "/config",
        "/health",
        "/nowhere",
    ]
)
HEADER_TEXT = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=40)
HEADERS = st.dictionaries(
    st.sampled_from(
        [
            "Accept",
            "Authorization",
            "If-None-Match",
            "Cookie",
            "Range",
            "If-Modified-Since",
            "Forwarded",
        ]
    ),
    HEADER_TEXT
    | st.sampled_from(["text/html", "text/plain", "Basic x", "Bearer x", 'W/"', "*", "Digest a=b"]),
    max_size=3,
)


@settings(max_examples=EXAMPLES * 3, **HURRIED)
@given(path=ROUTES, query=QUERIES, headers=HEADERS)
def test_whatever_is_asked_is_answered(app, path, query, headers):
    client = app.test_client()
    query = {name: value.encode("utf-8", "replace") for name, value in query.items()}
    query = {name.encode("utf-8", "replace").decode(): value for name, value in query.items()}
    reply = client.get(path, query_string=query, headers=headers)
    assert reply.status_code < 500, reply.data
    if reply.status_code >= 400 and reply.mimetype == "application/json":
        assert list(reply.json) == ["error"]
        assert len(reply.data) <= 1024


@settings(max_examples=EXAMPLES * 2, **HURRIED)
@given(words=TEXT)
def test_a_search_for_any_words_is_answered_and_finds_what_has_them(app, words):
    client = empty(app)
    post(client, event_payload(title=f"before {words} after", level="info"))
    words = words.encode("utf-8", "replace").decode()
    for form in ("json", "text", "html", "ndjson"):
        assert client.get("/errors", query_string={"q": words, "format": form}).status_code == 200
    if re.fullmatch(r"[a-z0-9 ]{1,99}", words):
        assert len(client.get("/errors", query_string={"q": words}).json) == 1


@settings(max_examples=EXAMPLES, **HURRIED)
@given(
    signature=HEADER_TEXT | st.text("0123456789abcdef", min_size=60, max_size=68),
    body=st.binary(max_size=100),
)
def test_no_made_up_signature_opens_the_door(app, signature, body):
    settings_ = core(app).settings
    client = empty(app)
    headers = {"Sentry-Hook-Signature": signature}
    environ = {"CONTENT_LENGTH": str(len(body))}
    settings_["SENTRY_CLIENT_SECRET"] = (SECRET, "another")
    try:
        reply = client.post(
            "/sentry/webhook", data=body, headers=headers, environ_overrides=environ
        )
    finally:
        settings_["SENTRY_CLIENT_SECRET"] = ()
    assert reply.status_code == 401
    assert sign(body)["Sentry-Hook-Signature"] not in reply.text
    assert client.get("/errors").json == []
