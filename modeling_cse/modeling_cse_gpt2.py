# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""GPT-2 with cluster-guided sparse experts: only what differs from the in-tree model."""

from torch import nn
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2MLP,
    GPT2Attention,
    GPT2Block,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import OutputRecorder

from .configuration_cse import CSEGPT2Config
from .dispatch_cse import RoutedAttention, RoutedBlock, RoutedFFN, RoutedModule, RoutedProjection, unchanged
from .experts_cse import CSEExperts, ExpertsEntrance
from .inputs_cse import check_inputs
from .losses_cse import sums_over_the_step
from .outputs_cse import CSECausalLMOutput, carries_routing
from .pretrained_cse import CSEBaseMixin, CSEPreTrainedMixin
from .routing_cse import ClusterRouter, RoutingContext
from .threads_cse import PerThread


@use_experts_implementation(experts_interface=ExpertsEntrance(), has_gate=False, has_bias=True)
class CSEGPT2Experts(CSEExperts):
    """The shared experts; transformers wants the decorator in this file."""


class CSEGPT2MLP(RoutedFFN, GPT2MLP):
    """The stock FFN under its stock parameter names, beside a router and experts."""

    def __init__(self, intermediate_size: int, config: CSEGPT2Config):
        super().__init__(intermediate_size, config)
        self.router = ClusterRouter(config)
        self.experts = CSEGPT2Experts(config)
        self.contexts = PerThread()

    def base_ffn(self, states):
        return self.c_proj(self.act(self.c_fc(states)))

    def base_weights(self, of=unchanged):
        return {
            "up_proj": of(self.c_fc.weight).T,
            "up_proj_bias": of(self.c_fc.bias),
            "down_proj": of(self.c_proj.weight).T,
            "down_proj_bias": of(self.c_proj.bias),
        }

    def forward(self, hidden_states):
        return self.dropout(self.routed_ffn(hidden_states, self.context))


class RoutedConv1D(RoutedProjection, Conv1D):
    """A projection of GPT-2's attention."""


