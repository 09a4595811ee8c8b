"""One training step, written once, and what a long run needs around it.

The step works out its gradients by hand. With `acts` mostly zeros, everything after the encoder
needs only the active entries: they are gathered once and four of the five matrix products of a step
become sparse. tests/test_training.py has the same in autograd, as the readable reference.
"""

import math
import os
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.adam import adam as functional_adam

import sae_utils
import showing
from sae_utils import nonzero_flat

# Share of active entries below which the sparse step is the faster one on a CPU: `make bench
# PART=training` prints both around it.
SPARSE_BELOW = 0.06
CHECKPOINT_VERSION = 2
FIRST_K = 3.0  # how many times k latents are kept in the first step, where k is let fall
THRESHOLD_DECAY = 0.99  # of the running mean of the smallest activation that a batch keeps


def csr(row_starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(row_starts, columns, values, size, check_invariants=False)


def auxk(sae: sae_utils.SAE, x: Tensor, pre_acts: Tensor, acts: Tensor, dead: Tensor) -> Tensor:
    """AuxK (Gao et al. 2024): how well the `d_in // 2` strongest of the `dead` (d_sae) latents of each token rebuild
    what the others leave over of x (batch, d_in): their mean squared error, divided by the share of x's variance
    that is left over, so that dead latents are drawn to it as strongly late in training as early."""
    left_over = (x - sae.decode_unit(acts)).detach()
    among = pre_acts.relu().masked_fill(~dead, 0)
    kept = sae_utils.TopK().kept(min(sae.d_in // 2, sae.d_sae), among)
    share = left_over.var(0, correction=0).mean() / x.var(0, correction=0).mean()
    return (torch.where(kept, among, 0.0) @ sae.W_dec - left_over).square().mean() / share


def losses(sae: sae_utils.SAE, x: Tensor, weights: dict[str, float], dead: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The training step of any architecture, to be read and to be differentiated by autograd: (loss and what it is
    made of, acts (batch, d_sae)) of rows x (batch, d_in), which are normalised."""
    pre_acts = sae.pre_acts(x)
    acts = sae.rule.train(sae, pre_acts)
    loss = sae.rule.loss(sae, x, pre_acts, acts, weights)
    if dead is not None:
        loss = loss + weights["auxk_weight"] * auxk(sae, x, pre_acts, acts, dead)
    return {"loss": loss, "mse": (sae.decode_unit(acts) - x).square().mean(), "l1": acts.sum(1).mean()}, acts


def has_kernel(rule: sae_utils.ReLU) -> bool:
    """Whether an architecture is one that the gradients written by hand are right for: it keeps pre_acts or drops
    them, its loss is mse, of prefixes or not, with L1 or without, and it has no further parameters; or it is JumpReLU."""
    ours, plain = type(rule), sae_utils.ReLU
    keeps = ours.train is plain.train and ours.penalty in (plain.penalty, sae_utils.TopK.penalty) and not rule.tensors(1)[0]
    return ours.loss is plain.loss and (keeps or learns_thresholds(rule))


def learns_thresholds(rule: sae_utils.ReLU) -> bool:
    ours, jump = type(rule), sae_utils.JumpReLU
    return ours.train is jump.train and ours.penalty is jump.penalty and ours.tensors is jump.tensors


class Trainer:
    """Trains `sae` in place, step by step: `step(normalise(batch), lr)` with rows (batch, d_in).

    What a step minimises is `losses`. Its gradients are autograd's, or those of a kernel written by hand,
    dense or sparse, for the architectures that have one (`has_kernel`; `kernel` False does without). AuxK is added where `auxk_weight` is above
    0, for the latents that were silent on the last `dead_after` rows. Architectures that are used with a
    threshold afterwards keep a running one, of the smallest activation that a batch kept; `settle` sets the
    last one. Those that keep the k largest keep more at first: FIRST_K times k, which falls in a line to k over
    `k_falls` steps, so that more latents have learnt something before they have to compete.

    Nothing is read back from the device within a kernel's step on CUDA, where it is recorded once and its parts
    launched together (a CUDA graph; `graphs` False launches them one by one). `read()`
    returns the sums since the last `read(reset=True)`. A step whose loss is not finite changes
    nothing, nor does any after it.
    """

    def __init__(
        self, sae: sae_utils.SAE, l1_coeff: float = 0.0, auxk_weight: float = 0.0, dead_after: int = 100_000, l0_weight: float = 0.0,
        sparse_below: float = SPARSE_BELOW, graphs: bool = True, kernel: bool = True, k_falls: int = 0,
    ):  # fmt: skip
        self.sae, self.rule, self.dead_after = sae.requires_grad_(False), sae.rule, dead_after
        self.k_falls = k_falls if isinstance(sae.rule, sae_utils.TopK) else 0
        self.weights = {"l1_coeff": l1_coeff, "auxk_weight": auxk_weight, "l0_weight": l0_weight}
        self.auxk_weight, self.kernel = auxk_weight, kernel and has_kernel(self.rule)
        self.l1_coeff = l1_coeff if type(self.rule).penalty is sae_utils.ReLU.penalty else 0.0  # the kernel's
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = sae.W_enc.data.T, sae.W_dec.data, sae.b_enc.data, sae.b_dec.data
        assert self.W_enc.is_contiguous()  # (d_sae, d_in): both weights' gradients are then sums of rows
        self.device = self.W_dec.device
        self.parameters = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        self.parameters |= {name: parameter.data for name, parameter in sae.named_parameters() if name not in self.parameters}
        zeros_like = lambda: {name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()}
        self.gradients, self.first, self.second = zeros_like(), zeros_like(), zeros_like()  # Adam's two moments
        self.adam_steps = {name: torch.zeros((), device=self.W_dec.device) for name in self.parameters}
        self.ends = self.rule.ends(sae.d_sae)
        self.product_dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.sparse_below = sparse_below if self.device.type == "cpu" else 0.0
        self.any_dead, self.steps, self.buffers = False, 0, {}
        self.learns_thresholds = learns_thresholds(sae.rule)
        self.active_share = min(1.0, self.k_now() / sae.d_sae) if sae.k and not self.learns_thresholds else 1.0  # of the entries, in the last step
        self.graphs, self.recorded, self.seen = graphs and self.kernel and self.device.type == "cuda", {}, {}
        if self.device.type == "cpu":
            with warnings.catch_warnings():  # torch says once that its sparse matrices are in beta; what is used here is tested
                warnings.simplefilter("ignore")
                csr(torch.zeros(2, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), torch.zeros(0), (1, 1))
        zeros = lambda *size, dtype=torch.float32: torch.zeros(size, device=self.device, dtype=dtype)
        self.good, self.last_loss, self.lr, self.fired = zeros(), zeros(), zeros(), zeros(sae.d_sae)  # of the last step
        self.state = {  # always changed in place: a recorded step knows where they are
            "step": zeros(dtype=torch.int64), "sums": zeros(4), "rows": zeros(), "fired": zeros(sae.d_sae), "strength": zeros(),
            "silent": zeros(sae.d_sae, dtype=torch.int64), "threshold": zeros(2), "first_bad": zeros(dtype=torch.int64) - 1,
        }  # fmt: skip

    def buffer(self, name: str, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory that is used again at every step: fresh pages would cost more than the arithmetic."""
        if (name, size) not in self.buffers:
            self.buffers[name, size] = torch.empty(size, device=self.device, dtype=dtype)
        return self.buffers[name, size]

    @torch.no_grad()
    def normalise(self, batch: Tensor) -> Tensor:
        """x_unit of raw activations, as `SAE.normalise` gives it, in memory that the next batch overwrites."""
        x = self.buffer("x", *batch.shape).copy_(batch).sub_(self.sae.mean)
        return x.div_(self.sae.norm_scale or torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-8))

    def k_now(self) -> int:
        """How many latents a token the next step keeps."""
        left = max(0.0, 1 - self.steps / self.k_falls) if self.k_falls else 0.0
        return min(self.sae.d_sae, round(self.sae.k * (1 + (FIRST_K - 1) * left)))

    @torch.no_grad()
    def step(self, x: Tensor, lr: float) -> None:
        k, self.sae.k = self.sae.k, self.k_now()
        try:
            if self.graphs and self.steps >= self.k_falls:  # a recorded step has one k
                self.replay(x, lr)
            else:
                self.work(x, lr)
        finally:
            self.sae.k = k
        self.steps += 1
        if self.device.type == "cpu":
            self.active_share = self.fired.sum().item() / (len(x) * self.sae.d_sae)

    def replay(self, x: Tensor, lr: float) -> None:
        """The step as a CUDA graph, one for each shape of batch, recorded after it was run three times."""
        kind = (x.shape, self.any_dead)
        self.lr.fill_(lr)
        self.seen[kind] = self.seen.get(kind, 0) + 1
        if self.seen[kind] <= 3:
            self.work(x, self.lr)
            return
        if kind not in self.recorded:
            inputs, graph = x.clone(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.work(inputs, self.lr)
            self.recorded[kind] = inputs, graph
        inputs, graph = self.recorded[kind]
        inputs.copy_(x)
        graph.replay()

    def work(self, x: Tensor, lr: float | Tensor) -> None:
        """One step, gradients, update and sums."""
        loss, mse, l1, fired, smallest = self.by_kernel(x) if self.kernel else self.by_autograd(x)
        n, state = len(x), self.state
        bad = ~loss.isfinite() | (state["first_bad"] >= 0)
        state["first_bad"].copy_(torch.where(bad & (state["first_bad"] < 0), state["step"], state["first_bad"]))
        good = self.good.copy_(~bad)
        self.last_loss.copy_(loss)
        self.fired.copy_(fired)
        self.adam(lr)
        self.W_dec.mul_(torch.linalg.vector_norm(self.W_dec, dim=1, keepdim=True).reciprocal_())
        state["step"].add_(1)
        state["sums"].add_(good * n * torch.stack([loss, mse, l1, fired.sum() / n]).nan_to_num(0, 0, 0))
        state["strength"].add_(good * (l1 * n).nan_to_num(0, 0, 0))
        state["rows"].add_(good * n)
        state["fired"].add_(good * fired)
        state["silent"].add_(n).mul_(fired == 0)
        if self.rule.jumps:
            new = torch.stack([smallest.nan_to_num(0, 0, 0), torch.ones_like(smallest)])
            mixed = THRESHOLD_DECAY * state["threshold"] + (1 - THRESHOLD_DECAY) * new
            state["threshold"].copy_(torch.where((good > 0) & smallest.isfinite(), mixed, state["threshold"]))

    def by_autograd(self, x: Tensor):
        """(loss, mse, l1, fired (d_sae), smallest activation kept) of a step, its gradients put into `gradients`."""
        self.sae.requires_grad_(True)
        with torch.enable_grad():
            found, acts = losses(self.sae, x, self.weights, self.state["silent"] >= self.dead_after if self.use_aux else None)
            names, parameters = zip(*self.sae.named_parameters(), strict=True)
            gradients = dict(zip(names, torch.autograd.grad(found["loss"], parameters), strict=True))
        self.sae.requires_grad_(False)
        W_grad = gradients["W_dec"]
        gradients |= {"W_enc": gradients["W_enc"].T, "W_dec": W_grad - torch.linalg.vecdot(W_grad, self.W_dec)[:, None] * self.W_dec}
        for name, gradient in gradients.items():
            self.gradients[name].copy_(gradient)
        acts = acts.detach()
        smallest = acts.masked_fill(acts <= 0, torch.inf).amin()
        return found["loss"].detach(), found["mse"].detach(), found["l1"].detach(), (acts > 0).sum(0, dtype=torch.float32), smallest

    def by_kernel(self, x: Tensor):
        """As `by_autograd`, by hand."""
        x_in = x - self.b_dec if self.sae.apply_b_dec_to_input else x
        pre_acts = self.buffer("pre_acts", len(x), self.sae.d_sae)
        if self.product_dtype == torch.float32:
            pre_acts = sae_utils.linear(x_in, self.W_enc, self.b_enc, out=pre_acts)
        else:
            self.product(x_in, self.W_enc.T, pre_acts).add_(self.b_enc)
        if not self.learns_thresholds:  # to these, what is a little below zero counts too
            pre_acts.clamp_min_(0)
        gradients = self.sparse if self.active_share < self.sparse_below else self.dense
        mse, first_mse, l1, aux, fired, smallest = gradients(x, x_in, pre_acts)
        if self.sae.apply_b_dec_to_input:
            self.gradients["b_dec"].sub_(self.W_enc.T @ self.gradients["b_enc"])
        loss = first_mse + self.l1_coeff * l1 + self.auxk_weight * aux
        if self.learns_thresholds:
            loss = loss + self.l0_penalty(fired.sum() / len(x))[0]
        return loss, mse, l1, fired, smallest

    def adam(self, lr: float | Tensor) -> None:
        """Adam on all parameters, each at its rate; where this step or one before it was bad, nothing changes."""
        if self.device.type == "mps" and not self.good:  # there the fused kernel has not been seen to honour found_inf
            return
        settings = {"beta1": 0.9, "beta2": self.rule.beta2, "eps": self.rule.eps, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
        for name, parameter in self.parameters.items():
            functional_adam(
                [parameter], [self.gradients[name]], [self.first[name]], [self.second[name]], [], [self.adam_steps[name]],
                fused=True, found_inf=1 - self.good, lr=lr * self.rule.rates.get(name, 1.0), **settings,
            )  # fmt: skip

    def product(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        """a @ b into `out`; on CUDA of bfloat16 factors, summed and kept in float32."""
        if self.product_dtype == torch.float32:
            found = sae_utils.linear(a, b.T, out=out)
            return found if found is out else out.copy_(found)
        return out.copy_(torch.mm(a.to(self.product_dtype), b.to(self.product_dtype), out_dtype=torch.float32))

    # -- which entries are active

    def keep(self, pre_acts: Tensor) -> Tensor:
        """Boolean (batch, d_sae): the entries that the architecture keeps while it trains; none is 0."""
        if self.learns_thresholds:
            return torch.gt(pre_acts, self.sae.threshold.clamp_min(0), out=self.buffer("mask", *pre_acts.shape, dtype=torch.bool))
        if type(self.rule).kept is sae_utils.ReLU.kept:
            return self.buffer("mask", *pre_acts.shape, dtype=torch.bool).copy_(pre_acts)  # a conversion, several times as fast as a comparison
        near = 0.7 * float(self.threshold()) if self.rule.jumps and self.device.type == "cpu" else 0.0
        return self.rule.kept(self.sae.k, pre_acts, near)

    def silent(self, pre_acts: Tensor) -> Tensor:
        """Boolean (batch, d_sae): for each token the strongest of the latents that are dead by now."""
        dead = self.state["silent"] >= self.dead_after
        return sae_utils.TopK().kept(min(self.sae.d_in // 2, self.sae.d_sae), pre_acts.masked_fill(~dead, 0))

    def l0_penalty(self, l0: Tensor) -> tuple[Tensor, Tensor]:
        """JumpReLU's penalty, and its derivative with respect to L0."""
        k, weight = self.sae.k, self.weights["l0_weight"] / self.sae.d_in
        return (weight * k * (l0 / k - 1).square(), 2 * weight * (l0 / k - 1)) if k else (weight * l0, weight * torch.ones_like(l0))

    @property
    def use_aux(self) -> bool:
        return self.auxk_weight > 0 and self.any_dead

    # -- the gradients, dense and sparse

    def errors(self, parts: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """From what each group of latents adds, (groups, batch, d_in): mse of the whole, the mean mse of the
        prefixes, aux, and the loss's gradient with respect to each group's part, in place of the parts."""
        prefixes = len(self.ends)
        error = parts[:prefixes]
        if prefixes > 1:
            error.copy_(error.cumsum(0))
        error.add_(self.b_dec).sub_(x)
        by_row = lambda values: torch.linalg.vector_norm(values, dim=-1).square().sum(-1)  # in one go the sum of many rows loses digits
        each = by_row(error) / x.numel()
        aux = torch.zeros((), device=x.device)
        if len(parts) > prefixes:
            share = error[-1].var(0, correction=0).mean() / x.var(0, correction=0).mean()
            parts[-1].add_(error[-1])  # aims at what is left over, x - x_hat
            aux = by_row(parts[-1]) / (x.numel() * share)
            parts[-1].mul_(2 * self.auxk_weight / (x.numel() * share))
        error.mul_(2 / (x.numel() * prefixes))
        if prefixes > 1:
            error.copy_(error.flip(0).cumsum(0).flip(0))
        torch.sum(error[0], 0, out=self.gradients["b_dec"])
        return each[-1], each.mean(), aux, parts

    def dense(self, x: Tensor, x_in: Tensor, pre_acts: Tensor):
        mask, n = self.keep(pre_acts), len(x)
        acts = torch.mul(pre_acts, mask, out=self.buffer("acts", *pre_acts.shape))
        groups = list(zip([0, *self.ends], self.ends, strict=False))
        use_aux = self.use_aux
        parts = self.buffer("parts", len(groups) + use_aux, *x.shape)
        for part, (first, last) in zip(parts, groups, strict=False):
            self.product(acts[:, first:last], self.W_dec[first:last], part)
        if use_aux:
            aux_mask = self.silent(pre_acts)
            aux_acts = torch.mul(pre_acts, aux_mask, out=self.buffer("aux_acts", *pre_acts.shape))
            self.product(aux_acts, self.W_dec, parts[-1])
        mse, loss, aux, slopes = self.errors(parts, x)
        d_pre, W_grad = self.buffer("d_pre", *pre_acts.shape), self.gradients["W_dec"]
        for slope, (first, last) in zip(slopes, groups, strict=False):
            self.product(slope, self.W_dec[first:last].T, d_pre[:, first:last])
            self.product(acts[:, first:last].T, slope, W_grad[first:last])
        if self.l1_coeff:
            d_pre.add_(self.l1_coeff / n)
        if self.learns_thresholds:
            level, width = self.sae.threshold, self.rule.bandwidth
            inside = torch.sub(pre_acts, level, out=self.buffer("inside", *pre_acts.shape)).abs_().lt_(width / 2)
            by_l0 = self.l0_penalty(mask.sum() / n)[1] / n
            torch.mul(torch.linalg.vecdot(inside.T, d_pre.T).mul_(level).add_(inside.sum(0) * by_l0), -1 / width, out=self.gradients["threshold"])
        d_pre.mul_(mask)
        if use_aux:
            W_grad.add_(self.product(aux_acts.T, slopes[-1], self.gradients["W_enc"]))
            d_pre.add_(self.product(slopes[-1], self.W_dec.T, self.buffer("d_aux", *pre_acts.shape)).mul_(aux_mask))
        self.product(d_pre.T, x_in, self.gradients["W_enc"])
        torch.sum(d_pre, 0, out=self.gradients["b_enc"])
        W_grad.addcmul_(self.W_dec, torch.linalg.vecdot(W_grad, self.W_dec)[:, None], value=-1)
        smallest = acts.masked_fill(~mask, torch.inf).amin() if self.rule.jumps else torch.full((), torch.inf, device=x.device)
        return mse, loss, acts.sum() / n, aux, mask.sum(0, dtype=torch.float32), smallest

    def sparse(self, x: Tensor, x_in: Tensor, pre_acts: Tensor):
        """As `dense`, from the active entries alone. Row g * batch + i of the sparse matrices holds what
        group g of latents does for token i; the groups are the prefixes' differences, then AuxK's."""
        n, d_sae = pre_acts.shape
        level, width = (self.sae.threshold, self.rule.bandwidth) if self.learns_thresholds else (None, 0.0)
        near = self.keep(pre_acts) if level is None else torch.gt(pre_acts, torch.minimum(level.clamp_min(0), level - width / 2), out=self.buffer("mask", *pre_acts.shape, dtype=torch.bool))
        flat = nonzero_flat(near)
        token, latent = flat // d_sae, flat % d_sae
        acts, row, main = pre_acts.view(-1)[flat], token, len(flat)
        on = torch.ones(main)
        if level is not None:  # entries that only the ramps know go along as zeros
            level = level[latent]
            inside, on = ((acts - level).abs() < width / 2).float(), (acts > level.clamp_min(0)).float()
            acts = acts * on
        if len(self.ends) > 1:
            row = token + n * torch.bucketize(latent, torch.tensor(self.ends), right=True)
        if self.use_aux:
            extra = nonzero_flat(self.silent(pre_acts))
            token, latent = torch.cat([token, extra // d_sae]), torch.cat([latent, extra % d_sae])
            acts, row = torch.cat([acts, pre_acts.view(-1)[extra]]), torch.cat([row, extra // d_sae + n * len(self.ends)])
        fired = torch.zeros(d_sae).index_add_(0, latent[:main], on)
        l1 = acts[:main].sum() / n
        smallest = acts[:main].amin() if main else torch.tensor(torch.inf)
        weight = torch.full_like(acts, self.l1_coeff / n)  # of L1 in each entry's gradient
        weight[main:] = 0
        if len(self.ends) > 1:
            order = row.argsort(stable=True)
            token, latent, acts, row, weight = (t[order] for t in (token, latent, acts, row, weight))
        n_parts = len(self.ends) + self.use_aux
        starts = torch.searchsorted(row, torch.arange(n_parts * n + 1)).int()
        columns, size = latent.int(), (n_parts * n, d_sae)
        parts = self.buffer("parts", n_parts, *x.shape)
        flat_parts = parts.view(-1, x.shape[1])
        torch.addmm(flat_parts, csr(starts, columns, acts, size), self.W_dec, beta=0, out=flat_parts)
        mse, loss, aux, slopes = self.errors(parts, x)
        slopes = slopes.view(-1, x.shape[1])
        pattern = csr(starts, columns, torch.zeros_like(acts), size)
        d_acts = torch.sparse.sampled_addmm(pattern, slopes, self.W_dec.T, beta=0).values()
        along = torch.zeros(d_sae).index_add_(0, latent, acts * d_acts)  # each row's gradient along the row
        d_pre = d_acts + weight
        if level is not None:
            by_l0 = self.l0_penalty(on.sum() / n)[1] / n
            self.gradients["threshold"].zero_().index_add_(0, latent[:main], inside * (d_pre[:main] * level + by_l0)).div_(-width)
            d_pre[:main] *= on
        self.gradients["b_enc"].zero_().index_add_(0, latent, d_pre)
        order = columns.argsort(stable=True)
        starts = torch.searchsorted(columns[order], torch.arange(d_sae + 1, dtype=torch.int32)).int()
        torch.mul(self.W_dec, along.neg_()[:, None], out=self.gradients["W_dec"])  # takes out the part along the rows
        for name, rows, values, other in (("W_dec", row, acts, slopes), ("W_enc", token, d_pre, x_in)):
            gradient, matrix = self.gradients[name], csr(starts, rows[order].int(), values[order], (d_sae, len(other)))
            torch.addmm(gradient, matrix, other, beta=int(name == "W_dec"), out=gradient)
        return mse, loss, l1, aux, fired, smallest

    # -- reading, and going on later

    def threshold(self) -> float | Tensor:
        total, weight = self.state["threshold"]
        return total / weight.clamp_min(1e-12)

    def means(self) -> dict[str, float]:
        """loss, mse, l1, l0 over the rows since the last reset. Unlike `read` it changes nothing, so it may be called at any time."""
        sums = self.state["sums"] / self.state["rows"].clamp_min(1)
        return dict(zip(("loss", "mse", "l1", "l0"), sums.tolist(), strict=True))

    def read(self, reset: bool = False) -> dict:
        """loss, mse, l1, l0 (means over the rows since the last reset), fired (d_sae), mean_when_active,
        and last_loss, of the last step.
        Raises UserError, naming the step, where the loss was not a finite number, or a weight is none now."""
        state = self.state
        first_bad = int(state["first_bad"])
        if first_bad >= 0:
            raise sae_utils.UserError(
                f"the loss was not a finite number at step {first_bad}; training stopped before it changed anything: start another run with a lower lr."
            )
        if bad := [name for name, parameter in self.parameters.items() if not parameter.isfinite().all()]:
            raise sae_utils.UserError(f"step {self.steps - 1} or one shortly before it left {', '.join(bad)} with values that are no finite numbers: start another run with a lower lr.")
        result = self.means() | {"last_loss": float(self.last_loss), "fired": state["fired"].clone(), "mean_when_active": (state["strength"] / state["fired"].sum().clamp_min(1)).item()}
        self.any_dead = bool((state["silent"] >= self.dead_after).any())
        if self.rule.jumps:
            self.sae.threshold.fill_(float(self.threshold()))
        if reset:
            for name in ("sums", "rows", "fired", "strength"):
                state[name].zero_()
        return result

    def state_dict(self) -> dict:
        """Everything that the next steps depend on, on the CPU."""
        groups = {name: getattr(self, name) for name in ("parameters", "first", "second", "adam_steps", "state")}
        tensors = {name: {n: t.cpu() for n, t in group.items()} for name, group in groups.items()}
        return tensors | {"steps": self.steps, "active_share": self.active_share, "any_dead": self.any_dead}

    def load_state_dict(self, saved: dict) -> None:
        for group in ("parameters", "first", "second", "adam_steps"):
            for name, mine in getattr(self, group).items():
                mine.copy_(saved[group][name])
        for name, mine in self.state.items():
            mine.copy_(saved["state"][name])
        self.steps, self.active_share, self.any_dead = saved["steps"], saved["active_share"], saved["any_dead"]
        if self.rule.jumps:
            self.sae.threshold.fill_(float(self.threshold()))


class Progress:
    """Tells how far training is: in a log a line now and then, within an epoch that is longer than `seconds`, then at most once in as
    long and rarer up to a minute; in Jupyter one that renews itself.

    `begin` an epoch, then call it after each step, with how many of how many rows of the epoch are done. `variance`: of the rows as
    they are trained on, a dimension's mean, which mse is held against (fvu).
    """

    def __init__(self, trainer: Trainer, total_steps: int, variance: float, seconds: float = 10.0):
        self.trainer, self.total, self.variance, self.line = trainer, total_steps, variance, showing.Line(seconds)
        self.begin()

    def begin(self) -> None:
        self.line.begin()
        self.begun, self.first_step, self.first_row = time.monotonic(), self.trainer.steps, None

    def __call__(self, done: int, rows: int) -> None:
        if self.first_row is None:  # after the first step, which may be slow
            self.begun, self.first_step, self.first_row = time.monotonic(), self.trainer.steps, done
        if not self.line.due():
            return
        found, step = self.trainer.means(), self.trainer.steps
        took = max(1e-9, time.monotonic() - self.begun)
        left = showing.duration((self.total - step) * took / max(1, step - self.first_step))
        self.line.say(f"step {step:,} of {self.total:,} ({step / self.total:.0%}), {done / rows:.0%} of the epoch: fvu {found['mse'] / self.variance:.4f}, l0 {found['l0']:.1f}; {(done - self.first_row) / took:,.0f} rows/s, {left} left")


def open_writer(folder: Path, purge_step: int | None = None):
    """TensorBoard's writer, for which a disk that is full, or may not be written to, is one sentence as it is elsewhere.

    It writes in a thread of its own, which keeps its error for the next call and lets it be printed too: of a failed write
    that is said once, by the call.
    """
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread  # here: a step is also measured where there is no TensorBoard
    from torch.utils.tensorboard import SummaryWriter

    before = threading.excepthook

    def once(error):
        if not (isinstance(error.thread, _AsyncWriterThread) and isinstance(error.exc_value, OSError)):
            before(error)

    def told(call):
        def within(*args):
            with sae_utils.writing(folder):
                return call(*args)

        return within

    threading.excepthook = once  # first: it writes as it is opened
    writer = told(lambda: SummaryWriter(str(folder), purge_step=purge_step))()
    events = writer.file_writer.event_writer
    for name in ("add_event", "flush", "close"):
        setattr(events, name, told(getattr(events, name)))
    return writer


def save_checkpoint(path: Path, trainer: Trainer, rows: str, **more) -> None:
    """Writes what resuming needs, with its digest. `rows`: a digest of what is trained on; `more`: plain types and tensors."""
    saved = {"version": CHECKPOINT_VERSION, "rows": rows, "trainer": trainer.state_dict(), **more}
    with sae_utils.atomic(path) as temporary:
        with temporary.open("wb") as file:
            torch.save(saved | {"digest": sae_utils.digest(saved)}, file)
            file.flush()
            os.fsync(file.fileno())  # before the rename: the old checkpoint goes only when the new one is safe


def load_checkpoint(path: Path, trainer: Trainer, rows: str) -> dict:
    """Brings the trainer to where `save_checkpoint` left it; returns what was saved beside it. Raises UserError, and leaves
    the trainer alone, where it was made by other code or from other rows, or is damaged."""
    saved, name = sae_utils.read_torch(path), sae_utils.show_path(path)
    if saved.get("version") != CHECKPOINT_VERSION:
        raise sae_utils.UserError(f"{name} was written by another version of this code.")
    saved = sae_utils.check_digest(saved, path)
    if saved.get("rows") != rows:
        raise sae_utils.UserError(f"{name} was trained on other activations: the model, the text or the device has changed since.")
    if not alike(saved.get("trainer"), trainer.state_dict()):
        raise sae_utils.UserError(f"{name} is of another SAE than is trained here.")
    trainer.load_state_dict(saved["trainer"])
    return {key: value for key, value in saved.items() if key not in ("version", "rows", "trainer")}


def alike(one, other) -> bool:
    """Whether two nested dictionaries hold the same names, with tensors of the same shape and type, or values of the same type."""
    if isinstance(other, dict):
        return isinstance(one, dict) and one.keys() == other.keys() and all(alike(one[name], value) for name, value in other.items())
    kind = lambda value: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else type(value)
    return kind(one) == kind(other)


def resume(path: Path, trainer: Trainer, rows: str, start: dict) -> tuple[dict, str]:
    """(where to go on, a notice): what `save_checkpoint` saved beside the trainer, which is brought there; or `start`, where
    there is no checkpoint or it cannot be used. It only saves time, so the run then starts again, and the notice says why;
    what is not damaged but of something else is kept beside, as another command may go on from it."""
    if not path.exists():
        return start, ""
    try:
        place = load_checkpoint(path, trainer, rows)
        if place.keys() != start.keys():
            raise sae_utils.UserError(f"{sae_utils.show_path(path)} was written by another version of this code.")
        return place, ""
    except sae_utils.UserError as error:
        aside = ""
        if not isinstance(error, sae_utils.Damaged):
            other = path.with_suffix(".other.pth")
            path.replace(other)
            aside = f" (it is kept as {other.name})"
        return start, f"{str(error).removesuffix('.')}: training starts again from the beginning{aside}."


def check_end(trainer: Trainer, history: list[dict]) -> None:
    """UserError where training ended in numbers that are not finite: weights, or what the last epoch found with them. A bad
    step is known by the loss of the next one, which the last step does not have."""
    trainer.read()
    if bad := [name for name, value in history[-1].items() if not math.isfinite(value)] if history else []:
        raise sae_utils.UserError(f"after the last step, {trainer.steps}, {', '.join(bad)} are no finite numbers, so no SAE is saved: start another run with a lower lr.")


def step_bytes(sae: sae_utils.SAE, batch_size: int, auxk_weight: float = 0.0, kernel: bool = True) -> int:
    """Memory that training takes at most beyond the rows: weights, gradients and Adam's moments, and what a step
    holds for each of its batch_size * d_sae entries, as measured on a CPU (tests/test_training.py measures it again)."""
    if not (kernel and has_kernel(sae.rule)):
        each = 30 + 5 * (auxk_weight > 0)
    elif learns_thresholds(sae.rule):  # dense at first
        each = 26 + 11 * (auxk_weight > 0)
    elif sae.W_enc.device.type == "cpu" and 0 < sae.k < SPARSE_BELOW * sae.d_sae:
        each = 14 if sae.rule.jumps else 8
    else:
        each = 18 + 11 * (auxk_weight > 0)
    return 16 * sum(p.numel() for p in sae.parameters()) + batch_size * (each * sae.d_sae + 16 * len(sae.rule.ends(sae.d_sae)) * sae.d_in)


@torch.no_grad()
def settle(sae: sae_utils.SAE, activations: Tensor, index: Tensor, most: int = 32768, chunk: int = 1024) -> float | None:
    """Sets the threshold of an architecture that is used with one such that L0 is k on the rows `index` (at most `most`
    of them, evenly spread), and returns it. The running one of a short run lags behind."""
    if not sae.rule.jumps:
        return None
    rows = index[:: -(-len(index) // most)]
    wanted, largest = sae.k * len(rows), torch.zeros(0)
    for part in rows.split(chunk):
        pre_acts = sae.pre_acts(sae.normalise(activations[part].to(sae.W_enc.device))[0]).flatten()
        floor = largest.min() if len(largest) == wanted else 0.0
        largest = torch.cat([largest, pre_acts[pre_acts > floor].cpu()])
        largest = largest.topk(min(wanted, len(largest)), sorted=False).values
    smallest = largest.min() if len(largest) else torch.zeros(())
    sae.threshold.fill_(torch.nextafter(smallest, torch.zeros(())).item() if len(largest) == wanted else 0.0)
    return sae.threshold[0].item()


def probe(sae: sae_utils.SAE, x: Tensor, l1_coeff: float, auxk_weight: float, l0_weight: float = 0.0, steps: int = 3) -> tuple[float, float]:
    """Seconds of a step, tried on a copy: once few latents are active (one in 200), and as it is at the start."""
    seconds = []
    for late in (True, False):
        shape = {"architecture": sae.architecture, "k": sae.k, "apply_b_dec_to_input": sae.apply_b_dec_to_input}
        copy = sae_utils.SAE(sae.d_in, sae.d_sae, **shape).to(x.device)
        copy.load_state_dict(sae.state_dict())
        trainer = Trainer(copy, l1_coeff, auxk_weight, l0_weight=l0_weight)
        if late and trainer.kernel and not sae.k:
            pre_acts = (x[:64] @ copy.W_enc).flatten()
            trainer.b_enc.fill_(-pre_acts.topk(max(1, len(pre_acts) // 200)).values.min())
            trainer.active_share = 0.0
        warm = 5 if trainer.graphs else 1  # the first one is slow; on CUDA the fourth is recorded
        for step in range(warm + steps):
            if step == warm:
                trainer.read()
                begin = time.perf_counter()
            trainer.step(x, 0.0)
        trainer.read()
        seconds.append((time.perf_counter() - begin) / steps)
    return min(seconds), max(seconds)


# ---------------------------------------------------------------------------------------------
# The learning rate, and the order of the data
# ---------------------------------------------------------------------------------------------


def learning_rate(step: int, total_steps: int, lr: float, warmup_steps: int, lr_min_ratio: float, lr_decay_fraction: float) -> float:
    """Linear from 0 over `warmup_steps`, a cosine to `lr_min_ratio * lr`, reached at
    `lr_decay_fraction` of all steps, then held."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    decay_steps = max(1, round(total_steps * lr_decay_fraction) - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / decay_steps)
    return lr * (lr_min_ratio + (1 - lr_min_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """A uniform permutation of n rows that depends on the seed and the epoch only, so that a run which
    goes on in the middle of an epoch finds its place."""
    return torch.randperm(n, generator=torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63))


def shuffled_batches(activations: Tensor, index: Tensor, batch_size: int, device: str = "cpu", super_batch: int = 32768):
    """Yields activations[index] in batches, raw and in the storage dtype, on `device`.

    From a memory-mapped store rows are gathered many batches at a time, in the order in which they lie
    on disk, while the batches before are trained on. On a GPU the whole store is looked up there
    instead, where `activations` is there already.
    """
    if not len(index):
        return
    if activations.device.type != "cpu":
        yield from (activations[part] for part in index.to(activations.device).split(batch_size))
        return
    stored = activations.view(torch.int16) if activations.element_size() == 2 else activations  # numpy has no bfloat16
    stored, size = stored.numpy(), max(1, super_batch // batch_size) * batch_size

    def gather(part: Tensor) -> Tensor:
        wanted = part.numpy()
        order = np.argsort(wanted, kind="stable")
        block = np.empty((len(wanted), stored.shape[1]), stored.dtype)
        for start in range(0, len(order), 1024):  # numpy, since torch's threads are at work on the step
            here = order[start : start + 1024]
            block[here] = stored[wanted[here]]
        return torch.from_numpy(block).view(activations.dtype)

    with ThreadPoolExecutor(1) as pool:
        blocks = index.split(size)
        coming = pool.submit(gather, blocks[0])
        for number in range(len(blocks)):
            block = coming.result()
            if number + 1 < len(blocks):
                coming = pool.submit(gather, blocks[number + 1])
            yield from block.to(device).split(batch_size)


def on_device(activations: Tensor, device: str) -> Tensor:
    """The activations on the GPU where they fit beside what training needs (a fifth is left free), else as they are."""
    if not device.startswith("cuda"):
        return activations
    free, _ = torch.cuda.mem_get_info(device)
    return activations.to(device) if activations.numel() * activations.element_size() < 0.8 * free - 2**31 else activations


# ---------------------------------------------------------------------------------------------
# Doctor
# ---------------------------------------------------------------------------------------------


def doctor(metrics: dict, history: list[dict], architecture: str) -> list[str]:
    """What deserves a second look after training, one line each, with the parameter to change and in
    which direction. `metrics`: fvu, l0, dead on held-out rows and train_fvu; `history`: one entry for
    each epoch with held_out_loss."""
    by_penalty = sae_utils.ARCHITECTURES[architecture].knob == "l1_coeff"
    sparsity = ("l1_coeff", "lower", "raise") if by_penalty else ("k", "raise", "lower")
    name, less_sparse, more_sparse = sparsity
    lines = []
    if metrics["fvu"] is not None and metrics["fvu"] > 1:
        lines.append(f"the reconstruction is worse than the mean (fvu {metrics['fvu']:.2f}): {less_sparse} {name}.")
    if metrics["dead"] > 0.1:
        cure = "lower l1_coeff or lr" if by_penalty else "raise auxk_weight, or lower lr"
        lines.append(f"{metrics['dead']:.0%} of the latents are dead: {cure}, or lower expansion.")
    if metrics["l0"] < 5:
        lines.append(f"only {metrics['l0']:.1f} latents are active per token: {less_sparse} {name}.")
    if metrics["l0"] > 300:
        lines.append(f"{metrics['l0']:.0f} latents are active per token, too many to read: {more_sparse} {name}.")
    if metrics["fvu"] is not None and metrics["fvu"] > 1.2 * metrics["train_fvu"] + 0.01:
        lines.append(
            f"fvu is {metrics['fvu']:.3f} on held-out rows and {metrics['train_fvu']:.3f} on training rows: raise n_activations, or lower epochs or expansion."
        )
    curve = [entry["held_out_loss"] for entry in history]
    if len(curve) >= 5:
        tail, best = curve[-max(2, len(curve) // 5)], min(curve)
        if curve[-1] < 0.97 * tail:
            lines.append(f"the held-out loss still fell by {1 - curve[-1] / tail:.1%} in the last fifth of the run: raise epochs.")
        settled = next(i for i, value in enumerate(curve, 1) if value <= 1.005 * best)
        if settled < len(curve) / 3:
            lines.append(f"the held-out loss has not improved since epoch {settled} of {len(curve)}: lower epochs, or set early_stop_epochs.")
    return lines
