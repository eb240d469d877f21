"""The torch-free runtime. `from runtime import load; load("bundle").ask("image.jpg",
"describe")`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.chat import Chat
    from runtime.generation.decoding import Decoding
    from runtime.questions import Answer, Stream
    from runtime.session import Question, Session, load

__all__ = ["Answer", "Chat", "Decoding", "Question", "Session", "Stream", "load"]
__version__ = "0.1.0"


_PLACES = {
    "Answer": "answer",
    "Chat": "chat",
    "Decoding": "decoding",
    "Question": "session",
    "Session": "session",
    "Stream": "answer",
    "load": "session",
}


def __getattr__(name: str) -> Any:
    """Loads what is asked for on first use, so that `runtime.contract` stays light to
    import.
    """
    if name in _PLACES:
        return getattr(importlib.import_module(f"runtime.{_PLACES[name]}"), name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
