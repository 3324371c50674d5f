# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises under TRL's `SFTTrainer`: clusters are kept there as under the Trainer, each document of a packed row
counts as one sequence, and adapters train on what clusters there are."""

import pytest
import torch
from tiny import EVIDENCE, FLAGS, SIZES, activate, model_class, routed_modules
from tiny_runs import fit_steps, settings

from modeling_cse import ClusterExpertsCallback, CSEGPT2Config
from modeling_cse.data import train_tokenizer


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WORDS = ("snow rain hill wind sea", "court judge case law appeal", "patient dose drug trial cure")


def texts(count: int = 48) -> list[str]:
    """Sentences of three to eight words from three vocabularies of unequal shares."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(count):
        words = WORDS[(0, 0, 1, 2)[number % 4]].split()
        length = int(torch.randint(3, 9, (), generator=generator))
        made.append(" ".join(words[i] for i in torch.randint(0, 5, (length,), generator=generator)))
    return made


TEXTS = texts()
TOKENIZER = train_tokenizer(TEXTS, kind="gpt2", vocab_size=300)


def model(clustered: bool = False, **flags):
    ids = {name: TOKENIZER.eos_token_id for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    torch.manual_seed(0)
    made = model_class("gpt2", "ForCausalLM")(
        CSEGPT2Config(**{**SIZES["gpt2"], **FLAGS["gpt2"], **ids, "vocab_size": len(TOKENIZER), **flags})
    )
    return activate(made) if clustered else made


def sft(folder, made, callback=None, peft_config=None, **changes):
    options = {
        "output_dir": str(folder),
        "max_length": 24,
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "dataset_num_proc": None,
    }
    rows = datasets.Dataset.from_dict({"text": TEXTS})
    trainer = trl.SFTTrainer(
        made,
        args=trl.SFTConfig(**{**options, **changes}),
        train_dataset=rows,
        processing_class=TOKENIZER,
        peft_config=peft_config,
    )
    if callback is not None:
        callback.attach(trainer)
    return trainer


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Counting(ClusterExpertsCallback):
    """Keeps the number of sequences seen until the first fit."""

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 4:
            self.counts = {site: store.seen for site, store in self.collector.stores.items()}
        super().on_step_end(args, state, control, model, optimizer, **kwargs)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("flags", [{}, EVIDENCE], ids=["discriminant", "evidence"])
def test_clusters_are_kept_and_documents_counted(tmp_path, packing, activation_checkpointing, flags):
    callback = Counting(**settings(warmup=4, sample_size=16))  # nothing is read ahead
    made = model(**flags)
    options = {"packing": packing, "gradient_checkpointing": activation_checkpointing, "num_train_epochs": 1}
    trainer = sft(tmp_path, made, callback, **options)
    seen = []
    made.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]) if packing else None, with_kwargs=True
    )
    trainer.train()
    assert fit_steps(trainer) == [4, 6]
    assert all(module.router.num_clusters == 3 for module in routed_modules(made).values())
    assert losses(trainer)[-1] < losses(trainer)[0]
    documents = sum(int((ids == 0).sum()) for ids in seen[:4]) if packing else 16
    assert packing is False or documents > 16
    assert set(callback.counts.values()) == {documents}


@pytest.mark.parametrize("flags", [{}, {"cse_routing": "sequence"}, EVIDENCE], ids=str)
def test_packed_documents_have_the_loss_that_they_have_alone(tmp_path, flags):
    """Neither attention nor routes see over the border of a document."""
    made = model(clustered=True, **flags)
    trainer = sft(tmp_path, made, packing=True, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    made.eval()
    with torch.no_grad():
        packed = trainer.compute_loss(made, dict(batch))
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist() + [batch["input_ids"].shape[1]]
        alone, tokens = 0.0, 0
        for first, last in zip(starts, starts[1:], strict=False):
            ids = batch["input_ids"][:, first:last]
            if last - first > 1:
                alone += made(ids, labels=ids).loss.item() * (last - first - 1)
                tokens += last - first - 1
    assert len(starts) > 3
    assert packed.item() == pytest.approx(alone / tokens, abs=1e-5)


@pytest.mark.parametrize("flags", [{}, EVIDENCE], ids=["discriminant", "evidence"])
def test_the_loss_is_that_of_the_model(tmp_path, flags):
    """TRL computes it beside the head, in chunks."""
    made = model(clustered=True, **flags)
    trainer = sft(tmp_path, made, max_steps=1)
    batch = next(iter(trainer.get_train_dataloader()))
    made.eval()
    with torch.no_grad():
        theirs = trainer.compute_loss(made, dict(batch))
        ours = made(**batch).loss
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-5)


def test_adapters_train_on_the_clusters_that_there_are(tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["mlp.experts.up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets)
    trainer = sft(tmp_path, model(clustered=True), peft_config=config)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    moved = {name for name, tensor in trainer.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(".lora_" in name for name in moved)
    refused = sft(tmp_path, model(clustered=True), ClusterExpertsCallback(**settings()), peft_config=config)
    with pytest.raises(ValueError, match="PEFT"):
        refused.train()


def test_a_balancing_loss_cannot_be_asked_for(tmp_path):
    """Our routers are not learned: there is nothing to balance. TRL misses the number of experts in the config."""
    trainer = sft(tmp_path, model(clustered=True), router_aux_loss_coef=0.1, max_steps=1)
    with pytest.raises(AttributeError, match="num_experts"):
        trainer.train()
