"""The README: its commands run as they stand there, and what it names is all there is."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SETTINGS, Server, event_payload, wait_for

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^ *```(\w+)\n(.*?)^ *```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^ *```.*?^ *```$", "", README, flags=re.MULTILINE | re.DOTALL)
# Parts of commands that need a public address, Docker, systemd, minutes, or packages.
NOT_RUN = "cloudflared errors.example docker sudo journalctl kill benchmark.py install".split()


def fences(language):
    """Return the texts of the fences of a language, in the README's order."""
    return [text for name, text in FENCES if name == language]


def read_commands():
    """Return the commands of the README, a loop as one, and of cron's line what cron runs."""
    commands = []
    for text in fences("sh"):
        commands += [text] if "while" in text else text.splitlines()
    for text in fences("cron"):
        commands.append(text.split(" ", 5)[5].replace(r"\%", "%"))
    inline = re.findall(r"`((?:\.venv/bin/|curl|docker|sqlite3|kill) ?[^`\n]+)`", PROSE)
    return [command.strip() for command in commands + inline]


COMMANDS = read_commands()
(LOOP,) = [command for command in COMMANDS if "while" in command]
(TUNNEL,) = [command for command in COMMANDS if command.startswith("PUBLIC_URL")]
(RESTORE,) = [command for command in COMMANDS if "sudo -u collector sh" in command]
START = COMMANDS[0].rpartition("&& ")[2]
PLAIN = [
    command
    for command in COMMANDS
    if command not in (LOOP, TUNNEL)
    and not any(part in command for part in NOT_RUN)
    and not re.match("SENTRY_", command)  # lines of .env
]


