"""What exists while a model trains: the attachment, its clock, its state.

Belongs here: everything that happens at optimizer steps. Does not belong here: choosing estimators (`planning`).
May import: everything down to modeling."""
