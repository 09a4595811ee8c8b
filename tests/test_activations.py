"""Rows are the right tokens' activations, and only those; the store keeps them whole."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import HOOK, ROOT, gemma, loaded_params, sentences, word_tokenizer

import choosing
import experiment
import fidelity
import harvest
import sae_utils as u


def rows_of(folder, model, tokenizer, **changes):
    return harvest.get_rows(model, tokenizer, HOOK, loaded_params(folder, model, tokenizer, **changes), folder / "activations")


def cut(tokenizer, documents, seq_len, n_rows, **more):
    """(windows as lists, document of each, counts)"""
    tokens, counts = harvest.cut_windows(tokenizer, documents, seq_len, n_rows, **more)
    return list(harvest.Windows(tokens["flat"], tokens["starts"])), tokens["window_document"].tolist(), counts


def store_of(folder):
    (manifest,) = (folder / "activations").glob("*/manifest.json")
    return manifest.parent


def test_each_row_is_the_activation_at_its_token(folder, model, tokenizer):
    rows = rows_of(folder, model, tokenizer)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open()]
    for i in torch.randint(0, len(rows), (40,)).tolist():
        w, p = int(rows.window[i]), int(rows.position[i])
        window = rows.windows[w]
        assert window[0] == tokenizer.bos_token_id and rows.token_ids[i] == window[p]
        captured = {}
        hook = model.get_submodule(HOOK).register_forward_hook(lambda m, a, out: captured.update(out=out))
        model(torch.tensor([window[: p + 1]]))  # the row alone: no padding, nothing after it
        hook.remove()
        torch.testing.assert_close(rows.activations[i], captured["out"][0, p], rtol=1e-4, atol=1e-5)
        assert tokenizer.decode(window[1:]) in texts[rows.window_document[w]]


def test_rows_are_all_text_tokens_in_document_order(folder, model, tokenizer):
    rows = rows_of(folder, model, tokenizer, n_activations=100_000)
    texts = [json.loads(line)["text"] for line in (folder / "text.jsonl").open()]
    expected = [i for text in texts for i in tokenizer(text)["input_ids"]]
    assert rows.token_ids.tolist() == expected
    assert not set(rows.token_ids.tolist()) & set(u.special_ids(tokenizer))
    fewer = rows_of(folder, model, tokenizer, n_activations=1234)
    assert len(fewer) == 1234 and fewer.token_ids.tolist() == expected[:1234]


def test_special_tokens_and_bos_leave_no_row(tokenizer):
    text = "the <eos> cat <unk> <pad> dog"
    tokens, counts = harvest.cut_windows(tokenizer, [text, "<eos> <pad>", "red"], 8, 100)
    assert tokenizer.decode(tokens["token_ids"]) == "the cat dog red"
    assert tokens["position"].tolist() == [1, 3, 6, 1] and tokens["window"].tolist() == [0, 0, 0, 1]
    assert counts["documents_without_text"] == 1 and counts["documents"] == 2 and counts["special_tokens"] == 3
    assert counts["bos_tokens"] == 2 and counts["rows"] == 4 and counts["tokens"] == 9


def test_windows_without_bos_drop_the_first_token():
    tokenizer = word_tokenizer(with_bos=False)
    windows, owners, counts = cut(tokenizer, ["the cat sees a dog .", "cat", "two red bird here one"], 4, 100)
    # the last word of the second document stands alone: as the first token of its window it gives no row
    assert [tokenizer.decode(w) for w in windows] == ["the cat sees a", "dog .", "two red bird here"] and owners == [0, 0, 1]
    assert counts["rows"] == 3 + 1 + 3 and counts["first_tokens"] == 3 and counts["windows_without_text"] == 2


def test_windows_begin_with_bos_once_and_keep_every_token(tokenizer, fresh_seed):
    texts = sentences(20, seed=fresh_seed)
    windows, owners, _ = cut(tokenizer, texts, 8, 10**9)
    assert all(w[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in w[1:] and len(w) <= 8 for w in windows)
    for d, text in enumerate(texts):
        assert tokenizer.decode([t for w, o in zip(windows, owners, strict=True) if o == d for t in w[1:]]) == text


def test_text_of_only_special_tokens_is_refused(tokenizer):
    with pytest.raises(u.UserError, match="no token that is not a special one"):
        harvest.cut_windows(tokenizer, ["<eos>", "<pad> <unk>"], 8, 100)


TEMPLATE = "{{ bos_token }}{% for m in messages %}<eos> {{ m.role }} {{ m.content }} {% endfor %}"


def test_chats_go_through_the_template_with_one_bos(tokenizer, tmp_path):
    chatty = word_tokenizer()
    chatty.chat_template = TEMPLATE
    chatty.add_tokens(["user", "assistant"])
    document = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees a dog"}]
    for documents in ([document], ["the cat\n\nsees a dog\n"]):  # plain text: its first line is the user's
        (window,), _, counts = cut(chatty, documents, 32, 100, chat=True)
        assert chatty.decode(window) == "<bos> <eos> user the cat <eos> assistant sees a dog"
        assert counts["rows"] == 7 and counts["special_tokens"] == 2
    windows, _, _ = cut(chatty, [document], 5, 100, chat=True)
    assert all(w.count(chatty.bos_token_id) == 1 and w[0] == chatty.bos_token_id for w in windows)
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(u.UserError, match="does not fit the model's chat template .roles must alternate"):
        cut(chatty, [document], 32, 100, chat=True)


def test_chat_with_a_model_that_has_no_template_is_refused(folder, model, tokenizer):
    with pytest.raises(u.UserError, match="has no chat template: use an instruct model, or chat false"):
        loaded_params(folder, model, tokenizer, chat=True)


def test_a_column_of_messages_is_read_for_chats(tmp_path):
    messages = [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    text = open_local(tmp_path / "chats.jsonl", text_column="messages", chat=True)
    assert [document[0]["content"] for document in text] == ["one", "two"]
    with pytest.raises(u.UserError, match="column messages does not hold text"):
        open_local(tmp_path / "chats.jsonl", text_column="messages")


def test_bos_is_not_doubled(tokenizer):
    bos = tokenizer.bos_token_id
    assert u.with_bos(tokenizer, [bos, 5, 6]) == u.with_bos(tokenizer, [5, 6]) == [bos, 5, 6] and u.with_bos(tokenizer, []) == [bos]


def test_storage_in_bfloat16_is_the_rounded_row(folder, model, tokenizer):
    exact, rounded = rows_of(folder, model, tokenizer), rows_of(folder, model, tokenizer, activation_dtype="bfloat16")
    assert torch.equal(rounded.activations, exact.activations.bfloat16())


def test_what_rounding_costs_is_measured_on_the_distance_from_the_mean(folder, tokenizer):
    model = gemma()
    model.get_submodule(HOOK).bias = torch.nn.Parameter(torch.full((16,), 30.0), requires_grad=False)  # a large mean
    exact = rows_of(folder, model, tokenizer)
    rounded = rows_of(folder, model, tokenizer, activation_dtype="bfloat16")
    lost = (exact.activations.double() - rounded.activations.double()).square().sum().item()
    assert sum(shard["rounding"] for shard in rounded.manifest["shards"]) == pytest.approx(lost, rel=1e-4)
    assert sum(shard["rounding"] for shard in exact.manifest["shards"]) == 0
    assert lost / (exact.activations.double() - exact.activations.double().mean(0)).square().sum() > 1e-4


def test_rows_are_harvested_once(folder, model, tokenizer, monkeypatch):
    rows_of(folder, model, tokenizer)
    monkeypatch.setattr(harvest, "harvest", lambda *a: pytest.fail("harvested again"))
    rows_of(folder, model, tokenizer)
    rows_of(folder, model, tokenizer, lr=1e-4, expansion=2, seed=5, non_finite="drop")  # none of this changes the rows


def test_whatever_changes_the_rows_changes_their_key(folder, model, tokenizer):
    def key(**changes):
        return harvest.activation_key(loaded_params(folder, model, tokenizer, **changes), HOOK)

    others = {"seq_len": 17, "n_activations": 1501, "activation_dtype": "bfloat16"}
    keys = [key(), *(key(**{n: v}) for n, v in others.items())]
    keys.append(harvest.activation_key(loaded_params(folder, model, tokenizer), "other.hook"))
    keys.append(harvest.activation_key(loaded_params(folder, gemma().bfloat16(), tokenizer), HOOK))
    keys.append(harvest.activation_key(loaded_params(folder, model, word_tokenizer(with_bos=False)), HOOK))
    for file in ("text.jsonl", "model/config.json", "model/model.safetensors"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content + b" ")
        keys.append(key())
        (folder / file).write_bytes(content)
    chatty = word_tokenizer()
    for template in (TEMPLATE, TEMPLATE + "."):
        chatty.chat_template = template
        keys.append(harvest.activation_key(loaded_params(folder, model, chatty, chat=True), HOOK))
    assert len({str(k) for k in keys}) == len(keys) and key() == keys[0]
    assert len({harvest.model_fingerprint(*hub) for hub in (("a/b", "1"), ("a/b", "2"), ("a/c", "1"))}) == 3


def test_a_tokenizer_digest_does_not_depend_on_its_use(tokenizer):
    before = harvest.tokenizer_digest(tokenizer, False)
    tokenizer(["the cat", "a"], padding=True, truncation=True, max_length=3)
    assert harvest.tokenizer_digest(tokenizer, False) == before


def test_a_text_that_changed_is_not_taken_for_the_one_trained_on(folder, model, tokenizer):
    loaded = loaded_params(folder, model, tokenizer)
    with (folder / "text.jsonl").open("a") as file:
        file.write(json.dumps({"text": "the cat"}) + "\n")
    with pytest.raises(u.UserError, match="no longer the text this SAE was trained on"):
        harvest.get_rows(model, tokenizer, HOOK, loaded, folder / "activations")


def test_several_layers_in_one_pass_equal_each_alone(folder, model, tokenizer):
    loaded, hooks = loaded_params(folder, model, tokenizer), [f"model.layers.{i}.mlp.down_proj" for i in (2, 0, 1)]
    sizes = {"shard_windows": 20, "batch_tokens": 100}
    together = harvest.fill(model, tokenizer, hooks, loaded, folder / "together", **sizes)
    assert len(set(together.values())) == 3
    for hook in hooks:
        alone = harvest.fill(model, tokenizer, [hook], loaded, folder / "alone", **sizes)[hook]
        for file in ("rows.bin", "tokens.npz", "manifest.json"):
            assert (alone / file).read_bytes() == (together[hook] / file).read_bytes(), (hook, file)


def test_a_layer_that_lags_behind_is_brought_up_to_the_others(folder, model, tokenizer):
    loaded, hooks = loaded_params(folder, model, tokenizer), [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    sizes = {"shard_windows": 20, "batch_tokens": 100}
    whole = harvest.fill(model, tokenizer, hooks, loaded, folder / "whole", **sizes)
    stop_after(model, tokenizer, [hooks[1]], loaded, folder / "cache", 3, sizes)
    passes = []
    counting = model.register_forward_pre_hook(lambda *a: passes.append(1))
    folders = harvest.fill(model, tokenizer, hooks, loaded, folder / "cache", **sizes)
    counting.remove()
    assert passes
    for hook in hooks:
        assert (folders[hook] / "rows.bin").read_bytes() == (whole[hook] / "rows.bin").read_bytes()


def stop_after(model, tokenizer, hooks, loaded, cache, n_shards, sizes):
    """Leaves a harvest that was interrupted when `n_shards` shards were done."""
    real, done = harvest.Partial.end_shard, []

    def end(self, *span):
        real(self, *span)
        done.append(1)
        if len(done) == n_shards * len(hooks):
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(harvest.Partial, "end_shard", end)
        harvest.fill(model, tokenizer, hooks, loaded, cache, **sizes)


KILLED = """
import json, sys, time
sys.path[:0] = {paths!r}
from conftest import HOOK, loaded_params, word_tokenizer
import harvest, sae_utils, torch, pathlib
folder = pathlib.Path({folder!r})
model, tokenizer = sae_utils.load_model(str(folder / "model"))
model.register_forward_pre_hook(lambda *a: time.sleep(0.01))
harvest.fill(model, tokenizer, [HOOK], loaded_params(folder, model, tokenizer), folder / "activations", shard_windows=10, batch_tokens=64)
"""


@pytest.mark.repeats
def test_a_harvest_killed_three_times_ends_as_if_it_had_not_been(folder, fresh_seed):
    model, tokenizer = u.load_model(str(folder / "model"))
    loaded, sizes = loaded_params(folder, model, tokenizer), {"shard_windows": 10, "batch_tokens": 64}
    whole = harvest.fill(model, tokenizer, [HOOK], loaded, folder / "whole", **sizes)[HOOK]
    partial = folder / "activations" / (whole.name + ".partial") / "manifest.json"
    script = KILLED.format(paths=[str(ROOT / "tests"), str(ROOT), str(ROOT / "notebooks")], folder=str(folder))

    def shards():
        return len(json.loads(partial.read_text())["shards"]) if partial.exists() else 0

    moments, draw = [], random.Random(fresh_seed)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
        goal = shards() + draw.randint(1, 2)
        while shards() < goal and child.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        moments.append(shards())
    assert moments == sorted(moments) and 0 < moments[0] and moments[-1] < len(json.loads((whole / "manifest.json").read_text())["shards"])
    plans = []
    harvest.fill(model, tokenizer, [HOOK], loaded, folder / "activations", plans.append, **sizes)
    assert plans[0]["done_rows"] > 0
    for file in ("rows.bin", "tokens.npz", "manifest.json"):
        digests = [hashlib.sha256((root / whole.name / file).read_bytes()).hexdigest() for root in (folder / "whole", folder / "activations")]
        assert digests[0] == digests[1], file
    assert not partial.parent.exists()


def test_a_shard_that_is_not_as_written_is_harvested_again(folder, model, tokenizer):
    loaded, sizes = loaded_params(folder, model, tokenizer), {"shard_windows": 20, "batch_tokens": 100}
    whole = harvest.fill(model, tokenizer, [HOOK], loaded, folder / "whole", **sizes)[HOOK]
    stop_after(model, tokenizer, [HOOK], loaded, folder / "cache", 3, sizes)
    (rows,) = (folder / "cache").glob("*.partial/rows.bin")
    content = bytearray(rows.read_bytes())
    content[len(content) // 2] ^= 1  # in the second of three shards
    rows.write_bytes(content)
    plans = []
    again = harvest.fill(model, tokenizer, [HOOK], loaded, folder / "cache", plans.append, **sizes)[HOOK]
    assert plans[0]["done_rows"] == json.loads((whole / "manifest.json").read_text())["shards"][0]["rows"]
    assert (again / "rows.bin").read_bytes() == (whole / "rows.bin").read_bytes()


def test_a_partial_store_of_other_versions_is_begun_anew(folder, model, tokenizer):
    loaded, sizes = loaded_params(folder, model, tokenizer), {"shard_windows": 20, "batch_tokens": 100}
    stop_after(model, tokenizer, [HOOK], loaded, folder / "cache", 2, sizes)
    (manifest,) = (folder / "cache").glob("*.partial/manifest.json")
    manifest.write_text(manifest.read_text().replace(torch.__version__, "1.0"))
    plans = []
    harvest.fill(model, tokenizer, [HOOK], loaded, folder / "cache", plans.append, **sizes)
    assert plans[0]["done_rows"] == 0


def test_a_second_run_waits_for_the_first_harvest(folder, model, tokenizer, monkeypatch, capsys):
    loaded, cache, harvests = loaded_params(folder, model, tokenizer), folder / "activations", []
    real, started = harvest.harvest, threading.Event()

    def slow(*arguments):
        harvests.append(1)
        started.set()
        time.sleep(1)
        real(*arguments)

    monkeypatch.setattr(harvest, "harvest", slow)
    first = threading.Thread(target=harvest.get_rows, args=(model, tokenizer, HOOK, loaded, cache))
    first.start()
    started.wait()
    rows = harvest.get_rows(model, tokenizer, HOOK, loaded, cache)
    first.join()
    assert len(harvests) == 1 and len(rows) == 1500 and "another run is harvesting" in capsys.readouterr().out


def test_a_value_beyond_float16_names_the_token_and_the_way_out(folder, tokenizer):
    model = gemma()
    model.get_submodule(HOOK).weight.mul_(1e7)
    with pytest.raises(u.UserError, match=r"window \d+, token '\w+|.' at position \d+: .* too large for float16; set activation_dtype"):
        rows_of(folder, model, tokenizer, activation_dtype="float16")


@pytest.fixture
def broken(folder):
    """A model whose MLP gives NaN at the word `dog`, which stands in some of the windows."""
    model, tokenizer = gemma(), word_tokenizer()
    model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("dog")] = float("nan")
    texts = [text for text in sentences(300, longest=12) if "dog" not in text.split()]
    texts[50] = "dog"  # alone: in attention a NaN reaches the tokens before it too
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return model


def test_nan_stops_the_harvest_and_is_named(folder, broken, tokenizer):
    with pytest.raises(u.UserError, match=r"window 50, token 'dog' at position \d+: the activation is inf or NaN; non_finite drop"):
        rows_of(folder, broken, tokenizer, n_activations=1000)


def test_nan_is_left_out_when_told_to(folder, broken, tokenizer):
    rows = rows_of(folder, broken, tokenizer, n_activations=1000, non_finite="drop")
    (bad,) = (~rows.finite).nonzero().flatten().tolist()
    assert tokenizer.decode([rows.token_ids[bad]]) == "dog" and rows.window[bad] == 50
    assert rows.activations[rows.finite].isfinite().all() and rows.activations[bad].isnan().any()
    with pytest.raises(u.UserError, match="holds 1 rows with inf or NaN .the first: row"):  # a run that was not told so
        rows_of(folder, broken, tokenizer, n_activations=1000)


def damage_length(store):
    (store / "rows.bin").write_bytes((store / "rows.bin").read_bytes()[:-4])


def damage_a_bit(store):
    content = bytearray((store / "rows.bin").read_bytes())
    content[random.randrange(len(content))] ^= 1
    (store / "rows.bin").write_bytes(content)


def damage_tokens(store):
    content = bytearray((store / "tokens.npz").read_bytes())
    content[random.randrange(len(content))] ^= 1
    (store / "tokens.npz").write_bytes(content)


def damage_key(store):
    manifest = (store / "manifest.json").read_text()
    (store / "manifest.json").write_text(manifest.replace('"seq_len": 16', '"seq_len": 17'))


def damage_manifest(store):
    (store / "manifest.json").write_text((store / "manifest.json").read_text()[:-20])


def lose(name):
    def damage(store):
        (store / name).unlink()

    return damage


DAMAGES = [damage_length, damage_a_bit, damage_tokens, damage_key, damage_manifest, *map(lose, ("rows.bin", "tokens.npz", "manifest.json"))]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_by_name_and_left_alone(damage, folder, model, tokenizer):
    rows_of(folder, model, tokenizer)
    store = store_of(folder)
    damage(store)
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    with pytest.raises(u.UserError, match=f"{store.name} is damaged .*: delete that folder to harvest again"):
        rows_of(folder, model, tokenizer)
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before
    shutil.rmtree(store)
    assert len(rows_of(folder, model, tokenizer)) == 1500


def test_a_full_disk_is_told_and_what_was_written_is_kept(folder, model, tokenizer, monkeypatch):
    loaded, sizes = loaded_params(folder, model, tokenizer), {"shard_windows": 20, "batch_tokens": 100}
    real = harvest.Partial.write

    def full(self, *arguments):
        if len(self.manifest["shards"]) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(harvest.Partial, "write", full)
        with pytest.raises(u.UserError, match="disk of .* is full: free some space and repeat"):
            harvest.fill(model, tokenizer, [HOOK], loaded, folder / "activations", **sizes)
    plans = []
    harvest.fill(model, tokenizer, [HOOK], loaded, folder / "activations", plans.append, **sizes)
    assert plans[0]["done_rows"] > 0


def test_too_little_room_is_told_before_the_harvest(folder, model, tokenizer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 1500 * 16 * 4 - 1))
    with pytest.raises(u.UserError, match="the activations need 0.1 MB in .*, where 0.1 MB are free: lower n_activations, or make room"):
        rows_of(folder, model, tokenizer)
    assert not list((folder / "activations").glob("*.partial"))


def test_a_cache_that_cannot_be_written_is_told(folder, model, tokenizer, monkeypatch):
    (folder / "activations").touch()  # a file where the folder should be
    with pytest.raises(u.UserError, match="activations cannot be written .*: mend its permissions"):
        rows_of(folder, model, tokenizer)


def test_the_card_says_what_is_to_come(folder, model, tokenizer):
    plans = []
    harvest.fill(model, tokenizer, [HOOK], loaded_params(folder, model, tokenizer), folder / "activations", plans.append)
    text = harvest.card(plans[0])
    assert plans[0]["bytes"] == 1500 * 16 * 4 and plans[0]["tokens_per_second"] > 0
    assert "1,500 rows from" in text and "tokens/s" in text and "to write" in text and "BOS of each of" in text
    without = word_tokenizer(with_bos=False)
    harvest.fill(model, without, [HOOK], loaded_params(folder, model, without), folder / "activations", plans.append)
    assert "the tokenizer has no BOS" in harvest.card(plans[1])


def test_a_tokenizer_without_padding_will_do(folder, model):
    without = word_tokenizer()
    without.pad_token = None
    assert without.pad_token_id is None and len(rows_of(folder, model, without)) == 1500


def test_spectrum_against_float64(fresh_seed):
    x = torch.randn(500, 12) * torch.rand(12) * 5 + 100
    index = torch.randperm(500)[:400]
    variances, rank, components = harvest.spectrum(x, index)
    expected = np.cov(x[index].double().numpy().T, bias=True)
    share = np.linalg.eigvalsh(expected) / np.trace(expected)
    np.testing.assert_allclose(variances, np.sort(np.diag(expected))[::-1])
    assert rank == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    torch.testing.assert_close(components @ components.T, torch.eye(12), atol=1e-5, rtol=0)
    np.testing.assert_allclose(np.diag(components.double().numpy() @ expected @ components.double().T.numpy()), np.linalg.eigvalsh(expected)[::-1], rtol=1e-4)
    one_direction = torch.randn(300, 1) * torch.randn(1, 12)
    assert harvest.spectrum(one_direction, torch.arange(300))[1] == pytest.approx(1, abs=1e-4)


def test_documents_are_wholly_in_train_or_held_out(folder, model, tokenizer):
    rows = rows_of(folder, model, tokenizer)
    train, held_out = harvest.split_windows(rows.window_document, 0.1)
    owner = rows.window_document
    assert torch.equal(train, ~held_out) and not set(owner[train].tolist()) & set(owner[held_out].tolist())
    assert abs(len(owner[held_out].unique()) - 0.1 * len(owner.unique())) <= 1


def test_a_single_document_is_split_with_a_gap():
    train, held_out = harvest.split_windows([0] * 20, 0.1)
    assert train.nonzero().flatten().tolist() == list(range(17)) and held_out.nonzero().flatten().tolist() == [18, 19]
    with pytest.raises(u.UserError):
        harvest.split_windows([0, 0], 0.1)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.15, 0.3, 0.5])
def test_held_out_documents_are_a_random_choice_that_stays(fraction, fresh_seed):
    """About the fraction, from two documents on at least one on either side, and no document changes sides when others come after it."""
    choice = lambda n, seed=fresh_seed: harvest.held_out_documents(n, fraction, seed)
    longest = choice(3000)
    for n in (1, 2, 3, 7, 20, 333, 2999):
        assert choice(n) == longest[:n] if n > 1 else choice(n) == [False]
        assert n == 1 or 0 < sum(choice(n)) < n and abs(sum(choice(n)) - fraction * n) <= 1
    places = np.flatnonzero(longest)
    assert choice(3000) == longest != choice(3000, fresh_seed + 1)
    if fraction < 0.5:  # of two there are only two places
        assert len(set(np.diff(places))) > 2  # at no fixed distance
    sides = [harvest.held_out_documents(2, fraction, seed).index(True) for seed in range(40)]
    assert set(sides) == {0, 1}


@pytest.mark.parametrize("period", [2, 5, 10])
def test_sources_that_take_turns_are_held_out_in_equal_parts(period, fresh_seed):
    held_out = np.flatnonzero(harvest.held_out_documents(4000, 0.1, fresh_seed))
    counts = np.bincount(held_out % period, minlength=period)
    assert counts.sum() == 400 and np.abs(counts - 400 / period).max() < 5 * np.sqrt(400 / period)


def write_texts(file, texts):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_equal_documents_are_one(folder, model, tokenizer, fresh_seed):
    """21 texts, ten times each, in any order and with other white space at their ends: on one side, one document of every figure."""
    texts = list(dict.fromkeys(sentences(200, seed=fresh_seed, longest=60)))[-21:]
    copies = [end + text + other for text in texts for end, other in zip(" \n\t  ", ["", " ", "\n", "", "\r\n"], strict=True)] + texts * 5
    random.Random(fresh_seed).shuffle(copies)
    write_texts(folder / "text.jsonl", copies)
    plans, loaded = [], loaded_params(folder, model, tokenizer, n_activations=10**6)
    rows = harvest.get_rows(model, tokenizer, HOOK, loaded, folder / "activations", plans.append)
    assert rows.manifest["counts"]["documents"] == 210 and rows.manifest["counts"]["different_documents"] == 21
    assert "of 210 documents, 21 of them different, at" in harvest.card(plans[0])
    assert rows.window_place.unique().tolist() == list(range(210))
    first = {text.strip(): number for number, text in reversed(list(enumerate(copies)))}
    assert rows.window_document.tolist() == [first[copies[place].strip()] for place in rows.window_place.tolist()]
    text_of = lambda mask: {copies[place].strip() for place in rows.window_place[mask].tolist()}
    train, held_out = harvest.split_windows(rows.window_document, 0.3)
    assert text_of(train) | text_of(held_out) == set(texts) and not text_of(train) & text_of(held_out) and len(text_of(held_out)) in (6, 7)
    watched, judging, apart = fidelity.watch_and_judge(held_out, rows.window_document)
    assert apart and not text_of(watched) & text_of(judging)
    tried = choosing.second_half(held_out, rows.window_document)
    assert text_of(tried) and text_of(held_out & ~tried) and not text_of(tried) & text_of(held_out & ~tried)


def test_one_document_many_times_cannot_be_split(folder, model, tokenizer):
    write_texts(folder / "text.jsonl", ["the cat sees a dog . " * 20 + " " * i for i in range(12)])
    with pytest.raises(u.UserError, match="the text is one document, 12 times: no part of it could be held out"):
        rows_of(folder, model, tokenizer)


def test_documents_of_a_single_token_without_bos(tokenizer):
    without = word_tokenizer(with_bos=False)
    with pytest.raises(u.UserError, match="no document has text after its first token, which gives no row where the tokenizer has no BOS"):
        harvest.cut_windows(without, ["cat", "dog", "<eos>"], 8, 100)
    assert harvest.cut_windows(tokenizer, ["cat", "dog", "<eos>"], 8, 100)[1]["rows"] == 2


@pytest.mark.parametrize("with_bos", [True, False])
def test_of_a_long_document_only_what_is_wanted_is_read(with_bos, fresh_seed):
    counted, real = [], word_tokenizer(with_bos)

    class Counting:
        def __getattr__(self, name):
            return getattr(real, name)

        def __call__(self, texts, **more):
            counted.extend(map(len, texts))
            return real(texts, **more)

    long = " ".join(sentences(20_000, seed=fresh_seed))
    for n_rows in (100, 2000):
        counted.clear()
        tokens, counts = harvest.cut_windows(Counting(), [long], 16, n_rows)
        assert sum(counted) < 0.06 * len(long) and counts["rows"] == n_rows
        whole = real([long], add_special_tokens=False)["input_ids"][0]
        expected = [t for i, t in enumerate(whole) if with_bos or i % 16][:n_rows]
        assert tokens["token_ids"].tolist() == expected
    for sparse in (("cat" + " " * 500) * 400, "<eos> <eos> <eos> <eos> <eos> <eos> <eos> cat dog " * 400):  # so few words that more has to be read
        counted.clear()
        assert harvest.cut_windows(Counting(), [sparse], 16, 300)[1]["rows"] == 300 and len(sparse) in counted


def open_local(path, **changes):
    return harvest.open_text(experiment.check_params("sae_training", {"dataset_name": str(path)} | changes))


WIKI_LINES = ["", " = First = ", "", " Words of it . ", " = = Section = = ", " More . ", " = Second = ", " Other . "]


def test_wikitext_lines_become_articles(tmp_path, folder, model, tokenizer, capsys):
    (tmp_path / "WikiText-rows").mkdir()
    datasets.Dataset.from_dict({"text": [line + "\n" for line in WIKI_LINES]}).to_parquet(tmp_path / "WikiText-rows" / "data.parquet")
    text = open_local(tmp_path / "WikiText-rows")
    assert list(text) == list(text) == [" = First = \n Words of it . \n = = Section = = \n More . \n", " = Second = \n Other . \n"]
    assert text.notice.endswith("WikiText's lines are joined into articles")
    (folder / "wikitext.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [" = the cat = \n", *sentences(100)]))
    rows = rows_of(folder, model, tokenizer, dataset_name=str(folder / "wikitext.jsonl"), n_activations=1000)
    assert not rows.window_document.any() and capsys.readouterr().out.count("joined into articles") == 1


def test_nothing_else_is_joined(tmp_path):
    """Headings alone make no WikiText, and its name alone neither, where rows are whole articles."""
    stories = [f"Once upon a time there was a girl number {i}." for i in range(500)]
    rows = [*stories[:250], " = 42 = ", *stories[250:]]
    (tmp_path / "heading.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    text = open_local(tmp_path / "heading.jsonl")
    assert list(text) == rows and len(rows) == 501 and text.notice == ""
    for name, kept in (("wikitext", [" = One = \n of it", " = Two = "]), ("wikitext-2", ["= One =\n", "no heading"])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in kept))
        assert list(open_local(tmp_path / f"{name}.jsonl")) == kept
    whole = [line for line in WIKI_LINES if line]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in whole))
    shutil.copy(tmp_path / "lines.jsonl", tmp_path / "wikitext-lines.jsonl")
    plain, joined = open_local(tmp_path / "lines.jsonl"), open_local(tmp_path / "wikitext-lines.jsonl")
    assert list(plain) == whole and len(list(joined)) == 2 and plain.fingerprint != joined.fingerprint  # other documents of the same bytes


def test_a_text_file_is_one_document_and_a_folder_one_for_each(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    assert list(open_local(tmp_path / "a.txt")) == ["one\ntwo\n"]
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.TXT").write_text("four\nfive")
    assert list(open_local(tmp_path, dataset_config="ignored")) == ["one\ntwo\n", "three", "four\nfive"]


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_names_that_look_like_patterns_are_names(kind, tmp_path):
    for name in ("story1", "story[1]", "story?", "story*"):
        file = tmp_path / f"{name}.{kind}"
        if kind == "parquet":
            datasets.Dataset.from_dict({"text": [name]}).to_parquet(file)
        else:
            file.write_text(name if kind == "txt" else json.dumps({"text": name}))
    assert sorted(open_local(tmp_path)) == sorted(["story1", "story[1]", "story?", "story*"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_file_replaced_by_another_of_its_name_size_and_time_is_read_anew(kind, tmp_path):
    file, seen = tmp_path / f"text.{kind}", []
    for text in ("red", "two"):
        if kind == "parquet":
            datasets.Dataset.from_dict({"text": [text]}).to_parquet(file)
        else:
            file.write_text(json.dumps({"text": text}) + "\n")
        os.utime(file, (1e9, 1e9))
        opened = open_local(file)
        seen.append((list(opened), opened.fingerprint, file.stat().st_size))
    assert seen[0][0] == ["red"] and seen[1][0] == ["two"] and seen[0][1] != seen[1][1] and seen[0][2] == seen[1][2]


def write_lines(file, lines, **more):
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(50)) + "\n" + lines, **more)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "half an emoji \\ud83d here"}', r"odd.jsonl, line 52: column text holds half a character .*; mend that line, or leave it out: sed 52d .*odd.jsonl'? > mended.jsonl"),
        ('{"text": "She lik', r"odd.jsonl, line 52 is not JSON \(Unterminated string starting at, character 9\); mend that line, or leave it out: sed 52d"),
        ('["the cat"]', "odd.jsonl, line 52 is no JSON object"),
        ('{"text": ["the cat"]}', "odd.jsonl, line 52: column text does not hold text, but "),
        ('{"text": "caf\udce9"}', r"odd.jsonl, line 52 is not JSON \(not even UTF-8\)"),
    ],
)
def test_an_odd_line_is_named_and_the_way_on_works(line, message, tmp_path, monkeypatch):
    write_lines(tmp_path / "it's odd.jsonl", line, errors="surrogateescape")
    with pytest.raises(u.UserError, match=message) as raised:
        open_local(tmp_path / "it's odd.jsonl")
    subprocess.run(str(raised.value).partition("leave it out: ")[2].removesuffix("."), shell=True, check=True, cwd=tmp_path)
    assert list(open_local(tmp_path / "mended.jsonl")) == sentences(50)


def test_an_odd_line_far_on_is_named_when_it_is_reached(tmp_path, tokenizer):
    texts = sentences(3000)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{")
    text = open_local(tmp_path / "text.jsonl")
    assert len(cut(tokenizer, text, 8, 100)[0]) > 10
    with pytest.raises(u.UserError, match="text.jsonl, line 3001 is not JSON"):
        cut(tokenizer, text, 8, 10**9)


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(u.UserError, match=r"latin.txt is not UTF-8 \(byte 3\): save it as UTF-8"):
        open_local(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\r\n")  # with a mark at its beginning, as editors write it
    (tmp_path / "b.txt").touch()
    assert list(open_local(tmp_path)) == ["caf\u00e9\n"]


def test_other_columns_may_hold_anything(tmp_path):
    rows = [{"text": f"story {i}", "meta": i if i < 20_000 else {"kind": [i]}} | ({"new": None} if i > 25_000 else {}) for i in range(30_000)]
    rows[7] = {"meta": "no text"}
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(open_local(tmp_path / "text.jsonl")) == [row["text"] for row in rows if "text" in row]
    with pytest.raises(u.UserError, match="has no column story; it has: text, meta"):
        open_local(tmp_path / "text.jsonl", text_column="story")


def test_digests_are_of_what_is_read(folder, model):
    """A README in the model's folder or another name of the text changes nothing; weights, config, tokenizer and the order of files do."""
    fingerprint = lambda: harvest.model_fingerprint(str(folder / "model"), "")
    before = fingerprint()
    for name in ("README.md", "LICENSE", "generation_config.json", "training_args.bin", "events.out.tfevents.1"):
        (folder / "model" / name).write_text("new")
    assert fingerprint() == before
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt", "adapter_config.json"):
        content = (folder / "model" / name).read_bytes() if (folder / "model" / name).exists() else None
        (folder / "model" / name).write_bytes((content or b"") + b" ")
        assert fingerprint() != before, name
        (folder / "model" / name).unlink() if content is None else (folder / "model" / name).write_bytes(content)
    assert fingerprint() == before
    text = open_local(folder / "text.jsonl")
    documents = list(text)
    (folder / "text.jsonl").rename(folder / "other.jsonl")
    renamed = open_local(folder / "other.jsonl")
    assert renamed.fingerprint == text.fingerprint and list(renamed) == documents
    (folder / "two").mkdir()
    (folder / "two" / "a.txt").write_text("one")
    (folder / "two" / "b.txt").write_text("two")
    both = open_local(folder / "two")
    (folder / "two" / "b.txt").rename(folder / "two" / "c.txt")
    assert open_local(folder / "two").fingerprint == both.fingerprint
    (folder / "two" / "a.txt").rename(folder / "two" / "d.txt")  # now the second one
    assert open_local(folder / "two").fingerprint != both.fingerprint and list(open_local(folder / "two")) == ["two", "one"]
    shutil.copy(folder / "other.jsonl", folder / "other.txt")  # one document of the same bytes
    assert open_local(folder / "other.txt").fingerprint != text.fingerprint


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A dataset `me/tales` of two parquet files with 300 texts each, in a hub's place, and the calls that were made for it."""
    texts, calls, stated = sentences(600), [], {}
    for part in (0, 1):
        datasets.Dataset.from_dict({"id": range(300), "text": texts[300 * part : 300 * part + 300]}).to_parquet(tmp_path / f"part-{part}.parquet")
    real, real_builder = datasets.load_dataset, datasets.load_dataset_builder
    there = lambda **given: given | {"data_files": {"train": [str(tmp_path / f"part-{part}.parquet") for part in (0, 1)]}, "cache_dir": str(tmp_path / "cache")}

    def load(source, **given):
        calls.append((source, given["streaming"]))
        return real("parquet", **there(**given))

    def builder(source, **given):
        found = real_builder("parquet", **there(**given))
        if stated:
            found.info.splits = {"train": datasets.SplitInfo("train", **stated)}
        return found

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    return texts, calls, stated


