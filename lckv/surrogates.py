"""Texts that are no Unicode: halves of surrogate pairs, which JSON and command lines can smuggle in."""


def lone_surrogate(text: str) -> str | None:
    """The first half of a surrogate pair in `text` and its place, in words; None for Unicode text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        return f"character {at} is U+{ord(text[at]):04X}, half of a surrogate pair, which is no character"
    return None
