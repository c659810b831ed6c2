"""Makes the videos of the decoder matrix, and writes down what FFmpeg's own tools say is in them.

    python -m tools.data.make_video_matrix [--only NAME ...]

Needs the commands ffmpeg and ffprobe. Writes tests/golden/videos/* (small files; each frame shows its number, see
frame_numbers.py) and tests/golden/video_matrix.json: the commands, and for each file, and for each one in
../shared/data/videos, what these two say of every frame:

    ffprobe -v error -select_streams STREAM -show_entries frame=best_effort_timestamp -of csv=p=0 FILE
    ffmpeg -v error -i FILE -map 0:STREAM -fps_mode passthrough -pix_fmt gray -f rawvideo -    (made files: numbers)
    ffmpeg -v error -noautorotate -i FILE -map 0:STREAM -fps_mode passthrough -f framemd5 -    (real files: check sums)

The files are committed, since encoders differ from version to version; tests read them where there is no FFmpeg.
"""

import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import track

from tools.data.frame_numbers import number_in, paint
from tools.measuring import Parser, exit_code
from videogru.errors import DataError
from videogru.files import atomic_text

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests" / "golden" / "videos"
TRUTH = ROOT / "tests" / "golden" / "video_matrix.json"
SHARED = ROOT.parent / "shared" / "data" / "videos"
_LIMIT_SECONDS = 120


class Case(NamedTuple):
    """How a file is made: IN stands for the numbered frames, `from` for a file that is made first and thrown away."""

    kind: str
    name: str
    encode: str
    frames: int = 48
    then: str = ""
    first: str = "first.mp4"
    size: tuple[int, int] = (96, 64)
    turn: int = 0


X265 = "-c:v libx265 -pix_fmt yuv420p -x265-params log-level=none:keyint=12:bframes=4:scenecut=0"
X265_OPEN = X265 + ":open-gop=1"
X264 = "-c:v libx264 -preset medium -crf 30 -pix_fmt yuv420p -x264-params {}"
_B = "bframes=3:keyint=12:scenecut=0"
_VFR = "-vf select='lt(mod(n\\,7)\\,3)+eq(mod(n\\,11)\\,5)' -fps_mode vfr"

