"""The webhook: what is stored, what is ignored, what is refused, and what the sender is told."""

import io
import json
from collections import Counter

import pytest
from conftest import SECRET, core, count_rows, counts, event_payload, load, post, sign, wire
from gunicorn.http.errors import InvalidChunkSize, NoMoreData
from test_parsing import BAD_BODIES, NO_ERRORS, SAMPLES
from werkzeug.test import EnvironBuilder, run_wsgi_app

import collector

READS = [
    "/errors/{}",
    "/errors/{}?format=text",
    "/errors/{}?format=html",
    "/errors/{}/payload",
    "/errors/latest",
    "/errors",
    "/errors?format=text",
    "/errors?format=html",
    "/errors?format=ndjson",
    "/",
    "/?format=html",
]


def check_refused(app, reply, status, *words):
    """Fail unless a delivery was refused in the one shape of errors, with words, and left no row."""
    assert reply.status_code == status
    assert reply.mimetype == "application/json"
    assert list(reply.json) == ["error"]
    assert len(reply.data) <= 1024
    assert [word for word in words if word not in reply.json["error"]] == []
    assert count_rows(app) == 0


def post_bytes(client, body, **headers):
    """Post bytes; the test client would send no Content-Length with none of them."""
    environ = {"CONTENT_LENGTH": str(len(body))}
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/sentry/webhook", data=body, headers=headers, environ_overrides=environ)


def check_readable(client, id_):
    """Fail unless an error can be read back in every form; return it as JSON."""
    for path in READS:
        reply = client.get(path.format(id_))
        assert reply.status_code == 200, (path, reply.data)
        reply.data.decode()
    return client.get(f"/errors/{id_}").json


def deliveries(log):
    """Return the lines of the log about deliveries."""
    return [line for line in log() if line.startswith("webhook ")]


# --------------------------------------------------------------------------------------------------
# The answers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/sentry/webhook", "/sentry/webhook/"])
def test_a_new_error_is_stored_and_known_when_it_comes_again(app, client, path):
    first = client.post(path, data=wire(event_payload()))
    assert (first.status_code, first.headers["Location"]) == (201, "/errors/1")
    assert first.json == {"status": "stored", "id": 1, "url": "/errors/1"}
    again = client.post(path, data=wire(event_payload(title="another")))
    assert (again.status_code, again.json) == (
        200,
        {"status": "duplicate", "id": 1, "url": "/errors/1"},
    )
    assert "Location" not in again.headers
    assert count_rows(app) == 1


@pytest.mark.parametrize("name", SAMPLES)
def test_every_sample_that_is_an_error_is_stored_and_can_be_read(make_app, name):
    app = make_app(SENTRY_ACTIONS="created,triggered")
    client = app.test_client()
    reply = post(client, load(name), Sentry_Hook_Resource=name.split(".")[0])
    assert (reply.status_code, reply.json["status"]) == (201, "stored")
    assert check_readable(client, 1)["resource"] == name.split(".")[0]
    assert count_rows(app) == 1


@pytest.mark.parametrize("name", NO_ERRORS)
def test_a_delivery_that_is_no_error_is_ignored_whatever_is_accepted(make_app, name):
    app = make_app(SENTRY_ACTIONS="created,triggered,unresolved")
    reply = post(app.test_client(), load(name), Sentry_Hook_Resource=name.split(".")[0])
    assert (reply.status_code, reply.json["status"], list(reply.json)) == (
        200,
        "ignored",
        ["status", "reason"],
    )
    assert "holds no new error" in reply.json["reason"]
    assert f"resource {name.split('.')[0]} " in reply.json["reason"]
    assert load(name)["action"] in reply.json["reason"]
    assert count_rows(app) == 0


