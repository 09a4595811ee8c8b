"""The training step against autograd, its order of the data, going on after a stop, the doctor."""

import contextlib
import copy
import errno
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import yaml
from quality import ON_ROWS, known_directions, recovery, train
from tensorboard.summary.writer import event_file_writer
from torch import Tensor

import fidelity
import sae_utils as u
import showing
import training

ARCHITECTURES = ["relu", "topk", "batchtopk", "matryoshka"]
D_IN, D_SAE, BATCH, K, L1, AUX = 16, 64, 40, 5, 0.02, 0.3


def make_sae(architecture: str, apply_b_dec: bool = False) -> u.SAE:
    """An SAE with random biases, on which about a tenth of the pre-activations are above zero."""
    sae = u.SAE(D_IN, D_SAE, seed=int(torch.randint(10**6, ())), architecture=architecture, k=K, apply_b_dec_to_input=apply_b_dec).requires_grad_(False)
    sae.b_enc.normal_(-0.35, 0.1)
    sae.b_dec.normal_(std=0.1)
    return sae


def unit_rows(n: int = BATCH) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, D_IN), dim=1)


def reference_loss(architecture: str, W_enc, b_enc, W_dec, b_dec, x, apply_b_dec: bool, dead: Tensor | None) -> Tensor:
    """The loss as one would write it for autograd. W_enc (d_in, d_sae)."""
    pre = (x - b_dec if apply_b_dec else x) @ W_enc + b_enc
    positive = pre.relu()
    if architecture == "topk":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0)
    elif architecture in ("batchtopk", "matryoshka"):
        kept = torch.zeros(pre.numel(), dtype=pre.dtype).scatter(0, pre.flatten().topk(K * len(x)).indices, 1.0).view_as(pre)
    else:
        kept = torch.ones_like(pre)
    acts = positive * kept
    ends = [4, 8, 16, 32, 64] if architecture == "matryoshka" else [64]
    loss = torch.stack([(acts[:, :end] @ W_dec[:end] + b_dec - x).square().mean() for end in ends]).mean()
    if architecture == "relu":
        loss = loss + L1 * acts.sum(1).mean()
    if dead is not None:
        among = pre.masked_fill(~dead, -torch.inf)
        chosen = torch.zeros_like(pre).scatter(1, among.topk(min(D_IN // 2, int(dead.sum()))).indices, 1.0)
        left_over = (x - acts @ W_dec - b_dec).detach()
        share = ((left_over - left_over.mean(0)).square().mean() / (x - x.mean(0)).square().mean()).item()
        loss = loss + AUX * ((positive * chosen) @ W_dec - left_over).square().mean() / share
    return loss


def without_part_along_rows(gradient: Tensor, W_dec: Tensor) -> Tensor:
    return gradient - (gradient * W_dec).sum(1, keepdim=True) * W_dec


@pytest.mark.parametrize("with_dead", [False, True])
@pytest.mark.parametrize("apply_b_dec", [False, True])
@pytest.mark.parametrize("path", ["dense", "sparse", "autograd"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_autograd(architecture, path, apply_b_dec, with_dead, products):
    sae, x = make_sae(architecture, apply_b_dec), unit_rows()
    trainer = training.Trainer(sae, L1, AUX, sparse_below=2.0 if path == "sparse" else 0.0, kernel=path != "autograd")
    assert trainer.kernel == (path != "autograd")
    dead = None
    if with_dead:
        dead = torch.rand(D_SAE) < 0.3
        trainer.state["silent"][dead] = 10**6
        trainer.any_dead = True
    weights = [p.double().detach().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    loss = reference_loss(architecture, *weights, x.double(), apply_b_dec, dead)
    loss.backward()
    trainer.step(x, 1e-3)
    assert trainer.read()["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = [w.grad for w in weights]
    expected[2] = without_part_along_rows(expected[2], weights[2].detach())
    gradients = trainer.gradients | {"W_enc": trainer.gradients["W_enc"].T}
    for gradient, truth in zip(gradients.values(), expected, strict=True):
        assert (gradient - truth).norm() <= 1e-5 * truth.norm()


@pytest.mark.parametrize("path", ["dense", "sparse", "autograd"])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "relu"])
def test_k_falls_to_its_value(architecture, path):
    """Three times 5, less 2.5 a step, for four steps; of as many as that for each token nothing is left out here,
    and two equal activations at the edge of a batch's, which float32 has now and then, are both kept."""
    sae = u.SAE(D_IN, D_SAE, architecture=architecture, k=K).requires_grad_(False)
    sae.b_enc += 10  # everything is above zero
    trainer = training.Trainer(sae, sparse_below=2.0 if path == "sparse" else 0.0, kernel=path != "autograd", k_falls=4)
    counts = []
    for _ in range(6):
        trainer.step(unit_rows(), 0.0)
        counts.append(trainer.read(reset=True)["l0"])
    expected = [D_SAE] * 6 if architecture == "relu" else [15, 12, 10, 8, 5, 5]
    assert counts == pytest.approx(expected, abs=0.1) and sae.k == (0 if architecture == "relu" else K)


def learnt(sae: u.SAE, trainer: training.Trainer, x: Tensor) -> dict[str, Tensor]:
    """The gradients of one step, W_enc's (d_in, d_sae)."""
    trainer.step(x, 1e-3)
    return trainer.gradients | {"W_enc": trainer.gradients["W_enc"].T}


@pytest.mark.parametrize("path", ["dense", "sparse", "autograd"])
@pytest.mark.parametrize("k", [0, K])
def test_gradients_of_jumprelu_by_hand(k, path, products):
    """The formulas written out in float64: to the threshold through a ramp, to the rest as if it were fixed."""
    sae, x, weight = u.SAE(D_IN, D_SAE, seed=3, architecture="jumprelu", k=k).requires_grad_(False), unit_rows(), 0.7
    sae.b_enc.normal_(std=0.1)
    sae.threshold.uniform_(-0.01, 0.1)
    W_enc, b_enc, W_dec, b_dec, level, rows = (t.double().clone() for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec, sae.threshold, x))
    trainer, width = training.Trainer(sae, l0_weight=weight, sparse_below=2.0 if path == "sparse" else 0.0, kernel=path != "autograd"), sae.rule.bandwidth
    assert trainer.kernel == (path != "autograd")
    pre = rows @ W_enc + b_enc
    kept = (pre > level) & (pre > 0)
    error = (pre * kept) @ W_dec + b_dec - rows
    l0 = kept.sum(1).double().mean()
    penalty, slope = (k * (l0 / k - 1) ** 2, 2 * (l0 / k - 1)) if k else (l0, 1.0)
    d_acts = 2 / rows.numel() * error @ W_dec.T
    inside = ((pre - level).abs() < width / 2).double()
    d_pre, W_grad = d_acts * kept, 2 / rows.numel() * (pre * kept).T @ error
    expected = {
        "W_enc": rows.T @ d_pre, "b_enc": d_pre.sum(0), "b_dec": 2 / rows.numel() * error.sum(0), "W_dec": without_part_along_rows(W_grad, W_dec),
        "threshold": -(inside * (d_acts * level + weight / D_IN * slope / BATCH)).sum(0) / width,
    }  # fmt: skip
    got = learnt(sae, trainer, x)
    assert set(got) == set(expected) and inside.sum() > 10
    for name, gradient in got.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert trainer.read()["loss"] == pytest.approx((error.square().mean() + weight / D_IN * penalty).item(), rel=1e-5)
    assert not torch.equal(sae.threshold.double(), level)  # it is learnt


@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_auxk_joins_the_gradients_of_jumprelu(path):
    """As by autograd, where some latents are dead."""
    sae, x, dead = make_sae("jumprelu", True), unit_rows(), torch.rand(D_SAE) < 0.3
    sae.threshold.uniform_(-0.01, 0.1)
    of_paths, losses = [], []
    for kernel in (True, False):
        trainer = training.Trainer(copy.deepcopy(sae), auxk_weight=AUX, l0_weight=0.7, sparse_below=2.0 if path == "sparse" else 0.0, kernel=kernel)
        trainer.state["silent"][dead] = 10**6
        trainer.any_dead = True
        of_paths.append(learnt(trainer.sae, trainer, x))
        losses.append(trainer.read()["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in of_paths[1].items():
        assert (of_paths[0][name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_gradients_of_gated_by_hand():
    sae, x = u.SAE(D_IN, D_SAE, seed=3, architecture="gated").requires_grad_(False), unit_rows()
    for tensor in (sae.b_enc, sae.b_mag, sae.r_mag, sae.b_dec):
        tensor.normal_(std=0.1)
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "r_mag", "b_mag")
    weights = {name: sae.get_parameter(name).double().detach().requires_grad_() for name in names}
    W_enc, b_enc, W_dec, b_dec, r_mag, b_mag = weights.values()
    both = lambda x: (x.double() @ W_enc + b_enc, x.double() @ (W_enc * r_mag.exp()) + b_mag)
    x = x[(torch.stack(both(x)).detach().abs() > 1e-5).all(2).all(0)]  # in float32 what is nearer to zero may have the other sign
    gate, strength = both(x)
    acts = (gate > 0) * torch.relu(strength)
    held = torch.relu(gate) @ W_dec.detach() + b_dec.detach()
    loss = (acts @ W_dec + b_dec - x).square().mean() + L1 * torch.relu(gate).sum(1).mean() + (held - x).square().mean()
    loss.backward()
    torch.testing.assert_close(sae.encode_unit(x).double(), acts.detach(), rtol=1e-4, atol=1e-6)
    trainer = training.Trainer(sae, L1)
    got = learnt(sae, trainer, x)
    expected = {name: weight.grad for name, weight in weights.items()}
    expected["W_dec"] = without_part_along_rows(expected["W_dec"], W_dec.detach())
    assert trainer.read()["loss"] == pytest.approx(loss.item(), rel=1e-5) and set(got) == set(expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient.double(), expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_jumprelu_comes_down_to_its_target_in_a_short_run(fresh_seed):
    """With a second moment that remembers the first steps, where L0 is far above 4, it ends near 7."""
    rows, _, _ = known_directions(8000, d_in=32, n_true=48, active=3, seed=fresh_seed)
    sae = train(rows, torch.arange(7000), 4, 300, **ON_ROWS["jumprelu, target 32"] | {"k": 4, "lr": 6e-3})
    assert fidelity.score_rows(sae, rows, torch.arange(7000, 8000))["l0"] == pytest.approx(4, rel=0.15)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "jumprelu", "gated"])
def test_some_latents_alone_are_encoded_as_among_all(architecture):
    sae, x = make_sae(architecture, apply_b_dec=True), torch.randn(5, 3, D_IN)
    for name in ("threshold", "r_mag", "b_mag"):
        if hasattr(sae, name):
            getattr(sae, name).uniform_(-0.1, 0.2)
    columns = torch.randperm(D_SAE)[:9]
    assert (sae.encode(x) > 0).any()
    torch.testing.assert_close(sae.encode(x, columns), sae.encode(x)[..., columns], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "jumprelu", "gated"])
@pytest.mark.parametrize("expansion", [8, 32, 64])
def test_training_starts_at_the_scale_that_fits(architecture, expansion):
    """No other multiple of the encoder reconstructs better, which would cost more than knowing nothing without it."""
    sae, x = u.SAE(D_IN, expansion * D_IN, architecture=architecture, k=K).requires_grad_(False), unit_rows(500)
    mse = lambda: ((sae.rule.train(sae, sae.pre_acts(x)) @ sae.W_dec - x).double().square().mean() / x.double().square().mean()).item()
    before, scale = mse(), sae.fit_scale(x, share=1.0)
    if architecture == "relu":
        assert 0.7 < scale * expansion / 2 < 1.05 and before > expansion / 8
    best = mse()
    assert best < 1
    for factor in (0.9, 1.1):
        sae.W_enc *= factor
        if architecture == "jumprelu":
            sae.threshold *= factor
        assert mse() > best
        sae.W_enc /= factor
        if architecture == "jumprelu":
            sae.threshold /= factor


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_the_last_threshold_leaves_k_latents_a_token(architecture):
    sae, rows = make_sae(architecture), torch.randn(3000, D_IN)
    sae.b_enc += 0.2
    index = torch.randperm(3000)[:2000].sort().values
    level = training.settle(sae, rows, index, chunk=300)
    assert (sae.encode(rows[index]) > 0).sum(1).double().mean().item() == pytest.approx(K, abs=1e-3)
    pre = sae.pre_acts(sae.normalise(rows[index])[0]).flatten().sort(descending=True).values
    assert pre[K * 2000] <= level < pre[K * 2000 - 1]
    sae.b_enc -= 10  # nothing is above zero: nothing is kept, and nothing below is either
    assert training.settle(sae, rows, index) == 0 and not (sae.encode(rows[index]) > 0).any()
    assert training.settle(make_sae("relu"), rows, index) is None


def test_mse_of_a_large_batch_keeps_its_digits():
    n, d_in = 4096, 5376
    sae, x = u.SAE(d_in, 8).requires_grad_(False), torch.nn.functional.normalize(torch.randn(n, d_in), dim=1)
    expected = (sae.decode_unit(sae.encode_unit(x)) - x).double().square().mean().item()
    trainer = training.Trainer(sae)
    trainer.step(x, 0.0)
    assert trainer.read()["mse"] == pytest.approx(expected, rel=1e-5)


MEASURE = """
import re, sys, threading
import torch, sae_utils, training
rss = lambda: 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
architecture, auxk_weight = sys.argv[1], float(sys.argv[2])
torch.set_num_threads(1)
torch.randn(64, 64) @ torch.randn(64, 64)
before, peak, over = rss(), [0], threading.Event()
def watch():
    while not over.wait(0.0005):
        peak[0] = max(peak[0], rss())
sae, x = sae_utils.SAE(64, 16384, architecture=architecture, k=16), torch.nn.functional.normalize(torch.randn(2048, 64), dim=1)
watcher = threading.Thread(target=watch)
watcher.start()
trainer = training.Trainer(sae, 3e-4, auxk_weight, dead_after=1)
trainer.any_dead = auxk_weight > 0
for _ in range(2):
    trainer.step(x, 1e-3)
over.set()
watcher.join()
print((peak[0] - before) / training.step_bytes(sae, len(x), auxk_weight))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read where Linux tells it")
@pytest.mark.parametrize("case", ["relu 0", "relu 0.1", "batchtopk 0", "jumprelu 0", "jumprelu 0.1", "gated 0.1"])
def test_a_step_takes_the_memory_that_the_card_says(case):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(u.ROOT), str(u.ROOT / "notebooks")])}
    said = subprocess.run([sys.executable, "-c", MEASURE, *case.split()], env=env, capture_output=True, text=True, check=True).stdout
    assert 0.6 < float(said) < 1.3


def test_a_latent_is_dead_after_so_many_rows():
    sae = make_sae("relu")
    sae.b_enc[5] = -100
    trainer = training.Trainer(sae, auxk_weight=AUX, dead_after=3 * BATCH)
    for _ in range(2):
        trainer.step(unit_rows(), 0.0)
        trainer.read()
    assert not trainer.any_dead and trainer.state["silent"][5] == 2 * BATCH
    trainer.step(unit_rows(), 0.0)
    trainer.read()
    assert trainer.any_dead


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_steps_equal_autograd_and_adam(architecture, path):
    """Ten steps, projection, Adam with its rates and unit rows included, against the same in float64."""
    sae = make_sae(architecture)
    weights = [p.double().clone().requires_grad_() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]
    before = [w.detach().clone() for w in weights]
    if architecture == "relu":  # as torch's defaults
        betas, eps, rates = (0.9, 0.999), 1e-8, (1.0, 1.0, 1.0, 1.0)
    else:
        betas, eps, rates = (0.9, 0.95), 1e-12, (1.0, 0.2, 4.0, 0.2)
    optimizer = torch.optim.Adam([{"params": [w]} for w in weights], betas=betas, eps=eps)
    trainer = training.Trainer(sae, L1, sparse_below=2.0 if path == "sparse" else 0.0)
    for step in range(10):
        x = unit_rows()
        lr = training.learning_rate(step, 20, 1e-2, 3, 0.5, 0.8)
        trainer.step(x, lr)
        optimizer.zero_grad()
        reference_loss(architecture, *weights, x.double(), False, None).backward()
        with torch.no_grad():
            weights[2].grad.copy_(without_part_along_rows(weights[2].grad, weights[2]))
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * lr
            optimizer.step()
            weights[2] /= weights[2].norm(dim=1, keepdim=True)
    for mine, truth, start in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), weights, before, strict=True):
        moved = (truth.detach() - start).norm()
        assert moved > 0.01 * start.norm() and (mine - truth.detach()).norm() <= 1e-3 * moved
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))


@pytest.mark.parametrize("sparse_below", [0.0, 2.0])
def test_loss_by_hand(sparse_below):
    sae = u.SAE(2, 2).requires_grad_(False)
    sae.W_enc.copy_(torch.eye(2)), sae.W_dec.copy_(torch.eye(2))
    sae.b_enc.copy_(torch.tensor([0.0, -1.0])), sae.b_dec.copy_(torch.tensor([0.0, 0.5]))
    trainer = training.Trainer(sae, 0.1, sparse_below=sparse_below)
    trainer.step(torch.tensor([[1.0, 3.0], [-2.0, 0.5]]), 0.0)
    # acts [[1, 2], [0, 0]]; reconstructions [[1, 2.5], [0, 0.5]]; squared errors 0.25 and 4, over 4 numbers
    now = trainer.read()
    assert now["mse"] == pytest.approx(4.25 / 4) and now["l1"] == pytest.approx(1.5) and now["l0"] == 1 and now["fired"].tolist() == [1, 1]
    assert now["loss"] == now["last_loss"] == pytest.approx(4.25 / 4 + 0.15)


def test_what_is_read_is_what_was_trained_on():
    sae, x = make_sae("relu"), unit_rows()
    acts = sae.encode_unit(x).double()
    mse = (acts @ sae.W_dec.double() + sae.b_dec - x).square().mean().item()
    for sparse_below in (0.0, 2.0):
        trainer = training.Trainer(make_copy(sae), L1, sparse_below=sparse_below)
        trainer.step(x, 1e-3)
        first = trainer.read()
        assert first["mse"] == pytest.approx(mse, rel=1e-5) and first["l1"] == pytest.approx(acts.sum(1).mean().item(), rel=1e-5)
        assert first["loss"] == pytest.approx(mse + L1 * acts.sum(1).mean().item(), rel=1e-5)
        assert first["l0"] == pytest.approx((acts > 0).sum(1).double().mean().item())
        assert torch.equal(first["fired"], (acts > 0).sum(0).float())
        assert first["mean_when_active"] == pytest.approx(acts[acts > 0].mean().item(), rel=1e-5)
        trainer.step(unit_rows(10), 1e-3)  # a last batch that is not full counts by its rows
        assert trainer.read(reset=True)["fired"].sum() > 0
        assert trainer.read()["l0"] == 0 and trainer.read()["fired"].sum() == 0


def make_copy(sae: u.SAE) -> u.SAE:
    copy = u.SAE(sae.d_in, sae.d_sae, architecture=sae.architecture, k=sae.k, apply_b_dec_to_input=sae.apply_b_dec_to_input)
    copy.load_state_dict(sae.state_dict())
    return copy


@pytest.mark.parametrize("norm_scale", [0.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalised_rows_are_those_of_the_sae(norm_scale, dtype):
    sae = make_sae("relu")
    sae.norm_scale = norm_scale
    sae.mean.normal_()
    trainer, x = training.Trainer(sae), (torch.randn(BATCH, D_IN) * 5).to(dtype)
    x[0] = sae.mean
    for batch in (x, x[:7]):
        torch.testing.assert_close(trainer.normalise(batch), sae.normalise(batch)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8), (5, 7), (40, 64), (1, 1)])
def test_positions_of_true_entries(shape):
    for share in (0.0, 0.02, 0.5, 1.0):
        mask = torch.rand(shape) < share
        assert u.nonzero_flat(mask).tolist() == mask.flatten().nonzero().flatten().tolist()


@pytest.mark.parametrize("path", [0.0, 2.0])
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_the_threshold_follows_the_smallest_activation_kept(architecture, path):
    sae = make_sae(architecture)
    sae.b_enc += 0.2  # always more above zero than are kept
    trainer, smallest = training.Trainer(sae, sparse_below=path), []
    for _ in range(30):
        x = unit_rows()
        pre = x.double() @ sae.W_enc.double() + sae.b_enc
        smallest.append(pre.flatten().topk(K * BATCH).values.min().item())
        trainer.step(x, 1e-3)
    weights = [0.99 ** (29 - i) for i in range(30)]
    expected = sum(w * s for w, s in zip(weights, smallest, strict=True)) / sum(weights)
    trainer.read()
    torch.testing.assert_close(sae.threshold, torch.full((D_SAE,), expected), rtol=1e-3, atol=1e-5)
    acts = sae.encode_unit(x)
    assert torch.equal(acts > 0, x @ sae.W_enc + sae.b_enc > sae.threshold) and (acts > 0).any()


@pytest.mark.parametrize("path", [0.0, 2.0])
def test_a_loss_that_is_not_finite_changes_nothing_and_is_named(path):
    sae = make_sae("relu")
    trainer = training.Trainer(sae, L1, sparse_below=path)
    for _ in range(3):
        trainer.step(unit_rows(), 1e-3)
    before, moments = [p.clone() for p in trainer.parameters.values()], trainer.first["W_dec"].clone()
    bad = unit_rows()
    bad[3, 2] = torch.nan
    trainer.step(bad, 1e-3)
    trainer.step(unit_rows(), 1e-3)  # nor does a good step after it
    for parameter, value in zip(trainer.parameters.values(), before, strict=True):
        torch.testing.assert_close(parameter, value, rtol=0, atol=1e-6)
    assert torch.equal(trainer.first["W_dec"], moments)
    with pytest.raises(u.UserError, match="not a finite number at step 3; .*: start another run with a lower lr"):
        trainer.read()


@pytest.mark.parametrize("kernel", [True, False])
def test_a_last_step_that_went_bad_is_noticed(kernel):
    """The loss is of before the step, so the last step's own ruin shows in the weights alone."""
    sae = make_sae("relu")
    trainer = training.Trainer(sae, L1, kernel=kernel)
    for _ in range(4):
        trainer.step(unit_rows(), 1e-3)
    trainer.read()
    trainer.step(unit_rows(), 1e39)
    assert trainer.state["first_bad"] == -1
    with pytest.raises(u.UserError, match="step 4 or one shortly before it left .*b_enc.* no finite numbers"):
        trainer.read()
    with pytest.raises(u.UserError, match="step 4"):
        training.check_end(trainer, [])
    good = training.Trainer(make_sae("relu"), L1)
    good.step(unit_rows(), 1e-3)
    training.check_end(good, [{"epoch": 1, "held_out_fvu": 0.5}])
    with pytest.raises(u.UserError, match="after the last step, 1, held_out_fvu are no finite numbers, so no SAE is saved"):
        training.check_end(good, [{"epoch": 1, "held_out_fvu": 0.5}, {"epoch": 2, "held_out_fvu": float("nan")}])


def test_silent_latents_come_back_with_auxk(fresh_seed):
    """Half of the latents are pushed below zero for good; only AuxK gives those a gradient."""
    alive = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(fresh_seed)
        sae = make_sae("topk")
        sae.b_enc[: D_SAE // 2] -= 0.3
        trainer = training.Trainer(sae, auxk_weight=weight, dead_after=20)
        for _ in range(300):
            trainer.step(unit_rows(), 3e-3)
            if trainer.steps % 10 == 0:
                fired = trainer.read(reset=True)["fired"]
        alive[weight] = (fired > 0).sum().item()
    assert alive[1.0] > alive[0.0]


def test_an_epoch_is_one_permutation_from_seed_and_epoch(fresh_seed):
    orders = [training.epoch_order(500, seed, epoch) for seed in (fresh_seed, fresh_seed + 1) for epoch in (1, 2)]
    assert all(order.sort().values.equal(torch.arange(500)) for order in orders)
    assert all(not a.equal(b) for i, a in enumerate(orders) for b in orders[:i])
    torch.manual_seed(5)
    assert training.epoch_order(500, fresh_seed, 1).equal(orders[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_batches_are_the_rows_asked_for(dtype, tmp_path):
    torch.randn(1000, 6).to(dtype).view(torch.uint8).numpy().tofile(tmp_path / "rows")
    rows = torch.from_file(str(tmp_path / "rows"), size=6000, dtype=dtype).view(1000, 6)
    index = torch.randperm(1000)[:777]
    batches = list(training.shuffled_batches(rows, index, 50, super_batch=120))
    assert [len(b) for b in batches] == [50] * 15 + [27] and torch.equal(torch.cat(batches), rows[index])
    for where in ("cpu", "meta"):
        assert list(training.shuffled_batches(rows.to(where), index[:0], 50)) == []


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "jumprelu", "gated"])
def test_going_on_from_a_checkpoint_is_the_same_to_the_bit(architecture, tmp_path):
    x = [unit_rows() for _ in range(40)]
    sae = make_sae(architecture)

    def train(sae, trainer, first, last):
        for i in range(first, last):
            trainer.step(x[i], 1e-2)
            if i % 7 == 0:
                trainer.read()

    whole, stopped, resumed = (make_copy(sae) for _ in range(3))
    settings = {"l1_coeff": L1, "auxk_weight": AUX, "dead_after": 3, "sparse_below": 0.12, "k_falls": 30}
    one = training.Trainer(whole, **settings)
    train(whole, one, 0, 40)
    two = training.Trainer(stopped, **settings)
    train(stopped, two, 0, 23)
    training.save_checkpoint(tmp_path / "checkpoint.pth", two, "rows", epoch=4, history=[{"loss": 1.5}])
    three = training.Trainer(resumed, **settings)
    with pytest.raises(u.UserError, match="checkpoint.pth was trained on other activations"):
        training.load_checkpoint(tmp_path / "checkpoint.pth", three, "other rows")
    assert training.load_checkpoint(tmp_path / "checkpoint.pth", three, "rows") == {"epoch": 4, "history": [{"loss": 1.5}]}
    train(resumed, three, 23, 40)
    one.read(), three.read()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert all(torch.equal(value, three.state[name]) for name, value in one.state.items())


def test_a_checkpoint_that_cannot_be_used_is_a_notice_and_a_new_start(tmp_path, fresh_seed):
    path, start = tmp_path / "checkpoint.pth", {"epoch": 1, "history": []}
    sae, random = make_sae("relu"), torch.Generator().manual_seed(fresh_seed)
    trainer = training.Trainer(make_copy(sae), L1)
    assert training.resume(path, trainer, "rows", start) == (start, "")
    for _ in range(3):
        trainer.step(unit_rows(), 1e-2)
    training.save_checkpoint(path, trainer, "rows", epoch=2, history=[{"loss": 1.5}])
    whole, trained, going_on = path.read_bytes(), {name: p.clone() for name, p in trainer.parameters.items()}, {"epoch": 2, "history": [{"loss": 1.5}]}

    def tried(rows="rows", of=sae):
        """(place, notice, whether the trainer is where it was when the checkpoint was saved, or as it began)."""
        fresh = training.Trainer(make_copy(of), L1)
        before = {name: p.clone() for name, p in fresh.parameters.items()}
        place, lost = training.resume(path, fresh, rows, start)
        same = lambda wanted: all(torch.equal(p, wanted[name]) for name, p in fresh.parameters.items())
        assert same(before) and fresh.steps == 0 if place == start else same(trained) and fresh.steps == 3
        return place, lost

    assert tried() == (going_on, "")
    refused = 0
    for bit in torch.randint(8 * len(whole), (60,), generator=random).tolist():
        path.unlink()
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        place, lost = tried()
        assert place == (start if lost else going_on) and ("checkpoint.pth" in lost and "starts again from the beginning" in lost) == bool(lost), bit
        refused += bool(lost)
    assert refused > 30
    for damaged in (b"", whole[: len(whole) // 3], whole[:-1], bytes(len(whole))):
        path.write_bytes(damaged)
        assert tried()[0] == start and "is damaged" in tried()[1]
    for case, message in (({"rows": "other"}, "trained on other activations"), ({"of": u.SAE(D_IN, D_SAE + 8)}, "of another SAE")):
        path.write_bytes(whole)
        place, lost = tried(**case)
        assert place == start and message in lost and "kept as checkpoint.other.pth" in lost
        assert (tmp_path / "checkpoint.other.pth").read_bytes() == whole and not path.exists()


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "jumprelu", "gated"])
def test_a_saved_sae_encodes_as_before(architecture, tmp_path):
    sae, x = make_sae(architecture), torch.randn(30, D_IN)
    if sae.rule.jumps:
        sae.threshold.fill_(0.1)
    sae.save(tmp_path / "sae.pth")
    loaded = u.SAE.load(tmp_path / "sae.pth")
    assert torch.equal(loaded.encode(x), sae.encode(x)) and (sae.encode(x) > 0).any()
    assert ("threshold" in torch.load(tmp_path / "sae.pth", weights_only=True)["state_dict"]) == hasattr(sae, "threshold")
    if architecture == "topk":
        assert (sae.encode(x) > 0).sum(1).max() <= K


def test_the_probe_leaves_the_sae_alone():
    sae = make_sae("relu")
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    fast, slow = training.probe(sae, unit_rows(), L1, 0.0)
    assert 0 < fast <= slow and all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_durations_in_the_unit_that_suits():
    assert [showing.duration(s) for s in (3, 119, 600, 7000, 90_000, 864_000)] == ["3 seconds", "119 seconds", "10 minutes", "117 minutes", "25 hours", "10.0 days"]


HEALTHY = {"fvu": 0.2, "train_fvu": 0.19, "dead": 0.01, "l0": 40.0}
SICK = [
    ({"fvu": 1.1, "train_fvu": 1.1}, "worse than the mean .*lower l1_coeff", "worse than the mean .*raise k"),
    ({"dead": 0.3}, "30% of the latents are dead: lower l1_coeff or lr", "raise auxk_weight"),
    ({"l0": 2.0}, "only 2.0 latents .*lower l1_coeff", "raise k"),
    ({"l0": 500.0}, "500 latents .*raise l1_coeff", "lower k"),
    ({"fvu": 0.3}, "0.300 on held-out rows and 0.190 on training rows: raise n_activations", "raise n_activations"),
]
SETTLING = [{"held_out_loss": 1 + 0.5**i} for i in range(10)]


@pytest.mark.parametrize(("change", "relu", "topk"), SICK)
def test_the_doctor_names_parameter_and_direction(change, relu, topk):
    for architecture, expected in (("relu", relu), ("topk", topk)):
        (line,) = training.doctor(HEALTHY | change, SETTLING, architecture)
        assert re.search(expected, line)
        assert training.doctor(HEALTHY, SETTLING, architecture) == []


def test_the_doctor_reads_the_curve():
    falling = [{"held_out_loss": 0.9**i} for i in range(20)]
    (line,) = training.doctor(HEALTHY, falling, "relu")
    assert "still fell by" in line and "raise epochs" in line
    flat = [{"held_out_loss": 1 + 0.5 ** (5 * i)} for i in range(20)]
    (line,) = training.doctor(HEALTHY, flat, "relu")
    assert "has not improved since epoch 3 of 20: lower epochs" in line
    assert training.doctor(HEALTHY, SETTLING[:3], "relu") == []  # too short to tell


@pytest.mark.parametrize("name", ["gemma-3-270m", "smollm2-135m-instruct"])
def test_the_recipes_of_params_are_those_that_were_measured(name):
    given, measured = yaml.safe_load((u.ROOT / "params" / f"{name}.yaml").read_text()), ON_ROWS["batchtopk k 32"]
    assert {setting: given[setting] for setting in measured} == measured and given["normalize"] == "scale"


@pytest.mark.repeats
def test_known_directions_are_found():
    """Rows made of 24 of 512 random directions: training finds them, an untrained SAE does not."""
    rows, directions, coefficients = known_directions(60_000)
    untrained = u.SAE(128, 1024).requires_grad_(False)
    untrained.mean.copy_(rows.mean(0))
    trained = train(rows, torch.arange(50_000), 8, 2000, architecture="batchtopk", k=24, lr=4e-3)
    before, after = (recovery(sae, directions, rows[50_000:], coefficients[50_000:]) for sae in (untrained, trained))
    assert before["max_cosine"] < 0.5 and after["max_cosine"] > 0.9
    assert before["f1"] < 0.2 and after["f1"] > 0.45


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_off_the_cpu_a_step_reads_nothing_back_and_stays_on_its_device(architecture, monkeypatch):
    """On the meta device tensors have no content: reading one back, or mixing devices, raises. State keeps
    its place in memory, as the recording of a step as a CUDA graph needs."""
    sae = u.SAE(D_IN, D_SAE, architecture=architecture, k=K, apply_b_dec_to_input=True).to("meta")
    trainer = training.Trainer(sae, L1, AUX)
    trainer.product_dtype = torch.bfloat16
    monkeypatch.setattr(trainer, "adam", lambda lr: None)  # torch's own kernel has no version for it
    before = {name: id(t) for name, t in (trainer.state | trainer.gradients).items()}
    for trainer.any_dead in (False, True):
        with torch.no_grad():
            trainer.work(torch.empty(BATCH, D_IN, device="meta"), trainer.lr)
    assert {name: id(t) for name, t in (trainer.state | trainer.gradients).items()} == before
    with pytest.raises(RuntimeError):
        trainer.read()


def test_a_disk_that_is_full_for_tensorboard_is_one_sentence(tmp_path, monkeypatch):
    """Its thread meets it first; that is told by one of the next calls and not printed, while other threads' errors are printed as ever."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    writer = training.open_writer(tmp_path)
    events = writer.file_writer.event_writer

    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    writer.add_scalar("a", 1.0, 1)
    writer.flush()
    events._async_writer._writer.write = full
    with contextlib.suppress(u.UserError):  # the thread may be that quick
        writer.add_scalar("a", 1.0, 2)
    events._async_writer._worker.join(30)
    for call in (lambda: writer.add_scalar("a", 1.0, 3), writer.flush):
        with pytest.raises(u.UserError, match="could not be written .No space left on device.: make room there"):
            call()
    assert printed == []
    other = threading.Thread(target=full)
    other.start()
    other.join()
    assert len(printed) == 1
    monkeypatch.setattr(event_file_writer.RecordWriter, "write", full)  # from the first byte on
    del printed[:]
    with pytest.raises(u.UserError, match="No space left"):
        for step in range(1000):
            training.open_writer(tmp_path).add_scalar("a", 1.0, step)
    for thread in threading.enumerate():
        thread.join(5) if isinstance(thread, event_file_writer._AsyncWriterThread) and thread is not events._async_writer._worker else None
    assert printed == []


def test_a_checkpoint_of_something_else_is_kept_whatever_its_folder_is_called(tmp_path):
    """Damaged ones are not: what makes the difference is the fault, and not a word of the sentence."""
    trainer = training.Trainer(make_sae("relu"), L1)
    trainer.step(unit_rows(), 1e-2)
    for folder in (tmp_path / "plain", tmp_path / "damaged digest"):
        path = folder / "checkpoint.pth"
        training.save_checkpoint(path, trainer, "rows", epoch=2)
        _, lost = training.resume(path, training.Trainer(make_sae("relu"), L1), "other rows", {"epoch": 1})
        assert "kept as checkpoint.other.pth" in lost and (folder / "checkpoint.other.pth").exists() and not path.exists()
        path.write_bytes(b"PK")
        _, lost = training.resume(path, training.Trainer(make_sae("relu"), L1), "rows", {"epoch": 1})
        assert "kept" not in lost and path.exists()


def test_a_checkpoint_whose_archive_is_whole_and_whose_content_is_not(tmp_path):
    trainer = training.Trainer(make_sae("relu"), L1)
    trainer.step(unit_rows(), 1e-2)
    path = tmp_path / "checkpoint.pth"
    training.save_checkpoint(path, trainer, "rows", epoch=2)
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"epoch": 3}, path)
    with pytest.raises(u.Damaged, match="not as it was written"):
        training.load_checkpoint(path, trainer, "rows")
    state = trainer.state_dict()
    assert training.alike(state, state) and not training.alike(state | {"more": 1}, state)
    assert not training.alike({name: value for name, value in state.items() if name != next(iter(state))}, state)
