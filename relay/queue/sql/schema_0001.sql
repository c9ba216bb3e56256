-- Version 1. Three tables, so that a retry rewrites narrow rows and never a body.

-- Who may hold leases: one row per store that was opened. Numbers are never used again, and the keys of the messages
-- a holder puts start at its number << 32: unique over processes without asking anyone.
CREATE TABLE holder (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL,
    slot INTEGER NOT NULL
);

-- id and file stand side by side so that both can be found next to each other in a log frame.
-- due: the boot clock when the message is to be claimed: the earliest pending recipient or the expiry, whichever
-- comes first; NULL when all recipients are held or the entry is set aside (aside says why).
CREATE TABLE message (
    key INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    file TEXT NOT NULL,
    sender TEXT NOT NULL,
    listener TEXT NOT NULL,
    client TEXT NOT NULL,
    body_8bit INTEGER NOT NULL,
    size INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    created REAL NOT NULL,
    expires_wall REAL NOT NULL,
    expires REAL NOT NULL,
    due REAL,
    owner INTEGER,
    token INTEGER NOT NULL,
    until REAL NOT NULL,
    possible_duplicate INTEGER NOT NULL,
    aside TEXT
);

-- Partial: a message that is put leased and settled by its worker never enters message_due, and one that waits on
-- disk never message_leased.
CREATE INDEX message_due ON message (due) WHERE owner IS NULL AND due IS NOT NULL;
CREATE INDEX message_leased ON message (until) WHERE owner IS NOT NULL;

CREATE TABLE body (
    key INTEGER PRIMARY KEY,
    octets BLOB NOT NULL
);

CREATE TABLE recipient (
    message INTEGER NOT NULL,
    number INTEGER NOT NULL,
    mailbox TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL,
    due REAL NOT NULL,
    last_code INTEGER NOT NULL,
    last_enhanced TEXT NOT NULL,
    last_text TEXT NOT NULL,
    last_host TEXT NOT NULL,
    PRIMARY KEY (message, number)
) WITHOUT ROWID;

-- One row: the boot in which all boot-clock values were written.
CREATE TABLE boot (
    id TEXT NOT NULL
);
