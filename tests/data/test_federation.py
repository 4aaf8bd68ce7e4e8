"""A federation is an index table into one pool, disjoint from the root dataset."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.data import (
    Partition,
    by_client,
    clients_from_indices,
    dirichlet,
    federate,
    hold_out,
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


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        ("classification", np.zeros((100, 3), int)),
        ("classification", np.zeros(100)),
        ("series", np.zeros((100, 3))),
        ("multilabel", np.zeros(100, int)),
        ("multilabel", np.zeros((100, 3))),
    ],
)
def test_refuses_targets_that_do_not_fit_the_task(labelled, task, targets):
    data = labelled(100)
    data = data._replace(train=data.train._replace(targets=targets), task=task)
    with pytest.raises(ValueError, match="one integer label per sample") as caught:
        federate(data, 10, iid())
    assert f"task {task!r}" in str(caught.value)
    assert "clients_from_indices" in str(caught.value)


class TestByOwner:
    @pytest.fixture
    def divided(self, labelled):
        """Owner 100 + i has i samples, for i from 0 to 20, here and there."""
        owners = np.repeat(np.arange(100, 121), np.arange(21)).astype(np.int32)
        owners = np.random.default_rng(0).permutation(owners)
        return labelled(210)._replace(owners=owners)

    def test_clients_have_all_their_samples_but_those_of_the_root(self, divided):
        clients, root = federate(divided, 5, by_client(), root_size=30, seed=2)
        left = np.setdiff1d(np.arange(210), root.inputs[:, 0])
        table, mask = np.asarray(clients.indices), np.asarray(clients.mask)
        seen = set()
        for rows, valid in zip(table, mask):
            (owner,) = set(divided.owners[rows[valid]])
            of_owner = left[divided.owners[left] == owner]
            assert sorted(rows[valid]) == of_owner.tolist()
            assert len(of_owner) >= 10
            seen.add(owner)
        assert len(seen) == 5

    def test_assign_is_given_the_owners_of_what_is_left(self, divided):
        given = []

        def assign(rng, owners, num_clients, num_classes):
            given.append(owners)
            return np.arange(len(owners)) % num_clients

        partition = Partition("mine", assign, by_owner=True)
        clients, root = federate(divided, 3, partition, root_size=30)
        (owners,) = given
        rows = np.empty(180, int)  # in the order in which assign got them
        for i in range(3):
            rows[i::3] = np.asarray(clients.indices)[i]
        np.testing.assert_array_equal(owners, divided.owners[rows])
        assert not set(rows) & set(root.inputs[:, 0])

    def test_too_few_owners(self, divided):
        message = (
            "num_clients=12, min_size=10 and 11 such owners \\(of 20\\). Lower one"
        )
        with pytest.raises(ValueError, match=message):
            federate(divided, 12, by_client(), root_size=0)

    def test_needs_owners(self, labelled):
        message = r"labelled does not say whose its samples are.*Use iid\(\), dirichlet"
        with pytest.raises(ValueError, match=message):
            federate(labelled(100), 5, by_client())

    @pytest.mark.parametrize(
        "owners", [np.zeros(209, int), np.zeros((210, 1), int), np.zeros(210)]
    )
    def test_owners_are_checked(self, divided, owners):
        message = (
            r"owners of labelled must be integers of shape \(210,\), .*; got shape"
        )
        with pytest.raises(ValueError, match=message):
            federate(divided._replace(owners=owners), 5, by_client())

    def test_divides_multilabel_data(self, divided):
        targets = np.zeros((210, 10), int)
        train = divided.train._replace(targets=targets)
        several = divided._replace(train=train, task="multilabel")
        clients, _ = federate(several, 5, by_client(), root_size=30, seed=2)
        single, _ = federate(divided, 5, by_client(), root_size=30, seed=2)
        np.testing.assert_array_equal(clients.indices, single.indices)


class TestMultilabel:
    @pytest.fixture
    def multilabel(self, labelled):
        """Sample i has the binary digits of i as its labels."""
        data = labelled(100, 7)
        targets = (np.arange(100)[:, None] >> np.arange(7)[None] & 1).astype(np.int32)
        train = data.train._replace(targets=targets)
        return data._replace(train=train, task="multilabel", name="chest")

    def test_iid_divides_as_for_single_labels(self, labelled, multilabel):
        clients, root = federate(multilabel, 6, iid(), root_size=10, seed=3)
        single, single_root = federate(labelled(100), 6, iid(), root_size=10, seed=3)
        np.testing.assert_array_equal(clients.indices, single.indices)
        np.testing.assert_array_equal(clients.mask, single.mask)
        np.testing.assert_array_equal(root.inputs, single_root.inputs)
        np.testing.assert_array_equal(
            root.targets @ 2 ** np.arange(7), root.inputs.T[0]
        )
        assert clients.targets.shape == (100, 7)
        assert clients.targets.dtype == jnp.int32
        cohort = clients.gather(jnp.array([5, 0]))
        numbers = np.asarray(cohort.targets) @ 2 ** np.arange(7)
        np.testing.assert_array_equal(numbers, cohort.inputs[..., 0])

    @pytest.mark.parametrize(
        "partition",
        [*PARTITIONS[1:], Partition("mine", lambda rng, targets, *_: targets)],
        ids=lambda p: p.name,
    )
    def test_refuses_to_divide_by_class(self, multilabel, partition):
        message = f"partition '{partition.name}' goes by class: it needs one label per"
        with pytest.raises(ValueError, match=message) as caught:
            federate(multilabel, 5, partition)
        for part in ("multilabel chest", "(100, 7)", "iid()", "clients_from_indices"):
            assert part in str(caught.value)

    def test_refuses_a_biased_root(self, multilabel):
        with pytest.raises(ValueError, match="root_bias goes by class") as caught:
            federate(multilabel, 5, iid(), root_size=10, root_bias=0.5)
        assert "Use iid() without root_bias, or clients_from_ind" in str(caught.value)


class TestHoldOut:
    @pytest.fixture
    def clients(self):
        """50 clients with 2 to 40 samples, some of them shared."""
        rng = np.random.default_rng(0)
        rows = [rng.choice(500, rng.integers(2, 41), replace=False) for _ in range(50)]
        rows[7], rows[8] = rows[7][:1].repeat(2), np.arange(40)
        targets = np.arange(500)[:, None] * np.ones(3, int)[None]
        return clients_from_indices(Examples(np.arange(500.0), targets), rows)

    @pytest.mark.parametrize("share", [0.3, 0.5])
    def test_every_client_is_split(self, clients, share):
        train, held_out = hold_out(clients, share, seed=1)
        for part in (train, held_out):
            assert part.inputs is clients.inputs
            assert part.targets is clients.targets
            assert part.indices.dtype == jnp.int32
            assert part.mask.shape == part.indices.shape
            assert part.mask.shape[1] == part.sizes().max()
            assert (np.asarray(part.indices)[~np.asarray(part.mask)] == 0).all()
        tables = [
            (np.asarray(part.indices), np.asarray(part.mask))
            for part in (clients, train, held_out)
        ]
        for i in range(50):
            samples, kept, held = (rows[i][mask[i]].tolist() for rows, mask in tables)
            assert tables[1][1][i, : len(kept)].all()  # padding comes last
            assert tables[2][1][i, : len(held)].all()
            assert len(held) == round(share * len(samples)) > 0
            assert len(kept) > 0
            assert sorted(kept + held) == sorted(samples)
            for part in (kept, held):  # in the order they had
                assert part == sorted(part, key=samples.index)

    def test_samples_are_drawn_uniformly(self):
        table = np.arange(4000 * 10).reshape(4000, 10)
        clients = clients_from_indices(Examples(table.ravel(), table.ravel()), table)
        _, held_out = hold_out(clients)  # 2 of 10
        places = np.asarray(held_out.indices) % 10
        pairs = np.zeros((10, 10), int)
        np.add.at(pairs, tuple(places.T), 1)
        # Each of 45 pairs in 4000 / 45 = 89 clients, standard deviation 9.3.
        assert (np.abs(pairs[np.triu_indices(10, 1)] - 4000 / 45) < 4 * 9.3).all()

    def test_seed(self, clients):
        first, again, other = (
            np.asarray(hold_out(clients, 0.3, seed)[0].indices) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()

    def test_a_client_too_small_is_named(self):
        pool = Examples(np.arange(20), np.arange(20))
        clients = clients_from_indices(pool, [range(9), range(9, 11), range(11, 12)])
        message = (
            "share=0.2 for 2 of 3 clients .* client 1 with 2 samples, 0 of them to hold"
        )
        with pytest.raises(ValueError, match=message):
            hold_out(clients, 0.2)
        with pytest.raises(ValueError, match="client 2 with 1 samples, 1 of them"):
            hold_out(clients, 0.6)

    @pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
    def test_share_is_checked(self, clients, share):
        with pytest.raises(
            ValueError, match=r"share must be a finite number in \(0, 1"
        ):
            hold_out(clients, share)

    def test_type_is_checked(self, labelled):
        with pytest.raises(TypeError, match="clients must be of type Clients"):
            hold_out(labelled(10))


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
