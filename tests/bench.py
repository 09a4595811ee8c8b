"""Benchmarks: `make bench` runs all parts, `make bench PART=harvest` one of them.

Each part compares ways of doing the same work in one run, interleaved, and reports medians; what
counts are the ratios. Tables go to the terminal, rows to runs/bench.json.
"""

import argparse
import contextlib
import ctypes
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "notebooks")]

import numpy as np
import tokenizers
import torch
import transformers

import choosing
import editing
import features
import fidelity
import harvest
import sae_utils
import storing
import training


def interleaved(ways: dict, rounds: int) -> dict[str, float]:
    """Median seconds of each way; all are run in turn, once to warm up and then `rounds` times."""
    times = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            begin = time.perf_counter()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in times.items()}


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {torch.get_num_threads()} threads"


def table(title: str, rows: list[dict]) -> None:
    print(f"\n{title}")
    columns = [name for name in rows[0] if name not in ("part", "machine")]
    cells = [[f"{row[name]:,.3g}" if isinstance(row[name], float) else str(row[name]) for name in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for line in (columns, *cells):
        print("  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths, strict=True))), flush=True)


# ---------------------------------------------------------------------------------------------
# harvest: rows kept per second
# ---------------------------------------------------------------------------------------------


def gemma_shape(vocab: int, hidden: int, layers: int, heads: int, intermediate: int, dtype: torch.dtype, device: str):
    """A Gemma 3 text model with random weights."""
    config = transformers.Gemma3TextConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, sliding_window=512, max_position_embeddings=2048,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Gemma3ForCausalLM._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def random_windows(n: int, full: bool) -> list[list[int]]:
    """Token ids of windows of at most 128: lengths as WikiText's lines have them (mean about 48), or all full."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.full((n,), 128) if full else torch.empty(n).exponential_(1 / 51, generator=generator).clamp(4, 128).long()
    return [[2, *torch.randint(10, 30_000, (length - 1,), generator=generator).tolist()] for length in lengths.tolist()]


def textbook_harvest(model, hook: str, windows: list[list[int]], device: str) -> int:
    """Pad to 128, full forward with the head, forward hook, boolean mask."""
    rows = []
    for start in range(0, len(windows), 32):
        batch = windows[start : start + 32]
        ids = torch.tensor([window + [0] * (128 - len(window)) for window in batch], device=device)
        mask = torch.tensor([[1] * len(window) + [0] * (128 - len(window)) for window in batch], device=device)
        caught = []
        handle = model.get_submodule(hook).register_forward_hook(lambda module, args, out, caught=caught: caught.append(out))
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)
        handle.remove()
        mask[:, 0] = 0  # no row at BOS
        rows.append(caught[0][mask.bool()].cpu())
    return sum(map(len, rows))


def our_harvest(model, hooks: list[str], windows: list[list[int]], storage: str, folder: Path) -> list[Path]:
    """`harvest.harvest`, from windows that are cut already onto the disk; the stores' folders."""
    flat = np.concatenate([np.asarray(window, np.int32) for window in windows])
    lengths = np.asarray([len(window) for window in windows])
    starts = np.concatenate([[0], lengths.cumsum()])
    owner = np.repeat(np.arange(len(windows)), lengths)
    kept = np.setdiff1d(np.arange(len(flat)), starts[:-1])  # all but BOS
    tokens = {"flat": flat, "starts": starts, "window_document": np.arange(len(windows)), "first_equal": np.arange(len(windows)), "token_ids": flat[kept]}
    tokens |= {"window": owner[kept].astype(np.int32), "position": (np.arange(len(flat)) - starts[owner])[kept].astype(np.int32)}
    counts = {"rows": len(kept), "windows": len(windows), "documents": len(windows), "tokens": len(flat)}
    names = ("model_name", "model_revision", "dataset_name", "dataset_revision", "dataset_config", "dataset_split")
    keys = [{"hook": hook, "activation_dtype": storage} for hook in hooks]
    stores = [harvest.Partial(key["hook"], folder / harvest.digest_of(key)[:16], key, model.device.type) for key in keys]
    harvest.harvest(model, None, stores, tokens, counts, dict.fromkeys(names, "") | {"non_finite": "refuse"})
    return [store.folder for store in stores]


def timed_harvest(*arguments) -> None:
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder:
        our_harvest(*arguments, Path(folder))


def bench_harvest(rounds: int, quick: bool) -> list[dict]:
    """Rows kept per second, ours against the textbook way, on the same windows."""
    rows = []
    device = sae_utils.pick_device()
    n = 64 if quick else 768
    cases = [("lengths of mean 48, 32k words", 32_768, False), ("all windows full, 32k words", 32_768, True), ("lengths of mean 48, 262k words", 262_144, False)]
    for case, vocab, full in cases[:1] if quick else cases:
        model, ours_model = (gemma_shape(vocab, 640, 12, 4, 2048, torch.float32, device) for _ in "ab")
        sae_utils.with_linear(ours_model)
        windows, hook = random_windows(n // 4 if full else n, full), "model.layers.6.mlp.down_proj"
        some = sorted(windows, key=len)[4::8]  # the slow way need not do them all: rates are compared, at the same mean length
        found = {}
        ways = {
            "textbook": lambda: found.update(textbook=textbook_harvest(model, hook, some, device)),  # noqa: B023
            "ours": lambda: timed_harvest(ours_model, [hook], windows, "float32"),  # noqa: B023
        }
        seconds = interleaved(ways, rounds)
        kept = sum(len(window) - 1 for window in windows)
        ours, other = kept / seconds["ours"], found["textbook"] / seconds["textbook"]
        rows.append({"part": "harvest", "case": case, "ours": ours, "other": other, "ratio": ours / other, "machine": machine()})
    table("rows kept per second, layer 6 of 12 (other: pad to 128, full forward with head, boolean mask)", rows)
    if torch.cuda.is_available():
        rows += rehearse_harvest(rounds)
    return rows


def rehearse_harvest(rounds: int) -> list[dict]:
    """The full-size job's shape on a GPU: Gemma 3 1B with random weights, layers 6 and 20, bf16, against
    what its matrix products alone would take."""
    model = gemma_shape(262_144, 1152, 26, 4, 6912, torch.bfloat16, "cuda")
    windows, rows = random_windows(4096, True), []
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    peak = 2 * 8192**3 / interleaved({"product": lambda: [a @ a for _ in range(20)]}, rounds)["product"] * 20
    for layers in ([6], [20], [6, 20]):
        hooks = [f"model.layers.{layer}.mlp.down_proj" for layer in layers]
        seconds = interleaved({"ours": lambda: timed_harvest(model, hooks, windows, "bfloat16")}, rounds)["ours"]  # noqa: B023
        weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "head" not in name)
        kept, tokens = 4096 * 127, 4096 * 128
        alone = peak / (2 * weights * (max(layers) + 1) / 26) * kept / tokens
        case = f"Gemma 3 1B shape, layers {layers}"
        rows.append({"part": "harvest", "case": case, "ours": kept / seconds, "other": alone, "ratio": kept / seconds / alone, "machine": machine()})
    table("rows kept per second in bf16 (other: matrix products alone)", rows)
    return rows


# ---------------------------------------------------------------------------------------------
# memory: the store and its shuffled reader at full size
# ---------------------------------------------------------------------------------------------


def anonymous_memory() -> float:
    """RssAnon of this process in GB: memory that is not pages of a mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e6


class Measured:
    """Peak anonymous memory above the start, and the time, of pieces of work: a row for each."""

    def __init__(self, part: str, limit: float):
        self.part, self.limit, self.rows, self.peak, self.running = part, limit, [], 0.0, True

    def __enter__(self):
        with contextlib.suppress(OSError, AttributeError):  # what was freed before is not to be filled unseen
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.base = anonymous_memory()
        threading.Thread(target=self.watch).start()
        return self

    def __exit__(self, *error):
        self.running = False

    def watch(self):
        while self.running:
            self.peak = max(self.peak, anonymous_memory())
            time.sleep(0.005)

    def during(self, case: str, work):
        self.peak, begin = 0.0, time.perf_counter()
        result = work()
        used = max(self.peak, anonymous_memory()) - self.base
        row = {"part": self.part, "case": case, "ours": used, "other": self.limit, "ratio": used / self.limit}
        self.rows.append(row | {"seconds": time.perf_counter() - begin, "machine": machine()})
        return result


class Stub(torch.nn.Module):
    """A model of one embedding and one linear layer, which stands for a transformer where the store is measured and not the model."""

    device = torch.device("cpu")

    def __init__(self, d_in: int):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(32_768, 64), torch.nn.Linear(64, d_in)

    def forward(self, input_ids, attention_mask, use_cache):
        return self.out(self.embed(input_ids))


def rows_in_stages(n: int) -> list[dict]:
    """Peak anonymous memory of every stage of a run that goes over the rows, on `n` rows of width 64, in the order of
    sae_training.ipynb and with what its cells keep: text to windows, harvest, statistics, an epoch of training, scores
    and yardsticks, contexts and shares; and what patch_neurons.ipynb makes of all rows. Stories of 150 words."""
    words = [f"w{i}" for i in range(2000)]
    vocabulary = {word: i for i, word in enumerate(["<bos>", "<unk>", *words])}
    model_of_words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model_of_words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model_of_words, bos_token="<bos>", unk_token="<unk>")
    draw = np.random.default_rng(0)
    stories = (" ".join(words[i] for i in (2000 ** draw.random(150)).astype(int)) for _ in itertools.count())
    model, names = Stub(64).requires_grad_(False), ("model_name", "model_revision", "dataset_name", "dataset_revision", "dataset_config", "dataset_split")
    shape = {"architecture": "batchtopk", "k": 16}
    list(itertools.islice(stories, 10)), tokenizer(["w1 w2"])
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, Measured("memory", 2.0) as memory:
        during = lambda case, work: memory.during(f"{n:,} rows: {case}", work)
        tokens, counts = during("text to windows", lambda: harvest.cut_windows(tokenizer, stories, 128, n))
        key = {"hook": "out", "activation_dtype": "bfloat16"}
        store = harvest.Partial("out", Path(folder) / harvest.digest_of(key)[:16], key, "cpu")
        during("harvest", lambda: harvest.harvest(model, None, [store], tokens, counts, dict.fromkeys(names, "") | {"non_finite": "refuse"}))
        del tokens
        rows = during("opened, checksums compared", lambda: harvest.open_rows(store.folder))
        kept = {}

        def statistics():
            train_windows, held_out_windows = harvest.split_windows(rows.window_document, 0.1)
            _, judging, _ = fidelity.watch_and_judge(held_out_windows, rows.window_document)
            kept.update(train=(train_windows[rows.window] & rows.finite).nonzero().flatten(), held_out=(judging[rows.window] & rows.finite).nonzero().flatten())
            kept["mean"], norms = harvest.activation_stats(rows.activations, kept["train"])
            kept.update(norms=norms, usable=rows.finite & (norms >= 1e-8), components=harvest.spectrum(rows.activations, kept["train"])[2])
            kept["far"] = torch.where(kept["usable"], norms, 0).topk(10).indices
            kept["card"] = [float(np.quantile(norms[kept["usable"]].double(), q)) for q in (0.01, 0.1, 0.5, 0.9, 0.99, 1.0)]

        during("split, mean and norms, data card", statistics)
        sae = sae_utils.SAE(64, 512, **shape)
        sae.mean.copy_(kept["mean"])
        trainer = training.Trainer(sae)

        def epoch():
            order = kept["train"][training.epoch_order(len(kept["train"]), 0, 1)]
            for batch in training.shuffled_batches(rows.activations, order, 512):
                trainer.step(trainer.normalise(batch), 1e-3)

        during("an epoch of training", epoch)
        training.settle(sae, rows.activations, kept["train"])
        document = rows.window_document[rows.window]

        def scores():
            found = fidelity.score_rows(sae, rows.activations, kept["held_out"])
            sae.density.copy_(found["density"]), sae.max_act.copy_(found["max_act"])
            kept["centres"] = fidelity.kmeans(rows.activations, kept["train"], 512, 0)
            fidelity.row_sums(lambda x: fidelity.through_sae(sae, x), rows.activations, kept["held_out"], document, mean=kept["mean"])

        during("scores and yardsticks", scores)
        everything = torch.cat([kept["train"], kept["held_out"]]).sort().values
        found = during("contexts", lambda: features.contexts(sae, rows.activations, everything, document))
        during("what stands around them", lambda: features.shown_contexts(sae, rows, found))
        during("shares", lambda: features.shares(found, rows, lambda i: tokenizer.convert_ids_to_tokens(i), sae.max_act))
        during("what follows each row (patching)", lambda: choosing.followers(rows))
    return memory.rows


def bench_memory(rounds: int, quick: bool) -> list[dict]:
    """Peak anonymous memory of the stages over 200k, 800k and 3M rows of width 64, each in a process of its own
    (`rows_in_stages`), and while 3M rows of 1152 are written, verified and read shuffled."""
    found = []
    for n in (20_000, 50_000) if quick else (200_000, 800_000, 3_000_000):
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            found.append(alone.apply(rows_in_stages, (n,)))
        table("GB of anonymous memory above the start (other: the limit)", found[-1])
    more = [(b["ours"] - a["ours"]) / (int(b["case"].split()[0].replace(",", "")) - int(a["case"].split()[0].replace(",", ""))) for a, b in zip(*found[-2:], strict=True)]
    print("bytes a row, from the last two: " + ", ".join(f"{row['case'].partition(': ')[2]} {1e9 * each:,.0f}" for row, each in zip(found[-1], more, strict=True)))
    return [row for rows in found for row in rows] + bench_wide_store(quick)


def bench_wide_store(quick: bool) -> list[dict]:
    """Peak anonymous memory while 3M rows of 1152 are written, verified and read shuffled.

    A model of one embedding and one linear layer stands for the transformer: what is measured is
    the store, not the model.
    """
    n, d_in = (100_000 if quick else 3_000_000), 1152
    windows = random_windows(1000, True) * (-(-n // 127_000))
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, Measured("memory", 2.0) as memory:
        model = Stub(d_in).requires_grad_(False)
        (store,) = memory.during(f"harvest of {n:,} rows", lambda: our_harvest(model, ["out"], windows, "bfloat16", Path(folder)))
        opened = memory.during("opened, checksums compared", lambda: harvest.open_rows(store))

        def epoch():
            order = torch.randperm(len(opened))
            total = torch.zeros(d_in)
            for index in order.split(512):
                total += opened.activations[index].float().sum(0)
            return total

        memory.during("one shuffled epoch in batches of 512", epoch)
    table("GB of anonymous memory above the start (other: the limit)", memory.rows)
    print(f"peak resident size, mapped pages included: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB")
    return memory.rows


# ---------------------------------------------------------------------------------------------
# features: contexts of all latents, and the page, at full size
# ---------------------------------------------------------------------------------------------


def bench_features(rounds: int, quick: bool) -> list[dict]:
    """Seconds and memory for the contexts of 9,216 latents over 1M rows of 1152 at an L0 of 50, the shares
    of what they fire on, and the page of them all; tokens as frequent as words are (Zipf), 65,536 of them.

    The page stays at runs/bench-features/features.html, for `make test-browser RUN=bench-features`.
    """
    n, d_in, d_sae, vocab = (60_000, 128, 1024, 4096) if quick else (1_000_000, 1152, 9216, 65_536)
    words = [f" {''.join(letters)}" for letters in itertools.islice(itertools.product("eariotnslc", repeat=5), vocab)]
    generator = torch.Generator().manual_seed(0)
    n_windows = -(-n // 127)
    flat = (vocab ** torch.rand(n_windows * 128, generator=generator)).long().clamp_max(vocab - 1).int().numpy()
    place = np.arange(n_windows * 128)
    kept = (place % 128 > 0).nonzero()[0][:n]
    with tempfile.TemporaryDirectory(dir=ROOT / "runs") as folder, Measured("features", 4.0) as memory:
        file = Path(folder) / "rows.bin"
        with file.open("wb") as out:
            for part in torch.arange(n).split(50_000):
                out.write(torch.randn(len(part), d_in, generator=generator).bfloat16().view(torch.int16).numpy().tobytes())
        rows = harvest.Rows(
            torch.from_file(str(file), size=n * d_in, dtype=torch.bfloat16).view(n, d_in), torch.from_numpy(flat[kept]), torch.from_numpy(kept // 128),
            torch.from_numpy(kept % 128), harvest.Windows(flat, np.arange(n_windows + 1) * 128), torch.arange(n_windows), torch.arange(n_windows), torch.ones(n, dtype=torch.bool), {}, Path(folder),
        )  # fmt: skip
        unit = torch.nn.functional.normalize(rows.activations[:256].float(), dim=1)
        sae = sae_with_l0(d_in, d_sae, 50, unit)
        found = memory.during(f"contexts, {n:,} rows", lambda: features.contexts(sae, rows.activations, torch.arange(n), rows.window))
        found |= memory.during("tokens and activations around them", lambda: features.shown_contexts(sae, rows, found))
        highest = found["top_values"][:, 0]
        found |= memory.during("shares", lambda: features.shares(found, rows, words.__getitem__, highest))
        found |= memory.during("firing together", lambda: features.firing_together(sae, rows.activations, torch.arange(n)))
        nearest = memory.during("similar directions", lambda: features.similar_directions(sae.W_dec))
        found |= {"nearest": nearest[0], "nearest_cosine": nearest[1]}
        for name in ("promoted", "suppressed"):
            found[name] = torch.randint(vocab, (d_sae, 10), generator=generator)
        page = ROOT / "runs" / "bench-features" / "features.html"
        density = torch.where(highest > 0, 50 / d_sae, 0)
        memory.during("page", lambda: features.write_page(page, f"{d_sae:,} latents", found, density, highest, words.__getitem__, {}))
    table("GB of anonymous memory above the start (other: the limit), seconds", memory.rows)
    print(f"page: {page.stat().st_size / 1e6:.1f} MB for {int((highest > 0).sum()):,} latents")
    return memory.rows


# ---------------------------------------------------------------------------------------------
# training: steps per second
# ---------------------------------------------------------------------------------------------


def sae_with_l0(d_in: int, d_sae: int, l0: float, rows: torch.Tensor, **architecture) -> sae_utils.SAE:
    """An SAE whose encoder bias is such that about `l0` latents are active on a row."""
    sae = sae_utils.SAE(d_in, d_sae, **architecture).requires_grad_(False).to(rows.device)
    pre_acts = (rows[:256] @ sae.W_enc).flatten()
    sae.b_enc.fill_(-pre_acts.topk(int(l0 * 256)).values.min())
    return sae


def bench_products(rounds: int, quick: bool) -> list[dict]:
    """A matrix product of ours against torch's: what a training step, a decoder and a head of 65,536 tokens ask for."""
    rows = []
    for case, n, d, out in [("an encoder", 512, 1152, 9216), ("a decoder", 512, 9216, 1152), ("a head", 512, 640, 65_536), ("an MLP", 2048, 640, 2048), ("one token's head", 1, 640, 65_536)]:
        x, weight = torch.randn(n, d), torch.randn(out // (64 if quick else 1), d)
        ways = {"ours": lambda: sae_utils.linear(x, weight), "other": lambda: torch.nn.functional.linear(x, weight)}  # noqa: B023
        seconds = {name: 1000 * value for name, value in interleaved(ways, 2 * rounds).items()}
        rows.append({"part": "products", "case": f"{case}: {n} x {d} -> {len(weight)}", **seconds, "ratio": seconds["other"] / seconds["ours"], "machine": machine()})
    table(f"milliseconds of a product in float32 (other: torch's own); by oneDNN: {'yes' if sae_utils.through_onednn() else 'no, ours are the same'}", rows)
    return rows


def textbook_steps(sae: sae_utils.SAE, rows: torch.Tensor, batch_size: int, l1_coeff: float):
    """DataLoader over a TensorDataset, nn.Linear, autograd, Adam, loss.item()."""
    d_in, d_sae = sae.d_in, sae.d_sae
    encoder, decoder = torch.nn.Linear(d_in, d_sae, device=rows.device), torch.nn.Linear(d_sae, d_in, device=rows.device)
    with torch.no_grad():
        encoder.weight.copy_(sae.W_enc.T), encoder.bias.copy_(sae.b_enc), decoder.weight.copy_(sae.W_dec.T), decoder.bias.zero_()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=batch_size, shuffle=True)

    def steps():
        for (x,) in loader:
            acts = encoder(x).relu()
            loss = (decoder(acts) - x).square().mean() + l1_coeff * acts.sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return steps


def our_steps(sae: sae_utils.SAE, rows: torch.Tensor, batch_size: int, l1_coeff: float, **settings):
    """Some steps of the notebook's loop: shuffled batches from a store in bfloat16, normalised, stepped; read at the end.
    The batches come from one long epoch, so that the next ones are gathered while a step runs, as in a real run."""
    trainer, stored = training.Trainer(sae, l1_coeff, **settings), rows.bfloat16()
    trainer.active_share = 0.0
    index = torch.randint(len(rows), (1_000_000,))
    batches = training.shuffled_batches(stored, index, batch_size, rows.device.type, super_batch=8 * batch_size)

    def steps():
        for batch in itertools.islice(batches, len(rows) // batch_size):
            trainer.step(trainer.normalise(batch), 1e-7)
        trainer.read(reset=True)

    return steps


def floor_steps(sae: sae_utils.SAE, rows: torch.Tensor, batch_size: int):
    """Encoder product and fused Adam alone."""
    trainer, x = training.Trainer(sae), rows[:batch_size]
    pre_acts, parameters = torch.empty(batch_size, sae.d_sae, device=rows.device), list(trainer.parameters.values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.Adam(parameters, lr=1e-7, fused=True)

    def steps():
        for _ in range(len(rows) // batch_size):
            sae_utils.linear(x, trainer.W_enc, trainer.b_enc, out=pre_acts)
            optimizer.step()

    return steps


def bench_training(rounds: int, quick: bool) -> list[dict]:
    """Time of a step at 512 x 1152 -> 9,216, ReLU + L1, against the textbook loop and against the floor."""
    torch.set_flush_denormal(True)
    device, rows = sae_utils.pick_device(), []
    d_in, d_sae, n_steps = (96, 768, 2) if quick else (1152, 9216, 4)
    data = torch.nn.functional.normalize(torch.randn(512 * n_steps, d_in), dim=1).to(device)
    for l0 in (32, 100):
        make = lambda: sae_with_l0(d_in, d_sae, l0, data)  # noqa: B023
        ways = {"textbook": textbook_steps(make(), data, 512, 3e-4), "ours": our_steps(make(), data, 512, 3e-4), "floor": floor_steps(make(), data, 512)}
        ways["ours, dense"] = our_steps(make(), data, 512, 3e-4, sparse_below=0.0)
        seconds = {name: value / n_steps for name, value in interleaved(ways, rounds).items()}
        for other in ("textbook", "ours, dense", "floor"):
            case = f"{d_in} -> {d_sae}, L0 {l0}, against {other}"
            ratio = seconds[other] / seconds["ours"] if other != "floor" else seconds["ours"] / seconds["floor"]
            row = {"part": "training", "case": case, "ours": 1000 * seconds["ours"], "other": 1000 * seconds[other], "ratio": ratio}
            rows.append(row | {"machine": machine()})
    jumps = [sae_utils.SAE(d_in, d_sae, architecture="jumprelu", k=32).requires_grad_(False).to(device) for _ in "ab"]
    for sae in jumps:
        sae.threshold.fill_((data[:256] @ sae.W_enc).flatten().topk(32 * 256).values.min())
    seconds = interleaved({name: our_steps(sae, data, 512, 0.0, kernel=name == "ours") for name, sae in zip(("ours", "autograd"), jumps, strict=True)}, rounds)
    ours, other = (1000 * seconds[name] / n_steps for name in ("ours", "autograd"))
    rows.append({"part": "training", "case": f"{d_in} -> {d_sae}, jumprelu, L0 32, against autograd", "ours": ours, "other": other, "ratio": other / ours, "machine": machine()})
    table("milliseconds of a step (ratio: other / ours; for the floor ours / floor)", rows)
    if device == "cuda":
        print(f"the reference job, 1.76M steps: {1.76e6 * rows[0]['ours'] / 1000 / 60:.1f} minutes")
    if not quick:
        more = []
        for share in (0.04, 0.06, 0.08, 0.1, 0.12):
            make = lambda: sae_with_l0(d_in, d_sae, share * d_sae, data)  # noqa: B023
            ways = {"sparse": our_steps(make(), data, 512, 3e-4, sparse_below=1.0), "dense": our_steps(make(), data, 512, 3e-4, sparse_below=0.0)}
            seconds = {name: 1000 * value / n_steps for name, value in interleaved(ways, rounds).items()}
            row = {"part": "training", "case": f"share of active entries {share:g}, sparse against dense", "ours": seconds["sparse"]}
            more.append(row | {"other": seconds["dense"], "ratio": seconds["dense"] / seconds["sparse"], "machine": machine()})
        table("where the sparse step pays (SPARSE_BELOW is set from this)", more)
        rows += more
    return rows


def bench_peers(rounds: int, quick: bool) -> list[dict]:
    """A step of ours against one of SAELens's SAETrainer (its own loop, fed tensors) and of dictionary_learning's
    StandardTrainer, on the same rows at the same L0. Needs both installed: `make bench-peers`."""
    import sae_lens
    from dictionary_learning.trainers.standard import StandardTrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.set_flush_denormal(True)
    d_in, d_sae, n_steps = (96, 768, 2) if quick else (1152, 9216, 4)
    data = torch.nn.functional.normalize(torch.randn(512 * n_steps, d_in), dim=1)
    sae = sae_with_l0(d_in, d_sae, 32, data)
    theirs = sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(d_in=d_in, d_sae=d_sae, l1_coefficient=0.35, apply_b_dec_to_input=False))
    theirs.load_state_dict(sae.state_dict(), strict=False)
    batches = itertools.cycle(data.split(512))
    settings = SAETrainerConfig(total_training_samples=0, train_batch_size_samples=512, lr=1e-7, lr_end=1e-8)
    settings.total_training_samples = len(data) * (rounds + 2)  # its schedule wants to know
    lens = SAETrainer(settings, theirs, batches)
    settings.total_training_samples = 0
    learning = StandardTrainer(steps=10**6, activation_dim=d_in, dict_size=d_sae, layer=0, lm_name="none", lr=1e-7, device="cpu", sparsity_warmup_steps=None)
    with torch.no_grad():
        learning.ae.encoder.weight.copy_(sae.W_enc.T), learning.ae.encoder.bias.copy_(sae.b_enc), learning.ae.decoder.weight.copy_(sae.W_dec.T)
    count = itertools.count()

    def lens_steps():
        settings.total_training_samples += len(data)
        lens.fit()

    def learning_steps():
        for _ in range(n_steps):
            learning.update(next(count), next(batches))

    ways = {"ours": our_steps(sae, data, 512, 3e-4), "SAELens": lens_steps, "dictionary_learning": learning_steps}
    seconds = {name: value / n_steps for name, value in interleaved(ways, rounds).items()}
    rows = []
    for other in ("SAELens", "dictionary_learning"):
        row = {"part": "peers", "case": f"{d_in} -> {d_sae}, L0 32, against {other}", "ours": 1000 * seconds["ours"], "other": 1000 * seconds[other]}
        rows.append(row | {"ratio": seconds[other] / seconds["ours"], "machine": machine()})
    table("milliseconds of a step", rows)
    return rows

# ---------------------------------------------------------------------------------------------
# patching: tokens per second while latents are edited
# ---------------------------------------------------------------------------------------------


def bench_patching(rounds: int, quick: bool) -> list[dict]:
    """Greedy generation with 3 latents edited at every position, against the model as it is: d_in 1152,
    9,216 latents; 2 layers, hidden 1152, MLP 6,912, vocabulary 32k. `all latents encoded`: the same edit
    as a plain function, for which the whole SAE has to run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, d_sae, new = (128, 1024, 8) if quick else (1152, 9216, 32)
    model = sae_utils.with_linear(gemma_shape(32_768, hidden, 2, 4, 6 * hidden, torch.bfloat16 if device == "cuda" else torch.float32, device))
    hook = "model.layers.1.mlp.down_proj"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 5, "<bos>": 2}, unk_token="a")), bos_token="<bos>")
    prompts = [[2, *window[1:32]] for window in random_windows(8, True)]
    x = sae_utils.run_to_hook(model, hook, *sae_utils.pad(prompts, device=device)).flatten(0, 1).float()
    sae = sae_with_l0(hidden, d_sae, 50, torch.nn.functional.normalize(x - x.mean(0), dim=1))
    sae.mean.copy_(x.mean(0))
    patch, rows = editing.set_value([1, 77, 300], 2.0), []

    def ways(batch):
        def generate(patch=None):
            def way():
                with editing.intervene(model, hook, sae, tokenizer, patch) if patch else contextlib.nullcontext():
                    editing.generate(model, tokenizer, prompts[:batch], new)

            return way

        return {"unpatched": generate(), "3 latents": generate(patch), "all latents encoded": generate(lambda acts: patch(acts))}

    for batch in (1, 8):
        seconds = interleaved(ways(batch), rounds)
        for case in ("3 latents", "all latents encoded"):
            row = {"part": "patching", "case": f"{case}, batch {batch}", "ours": batch * new / seconds[case], "other": batch * new / seconds["unpatched"]}
            rows.append(row | {"ratio": row["ours"] / row["other"], "machine": machine()})
    table("tokens per second, patched (ours) and unpatched (other)", rows)
    return rows


# ---------------------------------------------------------------------------------------------
# run: a whole run on a real model, stage by stage
# ---------------------------------------------------------------------------------------------

# Which stage of budget.stages a cell of sae_training.ipynb belongs to, by what it calls; the first that fits.
STAGE_OF = {
    "harvest.get_rows(": "activations", "training.shuffled_batches(": "training", "training.settle(": "training", "fidelity.text_sums(": "cross-entropies",
    "score_rows(": "scores and baselines", "fidelity.kmeans(": "scores and baselines", "harvest.spectrum(": "scores and baselines", "activation_stats(": "scores and baselines",
    "features.contexts(": "contexts", "features.shares(": "contexts", "features.token_effects(": "effects", "features.measured_effect(": "effects",
    "features.write_page(": "pages, start and rest", "show(report.": "pages, start and rest", "report.open_report(": "pages, start and rest", "write_overview(": "pages, start and rest",
}  # fmt: skip


def stage_seconds(notebook: dict) -> dict[str, float]:
    """Seconds of each stage of an executed notebook, by papermill's own times; cells of none count as start and rest."""
    seconds = dict.fromkeys(STAGE_OF.values(), 0.0)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        stage = next((stage for call, stage in STAGE_OF.items() if call in source), "pages, start and rest") if "def show(" not in source else "pages, start and rest"
        seconds[stage] += cell["metadata"].get("papermill", {}).get("duration") or 0.0
    return seconds


def bench_run(model: str, text: str, layer: int, more: list[str]) -> list[dict]:
    """A run of sae_training.ipynb in runs/bench-run: seconds of every stage, beside what the card said of it."""
    flags = [f for name, value in (("model_name", model), ("dataset_name", text), ("layer", str(layer))) for f in ("-p", name, value)]
    folder = ROOT / "runs" / "bench-run"
    shutil.rmtree(folder, ignore_errors=True)
    begin = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "notebooks" / "experiment.py"), "sae_training", *more, *flags, "-p", "run_dir", "runs/bench-run"], check=True)
    whole = time.perf_counter() - begin
    notebook = json.loads((folder / "sae_training.ipynb").read_text())
    said = {}
    for output in (output for cell in notebook["cells"] for output in cell.get("outputs", [])):
        for name, value, unit in re.findall(r"^ *([a-z, -]+): +(\d+) (seconds|minutes|hours)", "".join(output.get("text", "")), re.MULTILINE):
            said[name] = int(value) * {"seconds": 1, "minutes": 60, "hours": 3600}[unit]
    found = stage_seconds(notebook) | {"in all": whole}
    rows = [
        {"part": "run", "case": f"{Path(model).name}, layer {layer}: {stage}", "ours": took, "other": float(said.get(stage, math.nan)), "ratio": said.get(stage, math.nan) / took if took else math.nan, "machine": machine()}
        for stage, took in found.items()
    ]  # fmt: skip
    table("seconds of each stage (other: what the card said before)", rows)
    return rows


def bench_peers_run(model: str, text: str, layer: int, rounds: int, windows: int = 16) -> list[dict]:
    """Harvest and cross-entropies beside SAELens's, on the same text with documents kept apart and the same windows:
    its ActivationsStore and `get_recons_loss`, the model being what its `load_model` makes of any transformers model."""
    import datasets
    import sae_lens
    from sae_lens.evals import get_recons_loss
    from sae_lens.load_model import HookedProxyLM
    from sae_lens.training.activation_scaler import ActivationScaler
    from sae_lens.training.activations_store import ActivationsStore

    import experiment

    params = experiment.check_params("sae_training", {"model_name": model, "dataset_name": text, "layer": layer})
    hook, (lm, tokenizer) = sae_utils.find_hook(model, layer), sae_utils.load_model(model)
    documents = list(harvest.open_text(params))
    cut, _ = harvest.cut_windows(tokenizer, documents, 128, 10**9)
    full = [window for window in harvest.Windows(cut["flat"], cut["starts"]) if len(window) == 128][: 8 * windows]  # theirs knows no shorter ones
    d_in = sae_utils.run_to_hook(lm, hook, torch.tensor(full[:1]), None).shape[2]
    x = sae_utils.run_to_hook(lm, hook, torch.tensor(full[:4]), None)[:, 1:].flatten(0, 1)
    sae = sae_with_l0(d_in, 8 * d_in, 32, torch.nn.functional.normalize(x - x.mean(0), dim=1))
    theirs = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(d_in=d_in, d_sae=8 * d_in))
    theirs.load_state_dict({name: value for name, value in sae.state_dict().items() if name in theirs.state_dict()})
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval().requires_grad_(False)  # with torch's own products
    proxy = HookedProxyLM(plain, tokenizer, hook_names=[hook])
    store = ActivationsStore(
        proxy, datasets.Dataset.from_dict({"text": documents}), streaming=False, hook_name=hook, hook_head_index=None, context_size=128, d_in=d_in, n_batches_in_buffer=8,
        total_training_tokens=10**9, store_batch_size_prompts=16, train_batch_size_tokens=512, prepend_bos=True, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32", disable_concat_sequences=True,
    )  # fmt: skip
    arms = {name: arm for name, arm in fidelity.arms(hook, x.mean(0), sae=lambda x: fidelity.through_sae(sae, x)).items() if name != "mean"}

    some = full[:windows]

    def recons():
        for start in range(0, len(some), 4):
            get_recons_loss(theirs, proxy, ActivationScaler(), torch.tensor(some[start : start + 4]), True, True, hook_name=hook)

    ways = {
        "harvest": {"ours": lambda: timed_harvest(lm, [hook], full, "float32"), "SAELens": lambda: [store.get_activations(store.get_batch_tokens(16)) for _ in range(len(full) // 16)]},
        "cross-entropies (clean, SAE, zero)": {"ours": lambda: fidelity.text_sums(lm, tokenizer, arms, some), "SAELens": recons},
    }  # fmt: skip
    rows = []
    for case, two in ways.items():
        seconds, tokens = interleaved(two, rounds), 128 * len(full if case == "harvest" else some)
        row = {"part": "peers-run", "case": f"{Path(model).name}, layer {layer}: {case}", "ours": tokens / seconds["ours"], "other": tokens / seconds["SAELens"]}
        rows.append(row | {"ratio": seconds["SAELens"] / seconds["ours"], "machine": machine()})
        table("tokens per second (other: SAELens)", rows[-1:])
    return rows


def bench_peers_pages(run: str, rounds: int, n_windows: int = 128, n_features: int = 64) -> list[dict]:
    """Seconds from windows of text to a page of latents, the model's pass to the hook included: all latents of a finished run
    (`normalize: scale`) on ours, `n_features` of them on SAEDashboard's, which goes over the text anew for each batch of its features."""
    import sae_lens
    from sae_dashboard.data_writing_fns import save_feature_centric_vis
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import SaeVisRunner

    import experiment
    import formats
    import showing

    folder = experiment.finished_run(run)
    sae = sae_utils.SAE.load(folder / "sae.pth")
    hook, layer = sae.config["hook_name"], sae.config["layer"]
    model, tokenizer = sae_utils.load_model(sae.config["model_name"])
    as_text, point = showing.TokenText(tokenizer), f"blocks.{layer}.hook_mlp_out"
    rows = harvest.get_rows(model, tokenizer, hook, sae.config, experiment.cache_folder(folder))
    length = statistics.mode(map(len, rows.windows))
    full = [w for w, window in enumerate(rows.windows) if len(window) == length][:n_windows]
    index, windows = torch.isin(rows.window, torch.tensor(full)).nonzero().flatten(), torch.tensor([rows.windows[w] for w in full])
    live = (sae.density > 0).nonzero().flatten()
    some = live[torch.linspace(0, len(live) - 1, n_features).long()].tolist()

    class Model:
        """What SAEDashboard asks of a TransformerLens model: here it is transformers' that runs, as far as the hook."""

        W_U, hook_dict = model.get_output_embeddings().weight.T.float(), {point: SimpleNamespace(ctx={}, name=point)}

        def run_with_hooks(self, tokens, stop_at_layer, fwd_hooks):
            x = torch.cat([sae_utils.run_to_hook(model, hook, batch, None).float() for batch in tokens.split(16)])
            for name, function in fwd_hooks:
                function(x, self.hook_dict[name])

    Model.tokenizer = tokenizer

    with tempfile.TemporaryDirectory() as there:
        formats.export(sae, Path(there) / "sae", "saelens", {"run": folder.name, "metrics": storing.read_json(folder / "metrics.json")})

        def theirs():
            lens = sae_lens.SAE.load_from_disk(Path(there) / "sae")
            config = SaeVisConfig(hook_point=point, features=some, minibatch_size_features=n_features, minibatch_size_tokens=64)
            save_feature_centric_vis(SaeVisRunner(config).run(encoder=lens, model=Model(), tokens=windows), Path(there) / "theirs.html")

        def ours():
            for batch in windows.split(16):
                sae_utils.run_to_hook(model, hook, batch, None)
            document = rows.window_document[rows.window]
            found = features.contexts(sae, rows.activations, index, document, 0)
            found |= features.shown_contexts(sae, rows, found)
            strength = found["top_values"][:, 0]
            found |= features.shares(found, rows, as_text, strength) | features.firing_together(sae, rows.activations, index)
            nearest = features.similar_directions(sae.W_dec)
            found |= {"nearest": nearest[0], "nearest_cosine": nearest[1]}
            found |= features.token_effects(model, hook, sae, windows[:16].tolist(), sae_utils.special_ids(tokenizer))
            features.write_page(Path(there) / "ours.html", "ours", found, (strength > 0).float(), strength, as_text, {})

        seconds = interleaved({"ours": ours, "SAEDashboard": theirs}, rounds)
        sizes = {name: (Path(there) / f"{name}.html").stat().st_size / 1e6 for name in ("ours", "theirs")}
    case = f"{len(full)} windows of {length} tokens, {Path(sae.config['model_name']).name}, layer {layer}: ours all {sae.d_sae:,} latents ({sizes['ours']:.1f} MB), SAEDashboard {n_features} ({sizes['theirs']:.1f} MB)"
    row = {"part": "peers-pages", "case": case, "ours": seconds["ours"], "other": seconds["SAEDashboard"]}
    results = [row | {"ratio": seconds["SAEDashboard"] / n_features / (seconds["ours"] / sae.d_sae), "machine": machine()}]
    table("seconds (ratio: of a latent's time)", results)
    return results


PARTS = {"products": bench_products, "harvest": bench_harvest, "memory": bench_memory, "features": bench_features, "training": bench_training, "patching": bench_patching, "peers": bench_peers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="What follows is for run: -p name value.")
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "run", "peers-run", "peers-pages", []], help="all but run and those with peers, where none is named")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--model", default="runs/tiny-model", help="for run and peers-run")
    parser.add_argument("--text", default="runs/tiny-world/corpus.jsonl")
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--run", default="runs/demo", help="a finished run, for peers-pages")
    options, more = parser.parse_known_args()
    file = ROOT / "runs" / "bench.json"
    known = json.loads(file.read_text()) if file.exists() else []
    about = options.model, options.text, options.layer
    special = {"run": lambda: bench_run(*about, more), "peers-run": lambda: bench_peers_run(*about, options.rounds), "peers-pages": lambda: bench_peers_pages(options.run, options.rounds)}
    for part in options.parts or [name for name in PARTS if name != "peers"]:
        rows = special[part]() if part in special else PARTS[part](options.rounds, options.quick)
        known = [row for row in known if row["part"] != part or row["machine"] != rows[0]["machine"]] + rows
        storing.write_json(file, known)


if __name__ == "__main__":
    main()
