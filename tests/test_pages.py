"""The pages, looked at by a real Chromium."""

import copy
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter, deque
from contextlib import contextmanager
from urllib.parse import quote

import pytest
from conftest import SECRET, Server, event_payload, post, wait_for, wire

import collector

WINDOWS = [(380, "dark"), (1280, "light")]


class Browser:
    """A headless Chromium with one page, driven over a DevTools pipe: JSON messages that end with NUL."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --disable-dev-shm-usage --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars "
        # What makes a process for each page that is visited.
        "--disable-features=BackForwardCache,RenderDocument,SpareRendererForSitePerProcess "
        "--remote-debugging-pipe"
    ).split()

    def __init__(self, program, folder):
        ours, theirs = socket.socketpair()
        # Chromium reads at descriptor 3 and writes at 4.
        command = [
            "bash",
            "-c",
            'exec "$@" 3<&"$0" 4>&"$0"',
            str(theirs.fileno()),
            program,
            *self.FLAGS,
        ]
        with open(folder / "chromium.log", "wb") as log:
            self.process = subprocess.Popen(
                [*command, f"--user-data-dir={folder}/profile", "about:blank"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[theirs.fileno()], start_new_session=True,
            )  # fmt: skip
        theirs.close()
        self.pipe, self.left, self.number = ours, b"", 0
        self.messages, self.events, self.session = deque(), [], None
        self.dressed = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Log", "Runtime", "Accessibility", "Audits"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def receive(self, deadline):
        """Return the next message."""
        while not self.messages:
            self.pipe.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self.pipe.recv(1 << 20)
            assert data, "Chromium has ended"
            *whole, self.left = (self.left + data).split(b"\0")
            self.messages.extend(map(json.loads, whole))
        return self.messages.popleft()

    def send(self, method, **params):
        """Call a DevTools method; return the number of the call."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        self.pipe.sendall(json.dumps(message).encode() + b"\0")
        return self.number

    def call(self, method, seconds=20, **params):
        """Return what a DevTools method returns; keep the events that come before its answer."""
        number, deadline = self.send(method, **params), time.monotonic() + seconds
        while True:
            reply = self.receive(deadline)
            if reply.get("id") == number:
                assert "error" not in reply, reply
                return reply["result"]
            self.keep(reply)

    def keep(self, event):
        """Keep an event; close a dialog at once, because the page waits for that."""
        self.events.append(event)
        if event.get("method") == "Page.javascriptDialogOpening":
            self.send("Page.handleJavaScriptDialog", accept=True)

    def wait(self, method, count=1, seconds=20):
        """Wait until that many events of a name have come."""
        deadline = time.monotonic() + seconds
        while len(self.seen(method)) < count:
            self.keep(self.receive(deadline))

    def seen(self, method):
        """Return the parameters of the events of that name since the last visit began."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def visit(self, url):
        """Load a page; the events are those since then."""
        self.events.clear()
        self.call("Page.navigate", url=url)
        self.wait("Page.loadEventFired")

    def log_in(self, url, **reply):
        """Load a page, and give a reply where the browser would ask for a password."""
        self.events.clear()
        self.call("Fetch.enable", handleAuthRequests=True)
        try:
            self.send("Page.navigate", url=url)
            for event, answer, params in (
                ("Fetch.requestPaused", "Fetch.continueRequest", {}),
                ("Fetch.authRequired", "Fetch.continueWithAuth", {"authChallengeResponse": reply}),
            ):
                self.wait(event)
                self.call(answer, requestId=self.seen(event)[0]["requestId"], **params)
            self.wait("Page.loadEventFired")
        finally:
            self.call("Fetch.disable")

    def follow(self, link):
        """Click what a CSS selector finds, and wait for the page it leads to."""
        self.events.clear()
        self.run(f"document.querySelector({json.dumps(link)}).click()")
        self.wait("Page.loadEventFired")

    def run(self, script):
        """Return the value of an expression in the page."""
        reply = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def dress(self, width, scheme):
        """Set the width of the window and the colour scheme that the system prefers."""
        if self.dressed == (width, scheme):
            return
        self.dressed = width, scheme
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": scheme}],
        )

    def words(self, selector):
        """Return the text of what a CSS selector finds, as it is shown."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText.trim()")

    def press(self, key, code):
        """Press and release a key."""
        text = {"text": "\r"} if key == "Enter" else {}
        self.call(
            "Input.dispatchKeyEvent",
            type="keyDown",
            key=key,
            code=key,
            windowsVirtualKeyCode=code,
            **text,
        )
        self.call(
            "Input.dispatchKeyEvent", type="keyUp", key=key, code=key, windowsVirtualKeyCode=code
        )

    def fetched(self):
        """Return the URLs that were asked for since the last visit began."""
        return [event["request"]["url"] for event in self.seen("Network.requestWillBeSent")]

    def complaints(self):
        """Return what the console and the inspector say, but that the page itself came with an error's status."""
        entries = [event["entry"] for event in self.seen("Log.entryAdded")]
        words = [entry["text"] for entry in entries if "status of 40" not in entry["text"]]
        for name in (
            "Page.javascriptDialogOpening",
            "Runtime.consoleAPICalled",
            "Runtime.exceptionThrown",
            "Audits.issueAdded",
        ):
            words += map(str, self.seen(name))
        return words

    def close(self):
        """End Chromium with all its processes, which have nothing to save."""
        self.pipe.close()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def program(*names):
    """Return the path of the first program that is installed; without one skip the test, but in CI fail it."""
    for name in names:
        if shutil.which(name):
            return shutil.which(name)
    words = f"{names[0]} is not installed; Debian has it in a package of that name"
    return pytest.fail(words) if os.environ.get("CI") else pytest.skip(words)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(
        program("chromium", "chromium-browser", "google-chrome"),
        tmp_path_factory.mktemp("chromium"),
    )
    found.dress(1280, "light")
    yield found
    found.close()


