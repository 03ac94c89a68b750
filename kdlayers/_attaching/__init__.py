"""Setting up: from names of points to layers, hooks and a handle.

It imports every room but `_leaving` and `viz`.
"""
