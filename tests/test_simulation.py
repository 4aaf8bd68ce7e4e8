"""The round, the scan and the comparison, against plain loops and each other."""

import dataclasses
import functools
import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import fedjax_sim as fs
from fedjax_sim import evaluation, training
from fedjax_sim import state as state_module
from fedjax_sim.state import ROOT, TRAIN, stream
from fedjax_sim.types import (
    Aggregator,
    AggregatorInfo,
    ClientData,
    ClientInfo,
    Clients,
    DataAttack,
    Examples,
    UpdateAttack,
)
from tests.references import poisoned
from tests.trees import assert_close, assert_equal

N, M, L = 12, 6, 3


def make_clients(sizes=(M,) * N, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, L, sum(sizes)).astype(np.int32)
    inputs = rng.normal(size=(len(targets), 4)).astype(np.float32)
    inputs[:, 0] += 2 * targets
    width = max(sizes)
    indices = np.zeros((len(sizes), width), np.int32)
    mask = np.zeros((len(sizes), width), bool)
    for i, (start, size) in enumerate(
        zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)
    ):
        indices[i, :size] = start + np.arange(size)
        mask[i, :size] = True
    return Clients(*map(jnp.asarray, (inputs, targets, indices, mask)))


def examples(count, seed=1):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, L, count).astype(np.int32)
    inputs = rng.normal(size=(count, 4)).astype(np.float32)
    inputs[:, 0] += 2 * targets
    return Examples(inputs, targets)


def examples_with_nan(count):
    found = examples(count)
    found.inputs[4, 1], found.inputs[7] = np.nan, np.inf
    return found


SHARED = {
    "model": fs.models.mlp((4,), num_classes=L, hidden=()),
    "clients": make_clients(),
    "client_update": fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=3),
    "test": examples(40),
    "root": examples(9, seed=2),
}


def simulate(**options):
    options = {"aggregator": fs.aggregators.fedavg(), **SHARED, **options}
    return fs.Simulation(**options)


def four_systems(**options):
    attacked = {
        "attack": fs.attacks.sign_flip(scale=2.0),
        "num_byzantine": 3,
        **options,
    }
    return {
        "clean": simulate(**options),
        "attacked": simulate(**attacked),
        "fltrust": simulate(aggregator=fs.aggregators.fltrust(), **attacked),
        "dual_system": simulate(
            aggregator=fs.aggregators.dual_system(max_byzantine=3), **attacked
        ),
    }


def spy_rule(seen):
    """FedAvg that records the context it is traced with."""
    rule = fs.aggregators.fedavg()

    def apply(updates, state, context):
        seen.append(context)
        return rule.apply(updates, state, context)

    return rule._replace(apply=apply, name="spy")