@contextmanager
def served(tmp_path_factory, **settings):
    """Run a gunicorn on a folder of its own."""
    server = Server(tmp_path_factory.mktemp("server"), WEB_CONCURRENCY="2", **settings)
    try:
        yield server.start()
    finally:
        server.kill()


def root(server):
    return f"http://127.0.0.1:{server.port}"


def event_id(number):
    return f"{number:032x}"


def issue_event(number, issue, **event):
    """Return an error.created delivery of an issue."""
    url = f"https://sentry.example/api/0/organizations/tea/issues/{issue}/"
    return event_payload(event_id(number), issue_url=url, **event)


def frame(filename, function, lineno, in_app):
    return {
        "filename": filename, "function": function, "lineno": lineno, "in_app": in_app,
        "pre_context": ["def pour(self, cup):", "    kettle = self.kettle", ""],
        "context_line": f"    {function}(cup, self.water)", "post_context": ["    return cup", ""],
    }  # fmt: skip


CHAIN = {
    "title": "BrewError: the tea is cold",
    "culprit": "brew.pot in pour",
    "environment": "production",
    "release": "brew@1.2",
    "platform": "python",
    "web_url": "https://sentry.example/organizations/tea/issues/9/events/1/",
    "tags": [["server_name", "pot-1"], ["browser", "Lynx 2.9"]],
    "request": {"method": "POST", "url": "https://tea.example/pour", "query_string": "cup=2", "data": {"a": [1, None]}},
    "user": {"id": "7"},
    "contexts": {"runtime": {"name": "CPython"}, "list": [True, None]},
    "breadcrumbs": {"values": [{"timestamp": 1790000000, "category": "http", "data": {"status": 503}}]},
    "exception": {
        "values": [
            {
                "type": "OSError", "value": "no power",
                "stacktrace": {
                    "frames": [frame("lib/grid.py", "draw", 5, False), frame("lib/wire.py", "flow", 7, False)]
                },
            },
            {
                "type": "BrewError", "value": "the tea is cold", "mechanism": {"type": "generic", "handled": False},
                "stacktrace": {
                    "frames": [
                        frame("lib/run.py", "main", 11, False), frame("lib/run.py", "call", 13, False),
                        frame("brew/pot.py", "pour", 42, True), frame("lib/heat.py", "boil", 21, False),
                        frame("brew/water.py", "warm", 57, True) | {"vars": {"cup": "None", "size": [1, None]}},
                    ]
                },
            },
        ]
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """A server with 45 errors of one issue, two of them warnings, then two alone, then one with everything."""
    with served(tmp_path_factory) as server:
        for number in range(1, 46):
            level = "warning" if number in (1, 45) else "error"
            server.deliver(
                issue_event(
                    number, 9, title=f"KeyError: spoon {number}", level=level, environment="kitchen"
                )
            )
        server.deliver(issue_event(46, 10, title="IndexError: cup", environment="garden"))
        server.deliver(event_payload(event_id(47), title="Low on milk", level="info"))
        server.deliver(issue_event(48, 9, **CHAIN))
        yield server


@pytest.fixture(scope="module")
def closed(tmp_path_factory):
    """A server that lets nobody read without a token, and takes no delivery without a signature."""
    with served(tmp_path_factory, API_TOKEN="open sesame", SENTRY_CLIENT_SECRET=SECRET) as server:
        yield server


@pytest.fixture(scope="module")
def spare(tmp_path_factory):
    """A server to which tests deliver errors of their own."""
    with served(tmp_path_factory, MAX_BODY_BYTES="32000000") as server:
        yield server


# What is wrong with a page, as lists that should be empty, found with everything unfolded.
INSPECT = """(() => {
  document.querySelectorAll('details').forEach(each => each.open = true);
  const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const painted = new Map();
  const paint = colours => {
    const key = colours.join();
    if (!painted.has(key)) {
      context.clearRect(0, 0, 1, 1);
      for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
      painted.set(key, [...context.getImageData(0, 0, 1, 1).data].slice(0, 3));
    }
    return painted.get(key);
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
    && !element.closest('.hidden, .skip, svg, datalist'));
  const faint = [], wide = [];
  for (const element of shown) {
    const style = getComputedStyle(element);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    const texts = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (texts && contrast(style.color, behind(element)) < (large ? 3 : 4.5)) faint.push(name(element));
    if (element.placeholder && contrast(getComputedStyle(element, '::placeholder').color, behind(element)) < 4.5)
      faint.push('placeholder ' + element.placeholder);
    if (element.matches('input, button') && contrast(style.borderTopColor, behind(element.parentElement)) < 3)
      faint.push('border of ' + name(element));
    const box = element.getBoundingClientRect();
    const spills = element.clientWidth && element.scrollWidth > element.clientWidth + 1 && !element.matches('input');
    if (spills || box.right > innerWidth + .5 || box.left < -.5) wide.push(name(element));
  }
  if (document.documentElement.scrollWidth > innerWidth) wide.push('the page');
  const unlabelled = [...document.querySelectorAll('input:not([type=hidden])')].filter(each => !each.labels.length);
  return {faint, wide, unlabelled: unlabelled.map(name), headings: document.querySelectorAll('h1').length};
})()"""
LANDMARKS = ["banner", "contentinfo", "main"]
NAMED = (
    "button",
    "combobox",
    "image",
    "link",
    "navigation",
    "region",
    "search",
    "searchbox",
    "table",
    "textbox",
)


def inspect(browser, url, width, scheme):
    """Return what can be said of a page at a width in a colour scheme; load it if it is not there."""
    browser.dress(width, scheme)
    if browser.run("location.href") != url:
        browser.visit(url)
    return describe(browser)


def read_aloud(browser):
    """Return what a screen reader is told of: roles and names."""
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    return [
        (node["role"]["value"], node.get("name", {}).get("value"))
        for node in nodes
        if not node["ignored"]
    ]


def describe(browser):
    """Return what can be said of the page as it is."""
    report, nodes = browser.run(INSPECT), read_aloud(browser)
    return report | {
        "nameless": [
            role for role, name in nodes if role in NAMED and role != "search" and not name
        ],
        "landmarks": sorted(role for role, _ in nodes if role in LANDMARKS),
        "has navigation": ("navigation", "Main") in nodes,
        "complaints": browser.complaints(),
        "fetched": browser.fetched(),
    }


def sound(url):
    """Return what is said of a page without fault."""
    return {
        "faint": [], "wide": [], "unlabelled": [], "nameless": [], "headings": 1, "landmarks": LANDMARKS,
        "has navigation": True, "complaints": [], "fetched": [url],
    }  # fmt: skip


PAGES = "/ /errors /issues /errors/latest /errors?level=error&q=spoon&environment=kitchen&since=7d"
SMALL_PAGES = "/errors?q=nothing /issues?q=nothing /errors/47 /errors/999 /errors?limit=many"


@pytest.mark.parametrize("path", PAGES.split())
def test_a_page_is_sound_at_each_width_and_in_each_colour_scheme(browser, shop, path):
    url = root(shop) + path
    for width, scheme in WINDOWS:
        assert inspect(browser, url, width, scheme) == sound(url)


@pytest.mark.parametrize("path", SMALL_PAGES.split())
def test_a_page_of_few_words_is_sound_on_a_phone_in_the_dark(browser, shop, path):
    url = root(shop) + path
    assert inspect(browser, url, *WINDOWS[0]) == sound(url)


def test_the_empty_list_is_sound_and_leads_on(browser, closed):
    browser.call("Network.setExtraHTTPHeaders", headers={"Authorization": "Bearer open sesame"})
    try:
        assert inspect(browser, f"{root(closed)}/errors", 380, "dark") == sound(
            f"{root(closed)}/errors"
        )
        browser.follow("main a[href='/']")
        assert browser.run("document.querySelector('#first').textContent") == "Get your first error"
    finally:
        browser.call("Network.setExtraHTTPHeaders", headers={})


def test_who_has_no_token_gets_a_sound_page(browser, closed):
    url = f"{root(closed)}/errors"
    browser.dress(380, "dark")
    browser.log_in(url, response="CancelAuth")
    assert describe(browser) == sound(url)
    assert browser.words("h1") == "A token is needed"


def test_the_browser_asks_for_the_token_and_takes_it_as_password(browser, closed):
    url = f"http://localhost:{closed.port}/errors"  # another host, because the browser keeps the password
    browser.log_in(url, response="ProvideCredentials", username="anybody", password="open sesame")
    assert browser.words("h1") == "Errors"


def focus(browser):
    """Return what has the focus: its tag, class and id, and whether it is to be seen."""
    return browser.run(
        "(() => { const it = document.activeElement, box = it.getBoundingClientRect();"
        " return [it.tagName, it.className, it.id, box.width > 20 && box.height > 10 && box.top >= 0]; })()"
    )


def test_the_first_tab_reaches_the_skip_link(browser, shop):
    browser.visit(f"{root(shop)}/errors")
    assert browser.run("document.querySelector('.skip').getBoundingClientRect().width") <= 1
    browser.press("Tab", 9)
    assert focus(browser) == ["A", "skip", "", True]
    browser.press("Enter", 13)
    wait_for(lambda: focus(browser)[:3] == ["MAIN", "", "main"])


def test_every_stop_of_the_tab_key_is_marked(browser, shop):
    browser.dress(1280, "light")
    browser.visit(f"{root(shop)}/errors/48")
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    outline = "(() => { const style = getComputedStyle(document.activeElement);"
    outline += " return [document.activeElement.tagName, parseFloat(style.outlineWidth) >= 2 && style.outlineStyle]; })()"
    stops = []
    while not stops or stops[-1][0] != "BODY":
        browser.press("Tab", 9)
        stops.append(browser.run(outline))
        assert len(stops) < 100
    assert {tag for tag, _ in stops} == {"A", "INPUT", "BUTTON", "SUMMARY", "BODY"}
    assert {style for _, style in stops[:-1]} == {"solid"}


def test_the_pages_work_without_javascript(browser, shop):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.visit(f"{root(shop)}/errors")
        for _ in range(6):
            browser.press("Tab", 9)
        assert focus(browser)[2] == "nav-q"
        browser.call("Input.insertText", text="low milk")
        browser.events.clear()
        browser.press("Enter", 13)
        browser.wait("Page.loadEventFired")
        assert browser.run(
            "[...document.querySelectorAll('td a')].map(each => each.textContent)"
        ) == ["Low on milk"]
        for key, code in [("Tab", 9)] * 10 + [("Enter", 13)]:
            browser.press(key, code)
        assert browser.run("document.querySelector('.filters').open")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_an_error_is_readable_without_the_stylesheet(browser, shop):
    browser.dress(380, "light")
    browser.visit(f"{root(shop)}/errors/48")
    browser.run("document.querySelector('style').remove()")
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    words = browser.words("body")
    order = [
        "Skip to the content", "Issues", "Search all errors", "newest error", "older",
        "BrewError: the tea is cold", "error", "production", "brew@1.2", "46 times", "Open in Sentry",
        "To the crash", "Stack trace", "the tea is cold", "2 library frames",
        "brew/pot.py, line 42, in pour", "in app", "brew/water.py, line 57, in warm", "crashed here",
        "54 def pour(self, cup):", "crash line: 57     warm(cup, self.water)", "2 variables", "cup",
        "caused by (innermost) OSError", "no power", "Request", "cup=2", "About", "Tags", "pot-1",
        "User", "Contexts", "Breadcrumbs", "status 503", "The same issue", "All errors of this issue",
        "configuration",
    ]  # fmt: skip
    place = 0
    for part in order:
        assert part in words[place:], words[place:]
        place = words.index(part, place)


def test_tables_stay_tables_on_a_phone(browser, shop):
    browser.dress(380, "light")
    browser.visit(f"{root(shop)}/errors?level=warning")
    roles = Counter(role for role, _ in read_aloud(browser))
    assert [roles[role] for role in ("table", "row", "columnheader", "cell")] == [1, 3, 5, 8]


def test_the_stack_trace_opens_what_matters(browser, shop):
    browser.dress(1280, "light")
    browser.visit(f"{root(shop)}/errors/48")
    trace = browser.run("""[...document.querySelectorAll('.exception')].map(exception => ({
      heading: exception.querySelector('h3').innerText.replace(/\\s+/g, ' '),
      value: exception.querySelector('.message').innerText,
      runs: [...exception.querySelector('.frames').children].map(item => [
        item.querySelector('summary').innerText.replace(/\\s+/g, ' '), item.querySelector('details').open,
        [...item.querySelectorAll('details details')].length,
        item.querySelector('.hot .number')?.lastChild.data ?? '']),
    }))""")
    assert trace == [
        {
            "heading": "BrewError",
            "value": "the tea is cold",
            "runs": [
                ["2 library frames", False, 2, "11"],
                ["brew/pot.py, line 42, in pour in app", False, 0, "42"],
                ["1 library frame", False, 1, "21"],
                ["brew/water.py, line 57, in warm in app crashed here", True, 1, "57"],
            ],
        },
        {
            "heading": "caused by (innermost) OSError",
            "value": "no power",
            "runs": [
                ["1 library frame", False, 1, "5"],
                ["lib/wire.py, line 7, in flow crashed here", True, 0, "7"],
            ],
        },
    ]
    lines = browser.run("""document.querySelector('#crash .source').innerText""")
    assert re.findall(r"\d+", lines) == ["54", "55", "56", "57", "58", "59"]
    mark = "getComputedStyle(document.querySelector('details[open] > .source .line{}')).backgroundColor"
    assert browser.run(mark.format(".hot")) != browser.run(mark.format(":not(.hot)"))


def links(browser, selector):
    """Return the paths and queries that links lead to."""
    return browser.run(
        f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.pathname + each.search)"
    )


def numbers(browser, selector=".rows td:first-child a"):
    """Return the ids of the errors that links lead to."""
    return [int(re.match(r"/errors/(\d+)", path)[1]) for path in links(browser, selector)]


def test_an_error_leads_to_its_neighbours_its_issue_and_its_other_forms(browser, shop):
    browser.visit(f"{root(shop)}/errors/46")
    assert links(browser, ".turn a") == ["/errors/47", "/errors/45"]
    assert not links(browser, "#siblings")
    browser.follow(".turn a[rel=next]")
    assert browser.words("h1") == "KeyError: spoon 45"
    assert browser.words(".seen").startswith("Its issue was seen 46 times here, first")
    assert numbers(browser, "[aria-labelledby=siblings] td a") == [48, *range(44, 35, -1)]
    browser.follow("section[aria-labelledby=siblings] > p a")
    assert browser.words("figcaption").startswith("46 errors that match")
    browser.visit(f"{root(shop)}/errors/latest")
    assert browser.words("nav.turn").split("\n")[0] == "newest error"
    assert browser.run("document.querySelector('.button.main').href") == CHAIN["web_url"]
    assert links(browser, ".actions a[href*=errors]") == [
        "/errors/48?format=text",
        "/errors/48?format=json",
        "/errors/48/payload",
    ]
    alternates = "[...document.querySelectorAll('link[rel=alternate]')].map(each => each.type)"
    assert browser.run(alternates) == ["text/plain", "application/json"]
    browser.follow(".actions a[href*=text]")
    assert browser.words("body").startswith("error: 48\ntitle: BrewError: the tea is cold\n")


def test_newer_and_older_stay_within_the_issue_or_filter_one_came_from(browser, shop):
    browser.visit(f"{root(shop)}/errors?level=warning")
    browser.follow(".rows td a")
    walked = [browser.words("h1")]
    browser.follow(".turn a[rel=next]")
    walked.append(browser.words("h1"))
    assert walked == ["KeyError: spoon 45", "KeyError: spoon 1"]
    assert browser.words(".turn").split("\n")[1] == "among level warning"
    assert browser.words(".turn").endswith("oldest error of these")
    browser.follow(".turn a[rel=prev]")
    assert browser.words("h1") == walked[0]

    browser.visit(f"{root(shop)}/errors/45")
    browser.follow("[aria-labelledby=siblings] td a")
    browser.follow(".turn a[rel=next]")
    assert browser.words("h1") == "KeyError: spoon 45"


def test_the_crash_is_in_sight_without_scrolling_past_a_hundred_frames(browser, spare):
    browser.dress(1280, "light")
    frames = [frame(f"lib/{number}.py", "call", number, number % 9 == 0) for number in range(200)]
    frames[150] |= {"in_app": True, "filename": "brew/own.py"}
    for number in range(151, 200):
        frames[number]["in_app"] = False
    for number, last in enumerate((200, 151), 1):
        stack = {"type": "E", "value": "v", "stacktrace": {"frames": frames[:last]}}
        error = spare.deliver(event_payload(event_id(number), exception={"values": [stack]}))[1]
        browser.visit(root(spare) + error["url"])
        shown = browser.run("document.querySelector('#crash summary').innerText")
        assert shown.startswith("brew/own.py, line 150, in call")
        assert browser.run("document.querySelector('#crash').getBoundingClientRect().bottom") < 900
        opened = "document.querySelectorAll('.frame > details[open]').length"
        assert browser.run(opened) == (2 if last == 200 else 1)
        browser.run("document.querySelector('.actions a[href=\"#crash\"]').click()")
        wait_for(lambda: browser.run("document.querySelector(':target')?.id") == "crash")


def test_json_is_shown_as_json(browser, shop):
    browser.visit(f"{root(shop)}/errors/48")
    browser.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    words = browser.words("main")
    for part in ('"a": [\n    1,\n    null\n  ]', "[1, null]", "[true, null]"):
        assert part in words
    assert not re.search(r"\bNone\b(?!\n)|\bTrue\b|\{'", words.replace("\nNone", ""))


def test_the_bars_of_the_chart_lead_to_their_time(browser, shop):
    browser.visit(f"{root(shop)}/errors")
    counts = browser.run(
        "[...document.querySelectorAll('svg a')].map(each => parseInt(each.getAttribute('aria-label')))"
    )
    assert sum(counts) == 48
    assert browser.words(".axis").split("\n") == [f"{max(counts)}", "0"]
    target = browser.run("document.querySelector('svg a').href.baseVal")
    browser.visit(root(shop) + target)
    assert browser.words("figcaption").startswith(f"{counts[0]} error")


def test_issues_lead_to_their_errors(browser, shop):
    browser.visit(f"{root(shop)}/errors")
    browser.follow("header a")
    assert browser.words("h1") == "Issues"
    rows = browser.run(
        "[...document.querySelectorAll('tbody tr')].map(row => [row.querySelector('a').innerText,"
        " row.querySelector('.right').innerText])"
    )
    assert rows == [["BrewError: the tea is cold", "46"], ["IndexError: cup", "1"]]
    browser.follow("td.right a")
    assert browser.words("figcaption").startswith("46 errors that match")
    browser.visit(f"{root(shop)}/issues?q=brewerror&limit=1")
    assert [chip.split()[:2] for chip in browser.words(".chips").split("\n")] == [
        ["words", "brewerror"], ["show", "all"]
    ]  # fmt: skip
    browser.follow(".rows td a")
    assert browser.words("h1") == "BrewError: the tea is cold"
    assert browser.words(".turn").split("\n")[-1].startswith("older")


def test_no_word_is_broken_in_a_table(browser, shop):
    for path in ("/errors", "/issues", "/"):
        browser.visit(root(shop) + path)
        for width in (380, 700, 1000, 1280):
            browser.dress(width, "light")
            broken = browser.run("""(() => {
              const broken = [], range = document.createRange();
              const walker = document.createTreeWalker(document.querySelector('table'), NodeFilter.SHOW_TEXT);
              while (walker.nextNode()) for (const match of walker.currentNode.data.matchAll(/[\\w]+/g)) {
                range.setStart(walker.currentNode, match.index);
                range.setEnd(walker.currentNode, match.index + match[0].length);
                const tops = [...range.getClientRects()].filter(each => each.width).map(each => each.top);
                if (new Set(tops).size > 1) broken.push(match[0]);
              }
              return broken;
            })()""")
            assert broken == [], (width, path)


def test_the_pages_of_a_list_keep_its_filters(browser, shop):
    seen, turned = [], 0
    browser.visit(f"{root(shop)}/errors?q=spoon&level=error&environment=kitchen&limit=20")
    while True:
        seen += numbers(browser)
        assert set(
            browser.run(
                "[...document.querySelectorAll('.rows td:nth-child(2)')].map(each => each.innerText)"
            )
        ) == {"error"}
        chips = [item.split() for item in browser.words(".chips").split("\n")]
        assert [chip[:2] for chip in chips] == [
            ["words", "spoon"], ["level", "error"], ["environment", "kitchen"], ["show", "all"]
        ]  # fmt: skip
        if not links(browser, ".turn a[rel=next]"):
            break
        browser.follow(".turn a[rel=next]")
        turned += 1
    assert seen == list(range(44, 1, -1))
    while links(browser, ".turn a[rel=prev]"):
        browser.follow(".turn a[rel=prev]")
        turned -= 1
    assert turned == 0
    browser.follow(".chips li:nth-child(2) a")
    assert links(browser, "main") is not None
    assert browser.run("new URL(location).search") == "?q=spoon&environment=kitchen&limit=20"


def test_the_form_of_filters_starts_with_those_in_force(browser, shop):
    browser.visit(f"{root(shop)}/errors?level=warning&limit=1")
    browser.run("document.querySelector('[name=environment]').value = 'kitchen'")
    browser.follow(".filters button")
    query = "new URLSearchParams([...new URLSearchParams(location.search)].filter(([, value]) => value)).toString()"
    assert browser.run(query) == "level=warning&environment=kitchen&limit=1"
    assert numbers(browser) == [45]


@pytest.mark.parametrize(("secret", "tools"), [("", ["curl"]), (SECRET, ["curl", "openssl"])])
def test_the_empty_start_leads_to_the_first_error(browser, make_server, secret, tools):
    for tool in tools:
        program(tool)
    server = make_server(SENTRY_CLIENT_SECRET=secret)
    browser.visit(f"{root(server)}/")
    command, env = (
        browser.words(".command"),
        {"PATH": os.environ["PATH"], "SENTRY_CLIENT_SECRET": secret},
    )
    reply = subprocess.run(
        ["sh", "-c", command], env=env, capture_output=True, check=True, timeout=20
    )
    assert json.loads(reply.stdout) == {"status": "stored", "id": 1, "url": "/errors/1"}
    browser.follow("#first ~ p a")
    assert browser.words("h1") == "My first error"
    browser.visit(f"{root(server)}/")
    assert browser.words(".rows a") == "My first error"
    assert browser.run("document.querySelector('.command')") is None


def test_a_page_refreshes_only_if_asked(browser, shop):
    browser.dress(1280, "light")
    for path in ("/errors", "/errors/latest"):
        browser.visit(root(shop) + path)
        assert browser.run("document.querySelector('meta[http-equiv]')") is None
        browser.follow("a[href*=refresh]")
        assert browser.run("document.querySelector('meta[http-equiv=refresh]').content") == "30"
        assert browser.words("main").endswith("30 seconds; stop.")
    browser.visit(f"{root(shop)}/errors/latest?level=error&q=spoon")
    assert links(browser, "a[href*=refresh]") == ["/errors/latest?level=error&q=spoon&refresh=30"]


# --------------------------------------------------------------------------------------------------
# Hostile text
# --------------------------------------------------------------------------------------------------

ELSEWHERE = "http://127.0.0.1:9"
UNSEEN = "\0\x07\x1b[31m\x7f\x9b\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2069\ufeff"
ATTACKS = [
    "<script>window.ran=1;alert(1)</script>",
    "javascript:window.ran=1;alert(1)",
    "data:text/html,<script>alert(1)</script>",
    f"<script src={ELSEWHERE}/s></script>",
    f"<img src={ELSEWHERE}/i onerror=window.ran=1>",
    "<svg onload=window.ran=1><script>window.ran=1</script></svg>",
    f"<iframe src={ELSEWHERE}/f srcdoc='<script>parent.ran=1</script>'></iframe>",
    "<details open ontoggle=window.ran=1><summary>x</summary></details>",
    f"</title></style></pre></code></textarea><style>@import '{ELSEWHERE}/c';*{{background:url({ELSEWHERE}/b)}}",
    f"<link rel=stylesheet href={ELSEWHERE}/l><base href={ELSEWHERE}/>",
    f"<meta http-equiv=refresh content='0;url={ELSEWHERE}/m'>",
    '" autofocus onfocus=window.ran=1 x="',
    "' autofocus onfocus=window.ran=1 style='position:fixed;inset:0' x='",
    "` onfocus=window.ran=1 javascript:window.ran=1//",
    "<a href='javascript:window.ran=1' id=main>x</a><form action="
    + ELSEWHERE
    + "><button>x</button></form>",
    "--><!--]]><![CDATA[",
    "&lt;script&gt;&#60;img src=x onerror=window.ran=1&#62;&quot;&apos;",
    "{{1234567*7}}{% debug %}{{ config }}${1234567*7}#{1234567*7}<%= 1234567*7 %>",
    UNSEEN,
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
]
EVERYTHING = "".join(ATTACKS)


def spread(value, hostile):
    """Return a copy of a JSON value with every text in it replaced."""
    if isinstance(value, dict):
        return {key: spread(item, hostile) for key, item in value.items()}
    if isinstance(value, list):
        return [spread(item, hostile) for item in value]
    return hostile if isinstance(value, str) else value


def hostile_payload(number, hostile):
    """Return a delivery with a text in every field that a page shows."""
    words = dict.fromkeys(
        "title message culprit level platform logger environment release dist location type".split(),
        "x",
    )
    event = (
        copy.deepcopy(CHAIN)
        | words
        | {"metadata": dict.fromkeys(("type", "value", "title", "filename"), "x")}
    )
    event["exception"]["values"][0]["mechanism"] = {"type": "x", "handled": "x"}
    crumb = dict.fromkeys(("category", "level", "message", "type"), "x")
    event["breadcrumbs"]["values"] = [
        crumb | {"data": "x"},
        crumb | {"data": {"a": {"b": ["x"]}}},
        {"data": ["x"]},
    ]
    issue = {
        "title": "x",
        "culprit": "x",
        "level": "x",
        "status": "x",
        "shortId": "x",
        "permalink": "x",
        "project": {},
    }
    issue["project"] = {"id": "x", "slug": "x", "name": "x", "platform": "x"}
    payload = {
        "action": "created",
        "data": {"error": event, "issue": issue, "triggered_rule": "x"},
        "actor": {"name": "x", "id": "x"},
    }
    payload = spread(payload, hostile)
    error = payload["data"]["error"]
    error["tags"] = [[hostile, hostile], *([f"{index}{hostile}", hostile] for index in range(3))]
    error["breadcrumbs"]["values"][1]["data"][hostile] = hostile
    error |= {"event_id": f"{number}{hostile}", "issue_id": ATTACKS[0]}
    return payload | {"action": "created"}


PERMALINKS = [
    "javascript:window.ran=1", " javascript:window.ran=1", "JaVaScRiPt:window.ran=1", "java\nscript:window.ran=1",
    "data:text/html,<script>window.ran=1</script>", "vbscript:x", "file:///etc/passwd", "//evil.example/",
    "/errors", "x", "https://x/ onclick=window.ran=1", "https://x\njavascript:window.ran=1", "http:evil.example",
]  # fmt: skip
QUOTES = "tea \"or\" 'pot'/cup?q=1&level=<b>#50%2B+;\\"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A server with errors that attack whoever looks at them, the newest with all at once."""
    with served(tmp_path_factory) as server:
        for number, attack in enumerate([*ATTACKS, EVERYTHING], 1):
            assert server.deliver(hostile_payload(number, attack))[0] == 201
        yield server


# What a page may consist of, whatever is in the database.
ANATOMY = """(async () => {
  document.querySelectorAll('details').forEach(each => each.open = true);
  document.querySelectorAll('a, input, button, summary').forEach(each => each.focus());
  await new Promise(done => setTimeout(done, 5));
  return {
    tags: [...new Set([...document.querySelectorAll('*')].map(each => each.localName))].sort(),
    attributes: [...new Set([...document.querySelectorAll('*')].flatMap(each => each.getAttributeNames()))].sort(),
    schemes: [...new Set([...document.querySelectorAll('[href], [src], [action]')].map(each =>
      new URL(each.href?.baseVal ?? each.href ?? each.src ?? each.action, location).protocol))].sort(),
    styles: document.styleSheets.length,
    forms: [...new Set([...document.forms].map(each => each.getAttribute('action')))],
    ran: window.ran ?? null, text: document.title + document.documentElement.textContent,
  };
})()"""
TAGS = set(
    "html head meta title link style body a header nav form label input button main footer h1 h2 h3 p b bdi br span "
    "time section div pre code ol ul li details summary dl dt dd table caption thead tbody tr th td figure svg rect "
    "figcaption datalist option".split()
)
ATTRIBUTES = set(
    "lang charset name content href rel class id action role for type placeholder value tabindex aria-label "
    "aria-current aria-hidden aria-labelledby dir datetime title scope open list viewBox preserveAspectRatio x y width "
    "height".split()
)


def disarmed(browser, url):
    """Return a page's anatomy, less what it may consist of whatever is in the database."""
    browser.visit(url)
    page = browser.run(ANATOMY)
    return {
        "tags": set(page["tags"]) - TAGS,
        "attributes": set(page["attributes"]) - ATTRIBUTES,
        "schemes": set(page["schemes"]) - {"http:", "data:"},
        "unseen": set(page["text"]) & (set(UNSEEN) - set("[31m")),
        "computed": "8641969" in page["text"],
        "ran": page["ran"],
        "styles": page["styles"],
        "forms": set(page["forms"]) - {"/errors", "/issues"},
        "complaints": browser.complaints(),
        "fetched": browser.fetched(),
    }


def harmless(url):
    """Return what is left of a page in which nothing has become more than text."""
    nothing = {key: set() for key in ("tags", "attributes", "schemes", "unseen", "forms")}
    return nothing | {
        "computed": False,
        "ran": None,
        "styles": 1,
        "complaints": [],
        "fetched": [url],
    }


@pytest.fixture
def without_policy(browser):
    """Let the browser know no Content-Security-Policy: escaping has to do alone."""
    browser.call("Page.setBypassCSP", enabled=True)
    yield
    browser.call("Page.setBypassCSP", enabled=False)


@pytest.mark.usefixtures("without_policy")
def test_hostile_text_in_every_field_stays_text(browser, hostile):
    for number in (1, 2, 12, len(ATTACKS) + 1):
        url = f"{root(hostile)}/errors/{number}"
        assert disarmed(browser, url) == harmless(url)


@pytest.mark.usefixtures("without_policy")
@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("/errors?q={0}&project={1}&environment={2}", 3),
        ("/errors?since={0}{1}{2}", 7),
        ("/errors?{0}={1}&x={2}", 7),
        ("/{0}/{1}/{2}", 7),
    ],
)
def test_hostile_requests_get_harmless_pages(browser, hostile, path, step):
    attacks = [quote(attack.replace("\0", ""), safe="") for attack in [*ATTACKS, "x"]]
    for number in range(0, len(attacks), step):
        url = root(hostile) + path.format(*attacks[number : number + 3])
        assert disarmed(browser, url) == harmless(url)


