"""Publishing on the Hugging Face Hub: cards, and what is uploaded."""
