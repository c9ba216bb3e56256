-- Version 2. Mail that waits for a next hop alone stands apart from mail that is simply due; operators' requests.

-- waits_for: the next hops, names with a space between, because of which alone it waits: no connection came about. It is
-- tried in small portions while they are away and at once when one is back. Empty: it is due when it is due.
ALTER TABLE message ADD COLUMN waits_for TEXT NOT NULL DEFAULT '';

-- warned: its sender was told that it is late. given_up: an operator wants it returned, without a last attempt.
ALTER TABLE message ADD COLUMN warned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE message ADD COLUMN given_up INTEGER NOT NULL DEFAULT 0;

DROP INDEX message_due;
CREATE INDEX message_due ON message (due) WHERE owner IS NULL AND due IS NOT NULL AND waits_for = '';
CREATE INDEX message_parked ON message (due) WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> '';
CREATE INDEX message_waits ON message (waits_for, due) WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> '';
