"""Flower: its simulation engine on Ray, FedAvg, one CPU a client, nothing evaluated."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["FLWR_TELEMETRY_ENABLED"] = os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import torch
from common import Bench, torch_logits
from flower_client import client_app
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

FILE = Path(sys.argv[1]).absolute()
server_app = ServerApp()


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """All rounds."""
    net = bench.workload.started_net()

    def end_of_round(number: int, arrays: ArrayRecord) -> MetricRecord:
        bench.tick()  # the first call is before the first round
        if number == bench.total:
            net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord()

    strategy = FedAvg(
        fraction_train=bench.workload.per_round / bench.workload.clients,
        fraction_evaluate=0.0,
        min_available_nodes=bench.workload.clients,
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(net.state_dict()),
        num_rounds=bench.total,
        train_config=ConfigRecord({"file": str(FILE)}),
        evaluate_fn=end_of_round,
    )
    steps = result.train_metrics_clientapp[bench.total]["steps"]
    note = f"{bench.threads} of Ray's workers, one thread each; draws its own cohorts"
    bench.finish(torch_logits(net, bench.workload), steps, note, own_cohorts=True)


if __name__ == "__main__":
    bench = Bench("flower", f"flwr {version('flwr')}", tree=True)
    torch.set_num_threads(bench.threads)
    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=bench.workload.clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0},
            "init_args": {"num_cpus": bench.threads, "include_dashboard": False},
        },
    )
