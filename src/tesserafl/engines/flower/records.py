"""Envelopes as Flower's records: the head is a value, every parcel an array of bytes."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from tesserafl.core.errors import MessageError
from tesserafl.engines.orders import Envelope

_HEAD, _PARCELS = "head", "parcels"
_STYPE = "tesserafl.parcel"
"""Flower's name of how an array is written; its own would be pickled or numpy's."""


def to_record(envelope: Envelope) -> RecordDict:
    """The records that carry an envelope."""
    arrays = {
        name: Array("uint8", (len(data),), _STYPE, data) for name, data in envelope.parcels.items()
    }
    return RecordDict({_HEAD: ConfigRecord({"json": envelope.head}), _PARCELS: ArrayRecord(arrays)})


def from_record(record: RecordDict) -> Envelope:
    """The inverse; raises MessageError if other records came."""
    head, arrays = record.get(_HEAD), record.get(_PARCELS)
    json = head.get("json") if isinstance(head, ConfigRecord) else None
    if not isinstance(json, bytes) or not isinstance(arrays, ArrayRecord) or len(record) != 2:
        raise MessageError(f"a message of Flower holds {', '.join(record) or 'nothing'}, no order")
    for name, array in arrays.items():
        if array.stype != _STYPE:
            raise MessageError(f"array {name[:80]!r} of a message is written as {array.stype!r}")
    return Envelope(head=json, parcels={name: array.data for name, array in arrays.items()})
