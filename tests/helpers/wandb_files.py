"""Reads the records that Weights & Biases writes in offline mode, which ``wandb sync`` sends."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

_BLOCK = 32768  # of LevelDB's log format
_WHOLE, _LAST = 1, 4


def read_records(path: Path) -> Iterator:
    """Yields the protobuf records of a .wandb file, in their order."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (_WHOLE, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_items(items) -> dict:
    """Returns the values of a history or config record by their names."""
    return {
        item.key or "/".join(item.nested_key): json.loads(item.value_json or "null")
        for item in items
    }