class Checkout(Server):
    """A copy of the checkout, in which the README's commands run; 8000 becomes a free port."""

    def __init__(self, folder):
        ignored = shutil.ignore_patterns(".git", ".venv", ".env", "data", "*cache*")
        shutil.copytree(ROOT, folder, ignore=ignored)
        (folder / ".venv").symlink_to(Path(sys.executable).parent.parent)
        super().__init__(folder)
        del self.env["DATABASE_URL"], self.env["PYTHONPATH"]

    def begin(self, text, output):
        """Start a text of the README, in this checkout; return its process."""
        text = text.replace("localhost:8000", f"localhost:{self.port}")
        command = ["bash", "-c", text.replace("/opt/collector", str(self.folder))]
        options = {"cwd": self.folder, "env": self.env, "start_new_session": True}
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)

    def run(self, text):
        """Run a text of the README; return what it printed, or fail if it failed."""
        process = self.begin(text, subprocess.PIPE)
        output = process.communicate(timeout=60)[0].decode()
        assert process.returncode == 0, f"{text}\n{output}"
        return output

    def start(self, text=START):
        with self.log.open("ab") as log:
            self.process = self.begin(text, log)
        wait_for(self.is_up)


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout of which nothing runs yet."""
    for program in ("curl", "jq", "sqlite3"):
        if not shutil.which(program) and not os.environ.get("CI"):
            pytest.skip(f"needs {program}")
    found = Checkout(tmp_path / "checkout")
    yield found
    found.end()


def test_the_readme_is_short_and_begins_with_what_is_needed_first():
    assert len(README.split()) <= 1300 and README.count("\n") <= 200
    assert "```sh" in "\n".join(README.splitlines()[:10])
    assert (len(COMMANDS), len(PLAIN)) > (20, 3)


def test_the_first_error_is_shown_as_the_readme_shows_it(checkout):
    checkout.start()
    (transcript,) = fences("console")
    steps = re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", transcript, re.MULTILINE)
    assert len(steps) == 2
    for command, shown in steps:
        lines = [re.escape(line) for line in shown.splitlines()]
        pattern = "\n".join(".*" if line == r"\.\.\." else line for line in lines)
        output = checkout.run(f"{command} -s")
        assert re.fullmatch(pattern, output.strip(), re.DOTALL), output


def test_the_tunnel_has_a_token_that_the_agents_lines_send(checkout):
    checkout.start(TUNNEL)
    checkout.env["API_TOKEN"] = re.search(r"API_TOKEN=(\S+)", TUNNEL)[1]
    token = {"Authorization": f"Bearer {checkout.env['API_TOKEN']}"}
    url = re.search(r"PUBLIC_URL=(\S+)", TUNNEL)[1]
    assert checkout.request("GET", "/errors")[0] == 401
    assert checkout.get("/", **token)["connect"]["webhook_url"] == f"{url}/sentry/webhook"
    checkout.deliver(event_payload(title="WORD", issue_id="9"))
    (words,) = fences("markdown")
    assert checkout.run(re.search(r"`(curl [^`]*)`", words)[1]).startswith("error: 1\n")
    paths = re.findall(r"`(/[^`]+)`", words)
    assert len(paths) == 2
    for path in paths:
        status, headers, reply = checkout.request("GET", path, headers=token)
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert reply.startswith(b"#1 "), path


def test_the_loop_outlives_a_restart_and_every_other_command_runs_as_it_stands(checkout):
    checkout.start()
    checkout.deliver(event_payload("before"))
    log = checkout.folder / "loop.log"
    with log.open("wb") as output:
        loop = checkout.begin(LOOP, output)

    def has_shown(title):
        """Return True if the loop has shown an error of a title; deliver another one."""
        checkout.deliver(event_payload(os.urandom(16).hex(), title=title))
        time.sleep(0.1)
        return title in log.read_text()

    try:
        for command in PLAIN:
            print(f"$ {command}\n{checkout.run(command)}")
        wait_for(lambda: has_shown("first"))
        checkout.stop()
        wait_for(lambda: "Failed to connect" in log.read_text())
        checkout.start()
        wait_for(lambda: has_shown("second"))
    finally:
        os.killpg(loop.pid, signal.SIGKILL)
        loop.wait()
    ids = [int(id_) for id_ in re.findall(r'^\{"id":(\d+)', log.read_text(), re.MULTILINE)]
    assert ids == list(range(ids[0], ids[0] + len(ids))) and ids[0] > 1
    checkout.stop()
    (backup,) = (checkout.folder / "data/backups").glob("*.db")
    checkout.run(RESTORE.replace("sudo -u collector ", "").replace("backup.db", str(backup)))
    checkout.start()
    assert [error["id"] for error in checkout.get("/errors")] == [1]
    assert checkout.deliver(event_payload(3))[1]["id"] == 2
    assert (checkout.folder / "data/aside/errors.db").exists()


def test_every_setting_is_where_one_looks_for_it(checkout):
    names = (".env.example", "docker-compose.yml", "Dockerfile")
    files = {name: (ROOT / name).read_text().replace("\\\n", "") for name in names}
    for name in SETTINGS:
        assert re.search(rf"^`.*\b{name}`.* \| .*$", README, re.MULTILINE), name
        assert f"\n#{name}=" in files[".env.example"]
        if name not in ("DATABASE_URL", "PORT"):
            assert f"{name}: ${{{name}:-}}" in files["docker-compose.yml"]
    assert "${PORT:-8000}:8000" in files["docker-compose.yml"]
    assert "DATABASE_URL=sqlite:////data/errors.db" in files["Dockerfile"]
    example = re.sub(r"^#(?=[A-Z_]+=)", "", files[".env.example"], flags=re.MULTILINE)
    (checkout.folder / ".env").write_text(example.replace("SENTRY_DSN=https", "SENTRY_DSN=http"))
    checkout.start()  # where the environment's PORT wins
    probe = json.loads(re.search(r"^HEALTHCHECK .*?CMD (.*)", files["Dockerfile"], re.M | re.S)[1])
    command = [sys.executable, *probe[1:]]
    env = {"PORT": str(checkout.port), "http_proxy": "http://127.0.0.1:9"}
    assert subprocess.run(command, env=env, check=False).returncode == 0
    checkout.stop()
    assert subprocess.run(command, env=env, check=False, capture_output=True).returncode != 0


def test_every_link_leads_somewhere():
    headings = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
    words = [re.sub("[^a-z -]", "", heading.lower()) for heading in headings]
    anchors = {f"#{word.replace(' ', '-')}" for word in words}
    links = [link for link in re.findall(r"\]\(([^)]+)\)", PROSE) if not link.startswith("http")]
    assert links
    assert [link for link in links if link not in anchors and not (ROOT / link).exists()] == []
    assert "## 3.0.0" in (ROOT / "CHANGELOG.md").read_text()
