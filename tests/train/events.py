"""TensorBoard event files read back: records of length, checksum, event, checksum."""

from __future__ import annotations

import struct
from pathlib import Path


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each scalar tag, in the order they were written, of all event files below `folder`."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found
