"""The constitution: the file that people edit, and what an edit changes."""
