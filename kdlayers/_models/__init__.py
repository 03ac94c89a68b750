"""Looking into a model without changing it: dry runs, names, layouts, wrappers.

Every room above may import it; it imports `_utils` and `errors`.
"""
