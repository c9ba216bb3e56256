-- Version 3. What the client said beside the addresses, as SMTP parameters: "SMTPUTF8 RET=HDRS ENVID=x" with MAIL,
-- "NOTIFY=SUCCESS ORCPT=rfc822;x" with RCPT. Empty for nearly all mail.
ALTER TABLE message ADD COLUMN terms TEXT NOT NULL DEFAULT '';
ALTER TABLE recipient ADD COLUMN terms TEXT NOT NULL DEFAULT '';
