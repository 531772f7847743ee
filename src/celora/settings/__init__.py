"""What a user can ask for: configuration, presets, names of files.

Belongs here: validated, printable settings. Does not belong here: models. May import: everything down to numerics."""
