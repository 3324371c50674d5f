# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Random configs of both families: what is allowed in any mixture, and now and then something that is not."""

import json
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from tiny import CONFIGS
from transformers import BertConfig, GPT2Config


STOCK = {"gpt2": GPT2Config, "bert": BertConfig}
FAMILIES = st.sampled_from(["gpt2", "bert"])
HUGE = 2**50  # of anything: more than any machine holds, so that asking for it fails at once
ACTIVATIONS = ["gelu_new", "gelu", "relu", "silu", "tanh", "linear", "quick_gelu", "leaky_relu", "sigmoid"]
SHARES = [0.0, 0, 0.1, 0.5, 1.0]
WRONG_SIZES = [0, -8, 12, 5, "16", None, True, 16.0, HUGE]
WRONG_SHARES = [-0.1, 1.5, float("nan"), "0.1", [0.1]]

# By family and field: what is drawn, the first of it most often, and what is wrong or unusual enough to fail.
FIELDS: dict[str, dict[str, tuple[list, list]]] = {
    "gpt2": {
        "vocab_size": ([31, 99, 1, 2], [0, -3, "31", None]),
        "n_positions": ([16, 8, 32], [0, 1, 3, -1, "16"]),
        "n_embd": ([16, 8, 24], WRONG_SIZES),
        "n_layer": ([2, 1, 3, 4, 0], [-1, "2", None, 2.0]),
        "n_head": ([2, 1, 4, 8], [3, 5, 0, -1, "2", None]),
        "n_inner": ([None, 24, 1, 7, 33, 64], [0, -4, "64", 2.5, HUGE]),
        "activation_function": (ACTIVATIONS, ["no_such", "", 3, None]),
        "resid_pdrop": (SHARES, WRONG_SHARES),
        "embd_pdrop": (SHARES, WRONG_SHARES),
        "attn_pdrop": (SHARES, WRONG_SHARES),
        "layer_norm_epsilon": ([1e-5, 1.0, 1e-12], [0.0, -1.0, float("nan"), "small"]),
        "initializer_range": ([0.02, 1.0, 1e-9], [0.0, -1.0, "0.02", None]),
        "scale_attn_weights": ([True, False], ["yes", 1]),
        "scale_attn_by_inverse_layer_idx": ([False, True], [None, 0]),
        "reorder_and_upcast_attn": ([False, True], ["no"]),
        "add_cross_attention": ([False, True], ["no"]),
        "use_cache": ([True, False], [1]),
        "tie_word_embeddings": ([True, False], ["no", 1]),
        "bos_token_id": ([0, None], ["0", 1.0]),
        "eos_token_id": ([None, 0, 50256], ["0", 1.0]),
        "pad_token_id": ([0, None], [-1, 50256, "0"]),
        "attn_implementation": ([None, "eager", "sdpa"], ["no_such", 3]),
    },
    "bert": {
        "vocab_size": ([31, 99, 1, 2], [0, -3, "31", None]),
        "max_position_embeddings": ([16, 8, 32], [0, 1, 3, -1, "16"]),
        "hidden_size": ([16, 8, 24], WRONG_SIZES),
        "num_hidden_layers": ([2, 1, 3, 4, 0], [-1, "2", None, 2.0]),
        "num_attention_heads": ([2, 1, 4, 8], [3, 5, 0, -1, "2", None]),
        "intermediate_size": ([24, 1, 7, 33, 64], [0, -4, None, "64", 2.5, HUGE]),
        "hidden_act": (ACTIVATIONS, ["no_such", "", 3, None]),
        "hidden_dropout_prob": (SHARES, WRONG_SHARES),
        "attention_probs_dropout_prob": (SHARES, WRONG_SHARES),
        "type_vocab_size": ([2, 1, 5], [0, -1, "2"]),
        "layer_norm_eps": ([1e-12, 1.0, 1e-5], [0.0, -1.0, float("nan"), "small"]),
        "initializer_range": ([0.02, 1.0, 1e-9], [0.0, -1.0, "0.02", None]),
        "is_decoder": ([False, True], [1]),
        "add_cross_attention": ([False, False, False, True], ["no"]),
        "chunk_size_feed_forward": ([0, 1, 4], [-1, 3, 7, "4", 2.5]),
        "use_cache": ([True, False], [1]),
        "tie_word_embeddings": ([True, False], ["no", 1]),
        "pad_token_id": ([0, None], [-1, 50256, "0"]),
        "attn_implementation": ([None, "eager", "sdpa"], ["no_such", 3]),
    },
}
NOT_A_LIST = ["last", "", 1, 0.5, True, {0: 1}, {0}, range(1), b"\0", np.array([0, 0]), torch.tensor([0, 0])]
NOT_A_COUNT = [0, -1, 2.0, "4", True, [4], float("nan"), float("inf"), HUGE, 2**70, np.int64(4)]
NOT_A_BOOL = ["yes", 1, 0, None, [], np.bool_(True)]
WRONG_FLAGS = {
    "cse_layers": [*NOT_A_LIST, [1.0], ["0"], [True], [None], [99], [-5], [0, 0], [0, [0]], [HUGE], [np.int64(0)]],
    "cse_modules": [*NOT_A_LIST, None, [], "ffn", ["head"], ["ffn", "ffn"], [["ffn"]], [None], np.array(["ffn"])],
    "cse_combine": ["sum", "", None, 1, True, ["add"], ("add",), {"add"}, np.array(["add", "add"])],
    "cse_routing": ["token", "", None, 0, False, ["given"], {"given": 1}],
    "cse_gate": ["soft", "", 1, True, ["hard"], {"posterior": 1}],
    "cse_num_experts": [*NOT_A_COUNT, None, 1024],
    "cse_expert_size": [*NOT_A_COUNT[:-4], 2**70, np.int64(64), 4, 12, 68],
    "cse_max_clusters": NOT_A_COUNT,
    "cse_separator_token_id": [*NOT_A_COUNT[1:], 2**60],
    "cse_radius_scaling": NOT_A_BOOL,
    "output_router_logits": NOT_A_BOOL,
    "output_cluster_ids": NOT_A_BOOL,
}
FLAGS = {
    "cse_modules": [["ffn"], ["attention"], ["attention", "ffn"], ("ffn", "attention")],
    "cse_combine": ["replace", "add"],
    "cse_num_experts": [4, 1, 2, 5, 17],
    "cse_routing": ["discriminant", "evidence", "sequence", "given"],
    "cse_radius_scaling": [True, False],
    "cse_max_clusters": [None, 1, 2, 5, 17, 40],
    "cse_separator_token_id": [None, None, 3],
    "output_router_logits": [False, True],
    "output_cluster_ids": [False, True],
}
# What `--config_overrides` can say: upstream reads each value as the type that the default has.
TOLD = {"cse_combine": str, "cse_routing": str, "cse_num_experts": int}
TOLD |= {name: bool for name in ("cse_radius_scaling", "output_router_logits", "output_cluster_ids")}
CLUSTERS = ["none", "one", "some", "all common", "all long tail", "full"]


