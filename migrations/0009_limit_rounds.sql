-- What nodes tell each other of the requests that they have counted, for a minute: a list of who and how many.
CREATE TABLE limit_rounds (
    node   TEXT NOT NULL,
    -- Counts a node's own.
    round  BIGINT NOT NULL,
    counts TEXT NOT NULL,
    at_ms  BIGINT NOT NULL,
    PRIMARY KEY (node, round)
);
CREATE INDEX limit_rounds_by_time ON limit_rounds (at_ms);
