"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Input that cannot be used. The message is one line: what is wrong, where, what to do."""


_NO_ROOM = ("No space left on device", "Disk quota exceeded", "File too large")


def is_no_room(error: Exception) -> bool:
    """Whether a disk was full. Libraries wrap the system's error in their own."""
    return any(words in str(error) for words in _NO_ROOM)
