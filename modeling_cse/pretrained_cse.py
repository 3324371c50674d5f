# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What every model of both families does when it is built, initialised and loaded."""

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers.utils import logging

from .dispatch_cse import RoutedModule, RoutedProjection, Site, is_quantized
from .evidence_cse import EvidenceRouter
from .experts_cse import FusedExperts
from .inputs_cse import holds_tokens
from .routing_cse import ClusterRouter, warn_that_routes_see_the_future


if TYPE_CHECKING:
    # what a mixin stands before
    from transformers import PreTrainedModel as Stock
else:
    Stock = object

logger = logging.get_logger(__name__)


class OutOfTreeMixin(Stock):
    """What transformers decides differently for models with experts that stand outside its own tree."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Upstream looks for the decorator in the source of the class, and remembers the answer on it, where subclasses
        # inherit it: a dense GPT-2 built first in a process would turn grouped products off for this one.
        return True

    def _initialize_weights(self, module, is_custom_code: bool = False):
        # For code from outside its own tree, upstream passes over modules without parameters of their own, and with
        # them over GPT-2's scaled initialisation of the residual projections. All we initialise with respects what
        # was loaded, so that the caution is not needed.
        super()._initialize_weights(module, is_custom_code=False)


class CSEPreTrainedMixin(OutOfTreeMixin):
    """Stands before the stock `PreTrainedModel` subclass of a family."""

    # Buffers made as fp32 stay so when weights are loaded in bf16; this says it for loaders that go by the name. The
    # int64 buffers must not be named: upstream would cast them to fp32 as well.
    _keep_in_fp32_modules_strict = [
        "centroids",
        "radii",
        "discriminant_weight",
        "discriminant_bias",
        "evidence",
        "log_shares",
    ]
    _no_split_modules: Any  # a list in the bodies of classes, a set in models
    _tp_plan: dict[str, str]

    def __init__(self, config, *args, **kwargs):
        config.validate_cse_flags()
        super().__init__(config, *args, **kwargs)

    def post_init(self):
        self._no_split_modules = set(type(self)._no_split_modules or ())
        super().post_init()
        # accelerate's FSDP refuses a name of which there is no module: all layers, or none, may have experts
        self._no_split_modules &= {type(module).__name__ for module in self.modules()}

    def init_parallel_plans(self) -> None:
        super().init_parallel_plans()
        if "attention" in self.config.cse_modules and self.config.cse_layer_indices:
            # what experts answer is whole, and a part of the base's answer cannot stand beside it
            self._tp_plan = {name: style for name, style in self._tp_plan.items() if ".attention." not in name}

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """
        As upstream.

        Raises:
            ValueError: a number of ranks that does not go into the attention heads, or pipeline parallelism.
        """
        config, sizes = model.config, distributed_config
        if sizes is not None and sizes.pp_size > 1:
            raise ValueError(
                f"pp_size={sizes.pp_size} is not allowed for {cls.__name__}: it has no pipeline plan, so it must be 1."
            )
        spread = any(".attention." in name for name in model.tp_plan)
        if sizes is not None and spread and config.num_attention_heads % sizes.tp_size:
            raise ValueError(
                f"tp_size={sizes.tp_size} is not allowed: it must divide num_attention_heads="
                f"{config.num_attention_heads}."
            )
        return super().maybe_distribute_model(model, distributed_config, mesh_manager)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FusedExperts):
            module.init_weights()
        elif isinstance(module, ClusterRouter | EvidenceRouter):
            module.reset_buffers()

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs):
        """As upstream; evidence has a row a token too.

        Raises:
            ValueError: the token that ends a document would be cut off.
        """
        separator = self.config.cse_separator_token_id
        if None not in (new_num_tokens, separator) and new_num_tokens <= separator:
            raise ValueError(
                f"new_num_tokens={new_num_tokens} is not allowed with cse_separator_token_id={separator}: it must be "
                "more than that, or the config name another separator, or none, first."
            )
        table = super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
        for module in self.modules():
            if isinstance(module, EvidenceRouter) and len(module.evidence) != self.config.vocab_size:
                module.resize(self.config.vocab_size)
        return table

    def save_pretrained(self, *args, **kwargs):
        # fully_shard gives the model a class of torch's, and upstream would save that one's code and name
        spread = type(self)
        self.__class__ = next(cls for cls in spread.__mro__ if not cls.__module__.startswith("torch."))
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = spread

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As upstream, dense checkpoints included (their missing keys are experts and routers). With a
        `quantization_config` a warning says how much of the model is not quantised, its experts first of all.

        Raises:
            ValueError: a file of weights is cut short or edited so that it cannot be read; the checkpoint has experts
                but lacks their router, so that nothing could ever be routed, or clusters but lacks the experts; a
                router holds what no clustering writes; `ignore_mismatched_sizes=True` would draw experts or clusters
                anew; there is no discriminant for `cse_routing="discriminant"`; or the `quantization_config` names
                experts or routers.
        """
        name = str(pretrained_model_name_or_path)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            # by its name: code that travels imports torch and transformers alone
            if type(error).__module__.partition(".")[0] != "safetensors":
                raise
            raise ValueError(
                f"The weights of the checkpoint {name!r} (model*.safetensors) cannot be read: they were cut short or "
                f"edited ({error})."
            ) from error
        model._check_what_was_loaded(name, info["missing_keys"], {key for key, *_ in info["mismatched_keys"]})
        if getattr(model, "is_quantized", False) and model.config.cse_layer_indices:
            model._check_what_is_quantized()
        flaw = model.base_model.routing_flaw()
        if flaw is not None:
            raise ValueError(
                f"The weights of the checkpoint {name!r} (model*.safetensors) were cut or edited: {flaw}."
            )
        if any(module.router.lacks_discriminant for module in model.base_model.routed_modules().values()):
            raise ValueError(
                f"cse_routing='discriminant' is not allowed for the checkpoint {name!r}: its clusters were found for "
                "cse_routing='evidence', without a discriminant, so that every token would go the same way. It must "
                "be 'evidence', or 'sequence', which reads their centroids."
            )
        return (model, info) if output_loading_info else model

    def _check_what_was_loaded(self, name: str, missing: Collection[str], mismatched: Collection[str]) -> None:
        """Whether what the checkpoint `name` lacks, or has in other shapes, may be drawn anew: keys of the model."""
        anew = sorted(key for key in mismatched if {"experts", "router", "evidence_router"} & set(key.split(".")))
        if anew:
            raise ValueError(
                f"ignore_mismatched_sizes=True is not allowed for {anew} of the checkpoint {name!r}: they would be "
                "drawn anew, and stay in use beside what fits. The flags cse_expert_size, cse_num_experts and "
                "cse_max_clusters must be those that it was trained with; the vocabulary changes by "
                "resize_token_embeddings(...)."
            )
        without_experts = {key.split(".experts.")[0] for key in missing if ".experts." in key}
        lost = sorted(key for key in missing if ".router." in key and key.split(".router.")[0] not in without_experts)
        with_experts = {key.split(".experts.")[0] for key, _ in self.named_parameters() if ".experts." in key}
        if with_experts - without_experts:
            lost += sorted(key for key in missing if "evidence_router." in key)
        if lost:
            raise ValueError(
                f"The checkpoint {name!r} has experts but lacks the routing state "
                f"{lost}: it was cut or edited, or saved with other cse_* flags than it is loaded with."
            )
        routers = {place: cast(ClusterRouter, self.get_submodule(place).router) for place in sorted(without_experts)}
        idle = [place for place, it in routers.items() if not it.cluster_sizes.is_meta and it.num_clusters]
        if idle:
            raise ValueError(
                f"The checkpoint {name!r} has clusters but lacks the experts of {idle}: it was cut or edited."
            )

    def _check_what_is_quantized(self) -> None:
        # torchao can be told to quantise any parameter or buffer, but grouped products and routes take no codes
        for name, module in self.named_modules():
            if isinstance(module, FusedExperts | ClusterRouter | EvidenceRouter):
                for own, tensor in (*module.named_parameters(), *module.named_buffers()):
                    if tensor.is_floating_point() and is_quantized(tensor):
                        raise ValueError(
                            f"quantization_config quantises {name}.{own}, which is not allowed: fused experts and "
                            "routers must keep their floating types. Leave them out of it."
                        )
        # Upstream converts modules that it knows, and passes over fused experts without a word.
        experts = {id(p) for m in self.modules() if isinstance(m, FusedExperts) for p in m.parameters()}
        plain = {id(p): p.numel() for p in self.parameters() if not is_quantized(p)}
        inside, everything = sum(plain.get(each, 0) for each in experts), self.num_parameters()
        logger.warning(
            f"{type(self).__name__} is loaded with {self.quantization_method.value} quantisation, which passes over "
            f"experts: {inside:,} weights of theirs, {inside / everything:.0%} of the model, are not quantised. With "
            f"embeddings and all else that is not, it is {sum(plain.values()) / everything:.0%}."
        )

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """As upstream. Quantisers put their own linear layers in the place of others by it; one that replaces a
        projection of an attention with experts becomes a routed projection."""
        old = self.get_submodule(target)
        super().set_submodule(target, module, strict)
        if isinstance(old, RoutedProjection) and not any(each is old for each in module.modules()):
            old.hand_over(module)


