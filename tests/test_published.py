"""The comparison with the published systems refuses results of something else."""

import json
import re
import shutil
import statistics

import pytest

from benchmarks import published_systems


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the results of our runs of the published systems."""
    copy = shutil.copytree(published_systems.PUBLISHED, tmp_path / "results")
    monkeypatch.setattr(published_systems, "PUBLISHED", copy)
    return copy


def test_every_published_system_has_a_row_with_the_means_of_its_runs(results, capsys):
    assert published_systems.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [re.match(r"\| `([\w -]+)` ", line)[1] for line in lines[2:]]
    rows = {name: line.split(" | ")[1:4] for name, line in zip(names, lines[2:], strict=True)}
    assert rows.keys() >= {*published_systems.SYSTEMS, "default"}
    runs = [json.loads(path.read_text()) for path in results.glob("shared-trunk/seed-*.json")]
    sums = [100 * run["test"]["sum_accuracy"] for run in runs]
    assert len(sums) == 5 and f"/ {statistics.mean(sums):.2f} /" in rows["shared-trunk"][1]
    assert f"/ {statistics.stdev(sums):.2f} /" in rows["shared-trunk"][1]


@pytest.mark.parametrize("file", ["concat-mlp/results.json", "shared-trunk/seed-1.json"])
@pytest.mark.parametrize("name, value", [("recipe", "added"), ("parameters", 1)])
def test_a_run_of_something_else_is_refused(results, capsys, file, name, value):
    path = results / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert published_systems.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "" and name in err and err.count("\n") == 1
