# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Pretraining from text files to a report: what the GPT-2 and the BERT script share."""

from collections import Counter
from collections.abc import Iterator, Sized
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

from .. import CSEBertConfig, CSEBertForMaskedLM, CSEGPT2Config, CSEGPT2ForCausalLM
from ..data import (
    FreshMasks,
    end_token_id,
    label_at_random,
    label_by_domain,
    load_corpus,
    mask_once,
    pack,
    split_by_domain,
    train_tokenizer,
)
from ..evaluation import perplexity_for_trainer, row_losses_for_trainer
from ..hub import hardware
from ..training import ClusterExpertsCallback, check_checkpoint, last_complete_checkpoint
from .arguments import ClusterArguments, DataArguments, ModelArguments, parse_arguments
from .checks import called, check_arguments, check_best_metric, check_twin
from .extract import digest
from .folder import EpochCallback, JsonLinesCallback, SettingsCallback, check_folder, ends_with, note_interruption
from .recipes import find_config
from .report import report_run
from .smoke import little_text


@dataclass(frozen=True)
class Family:
    """What differs between the two scripts."""

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    causal: bool

    @property
    def dense_model_type(self) -> str:
        return self.config_class.model_type.removeprefix("cse_")


GPT2 = Family("gpt2", CSEGPT2Config, CSEGPT2ForCausalLM, causal=True)
BERT = Family("bert", CSEBertConfig, CSEBertForMaskedLM, causal=False)

# The model, and its twin without experts; each has a folder of its name.
RUNS = ("cse", "dense")