IGNORED = [
    (load("event_alert.triggered.javascript"), "SENTRY_ACTIONS=created,triggered takes it"),
    (
        {"action": "unresolved", "data": {"error": {"event_id": "1"}}},
        "'unresolved' is not in SENTRY_ACTIONS; SENTRY_ACTIONS=created,unresolved takes it",
    ),
    ({"action": "resolved", "data": {"error": {"event_id": "1"}}}, "not in SENTRY_ACTIONS"),
    ({"action": "created", "data": {"unheard_of": {}}}, "no new error"),
    ({"action": "created", "data": None}, "no new error"),
    ({"action": "created"}, "no new error"),
    ({"action": "size_analysis_completed", "data": {"buildId": "1"}}, "no new error"),
    (
        {"action": "triggered", "data": {"issue": {"id": "1"}, "activity": {}, "alert": {}}},
        "no new error",
    ),
    ({"action": "e\u0301" * 5000, "data": {}}, "no new error"),
    ({"action": "\ud800\0\n", "data": {}}, "no new error"),
]


@pytest.mark.parametrize(("payload", "words"), IGNORED, ids=range(len(IGNORED)))
def test_what_is_not_accepted_is_ignored_with_a_reason(app, client, payload, words):
    reply = post(client, payload)
    assert (reply.status_code, reply.json["status"]) == (200, "ignored")
    assert words in reply.json["reason"]
    assert len(reply.data) < 300
    assert count_rows(app) == 0


def test_the_operator_says_which_actions_are_taken(make_app):
    app = make_app(SENTRY_ACTIONS=" triggered , unresolved ")
    client = app.test_client()
    assert post(client, event_payload()).json == {
        "status": "ignored",
        "reason": "action 'created' is not in SENTRY_ACTIONS; "
        "SENTRY_ACTIONS=triggered,unresolved,created takes it",
    }
    assert post(client, load("event_alert.triggered.javascript")).status_code == 201
    assert post(client, {"action": "unresolved", "data": {"event": {}}}).status_code == 201
    assert post(client, load("legacy_plugin")).status_code == 201
    assert count_rows(app) == 3


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; x",
        "é",
    ],
)
def test_a_body_is_read_whatever_its_type(app, client, content_type):
    body = wire(event_payload())
    assert client.post("/sentry/webhook", data=body, content_type=content_type).status_code == 201
    assert client.get("/errors/1/payload").data == body


def test_json_may_be_written_in_any_way(app, client):
    text = json.dumps(event_payload(title="Tüte ☕ \U0001f375"), ensure_ascii=False, indent="\t")
    assert post(client, f"\r\n {text}\n".encode()).status_code == 201
    assert client.get("/errors/1").json["title"] == "Tüte ☕ \U0001f375"


# --------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_delivery_are_refused_and_counted(app, client):
    for body, _, words in BAD_BODIES:
        check_refused(app, post_bytes(client, body), 400, words)
    reasons = Counter(("refused", reason) for _, reason, _ in BAD_BODIES)
    assert counts(client) == reasons


