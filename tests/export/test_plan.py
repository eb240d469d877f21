"""Plans: bytes are exact, memory and disk close to what builds take, devices and advice
readable; auto finds its mixture by measuring.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from calibration.linear import KERNEL_BLOCKS
from export import mixed_precision as auto
from export.cli import app
from export.inspection.describe import describe_bundle
from export.inspection.html_picture import block_page
from export.mixed_precision import Budget, Mixture, choose_mixture, upgrade_path
from export.pipeline import BuildOptions, build
from export.planning.devices import DEVICES, find_device
from export.planning.plan import make_plan, part_bytes
from export.planning.room import check_room
from export.schemes import SCHEMES, choose_scheme, find_scheme
from runtime.contract.bundle import read_bundle
from runtime.contract.errors import BuildError, ParityError, UsageError
from tests.conftest import TINY
from trainer.config import PRESETS, find_preset

NANO, ANY = DEVICES["orin-nano-8gb"], DEVICES["rtx4090"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weight_bytes_are_exact_and_disk_is_close(
    scheme: str, built: Callable[[str], Path]
) -> None:
    folder = built(scheme)
    for graph, expected in part_bytes(TINY, SCHEMES[scheme]).items():
        stored = sum(
            row["bytes"]
            for row in describe_bundle(read_bundle(folder))["graphs"][f"{graph}.onnx"][
                "storage"
            ].values()
        )
        assert stored == pytest.approx(expected, rel=0.01), (
            graph
        )  # constants of a few bytes are not counted
    recorded = read_bundle(folder).provenance["plan"]
    assert recorded["disk"] == pytest.approx(recorded["disk_actual"], rel=0.15)
    assert recorded["build_peak_mib_actual"] > 0


def test_the_shapes_of_the_presets_are_planned_in_no_time() -> None:
    sizes = {
        name: make_plan(preset.spec, SCHEMES["int4"], ANY).disk_bytes
        for name, preset in PRESETS.items()
    }
    assert 5e6 < sizes["nano"] < 7e6 and 0.9e9 < sizes["edge"] < 1.3e9 and 4.5e9 < sizes["7b"] < 6e9
    for preset in PRESETS.values():
        plans = [
            make_plan(preset.spec, SCHEMES[name], ANY) for name in ("fp32", "fp16", "int8", "int4")
        ]
        assert sorted(plan.disk_bytes for plan in plans) == [
            plan.disk_bytes for plan in plans[::-1]
        ]
        assert sorted(plan.latency["per_token_ms"] for plan in plans) == [
            plan.latency["per_token_ms"] for plan in plans[::-1]
        ]


def test_what_does_not_fit_says_what_to_change() -> None:
    plan = make_plan(PRESETS["7b"].spec, SCHEMES["int8"], NANO)
    assert (
        not plan.fits
        and any("--precision int4" in line for line in plan.advice)
        and any("--context" in line for line in plan.advice)
    )
    small = make_plan(PRESETS["7b"].spec, choose_scheme("int8", cache="int8"), NANO, context=512)
    assert (
        small.run["cache"] * 32 == plan.run["cache"]
        and make_plan(PRESETS["nano"].spec, SCHEMES["int8"], NANO).fits
    )


def test_devices_come_from_the_table_a_file_or_this_machine(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(
        '{"memory_gb": 4, "bandwidth_gbs": 20, "float_tflops": 0.1, "int8_tops": 0.2}'
    )
    assert (
        find_device(str(tmp_path / "mine.json")).name == "mine"
        and find_device(None).bandwidth_gbs > 1
    )
    for text, message in (
        ('{"memory_gb": 4}', "describes no device"),
        ("[", "describes no device"),
        ('{"memory_gb": -1, "bandwidth_gbs": 1}', "describes"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            find_device(str(tmp_path / "bad.json"))
    with pytest.raises(UsageError, match="orin-nano-8gb"):
        find_device("abacus")


def test_the_plan_command_prints_a_table_and_json() -> None:
    text = CliRunner().invoke(
        app, ["plan", "--preset", "7b", "--precision", "int4", "--device", "orin-nano-8gb"]
    )
    assert text.exit_code == 0 and "NO" in text.stdout and "--kv int8" in text.stdout
    data = json.loads(
        CliRunner()
        .invoke(app, ["plan", "--preset", "edge", "--device", "rtx4090", "--json"])
        .stdout
    )
    assert (
        set(data) == set(SCHEMES)
        and data["int8"]["fits"]
        and data["int8"]["visual_tokens"][0] == 256
    )


def test_the_command_line_changes_schemes_and_says_what_it_cannot() -> None:
    scheme = choose_scheme(
        "int4", 128, "mse", "int8", ["decoder.layers.0=fp16", "vision_tower=int8"]
    )
    assert (
        scheme.linear("decoder.layers.1.mlp.up_proj.weight").text().startswith("int4/128 mse")
        and scheme.cache == "int8"
    )
    assert (
        scheme.linear("decoder.layers.0.mlp.up_proj.weight").weight == "fp16"
        and scheme.name == "int4+"
    )
    for arguments, message in (
        (("int8", 64), "no 4-bit weights"),
        (("int4", 48), ", ".join(map(str, KERNEL_BLOCKS))),
        (("int4", None, "up"), "gptq"),
        (("int4", None, None, "int2"), "--kv"),
        (("int4", None, None, "fp32", ["x"]), "BLOCK=SCHEME"),
        (("int4", None, None, "fp32", ["x=int9"]), "unknown precision"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_scheme(*arguments)


def test_a_block_kept_in_another_scheme_is_stored_so(tiny_checkpoint: Path, tmp_path: Path) -> None:
    scheme = choose_scheme(
        "int4-hybrid", keep=["decoder.layers.0=fp16", "vision_tower.blocks.1=int8-weights"]
    )
    build(BuildOptions(tiny_checkpoint, scheme, "cpu", tmp_path / "b", questions=0))
    description = describe_bundle(read_bundle(tmp_path / "b"))
    kinds = {
        name: {block: set(row["layers"].values()) for block, row in graph["blocks"].items()}
        for name, graph in description["graphs"].items()
    }
    assert (
        kinds["decoder.onnx"]["decoder.layers.0"]
        == kinds["prefill.onnx"]["decoder.layers.0"]
        == {"fp16"}
    )
    assert kinds["decoder.onnx"]["decoder.layers.1"] == {"int4/64", "int4/128"} and kinds[
        "prefill.onnx"
    ]["decoder.layers.1"] == {"int8 x int8"}
    assert kinds["vision.onnx"]["vision_tower.blocks.1"] == {"int8/32", "int8/64"} and kinds[
        "vision.onnx"
    ]["vision_tower.blocks.0"] == {"int8 x int8"}
    page = block_page(description)
    assert (
        "VERIFIED" in page
        and "decoder.layers.1" in page
        and "3 × int8/32" in page
        and "6 × int4/64" in page
    )


def test_upgrades_save_the_most_divergence_per_cost_first() -> None:
    nats = {
        "a": {"small": 0.9, "large": 0.1},
        "b": {"small": 0.2, "middle": 0.15, "large": 0.0},
        "c": {"small": 0.0, "large": 0.0},
    }
    cost = {
        "a": {"small": 1.0, "large": 2.0},
        "b": {"small": 1.0, "middle": 1.1, "large": 9.0},
        "c": {"small": 1.0, "large": 2.0},
    }
    path = upgrade_path(nats, cost)
    assert [(row["a"], row["b"]) for row in path] == [
        ("small", "small"),
        ("large", "small"),
        ("large", "middle"),
        ("large", "large"),
    ]
    assert all(row["c"] == "small" for row in path)


@pytest.mark.slow
def test_auto_takes_the_cheapest_mixture_that_keeps_the_answers(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The untrained model answers nothing right, so the measured drop is planted: three
    upgrades are needed.
    """
    measured: list[int] = []

    def measure(self: auto._Meter, mixture: Mixture) -> Mixture:
        measured.append(mixture.bytes)
        drop = 0.0 if mixture.predicted is None else 2.0 if mixture.bytes < threshold else 0.25
        return Mixture(
            mixture.name, mixture.scheme, mixture.bytes, mixture.predicted, {"vqa": 90.0}, drop
        )

    monkeypatch.setattr(auto._Meter, "measure", measure)
    options = BuildOptions(tiny_checkpoint, SCHEMES["int4-all"], "cpu", tmp_path / "b", samples=8)
    threshold = 0
    scheme, rows = choose_mixture(options, Budget(0.5))
    cheapest = next(row for row in rows if row.chosen)
    assert cheapest.bytes == min(row.bytes for row in rows if row.predicted is not None)
    threshold = cheapest.bytes + 2000
    scheme, rows = choose_mixture(options, Budget(0.5))
    chosen = next(row for row in rows if row.chosen)
    assert (
        chosen.bytes >= threshold
        and chosen.scheme == scheme
        and any(row.drop == 2.0 for row in rows)
    )
    assert {row.name for row in rows} >= {"int8", "int4-all"} and len(
        {linear.text() for linear in scheme.parts.values()}
    ) > 1
    built = build(
        BuildOptions(
            tiny_checkpoint, scheme, "cpu", tmp_path / "b", questions=0, notes={"auto": "kept"}
        )
    )
    assert built.verdict == "VERIFIED" and read_bundle(tmp_path / "b").provenance["auto"] == "kept"
    threshold = 1 << 40
    with pytest.raises(ParityError, match="no combination of precisions"):
        choose_mixture(options, Budget(0.5))


