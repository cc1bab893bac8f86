-- What a payment was made for: a hash of the request it came with; null for a top-up.
ALTER TABLE payments ADD COLUMN request_hash TEXT;

-- A request that may be sent again and is run once: the name its wallet knows it by, what it asked
-- for, and its hold, which becomes its receipt.
CREATE TABLE claims (
    wallet        TEXT NOT NULL,
    name          TEXT NOT NULL,
    request_hash  TEXT NOT NULL,
    request_id    TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL,
    PRIMARY KEY (wallet, name)
);
CREATE INDEX claims_by_time ON claims (created_at_ms);

-- What such a request was answered, as the upstream gave it, for when it is sent again.
CREATE TABLE kept_answers (
    request_id    TEXT PRIMARY KEY,
    kind          TEXT NOT NULL CHECK (kind IN ('json', 'stream')),
    body          TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);
CREATE INDEX kept_answers_by_time ON kept_answers (created_at_ms);

-- Of one transfer one payment is credited. A place that was only looked at may turn out to be another's.
DROP INDEX payments_by_transfer;
CREATE UNIQUE INDEX payments_by_transfer ON payments (chain_id, tx_hash, log_index)
    WHERE state IN ('credited', 'finalized');

-- What the relayers have sent and the chain has not taken for good.
CREATE INDEX payment_transactions_open ON payment_transactions (relayer, account_nonce)
    WHERE settled_at_ms IS NULL;
