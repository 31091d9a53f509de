"""Become a gunicorn as soon as it is known which: to import Flask takes most of the time of a start."""

import json
import os
import runpy
import sys

import flask  # noqa: F401 (but not gunicorn, whose defaults are of the environment it is imported in)

line = sys.stdin.readline()  # as start_gunicorn writes it
if not line:  # the tests are over
    sys.exit()
order = json.loads(line)
os.chdir(order["folder"])
os.environ.clear()
os.environ.update(order["env"])
sys.path[:1] = order["env"]["PYTHONPATH"].split(os.pathsep)
log = os.open(order["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for descriptor in (1, 2):
    os.dup2(log, descriptor)
sys.argv = ["gunicorn", *order["arguments"]]
runpy.run_module("gunicorn", run_name="__main__", alter_sys=True)
