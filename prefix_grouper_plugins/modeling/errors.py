"""The error of a model, or of a call of it, that packed rows could not reproduce."""


class UnsupportedModelError(ValueError):
    """The packed result could differ from the ordinary one; the message says why and what can be done."""
