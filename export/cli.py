"""`infmllm-export`: build a bundle from a checkpoint, compare one with PyTorch, look inside one."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from runtime.cli import default_bundle
from runtime.contract.console import command_app, note, run_command

__all__ = ["main"]

app = command_app("Compile InfMLLM checkpoints into verified bundles.")


@app.command(
    epilog="Example:\n\n    infmllm-export build --precision int8"
    "\n\n    infmllm-export build checkpoints/mine --precision fp16 --calib val.jsonl -o mine.bundle"
)
def build(
    checkpoint: Annotated[Path | None, typer.Argument(help="Checkpoint folder. Default: the demo checkpoint.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or int8.")] = "int8",
    target: Annotated[str, typer.Option(help="Where the bundle runs: cpu.")] = "cpu",
    out: Annotated[Path, typer.Option("--out", "-o", help="Bundle folder to write.")] = Path("infmllm-bundle"),
    calib: Annotated[str, typer.Option(help="Data the parity cases come from, as infmllm-eval takes them. Default: synthetic scenes.")] = "",
    dump: Annotated[Path | None, typer.Option(help="Write each graph after every step to this folder.")] = None,
    allow_unverified: Annotated[bool, typer.Option("--allow-unverified", help="Keep a bundle that fails parity, marked UNVERIFIED.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Captures, simplifies, lowers, quantises and packs a checkpoint, and proves the result equal to PyTorch."""
    from export.pipeline import STEPS, BuildOptions, build
    from export.schemes import find_scheme
    from trainer.checkpoint import DEMO

    started, done = time.monotonic(), 0

    def progress(step: str) -> None:
        nonlocal done
        done += 1
        note(f"[{done}/{len(STEPS)}] {step} ({time.monotonic() - started:.0f} s)")

    result = build(BuildOptions(checkpoint or DEMO, find_scheme(precision), target, out, dump, allow_unverified, calib), progress)
    if as_json:
        stages = [asdict(stage) for stage in result.stages]
        print(json.dumps({"bundle": str(out), "verdict": result.verdict, "stages": stages, "seconds": round(time.monotonic() - started, 1)}))
        return
    for graph, step, outcome in result.counts:
        note(f"  {graph:8} {step:22} changed {outcome.modified}" + "".join(f"; {reason}" for reason in outcome.refused))
    _print_stages(result.stages)
    print(f"{result.verdict}: {out} ({sum(f.stat().st_size for f in out.iterdir()) / 1e6:.1f} MB)")


@app.command(epilog="Example:\n\n    infmllm-export parity infmllm-bundle")
def parity(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder. Default: $INFMLLM_BUNDLE, then ./infmllm-bundle.")] = None,
    checkpoint: Annotated[Path | None, typer.Argument(help="Its checkpoint. Default: the demo checkpoint.")] = None,
    cases: Annotated[int, typer.Option(min=1, help="How many fresh cases PyTorch computes.")] = 8,
    calib: Annotated[str, typer.Option(help="Data the cases come from. Default: synthetic scenes.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print figures as JSON.")] = False,
) -> None:
    """Compares a bundle with its PyTorch checkpoint on fresh inputs; exit code 1 if it drifts."""
    from export.verify import compare_with_checkpoint
    from runtime.contract.errors import ParityError
    from runtime.contract.evaluation import open_examples
    from runtime.session import load
    from trainer.checkpoint import DEMO, load_checkpoint

    session = load(bundle or default_bundle())
    stages = compare_with_checkpoint(session, load_checkpoint(checkpoint or DEMO), cases, open_examples(calib, skip_bad=True) if calib else ())
    if as_json:
        print(json.dumps([asdict(stage) | {"passed": stage.passed} for stage in stages]))
    else:
        _print_stages(stages)
    failed = [stage.stage for stage in stages if not stage.passed]
    if failed:
        raise ParityError(f"{', '.join(failed)} out of tolerance; rebuild the bundle from this checkpoint")


@app.command(epilog="Example:\n\n    infmllm-export inspect infmllm-bundle --json")
def inspect(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder. Default: $INFMLLM_BUNDLE, then ./infmllm-bundle.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Hash every file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Shows operators, parameters, bytes, schemes, parity and what passes changed or refused."""
    from export.inspect import describe_bundle, format_description
    from runtime.contract.bundle import read_bundle

    opened = read_bundle(bundle or default_bundle())
    opened.verify() if verify else opened.verify_once()
    description = describe_bundle(opened)
    print(json.dumps(description) if as_json else format_description(description))


@app.command(
    "import",
    epilog="Examples:\n\n    infmllm-export import InfMLLM_7B.pth --tokenizer vicuna-7b-v1.5 -o checkpoints/infmllm-7b"
    "\n\n    infmllm-export import vicuna-7b-v1.5 --vision blip2-vision --image-size 448 -o checkpoints/start",
)
def import_(
    source: Annotated[Path, typer.Argument(help="Raw InfMLLM file (.pth, .bin, .safetensors), or a LLaMA folder in Hugging Face layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Checkpoint folder to write.")],
    vision: Annotated[Path | None, typer.Option(help="Vision tower: raw BLIP-2/EVA file or a Hugging Face BLIP-2 folder.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Folder or file with tokenizer.json. Default: beside the source.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of the square picture; positions are resized. Default: the tower's.")] = None,
    image_mode: Annotated[str, typer.Option(help="stretch (multitask models) or pad (chat models).")] = "stretch",
    vision_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of a raw tower that is not EVA ViT-g.")] = None,
    decoder_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads of a raw decoder whose head is not 128 wide.")] = None,
    dtype: Annotated[str, typer.Option(help="fp16, bf16 or fp32.")] = "fp16",
) -> None:
    """Turns published or Hugging Face weights into a checkpoint, strictly and tensor by tensor."""
    from trainer.imports.convert import ImportOptions, import_checkpoint

    options = ImportOptions(source, out, vision, tokenizer, image_size, vision_heads, decoder_heads, image_mode, dtype)
    spec, new = import_checkpoint(options)
    if new:
        parts = ", ".join(sorted({name.rsplit(".", 2)[0] for name in new}))
        note(f"new, because the source has none: {parts}; train it: infmllm-train --start-from {out} --stage alignment")
    tower, decoder = spec.vision, spec.decoder
    print(f"{out}: tower {tower.layers} x {tower.width}, decoder {decoder.layers} x {decoder.hidden}, S = {tower.image_size}")


def _print_stages(stages: object) -> None:
    for stage in stages:  # type: ignore[attr-defined]
        agreement = f", same token {100 * stage.agreement:.0f} %" if stage.agreement is not None else ""
        verdict = "ok" if stage.passed else "FAILED"
        print(f"parity {stage.stage:8} {stage.error:.3g} of {stage.tolerance:.3g} allowed{agreement}  {verdict}", file=sys.stderr)


def main() -> None:
    """Entry point of `infmllm-export`."""
    run_command(app)
