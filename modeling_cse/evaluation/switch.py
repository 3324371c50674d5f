# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""The opponent: GPT-2 and BERT with a learned top-1 router, as Switch Transformers (Fedus et al., arXiv 2101.03961).

A baseline for measurements, no part of the public model family, and unknown to the Auto classes. In `switch_layers`,
E experts of the base's width stand in place of the FFN; a token's answer is that of its most probable expert times the
probability (equations 1 and 2). As in the paper: an fp32 router without bias, multiplicative input jitter in training,
and the load-balancing loss alpha * E * sum_i f_i P_i (equations 4 to 6) of each layer, added up. Unlike the paper:
- no capacity (equation 3), so that no token is ever dropped, which favours this baseline;
- weights are drawn as the base model draws its own; no extra dropout in experts, which the paper has for fine-tuning.
"""

from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.func import functional_call
from transformers import BertConfig, GPT2Config
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertModel, BertOnlyMLMHead
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel, GPT2Model
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from ..pretrained_cse import OutOfTreeMixin


if TYPE_CHECKING:
    # what a mixin stands before
    from transformers import PreTrainedConfig as Stock
else:
    Stock = object


def _is_number(value: Any, kind: Any, least: float, most: float = float("inf")) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value <= most


@dataclass(repr=False, kw_only=True)
class SwitchFlags(Stock):
    """
    The flags both families share.

    Args:
        switch_layers (`list[int]`, *optional*): layers with experts, negative ones from the end; default the last two.
        switch_num_experts (`int`, defaults to 4): experts a layer, each as wide as the base FFN.
        switch_alpha (`float`, defaults to 0.01, the paper's): weight of the load-balancing loss of each layer.
        switch_jitter (`float`, defaults to 0.01): in training, the router's input is multiplied by uniform noise in
            [1 - jitter, 1 + jitter] from torch's global generator, as dropout is. So says the paper's text (appendix
            C); its listing adds noise to the logits, and leaves the number open. 0.01 is the default of the library
            that it was written in (Mesh TensorFlow) and of transformers' Switch models.
    """

    # `Any` keeps the type checks of `@strict` away: they raise an error class of their own, which is no ValueError.
    switch_layers: Any = None
    switch_num_experts: Any = 4
    switch_alpha: Any = 0.01
    switch_jitter: Any = 0.01

    # `Trainer` gathers what is not named here as if it were a prediction.
    keys_to_ignore_at_inference = ["past_key_values", "aux_loss", "router_logits"]

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_switch_flags()

    def validate_switch_flags(self) -> None:
        """Raises `ValueError` naming the flag, its value and what is allowed. Models call it again when they are
        built, because `from_pretrained(..., flag=value)` sets flags on a finished config."""
        depth, layers = self.num_hidden_layers, self.switch_layers
        named = layers if isinstance(layers, list | tuple) else []
        distinct = {index % depth for index in named if index in range(-depth, depth)}
        checks = {
            "switch_layers": (
                layers is None or 0 < len(named) == len(distinct),
                f"None or a list of at least one layer from {-depth} to {depth - 1}, none twice",
            ),
            "switch_num_experts": (_is_number(self.switch_num_experts, int, 1), "an int >= 1"),
            "switch_alpha": (_is_number(self.switch_alpha, int | float, 0), "a number >= 0"),
            "switch_jitter": (_is_number(self.switch_jitter, int | float, 0, 1), "a number from 0 to 1"),
            # rows of grouped matrix products start on 16-byte boundaries, in bf16 too
            "hidden_size": (self.hidden_size % 8 == 0, "a multiple of 8"),
            "ffn_size": (self.ffn_size % 8 == 0, "a multiple of 8"),
        }
        for flag, (passed, allowed) in checks.items():
            if not passed:
                raise ValueError(f"{flag}={getattr(self, flag)!r} is not allowed: it must be {allowed}.")

    @property
    def switch_layer_indices(self) -> list[int]:
        """The layers of `switch_layers` as sorted indices from the front."""
        depth = self.num_hidden_layers
        layers = range(max(depth - 2, 0), depth) if self.switch_layers is None else self.switch_layers
        return sorted(index % depth for index in layers)


@strict
class SwitchGPT2Config(SwitchFlags, GPT2Config):
    """`GPT2Config` with the flags of `SwitchFlags`."""

    model_type = "switch_gpt2"
    # GPT-2 draws the residual projections narrower, the deeper it is.
    down_proj_std = property(lambda self: self.initializer_range / sqrt(2 * self.n_layer))
    ffn_size = property(lambda self: self.n_inner if self.n_inner is not None else 4 * self.n_embd)
    ffn_activation = property(lambda self: self.activation_function)
    ffn_dropout = property(lambda self: self.resid_pdrop)


@strict
class SwitchBertConfig(SwitchFlags, BertConfig):
    """`BertConfig` with the flags of `SwitchFlags`."""

    model_type = "switch_bert"
    down_proj_std = property(lambda self: self.initializer_range)
    ffn_size = property(lambda self: self.intermediate_size)
    ffn_activation = property(lambda self: self.hidden_act)
    ffn_dropout = 0.0  # it stays in `BertOutput`


@dataclass
class SwitchOutput(ModelOutput):
    """Of both families. `loss`: the pure language-modelling loss in evaluation mode, with the balance added in
    training; `aux_loss`: alpha times the load-balancing losses of this batch, summed over layers, if there are labels;
    `router_logits`: per Switch layer (B, T, E) fp32, whose argmax is the expert."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None
    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


def load_balancing_loss(router_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """
    Equations 4 to 6 without alpha: E * sum_i f_i P_i, 1 for uniform routing and E for a router that knows one expert.

    Args:
        router_logits: (B, T, E) fp32.
        mask: (B, T), non-zero for the tokens that count.

    Returns:
        A scalar; 0 if no token counts. Gradients flow through P only, as in the paper.
    """
    experts = router_logits.shape[-1]
    weights = (mask / mask.sum().clamp_min(1)).to(router_logits.dtype).unsqueeze(-1)
    # sums, not matrix products: those would run in bf16 under autocast
    shares = (weights * F.one_hot(router_logits.argmax(-1), experts)).sum((0, 1))
    probabilities = (weights * router_logits.softmax(-1)).sum((0, 1))
    return experts * (shares * probabilities).sum()


class SwitchRouter(nn.Module):
    """(B, T, d) states give logits (B, T, E) and the best expert's probability (B, T), both fp32, and its index."""

    def __init__(self, config: SwitchFlags):
        super().__init__()
        self.jitter = config.switch_jitter
        self.classifier = nn.Linear(config.hidden_size, config.switch_num_experts, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # In bf16 the paper's model diverged (its table 2).
        with torch.autocast(hidden_states.device.type, enabled=False):
            states = hidden_states.float()
            if self.training and self.jitter:
                states = states * torch.empty_like(states).uniform_(1 - self.jitter, 1 + self.jitter)
            logits = F.linear(states, self.classifier.weight.float())
            expert_ids = logits.argmax(-1)
            return logits, logits.softmax(-1).gather(-1, expert_ids.unsqueeze(-1)).squeeze(-1), expert_ids


@use_experts_implementation(has_gate=False, has_bias=True)
class SwitchExperts(nn.Module):
    """The FFNs as fused tensors, in the layout of transformers' experts interface: `up_proj` (E, f, d),
    `up_proj_bias` (E, f), `down_proj` (E, d, f), `down_proj_bias` (E, d), with f the base's width."""

    def __init__(self, config: SwitchFlags):
        super().__init__()
        self.num_experts = config.switch_num_experts
        self.up_proj = nn.Parameter(torch.empty(self.num_experts, config.ffn_size, config.hidden_size))
        self.up_proj_bias = nn.Parameter(torch.empty(self.num_experts, config.ffn_size))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.hidden_size, config.ffn_size))
        self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, config.hidden_size))
        self.act_fn = ACT2FN[config.ffn_activation]

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        """The `eager` implementation: (N, d), (N, 1) and (N, 1) give (N, d). Idle experts are visited too, so that
        each parameter has a gradient, as DistributedDataParallel demands."""
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = (top_k_index == expert).nonzero(as_tuple=True)
            state = F.linear(hidden_states[token], self.up_proj[expert], self.up_proj_bias[expert])
            state = F.linear(self.act_fn(state), self.down_proj[expert], self.down_proj_bias[expert])
            state = state * top_k_weights[token, slot].unsqueeze(-1)
            output = output.index_add(0, token, state.to(output.dtype))
        return output

    def run(self, states: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Whatever implementation is configured: (N, d), (N,) and (N,) give (N, d)."""
        device, routes = states.device.type, (expert_ids.unsqueeze(-1), weights.unsqueeze(-1))
        if not torch.is_autocast_enabled(device):
            return self(states, *routes)
        # grouped matrix products do not know autocast: without this they would run in fp32
        dtype = torch.get_autocast_dtype(device)
        cast = {name: parameter.to(dtype) for name, parameter in self.named_parameters()}
        return functional_call(self, cast, (states.to(dtype), *routes))


class SwitchFFN(nn.Module):
    """Router and experts, (B, T, d) to (B, T, d). Padding is routed as well; only the balance leaves it out."""

    def __init__(self, config: SwitchFlags):
        super().__init__()
        self.router = SwitchRouter(config)
        self.experts = SwitchExperts(config)
        self.dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        _, weights, expert_ids = self.router(hidden_states)
        answers = self.experts.run(hidden_states.flatten(0, 1), expert_ids.flatten(), weights.flatten())
        return self.dropout(answers.view(hidden_states.shape))


class SwitchPreTrainedMixin(OutOfTreeMixin):
    """Stands before the stock `PreTrainedModel` subclass of a family."""

    def __init__(self, config, *args, **kwargs):
        config.validate_switch_flags()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SwitchExperts):
            init.normal_(module.up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.down_proj_std)
            init.zeros_(module.up_proj_bias)
            init.zeros_(module.down_proj_bias)


class SwitchHeadMixin(SwitchPreTrainedMixin):
    """The language-modelling `forward` of both families. A class with it has a `vocabulary_head`."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        num_items_in_batch=None,
        logits_to_keep=0,
        **kwargs,
    ) -> SwitchOutput:
        """As the stock heads. `num_items_in_batch` is the number of predicted tokens of a whole optimizer step, as
        `Trainer` counts them: the loss of this micro-batch is then its part of the loss of the step."""
        inputs = {"token_type_ids": token_type_ids, "position_ids": position_ids, "inputs_embeds": inputs_embeds}
        inputs |= {"attention_mask": attention_mask, "output_router_logits": True, "return_dict": True}
        outputs = self.base_model(input_ids, **inputs, **kwargs)
        logits = self.vocabulary_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = aux_loss = None
        if labels is not None:
            vocabulary = self.config.vocab_size
            loss = self.loss_function(logits, labels, vocab_size=vocabulary, num_items_in_batch=num_items_in_batch)
            aux_loss = self._aux_loss(outputs.router_logits, attention_mask)
            if self.training:
                loss = loss + aux_loss * self._share_of_step(labels, num_items_in_batch)
        names = ("past_key_values", "hidden_states", "attentions", "router_logits")
        recorded = {name: outputs.get(name) for name in names}
        return SwitchOutput(loss=loss, logits=logits, aux_loss=aux_loss, **recorded)

    def _aux_loss(self, router_logits: tuple[torch.Tensor, ...], mask: torch.Tensor | None) -> torch.Tensor:
        mask = torch.ones_like(router_logits[0][..., 0]) if mask is None else mask
        if mask.dim() != 2:
            raise ValueError(f"attention_mask of shape {tuple(mask.shape)} is not allowed with labels: use (B, T).")
        mask = mask[:, -router_logits[0].shape[1] :]
        return self.config.switch_alpha * sum(load_balancing_loss(logits, mask) for logits in router_logits)

    def _share_of_step(self, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None):
        """`Trainer` adds up the losses of a step's micro-batches without dividing by their number, so each balance is
        weighed by predicted tokens, as the language-modelling loss is. The sum is the mean of the micro-batches'
        balances, not the balance of all their tokens: f_i P_i is not linear."""
        if num_items_in_batch is None:
            return 1.0
        predicted = labels[..., 1:] if self.loss_type == "ForCausalLM" else labels
        return (predicted != -100).sum() / num_items_in_batch


