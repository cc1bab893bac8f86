-- When a server last began to sign with a key: the latest is the one that signs now.
ALTER TABLE receipt_keys ADD COLUMN used_ms BIGINT;
