"""The webhook: what is stored, what is the same error, what is ignored or refused, and what the sender is told."""

import contextlib
import json
import re
import socket

import pytest
from conftest import (
    PAYLOADS,
    SECRET,
    counts,
    event_payload,
    load,
    maintain,
    put,
    serving,
    sign,
    spooled,
    wait_for,
    wire,
)

ERRORS = (
    "issue.created error.created.python error.created.java error.created.native documented.created "
    "event_alert.triggered.javascript event_alert.triggered.message legacy_plugin service_hook sentry8_legacy"
).split()
NO_ERRORS = "issue.resolved comment.created installation.created metric_alert.resolved".split()
FORMS = "/errors/{} /errors/{}?format=text /errors/{}?format=html /errors/latest /errors?format=ndjson".split()
BODY = wire(event_payload())


def resource_of(name):
    return {"Sentry-Hook-Resource": name.split(".")[0]}


def check_readable(client, id_, body):
    """Fail unless an error can be read in every form; return it as JSON."""
    for path in FORMS:
        reply = client.get(path.format(id_))
        assert reply.status_code == 200, (path, reply.data)
        reply.data.decode()
    assert client.get(f"/errors/{id_}/payload").data == body
    return client.get(f"/errors/{id_}").json


# What is stored


@pytest.mark.parametrize("address", ["/sentry/webhook", "/sentry/webhook/"])
def test_a_new_error_is_stored_and_known_when_it_comes_again(client, database, address):
    first = client.post(address, data=BODY)
    assert (first.status_code, first.headers["Location"]) == (201, "/errors/1")
    assert first.json == {"status": "stored", "id": 1, "url": "/errors/1"}
    again = client.post(address, data=wire(event_payload(title="another")))
    assert again.status_code == 200
    assert again.json == {"status": "duplicate", "id": 1, "url": "/errors/1"}
    assert "Location" not in again.headers
    assert database("SELECT id, title FROM errors") == [(1, "ValueError: no")]


def test_every_sample_is_stored_byte_for_byte_or_is_no_error(app, database):
    assert {f"{name}.json" for name in ERRORS + NO_ERRORS} == {
        file.name for file in PAYLOADS.glob("*.json")
    }
    client = app(SENTRY_ACTIONS="created,triggered,unresolved")
    for id_, name in enumerate(ERRORS, 1):
        body = (PAYLOADS / f"{name}.json").read_bytes()
        assert client.deliver(body, **resource_of(name)).json["id"] == id_, name
        assert check_readable(client, id_, body)["resource"] == name.split(".")[0]
    for name in NO_ERRORS:
        reply = client.deliver(load(name), **resource_of(name))
        assert (reply.status_code, reply.json["status"]) == (200, "ignored")
        for words in ("no new error", name.split(".")[0], load(name)["action"]):
            assert words in reply.json["reason"], name
    assert database("SELECT count(*) FROM errors") == [(len(ERRORS),)]


ANY_WAY = [
    ({}, BODY),
    ({"Content-Type": "multipart/form-data; boundary=x"}, BODY),
    ({"Content-Type": "é", "Sentry-Hook-Resource": "é"}, BODY),
    ({"Content-Encoding": "gzip", "Expect": "100-continue"}, BODY),
    ({"Sec-Fetch-Site": "same-origin", "Sentry-Hook-Signature": "nonsense"}, BODY),
    ({"Sec-Fetch-Site": "none", "Accept": "text/html"}, BODY),
    ({"Host": "elsewhere", "X-Forwarded-Proto": "https", "X-Forwarded-Ssl": "off"}, BODY),
    ({}, b"\xef\xbb\xbf" + BODY),
    ({}, b"\r\n " + json.dumps(event_payload(title="Tüte ☕ \U0001f375"), ensure_ascii=False, indent="\t").encode()),
    ({}, BODY.ljust(5 * 1024 * 1024)),
]  # fmt: skip


