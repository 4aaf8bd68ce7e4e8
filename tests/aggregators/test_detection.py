"""PDRR, ERR and LFR: what they stop, where they fail, and on whose samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim import aggregators as rules
from fedjax_sim import attacks, evaluation, models
from fedjax_sim.types import AggregatorInfo, Examples, RoundContext
from tests.aggregators.bare import play
from tests.aggregators.cases import cohort, context
from tests.aggregators.tiny import ATTACK, samples, simulate
from tests.pages import PAGE, VALIDATION, check
from tests.references import detection as oracle


def page(algorithm):
    return [e for e in PAGE["examples"] if e["algorithm"] == algorithm]


# PDRR: pages, ends and ties -----------------------------------------------------------


@pytest.mark.parametrize("example", page("pdrr"), ids=lambda e: e["id"])
def test_pdrr_examples(example):
    U, given = np.array(example["inputs"]["U"]), dict(example["hyperparameters"])
    base, q = given["base"], given["q"]
    f = given.get("f", given.get("beta", 0))
    index = "rho" if base == "krum" else "counts"
    aggregate, _, info = play(rules.pdrr(f, base, q), U)
    check(
        example["id"],
        delta=aggregate,
        flag=info.flagged,
        **{index: info.details["index"]},
    )
    found = oracle.pdrr(U, f, base, q)
    left = max(0, f - int((~found.keep).sum()))
    results = {
        "delta": found.aggregate,
        "flag": ~found.keep,
        index: found.extra["index"],
        "preaggregate": found.extra["first"],
        "preselected": np.argmax(found.extra["first_weights"]),
        "f_remaining": left,
        "beta_remaining": left,
    }
    check(example["id"], **{name: results[name] for name in example["expected"]})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("q", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("base", ["krum", "trimmed_mean", "median"])
def test_pdrr_with_any_q_equals_the_oracle(base, q, seed):
    U, _, _ = cohort(seed, 11, 40)
    U = U if seed else np.round(U)  # of many ties
    aggregate, _, info = play(rules.pdrr(3, base, q), U)
    expected = oracle.pdrr(U, 3, base, q)
    np.testing.assert_array_equal(~info.flagged, expected.keep)
    np.testing.assert_allclose(info.scores, expected.scores, 1e-5, 1e-6)
    np.testing.assert_allclose(aggregate, expected.aggregate, 1e-4, 1e-5)


def test_ends_of_q():
    U, _, _ = cohort(0, 11, 40)

    def flagged(base, q):
        info = play(rules.pdrr(3, base, q), U)[2]
        return np.asarray(info.flagged), np.asarray(info.details["index"])

    none, rho = flagged("krum", 0.0)
    np.testing.assert_array_equal(none, rho >= 0)
    np.testing.assert_array_equal(flagged("krum", 1.0)[0], rho == 1)
    assert flagged("trimmed_mean", 0.0)[0].all()
    most, counts = flagged("trimmed_mean", 1.0)
    np.testing.assert_array_equal(most, counts == counts.max())
    assert flagged("median", 0.0)[0].all()
    never, counts = flagged("median", 1.0)
    np.testing.assert_array_equal(never, counts == 0)


@pytest.mark.parametrize("d", [7, 4097, 10_001])
def test_equal_signs_correlate_to_exactly_one(d):
    """Also those of rows of other lengths, which q = 1 still flags."""
    rng = np.random.default_rng(d)
    U = rng.normal(size=(13, d))
    U[8:] = 0.01 * U[8] * np.linspace(1, 2, 5)[:, None]
    info = play(rules.pdrr(5, q=1.0), U)[2]
    assert np.flatnonzero(info.flagged).tolist() == [8, 9, 10, 11, 12]
    assert info.scores[8:].tolist() == [1.0] * 5


@pytest.mark.parametrize("d", [501, 4097, 421_642])
def test_equal_signs_correlate_to_exactly_one_in_compiled_code(d):
    """Which contracts and reorders what it multiplies, adds and divides."""
    rule = rules.pdrr(5, q=1.0)
    judge = jax.jit(lambda U: rule.apply(U, (), RoundContext())[2])
    for seed in range(6):
        rng = np.random.default_rng(seed)
        U = rng.normal(size=(13, d))
        U[8] += rng.normal()
        U[8, rng.random(d) < 0.3 * rng.random()] = 0
        U[8:] = 0.01 * U[8] * np.linspace(1, 2, 5)[:, None]
        info = judge(np.float32(U))
        assert np.flatnonzero(info.flagged).tolist() == [8, 9, 10, 11, 12]
        assert info.scores[8:].tolist() == [1.0] * 5


def test_signs_that_are_all_the_same_correlate_with_nothing():
    U = np.array([[1.0, 2.0], [2.0, 1.0], [1.0, 1.5], [-1.0, 1.0], [1.0, -1.0]])
    index = play(rules.pdrr(1), U)[2].details["index"]
    expected = oracle.pdrr(U, 1).extra["index"]
    np.testing.assert_array_equal(index, expected)
    assert sorted(expected) == [0, 0, 0, 0, 1]  # of Krum's choice by definition


def test_values_that_tie_share_what_they_supply():
    counts = play(rules.pdrr(1, "trimmed_mean"), [[1], [1], [5], [9]])[2]
    np.testing.assert_allclose(counts.details["index"], [0.5, 0.5, 0, 1])
    counts = play(rules.pdrr(0, "median"), [[1], [2], [2], [2]])[2]
    np.testing.assert_allclose(counts.details["index"], [0, 2 / 3, 2 / 3, 2 / 3])


@pytest.mark.parametrize("base", ["krum", "trimmed_mean", "median"])
def test_zero_updates_and_one_client(base):
    aggregate, _, info = play(rules.pdrr(1, base), np.zeros((5, 3)))
    assert not aggregate.any()
    assert info.flagged.sum() == (1 if base == "krum" else 5)
    one = np.array([True, False, False])
    aggregate, _, info = play(rules.pdrr(0, base), [[1, -2], [5, 5], [6, 6]], mask=one)
    np.testing.assert_array_equal(aggregate, [1, -2])
    assert info.flagged[0] == (base != "median")
    assert info.weights.any() == (base == "median")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base": "krumm"}, "unknown base of pdrr.*Did you mean 'krum'"),
        ({"base": "fedavg"}, "unknown base of pdrr"),
        ({"q": 1.1}, "pdrr's q"),
        ({"q": -0.1}, "pdrr's q"),
        ({"q": np.nan}, "pdrr's q"),
        ({"max_byzantine": -1}, "pdrr's max_byzantine"),
    ],
)
def test_options_of_pdrr(options, message):
    with pytest.raises(ValueError, match=message):
        rules.pdrr(**{"max_byzantine": 2} | options)


def test_cohorts_of_pdrr():
    entries = [entry for entry in VALIDATION if entry["algorithm"] == "pdrr"]
    assert [(e["args"]["base"], e["ok"]) for e in entries] == [("trimmed_mean", False)]
    for entry in entries:
        rule = rules.pdrr(entry["args"]["beta"], entry["args"]["base"])
        with pytest.raises(ValueError, match="pdrr needs cohort_size"):
            rule.validate(entry["args"]["n"])
    for base, least in [("krum", 9), ("trimmed_mean", 7), ("median", 1)]:
        rules.pdrr(3, base).validate(least)
        with pytest.raises(ValueError, match="pdrr"):
            rules.pdrr(3, base).validate(least - 1)


# PDRR under attack --------------------------------------------------------------------

K, C, D = 50, 20, 2000
BYZANTINE = np.arange(K) >= K - C
ATTACKS = {
    "krum": attacks.fang_krum,
    "trimmed_mean": attacks.fang_trimmed_mean,
    "median": attacks.fang_trimmed_mean,
}


def honest_rows(seed, spread=0.1):
    """All rows as trained: a common direction, and what is each client's own."""
    rng = np.random.default_rng(seed)
    return np.float32(0.02 * rng.normal(size=D) + spread * rng.normal(size=(K, D)))


