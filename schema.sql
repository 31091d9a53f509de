-- The whole data model. Applied in one transaction when a database is opened that is not at this version; safe to run again.
-- A column's name is the key of the row dict, the SQL parameter and the JSON key.

CREATE TABLE IF NOT EXISTS errors (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: pollers remember the last one they saw
    received_at     TEXT NOT NULL,                      -- times are ISO 8601 in UTC
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
    payload_bytes   INTEGER NOT NULL,                   -- length of the body as it was received
    payload         BLOB NOT NULL,                      -- that body: sqlar_uncompress(payload, payload_bytes)
    -- The values to filter by as one word each, computed and not stored, for the search table below.
    -- A facet starts with U+E000, so no searched word finds it.
    facets          TEXT AS (char(57344) || 'project' || hex(project_slug) || ' ' || char(57344) || 'level' || hex(level)
                             || ' ' || char(57344) || 'environment' || hex(environment)
                             || ' ' || char(57344) || 'platform' || hex(platform)
                             || ' ' || char(57344) || 'issue' || hex(issue_id))
);

CREATE UNIQUE INDEX IF NOT EXISTS errors_event_id ON errors (event_id) WHERE event_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS errors_issue_id ON errors (issue_id);
CREATE INDEX IF NOT EXISTS errors_short_id ON errors (short_id) WHERE short_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS errors_received_at ON errors (received_at);
CREATE INDEX IF NOT EXISTS errors_without_ids ON errors (payload_bytes) WHERE event_id IS NULL AND issue_id IS NULL;

-- Words and facets in one index, so that any mix of search and filters is one walk through posting lists,
-- newest first, and never a scan of the table.
CREATE VIRTUAL TABLE IF NOT EXISTS errors_search USING fts5 (
    title, message, culprit, exception_type, exception_value, facets,
    content = '', columnsize = 0, prefix = '1 2 3'
);

CREATE TRIGGER IF NOT EXISTS errors_inserted AFTER INSERT ON errors BEGIN
    INSERT INTO errors_search (rowid, title, message, culprit, exception_type, exception_value, facets)
    VALUES (new.id, new.title, new.message, new.culprit, new.exception_type, new.exception_value, new.facets);
END;

CREATE TRIGGER IF NOT EXISTS errors_deleted AFTER DELETE ON errors BEGIN
    INSERT INTO errors_search (errors_search, rowid, title, message, culprit, exception_type, exception_value, facets)
    VALUES ('delete', old.id, old.title, old.message, old.culprit, old.exception_type, old.exception_value, old.facets);
END;

-- What came of the deliveries, a row per day, outcome and reason; the reasons are a fixed few.
CREATE TABLE IF NOT EXISTS deliveries (
    day     TEXT NOT NULL,
    outcome TEXT NOT NULL,
    reason  TEXT NOT NULL,
    count   INTEGER NOT NULL,
    last_at TEXT NOT NULL,
    PRIMARY KEY (day, outcome, reason)
) WITHOUT ROWID;

-- The row that /health commits.
CREATE TABLE IF NOT EXISTS health (id INTEGER PRIMARY KEY CHECK (id = 1), checked_at TEXT NOT NULL);

PRAGMA user_version = 1;
