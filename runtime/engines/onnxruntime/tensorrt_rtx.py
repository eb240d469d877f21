"""TensorRT-RTX as a plugin of plain ONNX Runtime, for desktop RTX GPUs. It runs the
fused graphs of a `tensorrt` bundle and needs only pip packages.

The plugin compiles a graph when a session opens it, and keeps the compiled result for
this GPU in the engine cache. The caches are updated in place: one buffer is bound as
both input and output. CUDA graphs stay off until they have been measured on such a GPU.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from runtime.contract.bundle import DECODER_FUSED, VISION_FUSED, Bundle, cache_folder
from runtime.contract.errors import EngineError
from runtime.contract.graphs import (
    INPUTS_EMBEDS,
    LOGITS,
    LOGITS_MASS,
    LOGITS_ROWS,
    NEXT_TOKEN,
    PIXELS,
    POOL,
    POSITION_IDS,
    present,
)
from runtime.engines import EngineOptions
from runtime.engines.onnxruntime.check_io import Shape, check_values, check_vision
from runtime.engines.onnxruntime.gpu_engine import CallShape, DeviceEngine
from runtime.engines.onnxruntime.io_binding import Bound, Device, read, write
from runtime.engines.onnxruntime.sessions import session_options

__all__ = ["RTX", "OrtRtxEngine"]

_PLUGIN, _NVIDIA = "onnxruntime_ep_nv_tensorrt_rtx", 0x10DE
RTX = Device("NvTensorRTRTXExecutionProvider", "gpu", _NVIDIA)
_MOST_ROWS = 64  # largest number of positions with logits in one call
_REMEDY = "infmllm-export doctor --target rtx shows what is missing"


class OrtRtxEngine(DeviceEngine):
    """Runs the fused graphs of a `tensorrt` or `rtx` bundle. With device `HOST` they
    run on the CPU, which tests use to exercise this class.
    """

    def __init__(self, bundle: Bundle, options: EngineOptions, device: Device = RTX) -> None:
        spec = bundle.spec.decoder
        plugin = None if device.memory == "cpu" else _register(device)
        longest = {
            INPUTS_EMBEDS: (1, bundle.capacity, spec.hidden),
            POSITION_IDS: (1, bundle.capacity),
            LOGITS_ROWS: (_MOST_ROWS,),
        }
        pictures = {
            PIXELS: (1, 3, bundle.spec.vision.image_size, bundle.spec.vision.image_size),
            POOL: (max(bundle.spec.pool_sizes) ** 2, bundle.spec.vision.grid**2),
        }
        vision = _open(bundle, VISION_FUSED, options, device, plugin, pictures)
        decoder = _open(bundle, DECODER_FUSED, options, device, plugin, longest)
        check_vision(bundle, VISION_FUSED, vision)
        _check_decoder(bundle, decoder)
        super().__init__(
            bundle,
            device,
            vision,
            decoder,
            min(options.context or bundle.capacity, bundle.capacity),
            bundle.capacity,
        )

    def batch(self, slots: int, rows: int) -> RtxBatch:
        """See `Engine.batch`. Each slot has the bundle's full number of cache rows,
        because the graph was built for that length.
        """
        return RtxBatch(self, slots)

    def places(self, length: int, start: int) -> dict[str, NDArray[Any]]:
        """Returns the positions of the call's tokens, which equal the cache rows they
        fill.
        """
        return {POSITION_IDS: np.arange(start, start + length, dtype=np.int64)[None]}

    def bound(self, shape: CallShape, caches: Mapping[str, ort.OrtValue]) -> Bound:
        """See `DeviceEngine.bound`."""
        return self.call(shape, caches, self.places(shape.length, 0))


class RtxBatch:
    """See `runtime.engines.Batch`: sequences with their own caches, decoded one after
    the other. Rows are copied between caches through the host.
    """

    def __init__(self, engine: OrtRtxEngine, slots: int) -> None:
        self._engine = engine
        self._caches = [engine.new_caches() for _ in range(slots)]
        self._calls = [engine.bound(CallShape(1, 1, 1), caches) for caches in self._caches]

    def fill(self, slot: int, rows: int) -> None:
        """See `Batch.fill`."""
        for name, cache in self._caches[slot].items():
            write(cache, read(self._engine.caches[name]))

    def step(
        self, inputs_embeds: NDArray[np.float32], starts: NDArray[np.int32]
    ) -> NDArray[np.float32]:
        """See `Batch.step`."""
        assert starts.max() < self._engine.capacity, (
            f"row {starts.max()} does not fit {self._engine.capacity}; the caller asks for enough "
            f"rows"
        )
        found = []
        for slot, start in enumerate(starts.tolist()):
            call = self._calls[slot]
            call.write(
                {
                    INPUTS_EMBEDS: inputs_embeds[slot : slot + 1].astype(np.float16),
                    **self._engine.places(1, start),
                }
            )
            call.run()
            found.append(call.logits())
        return np.concatenate(found)

    def copy(self, sources: Sequence[int], start: int, end: int) -> None:
        """See `Batch.copy`."""
        moved = [(target, source) for target, source in enumerate(sources) if target != source]
        if start >= end or not moved:
            return
        for name in self._engine.caches:
            before = {source: read(self._caches[source][name]) for _, source in moved}
            for target, source in moved:
                cache = read(self._caches[target][name]).copy()
                cache[:, :, start:end] = before[source][:, :, start:end]
                write(self._caches[target][name], cache)


def _register(device: Device) -> Any:
    """Registers the plugin if needed and returns its device on this machine. Raises
    `EngineError` if the plugin does not load or finds no GPU.
    """
    try:
        plugin = importlib.import_module(_PLUGIN)
    except ModuleNotFoundError:
        raise EngineError(
            f"the TensorRT-RTX plugin is not installed; run: pip install "
            f"onnxruntime-ep-nv-tensorrt-rtx-cu13 ({_REMEDY})"
        ) from None
    if not hasattr(ort, "register_execution_provider_library"):
        raise EngineError(
            f"onnxruntime {ort.__version__} does not support plugins; run: pip install -U "
            f"'onnxruntime>=1.24' ({_REMEDY})"
        )
    found = _devices(device)
    if not found:
        try:
            ort.register_execution_provider_library(device.provider, plugin.get_library_path())
        except Exception as error:  # ONNX Runtime's exceptions share no public base class
            reason = f"{str(error).splitlines()[0]:.300}"
            raise EngineError(
                f"the TensorRT-RTX plugin does not load: {reason}; it needs an NVIDIA driver and "
                f"an RTX GPU ({_REMEDY})"
            ) from None
        found = _devices(device)
    if not found:
        raise EngineError(
            f"the TensorRT-RTX plugin finds no RTX GPU; it needs Ampere or newer ({_REMEDY})"
        )
    return found[0]


def _devices(device: Device) -> list[Any]:
    return [found for found in ort.get_ep_devices() if found.ep_name == device.provider]


def _open(
    bundle: Bundle,
    file: str,
    options: EngineOptions,
    device: Device,
    plugin: Any,
    largest: Mapping[str, tuple[int, ...]],
) -> ort.InferenceSession:
    """Opens a session on the plugin's device (None: the CPU). `largest` gives the
    largest input shapes; in the smallest shapes, every variable dimension is 1.
    """
    settings, path = session_options(options.threads), str(bundle.file(file))
    try:
        if plugin is None:
            settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            return ort.InferenceSession(path, settings, providers=[device.provider])
        settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        settings.add_provider_for_devices([plugin], _provider_options(bundle, options, largest))
        session = ort.InferenceSession(path, settings, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        raise EngineError(
            f"{path} cannot run in TensorRT-RTX: {str(error).splitlines()[0]:.300}; {_REMEDY}"
        ) from None
    if device.provider not in session.get_providers():
        raise EngineError(
            f"{path} would run on {session.get_providers()[0]}, not {device.provider}; {_REMEDY}"
        )
    return session


def _provider_options(
    bundle: Bundle, options: EngineOptions, largest: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Returns the provider options, with one shape profile for all calls. The decoder's
    profile is optimised for single tokens; its caches have one fixed shape.
    """
    spec = bundle.spec.decoder
    caches = (
        dict.fromkeys(spec.cache_names, (1, spec.kv_heads, bundle.capacity, spec.head_dim))
        if INPUTS_EMBEDS in largest
        else {}
    )
    fixed = {INPUTS_EMBEDS: (0, 2), PIXELS: (0, 1, 2, 3), POOL: (1,), POSITION_IDS: (0,)}
    least = {
        name: tuple(size if axis in fixed.get(name, ()) else 1 for axis, size in enumerate(shape))
        for name, shape in largest.items()
    }
    kept = {}
    if options.engine_cache:
        folder = cache_folder() / "engines-rtx"
        with contextlib.suppress(OSError):  # with a read-only home, every start compiles again
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            kept = {"nv_runtime_cache_path": str(folder)}
    return kept | {
        "nv_profile_min_shapes": _shapes({**least, **caches}),
        "nv_profile_opt_shapes": _shapes({**(least if caches else largest), **caches}),
        "nv_profile_max_shapes": _shapes({**largest, **caches}),
    }


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())


def _check_decoder(bundle: Bundle, session: ort.InferenceSession) -> None:
    spec = bundle.spec.decoder
    caches: dict[str, Shape] = dict.fromkeys(
        spec.cache_names, (None, spec.kv_heads, bundle.capacity, spec.head_dim)
    )
    inputs: dict[str, Shape] = {
        INPUTS_EMBEDS: (None, None, spec.hidden),
        POSITION_IDS: (None, None),
        LOGITS_ROWS: (None,),
        **caches,
    }
    outputs: dict[str, Shape] = {
        LOGITS: (None, spec.vocab_size),
        NEXT_TOKEN: (None,),
        LOGITS_MASS: (None,),
    }
    check_values(bundle, DECODER_FUSED, session.get_inputs(), inputs)
    check_values(
        bundle,
        DECODER_FUSED,
        session.get_outputs(),
        {**outputs, **{present(name): shape for name, shape in caches.items()}},
    )
