"""Measures a bundle: loads it, answers the same question about the same image
repeatedly, and stores every time with its conditions.

The order matters: machine limits, load, warm-up, timed answers, memory, then energy in
separate answers, then the machine limits again.
"""

from __future__ import annotations

import io
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime as ort
from PIL import Image

from runtime import __version__
from runtime.bench.limits import measure_limits
from runtime.bench.report import STAGES, AnswerTimes, BundleFacts, Conditions, Report, Work
from runtime.contract.bundle import DECODER, MANIFEST, Bundle
from runtime.contract.files import sha256_file
from runtime.contract.image import open_image, read_image_bytes
from runtime.engines import TARGETS, available_cores
from runtime.generation.decoding import Decoding
from runtime.hardware.machine import ROOT, read_machine, reset_peak_memory
from runtime.hardware.nvidia import Nvidia
from runtime.hardware.power import Rapl, Source, measure_energy, open_ina
from runtime.hardware.readings import Energy
from runtime.hardware.tegrastats import Tegrastats
from runtime.hardware.thermal import ThermalWatch
from runtime.output.console import note, peak_memory_mib, track
from runtime.session import Session, load

if TYPE_CHECKING:
    from runtime.questions import Answer

__all__ = ["BenchOptions", "answer_once", "bundle_work", "measure", "sample_jpeg"]

_SIZE = (640, 480)
_PROMPT, _TASK = "describe", "caption"
_MIB_IN_MB = (1 << 20) / 1e6
_CACHE_BYTES = {"int8": 1, "fp16": 2}  # bytes per number; older bundles lack it and use fp32


@dataclass(frozen=True)
class BenchOptions:
    """The options of a measurement. None means a generated 640x480 image for `image`,
    the model's default for `visual_tokens`, and all cores for `threads`.
    """

    bundle: Path
    repetitions: int = 20
    warmup: int = 3
    new_tokens: int = 30
    visual_tokens: int | None = None
    threads: int | None = None
    image: Path | None = None


def sample_jpeg() -> bytes:
    """Generates a deterministic JPEG of 640x480, so that decoding and preprocessing are
    measured on a common photo size.
    """
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(_SIZE, Image.Resampling.BICUBIC).save(
        buffer, format="JPEG", quality=90
    )
    return buffer.getvalue()


def answer_once(
    session: Session, picture: bytes, visual_tokens: int | None, new_tokens: int
) -> tuple[AnswerTimes, Answer]:
    """Gives one answer and its times, with empty caches and without speculative
    decoding. Only this function depends on how a session is asked.
    """
    session.clear_caches()
    started = time.perf_counter()
    stream = session.stream(picture, _PROMPT, _TASK, visual_tokens, new_tokens, Decoding(lookup=0))
    first: float | None = None
    for _ in stream:
        first = first or (time.perf_counter() - started) * 1e3
    total = (time.perf_counter() - started) * 1e3
    answer = stream.answer
    assert answer is not None, "a finished stream has its answer"
    stages = {name: answer.timings[name] for name in STAGES}
    return AnswerTimes(stages, first or total, total, answer.step_ms, len(answer.tokens)), answer


