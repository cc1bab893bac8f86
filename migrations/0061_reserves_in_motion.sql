-- What was on its way when reserves were published, between the books and the block that the treasury's balance is of.
-- Null in what was published before that was told.
ALTER TABLE reserves ADD COLUMN leaving_micro BIGINT CHECK (leaving_micro >= 0);
ALTER TABLE reserves ADD COLUMN left_since_micro BIGINT CHECK (left_since_micro >= 0);
-- What is in the treasury and in nobody's balance yet.
ALTER TABLE reserves ADD COLUMN uncredited_micro BIGINT CHECK (uncredited_micro >= 0);
