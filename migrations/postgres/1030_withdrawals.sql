-- What was given back to its wallet is not sent any more.
CREATE FUNCTION withdrawal_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a withdrawal that has ended cannot move' USING ERRCODE = 'check_violation';
END
$$;
CREATE TRIGGER withdrawals_end_once BEFORE UPDATE OF state ON payments
    FOR EACH ROW WHEN (OLD.kind = 'withdrawal' AND OLD.state IN ('expired', 'cancelled', 'finalized')
                       AND OLD.state IS DISTINCT FROM NEW.state)
    EXECUTE FUNCTION withdrawal_move();
