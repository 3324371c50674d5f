#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Write on from a prompt, and see which expert each token asks.

    python examples/serve_with_pipeline.py --model runs/quickstart/cse "The patient was treated for"
    python examples/serve_with_pipeline.py --model user/name-on-the-hub "The court held that"
    python examples/serve_with_pipeline.py --smoke

Prints the text and under it the experts of its tokens, `.` where the common layers answer alone; in the small model of
`make quickstart` expert 0 is that of law:

    The court held that that it had been not on the ...
    experts: . 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 ...

Of a dense model it prints the text alone.
"""

import torch
from small_model import has_experts, model_of, parser_for
from transformers import pipeline

import modeling_cse  # noqa: F401 (registers the models; without it: pipeline(..., trust_remote_code=True))


@torch.no_grad()
def experts_of(model, ids: torch.Tensor) -> list[int]:
    """The expert of each token (T,) in the last layer with experts, -1 for none."""
    module = list(model.base_model.routed_modules().values())[-1]
    clusters = model(ids.unsqueeze(0), output_cluster_ids=True).cluster_ids[-1][0]
    return torch.where(clusters >= 0, module.router.cluster_expert[clusters], -1).tolist()


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("prompts", nargs="*", default=["The patient was treated for", "The court held that"])
    options = parser.parse_args()

    generate = pipeline("text-generation", model=model_of(options))
    tokenizer = generate.tokenizer
    torch.manual_seed(0)
    for prompt in options.prompts:
        (found,) = generate(prompt, max_new_tokens=8 if options.smoke else 40, pad_token_id=tokenizer.eos_token_id)
        print(found["generated_text"])
        if has_experts(generate.model.config):
            ids = tokenizer(found["generated_text"], return_tensors="pt").input_ids[0]
            asked = ("." if expert < 0 else str(expert) for expert in experts_of(generate.model, ids))
            print("experts:", " ".join(asked))


if __name__ == "__main__":
    main()
