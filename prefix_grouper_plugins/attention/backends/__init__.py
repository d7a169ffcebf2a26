"""The ways to compute attention over a forest, one module or package each; no backend imports another."""
