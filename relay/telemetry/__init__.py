"""Metrics, the mail log and the writer behind it. Knows what happened, never decides what should."""
