"""What the code takes from the inside of other packages, a few lines each; a failure names the place that relies on it.

`make test-latest` runs these with the newest packages, so that a change there is met here first and not
in somebody's figures.
"""

import copy
import functools
import inspect
import json
import logging
import subprocess
import sys
import weakref
from pathlib import Path

import datasets
import filelock
import matplotlib
import nbformat
import papermill
import pytest
import torch
import transformers
from conftest import HOOK, gemma, gpt2, word_tokenizer
from huggingface_hub import constants
from matplotlib import font_manager
from matplotlib.ft2font import FT2Font
from tensorboard.summary.writer import event_file_writer
from torch.optim.adam import adam as functional_adam
from torch.utils.tensorboard import SummaryWriter

import harvest
import sae_utils as u


def relied_on_by(*places):
    """Marks what relies on an assumption; its failure says so."""

    def wrap(test):
        @functools.wraps(test)
        def told(*args, **kwargs):
            try:
                return test(*args, **kwargs)
            except Exception as error:
                error.add_note(f"Relied on by {', '.join(places)}.")
                raise

        return told

    return wrap


def cache_of(output):
    return next(value for value in output.values() if hasattr(value, "get_seq_length"))


# -- transformers: what `generate` and a model's forward tell an edit


@relied_on_by("editing.TokenTracker.cache_among", "editing.TokenTracker.after", "editing.cached_length")
def test_a_cache_tells_its_length_can_be_a_weak_key_and_comes_back_as_itself(model):
    seen = weakref.WeakKeyDictionary()
    cache = cache_of(model(torch.tensor([[3, 5, 6]]), use_cache=True))
    assert int(cache.get_seq_length()) == 3
    seen[cache] = 1
    name = next(n for n in ("cache", "past_key_values") if n in inspect.signature(model.forward).parameters)
    again = cache_of(model(torch.tensor([[7]]), **{name: cache}))
    assert again is cache and seen[again] == 1 and int(cache.get_seq_length()) == 4
    assert copy.copy(cache) not in seen  # another object is another cache


@relied_on_by("editing.TokenTracker.arguments")
def test_a_forward_has_a_signature_with_the_tokens_first(model):
    for each in (model, gpt2()):
        parameters = inspect.signature(each.forward).parameters
        assert next(iter(parameters)) == "input_ids" and "attention_mask" in parameters


def calls_of_generate(model, **settings):
    """The keyword arguments of each forward call that `generate` makes for two prompts, the first padded."""
    calls, ids, mask = [], *u.pad([[3, 9, 20], [3, 5, 6, 7, 8]], side="left")
    handle = model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, dict(kwargs))), with_kwargs=True)
    try:
        config = transformers.GenerationConfig(max_new_tokens=3, pad_token_id=0, eos_token_id=10**6, **settings)
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    finally:
        handle.remove()
    return calls, out


@relied_on_by("editing.TokenTracker.__call__", "editing.TokenTracker.check_positions")
def test_generate_names_its_arguments_and_gives_positions_without_padding():
    calls, _ = calls_of_generate(gemma())
    assert [kwargs["input_ids"].shape[1] for _, kwargs in calls] == [5, 1, 1] and not any(args for args, _ in calls)
    assert calls[0][1]["position_ids"][0, 2:].tolist() == [0, 1, 2] and calls[1][1]["position_ids"].flatten().tolist() == [3, 5]
    assert [kwargs["attention_mask"].shape[1] for _, kwargs in calls] == [5, 6, 7]


@relied_on_by("editing.generate (rows of one prompt stand together, in the calls as in the result)")
def test_copies_of_a_prompt_stand_together():
    for settings in ({"do_sample": True, "num_return_sequences": 2}, {"num_beams": 2, "num_return_sequences": 2}):
        calls, out = calls_of_generate(gemma(), **settings)
        first = calls[0][1]["input_ids"]
        assert torch.equal(first[0], first[1]) and torch.equal(first[2], first[3]) and not torch.equal(first[0], first[2])
        assert torch.equal(out[:, :5], first)


@relied_on_by("editing.generate (a model's generation_config fills what is not set)")
def test_generation_config_is_an_attribute_that_generate_reads():
    model = gemma()
    model.generation_config = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=10**6, pad_token_id=0)
    assert model.generate(input_ids=torch.tensor([[3, 5]])).shape[1] == 4


@relied_on_by("sae_utils.load_model")
def test_loading_tells_which_weights_are_missing(tmp_path):
    small, config = gemma(), gemma().config
    small.save_pretrained(tmp_path)
    config.num_hidden_layers, config.layer_types = 4, [*config.layer_types, "full_attention"]
    config.save_pretrained(tmp_path)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert any("layers.3" in name for name in info["missing_keys"])


