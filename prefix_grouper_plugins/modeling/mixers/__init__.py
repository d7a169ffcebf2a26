"""Modules that mix tokens past transformers' attention interface, and the two ways to run them on a packed row."""
