-- Receipts that are moved into files, so that their table stays small.
CREATE TABLE receipt_archives (
    id                   BIGINT PRIMARY KEY,
    -- The name of its file. Where that is kept is the operator's affair.
    file                 TEXT NOT NULL UNIQUE,
    -- Its receipts are of requests that began before this. From when this row is there on, no hold of such
    -- a request is made and none ends: what is in a file cannot be there a second time.
    before_ms            BIGINT NOT NULL,
    created_at_ms        BIGINT NOT NULL,
    -- What is in the file; null until it is whole and on the disk.
    sha256               TEXT,
    receipts             BIGINT,
    charged_micro        BIGINT,
    -- What has been taken out of the table so far, in the order of the file.
    removed              BIGINT NOT NULL DEFAULT 0 CHECK (removed >= 0),
    removed_charged_micro BIGINT NOT NULL DEFAULT 0 CHECK (removed_charged_micro >= 0),
    CONSTRAINT whole_or_not_yet CHECK (
        (sha256 IS NULL AND receipts IS NULL AND charged_micro IS NULL AND removed = 0)
        OR (sha256 IS NOT NULL AND receipts IS NOT NULL AND charged_micro IS NOT NULL)
    ),
    CONSTRAINT no_more_than_there_are CHECK (removed <= COALESCE(receipts, 0))
);
CREATE INDEX receipt_archives_by_time ON receipt_archives (before_ms);

-- Receipts that the transaction under way is taking out; a trigger lets no other go. Empty between transactions.
CREATE TABLE receipts_leaving (
    id      TEXT PRIMARY KEY,
    archive BIGINT NOT NULL REFERENCES receipt_archives (id)
);

-- What those taken out came to, so that the books can still be worked out: by wallet and key (0: no key) …
CREATE TABLE archived_totals (
    wallet            TEXT NOT NULL REFERENCES wallets (address),
    api_key_id        BIGINT NOT NULL,
    receipts          BIGINT NOT NULL,
    -- Those that have an entry.
    charges           BIGINT NOT NULL,
    -- Those that were not released, as usage_totals counts them.
    request_count     BIGINT NOT NULL,
    prompt_tokens     BIGINT NOT NULL,
    completion_tokens BIGINT NOT NULL,
    charged_micro     BIGINT NOT NULL,
    revenue_pico      BIGINT NOT NULL,
    PRIMARY KEY (wallet, api_key_id)
);

-- … and by key and UTC day, as key_spending counts them.
CREATE TABLE archived_spending (
    api_key_id  BIGINT NOT NULL,
    day         BIGINT NOT NULL,
    spent_micro BIGINT NOT NULL,
    PRIMARY KEY (api_key_id, day)
);

-- Whether a claim still asks a receipt what became of its request.
CREATE INDEX claims_by_request ON claims (request_id);
