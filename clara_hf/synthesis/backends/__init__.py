"""What completes chats: an endpoint, or a model in this process; or what needs no model."""
