CREATE TRIGGER payments_legal_moves BEFORE UPDATE OF state ON payments
WHEN OLD.state <> NEW.state AND NOT EXISTS (
    SELECT 1 FROM payment_moves WHERE from_state = OLD.state AND to_state = NEW.state
)
BEGIN SELECT RAISE(ABORT, 'a payment cannot move so'); END;
