"""Pictures of an evaluation, and what memories are seen to hold."""
