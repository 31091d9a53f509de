"""Reading: errors and issues as JSON, lines and text; filters, pages, forms, tokens, failures."""

import base64
import json
import re
import time
from datetime import UTC, datetime, timedelta
from html import unescape
from itertools import chain
from urllib.parse import quote, urlsplit

import pytest
from conftest import (
    SECRET,
    core,
    counts,
    event_payload,
    issue_event,
    load,
    locked,
    make_client,
    sign,
    wire,
    write,
)

SUMMARY_KEYS = (
    "id url received_at timestamp resource action event_id issue_id short_id title message "
    "culprit level status platform logger environment release project_id project_slug project_name "
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
ISSUE_KEYS = "server project_id project_slug count first_seen last_seen newest url".split()
ISSUE_KEYS += "issue_id short_id title culprit level category".split()
MOMENT = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
TYPES = {"json": "application/json", "text": "text/plain", "html": "text/html"}


def hours_ago(hours):
    """Return a time as it is stored."""
    return f"{(datetime.now(UTC) - timedelta(hours=hours)).isoformat()[:19]}.000000Z"


def next_of(reply):
    """Return the path that a reply's Link leads to, None without one."""
    link = re.fullmatch(r'<(/[^>]*)>; rel="next"', reply.headers.get("Link", ""))
    assert bool(link) == ("Link" in reply.headers)
    return link and link[1]


def follow(client, path, key="id"):
    """Return the ids of all pages that a path and the Links of its pages lead to."""
    pages = []
    while path and len(pages) < 100:
        reply = client.get(path)
        pages.append([row[key] for row in reply.json])
        path = next_of(reply)
    return pages


def test_an_error_in_full_has_every_key_and_shape(client):
    client.deliver({"event": {}})
    error = client.get("/errors/1").json
    assert set(error) == set(DETAIL_KEYS)
    at = error["received_at"]
    assert re.fullmatch(MOMENT, at)
    empty = {"exceptions": [], "stacktrace": [], "tags": {}, "breadcrumbs": []}
    own = {"id": 1, "url": "/errors/1", "received_at": at, "timestamp": at, "category": "error"}
    assert error == dict.fromkeys(DETAIL_KEYS) | own | empty

    client.deliver(load("error.created.python"), Sentry_Hook_Resource="error")
    error = client.get("/errors/2").json
    assert set(error) == set(DETAIL_KEYS)
    chain = [(exception["type"], exception["main"]) for exception in error["exceptions"]]
    assert chain == [("KeyError", False), ("CheckoutError", True)]
    assert error["exceptions"][1]["frames"] == error["stacktrace"]
    assert [list(frame) for frame in error["stacktrace"]] == [FRAME_KEYS] * 4
    assert list(error["request"]) == ["method", "url", "query", "headers", "data"]
    at = error["received_at"]
    assert error["occurrences"] == {"count": 1, "first_seen": at, "last_seen": at}
    row = client.get("/errors").json[0]
    assert set(row) == set(SUMMARY_KEYS)
    assert row == {key: error[key] for key in SUMMARY_KEYS}


def test_the_latest_is_the_one_received_last_whatever_its_own_time(client):
    assert client.get("/errors/latest").status_code == 404
    client.deliver(event_payload(1, datetime="2030-01-01T00:00:00Z"))
    client.deliver(event_payload(2, datetime="1999-01-01T00:00:00Z"))
    latest = client.get("/errors/latest").json
    assert latest == client.get("/errors/2").json
    assert latest["timestamp"] == "1999-01-01T00:00:00Z"


def test_occurrences_are_those_of_the_issue_on_its_server(client):
    for number in range(1, 6):
        client.deliver(issue_event(number, 9))
    client.deliver(issue_event(6, 9, host="sentry.example"))
    first = client.get("/errors/1").json
    newest = client.get("/errors/5").json
    assert first["occurrences"] == newest["occurrences"] == {
        "count": 5, "first_seen": first["received_at"], "last_seen": newest["received_at"]
    }  # fmt: skip
    assert client.get("/errors/6").json["occurrences"]["count"] == 1


def test_a_payload_is_sent_as_it_came_and_all_json_is_ascii(client):
    body = json.dumps(event_payload(title="grün \x1b[31m \u202e"), ensure_ascii=False).encode()
    client.deliver(body + b" \n")
    reply = client.get("/errors/1/payload", headers={"Accept": "text/html"})
    assert (reply.data, reply.mimetype) == (body + b" \n", "application/json")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    for path in ("/errors/1", "/errors", "/errors?format=ndjson", "/", "/issues"):
        data = client.get(path).data
        assert data.isascii() and data.endswith(b"\n") and data.count(b"\n") == 1, path


# Forms, and what is the same in all replies

READS = (
    "/ /config /metrics /health /errors /errors/latest /errors/1 /errors/1/payload /issues".split()
)
ACCEPTED = {
    "": "json", "*/*": "json", "application/json": "json", "image/png": "json", "application/*": "json",
    "text/plain": "text", "text/plain; charset=utf-8": "text", "text/markdown": "text", "TEXT/PLAIN": "text",
    "text/html, text/plain": "text", "text/markdown, text/html, */*": "text",
    "text/plain;q=0.5, application/json;q=0.4": "text", "text/plain;q=0.5, text/html": "html",
    "text/html;q=0.1, */*;q=0": "html", "text/html;q=0": "json",
    "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8": "html", ";;;q=,*/q=nan;,\xff": "json",
}  # fmt: skip


def test_the_form_is_the_one_that_is_preferred_or_asked_for(client):
    client.deliver(issue_event(1, 9))
    for path in ("/errors/1", "/errors/latest", "/errors", "/issues"):
        for accept, form in ACCEPTED.items():
            reply = client.get(path, headers={"Accept": accept})
            assert (reply.status_code, reply.mimetype) == (200, TYPES[form]), accept
            assert {"Accept", "Authorization"} <= set(re.split(", *", reply.headers["Vary"]))
        for form, mimetype in TYPES.items():
            reply = client.get(f"{path}?format={form}", headers={"Accept": "image/png"})
            assert (reply.status_code, reply.mimetype) == (200, mimetype)
        reply = client.get(f"{path}?format=atom")
        assert (reply.status_code, list(reply.json)) == (400, ["error"])
    reply = client.get("/errors", headers={"Accept": "application/x-ndjson"})
    assert reply.mimetype == "application/x-ndjson"
    assert client.get("/", headers={"Accept": "text/html"}).mimetype == "text/html"
    for accept, form in ACCEPTED.items():  # of what is wrong only browsers get a page
        mimetype = client.get("/nowhere", headers={"Accept": accept}).mimetype
        assert mimetype == TYPES["html" if form == "html" else "json"], accept


def test_a_trailing_slash_reads_the_same_and_head_like_get(client):
    client.deliver(issue_event(1, 9))
    for path in READS:
        whole = client.get(path)
        assert whole.status_code == 200, path
        assert client.get(f"{path.rstrip('/')}/").mimetype == whole.mimetype
        head = client.head(path)
        assert (head.status_code, head.data) == (200, b"")
        assert head.headers["Content-Type"] == whole.headers["Content-Type"]
        if path.startswith(("/errors", "/issues")):
            assert client.get(f"{path}/").data == whole.data
            assert head.headers["Content-Length"] == str(len(whole.data))
    for path in ("//errors", "/sentry//webhook", "/errors/latest//", "/sentry/webhook//"):
        for method in ("GET", "POST"):
            status = client.open(method=method, environ_overrides={"PATH_INFO": path}).status_code
            assert not 300 <= status < 400, path


def test_who_has_a_reply_already_is_told_so(client):
    client.deliver(issue_event(1, 9))
    tags = set()
    contents = set()
    paths = "/errors/1 /errors/1?format=text /errors/1/payload /errors/latest?format=text /errors /issues".split()
    for path in [*paths, "/errors?format=text", "/errors?limit=1", "/errors?after=0"]:
        reply = client.get(path)
        tag = reply.headers["ETag"]
        tags.add(tag)
        contents.add((reply.data, reply.headers.get("Link")))
        for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
            again = client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.data, again.headers["ETag"]) == (304, b"", tag), path
        assert client.get(path, headers={"If-None-Match": '"other"'}).data == reply.data
    assert len(tags) == len(contents)
    assert "ETag" not in client.get("/errors?format=ndjson").headers


