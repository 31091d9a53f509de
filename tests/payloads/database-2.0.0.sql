-- A database as version 2.0.0 made it: its schema, and errors of our own.
-- The errors 7, 8 and 10 to 12 were deleted by their age. The triggers fill issues and blocks.

CREATE TABLE deliveries (
    period     TEXT NOT NULL,
    outcome TEXT NOT NULL,
    reason  TEXT NOT NULL,
    count   INTEGER NOT NULL,
    last_at TEXT NOT NULL,
    PRIMARY KEY (period, outcome, reason)
) WITHOUT ROWID;

CREATE TABLE health (id INTEGER PRIMARY KEY CHECK (id = 1), checked_at TEXT NOT NULL);

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

CREATE TABLE bodies (
    id            INTEGER PRIMARY KEY,                  -- of the error
    payload_bytes INTEGER NOT NULL,                     -- length of the body
    payload       BLOB NOT NULL                         -- the body, compressed by zlib where that is shorter
);

CREATE TABLE blocks (
    id       INTEGER PRIMARY KEY,                       -- of its errors, without the last three digits
    count    INTEGER NOT NULL,
    first_at TEXT NOT NULL,
    last_at  TEXT NOT NULL
);

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

CREATE VIRTUAL TABLE errors_search USING fts5 (
    title, message, culprit, exception_type, exception_value, facets,
    content = '', columnsize = 0, prefix = '1 2 3 4 5 6'
);

CREATE TABLE search_progress (
    id         INTEGER PRIMARY KEY CHECK (id = 1),
    indexed_to INTEGER NOT NULL,                        -- id of the newest error in errors_search
    deletions  INTEGER NOT NULL                         -- of errors, so that an export tells them
);

CREATE INDEX errors_event_id ON errors (event_id) WHERE event_id IS NOT NULL;

CREATE INDEX errors_issue_id ON errors (issue_id, server, received_at, release)
WHERE issue_id IS NOT NULL;

CREATE INDEX errors_short_id ON errors (short_id) WHERE short_id IS NOT NULL;

CREATE INDEX errors_digest ON errors (digest) WHERE digest IS NOT NULL;

CREATE INDEX issues_newest ON issues (newest);

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

