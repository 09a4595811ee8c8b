"""What each recipe reaches on held-out rows of one model and text, and on known directions.

    python tests/quality.py MODEL TEXT [--layer 2] [--steps 6000]      recipes, on real activations
    python tests/quality.py MODEL TEXT --grid                          how many activations, which L1 weight
    python tests/quality.py world --steps 4746                         hidden variables of the embedded world
    python tests/quality.py known                                      recipes, on directions that are known
    python tests/quality.py rows STORE [--steps 2195] [--only batchtopk]   recipes of params/, on stored rows (runs/activations/<key>)
    python tests/quality.py front STORE --lm MODEL [--steps 880]           fronts of four architectures, two seeds, and what the model loses by each
    python tests/quality.py saelens STORE --lr 5e-4,1e-3,2e-3 [--steps 2195] [--short 600,840]   batchtopk k 32 in SAELens beside ours, in turns

Tables go to the terminal, rows to runs/quality-<what>.json.
"""

import argparse
import itertools
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import numpy as np
import torch
from bench import table

import experiment
import fidelity
import harvest
import known
import sae_utils
import storing
import training


def train(rows: torch.Tensor, index: torch.Tensor, expansion: int, steps: int, **recipe) -> sae_utils.SAE:
    """`steps` steps of batch 512 over shuffled epochs of rows[index], as the notebook's loop does, with its names and defaults
    but for `l1_weight` (l1_coeff * d_in) and `normalize`."""
    for sae in in_turns(rows, index, expansion, steps, steps, **recipe):
        pass
    return sae