SURVIVABLE = [
    event_payload(
        title="\ud800 lone",
        culprit="\udfff",
        tags=[["\ud800", "\udc00"]],
        extra={"\udfff": "\ud800"},
    ),
    event_payload("\ud800", title="NUL \0 in it", level="\0"),
    event_payload(2**64, issue_id=2**70, project=2**63, timestamp=2**65, received=-(2**70)),
    event_payload(
        -1,
        timestamp=10**400,
        exception={"values": [{"stacktrace": {"frames": [{"lineno": 2**63}]}}]},
    ),
    event_payload(
        [],
        title=["a", "list"],
        message=[],
        culprit=[[]],
        level=["error"],
        platform=[1],
        release=["x"],
    ),
    event_payload(
        {},
        title={},
        message={"a": 1},
        environment=[None],
        logger=5,
        tags={"level": ["x"]},
        metadata=[],
    ),
    event_payload(
        True, title=False, exception=[], breadcrumbs="none", request=[], threads={"values": {}}
    ),
    event_payload(
        exception={
            "values": [{"type": [], "value": {}, "module": 5, "mechanism": "x", "stacktrace": "y"}]
        }
    ),
    event_payload(exception={"values": [None, 5, {"mechanism": {"type": {}, "handled": "no"}}]}),
    event_payload(
        breadcrumbs={
            "values": [{"timestamp": "x", "message": ["a"], "data": {"\ud800": float("inf")}}]
        }
    ),
    event_payload(timestamp=-62135596800, datetime="0001-01-01T00:00:00Z"),
    event_payload(timestamp=253402300799.999, web_url="javascript:alert(1)"),
    event_payload(
        contexts={"a": [{"b": 1e308}]},
        title="x" * 300_000,
        tags=[[str(number), "v" * 500] for number in range(500)],
    ),
    {
        "action": "created",
        "data": {"issue": {"id": ["7"], "project": "slug", "metadata": 5, "shortId": {}}},
    },
    {"action": "created", "data": {"event": {}, "issue": [], "project": ["x"]}},
    {
        "action": "created",
        "data": {"error": {}},
        "actor": {"id": 2**70, "name": ["\ud800"], "type": None},
    },
    {
        "action": ["created"],
        "event": {"entries": [None, {"type": [], "data": 5}]},
        "group": {"id": 2**70},
    },
    {
        "id": [],
        "project": 5,
        "message": {},
        "triggering_rules": {"a": 1},
        "event": {"sentry.interfaces.Exception": 5},
    },
]


@pytest.mark.parametrize("payload", SURVIVABLE, ids=range(len(SURVIVABLE)))
def test_odd_values_are_stored_cleanly_and_can_be_read(app, client, payload):
    body = wire(payload).replace(b"Infinity", b"1e400")
    assert post(client, body, Sentry_Hook_Resource="é").status_code == 201
    error = check_readable(client, 1)
    assert client.get("/errors/1/payload").data == body
    assert all(
        value is None or isinstance(value, str | int)
        for key, value in error.items()
        if key in client.get("/errors").json[0]
    )
    assert count_rows(app) == 1
    assert post(client, body).json == {"status": "duplicate", "id": 1, "url": "/errors/1"}


def test_how_odd_values_are_kept(client):
    for payload in SURVIVABLE[:3]:
        post(client, payload)
    surrogates, nul, numbers = (client.get(f"/errors/{number}").json for number in (1, 2, 3))
    assert (surrogates["title"], surrogates["culprit"], surrogates["tags"]) == (
        "? lone",
        "?",
        {"?": "?"},
    )
    assert (nul["event_id"], nul["title"], nul["level"]) == ("?", "NUL \ufffd in it", "\ufffd")
    assert (numbers["event_id"], numbers["issue_id"], numbers["project_id"]) == (
        str(2**64),
        str(2**70),
        str(2**63),
    )
    assert numbers["timestamp"] == numbers["received_at"]


def nested(depth):
    return b'{"event":{"event_id":"%d","extra":%b%b}}' % (depth, b"[" * depth, b"]" * depth)


def test_whatever_depth_is_taken_can_be_read_back(app, client):
    taken, refused = 100, 100_000
    while refused - taken > 1:
        depth = (taken + refused) // 2
        if post(client, nested(depth)).status_code in (200, 201):
            taken = depth
        else:
            refused = depth
    for depth in range(taken - 40, taken + 1, 4):
        check_readable(client, post(client, nested(depth)).json["id"])
    reply = post(client, nested(refused))
    assert (reply.status_code, "nested too deeply" in reply.json["error"]) == (400, True)


def test_a_body_over_the_limit_is_refused_and_one_at_the_limit_is_not(make_app):
    body = wire(event_payload())
    app = make_app(MAX_BODY_BYTES=len(body))
    client = app.test_client()
    check_refused(
        app,
        post(client, body + b" "),
        413,
        str(len(body) + 1),
        f"the limit is {len(body)}",
        "MAX_BODY_BYTES",
    )
    assert counts(client) == {("refused", "too large"): 1}
    assert post(client, body).status_code == 201


