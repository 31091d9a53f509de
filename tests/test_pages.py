"""What people and agents read: the pages, each looked at once by a real Chromium, and the text form."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import deque

import pytest
from conftest import core, counts, event_payload, issue_event, load, make_client, serving

# Deliveries


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
    vars={"__name__": "shop", "total": "129.9", "coupon": "'TEA-50'", "RATES": {"TEA50": 0.5}, "tax": None},
)  # fmt: skip
FLUSH = frame("lib/db.py", "flush", 6, False, "    fail()")
ORDER = {
    "title": "CheckoutError: order 88 failed", "culprit": "shop.checkout in place", "release": "shop@3",
    "environment": "production",
    "exception": {"values": [
        raised("KeyError", "'TEA-50'", frame("lib/a.py", "a", 1, False), PRICING),
        raised("PricingError", "no price", frame("shop/cart.py", "price", 12, source="  x()")),
        raised(
            "CheckoutError", "order 88 failed", frame("lib/web.py", "serve", 7, False), frame("lib/web.py", "call", 8, False),
            frame("shop/views.py", "order", 18, source="    return place(cart)"),
            frame("shop/checkout.py", "place", 64, source="    raise x", vars={"cart": "<88>"}),
            frame("lib/db.py", "commit", 5, False, "    self.flush()"), FLUSH, mechanism={"type": "web", "handled": False},
        ),
    ]},
    "request": {
        "method": "POST", "url": "https://shop.example/order", "query_string": "cart=88&token=secret",
        "headers": {"Content-Type": "application/json", "Cookie": "secret"},
        "data": {"coupon": "TEA-50", "note": "", "password": "secret"},
    },
    "user": {"id": "12", "email": "a@example.com", "name": None},
    "contexts": {"runtime": {"type": "runtime", "name": "CPython", "version": "3.12"}, "empty": {}},
    "extra": {"cart": {"id": 88}, "secret": "secret", "nothing": ""},
    "tags": [["transaction", "/order"], ["environment", "production"], ["release", "shop@3"]],
    "breadcrumbs": [
        {"timestamp": 1790000000, "category": "query", "message": "SELECT " + "1" * 800},
        {"timestamp": 1790000001, "level": "error", "message": "frame\n" * 120 + "the end"},
    ],
}  # fmt: skip
CLUES = {
    "errors": [{"type": "js_no_source", "url": "https://x/a.js.map"}],
    "template": {"filename": "cart.html", "lineno": 12, "context_line": "{{ total }}\x1b[2J\nlevel: x"},
    "threads": {"values": [{
        "id": 1, "name": "main", "state": "BLOCKED", "held_locks": {"0x1": {"class_name": "Kettle", "address": "0x1"}},
        "stacktrace": {"frames": [frame("Pot.java", "wait", 9)]},
    }]},
}  # fmt: skip
ORDER_TEXT = """
exception (unhandled):
  CheckoutError: order 88 failed
  in File "shop/checkout.py", line 64, in place
  root cause: KeyError: 'TEA-50', in File "shop/pricing.py", line 41, in apply
  [2 library frames]
  File "shop/views.py", line 18, in order
      return place(cart)
  File "shop/checkout.py", line 64, in place
  >    64 |     raise x
    cart = <88>
  [1 library frame]
  File "lib/db.py", line 6, in flush
      fail()

caused by:
  PricingError: no price
  File "shop/cart.py", line 12, in price
      x()

caused by (root):
  KeyError: 'TEA-50'
  [1 library frame]
  File "shop/pricing.py", line 41, in apply
       38 | def apply(total, coupon):
       39 |     # no dash in these
       40 |
  >    41 |     rate = RATES[coupon]
       42 |     return total * (1 - rate)
       43 |
       44 |
    coupon = 'TEA-50'
    RATES = {"TEA50": 0.5}
    total = 129.9
    tax = null

request:
  POST https://shop.example/order
  query: cart=88&token=[masked]
  body: {"coupon": "TEA-50", "note": "", "password": "[masked]"}
  headers: Content-Type = application/json; Cookie = [masked]

