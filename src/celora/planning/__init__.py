"""Times estimates on a model, measures their errors, and chooses among them.

Belongs here: audits, timing of candidates, plans. Does not belong here: training. May import: everything down to
runtime."""
