"""The one exception family that Safelight raises for mistakes a user can mend."""


class SafelightError(ValueError):
    """A mistake in what the user asked for: the message says what, where and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
