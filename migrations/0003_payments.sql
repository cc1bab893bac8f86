-- One signed authorization and its life on the chain.
CREATE TABLE payments (
    id            BIGINT PRIMARY KEY,
    chain_id      BIGINT NOT NULL,
    asset         TEXT NOT NULL,
    from_wallet   TEXT NOT NULL,
    nonce         TEXT NOT NULL,
    to_wallet     TEXT NOT NULL,
    value_micro   BIGINT NOT NULL CHECK (value_micro > 0),
    valid_after   BIGINT NOT NULL,
    valid_before  BIGINT NOT NULL,
    signature     TEXT NOT NULL,
    state         TEXT NOT NULL CHECK (state IN (
        'verified', 'signed', 'broadcast', 'mined', 'credited', 'finalized',
        'expired', 'cancelled', 'failed', 'reorged'
    )),
    -- The head when it was verified: its logs cannot be in an earlier block.
    seen_block    BIGINT NOT NULL,
    -- Where the transfer was found, ours or somebody else's.
    tx_hash       TEXT,
    block_number  BIGINT,
    block_hash    TEXT,
    log_index     BIGINT,
    last_error    TEXT,
    created_at_ms BIGINT NOT NULL,
    updated_at_ms BIGINT NOT NULL,
    CONSTRAINT one_authorization UNIQUE (chain_id, asset, from_wallet, nonce),
    CONSTRAINT found_before_credited CHECK (
        state NOT IN ('mined', 'credited', 'finalized')
        OR (tx_hash IS NOT NULL AND block_number IS NOT NULL AND log_index IS NOT NULL)
    )
);
CREATE INDEX payments_by_wallet ON payments (from_wallet, id);
CREATE INDEX payments_by_state ON payments (state);
-- One transfer pays for one payment. (Before it is found, log_index is null and not compared.)
CREATE UNIQUE INDEX payments_by_transfer ON payments (chain_id, tx_hash, log_index);

-- What was signed for a payment, kept before it is broadcast; a replacement is another row.
CREATE TABLE payment_transactions (
    tx_hash       TEXT PRIMARY KEY,
    payment_id    BIGINT NOT NULL REFERENCES payments (id),
    relayer       TEXT NOT NULL,
    account_nonce BIGINT NOT NULL,
    raw           TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);
CREATE INDEX payment_transactions_by_payment ON payment_transactions (payment_id);

-- The relayer's account nonces are the database's to give.
CREATE TABLE relayers (
    chain_id   BIGINT NOT NULL,
    address    TEXT NOT NULL,
    next_nonce BIGINT NOT NULL,
    PRIMARY KEY (chain_id, address)
);
