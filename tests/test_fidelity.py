"""Fidelity against one window at a time, sums against float64, intervals against draws by hand."""

import math

import numpy as np
import pytest
import torch
from conftest import HOOK, gemma, sentences, word_tokenizer

import editing
import fidelity
import harvest
import sae_utils as u


@pytest.fixture
def windows(tokenizer, fresh_seed):
    tokens, _ = harvest.cut_windows(tokenizer, sentences(40, seed=fresh_seed), 24, 10**6)
    return list(harvest.Windows(tokens["flat"], tokens["starts"]))


def by_hand(model, tokenizer, windows, module, change):
    """(CE, log-probabilities) one window at a time, the change written into a hook by position."""
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


def through(sae):
    return {"sae": lambda x: fidelity.through_sae(sae, x)}


def measured(model, tokenizer, sae, windows, mean, document=None):
    norm = fidelity.post_norm_name(model, HOOK)
    x = torch.cat([u.run_to_hook(model, HOOK, *u.pad([window]))[0, 1:] for window in windows])  # all but BOS
    arms = fidelity.arms(HOOK, mean, (norm, fidelity.mean_after(model, norm, x, torch.arange(len(x)))), **through(sae))
    sums = fidelity.text_sums(model, tokenizer, arms, windows)
    document = torch.arange(len(windows)) if document is None else document
    x = torch.randn(200, 16)
    rows = {"sae": fidelity.row_sums(through(sae)["sae"], x, torch.arange(200), torch.arange(200) // 7)}
    return fidelity.table(list(arms), fidelity.by_document(sums, document), rows, n=200), sums[:, 0, -1]


def test_cross_entropies_against_one_window_at_a_time(model, tokenizer, sae, windows):
    mean = torch.randn(16)
    table, tokens = measured(model, tokenizer, sae, windows, mean)
    clean, p = by_hand(model, tokenizer, windows, HOOK, lambda x: x)
    for arm, change in (("sae", sae), ("zero", torch.zeros_like), ("mean", mean.expand_as)):
        ce, q = by_hand(model, tokenizer, windows, HOOK, change)
        assert table[arm]["ce"][0] == pytest.approx(ce, rel=1e-5) and table[arm]["ce_increase"][0] == pytest.approx(ce - clean, abs=1e-5)
        assert table[arm]["kl"][0] == pytest.approx((p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4)
        assert table[arm]["top1_changed"][0] == pytest.approx((p.argmax(1) != q.argmax(1)).double().mean().item(), abs=2e-3)
        assert (p - q).abs().max() > 0.01  # the arms do differ
    assert table["clean"]["ce"][0] == pytest.approx(clean, rel=1e-5)
    assert tokens.tolist() == [len(w) - 1 for w in windows]
    flat = fidelity.flat(table)
    assert flat["ce_spliced"] == table["sae"]["ce"][0] and flat["ce_zero"] == table["zero"]["ce"][0] and flat["kl"] == table["sae"]["kl"][0]


@pytest.mark.parametrize("held", [1, 70, 10**6])
def test_logits_beside_clean_ones_by_hand(held):
    clean, said = torch.randn(11, 23) * 4 + 100, torch.randint(23, (11,))
    logits = clean + torch.randn(11, 23) * 0.1
    p, q = clean.double().log_softmax(-1), logits.double().log_softmax(-1)
    ce = -q[torch.arange(11), said]
    kl, changed = (p.exp() * (p - q)).sum(1), (p.argmax(1) != q.argmax(1)).double()
    found = fidelity.compared(logits, clean, clean.softmax(-1), said, held).double()
    torch.testing.assert_close(found, torch.stack([ce, ce + p[torch.arange(11), said], kl, changed, torch.ones(11)], 1), rtol=1e-4, atol=3e-5)


def test_mean_ablation_after_the_norm(model, tokenizer, sae, windows):
    norm = "model.layers.1.post_feedforward_layernorm"
    assert fidelity.post_norm_name(model, HOOK) == norm
    mean = torch.cat([u.run_to_hook(model, norm, *u.pad([window]))[0, 1:].double() for window in windows]).mean(0)  # all but BOS
    rows = torch.cat([u.run_to_hook(model, HOOK, *u.pad([window]))[0, 1:] for window in windows])
    torch.testing.assert_close(fidelity.mean_after(model, norm, rows, torch.arange(len(rows)), chunk=64).double(), mean, rtol=1e-4, atol=1e-5)
    table, _ = measured(model, tokenizer, sae, windows, torch.zeros(16))
    assert table["mean_post_norm"]["ce"][0] == pytest.approx(by_hand(model, tokenizer, windows, norm, lambda x: mean.float().expand_as(x))[0], rel=1e-4)
    ce = {arm: table[arm]["ce"][0] for arm in table}
    for figure, anchor in (("ce_recovered", "zero"), ("ce_recovered_mean", "mean_post_norm")):
        expected, got = fidelity.recovered(ce["clean"], ce["sae"], ce[anchor]), table["sae"][figure]
        assert got is None if expected is None else got[0] == pytest.approx(expected)


def test_perfect_sae_recovers_everything(model, tokenizer, windows):
    perfect = u.SAE(16, 32)
    with torch.no_grad():
        perfect.W_enc.copy_(torch.cat([torch.eye(16), -torch.eye(16)], 1))
        perfect.W_dec.copy_(perfect.W_enc.T)
    table, _ = measured(model, tokenizer, perfect.requires_grad_(False), windows, torch.zeros(16))
    assert table["sae"]["ce_increase"][0] == pytest.approx(0, abs=1e-4) and table["sae"]["kl"][0] == pytest.approx(0, abs=1e-4)
    assert table["sae"]["fvu"][0] == pytest.approx(0, abs=1e-9) and table["sae"]["cosine"][0] == pytest.approx(1) and table["sae"]["norm_ratio"][0] == pytest.approx(1)


def test_without_bos_the_first_token_is_left_alone(sae, fresh_seed):
    tokenizer, model = word_tokenizer(with_bos=False), gemma()
    ids = torch.tensor([[5, 6, 7, 8]])
    before = u.run_to_hook(model, HOOK, ids, torch.ones_like(ids))
    with editing.edit_output(model, HOOK, torch.zeros_like, tokenizer):
        after = u.run_to_hook(model, HOOK, ids, torch.ones_like(ids))
    assert torch.equal(after[:, 0], before[:, 0]) and not after[:, 1:].any() and before[:, 1:].all()


def test_a_measurement_that_was_stopped_goes_on_to_the_same_bits(model, tokenizer, sae, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(editing, "batches", lambda windows, model, most=4: (windows[i : i + most] for i in range(0, len(windows), most)))
    arms, keep = fidelity.arms(HOOK, torch.zeros(16), **through(sae)), tmp_path / "fidelity.npz"
    whole = fidelity.text_sums(model, tokenizer, arms, windows)
    calls = 0

    def fails(module, args):
        nonlocal calls
        calls += 1
        if calls > 2 + 5 * len(arms):  # in the sixth batch, after the two passes of a trial
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(fails)
    with pytest.raises(KeyboardInterrupt):
        fidelity.text_sums(model, tokenizer, arms, windows, None, keep, "a", minutes=0)
    handle.remove()
    assert int(np.load(keep)["done"]) == 20
    counted = []
    handle = model.register_forward_pre_hook(lambda module, args: counted.append(1))
    again = fidelity.text_sums(model, tokenizer, arms, windows, None, keep, "a", minutes=0)
    assert torch.equal(again, whole) and len(counted) == 2 + len(arms) * -(-(len(windows) - 20) // 4)
    fidelity.text_sums(model, tokenizer, arms, windows, None, keep, "another SAE", minutes=0)  # nothing of the first is taken over
    assert len(counted) == 4 + len(arms) * (-(-(len(windows) - 20) // 4) + -(-len(windows) // 4))
    handle.remove()


def test_layers_below_run_once_and_the_head_where_a_token_is_predicted(model, tokenizer, sae, windows, monkeypatch):
    monkeypatch.setattr(editing, "batches", lambda windows, model, most=8: (windows[i : i + most] for i in range(0, len(windows), most)))
    arms, below, heads = fidelity.arms(HOOK, torch.randn(16), **through(sae)), [], []
    whole = fidelity.text_sums(model, tokenizer, arms, windows)
    handles = [model.model.layers[0].mlp.register_forward_hook(lambda *a: below.append(1))]
    handles.append(model.lm_head.register_forward_hook(lambda module, args, out: heads.append(out.shape[:2].numel())))
    again = fidelity.text_sums(model, tokenizer, arms, windows)
    assert torch.equal(again, whole) and len(below) == 1 + -(-len(windows) // 8)  # one more in the trial
    assert sum(heads) == len(arms) * int(whole[:, 0, -1].sum()) + 2 * len(windows[0])
    monkeypatch.setattr(fidelity.Below, "agrees", lambda self, ids, mask: self.layers.clear())  # all layers for all arms
    monkeypatch.setattr(model, "get_output_embeddings", lambda: None)  # and all logits
    slow = fidelity.text_sums(model, tokenizer, arms, windows)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(slow, whole, rtol=1e-5, atol=1e-5)
    assert len(below) == 1 + (1 + len(arms)) * -(-len(windows) // 8) and model.model.layers[0].__dict__.get("forward") is None


def test_a_model_that_shares_more_than_the_residual_stream_runs_whole(model, tokenizer, sae, windows):
    """The last layer adds what the first one's MLP made, as some families share keys and values."""
    arms, kept = fidelity.arms(HOOK, torch.zeros(16), **through(sae)), {}
    handles = [model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: kept.update(out=out))]
    handles.append(model.model.layers[2].register_forward_hook(lambda module, args, out: out + 5 * kept.pop("out")))
    clean, count = 0.0, 0
    for window in windows:
        clean -= model(torch.tensor([window])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(window[1:])[:, None]).double().sum().item()
        count += len(window) - 1
    sums = fidelity.text_sums(model, tokenizer, arms, windows)
    for handle in handles:
        handle.remove()
    assert sums[:, 0, 0].sum().item() == pytest.approx(clean, rel=1e-5) and (sums[:, :, -1].sum(0) == count).all()


def test_measuring_ends_where_the_interval_is_narrow(model, tokenizer, sae, windows, monkeypatch, fresh_seed):
    generator = torch.Generator().manual_seed(fresh_seed)
    document, tokens = torch.arange(90) // 2, torch.randint(5, 20, (90,), generator=generator).double()
    names, sums = ["clean", "sae", "zero"], torch.zeros(90, 3, 5, dtype=torch.float64)
    sums[:, :, -1] = tokens[:, None]
    noise = torch.randn(90, generator=generator, dtype=torch.float64)
    for rise, gap, spread, expected in ((0.3, 1.0, 0.2, True), (0.3, 1.0, 3.0, False), (0.0, 50.0, 0.005, True), (0.0, 50.0, 0.05, False), (0.0, 0.1, 0.005, False)):
        sums[:, 1, 1], sums[:, 2, 1] = (rise + spread * noise) * tokens, gap * tokens
        drawn = fidelity.redrawn(fidelity.by_document(torch.stack([sums[:, 1, 1], tokens], 1), document), 4000, 0)
        low, high = (drawn[1:, 0] / drawn[1:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        mean = (sums[:, 1, 1].sum() / tokens.sum()).item()
        assert ((high - low) / 2 <= max(abs(mean) / 3, min(gap / 200, 0.002))) is expected  # as the bootstrap has it
        assert fidelity.enough(sums, document, names) is expected
    sums[:, 1, 1] = 0.3 * tokens
    assert fidelity.enough(sums, document, names) and not fidelity.enough(sums[:31], document[:31], names)
    assert not fidelity.enough(sums, torch.zeros(90), names)  # one document tells nothing about others
    arms, asked = fidelity.arms(HOOK, torch.zeros(16), **through(sae)), []

    def after_33(sums, document, names):
        asked.append(len(sums) == len(document) and names == list(arms))
        return len(sums) > 32

    monkeypatch.setattr(fidelity, "enough", after_33)
    whole = fidelity.text_sums(model, tokenizer, arms, windows)
    assert len(whole) == len(windows) > 33 and not asked  # without documents all are measured
    monkeypatch.setattr(editing, "batches", lambda windows, model, most=1: (windows[i : i + most] for i in range(0, len(windows), most)))
    some = fidelity.text_sums(model, tokenizer, arms, windows, torch.arange(len(windows)))
    assert len(some) == 33 and all(asked)
    torch.testing.assert_close(some, whole[:33], rtol=1e-4, atol=1e-4)


def test_baselines_on_some_of_the_batches(model, tokenizer, sae, windows, monkeypatch, tmp_path):
    monkeypatch.setattr(editing, "batches", lambda windows, model, most=4: (windows[i : i + most] for i in range(0, len(windows), most)))
    arms, keep = fidelity.arms(HOOK, torch.randn(16), **through(sae)), tmp_path / "fidelity.npz"
    whole = fidelity.text_sums(model, tokenizer, arms, windows)
    some = fidelity.text_sums(model, tokenizer, arms, windows, None, keep, "a", minutes=0, baselines_every=3)
    third = torch.arange(len(windows)) // 4 % 3 == 0
    assert torch.equal(some[:, :2], whole[:, :2]) and torch.equal(some[third], whole[third]) and not some[~third, 2:].any()
    before = dict(np.load(keep))
    before["sums"][20:] = 0
    np.savez(keep, **before | {"done": 20, "number": 5})  # as if it had been stopped there
    assert torch.equal(fidelity.text_sums(model, tokenizer, arms, windows, None, keep, "a", baselines_every=3), some)
    table = fidelity.table(list(arms), some, {}, n=100)
    clean, zero = whole[:, 0], whole[third, 2]
    expected = (zero[:, 0] - whole[third, 0, 0]).sum() / zero[:, -1].sum()
    assert table["zero"]["ce_increase"][0] == pytest.approx(expected.item(), rel=1e-5)
    assert table["zero"]["ce"][0] == pytest.approx((clean[:, 0].sum() / clean[:, -1].sum() + expected).item(), rel=1e-5)
    few = torch.zeros(9, 3, 5, dtype=torch.float64)
    few[..., -1], few[:, 1, 1], few[1:, 2] = 4, 2, 0  # many draws leave out the only document of the last arm
    few[0, 2, 1] = 8
    assert fidelity.table(["clean", "sae", "zero"], few, {}, n=200)["zero"]["ce_increase"] == (2, 2, 2)


def test_the_digest_follows_every_number(sae):
    before = fidelity.digest(sae)
    assert fidelity.digest(sae) == before
    sae.mean[3] += 1e-3
    assert fidelity.digest(sae) != before


def test_sums_over_rows_against_float64(sae):
    x, document = torch.randn(500, 16) * 3 + 40, torch.arange(500) // 9
    sae.mean.copy_(x.mean(0))
    index = torch.randperm(500)[:333].sort().values
    got = fidelity.row_sums(lambda x: fidelity.through_sae(sae, x), x, index, document, chunk=100, mean=sae.mean)
    e, e_hat, own = x[index].double(), sae(x[index]).double(), x[index].double().mean(0)
    centred, centred_hat = e - sae.mean, e_hat - sae.mean
    per_row = torch.stack([
        torch.ones(333), (e - e_hat).square().sum(1), (e - own).square().sum(1), torch.cosine_similarity(centred, centred_hat),
        centred_hat.norm(dim=1) / centred.norm(dim=1), (sae.encode(x[index]) > 0).sum(1),
    ], 1)  # fmt: skip
    for row, d in zip(got, document[index].unique().tolist(), strict=True):
        torch.testing.assert_close(row, per_row[document[index] == d].sum(0), rtol=1e-4, atol=1e-4)
    fvu = got[:, 1].sum() / got[:, 2].sum()
    assert fvu.item() == pytest.approx(fidelity.score_rows(sae, x, index)["fvu"], rel=1e-5)


def test_principal_components_are_those_of_an_svd():
    x = torch.randn(3000, 12) @ torch.randn(12, 12) + 7
    mean = x.mean(0)
    _, _, components = harvest.spectrum(x, torch.arange(3000))
    x_hat, active = fidelity.through_components(mean, components[:5], x)
    u_, s, vt = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    torch.testing.assert_close(x_hat.double(), u_[:, :5] * s[:5] @ vt[:5] + x.double().mean(0), rtol=1e-4, atol=1e-3)
    sums = fidelity.row_sums(lambda v: fidelity.through_components(mean, components[:5], v), x, torch.arange(3000), torch.arange(3000), mean=mean)
    assert (sums[:, 1].sum() / sums[:, 2].sum()).item() == pytest.approx((s[5:].square().sum() / s.square().sum()).item(), rel=1e-3)
    assert active.shape == (3000,) and (active == 5).all() and (sums[:, 5] == 5).all()
    within = fidelity.through_components(mean, components[:5], x[:6].reshape(2, 3, 12))[0]
    torch.testing.assert_close(within.reshape(6, 12), x_hat[:6], rtol=1e-4, atol=1e-4)


def squared_distances(x, centres):
    """(n, k), by brute force in float64."""
    return (x.double()[:, None] - centres.double()).square().sum(-1)


def test_the_nearest_centre_by_brute_force():
    x, centres = torch.randn(4, 50, 9) + 1000, torch.randn(30, 9) + 1000  # an offset that float32 would stumble over
    expected = squared_distances(x.reshape(200, 9), centres).argmin(1)
    x_hat, active = fidelity.through_centres(centres, x)
    assert torch.equal(fidelity.nearest(centres, x).flatten(), expected) and torch.equal(x_hat.reshape(200, 9), centres[expected])
    assert active.shape == (4, 50) and (active == 1).all()
    members = fidelity.membership(centres, x[0])
    assert members.shape == (50, 30) and torch.equal(members.argmax(1), expected[:50]) and (members.sum(1) == 1).all()


def test_kmeans_never_gets_worse_and_ends_at_means(fresh_seed):
    x, index = torch.randn(900, 5) * torch.tensor([5.0, 3, 1, 1, 1]) - 30, torch.randperm(900)[:700]
    after = [fidelity.kmeans(x, index, 25, fresh_seed, iterations=n, chunk=64) for n in (*range(1, 7), 100)]
    errors = [squared_distances(x[index], centres).amin(1).sum().item() for centres in after]
    assert all(b <= a * (1 + 1e-6) for a, b in zip(errors, errors[1:], strict=False)) and errors[-1] < 0.97 * errors[0]
    own = squared_distances(x[index], after[-1]).argmin(1)
    means = torch.stack([x[index][own == c].double().mean(0) for c in range(25)])
    assert squared_distances(x[index], means).amin(1).sum() > 0.97 * errors[-1]  # nothing much is left to gain
    assert torch.equal(after[2], fidelity.kmeans(x, index, 25, fresh_seed, iterations=3, chunk=64))
    assert not torch.equal(after[2], fidelity.kmeans(x, index, 25, fresh_seed + 1, iterations=3, chunk=64))
    x[index] = torch.nan
    assert not fidelity.kmeans(x, (~x.isnan().any(1)).nonzero().flatten(), 25, fresh_seed).isnan().any()  # rows that were not asked for have no say


def test_kmeans_finds_clusters_that_lie_apart(fresh_seed):
    true = torch.randn(12, 6) * 1000
    x = true.repeat_interleave(40, 0) + torch.randn(480, 6)
    found = fidelity.kmeans(x, torch.randperm(480), 12, fresh_seed)
    means = x.double().reshape(12, 40, 6).mean(1)
    distance = squared_distances(means, found)
    assert distance.amin(1).max() < 1e-3 and len(distance.argmin(1).unique()) == 12
    assert len(fidelity.kmeans(x, torch.arange(480), 12, fresh_seed, most=100)) == 12


def test_a_centre_without_rows_moves_to_where_one_is_needed(monkeypatch, fresh_seed):
    x = torch.cat([torch.randn(100, 3), torch.randn(40, 3) + 500])
    monkeypatch.setattr(torch, "multinomial", lambda weights, n, generator: torch.zeros(n, dtype=torch.long))  # all start at one row
    once = fidelity.kmeans(x, torch.arange(140), 2, fresh_seed, iterations=1)
    assert squared_distances(x, once).amin().item() < 1e-6  # a row, where all others went to the mean
    found = fidelity.kmeans(x, torch.arange(140), 2, fresh_seed)
    assert squared_distances(torch.stack([x[:100].mean(0), x[100:].mean(0)]), found).amin(1).max() < 1e-3


def test_as_many_centres_as_rows_are_the_rows(fresh_seed):
    x = torch.randn(50, 4)
    found = fidelity.kmeans(x, torch.arange(0, 50, 2), 99, fresh_seed)
    assert found.shape == (25, 4) and squared_distances(x[::2], found).amin(1).max() < 1e-9
    same = fidelity.kmeans(torch.ones(30, 4), torch.arange(30), 8, fresh_seed)  # fewer different rows than centres
    assert same.shape == (8, 4) and (same - 1).abs().max() < 1e-5


def test_what_watches_does_not_judge(fresh_seed):
    document = torch.randint(0, 60, (500,))
    held_out = document % 2 == 0
    watched, judging, apart = fidelity.watch_and_judge(held_out, document.numpy(), 0.2, fresh_seed)
    assert apart and torch.equal(watched | judging, held_out) and not (watched & judging).any()
    seen = set(document[watched].tolist())
    assert not seen & set(document[judging].tolist()) and len(seen) == round(0.2 * len(document[held_out].unique()))
    again = fidelity.watch_and_judge(held_out, document, 0.2, fresh_seed)
    assert torch.equal(again[0], watched) and torch.equal(again[1], judging)
    assert any(not torch.equal(fidelity.watch_and_judge(held_out, document, 0.2, fresh_seed + i)[0], watched) for i in range(1, 5))
    two = (document == 4) | (document == 8)
    for share in (0.001, 0.999):
        watched, judging, apart = fidelity.watch_and_judge(two, document, share, fresh_seed)
        assert apart and watched.any() and judging.any()
    watched, judging, apart = fidelity.watch_and_judge(document == 4, document, 0.1, fresh_seed)
    assert not apart and torch.equal(watched, document == 4) and torch.equal(judging, document == 4)


@pytest.mark.parametrize("norm_scale", [0.0, 4.0])
def test_the_untrained_sae_has_the_l0_and_the_best_scale(norm_scale, sae):
    sae.norm_scale = norm_scale
    x = torch.randn(3000, 16) * 2 + sae.mean
    fresh = fidelity.untrained(sae, sae.mean, x, torch.arange(3000), l0=7.3, seed=5)
    acts = fresh.encode(x[:1500])
    assert fresh.d_sae == sae.d_sae and (acts > 0).sum(1).float().mean().item() == pytest.approx(7.3, rel=0.03)
    x_unit = fresh.normalise(x)[0]
    error = lambda scale: (fresh.decode_unit(fresh.encode_unit(x_unit)) * scale - x_unit).square().sum()
    assert error(1.0) < error(0.9) and error(1.0) < error(1.1)
    assert not torch.equal(fresh.W_dec, sae.W_dec)


def test_intervals_by_hand(fresh_seed):
    sums = torch.rand(30, 2, dtype=torch.float64) + 0.5
    drawn = fidelity.redrawn(sums, 4000, fresh_seed)
    assert torch.allclose(drawn[0], sums.sum(0)) and (drawn[1:] != drawn[0]).any()
    ratio = drawn[1:, 0] / drawn[1:, 1]
    # the delta method's standard error of a ratio of sums
    r = (sums[:, 0].sum() / sums[:, 1].sum()).item()
    error = (sums[:, 0] - r * sums[:, 1]).std(correction=0).item() / math.sqrt(30) / sums[:, 1].mean().item()
    assert ratio.std().item() == pytest.approx(error, rel=0.12) and ratio.mean().item() == pytest.approx(r, abs=4 * error / math.sqrt(30))
    same = fidelity.redrawn(torch.ones(10, 1, dtype=torch.float64), 50, fresh_seed)
    assert (same == 10).all()  # as many documents in every draw


def test_documents_not_windows_are_drawn(model, tokenizer, sae, windows):
    alone, _ = measured(model, tokenizer, sae, windows, torch.zeros(16))
    together, _ = measured(model, tokenizer, sae, windows, torch.zeros(16), document=torch.zeros(len(windows), dtype=torch.long))
    assert together["sae"]["ce"][0] == pytest.approx(alone["sae"]["ce"][0]) and len(set(together["sae"]["ce"])) == 1  # one document: no spread to see
    value, low, high = alone["sae"]["ce"]
    assert low < value < high


def test_recovered_by_hand():
    assert fidelity.recovered(2.0, 2.25, 3.0) == pytest.approx(0.75)
    assert fidelity.recovered(2.0, 2.25, 2.009) is None and fidelity.recovered(2.0, 2.5, 1.5) is None
    assert math.isclose(fidelity.recovered(1.0, 1.0, 4.0), 1.0)


def test_a_ratio_that_says_nothing_is_said_so():
    sums = torch.zeros(4, 3, 5, dtype=torch.float64)
    sums[:, 0, 0], sums[:, :, 1], sums[:, :, -1] = 2.0, torch.tensor([0.0, 0.3, 0.001]), 1  # clean, sae, zero
    rows = {"sae": torch.ones(4, 6, dtype=torch.float64)}
    names = ["clean", "sae", "zero", "mean"]
    sums = torch.cat([sums, sums[:, 2:]], 1)
    table = fidelity.table(names, sums, rows, n=20)
    assert table["sae"]["ce_recovered"] is None and table["sae"]["ce_increase"][0] == pytest.approx(0.3)
    lines = fidelity.cells(table)
    assert lines[0] == ["", "untouched", "this\nSAE", "mean", "zero"]
    assert ["CE recovered, zero", "", "says nothing", "", ""] in lines and ["increase of CE", "", *(f"+{v}\n{v} to {v}" for v in ("0.300", "0.0010", "0.0010"))] in lines
    assert ["FVU", "", "1.000\n1.000 to 1.000", "", ""] in lines  # large ones have no fourth digit, small ones do
    near = {"sae": {"fvu": (0.00661, 0.0065, 0.0067), "ce_recovered": (0.99971, 0.9996, 0.9998)}, "pca": {"fvu": (0.3257, 0.32, 0.33), "ce_recovered": (0.6218, 0.62, 0.63)}}
    cell = {line[0]: line[1:] for line in fidelity.cells(near)}
    assert cell["FVU"] == ["0.0066\n0.0065 to 0.0067", "0.326\n0.320 to 0.330"] and cell["CE recovered, zero"] == ["0.9997\n0.9996 to 0.9998", "0.622\n0.620 to 0.630"]
