"""Reading: errors and issues as JSON, text, lines and a feed; filters, pages, tags, failures."""

import base64
import contextlib
import json
import re
import sqlite3
import time
import xml.etree.ElementTree as ET
from datetime import UTC, datetime, timedelta
from itertools import chain
from urllib.parse import quote

import pytest
from conftest import (
    ROOT,
    SECRET,
    core,
    count_rows,
    counts,
    event_payload,
    load,
    maintain,
    post,
    sign,
    wire,
)

from collector import choose_form, create_app

SUMMARY_KEYS = (
    "id url received_at timestamp resource action event_id issue_id short_id title message culprit "
    "level status platform logger environment release project_id project_slug project_name "
    "exception_type exception_value permalink rule server category"
).split()
DETAIL_KEYS = [
    *SUMMARY_KEYS,
    *"exceptions stacktrace tags actor request breadcrumbs user contexts extra csp".split(),
    *"issue_stats occurrences".split(),
]
FRAME_KEYS = (
    "filename abs_path module function lineno colno in_app pre_context context_line post_context "
    "package instruction_addr vars"
).split()
ISSUE_KEYS = (
    "issue_id short_id server project_id project_slug title culprit level category count "
    "first_seen last_seen newest url"
).split()
NOW = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
ATOM = "{http://www.w3.org/2005/Atom}"


@pytest.fixture
def app(make_app):
    """Return an app that does not wait for the disk, of which nothing here is."""
    app = make_app()
    core(app).database.connection().execute("PRAGMA synchronous = OFF")
    return app


def ids(reply):
    """Return the ids of the errors in a reply of /errors."""
    assert reply.status_code == 200, reply.data
    return [row["id"] for row in reply.json]


def execute(app, sql, *values):
    """Change the database behind the app's back."""
    with core(app).database.transaction() as connection:
        connection.execute(sql, values)


def issue_event(number, issue_id, **event):
    """Return a small delivery of an issue on sentry.io."""
    url = f"https://tea.sentry.io/issues/{issue_id}/events/{number}/"
    return event_payload(str(number), issue_id=str(issue_id), web_url=url, **event)


# --------------------------------------------------------------------------------------------------
# One error
# --------------------------------------------------------------------------------------------------


def test_an_error_in_full_has_every_key_even_of_an_empty_event(client):
    post(client, {"event": {}})
    error = client.get("/errors/1").json
    assert re.fullmatch(NOW, error["received_at"])
    assert error == dict.fromkeys(DETAIL_KEYS) | {
        "id": 1,
        "url": "/errors/1",
        "received_at": error["received_at"],
        "timestamp": error["received_at"],
        "category": "error",
        "exceptions": [],
        "stacktrace": [],
        "tags": {},
        "breadcrumbs": [],
    }
    assert list(error) == DETAIL_KEYS


def test_an_error_in_full_has_the_shapes_it_should(client):
    post(client, load("error.created.python"), Sentry_Hook_Resource="error")
    error = client.get("/errors/1").json
    assert list(error) == DETAIL_KEYS
    chain = [(exception["type"], exception["main"]) for exception in error["exceptions"]]
    assert chain == [("KeyError", False), ("CheckoutError", True)]
    assert error["exceptions"][1]["frames"] == error["stacktrace"]
    assert [list(frame) for frame in error["stacktrace"]] == [FRAME_KEYS] * 4
    assert error["exceptions"][0]["frames"][-1]["vars"] == {"tea": "77", "row": {"name": "'Assam'"}}
    assert list(error["request"]) == ["method", "url", "query", "headers", "data"]
    at = error["received_at"]
    assert error["occurrences"] == {
        "count": 1, "first_seen": at, "last_seen": at, "releases": ["shop@2.14.0"]
    }  # fmt: skip


def test_the_occurrences_are_those_of_the_issue_on_its_server(client):
    for number in range(5):
        post(client, issue_event(number, 9, release=f"tea@{number % 3}"))
    url = "https://sentry.example.org/issues/9/events/7/"
    post(client, event_payload("7", issue_id="9", web_url=url))
    first = client.get("/errors/1").json
    newest = client.get("/errors/5").json
    assert first["occurrences"] == newest["occurrences"]
    assert first["occurrences"] == {
        "count": 5,
        "first_seen": first["received_at"],
        "last_seen": newest["received_at"],
        "releases": ["tea@1", "tea@0", "tea@2"],
    }
    assert client.get("/errors/6").json["occurrences"]["count"] == 1


def test_the_latest_is_the_one_received_last_whatever_its_own_time(client):
    assert client.get("/errors/latest").status_code == 404
    post(client, event_payload("new", datetime="2030-01-01T00:00:00Z"))
    post(client, event_payload("old", datetime="1999-01-01T00:00:00Z"))
    assert client.get("/errors/latest").json == client.get("/errors/2").json
    assert client.get("/errors/latest").json["event_id"] == "old"


def test_a_list_has_the_scalar_keys_only(client):
    post(client, load("error.created.python"))
    (row,) = client.get("/errors").json
    assert list(row) == SUMMARY_KEYS
    assert row.items() <= client.get("/errors/1").json.items()


def test_a_payload_is_sent_as_it_came_and_as_json(client):
    payload = load("event_alert.triggered.message") | {"action": "created"}
    body = json.dumps(payload, ensure_ascii=False, indent=7).encode()
    post(client, body)
    reply = client.get("/errors/1/payload", headers={"Accept": "text/html"})
    assert (reply.data, reply.mimetype) == (body, "application/json")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"


def test_replies_in_json_are_ascii_and_end_a_line(client):
    post(client, event_payload(title="grün \x1b[31m \u202e"))
    for path in ("/errors/1", "/errors", "/errors?format=ndjson", "/issues", "/"):
        reply = client.get(path)
        assert reply.data.isascii() and reply.data.endswith(b"\n") and b"\x1b" not in reply.data


def test_a_head_request_is_answered_without_a_body(client):
    post(client, event_payload())
    for path in ("/errors/1", "/errors?format=ndjson", "/errors?format=atom", "/issues", "/health"):
        reply = client.head(path)
        assert (reply.status_code, reply.data) == (200, b"")


@pytest.mark.parametrize(
    ("accept", "form"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("image/png", "json"),
        ("application/*", "json"),
        ("text/plain", "text"),
        ("text/plain; charset=utf-8", "text"),
        ("text/markdown", "text"),
        ("text/*", "text"),
        ("TEXT/PLAIN", "text"),
        ("text/html, text/plain", "text"),
        ("text/markdown, text/html, */*", "text"),
        ("text/plain;q=0.5, application/json;q=0.4", "text"),
        ("text/plain;q=0.5, text/html", "html"),
        ("text/html;q=0.1, */*;q=0", "html"),
        ("text/html;q=0", "json"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "html"),
        ("application/atom+xml", "atom"),
        (";;;q=,*/q=nan;,\xff", "json"),
    ],
)
def test_the_form_is_the_one_that_is_preferred(idle_app, accept, form):
    with idle_app.test_request_context("/errors", headers={"Accept": accept}):
        assert choose_form("json", "text", "html", "ndjson", "atom") == form


def test_the_form_is_the_one_asked_for(client):
    post(client, event_payload())
    types = {"json": "application/json", "text": "text/plain", "html": "text/html"}
    for path in ("/errors/1", "/errors/latest", "/errors", "/issues"):
        for form, mimetype in types.items():
            headers = {"Accept": "image/png"}
            reply = client.get(f"{path}?format={form}", headers=headers)
            assert (reply.status_code, reply.mimetype) == (200, mimetype)
            assert client.get(path, headers={"Accept": mimetype}).mimetype == mimetype
            assert {"Accept", "Authorization"} <= set(reply.headers["Vary"].split(", "))


def test_a_trailing_slash_reads_the_same(client):
    post(client, issue_event(1, 9))
    for path in ("/errors/1", "/errors/latest", "/errors", "/errors/1/payload", "/issues"):
        assert client.get(f"{path}/").data == client.get(path).data
    for path in ("/config/", "/health/", "/metrics/"):
        assert client.get(path).status_code == 200


# --------------------------------------------------------------------------------------------------
# One shape of failures
# --------------------------------------------------------------------------------------------------

