"""Fail if a file, a section of collector.py or a function is larger than its budget."""

import ast
import re
import subprocess
import sys
from pathlib import Path

LINES = {
    "collector.py": 3025,
    "worker.py": 220,
    "gunicorn.conf.py": 60,
    "entrypoint.sh": 15,
    "schema.sql": 100,
    "templates/*": 520,
    "tests/*.py": 6510,
    "tests/benchmark.py": 400,
    "README.md": 200,
}
SECTIONS = {
    "Parsing": 925,
    "Storage": 670,
    "Intake": 175,
    "Presentation": 310,
    "Web": 695,
    "Wiring": 198,
}
FUNCTION_LINES = 40
LINE_LENGTH = 100
CONDITIONALS = 2.0  # `a if b else c` in 100 lines
COMPREHENSIONS = 2.9  # in 100 lines
CODE = "collector.py", "worker.py", "gunicorn.conf.py"
COMPREHENSION = ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
BANNER = re.compile(r"^# -{90,}\n# (\w+):.*\n(?:# .*\n)*# -{90,}\n", re.MULTILINE)

faults = []


def check(name, figure, most):
    """Note a figure that is above its budget."""
    print(f"{name}: {figure:g} of {most}")
    if figure > most:
        faults.append(f"{name}: {figure:g} is more than {most}")


def count_lines(pattern):
    """Return the lines of the files that git knows by a pattern."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", pattern]
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return sum(len(Path(name).read_text().splitlines()) for name in names)


def check_sections(source):
    """Check the lines of each section, from its banner to the next."""
    banners = [*BANNER.finditer(source)]
    ends = [banner.start() for banner in banners[1:]] + [len(source)]
    for banner, end in zip(banners, ends, strict=True):
        lines = len(source[banner.start() : end].rstrip().splitlines())
        check(f"section {banner[1]}", lines, SECTIONS[banner[1]])


def check_code(name, source):
    """Check the style of one file: functions, docstrings, lines, conditionals, comprehensions."""
    lines = source.splitlines()
    nodes = [*ast.walk(ast.parse(source))]
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            check_function(name, node)
    check(f"{name}, longest line", max(map(len, lines)), LINE_LENGTH)
    for word, kind, most in (
        ("conditional expressions", ast.IfExp, CONDITIONALS),
        ("comprehensions", COMPREHENSION, COMPREHENSIONS),
    ):
        count = sum(isinstance(node, kind) for node in nodes)
        check(f"{name}, {word} in 100 lines", round(100 * count / len(lines), 1), most)


def check_function(name, node):
    """Note a function that is too long, or that does not say what it does."""
    length = node.end_lineno - node.lineno + 1
    if length > FUNCTION_LINES:
        faults.append(f"{name}, {node.name}: {length} lines are more than {FUNCTION_LINES}")
    is_short = length < 10 or node.name == "__init__"
    if ast.get_docstring(node) is None and not is_short:
        faults.append(f"{name}, {node.name}: there is no docstring")


for pattern, most in LINES.items():
    check(pattern, count_lines(pattern), most)
check_sections(Path("collector.py").read_text())
for name in CODE:
    check_code(name, Path(name).read_text())
sys.exit("\n".join(faults) or 0)
