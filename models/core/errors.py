"""A mistake of the person at the keyboard: the message says what, which value, and the way out."""


class UserError(Exception):
    """Shown by the command line without a traceback."""
