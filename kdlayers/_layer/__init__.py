"""The KD layer: its modules, and the fused arithmetic behind them.

It knows nothing of teachers, targets or losses; it imports `functional`, `_utils` and `errors`.
"""
