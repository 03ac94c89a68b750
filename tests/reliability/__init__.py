"""Seeded random attacks on the library. docs/reliability.md says what they show.

Each module has ``run(tries, seed)``, which returns counts, such as ``{"tried": 5000, "refused":
4100, "silently wrong": 0}``. ``python -m tests.reliability`` runs them for long; the test files run
dozens to hundreds of tries of each.
"""
