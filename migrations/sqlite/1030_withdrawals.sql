-- What was given back to its wallet is not sent any more.
CREATE TRIGGER withdrawals_end_once BEFORE UPDATE OF state ON payments
WHEN OLD.kind = 'withdrawal' AND OLD.state IN ('expired', 'cancelled', 'finalized') AND OLD.state <> NEW.state
BEGIN SELECT RAISE(ABORT, 'a withdrawal that has ended cannot move'); END;
