"""A trained student on its way out: save, load, bake, fold, prune.

It imports `_step` and the rooms below, but never `_attaching`.
"""
