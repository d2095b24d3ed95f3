"""Exceptions that programs show as a message, without a traceback."""


class ConfigError(ValueError):
    """A setting, or a combination of settings and files, that cannot work.

    The message names the field or file, the value given, what is required and the way out. Programs show it
    without a traceback and exit with status 2.
    """


class LostRankError(RuntimeError):
    """Another process of the run has failed, or does not come to where the others wait for it.

    Programs show the message without a traceback and exit with status 1.
    """
