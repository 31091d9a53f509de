FROM python:3.13-slim

ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DATABASE_URL=sqlite:////data/errors.db

WORKDIR /app
COPY requirements.txt .
RUN pip install --root-user-action=ignore -r requirements.txt \
    && python -m compileall -q /usr/local/lib/python3*/site-packages
COPY collector.py worker.py schema.sql gunicorn.conf.py entrypoint.sh ./
COPY templates templates

# Writable by any user, for --user on a volume.
RUN mkdir -m 1777 /data
VOLUME /data
EXPOSE 8000

ENTRYPOINT ["./entrypoint.sh"]
CMD ["gunicorn"]

HEALTHCHECK --interval=30s --timeout=5s --start-period=10s CMD ["python", "-c", "import os, urllib.request as r; \
    r.build_opener(r.ProxyHandler({})).open(f'http://127.0.0.1:{os.environ.get(\"PORT\") or 8000}/health', timeout=4)"]
