FROM python:3.13-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DATABASE_URL=sqlite:////data/errors.db

WORKDIR /app
COPY requirements.txt .
RUN pip install --root-user-action=ignore -r requirements.txt && python -m compileall -q /usr/local/lib/python3*/site-packages
COPY collector.py schema.sql gunicorn.conf.py ./
COPY templates templates

# Writable by any user, for --user on a volume.
RUN mkdir -m 1777 /data
VOLUME /data
EXPOSE 8000

# As root only to make /data the server's own: Docker makes a missing ./data as root's. The server then runs as whoever
# owns /data, or as 10001 where that is root. With --user there is nothing to do.
# gunicorn itself reads WEB_CONCURRENCY first, and takes an empty one for a bad number.
ENTRYPOINT ["sh", "-c", "[ \"$WEB_CONCURRENCY\" ] || unset WEB_CONCURRENCY; [ \"$(id -u)\" != 0 ] && exec \"$@\"; own=$(stat -c %u:%g /data); [ \"${own%:*}\" != 0 ] || own=10001:10001; chown -R \"$own\" /data || echo 'cannot chown /data' >&2; exec setpriv --reuid \"${own%:*}\" --regid \"${own#*:}\" --clear-groups --no-new-privs \"$@\"", "--"]
CMD ["gunicorn"]

HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8000), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
