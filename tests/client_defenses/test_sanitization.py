"""Sanitization as a defense: who keeps what, when, and with whom side by side."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedjax_sim.client_defenses import CLIENT_DEFENSES, sanitization
from fedjax_sim.client_defenses.sanitization import (
    in_batches,
    label_codes,
    map_blocks,
    vote_out,
)
from fedjax_sim.types import ClientData, RoundContext
from tests.pages import check, inputs, options
from tests.references import sanitization as oracle

module = importlib.import_module("fedjax_sim.client_defenses.sanitization")
K, N, M = 3, 5, 20
SIZES = np.array([20, 13, 9, 16, 20])
MASK = np.arange(M)[None] < SIZES[:, None]
W = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
START, EVERY = 3, 2


def features(x):
    return jnp.tanh(0.3 * jnp.matmul(x, W, precision="highest"))


def federation(seed, flipped=0.25, spread=0.7):
    """Blobs, one for each label; a share of the labels is another. Padding is garbage.

    The first client has copies of two samples only, the last samples of two blobs.
    """
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(K, 5)) * 3.0
    blob = rng.integers(0, K, (N, M))
    blob[-1] %= 2
    x = centres[blob] + spread * rng.normal(size=(N, M, 5))
    two = np.resize([np.argmax(blob[0] == 1), np.argmax(blob[0] == 2)], M)
    x[0], blob[0] = x[0][two], blob[0][two]
    flips = rng.uniform(size=(N, M)) < flipped
    y = np.where(flips, (blob + 1) % K, blob)
    x[~MASK], y[~MASK] = np.nan, 1
    return x.astype(np.float32), y.astype(np.int32), flips


def play(defense, with_features, key, index, state, x, y, mask, ids):
    def gather(id):
        return ClientData(x[id], y[id], mask[id])

    context = RoundContext(
        key=key,
        round=index,
        client_ids=ids,
        features=features if with_features else None,
    )
    return defense.apply(gather, state, context)


# Between them, both values of every option.
LOCAL = sanitization(K, start=START, every=EVERY)
GLOBAL = sanitization(K, vote="global", server="convergence", features="inputs")
play_local = functools.partial(play, LOCAL, True)
play_global = functools.partial(play, GLOBAL, False)
jit_local, jit_global = jax.jit(play_local), jax.jit(play_global)
EVERYBODY = np.arange(N)


def fresh(defense=LOCAL, mask=MASK):
    return defense.init(jnp.asarray(mask))


def draws(key, h):
    """The draws of every client's k-means++: the first of all its draws."""
    shape = (K + min(K + 10, h) * h,)
    each = [jax.random.fold_in(key, id) for id in range(N)]
    return np.stack([jax.random.uniform(own, shape)[:K] for own in each])


def samples(array):
    return [list(rows[:size]) for rows, size in zip(array, SIZES)]


def padded(kept):
    return np.array([list(row) + [False] * (M - len(row)) for row in kept])


@pytest.mark.parametrize("seed", range(5))
def test_against_the_reference_local(seed):
    x, y, _ = federation(seed, spread=1.5)
    key = jax.random.key(seed)
    keep, state, info = jit_local(key, START, fresh(), x, y, MASK, EVERYBODY)
    A = samples(np.asarray(features(x)))
    expected, apart = oracle.sanitize(A, samples(y), draws(key, 8), K)
    np.testing.assert_array_equal(keep, padded(expected))
    np.testing.assert_array_equal(state.keep, keep)
    np.testing.assert_allclose(info["separation"], apart, rtol=1e-3)
    np.testing.assert_array_equal(info["num_kept"], keep.sum(axis=1))
    assert 0 < keep.sum() < MASK.sum()


def as_images(x):
    scaled = np.clip(np.nan_to_num(x[..., :4]) * 20 + 128, 0, 255)
    return scaled.astype(np.uint8).reshape(N, M, 2, 2, 1)


def pixels(seed):
    """Images as they are stored, each with a set of labels."""
    x, y, _ = federation(seed, spread=4.0)
    sets = np.array([[0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]], np.int32)
    return as_images(x), sets[y]


