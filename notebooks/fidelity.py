"""Does the model still work on what the SAE makes of its activations? Beside baselines that know nothing.

Sums are kept for each document, so that a figure is a ratio of sums over documents and its interval
comes from drawing documents again (bootstrap): tokens of one document are much alike, so an interval
that took them for independent would be far too narrow.
"""

import hashlib
import re
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import editing
import sae_utils
import showing
import storing

ROW_SUMS = ("rows", "error", "distance", "cosine", "norm_ratio", "active")
TEXT_SUMS = ("ce", "rise", "kl", "top1_changed", "tokens")


# ---------------------------------------------------------------------------------------------
# What is put in the activation's place
# ---------------------------------------------------------------------------------------------


def through_sae(sae: sae_utils.SAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x_hat (…, d_in) in the model's units, active latents (…)) of raw activations."""
    x_unit, norm = sae.normalise(x)
    acts = sae.encode_unit(x_unit)
    return sae.denormalise(sae.decode_unit(acts), norm), (acts > 0).sum(-1)


def through_components(mean: Tensor, components: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `through_sae`, by ordinary PCA: x_hat = mean + (x - mean) C^T C in the model's own units, C (k, d_in)
    being the first k principal components of raw training rows, orthonormal, and `mean` (d_in) those rows' mean.
    No k fixed directions leave a smaller squared error of the rows they are taken from (Eckart and Young 1936)."""
    mean, components = mean.to(x.device), components.to(x.device)
    x_hat = mean + (x.float() - mean) @ components.T @ components
    return x_hat, torch.full(x.shape[:-1], len(components), device=x.device)


def nearest(centres: Tensor, x: Tensor) -> Tensor:
    """(…) the number of the centre, a row of `centres` (k, d_in), that lies nearest to each x (…, d_in).

    All is measured from the centres' own mean: in float32 a large common offset would drown the differences.
    """
    centres = centres.to(x.device)
    origin = centres.mean(0)
    centred = centres - origin
    return sae_utils.linear(x.float() - origin, centred, -centred.square().sum(1) / 2).argmax(-1)


def through_centres(centres: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """As `through_sae`, by vector quantisation: x_hat is the nearest of `centres` (k, d_in), so one of k is
    active, always fully. It has no strengths and makes no sums; what it reaches needs neither."""
    return centres.to(x.device)[nearest(centres, x)], torch.ones(x.shape[:-1], dtype=torch.long, device=x.device)


def membership(centres: Tensor, x: Tensor) -> Tensor:
    """(…, k) 1.0 at the nearest of `centres` (k, d_in), else 0.0: clusters in the form of acts."""
    own = nearest(centres, x)[..., None]
    return torch.zeros(*own.shape[:-1], len(centres), device=x.device).scatter_(-1, own, 1.0)


@torch.no_grad()
def kmeans(activations: Tensor, index: Tensor, k: int, seed: int, most: int = 200_000, iterations: int = 8, chunk: int = 4096, device: str = "cpu") -> Tensor:
    """(k, d_in) centres of the raw rows `index` by Lloyd's algorithm (1982), of at most `most` of them, evenly spread.

    Raw rows in every mode of the SAE: fvu is in the model's units, and this is what k-means makes small. The
    first centres are rows drawn like those of k-means++ (Arthur and Vassilvitskii 2007), each with a probability
    in proportion to its squared distance from the centres before it, from 8 k rows and in at most 256 rounds. A
    centre without rows is put where a row lies farthest from its own. Ends when the squared error falls by less
    than a two-hundredth, or after `iterations`: later rounds cost as much and change little. No more than `most` rows and (chunk, k) distances are held at once.
    Where the rows are fewer than k, so are the centres.
    """
    chosen = index[:: -(-len(index) // most)]
    k = min(k, len(chosen))
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([activations[part].to(device).float() for part in chosen.split(65536)])
    origin = x.mean(0)
    x -= origin
    some = x[torch.randperm(len(x), generator=generator)[: 8 * k].to(device)]
    centres, distance = some[:1], (some - some[0]).square().sum(1)
    while len(centres) < k:
        drawn = torch.multinomial(distance.cpu() + 1e-30, min(k - len(centres), -(-k // 256)), generator=generator)
        new = some[drawn.to(device)]
        centres = torch.cat([centres, new])
        distance = torch.minimum(distance, torch.cdist(some, new).square().amin(1))
        distance[drawn.to(device)] = 0
    before = torch.inf
    for _ in range(iterations):
        sums, counts, far = torch.zeros_like(centres), torch.zeros(k, device=device), []
        for part in x.split(chunk):
            own = nearest(centres, part)
            sums.index_add_(0, own, part)
            counts += torch.bincount(own, minlength=k)
            far.append((part - centres[own]).square().sum(1))
        far, empty = torch.cat(far), (counts == 0).nonzero().flatten()
        centres = sums / counts.clamp_min(1)[:, None]
        centres[empty] = x[far.topk(len(empty)).indices]
        error = far.double().sum().item()
        if before - error < 5e-3 * error and not len(empty):
            break
        before = error
    return centres + origin


@torch.no_grad()
def untrained(sae: sae_utils.SAE, mean: Tensor, activations: Tensor, index: Tensor, l0: float, seed: int, most: int = 4096) -> sae_utils.SAE:
    """An SAE of the same shape with random directions, about `mean` (d_in), whose threshold leaves as many latents active
    and whose decoder is scaled to fit the rows `index` (at most `most` of them) best."""
    fresh = sae_utils.SAE(sae.d_in, sae.d_sae, seed=seed, architecture="batchtopk", norm_scale=sae.norm_scale).requires_grad_(False)
    fresh.mean.copy_(mean)
    fresh.to(sae.W_enc.device)
    x_unit, _ = fresh.normalise(activations[index[:: -(-len(index) // most)]].to(sae.W_enc.device))
    pre_acts = x_unit @ fresh.W_enc
    kept = min(max(1, round(l0 * len(x_unit))), pre_acts.numel() - 1)
    fresh.threshold.fill_(pre_acts.flatten().kthvalue(pre_acts.numel() - kept).values.item()).clamp_(min=0)
    x_unit_hat = fresh.decode_unit(fresh.encode_unit(x_unit))
    fresh.W_dec *= (x_unit * x_unit_hat).sum() / x_unit_hat.square().sum().clamp_min(1e-12)
    return fresh


# ---------------------------------------------------------------------------------------------
# Which text watches the training, which judges its result
# ---------------------------------------------------------------------------------------------


def watch_and_judge(held_out: Tensor, document, share: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor, bool]:
    """(watched, judging, apart): the held-out windows, or rows, in two, as masks like `held_out` (n,), boolean.

    `document` (n,) is the document of each. A seeded draw of about `share` of the held-out documents, at least
    one and never all, is watched while training goes on and may end it; the figures come from the others, which
    had no say. `seed` is not that of the run, since runs of several seeds are compared on the same text. Where one
    document is all there is, it does both, and `apart` is False: that is to be told.
    """
    document = torch.as_tensor(document)
    documents = document[held_out].unique()
    if len(documents) < 2:
        return held_out.clone(), held_out.clone(), False
    n = min(len(documents) - 1, max(1, round(share * len(documents))))
    drawn = documents[torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))[:n]]
    watched = held_out & torch.isin(document, drawn)
    return watched, held_out & ~watched, True


def drawn(windows: Tensor, seed: int = 0) -> Tensor:
    """The numbers of the marked windows (n,), boolean, in a seeded random order: however many are taken from its
    beginning, they come from all documents alike. As in `watch_and_judge`, `seed` is not the run's."""
    found = windows.nonzero().flatten()
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))]


