"""The README: its commands run as they stand there, and what it names is all there is."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, Server, event_payload, wait_for

from collector import DEFAULTS, create_app, read_settings

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
PROGRAMS = (
    ".venv/bin/",
    "cloudflared ",
    "curl ",
    "docker ",
    "journalctl ",
    "kill ",
    "sqlite3 ",
    "sudo ",
)
NOT_RUN = {  # what a command begins with or holds, and why it is not run here
    "cloudflared": "needs a public address",
    "https://errors.example.com": "needs a public address",
    "docker": "needs Docker",
    "sudo": "needs root and systemd",
    "journalctl": "needs systemd",
    "kill": "needs the number of a process",
    "tests/benchmark.py": "takes minutes",
    "pip install": "installs packages, as CI does; its last part starts the service of these tests",
}


def fences(language):
    """Return the texts of the fences of a language, in the README's order."""
    return [text for name, text in FENCES if name == language]


def read_commands():
    """Return every command of the README, in its order; a loop is one, and cron's is what cron runs."""
    commands = []
    for language, text in FENCES:
        if language == "sh":
            is_loop = "while" in text
            commands += [text] if is_loop else text.splitlines()
        elif language == "cron":
            commands.append(text.split(" ", 5)[5].replace(r"\%", "%"))
    inline = re.findall(r"`([^`\n]+)`", PROSE)
    return commands + [code for code in inline if code.startswith(PROGRAMS)]


def reason_not_to_run(command):
    """Return why a command is not run here, or None if it is."""
    for part, reason in NOT_RUN.items():
        if part in command:
            return reason
    return None


COMMANDS = read_commands()
SERVERS = [command for command in COMMANDS if command.endswith(".venv/bin/gunicorn")]
SKIPPED = [command for command in COMMANDS if reason_not_to_run(command)]
LOOPS = [command for command in COMMANDS if "while" in command]
PLAIN = [command for command in COMMANDS if command not in [*SERVERS, *SKIPPED, *LOOPS]]


class Checkout(Server):
    """A copy of the checkout, in which the README's commands run; 8000 becomes a free port."""

    def __init__(self, folder):
        names = (
            "collector.py worker.py schema.sql gunicorn.conf.py templates tests/payloads".split()
        )
        folder.mkdir()
        for name in names:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
        super().__init__(folder)
        del self.env["DATABASE_URL"], self.env["PYTHONPATH"]
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)  # each command would compile the module anew

    def command(self, text):
        """Return the arguments and options that run a text of the README in this checkout."""
        text = text.replace("localhost:8000", f"localhost:{self.port}")
        text = text.replace("/opt/collector", str(self.folder))
        return {"cwd": self.folder, "env": self.env, "args": ["bash", "-c", text]}

    def run(self, text):
        """Run a text of the README; return what it printed, or fail if it failed."""
        done = subprocess.run(
            **self.command(text), capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        return done.stdout

    def begin(self, text, log):
        """Start a program of the README, what it prints going to the file `log`."""
        with log.open("ab") as output:
            return subprocess.Popen(
                **self.command(text), stdout=output, stderr=output, start_new_session=True
            )

    def start(self, text):
        self.process = self.begin(text, self.log)
        wait_for(self.is_up, 20)
        return self


@pytest.fixture(scope="module")
def make_checkout(tmp_path_factory):
    """Return a function that starts the service in a new copy of the checkout."""
    checkouts = []

    def make(command):
        checkouts.append(Checkout(tmp_path_factory.mktemp("readme") / "checkout"))
        return checkouts[-1].start(command)

    yield make
    for checkout in checkouts:
        checkout.kill()


@pytest.fixture(scope="module")
def checkout(make_checkout):
    """Return a checkout whose service the README's first command has started, its packages installed."""
    return make_checkout(SERVERS[0].rpartition("&& ")[2])


def need(*programs):
    """Skip the test if a program is not installed."""
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"needs {program}")


def as_pattern(shown):
    """Return the regular expression of an output that is shown with "..." for what is left out."""
    lines = [re.escape(line) for line in shown.splitlines()]
    return "\n".join(".*" if line == r"\.\.\." else line for line in lines)


def test_the_readme_is_short():
    assert len(README.split()) <= 1300
    assert README.count("\n") <= 180
    assert "```sh" in "\n".join(README.splitlines()[:10])


def test_the_commands_are_read():
    assert (len(SERVERS), len(LOOPS)) == (2, 1)
    assert (len(PLAIN), len(SKIPPED)) > (4, 8)


@pytest.mark.parametrize("command", SKIPPED)
def test_what_cannot_run_here_says_why(command):
    pytest.skip(reason_not_to_run(command))