def test_six_megabytes_are_too_many_by_default_and_five_are_not(app, client):
    check_refused(app, post(client, b" " * 6_000_000), 413, "6000000", "MAX_BODY_BYTES")
    assert post(client, wire(event_payload()).ljust(5 * 1024 * 1024)).status_code == 201


def send_stream(app, body, **environ):
    """Send a body of which the environment says how long it is, or not; return the reply."""
    stream = io.BytesIO(body)
    given = EnvironBuilder("/sentry/webhook", method="POST", input_stream=stream).get_environ()
    given.pop("CONTENT_LENGTH", None)
    return app.response_class(*run_wsgi_app(app, given | environ, buffered=True))


CHUNKED = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}


def test_a_chunked_body_is_taken_up_to_the_limit(make_app):
    body = wire(event_payload())
    app = make_app(MAX_BODY_BYTES=len(body))
    too_long = send_stream(app, body + b" ", **CHUNKED)
    check_refused(app, too_long, 413, f"more than {len(body)} bytes", "MAX_BODY_BYTES")
    assert counts(app.test_client()) == {("refused", "too large"): 1}
    assert send_stream(app, body, **CHUNKED).status_code == 201
    assert app.test_client().get("/errors/1/payload").data == body


def test_a_chunked_body_is_signed_like_any_other(make_app):
    app = make_app(SENTRY_CLIENT_SECRET=SECRET)
    body = wire(event_payload())
    check_refused(app, send_stream(app, body, **CHUNKED), 401, "missing")
    signature = {"HTTP_SENTRY_HOOK_SIGNATURE": sign(body)["Sentry-Hook-Signature"]}
    assert send_stream(app, body, **CHUNKED, **signature).status_code == 201


class BrokenStream(io.BytesIO):
    """A body that gunicorn cannot read to its end."""

    def __init__(self, error):
        self.error = error

    def read(self, size=-1):
        raise self.error


@pytest.mark.parametrize("error", [TimeoutError(), InvalidChunkSize("zz"), NoMoreData("")])
def test_a_chunked_body_that_cannot_be_read_is_refused(app, client, error):
    reply = send_stream(app, b"", **CHUNKED, **{"wsgi.input": BrokenStream(error)})
    check_refused(app, reply, 400, "broke off", "again")
    assert counts(client) == {("refused", "cut short"): 1}


def test_a_body_that_breaks_off_is_refused(app, client):
    body = wire(event_payload())
    reply = send_stream(app, body, CONTENT_LENGTH=str(len(body) + 1))
    check_refused(app, reply, 400, "broke off", "again")
    assert counts(client) == {("refused", "cut short"): 1}


@pytest.mark.parametrize("length", ["-5", "many", "+20", "2_0", "２０"])
def test_a_length_that_is_no_number_is_refused(app, length):
    check_refused(app, send_stream(app, wire(event_payload()), CONTENT_LENGTH=length), 400)


def test_a_browser_that_posts_nonsense_is_told_so_in_a_page(app, client):
    reply = post(client, b"<b>", Accept="text/html,*/*;q=0.8")
    assert (reply.status_code, reply.mimetype) == (400, "text/html")
    assert "The body is not JSON" in reply.text
    assert count_rows(app) == 0


@pytest.mark.parametrize(
    ("site", "status"),
    [("cross-site", 403), ("same-site", 403), ("same-origin", 201), ("none", 201), ("x", 201)],
)
def test_a_delivery_from_a_web_page_is_refused(app, client, site, status):
    reply = post(client, event_payload(), Sec_Fetch_Site=site, Content_Type="text/plain")
    assert reply.status_code == status
    if status == 403:
        check_refused(app, reply, 403, "A web page has sent this")
        assert counts(client) == {("refused", "sent by a web page"): 1}


# --------------------------------------------------------------------------------------------------
# Addresses
# --------------------------------------------------------------------------------------------------

WRONG_ADDRESSES = [
    ("/", 405),
    ("/errors", 405),
    ("/errors/latest", 405),
    ("/sentry", 404),
    ("/sentry/webhooks", 404),
    ("/sentry/webhook/x", 404),
    ("/sentry//webhook", 404),
    ("/x\n\x1b[31m", 404),
]


