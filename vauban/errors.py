"""The one exception family of vauban, and how values are shown in its messages.

Every message says what was given, what was expected and what to do about it.
"""


class VaubanError(Exception):
    """Base of every error that vauban raises on purpose."""


class InputError(VaubanError):
    """A file, an argument or an option is not what it has to be. The command line exits with 2."""


class ModelError(InputError):
    """A model folder that cannot be used: missing or broken files, NaN weights, unknown type."""


class ArchitectureError(VaubanError):
    """The model cannot be walked or cut correctly; refusing is better than a wrong number."""


class CheckError(VaubanError):
    """A check after the work failed: what was written is not what was meant. Exit code 1."""


class VaubanWarning(UserWarning):
    """Something the user should know, said once."""


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
