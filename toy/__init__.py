"""The small Gemma-2 that everything runs on by default, and how it is built."""
