"""What no plan chooses and a configuration can ask for: columns by energy, sampling, the factor of the gradients.

Each is a subclass of what it varies. `celora.numerics.estimators.registry` picks it by the settings.
"""