def test_the_tag_changes_with_the_reply_and_its_link(client):
    client.deliver(issue_event(1, 9))
    paths = "/errors/latest /errors /errors?format=text /errors?after=0 /issues /errors/1".split()
    before = [client.get(path) for path in paths]
    client.deliver(issue_event(2, 9))
    for path, old in zip(paths, before, strict=True):
        new = client.get(path, headers={"If-None-Match": old.headers["ETag"]})
        assert new.status_code == 200 and new.data != old.data, path
    one = client.get("/errors?after=1")
    other = client.get("/errors?after=1&limit=1")
    assert one.data == other.data and one.headers["ETag"] != other.headers["ETag"]


FAULTS = [
    ("GET", "/nowhere", 404, "/"),
    ("GET", "/errors/1", 404, "no error 1"),
    ("GET", "/errors/" + "9" * 4000, 404, "no error"),
    ("GET", "/errors/1/payload", 404, "no error 1"),
    ("GET", "/errors/latest", 404, "No error"),
    ("GET", "/sentry/webhook", 405, "GET"),
    ("POST", "/errors", 405, "http://localhost/sentry/webhook"),
    ("POST", "/sentry/webhook", 400, "not JSON"),
    ("GET", "/errors?limit=1001", 400, "limit=|1 to 1000"),
    ("GET", "/errors?after=-1", 400, "after="),
    ("GET", "/errors?since=yesterday", 400, "since='yesterday'|ISO 8601"),
    ("GET", "/errors?until=5y", 400, "until='5y'|15m"),
    ("GET", "/errors?level=error&level=info", 400, "level|once"),
    ("GET", "/errors?level=error,loud", 400, "loud|fatal"),
    ("GET", "/errors?levle=error", 400, "'levle'|level"),
    ("GET", "/errors?" + "x" * 3000, 400, "unknown"),
    ("GET", "/errors?%F0%9F%8D%B5=%1B[31m", 400, "unknown"),
    ("GET", "/errors?format=xml", 400, "format='xml'|ndjson"),
    ("GET", "/errors?refresh=5", 400, "'refresh'"),
    ("GET", "/errors?q=" + "a+" * 11, 400, "q=|10 words"),
    ("GET", "/errors?q=" + "a" * 101, 400, "q=|100 characters"),
    ("GET", "/errors/latest?limit=5", 400, "'limit'"),
    ("GET", "/errors/1?level=error", 400, "'level'"),
    ("GET", "/errors/1/payload?format=text", 400, "format='text'|json"),
    ("GET", "/config?format=html", 400, "format='html'|json"),
    ("GET", "/issues?environment=x", 400, "'environment'"),
    ("GET", "/?format=text", 400, "format='text'|html"),
]


