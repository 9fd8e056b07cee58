"""What `python -m lightning_xai COMMAND` runs beside Lightning's verbs: one command, one module.

Torch is imported inside the functions: it takes seconds, which a help text or a mistyped command is not worth.
"""

__all__ = ["explain", "export", "prepare", "sanity_check"]
