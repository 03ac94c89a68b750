"""After training: save, load, bake, fold and prune a student.

It imports `_step` and the rooms below, but never `_attaching`.
"""