def test_budgets_are_checked() -> None:
    with pytest.raises(UsageError, match="caption, vqa"):
        Budget(metric="bleu")
    with pytest.raises(UsageError, match="max-drop"):
        Budget(-1)


def test_a_build_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path) -> None:
    def machine(available_mb: int) -> Path:
        root = tmp_path / str(available_mb)
        (root / "proc").mkdir(parents=True, exist_ok=True)
        (root / "proc" / "meminfo").write_text(
            f"MemTotal: {available_mb * 2000} kB\nMemAvailable: {available_mb * 1000} kB\n"
        )
        return root

    plan = make_plan(find_preset("7b").spec, find_scheme("int4"), DEVICES["rtx4090"])
    with pytest.raises(BuildError, match=r"needs about \d+ MB of memory, 102 MB are free.*--force"):
        check_room(plan, (tmp_path,), root=machine(100))
    assert "of memory (102 free)" in check_room(plan, (tmp_path,), True, machine(100))
    small = make_plan(find_preset("nano").spec, find_scheme("int8"), DEVICES["rtx4090"])
    said = check_room(small, (tmp_path / "not" / "there", tmp_path), root=machine(9000))
    assert said.count("MB of disk") == 1
    huge = replace(small, disk={"decoder": 10**18})
    with pytest.raises(BuildError, match=r"MB of disk at .*make room there"):
        check_room(huge, (tmp_path,), root=machine(9000))


def test_a_plan_never_promises_what_no_device_does() -> None:
    """A tiny model is bound by the starts of its kernels and by the runtime's own code."""
    spec = find_preset("nano").spec
    plan = make_plan(spec, find_scheme("fp16", "tensorrt"), DEVICES["orin-nano-8gb"])
    starts = 1e-3 * DEVICES["orin-nano-8gb"].kernel_us * 8 * spec.decoder.layers
    assert plan.latency["per_token_ms"] > starts
    assert plan.latency["tokens_per_second"] < 10_000
    assert plan.latency["first_token_ms"] > 0.3
