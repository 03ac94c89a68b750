"""For other training scripts: timm's task, Trainer and Lightning's callback; import by module.

Nothing here is imported by ``import kdlayers``, and each module needs its framework only.
"""