def expected_of_pixels(seed, vote="global", server_steps=50, **options):
    x, y = pixels(seed)
    A = samples(x.reshape(N, M, 4) / np.float32(255))
    # Of sets, the smaller is the one without the last label in which they differ.
    sets = [[tuple(labels[::-1]) for labels in client] for client in samples(y)]
    own = draws(jax.random.key(seed), 4)
    return padded(oracle.sanitize(A, sets, own, K, vote, server_steps, **options)[0])


@pytest.mark.parametrize("seed", range(5))
def test_against_the_reference_global_multilabel(seed):
    x, y = pixels(seed)
    key = jax.random.key(seed)
    keep = jit_global(key, 0, fresh(GLOBAL), x, y, MASK, EVERYBODY)[0]
    np.testing.assert_array_equal(keep, expected_of_pixels(seed))
    assert 0 < keep.sum() < MASK.sum()


@pytest.mark.parametrize(
    "other", [{"vote": "local"}, {"server_steps": 1}, {"ratio": 1.0}], ids=str
)
def test_every_option_matters_to_these_clients(other):
    assert any(
        np.any(expected_of_pixels(seed) != expected_of_pixels(seed, **other))
        for seed in range(5)
    )


def test_flipped_labels_of_well_separated_classes_go_and_others_stay():
    """One of every client and class, where it has three or more."""
    x, y, _ = federation(11, flipped=0.0, spread=0.05)
    flipped = np.zeros((N, M), bool)
    for i, label in np.ndindex(N, K):
        rows = np.flatnonzero(MASK[i] & (y[i] == label))
        flipped[i, rows[2:3]] = True
    assert flipped.sum() > 10
    y = np.where(flipped, (y + 1) % K, y)
    keep = jit_local(jax.random.key(1), START, fresh(), x, y, MASK, EVERYBODY)[0]
    np.testing.assert_array_equal(keep, MASK & ~flipped)


def test_a_client_all_of_whose_labels_are_wrong():
    """It keeps them by its own vote, and loses every sample by that of all."""
    x, blob, _ = federation(3, flipped=0.0, spread=0.05)
    y = np.eye(4, dtype=np.int32)[np.where(EVERYBODY[:, None] == 1, 3, blob)]
    images = as_images(x)
    keep, _, info = jit_global(
        jax.random.key(0), 0, fresh(GLOBAL), images, y, MASK, EVERYBODY
    )
    np.testing.assert_array_equal(keep, MASK & (EVERYBODY != 1)[:, None])
    assert info["num_kept"].tolist() == [20, 0, 9, 16, 20]

    y = np.where(EVERYBODY[:, None] == 1, 7, blob)
    keep = jit_local(jax.random.key(0), START, fresh(), x, y, MASK, EVERYBODY)[0]
    np.testing.assert_array_equal(keep, MASK)


def test_rounds_that_cluster():
    x, y, _ = federation(0)
    _, other, _ = federation(1)
    state, kept = fresh(), []
    for index in range(START + EVERY + 1):
        labels = y if index == START else other
        keep, state, info = jit_local(
            jax.random.key(index), index, state, x, labels, MASK, EVERYBODY
        )
        kept.append(np.asarray(keep))
        if index < START:
            assert info["separation"].tolist() == [0.0] * N
            assert info["num_kept"].tolist() == SIZES.tolist()
    for index, expected in enumerate([MASK, MASK, MASK, kept[3], kept[3], kept[5]]):
        np.testing.assert_array_equal(kept[index], expected)
    assert not np.array_equal(kept[3], MASK)
    # Anew from all samples, those dropped before included.
    assert np.any(kept[5] & ~kept[3])
    again = jit_local(jax.random.key(5), 5, fresh(), x, other, MASK, EVERYBODY)[0]
    np.testing.assert_array_equal(kept[5], again)
    assert jit_local._cache_size() == 1


def test_once_is_once():
    x, y = pixels(0)
    _, state, _ = jit_global(jax.random.key(0), 0, fresh(GLOBAL), x, y, MASK, EVERYBODY)
    for index in (1, 2, 3):
        keep, after, _ = jit_global(
            jax.random.key(9), index, state, x, y[::-1].copy(), MASK, EVERYBODY
        )
        jax.tree.map(np.testing.assert_array_equal, after, state)
        np.testing.assert_array_equal(keep, state.keep)


