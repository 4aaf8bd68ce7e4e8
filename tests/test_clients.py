"""Local training against plain loops, on whole, ragged and padded clients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedjax_sim as fs
from fedjax_sim.models import Model
from fedjax_sim.types import ClientData

# A model without inputs to speak of: loss_i = w[target_i], so a gradient step of rate
# -1 counts how often each sample was visited, weighted by 1 / batch size.
COUNTER = Model(
    init=lambda key: jnp.zeros(8),
    apply=lambda params, inputs: jnp.broadcast_to(params, (inputs.shape[0], 8)),
    loss=lambda outputs, targets: outputs[jnp.arange(targets.shape[0]), targets],
)


def train(update, size, padded, seed=0, mask=True, round=0, model=COUNTER):
    data = ClientData(
        jnp.zeros((padded, 1)),
        jnp.arange(padded, dtype=jnp.int32) % 8,
        jnp.arange(padded) < size if mask else None,
    )
    params = model.init(jax.random.key(9))
    return update.apply(model, jax.random.key(seed), params, data, (), round)


@pytest.mark.parametrize(
    ("size", "batch", "epochs"), [(8, 4, 1), (8, 3, 2), (7, 3, 1), (5, 5, 3)]
)
def test_an_epoch_visits_every_sample_once_and_no_padding(size, batch, epochs):
    update = fs.local_sgd(optax.sgd(-1.0), epochs=epochs, batch_size=batch)
    visits, _, _ = train(update, size, 8)
    # Each visit adds 1 / (size of its batch); only the last batch is smaller.
    last = size % batch or batch
    low, high = epochs / batch, epochs / last
    np.testing.assert_array_equal(visits[size:], 0)
    assert np.all(visits[:size] >= low - 1e-6)
    assert np.all(visits[:size] <= high + 1e-6)
    np.testing.assert_allclose(visits.sum(), epochs * -(-size // batch), rtol=1e-6)


def test_padding_does_not_change_a_client():
    update = fs.local_sgd(optax.adam(0.1), epochs=2, batch_size=2)
    # The same draws only if the permutation has the same length, so pad by the mask.
    whole = train(update, 8, 8, mask=False)
    masked = train(update, 8, 8, mask=True)
    jax.tree.map(np.testing.assert_array_equal, whole, masked)


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_exact_steps(steps):
    update = fs.local_sgd(optax.sgd(-1.0), steps=steps, batch_size=4)
    visits, _, _ = train(update, 8, 8)
    np.testing.assert_allclose(visits.sum(), steps, rtol=1e-6)
    again = fs.local_sgd(optax.sgd(-1.0), epochs=5, batch_size=4).with_steps(steps)
    np.testing.assert_array_equal(train(again, 8, 8)[0], visits)


def test_batches_differ_between_keys_and_epochs():
    update = fs.local_sgd(optax.sgd(-1.0), steps=1, batch_size=4)
    draws = {tuple(np.asarray(train(update, 8, 8, seed=s)[0])) for s in range(20)}
    assert len(draws) > 5


def test_matches_a_plain_loop_of_softmax_regression():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 3)).astype(np.float32)
    y = np.array([0, 1, 1, 0, 1, 0], np.int32)
    model = fs.models.mlp((3,), num_classes=2, hidden=())
    params = model.init(jax.random.key(0))
    update = fs.local_sgd(optax.sgd(0.5), epochs=3, batch_size=6)
    data = ClientData(jnp.asarray(x), jnp.asarray(y), None)
    got, _, info = update.apply(model, jax.random.key(0), params, data, (), 0)

    w = np.asarray(params["Dense_0"]["kernel"], np.float64)
    b = np.asarray(params["Dense_0"]["bias"], np.float64)
    start, losses = (w.copy(), b.copy()), []
    for _ in range(3):
        logits = x @ w + b
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(6), y]).mean())
        p[np.arange(6), y] -= 1
        w, b = w - 0.5 * x.T @ p / 6, b - 0.5 * p.mean(0)
    np.testing.assert_allclose(got["Dense_0"]["kernel"], w - start[0], atol=1e-5)
    np.testing.assert_allclose(got["Dense_0"]["bias"], b - start[1], atol=1e-5)
    np.testing.assert_allclose(info.loss, np.mean(losses), rtol=1e-5)


# Samples that a defense left out, between those that stay

HOLES = np.array([1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0], bool)  # 6 of 11


@functools.cache
def regression(count, number, batch_size, rate):
    """Softmax regression on one client's ``(inputs, targets, mask)``, compiled once."""
    model = fs.models.mlp((3,), num_classes=2, hidden=())
    params = {"Dense_0": {"kernel": 0.1 * jnp.eye(3, 2), "bias": jnp.zeros(2)}}
    update = fs.local_sgd(optax.sgd(rate), batch_size=batch_size, **{count: number})

    @jax.jit
    def train(inputs, targets, mask):
        data = ClientData(inputs, targets, mask)
        change, _, info = update.apply(model, jax.random.key(0), params, data, (), 0)
        return change, info.loss

    return train


