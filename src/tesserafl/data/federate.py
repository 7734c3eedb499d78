"""From settings to data on clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tesserafl.core import seeds
from tesserafl.core.errors import DataError
from tesserafl.data.columns import KINDS, Columns, choose, read_labels, read_vectors
from tesserafl.data.examples import ClientData, Examples, FederatedData, Kind, Spec
from tesserafl.data.images import read_images
from tesserafl.data.partitions import BY_CLASS, partition, split
from tesserafl.data.settings import DataSettings
from tesserafl.data.sources import read, read_own
from tesserafl.data.tables import Table, sample
from tesserafl.data.text import Tokenizer, blocks, load_tokenizer, padded, read_tokens


@dataclass(frozen=True, kw_only=True)
class Part:
    """The training or the test part, before it is turned into tensors."""

    table: Table
    """its rows"""
    labels: Tensor | None
    """int64 [n], the class of each row; None: there is no label column"""


def load(settings: DataSettings, seed: int) -> FederatedData:
    """The data that the settings describe, spread over clients; equal seeds give equal data.

    Raises DataError if a source, a label, a partition or a value of the settings is unusable.
    """
    whole_train, whole_test = read(settings, seed)
    columns = choose(settings, whole_train)
    train, test, class_names = _parts(settings, seed, columns, whole_train, whole_test)
    public = _public(settings, seed, len(train.table))
    members = _members(settings, seed, train, public)
    is_text = KINDS[columns.task] == "tokens"
    tokenizer = load_tokenizer(settings.tokenizer) if is_text else None
    take_train = _reader(settings, columns, train, tokenizer)
    test_examples = _reader(settings, columns, test, tokenizer)(torch.arange(len(test.table)))
    clients = tuple(
        ClientData(train=take_train(rows), validation=take_train(held_out), test=take_train(own))
        for rows, held_out, own in members
    )
    for client, data in enumerate(clients):
        if len(data.train) == 0:
            raise DataError(
                f"client {client} has no token to predict: its texts are empty; "
                f"remove empty texts from {train.table.origin}"
            )
    shape = tuple(clients[0].train.inputs.shape[1:])
    test_shape = tuple(test_examples.inputs.shape[1:])
    if test_shape != shape:
        raise DataError(
            f"inputs of the test part are {test_shape}, of the training part {shape}; give both "
            f"the same shape (images: --data.image-size)"
        )
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    spec = Spec(
        kind=KINDS[columns.task],
        task=columns.task,
        shape=shape,
        num_classes=vocab_size if columns.task == "causal-lm" else len(class_names),
        class_names=class_names,
        vocab_size=vocab_size,
        pad_id=tokenizer.pad_id if tokenizer else 0,
    )
    return FederatedData(
        spec=spec,
        clients=clients,
        test=test_examples,
        public=take_train(public) if settings.public else None,
    )


def load_own(settings: DataSettings, seed: int, client: int, spec: Spec) -> ClientData:
    """The rows of a participant's own folder, `settings.path`, as one client's data.

    Classes are numbered as in `spec`, which must know them all; the folder need not have all.

    Raises:
        DataError: the folder cannot be read, or its data is not what `spec` says.
    """
    assert settings.path is not None, "own data lies in a folder"
    table = read_own(settings.path)
    columns = choose(settings, table)
    if columns.task != spec.task:
        raise DataError(
            f"{settings.path} is data for {columns.task}, the federation learns {spec.task}; give "
            f"a folder with the same columns as the server's"
        )
    labels = None
    if columns.label is not None and columns.task != "causal-lm":
        labels, _ = read_labels(table, columns.label, spec.class_names)
    part = Part(table=table, labels=labels)
    is_text = KINDS[columns.task] == "tokens"
    tokenizer = load_tokenizer(settings.tokenizer) if is_text else None
    if tokenizer and (tokenizer.vocab_size, tokenizer.pad_id) != (spec.vocab_size, spec.pad_id):
        raise DataError(
            f"the tokenizer here has {tokenizer.vocab_size} tokens and pads with "
            f"{tokenizer.pad_id}, the federation's has {spec.vocab_size} and {spec.pad_id}; give "
            f"the same one (data.tokenizer, or --tokenizer of tessera join)"
        )
    take = _reader(settings, columns, part, tokenizer)
    fractions = {"validation": settings.validation, "test": settings.test}
    rows = split(torch.arange(len(table)), **fractions, seed=seed, client=client)
    train, validation, test = map(take, rows)
    if len(train) == 0:
        raise DataError(f"{settings.path} has nothing to train on; add rows")
    if train.inputs.shape[1:] != spec.shape:
        raise DataError(
            f"inputs in {settings.path} are {tuple(train.inputs.shape[1:])}, the federation's are "
            f"{spec.shape}"
        )
    return ClientData(train=train, validation=validation, test=test)


def kind_of(settings: DataSettings) -> Kind:
    """What the inputs of the settings' data are, without decoding any; raises DataError."""
    return KINDS[choose(settings, read(settings, 0)[0]).task]


