"""Each partition has the distribution its equation says."""

import numpy as np
import pytest

from fedjax_sim.data import PARTITIONS, by_client, dirichlet, iid, label_bias, shards

EVERY = {
    "iid": iid(),
    "dirichlet": dirichlet(1.0, min_size=5),
    "shards": shards(2),
    "label_bias": label_bias(0.5),
    "by_client": by_client(),
}


def numbers_for(name, size):
    """What a partition goes by: one of ten labels, or of thirty owners."""
    count = 30 if EVERY[name].by_owner else 10
    return np.random.default_rng(0).integers(0, count, size)


def histograms(clients, targets, num_clients, num_classes):
    """Samples of every client by class, ``[num_clients, num_classes]``."""
    kept = clients >= 0
    table = np.zeros((num_clients, num_classes), int)
    np.add.at(table, (clients[kept], targets[kept]), 1)
    return table


def chi_square(observed, expected):
    return float(((observed - expected) ** 2 / expected).sum())


def assert_independent(table):
    """Rows and columns independent: chi-square within 5 sigma of its mean."""
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    assert abs(chi_square(table, expected) - freedom) < 5 * np.sqrt(2 * freedom)


def test_table_has_every_partition():
    assert set(PARTITIONS) == set(EVERY)
    assert all(EVERY[name].name == name for name in PARTITIONS)


@pytest.mark.parametrize("name", EVERY)
def test_same_seed_same_division(name):
    targets = numbers_for(name, 3000)
    first, again, other = (
        EVERY[name].assign(np.random.default_rng(seed), targets, 20, 10)
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("name", EVERY)
def test_assigns_every_sample_to_at_most_one_client_and_every_client_some(name):
    targets = numbers_for(name, 3001)
    clients = EVERY[name].assign(np.random.default_rng(1), targets, 20, 10)
    assert clients.shape == targets.shape
    assert set(np.unique(clients)) - {-1} == set(range(20))
    left_over = {"shards": 3001 % 40}
    if EVERY[name].by_owner:
        whole = [(targets == i).sum() for i in np.unique(targets[clients >= 0])]
        left_over[name] = 3001 - sum(whole)
    assert (clients == -1).sum() == left_over.get(name, 0)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "by_client"])
def test_does_not_follow_the_order_of_the_samples(name):
    """Within a class, early and late samples go to the same clients alike."""
    targets = np.tile(np.arange(10), 2000)
    clients = EVERY[name].assign(np.random.default_rng(3), targets, 10, 10)
    halves = np.split(clients[targets == 0], 2)
    table = np.stack([np.bincount(half, minlength=10) for half in halves])
    assert_independent(table[:, table.sum(axis=0) > 20])


class TestIid:
    def test_sizes_differ_by_at_most_one(self):
        clients = iid().assign(np.random.default_rng(0), np.zeros(1003, int), 10, 2)
        assert sorted(np.bincount(clients)) == [100] * 7 + [101] * 3

    def test_class_and_client_are_independent(self):
        targets = np.repeat(np.arange(10), 2000)
        clients = iid().assign(np.random.default_rng(0), targets, 20, 10)
        assert_independent(histograms(clients, targets, 20, 10))


