-- What a row of the journal is: an authorization that its payer sent us, a transfer that just arrived, or, the
-- other way, what a wallet takes out. (Every kind there will be, as a CHECK cannot be changed later on SQLite.)
ALTER TABLE payments ADD COLUMN kind TEXT NOT NULL DEFAULT 'authorization'
    CHECK (kind = 'authorization' OR kind = 'deposit' OR kind = 'withdrawal');
-- Whom the operator has given a deposit to; null: it is its sender's.
ALTER TABLE payments ADD COLUMN beneficiary TEXT;

-- Deposits that wait for their wallet. Those below the least that is credited are passed over.
CREATE INDEX payments_in_suspense ON payments (value_micro, from_wallet)
    WHERE kind = 'deposit' AND state = 'mined';
CREATE INDEX payments_by_beneficiary ON payments (beneficiary, id) WHERE beneficiary IS NOT NULL;

-- From where on, and up to where, the chain has been searched for deposits to an address.
CREATE TABLE deposit_cursors (
    chain_id    BIGINT NOT NULL,
    asset       TEXT NOT NULL,
    receiver    TEXT NOT NULL,
    first_block BIGINT NOT NULL,
    next_block  BIGINT NOT NULL,
    PRIMARY KEY (chain_id, asset, receiver)
);
