"""Run under torchrun by `test_processes`: a few steps with FSDP2 on the CPU, which `accelerate` offers for GPUs only and so is switched on by hand.

Arguments: a folder for state, and the file that receives the whole weights.
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
from trainer.processes import leave_processes
from trainer.tokenize import build_tokenizer
from trainer.train import TrainOptions, train

RECIPE = (StageRun("multitask", 3, 2, 1e-2, warmup=2), StageRun("joint", 5, 2, 1e-2, warmup=2))


def sharded_accelerator(precision: str) -> Accelerator:
    """An accelerator that shards."""
    accelerator = Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["VisionBlock", "DecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    assert accelerator.is_fsdp2
    return accelerator


def main(state: Path, out: Path, stop_after: int | None, resume: bool) -> None:
    """Trains and saves."""
    torch.set_num_threads(1)
    trainer.train.make_accelerator = sharded_accelerator
    inner = RawTokenizer.from_str(build_tokenizer(corpus()).to_str())
    model = InfMLLM(TINY, torch.Generator().manual_seed(0))
    options = TrainOptions(state, workers=0, stop_after=stop_after, resume=resume)
    trained = train(model, Tokenizer(inner, TINY), SceneSource(), RECIPE, options)
    if trained.is_main:
        torch.save(trained.model.state_dict(), out)
    leave_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) or None, sys.argv[4] == "resume")
