"""The two ways in which a run ends early on purpose."""


class UserError(Exception):
    """Bad input: one line that names the key and the remedy. The command line prints it and exits with code 2."""


class RunFailed(Exception):
    """A run that cannot go on (failed reward, NaN, ratio off): the last good checkpoint is kept. Exit code 1."""
