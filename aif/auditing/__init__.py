"""Judges held against people, and labellings against each other."""
