"""Names that users have given, in pictures."""


def as_written(name: str) -> str:
    """For texts of a picture: matplotlib reads what stands between two $ as a formula, and stops with an
    error where it is none."""
    return name.replace("$", r"\$")
