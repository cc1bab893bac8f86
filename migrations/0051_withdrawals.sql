-- Withdrawals are payments the other way: an authorization of the treasury's to the wallet (EIP-3009), whose amount is
-- locked on the wallet until the transfer is final, or can never be.
CREATE INDEX payments_withdrawn ON payments (to_wallet, id) WHERE kind = 'withdrawal';
CREATE INDEX payments_withdrawn_lately ON payments (created_at_ms) WHERE kind = 'withdrawal';
