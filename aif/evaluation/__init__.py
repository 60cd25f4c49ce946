"""Policies against each other on prompts that they have not learned from."""
