-- The keys that receipts have been signed with, so that those of old can still be told from forgeries. The
-- private ones are not here.
CREATE TABLE receipt_keys (
    address       TEXT PRIMARY KEY,
    since_ms      BIGINT NOT NULL,
    -- Set by the operator where somebody else may have the key: what it signs is worth nothing any more.
    revoked_at_ms BIGINT
);