def test_every_other_command_runs_as_it_stands(checkout):
    need("curl", "sqlite3")
    checkout.deliver(event_payload())
    for command in PLAIN:
        print(f"$ {command}\n{checkout.run(command)}")
    data = checkout.folder / "data"
    backups = [*data.glob("backups/*.db"), data / "before-upgrade.db"]
    assert [backup.stat().st_size > 0 for backup in backups] == [True, True]


def test_what_is_shown_is_what_comes(make_checkout):
    need("curl")
    checkout = make_checkout(".venv/bin/gunicorn")
    (transcript,) = fences("console")
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", transcript, re.MULTILINE)
    assert len(steps) == 2
    for command, shown in steps:
        output = checkout.run(f"{command} -s")
        assert re.fullmatch(as_pattern(shown), output.strip(), re.DOTALL), output


def test_public_url_is_what_the_overview_shows(make_checkout):
    url = re.search(r"PUBLIC_URL=(\S+)", SERVERS[1])[1]
    checkout = make_checkout(SERVERS[1])
    assert checkout.get("/")["connect"]["webhook_url"] == f"{url}/sentry/webhook"


def test_the_agents_addresses_are_text(checkout):
    (words,) = fences("markdown")
    paths = re.findall(r"(?:localhost:8000|`)(/[^'`]+)", words)
    assert len(paths) == 3
    for path in paths:
        status, headers, _ = checkout.request("GET", path)
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8"), path


def test_the_loops_start_now_and_outlive_a_restart(checkout, tmp_path):
    need("curl", "jq")
    before = checkout.deliver(event_payload("before"))[1]["id"]
    python = tmp_path / "follow.py"
    python.write_text(fences("python")[0].replace("localhost:8000", f"localhost:{checkout.port}"))
    logs = tmp_path / "sh", tmp_path / "python"
    loops = [
        checkout.begin(LOOPS[0], logs[0]),
        checkout.begin(f"exec .venv/bin/python -u {python}", logs[1]),
    ]

    def followed(number):
        """Return True if both loops have shown an error of a number; deliver another one."""
        checkout.deliver(event_payload(os.urandom(16).hex(), title=f"number {number}"))
        time.sleep(0.1)
        return all(f"number {number}" in log.read_text() for log in logs)

    try:
        wait_for(lambda: followed(1), 20)
        checkout.stop()
        wait_for(lambda: "Failed to connect" in logs[0].read_text(), 20)
        wait_for(lambda: "trying again" in logs[1].read_text(), 20)
        checkout.start(SERVERS[0].rpartition("&& ")[2])
        wait_for(lambda: followed(2), 20)
    finally:
        for loop in loops:
            os.killpg(loop.pid, signal.SIGKILL)
            loop.wait()
    shown = re.findall(r'^\{"id":(\d+)', logs[0].read_text(), re.MULTILINE)
    printed = re.findall(r"^(\d+) ", logs[1].read_text(), re.MULTILINE)
    for ids in (shown, printed):
        numbers = [int(id_) for id_ in ids]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert numbers[0] > before


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_setting_is_where_one_looks_for_it(name):
    (row,) = re.findall(rf"^`.*\b{name}`.* \| .*$", README, re.MULTILINE)
    assert DEFAULTS[name] in row
    assert f"\n#{name}=" in (ROOT / ".env.example").read_text()
    elsewhere = {"DATABASE_URL": ("Dockerfile", "DATABASE_URL=sqlite:////data/errors.db")}
    elsewhere["PORT"] = "docker-compose.yml", "${PORT:-8000}:8000"
    file, words = elsewhere.get(name, ("docker-compose.yml", f"{name}: ${{{name}:-}}"))
    assert words in (ROOT / file).read_text()


def test_the_example_of_settings_is_valid():
    text = (ROOT / ".env.example").read_text()
    assert read_settings(dict(re.findall(r"^#([A-Z_]+)=(.*)$", text, re.MULTILINE)))


def test_every_route_is_named():
    rules = {rule.rule.replace("int:id_", "id") for rule in create_app().url_map.iter_rules()}
    paths = {rule.rstrip("/") or "/" for rule in rules}
    assert "/errors/<id>/payload" in paths
    assert [path for path in paths if not re.search(f"[` ]{re.escape(path)}`", README)] == []


def test_every_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    links = re.findall(r"\]\(([^)]+)\)", PROSE)
    inside = [link for link in links if not link.startswith("http")]
    assert inside
    assert [link for link in inside if link not in anchors and not (ROOT / link).exists()] == []
