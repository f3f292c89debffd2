"""The one base of all errors that a user can mend."""


class StormError(Exception):
    """Wrong input, a missing file, a setting that cannot work: the message names it and the remedy.

    The command line prints the message of these alone, in one line. Any other exception is a bug of ours.
    """


class InputError(StormError, ValueError):
    """A value that was given, and cannot be used."""


class AccessError(StormError, OSError):
    """A file, folder or server that cannot be read, written or reached."""
