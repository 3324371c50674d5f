# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
The lm-evaluation-harness, which is only imported here:

    python -m modeling_cse.evaluation.harness run --model cse --model_args pretrained=runs/mine/final --tasks wikitext

`cse` is the harness's `hf` for `cse_gpt2`, but refuses models whose log-likelihoods would mean something else.
"""

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM


@register_model("cse")
class CSEHarnessLM(HFLM):
    """As `hf`, with its arguments.

    Raises:
        ValueError: the model is no `cse_gpt2`, or its routes are not read from a token's own past.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.config
        if config.model_type != "cse_gpt2":
            raise ValueError(f"model_type={config.model_type!r} is not allowed: --model cse is for 'cse_gpt2'.")
        if config.cse_routing not in ("discriminant", "evidence") and config.cse_layer_indices:
            raise ValueError(
                f"cse_routing={config.cse_routing!r} is not allowed in the harness: it must be 'discriminant' or "
                "'evidence'. 'sequence' would read the route of the question from the answer, and 'given' comes with "
                "no task."
            )


if __name__ == "__main__":
    cli_evaluate()
