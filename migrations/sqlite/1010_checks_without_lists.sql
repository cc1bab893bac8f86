-- SQLite makes a table of a list of more than two each time that it is compared with: two for each entry and
-- one for each receipt, which cost more than the rest of the row. The same is said without lists. What a CHECK
-- says is not on the disk but in the table's own text, which is changed as SQLite's documentation has it
-- (lang_altertable, "Making Other Kinds Of Table Schema Changes").
PRAGMA writable_schema = ON;
UPDATE sqlite_schema SET sql = replace(replace(sql,
    'CHECK (kind IN (
        ''topup'', ''charge'', ''reversal'', ''debt'', ''repayment'', ''withdrawal'', ''adjustment''
    ))',
    'CHECK (
        kind = ''charge'' OR kind = ''topup'' OR kind = ''reversal'' OR kind = ''debt'' OR kind = ''repayment''
        OR kind = ''withdrawal'' OR kind = ''adjustment''
    )'),
    'CHECK (
        contra_account IN (''treasury'', ''revenue'', ''debt'', ''operator'')
    )',
    'CHECK (
        contra_account = ''revenue'' OR contra_account = ''treasury'' OR contra_account = ''debt''
        OR contra_account = ''operator''
    )')
WHERE type = 'table' AND name = 'entries';
UPDATE sqlite_schema SET sql = replace(sql,
    'CHECK (outcome IN (''settled'', ''estimated'', ''released''))',
    'CHECK (outcome = ''settled'' OR outcome = ''estimated'' OR outcome = ''released'')')
WHERE type = 'table' AND name = 'receipts';
PRAGMA writable_schema = RESET;
