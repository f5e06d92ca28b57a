"""Progress lines of a long command whose output is no terminal."""

import io

from tests.helpers.runs import fresh
from train import loop
from train.run.progress import INTERVAL, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines(total: int, seconds: float, due: tuple[int, ...] = (), **options) -> list[str]:
    """The lines of a command that does a step in so many seconds and saves at the steps `due`."""
    stream = io.StringIO()
    now = [100.0]
    with Progress(total, stream=stream, clock=lambda: now[0], **options) as progress:
        for step in range(progress.done + 1, total + 1):
            now[0] += seconds
            progress.update(f"loss {step}", now=step in due)
    assert "\r" not in stream.getvalue()
    return stream.getvalue().splitlines()


def test_a_line_at_most_every_half_minute_and_at_saves_and_at_the_end():
    assert INTERVAL == 30
    shown = [int(line.split()[1].replace(",", "")) for line in lines(1000, 0.25, (500, 501))]
    assert shown == [1, 121, 241, 361, 481, 500, 501, 621, 741, 861, 981, 1000]
    assert len(lines(50, 60.0)) == 50 and lines(5, 1.0, shown=False) == []


def test_a_line_says_how_far_it_is_and_how_long_it_takes():
    first = lines(1004, 2.0, done=1000, unit="object")[0]
    last = lines(1004, 2.0, done=1000, unit="object")[-1]
    assert first == "object 1,001 of 1,004  loss 1001  00:02, 00:06 to go"
    assert last == "object 1,004 of 1,004  loss 1004  00:08, 00:00 to go"


def test_a_terminal_has_a_bar(capsys):
    stream = Terminal()
    with Progress(3, stream=stream) as progress:
        progress.update("loss 1")
        progress.write("a line of its own")
        progress.update("loss 2", now=True)
    assert (
        "\r" in stream.getvalue() and "2/3" in stream.getvalue() and "loss 2" in stream.getvalue()
    )
    assert "step 1 of 3" not in stream.getvalue()
    with Progress(3, stream=(hidden := Terminal()), shown=False) as progress:
        progress.update()
    assert hidden.getvalue() == "" and "a line of its own" in capsys.readouterr().out


def test_a_run_writes_lines_at_its_saves(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loop, "conclude", lambda run: None)
    fresh(tmp_path, "--steps", "5", "--save-every", "3")
    err = capsys.readouterr().err
    assert "\r" not in err and [line.split("  ")[0] for line in err.splitlines()] == [
        f"step {i} of 5" for i in (1, 3, 5)
    ]
    assert "loss" in err and "psnr" in err and "voxels/s" in err and "skipped" not in err