def in_turns(rows: torch.Tensor, index: torch.Tensor, expansion: int, steps: int, every: int, **recipe):
    """`train`, which pauses after each `every` steps and yields the SAE; it is finished where nothing more comes."""
    recipe = {"architecture": "relu", "k": 0, "lr": 3e-3, "l1_weight": 0.147, "auxk_weight": 0.0, "normalize": "scale", "apply_b_dec_to_input": False, "seed": 0} | recipe
    schedule = [recipe.get(name, default) for name, default in (("warmup_steps", 500), ("lr_min_ratio", 0.5), ("lr_decay_fraction", 0.8))]
    mean, norms = harvest.activation_stats(rows, index)
    scale = norms[index].double().mean().item() if recipe["normalize"] == "scale" else 0.0
    settings = {name: recipe[name] for name in ("seed", "architecture", "k", "apply_b_dec_to_input")}
    sae = sae_utils.SAE(rows.shape[1], expansion * rows.shape[1], norm_scale=scale, **settings)
    sae.mean.copy_(mean)
    some = rows[index[torch.randperm(len(index), generator=torch.Generator().manual_seed(recipe["seed"]))[:4096]]]
    sae.fit_scale(sae.normalise(some)[0])
    more = {name: recipe[name] for name in ("dead_after", "l0_weight") if name in recipe}
    trainer = training.Trainer(sae, recipe["l1_weight"] / sae.d_in, recipe["auxk_weight"], k_falls=steps // 10, **more)
    epoch = itertools.count(1)
    batches = itertools.chain.from_iterable(
        training.shuffled_batches(rows, index[training.epoch_order(len(index), recipe["seed"], e)], 512) for e in epoch
    )
    for step, batch in enumerate(itertools.islice(batches, steps), 1):
        trainer.step(trainer.normalise(batch), training.learning_rate(step - 1, steps, recipe["lr"], *schedule))
        if step % 100 == 0:
            trainer.read(reset=True)
        if step == steps:
            trainer.read()
            training.settle(sae, rows, index)
        if step % every == 0 or step == steps:
            yield sae


FALLING = {"warmup_steps": 50, "lr_min_ratio": 0.0, "lr_decay_fraction": 1.0, "dead_after": 20_000}  # as in params/

RECIPES = {f"relu, L1 weight {w}": {"l1_weight": w} for w in (0.06, 0.147, 0.35)}
RECIPES |= {f"{name}, unit": recipe | {"normalize": "unit"} for name, recipe in RECIPES.items()}
for architecture in ("topk", "batchtopk", "matryoshka"):
    for k in (8, 16, 24):
        RECIPES[f"{architecture} k {k}"] = FALLING | {"architecture": architecture, "k": k, "auxk_weight": 0.03, "lr": 6e-3}
    RECIPES[f"{architecture} k 16, unit"] = RECIPES[f"{architecture} k 16"] | {"normalize": "unit"}
RECIPES |= {f"jumprelu, target {k}": FALLING | {"architecture": "jumprelu", "k": k, "l0_weight": 0.03, "auxk_weight": 0.03, "lr": 6e-3} for k in (8, 16, 24)}
RECIPES |= {f"gated, L1 weight {w}": {"architecture": "gated", "l1_weight": w} for w in (0.147, 0.3, 0.6)}
GRID = {
    f"relu, L1 weight {w}, {n:,} activations": {"l1_weight": w, "n_activations": n, "normalize": "unit"}
    for w in (0.06, 0.147, 0.35)
    for n in (100_000, 200_000, 400_000, 700_000)
}

ON_ROWS = {f"relu, L1 weight {w}": FALLING | {"l1_weight": w} for w in (0.06, 0.147, 0.35)}
for architecture in ("batchtopk", "topk", "matryoshka"):
    for k in (16, 32, 64):
        ON_ROWS[f"{architecture} k {k}"] = FALLING | {"architecture": architecture, "k": k, "auxk_weight": 0.03, "lr": 2e-3}
        if k == 64:  # as low at 16 half of the latents may die (tests/README.md)
            ON_ROWS[f"{architecture} k {k}"]["dead_after"] = 10_000
ON_ROWS |= {f"jumprelu, target {k}": FALLING | {"architecture": "jumprelu", "k": k, "l0_weight": 0.03, "auxk_weight": 0.03, "lr": 2e-3} for k in (16, 32, 64)}
# The reference as it stands (3e-4 * 640), and weaker penalties.
ON_ROWS |= {f"reference, L1 weight {w}": {"normalize": "unit", "l1_weight": w} for w in (0.192, 0.1, 0.05)}


def on_rows(options, recipes: dict) -> list[dict]:
    rows = harvest.open_rows(Path(options.text).resolve())
    index, other = (mask[rows.window].nonzero().flatten() for mask in harvest.split_windows(rows.window_document, 0.1))
    results = []
    for name, recipe in recipes.items():
        begin = time.perf_counter()
        sae = train(rows.activations, index, 8, options.steps, **recipe)
        seconds = time.perf_counter() - begin
        scores = fidelity.score_rows(sae, rows.activations, other)
        results.append({"recipe": name, **{figure: scores[figure] for figure in ("fvu", "l0", "dead")}, "train_fvu": fidelity.score_rows(sae, rows.activations, index[::20])["fvu"], "seconds": seconds})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
    return results


def saelens_in_turns(rows: torch.Tensor, index: torch.Tensor, mean: torch.Tensor, scale: float, steps: int, every: int, lr: float):
    """SAELens's BatchTopK, k 32, its own training loop fed (rows - mean) / scale, in turns: yields its trainer after each. Warm-up
    over a quarter of the steps and at most 500, the rate falling over the last fifth to a tenth, the rest as its defaults have it."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(0)
    d_in = rows.shape[1]
    sae = sae_lens.BatchTopKTrainingSAE(sae_lens.BatchTopKTrainingSAEConfig(k=32, d_in=d_in, d_sae=8 * d_in, apply_b_dec_to_input=True))
    batches = itertools.chain.from_iterable(
        training.shuffled_batches(rows, index[training.epoch_order(len(index), 0, e)], 512) for e in itertools.count(1)
    )
    config = SAETrainerConfig(total_training_samples=512 * steps, train_batch_size_samples=512, lr=lr, lr_end=lr / 10, lr_warm_up_steps=min(500, steps // 4), lr_decay_steps=steps // 5)
    trainer = SAETrainer(config, sae, ((batch.float() - mean) / scale for batch in batches))
    for done in [*range(every, steps, every), steps]:
        config.total_training_samples = 512 * done  # fit() goes on to here
        trainer.fit()
        yield trainer


def saelens_scores(trainer, rows: torch.Tensor, other: torch.Tensor, mean: torch.Tensor, scale: float) -> dict:
    """fvu, l0 and dead on the rows `other` of what SAELens saves for use, read by SAELens."""
    import sae_lens

    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        sae = sae_lens.SAE.load_from_disk(folder)
    fired = torch.zeros(sae.cfg.d_sae)

    @torch.no_grad()
    def through(x):
        acts = sae.encode((x - mean) / scale)
        fired.add_((acts > 0).sum(0))
        return sae.decode(acts) * scale + mean, (acts > 0).sum(1)

    sums = dict(zip(fidelity.ROW_SUMS, fidelity.row_sums(through, rows, other, torch.zeros(len(rows), dtype=torch.long), mean=mean).sum(0).tolist(), strict=True))
    return {"fvu": sums["error"] / sums["distance"], "l0": fired.sum().item() / len(other), "dead": (fired == 0).double().mean().item()}


def beside_saelens(options) -> list[dict]:
    """SAELens at each of the rates, ours at as many steps and at the `short` ones, a quarter of an epoch each in turn, so that all
    are trained on the same machine under the same load: seconds, and what each reaches on held-out rows."""
    rows = harvest.open_rows(Path(options.text).resolve())
    index, other = (mask[rows.window].nonzero().flatten() for mask in harvest.split_windows(rows.window_document, 0.1))
    mean, norms = harvest.activation_stats(rows.activations, index)
    scale = norms[index].double().mean().item() / math.sqrt(rows.activations.shape[1])  # as SAELens scales, to the root of the width
    every, recipe = len(index) // 512 // 4, ON_ROWS["batchtopk k 32"]
    ways = {f"SAELens, lr {lr}": saelens_in_turns(rows.activations, index, mean, scale, options.steps, every, float(lr)) for lr in options.lr.split(",")}
    lengths = [options.steps, *(int(steps) for steps in options.short.split(",") if steps)]
    ways |= {f"ours, {steps} steps": in_turns(rows.activations, index, 8, steps, every, **recipe) for steps in lengths}
    seconds, trained = dict.fromkeys(ways, 0.0), {}
    while ways:
        for name, way in list(ways.items()):
            begin = time.perf_counter()
            now = next(way, None)
            if now is None:
                del ways[name]
            else:
                seconds[name] += time.perf_counter() - begin
                trained[name] = now
    results = []
    for name, of in trained.items():
        scores = fidelity.score_rows(of, rows.activations, other) if name.startswith("ours") else saelens_scores(of, rows.activations, other, mean, scale)
        results.append({"recipe": name, **{figure: scores[figure] for figure in ("fvu", "l0", "dead")}, "seconds": seconds[name]})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
    return results


# Four sparsities of four architectures, at 2,560 latents; the rates by the rule in tests/README.md, relu's as it did best there.
FRONT = {f"relu, L1 weight {w}": FALLING | {"l1_weight": w} for w in (0.08, 0.11, 0.15, 0.21)}
for k in (8, 16, 32, 64):
    for architecture in ("batchtopk", "matryoshka", "jumprelu"):
        FRONT[f"{architecture}{', target' if architecture == 'jumprelu' else ' k'} {k}"] = FALLING | {"architecture": architecture, "k": k, "auxk_weight": 0.03, "lr": 2.8e-3, "l0_weight": 0.03}


def front(options, recipes: dict) -> list[dict]:
    """Each recipe with two seeds, then the cross-entropies of all of them on the same windows, and the picture of it."""
    rows = harvest.open_rows(Path(options.text).resolve())
    in_train, held_out = harvest.split_windows(rows.window_document, 0.1)
    index, other = in_train[rows.window].nonzero().flatten(), held_out[rows.window].nonzero().flatten()
    saes, results, hook = {}, [], rows.manifest["key"]["hook"]
    for (name, recipe), seed in itertools.product(recipes.items(), (0, 1)):
        begin = time.perf_counter()
        saes[name, seed] = sae = train(rows.activations, index, 4, options.steps, seed=seed, **recipe)
        seconds, scores = time.perf_counter() - begin, fidelity.score_rows(sae, rows.activations, other)
        results.append({"recipe": name, "seed": seed, **{figure: scores[figure] for figure in ("fvu", "l0", "dead")}, "seconds": seconds})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
    mean, (_, _, components) = rows.activations[index].double().mean(0).float(), harvest.spectrum(rows.activations, index)
    through = {f"{name}, seed {seed}": partial(fidelity.through_sae, sae) for (name, seed), sae in saes.items()}
    through |= {f"PCA {n}": partial(fidelity.through_components, mean, components[:n]) for n in (8, 16, 32, 64)}
    through |= {"k-means": partial(fidelity.through_centres, fidelity.kmeans(rows.activations, index, saes[name, seed].d_sae, 0))}
    model, tokenizer = sae_utils.load_model(options.lm)
    windows = [rows.windows[w] for w in fidelity.drawn(held_out, 0)[: options.windows].tolist()]
    sums = fidelity.text_sums(model, tokenizer, fidelity.arms(hook, mean, **through), windows).sum(0)
    rise = dict(zip(fidelity.arms(hook, mean, **through), (sums[:, 1] / sums[:, -1]).tolist(), strict=True))
    of_rows = lambda arm: fidelity.row_sums(through[arm], rows.activations, other, rows.window_document[rows.window], mean=mean).sum(0)
    for arm in [arm for arm in through if arm.startswith(("PCA", "k-means"))]:
        results.append({"recipe": arm, "seed": 0, "fvu": (lambda sums: float(sums[1] / sums[2]))(of_rows(arm)), "l0": float(arm.removeprefix("PCA ")) if "PCA" in arm else 1.0, "dead": 0.0, "seconds": 0.0})
    return [result | {"ce_increase": rise[result["recipe"] if result["recipe"] in rise else f"{result['recipe']}, seed {result['seed']}"]} for result in results]


def picture(path: Path, results: list[dict]) -> None:
    """L0 against fvu and against the rise of cross-entropy: a line for each architecture, through the means of its settings, bars from seed to seed."""
    import matplotlib.pyplot as plt  # not in the environment that `saelens` runs in

    fig, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    of = {}
    for result in results:
        of.setdefault(result["recipe"].split()[0].rstrip(","), {}).setdefault(result["recipe"], []).append(result)
    for ax, figure, label in zip(panels, ("fvu", "ce_increase"), ("fvu, held out", "rise of cross-entropy (nats)"), strict=True):
        for architecture, settings in of.items():
            of_seeds = lambda name, settings=settings: np.array([[min(v), np.mean(v), max(v)] for v in ([r[name] for r in seeds] for seeds in settings.values())]).T
            (x0, x, x1), (y0, y, y1) = of_seeds("l0"), of_seeds(figure)
            order, style = x.argsort(), {"color": "0.6"} if architecture in ("PCA", "k-means") else {}
            ax.errorbar(x[order], y[order], xerr=[(x - x0)[order], (x1 - x)[order]], yerr=[(y - y0)[order], (y1 - y)[order]], fmt="o-", ms=3, capsize=2, lw=1, label=architecture, **style)
        ax.set(xscale="log", xlabel="L0 (latents active per token)", ylabel=label, ylim=(0, None))
    panels[0].legend(fontsize="small")
    fig.savefig(path, dpi=90)


def on_text(options, recipes: dict) -> list[dict]:
    params = {"model_name": options.model, "dataset_name": options.text, "layer": options.layer, "n_activations": 700_000, "activation_dtype": "float32"}
    params = experiment.check_params("sae_training", params)
    hook = sae_utils.find_hook(options.model, options.layer)
    model, tokenizer = sae_utils.load_model(options.model)
    loaded = harvest.as_loaded(params, model, tokenizer, harvest.open_text(params))
    rows = harvest.get_rows(model, tokenizer, hook, loaded, ROOT / "runs" / "activations")
    in_train, held_out = harvest.split_windows(rows.window_document, 0.1)
    index, other = in_train[rows.window].nonzero().flatten(), held_out[rows.window].nonzero().flatten()
    texts = [rows.windows[w] for w in held_out.nonzero().flatten()[:512].tolist()]
    mean = rows.activations[index].double().mean(0).float()
    results = []
    for name, recipe in recipes.items():
        begin = time.perf_counter()
        recipe = dict(recipe)
        first = index[: int(0.9 * recipe.pop("n_activations", 10**9))]
        sae = train(rows.activations, first, 8, options.steps, **recipe)
        seconds = time.perf_counter() - begin
        scores = fidelity.score_rows(sae, rows.activations, other)
        arms = fidelity.arms(hook, mean, sae=partial(fidelity.through_sae, sae))
        sums = fidelity.text_sums(model, tokenizer, arms, texts).sum(0)
        ce = (sums[:, 0] / sums[:, -1]).tolist()
        clean, spliced, zero = ce[:3]
        results.append({"recipe": name, "fvu": scores["fvu"], "l0": scores["l0"], "dead": scores["dead"], "ce_recovered": fidelity.recovered(clean, spliced, zero), "seconds": seconds})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
    return results


def known_directions(n: int, d_in: int = 128, n_true: int = 512, active: int = 24, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(rows (n, d_in), directions (n_true, d_in), coefficients (n, n_true)): sparse non-negative
    combinations of random unit vectors, plus a mean and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(n_true, d_in, generator=generator), dim=1)
    mean = torch.randn(d_in, generator=generator)
    on = torch.rand(n, n_true, generator=generator).argsort(1)[:, :active]
    coefficients = torch.zeros(n, n_true).scatter_(1, on, 0.5 + torch.rand(n, active, generator=generator))
    noise = 0.02 * torch.randn(n, d_in, generator=generator)
    return coefficients @ directions + noise + mean, directions, coefficients


def recovery(sae: sae_utils.SAE, directions: torch.Tensor, rows: torch.Tensor, coefficients: torch.Tensor) -> dict:
    """Mean over true directions of the largest cosine with a decoder row, and the mean F1 of that latent
    (active) as a detector of the direction (present), on `rows`."""
    cosine = directions @ sae.W_dec.T
    best = cosine.max(1)
    on, fired = coefficients > 0, sae.encode(rows)[:, best.indices] > 0
    both = (on & fired).sum(0).double()
    f1 = 2 * both / (on.sum(0) + fired.sum(0)).clamp_min(1)
    return {"max_cosine": best.values.mean().item(), "f1": f1.mean().item()}


def on_known(options, recipes: dict) -> list[dict]:
    rows, directions, coefficients = known_directions(200_000)
    test_rows, _, test_coefficients = known_directions(220_000)
    test_rows, test_coefficients = test_rows[200_000:], test_coefficients[200_000:]
    del coefficients
    results = []
    untrained = sae_utils.SAE(128, 1024)
    untrained.mean.copy_(rows.mean(0))
    for name, recipe in {"untrained": None, **recipes}.items():
        sae = untrained.requires_grad_(False) if recipe is None else train(rows, torch.arange(len(rows)), 8, options.steps, **recipe)
        scores = fidelity.score_rows(sae, test_rows, torch.arange(len(test_rows)))
        results.append({"recipe": name, **recovery(sae, directions, test_rows, test_coefficients), "fvu": scores["fvu"], "l0": scores["l0"], "dead": scores["dead"]})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
    return results


def on_world(options, recipes: dict) -> list[dict]:
    """Hidden variables of the embedded world matched with F1 of at least 0.9 and 0.8 on held-out rows, for
    three seeds of each recipe, an untrained SAE and principal components."""
    world = ROOT / "runs" / "tiny-world"
    params = {"model_name": "runs/tiny-model", "dataset_name": str(world / "corpus.jsonl"), "layer": 1, "n_activations": 900_000, "activation_dtype": "float32"}
    params, (model, tokenizer) = experiment.check_params("sae_training", params), sae_utils.load_model("runs/tiny-model")
    loaded = harvest.as_loaded(params, model, tokenizer, harvest.open_text(params))
    rows = harvest.get_rows(model, tokenizer, "model.layers.1.mlp.down_proj", loaded, ROOT / "runs" / "activations")
    in_train, held_out = (mask[rows.window].nonzero().flatten() for mask in harvest.split_windows(rows.window_document, 0.1))
    facts, truth = known.read(world, rows, held_out)
    hidden, x, results = known.hidden(facts, truth, rows.token_ids[held_out]), rows.activations[held_out].float(), []

    def judged(name, scores, **more):
        f1 = known.best_f1(scores, truth)["f1"][hidden]
        results.append({"recipe": name, "hidden": len(f1), "F1 0.9": int((f1 >= 0.9).sum()), "F1 0.8": int((f1 >= 0.8).sum()), "mean": f1.mean().item(), **more})
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)

    nothing = {"fvu": float("nan"), "l0": float("nan"), "dead": float("nan")}
    fresh = sae_utils.SAE(x.shape[1], 8 * x.shape[1], seed=99).requires_grad_(False)
    fresh.mean.copy_(rows.activations[in_train].double().mean(0))
    projected = (x - fresh.mean) @ harvest.spectrum(rows.activations, in_train)[2].T
    judged("untrained", fresh.encode(x), **nothing)
    judged("k-means", fidelity.membership(fidelity.kmeans(rows.activations, in_train, 8 * x.shape[1], 0), x), **nothing)
    judged("principal components", torch.cat([projected, -projected], 1), **nothing)
    for name, recipe in recipes.items():
        for seed in range(3):
            sae = train(rows.activations, in_train, 8, options.steps, seed=seed, normalize="unit", **recipe)
            scores = fidelity.score_rows(sae, rows.activations, held_out)
            judged(f"{name}, seed {seed}", sae.encode(x), **{figure: scores[figure] for figure in nothing})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model's folder or id, `known`, `world`, `rows`, `front` or `saelens`")
    parser.add_argument("text", nargs="?", help="a text, or the folder of a store")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--steps", type=int, help="2,195 on stored rows, which is five epochs of 225,000, 880 for `front`, else 6,000")
    parser.add_argument("--lm", default="", help="the model of the store, for `front`")
    parser.add_argument("--windows", type=int, default=24, help="held-out windows for the cross-entropies of `front`")
    parser.add_argument("--lr", default="5e-4,1e-3,2e-3", help="rates of SAELens, for `saelens`")
    parser.add_argument("--short", default="", help="other numbers of steps of ours, for `saelens`")
    parser.add_argument("--grid", action="store_true")
    parser.add_argument("--only", default="", help="recipes whose names hold one of these, parted by semicolons")
    options = parser.parse_args()
    options.steps = options.steps or {"rows": 2195, "saelens": 2195, "front": 880}.get(options.model, 6000)

    def wanted(recipes: dict) -> dict:
        parts = options.only.split(";")
        if lost := [part for part in parts if not any(part in name for name in recipes)]:
            parser.error(f"no recipe's name holds {lost[0]!r} (parts are parted by semicolons); there are: {'; '.join(recipes)}")
        return {name: recipe for name, recipe in recipes.items() if any(part in name for part in parts)}

    torch.set_flush_denormal(True)
    if options.model == "known":
        recipes = {f"relu, L1 weight {w}": {"l1_weight": w} for w in (0.15, 0.3, 0.6)}
        recipes |= {f"{a} k 24": {"architecture": a, "k": 24, "auxk_weight": 1 / 32} for a in ("topk", "batchtopk", "matryoshka")}
        results = on_known(options, recipes)
    elif options.model == "rows":
        results = on_rows(options, wanted(ON_ROWS))
    elif options.model == "front":
        results = front(options, wanted(FRONT))
    elif options.model == "saelens":
        results = beside_saelens(options)
    elif options.model == "world":
        recipes = {f"relu, L1 weight {w}": {"l1_weight": w} for w in (0.147, 0.35)}
        recipes |= {f"{a} k {k}": {"architecture": a, "k": k, "auxk_weight": 0.03, "l0_weight": 0.03} for a, k in (("batchtopk", 4), ("batchtopk", 7), ("matryoshka", 7), ("jumprelu", 7))}
        recipes |= {"gated, L1 weight 0.3": {"architecture": "gated", "l1_weight": 0.3}}
        results = on_world(options, wanted(recipes))
    else:
        results = on_text(options, wanted(GRID if options.grid else RECIPES))
    table(options.model, results)
    what = Path(options.text if options.model in ("rows", "front", "saelens") else options.model).name
    if options.model == "front":
        picture(ROOT / "runs" / f"quality-{what}-front.png", results)
    storing.write_json(ROOT / "runs" / f"quality-{what}{'-grid' * options.grid}{f'-{options.model}' * (options.model in ('front', 'saelens'))}.json", results)


if __name__ == "__main__":
    main()
