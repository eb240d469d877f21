"""Pascal VOC folders (`Annotations/*.xml`, `JPEGImages`, `ImageSets/Main/SPLIT.txt`) as
captions, counting, presence and grounding.

Options: `split` (default train), `scene` (how a caption begins, default "a picture")
and `names`. The latter is a JSON file that maps class names to plain words, either one
word or [singular, plural]: {"WBC": ["white blood cell", "white blood cells"]}. XML is
parsed without entities or network access.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from runtime.contract.boxes import Box, check_inside
from runtime.contract.errors import DataError
from runtime.contract.image import image_size, to_square
from runtime.contract.spec import ModelSpec
from runtime.data.bad_rows import Faults
from runtime.data.data_argument import DataSource
from runtime.data.sample import Example, Sample
from trainer.datasets.augment import Augmentation
from trainer.datasets.detection import (
    MANY,
    ClassName,
    Thing,
    dense_labels,
    detection_samples,
    visible,
)
from trainer.datasets.draw import PictureCache, Retries
from trainer.datasets.files import picture, read_json

__all__ = ["VocSource", "listing", "open_source", "read"]

_MAX_XML = 4 << 20


@dataclass(frozen=True)
class _Picture:
    path: Path
    things: tuple[tuple[str, Box], ...]
    width: int
    height: int


def _number(node: ElementTree.Element, tag: str) -> float:
    text = node.findtext(tag)
    try:
        return float(text or "")
    except ValueError:
        raise ValueError(f"<{tag}> is {text!r:.20}, expected a number") from None


def _annotation(root: Path, name: str, faults: Faults) -> _Picture:
    path = root / "Annotations" / f"{name}.xml"
    data = path.read_bytes()
    if len(data) > _MAX_XML or b"<!ENTITY" in data:
        raise ValueError(
            f"{path} is not a VOC annotation (it is too large, or it declares XML entities)"
        )
    try:
        tree = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not valid XML ({error})") from None
    size = tree.find("size")
    if size is None:
        raise ValueError(f"{path} has no <size>")
    width, height = int(_number(size, "width")), int(_number(size, "height"))
    things = []
    for index, node in enumerate(tree.findall("object")):
        with faults.row(f"{path}: object {index}"):
            corners = node.find("bndbox")
            label = (node.findtext("name") or "").strip()
            if corners is None or not label:
                raise ValueError("an object lacks its <name> or <bndbox>")
            x1, y1, x2, y2 = (_number(corners, tag) for tag in ("xmin", "ymin", "xmax", "ymax"))
            check_inside((x1, y1, x2, y2), width, height, f"box {[x1, y1, x2, y2]} of {label}")
            things.append((label, (x1, y1, x2, y2)))
    shown = picture(
        root / "JPEGImages", Path((tree.findtext("filename") or "").strip() or f"{name}.jpg").name
    )
    if image_size(shown) != (width, height):
        raise ValueError(
            f"{shown} is {'x'.join(map(str, image_size(shown)))}, its annotation says "
            f"{width}x{height}"
        )
    return _Picture(shown, tuple(things), width, height)


@dataclass(frozen=True)
class _Data:
    pictures: list[tuple[Path, list[Thing], int, int]]
    names: list[ClassName]
    scene: str


def listing(source: DataSource) -> Path:
    """Returns the file that lists a split's images."""
    return source.path / "ImageSets" / "Main" / f"{source.options.get('split', 'train')}.txt"


def _load(source: DataSource, faults: Faults) -> _Data:
    file = listing(source)
    if not file.is_file():
        found = ", ".join(sorted(p.stem for p in file.parent.glob("*.txt"))) or "none"
        raise DataError(f"{file} does not exist; choose one of the splits found: {found}")
    pictures: list[_Picture] = []
    for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
        if line.strip():
            with faults.row(f"{file}:{number}"):
                pictures.append(_annotation(source.path, line.split()[0], faults))
    if not pictures:
        raise DataError(f"{file} lists no usable image; check the file and its images")
    labels = sorted({label for shown in pictures for label, _ in shown.things})
    names = _names(source, labels)
    index = {label: i for i, label in enumerate(names)}
    rows = [
        (p.path, [Thing(index[label], box) for label, box in p.things], p.width, p.height)
        for p in pictures
    ]
    return _Data(rows, list(names.values()), source.options.get("scene", "a picture"))