def test_every_failure_has_one_shape_and_says_what_to_do(client):
    for method, path, status, words in FAULTS:
        place, _, query = path.partition("?")
        call = {
            "method": method,
            "query_string": query,
            "environ_overrides": {"CONTENT_LENGTH": "0"},
        }
        reply = client.open(place, **call)
        assert (reply.status_code, reply.mimetype) == (status, "application/json"), path
        assert list(reply.json) == ["error"], path
        assert [word for word in words.split("|") if word not in reply.json["error"]] == [], path
        assert len(reply.data) <= 1024 and reply.data.isascii()
        assert ("Allow" in reply.headers) == (status == 405)
        page = client.open(place, headers={"Accept": "text/html"}, **call)
        assert (page.status_code, page.mimetype) == (status, "text/html"), path
        assert "\x1b" not in page.text and 'role="alert"' in page.text
        assert [word for word in words.split("|") if word not in unescape(page.text)] == [], path
    reply = client.post("/x", headers={"Host": "a." * 2000})  # which the reply names
    assert (reply.status_code, list(reply.json)) == (404, ["error"]) and len(reply.data) <= 1024


def test_an_error_that_cannot_be_read_harms_no_other(app, path):
    client = app()
    client.deliver(event_payload(1))
    client.deliver(event_payload(2))
    write(path, "DELETE FROM bodies WHERE id = 1")
    for form in ("json", "text", "html"):
        reply = client.get(f"/errors/1?format={form}")
        assert reply.status_code == 404
    assert client.get("/errors/1/payload").status_code == 404
    exported = client.get("/errors?format=ndjson").text.splitlines()
    assert [json.loads(line)["id"] for line in exported] == [2]
    assert client.errors() == [2, 1]


TOKEN = "t0ken=of-readers"


def basic(password, user="anybody"):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


KNOWING = [f"Bearer {TOKEN}", f"bearer {TOKEN}", basic(TOKEN), basic(TOKEN, "")]
NOT_KNOWING = [
    None, "", TOKEN, f"Token {TOKEN}", "Bearer", "Bearer ", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x", "Bearer \xe9", basic("wrong"), basic("x", TOKEN), basic(""), "Basic", "Basic %%%",
    "Basic " + base64.b64encode(b"\xff\xfe").decode(), "Basic " + base64.b64encode(TOKEN.encode()).decode(),
]  # fmt: skip


def test_who_knows_the_token_reads_and_nobody_else(app, log):
    client = app(API_TOKEN=TOKEN, SENTRY_CLIENT_SECRET=SECRET)
    body = wire(issue_event(1, 9))
    assert client.deliver(body, **sign(body)).status_code == 201
    guarded = [path for path in READS if path != "/health"]
    for path in [*guarded, "/errors?format=ndjson", "/errors/1?format=html"]:
        for words in KNOWING:
            assert client.get(path, headers={"Authorization": words}).status_code == 200
        for words in NOT_KNOWING:
            reply = client.get(path, headers={} if words is None else {"Authorization": words})
            assert reply.status_code == 401, (path, words)
            assert reply.headers["WWW-Authenticate"].startswith("Basic realm=")
            assert "API_TOKEN" in reply.text and "Bearer" in reply.text
            assert TOKEN not in reply.text
    assert client.get("/health").json == {"status": "ok"}
    assert "API_TOKEN, from 127.0.0.1" in " ".join(log())


def test_every_reply_has_the_headers_that_keep_it_harmless(app):
    client = app(API_TOKEN="t0ken")
    replies = [client.deliver(event_payload()), client.deliver(b"["), client.get("/errors")]
    token = {"Authorization": "Bearer t0ken"}
    for path in [*READS, "/nowhere", "/errors?x=1", "/errors?format=ndjson", "/?format=html"]:
        replies.append(client.get(path, headers=token))
    for reply in replies:
        assert reply.headers["X-Robots-Tag"] == "noindex"
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert reply.headers["Content-Security-Policy"].startswith(
            "default-src 'none'; style-src 'sha256-"
        )
        assert reply.headers["Referrer-Policy"] == "no-referrer"
        assert "private" in reply.headers["Cache-Control"]
        assert "Access-Control-Allow-Origin" not in reply.headers


HOSTS = {
    "localhost": 200, "localhost:8000": 200, "LOCALHOST": 200, "a_b": 200, "a_b:8000": 200,
    "x.errors.example.com": 200, "evil.example": 400, "localhost.evil.example": 400,
    "a_b.evil.example": 400, "x_a_b": 400, "": 400,
}  # fmt: skip


def test_reads_need_a_trusted_host_and_webhooks_and_health_do_not(app):
    client = app(TRUSTED_HOSTS="localhost, a_b, .errors.example.com")
    for host, status in HOSTS.items():
        # What a proxy adds is nothing that a page could not say after DNS rebinding.
        environ = {"HTTP_HOST": host, "HTTP_X_FORWARDED_HOST": "localhost"}
        for path in ("/", "/errors", "/config", "/issues?format=html"):
            assert client.get(path, environ_overrides=environ).status_code == status, (host, path)
        assert client.get("/health", environ_overrides=environ).status_code == 200
        body = wire(event_payload(host))
        stored = client.post("/sentry/webhook", data=body, environ_overrides=environ)
        assert stored.status_code == 201


# What the service is


