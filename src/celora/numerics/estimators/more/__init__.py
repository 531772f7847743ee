"""Variants that no preset uses, but a configuration can ask for: columns by energy, sampling, the gradients' factor.

Each is a subclass of the class that it varies. `celora.numerics.estimators.registry` picks it by the settings.
"""
