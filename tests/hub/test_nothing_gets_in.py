# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Whoever loads a checkpoint, resumes a run, or reads data and recipes executes nothing that lies in them.

Each trap below leaves a file behind when it goes off; where it can, a test also shows that the trap is live.
"""

import ast
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from tiny import LANGUAGE_HEADS, activate, tiny_model, token_ids
from tiny_runs import settings, train
from transformers import AutoModelForCausalLM, GPT2Tokenizer

from modeling_cse import ClusterExpertsCallback
from modeling_cse.data import load_corpus
from modeling_cse.runs.arguments import parse_arguments


ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "modeling_cse"
AUTO = {"gpt2": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM"}
CLUSTERS = "cluster_state_rank0.safetensors"

# ---- what the code itself may do -----------------------------------------------------------------------------------

# Modules that execute what they read, or start what they are told to.
EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "runpy", "code"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.hub.load", "yaml.load"}
CALLS |= {"yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "pandas.read_pickle", "torch.jit.load"}
# Calls that are harmless with these arguments, and only then.
UNLESS = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}


def dangers(source: str) -> list[str]:
    """What in a source could execute data."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in EXECUTING]
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in EXECUTING:
            found.append(node.module)
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            allowed = UNLESS.get(name)
            if name in CALLS or (allowed and given.get(allowed[0]) != str(allowed[1])):
                found.append(name)
            if given.get("trust_remote_code") == "True":
                found.append(f"{name}(trust_remote_code=True)")
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_source_executes_what_it_reads(path):
    """`python -m modeling_cse SCRIPT` runs the script that its user names, which is what it is for."""
    allowed = ["runpy"] if path == PACKAGE / "__main__.py" else []
    assert dangers(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from joblib import load", "eval('1')", "torch.load(path)", "torch.load(p, weights_only=False)"]
    + ["np.load(p, allow_pickle=True)", "yaml.load(text, Loader)", "os.system('x')", "f(x, trust_remote_code=True)"],
)
def test_the_search_does_find_it(source):
    assert len(dangers(source)) == 1
    assert dangers("torch.load(p, weights_only=True), yaml.safe_load(x), model.eval()") == []


@pytest.mark.parametrize(("family", "head"), LANGUAGE_HEADS)
def test_exported_code_imports_torch_transformers_and_itself(family, head, tmp_path):
    """`huggingface_hub.dataclasses` is what transformers itself writes configurations with."""
    tiny_model(family, head).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.glob("*.py")}
    assert {f"modeling_cse_{family}.py", "configuration_cse.py", "routing_cse.py"} <= names
    standard = {"collections.abc", "dataclasses", "functools", "inspect", "threading", "typing"}
    for path in tmp_path.glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert dangers(source) == [] and "open(" not in source and "__import__" not in source, path.name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and f"{node.module}.py" in names, f"{path.name}: {node.module}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for module in modules:
                    known = module in standard | {"huggingface_hub.dataclasses"}
                    assert known or module.split(".")[0] in ("torch", "transformers"), f"{path.name}: {module}"


# ---- traps ---------------------------------------------------------------------------------------------------------


