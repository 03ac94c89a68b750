"""One training step: hooks, the teacher, terms, and the handle that sums them.

It imports every room below: `losses`, `_targets`, `_layer`, `_models`, `_utils`.
"""