def test_a_cohort_gets_its_rows_of_what_all_clients_found():
    x, y, _ = federation(2)
    arguments = (jax.random.key(3), START, fresh(), x, y, MASK)
    keep, state, info = jit_local(*arguments, EVERYBODY)
    ids = np.array([3, 1, 1, 3, 3])
    some, after, part = jit_local(*arguments, ids)
    np.testing.assert_array_equal(some, keep[ids])
    jax.tree.map(np.testing.assert_array_equal, after, state)
    for name, found in info.items():
        np.testing.assert_array_equal(part[name], found[ids])


def test_padding_and_samples_without_finite_features_change_nothing():
    x, y, _ = federation(4)
    arguments = (jax.random.key(3), START, fresh())
    keep = jit_local(*arguments, x, y, MASK, EVERYBODY)[0]
    x[~MASK], y[~MASK] = 1e3, 0
    same = jit_local(*arguments, x, y, MASK, EVERYBODY)[0]
    np.testing.assert_array_equal(keep, same)
    # One with NaN among its features is as one that is not there, and is dropped.
    broken, gone = x.copy(), MASK.copy()
    broken[2, 4, 1], gone[2, 4] = np.nan, False
    found = jit_local(*arguments, broken, y, MASK, EVERYBODY)[0]
    expected = jit_local(*arguments, x, y, gone, EVERYBODY)[0]
    np.testing.assert_array_equal(found, expected)
    assert not found[2, 4]


def test_eager_seeds_side_by_side_client_by_client_are_each_alone(monkeypatch):
    """And without a mask, where no client is padded."""
    both = [federation(seed)[:2] for seed in (0, 1)]
    x, y = (jnp.stack(part) for part in zip(*both))
    x, everybody = jnp.nan_to_num(x), jnp.ones((N, M), bool)
    keys = jax.random.split(jax.random.key(0), 2)

    def run(key, state, x, y):
        def gather(id):
            return ClientData(x[id], y[id], None)

        context = RoundContext(
            key, round=jnp.int32(START), client_ids=EVERYBODY, features=features
        )
        return LOCAL.apply(gather, state, context)

    monkeypatch.setattr(module, "_MEMORY", 1)
    state = jax.tree.map(lambda a: jnp.stack([a, a]), fresh(mask=everybody))
    keep, after, _ = jax.vmap(run)(keys, state, x, y)
    for i in (0, 1):
        state = fresh(mask=everybody)
        alone, found, _ = jit_local(
            keys[i], START, state, x[i], y[i], everybody, EVERYBODY
        )
        np.testing.assert_array_equal(keep[i], alone)
        np.testing.assert_allclose(after.separation[i], found.separation, rtol=1e-4)
    assert not np.array_equal(keep[0], keep[1])


def test_the_round_stays_a_branch_with_seeds_side_by_side():
    """And not both sides of it, of which one is taken."""
    x, y, _ = federation(0)
    state = jax.tree.map(lambda a: jnp.stack([a, a]), fresh())
    run = jax.vmap(play_local, in_axes=(0, None, 0, None, None, None, None))
    keys = jax.random.split(jax.random.key(0), 2)
    jaxpr = jax.make_jaxpr(run)(keys, START, state, x, y, MASK, EVERYBODY)
    assert [eqn.primitive.name for eqn in jaxpr.eqns].count("cond") == 1


def test_map_blocks_and_batches(monkeypatch):
    for count, size in [(5, 2), (3, 8)]:
        ids, squares = map_blocks(lambda i: (i, {"square": i * i}), count, size)
        assert ids.tolist() == list(range(count))
        assert squares["square"].tolist() == [i * i for i in range(count)]
    x = jnp.arange(14, dtype=jnp.uint8).reshape(7, 2, 1)
    lengths = []

    def extract(batch):
        lengths.append(len(batch))
        return batch + 1

    for most, length in [(7, 7), (6, 4)]:
        monkeypatch.setattr(module, "_BATCH", most)
        found = in_batches(extract, x)
        assert lengths[-1] == length
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, np.arange(1, 15).reshape(7, 2))


