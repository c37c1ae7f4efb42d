"""The exception for errors that the user can fix."""


class UserError(Exception):
    """Ends the program with a one-line message and a status. All ranks raise it if `shared`."""

    def __init__(self, message, status=1, shared=False):
        super().__init__(message)
        self.status, self.shared = status, shared