def measure(options: BenchOptions) -> Report:
    """Measures as `options` say. This takes about two seconds more than the answers,
    and longer if power can be measured.
    """

    machine, threads = read_machine(), options.threads or available_cores()
    picture = read_image_bytes(options.image) if options.image else sample_jpeg()
    size = open_image(picture).size
    # The probe's memory must not count as the bundle's.
    limits = [measure_limits(threads, machine.last_cache_mb)] if reset_peak_memory() else []
    reset_peak_memory()
    started = time.perf_counter()
    session = load(options.bundle, threads=options.threads)
    load_ms = (time.perf_counter() - started) * 1e3
    gpu = Nvidia.open() if TARGETS[session.bundle.target].gpu else "the bundle runs on the CPU"
    watch = ThermalWatch(ROOT, gpu if isinstance(gpu, Nvidia) else None)
    answers: list[AnswerTimes] = []
    total = options.warmup + options.repetitions
    for index in track(range(total), total, "measuring"):
        times, last = answer_once(session, picture, options.visual_tokens, options.new_tokens)
        if index >= options.warmup:
            answers.append(times)
            watch.look()
    peak_rss, thermal = peak_memory_mib() * _MIB_IN_MB, watch.finish()
    facts = gpu.facts() if isinstance(gpu, Nvidia) else None
    energy, why = _energy(session, picture, options, gpu)
    limits.append(measure_limits(threads, machine.last_cache_mb))
    conditions = Conditions(
        **vars(machine),
        cores=available_cores(),
        threads=threads,
        python=platform.python_version(),
        onnxruntime=ort.__version__,  # from the module, because the package may be onnxruntime-gpu
        infmllm=__version__,
        picture=f"{options.image.name if options.image else 'made JPEG'} {size[0]}x{size[1]}",
        prompt=_PROMPT,
        prompt_tokens=last.prompt_tokens,
        visual_tokens=last.visual_tokens,
        max_new_tokens=options.new_tokens,
        repetitions=options.repetitions,
        warmup=options.warmup,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    missing = {**({"GPU": gpu} if isinstance(gpu, str) else {}), **({"energy": why} if why else {})}
    work = bundle_work(session.bundle, last.prompt_tokens)
    return Report(
        _facts(session.bundle),
        conditions,
        load_ms,
        peak_rss,
        tuple(answers),
        tuple(limits),
        work,
        thermal,
        energy,
        facts,
        missing,
    )


def _facts(bundle: Bundle) -> BundleFacts:
    path = bundle.path
    return BundleFacts(
        path.resolve().name,
        bundle.spec.name,
        bundle.target,
        dict(bundle.schemes),
        bundle.verdict,
        sha256_file(path / MANIFEST),
    )


def bundle_work(bundle: Bundle, prompt_tokens: int) -> Work:
    """Returns the bytes that a decode step reads and the operations of vision tower and
    prefill. Only linear layers count, without the products of attention. The output
    head counts for one position only.
    """
    spec, decoder = bundle.spec, bundle.spec.decoder
    weights = Path(DECODER).with_suffix(".weights").name
    stored = bundle.files.get(weights, bundle.files[DECODER])[0]
    row = (
        2
        * decoder.layers
        * decoder.kv_heads
        * decoder.head_dim
        * _CACHE_BYTES.get(bundle.schemes.get("cache", ""), 4)
    )
    table = decoder.vocab_size * decoder.hidden
    tower = (
        2.0
        * (spec.vision.parameters - spec.vision.grid**2 * spec.vision.width)
        * (spec.vision.grid**2 + 1)
    )
    return Work(
        stored, row, tower, 2.0 * ((decoder.parameters - 2 * table) * prompt_tokens + table)
    )


def _energy(
    session: Session, picture: bytes, options: BenchOptions, gpu: Nvidia | str
) -> tuple[Energy | None, str]:
    """Measures energy in separate answers, or returns the reason why it is impossible."""
    sources: list[Source] = []
    reasons: list[str] = []
    if isinstance(gpu, Nvidia) and gpu.counts_energy:
        sources.append(gpu)
    if (rails := open_ina(ROOT) or Tegrastats.open()) is not None:
        sources.append(rails)
    elif isinstance(rapl := Rapl.open(ROOT), Rapl):
        sources.append(rapl)
    else:
        reasons += ["no INA3221 rails", "no tegrastats", rapl]
    if not sources:
        return None, "; ".join(reasons)
    note(f"measuring energy: {' + '.join(source.name for source in sources)}")
    try:
        found = measure_energy(
            sources,
            lambda limit: answer_once(session, picture, options.visual_tokens, limit)[0].tokens,
            options.new_tokens,
        )
    finally:
        for source in sources:
            source.close()
    return found, ""
