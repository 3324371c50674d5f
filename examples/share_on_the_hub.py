#!/usr/bin/env python
# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""
Share a trained model: write its card, with what each expert is for, and upload the folder.

    python examples/share_on_the_hub.py --model runs/quickstart/cse     # writes the card, uploads nothing
    hf auth login
    python examples/share_on_the_hub.py --model runs/quickstart/cse --repo my-name/my-cse-model --private
    python examples/share_on_the_hub.py --model my_folder --data my_texts    # a folder that no run left
    python examples/share_on_the_hub.py --smoke

Prints where the card lies and which files the folder has; with `--repo`, the address of the commit:

    card: runs/quickstart/cse/README.md (it names no license: --license)
    files: README.md, config.json, configuration_cse.py, dispatch_cse.py, evidence_cse.py, ...

The card quotes text: for each expert the beginning of one held-out text of the run, or of one text of `--data`.
The code of the model lies in the folder, so that anyone loads it with `trust_remote_code=True`, without this package.
A Trainer does the same at the end of a run: `ModelCardCallback(texts=...).attach(trainer)`, `trainer.push_to_hub()`.
"""

from pathlib import Path

from huggingface_hub import HfApi
from small_model import has_experts, model_of, parser_for
from transformers import AutoConfig, AutoModel, AutoTokenizer

from modeling_cse import describe_experts
from modeling_cse.data import load_corpus
from modeling_cse.hub import write_model_card
from modeling_cse.runs import write_run_card


# Of a run, not of the model. Clustering state holds training text: the sample for the next fit, as token ids.
STATES = ["cluster_state_*", "optimizer*", "scheduler*", "scaler*", "rng_state*", "trainer_state.json"]
NOT_SHARED = [*STATES, "checksums.json", "checkpoint*", "*.jsonl", "*.bin"]


def write_card(folder: Path, data: str | None, card: dict) -> None:
    """
    Writes the card into the model's folder: from the run of run_clm.py or run_mlm.py that left it, which knows all of
    it, otherwise by the texts of `data`.

    Raises:
        SystemExit: there is no such folder, its model has no experts, or text is missing or not wanted.
    """
    if not folder.is_dir():
        raise SystemExit(f"--model {folder}: there is no such folder.")
    run = folder.absolute().parent
    if folder.absolute().name == "cse" and (run / "report.json").is_file():  # of another folder there it says nothing
        if data is not None:
            raise SystemExit(
                f"--data {data} is not allowed with --model {folder}: leave it out. The report.json beside the folder "
                "tells what its experts know, and no other text is read."
            )
        write_run_card(run, **card)
        return
    if not has_experts(AutoConfig.from_pretrained(folder)):
        raise SystemExit(
            f"--model {folder} is not allowed: it must have a layer with experts, which the card tells of. A dense "
            "model is shared by its own push_to_hub()."
        )
    if data is None:
        raise SystemExit(
            f"--model {folder} is not the folder cse of a finished run, so no report.json tells what its experts "
            "know: name text for them with --data (a file, or a folder of .txt files). The card quotes from it."
        )
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = load_corpus(train_file=data, validation_file=data)["train"]
    experts = describe_experts(model, tokenizer, texts)
    write_model_card(folder, config=model.config, results={}, recipe={}, data={}, experts=experts, **card)


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--repo", help="where to, as in my-name/my-model; without it nothing is uploaded")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--license", help="of the weights, by the Hub's list; if left out the card names none")
    parser.add_argument("--language", nargs="+", help="of the text: codes by ISO 639; if left out the card names none")
    parser.add_argument("--data", help="text to tell the experts by and to quote; only where no run lies beside")
    options = parser.parse_args()

    folder = Path(model_of(options))
    card = {"license": options.license, "language": options.language, "repo_id": options.repo}
    write_card(folder, options.data, card)
    print(f"card: {folder / 'README.md'}" + ("" if options.license else " (it names no license: --license)"))
    print("files:", ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))
    if options.repo:
        hub = HfApi()
        hub.create_repo(options.repo, private=options.private, exist_ok=True)
        print(hub.upload_folder(repo_id=options.repo, folder_path=folder, ignore_patterns=NOT_SHARED))


if __name__ == "__main__":
    main()
