-- A receipt goes only in the transaction that says to which archive.
DROP TRIGGER receipts_no_delete;
CREATE TRIGGER receipts_no_delete BEFORE DELETE ON receipts
WHEN NOT EXISTS (SELECT 1 FROM receipts_leaving WHERE id = OLD.id)
BEGIN SELECT RAISE(ABORT, 'receipts is append-only'); END;

-- What began in a time that is archived has ended, once.
CREATE TRIGGER holds_closed_times BEFORE INSERT ON holds
WHEN NEW.created_at_ms < (SELECT MAX(before_ms) FROM receipt_archives)
BEGIN SELECT RAISE(ABORT, 'holds of that time are archived'); END;
CREATE TRIGGER receipts_closed_times BEFORE INSERT ON receipts
WHEN NEW.created_at_ms < (SELECT MAX(before_ms) FROM receipt_archives)
BEGIN SELECT RAISE(ABORT, 'receipts of that time are archived'); END;
