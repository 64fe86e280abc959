"""What completes chats: an endpoint, or a model in this process."""
