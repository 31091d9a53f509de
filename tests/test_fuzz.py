"""Whatever is sent or asked: never a fault, and never a row that cannot be read back through every endpoint."""

import json
import os
import re

import pytest
from conftest import PAYLOADS, SECRET, core, event_payload, load, locked, make_client, sign, wire

if not os.environ.get("CI"):  # there it must not be missing
    pytest.importorskip("hypothesis", reason="fuzzing needs hypothesis: pip install hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("EXAMPLES") or 25)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
HURRIED = {"deadline": None, "database": None, "print_blob": True, "suppress_health_check": QUIET}
HOSTILE = [
    "error: 99\nurl: http://evil.example.com", "\n\nstacktrace:\n  x", "\x1b[2J\x1b]0;x\x07", "\u2028title: x\u202e\0",
    "<script>alert(1)</script>", "{{ 7 * 7 }}", "javascript:alert(1)", '"OR* NEAR(', "%s%n{0}", "x" * 9000, "\ud83c",
    "2026-01-01T00:00:00Z", "https://user:password@sentry.io/issues/1/",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=()), max_size=40) | st.sampled_from(HOSTILE)
INTEGERS = st.integers() | st.integers(-(2**80), 2**80)
NUMBERS = INTEGERS | st.floats(allow_nan=False, allow_infinity=False)
# Names that mean something in some place, so that values of any type get there.
NAMES = (
    "type value values frames key data id name slug level message function filename lineno in_app url vars "
    "package context password timestamp exception_id thread_id mechanism stacktrace event issue error project "
    "entries tags threads breadcrumbs request contexts extra user csp occurrence metadata errors release"
).split()
KEYS = st.sampled_from(NAMES) | TEXT
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SAMPLES = sorted(file.stem for file in PAYLOADS.glob("*.json"))
READS = (
    "/errors/latest /errors/{} /errors/{}?format=text /errors/{}?format=html /errors?format=ndjson /errors "
    "/errors?format=text /errors?format=html /issues /issues?format=text /issues?format=html / /?format=html "
    "/config /metrics"
).split()


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Return a client that all examples share, one after another."""
    folder = tmp_path_factory.mktemp("fuzz")
    client = make_client(folder, SENTRY_ACTIONS="created,triggered,unresolved")
    client.get("/health")
    client.database = folder / "data" / "errors.db"
    yield client
    core(client).close()


def check_read_back(client, body, id_):
    """Fail unless an error can be read back in every form of every endpoint."""
    assert client.get(f"/errors/{id_}/payload").data == body
    for path in READS:
        reply = client.get(path.format(id_))
        assert reply.status_code == 200, (path, reply.data)
        if reply.mimetype == "text/plain" and path.startswith("/errors/"):
            check_text(reply.text, id_)
        if reply.mimetype == "text/html":
            assert "<script" not in reply.text and "\x1b" not in reply.text
    error = client.get(f"/errors/{id_}").json
    assert client.get("/errors/latest").json == error
    (row,) = client.get("/errors?limit=1").json
    assert row.items() <= error.items()
    assert all(row[key] is None or isinstance(row[key], str) for key in set(row) - {"id"})
    for name in "project_slug issue_id level environment platform release server event_id".split():
        value = error[name]
        is_level = value in ("fatal", "error", "warning", "info", "debug", "sample")
        # A query is cut at its ends, and an issue id may be the short id of another issue.
        if value and value == value.strip() and (name != "level" or is_level):
            parameter = name.removesuffix("_slug").removesuffix("_id")
            query = {parameter: value, "limit": 1}
            assert [row["id"] for row in client.get("/errors", query_string=query).json] == [id_]


def check_text(text, id_):
    """Fail unless a text is short, begins with our lines, and nothing in it moves a cursor."""
    assert len(text) <= 8000
    assert text.startswith(f"error: {id_}\n") and f"\nurl: http://localhost/errors/{id_}\n" in text
    assert "\nerror: " not in text and text.count("\nurl: ") == 1
    assert not re.search("[\0-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text)


def check_delivery(client, body, *statuses):
    """Post bytes; fail unless the status is one of these and an error that is stored can be read back."""
    with locked(client.database) as shell:
        shell.execute("DELETE FROM errors")
        shell.execute("COMMIT")
    reply = client.deliver(body)
    assert reply.status_code in statuses, reply.data
    if reply.status_code == 201:
        check_read_back(client, body, reply.json["id"])
    else:
        assert client.errors() == [] and len(reply.data) <= 1024


def places(value, path=()):
    """Yield the path of every place in a JSON value, the value itself first."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict | list):
            yield from places(item, (*path, key))
        else:
            yield (*path, key)


