"""The torch-free runtime. `from runtime import load; load("bundle").ask("image.jpg",
"describe")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.chat import Chat
    from runtime.generation.decoding import Decoding
    from runtime.questions import Answer, FoundBox, Question, Stream
    from runtime.session import Session, load

__all__ = ["Answer", "Chat", "Decoding", "FoundBox", "Question", "Session", "Stream", "load"]
__version__ = "0.1.0"

_MODULES = {
    "Answer": "runtime.questions",
    "Chat": "runtime.chat",
    "Decoding": "runtime.generation.decoding",
    "FoundBox": "runtime.questions",
    "Question": "runtime.questions",
    "Session": "runtime.session",
    "Stream": "runtime.questions",
    "load": "runtime.session",
}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use, so that `runtime.contract` stays light to
    import.
    """
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
