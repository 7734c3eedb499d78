"""The server app: plays the run, or is the edge, of the folder that its run configuration names."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run to its end, or answer a cloud; what it writes lies in its folder."""
    from tesserafl.engines.flower.post import FlowerPost
    from tesserafl.run.deployed import serve_noted
    from tesserafl.run.edge_host import edge_noted, is_edge

    folder = str(context.run_config["folder"])
    if not folder:
        raise SystemExit("which run? Give its folder: flwr run APP -c 'folder=\"/runs/mine\"'")
    serve = edge_noted if is_edge(Path(folder)) else serve_noted
    serve(FlowerPost(grid=grid), Path(folder))
