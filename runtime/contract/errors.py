"""The errors a user can meet. Each carries one line: what, where, found, expected, what
to do.

Everything the toolchain raises on bad input derives from `InfMLLMError`; the command
lines print its one line and exit with its `exit_code`. Anything else that escapes is a
bug of ours.
"""

from __future__ import annotations

__all__ = [
    "BuildError",
    "BundleError",
    "BusyError",
    "CheckpointError",
    "ContextError",
    "DataError",
    "EngineError",
    "ImageError",
    "InfMLLMError",
    "NonFiniteError",
    "ParityError",
    "PromptError",
    "RegressionError",
    "SpecError",
    "UsageError",
]


class InfMLLMError(Exception):
    """Base of every error caused by input, files or the machine. `exit_code` is the
    process exit status a command returns for it.
    """

    exit_code = 1


class UsageError(InfMLLMError):
    """A command was given options that do not fit together."""

    exit_code = 2


class SpecError(InfMLLMError):
    """A model specification is inconsistent, incomplete or out of bounds."""


class ImageError(InfMLLMError):
    """An image cannot be read safely: missing, not an allowed format, truncated, too
    large or too small.
    """


class PromptError(InfMLLMError):
    """A prompt is empty, not valid Unicode, or of an unknown task."""


class ContextError(InfMLLMError):
    """Prompt, visual and new tokens do not fit the key/value cache."""


class DataError(InfMLLMError):
    """A data set line, image or box is wrong; the message names file and line."""


class CheckpointError(InfMLLMError):
    """A checkpoint folder is incomplete, damaged or does not match its specification."""


class BundleError(InfMLLMError):
    """A bundle is missing, damaged, unsafe or of another format version."""


class EngineError(InfMLLMError):
    """An inference engine is not installed or refuses a graph."""


class NonFiniteError(InfMLLMError):
    """The network produced NaN or infinity; no token is taken from it."""


class BuildError(InfMLLMError):
    """A bundle cannot be built."""


class BusyError(BuildError):
    """Another process is building the same bundle."""


class ParityError(BuildError):
    """The compiled graphs differ from PyTorch by more than the scheme's tolerance."""


class RegressionError(InfMLLMError):
    """A latency report breaks a limit it was compared under."""