class SwitchGPT2Model(SwitchPreTrainedMixin, GPT2Model):
    config_class = SwitchGPT2Config
    _can_record_outputs = GPT2Model._can_record_outputs | {"router_logits": OutputRecorder(SwitchRouter)}

    def __init__(self, config: SwitchGPT2Config):
        super().__init__(config)
        for index in config.switch_layer_indices:
            self.h[index].mlp = SwitchFFN(config)
        self.post_init()


class SwitchGPT2ForCausalLM(SwitchHeadMixin, GPT2LMHeadModel, GenerationMixin):
    config_class = SwitchGPT2Config
    vocabulary_head = property(lambda self: self.lm_head)

    # The stock heads build a stock base: each `__init__` of a head stands for theirs, but for the base.
    def __init__(self, config: SwitchGPT2Config):
        super(GPT2LMHeadModel, self).__init__(config)
        self.transformer = SwitchGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


class SwitchBertModel(SwitchPreTrainedMixin, BertModel):
    config_class = SwitchBertConfig
    _can_record_outputs = BertModel._can_record_outputs | {"router_logits": OutputRecorder(SwitchRouter)}

    def __init__(self, config: SwitchBertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for index in config.switch_layer_indices:
            layer = self.encoder.layer[index]
            # dropout, residual and normalisation stay where BERT has them
            layer.intermediate, layer.output.dense = SwitchFFN(config), nn.Identity()
            layer.chunk_size_feed_forward = 0  # or router logits would be recorded chunk by chunk
        self.post_init()


class SwitchBertForMaskedLM(SwitchHeadMixin, BertForMaskedLM):
    config_class = SwitchBertConfig
    vocabulary_head = property(lambda self: self.cls)

    def __init__(self, config: SwitchBertConfig):
        super(BertForMaskedLM, self).__init__(config)
        self.bert = SwitchBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()


def count_parameters(model: nn.Module) -> dict[str, int]:
    """`total`: all parameters, tied ones once; `active`: without the experts that one token does not use."""
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = [module for module in model.modules() if isinstance(module, SwitchExperts)]
    return {"total": total, "active": total - sum(p[1:].numel() for module in experts for p in module.parameters())}


__all__ = [
    "SwitchBertConfig",
    "SwitchBertForMaskedLM",
    "SwitchBertModel",
    "SwitchExperts",
    "SwitchFlags",
    "SwitchGPT2Config",
    "SwitchGPT2ForCausalLM",
    "SwitchGPT2Model",
    "SwitchOutput",
    "SwitchRouter",
    "count_parameters",
    "load_balancing_loss",
]
