"""The one error of this room."""


class CodingError(ValueError):
    """A payload that is damaged, or that no encoder could have written."""
