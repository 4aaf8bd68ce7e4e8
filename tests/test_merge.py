"""Runs of a sweep, merged by the hash of their options."""

import csv
import json
import sys

import pytest

from experiments import merge


def make_run(folder, key, rounds, accuracy, finished=True, **options):
    folder.mkdir(parents=True)
    config = {"out": str(folder), "seed": 0, "rounds": rounds, **options}
    (folder / "config.json").write_text(json.dumps({"key": key, "config": config}))
    if finished:
        values = {
            "final": accuracy,
            "mean_of_last_5": None,
            "spread_over_seeds": None,
        }
        systems = {"krum": {"rounds": rounds, "accuracy": values, "loss": None}}
        summary = {"key": key, "how_long": {"rounds": rounds}, "systems": systems}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, arguments)])
    merge.main()


def test_each_run_once_the_longer_of_two(tmp_path, monkeypatch, capsys):
    folders = [
        make_run(tmp_path / "a", "one", 10, 0.5, lr=0.1),
        make_run(tmp_path / "b", "two", 10, 0.6, lr=0.2),
        make_run(tmp_path / "c", "one", 20, 0.7, lr=0.1),
        make_run(tmp_path / "d", "three", 0, 0.0, finished=False, lr=0.3),
        make_run(tmp_path / "e", "four", 10, 0.8, lr=0.4),
        tmp_path / "stray",
    ]
    # Resumed for longer, and not there yet: what it found is that of its first end.
    longer = {"key": "four", "config": {"rounds": 30, "lr": 0.4}}
    (folders[4] / "config.json").write_text(json.dumps(longer))
    folders[5].mkdir()
    out = tmp_path / "merged" / "sweep.csv"
    main(monkeypatch, *folders, "--out", out)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    names = ("key", "lr", "system", "round", "metric", "final")
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("one", "0.1", "krum", "20", "accuracy", "0.7"),
        ("two", "0.2", "krum", "10", "accuracy", "0.6"),
    ]
    assert "seed" not in rows[0]  # in which they do not differ
    said = capsys.readouterr().out
    assert f"not finished: {folders[3]}" in said
    assert f"extended, and not finished: {folders[4]}" in said
    assert f"no run of a study: {folders[5]}" in said
    assert f"the same run as another: {folders[0]}" in said


def test_what_is_no_run(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    only = make_run(tmp_path / "a", "one", 0, 0.0, finished=False)
    with pytest.raises(SystemExit, match=r"none .* finished; no run .*; not finished:"):
        main(monkeypatch, tmp_path / "empty", only)
    damaged = make_run(tmp_path / "b", "one", 10, 0.5)
    (damaged / "summary.json").write_text('{"key": "two", "systems": {}}')
    with pytest.raises(SystemExit, match="is damaged"):
        main(monkeypatch, damaged)
