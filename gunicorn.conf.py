"""Settings of gunicorn: `gunicorn` alone, in this folder, starts the service."""

import atexit
import gc
import os
import socket

from gunicorn.util import set_owner_process

import collector

settings = collector.read_settings()
bind = f"0.0.0.0:{settings['PORT']}"
workers = settings["WEB_CONCURRENCY"]
wsgi_app = "collector:create_app()"
worker_class = "worker.Worker"
preload_app = True
timeout = 15  # seconds without a sign of life after which gunicorn ends a worker
graceful_timeout = 2
secure_scheme_headers = {}  # two that contradict each other would refuse a delivery
forwarder_headers = ""  # nobody moves the service to another path
control_socket_disable = True  # it needs a writable home
if os.access("/dev/shm", os.W_OK):
    worker_tmp_dir = "/dev/shm"  # a busy disk would block


def fork_as_server(cfg, task):
    """Run a task in a child, as the user who serves; return the child's process id."""
    child = os.fork()
    if child == 0:
        set_owner_process(cfg.uid, cfg.gid, initgroups=cfg.initgroups)
        task()
        os._exit(0)
    return child


def when_ready(server):
    """Check the folder, log what is on, upgrade the database, and prepare what workers share."""
    check = fork_as_server(server.cfg, lambda: collector.check_folder(settings["DATABASE_URL"]))
    if os.waitpid(check, 0)[1]:
        raise SystemExit(1)
    app = server.app.wsgi()
    server.log.info(collector.describe_start(app.extensions["collector"]))
    server.log.error_log.addFilter(collector.hide_request)
    fork_as_server(server.cfg, app.extensions["collector"].upgrade)
    for name in app.jinja_env.list_templates(extensions=("html", "txt")):
        app.jinja_env.get_template(name)  # or the first page of each worker would be late
    for listener in server.LISTENERS:  # in which spare connections of browsers wait for their data
        if listener.sock.family != socket.AF_UNIX and hasattr(socket, "TCP_DEFER_ACCEPT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)
    gc.freeze()  # what is there now stays, and is shared with the workers


def post_worker_init(worker):
    """Have the worker do maintenance, and close the database at its end."""
    store = worker.wsgi.extensions["collector"]
    store.database.may_upgrade = False  # the child does it
    worker.maintain = store.maintain
    atexit.register(store.close)
