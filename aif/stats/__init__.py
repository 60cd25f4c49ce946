"""Statistics, without torch and without files."""
