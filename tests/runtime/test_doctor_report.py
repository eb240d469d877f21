"""The doctor's questions to real libraries, which may crash, and its answers: text,
page, JSON, exit codes of the command.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.doctor import probes
from runtime.doctor.checks import diagnose
from runtime.doctor.facts import gather, this_interpreter
from runtime.doctor.probes import PROBES, Probe, Question, run_probe
from runtime.doctor.report import diagnosis_json, diagnosis_page, diagnosis_text
from tests.runtime.doctor_machines import GPU_ORT, rtx_desktop, write

ROOT = Path(__file__).parents[2]


def test_probes_survive_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {
        "abort": Question("", "import os; os.abort()"),
        "hang": Question("", "import time; time.sleep(60)"),
        "raise": Question(
            "json", "raise ImportError('libnvinfer.so.10: cannot open shared object file')"
        ),
        "noisy": Question(
            "",
            "import sys; print('hello'); print('\\x1b[31mloud', file=sys.stderr); found['a'] = 1",
        ),
        "none": Question("no_such_module", ""),
    }
    monkeypatch.setattr(probes, "PROBES", {**PROBES, **broken})
    assert run_probe("abort").error.startswith("ended by signal 6 (Aborted)")
    assert "0 s" in run_probe("hang", seconds=0.3).error
    assert (
        run_probe("raise").error == "ImportError: libnvinfer.so.10: cannot open shared object file"
    )
    noisy = run_probe("noisy")
    assert noisy.works and noisy.values == {"a": 1} and noisy.log == "loud"
    assert not run_probe("none").installed
    assert run_probe("onnxruntime").values["providers"]


def test_tensorrt_is_asked_for_its_version_its_library_and_its_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path, **{"tensorrt.py": "__version__ = '10.3.0'\nclass INetworkDefinition:\n    pass\n"}
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    assert run_probe("tensorrt", find=lambda name: True).values == {
        "version": "10.3.0",
        "fused": False,
    }


def test_reports_for_people_pages_and_programs(tmp_path: Path) -> None:
    facts = rtx_desktop(
        tmp_path,
        {"onnxruntime": "1", "onnxruntime-gpu": "2<3"},
        onnxruntime=GPU_ORT,
        cuda_provider=Probe(True, {"runs": True}),
    )
    diagnosis = diagnose(facts, ("cuda",))
    text = diagnosis_text(facts, diagnosis)
    assert (
        all(len(line) <= 110 for line in text.splitlines() if not line.strip().startswith("fix"))
        and "problem  one onnxruntime" in text
    )
    assert (
        text.index("for other targets:") > text.index("problem")
        and "cause" in text
        and "fix" in text
    )
    data = json.loads(diagnosis_json(facts, diagnosis))
    assert (
        data["ok"] is False
        and data["counts"]["problem"] == len(diagnosis.problems)
        and data["facts"]["access"]["driver"] == "570.124.06"
    )
    assert all(
        row["cause"] and row["fix"]
        for row in data["findings"]
        if row["level"] in ("warning", "problem")
    )
    page = diagnosis_page(facts, diagnosis)
    assert "2&lt;3" in page and 'class="problem"' in page and page.startswith("<!doctype html>")


def test_this_interpreter_and_this_machine() -> None:
    here = this_interpreter()
    assert here.version == f"{sys.version_info[0]}.{sys.version_info[1]}" and here.virtual == (
        sys.prefix != sys.base_prefix
    )
    facts = gather()
    assert (
        facts.memory.total_mb > facts.memory.available_mb > 0
        and facts.free_mb > 0
        and facts.probes["onnxruntime"].works
    )


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        heavy = ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors')
        if name.split('.')[0] in heavy:
            raise ImportError('blocked ' + name)
sys.meta_path.insert(0, Block())
from export.cli import main
main()
"""


def test_the_command_runs_with_the_base_dependencies_alone(tmp_path: Path) -> None:
    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BLOCKED, "doctor", *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    found = doctor("--target", "cpu", "--json", "--html", str(tmp_path / "doctor.html"))
    data = json.loads(found.stdout)
    assert found.returncode == 0 and data["ok"] and data["targets"] == ["cpu"], found.stderr
    assert "Doctor" in (tmp_path / "doctor.html").read_text()
    asked = doctor("--target", "abacus")
    assert asked.returncode == 2 and "cpu, cuda, tensorrt, rtx" in asked.stderr
    wanted = doctor("--target", "rtx")
    if wanted.returncode:  # everywhere but on a desktop with an RTX GPU
        assert (
            wanted.returncode == 1
            and wanted.stderr.startswith("error: ")
            and "fix" in wanted.stdout
            and wanted.stderr.count("\n") == 1
        )