class Trap:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def spring(path: Path, mark: Path) -> None:
    """Puts a pickle that torch can read in the place of a file."""
    torch.save({"weight": Trap(mark)}, path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A checkpoint a family whose code and tokenizer would leave a mark, under weights that are sound."""
    folder = tmp_path_factory.mktemp("planted")
    for family, auto in AUTO.items():
        place = folder / family
        activate(tiny_model(family)).save_pretrained(place)
        GPT2Tokenizer().train_new_from_iterator(["some text to learn from"], vocab_size=300).save_pretrained(place)
        trap = f"open({str(folder / 'mark')!r}, 'w').close()\n"
        for path in place.glob("*.py"):
            path.write_text(trap + path.read_text(encoding="utf-8"), encoding="utf-8")
        (place / "tokenization_planted.py").write_text(trap + "from transformers import GPT2Tokenizer as Planted\n")
        (place / "custom_generate").mkdir()
        (place / "custom_generate" / "generate.py").write_text(trap + "def generate(*args, **kwargs): pass\n")
        for name in ("tokenizer_config.json", "config.json"):
            described = json.loads((place / name).read_text(encoding="utf-8"))
            described["auto_map"] = described.get("auto_map", {}) | {
                "AutoTokenizer": ["tokenization_planted.Planted", None]
            }
            (place / name).write_text(json.dumps(described), encoding="utf-8")
        assert json.loads((place / "config.json").read_text())["auto_map"][auto]
    return folder


CHILD = """
import os, sys, transformers
from transformers import AutoConfig, AutoTokenizer
MARK = "mark"
def loaders(family, auto):
    yield "config", AutoConfig.from_pretrained
    yield "model", getattr(transformers, auto).from_pretrained
    yield "tokenizer", AutoTokenizer.from_pretrained
"""
WITH_PACKAGE = """
import modeling_cse
for family, auto in AUTO.items():
    for name, load in loaders(family, auto):
        for trust in ({}, {"trust_remote_code": False}):
            kind = type(load(family, **trust)).__module__
            assert not os.path.exists(MARK), (name, trust)
            assert kind.startswith("transformers." if name == "tokenizer" else "modeling_cse."), kind
    head = "CSEGPT2ForCausalLM" if family == "gpt2" else "CSEBertForMaskedLM"
    model = getattr(modeling_cse, head).from_pretrained(family)
    model.save_pretrained("again/" + family)
    assert "open(" not in open(f"again/{family}/modeling_cse_{family}.py").read()
assert not os.path.exists(MARK)
"""
WITHOUT_PACKAGE = """
sys.modules["modeling_cse"] = None
for family, auto in AUTO.items():
    for name, load in loaders(family, auto):
        for trust in ({}, {"trust_remote_code": False}):
            try:
                kind = type(load(family, **trust)).__module__
            except ValueError as error:
                assert "trust_remote_code=True" in str(error), error
            else:  # its name alone says which tokenizer of transformers it is
                assert name == "tokenizer" and kind.startswith("transformers."), (name, kind)
            assert not os.path.exists(MARK), (name, trust)
    for name, load in loaders(family, auto):
        load(family, trust_remote_code=True)
        assert os.path.exists(MARK), "the trap is not live"
        os.remove(MARK)
        for module in [module for module in sys.modules if module.startswith("transformers_modules")]:
            del sys.modules[module]
"""


@pytest.mark.parametrize("script", [WITH_PACKAGE, WITHOUT_PACKAGE], ids=["with the package", "without it"])
def test_code_of_a_checkpoint_runs_only_where_it_is_trusted(planted, script, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_MODULES_CACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", f"AUTO = {AUTO}\n{CHILD}{script}"],
        cwd=planted,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_pickles_beside_the_weights_are_not_read_and_those_in_their_place_are_refused(tmp_path):
    place, mark = tmp_path / "model", tmp_path / "mark"
    model = activate(tiny_model("gpt2"))
    model.save_pretrained(place)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin"):
        spring(place / name, mark)
    loaded = AutoModelForCausalLM.from_pretrained(place)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)
    (place / "model.safetensors").unlink()
    with pytest.raises((ValueError, OSError, pickle.UnpicklingError)):
        AutoModelForCausalLM.from_pretrained(place)
    assert not mark.exists()
    torch.load(place / "pytorch_model.bin", weights_only=False)
    assert mark.exists(), "the trap is not live"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A checkpoint of a run after its second fit."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, ClusterExpertsCallback(**settings()), save_strategy="steps", save_steps=7, max_steps=8)
    return folder / "checkpoint-7"


# What a run writes, and whether it is read again when the run goes on.
WRITTEN = {
    "optimizer.pt": True,
    "scheduler.pt": True,
    "rng_state.pth": True,
    CLUSTERS: True,
    "trainer_state.json": True,
    "config.json": True,
    "model.safetensors": True,
    "training_args.bin": False,
    "pytorch_model.bin": False,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_resumed_run_executes_no_file_of_its_checkpoint(run, name, tmp_path):
    """Without its checksums, as a kill may leave a checkpoint: they would tell every planted file."""
    place, mark = tmp_path / run.name, tmp_path / "mark"
    place.mkdir()
    for path in run.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    (place / "checksums.json").unlink()
    assert (place / name).exists() or name == "pytorch_model.bin"
    spring(place / name, mark)
    options = {"resume": str(place), "max_steps": 9}
    if WRITTEN[name]:
        with pytest.raises(Exception):  # noqa: B017 - each reader has its own word for it
            train(tmp_path, ClusterExpertsCallback(**settings()), **options)
    else:
        assert train(tmp_path, ClusterExpertsCallback(**settings()), **options).state.global_step == 9
    assert not mark.exists()
    (place / name).rename(place / "trap.pt")
    torch.load(place / "trap.pt", weights_only=False)
    assert mark.exists(), "the trap is not live"


def test_a_script_beside_data_is_not_run(tmp_path):
    place, mark = tmp_path / "corpus", tmp_path / "mark"
    place.mkdir()
    (place / "corpus.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    (place / "train.jsonl").write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(8)))
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        load_dataset(str(place))
    with pytest.raises(RuntimeError, match="scripts are no longer supported"):
        load_corpus(dataset_name=str(place), cache_dir=str(tmp_path / "cache"))
    assert not mark.exists()


@pytest.mark.parametrize("tag", ["python/object/apply:builtins.open", "python/object/new:os.system", "python/name:x"])
def test_a_recipe_makes_no_objects(tag, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"output_dir: !!{tag} [{str(tmp_path / 'mark')!r}, w]\n")
    with pytest.raises(ValueError, match="recipe .* cannot be read"):
        parse_arguments([str(recipe)])
    assert not (tmp_path / "mark").exists()
