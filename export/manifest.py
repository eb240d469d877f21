"""Writes the manifest of a build: what the bundle was made from, how it compares with
PyTorch, and what the plan predicted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from calibration.samples import set_card
from export.parity.finding import Finding
from export.parity.references import MetricCheck, verdict_json
from export.planning.devices import DEVICES
from export.planning.plan import MIB, Plan, make_plan
from export.state import Build, tools
from export.targets import find_lowering
from runtime.contract.bundle import (
    CAPACITY,
    FORMAT,
    MANIFEST,
    ROW_INDEPENDENT,
    SATURATION_SAFE,
    VERIFIED,
    VERSION,
    read_bundle,
)
from runtime.contract.errors import BundleError
from runtime.contract.files import sha256_file
from runtime.contract.spec import ModelSpec
from runtime.parity import StageError

__all__ = ["existing", "plan_of", "write", "write_manifest"]

_ANY_DEVICE = DEVICES["rtx4090"]  # disk and memory of a build do not depend on the device


def existing(build: Build) -> Build | None:
    """Returns the build with the results of the bundle already at the output path, or
    None if that bundle cannot be kept.

    The bundle must be intact and have the same build key. It must be verified unless
    unverified bundles are allowed. A build with `dump` is never reused.
    """
    try:
        bundle = read_bundle(build.options.out)
        same = bundle.provenance.get("build_key") == build.key and not build.options.dump
        if not same or (bundle.verdict != VERIFIED and not build.options.allow_unverified):
            return None
        bundle.verify()
    except BundleError:
        return None
    stages = tuple(StageError(**row) for row in bundle.parity["stages"])
    return replace(
        build,
        findings=tuple(Finding.from_json(row) for row in bundle.parity.get("proof", ())),
        stages=stages,
        metrics=MetricCheck.from_json(bundle.parity.get("metrics", {})),
        verdict=bundle.verdict,
        reused=True,
    )


def write(build: Build) -> None:
    """Writes the manifest into the build's folder, with the results the build has so
    far.
    """
    (build.folder / MANIFEST).unlink(missing_ok=True)
    scheme, tolerance = build.options.scheme, dict(build.options.scheme.tolerance)
    passes = [
        {"graph": g, "pass": p, "modified": r.modified, "refused": list(r.refused)}
        for g, p, r in build.counts
    ]
    provenance: dict[str, Any] = {
        "checkpoint": build.checkpoint.path.name,
        "checkpoint_sha256": build.checkpoint.sha256,
        "build_key": build.key,
    }
    provenance |= {
        "goldens": set_card(build.source, build.goldens),
        "calibration": set_card(build.source, build.cases) if build.cases else None,
        "disjoint": not build.overlap,
    }
    provenance["linears"] = {
        prefix or "rest": linear.text() for prefix, linear in scheme.parts.items()
    }
    if scheme.prefill is not None:
        provenance["linears_prefill"] = {
            prefix or "rest": linear.text() for prefix, linear in scheme.prefill.items()
        }
    if build.cases and build.calibrated:
        provenance["smoothing"] = {
            name: round(value, 3) for name, value in build.calibrated.strengths().items()
        }
    schemes = {
        "vision": scheme.name,
        "decoder": scheme.name,
        "embeddings": scheme.embeddings,
        "cache": scheme.cache,
        ROW_INDEPENDENT: str(scheme.row_independent).lower(),
    }
    lowering = find_lowering(build.options.target)
    if lowering.saturation_safe:
        schemes[SATURATION_SAFE] = "true"
    if any(plan.fixed for plan in lowering.graphs.values()):
        schemes[CAPACITY] = str(build.options.context or build.checkpoint.spec.decoder.context)
    provenance |= {"tools": tools(), "passes": passes, "steps": build.costs, **build.options.notes}
    provenance["plan"] = _predict(build)
    write_manifest(
        build.folder,
        build.checkpoint.spec,
        build.options.target,
        schemes,
        provenance,
        verdict_json(build.verdict, build.findings, build.stages, build.metrics, tolerance),
    )


def plan_of(build: Build) -> Plan:
    """Returns the plan of a build, which predicts its disk and memory."""
    return make_plan(
        build.checkpoint.spec,
        build.options.scheme,
        _ANY_DEVICE,
        samples=len(build.cases),
        questions=build.options.questions > 0,
    )


def _predict(build: Build) -> dict[str, Any]:
    """Returns the plan's predictions next to the actual values: bytes on disk (without
    the manifest) and peak memory of the process.
    """
    plan = plan_of(build)
    actual = sum(file.stat().st_size for file in build.folder.iterdir())
    peak = max((row["peak_mib"] for row in build.costs.values()), default=0.0)
    return {
        "disk": plan.disk_bytes,
        "disk_actual": actual,
        "build_peak_mib": round(plan.build_peak / MIB),
        "build_peak_mib_actual": peak,
    }


def write_manifest(
    folder: Path,
    spec: ModelSpec,
    target: str,
    schemes: Mapping[str, str],
    provenance: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> None:
    """Hashes every file in `folder`, then writes `manifest.json` and flushes it to
    disk.
    """
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in names
    }
    data = {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.to_json(),
        "target": target,
        "schemes": dict(schemes),
        "files": files,
        "provenance": dict(provenance),
        "parity": dict(parity),
    }
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps(data, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
