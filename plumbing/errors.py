"""The one kind of error that is the user's to put right."""


class UserError(Exception):
    """Something the user can put right; the message says what to do. Ends the program with exit code 2."""
