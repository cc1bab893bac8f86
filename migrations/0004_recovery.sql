-- What a wallet owes because the chain undid a top-up it had spent already.
ALTER TABLE wallets ADD COLUMN debt_micro BIGINT NOT NULL DEFAULT 0 CHECK (debt_micro >= 0);
-- Why the operator has frozen this wallet; null when it is not.
ALTER TABLE wallets ADD COLUMN frozen_reason TEXT;

-- Why an entry was made, where its kind alone does not say.
ALTER TABLE entries ADD COLUMN note TEXT;

-- What a transaction offers for gas, wei per unit, as decimals: they can exceed a BIGINT.
ALTER TABLE payment_transactions ADD COLUMN max_fee_wei TEXT NOT NULL DEFAULT '0';
ALTER TABLE payment_transactions ADD COLUMN priority_fee_wei TEXT NOT NULL DEFAULT '0';
-- Set when the chain has taken a transaction of this account nonce, this one or another.
ALTER TABLE payment_transactions ADD COLUMN settled_at_ms BIGINT;
CREATE INDEX payment_transactions_by_nonce ON payment_transactions (relayer, account_nonce);

-- The moves a payment can make; no other is possible, whoever tries.
CREATE TABLE payment_moves (
    from_state TEXT NOT NULL,
    to_state   TEXT NOT NULL,
    PRIMARY KEY (from_state, to_state)
);
INSERT INTO payment_moves (from_state, to_state) VALUES
    ('verified', 'signed'), ('verified', 'mined'), ('verified', 'expired'), ('verified', 'cancelled'),
    ('signed', 'broadcast'), ('signed', 'mined'), ('signed', 'expired'), ('signed', 'cancelled'),
    ('broadcast', 'verified'), ('broadcast', 'mined'), ('broadcast', 'expired'), ('broadcast', 'cancelled'),
    ('mined', 'broadcast'), ('mined', 'credited'),
    ('credited', 'finalized'), ('credited', 'reorged'),
    -- The operator asks for another look.
    ('expired', 'verified'), ('cancelled', 'verified');
