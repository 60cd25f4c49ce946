"""Settings, the files they are read from, templates and prices."""
