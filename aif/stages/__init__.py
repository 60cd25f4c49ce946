"""The stages of a run: each reads files of the run folder and writes others."""
