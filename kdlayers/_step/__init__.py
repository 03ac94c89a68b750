"""One training step: hooks, the teacher, terms, and the handle that sums them.

It imports every folder above it in docs/architecture.md, except `schedules`.
"""
