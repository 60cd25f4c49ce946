"""Comparing policies on prompts that they did not learn from."""
