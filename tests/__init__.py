"""Tests of kdlayers."""

from kdlayers._utils import chunks

# The small models of the tests take the path of large ones, also in processes of their own;
# tests/layer/test_fused.py looks at the choice.
chunks.LEAST_SCORES = chunks.LEAST_RATIO = 0