class CSEGPT2Attention(RoutedAttention, GPT2Attention):
    """The stock self-attention under its stock parameter names, beside a router and experts."""

    def __init__(self, config: CSEGPT2Config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.add_experts(config)
        width = self.embed_dim
        self.c_attn = RoutedConv1D(3 * width, width, dispatch=self.dispatch, projection="qkv")
        self.c_proj = RoutedConv1D(width, width, dispatch=self.dispatch, projection="out")

    def projections(self):
        return {"c_attn": self.c_attn, "c_proj": self.c_proj}

    def base_weights(self, of=unchanged):
        return {
            "qkv_proj": of(self.c_attn.weight).T,
            "qkv_proj_bias": of(self.c_attn.bias),
            "out_proj": of(self.c_proj.weight).T,
            "out_proj_bias": of(self.c_proj.bias),
        }


class CSEGPT2Block(RoutedBlock, GPT2Block):
    """The stock block with experts in its FFN, its attention, or both."""

    def __init__(self, config: CSEGPT2Config, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        if "attention" in config.cse_modules:
            self.attn = CSEGPT2Attention(config, layer_idx=layer_idx)
        if "ffn" in config.cse_modules:
            self.mlp = CSEGPT2MLP(config.base_ffn_size, config)

    def routed_parts(self) -> dict[str, RoutedModule]:
        named = {"attention": self.attn, "ffn": self.mlp}
        return {name: module for name, module in named.items() if isinstance(module, RoutedModule)}


class CSEGPT2PreTrainedModel(CSEPreTrainedMixin, GPT2PreTrainedModel):
    config: CSEGPT2Config
    config_class = CSEGPT2Config
    _no_split_modules = ["GPT2Block", "CSEGPT2Block"]
    _can_record_outputs = {
        **GPT2PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(ClusterRouter, index=0),
        "cluster_ids": OutputRecorder(ClusterRouter, index=1),
    }


class CSEGPT2Model(CSEBaseMixin, CSEGPT2PreTrainedModel, GPT2Model):
    _auto_class = "AutoModel"

    def __init__(self, config: CSEGPT2Config):
        super().__init__(config)
        for index in config.cse_layer_indices:
            self.h[index] = CSEGPT2Block(config, layer_idx=index)
        self.add_evidence_router()
        if config.cse_layer_indices:  # otherwise the stock model has drawn its weights already
            self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def tables(self) -> dict[str, nn.Embedding]:
        return {"input_ids": self.wte, "position_ids": self.wpe, "token_type_ids": self.wte}

    def stock_block(self, index: int) -> nn.Module:
        return GPT2Block(self.config, layer_idx=index)

    def forward(
        self,
        input_ids=None,
        past_key_values=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        use_cache=None,
        given_clusters=None,
        **kwargs,
    ):
        given = input_ids, inputs_embeds, position_ids, token_type_ids, past_key_values
        check_inputs(self.tables(), self.config.hidden_size, *given)
        if self.config.cse_layer_indices:
            self.check_that_sequences_are_whole(past_key_values)
            # (..., T), which the stock model flattens
            rows = None if input_ids is None else input_ids.view(-1, input_ids.shape[-1])
            text = rows, attention_mask, position_ids
            given_clusters = self._read_or_given(given_clusters, *text, past_key_values)
            context = RoutingContext.of(self, *text, given_clusters)
            kwargs.update(context.as_argument())
        return super().forward(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            use_cache=use_cache,
            **kwargs,
        )


class CSEGPT2ForCausalLM(CSEGPT2PreTrainedModel, GPT2LMHeadModel, GenerationMixin):
    _auto_class = "AutoModelForCausalLM"
    _tp_plan = {"lm_head": "colwise_gather_output"}

    # The stock heads build a stock base: each `__init__` below stands for theirs, word by word but for the base.
    def __init__(self, config: CSEGPT2Config):
        super(GPT2LMHeadModel, self).__init__(config)
        self.transformer = CSEGPT2Model(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()

    forward = carries_routing(GPT2LMHeadModel.forward, CSECausalLMOutput)

    def generate(self, *args, **kwargs):
        self._refuse_sequence_routes("generate")
        return super().generate(*args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        """As upstream, which prepares each chunk of a prompt without what comes before it: evidence needs all."""
        if self._reads_evidence() and generation_config.prefill_chunk_size is not None:
            model_kwargs["whole_prompt"] = input_ids, model_kwargs.get("position_ids")
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        model_kwargs.pop("whole_prompt", None)
        return outputs

    # `inputs_embeds` by name: upstream looks for it in the signature
    def prepare_inputs_for_generation(self, input_ids, *args, inputs_embeds=None, whole_prompt=None, **kwargs):
        """As upstream. Under `cse_routing="evidence"` the routes of the new tokens are read from the whole text."""
        inputs = super().prepare_inputs_for_generation(input_ids, *args, inputs_embeds=inputs_embeds, **kwargs)
        if self._reads_evidence() and inputs.get("given_clusters") is None and input_ids.shape[1]:
            text, positions = whole_prompt or (input_ids, kwargs.get("position_ids"))
            mask = kwargs.get("attention_mask")
            inputs["given_clusters"] = self._clusters_of_new_tokens(inputs, text, mask, positions)
        return inputs

    def _reads_evidence(self) -> bool:
        return self.config.cse_routing == "evidence" and bool(self.config.cse_layer_indices)

    def _clusters_of_new_tokens(self, inputs, text, attention_mask, position_ids):
        fed = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        cache = inputs.get("past_key_values")
        end = fed.shape[1] + (0 if cache is None else int(cache.get_seq_length()))
        if end > text.shape[1]:
            raise ValueError(
                f"input_ids of {text.shape[1]} tokens are not allowed with past_key_values of {end - fed.shape[1]}: "
                "with cse_routing='evidence', which reads texts from their beginning, they must hold all tokens."
            )
        mask = None if attention_mask is None else attention_mask[:, :end]
        whole = position_ids is not None and position_ids.shape[-1] >= end
        positions = position_ids[..., :end] if whole else None
        return self.transformer.read_clusters(text[:, :end], mask, positions)[:, -fed.shape[1] :]

    def generate_batch(self, *args, **kwargs):
        self._refuse_sequence_routes("generate_batch")
        if self.config.cse_routing in ("given", "evidence") and self.config.cse_layer_indices:
            raise ValueError(
                f"generate_batch() is not possible with cse_routing={self.config.cse_routing!r}: it hands on no "
                "given_clusters. Use generate()."
            )
        return super().generate_batch(*args, **kwargs)

    def _refuse_sequence_routes(self, method: str) -> None:
        if self.config.cse_routing == "sequence" and self.config.cse_layer_indices:
            raise ValueError(
                f"{method}() is not possible with cse_routing='sequence': the route of a token would depend on tokens "
                "that do not exist yet. Load the model with the causal routing that its clusters were found for, "
                "'evidence' or 'discriminant'."
            )


class CSEGPT2ForSequenceClassification(CSEGPT2PreTrainedModel, GPT2ForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: CSEGPT2Config):
        super(GPT2ForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = CSEGPT2Model(config)
        self.score = nn.Linear(config.n_embd, self.num_labels, bias=False)
        self.post_init()

    forward = carries_routing(sums_over_the_step(GPT2ForSequenceClassification.forward))


class CSEGPT2ForTokenClassification(CSEGPT2PreTrainedModel, GPT2ForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: CSEGPT2Config):
        super(GPT2ForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = CSEGPT2Model(config)
        classifier_dropout = getattr(config, "classifier_dropout", None)
        if classifier_dropout is None:
            classifier_dropout = getattr(config, "hidden_dropout", None)
        self.dropout = nn.Dropout(0.1 if classifier_dropout is None else classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = carries_routing(sums_over_the_step(GPT2ForTokenClassification.forward))


class CSEGPT2ForQuestionAnswering(CSEGPT2PreTrainedModel, GPT2ForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: CSEGPT2Config):
        super(GPT2ForQuestionAnswering, self).__init__(config)
        self.num_labels = config.num_labels
        self.transformer = CSEGPT2Model(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    forward = carries_routing(GPT2ForQuestionAnswering.forward)


__all__ = [
    "CSEGPT2ForCausalLM",
    "CSEGPT2ForQuestionAnswering",
    "CSEGPT2ForSequenceClassification",
    "CSEGPT2ForTokenClassification",
    "CSEGPT2Model",
    "CSEGPT2PreTrainedModel",
]
