"""The one base of all errors that a user can mend."""


class StormError(Exception):
    """Wrong input, a missing file, a setting that cannot work: the message names it and the remedy.

    The command line prints the message of these alone, in one line. Any other exception is a bug of ours.
    """
