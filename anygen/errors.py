"""Every error that anygen raises for a reason its user can act on.

Each message says what was wrong, with what, and what would be right. All derive from `AnyGenError`, so that
one `except` separates bad input (exit code 2 on the command line) from a fault of ours (exit code 1).
"""


class AnyGenError(Exception):
    """The base of all errors that name their own remedy."""


class ConfigError(AnyGenError, ValueError):
    """A configuration has an unknown key, a missing one or a value out of range."""


class UnknownComponentError(AnyGenError, KeyError):
    """A registry has no entry of that name; the message lists the known ones."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class MediaError(AnyGenError, ValueError):
    """A picture, clip or sound cannot be read, is of a wrong type or exceeds a limit."""


class MediaWarning(UserWarning):
    """Only a part of what a file holds is used, such as the first frame of an animation."""


class LicenceWarning(UserWarning):
    """A part that is loaded must not be used commercially."""


class OutputError(AnyGenError, OSError):
    """A file cannot be written, or exists already and was not to be replaced."""


class MessageError(AnyGenError, ValueError):
    """A message is empty, of an unknown form, or holds a modality that the model cannot read."""


class ModalityError(AnyGenError, ValueError):
    """The model has no encoder or no generator for a modality; the message says which it has."""


class CheckpointError(AnyGenError, ValueError):
    """A checkpoint lacks keys, has unexpected or mis-shaped ones, or fails its checksum."""


class HubError(AnyGenError, OSError):
    """A model cannot be found or fetched; the message says what to do."""


class OutOfMemoryError(AnyGenError, MemoryError):
    """The device has too little memory; the message says what to switch on."""
