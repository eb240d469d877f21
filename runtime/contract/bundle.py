"""The bundle: a folder with `manifest.json`, graphs, weights, token embeddings,
tokenizer and goldens. The manifest lists every file with its size and hash.

`read_bundle` checks names, kinds and sizes before anything is allocated. `verify`
hashes every file and rejects graphs that refer to data outside the bundle, before an
ONNX parser reads them. `verify_once` runs this full check when a bundle is first used
on a machine and stores a mark for these files; later loads only look for the mark.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from runtime.contract.errors import BundleError, SpecError
from runtime.contract.files import sha256_file
from runtime.contract.onnx_guard import external_locations
from runtime.contract.spec import ModelSpec

__all__ = [
    "CAPACITY",
    "DECODER",
    "DECODER_FUSED",
    "EMBEDDINGS",
    "FORMAT",
    "GOLDENS",
    "MANIFEST",
    "PREFILL",
    "ROW_INDEPENDENT",
    "SATURATION_SAFE",
    "TOKENIZER",
    "VERSION",
    "VISION",
    "VISION_FUSED",
    "Bundle",
    "cache_folder",
    "graph_file",
    "read_bundle",
    "verdict_text",
    "weights_file",
]

FORMAT, VERSION = "infmllm-bundle", 1
MANIFEST = "manifest.json"
VISION, DECODER, EMBEDDINGS, TOKENIZER, GOLDENS = (
    "vision.onnx",
    "decoder.onnx",
    "embeddings.npy",
    "tokenizer.json",
    "goldens.npz",
)
PREFILL = "prefill.onnx"  # optional: a second decoder graph for calls of more than one token
# tensorrt target: the same graphs over the same weights, with operators of newer TensorRT only.
VISION_FUSED, DECODER_FUSED = "vision-fused.onnx", "decoder-fused.onnx"
GRAPHS = (VISION, DECODER, PREFILL, VISION_FUSED, DECODER_FUSED)
REQUIRED = (VISION, DECODER, EMBEDDINGS, TOKENIZER, GOLDENS)
VERIFIED, UNVERIFIED = "VERIFIED", "UNVERIFIED"
# Keys of `schemes` that tell the engine how it may run a bundle, with the value "true" or
# "false". Bundles of early builds lack them, or have the older keys and values beside them.
ROW_INDEPENDENT = "row_independent"  # a decoder row does not depend on the call's other rows
SATURATION_SAFE = "saturation_safe"  # two 8-bit products always add up within 16 bits
_OLDER = {ROW_INDEPENDENT: ("rows", "alone"), SATURATION_SAFE: ("products", "fit 16 bits")}
CAPACITY = "capacity"  # fixed cache length of the graphs in rows, as decimal text

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_MANIFEST = 4 << 20
_MAX_FILES = 1000
_FIELDS = {"format", "version", "spec", "target", "schemes", "files", "provenance", "parity"}


def verdict_text(verdict: str, not_asked: str) -> str:
    """Returns a verdict as shown to people; `not_asked` is why answers were not compared."""
    if verdict != VERIFIED or not not_asked:
        return verdict
    return f"{VERIFIED}, answers not asked ({not_asked})"


def graph_file(graph: str) -> str:
    """Returns the file name of a graph such as "vision" or "decoder"."""
    return f"{graph}.onnx"


def weights_file(graph: str) -> str:
    """Returns the file name of a graph's weights, for graphs that have their own."""
    return f"{graph}.weights"


