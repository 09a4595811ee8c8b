"""The autoencoder, its files, the learning rate."""

import copy
import errno
import os
import pickle
import re

import numpy as np
import pytest
import torch
from conftest import gemma, gpt2
from transformers.pytorch_utils import Conv1D

import harvest
import sae_utils as u
import showing
import storing
import training


def test_encode_and_decode_are_the_equations(sae):
    x = torch.randn(5, 3, 16) * 7
    centred = x.double() - sae.mean.double()
    norm = centred.norm(dim=-1, keepdim=True)
    acts = torch.relu(centred / norm @ sae.W_enc.double() + sae.b_enc.double())
    x_hat = (acts @ sae.W_dec.double() + sae.b_dec.double()) * norm + sae.mean.double()
    torch.testing.assert_close(sae.encode(x).double(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("layout", ["as they come", "transposed", "every other", "one row repeated", "of three dimensions", "nothing"])
def test_a_product_is_the_product(layout, out, bias, products):
    d, n = 24, 40
    x, weight = torch.randn(18, d), torch.randn(n, d)
    if layout == "transposed":
        x, weight = torch.randn(d, 18).T, torch.randn(d, n).T
    elif layout == "every other":
        x, weight = torch.randn(36, 2 * d)[::2, ::2], torch.randn(2 * n, 2 * d)[::2, ::2]
    elif layout == "one row repeated":
        x, weight = torch.randn(d).expand(18, d), weight[torch.randint(n, (n,))]
    elif layout == "nothing":
        x = x[:0]
    elif layout == "of three dimensions":
        x = torch.randn(6, d, 3).transpose(1, 2)
    b = torch.randn(n) if bias else None
    expected = x.double() @ weight.double().T + (b.double() if bias else 0)
    memory = torch.empty(len(x), n) if out and x.dim() == 2 else None
    got = u.linear(x, weight, b, out=memory)
    assert got.shape == expected.shape
    if memory is not None:
        assert (got is memory) == (products != "oneDNN" or layout == "nothing")  # so each way was gone
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_product_of_which_gradients_are_wanted_has_them(products):
    x, weight, bias, slope = torch.randn(9, 5), torch.randn(7, 5, requires_grad=True), torch.randn(7, requires_grad=True), torch.randn(9, 7)
    found = torch.autograd.grad(u.linear(x, weight, bias), (weight, bias), slope)
    torch.testing.assert_close(found, (slope.T @ x, slope.sum(0)))
    weight, direction = weight.detach(), torch.randn(9, 5)
    _, forward = torch.func.jvp(lambda x: u.linear(x, weight), (x,), (direction,))
    torch.testing.assert_close(forward, direction @ weight.T)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = u.linear(torch.autograd.forward_ad.make_dual(x, direction), weight)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, direction @ weight.T)
    each = torch.func.vmap(lambda x: u.linear(x, weight))(x.expand(3, 9, 5))
    torch.testing.assert_close(each, (x @ weight.T).expand(3, 9, 7))


@pytest.mark.parametrize(("make", "kind"), [(gemma, torch.nn.Linear), (gpt2, Conv1D)])
def test_a_models_linear_layers_are_ours_and_compute_the_same(make, kind, products):
    model, ids = make(), torch.randint(4, 24, (3, 7))
    plain = model(input_ids=ids).logits
    ours = u.with_linear(model)
    there = {type(module) for module in ours.modules() if isinstance(module, kind)}
    assert ours is model and len(there) == 1 and kind not in there
    torch.testing.assert_close(ours(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-5)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert kind in {type(module) for module in again.modules()} and torch.equal(again(input_ids=ids).logits, plain)
    other = type("Other", (torch.nn.Linear,), {})
    assert type(u.with_linear(torch.nn.Sequential(other(2, 3)))[0]) is other


@pytest.mark.parametrize("maker", ["AuthenticAMD", "GenuineIntel"])
@pytest.mark.parametrize("can", ["AVX512", "AVX2"])
@pytest.mark.parametrize("listed", [False, True])
def test_onednn_is_asked_on_amd_processors_with_avx512(maker, can, listed, monkeypatch):
    monkeypatch.setattr(u.platform, "processor", lambda: "" if listed else f"AMD64 Family 26, {maker}")
    monkeypatch.setattr(u.Path, "exists", lambda path: listed)
    monkeypatch.setattr(u.Path, "read_text", lambda path: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: can)
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    u.through_onednn.cache_clear()
    try:
        found = u.through_onednn()
    finally:
        u.through_onednn.cache_clear()
    assert found == (there and maker == "AuthenticAMD" and can == "AVX512")


@pytest.mark.parametrize("norm_scale", [0.0, 3.7])
def test_normalise_and_back(sae, norm_scale):
    sae.norm_scale = norm_scale
    x = torch.randn(50, 16) * 5 + 2
    x_unit, norm = sae.normalise(x)
    if norm_scale:
        assert (norm == norm_scale).all()
    else:
        torch.testing.assert_close(x_unit.norm(dim=1), torch.ones(50))
    torch.testing.assert_close(sae.denormalise(x_unit, norm), x, rtol=1e-5, atol=1e-5)


def test_normalise_computes_in_float32(sae):
    x = torch.randn(9, 16).bfloat16()
    x_unit, norm = sae.normalise(x)
    assert x_unit.dtype == norm.dtype == torch.float32
    assert torch.equal(x_unit, sae.normalise(x.float())[0])


def test_starts_tied_with_unit_rows_and_zero_biases():
    sae = u.SAE(16, 128, seed=3)
    assert torch.equal(sae.W_enc, sae.W_dec.T) and not sae.b_enc.any() and not sae.b_dec.any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(128))
    assert torch.equal(u.SAE(16, 128, seed=3).W_dec, sae.W_dec) and not torch.equal(u.SAE(16, 128, seed=4).W_dec, sae.W_dec)


def test_learning_rate_at_its_corners():
    rate = lambda step: training.learning_rate(step, 10_000, 3e-3, 500, 0.5, 0.8)
    assert rate(0) == 0 and rate(250) == pytest.approx(1.5e-3) and rate(500) == pytest.approx(3e-3)
    assert rate(4250) == pytest.approx(0.75 * 3e-3)  # half of the cosine
    assert rate(8000) == pytest.approx(1.5e-3) and rate(7999) > 1.5e-3
    assert rate(9999) == pytest.approx(1.5e-3)
    assert training.learning_rate(0, 10, 1.0, 0, 0.5, 0.8) == 1.0  # no warm-up
    assert training.learning_rate(10, 20, 1.0, 500, 0.5, 0.8) == pytest.approx(0.02)  # a run shorter than its warm-up


def test_activation_stats_in_chunks_of_unequal_size():
    x, index = (torch.randn(1000, 16) * 3 + 10).bfloat16(), torch.randperm(1000)[:700]
    mean, norm = harvest.activation_stats(x, index, chunk=64)
    expected = x[index].double().mean(0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.double(), (x.double() - expected).norm(dim=1), rtol=1e-5, atol=0)


def test_saved_sae_loads_the_same_with_plain_types_only(sae, tmp_path):
    sae.config, sae.norm_scale, sae.apply_b_dec_to_input = {"model_name": "m", "layer": 3}, 2.5, True
    sae.density.uniform_()
    sae.save(tmp_path / "sae.pth")
    saved = torch.load(tmp_path / "sae.pth", weights_only=True)
    assert set(saved["state_dict"]) == {"W_enc", "b_enc", "W_dec", "b_dec"} and torch.equal(saved["activation_mean"], sae.mean)
    again, x = u.SAE.load(tmp_path / "sae.pth"), torch.randn(7, 16)
    assert torch.equal(again(x), sae(x)) and torch.equal(again.density, sae.density) and again.config["layer"] == 3
    assert [f.name for f in tmp_path.iterdir()] == ["sae.pth"]


def test_a_file_of_another_format_is_refused(sae, tmp_path):
    sae.save(tmp_path / "sae.pth")
    saved = torch.load(tmp_path / "sae.pth", weights_only=True)
    torch.save(saved | {"format_version": 99}, tmp_path / "sae.pth")
    with pytest.raises(u.UserError, match="has format 99"):
        u.SAE.load(tmp_path / "sae.pth")


def test_a_row_at_the_mean_stays_finite(sae):
    x = sae.mean.clone()[None]
    assert sae(x).isfinite().all() and not sae.normalise(x)[0].any()


def test_apply_b_dec_to_input(sae):
    sae.apply_b_dec_to_input = True
    x = torch.randn(4, 16)
    torch.testing.assert_close(sae.encode_unit(x), torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc))


