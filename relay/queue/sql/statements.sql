-- Every statement of the queue, by name. Lists of keys come as JSON arrays: one statement serves any number of them,
-- and one step of it hands the interpreter lock over once instead of once a row.

-- name: insert_messages
INSERT INTO message (key, id, file, sender, listener, client, body_8bit, size, checksum, created, expires_wall,
    expires, due, owner, token, until, possible_duplicate) VALUES

-- name: insert_bodies
INSERT INTO body (key, octets) VALUES

-- name: insert_recipients
INSERT INTO recipient (message, number, mailbox, state, attempts, due, last_code, last_enhanced, last_text,
    last_host) VALUES

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
UPDATE recipient SET attempts = ?, due = ?, last_code = ?, last_enhanced = ?, last_text = ?, last_host = ?
WHERE message = ? AND number = ?

-- name: recipients_left
SELECT count(*) FROM recipient WHERE message = ?

-- name: set_due
UPDATE message SET due = (SELECT min(min(recipient.due), message.expires) FROM recipient
    WHERE recipient.message = message.key AND state = 'pending')
WHERE key = ? AND aside IS NULL

-- name: end_lease
UPDATE message SET owner = NULL, possible_duplicate = ? WHERE key = ?

-- name: due_keys
-- Each with the slot of the holder whose lease ran out, if that is why it may be claimed.
SELECT json_group_array(json_array(key, slot)) FROM (
    SELECT key, slot FROM (
        SELECT * FROM (SELECT key, due, NULL AS slot FROM message INDEXED BY message_due
            WHERE owner IS NULL AND due IS NOT NULL AND due <= :now ORDER BY due LIMIT :limit)
        UNION ALL
        SELECT * FROM (SELECT key, due, (SELECT holder.slot FROM holder WHERE number = owner)
            FROM message INDEXED BY message_leased
            WHERE owner IS NOT NULL AND until <= :now AND due <= :now ORDER BY until LIMIT :limit)
    ) ORDER BY due LIMIT :limit)

-- name: lease_keys
UPDATE message SET owner = ?, token = token + 1, until = ? WHERE key IN (SELECT value FROM json_each(?))

-- name: next_due
SELECT min(moment) FROM (
    SELECT min(due) AS moment FROM message INDEXED BY message_due WHERE owner IS NULL AND due IS NOT NULL
    UNION ALL
    SELECT min(until) FROM message INDEXED BY message_leased WHERE owner IS NOT NULL)

-- name: renew_keys
UPDATE message SET until = ? WHERE key IN (SELECT value FROM json_each(?))

-- name: release_keys
-- Leases given back by their holder, with the moment from which the messages may be claimed.
UPDATE message SET owner = NULL, token = token + 1, due = max(due, :due)
WHERE owner = :owner AND key IN (SELECT value FROM json_each(:keys))

-- name: hold_recipients
UPDATE recipient SET state = 'held' WHERE message = ? AND state = 'pending'

-- name: release_recipients
UPDATE recipient SET state = 'pending', due = ? WHERE message = ? AND state = 'held'

-- name: clear_aside
UPDATE message SET aside = NULL WHERE key = ? AND aside IS NOT NULL

-- name: set_aside
UPDATE message SET aside = ?, due = NULL, owner = NULL, token = token + 1 WHERE key = ?

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
    possible_duplicate FROM message WHERE key = ? AND owner = ?

-- name: select_recipients
SELECT number, mailbox, state, attempts, due, last_code, last_enhanced, last_text, last_host
FROM recipient WHERE message = ? ORDER BY number

-- name: select_body
SELECT octets FROM body WHERE key = ?

-- name: stats
SELECT count(*), coalesce(sum(owner IS NOT NULL), 0), coalesce(sum(size), 0), coalesce(min(created), 0.0),
    (SELECT count(*) FROM message WHERE aside IS NOT NULL),
    (SELECT count(*) FROM recipient), (SELECT coalesce(sum(state = 'held'), 0) FROM recipient),
    (SELECT count(*) FROM recipient WHERE message IN (SELECT key FROM message WHERE aside IS NOT NULL))
FROM message WHERE aside IS NULL

-- name: list_keys
SELECT key FROM message WHERE key > ? ORDER BY key LIMIT ?

-- name: select_listed
SELECT id, sender, size, created, expires_wall, coalesce(holder.name, ''), possible_duplicate, coalesce(aside, '')
FROM message LEFT JOIN holder ON holder.number = message.owner WHERE key = ?

-- name: select_content
SELECT file, size FROM message WHERE key = ?

-- name: body_head
SELECT substr(octets, 1, ?) FROM body WHERE key = ?