def test_worked_example():
    name = "kfed/sanitize"
    clusters, y = (jnp.array(inputs(name)[part]) for part in ("cluster", "y"))
    k = options(name)["k"]
    mode, keep = vote_out(clusters, y, jnp.ones(len(y), bool), k)
    check(name, mode=mode, keep=keep)
    given = clusters.tolist(), y.tolist(), k
    check(name, mode=oracle.modes(*given), keep=oracle.keep(*given))


@pytest.mark.parametrize("seed", range(4))
def test_vote(seed):
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, 6, 40)
    clusters[clusters == 2] = 3
    labels = rng.choice([0, 5, 7, 2**30 - 1], 40)
    mask = rng.uniform(size=40) < 0.7
    modes, keep = map(np.asarray, vote_out(clusters, labels, mask, 6))
    expected = oracle.modes(clusters[mask].tolist(), labels[mask].tolist(), 6)
    assert modes.tolist() == expected
    assert expected[2] == -1
    kept = oracle.keep(clusters[mask].tolist(), labels[mask].tolist(), 6)
    np.testing.assert_array_equal(keep[mask], kept)
    assert not keep[~mask].any()
    assert not vote_out(clusters, labels, np.zeros(40, bool), 6)[1].any()


def test_label_codes():
    y = np.zeros((3, 30), np.int8)
    y[1, [0, 3]], y[2, 29] = 1, 1
    assert label_codes(jnp.asarray(y)).tolist() == [0, 9, 2**29]
    assert label_codes(jnp.array([4, 0], jnp.uint8)).tolist() == [4, 0]


def test_contract():
    registered = CLIENT_DEFENSES
    assert registered["sanitization"] is sanitization
    assert LOCAL.name == GLOBAL.name == "sanitization"
    assert GLOBAL.needs == {"key", "round", "client_ids"}
    assert LOCAL.needs == GLOBAL.needs | {"features"}
    state = fresh()
    np.testing.assert_array_equal(state.keep, MASK)
    assert (state.separation.shape, state.separation.dtype) == ((N,), jnp.float32)


@pytest.mark.parametrize("field", sorted(LOCAL.needs))
def test_what_it_needs(field):
    x, y, _ = federation(0)
    context = RoundContext(
        jax.random.key(0), round=START, client_ids=EVERYBODY, features=features
    )
    context = context._replace(**{field: None})
    with pytest.raises(ValueError, match=rf"sanitization needs context\.{field}"):
        LOCAL.apply(lambda i: ClientData(x[i], y[i], MASK[i]), fresh(), context)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"num_clusters": 1}, "num_clusters must be an integer of at least 2; got 1"),
        ({"start": -1}, "start must be an integer of at least 0"),
        ({"every": 0}, "every must be an integer of at least 1"),
        ({"max_steps": 0}, "max_steps must be an integer of at least 1"),
        ({"ratio": 0.0}, r"ratio must be a finite number in \(0, 1\]"),
        ({"ratio": 1.5}, r"ratio must be a finite number in \(0, 1\]"),
        ({"vote": "globl"}, "vote of sanitization 'globl'. Did you mean 'global'"),
        ({"server": "twice"}, "server of sanitization 'twice'"),
        ({"features": "pixels"}, "Valid: inputs, model"),
    ],
)
def test_refused_options(options, error):
    with pytest.raises(ValueError, match=error):
        sanitization(**{"num_clusters": 3} | options)


def test_validate():
    y = np.zeros(40, np.int32)
    LOCAL.validate(np.array([9, 3]), y, 10)
    LOCAL.validate(np.array([9, 3]), np.zeros((40, 30), np.uint8), 30)
    with pytest.raises(ValueError, match=r"num_clusters=3, .* with 2\. Lower num_cl"):
        LOCAL.validate(np.array([9, 2]), y, 10)
    for targets, error in [
        (np.zeros((40, 31), int), r"at most 30 labels a sample; got .*\(40, 31\)"),
        (np.full((40, 3), 2), r"0 and 1 in \[P, L\]; got int64 of shape \(40, 3\)"),
        (np.zeros(40), "needs integer targets .* got float64"),
        (np.zeros((40, 3, 2), int), r"of shape \(40, 3, 2\)"),
    ]:
        with pytest.raises(ValueError, match=error):
            LOCAL.validate(np.array([9, 3]), targets, 10)
