"""A call: texts to inputs, rows to a result."""