@pytest.mark.parametrize(("headers", "body"), ANY_WAY, ids=range(len(ANY_WAY)))
def test_a_delivery_is_taken_in_any_way_it_is_sent(app, headers, body):
    client = app(API_TOKEN="t0ken", TRUSTED_HOSTS="localhost")
    assert client.deliver(body, **headers).status_code == 201
    reader = app()
    assert check_readable(reader, 1, body)["event_id"] == "0" * 32


ODD = [
    event_payload(title="\ud800 lone", culprit="\udfff", tags=[["\ud800", "\udc00"]], extra={"\udfff": "\ud800"}),
    event_payload("\ud800", title="NUL \0 in it", level="\0"),
    event_payload(1, issue_id=2**70, project=2**63, timestamp=2**65, received=-(2**70)),
    event_payload(-1, timestamp=10**400, exception={"values": [{"stacktrace": {"frames": [{"lineno": 2**63}]}}]}),
    event_payload([], title=["a", "list"], message=[], culprit=[[]], level=["error"], platform=[1], release=["x"]),
    event_payload({}, title={}, message={"a": 1}, environment=[None], logger=5, tags={"a": ["x"]}, metadata=[]),
    event_payload(True, title=False, exception=[], breadcrumbs="none", request=[], threads={"values": {}}),
    event_payload(2, exception={"values": [{"type": [], "value": {}, "mechanism": "x", "stacktrace": "y"}]}),
    event_payload(3, exception={"values": [None, 5, {"mechanism": {"type": {}, "handled": "no"}}]}),
    event_payload(4, breadcrumbs={"values": [{"timestamp": "x", "message": ["a"], "data": {"\ud800": 1e308}}]}),
    event_payload(5, timestamp=-62135596800, datetime="0001-01-01T00:00:00Z", web_url="javascript:alert(1)"),
    event_payload(6, title="x" * 300_000, tags=[[str(number), "v" * 500] for number in range(500)]),
    {"action": "created", "data": {"issue": {"id": ["7"], "project": "slug", "metadata": 5, "shortId": {}}}},
    {"action": "created", "data": {"event": {}, "issue": [], "project": ["x"]}},
    {"action": "created", "data": {"error": {}}, "actor": {"id": 2**70, "name": ["\ud800"], "type": None}},
    {"action": None, "event": {"entries": [None, {"type": [], "data": 5}]}, "group": {"id": 2**70}},
    {"id": [], "project": 5, "message": {}, "event": {"sentry.interfaces.Exception": 5}},
]  # fmt: skip


def test_odd_values_are_stored_once_and_can_be_read(client, database):
    for id_, payload in enumerate(ODD, 1):
        body = wire(payload)
        assert client.deliver(body).json["status"] == "stored", payload
        error = check_readable(client, id_, body)
        scalars = client.get("/errors?limit=1").json[0]
        assert scalars == {key: error[key] for key in scalars}
        assert all(value is None or isinstance(value, str | int) for value in scalars.values())
        assert client.deliver(body).json == {"status": "duplicate", "id": id_, "url": f"/errors/{id_}"}  # fmt: skip
    assert database("SELECT count(*) FROM errors") == [(len(ODD),)]
    big = client.get("/errors/3").json
    assert (big["issue_id"], big["project_id"]) == (str(2**70), str(2**63))


def test_whatever_depth_is_taken_can_be_read_back(client):
    def nested(depth):
        return b'{"event":{"event_id":"%d","extra":%b%b}}' % (depth, b"[" * depth, b"]" * depth)

    taken = 100
    refused = 100_000
    while refused - taken > 1:
        depth = (taken + refused) // 2
        if client.deliver(nested(depth)).status_code == 400:
            refused = depth
        else:
            taken = depth
    for depth in range(taken - 20, taken + 1, 4):
        id_ = client.deliver(nested(depth)).json["id"]
        check_readable(client, id_, nested(depth))
    reply = client.deliver(nested(refused))
    assert (reply.status_code, "nested too deeply" in reply.json["error"]) == (400, True)


# What is the same error


def sentry(number, issue=None, host="sentry.io", **event):
    """Return an error.created delivery with links to a host, of a project whose id is 7."""
    event = {
        "project": 7,
        "web_url": f"https://{host}/organizations/o/issues/{issue}/events/x/",
        **event,
    }
    if issue:
        event["issue_id"] = str(issue)
    return event_payload(number, **event)  # fmt: skip


