# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""BERT as a decoder with the stock head, which the package does not ship: upstream's tests of causal masks, caches and
generation see our base model through it."""

from transformers.generation import GenerationMixin
from transformers.models.bert.modeling_bert import BertLMHeadModel, BertOnlyMLMHead

from modeling_cse import CSEBertConfig, CSEBertModel
from modeling_cse.modeling_cse_bert import WHOLE_HEAD, CSEBertPreTrainedModel
from modeling_cse.outputs_cse import CSECausalLMOutput, carries_routing


class CSEBertLMHeadModel(CSEBertPreTrainedModel, BertLMHeadModel, GenerationMixin):
    """Stands in a file of its own because upstream's tests look for the source of a class by its module."""

    _tp_plan = WHOLE_HEAD

    def __init__(self, config: CSEBertConfig):
        super(BertLMHeadModel, self).__init__(config)
        self.bert = CSEBertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()

    forward = carries_routing(BertLMHeadModel.forward, CSECausalLMOutput)