# ---------------------------------------------------------------------------------------------
# Sums over rows, sums over text
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def score_rows(sae: sae_utils.SAE, activations: Tensor, index: Tensor, chunk: int = 4096) -> dict:
    """Figures of the SAE on the rows `index`, whatever the chunk size.

    fvu: sum of squared error over sum of squared distance from these rows' mean, in the model's
    units; mse, l1, l0: means over rows as in `training.losses`; dead: fraction of latents silent on all
    rows. Per latent, (d_sae): density, max_act, mean_act (mean over the rows where it fires).
    """
    zeros = partial(torch.zeros, dtype=torch.float64)  # on the CPU: Apple's GPUs have no float64
    error, squares, shift, mse = zeros(()), zeros(()), zeros(sae.d_in), zeros(())
    fired, total, max_act = zeros(sae.d_sae), zeros(sae.d_sae), torch.zeros(sae.d_sae)
    for part in index.split(chunk):
        x = activations[part].to(sae.W_enc.device).float()
        x_unit, norm = sae.normalise(x)
        acts = sae.encode_unit(x_unit)
        x_unit_hat = sae.decode_unit(acts)
        error += (sae.denormalise(x_unit_hat, norm) - x).cpu().double().square().sum()
        centred = (x - sae.mean).cpu().double()  # near the rows' mean, so that the difference below is exact
        squares += centred.square().sum()
        shift += centred.sum(0)
        mse += (x_unit_hat - x_unit).cpu().double().square().sum()
        fired += (acts > 0).sum(0).cpu()
        total += acts.sum(0).cpu().double()
        max_act = torch.maximum(max_act, acts.amax(0).cpu())
    l1 = total.sum()
    n = len(index)
    variance = squares - shift.square().sum() / n
    return {
        "rows": n,
        "fvu": (error / variance).item() if variance > 0 else None,
        "mse": (mse / (n * sae.d_in)).item(),
        "l1": (l1 / n).item(),
        "l0": (fired.sum() / n).item(),
        "dead": (fired == 0).double().mean().item(),
        "density": (fired / n).float(),
        "max_act": max_act,
        "mean_act": (total / fired.clamp_min(1)).float(),
    }


