"""The training stages, and what they share. Nothing here asks a model behind an API."""
