"""What lies on disk: records, journals, fingerprints, checkpoints."""
