"""The calibration set and the walk: honest samples, the float model block by block,
exact where nothing is rounded, resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.blocks import Block, StreamedModel, Trace
from calibration.calibrate import Calibrated, calibrate
from calibration.linear import LinearScheme
from calibration.parts import CALIBRATION, FRESH
from calibration.samples import Case, default_source, draw_cases, draw_examples, set_card
from export.schemes import SCHEMES
from runtime.contract.errors import DataError, UsageError
from runtime.data.sample import Example, Sample
from tests.conftest import TINY
from trainer.checkpoint import StoredCheckpoint, load_checkpoint, open_checkpoint
from trainer.model import InfMLLM


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> StoredCheckpoint:
    return open_checkpoint(tiny_checkpoint)


def cases(stored: StoredCheckpoint, count: int = 8, seed: int = 1) -> list[Case]:
    return draw_cases(
        draw_examples("synthetic", count, replace(FRESH, seed=seed)),
        stored.spec,
        stored.tokenizer,
        seed,
    )


def relative(found: list[Trace], expected: list[Trace]) -> float:
    pairs = [(a.logits, b.logits) for a, b in zip(found, expected, strict=True)]
    return float(
        np.mean(
            [
                np.linalg.norm(a - b) / np.linalg.norm(b)
                for a, b in pairs
                if a is not None and b is not None
            ]
        )
    )


def test_the_walk_is_the_model(stored: StoredCheckpoint, tiny_checkpoint: Path) -> None:
    model = load_checkpoint(tiny_checkpoint).model
    for trace in StreamedModel(stored.spec, stored.read).run_blockwise(cases(stored, 4)):
        case = trace.case
        with torch.no_grad():
            embeds = model.embed_image(torch.from_numpy(case.pixels), case.pool_size)[0]
            logits = model.logits(model.sequence(case.before, embeds, [*case.after, *case.answer]))[
                0, -len(case.answer) - 1 :
            ]
        assert trace.image_embeds is not None and trace.logits is not None
        assert np.allclose(trace.image_embeds, embeds, atol=1e-5) and np.allclose(
            trace.logits, logits, atol=1e-4
        )


def test_only_one_block_is_in_memory(stored: StoredCheckpoint) -> None:
    model = StreamedModel(stored.spec, stored.read)
    held = []

    def count(block: object) -> None:
        held.append(sum(p.numel() for p in model.model.parameters() if p.device.type != "meta"))

    model.run_blockwise(cases(stored, 1), progress=count)
    assert set(held) == {0} and all(p.device.type == "meta" for p in model.model.parameters())


def test_moved_scales_change_nothing_but_rounding(stored: StoredCheckpoint, tmp_path: Path) -> None:
    scheme, test = LinearScheme("int8", "int8-tensor", smooth=True), cases(stored, 4, seed=9)
    calibrate(
        StreamedModel(stored.spec, stored.read), [], cases(stored), lambda name: (scheme,), tmp_path
    )
    calibrated = Calibrated(stored.read, tmp_path)
    assert any(strength > 0 for strength in calibrated.strengths().values())
    expected = StreamedModel(stored.spec, stored.read).run_blockwise(test)
    assert (
        relative(StreamedModel(stored.spec, calibrated.read).run_blockwise(test), expected) < 1e-5
    )


def planted(read: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
    """The same function with activation outliers: some channels of every norm 50 times
    as large, the weights behind it as much smaller.
    """
    channels = [1, 17, 40]
    behind = {
        "input_layernorm": ("q_proj", "k_proj", "v_proj"),
        "post_attention_layernorm": ("gate_proj", "up_proj"),
    }

    def changed(name: str) -> torch.Tensor:
        tensor = read(name)
        if any(name.endswith(f"{norm}.weight") for norm in behind):
            tensor[channels] *= 50
        elif any(f"{layer}.weight" in name for layers in behind.values() for layer in layers):
            tensor[:, channels] /= 50
        return tensor

    return changed


@pytest.mark.parametrize(
    ("scheme", "plain", "gain"),
    [
        (
            LinearScheme("int8", "int8-tensor", smooth=True),
            LinearScheme("int8", "int8-tensor"),
            0.3,
        ),
        (
            LinearScheme("int4", block=32, rounding="gptq", smooth=True),
            LinearScheme("int4", block=32),
            0.6,
        ),
    ],
    ids=["SmoothQuant", "GPTQ"],
)
def test_data_aware_rounding_helps_a_model_with_planted_outliers(
    scheme: LinearScheme, plain: LinearScheme, gain: float, stored: StoredCheckpoint, tmp_path: Path
) -> None:
    read, test = planted(stored.read), cases(stored, 6, seed=9)
    expected = StreamedModel(stored.spec, stored.read).run_blockwise(test)
    assert (
        relative(StreamedModel(stored.spec, read).run_blockwise(test), expected) < 1e-5
    )  # the same function
    calibrate(
        StreamedModel(stored.spec, read), [], cases(stored, 16), lambda name: (scheme,), tmp_path
    )
    errors = []
    for chosen, calibrated in ((plain, Calibrated(read)), (scheme, Calibrated(read, tmp_path))):
        errors.append(relative(rounded_walk(stored, calibrated, chosen, test), expected))
    assert errors[1] < gain * errors[0], errors


def rounded_walk(
    stored: StoredCheckpoint, calibrated: Calibrated, scheme: LinearScheme, test: list[Case]
) -> list[Trace]:
    """The decoder's layers with rounded weights, and activations rounded in front of
    them, in torch.
    """
    from contextlib import contextmanager

    from calibration.linear import fake_activation

    @contextmanager
    def round_inputs(block: Block, model: InfMLLM) -> Iterator[None]:
        names = [name for feed in block.feeds for name in feed.linears if ".layers." in name]
        hook = lambda module, arguments: (
            fake_activation(arguments[0][0], scheme.activation)[None],
        )
        handles = [model.get_submodule(name).register_forward_pre_hook(hook) for name in names]
        yield
        for handle in handles:
            handle.remove()

    def read(name: str) -> torch.Tensor:
        linear = ".layers." in name and "_proj." in name
        return calibrated.quantised(name, scheme).dequantised() if linear else calibrated.read(name)

    return StreamedModel(stored.spec, read).run_blockwise(test, round_inputs)


def test_an_interrupted_walk_goes_on_where_it_stopped(
    stored: StoredCheckpoint, tmp_path: Path
) -> None:
    def run() -> dict[str, bytes]:
        model = StreamedModel(stored.spec, stored.read)
        calibrate(model, [], cases(stored), SCHEMES["int4"].schemes_for, tmp_path, cache=True)
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    first = run()
    (tmp_path / "decoder.layers.1.npz").unlink()
    kept = (tmp_path / "decoder.layers.0.npz").stat().st_mtime_ns
    again = run()
    assert first.keys() == again.keys() and all(first[name] == again[name] for name in first)
    assert (tmp_path / "decoder.layers.0.npz").stat().st_mtime_ns == kept
    layer = np.load(tmp_path / "decoder.layers.0.npz")
    keys, values = layer["decoder.layers.0|keys"], layer["decoder.layers.0|values"]
    assert keys.shape == values.shape == (2, 16) and values.min() > 0
    assert np.array_equal(
        keys[:, :8], keys[:, 8:]
    )  # a pair's length bounds both its channels at every position


def test_the_set_is_reproducible_listed_and_hashed(stored: StoredCheckpoint) -> None:
    one, same, other = (set_card("synthetic", cases(stored, 4, seed)) for seed in (1, 1, 2))
    assert (
        one == same
        and one["sha256"] != other["sha256"]
        and one["count"] == 4
        and len(one["names"]) == 4
    )


def test_bad_sets_are_refused(stored: StoredCheckpoint, tmp_path: Path) -> None:
    sample = Sample("vqa", "what?", "x")
    flat = Example(Image.new("RGB", (40, 30), (9, 9, 9)), (sample,), "flat.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = Example(tmp_path / "broken.png", (sample,), "broken.png")
    for example, message in (
        (flat, "flat.png is one flat colour"),
        (broken, "broken.png cannot be used"),
    ):
        with pytest.raises(DataError, match=message):
            draw_cases([example], stored.spec, stored.tokenizer, 0)
    Image.effect_noise((40, 30), 60).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "d.jsonl").write_text('{"image": "a.png", "task": "caption", "answer": "x"}\n')
    with pytest.raises(DataError, match="has 1 images, calibration needs at least 4"):
        draw_examples(str(tmp_path / "d.jsonl"), 32, CALIBRATION, 4)
    with pytest.raises(UsageError, match=r"was trained on voc:X.*--calib"):
        default_source({"data": [{"name": "voc:X"}]}, "")
    with pytest.raises(UsageError, match="does not say"):
        default_source({}, "")
    long = replace(sample, text="word " * 400)
    with pytest.raises(DataError, match="only 0 of 1 questions fit"):
        draw_cases(
            [Example(Image.open(tmp_path / "a.png"), (replace(long, task="caption"),))],
            TINY,
            stored.tokenizer,
            0,
        )


def test_a_picture_of_one_brightness_but_two_colours_is_no_flat_one(
    stored: StoredCheckpoint,
) -> None:
    image = Image.new("RGB", (40, 30), (76, 76, 76))
    image.paste((254, 0, 0), (5, 5, 20, 20))  # the same brightness
    assert image.convert("L").getextrema()[0] == image.convert("L").getextrema()[1]
    assert (
        len(
            draw_cases(
                [Example(image, (Sample("vqa", "what?", "x"),), "red")],
                stored.spec,
                stored.tokenizer,
                0,
            )
        )
        == 1
    )
