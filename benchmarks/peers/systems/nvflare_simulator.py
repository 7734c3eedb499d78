"""NVFlare: its FedAvg recipe in the simulator, ten resident sites as the cohort."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from common import Bench
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe.sim_env import SimEnv

HERE = Path(__file__).parent


def main() -> None:
    """Run the job, then read what the first site noted."""
    os.environ["PYTHONPATH"] = str(HERE)  # the sites' processes import `common` too
    bench = Bench("nvflare", f"nvflare {version('nvflare')}", tree=True)
    work = bench.workload
    file = Path(sys.argv[1]).absolute()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        marks = Path(folder) / "marks"
        recipe = FedAvgRecipe(
            name="peers",
            model={"class_path": "nvflare_client.Net", "args": {"file": str(file)}},
            min_clients=work.per_round,
            num_rounds=bench.total + 1,  # the last one only begins
            train_script=str(HERE / "nvflare_client.py"),
            train_args=f"{file} {marks} {os.getpid()}",
        )
        recipe.execute(SimEnv(num_clients=work.per_round, workspace_root=folder))
        lines = [json.loads(line) for line in marks.read_text().splitlines()]
    bench.marked([(line["wall"], line["cpu"]) for line in lines])
    bench.finish(
        lines[-1]["logits"],
        lines[-1]["steps"],
        note="ten resident sites play the cohort; rounds are timed where the first site begins",
        peak=max(line["peak"] for line in lines),
    )


if __name__ == "__main__":
    main()
