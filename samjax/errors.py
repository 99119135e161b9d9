"""The one kind of exception that is meant for the person who runs a program."""


class UserError(Exception):
    """Bad input: one line that says what is wrong and what to do. Programs print it and exit with code 2."""
