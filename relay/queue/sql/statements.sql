-- Every statement of the queue, by name. Lists of keys come as JSON arrays: one statement serves any number of them,
-- and one step of it hands the interpreter lock over once instead of once a row.

-- name: insert_messages
INSERT INTO message (key, id, file, sender, listener, client, body_8bit, size, checksum, created, expires_wall,
    expires, due, owner, token, until, possible_duplicate, waits_for, terms) VALUES

-- name: insert_bodies
INSERT INTO body (key, octets) VALUES

-- name: insert_recipients
INSERT INTO recipient (message, number, mailbox, state, attempts, due, last_code, last_enhanced, last_text,
    last_host, terms) VALUES

-- name: leases_of
-- For each key still there: its token, its highest recipient number, its body file.
SELECT json_group_array(json_array(message.key, token,
    (SELECT max(number) FROM recipient WHERE recipient.message = message.key), file))
FROM json_each(?) AS wanted JOIN message ON message.key = wanted.value WHERE owner IS NOT NULL

-- name: delete_recipients
DELETE FROM recipient WHERE message IN (SELECT value FROM json_each(?))

-- name: delete_bodies
DELETE FROM body WHERE key IN (SELECT value FROM json_each(?))

-- name: delete_messages
DELETE FROM message WHERE key IN (SELECT value FROM json_each(?))

-- name: finish_recipients
DELETE FROM recipient WHERE message = ? AND number IN (SELECT value FROM json_each(?))

-- name: defer_recipient
-- Why somebody was held stays, whatever an attempt says that was under way.
UPDATE recipient SET attempts = ?, due = ?,
    last_code = CASE WHEN state = 'held' AND last_text LIKE 'held: %' THEN last_code ELSE ? END,
    last_enhanced = CASE WHEN state = 'held' AND last_text LIKE 'held: %' THEN last_enhanced ELSE ? END,
    last_text = CASE WHEN state = 'held' AND last_text LIKE 'held: %' THEN last_text ELSE ? END,
    last_host = CASE WHEN state = 'held' AND last_text LIKE 'held: %' THEN last_host ELSE ? END
WHERE message = ? AND number = ?

-- name: recipients_left
SELECT count(*) FROM recipient WHERE message = ?

-- name: set_due
UPDATE message SET due = (SELECT min(min(recipient.due), message.expires) FROM recipient
    WHERE recipient.message = message.key AND state = 'pending')
WHERE key = ? AND aside IS NULL

-- name: end_lease
UPDATE message SET owner = NULL, possible_duplicate = ?, waits_for = ?, warned = max(warned, ?) WHERE key = ?

-- name: due_keys
-- Each with the slot of the holder whose lease ran out, if that is why it may be claimed; and whether it is parked.
SELECT json_group_array(json_array(key, slot, parked)) FROM (
    SELECT key, slot, parked FROM (
        SELECT * FROM (SELECT key, due, NULL AS slot, 0 AS parked FROM message INDEXED BY message_due
            WHERE owner IS NULL AND due IS NOT NULL AND waits_for = '' AND due <= :now ORDER BY due LIMIT :limit)
        UNION ALL
        SELECT * FROM (SELECT key, due, (SELECT holder.slot FROM holder WHERE number = owner), 0
            FROM message INDEXED BY message_leased
            WHERE owner IS NOT NULL AND until <= :now AND due <= :now ORDER BY until LIMIT :limit)
        UNION ALL
        SELECT * FROM (SELECT key, due, NULL, 1 FROM message INDEXED BY message_parked
            WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> '' AND due <= :now ORDER BY due LIMIT :limit)
    ) ORDER BY parked, due)

-- name: waiting_keys
-- Those that wait for these next hops, due or not.
SELECT json_group_array(key) FROM (SELECT key FROM message INDEXED BY message_waits
    WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> '' AND waits_for = :hops ORDER BY due LIMIT :limit)

-- name: lease_keys
UPDATE message SET owner = ?, token = token + 1, until = ? WHERE key IN (SELECT value FROM json_each(?))

-- name: awaited
-- Each text that parked mail waits for, once: a step of the index for each, not for each message.
WITH RECURSIVE each_of (hops) AS (
    SELECT min(waits_for) FROM message INDEXED BY message_waits
        WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> ''
    UNION ALL
    SELECT (SELECT min(waits_for) FROM message INDEXED BY message_waits
        WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> '' AND waits_for > hops)
    FROM each_of WHERE hops IS NOT NULL LIMIT ?)
