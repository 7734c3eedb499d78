"""Tomtit's claim: a scheme for every node beats the best fixed periods, in time and in energy.

Reconstructed (docs/methods/tomtit.md): five edges, 40 devices of four classes under a load that
switches, two kinds of backhaul, label skew, adapters on a frozen model; a job ends at a threshold
time. Learn a policy first (`tessera learn paper_tomtit --out policy`), then name it:
`tessera run paper_tomtit --method.policy policy`. With `--method hwamei` its agent takes the row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tesserafl.core.errors import ConfigError
from tesserafl.core.fit import Training
from tesserafl.data import DataSettings, kind_of
from tesserafl.engines.clock import ClockSettings
from tesserafl.experiments.fleet_comparison import fleet_comparison
from tesserafl.experiments.fleet_comparison import rows as baselines
from tesserafl.methods import HierFAVG, Hwamei, Tomtit
from tesserafl.models import FeatureAdapter
from tesserafl.run.experiment import Experiment, name_of


def paper_tomtit(data: DataSettings | None = None) -> Experiment:
    """What the rows share; on texts an adapter on the features of `--model.config FOLDER`."""
    base = fleet_comparison(data)
    method = Tomtit(first_steps=5, first_rounds=1)
    if data is None or kind_of(data) != "tokens":
        return replace(base, method=method)
    return replace(
        base,
        data=replace(base.data, sequence_length=64),
        model=FeatureAdapter(config="bert", prompt=""),
        method=method,
        training=Training(lr=0.3, batch_size=8),
        clock=ClockSettings(horizon_seconds=900.0),
    )


def rows(base: Experiment, asked: frozenset[str]) -> Mapping[str, Experiment]:
    """The learnt scheme and what it must beat.

    Raises:
        ConfigError: the method has no agents.
    """
    method = base.method
    if not isinstance(method, Tomtit | Hwamei):
        raise ConfigError(
            "paper_tomtit measures agents: --method is tomtit or hwamei, or leave it away; "
            "fleet_comparison has the others"
        )
    label = name_of("method", method)
    own = {label if method.policy else f"{label}-unlearnt": base}
    return own | dict(baselines(replace(base, method=HierFAVG(local_steps=5)), asked))