@relied_on_by("sae_utils.find_hook")
def test_a_skeleton_has_names_and_no_weights():
    with torch.device("meta"):
        skeleton = transformers.AutoModelForCausalLM.from_config(gemma().config)
    assert HOOK in dict(skeleton.named_modules()) and all(p.is_meta for p in skeleton.parameters())


@relied_on_by("harvest.model_commit")
def test_the_commit_of_a_hub_model_is_found_in_the_cache(tmp_path, monkeypatch):
    """In a cache as a download leaves it, for the branch and for the commit itself; without one it is refused."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    gemma().save_pretrained(folder / "snapshots" / commit)
    assert transformers.AutoModelForCausalLM.from_pretrained("some/model", cache_dir=tmp_path).config.hidden_size == 16
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert harvest.model_commit("some/model", "") == harvest.model_commit("some/model", commit) == commit
    with pytest.raises(u.UserError, match="the commit of some/other cannot be told from the cache"):
        harvest.model_commit("some/other", "")


@relied_on_by("harvest.tokenizer_digest", "sae_utils.special_ids")
def test_a_fast_tokenizer_shows_its_rules_and_its_special_tokens():
    tokenizer = word_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    assert {"model", "pre_tokenizer", "added_tokens"} <= set(state)
    assert sorted(i for i, token in tokenizer.added_tokens_decoder.items() if token.special) == sorted(tokenizer.all_special_ids) == [0, 1, 2, 3]


# -- datasets


@relied_on_by("harvest.hub_text (which commit a hub dataset is of, whether it is on this disk, how large it is)")
def test_a_datasets_builder_tells_what_it_would_load(tmp_path):
    def built(texts, folder):
        folder.mkdir()
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "part.parquet")
        return datasets.load_dataset_builder("parquet", data_files={"train": [str(folder / "part.parquet")]}, cache_dir=str(tmp_path / "cache"))

    one, other = built(["a", "b"], tmp_path / "one"), built(["a", "c"], tmp_path / "two")
    assert one.hash and one.config_id and one.config_id != other.config_id and not Path(one.cache_dir).exists()
    one.download_and_prepare()
    assert Path(one.cache_dir).exists() and one.info.splits["train"].num_bytes > 0


# -- torch


@relied_on_by("training.Trainer.adam")
def test_functional_adam_takes_found_inf_and_is_adam():
    values, gradients = torch.randn(7, 5), torch.randn(7, 5)
    mine, first, second, step = values.clone(), torch.zeros(7, 5), torch.zeros(7, 5), torch.zeros(())
    settings = dict(fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=0.01, weight_decay=0.0, eps=1e-8, maximize=False)
    functional_adam([mine], [gradients], [first], [second], [], [step], found_inf=torch.ones(()), **settings)
    assert torch.equal(mine, values) and not first.any()
    functional_adam([mine], [gradients], [first], [second], [], [step], found_inf=torch.zeros(()), **settings)
    theirs = torch.nn.Parameter(values.clone())
    theirs.grad = gradients
    torch.optim.Adam([theirs], lr=0.01).step()
    torch.testing.assert_close(mine, theirs.detach())


@relied_on_by("training.csr", "training.Trainer (the sparse step)")
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_products_of_torch():
    mask, a, b = torch.rand(6, 9) < 0.3, torch.randn(6, 4), torch.randn(4, 9)
    pattern = (mask.float()).to_sparse_csr()
    found = torch.sparse.sampled_addmm(pattern, a, b, beta=0).to_dense()
    torch.testing.assert_close(found, torch.where(mask, a @ b, 0.0))
    rows = torch.randn(9, 3)
    torch.testing.assert_close(pattern @ rows, mask.float() @ rows)


@relied_on_by("editing.tracked")
def test_hooks_see_keywords_and_failures():
    calls = []

    class Fails(torch.nn.Module):
        def forward(self, x, more=None):
            if more == "fail":
                raise KeyError(more)
            return x

    module = Fails()
    module.register_forward_pre_hook(lambda m, args, kwargs: calls.append(kwargs), with_kwargs=True)
    module.register_forward_hook(lambda m, args, output: calls.append(output), always_call=True)
    module(torch.ones(1), more="fine")
    with pytest.raises(KeyError):
        module(torch.ones(1), more="fail")
    assert calls[0] == {"more": "fine"} and calls[1] is not None and calls[2] == {"more": "fail"} and calls[3] is None


# -- papermill, IPython, matplotlib, filelock


@relied_on_by("experiment.check_params", "experiment.declared_params")
def test_papermill_injects_a_cell_that_begins_with_its_name(tmp_path):
    path = u.ROOT / "notebooks" / "patch_neurons.ipynb"
    papermill.execute_notebook(str(path), str(tmp_path / "out.ipynb"), {"name": "x"}, prepare_only=True)
    prepared = json.loads((tmp_path / "out.ipynb").read_text())
    injected = [cell for cell in prepared["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]
    assert "".join(injected[0]["source"]).startswith("# Parameters\n") and prepared["metadata"]["papermill"]["parameters"] == {"name": "x"}


@relied_on_by("experiment.main")
def test_papermills_errors_say_what_was_raised(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}})
    nbformat.write(notebook, tmp_path / "fails.ipynb")
    with pytest.raises(papermill.PapermillExecutionError) as told:
        papermill.execute_notebook(str(tmp_path / "fails.ipynb"), str(tmp_path / "out.ipynb"), kernel_name="python3", progress_bar=False)
    assert (told.value.ename, told.value.evalue) == ("ZeroDivisionError", "division by zero") and "ZeroDivisionError" in "".join(told.value.traceback)


@relied_on_by("experiment.settle, experiment.execute")
def test_papermill_notes_the_end_and_puts_parameters_into_paths(tmp_path):
    seen = "import json, pathlib; print(json.loads(pathlib.Path(where).read_text())['metadata']['papermill']['end_time'])"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(seen)], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}, "language_info": {"name": "python"}})
    nbformat.write(notebook, tmp_path / "small.ipynb")
    out = tmp_path / "{where}.ipynb"
    papermill.execute_notebook(str(tmp_path / "small.ipynb"), str(out).replace("{", "{{").replace("}", "}}"), {"where": str(out)}, kernel_name="python3", progress_bar=False)
    executed = nbformat.read(out, 4)
    assert executed.cells[-1].outputs[0].text == "None\n" and executed.metadata.papermill.end_time and not executed.metadata.papermill.exception


@relied_on_by("experiment.main (lines that say nothing are left out of the log)")
def test_papermill_logs_by_its_own_name(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("papermill"), "filters", [])  # experiment.main puts its own there, for the whole process
    path = u.ROOT / "notebooks" / "patch_neurons.ipynb"
    with caplog.at_level(logging.WARNING, logger="papermill"):
        papermill.execute_notebook(str(path), str(tmp_path / "out.ipynb"), {"no_such_name": 1}, prepare_only=True)
    assert [record.getMessage() for record in caplog.records if record.name == "papermill"][0].startswith("Passed unknown parameter")


@relied_on_by("sae_utils.UserError")
def test_ipython_asks_an_exception_for_its_own_traceback():
    code = "import sys; sys.path.insert(0, {!r}); from sae_utils import UserError; raise UserError('one sentence')".format(str(u.ROOT))
    said = subprocess.run([sys.executable, "-m", "IPython", "--colors=NoColor", "-c", code], capture_output=True, text=True, check=False)
    assert "Error: one sentence" in said.stdout + said.stderr and "Traceback" not in said.stdout + said.stderr


@relied_on_by("report (which characters its fonts have)")
def test_font_tables_say_which_characters_there_are():
    for name in ("DejaVu Sans", "DejaVu Sans Mono"):
        characters = FT2Font(font_manager.findfont(name)).get_charmap()
        assert ord("a") in characters and 0x4E2D not in characters, matplotlib.__version__


@relied_on_by("experiment.claim_folder")
def test_a_lock_of_one_process_is_the_same_object(tmp_path):
    one = filelock.FileLock(tmp_path / "x", is_singleton=True)
    assert filelock.FileLock(tmp_path / "x", is_singleton=True) is one


@relied_on_by("training.open_writer")
def test_tensorboard_writes_in_a_thread_that_keeps_its_error(tmp_path):
    events = SummaryWriter(str(tmp_path)).file_writer.event_writer
    worker = events._async_writer._worker
    assert isinstance(worker, event_file_writer._AsyncWriterThread) and worker.exception is None and {"add_event", "flush", "close"} <= set(dir(events))
    events.close()


# -- the lock and the ranges


def test_the_lock_pins_what_requirements_ask_for():
    from packaging.requirements import Requirement

    asked = [Requirement(line) for line in (u.ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    lines = [line for line in (u.ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    pinned = [Requirement(line) for line in lines]
    assert all(len(p.specifier) == 1 and str(p.specifier).startswith("==") for p in pinned) and len(pinned) > 100
    assert not any(p.name.startswith(("nvidia", "cuda", "triton")) or "//" in str(p) for p in pinned)
    for requirement in asked:
        assert "==" in str(requirement.specifier) or (">=" in str(requirement.specifier) and "<" in str(requirement.specifier)), requirement
        for version in ("3.11", "3.12", "3.13"):
            for platform in ("linux", "darwin", "win32"):
                here = {"python_version": version, "python_full_version": f"{version}.9", "sys_platform": platform, "platform_machine": "x86_64"}
                found = [p for p in pinned if p.name.lower() == requirement.name.lower() and (p.marker is None or p.marker.evaluate(here))]
                assert len(found) == 1 and requirement.specifier.contains(str(found[0].specifier)[2:]), (requirement, version, platform)
