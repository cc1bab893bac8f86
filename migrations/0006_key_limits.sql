-- What a key may do; null: no such limit.
ALTER TABLE api_keys ADD COLUMN expires_at_ms BIGINT;
ALTER TABLE api_keys ADD COLUMN spend_cap_micro BIGINT CHECK (spend_cap_micro >= 0);
ALTER TABLE api_keys ADD COLUMN spend_cap_per_day_micro BIGINT CHECK (spend_cap_per_day_micro >= 0);
-- The ids of models, as a JSON list.
ALTER TABLE api_keys ADD COLUMN allowed_models TEXT;
ALTER TABLE api_keys ADD COLUMN requests_per_minute BIGINT CHECK (requests_per_minute > 0);

-- What a key has spent and what its open holds may still cost, kept by the transactions that hold and
-- end. A request belongs to the UTC day it was held on, counted from 1970; day 0 is all days together.
CREATE TABLE key_spending (
    api_key_id  BIGINT NOT NULL,
    day         BIGINT NOT NULL,
    spent_micro BIGINT NOT NULL CHECK (spent_micro >= 0),
    held_micro  BIGINT NOT NULL CHECK (held_micro >= 0),
    PRIMARY KEY (api_key_id, day)
);

INSERT INTO key_spending (api_key_id, day, spent_micro, held_micro)
SELECT api_key_id, day, CAST(SUM(spent) AS BIGINT), CAST(SUM(held) AS BIGINT) FROM (
    SELECT api_key_id, 0 AS day, charged_micro AS spent, 0 AS held FROM receipts
    UNION ALL
    SELECT api_key_id, created_at_ms / 86400000, charged_micro, 0 FROM receipts
    UNION ALL
    SELECT api_key_id, 0, 0, amount_micro FROM holds
    UNION ALL
    SELECT api_key_id, created_at_ms / 86400000, 0, amount_micro FROM holds
) so_far
WHERE api_key_id IS NOT NULL
GROUP BY api_key_id, day;