def crafted(attack, U):
    this = RoundContext(
        byzantine=jnp.asarray(BYZANTINE),
        client_ids=jnp.arange(K),
        key=jax.random.key(0),
    )
    return np.asarray(attack.apply(U, attack.init(U[0], K), this)[0])


def rates(info):
    """FAR, flagged of the honest; MAR, missed of the Byzantine."""
    flagged = np.asarray(info.flagged)
    return flagged[~BYZANTINE].mean(), (~flagged[BYZANTINE]).mean()


@pytest.mark.parametrize("knowledge", ["omniscient", "colluding"])
@pytest.mark.parametrize("base", ATTACKS)
def test_pdrr_finds_all_attackers_and_nobody_else(base, knowledge):
    attack, rule = ATTACKS[base](knowledge=knowledge), rules.pdrr(C, base)
    for seed in range(2):
        U = crafted(attack, honest_rows(seed))
        aggregate, _, info = play(rule, U)
        assert rates(info) == (0, 0)
        rest = U[~BYZANTINE]  # and the base on them, with f' = 0
        if base == "krum":
            assert (rest == aggregate[None]).all(axis=1).any()
        else:
            middle = {"trimmed_mean": np.mean, "median": np.median}[base]
            np.testing.assert_allclose(aggregate, middle(rest, axis=0), 1e-4, 1e-6)


