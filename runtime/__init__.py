"""The torch-free runtime. `from runtime import load; load("bundle").ask("image.jpg", "describe")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.session import Answer, Session, load

__all__ = ["Answer", "Session", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads the session module on first use, so that `runtime.contract` stays light to import."""
    if name in __all__:
        from runtime import session

        return getattr(session, name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
