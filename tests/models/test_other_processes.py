# Copyright 2026 The modeling_cse authors. Licensed under the Apache License, Version 2.0.
"""Promises to a process that starts afresh: with the package, without it, and to whoever only imports it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import activate, routed_module, tiny_model, token_ids


ROOT = Path(__file__).resolve().parents[2]
FAMILIES = {"gpt2": "AutoModelForCausalLM", "bert": "AutoModelForMaskedLM"}


def python(*arguments: str, cwd: Path, home: Path | None = None, path: bool = True) -> subprocess.CompletedProcess:
    """Runs this interpreter elsewhere, with a cache of its own, and with or without the package on its path."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "HF_HOME", "HF_MODULES_CACHE")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(home or cwd / "home")}
    if path:
        environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder a family, with the outputs that every other process must repeat."""
    return save(tmp_path_factory.mktemp("saved"))


def save(folder: Path, **flags) -> Path:
    for family in FAMILIES:
        model = activate(tiny_model(family, **flags))
        model.save_pretrained(folder / family)
        with torch.no_grad():
            outputs = model(token_ids(), output_cluster_ids=True)
        wanted = {"ids": token_ids(), "logits": outputs.logits, "clusters": list(outputs.cluster_ids)}
        wanted["centroids"] = routed_module(model, 2).router.centroids
        torch.save(wanted, folder / f"{family}.pt")
    return folder


CHECK = """
import sys, torch, transformers
torch.set_num_threads(1)
def check(folder, family, auto, **options):
    wanted = torch.load(f"{family}.pt")
    model = getattr(transformers, auto).from_pretrained(folder, **options)
    with torch.no_grad():
        outputs = model(wanted["ids"], output_cluster_ids=True)
    torch.testing.assert_close(outputs.logits, wanted["logits"], atol=1e-6, rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(outputs.cluster_ids, wanted["clusters"], strict=True))
    return model
"""

WITH_PACKAGE = """
import modeling_cse
for family, auto in FAMILIES.items():
    model = check(family, family, auto)
    assert type(model).__module__ == f"modeling_cse.modeling_cse_{family}"
"""

WITHOUT_PACKAGE = """
import importlib, os, pathlib
sys.modules["modeling_cse"] = None  # holds also where the package is installed
try:
    import modeling_cse
except ImportError:
    pass
else:
    raise AssertionError("the package can be imported")
