-- What has been published of what wallets are owed and of what there is to pay it with: a Merkle sum tree, and
-- the treasury's balance at a block. The newest few are kept.
CREATE TABLE reserves (
    number            BIGINT PRIMARY KEY,
    chain_id          BIGINT NOT NULL,
    asset             TEXT NOT NULL,
    pay_to            TEXT NOT NULL,
    block_number      BIGINT NOT NULL,
    block_hash        TEXT NOT NULL,
    block_time_ms     BIGINT NOT NULL,
    reserves_micro    BIGINT NOT NULL CHECK (reserves_micro >= 0),
    -- The one instant that the tree is of.
    taken_at_ms       BIGINT NOT NULL,
    wallets           BIGINT NOT NULL CHECK (wallets >= 0),
    liabilities_micro BIGINT NOT NULL CHECK (liabilities_micro >= 0),
    credited_since_micro BIGINT NOT NULL CHECK (credited_since_micro >= 0),
    -- What the leaves' salts are made from, hex: without it nobody can tell whose a leaf is.
    secret            TEXT NOT NULL,
    -- Null until all pages are there.
    root              TEXT
);

-- The tree in pages of 256: of leaves (level 0), and of the nodes that every eighth level above them has.
CREATE TABLE reserves_pages (
    publication BIGINT NOT NULL REFERENCES reserves (number),
    level       BIGINT NOT NULL,
    page        BIGINT NOT NULL,
    -- The first leaf's, by which a leaf is found; null above.
    first_salt  TEXT,
    nodes       TEXT NOT NULL,
    PRIMARY KEY (publication, level, page)
);
CREATE INDEX reserves_pages_by_salt ON reserves_pages (publication, first_salt) WHERE level = 0;