def test_one_round_of_fedavg_equals_a_loop_over_clients():
    sim = simulate(clients=make_clients((3, 6, 5, 4) * 3))
    state = sim.init(jax.random.key(0))
    after, metrics = sim.step(state)
    expected = np.zeros(0)
    total, losses = 0.0, []
    train = jax.jit(functools.partial(sim.client_update.apply, sim.model))
    for i in range(N):
        data = sim.clients.gather(jnp.int32(i))
        key = jax.random.fold_in(stream(state, TRAIN), i)
        update, _, info = train(key, state.params, data, (), state.round)
        size = int(data.mask.sum())
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(update)])
        expected = expected + size * flat if expected.size else size * flat
        total += size
        losses.append(float(info.loss))
    got = np.concatenate(
        [
            np.ravel(a - b)
            for a, b in zip(
                jax.tree.leaves(after.params),
                jax.tree.leaves(state.params),
                strict=True,
            )
        ]
    )
    np.testing.assert_allclose(got, expected / total, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(metrics.train_loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics.aggregate_norm, np.linalg.norm(got), rtol=1e-4)
    np.testing.assert_allclose(
        metrics.weights, np.array([3, 6, 5, 4] * 3) / total, rtol=1e-6
    )


def test_training_works_and_evaluation_is_that_of_the_whole_test_set():
    sim = simulate()
    state, history = sim.run(jax.random.key(1), num_rounds=30, eval_every=10)
    assert history.accuracy[-1] > 0.6
    assert history.train_loss[-1] < 0.5 * history.train_loss[0]
    outputs = sim.model.apply(state.params, jnp.asarray(sim.test.inputs))
    np.testing.assert_allclose(
        history.accuracy[-1], np.mean(np.argmax(outputs, 1) == sim.test.targets)
    )
    np.testing.assert_allclose(
        history.loss[-1], np.mean(sim.model.loss(outputs, sim.test.targets)), rtol=1e-5
    )


def test_evaluation_in_batches_with_a_remainder(monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 7)
    _, batched = simulate().run(jax.random.key(1), num_rounds=1)
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", 500)
    _, whole = simulate().run(jax.random.key(1), num_rounds=1)
    np.testing.assert_allclose(batched.accuracy, whole.accuracy, rtol=1e-6)
    np.testing.assert_allclose(batched.loss, whole.loss, rtol=1e-5)


def test_rounds_are_evaluated_every_k_and_at_the_end():
    _, history = simulate().run(jax.random.key(0), num_rounds=7, eval_every=3)
    assert np.flatnonzero(np.isfinite(history.accuracy)).tolist() == [2, 5, 6]
    np.testing.assert_array_equal(np.isnan(history.accuracy), np.isnan(history.loss))
    assert history.round.tolist() == list(range(1, 8))


def test_without_a_test_set_nothing_is_evaluated():
    _, history = simulate(test=None).run(jax.random.key(0), num_rounds=2)
    assert np.isnan(history.accuracy).all()
    assert np.isnan(history.attack_success).all()
    assert history.class_recall.shape == (2, L)
    assert np.isnan(history.class_recall).all()


def trigger_of(shift):
    """A targeted attack on these inputs: class 1 wanted where input 3 is raised."""

    def poison(key, data, context):
        raised = data.inputs.at[:, 3].add(shift)
        return data._replace(inputs=raised, targets=jnp.ones_like(data.targets))

    def trigger(inputs, targets):
        return inputs.at[:, 3].add(shift), jnp.ones_like(targets), targets != 1

    return DataAttack(poison, lambda num_classes: None, "raise", trigger)


def expected_measures(sim, params, attack=None):
    """Class recalls and attack success by plain loops over the test set."""

    def said(inputs):
        outputs = np.asarray(sim.model.apply(params, jnp.asarray(inputs)))
        return [int(np.argmax(row)) for row in outputs]

    targets = np.asarray(sim.test.targets)
    recalls = poisoned.class_recall(said(sim.test.inputs), targets.tolist(), L)
    if attack is None:
        return recalls, np.nan
    inputs, wanted, counts = attack.trigger(
        jnp.asarray(sim.test.inputs), jnp.asarray(targets)
    )
    success = poisoned.success(said(inputs), wanted.tolist(), counts.tolist())
    return recalls, success


@pytest.mark.parametrize("batch", [7, 500])
def test_class_recall_and_attack_success_equal_loops(batch, monkeypatch):
    """Systems with different triggers, with the same one, and with none."""
    monkeypatch.setattr(evaluation, "EVALUATION_BATCH", batch)
    first, second = trigger_of(2.0), trigger_of(-3.0)
    flip = fs.attacks.label_flip(L)
    attacks = {"a": first, "clean": None, "b": second, "a again": first, "flip": flip}
    test = examples(40)
    test = test._replace(targets=np.where(test.targets == 2, 0, test.targets))
    systems = {
        name: simulate(data_attack=attack, num_byzantine=4 if attack else 0, test=test)
        for name, attack in attacks.items()
    }
    states, histories = fs.compare(systems).run(
        jax.random.key(0), num_rounds=3, eval_every=2
    )
    for name, sim in systems.items():
        history, attack = histories[name], attacks[name]
        targeted = attack if attack is not None and attack.trigger else None
        recalls, success = expected_measures(sim, states[name].params, targeted)
        np.testing.assert_allclose(history.class_recall[-1], recalls, rtol=1e-6)
        np.testing.assert_allclose(history.attack_success[-1], success, rtol=1e-6)
        evaluated = np.array([False, True, True])
        known = np.isfinite(history.class_recall)
        assert known[evaluated, :2].all()
        assert not known[~evaluated].any()
        assert not known[:, 2].any()  # no test sample of class 2
        measured = evaluated & (targeted is not None)
        np.testing.assert_array_equal(np.isfinite(history.attack_success), measured)
        counts = np.bincount(test.targets, minlength=L)
        weighted = np.nansum(history.class_recall * counts, axis=1) / counts.sum()
        np.testing.assert_allclose(
            weighted[evaluated], history.accuracy[evaluated], rtol=1e-6
        )


def test_attack_success_with_several_seeds():
    attacked = simulate(data_attack=trigger_of(2.0), num_byzantine=4)
    both = fs.compare({"clean": simulate(), "attacked": attacked})
    keys = jnp.stack([jax.random.key(s) for s in (5, 6)])
    _, histories = both.run(keys, num_rounds=2, eval_every=2)
    assert histories["clean"].class_recall.shape == (2, 2, L)
    for s, key in enumerate(keys):
        _, alone = both.run(key, num_rounds=2, eval_every=2)
        assert_close(jax.tree.map(lambda x, s=s: x[s], histories), alone)


def test_a_backdoor_on_digits_rises_under_fedavg_and_is_measured_right():
    data = fs.data.load("digits")
    clients, _ = fs.data.federate(data, num_clients=20, partition=fs.data.iid())
    attack = fs.attacks.badnets(10, target=4, size=2)
    sim = fs.Simulation(
        model=fs.models.mlp((8, 8, 1), hidden=(16,)),
        clients=clients,
        test=data.test,
        client_update=fs.local_sgd(optax.sgd(0.2), epochs=2, batch_size=10),
        aggregator=fs.aggregators.fedavg(),
        data_attack=attack,
        num_byzantine=8,
    )
    state, history = sim.run(jax.random.key(0), num_rounds=15, eval_every=5)
    # Stamped without the package: two bright rows and columns at the lower right.
    images = np.array(data.test.inputs)
    images[:, 6:, 6:, :] = 255
    outputs = sim.model.apply(state.params, jnp.asarray(images))
    others = np.asarray(data.test.targets) != 4
    success = np.mean(np.argmax(outputs, axis=1)[others] == 4)
    np.testing.assert_allclose(history.attack_success[-1], success, rtol=1e-6)
    untouched = sim.init(jax.random.key(0)).params
    before = np.argmax(sim.model.apply(untouched, jnp.asarray(images)), axis=1)
    assert success > 0.6 > 0.3 > np.mean(before[others] == 4)
    assert history.accuracy[-1] > 0.8  # and nothing shows on clean samples


@pytest.mark.parametrize("cohort", [None, 5])
def test_chunks_do_not_change_the_run(cohort):
    results = [
        simulate(client_chunk=chunk, cohort_size=cohort)
        .run(jax.random.key(0), num_rounds=3)[0]
        .params
        for chunk in (1, 5, 1000)
    ]
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])


