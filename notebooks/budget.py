"""What each stage of a run will take, in time and memory, from short trials of its own work before anything slow."""

import io
import os
import time

import psutil
import torch
from matplotlib.figure import Figure

import editing
import sae_utils
import showing
import training

PLACES = 20 * 17  # shown of each latent, and the tokens around each, whose activations are worked out one by one
WINDOWS = 52  # after about so many the cross-entropies of a middling layer are known well enough: 40 to 64 in three runs
FIGURES = 850  # as many small figures are drawn in the time that pages, report, TensorBoard and start take, as measured on three models


def seconds(work) -> float:
    """Of one call, after one that warms up."""
    work()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def draw() -> None:
    """A small figure into memory, as a trial of what pages cost."""
    figure = Figure()
    figure.subplots().plot(range(100))
    figure.savefig(io.BytesIO())


def free_memory(device: str) -> int:
    """Bytes that are free on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else psutil.virtual_memory().available


def refuse_what_does_not_fit(d_in: int, d_sae: int, batch_size: int, device: str) -> None:
    """UserError where an SAE cannot be trained for want of memory: weights, gradients and Adam's moments alone, with one
    batch's latents, take more than is free. Before any of it is asked for; batch_size 0: it is only looked at."""
    needed, free = (16 if batch_size else 4) * 2 * d_in * d_sae + 4 * batch_size * d_sae, free_memory(device)
    if needed > free:
        raise sae_utils.UserError(
            f"{d_sae:,} latents of {d_in:,} dimensions{f', {batch_size:,} rows a step,' * (batch_size > 0)} take at least {showing.in_bytes(needed)} of memory, "
            f"and {showing.in_bytes(free)} are free on {device}: lower expansion{' or batch_size' * (batch_size > 0)}."
        )


@torch.no_grad()
def stages(model, hook_name: str, sae: sae_utils.SAE, params: dict, stored: bool) -> list[dict]:
    """[{stage, seconds, at_most, bytes}] of a run of sae_training.ipynb in order, `sae` being one of its shape.

    `seconds` is what to expect, `at_most` the bound where a stage may end before it: training by early_stop_epochs
    does not count, the cross-entropies' windows do. `bytes`: memory beyond the model's own. The trials are a
    pass of the model to the hook and a whole one, training steps on a copy, one chunk of rows encoded.
    """
    device, n, length = model.device, params["n_activations"], params["seq_len"]
    d_in, d_sae, vocab = sae.d_in, sae.d_sae, model.config.get_text_config().vocab_size
    held_out = params["held_out_fraction"] * n
    generator = torch.Generator().manual_seed(0)
    batch = max(1, (2048 if device.type == "cpu" else 16384) // length)
    ids = torch.randint(vocab, (batch, length), generator=generator).to(device)
    x = torch.randn(max(4096, params["batch_size"]), d_in, generator=generator).to(device)
    sae.fit_scale(sae.normalise(x)[0])

    to_hook = seconds(lambda: sae_utils.run_to_hook(model, hook_name, ids, None)) / ids.numel()
    whole = seconds(lambda: model(input_ids=ids[:1], use_cache=False).logits.logsumexp(-1)) / length
    step, first_step = training.probe(sae, sae.normalise(x[: params["batch_size"]])[0], params["l1_coeff"], params["auxk_weight"], params["l0_weight"])
    encode = seconds(lambda: sae.encode(x)) / len(x)
    near = seconds(lambda: sae_utils.linear(x, sae.W_dec).argmax(-1)) / len(x)
    part = torch.randn(min(vocab, 16384), d_in, generator=generator).to(device)  # of the head
    head = seconds(lambda: [(sign * sae_utils.linear(sae.W_dec[:256], part)).topk(10, dim=1) for sign in (1, -1)]) / min(256, d_sae) * vocab / len(part)
    figure = seconds(draw)
    few = seconds(lambda: sae.encode(x[:1024], torch.arange(min(64, d_sae), device=device))) / 1024

    steps = params["epochs"] * -(-int(n - held_out) // params["batch_size"])
    after = max(whole - to_hook, 0.0)  # of a token: the layers above the hook, and the head
    arms = 2 + 6 / 4  # untouched and the SAE; the six others on a quarter of the windows
    window = length * (to_hook + arms * 0.85 * after)  # several windows at a time are a little quicker than the one of the trial
    lloyd = min(n - held_out, 200_000)
    rows_bytes = 2 if params["activation_dtype"] != "float32" else 4
    logits = 4 * vocab * length * editing.batch_size(length, vocab)
    return [
        {"stage": "activations", "seconds": 0.0 if stored else n * to_hook * length / (length - 1), "bytes": n * d_in * rows_bytes},
        {"stage": "training", "seconds": steps * step + min(steps, 200) * (first_step - step), "bytes": training.step_bytes(sae, params["batch_size"], params["auxk_weight"])},
        {"stage": "scores and baselines", "seconds": 6 * held_out * 2 * encode + 10 * lloyd * near, "bytes": 4 * lloyd * d_in},
        {"stage": "cross-entropies", "seconds": min(WINDOWS, params["eval_windows"]) * window, "at_most": params["eval_windows"] * window, "bytes": 3 * logits},
        {"stage": "contexts", "seconds": 1.4 * (n * encode + 0.5 * d_sae * PLACES * few), "bytes": d_sae * 320 * 16 + 160_000_000},
        {"stage": "effects", "seconds": d_sae * head + 20 * 2 * 16 * 0.8 * length * 2 * to_hook, "bytes": 4 * vocab * (d_in + 256)},
        {"stage": "pages, start and rest", "seconds": FIGURES * figure + d_sae * 5e4 * figure / 1e6, "bytes": d_sae * 4000},
    ]  # fmt: skip


def card(stages: list[dict], threads: int) -> str:
    """A line for each of `stages`, and their sum; and what the trials ran beside, since on busy cores they are slower."""
    long = lambda stage: showing.duration(stage["seconds"]) if stage["seconds"] else "stored"
    lines = [
        f"{stage['stage']:>20}: {long(stage):>12}   {showing.in_bytes(stage['bytes']):>8}" + (f"   at most {showing.duration(stage['at_most'])}" if "at_most" in stage else "")
        for stage in stages
    ]
    lines.append(f"{'in all':>20}: {showing.duration(sum(stage['seconds'] for stage in stages)):>12}")
    busy = os.getloadavg()[0]
    lines.append(f"tried just now with {threads} thread{'s' * (threads > 1)} on {os.cpu_count()} cores, on which {busy:.1f} programs ran in the last minute")
    return "\n".join(lines)