def _parts(
    settings: DataSettings, seed: int, columns: Columns, train: Table, test: Table
) -> tuple[Part, Part, tuple[str, ...]]:
    """Both parts, labels checked and rows sub-sampled, and the names of the classes."""
    rows = sample(len(train), settings.max_train, seed, "train")
    test_rows = sample(len(test), settings.max_test, seed, "test")
    labels, test_labels = None, None
    names: tuple[str, ...] = ()
    is_lm = columns.task == "causal-lm"  # then only a partition may read the labels
    if columns.label is not None and (not is_lm or settings.partition in BY_CLASS):
        labels, names = read_labels(train, columns.label)
        labels = labels[rows]
    if columns.label is not None and not is_lm:
        test_labels = read_labels(test, columns.label, names)[0][test_rows]
    return (
        Part(table=train.take(rows), labels=labels),
        Part(table=test.take(test_rows), labels=test_labels),
        () if is_lm else names,
    )


def _public(settings: DataSettings, seed: int, num_rows: int) -> Tensor:
    """Rows that the server holds, ascending; int64 [data.public]."""
    if not 0 <= settings.public < num_rows:
        raise DataError(
            f"data.public={settings.public} must be at least 0 and less than the {num_rows} "
            f"training rows, of which the clients need the rest"
        )
    draw = seeds.generator(seed, "public")
    return torch.randperm(num_rows, generator=draw)[: settings.public].sort().values


def _members(
    settings: DataSettings, seed: int, train: Part, public: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Training, validation and test rows of each client; none of the public ones."""
    free = torch.ones(len(train.table), dtype=torch.bool)
    free[public] = False
    own = free.nonzero().flatten()
    ids = None
    if settings.partition == "column":
        if not settings.partition_column:
            raise DataError(
                f"data.partition=column needs the column that names a row's client; give one of "
                f"{', '.join(train.table.rows.column_names)} with --data.partition-column"
            )
        ids = train.table.column(settings.partition_column).to_pylist()
        if None in ids:
            raise DataError(
                f"{train.table.where(ids.index(None))}: {settings.partition_column!r} is empty; "
                f"fill it or remove the row"
            )
        ids = [ids[row] for row in own.tolist()]
    labels = None if train.labels is None else train.labels[own]
    held = partition(settings, seed, num_rows=len(own), labels=labels, client_ids=ids)
    return [
        split(
            own[rows], validation=settings.validation, test=settings.test, seed=seed, client=client
        )
        for client, rows in enumerate(held)
    ]


def _reader(
    settings: DataSettings, columns: Columns, part: Part, tokenizer: Tokenizer | None
) -> Callable[[Tensor], Examples]:
    """What turns rows of a part into examples; decoding and tokenising happen here, once."""
    column = columns.inputs[0]
    if tokenizer is not None:
        length, pad_id = settings.sequence_length, tokenizer.pad_id
        is_lm = columns.task == "causal-lm"
        tokens = read_tokens(part.table, column, tokenizer, length=length, whole=is_lm)
        if is_lm:
            return lambda rows: blocks([tokens[row] for row in rows.tolist()], length, pad_id)
        inputs = padded(tokens, length, pad_id)
    elif KINDS[columns.task] == "image":
        inputs = read_images(part.table, column, settings.image_size)
    else:
        inputs = read_vectors(part.table, columns.inputs)
    assert part.labels is not None, "a classification without labels"
    return Examples(inputs=inputs, labels=part.labels).take
