"""Checkpoints of the paper's own release: read, converted and written."""