@pytest.mark.parametrize(("beta", "missed"), [(20, 0.0), (10, 0.5)])
def test_a_trimmed_mean_that_cuts_fewer_than_there_are_attackers(beta, missed):
    """Whoever always stands in front of another attacker is never cut."""
    U = honest_rows(0)
    rest = U[~BYZANTINE]
    up = rest.mean(axis=0) < 0
    ends = np.where(up, rest.max(axis=0), rest.min(axis=0))
    steps = 0.01 * np.arange(1, C + 1)[:, None]
    U[BYZANTINE] = ends + np.where(up, steps, -steps)
    info = play(rules.pdrr(beta, "trimmed_mean"), U)[2]
    assert rates(info) == (0, missed)
    assert info.flagged[-10:].all()


@pytest.mark.parametrize("spread", [0.0, 1e-4])
def test_honest_clients_who_agree_are_flagged_and_the_attackers_stay(spread):
    """Krum picks an honest one, with whom the others correlate."""
    U = crafted(attacks.fang_krum(), honest_rows(0, spread))
    aggregate, _, info = play(rules.pdrr(C), U)
    assert rates(info) == (1, 1)
    np.testing.assert_array_equal(aggregate, U[-1])


@pytest.mark.parametrize(
    ("base", "far"),
    [
        ("krum", 1 / K),  # its choice, always
        ("trimmed_mean", 1.0),  # all are cut about as often
        ("median", 0.0),  # and all hold the median about as often
    ],
)
def test_without_an_attack(base, far):
    flagged = play(rules.pdrr(C, base), honest_rows(0))[2].flagged
    assert abs(np.mean(flagged) - far) < 0.001


def test_an_outlier_that_looks_honest_elsewhere_gets_through():
    """Who is flagged in its place takes f' to 0, and nothing is cut any more."""
    rng = np.random.default_rng(0)
    U = rng.normal(size=(10, 100))
    U[0] = np.median(U, axis=0)
    U[0, 0] = 1e6
    assert abs(play(rules.trimmed_mean(1), U)[0][0]) < 10
    aggregate, _, info = play(rules.pdrr(1, "trimmed_mean"), U)
    assert not info.flagged[0]
    assert aggregate[0] > 1e4


# ERR and LFR --------------------------------------------------------------------------


def judged(rule, U, root_scores, **fields):
    U = jnp.asarray(U, jnp.float32)
    params = jnp.asarray(fields.pop("params", np.zeros(U.shape[1])), jnp.float32)
    this = RoundContext(params=params, root_scores=root_scores, **fields)
    return jax.jit(lambda U: rule.apply(U, (), this))(U)