@pytest.mark.parametrize(
    ("stated", "wanted", "streaming"),
    [({}, 1000, True), ({"num_bytes": 2 * 10**9}, 1000, True), ({"num_bytes": 2 * 10**9}, 2 * 10**7, False), ({"num_bytes": 10**6}, 1000, False)],
)
def test_a_large_dataset_is_streamed_and_a_small_one_fetched(hub, stated, wanted, streaming, tmp_path):
    """By its size as stated, beside what is wanted. A stream is shuffled, the same way each time, and its key says so."""
    texts, calls, sizes = hub
    sizes |= stated
    text = open_local("me/tales", n_activations=wanted)
    documents = list(text)
    assert calls == [("me/tales", streaming)] and list(text) == documents and sorted(documents) == sorted(texts)
    assert (documents != texts) == streaming
    again = open_local("me/tales", n_activations=wanted)
    assert again.fingerprint == text.fingerprint and list(again) == documents
    if streaming:
        assert not (tmp_path / "cache" / "parquet").exists()  # streamed rows leave nothing on the disk
    sizes.clear()
    sizes["num_bytes"] = 10**6
    fetched = open_local("me/tales", n_activations=wanted)  # now it is here
    sizes["num_bytes"] = 10**12
    kept = open_local("me/tales", n_activations=wanted)
    assert [call[1] for call in calls[2:]] == [False, False] and fetched.fingerprint == kept.fingerprint
    assert list(fetched) == texts == list(kept) and (fetched.fingerprint == text.fingerprint) == (not streaming)


