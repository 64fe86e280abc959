"""CLaRa for Hugging Face: what works with a CLaRa model and does not travel with its checkpoints."""
