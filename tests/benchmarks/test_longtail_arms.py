# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The opponents that the repository ships: all can be made, and those that are to have as many parameters do."""

from dataclasses import asdict, replace

import pytest
import torch
from longtail_tiny import EXAMPLES

from modeling_cse import ClusterExpertsCallback, CSEBertConfig, CSEGPT2Config
from modeling_cse.data import train_tokenizer
from modeling_cse.training.callback import EVIDENCE_SAMPLES


from arms import Arm, build_callback, build_config, for_size, model_class, read_arms  # isort: skip
from comparisons import Roles  # isort: skip
from train import Size  # isort: skip


ARMS = read_arms(EXAMPLES / "arms.yaml")
CPU = Size.load("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a court held that the cell line grew"], kind="gpt2", vocab_size=270)


def parameters(name: str, tokenizer, size: Size = CPU) -> int:
    arm = for_size(ARMS[name], size.family, size.config)
    with torch.device("meta"):
        model = model_class(arm, size.family)(build_config(arm, size.family, size.config, tokenizer))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_arm_can_be_made(name, tokenizer):
    assert parameters(name, tokenizer) > 0
    assert (build_callback(ARMS[name], seed=3) is None) == (ARMS[name].kind != "cse")
    assert ARMS[name].start is None or ARMS[name].start in ARMS


OPPONENTS = {
    "cse": ("dense_wide", "switch"),
    "cse_wide": ("dense_wider", "switch_wide"),
    "cse_large": ("dense_wide_large", "switch_large"),
}


@pytest.mark.parametrize(
    ("own", "size"),
    [*((own, "cpu") for own in OPPONENTS), ("cse_wide", "cpu_bert"), ("cse_wide", "gpu"), ("cse_wide", "gpu_bert")],
)
def test_opponents_have_as_many_parameters_in_the_same_layers(own, size, tokenizer):
    size = Size.load(size)
    count = parameters(own, tokenizer, size)
    assert parameters("dense", tokenizer, size) < 0.9 * count
    for name in OPPONENTS[own]:
        assert parameters(name, tokenizer, size) == pytest.approx(count, rel=2e-3)
    cse, switch = (for_size(ARMS[name], size.family, size.config) for name in (own, OPPONENTS[own][1]))
    config = build_config(cse, size.family, size.config, tokenizer)
    assert switch.model["switch_layers"] == config.cse_layer_indices


def test_an_arm_of_a_size_says_so_in_numbers():
    """As the records do, from which it is made again."""
    known = {"dense_wide": {"n_inner": 1366}, "dense_wider": {"n_inner": 2390}}
    for name, model in known.items():
        arm = for_size(ARMS[name], "gpt2", CPU.config)
        assert arm.model == model and arm == for_size(arm, "gpt2", CPU.config) == Arm(**arm.settings())
    assert for_size(ARMS["dense_wider"], "bert", Size.load("cpu_bert").config).model == {"intermediate_size": 2390}
    with pytest.raises(ValueError, match="for_size\\(\\) first"):
        ARMS["dense_wider"].settings()


def test_a_value_that_the_family_does_not_have_is_refused(tokenizer):
    """It would change nothing, and the opponent be another one than its name says."""
    arm = Arm("wide", "dense", model={"n_inner": 2390})
    with pytest.raises(ValueError, match=r"model=\['n_inner'\] of 'wide' is not allowed: CSEBertConfig"):
        build_config(arm, "bert", Size.load("cpu_bert").config, tokenizer)
    with pytest.raises(ValueError, match="as_large_as='cse' is not allowed with kind='switch'"):
        Arm("switch", "switch", as_large_as=Arm("cse", "cse"))


def test_every_role_has_its_arm():
    assert set(asdict(Roles()).values()) <= set(ARMS)


def test_documents_end_with_the_token_of_the_corpus(tokenizer):
    config = build_config(ARMS["cse_documents"], "gpt2", CPU.config, tokenizer)
    assert config.cse_separator_token_id == tokenizer.eos_token_id
    assert build_config(ARMS["cse"], "gpt2", CPU.config, tokenizer).cse_separator_token_id is None


def test_evidence_is_counted_on_the_sample_where_an_arm_says_nothing():
    """As in the runs of its records."""
    sizes = {name: build_callback(ARMS[name], seed=0).evidence_size for name in ("cse", "cse_documents", "states")}
    assert sizes == {"cse": 2048, "cse_documents": 4096, "states": None}


@pytest.mark.parametrize(("family", "size"), [("gpt2", "cpu"), ("bert", "cpu_bert")])
def test_the_default_arm_is_what_the_library_does_by_default(family, size, tokenizer):
    size = Size.load(size).config
    config = build_config(ARMS[Roles().default], family, size, tokenizer)
    plain = {"gpt2": CSEGPT2Config, "bert": CSEBertConfig}[family](**size)
    flags = ("layer_indices", "modules", "combine", "num_experts", "routing")
    for flag in (*(f"cse_{name}" for name in flags), "expert_size", "gate"):
        assert getattr(config, flag) == getattr(plain, flag), flag
    own, default = build_callback(ARMS[Roles().default], seed=0), ClusterExpertsCallback()
    assert own.schedule == default.schedule.resolve(at_once=False) and own.sample_size == default.sample_size
    assert own.evidence_size == EVIDENCE_SAMPLES * default.sample_size
    own, default = (callback.settings.resolve("evidence") for callback in (own, default))
    assert own.cluster_range == default.cluster_range and replace(own, num_clusters=None) == default