def test_the_overview_says_what_this_is_and_what_it_holds(client):
    empty = client.get("/").json
    assert empty["counts"] == {"errors": 0, "spooled": 0}
    assert (empty["newest"], empty["oldest"]) == (None, None)
    assert empty["connect"]["webhook_url"] == "http://localhost/sentry/webhook"
    for number in range(3):
        client.deliver(event_payload(number))
    about = client.get("/").json
    errors = client.get("/errors").json
    assert about["name"] and about["version"] == client.get("/config").json["version"]
    assert about["counts"] == {"errors": 3, "spooled": 0}
    assert (about["newest"], about["oldest"]) == (errors[0], errors[2])
    assert about["database_bytes"] > 0
    assert "hours" not in about
    paths = {name.split()[1].replace("<id>", "1") for name in about["endpoints"]}
    assert paths == {*READS, "/sentry/webhook"}
    assert all(about["endpoints"].values())


def test_the_configuration_is_shown_without_secrets(app, tmp_path):
    dsn = "http://0123key@127.0.0.1:9/1"
    client = app(
        SENTRY_CLIENT_SECRET=f"{SECRET},an0ther", API_TOKEN=TOKEN, SENTRY_DSN=dsn, PORT="8123",
        SENTRY_ACTIONS="created,triggered", RETENTION_DAYS="30", TRUSTED_HOSTS="localhost",
    )  # fmt: skip
    token = {"Authorization": f"Bearer {TOKEN}"}
    config = client.get("/config", headers=token).json
    expected = {
        "sentry_dsn_set": True, "sentry_client_secret_set": True, "api_token_set": True,
        "sentry_actions": ["created", "triggered"], "retention_days": 30, "port": 8123,
        "database_path": f"{tmp_path}/data/errors.db", "spooled": 0, "problem": None,
        "trusted_hosts": ["localhost"], "max_body_bytes": 5 * 1024 * 1024, "web_concurrency": 4,
        "deliveries": [], "last_delivery_at": None,
    }  # fmt: skip
    assert expected.items() <= config.items()
    assert config["journal_mode"] in ("WAL", "PERSIST")
    for path in ("/", "/config", "/metrics", "/?format=html"):
        text = client.get(path, headers=token).text
        assert not [word for word in (SECRET, "an0ther", TOKEN, "0123key") if word in text]


def metrics(client):
    """Return the samples of /metrics as a dict, their types checked."""
    reply = client.get("/metrics")
    assert reply.content_type == "text/plain; version=0.0.4; charset=utf-8"
    types = re.findall(r"^# TYPE (\S+) (?:counter|gauge)$", reply.text, re.MULTILINE)
    samples = dict(re.findall(r"^([a-z]\w*(?:{.*})?) (\S+)$", reply.text, re.MULTILINE))
    assert len(set(types)) == len(types)
    assert {name.partition("{")[0] for name in samples} <= set(types)
    assert reply.text.count("\n") == len(samples) + reply.text.count("\n#") + 1
    return {name.removeprefix("collector_"): float(value) for name, value in samples.items()}


def test_the_metrics_count_and_health_says_what_happens_to_a_delivery(app, tmp_path):
    client = app()
    for payload in (event_payload(1), event_payload(2), event_payload(2), b"no JSON"):
        client.deliver(payload)
    assert counts(client)["stored", None] == 2
    shown = metrics(client)
    assert abs(shown.pop("last_delivery_timestamp_seconds") - time.time()) < 60
    assert shown.pop("database_bytes") > 0
    assert shown == {
        'deliveries_total{outcome="stored",reason=""}': 2,
        'deliveries_total{outcome="duplicate",reason=""}': 1,
        'deliveries_total{outcome="refused",reason="not JSON"}': 1,
        "errors": 2, "spooled": 0, "writable": 1,
    }  # fmt: skip
    assert client.get("/health").json == {"status": "ok"}
    with locked(tmp_path / "data" / "errors.db"):
        assert client.deliver(event_payload(3)).json == {"status": "queued"}
        health = client.get("/health")
        assert (health.status_code, health.json["status"]) == (200, "spooling")
        assert health.json["spooled"] == 1 and "lock" in health.json["problem"]
        shown = metrics(client)
        assert (shown["writable"], shown["spooled"], shown["errors"]) == (0, 1, 2)
        assert client.get("/").json["counts"] == {"errors": 2, "spooled": 1}
        assert client.errors() == [2, 1]


PLACES = [
    ({}, {}, "", "http://localhost"),
    ({}, {"HTTP_HOST": ""}, "", "http://localhost"),
    ({}, {"HTTP_HOST": "collector_1:8000"}, "", "http://collector_1:8000"),
    ({}, {"HTTP_HOST": "a.example", "HTTP_X_FORWARDED_PROTO": "https"}, "", "https://a.example"),
    ({}, {"HTTP_X_FORWARDED_PROTO": "http, HTTPS"}, "", "https://localhost"),
    ({}, {"HTTP_X_FORWARDED_PROTO": "https, javascript"}, "", "http://localhost"),
    ({}, {"HTTP_X_FORWARDED_HOST": "evil.example"}, "", "http://localhost"),
    ({}, {"SCRIPT_NAME": "/below"}, "/below", "http://localhost/below"),
    ({"PUBLIC_URL": "https://e.example/below/"}, {"HTTP_HOST": "inside:8000"}, *["https://e.example/below"] * 2),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "environ", "base", "whole"), PLACES, ids=range(len(PLACES)))
