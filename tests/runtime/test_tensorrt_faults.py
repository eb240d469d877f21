"""What goes wrong on a GPU is noticed: silent errors of a compiler, numbers that are
none, memory that runs out, a device that is lost.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export.parity.cpu_reference import ReferenceEngine
from runtime import Decoding, Session, load
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import BundleError, ContextError, EngineError, NonFiniteError
from runtime.generation import request
from runtime.generation.token_embeddings import embed_prompt
from runtime.hardware.system import Memory
from tests.runtime.conftest import Install
from tests.simulated_cuda import cudaError_t

GREEDY = Decoding(lookup=0, constrain=False)


@pytest.fixture
def bundle(built_tensorrt: Callable[[str], Path]) -> Path:
    return built_tensorrt("fp16")


def tokens(session: Session, image: Image.Image) -> tuple[int, ...]:
    return session.ask(image, "describe", max_new_tokens=20, decoding=GREEDY).tokens


def expected(path: Path, image: Image.Image, fused: bool) -> tuple[int, ...]:
    bundle = read_bundle(path)
    return tokens(Session(bundle, ReferenceEngine(bundle, fused, threads=1)), image)


def wrong(*operators: str) -> Callable[[onnx.ModelProto], None]:
    """A compiler whose kernels of these operators give results of the wrong size."""

    def plant(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type in operators:
                name, dtype = (
                    node.output[0],
                    np.float32 if node.op_type == "Softmax" else np.float16,
                )
                node.output[0] = f"{name}.right"
                model.graph.initializer.append(
                    onnx.numpy_helper.from_array(np.array(1.3, dtype), f"{name}.factor")
                )
                model.graph.node.append(
                    onnx.helper.make_node("Mul", [f"{name}.right", f"{name}.factor"], [name])
                )
        _sort(model)

    return plant


def _sort(model: onnx.ModelProto) -> None:
    """Puts appended nodes behind what they read and before what reads them."""
    known, waiting, done = (
        {value.name for value in (*model.graph.input, *model.graph.initializer)},
        list(model.graph.node),
        [],
    )
    while waiting:
        node = next(
            node for node in waiting if all(not name or name in known for name in node.input)
        )
        waiting.remove(node)
        done.append(node)
        known |= set(node.output)
    del model.graph.node[:]
    model.graph.node.extend(done)


def test_wrong_fused_attention_gives_way_to_the_plain_form_and_is_remembered(
    bundle: Path, gpu: Install, scene_image: Image.Image, capfd: pytest.CaptureFixture[str]
) -> None:
    simulation = gpu()
    simulation.plant = wrong("Attention")
    session = load(bundle)
    assert simulation.built == [
        "vision-fused.onnx",
        "decoder-fused.onnx",
        "vision.onnx",
        "decoder.onnx",
    ]
    notes = capfd.readouterr().err
    assert (
        "decoder-fused.onnx gives wrong results for the bundle's golden cases on Simulated GPU "
        "with TensorRT 10.3.0: prefill differs from PyTorch by 0." in notes
    )
    assert (
        "vision-fused.onnx gives wrong results" in notes and "decoder.onnx takes its place" in notes
    )
    assert tokens(session, scene_image) == expected(bundle, scene_image, False)
    assert "vision.onnx, decoder.onnx" in session.engine.version
    again = gpu()
    assert tokens(load(bundle), scene_image) == expected(bundle, scene_image, False)
    assert again.built == [] and capfd.readouterr().err.count("remembered; remove ") == 2


def test_what_no_form_computes_rightly_is_never_served(bundle: Path, gpu: Install) -> None:
    simulation = gpu()
    simulation.plant = wrong("Softmax", "Attention")
    with pytest.raises(
        EngineError,
        match=r"^vision.onnx gives wrong results .* vision differs from PyTorch by 0.*allowed.*"
        r"build the bundle with --target cpu$",
    ):
        load(bundle)
    built = len(simulation.built)
    with pytest.raises(EngineError, match="remembered; remove "):
        load(bundle)
    assert len(simulation.built) == built


def test_a_trial_that_was_cut_short_comes_again(
    bundle: Path, gpu: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu()
    with monkeypatch.context() as patch:

        def killed(*arguments: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("runtime.parity.replay_goldens", killed)
        with pytest.raises(KeyboardInterrupt):
            load(bundle)
    again = gpu()
    load(bundle)
    assert again.built == [] and again.cuda.launched > 0, "built before, tried now"
    last = gpu()
    load(bundle)
    assert last.cuda.launched == 0


def test_a_verdict_holds_for_the_tolerance_it_was_given_under(
    bundle: Path, gpu: Install, tmp_path: Path
) -> None:
    gpu()
    load(bundle)
    stricter = tmp_path / "stricter"
    stricter.mkdir()
    for path in bundle.iterdir():
        (stricter / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((stricter / "manifest.json").read_text())
    manifest["parity"]["tolerance"] = dict.fromkeys(("vision", "prefill", "decode"), 1e-9)
    (stricter / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match="allowed 1e-09"):
        load(stricter)


@pytest.mark.parametrize("how", ["operator", "build", "copies", "old"])
def test_a_fused_form_that_cannot_be_built_gives_way(
    bundle: Path,
    gpu: Install,
    scene_image: Image.Image,
    capfd: pytest.CaptureFixture[str],
    how: str,
) -> None:
    simulation = gpu()
    if how == "operator":
        simulation.unknown = {"TensorScatter"}
    elif how == "build":
        simulation.build_fault = "decoder-fused"
    elif how == "copies":
        simulation.copies_caches = True
    else:
        del simulation.module.INetworkDefinition.add_kv_cache_update
    session = load(bundle)
    assert [
        file for file in simulation.built if how != "copies" or file != "decoder-fused.onnx"
    ] == ["vision-fused.onnx", "decoder.onnx"]
    reasons = {
        "operator": "has no TensorScatter",
        "build": "MiB workspace: Could not find any implementation for node Attention_7",
        "copies": "does not update present.key_cache.0 of decoder-fused.onnx in place",
        "old": "",
    }
    notes = capfd.readouterr().err
    assert reasons[how] in notes and ("takes its place" in notes) == (how != "old")
    assert tokens(session, scene_image) == expected(bundle, scene_image, False)


def test_a_graph_no_tensorrt_takes_is_one_line(bundle: Path, gpu: Install) -> None:
    gpu(fuses=False).unknown = {"Softmax"}
    with pytest.raises(
        EngineError,
        match=r"TensorRT 10.3.0 refuses .*vision.onnx: No importer registered for op: Softmax; "
        r"re-export",
    ) as caught:
        load(bundle)
    assert "\n" not in str(caught.value)


def test_a_graph_that_is_not_what_the_manifest_says_is_refused(bundle: Path, gpu: Install) -> None:
    simulation = gpu(fuses=False)
    original = onnx.load(bundle / "decoder.onnx")
    original.graph.output[0].name = "else"
    parser = simulation.module.OnnxParser

    def other(network: object, logger: object) -> object:
        made = parser(network, logger)
        parse = made.parse_from_file

        def parse_other(path: str) -> bool:
            found: bool = parse(path)
            if path.endswith("decoder.onnx"):
                made._network.model = original
            return found

        made.parse_from_file = parse_other
        return made

    simulation.module.OnnxParser = other
    with pytest.raises(BundleError, match="else is unexpected"):
        load(bundle)


@pytest.mark.parametrize("fused", [False, True])
def test_logits_that_are_not_finite_give_no_token(
    bundle: Path, gpu: Install, scene_image: Image.Image, fused: bool
) -> None:
    gpu(fuses=fused)
    session = load(bundle)
    huge = np.full((1, 1, 64), 1e6, np.float32)  # more than half precision holds
    session.engine.forward(np.ones((1, 4, 64), np.float32), 0)
    with pytest.raises(NonFiniteError):
        session.engine.greedy(huge, 4)
    assert not np.isfinite(session.engine.forward(huge, 4)).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(request, "embed_prompt", lambda *parts: embed_prompt(*parts) * 1e6)
        for decoding in (GREEDY, Decoding(temperature=1.0), Decoding(beams=2)):
            session.clear_caches()
            with pytest.raises(NonFiniteError):
                session.ask(scene_image, "tell me all about every single thing", decoding=decoding)
    session.clear_caches()
    assert tokens(session, scene_image) == expected(bundle, scene_image, fused), (
        "NaN in rows that are masked now does no harm"
    )
    session.engine.forward(np.ones((1, 4, 64), np.float32), 0)
    session.engine.forward(huge, 4)
    assert not np.isfinite(session.engine.forward(huge / 1e6, 5)).all(), (
        "a row that attends a spoilt one shows it"
    )
    assert np.isfinite(session.engine.forward(huge / 1e6, 4)).all()


def test_the_token_chosen_on_the_gpu_is_tried_too(bundle: Path, gpu: Install) -> None:
    def plant(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == "ReduceMax":
                node.op_type = "ReduceMin"

    gpu().plant = plant
    with pytest.raises(EngineError, match=r"decoder.onnx gives wrong results .*decode chose token"):
        load(bundle)


def test_memory_that_runs_out_is_noticed_at_the_start(bundle: Path, gpu: Install) -> None:
    simulation = gpu()
    session = load(bundle)
    needed = simulation.cuda.used
    del session
    for total in range(1000, needed, needed // 12):
        simulation.cuda.total = total
        with pytest.raises(
            ContextError,
            match=r"^no memory for [a-z].*: \d+ MiB wanted, \d+ MiB of the GPU's \d+ MiB are "
            r"free; choose a smaller --context",
        ):
            load(bundle)
    simulation.cuda.total = needed
    load(bundle)


def test_memory_that_runs_out_for_beams_costs_that_answer_only(
    bundle: Path, gpu: Install, scene_image: Image.Image
) -> None:
    simulation = gpu()
    session = load(bundle)
    simulation.cuda.total = simulation.cuda.used + 100_000
    with pytest.raises(ContextError, match="the key/value caches of 8 beams or questions"):
        session.ask(scene_image, "describe", decoding=Decoding(beams=8))
    assert tokens(session, scene_image) == expected(bundle, scene_image, True)


def test_a_build_for_which_memory_is_short_is_announced(
    bundle: Path, gpu: Install, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    gpu()
    monkeypatch.setattr(
        "runtime.engines.tensorrt.provider.read_memory", lambda root: Memory(4000, 0.1, 0, 0)
    )
    load(bundle)
    assert "needs about 1 MB of memory, 0 MB are available" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["cudaGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize"])
def test_a_lost_gpu_answers_no_more(
    bundle: Path, gpu: Install, scene_image: Image.Image, name: str
) -> None:
    cuda = gpu().cuda
    session = load(bundle)
    tokens(session, scene_image)
    cuda.fails[name] = [cudaError_t.cudaErrorLaunchFailure]
    told = (
        rf"^the GPU failed \({name} gave cudaErrorLaunchFailure: said the simulation\); this "
        rf"session can no longer answer: restart the program"
    )
    with pytest.raises(EngineError, match=told):
        tokens(session, scene_image)
    cuda.calls.clear()
    one = np.ones((1, 1, 64), np.float32)
    for call in (
        lambda: session.engine.greedy(one, 0),
        lambda: session.engine.forward(one, 0),
        lambda: session.engine.verify(one, 0),
        lambda: session.engine.batch(2, 9),
        lambda: session.engine.embed_image(
            np.ones((1, 3, 32, 32), np.float32), np.ones((4, 16), np.float32)
        ),
        lambda: session.ask(scene_image, "describe"),
    ):
        with pytest.raises(EngineError, match="this session can no longer answer"):
            call()
    assert not cuda.calls, "a lost device is left alone"


def test_a_network_that_fails_to_run_ends_the_session(bundle: Path, gpu: Install) -> None:
    simulation = gpu()
    session = load(bundle)
    simulation.refuses_to_run = "CUDA error 700"
    with pytest.raises(EngineError, match="running the network: CUDA error 700"):
        session.engine.forward(np.ones((1, 3, 64), np.float32), 0)
    simulation.refuses_to_run = ""
    with pytest.raises(EngineError, match="can no longer answer"):
        session.engine.forward(np.ones((1, 3, 64), np.float32), 0)


def test_a_machine_without_a_gpu_is_told_so(
    bundle: Path, gpu: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu().cuda.fails["cudaGetDeviceCount"] = [cudaError_t.cudaErrorNoDevice]
    with pytest.raises(EngineError, match=r"no GPU can be used .cudaErrorNoDevice: .*--target cpu"):
        load(bundle)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(
        EngineError,
        match=r"target tensorrt needs tensorrt, which is not installed; run: pip install "
        r"'infmllm-edge\[tensorrt\]'",
    ):
        load(bundle)
