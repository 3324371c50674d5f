# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What every model of both families does when it is built, initialised and loaded."""

import torch

from .dispatch_cse import RoutedModule, Site
from .experts_cse import FusedExperts
from .routing_cse import ClusterRouter


class OutOfTreeMixin:
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
    _keep_in_fp32_modules_strict = ["centroids", "radii", "discriminant_weight", "discriminant_bias"]

    def __init__(self, config, *args, **kwargs):
        config.validate_cse_flags()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, FusedExperts):
            module.init_weights()
        elif isinstance(module, ClusterRouter):
            module.reset_buffers()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """As upstream, dense checkpoints included (their missing keys are experts and routers).

        Raises:
            ValueError: the checkpoint has experts but lacks their router, so that nothing could ever be routed.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        missing = set(info["missing_keys"])
        routers = sorted(key for key in missing if ".router." in key)
        without_experts = {key.split(".experts.")[0] for key in missing if ".experts." in key}
        lost = [key for key in routers if key.split(".router.")[0] not in without_experts]
        if lost:
            raise ValueError(
                f"The checkpoint {pretrained_model_name_or_path!r} has experts but lacks the routing state "
                f"{lost}: it was cut or edited. Save it again with save_pretrained."
            )
        return (model, info) if output_loading_info else model


class CSEBaseMixin:
    """What the base models of both families share. A family says where its blocks stand (`blocks`), and how a stock
    one is made (`stock_block(index)`)."""

    def routed_modules(self) -> dict[Site, RoutedModule]:
        """The modules with experts, in the order in which data meets them."""
        return {
            Site(index, name): module
            for index in self.config.cse_layer_indices
            for name, module in self.blocks[index].routed_parts().items()
        }

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


__all__ = ["CSEBaseMixin", "CSEPreTrainedMixin", "OutOfTreeMixin"]
