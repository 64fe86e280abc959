"""Questions, documents and candidate pools, read and checked; nothing here imports torch."""
