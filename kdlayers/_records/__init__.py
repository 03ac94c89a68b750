"""The teachers' outputs for every view of a data set, written once and read in training.

It knows files and data sets, not models or losses; it imports `_utils` and `errors`.
"""