class Trap:
    """What a pickle with code in it holds: loading it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def plain(path) -> dict:
    """What an sae.pth holds, without the digest, which changed contents do not agree with."""
    return {name: value for name, value in torch.load(path, weights_only=True).items() if name != "digest"}


def test_damaged_and_foreign_files_are_refused_in_one_sentence(sae, tmp_path, fresh_seed):
    path = tmp_path / "sae.pth"
    sae.save(path)
    whole = path.read_bytes()
    saved = plain(path)
    cut = int(torch.randint(1, len(whole) - 1, ()))
    for damaged in (whole[:cut], b"", b"not a file of torch"):
        path.write_bytes(damaged)
        with pytest.raises(u.UserError, match="sae.pth is damaged, .*: copy the file again, or `make remove` its run and train it again"):
            u.SAE.load(path)
    torch.save({"format_version": 2, "trap": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(u.UserError, match="holds objects or code beside tensors, which are never run"):
        u.SAE.load(path)
    assert not (tmp_path / "sprung").exists()  # nothing in it was run
    for wrong, message in (({"weights": 1}, "no format_version"), ([1, 2], "no format_version"), (saved | {"format_version": 99}, "format 99")):
        torch.save(wrong, path)
        with pytest.raises(u.UserError, match=message):
            u.SAE.load(path)
    torch.save({name: value for name, value in saved.items() if name != "activation_mean"}, path)
    with pytest.raises(u.UserError, match="lacks activation_mean"):
        u.SAE.load(path)
    with pytest.raises(u.UserError, match="there is no SAE at"):
        u.SAE.load(tmp_path / "none.pth")


def flip(path, data: bytes, bit: int) -> None:
    """Writes `data` with one bit flipped. A new file each time: to cut an old one off makes some disks wait for it."""
    path.unlink()
    path.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])


@pytest.mark.parametrize("with_digest", [True, False])
def test_no_flipped_bit_goes_unseen(with_digest, tmp_path, fresh_seed):
    """Each is refused, or makes no difference. A file from before digests has the sums of its archive alone, which leave
    out its table of contents: the last 1,500 bytes here."""
    sae, path, x = u.SAE(4, 8, seed=fresh_seed), tmp_path / "sae.pth", torch.randn(5, 4)
    sae.config = {"model_name": "m", "layer": 3}
    sae.save(path)
    if not with_digest:
        torch.save(plain(path), path)
    whole, refused, again = path.read_bytes(), 0, u.SAE.load(path)
    bits = range(8 * len(whole)) if with_digest else range(8 * (len(whole) - 1500))
    for i in torch.randperm(len(bits))[:600].tolist():
        flip(path, whole, bits[i])
        try:
            found = u.SAE.load(path)
        except u.UserError as error:
            assert "sae.pth" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            assert torch.equal(found.encode(x), again.encode(x)) and torch.equal(found.W_dec, sae.W_dec) and found.config == again.config
    assert refused > 120


@pytest.mark.parametrize("kind", ["arrays", "json"])
def test_no_flipped_bit_of_arrays_and_parameters_goes_unseen(kind, tmp_path):
    value = {"a": torch.randn(5, 4).numpy(), "b": torch.arange(30).numpy()} if kind == "arrays" else {"parameters": {"lr": 3e-3, "name": "a\u4e2d", "list": [1, True, None, -0.5]}, "hook": "x"}
    path, read = tmp_path / "file", storing.load_arrays if kind == "arrays" else storing.read_json
    same = lambda found: all(name in found and (found[name].tobytes() == v.tobytes() if kind == "arrays" else found[name] == v) for name, v in value.items())
    storing.save_arrays(path, value, compressed=True) if kind == "arrays" else storing.write_json(path, value, sealed=True)
    whole, refused = path.read_bytes(), 0
    assert same(read(path)) and len(read(path)) == len(value)
    for bit in range(8 * len(whole)):
        flip(path, whole, bit)
        try:
            found = read(path)
        except u.UserError:
            refused += 1
        else:
            assert same(found), bit  # the digest's own name may have changed: then it is one more entry
    assert refused > 4 * len(whole)
    for damaged in (whole[: len(whole) // 2], b"", b"\x00" * 100):
        path.write_bytes(damaged)
        with pytest.raises(u.UserError, match="file is (damaged|cut off)"):
            read(path)


def test_files_from_before_digests_open_and_that_is_told_once(sae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(u, "_told", [])
    sae.save(tmp_path / "new.pth")
    assert u.SAE.load(tmp_path / "new.pth") and capsys.readouterr().err == ""
    for name in ("old.pth", "older.pth"):
        torch.save(plain(tmp_path / "new.pth"), tmp_path / name)
        assert torch.equal(u.SAE.load(tmp_path / name).W_enc, sae.W_enc)
    said = capsys.readouterr().err
    assert "old.pth was written before files had digests" in said and said.count("\n") == 1


def test_what_json_makes_of_a_value_is_what_its_digest_is_of(tmp_path):
    value = {"token": showing.Bytes("他".encode()[:2]), "n": np.float64(0.1), 3: (1, 2.0), "nan": float("nan"), "text": "\u4e2d\u2028", "large": 10**30, "small": 5e-324, "minus": -0.0}
    storing.write_json(tmp_path / "a.json", value, sealed=True)
    found = storing.read_json(tmp_path / "a.json")
    assert found == {"token": "\\xe4\\xbb", "n": 0.1, "3": [1, 2.0], "nan": None, "text": "\u4e2d\u2028", "large": 10**30, "small": 5e-324, "minus": 0.0} and "digest" in (tmp_path / "a.json").read_text()


def test_a_digest_is_of_types_shapes_and_order():
    values = [1, 1.0, True, None, "1", [1], [[1]], {"a": 1}, {"b": 1}, {"a": 1, "b": 2}, {"b": 2, "a": 1}]
    values += [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3).int(), torch.zeros(2, 3).bfloat16(), -torch.zeros(2, 3), torch.zeros(())]
    assert len({u.digest(value) for value in values}) == len(values)
    x = torch.randn(4, 5)
    assert u.digest(x) == u.digest(x.numpy()) == u.digest(x.T.contiguous().T) and u.digest([1, (2, 3)]) == u.digest([1, [2, 3]])


def test_a_disk_that_will_not_have_it_is_one_sentence(sae, tmp_path, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(u.UserError, match=r"sae.pth could not be written \(No space left on device\): make room there, then give the same command again"):
        sae.save(tmp_path / "sae.pth")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError(errno.EROFS, "Read-only file system")))
    with pytest.raises(u.UserError, match="metrics.json could not be written .*see who may write there"):
        storing.write_json(tmp_path / "metrics.json", {})
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError), u.atomic(tmp_path / "other"):
        (tmp_path / "none").read_text()  # what is not of writing is left as it is
    assert [*tmp_path.iterdir()] == []


def test_a_relative_path_is_of_the_current_folder_first(sae, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(u.UserError, match=re.escape(f"there is no SAE at mine.pth, nor at {tmp_path / 'mine.pth'}.")):
        u.SAE.load("mine.pth")
    sae.save(tmp_path / "mine.pth")
    assert torch.equal(u.SAE.load("mine.pth").W_enc, sae.W_enc)
    monkeypatch.setattr(u, "ROOT", tmp_path)
    monkeypatch.chdir("/")
    assert torch.equal(u.SAE.load("mine.pth").W_enc, sae.W_enc)  # as before: from the repository


def test_devices(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert u.pick_device("cpu") == "cpu" and u.pick_device("cpu:0") == "cpu" and chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert u.pick_device("cuda:1") == "cuda:1" and chosen == ["cuda:1"] and u.pick_device() == "cuda"
    with pytest.raises(u.UserError, match="device tpu:0 is not available here"):
        u.pick_device("tpu:0")


def test_a_topk_of_no_latents_is_none(tmp_path):
    u.SAE(16, 48, architecture="topk", k=1).save(tmp_path / "sae.pth")
    saved = plain(tmp_path / "sae.pth")
    torch.save(saved | {"config": saved["config"] | {"k": 0}}, tmp_path / "sae.pth")
    with pytest.raises(u.UserError, match="has k 0 for 48 latents"):
        u.SAE.load(tmp_path / "sae.pth")


@pytest.mark.parametrize("architecture", ["relu", "batchtopk"])
def test_parts_that_are_missing_or_do_not_fit_are_named(architecture, tmp_path):
    path, sae = tmp_path / "sae.pth", u.SAE(16, 48, architecture=architecture, k=4)
    sae.save(path)
    saved = plain(path)
    state, config = saved["state_dict"], saved["config"]
    without = lambda of, name: {key: value for key, value in of.items() if key != name}
    changed = lambda name, value: {"state_dict": state | {name: value}}
    wrong = [({"state_dict": without(state, name)}, f"it lacks {name};") for name in state if name != "W_enc"]
    wrong += [({"state_dict": without(state, "W_enc")}, "no matrix W_enc"), (changed("W_enc", torch.zeros(48)), "no matrix W_enc"), (changed("W_enc", torch.zeros(0, 48)), "no matrix W_enc")]
    wrong += [(changed("b_dec", torch.zeros(15)), r"b_dec of shape \(15,\), not \(16,\)"), (changed("b_pre", torch.zeros(16)), "holds b_pre, which it should not")]
    wrong += [(changed("W_enc", state["W_enc"].T), r"W_dec of shape \(48, 16\), not \(16, 48\)"), (changed("W_dec", state["W_dec"].T), r"W_dec of shape \(16, 48\), not \(48, 16\)")]
    wrong += [({"activation_mean": torch.zeros(48)}, r"activation_mean of shape \(48,\)"), ({"activation_mean": torch.zeros(1)}, r"activation_mean of shape \(1,\), not \(16,\)")]
    wrong += [(changed("W_dec", state["W_dec"].int()), "W_dec in int32, not float32"), (changed("b_enc", state["b_enc"].double()), "b_enc in float64"), ({"max_act": torch.zeros(48).half()}, "max_act in float16")]
    wrong += [(changed("W_enc", state["W_enc"] * float("nan")), "NaN or infinite values in W_enc"), ({"activation_mean": torch.ones(16) / 0}, "NaN or infinite values in activation_mean")]
    wrong += [({"norm_scale": value}, "has norm_scale .*, which is no finite number from 0") for value in (-2.0, float("inf"), float("nan"), "1", None, True, torch.ones(1))]
    wrong += [({"density": None}, r"density of shape NoneType, not \(48,\)"), ({"density": torch.full((48,), 1.5)}, "density outside"), ({"max_act": torch.full((48,), -1.0)}, "max_act outside")]
    wrong += [({"config": without(config, "k")}, "lacks k in its config"), ({"config": [1]}, "holds a state_dict or config that is none"), ({"config": config | {3: 4}}, "the name 3 is no text")]
    wrong += [({"config": config | {"architecture": value}}, "has architecture .*none of relu") for value in ("other", 3, [])]
    wrong += [({"config": config | {"k": value}}, "has k .* for 48 latents") for value in (-1, 49, 2.0, "4", True)]
    wrong += [({"norm_scale": 10**400}, "has norm_scale"), (changed("b_enc", state["b_enc"].to_sparse()), "has b_enc as a sparse tensor")]
    wrong += [(changed("W_enc", state["W_enc"] * float("nan")) | {"W_enc": state["W_enc"]}, "NaN or infinite values in W_enc")]  # a clean one elsewhere is none
    wrong += [({"state_dict": without(state, "b_dec"), "b_dec": state["b_dec"]}, "it lacks b_dec;"), ({"format_version": torch.tensor([2, 2])}, "has format tensor"), ({"format_version": 2.0}, "has format 2.0")]
    wrong += [({"config": config | {"apply_b_dec_to_input": 1}}, "has apply_b_dec_to_input 1, which is not true or false")]
    for change, message in wrong:
        torch.save(saved | change, path)
        with pytest.raises(u.UserError, match="sae.pth .*" + message):
            u.SAE.load(path)
    torch.save(saved, path)
    assert torch.equal(u.SAE.load(path).W_dec, sae.W_dec)
