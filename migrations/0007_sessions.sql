-- Secrets that every node of this database must share, hex. One that the environment gives is not here.
CREATE TABLE secrets (
    name          TEXT PRIMARY KEY,
    value         TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);

-- Session tokens that were revoked one by one, for as long as they would have lasted.
CREATE TABLE revoked_sessions (
    id            TEXT PRIMARY KEY,
    expires_at_ms BIGINT NOT NULL
);
CREATE INDEX revoked_sessions_by_expiry ON revoked_sessions (expires_at_ms);

-- Of a wallet that has revoked all of its sessions, the word that tokens made since then carry. The row
-- may go when no older token can be alive.
CREATE TABLE session_generations (
    wallet        TEXT PRIMARY KEY,
    generation    TEXT NOT NULL,
    expires_at_ms BIGINT NOT NULL
);
CREATE INDEX session_generations_by_expiry ON session_generations (expires_at_ms);
