"""Uses a trained adapter: loads it again, chats with it, answers many prompts."""
