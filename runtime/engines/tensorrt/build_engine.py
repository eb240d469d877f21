"""Builds an engine: one of a bundle's graphs goes through TensorRT's parser and
compiler, with the remaining time shown.

Networks are strongly typed: the graph specifies every precision, the same for TensorRT
10 and 11, and TensorRT chooses none by itself.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.contract.errors import EngineError, UsageError
from runtime.contract.files import sync_file
from runtime.contract.graphs import key_cache
from runtime.engines.tensorrt.graph_variants import GraphVariant, check_tensors
from runtime.engines.tensorrt.trt import Machine
from runtime.output.console import StepBar, step_bar

__all__ = ["RefusedError", "build", "workspace_bytes"]

_MAX_TIMINGS = 64 << 20  # a larger timing cache was not written here and is ignored


class RefusedError(EngineError):
    """TensorRT rejects a graph; another variant of the graph may work. `lasting` is
    true if trying again later cannot help.
    """

    def __init__(self, message: str, lasting: bool) -> None:
        super().__init__(message)
        self.lasting = lasting


def workspace_bytes(machine: Machine, asked_mb: int | None) -> int:
    """Returns the bytes of device memory the compiler may use: `asked_mb` if given,
    else $INFMLLM_WORKSPACE_MB, else half of the free memory. Raises `UsageError`.
    """
    text = str(asked_mb) if asked_mb is not None else os.environ.get("INFMLLM_WORKSPACE_MB", "")
    if not text:
        return machine.device.free_memory()[0] // 2
    if not (text.isascii() and text.isdigit() and len(text) < 9 and int(text) >= 1):
        raise UsageError(
            f"INFMLLM_WORKSPACE_MB or workspace_mb is {text!r:.40}, expected a whole number of "
            f"megabytes, at least 1"
        )
    return int(text) << 20


def build(
    machine: Machine, path: Path, form: GraphVariant, workspace: int, timings: Path | None
) -> Any:
    """Builds the engine of the graph at `path` and returns it serialized, as a buffer.
    Raises `RefusedError`, `BundleError` or `KeyboardInterrupt`.
    """
    trt, journal = machine.trt, machine.journal
    journal.clear()
    builder = trt.Builder(journal.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, journal.logger)
    lacking = [name for name in form.operators if not parser.supports_operator(name)]
    if lacking:
        raise RefusedError(
            f"TensorRT {machine.release} has no {' and '.join(lacking)}; update it to use the "
            f"faster graph",
            lasting=True,
        )
    if not parser.parse_from_file(str(path)):
        raise RefusedError(
            f"TensorRT {machine.release} refuses {path}: {journal.read()}; re-export the bundle, "
            f"or update TensorRT",
            lasting=True,
        )
    _check_network(machine, network, form, path)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
    config.profiling_verbosity = (
        trt.ProfilingVerbosity.DETAILED
    )  # lets an engine report the data types of its layers
    _add_profiles(builder, network, config, form)
    cache = _with_timings(config, timings)
    with step_bar(1) as bar:
        bar.step(
            f"building the engine of {path.name} for {machine.name} (once; this can take minutes)"
        )
        config.progress_monitor = monitor = _monitor(trt, bar)
        serialized = builder.build_serialized_network(network, config)
    if monitor.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        reason = journal.read()
        scarce = "memory" in reason.lower()
        advice = (
            "close other programs, or set INFMLLM_WORKSPACE_MB"
            if scarce
            else "update TensorRT, or re-export the bundle"
        )
        raise RefusedError(
            f"TensorRT {machine.release} cannot build {path} with {workspace >> 20} MiB workspace: "
            f"{reason}; {advice}",
            lasting=not scarce,
        )
    if cache is not None and timings is not None:
        _keep_timings(config.get_timing_cache(), timings)
    return serialized


def _check_network(machine: Machine, network: Any, form: GraphVariant, path: Path) -> None:
    """Raises `BundleError` unless the graph matches the manifest's spec."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    for tensors, expected in ((inputs, form.inputs), (outputs, form.outputs)):
        found = {
            tensor.name: (machine.trt.nptype(tensor.dtype), tuple(tensor.shape))
            for tensor in tensors
        }
        check_tensors(found, expected, path)


def _add_profiles(builder: Any, network: Any, config: Any, form: GraphVariant) -> None:
    """Adds optimization profiles with the ranges of every variable input. The number of
    cache rows comes from the variant or, if it gives none, from the graph.
    """
    inputs = {
        tensor.name: tuple(tensor.shape)
        for tensor in map(network.get_input, range(network.num_inputs))
    }
    rows = form.rows if form.rows is not None else inputs.get(key_cache(0), (0, 0, 0))[2]
    for ranges in form.profiles(rows):
        profile = builder.create_optimization_profile()
        for name, shape in inputs.items():
            if -1 in shape:
                kept = [
                    tuple(w if d == -1 else d for d, w in zip(shape, wanted, strict=True))
                    for wanted in ranges[name]
                ]
                profile.set_shape(name, *kept)
        config.add_optimization_profile(profile)


def _with_timings(config: Any, timings: Path | None) -> Any:
    """Gives the compiler the timings that earlier builds measured, if their file
    exists. If it cannot use them, it starts with an empty timing cache.
    """
    if timings is None:
        return None
    try:
        known = timings.read_bytes() if timings.stat().st_size <= _MAX_TIMINGS else b""
    except OSError:
        known = b""
    for content in (known, b""):
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _keep_timings(cache: Any, timings: Path) -> None:
    """Writes the timings that builds measured. Errors are ignored: without timings,
    builds only take longer.
    """
    part = timings.with_name(f"{timings.name}.{os.getpid()}")
    try:
        part.write_bytes(memoryview(cache.serialize()))
        sync_file(part)
        os.replace(part, timings)
    except OSError:
        part.unlink(missing_ok=True)


def _monitor(trt: Any, bar: StepBar) -> Any:
    """Returns an `IProgressMonitor` that advances the bar and lets an interrupt end the
    build.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._outer: dict[str, tuple[int, int]] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._outer[name] = (0, steps)
            self._show(name)

        def step_complete(self, name: str, step: int) -> bool:
            if name in self._outer:
                self._outer[name] = (step + 1, self._outer[name][1])
            self._show(name)
            return not self.interrupted

        def phase_finish(self, name: str) -> None:
            self._outer.pop(name, None)

        def _show(self, name: str) -> None:
            try:
                done, total = next(iter(self._outer.values()), (0, 1))
                bar.detail(done, total, name)
            except KeyboardInterrupt:  # must not propagate into the compiler's own frames
                self.interrupted = True

    return Monitor()
