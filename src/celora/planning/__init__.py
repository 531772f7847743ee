"""Measure what estimates cost and lose on a model, and choose among them.

Belongs here: audits, timing of candidates, plans. Does not belong here: training. May import: everything down to
runtime."""