@pytest.mark.parametrize("path", ["/", "/errors", "/issues", "/errors/latest"])
def test_hostile_text_gives_the_policy_no_cause_to_complain(browser, hostile, path):
    url = root(hostile) + path
    assert disarmed(browser, url) == harmless(url)
    assert inspect(browser, url, *WINDOWS[0]) == sound(url)


def test_the_policy_lets_nothing_run_or_load(browser, hostile):
    url = f"{root(hostile)}/errors"
    browser.visit(url)
    browser.run("""document.body.insertAdjacentHTML('beforeend', `<img src=/a><iframe src=/b></iframe><object data=/c>
      </object><link rel=stylesheet href=/d><b style='color: red' onclick='window.ran=1' id=last>x</b>`)""")
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {src: '/e'}))"
    )
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran=1'}))"
    )
    browser.run("document.querySelector('#last').click()")
    assert browser.run("fetch('/f').then(() => 'sent', () => 'held back')") == "held back"
    assert browser.run("[window.ran ?? null, document.querySelector('#last').style.color]") == [
        None,
        "",
    ]
    answered = [event["response"]["url"] for event in browser.seen("Network.responseReceived")]
    assert [each for each in answered if not each.startswith("data:")] == [
        url
    ]  # Chromium's own pictures for a frame


