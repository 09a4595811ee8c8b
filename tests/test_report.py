"""What the report decides: its sentences, its tables, what stands on its pages; and that hostile text reaches them whole."""

import csv
import json
import logging
import os
import re
import time
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils.tensorboard import SummaryWriter

import experiment
import features
import report
import sae_utils as u

HOSTILE = ["$$", "<script>alert(1)</script>", "猫", "a|b", "\\frac{", "$x^", "\n", "", "%s", "{latent}", "\u202e", "\x00"]


@pytest.fixture
def metrics():
    """A run's metrics, as far as the report reads them."""
    three = lambda value: (value, 0.9 * value, 1.1 * value)
    arm = lambda ce, **more: {"ce": three(ce)} | {name: three(value) for name, value in more.items()}
    splice = lambda ce, fvu: arm(ce, ce_increase=ce - 2.0, kl=ce / 9, top1_changed=0.1, ce_recovered=0.9, ce_recovered_mean=0.8, fvu=fvu, cosine=0.9, norm_ratio=0.95, l0=7.0)
    fidelity = {"clean": arm(2.0), "sae": splice(2.5, 0.25), "kmeans": splice(2.75, 0.375), "pca": splice(3.0, 0.5), "untrained": splice(3.25, 0.75), "zero": arm(6.0, ce_increase=4.0, kl=3.0, top1_changed=0.8)}
    fidelity["sae"]["ce_increase"] = (0.5, 0.4321, 0.5678)
    return {
        "fvu": 0.25, "l0": 7.25, "dead": 0.125, "ce_clean": 2.0, "ce_spliced": 2.5, "ce_zero": 6.0, "ce_recovered": 0.875, "kl": 0.3, "top1_changed": 0.1,
        "norm_ratio": 0.95, "cosine": 0.9, "d_sae": 16, "fidelity": fidelity, "latents": {"dead": [1, 2], "ultra_dense": [3], "duplicates": []},
        "data": {"rows": 12345, "mean_over_rms": 0.25, "distance_from_mean": {"q50": 2.5, "q100": 1e6}, "highest_norm_tokens": [{"token": t, "distance": 3.0, "position": 7} for t in HOSTILE]},
        "doctor": ["too few of $$: raise l1_coeff"], "notices": ["<script> is noticed"], "findings": ["first $$ 猫", "second"],
    }  # fmt: skip