CASES = [
    Case("H.264, GOP 12", "gop12.mp4", X264.format(_B)),
    Case("H.264, GOP 250", "gop250.mp4", X264.format("bframes=3:keyint=250:scenecut=0"), frames=300),
    Case("H.264, open GOP", "open_gop.mp4", X264.format(_B + ":open-gop=1")),
    Case("H.264, open GOP, MKV", "open_gop.mkv", X264.format(_B + ":open-gop=1")),
    Case("H.264, pyramid of B-frames", "pyramid.mp4", X264.format("bframes=8:b-pyramid=normal:keyint=24:b-adapt=0")),
    Case("H.264, intra refresh", "intra_refresh.mp4", X264.format("intra-refresh=1:keyint=12:bframes=0"), frames=60),
    Case("H.264, interlaced", "interlaced.mp4", X264.format("interlaced=1:tff=1:keyint=12") + " -flags +ildct+ilme"),
    Case("cut by stream copy", "cut.mp4", X264.format(_B), 96, "-ss 1.3 -i {} -t 1.5 -c copy"),
    Case("cut by stream copy, open GOP", "cut_open.mp4", X264.format(_B + ":open-gop=1"), 96, "-ss 1.3 -i {} -c copy"),
    Case("cut by stream copy, MKV", "cut.mkv", X264.format(_B), 96, "-ss 1.3 -i {} -t 1.5 -c copy"),
    Case(
        "cut by stream copy, MKV, open GOP",
        "cut_open.mkv",
        X264.format(_B + ":open-gop=1"),
        96,
        "-ss 1.3 -i {} -c copy",
        "first.mkv",
    ),
    Case("cut by stream copy, HEVC open GOP", "cut_hevc.mp4", X265_OPEN, 96, "-ss 1.3 -i {} -c copy -tag:v hvc1"),
    Case("cut by stream copy, MPEG-TS", "cut.ts", X264.format(_B), 64, "-ss 1.3 -i {} -c copy", "first.ts"),
    Case("delayed start (empty edit)", "delayed.mp4", X264.format(_B), 24, "-itsoffset 2.5 -i {} -c copy"),
    Case("variable frame rate", "vfr.mp4", _VFR + " " + X264.format(_B), 96),
    Case("variable frame rate, MKV", "vfr.mkv", _VFR + " " + X264.format(_B), 96),
    Case("start at 7.2 s", "late.mkv", X264.format(_B), 24, "-i {} -c copy -output_ts_offset 7.2"),
    Case("start at 7.2 s, MPEG-TS", "late.ts", X264.format(_B), 24, "-i {} -c copy -output_ts_offset 7.2"),
    Case(
        "no declared frame count: fragmented MP4",
        "fragmented.mp4",
        X264.format(_B) + " -movflags frag_keyframe+empty_moov",
    ),
    Case("no declared frame count: MKV as streamed", "streamed.mkv", X264.format(_B) + " -live 1"),
    Case(
        "MKV, repeated time stamps",
        "equal_times.mkv",
        X264.format("bframes=0:keyint=12")
        + " -vf setpts='floor(N/2)/25/TB' -fps_mode passthrough -enc_time_base 1/1000",
    ),
    Case("AVI, MPEG-4 without B-frames", "plain.avi", "-c:v mpeg4 -g 12 -q:v 6", 36),
    Case("AVI, MPEG-4 with B-frames", "b_frames.avi", "-c:v mpeg4 -g 12 -bf 2 -q:v 6", 36),
    Case("AVI, H.264 with B-frames", "h264.avi", X264.format(_B)),
    Case("AVI, gaps (empty chunks)", "gaps.avi", _VFR + " -c:v mpeg4 -g 12 -q:v 6", 40),
    Case("AVI, Motion JPEG", "mjpeg.avi", "-c:v mjpeg -q:v 12 -pix_fmt yuvj420p", 16),
    Case("MPEG-TS, H.264", "h264.ts", X264.format(_B)),
    Case("MPEG-TS, MPEG-2", "mpeg2.ts", "-c:v mpeg2video -g 12 -bf 2 -q:v 8", 36),
    Case("MPEG program stream", "mpeg2.mpg", "-c:v mpeg2video -g 12 -bf 2 -q:v 8"),
    Case("MPEG-1 elementary stream", "mpeg1.mpeg", "-c:v mpeg1video -g 12 -bf 2 -q:v 8 -f mpeg1video", 30),
    Case("WebM, VP8", "vp8.webm", "-c:v libvpx -g 12 -b:v 60k -auto-alt-ref 1 -lag-in-frames 16 -deadline good"),
    Case(
        "WebM, VP9",
        "vp9.webm",
        "-c:v libvpx-vp9 -g 24 -crf 45 -b:v 0 -auto-alt-ref 1 -lag-in-frames 16 -deadline good -row-mt 0",
    ),
    Case(
        "WebM, VP9, frame-parallel",
        "vp9_parallel.webm",
        "-c:v libvpx-vp9 -g 24 -crf 45 -b:v 0 -frame-parallel 1 -error-resilient 1",
    ),
    Case("AV1, MP4", "av1.mp4", "-c:v libaom-av1 -cpu-used 8 -g 24 -crf 50 -b:v 0 -lag-in-frames 19"),
    Case("AV1, WebM", "av1.webm", "-c:v libsvtav1 -preset 10 -crf 50 -g 24"),
    Case("HEVC", "hevc.mp4", X265 + " -tag:v hvc1"),
    Case("HEVC, open GOP", "hevc_open.mkv", X265_OPEN),
    Case(
        "HEVC, 10 bits",
        "hevc10.mp4",
        "-c:v libx265 -pix_fmt yuv420p10le -x265-params log-level=none:keyint=12:bframes=3:scenecut=0 -tag:v hvc1",
    ),
    Case("H.264, 10 bits", "h264_10.mp4", "-c:v libx264 -crf 30 -pix_fmt yuv420p10le -x264-params " + _B),
    Case(
        "H.264, 4:4:4, odd size",
        "odd_444.mp4",
        "-c:v libx264 -crf 30 -pix_fmt yuv444p -x264-params " + _B,
        size=(97, 65),
    ),
    Case("VP9, odd size", "odd.webm", "-c:v libvpx-vp9 -g 12 -crf 45 -b:v 0 -pix_fmt yuv420p", 30, size=(97, 65)),
    Case("rotated 90", "turn_90.mp4", X264.format(_B), 24, "-i {} -c copy -metadata:s:v rotate=90", turn=3),
    Case("rotated 180", "turn_180.mov", X264.format(_B), 24, "-i {} -c copy -metadata:s:v rotate=180", turn=2),
    Case("rotated 270", "turn_270.mp4", X264.format(_B), 24, "-i {} -c copy -metadata:s:v rotate=270", turn=1),
    Case("FLV", "h264.flv", X264.format(_B)),
    Case("WMV", "wmv2.wmv", "-c:v wmv2 -g 12 -q:v 8"),
    Case("3GP, MPEG-4", "mpeg4.3gp", "-c:v mpeg4 -g 12 -q:v 8 -pix_fmt yuv420p"),
    Case("Ogg Theora", "theora.ogv", "-c:v libtheora -g 12 -q:v 3"),
    Case("AVI, Xvid with packed B-frames", "packed.avi", "-c:v libxvid -bf 2 -g 12 -q:v 8"),
    Case(
        "intra refresh, cut by stream copy",
        "refresh_cut.mkv",
        X264.format("intra-refresh=1:keyint=12:bframes=0"),
        96,
        "-ss 1.3 -i {} -c copy",
        "first.mkv",
    ),
    Case("MPEG-TS across the clock's wrap", "wrap.ts", X264.format(_B), 24, "-i {} -c copy -output_ts_offset 95441.8"),
    Case(
        "cut by stream copy, fragmented MP4",
        "fragmented_cut.mp4",
        X264.format(_B),
        96,
        "-ss 1.3 -i {} -c copy -movflags frag_keyframe",
    ),
    Case(
        "cut by stream copy, MPEG-TS, HEVC open GOP", "hevc_cut.ts", X265_OPEN, 48, "-ss 0.7 -i {} -c copy", "first.ts"
    ),
    Case(
        "cut by stream copy, AV1",
        "av1_cut.mkv",
        "-c:v libaom-av1 -cpu-used 8 -g 24 -crf 50 -b:v 0 -lag-in-frames 19",
        96,
        "-ss 1.3 -i {} -c copy",
        "first.mkv",
    ),
    Case(
        "cut by stream copy, VP9",
        "vp9_cut.webm",
        "-c:v libvpx-vp9 -g 24 -crf 45 -b:v 0 -auto-alt-ref 1 -lag-in-frames 16",
        96,
        "-ss 1.3 -i {} -c copy",
        "first.webm",
    ),
    Case("QuickTime, ProRes", "prores.mov", "-c:v prores_ks -profile:v 0 -q:v 31", 8),
    Case("GIF with uneven delays", "uneven.gif", _VFR, 48),
]


