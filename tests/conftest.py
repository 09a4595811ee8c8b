"""Small models with random weights, their tokenizers, and rows harvested from them."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # the tests run make; it must not take itself for a part of `make test`
    os.environ.pop(name, None)
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import pytest
import tokenizers
import torch
import transformers

import experiment
import harvest
import sae_utils

WORDS = "the a cat dog bird red blue big small sees likes has and not here there . ? one two".split()


def word_tokenizer(with_bos: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A word-level tokenizer over WORDS."""
    special = ["<pad>", "<eos>", "<unk>"] + (["<bos>"] if with_bos else [])
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, **names, **({"bos_token": "<bos>"} if with_bos else {}))


def gpt2() -> transformers.GPT2LMHeadModel:
    """Absolute positions, and one id for BOS and EOS."""
    config = transformers.GPT2Config(vocab_size=24, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=3, eos_token_id=3)
    model = transformers.GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(False)


def gemma(seed: int = 0) -> transformers.Gemma3ForCausalLM:
    config = transformers.Gemma3TextConfig(
        vocab_size=24, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=3,
    )  # fmt: skip
    model, generator = transformers.Gemma3ForCausalLM(config), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():  # the default 0.02 leaves every layer's output near zero
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else parameter.shape[-1] ** -0.5, generator=generator)
    return model.eval().requires_grad_(False)


def pytest_configure(config):
    config.addinivalue_line("markers", "repeats: tells nothing more about other versions of the packages (make test-latest leaves it out)")


@pytest.fixture(params=["torch's choice", *["oneDNN"] * hasattr(torch.ops.mkldnn, "_linear_pointwise")])
def products(request, monkeypatch):
    """Every matrix product of ours as torch likes it, or by oneDNN, however small it is and whatever the processor."""
    monkeypatch.setattr(sae_utils, "through_onednn", lambda: request.param == "oneDNN")
    monkeypatch.setattr(sae_utils, "ONEDNN_FROM", 1)
    return request.param


@pytest.fixture(autouse=True)
def fresh_seed():
    """Inputs are new on every run; a failing test prints the seed that repeats them."""
    seed = int(os.environ.get("TEST_SEED", int.from_bytes(os.urandom(3), "big")))
    print(f"to repeat: TEST_SEED={seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture(scope="session")
def tokenizer():
    return word_tokenizer()


@pytest.fixture(scope="session")
def model():
    return gemma()


HOOK = "model.layers.1.mlp.down_proj"


@pytest.fixture
def sae():
    """An SAE for `model` with random biases, so that nothing is right by being zero."""
    sae = sae_utils.SAE(16, 48, seed=1)
    with torch.no_grad():
        sae.b_enc.normal_(std=0.1)
        sae.b_dec.normal_(std=0.1)
        sae.mean.normal_()
    return sae.requires_grad_(False)


def sentences(n: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Random texts of 1 to `longest` words."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator)) for length in lengths]


@pytest.fixture
def folder(tmp_path, model, tokenizer):
    """A folder with the model in Hugging Face format (model/) and a text (text.jsonl)."""
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in sentences(200)))
    return tmp_path


def training_params(folder: Path, **changes) -> dict:
    """Parameters of a small run on `folder`."""
    given = {"model_name": str(folder / "model"), "dataset_name": str(folder / "text.jsonl"), "layer": 1, "n_activations": 1500}
    given |= {"seq_len": 16, "activation_dtype": "float32", "run_dir": str(folder / "runs" / "one"), "l1_coeff": 0.02}
    return experiment.check_params("sae_training", given | changes)


def loaded_params(folder: Path, model, tokenizer, **changes) -> dict:
    """`training_params` with what came of them when model and text were read."""
    params = training_params(folder, **changes)
    return harvest.as_loaded(params, model, tokenizer, harvest.open_text(params))