class TestDirichlet:
    @pytest.mark.parametrize("alpha", [0.1, 1.0, 100.0])
    def test_second_moment_of_the_shares(self, alpha):
        """E[sum_i p_i^2] = (alpha + 1) / (N alpha + 1) for p ~ Dir_N(alpha)."""
        num_clients, num_classes = 10, 10
        targets = np.repeat(np.arange(num_classes), 5000)
        sums = []
        for seed in range(30):
            clients = dirichlet(alpha, min_size=1).assign(
                np.random.default_rng(seed), targets, num_clients, num_classes
            )
            shares = histograms(clients, targets, num_clients, num_classes) / 5000
            sums.append((shares**2).sum(axis=0))
        sums = np.array(sums)
        expected = (alpha + 1) / (num_clients * alpha + 1)
        assert abs(sums.mean() - expected) < 4 * sums.std() / np.sqrt(sums.size) + 1e-4

    def test_no_client_is_favoured(self):
        targets = np.repeat(np.arange(10), 500)
        shares = np.mean(
            [
                np.bincount(
                    dirichlet(1.0, min_size=1).assign(
                        np.random.default_rng(seed), targets, 5, 10
                    )
                )
                for seed in range(100)
            ],
            axis=0,
        )
        # One client's total has standard deviation 5000 * sqrt(.8 * .2 / 6 / 10).
        assert np.abs(shares - 1000).max() < 4 * 258 / np.sqrt(100)

    def test_redraws_until_every_client_has_min_size(self):
        targets = np.repeat(np.arange(10), 600)
        for seed in range(5):
            clients = dirichlet(0.3, min_size=50).assign(
                np.random.default_rng(seed), targets, 20, 10
            )
            assert np.bincount(clients, minlength=20).min() >= 50

    @pytest.mark.parametrize("alpha", [0, -1, np.nan, np.inf])
    def test_refuses_alpha(self, alpha):
        with pytest.raises(ValueError, match="positive, finite alpha"):
            dirichlet(alpha)

    @pytest.mark.parametrize("min_size", [0, -3, 2.5, True])
    def test_refuses_min_size(self, min_size):
        error = ValueError if type(min_size) is int else TypeError
        with pytest.raises(error, match=r"min_size must be an integer .* got"):
            dirichlet(1.0, min_size=min_size)

    def test_refuses_too_few_samples(self):
        with pytest.raises(ValueError, match="num_clients=11, min_size=10 and 100"):
            dirichlet(1.0).assign(np.random.default_rng(0), np.zeros(100, int), 11, 1)

    @pytest.mark.parametrize("alpha", [1e-300, 1e-3])
    def test_gives_up_with_the_way_out(self, alpha):
        targets = np.repeat(np.arange(10), 30)
        with pytest.raises(ValueError, match=r"300 draws .* Raise alpha"):
            dirichlet(alpha).assign(np.random.default_rng(0), targets, 20, 10)


