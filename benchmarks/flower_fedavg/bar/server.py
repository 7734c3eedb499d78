"""FedAvg for some rounds; writes how long each took."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Timed(FedAvg):
    """Notes when each round is aggregated."""

    ends: list[float]

    def aggregate_train(self, server_round, replies):  # noqa: D102
        result = super().aggregate_train(server_round, replies)
        self.ends.append(time.perf_counter())
        return result


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Two arrays that are the model between them, to all devices and back."""
    config = context.run_config
    half = np.zeros(int(config["mib"]) * (1 << 20) // 8, dtype=np.float32)
    devices = int(config["devices"])
    strategy = Timed(fraction_evaluate=0.0, min_train_nodes=devices, min_available_nodes=devices)
    strategy.ends = []
    while len(list(grid.get_node_ids())) < devices:
        time.sleep(0.2)
    begun = time.perf_counter()
    strategy.start(
        grid=grid, initial_arrays=ArrayRecord([half, half + 1]), num_rounds=int(config["rounds"])
    )
    times = [
        end - start for start, end in zip([begun, *strategy.ends], strategy.ends, strict=False)
    ]
    path = Path(str(config["out"]))
    path.with_suffix(".tmp").write_text(json.dumps(times))
    path.with_suffix(".tmp").rename(path)
