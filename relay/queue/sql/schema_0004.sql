-- Version 4. What keeps a message that came by an intake log (relay/queue/intake.py) from being taken in twice.

-- Segments whose messages are in the database already, by epoch.
CREATE TABLE intake_epoch (
    epoch INTEGER PRIMARY KEY
);

-- Messages that were moved to the database while their worker runs and whose log may not say so yet.
CREATE TABLE intake_moved (
    key INTEGER PRIMARY KEY
);
