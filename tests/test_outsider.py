"""An architecture and an edit of one's own, in a file of their own, as the README shows them."""

import pytest
import torch
from conftest import HOOK
from quality import known_directions, train

import editing
import fidelity
import sae_utils
import training


class LpPenalty(sae_utils.ReLU):
    """ReLU with a penalty on acts ** p, p below 1: nearer to counting latents than L1 is."""

    name = "lp"

    def tensors(self, d_sae):
        return {"gain": torch.ones(d_sae)}, {}  # a parameter of its own, for good measure

    def train(self, sae, pre_acts):
        return self.acts(sae, pre_acts, slice(None))

    def acts(self, sae, pre_acts, columns):
        return pre_acts.relu() * sae.gain[columns]

    def penalty(self, sae, x_unit, pre_acts, acts, weights):
        return weights["l1_coeff"] * (acts + 1e-3).pow(0.5).sum(-1).mean()


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(sae_utils.ARCHITECTURES, "lp", LpPenalty())


def test_an_architecture_of_ones_own(registered, tmp_path):
    rows, directions, _ = known_directions(6000, d_in=32, n_true=48, active=3)
    index = torch.arange(5000)
    sae = train(rows, index, 4, 400, architecture="lp", l1_weight=0.02, lr=1e-2)
    scores = fidelity.score_rows(sae, rows, torch.arange(5000, 6000))
    plain = fidelity.score_rows(sae_utils.SAE(32, 128).requires_grad_(False), rows, torch.arange(5000, 6000))
    assert scores["fvu"] < 0.3 and scores["l0"] < plain["l0"] / 2 and (sae.gain != 1).all()
    assert not training.has_kernel(sae.rule)
    sae.save(tmp_path / "sae.pth")
    again = sae_utils.SAE.load(tmp_path / "sae.pth")
    assert torch.equal(again.encode(rows[:20]), sae.encode(rows[:20])) and torch.equal(again.gain, sae.gain)
    columns = torch.tensor([3, 100])
    torch.testing.assert_close(again.encode(rows[:20], columns), again.encode(rows[:20])[:, columns])
    latent = int(scores["density"].argmax())
    out = editing.SAEIntervenableMLP(torch.nn.Identity(), again, editing.ablate([latent]))(rows[:20])
    fires = again.encode(rows[:20])[:, latent] > 0
    assert torch.equal((out != rows[:20]).any(1), fires) and fires.any()


def swap(one, other):
    """Each of two latents fires as strongly as the other one would have."""
    return editing.Edit([one, other], lambda acts: acts.flip(-1))


def test_an_edit_of_ones_own(model, tokenizer, sae):
    ids = torch.tensor([[3, 5, 6, 7, 8]])
    with editing.intervene(model, HOOK, sae, tokenizer, [(swap(3, 17), "prompt"), (lambda acts: acts * 0.9, [2])], keep_acts=True) as wrapper:
        model(ids)
    acts, expected = wrapper.acts[0], wrapper.acts[0].clone()
    expected[1:, [3, 17]] = acts[1:, [17, 3]]  # BOS is no text
    expected[2] *= 0.9
    assert torch.equal(wrapper.patched[0], expected) and not torch.equal(acts, expected)
    with editing.intervene(model, HOOK, sae, tokenizer, swap(3, 17)):
        alone = model(ids).logits
    with editing.intervene(model, HOOK, sae, tokenizer, lambda acts: swap(3, 17)(acts)):
        torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-4)


def test_an_unknown_architecture_is_told(tmp_path):
    with pytest.raises(sae_utils.UserError, match="there is no architecture 'lp'; there are: relu, topk, batchtopk, matryoshka, jumprelu, gated"):
        sae_utils.SAE(4, 8, architecture="lp")


def test_gradients_by_hand_are_not_used_where_they_would_be_wrong():
    class OtherLoss(sae_utils.BatchTopK):
        def penalty(self, sae, x_unit, pre_acts, acts, weights):
            return acts.sum()

    class OtherJump(sae_utils.JumpReLU):
        def penalty(self, sae, x_unit, pre_acts, acts, weights):
            return acts.sum()

    kernels = {name: training.has_kernel(rule) for name, rule in sae_utils.ARCHITECTURES.items()}
    assert kernels == {"relu": True, "topk": True, "batchtopk": True, "matryoshka": True, "jumprelu": True, "gated": False}
    assert not training.has_kernel(OtherLoss()) and not training.has_kernel(OtherJump()) and not training.has_kernel(LpPenalty())
