"""The server app: plays the run of the folder that its run configuration names."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run to its end; what it writes lies in its folder."""
    from tesserafl.engines.flower.post import FlowerPost
    from tesserafl.run.deployed import serve_noted

    folder = str(context.run_config["folder"])
    if not folder:
        raise SystemExit("which run? Give its folder: flwr run APP -c 'folder=\"/runs/mine\"'")
    serve_noted(FlowerPost(grid=grid), Path(folder))
