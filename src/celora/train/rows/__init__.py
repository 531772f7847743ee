"""Rows: from files to what TRL's trainer takes."""
