"""Models in this process. What loads torch is imported by module, never from here."""
