"""Every metric against a value worked out by hand or in float64."""

import math

import pytest
import torch
from conftest import HOOK, gemma, sentences, word_tokenizer

import harvest
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
    assert u.score_rows(perfect, x, every)["fvu"] == pytest.approx(0, abs=1e-10)
    mean = Fixed(8, torch.zeros_like)
    mean.mean = x.mean(0)
    assert u.score_rows(mean, x, every)["fvu"] == pytest.approx(1, rel=1e-6)


def test_fvu_is_a_ratio_of_sums_in_the_models_units(sae):
    x, index = torch.randn(500, 16) * torch.rand(500, 1) * 9 + 5, torch.randperm(500)[:333]
    error = (sae(x[index]).double() - x[index].double()).square().sum()
    variance = (x[index].double() - x[index].double().mean(0)).square().sum()
    got = u.score_rows(sae, x, index, chunk=100)  # the last chunk has 33 rows
    assert got["fvu"] == pytest.approx((error / variance).item(), rel=1e-5) and got["rows"] == 333


def test_scores_do_not_depend_on_the_chunk(sae):
    x = data(257, 16)
    a, b = (u.score_rows(sae, x, torch.arange(257), chunk=c) for c in (257, 50))
    for name in a:
        torch.testing.assert_close(torch.as_tensor(a[name]), torch.as_tensor(b[name]), rtol=1e-5, atol=1e-7)


def test_counts_by_hand():
    sae = Fixed(2, lambda x_unit: x_unit)
    sae.norm_scale = 1.0
    x = torch.tensor([[3.0, 0.0], [1.0, -2.0], [2.0, 0.0], [0.5, 0.0]])
    got = u.score_rows(sae, x, torch.arange(4), chunk=3)  # latents: +x0, +x1, -x0, -x1
    assert got["l0"] == pytest.approx(5 / 4) and got["dead"] == pytest.approx(2 / 4) and got["l1"] == pytest.approx(8.5 / 4)
    assert got["density"].tolist() == [1, 0, 0, 0.25] and got["max_act"].tolist() == [3, 0, 0, 2]
    assert got["mean_act"].tolist() == [6.5 / 4, 0, 0, 2] and got["mse"] == pytest.approx(0)


def test_mse_agrees_with_the_training_loss(sae):
    x = data(300, 16)
    got, trainer = u.score_rows(sae, x, torch.arange(300), chunk=70), training.Trainer(sae)
    trainer.step(sae.normalise(x)[0], 0.0)
    now = trainer.read()
    for name in ("mse", "l1", "l0"):
        assert got[name] == pytest.approx(now[name], rel=1e-5)


@pytest.fixture
def windows(tokenizer, fresh_seed):
    tokens, _ = harvest.cut_windows(tokenizer, sentences(40, seed=fresh_seed), 24, 10**6)
    return list(harvest.Windows(tokens["flat"], tokens["starts"]))


def ce_by_hand(model, tokenizer, windows, module, change):
    """One window at a time, the change written into a hook by position."""
    total, count, logprobs = 0.0, 0, []
    for window in windows:
        keep = torch.tensor([t in u.special_ids(tokenizer) for t in window])[:, None]
        hook = model.get_submodule(module).register_forward_hook(lambda m, a, out, keep=keep: torch.where(keep, out, change(out)))
        logits = model(torch.tensor([window])).logits[0, :-1].double().log_softmax(-1)
        hook.remove()
        total -= logits.gather(1, torch.tensor(window[1:])[:, None]).sum().item()
        count += len(window) - 1
        logprobs.append(logits)
    return total / count, torch.cat(logprobs)


def test_cross_entropies_against_one_window_at_a_time(model, tokenizer, sae, windows):
    mean = torch.randn(16)
    got = u.cross_entropies(model, tokenizer, HOOK, sae, windows, mean)
    clean, p = ce_by_hand(model, tokenizer, windows, HOOK, lambda x: x)
    spliced, q = ce_by_hand(model, tokenizer, windows, HOOK, sae)
    assert got["ce_clean"] == pytest.approx(clean, rel=1e-5) and got["ce_spliced"] == pytest.approx(spliced, rel=1e-5)
    zeroed, z = ce_by_hand(model, tokenizer, windows, HOOK, torch.zeros_like)
    assert got["ce_zero"] == pytest.approx(zeroed, rel=1e-5)
    assert got["ce_mean"] == pytest.approx(ce_by_hand(model, tokenizer, windows, HOOK, mean.expand_as)[0], rel=1e-5)
    assert got["kl"] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
    assert got["ce_tokens"] == sum(len(w) - 1 for w in windows)
    assert (p - q).abs().max() > 0.01 and (p - z).abs().max() > 0.01  # the arms do differ


def test_mean_ablation_after_the_norm(model, tokenizer, sae, windows):
    norm = "model.layers.1.post_feedforward_layernorm"
    assert u.post_norm_name(model, HOOK) == norm
    outputs = []
    for window in windows:
        outputs.append(u.run_to_hook(model, norm, *u.pad([window]))[0, 1:].double())  # all but BOS
    mean = torch.cat(outputs).mean(0)
    torch.testing.assert_close(u.mean_output(model, norm, windows, tokenizer).double(), mean, rtol=1e-4, atol=1e-5)
    got = u.cross_entropies(model, tokenizer, HOOK, sae, windows, torch.zeros(16))
    by_hand = ce_by_hand(model, tokenizer, windows, norm, lambda x: mean.float().expand_as(x))[0]
    assert got["ce_mean_post_norm"] == pytest.approx(by_hand, rel=1e-4)
    assert got["ce_recovered_mean"] == u.recovered(got["ce_clean"], got["ce_spliced"], got["ce_mean_post_norm"])


def test_perfect_sae_recovers_everything(model, tokenizer, windows):
    perfect = u.SAE(16, 32)
    with torch.no_grad():
        perfect.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], 1))
        perfect.W_dec.copy_(perfect.W_enc.T)
    got = u.cross_entropies(model, tokenizer, HOOK, perfect, windows, torch.zeros(16))
    assert got["ce_spliced"] == pytest.approx(got["ce_clean"], abs=1e-4) and got["kl"] == pytest.approx(0, abs=1e-4)


def test_without_bos_the_first_token_is_left_alone(sae, fresh_seed):
    tokenizer, model = word_tokenizer(with_bos=False), gemma()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = u.run_to_hook(model, HOOK, ids, torch.ones_like(ids))
    with u.edit_output(model, HOOK, torch.zeros_like, tokenizer):
        after = u.run_to_hook(model, HOOK, ids, torch.ones_like(ids))
    assert torch.equal(after[:, 0], before[:, 0]) and not after[:, 1:].any() and before[:, 1:].all()
    tokens, _ = harvest.cut_windows(tokenizer, sentences(10, seed=fresh_seed), 12, 10**6)
    windows = list(harvest.Windows(tokens["flat"], tokens["starts"]))
    kept = torch.cat([u.run_to_hook(model, HOOK, *u.pad([w]))[0, 1:] for w in windows])
    torch.testing.assert_close(u.mean_output(model, HOOK, windows, tokenizer), kept.mean(0), rtol=1e-3, atol=1e-5)


def test_recovered_by_hand():
    assert u.recovered(2.0, 2.25, 3.0) == pytest.approx(0.75)
    assert u.recovered(2.0, 2.25, 2.009) is None and u.recovered(2.0, 2.5, 1.5) is None
    assert math.isclose(u.recovered(1.0, 1.0, 4.0), 1.0)
