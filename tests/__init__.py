"""Tests of kdlayers."""

from kdlayers import _chunks

# The small models of the tests take the path of large ones, also in processes of their own;
# tests/test_fused.py looks at the choice.
_chunks.LEAST_SCORES = _chunks.LEAST_RATIO = 0