@pytest.mark.parametrize("example", page("err_lfr_union"), ids=lambda e: e["id"])
def test_err_lfr_example(example):
    given = {name: np.array(x) for name, x in example["inputs"].items()}
    f = example["hyperparameters"]["c"]

    def scores(w, np):
        margins = given["X"] @ w
        said = np.where(margins >= 0, 1, -1)
        loss = np.log1p(np.exp(-given["y"] * margins)).mean()
        return loss, np.where(said != given["y"], 1.0, 0.0).mean()

    results = {}
    made = {
        "err": (rules.err, "removed_err", ("error",)),
        "lfr": (rules.lfr, "removed_lfr", ("loss",)),
        "union": (rules.err_lfr, "removed_union", ("error", "loss")),
    }
    for name, (factory, removed, criteria) in made.items():
        aggregate, _, info = judged(
            factory(f), given["U"], lambda w: scores(w, jnp), params=given["w"]
        )
        results |= {f"delta_{name}": aggregate, removed: info.flagged}
        results["err_impact"] = info.details["error_impact"]
        results["loss_impact"] = info.details["loss_impact"]
        check(example["id"], **results)
        found = oracle.rejection(
            given["U"], f, lambda u: scores(given["w"] + u, np), criteria
        )
        check(
            example["id"],
            **{f"delta_{name}": found.aggregate, removed: ~found.keep},
            err_impact=found.extra["error_impact"],
            loss_impact=found.extra["loss_impact"],
        )
    assert set(results) == set(example["expected"])


def test_a_model_without_a_loss_is_the_worst():
    def scores(w):  # no number without the last client, where the mean is 1
        return jnp.where(w[0] > 0.9, jnp.nan, jnp.abs(w[0] - 1)), jnp.zeros(())

    _, _, info = judged(rules.lfr(1), [[0.8], [1.2], [1.0], [-3.0]], scores)
    assert info.flagged.tolist() == [True, False, False, False]
    assert np.isfinite(info.scores).all()
    assert np.isfinite(info.details["loss_impact"]).all()


def test_models_without_one_client_are_compared_though_all_together_are_far_off():
    """Where the impacts are one float, the losses are not."""

    def scores(w):
        far = jnp.abs(w[0] - 3.0) < 1e-3  # the mean of all
        return jnp.where(far, 1e9, jnp.abs(w[0] - 1)), jnp.where(far, 1.0, 0.0)

    _, _, info = judged(rules.lfr(1), [[1.0], [2.0], [3.0], [6.0]], scores)
    assert info.flagged.tolist() == [False, False, False, True]


@pytest.mark.parametrize("rule", [rules.err, rules.lfr, rules.err_lfr])
def test_equal_clients_go_by_index(rule):
    def scores(w):
        return jnp.float32(0.7), jnp.float32(0.25)

    U = cohort(0, 12, 5)[0]
    assert np.flatnonzero(judged(rule(3), U, scores)[2].flagged).tolist() == [0, 1, 2]
    mask = jnp.arange(12) != 1  # who is left out is taken for one of the three
    info = judged(rule(3), U, scores, mask=mask)[2]
    assert np.flatnonzero(info.flagged).tolist() == [0, 1, 2]


def test_the_union_removes_whom_either_removes():
    one, other, both = (jax.jit(r(3, "median").apply) for r in UNION)
    counts = set()
    for seed in range(8):
        U, g0, sizes = cohort(seed, 12, 23)
        this = context(g0, sizes=sizes)
        by_error, by_loss, by_both = (
            np.asarray(apply(U, (), this)[2].flagged) for apply in (one, other, both)
        )
        np.testing.assert_array_equal(by_both, by_error | by_loss)
        assert by_error.sum() == by_loss.sum() == 3
        counts.add(int(by_both.sum()))
    assert counts <= {3, 4, 5, 6}
    assert len(counts) > 1


UNION = (rules.err, rules.lfr, rules.err_lfr)