class TestShards:
    @pytest.mark.parametrize("per_client", [1, 2, 5])
    def test_clients_have_equal_sizes_and_few_classes(self, per_client):
        targets = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 600))
        clients = shards(per_client).assign(np.random.default_rng(1), targets, 20, 10)
        table = histograms(clients, targets, 20, 10)
        assert (table.sum(axis=1) == 300).all()
        # 600 is a multiple of the shard size: no shard crosses a border.
        assert ((table > 0).sum(axis=1) <= per_client).all()
        assert (table % (300 // per_client) == 0).all()

    def test_at_most_one_border_in_a_shard(self):
        targets = np.random.default_rng(0).integers(0, 10, 5900)
        clients = shards(2).assign(np.random.default_rng(1), targets, 100, 10)
        num_classes = (histograms(clients, targets, 100, 10) > 0).sum(axis=1)
        assert num_classes.max() <= 4
        assert np.maximum(num_classes - 2, 0).sum() <= 9  # ten classes, nine borders

    def test_left_over_samples_are_of_all_classes_alike(self):
        targets = np.repeat(np.arange(10), 100)
        left_over = np.zeros(10, int)
        for seed in range(50):
            clients = shards(1).assign(np.random.default_rng(seed), targets, 90, 10)
            assert (clients == -1).sum() == 10
            left_over += np.bincount(targets[clients == -1], minlength=10)
        assert chi_square(left_over, 50) < 9 + 5 * np.sqrt(18)

    def test_every_client_is_equally_likely_to_get_a_class(self):
        targets = np.repeat(np.arange(10), 20)
        got_zero = np.zeros(10, int)
        for seed in range(200):
            clients = shards(2).assign(np.random.default_rng(seed), targets, 10, 10)
            got_zero += np.bincount(clients[targets == 0], minlength=10) // 10
        assert chi_square(got_zero, 40) < 9 + 5 * np.sqrt(18)

    @pytest.mark.parametrize("per_client", [0, -1, 1.5])
    def test_refuses_per_client(self, per_client):
        error = ValueError if type(per_client) is int else TypeError
        with pytest.raises(error, match="per_client must be an integer"):
            shards(per_client)

    def test_refuses_more_shards_than_samples(self):
        with pytest.raises(ValueError, match="num_clients=10, per_client=3 and 29"):
            shards(3).assign(np.random.default_rng(0), np.zeros(29, int), 10, 1)


class TestLabelBias:
    @pytest.mark.parametrize(("q", "num_clients"), [(0.5, 20), (0.3, 23), (0.9, 10)])
    def test_fraction_of_a_class_in_each_group(self, q, num_clients):
        size, num_classes = 4000, 10
        targets = np.repeat(np.arange(num_classes), size)
        clients = label_bias(q).assign(
            np.random.default_rng(0), targets, num_clients, num_classes
        )
        table = histograms(clients, targets, num_clients, num_classes)
        group = table.argmax(axis=1)  # the class a client has most of
        group_sizes = np.bincount(group, minlength=num_classes)
        assert set(group_sizes) <= {num_clients // 10, -(-num_clients // 10)}
        by_group = np.stack([table[group == g].sum(axis=0) for g in range(num_classes)])
        expected = np.full((num_classes, num_classes), (1 - q) / 9)
        np.fill_diagonal(expected, q)
        sigma = np.sqrt(size * expected * (1 - expected))
        assert (np.abs(by_group - size * expected) < 4.5 * sigma).all()
        # Within a group every client is equally likely.
        mean = by_group[group] / group_sizes[group][:, None]
        assert (np.abs(table - mean) < 5 * np.sqrt(mean) + 1).all()

    def test_one_over_num_classes_is_iid(self):
        targets = np.repeat(np.arange(10), 2000)
        clients = label_bias(0.1).assign(np.random.default_rng(0), targets, 20, 10)
        table = histograms(clients, targets, 20, 10)
        assert_independent(table)
        assert chi_square(table.sum(axis=1), 1000) < 19 + 5 * np.sqrt(38)

    def test_all_or_nothing(self):
        targets = np.repeat(np.arange(4), 500)
        for q, num_classes in ((1.0, 1), (0.0, 3)):
            clients = label_bias(q).assign(np.random.default_rng(0), targets, 8, 4)
            table = histograms(clients, targets, 8, 4)
            assert ((table > 0).sum(axis=1) == num_classes).all()

    def test_groups_are_drawn_at_random(self):
        targets = np.repeat(np.arange(4), 50)
        first = np.zeros(8, int)
        for seed in range(200):
            clients = label_bias(1.0).assign(np.random.default_rng(seed), targets, 8, 4)
            first += np.bincount(clients[targets == 0], minlength=8) > 0
        assert chi_square(first, 50) < 7 + 5 * np.sqrt(14)

    @pytest.mark.parametrize("q", [-0.1, 1.1, np.nan])
    def test_refuses_q(self, q):
        with pytest.raises(ValueError, match=r"probability q in \[0, 1\]"):
            label_bias(q)

    @pytest.mark.parametrize(("num_clients", "num_classes"), [(9, 10), (5, 1)])
    def test_refuses_groups_without_clients(self, num_clients, num_classes):
        with pytest.raises(ValueError, match="label_bias needs at least two classes"):
            label_bias(0.5).assign(
                np.random.default_rng(0), np.zeros(100, int), num_clients, num_classes
            )


class TestByClient:
    # Owner i of these has i samples.
    owners = np.random.default_rng(0).permutation(np.repeat(np.arange(40), range(40)))

    def test_a_client_is_one_owner_with_all_samples(self):
        clients = by_client(min_size=7).assign(
            np.random.default_rng(1), self.owners, 20, 62
        )
        chosen = [np.unique(self.owners[clients == i]) for i in range(20)]
        assert [len(owner) for owner in chosen] == [1] * 20
        assert len(np.unique(chosen)) == 20
        assert np.min(chosen) >= 7
        np.testing.assert_array_equal(np.bincount(clients + 1)[1:], np.ravel(chosen))

    def test_all_who_have_enough_are_drawn_alike(self):
        times = np.zeros(40, int)
        for seed in range(400):
            clients = by_client(min_size=20).assign(
                np.random.default_rng(seed), self.owners, 5, 62
            )
            times[np.unique(self.owners[clients >= 0])] += 1
        assert times[:20].sum() == 0
        assert chi_square(times[20:], 400 * 5 / 20) < 19 + 5 * np.sqrt(38)

    def test_every_place_is_drawn_alike(self):
        """Client 0 is not the owner with the lowest number."""
        first = [
            self.owners[
                by_client(30).assign(np.random.default_rng(seed), self.owners, 10, 62)
                == 0
            ][0]
            for seed in range(300)
        ]
        assert chi_square(np.bincount(first, minlength=40)[30:], 30) < 9 + 5 * 4.3

    def test_as_many_as_there_are(self):
        clients = by_client(30).assign(np.random.default_rng(0), self.owners, 10, 62)
        assert set(self.owners[clients >= 0]) == set(range(30, 40))
        message = (
            r"num_clients=11, min_size=30 and 10 such owners \(of 39\)\. Lower one"
        )
        with pytest.raises(ValueError, match=message):
            by_client(30).assign(np.random.default_rng(0), self.owners, 11, 62)

    @pytest.mark.parametrize("min_size", [0, -3, 2.5, True])
    def test_refuses_min_size(self, min_size):
        error = ValueError if type(min_size) is int else TypeError
        with pytest.raises(error, match="by_client's min_size must be an integer"):
            by_client(min_size)