@pytest.fixture
def kept():
    """What features.npz holds of 16 latents: 20 places (ten of each tenth last) of 17 tokens, the middle one the place itself."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, len(HOSTILE), (16, 20, 17)).astype(np.int32)
    tokens[:, :, :3] = -1  # the window begins there
    tokens[4, 5:] = -1  # a latent that fires five times
    acts = generator.random((16, 20, 17)).astype(np.float16)
    ids = generator.integers(0, len(HOSTILE), (16, 10)).astype(np.int32)
    share = generator.dirichlet(np.ones(6), 16).astype(np.float32)[:, :5]
    return {
        "tokens": tokens, "acts": acts, "promoted": ids, "suppressed": ids[:, ::-1], "density": np.full(16, 0.125, np.float32), "max_act": np.linspace(0, 2, 16, dtype=np.float32),
        "fired_tokens": ids[:, :5], "fired_tokens_share": share, "text": np.arange(len(HOSTILE)).repeat(10),
    }  # fmt: skip


@pytest.fixture
def written(monkeypatch):
    """Every text put onto a page, with the number of its page. None may leave it."""
    texts, put = [], report.Report.put

    def keep(self, x, text, **style):
        texts.append((self.number + 1, text))
        put(self, x, text, **style)
        box = self.fig.texts[-1].get_window_extent()
        assert 0 <= box.x0 and box.x1 <= self.fig.bbox.width - 20 and box.y0 >= 0, text

    monkeypatch.setattr(report.Report, "put", keep)
    return texts


def test_findings_are_the_runs_own_numbers(metrics):
    first, interval, top1, latents = report.findings(metrics, n_duplicates=1234, dense_share=0.375, on_one_token=7)
    assert "explains 75.0% of the variance with 7.2 of 16 latents" in first and "rises by 0.500, from 2.000 to 2.500" in first
    assert "(zeroed: 6.000; ce_recovered 0.875); 12.5% of the latents are dead" in first
    assert "between 0.4321 and 0.5678 nats" in interval and "one of them active, costs 0.750 nats and leaves an FVU of 0.375" in interval and "costs 1.000 nats and leaves an FVU of 0.500" in interval and "cost 1.250 nats (FVU 0.750)" in interval
    assert "changes on 10.0%" in top1 and "0.950 times as long" in top1 and "cosine of 0.900" in top1
    assert latents.startswith("2 latents are dead") and "1 fire on more" in latents and "38% of L0" in latents and "1,234 pairs" in latents and "50% of the live" in latents


def test_findings_where_a_figure_says_nothing(metrics):
    dead = metrics | {"ce_recovered": None, "latents": {"dead": list(range(16)), "ultra_dense": [], "duplicates": []}}
    sentences = report.findings(dead, 0, 0.0, 0)
    assert "ce_recovered too small a gap to say" in sentences[0] and "0% of the live ones" in sentences[3]
    known = {"hidden": 221, "variables": 24, "found": {"trained": 63, "untrained": 2, "pca": 1, "kmeans": 5}}
    last = report.findings(metrics | {"known": known}, 0, 0.0, 0)[4]
    assert "221 values of 24 variables" in last and "63 are matched" in last and "(k-means: 5, untrained SAE: 2, PCA: 1)" in last


def test_lines_of_the_data_card(metrics):
    lines = report.data_lines(metrics["data"])
    assert lines == [("rows", "12,345"), ("mean over rms", "0.25"), ("distance from the mean, q50", "2.5"), ("distance from the mean, q100", "1e+06")]


def test_tables_hold_any_text():
    page = report.html_table([["", "two\nlines"], HOSTILE[:2]])
    assert page.count("<tr>") == 2 and page.count("<td>") == 4 and "two<br>lines" in page and escape(HOSTILE[1]) in page and "<script>" not in page
    lines = report.markdown_table([["a", "b"], ["x|y", "two\nlines"], [1, None]]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| x\\|y | two lines |", "| 1 | None |"]


def test_csv_is_read_back(tmp_path):
    rows = [{"token": token, "f1": i / 3, "hidden": True} for i, token in enumerate(HOSTILE[:-1])]
    report.write_csv(tmp_path / "a.csv", rows)
    back = list(csv.DictReader((tmp_path / "a.csv").open(encoding="utf-8", newline="")))
    assert [row["token"] for row in back] == HOSTILE[:-1] and float(back[1]["f1"]) == 1 / 3 and list(back[0]) == ["token", "f1", "hidden"]


def test_the_strength_curve_by_hand():
    density, strength, mean = torch.tensor([0.5, 0.0, 0.25, 0.125]), torch.tensor([1.0, 0.0, 4.0, 2.0]), torch.tensor([0.5, 0.0, 2.0, 1.0])
    assert report.half_of(density * mean) == 1 and report.half_of(torch.ones(10)) == 5 and report.half_of(torch.tensor([3.0, 1, 1, 1])) == 1
    fig = plt.figure()
    report.strength_curve(fig, density, strength, mean)
    left, right = fig.axes
    assert left.lines[1].get_ydata().tolist() == [4, 2, 1] and left.lines[0].get_ydata().tolist() == [2, 1, 0.5]
    assert right.lines[0].get_ydata() == pytest.approx([4 / 7, 6 / 7, 1]) and right.get_title() == "1 latents have half of it"
    assert left.get_title() == "half of the live ones exceed 2"
    plt.close(fig)


@pytest.mark.parametrize("n", [1, 5, 16, 48, 1000])
def test_every_latent_has_its_place_on_the_grid(n):
    grid = report.on_grid(torch.arange(n).float())
    width = grid.shape[1]
    assert width & (width - 1) == 0 and width / 4 <= len(grid) <= width
    assert all(grid[i // width, i % width] == i for i in range(n)) and np.isnan(grid.flat[n:]).all()


def test_bars_are_means_of_neighbours_in_order_of_density():
    density, values = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]), torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0])
    heights, group = report.bar_heights(values, density)
    assert group == 1 and heights.tolist() == [2, 4, 3, 1, 9]
    heights, group = report.bar_heights(values, density, most=2)
    assert group == 3 and heights.tolist() == [3, 5]


def history(n):
    names = ("loss", "held_out_loss", "mse", "held_out_fvu", "l0", "held_out_l0", "dead", "held_out_dead", "density_q10", "density_median", "density_q90", "lr")
    return [{"epoch": e, **{name: 0.0 if "dead" in name else 1 / e for name in names}} for e in range(1, n + 1)]


@pytest.mark.parametrize(("architecture", "names"), [("relu", ["loss", "held_out_loss", "mse"]), ("batchtopk", ["mse", "held_out_loss"])])
@pytest.mark.parametrize("epochs", [1, 30])
def test_losses_that_are_compared(architecture, names, epochs):
    fig = plt.figure()
    report.curves_figure(fig, history(epochs), architecture)
    assert [line.get_label() for line in fig.axes[0].lines] == names and len(fig.axes) == 6
    assert fig.axes[0].get_yscale() == ("log" if epochs > 3 else "linear") and fig.axes[3].get_ylim()[0] == 0
    plt.close(fig)


def test_figures_count_what_they_show(metrics):
    density = torch.tensor([0.0, 0.5, 0.25, 0.01, 0.0])
    fig = plt.figure()
    report.density_figure(fig, density)
    assert fig.axes[0].get_title() == "3 live latents, 2 dead" and fig.axes[0].get_legend_handles_labels()[1] == ["ultra-dense: 2"]
    fig.clear()
    report.cross_entropies_figure(fig, metrics["fidelity"])
    assert [bar.get_width() for bar in fig.axes[0].patches] == [0.5, 0.75, 1.0, 1.25, 4.0]
    assert [label.get_text() for label in fig.axes[0].get_yticklabels()][:3] == ["this SAE", "k-means, one active", "PCA, same L0"]
    (reach,) = (c for c in fig.axes[0].collections)  # from low to high of each
    assert [[x for x, _ in segment] for segment in reach.get_segments()][0] == pytest.approx([0.4321, 0.5678])
    assert "2.000 nats" in fig.axes[0].get_xlabel() and [text.get_text() for text in fig.axes[0].texts][0] == "+0.500"
    metrics["fidelity"]["sae"]["ce_increase"] = (-0.1, -0.05, 0.2)  # a draw of documents need not hold the value itself
    fig.clear()
    report.cross_entropies_figure(fig, metrics["fidelity"])
    plt.close(fig)


@pytest.mark.parametrize("others", [[], ["untrained"], ["untrained", "pca", "kmeans"]])
def test_known_variables_are_means_over_hidden_values(others):
    facts = [{"variable": v, "value": value} for v, value in (("a", "any"), ("a", "x"), ("a", "y"), ("b", "z"), ("c", "seen"))]
    hidden = torch.tensor([False, True, True, True, False])
    f1 = {name: torch.tensor([0.9, 0.2, 0.4, 1.0, 0.9]) for name in ["trained", *others]}
    fig = plt.figure()
    report.known_figure(fig, facts, hidden, f1, dict.fromkeys(f1, 1), torch.zeros(5))
    ax = fig.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"] and ax.get_legend_handles_labels()[1][0] == "trained: 1 found"
    assert [bar.get_width() for bar in ax.patches[:2]] == pytest.approx([0.3, 1.0])
    edges = sorted((round(bar.get_y(), 6), round(bar.get_y() + bar.get_height(), 6)) for bar in ax.patches)
    assert all(end <= start + 1e-6 for (_, end), (start, _) in zip(edges, edges[1:], strict=False))  # no bar hides another
    plt.close(fig)


def test_a_report_of_hostile_text(tmp_path, metrics, kept, written):
    sae = u.SAE(8, 16)
    sae.config = {"hook_name": "model.<layers>.$1"}
    params = {"model_name": "org/$$", "layer": 3, "dataset_name": "猫.txt", "chat": False, "hook": "", "column": "x" * 500, "l1_coeff": 3e-4}
    effect = {"kl": 0.5, "falls": [(i, -1.0) for i in range(5)], "rises": [(i, 1.0) for i in range(5)]}
    nothing = {"kl": 0.0, "falls": [], "rises": []}
    with report.open_report(tmp_path / "report.pdf", "org/$$, layer 3 猫") as pages:
        report.first_page(pages, params, sae, metrics)
        report.data_and_fidelity(pages, metrics)
        pages.drawings("Two $", {"a": lambda fig: fig.add_subplot(), "b": lambda fig: fig.add_subplot(), "c": None}, b=2, a=1)
        report.latents(pages, kept, {0: effect, 4: nothing, 9: effect}, HOSTILE.__getitem__, {9: "$$ <b>猫</b>"})
        report.definitions(pages)
    data = (tmp_path / "report.pdf").read_bytes()
    assert data[:5] == b"%PDF-" and len(re.findall(rb"/Type /Page\b", data)) == pages.number and [path.name for path in tmp_path.iterdir()] == ["report.pdf"]
    on = lambda page: "\n".join(text for number, text in written if number == page)
    head = ["org/$$, layer 3", "model.<layers>.$1, 8 wide, 16 latents (relu); text: 猫.txt", "first $$ 猫", "second", "too few of $$", "<script> is noticed"]
    for text in [*head, "hook: -", "l1_coeff: 0.0003"]:
        assert text in on(1), text
    assert "".join(on(1).split()).count("x" * 500) == 1 and "Title (" in data.decode("latin1")  # nothing is cut; the file knows its title
    assert "12,345" in on(2) and "'$$' (3, position 7)" in " ".join(on(2).split()) and "this" in on(2) and "+0.500" in on(2)
    rest = "\n".join(text for number, text in written if number > 3)
    assert "3 latents, from the rarest" in rest and "latent 9: $$ <b>猫</b>   density 12.500%, strength 1.20" in rest and "nothing moves" in rest
    assert rest.count("promotes ") >= 3 and "KL 0.5000" in rest and all(f"{word}: " in rest for word in report.DEFINITIONS)
    assert report.plain("a\n\x00$$") == "a··$$"
    picked = [int(n) for n in re.findall(r"^latent (\d+)", "\n".join(text for number, text in written if number > 4), re.MULTILINE) if int(n) not in (0, 4, 9)]
    assert picked == report.most_selective(kept, without=[0, 4, 9]) and len(picked) > 1
    with pytest.raises(KeyError), report.open_report(tmp_path / "half.pdf", "x") as pages:
        pages.page()
        raise KeyError
    assert not (tmp_path / "half.pdf").exists()


def test_a_latents_entry_shows_the_strongest_places_and_three_of_the_tenths(tmp_path, kept, monkeypatch):
    shown = []
    monkeypatch.setattr(report.Report, "tokens", lambda self, pieces, acts, highest, centre: shown.append((f"{acts[centre]:.2f}", pieces, centre, max(acts) / highest)))
    monkeypatch.setattr(report, "most_selective", lambda kept, without: [])
    with report.open_report(tmp_path / "a.pdf", "x") as pages:
        report.latents(pages, kept, dict.fromkeys((15, 4), {"kl": 0.0, "falls": [], "rises": []}), HOSTILE.__getitem__, {})
    places = [0, 1, 2, 3, features.TOP, features.TOP + 5, features.TOP + 9]  # as features.shown_contexts lays them out
    assert [value for value, *_ in shown] == [f"{kept['acts'][15, i, features.AROUND]:.2f}" for i in places] + [f"{kept['acts'][4, i, features.AROUND]:.2f}" for i in places[:4]]
    for (_, pieces, centre, shade), i in zip(shown, places, strict=False):
        assert len(pieces) == 14 and centre == 5 and pieces[centre] == HOSTILE[kept["tokens"][15, i, features.AROUND]] and shade <= 1


def test_settings_and_notes_when_there_are_few_or_none(tmp_path, metrics, written):
    sae = u.SAE(4, 8)
    sae.config = {"hook_name": "h"}
    with report.open_report(tmp_path / "a.pdf", "x") as pages:
        report.first_page(pages, {"model_name": "m", "layer": 0, "dataset_name": "d"}, sae, metrics | {"doctor": [], "notices": []})
    texts = [text for _, text in written]
    assert "Neither the doctor nor a notice." in texts and [t for t in texts if t.startswith(("model_name:", "layer:", "dataset_name:"))] == ["model_name: m", "dataset_name: d", "layer: 0"]


def test_the_most_selective_latents_are_those_of_the_page(kept):
    text = np.arange(len(HOSTILE)).repeat(100)
    tokens = kept["tokens"].copy()
    tokens[[3, 5, 7, 8], :, 8] = np.array([1, 2, 2, 3])[:, None]  # always the same token
    first = kept["fired_tokens"].copy()
    first[[3, 5, 7, 8], 0] = [1, 2, 2, 3]
    density = kept["density"].copy()
    density[7], density[8] = 0.5, 0.0  # 7 is more frequent than 5 and stands for it; 8 is dead
    picked = report.most_selective(kept | {"tokens": tokens, "fired_tokens": first, "density": density, "text": text}, n=2)
    assert picked == [7, 3] and features.selectivity(tokens, text)[0][[3, 5, 7]] == pytest.approx(np.log(1 / 12) / np.log(0.001), abs=0.02)
    assert report.most_selective(kept | {"tokens": tokens, "fired_tokens": first, "density": density, "text": text}, n=2, without=[7]) == [3, 5]
    tokens[[3, 5, 7], :, 8] = np.arange(20) % 7  # now the dead one alone is selective
    assert 8 not in report.most_selective(kept | {"tokens": tokens, "fired_tokens": first, "density": density, "text": text}, n=16)


def test_active_tokens_are_shaded_and_say_their_value_but_for_the_one_in_the_middle(tmp_path, written):
    with report.open_report(tmp_path / "a.pdf", "x") as pages:
        pages.page()
        pages.tokens([" silent", " middle", " active", "a"], [0.0, 2.0, 0.5, 0.25], 2.0, 1)
        shaded = [artist.get_alpha() for artist in pages.fig.artists if artist.get_fill()]
        frames = [artist.get_linewidth() for artist in pages.fig.artists if not artist.get_fill()]
    texts = [text for _, text in written]
    assert shaded == [1.0, 0.25, 0.125] and frames == [0.3, 0.7, 0.3, 0.3]
    assert texts[0] == "2.00" and texts.count(".50") == 1 and "2.00" not in texts[1:] and ".00" not in texts and ".25" not in texts  # no room for that


def test_what_our_font_lacks_is_drawn_in_an_installed_one_or_named(tmp_path, monkeypatch):
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "cat"])
    builder.setupCharacterMap({ord("猫"): "cat"})
    pen = TTGlyphPen(None)
    for corner in ((0, 0), (0, 800), (800, 800), (800, 0)):
        (pen.lineTo if corner != (0, 0) else pen.moveTo)(corner)
    pen.closePath()
    builder.setupGlyf({".notdef": pen.glyph(), "cat": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "cat": (1000, 0)})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Only Cats", "styleName": "Regular", "psName": "OnlyCats"})
    builder.setupOS2(sTypoAscender=800)
    builder.setupPost()
    builder.save(tmp_path / "cats.ttf")
    own = [entry for entry in font_manager.fontManager.ttflist if entry.name.startswith("DejaVu")]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    report.installed.cache_clear()
    assert report.plain("猫犬") == "□□" and report.columns("a猫") == 3
    font_manager.fontManager.addfont(tmp_path / "cats.ttf")
    report.installed.cache_clear()
    assert report.plain("猫犬") == "猫□" and report.fonts_for("a猫") == ["DejaVu Sans", "Only Cats"] and report.fonts_for("a") == ["DejaVu Sans"]
    with report.open_report(tmp_path / "a.pdf", "x") as pages:
        pages.page()
        pages.tokens(["a 猫", "犬", " b"], [0.0, 1.0, 0.5], 1.0, 1)
        report.definitions(pages)
        last = pages.fig.texts[-1].get_text()
    report.installed.cache_clear()
    assert last == "□ stands for 1 characters that no installed font has (cjk); features.html shows them." and b"OnlyCats" in (tmp_path / "a.pdf").read_bytes()


def test_when_and_by_what_it_was_made(tmp_path):
    experiment.record_params(tmp_path / "params.json", {"a": 1})
    os.utime(tmp_path / "params.json", (time.time() - 600,) * 2)
    line, recorded = report.made(tmp_path / "params.json", "cpu"), json.loads((tmp_path / "params.json").read_text())
    day = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime((tmp_path / "params.json").stat().st_mtime))
    assert line.startswith(f"Begun {day}, this report 10 minutes later, on cpu; commit {recorded['git_commit'][:12]}; torch {torch.__version__}, transformers ")
    assert report.title_of({"model_name": str(tmp_path), "layer": 3}) == f"{tmp_path.name}, layer 3" and report.title_of({"model_name": "org/m", "layer": 3}) == "org/m, layer 3"


def test_overview_and_tensorboard(tmp_path, metrics):
    drawings = {name: lambda fig: fig.add_subplot().plot([0, 1]) for name in ("one", "two")}
    report.write_overview(tmp_path / "overview.png", "It costs $1 to $2, 猫 and \\frac{1", [drawings["one"]] * 4)
    assert (tmp_path / "overview.png").read_bytes()[:4] == b"\x89PNG" and not plt.get_fignums()
    params = {"model_name": "a|b", "layer": 1, "run_dir": "/here", "device": "cpu", "chat": False}
    with SummaryWriter(str(tmp_path / "events")) as writer:
        report.add_to_tensorboard(writer, params, metrics | {"ce_recovered": None}, drawings)
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert events.Tags()["images"] == ["one", "two"] and not plt.get_fignums()
    text = lambda name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| model_name | a\\|b |" in text("settings") and "| FVU |" in text("fidelity") and text("findings") == "first $$ 猫\n\nsecond"
    assert events.Scalars("Final/fvu")[0].value == 0.25 and "Final/ce_recovered" not in events.Tags()["scalars"]
    start = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert set(plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams) == {"model_name", "layer", "chat"}  # what an experiment is


@pytest.mark.parametrize(
    ("message", "left"),
    [
        ("device: cpu\n", "device: cpu"), ("two\nlines\n\n", "two\nlines"), ("100%s\n", "100%s"), ("\n", None),
        ("<Figure size 800x300 with 1 Axes>", None), ("<Figure size 640x480 with 12 Axes>", None), ("<IPython.core.display.HTML object>", None),
        ("VBox(children=(BoundedIntText(value=43), HTML(value='<b>'…", None), ("Executing Cell 3---", None), ("Figure 3 is new", "Figure 3 is new"),
    ],
)  # fmt: skip
def test_the_log_leaves_out_what_only_a_notebook_can_show(message, left):
    record = logging.LogRecord("papermill", logging.INFO, "", 0, message, (), None)
    assert experiment.readable(record) is (left is not None)
    assert left is None or record.getMessage() == left
