"""Mistakes in settings, as lckv reports them. Callers add the name under which their user knows a setting."""

from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Problem:
    """One setting that cannot work."""

    field: str
    """Its name among the settings that were looked at, such as "layer_types" or "policy.window"."""

    value: object
    """What was given."""

    obstacle: str
    """What is required and the way out, as a sentence without its full stop."""

    def __str__(self) -> str:
        return f"{self.field} is {self.value}; {self.obstacle}."

    def under(self, section: str) -> "Problem":
        """The same problem where the settings are the section `section` of others."""
        return replace(self, field=f"{section}.{self.field}")


class ModelError(ValueError):
    """A model that cannot be read, built or written: the message says which file, field or tensor, what is
    wrong and the way out."""


class SettingError(ModelError):
    """Settings that cannot work; its text has a line for each problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def under(self, section: str) -> "SettingError":
        """The same error where the settings are the section `section` of others."""
        return SettingError(problem.under(section) for problem in self.problems)

    def __reduce__(self) -> tuple[type["SettingError"], tuple[tuple[Problem, ...]]]:
        return SettingError, (self.problems,)


class UnsupportedError(ValueError):
    """Something that was asked for by name and cannot be served here.
    Callers add the name of their setting."""

    def __init__(self, asked: str, obstacle: str) -> None:
        """`asked`: what was asked for, such as "flash"; `obstacle`:
        why it cannot be served, without full stop."""
        self.asked, self.obstacle = asked, obstacle
        super().__init__(f"{asked} cannot be used: {obstacle}.")

    def __reduce__(self) -> tuple[type["UnsupportedError"], tuple[str, str]]:
        return UnsupportedError, (self.asked, self.obstacle)