def test_every_address_leads_to_where_the_service_is(app, settings, environ, base, whole):
    client = app(**settings)

    def get(path, **headers):
        return client.get(path, headers=headers, environ_overrides=environ)

    for number in (1, 2):
        body = wire(issue_event(number, 9))
        stored = client.post("/sentry/webhook", data=body, environ_overrides=environ)
    assert stored.json["url"] == stored.headers["Location"] == f"{base}/errors/2"
    page = get("/errors?limit=1")
    assert page.headers["Link"] == f'<{base}/errors?limit=1&before=2>; rel="next"'
    assert page.json[0]["url"] == f"{base}/errors/2"
    assert get("/issues").json[0]["url"] == f"{base}/errors?issue=9&server=sentry.io"
    assert f"\nurl: {whole}/errors/2\n" in get("/errors/2?format=text").text
    more = get("/errors?limit=1&format=text").text.splitlines()[-1]
    assert more.startswith(f"next: {whole}/errors?")
    assert get("/").json["connect"]["webhook_url"] == f"{whole}/sentry/webhook"
    wrong = client.post("/x", environ_overrides=environ).json["error"]
    assert f"{whole}/sentry/webhook" in wrong

    found = set()
    for path in ("/errors?limit=1", "/issues", "/errors/2", "/errors/latest", "/", "/nowhere"):
        html = get(path, Accept="text/html").text
        found |= set(re.findall(r'(?:href|action)="([^"]*)"', html))
    outside = ("#", "data:", "https://tea.sentry.io", whole if "?" in whole else "mailto:")
    found = {url.replace("&amp;", "&") for url in found if not url.startswith(outside)}
    assert len(found) > 8
    for url in found:
        assert url.startswith(f"{base}/"), url
        assert get(url.removeprefix(base)).status_code == 200, url


# Filters and search

SEEDS = [
    # project, level, environment, platform, issue, title, culprit, message
    ("shop", "error", "production", "python", "10", "KeyError: 'price'", "shop.views in checkout", "no price"),
    ("shop", "fatal", "production", "python", "10", "KeyError: 'price'", "shop.views in checkout", "no price"),
    ("shop", "error", "staging", "python", "11", "TimeoutError: supplier", "shop.tasks in restock", "too slow"),
    ("front", "error", "production", "javascript", "12", "TypeError: cup is null", "static/teas", ""),
    ("front", "warning", "prüf stand", "javascript", "13", "Kännchen übergelaufen 抹茶", None, "100% \"voll\""),
    (None, None, None, None, None, "level project error", "a OR b", "NEAR AND NOT"),
    ("shop-eu", "error", "production", "python", "14", "supplierless price_tag", None, "x"),
]  # fmt: skip
SEED_KEYS = "level environment platform issue_id title culprit message".split()


def seed(client):
    """Post seven errors that differ."""
    for number, (slug, *values) in enumerate(SEEDS, 1):
        event = dict(zip(SEED_KEYS, values, strict=True)) | {"event_id": f"{number:032x}"}
        event["release"] = f"tea@{number % 2}"
        if number == 1:
            event["exception"] = {"values": [{"type": "KeyError", "value": "50% off"}]}
        issue = {"project": {"id": str(number % 3), "slug": slug}, "shortId": f"TEA-{values[3]}"}
        if number == 4:
            issue["issueCategory"] = "performance"
            event["web_url"] = "https://sentry.example.org/issues/12/"
        payload = {"action": "created", "data": {"error": event, "issue": issue if slug else {}}}
        assert client.deliver(payload).status_code == 201


@pytest.fixture(scope="module")
def seeded(tmp_path_factory):
    """Return a client that several tests read from, so it must stay as it is."""
    client = make_client(tmp_path_factory.mktemp("seeded"))
    seed(client)
    yield client
    core(client).close()


ALL = [7, 6, 5, 4, 3, 2, 1]
LISTS = {
    "": ALL, "project=shop": [3, 2, 1], "project=sho": [], "project=Shop": [], "project=1": [7, 4, 1], "project=": ALL,
    "level=error": [7, 4, 3, 1], "level=fatal,warning": [5, 2], "environment=production": [7, 4, 2, 1],
    "environment=pr%C3%BCf+stand": [5], "platform=javascript": [5, 4], "release=tea@1": [7, 5, 3, 1],
    "category=performance": [4], "category=error": [7, 6, 5, 3, 2, 1], "server=sentry.example.org": [4],
    f"event={3:032x}": [3], f"q={3:032x}": [3], "q=00000000-0000-0000-0000-000000000003": [3], "event=3": [],
    "issue=10": [2, 1], "issue=TEA-10": [2, 1], "issue=1": [], "issue=12&server=sentry.example.org": [4],
    "issue=12&server=sentry.io": [], f"event={3:032x}&level=fatal": [], "issue=10&level=fatal": [2],
    "project=shop&level=error&environment=production&platform=python&issue=10": [1],
    "project=shop&platform=javascript": [],
    # words: also inside words, in title, message, culprit or exception, upper and lower case alike
    "q=pric": [7, 2, 1], "q=rice": [7, 2, 1], "q=PRICE+keyerror": [2, 1], "q=checkout": [2, 1], "q=supplierless+x": [7],
    "q=supp+slow": [3], "q=slow+supp": [3], "q=%E8%8C%B6": [5], "q=production": [], "q=OR": [6, 4, 3, 2, 1],
    "q=NEAR": [6], "q=%22voll%22": [5], "q=100%25": [5], "q=%25": [5, 1], "q=50%25+off": [1], "q=_": [7], "q=%5C": [],
    "q=e_t": [7], "q=e%25t": [], "q=price&level=fatal": [2], "q=price&project=shop&limit=1": [2],
    # pages
    "limit=2": [7, 6], "before=3": [2, 1], "after=5": [6, 7], "after=0&limit=3": [1, 2, 3], "after=7": [],
    "after=2&before=5": [3, 4], "before=4&level=error": [3, 1], "after=1&q=price": [2, 7], "before=1": [],
    "before=99": ALL, "after=99": [],
}  # fmt: skip
ISSUES = {  # the newest errors of the issues
    "": [7, 5, 4, 3, 2], "limit=2": [7, 5], "before=5": [4, 3, 2], "project=shop": [3, 2], "project=1": [7, 4],
    "level=fatal,warning": [5, 2], "level=error": [7, 4, 3], "category=performance": [4],
    "server=sentry.example.org": [4], "issue=TEA-10": [2], "issue=11": [3], "issue=10": [2], "issue=99": [],
    "q=pric": [7, 2], "q=restock&project=shop": [3], f"q={2:032x}": [2], f"q={1:032x}": [], "since=1h": [7, 5, 4, 3, 2],
    "until=1h": [], "q=nothing": [],
}  # fmt: skip


