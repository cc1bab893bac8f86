-- The name that a payer gave a payment (x402's payment-identifier), by which it may be sent again under
-- another authorization and is the same payment. Null: it has none.
ALTER TABLE payments ADD COLUMN identifier TEXT;
CREATE INDEX payments_by_identifier ON payments (from_wallet, identifier) WHERE identifier IS NOT NULL;
