"""Attacks on the library with seeded random tries: what they promise stands in docs/reliability.md.

Each module has ``run(tries, seed)``, which returns counts, such as ``{"tried": 5000, "refused":
4100, "silently wrong": 0}``. ``python -m tests.reliability`` runs them for long; the test files run
dozens to hundreds of tries of each.
"""
