"""Three video readers over the files of the matrix: who returns other frames than the ones asked for.

    python -m tools.data.video_matrix [--seconds 60] [--readers decord torchcodec pyav] [--write]

The files and their truth come from tools/data/make_video_matrix.py; real files are read from ../shared/data/videos.
Of each file are asked, by number as users do: 16 frames spread evenly in one call, then 8 single ones, backward.

    decord      VideoReader(FILE, num_threads=1), get_batch([...])
    torchcodec  VideoDecoder(FILE, seek_mode="exact"), get_frames_at([...])
    pyav        videogru's default, open_video(FILE), read([...])

Readers run in processes of their own: one that says nothing for --seconds is ended, which counts as a hang, one that
dies as a crash; the next file gets a new process. With --write the table goes into docs/video.md.
"""

import json
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.data.frame_numbers import number_in
from tools.data.make_video_matrix import FILES, ROOT, SHARED, TRUTH
from tools.measuring import Parser, exit_code, machine, machine_sentence, progress, write_text
from videogru.data.clips import sampling
from videogru.data.readers.video.open import Decoder, check_decoder, open_video
from videogru.errors import ConfigError, DataError

DOCUMENT = ROOT / "docs" / "video.md"
START, END = "<!-- tools/data/video_matrix.py: start -->", "<!-- end -->"
READERS = {"decord": "decord", "torchcodec": "torchcodec, exact", "pyav": "videogru (PyAV)"}
SPREAD, SINGLE = 16, 8
Read = Callable[[list[int]], NDArray[np.uint8]]


# In the process of a reader ---------------------------------------------------------------------------------------


def open_reader(reader: str, path: Path) -> Read:
    """A function from frame numbers to frames (T H W 3), called as the users of each library do."""
    if reader == "decord":
        import decord

        frames = decord.VideoReader(str(path), num_threads=1)
        return lambda indices: np.asarray(frames.get_batch(indices).asnumpy())
    if reader == "torchcodec":
        from torchcodec.decoders import VideoDecoder

        decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1, dimension_order="NHWC")
        return lambda indices: np.asarray(decoder.get_frames_at(indices=indices).data)
    video = open_video(path)
    return lambda indices: video.read(indices).permute(0, 2, 3, 1).numpy()


def asked(count: int) -> list[list[int]]:
    """The calls: one with up to 16 numbers spread evenly, then single ones, backward."""
    positions = np.arange(count, dtype=np.float64)
    spread = sampling.uniform(positions=positions, extent=(0.0, float(count)), num_frames=SPREAD)
    single = sampling.uniform(positions=positions, extent=(0.0, float(count)), num_frames=SINGLE)
    return [spread.tolist(), *([number] for number in reversed(single.tolist()))]


def thumbnail(picture: NDArray[np.uint8]) -> NDArray[np.float64]:
    """32 x 32 gray levels of mean 0 and deviation 1: readers may differ in shade, not in content."""
    small = np.asarray(Image.fromarray(picture).convert("L").resize((32, 32), Image.Resampling.BOX), np.float64)
    standard: NDArray[np.float64] = (small - small.mean()) / max(float(small.std()), 1.0)
    return standard


def thumbnails(path: Path, stream: int) -> NDArray[np.float64]:
    """Of all frames, upright, by a plain decode; tests hold its pixels against FFmpeg's check sums."""
    with av.open(str(path)) as container:
        frames = container.decode(container.streams[stream])
        turned = [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)) for frame in frames]
    return np.stack([thumbnail(np.ascontiguousarray(picture)) for picture in turned])


def wrong_frames(reader: str, path: Path, truth: dict[str, Any]) -> int:
    """How many of the asked frames are not the ones asked for."""
    shown = truth.get("numbers")
    read = open_reader(reader, path)
    known = thumbnails(path, truth["stream"]) if shown is None else None
    wrong = 0
    for numbers in asked(len(truth["ticks"])):
        for number, picture in zip(numbers, read(numbers), strict=True):
            if shown is not None:
                wrong += number_in(picture) != shown[number]
            elif known is not None:
                distances = np.abs(known - thumbnail(picture)).mean(axis=(1, 2))
                wrong += bool(distances[number] > distances.min() + 0.01)
    return wrong


def serve(reader: Decoder, names: Sequence[str]) -> int:
    """One line of JSON for each file; run in a process of its own."""
    files = matrix()
    try:
        check_decoder(reader)
    except ConfigError as error:
        print(json.dumps({"absent": error.what}), flush=True)
        return 0
    for name in names:
        path, truth = files[name]
        try:
            told: dict[str, Any] = {"wrong": wrong_frames(reader, path, truth)}
        except Exception as error:  # noqa: BLE001 (whatever a library raises is its result)
            first = next(iter(str(error).replace(str(path), path.name).strip().splitlines()), "")
            # decord: the time and place in its source before, stray memory after.
            plain = re.sub(r"\[[\d:]+\] \S+: | \(-?\d+ vs\. -?\d+\)", "", first)
            told = {"error": f"{type(error).__name__}: {plain}".removesuffix(": ")}
        print(json.dumps(told), flush=True)
    return 0


# In the tool --------------------------------------------------------------------------------------------------------


