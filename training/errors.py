"""The exceptions that end the program with a line and an exit status."""


class UserError(Exception):
    """An error that the user can fix."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


class DivergedError(UserError):
    """A loss is NaN or infinite. Training is deterministic: resuming would end the same way."""
