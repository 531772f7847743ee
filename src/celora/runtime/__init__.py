"""What exists while a model trains: the attachment, its clock, its state.

Belongs here: everything that happens at optimizer steps, the gate that times products before, and audits.
May import: everything down to modeling."""