def test_what_reorders_or_hides_text_is_shown_instead(browser, hostile):
    browser.visit(f"{root(hostile)}/errors/{ATTACKS.index(UNSEEN) + 1}")
    shown = "".join(
        "\ufffd" if sign == "\0" else f"U+{ord(sign):04X}" for sign in UNSEEN.replace("[31m", "")
    )
    assert browser.words("h1").replace("[31m", "") == shown
    assert browser.run("document.title").startswith("\ufffdU+0007U+001B[31mU+007F")


def test_text_that_runs_from_right_to_left_stays_in_its_place(browser, hostile):
    browser.visit(f"{root(hostile)}/errors/{len(ATTACKS)}")
    assert browser.words("h1") == ATTACKS[-1]
    assert browser.run("getComputedStyle(document.querySelector('h1 bdi')).direction") == "rtl"
    assert browser.run("getComputedStyle(document.querySelector('main')).direction") == "ltr"


@pytest.mark.parametrize("permalink", PERMALINKS)
def test_only_web_addresses_become_links(client, permalink):
    post(client, event_payload(web_url=permalink, request={"url": permalink, "method": "GET"}))
    page = client.get("/errors/1", headers={"Accept": "text/html"}).text
    assert "Open in Sentry" not in page
    assert {target[0] for target in re.findall(r"""href=["']?([^"'>]*)""", page)} == {"/", "#", "d"}


