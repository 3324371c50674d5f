# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks of clusters share: a corpus of known domains, a resumable run on it, looks into the model."""

import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from modeling_cse import CSEBertConfig, CSEBertForMaskedLM, CSEGPT2Config, CSEGPT2ForCausalLM
from modeling_cse.clustering import RoutingFeatures
from modeling_cse.data import load_corpus, pack, split_by_domain, train_tokenizer
from modeling_cse.routing_cse import ClusterRouter
from modeling_cse.training import ClusterExpertsCallback, FeatureCollector, routed_base_model


DOMAINS = ("general", "legal", "medical")
# Clusters of hidden states, whatever a family's default is.
ROUTING = {"gpt2": "discriminant", "bert": "sequence"}
FAMILIES = {"gpt2": (CSEGPT2Config, CSEGPT2ForCausalLM), "bert": (CSEBertConfig, CSEBertForMaskedLM)}
DATA = Path(__file__).parent.parent / "examples" / "data"
CONFIGURATION = Path(__file__).parent.parent / "configuration"


@dataclass
class Corpus:
    """Blocks of `input_ids` of one domain each, with the domain's number in `DOMAINS` beside them, (N,) int64."""

    tokenizer: PreTrainedTokenizerBase
    training: Dataset
    training_domains: np.ndarray
    held_out: Dataset
    held_out_domains: np.ndarray


