"""DMZ Relay: an SMTP relay that stands in the DMZ in front of Exchange."""

__version__ = "0.1.0"