def test_filters_narrow_every_form_of_the_list_and_the_latest(seeded):
    for query, expected in LISTS.items():
        assert seeded.errors(query) == expected, query
        lines = seeded.get(f"/errors?{query}&format=ndjson").text.splitlines()
        assert [json.loads(line)["id"] for line in lines] == expected, query
        text = seeded.get(f"/errors?{query}&format=text").text
        assert re.findall(r"^#(\d+) ", text, re.MULTILINE) == [*map(str, expected)], query
        page = seeded.get(f"/errors?{query}&format=html").text
        assert all(f'href="/errors/{id_}"' in page for id_ in expected), query
        if not re.search("before|after|limit", query):
            latest = seeded.get(f"/errors/latest?{query}")
            assert latest.status_code == (200 if expected else 404), query
            assert not expected or latest.json["id"] == expected[0]


def test_filters_narrow_every_form_of_the_issues(seeded):
    for query, expected in ISSUES.items():
        rows = seeded.get(f"/issues?{query}").json
        assert [row["newest"] for row in rows] == expected, query
        text = seeded.get(f"/issues?{query}&format=text").text
        assert len(re.findall(r"^#\d+ ", text, re.MULTILINE)) == len(expected), query
        page = seeded.get(f"/issues?{query}&format=html")
        assert page.status_code == 200


@pytest.mark.parametrize("text", [
    '"', '""', "*", "a AND", "(", "{a b}: c", "-", "\0", "\\", "%", "%_%", "[", ":", "+", "a" * 100, "\u0301",
    "price'; DROP TABLE errors; --", "\U0001f375", "\ud7ff\uffff", "<b>", "' OR 1=1 --", "a b c d e f g h i j",
])  # fmt: skip
def test_any_text_is_a_safe_query(seeded, text):
    for name in "q project environment platform release server category event issue".split():
        for path in ("/errors", "/errors/latest", "/issues"):
            for form in TYPES:
                reply = seeded.get(path, query_string={name: text, "format": form})
                is_unknown = (
                    path == "/issues" and name in "environment platform release event".split()
                )
                assert reply.status_code in ((400,) if is_unknown else (200, 404)), (path, name)
                assert "<b>" not in reply.text or form != "html"
    assert len(seeded.errors()) == 7


def test_a_period_is_of_the_times_of_receipt(app, path):
    client = app()
    seed(client)
    times = [hours_ago(hours) for hours in (24 * 30, 24 * 6, 30, 5, 3, 0.5, 0.1)]
    for number, at in enumerate(times, 1):
        write(path, "UPDATE errors SET received_at = ? WHERE id = ?", at, number)
    exact = quote(times[3])
    for query, expected in {
        "since=15m": [7], "since=24h": [7, 6, 5, 4], "since=7d": [7, 6, 5, 4, 3, 2], "since=1w": [7, 6, 5, 4, 3, 2],
        "since=999999d": ALL, f"since={time.time() - 3600:.0f}": [7, 6], "until=4h": [4, 3, 2, 1],
        "since=7d&until=1d": [3, 2], "since=1h&until=2h": [], "since=6h&project=front": [5, 4],
        "until=1h&q=price": [2, 1], "since=2999-01-01": [], "since=1999-01-01T00:00:00+02:00": ALL,
        "since=1999-01-01&until=2999-01-01T00:00:00%2B02:00": ALL, "since=1999-01-01T00:00:00z": ALL,
        "since=1999-01-01 00:00": ALL, "since=24h&after=4": [5, 6, 7], f"since={exact}&until={exact}": [4],
        "until=1999-01-01": [], "since=1h&limit=1": [7], "until=1h&limit=1": [5],
    }.items():  # fmt: skip
        assert client.errors(query) == expected, query
    # One that came in late has a higher id than some that were received after it.
    write(path, "UPDATE errors SET received_at = ? WHERE id = 7", hours_ago(29))
    assert client.errors("since=31h&until=4h") == [7, 4, 3]
    assert client.errors("since=1h") == [6]


def test_an_issue_has_every_key_and_its_address(client):
    payload = load("error.created.python")
    client.deliver(payload)
    payload["data"]["error"]["event_id"] = "2"
    client.deliver(payload)
    first = client.get("/errors/1").json
    second = client.get("/errors/2").json
    (row,) = client.get("/issues").json
    assert set(row) == set(ISSUE_KEYS)
    same = "issue_id short_id server project_id project_slug title culprit level category".split()
    assert row == {key: second[key] for key in same} | {
        "count": 2, "first_seen": first["received_at"], "last_seen": second["received_at"], "newest": 2,
        "url": "/errors?issue=5900000011&server=sentry.io",
    }  # fmt: skip
    assert client.errors(urlsplit(row["url"]).query) == [2, 1]


