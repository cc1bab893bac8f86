-- What was on its way when reserves were published: between the books and the block that the treasury's balance is of.
ALTER TABLE reserves ADD COLUMN leaving_micro BIGINT NOT NULL DEFAULT 0 CHECK (leaving_micro >= 0);
ALTER TABLE reserves ADD COLUMN left_since_micro BIGINT NOT NULL DEFAULT 0 CHECK (left_since_micro >= 0);
-- Deposits that are in the treasury and in nobody's balance yet.
ALTER TABLE reserves ADD COLUMN suspense_micro BIGINT NOT NULL DEFAULT 0 CHECK (suspense_micro >= 0);