SELECT hops FROM each_of WHERE hops IS NOT NULL

-- name: next_due
SELECT min(moment) FROM (
    SELECT min(due) AS moment FROM message INDEXED BY message_due
        WHERE owner IS NULL AND due IS NOT NULL AND waits_for = ''
    UNION ALL
    SELECT min(due) FROM message INDEXED BY message_parked
        WHERE owner IS NULL AND due IS NOT NULL AND waits_for <> ''
    UNION ALL
    SELECT min(until) FROM message INDEXED BY message_leased WHERE owner IS NOT NULL)

-- name: renew_keys
UPDATE message SET until = ? WHERE key IN (SELECT value FROM json_each(?))

-- name: release_keys
-- Leases given back by their holder, with the moment from which the messages may be claimed.
UPDATE message SET owner = NULL, token = token + 1, due = max(due, :due)
WHERE owner = :owner AND key IN (SELECT value FROM json_each(:keys))

-- name: state_of
-- What an operator's request finds: key, whether somebody holds it, whether it is set aside, body file.
SELECT json_group_array(json_array(key, owner IS NOT NULL, aside IS NOT NULL, file))
FROM message WHERE key IN (SELECT value FROM json_each(?))

-- name: hold_recipients
UPDATE recipient SET state = 'held'
WHERE state = 'pending' AND message IN (SELECT value FROM json_each(?))

-- name: senders_waiting
-- Messages with a pending recipient, by sender; not those that were detained before (the two parameters say how).
SELECT sender, key FROM message WHERE aside IS NULL AND sender <> '' AND EXISTS (
    SELECT 1 FROM recipient WHERE recipient.message = message.key AND state = 'pending')
AND NOT EXISTS (
    SELECT 1 FROM recipient WHERE recipient.message = message.key AND last_code = ? AND last_enhanced = ?
    AND last_text LIKE 'held: %')

-- name: detain_recipients
UPDATE recipient SET state = 'held', last_code = ?, last_enhanced = ?, last_text = ?, last_host = ''
WHERE state = 'pending' AND message IN (SELECT value FROM json_each(?))

-- name: release_recipients
UPDATE recipient SET state = 'pending', due = ?
WHERE state = 'held' AND message IN (SELECT value FROM json_each(?))

-- name: hasten_recipients
UPDATE recipient SET due = ? WHERE state = 'pending' AND message IN (SELECT value FROM json_each(?))

-- name: recipients_of
SELECT count(*) FROM recipient WHERE message IN (SELECT value FROM json_each(?))

-- name: messages_with
-- How many of them have a recipient in that state.
SELECT count(DISTINCT message) FROM recipient WHERE state = ? AND message IN (SELECT value FROM json_each(?))

-- name: date_messages
UPDATE message SET due = (SELECT min(min(recipient.due), message.expires) FROM recipient
    WHERE recipient.message = message.key AND state = 'pending')
WHERE key IN (SELECT value FROM json_each(?)) AND aside IS NULL

-- name: forget_waits
UPDATE message SET waits_for = '' WHERE key IN (SELECT value FROM json_each(?))

-- name: give_up
UPDATE message SET given_up = 1, waits_for = '', due = ? WHERE key IN (SELECT value FROM json_each(?))

-- name: clear_aside
UPDATE message SET aside = NULL WHERE key IN (SELECT value FROM json_each(?)) AND aside IS NOT NULL

-- name: set_aside
UPDATE message SET aside = ?, due = NULL, owner = NULL, token = token + 1
WHERE key = ? AND owner = ?

-- name: register_holder
INSERT INTO holder (name, slot) VALUES (?, ?) RETURNING number

-- name: void_slot
UPDATE message INDEXED BY message_leased SET owner = NULL, token = token + 1
WHERE owner IS NOT NULL AND owner IN (SELECT number FROM holder WHERE slot = :slot AND number <> :number)

-- name: forget_slot
DELETE FROM holder WHERE slot = :slot AND number <> :number

-- name: void_all
UPDATE message INDEXED BY message_leased SET owner = NULL, token = token + 1,
    possible_duplicate = max(possible_duplicate, ?) WHERE owner IS NOT NULL