user:
  id = 12; email = a@example.com

tags:
  transaction = /order

contexts:
  runtime: name = CPython; version = 3.12

extra:
  cart = {"id": 88}
  secret = [masked]
"""
ELSEWHERE = "http://127.0.0.1:9"
HOSTILE = "".join([
    "<script>window.ran=1;alert(1)</script>", f"<img src={ELSEWHERE}/i onerror=window.ran=1>",
    "<svg onload=window.ran=1>", "<details open ontoggle=window.ran=1>", f"<base href={ELSEWHERE}/>",
    f"</title></style></pre></code><style>@import '{ELSEWHERE}/c'</style>", "<!--]]><![CDATA[",
    "\" autofocus onfocus=window.ran=1 x=\"' onfocus=window.ran=1 x='", "&lt;b&gt;&quot;",
    "{{1234567*7}}{% debug %}", "\0\x07\x1b[31m\x7f\x9b\u061c\u200b\u200e\u2028\u202e\u2066\ufeff\u00ad",
])  # fmt: skip


def spread(value, words):
    """Return a copy of a JSON value with every text in it replaced, and a member of that name."""
    if isinstance(value, dict):
        return {key: spread(item, words) for key, item in value.items()} | {words: words}
    if isinstance(value, list):
        return [spread(item, words) for item in value]
    return words if isinstance(value, str) else value


def hostile_payload(number, words):
    """Return a delivery with a text in every field that is shown."""
    event = issue_event(number, number, **ORDER, **CLUES)["data"]["error"]
    event |= dict.fromkeys("message platform logger csp".split(), "x")
    issue = {"shortId": "x", "status": "x", "project": {"slug": "x"}}
    data = spread({"error": event, "issue": issue}, words)
    data["error"] |= {"csp": {words: words}, "event_id": f"{number}{words}", "tags": [[words] * 2]}
    data["issue"]["id"] = f"{number}"
    return {"action": "created", "data": data}


# The pages in a browser


class Browser:
    """A headless Chromium with one page, driven over a DevTools pipe: JSON messages that end with NUL."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars "
        "--disable-background-networking --disable-component-update --disable-sync --remote-debugging-pipe"
    ).split()

    def __init__(self, program, folder):
        self.pipe, theirs = socket.socketpair()
        # Chromium reads at descriptor 3 and writes at 4.
        joined = ["bash", "-c", 'exec "$@" 3<&"$0" 4>&"$0"', str(theirs.fileno()), program]
        with open(folder / "chromium.log", "wb") as log:
            self.process = subprocess.Popen(
                [*joined, *self.FLAGS, f"--user-data-dir={folder}/profile", "about:blank"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        theirs.close()
        self.left = b""
        self.number = 0
        self.messages = deque()
        self.events = []
        self.session = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime", "Accessibility", "Audits"):
            self.call(f"{domain}.enable")

    def receive(self, deadline):
        """Return the next message."""
        while not self.messages:
            self.pipe.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.pipe.recv(1 << 20)
            assert data, "Chromium has ended"
            *whole, self.left = (self.left + data).split(b"\0")
            self.messages.extend(map(json.loads, whole))
        return self.messages.popleft()

    def call(self, method, **params):
        """Return what a DevTools method returns; keep the events that come before its answer."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | self.session
        self.pipe.sendall(json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + 30
        while True:
            reply = self.receive(deadline)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]
            self.events.append(reply)

    def seen(self, *methods):
        """Return the parameters of the events of these names since the last visit began."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def visit(self, url):
        """Load a page; the events are those since then."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + 30
        while not self.seen("Page.loadEventFired"):
            self.events.append(self.receive(deadline))

    def run(self, script):
        """Return the value of an expression in the page."""
        options = {"returnByValue": True, "awaitPromise": True}
        reply = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def dress(self, width, scheme):
        """Set the size of the window and the colour scheme that the system prefers."""
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def roles(self):
        """Return what a screen reader is told of: roles and names."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        shown = [node for node in nodes if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value")) for node in shown]

    def complaints(self):
        """Return what the console and the inspector say, but that a page came with an error's status."""
        entries = [event["entry"]["text"] for event in self.seen("Log.entryAdded")]
        words = [entry for entry in entries if "status of 4" not in entry]
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Audits.issueAdded")
        return words + [str(issue) for issue in self.seen(*names)]

    def close(self):
        """End Chromium with all its processes, which have nothing to save."""
        self.pipe.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Return a Chromium; without one the tests are skipped, but in CI they fail."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        words = "chromium is not installed; Debian has it in a package of that name"
        pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)
    found = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


