"""Mail coming in: listeners, sessions, transactions."""