@torch.no_grad()
def row_sums(through, activations: Tensor, index: Tensor, document: Tensor, chunk: int = 4096, device: str = "cpu", mean: Tensor | None = None) -> Tensor:
    """(documents, 6) float64, the columns ROW_SUMS, over the rows `index`; `document` (N,) of every row.

    error: ‖x - x_hat‖²; distance: ‖x - m‖², m being these rows' mean; cosine of, and ratio of the norms
    of, x_hat - mean and x - mean. Both are taken from the training mean `mean`: a large common offset
    would make any reconstruction look right.
    """
    total, origin = torch.zeros(activations.shape[1], dtype=torch.float64), torch.zeros(()) if mean is None else mean.cpu()
    for part in index.split(65536):
        total += (activations[part].float() - origin).double().sum(0)
    own_mean = total / len(index)  # of x - origin, which is near it, so that nothing is lost below
    documents, place = document[index].unique(return_inverse=True)
    sums = torch.zeros(len(documents), len(ROW_SUMS), dtype=torch.float64)
    for part, at in zip(index.split(chunk), place.split(chunk), strict=True):
        x = activations[part].to(device).float()
        x_hat, active = through(x)
        centred, centred_hat = ((v - origin.to(device)).cpu().double() for v in (x, x_hat))
        norm, norm_hat = centred.norm(dim=1), centred_hat.norm(dim=1)
        values = [
            torch.ones(len(part)), (x - x_hat).cpu().double().square().sum(1), (centred - own_mean).square().sum(1),
            (centred * centred_hat).sum(1) / (norm * norm_hat).clamp_min(1e-30), norm_hat / norm.clamp_min(1e-30), active.cpu(),
        ]  # fmt: skip
        sums.index_add_(0, at, torch.stack([v.double() for v in values], 1))
    return sums


