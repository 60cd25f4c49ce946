"""Comparing judges with people, and labellings with each other."""
