-- The name that a payer gave a payment (x402's payment-identifier), by which it may be sent again under
-- another authorization and is the same payment. Null: it has none.
ALTER TABLE payments ADD COLUMN identifier TEXT;
CREATE INDEX payments_by_identifier ON payments (from_wallet, identifier) WHERE identifier IS NOT NULL;

-- A wallet's payments that are under way, and what has become of others lately, without reading all it ever made.
CREATE INDEX payments_unfinished ON payments (from_wallet)
    WHERE state IN ('verified', 'signed', 'broadcast', 'mined');
CREATE INDEX payments_moved ON payments (from_wallet, updated_at_ms);