def alert(number, issue=None, host="sentry.io", **event):
    """Return the event alert of the same error."""
    event = sentry(number, issue, host, **event)["data"]["error"]
    return {"action": "triggered", "data": {"event": event, "triggered_rule": "r"}}


def issue(number, action="created", host="sentry.io", **more):
    """Return an issue delivery, which has no event."""
    issue = {"id": str(number), "web_url": f"https://{host}/organizations/o/issues/{number}/"}
    issue |= {"title": "t", "shortId": f"SHOP-{number}", "project": {"id": "7", "slug": "shop"}}
    return {"action": action, "data": {"issue": issue | more}}


def legacy(number, **more):
    """Return a delivery of the legacy plugin, which has no action."""
    return {"project": "shop", "event": {"event_id": f"{number:032x}", "title": "t"}, **more}


SAME = {
    "an event that comes again": [sentry(1), sentry(1, title="other")],
    "an event and its alert": [sentry(1), alert(1)],
    "an alert and its event": [alert(1), sentry(1)],
    "an organization's own address is sentry.io": [sentry(1), sentry(1, host="acme.sentry.io")],
    "a legacy delivery that comes again": [legacy(1), legacy(1, level="info")],
    "an issue after one of its errors": [sentry(1, issue=5), issue(5)],
    "an issue after a later error": [sentry(1, issue=5), sentry(2, issue=6), issue(5)],
    "an issue that comes again": [issue(5), issue(5, title="other")],
    "a regression, byte for byte": [issue(5, "unresolved"), issue(5, "unresolved")],
    "an issue after its regression": [issue(5, "unresolved"), issue(5)],
    "no ids, byte for byte": [{"event": {"title": "t"}}, {"event": {"title": "t"}}],
}
NEW = {
    "another event": [sentry(1), sentry(2)],
    "the event of another server": [sentry(1), sentry(1, host="sentry.example")],
    "the event of another project": [sentry(1), sentry(1, project=8)],
    "the legacy event of another project": [legacy(1), legacy(1, project="tea")],
    "an error after its issue": [issue(5), sentry(1, issue=5)],
    "the issue of another server": [sentry(1, issue=5), issue(5, host="sentry.example")],
    "another issue": [issue(5), issue(6)],
    "an issue without errors of another server": [issue(5), issue(5, host="sentry.example")],
    "a regression after an error of its issue": [sentry(1, issue=5), issue(5, "unresolved")],
    "a regression after its issue": [issue(5), issue(5, "unresolved")],
    "a later regression": [issue(5, "unresolved"), issue(5, "unresolved", title="other")],
    "no ids, another body": [{"event": {"title": "t"}}, {"event": {"title": "t", "level": "info"}}],
}


@pytest.mark.parametrize("name", [*SAME, *NEW])
def test_what_is_the_same_error_makes_one_row(app, database, tmp_path, name):
    client = app(SENTRY_ACTIONS="created,triggered,unresolved")
    *before, last = (SAME | NEW)[name]
    for payload in before:
        assert client.deliver(payload).json["status"] == "stored"
    status = "duplicate" if name in SAME else "stored"
    assert client.deliver(last).json["status"] == status
    rows = len(before) + (name in NEW)
    for number, payload in enumerate([*before, last]):  # the spool is the same way in
        put(tmp_path, number, wire(payload))
    maintain(app())
    assert spooled(tmp_path) == []
    for table in ("errors", "bodies"):
        assert database(f"SELECT count(*) FROM {table}") == [(rows,)]


def test_a_row_learns_its_short_id_and_nothing_else(client):
    client.deliver(sentry(1, issue=5))
    before = client.get("/errors/1").json
    assert client.deliver(issue(5, title="another")).json["id"] == 1
    after = client.get("/errors/1").json
    assert (before["short_id"], after["short_id"]) == (None, "SHOP-5")
    assert after == before | {"short_id": "SHOP-5"}
    client.deliver(issue(5, shortId="OTHER-1"))
    assert client.get("/errors/1").json == after
    assert client.errors("issue=SHOP-5") == [1] and client.errors("issue=OTHER-1") == []