for family, auto in FAMILIES.items():
    model = check(family, family, auto, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules.")
    if family == "gpt2":
        assert model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    heads = [head for head in model.config.auto_map if head != "AutoConfig"]
    assert len(heads) >= 5
    for head in heads:
        other = getattr(transformers, head).from_pretrained(family, trust_remote_code=True)
        assert type(other).__name__ == model.config.auto_map[head].split(".")[-1].split("--")[-1]
        last = [m for m in other.modules() if type(m).__name__ == "ClusterRouter"][-1]
        assert torch.equal(last.centroids, torch.load(f"{family}.pt")["centroids"])
    model.save_pretrained(f"again/{family}")
    names = {path.name for path in pathlib.Path(family).glob("*.py")}
    assert names == {path.name for path in pathlib.Path(f"again/{family}").glob("*.py")}
    check(f"again/{family}", family, auto, trust_remote_code=True)
    half = getattr(transformers, auto).from_pretrained(family, trust_remote_code=True, dtype=torch.bfloat16)
    last = [m for m in half.modules() if type(m).__name__ == "ClusterRouter"][-1]
    assert torch.equal(last.centroids, torch.load(f"{family}.pt")["centroids"])
"""


def test_a_new_process_repeats_logits_and_clusters(saved):
    python("-c", f"{CHECK}\nFAMILIES = {FAMILIES}\n{WITH_PACKAGE}", cwd=saved)


def test_custom_code_needs_no_package(saved, tmp_path):
    """Every head loads from one folder, repeats the logits, and carries its code on when it is saved again."""
    python("-c", f"{CHECK}\nFAMILIES = {FAMILIES}\n{WITHOUT_PACKAGE}", cwd=saved, home=tmp_path, path=False)


EVIDENCE = """
sys.modules["modeling_cse"] = None
for family, auto in FAMILIES.items():
    model = check(family, family, auto, trust_remote_code=True)
    assert type(model.base_model.evidence_router).__module__.startswith("transformers_modules.")
    if family == "gpt2":
        assert model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
"""


def test_evidence_travels_too(tmp_path):
    save(tmp_path, cse_routing="evidence")
    python("-c", f"{CHECK}\nFAMILIES = {FAMILIES}\n{EVIDENCE}", cwd=tmp_path, home=tmp_path / "home", path=False)


STOCK = "import transformers.models.gpt2.modeling_gpt2, transformers.models.bert.modeling_bert"
IMPORT_ONLY = f"""
import sys
{STOCK}
from transformers import AutoConfig, AutoModelForCausalLM
before = set(sys.modules)  # transformers loads some of scipy for losses of its own
print("first", file=sys.stderr)
import modeling_cse
print("trainer", file=sys.stderr)
for heavy in ("sklearn", "scipy", "matplotlib", "datasets", "evaluate", "pandas", "accelerate"):
    assert heavy not in {{name.split(".")[0] for name in set(sys.modules) - before}}, heavy
assert modeling_cse.ClusterExpertsCallback.__module__ == "modeling_cse.training.callback"
assert set(modeling_cse.__all__) <= set(dir(modeling_cse))
first = modeling_cse.CSEGPT2Config
for name in [name for name in sys.modules if name.split(".")[0] == "modeling_cse"]:
    del sys.modules[name]
print("second", file=sys.stderr)
import modeling_cse
config = AutoConfig.for_model("cse_gpt2", n_layer=1, n_embd=32, n_head=2)
assert modeling_cse.CSEGPT2Config is not first and type(config) is modeling_cse.CSEGPT2Config
assert type(AutoModelForCausalLM.from_config(config)) is modeling_cse.CSEGPT2ForCausalLM
"""


def test_import_is_silent_light_and_harmless_twice(tmp_path):
    """What upstream's modules and its Trainer say of other libraries that are installed is not ours."""
    done = python("-W", "error::DeprecationWarning", "-c", IMPORT_ONLY, cwd=tmp_path)
    assert done.stdout == "" and "first\ntrainer\n" in done.stderr and done.stderr.endswith("second\n")


TIMED = f"""
import time
import torch
{STOCK}
from transformers import AutoConfig, AutoTokenizer, BertTokenizer, GPT2Tokenizer
from transformers.models.auto import modeling_auto
start = time.process_time()
import modeling_cse
print(time.process_time() - start)
"""


@pytest.mark.slow
def test_import_costs_little_more_than_the_stock_models(tmp_path):
    """Processor seconds beyond the stock modules, which other work on the machine does not stretch; best of three."""
    costs = [float(python("-c", TIMED, cwd=tmp_path).stdout) for _ in range(3)]
    assert min(costs) < 0.3


DENSE_FIRST = """
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel
GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=9))
BertForMaskedLM(BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=9))
from modeling_cse import CSEBertConfig, CSEBertForMaskedLM, CSEGPT2Config, CSEGPT2ForCausalLM
gpt2 = CSEGPT2ForCausalLM(CSEGPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=9, cse_layers=[0]))
bert = CSEBertForMaskedLM(
    CSEBertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2, vocab_size=9, cse_layers=[0])
)
for model in (gpt2, bert):
    assert model.config._experts_implementation == "grouped_mm", model.config._experts_implementation
"""


def test_a_dense_model_that_came_first_does_not_slow_experts_down(tmp_path):
    """Upstream remembers on the stock class that it has no experts, and a subclass would inherit that."""
    python("-c", DENSE_FIRST, cwd=tmp_path)
