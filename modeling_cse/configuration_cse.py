# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Configurations: the stock GPT-2 and BERT fields plus the flags that choose where and how experts are used."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from huggingface_hub.dataclasses import strict
from transformers import BertConfig, GPT2Config


if TYPE_CHECKING:
    # what a mixin stands before
    from transformers import PreTrainedConfig as Stock
else:
    Stock = object

MODULES = ("attention", "ffn")
COMBINES = ("replace", "add")
ROUTINGS = ("discriminant", "evidence", "sequence", "given")
GATES = ("hard", "posterior")

# Rows of the fused expert tensors must start on 16-byte boundaries for the grouped matrix product, in bf16 too.
WIDTH_MULTIPLE = 8

# PyTorch's grouped matrix product for accelerators starts one thread a group, and takes no more.
MOST_EXPERTS = 1023
# Far more than sequences of a sample can tell apart. It only keeps a slip of the pen from asking for all memory.
MOST_CLUSTERS = 65536

GPT2_AUTO_MAP = {
    "AutoConfig": "configuration_cse.CSEGPT2Config",
    "AutoModel": "modeling_cse_gpt2.CSEGPT2Model",
    "AutoModelForCausalLM": "modeling_cse_gpt2.CSEGPT2ForCausalLM",
    "AutoModelForSequenceClassification": "modeling_cse_gpt2.CSEGPT2ForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_cse_gpt2.CSEGPT2ForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_cse_gpt2.CSEGPT2ForQuestionAnswering",
}
BERT_AUTO_MAP = {
    "AutoConfig": "configuration_cse.CSEBertConfig",
    "AutoModel": "modeling_cse_bert.CSEBertModel",
    "AutoModelForMaskedLM": "modeling_cse_bert.CSEBertForMaskedLM",
    "AutoModelForPreTraining": "modeling_cse_bert.CSEBertForPreTraining",
    "AutoModelForNextSentencePrediction": "modeling_cse_bert.CSEBertForNextSentencePrediction",
    "AutoModelForSequenceClassification": "modeling_cse_bert.CSEBertForSequenceClassification",
    "AutoModelForMultipleChoice": "modeling_cse_bert.CSEBertForMultipleChoice",
    "AutoModelForTokenClassification": "modeling_cse_bert.CSEBertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_cse_bert.CSEBertForQuestionAnswering",
}


