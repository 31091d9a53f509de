-- The data model, as steps: what stands under "-- Version N" makes version N of the version before.
-- PRAGMA user_version says which steps a database has had. The collector applies the missing ones when
-- it opens the database, all in one transaction. A new database gets every step.
--
-- To add a column: write a new step below the last one with ALTER TABLE ... ADD COLUMN, and raise
-- SCHEMA_VERSION. Name the column in COLUMNS and in FIELDS of collector.py. Its name is the key of the
-- row dict, the SQL parameter and the JSON key.
-- To add a filter: name it in FACETS of collector.py. Errors that are there already are found by it once
-- the search index is filled again, so write a step that drops errors_search, creates it and sets
-- search_progress to 0, as version 2 does.
-- A step that has been released is never changed. tests/test_storage.py upgrades a database of each version.

-- Version 1

CREATE TABLE errors (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    received_at     TEXT NOT NULL,
    timestamp       TEXT NOT NULL,
    resource        TEXT,
    action          TEXT,
    event_id        TEXT,
    issue_id        TEXT,
    short_id        TEXT,
    title           TEXT,
    message         TEXT,
    culprit         TEXT,
    level           TEXT,
    status          TEXT,
    platform        TEXT,
    logger          TEXT,
    environment     TEXT,
    release         TEXT,
    project_id      TEXT,
    project_slug    TEXT,
    project_name    TEXT,
    exception_type  TEXT,
    exception_value TEXT,
    permalink       TEXT,
    rule            TEXT,
    payload_bytes   INTEGER NOT NULL,
    payload         BLOB NOT NULL
);

CREATE TABLE deliveries (
    day     TEXT NOT NULL,
    outcome TEXT NOT NULL,
    reason  TEXT NOT NULL,
    count   INTEGER NOT NULL,
    last_at TEXT NOT NULL,
    PRIMARY KEY (day, outcome, reason)
) WITHOUT ROWID;

CREATE TABLE health (id INTEGER PRIMARY KEY CHECK (id = 1), checked_at TEXT NOT NULL);

-- Version 2: bodies in a table of their own, so that lists and filters read narrow rows

DROP TABLE IF EXISTS errors_search;
DROP TRIGGER IF EXISTS errors_inserted;
DROP TRIGGER IF EXISTS errors_deleted;
ALTER TABLE errors RENAME TO errors_1;

CREATE TABLE errors (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: pollers remember the last one
    received_at     TEXT NOT NULL,                      -- times are ISO 8601 in UTC
    timestamp       TEXT NOT NULL,
    resource        TEXT,
    action          TEXT,
    event_id        TEXT,                               -- unique in a project of a server
    issue_id        TEXT,                               -- unique on a server
    short_id        TEXT,
    title           TEXT,
    message         TEXT,
    culprit         TEXT,
    level           TEXT,
    status          TEXT,
    platform        TEXT,
    logger          TEXT,
    environment     TEXT,
    release         TEXT,
    project_id      TEXT,
    project_slug    TEXT,
    project_name    TEXT,
    exception_type  TEXT,
    exception_value TEXT,
    permalink       TEXT,
    rule            TEXT,
    server          TEXT,                               -- host of the Sentry that sent it
    category        TEXT,                               -- error, performance, cron ...
    digest          TEXT                                -- of the body, where nothing else identifies it
);

-- The bodies as they were received: sqlar_uncompress(payload, payload_bytes).
CREATE TABLE bodies (
    id            INTEGER PRIMARY KEY,                  -- of the error
    payload_bytes INTEGER NOT NULL,                     -- length of the body
    payload       BLOB NOT NULL                         -- the body, compressed by zlib where that is shorter
);

INSERT INTO bodies SELECT id, payload_bytes, payload FROM errors_1;

INSERT INTO errors
SELECT id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message,
    culprit, level, status, platform, logger, environment, release, project_id, project_slug,
    project_name, exception_type, exception_value, permalink, rule,
    server_of(permalink),
    CASE WHEN resource = 'error' AND exception_type IS NOT NULL THEN 'error'  -- without a look at each
        ELSE body_category(payload, payload_bytes) END,
    CASE WHEN event_id IS NULL AND issue_id IS NULL THEN body_digest(payload, payload_bytes) END
FROM errors_1;

DELETE FROM sqlite_sequence WHERE name = 'errors';
INSERT INTO sqlite_sequence SELECT 'errors', seq FROM sqlite_sequence WHERE name = 'errors_1';
DROP TABLE errors_1;

CREATE INDEX errors_event_id ON errors (event_id) WHERE event_id IS NOT NULL;
CREATE INDEX errors_issue_id ON errors (issue_id, server, received_at, release)
WHERE issue_id IS NOT NULL;
CREATE INDEX errors_short_id ON errors (short_id) WHERE short_id IS NOT NULL;
CREATE INDEX errors_digest ON errors (digest) WHERE digest IS NOT NULL;

