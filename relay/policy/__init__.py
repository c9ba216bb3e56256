"""MAY it, WHERE and WHEN: decisions as pure functions of facts. No I/O, clock, randomness or logging in here."""
