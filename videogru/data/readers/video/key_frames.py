"""Whether decoding may start at a packet that its file marks as a key frame: told from the packet's bytes alone.

  closed group   ... P9 | I12 B10 ...    I12 is an IDR picture: what follows needs nothing before it, and shows after it
  open group     ... P9 | I12 B10 ...    I12 is no IDR picture: B10 shows before it, and needs P9
  intra refresh  ... P9 | P12 P13 ...    no picture is whole by itself; after a group of them all parts were renewed

H.264 and HEVC say it in the types of their NAL units: ITU-T H.264, table 7-1; H.265, table 7-1.
"""

from collections.abc import Iterator

_IDR = {"h264": {5}, "hevc": {19, 20}}
_START = b"\0\0\1"


def starts_anew(codec: str, packet: bytes, extradata: bytes | None) -> bool:
    """Whether a key frame's packet holds an IDR picture; True for other codecs than h264 and hevc, which say nothing.

    extradata: of the stream; tells whether NAL units come after their length, or after start codes.
    """
    idr = _IDR.get(codec)
    if idr is None:
        return True
    units = _after_start_codes(packet)
    # avcC and hvcC begin with version 1, and hold the size of the lengths.
    if extradata and extradata[0] == 1 and len(extradata) > 21:
        units = _after_lengths(packet, 1 + (extradata[21 if codec == "hevc" else 4] & 3))
    return any((first >> 1 & 63 if codec == "hevc" else first & 31) in idr for first in units)


def _after_lengths(packet: bytes, size: int) -> Iterator[int]:
    """The first byte of each NAL unit."""
    place = 0
    while place + size < len(packet):
        length = int.from_bytes(packet[place : place + size], "big")
        yield packet[place + size]
        place += size + max(1, length)


def _after_start_codes(packet: bytes) -> Iterator[int]:
    """The first byte of each NAL unit."""
    place = packet.find(_START)
    while 0 <= place < len(packet) - len(_START):
        yield packet[place + len(_START)]
        place = packet.find(_START, place + len(_START))
