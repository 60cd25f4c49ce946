"""Judging: comparison x principle x order -> verdicts -> labels."""
