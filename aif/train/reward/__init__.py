"""The reward model: its data, losses, training and report card."""
