"""What lives while a model trains: the attachment, its clock, its state.

Belongs here: whatever happens at optimizer steps. Does not belong here: choosing estimators (`planning`).
May import: everything down to modeling."""
