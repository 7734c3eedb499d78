"""Starts of clients' own."""

from __future__ import annotations

from tesserafl.core.params import sha256
from tesserafl.data.examples import Spec
from tesserafl.methods._starts import own_start
from tesserafl.models import Residual

SPEC = Spec(kind="vector", task="vector-classification", shape=(6,), num_classes=3)


def test_every_client_draws_its_own_and_always_the_same() -> None:
    model = Residual(stream=8, inner=4, blocks=3).build_model(SPEC)
    drawn = [own_start(model, model.whole(), seed, client) for seed, client in PAIRS]
    assert len({sha256(params) for params in drawn} | {sha256(model.init(0))}) == len(PAIRS) + 1
    again = own_start(model, model.whole(), 0, 1)
    assert sha256(again) == sha256(drawn[1])


PAIRS = [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_part_is_initialised_at_its_own_sizes() -> None:
    model = Residual(stream=8, inner=4, blocks=3).build_model(SPEC)
    part = model.slice({"blocks": range(2), "stream": range(4)})
    params = own_start(model, part, 0, 1)
    small = Residual(stream=4, inner=4, blocks=2).build_model(SPEC)
    module = small.module()
    module.load_state_dict(params, strict=True)
    # As wide a spread as a small model's own: 1 / sqrt(4 inputs), not the large one's.
    assert float(params["blocks.0.widen.weight"].abs().max()) > 8**-0.5
