"""The queue: what was acknowledged and is not yet delivered, safe on disk."""
