# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Models loaded in two processes under a plan of transformers (`CASES` by name, and what is asked of them):

    python -m torch.distributed.run --nproc_per_node 2 tests/distributed/parallel_plans.py FOLDER
"""

import os
import sys
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from tiny import LANGUAGE_HEAD, activate, labelled, tiny_model, token_ids
from tiny_runs import make_trainer, rows, settings
from transformers.distributed import DistributedConfig

from modeling_cse import ClusterExpertsCallback
from modeling_cse.sharding_cse import is_sharded, values_here, whole
from modeling_cse.training import fit_experts
from modeling_cse.training.gathering import rank


BOTH = {"cse_modules": ["attention", "ffn"], "cse_combine": "add"}
TENSOR, EXPERT, DATA = {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}, {"fsdp_size": 2, "ep_size": 2}
SIZES = {"tensor": TENSOR, "expert": EXPERT, "data": DATA, "fsdp": {"fsdp_size": 2}}


class Case(NamedTuple):
    family: str
    sizes: dict[str, int]  # of `DistributedConfig`
    flags: dict[str, Any] = {}
    trained: bool = False
    static: bool = False  # shapes as on an accelerator
    own_batches: bool = False  # of which only the first rank's has tokens for experts

    def model(self):
        return activate(tiny_model(self.family, **self.flags))

    def batch(self, number: int) -> dict[str, torch.Tensor]:
        """The batch of a rank."""
        batch = labelled(self.family, LANGUAGE_HEAD[self.family], seed=number if self.own_batches else 0)
        if self.own_batches:
            batch["given_clusters"] = torch.full((4,), [1, 0][number])
        return batch

    def answer(self, model, number: int) -> dict[str, Any]:
        model.train(self.trained)
        with torch.set_grad_enabled(self.trained):
            outputs = model(**self.batch(number))
        if self.trained:
            outputs.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {
            "logits": whole(outputs.logits).detach(),
            "gradients": {name: whole(gradient) for name, gradient in gradients.items()},
        }


CASES = {
    f"{family}-{kind}-{form}": Case(family, sizes, flags)
    for family in ("gpt2", "bert")
    for kind, sizes in SIZES.items()
    for form, flags in {"replace": {}, "both_add": BOTH}.items()
}
CASES |= {f"{name}-trained": case._replace(trained=True) for name, case in CASES.items()}
CASES |= {
    "gpt2-expert-static": Case("gpt2", EXPERT, static=True),
    "gpt2-expert-static-trained": Case("gpt2", EXPERT, static=True, trained=True),
    "bert-tensor-static-trained": Case("bert", TENSOR, static=True, trained=True),
    "gpt2-data-own_batches": Case("gpt2", DATA, {"cse_routing": "given"}, own_batches=True),
    "bert-data-own_batches": Case("bert", DATA, {"cse_routing": "given"}, own_batches=True),
}


@contextmanager
def static_shapes():
    """Shapes that do not depend on data, as on accelerators."""
    with ExitStack() as stack:
        for place in ("dispatch_cse", "experts_cse"):
            stack.enter_context(mock.patch(f"modeling_cse.{place}.shapes_may_depend_on_data", lambda tensor: False))
        yield


def loaded(model, folder: Path, sizes: dict[str, int]):
    """The model as `from_pretrained` loads it under a plan."""
    if rank() == 0:
        model.save_pretrained(folder)
    torch.distributed.barrier()
    return type(model).from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()


def play(case: Case, folder: Path) -> dict[str, Any]:
    model = loaded(case.model(), folder, case.sizes)
    with static_shapes() if case.static else nullcontext():
        answer = case.answer(model, rank())
    held = {name: values_here(p).numel() for name, p in model.named_parameters() if is_sharded(p)}
    return {**answer, "held": held}


def generated(folder: Path) -> torch.Tensor:
    model = loaded(CASES["gpt2-expert-replace"].model(), folder, EXPERT)
    return model.generate(token_ids(1, 8), max_new_tokens=8, do_sample=False)


def saved_again(folder: Path) -> None:
    """Saves a model that is spread, into `folder / "again"`."""
    loaded(CASES["bert-expert-replace"].model(), folder, EXPERT).save_pretrained(folder / "again")


def message(call) -> str | None:
    """What a `ValueError` says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return None


def refusals(folder: Path) -> dict[str, str | None]:
    clustered = tiny_model("gpt2")
    parallel = {name: loaded(clustered, folder, sizes) for name, sizes in (("tensor", TENSOR), ("expert", DATA))}
    few_heads = tiny_model("bert", num_attention_heads=1)
    odd_slots = tiny_model("gpt2", cse_num_experts=3)
    trainer = make_trainer(folder, ClusterExpertsCallback(**settings()), model=parallel["expert"], data=rows())
    return {
        "callback": message(trainer.train),
        **{name: message(lambda m=m: fit_experts(m, [{"input_ids": token_ids()}])) for name, m in parallel.items()},
        "heads": message(lambda: loaded(few_heads, folder / "heads", TENSOR)),
        "slots": message(lambda: loaded(odd_slots, folder / "slots", EXPERT)),
        "pipeline": message(lambda: loaded(clustered, folder / "pipeline", {"pp_size": 2})),
    }


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # upstream takes an accelerator where there is one
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    folder = Path(sys.argv[1])
    result = {name: play(case, folder / name) for name, case in CASES.items()}
    result |= {"generated": generated(folder / "generated"), "refusals": refusals(folder / "refusals")}
    saved_again(folder / "saved")
    torch.save(result, folder / f"rank-{rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