@st.composite
def mutated(draw):
    """Draw a sample in which anything at all has taken some places, and new names have come."""
    payload = load(draw(st.sampled_from(SAMPLES)))
    for _ in range(draw(st.integers(1, 6))):
        *path, last = draw(st.sampled_from(list(places(payload))[1:]))
        holder = payload
        for key in path:
            holder = holder[key]
        if isinstance(holder, dict) and draw(st.booleans()):
            last = draw(st.sampled_from(NAMES))
        holder[last] = draw(JSON)
    return payload


@st.composite
def garbled(draw):
    """Draw the bytes of a sample with some of them changed, doubled or gone."""
    body = bytearray(wire(load(draw(st.sampled_from(SAMPLES)))))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        body[start : start + draw(st.integers(0, 30))] = draw(st.binary(max_size=10))
    return bytes(body)


@settings(max_examples=EXAMPLES * 3, **HURRIED)
@given(payload=mutated())
@example(payload={"event": {"entries": [{"type": "exception", "data": [{"type": "x"}]}]}})
def test_anything_anywhere_in_a_sample_can_be_read_back_or_is_refused(client, payload):
    check_delivery(client, wire(payload), 201, 200, 400)


@settings(max_examples=EXAMPLES, **HURRIED)
@given(
    body=garbled() | st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode())
)
def test_broken_bytes_and_any_json_are_refused_or_can_be_read_back(client, body):
    check_delivery(client, body, 201, 200, 400)


QUERY = "q project level environment platform issue since until limit before after format server event".split()
PATHS = "/errors /errors/latest /errors/1 /errors/1/payload /issues /metrics / /config /health /x".split()
QUERIES = st.dictionaries(st.sampled_from(QUERY) | TEXT, TEXT | INTEGERS.map(str), max_size=4)
HEADER_NAMES = (
    "Accept Authorization If-None-Match Cookie Range If-Modified-Since Forwarded Host".split()
)
HEADER_TEXT = st.text(st.characters(max_codepoint=255, exclude_characters="\r\n\0"), max_size=40)
KNOWN = st.sampled_from(
    ["text/html", "text/plain", "Basic x", "Bearer x", 'W/"', "*", "Digest a=b"]
)
HEADERS = st.dictionaries(st.sampled_from(HEADER_NAMES), HEADER_TEXT | KNOWN, max_size=3)


@settings(max_examples=EXAMPLES * 4, **HURRIED)
@given(path=st.sampled_from(PATHS), query=QUERIES, headers=HEADERS)
def test_whatever_is_asked_is_answered(client, path, query, headers):
    names = {name.encode("utf-8", "replace").decode(): query[name] for name in query}
    query = {name: value.encode("utf-8", "replace") for name, value in names.items()}
    reply = client.get(path, query_string=query, headers=headers)
    assert reply.status_code < 500, reply.data
    if reply.status_code >= 400 and reply.mimetype == "application/json":
        assert list(reply.json) == ["error"] and len(reply.data) <= 1024


@settings(max_examples=EXAMPLES, **HURRIED)
@given(signature=HEADER_TEXT | st.text("0123456789abcdef", min_size=60, max_size=68))
def test_no_made_up_signature_opens_the_door(app, signature):
    client = app(SENTRY_CLIENT_SECRET=f"{SECRET},another")
    reply = client.deliver(wire(event_payload()), Sentry_Hook_Signature=signature)
    assert reply.status_code == 401
    assert sign(wire(event_payload()))["Sentry-Hook-Signature"] not in reply.text
