"""Reads rows from files, checks them, and gives them the form that TRL's trainer expects."""