def samples():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(len(HOLES), 3)).astype(np.float32)
    return x, rng.integers(0, 2, len(HOLES)).astype(np.int32)


@pytest.mark.parametrize("count", [{"epochs": 2}, {"steps": 5}, {"steps": 1}])
def test_samples_left_out_in_the_middle_are_never_visited(count):
    update = fs.local_sgd(optax.sgd(-1.0), batch_size=4, **count)
    targets = jnp.arange(len(HOLES))  # one class a sample
    model = COUNTER._replace(
        init=lambda key: jnp.zeros(len(HOLES)),
        apply=lambda params, x: jnp.broadcast_to(params, (len(x), len(HOLES))),
    )
    data = ClientData(jnp.zeros((len(HOLES), 1)), targets, jnp.asarray(HOLES))
    visits, _, _ = update.apply(model, jax.random.key(0), model.init(None), data, (), 0)
    steps = count.get("steps", 2 * 2)  # 6 samples in batches of 4
    np.testing.assert_allclose(visits.sum(), steps, rtol=1e-6)
    np.testing.assert_array_equal(visits[~HOLES], 0)
    if steps > 1:
        assert np.all(visits[HOLES] > 0)


@pytest.mark.parametrize("count", ["epochs", "steps"])
def test_a_client_with_holes_is_one_that_has_only_those_samples(count):
    """In full batches, so that the order of the draws makes no difference."""
    train = regression(count, 3, len(HOLES), 0.5)
    x, y = samples()
    masked, whole = train(x, y, HOLES), train(x[HOLES], y[HOLES], None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5), masked, whole)


@pytest.mark.parametrize("count", ["epochs", "steps"])
def test_what_a_sample_left_out_holds_makes_no_difference(count):
    train = regression(count, 2, 4, 0.1)
    x, y = samples()
    expected = train(x, y, HOLES)
    for value in (np.nan, np.inf, 1e30):
        found = train(np.where(HOLES[:, None], x, value).astype(np.float32), y, HOLES)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("count", ["epochs", "steps"])
def test_a_client_without_samples_stays_where_it_is(count):
    change, loss = regression(count, 2, 4, 0.1)(*samples(), np.zeros_like(HOLES))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), change)
    assert np.isnan(loss)  # the mean over no step: the engine leaves it out of its own


def test_rate_may_depend_on_the_round():
    update = fs.local_sgd(
        lambda round: optax.sgd(1.0 / (1 + round)), steps=1, batch_size=8
    )
    first, later = train(update, 8, 8, round=0)[0], train(update, 8, 8, round=3)[0]
    np.testing.assert_allclose(first, 4 * later, rtol=1e-6)


def test_momentum_starts_afresh():
    update = fs.local_sgd(optax.sgd(0.1, momentum=0.9), steps=2, batch_size=8)
    got, _, _ = train(update, 8, 8)
    np.testing.assert_allclose(got, np.full(8, -0.1 * (1 + 1.9) / 8), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 2}, "exactly one of epochs and steps"),
        ({"batch_size": 2, "epochs": 1, "steps": 1}, "exactly one of epochs and steps"),
        ({"batch_size": 2, "epochs": 0}, "epochs must be an integer of at least 1"),
        ({"batch_size": 0, "epochs": 1}, "batch_size must be an integer of at least 1"),
        ({"batch_size": 2, "steps": -3}, "steps must be an integer of at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        fs.local_sgd(optax.sgd(0.1), **options)


def test_batch_larger_than_a_client():
    update = fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=10)
    with pytest.raises(ValueError, match=r"smallest client \(7 samples\).*Lower"):
        update.validate(np.array([30, 7]))


@pytest.mark.parametrize("value", [1.5, True, "2", float("nan")])
def test_counts_must_be_integers(value):
    with pytest.raises(TypeError, match="batch_size must be an integer"):
        fs.local_sgd(optax.sgd(0.1), epochs=1, batch_size=value)


@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adam, None, 0.1])
def test_an_optimizer_that_is_none(optimizer):
    with pytest.raises(TypeError, match="forget to call it"):
        fs.local_sgd(optimizer, epochs=1, batch_size=2)


def test_precision_is_for_gpus():
    with pytest.raises(ValueError, match=r"unknown precision 'fp8'.* Valid: bf16, "):
        fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=2, precision="fp8")
    update = fs.local_sgd(optax.sgd(0.1), steps=1, batch_size=2, precision="tf32")
    if jax.default_backend() == "cpu":
        # Before any training, and not silently in float32.
        with pytest.raises(ValueError, match=r"is for GPUs.* Pass precision=.float32"):
            train(update, 8, 8)
    else:
        train(update, 8, 8)