@dataclass(frozen=True)
class Bundle:
    """A parsed manifest. `files` maps plain file names to (bytes, SHA-256). `parity`
    holds the parity verdict and the measured errors. `identity` is the SHA-256 of the
    manifest's bytes as they were parsed; it covers every listed file, because the manifest
    holds their hashes.
    """

    path: Path
    spec: ModelSpec
    target: str
    schemes: Mapping[str, str]
    files: Mapping[str, tuple[int, str]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""

    def file(self, name: str) -> Path:
        """Returns the path of a listed file; raises `BundleError` if it is not listed."""
        if name not in self.files:
            raise BundleError(f"{self.path / MANIFEST} does not list {name}; re-export the bundle")
        return self.path / name

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the graph files."""
        return tuple(name for name in GRAPHS if name in self.files)

    @property
    def capacity(self) -> int:
        """The longest key/value cache, in rows, that the graphs support. Raises
        `BundleError` if the manifest's value is invalid.
        """
        text, most = self.schemes.get(CAPACITY), self.spec.decoder.context
        if text is None:
            return most
        if not (text.isascii() and text.isdigit() and len(text) <= 9 and 0 < int(text) <= most):
            raise BundleError(
                f"{self.path / MANIFEST}: capacity is {text!r:.20}, expected 1 to {most}; "
                f"re-export the bundle"
            )
        return int(text)

    @property
    def row_independent(self) -> bool:
        """True if a row of the decoder does not depend on the other rows of the same
        call beyond float rounding, which speculative decoding needs.
        """
        return self._flag(ROW_INDEPENDENT)

    @property
    def saturation_safe(self) -> bool:
        """True if the 8-bit weights cannot saturate the 16-bit sums of x86 CPUs without
        VNNI, so that the fast kernels are exact.
        """
        return self._flag(SATURATION_SAFE)

    def _flag(self, name: str) -> bool:
        key, value = _OLDER[name]
        return self.schemes.get(name) == "true" or self.schemes.get(key) == value

    @property
    def verdict(self) -> str:
        """The parity verdict: "VERIFIED" if the build showed that the graphs match
        PyTorch, else "UNVERIFIED".
        """
        return VERIFIED if self.parity.get("verdict") == VERIFIED else UNVERIFIED

    @property
    def verdict_text(self) -> str:
        """The verdict with what was not checked, such as "VERIFIED, answers not asked
        (--questions is 0)".
        """
        return verdict_text(self.verdict, str(self.parity.get("metrics", {}).get("skipped", "")))

    @property
    def tolerance(self) -> Mapping[str, float]:
        """The tolerance of each parity stage. It is empty if the build stored none, and
        then no stage passes.
        """
        tolerance: Mapping[str, float] = self.parity.get("tolerance", {})
        return tolerance

    def stamp(self) -> str:
        """Returns a text that changes if any file of the bundle is replaced or written to:
        the identity, and each file's inode, size and times. Raises `BundleError` if the
        folder is no longer the bundle that was parsed.
        """
        changed = f"{self.path} changed while it was opened; open it again"
        try:
            if sha256_file(self.path / MANIFEST) != self.identity:
                raise BundleError(changed)
            lines = []
            for name in sorted(self.files):
                info = (self.path / name).stat()
                lines.append(
                    f"{name}:{info.st_dev}:{info.st_ino}:{info.st_size}:"
                    f"{info.st_mtime_ns}:{info.st_ctime_ns}"
                )
        except OSError:
            raise BundleError(changed) from None
        return "\n".join([self.identity, *lines])

    def check_unchanged(self, stamp: str) -> None:
        """Raises `BundleError` if the folder is not as it was when `stamp` was taken, so
        that files of two bundles cannot be mixed.
        """
        if self.stamp() != stamp:
            raise BundleError(f"{self.path} changed while it was opened; open it again")

    def verify(self) -> None:
        """Hashes every file and checks that graphs refer to no data outside the bundle.
        Raises `BundleError` that names the first file that fails.
        """
        for name, (_, expected) in self.files.items():
            found = sha256_file(self.path / name)
            if found != expected:
                raise BundleError(
                    f"{self.path / name} has sha256 {found[:12]}…, manifest says "
                    f"{expected[:12]}…; re-export or copy the bundle again"
                )
        for graph in self.graphs:
            outside = external_locations(self.path / graph) - set(self.files)
            if outside:
                raise BundleError(
                    f"{self.path / graph} refers to data outside the bundle: "
                    f"{min(outside)!r:.80}; do not use this bundle"
                )

    def verify_once(self) -> None:
        """Runs `verify`, unless exactly these files (same inode, size and times) have
        already passed on this machine.
        """
        marks = cache_folder() / "verified"
        mark = marks / hashlib.sha256(self.stamp().encode()).hexdigest()
        if _is_file(mark):
            return
        self.verify()
        try:
            marks.mkdir(parents=True, exist_ok=True)
            for old in sorted(marks.iterdir(), key=lambda path: path.stat().st_mtime)[:-_MAX_MARKS]:
                old.unlink(missing_ok=True)
            mark.touch()
        except OSError:
            pass  # without a writable cache folder every load repeats the full check


_MAX_MARKS = 256


def cache_folder() -> Path:
    """Returns the folder for files that can be regenerated: $INFMLLM_CACHE, else
    `infmllm` in the user's cache folder.
    """
    return Path(
        os.environ.get("INFMLLM_CACHE")
        or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infmllm"
    )


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads and checks a bundle's manifest, and checks that its files exist and have
    the right kind and size. Raises `BundleError`.
    """
    folder = Path(path)
    manifest = folder / MANIFEST
    if not _is_file(manifest):
        raise BundleError(
            f"no bundle at {folder} ({MANIFEST} not found); build one with: infmllm-export build "
            f"-o {folder}"
        )
    if manifest.stat().st_size > _MAX_MANIFEST:
        raise BundleError(
            f"{manifest} is larger than {_MAX_MANIFEST} bytes, so it is not a bundle manifest"
        )
    try:
        content = manifest.read_bytes()
        data = json.loads(content)
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{manifest} cannot be read as JSON ({error}); re-export the bundle"
        ) from None
    bundle = replace(_parse(folder, data), identity=hashlib.sha256(content).hexdigest())
    _check_files(bundle)
    return bundle