# What is ignored

IGNORED = [
    ("created", load("event_alert.triggered.javascript"), "SENTRY_ACTIONS=created,triggered"),
    ("created", issue(5, "unresolved"), "SENTRY_ACTIONS=created,unresolved"),
    (" triggered , unresolved ", event_payload(), "SENTRY_ACTIONS=triggered,unresolved,created"),
    ("created", {"action": "resolved", "data": {"error": {"event_id": "1"}}}, "'resolved'"),
    ("created", {"action": "created", "data": {"unheard_of": {}}}, "no new error"),
    ("created", {"action": "created", "data": None}, "no new error"),
    ("created", {"action": "created"}, "resource 'odd kind'"),
    ("created,triggered", {"action": "triggered", "data": {"issue": {"id": "1"}, "activity": {}}}, "no new error"),
    ("created", {"action": "e\u0301" * 5000, "data": {}}, "no new error"),
    ("created", {"action": "\ud800\0\n", "data": {}}, "no new error"),
]  # fmt: skip


@pytest.mark.parametrize(("actions", "payload", "words"), IGNORED, ids=range(len(IGNORED)))
def test_what_is_not_accepted_is_ignored_with_a_reason(app, database, actions, payload, words):
    client = app(SENTRY_ACTIONS=actions)
    reply = client.deliver(payload, Sentry_Hook_Resource="odd kind")
    assert (reply.status_code, list(reply.json)) == (200, ["status", "reason"])
    assert reply.json["status"] == "ignored"
    assert words in reply.json["reason"]
    assert len(reply.data) < 400
    assert [outcome for outcome, _ in counts(client)] == ["ignored"]
    assert database("SELECT count(*) FROM errors") == [(0,)]


def test_the_operator_says_which_actions_are_taken(app):
    client = app(SENTRY_ACTIONS="triggered,unresolved")
    for payload in (alert(1), issue(5, "unresolved"), legacy(1)):
        assert client.deliver(payload).status_code == 201


# What is refused

