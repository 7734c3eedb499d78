"""Values and pure functions: parameters, axes, sub-models, exact sums, messages, methods."""
