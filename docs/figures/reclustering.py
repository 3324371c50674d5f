# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Makes the picture of what re-clustering does, out of a short real training run (minutes on two CPU cores):

    python docs/figures/reclustering.py

Model and data are those of the quickstart; clusters are of hidden states, which is not the default. After each fit the
model embeds the same training blocks of known domain, rare domains drawn more often than they occur; training itself
never sees a domain.
A block belongs to the cluster whose centroid is nearest to its embedding, as in k-means.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader
from transformers import AutoConfig, Trainer, TrainingArguments, default_data_collator, set_seed

from modeling_cse import CSEGPT2ForCausalLM
from modeling_cse.analysis import ClusterView, plot_reclustering
from modeling_cse.data import load_corpus, pack, split_by_domain, train_tokenizer
from modeling_cse.runs.arguments import has_bf16
from modeling_cse.training import ClusterExpertsCallback, FeatureCollector


SEED = 0
FITS = (180, 280, 380)  # the last two are shown
BLOCKS = {"general": 250, "legal": 100, "medical": 100}


class Watcher(ClusterExpertsCallback):
    """The callback as it is, with a look at the same blocks after each fit."""

    def __init__(self, blocks: Dataset, domains: list[str], **settings):
        super().__init__(**settings)
        self.blocks, self.domains = blocks, domains
        self.views: list[ClusterView] = []

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        fits = self.memory.fits
        super().on_step_end(args, state, control, model=model, optimizer=optimizer, **kwargs)
        if self.memory.fits > fits:
            self.views.append(look(model, self.blocks, self.domains, state.global_step))


@torch.no_grad()
def look(model: CSEGPT2ForCausalLM, blocks: Dataset, domains: list[str], step: int) -> ClusterView:
    """What the last CSE layer makes of blocks (N rows of `input_ids`), and how its clusters divide them."""
    collector = FeatureCollector(model, len(blocks), training_only=False)
    site = list(collector.stores)[-1]
    collector.attach()
    collector.enabled = True
    model.eval()
    for batch in DataLoader(blocks, 25, collate_fn=default_data_collator):
        collector.base(input_ids=batch["input_ids"])
    collector.detach()
    model.train()
    embeddings = collector.take()[site].embeddings
    router = collector.base.routed_modules()[site].router
    count = router.num_clusters
    centroids, experts = router.centroids[:count], router.cluster_expert[:count]
    labels = torch.cdist(embeddings, centroids).argmin(-1)
    view = [tensor.numpy().copy() for tensor in (embeddings, labels, centroids, experts)]
    return ClusterView(*view, domains=domains, step=step)


def train(output: str) -> Watcher:
    """One short run without checkpoints."""
    torch.set_num_threads(1)  # sums in one order, so that the picture repeats
    set_seed(SEED)
    corpus = load_corpus(
        train_file="examples/data/train.jsonl.gz",
        validation_file="examples/data/validation.jsonl.gz",
        domain_column="domain",
    )["train"]
    tokenizer = train_tokenizer(corpus["text"], kind="gpt2", vocab_size=2048)
    blocks = pack(corpus, tokenizer, block_size=256, domain_column="domain")
    by_domain = split_by_domain(blocks)
    shown = [by_domain[domain].shuffle(seed=SEED).select(range(count)) for domain, count in BLOCKS.items()]
    domains = [domain for domain, count in BLOCKS.items() for _ in range(count)]
    watcher = Watcher(
        concatenate_datasets(shown).select_columns("input_ids"),
        domains,
        warmup=FITS[0],
        recluster_every=FITS[1] - FITS[0],
        algorithm="kmeans",
        num_clusters=4,
        common_share=0.7,
        sample_size=512,
        seed=SEED,
    )
    config = AutoConfig.from_pretrained(
        "configuration/cse-gpt2-1m",
        vocab_size=len(tokenizer),
        cse_routing="discriminant",
        cse_combine="add",
        cse_expert_size=512,
    )
    args = TrainingArguments(
        output_dir=output,
        max_steps=FITS[-1] + 1,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        bf16=has_bf16(use_cpu=True),  # the picture was made in bf16
        use_cpu=True,
        seed=SEED,
        logging_steps=40,
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(
        CSEGPT2ForCausalLM(config),
        args,
        data_collator=default_data_collator,
        train_dataset=blocks.remove_columns("domain"),
    )
    watcher.attach(trainer)
    trainer.train()
    return watcher


def describe(view: ClusterView) -> None:
    """Prints the blocks of each domain by expert."""
    owners, domains = view.sequence_experts(), np.asarray(view.domains)
    for expert in sorted(set(owners.tolist())):
        counts = {domain: int(((owners == expert) & (domains == domain)).sum()) for domain in BLOCKS}
        print(f"step {view.step}, {'common' if expert < 0 else f'expert {expert}'}: {counts}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/figures/reclustering.png"))
    output = parser.parse_args().output
    with tempfile.TemporaryDirectory() as folder:
        views = train(folder).views
    for view in views:
        describe(view)
    plot_reclustering(*views[-2:], output)


if __name__ == "__main__":
    main()
