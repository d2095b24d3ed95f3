"""Settings of the dense KV policy."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class DenseConfig:
    """Keep the keys and values of every token: the policy of a plain transformer."""

    name: Literal["dense"] = "dense"
    """Name of the KV policy."""

    def problems(self, sliding_window: int | None) -> list[str]:
        """Nothing can be wrong, with any `compression.sliding_window`."""
        return []
