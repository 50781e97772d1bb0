"""The exception for mistakes of a person."""


class UserError(ValueError):
    """Something that the user can put right. The message says what is wrong, with names and numbers, and the way out.

    Entry points print the message without a stack trace and exit with code 2.
    """