LIMIT = 1000
SIGNED = "signed"  # stands for the headers that sign the body
# Why: the body, the headers, the status, the reason that is counted, and words of the reply.
REFUSED = {
    "too large": (b"x" * (LIMIT + 1), SIGNED, 413, "too large", f"{LIMIT} bytes|MAX_BODY_BYTES"),
    "nothing": (b"", SIGNED, 400, "not JSON", "not JSON"),
    "words": (b"hello", SIGNED, 400, "not JSON", "not JSON"),
    "two": (BODY + BODY, SIGNED, 400, "not JSON", "not JSON"),
    "a form": (b"payload=%7B%7D", SIGNED, 400, "not JSON", "not JSON"),
    "a number too long": (b'{"event":%s}' % (b"1" * 5000)[: LIMIT - 20], SIGNED, 400, "no delivery", "'action'"),
    "UTF-16": (BODY.decode().encode("utf-16"), SIGNED, 400, "not UTF-8", "UTF-8"),
    "Latin-1": (b'{"event":{"title":"\xe9"}}', SIGNED, 400, "not UTF-8", "UTF-8"),
    "a list": (b"[]", SIGNED, 400, "no object", "not an object"),
    "null": (b"null", SIGNED, 400, "no object", "not an object"),
    "text": (b'"action"', SIGNED, 400, "no object", "not an object"),
    "an empty object": (b"{}", SIGNED, 400, "no delivery", "'action'|'event'"),
    "no signature": (BODY, {}, 401, "signature missing", "missing|SENTRY_CLIENT_SECRET|plugin"),
    "an empty signature": (BODY, {"Sentry-Hook-Signature": ""}, 401, "signature missing", "missing"),
    "a short signature": (BODY, {"Sentry-Hook-Signature": "abc"}, 401, "signature wrong", "wrong|SENTRY_CLIENT_SECRET"),
    "no hexadecimal": (BODY, {"Sentry-Hook-Signature": "é" * 64}, 401, "signature wrong", "wrong"),
    "GitHub's": (BODY, {"Sentry-Hook-Signature": f"sha256={'a' * 64}"}, 401, "signature wrong", "wrong"),
    "a long signature": (BODY, {"Sentry-Hook-Signature": "A" * 5000}, 401, "signature wrong", "wrong"),
    "another secret": (BODY, sign(BODY, "another"), 401, "signature wrong", "wrong|Client Secret"),
    "an empty secret": (BODY, sign(BODY, ""), 401, "signature wrong", "wrong"),
    "both secrets at once": (BODY, sign(BODY, f"{SECRET},old"), 401, "signature wrong", "wrong"),
    "a blank more": (BODY + b" ", sign(BODY), 401, "signature wrong", "wrong"),
    "rewritten": (json.dumps(event_payload()).encode(), sign(BODY), 401, "signature wrong", "wrong"),
    "broken and not signed": (b"[" * LIMIT, {"Sentry-Hook-Signature": "a" * 64}, 401, "signature wrong", "wrong"),
    "from another page": (BODY, sign(BODY) | {"Sec-Fetch-Site": "cross-site"}, 403, "sent by a web page", "web page"),
    "from a neighbour": (BODY, sign(BODY) | {"Sec-Fetch-Site": "same-site"}, 403, "sent by a web page", "web page"),
    "size first": (b"[" * (LIMIT + 1), {}, 413, "too large", "MAX_BODY_BYTES"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_told_why_counted_and_logged(app, database, log, name):
    body, headers, status, reason, words = REFUSED[name]
    client = app(SENTRY_CLIENT_SECRET=f"{SECRET},old", MAX_BODY_BYTES=LIMIT)
    headers = sign(body) if headers is SIGNED else headers
    reply = client.deliver(body, **headers, X_Forwarded_For="192.0.2.7, 198.51.100.1")
    assert (reply.status_code, reply.mimetype) == (status, "application/json")
    assert list(reply.json) == ["error"] and len(reply.data) <= 1024
    assert [word for word in words.split("|") if word not in reply.json["error"]] == []
    lines = [line for line in log() if line.startswith("webhook ")]
    assert len(lines) == 1
    assert f"refused {status} {reason}" in lines[0] and "192.0.2.7 198.51.100.1" in lines[0]
    for secret in (SECRET, sign(body)["Sentry-Hook-Signature"]):
        assert secret not in reply.text + lines[0] + str(reply.headers)
    assert counts(client) == {("refused", reason): 1}
    assert database("SELECT count(*) FROM errors") == [(0,)]


# Where something else is posted to: the status, in order of path.
WRONG = {
    "/": 405, "/errors": 405, "/errors/latest": 405, "/health": 405, "/sentry": 404, "/sentry/webhooks": 404,
    "/api/1/store/": 404, "/SENTRY/WEBHOOK": 404, "/errors/1%0a%1b[31m": 404,
}  # fmt: skip


def test_a_post_to_a_wrong_address_is_told_the_right_one_counted_and_logged(app, log):
    client = app(PUBLIC_URL="https://errors.example.com/below", API_TOKEN="t0ken")
    for path, status in WRONG.items():
        reply = client.post(path, data=BODY)
        assert (reply.status_code, list(reply.json)) == (status, ["error"]), path
        assert "https://errors.example.com/below/sentry/webhook" in reply.json["error"]
    lines = [line for line in log() if "wrong address" in line]
    assert lines and "from 127.0.0.1" in lines[0]
    assert all(line.isascii() and line.isprintable() for line in lines)
    token = {"Authorization": "Bearer t0ken"}
    assert counts(client, **token) == {("refused", "wrong address"): len(WRONG)}
    (row,) = client.get("/", headers=token).json["deliveries"]
    assert row["cure"] == "set the integration's Webhook URL to https://errors.example.com/below/sentry/webhook"  # fmt: skip


# Signatures, made with: openssl dgst -sha256 -hmac SECRET
VECTORS = [
    (
        "test-client-secret",
        b'{"action":"created","data":{"error":{"event_id":"v1","title":"plain"}}}',
        "7a02375e9987e7a0ad2b43af45f9cd0a36870c70a0add826d72ef0e0195bbe6f",
    ),
    (
        "test-client-secret",
        rb'{"action":"created","data":{"error":{"event_id":"v2","title":"\u62b9\u8336\u30e9\u30c6 \ud83c\udf75"}}}',
        "4f3f3a25970d5d78531d913e6c08f19950f0ed55a21273ea122d40de3c8eba94",
    ),
    (
        "test-client-secret",
        b'{"action":"created","data":{"error":{"event_id":"v3","timestamp":100.0,"extra":[1e-07,null]}}}',
        "2cd4308745d7eb8cce986a340f835983c8cac37561c50eb0bf68ec00b0fcab38",
    ),
    (
        "gehëim 🍵",
        b'{"event": {"event_id": "v4"}}',
        "13f84c1cea4d2cd724a2057801888b4a95be36c60164c17b1b231e22689210e6",
    ),
]
# The settings under which the secret signs, with what people paste around it.
SPELLINGS = ["{}", " {}\n", '"{}"', "'{}' ", "{},old", "old , {}", "old,,{},", 'old,"{}"']


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("secret", "body", "signature"), VECTORS, ids=["plain", "escapes", "numbers", "secret"])  # fmt: skip
def test_a_right_signature_is_accepted_and_one_digit_off_is_not(app, spelling, secret, body, signature):  # fmt: skip
    client = app(SENTRY_CLIENT_SECRET=spelling.format(secret))
    off = signature[:-1] + "10"[signature[-1] == "1"]
    assert client.deliver(body, **{"Sentry-Hook-Signature": off}).status_code == 401
    assert client.deliver(body, **{"SENTRY-HOOK-SIGNATURE": signature}).status_code == 201
    if "old" in spelling:
        assert client.deliver(body, **sign(body, "old")).json["status"] == "duplicate"


# What is told of deliveries


def test_deliveries_are_counted_by_outcome_and_reason_with_the_last_time_and_a_cure(app):
    client = app(SENTRY_CLIENT_SECRET=SECRET)
    assert client.get("/config").json["deliveries"] == []
    assert client.get("/").json["last_delivery_at"] is None
    for payload in (event_payload(), event_payload(), load("comment.created"), alert(1), []):
        client.deliver(payload, **sign(wire(payload)))
    client.deliver(event_payload())
    client.deliver(event_payload(2), **sign(wire(event_payload(2))))
    assert counts(client) == {
        ("stored", None): 2,
        ("duplicate", None): 1,
        ("ignored", "no error"): 1,
        ("ignored", "action not accepted"): 1,
        ("refused", "no object"): 1,
        ("refused", "signature missing"): 1,
    }
    client.deliver(event_payload(2), **sign(wire(event_payload(2))))
    assert counts(client)["duplicate", None] == 2
    for path in ("/", "/config"):
        shown = client.get(path).json
        times = [row["last_at"] for row in shown["deliveries"]]
        assert times == sorted(times, reverse=True) and shown["last_delivery_at"] == times[0]
        assert shown["deliveries"][0]["outcome"] == "duplicate"
        cures = {row["reason"]: row["cure"] for row in shown["deliveries"]}
        assert cures[None] is None and all(cure for reason, cure in cures.items() if reason)
    page = client.get("/?format=html").text
    metrics = client.get("/metrics").text
    for reason in ("signature missing", "action not accepted"):
        assert reason in page
        count = re.search(rf'{{outcome="\w+",reason="{reason}"}} (\d+)', metrics)
        assert count[1] == "1"


def test_each_delivery_logs_one_line_and_nothing_of_its_content(app, log):
    client = app(SENTRY_CLIENT_SECRET=SECRET)
    secret = "c0nfidential"
    known = wire(event_payload(title=secret, web_url=f"https://{secret}"))
    bodies = [known, known, wire({"action": "commented", "data": {secret: 1}}), secret.encode()]
    for body in bodies:
        client.deliver(body, **sign(body), Sentry_Hook_Resource="error", Request_ID="0123abcd")
    client.deliver(known, Sentry_Hook_Signature=secret * 6, Cookie=secret)
    lines = [line for line in log() if line.startswith("webhook ")]
    outcomes = ["stored 1", "duplicate 1", "ignored", "refused 400", "refused 401"]
    assert len(lines) == len(outcomes)
    for line, outcome in zip(lines, outcomes, strict=True):
        assert line.startswith(f"webhook {outcome}") and re.search(r"\d ms$", line)
        assert ("from 127.0.0.1" in line) == ("refused" in outcome)
    assert all("error 0123abcd" in line for line in lines[:4])
    assert secret not in "".join(log()) and SECRET not in "".join(log())


@pytest.mark.parametrize("value", ["a\x1b[31mred", "a\x85b", "é" * 500, "a" * 5000, "stored 99; x; 1 ms"])  # fmt: skip
def test_a_header_cannot_forge_a_log_line(client, log, value):
    headers = dict.fromkeys(("Sentry_Hook_Resource", "Request_ID", "X_Forwarded_For"), value)
    client.deliver({"action": f"x\n{value}", "data": {}}, **headers)
    client.deliver(b"[]", **headers)
    for line in log():
        assert line.isascii() and line.isprintable() and len(line) < 400
        assert "stored 99; x" not in line.split(";", 1)[1]


# The wire

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /sentry/webhook HTTP/1.1\r\nHost: x\r\n"
HOST = b"Host: x\r\n\r\n"
BROKEN = {
    "nothing": b"", "empty lines": b"\r\n\r\n\r\n\r\n", "words": b"no HTTP at all\r\n\r\n",
    "bytes": bytes(range(256)) * 10, "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\n" + HOST, "method in small letters": b"get / HTTP/1.1\r\n" + HOST,
    "unknown method": b"BREW / HTTP/1.1\r\n" + HOST, "long line": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST,
    "no end": b"A" * 1_000_000, "asterisk": b"GET * HTTP/1.1\r\n" + HOST,
    "whole URL": b"GET http://x/errors HTTP/1.1\r\n" + HOST, "CONNECT": b"CONNECT x:80 HTTP/1.1\r\n" + HOST,
    "TRACE": b"TRACE / HTTP/1.1\r\n" + HOST, "path no UTF-8": b"GET /errors/%ff%fe HTTP/1.1\r\n" + HOST,
    "path not escaped": b"GET /errors/\xff HTTP/1.1\r\n" + HOST,
    "path upwards": b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST,
    "id too large": b"GET /errors/99999999999999999999999999 HTTP/1.1\r\n" + HOST,
    "query no UTF-8": b"GET /errors?q=%ff%00&project=%zz HTTP/1.1\r\n" + HOST,
    "header without colon": GET + b"Authorization Bearer s3cret\r\n\r\n",
    "long header without colon": GET + b"\x80" * 800_000 + b"\r\n\r\n",
    "long header": GET + b"X: " + b"y" * 50_000 + b"\r\n\r\n", "many headers": GET + b"X: y\r\n" * 5000 + b"\r\n",
    "folded header": GET + b"X: y\r\n z\r\n\r\n", "NUL in header": GET + b"X: \0\r\n\r\n",
    "line feeds only": GET.replace(b"\r", b"") + b"\n", "two hosts": GET + HOST,
    "odd host": b"GET / HTTP/1.1\r\nHost: \xff:/@[\r\n\r\n", "script name": GET + b"SCRIPT_NAME: /x\r\n\r\n",
    "path info": GET + b"PATH_INFO: /errors/1\r\n\r\n",
    "two schemes": GET + b"X-Forwarded-Proto: https\r\nX-Forwarded-Ssl: off\r\n\r\n",
    "odd accept": GET + b"Accept: \xff;q=nan, text/html;q=1e999, ;;;\r\n\r\n",
    "odd authorization": GET + b"Authorization: Basic \xff\xfe:::\r\n\r\n",
    "odd etag": GET + b'If-None-Match: W/"\xff, "", *\r\n\r\n', "odd range": GET + b"Range: bytes=-9-9,\xff\r\n\r\n",
    "odd cookie": GET + b"Cookie: \xff=\x80; =;;\r\n\r\n",
    "expectation": POST + b"Expect: miracles\r\nContent-Length: 2\r\n\r\n{}", "no length": POST + b"\r\n{}",
    "two lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "length in words": POST + b"Content-Length: two\r\n\r\n{}",
    "length in odd digits": POST + "Content-Length: ²\r\n\r\n{}".encode("latin-1"),
    "endless length": POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "length too large": POST + b"Content-Length: 999999999999\r\n\r\n{}",
    "body cut short": POST + b"Content-Length: 100\r\n\r\n{}",
    "chunked": POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunks of nonsense": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    "chunked and a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    "gzip": POST + b"Transfer-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "odd type": POST + b"Content-Type: multipart/form-data; boundary=\xff\r\nContent-Length: 2\r\n\r\n{}",
    "odd signature": POST + b"Sentry-Hook-Signature: \xe9\r\nContent-Length: 2\r\n\r\n{}",
    "odd resource": POST + b"Sentry-Hook-Resource: \xe9\x85\xa0\r\nContent-Length: 2\r\n\r\n{}",
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a server that several tests use."""
    with serving(tmp_path_factory.mktemp("shared")) as server:
        wait_for(lambda: server.log.read_text().count("Booting worker") == 4)
        wait_for(lambda: len(server.workers()) == 4)  # and no child that upgrades
        yield server


def exchange(server, data):
    """Return the reply to `data` from a client that says no more, and its status, None without one."""
    parts = []
    address = ("127.0.0.1", server.port)
    with socket.create_connection(address, 20) as connection, contextlib.suppress(OSError):
        with contextlib.suppress(OSError):  # it may close before all is sent
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(1 << 16):
            parts.append(part)
    reply = b"".join(parts)
    return reply, int(reply.split(b" ")[1]) if reply else None


def test_broken_http_is_refused_in_a_short_log_line_at_most(shared):
    before = (shared.workers(), shared.get("/")["counts"])
    for name, data in BROKEN.items():
        since = shared.log.stat().st_size
        reply, status = exchange(shared, data)
        assert status is None or status < 500, (name, reply[:500])
        logged = shared.log.read_bytes()[since:].decode()
        assert logged.count("\n") <= 1 and len(logged) < 1000, (name, logged)
        assert "s3cret" not in logged
        assert logged.removesuffix("\n").isprintable(), (name, logged)
    assert (shared.workers(), shared.get("/")["counts"]) == before


PROXIES = [
    {"X-Forwarded-Proto": "https", "X-Forwarded-Ssl": "off"}, {"X-Forwarded-Protocol": "https", "SCRIPT_NAME": "/x"},
    {"X-Forwarded-Proto": "\xff, javascript"}, {"Expect": "100-continue"}, {},
]  # fmt: skip


def test_what_a_proxy_adds_refuses_no_delivery_and_moves_no_path(shared):
    for number, headers in enumerate(PROXIES):
        body = wire(event_payload(f"proxy {number}"))
        content = body
        if not headers:  # then the client sends it in chunks
            content = iter([body[:10], body[10:]])
        status, _, reply = shared.request("POST", "/sentry/webhook", content, headers)
        assert status == 201, (headers, reply)
    url = shared.get("/errors/latest")["url"]
    assert shared.request("GET", f"{url}/payload")[2] == body
    headers = {"Host": "errors_1:8000", "X-Forwarded-Proto": "https", "SCRIPT_NAME": "/elsewhere"}
    address = shared.get("/", **headers)["connect"]["webhook_url"]
    assert address == "https://errors_1:8000/sentry/webhook"
    status, _, reply = shared.request("POST", "/sentry/webhook", iter([b" " * 1_000_000] * 6))
    assert status == 413 and b"MAX_BODY_BYTES" in reply
    reply, status = exchange(shared, POST + b"Content-Length: 999999999999\r\n\r\n{}")
    assert status == 413 and b"MAX_BODY_BYTES" in reply  # none of it is waited for
