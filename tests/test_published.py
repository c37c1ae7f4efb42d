"""The comparison with the published systems: what is printed, what is drawn, what is refused."""

import csv
import json

import published
import pytest
from conftest import ROOT
from PIL import Image

import model
from recipes import RECIPES


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder in the place of results/, which holds a run of each recipe that has a row."""
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    for name in (*published.SYSTEMS, "default"):
        recipe = RECIPES[name]
        kept = {
            "recipe": name,
            "dataset": "mnist",
            "note": "",
            "epochs": recipe.epochs,
            "device": "cuda:0",
            "precision": "bf16",
            "threads": 16,
            "parameters": model.count_parameters(model.build(recipe.encoder, recipe.join)),
            "test": {"digit_accuracy": 0.99, "sum_accuracy": 0.8, "both_accuracy": 0.795},
            "train_seconds": 1234.5,
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(kept))
    return tmp_path


def cells(capsys):
    """The table that was printed: recipe -> its other cells."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    rows = [line.strip("| ").split(" | ") for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def test_the_readme_holds_what_is_printed(capsys):
    assert published.main([]) == 0
    assert capsys.readouterr().out in (ROOT / "README.md").read_text()


def test_every_published_recipe_has_its_row(results, capsys):
    assert published.main([]) == 0
    rows = cells(capsys)
    ours = {name for name, recipe in RECIPES.items() if not recipe.about.startswith("published")}
    assert set(rows) == set(RECIPES) - ours | {"default"}
    # 6 x 117,021,564 multiply-adds x 60,000 images x 25 epochs
    mean = "99.00 / 80.00 / 79.50, mean 89.50"
    costs = ["6,888,345", "25", "1.1e15", "1,234 (cuda, bf16)"]
    assert rows["concat-linear"] == ["mean 88.19", mean, *costs]
    assert rows["concat-mlp"][:2] == ["98.96 / 98.83 / –", "99.00 / 80.00 / 79.50"]


def test_a_run_that_is_missing_is_named(results, capsys):
    (results / "added" / "results.json").unlink()
    assert published.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "train.py --recipe added" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "change", [{"epochs": 2}, {"parameters": 5}, {"dataset": "synthetic"}, {"note": "DRY RUN"}]
)
def test_a_run_of_something_else_is_refused(results, capsys, change):
    path = results / "concat-linear" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert published.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and next(iter(change)) in err and err.count("\n") == 1


def test_a_curve_is_drawn_where_there_is_a_run(results, capsys):
    assert published.main(["--curve"]) == 1
    assert "no curve" in capsys.readouterr().err
    with open(results / "concat-mlp" / "metrics.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "test_digit_accuracy", "test_sum_accuracy"])
        writer.writeheader()
        for epoch in range(1, 21):
            writer.writerow(dict(zip(writer.fieldnames, (epoch, 0.98, epoch / 21), strict=True)))
    assert published.main(["--curve"]) == 0
    with Image.open(results / "concat-mlp" / "curve.png") as picture:
        assert picture.width == 1500


def test_the_published_curve_has_an_epoch_a_point_and_ends_at_the_published_figures():
    for head, text in published.CURVE.items():
        points = [float(value) for value in text.split()]
        assert len(points) == RECIPES["concat-mlp"].epochs
        assert points[-1] == getattr(published.SYSTEMS["concat-mlp"], head)