class RandomConfig(NamedTuple):
    """Stock fields, flags, which of both are wrong, how they reach the config, and the clusters of its routers."""

    family: str
    stock: dict[str, Any]
    flags: dict[str, Any]
    wrong: frozenset[str]
    way: str
    clusters: str
    seed: int

    def make(self):
        """The config, with the flags on the way that was drawn."""
        config_class, values = CONFIGS[self.family], {**self.stock, **self.flags}
        values["experts_implementation"] = ("eager", "grouped_mm", "batched_mm")[self.seed % 3]
        if self.way == "from_dict":
            return config_class.from_dict(values)
        if self.way == "from_json":
            return config_class.from_dict(json.loads(json.dumps(values)))
        if self.way == "arguments":
            return config_class(**values)
        config = config_class(**self.stock, experts_implementation=values["experts_implementation"])
        if self.way == "set afterwards":
            for name, value in self.flags.items():
                setattr(config, name, value)
        else:
            config.update_from_string(",".join(f"{name}={value}" for name, value in self.flags.items()))
        return config

    def dense(self):
        """The config of the stock twin."""
        return STOCK[self.family](**self.stock)


def _is_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


@st.composite
def random_configs(draw) -> RandomConfig:
    family = draw(FAMILIES)
    stock = {name: draw(st.sampled_from(right)) for name, (right, _) in FIELDS[family].items()}
    flags = {name: draw(st.sampled_from(right)) for name, right in FLAGS.items()}
    probable = flags["cse_combine"] == "add" and flags["cse_routing"] != "sequence"
    flags["cse_gate"] = draw(st.sampled_from([None, "hard", "posterior"] if probable else [None, "hard"]))
    depth = stock["n_layer" if family == "gpt2" else "num_hidden_layers"]
    inner = stock["n_inner" if family == "gpt2" else "intermediate_size"]
    base = 4 * stock["n_embd"] if inner is None else inner
    least = 8 if flags["cse_combine"] == "add" else -(-base // 8) * 8
    flags["cse_expert_size"] = draw(st.sampled_from([None, least, least + 8, least + 40]))
    layers = st.lists(st.integers(0, depth - 1), unique=True) if depth else st.just([])
    signed = layers.flatmap(lambda found: st.tuples(*[st.sampled_from([i, i - depth]) for i in found]))
    flags["cse_layers"] = draw(st.one_of(st.none(), signed.map(list), signed, st.just("auto")))
    way = draw(st.sampled_from(["arguments", "from_dict", "from_json", "set afterwards", "overrides"]))
    wrong = draw(st.sampled_from([(), (), ("flags",), ("flags",), ("stock",), ("flags", "stock")]))
    named = set()
    for kind in wrong:
        fields = WRONG_FLAGS if kind == "flags" else {name: bad for name, (_, bad) in FIELDS[family].items()}
        name = draw(st.sampled_from(sorted(fields)))
        (flags if kind == "flags" else stock)[name] = draw(st.sampled_from(fields[name]))
        named.add(name)
    if way == "overrides" and all(type(flags[name]) is TOLD.get(name) for name in named & flags.keys()):
        flags = {name: flags[name] for name in TOLD}
    elif way == "overrides":
        way = "set afterwards"
    elif way == "from_json" and not all(map(_is_json, flags.values())):
        way = "from_dict"
    rest = draw(st.sampled_from(CLUSTERS)), draw(st.integers(0, 99))
    return RandomConfig(family, stock, flags, frozenset(named), way, *rest)
