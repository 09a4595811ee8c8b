"""The autoencoder, its files, the learning rate."""

import pytest
import torch

import sae_utils as u


def test_encode_and_decode_are_the_equations(sae):
    x = torch.randn(5, 3, 16) * 7
    centred = x.double() - sae.mean.double()
    norm = centred.norm(dim=-1, keepdim=True)
    acts = torch.relu(centred / norm @ sae.W_enc.double() + sae.b_enc.double())
    x_hat = (acts @ sae.W_dec.double() + sae.b_dec.double()) * norm + sae.mean.double()
    torch.testing.assert_close(sae.encode(x).double(), acts, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(x).double(), x_hat, rtol=1e-4, atol=1e-4)


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
    rate = lambda step: u.learning_rate(step, 10_000, 3e-3, 500, 0.5, 0.8)
    assert rate(0) == 0 and rate(250) == pytest.approx(1.5e-3) and rate(500) == pytest.approx(3e-3)
    assert rate(4250) == pytest.approx(0.75 * 3e-3)  # half of the cosine
    assert rate(8000) == pytest.approx(1.5e-3) and rate(7999) > 1.5e-3
    assert rate(9999) == pytest.approx(1.5e-3)
    assert u.learning_rate(0, 10, 1.0, 0, 0.5, 0.8) == 1.0  # no warm-up
    assert u.learning_rate(10, 20, 1.0, 500, 0.5, 0.8) == pytest.approx(0.02)  # a run shorter than its warm-up


def test_activation_stats_in_chunks_of_unequal_size():
    x, index = (torch.randn(1000, 16) * 3 + 10).bfloat16(), torch.randperm(1000)[:700]
    mean, norm = u.activation_stats(x, index, chunk=64)
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


def test_damaged_and_foreign_files_are_refused_in_one_sentence(sae, tmp_path, fresh_seed):
    path = tmp_path / "sae.pth"
    sae.save(path)
    whole = path.read_bytes()
    saved = torch.load(path, weights_only=True)
    cut = int(torch.randint(1, len(whole) - 1, ()))
    path.write_bytes(whole[:cut])
    with pytest.raises(u.UserError, match="is damaged"):
        u.SAE.load(path)
    path.write_text("not a file of torch")
    with pytest.raises(u.UserError, match="is damaged"):
        u.SAE.load(path)
    torch.save({"format_version": 2, "trap": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(u.UserError, match="holds objects or code beside tensors, which are never run"):
        u.SAE.load(path)
    assert not (tmp_path / "sprung").exists()  # nothing in it was run
    for wrong, message in (({"weights": 1}, "no format_version"), ([1, 2], "no format_version"), (saved | {"format_version": 99}, "format 99")):
        torch.save(wrong, path)
        with pytest.raises(u.UserError, match=message):
            u.SAE.load(path)
    state = saved["state_dict"]
    for name, wrong in (("W_enc", saved | {"state_dict": state | {"W_enc": state["W_enc"] * float("nan")}}), ("activation_mean", saved | {"activation_mean": saved["activation_mean"] / 0}), ("norm_scale", saved | {"norm_scale": float("inf")})):
        torch.save(wrong, path)
        with pytest.raises(u.UserError, match=f"has NaN or infinite values in {name}: train it again"):
            u.SAE.load(path)
    torch.save({name: value for name, value in saved.items() if name != "activation_mean"}, path)
    with pytest.raises(u.UserError, match="lacks activation_mean"):
        u.SAE.load(path)
    with pytest.raises(u.UserError, match="there is no SAE at"):
        u.SAE.load(tmp_path / "none.pth")


def test_devices(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert u.pick_device("cpu") == "cpu" and u.pick_device("cpu:0") == "cpu:0" and chosen == []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert u.pick_device("cuda:1") == "cuda:1" and chosen == ["cuda:1"] and u.pick_device() == "cuda"
    with pytest.raises(u.UserError, match="device tpu:0 is not available here"):
        u.pick_device("tpu:0")


@pytest.mark.parametrize("architecture", ["relu", "batchtopk"])
def test_parts_that_are_missing_or_do_not_fit_are_named(architecture, tmp_path):
    path, sae = tmp_path / "sae.pth", u.SAE(16, 48, architecture=architecture, k=4)
    sae.save(path)
    saved = torch.load(path, weights_only=True)
    state = saved["state_dict"]
    without = lambda of, name: {key: value for key, value in of.items() if key != name}
    wrong = [({"state_dict": without(state, name)}, f"it lacks {name};") for name in state if name != "W_enc"]
    wrong += [({"state_dict": without(state, "W_enc")}, "no matrix W_enc"), ({"state_dict": state | {"W_enc": torch.zeros(48)}}, "no matrix W_enc")]
    wrong += [({"state_dict": state | {"b_dec": torch.zeros(15)}}, r"b_dec of shape \(15,\), not \(16,\)"), ({"state_dict": state | {"b_pre": torch.zeros(16)}}, "holds b_pre, which it should not")]
    wrong += [({"state_dict": state | {"W_enc": state["W_enc"].T}}, r"W_dec of shape \(48, 16\), not \(16, 48\)"), ({"activation_mean": torch.zeros(48)}, r"activation_mean of shape \(48,\)")]
    wrong += [({"density": None}, r"density of shape NoneType, not \(48,\)"), ({"config": without(saved["config"], "k")}, "lacks k in its config")]
    for change, message in wrong:
        torch.save(saved | change, path)
        with pytest.raises(u.UserError, match="sae.pth .*" + message):
            u.SAE.load(path)
    torch.save(saved, path)
    assert torch.equal(u.SAE.load(path).W_dec, sae.W_dec)