def test_a_short_id_is_looked_up_on_the_server_that_is_asked_for(client):
    for number, host in ((1, "a.example.com"), (2, "b.example.com")):
        payload = issue_event(number, number, host)
        payload["data"]["issue"] = {"shortId": "SHOP-1"}
        client.deliver(payload)
    assert client.errors("issue=SHOP-1&server=a.example.com") == [1]


def test_an_issue_of_two_servers_is_two_and_a_short_id_of_any_row_is_shown(client):
    client.deliver({"action": "created", "data": {"issue": {"id": "9", "shortId": "TEA-9", "web_url": "https://sentry.io/organizations/tea/issues/9/"}}})  # fmt: skip
    client.deliver(issue_event(1, 9))
    client.deliver(issue_event(2, 9, host="sentry.example"))
    shown = [(row["newest"], row["count"], row["short_id"]) for row in client.get("/issues").json]
    assert shown == [(3, 1, None), (2, 2, "TEA-9")]
    assert client.errors("issue=TEA-9&server=sentry.io") == [2, 1]
    assert client.errors("issue=9&server=sentry.example") == [3]
    assert client.errors("issue=9") == [3, 2, 1]


def test_the_link_leads_through_all_pages_once(client):
    for number in range(1, 26):
        level = "error" if number % 2 else "info"
        client.deliver(issue_event(number, number % 7, level=level, title=f"Tüte {number} & co"))
    everything = list(range(25, 0, -1))
    assert follow(client, "/errors") == [everything]
    by_tens = [everything[:10], everything[10:20], everything[20:]]
    assert follow(client, "/errors?limit=10") == by_tens
    for query in ("level=error", "level=error&q=t%C3%BCte+%26+co", "level=error&since=1h"):
        pages = follow(client, f"/errors?{query}&limit=5")
        assert [*chain(*pages)] == everything[::2], query
        assert max(map(len, pages)) == 5
    assert [*chain(*follow(client, "/issues?limit=3", "issue_id"))] == list("4321065")
    assert [*chain(*follow(client, "/issues?limit=3&level=info", "issue_id"))] == list("316")
    # A poller that remembers the last id and one that follows Link see each once.
    link = next_of(client.get("/errors?after=0&limit=10&level=error"))
    assert "after=19" in link
    reply = client.get(link)
    assert [row["id"] for row in reply.json] == [21, 23, 25]
    link = next_of(reply)
    assert client.get(link).json == []
    assert next_of(client.get(link)) == link
    client.deliver(event_payload(26))
    client.deliver(event_payload(27))
    assert [row["id"] for row in client.get(link).json] == [26, 27]
    assert client.errors("after=25&limit=1") == [26]


def test_pages_have_their_sizes_and_stay_what_they_are_while_errors_come_in(client):
    for number in range(280):
        client.deliver(issue_event(number, number))
    assert [len(page) for page in follow(client, "/errors")] == [100, 100, 80]
    assert [len(page) for page in follow(client, "/issues?limit=1000", "newest")] == [280]
    for path in ("/errors", "/issues"):
        for query, most in (("", 50), ("&limit=1000", 250)):
            page = client.get(f"{path}?format=html{query}")
            assert len(set(re.findall(r'href="/errors/(\d+)"', page.text))) == most, path
    before = client.get("/errors?before=4&limit=2").data
    client.deliver(event_payload("late"))
    assert client.get("/errors?before=4&limit=2").data == before


def test_a_page_of_long_texts_is_bounded_and_leads_to_the_rest(client):
    text = "字" * 8000
    exception = {"values": [{"type": text, "value": text}]}
    for number in range(1, 61):
        client.deliver(issue_event(number, number, title=text, culprit=text, message=text, exception=exception))  # fmt: skip
    for path, key in (("/errors?limit=1000", "id"), ("/issues?limit=1000", "newest")):
        reply = client.get(path)
        assert len(reply.data) < 8 * 1024 * 1024
        assert [*chain(*follow(client, path, key))] == list(range(60, 0, -1))
    assert [*chain(*follow(client, "/errors?limit=1000&after=0"))] == list(range(1, 61))


def test_a_search_that_takes_long_replies_with_a_part_and_goes_on(client, path):
    client.deliver(event_payload("first", title="a" * 98 + "b"))
    columns = "title, message, culprit, exception_type, exception_value"
    sql = f"""WITH RECURSIVE given (at, text, most) AS (VALUES (?, ?, ?)), numbers (n) AS
        (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < (SELECT most FROM given))
        INSERT INTO errors (received_at, timestamp, identity, issue_id, {columns})
        SELECT at, at, most || n, n, text, text, text, text, text FROM numbers, given"""
    write(path, sql, hours_ago(0), "a" * 8000, 1000)
    write(path, sql, hours_ago(0), "short", 20_000)  # which let a walk take large steps
    query = f"q={'a' * 98}b"
    for place in (f"/errors?{query}&after=1", f"/issues?{query}"):
        reply = client.get(place)
        assert (reply.status_code, reply.json) == (200, [])
        assert 1 < int(re.search(r"(?:before|after)=(\d+)", next_of(reply))[1]) < 21_001, place
    text = client.get(f"/errors?{query}&format=text").text
    lines = text.splitlines()
    assert lines[:-1] == ["no errors"] and lines[-1].startswith("next: http://localhost/errors?")
    assert 1 < int(re.search(r"before=(\d+)", lines[-1])[1]) < 21_001
    assert "before=" in client.get(f"/errors?{query}&format=html").text
    assert [*chain(*follow(client, f"/errors?{query}&before=80"))] == [1]
    latest = client.get(f"/errors/latest?{query}")
    assert latest.status_code == 503 and "since=24h" in latest.json["error"]
    assert int(latest.headers["Retry-After"]) > 0
    lines = client.get(f"/errors?{query}&format=ndjson&before=80").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == [1]


