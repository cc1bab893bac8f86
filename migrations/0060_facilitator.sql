-- How often a remote facilitator was asked to settle a payment, and when it may be asked again.
ALTER TABLE payments ADD COLUMN facilitator_calls BIGINT NOT NULL DEFAULT 0;
ALTER TABLE payments ADD COLUMN facilitator_next_ms BIGINT NOT NULL DEFAULT 0;
-- The reason that it gave when it refused last; null where its last answer was another. It ends nothing.
ALTER TABLE payments ADD COLUMN facilitator_refusal TEXT;