def fill(deliver):
    """Deliver 60 errors of 7 issues, three of them warnings, then one with everything."""
    for number in range(1, 61):
        level = "warning" if number % 20 == 0 else "error"
        title = f"KeyError: 'spoon {number}'"
        deliver(issue_event(number, number % 7 + 1, title=title, level=level))
    deliver(issue_event(61, 61, **ORDER))


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Return the address of a server that has what `fill` delivers, then a hostile error."""
    with serving(tmp_path_factory.mktemp("shop"), WEB_CONCURRENCY="2") as server:
        fill(server.deliver)
        server.deliver(hostile_payload(62, HOSTILE))
        yield f"http://127.0.0.1:{server.port}"


# What is wrong with a page, as lists that should be empty, found with everything unfolded; then what it is made of.
INSPECT = """(async () => {
  scrollTo(0, 0);
  const row = document.querySelector('tbody tr');
  const rowEnd = row ? row.getBoundingClientRect().bottom : 0;
  const folded = [...document.querySelectorAll('details:not([open])')];
  folded.forEach(each => each.open = true);
  document.querySelectorAll('a, input, button, summary').forEach(each => each.focus());
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const paint = colours => {
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(value => value / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = element => {
    const colours = [];
    for (let each = element; each; each = each.parentElement) colours.unshift(getComputedStyle(each).backgroundColor);
    return ['Canvas', ...colours];
  };
  const contrast = (colour, colours) => {
    const [one, two] = [light(paint([...colours, colour])), light(paint(colours))];
    return (Math.max(one, two) + .05) / (Math.min(one, two) + .05);
  };
  const name = element => element.tagName + '.' + element.className + ' ' + element.textContent.trim().slice(0, 40);
  const shown = [...document.body.querySelectorAll('*')].filter(element => element.getClientRects().length
    && !element.closest('.hidden, .skip, svg'));
  const faint = [], wide = [];
  for (const element of shown) {
    const style = getComputedStyle(element);
    const texts = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (texts && contrast(style.color, behind(element)) < 4.5) faint.push(name(element));
    if (element.placeholder && contrast(getComputedStyle(element, '::placeholder').color, behind(element)) < 4.5)
      faint.push('placeholder ' + element.placeholder);
    if (element.matches('input, button') && contrast(style.borderTopColor, behind(element.parentElement)) < 3)
      faint.push('border of ' + name(element));
    const box = element.getBoundingClientRect();
    const spills = element.clientWidth && element.scrollWidth > element.clientWidth + 1 && !element.matches('input');
    if (spills || box.right > innerWidth + .5 || box.left < -.5) wide.push(name(element));
  }
  const all = [...document.querySelectorAll('*')];
  const targets = all.filter(each => each.matches('[href], [src], [action]'));
  await new Promise(done => setTimeout(done));
  const found = {
    faint, wide, innerWidth, isRowInSight: rowEnd < 800, headings: document.querySelectorAll('h1').length,
    unlabelled: [...document.querySelectorAll('input:not([type=hidden])')].filter(each => !each.labels.length).map(name),
    ids: all.filter(each => each.id).length - new Set(all.filter(each => each.id).map(each => each.id)).size,
    tags: [...new Set(all.map(each => each.localName))],
    handlers: all.flatMap(each => each.getAttributeNames()).filter(each => each.startsWith('on') || each === 'style'),
    schemes: [...new Set(targets.map(each => new URL(each.href ?? each.src ?? each.action, location).protocol))],
    ran: window.ran ?? null, text: document.title + document.documentElement.textContent,
  };
  folded.forEach(each => each.open = false);
  return found;
})()"""
TAGS = set(
    "html head meta title link style body a header nav form label input button main footer h1 h2 h3 p b q bdi span time "
    "section div pre code ol ul li details summary dl dt dd table caption thead tbody tr th td svg rect".split()
)
NAMED = "button image link navigation region searchbox table textbox".split()
UNSEEN = set("\0\x07\x1b\x7f\x9b\u061c\u200b\u200e\u2028\u202e\u2066\ufeff\u00ad")
PAGES = [
    "/", "/errors", "/errors/61", "/issues", "/errors/latest", "/errors/62", "/errors?level=nope", "/errors/999",
    "/errors?level=error&q=spoon&since=7d", "/issues?q=nothing", f"/errors?q={HOSTILE[:38]}&project=%22%3E{'x' * 99}",
]  # fmt: skip


@pytest.mark.parametrize("path", PAGES, ids=range(len(PAGES)))
def test_a_page_is_sound_and_harmless_at_each_width_in_each_colour_scheme(browser, shop, path):
    # The policy is off, so that escaping alone has to keep hostile words what they are.
    browser.call("Page.setBypassCSP", enabled=True)
    browser.visit(shop + path)
    for width, scheme in ((1280, "light"), (420, "dark"), (360, "light")):
        browser.dress(width, scheme)
        page = browser.run(INSPECT)
        roles = browser.roles()
        assert (page["faint"], page["wide"], page["unlabelled"]) == ([], [], []), width
        assert (page["innerWidth"], page["headings"], page["ids"]) == (width, 1, 0)
        assert page["isRowInSight"] or width == 360 or re.match(r"/errors/(\d|latest)", path)
        assert [role for role, name in roles if role in NAMED and not name] == []
        landmarks = [role for role, _ in roles if role in ("banner", "contentinfo", "main")]
        assert sorted(landmarks) == ["banner", "contentinfo", "main"]
        tables = browser.run("document.querySelectorAll('table').length")
        assert len([role for role, _ in roles if role == "table"]) == tables
        assert (set(page["tags"]) - TAGS, page["handlers"], page["ran"]) == (set(), [], None)
        assert set(page["schemes"]) <= {"http:", "https:", "data:"}
        assert not set(page["text"]) & UNSEEN and "8641969" not in page["text"]
        fetched = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
        assert len(fetched) == 1 and browser.complaints() == [], fetched
        assert browser.seen("Page.javascriptDialogOpening") == []


def test_the_policy_lets_nothing_run_or_load_but_the_style(browser, shop):
    browser.call("Page.setBypassCSP", enabled=False)
    browser.dress(1280, "light")
    browser.visit(f"{shop}/errors/62")
    assert browser.complaints() == []
    assert browser.run("getComputedStyle(document.querySelector('.box')).borderRadius") == "8px"
    browser.run("""document.body.insertAdjacentHTML('beforeend',
      `<img src=/a><iframe src=/b></iframe><link rel=stylesheet href=/d><b style='color: red' onclick='ran=1' id=last>x</b>`)""")
    script = "Object.assign(document.createElement('script'), {text: 'ran=1'})"
    browser.run(f"document.body.append({script})")
    browser.run("document.querySelector('#last').click()")
    assert browser.run("fetch('/f').then(() => 'sent', () => 'held back')") == "held back"
    assert not browser.run("window.ran || document.querySelector('#last').style.color")


# The pages without one


def page_of(client, path):
    """Return a page as HTML."""
    reply = client.get(path, headers={"Accept": "text/html"})
    assert reply.content_type == "text/html; charset=utf-8"
    return reply.text


def links(page, words):
    """Return where the links whose words match lead to."""
    found = re.findall(r'<a [^>]*href="([^"]*)"[^>]*>(.*?)</a>', page, re.DOTALL)
    return [url.replace("&amp;", "&") for url, shown in found if re.search(words, shown)]


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Return a client of an app that has what `fill` delivers, for tests that only read."""
    client = make_client(tmp_path_factory.mktemp("kitchen"))
    fill(client.deliver)
    yield client
    core(client).close()


def test_the_pages_of_a_list_keep_the_filters_which_stand_in_the_form(kitchen):
    page = page_of(kitchen, "/errors?q=spoon&level=error&limit=20&release=")
    assert 'name="q" value="spoon"' in page and 'name="level" value="error"' in page
    assert '<input type="hidden" name="limit" value="20">' in page
    assert re.search(r"<summary>Filters: level <bdi>error</bdi></summary>", page)
    assert "<details open" not in page
    seen = []
    while True:
        rows = re.findall(r'<td role="cell"><a href="/errors/(\d+)">', page)
        seen += map(int, rows)
        older = links(page, "older")
        if not older:
            break
        page = page_of(kitchen, older[0])
        assert 'name="level" value="error"' in page
    assert seen == [number for number in range(60, 0, -1) if number % 20]
    newest = page_of(kitchen, links(page, "newest")[0])
    assert 'name="q" value="spoon"' in newest and links(newest, "older")
    assert not links(newest, "newest") and links(page_of(kitchen, "/errors?after=5"), "newer")
    assert re.search(r"q=spoon.*&format=json$", links(page, "^json$")[0])
    assert "Nothing matches." in page_of(kitchen, "/errors?q=nothing")


def test_issues_lead_to_their_errors_and_an_error_to_its_issue_and_forms(kitchen):
    page = page_of(kitchen, "/issues?limit=3")
    issues = [f"/errors?issue={number}&server=sentry.io" for number in (61, 5, 4)]
    assert links(page, " ×$") == issues
    page = page_of(kitchen, "/errors/61")
    assert links(page, "1\\s+time") == ["/errors?issue=61&server=sentry.io"]
    assert links(page, "Open in Sentry") == [
        "https://tea.sentry.io/organizations/tea/issues/61/events/61/"
    ]
    for type_, form in (("text/plain", "text"), ("application/json", "json")):
        assert f'<link rel="alternate" type="{type_}"' in page
        (address,) = set(links(page, {"text": "^Text", "json": "^JSON"}[form]))
        assert address == f"/errors/61?format={form}" and kitchen.get(address).status_code == 200
    assert links(page, "^Payload") == ["/errors/61/payload"]
    assert re.search(r"happened <time[^>]*>[-0-9]{10} [:0-9]{8}</time> UTC", page)
    assert re.search(r"received <time[^>]*>[-0-9]{10} [:0-9]{8}</time> UTC", page)


def test_the_trace_opens_what_matters_and_folds_libraries(kitchen):
    page = page_of(kitchen, "/errors/61")
    places = re.findall(r"<details( open)?><summary><code>(.*?)</code>", page)
    assert [(place.replace("&#34;", ""), opened) for opened, place in places] == [
        ("File shop/views.py, line 18, in order", ""),
        ("File shop/checkout.py, line 64, in place", " open"),
        ("File lib/db.py, line 5, in commit", ""),
        ("File lib/db.py, line 6, in flush", ""),
        ("File shop/cart.py, line 12, in price", ""),
        ("File shop/pricing.py, line 41, in apply", " open"),
    ]
    assert re.findall(r"\d+ library frame", page) == ["2 library frame", *["1 library frame"] * 2]
    assert page.count('id="crash"') == 1 and page.index('id="crash"') < page.index("checkout.py")
    assert re.findall(r"<h3>(?:<span class=\"tag\">(.*?)</span> )?<code>(.*?)</code>", page) == [
        ("", "CheckoutError"), ("caused by", "PricingError"), ("caused by (root)", "KeyError"),
    ]  # fmt: skip
    for words in ("<dt>coupon</dt>", "cart=88&amp;token=[masked]", "CPython", "SELECT 111"):
        assert words in page
    assert "secret</dd>" not in page


def test_the_overview_tells_how_to_connect_until_an_error_is_there(client):
    page = page_of(client, "/")
    assert "<details open>" in page and "No errors yet." in page and "<svg" not in page
    places = """Settings.*Developer Settings.*Custom Integrations.*Create New Integration.*Internal Integration.*Next.*name
        .*Webhook URL.*http://localhost/sentry/webhook.*Issue &amp; Event.*Read.*error.*Business.*issue.*Alert Rule Action
        .*Alert Action.*Save.*Client Secret.*SENTRY_CLIENT_SECRET.*SENTRY_ACTIONS=created,triggered.*Alerts.*Monitors.*Alerts
        .*Send a notification via an integration.*Send Test Notification.*stored"""
    assert re.search(re.sub(r"\s*\n\s*", "", places), page, re.DOTALL)
    for number in range(3):
        client.deliver(event_payload(number))
    page = page_of(client, "/")
    assert "<details open>" not in page and "Developer Settings" in page
    assert re.findall(r"<rect.*?<title>.* UTC: (\d+)</title>", page) == ["3"]
    assert links(page, "ValueError: no") == ["/errors/3"]
    assert counts(client) == {("stored", None): 3} and "3 ×</td>" in page_of(client, "/")


def test_only_web_addresses_become_links(client):
    addresses = (
        "javascript:x JaVaScRiPt:x data:text/html,x //evil.example/ /errors http:evil x".split()
    )
    for number, address in enumerate([" javascript:x", "https://x/ onclick=x", *addresses], 1):
        client.deliver(event_payload(number, web_url=address, request={"url": address}))
        assert "Open in Sentry" not in page_of(client, f"/errors/{number}")


def test_a_huge_error_is_cut_with_a_way_to_the_rest(client):
    frames = [frame("a.py", f"call{number}", number, source="c" * 500) for number in range(3000)]
    values = [*[{"type": f"Cause{n}"} for n in range(40)], raised("E", "v" * 9000, *frames)]
    event = {"title": "x" * 9000, "message": "m" * 9000, "exception": {"values": values}}
    event["tags"] = [[f"k{number}", "v" * 190] for number in range(3000)]
    client.deliver(event_payload(1, **event))
    page = page_of(client, "/errors/1")
    assert len(page) < 1_000_000
    assert "36 more exceptions are in" in page and "more are left out here" in page
    assert '<a href="/errors/1/payload">the payload</a> has all of it' in page
    assert "call2999" in page and "call2000" not in page


# The text form


def text_of(client, payload, **headers):
    """Post a payload and return its text form."""
    id_ = client.deliver(payload, **headers).json["id"]
    text = client.get(f"/errors/{id_}?format=text").text
    assert len(text) <= 8000 and text.startswith(f"error: {id_}\n")
    return text


def trace_of(client, *frames, **more):
    """Return the lines under the words of an exception that has these frames."""
    values = [raised("E", "v", *frames, **more)]
    text = text_of(client, event_payload(len(client.errors()) + 1, exception={"values": values}))
    return [line[2:] for line in text.split("\n\n")[1].splitlines()[2:]]


def test_the_text_names_the_line_to_change_and_the_value_that_explains_it(client):
    text = text_of(client, issue_event(1, 501, **ORDER))
    head, _, rest = text.partition("\n\n")
    at = client.get("/errors/1").json["received_at"]
    assert head.splitlines() == [
        "error: 1", "title: CheckoutError: order 88 failed", "level: error", "culprit: shop.checkout in place",
        "environment: production", "release: shop@3", "issue: 501", f"event: {1:032x}", f"happened: {at}",
        f"received: {at}", "permalink: https://tea.sentry.io/organizations/tea/issues/501/events/1/", "url: http://localhost/errors/1",
    ]  # fmt: skip
    body, _, crumbs = rest.partition("\n\nbreadcrumbs (newest last):\n")
    assert body == ORDER_TEXT.strip("\n")
    query, failure, *end = crumbs.splitlines()
    assert len(query) == 252 and query.endswith("1…")
    assert failure.endswith("frame the end") and len(failure) > 700
    note = "left out: parts of long values (…); whole: http://localhost/errors/1/payload"
    assert end == ["", note]
    second = text_of(client, issue_event(2, 501, **ORDER))
    assert re.search(r"\nseen: 2 times here, first \S+, last \S+\n", second)


def test_the_line_to_change_is_among_the_first_lines_of_each_sample(app):
    client = app(SENTRY_ACTIONS="created,triggered")
    crashes = {
        "error.created.python": "shop/basket.py", "error.created.java": "com.example.brew.Kettle",
        "error.created.native": "address 0x401a2c", "documented.created": "line 21", "legacy_plugin": "line 30",
        "faults/event_alert.triggered.native-package-only": "TeaGarden.exe",
        "faults/event_alert.triggered.main-exception-react19": "in priceOf",
    }  # fmt: skip
    for name, crash in crashes.items():
        lines = text_of(client, load(name)).splitlines()[:25]
        assert any(line.startswith("  ") and crash in line for line in lines), name
    deep = [frame("a.py", f"f{number}", number, source="x()") for number in range(90)]
    text = text_of(client, event_payload(exception={"values": [raised("E", "v", *deep)]}))
    assert '  in File "a.py", line 89, in f89' in text.splitlines()[:25]


def test_a_frame_says_what_its_language_has(client):
    java = {"filename": "Tea.java", "lineno": 3, "function": "f", "module": "org.Tea"}
    dotnet = {
        "module": "Tea",
        "function": "Void F(Cup c)",
        "filename": "T.cs",
        "package": "T, Version=1",
    }
    script = {"filename": "a.js", "lineno": 1, "colno": 9, "function": "f"}
    for sent, shown in (
        ({}, 'File "?", in ?'),
        ({"filename": "a.py", "lineno": 3, "function": "f", "module": "a"}, 'File "a.py", line 3, in f'),
        (java, 'File "Tea.java", line 3, in org.Tea.f'),
        (java | {"filename": None}, 'File "org.Tea", line 3, in f'),
        (java | {"lineno": -1}, 'File "Tea.java", in org.Tea.f'),
        (dotnet, 'File "T.cs", in Void F(Cup c) of Tea, package T'),
        (script, 'File "a.js", line 1, column 9, in f'),
        ({"filename": "a.wasm", "instruction_addr": "0x8c1"}, 'File "a.wasm", in ?, address 0x8c1'),
        ({"package": "C:\\tea\\Tea.exe", "instruction_addr": "0x10"}, 'File "Tea.exe", in ?, address 0x10'),
    ):  # fmt: skip
        assert trace_of(client, sent) == [shown]


def test_frames_are_folded_variables_sorted_and_long_lines_shown_at_their_column(client):
    marks = [False, True, False, False, True, None, False]
    frames = [{"function": f"f{number}", "in_app": mark} for number, mark in enumerate(marks)]
    assert trace_of(client, *frames)[1:] == [
        "[1 library frame]", 'File "?", in f1', "[2 library frames]", 'File "?", in f4', "[1 library frame]", 'File "?", in f6',
    ]  # fmt: skip
    variables = {f"v{number:02}": "x" * 90 for number in range(40)}
    variables |= {"wrong": "7", "__name__": "m"}
    lines = trace_of(client, frame("a.py", "f", 1, source="    use(wrong)", vars=variables))
    assert lines[1:4] == [">     1 |     use(wrong)", "  wrong = 7", f"  v00 = {'x' * 90}"]
    assert lines[-1] == "  more variables…" and "__name__" not in str(lines)
    minified = frame("a.js", "f", 1, source="a" * 500 + "BUG" + "b" * 500, colno=500)
    lines = trace_of(client, minified)
    assert lines[0].endswith("line 1, column 500, in f")
    assert re.fullmatch(r">     1 \| …a+BUGb+…", lines[1])


def test_an_error_without_a_trace_says_why(client):
    issue = {"action": "created", "data": {"issue": {"id": "7", "title": "KeyError"}}}
    for number, (payload, resource, words) in enumerate((
        (event_payload(1, message="low on milk"), "error", "There is no stack trace: the SDK that reported this sent none."),
        (event_payload(2, type="csp", csp={"blocked_uri": "x"}), "event_alert", "an issue of the category csp."),
        (event_payload(3, occurrence={"type": 1006, "subtitle": "x"}), "event_alert", "the category performance."),
        (event_payload(4, occurrence={"type": 4001, "subtitle": "x"}), "event_alert", "the category cron."),
        (issue, "issue", "This issue webhook has no event;"),
    ), 1):  # fmt: skip
        assert words in text_of(client, payload, Sentry_Hook_Resource=resource)
        assert words in page_of(client, f"/errors/{number}")


def test_what_else_explains_a_crash_is_told_in_text_and_page(client):
    mechanism = {"type": "x", "meta": {"signal": {"name": "SIGSEGV"}}}
    error = raised("Crash", "x", frame("a.c", "f", 1), mechanism=mechanism)
    error["stacktrace"]["frames_omitted"] = [2, 950]
    client.deliver(event_payload(1, exception={"values": [error]}, **CLUES))
    text = client.get("/errors/1?format=text").text
    page = page_of(client, "/errors/1")
    for words in "SIGSEGV 950 cart.html total js_no_source main BLOCKED Pot.java".split():
        assert words in text and words in page, words
    assert text.index("cart.html") < text.index('File "a.c"')
    assert "\nlevel: x" not in text and "\x1b" not in text
    assert "errors" not in client.get("/errors/1").json


def test_the_text_has_no_section_for_what_says_nothing(client):
    nothing = {"user": {"id": None}, "breadcrumbs": [{}], "request": {"headers": []}}
    nothing |= {"tags": [["a", ""]], "extra": {"b": {}}, "contexts": {"os": {"type": "os"}}}
    text = text_of(client, event_payload(**nothing))
    assert text.endswith("the SDK that reported this sent none.\n")


def test_a_long_text_keeps_the_useful_and_says_what_is_left_out(client):
    long = "long words of somebody " * 100
    frames = [frame("x" * 90, f"f{number}", number, vars={long: long}) for number in range(200)]
    chain = [raised("Root", long, *frames), *[raised(f"E{n}", long, *frames[:9]) for n in range(9)]]
    event = {"exception": {"values": [*chain, raised("Main", long, *frames)]}, "user": {"id": "7"}}
    event |= {"breadcrumbs": [{"message": f"{n} {long}", "data": {"a": long}} for n in range(30)]}
    event |= {"extra": {f"{n}": long for n in range(200)}, "contexts": {long: {"a": long}}}
    text = text_of(client, event_payload(1, **event))
    main, *others = text.split("\n\n")[1:]
    shown = [int(number) for number in re.findall(r"in f(\d+)$", main, re.MULTILINE)][2:]
    assert main.startswith("exception:\n  Main: long words") and shown == list(range(shown[0], 200))
    assert re.search(r"\n  \[\d+ lines left out\]\n", main)
    assert len(text) > 6800
    names = [section.split(":")[0] for section in others]
    assert names.index("caused by (root)") < names.index("user")
    assert "\n  root cause: Root: long" in main
    assert re.search(
        r"\n\nleft out: parts of exception, .*; whole: http:.*/errors/1/payload\n$", text
    )


def test_a_list_as_text_has_a_line_for_each_row_and_leads_on(client):
    assert client.get("/errors?format=text").text == "no errors\n"
    assert client.get("/issues?format=text").text == "no issues\n"
    for number in range(5):
        client.deliver(issue_event(number, 9, title=f"title {number}\nx", culprit="c"))
    lines = client.get("/errors?format=text&limit=3").text.splitlines()
    at = client.get("/errors/5").json["received_at"]
    assert lines[0] == f"#5 {at} error title 4 x c"
    assert lines[3:] == ["next: http://localhost/errors?format=text&limit=3&before=3"]
    issues = client.get("/issues?format=text").text
    assert issues == f"#5 count 5, last seen {at}: 9 error title 4 x c\n"
