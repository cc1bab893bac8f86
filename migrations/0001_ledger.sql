-- Amounts are micro-USDC, times Unix milliseconds, addresses lower-case hex.

CREATE TABLE sequences (
    name  TEXT PRIMARY KEY,
    value BIGINT NOT NULL
);

CREATE TABLE wallets (
    address       TEXT PRIMARY KEY,
    balance_micro BIGINT NOT NULL DEFAULT 0,
    locked_micro  BIGINT NOT NULL DEFAULT 0,
    -- The number of this wallet's entries so far; the newest entry carries it.
    seq           BIGINT NOT NULL DEFAULT 0,
    created_at_ms BIGINT NOT NULL,
    CONSTRAINT never_negative CHECK (locked_micro >= 0 AND balance_micro >= locked_micro),
    CONSTRAINT seq_counts CHECK (seq >= 0)
);

-- The journal of money: append-only, two sides a row. The other side is a system account, which
-- keeps no running balance: that would be the one row every request waits for.
CREATE TABLE entries (
    wallet               TEXT NOT NULL REFERENCES wallets (address),
    seq                  BIGINT NOT NULL,
    -- Every kind there will be, as a CHECK cannot be changed later on SQLite: a reversal takes back a
    -- top-up that the chain undid, what is not there any more becomes a debt, which repayments pay off
    -- out of later top-ups; an adjustment is the operator's, with a reason.
    kind                 TEXT NOT NULL CHECK (kind IN (
        'topup', 'charge', 'reversal', 'debt', 'repayment', 'withdrawal', 'adjustment'
    )),
    -- The payment's id for a top-up, the request's for a charge.
    reference            TEXT NOT NULL,
    amount_micro         BIGINT NOT NULL CHECK (amount_micro <> 0),
    balance_before_micro BIGINT NOT NULL CHECK (balance_before_micro >= 0),
    balance_after_micro  BIGINT NOT NULL CHECK (balance_after_micro >= 0),
    contra_account       TEXT NOT NULL CHECK (
        contra_account IN ('treasury', 'revenue', 'debt', 'operator')
    ),
    contra_micro         BIGINT NOT NULL,
    created_at_ms        BIGINT NOT NULL,
    PRIMARY KEY (wallet, seq),
    CONSTRAINT once UNIQUE (kind, reference),
    CONSTRAINT seq_positive CHECK (seq > 0),
    CONSTRAINT two_sides CHECK (amount_micro + contra_micro = 0),
    CONSTRAINT running_balance CHECK (balance_after_micro = balance_before_micro + amount_micro),
    CONSTRAINT kind_decides CHECK (
        (kind = 'topup' AND amount_micro > 0 AND contra_account = 'treasury')
        OR (kind = 'charge' AND amount_micro < 0 AND contra_account = 'revenue')
        OR (kind IN ('reversal', 'withdrawal') AND amount_micro < 0 AND contra_account = 'treasury')
        OR (kind = 'debt' AND amount_micro > 0 AND contra_account = 'debt')
        OR (kind = 'repayment' AND amount_micro < 0 AND contra_account = 'debt')
        OR (kind = 'adjustment' AND contra_account = 'operator')
    )
);

-- The servers alive; a hold whose node's lease has run out belongs to nobody.
CREATE TABLE nodes (
    id               TEXT PRIMARY KEY,
    lease_expires_ms BIGINT NOT NULL
);

-- Open holds only. The hold's end deletes the row and writes the receipt, in one transaction.
CREATE TABLE holds (
    id            TEXT PRIMARY KEY,
    wallet        TEXT NOT NULL REFERENCES wallets (address),
    node          TEXT NOT NULL,
    api_key_id    BIGINT,
    amount_micro  BIGINT NOT NULL CHECK (amount_micro >= 0),
    -- What was agreed, as JSON: model, prices, markup.
    terms         TEXT NOT NULL,
    created_at_ms BIGINT NOT NULL
);
CREATE INDEX holds_by_node ON holds (node);
CREATE INDEX holds_by_wallet ON holds (wallet);

CREATE TABLE receipts (
    id                TEXT PRIMARY KEY,
    wallet            TEXT NOT NULL REFERENCES wallets (address),
    api_key_id        BIGINT,
    model             TEXT NOT NULL,
    outcome           TEXT NOT NULL CHECK (outcome IN ('settled', 'estimated', 'released')),
    -- Why it ended otherwise than by an answer with usage; null when it did.
    reason            TEXT,
    hold_micro        BIGINT NOT NULL CHECK (hold_micro >= 0),
    charged_micro     BIGINT NOT NULL,
    cost_pico         BIGINT NOT NULL CHECK (cost_pico >= 0),
    prompt_tokens     BIGINT NOT NULL CHECK (prompt_tokens >= 0),
    cached_tokens     BIGINT NOT NULL CHECK (cached_tokens >= 0),
    completion_tokens BIGINT NOT NULL CHECK (completion_tokens >= 0),
    -- What the upstream reported, as it reported it.
    usage_raw         TEXT,
    terms             TEXT NOT NULL,
    created_at_ms     BIGINT NOT NULL,
    ended_at_ms       BIGINT NOT NULL,
    CONSTRAINT never_above_the_hold CHECK (charged_micro >= 0 AND charged_micro <= hold_micro),
    CONSTRAINT cached_is_inside CHECK (cached_tokens <= prompt_tokens),
    CONSTRAINT released_is_free CHECK (outcome <> 'released' OR charged_micro = 0)
);
CREATE INDEX receipts_by_wallet ON receipts (wallet, created_at_ms, id);

-- What /v1/usage answers from, kept by the transaction that ends each hold. Key 0: no key.
CREATE TABLE usage_totals (
    wallet            TEXT NOT NULL REFERENCES wallets (address),
    api_key_id        BIGINT NOT NULL,
    request_count     BIGINT NOT NULL,
    prompt_tokens     BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    charged_micro     BIGINT NOT NULL,
    revenue_pico      BIGINT NOT NULL,
    PRIMARY KEY (wallet, api_key_id)
);