def test_segments_are_the_run_bit_for_bit():
    systems = four_systems(cohort_size=9)
    both = fs.compare(systems)
    whole, history = both.run(jax.random.key(3), num_rounds=6, eval_every=2)
    half, first = both.run(jax.random.key(3), num_rounds=3, eval_every=2, last=6)
    rest, second = both.run(num_rounds=3, eval_every=2, states=half, last=6)
    assert_equal(whole, rest)
    assert_equal(
        history, jax.tree.map(lambda a, b: np.concatenate([a, b]), first, second)
    )


def test_steps_are_the_run():
    sim = simulate()
    state = sim.init(jax.random.key(0))
    for _ in range(3):
        state, metrics = sim.step(state)
    final, history = sim.run(jax.random.key(0), num_rounds=3)
    assert_equal(state, final)
    assert_equal(metrics, jax.tree.map(lambda x: x[-1], history))


def test_a_comparison_gives_each_system_its_own_run_in_any_order():
    systems = four_systems(cohort_size=9)
    # Reverse alphabetical order: jax sorts dictionary keys.
    names = sorted(systems, reverse=True)
    states, histories = fs.compare({n: systems[n] for n in names}).run(
        jax.random.key(0), num_rounds=4, eval_every=2
    )
    assert list(states) == list(histories) == names
    for name in ("attacked", "dual_system"):
        sim = systems[name]
        state, history = sim.run(jax.random.key(0), num_rounds=4, eval_every=2)
        assert_close(states[name].params, state.params)
        np.testing.assert_array_equal(histories[name].byzantine, history.byzantine)
        np.testing.assert_array_equal(histories[name].client_ids, history.client_ids)
    attacked, fltrust = histories["attacked"], histories["fltrust"]
    np.testing.assert_array_equal(attacked.client_ids, fltrust.client_ids)
    np.testing.assert_array_equal(attacked.byzantine, fltrust.byzantine)


def test_seeds_side_by_side_are_the_single_runs():
    both = fs.compare(four_systems(cohort_size=9, client_chunk=4))
    keys = jnp.stack([jax.random.key(s) for s in (5, 6)])
    states, histories = both.run(keys, num_rounds=3, eval_every=2)
    assert histories["clean"].accuracy.shape == (2, 3)
    for s, key in enumerate(keys):
        alone, history = both.run(key, num_rounds=3, eval_every=2)
        assert_close(jax.tree.map(lambda x, s=s: x[s], states), alone)
        assert_close(jax.tree.map(lambda x, s=s: x[s], histories), history)
    differ = histories["attacked"].byzantine
    assert (differ[0] != differ[1]).any()
    # One step goes on from several seeds, too.
    states, metrics = both.step(states)
    assert metrics["clean"].round.tolist() == [4, 4]


def test_a_thousand_rounds_of_four_systems_are_one_program_without_a_retrace():
    seen = []
    systems = four_systems()
    systems["attacked"] = dataclasses.replace(
        systems["attacked"], aggregator=spy_rule(seen)
    )
    both = fs.compare(systems)
    states = both.init(jax.random.key(0))
    text = both.lower(states, 1000, 100).as_text()
    assert text.count("func.func public @main") == 1
    seen.clear()
    states, history = both.run(num_rounds=1000, eval_every=100, states=states)
    traces = len(seen)
    assert traces <= 1
    assert np.isfinite(history["clean"].accuracy).sum() == 10
    both.run(num_rounds=1000, eval_every=100, states=states)
    both.run(jax.random.key(9), num_rounds=1000, eval_every=100)
    assert len(seen) == traces
    # Nothing inside calls back to Python.
    assert "callback" not in text


def test_aggregators_are_not_told_who_is_byzantine():
    seen = []
    simulate(
        aggregator=spy_rule(seen), attack=fs.attacks.sign_flip(), num_byzantine=4
    ).run(jax.random.key(0), num_rounds=1)
    assert seen
    for context in seen:
        assert context.byzantine is None
        assert context.mask is not None
        assert context.params is not None
        # Nor by position: the attackers are permuted, not the first ones.
    masks = {
        tuple(
            np.asarray(
                simulate(attack=fs.attacks.sign_flip(), num_byzantine=4)
                .init(jax.random.key(s))
                .byzantine
            )
        )
        for s in range(6)
    }
    assert len(masks) > 3
    assert all(sum(m) == 4 for m in masks)


def test_attackers_persist_over_rounds():
    _, history = simulate(
        cohort_size=5, attack=fs.attacks.sign_flip(), num_byzantine=4
    ).run(jax.random.key(0), num_rounds=20)
    truth = {}
    for ids, byzantine in zip(history.client_ids, history.byzantine, strict=True):
        assert len(set(ids.tolist())) == 5
        for i, b in zip(ids.tolist(), byzantine.tolist(), strict=True):
            assert truth.setdefault(i, b) == b
    assert sum(truth.values()) == 4
    assert set(truth) == set(range(N))
    np.testing.assert_array_equal(history.num_byzantine, history.byzantine.sum(1))
    assert len(set(history.num_byzantine.tolist())) > 1