FAULTS = [
    ("GET", "/nowhere", 404, "/"),
    ("GET", "/errors/1", 404, "no error 1"),
    ("GET", "/errors/-1", 404, "/"),
    ("GET", "/errors/9223372036854775808", 404, "no error"),
    ("GET", "/errors/" + "9" * 4000, 404, "no error"),
    ("GET", "/errors/1/payload", 404, "no error 1"),
    ("GET", "/errors/latest", 404, "No error"),
    ("GET", "/errors/latest?level=fatal", 404, "No error matches"),
    ("GET", "/sentry/webhook", 405, "GET"),
    ("POST", "/errors", 405, "http://localhost/sentry/webhook"),
    ("DELETE", "/errors/1", 405, "DELETE"),
    ("POST", "/sentry/webhook", 400, "not JSON"),
    ("GET", "/errors?limit=0", 400, "limit=", "1 to 1000"),
    ("GET", "/errors?limit=1001", 400, "limit=", "1 to 1000"),
    ("GET", "/errors?limit=%D9%A5", 400, "limit="),
    ("GET", "/errors?format=ndjson&limit=" + "9" * 50, 400, "limit="),
    ("GET", "/errors?before=9223372036854775808", 400, "before="),
    ("GET", "/errors?after=-1", 400, "after="),
    ("GET", "/errors?since=yesterday", 400, "since='yesterday'", "ISO 8601"),
    ("GET", "/errors?until=5y", 400, "until='5y'", "15m"),
    ("GET", "/errors?since=2026-13-01", 400, "since="),
    ("GET", "/errors?level=error&level=info", 400, "level", "once"),
    ("GET", "/errors?level=error,loud", 400, "'loud'", "fatal"),
    ("GET", "/errors?levle=error", 400, "'levle'", "level"),
    ("GET", "/errors?" + "x" * 3000, 400, "unknown"),
    ("GET", "/errors?%F0%9F%8D%B5=%1B[31m", 400, "unknown"),
    ("GET", "/errors?limit=" + quote("🍵" * 400), 400, "limit="),
    ("GET", "/errors?format=xml", 400, "format='xml'", "ndjson"),
    ("GET", "/errors?refresh=5;url=https://evil.example.com", 400, "refresh="),
    ("GET", "/errors/latest?refresh=0", 400, "refresh="),
    ("GET", "/errors/latest?limit=5", 400, "'limit'"),
    ("GET", "/errors/1?format=ndjson", 400, "format='ndjson'"),
    ("GET", "/errors/1?level=error", 400, "'level'"),
    ("GET", "/errors/1?within=level%3Dloud", 400, "level='loud'"),
    ("GET", "/errors/1/payload?format=json", 400, "'format'"),
    ("GET", "/issues?environment=x", 400, "'environment'"),
    ("GET", "/issues?before=x", 400, "before="),
    ("GET", "/?format=text", 400, "format='text'", "html"),
]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"), [(*fault[:3], fault[3:]) for fault in FAULTS]
)
def test_every_failure_has_one_shape_and_says_what_to_do(idle_app, method, path, status, words):
    client = idle_app.test_client()
    url, _, query = path.partition("?")
    form = {"method": method, "query_string": query, "environ_overrides": {"CONTENT_LENGTH": "0"}}
    reply = client.open(url, **form)
    assert (reply.status_code, reply.mimetype) == (status, "application/json")
    assert list(reply.json) == ["error"]
    for word in words:
        assert word in reply.json["error"]
    assert len(reply.data) <= 1024
    assert reply.data.isascii()
    assert ("Allow" in reply.headers) == (status == 405)

    if "format=" in path:
        return
    page = client.open(url, headers={"Accept": "text/html"}, **form)
    assert (page.status_code, page.mimetype) == (status, "text/html")
    assert "\x1b" not in page.text
    assert "Content-Security-Policy" in page.headers
    assert 'role="alert"' in page.text


def test_a_redirect_is_never_sent(client):
    for path in ("//errors", "/sentry//webhook", "/errors/latest//", "/sentry/webhook//"):
        for method in ("GET", "POST"):
            status = client.open(method=method, environ_overrides={"PATH_INFO": path}).status_code
            assert not 300 <= status < 400, path


