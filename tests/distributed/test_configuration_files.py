# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises of the files under configuration/accelerate: accelerate knows every line of them."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType


FOLDER = Path(__file__).resolve().parents[2] / "configuration" / "accelerate"
KINDS = {
    "ddp_cpu": DistributedType.MULTI_GPU,
    "ddp_gpu": DistributedType.MULTI_GPU,
    "fsdp2_gpu": DistributedType.FSDP,
    "zero2_gpu": DistributedType.DEEPSPEED,
}


def test_every_file_is_listed():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(KINDS)


@pytest.mark.parametrize("name, kind", KINDS.items())
def test_accelerate_reads_it(name, kind):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses a key that it does not know
    assert config.distributed_type == kind and config.num_processes == 2
    parser = launch_command_parser()
    args, _, _ = _validate_launch_command(
        parser.parse_args(["--config_file", str(FOLDER / f"{name}.yaml"), "train.py"])
    )
    assert args.mixed_precision == ("no" if name == "ddp_cpu" else "bf16")
    if kind is DistributedType.FSDP:
        assert args.fsdp_version == 2 and args.fsdp_transformer_layer_cls_to_wrap is None
        assert args.fsdp_state_dict_type == "SHARDED_STATE_DICT"
    if kind is DistributedType.DEEPSPEED:
        assert args.zero_stage == 2
