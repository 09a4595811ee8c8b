"""Every metric against a value worked out by hand or in float64."""

import pytest
import torch

import fidelity
import sae_utils as u
import training


class Fixed(u.SAE):
    """An SAE whose reconstruction is prescribed: (x_unit) -> x_unit_hat."""

    def __init__(self, d_in, reconstruct):
        super().__init__(d_in, 2 * d_in)
        self.reconstruct = reconstruct

    def encode_unit(self, x_unit):
        return torch.cat([x_unit.relu(), (-x_unit).relu()], dim=-1)

    def decode_unit(self, acts):
        return self.reconstruct(acts[:, : self.d_in] - acts[:, self.d_in :])


def data(n=1003, d=8):
    return torch.randn(n, d) * torch.rand(d) * 4 + torch.randn(d) * 20  # a mean far from zero


def test_fvu_of_perfect_and_of_mean_prediction():
    x = data()
    every = torch.arange(len(x))
    perfect = Fixed(8, lambda x_unit: x_unit)
    perfect.mean = x.mean(0)
    assert fidelity.score_rows(perfect, x, every)["fvu"] == pytest.approx(0, abs=1e-10)
    mean = Fixed(8, torch.zeros_like)
    mean.mean = x.mean(0)
    assert fidelity.score_rows(mean, x, every)["fvu"] == pytest.approx(1, rel=1e-6)


def test_fvu_is_a_ratio_of_sums_in_the_models_units(sae):
    x, index = torch.randn(500, 16) * torch.rand(500, 1) * 9 + 5, torch.randperm(500)[:333]
    error = (sae(x[index]).double() - x[index].double()).square().sum()
    variance = (x[index].double() - x[index].double().mean(0)).square().sum()
    got = fidelity.score_rows(sae, x, index, chunk=100)  # the last chunk has 33 rows
    assert got["fvu"] == pytest.approx((error / variance).item(), rel=1e-5) and got["rows"] == 333


def test_scores_do_not_depend_on_the_chunk(sae):
    x = data(257, 16)
    a, b = (fidelity.score_rows(sae, x, torch.arange(257), chunk=c) for c in (257, 50))
    for name in a:
        torch.testing.assert_close(torch.as_tensor(a[name]), torch.as_tensor(b[name]), rtol=1e-5, atol=1e-7)


def test_counts_by_hand():
    sae = Fixed(2, lambda x_unit: x_unit)
    sae.norm_scale = 1.0
    x = torch.tensor([[3.0, 0.0], [1.0, -2.0], [2.0, 0.0], [0.5, 0.0]])
    got = fidelity.score_rows(sae, x, torch.arange(4), chunk=3)  # latents: +x0, +x1, -x0, -x1
    assert got["l0"] == pytest.approx(5 / 4) and got["dead"] == pytest.approx(2 / 4) and got["l1"] == pytest.approx(8.5 / 4)
    assert got["density"].tolist() == [1, 0, 0, 0.25] and got["max_act"].tolist() == [3, 0, 0, 2]
    assert got["mean_act"].tolist() == [6.5 / 4, 0, 0, 2] and got["mse"] == pytest.approx(0)


def test_mse_agrees_with_the_training_loss(sae):
    x = data(300, 16)
    got, trainer = fidelity.score_rows(sae, x, torch.arange(300), chunk=70), training.Trainer(sae)
    trainer.step(sae.normalise(x)[0], 0.0)
    now = trainer.read()
    for name in ("mse", "l1", "l0"):
        assert got[name] == pytest.approx(now[name], rel=1e-5)
