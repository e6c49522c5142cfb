"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, what to do."""