class CSEBaseMixin(Stock):
    """What the base models of both families share. A family says where its blocks stand (`blocks`), how a stock one is
    made (`stock_block(index)`), and which of its embeddings answer to which argument (`tables()`)."""

    def routed_modules(self) -> dict[Site, RoutedModule]:
        """The modules with experts, in the order in which data meets them."""
        return {
            Site(index, name): module
            for index in self.config.cse_layer_indices
            for name, module in self.blocks[index].routed_parts().items()
        }

    def routing_flaw(self) -> str | None:
        """What no clustering can have written into the routing state, by the name of the buffer; None if all is
        well."""
        for site, module in self.routed_modules().items():
            flaw = module.router.flaw(module.num_experts)
            if flaw is not None:
                return f"{site}.router.{flaw}"
        flaw = self.evidence_router.flaw() if hasattr(self, "evidence_router") else None
        return None if flaw is None else f"evidence_router.{flaw}"

    def add_evidence_router(self) -> None:
        """What `cse_routing="evidence"` needs beside the routers of the sites; once the stock modules stand."""
        if self.config.cse_layer_indices and self.config.cse_routing == "evidence":
            self.evidence_router = EvidenceRouter(self.config)

    def read_clusters(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The cluster of every token by the evidence of its text (`cse_routing="evidence"`), in the form that
        `given_clusters` takes. Where a cache holds the beginning of a text, its last columns are those of the tokens
        that are new.

        Args:
            input_ids: (B, T) whole texts. `attention_mask`, `position_ids`: as in `forward`.

        Returns:
            (B, T) int64 or (B, T, C) fp32, see `EvidenceRouter.forward`.

        Raises:
            ValueError: another routing.
        """
        if getattr(self, "evidence_router", None) is None:
            raise ValueError(
                f"cse_routing={self.config.cse_routing!r} with cse_layers={self.config.cse_layers!r} is not allowed "
                "for read_clusters: it must be 'evidence', with at least one layer."
            )
        return self.evidence_router(input_ids, attention_mask, position_ids)

    def _read_or_given(self, given_clusters, input_ids, attention_mask, position_ids, past_key_values):
        """The clusters of a forward pass under `cse_routing="evidence"`: those given, or what is read of the text."""
        if given_clusters is not None or self.config.cse_routing != "evidence":
            return given_clusters
        if input_ids is None:
            raise ValueError(
                "inputs_embeds without given_clusters is not allowed with cse_routing='evidence', which reads tokens: "
                "pass input_ids (generate() takes them beside inputs_embeds), or to a forward pass "
                "given_clusters=base_model.read_clusters(input_ids)."
            )
        if holds_tokens(past_key_values):
            raise ValueError(
                "past_key_values without given_clusters is not allowed with cse_routing='evidence', which reads texts "
                "from their beginning: pass given_clusters=base_model.read_clusters(all_ids)[:, -new:], as generate() "
                "does. What feeds a cache by itself (generate(guidance_scale=...), EncoderDecoderModel.generate) "
                "wants use_cache=False."
            )
        return self.read_clusters(input_ids, attention_mask, position_ids)

    def check_that_sequences_are_whole(self, past_key_values) -> None:
        """
        Says once that routes of a causal model see later tokens.

        Raises:
            ValueError: `cse_routing="sequence"`, and a cache holds the beginning of the sequences.
        """
        if self.config.cse_routing != "sequence":
            return
        if holds_tokens(past_key_values):
            raise ValueError(
                "past_key_values is not empty, which cse_routing='sequence' does not allow: a route over the whole "
                "sequence cannot be read from its last tokens. Use the causal routing that the clusters were found "
                "for, 'evidence' or 'discriminant'."
            )
        if self.config.reads_left_to_right:
            warn_that_routes_see_the_future(type(self).__name__)

    def drop_idle_layers(self) -> None:
        """Turns layers of which no router holds clusters into stock layers with the same parameters, and says so in
        the config. For `cse_layers="auto"`, once the layers are chosen."""
        kept = sorted({site.layer for site, module in self.routed_modules().items() if module.router.num_clusters})
        for index in sorted({*self.config.cse_layer_indices} - {*kept}):
            old = self.blocks[index]
            with torch.device("meta"):
                new = self.stock_block(index)
            missing, _ = new.load_state_dict(old.state_dict(keep_vars=True), strict=False, assign=True)
            if missing:
                raise RuntimeError(f"layer {index} cannot become a stock layer: it lacks {missing}.")
            new.gradient_checkpointing = old.gradient_checkpointing
            if hasattr(old, "_gradient_checkpointing_func"):
                new._gradient_checkpointing_func = old._gradient_checkpointing_func
            self.blocks[index] = new.train(old.training)
        self.config.cse_layers = kept
        if not kept and hasattr(self, "evidence_router"):
            del self.evidence_router


__all__ = ["CSEBaseMixin", "CSEPreTrainedMixin", "OutOfTreeMixin"]
