"""The `ufom` command: arguments, tables, curves and the explorer page."""
