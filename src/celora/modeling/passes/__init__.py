"""Norms, gates and rotations of a decoder, each in one pass over its numbers."""
