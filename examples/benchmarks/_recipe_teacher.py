"""The loader of teachers, under the name by which the accuracy benchmark knows it."""

from models.teachers import load_teacher

__all__ = ["load_teacher"]
