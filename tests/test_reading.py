"""Reading: one error or many, as JSON, text or lines; filters, pages, tags of versions, and one shape of errors."""

import base64
import contextlib
import json
import re
import sqlite3
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlsplit

import pytest
from conftest import SECRET, count_rows, event_payload, isolate, load, post, sign, wire

from collector import create_app

SUMMARY_KEYS = (
    "id url received_at timestamp resource action event_id issue_id short_id title message culprit level status "
    "platform logger environment release project_id project_slug project_name exception_type exception_value "
    "permalink rule"
).split()
DETAIL_KEYS = [
    *SUMMARY_KEYS,
    *"exceptions stacktrace tags actor request breadcrumbs user contexts extra csp issue_stats".split(),
]
FRAME_KEYS = (
    "filename abs_path module function lineno colno in_app pre_context context_line post_context "
    "package instruction_addr vars"
).split()
NOW = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"


@pytest.fixture
def app(make_app):
    """Return an app that does not wait for the disk, of which nothing here is."""
    app = make_app()
    app.extensions["collector"].database.connection().execute("PRAGMA synchronous = OFF")
    return app


def ids(reply):
    """Return the ids of the errors in a reply of /errors."""
    assert reply.status_code == 200, reply.data
    return [row["id"] for row in reply.json]


def execute(app, sql, *values):
    """Change the database behind the app's back."""
    with app.extensions["collector"].database.turn() as connection:
        connection.execute(sql, values)


# --------------------------------------------------------------------------------------------------
# One error
# --------------------------------------------------------------------------------------------------


def test_an_error_in_full_has_every_key_even_of_an_empty_event(client):
    post(client, {"event": {}})
    error = client.get("/errors/1").json
    assert re.fullmatch(NOW, error["received_at"])
    assert error == dict.fromkeys(SUMMARY_KEYS) | {
        "id": 1, "url": "/errors/1", "received_at": error["received_at"], "timestamp": error["received_at"],
        "exceptions": [], "stacktrace": [], "tags": {}, "actor": None, "request": None, "breadcrumbs": [],
        "user": None, "contexts": None, "extra": None, "csp": None, "issue_stats": None,
    }  # fmt: skip
    assert list(error) == DETAIL_KEYS


def test_an_error_in_full_has_the_shapes_it_should(client):
    post(client, load("error.created.python"), Sentry_Hook_Resource="error")
    error = client.get("/errors/1").json
    assert list(error) == DETAIL_KEYS
    assert [list(exception) for exception in error["exceptions"]] == [
        ["type", "value", "module", "mechanism", "main", "frames"]
    ] * 2
    assert [exception["type"] for exception in error["exceptions"]] == ["KeyError", "CheckoutError"]
    assert [list(frame) for frame in error["stacktrace"]] == [FRAME_KEYS] * 4
    assert error["stacktrace"][-1]["context_line"].strip().startswith("raise CheckoutError")
    assert (error["exception_type"], error["exception_value"]) == (
        "CheckoutError",
        "cannot price basket 4711",
    )
    assert error["tags"]["transaction"] == "checkout"
    assert error["actor"] == {"type": "application", "id": "sentry", "name": "Sentry"}
    assert list(error["request"]) == ["method", "url", "query", "headers", "data"]
    assert [crumb["category"] for crumb in error["breadcrumbs"]] == ["auth", "httplib", "query"]


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
    body = json.dumps(
        load("event_alert.triggered.message") | {"action": "created"}, ensure_ascii=False, indent=7
    ).encode()
    post(client, body)
    reply = client.get("/errors/1/payload")
    assert (reply.data, reply.mimetype, reply.headers["X-Content-Type-Options"]) == (
        body,
        "application/json",
        "nosniff",
    )
    assert (
        client.get("/errors/1/payload", headers={"Accept": "text/html"}).mimetype
        == "application/json"
    )


def test_replies_in_json_are_ascii_and_end_a_line(client):
    post(client, event_payload(title="grün \x1b[31m \u202e"))
    for path in ("/errors/1", "/errors", "/errors?format=ndjson", "/"):
        reply = client.get(path)
        assert reply.data.isascii() and reply.data.endswith(b"\n") and b"\x1b" not in reply.data


def test_a_head_request_is_answered_without_a_body(client):
    post(client, event_payload())
    for path in ("/errors/1", "/errors", "/errors?format=ndjson", "/", "/health"):
        reply = client.head(path)
        assert (reply.status_code, reply.data) == (200, b"")


