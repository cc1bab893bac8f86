-- A receipt goes only in the transaction that says to which archive.
CREATE FUNCTION receipts_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'DELETE' AND EXISTS (SELECT 1 FROM receipts_leaving WHERE id = OLD.id) THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'receipts is append-only' USING ERRCODE = 'check_violation';
END
$$;
DROP TRIGGER receipts_append_only ON receipts;
CREATE TRIGGER receipts_append_only BEFORE UPDATE OR DELETE ON receipts
    FOR EACH ROW EXECUTE FUNCTION receipts_append_only();

-- What began in a time that is archived has ended, once. Asked once a statement, as a batch has many rows.
CREATE FUNCTION closed_times() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF (SELECT MIN(created_at_ms) FROM inserted) < (SELECT MAX(before_ms) FROM receipt_archives) THEN
        RAISE EXCEPTION '% of that time are archived', TG_TABLE_NAME USING ERRCODE = 'check_violation';
    END IF;
    RETURN NULL;
END
$$;
CREATE TRIGGER holds_closed_times AFTER INSERT ON holds
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION closed_times();
CREATE TRIGGER receipts_closed_times AFTER INSERT ON receipts
    REFERENCING NEW TABLE AS inserted FOR EACH STATEMENT EXECUTE FUNCTION closed_times();
