"""Named experiments: functions that return a configuration, or the rows of a study."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tesserafl.data import DataSettings
from tesserafl.experiments import comparison as _comparison
from tesserafl.experiments import fleet_comparison as _fleet_comparison
from tesserafl.experiments import lora_comparison as _lora_comparison
from tesserafl.experiments import paper_fedbrb as _paper_fedbrb
from tesserafl.experiments import paper_fedfmsl as _paper_fedfmsl
from tesserafl.experiments import paper_flm as _paper_flm
from tesserafl.experiments import paper_msfusion as _paper_msfusion
from tesserafl.experiments import paper_tomtit as _paper_tomtit
from tesserafl.experiments import width_grid as _width_grid
from tesserafl.experiments.quickstart import quickstart
from tesserafl.run.experiment import Experiment


@dataclass(frozen=True, kw_only=True)
class Named:
    """An experiment of `tessera run NAME`."""

    base: Callable[[DataSettings | None], Experiment]
    """The configuration on packaged data, or at the paper's size on other data."""
    rows: Callable[[Experiment, frozenset[str]], Mapping[str, Experiment]] | None = None
    """For a study: its rows, from the configuration that the command line changed and the settings
    that it named, which a study that varies them keeps as they were given."""
    about: str = ""
    """One line; empty: the first of the module's docstring."""

    @property
    def summary(self) -> str:
        """One line about it."""
        return (
            self.about or (sys.modules[self.base.__module__].__doc__ or "").strip().splitlines()[0]
        )


EXPERIMENTS: dict[str, Named] = {
    "quickstart": Named(base=quickstart),
    "comparison": Named(base=_comparison.comparison, rows=_comparison.rows),
    "width_grid": Named(base=_width_grid.width_grid, rows=_width_grid.rows),
    "paper_fedbrb": Named(base=_paper_fedbrb.paper_fedbrb, rows=_paper_fedbrb.rows),
    "fleet_comparison": Named(base=_fleet_comparison.fleet_comparison, rows=_fleet_comparison.rows),
    "lora_comparison": Named(base=_lora_comparison.lora_comparison, rows=_lora_comparison.rows),
    "paper_fedfmsl": Named(base=_paper_fedfmsl.paper_fedfmsl, rows=_paper_fedfmsl.rows),
    "paper_flm": Named(base=_paper_flm.paper_flm, rows=_paper_flm.rows),
    "paper_msfusion": Named(base=_paper_msfusion.paper_msfusion, rows=_paper_msfusion.rows),
    "paper_tomtit": Named(base=_paper_tomtit.paper_tomtit, rows=_paper_tomtit.rows),
}
