"""The compiled mixture: used where all members are compiled, and equal to what PyTorch says."""

from __future__ import annotations

import torch
from harness.drawn_models import mixed, needs_kernel, overflows, ragged
from harness.states import state_of, tensors, torch_state
from harness.tiny_models import tiny_config, tiny_gpt
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import BigramLM, BlockDataset, MixtureLM, NGramLM
from charlm.generation import Overflow
from charlm.native.mixture import NativeMixture

pytestmark = needs_kernel
V = 13


def compiled(seed: int = 0, block_size: int = 8) -> MixtureLM:
    ids = torch.randint(V, (300,), generator=torch.Generator().manual_seed(seed))
    return mixed(
        [tiny_gpt(tiny_config("cpu-1min", block_size=block_size)), NGramLM(V, 4).fit(BlockDataset(ids, 4))],
        seed,
    )


@settings(max_examples=40, deadline=None)
@given(rows=ragged(20), overflow=overflows, seed=st.integers(0, 9), block_size=st.sampled_from([1, 2, 8]))
def test_it_says_what_pytorch_says_alone_and_in_a_batch(
    rows: list[list[int]], overflow: Overflow, seed: int, block_size: int
) -> None:
    model = compiled(seed, block_size)
    state = state_of(model, [ids[:1] for ids in rows], overflow=overflow)
    assert isinstance(state.engine, NativeMixture)
    slow = torch_state(model, len(rows), overflow=overflow)
    slow.observe(tensors(rows))
    state.predict()
    state.observe([torch.tensor(ids[1:], dtype=torch.int64) for ids in rows])
    found = state.predict()
    torch.testing.assert_close(found, slow.predict(), rtol=0, atol=1e-5)
    torch.testing.assert_close(state.fork().predict(), found, rtol=0, atol=0)
    for row, ids in enumerate(rows):
        assert torch.equal(state_of(model, [ids], overflow=overflow).predict()[0], found[row])


def test_a_mixture_of_what_is_not_compiled_is_asked_in_pytorch() -> None:
    assert compiled().why_not_native() is None
    model = MixtureLM([compiled().members[0], BigramLM(V)])  # type: ignore[list-item]
    assert model.why_not_native() == "there is no compiled engine for a BigramLM"
    assert not isinstance(model.new_state().engine, NativeMixture)


def test_a_hook_means_pytorch_and_a_gate_that_changes_is_seen() -> None:
    model = compiled()
    state = state_of(model, [[1, 2, 3]])
    first = state.predict()
    with torch.no_grad():
        model.gate.mul_(-1)
    assert not torch.equal(state_of(model, [[1, 2, 3]]).predict(), first)
    with model.register_forward_hook(lambda *_: None):
        assert model.why_not_native() == "a part of the model was changed: the model itself"


def test_what_is_impossible_for_all_members_stays_finite() -> None:
    model = compiled()
    ngram = model.members[1]
    assert isinstance(ngram, NGramLM)
    found = state_of(model, [[1, 2, 3]]).predict()
    assert torch.isfinite(found).all()