@pytest.mark.parametrize(("total", "count"), [(6, 2), (5, 4), (7, 7)])
def test_few_of_many_are_drawn_uniformly(total, count, monkeypatch):
    # Every set of numbers alike often, by the way of drawing that large numbers take.
    monkeypatch.setattr(state_module, "SHUFFLED", 0)
    keys = jax.random.split(jax.random.key(5), 20_000)
    draws = jax.vmap(lambda key: state_module.draw_distinct(key, total, count))(keys)
    draws = np.sort(draws, axis=1)
    assert (draws[:, 1:] > draws[:, :-1]).all()
    sets, often = np.unique(draws, axis=0, return_counts=True)
    assert len(sets) == math.comb(total, count)
    expected = len(keys) / len(sets)
    # Chi squared, of which more than mean + 5 standard deviations is no accident.
    freedom = len(sets) - 1
    limit = freedom + 5 * math.sqrt(2 * freedom)
    assert ((often - expected) ** 2 / expected).sum() <= limit


def test_cohorts_are_uniform():
    _, history = simulate(cohort_size=4, test=None).run(
        jax.random.key(0), num_rounds=600
    )
    counts = np.bincount(history.client_ids.ravel(), minlength=N)
    expected = 600 * 4 / N
    deviation = np.sqrt(600 * (4 / N) * (1 - 4 / N))
    assert np.all(np.abs(counts - expected) < 4 * deviation)


def broken_attack(value, everybody=False):
    def apply(updates, state, context):
        bad = jnp.ones_like(context.byzantine) if everybody else context.byzantine

        def spoil(x):
            rows = bad.reshape(-1, *[1] * (x.ndim - 1))
            return jnp.where(rows, value, x)

        return jax.tree.map(spoil, updates), state

    return UpdateAttack(
        init=lambda params, n: (),
        apply=apply,
        validate=lambda k, f: None,
        knowledge="own",
        name="broken",
    )


def test_non_finite_updates_never_reach_the_model():
    def careless(updates, state, context):
        """A user's rule that ignores the mask."""
        k = context.mask.shape[0]
        info = AggregatorInfo(jnp.full(k, 1 / k), jnp.zeros(k, bool), jnp.zeros(k))
        return jax.tree.map(lambda x: x.mean(axis=0), updates), state, info

    rules = {
        "fedavg": fs.aggregators.fedavg(),
        "careless": Aggregator(lambda p, n: (), careless, lambda k: None),
    }
    broken = {
        f"{name} {value}": simulate(
            aggregator=rule, attack=broken_attack(value), num_byzantine=4
        )
        for name, rule in rules.items()
        for value in (np.nan, np.inf, -np.inf, 1e38)
    }
    honest = simulate(attack=broken_attack(0.0), num_byzantine=4)
    both = fs.compare({"honest": honest, **broken})
    states, histories = both.run(jax.random.key(0), num_rounds=10)
    assert np.isfinite(histories.pop("honest").loss).all()
    for name, history in histories.items():
        leaves = jax.tree.leaves(states[name].params)
        assert all(np.isfinite(x).all() for x in leaves), name
        assert history.num_nonfinite.tolist() == [4] * 10, name
        np.testing.assert_array_equal(history.flagged, history.byzantine, name)
        assert (history.weights[history.byzantine] == 0).all(), name
        assert history.tpr.tolist() == [1.0] * 10, name
        assert history.accuracy[-1] > 0.5, name
        if name.startswith("fedavg"):
            assert not history.no_aggregate.any(), name


def test_with_nobody_left_the_model_stays_and_the_metrics_say_so():
    small = {"max_byzantine": 2, "hidden": 4, "num_snapshots": 3, "num_steps": 2}
    systems = {}
    for name, factory in fs.aggregators.REGISTRY.items():
        takes = inspect.signature(factory).parameters
        systems[name] = simulate(
            aggregator=factory(**{k: v for k, v in small.items() if k in takes}),
            attack=broken_attack(np.nan, everybody=True),
            num_byzantine=1,
        )
    everybody = fs.compare(systems)
    states = everybody.init(jax.random.key(0))
    after, histories = everybody.run(states=states, num_rounds=2)
    for name, history in histories.items():
        assert_equal(after[name].params, states[name].params)
        assert history.no_aggregate.all(), name
        assert (history.weights == 0).all(), name
        assert history.num_nonfinite.tolist() == [N, N], name
        assert history.flagged.all(), name


def test_falling_back_on_the_root_update_moves_the_model_and_is_an_aggregate():
    sim = simulate(
        aggregator=fs.aggregators.dual_system(2, fallback="root"),
        attack=broken_attack(np.nan, everybody=True),
        num_byzantine=1,
    )
    _, history = sim.run(jax.random.key(0), num_rounds=2)
    assert (history.weights == 0).all()
    assert (history.aggregate_norm > 0).all()
    assert not history.no_aggregate.any()


def test_root_update_is_local_training_on_the_root_dataset():
    def apply(updates, state, context):
        k = context.mask.shape[0]
        info = AggregatorInfo(jnp.ones(k) / k, jnp.zeros(k, bool), jnp.zeros(k))
        return context.root_update, state, info

    rule = Aggregator(
        lambda p, n: (), apply, lambda k: None, frozenset({"root_update"}), "root"
    )
    sim = simulate(aggregator=rule)
    # 6 samples in batches of 3: two steps, whatever the size of the root dataset.
    assert sim.root_steps == 2
    state = sim.init(jax.random.key(0))
    after, _ = sim.step(state)
    root = ClientData(jnp.asarray(sim.root.inputs), jnp.asarray(sim.root.targets), None)
    expected, _, _ = sim.client_update.with_steps(2).apply(
        sim.model, stream(state, ROOT), state.params, root, (), 0
    )
    assert_close(
        jax.tree.map(jnp.subtract, after.params, state.params), expected, atol=1e-6
    )