@pytest.mark.parametrize(("path", "status"), WRONG_ADDRESSES)
def test_a_delivery_to_a_wrong_address_is_told_the_right_one_and_counted(
    make_app, monkeypatch, log, path, status
):
    monkeypatch.setattr(collector, "last_lines", {})
    app = make_app(API_TOKEN="t0ken", TRUSTED_HOSTS="elsewhere")
    client = app.test_client()
    reply = client.post(path, data=wire(event_payload()), headers={"X-Forwarded-For": "192.0.2.7"})
    check_refused(app, reply, status, "Sentry's webhooks go to http://localhost/sentry/webhook")
    (line,) = [line for line in log() if "wrong address" in line]
    assert "from 127.0.0.1 192.0.2.7" in line
    assert line.isascii() and line.isprintable()
    assert client.post(path).status_code == status
    core(app).write_counts()
    authorized = {"Authorization": "Bearer t0ken", "Host": "elsewhere"}
    (row,) = client.get("/config", headers=authorized).json["deliveries"]
    assert (row["outcome"], row["reason"], row["count"]) == ("refused", "wrong address", 2)


def addresses(app, **environ):
    """Return every address that the service gives for two errors, by where it is given."""
    client = app.test_client()
    for name in "ab":
        stored = client.post(
            "/sentry/webhook", data=wire(event_payload(name)), environ_overrides=environ
        )

    def get(path):
        return client.get(path, environ_overrides=environ)

    page = get("/errors?limit=1")
    text = get("/errors/2?format=text").text
    return {
        "url of the reply": stored.json["url"],
        "Location": stored.headers["Location"],
        "Link": page.headers["Link"],
        "url": page.json[0]["url"],
        "url in the text": next(line for line in text.splitlines() if line.startswith("url: ")),
        "webhook": get("/").json["connect"]["webhook_url"],
        "wrong address": client.post("/x", environ_overrides=environ).json["error"].split()[-1],
    }


PLACES = [
    ({}, {}, "", "http://localhost"),
    ({}, {"HTTP_HOST": "collector_1:8000"}, "", "http://collector_1:8000"),
    ({}, {"HTTP_HOST": "[::1]:8000"}, "", "http://[::1]:8000"),
    ({}, {"HTTP_HOST": "a.example", "wsgi.url_scheme": "https"}, "", "https://a.example"),
    ({}, {"SCRIPT_NAME": "/below"}, "/below", "http://localhost/below"),
    (
        {"PUBLIC_URL": "https://errors.example.com/below/"},
        {"HTTP_HOST": "inside:8000"},
        "https://errors.example.com/below",
        "https://errors.example.com/below",
    ),
]


@pytest.mark.parametrize(("settings", "environ", "base", "whole"), PLACES, ids=range(len(PLACES)))
def test_every_address_leads_to_where_the_service_is(make_app, settings, environ, base, whole):
    assert addresses(make_app(**settings), **environ) == {
        "url of the reply": f"{base}/errors/2",
        "Location": f"{base}/errors/2",
        "Link": f'<{base}/errors?limit=1&before=2>; rel="next"',
        "url": f"{base}/errors/2",
        "url in the text": f"url: {whole}/errors/2",
        "webhook": f"{whole}/sentry/webhook",
        "wrong address": f"{whole}/sentry/webhook",
    }


TRUSTED = [
    ("localhost", 200),
    ("localhost:8000", 200),
    ("LOCALHOST", 200),
    ("a_b", 200),
    ("a_b:8000", 200),
    ("x.errors.example.com", 200),
    ("evil.example", 400),
    ("localhost.evil.example", 400),
    ("a_b.evil.example", 400),
    ("x_a_b", 400),
    ("", 400),
]


