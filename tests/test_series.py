"""Clients that store series: what the engine makes of them, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.data.series import states

N, L, C = 4, 6, 2
VITALS = fs.data.load_vitals("generated", patients=N, minutes=90, missing=0.05)
DEVICES = fs.data.federate_series(VITALS, length=L, root_size=8)
WINDOWS = fs.data.windows(L)
MODEL = fs.models.bilstm((L, 5), num_classes=3, hidden=4)
SHARED = {
    "model": MODEL,
    "clients": DEVICES.clients,
    "test": DEVICES.test,
    "local_test": DEVICES.local_test,
    "root": DEVICES.root,
    "make_samples": WINDOWS,
    "client_update": fs.local_sgd(optax.adam(0.01), epochs=1, batch_size=8),
    "aggregator": fs.aggregators.fedavg(),
}


def simulate(**options):
    return fs.Simulation(**{**SHARED, **options})


def shifting(seen=None):
    """An attack that adds 1 to step t of the first channel, and t to its label."""

    def poison(key, data, context):
        steps = jnp.arange(len(data.targets))
        moved = data.inputs.at[:, 0].add(1.0)
        return data._replace(inputs=moved, targets=(data.targets + steps) % 3)

    return fs.types.DataAttack(poison, lambda classes: None, "shifting")


def recording():
    """A client defense that keeps everything, and reports what it was shown."""

    def apply(gather, state, context):
        def one(id):
            data = gather(id)
            valid = data.valid[:, None, None]
            return {
                "sum": jnp.where(valid, data.inputs, 0.0).sum(),
                "labels": jnp.where(data.valid, data.targets, 0).sum(),
                "count": data.valid.sum(),
            }

        info = jax.vmap(one)(context.client_ids)
        keep = jnp.ones((N, DEVICES.clients.mask.shape[1]), bool)
        return keep, state, info

    needs = frozenset({"client_ids"})
    return fs.types.ClientDefense(lambda mask: (), apply, needs, "recording")


def expected(device, poisoned):
    """The same by loops, from the stored series."""
    clients = jax.device_get(DEVICES.clients)
    rows = clients.indices[device]
    x, y = clients.inputs[rows].astype(np.float64), clients.targets[rows].copy()
    if poisoned:
        x[:, 0] += 1.0
        y = (y + np.arange(len(y))) % 3
    total, labels, count = 0.0, 0, 0
    for start in np.flatnonzero(clients.mask[device]):
        total += x[start : start + L].sum()
        labels += y[start + L]
        count += 1
    return {"sum": total, "labels": labels, "count": count}


def test_an_attack_changes_the_series_and_windows_are_cut_from_it():
    sim = simulate(
        data_attack=shifting(), byzantine_clients=(2,), client_defense=recording()
    )
    state, history = sim.run(jax.random.key(0), num_rounds=1)
    assert np.flatnonzero(state.byzantine).tolist() == [2]
    assert history.num_byzantine.tolist() == [1]
    for device in range(N):
        for name, value in expected(device, device == 2).items():
            np.testing.assert_allclose(
                history.defense[name][0, device], value, rtol=1e-5, err_msg=name
            )
    # Every window of the poisoned device holds a changed step, and no other does.
    poisoned = history.defense["poisoned"][0]
    assert poisoned.tolist() == [0, 0, expected(2, True)["count"], 0]
    assert history.defense["samples"][0].tolist() == DEVICES.clients.sizes().tolist()


def test_a_device_trains_on_its_windows():
    """One full batch of one device: the gradient step of its windows, cut by a loop."""
    clients = jax.tree.map(lambda x: x[:1], DEVICES.clients[2:])
    clients = DEVICES.clients._replace(indices=clients[0], mask=clients[1])
    size = int(clients.sizes()[0])
    update = fs.local_sgd(optax.sgd(0.5), epochs=1, batch_size=size)
    sim = simulate(clients=clients, local_test=None, root=None, client_update=update)
    start = sim.init(jax.random.key(1))
    state, _ = sim.run(jax.random.key(1), num_rounds=1)
    host = jax.device_get(clients)
    begins = host.indices[0][host.mask[0]]
    x = np.stack([host.inputs[b : b + L] for b in begins])
    y = np.array([host.targets[b + L] for b in begins])
    np.testing.assert_array_equal(
        y, states(np.stack([host.inputs[b + L] for b in begins]))
    )

    def loss(params):
        return MODEL.loss(MODEL.apply(params, x), y).mean()

    grad = jax.grad(loss)(start.params)
    moved = jax.tree.map(lambda w, g: w - 0.5 * g, start.params, grad)
    for found, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(moved)):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-6)


def test_held_out_series_are_evaluated_window_by_window():
    sim = simulate(data_attack=shifting(), byzantine_clients=(0,))
    state, history = sim.run(jax.random.key(2), num_rounds=1)
    held = jax.device_get(DEVICES.local_test)
    for device in range(N):
        rows = held.indices[device]
        x, y = held.inputs[rows].copy(), held.targets[rows].copy()
        if device == 0:
            x[:, 0] += 1.0
            y = (y + np.arange(len(y))) % 3
        begins = np.flatnonzero(held.mask[device])
        outputs = MODEL.apply(state.params, np.stack([x[b : b + L] for b in begins]))
        hits = np.argmax(outputs, axis=1) == y[begins + L]
        np.testing.assert_allclose(
            history.local["accuracy"][0, device], hits.mean(), rtol=1e-5
        )


def test_rules_with_a_root_dataset_train_on_its_windows():
    sim = simulate(aggregator=fs.aggregators.fltrust())
    _, history = sim.run(jax.random.key(0), num_rounds=2)
    assert np.isfinite(history.train_loss).all()
    assert (history.aggregate_norm > 0).all()


def test_seeds_and_chunks_change_nothing():
    sim = simulate(data_attack=shifting(), byzantine_clients=(1,), client_chunk=1)
    keys = jnp.stack([jax.random.key(s) for s in range(2)])
    _, both = sim.run(keys, num_rounds=2)
    _, alone = simulate(data_attack=shifting(), byzantine_clients=(1,)).run(
        keys[1], num_rounds=2
    )
    np.testing.assert_allclose(both.loss[1], alone.loss, rtol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((4,), "ids from 0 to 3; got 4"),
        ((1, 1), "names a client twice"),
        ((0, 1, 2, 3), "from 0 to 3 for 4 clients"),
        ((), "there is an attack"),
    ],
)
def test_byzantine_clients_that_are_none(ids, message):
    with pytest.raises(ValueError, match=message):
        simulate(data_attack=shifting(), byzantine_clients=ids)


def test_byzantine_clients_of_another_kind():
    with pytest.raises(TypeError, match="byzantine_clients must be of type tuple"):
        simulate(data_attack=shifting(), byzantine_clients=[1])
    with pytest.raises(TypeError, match="byzantine_clients must be an integer"):
        simulate(data_attack=shifting(), byzantine_clients=(1.0,))
    with pytest.raises(ValueError, match="names 1 clients, but num_byzantine is 2"):
        simulate(data_attack=shifting(), byzantine_clients=(1,), num_byzantine=2)
    with pytest.raises(ValueError, match="but there is no attack"):
        simulate(byzantine_clients=(1,))


def test_other_samples_than_the_clients_make():
    other = DEVICES.test._replace(inputs=DEVICES.test.inputs[:, :-1])
    for name in ("test", "root"):
        message = rf"{name} must have inputs like what make_samples makes .*\(6, 5\)"
        with pytest.raises(ValueError, match=message):
            simulate(**{name: other})
    with pytest.raises(ValueError, match="the model cannot take"):
        simulate(model=fs.models.cnn())


def no_mask(data):
    return WINDOWS(data)._replace(mask=None)


def fewer(data):
    return jax.tree.map(lambda x: x[1:], WINDOWS(data))


def floats(data):
    made = WINDOWS(data)
    return made._replace(targets=made.targets.astype(jnp.float32))


@pytest.mark.parametrize(
    ("make_samples", "error", "message"),
    [
        (no_mask, TypeError, "make_samples must return ClientData with a mask"),
        (fewer, TypeError, "as many rows as the client has"),
        (floats, TypeError, "make_samples: targets must have the structure"),
        (lambda data: data.inputs, TypeError, "must return ClientData"),
        (fs.data.windows(1000), ValueError, "need a series of at least 1001"),
    ],
)
def test_make_samples_that_break_their_contract(make_samples, error, message):
    with pytest.raises(error, match=message):
        simulate(make_samples=make_samples)


def test_systems_of_a_comparison_cut_alike():
    with pytest.raises(ValueError, match="differ in make_samples"):
        fs.compare({"a": simulate(), "b": simulate(make_samples=fs.data.windows(L))})
