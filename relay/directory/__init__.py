"""What the relay knows about addresses without asking anyone: the snapshot, its sources and its key.

Owns the file format, its building and its reading. Must not decide anything: verdicts are ``policy``'s.
"""
