"""aif: label preferences with an LLM judge under a constitution, and learn from the labels."""

__version__ = "0.1.0"
