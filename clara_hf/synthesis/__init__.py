"""Training data from documents, by any language model, verified."""
