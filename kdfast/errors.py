"""The one exception that a user's mistake raises."""


class UserError(ValueError):
    """One sentence that names the file or argument, the fault and the remedy.

    Programs print it without a traceback and exit with status 2. is_repeated: another rank of the
    run says the same, so that this one need not.
    """

    is_repeated = False