def test_any_project_and_environment_can_be_filtered_by(browser, spare):
    payload = event_payload(event_id(3), environment=QUOTES)
    payload["data"]["issue"] = {"project": {"slug": QUOTES}}
    error = spare.deliver(payload)[1]
    spare.deliver(event_payload(event_id(4), environment="other"))
    for link, left in (
        (".meta a[href*=project]", {}),
        (".meta a[href*=environment]", {"environment": QUOTES}),
    ):
        browser.visit(root(spare) + error["url"])
        assert browser.words(link) == QUOTES
        kind = "project" if "project" in link else "environment"
        for step in (link, f".counts a[href*={kind}]"):
            browser.follow(step)
            assert numbers(browser) == [error["id"]]
            assert browser.words(".chips b") == QUOTES
        browser.follow(".chips a")
        assert browser.run("Object.fromEntries(new URLSearchParams(location.search))") == left


def test_huge_values_are_cut_with_a_way_to_the_rest(browser, spare):
    payload = hostile_payload(1, "x" * 100_000)
    error, lines = payload["data"]["error"], ["line" * 500] * 300
    del error["breadcrumbs"]
    error["tags"] = [[f"key{number}", "value" * 100] for number in range(3000)]
    frames = [
        {"function": f"call{number}", "in_app": True, "lineno": number, "context_line": "c" * 500}
        for number in range(3000)
    ]
    frames[-1] |= {"pre_context": lines, "post_context": lines}
    crash = {"type": "E", "value": "v" * 100_000, "stacktrace": {"frames": frames}}
    error["exception"] = {"values": [*({"type": f"Cause{number}"} for number in range(200)), crash]}
    body = wire(payload)
    path = spare.deliver(body)[1]["url"]
    url = root(spare) + path
    assert inspect(browser, url, 380, "light") == sound(url)
    assert browser.run("document.documentElement.outerHTML.length") < 1_000_000
    sizes = "['.exception', '.frame', '#tags ~ dl dt'].map(each => document.querySelectorAll(each).length)"
    assert browser.run(sizes) == [10, 251, 100]
    words = browser.words("main")
    for part in (
        "2,750 older frames cut",
        "41 more exceptions are",
        "101 more are left out here",
        "Cut here; the payload has all",
    ):
        assert part in words
    shown = browser.run(
        "[...document.querySelectorAll('.crash .number')].map(each => +each.lastChild.data)"
    )
    assert shown == list(range(2993, 3006))
    assert f"{path}/payload" in links(browser, "main a")
    assert spare.request("GET", f"{path}/payload")[2] == body


def test_a_value_of_nothing_but_hidden_characters_is_shown_by_their_number():
    shown = collector.visible("a" + "\x7f" * 2000, 3000)
    assert "\x7f" not in shown
    assert "2,000 hidden characters" in shown and len(shown) < 200