def run(command: Sequence[str], stdin: bytes | None = None) -> bytes:
    """What a command prints. Raises DataError where it fails."""
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, timeout=_LIMIT_SECONDS, check=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{command[0]} is not installed", hint="Install FFmpeg, e.g.: apt-get install ffmpeg"
        ) from error
    if done.returncode:
        raise DataError(f"`{shlex.join(command)}` failed: {done.stderr.decode(errors='replace').strip()[-300:]}")
    return done.stdout


def make(case: Case) -> list[str]:
    """Write the file of a case; returns the commands, as they may be typed again."""
    width, height = case.size
    pictures = [np.rot90(paint(number, width=width, height=height), case.turn) for number in range(case.frames)]
    height, width = pictures[0].shape
    numbered = f"-f rawvideo -pix_fmt gray -video_size {width}x{height} -framerate 25 -i -"
    target = FILES / case.name
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / case.first if case.then else target
        head = ["ffmpeg", "-v", "error", "-y", "-bitexact"]
        # Without versions in the headers, and on one thread, the same FFmpeg makes the same bytes.
        encode = [*head, *shlex.split(numbered), "-threads", "1", *shlex.split(case.encode), "-fflags", "+bitexact"]
        run([*encode, str(first)], b"".join(picture.tobytes() for picture in pictures))
        commands = [shlex.join([*encode, first.name])]
        if case.then:
            then = [*head, *shlex.split(case.then), "-fflags", "+bitexact"]
            run([word.format(first) for word in then] + [str(target)])
            commands.append(shlex.join([*(word.format(first.name) for word in then), target.name]))
    return commands


def shown_stream(path: Path) -> int:
    """Which stream FFmpeg picks by itself."""
    command = ["ffmpeg", "-nostdin", "-i", str(path), "-an", "-sn", "-dn", "-frames:v", "1", "-f", "null", "-"]
    done = subprocess.run(command, capture_output=True, timeout=_LIMIT_SECONDS, check=False)
    found = re.search(r"Stream #0:(\d+) -> #0:0", done.stderr.decode(errors="replace"))
    if found is None:
        raise DataError("FFmpeg finds no video stream", where=path)
    return int(found[1])