@pytest.mark.parametrize(
    ("accept", "form", "mimetype"),
    [
        (None, None, "application/json"),
        ("*/*", None, "application/json"),
        ("application/json", None, "application/json"),
        ("image/png", None, "application/json"),
        ("text/plain", None, "text/plain"),
        ("text/plain;q=0.5, application/json;q=0.4", None, "text/plain"),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", None, "text/html"),
        ("text/html", "json", "application/json"),
        ("text/html", "text", "text/plain"),
        ("application/json", "html", "text/html"),
        ("text/html", "", "text/html"),
        (";;;q=,*/q=nan;,\xff", None, "application/json"),
    ],
)
def test_the_form_is_the_one_asked_for(client, accept, form, mimetype):
    post(client, event_payload())
    query = "" if form is None else f"?format={form}"
    for path in ("/errors/1", "/errors/latest", "/errors"):
        reply = client.get(path + query, headers={"Accept": accept} if accept else {})
        assert (reply.status_code, reply.mimetype) == (200, mimetype)
        assert {"Accept", "Authorization"} <= {
            word.strip() for word in reply.headers["Vary"].split(",")
        }


# --------------------------------------------------------------------------------------------------
# One shape of errors
# --------------------------------------------------------------------------------------------------

FAULTS = [
    ("GET", "/nowhere", 404, "/"),
    ("GET", "/errors/", 404, "/"),
    ("GET", "/errors/0", 404, "no error 0"),
    ("GET", "/errors/1", 404, "no error 1"),
    ("GET", "/errors/-1", 404, "/"),
    ("GET", "/errors/1.5", 404, "/"),
    ("GET", "/errors/9223372036854775807", 404, "no error"),
    ("GET", "/errors/9223372036854775808", 404, "no error"),
    ("GET", "/errors/" + "9" * 4000, 404, "no error"),
    ("GET", "/errors/1/payload", 404, "no error 1"),
    ("GET", "/errors/latest", 404, "No error"),
    ("GET", "/errors/latest?level=fatal", 404, "No error matches"),
    ("GET", "/sentry/webhook", 405, "GET"),
    ("PUT", "/sentry/webhook", 405, "PUT"),
    ("POST", "/errors", 405, "POST"),
    ("DELETE", "/errors/1", 405, "DELETE"),
    ("POST", "/", 405, "POST"),
    ("POST", "/health", 405, "POST"),
    ("BREW", "/errors", 405, "BREW"),
    ("POST", "/sentry/webhook", 400, "not JSON"),
    ("GET", "/errors?limit=0", 400, "limit=", "1 to 1000"),
    ("GET", "/errors?limit=1001", 400, "limit=", "1 to 1000"),
    ("GET", "/errors?limit=x", 400, "limit='x'"),
    ("GET", "/errors?limit=-1", 400, "limit="),
    ("GET", "/errors?limit=1e2", 400, "limit="),
    ("GET", "/errors?limit=%D9%A5", 400, "limit="),
    ("GET", "/errors?format=ndjson&limit=" + "9" * 50, 400, "limit="),
    ("GET", "/errors?before=x", 400, "before="),
    ("GET", "/errors?before=9223372036854775808", 400, "before="),
    ("GET", "/errors?after=-1", 400, "after="),
    ("GET", "/errors?since=yesterday", 400, "since='yesterday'", "ISO 8601"),
    ("GET", "/errors?until=5w", 400, "until='5w'", "15m"),
    ("GET", "/errors?since=2026-13-01", 400, "since="),
    ("GET", "/errors?since=1", 400, "since="),
    ("GET", "/errors?level=a&level=b", 400, "level", "once"),
    ("GET", "/errors?levle=error", 400, "'levle'", "level"),
    ("GET", "/errors?" + "x" * 3000, 400, "unknown"),
    ("GET", "/errors?%F0%9F%8D%B5=%1B[31m", 400, "unknown"),
    ("GET", "/errors?limit=" + quote("🍵" * 400), 400, "limit="),
    ("GET", "/errors?format=xml", 400, "format='xml'", "ndjson"),
    ("GET", "/errors?refresh=0", 400, "refresh="),
    ("GET", "/errors?refresh=5;url=https://evil.example.com", 400, "refresh="),
    ("GET", "/errors/latest?refresh=x", 400, "refresh="),
    ("GET", "/errors/latest?limit=5", 400, "'limit'"),
    ("GET", "/errors/1?format=ndjson", 400, "format='ndjson'"),
    ("GET", "/errors/1?level=error", 400, "'level'"),
    ("GET", "/errors/1/payload?format=json", 400, "'format'"),
    ("GET", "/?format=text", 400, "format='text'", "html"),
]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"), [(*fault[:3], fault[3:]) for fault in FAULTS]
)
def test_every_failure_has_one_shape_and_says_what_to_do(client, method, path, status, words):
    if "latest?" in path and status == 400:
        post(client, event_payload())
    url, _, query = path.partition("?")
    reply = client.open(
        url, method=method, query_string=query, environ_overrides={"CONTENT_LENGTH": "0"}
    )
    assert (reply.status_code, reply.mimetype) == (status, "application/json")
    assert list(reply.json) == ["error"]
    for word in words:
        assert word in reply.json["error"]
    assert len(reply.data) <= 1024
    assert reply.data.isascii()
    assert ("Allow" in reply.headers) == (status == 405)

    if "format=" in path:
        return
    headers = {"Accept": "text/html"}
    environ = {"CONTENT_LENGTH": "0"}
    page = client.open(
        url, method=method, query_string=query, headers=headers, environ_overrides=environ
    )
    assert (page.status_code, page.mimetype) == (status, "text/html")
    assert "\x1b" not in page.text
    assert "Content-Security-Policy" in page.headers
    assert 'role="alert"' in page.text


