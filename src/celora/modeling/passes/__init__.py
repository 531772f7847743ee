"""Norms, gates and rotations of a decoder, each computed while the data is read once."""