def _names(source: DataSource, labels: list[str]) -> dict[str, ClassName]:
    """Returns the names of all classes: those of the `names` file in its order, else
    the labels themselves.
    """
    given = (
        read_json(Path(source.options["names"]))
        if "names" in source.options
        else {label: label.lower().replace("_", " ") for label in labels}
    )
    if not isinstance(given, dict):
        raise DataError(
            f"{source.options['names']} is not a JSON object that maps class names to words"
        )
    missing = sorted(set(labels) - set(given))
    if missing:
        raise DataError(
            f"{source.options['names']} has no words for class {missing[0]!r}; classes of the "
            f"data: {', '.join(labels)}"
        )
    names = {}
    for label, words in given.items():
        pair = (
            [words, words if words.endswith("s") else f"{words}s"]
            if isinstance(words, str)
            else words
        )
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(word, str) and word.strip() for word in pair)
        ):
            raise DataError(
                f"{source.options['names']}: {label!r} is {words!r:.60}, expected a word or "
                f"[singular, plural]"
            )
        names[label] = ClassName(*pair)
    return names


def read(source: DataSource, faults: Faults) -> list[Example]:
    """Reads one example per image with all its questions. Raises `DataError`."""
    data = _load(source, faults)
    return [
        Example(
            path,
            tuple(detection_samples(visible(things, width, height), data.names, data.scene)),
            name=path.stem,
        )
        for path, things, width, height in data.pictures
    ]


class VocSource:
    """Draws augmented images with per-patch labels. Their sentences are written after
    the augmentation.
    """

    def __init__(self, data: _Data, augment: Augmentation, skip_bad: bool = False) -> None:
        self._data, self._augment, self._retries = data, augment, Retries(skip_bad)
        self._pictures = PictureCache()
        self.dense_classes: tuple[int, ...] = (len(data.names) + 1,)
        self.dense_names = tuple(name.one for name in data.names)

    def draw(self, rng: np.random.Generator, chat: bool, spec: ModelSpec) -> Example:
        """See `ExampleSource.draw`; this source has no conversations."""
        path, things, image = self._open(rng)
        image, boxes = self._augment.move(image, [thing.box for thing in things], rng, None)
        shown = visible(
            [Thing(thing.label, box) for thing, box in zip(things, boxes, strict=True)], *image.size
        )
        square = self._augment.finish(to_square(image, spec), rng)
        samples = tuple(detection_samples(shown, self._data.names, self._data.scene))
        return Example(square, samples, name=path.stem, dense=dense_labels(shown, spec.vision.grid))

    def _open(self, rng: np.random.Generator) -> tuple[Path, list[Thing], Image.Image]:
        """Opens a random image. If bad rows are skipped, draws again when an image
        cannot be read.
        """

        def attempt() -> tuple[Path, list[Thing], Image.Image]:
            path, things, _, _ = self._data.pictures[int(rng.integers(len(self._data.pictures)))]
            return path, things, self._pictures.open(path)

        return self._retries.until_usable(attempt)

    def texts(self) -> list[str]:
        """See `ExampleSource.texts`."""
        everything = [Thing(label, (0.0, 0.0, 1.0, 1.0)) for label in range(len(self._data.names))]
        samples: list[Sample] = []
        for copies in (1, 2, MANY):
            samples += detection_samples(everything * copies, self._data.names, self._data.scene)
        return [text for sample in samples for text in (sample.text, sample.answer)]


def open_source(source: DataSource, faults: Faults, augment: Augmentation) -> VocSource:
    """Opens the training source. Raises `DataError`."""
    return VocSource(_load(source, faults), augment, faults.skip)
