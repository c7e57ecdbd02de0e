"""Models of pydantic that stay as they were where an assignment fails."""

from __future__ import annotations

from typing import Any


class Steady:
    """Goes before a pydantic model with ``validate_assignment``: what fails to be assigned has no effect.

    pydantic itself checks a field before it is assigned, and the model as a whole, in its "after" validators, only then.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        held, chosen = dict(vars(self)), set(getattr(self, "__pydantic_fields_set__", ()))
        try:
            super().__setattr__(name, value)
        except Exception:  # a model that cannot be loaded, too
            object.__setattr__(self, "__dict__", held)
            object.__setattr__(self, "__pydantic_fields_set__", chosen)
            raise
