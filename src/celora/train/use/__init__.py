"""What was trained, put to use: loaded again, talked to, and given many prompts."""