def test_root_steps_by_default_are_a_mean_client_s():
    sim = simulate(
        aggregator=fs.aggregators.fltrust(), clients=make_clients((3, 9) * 6)
    )
    assert sim.root_steps == 2
    assert simulate(aggregator=fs.aggregators.fltrust(), root_steps=7).root_steps == 7


def test_data_attack_poisons_byzantine_clients_only():
    def poison(key, data, context):
        return data._replace(targets=(data.targets + 1) % L)

    flip = DataAttack(poison, lambda num_classes: None, "shift")
    honest = simulate(cohort_size=8)
    poisoned = simulate(cohort_size=8, data_attack=flip, num_byzantine=5)
    both = fs.compare({"honest": honest, "poisoned": poisoned})
    states = both.init(jax.random.key(0))
    arrays = both.arrays
    trained = training.train_cohorts(both.systems, states, arrays, {})
    ids, clean = trained["honest"][:2]
    dirty = trained["poisoned"].updates
    byzantine = np.asarray(states["poisoned"].byzantine[ids])
    assert 0 < byzantine.sum() < 8
    np.testing.assert_array_equal(jnp.any(clean != dirty, axis=1), byzantine)


def slow_and_fast():
    """Two ways for attackers to train that differ from SHARED's."""
    return (
        fs.local_sgd(optax.sgd(0.05), epochs=3, batch_size=2),
        fs.local_sgd(optax.sgd(0.3), steps=1, batch_size=3),
    )


def train_alone(sim, update):
    """``(state, client id, data) -> what one client gives back``, compiled once."""

    @jax.jit
    def train(state, i, data):
        key = jax.random.fold_in(stream(state, TRAIN), i)
        change, memory, info = update.apply(
            sim.model, key, state.params, data, (), state.round
        )
        return ravel_pytree(change)[0], memory, info, {}

    return train


def train_cohort(sim):
    """``state -> Trained`` of a simulation, compiled once."""
    arrays = sim.alone.arrays
    return jax.jit(
        lambda state: training.train_cohorts({"a": sim}, {"a": state}, arrays, {})["a"]
    )


@pytest.mark.parametrize(
    ("sizes", "cohort", "attackers"),
    [((6,) * N, 8, 5), ((3, 6, 5, 4) * 3, 3, 9)],
)
def test_byzantine_update_trains_the_attackers_of_the_cohort(sizes, cohort, attackers):
    """Everybody as in a loop; with more attackers than there are places, too."""
    own, _ = slow_and_fast()
    sim = simulate(
        clients=make_clients(sizes),
        byzantine_update=own,
        num_byzantine=attackers,
        cohort_size=cohort,
    )
    play, counts = train_cohort(sim), set()
    honest, byzantine = train_alone(sim, sim.client_update), train_alone(sim, own)
    for seed in range(3):
        state = sim.init(jax.random.key(seed))
        found = play(state)
        counts.add(int(state.byzantine[found.ids].sum()))
        for row, i in enumerate(found.ids.tolist()):
            train = byzantine if state.byzantine[i] else honest
            expected = train(state, i, sim.clients.gather(jnp.int32(i)))
            got = jax.tree.map(lambda x, r=row: x[r], found[1:])
            assert_close(got, expected)
    assert len(counts) > 1  # fewer attackers in the cohort than there can be, too


def test_attackers_with_their_own_training_train_on_their_poisoned_data():
    own, _ = slow_and_fast()
    flip = fs.attacks.label_flip(L)
    sim = simulate(byzantine_update=own, data_attack=flip, num_byzantine=5)
    state = sim.init(jax.random.key(0))
    found, train = train_cohort(sim)(state), train_alone(sim, own)
    for i in np.flatnonzero(state.byzantine):
        data = sim.clients.gather(jnp.int32(i))
        data = data._replace(targets=L - 1 - data.targets)
        expected = train(state, i, data)[0]
        assert_close(found.updates[i], expected)


def test_systems_of_a_comparison_may_differ_in_byzantine_update():
    """Of two that share one, and one with another and poisoned data, over seeds."""
    slow, fast = slow_and_fast()
    shift = fs.attacks.label_flip(L, mode="shift")
    shared = {"cohort_size": 9, "test": None, "root": None}
    systems = {
        "plain": simulate(**shared),
        "slow": simulate(byzantine_update=slow, num_byzantine=4, **shared),
        "fast": simulate(
            byzantine_update=fast, data_attack=shift, num_byzantine=6, **shared
        ),
        "slow too": simulate(
            byzantine_update=slow,
            attack=fs.attacks.sign_flip(),
            num_byzantine=5,
            **shared,
        ),
    }
    keys = jnp.stack([jax.random.key(s) for s in (5, 6)])
    states, histories = fs.compare(systems).run(keys, num_rounds=2)
    for name in ("fast", "slow too"):
        for s, key in enumerate(keys):
            alone, history = systems[name].run(key, num_rounds=2)
            assert_close(jax.tree.map(lambda x, s=s: x[s], states[name]), alone)
            assert_close(jax.tree.map(lambda x, s=s: x[s], histories[name]), history)


def remembering(start):
    """Local training with a state that starts somewhere and counts up."""
    base = fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=3)

    def apply(model, key, params, data, state, round):
        update, _, info = base.apply(model, key, params, data, (), round)
        return update, state + 1, info

    return base._replace(init=lambda p: jnp.int32(start), apply=apply)


def test_attackers_keep_the_state_of_their_own_training():
    sim = simulate(
        client_update=remembering(0),
        byzantine_update=remembering(100),
        num_byzantine=4,
        cohort_size=5,
    )
    state, history = sim.run(jax.random.key(0), num_rounds=8)
    counts = np.bincount(history.client_ids.ravel(), minlength=N)
    np.testing.assert_array_equal(state.clients, counts + 100 * state.byzantine)


