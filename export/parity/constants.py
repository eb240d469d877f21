"""Compares what surrounds a bundle's graphs with the checkpoint and with the published
model: the specification, the tokenizer, the token embeddings, the prompts, the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from export.parity.float_view import FloatView
from runtime.contract.bundle import TOKENIZER, Bundle
from runtime.contract.image import to_pixels
from runtime.contract.pooling import pool_matrix
from runtime.contract.prompt import Message, render, render_chat
from runtime.contract.spec import ModelSpec
from runtime.contract.tokenizer import Tokenizer
from runtime.generation.token_embeddings import open_token_embeddings
from trainer.checkpoint import StoredCheckpoint

__all__ = ["constant_faults", "flag_faults"]

_LEVELS = 1.0  # mean difference of resized pixels, in levels of 255
_ROWS = 4096  # token embeddings compared at once

# Written out again, and not imported: these are the published texts and numbers, so a change of
# the runtime's own cannot pass unnoticed.
_PROMPTS = {
    "caption": ("describe", "<image>", "describe"),
    "vqa": ("What (is) it?", "<image>", "Question:what is it? Short answer:"),
    "ground": ("red circle", "<image>", "<ref>red circle</ref>"),
}
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions. USER: "
)
_TURNS = ("Hello.", "Hi there.", "Bye.")
_CHAT = ("\nHello. ASSISTANT: Hi there.", "USER: Bye. ASSISTANT:")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def constant_faults(bundle: Bundle, checkpoint: StoredCheckpoint) -> list[str]:
    """Returns what differs from the checkpoint or from the published constants."""
    spec = checkpoint.spec
    faults = []
    if bundle.spec != spec:
        faults.append("manifest.json: the specification is not the checkpoint's")
    if bundle.file(TOKENIZER).read_bytes() != (checkpoint.path / TOKENIZER).read_bytes():
        faults.append(f"{TOKENIZER} is not the checkpoint's")
    table = open_token_embeddings(bundle)
    expected = checkpoint.read("decoder.embed_tokens.weight").numpy()
    faults += _table_faults(table, expected)
    faults += _prompt_faults(checkpoint.tokenizer, Tokenizer.load(bundle.file(TOKENIZER), spec))
    faults += _picture_faults(spec)
    return faults


def _table_faults(table: NDArray[np.floating], expected: NDArray[np.float32]) -> Iterator[str]:
    if table.shape != expected.shape:
        yield f"embeddings.npy has shape {list(table.shape)}, expected {list(expected.shape)}"
        return
    for start in range(0, len(table), _ROWS):
        rows = slice(start, start + _ROWS)
        wrong = (table[rows] != expected[rows].astype(table.dtype)).any(axis=1)
        if wrong.any():
            yield f"embeddings.npy: row {start + int(wrong.argmax())} is not the checkpoint's"
            return


def _prompt_faults(reference: Tokenizer, found: Tokenizer) -> Iterator[str]:
    for task, (text, before, after) in _PROMPTS.items():
        prompt = render(task, text)
        if (prompt.before, prompt.after) != (before, after):
            yield f"the prompt of {task} is not the published one"
        ids = ([reference.bos_id, *reference.encode(before)], reference.encode(prompt.after))
        if found.encode_prompt(prompt) != ids:
            yield f"the prompt of {task} has other token ids than the checkpoint's tokenizer gives"
    roles = ("user", "assistant", "user")
    chat = render_chat([Message(*turn) for turn in zip(roles, _TURNS, strict=True)])
    if (chat.before, chat.after, *chat.turns) != (_SYSTEM, *_CHAT):
        yield "the prompt of chat is not the published one"
    first, second = map(reference.encode, _CHAT)
    if found.encode_prompt(chat)[1] != [*first, reference.eos_id, *second]:
        yield "the prompt of chat has other token ids than the checkpoint's tokenizer gives"


def _picture_faults(spec: ModelSpec) -> Iterator[str]:
    size = spec.vision.image_size
    rng = np.random.default_rng(7)
    picture = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    mean, std = (np.array(values)[None, :, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
    expected = (picture.transpose(2, 0, 1)[None] / 255.0 - mean) / std
    if np.abs(to_pixels(Image.fromarray(picture), spec) - expected).max() > 1e-5:
        yield "pixels are not normalised as CLIP's are"
    wide = np.full((size, 2 * size, 3), 255, np.uint8)
    wide[:, size // 2 : -size // 2] = 0
    found = to_pixels(Image.fromarray(wide), spec)[0, 0]
    edge, middle = found[size // 2, size // 8], found[size // 2, size // 2]
    white, black = ((value - _CLIP_MEAN[0]) / _CLIP_STD[0] for value in (1.0, 0.0))
    if abs(edge - white) > 1e-4 or abs(middle - black) > 1e-4:
        yield "an image that is not square is fitted in another way"
    if _resizing_differs(spec, size):
        yield "an image of another size is resized with another filter"
    grid = spec.vision.grid
    for p in spec.pool_sizes:
        cells = np.arange(grid * grid, dtype=np.float64).reshape(grid, grid)
        side = grid // p
        averages = cells.reshape(p, side, p, side).mean((1, 3)).reshape(-1)
        if np.abs(pool_matrix(grid, p) @ cells.reshape(-1) - averages).max() > 1e-3:
            yield f"the pooling to {p} x {p} does not average its cells"


def _resizing_differs(spec: ModelSpec, size: int) -> bool:
    """Compares the resizing with PyTorch's antialiased bicubic filter, to a few levels."""
    side = size + size // 2
    noise = np.random.default_rng(8).integers(0, 256, (side, side, 3), dtype=np.uint8)
    image = torch.from_numpy(noise.astype(np.float32)).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(
        image, size=(size, size), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 255)
    mean, std = (torch.tensor(values)[None, :, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
    found = torch.from_numpy(to_pixels(Image.fromarray(noise), spec)) * std + mean
    return bool((found * 255 - expected).abs().mean() > _LEVELS)


def flag_faults(bundle: Bundle, decoders: list[FloatView]) -> list[str]:
    """Returns the promises of the manifest that the decoder graphs do not keep."""
    together = any(
        weight.activation == "int8-tensor" for view in decoders for weight in view.weights.values()
    )
    half = any(view.half for view in decoders)
    if bundle.row_independent and (together or half):
        return [
            "manifest.json says that rows are independent, and the decoder rounds them together"
        ]
    return []
