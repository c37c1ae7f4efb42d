"""The comparison with the published systems refuses results of something else."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from benchmarks import published_systems


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the results of our runs of the published systems."""
    copy = shutil.copytree(published_systems.PUBLISHED, tmp_path / "results")
    monkeypatch.setattr(published_systems, "PUBLISHED", copy)
    return copy


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_every_published_recipe_has_a_row(results, capsys):
    assert published_systems.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [re.match(r"\| `([\w -]+)` ", line)[1] for line in lines[2:]]
    assert names == [*published_systems.SYSTEMS, "default"]
    rows = {name: line.split(" | ")[1:4] for name, line in zip(names, lines[2:], strict=True)}
    assert rows["concat-linear"][:2] == ["mean 82.88", "99.37 / 70.68 / 70.62, mean 85.03"]
    assert rows["concat-linear --epochs 40"][1].endswith("mean 89.66")
    assert rows["added"][1].endswith(" / – / –")
    assert rows["shared-trunk"][2] == rows["shared-trunk-slow"][2] != "–"
    assert rows["default"][2].endswith("(mean of 5)")
    runs = [json.loads(path.read_text()) for path in results.glob("shared-trunk/seed-*.json")]
    sums = np.array([100 * run["test"]["sum_accuracy"] for run in runs])
    assert len(sums) == 5 and f"/ {sums.mean():.2f} /" in rows["shared-trunk"][1]
    assert f"/ {sums.std(ddof=1):.2f} /" in rows["shared-trunk"][1]


@pytest.mark.parametrize("file", ["concat-mlp/results.json", "shared-trunk/seed-1.json"])
@pytest.mark.parametrize(
    "values", [{"recipe": "added"}, {"dataset": "synthetic"}, {"parameters": 1}]
)
def test_a_run_of_something_else_is_refused(results, capsys, file, values):
    change(results / file, **values)
    assert published_systems.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and next(iter(values)) in err and err.count("\n") == 1


def test_a_run_that_is_too_short_or_has_another_schedule_is_refused(results, capsys):
    metrics = results / "concat-mlp" / "metrics.csv"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:5]))
    assert published_systems.main([]) == 1 and "epochs" in capsys.readouterr().err
    change(results / "added-fixed" / "results.json", epochs=50)
    assert published_systems.main([]) == 1


def test_a_missing_run_is_named(results, capsys):
    (results / "added" / "results.json").unlink()
    assert published_systems.main([]) == 1
    assert "train.py --recipe added" in capsys.readouterr().err


def test_the_curve_is_plotted(results, capsys):
    (results / "concat-mlp" / "curve.png").unlink()
    assert published_systems.main(["--curve"]) == 0
    with Image.open(results / "concat-mlp" / "curve.png") as picture:
        assert picture.width == 1500
