"""Models in this process. Import the module you need: each of them may load torch."""
