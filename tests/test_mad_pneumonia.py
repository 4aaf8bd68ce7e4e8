"""The MAD study: a tiny run through the command line's code, its report, bad input."""

import csv
import dataclasses
import io
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from rich.console import Console

import fedjax_sim as fs
from experiments import mad_pneumonia, mad_report, specs
from experiments.mad_pneumonia import PRESETS, Cell, cells, parse
from fedjax_sim.types import Dataset, Examples

NAN = float("nan")
TINY = (
    *("--preset", "demo", "--clients", "5", "--partitions", "iid", "--mad", "mad"),
    *("--attacks", "label_flip", "--aggregators", "fedavg", "--root-size", "10"),
    *("--rounds", "2", "--eval-every", "2", "--segment", "2"),
    *("--engage", "2", "--engage-long", "1"),
)
ENGAGED, LONG = "iid label_flip mad@2", "long label_flip mad@1"
SYSTEMS = ["iid none fedavg", "iid label_flip fedavg", ENGAGED, LONG]
PLOTS = ("client_loss", "client_accuracy", "honest_accuracy", "honest_accuracy_long")


def run(out, *options):
    """The result, and what the terminal showed."""
    jax.devices()  # a study starts JAX with more, where nothing has yet
    console = Console(file=io.StringIO(), width=200)
    config = parse([*TINY, "--out", str(out), *options])
    return mad_pneumonia.run(config, console), console.file.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run, a copy of what it wrote, and the run that adds the long part to it."""
    out = tmp_path_factory.mktemp("runs") / "mad"
    first, _ = run(out, "--long-rounds", "0")
    earlier = shutil.copytree(out, out.parent / "earlier")
    return out, first, earlier, *run(out, "--long-rounds", "4", "--resume")


def metrics(out):
    with (out / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_every_file(finished):
    out, *_, text = finished
    plots = {f"{n}.{suffix}" for n in (*PLOTS, "trust") for suffix in ("png", "pdf")}
    others = {"config.json", "metrics.csv", "summary.json", "summary.md", "clients.npz"}
    assert {p.name for p in out.iterdir()} == plots | others | {"checkpoints", "model"}
    for name in plots:
        head = b"\x89PNG" if name.endswith("png") else b"%PDF"
        assert (out / name).read_bytes().startswith(head)
    assert "breast_cancer, mlp, 5 clients, 5 a round, 1 of all Byzantine" in text
    assert "Test set: label_flip, iid" in text


def test_metrics_and_summary(finished):
    out, _, _, result, _ = finished
    found = {
        (r["system"], int(r["round"]), r["metric"]): float(r["value"])
        for r in metrics(out)
    }
    summary = json.loads((out / "summary.json").read_text())["systems"]
    assert list(summary) == list(result.histories) == SYSTEMS
    for name, history in result.histories.items():
        last = len(history.round)
        assert last == (4 if name == LONG else 2)
        for field in ("accuracy", "auc", "balanced_accuracy"):
            value = getattr(history, field)[-1]
            assert 0.5 < value <= 1
            assert found[name, last, field] == pytest.approx(value)
            assert summary[name][field]["final"] == pytest.approx(value)
        for c, value in enumerate(history.class_specificity[-1]):
            assert found[name, last, f"specificity_{c}"] == pytest.approx(value)
        # Of two classes, that of one is the recall of the other.
        np.testing.assert_array_equal(
            history.class_specificity, history.class_recall[:, ::-1]
        )
        assert {r for n, r, m in found if n == name and m == "auc"} == {2, last}
        assert history.num_byzantine[0] == (name != SYSTEMS[0])


def test_client_records(finished):
    out, _, _, result, _ = finished
    with np.load(out / "clients.npz") as records:
        for name, rounds in ((ENGAGED, 2), (LONG, 4)):
            for field in ("local_loss", "local_accuracy", "trust", "reputation"):
                assert records[f"{name}/{field}"].shape == (rounds, 5)
            local = records[f"{name}/local_loss"]
            np.testing.assert_array_equal(local, result.histories[name].local["loss"])
            assert np.isfinite(local).all(axis=1).tolist() == [False, True] * (
                rounds // 2
            )
            assert np.isfinite(records[f"{name}/trust"]).all()
        assert f"{SYSTEMS[1]}/trust" not in records
        # Engaged in round 2, and in the long part in round 1.
        assert not records[f"{ENGAGED}/flagged"][0].any()
        for name in (ENGAGED, LONG):
            flagged = records[f"{name}/flagged"]
            assert np.all(flagged[1:] >= flagged[:-1])
            assert flagged[-1][records[f"{name}/byzantine"][-1]].all()


def test_summary_has_the_tables_of_the_study(finished):
    out, _, _, result, _ = finished
    text = (out / "summary.md").read_text()
    assert "`python -m experiments.mad_pneumonia --preset demo --out " in text
    for title in (
        "Exclusion: label_flip, iid",
        "The clients' own samples: label_flip, iid",
        "Test set: label_flip, iid",
        "The paper's claims",
    ):
        assert text.count(f"## {title}\n") == 1
    for name in (*PLOTS, "trust"):
        assert f"![{name}]({name}.png)" in text
    assert "| MAD from 2 | 1 of 1, round 2 |" in text
    for label, name in (
        ("fedavg, no attack", SYSTEMS[0]),
        ("fedavg", SYSTEMS[1]),
        ("mad@2", ENGAGED),
    ):
        history = result.histories[name]
        shown = (history.accuracy, history.balanced_accuracy, history.auc)
        values = " | ".join(f"{v[-1]:.3f}" for v in shown)
        assert f"| {label} | {values} |" in text
    benign = result.histories[SYSTEMS[1]].local["loss"][1]
    liar = result.histories[SYSTEMS[1]].byzantine[1]
    means = f"{benign.mean():.3f} | {benign[~liar].mean():.3f}"
    assert f"| never | {means} |" in text
    assert "1 of 1 attackers" in text


def test_a_resumed_run_is_longer_and_otherwise_the_same(finished):
    out, first, earlier, result, text = finished
    assert "resumed partition-0 at round 2" in text
    assert "long: no checkpoint yet, starting at round 0" in text
    rows = metrics(out)
    assert [r for r in rows if r["system"] != LONG] == metrics(earlier)
    assert {int(r["round"]) for r in rows if r["system"] == LONG} == {1, 2, 3, 4}
    keys = [json.loads((p / "config.json").read_text())["key"] for p in (out, earlier)]
    assert keys[0] == keys[1]
    assert list(first.histories) == SYSTEMS[:-1]
    for name, history in first.histories.items():
        longer = result.histories[name]
        jax.tree.map(np.testing.assert_array_equal, history, longer)
    # A part that is left out leaves no plot.
    assert not (earlier / "honest_accuracy_long.png").exists()


def test_another_configuration_is_not_resumed(finished):
    out, *_ = finished
    with pytest.raises(ValueError, match=r"holds the part 'long', which the options"):
        run(out, "--long-rounds", "0", "--resume")
    with pytest.raises(
        ValueError, match=r"another configuration \(held_out: 0.2 -> 0.3\)"
    ):
        run(out, "--held-out", "0.3", "--resume")
    with pytest.raises(ValueError, match=r"already holds a run\. Add --resume"):
        run(out)


# What the report is made of, from histories made by hand


def made(seed=0, seeds=2, rounds=9, cohort=3, clients=7, every=2):
    """A history of several seeds in which clients are rejected now and then."""
    rng = np.random.default_rng(seed)
    shape = (seeds, rounds, cohort)
    ids = np.array([rng.permutation(clients)[:cohort] for _ in range(seeds * rounds)])
    ids = ids.reshape(shape)
    byzantine = np.isin(ids, (1, 3))
    # From round 5 on odd clients are excluded when they come; judged a last time then.
    flagged, scores = np.zeros(shape, bool), rng.random(shape)
    for s in range(seeds):
        gone = set()
        for r, i in itertools.product(range(rounds), range(cohort)):
            client = ids[s, r, i]
            if client in gone or rng.random() < 0.2:  # out, or not finite
                flagged[s, r, i], scores[s, r, i] = True, np.inf
            elif client % 2 and r >= 4:
                gone.add(client)
                flagged[s, r, i] = True
    evaluated = np.arange(1, rounds + 1) % every == 0
    values = np.where(evaluated[None, :, None], rng.random(shape), NAN)
    values[0, 3, 1] = NAN
    nothing = np.full((seeds, rounds), NAN)
    fields = dict.fromkeys(fs.History._fields, nothing)
    return fs.History(
        **fields
        | {
            "round": np.tile(np.arange(1, rounds + 1), (seeds, 1)),
            "client_ids": ids,
            "byzantine": byzantine,
            "flagged": flagged,
            "scores": scores,
            "local": {"loss": values, "accuracy": 1 - values},
            "details": {},
            "defense": {},
        }
    )


def test_rejected_shares_are_for_good_or_of_the_whole_run():
    history = made()
    rates = np.random.default_rng(1).random((2, 9, 2))
    history = history._replace(class_recall=rates, class_specificity=rates)
    cell = mad_pneumonia.Cell("settings", "iid", "label_flip", "mad", 2)
    cells = {"mad": cell, "krum": cell._replace(rule="krum", start=None)}
    names = {name: name for name in cells}
    table = mad_report._metrics_table(names, cells, dict.fromkeys(cells, history))
    assert table.header[-2:] == ("att. out", "hon. out")
    mad, krum = (row[-2:] for row in table.rows)
    liar, out = history.byzantine, history.flagged
    wanted = [f"{100 * out[who].mean():.3g}%" for who in (liar, ~liar)]
    assert list(krum) == wanted
    since, *kinds = mad_report.exclusions(history)
    gone = [f"{100 * (since[who] > 0).mean():.3g}%" for who in kinds]
    assert list(mad) == gone != wanted


@pytest.mark.parametrize("seed", range(5))
def test_exclusions_equal_a_loop(seed):
    history = made(seed)
    since, byzantine, honest = mad_report.exclusions(history)
    assert since.shape == byzantine.shape == honest.shape
    assert since.any()
    assert (since == 0).any()
    for s, client in np.ndindex(since.shape):
        when = [
            r + 1
            for r, i in itertools.product(range(9), range(3))
            if history.client_ids[s, r, i] == client
            and history.flagged[s, r, i]
            and np.isfinite(history.scores[s, r, i])
        ]
        assert since[s, client] == sum(when)
        assert len(when) <= 1
        took_part = (history.client_ids[s] == client).any()
        assert byzantine[s, client] == (client in (1, 3) and took_part)
        assert honest[s, client] == (client not in (1, 3) and took_part)


@pytest.mark.parametrize("who", ["participants", "honest"])
@pytest.mark.parametrize("field", ["loss", "accuracy"])
def test_client_means_equal_a_loop(who, field):
    history = made()
    history.flagged[0, 5] = True  # nobody left
    found = mad_report.client_means(history, field, who)
    for s, r in np.ndindex(found.shape):
        values = []
        for i in range(3):
            out = history.byzantine if who == "honest" else history.flagged
            value = history.local[field][s, r, i]
            if not out[s, r, i] and np.isfinite(value):
                values.append(value)
        expected = sum(values) / len(values) if values else NAN
        np.testing.assert_allclose(found[s, r], expected, rtol=1e-12)
    assert np.isnan(found[:, ::2]).all()  # not evaluated
    assert np.isfinite(found[:, 1::2]).sum() > 4
    assert np.isnan(found[0, 5]) == (who == "participants")


def test_what_the_long_part_says_of_the_last_engagement():
    """Means of both stretches, and their spread over rounds; round 6 is in neither."""
    config = dataclasses.replace(PRESETS["demo"], engage_long=(1, 6))
    early, late = (Cell("long", "iid", "label_flip", "mad", at) for at in (1, 6))
    histories = {early.name: made(1, every=1), late.name: made(2, every=1)}
    named = {cell.name: cell for cell in (early, late)}
    ((claim, text),) = mad_report._long_claims(config, named, histories)
    assert "fluctuate until excluded" in claim
    parts = []
    for cell in (early, late):
        values = mad_report.client_means(histories[cell.name], "accuracy", "honest")
        spans = {"before": values[:, 3:5], "from": values[:, 6:9]}
        spans = {k: v[:, np.isfinite(v).all(axis=0)] for k, v in spans.items()}
        parts.append(f"engaged at {cell.start}: ")
        parts[-1] += ", ".join(
            f"{when} round 6 {v.mean():.3f} (spread {v.std(axis=1).mean():.3f})"
            for when, v in spans.items()
        )
    assert text == "; ".join(parts)
    assert mad_report._long_claims(config, {early.name: early}, histories) == []


# Systems and options


@pytest.mark.parametrize("preset", PRESETS)
def test_every_system_has_a_name_of_its_own(preset):
    config = PRESETS[preset]
    mad_pneumonia.check(config)
    found = cells(config)
    names = [cell.name for cell in found]
    assert len(set(names)) == len(names)
    others = len(set(config.aggregators) | {"fedavg"})
    one = 1 + len(config.attacks) * (others + 1) + len(config.mad) - 1
    more = len(config.engage) - 1  # of the first partition and attack
    long = len(config.engage_long) if config.long_rounds else 0
    assert len(found) == len(config.partitions) * one + more + long
    # Those trained together stand in a row.
    parts = [(cell.part, cell.partition) for cell in found]
    assert len(list(itertools.groupby(parts))) == len(set(parts))


def test_rules_of_the_systems(monkeypatch):
    seen = []
    monkeypatch.setattr(
        specs, "make_aggregator", lambda text, f: seen.append((text, f))
    )
    config = PRESETS["paper"]
    for rule, start in (
        ("mad", 5),
        ("mad(variant='code', measured='all')", 20),
        ("mad:code", 7),
        ("multi_krum", None),
    ):
        mad_pneumonia.make_rule(config, Cell("settings", "iid", "alie", rule, start))
    assert seen == [
        ("mad(start=5)", 2),
        ("mad(variant='code', measured='all', start=20)", 2),
        ("mad(variant='code', start=7)", 2),
        ("multi_krum", 2),
    ]


def changed(**options):
    return dataclasses.replace(PRESETS["demo"], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "--rounds must be at least 1"),
        ({"attackers": 0.0}, "--attackers 0: the study compares rules under attack"),
        ({"attackers": 0.01}, "at least one attacker and one honest client"),
        ({"held_out": 0.0}, r"--held-out must be in \(0, 1\); got 0.0"),
        ({"held_out": 1.0}, r"--held-out must be in \(0, 1\); got 1.0"),
        ({"held_out": NAN}, r"--held-out must be in \(0, 1\); got nan"),
        ({"long_rounds": -1}, "--long-rounds must be >= 0; got -1"),
        *(
            ({flag: value * count}, rf"--{flag} needs one value or more, each once")
            for flag, value in {
                "partitions": ("iid",),
                "attacks": ("alie",),
                "engage": (5,),
                "mad": ("mad",),
            }.items()
            for count in (0, 2)
        ),
        ({"long_rounds": 9, "engage_long": ()}, "--engage-long needs a round, or give"),
        ({"engage_long": (3, 3)}, r"--engage-long repeats a round: \(3, 3\)"),
        ({"attacks": ("alie", "none")}, "--attacks none: FedAvg without an attack is"),
        ({"engage": (5, 0)}, "--engage must be rounds from 1 to 40; got 0"),
        ({"engage": (5, 41)}, "--engage must be rounds from 1 to 40; got 41"),
        (
            {"long_rounds": 9, "engage_long": (3, 10)},
            "--engage-long must be rounds from 1 to 9; got 10",
        ),
        (
            {"mad": ("mad", "mad()")},
            r"--mad repeats one of its values: \('mad', 'mad\(",
        ),
        *(
            ({"mad": ("mad", rule)}, rf"--mad takes mad and its options but start.*{n}")
            for rule, n in (
                ("median", "'median'"),
                ("mad(start=3)", "start=3"),
                ("nnm+mad", "nnm"),
            )
        ),
    ],
)
def test_bad_options_are_refused_before_the_data(options, message, monkeypatch):
    monkeypatch.setattr(fs.data, "load", None)
    with pytest.raises(ValueError, match=message):
        mad_pneumonia.make_phases(changed(**options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "mlpp"}, "unknown model 'mlpp'. Did you mean 'mlp'"),
        ({"partitions": ("idd",)}, "Did you mean 'iid'"),
        ({"aggregators": ("bulyan(max_byzantine=4)",)}, "bulyan needs"),
        ({"mad": ("mad(clusterz=2)",)}, "clusterz"),
        ({"attacks": ("sign_flip(scale=[1, 2])",)}, "one strength at a time"),
    ],
)
def test_bad_names_are_refused_before_the_data(options, message, monkeypatch):
    monkeypatch.setattr(fs.data, "load", None)
    with pytest.raises(ValueError, match=message):
        mad_pneumonia.make_phases(changed(**options))


def test_the_rounds_of_a_part_that_is_left_out_make_no_difference():
    mad_pneumonia.check(changed(long_rounds=0, engage_long=(10_000,)))
    mad_pneumonia.check(changed(long_rounds=0, engage_long=()))


def test_multilabel_data_are_refused(monkeypatch):
    some = Examples(np.zeros((9, 8, 8, 1), np.uint8), np.zeros((9, 2), np.int32))
    data = Dataset("chest", some, some, ("a", "b"), "", "", "multilabel")
    monkeypatch.setattr(fs.data, "load", lambda *args: data)
    with pytest.raises(ValueError, match="--dataset chest has several labels a sample"):
        mad_pneumonia.make_phases(changed(dataset="chest"))


# Where the file is not the published one, its loader says so.
@pytest.mark.filterwarnings("ignore:.*is not the official pneumoniamnist file")
def test_the_paper_preset_on_pneumoniamnist(data_dir):
    if not (data_dir / "medmnist" / "pneumoniamnist.npz").exists():
        pytest.skip("needs medmnist/pneumoniamnist.npz")
    config = dataclasses.replace(PRESETS["paper"], data_dir=data_dir)
    phases, source = mad_pneumonia.make_phases(config)
    assert source
    assert [(p.name, p.num_rounds) for p in phases] == [
        ("partition-0", 100),
        ("partition-1", 100),
        ("long", 1000),
    ]
    names = [name for phase in phases for name in phase.systems]
    assert names == [cell.name for cell in cells(config)]
    sims = [sim for phase in phases for sim in phase.systems.values()]
    iid, uneven, long = (next(iter(phase.systems.values())) for phase in phases)
    train = int(sum(sim.sizes().sum() for sim in (iid.clients, iid.local_test)))
    assert train == 4708 - 100  # the training part without the root dataset
    assert len(iid.test.targets) == 624
    assert iid.num_clients == 10
    sizes = np.asarray(uneven.clients.sizes())
    assert sizes.max() > 2 * sizes.min()
    assert long.clients is iid.clients
    assert {s.num_byzantine for s in sims} == {0, 2}
    assert [s.num_byzantine for s in sims].count(0) == 2
