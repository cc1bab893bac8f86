CREATE TABLE api_keys (
    id            BIGINT PRIMARY KEY,
    wallet        TEXT NOT NULL REFERENCES wallets (address),
    -- SHA-256 of the key, hex. The key itself is kept nowhere.
    key_sha256    TEXT NOT NULL UNIQUE,
    label         TEXT,
    created_at_ms BIGINT NOT NULL,
    revoked_at_ms BIGINT
);
CREATE INDEX api_keys_by_wallet ON api_keys (wallet, id);

-- The first use of a nonce fixes what it is good for.
CREATE TABLE siwe_nonces (
    wallet        TEXT NOT NULL,
    nonce         TEXT NOT NULL,
    purpose       TEXT NOT NULL CHECK (purpose IN ('read', 'write')),
    expires_at_ms BIGINT NOT NULL,
    PRIMARY KEY (wallet, nonce)
);
CREATE INDEX siwe_nonces_by_expiry ON siwe_nonces (expires_at_ms);
