"""The errors a user can see. Each message is one line that names the problem, its
place, the expected value and the fix.

Every error that the toolchain raises on bad input derives from `InfMLLMError`. The
command lines print its message and exit with its `exit_code`. Any other exception that
reaches the user is a bug in the toolchain.
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
    "kind_name",
]


class InfMLLMError(Exception):
    """Base class of every error caused by input, files or the machine. A command that
    fails with it exits with the status `exit_code`.
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
    """A prompt is empty, is not valid Unicode, or belongs to an unknown task."""


class ContextError(InfMLLMError):
    """The prompt, visual and new tokens together do not fit the key/value cache."""


class DataError(InfMLLMError):
    """A data set line, image or box is invalid; the message names the file and line."""


class CheckpointError(InfMLLMError):
    """A checkpoint folder is incomplete, damaged or does not match its specification."""


class BundleError(InfMLLMError):
    """A bundle is missing, damaged, unsafe or has another format version."""


class EngineError(InfMLLMError):
    """An inference engine is not installed or refuses a graph."""


class NonFiniteError(InfMLLMError):
    """The network produced NaN or infinity; no token is sampled from such logits."""


class BuildError(InfMLLMError):
    """A bundle cannot be built."""


class BusyError(BuildError):
    """Another process is building the same bundle."""


class ParityError(BuildError):
    """The compiled graphs differ from PyTorch by more than the scheme's tolerance."""


class RegressionError(InfMLLMError):
    """A latency report exceeds a limit that was set for its comparison."""


_KIND_NAMES = {
    bool: "true or false",
    dict: "an object",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
    tuple: "a list",
    type(None): "null",
}


def kind_name(kind: type) -> str:
    """Names the JSON kind of a Python type for a message, such as "a list" for `list`."""
    return _KIND_NAMES.get(kind, kind.__name__)
