"""The command line: a verb, its options, and what it prints."""
