"""Which models can take packed rows, and why another one cannot."""
