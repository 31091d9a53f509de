"""Fail if a file, a section of collector.py or a figure of style is above its budget."""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

# Most lines of a file, or of the files of a pattern together.
FILES = {
    "collector.py": 2400,
    "worker.py": 220,
    "gunicorn.conf.py": 60,
    "entrypoint.sh": 15,
    "schema.sql": 100,
    "templates/*": 520,
    "tests/*.py": 5900,
    "tests/benchmark.py": 400,
    "README.md": 200,
    ".ci/budget.py": 80,
}
SECTIONS = {
    "Parsing": 500,
    "Storage": 600,
    "Intake": 155,
    "Presentation": 310,
    "Web": 600,
    "Wiring": 190,
}
SOURCE = ["collector.py", "worker.py", "gunicorn.conf.py", ".ci/budget.py"]
LINE_LENGTH = 100
FUNCTION_LINES = 40
IF_ELSE = 2.0  # conditional expressions in 100 lines of code
COMPREHENSIONS = 2.5

BANNER = re.compile(r"^# -+\n# (\w+): .*\n# -+\n", re.MULTILINE)
COMPREHENSION = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
faults = []


def check(name, figure, most):
    """Note a figure that is above its budget."""
    if figure > most:
        faults.append(f"{name}: {figure:g} is above {most:g}")


def check_style(name, text):
    """Check lines, functions, conditional expressions and comprehensions of a Python file."""
    hundreds = len(re.findall(r"^ *[^ #\n]", text, re.MULTILINE)) / 100
    counts = Counter()
    for node in ast.walk(ast.parse(text)):
        counts["if"] += isinstance(node, ast.IfExp)
        counts["for"] += isinstance(node, COMPREHENSION)
        if isinstance(node, (ast.Module, ast.ClassDef)):
            check_functions(name, node.body)
    check(f"{name}, conditional expressions", round(counts["if"] / hundreds, 1), IF_ELSE)
    check(f"{name}, comprehensions", round(counts["for"] / hundreds, 1), COMPREHENSIONS)
    check(f"{name}, characters of a line", max(map(len, text.splitlines())), LINE_LENGTH)


def check_functions(name, nodes):
    """Check the functions among some nodes. A function in a function is a part of that."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            check(f"{name}, lines of {node.name}", lines, FUNCTION_LINES)
            if not ast.get_docstring(node) and node.name != "__init__":
                faults.append(f"{name}: {node.name} has no docstring")


for pattern, most in FILES.items():
    text = "".join(file.read_text() for file in Path().glob(pattern))
    check(pattern, text.count("\n"), most)
_, *sections = BANNER.split(Path("collector.py").read_text())
for name, section in zip(sections[::2], sections[1::2], strict=True):
    check(f"section {name}", section.count("\n"), SECTIONS[name])
for name in SOURCE:
    check_style(name, Path(name).read_text())
sys.exit("\n".join(faults) or 0)