def matrix() -> dict[str, tuple[Path, dict[str, Any]]]:
    """{name: (file, what FFmpeg says of it)}."""
    truth = json.loads(TRUTH.read_text(encoding="utf-8"))
    files = {name: (FILES / name, facts) for name, facts in truth["made"].items()}
    return files | {name: (SHARED / name, facts) for name, facts in truth["real"].items() if (SHARED / name).is_file()}


def results(reader: str, names: Sequence[str], limit_seconds: float) -> Iterator[dict[str, Any]]:
    """What a reader did with each file, in order; a process that hangs or dies is replaced."""
    left = list(names)
    while left:
        command = [sys.executable, "-m", "tools.data.video_matrix", "--serve", reader, *left]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT)
        lines: queue.Queue[bytes] = queue.Queue()
        listener = threading.Thread(target=_listen, args=(child, lines), daemon=True)
        listener.start()
        try:
            while left:
                try:
                    line = lines.get(timeout=limit_seconds)
                except queue.Empty:
                    told: dict[str, Any] = {"hang": limit_seconds}
                else:
                    told = json.loads(line) if line else {"crash": child.wait()}
                left.pop(0)
                if "absent" in told:
                    return
                yield told
                if "hang" in told or "crash" in told:
                    break
        finally:
            child.kill()
            child.wait()


def _listen(child: "subprocess.Popen[bytes]", lines: "queue.Queue[bytes]") -> None:
    if child.stdout is not None:
        for line in child.stdout:
            lines.put(line)
    lines.put(b"")


def cell(told: dict[str, Any], count: int) -> str:
    """A result as the table has it."""
    if "wrong" in told:
        return f"**{told['wrong']}** of {count}" if told["wrong"] else "0"
    if "hang" in told:
        return f"**hangs** (> {told['hang']:g} s)"
    if "crash" in told:
        return f"**crash** ({told['crash']})"
    return "**error**"


def table(files: dict[str, tuple[Path, dict[str, Any]]], told: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: a summary, a row for each file, and the errors."""
    heads = [_head(reader) for reader in told]
    lines = ["| file | asked | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(told)]
    errors: list[str] = []
    for row, (name, (_, truth)) in enumerate(files.items()):
        count = sum(map(len, asked(len(truth["ticks"]))))
        cells = []
        for reader, all_told in told.items():
            if len(all_told) < len(files):
                cells.append("not run")
                continue
            cells.append(cell(all_told[row], count))
            if "error" in all_told[row]:
                errors.append(f"- {reader}, `{name}`: {all_told[row]['error'][:160]}")
        kind = f"{truth['kind']}: `{name}`" if "kind" in truth else f"`{name}`"
        lines.append(f"| {kind} | {count} | " + " | ".join(cells) + " |")
    sums = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(told)]
    counts: dict[str, Callable[[dict[str, Any]], bool]] = {
        "files with every frame right": lambda t: t.get("wrong") == 0,
        "files with wrong frames, and nothing said": lambda t: t.get("wrong", 0) > 0,
        "files refused with an error": lambda t: "error" in t,
        "files it hangs or crashes on": lambda t: "hang" in t or "crash" in t,
    }
    for what, holds in counts.items():
        cells = [str(sum(map(holds, t))) if len(t) == len(files) else "not run" for t in told.values()]
        sums.append(f"| {what} | " + " | ".join(cells) + " |")
    parts = ["\n".join(sums), "\n".join(lines)]
    return "\n\n".join([*parts, "The errors:\n\n" + "\n".join(errors)] if errors else parts)


def _head(reader: str) -> str:
    try:
        return f"{READERS[reader]} {version('av' if reader == 'pyav' else reader)}"
    except PackageNotFoundError:
        return READERS[reader]


def write_into(document: Path, text: str) -> None:
    """Replace what stands between the markers. Raises DataError where there are none."""
    old = document.read_text(encoding="utf-8")
    before, found, rest = old.partition(START)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise DataError(f"has no lines {START} and {END}", where=document)
    write_text(document, f"{before}{START}\n{text}\n{END}{after}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the readers, print or write the table; the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--serve"]:
        return serve(cast(Decoder, words[1]), words[2:])
    parser = Parser(prog="video_matrix.py", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="without an answer, after which a reader hangs")
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these files")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.relative_to(ROOT)}")
    options = parser.parse_args(words)
    if options.write and (options.only or len(options.readers) != len(READERS)):
        parser.error("--write wants all files and readers")

    def work() -> None:
        files = {name: entry for name, entry in matrix().items() if options.only is None or name in options.only}
        if not files:
            raise DataError("no such file in the matrix", where=", ".join(options.only or []))
        facts = machine(["python", "-m", "tools.data.video_matrix", *words])
        told: dict[str, list[dict[str, Any]]] = {}
        for reader in options.readers:
            answers = results(reader, list(files), options.seconds)
            told[reader] = [one for _, one in zip(progress(list(files), reader), answers, strict=False)]
        text = f"{table(files, told)}\n\n{machine_sentence(facts)}"
        print(text)
        if options.write:
            write_into(DOCUMENT, text)

    return exit_code("video_matrix.py", work, kept="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
