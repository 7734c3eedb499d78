"""Which data, and how it is spread over the clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which data, and how it is spread over the clients. Values are checked where they are used."""

    source: Literal["digits", "folder", "hub"] = "digits"
    """where the data comes from; data.path, when given, makes it folder"""
    path: Path | None = None
    """a folder with train.parquet or train.csv (test likewise), a data set written by
    save_to_disk, or one folder of image files for each class"""
    name: str = ""
    """name of a data set on the Hugging Face hub"""
    subset: str = ""
    """configuration of a hub data set that has several"""
    task: Literal[
        "auto", "image-classification", "text-classification", "causal-lm", "vector-classification"
    ] = "auto"
    """what is learned; auto reads it off the columns (text without a label is causal-lm)"""
    input_column: str = ""
    """column of the inputs; empty: image, img or text, else every numeric column is a feature"""
    label_column: str = ""
    """column of the classes; empty: label, labels or fine_label"""
    num_clients: int = 20
    """number of clients; with partition=column the largest ones are kept, at most this many"""
    partition: Literal[
        "iid", "dirichlet", "shards", "column", "linear", "square", "exponential"
    ] = "dirichlet"
    """how the training rows are spread over the clients"""
    alpha: float = 0.5
    """concentration of partition=dirichlet; the smaller, the fewer classes a client has"""
    classes_per_client: int = 2
    """classes that each client holds with partition=shards"""
    partition_column: str = ""
    """column that names the client of a row, for partition=column"""
    min_examples: int = 10
    """fewest rows of a client with partition=dirichlet, which draws again until it holds"""
    validation: float = 0.0
    """fraction of each client's rows that it keeps for validation"""
    test: float = 0.0
    """fraction of each client's rows that it keeps for its own test"""
    public: int = 0
    """training rows, drawn at random, that no client gets: public examples that the server holds,
    for methods that look at models there (flm)"""
    max_train: int | None = None
    """use only so many training rows, drawn at random; None: all"""
    max_test: int | None = None
    """use only so many rows of the global test set, drawn at random; None: all"""
    image_size: int | None = None
    """resize images to this height and width; None: as they are, which must be all equal"""
    tokenizer: Path | None = None
    """folder with a Hugging Face tokenizer; None: bytes, with 256 = padding and 257 = end"""
    sequence_length: int = 128
    """tokens in one example"""

    @property
    def resolved_source(self) -> Literal["digits", "folder", "hub"]:
        """The source that is read: a path stands for `folder`."""
        return "folder" if self.path is not None else self.source
