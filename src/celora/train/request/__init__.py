"""Turns flags and settings files into one checked request, and knows every name that they may use."""
