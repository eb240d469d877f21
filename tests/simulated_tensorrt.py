"""Simulates TensorRT: computes with ONNX Runtime on the simulated GPU, and enforces the
requirements of the real library.

Engines are built from ONNX files with optimization profiles and serialized. Only the
same version on the same GPU can read them again. An execution context checks shapes
against its profile, alignment, that all tensors are bound, and that aliased outputs
share their input's memory. It must also run once before it is captured.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from tests.simulated_cuda import Cuda, array_at

_TYPES: dict[int, type[np.generic]] = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.FLOAT16: np.float16,
    onnx.TensorProto.INT64: np.int64,
}
Shape = tuple[int, ...]


def _shape(value: onnx.ValueInfoProto) -> Shape:
    return tuple(
        dim.dim_value if dim.HasField("dim_value") else -1
        for dim in value.type.tensor_type.shape.dim
    )


class Simulation:
    """The controls and records of a simulation, for tests to set and read.

    Controls: `plant` may change a network while it is built. `unknown` lists the
    operators that the parser lacks. Builds of files whose name contains `build_fault`
    fail. `during_build` runs in the middle of a build. The next `unreadable` engines
    cannot be read. With `copies_caches`, outputs do not share memory with their inputs.
    `refuses_to_run` is the reason why no network runs. Records: `built`, `read`,
    `workspaces` and `timings`.
    """

    def __init__(self, cuda: Cuda, version: str, fuses: bool) -> None:
        self.cuda, self.version, self.fuses = cuda, version, fuses
        self.plant: Callable[[onnx.ModelProto], None] = lambda model: None
        self.unknown: set[str] = set()
        self.build_fault = ""
        self.unreadable = 0
        self.copies_caches = False
        self.refuses_to_run = ""
        self.loggers: list[Any] = []
        self.built: list[str] = []
        self.read: list[bytes] = []
        self.workspaces: list[int] = []
        self.timings: list[bytes] = []
        self.during_build: Callable[[], None] = lambda: None
        self.module = _module(self)


class _Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _ILogger:
    INTERNAL_ERROR, ERROR, WARNING = _Severity.INTERNAL_ERROR, _Severity.ERROR, _Severity.WARNING
    initialised = False

    def __init__(self) -> None:
        self.initialised = True


class _Network:
    def __init__(self) -> None:
        self.model: onnx.ModelProto | None = None
        self.file = ""

    def _tensor(self, value: onnx.ValueInfoProto) -> SimpleNamespace:
        return SimpleNamespace(
            name=value.name, dtype=value.type.tensor_type.elem_type, shape=_shape(value)
        )

    num_inputs = property(lambda self: len(self.model.graph.input))
    num_outputs = property(lambda self: len(self.model.graph.output))

    def get_input(self, index: int) -> SimpleNamespace:
        return self._tensor(self.model.graph.input[index])

    def get_output(self, index: int) -> SimpleNamespace:
        return self._tensor(self.model.graph.output[index])


class _Config:
    """A builder configuration without precision flags, so setting one fails."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation, self.progress_monitor, self.workspace = simulation, None, 0
        self.profiles: list[dict[str, list[Shape]]] = []
        self._timing = b""

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        assert pool == "workspace" and 0 < size <= self._simulation.cuda.total
        self.workspace = size
        self._simulation.workspaces.append(size)

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile.shapes)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return content if content in (b"", b"timings") else None

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self._simulation.timings.append(cache)
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: b"timings")


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[Shape]] = {}

    def set_shape(self, name: str, least: Shape, usual: Shape, most: Shape) -> None:
        assert all(0 < a <= b <= c for a, b, c in zip(least, usual, most, strict=True)), (
            name,
            least,
            usual,
            most,
        )
        self.shapes[name] = [least, usual, most]