@pytest.mark.parametrize(("host", "status"), TRUSTED)
def test_reads_need_a_trusted_host_and_webhooks_and_health_do_not(make_app, host, status):
    app = make_app(TRUSTED_HOSTS="localhost, a_b, .errors.example.com")
    client = app.test_client()
    environ = {"HTTP_HOST": host}

    def get(path):
        return client.get(path, environ_overrides=environ).status_code

    assert [get(path) for path in ("/", "/errors", "/config")] == [status] * 3
    assert get("/health") == 200
    stored = client.post("/sentry/webhook", data=wire(event_payload()), environ_overrides=environ)
    assert stored.status_code == 201


# --------------------------------------------------------------------------------------------------
# Signatures
# --------------------------------------------------------------------------------------------------

# Made with: openssl dgst -sha256 -hmac SECRET
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
HEADER_NAMES = ["Sentry-Hook-Signature", "sentry-hook-signature", "SENTRY-HOOK-SIGNATURE"]


@pytest.mark.parametrize("header", HEADER_NAMES)
@pytest.mark.parametrize(
    ("secret", "body", "signature"), VECTORS, ids=["plain", "escapes", "numbers", "secret"]
)
def test_a_right_signature_is_accepted_and_one_bit_off_is_not(
    make_app, secret, body, signature, header
):
    app = make_app(SENTRY_CLIENT_SECRET=secret)
    client = app.test_client()
    wrong = signature[:-1] + ("0" if signature[-1] != "0" else "1")
    check_refused(app, post(client, body, **{header: wrong}), 401, "wrong")
    check_refused(app, post(client, body + b" ", **{header: signature}), 401, "wrong")
    assert post(client, body, **{header: signature}).status_code == 201


def test_an_empty_body_may_be_signed_and_is_still_no_delivery(make_app):
    app = make_app(SENTRY_CLIENT_SECRET="test-client-secret")
    signature = "cff7ccd625537ce1a726fd29f7fc4beca8a15c96b6c9ee9b9461e149f57d4e88"
    check_refused(
        app, post_bytes(app.test_client(), b"", Sentry_Hook_Signature=signature), 400, "not JSON"
    )


@pytest.mark.parametrize("secrets", ["old,new", "old , new", "new,,old,", "third, old,new"])
def test_while_secrets_change_each_of_them_signs(make_app, secrets):
    app = make_app(SENTRY_CLIENT_SECRET=secrets)
    client = app.test_client()
    body = wire(event_payload())
    check_refused(app, post(client, body, **sign(body, "other")), 401, "Client Secret")
    check_refused(app, post(client, body, **sign(body, secrets)), 401, "Client Secret")
    check_refused(app, post(client, body, **sign(body, "")), 401, "Client Secret")
    assert [post(client, body, **sign(body, secret)).status_code for secret in ("old", "new")] == [
        201,
        200,
    ]


def test_without_a_secret_a_signature_is_not_looked_at(app, client):
    assert post(client, event_payload(), Sentry_Hook_Signature="nonsense").status_code == 201


REWRITTEN = {
    "action": "created",
    "data": {"error": {"event_id": "1", "title": "grün 🍵", "timestamp": 100.0}},
}
WRONG_SIGNATURES = [
    (None, "signature missing", "header is missing", "legacy"),
    ("", "signature missing", "header is missing", "legacy"),
    ("abc", "signature length", "3 characters", "64"),
    ("sha256=" + "a" * 64, "signature length", "71 characters", "64"),
    ("a" * 40, "signature length", "40 characters", "64"),
    ("é" * 64, None, "wrong", "Sentry-Hook-Signature"),
    ("\xff" * 32, None, "wrong", "Sentry-Hook-Signature"),
    ("a" * 64, "signature wrong", "Client Secret", "SENTRY_CLIENT_SECRET"),
    ("A" * 5000, "signature length", "5000 characters", "64"),
    (
        sign(wire(REWRITTEN), "another")["Sentry-Hook-Signature"],
        "signature wrong",
        "Client Secret",
        "integration",
    ),
]


