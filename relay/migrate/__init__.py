"""Owns: reading what other mail systems were configured with. Must not start, send or change anything."""