INSERT INTO search_progress VALUES (1, 9, 3);
INSERT INTO errors VALUES (1, '2026-06-01T08:30:00.000000Z', '2026-11-29T00:54:43.355613Z', 'error', 'created', 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa', '77', 'TEA-1', 'KeyError: tea', 'tea', NULL, 'error', NULL, NULL, NULL, NULL, NULL, '4500', 'p4500', NULL, 'KeyError', 'tea', 'https://acme.sentry.io/organizations/acme/issues/77/events/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa/', NULL, 'sentry.io', 'error', NULL);
INSERT INTO errors VALUES (2, '2026-06-02T08:30:00.000000Z', '2026-11-29T00:54:43.373108Z', 'error', 'created', 'bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb', '77', NULL, 'KeyError: 没有 100%', 'tea', NULL, 'error', NULL, NULL, NULL, NULL, NULL, '4500', NULL, NULL, 'KeyError', 'tea', 'https://acme.sentry.io/organizations/acme/issues/77/events/bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb/', NULL, 'sentry.io', 'error', NULL);
INSERT INTO errors VALUES (3, '2026-06-03T08:30:00.000000Z', '2026-11-29T00:54:43.376518Z', 'issue', 'created', NULL, '80', 'ONE-1', 'Pot is empty', 'Pot is empty', NULL, 'error', NULL, NULL, NULL, NULL, NULL, '1', 'p1', NULL, NULL, NULL, 'https://sentry.io/organizations/acme/issues/80/', NULL, 'sentry.io', 'error', NULL);
INSERT INTO errors VALUES (4, '2026-06-04T08:30:00.000000Z', '2026-11-29T00:54:43.378303Z', 'issue', 'created', NULL, '80', NULL, 'Pot is empty', 'Pot is empty', NULL, 'error', NULL, NULL, NULL, NULL, NULL, '2', 'p2', NULL, NULL, NULL, 'https://sentry.io/organizations/acme/issues/80/', NULL, 'sentry.io', 'error', NULL);
INSERT INTO errors VALUES (5, '2026-06-05T08:30:00.000000Z', '2026-11-29T00:54:43.380812Z', 'issue', 'unresolved', NULL, '77', 'TEA-1', 'Pot is empty', 'Pot is empty', NULL, 'error', NULL, NULL, NULL, NULL, NULL, '4500', 'p4500', NULL, NULL, NULL, 'https://sentry.io/organizations/acme/issues/77/', NULL, 'sentry.io', 'error', '13935133e3a7083a92b1c7780cca2193');
INSERT INTO errors VALUES (6, '2026-06-06T08:30:00.000000Z', '2026-11-29T00:54:43.382565Z', 'event_alert', 'triggered', 'cccccccccccccccccccccccccccccccc', '77', NULL, 'KeyError: tea', 'tea', NULL, 'fatal', NULL, NULL, NULL, NULL, NULL, '4500', NULL, NULL, 'KeyError', 'tea', 'https://acme.sentry.io/organizations/acme/issues/77/events/cccccccccccccccccccccccccccccccc/', 'Loud', 'sentry.io', 'error', NULL);
INSERT INTO errors VALUES (9, '2026-06-09T08:30:00.000000Z', '2026-11-29T00:54:43.391323Z', NULL, NULL, NULL, NULL, NULL, 'legacy, without ids', 'legacy, without ids', 'brew', NULL, NULL, NULL, NULL, NULL, NULL, NULL, 'tea', NULL, NULL, NULL, NULL, NULL, NULL, 'error', 'e17a8c2f5f44bf3d2c649aa7ade5353b');
INSERT INTO bodies VALUES (1, 397, X'78018550c14ec3300cfd15e473d54c82a952ee9cf80484262f7521d02591e3767451ff1da70589dbac1ce2e7e7e7671740273e06b0e09850a887067a14045b8098236f9f99829c7caf2cbc13da2e5e4652ea0b2dcf55c13e08a1e223cd342abecb36e0739e6857ed3aad278e9fe404ecd3f17068e04ae7d3c4b5e14324656b0cba0bb559adf0d2fa6822bf63f037acfef356349b64365d6774561045ef84d1b9f4ed28ed472830e3385106fb5a4096f47f0d656e4535b4ef9305dd97303a651518182fbf8d831f2968b633dbb4d4e57da010c13e36304ce1efe667a62bac6f6b7debfa03ad6588d5');
INSERT INTO bodies VALUES (2, 405, X'780185504b4ec4300cbdcac812bbaa290254297b561c6184466eea4220934489dba1543d007760c31538d49c03b70589dd445ec47a1f3f7b02346c83070d261132b550408b8ca027a094425a3f03793ed85658cd852772b6ec48a80f34de2f0e7a77fefe3a7f7eecaeabea4a70470339c137fb026cce3d6dee752d784ce1850c83bebdabaa024ed41cfab4089e9963d64aa139529925521a4b1b54484fe8ed3b2e7be41554ab655675ad6496e7ac2ea46e94cca53743713bc60403ba9e32e8fd043cc6ffeb0873052510134a9719cd2b2734c29aa04b78fc1576d691976e63967114b2b39e7c007d5340d7fbbfdb37894e303fce4bcdf30f95a28cf5');
INSERT INTO bodies VALUES (3, 201, X'78013d8eb10e83300c447f05796e1bd8107b872e6d7fc10a16a40d09b24d258af2ef350cdd7cefeeacdb00bd869ca003cf844a3d9ca04745e83608220b1d476f7e5b9b256366bdedf271bf9e1b231a345a089e59ab20154db3ae86237d281a26e6cca667ce2ff2faffb657252e8345e6068a0588278c21bd8d8caab374ce0925e5f512b2cb3c600a5fdcb78a433f913bd6896b6b07a5941f0aa44183');
INSERT INTO bodies VALUES (4, 198, X'78013d8e4b0e83300c44af82bc460d6285b84177bd82152c481b92c8369500e5ee352cba9bcfd3684e40af212718c133a1d2042d4ca808e3094164a35b4cd60f9d55b264d6a7d9b4c5d882068d46c02b6b13a4a1b5e86e54a42f458b8939b3f9c2f94d5eff53fdb514b7d990d243358078c518d2c79245b5c8e89c5052de1f21bbcc33a670e075541cfa95dc7d4ddcd039a8b5fe00f0ad41bc');
INSERT INTO bodies VALUES (5, 210, X'78013d8e310ec2300c45af527906522450a46e0c0c6c0c5c206aad36902691ed562a55ee8edb81cdfff9e9ebafe05af12942035324e41466ece0009d1307cd0a9e79c2fde854b1565f3c2492c7165ff7dbf1ac44bc0495e099a4f25ce19865511c70c6a018891269ce94ded8cabfed72adebad2f4cbd5a798f4535a4d1051f3f0a0791cc8d318c516839f96412f52efaafdb46b371ed8866dfc8c65a03a5941f78be4426');
INSERT INTO bodies VALUES (6, 423, X'78018551414ec4300cfc0af2b96a56025429774ef003842a6fea964036a91c679752f5efb82d8bb86d94436ccfd8e3c90ce8c4a7081684fd301053071574280876063a5394bf47eb3bc5b91b47e9e22590429f697a624e6cef8450f341fb05cdf7da3e68ec732eb4776d1a8d474e1fe474e0c3e3e150c1858e6de195f02e32666b0cba13d55935f154fb64120f18fd37ae1be4ad68b696d9348dd9b4677343ad333a97be1c8dbb0d339c3114ca605f679069fcbf8622b7a20adaf7c982ee53189da266e8194fbfc4de078a1aedc87a9c941a7ca498c0de57d0977875fdc87481e56d59af1a77fd8396cbe6e04b2a1d2ccb0fafa49266');
INSERT INTO bodies VALUES (9, 101, X'780125cc510a80201084e1abc43c7b822e13a68b6d588aae4988774fe9edff6098067ae816aced8f8d2d564041583ccdec0a17e5acdd9427a7cdab96ca7284220bdb3cb6318593cc3881901e36c5c7c4d37ba28afe01a3412179');
INSERT INTO deliveries VALUES ('', 'stored', '', 40, '2026-01-05T08:30:00.000000Z');
INSERT INTO deliveries VALUES ('2026-06-01T08:30', 'stored', '', 2, '2026-06-01T08:31:00.000000Z');
INSERT INTO deliveries VALUES ('2026-06-02T08:30', 'refused', 'signature wrong', 3, '2026-06-02T08:31:00.000000Z');
INSERT INTO deliveries VALUES ('2026-06-02T08:40', 'refused', 'signature wrong', 1, '2026-06-02T08:41:00.000000Z');
UPDATE sqlite_sequence SET seq = 12;
PRAGMA user_version = 2;