@pytest.mark.parametrize(
    ("signature", "reason", "words", "remedy"), WRONG_SIGNATURES, ids=range(len(WRONG_SIGNATURES))
)
def test_a_wrong_signature_is_refused_with_what_is_wrong_and_how_to_mend_it(
    make_app, signature, reason, words, remedy
):
    app = make_app(SENTRY_CLIENT_SECRET=SECRET)
    client = app.test_client()
    body = wire(REWRITTEN)
    headers = {} if signature is None else {"Sentry-Hook-Signature": signature}
    reply = post(client, body, **headers)
    check_refused(app, reply, 401, words, remedy)
    assert SECRET not in reply.text
    assert sign(body)["Sentry-Hook-Signature"] not in reply.text
    ((outcome, counted),) = counts(client)
    assert outcome == "refused"
    assert counted == (reason or counted)


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda payload: json.dumps(payload).encode(),
        lambda payload: json.dumps(payload, indent=2).encode() + b"\n",
        lambda payload: json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode(),
    ],
)
def test_a_proxy_that_rewrites_bodies_is_found_out(make_app, rewrite):
    app = make_app(SENTRY_CLIENT_SECRET=f"unused,{SECRET}")
    client = app.test_client()
    reply = post(client, rewrite(REWRITTEN), **sign(wire(REWRITTEN)))
    check_refused(app, reply, 401, "a proxy", "rewrote the body")
    assert counts(client) == {("refused", "body rewritten"): 1}


ENDS = [
    (SECRET + " ", "white space in secret", "white space"),
    (SECRET + "\n", "white space in secret", "white space"),
    ("\t" + SECRET, "white space in secret", "white space"),
    (f'"{SECRET}"', "quotes around secret", "quotes"),
    (f"'{SECRET}' ", "quotes around secret", "quotes"),
]


@pytest.mark.parametrize(("secret", "reason", "words"), ENDS, ids=range(len(ENDS)))
def test_what_does_not_belong_to_the_secret_is_told(make_app, secret, reason, words):
    app = make_app(SENTRY_CLIENT_SECRET=secret)
    client = app.test_client()
    body = wire(event_payload())
    check_refused(app, post(client, body, **sign(body)), 401, words, "SENTRY_CLIENT_SECRET")
    assert counts(client) == {("refused", reason): 1}


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"\xff\xfe\0", b"", b"NaN", b'{"a":1' + b"0" * 5000 + b"}"]
)
def test_a_wrong_signature_of_broken_json_is_no_fault(make_app, body):
    app = make_app(SENTRY_CLIENT_SECRET=SECRET)
    check_refused(
        app, post_bytes(app.test_client(), body, Sentry_Hook_Signature="a" * 64), 401, "wrong"
    )


def test_size_goes_before_signature_and_signature_before_json(make_app):
    app = make_app(SENTRY_CLIENT_SECRET=SECRET, MAX_BODY_BYTES="100")
    client = app.test_client()
    check_refused(app, post(client, b"x" * 101), 413)
    check_refused(app, post(client, b"x" * 100), 401)
    check_refused(app, post(client, b"x" * 100, **sign(b"x" * 100)), 400)


def test_the_legacy_plugin_cannot_sign_and_is_told_so(make_app):
    app = make_app(SENTRY_CLIENT_SECRET=SECRET)
    check_refused(
        app,
        post(app.test_client(), load("legacy_plugin")),
        401,
        "missing",
        "plugin",
        "SENTRY_CLIENT_SECRET",
    )


def test_the_read_token_is_not_asked_of_sentry(make_app):
    app = make_app(API_TOKEN="t0ken")
    assert post(app.test_client(), event_payload()).status_code == 201


# --------------------------------------------------------------------------------------------------
# Being told: counts and log lines
# --------------------------------------------------------------------------------------------------