def _experts_plan(experts: str) -> dict[str, str]:
    """Expert parallelism of the FFN experts of this name: whole slots on each rank, tokens brought to them."""
    tensors = ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias")
    return {**{f"{experts}.{name}": "grouped_gemm" for name in tensors}, experts: "ep_dispatch_experts"}


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(repr=False, kw_only=True)
class CSEFlags(Stock):
    """
    The flags both families share. They are validated together, so that a wrong one raises a plain `ValueError`.

    Args:
        cse_layers (`list[int]` or `"auto"`, *optional*):
            Layers that get cluster-guided experts; negative indices count from the end. `None` means the last two
            layers (the paper's setting), an empty list means exactly the dense model. `"auto"`: every layer has room
            for experts, and training chooses some (`ClusterExpertsCallback(layer_budget=...)`).
        cse_modules (`list[str]`, defaults to `["ffn"]`):
            Which modules of those layers get experts: `"ffn"` (MoF), `"attention"` (MoA), or both.
        cse_combine (`str`, defaults to `"add"`):
            `"add"` (default): base plus expert, which starts with a zero output. `"replace"`: a routed token goes
            through its expert instead of the base module, and experts start as copies of it (the paper).
        cse_num_experts (`int`, defaults to 4):
            Expert slots per layer, at most 1,023.
        cse_expert_size (`int`, *optional*):
            Width of an FFN expert, a multiple of 8. Default: the base width, rounded up to a multiple of 8.
            `"replace"` takes no width below the base's.
        cse_routing (`str`, defaults to `"evidence"`):
            `"evidence"` (default): by what the tokens of its text say about the text's cluster, those read so far in
            GPT-2 (causal), all of them in BERT. `"discriminant"`: each token by its own state, causal. `"sequence"`:
            the whole sequence by its masked mean state (the paper). `"given"`: by `given_clusters` that come with the
            batch, for controls (random or oracle routing) and where domains are known.
        cse_gate (`str`, *optional*):
            `"hard"`: a token's expert is that of its likeliest cluster, and answers in full. `"posterior"`: it is the
            one whose cluster is likeliest among those with an expert, and answers times that probability; below 0.1
            not at all. With `"add"` only, and not with `"sequence"`, whose distances are no probabilities. Default:
            `"posterior"` for `"evidence"` with `"add"`, otherwise `"hard"`.
        cse_radius_scaling (`bool`, defaults to `True`):
            `"sequence"` only: divide the distance to a centroid by the cluster's radius.
        cse_max_clusters (`int`, *optional*):
            Clusters a router can hold, common ones included, at most 65,536. Default: the larger of 16 and twice the
            slots.
        cse_separator_token_id (`int`, *optional*):
            The token that ends a document where rows hold several: behind it another text begins, for routes and for
            clusters, as where `position_ids` begin anew. Default: none does, a row is one text.
        output_router_logits, output_cluster_ids (`bool`, defaults to `False`):
            Whether outputs have `router_logits` and `cluster_ids` where a call does not say.
    """

    # `Any` keeps the type checks of `@strict` away: they raise an error class of their own, which is no ValueError.
    cse_layers: Any = None
    cse_modules: Any = ("ffn",)
    cse_combine: Any = "add"
    cse_num_experts: Any = 4
    cse_expert_size: Any = None
    cse_routing: Any = "evidence"
    cse_gate: Any = None
    cse_radius_scaling: Any = True
    cse_max_clusters: Any = None
    cse_separator_token_id: Any = None
    output_router_logits: Any = False
    output_cluster_ids: Any = False

    def __post_init__(self, **kwargs):
        _refuse_unknown_flags(kwargs)
        super().__post_init__(**kwargs)
        self.cse_modules = list(self.cse_modules) if isinstance(self.cse_modules, tuple) else self.cse_modules
        self.cse_layers = list(self.cse_layers) if isinstance(self.cse_layers, tuple) else self.cse_layers
        self.validate_cse_flags()

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # upstream leaves out what no field takes: a flag that is spelt wrong would be passed over
        _refuse_unknown_flags(kwargs)
        return super().from_dict(config_dict, **kwargs)

    def validate_cse_flags(self) -> None:
        """Raises `ValueError` naming the flag, its value and what is allowed. Models call it again when they are
        built, because `from_pretrained(..., flag=value)` sets flags on a finished config."""
        indices = self.cse_layer_indices
        self._require_subset("cse_modules", MODULES)
        for flag, allowed in (("cse_combine", COMBINES), ("cse_routing", ROUTINGS), ("cse_gate", (None, *GATES))):
            if not isinstance(getattr(self, flag), str | None) or getattr(self, flag) not in allowed:
                raise ValueError(f"{flag}={getattr(self, flag)!r} is not allowed: it must be one of {list(allowed)}.")
        for flag in ("cse_radius_scaling", "output_router_logits", "output_cluster_ids"):
            if not isinstance(getattr(self, flag), bool):
                raise ValueError(f"{flag}={getattr(self, flag)!r} is not allowed: it must be a bool.")
        if not _is_int(self.cse_num_experts) or not 1 <= self.cse_num_experts <= MOST_EXPERTS:
            raise ValueError(
                f"cse_num_experts={self.cse_num_experts!r} is not allowed: it must be an int >= 1, at most "
                f"{MOST_EXPERTS}."
            )
        most = self.cse_max_clusters
        if most is not None and (not _is_int(most) or not 1 <= most <= MOST_CLUSTERS):
            raise ValueError(
                f"cse_max_clusters={most!r} is not allowed: it must be None or an int >= 1, at most {MOST_CLUSTERS}."
            )
        separator = self.cse_separator_token_id
        if separator is not None and (not _is_int(separator) or not 0 <= separator < self.vocab_size):
            raise ValueError(
                f"cse_separator_token_id={separator!r} is not allowed: it must be None or an int from 0 to "
                f"{self.vocab_size - 1}."
            )
        if indices and self.hidden_size % WIDTH_MULTIPLE:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not allowed in a model with cse_layers: it must be a multiple of "
                f"{WIDTH_MULTIPLE}."
            )
        if self.cse_gate == "posterior" and (self.cse_combine != "add" or self.cse_routing == "sequence"):
            raise ValueError(
                f"cse_gate='posterior' is not allowed with cse_combine={self.cse_combine!r} and cse_routing="
                f"{self.cse_routing!r}: it must be 'hard' unless cse_combine is 'add', and with 'sequence'."
            )
        self._validate_expert_size()

    def _require_subset(self, flag: str, allowed: tuple[str, ...]) -> None:
        value = getattr(self, flag)
        items = value if isinstance(value, list | tuple) else []
        known = all(isinstance(item, str) and item in allowed for item in items)
        if not items or not known or len(set(items)) != len(items):
            raise ValueError(
                f"{flag}={value!r} is not allowed: it must be a non-empty list out of {list(allowed)}, each at most "
                "once."
            )

    def _validate_expert_size(self) -> None:
        size, base = self.cse_expert_size, self.base_ffn_size
        if size is None:
            return
        least = base if self.cse_combine == "replace" else 1
        if not _is_int(size) or size < least or size % WIDTH_MULTIPLE:
            raise ValueError(
                f"cse_expert_size={size!r} is not allowed: with cse_combine={self.cse_combine!r} it must be None or a "
                f"multiple of {WIDTH_MULTIPLE}" + (f" that is at least the base width {base}." if least > 1 else ".")
            )

    @property
    def cse_layer_indices(self) -> list[int]:
        """The layers of `cse_layers` as sorted indices from the front."""
        depth, layers = self.num_hidden_layers, self.cse_layers
        if layers is None:
            return list(range(max(depth - 2, 0), depth))
        if isinstance(layers, str) and layers == "auto":
            return list(range(depth))
        # what else can be walked through could not be saved
        if not isinstance(layers, list | tuple) or not all(_is_int(i) for i in layers):
            raise ValueError(f"cse_layers={layers!r} is not allowed: it must be None, a list of ints, or 'auto'.")
        for index in layers:
            if not -depth <= index < depth:
                raise ValueError(
                    f"cse_layers={list(layers)!r} is not allowed: {index} is out of range for a model of {depth} "
                    f"layers, it must be from {-depth} to {depth - 1}."
                )
        indices = sorted(index % depth for index in layers)
        if len(set(indices)) != len(indices):
            raise ValueError(f"cse_layers={list(layers)!r} is not allowed: it names a layer twice.")
        return indices

    @property
    def expert_size(self) -> int:
        """Width of an expert, defaults resolved."""
        if self.cse_expert_size is not None:
            return self.cse_expert_size
        return -(-self.base_ffn_size // WIDTH_MULTIPLE) * WIDTH_MULTIPLE

    @property
    def gate(self) -> str:
        """For how much an expert counts, default resolved."""
        if self.cse_gate is not None:
            return self.cse_gate
        return "posterior" if self.cse_routing == "evidence" and self.cse_combine == "add" else "hard"

    @property
    def max_clusters(self) -> int:
        """Clusters a router can hold, default resolved."""
        return max(16, 2 * self.cse_num_experts) if self.cse_max_clusters is None else self.cse_max_clusters

    def update_from_string(self, update_str: str) -> None:
        """
        As upstream (`--config_overrides n_embd=64,cse_num_experts=2`), and validated.

        Raises:
            ValueError: a wrong flag or value, or a flag that such a string cannot hold.
        """
        try:
            super().update_from_string(update_str)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"update_str={update_str!r} is not allowed: {error}. It must be like 'n_embd=64,cse_num_experts=2'; "
                "what is a list or None by default (cse_layers, cse_modules, cse_expert_size, cse_gate, "
                "cse_max_clusters, cse_separator_token_id) belongs in a config file."
            ) from error
        self.validate_cse_flags()

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        # Upstream maps the saved head alone, so that every other head would fail to load without this package.
        self.auto_map = {**self._heads_auto_map, **(getattr(self, "auto_map", None) or {})}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)


