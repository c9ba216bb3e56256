"""The one configuration file: its schema (models with defaults and documentation) and its loader."""