-- How many of each thousand ids are here, and times between which they were received, which find a period
-- (what was spooled has a later id than its time). They may span more than what is left, never less.
CREATE TABLE blocks (
    id       INTEGER PRIMARY KEY,                       -- of its errors, without the last three digits
    count    INTEGER NOT NULL,
    first_at TEXT NOT NULL,
    last_at  TEXT NOT NULL
);

INSERT INTO blocks
SELECT id / 1000, count(*), min(received_at), max(received_at) FROM errors GROUP BY id / 1000;

CREATE TRIGGER errors_received AFTER INSERT ON errors BEGIN
    INSERT INTO blocks VALUES (new.id / 1000, 1, new.received_at, new.received_at)
    ON CONFLICT DO UPDATE SET
        count = count + 1,
        first_at = min(first_at, excluded.first_at),
        last_at = max(last_at, excluded.last_at);
END;

CREATE TRIGGER errors_redated AFTER UPDATE OF received_at ON errors BEGIN  -- by hand
    UPDATE blocks SET first_at = min(first_at, new.received_at), last_at = max(last_at, new.received_at)
    WHERE id = new.id / 1000;
END;

-- An issue as the errors kept here tell it; the triggers below keep it.
CREATE TABLE issues (
    issue_id     TEXT NOT NULL,
    server       TEXT NOT NULL,                         -- '' where no delivery said it
    short_id     TEXT,
    project_id   TEXT,
    project_slug TEXT,
    count        INTEGER NOT NULL,
    first_seen   TEXT NOT NULL,                         -- times of receipt
    last_seen    TEXT NOT NULL,
    newest       INTEGER NOT NULL,                      -- id of its newest error
    PRIMARY KEY (issue_id, server)
) WITHOUT ROWID;

CREATE INDEX issues_newest ON issues (newest);

CREATE TRIGGER errors_inserted AFTER INSERT ON errors WHEN new.issue_id IS NOT NULL BEGIN
    INSERT INTO issues VALUES (new.issue_id, coalesce(new.server, ''), new.short_id, new.project_id,
        new.project_slug, 1, new.received_at, new.received_at, new.id)
    ON CONFLICT DO UPDATE SET
        count = count + 1,
        short_id = coalesce(excluded.short_id, short_id),
        project_id = coalesce(excluded.project_id, project_id),
        project_slug = coalesce(excluded.project_slug, project_slug),
        first_seen = min(first_seen, excluded.first_seen),
        last_seen = max(last_seen, excluded.last_seen),
        newest = max(newest, excluded.newest);
END;

CREATE TRIGGER errors_deleted AFTER DELETE ON errors BEGIN
    DELETE FROM bodies WHERE id = old.id;
    UPDATE blocks SET count = count - 1 WHERE id = old.id / 1000;
    DELETE FROM blocks WHERE id = old.id / 1000 AND count = 0;
    UPDATE search_progress SET deletions = deletions + 1;
    UPDATE issues SET count = count - 1
    WHERE issue_id = old.issue_id AND server = coalesce(old.server, '');
    DELETE FROM issues
    WHERE issue_id = old.issue_id AND server = coalesce(old.server, '') AND count = 0;
    UPDATE issues SET
        first_seen = (SELECT min(received_at) FROM errors
            WHERE issue_id = old.issue_id AND server IS old.server),
        last_seen = (SELECT max(received_at) FROM errors
            WHERE issue_id = old.issue_id AND server IS old.server)
    WHERE issue_id = old.issue_id AND server = coalesce(old.server, '');
    UPDATE issues SET
        newest = (SELECT max(id) FROM errors
            WHERE issue_id = old.issue_id AND server IS old.server)
    WHERE issue_id = old.issue_id AND server = coalesce(old.server, '') AND newest = old.id;
END;

INSERT INTO issues
SELECT issue_id, coalesce(server, ''), max(short_id), max(project_id), max(project_slug), count(*),
    min(received_at), max(received_at), max(id)
FROM errors WHERE issue_id IS NOT NULL GROUP BY issue_id, server;

-- Words and facets (values to filter by, as one word each) in one index, so that any mix of search and
-- filters is one walk through posting lists, newest first, and never a scan of the table. The collector
-- fills it after its replies, and before a search: it holds the errors up to search_progress.
CREATE VIRTUAL TABLE errors_search USING fts5 (
    title, message, culprit, exception_type, exception_value, facets,
    content = '', columnsize = 0, prefix = '1 2 3 4 5 6'
);

CREATE TABLE search_progress (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    indexed_to INTEGER NOT NULL,                        -- id of the newest error in errors_search
    deletions  INTEGER NOT NULL                         -- of errors, so that an export tells them
);

INSERT INTO search_progress VALUES (1, 0, 0);

-- What came of the deliveries, a row for each ten minutes, outcome and reason; the reasons are a fixed few.
ALTER TABLE deliveries RENAME COLUMN day TO period;
UPDATE deliveries SET period = period || 'T00:00';