class _Builder:
    def __init__(self, simulation: Simulation, logger: Any) -> None:
        assert logger.initialised
        self._simulation, self._logger = simulation, logger

    def create_network(self, flags: int) -> _Network:
        assert flags == 1 << 1, "strongly typed, and nothing else"
        return self._simulation.module.INetworkDefinition()

    def create_builder_config(self) -> _Config:
        return _Config(self._simulation)

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        assert (
            network.model is not None
            and config.workspace
            and config.profiles
            and config.progress_monitor
        )
        for value in network.model.graph.input:
            for shapes in config.profiles:
                for shape in shapes.get(value.name, [_shape(value)]):
                    assert -1 not in shape, (
                        f"{value.name} varies, and a profile says nothing about it"
                    )
                    assert all(d in (-1, s) for d, s in zip(_shape(value), shape, strict=True)), (
                        value.name,
                        _shape(value),
                        shape,
                    )
        config.progress_monitor.phase_start("Building", None, 2)
        config.progress_monitor.phase_start("Tactics", "Building", 9)
        self._simulation.during_build()
        if not config.progress_monitor.step_complete("Building", 0):
            return None
        config.progress_monitor.phase_finish("Building")
        if self._simulation.build_fault and self._simulation.build_fault in network.file:
            self._logger.log(
                _Severity.ERROR, "Could not find any implementation\nfor node Attention_7"
            )
            return None
        self._simulation.built.append(network.file)
        model = onnx.ModelProto()
        model.CopyFrom(network.model)
        self._simulation.plant(model)
        head = {
            "version": self._simulation.version,
            "gpu": self._simulation.cuda.name.decode(),
            "profiles": config.profiles,
        }
        return json.dumps(head).encode() + b"\n" + model.SerializeToString()


class _Parser:
    def __init__(self, simulation: Simulation, network: _Network, logger: Any) -> None:
        self._simulation, self._network, self._logger = simulation, network, logger

    def supports_operator(self, name: str) -> bool:
        return name not in self._simulation.unknown

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        found = [
            node.op_type for node in model.graph.node if not self.supports_operator(node.op_type)
        ]
        if found:
            self._logger.log(_Severity.ERROR, f"No importer registered for op: {found[0]}")
            return False
        self._network.model, self._network.file = model, path.rpartition("/")[2]
        return True