@torch.inference_mode()
def post_norm_name(model, hook_name: str) -> str:
    """The module of the layer that takes what the hooked one returned and changes it before it is added to the
    residual stream: the norm after the MLP of Gemma 2 and 3, OLMo 2, GLM-4, …; "" where there is none.

    It is found by what it does, in a pass of two tokens through the layers up to the hook's: the hooked
    module's output is followed, as the object that it is, through modules that return it as they got it
    (dropout, the MLP around the hook), to one that stands in the layer itself and makes another of the same shape.
    """
    layer = re.match(r"(.*?\.\d+)(\.|$)", hook_name)
    if layer is None or layer[1] == hook_name:
        return ""
    followed, found = [], []

    def after(module, args, kwargs, output, name):
        out = sae_utils.first_output(output)
        if name == hook_name:
            followed[:] = [out]
        elif followed and name == layer[1]:
            raise sae_utils.Reached
        elif followed and name.rpartition(".")[0] == layer[1] and next(iter((*args, *kwargs.values())), None) is followed[0]:
            if out is not followed[0] and out.shape == followed[0].shape:
                found.append(name)
                raise sae_utils.Reached

    inside = [(name, module) for name, module in model.named_modules() if name == layer[1] or name.startswith(layer[1] + ".")]
    handles = [module.register_forward_hook(partial(after, name=name), with_kwargs=True) for name, module in inside]
    try:
        model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
    except sae_utils.Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


