# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""BERT with cluster-guided sparse experts: only what differs from the in-tree model."""

import torch
from torch import nn
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MaskedLMOutput
from transformers.models.bert.modeling_bert import (
    BertAttention,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
    BertModel,
    BertOnlyMLMHead,
    BertOnlyNSPHead,
    BertPreTrainedModel,
    BertPreTrainingHeads,
)
from transformers.processing_utils import Unpack
from transformers.pytorch_utils import apply_chunking_to_forward
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_cse import CSEBertConfig
from .dispatch_cse import RoutedAttention, RoutedBlock, RoutedFFN, RoutedModule, RoutedProjection, unchanged
from .experts_cse import CSEExperts, ExpertsEntrance
from .inputs_cse import check_inputs
from .losses_cse import pretraining_loss, sums_over_the_step
from .outputs_cse import CSEMaskedLMOutput, CSEPreTrainingOutput, carries_routing, takes_choices
from .pretrained_cse import CSEBaseMixin, CSEPreTrainedMixin
from .routing_cse import ClusterRouter, RoutingContext
from .threads_cse import PerThread


@use_experts_implementation(experts_interface=ExpertsEntrance(), has_gate=False, has_bias=True)
class CSEBertExperts(CSEExperts):
    """The shared experts; transformers wants the decorator in this file."""


class CSEBertMLP(nn.Module):
    """Router and experts of a layer. The base FFN stays where BERT has it, under its stock parameter names."""

    def __init__(self, config: CSEBertConfig):
        super().__init__()
        self.router = ClusterRouter(config)
        self.experts = CSEBertExperts(config)


class RoutedLinear(RoutedProjection, nn.Linear):
    """A projection of BERT's attention."""


class CSEBertAttention(RoutedAttention, BertAttention):
    """The stock self-attention under its stock parameter names, beside a router and experts."""

    def __init__(self, config: CSEBertConfig, layer_idx: int | None = None):
        super().__init__(config, is_causal=config.is_decoder, layer_idx=layer_idx)
        self.add_experts(config)
        width = config.hidden_size
        for name in ("query", "key", "value"):
            setattr(self.self, name, RoutedLinear(width, width, dispatch=self.dispatch, projection=name))
        self.output.dense = RoutedLinear(width, width, dispatch=self.dispatch, projection="out")

    def projections(self):
        inner = {name: getattr(self.self, name) for name in ("query", "key", "value")}
        return {**inner, "output.dense": self.output.dense}

    def base_weights(self, of=unchanged):
        inner = (self.self.query, self.self.key, self.self.value)
        return {
            "qkv_proj": torch.cat([of(projection.weight) for projection in inner]),
            "qkv_proj_bias": torch.cat([of(projection.bias) for projection in inner]),
            "out_proj": of(self.output.dense.weight),
            "out_proj_bias": of(self.output.dense.bias),
        }


class CSEBertLayer(RoutedBlock, RoutedFFN, BertLayer):
    """The stock layer with experts beside its FFN, its attention, or both."""

    chunk_size_feed_forward: int  # of the stock layer

    def __init__(self, config: CSEBertConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx=layer_idx)
        self.modules_with_experts = tuple(config.cse_modules)
        if "attention" in self.modules_with_experts:
            self.attention = CSEBertAttention(config, layer_idx=layer_idx)
        if "ffn" in self.modules_with_experts:
            self.mlp = CSEBertMLP(config)
            # The stock layer would cut the sequence before the router has seen it: only the base FFN is chunked here.
            self.ffn_chunk_size, self.chunk_size_feed_forward = self.chunk_size_feed_forward, 0
            self.contexts = PerThread()

    def routed_parts(self) -> dict[str, RoutedModule]:
        named = {"attention": self.attention, "ffn": self}
        return {name: module for name, module in named.items() if name in self.modules_with_experts}

    # `RoutedModule` says that they are there; nobody sets them here.
    @property
    def router(self) -> ClusterRouter:  # type: ignore[override]
        return self.mlp.router

    @property
    def experts(self) -> CSEExperts:  # type: ignore[override]
        return self.mlp.experts

    def base_ffn(self, states):
        if self.ffn_chunk_size and states.dim() == 3:
            return apply_chunking_to_forward(self._base_ffn_chunk, self.ffn_chunk_size, 1, states)
        return self._base_ffn_chunk(states)

    def _base_ffn_chunk(self, states):
        return self.output.dense(self.intermediate(states))

    def base_weights(self, of=unchanged):
        return {
            "up_proj": of(self.intermediate.dense.weight),
            "up_proj_bias": of(self.intermediate.dense.bias),
            "down_proj": of(self.output.dense.weight),
            "down_proj_bias": of(self.output.dense.bias),
        }

    def feed_forward_chunk(self, attention_output):
        if "ffn" not in self.modules_with_experts:
            return super().feed_forward_chunk(attention_output)
        ffn_output = self.output.dropout(self.routed_ffn(attention_output, self.context))
        return self.output.LayerNorm(ffn_output + attention_output)


class CSEBertPreTrainedModel(CSEPreTrainedMixin, BertPreTrainedModel):
    config: CSEBertConfig
    config_class = CSEBertConfig
    _can_record_outputs = {
        **BertPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(ClusterRouter, index=0),
        "cluster_ids": OutputRecorder(ClusterRouter, index=1),
    }