def test_a_redirect_is_never_sent(client):
    for path in (
        "/errors/",
        "//errors",
        "/sentry//webhook",
        "/errors/latest/",
        "/sentry/webhook//",
        "/health/",
    ):
        for method in ("GET", "POST"):
            status = client.open(method=method, environ_overrides={"PATH_INFO": path}).status_code
            assert status == 200 or status >= 400, path


@pytest.mark.parametrize("character", ["x", "\\", '"', "'", "ü", "\U0001f375", "\x1b", "\n"])
def test_a_failure_stays_short_whatever_the_folder_is_called(tmp_path, character):
    name = character * (200 // len(character.encode()))
    folder = tmp_path / name / name / name
    app = create_app({"DATABASE_URL": f"sqlite:///{folder}/errors.db"})
    client = app.test_client()
    folder.rename(tmp_path / "away")
    for path in ("/health", "/errors", "/errors/1"):
        reply = client.get(path)
        assert (reply.status_code, list(reply.json)) == (503, ["error"])
        assert len(reply.data) <= 1024
    reply = post(client, event_payload())
    assert (reply.status_code, len(reply.data) <= 1024) == (503, True)
    app.extensions["collector"].database.close()


# --------------------------------------------------------------------------------------------------
# The token
# --------------------------------------------------------------------------------------------------

TOKEN = "t0ken/with+signs="
GUARDED = [
    "/",
    "/?format=html",
    "/config",
    "/errors",
    "/errors?format=ndjson",
    "/errors/latest",
    "/errors/1",
    "/errors/1/payload",
]


def basic(password, user="anybody"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


@pytest.fixture
def guarded(make_app):
    client = make_app(API_TOKEN=TOKEN).test_client()
    assert post(client, event_payload()).status_code == 201
    return client


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize(
    "authorization", [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN), basic(TOKEN, "")]
)
def test_who_knows_the_token_reads(guarded, path, authorization):
    assert guarded.get(path, headers={"Authorization": authorization}).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        TOKEN,
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}x",
        f"Token {TOKEN}",
        f"Digest {TOKEN}",
        "Bearer \xe9",
        basic("wrong"),
        basic("x", TOKEN),
        basic(""),
        "Basic",
        "Basic %%%",
        "Basic " + base64.b64encode(b"\xff\xfe").decode(),
        "Basic " + base64.b64encode(TOKEN.encode()).decode(),
    ],
)
def test_who_does_not_know_the_token_reads_nothing(guarded, authorization):
    headers = {} if authorization is None else {"Authorization": authorization}
    for path in GUARDED:
        reply = guarded.get(path, headers=headers)
        assert (reply.status_code, list(reply.json)) == (401, ["error"])
        assert "API_TOKEN" in reply.json["error"] and "Bearer" in reply.json["error"]
        assert TOKEN not in reply.text
        assert reply.headers["WWW-Authenticate"].startswith("Basic realm=")
    page = guarded.get("/errors", headers=headers | {"Accept": "text/html"})
    assert (page.status_code, page.mimetype) == (401, "text/html")


def test_health_and_webhook_need_no_token(guarded):
    assert guarded.get("/health").json == {"status": "ok"}
    assert post(guarded, event_payload("2")).status_code == 201


def test_a_token_of_any_characters_works_as_password(make_app):
    client = make_app(API_TOKEN="schlüssel 🍵").test_client()
    assert (
        client.get("/errors", headers={"Authorization": basic("schlüssel 🍵")}).status_code == 200
    )
    assert client.get("/errors", headers={"Authorization": basic("schlussel")}).status_code == 401


# --------------------------------------------------------------------------------------------------
# What the service is
# --------------------------------------------------------------------------------------------------


def test_the_overview_says_what_this_is_and_what_it_holds(client):
    empty = client.get("/").json
    assert {
        "name",
        "version",
        "endpoints",
        "counts",
        "newest",
        "deliveries",
        "last_delivery_at",
        "connect",
    } <= empty.keys()
    assert (empty["counts"], empty["newest"]) == ({"errors": 0, "spooled": 0}, None)
    assert empty["connect"]["webhook_url"] == "http://localhost/sentry/webhook"
    for number in range(3):
        post(client, event_payload(str(number)))
    about = client.get("/").json
    assert about["counts"]["errors"] == 3
    assert about["newest"] == client.get("/errors").json[0]
    paths = [path.split()[1] for path in about["endpoints"]]
    assert {
        "/sentry/webhook",
        "/errors/latest",
        "/errors/<id>",
        "/errors/<id>/payload",
        "/errors",
        "/health",
    } <= set(paths)


