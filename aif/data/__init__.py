"""What comes in: rows of pairs and prompts, people's choices, final answers."""