class _Engine:
    def __init__(
        self, simulation: Simulation, profiles: list[dict[str, list[Shape]]], model: bytes
    ) -> None:
        self.simulation, self.profiles, self.model = (
            simulation,
            profiles,
            onnx.load_from_string(model),
        )
        settings = ort.SessionOptions()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.intra_op_num_threads, settings.log_severity_level = 1, 3
        self.session = ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        graph = self.model.graph
        self.values = {value.name: value for value in (*graph.input, *graph.output)}
        self._inputs = {value.name for value in graph.input}
        scattered = {
            node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"
        }
        self.aliases = {
            output: source for output, source in scattered.items() if output in self.values
        }

    num_io_tensors = property(lambda self: len(self.values))
    device_memory_size_v2 = property(
        lambda self: max(map(self.get_device_memory_size_for_profile_v2, range(len(self.profiles))))
    )

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        return 4096 * (profile + 1)

    def get_tensor_name(self, index: int) -> str:
        return list(self.values)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self._inputs else "output"

    def get_tensor_dtype(self, name: str) -> int:
        return self.values[name].type.tensor_type.elem_type

    def get_tensor_shape(self, name: str) -> Shape:
        return _shape(self.values[name])

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return None if self.simulation.copies_caches else self.aliases.get(name)

    def create_execution_context(self, strategy: str) -> _Context:
        assert strategy == "user managed"
        return _Context(self)


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self._engine, self._cuda = engine, engine.simulation.cuda
        self._profile, self._memory = 0, (0, 0)
        self._addresses: dict[str, int] = {}
        self._shapes = {
            name: engine.get_tensor_shape(name)
            for name in engine.values
            if engine.get_tensor_mode(name) == "input"
        }
        self._warm = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return 0 <= profile < len(self._engine.profiles) and stream == 0x57

    def set_device_memory(self, address: int, size: int) -> None:
        assert address % 256 == 0 and size >= self._engine.get_device_memory_size_for_profile_v2(
            self._profile
        )
        self._memory = (address, size)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return name in self._engine.values and address % 256 == 0

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        least, _, most = self._engine.profiles[self._profile].get(
            name, [self._engine.get_tensor_shape(name)] * 3
        )
        fits = len(shape) == len(least) and all(
            a <= d <= b for a, d, b in zip(least, shape, most, strict=True)
        )
        if fits and self._shapes[name] != tuple(shape):
            self._shapes[name], self._warm = tuple(shape), False
        return fits

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 0x57 and self._memory[0], "memory to compute in was given"
        if self._engine.simulation.refuses_to_run:
            self._engine.simulation.loggers[-1].log(
                _Severity.ERROR, self._engine.simulation.refuses_to_run
            )
            return False
        assert set(self._addresses) == set(self._engine.values), (
            f"not bound: {set(self._engine.values) - set(self._addresses)}"
        )
        assert all(-1 not in shape for shape in self._shapes.values()), self._shapes
        assert all(
            self._addresses[output] == self._addresses[source]
            for output, source in self._engine.aliases.items()
        )
        if self._cuda.captured is not None and not self._warm:
            return False
        self._warm = True
        addresses, shapes = dict(self._addresses), dict(self._shapes)
        self._cuda.submit(lambda: self._run(addresses, shapes))
        return True

    def _run(self, addresses: dict[str, int], shapes: dict[str, Shape]) -> None:
        self._cuda.view(*self._memory, "device").fill(
            0xFF
        )  # activations of another context do not survive this run
        types = {name: _TYPES[self._engine.get_tensor_dtype(name)] for name in addresses}
        feed = {
            name: array_at(self._cuda, addresses[name], types[name], shape).copy()
            for name, shape in shapes.items()
        }
        outputs = [name for name in addresses if name not in shapes]
        for name, found in zip(outputs, self._engine.session.run(outputs, feed), strict=True):
            array_at(self._cuda, addresses[name], types[name], found.shape)[...] = found


def _module(simulation: Simulation) -> Any:
    """Returns the stand-in for the module `tensorrt`."""
    module: Any = ModuleType("tensorrt")
    module.__version__ = simulation.version
    module.ILogger, module.IProgressMonitor = (
        _ILogger,
        type("IProgressMonitor", (), {"__init__": lambda self: None}),
    )
    layers = {"add_kv_cache_update": None, "add_attention": None} if simulation.fuses else {}
    module.INetworkDefinition = type("INetworkDefinition", (_Network,), layers)
    module.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    module.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
    module.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
    module.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    module.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")
    module.nptype = lambda dtype: _TYPES[dtype]
    module.Builder = lambda logger: _Builder(simulation, logger)
    module.OnnxParser = lambda network, logger: _Parser(simulation, network, logger)
    module.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda content: _deserialized(simulation, logger, content)
    )
    return module


def _deserialized(simulation: Simulation, logger: Any, content: Any) -> _Engine | None:
    simulation.read.append(bytes(content))
    simulation.loggers.append(logger)
    head, _, model = bytes(content).partition(b"\n")
    told = json.loads(head)
    simulation.unreadable -= 1
    if simulation.unreadable >= 0 or (told["version"], told["gpu"]) != (
        simulation.version,
        simulation.cuda.name.decode(),
    ):
        logger.log(
            _Severity.ERROR, "The engine plan file is not compatible with this version of TensorRT"
        )
        return None
    profiles = [
        {name: [tuple(shape) for shape in shapes] for name, shapes in profile.items()}
        for profile in told["profiles"]
    ]
    return _Engine(simulation, profiles, model)
