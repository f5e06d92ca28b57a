"""Pictures, curves, headers and logs of a run."""

import json

import pytest
import torch
from PIL import Image as Picture

from train.run import report


def test_sample_pictures_put_the_truth_above_the_reconstruction(tmp_path):
    truth = torch.zeros(2, 3, 4, 4)
    ours = torch.ones(2, 3, 4, 4) * 1.5
    truth[1, 0] = 1
    ours[0, 1] = 0
    draw = lambda columns: report.picture(
        {"truth": truth, "ours": ours}, columns, "a title", tmp_path / "deep" / "sample.png"
    )
    draw(["a", "b\n(unseen)"])
    left = report.MARGIN
    top = 4 * report.LINE
    one = report.LEAST
    with Picture.open(tmp_path / "deep" / "sample.png") as picture:
        assert picture.size == (left + 2 * one, top + 2 * one)
        middles = [
            picture.getpixel((left + x * one + one // 2, top + y * one + one // 2))
            for y in (0, 1)
            for x in (0, 1)
        ]
        assert middles == [(0, 0, 0), (255, 0, 0), (255, 0, 255), (255,) * 3]
        ink = lambda box: sum(255 - v for v in picture.convert("L").crop(box).tobytes())
        margin = ink((0, top, left, top + one)), ink((0, top + one, left, top + 2 * one))
        captions = (
            ink((left, top // 3, left + one, top)),
            ink((left + one, top // 3, left + 2 * one, top)),
        )
        assert (
            margin[0] > margin[1] > 0
            and captions[1] > 3 * captions[0] > 0
            and ink((0, 0, one, top // 3)) > 0
        )
    draw(["one file name that is longer than its column is wide, by far", "b"])
    with Picture.open(tmp_path / "deep" / "sample.png") as picture:
        assert ink((0, top // 3, left + 2 * one, top)) > captions[0]


def test_log_drops_later_and_half_rows_and_thins_what_it_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "POINTS", 8)
    file = tmp_path / "log.jsonl"
    with report.Log(file) as log:
        for step in range(1, 41):
            log.write(
                {
                    "step": step,
                    "loss": float("nan") if step == 3 else 1.0,
                    "psnr": 20.0,
                    "seconds": step / 2,
                }
            )
    assert (
        len(file.read_text().splitlines()) == 40
        and json.loads(file.read_text().splitlines()[2])["loss"] is None
    )
    assert len(log.rows) < 16 and log.rows[-1]["step"] == 40
    with file.open("a") as stream:
        stream.write('{"step": 41, "lo')
    with report.Log(file, step=30) as again:
        assert again.seconds == 15.0
        again.write({"step": 31, "loss": 1.0, "psnr": 20.0, "seconds": 16.0})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(
        range(1, 32)
    )


def test_numbers_that_json_does_not_know_become_null():
    assert report.jsonable({"a": float("inf"), "b": float("nan"), "c": 1.5, "d": "x"}) == {
        "a": None,
        "b": None,
        "c": 1.5,
        "d": "x",
    }


def test_what_is_wrong_with_a_log_names_it(tmp_path):
    file = tmp_path / "log.jsonl"
    for damaged in ("{nonsense", "[1]", '{"loss": 1}'):
        file.write_text('{"step": 1, "seconds": 1}\n' + damaged + "\n")
        with pytest.raises(ValueError, match="log.jsonl, line 2 is not a row of a run"):
            report.Log(file, 2)
        assert len(file.read_text().splitlines()) == 2
    file.unlink()
    with (
        pytest.raises(OSError, match="could not write .*log.jsonl: .*No space left"),
        report.Log(file) as log,
    ):
        log.stream.close()
        log.stream = open("/dev/full", "ab", buffering=0)
        log.write({"step": 1, "seconds": 1})


@pytest.mark.parametrize("values", [[], [None], [0.5], [0.5, None, 0.0, 0.25]], ids=str)
def test_curves_of_any_history(tmp_path, values):
    rows = [{"step": i + 1, "loss": v, "l1": v, "psnr": v and 20 + v} for i, v in enumerate(values)]
    report.curves(rows, {"l1": 1.0, "kl": 1e-6}, tmp_path / "curves.png")
    with Picture.open(tmp_path / "curves.png") as picture:
        assert picture.width > 500


@pytest.mark.parametrize("steps", [1, 2, 3, 800])
def test_curves_have_whole_steps_and_a_legend_that_covers_none(tmp_path, monkeypatch, steps):
    figures = []
    plain = report.Figure

    def kept(**size):
        figure = plain(**size)
        figure.clear = lambda: None  # it is looked at afterwards
        figures.append(figure)
        return figure

    monkeypatch.setattr(report, "Figure", kept)
    terms = dict.fromkeys([f"term{i}" for i in range(11)], 1.0)
    rows = [
        {"step": i + 1, "loss": 1.0, "psnr": 20.0} | {name: 0.1 / (i + 1) for name in terms}
        for i in range(steps)
    ]
    report.curves(rows, terms, tmp_path / "curves.png")
    (figure,) = figures
    (legend,) = figure.legends
    renderer = figure.canvas.get_renderer()
    assert len(legend.get_texts()) == 12
    for axes in figure.axes:
        ticks = axes.get_xticks()
        assert (ticks == ticks.round()).all() and axes.get_legend() is None
        assert not legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer))
        assert all(line.get_visible() for line in axes.get_xgridlines())
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 12
