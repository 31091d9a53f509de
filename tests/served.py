"""The app as the servers of the tests serve it, its templates compiled once for all of them."""

from jinja2 import FileSystemBytecodeCache

from collector import create_app

app = create_app()
app.jinja_env.bytecode_cache = FileSystemBytecodeCache()