def times(path: Path, stream: int) -> tuple[str, list[int | None]]:
    """The time base of a stream, and every frame's time in it, by ffprobe; None where it knows none (AVI)."""
    probe = ["ffprobe", "-v", "error", "-select_streams", str(stream), "-of", "csv=p=0", "-show_entries"]
    base = run([*probe, "stream=time_base", str(path)]).decode().split()[0].strip(",")
    ticks = run([*probe, "frame=best_effort_timestamp", str(path)]).decode().split()
    return base, [None if tick.startswith("N/A") else int(tick.strip(",")) for tick in ticks]


def numbers(path: Path, stream: int) -> list[int]:
    """The number in every frame as ffmpeg decodes it, upright."""
    width, height = (int(side) for side in run(_picture(path, stream, ["-frames:v", "1"], "pgm")).split()[1:3])
    gray = run(_picture(path, stream, ["-pix_fmt", "gray"], "raw"))
    return [number_in(picture) for picture in np.frombuffer(gray, np.uint8).reshape(-1, height, width)]


def _picture(path: Path, stream: int, extra: Sequence[str], form: str) -> list[str]:
    output = {"pgm": ["-c:v", "pgm", "-f", "image2pipe"], "raw": ["-f", "rawvideo"]}[form]
    head = ["ffmpeg", "-v", "error", "-nostdin", "-i", str(path), "-map", f"0:{stream}", "-fps_mode", "passthrough"]
    return [*head, *extra, *output, "-"]


def check_sums(path: Path, stream: int) -> list[str]:
    """The first 8 hexadecimal digits of the MD5 of every frame as stored, in its own pixel format."""
    head = ["ffmpeg", "-v", "error", "-nostdin", "-noautorotate", "-i", str(path), "-map", f"0:{stream}"]
    lines = run([*head, "-fps_mode", "passthrough", "-f", "framemd5", "-"]).decode().splitlines()
    return [line.rsplit(",", 1)[1].strip()[:8] for line in lines if not line.startswith("#")]


def describe(path: Path, *, made: bool) -> dict[str, object]:
    """What FFmpeg's tools say of a file. Raises DataError where they do not agree with each other."""
    stream = shown_stream(path)
    base, ticks = times(path, stream)
    contents = numbers(path, stream) if made else check_sums(path, stream)
    if len(contents) != len(ticks):
        raise DataError(f"ffprobe sees {len(ticks)} frames, ffmpeg {len(contents)}", where=path)
    return {"stream": stream, "time_base": base, "ticks": ticks, "numbers" if made else "sums": contents}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the files, ask FFmpeg, write the truth; the exit code."""
    parser = Parser(prog="make_video_matrix.py", description=__doc__)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="make these files anew, keep the others")
    options = parser.parse_args(arguments)

    def work() -> None:
        truth = json.loads(TRUTH.read_text(encoding="utf-8")) if TRUTH.is_file() else {}
        FILES.mkdir(parents=True, exist_ok=True)
        made: dict[str, object] = {}
        for case in track(CASES, "making", transient=True):
            if options.only and case.name not in options.only and case.name in truth.get("made", {}):
                made[case.name] = truth["made"][case.name]
                continue
            commands = make(case)
            facts = describe(FILES / case.name, made=True)
            made[case.name] = {"kind": case.kind, "commands": commands, **facts}
        real = truth.get("real", {})
        if SHARED.is_dir() and not options.only:
            names = sorted(path for path in SHARED.rglob("*") if path.is_file() and path.name != "LICENSE")
            real = {path.relative_to(SHARED).as_posix(): describe(path, made=False) for path in names}
        version = run(["ffmpeg", "-version"]).decode().split()[2]
        lines = [
            "{",
            f' "ffmpeg": {json.dumps(version)},',
            *_section("made", made, ","),
            *_section("real", real, ""),
            "}",
        ]
        with atomic_text(TRUTH) as file:
            file.write("\n".join(lines) + "\n")
        print(f"{len(made)} files made, {sum(path.stat().st_size for path in FILES.iterdir())} bytes; {TRUTH}")

    return exit_code("make_video_matrix.py", work, kept="what was written before is kept")


def _section(name: str, files: dict[str, object], end: str) -> list[str]:
    """One line per file, so that a change shows as one."""
    rows = [f"  {json.dumps(key)}: {json.dumps(value, separators=(',', ':'))}" for key, value in files.items()]
    return [f' "{name}": {{', ",\n".join(rows), f" }}{end}"]


if __name__ == "__main__":
    sys.exit(main())