def test_streaming_reads_no_more_than_it_needs(hub, tokenizer, tmp_path, monkeypatch):
    texts, calls, _ = hub
    monkeypatch.setattr(harvest, "SHUFFLE_BUFFER", 20)
    text = open_local("me/tales", n_activations=1000)
    documents = list(text)
    assert set(documents[:280]) <= set(texts[:300]) and documents[:280] != texts[:280]
    whole = cut(tokenizer, documents, 16, 1000)
    (tmp_path / "part-1.parquet").write_bytes(b"never looked at")
    assert cut(tokenizer, text, 16, 1000) == whole and calls == [("me/tales", True)]
    with pytest.raises(u.UserError, match="dataset me/tales could not be loaded: "):
        cut(tokenizer, text, 16, 10**6)


def test_a_shuffle_buffer_loses_nothing_and_moves_rows_no_further_than_it_is_long():
    for n, size in ((0, 5), (3, 5), (200, 20)):
        mixed = list(harvest.shuffled(iter(range(n)), size))
        assert sorted(mixed) == list(range(n)) and mixed == list(harvest.shuffled(iter(range(n)), size))
        assert all(place >= value - size for place, value in enumerate(mixed))
    assert mixed != list(range(200)) and mixed != list(harvest.shuffled(iter(range(200)), 20, seed=1))