def reporting(change):
    """Local training whose three results pass through ``change``."""
    base = fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=3)
    return base._replace(apply=lambda *a: change(*base.apply(*a)))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (fs.local_sgd, "byzantine_update must be of type ClientUpdate"),
        (remembering(0), "byzantine_update: client state must have"),
        (reporting(lambda u, s, i: u), r"must return \(update, state, ClientInfo\)"),
        (reporting(lambda u, s, i: (u["Dense_0"], s, i)), "update: update must have"),
        (reporting(lambda u, s, i: (u, 1, i)), "update: client state must have"),
        (reporting(lambda u, s, i: (u, s, None)), "update: info must have"),
    ],
)
def test_a_byzantine_update_that_does_not_fit_is_named(update, message):
    with pytest.raises(TypeError, match=message):
        simulate(byzantine_update=update, num_byzantine=2)


def test_two_different_data_attacks_in_one_comparison():
    def shift(by):
        def poison(key, data, context):
            return data._replace(targets=(data.targets + by) % L)

        return DataAttack(poison, lambda num_classes: None, f"shift {by}")

    systems = {
        f"shift {by}": simulate(data_attack=shift(by), num_byzantine=6) for by in (1, 2)
    }
    states, _ = fs.compare(systems).run(jax.random.key(0), num_rounds=2)
    for name, sim in systems.items():
        alone, _ = sim.run(jax.random.key(0), num_rounds=2)
        assert_close(states[name].params, alone.params)


def test_a_scheduled_attack_is_none_before_its_start():
    """On updates and on data: honest until round 2, the plain attack from there on."""
    flip = fs.attacks.label_flip(L)
    systems = {
        "clean": {},
        "update": {"attack": fs.attacks.schedule(fs.attacks.sign_flip(5.0), start=2)},
        "data": {"data_attack": fs.attacks.schedule(flip, start=2)},
        "plain": {"data_attack": flip},
    }
    both = fs.compare(
        {n: simulate(num_byzantine=4 if o else 0, **o) for n, o in systems.items()}
    )
    honest, _ = both.run(jax.random.key(0), num_rounds=2)
    for name in ("update", "data"):
        assert_close(honest[name].params, honest["clean"].params)
    states, histories = both.run(num_rounds=1, states=honest)
    for name in ("update", "data"):
        distance = max(
            float(jnp.abs(a - b).max())
            for a, b in zip(
                jax.tree.leaves(states[name].params),
                jax.tree.leaves(states["clean"].params),
            )
        )
        assert distance > 0.01
        assert histories[name].num_byzantine.tolist() == [4]
    alone = both.systems["plain"]
    forked, _ = alone.run(state=alone.fork(honest["clean"]), num_rounds=1)
    assert_close(states["data"].params, forked.params)


def test_fork_goes_on_from_another_system():
    clean = simulate()
    trained, _ = clean.run(jax.random.key(0), num_rounds=4)
    attacked = simulate(
        aggregator=fs.aggregators.dual_system(max_byzantine=3, variant="dynamic_trust"),
        attack=fs.attacks.sign_flip(),
        num_byzantine=3,
        server_optimizer=optax.sgd(1.0, momentum=0.5),
    )
    with pytest.raises(ValueError, match="fork"):
        attacked.run(state=trained, num_rounds=1)
    state = attacked.fork(trained)
    assert_equal(state.params, trained.params)
    assert int(state.round) == 4
    assert int(state.byzantine.sum()) == 3
    np.testing.assert_array_equal(
        state.byzantine, attacked.init(jax.random.key(0)).byzantine
    )
    _, history = attacked.run(state=state, num_rounds=2)
    assert history.round.tolist() == [5, 6]


def test_server_optimizer_sees_minus_the_aggregate():
    def params_after(**options):
        sim = simulate(**options)
        state, _ = sim.run(jax.random.key(0), num_rounds=1)
        start = sim.init(jax.random.key(0)).params
        return jax.tree.map(jnp.subtract, state.params, start)

    plain = params_after()
    halved = params_after(server_optimizer=optax.sgd(0.5))
    assert_close(jax.tree.map(lambda x: 0.5 * x, plain), halved)


def test_client_state_is_kept_by_id_under_sampling():
    base = fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=3)

    def apply(model, key, params, data, state, round):
        update, _, _ = base.apply(model, key, params, data, (), round)
        return update, state + 1, ClientInfo(loss=state.astype(jnp.float32))

    counting = base._replace(init=lambda p: jnp.zeros((), jnp.int32), apply=apply)
    sim = simulate(client_update=counting, cohort_size=5)
    state, history = sim.run(jax.random.key(0), num_rounds=8)
    np.testing.assert_array_equal(
        state.clients, np.bincount(history.client_ids.ravel(), minlength=N)
    )


def test_attack_state_and_rule_state_pass_from_round_to_round():
    def apply(updates, state, context):
        scale = jnp.where(context.byzantine, state, 1.0)
        scaled = jax.tree.map(
            lambda x: x * scale.reshape(-1, *[1] * (x.ndim - 1)), updates
        )
        return scaled, state * 10

    growing = UpdateAttack(
        lambda p, n: jnp.float32(1.0), apply, lambda k, f: None, "own", name="growing"
    )
    state, _ = simulate(attack=growing, num_byzantine=1).run(
        jax.random.key(0), num_rounds=3
    )
    np.testing.assert_allclose(state.attack, 1000.0)


