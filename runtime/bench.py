"""`infmllm-bench`: how long each stage of an answer takes on this machine, warm, with percentiles, memory and the conditions stated."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image

from runtime.cli import default_bundle
from runtime.contract.console import check_output, command_app, note, peak_memory_mib, run_command, track

__all__ = ["main", "measure"]

app = command_app("Measure a bundle's latency.")
_STAGES = ("decode_image", "preprocess", "vision", "prefill", "per_token")
_PICTURE = (640, 480)


def _sample_jpeg() -> bytes:
    """A deterministic 640x480 JPEG, so that decoding and preprocessing are measured on a usual photograph's size."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(_PICTURE, Image.Resampling.BICUBIC).save(buffer, format="JPEG", quality=90)
    return buffer.getvalue()


def measure(bundle: Path, repetitions: int, warmup: int, new_tokens: int, visual_tokens: int | None, threads: int | None) -> dict[str, Any]:
    """Loads a bundle and answers "describe" `repetitions` times after `warmup`: milliseconds per stage, rates, memory, conditions."""
    from runtime.session import load

    started = time.perf_counter()
    session = load(bundle, threads=threads)
    load_ms = (time.perf_counter() - started) * 1e3
    picture = _sample_jpeg()
    rows: list[dict[str, float]] = []
    counts = (0, 0)
    for index in track(range(warmup + repetitions), warmup + repetitions, "measuring"):
        started = time.perf_counter()
        stream = session.stream(picture, "describe", "caption", visual_tokens, new_tokens)
        first: float | None = None
        for _ in stream:
            first = first or (time.perf_counter() - started) * 1e3
        answer = stream.answer
        assert answer is not None, "a finished stream has its answer"
        total = (time.perf_counter() - started) * 1e3
        counts = (answer.prompt_tokens, answer.visual_tokens)
        if index >= warmup:
            steps = max(1, len(answer.tokens) - 1)
            rows.append({**answer.timings, "ttft": first or total, "total": total, "tokens_per_s": 1e3 * steps / max(answer.timings["decode"], 1e-6)})
    return {
        "bundle": str(bundle),
        "schemes": dict(session.bundle.schemes),
        "verdict": session.bundle.verdict,
        "stages_ms": {name: _percentiles([row[name] for row in rows]) for name in (*_STAGES, "ttft", "total")},
        "tokens_per_s": float(np.median([row["tokens_per_s"] for row in rows])),
        "load_ms": load_ms,
        "peak_rss_mb": peak_memory_mib(),
        "conditions": _conditions(repetitions, warmup, new_tokens, threads) | {"prompt_tokens": counts[0], "visual_tokens": counts[1]},
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(values, 50)), "p90": float(np.percentile(values, 90)), "best": min(values)}


def _conditions(repetitions: int, warmup: int, new_tokens: int, threads: int | None) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": cpu,
        "cores": cores,
        "threads": threads or cores,
        "repetitions": repetitions,
        "warmup": warmup,
        "max_new_tokens": new_tokens,
        "picture": f"{_PICTURE[0]}x{_PICTURE[1]} JPEG",
        "onnxruntime": version("onnxruntime"),
        "python": platform.python_version(),
    }


@app.command(epilog="Example:\n\n    infmllm-bench infmllm-bundle --json report.json --csv report.csv")
def run(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder. Default: $INFMLLM_BUNDLE, then ./infmllm-bundle.")] = None,
    repetitions: Annotated[int, typer.Option(min=1, help="Measured answers.")] = 20,
    warmup: Annotated[int, typer.Option(min=0, help="Answers before measuring.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 30,
    visual_tokens: Annotated[int | None, typer.Option(help="Visual embeddings. Default: the model's best.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: all available cores.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the stage table here.")] = None,
) -> None:
    """Prints a table of stages; medians of warm answers, so compare only figures of one run on a quiet machine."""
    check_output(json_file)
    check_output(csv_file)
    report = measure(bundle or default_bundle(), repetitions, warmup, new_tokens, visual_tokens, threads)
    _print_table(report)
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    if csv_file:
        with csv_file.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("stage", "p50_ms", "p90_ms", "best_ms"))
            writer.writerows((name, *(round(v, 4) for v in row.values())) for name, row in report["stages_ms"].items())


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("stage", "p50 ms", "p90 ms", "best ms")
    for name, row in report["stages_ms"].items():
        table.add_row(name.replace("_", " "), *(f"{value:.2f}" for value in row.values()))
    Console().print(table)
    given = report["conditions"]
    tokens = f"{given['prompt_tokens']} prompt tokens ({given['visual_tokens']} visual)"
    print(f"{report['tokens_per_s']:.0f} tokens/s, load {report['load_ms']:.0f} ms, peak memory {report['peak_rss_mb']:.0f} MB, {report['verdict']}")
    note(f"{given['cpu']}, {given['threads']} threads; {tokens}; {given['repetitions']} answers")


def main() -> None:
    """Entry point of `infmllm-bench`."""
    run_command(app)