# Where a run lives and how it reports may change when it is resumed; everything else must not.
FREE_SETTINGS = {"output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "run_name", "push_to_hub"}


@dataclass
class Pretraining:
    """One run: arguments, and what was made of them in the order of its steps."""

    family: Family
    model_arguments: ModelArguments
    data_arguments: DataArguments
    cluster_arguments: ClusterArguments
    args: TrainingArguments

    def run(self) -> dict[str, Any]:
        """Trains the CSE model (and its dense twin if asked), evaluates by domain, saves, and reports.

        Returns:
            The report: perplexities by run and domain, expert shares by domain, the completed sentence.
        """
        self.folder = Path(self.args.output_dir)
        folders = [self.folder / name for name in RUNS]
        check_arguments(self.model_arguments, self.args, self.family.causal, folders)
        resume = self.args.resume_from_checkpoint is not None
        check_folder(self.folder, self._settings(), resume)
        callback = ClusterExpertsCallback(**self.cluster_arguments.callback_arguments(self.args.seed))
        self._load_data()
        check_best_metric(self.args, self.validation)
        self._model("cse")  # a wrong config must show before anything is written
        names = RUNS if self.cluster_arguments.compare_with_dense else RUNS[:1]
        results = {name: self._train(name, callback if name == "cse" else None) for name in names}
        return report_run(
            self.folder,
            results,
            self.validation,
            self._batches,
            settings=self._settings(),
            prompt=self.cluster_arguments.prompt,
            base_model=self.model_arguments.model_name_or_path,
            data=self._made_of(),
            datasets=self._on_the_hub(),
            hardware=hardware(self.args),
        )

    def _made_of(self) -> dict[str, str]:
        """Domain to the text that it has, in words. A stream is not counted, nor text whose domains are not known."""
        counts = Counter(self.training_domains or [])
        length = f"blocks of {self.data_arguments.block_size} tokens"
        if isinstance(self.training, Sized) and list(self.validation) == ["all"]:
            counts["all"] = len(self.training)
        return {
            domain: f"{counts[domain]} {length} to train on, {len(blocks)} to validate on"
            if domain in counts
            else f"{len(blocks)} {length} to validate on"
            for domain, blocks in self.validation.items()
        }

    def _on_the_hub(self) -> list[str]:
        """The data set, if it is one of the Hub's and no local folder."""
        name = self.data_arguments.dataset_name
        return [] if name is None or Path(name).exists() else [name]

    def _settings(self) -> dict[str, Any]:
        groups = {
            "model": asdict(self.model_arguments),
            "data": asdict(self.data_arguments),
            "clusters": asdict(self.cluster_arguments),
            "training": self.args.to_dict(),
        }
        return {
            f"{group}.{name}": value
            for group, values in groups.items()
            for name, value in values.items()
            if name not in FREE_SETTINGS and name != "token"
        } | {"data.content": self._content}

    @cached_property
    def _content(self) -> str | None:
        """By which changed text is told; None for a stream, which is not read beforehand, and for a named data set."""
        data = self.data_arguments
        if data.train_file is None or data.streaming:
            return None
        files: list[str] = []
        for split in (data.train_file, data.validation_file or []):
            files += [split] if isinstance(split, str) else split  # a recipe may name one file without a list
        return digest(files, names=True)

    # ---- data ----------------------------------------------------------------------------------------------------

    def _load_corpus(self) -> DatasetDict | IterableDatasetDict:
        data = self.data_arguments
        few = bool(data.smoke)
        corpus = load_corpus(
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            train_file=data.train_file,
            validation_file=data.validation_file,
            validation_split_percentage=data.validation_split_percentage,
            text_column=data.text_column,
            domain_column=data.domain_column,
            streaming=data.streaming,
            max_train_samples=None if few else data.max_train_samples,
            max_eval_samples=None if few else data.max_eval_samples,
            cache_dir=self.model_arguments.cache_dir,
            token=self.model_arguments.token,
            trust_remote_code=self.model_arguments.trust_remote_code,
            seed=self.args.seed,
        )
        if not few:
            return corpus
        return little_text(corpus, data, self.args.max_steps * self.args.per_device_train_batch_size, self.args.seed)

    def _load_data(self) -> None:
        data, corpus = self.data_arguments, self._load_corpus()
        self.tokenizer = self._load_tokenizer(corpus["train"])
        training = self._pack(corpus["train"], data.streaming)
        self.training = self._label(training, training)
        self.training_domains: list[str] | None = None  # training itself never sees them
        if isinstance(self.training, Dataset) and "domain" in self.training.column_names:
            self.training_domains = list(self.training["domain"])
            self.training = self.training.remove_columns("domain")
        validation = corpus["validation"]
        if isinstance(validation, IterableDataset):  # it is read many times, and by domain
            validation = Dataset.from_list(list(validation), features=validation.features)  # with names of domains
        self.validation = split_by_domain(self._label(self._pack(validation, False), training))
        if not self.family.causal:
            self.validation = {
                domain: mask_once(blocks, self.tokenizer, mlm_probability=data.mlm_probability, seed=self.args.seed)
                for domain, blocks in self.validation.items()
            }
        self.collator = default_data_collator
        if not self.family.causal:
            if isinstance(self.training, IterableDataset):
                self.collator = DataCollatorForLanguageModeling(self.tokenizer, mlm_probability=data.mlm_probability)
            else:
                self.training = FreshMasks(
                    self.training, self.tokenizer, mlm_probability=data.mlm_probability, seed=self.args.seed
                )

    def _load_tokenizer(self, corpus: Dataset | IterableDataset) -> PreTrainedTokenizerBase:
        model = self.model_arguments
        name = model.tokenizer_name or model.model_name_or_path
        if name is not None:
            return AutoTokenizer.from_pretrained(
                name,
                cache_dir=model.cache_dir,
                revision=model.model_revision,
                token=model.token,
                trust_remote_code=model.trust_remote_code,
            )
        if model.tokenizer_vocab_size is None:
            raise ValueError(
                "tokenizer_name=None is not allowed without model_name_or_path: name a tokenizer, or train one on "
                "the corpus with --tokenizer_vocab_size 8192."
            )
        texts = (row[self.data_arguments.text_column] for row in corpus)
        with called("tokenizer_vocab_size", "vocab_size"):
            return train_tokenizer(texts, kind=self.family.name, vocab_size=model.tokenizer_vocab_size)

    def _pack(self, documents: Dataset | IterableDataset, streaming: bool) -> Dataset | IterableDataset:
        data = self.data_arguments
        return pack(
            documents,
            self.tokenizer,
            block_size=data.block_size,
            text_column=data.text_column,
            domain_column=data.domain_column,
            num_proc=data.preprocessing_num_workers,
            streaming=streaming,
        )

    def _label(
        self, blocks: Dataset | IterableDataset, training: Dataset | IterableDataset
    ) -> Dataset | IterableDataset:
        """The clusters of a control, as a column. Those of domains are numbered by the training blocks in both splits:
        a domain that validation lacks must not shift the others."""
        control = self.cluster_arguments.control
        if control is None:
            return blocks
        shares = self.cluster_arguments.random_shares
        if shares is not None:  # those of control="random"
            with called("random_shares", "shares"):
                return label_at_random(blocks, shares, self.args.seed)
        if isinstance(training, IterableDataset) or "domain" not in training.column_names:
            raise ValueError("control='oracle' is not allowed without a domain_column, or with streaming=True.")
        return label_by_domain(blocks, sorted(set(training["domain"])), every_domain=False)

    def _batches(self, blocks: Dataset) -> Iterator[dict[str, torch.Tensor]]:
        # validation blocks are labelled already, in both families
        yield from DataLoader(blocks, self.args.per_device_eval_batch_size, collate_fn=default_data_collator)

    # ---- model ---------------------------------------------------------------------------------------------------

    def _config(self) -> PreTrainedConfig:
        model = self.model_arguments
        source = model.model_name_or_path or find_config(model.config_name)
        flags = {
            field.name: getattr(model, field.name)
            for field in fields(model)
            if field.name.startswith("cse_") and getattr(model, field.name) is not None
        }
        if self.cluster_arguments.control is not None:
            flags["cse_routing"] = "given"  # like the settings of clusters, so that a recipe serves its controls too
        if source is None:
            if model.model_type not in (None, self.family.config_class.model_type):
                raise ValueError(
                    f"model_type={model.model_type!r} is not allowed: this script trains "
                    f"{self.family.config_class.model_type!r}."
                )
            config = self.family.config_class(**flags)
        else:
            found = AutoConfig.from_pretrained(
                source, cache_dir=model.cache_dir, revision=model.model_revision, token=model.token
            )
            allowed = (self.family.config_class.model_type, self.family.dense_model_type)
            if found.model_type not in allowed:
                raise ValueError(f"{source!r} is of type {found.model_type!r}: it must be one of {list(allowed)}.")
            values = {name: value for name, value in found.to_dict().items() if name != "model_type"}
            config = self.family.config_class(**{**values, **flags})
        if model.model_name_or_path is None:
            self._fit_config_to_tokenizer(config)
            if model.config_overrides:
                with called("config_overrides", "update_str"):
                    config.update_from_string(model.config_overrides)
                config.validate_cse_flags()
        goes_on = model.model_name_or_path is not None and found.model_type == self.family.config_class.model_type
        self._separate_documents(config, goes_on)
        if self.data_arguments.block_size > config.max_position_embeddings:
            raise ValueError(
                f"block_size={self.data_arguments.block_size} is not allowed: the model has "
                f"{config.max_position_embeddings} positions."
            )
        return config

    def _separate_documents(self, config: PreTrainedConfig, goes_on: bool) -> None:
        """As the flag says. By default a trained CSE model and a config that names a token stay as they are."""
        separate = self.model_arguments.separate_documents
        if separate is None:
            if goes_on or config.cse_separator_token_id is not None or self.data_arguments.domain_column is not None:
                return
            separate = True
        config.cse_separator_token_id = end_token_id(self.tokenizer) if separate else None

    def _fit_config_to_tokenizer(self, config: PreTrainedConfig) -> None:
        config.vocab_size = len(self.tokenizer)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(self.tokenizer, name))

    def _model(self, name: str) -> PreTrainedModel:
        """The model of a run before training. The dense twin takes over every base weight, fresh heads included."""
        set_seed(self.args.seed)
        config = self._config()
        source = self.model_arguments.model_name_or_path
        if source is None:
            model = self.family.model_class(config)
        else:
            model = self.family.model_class.from_pretrained(
                source,
                config=config,
                cache_dir=self.model_arguments.cache_dir,
                revision=self.model_arguments.model_revision,
                token=self.model_arguments.token,
                dtype=torch.float32,  # like the twin; by default that of the checkpoint
            )
        if self.cluster_arguments.compare_with_dense:
            check_twin(model, source)
        if name == "dense":
            config.cse_layers = []
            twin = self.family.model_class(config)
            twin.load_state_dict({key: model.state_dict()[key] for key in twin.state_dict()})
            model = twin
        return model

    # ---- training ------------------------------------------------------------------------------------------------

    def _train(self, name: str, clusters: ClusterExpertsCallback | None) -> PreTrainedModel:
        folder = self.folder / name
        if (folder / "training_args.bin").is_file():  # what `save_model` writes last: this part is done
            return self.family.model_class.from_pretrained(folder)
        model = self._model(name)
        checkpoint = self._checkpoint(folder, clusters is not None)
        if checkpoint is not None and self.args.should_save:
            note_interruption(self.folder, name)
        args = replace(self.args, output_dir=str(folder), resume_from_checkpoint=checkpoint)
        set_seed(args.seed)
        trainer = Trainer(
            model,
            args,
            data_collator=self.collator,
            train_dataset=self.training,
            # not by name where there is one: the best checkpoint goes by `eval_loss`
            eval_dataset=self.validation["all"] if list(self.validation) == ["all"] else self.validation,
            processing_class=self.tokenizer,
            compute_metrics=perplexity_for_trainer(),
            preprocess_logits_for_metrics=row_losses_for_trainer(shift=self.family.causal),
            callbacks=[JsonLinesCallback(folder / "metrics.jsonl")],
        )
        if isinstance(self.training, FreshMasks):
            trainer.add_callback(EpochCallback(self.training))
        if clusters is not None:
            clusters.attach(trainer)
        trainer.add_callback(SettingsCallback(self.folder, self._settings()))
        if checkpoint is not None and int(checkpoint.rpartition("-")[2]) >= args.max_steps > 0:
            # killed after its last step: the Trainer (5.23) looks for the end only after a step, and would make one
            model = self.family.model_class.from_pretrained(ends_with(checkpoint, args))
            if clusters is not None:
                clusters.finish(model)
            trainer.model = model
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        return model

    def _checkpoint(self, folder: Path, clusters: bool) -> str | None:
        asked = self.args.resume_from_checkpoint
        if asked is None:
            return None
        if Path(asked).resolve().parent == folder.resolve():
            check_checkpoint(asked, clusters)
            return asked
        return last_complete_checkpoint(folder, clusters)


def pretrain(family: Family, argv: list[str] | None = None) -> dict[str, Any]:
    """Runs a script's whole job from its command line (`parse_arguments`), and returns the report."""
    return Pretraining(family, *parse_arguments(argv)).run()
