"""Command-line options for the settings of `Decoding`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.contract.errors import UsageError

if TYPE_CHECKING:
    from runtime.generation.decoding import Decoding

__all__ = ["add_decoding", "decoding_of"]

_PUBLISHED = "published"
_MAX_SCHEMA = 1 << 20
_NUMBERS: dict[str, tuple[type, str]] = {
    "temperature": (
        float,
        "above 0: sample tokens; higher is more random; default: 0, always the most likely token",
    ),
    "top_k": (int, "sample only from the N most likely tokens"),
    "top_p": (float, "sample from the most likely tokens whose probabilities add up to X"),
    "min_p": (float, "sample from tokens at least X times as likely as the most likely token"),
    "repetition_penalty": (
        float,
        "above 1: makes tokens that are already in the answer less likely",
    ),
    "seed": (int, "seed of sampling; the same seed gives the same answer"),
    "min_new_tokens": (int, "minimum length of the answer in tokens"),
    "length_penalty": (float, "with --beams: divides scores by length to the power X; default: 1"),
    "lookup": (
        int,
        "prompt-lookup speculative decoding with up to N drafted tokens; 0: off (default)",
    ),
}


def add_decoding(parser: argparse.ArgumentParser) -> None:
    """Adds the decoding options to a parser, as a group."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--beams",
        metavar="N",
        help=f"beam search with N beams, or `{_PUBLISHED}`: the task's published settings; "
        f"default: greedy",
    )
    for name, (kind, help) in _NUMBERS.items():
        group.add_argument(
            f"--{name.replace('_', '-')}", type=kind, metavar="N" if kind is int else "X", help=help
        )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; the option may be repeated",
    )
    group.add_argument(
        "--json-schema",
        type=Path,
        metavar="FILE",
        help="force the answer to be JSON that matches this JSON Schema (needs: pip install "
        "'infmllm-edge[json]')",
    )
    group.add_argument(
        "--free",
        action="store_true",
        help="do not force the answer of a ground question to be a box",
    )


def decoding_of(given: argparse.Namespace, prompt: str) -> Decoding:
    """Builds the `Decoding` that a command line describes. Raises `UsageError`."""
    from runtime.contract.prompt import TASKS
    from runtime.contract.task_detection import detect_task
    from runtime.generation.decoding import Decoding

    settings = {name: getattr(given, name) for name in _NUMBERS if getattr(given, name) is not None}
    settings |= {"constrain": not given.free, "stop": tuple(given.stop or ())}
    if given.json_schema is not None:
        settings["schema"] = _schema(given.json_schema)
    if given.beams == _PUBLISHED:
        if given.batch is not None:
            raise UsageError(
                f"--beams {_PUBLISHED} depends on the task of each question; give a number of "
                f"beams with --batch"
            )
        task = detect_task(prompt)[0] if given.task == "auto" else given.task
        return Decoding.published(task, **settings) if task in TASKS else Decoding(**settings)
    if given.beams is not None:
        try:
            settings["beams"] = int(given.beams)
        except ValueError:
            raise UsageError(
                f"--beams is {given.beams!r:.40}, expected a number or `{_PUBLISHED}`"
            ) from None
    return Decoding(**settings)


def _schema(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_SCHEMA:
            raise UsageError(
                f"{path} is larger than {_MAX_SCHEMA} bytes; give a smaller JSON Schema"
            )
        return path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the JSON schema {path} cannot be read ({error}); check the path"
        ) from None