-- name: leased_ids
SELECT CAST(id AS BLOB) FROM message INDEXED BY message_leased WHERE owner IS NOT NULL

-- name: forget_holders
DELETE FROM holder

-- name: mark_duplicates
UPDATE message SET possible_duplicate = 1 WHERE key IN (SELECT value FROM json_each(?))

-- name: ids_of
SELECT CAST(id AS BLOB) FROM message WHERE key IN (SELECT value FROM json_each(?))

-- name: keys_of_id
SELECT key FROM message WHERE id = ?

-- name: boot_of
SELECT id FROM boot

-- name: set_boot
INSERT INTO boot (id) VALUES (?)

-- name: forget_boot
DELETE FROM boot

-- name: redate_messages
-- After a restart: due now, expiry from the wall clock.
UPDATE message SET expires = :now + (expires_wall - :wall),
    due = CASE WHEN due IS NULL THEN NULL ELSE min(:now, :now + (expires_wall - :wall)) END

-- name: redate_recipients
UPDATE recipient SET due = ? WHERE state = 'pending'

-- name: files_in_use
SELECT json_group_array(file) FROM message WHERE key IN (SELECT value FROM json_each(?))

-- name: message_count
SELECT count(*) FROM message

-- name: select_claimed
SELECT id, file, sender, listener, client, body_8bit, size, checksum, created, expires, token, until,
    possible_duplicate, waits_for, warned, given_up, terms FROM message WHERE key = ? AND owner = ?

-- name: select_recipients
SELECT number, mailbox, state, attempts, due, last_code, last_enhanced, last_text, last_host, terms
FROM recipient WHERE message = ? ORDER BY number

-- name: select_body
SELECT octets FROM body WHERE key = ?

-- name: stats
-- Each table is read once.
SELECT messages, leased, octets, oldest, corrupt, recipients, held FROM
    (SELECT count(*) FILTER (WHERE aside IS NULL) AS messages,
        count(*) FILTER (WHERE aside IS NULL AND owner IS NOT NULL) AS leased,
        coalesce(sum(size) FILTER (WHERE aside IS NULL), 0) AS octets,
        coalesce(min(created) FILTER (WHERE aside IS NULL), 0.0) AS oldest,
        count(*) FILTER (WHERE aside IS NOT NULL) AS corrupt FROM message),
    (SELECT count(*) AS recipients, count(*) FILTER (WHERE state = 'held') AS held FROM recipient)

-- name: recipients_aside
SELECT count(*) FROM message JOIN recipient ON recipient.message = message.key WHERE aside IS NOT NULL

-- name: list_messages
SELECT key, id, sender, size, created, expires_wall, coalesce(holder.name, ''), possible_duplicate,
    coalesce(aside, ''), waits_for
FROM message LEFT JOIN holder ON holder.number = message.owner WHERE key > ? ORDER BY key LIMIT ?

-- name: list_recipients
SELECT message, number, mailbox, state, attempts, due, last_code, last_enhanced, last_text, last_host, terms
FROM recipient WHERE message BETWEEN ? AND ? ORDER BY message, number

-- name: select_content
SELECT file, size FROM message WHERE key = ?

-- name: body_head
SELECT substr(octets, 1, ?) FROM body WHERE key = ?

-- name: remember_moved
INSERT OR IGNORE INTO intake_moved (key) SELECT value FROM json_each(?)

-- name: forget_moved
DELETE FROM intake_moved WHERE key IN (SELECT value FROM json_each(?))

-- name: known_epochs
SELECT json_group_array(epoch) FROM intake_epoch WHERE epoch IN (SELECT value FROM json_each(?))

-- name: remember_epochs
INSERT OR IGNORE INTO intake_epoch (epoch) SELECT value FROM json_each(?)

-- name: forget_epochs
-- Of segments that are no more.
DELETE FROM intake_epoch WHERE epoch NOT IN (SELECT value FROM json_each(?))

-- name: forget_all_moved
DELETE FROM intake_moved

-- name: keys_there
-- Those in the database, or that were: finished before the log said that they had been moved.
SELECT json_group_array(value) FROM json_each(:keys)
WHERE value IN (SELECT key FROM intake_moved) OR EXISTS (SELECT 1 FROM message WHERE message.key = value)
