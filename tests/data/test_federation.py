"""A federation is an index table into one pool, disjoint from the root dataset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import (
    Partition,
    clients_from_indices,
    dirichlet,
    federate,
    iid,
    label_bias,
    shards,
)
from fedjax_sim.types import Examples

PARTITIONS = [iid(), dirichlet(1.0, min_size=2), shards(2), label_bias(0.5)]


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p.name)
def test_root_and_clients_are_disjoint(labelled, partition):
    clients, root = federate(labelled(2007), 20, partition, root_size=50, seed=3)
    rows = np.asarray(clients.indices)[np.asarray(clients.mask)]
    assert len(np.unique(rows)) == len(rows)
    assert not set(rows) & set(root.inputs[:, 0])
    left_over = (2007 - 50) % 40 if partition.name == "shards" else 0
    assert len(rows) == 2007 - 50 - left_over
    np.testing.assert_array_equal(root.targets, root.inputs[:, 0] % 10)


@pytest.mark.parametrize("partition", PARTITIONS, ids=lambda p: p.name)
def test_table(labelled, partition):
    data = labelled(2000)
    clients, _ = federate(data, 20, partition)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(clients))
    assert clients.indices.dtype == clients.targets.dtype == jnp.int32
    assert clients.mask.dtype == bool
    mask, sizes = np.asarray(clients.mask), np.asarray(clients.sizes())
    assert sizes.min() > 0
    assert sizes.max() == mask.shape[1]
    np.testing.assert_array_equal(mask, np.arange(mask.shape[1]) < sizes[:, None])
    assert (np.asarray(clients.indices)[~mask] == 0).all()
    np.testing.assert_array_equal(clients.inputs, data.train.inputs)
    cohort = jax.jit(clients.gather)(jnp.array([4, 1]))
    np.testing.assert_array_equal(cohort.inputs[..., 0] % 10, cohort.targets)


def test_images_stay_bytes(labelled):
    data = labelled(100)
    images = np.zeros((100, 2, 2, 1), np.uint8)
    data = data._replace(train=data.train._replace(inputs=images))
    clients, root = federate(data, 4, iid(), root_size=10)
    assert clients.inputs.dtype == root.inputs.dtype == np.uint8


def test_follows_the_partition(labelled):
    only_zeros = Partition("only_zeros", lambda rng, targets, *_: -targets)
    clients, _ = federate(labelled(100, 2), 1, only_zeros, root_size=0)
    assert clients.sizes().tolist() == [50]
    assert (np.asarray(clients.gather(0).targets) == 0).all()


def test_samples_of_a_client_are_in_random_order(labelled):
    clients, _ = federate(labelled(1000), 2, iid(), root_size=0)
    steps = np.sign(np.diff(np.asarray(clients.indices), axis=1))
    assert np.abs(steps.mean(axis=1)).max() < 0.2


def test_seed(labelled):
    tables = [
        federate(labelled(500), 5, iid(), root_size=10, seed=seed) for seed in (1, 1, 2)
    ]
    (first, root), (again, root_again), (other, root_other) = tables
    np.testing.assert_array_equal(first.indices, again.indices)
    np.testing.assert_array_equal(root.inputs, root_again.inputs)
    assert (first.indices != other.indices).any()
    assert (root.inputs != root_other.inputs).any()


def test_root_options(labelled):
    assert federate(labelled(100), 5, iid(), root_size=0)[1] is None
    _, root = federate(
        labelled(1000), 5, iid(), root_size=40, root_bias=0.5, root_class=7
    )
    assert np.bincount(root.targets, minlength=10)[7] == 20


def test_hundred_thousand_clients_is_the_same_program(labelled):
    clients, _ = federate(labelled(200_000), 100_000, shards(2), root_size=0)
    assert clients.indices.shape == (100_000, 2)
    assert len(jax.tree.leaves(clients)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_clients": 0}, "num_clients must be an integer of at least 1; got 0"),
        ({"num_clients": 100}, "num_clients=100 and 90 training samples"),
        ({"root_size": -1}, "root_size must be"),
        ({"root_size": 100}, "root_size=100 of 100 samples"),
        ({"root_bias": 2.0}, "root_bias=2.0"),
        ({"root_class": 10}, r"class of labelled, 0\.\.9; got root_class=10"),
        ({"seed": -1}, "non-negative"),
        ({"num_clients": 40, "partition": label_bias(0.5)}, r"got none for \d+ of 40"),
        ({"partition": Partition("p", lambda r, t, n, c: t[1:])}, r"got shape \(89,\)"),
        ({"partition": Partition("p", lambda r, t, n, c: t + n)}, "must assign -1 or"),
    ],
)
def test_refuses(labelled, options, message):
    settings = {"num_clients": 10, "partition": iid(), "root_size": 10, **options}
    with pytest.raises(ValueError, match=message):
        federate(labelled(100), **settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "digits"}, "data must be of type Dataset; got str. Load it"),
        ({"partition": "iid"}, "partition must be of type Partition; got str"),
        ({"partition": iid}, "must be of type Partition; got function. Make one"),
        ({"num_clients": 2.0}, "num_clients must be an integer"),
        ({"root_size": 10.0}, "root_size must be an integer"),
    ],
)
def test_refuses_other_types(labelled, options, message):
    settings = {"data": labelled(100), "num_clients": 10, "partition": iid(), **options}
    with pytest.raises(TypeError, match=message):
        federate(**settings)


@pytest.mark.parametrize("targets", [np.zeros((100, 3), int), np.zeros(100)])
def test_refuses_what_is_not_classification(labelled, targets):
    data = labelled(100)
    data = data._replace(train=data.train._replace(targets=targets))
    with pytest.raises(ValueError, match="one integer label per sample"):
        federate(data, 10, iid())


class TestClientsFromIndices:
    pool = Examples(np.arange(6), np.arange(6))

    def test_keeps_order_and_allows_shared_samples(self):
        clients = clients_from_indices(self.pool, [[5, 0], np.array([1]), [0, 1, 2]])
        assert clients.indices.tolist() == [[5, 0, 0], [1, 0, 0], [0, 1, 2]]
        assert clients.sizes().tolist() == [2, 1, 3]
        assert clients.gather(0).inputs.tolist() == [5, 0, 0]

    @pytest.mark.parametrize(
        ("indices", "message"),
        [
            ([], "at least one client"),
            ([[0], []], "got none for 1 of 2 clients, the first of them client 1"),
            ([[0], [6]], r"rows of the pool, 0\.\.5; got values in 0\.\.6"),
            ([[-1]], "rows of the pool"),
        ],
    )
    def test_refuses(self, indices, message):
        with pytest.raises(ValueError, match=message):
            clients_from_indices(self.pool, indices)
