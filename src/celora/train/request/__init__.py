"""What was asked for: flags, settings files and the fields that they may hold."""