def test_golden_trajectory():
    """The numbers of a tiny run, so that a change of stream or order is noticed."""
    _, history = fs.compare(four_systems(cohort_size=9)).run(
        jax.random.key(0), num_rounds=3
    )
    for name, golden in GOLDEN.items():
        np.testing.assert_allclose(history[name].train_loss, golden, atol=2e-4)


GOLDEN = {
    "clean": [2.4350, 1.7265, 1.3676],
    "attacked": [2.5343, 2.0463, 1.7617],
    "fltrust": [2.5343, 1.9954, 1.4912],
    "dual_system": [2.5343, 1.9872, 1.4353],
}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort_size": 0}, "cohort_size must be an integer of at least 1"),
        ({"cohort_size": N + 1}, "cohort_size must be from 1"),
        ({"num_byzantine": N, "attack": fs.attacks.sign_flip()}, "somebody is honest"),
        ({"num_byzantine": -1}, "num_byzantine must be an integer of at least 0"),
        ({"attack": fs.attacks.sign_flip()}, "but num_byzantine is 0"),
        ({"num_byzantine": 2}, "there is no attack"),
        (
            {"byzantine_update": SHARED["client_update"]},
            r"attack \(byzantine_update\), but num_byzantine is 0",
        ),
        (
            {
                "byzantine_update": fs.local_sgd(optax.sgd(1), steps=1, batch_size=7),
                "num_byzantine": 2,
            },
            "byzantine_update: batch_size=7 is larger",
        ),
        (
            {"aggregator": fs.aggregators.fltrust(), "root": None},
            "needs a root dataset",
        ),
        (
            {
                "attack": fs.attacks.fltrust_adaptive(),
                "num_byzantine": 2,
                "root": None,
            },
            "fltrust_adaptive needs a root dataset",
        ),
        ({"root": None, "root_steps": 3}, "no root dataset.*root_steps=None"),
        ({"root": examples_with_nan(9)}, "^2 of 9 samples of the root .* sample 4:"),
        ({"root_steps": 0}, "root_steps must be an integer of at least 1"),
        ({"client_chunk": 0}, "client_chunk must be an integer of at least 1"),
        ({"clients": make_clients((6, 0, 6))}, "1 of 3 clients have no samples"),
        ({"clients": make_clients((6, 2, 6))}, "batch_size=3 is larger"),
        ({"root": examples(2)}, "root dataset of 2 samples cannot be trained on"),
        ({"aggregator": fs.aggregators.krum(max_byzantine=5)}, "krum"),
        (
            {"aggregator": fs.aggregators.krum(max_byzantine=3), "cohort_size": 8},
            "krum",
        ),
        (
            {"attack": fs.attacks.alie(), "num_byzantine": 8},
            "alie",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_before_training(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregator": fs.aggregators.median}, "forget to call the factory"),
        ({"attack": fs.attacks.label_flip(num_classes=L)}, "Pass it as data_attack="),
        ({"data_attack": fs.attacks.sign_flip()}, "Pass it as attack="),
        ({"clients": None}, "clients must be of type Clients"),
        ({"test": np.zeros(3)}, "test must be of type Examples"),
    ],
)
def test_values_in_the_wrong_place_are_refused(options, message):
    with pytest.raises(TypeError, match=message):
        simulate(**options)


@pytest.mark.parametrize("value", [1.5, True, "2"])
@pytest.mark.parametrize(
    "field", ["num_byzantine", "cohort_size", "root_steps", "client_chunk"]
)
def test_counts_must_be_integers(field, value):
    with pytest.raises(TypeError, match=f"{field} must be an integer"):
        simulate(**{field: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test": examples(9)._replace(targets=np.zeros(3, int))}, "9 inputs and 3"),
        ({"test": Examples(np.zeros((0, 4)), np.zeros(0, int))}, "at least one"),
        ({"test": examples(9)._replace(targets=np.full(9, L))}, "labels from 3 to 3"),
        (
            {
                "clients": SHARED["clients"]._replace(
                    targets=SHARED["clients"].targets - 1
                )
            },
            "clients has labels from -1",
        ),
        ({"model": fs.models.mlp((5,), num_classes=L)}, r"input_shape=\(4,\)"),
        ({"model": fs.models.mlp((4,), num_classes=2)}, "model has 2 outputs"),
    ],
)
def test_data_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        simulate(**options)


def rule_returning(change):
    """FedAvg whose three results pass through ``change``."""
    rule = fs.aggregators.fedavg()

    def apply(updates, state, context):
        return change(*rule.apply(updates, state, context))

    return rule._replace(apply=apply, name="mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, s, i: a, r"aggregator mine must return \(aggregate, state"),
        (lambda a, s, i: (a, s), "of length 2"),
        (lambda a, s, i: (a["Dense_0"], s, i), "aggregator mine: aggregate must have"),
        (lambda a, s, i: (a, jnp.zeros(3), i), "aggregator mine: state must have"),
        (lambda a, s, i: (a, s, None), "must return an AggregatorInfo"),
        (
            lambda a, s, i: (a, s, i._replace(weights=i.weights[:1])),
            "info weights must have shape",
        ),
        (
            lambda a, s, i: (a, s, i._replace(details={"x": jnp.zeros(())})),
            "info x must have shape",
        ),
        (
            lambda a, s, i: (a, s, i._replace(flagged=i.weights)),
            "info flagged must be of type bool_?; got float32",
        ),
        (
            lambda a, s, i: (a, s, i._replace(scores=i.flagged)),
            "info scores must be of type floating; got bool",
        ),
        (
            lambda a, s, i: jnp.zeros(2) + jnp.zeros(3),
            r"aggregator mine failed at .*test_simulation.py, line \d+: add got",
        ),
    ],
)
def test_a_rule_that_breaks_its_contract_is_named(change, message):
    with pytest.raises(TypeError, match=message):
        simulate(aggregator=rule_returning(change))


