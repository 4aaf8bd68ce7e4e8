"""Client defenses in the engine, against plain loops over clients and samples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import fedjax_sim as fs
from fedjax_sim import cohorts, training
from fedjax_sim.checks import SAMPLE_COUNTS
from fedjax_sim.state import DEFENSE, POISON, TRAIN, stream
from fedjax_sim.types import ClientDefense, ClientInfo, Examples, RoundContext
from tests.trees import assert_close, assert_equal

N, M, K, L, ATTACKERS, ROUNDS = 6, 8, 5, 3, 2, 3
SEEDS = (1, 2)  # in which one of EMPTY is an attacker
SIZES = (8, 6, 7, 8, 5, 8)
EMPTY = [2, 4]  # clients that are left nothing
RATE, STEPS = 0.1, 2


def make_clients(sizes, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, L, sum(sizes)).astype(np.int32)
    inputs = rng.normal(size=(len(targets), 3, 3, 1)).astype(np.float32)
    inputs[:, 0, 0, 0] += targets
    starts = np.cumsum([0, *sizes[:-1]])
    rows = [start + np.arange(size) for start, size in zip(starts, sizes)]
    return fs.data.clients_from_indices(Examples(inputs, targets), rows)


def fixed(keep):
    """Keeps the same samples always: a defense without memory."""
    keep = jnp.asarray(keep)
    return ClientDefense(
        init=lambda mask: (),
        apply=lambda gather, state, context: (keep[context.client_ids], state, {}),
        name="fixed",
    )


def some(seed):
    """``bool [N, M]`` with holes, and two clients with nothing; True in padding."""
    keep = np.random.default_rng(seed).random((N, M)) < 0.6
    keep[:, -1] = True
    keep[EMPTY] = False
    return keep


def looking(label, also):
    """Drops a label, and others; remembers what it was shown of all clients."""
    also = jnp.asarray(also)

    def apply(gather, state, context):
        data = jax.vmap(gather)(jnp.arange(N))
        ids = context.client_ids
        state = {
            "calls": state["calls"] + 1,
            "inputs": data.inputs,
            "targets": data.targets,
            "mask": data.mask,
            "features": context.features(data.inputs[0]),
            "key": jax.random.key_data(context.key),
            "params": context.params,
        }
        keep = (data.targets[ids] != label) & also[ids]
        return keep, state, {"seen": data.targets[ids, 0]}

    def init(mask):
        params = SHARED["model"].init(jax.random.key(0))
        return {
            "calls": jnp.int32(0),
            "inputs": jnp.zeros((*mask.shape, 3, 3, 1)),
            "targets": jnp.zeros(mask.shape, jnp.int32),
            "mask": mask,
            "features": jnp.zeros((M, L)),
            "key": jax.random.key_data(jax.random.key(0)),
            "params": params,
        }

    needs = frozenset({"key", "params", "client_ids", "features"})
    return ClientDefense(init, apply, needs, "looking")


def once(when=lambda context, state: context.round == 1):
    """From a branch that is taken in one round only; then nobody keeps anything."""

    def apply(gather, state, context):
        keep = jax.lax.cond(
            when(context, state),
            lambda: jnp.linalg.norm(jax.vmap(gather)(jnp.arange(N)).inputs) < 0,
            lambda: jnp.bool_(True),
        )
        keep = jnp.full((len(context.client_ids), M), keep)
        return keep, state + 1, {}

    return ClientDefense(lambda mask: jnp.int32(0), apply, frozenset({"round"}), "once")


def softmax_regression():
    model = fs.models.mlp((3, 3, 1), num_classes=L, hidden=())
    return model._replace(
        features=lambda params, x: x.reshape(len(x), -1) @ params["Dense_0"]["kernel"]
    )


def full_batch(rate):
    """Training on all samples at once, so that their order makes no difference."""

    def apply(model, key, params, data, state, round):
        def loss_of(params):
            losses = model.loss(model.apply(params, data.inputs), data.targets)
            return jnp.where(data.valid, losses, 0.0).sum() / data.valid.sum()

        trained, total = params, 0.0
        for _ in range(STEPS):
            loss, grads = jax.value_and_grad(loss_of)(trained)
            trained = jax.tree.map(lambda w, g: w - rate * g, trained, grads)
            total += loss
        some = data.valid.any()
        update = jax.tree.map(lambda a, b: jnp.where(some, a - b, 0.0), trained, params)
        return update, state, ClientInfo(total / STEPS)

    usual = fs.local_sgd(optax.sgd(rate), steps=STEPS, batch_size=1)
    return usual._replace(apply=apply)


SHARED = {
    "model": softmax_regression(),
    "clients": make_clients(SIZES),
    "client_update": full_batch(RATE),
    "cohort_size": K,
}
FLIP = fs.attacks.label_flip(L, mode="shift", fraction=0.5)
STAMP = fs.attacks.badnets(L, target=1, size=2, fraction=1.0)
KEEP = some(0)
LOOKING = looking(1, KEEP)  # of two systems, which share it in the program


def simulate(**options):
    return fs.Simulation(**{"aggregator": fs.aggregators.fedavg(), **SHARED, **options})


NAMES = ("bare", "flip", "stamp", "once")


@functools.cache
def systems():
    attacked = {"num_byzantine": ATTACKERS}
    return {
        "bare": simulate(data_attack=STAMP, **attacked),
        "flip": simulate(client_defense=LOOKING, data_attack=FLIP, **attacked),
        "stamp": simulate(
            client_defense=LOOKING,
            data_attack=STAMP,
            byzantine_update=full_batch(-RATE),
            attack=fs.attacks.sign_flip(scale=5.0),
            aggregator=fs.aggregators.median(),
            **attacked,
        ),
        "once": simulate(client_defense=once()),
    }


@pytest.fixture(scope="module")
def played():
    """Of each seed and round: the states before, the history and the states after."""
    both, found = fs.compare(systems()), {}
    for seed in SEEDS:
        states, found[seed] = both.init(jax.random.key(seed)), []
        for _ in range(ROUNDS):
            before = states
            states, history = both.run(states=states, num_rounds=1)
            history = jax.tree.map(lambda x: x[0], history)
            found[seed].append((before, history, states))
    return found


def each_round(played, name):
    for rounds in played.values():
        for before, history, after in rounds:
            yield before[name], history[name], after[name]


def client_data(name, state, client):
    """Inputs, targets and what is poisoned of one client, without its padding."""
    sim = systems()[name]
    inputs, targets, mask = (np.array(x) for x in sim.clients.gather(client))
    had = inputs.copy(), targets.copy()
    if sim.data_attack is not None and state.byzantine[client]:
        key = jax.random.fold_in(jax.random.fold_in(state.key, POISON), client)
        context = RoundContext(
            round=state.round,
            client_ids=jnp.int32(client),
            rank=jnp.sum(state.byzantine[:client]),
        )
        data = sim.clients.gather(client)
        inputs, targets, _ = map(np.array, sim.data_attack.poison(key, data, context))
    poisoned = [
        bool((inputs[j] != had[0][j]).any() or targets[j] != had[1][j])
        for j in range(M)
    ]
    return inputs[mask], targets[mask], np.array(poisoned)[mask], mask


def kept_of(name, client, targets, mask, round):
    """What the defenses above are to keep, of the samples that are no padding."""
    if name in ("flip", "stamp"):
        return (targets != 1) & KEEP[client][mask]
    return np.full(len(targets), name != "once" or round != 1)


def gradient_descent(params, x, y, rate):
    """Update ``[d]`` and mean loss of softmax regression on all samples at once."""
    b, w = (np.array(params["Dense_0"][k], np.float64) for k in ("bias", "kernel"))
    start, losses = (b.copy(), w.copy()), []
    x = x.reshape(-1, len(w)).astype(np.float64)
    for _ in range(STEPS if len(x) else 0):
        p = np.exp(x @ w + b)
        p /= p.sum(axis=1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        p[np.arange(len(y)), y] -= 1
        w, b = w - rate * x.T @ p / len(y), b - rate * p.mean(axis=0)
    update = np.concatenate([b - start[0], (w - start[1]).ravel()])
    return update, np.mean(losses) if losses else np.nan


def flat(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


@pytest.mark.parametrize("name", NAMES)
def test_a_round_equals_a_loop_over_what_clients_keep(name, played):
    for before, history, after in each_round(played, name):
        round = int(before.round)
        updates, sizes, losses = [], [], []
        for client in history.client_ids:
            x, y, _, mask = client_data(name, before, client)
            kept = kept_of(name, client, y, mask, round)
            own = name == "stamp" and before.byzantine[client]
            rate = -RATE if own else RATE
            update, loss = gradient_descent(before.params, x[kept], y[kept], rate)
            updates.append(-5.0 * update if own else update)
            sizes.append(int(kept.sum()))
            losses.append(loss)
        updates, sizes = np.array(updates), np.array(sizes)
        part = sizes > 0
        aggregate = np.zeros(updates.shape[1])
        if name == "stamp":
            aggregate = np.median(updates[part], axis=0)
        elif part.any():
            aggregate = sizes @ updates / sizes.sum()
            np.testing.assert_allclose(history.weights, sizes / sizes.sum(), rtol=1e-5)
        got = flat(after.params) - flat(before.params)
        np.testing.assert_allclose(got, aggregate, rtol=1e-4, atol=2e-6)
        np.testing.assert_array_equal(history.flagged, ~part)
        assert not history.weights[~part].any()
        assert np.all(np.isinf(history.scores[~part]))
        assert history.num_flagged == np.sum(~part)
        assert history.num_nonfinite == 0
        assert history.no_aggregate == (not part.any())
        honest = [
            loss
            for loss, client in zip(losses, history.client_ids)
            if not before.byzantine[client] and np.isfinite(loss)
        ]
        expected = np.mean(honest) if honest else np.nan
        np.testing.assert_allclose(history.train_loss, expected, rtol=1e-5)


def test_the_rounds_played_are_telling(played):
    """Honest clients and attackers without samples, and a round with nobody."""
    nothing = {True: 0, False: 0}
    for before, history, _ in each_round(played, "stamp"):
        for client, flagged in zip(history.client_ids, history.flagged):
            nothing[bool(before.byzantine[client])] += int(flagged)
    assert min(nothing.values()) > 0
    nobody = [h.no_aggregate.item() for _, h, _ in each_round(played, "once")]
    assert nobody == [False, True, False] * 2


@pytest.mark.parametrize("name", ["flip", "stamp", "once"])
def test_counts_equal_a_loop(name, played):
    seen = dict.fromkeys(("poisoned_left_out", "clean_left_out", "kept"), 0)
    for before, history, _ in each_round(played, name):
        for row, client in enumerate(history.client_ids):
            _, y, poisoned, mask = client_data(name, before, client)
            kept = kept_of(name, client, y, mask, int(before.round))
            expected = {
                "samples": np.sum(kept),
                "poisoned": np.sum(poisoned),
                "poisoned_left_out": np.sum(poisoned & ~kept),
                "clean_left_out": np.sum(~poisoned & ~kept),
            }
            extra = {"seen"} if name != "once" else set()
            assert set(history.defense) == SAMPLE_COUNTS | extra
            for field, count in expected.items():
                assert history.defense[field][row] == count, field
            for field in ("poisoned_left_out", "clean_left_out"):
                seen[field] += expected[field]
            seen["kept"] += np.sum(poisoned & kept)
    if name in ("flip", "stamp"):
        assert seen["poisoned_left_out"] > 0
        assert (seen["kept"] > 0) == (name == "flip")  # all that is stamped is class 1
    assert seen["clean_left_out"] > 0


@pytest.mark.parametrize("name", ["flip", "stamp"])
def test_a_defense_is_shown_the_data_of_all_clients_as_they_have_them(name, played):
    seen = set()
    for before, history, after in each_round(played, name):
        for client in range(N):
            x, y, poisoned, mask = client_data(name, before, client)
            np.testing.assert_array_equal(after.defense["mask"][client], mask)
            np.testing.assert_array_equal(after.defense["inputs"][client][mask], x)
            np.testing.assert_array_equal(after.defense["targets"][client][mask], y)
            assert poisoned.any() == bool(before.byzantine[client])
            seen.add((client in history.client_ids, bool(poisoned.any())))
        first = after.defense["targets"][history.client_ids, 0]
        np.testing.assert_array_equal(history.defense["seen"], first)
    # Attackers outside of the cohort, too.
    assert seen >= {(True, True), (True, False), (False, True), (False, False)}


def test_what_else_a_defense_is_given_and_remembers(played):
    for before, _, after in each_round(played, "flip"):
        own = after.defense
        assert own["calls"] == before.round + 1
        assert_equal(own["params"], before.params)
        expected = jax.random.key_data(stream(before, DEFENSE))
        np.testing.assert_array_equal(own["key"], expected)
        features = SHARED["model"].features(before.params, own["inputs"][0])
        np.testing.assert_allclose(own["features"], features, rtol=1e-5, atol=1e-6)


def test_a_system_without_a_defense_is_what_it_is_alone(played):
    state, history = systems()["bare"].run(jax.random.key(SEEDS[0]), num_rounds=ROUNDS)
    assert history.defense == {}
    for t, (_, found, _) in enumerate(played[SEEDS[0]]):
        assert_close(found["bare"], jax.tree.map(lambda x, t=t: x[t], history))
    assert_close(played[SEEDS[0]][-1][2]["bare"], state)


def test_seeds_side_by_side_are_the_single_runs(played):
    keys = jnp.stack([jax.random.key(seed) for seed in SEEDS])
    state, history = systems()["once"].run(keys, num_rounds=ROUNDS)
    for s, seed in enumerate(SEEDS):
        for t, (_, found, _) in enumerate(played[seed]):
            own = jax.tree.map(lambda x, s=s, t=t: x[s, t], history)
            assert_close(own, found["once"])
        own = jax.tree.map(lambda x, s=s: x[s], state)
        assert_close(own, played[seed][-1][2]["once"])
    assert (history.client_ids[0] != history.client_ids[1]).any()


def test_a_branch_on_the_round_stays_one_for_several_seeds():
    """And not, which is why the round is given apart, one on what differs by seed."""
    keys = jnp.stack([jax.random.key(seed) for seed in SEEDS])

    def branches(when):
        shared = {"client_defense": once(when), "cohort_size": N}
        both = fs.compare({name: simulate(**shared) for name in "ab"})
        text = both.lower(both.init(keys), ROUNDS, 1).as_text()
        return text.count("stablehlo.case")

    by_seed = branches(lambda context, state: state == 1)
    assert branches(lambda context, state: context.round == 1) == by_seed + 1


def test_a_client_trains_on_the_mask_with_holes():
    """In minibatches, of clients without padding; and on all it has, without a defense.

    Where nobody has one, there would be no mask at all.
    """
    update = fs.local_sgd(optax.sgd(0.1), steps=5, batch_size=3)
    shared = {"clients": make_clients((M,) * N), "client_update": update}
    keep = some(1)
    both = fs.compare(
        {
            "plain": simulate(**shared),
            "fixed": simulate(client_defense=fixed(keep), **shared),
        }
    )
    assert not both.systems["plain"].padded
    arrays, states = both.arrays, both.init(jax.random.key(SEEDS[0]))
    state = states["plain"]

    @jax.jit
    def train(states):
        defended = cohorts.defend_cohorts(
            both.systems, states, arrays.clients, jnp.int32(0)
        )
        return training.train_cohorts(both.systems, states, arrays, defended)

    @jax.jit
    def alone(client, mask):
        key = jax.random.fold_in(stream(state, TRAIN), client)
        data = arrays.clients.gather(client)._replace(mask=mask)
        change, _, info = update.apply(
            SHARED["model"], key, state.params, data, (), state.round
        )
        return ravel_pytree(change)[0], info.loss

    found = train(states)
    for row, client in enumerate(found["fixed"].ids.tolist()):
        for name, mask in (("fixed", jnp.asarray(keep[client])), ("plain", None)):
            own = found[name].updates[row], found[name].info.loss[row]
            assert_close(own, alone(client, mask))
        assert found["fixed"].samples["samples"][row] == keep[client].sum()
        assert found["fixed"].updates[row].any() == (client not in EMPTY)


# What does not keep the contract


def broken(change, **fields):
    """A defense that keeps all, with its results passed through ``change``."""

    def apply(gather, state, context):
        ids = context.client_ids
        return change(jnp.ones((len(ids), M), bool), state, {"all": jnp.ones(len(ids))})

    return ClientDefense(lambda mask: jnp.int32(0), apply, **fields)


def complaining(*args):
    raise ValueError(f"too few of {args[0].tolist()}, {args[1].shape}, {args[2]}")


@pytest.mark.parametrize(
    ("defense", "error", "message"),
    [
        (fixed, TypeError, "client_defense must be of type ClientDefense"),
        (
            broken(lambda keep, state, info: (keep, state)),
            TypeError,
            r"custom must return \(keep, state, info\); got tuple of length 2",
        ),
        (
            broken(lambda keep, state, info: (keep[:, 0], state, info)),
            TypeError,
            r"custom: keep must have .* bool\(5, 8\); got bool\(5,\)",
        ),
        (
            broken(lambda keep, state, info: (keep.astype(int), state, info)),
            TypeError,
            r"keep must have .* bool\(5, 8\); got int32\(5, 8\)",
        ),
        (
            broken(lambda keep, state, info: (keep, 1.0 * state, info)),
            TypeError,
            r"state must have .* int32\(\); got float32\(\)",
        ),
        (
            broken(lambda keep, state, info: (keep, (), info)),
            TypeError,
            "custom: state must have",
        ),
        (
            broken(lambda keep, state, info: (keep, state, {"all": keep})),
            TypeError,
            r"info all must have shape \(5,\), one value a client; got \(5, 8\)",
        ),
        (
            broken(lambda keep, state, info: (keep, state, None)),
            TypeError,
            "info must be a dictionary of arrays by name; got NoneType",
        ),
        (
            broken(lambda keep, state, info: (keep, state, {"poisoned": keep[:, 0]})),
            TypeError,
            "info poisoned is what the engine reports",
        ),
        (
            broken(lambda keep, state, info: (keep, state, {1: keep[:, 0]})),
            TypeError,
            "info must have names as keys; got 1",
        ),
        (
            broken(lambda keep, state, info: (keep, state, {"z": 1j * keep[:, 0]})),
            TypeError,
            "info z must be real numbers; got complex64",
        ),
        (broken(lambda *out: out, validate=None), TypeError, "validate must be a func"),
        (
            broken(lambda *out: out)._replace(init=None),
            TypeError,
            "init must be a function; got None",
        ),
        (broken(lambda *out: out, needs="key"), TypeError, "needs must be a set of na"),
        (
            broken(lambda *out: out, needs=frozenset({"byzantine", "key"})),
            ValueError,
            r"custom needs \['byzantine'\], which it is not given. It is given "
            r"\['client_ids', 'features', 'key', 'params', 'round'\]",
        ),
        (
            broken(lambda *out: out, validate=complaining, name="mine"),
            ValueError,
            r"too few of \[8, 6, 7, 8, 5, 8\], \(42,\), 3",
        ),
        (
            broken(lambda keep, state, info: keep + jnp.ones(3), name="mine"),
            ValueError,
            "the client defense mine failed at .*test_cohorts.py, line",
        ),
    ],
)
def test_a_defense_that_does_not_fit_is_named(defense, error, message):
    with pytest.raises(error, match=message):
        simulate(client_defense=defense)


def test_a_defense_by_features_needs_a_model_with_some():
    blind = SHARED["model"]._replace(features=None)
    with pytest.raises(ValueError, match=r"looking needs a model with shallow feature"):
        simulate(model=blind, client_defense=LOOKING)
    simulate(model=blind, client_defense=fixed(KEEP))


def test_a_defense_s_state_holds_no_keys():
    defense = broken(lambda *out: out)._replace(init=lambda mask: jax.random.key(0))
    with pytest.raises(TypeError, match=r"must hold no PRNG keys. Take context.key"):
        simulate(client_defense=defense)
