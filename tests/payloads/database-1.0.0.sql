-- A database as version 1.0.0 made it: its schema, and five rows of our own.
-- The errors 3, 4, 8 and 9 were deleted by their age.

CREATE TABLE IF NOT EXISTS errors (
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
    payload         BLOB NOT NULL,

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

CREATE TABLE IF NOT EXISTS deliveries (
    day     TEXT NOT NULL,
    outcome TEXT NOT NULL,
    reason  TEXT NOT NULL,
    count   INTEGER NOT NULL,
    last_at TEXT NOT NULL,
    PRIMARY KEY (day, outcome, reason)
) WITHOUT ROWID;

CREATE TABLE IF NOT EXISTS health (id INTEGER PRIMARY KEY CHECK (id = 1), checked_at TEXT NOT NULL);

PRAGMA user_version = 1;

INSERT INTO errors (
    id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, culprit, level, status,
    platform, logger, environment, release, project_id, project_slug, project_name, exception_type, exception_value, permalink, rule, payload_bytes, payload
) VALUES (
    1, '2026-05-01T10:00:00.000000Z', '2026-05-01T10:00:00.000000Z', 'issue', 'created', NULL, '77', 'SHOP-1', 'TeaError: pot is empty', 'pot is empty', 'brew', 'error',
    'unresolved', 'python', NULL, NULL, NULL, '4500', 'shop', 'Tea shop', 'TeaError', 'pot is empty', 'https://acme.sentry.io/issues/77/', NULL,
    334, x'78015590dd4a04310c855f65e8f5ba5d4119987b41af14f40562273ad5fe91a623c3b2efeee9a0a0bdea3939245f7236e4d4e76426e3844979360733939299cec6d7da78ffcca88f234a75c9a20f5d3edf3f3e5d5dc352af0129f3c2742792651a4ad6c1d78163d10d01d74211af88bc0a7fc108bc7280e41eef4d95b455182d09d71cd69da204d2b72c117ed97401e3c1149648c1a74f988b6aa993b5e4221f2b2795ede8b3dda1ab1d478b7c64a5df6d742b7f31515d29f4fdcc3fde0ba648fe6007609ca0af7a737b3a75ccd0dea17082029528feb41b76e782f70d79bd6da4'
);
INSERT INTO errors (
    id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, culprit, level, status,
    platform, logger, environment, release, project_id, project_slug, project_name, exception_type, exception_value, permalink, rule, payload_bytes, payload
) VALUES (
    2, '2026-05-01T10:00:01.000000Z', '2026-05-01T10:00:01.000000Z', 'error', 'created', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', '77', NULL, 'TeaError: pot is empty', 'pot is empty', 'brew', 'error',
    NULL, 'python', 'app', 'production', '1.4.2', '4500', NULL, NULL, 'TeaError', 'pot is empty', 'https://acme.sentry.io/organizations/acme/issues/77/events/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/', NULL,
    752, x'7801ed51c16ac3300cfd95a07388bbd211c87d7fb07b51132df5706c23cbe9b2927f9f9c30d84e859da78bada767e93df90ed88b0d1e3ae8995068801a061484ee0ec41c78bbcce4e56c0765e183d0e736a54c3bbb6d358f1cdea917e84ecf87430d62c591767a257c2903ba2a06a96caa688ab228bfcf2eb2553e5c986e0a389ac969baebd1860ee52df0a4505ce4aaea9513c691542c608c9a929f2d073fa9eec2e230e4dd670d4c8e3015054fcda9392a7922c16fcfb2c49fe2b43aa3cb05faa572ade1469773e6a2eb2a1253670cf613354947f2d2d860028fe8ed2796fda6ad68b6d524d3b6462d7951f44198e2e54358ff039210451aaafff36f7b80755dbf0009260ca8'
);
INSERT INTO errors (
    id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, culprit, level, status,
    platform, logger, environment, release, project_id, project_slug, project_name, exception_type, exception_value, permalink, rule, payload_bytes, payload
) VALUES (
    5, '2026-05-03T08:30:00.000000Z', '2026-05-03T08:30:00.000000Z', NULL, NULL, NULL, NULL, NULL, 'no id at all', 'no id at all', NULL, NULL,
    NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    34, x'7b226576656e74223a7b227469746c65223a226e6f20696420617420616c6c227d7d'
);
INSERT INTO errors (
    id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, culprit, level, status,
    platform, logger, environment, release, project_id, project_slug, project_name, exception_type, exception_value, permalink, rule, payload_bytes, payload
) VALUES (
    6, '2026-05-04T08:30:00.000000Z', '2026-05-04T08:30:00.000000Z', 'event_alert', 'triggered', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', '77', NULL, '茶壶里没有水了', '茶壶里没有水了', NULL, 'warning',
    NULL, 'node', NULL, 'staging', NULL, '12', NULL, NULL, NULL, NULL, 'https://errors.example.org/organizations/own/issues/77/events/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb/', 'Every warning',
    425, x'78019550d16ec3200cfc9589e7aa2c4b17d2bcf72f22450e71191381c840b2adcabfcf49d5bd5643c232d6dde1bb9b009d6cf0a21189ac3148388883182081686e0267f4e9afe9ecc0b8fec961ba8d31e31dad14bf270a9fa859a8783b88649343d669735d96559bdfeb2bd773a1759b2b0d0557f57adefaf2d4e613d6152b8c1823987fd31c1b70fcd702e4ad37db2a0ed235d0c8431f06e409fad952f0e3ee54c404e68e5cb0ef326dec8f94a6d848894481e211bf609c1c1e0319c917bcfd812dc328c3e2e5ee3d4aa5e41e5e944fe2eaa558399447f81de53d9dcb8cf4fdf2d87b5d7f0143c8908c'
);
INSERT INTO errors (
    id, received_at, timestamp, resource, action, event_id, issue_id, short_id, title, message, culprit, level, status,
    platform, logger, environment, release, project_id, project_slug, project_name, exception_type, exception_value, permalink, rule, payload_bytes, payload
) VALUES (
    7, '2026-05-05T08:30:00.000000Z', '2026-05-05T08:30:00.000000Z', NULL, NULL, 'cccccccccccccccccccccccccccccccc', '78', NULL, 'KeyError: sugar', 'sugar', NULL, 'error',
    NULL, 'python', NULL, NULL, NULL, NULL, 'shop', 'Tea shop', 'KeyError', 'sugar', NULL, NULL,
    237, x'7801858ebd0e83300c845f057966a762efd4b53bb2c005aafcc9314811cabbd7895ac1564ff6dde93b1fb04ed04377831602fb378da2675c7c3885c1a125559f84cdd7a19d9c060fa8cb5019e39f51a0ac620ae941e9ceecb96fe23623ab6329469c8bf75382417979b62a85248b77352538a160699614ae28757734db49c8b905a3ef1905502983fc01f2fe5043'
);
UPDATE sqlite_sequence SET seq = 9 WHERE name = 'errors';
INSERT INTO deliveries VALUES
    ('2026-05-01', 'stored', '', 2, '2026-05-01T10:00:01.000000Z'),
    ('2026-05-05', 'stored', '', 7, '2026-05-05T08:30:00.000000Z'),
    ('2026-05-05', 'refused', 'signature wrong', 3, '2026-05-05T09:00:00.000000Z');
INSERT INTO health VALUES (1, '2026-05-05T08:30:00.000000Z');