@pytest.mark.parametrize("dtypes", ["bb", "hh", "bf"])
def test_parameters_keep_their_dtypes(dtypes):
    """All of half precision, where nothing needs casting back, and mixed ones."""
    kinds = {"b": jnp.bfloat16, "h": jnp.float16, "f": jnp.float32}
    first, second = (kinds[d] for d in dtypes)
    model = SHARED["model"]

    def init(key):
        leaves, tree = jax.tree.flatten(model.init(key))
        cast = [x.astype(first if i % 2 else second) for i, x in enumerate(leaves)]
        return jax.tree.unflatten(tree, cast)

    alone = simulate(
        model=model._replace(init=init),
        aggregator=fs.aggregators.fltrust(),
        attack=fs.attacks.alie(),
        num_byzantine=3,
        server_optimizer=optax.sgd(1.0, momentum=0.9),
    ).alone
    states = alone.init(jax.random.key(0))
    (after,) = alone.shapes(states, 2, 2)[0].values()
    (before,) = states.values()
    kept = jax.tree.map(lambda x, y: x.dtype == y.dtype, before, after)
    assert all(jax.tree.leaves(kept))


def test_an_attack_that_breaks_its_contract_is_named():
    attack = fs.attacks.sign_flip()

    def apply(updates, state, context):
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), updates), state

    with pytest.raises(TypeError, match="attack sign_flip: updates must have"):
        simulate(attack=attack._replace(apply=apply), num_byzantine=2)


@pytest.mark.parametrize(
    ("argument", "factory", "field"),
    [
        ("aggregator", fs.aggregators.fedavg, "init"),
        ("attack", fs.attacks.sign_flip, "init"),
        ("attack", fs.attacks.sign_flip, "apply"),
        ("data_attack", lambda: fs.attacks.label_flip(L), "poison"),
        ("data_attack", lambda: fs.attacks.label_flip(L), "trigger"),
    ],
)
def test_a_plugin_that_fails_is_named_with_its_line(argument, factory, field):
    def fails(*args):
        raise ValueError("boom")

    plugin = factory()._replace(name="mine", **{field: fails})
    num_byzantine = 0 if argument == "aggregator" else 2
    message = r" mine failed at .*test_simulation.py, line \d+: boom"
    with pytest.raises(ValueError, match=message):
        simulate(num_byzantine=num_byzantine, **{argument: plugin})


def test_needs_that_a_round_does_not_have():
    rule = fs.aggregators.fedavg()
    for need in ("root_updat", "byzantine"):
        with pytest.raises(ValueError, match=f"needs .*{need}"):
            simulate(aggregator=rule._replace(needs=frozenset({need})))


def test_bad_runs_are_refused():
    sim = simulate()
    state = sim.init(jax.random.key(0))
    with pytest.raises(
        ValueError, match="num_rounds must be an integer of at least 1; got 0"
    ):
        sim.run(jax.random.key(0), num_rounds=0)
    with pytest.raises(ValueError, match="eval_every must be an integer of at least 1"):
        sim.run(jax.random.key(0), num_rounds=1, eval_every=0)
    with pytest.raises(ValueError, match="exactly one of key"):
        sim.run(num_rounds=1)
    with pytest.raises(ValueError, match="exactly one of key"):
        sim.run(jax.random.key(0), num_rounds=1, state=state)
    with pytest.raises(TypeError, match="typed PRNG key"):
        sim.run(jax.random.PRNGKey(0), num_rounds=1)
    with pytest.raises(TypeError, match="typed PRNG key"):
        sim.init(0)


def test_comparisons_that_cannot_be_fair_are_refused():
    with pytest.raises(ValueError, match="at least one simulation"):
        fs.compare({})
    for bad in ([simulate()], simulate(), {"a": None}, {1: simulate()}):
        with pytest.raises(TypeError, match="compare needs"):
            fs.compare(bad)
    with pytest.raises(ValueError, match="differ in clients"):
        fs.compare({"a": simulate(), "b": simulate(clients=make_clients())})
    with pytest.raises(ValueError, match="differ in cohort_size"):
        fs.compare({"a": simulate(), "b": simulate(cohort_size=3)})
    fltrust = fs.aggregators.fltrust()
    with pytest.raises(ValueError, match="share root and root_steps"):
        fs.compare(
            {
                "a": simulate(aggregator=fltrust),
                "b": simulate(aggregator=fltrust, root_steps=9),
            }
        )


def test_a_comparison_of_many_clients_needs_no_shared_integers():
    # Python shares small integers only, so the default cohort of 300 is two objects.
    clients = make_clients((3,) * 300)
    both = fs.compare({"a": simulate(clients=clients), "b": simulate(clients=clients)})
    assert both.init(jax.random.key(0))["b"].byzantine.shape == (300,)


def test_parameters_keep_the_model_s_own_structure():
    sim = simulate()
    assert set(sim.init(jax.random.key(0)).params["Dense_0"]) == {"kernel", "bias"}


@pytest.mark.parametrize(
    ("count", "limit", "size"), [(100, 30, 25), (100, 1, 1), (7, 5, 1), (7, 9, 7)]
)
def test_largest_divisor(count, limit, size):
    assert training.largest_divisor(count, limit) == size