class CSEBertModel(CSEBaseMixin, CSEBertPreTrainedModel, BertModel):
    _auto_class = "AutoModel"
    _no_split_modules = ["BertEmbeddings", "BertLayer", "CSEBertLayer"]

    def __init__(self, config: CSEBertConfig, add_pooling_layer: bool = True):
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for index in config.cse_layer_indices:
            self.encoder.layer[index] = CSEBertLayer(config, layer_idx=index)
        self.add_evidence_router()
        if config.cse_layer_indices:  # otherwise the stock model has drawn its weights already
            self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def tables(self) -> dict[str, nn.Embedding]:
        found = self.embeddings
        names = {"input_ids": found.word_embeddings, "position_ids": found.position_embeddings}
        return {**names, "token_type_ids": found.token_type_embeddings}

    def stock_block(self, index: int) -> nn.Module:
        return BertLayer(self.config, layer_idx=index)

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_values=None,
        use_cache=None,
        given_clusters=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        given = input_ids, inputs_embeds, position_ids, token_type_ids, past_key_values
        check_inputs(self.tables(), self.config.hidden_size, *given)
        if self.config.cse_layer_indices:
            self.check_that_sequences_are_whole(past_key_values)
            text = input_ids, attention_mask, position_ids
            given_clusters = self._read_or_given(given_clusters, *text, past_key_values)
            context = RoutingContext.of(self, *text, given_clusters)
            kwargs.update(context.as_argument())
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


# Tied to the embedding, which the plan leaves whole: spread over processes as GPT-2's is, the head failed.
WHOLE_HEAD = {"cls.predictions.decoder": "replicate"}


class CSEBertForMaskedLM(CSEBertPreTrainedModel, BertForMaskedLM):
    _auto_class = "AutoModelForMaskedLM"
    _tp_plan = WHOLE_HEAD

    # The stock heads build a stock base: each `__init__` below stands for theirs, but for the base.
    def __init__(self, config: CSEBertConfig):
        super(BertForMaskedLM, self).__init__(config)
        self.bert = CSEBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        labels=None,
        num_items_in_batch=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """As the stock head, but with a loss that is right under gradient accumulation: the stock one is a mean over
        the micro-batch, which `Trainer` then takes for a sum over `num_items_in_batch` tokens."""
        outputs = super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            return_dict=True,
            **kwargs,
        )
        if labels is None:
            return outputs
        loss = self.loss_function(
            outputs.logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=num_items_in_batch
        )
        return MaskedLMOutput(loss=loss, **outputs)

    forward = carries_routing(forward, CSEMaskedLMOutput)


class CSEBertForPreTraining(CSEBertPreTrainedModel, BertForPreTraining):
    _auto_class = "AutoModelForPreTraining"
    _tp_plan = WHOLE_HEAD

    def __init__(self, config: CSEBertConfig):
        super(BertForPreTraining, self).__init__(config)
        self.bert = CSEBertModel(config)
        self.cls = BertPreTrainingHeads(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        next_sentence_label=None,
        num_items_in_batch=None,
        **kwargs: Unpack[TransformersKwargs],
    ):
        """As the stock head; with `num_items_in_batch`, the loss is `pretraining_loss`."""
        counted = num_items_in_batch is not None and labels is not None and next_sentence_label is not None
        outputs = super().forward(
            input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=None if counted else labels,
            next_sentence_label=None if counted else next_sentence_label,
            return_dict=True,
            **kwargs,
        )
        if counted:
            logits = outputs.prediction_logits, outputs.seq_relationship_logits
            loss = pretraining_loss(*logits, labels, next_sentence_label, num_items_in_batch)
            outputs = CSEPreTrainingOutput(loss=loss, **outputs)
        return outputs

    forward = carries_routing(forward, CSEPreTrainingOutput)


class CSEBertForNextSentencePrediction(CSEBertPreTrainedModel, BertForNextSentencePrediction):
    _auto_class = "AutoModelForNextSentencePrediction"

    def __init__(self, config: CSEBertConfig):
        super(BertForNextSentencePrediction, self).__init__(config)
        self.bert = CSEBertModel(config)
        self.cls = BertOnlyNSPHead(config)
        self.post_init()

    forward = carries_routing(sums_over_the_step(BertForNextSentencePrediction.forward))


def _classifier_dropout(config: CSEBertConfig) -> nn.Dropout:
    dropout = config.classifier_dropout
    return nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)


class CSEBertForSequenceClassification(CSEBertPreTrainedModel, BertForSequenceClassification):
    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: CSEBertConfig):
        super(BertForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = CSEBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = carries_routing(sums_over_the_step(BertForSequenceClassification.forward))


class CSEBertForMultipleChoice(CSEBertPreTrainedModel, BertForMultipleChoice):
    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config: CSEBertConfig):
        super(BertForMultipleChoice, self).__init__(config)
        self.bert = CSEBertModel(config)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    forward = carries_routing(sums_over_the_step(takes_choices(BertForMultipleChoice.forward)))


class CSEBertForTokenClassification(CSEBertPreTrainedModel, BertForTokenClassification):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: CSEBertConfig):
        super(BertForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = CSEBertModel(config, add_pooling_layer=False)
        self.dropout = _classifier_dropout(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = carries_routing(sums_over_the_step(BertForTokenClassification.forward))


class CSEBertForQuestionAnswering(CSEBertPreTrainedModel, BertForQuestionAnswering):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: CSEBertConfig):
        super(BertForQuestionAnswering, self).__init__(config)
        self.num_labels = config.num_labels
        self.bert = CSEBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    forward = carries_routing(BertForQuestionAnswering.forward)


__all__ = [
    "CSEBertForMaskedLM",
    "CSEBertForMultipleChoice",
    "CSEBertForNextSentencePrediction",
    "CSEBertForPreTraining",
    "CSEBertForQuestionAnswering",
    "CSEBertForSequenceClassification",
    "CSEBertForTokenClassification",
    "CSEBertModel",
    "CSEBertPreTrainedModel",
]