def _refuse_unknown_flags(names: Iterable[str]) -> None:
    known = [name for name in CSEFlags.__annotations__ if name.startswith("cse_")]
    for name in names:
        if name.startswith("cse_") and name not in known:
            raise ValueError(f"{name} is not allowed: a flag that begins so must be one of {known}.")


@strict
class CSEGPT2Config(CSEFlags, GPT2Config):
    __doc__ = f"Configuration of a GPT-2 with cluster-guided sparse experts.\n{CSEFlags.__doc__}"

    model_type = "cse_gpt2"
    _auto_class = "AutoConfig"
    _heads_auto_map = GPT2_AUTO_MAP
    base_model_fsdp_plan = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}
    base_model_ep_plan = _experts_plan("h.*.mlp.experts")
    # no style of upstream's takes a `Conv1D`: its weights are transposed, and query, key and value one tensor
    base_model_tp_plan = {"wte": "embedding_rowwise"}

    @property
    def reads_left_to_right(self) -> bool:
        return True

    @property
    def base_ffn_size(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def ffn_activation(self) -> str:
        return self.activation_function


@strict
class CSEBertConfig(CSEFlags, BertConfig):
    __doc__ = f"Configuration of a BERT with cluster-guided sparse experts.\n{CSEFlags.__doc__}"

    model_type = "cse_bert"
    _auto_class = "AutoConfig"
    _heads_auto_map = BERT_AUTO_MAP
    base_model_fsdp_plan = {
        "embeddings": "free_full_weight",
        "encoder.layer.*": "free_full_weight",
        "pooler": "keep_full_weight",
    }
    base_model_ep_plan = _experts_plan("encoder.layer.*.mlp.experts")
    # Experts are in no such plan: upstream sums over ranks what each computes with a part of their units, and has no
    # style for a bias that comes after it.
    base_model_tp_plan = {
        "encoder.layer.*.attention.self.query": "colwise",
        "encoder.layer.*.attention.self.key": "colwise",
        "encoder.layer.*.attention.self.value": "colwise",
        "encoder.layer.*.attention.output.dense": "rowwise",
        "encoder.layer.*.intermediate.dense": "colwise",
        "encoder.layer.*.output.dense": "rowwise",
    }

    @property
    def reads_left_to_right(self) -> bool:
        return bool(self.is_decoder)

    @property
    def base_ffn_size(self) -> int:
        return self.intermediate_size

    @property
    def ffn_activation(self) -> str:
        return self.hidden_act


__all__ = ["CSEBertConfig", "CSEGPT2Config"]
