"""The one exception that means: the user can mend this by changing a setting or a file."""


class ConfigError(ValueError):
    """A setting, or a combination of settings and files, that cannot work.

    The message names the field or file, the value given, what is required and the way out. Programs show it
    without a traceback and exit with status 2.
    """

    agreed = False
    """Whether every rank raises it with this message, so that it is enough when one of them says it."""
