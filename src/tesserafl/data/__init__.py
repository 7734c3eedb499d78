"""Data: sources, and how they are spread over clients."""

from tesserafl.data.examples import ClientData, Examples, FederatedData, Kind, Spec, Task
from tesserafl.data.federate import kind_of, load, load_own
from tesserafl.data.partitions import PARTITIONS, partition, split
from tesserafl.data.settings import DataSettings
from tesserafl.data.sources import SOURCES
from tesserafl.data.text import ByteTokenizer, HuggingFaceTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "PARTITIONS",
    "SOURCES",
    "ByteTokenizer",
    "ClientData",
    "DataSettings",
    "Examples",
    "FederatedData",
    "HuggingFaceTokenizer",
    "Kind",
    "Spec",
    "Task",
    "Tokenizer",
    "kind_of",
    "load",
    "load_own",
    "load_tokenizer",
    "partition",
    "split",
]
