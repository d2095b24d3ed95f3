"""Errors of this package."""


class ModelError(ValueError):
    """A model that cannot be read, built or written: the message says which file, field or tensor, what is
    wrong and the way out."""
