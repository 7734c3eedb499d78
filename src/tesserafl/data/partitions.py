"""Who holds which rows, through the partitioners of flwr-datasets."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tesserafl.core.errors import DataError, did_you_mean
from tesserafl.core.seeds import derive, generator
from tesserafl.data.settings import DataSettings

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

PARTITIONS = {
    "iid": "equal parts of the shuffled rows",
    "dirichlet": "each class is divided in proportions drawn from Dirichlet(data.alpha)",
    "shards": "each client holds rows of data.classes_per_client classes only",
    "column": "each value of data.partition_column is a client; the largest are kept",
    "linear": "client k holds a part proportional to k",
    "square": "client k holds a part proportional to k squared",
    "exponential": "client k holds a part proportional to exp(k)",
}
"""Partition -> one line about it."""

BY_CLASS = ("dirichlet", "shards")
"""Partitions that divide the rows by their labels."""

ADVICE = {
    "iid": "lower data.num_clients",
    "dirichlet": "raise data.alpha, or lower data.min_examples or data.num_clients",
    "shards": "lower data.classes_per_client or data.num_clients",
    "column": "name another column with --data.partition-column",
    "linear": "lower data.num_clients",
    "square": "lower data.num_clients",
    "exponential": "lower data.num_clients (about the logarithm of the rows), or use linear",
}
"""Partition -> what to change when it cannot be made."""


def partition(
    settings: DataSettings,
    seed: int,
    *,
    num_rows: int,
    labels: Tensor | None,
    client_ids: Sequence[object] | None,
) -> tuple[Tensor, ...]:
    """Sorted row numbers (int64 [k]) of each client; no row is given twice.

    `labels` (int64 [num_rows]) are read by dirichlet and shards, `client_ids` [num_rows]
    by column. Raises DataError if a client would be empty.
    """
    kind = settings.partition
    if kind not in PARTITIONS:
        raise DataError(f"data.partition={kind!r} is unknown; {did_you_mean(kind, PARTITIONS)}")
    if settings.num_clients < 1:
        raise DataError(f"data.num_clients must be at least 1; got {settings.num_clients}")
    if kind != "column" and settings.num_clients > num_rows:
        raise DataError(
            f"data.num_clients={settings.num_clients} is more than the {num_rows} training rows; "
            f"lower data.num_clients, or raise data.max_train"
        )
    from datasets import Dataset

    # The partitioners cut in the order of the rows, so a shuffle comes first.
    order = torch.randperm(num_rows, generator=generator(seed, "data", "shuffle"))
    light: dict[str, object] = {"row": order.numpy()}
    if client_ids is not None:
        light["client"] = [client_ids[row] for row in order.tolist()]
    if kind in BY_CLASS:
        if labels is None:
            raise DataError(
                f"data.partition={kind} divides the rows by class, and the data has no label "
                f"column; name one with --data.label-column, or use iid, column or linear"
            )
        light["label"] = labels[order].numpy()
    try:
        partitioner = _partitioner(settings, derive(seed, "data", "partition"))
        partitioner.dataset = Dataset.from_dict(light)
        clients = _rows(partitioner)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"data.partition={kind} of {num_rows} rows over {settings.num_clients} clients: "
            f"{error} To mend it: {ADVICE[kind]}"
        ) from error
    if kind == "column":
        clients = _largest(clients, settings.num_clients)
    for client, rows in enumerate(clients):
        if len(rows) == 0:
            raise DataError(
                f"data.partition={kind} of {num_rows} rows leaves client {client} of "
                f"{len(clients)} without any; {ADVICE[kind]}"
            )
    return clients


def _partitioner(settings: DataSettings, seed: int) -> Partitioner:
    from flwr_datasets import partitioner as flower

    num_clients = settings.num_clients
    if settings.partition == "dirichlet":
        if not (math.isfinite(settings.alpha) and settings.alpha > 0):
            raise DataError(f"data.alpha must be positive and finite; got {settings.alpha}")
        return flower.DirichletPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            alpha=float(settings.alpha),
            min_partition_size=settings.min_examples,
            self_balancing=False,
            seed=seed,
        )
    if settings.partition == "shards":
        if settings.classes_per_client < 1:
            raise DataError(
                f"data.classes_per_client must be at least 1; got {settings.classes_per_client}"
            )
        return flower.PathologicalPartitioner(
            num_partitions=num_clients,
            partition_by="label",
            num_classes_per_partition=settings.classes_per_client,
            class_assignment_mode="first-deterministic",  # no class is left out where avoidable
            seed=seed,
        )
    if settings.partition == "column":
        return flower.NaturalIdPartitioner(partition_by="client")
    by_size = {
        "iid": flower.IidPartitioner,
        "linear": flower.LinearPartitioner,
        "square": flower.SquarePartitioner,
        "exponential": flower.ExponentialPartitioner,
    }
    return by_size[settings.partition](num_partitions=num_clients)


def _rows(partitioner: Partitioner) -> tuple[Tensor, ...]:
    """Row numbers of all clients, without the partitioners' progress bars and retry warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.filterwarnings("ignore", message="The specified min_partition_size")
        warnings.filterwarnings("ignore", message="Classes: .* will NOT be used")
        parts = [partitioner.load_partition(k) for k in range(partitioner.num_partitions)]
    rows = (torch.tensor(part.with_format("numpy")[:]["row"]) for part in parts)
    return tuple(row.long().sort().values for row in rows)


def _largest(clients: tuple[Tensor, ...], most: int) -> tuple[Tensor, ...]:
    """The `most` clients with the most rows, in their order: each stays one natural client."""
    by_size = sorted(range(len(clients)), key=lambda client: -len(clients[client]))
    return tuple(clients[client] for client in sorted(by_size[:most]))


def split(
    rows: Tensor, *, validation: float, test: float, seed: int, client: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Training, validation and test rows of a client, sorted; training is never empty."""
    for name, fraction in (("validation", validation), ("test", test)):
        if not 0.0 <= fraction < 1.0:
            raise DataError(f"data.{name} must be in [0, 1); got {fraction}")
    if validation + test >= 1.0:
        raise DataError(
            f"data.validation + data.test must be below 1, or nothing is left to train on; "
            f"got {validation} + {test}"
        )
    order = torch.randperm(len(rows), generator=generator(seed, "data", "split", client))
    num_held_out = int(len(rows) * validation)
    last = num_held_out + int(len(rows) * test)
    shuffled = rows[order]
    parts = (shuffled[last:], shuffled[:num_held_out], shuffled[num_held_out:last])
    train, held_out, own_test = (part.sort().values for part in parts)
    return train, held_out, own_test