def test_deliveries_are_counted_by_outcome_and_reason_with_the_last_time(make_app):
    app = make_app(SENTRY_CLIENT_SECRET=SECRET)
    client = app.test_client()
    assert client.get("/config").json["deliveries"] == []
    assert client.get("/").json["last_delivery_at"] is None
    for payload in (
        event_payload(),
        event_payload(),
        load("comment.created"),
        load("event_alert.triggered.message"),
        [],
    ):
        post(client, wire(payload), **sign(wire(payload)))
    post(client, event_payload())
    post(client, event_payload("stored"), **sign(wire(event_payload("stored"))))
    core(app).write_counts()
    for path in ("/", "/config"):
        shown = client.get(path).json
        assert {
            (row["outcome"], row["reason"]): (row["count"], row["today"])
            for row in shown["deliveries"]
        } == {
            ("stored", None): (2, 2),
            ("duplicate", None): (1, 1),
            ("ignored", "no error"): (1, 1),
            ("ignored", "action not accepted"): (1, 1),
            ("refused", "no object"): (1, 1),
            ("refused", "signature missing"): (1, 1),
        }
        times = [row["last_at"] for row in shown["deliveries"]]
        assert times == sorted(times, reverse=True)
        assert shown["deliveries"][0]["outcome"] == "stored"
        assert shown["last_delivery_at"] == times[0]
    page = client.get("/?format=html").text
    assert "signature missing" in page and "action not accepted" in page


def test_each_delivery_logs_one_line_and_nothing_of_its_content(make_app, log):
    client = make_app(SENTRY_CLIENT_SECRET=SECRET).test_client()
    request_id = "0123456789abcdef0123456789abcdef"
    payload = event_payload(title="c0nfidential", web_url="https://c0nfidential")
    bodies = [
        wire(payload),
        wire(payload),
        wire({"action": "commented", "data": {"c0nfidential": 1}}),
        b"c0nfidential",
    ]
    for body in bodies:
        post(client, body, **sign(body), Sentry_Hook_Resource="error", Request_ID=request_id)
    post(client, bodies[0], Sentry_Hook_Signature="c0nfidential" * 6, Cookie="c0nfidential")
    lines = deliveries(log)
    assert len(lines) == 5
    for line, words in zip(
        lines, ("stored 1", "duplicate 1", "ignored", "refused 400", "refused 401"), strict=True
    ):
        assert words in line
        assert line.endswith(" ms")
    assert all(request_id in line and "error" in line for line in lines[:4])
    assert "c0nfidential" not in "".join(lines)
    assert SECRET not in "".join(lines)


def test_a_refusal_names_the_caller_and_a_delivery_that_is_taken_does_not(client, log):
    forwarded = {"X_Forwarded_For": "192.0.2.7, 198.51.100.1"}
    post(client, b"[]", **forwarded)
    post(client, event_payload(), **forwarded)
    refused, stored = deliveries(log)
    assert "refused 400 no object, from 127.0.0.1 192.0.2.7 198.51.100.1;" in refused
    assert "192.0.2.7" not in stored


def test_refused_readers_are_logged_once_a_second_at_most(make_app, monkeypatch, log):
    monkeypatch.setattr(collector, "last_lines", {})
    client = make_app(API_TOKEN="t0ken").test_client()
    statuses = {client.get("/errors").status_code for _ in range(50)}
    lines = [line for line in log() if "without API_TOKEN, from 127.0.0.1" in line]
    assert statuses == {401}
    assert 1 <= len(lines) < 25


FORGERIES = ["a\x1b[31mred", "a\x85b", "é" * 500, "a" * 5000, "stored 99; x; 1 ms"]


@pytest.mark.parametrize("value", FORGERIES, ids=range(len(FORGERIES)))
def test_a_header_cannot_forge_a_log_line(client, log, value):
    action = {"action": f"x\n{value}", "data": {}}
    headers = dict.fromkeys(("Sentry_Hook_Resource", "Request_ID", "X_Forwarded_For"), value)
    post(client, action, **headers)
    post(client, b"[]", **headers)
    for line in deliveries(log):
        assert line.isascii() and line.isprintable()
        assert len(line) < 400
        assert "stored 99; x" not in line.split(";", 1)[1]
