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

    card: runs/quickstart/cse/README.md
    files: README.md, config.json, configuration_cse.py, dispatch_cse.py, evidence_cse.py, ...

The card quotes text: for each expert the beginning of one held-out text of the run, or of one text of `--data`.
The code of the model lies in the folder, so that anyone loads it with `trust_remote_code=True`, without this package.
A Trainer does the same at the end of a run: `ModelCardCallback(texts=...).attach(trainer)`, `trainer.push_to_hub()`.
"""

from pathlib import Path

from huggingface_hub import HfApi
from small_model import model_of, parser_for
from transformers import AutoModel, AutoTokenizer

from modeling_cse import describe_experts
from modeling_cse.data import load_corpus
from modeling_cse.hub import write_model_card
from modeling_cse.runs import write_run_card


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--repo", help="where to, as in my-name/my-model; without it nothing is uploaded")
    parser.add_argument("--private", action="store_true")
    licenses = "of the weights, by the Hub's list; apache-2.0 if left out"
    parser.add_argument("--license", default="apache-2.0", help=licenses)
    parser.add_argument("--language", nargs="+", default=["en"], help="of the text: codes by ISO 639")
    parser.add_argument("--data", help="text to tell the experts by and to quote; needed where no run lies beside")
    options = parser.parse_args()

    folder = Path(model_of(options))
    card = {"license": options.license, "language": options.language, "repo_id": options.repo}
    if (folder.parent / "report.json").is_file():  # a run of run_clm.py or run_mlm.py, which knows all of it
        write_run_card(folder.parent, **card)
    elif options.data is None:
        raise SystemExit(
            f"There is no report.json beside {folder}, so no run tells what its experts know: name text for them with "
            "--data (a file, or a folder of .txt files). The card quotes from it."
        )
    else:
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        texts = load_corpus(train_file=options.data, validation_file=options.data)["train"]
        experts = describe_experts(model, tokenizer, texts)
        write_model_card(folder, config=model.config, results={}, recipe={}, data={}, experts=experts, **card)
    print(f"card: {folder / 'README.md'}")
    print("files:", ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())))
    if options.repo:
        hub = HfApi()
        hub.create_repo(options.repo, private=options.private, exist_ok=True)
        skipped = ["checkpoint*", "*.jsonl", "*.bin"]
        print(hub.upload_folder(repo_id=options.repo, folder_path=folder, ignore_patterns=skipped))


if __name__ == "__main__":
    main()