@pytest.mark.parametrize("rule", UNION)
def test_settings_of_rejection(rule):
    name = rule.__name__
    with pytest.raises(ValueError, match=f"base of {name}.*fedavg, krum, median"):
        rule(1, base="mean")
    with pytest.raises(ValueError, match=f"{name}'s max_byzantine"):
        rule(-1)
    for base, least in [
        ("krum", 10),  # 2f + 3 without one client
        ("trimmed_mean", 8),  # 2f + 1 without one
        ("fedavg", 4),
        ("median", 4),
    ]:
        rule(3, base).validate(least)
        with pytest.raises(ValueError, match=f"{name} leaves out.*at least {least};"):
            rule(3, base).validate(least - 1)
    U = np.ones((3, 2), np.float32)
    for field in ("params", "root_scores"):
        this = RoundContext(params=U[0], root_scores=lambda w: (0.0, 0.0))
        with pytest.raises(ValueError, match=f"{name} needs .*{field}"):
            rule(1).apply(U, (), this._replace(**{field: None}))


# In a simulation ----------------------------------------------------------------------


@pytest.mark.parametrize("rule", [rules.lfr(2), rules.err_lfr(2, "median")])
def test_attackers_are_rejected_on_the_root_dataset(rule):
    sim = simulate(rule, **ATTACK)
    _, history = sim.run(jax.random.key(0), num_rounds=3)
    assert history.tpr.tolist() == [1.0] * 3
    most = 2 if rule.name == "lfr" else 4
    assert ((history.num_flagged >= 2) & (history.num_flagged <= most)).all()
    assert history.accuracy[-1] > 0.9
    with pytest.raises(ValueError, match=f"{rule.name} needs a root dataset"):
        simulate(rule, root=None)


@pytest.mark.parametrize("labels", [1, 3])
def test_a_sample_on_which_the_model_answers_nan_counts_as_wrong(labels):
    """Although its largest output would be that of class 0, or no label above 0."""
    outputs = np.array([[5.0, -1, -1], [-1, np.nan, -1], [-1, -1, -np.inf], [1, 9, -1]])
    classes, told = np.array([0, 1, 0, 1]), np.eye(3, dtype=int)[[0, 1, 0, 1]]
    targets = classes if labels == 1 else told
    task = "classification" if labels == 1 else "multilabel"
    model = models.for_task(
        models.Model(lambda key: jnp.zeros(()), lambda params, x: x + params), task
    )
    root = Examples(jnp.float32(outputs), jnp.int32(targets))
    loss, error = evaluation.make_root_scores(model, root)(jnp.zeros(()))
    assert not np.isfinite(loss)
    # Half are broken. Of the last, the multilabel model says one label too many.
    assert float(error) == pytest.approx(0.5 if labels == 1 else 0.5 + 0.25 / 3)


@pytest.mark.parametrize(("count", "batch"), [(9, 4), (501, 500)])
def test_root_scores_are_those_of_the_root_dataset(count, batch, monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", batch)

    def apply(updates, state, context):
        scores = jnp.stack(context.root_scores(context.params))
        n = len(context.client_ids)
        info = AggregatorInfo(jnp.zeros(n), jnp.ones(n, bool), jnp.zeros(n))
        return jax.tree.map(lambda u: u.mean(axis=0), updates), scores, info

    needs = frozenset({"params", "root_scores"})
    rule = rules.fedavg()._replace(
        init=lambda params, n: jnp.zeros(2), apply=apply, needs=needs, name="spy"
    )
    assert rule.needs_root
    root = samples(count, seed=3)
    sim = simulate(rule, root=root, test=None)
    first, _ = sim.run(jax.random.key(0), num_rounds=1)
    second, _ = sim.run(state=first, num_rounds=1)
    outputs = np.asarray(sim.model.apply(first.params, root.inputs), np.float64)
    shares = np.exp(outputs) / np.exp(outputs).sum(axis=1, keepdims=True)
    loss = -np.log(shares[np.arange(count), root.targets]).mean()
    wrong = (outputs.argmax(axis=1) != root.targets).mean()
    assert 0 < wrong < 1
    np.testing.assert_allclose(second.aggregator, [loss, wrong], rtol=1e-5)
