"""Prefix grouping inside training frameworks, one sub-package each; none is imported before it is asked for."""