def _is_file(path: Path) -> bool:
    """Checks for a regular file; returns False also if the system rejects the path (too
    long or forbidden).
    """
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _expect(ok: bool, manifest: Path, message: str) -> None:
    if not ok:
        raise BundleError(f"{manifest}: {message}; re-export the bundle")


def _parse(folder: Path, data: Any) -> Bundle:
    manifest = folder / MANIFEST
    _expect(
        isinstance(data, dict) and data.get("format") == FORMAT,
        manifest,
        f'"format" is not "{FORMAT}"',
    )
    _expect(
        type(data.get("version")) is int and data["version"] == VERSION,
        manifest,
        f"format version is {data.get('version')!r:.20}, this runtime reads {VERSION}",
    )
    _expect(
        set(data) == _FIELDS,
        manifest,
        f"fields are missing or unknown: {sorted(set(data) ^ _FIELDS)!s:.200}",
    )
    try:
        spec = ModelSpec.from_json(data["spec"])
    except SpecError as error:
        raise BundleError(f"{manifest}: {error}; re-export the bundle") from None
    _expect(isinstance(data["target"], str), manifest, "target is not a string")
    for name in ("schemes", "files", "provenance", "parity"):
        _expect(isinstance(data[name], dict), manifest, f"{name} is not an object")
    _expect(
        all(isinstance(v, str) for v in data["schemes"].values()),
        manifest,
        "a scheme is not a string",
    )
    tolerance = data["parity"].get("tolerance", {})
    _expect(
        isinstance(tolerance, dict) and all(type(v) in (int, float) for v in tolerance.values()),
        manifest,
        "a parity tolerance is not a number",
    )
    _expect(len(data["files"]) <= _MAX_FILES, manifest, f"lists more than {_MAX_FILES} files")
    files: dict[str, tuple[int, str]] = {}
    for name, entry in data["files"].items():
        _expect(
            bool(_NAME.fullmatch(name)) and name != MANIFEST,
            manifest,
            f"{name!r:.80} is not a plain file name inside the bundle",
        )
        size, digest = (
            (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        )
        if (
            type(size) is int
            and size >= 0
            and isinstance(digest, str)
            and _DIGEST.fullmatch(digest)
        ):
            files[name] = (size, digest)
        _expect(name in files, manifest, f"{name} lacks a byte count or a SHA-256 of 64 hex digits")
    missing = [name for name in REQUIRED if name not in files]
    _expect(not missing, manifest, f"lacks {', '.join(missing)}")
    return Bundle(
        folder, spec, data["target"], data["schemes"], files, data["provenance"], data["parity"]
    )


def _check_files(bundle: Bundle) -> None:
    for name, (size, _) in bundle.files.items():
        path = bundle.path / name
        try:
            info = path.lstat()
        except OSError:
            raise BundleError(f"{path} is missing; re-export or copy the bundle again") from None
        if not stat.S_ISREG(info.st_mode) or info.st_nlink > 1:
            raise BundleError(
                f"{path} is a link or not a regular file; a bundle may contain only regular "
                f"files, copy it again"
            )
        if info.st_size != size:
            raise BundleError(
                f"{path} has {info.st_size} bytes, manifest says {size}; re-export or copy the "
                f"bundle again"
            )


DEFAULT_BUNDLE = "infmllm-bundle"


def default_bundle() -> Path:
    """`$INFMLLM_BUNDLE`, else ./infmllm-bundle."""
    return Path(os.environ.get("INFMLLM_BUNDLE") or DEFAULT_BUNDLE)