@torch.no_grad()
def mean_after(model, module_name: str, activations: Tensor, index: Tensor, most: int = 65536, chunk: int = 4096) -> Tensor:
    """Mean output (d,) of the norm that follows the hook (`post_norm_name`) over the rows `index`, at most
    `most` of them, evenly spread. Rows are what the norm is given, so that the model itself need not run."""
    norm, total, chosen = model.get_submodule(module_name), 0.0, index[:: -(-len(index) // most)]
    for part in chosen.split(chunk):
        total = total + norm(activations[part].to(model.device, model.dtype)).cpu().double().sum(0)
    return (total / len(chosen)).float()


def arms(hook_name: str, mean: Tensor, after: tuple[str, Tensor] | None = None, **through) -> dict:
    """What is done to the model, by name: (module, edit of its output), or None for the model as it is.

    clean; each of `through` (x -> (x_hat, active)) in the activation's place; zero; mean (d_in); and, where a norm
    follows the hook inside the layer, mean_post_norm: of `after` (that norm's name, its mean output), the mean.
    """

    def replaced(function, x):
        return function(x)[0].to(x.dtype)

    constant = lambda value: lambda x: value.to(x).expand_as(x)
    done = {"clean": None} | {name: (hook_name, partial(replaced, function)) for name, function in through.items()}
    done |= {"zero": (hook_name, torch.zeros_like), "mean": (hook_name, constant(mean))}
    return done | ({"mean_post_norm": (after[0], constant(after[1]))} if after else {})


def digest(sae: sae_utils.SAE) -> str:
    """A digest of everything that the SAE computes with."""
    total = hashlib.sha256(repr((sae.architecture, sae.k, sae.norm_scale, sae.apply_b_dec_to_input)).encode())
    for tensor in (sae.mean, *sae.state_dict().values()):
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


class Below:
    """The layers below the hook's, run once for several passes over the same input.

    `first` is the pass that keeps what the last of them returns; in `again` all of them return that. Models whose
    later layers take more from earlier ones than what the last one returns give something else then: `agrees` tells.
    """

    def __init__(self, model, hook_name: str):
        found = re.match(r"(.*?)\.(\d+)(\.|$)", hook_name)
        stack = model.get_submodule(found[1]) if found else None
        self.model, self.layers = model, list(stack[: int(found[2])]) if isinstance(stack, torch.nn.ModuleList) else []

    def kept(self):
        """A copy of what is kept, since layers that follow may change it in place (Falcon's do)."""
        out = self.out
        return out.clone() if torch.is_tensor(out) else tuple(x.clone() if torch.is_tensor(x) else x for x in out)

    @contextmanager
    def first(self):
        def keep(module, args, output):
            self.out = output
            self.out = self.kept()

        with self.layers[-1].register_forward_hook(keep) if self.layers else nullcontext():
            yield

    @contextmanager
    def again(self):
        own = [layer.__dict__.get("forward") for layer in self.layers]  # where another package has put one of its own
        for layer in self.layers:
            layer.forward = lambda *args, **kwargs: self.kept()
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def agrees(self, ids: Tensor, mask: Tensor) -> bool:
        """Whether a pass with the layers below left out ends where a whole one does; else they are never left out."""
        call = lambda: self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        with self.first():
            whole = call()
        try:
            with self.again():
                same = torch.equal(call(), whole)
        except Exception:  # of whatever kind: a later layer misses what an earlier one leaves for it (Gemma 3n's keys and values)
            same = False
        if not same:
            self.layers = []
        return same


def enough(sums: Tensor, document, names: list[str], least: int = 32) -> bool:
    """Whether the SAE's increase of cross-entropy is known well enough to say something: half of the 95 % interval is
    at most a third of the increase, or a two-hundredth of what zero ablation costs (0.002 nats at most). `sums` (windows, arms, 5) as
    `text_sums` gives them; at least `least` windows, and two documents, are wanted.

    The interval is that of a ratio of sums over documents (delta method). It depends on nothing but the text, so
    that two equal runs end after the same window.
    """
    if len(sums) < least:
        return False
    by = by_document(sums[:, [names.index("sae"), names.index("zero")]], document)
    (rise, gap), (total, _) = by[..., TEXT_SUMS.index("rise")].T, by[..., -1].T
    mean, gap = rise.sum() / total.sum(), gap.sum() / by[:, 1, -1].sum()
    half = 1.96 * (rise - mean * total).square().sum().sqrt() / total.sum()
    return len(by) > 1 and bool(half <= max(mean.abs() / 3, min(gap / 200, 0.002)))


def compared(logits: Tensor, clean: Tensor, p: Tensor, said: Tensor, held: int = 2**19) -> Tensor:
    """(n, 5), the columns TEXT_SUMS, of logits (n, d_vocab) beside the `clean` ones, whose softmax is `p`, where the
    tokens `said` (n,) come next. On a CPU few tokens at a time, about `held` logits, with memory that is used again:
    what does not stay in a core's cache between one operation and the next takes several times as long."""
    size, values = max(1, held // logits.shape[1] if logits.device.type == "cpu" else len(logits)), []
    difference = torch.empty_like(logits[:size])
    for own, other, share, token in zip(*(t.split(size) for t in (logits, clean, p, said)), strict=True):
        norm, clean_norm = own.logsumexp(-1), other.logsumexp(-1)
        ce, clean_ce = (total - x.gather(1, token[:, None])[:, 0] for total, x in ((norm, own), (clean_norm, other)))
        # the difference first: both are large, it is not
        kl = torch.linalg.vecdot(share, torch.sub(other, own, out=difference[: len(own)])) + norm - clean_norm
        values.append(torch.stack([ce, ce - clean_ce, kl, (own.argmax(-1) != other.argmax(-1)).float(), torch.ones_like(ce)], 1))
    return torch.cat(values)


@torch.inference_mode()
def text_sums(
    model, tokenizer, arms: dict, windows: list[list[int]], document=None, keep: Path | None = None, key: str = "", minutes: float = 2.0, baselines_every: int = 1
) -> Tensor:
    """Sums (windows, arms, 5) float64, the columns TEXT_SUMS; the first arm is `clean`.

    ce: next-token cross-entropy in nats; rise: over the clean one, on the same tokens; kl: KL(clean ‖ arm);
    top1_changed: tokens whose most probable next token is another one; tokens: how many were predicted. BOS and
    special positions keep their activation in every arm. Arms other than clean and sae are measured in one of
    `baselines_every` batches of windows, and have no tokens in the others: they matter less, and are further off.
    Layers below the hook run once for all arms (`Below`), the head where a token is predicted (`editing.logits_at`).
    With `document` (windows,), each one's, it ends where `enough` does, and the result is as long as it got.
    With `keep`, what is done so far is written there every few minutes, and gone on with if `key` and
    the windows are the same.
    """
    sums = torch.zeros(len(windows), len(arms), len(TEXT_SUMS), dtype=torch.float64)
    key = hashlib.sha256(repr((key, list(arms), baselines_every, windows)).encode()).hexdigest()
    done, number, due, line = 0, 0, showing.Every(60 * minutes), showing.Line()
    if keep and keep.exists():
        try:
            before = storing.load_arrays(keep)
        except sae_utils.UserError as error:  # it only saves time
            before = print(f"{error} What is measured starts again from the beginning.") or {}
        if str(before.get("key")) == key:
            done, number, sums = int(before["done"]), int(before["number"]), torch.from_numpy(before["sums"])
            print(f"going on after {done:,} of {len(windows):,} windows")
    ends = lambda: document is not None and enough(sums[:done], document[:done], list(arms))
    below = Below(model, next((arm[0] for arm in arms.values() if arm), ""))
    if below.layers and not below.agrees(*sae_utils.pad(windows[:1], device=model.device)):
        print("layers of this model share more than the residual stream: all of them run for every arm")
    ended = ends()
    for batch in editing.batches(windows[done:], model):
        if ended:
            break
        ids, mask = sae_utils.pad(batch, device=model.device)
        predicted = torch.zeros_like(mask, dtype=torch.bool)
        predicted[:, :-1] = mask[:, 1:].bool()
        said, owner = ids[:, 1:][predicted[:, :-1]], predicted.nonzero()[:, 0]

        def logits_of(arm, ids=ids, mask=mask, predicted=predicted):
            """(predicted tokens, d_vocab), float32."""
            with editing.edit_output(model, *arm, tokenizer) if arm else nullcontext(), below.again() if arm else below.first():
                return editing.logits_at(model, ids, mask, predicted)[0].float()

        clean = logits_of(None)
        p = clean.softmax(-1)
        for a, (name, arm) in enumerate(arms.items()):
            if name not in ("clean", "sae") and number % baselines_every:
                continue
            values = compared(logits_of(arm) if arm else clean, clean, p, said)
            sums[done : done + len(batch), a].index_add_(0, owner.cpu(), values.cpu().double())
        done, number = done + len(batch), number + 1
        ended = ends()
        if keep and (due() or ended or done == len(windows)):
            storing.save_arrays(keep, {"key": key, "done": done, "number": number, "sums": sums})
        if line.due():
            line.say(f"{done:,} of at most {len(windows):,} windows")
    return sums[:done]


# ---------------------------------------------------------------------------------------------
# Figures and their intervals
# ---------------------------------------------------------------------------------------------


def recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """(ablated - spliced) / (ablated - clean); None where the layer matters less than 0.01 nats."""
    return None if ablated - clean < 0.01 else (ablated - spliced) / (ablated - clean)


def by_document(values: Tensor, document) -> Tensor:
    """Sums of `values` (windows, …) over the windows of each document."""
    documents, place = torch.as_tensor(document).unique(return_inverse=True)
    return torch.zeros(len(documents), *values.shape[1:], dtype=values.dtype).index_add_(0, place, values)


def redrawn(sums: Tensor, n: int, seed: int) -> Tensor:
    """(1 + n, …): the totals of `sums` (documents, …), then those of n draws of as many documents, with replacement."""
    documents = len(sums)
    counts = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=n)
    weights = torch.cat([torch.ones(1, documents, dtype=torch.float64), torch.from_numpy(counts).double()])
    return (weights @ sums.reshape(documents, -1)).reshape(1 + n, *sums.shape[1:])


def table(names: list[str], text: Tensor, rows: dict[str, Tensor], n: int = 1000, seed: int = 0) -> dict[str, dict]:
    """{arm: {figure: (value, low, high)}}, low and high bounding 95 % of the bootstrap over documents.

    `text` (documents, arms, 5) as `text_sums` gives them, summed over each document's windows; `rows` {arm:
    `row_sums`}. ce_increase (over clean), kl and top1_changed are means over the tokens that the arm was measured
    on; ce is that of clean, over all tokens, and the increase; ce_recovered and ce_recovered_mean as `recovered`,
    against zero and against the mean (after the norm, where one follows); fvu, cosine, norm_ratio, l0 from the
    rows. None: it says nothing.
    """
    drawn = redrawn(text, n, seed)
    ce, rise, kl, changed = (drawn[..., :-1] / drawn[..., -1:]).unbind(-1)  # each (1 + n, arms)
    rises, result = dict(zip(names, rise.unbind(1), strict=True)), {}
    for a, name in enumerate(names):
        figures = {"ce": ce[:, names.index("clean")] + rises[name]}
        if name != "clean":
            figures |= {"ce_increase": rises[name], "kl": kl[:, a], "top1_changed": changed[:, a]}
        if name in rows:
            for figure, anchor in (("ce_recovered", "zero"), ("ce_recovered_mean", "mean_post_norm" if "mean_post_norm" in names else "mean")):
                gap = rises[anchor]
                figures[figure] = None if gap[0] < 0.01 else (gap - rises[name]) / gap.clamp_min(1e-9)
            count, error, distance, cosine, norm_ratio, active = redrawn(rows[name], n, seed).unbind(1)
            figures |= {
                "fvu": error / distance if distance[0] > 0 else None, "cosine": cosine / count, "norm_ratio": norm_ratio / count, "l0": active / count,
            }  # fmt: skip
        result[name] = {
            figure: None if values is None else tuple([values[0].item(), *values[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()])
            for figure, values in figures.items()  # not a number: none of the documents drawn was measured in this arm
        }
    return result


# What a person reads: the arms in words, and the figures with their names and formats.
ARMS = {
    "clean": "untouched", "sae": "this\nSAE", "kmeans": "k-means,\none active", "pca": "PCA,\nsame L0", "untrained": "untrained,\nsame L0",
    "mean_post_norm": "mean after\nthe norm", "mean": "mean", "zero": "zero",
}  # fmt: skip
FIGURES = {
    "ce": ("CE (nats)", "{:.3f}"), "ce_increase": ("increase of CE", "{:+.4f}"), "kl": ("KL (nats)", "{:.4f}"),
    "top1_changed": ("top-1 changed", "{:.1%}"), "ce_recovered": ("CE recovered, zero", "{:.4f}"), "ce_recovered_mean": ("CE recovered, mean", "{:.4f}"),
    "fvu": ("FVU", "{:.4f}"), "cosine": ("cosine", "{:.3f}"), "norm_ratio": ("norm ratio", "{:.3f}"), "l0": ("L0", "{:.1f}"),
}  # fmt: skip


def cells(figures: dict[str, dict]) -> list[list[str]]:
    """Lines of a table of `table`'s figures, the first its headings: arms beside each other; in each cell
    the value and, on a second line, its interval."""

    def cell(arm: str, figure: str) -> str:
        if figure not in figures[arm]:
            return ""
        if figures[arm][figure] is None:
            return "says nothing"
        pattern = FIGURES[figure][1]
        first = figures[arm][figure][0]
        if figure in ("ce_increase", "kl", "fvu") and abs(first) >= 0.01 or figure.startswith("ce_recovered") and first < 0.99:
            pattern = pattern.replace(".4f", ".3f")  # a fourth digit says little there, and eight arms have to stand beside each other
        value, low, high = (pattern.format(v) for v in figures[arm][figure])
        return f"{value}\n{low.rstrip('%')} to {high}".replace("\n+", "\n").replace("to +", "to ")

    names = [arm for arm in ARMS if arm in figures]
    return [["", *(ARMS[arm] for arm in names)], *([name, *(cell(arm, figure) for arm in names)] for figure, (name, _) in FIGURES.items())]


def flat(figures: dict[str, dict]) -> dict:
    """The SAE's figures under the names of metrics.json, without intervals."""
    value = lambda arm, figure: figures[arm][figure][0] if figures[arm][figure] else None
    names = {"clean": "ce_clean", "sae": "ce_spliced", "zero": "ce_zero", "mean": "ce_mean", "mean_post_norm": "ce_mean_post_norm"}
    ces = {name: value(arm, "ce") for arm, name in names.items() if arm in figures}
    return ces | {figure: value("sae", figure) for figure in ("kl", "top1_changed", "ce_recovered", "ce_recovered_mean", "cosine", "norm_ratio")}