def known_domains(
    family: str, vocab_size: int, block_size: int, shares: tuple[float, ...], most: int | None, seed: int
) -> Corpus:
    """
    The sample corpus in blocks of one domain each. `shares` of the training blocks by domain, in the order of
    `DOMAINS`: blocks are left out at random until they hold, none is repeated. Held out is the whole validation
    split. With `most` there are at most about so many blocks of either.
    """
    texts = load_corpus(
        train_file=str(DATA / "train.jsonl.gz"),
        validation_file=str(DATA / "validation.jsonl.gz"),
        domain_column="domain",
    )
    tokenizer = train_tokenizer(texts["train"]["text"], kind=family, vocab_size=vocab_size)
    blocks = {
        split: split_by_domain(pack(texts[split], tokenizer, block_size=block_size, domain_column="domain"))
        for split in ("train", "validation")
    }
    total = min(len(blocks["train"][domain]) / share for domain, share in zip(DOMAINS, shares, strict=True))
    counts = [int(min(total, most or total) * share) for share in shares]
    training = [
        blocks["train"][domain].shuffle(seed=seed).select(range(count))
        for domain, count in zip(DOMAINS, counts, strict=True)
    ]
    held_out = [blocks["validation"][domain] for domain in DOMAINS]
    if most is not None:
        held_out = [part.select(range(min(len(part), most // len(DOMAINS)))) for part in held_out]
    numbers = np.arange(len(DOMAINS))
    return Corpus(
        tokenizer,
        concatenate_datasets(training),
        numbers.repeat(counts),
        concatenate_datasets(held_out),
        numbers.repeat([len(part) for part in held_out]),
    )


def routers(model: nn.Module) -> dict[int, ClusterRouter]:
    """The routers of a model by layer. The only place here that knows how a model names its routed modules."""
    return {site.layer: module.router for site, module in routed_base_model(model).routed_modules().items()}


def by_layer(collected: dict) -> dict[int, RoutingFeatures]:
    """What a `FeatureCollector` took, by layer."""
    return {site.layer: features for site, features in collected.items()}


@torch.no_grad()
def look(model: nn.Module, blocks: Dataset, tokens_per_sequence: int) -> dict[int, RoutingFeatures]:
    """Routing features of blocks (N rows) by layer, without dropout. With as many tokens as a block has, the tokens
    are all of them, in order."""
    collector = FeatureCollector(model, len(blocks), tokens_per_sequence, training_only=False)
    training = model.training
    model.eval()
    collector.attach()
    collector.enabled = True
    for batch in DataLoader(blocks.select_columns("input_ids"), 32, collate_fn=default_data_collator):
        with torch.autocast("cpu", torch.bfloat16):
            collector.base(input_ids=batch["input_ids"])
    collector.detach()
    model.train(training)
    return by_layer(collector.take())


@dataclass(frozen=True)
class Run:
    """Settings of a training run; each name means what it means in `TrainingArguments` or the callback."""

    family: str = "gpt2"
    config: str = "cse-gpt2-7m"
    vocab_size: int = 4096
    block_size: int = 256
    shares: tuple[float, ...] = (0.6, 0.2, 0.2)
    batch_size: int = 8
    learning_rate: float = 1.5e-3
    max_steps: int = 800
    warmup: int = 400
    recluster_every: int = 32
    num_clusters: int = 3
    common_share: float = 0.5
    blocks: int | None = None  # at most so many blocks of training and of held-out text; None: all
    sample_size: int = 512
    seed: int = 0

    @property
    def fits(self) -> list[int]:
        """Steps at whose end clusters are fitted."""
        return list(range(self.warmup, self.max_steps, self.recluster_every))

    @classmethod
    def smoke(cls) -> "Run":
        """A run of seconds."""
        return cls(
            config="cse-gpt2-1m",
            vocab_size=512,
            block_size=64,
            batch_size=4,
            max_steps=24,
            warmup=6,
            recluster_every=6,
            sample_size=48,
            blocks=200,
        )

    def corpus(self) -> Corpus:
        """The corpus this run is made on."""
        return known_domains(self.family, self.vocab_size, self.block_size, self.shares, self.blocks, self.seed)


class Watcher(ClusterExpertsCallback):
    """
    The callback as it is. Beside it, at each fit, the sample that was fitted and what the model makes of the held-out
    blocks go into a file, so that other ways to cluster can be tried on the same run without training again.

    Training sees no domain: the collator takes the column off, and notes the domains of each batch here.
    """

    def __init__(self, run: Run, corpus: Corpus, folder: Path):
        super().__init__(
            warmup=run.warmup,
            recluster_every=run.recluster_every,
            num_clusters=run.num_clusters,
            common_share=run.common_share,
            sample_size=run.sample_size,
            seed=run.seed,
        )
        self.run, self.corpus, self.folder = run, corpus, folder
        self.seen: list[list[int]] = []  # domains of the batches, by step
        self.inner = (
            default_data_collator
            if run.family == "gpt2"
            else DataCollatorForLanguageModeling(corpus.tokenizer, mlm_probability=0.15, seed=run.seed)
        )

    def collate(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        self.seen.append([row["domain"] for row in rows])
        return self.inner([{name: value for name, value in row.items() if name != "domain"} for row in rows])

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "domains.json"
        self.seen = json.loads(path.read_text()) if state.global_step else []

    def on_save(self, args, state, control, **kwargs):
        super().on_save(args, state, control, **kwargs)
        # the data loader is one batch ahead
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "domains.json"
        path.write_text(json.dumps(self.seen[: state.global_step]))

    def on_step_end(self, args, state, control, model, **kwargs):
        is_fit = state.global_step in self.run.fits
        sample = {layer: store.all() for layer, store in by_layer(self.collector.stores).items()} if is_fit else {}
        super().on_step_end(args, state, control, model=model, **kwargs)
        if not is_fit:
            return
        seen = [domain for batch in self.seen[: state.global_step] for domain in batch]
        taken = len(next(iter(sample.values())))
        tensors = {"domains": torch.tensor(seen[-taken:])}
        held_out = look(model, self.corpus.held_out, min(64, self.run.block_size))
        for layer, router in routers(model).items():
            # as `fit_layer` does it: clusters first, then the drift beside them
            level = sample[layer].detrended()
            count = router.num_clusters
            nearest = torch.cdist(level.embeddings, router.centroids[:count]).argmin(1)
            fitted = sample[layer].detrended(nearest.numpy())
            for kind, features in (("sample", fitted), ("held_out", held_out[layer])):
                tensors[f"{layer}.{kind}.embeddings"] = features.embeddings
                tensors[f"{layer}.{kind}.tokens"] = features.tokens.half()
                tensors[f"{layer}.{kind}.positions"] = features.positions
            tensors |= {f"{layer}.router.{name}": rows.clone() for name, rows in router.named_buffers()}
        path = self.folder / "fits" / f"{state.global_step}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)


@dataclass
class Fit:
    """
    What a run left of one fit.

    Fields:
        step: at whose end it was made.
        domains: (N,) int64 of the sample's sequences.
        sample, held_out: by layer; the sample as the fit saw it.
        buffers: by layer, the router's buffers after the fit.
    """

    step: int
    domains: np.ndarray
    sample: dict[int, RoutingFeatures]
    held_out: dict[int, RoutingFeatures]
    buffers: dict[int, dict[str, torch.Tensor]]

    @classmethod
    def load(cls, path: Path) -> "Fit":
        tensors = load_file(path)
        layers = sorted({int(name.split(".")[0]) for name in tensors if name != "domains"})

        def part(prefix: str) -> dict[str, torch.Tensor]:
            return {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}

        def features(kind: str) -> dict[int, RoutingFeatures]:
            parts = {layer: part(f"{layer}.{kind}.") for layer in layers}
            return {
                layer: RoutingFeatures(rows["embeddings"], rows["tokens"].float(), rows["positions"])
                for layer, rows in parts.items()
            }

        buffers = {layer: part(f"{layer}.router.") for layer in layers}
        sample = features("sample")
        domains = tensors["domains"].numpy()[-len(sample[layers[0]]) :]
        return cls(int(path.stem), domains, sample, features("held_out"), buffers)


def train(run: Run, corpus: Corpus, folder: Path) -> nn.Module:
    """
    Trains on the CPU in bf16 and returns the model; goes on from the last checkpoint in `folder`, or from the end.
    `folder/fits/<step>.safetensors` holds what each fit saw.
    """
    check_settings(folder / "run.json", asdict(run))
    config_class, model_class = FAMILIES[run.family]
    final = folder / "final"
    if (final / "config.json").is_file():
        return model_class.from_pretrained(final)
    set_seed(run.seed)
    ways = {"vocab_size": len(corpus.tokenizer), "cse_combine": "replace", "cse_routing": ROUTING[run.family]}
    config = config_class.from_pretrained(CONFIGURATION / run.config, **ways)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(corpus.tokenizer, name))
    watcher = Watcher(run, corpus, folder)
    checkpoint = get_last_checkpoint(folder)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=run.max_steps,
        per_device_train_batch_size=run.batch_size,
        learning_rate=run.learning_rate,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        warmup_steps=min(40, run.max_steps // 10),
        weight_decay=0.1,
        bf16=True,
        use_cpu=True,
        seed=run.seed,
        logging_steps=10,
        save_steps=max(run.max_steps // 10, 1),
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        resume_from_checkpoint=checkpoint,
    )
    training = corpus.training.add_column("domain", corpus.training_domains)
    trainer = Trainer(model_class(config), args, data_collator=watcher.collate, train_dataset=training)
    watcher.attach(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(final.with_name("final.partial")))
    final.with_name("final.partial").rename(final)
    return trainer.model


def known_experts(run: Run) -> int:
    """Expert slots a layer of the model of a run."""
    return FAMILIES[run.family][0].from_pretrained(CONFIGURATION / run.config).cse_num_experts


def check_settings(path: Path, settings: dict) -> None:
    """Writes the settings of a run into its folder, or refuses a folder of a run with others."""
    settings = json.loads(json.dumps(settings))
    if path.is_file() and json.loads(path.read_text()) != settings:
        raise ValueError(f"{path.parent} is not allowed as a run folder: it holds a run with other settings.")
    write_json(path, settings)


def write_json(path: Path, content: dict) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # a row of numbers is a line
    rows = re.sub(r"\[([^\[\]{}]*)\]", lambda row: "[" + " ".join(row[1].split()) + "]", json.dumps(content, indent=1))
    partial.write_text(rows + "\n")
    os.replace(partial, path)


def provenance(command: str) -> dict[str, str | int]:
    """When, where, how and from which commit a result was made."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "command": command,
        "commit": commit + (" with changes" if changed else ""),
    }


def processor() -> str:
    """The processor's name as Linux gives it, elsewhere as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
