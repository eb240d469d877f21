"""llama.cpp through the C interface of llama-cpp-python: weights are written as GGUF in
bf16 and quantised by llama.cpp itself.

llama.cpp's LLaMA graph rotates neighbouring pairs, so the rows of the query and key
weights are reordered from the half-split layout. No vocabulary is stored.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp as lc
import numpy as np
from numpy.typing import NDArray

from contenders import CHECKPOINT, CONTEXT, Contender, file_bytes
from contenders.weights import spec_of, write_checkpoint

__all__ = ["LlamaDecoder", "load", "prepare", "versions", "write_gguf"]

_BATCH = 512
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_WHOLE = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
Array = NDArray[np.float32]


class LlamaDecoder:
    """See `contenders.Decoder`."""

    def __init__(self, file: Path, threads: int, options: dict[str, Any]) -> None:
        lc.llama_backend_init()
        model = lc.llama_model_default_params()
        model.use_extra_bufts = options.get("repack", True)
        self._model = lc.llama_model_load_from_file(str(file).encode(), model)
        if not self._model:
            raise RuntimeError(f"llama.cpp refuses {file}")
        context = lc.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = (
            CONTEXT,
            _BATCH,
            options.get("ubatch", _BATCH),
        )
        context.n_threads = context.n_threads_batch = threads
        context.flash_attn_type = options.get("flash", lc.LLAMA_FLASH_ATTN_TYPE_AUTO)
        self._context = lc.llama_init_from_model(self._model, context)
        self._vocabulary = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self._model))
        self.disk_bytes = file_bytes(file)
        self.weight_bytes = _read_bytes(file)

    def reset(self) -> None:
        """See `contenders.Decoder`."""
        lc.llama_memory_clear(lc.llama_get_memory(self._context), True)

    def prefill(self, tokens: list[int]) -> Array:
        """See `contenders.Decoder`."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        if lc.llama_decode(self._context, lc.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(
            lc.llama_get_logits_ith(self._context, -1), (self._vocabulary,)
        )

    def step(self, token: int) -> Array:
        """See `contenders.Decoder`."""
        return self.prefill([token])


def _read_bytes(file: Path) -> int:
    """Returns the bytes of all tensors except the token table, of which a step reads
    only one row.
    """
    from gguf import GGUFReader

    return sum(
        int(tensor.n_bytes)
        for tensor in GGUFReader(file).tensors
        if tensor.name != "token_embd.weight"
    )


def write_gguf(folder: Path, place: Path) -> None:
    """Writes the decoder of the common weights as a GGUF file in bf16, with norms in
    float32.
    """
    import torch
    from gguf import GGMLQuantizationType, GGUFWriter

    from trainer.checkpoint import open_checkpoint

    stored = open_checkpoint(folder / CHECKPOINT)
    spec = stored.spec.decoder
    writer = GGUFWriter(place, "llama")
    writer.add_block_count(spec.layers)
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.mlp_width)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(spec.rope_theta)
    writer.add_layer_norm_rms_eps(spec.rms_norm_eps)
    writer.add_vocab_size(spec.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name in stored.places:
        if not name.startswith("decoder."):
            continue
        tensor = stored.read(name)
        if name.endswith((".q_proj.weight", ".k_proj.weight")):
            tensor = (
                tensor.unflatten(0, (-1, 2, spec.head_dim // 2))
                .transpose(1, 2)
                .reshape(tensor.shape)
            )
        if tensor.dim() == 1:
            writer.add_tensor(_gguf_name(name), tensor.numpy())
            continue
        halves = tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
        writer.add_tensor(_gguf_name(name), halves, raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    rest = name.removeprefix("decoder.").removesuffix(".weight")
    if not rest.startswith("layers."):
        return f"{_WHOLE[rest]}.weight"
    _, layer, part = rest.split(".", 2)
    return f"blk.{layer}.{_NAMES[part]}.weight"


def prepare(folder: Path, contender: Contender) -> None:
    """Writes and quantises the model unless it exists."""
    write_checkpoint(folder)
    place = _place(folder, contender)
    if place.exists():
        return
    whole = folder / f"{CHECKPOINT}.gguf"
    if not whole.exists():
        write_gguf(folder, whole.with_suffix(".part"))
        whole.with_suffix(".part").rename(whole)
    settings = lc.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = (
        2,
        getattr(lc, f"LLAMA_FTYPE_MOSTLY_{contender.options['kind']}"),
    )
    part = place.with_suffix(".part")
    if lc.llama_model_quantize(str(whole).encode(), str(part).encode(), ctypes.byref(settings)):
        raise RuntimeError(f"llama.cpp could not quantise {whole}")
    part.rename(place)


def _place(folder: Path, contender: Contender) -> Path:
    return folder / f"{CHECKPOINT}-{contender.options['kind']}.gguf"


def load(folder: Path, contender: Contender, threads: int) -> Any:
    """Loads the quantised model."""
    assert spec_of(folder).decoder.context >= CONTEXT, (
        "the model holds the prompt and what is decoded"
    )
    return LlamaDecoder(_place(folder, contender), threads, dict(contender.options))


def versions() -> dict[str, str]:
    """Returns the version of llama-cpp-python."""
    return {"llama-cpp-python": lc.__version__}
