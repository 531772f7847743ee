"""Commands that compare and measure: compare, bench, demo, doctor.

Belongs here: what trains or times to tell arms apart. Does not belong here: a single run (`train`).
May import: everything down to train."""
