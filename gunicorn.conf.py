"""Settings of gunicorn: `gunicorn` alone, in this folder, starts the service."""

import encodings.idna  # noqa: F401 (Werkzeug's first request would look for a free file)
import gc
import os
import socket
import sys

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
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a busy disk would block
forwarded_allow_ips = "*"  # the proxy may be in another container
forwarder_headers = ""  # but nobody moves the service to another path
control_socket_disable = True  # it needs a writable home
proc_name = "sentry-error-collector"


def on_starting(server):
    """Stop the start with one line where a setting of gunicorn's cannot work."""
    cfg = server.cfg
    if cfg.worker_class_str != worker_class or cfg.threads > 1:
        raise SystemExit(
            "worker_class, threads: this service runs on the sync workers of worker.py"
        )
    if cfg.is_ssl or cfg.proxy_protocol != "off":
        raise SystemExit(
            "certfile, proxy_protocol: this service speaks HTTP; put a proxy before it"
        )
    check_folder(cfg)
    check_port(cfg)


def check_folder(cfg):
    """Make and check the data folder as the user who will serve; stop the start if that fails."""
    child = os.fork()
    if child == 0:
        try:
            set_owner_process(cfg.uid, cfg.gid, initgroups=cfg.initgroups)
            collector.check_folder(settings["DATABASE_URL"])
        except SystemExit as fault:
            print(fault, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        sys.exit(1)


def check_port(cfg):
    """Stop the start with one line if the port is taken, which gunicorn says eleven times."""
    has_socket = "LISTEN_FDS" in os.environ or "GUNICORN_FD" in os.environ
    if has_socket or cfg.bind != [bind]:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", settings["PORT"]))
        except OSError as error:
            fault = f"cannot listen on port {settings['PORT']} ({error.strerror})"
            collector.fail("PORT", f"{fault}; end what listens there, or take another", "8001")


def when_ready(server):
    """Log what is on, and prepare what the workers share."""
    app = server.app.wsgi()
    collector.log.info(collector.describe_start(app.extensions["collector"]))
    compile_templates(app)
    defer_connections(server.LISTENERS)
    gc.freeze()  # what is there now stays, and is shared with the workers


def compile_templates(app):
    """Compile the templates, for which the first pages of each worker would wait otherwise."""
    for name in app.jinja_env.list_templates(extensions=("html", "txt", "xml")):
        app.jinja_env.get_template(name)


def defer_connections(listeners):
    """Have the kernel keep connections until they bring data, because browsers open spare ones."""
    for listener in listeners:
        is_tcp = listener.sock.family in (socket.AF_INET, socket.AF_INET6)
        if is_tcp and hasattr(socket, "TCP_DEFER_ACCEPT"):
            listener.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 30)


def post_worker_init(worker):
    """Open the database in the worker, as the user who serves."""
    shared = worker.wsgi.extensions["collector"]
    shared.start(worker.notify)
    worker.maintain = shared.maintain


def worker_exit(server, worker):
    """Write what the worker has only in memory."""
    if worker.wsgi:
        worker.wsgi.extensions["collector"].close()