def test_a_slice_of_a_dataset_is_not_streamed(hub):
    texts, calls, _ = hub
    assert list(open_local("me/tales", dataset_split="train[10:20]")) == texts[10:20] and calls == [("me/tales", False)]
    one, other = (open_local("me/tales", dataset_split=split).fingerprint for split in ("train[:30]", "train[:31]"))
    assert one != other


def test_mistakes_in_a_hub_dataset_are_told(hub, monkeypatch):
    with pytest.raises(u.UserError, match="dataset me/tales has no column story; it has: id, text"):
        open_local("me/tales", text_column="story")
    with pytest.raises(u.UserError, match="column id does not hold text") as told:
        open_local("me/tales", text_column="id")
    row, value = map(int, re.findall(r"row (\d+): .* but '(\d+)'", str(told.value))[0])
    assert row % 300 == value  # two files of 300 ids
    with pytest.raises(u.UserError, match="dataset me/tales could not be loaded: .*test"):
        open_local("me/tales", dataset_split="test")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *a, **b: types.SimpleNamespace(hash=None))
    with pytest.raises(u.UserError, match="the commit of dataset me/tales cannot be told"):
        open_local("me/tales")


SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "gpt2": transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=32),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=32),
    "qwen2": transformers.Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1),
    "olmo2": transformers.Olmo2Config(**SMALL, intermediate_size=32),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16),
    "phi": transformers.PhiConfig(**SMALL, intermediate_size=32),
    "olmo": transformers.OlmoConfig(**SMALL, intermediate_size=32),
    "qwen3": transformers.Qwen3Config(**SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8),
    "gemma3_text": transformers.Gemma3TextConfig(**SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=8),
    "gemma3": transformers.Gemma3Config(  # 4b and up: the language model sits inside one that sees
        text_config={**SMALL, "intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8},
        vision_config={"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_each_family_are_those_of_the_whole_model(family, tmp_path, folder, tokenizer):
    """The hook is found; a forward pass that stops there equals the whole one; harvested rows equal
    the MLP outputs of one window at a time."""
    config = FAMILIES[family]
    config.save_pretrained(tmp_path)
    name = u.find_hook(str(tmp_path), 1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    captured, reached = {}, []
    model.get_submodule(name).register_forward_hook(lambda m, a, out: captured.update(out=out))
    model.get_submodule(name.split(".1.")[0])[2].register_forward_hook(lambda *a: reached.append(1))
    ids, mask = u.pad([[3, 4, 5, 6], [7, 8]])
    whole = model(input_ids=ids, attention_mask=mask)
    assert reached and whole.logits.shape == (2, 4, 30)
    reached.clear()
    stopped = u.run_to_hook(model, name, ids, mask)
    assert not reached and torch.equal(stopped, captured["out"].view(2, 4, 16))
    loaded = loaded_params(folder, model, tokenizer, n_activations=1000)
    rows = harvest.get_rows(model, tokenizer, name, loaded, folder / "activations")
    assert not reached
    for w in torch.randint(0, int(rows.window.max()), (8,)).tolist():
        model(input_ids=torch.tensor([rows.windows[w]]))
        here = rows.window == w
        expected = captured["out"].view(-1, 16)[rows.position[here]]
        torch.testing.assert_close(rows.activations[here], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_a_checkpoint_that_lacks_weights_is_refused(folder, model):
    weights = dict(model.state_dict())
    del weights["model.layers.2.mlp.up_proj.weight"]
    model.save_pretrained(folder / "model", state_dict=weights)
    with pytest.raises(u.UserError, match="lacks 1 weights.*up_proj"):
        u.load_model(str(folder / "model"))


def test_a_hook_that_is_never_called_is_refused(model):
    with pytest.raises(u.UserError, match="model.layers is never called"):
        u.run_to_hook(model, "model.layers", *u.pad([[3, 5]]))


def peak_bytes_of_contexts(n: int) -> float:
    """Peak memory of `features.contexts` over n rows of width 64 beyond the rows themselves; to be called in a process of its own."""
    import bench
    import features

    rows, index = torch.empty(n, 64, dtype=torch.bfloat16), torch.arange(n)
    for part in rows.split(50_000):
        part.copy_(torch.randn(len(part), 64))
    sae = bench.sae_with_l0(64, 256, 16, rows[:256].float())
    with bench.Measured("contexts", 1.0) as memory:
        memory.during("contexts", lambda: features.contexts(sae, rows, index, index // 100))
    return 1e9 * memory.rows[0]["ours"]


@pytest.mark.repeats
def test_memory_hardly_grows_with_the_rows():
    """Entries kept in small pieces while large temporaries come and go pin the heap between them: it was 800 to 2,900 bytes a row, where 150 will do."""
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        assert alone.apply(peak_bytes_of_contexts, (400_000,)) < 400 * 400_000