def test_the_configuration_is_shown_without_secrets(make_app, tmp_path):
    secrets = {"SENTRY_CLIENT_SECRET": f"{SECRET},an0ther", "API_TOKEN": TOKEN}
    app = make_app(
        **secrets,
        SENTRY_ACTIONS="created,triggered",
        RETENTION_DAYS=30,
        MAX_BODY_BYTES=12345,
        PORT=8123,
    )
    client = app.test_client()
    headers = {"Authorization": f"Bearer {TOKEN}"}
    config = client.get("/config", headers=headers).json
    expected = {
        "sentry_dsn_set": False, "sentry_client_secret_set": True, "api_token_set": True,
        "sentry_actions": ["created", "triggered"], "retention_days": 30, "max_body_bytes": 12345, "port": 8123,
        "web_concurrency": 2, "database_path": f"{tmp_path}/data/errors.db", "spooled": 0, "problem": None,
        "deliveries": [], "last_delivery_at": None,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert config["journal_mode"] in ("WAL", "PERSIST")
    assert re.fullmatch(r"3\.\d+\.\d+", config["sqlite_version"])
    for path in ("/", "/config", "/?format=html"):
        text = client.get(path, headers=headers).text
        assert not [secret for secret in (SECRET, "an0ther", TOKEN) if secret in text]


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
        event = dict(zip(keys, values, strict=True)) | {"event_id": str(number)}
        issue = {"project": {"slug": slug}, "shortId": f"TEA-{values[3]}"}
        post(
            client, {"action": "created", "data": {"error": event, "issue": issue if slug else {}}}
        )


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Return a client that many tests read from, so it must stay as it is."""
    with pytest.MonkeyPatch.context() as patch:
        isolate(patch, tmp_path_factory.mktemp("filled"))
        app = create_app()
        fill(app.test_client())
        yield app.test_client()
        app.extensions["collector"].database.close()


FILTERED = [
    ("", [7, 6, 5, 4, 3, 2, 1]),
    ("project=shop", [3, 2, 1]),
    ("project=sho", []),
    ("project=Shop", []),
    ("project=shop-eu", [7]),
    ("project=", [7, 6, 5, 4, 3, 2, 1]),
    ("level=error", [7, 4, 3, 1]),
    ("level=ERROR", []),
    ("environment=production", [7, 4, 2, 1]),
    ("environment=pr%C3%BCf+stand", [5]),
    ("platform=javascript", [5, 4]),
    ("issue=10", [2, 1]),
    ("issue=TEA-10", [2, 1]),
    ("issue=TEA-1", []),
    ("issue=1", []),
    ("project=shop&level=error", [3, 1]),
    ("project=shop&level=error&environment=production&platform=python&issue=10", [1]),
    ("project=shop&platform=javascript", []),
    ("q=price", [7, 2, 1]),
    ("q=pric", [7, 2, 1]),
    ("q=rice", []),
    ("q=PRICE+keyerror", [2, 1]),
    ("q=checkout", [2, 1]),
    ("q=slow", [3]),
    ("q=supplier", [7, 3]),
    ("q=supplier+x", []),
    ("q=supplierless+x", [7]),
    ("q=supp+slow", []),
    ("q=slow+supp", [3]),
    ("q=ubergelaufen", [5]),
    ("q=%E6%8A%B9", [5]),
    ("q=production", []),
    ("q=fatal", []),
    ("q=shop", [3, 2, 1]),
    ("q=project", [6]),
    ("q=OR", [6]),
    ("q=NEAR+AND", [6]),
    ("q=facets%3Aerror", []),
    ("q=%22voll%22", [5]),
    ("q=price&level=fatal", [2]),
    ("q=price&project=shop&limit=1", [2]),
    ("limit=2", [7, 6]),
    ("before=3", [2, 1]),
    ("before=1", []),
    ("before=99&limit=1", [7]),
    ("after=5", [6, 7]),
    ("after=0&limit=3", [1, 2, 3]),
    ("after=7", []),
    ("after=2&before=5", [3, 4]),
    ("after=2&project=shop", [3]),
    ("before=4&level=error", [3, 1]),
    ("after=1&q=price", [2, 7]),
]


@pytest.mark.parametrize(("query", "expected"), FILTERED)
def test_filters_narrow_the_list_and_the_latest(filled, query, expected):
    assert ids(filled.get(f"/errors?{query}")) == expected
    lines = filled.get(f"/errors?{query}&format=ndjson").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == expected
    assert re.findall(
        r"^#(\d+) ", filled.get(f"/errors?{query}&format=text").text, re.MULTILINE
    ) == [*map(str, expected)]
    if not re.search("before|after|limit", query):
        latest = filled.get(f"/errors/latest?{query}")
        assert latest.json["id"] == expected[0] if expected else latest.status_code == 404


@pytest.mark.parametrize(
    "text",
    [
        '"', "'", '""', "*", "a*", "^a", "a AND", "NOT", "(", ")", "{a b}: c", "NEAR(", "-", "- facets : x", "\0", "\\",
        "%", ":", "+", "a" * 5000, "\ue000project", "\u0301", "\ue000level6572726f72", "price'; DROP TABLE errors; --",
        "\U0001f375", "\ud7ff\uffff",
    ],
)  # fmt: skip
def test_any_text_is_a_safe_query(filled, text):
    for name in ("q", "project", "level", "environment", "platform", "issue"):
        for form in ("json", "text", "ndjson", "html"):
            reply = filled.get("/errors", query_string={name: text, "format": form})
            assert reply.status_code == 200
        assert filled.get("/errors/latest", query_string={name: text}).status_code in (200, 404)
    assert "error" not in str(
        filled.get("/errors", query_string={"q": "\ue000level6572726f72"}).json
    )


def times_ago(*hours):
    return [f"{(datetime.now(UTC) - timedelta(hours=hour)).isoformat()[:23]}000Z" for hour in hours]


def test_a_period_is_given_in_iso_8601_or_as_long_ago(app, client):
    fill(client)
    for number, at in enumerate(times_ago(24 * 30, 24 * 6, 30, 5, 3, 0.5, 0.1), 1):
        execute(app, "UPDATE errors SET received_at = ? WHERE id = ?", at, number)
    for query, expected in [
        ("since=15m", [7]),
        ("since=1h", [7, 6]),
        ("since=24h", [7, 6, 5, 4]),
        ("since=7d", [7, 6, 5, 4, 3, 2]),
        ("since=999999d", [7, 6, 5, 4, 3, 2, 1]),
        ("until=4h", [4, 3, 2, 1]),
        ("until=0m", [7, 6, 5, 4, 3, 2, 1]),
        ("since=7d&until=1d", [3, 2]),
        ("since=1h&until=2h", []),
        ("since=1h&project=shop", []),
        ("since=6h&project=front", [5, 4]),
        ("until=1h&q=price", [2, 1]),
        ("since=2999-01-01", []),
        ("until=1999-01-01", []),
        ("since=1999-01-01&until=2999-01-01T00:00:00%2B02:00", [7, 6, 5, 4, 3, 2, 1]),
        ("since=1999-01-01T00:00:00+02:00", [7, 6, 5, 4, 3, 2, 1]),
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


def test_the_history_of_an_issue_holds_its_events_by_its_short_id(client):
    post(client, load("issue.created"))
    post(client, load("error.created.python"))
    post(client, event_payload("other", issue_id="1"))
    assert (
        ids(client.get("/errors?issue=SHOP-2F"))
        == ids(client.get("/errors?issue=5900000011"))
        == [2, 1]
    )
    assert (
        client.get("/errors/latest?issue=SHOP-2F").json["event_id"]
        == "6f0a4d2b9c1e4f7a8b3d5e6c7a8b9c0d"
    )


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
        found = re.fullmatch(r'<(http://localhost/errors\?[^>]*)>; rel="next"', link)
        assert bool(found) == bool(link)
        path = found and "?".join(urlsplit(found[1])[2:4])
    return pages


def test_the_link_leads_through_all_pages_once(client):
    for number in range(25):
        post(
            client,
            event_payload(
                str(number), level="error" if number % 2 else "info", title=f"Tüte {number} & co"
            ),
        )
    everything = list(range(25, 0, -1))
    assert follow(client, "/errors") == [everything]
    assert follow(client, "/errors?limit=25") == [everything]
    assert follow(client, "/errors?limit=10") == [
        everything[:10],
        everything[10:20],
        everything[20:],
    ]
    assert follow(client, "/errors?limit=10&after=0") == [
        everything[:14:-1],
        everything[14:4:-1],
        everything[4::-1],
    ]
    for query in ("level=error", "level=error&q=t%C3%BCte+%26+co", "level=error&since=1h"):
        pages = follow(client, f"/errors?{query}&limit=5")
        assert [len(page) for page in pages] == [5, 5, 2]
        assert [id_ for page in pages for id_ in page] == [
            id_ for id_ in everything if id_ % 2 == 0
        ]


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


TAGGED = [
    "/errors/1",
    "/errors/1?format=text",
    "/errors/1?format=html",
    "/errors/1/payload",
    "/errors/latest",
    "/errors",
    "/errors?level=error",
    "/errors?format=text",
    "/errors?format=html",
    "/errors?format=ndjson",
    "/",
    "/?format=html",
    "/config",
]


@pytest.mark.parametrize("path", TAGGED)
def test_who_has_a_reply_already_is_told_so(client, path):
    post(client, event_payload())
    wait_out_the_minute()
    first = client.get(path)
    tag = first.headers["ETag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}'):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.data) == (304, b"")
        assert again.headers["ETag"] == tag
        assert again.headers.get("Link") == first.headers.get("Link")
    assert client.get(path, headers={"If-None-Match": '"other"'}).data == first.data


def wait_out_the_minute():
    """Wait if the minute is about to end: pages say how many minutes ago things were."""
    if time.time() % 60 > 58:
        time.sleep(2.1)


@pytest.mark.parametrize("path", [path for path in TAGGED if not path.startswith("/errors/1")])
def test_a_new_error_changes_the_tag_of_what_shows_it(client, path):
    post(client, event_payload())
    before = client.get(path).headers["ETag"]
    post(client, event_payload("another"))
    after = client.get(path, headers={"If-None-Match": before})
    assert (after.status_code, after.headers["ETag"] != before) == (200, True)


def test_the_tag_of_an_error_stays_in_json_and_text_and_differs_between_forms(client):
    post(client, event_payload())
    paths = ["/errors/1", "/errors/1?format=text", "/errors/1/payload", "/errors/latest"]
    before = [client.get(path).headers["ETag"] for path in paths]
    assert len(set(before)) == len(before)
    by_header = client.get("/errors/1", headers={"Accept": "text/plain"}).headers["ETag"]
    assert by_header != before[0]
    post(client, event_payload("another"))
    assert [client.get(path).headers["ETag"] for path in paths[:3]] == before[:3]


def test_a_changed_list_is_told_from_one_of_another_database(app, client):
    post(client, event_payload())
    tags = [client.get(path).headers["ETag"] for path in ("/errors/1", "/errors")]
    execute(app, "UPDATE errors SET received_at = '2026-01-01T00:00:00.000000Z'")
    assert not set(tags) & {client.get(path).headers["ETag"] for path in ("/errors/1", "/errors")}


def test_who_has_a_reply_costs_no_reading_of_payloads(app, client):
    post(client, event_payload())
    paths = [
        "/errors/1",
        "/errors/1?format=text",
        "/errors/1/payload",
        "/errors/latest",
        "/errors?format=ndjson",
    ]
    tags = [client.get(path).headers["ETag"] for path in paths]
    execute(app, "UPDATE errors SET payload = x'00'")
    for path, tag in zip(paths, tags, strict=True):
        assert client.get(path, headers={"If-None-Match": tag}).status_code == 304
    assert client.get("/errors/1").status_code == 500


# --------------------------------------------------------------------------------------------------
# Lines
# --------------------------------------------------------------------------------------------------


def test_an_export_has_every_error_in_full_a_line_each(client):
    for number in range(230):
        post(
            client,
            event_payload(str(number), level="info" if number % 10 else "error", extra="x" * 500),
        )
    reply = client.get("/errors?format=ndjson")
    assert reply.mimetype == "application/x-ndjson"
    lines = reply.text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(230, 0, -1))
    assert json.loads(lines[0]) == client.get("/errors/230").json
    for query, count in (
        ("limit=150", 150),
        ("limit=100", 100),
        ("limit=7", 7),
        ("level=error", 23),
        ("q=nothing", 0),
    ):
        assert len(client.get(f"/errors?format=ndjson&{query}").text.splitlines()) == count
    oldest_first = client.get(
        "/errors?after=3", headers={"Accept": "application/x-ndjson"}
    ).text.splitlines()
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

HEAD_KEYS = (
    "error title level culprit environment release project issue event happened received message platform logger rule "
    "permalink url"
).split()
SECTIONS = {
    "stacktrace (oldest call first):",
    "exceptions (inner cause first):",
    "tags:",
    "request:",
    "breadcrumbs (newest last):",
}


def read_text(text):
    """Return the head of a text form as pairs, and its sections; fail on any line at the margin that is not ours."""
    head, *rest = text.split("\n\n")
    pairs = [tuple(line.split(": ", 1)) for line in head.splitlines()]
    assert all(len(pair) == 2 for pair in pairs), head
    keys = [key for key, _ in pairs]
    assert keys == [key for key in HEAD_KEYS if key in keys]
    last = rest.pop()
    assert (
        last.count("\n") == 1
        and last.endswith("/payload\n")
        and last.startswith(("source context", "left out: "))
    )
    sections = {}
    for part in rest:
        name, *lines = part.split("\n")
        assert name in SECTIONS and name not in sections
        assert lines and all(line.startswith("  ") for line in lines), lines
        sections[name.split(" (")[0].rstrip(":")] = [line[2:] for line in lines]
    return dict(pairs), sections, last


def text_of(client, payload):
    """Post a payload and return its text form."""
    id_ = post(client, payload).json["id"]
    reply = client.get(f"/errors/{id_}", headers={"Accept": "text/plain"})
    assert (reply.status_code, reply.content_type) == (200, "text/plain; charset=utf-8")
    assert len(reply.text) <= 8000
    return reply.text


def test_the_text_of_an_error_says_what_broke_and_where(client):
    head, sections, last = read_text(text_of(client, load("error.created.python")))
    assert head["title"] == "CheckoutError: cannot price basket 4711"
    assert (head["error"], head["level"], head["project"], head["environment"]) == (
        "1",
        "error",
        "shop",
        "production",
    )
    assert (head["culprit"], head["release"], head["url"]) == (
        "checkout",
        "shop@2.14.0",
        "http://localhost/errors/1",
    )
    assert sections["stacktrace"] == [
        "[2 library frames]",
        'File "shop/views.py", line 64, in checkout',
        "  total = total_of(basket())",
        'File "shop/basket.py", line 41, in total_of',
        '  raise CheckoutError(f"cannot price basket {basket.id}") from error',
    ]
    assert [line.split(" [")[0] for line in sections["exceptions"]] == [
        "KeyError: 'price'",
        "CheckoutError: cannot price basket 4711",
    ]
    assert "url = https://shop.example.com/checkout" in sections["tags"]
    assert sections["request"] == ["POST https://shop.example.com/checkout"]
    assert "SELECT price FROM teas WHERE id = 77" in sections["breadcrumbs"][-1]
    assert "http://localhost/errors/1/payload" in last


@pytest.mark.parametrize(
    ("name", "crash"),
    [
        ("error.created.java", 'File "com.example.brew.Kettle", in boil'),
        ("error.created.native", 'File "pour.c", line 0, in pour'),
        ("documented.created", 'raise ValueError("too hot")'),
        ("legacy_plugin", "reply = supplier.ask(tea)"),
        ("service_hook", 'raise LookupError("no such tea")'),
        ("sentry8_legacy", 'raise DryError("boiled dry")'),
    ],
)
def test_the_text_of_a_sample_ends_its_trace_with_the_crash(client, name, crash):
    _, sections, _ = read_text(text_of(client, load(name)))
    assert sections["stacktrace"][-1].strip() == crash


def test_the_latest_error_can_be_had_as_text(client):
    text = text_of(client, load("error.created.python"))
    assert client.get("/errors/latest?format=text").text == text


def test_runs_of_library_frames_are_folded_and_the_crash_never_is(client):
    marks = [False, True, False, False, False, True, None, False]
    frames = [{"function": f"f{number}", "in_app": mark} for number, mark in enumerate(marks)]
    _, sections, _ = read_text(text_of(client, event_payload(stacktrace={"frames": frames})))
    assert sections["stacktrace"] == [
        "[1 library frame]",
        'File "?", in f1',
        "[3 library frames]",
        'File "?", in f5',
        "[1 library frame]",
        'File "?", in f7',
    ]


def test_no_frame_is_folded_if_none_is_marked(client):
    frames = [{"function": f"f{number}"} for number in range(4)]
    _, sections, _ = read_text(text_of(client, event_payload(stacktrace={"frames": frames})))
    assert sections["stacktrace"] == [f'File "?", in f{number}' for number in range(4)]


TEXTS = "title message culprit level platform logger environment release web_url issue_id".split()
FORGERIES = [
    "x\nerror: 99\ntitle: forged",
    "x\r\nerror: 99",
    "x\x0berror: 99",
    "x\x0cerror: 99",
    "x\x1cerror: 99",
    "x\x1eerror: 99",
    "x\x85error: 99",
    "x\u2028error: 99",
    "x\u2029error: 99",
    "x\n\nstacktrace (oldest call first):\n  forged",
    "\n\n\nurl: http://evil.example.com",
    "\x1b[2J\x1b[1;1Herror: 99",
    "\x1b]0;title\x07error: 99",
    "\x1b]8;;http://evil.example.com\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31mred\x9d0;x\x9c",
    "\x1bP1$r\x1b\\\x1b^x\x1b\\\x1b_x\x1b\\\x1bc\x1b",
    "a\bb\x7fc\0d",
    "\u202egnp.exe\u2066\u200b\ufeff\u200e",
    "\U000e0041\U000e0042\U000e007f",
    "\ud800\udfff",
]


@pytest.mark.parametrize("words", FORGERIES, ids=range(len(FORGERIES)))
def test_no_text_of_an_error_passes_for_a_line_of_ours_or_moves_a_cursor(client, words):
    crumb = {"message": words, "category": words, "data": {words: words}}
    frame = {
        "filename": words,
        "function": words,
        "module": words,
        "context_line": words,
        "in_app": True,
    }
    exception = {
        "type": words,
        "value": words,
        "stacktrace": {"frames": [frame, {"function": words}]},
    }
    event = {
        **dict.fromkeys(TEXTS, words),
        "tags": [[words, words]], "request": {"method": words, "url": words}, "breadcrumbs": {"values": [crumb]},
        "exception": {"values": [exception]}, "event_id": words,
    }  # fmt: skip
    issue = {"shortId": words, "project": {"slug": words}}
    text = text_of(
        client,
        {"action": "created", "data": {"event": event, "issue": issue, "triggered_rule": words}},
    )
    head, _, _ = read_text(text)
    assert (head["error"], head["url"]) == ("1", "http://localhost/errors/1")
    listed = client.get("/errors?format=text").text
    assert len(listed.splitlines()) == 1 and listed.startswith("#1 ")
    for shown in (text, listed):
        assert not re.search(
            "[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u200b\u200e\u202a-\u202e\u2066-\u2069\ufeff]",
            shown,
        )
        assert not re.search("[\U000e0000-\U000e007f]", shown)
    assert not re.search(
        r"\[31m|\[2J|evil", head["title"].replace("url: http://evil.example.com", "")
    )


LONG = "long words of somebody " * 100
MANY = [[f"key {number}", LONG] for number in range(300)]
HUGE = [
    dict.fromkeys(TEXTS, LONG * 5),
    {"tags": MANY, "title": "x"},
    {"exception": {"values": [{"type": LONG, "value": LONG}] * 300}},
    {
        "stacktrace": {
            "frames": [{"function": LONG, "filename": LONG, "context_line": LONG, "in_app": True}]
            * 300
        }
    },
    {
        "stacktrace": {
            "frames": [{"function": "f", "in_app": number % 2 == 0} for number in range(5000)]
        }
    },
    {
        "breadcrumbs": [{"message": LONG, "data": {"a": LONG}}] * 300,
        "request": {"url": LONG, "method": LONG},
    },
]
HUGE.append({key: value for event in HUGE for key, value in event.items()})


@pytest.mark.parametrize("event", HUGE, ids=range(len(HUGE)))
def test_the_text_has_eight_thousand_characters_at_most_and_says_what_is_left_out(client, event):
    text = text_of(client, event_payload(**event))
    head, sections, last = read_text(text)
    assert head["url"] == "http://localhost/errors/1"
    if "stacktrace" in event:
        assert sections["stacktrace"]
    if "tags" in event or "exception" in event or "stacktrace" in event:
        assert last.startswith("left out: ")
        assert re.search(r"\d+ lines of ", last)


def test_what_is_cut_of_a_trace_is_its_beginning(client):
    frames = [
        {"function": f"f{number}", "filename": "x" * 90, "in_app": True} for number in range(250)
    ]
    _, sections, last = read_text(text_of(client, event_payload(stacktrace={"frames": frames})))
    shown = [int(line.rsplit("f", 1)[1]) for line in sections["stacktrace"]]
    assert shown == list(range(shown[0], 250))
    assert f"{shown[0]} lines of stacktrace" in last


def test_the_list_as_text_has_a_line_for_each_error(client):
    assert client.get("/errors?format=text").text == "no errors\n"
    for number in range(5):
        post(client, event_payload(str(number), title=f"title {number}", culprit="c"))
    lines = client.get("/errors?format=text&limit=3").text.splitlines()
    assert [line.split()[0] for line in lines] == ["#5", "#4", "#3", "next:"]
    assert all("error" in line and "title" in line for line in lines[:3])
    assert lines[3] == "next: http://localhost/errors?format=text&limit=3&before=3"


def test_the_list_as_text_is_bounded_and_says_what_is_left_out(client):
    for number in range(120):
        post(client, event_payload(str(number), title=LONG, culprit=LONG))
    text = client.get("/errors?format=text&limit=100").text
    assert len(text) <= 8000
    *lines, left_out, more = text.splitlines()
    assert f"{100 - len(lines)} more" in left_out
    assert more.startswith("next: http://localhost/errors?")


def test_a_long_host_or_query_does_not_make_a_text_longer(client):
    for number in range(3):
        post(client, event_payload(str(number), title=LONG))
    environ = {"HTTP_HOST": "a." * 2000 + "example.com"}
    for path in (
        "/errors/1?format=text",
        "/errors?format=text&limit=1",
        "/errors/latest?format=text",
    ):
        assert len(client.get(path, environ_overrides=environ).text) <= 8000
    query = {"format": "text", "limit": 1, "q": "words " + '"' * 3000}
    assert len(client.get("/errors", query_string=query).text) <= 8000


def test_reading_takes_no_signature(make_app):
    client = make_app(SENTRY_CLIENT_SECRET=SECRET).test_client()
    body = wire(event_payload())
    post(client, body, **sign(body))
    assert client.get("/errors/latest").status_code == 200


@pytest.mark.parametrize(
    "path", ["/errors/1", "/errors/1/payload", "/errors/1?format=text", "/errors/1?format=html"]
)
def test_an_error_deleted_while_it_is_read_is_not_found(app, client, path):
    post(client, event_payload())
    database = app.extensions["collector"].database

    def delete_before(sql):
        if sql.startswith("SELECT payload"):
            with contextlib.closing(sqlite3.connect(database.path, isolation_level=None)) as other:
                other.execute("DELETE FROM errors")

    database.connection().set_trace_callback(delete_before)
    assert client.get(path).status_code == 404
    assert count_rows(app) == 0