def test_an_export_has_every_error_in_full_a_line_each(client, path):
    for number in range(1, 231):
        level = "info" if number % 10 else "error"
        client.deliver(issue_event(number, number % 3, level=level, tags=[["a", "x" * 2000]]))
    lines = client.get("/errors?format=ndjson").text.splitlines()
    assert [json.loads(line)["id"] for line in lines] == list(range(230, 0, -1))
    for id_ in (230, 77, 1):
        assert json.loads(lines[230 - id_]) == client.get(f"/errors/{id_}").json
    for query, count in {"limit=150": 150, "limit=7": 7, "level=error": 23, "q=no+x": 0}.items():
        assert len(client.get(f"/errors?format=ndjson&{query}").text.splitlines()) == count
    # It goes on while errors come and go, and a client that leaves half way harms nobody.
    reply = client.get("/errors?format=ndjson", buffered=False)
    assert reply.is_streamed
    parts = reply.iter_encoded()
    text = next(parts)
    assert len(text) < 200_000
    write(path, "DELETE FROM errors WHERE id <= 20")
    client.deliver(event_payload("late"))
    text += b"".join(parts)
    assert [json.loads(line)["id"] for line in text.splitlines()] == list(range(230, 20, -1))
    left = client.get("/errors?format=ndjson&after=0", buffered=False)
    next(left.iter_encoded())
    left.close()
    assert client.deliver(event_payload("after")).status_code == 201
    oldest_first = client.get("/errors?format=ndjson&after=0").text.splitlines()
    assert [json.loads(line)["id"] for line in oldest_first] == list(range(21, 233))


def text_of(client, payload):
    """Post a payload; return its text form, which is short and whose margin is ours."""
    id_ = client.deliver(payload).json["id"]
    reply = client.get(f"/errors/{id_}", headers={"Accept": "text/plain"})
    assert (reply.status_code, reply.content_type) == (200, "text/plain; charset=utf-8")
    text = reply.text
    assert len(text) <= 8000 and text.endswith("\n")
    head, *sections = text.removesuffix("\n").split("\n\n")
    lines = head.split("\n")
    assert lines[0] == f"error: {id_}" and f"url: http://localhost/errors/{id_}" in lines
    keys = [re.fullmatch(r"([a-z][A-Za-z ]{2,20}): \S.*", line)[1] for line in lines]
    assert len(set(keys)) == len(keys)
    if sections and sections[-1].startswith("left out: "):
        assert sections.pop().endswith(f"http://localhost/errors/{id_}/payload")
    for section in sections:
        name, *rest = section.split("\n")
        assert re.fullmatch(r"[a-zA-Z][a-zA-Z ]*( \([a-z ,]+\))*:", name), section
        assert rest and all(line.startswith("  ") for line in rest), section
    return text


WORDS = [
    "x\n\nerror: 99\ntitle: evil", "\r\rerror: 99", "\u2028error: 99\u2029error: 99\x0b\x0c\x85error: 99",
    "\x1b[2J\x1b]0;x\x07\x1b[31mred", "left out: nothing; \nurl: evil", "\n\nrequest:\n  x", "\u202eevil\u2066",
    "h\u00ad\u200b\ufe0f\U000e0001\u115f\u3164\u2800idden\ue000\ufeff", "\n\nstacktrace:\n  x", "\u2028title: x\u202e\0",
    "x" * 9000, "\ud83c", "<script>alert(1)</script>", "{{ 7 * 7 }}", "%s%n{0}", "https://user:password@sentry.io/issues/1/",
]  # fmt: skip
HIDDEN = (
    "[\0-\x09\x0b-\x1f\x7f-\x9f\xad\u034f\u115f\u17b4\u180b\u2028-\u202e\u200b\u2066-\u2069\u2800\u3164"
    "\ufeff\uffa0\ue000\uffff\U000e0000-\U000e01ef]"
)


def test_no_words_of_an_error_pass_for_ours_or_move_a_cursor(client):
    for number, words in enumerate(WORDS, 1):
        both = {words: words}
        frame = dict.fromkeys(("filename", "function", "context_line"), words)
        frame |= {"lineno": 1, "in_app": True, "vars": both}
        exception = {"type": words, "value": words, "stacktrace": {"frames": [frame] * 9}}
        scalars = "title message culprit level release environment logger".split()
        event = dict.fromkeys(scalars, words) | {"exception": {"values": [exception] * 3}}
        event |= {"tags": [[words, words]], "extra": both, "contexts": {words: both}, "user": both}
        event["request"] = dict.fromkeys(("url", "method", "data"), words)
        event["breadcrumbs"] = [{"message": words, "category": words}] * 30
        text = text_of(client, issue_event(number, number, **event))
        listed = client.get("/errors?format=text&limit=1").text
        listed += client.get("/issues?format=text&limit=1").text
        assert re.fullmatch(r"(#\d+ [^\n]*\n(next: [^\n]*\n)?){2}", listed)
        assert not re.search(HIDDEN, text + listed), words
        assert "[31m" not in text and "[2J" not in text
        assert text.count("\nerror: 99") == 0
