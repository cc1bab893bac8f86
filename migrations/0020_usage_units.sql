-- What was used by unit, as JSON, where prompt, cached and completion tokens do not say all of it.
ALTER TABLE receipts ADD COLUMN usage_units TEXT;
-- What the upstream says that it charges for it, in pico-USD.
ALTER TABLE receipts ADD COLUMN upstream_cost_pico BIGINT CHECK (upstream_cost_pico >= 0);
