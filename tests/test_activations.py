"""Rows are the right tokens' activations, and only those."""

import json
import threading
import time

import datasets
import pytest
import torch
import transformers
from conftest import HOOK, gemma, sentences, training_params, word_tokenizer

import sae_utils as u


def rows_of(folder, model, tokenizer, **changes):
    return u.get_rows(model, tokenizer, HOOK, training_params(folder, **changes), folder / "activations")


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
    special, bos = set(u.special_ids(tokenizer)), tokenizer.bos_token_id
    window = [bos, 5, tokenizer.eos_token_id, 6, tokenizer.unk_token_id, tokenizer.pad_token_id, 7]
    assert u.text_positions(window, special, bos) == [1, 3, 6]
    assert u.text_positions([5, 6, tokenizer.eos_token_id, 7], special, None) == [1, 3]  # the first is the sink


def test_windows_without_bos_drop_the_first_token():
    tokenizer = word_tokenizer(with_bos=False)
    windows, owners = u.cut_windows(tokenizer, ["the cat sees a dog ."], 4, 100)
    assert [tokenizer.decode(w) for w in windows] == ["the cat sees a", "dog ."] and owners == [0, 0]


def test_windows_begin_with_bos_once_and_keep_every_token(tokenizer, fresh_seed):
    texts = sentences(20, seed=fresh_seed)
    windows, owners = u.cut_windows(tokenizer, texts, 8, 10**9)
    assert all(w[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in w[1:] and len(w) <= 8 for w in windows)
    for d, text in enumerate(texts):
        assert tokenizer.decode([t for w, o in zip(windows, owners, strict=True) if o == d for t in w[1:]]) == text


def test_bos_is_not_doubled(tokenizer):
    bos = tokenizer.bos_token_id
    assert u.with_bos(tokenizer, [bos, 5, 6]) == u.with_bos(tokenizer, [5, 6]) == [bos, 5, 6] and u.with_bos(tokenizer, []) == [bos]


def test_storage_in_bfloat16_is_the_rounded_row(folder, model, tokenizer):
    exact, rounded = rows_of(folder, model, tokenizer), rows_of(folder, model, tokenizer, activation_dtype="bfloat16")
    assert torch.equal(rounded.activations, exact.activations.bfloat16())


def test_rows_are_harvested_once(folder, model, tokenizer, monkeypatch):
    rows_of(folder, model, tokenizer)
    monkeypatch.setattr(u, "harvest", lambda *a: pytest.fail("harvested again"))
    rows_of(folder, model, tokenizer)
    rows_of(folder, model, tokenizer, lr=1e-4, expansion=2, seed=5)  # none of this changes the rows


def test_whatever_changes_the_rows_changes_their_key(folder):
    params = training_params(folder)
    key = u.activation_key(params, HOOK)
    others = {"seq_len": 17, "n_activations": 1501, "activation_dtype": "bfloat16", "dtype": "bfloat16", "text_column": "body"}
    keys = [key, u.activation_key(params, "other.hook"), *(u.activation_key(params | {n: v}, HOOK) for n, v in others.items())]
    for file in ("text.jsonl", "model/config.json", "model/model.safetensors", "model/tokenizer.json"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content + b" ")
        keys.append(u.activation_key(params, HOOK))
        (folder / file).write_bytes(content)
    hub = params | {"model_name": "a/b", "dataset_name": "c/d"}
    keys += [u.activation_key(hub | {n: "x"}, HOOK) for n in ("model_revision", "dataset_revision", "dataset_config", "dataset_split")]
    keys += [u.activation_key(hub | {n: "e/f"}, HOOK) for n in ("model_name", "dataset_name")]
    assert len({str(k) for k in keys}) == len(keys) and u.activation_key(params, HOOK) == key


def test_a_second_run_waits_for_the_first_harvest(folder, model, tokenizer, monkeypatch, capsys):
    params, cache, harvests = training_params(folder), folder / "activations", []
    real, started = u.harvest, threading.Event()

    def slow(*arguments):
        harvests.append(1)
        started.set()
        time.sleep(1)
        real(*arguments)

    monkeypatch.setattr(u, "harvest", slow)
    first = threading.Thread(target=u.get_rows, args=(model, tokenizer, HOOK, params, cache))
    first.start()
    started.wait()
    rows = u.get_rows(model, tokenizer, HOOK, params, cache)
    first.join()
    assert len(harvests) == 1 and len(rows) == 1500 and "another run is harvesting" in capsys.readouterr().out


def test_what_a_killed_harvest_left_is_cleared(folder, model, tokenizer):
    params = training_params(folder)
    rows_of(folder, model, tokenizer)
    store = next((folder / "activations").glob("*/manifest.json")).parent
    (store / "manifest.json").unlink()
    left_over = store.with_name(f".{store.name}.tmp")
    left_over.mkdir()
    (left_over / "rows.bin").touch()
    assert len(rows_of(folder, model, tokenizer)) == params["n_activations"] and not left_over.exists()


def test_an_activation_beyond_float16_is_refused(folder, tokenizer):
    model = gemma()
    model.get_submodule(HOOK).weight.mul_(1e7)
    with pytest.raises(u.UserError, match="not a finite number in float16: try bfloat16 or float32"):
        rows_of(folder, model, tokenizer, activation_dtype="float16")
    assert not [f for f in (folder / "activations").iterdir() if f.suffix != ".lock"]


def test_a_damaged_store_is_refused_by_name(folder, model, tokenizer):
    rows_of(folder, model, tokenizer)
    store = next((folder / "activations").glob("*/rows.bin"))
    store.write_bytes(store.read_bytes()[:-4])
    with pytest.raises(u.UserError, match=store.parent.name):
        rows_of(folder, model, tokenizer)


def test_documents_are_wholly_in_train_or_held_out(folder, model, tokenizer):
    rows = rows_of(folder, model, tokenizer)
    train, held_out = u.split_windows(rows.window_document, 0.1)
    owner = torch.tensor(rows.window_document)
    assert torch.equal(train, ~held_out) and not set(owner[train].tolist()) & set(owner[held_out].tolist())
    n = int(owner.max()) + 1
    assert abs(len(owner[held_out].unique()) - 0.1 * n) <= 1


def test_a_single_document_is_split_with_a_gap():
    train, held_out = u.split_windows([0] * 20, 0.1)
    assert train.nonzero().flatten().tolist() == list(range(17)) and held_out.nonzero().flatten().tolist() == [18, 19]
    with pytest.raises(u.UserError):
        u.split_windows([0, 0], 0.1)


def test_few_documents_still_hold_one_out():
    assert u.held_out_documents(3, 0.1) == [False, False, True]
    assert sum(u.held_out_documents(1000, 0.1)) == 100


def test_wikitext_lines_become_articles(tmp_path):
    lines = ["", " = First = ", "", " Words of it . ", " = = Section = = ", " More . ", " = Second = ", " Other . "]
    (tmp_path / "rows").mkdir()
    datasets.Dataset.from_dict({"text": [line + "\n" for line in lines]}).to_parquet(tmp_path / "rows" / "data.parquet")
    articles = list(u.read_documents(str(tmp_path / "rows")))
    assert articles == [" = First = \n Words of it . \n = = Section = = \n More . \n", " = Second = \n Other . \n"]


def test_a_text_file_is_one_document_and_a_folder_one_for_each(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    assert list(u.read_documents(str(tmp_path / "a.txt"))) == ["one\ntwo\n"]
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "c.TXT").write_text("four\nfive")
    assert sorted(u.read_documents(str(tmp_path), config="ignored")) == ["four\nfive", "one\ntwo\n", "three"]


SMALL = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "gpt2": transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=3, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1),
    "gpt_neox": transformers.GPTNeoXConfig(**SMALL, intermediate_size=32),
    "llama": transformers.LlamaConfig(**SMALL, intermediate_size=32),
    "qwen2": transformers.Qwen2Config(**SMALL, intermediate_size=32, num_key_value_heads=1),
    "olmo2": transformers.Olmo2Config(**SMALL, intermediate_size=32),
    "opt": transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16),
    "phi": transformers.PhiConfig(**SMALL, intermediate_size=32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_hook_of_each_family_is_the_mlp_output(family, tmp_path):
    torch.manual_seed(0)
    config = FAMILIES[family]
    config.save_pretrained(tmp_path)
    name = u.find_hook(str(tmp_path), 1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    captured, reached = {}, []
    model.get_submodule(name).register_forward_hook(lambda m, a, out: captured.update(out=out))
    layer = model.get_submodule(name.split(".1.")[0])[2]
    layer.register_forward_hook(lambda *a: reached.append(1))
    ids, mask = u.pad([[3, 4, 5, 6], [7, 8]])
    whole = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    assert reached
    reached.clear()
    stopped = u.run_to_hook(model, name, ids, mask)
    assert not reached and torch.equal(stopped, captured["out"].view(2, 4, 16))
    assert whole.logits.shape == (2, 4, 30)


def test_a_checkpoint_that_lacks_weights_is_refused(folder, model):
    weights = dict(model.state_dict())
    del weights["model.layers.2.mlp.up_proj.weight"]
    model.save_pretrained(folder / "model", state_dict=weights)
    with pytest.raises(u.UserError, match="lacks 1 weights.*up_proj"):
        u.load_model(str(folder / "model"))


def test_a_hook_that_is_never_called_is_refused(model):
    with pytest.raises(u.UserError, match="model.layers is never called"):
        u.run_to_hook(model, "model.layers", *u.pad([[3, 5]]))
