"""Plants every fault of the table into bundles of a small model and reports which the
proof refuses, and whether it names the place.

python benchmarks/mutation_score.py [--forms cpu/int8 tensorrt/int4] [--old] [--markdown FILE]

`--old` also tries the gate that only replays golden cases within the scheme's tolerance.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tests.mutants.score import FORMS, Outcome, small_checkpoint, try_form


def table(outcomes: list[Outcome]) -> str:
    """Returns the scores of every form as a Markdown table."""
    lines = [
        "| form | mutants | refused | place named | refused by golden cases alone |",
        "|---|---|---|---|---|",
    ]
    for form in dict.fromkeys(outcome.form for outcome in outcomes):
        rows = [outcome for outcome in outcomes if outcome.form == form]
        caught = [row for row in rows if row.caught]
        named = sum(row.named for row in caught)
        old = [row.old for row in rows if row.old is not None]
        before = f"{sum(old)} of {len(old)}" if old else "not tried"
        lines.append(
            f"| `{form}` | {len(rows)} | {len(caught)} | {named} of {len(caught)} | {before} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Prints the table, and one line of JSON for every mutant that was not refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--old", action="store_true", help="also try golden cases alone")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    given = parser.parse_args()
    started, outcomes = time.monotonic(), list[Outcome]()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = small_checkpoint(Path(folder) / "checkpoint")
        for form in given.forms:
            found = try_form(form, checkpoint, Path(folder), given.old)
            outcomes += found
            for outcome in found:
                if not outcome.caught or not outcome.named:
                    print(json.dumps(vars(outcome)), flush=True)
    print(table(outcomes))
    print(f"{len(outcomes)} mutants in {time.monotonic() - started:.0f} s")
    if given.markdown:
        given.markdown.write_text(table(outcomes) + "\n")


if __name__ == "__main__":
    main()
