"""Decoding from a key frame to the wanted frames of a PyAV stream, leaving out what they do not need.

packets, in decoding order    I0  P3  b1  b2  P6  b4  b5  P9 ...     (number: when it is shown; b: none refers to it)
wanted: 5                     I0  P3          P6      b5 |           the decoder holds P6 and b5 back until it gets
                                                                     more, so it is emptied here
"""

from collections.abc import Iterator
from typing import Any

from videogru.data.readers.video.packet_index import Key, PacketTable


class BrokenPromise(Exception):
    """A frame is not where the index says."""


class MaybeHalf(Exception):
    """An emptied decoder gave interlaced frames; the second field of one may have a packet of its own."""


def decode_run(
    container: Any, stream: Any, table: PacketTable, key: Key, places: list[int], *, leave_out: bool, drain: bool
) -> Iterator[Any]:
    """Frames in order of time from `key` on, at least until the packets at `places` gave theirs.

    leave_out: frames that no other refers to and that are not among `places`, as H.264's packets tell; drain: empty the
    decoder after the last of `places`, and end. Raises BrokenPromise, MaybeHalf, or what PyAV does.
    """
    codec = stream.codec_context
    wanted = set(table.pts[places].tolist())
    final, last = max(places), key.pts - 1
    for place, packet in _packets_from(container, stream, table, key):
        if leave_out:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        frames = packet.decode()
        complete = drain and place is not None and place >= final
        if complete:
            rest = codec.decode(None)
            if any(frame.interlaced_frame for frame in rest):
                raise MaybeHalf
            frames += rest
        for frame in frames:
            if frame.pts is not None and frame.pts < key.pts:
                continue
            # After damage, what follows depends on all that was decoded before.
            if frame.is_corrupt or frame.pts is None or frame.pts <= last:
                raise BrokenPromise
            last = frame.pts
            yield frame
        if complete:
            return


def _packets_from(container: Any, stream: Any, table: PacketTable, key: Key) -> Iterator[tuple[int | None, Any]]:
    """(place, packet) from `key`, or some packets before it, on; place: None for packets that hold nothing."""
    for target in (key.pts, key.dts):
        if target is None:
            continue
        container.seek(target, stream=stream, backward=True, any_frame=False)
        packets = container.demux(stream)
        packet = next(packets, None)
        landed = None if packet is None else table.place_of(packet, key.place)
        if landed is not None and landed <= key.place:
            break
    else:
        raise BrokenPromise
    yield landed, packet
    expected = landed + 1
    for packet in packets:
        place = table.place_of(packet, expected)
        # With a damaged index, a seek may find other packets, or these with other stamps.
        if place is None and packet.size and not packet.is_corrupt:
            raise BrokenPromise
        yield place, packet
        expected = expected if place is None else place + 1