@pytest.mark.parametrize("character", ["x", "\\", "ü", "\U0001f375", "\x1b", "\n"])
def test_a_failure_stays_short_whatever_the_folder_is_called(tmp_path, character):
    name = character * (200 // len(character.encode()))
    folder = tmp_path / name / name / name
    app = create_app({"DATABASE_URL": f"sqlite:///{folder}/errors.db"})
    core(app).start()
    core(app).database.close()
    folder.rename(tmp_path / "away")
    folder.parent.chmod(0o500)
    (folder.parent / folder.name).touch()
    client = app.test_client()
    for path in ("/health", "/errors", "/errors/1"):
        reply = client.get(path)
        assert (reply.status_code, list(reply.json)) == (503, ["error"])
        assert len(reply.data) <= 1024
    core(app).database.close()


@pytest.mark.parametrize("form", ["json", "text", "html"])
def test_an_error_deleted_while_it_is_read_is_not_found(app, client, form):
    post(client, event_payload())
    database = core(app).database

    def delete_before(sql):
        if sql.startswith("SELECT payload"):
            with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as other:
                other.execute("DELETE FROM errors")

    database.connection().set_trace_callback(delete_before)
    assert client.get(f"/errors/1?format={form}").status_code == 404
    assert count_rows(app) == 0


# --------------------------------------------------------------------------------------------------
# The token
# --------------------------------------------------------------------------------------------------

TOKEN = "t0ken/with+signs="
GUARDED = (
    "/ /?format=html /config /metrics /errors /errors?format=ndjson /errors?format=atom /issues "
    "/errors/latest /errors/1 /errors/1/payload"
).split()


def basic(password, user="anybody"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def guarded(make_app):
    client = make_app(API_TOKEN=TOKEN).test_client()
    assert post(client, event_payload()).status_code == 201
    return client


def test_who_knows_the_token_reads(guarded):
    for path in GUARDED:
        for words in (f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN), basic(TOKEN, "")):
            assert guarded.get(path, headers={"Authorization": words}).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None, "", TOKEN, "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x",
        f"Token {TOKEN}", f"Digest {TOKEN}", "Bearer \xe9", basic("wrong"), basic("x", TOKEN),
        basic(""), "Basic", "Basic %%%", "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic " + base64.b64encode(TOKEN.encode()).decode(),
    ],
)  # fmt: skip
def test_who_does_not_know_the_token_reads_nothing(guarded, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    for path in GUARDED:
        reply = guarded.get(path, headers=headers)
        assert (reply.status_code, list(reply.json)) == (401, ["error"])
        assert "API_TOKEN" in reply.json["error"] and "Bearer" in reply.json["error"]
        assert TOKEN not in reply.text
        assert reply.headers["WWW-Authenticate"].startswith("Basic realm=")


def test_health_robots_and_webhook_need_no_token(guarded):
    assert guarded.get("/health").json == {"status": "ok"}
    assert guarded.get("/robots.txt").text == "User-agent: *\nDisallow: /\n"
    assert post(guarded, event_payload("2")).status_code == 201


def test_reading_takes_no_signature(make_app):
    client = make_app(SENTRY_CLIENT_SECRET=SECRET).test_client()
    body = wire(event_payload())
    post(client, body, **sign(body))
    assert client.get("/errors/latest").status_code == 200


# --------------------------------------------------------------------------------------------------
# What the service is
# --------------------------------------------------------------------------------------------------


def test_the_overview_says_what_this_is_and_what_it_holds(client):
    empty = client.get("/").json
    assert (empty["counts"], empty["newest"], empty["oldest"]) == (
        {"errors": 0, "spooled": 0},
        None,
        None,
    )
    assert empty["connect"]["webhook_url"] == "http://localhost/sentry/webhook"
    for number in range(3):
        post(client, event_payload(str(number)))
    about = client.get("/").json
    errors = client.get("/errors").json
    assert about["counts"] == {"errors": 3, "spooled": 0}
    assert (about["newest"], about["oldest"]) == (errors[0], errors[2])
    assert about["database_bytes"] > 0
    assert about["free_bytes"] % (64 * 1024 * 1024) == 0
    paths = {path.split()[1] for path in about["endpoints"]}
    assert {"/sentry/webhook", "/errors/latest", "/errors/<id>", "/issues", "/metrics"} <= paths


def test_each_refusal_has_its_cure_beside_it(make_app):
    client = make_app(SENTRY_CLIENT_SECRET=SECRET, MAX_BODY_BYTES=5000).test_client()
    body = wire(event_payload())
    post(client, body)
    post(client, body, **sign(body, "another"))
    post(client, body, **sign(body, SECRET) | {"Sec-Fetch-Site": "cross-site"})
    post(client, b"x" * 6000)
    client.post("/")
    core(client.application).write_counts()
    state = client.get("/config").json
    cures = {row["reason"]: row["cure"] for row in state["deliveries"]}
    assert cures.keys() == {
        "signature missing", "signature wrong", "sent by a web page", "too large", "wrong address"
    }  # fmt: skip
    assert all(cures.values())
    assert state["last_refusal"] == state["deliveries"][0]
    assert "MAX_BODY_BYTES" in cures["too large"]
    page = client.get("/?format=html").text
    for cure in cures.values():
        assert page.count(cure.replace("'", "&#39;")) >= 1


def test_every_reason_that_is_counted_has_its_cure():
    source = (ROOT / "collector.py").read_text(encoding="utf-8")
    reasons = set(re.findall(r"""Refused\(\d+, "([^"]+)\"""", source))
    assert len(reasons) > 8
    cures = source.partition("CURES = {")[2].partition("\n}")[0]
    assert {reason for reason in reasons if f'"{reason}":' not in cures} == set()


def test_the_configuration_is_shown_without_secrets(make_app, tmp_path):
    secrets = {"SENTRY_CLIENT_SECRET": f"{SECRET},an0ther", "API_TOKEN": TOKEN}
    app = make_app(**secrets, SENTRY_ACTIONS="created,triggered", RETENTION_DAYS=30, PORT=8123)
    client = app.test_client()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    config = client.get("/config", headers=headers).json
    expected = {
        "sentry_dsn_set": False, "sentry_client_secret_set": True, "api_token_set": True,
        "sentry_actions": ["created", "triggered"], "retention_days": 30, "port": 8123,
        "database_path": f"{tmp_path}/data/errors.db", "spooled": 0, "problem": None,
        "deliveries": [], "last_delivery_at": None, "last_refusal": None, "oldest_error_at": None,
    }  # fmt: skip
    assert expected.items() <= config.items()
    for path in ("/", "/config", "/metrics", "/?format=html"):
        text = client.get(path, headers=headers).text
        assert not [secret for secret in (SECRET, "an0ther", TOKEN) if secret in text]


def metrics(client):
    """Return the samples of /metrics as a dict, their types checked."""
    reply = client.get("/metrics")
    assert reply.content_type == "text/plain; version=0.0.4; charset=utf-8"
    assert reply.text.endswith("\n")
    types = dict(re.findall(r"^# TYPE (\S+) (counter|gauge)$", reply.text, re.MULTILINE))
    samples = dict(re.findall(r"^([a-z][^ ]*(?:{.*})?) (\S+)$", reply.text, re.MULTILINE))
    assert {name.partition("{")[0] for name in samples} <= types.keys()
    lines = [line for line in reply.text.splitlines() if not line.startswith("#")]
    assert len(lines) == len(samples)
    return {name: float(value) for name, value in samples.items()}


def test_the_metrics_count_deliveries_and_errors(client):
    empty = metrics(client)
    assert empty["collector_errors"] == 0
    for number in (1, 2, 2):
        post(client, event_payload(str(number)))
    post(client, b"no JSON")
    core(client.application).write_counts()
    shown = metrics(client)
    assert abs(shown.pop("collector_last_delivery_timestamp_seconds") - time.time()) < 60
    assert shown.pop("collector_database_bytes") > 0
    assert shown == {
        'collector_deliveries_total{outcome="stored",reason=""}': 2,
        'collector_deliveries_total{outcome="duplicate",reason=""}': 1,
        'collector_deliveries_total{outcome="refused",reason="not JSON"}': 1,
        "collector_errors": 2,
        "collector_spooled": 0,
    }


def test_a_counter_never_falls(app, client):
    for day in (500, 400, 2):
        at = (datetime.now(UTC) - timedelta(days=day)).isoformat()
        sql = "INSERT INTO deliveries VALUES (?, 'stored', '', 10, ?)"
        execute(app, sql, at[:15] + "0", at[:19] + ".000000Z")
        for _ in range(2):
            maintain(app)
    assert counts(client) == {("stored", None): 30}
    (row,) = client.get("/config").json["deliveries"]
    assert (row["last_hour"], row["last_day"], row["last_at"][:4]) == (0, 0, at[:4])


# --------------------------------------------------------------------------------------------------
# Filters and search
# --------------------------------------------------------------------------------------------------


def fill(client):
    """Post seven errors that differ."""
    events = [
        ("shop", "error", "production", "python", "10", "KeyError: 'price'", "shop.views in checkout", "no price"),
        ("shop", "fatal", "production", "python", "10", "KeyError: 'price'", "shop.views in checkout", "no price"),
        ("shop", "error", "staging", "python", "11", "TimeoutError: supplier", "shop.tasks in restock", "too slow"),
        ("front", "error", "production", "javascript", "12", "TypeError: cup is null", "static/teas", ""),
        ("front", "warning", "prüf stand", "javascript", "13", "Kännchen übergelaufen 抹茶", None, "100% \"voll\""),
        (None, None, None, None, None, "level project error", "a OR b", "NEAR AND NOT"),
        ("shop-eu", "error", "production", "python", "14", "supplierless price_tag", None, "x"),
    ]  # fmt: skip
    keys = ("level", "environment", "platform", "issue_id", "title", "culprit", "message")
    for number, (slug, *values) in enumerate(events, 1):
        event = dict(zip(keys, values, strict=True)) | {"event_id": f"{number:032x}"}
        event["release"] = f"tea@{number % 2}"
        project = {"id": str(number % 3), "slug": slug}
        issue = {"project": project, "shortId": f"TEA-{values[3]}", "issueCategory": "error"}
        if number == 4:
            issue["issueCategory"] = "performance"
            event["web_url"] = "https://sentry.example.org/issues/12/"
        payload = {"action": "created", "data": {"error": event, "issue": issue if slug else {}}}
        assert post(client, payload).status_code == 201


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Return a client that many tests read from, so it must stay as it is."""
    app = create_app({"DATABASE_URL": f"sqlite:///{tmp_path_factory.mktemp('filled')}/errors.db"})
    core(app).start()
    fill(app.test_client())
    yield app.test_client()
    core(app).database.close()


FILTERED = [
    ("", [7, 6, 5, 4, 3, 2, 1]),
    ("project=shop", [3, 2, 1]),
    ("project=sho", []),
    ("project=Shop", []),
    ("project=1", [7, 4, 1]),
    ("project=", [7, 6, 5, 4, 3, 2, 1]),
    ("level=error", [7, 4, 3, 1]),
    ("level=fatal,warning", [5, 2]),
    ("environment=production", [7, 4, 2, 1]),
    ("environment=pr%C3%BCf+stand", [5]),
    ("platform=javascript", [5, 4]),
    ("release=tea@1", [7, 5, 3, 1]),
    ("category=performance", [4]),
    ("server=sentry.example.org", [4]),
    ("event=" + f"{3:032x}", [3]),
    ("q=" + f"{3:032x}", [3]),
    ("q=00000000-0000-0000-0000-000000000003", [3]),
    ("event=3", []),
    ("issue=10", [2, 1]),
    ("issue=TEA-10", [2, 1]),
    ("issue=1", []),
    ("project=shop&level=error&environment=production&platform=python&issue=10", [1]),
    ("project=shop&platform=javascript", []),
    ("q=pric", [7, 2, 1]),
    ("q=rice", []),
    ("q=PRICE+keyerror", [2, 1]),
    ("q=checkout", [2, 1]),
    ("q=supplierless+x", [7]),
    ("q=supp+slow", []),
    ("q=slow+supp", [3]),
    ("q=ubergelaufen", [5]),
    ("q=%E8%8C%B6", [5]),
    ("q=production", []),
    ("q=OR", [6]),
    ("q=facets%3Aerror", []),
    ("q=%22voll%22", [5]),
    ("q=price&level=fatal", [2]),
    ("q=price&project=shop&limit=1", [2]),
    ("limit=2", [7, 6]),
    ("before=3", [2, 1]),
    ("after=5", [6, 7]),
    ("after=0&limit=3", [1, 2, 3]),
    ("after=7", []),
    ("after=2&before=5", [3, 4]),
    ("before=4&level=error", [3, 1]),
    ("after=1&q=price", [2, 7]),
]


@pytest.mark.parametrize(("query", "expected"), FILTERED)
def test_filters_narrow_the_list_and_the_latest(filled, query, expected):
    assert ids(filled.get(f"/errors?{query}")) == expected
    lines = filled.get(f"/errors?{query}&format=ndjson").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == expected
    text = filled.get(f"/errors?{query}&format=text").text
    assert re.findall(r"^#(\d+) ", text, re.MULTILINE) == [*map(str, expected)]
    feed = ET.fromstring(filled.get(f"/errors?{query}&format=atom").data)
    assert len(feed.findall(f"{ATOM}entry")) == len(expected)
    if not re.search("before|after|limit", query):
        latest = filled.get(f"/errors/latest?{query}")
        assert latest.json["id"] == expected[0] if expected else latest.status_code == 404


@pytest.mark.parametrize(
    "text",
    [
        '"', '""', "*", "a*", "^a", "a AND", "(", "{a b}: c", "NEAR(", "-", "- facets : x", "\0", "\\",
        "%", ":", "+", "a" * 5000, "\ue000project", "\u0301", "\ue000level6572726f72",
        "price'; DROP TABLE errors; --", "\U0001f375", "\ud7ff\uffff", "&within=<b>",
    ],
)  # fmt: skip
def test_any_text_is_a_safe_query(filled, text):
    for name in ("q", "project", "environment", "release", "server", "category", "event", "issue"):
        for form in ("json", "text", "html", "atom") if name == "q" else ("json", "html"):
            query = {name: text, "format": form}
            assert filled.get("/errors", query_string=query).status_code == 200
        query = {name: text}
        assert filled.get("/errors/latest", query_string=query).status_code in (200, 404)
        if name not in ("environment", "release", "event"):
            assert filled.get("/issues", query_string=query).status_code == 200
    query = {"q": "\ue000level6572726f72"}
    assert filled.get("/errors", query_string=query).json == []


def times_ago(*hours):
    """Return the times so many hours ago, as they are stored."""
    return [f"{(datetime.now(UTC) - timedelta(hours=hour)).isoformat()[:23]}000Z" for hour in hours]


def test_a_period_is_given_in_iso_8601_or_as_long_ago(app, client):
    fill(client)
    for number, at in enumerate(times_ago(24 * 30, 24 * 6, 30, 5, 3, 0.5, 0.1), 1):
        execute(app, "UPDATE errors SET received_at = ? WHERE id = ?", at, number)
    for query, expected in [
        ("since=15m", [7]),
        ("since=24h", [7, 6, 5, 4]),
        ("since=7d", [7, 6, 5, 4, 3, 2]),
        ("since=1w", [7, 6, 5, 4, 3, 2]),
        ("since=999999d", [7, 6, 5, 4, 3, 2, 1]),
        (f"since={time.time() - 3600:.0f}", [7, 6]),
        ("until=4h", [4, 3, 2, 1]),
        ("since=7d&until=1d", [3, 2]),
        ("since=1h&until=2h", []),
        ("since=6h&project=front", [5, 4]),
        ("until=1h&q=price", [2, 1]),
        ("since=2999-01-01", []),
        ("since=1999-01-01&until=2999-01-01T00:00:00%2B02:00", [7, 6, 5, 4, 3, 2, 1]),
        ("since=1999-01-01T00:00:00+02:00", [7, 6, 5, 4, 3, 2, 1]),
        ("since=1999-01-01 00:00:00+02:00", [7, 6, 5, 4, 3, 2, 1]),
        ("since=1999-01-01T00:00:00z", [7, 6, 5, 4, 3, 2, 1]),
        ("since=1999-01-01 00:00", [7, 6, 5, 4, 3, 2, 1]),
        ("since=24h&after=4", [5, 6, 7]),
    ]:
        assert ids(client.get(f"/errors?{query}")) == expected, query
    exact = client.get("/errors/4").json["received_at"]
    assert ids(client.get("/errors", query_string={"since": exact, "until": exact})) == [4]


def test_a_period_holds_what_was_received_in_it_also_if_it_came_in_late(app, client):
    fill(client)
    hours = times_ago(9, 8, 7, 6, 5, 4, 8.5)
    for number, at in enumerate(hours, 1):
        execute(app, "UPDATE errors SET received_at = ? WHERE id = ?", at, number)
    assert ids(client.get("/errors", query_string={"until": hours[1]})) == [7, 2, 1]
    assert ids(client.get("/errors", query_string={"since": hours[6], "until": hours[1]})) == [7, 2]
    assert ids(client.get("/errors", query_string={"since": hours[5]})) == [6]


# --------------------------------------------------------------------------------------------------
# Issues
# --------------------------------------------------------------------------------------------------


def seen(client, query=""):
    """Return (issue id, count, newest) of the issues that match."""
    reply = client.get(f"/issues?{query}")
    assert reply.status_code == 200, reply.data
    return [(row["issue_id"], row["count"], row["newest"]) for row in reply.json]


def test_an_issue_has_every_key_and_its_address(client):
    payload = load("error.created.python")
    post(client, payload)
    payload["data"]["error"]["event_id"] = "2"
    post(client, payload)
    first, second = (client.get(f"/errors/{id_}").json for id_ in (1, 2))
    (row,) = client.get("/issues").json
    assert list(row) == ISSUE_KEYS
    same = "issue_id short_id server project_id project_slug title culprit level category".split()
    assert row == {key: second[key] for key in same} | {
        "count": 2,
        "first_seen": first["received_at"],
        "last_seen": second["received_at"],
        "newest": 2,
        "url": "/errors?issue=5900000011&server=sentry.io",
    }
    assert ids(client.get(row["url"])) == [2, 1]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", ["14", "13", "12", "11", "10"]),
        ("limit=2", ["14", "13"]),
        ("before=5", ["12", "11", "10"]),
        ("project=shop", ["11", "10"]),
        ("project=1", ["14", "12"]),
        ("level=fatal,warning", ["13", "10"]),
        ("category=performance", ["12"]),
        ("server=sentry.example.org", ["12"]),
        ("issue=TEA-10", ["10"]),
        ("issue=11", ["11"]),
        ("q=pric", ["14", "10"]),
        ("q=restock&project=shop", ["11"]),
        ("since=1h", ["14", "13", "12", "11", "10"]),
        ("until=1h", []),
        ("q=nothing", []),
    ],
)
def test_issues_are_filtered(filled, query, expected):
    assert [issue_id for issue_id, _, _ in seen(filled, query)] == expected
    text = filled.get(f"/issues?{query}&format=text").text
    assert len(re.findall(r"^#\d+ ", text, re.MULTILINE)) == len(expected)


def test_an_issue_is_found_by_the_id_of_its_newest_event(client):
    for number in (1, 2):
        post(client, event_payload(f"{number:032x}", issue_id="7"))
    assert seen(client, f"q={2:032x}") == [("7", 2, 2)]
    assert seen(client, f"q={1:032x}") == []


def test_issues_are_paged_the_most_recently_seen_first(client):
    for number in range(20):
        post(client, issue_event(number, number % 7))
    pages = []
    path = "/issues?limit=3"
    while path:
        reply = client.get(path)
        pages.append([row["issue_id"] for row in reply.json])
        found = re.fullmatch(r'<(/issues\?[^>]*)>; rel="next"', reply.headers.get("Link", ""))
        path = found and found[1]
    assert pages == [["5", "4", "3"], ["2", "1", "0"], ["6"]]
    assert seen(client)[0] == ("5", 3, 20)


def test_a_page_of_issues_with_long_texts_is_bounded(client):
    for number in range(120):
        post(client, issue_event(number, number, title="字" * 8000, culprit="字" * 8000))
    reply = client.get("/issues?limit=1000")
    assert len(reply.data) < 8 * 1024 * 1024
    assert "Link" in reply.headers and len(reply.json) < 120


# --------------------------------------------------------------------------------------------------
# Pages and pollers
# --------------------------------------------------------------------------------------------------


def follow(client, path):
    """Return the ids on each page from a path on, as the Link header leads."""
    pages = []
    while path:
        reply = client.get(path)
        pages.append(ids(reply))
        link = reply.headers.get("Link", "")
        found = re.fullmatch(r'<(/errors\?[^>]*)>; rel="next"', link)
        assert bool(found) == bool(link)
        path = found and found[1]
    return pages


def test_the_link_leads_through_all_pages_once(client):
    for number in range(25):
        level = "error" if number % 2 else "info"
        post(client, event_payload(str(number), level=level, title=f"Tüte {number} & co"))
    everything = list(range(25, 0, -1))
    assert follow(client, "/errors") == [everything]
    assert follow(client, "/errors?limit=25") == [everything]
    by_tens = [everything[:10], everything[10:20], everything[20:]]
    assert follow(client, "/errors?limit=10") == by_tens
    from_the_oldest = [everything[:14:-1], everything[14:4:-1], everything[4::-1]]
    assert follow(client, "/errors?limit=10&after=0") == from_the_oldest
    for query in ("level=error", "level=error&q=t%C3%BCte+%26+co", "level=error&since=1h"):
        pages = follow(client, f"/errors?{query}&limit=5")
        assert [len(page) for page in pages] == [5, 5, 2]
        assert [*chain(*pages)] == [id_ for id_ in everything if id_ % 2 == 0]


def test_a_page_has_a_hundred_errors_unless_told_otherwise(client):
    for number in range(120):
        post(client, event_payload(str(number)))
    assert [len(page) for page in follow(client, "/errors")] == [100, 20]
    assert [len(page) for page in follow(client, "/errors?limit=1000")] == [120]


def test_a_page_stays_what_it_is_while_errors_come_in(client):
    for number in range(5):
        post(client, event_payload(str(number)))
    before = client.get("/errors?before=4&limit=2").json
    post(client, event_payload("late"))
    assert client.get("/errors?before=4&limit=2").json == before


def test_a_poller_that_remembers_the_last_id_misses_nothing_and_sees_nothing_twice(app, client):
    last, seen = 0, []
    for number in range(40):
        post(client, event_payload(str(number)))
        if number % 7 == 0:
            execute(app, "DELETE FROM errors WHERE id = ?", last)
            new = ids(client.get(f"/errors?after={last}&limit=3"))
            seen += new
            last = new[-1] if new else last
    while new := ids(client.get(f"/errors?after={last}&limit=3")):
        seen, last = seen + new, new[-1]
    assert seen == list(range(1, 41))


# --------------------------------------------------------------------------------------------------
# Tags
# --------------------------------------------------------------------------------------------------

OF_AN_ERROR = "/errors/1 /errors/1?format=text /errors/1/payload".split()
CHANGING = (
    "/errors/1?format=html /errors/latest /errors /errors?level=error /errors?format=text "
    "/errors?format=html /errors?format=ndjson /errors?format=atom /issues /issues?format=text "
    "/issues?format=html / /?format=html /config"
).split()


@pytest.fixture
def still(monkeypatch):
    """Stop the minute, because pages say how many minutes ago things were."""
    monkeypatch.setattr("collector.minute", lambda: 0)


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("path", OF_AN_ERROR + CHANGING)
def test_who_has_a_reply_already_is_told_so(client, path):
    post(client, event_payload())
    first = client.get(path)
    tag = first.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.data) == (304, b"")
        assert again.headers["ETag"] == tag
    assert client.get(path, headers={"If-None-Match": '"other"'}).data == first.data


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("path", CHANGING)
def test_another_error_changes_the_tag_of_what_shows_it(client, path):
    post(client, issue_event(1, 9))
    before = client.get(path)
    post(client, issue_event(2, 9))
    after = client.get(path, headers={"If-None-Match": before.headers["ETag"]})
    assert after.status_code == 200
    assert after.data != before.data


@pytest.mark.usefixtures("still")
def test_a_deletion_in_the_middle_changes_the_tag_of_what_showed_it(app, client):
    for number in range(1, 6):
        post(client, issue_event(number, 9))
    paths = ["/errors/1", "/errors/1?format=html", "/errors/3?format=html", "/errors", "/issues"]
    paths += ["/errors?format=html", "/errors?format=atom", "/issues?format=html", "/"]
    before = {path: client.get(path).headers["ETag"] for path in paths}
    execute(app, "DELETE FROM errors WHERE id = 2")
    assert [path for path in paths if client.get(path).headers["ETag"] == before[path]] == []


@pytest.mark.usefixtures("still")
def test_the_tag_differs_wherever_the_reply_does(make_app):
    plain = make_app().test_client()
    public = make_app(PUBLIC_URL="https://errors.example.com/tea").test_client()
    post(plain, issue_event(1, 9))
    requests = [
        (plain, {}),
        (public, {}),
        (plain, {"base_url": "http://other.example"}),
        (plain, {"base_url": "https://localhost"}),
        (plain, {"base_url": "http://localhost/prefix"}),
    ]
    for path in (*CHANGING, *OF_AN_ERROR):
        contents, tags = {}, set()
        for client, form in requests:
            reply = client.get(path, **form)
            contents.setdefault(reply.data, set()).add(reply.headers["ETag"])
            tags.add(reply.headers["ETag"])
        assert len(tags) >= len(contents), path
        for data, of_data in contents.items():
            others = set().union(*(tags for other, tags in contents.items() if other != data))
            assert not of_data & others


@pytest.mark.usefixtures("still")
def test_the_tag_of_an_error_stays_and_differs_between_forms(client):
    post(client, event_payload())
    before = [client.get(path).headers["ETag"] for path in OF_AN_ERROR]
    assert len(set(before)) == len(before)
    post(client, event_payload("another"))
    assert [client.get(path).headers["ETag"] for path in OF_AN_ERROR] == before


@pytest.mark.usefixtures("still")
def test_who_has_a_reply_costs_no_reading_of_payloads(app, client):
    post(client, event_payload())
    paths = [*OF_AN_ERROR, "/errors/1?format=html", "/errors/latest", "/errors?format=ndjson"]
    tags = [client.get(path).headers["ETag"] for path in paths]
    execute(app, "UPDATE bodies SET payload = x'00'")
    for path, tag in zip(paths, tags, strict=True):
        assert client.get(path, headers={"If-None-Match": tag}).status_code == 304
    assert client.get("/errors/1").status_code == 500


# --------------------------------------------------------------------------------------------------
# Addresses
# --------------------------------------------------------------------------------------------------


def addresses(client, **form):
    """Return every address that replies hold, but for those of Sentry."""
    found = set()
    for path in ("/errors?limit=1", "/issues?limit=1", "/errors/2", "/"):
        reply = client.get(path, **form)
        found |= {*re.findall(r"<(.*?)>", reply.headers.get("Link", ""))}
        found |= {*re.findall(r'"url": "([^"]*)"', reply.text)}
    for path in ("/errors", "/issues", "/errors/2", "/errors/latest", "/", "/nowhere"):
        page = client.get(path, headers={"Accept": "text/html"}, **form).text
        found |= {*re.findall(r'(?:href|action)="([^"]*)"', page)}
    return {url for url in found if not url.startswith(("#", "data:")) and "sentry.io" not in url}


@pytest.mark.parametrize(
    ("settings", "form", "base"),
    [
        ({}, {}, "/"),
        ({}, {"base_url": "http://localhost/tea"}, "/tea/"),
        ({"PUBLIC_URL": "https://e.example/tea/"}, {}, "https://e.example/tea/"),
    ],
)
def test_every_link_can_be_followed_under_any_address(make_app, settings, form, base):
    client = make_app(**settings).test_client()
    for number in (1, 2, 3):
        post(client, issue_event(number, 9, environment="a", release="b", level="error"))
    found = addresses(client, **form)
    assert len(found) > 20
    assert {url for url in found if not url.startswith(base)} == set()
    for url in found:
        path = "/" + url.removeprefix(base).replace("&amp;", "&")
        assert client.get(path, **form).status_code == 200, url
    place = base if base.startswith("http") else f"http://localhost{base}"
    assert f"url: {place}errors/2\n" in client.get("/errors/2?format=text", **form).text
    more = client.get("/errors?limit=1&format=text", **form).text.splitlines()[-1]
    assert more.startswith(f"next: {place}errors?")
    feed = ET.fromstring(client.get("/errors?format=atom", **form).data)
    links = {link.get("href") for link in feed.iter(f"{ATOM}link")}
    assert {url for url in links if not url.startswith(place)} == set()


# --------------------------------------------------------------------------------------------------
# The feed
# --------------------------------------------------------------------------------------------------


def test_the_feed_holds_the_newest_fifty(client):
    for number in range(60):
        post(client, issue_event(number, 9, title=f"no. {number} <b> & 抹茶", level="info"))
    reply = client.get("/errors", headers={"Accept": "application/atom+xml"})
    assert reply.mimetype == "application/atom+xml"
    feed = ET.fromstring(reply.data)
    entries = feed.findall(f"{ATOM}entry")
    titles = [entry.findtext(f"{ATOM}title") for entry in entries]
    assert titles == [f"no. {number} <b> & 抹茶" for number in range(59, 9, -1)]
    newest = client.get("/errors/60").json
    assert feed.findtext(f"{ATOM}updated") == newest["received_at"]
    assert entries[0].findtext(f"{ATOM}updated") == newest["received_at"]
    assert entries[0].find(f"{ATOM}link").get("href") == "http://localhost/errors/60"
    names = [entry.findtext(f"{ATOM}id") for entry in entries]
    assert len(set(names)) == 50
    again = ET.fromstring(client.get("/errors?format=atom", base_url="https://b.example").data)
    assert [entry.findtext(f"{ATOM}id") for entry in again.findall(f"{ATOM}entry")] == names


def test_the_feed_of_nothing_is_one(client):
    feed = ET.fromstring(client.get("/errors?format=atom&q=nothing").data)
    children = ["id", "title", "updated", "author", "link", "link"]
    assert [child.tag for child in feed] == [f"{ATOM}{name}" for name in children]


HOSTILE = "]]><script>\0\x01\x0b\x1b[31m\x7f\x85\ud800\ufffe\uffff\u2028\u202e\U000e0041&#0;\ue000"


def test_hostile_text_in_a_feed_stays_text(client):
    names = "title message culprit level environment release".split()
    post(client, event_payload("1", **dict.fromkeys(names, HOSTILE), web_url="javascript:x"))
    query = {"format": "atom", "q": 'a"<&'}
    assert ET.fromstring(client.get("/errors", query_string=query).data) is not None
    reply = client.get("/errors?format=atom")
    (entry,) = ET.fromstring(reply.data).findall(f"{ATOM}entry")
    assert entry.findtext(f"{ATOM}title") == "]]><script>\ufffd ? &#0;"
    assert list(entry.find(f"{ATOM}summary")) == []


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def test_an_export_has_every_error_in_full_a_line_each(client):
    for number in range(230):
        level = "info" if number % 10 else "error"
        post(client, issue_event(number, number % 3, level=level))
    reply = client.get("/errors?format=ndjson")
    assert reply.mimetype == "application/x-ndjson"
    lines = reply.text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(230, 0, -1))
    for id_ in (230, 77, 1):
        assert json.loads(lines[230 - id_]) == client.get(f"/errors/{id_}").json
    for query, count in (("limit=150", 150), ("limit=7", 7), ("level=error", 23), ("q=no+x", 0)):
        assert len(client.get(f"/errors?format=ndjson&{query}").text.splitlines()) == count
    headers = {"Accept": "application/x-ndjson"}
    oldest_first = client.get("/errors?after=3", headers=headers).text.splitlines()
    assert [json.loads(line)["id"] for line in oldest_first] == list(range(4, 231))


def test_an_export_is_streamed(client):
    for number in range(150):
        post(client, event_payload(str(number), tags=[["a", "x" * 2000]]))
    reply = client.get("/errors?format=ndjson")
    assert reply.is_streamed
    parts = list(reply.iter_encoded())
    assert len(parts) > 2
    assert max(map(len, parts)) < 200_000


def test_an_export_goes_on_while_errors_come_and_go(app, client):
    for number in range(250):
        post(client, event_payload(str(number), tags=[["a", "x" * 2000]]))
    parts = client.get("/errors?format=ndjson").iter_encoded()
    text = next(parts)
    execute(app, "DELETE FROM errors WHERE id <= 20")
    post(client, event_payload("late"))
    text += b"".join(parts)
    assert [json.loads(line)["id"] for line in text.splitlines()] == list(range(250, 20, -1))


def test_a_client_that_leaves_half_way_harms_nobody(client):
    for number in range(150):
        post(client, event_payload(str(number), tags=[["a", "x" * 2000]]))
    reply = client.get("/errors?format=ndjson")
    next(reply.iter_encoded())
    reply.close()
    assert post(client, event_payload("after")).status_code == 201


# --------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------

HEAD_KEYS = [
    *"error title level category culprit environment release project issue seen".split(),
    "in Sentry",
    *"event happened received message platform logger status rule permalink url".split(),
]
SECTIONS = {
    "exception", "caused by", "wrapped in", "stack trace", "CSP report", "request", "extra", "user",
    "tags", "contexts", "breadcrumbs",
}  # fmt: skip


def read_text(text):
    """Return the head of a text form as a dict, its sections as pairs of a name and lines, and its end.

    Fails on any line at the margin that an error's own words could have made.
    """
    head, *parts = text.removesuffix("\n").split("\n\n")
    pairs = [tuple(line.split(": ", 1)) for line in head.splitlines()]
    assert all(len(pair) == 2 for pair in pairs), head
    keys = [key for key, _ in pairs]
    assert keys == [key for key in HEAD_KEYS if key in keys]
    end = parts.pop() if parts and parts[-1].startswith("left out: ") else None
    assert end is None or ("\n" not in end and "; whole: " in end)
    sections = []
    for part in parts:
        name, *lines = part.split("\n")
        assert re.sub(r"( \([a-z ]+\))*:$", "", name) in SECTIONS, name
        assert lines and all(line.startswith("  ") for line in lines), part
        sections.append((name.removesuffix(":"), [line[2:] for line in lines]))
    return dict(pairs), sections, end


def text_of(client, payload, **headers):
    """Post a payload and return its text form."""
    id_ = post(client, payload, **headers).json["id"]
    reply = client.get(f"/errors/{id_}", headers={"Accept": "text/plain"})
    assert (reply.status_code, reply.content_type) == (200, "text/plain; charset=utf-8")
    assert len(reply.text) <= 8000
    return reply.text


def frame(file, function, line, in_app=True, source=None, **more):
    """Return a frame."""
    more |= {"filename": file, "function": function, "lineno": line, "in_app": in_app}
    return more | {"context_line": source}


def raised(type_, value, *frames, **more):
    """Return an exception."""
    return {"type": type_, "value": value, "stacktrace": {"frames": list(frames)}} | more


PRICING = frame(
    "shop/pricing.py", "apply", 41, source="    rate = RATES[coupon]",
    pre_context=["", "", "def apply(total, coupon):", "    # no dash in these", ""],
    post_context=["    return total * (1 - rate)", "", "", ""],
    vars={"total": "129.9", "coupon": "'TEA-50'", "RATES": {"TEA50": 0.5}},
)  # fmt: skip
MADE = {
    "title": "CheckoutError: order 88 failed",
    "culprit": "shop.checkout in place",
    "release": "shop@3",
    "exception": {
        "values": [
            raised("KeyError", "'TEA-50'", frame("lib/a.py", "a", 1, False), PRICING),
            raised("PricingError", "no price", frame("shop/cart.py", "price", 12, source="  x()")),
            raised(
                "CheckoutError",
                "order 88 failed",
                frame("lib/web.py", "serve", 7, False),
                frame("lib/web.py", "call", 8, False),
                frame("shop/views.py", "order", 18, source="    return place(cart)"),
                frame("shop/checkout.py", "place", 64, source="    raise x", vars={"cart": "<88>"}),
                frame("lib/db.py", "commit", 5, False, "    self.flush()"),
                frame("lib/db.py", "flush", 6, False, "    fail()"),
                mechanism={"type": "web", "handled": False},
            ),
        ]
    },
    "request": {
        "method": "POST",
        "url": "https://shop.example/order",
        "query_string": "cart=88&token=secret",
        "headers": {"Content-Type": "application/json", "Cookie": "secret"},
        "data": {"coupon": "TEA-50", "password": "secret"},
    },
    "user": {"id": "12", "email": "a@example.com"},
    "contexts": {"runtime": {"type": "runtime", "name": "CPython", "version": "3.12"}},
    "extra": {"cart": {"id": 88}, "secret": "secret"},
    "tags": [["transaction", "/order"]],
    "breadcrumbs": [{"timestamp": 1790000000, "category": "query", "message": "SELECT 1"}],
}


def test_the_text_names_the_line_to_change_and_the_value_that_explains_it(client):
    text = text_of(client, issue_event(1, 501, **MADE))
    assert "secret" not in text.replace("secret = [masked]", "")
    head, sections, end = read_text(text)
    at = head["received"]
    assert head == {
        "error": "1", "title": "CheckoutError: order 88 failed", "level": "error",
        "culprit": "shop.checkout in place", "release": "shop@3", "issue": "501", "event": "1",
        "seen": f"1 time here, first {at}, last {at}, release shop@3",
        "happened": at, "received": at, "permalink": "https://tea.sentry.io/issues/501/events/1/",
        "url": "http://localhost/errors/1",
    }  # fmt: skip
    assert sections == [
        ("exception (unhandled)", [
            "CheckoutError: order 88 failed",
            "[2 library frames]",
            'File "shop/views.py", line 18, in order',
            "    return place(cart)",
            'File "shop/checkout.py", line 64, in place',
            ">    64 |     raise x",
            "  cart = <88>",
            "[1 library frame]",
            'File "lib/db.py", line 6, in flush',
            "    fail()",
        ]),
        ("caused by", [
            "PricingError: no price",
            'File "shop/cart.py", line 12, in price',
            "    x()",
        ]),
        ("caused by (innermost)", [
            "KeyError: 'TEA-50'",
            "[1 library frame]",
            'File "shop/pricing.py", line 41, in apply',
            "     38 | def apply(total, coupon):",
            "     39 |     # no dash in these",
            "     40 |",
            ">    41 |     rate = RATES[coupon]",
            "     42 |     return total * (1 - rate)",
            "     43 |",
            "     44 |",
            "  coupon = 'TEA-50'",
            '  RATES = {"TEA50": 0.5}',
            "  total = 129.9",
        ]),
        ("request", [
            "POST https://shop.example/order",
            "query: cart=88&token=[masked]",
            'body: {"coupon": "TEA-50", "password": "[masked]"}',
            "headers: Content-Type = application/json; Cookie = [masked]",
        ]),
        ("extra", ['cart = {"id": 88}', "secret = [masked]"]),
        ("user", ["id = 12; email = a@example.com"]),
        ("tags", ["transaction = /order"]),
        ("contexts", ["runtime: name = CPython; version = 3.12"]),
        ("breadcrumbs (newest last)", ["2026-09-21T14:13:20Z query SELECT 1"]),
    ]  # fmt: skip
    assert end is None


def test_page_json_and_text_agree_on_the_main_exception(make_app):
    client = make_app(SENTRY_ACTIONS="created,triggered").test_client()
    text = text_of(client, load("faults/event_alert.triggered.main-exception-react19"))
    _, sections, _ = read_text(text)
    assert [(name, lines[0].split(":")[0]) for name, lines in sections[:2]] == [
        ("exception (unhandled)", "TypeError"), ("wrapped in", "Error")
    ]  # fmt: skip
    error = client.get("/errors/1").json
    assert [exception["type"] for exception in error["exceptions"] if exception["main"]] == [
        error["exception_type"]
    ]
    page = client.get("/errors/1?format=html").text
    assert re.findall(r"<h3>.*?<code>(\w+)</code>", page) == ["TypeError", "Error"]
    assert 'id="crash"' in page.partition("wrapped in")[0]


@pytest.mark.parametrize(
    ("name", "crash"),
    [
        ("error.created.java", 'File "com.example.brew.Kettle", in boil'),
        ("error.created.native", 'File "pour.c", in pour, package cup, address 0x401a2c'),
        ("documented.created", '>    21 |         raise ValueError("too hot")'),
        ("legacy_plugin", ">    30 |     reply = supplier.ask(tea)"),
        ("service_hook", '>     9 |     raise LookupError("no such tea")'),
        ("sentry8_legacy", '>     3 | raise DryError("boiled dry")'),
        ("error.created.python", "shop/basket.py"),
    ],
)
def test_the_text_of_a_sample_shows_the_crash_in_its_first_trace(client, name, crash):
    _, sections, _ = read_text(text_of(client, load(name)))
    assert sections[0][0].startswith("exception")
    assert any(crash in line for line in sections[0][1])


@pytest.mark.parametrize(
    ("frame", "shown"),
    [
        ({}, 'File "?", in ?'),
        ({"filename": "a.py", "lineno": 3, "function": "f", "module": "a"}, 'File "a.py", line 3, in f'),
        ({"filename": "Tea.java", "lineno": 3, "function": "f", "module": "org.Tea"}, 'File "Tea.java", line 3, in org.Tea.f'),
        (
            {"module": "Tea", "function": "Void F(Cup c)", "filename": "T.cs", "package": "T, Version=1"},
            'File "T.cs", in Void F(Cup c) of Tea, package T',
        ),
        ({"module": "org.Tea", "function": "f"}, 'File "org.Tea", in f'),
        ({"filename": "a.js", "lineno": 1, "colno": 9, "function": "f"}, 'File "a.js", line 1, column 9, in f'),
        (
            {"package": "C:\\tea\\Tea.exe", "instruction_addr": "0x10"},
            'File "Tea.exe", in ?, address 0x10',
        ),
        (
            {"filename": "a.c", "lineno": 4, "function": "f", "package": "/lib/tea.so", "instruction_addr": "0x1"},
            'File "a.c", line 4, in f, package tea.so, address 0x1',
        ),
    ],
)  # fmt: skip
def test_a_frame_says_what_its_language_has(client, frame, shown):
    _, sections, _ = read_text(text_of(client, event_payload(stacktrace={"frames": [frame]})))
    assert sections[0][1][1] == shown


def test_of_a_long_line_the_part_at_the_column_is_shown(client):
    line = "a" * 500 + "BUG" + "b" * 500
    minified = frame("a.js", "f", 1, source=line, colno=500)
    text = text_of(client, event_payload(stacktrace={"frames": [minified]}))
    assert "line 1, column 500, in f\n" in text
    assert re.search(r">     1 \| …a+BUGb+…\n", text)
    assert "left out: ends of long values (…);" in text


def test_a_line_too_long_to_be_read_whole_is_read_around_the_column(client):
    line = "a" * 30_000 + "BUG" + "b" * 30_000
    minified = frame("a.js", "f", 1, source=line, colno=30_000)
    text = text_of(client, event_payload(stacktrace={"frames": [minified]}))
    assert re.search(r">     1 \| …a+BUGb+…\n", text)
    (read,) = client.get("/errors/1").json["stacktrace"]
    assert re.fullmatch("…a{500,}BUGb{500,}…", read["context_line"]) and read["colno"] == 30_000


def test_the_innermost_of_a_group_is_the_one_with_most_parents(client):
    def member(name, id_, parent):
        mechanism = {"type": "chained", "exception_id": id_, "parent_id": parent}
        return raised(name, "x", frame(f"{name}.py", "f", 1, vars={"n": name}), mechanism=mechanism)

    group = [member("Third", 3, 0), member("Cause", 2, 1), member("First", 1, 0)]
    group.append(member("Group", 0, None))
    text = text_of(client, event_payload(exception={"values": group}))
    assert re.findall(r"^(\w.*):\n  (\w+): x", text, re.MULTILINE) == [
        ("exception", "Group"), ("caused by", "First"), ("caused by (innermost)", "Cause"),
        ("caused by", "Third"),
    ]  # fmt: skip
    assert "\n    n = Cause\n" in text


def test_an_issue_that_is_no_error_has_a_message_and_no_exception(client):
    issue = {"id": "7", "issueCategory": "uptime", "title": "Down"}
    issue["metadata"] = {"type": "x", "value": "The domain is down"}
    text = text_of(client, {"action": "created", "data": {"issue": issue}})
    assert "\nmessage: The domain is down\n" in text
    assert "\n\nstack trace:\n  There is no stack trace: this is an issue of" in text
    assert "\nexception" not in text


def test_a_member_called_type_is_shown(client):
    parts = {
        "user": {"id": 1, "type": "trial"},
        "contexts": {"os": {"type": "os", "name": "Linux"}},
    }
    text = text_of(client, event_payload(**parts))
    assert "user:\n  id = 1; type = trial\n" in text
    assert "contexts:\n  os: name = Linux\n" in text


def test_a_column_beyond_the_line_does_not_hide_it(client):
    line = "a" * 1500
    minified = frame("a.js", "f", 1, source=line, colno=90_000)
    text = text_of(client, event_payload(stacktrace={"frames": [minified]}))
    assert re.search(r"column 90000, in f\n.*> +1 \| a{100,}…\n", text, re.DOTALL)


def test_the_variables_of_the_line_are_the_last_to_be_cut(client):
    variables = {f"v{number}": number for number in range(70)} | {"total": -5}
    crash = frame("a.py", "f", 1, source="check(total)", vars=variables)
    text = text_of(client, event_payload(stacktrace={"frames": [crash]}))
    assert "\n    total = -5\n" in text
    assert "… 21 more cut…" in text


def test_a_line_has_no_number_below_one(client):
    crash = frame("a.py", "f", 2, source="x", pre_context=["p", "q"])
    text = text_of(client, event_payload(stacktrace={"frames": [crash]}))
    assert "        | p\n      1 | q\n>     2 | x\n" in text.replace("\n  ", "\n")


def test_a_line_below_one_is_no_line(client):
    native = frame("a.java", "f", -1)
    text = text_of(client, event_payload(stacktrace={"frames": [native]}))
    assert 'File "a.java", in f\n' in text
    assert ", line" not in client.get("/errors/1?format=html").text
    assert client.get("/errors/1").json["stacktrace"][0]["lineno"] == -1


def test_a_request_without_a_method_has_none(client):
    text = text_of(client, event_payload(request={"url": "https://shop.example/"}))
    assert "request:\n  https://shop.example/\n" in text


def test_the_evidence_of_an_occurrence_is_shown(client):
    shown = [{"name": "Offending Spans", "value": "40 times: SELECT price", "important": True}]
    shown.append({"name": "Offending Spans", "value": "2 times: DELETE"})
    shown.append({"name": "token", "value": "s3cret", "important": False})
    occurrence = {"issueTitle": "N+1 Query", "type": 1006, "evidenceDisplay": shown}
    text = text_of(client, event_payload(occurrence=occurrence))
    assert (
        "\n\nevidence:\n  Offending Spans = 40 times: SELECT price; 2 times: DELETE\n  token = [masked]\n"
        in text
    )
    page = client.get("/errors/1?format=html").text
    assert "<dt>Offending Spans</dt>" in page and "s3cret" not in page


def test_runs_of_library_frames_are_folded_and_the_crash_never_is(client):
    marks = [False, True, False, False, False, True, None, False]
    frames = [{"function": f"f{number}", "in_app": mark} for number, mark in enumerate(marks)]
    _, sections, _ = read_text(text_of(client, event_payload(stacktrace={"frames": frames})))
    assert sections[0][1][1:] == [
        "[1 library frame]", 'File "?", in f1', "[3 library frames]", 'File "?", in f5',
        "[1 library frame]", 'File "?", in f7',
    ]  # fmt: skip


def test_no_frame_is_folded_if_none_is_marked(client):
    frames = [{"function": f"f{number}"} for number in range(4)]
    _, sections, _ = read_text(text_of(client, event_payload(stacktrace={"frames": frames})))
    assert sections[0][1][1:] == [f'File "?", in f{number}' for number in range(4)]


def test_variables_of_the_failing_line_come_first(client):
    variables = {f"v{number:02}": "x" * 90 for number in range(40)} | {
        "wrong": "7",
        "__name__": "m",
    }
    crash = frame("a.py", "f", 1, source="    use(wrong)", vars=variables)
    text = text_of(client, event_payload(stacktrace={"frames": [crash]}))
    assert text.index("wrong = 7") < text.index("v00 = ")
    assert re.search(r"\n {4}\d+ more variables…\n", text)
    assert "left out: " in text


NO_TRACE = "There is no stack trace: "


@pytest.mark.parametrize(
    ("event", "lines"),
    [
        ({"message": "low on milk"}, "the SDK that reported this sent none."),
        ({"type": "csp", "csp": {"blocked_uri": "x"}}, "a report of a browser about a forbidden source."),
        ({"occurrence": {"type": 1006, "subtitle": "SELECT 1"}}, "this is an issue of the category performance."),
        ({"occurrence": {"type": 4001, "subtitle": "missed"}}, "this is an issue of the category cron."),
    ],
)  # fmt: skip
def test_where_there_is_no_trace_a_true_sentence_says_why(client, event, lines):
    text = text_of(client, event_payload(**event))
    _, sections, _ = read_text(text)
    assert sections[0][0] == "stack trace"
    assert sections[0][1][0].startswith(NO_TRACE) and sections[0][1][0].endswith(lines)
    assert sections[0][1][0] in client.get("/errors/1?format=html").text


def test_an_issue_webhook_says_that_it_never_has_a_trace(client):
    payload = load("issue.created")
    payload["data"]["issue"]["metadata"] = {"type": "KeyError", "value": "'x'"}
    text = text_of(client, payload, Sentry_Hook_Resource="issue")
    head, sections, _ = read_text(text)
    assert head["in Sentry"].startswith("1 time")
    assert sections[0][1][0] == "KeyError: 'x'"
    assert sections[0][1][1].startswith(f"{NO_TRACE}an issue webhook never has one")


def test_what_happened_without_an_exception_is_told(client):
    csp = {"blocked_uri": "https://evil.example/x.js", "effective_directive": "script-src"}
    text = text_of(client, event_payload("1", type="csp", csp=csp))
    assert "category: csp\n" in text
    assert "\nCSP report:\n  blocked_uri = https://evil.example/x.js\n" in text
    occurrence = {"type": 7001, "issueTitle": "Downtime", "subtitle": "https://x is down"}
    text = text_of(client, event_payload("2", occurrence=occurrence))
    assert "title: Downtime\n" in text and "category: uptime\n" in text
    assert "message: https://x is down\n" in text


TEXTS = "title message culprit level platform logger environment release web_url issue_id".split()
FORGERIES = [
    "x\nerror: 99\ntitle: forged", "x\r\nerror: 99", "x\x0berror: 99", "x\x0cerror: 99",
    "x\x1cerror: 99", "x\x1eerror: 99", "x\x85error: 99", "x\u2028error: 99", "x\u2029error: 99",
    "x\n\nexception (unhandled):\n  forged", "\n\n\nurl: http://evil.example.com",
    "x\n\nleft out: nothing; whole: http://evil.example.com",
    "\x1b[2J\x1b[1;1Herror: 99", "\x1b]0;title\x07error: 99",
    "\x1b]8;;http://evil.example.com\x1b\\link\x1b]8;;\x1b\\", "\x9b31mred\x9d0;x\x9c",
    "\x1bP1$r\x1b\\\x1b^x\x1b\\\x1b_x\x1b\\\x1bc\x1b", "a\bb\x7fc\0d",
    "\u202egnp.exe\u2066\u200b\ufeff\u200e", "\U000e0041\U000e0042\U000e007f", "\ud800\udfff",
    "a\ufe0fb\U000e0100c\u00add\u115fe\u3164f\u2800g\u200dh\u034fi\u180bj\uffa0k\u17b4l\ue000m\uffff",
]  # fmt: skip


def hostile_event(words):
    """Return a delivery with a text in every field that a text form shows."""
    lines = dict.fromkeys(("pre_context", "post_context"), [words] * 3)
    places = dict.fromkeys(
        "filename function module package instruction_addr context_line".split(), words
    )
    frame = {"in_app": True, "vars": {words: words}} | lines | places
    exceptions = [
        {"type": words, "value": words, "stacktrace": {"frames": [frame, {"function": words}]}}
        for _ in range(3)
    ]
    crumb = {"message": words, "category": words, "level": words, "data": {words: words}}
    event = {
        **dict.fromkeys(TEXTS, words),
        "tags": [[words, words]],
        "request": dict.fromkeys(("method", "url", "query_string", "data"), words)
        | {"headers": {words: words}},
        "breadcrumbs": {"values": [crumb]},
        "exception": {"values": exceptions},
        "event_id": words,
        "user": {words: words},
        "extra": {words: words},
        "contexts": {words: {words: words}},
        "csp": {words: words},
        "occurrence": {"type": 1001, "issueTitle": words, "subtitle": words},
    }  # fmt: skip
    issue = {"shortId": words, "project": {"slug": words}, "priority": words, "status": words}
    data = {"event": event, "issue": issue, "triggered_rule": words}
    return {"action": "created", "data": data}


def test_the_text_shows_a_request_that_has_only_a_body_of_nought(client):
    post(client, event_payload(request={"data": 0}))
    text = client.get("/errors/1?format=text").text
    assert text.endswith("\n\nrequest:\n  body: 0\n"), text


@pytest.mark.parametrize(
    "event",
    [
        {"user": {}},
        {"user": {"id": None}},
        {"breadcrumbs": [{}]},
        {"request": {"headers": []}},
        {"tags": [["browser", ""]]},
        {"extra": {"cart": None}},
    ],
)
def test_the_text_has_no_section_for_what_says_nothing(client, event):
    post(client, event_payload(**event))
    text = client.get("/errors/1?format=text").text
    assert text.endswith("the SDK that reported this sent none.\n"), text


@pytest.mark.parametrize("words", FORGERIES, ids=range(len(FORGERIES)))
def test_no_text_of_an_error_passes_for_a_line_of_ours_or_moves_a_cursor(client, words):
    text = text_of(client, hostile_event(words))
    head, sections, end = read_text(text)
    assert (head["error"], head["url"]) == ("1", "http://localhost/errors/1")
    names = [name for name, _ in sections]
    assert names[:3] == ["exception", "caused by", "caused by (innermost)"]
    assert end is None or end.endswith("/errors/1/payload")
    for path in ("/errors?format=text", "/issues?format=text"):
        listed = client.get(path).text
        assert len(listed.splitlines()) == 1 and listed.startswith("#1 ")
        text += listed
    assert not re.search(
        "[\0-\x09\x0b-\x1f\x7f-\x9f\xad\u034f\u115f\u17b4\u180b\u2028-\u202e\u200b-\u200f\u2066-\u2069"
        "\u2800\u3164\ufe0f\ufeff\uffa0\ue000\uffff\U000e0000-\U000e01ef]",
        text,
    )
    assert not re.search(r"\[31m|\[2J", head["title"])


LONG = "long words of somebody " * 100
FRAMES = [frame(LONG, LONG, 1, source=LONG, vars={LONG: LONG}) for _ in range(100)]
HUGE = [
    dict.fromkeys(TEXTS, LONG * 5),
    {"tags": [[f"key {number}", LONG[:300]] for number in range(300)]},
    {"exception": {"values": [{"type": LONG, "value": LONG}] * 70}},
    {"exception": {"values": [raised(LONG, LONG, *FRAMES[:2])] * 60}},
    {"stacktrace": {"frames": FRAMES}},
    {"stacktrace": {"frames": [{"function": "f" * 90, "in_app": True}] * 5000}},
    {"breadcrumbs": [{"message": LONG, "data": {"a": LONG}}] * 50},
    {"request": {"url": LONG, "method": LONG, "data": LONG, "query_string": LONG, "headers": {"a": LONG}}},
    {"contexts": {f"{LONG}{n}": {f"{m}": LONG[:300] for m in range(50)} for n in range(20)}},
    {"extra": {f"{number}": LONG for number in range(200)}, "user": {f"{n}": LONG for n in range(99)}},
]  # fmt: skip
HUGE.append({key: value for event in HUGE for key, value in event.items()})


@pytest.mark.parametrize("event", HUGE, ids=range(len(HUGE)))
def test_the_text_has_eight_thousand_characters_at_most_and_says_what_is_left_out(client, event):
    head, sections, end = read_text(text_of(client, event_payload(**{"title": "x"} | event)))
    assert head["url"] == "http://localhost/errors/1"
    if "stacktrace" in event or "exception" in event:
        assert sections[0][0] == "exception"
    assert end.startswith("left out: ")
    assert "; whole: http://localhost/errors/1?format=json and " in end


def test_nothing_is_said_of_what_was_left_out_if_nothing_was(client):
    text = text_of(client, event_payload(message="low on milk", tags=[["a", "b… c"]]))
    assert "left out" not in text
    assert "a = b… c" in text


def test_what_is_cut_of_a_trace_is_its_beginning(client):
    frames = [frame("x" * 90, f"f{number}", number, vars={}) for number in range(200)]
    cause = raised("E", "v", *frames)
    event = {"exception": {"values": [cause, raised("F", "w", *frames)]}, "tags": [["tag", "kept"]]}
    _, sections, end = read_text(text_of(client, event_payload(**event)))
    for name, lines in sections[:2]:
        shown = [int(line.rsplit("f", 1)[1]) for line in lines[2:]]
        assert shown == list(range(shown[0], 200))
        assert lines[1] == f"[{shown[0]} lines left out]"
        assert f"{shown[0]} lines of {name.split(' (')[0]}" in end
    assert ("tags", ["tag = kept"]) in sections


def test_the_list_as_text_has_a_line_for_each_error(client):
    assert client.get("/errors?format=text").text == "no errors\n"
    assert client.get("/issues?format=text").text == "no issues\n"
    for number in range(5):
        post(client, issue_event(number, 9, title=f"title {number}", culprit="c"))
    lines = client.get("/errors?format=text&limit=3").text.splitlines()
    at = client.get("/errors/5").json["received_at"]
    assert lines[0] == f"#5 {at} error title 4 c"
    assert lines[3] == "next: http://localhost/errors?format=text&limit=3&before=3"
    assert len(lines) == 4
    assert client.get("/issues?format=text").text == f"#5 5 times, last {at}: 9 error title 4 c\n"


@pytest.mark.parametrize("path", ["/errors", "/issues"])
def test_a_list_as_text_is_bounded_and_leads_on_to_every_row(client, path):
    for number in range(60):
        post(client, issue_event(number, number, title=LONG[:300], culprit=LONG[:300]))
    address = f"{path}?format=text"
    numbers = []
    while address:
        text = client.get(address).text
        assert len(text) <= 8000
        *lines, more = text.splitlines()
        numbers += [int(line[1:].split()[0]) for line in lines]
        address = more.removeprefix("next: ") if more.startswith("next: ") else None
    assert [*numbers, int(more[1:].split()[0])] == list(range(60, 0, -1))


def test_a_long_host_or_query_does_not_make_a_text_longer(client):
    for number in range(3):
        post(client, event_payload(str(number), title=LONG))
    environ = {"HTTP_HOST": "a." * 2000 + "example.com"}
    for path in ("/errors/1?format=text", "/errors?format=text&limit=1"):
        assert len(client.get(path, environ_overrides=environ).text) <= 8000
    text = client.get("/errors/1?format=text", environ_overrides=environ).text
    assert "\nurl: /errors/1\n" in text
    query = {"format": "text", "limit": 1, "q": "words " + '"' * 3000}
    assert len(client.get("/errors", query_string=query).text) <= 8000


def test_the_tag_of_an_export_differs_when_a_row_in_the_middle_is_deleted_or_learns(app, client):
    for number in range(3):
        post(client, event_payload(f"{number:032x}"))
    path = "/errors?format=ndjson"
    tags = {client.get(path).headers["ETag"]}
    post(client, event_payload(f"{1:032x}", project=7))
    tags.add(client.get(path).headers["ETag"])
    execute(app, "DELETE FROM errors WHERE id = 2")
    tags.add(client.get(path).headers["ETag"])
    assert len(tags) == 3
