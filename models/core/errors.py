"""A mistake of the person at the keyboard: the message names the thing, the value and the fix."""


class UserError(Exception):
    """Shown by the command line without a traceback."""
