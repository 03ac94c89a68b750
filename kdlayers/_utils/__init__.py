"""Small helpers that know nothing of distillation.

Any room may import them; they import `errors` only.
"""
