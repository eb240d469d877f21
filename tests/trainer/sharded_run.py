"""Run under torchrun by `test_processes`: a few steps with FSDP2 on the CPU, which
`accelerate` offers for GPUs only and so is switched on by hand.

Arguments: a folder for state, the file that receives the whole weights, steps before
stopping (0: all), new or resume, and the precision.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from tokenizers import Tokenizer as RawTokenizer

import trainer.train
from runtime.contract.tokenizer import Tokenizer
from tests.conftest import TINY
from trainer.config import StageRun
from trainer.datasets.scene_text import SceneSource, corpus
from trainer.model import InfMLLM
from trainer.processes import autocast_only, leave_processes
from trainer.tokenize import build_tokenizer
from trainer.train import TrainOptions, train

RECIPE = (
    StageRun("alignment", 2, 2, 1e-2, warmup=1),  # freezes what later stages train
    StageRun("multitask", 3, 2, 1e-2, warmup=2),
    StageRun("joint", 5, 2, 1e-2, warmup=2),
)


def sharded_accelerator(precision: str = "auto") -> Accelerator:
    """An accelerator that shards."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else "no")
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["VisionBlock", "DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    if accelerator.mixed_precision != "no":  # as accelerate does on GPUs
        accelerator.state.fsdp_plugin.set_mixed_precision(
            accelerator.mixed_precision, buffer_autocast=True
        )
    assert accelerator.is_fsdp2
    return autocast_only(accelerator)


def main(state: Path, out: Path, stop_after: int | None, resume: bool, precision: str) -> None:
    """Trains and saves."""
    torch.set_num_threads(1)
    trainer.train.make_accelerator = sharded_accelerator
    inner = RawTokenizer.from_str(build_tokenizer(corpus()).to_str())
    model = InfMLLM(TINY, torch.Generator().manual_seed(0))
    options = TrainOptions(
        state, workers=0, stop_after=stop_after, resume=resume, precision=precision
    )
    trained = train(model, Tokenizer(inner, TINY), SceneSource(), RECIPE, options)
    if trained.is_main:
        torch.save(trained.model.state_dict(), out)
    leave_processes()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        int(sys.argv[3]) or None,
        sys.argv[4] == "resume",
        sys.argv[5],
    )
