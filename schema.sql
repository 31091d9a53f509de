-- The tables of version 3. PRAGMA user_version says which version a database has. A new one gets what stands
-- above "From version 2". In an older one, errors becomes errors_old, then it gets the same and what stands
-- below, all in one transaction; version 1 gets "From version 1" first.
-- To add a column, raise SCHEMA_VERSION, write how an old database gets it, and name it in COLUMNS and FIELDS.

-- Short columns first: what a filter compares is then found without a look at the long texts.
CREATE TABLE errors (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: pollers remember the last one
    received_at     TEXT NOT NULL,                      -- times are ISO 8601 in UTC
    timestamp       TEXT NOT NULL,
    resource        TEXT,
    action          TEXT,
    event_id        TEXT,                               -- unique in a project of a server
    issue_id        TEXT,                               -- unique on a server
    short_id        TEXT,
    server          TEXT,                               -- host of the Sentry that sent it
    category        TEXT,                               -- error, performance, cron ...
    level           TEXT,
    status          TEXT,
    platform        TEXT,
    logger          TEXT,
    environment     TEXT,
    release         TEXT,
    project_id      TEXT,
    project_slug    TEXT,
    project_name    TEXT,
    rule            TEXT,
    identity        TEXT NOT NULL,                      -- what makes it the same error, set at arrival
    title           TEXT,
    message         TEXT,
    culprit         TEXT,
    exception_type  TEXT,
    exception_value TEXT,
    permalink       TEXT
);

CREATE UNIQUE INDEX errors_identity ON errors (identity);
CREATE INDEX errors_issue ON errors (issue_id, server) WHERE issue_id IS NOT NULL;
CREATE INDEX errors_received ON errors (received_at);
CREATE INDEX errors_short ON errors (short_id) WHERE short_id IS NOT NULL;

-- The bodies as they were received: sqlar_uncompress(payload, payload_bytes).
CREATE TABLE IF NOT EXISTS bodies (
    id            INTEGER PRIMARY KEY,                  -- of the error
    payload_bytes INTEGER NOT NULL,                     -- length of the body
    payload       BLOB NOT NULL                         -- the body, compressed by zlib where that is shorter
);

-- What came of the deliveries. The reasons are a fixed few, '' where there is none.
CREATE TABLE outcomes (
    outcome TEXT NOT NULL,
    reason  TEXT NOT NULL,
    count   INTEGER NOT NULL,
    last_at TEXT NOT NULL,
    PRIMARY KEY (outcome, reason)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS health (id INTEGER PRIMARY KEY CHECK (id = 1), checked_at TEXT NOT NULL);

-- From version 2
INSERT INTO sqlite_sequence SELECT 'errors', seq FROM sqlite_sequence WHERE name = 'errors_old';
INSERT OR IGNORE INTO errors
SELECT id, received_at, timestamp, resource, action, event_id, issue_id, short_id, server, category, level,
    status, platform, logger, environment, release, project_id, project_slug, project_name, rule,
    CASE
        WHEN digest IS NOT NULL THEN digest
        WHEN event_id IS NOT NULL THEN
            event_id || ' ' || coalesce(server, '') || ' ' || coalesce(project_id, project_slug, '')
        ELSE 'issue ' || issue_id || ' ' || coalesce(server, '')
    END,
    title, message, culprit, exception_type, exception_value, permalink
FROM errors_old ORDER BY id;
-- Those that are the same error by now were different ones when they came.
INSERT INTO errors
SELECT id, received_at, timestamp, resource, action, event_id, issue_id, short_id, server, category, level,
    status, platform, logger, environment, release, project_id, project_slug, project_name, rule,
    'double ' || id, title, message, culprit, exception_type, exception_value, permalink
FROM errors_old WHERE id NOT IN (SELECT id FROM errors);
DROP TABLE errors_old;
INSERT INTO outcomes SELECT outcome, reason, sum(count), max(last_at) FROM deliveries GROUP BY outcome, reason;
DROP TABLE deliveries;
DROP TABLE IF EXISTS errors_search;
DROP TABLE IF EXISTS search_progress;
DROP TABLE IF EXISTS blocks;
DROP TABLE IF EXISTS issues;

-- From version 1
INSERT INTO bodies SELECT id, payload_bytes, payload FROM errors_old;
CREATE TABLE errors_2 AS
SELECT id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, culprit,
    level, status, platform, logger, environment, release, project_id, project_slug, project_name,
    exception_type, exception_value, permalink, rule, server_of(permalink) AS server,
    CASE WHEN resource = 'error' AND exception_type IS NOT NULL THEN 'error'  -- without a look at each
        ELSE category_of(payload, payload_bytes) END AS category,
    CASE WHEN coalesce(event_id, issue_id) IS NULL OR action NOT IN ('created', 'triggered')
        THEN digest_of(payload, payload_bytes) END AS digest
FROM errors_old;
INSERT INTO sqlite_sequence SELECT 'errors', seq FROM sqlite_sequence WHERE name = 'errors_old';
DROP TABLE errors_old;
ALTER TABLE errors_2 RENAME TO errors_old;
